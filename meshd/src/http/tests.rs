use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;

/// A server, and a node that counts how often it makes a status.
async fn serving(
    connections: usize,
    lifetime: Duration,
) -> (SocketAddr, Arc<std::sync::atomic::AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (calls, mut called) = mpsc::channel::<Call>(100);
    let datagrams = Datagrams::bind(0, mesh_core::time::Time::ZERO).unwrap();
    let slots = Arc::new(Semaphore::new(connections));
    tokio::spawn(serve_limited(Limited { listener, slots, lifetime }, calls, datagrams));
    let statuses = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counted = Arc::clone(&statuses);
    tokio::spawn(async move {
        while let Some(call) = called.recv().await {
            if matches!(call.request, Request::Status) {
                counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            let _ = call.answer.send(Err(ApiError::new(ErrorCode::NotReady, "not yet")));
        }
    });
    (address, statuses)
}

async fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    tokio::time::timeout(Duration::from_secs(5), stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    answer
}

#[tokio::test]
async fn many_that_ask_for_metrics_at_once_ask_the_node_once() {
    let (address, statuses) = serving(64, LIFETIME).await;
    let all: Vec<_> = (0..20).map(|_| tokio::spawn(get(address, "/metrics"))).collect();
    for answer in all {
        assert!(answer.await.unwrap().contains("not yet"));
    }
    assert_eq!(statuses.load(std::sync::atomic::Ordering::Relaxed), 1);
    tokio::time::sleep(FRESH).await;
    get(address, "/metrics").await;
    assert_eq!(statuses.load(std::sync::atomic::Ordering::Relaxed), 2, "and anew after a second");
}

#[tokio::test]
async fn health_costs_no_status_and_does_not_depend_on_readiness() {
    let (address, statuses) = serving(64, LIFETIME).await;
    assert!(get(address, "/healthz").await.starts_with("HTTP/1.1 200"));
    assert!(get(address, "/readyz").await.starts_with("HTTP/1.1 503"));
    assert_eq!(statuses.load(std::sync::atomic::Ordering::Relaxed), 0);
}

#[tokio::test]
async fn connections_that_say_nothing_are_few_and_end() {
    let (address, _) = serving(3, Duration::from_millis(500)).await;
    let mut silent = Vec::new();
    for _ in 0..3 {
        silent.push(TcpStream::connect(address).await.unwrap());
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    let begun = Instant::now();
    assert!(get(address, "/healthz").await.starts_with("HTTP/1.1 200"), "as soon as there is room");
    assert!(begun.elapsed() > Duration::from_millis(200), "and not before");
    let mut byte = [0];
    assert_eq!(silent[0].read(&mut byte).await.unwrap_or(0), 0, "the silent ones are gone");
}
