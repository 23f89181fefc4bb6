//! Devices: bridges, veth pairs, bridge ports.

use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::{Blocking, Mac, RtnlError, about, check_name, deleted};
use crate::netlink::{Attr, Attrs, Body, Message, NLM_F_CREATE, NLM_F_EXCL};
use crate::netns::NetNs;

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINK: u16 = 5;
const IFLA_MASTER: u16 = 10;
const IFLA_TXQLEN: u16 = 13;
const IFLA_LINKINFO: u16 = 18;
const IFLA_IFALIAS: u16 = 20;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_LINK_NETNSID: u16 = 37;

const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_INFO_SLAVE_KIND: u16 = 4;
const IFLA_INFO_SLAVE_DATA: u16 = 5;

const IFLA_BR_MCAST_SNOOPING: u16 = 23;
const VETH_INFO_PEER: u16 = 1;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;

const IFLA_BRPORT_STATE: u16 = 1;
const IFLA_BRPORT_MODE: u16 = 4;
const IFLA_BRPORT_LEARNING: u16 = 8;
const IFLA_BRPORT_UNICAST_FLOOD: u16 = 9;
const IFLA_BRPORT_MCAST_FLOOD: u16 = 27;
const IFLA_BRPORT_BCAST_FLOOD: u16 = 30;
const IFLA_BRPORT_NEIGH_SUPPRESS: u16 = 32;
const IFLA_BRPORT_ISOLATED: u16 = 33;
const IFLA_BRPORT_LOCKED: u16 = 39;

const BR_STATE_FORWARDING: u8 = 3;
const AF_INET6: u16 = 10;
const IFF_UP: u32 = 1;
const IFF_LOWER_UP: u32 = 1 << 16;
const IFINFOMSG: usize = 16;

/// How often a port's state is looked at.
const POLL_PORT: Duration = Duration::from_millis(5);

/// A device as the kernel shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Index, unique in the namespace.
    pub index: u32,
    /// Name.
    pub name: String,
    /// Kind of a virtual device (`bridge`, `veth`, `tun`, `wireguard`…), `None` for hardware and `lo`.
    pub kind: Option<String>,
    /// Ethernet address, `None` for devices without one.
    pub mac: Option<Mac>,
    /// MTU in bytes.
    pub mtu: u32,
    /// Administratively up.
    pub up: bool,
    /// The other side is up too (carrier).
    pub carrier: bool,
    /// Transmit queue length in packets.
    pub txqlen: u32,
    /// Index of the bridge (or other master) it belongs to.
    pub master: Option<u32>,
    /// For a veth: the index of its other end, in the namespace [`Link::peer_netns_id`].
    pub peer_index: Option<u32>,
    /// This namespace's id for the one the other end is in; `None` when it is in the same one.
    pub peer_netns_id: Option<i32>,
    /// Alias text.
    pub alias: Option<String>,
    /// Its settings as a bridge port, when it is one.
    pub port: Option<BridgePort>,
}

/// Settings of a bridge port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BridgePort {
    /// Never exchanges frames with another isolated port, only with the bridge itself and with
    /// ports that are not isolated.
    pub isolated: bool,
    /// Learns source addresses into the forwarding table.
    pub learning: bool,
    /// May send a frame back out of the port it came in by.
    pub hairpin: bool,
    /// Gets unicast frames for unknown destinations.
    pub unicast_flood: bool,
    /// Gets multicast frames nobody asked for.
    pub multicast_flood: bool,
    /// Gets broadcast frames.
    pub broadcast_flood: bool,
    /// The bridge answers ARP and ND from its own neighbour table instead of flooding.
    pub neigh_suppress: bool,
    /// Takes frames only from source addresses whose forwarding entry points to this port: a check
    /// of the bridge's own, in force without any nftables (Linux 5.18).
    pub locked: bool,
    /// The port passes frames. Read only; see [`Blocking::wait_port_forwarding`].
    pub forwarding: bool,
}

