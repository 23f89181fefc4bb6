//! One netlink socket and its request/answer pattern, shared by [`crate::rtnl`] and [`crate::nft`].
//!
//! Calls block, and only on the kernel: it executes a request inside `send`, so the answer is waiting
//! when `send` returns. What takes time is the kernel's own work and the locks it waits for, which no
//! asynchronous socket could shorten; the async faces of rtnl and nft therefore run these calls on a
//! blocking thread.

mod attr;
mod listen;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

pub(crate) use attr::{Attr, Attrs, Body};
pub(crate) use listen::{Bound, Listener, Received};

pub(crate) const NLM_F_REQUEST: u16 = 0x1;
pub(crate) const NLM_F_ACK: u16 = 0x4;
pub(crate) const NLM_F_DUMP_INTR: u16 = 0x10;
pub(crate) const NLM_F_REPLACE: u16 = 0x100;
pub(crate) const NLM_F_EXCL: u16 = 0x200;
pub(crate) const NLM_F_CREATE: u16 = 0x400;
pub(crate) const NLM_F_APPEND: u16 = 0x800;
pub(crate) const NLM_F_DUMP: u16 = 0x300;
const NLM_F_CAPPED: u16 = 0x100;
const NLM_F_ACK_TLVS: u16 = 0x200;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLMSG_OVERRUN: u16 = 4;

/// `NLMSGERR_ATTR_MSG`, the kernel's own sentence about what is wrong.
const NLMSGERR_ATTR_MSG: u16 = 1;

const HEADER: usize = 16;
/// A dump that changed under our hands is taken again this often before giving up.
const DUMP_ATTEMPTS: usize = 20;
/// No answer of the kernel takes this long; a bound only so that a lost one cannot hang us for ever.
const ANSWER_TIMEOUT_SECS: i64 = 30;

/// A failed exchange, before the caller's operation is known.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The socket itself failed.
    Socket { action: &'static str, source: io::Error },
    /// The kernel refused.
    Kernel(Refusal),
    /// The answer made no sense.
    Malformed(&'static str),
    /// A dump was inconsistent every time.
    Changing,
    /// A message is longer than netlink can express.
    TooLong,
}

/// The kernel's refusal of one message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) seq: u32,
    pub(crate) errno: Errno,
    pub(crate) detail: Option<String>,
}

/// One received message.
#[derive(Debug, Clone)]
pub(crate) struct Message {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) seq: u32,
    /// Who caused it: in a notification, the port of the socket that made the change.
    pub(crate) port: u32,
    pub(crate) body: Vec<u8>,
}

/// What a datagram's message is for.
pub(crate) enum Reply {
    Data(Message),
    /// End of a dump, or acknowledgement.
    Done {
        seq: u32,
    },
    Refused(Refusal),
}

#[derive(Debug)]
pub(crate) struct NlSocket {
    socket: Socket,
    port: u32,
    seq: u32,
}

impl NlSocket {
    /// Opens a socket in the namespace of the calling thread.
    pub(crate) fn open(protocol: isize, strict: bool) -> Result<Self, Failure> {
        let fail = |action| move |source| Failure::Socket { action, source };
        let mut socket = Socket::new(protocol).map_err(fail("opening a netlink socket"))?;
        let port = socket.bind_auto().map_err(fail("binding a netlink socket"))?.port_number();
        socket.set_ext_ack(true).map_err(fail("asking for error texts"))?;
        socket.set_cap_ack(true).map_err(fail("asking for short acknowledgements"))?;
        if strict {
            socket.set_netlink_get_strict_chk(true).map_err(fail("asking for strict checks"))?;
        }
        setsockopt(&borrow(&socket), sockopt::ReceiveTimeout, &TimeVal::seconds(ANSWER_TIMEOUT_SECS))
            .map_err(|e| Failure::Socket { action: "setting the receive timeout", source: e.into() })?;
        Ok(Self { socket, port, seq: 1 })
    }

