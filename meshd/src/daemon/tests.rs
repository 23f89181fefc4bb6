use std::path::Path;

use mesh_core::api::ApiError;
use mesh_core::state::Stored;

use super::*;
use crate::config::Settings;

#[tokio::test]
async fn each_side_gets_its_turn_however_much_the_others_have() {
    const EACH: usize = 400;
    let (links_in, links) = mpsc::channel(EACH);
    let (inputs, input) = mpsc::channel(EACH);
    let (calls, called) = mpsc::channel(EACH);
    let (received, datagrams) = mpsc::channel(EACH);
    let target = SocketAddr::from(([192, 0, 2, 1], 6783));
    for _ in 0..EACH {
        links_in.try_send(LinkEvent::DialFailed(target, String::new())).unwrap();
        inputs.try_send(Input::Seeds(Vec::new())).unwrap();
        let datagram = Input::Datagram { from: target, to: None, bytes: Vec::new() };
        received.try_send((Time::ZERO, datagram)).unwrap();
    }
    let (answer, _answered) = oneshot::channel::<Result<Response, ApiError>>();
    calls.try_send(Call { request: node::Request::Ready, answer }).unwrap();
    let mut inbox = Inbox { links, input, called, datagrams: Incoming::of(datagrams) };
    let mut before = (0, 0, 0);
    loop {
        match inbox.next(|| Time::ZERO).await {
            Arrived::Link(_) => before.0 += 1,
            Arrived::Input(Input::Seeds(_)) => before.1 += 1,
            Arrived::Input(_) => before.2 += 1,
            Arrived::Call(_) => break,
            Arrived::NoDatagrams => panic!("they still come"),
        }
    }
    // With four sides that all have something, one comes after 100 others once in 10^12 times.
    assert!(before.0 + before.1 + before.2 < 100, "{before:?} came before a request");
    let mut seen = [0, 0, 0];
    for _ in 0..200 {
        match inbox.next(|| Time::ZERO).await {
            Arrived::Link(_) => seen[0] += 1,
            Arrived::Input(Input::Seeds(_)) => seen[1] += 1,
            Arrived::Input(_) => seen[2] += 1,
            Arrived::Call(_) | Arrived::NoDatagrams => panic!("there was one, and datagrams still come"),
        }
    }
    assert!(seen.iter().all(|turns| *turns > 20), "{seen:?}");
    drop((received, links_in, inputs, calls));
    let end = async { while !matches!(inbox.next(|| Time::ZERO).await, Arrived::NoDatagrams) {} };
    tokio::time::timeout(Duration::from_secs(5), end)
        .await
        .expect("it is noticed that no datagrams come any more");
}

#[test]
fn the_limit_of_open_files_is_raised() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, 512.min(hard), hard).unwrap();
    assert_eq!(raise_open_files().unwrap(), hard);
    assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap(), (hard, hard));
}

fn settings(dir: &Path) -> Settings {
    Settings {
        key_file: Some(dir.join("key")),
        state_dir: Some(dir.join("state")),
        control_socket: Some(dir.join("run/meshd.sock")),
        metrics_listen: Some("off".to_owned()),
        ..Settings::default()
    }
}

/// What the daemon says when it cannot start, and what is on disk then.
async fn fails(settings: Settings) -> (String, Stored) {
    let config = settings.check().unwrap();
    let dir = config.state_dir.clone();
    let error = run(config).await.unwrap_err();
    (format!("{error:#}"), Store::open(&dir).unwrap().read().unwrap())
}

#[tokio::test]
async fn a_start_that_fails_is_not_counted() {
    let dir = tempfile::tempdir().unwrap();
    let (error, stored) = fails(settings(dir.path())).await;
    assert!(error.contains("key-file"), "{error}");
    assert_eq!(stored.node.generation, 0);

    let key = JoinKey::generate(&mut OsRng).to_text();
    files::write_atomic(&dir.path().join("key"), key.as_bytes(), 0o600).unwrap();
    let taken = std::net::TcpListener::bind("[::]:0").unwrap();
    let port = Some(taken.local_addr().unwrap().port());
    let (error, stored) = fails(Settings { port, ..settings(dir.path()) }).await;
    assert!(error.contains("port") && stored.node.generation == 0, "{error}");

    drop(taken);
    let other = api::bind(&dir.path().join("run/meshd.sock")).unwrap();
    let (error, stored) = fails(Settings { port, ..settings(dir.path()) }).await;
    assert!(error.contains("another meshd answers") && stored.node.generation == 0, "{error}");
    drop(other);
}

#[test]
fn addresses_need_no_resolver() {
    let seeds = ["192.0.2.1", "[2001:db8::1]:99", "name"];
    let seeds = seeds.map(|text| unresolved(&crate::config::join_address(text, 6783).unwrap()));
    assert_eq!(seeds[0].addresses, ["192.0.2.1:6783".parse().unwrap()]);
    assert_eq!(seeds[1].addresses, ["[2001:db8::1]:99".parse().unwrap()]);
    assert_eq!((seeds[2].addresses.len(), seeds[2].text.as_str()), (0, "name:6783"));
}