/// What to change of a bridge port; `None` leaves it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BridgePortChange {
    /// See [`BridgePort::isolated`].
    pub isolated: Option<bool>,
    /// See [`BridgePort::learning`].
    pub learning: Option<bool>,
    /// See [`BridgePort::hairpin`].
    pub hairpin: Option<bool>,
    /// See [`BridgePort::unicast_flood`].
    pub unicast_flood: Option<bool>,
    /// See [`BridgePort::multicast_flood`].
    pub multicast_flood: Option<bool>,
    /// See [`BridgePort::broadcast_flood`].
    pub broadcast_flood: Option<bool>,
    /// See [`BridgePort::neigh_suppress`].
    pub neigh_suppress: Option<bool>,
    /// See [`BridgePort::locked`].
    pub locked: Option<bool>,
}

/// How the kernel makes link-local IPv6 addresses by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddrGenMode {
    /// From the Ethernet address.
    Eui64,
    /// Not at all.
    None,
}

/// What to change of a device; `None` leaves it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LinkChange {
    /// Up or down. Applied together with the rest, in one request.
    pub up: Option<bool>,
    /// MTU in bytes.
    pub mtu: Option<u32>,
    /// Index of the new master; `Some(None)` takes it out of its bridge.
    pub master: Option<Option<u32>>,
    /// Ethernet address.
    pub mac: Option<Mac>,
    /// New name. Older kernels refuse this while the device is up.
    pub name: Option<String>,
    /// Alias, at most 255 bytes; empty removes it.
    pub alias: Option<String>,
    /// Transmit queue length in packets.
    pub txqlen: Option<u32>,
    /// Link-local IPv6 addresses made by the kernel. Set it before the device comes up.
    pub addr_gen: Option<AddrGenMode>,
}

/// A bridge to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BridgeSpec {
    /// Name.
    pub name: String,
    /// Fixed Ethernet address; without one it changes with the ports.
    pub mac: Option<Mac>,
    /// MTU in bytes; without one it is the smallest of the ports'.
    pub mtu: Option<u32>,
    /// Multicast snooping. Off keeps neighbour discovery working where nobody sends queries.
    pub multicast_snooping: bool,
}

/// A veth pair to make. Both ends are made down.
#[derive(Debug)]
pub struct VethSpec {
    /// Name of the near end.
    pub name: String,
    /// Ethernet address of the near end; random without one.
    pub mac: Option<Mac>,
    /// MTU of the near end in bytes.
    pub mtu: Option<u32>,
    /// Index of the bridge that the near end becomes a port of at once.
    pub master: Option<u32>,
    /// The far end.
    pub peer: VethPeer,
}

/// The far end of a veth pair.
#[derive(Debug)]
pub struct VethPeer {
    /// Name.
    pub name: String,
    /// Ethernet address; random without one.
    pub mac: Option<Mac>,
    /// MTU in bytes.
    pub mtu: Option<u32>,
    /// Namespace to be made in. It is never visible in the near one.
    pub netns: Option<NetNs>,
}

fn ifinfomsg(index: u32, flags: u32, change: u32) -> [u8; IFINFOMSG] {
    let mut header = [0; IFINFOMSG];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&flags.to_ne_bytes());
    header[12..16].copy_from_slice(&change.to_ne_bytes());
    header
}

impl Blocking {
    /// All links, by index.
    ///
    /// # Errors
    /// [`RtnlError`].
    pub fn links(&mut self) -> Result<Vec<Link>, RtnlError> {
        let list = self.dump(RTM_GETLINK, &Body::new(&ifinfomsg(0, 0, 0))).map_err(about("list", "links"))?;
        let mut links: Vec<Link> = list.iter().filter_map(parse).collect();
        links.sort_by_key(|l| l.index);
        Ok(links)
    }

    /// The link of this name, if there is one.
    ///
    /// # Errors
    /// [`RtnlError`].
    pub fn link(&mut self, name: &str) -> Result<Option<Link>, RtnlError> {
        check_name(name)?;
        let mut body = Body::new(&ifinfomsg(0, 0, 0));
        body.str(IFLA_IFNAME, name);
        self.get_link(&body, name.to_owned())
    }

    /// The link of this index, if there is one.
    ///
    /// # Errors
    /// [`RtnlError`].
    pub fn link_by_index(&mut self, index: u32) -> Result<Option<Link>, RtnlError> {
        self.get_link(&Body::new(&ifinfomsg(index, 0, 0)), format!("device {index}"))
    }

