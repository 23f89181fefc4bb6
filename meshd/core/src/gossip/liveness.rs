//! Who is accused of being dead, and who has answered.
//!
//! A member whose probes fail is *accused*, in a statement signed by the accuser: each member has one vote. The accused
//! answers with a statement of its own and a higher incarnation, which settles all accusations before it. What is
//! replicated of a member is only the highest (generation, incarnation) and whether it stands accused; whether it is
//! *unreachable* each node concludes for itself, after a time that is the shorter the more members accuse it
//! (Lifeguard, arXiv 1707.00788, section IV-B). None of this takes a tunnel, a route or an address away.
//!
//! Only the accused itself raises its incarnation, and only by one for an accusation of exactly its present life that a
//! member has signed: nobody else can drive it to the end of the numbers, after which it could not answer any more. With
//! the member goes its vote: when an accuser is removed, its accusations are withdrawn everywhere, so that those who
//! never learn its key agree with the others.

use std::sync::Arc;
use std::time::Duration;

use mesh_keys::{ClusterId, Identity, NodeId, Signable, Signature, Signed, SignedError};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::catalogue::Content;
use crate::time::Time;

/// Accusations of one member that are kept and passed on; more of them say nothing new.
pub const ACCUSERS: usize = 3;

/// The life of a member that a statement is about: its start, and how often it has answered accusations since.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Life {
    /// Counts the starts of the node; as in its record.
    pub generation: u64,
    /// Counts its answers since.
    pub incarnation: u32,
}

/// Something said about whether a member is alive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statement {
    /// First bytes of the cluster id.
    cluster: [u8; 8],
    /// The member it is about.
    subject: NodeId,
    /// Which life of it.
    life: Life,
    /// Who accuses it; when nobody, the subject says that it is alive.
    accuser: Option<NodeId>,
}

impl Signable for Statement {
    const DOMAIN: &'static str = "hauberk liveness v1";
    const MAX_LEN: usize = 128;
}

impl Statement {
    /// Signs an accusation of `subject`, or says that `subject`, who is `by`, is alive.
    ///
    /// # Errors
    /// None in practice: the length is fixed but for two numbers.
    pub fn sign(
        cluster: &ClusterId,
        subject: NodeId,
        life: Life,
        by: &Identity,
    ) -> Result<Signed<Self>, SignedError> {
        let own = by.node_id();
        let accuser = (own != subject).then_some(own);
        Signed::sign(&Self { cluster: tag(cluster), subject, life, accuser }, by)
    }

    /// The life it is about.
    pub fn life(&self) -> Life {
        self.life
    }

    /// The member whose signature it needs.
    pub fn signer(&self) -> NodeId {
        self.accuser.unwrap_or(self.subject)
    }
}

fn tag(cluster: &ClusterId) -> [u8; 8] {
    let mut tag = [0; 8];
    tag.copy_from_slice(&cluster.as_bytes()[..8]);
    tag
}

/// What is known of a member's life: the item of kind [`super::catalogue::Kind::LIVENESS`], under its node id.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bundle {
    /// The member.
    pub subject: NodeId,
    /// Proof of its incarnation, when that is not 0.
    pub alive: Option<Signed<Statement>>,
    /// Accusations of that incarnation, at most [`ACCUSERS`].
    pub accusations: Vec<Signed<Statement>>,
}

/// Why a bundle, or a part of it, is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// A signature, or its form.
    #[error(transparent)]
    Signed(#[from] SignedError),
    /// About another member, cluster or life than it is said to be.
    #[error("it is not about what it is said to be about")]
    Mismatch,
    /// More accusations than are kept.
    #[error("more than {ACCUSERS} accusations")]
    TooMany,
}

/// What a node holds of one member's life.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    life: Life,
    alive: Option<Arc<Signed<Statement>>>,
    /// In the order of the accusers.
    accusations: Vec<Accusation>,
    /// When the first of the accusations came in.
    since: Option<Time>,
    /// Bundles that have been merged lately: the same news comes from many.
    seen: [Seen; 4],
}

/// An accusation of the present life. In a partition a node keeps thousands: what follows from the place where it is kept
/// is left out.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Accusation {
    accuser: NodeId,
    signature: Signature,
    /// The whole, when it says more than this version writes.
    whole: Option<Box<Signed<Statement>>>,
}

