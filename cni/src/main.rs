//! The Hauberk CNI plugin; see the library of the same name.

#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    mesh_cni::run()
}
