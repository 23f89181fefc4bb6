//! ICMP echo over raw sockets, in the network namespace of the calling thread.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6, SockaddrStorage,
    recvfrom, sendto, socket,
};

use crate::family::Family;
use crate::stream::MARKER;

/// How to ping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PingOptions {
    /// Number of requests.
    pub count: u32,
    /// Time between two requests.
    pub interval: Duration,
    /// How long the answer to the last request is awaited.
    pub linger: Duration,
    /// Bytes after the ICMP header; filled with [`MARKER`].
    pub payload: usize,
}

impl Default for PingOptions {
    fn default() -> Self {
        Self { count: 1, interval: Duration::from_millis(100), linger: Duration::from_secs(1), payload: 64 }
    }
}

/// What came of a series of requests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PingStats {
    /// Requests, those that the kernel refused to send included.
    pub sent: u32,
    /// Requests that were answered.
    pub received: u32,
    /// Requests that were not.
    pub lost: u32,
    /// Answers to requests that were answered before.
    pub duplicates: u32,
    /// Time to each answer, in order of arrival.
    pub rtts: Vec<Duration>,
    /// The last reason why the kernel refused to send.
    pub refused: Option<String>,
    /// The longest run of requests without an answer.
    pub longest_gap: u32,
    /// Number of the first request without an answer.
    pub first_lost: Option<usize>,
}

impl PingStats {
    /// Whether every request was answered.
    #[must_use]
    pub fn all_answered(&self) -> bool {
        self.sent > 0 && self.lost == 0
    }

    /// The middle one of the times to an answer.
    #[must_use]
    pub fn median(&self) -> Option<Duration> {
        let mut sorted = self.rtts.clone();
        sorted.sort();
        sorted.get(sorted.len() / 2).copied()
    }
}

/// A ping that goes on until it is stopped.
#[derive(Debug)]
pub struct RunningPing {
    pub(crate) stop: Arc<AtomicBool>,
    pub(crate) thread: JoinHandle<io::Result<PingStats>>,
}

impl RunningPing {
    /// Ends the series and waits for the last answers.
    ///
    /// # Errors
    /// When the socket failed.
    pub fn stop(self) -> io::Result<PingStats> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// Pings one address; `stop` ends the series early.
pub(crate) fn ping(target: IpAddr, options: PingOptions, stop: &AtomicBool) -> io::Result<PingStats> {
    let socket = EchoSocket::open(family_of(target))?;
    let mut sent_at: Vec<Option<Instant>> = Vec::new();
    let mut answered: Vec<bool> = Vec::new();
    let mut stats = PingStats::default();
    let start = Instant::now();
    let mut end = None;
    loop {
        let now = Instant::now();
        let stopped = stats.sent == options.count || stop.load(Ordering::Relaxed);
        if stopped {
            let end = *end.get_or_insert(now + options.linger);
            if now >= end || stats.received == stats.sent {
                break;
            }
        } else if now >= start + options.interval * stats.sent {
            // Sequence numbers are 16 bits; a series of more than 65,536 reuses them long after.
            sent_at.push(Some(now));
            answered.push(false);
            if let Err(error) = socket.send(target, sequence(stats.sent), options.payload) {
                stats.refused = Some(error.to_string());
            }
            stats.sent += 1;
            continue;
        }
        let next = end.unwrap_or(start + options.interval * stats.sent);
        let patience = next.saturating_duration_since(now).min(Duration::from_millis(20));
        while let Some((from, answered_sequence)) = socket.receive(patience)? {
            let Some(index) = (0..sent_at.len()).rev().find(|index| low_16(*index) == answered_sequence)
            else {
                continue;
            };
            if from != target {
                continue;
            }
            if std::mem::replace(&mut answered[index], true) {
                stats.duplicates += 1;
            } else if let Some(at) = sent_at[index] {
                stats.received += 1;
                stats.rtts.push(at.elapsed());
            }
            if Instant::now() >= next {
                break;
            }
        }
    }
    stats.lost = stats.sent - stats.received;
    stats.longest_gap = longest_gap(&answered);
    stats.first_lost = answered.iter().position(|answered| !answered);
    Ok(stats)
}

/// Pings all targets at the same time, the missing ones again every 200 ms until `deadline`. Returns the
/// time to the first answer of each, in the order of `targets`.
pub(crate) fn sweep(targets: &[IpAddr], deadline: Instant) -> io::Result<Vec<Option<Duration>>> {
    const AGAIN: Duration = Duration::from_millis(200);
    let mut results = vec![None; targets.len()];
    let sockets = [EchoSocket::open(Family::V4)?, EchoSocket::open(Family::V6)?];
    let by_address: HashMap<IpAddr, usize> =
        targets.iter().copied().enumerate().map(|(i, t)| (t, i)).collect();
    loop {
        let round = Instant::now();
        for (index, target) in targets.iter().enumerate().filter(|(index, _)| results[*index].is_none()) {
            let socket = &sockets[usize::from(target.is_ipv6())];
            // A refusal (no route yet, say) is a missing answer; it is tried again.
            let _ = socket.send(*target, low_16(index), 64);
        }
        let until = (round + AGAIN).min(deadline.max(round + Duration::from_millis(1)));
        while Instant::now() < until && results.iter().any(Option::is_none) {
            for socket in &sockets {
                while let Some((from, _)) = socket.receive(Duration::from_millis(1))? {
                    if let Some(index) = by_address.get(&from) {
                        results[*index].get_or_insert_with(|| round.elapsed());
                    }
                }
            }
        }
        // Two entries of one address share an answer.
        for (index, target) in targets.iter().enumerate() {
            results[index] = results[by_address[target]];
        }
        if results.iter().all(Option::is_some) || Instant::now() >= deadline {
            return Ok(results);
        }
    }
}

fn sequence(number: u32) -> u16 {
    (number & 0xffff) as u16
}

fn low_16(index: usize) -> u16 {
    (index & 0xffff) as u16
}

fn longest_gap(answered: &[bool]) -> u32 {
    let (mut longest, mut run) = (0, 0);
    for answered in answered {
        run = if *answered { 0 } else { run + 1 };
        longest = longest.max(run);
    }
    longest
}

pub(crate) fn family_of(address: IpAddr) -> Family {
    if address.is_ipv6() { Family::V6 } else { Family::V4 }
}

/// A raw ICMP or ICMPv6 socket with an identifier of its own.
struct EchoSocket {
    fd: OwnedFd,
    family: Family,
    id: u16,
}

impl EchoSocket {
    fn open(family: Family) -> io::Result<Self> {
        static NEXT_ID: AtomicU16 = AtomicU16::new(0);
        let (domain, protocol) = match family {
            Family::V4 => (AddressFamily::Inet, SockProtocol::Icmp),
            Family::V6 => (AddressFamily::Inet6, SockProtocol::IcmpV6),
        };
        let fd = socket(domain, SockType::Raw, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, protocol)?;
        let id =
            NEXT_ID.fetch_add(1, Ordering::Relaxed).wrapping_add(low_16(std::process::id() as usize) << 6);
        Ok(Self { fd, family, id })
    }

