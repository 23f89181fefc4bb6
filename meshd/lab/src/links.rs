//! Changing the network of a lab that is up: cuts, impairments, addresses, mappings.

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use crate::forwarder;
use crate::host::Host;
use crate::impairment::Impairment;
use crate::lab::Lab;
use crate::network::{Network, Way};
use crate::plan::number_of;
use crate::process::ProcessRef;
use crate::router;
use crate::topology::{Link, Out};
use crate::underlay;

/// What happens to the packets from one host to another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkState {
    /// Name of the host that sends.
    pub from: String,
    /// Name of the host that receives.
    pub to: String,
    /// What happens on the way.
    pub impairment: Impairment,
    /// Whether the process that makes it happen has died: then nothing passes until the link is set again.
    pub broken: bool,
}

impl Lab {
    /// Drops everything between two hosts, both directions.
    ///
    /// # Errors
    /// When nftables refuses, or both hosts share an address with others ([`Lab::impair`]).
    pub fn cut(&self, a: &Host, b: &Host) -> Result<()> {
        self.cut_all(&both_ways(a, b), true)
    }

    /// Drops everything from one host to another.
    ///
    /// # Errors
    /// As [`Lab::cut`].
    pub fn cut_one_way(&self, from: &Host, to: &Host) -> Result<()> {
        self.cut_all(&[(from.number(), to.number())], true)
    }

    /// Ends cuts between two hosts, in both directions. Other impairments stay.
    ///
    /// # Errors
    /// When nftables refuses.
    pub fn heal(&self, a: &Host, b: &Host) -> Result<()> {
        self.cut_all(&both_ways(a, b), false)
    }

    /// Drops everything between hosts of different groups, all pairs at the same moment.
    ///
    /// # Errors
    /// As [`Lab::cut`].
    pub fn cut_groups(&self, groups: &[&[Host]]) -> Result<()> {
        let mut ways = Vec::new();
        for (number, group) in groups.iter().enumerate() {
            for other in &groups[number + 1..] {
                ways.extend(group.iter().flat_map(|a| other.iter().flat_map(|b| both_ways(a, b))));
            }
        }
        self.cut_all(&ways, true)
    }

    /// Ends all cuts. Other impairments stay.
    ///
    /// # Errors
    /// When nftables refuses.
    pub fn heal_all(&self) -> Result<()> {
        self.change_links(|network| {
            network.ways.iter_mut().for_each(|way| way.impairment.cut = false);
            Ok(())
        })
    }

    fn cut_all(&self, ways: &[(u8, u8)], cut: bool) -> Result<()> {
        self.change_links(|network| {
            for (from, to) in ways {
                network.impair(*from, *to, |impairment| impairment.cut = cut);
            }
            Ok(())
        })
    }

    /// Says what happens to all packets between two hosts, in both directions, instead of what happened to them before:
    /// [`Impairment::NONE`] ends everything.
    ///
    /// Between hosts of one segment frames of every kind are meant, else packets by the addresses with which one host
    /// sees the other. Packets that go through a third host, or that two hosts behind one NAT send to their outside
    /// address, are not meant.
    ///
    /// # Errors
    /// When the impairment makes no sense, or the hosts are behind two NATs each of which has other hosts behind it as
    /// well: then nothing tells their packets from those of the others.
    pub fn impair(&self, a: &Host, b: &Host, impairment: Impairment) -> Result<()> {
        self.impair_all(&both_ways(a, b), impairment)
    }

    /// Says what happens to all packets from one host to another.
    ///
    /// # Errors
    /// As [`Lab::impair`].
    pub fn impair_one_way(&self, from: &Host, to: &Host, impairment: Impairment) -> Result<()> {
        self.impair_all(&[(from.number(), to.number())], impairment)
    }

    fn impair_all(&self, ways: &[(u8, u8)], impairment: Impairment) -> Result<()> {
        impairment.check()?;
        self.change_links(|network| {
            for (from, to) in ways {
                network.impair(*from, *to, |known| *known = impairment);
            }
            Ok(())
        })
    }

