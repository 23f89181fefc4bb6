//! How the hosts of a lab are connected: which are public, which are behind a router, and what their links are like.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::impairment::Impairment;
use crate::quantity::Span;
use crate::state::check_name;

/// A topology. Hosts that it does not name are on the public underlay, with both families and nothing in between.
///
/// ```
/// use mesh_lab::{Behaviour, Nat, Place, Router, Topology};
/// let symmetric = Nat::new(Behaviour::AddressAndPortDependent, Behaviour::AddressAndPortDependent);
/// let topology = Topology::default()
///     .router("office", Router::nat(symmetric))
///     .host("h1", Place::behind("office"))
///     .host("h2", Place::ipv6_only());
/// assert_eq!(topology.hosts_named(), 2);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Topology {
    /// Routers by name, as `[router.NAME]`.
    #[serde(default, rename = "router")]
    pub routers: BTreeMap<String, Router>,
    /// Where hosts are, as `[host.hN]`.
    #[serde(default, rename = "host")]
    pub hosts: BTreeMap<String, Place>,
    /// What links are like from the start, as `[[link]]`.
    #[serde(default, rename = "link")]
    pub links: Vec<Link>,
    /// Where the chances of links come from: the same packets at the same times have the same fates.
    #[serde(default)]
    pub seed: u64,
}

/// Where a host is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Place {
    /// The router it is behind; without one it is on the public underlay.
    #[serde(default)]
    pub behind: Option<String>,
    /// Which addresses it has, of those that there are in its place.
    #[serde(default)]
    pub families: Families,
}

/// The families of a host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Families {
    /// All that there are in its place.
    #[default]
    Both,
    /// IPv4 only.
    Ipv4,
    /// IPv6 only.
    Ipv6,
}

/// A router between a few hosts (or other routers) and the rest. It lets only answers in.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Router {
    /// The router it is behind itself; without one it is on the public underlay.
    #[serde(default)]
    pub behind: Option<String>,
    /// Translation of IPv4 addresses. Without it the hosts behind have public ones.
    #[serde(default)]
    pub nat: Option<Nat>,
    /// Whether there is IPv6 behind it, with public addresses. Unless said: only without translation.
    #[serde(default)]
    pub ipv6: Option<bool>,
    /// What it lets out.
    #[serde(default)]
    pub out: Out,
}

/// What a router lets out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Out {
    /// Everything.
    #[default]
    All,
    /// UDP only. All else is refused: TCP by a reset, the rest by ICMP.
    Udp,
    /// TCP only. All else is refused by ICMP.
    Tcp,
}

/// How UDP over IPv4 is translated, in the words of RFC 4787. Other protocols keep to the mapping of their
/// connection, and let in only its answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nat {
    /// For which destinations a host's port keeps its outside port. An outside port never equals the inside one but
    /// by chance; they are counted up from 20000.
    pub mapping: Behaviour,
    /// Who may send to an outside port.
    pub filtering: Behaviour,
    /// How long a mapping without packets in either direction lasts; whole seconds, 1 s to 10 m.
    #[serde(default = "Nat::default_timeout")]
    pub timeout: Span,
    /// Whether hosts behind it reach each other by their outside ports. The source is then the outside one as well,
    /// and the filter asks about it as about any other.
    #[serde(default)]
    pub hairpin: bool,
}

/// What mapping or filtering depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Behaviour {
    /// On nothing but the host's own address and port.
    EndpointIndependent,
    /// On the address of the other end as well.
    AddressDependent,
    /// On its address and port.
    AddressAndPortDependent,
}

/// What a link is like from the start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Link {
    /// Two hosts.
    pub between: [String; 2],
    /// Only from the first to the second.
    #[serde(default)]
    pub one_way: bool,
    /// What happens to the packets, as `with = { delay = "40ms" }`.
    #[serde(rename = "with")]
    pub impairment: Impairment,
}

