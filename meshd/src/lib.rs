//! The Hauberk daemon and its command line tool.

#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a failed unwrap fails the test"))]

pub mod api;
pub mod config;
pub mod ctl;
pub mod daemon;
pub mod datagrams;
pub mod dataplane;
pub mod http;
pub mod links;
pub mod marks;
pub mod remains;
pub mod session;
pub mod store;
