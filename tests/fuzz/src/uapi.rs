//! Requests on the engine's socket and the answers of a device.

use mesh_sys::uapi::{Device, Limits, ReadError, Request, ResponseError, read_message};

use crate::Target;

pub(crate) const TARGET: Target = Target {
    name: "uapi",
    run,
    seeds,
    words: &[
        b"set=1\n",
        b"get=1\n",
        b"\n\n",
        b"private_key=",
        b"public_key=",
        b"preshared_key=",
        b"listen_port=",
        b"fwmark=",
        b"replace_peers=true\n",
        b"remove=true\n",
        b"update_only=true\n",
        b"endpoint=",
        b"persistent_keepalive_interval=",
        b"replace_allowed_ips=true\n",
        b"allowed_ip=",
        b"allowed_ip=-",
        b"protocol_version=1\n",
        b"errno=0\n",
        b"last_handshake_time_nsec=",
        b"[fe80::1%1]:51820",
        b"65536",
        b"18446744073709551616",
    ],
};

/// Small, so that inputs reach them.
const LIMITS: Limits = Limits { line: 160, message: 4096 };

fn run(data: &[u8]) {
    stream(data);
    match Request::parse(data) {
        Ok(request) => {
            let text = request.to_text();
            let again = Request::parse(text.as_bytes()).expect("what we write we read");
            assert_eq!(again, request);
            assert_eq!(*again.to_text(), *text);
        }
        Err(error) => {
            assert!(error.line >= 1 && error.key.chars().count() <= 64);
            assert!(error.to_string().starts_with("line "));
        }
    }
    match Device::parse(data) {
        Ok(device) => {
            let text = device.to_text();
            let again = Device::parse(text.as_bytes()).expect("what we write we read");
            assert_eq!(*again.to_text(), *text);
        }
        Err(ResponseError::Errno(errno)) => assert_ne!(errno, 0),
        Err(ResponseError::Parse(error)) => assert!(error.line >= 1),
    }
}

/// The bytes as they come over a socket: whole messages are cut out of them, within limits.
fn stream(mut data: &[u8]) {
    loop {
        let before = data.len();
        match read_message(&mut data, LIMITS) {
            Ok(Some(message)) => {
                assert!(message.len() <= LIMITS.message && message.len() == before - data.len());
                assert!(message.split(|byte| *byte == b'\n').all(|line| line.len() <= LIMITS.line));
            }
            Ok(None) => return assert_eq!(before, 0, "bytes went missing"),
            Err(ReadError::Io(error)) => panic!("memory cannot fail to be read: {error}"),
            Err(ReadError::CutOff { .. } | ReadError::LongLine { .. } | ReadError::LongMessage { .. }) => {
                return;
            }
        }
    }
}

fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let (secret, public) = ("a8".repeat(32), "b4".repeat(32));
    let set = format!(
        "set=1\nprivate_key={secret}\nlisten_port=6784\nfwmark=0\nreplace_peers=true\npublic_key={public}\n\
         preshared_key={secret}\nendpoint=192.0.2.7:6784\npersistent_keepalive_interval=25\n\
         replace_allowed_ips=true\nallowed_ip=10.32.1.0/24\nallowed_ip=fd00:1:2:3::/96\n\n"
    );
    let change = format!(
        "set=1\npublic_key={public}\nupdate_only=true\nendpoint=[2001:db8::7]:6784\nallowed_ip=-10.32.1.0/24\n\
         public_key={secret}\nremove=true\n\n"
    );
    let device = format!(
        "private_key={secret}\nlisten_port=6784\nfwmark=51\npublic_key={public}\npreshared_key={}\n\
         protocol_version=1\nendpoint=192.0.2.7:6784\nlast_handshake_time_sec=1700000000\n\
         last_handshake_time_nsec=999999999\ntx_bytes=148\nrx_bytes=92\npersistent_keepalive_interval=0\n\
         allowed_ip=10.32.1.0/24\nerrno=0\n\n",
        "00".repeat(32)
    );
    let texts = [
        ("get", "get=1\n\n".to_owned()),
        ("set", set),
        ("set-change", change),
        ("device", device),
        ("two-requests", "get=1\n\nget=1\n\n".to_owned()),
        ("refused", "errno=-22\n\n".to_owned()),
        ("port-too-large", "set=1\nlisten_port=65536\n\n".to_owned()),
    ];
    texts.into_iter().map(|(name, text)| (name, text.into_bytes())).collect()
}
