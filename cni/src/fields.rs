//! Strictly typed access to a JSON object; every error names the field by its whole path.

use serde_json::{Map, Value};

use crate::error::{CniError, Code};

/// A JSON object and where it was found.
///
/// `null` counts as absent: programs written in Go send it for empty lists and objects.
#[derive(Clone, Debug)]
pub(crate) struct Fields<'a> {
    map: &'a Map<String, Value>,
    path: String,
}

impl<'a> Fields<'a> {
    /// The object at the top of the configuration.
    pub(crate) fn top(map: &'a Map<String, Value>) -> Self {
        Self { map, path: String::new() }
    }

    /// The object `value`, found at `path`.
    ///
    /// # Errors
    /// Code 7 when it is not an object.
    pub(crate) fn new(value: &'a Value, path: String) -> Result<Self, CniError> {
        match value.as_object() {
            Some(map) => Ok(Self { map, path }),
            None => Err(wrong_type(&path, "an object", value)),
        }
    }

    /// The object itself.
    pub(crate) fn map(&self) -> &'a Map<String, Value> {
        self.map
    }

    /// The whole path of a field of this object.
    pub(crate) fn path_of(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// The error for a field whose value has the right type and is still wrong.
    pub(crate) fn invalid(&self, name: &str, why: impl AsRef<str>) -> CniError {
        invalid(&self.path_of(name), why)
    }

    /// A text.
    ///
    /// # Errors
    /// Code 7 when it is something else.
    pub(crate) fn text(&self, name: &str) -> Result<Option<&'a str>, CniError> {
        self.typed(name, "a string", Value::as_str)
    }

    /// An unsigned number.
    ///
    /// # Errors
    /// Code 7 when it is something else, negative or has a fraction.
    pub(crate) fn number(&self, name: &str) -> Result<Option<u64>, CniError> {
        self.typed(name, "a whole number that is not negative", Value::as_u64)
    }

    /// A list.
    ///
    /// # Errors
    /// Code 7 when it is something else.
    pub(crate) fn list(&self, name: &str) -> Result<Option<&'a [Value]>, CniError> {
        self.typed(name, "a list", |value| value.as_array().map(Vec::as_slice))
    }

    /// A list of objects; empty when absent.
    ///
    /// # Errors
    /// Code 7 when it or one of its elements is something else.
    pub(crate) fn objects(&self, name: &str) -> Result<Vec<Fields<'a>>, CniError> {
        let list = self.list(name)?.unwrap_or_default();
        list.iter()
            .enumerate()
            .map(|(i, value)| Fields::new(value, format!("{}[{i}]", self.path_of(name))))
            .collect()
    }

    /// A list of texts; empty when absent.
    ///
    /// # Errors
    /// Code 7 when it or one of its elements is something else.
    pub(crate) fn texts(&self, name: &str) -> Result<Vec<String>, CniError> {
        let list = self.list(name)?.unwrap_or_default();
        let element = |(i, value): (usize, &Value)| match value.as_str() {
            Some(text) => Ok(text.to_owned()),
            None => Err(wrong_type(&format!("{}[{i}]", self.path_of(name)), "a string", value)),
        };
        list.iter().enumerate().map(element).collect()
    }

    /// An object.
    ///
    /// # Errors
    /// Code 7 when it is something else.
    pub(crate) fn object(&self, name: &str) -> Result<Option<Fields<'a>>, CniError> {
        match self.present(name) {
            Some(value) => Fields::new(value, self.path_of(name)).map(Some),
            None => Ok(None),
        }
    }

    fn present(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    fn typed<T>(
        &self,
        name: &str,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, CniError> {
        match self.present(name) {
            Some(value) => {
                read(value).map(Some).ok_or_else(|| wrong_type(&self.path_of(name), expected, value))
            }
            None => Ok(None),
        }
    }
}

/// The error for a field with a wrong value.
pub(crate) fn invalid(path: &str, why: impl AsRef<str>) -> CniError {
    CniError::new(Code::InvalidConfig, format!("config field \"{path}\": {}", why.as_ref()))
}

fn wrong_type(path: &str, expected: &str, value: &Value) -> CniError {
    let found = match value {
        Value::Null => "null".to_owned(),
        Value::Bool(flag) => flag.to_string(),
        Value::Number(number) => format!("the number {number}"),
        Value::String(_) => "a string".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
    };
    invalid(path, format!("expected {expected}, found {found}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn s022_a_wrong_type_is_named_with_its_path() {
        let value = json!({"a": {"b": [{"c": 1}, 2], "t": ["x", 5]}, "n": -1, "null": null});
        let top = Fields::top(value.as_object().unwrap());
        let a = top.object("a").unwrap().unwrap();
        assert_eq!(
            a.objects("b").unwrap_err().msg(),
            "config field \"a.b[1]\": expected an object, found the number 2"
        );
        assert_eq!(
            a.texts("t").unwrap_err().msg(),
            "config field \"a.t[1]\": expected a string, found the number 5"
        );
        assert!(top.number("n").unwrap_err().msg().contains("\"n\""));
        assert_eq!(top.text("a").unwrap_err().code(), Code::InvalidConfig);
        assert_eq!(top.text("null"), Ok(None));
        assert_eq!(top.number("absent"), Ok(None));
    }
}