impl Accusation {
    fn new(signed: &Signed<Statement>, statement: &Statement, accuser: NodeId) -> Self {
        let signature = *signed.signature();
        let same = Signed::from_parts(statement, signature).is_ok_and(|again| again == *signed);
        Self { accuser, signature, whole: (!same).then(|| Box::new(signed.clone())) }
    }

    fn signed(&self, cluster: &ClusterId, subject: NodeId, life: Life) -> Option<Signed<Statement>> {
        let statement = || Statement { cluster: tag(cluster), subject, life, accuser: Some(self.accuser) };
        match &self.whole {
            Some(whole) => Some((**whole).clone()),
            None => Signed::from_parts(&statement(), self.signature).ok(),
        }
    }
}

/// Tells bundles apart: a part of a hash of their bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen([u8; 8]);

impl Seen {
    /// Of the bytes as they came.
    pub fn of(bundle: &[u8]) -> Self {
        let hash = Sha256::digest(bundle);
        let mut first = [0; 8];
        first.copy_from_slice(&hash[..8]);
        Self(first)
    }
}

/// What a bundle has changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Something is known now that was not: to be passed on.
    pub news: bool,
    /// There is an accusation that was not there.
    pub accused: bool,
}

impl Entry {
    /// A life that nothing has been said of.
    pub fn new(generation: u64) -> Self {
        Self { life: Life { generation, incarnation: 0 }, ..Self::default() }
    }

    /// Whether a bundle has been merged lately.
    pub fn has_seen(&self, bundle: Seen) -> bool {
        self.seen.contains(&bundle)
    }

    /// Notes that a bundle has been merged, all of it.
    pub fn note_seen(&mut self, bundle: Seen) {
        self.seen.rotate_right(1);
        self.seen[0] = bundle;
    }

    /// The highest life that is known.
    pub fn life(&self) -> Life {
        self.life
    }

    /// Whether it stands accused.
    pub fn is_accused(&self) -> bool {
        !self.accusations.is_empty()
    }

    /// How many members accuse it, as far as that is counted.
    pub fn accusers(&self) -> usize {
        self.accusations.len()
    }

    /// Whether `node` does.
    pub fn is_accused_by(&self, node: &NodeId) -> bool {
        self.place(node).is_ok()
    }

    /// Where the accusation by `node` is, or would be.
    fn place(&self, node: &NodeId) -> Result<usize, usize> {
        self.accusations.binary_search_by(|accusation| accusation.accuser.cmp(node))
    }

    /// When the first of the present accusations came in.
    pub fn accused_since(&self) -> Option<Time> {
        self.since.filter(|_| self.is_accused())
    }

    /// What distinguishes it from what others know: its life, and whether it stands accused. Not by whom: that would
    /// make copies differ that lead to the same.
    pub fn content(&self) -> Option<Content> {
        if self.life.incarnation == 0 && !self.is_accused() {
            return None;
        }
        let hash = Sha256::new()
            .chain_update(self.life.generation.to_le_bytes())
            .chain_update(self.life.incarnation.to_le_bytes())
            .chain_update([u8::from(self.is_accused())])
            .finalize();
        let mut content = [0; 8];
        content.copy_from_slice(&hash[..8]);
        Some(Content(content))
    }

    /// All of it, to be sent.
    pub fn bundle(&self, cluster: &ClusterId, subject: NodeId) -> Bundle {
        let signed = |accusation: &Accusation| accusation.signed(cluster, subject, self.life);
        Bundle {
            subject,
            alive: self.alive.as_deref().cloned(),
            accusations: self.accusations.iter().filter_map(signed).collect(),
        }
    }

