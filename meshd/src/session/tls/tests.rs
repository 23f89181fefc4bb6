use super::*;
use crate::session::{MAX_FRAME_MEMBER, MAX_FRAME_UNPROVEN};
use rustls::client::ResolvesClientCert;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

const LIMIT: Duration = Duration::from_secs(5);

fn node(seed: u8) -> Identity {
    Identity::from_bytes(&[seed; 32])
}

fn tls(seed: u8) -> TlsIdentity {
    TlsIdentity::new(&node(seed)).unwrap()
}

async fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// One connection between the two; the results of the dialling and the accepting end.
async fn meet(
    dialler: &TlsIdentity,
    acceptor: &TlsIdentity,
) -> (Result<Session, SessionError>, Result<Session, SessionError>) {
    let (listener, address) = listener().await;
    tokio::join!(dial(address, dialler, LIMIT), async {
        let (tcp, _) = listener.accept().await.unwrap();
        accept(tcp, acceptor, LIMIT).await
    })
}

/// Both ends must refuse; how the dialling end learns it does not matter.
async fn refused(dialler: &TlsIdentity, acceptor: &TlsIdentity) -> (SessionError, SessionError) {
    let (at_dialler, at_acceptor) = meet(dialler, acceptor).await;
    let at_acceptor = at_acceptor.expect_err("the accepting end must refuse");
    let at_dialler = match at_dialler {
        Err(error) => error,
        Ok(mut session) => session.reader.recv().await.expect_err("the dialling end must learn it"),
    };
    (at_dialler, at_acceptor)
}

/// The same identity with another client configuration.
fn with_client(base: &TlsIdentity, change: impl FnOnce(&mut ClientConfig)) -> TlsIdentity {
    let mut client = ClientConfig::clone(&base.client);
    change(&mut client);
    TlsIdentity { client: Arc::new(client), ..base.clone() }
}

/// Shows the key of one node and signs with that of another.
fn mismatched(shown: &Identity, signing: &Identity) -> Arc<CertifiedKey> {
    let pkcs8 = signing.to_pkcs8_der();
    let signer = aws_lc_rs::sign::any_eddsa_type(&PrivatePkcs8KeyDer::from(pkcs8.as_slice())).unwrap();
    Arc::new(CertifiedKey::new(vec![CertificateDer::from(shown.public().to_spki_der().to_vec())], signer))
}

async fn echo_works(dialler: &TlsIdentity, acceptor: &TlsIdentity) {
    let (a, b) = meet(dialler, acceptor).await;
    let (mut a, mut b) = (a.unwrap(), b.unwrap());
    a.writer.send(b"ping").await.unwrap();
    assert_eq!(*b.reader.recv().await.unwrap().unwrap(), b"ping");
    b.writer.send(b"pong").await.unwrap();
    assert_eq!(*a.reader.recv().await.unwrap().unwrap(), b"pong");
}

#[tokio::test]
async fn two_identities_meet_and_share_secrets_that_no_other_session_has() {
    let (one, two) = (tls(1), tls(2));
    let (a, b) = meet(&one, &two).await;
    let (mut a, mut b) = (a.unwrap(), b.unwrap());
    assert_eq!((a.peer, b.peer), (two.public(), one.public()));
    assert_eq!(a.secrets, b.secrets);
    assert_ne!(&a.secrets.join_binding, a.secrets.psk_seed.expose());
    assert!(a.slot.is_none() && b.slot.is_some());

    // The same two again: fresh secrets, full handshake.
    let (again, _) = meet(&one, &two).await;
    let again = again.unwrap();
    assert_ne!(again.secrets.join_binding, a.secrets.join_binding);
    assert_ne!(again.secrets.psk_seed, a.secrets.psk_seed);

    a.writer.send(&[1; MAX_FRAME_UNPROVEN]).await.unwrap();
    assert_eq!(*b.reader.recv().await.unwrap().unwrap(), [1; MAX_FRAME_UNPROVEN]);
    a.trust_peer();
    b.trust_peer();
    assert!(b.slot.is_none());
    b.writer.send(&vec![2; MAX_FRAME_MEMBER]).await.unwrap();
    assert_eq!(*a.reader.recv().await.unwrap().unwrap(), vec![2; MAX_FRAME_MEMBER]);
    drop(a);
    assert!(b.reader.recv().await.unwrap().is_none(), "a farewell");
}

#[tokio::test]
async fn a_frame_beyond_the_limit_ends_the_session() {
    let (a, b) = meet(&tls(1), &tls(2)).await;
    let (a, mut b) = (a.unwrap(), b.unwrap());
    a.writer.set_max_frame(MAX_FRAME_MEMBER);
    a.writer.send(&[0; MAX_FRAME_UNPROVEN + 1]).await.unwrap();
    let error = b.reader.recv().await.unwrap_err();
    assert!(
        matches!(error, SessionError::FrameLength { direction: "from", found: 65_537, max: 65_536, .. }),
        "{error}"
    );
}

