//! What happens to the packets of one direction of a link.

use std::fmt;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use crate::quantity::{Rate, Share, Span};

/// What happens to the packets from one host to another. By default nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Impairment {
    /// Nothing passes.
    pub cut: bool,
    /// How long each packet is on its way.
    pub delay: Span,
    /// Each packet's delay differs by up to so much, evenly, in both directions; at most `delay`. Packets keep their
    /// order all the same.
    pub jitter: Span,
    /// How many packets are lost, each by its own chance.
    pub loss: Share,
    /// How many packets arrive twice.
    pub duplicate: Share,
    /// How many packets overtake those before them: they are not delayed. Needs a `delay`.
    pub reorder: Share,
    /// Bits per second. What comes faster waits for up to 100 ms, and is lost beyond that.
    pub rate: Option<Rate>,
    /// The longest IP packet that passes, in bytes: 576 to 1500, for IPv6 to be of use 1280 at least. Longer ones are
    /// lost without a word, whatever their flags say.
    pub mtu: Option<u16>,
    /// With `mtu`: what is too long is answered with "packet too big" and "fragmentation needed", as a router
    /// does; IPv4 packets that may be cut into fragments are.
    pub too_big: bool,
}

impl Impairment {
    /// Nothing passes.
    pub const CUT: Self = Self { cut: true, ..Self::NONE };

    /// Everything passes untouched.
    pub const NONE: Self = Self {
        cut: false,
        delay: Span(std::time::Duration::ZERO),
        jitter: Span(std::time::Duration::ZERO),
        loss: Share::NONE,
        duplicate: Share::NONE,
        reorder: Share::NONE,
        rate: None,
        mtu: None,
        too_big: false,
    };

    /// Whether a packet has to go through a process of ours, rather than the kernel alone.
    pub(crate) fn needs_forwarder(&self) -> bool {
        Self { cut: false, ..*self } != Self::NONE
    }

    /// Finds combinations that make no sense.
    pub(crate) fn check(&self) -> Result<()> {
        ensure!(self.jitter <= self.delay, "`jitter` {} is more than `delay` {}", self.jitter, self.delay);
        ensure!(
            self.reorder == Share::NONE || self.delay > Span::default(),
            "`reorder` needs a `delay`: what is not delayed overtakes"
        );
        ensure!(!self.too_big || self.mtu.is_some(), "`too_big` needs an `mtu`");
        if let Some(mtu) = self.mtu {
            ensure!((576..=1500).contains(&mtu), "`mtu` {mtu} is not between 576 and 1500");
        }
        Ok(())
    }
}

impl fmt::Display for Impairment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut words = Vec::new();
        if self.cut {
            words.push("cut".to_owned());
        }
        for (name, span) in [("delay", self.delay), ("jitter", self.jitter)] {
            if span != Span::default() {
                words.push(format!("{name} {span}"));
            }
        }
        for (name, share) in [("loss", self.loss), ("duplicate", self.duplicate), ("reorder", self.reorder)] {
            if share != Share::NONE {
                words.push(format!("{name} {share}"));
            }
        }
        words.extend(self.rate.map(|rate| format!("rate {rate}")));
        words.extend(self.mtu.map(|mtu| format!("mtu {mtu}{}", if self.too_big { " (told)" } else { "" })));
        f.write_str(if words.is_empty() { "-" } else { "" })?;
        f.write_str(&words.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn senseless_combinations_are_refused() {
        let none = Impairment::NONE;
        assert_eq!(none, Impairment::default());
        let span = |text: &str| text.parse().unwrap();
        let one = Share::percent(1);
        for (bad, word) in [
            (Impairment { jitter: span("1ms"), ..none }, "jitter"),
            (Impairment { reorder: one, ..none }, "reorder"),
            (Impairment { too_big: true, ..none }, "too_big"),
            (Impairment { mtu: Some(575), ..none }, "mtu"),
            (Impairment { mtu: Some(1501), ..none }, "mtu"),
        ] {
            assert!(bad.check().unwrap_err().to_string().contains(word), "{bad:?}");
        }
        let good = Impairment { delay: span("2ms"), jitter: span("2ms"), reorder: one, ..none };
        good.check().unwrap();
        assert!(good.needs_forwarder() && !Impairment::CUT.needs_forwarder() && !none.needs_forwarder());
        assert_eq!(good.to_string(), "delay 2ms, jitter 2ms, reorder 1%");
        assert_eq!((none.to_string(), Impairment::CUT.to_string()), ("-".into(), "cut".into()));
    }
}
