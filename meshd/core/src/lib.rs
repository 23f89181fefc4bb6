//! Everything in Hauberk that decides: pure, deterministic, without I/O.

#![forbid(unsafe_code)]
#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::wildcard_enum_match_arm,
        clippy::cast_possible_truncation,
        reason = "what is not expected fails the test"
    )
)]

pub mod api;
pub mod diagnose;
pub mod gossip;
pub mod host;
pub mod leases;
pub mod message;
pub mod node;
pub mod overlap;
pub mod path;
mod persistent;
pub mod ranges;
pub mod relay;
mod said;
pub mod state;
pub mod time;
pub mod view;
mod wiped;
