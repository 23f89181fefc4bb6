//! The committed corpus and a bounded number of mutations of it, through every fuzz target.

#![forbid(unsafe_code)]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use mesh_fuzz::mutator::Mutator;
use mesh_fuzz::{TARGETS, Target};

/// Mutations tried for each target. A few seconds on two cores.
const MUTATIONS: u32 = 20_000;

/// Where all mutations come from.
const SEED: u64 = 0x6861_7562_6572_6b31;

/// Set to anything, it writes the seeds of all targets into the corpus.
const WRITE_SEEDS: &str = "HAUBERK_WRITE_SEEDS";

macro_rules! replay {
    ($($target:ident)*) => {
        $(
            #[test]
            fn $target() {
                replay(stringify!($target));
            }
        )*

        #[test]
        fn every_target_is_replayed() {
            let replayed = [$(stringify!($target)),*];
            for target in TARGETS {
                assert!(replayed.contains(&target.name), "add {} to the list in this file", target.name);
            }
        }
    };
}

replay!(frame gossip record message genesis cni_stdin uapi);

fn replay(name: &str) {
    let target = mesh_fuzz::target(name).expect("the target exists");
    let corpus = corpus(target);
    assert!(!corpus.is_empty(), "no corpus for {name}: `{WRITE_SEEDS}=1 cargo xtask test fuzz` writes one");
    for (path, input) in &corpus {
        try_input(target, input, &path.display().to_string());
    }
    let inputs: Vec<Vec<u8>> = corpus.into_iter().map(|(_, input)| input).collect();
    let mut mutator = Mutator::new(&inputs, target.words, SEED);
    for number in 0..MUTATIONS {
        try_input(target, &mutator.next_input(), &format!("mutation {number}"));
    }
}

/// Runs one input. When it breaks a promise, keeps it and says how to go on from there.
fn try_input(target: &Target, input: &[u8], what: &str) {
    if catch_unwind(AssertUnwindSafe(|| (target.run)(input))).is_err() {
        let dir = home().join("artifacts").join(target.name);
        let file = dir.join(format!("replay-{}", what.rsplit('/').next().unwrap_or(what).replace(' ', "-")));
        std::fs::create_dir_all(&dir).expect("artifacts can be written");
        std::fs::write(&file, input).expect("artifacts can be written");
        panic!("{what} breaks fuzz target {}; the input is in {}", target.name, file.display());
    }
}

/// The committed inputs, in the order of their names.
fn corpus(target: &Target) -> Vec<(PathBuf, Vec<u8>)> {
    let dir = home().join("corpus").join(target.name);
    let mut paths: Vec<PathBuf> = std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .map(|entry| entry.expect("it can be listed").path())
        .collect();
    paths.sort();
    paths.into_iter().map(|path| (path.clone(), std::fs::read(path).expect("it can be read"))).collect()
}

fn home() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn the_seeds_are_in_the_corpus_and_up_to_date() {
    for target in TARGETS {
        let dir = home().join("corpus").join(target.name);
        for (name, expected) in (target.seeds)() {
            let file = dir.join(name);
            if std::env::var_os(WRITE_SEEDS).is_some() {
                std::fs::create_dir_all(&dir).expect("the corpus can be written");
                std::fs::write(&file, &expected).expect("the corpus can be written");
            }
            let found = std::fs::read(&file).unwrap_or_default();
            assert!(
                found == expected,
                "{} is not what today's code writes: has a format changed? Then set {WRITE_SEEDS}=1 and look at \
                 the difference",
                file.display()
            );
        }
    }
}

#[test]
fn mutations_are_the_same_every_time_and_do_change() {
    let corpus = vec![b"public_key=00\nallowed_ip=10.0.0.0/8\n".to_vec(), vec![0; 300]];
    let make = || {
        let mut mutator = Mutator::new(&corpus, &[b"errno=0\n"], SEED);
        (0..500).map(|_| mutator.next_input()).collect::<Vec<_>>()
    };
    let inputs = make();
    assert_eq!(inputs, make());
    let distinct: std::collections::BTreeSet<_> = inputs.iter().collect();
    assert!(distinct.len() > 400, "{} distinct inputs of 500", distinct.len());
}
