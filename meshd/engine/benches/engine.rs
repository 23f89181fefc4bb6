//! Encryption and look-ups of the data path, one thread: `cargo bench -p mesh-engine`.

#![allow(missing_docs, reason = "criterion's macros make public functions")]
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a benchmark fails by panicking, and says what is missing"
)]

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ipnet::{IpNet, Ipv4Net};
use mesh_engine::aead::{self, Choice};
use mesh_engine::measured::{Echo, OVERHEAD, Table};

/// First with `ring`, then with Intel's library if it can be used here. Each thread keeps to what was chosen when it
/// first encrypted something.
fn crypto(criterion: &mut Criterion) {
    encrypt(criterion, "ring");
    match aead::choose(Choice::IpsecMb) {
        Ok(_) => {
            let run = || encrypt(&mut Criterion::default().configure_from_args(), "ipsec-mb");
            std::thread::spawn(run).join().unwrap();
        }
        Err(refused) => eprintln!("ipsec-mb is NOT measured: {refused}"),
    }
}

fn encrypt(criterion: &mut Criterion, implementation: &str) {
    let echo = Echo::new().unwrap();
    for (name, opens) in [("seal", false), ("copy and open", true)] {
        let mut group = criterion.benchmark_group(format!("{name}, {implementation}"));
        for length in [64, 512, 1420, 8920] {
            group.throughput(Throughput::Bytes(length as u64));
            group.bench_function(BenchmarkId::from_parameter(length), |bencher| {
                let mut sealed = vec![0; length + OVERHEAD];
                assert!(echo.seal(&mut sealed));
                let mut message = sealed.clone();
                bencher.iter(|| {
                    if opens {
                        message.copy_from_slice(&sealed);
                        assert_eq!(echo.open(black_box(&mut message)), Some(length));
                    } else {
                        assert!(echo.seal(black_box(&mut message)));
                    }
                });
            });
        }
        group.finish();
    }
}

fn lookups(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("allowed addresses");
    for prefixes in [10u32, 10_000] {
        // Blocks of /24 one behind the other, as a mesh has them.
        let base = u32::from(Ipv4Addr::new(10, 32, 0, 0));
        let block = |number: u32| IpNet::V4(Ipv4Net::new((base + (number << 8)).into(), 24).unwrap());
        let table = Table::new((0..prefixes).map(block));
        group.bench_function(BenchmarkId::from_parameter(prefixes), |bencher| {
            let mut number = 0;
            bencher.iter(|| {
                // A prime step visits them all in no order that a cache would like.
                number = (number + 7919) % prefixes;
                let address = IpAddr::V4((base + (number << 8) + 9).into());
                assert_eq!(table.lookup(black_box(address)), Some(number as usize));
            });
        });
    }
    group.finish();
}

criterion_group!(benches, crypto, lookups);
criterion_main!(benches);