impl Behaviour {
    /// All three, the most permissive first.
    pub const ALL: [Self; 3] =
        [Self::EndpointIndependent, Self::AddressDependent, Self::AddressAndPortDependent];
}

impl Nat {
    /// Mappings that last for two minutes, the least that RFC 4787 allows, and no hairpinning.
    #[must_use]
    pub fn new(mapping: Behaviour, filtering: Behaviour) -> Self {
        Self { mapping, filtering, timeout: Self::default_timeout(), hairpin: false }
    }

    fn default_timeout() -> Span {
        Span(std::time::Duration::from_secs(120))
    }
}

impl Place {
    /// On the public underlay, with both families.
    #[must_use]
    pub fn public() -> Self {
        Self::default()
    }

    /// Behind a router, with the families that there are.
    #[must_use]
    pub fn behind(router: &str) -> Self {
        Self { behind: Some(router.to_owned()), ..Self::default() }
    }

    /// On the public underlay, without IPv6.
    #[must_use]
    pub fn ipv4_only() -> Self {
        Self { families: Families::Ipv4, ..Self::default() }
    }

    /// On the public underlay, without IPv4.
    #[must_use]
    pub fn ipv6_only() -> Self {
        Self { families: Families::Ipv6, ..Self::default() }
    }
}

impl Router {
    /// Translates IPv4; there is no IPv6 behind it.
    #[must_use]
    pub fn nat(nat: Nat) -> Self {
        Self { nat: Some(nat), ..Self::default() }
    }

    /// A firewall: public addresses of both families behind it, and only answers come in.
    #[must_use]
    pub fn firewall() -> Self {
        Self::default()
    }

    /// Behind another router.
    #[must_use]
    pub fn behind(self, router: &str) -> Self {
        Self { behind: Some(router.to_owned()), ..self }
    }

    /// With or without IPv6.
    #[must_use]
    pub fn with_ipv6(self, ipv6: bool) -> Self {
        Self { ipv6: Some(ipv6), ..self }
    }

    /// Lets out only this.
    #[must_use]
    pub fn lets_out(self, out: Out) -> Self {
        Self { out, ..self }
    }

    /// Whether there is IPv6 behind it.
    #[must_use]
    pub fn has_ipv6(&self) -> bool {
        self.ipv6.unwrap_or(self.nat.is_none())
    }
}

impl Topology {
    /// Adds a router.
    #[must_use]
    pub fn router(mut self, name: &str, router: Router) -> Self {
        self.routers.insert(name.to_owned(), router);
        self
    }

    /// Says where a host is.
    #[must_use]
    pub fn host(mut self, name: &str, place: Place) -> Self {
        self.hosts.insert(name.to_owned(), place);
        self
    }

    /// Says what the link between two hosts is like, in both directions.
    #[must_use]
    pub fn link(mut self, a: &str, b: &str, impairment: Impairment) -> Self {
        self.links.push(Link { between: [a.to_owned(), b.to_owned()], one_way: false, impairment });
        self
    }

    /// The highest number of a host that it names, 0 when it names none: a lab has at least so many.
    #[must_use]
    pub fn hosts_named(&self) -> usize {
        let linked = self.links.iter().flat_map(|link| &link.between);
        self.hosts.keys().chain(linked).filter_map(|name| host_number(name)).max().map_or(0, usize::from)
    }