#[tokio::test]
async fn a_node_that_dials_itself_sees_its_own_key() {
    let own = tls(1);
    let (a, _b) = meet(&own, &own).await;
    assert_eq!(a.unwrap().peer, own.public());
}

#[tokio::test]
async fn a_classical_key_exchange_is_refused_by_either_end() {
    for classical in
        [aws_lc_rs::kx_group::X25519, aws_lc_rs::kx_group::SECP256R1, aws_lc_rs::kx_group::MLKEM768]
    {
        let groups = CryptoProvider { kx_groups: vec![classical], ..provider().unwrap() };
        let other = TlsIdentity::with_provider(&node(1), Arc::new(groups)).unwrap();
        let (at_dialler, at_acceptor) = refused(&other, &tls(2)).await;
        assert!(matches!(at_acceptor, SessionError::Incompatible { .. }), "{at_acceptor}");
        assert!(at_acceptor.to_string().contains("X25519MLKEM768"), "{at_acceptor}");
        assert!(matches!(at_dialler, SessionError::Refused { .. }), "{at_dialler}");
        let (at_dialler, at_acceptor) = refused(&tls(2), &other).await;
        assert!(matches!(at_acceptor, SessionError::Incompatible { .. }), "{at_acceptor}");
        assert!(matches!(at_dialler, SessionError::Refused { .. }), "{at_dialler}");
    }
}

#[tokio::test]
async fn the_hybrid_is_chosen_also_when_the_dialler_offers_more() {
    let groups = vec![aws_lc_rs::kx_group::X25519, aws_lc_rs::kx_group::X25519MLKEM768];
    let lax = CryptoProvider { kx_groups: groups, ..provider().unwrap() };
    let lax = TlsIdentity::with_provider(&node(1), Arc::new(lax)).unwrap();
    let (listener, address) = listener().await;
    let acceptor = tls(2);
    let client = async {
        let tcp = TcpStream::connect(address).await.unwrap();
        let name = ServerName::from(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        TlsConnector::from(Arc::clone(&lax.client)).connect(name, tcp).await.unwrap()
    };
    let server = async { accept(listener.accept().await.unwrap().0, &acceptor, LIMIT).await.unwrap() };
    let (client, _session) = tokio::join!(client, server);
    let group = client.get_ref().1.negotiated_key_exchange_group().unwrap().name();
    assert_eq!(group, rustls::NamedGroup::X25519MLKEM768);
}

/// A TLS 1.2 ClientHello (RFC 5246, section 7.4.1.2) with one cipher suite, X25519 and Ed25519.
fn tls12_client_hello() -> Vec<u8> {
    let extensions = [
        &[0x00, 0x0a, 0, 4, 0, 2, 0x00, 0x1d][..], // supported_groups: x25519
        &[0x00, 0x0b, 0, 2, 1, 0],                 // ec_point_formats: uncompressed
        &[0x00, 0x0d, 0, 6, 0, 4, 0x08, 0x07, 0x04, 0x03], // signature_algorithms: ed25519, ecdsa_p256
    ]
    .concat();
    let mut body = vec![3, 3];
    body.extend([0x5a; 32]); // random
    body.extend([0, 0, 2, 0xc0, 0x2b, 1, 0]); // no session id, one cipher suite, no compression
    body.extend((extensions.len() as u16).to_be_bytes());
    body.extend(extensions);
    let handshake = [&[1, 0][..], &(body.len() as u16).to_be_bytes(), &body].concat();
    [&[0x16, 3, 1][..], &(handshake.len() as u16).to_be_bytes(), &handshake].concat()
}

#[tokio::test]
async fn tls_1_2_is_refused() {
    let (listener, address) = listener().await;
    let acceptor = tls(2);
    let mut tcp = TcpStream::connect(address).await.unwrap();
    tcp.write_all(&tls12_client_hello()).await.unwrap();
    let error = accept(listener.accept().await.unwrap().0, &acceptor, LIMIT).await.unwrap_err();
    assert!(matches!(error, SessionError::Incompatible { .. }), "{error}");
    assert!(error.to_string().contains("TLS 1.3"), "{error}");
    let mut answer = Vec::new();
    tcp.read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer, [0x15, 3, 3, 0, 2, 2, 70], "a fatal protocol_version alert");
}

