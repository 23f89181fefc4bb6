//! The result of ADD: what it says, how each version of the specification writes it, and how it is merged
//! into the result of the plugins before this one.

use std::net::IpAddr;

use ipnet::IpNet;
use mesh_core::api::MacAddr;
use serde_json::{Map, Value, json};

use crate::error::CniError;
use crate::fields::Fields;
use crate::version::CniVersion;

/// A network interface in a result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its Ethernet address.
    pub mac: MacAddr,
    /// Its MTU in bytes; reported from 1.1.0 on.
    pub mtu: u32,
    /// The namespace it is in, as the runtime wrote it; none for one of the host.
    pub sandbox: Option<String>,
}

/// An address in a result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ip {
    /// Index into the interfaces of the same [`Attached`].
    pub interface: usize,
    /// Address and prefix length as configured.
    pub address: IpNet,
    /// The gateway of this family.
    pub gateway: IpAddr,
}

/// A route in a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// The destination.
    pub dst: IpNet,
    /// The next hop.
    pub gw: IpAddr,
}

/// Name resolution, passed on from the configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dns {
    /// Addresses of servers, most important first.
    pub nameservers: Vec<String>,
    /// The local domain.
    pub domain: String,
    /// Search list.
    pub search: Vec<String>,
    /// Options for the resolver.
    pub options: Vec<String>,
}

impl Dns {
    /// Whether it says nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    fn to_json(&self) -> Value {
        let mut map = Map::new();
        for (name, list) in
            [("nameservers", &self.nameservers), ("search", &self.search), ("options", &self.options)]
        {
            if !list.is_empty() {
                map.insert(name.to_owned(), json!(list));
            }
        }
        if !self.domain.is_empty() {
            map.insert("domain".to_owned(), json!(self.domain));
        }
        Value::Object(map)
    }
}

/// What one ADD made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// Every interface, in the order of the path out of the host: bridge, host's end, container's end.
    pub interfaces: Vec<Interface>,
    /// The addresses, IPv4 first.
    pub ips: Vec<Ip>,
    /// The routes.
    pub routes: Vec<Route>,
    /// Name resolution.
    pub dns: Option<Dns>,
}

impl Attached {
    /// The result document. What `prev` lists comes first and stays as it is; ours follows.
    pub fn to_json(&self, version: CniVersion, prev: Option<&PrevResult>) -> Value {
        let mut result = prev.map(|prev| prev.raw.clone()).unwrap_or_default();
        result.insert("cniVersion".to_owned(), json!(version.as_str()));
        let mut interfaces = taken(&mut result, "interfaces");
        let mut ips = taken(&mut result, "ips");
        let mut routes = taken(&mut result, "routes");
        for ip in &mut ips {
            set_family(ip, version);
        }
        let offset = interfaces.len();
        interfaces.extend(self.interfaces.iter().map(|interface| interface_json(interface, version)));
        ips.extend(self.ips.iter().map(|ip| {
            let mut value = json!({
                "interface": offset + ip.interface,
                "address": ip.address.to_string(),
                "gateway": ip.gateway.to_string(),
            });
            set_family(&mut value, version);
            value
        }));
        routes.extend(
            self.routes.iter().map(|route| json!({"dst": route.dst.to_string(), "gw": route.gw.to_string()})),
        );
        for (name, list) in [("interfaces", interfaces), ("ips", ips), ("routes", routes)] {
            result.insert(name.to_owned(), Value::Array(list));
        }
        let has_dns = result.get("dns").and_then(Value::as_object).is_some_and(|dns| !dns.is_empty());
        if let (Some(dns), false) = (&self.dns, has_dns) {
            result.insert("dns".to_owned(), dns.to_json());
        }
        Value::Object(result)
    }
}

fn taken(result: &mut Map<String, Value>, name: &str) -> Vec<Value> {
    match result.remove(name) {
        Some(Value::Array(list)) => list,
        // Parsing allowed nothing else but null and absence.
        Some(_) | None => Vec::new(),
    }
}

fn interface_json(interface: &Interface, version: CniVersion) -> Value {
    let mut value = json!({"name": interface.name, "mac": interface.mac.to_string()});
    if version >= CniVersion::V1_1_0 {
        value["mtu"] = json!(interface.mtu);
    }
    if let Some(sandbox) = &interface.sandbox {
        value["sandbox"] = json!(sandbox);
    }
    value
}

/// `ips[].version` was required until 0.4.0 and is gone since 1.0.0.
fn set_family(ip: &mut Value, version: CniVersion) {
    let Some(map) = ip.as_object_mut() else { return };
    if version >= CniVersion::V1_0_0 {
        map.remove("version");
        return;
    }
    let v6 = map.get("address").and_then(Value::as_str).is_some_and(|address| address.contains(':'));
    map.insert("version".to_owned(), json!(if v6 { "6" } else { "4" }));
}

/// The result of the plugins before this one, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct PrevResult {
    raw: Map<String, Value>,
    interfaces: Vec<PrevInterface>,
    ips: Vec<PrevIp>,
    routes: Vec<PrevRoute>,
}