    /// Room for sending and receiving at least this many bytes at once. Goes beyond the host's limits
    /// where CAP_NET_ADMIN of the initial user namespace allows it, else as far as they allow.
    pub(crate) fn reserve_buffers(&self, send: usize, receive: usize) -> Result<(), Failure> {
        let fail = |e: Errno| Failure::Socket { action: "enlarging the socket buffer", source: e.into() };
        let fd = borrow(&self.socket);
        if setsockopt(&fd, sockopt::SndBufForce, &send).is_err() {
            setsockopt(&fd, sockopt::SndBuf, &send).map_err(fail)?;
        }
        if setsockopt(&fd, sockopt::RcvBufForce, &receive).is_err() {
            setsockopt(&fd, sockopt::RcvBuf, &receive).map_err(fail)?;
        }
        Ok(())
    }

    pub(crate) fn next_seq(&mut self) -> u32 {
        self.seq = self.seq.wrapping_add(1).max(1);
        self.seq
    }

    pub(crate) fn send(&self, bytes: &[u8]) -> Result<(), Failure> {
        let kernel = SocketAddr::new(0, 0);
        loop {
            match self.socket.send_to(bytes, &kernel, 0) {
                Ok(n) if n == bytes.len() => return Ok(()),
                Ok(_) => return Err(Failure::Malformed("the kernel took only part of a message")),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(Failure::Socket { action: "sending to the kernel", source }),
            }
        }
    }

    /// Receives one datagram and takes it apart.
    pub(crate) fn receive(&self) -> Result<Vec<Reply>, Failure> {
        loop {
            let (bytes, from) = match self.socket.recv_from_full() {
                Ok(received) => received,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => return Err(Failure::Socket { action: "receiving from the kernel", source }),
            };
            // Any process may send to a netlink socket's port; only the kernel is port 0.
            if from.port_number() == 0 {
                return split(&bytes);
            }
        }
    }

    /// Receives one datagram if there is one.
    pub(crate) fn receive_now(&self) -> Result<Option<Vec<Reply>>, Failure> {
        let mode = |on| {
            self.socket
                .set_non_blocking(on)
                .map_err(|source| Failure::Socket { action: "changing the socket's mode", source })
        };
        mode(true)?;
        let received = self.receive();
        mode(false)?;
        match received {
            Ok(replies) => Ok(Some(replies)),
            Err(Failure::Socket { source, .. }) if source.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(other) => Err(other),
        }
    }

    /// One request; returns whatever data messages came before its acknowledgement.
    pub(crate) fn request(&mut self, kind: u16, flags: u16, body: &Body) -> Result<Vec<Message>, Failure> {
        let seq = self.next_seq();
        let mut bytes = Vec::with_capacity(HEADER + body.len());
        push_message(&mut bytes, kind, flags | NLM_F_REQUEST | NLM_F_ACK, seq, self.port, body)?;
        self.send(&bytes)?;
        let mut data = Vec::new();
        loop {
            for reply in self.receive()? {
                match reply {
                    Reply::Data(message) if message.seq == seq => data.push(message),
                    Reply::Done { seq: s } if s == seq => return Ok(data),
                    Reply::Refused(refusal) if refusal.seq == seq => return Err(Failure::Kernel(refusal)),
                    // Left over from an exchange that was given up.
                    Reply::Data(_) | Reply::Done { .. } | Reply::Refused(_) => {}
                }
            }
        }
    }

    /// A complete, consistent list: taken again when the kernel says that it changed meanwhile.
    pub(crate) fn dump(&mut self, kind: u16, body: &Body) -> Result<Vec<Message>, Failure> {
        for _ in 0..DUMP_ATTEMPTS {
            match self.request(kind, NLM_F_DUMP, body) {
                Ok(list) if list.iter().all(|m| m.flags & NLM_F_DUMP_INTR == 0) => return Ok(list),
                Ok(_) => {}
                // What nf_tables says instead when its generation moved on during a dump.
                Err(Failure::Kernel(r)) if r.errno == Errno::EINTR => {}
                Err(other) => return Err(other),
            }
        }
        Err(Failure::Changing)
    }

