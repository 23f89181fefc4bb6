//! Kernels and network devices that can do less than ours: a filter in front of one process's system calls.
//!
//! This kernel (6.18, without IPsec) refuses none of what the engine asks for: since 6.11 `UDP_SEGMENT` works over
//! devices without checksum offload too. So the refusal comes from seccomp, in the kernel's own words.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::fs::FileExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Something that a kernel may not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Setting `UDP_SEGMENT` on a socket (before Linux 4.18).
    Segmentation,
    /// Setting `UDP_GRO` on a socket (before Linux 5.0).
    Coalescing,
    /// UDP superpackets on a TUN device (before Linux 6.2).
    TunUdp,
    /// Any offload on a TUN device.
    TunOffloads,
}

impl Refusal {
    /// Whether it is about the TUN device, not about sockets.
    pub fn is_of_tun(self) -> bool {
        matches!(self, Self::TunUdp | Self::TunOffloads)
    }

    fn rule(self) -> Rule {
        let option = |name| Rule {
            call: libc::SYS_setsockopt,
            conditions: vec![(1, Test::Is(libc::SOL_UDP as u32)), (2, Test::Is(name as u32))],
            action: refuse(Errno::ENOPROTOOPT),
        };
        let offload = |conditions: &[(u32, Test)]| Rule {
            call: libc::SYS_ioctl,
            conditions: [&[(1, Test::Is(libc::TUNSETOFFLOAD as u32))], conditions].concat(),
            action: refuse(Errno::EINVAL),
        };
        match self {
            Self::Segmentation => option(libc::UDP_SEGMENT),
            Self::Coalescing => option(libc::UDP_GRO),
            Self::TunUdp => offload(&[(2, Test::HasAny(libc::TUN_F_USO4 | libc::TUN_F_USO6))]),
            Self::TunOffloads => offload(&[]),
        }
    }
}

/// Has the program that `command` starts meet these refusals.
pub fn refuse_to(command: &mut Command, refusals: &[Refusal]) {
    let program = assemble(refusals.iter().map(|refusal| refusal.rule()));
    // SAFETY: between fork and exec it makes one system call and allocates nothing.
    #[expect(unsafe_code, reason = "what runs between fork and exec must be safe there")]
    unsafe {
        command.pre_exec(move || install(&program, 0).map(|_| ()));
    }
}

/// A process whose runs of datagrams in one piece (`UDP_SEGMENT`) are refused when they are sent, with EIO: what a
/// kernel before 6.11 says when the device lacks checksum offload, and every kernel when IPsec is on the way.
pub struct RefusedRuns {
    shared: Arc<Counts>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Counts {
    sends: AtomicU64,
    refused: AtomicU64,
    stop: AtomicBool,
}

/// Where the child leaves its end of the filter for us to fetch.
const LISTENER: RawFd = 199;

impl RefusedRuns {
    /// Prepares `command`; [`RefusedRuns::watch`] has to follow once it has been started.
    pub fn prepare(command: &mut Command) {
        let ask = |call| Rule { call, conditions: Vec::new(), action: libc::SECCOMP_RET_USER_NOTIF };
        let program = assemble([ask(libc::SYS_sendmsg), ask(libc::SYS_sendmmsg)].into_iter());
        let hand_over = move || {
            let listener = install(&program, libc::SECCOMP_FILTER_FLAG_NEW_LISTENER)?;
            // SAFETY: a system call on two numbers; what has the second one is of this process alone.
            #[expect(unsafe_code, reason = "the child's descriptors have no owner in Rust")]
            let result = unsafe { libc::dup2(listener, LISTENER) };
            Errno::result(result).map(|_| ()).map_err(io::Error::from)
        };
        // SAFETY: between fork and exec it makes system calls and allocates nothing.
        #[expect(unsafe_code, reason = "what runs between fork and exec must be safe there")]
        unsafe {
            command.pre_exec(hand_over);
        }
    }

    /// Answers for the kernel from now on.
    pub fn watch(child: &Child) -> Self {
        let listener = fetch(child, LISTENER).unwrap();
        let shared = Arc::new(Counts::default());
        let counts = Arc::clone(&shared);
        let thread = std::thread::spawn(move || answer(&listener, &counts));
        Self { shared, thread: Some(thread) }
    }

    /// How often something was sent, and how often that was refused.
    pub fn counts(&self) -> (u64, u64) {
        (self.shared.sends.load(Ordering::Relaxed), self.shared.refused.load(Ordering::Relaxed))
    }
}

impl Drop for RefusedRuns {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        if let Some(Err(panic)) = ended
            && !std::thread::panicking()
        {
            std::panic::resume_unwind(panic);
        }
    }
}

