//! The last field of a structure that earlier versions did not have: it is written only if it is so, and absent means no.

use serde::{Deserialize, Deserializer};

pub(crate) fn is_false(said: &bool) -> bool {
    !said
}

pub(crate) fn or_false<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    // What is absent looks like a format that ends too early.
    Ok(bool::deserialize(deserializer).unwrap_or(false))
}

#[cfg(test)]
mod tests {
    use serde::Serialize;

    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct New {
        number: u8,
        #[serde(default, skip_serializing_if = "is_false", deserialize_with = "or_false")]
        leaving: bool,
    }

    #[test]
    fn earlier_versions_read_it_and_are_read() {
        let bytes = |leaving| postcard::to_allocvec(&New { number: 7, leaving }).unwrap();
        assert_eq!(bytes(false), [7], "what earlier versions write");
        assert_eq!(bytes(true), [7, 1]);
        for leaving in [false, true] {
            assert_eq!(postcard::from_bytes::<New>(&bytes(leaving)), Ok(New { number: 7, leaving }));
        }
        assert!(postcard::from_bytes::<New>(&[]).is_err());
    }
}
