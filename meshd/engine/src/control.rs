//! Answering the configuration socket.

use std::io::{self, BufReader, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use mesh_sys::uapi::{Limits, Request, format_errno, read_message};

use crate::device::Device;

/// Connections served at the same time. Each is a thread that mostly waits.
const MAX_CONNECTIONS: usize = 32;
/// A client that says nothing for so long, or does not read, is let go.
const PATIENCE: Duration = Duration::from_secs(60);

/// Serves all who wait to be accepted, each in a thread of its own.
pub(crate) fn accept(listener: &UnixListener, device: &Arc<Device>, open: &Arc<AtomicUsize>) {
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error)
                if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted) =>
            {
                continue;
            }
            Err(error) => {
                // Out of descriptors, mostly: packets flow on, and clients may try again.
                tracing::warn!(%error, "a configuration client could not be accepted");
                std::thread::sleep(Duration::from_millis(100));
                return;
            }
        };
        if open.fetch_add(1, Ordering::AcqRel) >= MAX_CONNECTIONS {
            open.fetch_sub(1, Ordering::AcqRel);
            tracing::warn!(limit = MAX_CONNECTIONS, "too many configuration clients: one was turned away");
            continue;
        }
        let served = Served(Arc::clone(open));
        let device = Arc::clone(device);
        let spawned = std::thread::Builder::new().name("uapi".to_owned()).spawn(move || {
            let _served = served;
            if let Err(error) = serve(&stream, &device) {
                tracing::debug!(%error, "a configuration client went away");
            }
        });
        if let Err(error) = spawned {
            tracing::error!(%error, "no thread for a configuration client");
        }
    }
}

/// Counts one connection until it is dropped.
struct Served(Arc<AtomicUsize>);

impl Drop for Served {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

fn serve(stream: &UnixStream, device: &Device) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut reader = BufReader::new(stream);
    loop {
        let message = match read_message(&mut reader, Limits::REQUEST) {
            Ok(Some(message)) => message,
            Ok(None) => return Ok(()),
            Err(mesh_sys::uapi::ReadError::Io(error)) => return Err(error),
            Err(error) => {
                tracing::warn!(%error, "configuration request refused");
                // Where the next message would begin is unknown.
                return answer(stream, &format_errno(-libc::EINVAL));
            }
        };
        match Request::parse(&message) {
            Ok(Request::Get) => answer(stream, &device.report().to_text())?,
            Ok(Request::Set(change)) => {
                let errno = match device.apply(change) {
                    Ok(()) => 0,
                    Err(error) => {
                        tracing::warn!(%error, "configuration request refused");
                        -error.errno()
                    }
                };
                answer(stream, &format_errno(errno))?;
            }
            Err(error) => {
                tracing::warn!(%error, "configuration request refused");
                answer(stream, &format_errno(-libc::EINVAL))?;
            }
        }
    }
}

fn answer(mut stream: &UnixStream, text: &str) -> io::Result<()> {
    stream.write_all(text.as_bytes())
}
