//! The UDP socket of the control port: gossip.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use mesh_core::node::Input;
use mesh_keys::frame::MAX_DATAGRAM;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::net::UdpSocket;
use tokio::sync::mpsc;

/// Room in the kernel for datagrams that wait: a few thousand. It gives what it may.
const RECEIVE_BUFFER: usize = 4 << 20;

/// The socket, of both families; of IPv4 alone where the host has no IPv6.
#[derive(Clone, Debug)]
pub struct Datagrams {
    socket: Arc<UdpSocket>,
    ipv4_only: bool,
}

impl Datagrams {
    /// Binds the port on all addresses.
    ///
    /// # Errors
    /// Those of the kernel; the port is taken, most likely.
    pub fn bind(port: u16) -> io::Result<Self> {
        match open(Domain::IPV6, (Ipv6Addr::UNSPECIFIED, port).into()) {
            Err(error) if error.raw_os_error() == Some(nix::libc::EAFNOSUPPORT) => {
                let socket = Arc::new(open(Domain::IPV4, (Ipv4Addr::UNSPECIFIED, port).into())?);
                Ok(Self { socket, ipv4_only: true })
            }
            other => Ok(Self { socket: Arc::new(other?), ipv4_only: false }),
        }
    }

    /// Hands every datagram on. When nobody keeps up, the newest are dropped, as the kernel would.
    pub async fn receive(self, to: mpsc::Sender<Input>) {
        let mut buffer = vec![0; MAX_DATAGRAM + 1];
        loop {
            match self.socket.recv_from(&mut buffer).await {
                // Longer ones are no gossip.
                Ok((length, _)) if length > MAX_DATAGRAM => {}
                Ok((length, from)) => {
                    let from = SocketAddr::new(from.ip().to_canonical(), from.port());
                    let bytes = buffer.get(..length).unwrap_or_default().to_vec();
                    match to.try_send(Input::Datagram { from, bytes }) {
                        Ok(()) | Err(mpsc::error::TrySendError::Full(_)) => {}
                        Err(mpsc::error::TrySendError::Closed(_)) => return,
                    }
                }
                // Errors of datagrams sent before, such as a port that is closed at the other end.
                Err(error) => {
                    tracing::debug!(%error, "receiving datagrams");
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
        }
    }

    /// Sends a datagram, if that is possible at once.
    pub fn send(&self, to: SocketAddr, bytes: &[u8]) {
        let to = match to.ip() {
            IpAddr::V4(ip) if !self.ipv4_only => SocketAddr::new(ip.to_ipv6_mapped().into(), to.port()),
            IpAddr::V4(_) | IpAddr::V6(_) => to,
        };
        // Not by way of the runtime, which would have to be told first that there is room.
        if let Err(error) = SockRef::from(&*self.socket).send_to(bytes, &to.into()) {
            tracing::trace!(%to, %error, "datagram not sent");
        }
    }
}

fn open(domain: Domain, address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(domain, Type::DGRAM.nonblocking().cloexec(), Some(Protocol::UDP))?;
    if domain == Domain::IPV6 {
        socket.set_only_v6(false)?;
    }
    socket.set_recv_buffer_size(RECEIVE_BUFFER)?;
    socket.bind(&address.into())?;
    UdpSocket::from_std(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn both_families_come_and_go_and_what_is_too_long_does_not() {
        let here = Datagrams::bind(0).unwrap();
        let port = here.socket.local_addr().unwrap().port();
        let (inputs, mut input) = mpsc::channel(8);
        let task = tokio::spawn(here.clone().receive(inputs));
        for family in ["127.0.0.1", "::1"] {
            let there = Datagrams::bind(0).unwrap();
            let from = SocketAddr::new(family.parse().unwrap(), there.socket.local_addr().unwrap().port());
            let to = SocketAddr::new(from.ip(), port);
            there.send(to, &[7; MAX_DATAGRAM + 1]);
            there.send(to, &[9; MAX_DATAGRAM]);
            let received = tokio::time::timeout(Duration::from_secs(5), input.recv()).await.unwrap();
            let Some(Input::Datagram { from: seen, bytes }) = received else { panic!("{received:?}") };
            assert_eq!((seen, bytes), (from, vec![9; MAX_DATAGRAM]));
            // And back.
            here.send(from, b"answer");
            let mut buffer = [0; 16];
            let length = there.socket.recv(&mut buffer).await.unwrap();
            assert_eq!(&buffer[..length], b"answer");
        }
        task.abort();
    }
}
