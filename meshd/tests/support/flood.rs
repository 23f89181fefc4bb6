//! Initiations in great numbers, with the addresses of others.

use std::io;
use std::io::IoSlice;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::time::{Duration, Instant};

use mesh_keys::WgPublic;
use mesh_keys::mac1::{INITIATION_LEN, Mac1Key};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, MultiHeaders, SockFlag, SockProtocol, SockType, SockaddrIn, connect, sendmmsg,
    socket,
};

const IP_HEADER: usize = 20;
const HEADERS: usize = IP_HEADER + 8;
const PACKET: usize = HEADERS + INITIATION_LEN;

/// Packets of one system call.
const BATCH: usize = 64;

/// Pause between two looks at how many are due.
const TICK: Duration = Duration::from_millis(1);

/// What was not sent for so long is not made up for.
const MOST_LATE: Duration = Duration::from_millis(10);

/// Whose address an initiation has, and whom it is marked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// From a lane, for the next one.
    Lane,
    /// From a lane, for nobody.
    LaneGarbled,
    /// From addresses that nobody has registered, for a lane.
    Stranger,
    /// The same, for nobody.
    StrangerGarbled,
}

impl Kind {
    /// All of them.
    pub(crate) const ALL: [Self; 4] = [Self::Lane, Self::LaneGarbled, Self::Stranger, Self::StrangerGarbled];
}

/// Sends the kinds in turns, and for the lanes in turns; no two initiations have the same index.
pub(crate) struct Flood {
    socket: OwnedFd,
    to: SocketAddrV4,
    kinds: Vec<Kind>,
    lanes: Vec<(Mac1Key, SocketAddrV4)>,
    packets: Vec<[u8; PACKET]>,
    sent: u32,
}

impl Flood {
    /// Sends to `to` from the namespace of this thread, when told to. There are two lanes at the least.
    pub(crate) fn new(
        to: SocketAddrV4,
        kinds: &[Kind],
        lanes: &[(WgPublic, SocketAddrV4)],
    ) -> io::Result<Self> {
        assert!(lanes.len() >= 2 && !kinds.is_empty(), "nothing to send");
        // Nothing is received by it, and we make the IP headers (raw(7)).
        let socket = socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw)?;
        connect(socket.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(*to.ip(), 0)))?;
        let lanes = lanes.iter().map(|(key, address)| (Mac1Key::of(key), *address)).collect();
        Ok(Self { socket, to, kinds: kinds.to_vec(), lanes, packets: vec![[0; PACKET]; BATCH], sent: 0 })
    }

    /// How many were sent.
    pub(crate) fn sent(&self) -> u32 {
        self.sent
    }

    /// Sends `rate` in a second, or as many as is possible, as long as `more` says so.
    pub(crate) fn run(&mut self, rate: u32, more: impl Fn() -> bool) -> io::Result<()> {
        let pause = Duration::from_secs(1) / rate.max(1);
        let mut next = Instant::now();
        while more() {
            let now = Instant::now();
            next = next.max(now.checked_sub(MOST_LATE).unwrap_or(now));
            let due = now.saturating_duration_since(next).as_nanos() / pause.as_nanos().max(1);
            let due = usize::try_from(due).unwrap_or(BATCH).min(BATCH);
            if due == 0 {
                std::thread::sleep(TICK);
                continue;
            }
            let sent = self.send(due)?;
            next += pause * sent;
        }
        Ok(())
    }

    fn send(&mut self, count: usize) -> io::Result<u32> {
        let numbers = self.sent..;
        for (at, number) in (0..count).zip(numbers) {
            self.packets[at] = self.packet(number);
        }
        let slices: Vec<[IoSlice<'_>; 1]> =
            self.packets[..count].iter().map(|packet| [IoSlice::new(packet)]).collect();
        let mut headers = MultiHeaders::<SockaddrIn>::preallocate(count, None);
        let addresses = vec![None; count];
        let flags = MsgFlags::empty();
        match sendmmsg(self.socket.as_raw_fd(), &mut headers, &slices, &addresses, [], flags) {
            Ok(results) => {
                let sent = u32::try_from(results.count()).unwrap_or(u32::MAX);
                self.sent = self.sent.wrapping_add(sent);
                Ok(sent)
            }
            // The device has no room for now.
            Err(Errno::ENOBUFS | Errno::EINTR) => Ok(0),
            Err(error) => Err(error.into()),
        }
    }

    fn packet(&self, number: u32) -> [u8; PACKET] {
        let (kinds, lanes) = (self.kinds.len(), self.lanes.len());
        let kind = self.kinds[number as usize % kinds];
        let turn = number as usize / kinds;
        let (mac1, _) = &self.lanes[(turn + 1) % lanes];
        let from = match kind {
            Kind::Lane | Kind::LaneGarbled => self.lanes[turn % lanes].1,
            // TEST-NET-3 (RFC 5737), and another one each time.
            Kind::Stranger | Kind::StrangerGarbled => {
                SocketAddrV4::new(Ipv4Addr::new(203, 0, 113, turn as u8), 1_024 | turn as u16)
            }
        };
        let mut packet = [0; PACKET];
        let (headers, message) = packet.split_at_mut(HEADERS);
        message[0] = 1;
        // An odd factor: all numbers are different, and look like those of WireGuard.
        message[4..8].copy_from_slice(&number.wrapping_mul(0x9e37_79b1).to_le_bytes());
        match kind {
            Kind::Lane | Kind::Stranger => mac1.mark(message),
            Kind::LaneGarbled | Kind::StrangerGarbled => message[116..132].fill(0x55),
        }
        // RFC 791, section 3.1, and RFC 768; the kernel adds the checksum of the first, and the second needs none.
        headers[0] = 0x45;
        headers[2..4].copy_from_slice(&(PACKET as u16).to_be_bytes());
        (headers[8], headers[9]) = (64, 17);
        headers[12..16].copy_from_slice(&from.ip().octets());
        headers[16..20].copy_from_slice(&self.to.ip().octets());
        headers[20..22].copy_from_slice(&from.port().to_be_bytes());
        headers[22..24].copy_from_slice(&self.to.port().to_be_bytes());
        headers[24..26].copy_from_slice(&((PACKET - IP_HEADER) as u16).to_be_bytes());
        packet
    }
}