    pub(crate) fn port(&self) -> u32 {
        self.port
    }
}

fn borrow(socket: &Socket) -> BorrowedFd<'_> {
    #[expect(unsafe_code, reason = "netlink-sys offers only the raw descriptor")]
    // SAFETY: the descriptor is owned by `socket`, which outlives the returned borrow.
    unsafe {
        BorrowedFd::borrow_raw(socket.as_raw_fd())
    }
}

/// Appends one message to a buffer that may hold several.
pub(crate) fn push_message(
    out: &mut Vec<u8>,
    kind: u16,
    flags: u16,
    seq: u32,
    port: u32,
    body: &Body,
) -> Result<(), Failure> {
    let body = body.finish().ok_or(Failure::TooLong)?;
    let len = u32::try_from(HEADER + body.len()).map_err(|_| Failure::TooLong)?;
    out.extend_from_slice(&len.to_ne_bytes());
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(&flags.to_ne_bytes());
    out.extend_from_slice(&seq.to_ne_bytes());
    out.extend_from_slice(&port.to_ne_bytes());
    out.extend_from_slice(body);
    Ok(())
}

/// Takes a datagram apart into its messages.
fn split(mut bytes: &[u8]) -> Result<Vec<Reply>, Failure> {
    let mut replies = Vec::new();
    while !bytes.is_empty() {
        let [l0, l1, l2, l3, k0, k1, f0, f1, s0, s1, s2, s3, p0, p1, p2, p3, ..] = *bytes else {
            return Err(Failure::Malformed("a message shorter than its header"));
        };
        let len = usize::try_from(u32::from_ne_bytes([l0, l1, l2, l3])).unwrap_or(usize::MAX);
        let kind = u16::from_ne_bytes([k0, k1]);
        let flags = u16::from_ne_bytes([f0, f1]);
        let seq = u32::from_ne_bytes([s0, s1, s2, s3]);
        let Some(body) = bytes.get(HEADER..len) else {
            return Err(Failure::Malformed("a message whose length exceeds what was received"));
        };
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        replies.push(match kind {
            NLMSG_ERROR => error_reply(body, flags, seq)?,
            NLMSG_DONE => match body.first_chunk().map(|c| i32::from_ne_bytes(*c)) {
                // The kernel reports a dump that failed halfway in its last message.
                Some(code) if code < 0 => {
                    Reply::Refused(Refusal { seq, errno: Errno::from_raw(-code), detail: None })
                }
                _ => Reply::Done { seq },
            },
            NLMSG_OVERRUN => return Err(Failure::Malformed("the kernel says that data was lost")),
            _ => Reply::Data(Message {
                kind,
                flags,
                seq,
                port: u32::from_ne_bytes([p0, p1, p2, p3]),
                body: body.to_vec(),
            }),
        });
    }
    Ok(replies)
}

fn error_reply(body: &[u8], flags: u16, seq: u32) -> Result<Reply, Failure> {
    let code = body.first_chunk().map(|c| i32::from_ne_bytes(*c));
    let code = code.ok_or(Failure::Malformed("an error message without a code"))?;
    if code == 0 {
        return Ok(Reply::Done { seq });
    }
    let mut detail = None;
    if flags & NLM_F_ACK_TLVS != 0 {
        // Behind the code comes the offending header, with its payload unless that was left out.
        let echoed = body
            .get(4..8)
            .and_then(|b| b.first_chunk())
            .map_or(HEADER, |c| usize::try_from(u32::from_ne_bytes(*c)).unwrap_or(HEADER));
        let skip = if flags & NLM_F_CAPPED != 0 { HEADER } else { echoed.next_multiple_of(4) };
        detail = Attrs::after(body, 4usize.saturating_add(skip)).find(NLMSGERR_ATTR_MSG).map(Attr::string);
    }
    Ok(Reply::Refused(Refusal { seq, errno: Errno::from_raw(code.wrapping_neg()), detail }))
}