    fn get_link(&mut self, body: &Body, object: String) -> Result<Option<Link>, RtnlError> {
        match self.request(RTM_GETLINK, 0, body) {
            Ok(replies) => match replies.first().and_then(parse) {
                Some(link) => Ok(Some(link)),
                None => Err(RtnlError::Answer { operation: "look up", object, problem: "no link in it" }),
            },
            Err(crate::netlink::Failure::Kernel(r)) if r.errno == Errno::ENODEV => Ok(None),
            Err(other) => Err(about("look up", object)(other)),
        }
    }

    /// Makes a bridge; returns its index. An existing bridge of that name gets the address, MTU and
    /// snooping asked for.
    ///
    /// # Errors
    /// [`RtnlError::Occupied`] when a device of that name is not a bridge; otherwise the kernel's refusal.
    pub fn create_bridge(&mut self, spec: BridgeSpec) -> Result<u32, RtnlError> {
        check_name(&spec.name)?;
        if let Some(link) = self.link(&spec.name)?
            && link.kind.as_deref() != Some("bridge")
        {
            return Err(RtnlError::Occupied {
                operation: "create bridge",
                object: spec.name,
                present: format!("a device of kind {}", link.kind.as_deref().unwrap_or("physical")),
            });
        }
        let mut body = Body::new(&ifinfomsg(0, 0, 0));
        body.str(IFLA_IFNAME, &spec.name);
        if let Some(mac) = spec.mac {
            body.bytes(IFLA_ADDRESS, &mac.0);
        }
        if let Some(mtu) = spec.mtu {
            body.u32(IFLA_MTU, mtu);
        }
        body.nest(IFLA_LINKINFO, |info| {
            info.str(IFLA_INFO_KIND, "bridge").nest(IFLA_INFO_DATA, |data| {
                data.u8(IFLA_BR_MCAST_SNOOPING, u8::from(spec.multicast_snooping));
            });
        });
        // Without NLM_F_EXCL the same request changes an existing bridge.
        self.request(RTM_NEWLINK, NLM_F_CREATE, &body).map_err(about("create bridge", &spec.name))?;
        self.must_exist(&spec.name, "create bridge")
    }

    /// Makes a veth pair with the far end directly inside its namespace; returns the near end's index.
    ///
    /// # Errors
    /// [`RtnlError::is_exists`] when either name is taken (an existing pair is never taken over, since
    /// nothing tells whose it is); otherwise the kernel's refusal. Nothing is made then.
    pub fn create_veth(&mut self, spec: VethSpec) -> Result<u32, RtnlError> {
        check_name(&spec.name)?;
        check_name(&spec.peer.name)?;
        let mut body = Body::new(&ifinfomsg(0, 0, 0));
        body.str(IFLA_IFNAME, &spec.name);
        if let Some(mac) = spec.mac {
            body.bytes(IFLA_ADDRESS, &mac.0);
        }
        if let Some(mtu) = spec.mtu {
            body.u32(IFLA_MTU, mtu);
        }
        if let Some(master) = spec.master {
            body.u32(IFLA_MASTER, master);
        }
        body.nest(IFLA_LINKINFO, |info| {
            info.str(IFLA_INFO_KIND, "veth").nest(IFLA_INFO_DATA, |data| {
                data.nest(VETH_INFO_PEER, |peer| {
                    peer.raw(&ifinfomsg(0, 0, 0)).str(IFLA_IFNAME, &spec.peer.name);
                    if let Some(mac) = spec.peer.mac {
                        peer.bytes(IFLA_ADDRESS, &mac.0);
                    }
                    if let Some(mtu) = spec.peer.mtu {
                        peer.u32(IFLA_MTU, mtu);
                    }
                    if let Some(netns) = &spec.peer.netns {
                        peer.bytes(IFLA_NET_NS_FD, &netns.as_raw_fd().to_ne_bytes());
                    }
                });
            });
        });
        self.request(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, &body)
            .map_err(about("create veth", format!("{} (peer {})", spec.name, spec.peer.name)))?;
        self.must_exist(&spec.name, "create veth")
    }

