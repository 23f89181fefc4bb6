//! TLS between two identities.
//!
//! Every valid Ed25519 key is let through here: the handshake proves who the other end is, not that
//! it may take part.

use super::gate::HandshakeGate;
use super::{Remote, Session, SessionError};
use mesh_keys::{ExporterError, Identity, IdentityKey, Secret32, SecureChannel, SessionSecrets};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{AlwaysResolvesClientRawPublicKeys, Resumption};
use rustls::crypto::{
    CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs, verify_tls13_signature_with_raw_key,
};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{AlwaysResolvesServerRawPublicKeys, NoServerSessionStorage};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error as TlsError,
    HandshakeKind, PeerIncompatible, ServerConfig, SignatureScheme,
};
use socket2::{SockRef, TcpKeepalive};
use std::fmt;
use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{Instant, timeout_at};
use tokio_rustls::{Connect, TlsAcceptor, TlsConnector, TlsStream};

/// Names the protocol inside the session, with its version.
pub const ALPN: &[u8] = b"hauberk/1";

/// This node's side of all control sessions: its key, and the limit on strangers.
#[derive(Clone)]
pub struct TlsIdentity {
    public: IdentityKey,
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    gate: Arc<HandshakeGate>,
}

impl TlsIdentity {
    /// Prepares `identity` for control sessions. Make one per process: the limit on unproven
    /// connections is counted here.
    ///
    /// # Errors
    /// [`SessionError::Identity`] if the TLS library refuses the key.
    pub fn new(identity: &Identity) -> Result<Self, SessionError> {
        Self::with_provider(identity, Arc::new(provider()?))
    }

    fn with_provider(identity: &Identity, provider: Arc<CryptoProvider>) -> Result<Self, SessionError> {
        let public = identity.public();
        let pkcs8 = identity.to_pkcs8_der();
        let signer =
            aws_lc_rs::sign::any_eddsa_type(&PrivatePkcs8KeyDer::from(pkcs8.as_slice())).map_err(unusable)?;
        // A raw public key takes the place of the certificate (RFC 7250).
        let key =
            Arc::new(CertifiedKey::new(vec![CertificateDer::from(public.to_spki_der().to_vec())], signer));
        let verifier = Arc::new(RawKeys { algorithms: provider.signature_verification_algorithms });

        let mut client = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(unusable)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::clone(&verifier) as _)
            .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(Arc::clone(&key))));
        client.alpn_protocols = vec![ALPN.to_vec()];
        client.resumption = Resumption::disabled();
        client.enable_sni = false;
        client.enable_early_data = false;

        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(unusable)?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(key)));
        server.alpn_protocols = vec![ALPN.to_vec()];
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        server.max_early_data_size = 0;

        Ok(Self { public, client: Arc::new(client), server: Arc::new(server), gate: Arc::default() })
    }

    /// The identity that other ends see.
    #[must_use]
    pub const fn public(&self) -> IdentityKey {
        self.public
    }
}

impl fmt::Debug for TlsIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsIdentity").field("public", &self.public).finish_non_exhaustive()
    }
}

/// Connects to `remote` and sets up a session, all within `limit` (5 s are plenty).
///
/// Who answers is in [`Session::peer`]; it may be this node itself.
///
/// # Errors
/// [`SessionError`], one sentence for the operator.
pub async fn dial(
    remote: SocketAddr,
    identity: &TlsIdentity,
    limit: Duration,
) -> Result<Session, SessionError> {
    let (deadline, target) = (Instant::now() + limit, remote);
    let remote = Remote::At(target);
    let expired = |step| SessionError::Timeout { remote, step, after: limit };
    let tcp = timeout_at(deadline, connect(target))
        .await
        .map_err(|_| expired("the TCP connection"))?
        .map_err(|source| SessionError::Connect { remote, source })?;
    prepare(&tcp).map_err(|source| SessionError::Socket { remote, source })?;
    let handshake = call(identity, tcp);
    let stream = finish(remote, handshake, deadline).await.ok_or_else(|| expired("the TLS handshake"))??;
    established(remote, TlsStream::from(stream))
}

async fn connect(target: SocketAddr) -> io::Result<TcpStream> {
    let socket = if target.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    SockRef::from(&socket).set_tcp_mss(MAX_SEGMENT)?;
    socket.connect(target).await
}

