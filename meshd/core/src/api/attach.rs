//! Attaching pods: requests and answers.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// What identifies an attachment: the container and the name of the interface inside it (CNI specification
/// 1.1.0, section 2, "CNI_CONTAINERID" and "CNI_IFNAME").
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "RawAttachmentId", into = "RawAttachmentId")]
pub struct AttachmentId {
    container: String,
    ifname: String,
}

/// The container id or interface name of an attachment breaks the rules of the CNI specification.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidAttachmentId {
    /// Empty, longer than 255 bytes, or with other characters than letters, digits, `_`, `.` and `-`.
    #[error(
        "container id {0:?} is not valid: it starts with a letter or digit and has only letters, digits, '_', '.' and '-' (at most 255)"
    )]
    Container(String),
    /// Not a name that Linux accepts for a network interface.
    #[error(
        "interface name {0:?} is not valid: 1 to 15 bytes, not \".\" or \"..\", without '/', ':' and white space"
    )]
    Ifname(String),
}

impl AttachmentId {
    /// Checks both parts.
    pub fn new(container: impl Into<String>, ifname: impl Into<String>) -> Result<Self, InvalidAttachmentId> {
        let (container, ifname) = (container.into(), ifname.into());
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
        if container.is_empty()
            || container.len() > 255
            || !container.starts_with(|c: char| c.is_ascii_alphanumeric())
            || !container.chars().all(plain)
        {
            return Err(InvalidAttachmentId::Container(container));
        }
        if ifname.is_empty()
            || ifname.len() > 15
            || ifname == "."
            || ifname == ".."
            || ifname.chars().any(|c| c == '/' || c == ':' || c.is_whitespace() || c.is_control())
        {
            return Err(InvalidAttachmentId::Ifname(ifname));
        }
        Ok(Self { container, ifname })
    }

    /// The container id.
    pub fn container(&self) -> &str {
        &self.container
    }

    /// The name of the interface inside the container.
    pub fn ifname(&self) -> &str {
        &self.ifname
    }

    /// The name of the host's end of the veth pair: `mv` and 12 hexadecimal digits of a hash of the id, so
    /// that the plugin can find and delete it without the daemon.
    pub fn host_ifname(&self) -> String {
        format!("mv{}", &self.digest()[..12])
    }

    /// The name of the tombstone file of this attachment.
    pub fn tombstone_name(&self) -> String {
        format!("{}.json", &self.digest()[..32])
    }

    fn digest(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(b"hauberk attachment v1");
        hash.update([0]);
        hash.update(&self.container);
        hash.update([0]);
        hash.update(&self.ifname);
        hex::encode(hash.finalize())
    }
}

impl fmt::Display for AttachmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.container, self.ifname)
    }
}

#[derive(Serialize, Deserialize)]
struct RawAttachmentId {
    container_id: String,
    ifname: String,
}

impl TryFrom<RawAttachmentId> for AttachmentId {
    type Error = InvalidAttachmentId;

    fn try_from(raw: RawAttachmentId) -> Result<Self, Self::Error> {
        Self::new(raw.container_id, raw.ifname)
    }
}

impl From<AttachmentId> for RawAttachmentId {
    fn from(id: AttachmentId) -> Self {
        Self { container_id: id.container, ifname: id.ifname }
    }
}

/// Which Kubernetes pod an attachment belongs to; informative.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodIdentity {
    /// Namespace of the pod.
    #[serde(default)]
    pub namespace: String,
    /// Name of the pod.
    #[serde(default)]
    pub name: String,
    /// UID of the pod object.
    #[serde(default)]
    pub uid: String,
}

/// Asks for an attachment: addresses are leased and made durable, nothing in the kernel changes yet.
///
/// Asking again for the same id returns the same lease as long as it is not active in the kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachRequest {
    /// What is attached.
    #[serde(flatten)]
    pub id: AttachmentId,
    /// Path of the container's network namespace, as the runtime gave it. The daemon looks there when the host's
    /// end of an attachment has gone without a word.
    pub netns: String,
    /// Name of the CNI network.
    pub network: String,
    /// The pod, when the runtime told.
    #[serde(default)]
    pub pod: Option<PodIdentity>,
    /// Which namespace the path led to; tells it from a later one at the same path. Older plugins do not say.
    #[serde(default)]
    pub netns_id: Option<NetnsId>,
}

/// Tells network namespaces apart while they exist: device and inode number of the namespace's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct NetnsId {
    /// Device number of nsfs.
    pub dev: u64,
    /// Inode number, the figure that `readlink /proc/self/ns/net` shows.
    pub ino: u64,
}