/// What the usual error numbers mean for somebody who configures a network.
#[expect(clippy::wildcard_enum_match_arm, reason = "only the usual ones have an explanation")]
pub(crate) fn likely_cause(errno: Errno) -> &'static str {
    match errno {
        Errno::EPERM | Errno::EACCES => "needs CAP_NET_ADMIN in this network namespace",
        Errno::EEXIST => "it exists already, with other properties",
        Errno::ENODEV => "no such network device, or it has just gone",
        Errno::ENOENT => "it does not exist, or something it refers to does not",
        Errno::ESRCH => "no such route or object",
        Errno::ENETUNREACH => "the gateway is not reachable, or the device is down",
        Errno::EHOSTUNREACH => "no route to that address",
        Errno::ENETDOWN => "the device is down",
        Errno::EOPNOTSUPP | Errno::EAFNOSUPPORT | Errno::EPROTONOSUPPORT => "this kernel lacks the feature",
        Errno::EBUSY => "it is in use",
        Errno::EINVAL => "the kernel does not accept these properties",
        Errno::ERANGE | Errno::EOVERFLOW => "a value is out of range",
        Errno::EADDRNOTAVAIL => "no such address on the device",
        Errno::EMSGSIZE => "too much in one message for the socket's buffer",
        Errno::ENOBUFS | Errno::ENOMEM => "the kernel is out of memory for this",
        Errno::ENFILE | Errno::EMFILE | Errno::ENOSPC => "a limit of the kernel is reached",
        Errno::ERESTART => "somebody else changed the tables meanwhile",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn raw(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
        let mut b = Body::new(&[]);
        b.raw(body);
        let mut out = Vec::new();
        push_message(&mut out, kind, flags, 7, 0, &b).unwrap();
        out
    }

    #[test]
    fn an_error_with_text_is_understood() {
        let mut body = (-libc::EINVAL).to_ne_bytes().to_vec();
        body.extend_from_slice(&[0; HEADER]);
        let mut tlv = Body::new(&[]);
        tlv.str(NLMSGERR_ATTR_MSG, "Invalid prefix");
        body.extend_from_slice(tlv.finish().unwrap());
        let replies = split(&raw(NLMSG_ERROR, NLM_F_CAPPED | NLM_F_ACK_TLVS, &body)).unwrap();
        let [Reply::Refused(refusal)] = replies.as_slice() else { panic!("not a refusal") };
        assert_eq!(refusal.errno, Errno::EINVAL);
        assert_eq!(refusal.detail.as_deref(), Some("Invalid prefix"));
        assert_eq!(refusal.seq, 7);
    }

    #[test]
    fn a_dump_that_ends_in_an_error_is_not_complete() {
        let replies = split(&raw(NLMSG_DONE, 2, &(-libc::EINTR).to_ne_bytes())).unwrap();
        assert!(matches!(replies.as_slice(), [Reply::Refused(r)] if r.errno == Errno::EINTR));
        let replies = split(&raw(NLMSG_DONE, 2, &0i32.to_ne_bytes())).unwrap();
        assert!(matches!(replies.as_slice(), [Reply::Done { seq: 7 }]));
    }

    #[test]
    fn a_cut_message_is_an_error() {
        let whole = raw(16, 0, &[1, 2, 3, 4]);
        assert!(split(&whole[..whole.len() - 1]).is_err());
        assert!(split(&whole[..10]).is_err());
        assert!(matches!(split(&raw(NLMSG_OVERRUN, 0, &[])), Err(Failure::Malformed(_))));
    }

    proptest! {
        #[test]
        fn any_bytes_end_without_panic(bytes: Vec<u8>) {
            let _ = split(&bytes);
        }

        #[test]
        fn any_error_body_ends_without_panic(body: Vec<u8>, flags: u16) {
            let _ = split(&raw(NLMSG_ERROR, flags, &body));
        }
    }
}
