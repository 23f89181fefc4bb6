//! A small cluster that is the same in every run: what signatures and seals in the inputs are checked against.

use std::sync::LazyLock;

use mesh_core::view::{Delta, View};
use mesh_keys::frame::GroupKey;
use mesh_keys::{Genesis, GenesisFields, Identity, JoinMode, JoinModes, Secret32, SignedAdmission};
use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::SeedableRng as _;

/// The cluster.
pub(crate) static WORLD: LazyLock<World> = LazyLock::new(World::new);

/// A founder, and one member that it let in.
pub(crate) struct World {
    pub(crate) founder: Identity,
    pub(crate) member: Identity,
    pub(crate) genesis: Genesis,
    pub(crate) admission: SignedAdmission,
    pub(crate) group_key: GroupKey,
    view: View,
}

impl World {
    fn new() -> Self {
        let (founder, member) = (Identity::from_bytes(&[1; 32]), Identity::from_bytes(&[2; 32]));
        let fields = GenesisFields::flat("fuzz", founder.public(), JoinModes::BOTH, &mut rng());
        let genesis = Genesis::new(fields).expect("the defaults are valid");
        let admission = SignedAdmission::issue(genesis.id(), member.public(), &founder, JoinMode::KeyFile, 1)
            .expect("the founder lets another node in");
        let group_key = GroupKey::from_secret(Secret32::from_bytes([3; 32]));
        let mut view = View::new(genesis.clone());
        let delta = Delta { admissions: vec![admission.clone()], ..Delta::default() };
        assert!(view.merge(&delta).refused.is_empty());
        Self { founder, member, genesis, admission, group_key, view }
    }

    /// The view of a node that knows both members.
    pub(crate) fn view(&self) -> View {
        self.view.clone()
    }
}

/// A generator with a fixed seed.
pub(crate) fn rng() -> ChaCha20Rng {
    ChaCha20Rng::from_seed([4; 32])
}
