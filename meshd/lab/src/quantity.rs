//! Quantities as people write them in topology files and on the command line.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Error, Result, bail, ensure};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A length of time: `200us`, `40ms`, `1.5s`, `2m`. At most an hour.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(pub Duration);

/// A probability in millionths, from 0 to 1,000,000; written `0.5%`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Share(u32);

/// Bits per second, counted over whole Ethernet frames; written `500kbit`, `10mbit`, `1gbit`. Never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rate(u64);

/// The longest [`Span`].
const LONGEST: Duration = Duration::from_secs(3600);

/// The lowest [`Rate`], in bits per second: a full frame takes three seconds.
const SLOWEST: u64 = 4_000;

const MILLION: u32 = 1_000_000;

impl Share {
    /// Never.
    pub const NONE: Self = Self(0);
    /// Always.
    pub const ALL: Self = Self(MILLION);

    /// So many of a hundred.
    ///
    /// # Panics
    /// When it is more than 100.
    #[must_use]
    pub fn percent(percent: u32) -> Self {
        assert!(percent <= 100, "{percent}% is more than all");
        Self(percent * (MILLION / 100))
    }

    /// Whether one of evenly distributed random numbers is within the share.
    pub(crate) fn takes(self, random: u64) -> bool {
        // The high half of the product is the random number scaled to a million.
        let scaled = (u128::from(random) * u128::from(MILLION)) >> 64;
        scaled < u128::from(self.0)
    }
}

impl Rate {
    /// So many bits in a second; less than 4,000 is raised to that.
    #[must_use]
    pub fn bits_per_second(bits: u64) -> Self {
        Self(bits.max(SLOWEST))
    }

    /// How long so many bytes take.
    pub(crate) fn time_for(self, bytes: usize) -> Duration {
        let nanos = (bytes as u128 * 8 * 1_000_000_000).div_ceil(u128::from(self.0));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

/// The number and the unit of `12.5ms`.
fn split(text: &str) -> Result<(f64, &str)> {
    let at = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    Ok((number.parse().with_context(|| format!("{text:?} does not begin with a number"))?, unit.trim()))
}

impl FromStr for Span {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (number, unit) = split(text)?;
        let unit = match unit {
            "us" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "" if number == 0.0 => 1.0,
            _ => bail!("{text:?} is no length of time: write \"200us\", \"40ms\", \"1.5s\" or \"2m\""),
        };
        let span = Duration::try_from_secs_f64(number * unit).ok().filter(|span| *span <= LONGEST);
        Ok(Self(span.with_context(|| format!("{text:?} is longer than an hour"))?))
    }
}

impl FromStr for Share {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (number, unit) = split(text)?;
        ensure!(unit == "%" || number == 0.0, "{text:?} is no share: write \"1%\" or \"0.05%\"");
        ensure!(number <= 100.0, "{text:?} is more than all");
        // Within 0 to a million by the check above.
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked to be in range")]
        Ok(Self((number * f64::from(MILLION / 100)).round() as u32))
    }
}

impl FromStr for Rate {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (number, unit) = split(text)?;
        let unit = match unit {
            "kbit" => 1e3,
            "mbit" => 1e6,
            "gbit" => 1e9,
            _ => bail!("{text:?} is no rate: write \"500kbit\", \"10mbit\" or \"1gbit\" (per second)"),
        };
        let bits = number * unit;
        ensure!((4e3..=1e12).contains(&bits), "rate {text:?} is not between 4kbit and 1000gbit");
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked to be in range")]
        Ok(Self(bits.round() as u64))
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let micros = self.0.as_micros();
        match micros {
            0 => f.write_str("0s"),
            _ if micros.is_multiple_of(60_000_000) => write!(f, "{}m", micros / 60_000_000),
            _ if micros.is_multiple_of(1_000_000) => write!(f, "{}s", micros / 1_000_000),
            _ if micros.is_multiple_of(1_000) => write!(f, "{}ms", micros / 1_000),
            _ => write!(f, "{micros}us"),
        }
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", f64::from(self.0) / f64::from(MILLION / 100))
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (divisor, unit) = match self.0 {
            bits if bits.is_multiple_of(1_000_000_000) => (1_000_000_000, "gbit"),
            bits if bits.is_multiple_of(1_000_000) => (1_000_000, "mbit"),
            _ => (1_000, "kbit"),
        };
        write!(f, "{}{unit}", self.0 as f64 / f64::from(divisor))
    }
}

/// Strings in files, so that a number without a unit is refused.
macro_rules! as_text {
    ($($kind:ty),*) => {$(
        impl Serialize for $kind {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $kind {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(|error| D::Error::custom(format!("{error:#}")))
            }
        }
    )*};
}

as_text!(Span, Share, Rate);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_is_read_again() {
        for text in ["0s", "200us", "40ms", "1500ms", "2s", "3m"] {
            assert_eq!(text.parse::<Span>().unwrap().to_string(), text);
        }
        for text in ["0%", "0.05%", "1%", "12.5%", "100%"] {
            assert_eq!(text.parse::<Share>().unwrap().to_string(), text);
        }
        for text in ["4kbit", "64.5kbit", "10mbit", "1500kbit", "1gbit"] {
            assert_eq!(
                text.parse::<Rate>().unwrap().to_string().parse::<Rate>().unwrap(),
                text.parse().unwrap()
            );
        }
        assert_eq!("1.5s".parse::<Span>().unwrap().0, Duration::from_millis(1500));
    }

    #[test]
    fn a_missing_or_wrong_unit_is_told() {
        for (text, word) in
            [("40", "40ms"), ("x", "number"), ("40 parsec", "40ms"), ("61m", "hour"), ("1e9s", "40ms")]
        {
            let error = format!("{:#}", text.parse::<Span>().unwrap_err());
            assert!(error.contains(word), "{error}");
        }
        assert!("1".parse::<Share>().unwrap_err().to_string().contains("1%"));
        assert!("101%".parse::<Share>().is_err() && "-1%".parse::<Share>().is_err());
        assert!(
            "0mbit".parse::<Rate>().is_err()
                && "10".parse::<Rate>().is_err()
                && "10mb".parse::<Rate>().is_err()
        );
    }

    #[test]
    fn a_rate_gives_times() {
        assert_eq!("10mbit".parse::<Rate>().unwrap().time_for(1250), Duration::from_millis(1));
        assert_eq!("1gbit".parse::<Rate>().unwrap().time_for(1500), Duration::from_micros(12));
    }

    #[test]
    fn a_share_takes_its_part_of_all_random_numbers() {
        assert!(!Share::NONE.takes(0) && Share::ALL.takes(u64::MAX));
        let half = Share::percent(50);
        assert!(half.takes(u64::MAX / 2 - 1) && !half.takes(u64::MAX / 2 + 1));
    }
}
