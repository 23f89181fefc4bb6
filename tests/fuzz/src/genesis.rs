//! The genesis document, as a sponsor sends it to a node that joins.

use mesh_keys::{Genesis, GenesisFields, Identity, JoinModes};

use crate::Target;
use crate::world::{WORLD, rng};

pub(crate) const TARGET: Target =
    Target { name: "genesis", run, seeds, words: &[&[0xff, 0x0f], b"-", &[10, 32, 0, 0]] };

fn run(data: &[u8]) {
    match Genesis::decode(data) {
        Ok(genesis) => {
            assert_eq!(
                genesis.as_bytes(),
                data,
                "two documents would have one cluster id each, and mean the same"
            );
            let again = Genesis::new(genesis.fields().clone()).expect("its fields were found valid");
            assert_eq!(again.as_bytes(), data);
            assert_eq!(again.id(), genesis.id());
            assert!(genesis.ipv6_range().contains(&genesis.node_prefix(&WORLD.member.public(), 0)));
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let mut anchored =
        GenesisFields::flat("prod-eu-1", WORLD.founder.public(), JoinModes::KEY_FILE, &mut rng());
    anchored.admin_keys =
        vec![Identity::from_bytes(&[6; 32]).public(), Identity::from_bytes(&[7; 32]).public()];
    let anchored = Genesis::new(anchored).expect("two admin keys are allowed");
    vec![("flat", WORLD.genesis.encode()), ("anchored", anchored.encode())]
}
