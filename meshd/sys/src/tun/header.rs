//! The virtio-net header that precedes every packet on a TUN device with `IFF_VNET_HDR`.

/// Length of the header on the wire: `struct virtio_net_hdr` without the merged-buffer count.
pub const VNET_HEADER_LEN: usize = 10;

const F_NEEDS_CSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
/// May be set beside a TCP type: the first segment carries CWR. Segmentation looks at the TCP header itself.
const GSO_ECN: u8 = 0x80;

/// What a superpacket is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GsoKind {
    /// Not a superpacket.
    None,
    /// TCP segments over IPv4.
    Tcp4,
    /// TCP segments over IPv6.
    Tcp6,
    /// UDP datagrams, IPv4 or IPv6.
    Udp,
    /// A type this module has not asked the kernel for.
    Unknown(u8),
}

/// A parsed `struct virtio_net_hdr`, host byte order on both sides of the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VnetHeader {
    /// The checksum at `checksum_start + checksum_offset` holds only the pseudo-header and has to be completed over
    /// everything from `checksum_start` on.
    pub needs_checksum: bool,
    /// Whether and how the packet has to be cut up.
    pub gso: GsoKind,
    /// Length of all headers, in bytes; a hint only.
    pub header_len: u16,
    /// Payload bytes per segment.
    pub gso_size: u16,
    /// Where layer 4 begins, in bytes from the start of the packet.
    pub checksum_start: u16,
    /// Where the checksum stands, in bytes from `checksum_start`.
    pub checksum_offset: u16,
}

impl VnetHeader {
    /// The header of a complete packet that needs nothing.
    pub const PLAIN: Self = Self {
        needs_checksum: false,
        gso: GsoKind::None,
        header_len: 0,
        gso_size: 0,
        checksum_start: 0,
        checksum_offset: 0,
    };

    /// Reads the header from the start of a TUN read.
    #[must_use]
    pub fn decode(bytes: &[u8; VNET_HEADER_LEN]) -> Self {
        let word = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        Self {
            needs_checksum: bytes[0] & F_NEEDS_CSUM != 0,
            gso: match bytes[1] & !GSO_ECN {
                GSO_NONE => GsoKind::None,
                GSO_TCPV4 => GsoKind::Tcp4,
                GSO_TCPV6 => GsoKind::Tcp6,
                GSO_UDP_L4 => GsoKind::Udp,
                other => GsoKind::Unknown(other),
            },
            header_len: word(2),
            gso_size: word(4),
            checksum_start: word(6),
            checksum_offset: word(8),
        }
    }

    /// The header as it is written to a TUN device.
    #[must_use]
    pub fn encode(&self) -> [u8; VNET_HEADER_LEN] {
        let mut bytes = [0; VNET_HEADER_LEN];
        bytes[0] = if self.needs_checksum { F_NEEDS_CSUM } else { 0 };
        bytes[1] = match self.gso {
            GsoKind::None => GSO_NONE,
            GsoKind::Tcp4 => GSO_TCPV4,
            GsoKind::Tcp6 => GSO_TCPV6,
            GsoKind::Udp => GSO_UDP_L4,
            GsoKind::Unknown(other) => other,
        };
        bytes[2..4].copy_from_slice(&self.header_len.to_ne_bytes());
        bytes[4..6].copy_from_slice(&self.gso_size.to_ne_bytes());
        bytes[6..8].copy_from_slice(&self.checksum_start.to_ne_bytes());
        bytes[8..10].copy_from_slice(&self.checksum_offset.to_ne_bytes());
        bytes
    }
}