    /// Reads a topology file (TOML).
    ///
    /// # Errors
    /// When the file cannot be read or something in it is wrong; the error says what and where.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        let topology: Self = toml::from_str(&text).map_err(|error| {
            anyhow::anyhow!("{} is not a topology: {}", path.display(), error.to_string().trim_end())
        })?;
        topology.check().with_context(|| format!("in {}", path.display()))?;
        Ok(topology)
    }

    /// Finds what the types cannot say.
    pub(crate) fn check(&self) -> Result<()> {
        for (name, router) in &self.routers {
            check_name("router", name)?;
            self.check_router(name, router).with_context(|| format!("router {name:?}"))?;
        }
        for (name, place) in &self.hosts {
            host_number(name).with_context(|| {
                format!("{name:?} is no host: hosts are called h1, h2 and so on, up to h253")
            })?;
            self.check_place(place).with_context(|| format!("host {name:?}"))?;
        }
        for link in &self.links {
            let [a, b] = &link.between;
            for name in [a, b] {
                host_number(name).with_context(|| {
                    format!("link between {a:?} and {b:?}: {name:?} is no host such as h1")
                })?;
            }
            ensure!(a != b, "link between {a:?} and itself");
            link.impairment.check().with_context(|| format!("link between {a:?} and {b:?}"))?;
        }
        Ok(())
    }

    fn check_router(&self, name: &str, router: &Router) -> Result<()> {
        let mut above = Vec::from([name]);
        let mut next = router.behind.as_deref();
        while let Some(upper) = next {
            ensure!(!above.contains(&upper), "it is behind itself: {} > {upper}", above.join(" > "));
            above.push(upper);
            next = self.router_named(upper)?.behind.as_deref();
        }
        if router.has_ipv6()
            && let Some(upper) = &router.behind
        {
            let what =
                if router.ipv6.is_some() { "`ipv6 = true`" } else { "IPv6 (`ipv6 = false` turns it off)" };
            ensure!(
                self.router_named(upper)?.has_ipv6(),
                "it has {what}, but {upper:?}, which it is behind, has none"
            );
        }
        if let Some(nat) = router.nat {
            let timeout = nat.timeout.0;
            ensure!(
                timeout.subsec_nanos() == 0 && (1..=600).contains(&timeout.as_secs()),
                "`timeout` is {}, and not in whole seconds between 1s and 10m",
                nat.timeout
            );
        }
        Ok(())
    }

    fn check_place(&self, place: &Place) -> Result<()> {
        let Some(router) = &place.behind else { return Ok(()) };
        let ipv6 = self.router_named(router)?.has_ipv6();
        if place.families == Families::Ipv6 && !ipv6 {
            bail!("it has IPv6 only, but there is none behind {router:?} (`ipv6 = true` there turns it on)");
        }
        Ok(())
    }

    fn router_named(&self, name: &str) -> Result<&Router> {
        let known = || match self.routers.len() {
            0 => "there are none".to_owned(),
            _ => format!("there are: {}", self.routers.keys().cloned().collect::<Vec<_>>().join(", ")),
        };
        self.routers.get(name).with_context(|| format!("`behind` names no router {name:?}; {}", known()))
    }
}

