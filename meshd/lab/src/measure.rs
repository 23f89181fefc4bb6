//! Throughput and memory, measured in the running lab.

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
    host.processes_of(program)?.into_iter().map(|process| process.resident_bytes()).collect()
}
