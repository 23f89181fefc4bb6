//! The relay by itself, for `cargo xtask bench relay`, and what it is compared with:
//!
//! `relay PORT KEY@ADDRESS…` serves these lanes until standard input ends, and answers each line there with what it has counted, as
//! `NAME VALUE` pairs; `relay --bare PORT ADDRESS ADDRESS` passes everything from one address on to the
//! other, and looks at nothing.
#![allow(clippy::print_stdout, reason = "whoever runs it wants to know")]

use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use mesh_core::relay::{Dropped, Endpoint};
use mesh_core::time::Time;
use mesh_keys::WgPublic;
use mesh_sys::udp::{Destination, ReceiveBatch, SendBatch, Sockets};
use meshd::datagrams::Datagrams;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Lanes say that they are there three times in the time for which they are believed.
const REGISTER_EVERY: Duration = Duration::from_secs(25);

fn main() -> Result<()> {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let bare = arguments.first().is_some_and(|first| first == "--bare");
    if bare {
        arguments.remove(0);
    }
    let Some((port, rest)) = arguments.split_first() else { bail!("usage: relay [--bare] PORT …") };
    let port = port.parse().context("PORT")?;
    if bare { forward(port, rest) } else { relay(port, rest) }
}

fn relay(port: u16, lanes: &[String]) -> Result<()> {
    let mut endpoints = Vec::new();
    for lane in lanes {
        let (key, address) = lane.split_once('@').context("KEY@ADDRESS")?;
        endpoints.push((key.parse::<WgPublic>()?, Endpoint { remote: address.parse()?, local: None }));
    }
    let started = Instant::now();
    let clock = move || Time::from_origin(started.elapsed());
    let datagrams = Datagrams::bind(port, clock())?;
    let _incoming = datagrams.receive(clock)?;
    let registering = datagrams.clone();
    std::thread::spawn(move || {
        for serial in 0.. {
            for (key, endpoint) in &endpoints {
                if let Err(error) = registering.relay().register(*key, *endpoint, serial, clock()) {
                    // Nothing is relayed then, which is noticed.
                    tracing::error!(%error, "a lane is not registered");
                }
            }
            std::thread::sleep(REGISTER_EVERY);
        }
    });
    for line in std::io::stdin().lines() {
        line?;
        println!("{}", counted(&datagrams));
    }
    Ok(())
}

fn counted(datagrams: &Datagrams) -> String {
    let counters = datagrams.counters();
    let passed_on = counters.passed_on.load(Ordering::Relaxed);
    let (lanes, routes) = datagrams.relay().load();
    let mut text = format!("passed_on {passed_on} lanes {lanes} routes {routes}");
    for reason in Dropped::ALL {
        text += &format!(" {} {}", reason.name(), counters.dropped(reason));
    }
    text
}

fn forward(port: u16, ends: &[String]) -> Result<()> {
    let [a, b] = ends else { bail!("two addresses") };
    let ends: [SocketAddr; 2] = [a.parse()?, b.parse()?];
    let sockets = Sockets::bind(port)?;
    let (mut receive, mut batch) = (ReceiveBatch::new(16), SendBatch::new(16 << 16));
    loop {
        let mut fds: Vec<PollFd<'_>> =
            sockets.iter().map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)).collect();
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        for socket in sockets.iter() {
            while receive.receive(socket).is_ok_and(|count| count > 0) {
                let (pieces, data) = receive.parts();
                for piece in pieces {
                    let Some(from) = ends.iter().position(|end| *end == piece.from) else { continue };
                    let to = Destination { address: ends[1 - from], source: None };
                    for place in piece.datagrams() {
                        if !batch.has_space(place.len()) {
                            batch.send(&sockets);
                        }
                        if let Some(space) = batch.space(place.len()) {
                            space.copy_from_slice(&data[place.clone()]);
                            batch.commit(&to, place.len());
                        }
                    }
                }
                batch.send(&sockets);
            }
        }
    }
}
