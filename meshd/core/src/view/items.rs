//! A view as gossip sees it: items with names.
//!
//! Statements that are never replaced go by the name of their body, and their content is always the same; what a node
//! says of itself goes by the node, and its content by the body. Promises have a name too, but are not among the
//! [items](View::items): only an heir needs them.

use mesh_keys::{BodyId, IdentityKey, NodeId, Signable, Signed, SignedError};

use super::{Delta, View};
use crate::gossip::catalogue::{Catalogue, Content, Kind, Name};

impl Kind {
    /// An admission.
    pub const ADMISSION: Self = Self(1);
    /// A removal.
    pub const REMOVAL: Self = Self(2);
    /// A reclaim.
    pub const RECLAIM: Self = Self(3);
    /// A grant.
    pub const GRANT: Self = Self(4);
    /// What a node says of itself.
    pub const RECORD: Self = Self(5);
    /// A member's count of tries to join.
    pub const TRIES: Self = Self(7);
    /// A token.
    pub const TOKEN: Self = Self(8);
    /// A token taken back.
    pub const REVOCATION: Self = Self(9);
    /// When nodes may join.
    pub const POLICY: Self = Self(10);
    /// A member's promises about removed nodes; not spread by gossip.
    pub const PROMISES: Self = Self(6);

    /// All kinds of this version.
    pub const ALL: [Self; 11] = [
        Self::LIVENESS,
        Self::ADMISSION,
        Self::REMOVAL,
        Self::RECLAIM,
        Self::GRANT,
        Self::RECORD,
        Self::PROMISES,
        Self::TRIES,
        Self::TOKEN,
        Self::REVOCATION,
        Self::POLICY,
    ];

    /// Whether this version knows what it is.
    pub fn is_known(self) -> bool {
        Self::ALL.contains(&self)
    }
}

impl Name {
    /// Of a statement that is never replaced.
    pub(super) fn of_statement(kind: Kind, body: &BodyId) -> Self {
        Self { id: first(body), kind }
    }

    /// Of what a node says of itself.
    pub(crate) fn of_node(kind: Kind, node: &NodeId) -> Self {
        Self { id: *node.as_bytes(), kind }
    }
}

impl Content {
    /// Of what is never replaced.
    const ONLY: Self = Self([0; 8]);

    /// Of what the next one by the same node replaces.
    fn of(body: &BodyId) -> Self {
        Self(first(body))
    }
}

impl View {
    /// Names and contents of all that the view has, but promises. Equal views have equal items.
    pub fn items(&self) -> impl Iterator<Item = (Name, Content)> {
        let statements = self.admissions.ids().map(|id| (Kind::ADMISSION, id));
        let statements = statements
            .chain(self.admissions.removal_ids().map(|id| (Kind::REMOVAL, id)))
            .chain(self.grants.reclaim_ids().map(|id| (Kind::RECLAIM, id)))
            .chain(self.grants.ids().map(|id| (Kind::GRANT, id)))
            .chain(self.tokens.ids().map(|id| (Kind::TOKEN, id)))
            .chain(self.revocations.ids().map(|id| (Kind::REVOCATION, id)))
            .map(|(kind, id)| (Name::of_statement(kind, id), Content::ONLY));
        let records = self.records.iter().map(|(node, entry)| (Kind::RECORD, *node, entry.id));
        let said = records
            .chain(self.tries.ids().map(|(signer, id)| (Kind::TRIES, signer.node_id(), id)))
            .chain(self.policies.ids().map(|(signer, id)| (Kind::POLICY, signer.node_id(), id)));
        statements.chain(said.map(|(kind, node, id)| (Name::of_node(kind, &node), Content::of(&id))))
    }

    /// The names of all items that all members have. All clones of this view share them, as long as they do not change.
    pub fn catalogue(&self) -> Catalogue {
        let collect = || {
            let mut catalogue = Catalogue::default();
            self.items().for_each(|(name, content)| catalogue.set(name, Some(content)));
            catalogue
        };
        self.catalogue.0.get_or_init(collect).clone()
    }

    /// The content of that name at present.
    pub fn content(&self, name: &Name) -> Option<Content> {
        let node = NodeId::from_bytes(name.id);
        let id = match name.kind {
            Kind::RECORD => self.records.get(&node)?.id,
            Kind::TRIES => self.tries.signed(&self.admissions.known_key(&node)?)?.id(),
            Kind::POLICY => self.policies.signed(&self.signer_named(&node)?)?.id(),
            _ => return self.item(name).map(|_| Content::ONLY),
        };
        Some(Content::of(&id))
    }

