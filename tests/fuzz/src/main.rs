//! The program that libFuzzer drives; `cargo xtask fuzz` builds and runs it.
//!
//! `HAUBERK_FUZZ_TARGET` names the target (`list` prints all names), because the command line belongs to libFuzzer.

#![no_main]
#![forbid(unsafe_code)]

use std::sync::OnceLock;

use mesh_fuzz::Target;

static TARGET: OnceLock<&'static Target> = OnceLock::new();

libfuzzer_sys::fuzz_target!(
    init: choose(),
    |data: &[u8]| {
        if let Some(target) = TARGET.get() {
            (target.run)(data);
        }
    }
);

#[expect(clippy::print_stdout, clippy::print_stderr, reason = "answers to whoever started it")]
fn choose() {
    let name = std::env::var("HAUBERK_FUZZ_TARGET").unwrap_or_default();
    if name == "list" {
        mesh_fuzz::TARGETS.iter().for_each(|target| println!("{}", target.name));
        std::process::exit(0);
    }
    match mesh_fuzz::target(&name) {
        Some(target) => {
            TARGET.get_or_init(|| target);
        }
        None => {
            eprintln!("HAUBERK_FUZZ_TARGET={name:?}: no such fuzz target");
            std::process::exit(2);
        }
    }
}