    fn must_exist(&mut self, name: &str, operation: &'static str) -> Result<u32, RtnlError> {
        match self.link(name)? {
            Some(link) => Ok(link.index),
            None => Err(RtnlError::Kernel {
                operation,
                object: name.to_owned(),
                errno: Errno::ENODEV,
                detail: Some("it was deleted or renamed right after it was made".into()),
            }),
        }
    }

    /// Deletes a link by name; `false` when there is none. The other end of a veth goes with it.
    ///
    /// # Errors
    /// The kernel's refusal, for example for hardware.
    pub fn delete_link(&mut self, name: &str) -> Result<bool, RtnlError> {
        check_name(name)?;
        let mut body = Body::new(&ifinfomsg(0, 0, 0));
        body.str(IFLA_IFNAME, name);
        let result = self.request(RTM_DELLINK, 0, &body);
        deleted(result, &[Errno::ENODEV]).map_err(about("delete link", name))
    }

    /// Changes what is given of a link, in one request.
    ///
    /// # Errors
    /// The kernel's refusal. It applies the parts one after another, so some may be in force then.
    pub fn set_link(&mut self, index: u32, change: LinkChange) -> Result<(), RtnlError> {
        let (flags, mask) = match change.up {
            Some(true) => (IFF_UP, IFF_UP),
            Some(false) => (0, IFF_UP),
            None => (0, 0),
        };
        let mut body = Body::new(&ifinfomsg(index, flags, mask));
        if let Some(name) = &change.name {
            check_name(name)?;
            body.str(IFLA_IFNAME, name);
        }
        if let Some(mtu) = change.mtu {
            body.u32(IFLA_MTU, mtu);
        }
        if let Some(master) = change.master {
            body.u32(IFLA_MASTER, master.unwrap_or(0));
        }
        if let Some(mac) = change.mac {
            body.bytes(IFLA_ADDRESS, &mac.0);
        }
        if let Some(alias) = &change.alias {
            // The kernel takes an empty payload as "none".
            body.bytes(IFLA_IFALIAS, alias.as_bytes());
        }
        if let Some(len) = change.txqlen {
            body.u32(IFLA_TXQLEN, len);
        }
        if let Some(mode) = change.addr_gen {
            let mode = match mode {
                AddrGenMode::Eui64 => 0,
                AddrGenMode::None => 1,
            };
            body.nest(IFLA_AF_SPEC, |spec| {
                spec.nest(AF_INET6, |inet6| {
                    inet6.u8(IFLA_INET6_ADDR_GEN_MODE, mode);
                });
            });
        }
        self.request(RTM_NEWLINK, 0, &body).map_err(about("change", format!("device {index}")))?;
        Ok(())
    }