/// How far an attachment has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AttachmentState {
    /// Addresses are leased; the host's veth end is not in the bridge.
    Leased,
    /// The host's end is in the bridge, its anti-spoofing entries are committed: the pod may talk.
    Active,
}

/// A leased or active attachment: all that is needed to configure the container's side.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// What is attached.
    #[serde(flatten)]
    pub id: AttachmentId,
    /// How far it has come.
    pub state: AttachmentState,
    /// Path of the container's network namespace as given at attach.
    pub netns: String,
    /// Name of the CNI network.
    pub network: String,
    /// The pod, when the runtime told.
    #[serde(default)]
    pub pod: Option<PodIdentity>,
    /// Name of the host's end of the veth pair, to be created by the plugin.
    pub host_ifname: String,
    /// MAC address of the container's end; the host drops frames with any other.
    pub mac: MacAddr,
    /// The pod's IPv4 address, configured as /32.
    pub ipv4: Ipv4Addr,
    /// The pod's IPv6 address, configured as /128.
    pub ipv6: Ipv6Addr,
    /// On-link IPv4 gateway of the pod (the node's mesh address, on the bridge).
    pub gateway_ipv4: Ipv4Addr,
    /// On-link IPv6 gateway of the pod.
    pub gateway_ipv6: Ipv6Addr,
    /// MAC address of the gateway, for permanent neighbour entries in the pod.
    pub gateway_mac: MacAddr,
    /// The cluster's whole IPv4 range.
    pub cluster_ipv4: Ipv4Net,
    /// The cluster's whole IPv6 range.
    pub cluster_ipv6: Ipv6Net,
    /// MTU of both veth ends, in bytes.
    pub mtu: u32,
}

/// All attachments that still exist, by the runtime's account; every other one of the network is released.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GcRequest {
    /// Name of the CNI network; attachments of other networks are left alone.
    pub network: String,
    /// The attachments to keep.
    pub valid: Vec<AttachmentId>,
}

/// What a garbage collection released.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GcReport {
    /// The released attachments.
    pub released: Vec<AttachmentId>,
}

/// Left by the plugin for an attachment that was deleted while the daemon was away; the daemon releases the
/// lease and removes the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tombstone {
    /// What was detached.
    #[serde(flatten)]
    pub id: AttachmentId,
}

/// An Ethernet address, written as six pairs of hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddr(pub [u8; 6]);

/// Text that is not an Ethernet address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not an Ethernet address (expected six pairs of hexadecimal digits, such as 0a:58:0a:20:00:02)"
)]
pub struct ParseMacError(String);

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for MacAddr {
    type Err = ParseMacError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseMacError(text.chars().take(64).collect());
        let mut bytes = [0u8; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(error)?;
            if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(error());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| error())?;
        }
        if parts.next().is_some() { Err(error()) } else { Ok(Self(bytes)) }
    }
}

impl TryFrom<String> for MacAddr {
    type Error = ParseMacError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<MacAddr> for String {
    fn from(mac: MacAddr) -> Self {
        mac.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attachment_ids_follow_the_cni_specification() {
        assert!(AttachmentId::new("a", "eth0").is_ok());
        assert!(AttachmentId::new("0f-_.x", "eth0.100").is_ok());
        for container in ["", "-a", "a/b", "a b", "ä"] {
            assert!(matches!(AttachmentId::new(container, "eth0"), Err(InvalidAttachmentId::Container(_))));
        }
        for ifname in ["", ".", "..", "a/b", "a:b", "a b", "0123456789abcdef"] {
            assert!(matches!(AttachmentId::new("c", ifname), Err(InvalidAttachmentId::Ifname(_))));
        }
    }

    #[test]
    fn host_names_fit_linux_and_differ_by_interface() {
        let a = AttachmentId::new("c", "eth0").unwrap().host_ifname();
        let b = AttachmentId::new("c", "eth1").unwrap().host_ifname();
        assert_eq!(a.len(), 14);
        assert_ne!(a, b);
    }

    #[test]
    fn a_request_from_json_is_checked_too() {
        let bad = r#"{"container_id":"a b","ifname":"eth0","netns":"/x","network":"mesh"}"#;
        let error = serde_json::from_str::<AttachRequest>(bad).unwrap_err().to_string();
        assert!(error.contains("container id"), "{error}");
    }

    #[test]
    fn mac_addresses_print_and_parse() {
        let mac = MacAddr([2, 0, 0xab, 1, 2, 3]);
        assert_eq!(mac.to_string().parse(), Ok(mac));
        for bad in ["", "02:00", "02:00:ab:01:02:03:04", "02:00:ab:01:02:+3", "0200ab010203"] {
            assert!(bad.parse::<MacAddr>().is_err(), "{bad}");
        }
    }
}
