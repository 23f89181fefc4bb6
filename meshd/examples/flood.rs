//! Initiations with the addresses of others, for `cargo xtask bench relay --flood`:
//!
//! `flood RATE TO KEY@ADDRESS…` sends so many in a second, until standard input ends; then it prints how many it has sent, in
//! how many seconds, and its own processor time.
#![allow(clippy::print_stdout, reason = "the answer")]

#[path = "../tests/support/flood.rs"]
mod flood;

use std::io::Read as _;
use std::net::SocketAddrV4;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use flood::{Flood, Kind};
use mesh_keys::WgPublic;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike as _;

/// Whoever has started it may have been killed.
const AT_MOST: Duration = Duration::from_secs(3_700);

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [rate, to, lanes @ ..] = arguments.as_slice() else { bail!("usage: flood RATE TO KEY@ADDRESS…") };
    let lane = |lane: &String| -> Result<(WgPublic, SocketAddrV4)> {
        let (key, address) = lane.split_once('@').context("KEY@ADDRESS")?;
        Ok((key.parse()?, address.parse()?))
    };
    let lanes: Vec<_> = lanes.iter().map(lane).collect::<Result<_>>()?;
    if lanes.len() < 2 {
        bail!("two lanes");
    }
    let mut flood = Flood::new(to.parse()?, &Kind::ALL, &lanes)?;
    let rate = rate.parse().context("RATE")?;

    let ended = AtomicBool::new(false);
    let started = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _read = std::io::stdin().read_to_end(&mut Vec::new());
            ended.store(true, Ordering::Relaxed);
        });
        flood.run(rate, || !ended.load(Ordering::Relaxed) && started.elapsed() < AT_MOST)
    })?;
    let seconds = started.elapsed().as_secs_f64();
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let cpu = (usage.user_time() + usage.system_time()).num_microseconds() as f64 / 1e6;
    println!("sent {} seconds {seconds} cpu {cpu}", flood.sent());
    Ok(())
}
