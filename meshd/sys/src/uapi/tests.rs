//! What is written is read back, and what is malformed is refused by name.

use std::io::{BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::time::Duration;

use ipnet::IpNet;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

use super::*;

fn public_key() -> impl Strategy<Value = PublicKey> {
    any::<[u8; 32]>().prop_map(PublicKey)
}

fn secret() -> impl Strategy<Value = SecretKey> {
    any::<[u8; 32]>().prop_map(|bytes| SecretKey::new(&bytes))
}

fn live_secret() -> impl Strategy<Value = SecretKey> {
    secret().prop_filter("zero stands for none", |key| !key.is_zero())
}

fn address() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        any::<u32>().prop_map(|bits| IpAddr::V4(Ipv4Addr::from_bits(bits))),
        any::<u128>().prop_map(|bits| IpAddr::V6(Ipv6Addr::from_bits(bits))),
    ]
}

fn endpoint() -> impl Strategy<Value = SocketAddr> {
    prop_oneof![
        (address(), 1u16..).prop_map(|(address, port)| SocketAddr::new(address, port)),
        (1u16.., 1u32..).prop_map(|(port, scope)| {
            SocketAddrV6::new("fe80::1".parse().unwrap(), port, 0, scope).into()
        }),
    ]
}

fn prefix() -> impl Strategy<Value = IpNet> {
    (address(), 0u8..=128).prop_map(|(address, length)| {
        let length = if address.is_ipv4() { length % 33 } else { length };
        IpNet::new(address, length).unwrap().trunc()
    })
}

fn change() -> impl Strategy<Value = AllowedIpChange> {
    prop_oneof![prefix().prop_map(AllowedIpChange::Add), prefix().prop_map(AllowedIpChange::Remove)]
}

prop_compose! {
    fn set_peer()(
        public_key in public_key(), remove: bool, update_only: bool, preshared_key in option::of(secret()),
        endpoint in option::of(endpoint()), persistent_keepalive: Option<u16>, replace_allowed_ips: bool,
        allowed_ips in vec(change(), 0..5),
    ) -> SetPeer {
        SetPeer { public_key, remove, update_only, preshared_key, endpoint, persistent_keepalive,
            replace_allowed_ips, allowed_ips }
    }
}

prop_compose! {
    fn set_device()(
        private_key in option::of(secret()), listen_port: Option<u16>, fwmark: Option<u32>, replace_peers: bool,
        peers in vec(set_peer(), 0..5),
    ) -> SetDevice {
        SetDevice { private_key, listen_port, fwmark, replace_peers, peers }
    }
}

prop_compose! {
    fn peer()(
        public_key in public_key(), preshared_key in option::of(live_secret()), endpoint in option::of(endpoint()),
        persistent_keepalive: u16, seconds in 0..u64::MAX, nanos in 0u32..1_000_000_000, rx_bytes: u64,
        tx_bytes: u64, allowed_ips in vec(prefix(), 0..5),
    ) -> Peer {
        Peer { public_key, preshared_key, endpoint, persistent_keepalive,
            last_handshake_time: Duration::new(seconds, nanos), rx_bytes, tx_bytes, allowed_ips,
            protocol_version: 1 }
    }
}

prop_compose! {
    fn device()(
        private_key in option::of(live_secret()), listen_port: u16, fwmark: u32, peers in vec(peer(), 0..5),
    ) -> Device {
        Device { private_key, listen_port, fwmark, peers }
    }
}

proptest! {
    #[test]
    fn a_set_request_is_read_back_as_written(set in set_device()) {
        let request = Request::Set(set);
        prop_assert_eq!(Request::parse(request.to_text().as_bytes()), Ok(request));
    }

    #[test]
    fn a_device_is_read_back_as_written(device in device()) {
        prop_assert_eq!(Device::parse(device.to_text().as_bytes()), Ok(device));
    }

    #[test]
    fn any_bytes_are_parsed_or_refused_without_panic(bytes in vec(any::<u8>(), 0..400)) {
        let _either = (Request::parse(&bytes), Device::parse(&bytes));
        let with_start = [b"set=1\n".as_slice(), &bytes].concat();
        let _either = Request::parse(&with_start);
    }

    #[test]
    fn lines_of_known_keys_with_any_value_never_panic(
        lines in vec(("(private_key|listen_port|fwmark|replace_peers|public_key|remove|update_only|preshared_key|\
                       endpoint|persistent_keepalive_interval|replace_allowed_ips|allowed_ip|protocol_version|errno|\
                       last_handshake_time_sec|last_handshake_time_nsec|rx_bytes|tx_bytes)", "\\PC{0,70}"), 0..6)
    ) {
        let body: String = lines.iter().map(|(key, value)| format!("{key}={value}\n")).collect();
        let _either = (Request::parse(format!("set=1\n{body}\n").as_bytes()), Device::parse(body.as_bytes()));
    }

    #[test]
    fn a_message_is_found_however_the_stream_is_cut(device in device(), pieces in 1usize..40) {
        let text = device.to_text();
        let twice = [text.as_bytes(), text.as_bytes()].concat();
        let mut stream = BufReader::with_capacity(pieces, twice.as_slice());
        for _ in 0..2 {
            let message = read_message(&mut stream, Limits::RESPONSE).unwrap().unwrap();
            prop_assert_eq!(&message[..], text.as_bytes());
        }
        prop_assert!(read_message(&mut stream, Limits::RESPONSE).unwrap().is_none());
    }

    #[test]
    fn room_for_the_text_is_taken_at_once(set in set_device(), device in device()) {
        // A text that outgrew its room would have left a copy of its secrets in freed memory.
        let prefixes: usize = set.peers.iter().map(|peer| peer.allowed_ips.len()).sum();
        prop_assert!(set.to_text().len() <= (set.peers.len() + 1) * 640 + prefixes * 60);
        let prefixes: usize = device.peers.iter().map(|peer| peer.allowed_ips.len()).sum();
        prop_assert!(device.to_text().len() <= (device.peers.len() + 1) * 640 + prefixes * 60);
    }
}