    /// Waits until a bridge port passes frames, at most this long; whether it does.
    ///
    /// When the second end of a veth comes up, the bridge learns of it later, by the kernel's link
    /// watch: some milliseconds as a rule, up to a second when many links change. Until then the port
    /// drops everything, and a pod whose first ARP request or neighbour solicitation is lost asks again
    /// only after a second. Looking the device up, as this does, makes a recent kernel (6.8) catch up at
    /// once; with older ones it just waits.
    ///
    /// # Errors
    /// [`RtnlError::is_missing`] when the device goes away; otherwise the kernel's refusal.
    pub fn wait_port_forwarding(&mut self, index: u32, at_most: Duration) -> Result<bool, RtnlError> {
        let deadline = Instant::now() + at_most;
        loop {
            let Some(link) = self.link_by_index(index)? else {
                let object = format!("device {index}");
                return Err(RtnlError::Kernel {
                    operation: "wait for",
                    object,
                    errno: Errno::ENODEV,
                    detail: None,
                });
            };
            if link.port.is_some_and(|p| p.forwarding) {
                return Ok(true);
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
            std::thread::sleep(POLL_PORT);
        }
    }

    /// Changes what is given of a bridge port.
    ///
    /// # Errors
    /// The kernel's refusal, for example when the device is not a bridge port.
    pub fn set_bridge_port(&mut self, index: u32, change: BridgePortChange) -> Result<(), RtnlError> {
        let mut body = Body::new(&ifinfomsg(index, 0, 0));
        body.nest(IFLA_LINKINFO, |info| {
            info.str(IFLA_INFO_SLAVE_KIND, "bridge").nest(IFLA_INFO_SLAVE_DATA, |data| {
                for (kind, value) in [
                    (IFLA_BRPORT_ISOLATED, change.isolated),
                    (IFLA_BRPORT_LEARNING, change.learning),
                    (IFLA_BRPORT_MODE, change.hairpin),
                    (IFLA_BRPORT_UNICAST_FLOOD, change.unicast_flood),
                    (IFLA_BRPORT_MCAST_FLOOD, change.multicast_flood),
                    (IFLA_BRPORT_BCAST_FLOOD, change.broadcast_flood),
                    (IFLA_BRPORT_NEIGH_SUPPRESS, change.neigh_suppress),
                    (IFLA_BRPORT_LOCKED, change.locked),
                ] {
                    if let Some(value) = value {
                        data.u8(kind, u8::from(value));
                    }
                }
            });
        });
        self.request(RTM_NEWLINK, 0, &body)
            .map_err(about("change bridge port", format!("device {index}")))?;
        Ok(())
    }
}

fn parse(message: &Message) -> Option<Link> {
    parse_body(&message.body).filter(|_| message.kind == RTM_NEWLINK)
}

pub(super) fn parse_body(body: &[u8]) -> Option<Link> {
    let index = u32::from_ne_bytes(*body.get(4..8)?.first_chunk()?);
    let flags = u32::from_ne_bytes(*body.get(8..12)?.first_chunk()?);
    let attrs = Attrs::after(body, IFINFOMSG);
    let info = attrs.find(IFLA_LINKINFO).map(Attr::nested);
    let kind = info.as_ref().and_then(|i| i.find(IFLA_INFO_KIND)).map(Attr::string);
    let port = info
        .as_ref()
        .filter(|i| i.find(IFLA_INFO_SLAVE_KIND).is_some_and(|k| k.string() == "bridge"))
        .and_then(|i| i.find(IFLA_INFO_SLAVE_DATA))
        .map(|data| parse_port(&data.nested()));
    let is_veth = kind.as_deref() == Some("veth");
    Some(Link {
        index,
        name: attrs.find(IFLA_IFNAME)?.string(),
        mac: attrs.find(IFLA_ADDRESS).and_then(Attr::mac).map(Mac),
        mtu: attrs.find(IFLA_MTU).and_then(Attr::u32).unwrap_or(0),
        up: flags & IFF_UP != 0,
        carrier: flags & IFF_LOWER_UP != 0,
        txqlen: attrs.find(IFLA_TXQLEN).and_then(Attr::u32).unwrap_or(0),
        master: attrs.find(IFLA_MASTER).and_then(Attr::u32),
        peer_index: attrs.find(IFLA_LINK).and_then(Attr::u32).filter(|_| is_veth),
        peer_netns_id: attrs.find(IFLA_LINK_NETNSID).and_then(Attr::i32).filter(|_| is_veth),
        alias: attrs.find(IFLA_IFALIAS).map(Attr::string).filter(|a| !a.is_empty()),
        kind,
        port,
    })
}

fn parse_port(data: &Attrs<'_>) -> BridgePort {
    let on = |kind| data.find(kind).and_then(Attr::u8).is_some_and(|v| v != 0);
    BridgePort {
        isolated: on(IFLA_BRPORT_ISOLATED),
        learning: on(IFLA_BRPORT_LEARNING),
        hairpin: on(IFLA_BRPORT_MODE),
        unicast_flood: on(IFLA_BRPORT_UNICAST_FLOOD),
        multicast_flood: on(IFLA_BRPORT_MCAST_FLOOD),
        broadcast_flood: on(IFLA_BRPORT_BCAST_FLOOD),
        neigh_suppress: on(IFLA_BRPORT_NEIGH_SUPPRESS),
        locked: on(IFLA_BRPORT_LOCKED),
        forwarding: data.find(IFLA_BRPORT_STATE).and_then(Attr::u8) == Some(BR_STATE_FORWARDING),
    }
}