/// Answers each send: as the kernel would, but for a run in the first place, which decides over the call.
fn answer(listener: &OwnedFd, counts: &Counts) {
    while !counts.stop.load(Ordering::Relaxed) {
        let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::from(50u8)).unwrap() == 0 {
            continue;
        }
        if !fds[0].revents().is_some_and(|events| events.contains(PollFlags::POLLIN)) {
            // The last process behind the filter is gone.
            return;
        }
        // SAFETY: all zeroes is a valid value of it, and the one the kernel asks for.
        #[expect(unsafe_code, reason = "a C struct has no safe constructor")]
        let mut request: libc::seccomp_notif = unsafe { MaybeUninit::zeroed().assume_init() };
        if notify(listener, libc::SECCOMP_IOCTL_NOTIF_RECV, &mut request).is_err() {
            continue;
        }
        counts.sends.fetch_add(1, Ordering::Relaxed);
        let mut response = libc::seccomp_notif_resp { id: request.id, val: 0, error: 0, flags: CONTINUE };
        // The header of sendmsg, and the first of sendmmsg.
        if is_run(request.pid, request.data.args[1]).unwrap_or(false) {
            counts.refused.fetch_add(1, Ordering::Relaxed);
            (response.error, response.flags) = (-libc::EIO, 0);
        }
        // It fails when the process was killed meanwhile.
        let _told = notify(listener, libc::SECCOMP_IOCTL_NOTIF_SEND, &mut response);
    }
}

const CONTINUE: u32 = libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32;

/// Whether the message header at `address` in another process asks for segmentation.
fn is_run(pid: u32, address: u64) -> io::Result<bool> {
    let memory = File::open(format!("/proc/{pid}/mem"))?;
    // struct msghdr: name, its length, vectors, their number, control messages, their length.
    let mut header = [0; 56];
    memory.read_exact_at(&mut header, address)?;
    let word = |at: usize| u64::from_ne_bytes(header[at..at + 8].try_into().unwrap());
    let mut control = vec![0; usize::try_from(word(40)).unwrap().min(512)];
    memory.read_exact_at(&mut control, word(32))?;
    let mut rest = control.as_slice();
    while let Some((length, kind)) = rest.get(..8).zip(rest.get(8..16)) {
        let length = usize::from_ne_bytes(length.try_into().unwrap());
        if kind == [libc::SOL_UDP.to_ne_bytes(), libc::UDP_SEGMENT.to_ne_bytes()].concat() {
            return Ok(true);
        }
        rest = rest.get(length.next_multiple_of(8).max(16)..).unwrap_or_default();
    }
    Ok(false)
}

fn notify<T>(listener: &OwnedFd, number: libc::Ioctl, value: &mut T) -> io::Result<()> {
    // SAFETY: each request is called with the struct that its number was made from; the kernel keeps no pointer.
    #[expect(unsafe_code, reason = "ioctl has no safe form")]
    let result = unsafe { libc::ioctl(listener.as_raw_fd(), number, std::ptr::from_mut(value)) };
    Errno::result(result)?;
    Ok(())
}

/// A descriptor of another process.
fn fetch(child: &Child, descriptor: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: system calls on numbers. Each returns a new descriptor that nothing else owns.
    #[expect(unsafe_code, reason = "neither call has a safe form")]
    unsafe {
        let process = Errno::result(libc::syscall(libc::SYS_pidfd_open, child.id(), 0))?;
        let process = OwnedFd::from_raw_fd(process as RawFd);
        let fetched = libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), descriptor, 0);
        Ok(OwnedFd::from_raw_fd(Errno::result(fetched)? as RawFd))
    }
}

/// One rule of a filter: this call with these arguments gets this answer.
struct Rule {
    call: libc::c_long,
    conditions: Vec<(u32, Test)>,
    action: u32,
}

/// A test of the low half of an argument.
#[derive(Clone, Copy)]
enum Test {
    Is(u32),
    HasAny(u32),
}

fn refuse(errno: Errno) -> u32 {
    libc::SECCOMP_RET_ERRNO | (errno as u32 & libc::SECCOMP_RET_DATA)
}

/// The rules as a program: the first that fits decides, and what fits none is allowed.
fn assemble(rules: impl Iterator<Item = Rule>) -> Vec<libc::sock_filter> {
    const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let instruction = |code: u32, k, skip| libc::sock_filter { code: code as u16, jt: 0, jf: skip, k };
    let mut program = Vec::new();
    for Rule { call, conditions, action } in rules {
        // A test that fails skips the rest of its rule.
        let mut left = 2 * conditions.len() as u8 + 1;
        program.push(instruction(LOAD, 0, 0));
        program.push(instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, call as u32, left));
        for (argument, test) in conditions {
            left -= 2;
            // struct seccomp_data: number, architecture, instruction, then arguments of 64 bits, low half first.
            program.push(instruction(LOAD, 16 + 8 * argument, 0));
            let (operation, value) = match test {
                Test::Is(value) => (libc::BPF_JEQ, value),
                Test::HasAny(bits) => (libc::BPF_JSET, bits),
            };
            program.push(instruction(libc::BPF_JMP | operation | libc::BPF_K, value, left));
        }
        program.push(instruction(libc::BPF_RET | libc::BPF_K, action, 0));
    }
    program.push(instruction(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0));
    program
}

fn install(program: &[libc::sock_filter], flags: libc::c_ulong) -> io::Result<RawFd> {
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
    // SAFETY: the program is alive during the call, with its true length; the kernel only reads it.
    #[expect(unsafe_code, reason = "seccomp has no safe form")]
    let result = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, std::ptr::from_ref(&program))
    };
    Ok(Errno::result(result)? as RawFd)
}
