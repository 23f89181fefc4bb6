//! Errors as the runtime sees them: one JSON object on stdout.

use std::fmt;

use serde_json::{Value, json};

use crate::version::CniVersion;

/// The error codes of the plugin. 1 to 99 are those of the specification (section 5, "Error"), 8 is the
/// one the reference library added; those from 100 on are ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// The configuration asks for a version of the specification that is not supported.
    IncompatibleVersion,
    /// An environment variable is missing or invalid; the message names it.
    Environment,
    /// Standard input or a file could not be read or written.
    Io,
    /// Standard input is not JSON.
    Decode,
    /// A field of the configuration is missing or wrong; the message names it.
    InvalidConfig,
    /// `CNI_NETNS` is not a network namespace, or is the host's own.
    InvalidNetns,
    /// Nothing is wrong with the request; try again later.
    TryAgainLater,
    /// STATUS only: ADD cannot be served.
    NotAvailable,
    /// The node has no free address.
    Exhausted,
    /// The interface or attachment exists already.
    Exists,
    /// The daemon refused, or answered something that does not fit the request.
    Daemon,
    /// The kernel refused an operation; the message says which.
    Kernel,
    /// CHECK only: something is not as ADD left it.
    Changed,
}

impl Code {
    /// The number in the error document.
    pub fn number(self) -> u32 {
        match self {
            Self::IncompatibleVersion => 1,
            Self::Environment => 4,
            Self::Io => 5,
            Self::Decode => 6,
            Self::InvalidConfig => 7,
            Self::InvalidNetns => 8,
            Self::TryAgainLater => 11,
            Self::NotAvailable => 50,
            Self::Exhausted => 100,
            Self::Exists => 101,
            Self::Daemon => 102,
            Self::Kernel => 103,
            Self::Changed => 104,
        }
    }
}

/// Why an operation failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CniError {
    code: Code,
    msg: String,
    details: Vec<String>,
    version: CniVersion,
}

impl CniError {
    /// An error with one sentence.
    pub fn new(code: Code, msg: impl Into<String>) -> Self {
        Self { code, msg: msg.into(), details: Vec::new(), version: CniVersion::NEWEST }
    }

    /// Adds a sentence to the details, such as a failure on the way of undoing.
    #[must_use]
    pub fn with_details(mut self, details: impl Into<String>) -> Self {
        self.details.push(details.into());
        self
    }

    /// Sets the version of the request, which the error document repeats.
    #[must_use]
    pub fn with_version(mut self, version: CniVersion) -> Self {
        self.version = version;
        self
    }

    /// What went wrong, for programs.
    pub fn code(&self) -> Code {
        self.code
    }

    /// What went wrong, for people.
    pub fn msg(&self) -> &str {
        &self.msg
    }

    /// More about it, when there is more.
    pub fn details(&self) -> Option<String> {
        if self.details.is_empty() { None } else { Some(self.details.join("; ")) }
    }

    /// The error document.
    pub fn to_json(&self) -> Value {
        let mut document = json!({
            "cniVersion": self.version.as_str(),
            "code": self.code.number(),
            "msg": self.msg,
        });
        if let Some(details) = self.details() {
            document["details"] = Value::String(details);
        }
        document
    }
}

impl fmt::Display for CniError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.msg)?;
        match self.details() {
            Some(details) => write!(f, " ({details})"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for CniError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn s028_the_error_document_has_all_four_fields() {
        let error = CniError::new(Code::Environment, "no CNI_IFNAME")
            .with_details("a")
            .with_details("b")
            .with_version(CniVersion::V0_4_0);
        assert_eq!(
            error.to_json(),
            json!({"cniVersion": "0.4.0", "code": 4, "msg": "no CNI_IFNAME", "details": "a; b"})
        );
        let plain = CniError::new(Code::Io, "x").to_json();
        assert!(plain.get("details").is_none(), "details are optional and left out when empty");
    }

    #[test]
    fn s030_s031_codes_are_the_specified_ones_or_at_least_100() {
        let all = [
            (Code::IncompatibleVersion, 1),
            (Code::Environment, 4),
            (Code::Io, 5),
            (Code::Decode, 6),
            (Code::InvalidConfig, 7),
            (Code::InvalidNetns, 8),
            (Code::TryAgainLater, 11),
            (Code::NotAvailable, 50),
        ];
        for (code, number) in all {
            assert_eq!(code.number(), number);
        }
        for own in [Code::Exhausted, Code::Exists, Code::Daemon, Code::Kernel, Code::Changed] {
            assert!(own.number() >= 100);
        }
    }
}