/// The number of a host by its name: 7 of `h7`.
pub(crate) fn host_number(name: &str) -> Option<u8> {
    let figures = name.strip_prefix('h').filter(|figures| !figures.starts_with(['0', '+']))?;
    figures.parse().ok().filter(|number| (1..=253).contains(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Topology> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.toml");
        fs::write(&path, text).unwrap();
        Topology::read(&path)
    }

    #[test]
    fn a_file_says_what_the_builders_say() {
        let file = parse(
            r#"
            [router.carrier]
            nat = { mapping = "endpoint-independent", filtering = "address-dependent", timeout = "30s", hairpin = true }
            [router.home]
            behind = "carrier"
            nat = { mapping = "address-and-port-dependent", filtering = "address-and-port-dependent" }
            [router.strict]
            out = "udp"
            [host.h1]
            behind = "home"
            [host.h3]
            families = "ipv6"
            [[link]]
            between = ["h1", "h4"]
            with = { delay = "40ms", loss = "1%" }
            "#,
        );
        use Behaviour::{AddressAndPortDependent, AddressDependent, EndpointIndependent};
        let carrier = Nat {
            timeout: "30s".parse().unwrap(),
            hairpin: true,
            ..Nat::new(EndpointIndependent, AddressDependent)
        };
        let built = Topology::default()
            .router("carrier", Router::nat(carrier))
            .router(
                "home",
                Router::nat(Nat::new(AddressAndPortDependent, AddressAndPortDependent)).behind("carrier"),
            )
            .router("strict", Router::firewall().lets_out(Out::Udp))
            .host("h1", Place::behind("home"))
            .host("h3", Place::ipv6_only())
            .link(
                "h1",
                "h4",
                Impairment {
                    delay: "40ms".parse().unwrap(),
                    loss: "1%".parse().unwrap(),
                    ..Impairment::default()
                },
            );
        assert_eq!(file.unwrap(), built);
        assert_eq!(built.hosts_named(), 4);
        let text = serde_json::to_string(&built).unwrap();
        assert_eq!(serde_json::from_str::<Topology>(&text).unwrap(), built);
    }

    #[test]
    fn the_example_of_the_documentation_is_right() {
        let document = include_str!("../../../docs/lab.md");
        let (_, rest) = document.split_once("```toml\n").unwrap();
        let topology = parse(rest.split_once("```").unwrap().0).unwrap();
        assert_eq!((topology.hosts_named(), topology.routers.len(), topology.links.len()), (7, 5, 2));
    }

    #[test]
    fn mistakes_are_named() {
        for (text, words) in [
            ("[hosts.h1]", &["hosts", "host"][..]),
            ("[host.h1]\nbehnid = 'x'", &["behnid", "behind", "line 2"]),
            ("[host.h1]\nbehind = 'x'", &["h1", "behind", "\"x\"", "there are none"]),
            ("[host.web]", &["\"web\"", "h1, h2"]),
            ("[host.h254]", &["h253"]),
            ("[host.h01]", &["h253"]),
            ("[router.a]\nnat = { mapping = 'symmetric' }", &["symmetric", "address-and-port-dependent"]),
            ("[router.a]\nnat = { mapping = 'address-dependent' }", &["filtering"]),
            ("[router.a]\nbehind = 'b'\n[router.b]\nbehind = 'a'", &["behind itself", "a > b"]),
            ("[router.'A b']", &["\"A b\"", "lower-case"]),
            (
                "[router.n]\nnat = { mapping = 'address-dependent', filtering = 'address-dependent' }\n\
                 [router.f]\nbehind = 'n'",
                &["\"f\"", "ipv6 = false", "\"n\""],
            ),
            (
                "[router.n]\nnat = { mapping = 'address-dependent', filtering = 'address-dependent' }\n\
                 [host.h1]\nbehind = 'n'\nfamilies = 'ipv6'",
                &["h1", "ipv6 = true"],
            ),
            (
                "[router.n]\nnat = { mapping = 'address-dependent', filtering = 'address-dependent', timeout = 30 }",
                &["timeout", "string"],
            ),
            (
                "[router.n]\nnat = { mapping = 'address-dependent', filtering = 'address-dependent', timeout = '30' }",
                &["timeout", "40ms"],
            ),
            (
                "[router.n]\nnat = { mapping = 'address-dependent', filtering = 'address-dependent', timeout = '1500ms' }",
                &["timeout", "whole seconds"],
            ),
            ("[[link]]\nbetween = ['h1', 'h1']\nwith = {}", &["itself"]),
            ("[[link]]\nbetween = ['h1', 'x']\nwith = {}", &["\"x\""]),
            ("[[link]]\nbetween = ['h1', 'h2']\nwith = { loss = '2' }", &["loss", "1%"]),
            ("[[link]]\nbetween = ['h1', 'h2']\nwith = { too_big = true }", &["too_big", "mtu"]),
        ] {
            let error = format!("{:#}", parse(text).expect_err(text));
            for word in words {
                assert!(error.contains(word), "{text}\n{word:?} is not in: {error}");
            }
        }
    }
}