    /// The item of that name, as it is passed on; also promises.
    pub fn item(&self, name: &Name) -> Option<Vec<u8>> {
        let node = NodeId::from_bytes(name.id);
        match name.kind {
            Kind::ADMISSION => bytes(self.admissions.admission_named(&name.id)),
            Kind::REMOVAL => bytes(self.admissions.removal_named(&name.id)),
            Kind::RECLAIM => bytes(self.grants.reclaim_named(&name.id)),
            Kind::GRANT => bytes(self.grants.grant_named(&name.id)),
            Kind::RECORD => bytes(self.records.get(&node).map(|entry| &entry.signed)),
            Kind::TRIES => bytes(self.tries.signed(&self.admissions.known_key(&node)?)),
            Kind::TOKEN => bytes(self.tokens.named(&name.id)),
            Kind::REVOCATION => bytes(self.revocations.named(&name.id)),
            Kind::POLICY => bytes(self.policies.signed(&self.signer_named(&node)?)),
            Kind::PROMISES => bytes(self.promises.get(&node).map(|entry| &entry.signed)),
            _ => None,
        }
    }
}

impl View {
    /// Who may have signed a join policy, by its node id.
    fn signer_named(&self, node: &NodeId) -> Option<IdentityKey> {
        let admin = self.genesis.admin_keys().iter().find(|key| key.node_id() == *node).copied();
        admin.or_else(|| self.admissions.known_key(node))
    }
}

impl Delta {
    /// The delta that has one item only, as another node passed it on; `None` for a kind that no view has.
    ///
    /// # Errors
    /// [`SignedError`]: the bytes are no signed statement.
    pub fn of_item(kind: Kind, bytes: &[u8]) -> Option<Result<Self, SignedError>> {
        let mut delta = Self::default();
        let read = match kind {
            Kind::ADMISSION => push(&mut delta.admissions, bytes),
            Kind::REMOVAL => push(&mut delta.removals, bytes),
            Kind::RECLAIM => push(&mut delta.reclaims, bytes),
            Kind::GRANT => push(&mut delta.grants, bytes),
            Kind::RECORD => push(&mut delta.records, bytes),
            Kind::TRIES => push(&mut delta.tries, bytes),
            Kind::TOKEN => push(&mut delta.tokens, bytes),
            Kind::REVOCATION => push(&mut delta.revocations, bytes),
            Kind::POLICY => push(&mut delta.policies, bytes),
            Kind::PROMISES => push(&mut delta.promises, bytes),
            _ => return None,
        };
        Some(read.map(|()| delta))
    }

    /// Names and contents of all that is in it, but promises. Records that cannot be decoded have no name: no view
    /// takes them.
    pub fn names(&self) -> Vec<(Name, Content)> {
        let mut names = self.all_names();
        names.retain(|(name, _)| name.kind != Kind::PROMISES);
        names
    }

    /// The same with promises.
    pub(super) fn all_names(&self) -> Vec<(Name, Content)> {
        let mut names = Vec::with_capacity(self.len());
        let mut add = |kind, id: BodyId| names.push((Name::of_statement(kind, &id), Content::ONLY));
        self.admissions.iter().for_each(|item| add(Kind::ADMISSION, item.id()));
        self.removals.iter().for_each(|item| add(Kind::REMOVAL, item.id()));
        self.reclaims.iter().for_each(|item| add(Kind::RECLAIM, item.id()));
        self.grants.iter().for_each(|item| add(Kind::GRANT, item.id()));
        self.tokens.iter().for_each(|item| add(Kind::TOKEN, item.id()));
        self.revocations.iter().for_each(|item| add(Kind::REVOCATION, item.id()));
        let said = |kind, node: NodeId, id| (Name::of_node(kind, &node), Content::of(&id));
        names.extend(
            self.records
                .iter()
                .filter_map(|item| Some(said(Kind::RECORD, item.decode().ok()?.node.node_id(), item.id()))),
        );
        names.extend(
            self.promises
                .iter()
                .filter_map(|item| Some(said(Kind::PROMISES, item.decode().ok()?.node.node_id(), item.id()))),
        );
        names.extend(
            self.tries
                .iter()
                .filter_map(|item| Some(said(Kind::TRIES, item.decode().ok()?.node.node_id(), item.id()))),
        );
        names.extend(
            self.policies
                .iter()
                .filter_map(|item| Some(said(Kind::POLICY, item.decode().ok()?.signer.node_id(), item.id()))),
        );
        names
    }
}

/// The lowest id of a body that a name can stand for.
pub(super) fn lowest(name: &[u8; 16]) -> BodyId {
    let mut id = [0; 32];
    id[..16].copy_from_slice(name);
    BodyId::from_bytes(id)
}

/// Whether a name stands for that body.
pub(super) fn is_named(body: &BodyId, name: &[u8; 16]) -> bool {
    first(body) == *name
}

pub(super) fn first<const N: usize>(body: &BodyId) -> [u8; N] {
    let mut first = [0; N];
    first.copy_from_slice(&body.as_bytes()[..N]);
    first
}

fn bytes<T: Signable>(item: Option<&Signed<T>>) -> Option<Vec<u8>> {
    item.map(Signed::to_bytes)
}

fn push<T: Signable>(items: &mut Vec<Signed<T>>, bytes: &[u8]) -> Result<(), SignedError> {
    items.push(Signed::from_bytes(bytes)?);
    Ok(())
}