/// The dialling end's part of the handshake.
fn call<S: AsyncRead + AsyncWrite + Unpin>(identity: &TlsIdentity, stream: S) -> Connect<S> {
    // The name is neither sent nor compared: identities are keys, not names.
    let name = ServerName::from(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
    TlsConnector::from(Arc::clone(&identity.client)).connect(name, stream)
}

/// Sets up a session on a connection that another member carries, as the end that dials or the one that accepts.
///
/// # Errors
/// [`SessionError`], one sentence for the operator. Nothing but this connection is affected.
pub async fn carried<S>(
    stream: S,
    dials: bool,
    identity: &TlsIdentity,
    limit: Duration,
) -> Result<Session, SessionError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (remote, deadline) = (Remote::Carried, Instant::now() + limit);
    let expired = || SessionError::Timeout { remote, step: "the TLS handshake", after: limit };
    let stream = if dials {
        TlsStream::from(finish(remote, call(identity, stream), deadline).await.ok_or_else(expired)??)
    } else {
        let handshake = TlsAcceptor::from(Arc::clone(&identity.server)).accept(stream);
        TlsStream::from(finish(remote, handshake, deadline).await.ok_or_else(expired)??)
    };
    established(remote, stream)
}

/// Sets up a session on a connection that came in, within `limit` (5 s are plenty).
///
/// # Errors
/// [`SessionError`], one sentence for the operator. Nothing but this connection is affected.
pub async fn accept(
    tcp: TcpStream,
    identity: &TlsIdentity,
    limit: Duration,
) -> Result<Session, SessionError> {
    let deadline = Instant::now() + limit;
    let unspecified = Remote::At(SocketAddr::from(([0, 0, 0, 0], 0)));
    let source = tcp.peer_addr().map_err(|source| SessionError::Socket { remote: unspecified, source })?;
    let remote = Remote::At(source);
    let slot = identity
        .gate
        .enter(source.ip())
        .map_err(|limit| SessionError::TooManyHandshakes { remote, limit })?;
    prepare(&tcp).map_err(|source| SessionError::Socket { remote, source })?;
    let handshake = TlsAcceptor::from(Arc::clone(&identity.server)).accept(tcp);
    let stream = finish(remote, handshake, deadline).await.ok_or(SessionError::Timeout {
        remote,
        step: "the TLS handshake",
        after: limit,
    })??;
    let mut session = established(remote, TlsStream::from(stream))?;
    session.slot = Some(slot);
    Ok(session)
}

/// `None` if the deadline came first.
async fn finish<S>(
    remote: Remote,
    handshake: impl Future<Output = io::Result<S>>,
    deadline: Instant,
) -> Option<Result<S, SessionError>> {
    let outcome = timeout_at(deadline, handshake).await.ok()?;
    Some(outcome.map_err(|error| handshake_error(remote, error)))
}

fn established<S>(remote: Remote, stream: TlsStream<S>) -> Result<Session, SessionError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let failed = |reason: &str| SessionError::Tls { remote, reason: reason.to_owned() };
    let (_, connection) = stream.get_ref();
    if connection.alpn_protocol() != Some(ALPN) {
        let reason = "it did not agree on the protocol hauberk/1".to_owned();
        return Err(SessionError::Incompatible { remote, reason });
    }
    // The secrets of a resumed session would not be fresh; it is switched off, and checked here.
    if !matches!(
        connection.handshake_kind(),
        Some(HandshakeKind::Full | HandshakeKind::FullWithHelloRetryRequest)
    ) {
        return Err(failed("the session is not a fresh one"));
    }
    let peer = match connection.peer_certificates() {
        Some([key]) => IdentityKey::from_spki_der(key),
        _ => None,
    }
    .ok_or_else(|| failed("it showed no Ed25519 key"))?;
    let secrets = SessionSecrets::derive(&Established { peer, stream: &stream })
        .map_err(|error| failed(&error.to_string()))?;
    let (reader, writer) = super::framing::split(remote, stream);
    Ok(Session { peer, remote, secrets, reader, writer, slot: None })
}

struct Established<'a, S> {
    peer: IdentityKey,
    stream: &'a TlsStream<S>,
}

impl<S> SecureChannel for Established<'_, S> {
    fn peer(&self) -> IdentityKey {
        self.peer
    }

    fn exporter(&self, label: &str, context: &[u8]) -> Result<Secret32, ExporterError> {
        let (label, context, into) = (label.as_bytes(), Some(context), [0; 32]);
        match self.stream {
            TlsStream::Client(stream) => stream.get_ref().1.export_keying_material(into, label, context),
            TlsStream::Server(stream) => stream.get_ref().1.export_keying_material(into, label, context),
        }
        .map(Secret32::from_bytes)
        .map_err(|_| ExporterError)
    }
}

