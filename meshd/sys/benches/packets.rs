//! The packet functions of the data path, without system calls: `cargo bench -p mesh-sys`.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a benchmark fails by panicking; the macro's functions are bare"
)]

#[path = "../tests/packets/build.rs"]
mod build;

use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use mesh_sys::tun::{Coalescer, segment};

use build::{ACK, Ip, Packet, Transport, arena};

/// Payload of a TCP segment in a tunnel with an MTU of 1,420 bytes.
const SIZE: u16 = 1368;
/// Segments in 64 KiB.
const COUNT: usize = 45;

/// What stands for [`COUNT`] packets of one flow.
fn run(v4: bool, tcp: bool) -> Packet {
    let ip = if v4 {
        Ip::V4 { id: 1, fragment: 0x4000, options: Vec::new() }
    } else {
        Ip::V6 { label: 7, extensions: Vec::new() }
    };
    let transport = if tcp {
        let options = vec![1; 12];
        Transport::Tcp { sequence: 1, acknowledged: 2, flags: ACK, window: 500, urgent: 0, options }
    } else {
        Transport::Udp { checksum: true }
    };
    let payload = (0..COUNT * usize::from(SIZE)).map(|at| at as u8).collect();
    Packet { ip, service: 0, hop_limit: 64, host: 1, ports: (1000, 2000), transport, payload }
}

const KINDS: [(&str, bool, bool); 3] = [("tcp4", true, true), ("tcp6", false, true), ("udp4", true, false)];

fn cutting(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("segment 64 KiB");
    for (name, v4, tcp) in KINDS {
        let (header, packet) = run(v4, tcp).superpacket(SIZE);
        let mut out = vec![0; 2048];
        group.throughput(Throughput::Bytes(packet.len() as u64));
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let mut segments = segment(black_box(&header), black_box(&packet)).unwrap();
                while let Some(length) = segments.write_next(&mut out) {
                    black_box(&out[..length]);
                }
            });
        });
    }
    // What the kernel left open in a single packet: one checksum, one copy.
    let mut single = run(true, true);
    single.payload.truncate(SIZE.into());
    let (header, packet) = single.superpacket(SIZE);
    let mut out = vec![0; 2048];
    group.throughput(Throughput::Bytes(packet.len() as u64));
    group.bench_function("one packet", |bencher| {
        bencher.iter(|| segment(black_box(&header), black_box(&packet)).unwrap().write_next(&mut out));
    });
}

fn joining(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("coalesce 45 packets");
    let mut bench = |name: &str, packets: &[Vec<u8>]| {
        let (bytes, ranges) = arena(packets);
        let mut coalescer = Coalescer::new(true);
        group.throughput(Throughput::Bytes(bytes.len() as u64));
        group.bench_function(name, |bencher| {
            // Joining writes into the first packets: each round begins with a fresh copy.
            bencher.iter_batched_ref(
                || bytes.clone(),
                |bytes| {
                    for range in &ranges {
                        coalescer.push(bytes, range.clone());
                    }
                    let written =
                        coalescer.finish(bytes).map(|packet| black_box(packet.pieces.len())).sum::<usize>();
                    coalescer.clear();
                    written
                },
                BatchSize::LargeInput,
            );
        });
    };
    for (name, v4, tcp) in KINDS {
        let packets: Vec<_> = run(v4, tcp).cut(SIZE.into()).iter().map(Packet::bytes).collect();
        bench(name, &packets);
    }
    // Nine flows in turns, five packets of each.
    let flows: Vec<Vec<Vec<u8>>> = (0..9u16)
        .map(|flow| {
            let packet = Packet { ports: (1000 + flow, 2000), ..run(true, true) };
            packet.cut(SIZE.into()).iter().map(Packet::bytes).collect()
        })
        .collect();
    let turns: Vec<_> = (0..5).flat_map(|at| flows.iter().map(move |flow| flow[at].clone())).collect();
    bench("tcp4 of nine flows", &turns);
    // Acknowledgements, which are not joined.
    let bare = Packet { payload: Vec::new(), ..run(true, true) };
    bench("tcp4 without payload", &vec![bare.bytes(); COUNT]);
}

criterion_group!(benches, cutting, joining);
criterion_main!(benches);