    /// Merges what another node knows. `check` verifies a statement with the key of its signer. Accusations of lives
    /// that are not the known one are left out without further ado: old ones are answered, new ones come with the proof.
    ///
    /// # Errors
    /// [`Refused`]; what came before the fault has been taken.
    pub fn merge(
        &mut self,
        cluster: &ClusterId,
        bundle: &Bundle,
        now: Time,
        mut check: impl FnMut(&Signed<Statement>, &NodeId) -> bool,
    ) -> Result<Change, Refused> {
        let mut change = Change::default();
        let read = |signed: &Signed<Statement>| {
            let statement = signed.decode()?;
            if statement.subject != bundle.subject || statement.cluster != tag(cluster) {
                return Err(Refused::Mismatch);
            }
            Ok(statement)
        };
        if let Some(signed) = &bundle.alive {
            let statement = read(signed)?;
            if statement.accuser.is_some() {
                return Err(Refused::Mismatch);
            }
            // The generation is the record's to raise.
            if statement.life.generation == self.life.generation && statement.life > self.life {
                if !check(signed, &statement.subject) {
                    return Err(SignedError::BadSignature { domain: Statement::DOMAIN }.into());
                }
                self.life = statement.life;
                self.alive = Some(Arc::new(signed.clone()));
                self.accusations.clear();
                self.since = None;
                change.news = true;
            }
        }
        if bundle.accusations.len() > ACCUSERS {
            return Err(Refused::TooMany);
        }
        for signed in &bundle.accusations {
            let statement = read(signed)?;
            let accuser = statement.accuser.ok_or(Refused::Mismatch)?;
            let Err(place) = self.place(&accuser) else { continue };
            if statement.life != self.life || self.accusations.len() >= ACCUSERS {
                continue;
            }
            if !check(signed, &accuser) {
                return Err(SignedError::BadSignature { domain: Statement::DOMAIN }.into());
            }
            if self.accusations.is_empty() {
                self.since = Some(now);
            }
            self.accusations.reserve_exact(1);
            self.accusations.insert(place, Accusation::new(signed, &statement, accuser));
            change = Change { news: true, accused: true };
        }
        Ok(change)
    }

    /// Takes the vote of a member that is none any more; whether it had one.
    pub fn withdraw(&mut self, accuser: &NodeId) -> bool {
        let Ok(place) = self.place(accuser) else { return false };
        self.accusations.remove(place);
        // There is room for votes that were left out before.
        self.seen = Default::default();
        true
    }

    /// When the accused should have answered at the latest, in a cluster of `members`: at once when several accuse it;
    /// otherwise after a third of the shortest suspicion, which others may begin at any moment, so that two thirds are
    /// left for the answer to spread. One that is `harassed` waits for a third of the suspicion as it is.
    pub fn answer_due(&self, members: usize, harassed: bool) -> Option<Time> {
        let since = self.accused_since()?;
        Some(match self.accusers() {
            _ if harassed => since + self.deadline(members)?.since(since) / 3,
            1 => since + shortest_suspicion(members) / 3,
            _ => since,
        })
    }

    /// When a member that stands accused is taken for unreachable, in a cluster of `members`. The first accusation
    /// sets the longest time, each further one shortens it; [`ACCUSERS`] of them, or as many as there can be, leave the
    /// shortest.
    pub fn deadline(&self, members: usize) -> Option<Time> {
        let since = self.accused_since()?;
        let shortest = shortest_suspicion(members);
        let possible = ACCUSERS.min(members.saturating_sub(2)).max(1);
        // Thousandths of the way from the longest to the shortest: logarithmic in the number of accusers.
        let share = match (possible, self.accusers()) {
            (1, _) | (2, 2..) | (_, 3..) => 1000,
            (3.., 2) => 631,
            _ => 0,
        };
        Some(since + shortest + shortest * (LONGEST - 1) * (1000 - share) / 1000)
    }
}

/// The longest suspicion is this many times the shortest.
const LONGEST: u32 = 6;

