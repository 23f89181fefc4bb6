//! `meshctl lab link` and `meshctl lab links`.

use std::io::Write;
use std::str::FromStr;

use anyhow::{Error, Result, ensure};
use comfy_table::{Table, presets};

use crate::impairment::Impairment;
use crate::lab::Lab;
use crate::quantity::{Rate, Share, Span};

/// What to change on a link. What is not said stays as it is.
#[derive(Clone, Debug, clap::Args)]
pub struct LinkArgs {
    /// Name of the lab
    #[arg(long, default_value = "default")]
    name: String,
    /// A host, such as h1
    a: String,
    /// Another host
    b: String,
    /// Only from A to B; without it both directions
    #[arg(long)]
    one_way: bool,
    /// Undo everything first
    #[arg(long)]
    clear: bool,
    /// How long each packet is on its way, such as 40ms
    #[arg(long, value_name = "TIME")]
    delay: Option<Span>,
    /// By how much the delay differs at most, up and down
    #[arg(long, value_name = "TIME")]
    jitter: Option<Span>,
    /// How many packets are lost, such as 1%
    #[arg(long, value_name = "SHARE")]
    loss: Option<Share>,
    /// How many packets arrive twice
    #[arg(long, alias = "dup", value_name = "SHARE")]
    duplicate: Option<Share>,
    /// How many packets overtake those before them; needs a delay
    #[arg(long, value_name = "SHARE")]
    reorder: Option<Share>,
    /// Bits per second, such as 10mbit, or "none"
    #[arg(long, value_name = "RATE")]
    rate: Option<OrNone<Rate>>,
    /// The longest IP packet that passes, in bytes (576 to 1500), or "none"; longer ones vanish
    #[arg(long, value_name = "BYTES")]
    mtu: Option<OrNone<u16>>,
    /// Answer packets that are too long as a router does, rather than let them vanish
    #[arg(long)]
    too_big: bool,
    /// Let nothing through
    #[arg(long, conflicts_with = "heal")]
    cut: bool,
    /// End a cut
    #[arg(long)]
    heal: bool,
}

/// A value, or the word `none`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct OrNone<T>(Option<T>);

impl<T: FromStr<Err: Into<Error>>> FromStr for OrNone<T> {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Ok(Self(if text == "none" { None } else { Some(text.parse().map_err(Into::into)?) }))
    }
}

impl LinkArgs {
    /// What a direction is like afterwards.
    fn applied_to(&self, before: Impairment) -> Impairment {
        let before = if self.clear { Impairment::NONE } else { before };
        let mtu = self.mtu.map_or(before.mtu, |mtu| mtu.0);
        Impairment {
            cut: (before.cut || self.cut) && !self.heal,
            delay: self.delay.unwrap_or(before.delay),
            jitter: self.jitter.unwrap_or(before.jitter),
            loss: self.loss.unwrap_or(before.loss),
            duplicate: self.duplicate.unwrap_or(before.duplicate),
            reorder: self.reorder.unwrap_or(before.reorder),
            rate: self.rate.map_or(before.rate, |rate| rate.0),
            mtu,
            // A new length says anew whether there is an answer.
            too_big: self.too_big || (before.too_big && self.mtu.is_none()),
        }
    }
}

/// Changes a link, if anything is to be changed, and says what it is like.
pub(crate) fn link(args: &LinkArgs, out: &mut impl Write) -> Result<()> {
    let lab = Lab::open(&args.name)?;
    let (a, b) = (lab.host_named(&args.a)?, lab.host_named(&args.b)?);
    ensure!(a.number() != b.number(), "a link is between two hosts");
    let mut ways = vec![(&a, &b)];
    if !args.one_way {
        ways.push((&b, &a));
    }
    // All are tried before the first is changed.
    let planned: Vec<_> = ways
        .iter()
        .map(|(from, to)| (lab.impairment(from, to), args.applied_to(lab.impairment(from, to))))
        .collect();
    planned.iter().try_for_each(|(_, after)| after.check())?;
    for ((from, to), (before, after)) in ways.iter().zip(planned) {
        if before != after {
            lab.impair_one_way(from, to, after)?;
        }
        writeln!(out, "{} > {}: {after}", from.name(), to.name())?;
    }
    Ok(())
}

/// Lists all links that are not as they should be.
pub(crate) fn links(lab: &Lab, out: &mut impl Write) -> Result<()> {
    let links = lab.links();
    if links.is_empty() {
        writeln!(out, "nothing happens to any packet")?;
        return Ok(());
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(["FROM", "TO", "WHAT HAPPENS"]);
    for link in links {
        let broken = if link.broken {
            "nothing passes: its process has died; set the link again. It was: "
        } else {
            ""
        };
        table.add_row([link.from, link.to, format!("{broken}{}", link.impairment)]);
    }
    writeln!(out, "{table}")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        link: LinkArgs,
    }

    fn apply(words: &str, before: Impairment) -> Impairment {
        let words = ["link", "h1", "h2"].into_iter().chain(words.split_whitespace());
        Cli::try_parse_from(words).unwrap().link.applied_to(before)
    }

    #[test]
    fn what_is_not_said_stays() {
        let first = apply(
            "--delay 40ms --jitter 5ms --loss 1% --dup 2% --reorder 3% --rate 10mbit --mtu 1300 --too-big",
            Impairment::NONE,
        );
        assert_eq!(
            first.to_string(),
            "delay 40ms, jitter 5ms, loss 1%, duplicate 2%, reorder 3%, rate 10mbit, mtu 1300 (told)"
        );
        assert_eq!(apply("", first), first);
        assert_eq!(apply("--cut", first), Impairment { cut: true, ..first });
        assert_eq!(apply("--heal", apply("--cut", first)), first);
        assert!(!apply("--mtu 1280", first).too_big && apply("--mtu 1280 --too-big", first).too_big);
        assert_eq!(
            apply("--mtu none --rate none", first).to_string(),
            "delay 40ms, jitter 5ms, loss 1%, duplicate 2%, reorder 3%"
        );
        assert_eq!(apply("--clear", first), Impairment::NONE);
        assert_eq!(apply("--clear --loss 5%", first).to_string(), "loss 5%");
        assert_eq!(apply("--delay 0s --jitter 0s --reorder 0% --dup 0%", first).delay, Span::default());
        assert!(Cli::try_parse_from(["link", "h1", "h2", "--cut", "--heal"]).is_err());
        let error = Cli::try_parse_from(["link", "h1", "h2", "--delay", "40"]).err().unwrap().to_string();
        assert!(error.contains("40ms"), "{error}");
    }
}