const KEY: &str = "b85996fecc9c7f1fc6d2572a76eda11d59bcd20be8e543b15ce4bd85a8e75a33";

fn refused(lines: &str) -> String {
    Request::parse(format!("set=1\n{lines}\n").as_bytes()).unwrap_err().to_string()
}

#[test]
fn the_example_of_the_specification_is_understood() {
    let text = format!(
        "set=1\nprivate_key=e84b5a6d2717c1003a13b431570353dbaca9146cf150c5f8575680feba52027a\nfwmark=0\n\
         listen_port=12912\npublic_key={KEY}\npreshared_key=188515093e952f5f22e865cef3012e72f8b5f0b598ac0309d5da\
         cce3b70fcf52\nreplace_allowed_ips=true\nallowed_ip=192.168.4.4/32\nendpoint=[abcd:23::33%2]:51820\n\n"
    );
    let Ok(Request::Set(set)) = Request::parse(text.as_bytes()) else { panic!("a set request") };
    assert_eq!((set.fwmark, set.listen_port, set.replace_peers), (Some(0), Some(12912), false));
    let peer = &set.peers[0];
    assert_eq!(peer.public_key.to_hex(), KEY);
    assert_eq!(peer.public_key.to_string(), "uFmW/sycfx/G0lcqdu2hHVm80gvo5UOxXOS9hajnWjM=");
    assert_eq!(peer.endpoint, Some("[abcd:23::33%2]:51820".parse().unwrap()));
    assert!(peer.replace_allowed_ips);
}

#[test]
fn refusals_name_line_and_key() {
    for (lines, expected) in [
        ("listen_port=70000", "line 2: listen_port: expected a number from 0 to 65535"),
        ("listen_port=+1", "line 2: listen_port: expected a number from 0 to 65535"),
        ("listen_port=1\nlisten_port=2", "line 3: listen_port: given twice"),
        ("fwmark=-1", "line 2: fwmark: expected a number from 0 to 4294967295"),
        ("replace_peers=yes", "line 2: replace_peers: the only value is true"),
        ("private_key=00", "line 2: private_key: a key has 64 hexadecimal digits, this has 2 characters"),
        ("endpoint=1.2.3.4:5", "line 2: endpoint: unknown key for the device (before the first public_key)"),
        ("nonsense", "line 2: : expected key=value"),
    ] {
        assert_eq!(refused(lines), expected);
    }
    for (line, expected) in [
        ("endpoint=example.org:1", "line 3: endpoint: \"example.org:1\" is not an endpoint"),
        ("endpoint=192.0.2.1:0", "line 3: endpoint: \"192.0.2.1:0\" is not an endpoint"),
        ("endpoint=[fe80::1%no-such-device]:1", "line 3: endpoint: "),
        ("allowed_ip=10.0.0.0/33", "line 3: allowed_ip: \"10.0.0.0/33\" is not a prefix"),
        ("allowed_ip=10.0.0.0", "line 3: allowed_ip: \"10.0.0.0\" is not a prefix"),
        ("persistent_keepalive_interval=65536", "line 3: persistent_keepalive_interval: expected a number"),
        ("protocol_version=2", "line 3: protocol_version: only protocol version 1 is known"),
        ("listen_port=1", "line 3: listen_port: unknown key for a peer"),
        ("colour=green", "line 3: colour: unknown key for a peer"),
    ] {
        let message = refused(&format!("public_key={KEY}\n{line}"));
        assert!(message.starts_with(expected), "{message}");
    }
}

#[test]
fn secrets_are_in_no_message_and_no_debug_output() {
    let secret = "5eC4e7".repeat(11);
    for key in ["private_key", "preshared_key"] {
        let message = refused(&format!("public_key={KEY}\n{key}={secret}"));
        assert!(!message.contains("5eC4e7"), "{message}");
    }
    let key = SecretKey::new(&[0xab; 32]);
    let set = SetDevice { private_key: Some(key), ..SetDevice::default() };
    assert!(!format!("{set:?}").contains("ab, ab") && !format!("{set:?}").contains("171"));
}

