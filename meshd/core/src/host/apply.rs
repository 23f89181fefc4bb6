//! What each operation does to the state of the host, without a kernel: the reference for tests and the
//! kernel of simulated nodes.

use std::collections::BTreeMap;

use super::{Bridge, HostState, Lane, LanePeer, Op};

impl HostState {
    /// Does what the shell does for `op`.
    pub fn apply(&mut self, op: &Op) {
        match op {
            Op::SetSysctl { path, value } => {
                self.sysctls.insert(path.clone(), value.clone());
            }
            Op::SetGuard(guard) => self.guard = Some(guard.clone()),
            Op::SetBridge(bridge) => {
                let had = self.bridge.take().filter(|had| had.name == bridge.name);
                let addresses = had.map(|had| had.addresses).unwrap_or_default();
                self.bridge = Some(Bridge { addresses, ..bridge.clone() });
            }
            Op::SetLane { device, port, public_key, mtu } => {
                let lane = self.lanes.entry(device.clone()).or_insert_with(|| Lane {
                    port: *port,
                    public_key: *public_key,
                    mtu: *mtu,
                    addresses: Default::default(),
                    peers: BTreeMap::new(),
                });
                (lane.port, lane.public_key, lane.mtu) = (*port, *public_key, *mtu);
            }
            Op::AddAddress { device, address } => {
                if let Some(addresses) = self.addresses_mut(device) {
                    addresses.insert(*address);
                }
            }
            Op::RemoveAddress { device, address } => {
                if let Some(addresses) = self.addresses_mut(device) {
                    addresses.remove(address);
                }
            }
            Op::SetPeer { .. } => self.set_peer(op),
            Op::RemovePeer { device, peer } => {
                if let Some(lane) = self.lanes.get_mut(device) {
                    lane.peers.remove(peer);
                }
            }
            Op::SetPort { name, port } => {
                self.ports.insert(name.clone(), port.clone());
            }
            Op::RemovePort { name, .. } => {
                self.ports.remove(name);
            }
            Op::SetRoute { to, route } => {
                self.routes.insert(*to, route.clone());
            }
            Op::RemoveRoute { to } => {
                self.routes.remove(to);
            }
            Op::RemoveLane { device } => {
                self.lanes.remove(device);
            }
            Op::RemoveBridge { name } => {
                self.bridge = self.bridge.take().filter(|bridge| bridge.name != *name);
            }
        }
    }

    fn addresses_mut(&mut self, device: &str) -> Option<&mut std::collections::BTreeSet<std::net::IpAddr>> {
        match &mut self.bridge {
            Some(bridge) if bridge.name == device => Some(&mut bridge.addresses),
            _ => self.lanes.get_mut(device).map(|lane| &mut lane.addresses),
        }
    }

    fn set_peer(&mut self, op: &Op) {
        let Op::SetPeer { device, peer, psk, endpoint, keepalive, add_allowed_ips, remove_allowed_ips } = op
        else {
            return;
        };
        let Some(lane) = self.lanes.get_mut(device) else { return };
        for (key, other) in &mut lane.peers {
            if key != peer {
                other.allowed_ips.retain(|net| !add_allowed_ips.contains(net));
            }
        }
        match lane.peers.get_mut(peer) {
            Some(entry) => {
                entry.psk = psk.clone().unwrap_or_else(|| entry.psk.clone());
                entry.endpoint = endpoint.or(entry.endpoint);
                entry.keepalive = keepalive.unwrap_or(entry.keepalive);
                entry.allowed_ips.extend(add_allowed_ips);
                entry.allowed_ips.retain(|net| !remove_allowed_ips.contains(net));
            }
            None => {
                // A peer without a pre-shared key is refused, as the shell refuses it.
                let Some(psk) = psk.clone() else { return };
                lane.peers.insert(
                    *peer,
                    LanePeer {
                        psk,
                        endpoint: *endpoint,
                        force_endpoint: false,
                        allowed_ips: add_allowed_ips.clone(),
                        keepalive: keepalive.unwrap_or(0),
                    },
                );
            }
        }
    }
}
