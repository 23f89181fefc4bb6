//! Throughput and memory, measured in the running lab.

use std::path::Path;

use anyhow::{Context, Result};

use crate::family::Family;
use crate::host::Host;
use crate::stream::{self, Server, Transfer};

/// A checked TCP transfer between two hosts over the bare underlay (veth, bridge, veth): what the machine
/// can do without a mesh.
pub(crate) fn underlay_transfer(from: &Host, to: &Host, family: Family, bytes: u64) -> Result<Transfer> {
    let address = to.underlay(family);
    let server = to.net().run(|| Server::start(address))??;
    let target = server.address();
    from.net().run(|| stream::send(target, 0, bytes))?.with_context(|| format!("from host {}", from.name()))
}

/// Resident memory in bytes of the processes of a host whose program has this name.
pub(crate) fn resident_bytes(host: &Host, program: &str) -> Result<Vec<u64>> {
    let processes = host.processes()?;
    let ours = processes.iter().filter(|(_, arguments)| {
        let first = arguments.first().map(Path::new);
        first.and_then(Path::file_name).is_some_and(|name| name == program)
    });
    ours.map(|(process, _)| process.resident_bytes()).collect()
}