#[test]
fn host_bits_of_a_prefix_are_cleared() {
    let text = format!("set=1\npublic_key={KEY}\nallowed_ip=10.1.2.3/8\nallowed_ip=-fd00::1/64\n\n");
    let Ok(Request::Set(set)) = Request::parse(text.as_bytes()) else { panic!("a set request") };
    let expected = [
        AllowedIpChange::Add("10.0.0.0/8".parse().unwrap()),
        AllowedIpChange::Remove("fd00::/64".parse().unwrap()),
    ];
    assert_eq!(set.peers[0].allowed_ips, expected);
}

#[test]
fn an_answer_without_errno_is_refused_and_errno_is_reported() {
    assert_eq!(
        Device::parse(b"listen_port=1\n\n").unwrap_err().to_string(),
        "malformed answer: line 2: errno: the answer ends without errno"
    );
    assert_eq!(Device::parse(b"errno=-22\n\n"), Err(ResponseError::Errno(22)));
    assert_eq!(Device::parse(b"errno=22\n\n"), Err(ResponseError::Errno(22)));
    assert!(Device::parse(b"new_key=1\nerrno=0\n\n").is_ok(), "unknown keys of a newer device are skipped");
}

#[test]
fn limits_hold() {
    let limits = Limits { line: 10, message: 30 };
    let read =
        |text: &str| read_message(&mut text.as_bytes(), limits).map(|message| message.map(|m| m.len()));
    assert!(matches!(read("0123456789\n\n"), Ok(Some(12))));
    assert!(matches!(read("a=1\n01234567890\n\n"), Err(ReadError::LongLine { line: 2, max: 10 })));
    assert!(matches!(read("012345678901234567890123456789"), Err(ReadError::LongLine { line: 1, .. })));
    assert!(matches!(read(&"0123456\n".repeat(4)), Err(ReadError::LongMessage { max: 30 })));
    assert!(matches!(read("a=1\nb="), Err(ReadError::CutOff { line: 2 })));
    assert!(matches!(read(""), Ok(None)));
}

/// A device that answers one request with `answer` and hands back what it was asked.
fn answering(answer: String) -> (tempfile::TempDir, std::path::PathBuf, std::thread::JoinHandle<Vec<u8>>) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("wg.sock");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let thread = std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut reader = BufReader::new(&stream);
        let request = read_message(&mut reader, Limits::REQUEST).unwrap().unwrap();
        (&stream).write_all(answer.as_bytes()).unwrap();
        request.to_vec()
    });
    (directory, path, thread)
}

#[test]
fn the_blocking_client_gets_and_sets() {
    let device = Device { listen_port: 7, ..Device::default() };
    let (_directory, path, thread) = answering(device.to_text().to_string());
    assert_eq!(BlockingClient::at(path).get().unwrap(), device);
    assert_eq!(thread.join().unwrap(), b"get=1\n\n");

    let (_directory, path, thread) = answering(format_errno(-22));
    let error =
        BlockingClient::at(path).set(&SetDevice { fwmark: Some(1), ..SetDevice::default() }).unwrap_err();
    assert!(
        error.to_string().ends_with("the device refused the request: Invalid argument (os error 22)"),
        "{error}"
    );
    assert_eq!(thread.join().unwrap(), b"set=1\nfwmark=1\n\n");
}

#[tokio::test]
async fn the_async_client_gets_and_sets() {
    let device =
        Device { listen_port: 7, peers: vec![Peer::new(PublicKey([3; 32])); 500], ..Device::default() };
    let (_directory, path, thread) = answering(device.to_text().to_string());
    assert_eq!(Client::at(path).get().await.unwrap(), device);
    assert_eq!(thread.join().unwrap(), b"get=1\n\n");

    let (_directory, path, thread) = answering(format_errno(0));
    Client::at(path).set(&SetDevice::default()).await.unwrap();
    assert_eq!(thread.join().unwrap(), b"set=1\n\n");
}

#[tokio::test]
async fn clients_report_absence_and_silence() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("none.sock");
    assert!(matches!(Client::at(&path).get().await, Err(ClientError::NotRunning { .. })));
    assert!(matches!(BlockingClient::at(&path).get(), Err(ClientError::NotRunning { .. })));

    let silent = directory.path().join("silent.sock");
    let _listener = std::os::unix::net::UnixListener::bind(&silent).unwrap();
    let short = Duration::from_millis(50);
    assert!(matches!(Client::at(&silent).with_timeout(short).get().await, Err(ClientError::Timeout { .. })));
    assert!(matches!(
        BlockingClient::at(&silent).with_timeout(short).get(),
        Err(ClientError::Timeout { .. })
    ));

    let cut = directory.path().join("cut.sock");
    let listener = std::os::unix::net::UnixListener::bind(&cut).unwrap();
    let thread = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = [0; 7];
        stream.read_exact(&mut request).unwrap();
        stream.write_all(b"listen_port=1\n").unwrap();
    });
    assert!(matches!(Client::at(&cut).get().await, Err(ClientError::Read { .. })));
    thread.join().unwrap();
}
