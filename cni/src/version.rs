//! The versions of the CNI specification that the plugin speaks.

use std::fmt;

use crate::error::{CniError, Code};

/// A supported version of the specification; ordered by age.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum CniVersion {
    /// 0.3.1
    V0_3_1,
    /// 0.4.0: adds CHECK.
    V0_4_0,
    /// 1.0.0: drops `ips[].version`.
    V1_0_0,
    /// 1.1.0: adds STATUS and GC, and the MTU in the result.
    V1_1_0,
}

impl CniVersion {
    /// Every supported version, oldest first.
    pub const ALL: [Self; 4] = [Self::V0_3_1, Self::V0_4_0, Self::V1_0_0, Self::V1_1_0];

    /// The newest supported version.
    pub const NEWEST: Self = Self::V1_1_0;

    /// The version as it is written in configurations and results.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }

    /// Reads the `cniVersion` of a configuration. An empty text means 0.1.0, as an absent key does.
    ///
    /// # Errors
    /// Code 6 when the text is not a version, code 1 when it is one that the plugin does not speak.
    pub fn parse(text: &str) -> Result<Self, CniError> {
        let text = if text.is_empty() { "0.1.0" } else { text };
        let known = Self::ALL.into_iter().find(|version| version.as_str() == text);
        if let Some(version) = known {
            return Ok(version);
        }
        if !is_version(text) {
            let shown: String = text.chars().take(32).collect();
            return Err(CniError::new(
                Code::Decode,
                format!("config field \"cniVersion\": {shown:?} is not a version such as \"1.1.0\""),
            ));
        }
        Err(CniError::new(Code::IncompatibleVersion, "incompatible CNI versions")
            .with_details(format!("config is {text:?}, plugin supports {:?}", Self::supported())))
    }

    /// All supported versions as text, oldest first.
    pub fn supported() -> [&'static str; 4] {
        Self::ALL.map(Self::as_str)
    }
}

impl fmt::Display for CniVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One to three decimal numbers, as the reference library accepts them.
fn is_version(text: &str) -> bool {
    let mut parts = 0;
    for part in text.split('.') {
        parts += 1;
        if parts > 3 || part.is_empty() || part.len() > 6 || !part.bytes().all(|b| b.is_ascii_digit()) {
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn s032_s033_s034_versions_are_told_apart() {
        for version in CniVersion::ALL {
            assert_eq!(CniVersion::parse(version.as_str()), Ok(version));
        }
        for unsupported in ["", "0.1.0", "0.2.0", "0.3.0", "1.2.0", "2", "9.9.9"] {
            let error = CniVersion::parse(unsupported).unwrap_err();
            assert_eq!(error.code(), Code::IncompatibleVersion, "{unsupported}");
            let details = error.details().unwrap();
            assert!(details.contains("1.1.0"), "both sides are named: {details}");
            if !unsupported.is_empty() {
                assert!(details.contains(unsupported), "both sides are named: {details}");
            }
        }
        for nonsense in ["abc", "1.0.0.0", "1..0", "v1.0.0", "1.0.0-beta", "1.0000000.0", " 1.0.0"] {
            assert_eq!(CniVersion::parse(nonsense).unwrap_err().code(), Code::Decode, "{nonsense}");
        }
    }

    #[test]
    fn versions_are_ordered_by_age() {
        assert!(CniVersion::V0_3_1 < CniVersion::V0_4_0);
        assert!(CniVersion::V1_0_0 < CniVersion::NEWEST);
    }
}
