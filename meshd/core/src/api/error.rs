//! The error document of the control API.

use serde::{Deserialize, Serialize};

/// What went wrong, for programs (`code`) and for people (`message`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// What a caller branches on.
    pub code: ErrorCode,
    /// One sentence that names the field or object and the likely mistake.
    pub message: String,
}

impl ApiError {
    /// An error with its sentence.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

/// The kinds of errors of the control API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorCode {
    /// The request is malformed or contradicts itself; repeating it will not help. HTTP 400.
    Invalid,
    /// There is no such object. HTTP 404.
    NotFound,
    /// The object exists already and differs from what was asked. HTTP 409.
    Conflict,
    /// Several objects fit; the message lists them. HTTP 409.
    Ambiguous,
    /// The cluster's rules do not allow it, or want another signature; the message says whose. HTTP 403.
    Forbidden,
    /// The node has no free address. Nothing was changed. The message says how many it has, which members may
    /// have free ones, and what would help. HTTP 507.
    Exhausted,
    /// The node is not in a cluster yet, or has no addresses yet; try again later. HTTP 503.
    NotReady,
    /// The kernel or the disk refused; the message says which operation. Nothing was changed. HTTP 500.
    Internal,
    /// A code of a newer daemon.
    #[serde(other)]
    Unknown,
}

impl ErrorCode {
    /// The HTTP status that goes with the code.
    pub fn http_status(self) -> u16 {
        match self {
            Self::Invalid => 400,
            Self::NotFound => 404,
            Self::Conflict | Self::Ambiguous => 409,
            Self::Forbidden => 403,
            Self::Exhausted => 507,
            Self::NotReady => 503,
            Self::Internal | Self::Unknown => 500,
        }
    }
}