    fn send(&self, target: IpAddr, sequence: u16, payload: usize) -> io::Result<()> {
        let kind = match self.family {
            Family::V4 => 8,
            Family::V6 => 128,
        };
        let mut packet = vec![kind, 0, 0, 0];
        packet.extend(self.id.to_be_bytes());
        packet.extend(sequence.to_be_bytes());
        packet.extend(MARKER.iter().cycle().take(payload));
        // The kernel fills in the checksum of ICMPv6 itself (RFC 3542, section 3.1).
        if self.family == Family::V4 {
            let sum = checksum(&packet);
            packet[2..4].copy_from_slice(&sum.to_be_bytes());
        }
        let fd = self.fd.as_raw_fd();
        match target {
            IpAddr::V4(v4) => {
                sendto(fd, &packet, &SockaddrIn::from(SocketAddrV4::new(v4, 0)), MsgFlags::empty())?
            }
            IpAddr::V6(v6) => {
                sendto(fd, &packet, &SockaddrIn6::from(SocketAddrV6::new(v6, 0, 0, 0)), MsgFlags::empty())?
            }
        };
        Ok(())
    }

    /// The next answer to a request of this socket: its sender and sequence number.
    fn receive(&self, patience: Duration) -> io::Result<Option<(IpAddr, u16)>> {
        let mut buffer = [0u8; 2048];
        let deadline = Instant::now() + patience;
        loop {
            match recvfrom::<SockaddrStorage>(self.fd.as_raw_fd(), &mut buffer) {
                Ok((length, Some(from))) => {
                    let from = match (from.as_sockaddr_in(), from.as_sockaddr_in6()) {
                        (Some(v4), _) => IpAddr::V4(v4.ip()),
                        (_, Some(v6)) => IpAddr::V6(v6.ip()),
                        (None, None) => continue,
                    };
                    if let Some(sequence) = self.parse(&buffer[..length.min(buffer.len())]) {
                        return Ok(Some((from, sequence)));
                    }
                }
                Ok((_, None)) | Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Ok(None);
                    }
                    // Rounded up: with 0 it would spin through the last millisecond.
                    let timeout =
                        PollTimeout::try_from(left + Duration::from_micros(999)).unwrap_or(PollTimeout::MAX);
                    poll(&mut [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)], timeout)?;
                }
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// The sequence number of an echo reply that is meant for this socket.
    fn parse(&self, packet: &[u8]) -> Option<u16> {
        let (reply, message) = match self.family {
            // A raw IPv4 socket hears the IP header too.
            Family::V4 => (0, packet.get(usize::from(packet.first()? & 0xf) * 4..)?),
            Family::V6 => (129, packet),
        };
        let header = message.get(..8)?;
        (header[0] == reply && header[4..6] == self.id.to_be_bytes())
            .then(|| u16::from_be_bytes([header[6], header[7]]))
    }
}

/// The Internet checksum (RFC 1071).
pub(crate) fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = 0;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_that_of_rfc_1071() {
        // The example of RFC 1071, section 3: the sum of these words is ddf2.
        assert_eq!(checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
        assert_eq!(checksum(&[0xff]), !0xff00);
    }

    #[test]
    fn gaps_are_counted() {
        assert_eq!(longest_gap(&[]), 0);
        assert_eq!(longest_gap(&[true, false, false, true, false]), 2);
    }
}
