//! The configuration protocol, by `wg` and by hand.

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use mesh_sys::uapi::socket_path;

use crate::support::{Keys, Kind, Namespace, Process, eventually, psk, require_root};

/// Sends `text` and reads the answers to the end.
fn talk(device: &Process, text: &str) -> String {
    let mut stream = UnixStream::connect(socket_path(&device.interface)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream.write_all(text.as_bytes()).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn wg_shows_sets_syncs_and_dumps() {
    require_root();
    let namespace = Namespace::new();
    let device = Process::start(Kind::Mesh, &namespace);
    let interface = device.interface.as_str();
    let [own, first, second] = [(); 3].map(|()| Keys::generate());
    let psk = psk();

    // Fresh: no key, no port.
    let shown = namespace.exec(&["wg", "show", interface]);
    assert_eq!(shown.trim(), format!("interface: {interface}"));

    let (key_file, psk_file) = (device.secret_file(&own.private), device.secret_file(&psk));
    namespace.exec(&[
        "wg",
        "set",
        interface,
        "private-key",
        &key_file,
        "listen-port",
        "0",
        "fwmark",
        "77",
        "peer",
        &first.public,
        "preshared-key",
        &psk_file,
        "endpoint",
        "[2001:db8::7]:7777",
        "persistent-keepalive",
        "25",
        "allowed-ips",
        "10.0.0.0/8,fd00::/8",
    ]);
    let port = device.state().listen_port;
    assert_ne!(port, 0, "0 means a random port, and which is reported");
    let dump = namespace.exec(&["wg", "show", interface, "dump"]);
    let mut lines = dump.lines();
    assert_eq!(lines.next().unwrap(), format!("{}\t{}\t{port}\t0x4d", own.private, own.public));
    let peer: Vec<_> = lines.next().unwrap().split('\t').collect();
    assert_eq!(peer[..4], [first.public.as_str(), &psk, "[2001:db8::7]:7777", "10.0.0.0/8,fd00::/8"]);
    assert_eq!(peer[7], "25");

    // What showconf prints, setconf takes, and the result is the same.
    let configuration = namespace.exec(&["wg", "showconf", interface]);
    namespace.exec(&["wg", "setconf", interface, &device.secret_file(&configuration)]);
    assert_eq!(namespace.exec(&["wg", "showconf", interface]), configuration);
    assert_eq!(device.state().listen_port, port);

    // syncconf: one peer replaced by another, the rest as it is.
    let wanted = configuration.replace(&first.public, &second.public);
    namespace.exec(&["wg", "syncconf", interface, &device.secret_file(&wanted)]);
    let shown = namespace.exec(&["wg", "show", interface, "peers"]);
    assert_eq!(shown.trim(), second.public);

    // A port that is taken is refused, and everything is as before.
    let taken = namespace.inside(|| std::net::UdpSocket::bind("0.0.0.0:0").unwrap());
    let taken_port = taken.local_addr().unwrap().port();
    let output = namespace.try_exec(&["wg", "set", interface, "listen-port", &taken_port.to_string()]);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && error.contains("Address already in use"), "{error}");
    assert_eq!(device.state().listen_port, port);

    // Everything is taken back.
    namespace.exec(&["wg", "set", interface, "private-key", "/dev/null", "fwmark", "off"]);
    let state = device.state();
    assert!(state.private_key.is_none() && state.fwmark == 0);
}

#[test]
fn a_device_is_no_peer_of_its_own() {
    require_root();
    let namespace = Namespace::new();
    let device = Process::start(Kind::Mesh, &namespace);
    let own = Keys::generate();
    let file = device.secret_file(&own.private);
    namespace.exec(&["wg", "set", &device.interface, "peer", &own.public, "allowed-ips", "10.0.0.1/32"]);
    assert_eq!(device.state().peers.len(), 1);
    namespace.exec(&["wg", "set", &device.interface, "private-key", &file]);
    assert!(device.state().peers.is_empty());
    namespace.exec(&["wg", "set", &device.interface, "peer", &own.public, "allowed-ips", "10.0.0.1/32"]);
    assert!(device.state().peers.is_empty());
}

#[test]
fn malformed_requests_are_answered_logged_by_name_and_change_nothing() {
    require_root();
    let namespace = Namespace::new();
    let device = Process::start(Kind::Mesh, &namespace);
    let key = "ab".repeat(32);
    let secret = "5eC4e7".repeat(11);
    for (request, logged) in [
        ("set=1\nlisten_port=99999\n\n".to_owned(), "line 2: listen_port: expected a number"),
        (format!("set=1\nfwmark=7\npublic_key={key}\nallowed_ip=1.2.3.4/99\n\n"), "line 4: allowed_ip: "),
        (format!("set=1\npublic_key={key}\nendpoint=nowhere\n\n"), "line 3: endpoint: "),
        (format!("set=1\nprivate_key={secret}\n\n"), "line 2: private_key: a key has 64 hexadecimal digits"),
        (format!("set=1\npublic_key={key}\npreshared_key={secret}\n\n"), "line 3: preshared_key: "),
        ("set=1\nno_such_key=1\n\n".to_owned(), "line 2: no_such_key: unknown key for the device"),
        ("set=2\n\n".to_owned(), "line 1: set: a request starts with"),
        ("\n".to_owned(), "line 1: "),
        (format!("set=1\n{}\n\n", "x".repeat(600)), "line 2 is longer than 512 bytes"),
        ("set=1\nfwmark=7\n".to_owned(), "cut off at line 3"),
    ] {
        let answer = talk(&device, &request);
        assert_eq!(answer, "errno=-22\n\n", "{request}");
        let log = || device.log();
        eventually(&format!("{logged:?} in the log:\n{}", log()), Duration::from_secs(2), || {
            log().contains(logged)
        });
    }
    assert!(!device.log().contains("5eC4e7"), "no secret in the log");
    assert_eq!(device.state(), mesh_sys::uapi::Device::default());
}

#[test]
fn one_connection_serves_many_requests_and_clients_do_not_wait_for_each_other() {
    require_root();
    let namespace = Namespace::new();
    let device = Process::start(Kind::Mesh, &namespace);
    let idle: Vec<_> =
        (0..10).map(|_| UnixStream::connect(socket_path(&device.interface)).unwrap()).collect();
    let answer = talk(&device, "set=1\nfwmark=5\n\nget=1\n\nset=1\nfwmark=0\n\nget=1\n\n");
    let parts: Vec<_> = answer.split("\n\n").collect();
    assert_eq!(parts.len(), 5, "{answer}");
    assert!(parts[1].contains("fwmark=5") && !parts[3].contains("fwmark"), "{answer}");
    // Too many at a time are turned away, and there is room again when they go.
    let crowd: Vec<_> =
        (0..40).map(|_| UnixStream::connect(socket_path(&device.interface)).unwrap()).collect();
    eventually("some are turned away", Duration::from_secs(5), || device.log().contains("turned away"));
    drop((idle, crowd));
    eventually("there is room again", Duration::from_secs(5), || {
        let mut stream = UnixStream::connect(socket_path(&device.interface)).unwrap();
        let mut answer = String::new();
        let asked = stream.write_all(b"get=1\n\n").and_then(|()| stream.shutdown(Shutdown::Write));
        asked.is_ok() && stream.read_to_string(&mut answer).is_ok() && answer.contains("errno=0")
    });
}
