//! Which peer owns which addresses: the cryptokey routing table.
//!
//! One compressed binary trie per family. A prefix has exactly one owner; the longest prefix that covers an address
//! decides.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// Owners of IPv4 and IPv6 prefixes.
#[derive(Debug)]
pub(crate) struct AllowedIps<T> {
    v4: Trie<u32, T>,
    v6: Trie<u128, T>,
}

impl<T> AllowedIps<T> {
    pub(crate) fn new() -> Self {
        Self { v4: Trie::new(), v6: Trie::new() }
    }

    /// Gives `prefix` to `owner` and returns who had it.
    pub(crate) fn insert(&mut self, prefix: IpNet, owner: T) -> Option<T> {
        match prefix.trunc() {
            IpNet::V4(net) => self.v4.insert(net.network().to_bits(), net.prefix_len(), owner),
            IpNet::V6(net) => self.v6.insert(net.network().to_bits(), net.prefix_len(), owner),
        }
    }

    /// Takes `prefix` away if its owner passes `whose`, and returns the owner.
    pub(crate) fn remove_if(&mut self, prefix: IpNet, whose: impl FnOnce(&T) -> bool) -> Option<T> {
        match prefix.trunc() {
            IpNet::V4(net) => self.v4.remove_if(net.network().to_bits(), net.prefix_len(), whose),
            IpNet::V6(net) => self.v6.remove_if(net.network().to_bits(), net.prefix_len(), whose),
        }
    }

    /// Takes away every prefix whose owner passes `whose`.
    pub(crate) fn remove_all(&mut self, whose: impl Fn(&T) -> bool) {
        let prefixes: Vec<IpNet> = self.iter().filter(|(_, owner)| whose(owner)).map(|(p, _)| p).collect();
        for prefix in prefixes {
            self.remove_if(prefix, |_| true);
        }
    }

    /// The owner of the longest prefix that covers `address`.
    pub(crate) fn lookup(&self, address: IpAddr) -> Option<&T> {
        match address {
            IpAddr::V4(address) => self.v4.lookup(address.to_bits()),
            IpAddr::V6(address) => self.v6.lookup(address.to_bits()),
        }
    }

    /// All prefixes with their owners, IPv4 first, in order of address.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (IpNet, &T)> {
        let v4 = self.v4.iter().filter_map(|(bits, length, owner)| {
            Some((IpNet::V4(Ipv4Net::new(Ipv4Addr::from_bits(bits), length).ok()?), owner))
        });
        let v6 = self.v6.iter().filter_map(|(bits, length, owner)| {
            Some((IpNet::V6(Ipv6Net::new(Ipv6Addr::from_bits(bits), length).ok()?), owner))
        });
        v4.chain(v6)
    }
}

/// An address as a string of bits, first bit first.
trait Bits: Copy + Eq {
    const WIDTH: u8;
    /// Bit number `at`, counted from the most significant; `at` is below [`Bits::WIDTH`].
    fn bit(self, at: u8) -> usize;
    /// How many leading bits both have in common.
    fn common(self, other: Self) -> u8;
    /// All bits from `length` on cleared.
    fn truncate(self, length: u8) -> Self;
}

macro_rules! bits {
    ($integer:ty) => {
        impl Bits for $integer {
            const WIDTH: u8 = <$integer>::BITS as u8;
            fn bit(self, at: u8) -> usize {
                (self >> (Self::WIDTH - 1 - at) & 1) as usize
            }
            fn common(self, other: Self) -> u8 {
                (self ^ other).leading_zeros() as u8
            }
            fn truncate(self, length: u8) -> Self {
                self & (!0 as $integer).checked_shl(u32::from(Self::WIDTH - length)).unwrap_or(0)
            }
        }
    };
}

bits!(u32);
bits!(u128);

/// No node.
const NONE: u32 = u32::MAX;

#[derive(Debug)]
struct Node<B, T> {
    bits: B,
    length: u8,
    owner: Option<T>,
    children: [u32; 2],
}

