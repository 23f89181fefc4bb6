//! A limit on connections from strangers, in total and per source, so that whoever can reach the
//! port cannot use up memory or keep members out by connecting and saying nothing.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};

/// Counts the slots that are out.
#[derive(Debug, Default)]
pub(super) struct HandshakeGate {
    out: Mutex<BTreeMap<IpAddr, usize>>,
}

impl HandshakeGate {
    /// A slot for a connection from `source`, or which limit it meets.
    pub(super) fn enter(self: &Arc<Self>, source: IpAddr) -> Result<HandshakeSlot, &'static str> {
        let source = site(source);
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        if out.values().sum::<usize>() >= MAX_TOTAL {
            return Err("in total");
        }
        let count = out.entry(source).or_insert(0);
        if *count >= MAX_PER_SOURCE {
            return Err("from this source");
        }
        *count += 1;
        Ok(HandshakeSlot { gate: Arc::clone(self), source })
    }

    fn leave(&self, source: IpAddr) {
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = out.get_mut(&source) {
            *count -= 1;
            if *count == 0 {
                out.remove(&source);
            }
        }
    }
}

/// Holding it is the permission to be connected without having proved to be a member.
#[derive(Debug)]
pub struct HandshakeSlot {
    gate: Arc<HandshakeGate>,
    source: IpAddr,
}

impl Drop for HandshakeSlot {
    fn drop(&mut self) {
        self.gate.leave(self.source);
    }
}

/// Whoever has one IPv6 address usually has its whole /64.
fn site(source: IpAddr) -> IpAddr {
    match source.to_canonical() {
        IpAddr::V4(v4) => IpAddr::V4(v4),
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from(u128::from(v6) & !u128::from(u64::MAX))),
    }
}

/// A TLS connection in set-up takes about 50 kB: 6 MB in all.
const MAX_TOTAL: usize = 128;
/// Room for a site full of nodes behind one NAT address that all start at once, an eighth of the total.
const MAX_PER_SOURCE: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    fn v4(last: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, last])
    }

    #[test]
    fn one_source_cannot_keep_the_others_out() {
        let gate = Arc::new(HandshakeGate::default());
        let greedy: Vec<_> = (0..MAX_PER_SOURCE).map(|_| gate.enter(v4(1)).unwrap()).collect();
        assert_eq!(gate.enter(v4(1)).unwrap_err(), "from this source");
        let other = gate.enter(v4(2)).unwrap();
        drop(greedy);
        gate.enter(v4(1)).unwrap();
        drop(other);
        assert!(gate.out.lock().unwrap().is_empty(), "dropped slots leave nothing behind");
    }

    #[test]
    fn all_sources_together_are_limited() {
        let gate = Arc::new(HandshakeGate::default());
        let all: Vec<_> = (0..MAX_TOTAL).map(|i| gate.enter(v4(i as u8)).unwrap()).collect();
        assert_eq!(gate.enter(v4(200)).unwrap_err(), "in total");
        assert_eq!(all.len(), MAX_TOTAL);
        assert_eq!(gate.out.lock().unwrap().len(), MAX_TOTAL, "a refused source is not remembered");
    }

    #[test]
    fn addresses_of_one_ipv6_network_and_mapped_ones_count_as_one_source() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        assert_eq!(site(ip("2001:db8::1")), site(ip("2001:db8::ffff:1")));
        assert_ne!(site(ip("2001:db8:0:1::1")), site(ip("2001:db8:0:2::1")));
        assert_eq!(site(ip("::ffff:192.0.2.1")), v4(1));
    }
}