/// Takes any usable Ed25519 key for an identity, and checks that the other end holds its secret half.
#[derive(Debug)]
struct RawKeys {
    algorithms: WebPkiSupportedAlgorithms,
}

impl RawKeys {
    fn check_key(key: &CertificateDer<'_>, rest: &[CertificateDer<'_>]) -> Result<(), TlsError> {
        if rest.is_empty() && IdentityKey::from_spki_der(key).is_some() {
            Ok(())
        } else {
            Err(TlsError::InvalidCertificate(CertificateError::BadEncoding))
        }
    }

    fn check_signature(
        &self,
        message: &[u8],
        key: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        let key = SubjectPublicKeyInfoDer::from(key.as_ref());
        verify_tls13_signature_with_raw_key(message, &key, signature, &self.algorithms)
    }
}

/// TLS 1.2 is not compiled into the configuration; reaching this would be a fault in the library.
fn no_tls12() -> TlsError {
    TlsError::PeerIncompatible(PeerIncompatible::Tls12NotOffered)
}

impl ServerCertVerifier for RawKeys {
    fn verify_server_cert(
        &self,
        key: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        Self::check_key(key, rest).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _key: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        key: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        self.check_signature(message, key, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

impl ClientCertVerifier for RawKeys {
    fn client_auth_mandatory(&self) -> bool {
        true
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        key: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, TlsError> {
        Self::check_key(key, rest).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _key: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        key: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        self.check_signature(message, key, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

/// One key exchange, one signature scheme, the cipher suites of TLS 1.3.
fn provider() -> Result<CryptoProvider, SessionError> {
    let base = aws_lc_rs::default_provider();
    let mapping = base.signature_verification_algorithms.mapping;
    let ed25519 =
        mapping.iter().position(|(scheme, _)| *scheme == SignatureScheme::ED25519).ok_or_else(|| {
            SessionError::Identity { reason: "the TLS library was built without Ed25519".to_owned() }
        })?;
    Ok(CryptoProvider {
        kx_groups: vec![aws_lc_rs::kx_group::X25519MLKEM768],
        cipher_suites: base.cipher_suites.into_iter().filter(|suite| suite.tls13().is_some()).collect(),
        signature_verification_algorithms: WebPkiSupportedAlgorithms {
            all: mapping[ed25519].1,
            mapping: &mapping[ed25519..=ed25519],
        },
        ..base
    })
}

fn unusable(error: TlsError) -> SessionError {
    SessionError::Identity { reason: error.to_string() }
}

/// Small messages leave at once, and a peer that is gone is noticed within about 15 s, whether or
/// not there is something to send.
fn prepare(tcp: &TcpStream) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    let socket = SockRef::from(tcp);
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE_IDLE)
        .with_interval(KEEPALIVE_INTERVAL)
        .with_retries(KEEPALIVE_PROBES);
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(Some(TCP_USER_TIMEOUT))
}

/// Says in the operator's words what the TLS library found.
fn handshake_error(remote: Remote, error: io::Error) -> SessionError {
    let Some(tls) = error.get_ref().and_then(|inner| inner.downcast_ref::<TlsError>()) else {
        let cut = matches!(
            error.kind(),
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
        );
        return if cut {
            SessionError::HandshakeCut { remote }
        } else {
            SessionError::Lost { remote, source: error }
        };
    };
    let reason = tls.to_string();
    if matches!(tls, TlsError::InvalidMessage(_)) {
        SessionError::NotTls { remote, reason }
    } else if matches!(tls, TlsError::AlertReceived(_)) {
        SessionError::Refused { remote, reason }
    } else if matches!(
        tls,
        TlsError::PeerIncompatible(_) | TlsError::NoApplicationProtocol | TlsError::NoCertificatesPresented
    ) {
        SessionError::Incompatible { remote, reason }
    } else {
        SessionError::Tls { remote, reason }
    }
}

const KEEPALIVE_IDLE: Duration = Duration::from_secs(5);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(3);
const KEEPALIVE_PROBES: u32 = 3;
/// Segments of a control session, in bytes: in packets of 1,280, which pass everywhere. Many networks swallow the message
/// that a packet is too big, and then the long ones of a handshake with ML-KEM would never arrive. To be set before there
/// is a connection.
pub(crate) const MAX_SEGMENT: u32 = 1280 - 40 - 20;

/// Linux gives up at the first probe that finds the connection silent for so long, and then does
/// not count probes: they go out after 5, 8, 11 and 14 s, so this makes 14 s. Unanswered data is
/// given up after the same time.
const TCP_USER_TIMEOUT: Duration = Duration::from_millis(13_500);

#[cfg(test)]
mod tests;
