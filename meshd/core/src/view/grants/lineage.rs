//! Who has taken over from whom.

use mesh_keys::IdentityKey;

use crate::persistent::Map;

/// Who is the last of each node's line. Lines join and never part, so a disjoint-set forest answers in a few
/// steps however long they have grown.
#[derive(Clone, Debug, Default)]
pub(super) struct Lineage(Map<IdentityKey, Tree>);

#[derive(Clone, Copy, Debug)]
struct Tree {
    /// Itself at the top.
    parent: IdentityKey,
    size: usize,
    last: IdentityKey,
}

impl Lineage {
    /// `to` takes over what `from` has; `false` if that would make a circle.
    pub(super) fn inherit(&mut self, from: IdentityKey, to: IdentityKey) -> bool {
        let ((a, one), (b, other)) = (self.top(from), self.top(to));
        if a == b {
            return false;
        }
        let (large, small) = if one.size >= other.size { (a, b) } else { (b, a) };
        self.0.insert(small, Tree { parent: large, ..if small == a { one } else { other } });
        self.0.insert(large, Tree { parent: large, size: one.size + other.size, last: other.last });
        true
    }

    pub(super) fn last(&self, key: IdentityKey) -> IdentityKey {
        self.top(key).1.last
    }

    fn top(&self, key: IdentityKey) -> (IdentityKey, Tree) {
        let mut at = key;
        let mut tree = Tree { parent: key, size: 1, last: key };
        while let Some(found) = self.0.get(&at) {
            tree = *found;
            if tree.parent == at {
                break;
            }
            at = tree.parent;
        }
        (at, tree)
    }
}
