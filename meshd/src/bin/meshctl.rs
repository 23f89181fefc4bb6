//! The command line tool; see [`meshd::ctl`].

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    meshd::ctl::main()
}