#[tokio::test]
async fn nobody_can_pass_for_another_identity() {
    // The client shows the key of node 9 and holds that of node 1.
    let impostor = with_client(&tls(1), |client| {
        let key = mismatched(&node(9), &node(1));
        client.client_auth_cert_resolver = Arc::new(AlwaysResolvesClientRawPublicKeys::new(key));
    });
    let (_, at_acceptor) = refused(&impostor, &tls(2)).await;
    assert!(matches!(at_acceptor, SessionError::Tls { .. }), "{at_acceptor}");
    assert!(at_acceptor.to_string().contains("BadSignature"), "{at_acceptor}");
    // The server does.
    let mut server = ServerConfig::clone(&tls(1).server);
    server.cert_resolver = Arc::new(AlwaysResolvesServerRawPublicKeys::new(mismatched(&node(9), &node(1))));
    let impostor = TlsIdentity { server: Arc::new(server), ..tls(1) };
    let (at_dialler, _) = refused(&tls(2), &impostor).await;
    assert!(at_dialler.to_string().contains("BadSignature"), "{at_dialler}");
}

#[derive(Debug)]
struct NoKey;

impl ResolvesClientCert for NoKey {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        None
    }
    fn only_raw_public_keys(&self) -> bool {
        true
    }
    fn has_certs(&self) -> bool {
        true
    }
}

#[tokio::test]
async fn a_client_without_a_key_is_refused() {
    let anonymous = with_client(&tls(1), |client| client.client_auth_cert_resolver = Arc::new(NoKey));
    let (at_dialler, at_acceptor) = refused(&anonymous, &tls(2)).await;
    assert!(matches!(at_acceptor, SessionError::Incompatible { .. }), "{at_acceptor}");
    assert!(at_acceptor.to_string().contains("no certificates"), "{at_acceptor}");
    assert!(matches!(at_dialler, SessionError::Lost { .. } | SessionError::Refused { .. }), "{at_dialler}");
}

/// Takes any certificate; stands for a browser or another TLS program.
#[derive(Debug)]
struct Anything(RawKeys);

impl ServerCertVerifier for Anything {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        Ok(ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        Err(no_tls12())
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        key: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        self.0.check_signature(message, key, signature)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
}

#[tokio::test]
async fn a_client_that_speaks_x509_only_is_refused() {
    let provider = Arc::new(provider().unwrap());
    let verifier = Anything(RawKeys { algorithms: provider.signature_verification_algorithms });
    let mut browser = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    browser.alpn_protocols = vec![ALPN.to_vec()];
    let browser = TlsIdentity { client: Arc::new(browser), ..tls(1) };
    let (at_dialler, at_acceptor) = refused(&browser, &tls(2)).await;
    assert!(matches!(at_acceptor, SessionError::Incompatible { .. }), "{at_acceptor}");
    assert!(matches!(at_dialler, SessionError::Refused { .. }), "{at_dialler}");
}

#[tokio::test]
async fn another_protocol_inside_tls_is_refused() {
    for protocols in [vec![], vec![b"h2".to_vec()], vec![b"hauberk/2".to_vec()]] {
        let other = with_client(&tls(1), |client| client.alpn_protocols = protocols);
        let (_, at_acceptor) = refused(&other, &tls(2)).await;
        assert!(matches!(at_acceptor, SessionError::Incompatible { .. }), "{at_acceptor}");
    }
}

#[test]
fn only_one_usable_ed25519_key_is_an_identity() {
    let der = |bytes: &[u8]| CertificateDer::from(bytes.to_vec());
    let good = node(1).public().to_spki_der();
    assert!(RawKeys::check_key(&der(&good), &[]).is_ok());
    assert!(RawKeys::check_key(&der(&good), &[der(&good)]).is_err(), "a chain");
    assert!(RawKeys::check_key(&der(&[]), &[]).is_err());
    let weak = IdentityKey::from_bytes([0; 32]).to_spki_der();
    assert!(RawKeys::check_key(&der(&weak), &[]).is_err(), "a key of small order");
    let mut x25519 = good;
    x25519[8] = 0x6e; // OID 1.3.101.110
    assert!(RawKeys::check_key(&der(&x25519), &[]).is_err(), "a key for something else");
}

#[tokio::test]
async fn garbage_is_refused_at_once_and_disturbs_nobody() {
    let (listener, address) = listener().await;
    let (acceptor, dialler) = (tls(2), tls(1));
    for garbage in
        [&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..], &[0; 600], &[0xff; 100], &[0x16, 3, 1, 0xff, 0xff, 9]]
    {
        let mut stranger = TcpStream::connect(address).await.unwrap();
        stranger.write_all(garbage).await.unwrap();
        let error = accept(listener.accept().await.unwrap().0, &acceptor, LIMIT).await.unwrap_err();
        assert!(matches!(error, SessionError::NotTls { .. }), "{error}");
        assert!(error.to_string().contains("another program's port"), "{error}");
    }
    // A port scanner: connects and closes.
    drop(TcpStream::connect(address).await.unwrap());
    let error = accept(listener.accept().await.unwrap().0, &acceptor, LIMIT).await.unwrap_err();
    assert!(matches!(error, SessionError::HandshakeCut { .. }), "{error}");
    echo_works(&dialler, &acceptor).await;
}

