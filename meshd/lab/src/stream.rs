//! TCP with a checked payload, in the network namespace of the calling thread.
//!
//! The stream is made of records of 256 bytes: a [`MARKER`] to look for on the wire, the record's offset in
//! the stream, and pseudo-random bytes. The receiver computes the same stream and compares every byte, so
//! loss, reordering, duplication and change are all found, with the offset of the first difference.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// Sixteen bytes that everything the lab sends contains, at least once in each 256 bytes.
pub const MARKER: [u8; 16] = *b"\xc3PLAINTEXT-MARK\xa5";

const RECORD: usize = 256;
const RECORDS_PER_BLOCK: usize = 256;
const BLOCK: usize = RECORD * RECORDS_PER_BLOCK;

/// Nothing moved for this long: the transfer has failed.
const STALL: Duration = Duration::from_secs(10);

/// A finished transfer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Transfer {
    /// Payload bytes, all of which were compared by the receiver.
    pub bytes: u64,
    /// From the connection's start to the receiver's confirmation.
    pub elapsed: Duration,
}

impl Transfer {
    /// Payload in Gbit/s.
    #[must_use]
    pub fn gbit_per_second(&self) -> f64 {
        self.bytes as f64 * 8e-9 / self.elapsed.as_secs_f64()
    }
}

/// One block of the stream; the offsets are those of block `index`.
struct Block {
    bytes: Vec<u8>,
}

impl Block {
    fn new(seed: u64) -> Self {
        let mut bytes = Vec::with_capacity(BLOCK);
        let mut state = seed;
        while bytes.len() < BLOCK {
            bytes.extend(next_random(&mut state).to_le_bytes());
        }
        for record in bytes.chunks_exact_mut(RECORD) {
            record[..16].copy_from_slice(&MARKER);
        }
        Self { bytes }
    }

    fn at(&mut self, index: u64) -> &[u8] {
        for (number, record) in self.bytes.chunks_exact_mut(RECORD).enumerate() {
            let offset = index * BLOCK as u64 + (number * RECORD) as u64;
            record[16..24].copy_from_slice(&offset.to_le_bytes());
        }
        &self.bytes
    }
}

/// splitmix64: enough to make neighbouring records and seeds differ.
pub(crate) fn next_random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Receives and checks transfers until it is stopped.
#[derive(Debug)]
pub(crate) struct Server {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Listens on `address`, a port of the kernel's choice. The threads stay in the namespace of the caller.
    pub(crate) fn start(address: IpAddr) -> Result<Self> {
        let listener =
            TcpListener::bind((address, 0)).with_context(|| format!("listening for TCP on {address}"))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        let thread =
            thread::Builder::new().name("lab-tcp".to_owned()).spawn(move || serve(&listener, &stopping))?;
        Ok(Self { address, stop, thread: Some(thread) })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic in it has been printed; the sender of the transfer fails too.
            let _ = thread.join();
        }
    }
}

fn serve(listener: &TcpListener, stop: &AtomicBool) {
    thread::scope(|scope| {
        while !stop.load(Ordering::Relaxed) {
            match listener.accept() {
                Ok((connection, peer)) => {
                    scope.spawn(move || {
                        if let Err(error) = receive(connection) {
                            tracing::debug!(%peer, error = format!("{error:#}"), "transfer failed");
                        }
                    });
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    thread::sleep(Duration::from_millis(2))
                }
                Err(error) => {
                    tracing::warn!(%error, "accepting a transfer");
                    return;
                }
            }
        }
    });
}