/// Enough time for an accusation to reach the accused and for its answer to come back, by gossip, though the accused is
/// slow: 1.5 s among ten, and 1.9 s more for each further power of ten in the number of members.
fn shortest_suspicion(members: usize) -> Duration {
    let bits = u32::try_from(members.max(10)).unwrap_or(u32::MAX).ilog2();
    Duration::from_millis(1500) + Duration::from_millis(1900) * (bits * 301).saturating_sub(1000) / 1000
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;
    use rand_chacha::ChaCha20Rng;
    use rand_core::SeedableRng as _;

    use super::*;

    const CLUSTER: ClusterId = ClusterId::from_bytes([5; 32]);

    fn identities() -> Vec<Identity> {
        let mut rng = ChaCha20Rng::from_seed([1; 32]);
        (0..6).map(|_| Identity::generate(&mut rng)).collect()
    }

    fn bundle(subject: NodeId, statements: Vec<Signed<Statement>>) -> Bundle {
        let (accusations, alive): (Vec<_>, Vec<_>) =
            statements.into_iter().partition(|signed| signed.decode().unwrap().accuser.is_some());
        Bundle { subject, alive: alive.into_iter().next_back(), accusations }
    }

    fn checked(identities: &[Identity]) -> impl FnMut(&Signed<Statement>, &NodeId) -> bool {
        let keys: BTreeMap<_, _> = identities.iter().map(|i| (i.node_id(), i.public())).collect();
        move |signed, node| keys.get(node).is_some_and(|key| signed.verify(key).is_ok())
    }

    fn life(incarnation: u32) -> Life {
        Life { generation: 4, incarnation }
    }

    fn sign(subject: &Identity, incarnation: u32, by: &Identity) -> Signed<Statement> {
        Statement::sign(&CLUSTER, subject.node_id(), life(incarnation), by).unwrap()
    }

    fn fresh() -> Entry {
        Entry::new(4)
    }

    #[test]
    fn only_the_accused_can_answer_and_everybody_has_one_vote() {
        let ids = identities();
        let subject = ids[0].node_id();
        let mut entry = fresh();
        let merge = |entry: &mut Entry, statements| {
            entry.merge(&CLUSTER, &bundle(subject, statements), Time::ZERO, checked(&ids))
        };
        let news = Change { news: true, accused: true };
        assert_eq!(merge(&mut entry, vec![sign(&ids[0], 0, &ids[1])]), Ok(news));
        assert_eq!(merge(&mut entry, vec![sign(&ids[0], 0, &ids[1])]), Ok(Change::default()), "once each");
        assert_eq!(merge(&mut entry, vec![sign(&ids[0], 0, &ids[2])]), Ok(news));
        assert_eq!(entry.accusers(), 2);

        // Another member signs as if it were the accused.
        let mut forged = sign(&ids[0], 1, &ids[0]).to_bytes();
        forged[3] ^= 1;
        let forged = Signed::from_bytes(&forged).unwrap();
        assert!(matches!(merge(&mut entry, vec![forged]), Err(Refused::Signed(_))));
        assert_eq!((entry.accusers(), entry.life()), (2, life(0)));

        let answered = Ok(Change { news: true, accused: false });
        assert_eq!(merge(&mut entry, vec![sign(&ids[0], 1, &ids[0])]), answered);
        assert_eq!((entry.accusers(), entry.life()), (0, life(1)));
        assert_eq!(merge(&mut entry, vec![sign(&ids[0], 0, &ids[3])]), Ok(Change::default()), "answered");
        assert_eq!(
            merge(&mut entry, vec![sign(&ids[0], 7, &ids[3])]),
            Ok(Change::default()),
            "without proof"
        );
        assert!(entry.content().is_some() && Entry::new(5).content().is_none());
    }

    #[test]
    fn a_bundle_that_there_was_no_room_for_is_looked_at_again_when_a_vote_is_withdrawn() {
        let ids = identities();
        let subject = ids[0].node_id();
        let mut entry = fresh();
        let first = (1..=ACCUSERS).map(|by| sign(&ids[0], 0, &ids[by])).collect();
        entry.merge(&CLUSTER, &bundle(subject, first), Time::ZERO, checked(&ids)).unwrap();
        let more = bundle(subject, vec![sign(&ids[0], 0, &ids[ACCUSERS + 1])]);
        let seen = Seen::of(b"more");
        assert_eq!(entry.merge(&CLUSTER, &more, Time::ZERO, checked(&ids)), Ok(Change::default()));
        entry.note_seen(seen);
        assert!(!entry.withdraw(&subject) && entry.has_seen(seen), "nothing was withdrawn");
        for accuser in &ids[1..=ACCUSERS] {
            assert!(entry.withdraw(&accuser.node_id()));
        }
        assert!(!entry.is_accused() && !entry.has_seen(seen));
        assert_eq!(
            entry.merge(&CLUSTER, &more, Time::ZERO, checked(&ids)),
            Ok(Change { news: true, accused: true })
        );
    }

    #[test]
    fn what_a_newer_version_says_beside_an_accusation_is_passed_on() {
        #[derive(Serialize, Deserialize)]
        struct Newer(Statement, u32);
        impl Signable for Newer {
            const DOMAIN: &'static str = Statement::DOMAIN;
            const MAX_LEN: usize = Statement::MAX_LEN;
        }
        let ids = identities();
        let subject = ids[0].node_id();
        let (old, statement) = (sign(&ids[0], 0, &ids[1]), sign(&ids[0], 0, &ids[2]).decode().unwrap());
        let newer = Signed::sign(&Newer(statement, 77), &ids[2]).unwrap();
        let newer = Signed::from_bytes(&newer.to_bytes()).unwrap();
        let mut entry = fresh();
        let said = bundle(subject, vec![old.clone(), newer.clone()]);
        entry.merge(&CLUSTER, &said, Time::ZERO, checked(&ids)).unwrap();
        let passed_on: BTreeSet<_> = entry.bundle(&CLUSTER, subject).accusations.into_iter().collect();
        assert_eq!(passed_on, BTreeSet::from([old, newer]), "byte for byte");
        assert_eq!(entry.accusations.iter().filter(|accusation| accusation.whole.is_some()).count(), 1);
    }

    #[test]
    fn what_does_not_belong_there_is_refused() {
        let ids = identities();
        let subject = ids[0].node_id();
        let merge = |bundle: &Bundle| fresh().merge(&CLUSTER, bundle, Time::ZERO, checked(&ids));
        let about_another = bundle(subject, vec![sign(&ids[1], 0, &ids[2])]);
        assert_eq!(merge(&about_another), Err(Refused::Mismatch));
        let foreign = Statement::sign(&ClusterId::from_bytes([6; 32]), subject, life(0), &ids[1]).unwrap();
        assert_eq!(merge(&bundle(subject, vec![foreign])), Err(Refused::Mismatch));
        let swapped = Bundle { subject, alive: Some(sign(&ids[0], 1, &ids[1])), accusations: Vec::new() };
        assert_eq!(merge(&swapped), Err(Refused::Mismatch));
        let many = (1..6).chain([1]).map(|by| sign(&ids[0], 0, &ids[by])).collect();
        assert_eq!(merge(&bundle(subject, many)), Err(Refused::TooMany));
    }

    #[test]
    fn more_accusers_shorten_the_suspicion() {
        let ids = identities();
        let subject = ids[0].node_id();
        let waits = |members: usize, accusers: usize| {
            let mut entry = fresh();
            let statements = (1..=accusers).map(|by| sign(&ids[0], 0, &ids[by])).collect();
            entry.merge(&CLUSTER, &bundle(subject, statements), Time::ZERO, checked(&ids)).unwrap();
            entry.deadline(members).unwrap().since_origin().as_millis()
        };
        assert_eq!([1, 2, 3].map(|n| waits(10, n)), [9000, 4267, 1500]);
        assert_eq!([1, 2, 3].map(|n| waits(5000, n)), [38776, 18386, 6462]);
        assert_eq!((waits(3, 1), waits(2, 1), waits(4, 2)), (1500, 1500, 1500), "nobody else could");
        assert_eq!(fresh().deadline(10), None);
    }

    proptest! {
        /// Whatever order statements come in, those who have heard them all agree.
        #[test]
        fn merging_is_in_any_order(
            said in prop::collection::vec((0u32..4, 0usize..4), 1..12),
            order in prop::collection::vec(any::<prop::sample::Index>(), 12),
        ) {
            let ids = identities();
            let subject = ids[0].node_id();
            let proof = |incarnation| (incarnation > 0).then(|| sign(&ids[0], incarnation, &ids[0]));
            let bundles: Vec<_> = said.iter().map(|(incarnation, by)| {
                let accusation = (*by > 0).then(|| sign(&ids[0], *incarnation, &ids[*by]));
                Bundle { subject, alive: proof(*incarnation), accusations: accusation.into_iter().collect() }
            }).collect();
            let mut shuffled = bundles.clone();
            for (at, index) in order.iter().enumerate().take(bundles.len()) {
                shuffled.swap(at, index.index(bundles.len()));
            }
            let mut entries = [fresh(), fresh()];
            for (entry, bundles) in entries.iter_mut().zip([&bundles, &shuffled]) {
                for bundle in bundles {
                    entry.merge(&CLUSTER, bundle, Time::ZERO, checked(&ids)).unwrap();
                }
            }
            prop_assert_eq!(&entries[0], &entries[1]);
            let whole = entries[0].bundle(&CLUSTER, subject);
            let mut again = fresh();
            again.merge(&CLUSTER, &whole, Time::ZERO, checked(&ids)).unwrap();
            prop_assert_eq!(&again, &entries[0]);
        }
    }
}
