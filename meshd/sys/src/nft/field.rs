//! Where in a packet, or beside it, a rule looks.

use super::expr::{Base, Ct, Meta};

/// Connection states, to be or'ed (`ct state`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CtState(pub u32);

impl CtState {
    /// Belongs to nothing known.
    pub const INVALID: Self = Self(1);
    /// Of a connection that has seen both directions.
    pub const ESTABLISHED: Self = Self(2);
    /// Starts a connection that an existing one announced, or an error about one.
    pub const RELATED: Self = Self(4);
    /// Starts a connection.
    pub const NEW: Self = Self(8);
    /// Exempt from tracking.
    pub const UNTRACKED: Self = Self(64);
}

impl std::ops::BitOr for CtState {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Something of a packet that can be compared or looked up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Field {
    /// Name of the device it came in by (in a bridge table: the port).
    Iifname,
    /// Name of the device it leaves by (in a bridge table: the port).
    Oifname,
    /// Transport protocol.
    L4proto,
    /// Frame protocol (Ethernet type).
    Protocol,
    /// Mark.
    Mark,
    /// Unicast, broadcast, multicast, other host.
    Pkttype,
    /// Source Ethernet address.
    EtherSaddr,
    /// Destination Ethernet address.
    EtherDaddr,
    /// IPv4 source.
    Ip4Saddr,
    /// IPv4 destination.
    Ip4Daddr,
    /// IPv6 source.
    Ip6Saddr,
    /// IPv6 destination.
    Ip6Daddr,
    /// Source port. The protocol is for the caller to check: TCP, UDP and SCTP have it there.
    Sport,
    /// Destination port, likewise.
    Dport,
    /// ICMP type.
    IcmpType,
    /// ICMPv6 type.
    Icmp6Type,
    /// Target of an ICMPv6 neighbour solicitation or advertisement. The type is for the caller to check.
    NdTarget,
    /// ARP operation: 1 request, 2 reply; 2 bytes.
    ArpOp,
    /// Ethernet address the ARP sender claims.
    ArpSenderMac,
    /// IPv4 address the ARP sender claims.
    ArpSenderIp,
    /// IPv4 address the ARP sender asks for.
    ArpTargetIp,
    /// Connection state.
    CtState,
    /// Connection status.
    CtStatus,
    /// Connection mark.
    CtMark,
    /// Any bytes of the packet, without guards.
    Payload {
        /// Counted from.
        base: Base,
        /// Offset in bytes.
        offset: u32,
        /// Number of bytes, at most 64.
        len: u32,
    },
}

pub(super) enum Source {
    Meta(Meta),
    Ct(Ct),
    Payload(Base, u32),
}

impl Field {
    pub(super) fn source(self) -> (Source, u32) {
        use Base::{Link, Network, Transport};
        match self {
            Self::Iifname => (Source::Meta(Meta::Iifname), 16),
            Self::Oifname => (Source::Meta(Meta::Oifname), 16),
            Self::L4proto => (Source::Meta(Meta::L4proto), 1),
            Self::Protocol => (Source::Meta(Meta::Protocol), 2),
            Self::Mark => (Source::Meta(Meta::Mark), 4),
            Self::Pkttype => (Source::Meta(Meta::Pkttype), 1),
            Self::CtState => (Source::Ct(Ct::State), 4),
            Self::CtStatus => (Source::Ct(Ct::Status), 4),
            Self::CtMark => (Source::Ct(Ct::Mark), 4),
            Self::EtherDaddr => (Source::Payload(Link, 0), 6),
            Self::EtherSaddr => (Source::Payload(Link, 6), 6),
            Self::Ip4Saddr => (Source::Payload(Network, 12), 4),
            Self::Ip4Daddr => (Source::Payload(Network, 16), 4),
            Self::Ip6Saddr => (Source::Payload(Network, 8), 16),
            Self::Ip6Daddr => (Source::Payload(Network, 24), 16),
            Self::Sport => (Source::Payload(Transport, 0), 2),
            Self::Dport => (Source::Payload(Transport, 2), 2),
            Self::IcmpType | Self::Icmp6Type => (Source::Payload(Transport, 0), 1),
            Self::NdTarget => (Source::Payload(Transport, 8), 16),
            Self::ArpOp => (Source::Payload(Network, 6), 2),
            Self::ArpSenderMac => (Source::Payload(Network, 8), 6),
            Self::ArpSenderIp => (Source::Payload(Network, 14), 4),
            Self::ArpTargetIp => (Source::Payload(Network, 24), 4),
            Self::Payload { base, offset, len } => (Source::Payload(base, offset), len),
        }
    }

    /// Length of the value in bytes.
    #[must_use]
    pub fn len(self) -> usize {
        usize::try_from(self.source().1).unwrap_or(usize::MAX)
    }

    /// Whether the value has no bytes: only a payload of length 0.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    pub(super) fn layer3(self) -> Option<Layer3> {
        match self {
            Self::Ip4Saddr | Self::Ip4Daddr | Self::IcmpType => Some(Layer3::V4),
            Self::Ip6Saddr | Self::Ip6Daddr | Self::Icmp6Type | Self::NdTarget => Some(Layer3::V6),
            Self::ArpOp | Self::ArpSenderMac | Self::ArpSenderIp | Self::ArpTargetIp => Some(Layer3::Arp),
            Self::Iifname
            | Self::Oifname
            | Self::L4proto
            | Self::Protocol
            | Self::Mark
            | Self::Pkttype
            | Self::EtherSaddr
            | Self::EtherDaddr
            | Self::Sport
            | Self::Dport
            | Self::CtState
            | Self::CtStatus
            | Self::CtMark
            | Self::Payload { .. } => None,
        }
    }

    /// The ICMP version it implies, by protocol number.
    pub(super) fn icmp(self) -> Option<u8> {
        if self == Self::IcmpType {
            return Some(1);
        }
        matches!(self, Self::Icmp6Type | Self::NdTarget).then_some(58)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layer3 {
    V4,
    V6,
    Arp,
}