#[derive(Debug)]
struct Trie<B, T> {
    nodes: Vec<Node<B, T>>,
    free: Vec<u32>,
    root: u32,
}

/// Where the number of a node stands.
#[derive(Debug, Clone, Copy)]
enum Link {
    Root,
    Child(u32, usize),
}

impl<B: Bits, T> Trie<B, T> {
    fn new() -> Self {
        Self { nodes: Vec::new(), free: Vec::new(), root: NONE }
    }

    fn node(&self, index: u32) -> &Node<B, T> {
        &self.nodes[index as usize]
    }

    fn target(&self, link: Link) -> u32 {
        match link {
            Link::Root => self.root,
            Link::Child(parent, side) => self.node(parent).children[side],
        }
    }

    fn point(&mut self, link: Link, index: u32) {
        match link {
            Link::Root => self.root = index,
            Link::Child(parent, side) => self.nodes[parent as usize].children[side] = index,
        }
    }

    fn allocate(&mut self, node: Node<B, T>) -> u32 {
        if let Some(index) = self.free.pop() {
            self.nodes[index as usize] = node;
            return index;
        }
        // Four billion prefixes do not fit into memory.
        let index = u32::try_from(self.nodes.len()).unwrap_or(NONE);
        self.nodes.push(node);
        index
    }

    fn insert(&mut self, bits: B, length: u8, owner: T) -> Option<T> {
        let mut link = Link::Root;
        loop {
            let index = self.target(link);
            if index == NONE {
                let leaf = self.allocate(Node { bits, length, owner: Some(owner), children: [NONE; 2] });
                self.point(link, leaf);
                return None;
            }
            let node = self.node(index);
            let common = node.bits.common(bits).min(node.length).min(length);
            if common == node.length && common == length {
                return self.nodes[index as usize].owner.replace(owner);
            }
            if common == node.length {
                link = Link::Child(index, bits.bit(common));
                continue;
            }
            let old_side = node.bits.bit(common);
            let mut children = [NONE; 2];
            children[old_side] = index;
            let above = if common == length {
                self.allocate(Node { bits, length, owner: Some(owner), children })
            } else {
                children[1 - old_side] =
                    self.allocate(Node { bits, length, owner: Some(owner), children: [NONE; 2] });
                self.allocate(Node { bits: bits.truncate(common), length: common, owner: None, children })
            };
            self.point(link, above);
            return None;
        }
    }

    fn remove_if(&mut self, bits: B, length: u8, whose: impl FnOnce(&T) -> bool) -> Option<T> {
        let mut above = Link::Root;
        let mut link = Link::Root;
        loop {
            let index = self.target(link);
            if index == NONE {
                return None;
            }
            let node = self.node(index);
            if node.length > length || node.bits.common(bits) < node.length {
                return None;
            }
            if node.length < length {
                above = link;
                link = Link::Child(index, bits.bit(node.length));
                continue;
            }
            if !node.owner.as_ref().is_some_and(whose) {
                return None;
            }
            let owner = self.nodes[index as usize].owner.take();
            self.prune(link);
            // The parent may have been there only to branch.
            if let Link::Child(..) = link {
                self.prune(above);
            }
            return owner;
        }
    }

    /// Takes out the node at `link` if it has no owner and fewer than two children.
    fn prune(&mut self, link: Link) {
        let index = self.target(link);
        if index == NONE {
            return;
        }
        let node = self.node(index);
        if node.owner.is_some() {
            return;
        }
        let heir = match node.children {
            [NONE, other] | [other, NONE] => other,
            [_, _] => return,
        };
        self.point(link, heir);
        self.free.push(index);
    }

    fn lookup(&self, address: B) -> Option<&T> {
        let mut best = None;
        let mut index = self.root;
        while index != NONE {
            let node = self.node(index);
            if node.bits.common(address) < node.length {
                break;
            }
            best = node.owner.as_ref().or(best);
            if node.length == B::WIDTH {
                break;
            }
            index = node.children[address.bit(node.length)];
        }
        best
    }

