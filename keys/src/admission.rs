//! A member's signed statement that a node may take part in a cluster.
//!
//! Admissions form a grow-only set. A node is a member if a chain of sponsors leads from it to the
//! founder named in the genesis document; walking that chain needs the whole set and is done by the
//! caller. [`Signed::check`](crate::Signed) does what one admission allows to check alone.
//!
//! ## Body (postcard), domain "hauberk admission v1"
//!
//! ```text
//! 0..32     cluster id
//! 32..64    subject: identity key of the node that is let in
//! 64..96    sponsor: identity key of the member that lets it in, and that signs
//! 96        join mode: 1 key file, 2 password, 3 token, others by newer versions
//! 97..      issued_serial: varint u64
//! +4        in mode 3: id of the token
//! ```

use crate::cluster::ClusterId;
use crate::identity::{Identity, IdentityKey};
use crate::signed::{Signable, Signed, SignedError};
use crate::token::TokenId;
use serde::de::{Error as _, SeqAccess, Visitor};
use serde::ser::SerializeTuple as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;

/// The statement. Signed, it is a [`SignedAdmission`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Admission {
    /// The cluster that the subject is let into.
    pub cluster: ClusterId,
    /// Who is let in.
    pub subject: IdentityKey,
    /// Who lets it in, and signs.
    pub sponsor: IdentityKey,
    /// How the subject showed that it may join.
    pub mode: JoinMode,
    /// Counts the sponsor's admissions, so that a later one about the same subject can be told.
    pub issued_serial: u64,
}

impl Signable for Admission {
    const DOMAIN: &'static str = "hauberk admission v1";
    const MAX_LEN: usize = 512;
}

/// An admission with its sponsor's signature.
pub type SignedAdmission = Signed<Admission>;

impl Signed<Admission> {
    /// Lets `subject` into `cluster` in the name of `sponsor`.
    ///
    /// # Errors
    /// [`AdmissionError::SelfSponsored`].
    pub fn issue(
        cluster: ClusterId,
        subject: IdentityKey,
        sponsor: &Identity,
        mode: JoinMode,
        issued_serial: u64,
    ) -> Result<Self, AdmissionError> {
        let admission = Admission { cluster, subject, sponsor: sponsor.public(), mode, issued_serial };
        if admission.subject == admission.sponsor {
            return Err(AdmissionError::SelfSponsored);
        }
        Ok(Self::sign(&admission, sponsor)?)
    }

    /// Checks what can be checked without the other admissions: that it is for `cluster`, that no
    /// node lets itself in, and that the sponsor named in it signed it.
    ///
    /// # Errors
    /// [`AdmissionError`]; nothing else may be concluded from the body then.
    pub fn check(&self, cluster: &ClusterId) -> Result<Admission, AdmissionError> {
        let claimed = self.decode()?;
        if claimed.cluster != *cluster {
            return Err(AdmissionError::OtherCluster { expected: *cluster, found: claimed.cluster });
        }
        if claimed.subject == claimed.sponsor {
            return Err(AdmissionError::SelfSponsored);
        }
        if !claimed.subject.is_usable() {
            return Err(AdmissionError::UnusableSubject { subject: claimed.subject });
        }
        Ok(self.verify(&claimed.sponsor)?)
    }
}

impl Serialize for Admission {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let token = if let JoinMode::Token(id) = self.mode { Some(id) } else { None };
        let mut fields = s.serialize_tuple(if token.is_some() { 6 } else { 5 })?;
        fields.serialize_element(&self.cluster)?;
        fields.serialize_element(&self.subject)?;
        fields.serialize_element(&self.sponsor)?;
        fields.serialize_element(&self.mode.code())?;
        fields.serialize_element(&self.issued_serial)?;
        // Behind the rest, where earlier versions expect fields that they do not know.
        if let Some(id) = token {
            fields.serialize_element(&id)?;
        }
        fields.end()
    }
}

impl<'de> Deserialize<'de> for Admission {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Admission;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an admission")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Admission, A::Error> {
                fn next<'de, T: Deserialize<'de>, A: SeqAccess<'de>>(seq: &mut A) -> Result<T, A::Error> {
                    seq.next_element()?.ok_or_else(|| A::Error::custom("an admission is cut short"))
                }
                let (cluster, subject, sponsor) = (next(&mut seq)?, next(&mut seq)?, next(&mut seq)?);
                let (code, issued_serial) = (next(&mut seq)?, next(&mut seq)?);
                let mode = match code {
                    1 => JoinMode::KeyFile,
                    2 => JoinMode::Password,
                    3 => JoinMode::Token(next(&mut seq)?),
                    other => JoinMode::Other(other),
                };
                Ok(Admission { cluster, subject, sponsor, mode, issued_serial })
            }
        }
        d.deserialize_tuple(6, Fields)
    }
}

/// How a node showed that it may join.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum JoinMode {
    /// By the key file (1).
    KeyFile,
    /// By the password (2).
    Password,
    /// By this token (3).
    Token(TokenId),
    /// By a way that a newer version knows. The sponsor has checked it.
    Other(u8),
}

impl JoinMode {
    /// The byte that stands for it.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::KeyFile => 1,
            Self::Password => 2,
            Self::Token(_) => 3,
            Self::Other(code) => code,
        }
    }
}

impl fmt::Display for JoinMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::KeyFile => f.write_str("key file"),
            Self::Password => f.write_str("password"),
            Self::Token(id) => write!(f, "token {id}"),
            Self::Other(code) => write!(f, "join mode {code}"),
        }
    }
}

/// Why an admission is refused. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdmissionError {
    /// Not signed by its sponsor, or malformed.
    #[error(transparent)]
    Signed(#[from] SignedError),
    /// It is about another cluster.
    #[error("the admission is for cluster {}, but this is cluster {}", found.short(), expected.short())]
    OtherCluster {
        /// The cluster asked for.
        expected: ClusterId,
        /// The cluster named in the admission.
        found: ClusterId,
    },
    /// Subject and sponsor are the same node.
    #[error("a node cannot admit itself")]
    SelfSponsored,
    /// The subject is no Ed25519 key, so it could never prove to be itself.
    #[error("the admitted identity key {subject} is no valid key")]
    UnusableSubject {
        /// The key named in the admission.
        subject: IdentityKey,
    },
}