/// Reads one transfer and answers with the number of bytes that were right, then the total if all were.
fn receive(mut connection: TcpStream) -> Result<()> {
    connection.set_nonblocking(false)?;
    connection.set_read_timeout(Some(STALL))?;
    let mut word = [0u8; 8];
    connection.read_exact(&mut word)?;
    let mut block = Block::new(u64::from_le_bytes(word));
    connection.read_exact(&mut word)?;
    let total = u64::from_le_bytes(word);

    let mut buffer = vec![0u8; BLOCK];
    let mut done = 0;
    while done < total {
        let expected = block.at(done / BLOCK as u64);
        let end = (total - done).min(BLOCK as u64) as usize;
        let mut position = 0;
        while position < end {
            let count = connection.read(&mut buffer[..end - position])?;
            ensure!(count > 0, "the stream ended after {} of {total} bytes", done + position as u64);
            if buffer[..count] != expected[position..position + count] {
                let same =
                    buffer[..count].iter().zip(&expected[position..]).take_while(|(a, b)| a == b).count();
                let offset = done + (position + same) as u64;
                connection.write_all(&offset.to_le_bytes())?;
                bail!("the stream differs at offset {offset}");
            }
            position += count;
        }
        done += end as u64;
    }
    connection.write_all(&done.to_le_bytes())?;
    Ok(())
}

/// Sends `bytes` bytes of the stream `seed` to a [`Server`].
pub(crate) fn send(to: SocketAddr, seed: u64, bytes: u64) -> Result<Transfer> {
    let start = Instant::now();
    let mut connection =
        TcpStream::connect_timeout(&to, STALL).with_context(|| format!("connecting to {to} over TCP"))?;
    connection.set_write_timeout(Some(STALL))?;
    connection.set_read_timeout(Some(STALL))?;
    connection.set_nodelay(true)?;
    let mut header = seed.to_le_bytes().to_vec();
    header.extend(bytes.to_le_bytes());
    let mut block = Block::new(seed);
    let mut sent = 0;
    let written = (|| -> io::Result<()> {
        connection.write_all(&header)?;
        while sent < bytes {
            let count = (bytes - sent).min(BLOCK as u64);
            connection.write_all(&block.at(sent / BLOCK as u64)[..count as usize])?;
            sent += count;
        }
        Ok(())
    })();
    let mut answer = [0u8; 8];
    // The receiver's word first: when it found a difference, the failed write is only the consequence.
    let confirmed = connection.read_exact(&mut answer).map(|()| u64::from_le_bytes(answer));
    match (written, confirmed) {
        (Ok(()), Ok(confirmed)) if confirmed == bytes => Ok(Transfer { bytes, elapsed: start.elapsed() }),
        (_, Ok(offset)) => bail!("TCP payload to {to} arrived changed at offset {offset}"),
        (Err(error), Err(_)) => {
            Err(error).with_context(|| format!("sending TCP to {to}, stuck after {sent} of {bytes} bytes"))
        }
        (Ok(()), Err(error)) => {
            Err(error).with_context(|| format!("TCP to {to}: all {bytes} bytes sent, but not confirmed"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transfer_of_any_length_is_checked_to_the_end() {
        let server = Server::start(IpAddr::from([127, 0, 0, 1])).unwrap();
        for bytes in [0, 1, RECORD as u64, BLOCK as u64, 3 * BLOCK as u64 + 77] {
            assert_eq!(send(server.address(), bytes, bytes).unwrap().bytes, bytes);
        }
    }

    #[test]
    fn one_changed_byte_is_found_and_located() {
        let server = Server::start(IpAddr::from([127, 0, 0, 1])).unwrap();
        let mut connection = TcpStream::connect(server.address()).unwrap();
        let mut bytes = 5u64.to_le_bytes().to_vec();
        bytes.extend(1000u64.to_le_bytes());
        bytes.extend(&Block::new(5).at(0)[..1000]);
        bytes[16 + 700] ^= 1;
        connection.write_all(&bytes).unwrap();
        let mut answer = [0; 8];
        connection.read_exact(&mut answer).unwrap();
        assert_eq!(u64::from_le_bytes(answer), 700);
    }

    #[test]
    fn every_record_carries_the_marker_and_its_own_offset() {
        let mut block = Block::new(1);
        let first = block.at(0).to_vec();
        let second = block.at(1).to_vec();
        for (a, b) in first.chunks(RECORD).zip(second.chunks(RECORD)) {
            assert_eq!(a[..16], MARKER);
            assert_ne!(a[16..24], b[16..24]);
        }
        assert_ne!(Block::new(2).at(0), first);
    }
}