    fn iter(&self) -> impl Iterator<Item = (B, u8, &T)> {
        let mut stack = vec![self.root];
        std::iter::from_fn(move || {
            while let Some(index) = stack.pop() {
                if index == NONE {
                    continue;
                }
                let node = self.node(index);
                stack.extend([node.children[1], node.children[0]]);
                if let Some(owner) = &node.owner {
                    return Some((node.bits, node.length, owner));
                }
            }
            None
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone)]
    enum Step {
        Insert(IpNet, u8),
        Remove(IpNet, u8),
        RemoveAll(u8),
    }

    /// Few bits vary, so that prefixes nest and collide.
    fn address() -> impl Strategy<Value = IpAddr> {
        prop_oneof![
            (0u32..16, 0u32..4).prop_map(|(high, low)| IpAddr::V4(Ipv4Addr::from_bits(high << 28 | low))),
            (0u128..16, 0u128..4).prop_map(|(high, low)| IpAddr::V6(Ipv6Addr::from_bits(high << 124 | low))),
        ]
    }

    fn prefix() -> impl Strategy<Value = IpNet> {
        (address(), prop_oneof![0u8..6, 28u8..=32, 124u8..=128]).prop_map(|(address, length)| {
            IpNet::new(address, length.min(if address.is_ipv4() { 32 } else { 128 })).unwrap().trunc()
        })
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (prefix(), 0u8..4).prop_map(|(prefix, owner)| Step::Insert(prefix, owner)),
            3 => (prefix(), 0u8..4).prop_map(|(prefix, owner)| Step::Remove(prefix, owner)),
            1 => (0u8..4).prop_map(Step::RemoveAll),
        ]
    }

    proptest! {
        #[test]
        fn the_trie_does_what_a_plain_list_does(steps in vec(step(), 0..60), probes in vec(address(), 20)) {
            let mut trie = AllowedIps::new();
            let mut list = BTreeMap::new();
            for step in steps {
                match step {
                    Step::Insert(prefix, owner) => {
                        prop_assert_eq!(trie.insert(prefix, owner), list.insert(prefix, owner));
                    }
                    Step::Remove(prefix, owner) => {
                        let expected = list.get(&prefix).copied().filter(|had| *had == owner);
                        if expected.is_some() {
                            list.remove(&prefix);
                        }
                        prop_assert_eq!(trie.remove_if(prefix, |had| *had == owner), expected);
                    }
                    Step::RemoveAll(owner) => {
                        list.retain(|_, had| *had != owner);
                        trie.remove_all(|had| *had == owner);
                    }
                }
                let all: BTreeMap<_, _> = trie.iter().map(|(prefix, owner)| (prefix, *owner)).collect();
                prop_assert_eq!(&all, &list);
            }
            for probe in probes {
                let expected = list
                    .iter()
                    .filter(|(prefix, _)| prefix.contains(&probe))
                    .max_by_key(|(prefix, _)| prefix.prefix_len())
                    .map(|(_, owner)| owner);
                prop_assert_eq!(trie.lookup(probe), expected);
            }
            // Pruned as it should be, the trie of nothing has no nodes in use.
            trie.remove_all(|_| true);
            prop_assert_eq!(trie.v4.root, NONE);
            prop_assert_eq!(trie.v6.root, NONE);
            prop_assert_eq!(trie.v4.free.len(), trie.v4.nodes.len());
        }
    }

    #[test]
    fn a_prefix_moves_to_its_new_owner() {
        let mut trie = AllowedIps::new();
        let net: IpNet = "10.0.0.0/8".parse().unwrap();
        assert_eq!(trie.insert(net, 'a'), None);
        assert_eq!(trie.insert(net, 'b'), Some('a'));
        assert_eq!(trie.lookup("10.1.2.3".parse().unwrap()), Some(&'b'));
        assert_eq!(trie.remove_if(net, |owner| *owner == 'a'), None, "a owns nothing to lose");
    }
}