#[tokio::test]
async fn a_handshake_that_dribbles_times_out_while_others_go_on() {
    let (listener, address) = listener().await;
    let acceptor = tls(2);
    let limit = Duration::from_millis(1500);
    let mut slow = TcpStream::connect(address).await.unwrap();
    let (tcp, _) = listener.accept().await.unwrap();
    let started = Instant::now();
    let waiting = tokio::spawn({
        let acceptor = acceptor.clone();
        async move { accept(tcp, &acceptor, limit).await }
    });
    let dribble = tokio::spawn(async move {
        for byte in tls12_client_hello() {
            if slow.write_all(&[byte]).await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(40)).await;
        }
    });
    echo_works(&tls(1), &acceptor).await;
    assert!(!waiting.is_finished());
    let error = waiting.await.unwrap().unwrap_err();
    assert!(matches!(error, SessionError::Timeout { step: "the TLS handshake", .. }), "{error}");
    assert!(started.elapsed() >= limit && started.elapsed() < limit * 4, "{:?}", started.elapsed());
    dribble.await.unwrap();
}

#[tokio::test]
async fn a_port_that_answers_nothing_and_a_closed_one_are_told_apart() {
    let (silent, address) = listener().await;
    let limit = Duration::from_millis(300);
    let error = dial(address, &tls(1), limit).await.unwrap_err();
    assert!(matches!(error, SessionError::Timeout { step: "the TLS handshake", .. }), "{error}");
    drop(silent);
    let error = dial(address, &tls(1), limit).await.unwrap_err();
    assert!(matches!(error, SessionError::Connect { .. }), "{error}");
    assert!(
        error.to_string().starts_with(&format!("cannot connect to {address}: Connection refused")),
        "{error}"
    );
}

#[tokio::test]
async fn a_source_with_too_many_silent_connections_is_refused_until_they_end() {
    let (listener, address) = listener().await;
    let acceptor = tls(2);
    let mut silent = Vec::new();
    let mut waiting = Vec::new();
    for _ in 0..16 {
        silent.push(TcpStream::connect(address).await.unwrap());
        let (tcp, _) = listener.accept().await.unwrap();
        let acceptor = acceptor.clone();
        waiting.push(tokio::spawn(async move { accept(tcp, &acceptor, Duration::from_secs(3)).await }));
    }
    // The 16 take their slots when their tasks first run, which is before this one waits for anything.
    let error = meet(&tls(1), &acceptor).await.1.unwrap_err();
    assert!(matches!(error, SessionError::TooManyHandshakes { .. }), "{error}");
    for task in waiting {
        let error = task.await.unwrap().unwrap_err();
        assert!(matches!(error, SessionError::Timeout { .. }), "{error}");
    }
    echo_works(&tls(1), &acceptor).await;
}

#[tokio::test]
async fn a_connection_that_is_cut_is_not_taken_for_a_farewell() {
    let (listener, address) = listener().await;
    let acceptor = tls(2);
    let client = async {
        let tcp = TcpStream::connect(address).await.unwrap();
        let name = ServerName::from(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        TlsConnector::from(Arc::clone(&tls(1).client)).connect(name, tcp).await.unwrap()
    };
    let server = async { accept(listener.accept().await.unwrap().0, &acceptor, LIMIT).await.unwrap() };
    let (client, mut session) = tokio::join!(client, server);
    // The end of the TCP stream, which anyone on the way can forge, without TLS's own farewell.
    drop(client.into_inner().0);
    let error = session.reader.recv().await.unwrap_err();
    assert!(matches!(error, SessionError::CutOff { .. } | SessionError::Lost { .. }), "{error}");
}

#[tokio::test]
async fn sockets_notice_a_dead_peer_within_fifteen_seconds() {
    let (listener, address) = listener().await;
    let tcp = TcpStream::connect(address).await.unwrap();
    prepare(&tcp).unwrap();
    let socket = SockRef::from(&tcp);
    assert!(tcp.nodelay().unwrap() && socket.keepalive().unwrap());
    // The first probe that comes later than the user timeout ends the connection (seen with a router
    // that stops forwarding: 14 s).
    let timeout = socket.tcp_user_timeout().unwrap().unwrap();
    let (idle, step) = (socket.tcp_keepalive_time().unwrap(), socket.tcp_keepalive_interval().unwrap());
    let last = (0..).map(|probe| idle + step * probe).find(|at| *at >= timeout).unwrap();
    assert!(last <= Duration::from_secs(15), "{last:?}");
    drop(listener);
}