/// An interface that an earlier result lists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrevInterface {
    /// Its name.
    pub name: String,
    /// Its Ethernet address, as written; may be empty.
    pub mac: String,
    /// The namespace it is in; empty for one of the host.
    pub sandbox: String,
}

/// An address that an earlier result lists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrevIp {
    /// Index into the interfaces.
    pub interface: Option<usize>,
    /// Address and prefix length.
    pub address: IpNet,
}

/// A route that an earlier result lists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrevRoute {
    /// The destination.
    pub dst: IpNet,
    /// The next hop.
    pub gw: Option<IpAddr>,
}

impl PrevResult {
    pub(crate) fn parse(fields: &Fields<'_>, version: CniVersion) -> Result<Self, CniError> {
        let written = match fields.text("cniVersion")? {
            Some(text) if !text.is_empty() => CniVersion::parse(text)?,
            Some(_) | None => version,
        };
        for old in ["ip4", "ip6"] {
            if fields.map().contains_key(old) {
                return Err(fields.invalid(old, format!("a result of CNI 0.2.0 inside one of {written}")));
            }
        }
        let interfaces = fields
            .objects("interfaces")?
            .iter()
            .map(|interface| {
                Ok(PrevInterface {
                    name: required(interface, "name")?.to_owned(),
                    mac: interface.text("mac")?.unwrap_or_default().to_owned(),
                    sandbox: interface.text("sandbox")?.unwrap_or_default().to_owned(),
                })
            })
            .collect::<Result<Vec<_>, CniError>>()?;
        let ips = fields
            .objects("ips")?
            .iter()
            .map(|ip| {
                let interface = ip.number("interface")?.map(usize::try_from);
                let interface = match interface {
                    None => None,
                    Some(Ok(index)) if index < interfaces.len() => Some(index),
                    Some(Ok(_) | Err(_)) => {
                        return Err(
                            ip.invalid("interface", format!("there are {} interfaces", interfaces.len()))
                        );
                    }
                };
                address(ip, "gateway")?;
                Ok(PrevIp { interface, address: network(ip, "address")? })
            })
            .collect::<Result<Vec<_>, CniError>>()?;
        let routes = fields
            .objects("routes")?
            .iter()
            .map(|route| Ok(PrevRoute { dst: network(route, "dst")?, gw: address(route, "gw")? }))
            .collect::<Result<Vec<_>, CniError>>()?;
        fields.object("dns")?;
        Ok(Self { raw: fields.map().clone(), interfaces, ips, routes })
    }

    /// The interface of this name in this namespace.
    pub fn container_interface(&self, name: &str, sandbox: &str) -> Option<(usize, &PrevInterface)> {
        self.interfaces
            .iter()
            .enumerate()
            .find(|(_, interface)| interface.name == name && interface.sandbox == sandbox)
    }

    /// The addresses listed for an interface.
    pub fn addresses_of(&self, interface: usize) -> impl Iterator<Item = IpNet> + '_ {
        self.ips.iter().filter(move |ip| ip.interface == Some(interface)).map(|ip| ip.address)
    }

    /// Whether a route is listed.
    pub fn lists_route(&self, dst: IpNet, gw: IpAddr) -> bool {
        self.routes.iter().any(|route| route.dst.trunc() == dst.trunc() && route.gw == Some(gw))
    }
}

fn required<'a>(fields: &Fields<'a>, name: &str) -> Result<&'a str, CniError> {
    match fields.text(name)? {
        Some(text) if !text.is_empty() => Ok(text),
        Some(_) | None => Err(fields.invalid(name, "missing")),
    }
}

fn network(fields: &Fields<'_>, name: &str) -> Result<IpNet, CniError> {
    required(fields, name)?
        .parse()
        .map_err(|_| fields.invalid(name, "expected an address with prefix length, such as 10.32.0.2/32"))
}