    /// What happens to packets from one host to another, also when another process has said so.
    #[must_use]
    pub fn impairment(&self, from: &Host, to: &Host) -> Impairment {
        self.shared.network().impairment(from.number(), to.number())
    }

    /// All ways on which something happens to packets, in the order of their hosts.
    #[must_use]
    pub fn links(&self) -> Vec<LinkState> {
        let state = |way: Way| LinkState {
            from: format!("h{}", way.from),
            to: format!("h{}", way.to),
            impairment: way.impairment,
            broken: way.forwarder.is_some_and(|forwarder| !forwarder.process.is_alive()),
        };
        self.shared.network().ways.into_iter().map(state).collect()
    }

    /// Gives a host other addresses on the underlay, in both families, as a moving laptop gets them: the old ones are gone
    /// at once, connections from them with them. A host behind a router stays behind it.
    ///
    /// # Errors
    /// When no address is left, or a step fails.
    pub fn renumber(&self, host: &Host) -> Result<()> {
        let number = host.number();
        self.change_links(|network| {
            let before = network.clone();
            let figure = network.plan().free_figure().context("the underlay has no address left")?;
            network.figures.insert(number, figure);
            underlay::renumber(host.net(), before.plan(), network.plan(), number)
                .with_context(|| format!("renumbering {}", host.name()))
        })
    }

    /// Lets a router forget all mappings of IPv4, as when it is started anew: who sends again gets other outside ports.
    ///
    /// # Errors
    /// When there is no such router, or it does not translate.
    pub fn rebind(&self, router: &str) -> Result<()> {
        self.shared.change_network(|network| {
            let number = network.plan().router_number(router)?;
            ensure!(network.plan().router(number).nat.is_some(), "router {router:?} does not translate");
            let rebinds = network.rebinds.entry(number).or_default();
            *rebinds += 1;
            router::rebind(self.routers[usize::from(number) - 1].net(), *rebinds)
        })
    }

    /// Lets other things out of a router from now on. Connections that there are go on.
    ///
    /// # Errors
    /// When there is no such router, or nftables refuses.
    pub fn set_out(&self, router: &str, out: Out) -> Result<()> {
        self.shared.change_network(|network| {
            let number = network.plan().router_number(router)?;
            network.topology.routers.entry(router.to_owned()).and_modify(|router| router.out = out);
            router::let_out(self.routers[usize::from(number) - 1].net(), out)
        })
    }

    /// What the links are like from the start.
    pub(crate) fn set_first_links(&self, links: &[Link]) -> Result<()> {
        if links.is_empty() {
            return Ok(());
        }
        self.change_links(|network| {
            for link in links {
                let (a, b) = (number_of(&link.between[0])?, number_of(&link.between[1])?);
                network.impair(a, b, |impairment| *impairment = link.impairment);
                if !link.one_way {
                    network.impair(b, a, |impairment| *impairment = link.impairment);
                }
            }
            Ok(())
        })
    }

    /// Changes the network and puts it in force.
    fn change_links(&self, change: impl FnOnce(&mut Network) -> Result<()>) -> Result<()> {
        let mut before: Vec<ProcessRef> = Vec::new();
        self.shared.change_network(|network| {
            before.extend(network.forwarders());
            change(network)?;
            network.ways.retain(|way| way.impairment != Impairment::NONE);
            let started = self.start_forwarders(network)?;
            let done = underlay::rules(network).and_then(|rules| underlay::nft(self.switch.net(), &rules));
            if done.is_err() {
                forwarder::end(&started, Signal::SIGKILL);
            }
            done
        })?;
        // Nothing is sent to them any more; they deliver what they have.
        let used: Vec<ProcessRef> = self.shared.network().forwarders().collect();
        before.retain(|process| !used.contains(process));
        forwarder::end(&before, Signal::SIGTERM);
        Ok(())
    }
}

fn both_ways(a: &Host, b: &Host) -> [(u8, u8); 2] {
    [(a.number(), b.number()), (b.number(), a.number())]
}