fn address(fields: &Fields<'_>, name: &str) -> Result<Option<IpAddr>, CniError> {
    match fields.text(name)? {
        None | Some("") => Ok(None),
        Some(text) => text.parse().map(Some).map_err(|_| fields.invalid(name, "expected an IP address")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;

    fn attached() -> Attached {
        let mac = |last| MacAddr([2, 0, 0, 0, 0, last]);
        let host =
            |name: &str, last| Interface { name: name.into(), mac: mac(last), mtu: 1420, sandbox: None };
        Attached {
            interfaces: vec![
                host("mesh0", 1),
                host("mv0123456789ab", 2),
                Interface { sandbox: Some("/run//netns/x".into()), ..host("eth0", 3) },
            ],
            ips: vec![
                Ip {
                    interface: 2,
                    address: "10.32.0.5/32".parse().unwrap(),
                    gateway: "10.32.0.1".parse().unwrap(),
                },
                Ip {
                    interface: 2,
                    address: "fd00::5/128".parse().unwrap(),
                    gateway: "fd00::1".parse().unwrap(),
                },
            ],
            routes: vec![
                Route { dst: "0.0.0.0/0".parse().unwrap(), gw: "10.32.0.1".parse().unwrap() },
                Route { dst: "::/0".parse().unwrap(), gw: "fd00::1".parse().unwrap() },
            ],
            dns: None,
        }
    }

    fn prev(value: &Value) -> Result<PrevResult, CniError> {
        let fields = Fields::new(value, "prevResult".into())?;
        PrevResult::parse(&fields, CniVersion::V1_0_0)
    }

    #[test]
    fn s043_s044_s048_each_version_has_its_own_shape() {
        for version in CniVersion::ALL {
            let result = attached().to_json(version, None);
            assert_eq!(result["cniVersion"], version.as_str());
            let old = version < CniVersion::V1_0_0;
            assert_eq!(result["ips"][0].get("version"), old.then_some(&json!("4")));
            assert_eq!(result["ips"][1].get("version"), old.then_some(&json!("6")));
            let mtu = (version == CniVersion::V1_1_0).then_some(json!(1420));
            for interface in result["interfaces"].as_array().unwrap() {
                assert_eq!(interface.get("mtu"), mtu.as_ref());
            }
        }
    }

    #[test]
    fn s045_s046_s049_s050_s051_interfaces_and_indexes() {
        let result = attached().to_json(CniVersion::V1_1_0, None);
        assert_eq!(result["interfaces"][2]["sandbox"], "/run//netns/x", "byte for byte");
        assert!(result["interfaces"][1].get("sandbox").is_none());
        for ip in result["ips"].as_array().unwrap() {
            assert_eq!(ip["interface"], 2);
        }
        assert_eq!(result["ips"][0]["address"], "10.32.0.5/32", "IPv4 first");
        assert_eq!(result["routes"][1], json!({"dst": "::/0", "gw": "fd00::1"}));
    }

    #[test]
    fn s053_dns_of_the_configuration_is_passed_on() {
        let mut own = attached();
        assert!(own.to_json(CniVersion::V1_0_0, None).get("dns").is_none());
        own.dns = Some(Dns { nameservers: vec!["10.0.0.10".into()], domain: "x".into(), ..Dns::default() });
        let result = own.to_json(CniVersion::V1_0_0, None);
        assert_eq!(result["dns"], json!({"nameservers": ["10.0.0.10"], "domain": "x"}));
    }

    #[test]
    fn s054_s055_a_previous_result_stays_in_front_and_is_kept() {
        let before = json!({
            "cniVersion": "0.4.0",
            "interfaces": [{"name": "dummy0", "mac": "02:00:00:00:00:09", "x": 1}],
            "ips": [{"version": "4", "address": "192.0.2.1/24", "interface": 0}],
            "routes": [{"dst": "192.0.2.0/24"}],
            "dns": {"nameservers": ["192.0.2.53"]},
            "vendor": {"kept": true},
        });
        let prev = prev(&before).unwrap();
        let mut own = attached();
        own.dns = Some(Dns { domain: "ours".into(), ..Dns::default() });
        let result = own.to_json(CniVersion::V1_0_0, Some(&prev));
        assert_eq!(result["interfaces"][0], before["interfaces"][0]);
        assert_eq!(result["interfaces"][3]["name"], "eth0");
        assert_eq!(
            result["ips"][0],
            json!({"address": "192.0.2.1/24", "interface": 0}),
            "in the requested shape"
        );
        assert_eq!(result["ips"][1]["interface"], 3, "our indexes move behind the earlier interfaces");
        assert_eq!(result["routes"][0], before["routes"][0]);
        assert_eq!(result["routes"].as_array().unwrap().len(), 3);
        assert_eq!(result["dns"], before["dns"], "the earlier plugin's resolver stays");
        assert_eq!(result["vendor"], before["vendor"]);
        assert_eq!(result["cniVersion"], "1.0.0");
    }

    #[test]
    fn s022_a_malformed_previous_result_is_refused_by_field() {
        for (value, field) in [
            (json!(3), "prevResult"),
            (json!({"interfaces": {}}), "prevResult.interfaces"),
            (json!({"interfaces": [{}]}), "prevResult.interfaces[0].name"),
            (json!({"ips": [{"address": "10.0.0.1"}]}), "prevResult.ips[0].address"),
            (json!({"ips": [{"address": "10.0.0.1/24", "interface": 0}]}), "prevResult.ips[0].interface"),
            (json!({"ips": [{"address": "10.0.0.1/24", "gateway": "x"}]}), "prevResult.ips[0].gateway"),
            (json!({"routes": [{"dst": "x"}]}), "prevResult.routes[0].dst"),
            (json!({"dns": []}), "prevResult.dns"),
            (json!({"ip4": {}}), "prevResult.ip4"),
        ] {
            let error = prev(&value).unwrap_err();
            assert_eq!(error.code(), Code::InvalidConfig);
            assert!(error.msg().contains(&format!("\"{field}\"")), "{field}: {error}");
        }
    }
}
