//! Talking to `meshd`: HTTP over its unix socket, one connection for each request.

use std::cell::Cell;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use mesh_core::api::{
    ApiError, AttachRequest, Attachment, AttachmentId, AttachmentState, ErrorCode, GcReport, GcRequest,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;
use tokio::time::Instant;

use crate::error::{CniError, Code};

/// A local daemon accepts at once or has too much to do; the specification's STATUS must fit into a second.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// Pause between two tries while the daemon is away.
const RETRY_PAUSE: Duration = Duration::from_millis(50);

/// The largest answer that is read. The list of all attachments of a full node (a few hundred pods, less than
/// one KiB each) stays well below.
const MAX_ANSWER: usize = 1024 * 1024;

/// Why the daemon did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DaemonError {
    /// Nobody listens, or no answer came in time; whether the request was carried out is unknown.
    #[error("meshd does not answer on {}: {reason}; is it running? see `journalctl -u meshd`", socket.display())]
    Away {
        /// The control socket.
        socket: PathBuf,
        /// What happened.
        reason: String,
        /// Whether the request was on its way, in this or an earlier try.
        sent: bool,
    },
    /// It refused, and changed nothing.
    #[error("meshd refused: {0}")]
    Refused(ApiError),
    /// It answered something that cannot be understood.
    #[error("unexpected answer on {}: {problem}; is another program, or another version of meshd, listening there?", socket.display())]
    Nonsense {
        /// The control socket.
        socket: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
}

impl DaemonError {
    /// Whether the daemon may come back if one waits.
    pub(crate) fn is_away(&self) -> bool {
        match self {
            Self::Away { .. } => true,
            Self::Refused(error) => error.code == ErrorCode::NotReady,
            Self::Nonsense { .. } => false,
        }
    }

    /// Whether the daemon may have carried out the request all the same.
    pub(crate) fn may_have_worked(&self) -> bool {
        match self {
            Self::Away { sent, .. } => *sent,
            Self::Nonsense { .. } => true,
            Self::Refused(_) => false,
        }
    }
}

impl From<DaemonError> for CniError {
    fn from(error: DaemonError) -> Self {
        let code = match &error {
            DaemonError::Away { .. } => Code::TryAgainLater,
            DaemonError::Nonsense { .. } => Code::Daemon,
            DaemonError::Refused(refusal) => match refusal.code {
                ErrorCode::NotReady => Code::TryAgainLater,
                ErrorCode::Exhausted => Code::Exhausted,
                ErrorCode::Conflict => Code::Exists,
                ErrorCode::Invalid => Code::InvalidConfig,
                ErrorCode::NotFound
                | ErrorCode::Ambiguous
                | ErrorCode::Forbidden
                | ErrorCode::Internal
                | ErrorCode::Unknown => Code::Daemon,
            },
        };
        Self::new(code, error.to_string())
    }
}

/// A client of the daemon's control socket. Every call ends by its deadline.
#[derive(Debug)]
pub(crate) struct Daemon {
    runtime: Runtime,
    socket: PathBuf,
    patience: Duration,
    deadline: Instant,
}

impl Daemon {
    /// A client whose calls, taken together, end after `limit`. While the daemon is away (restarting, say),
    /// each call tries again for as long as `patience`; all requests may be repeated without harm.
    pub(crate) fn new(socket: &Path, patience: Duration, limit: Duration) -> Result<Self, CniError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| CniError::new(Code::Io, format!("cannot start the event loop: {error}")))?;
        Ok(Self { runtime, socket: socket.to_owned(), patience, deadline: Instant::now() + limit })
    }

    /// Grants more time from now on, for undoing after the deadline was missed.
    pub(crate) fn extend(&mut self, limit: Duration) {
        self.patience = Duration::ZERO;
        self.deadline = self.deadline.max(Instant::now() + limit);
    }

    /// `GET /v1/ready`.
    pub(crate) fn ready(&self) -> Result<(), DaemonError> {
        self.call(Method::GET, "/v1/ready", None).map(|_| ())
    }

    /// `POST /v1/attachments`.
    pub(crate) fn attach(&self, request: &AttachRequest) -> Result<Attachment, DaemonError> {
        let body = self.encode(request)?;
        let answer = self.call(Method::POST, "/v1/attachments", Some(body))?;
        self.own(&request.id, self.decode(&answer)?)
    }

    /// `POST /v1/attachments/{container}/{ifname}/activate`.
    pub(crate) fn activate(&self, id: &AttachmentId) -> Result<Attachment, DaemonError> {
        let answer = self.call(Method::POST, &format!("{}/activate", path(id)), None)?;
        let attachment = self.own(id, self.decode(&answer)?)?;
        match attachment.state {
            AttachmentState::Active => Ok(attachment),
            AttachmentState::Leased => {
                Err(self.nonsense(format!("{id} is still not active after activation")))
            }
        }
    }

    /// `GET /v1/attachments/{container}/{ifname}`.
    pub(crate) fn attachment(&self, id: &AttachmentId) -> Result<Attachment, DaemonError> {
        let answer = self.call(Method::GET, &path(id), None)?;
        self.own(id, self.decode(&answer)?)
    }

    /// `GET /v1/attachments`.
    pub(crate) fn attachments(&self) -> Result<Vec<Attachment>, DaemonError> {
        let answer = self.call(Method::GET, "/v1/attachments", None)?;
        self.decode(&answer)
    }

    /// `DELETE /v1/attachments/{container}/{ifname}`.
    pub(crate) fn detach(&self, id: &AttachmentId) -> Result<(), DaemonError> {
        match self.call(Method::DELETE, &path(id), None) {
            Ok(_) => Ok(()),
            Err(DaemonError::Refused(error)) if error.code == ErrorCode::NotFound => Ok(()),
            Err(other) => Err(other),
        }
    }

    /// `POST /v1/attachments/gc`.
    pub(crate) fn gc(&self, request: &GcRequest) -> Result<GcReport, DaemonError> {
        let body = self.encode(request)?;
        let answer = self.call(Method::POST, "/v1/attachments/gc", Some(body))?;
        self.decode(&answer)
    }

    /// The names of links follow from the id; a daemon that names them otherwise could not be cleaned up after.
    fn own(&self, id: &AttachmentId, attachment: Attachment) -> Result<Attachment, DaemonError> {
        if attachment.id != *id {
            return Err(self.nonsense(format!("asked for {id}, got {}", attachment.id)));
        }
        if attachment.host_ifname != id.host_ifname() {
            let (got, expected) = (attachment.host_ifname, id.host_ifname());
            return Err(self.nonsense(format!("host interface {got:?} where {expected:?} was expected")));
        }
        Ok(attachment)
    }

    fn call(&self, method: Method, path: &str, body: Option<Bytes>) -> Result<Bytes, DaemonError> {
        let give_up = self.deadline.min(Instant::now() + self.patience);
        let sent = Cell::new(false);
        let (status, answer) = loop {
            let exchange = self.exchange(&method, path, &body, &sent);
            match self.runtime.block_on(async { tokio::time::timeout_at(self.deadline, exchange).await }) {
                Ok(Err(DaemonError::Away { socket, reason, .. })) => {
                    if Instant::now() >= give_up {
                        return Err(DaemonError::Away { socket, reason, sent: sent.get() });
                    }
                    std::thread::sleep(RETRY_PAUSE);
                }
                Ok(Err(error)) => return Err(error),
                Ok(Ok(answer)) => break answer,
                Err(_) => {
                    let (socket, reason) =
                        (self.socket.clone(), format!("{method} {path} was not answered in time"));
                    return Err(DaemonError::Away { socket, reason, sent: sent.get() });
                }
            }
        };
        if status.is_success() {
            return Ok(answer);
        }
        match serde_json::from_slice::<ApiError>(&answer) {
            Ok(error) => Err(DaemonError::Refused(error)),
            Err(_) => {
                Err(self.nonsense(format!("{method} {path}: status {status} without an error document")))
            }
        }
    }

    async fn exchange(
        &self,
        method: &Method,
        path: &str,
        body: &Option<Bytes>,
        sent: &Cell<bool>,
    ) -> Result<(StatusCode, Bytes), DaemonError> {
        let broken = |error: hyper::Error| self.away(format!("{method} {path}: {error}"));
        let stream = self.connect().await?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        let driver = tokio::spawn(connection);
        let request = Request::builder()
            .method(method.clone())
            .uri(path)
            .header("host", "meshd")
            .header("content-type", "application/json")
            .body(Full::new(body.clone().unwrap_or_default()))
            .map_err(|error| self.nonsense(format!("cannot ask for {path:?}: {error}")))?;
        sent.set(true);
        let response = sender.send_request(request).await.map_err(broken)?;
        let status = response.status();
        let answer = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
        driver.abort();
        match answer {
            Ok(body) => Ok((status, body.to_bytes())),
            Err(error) if error.is::<http_body_util::LengthLimitError>() => {
                Err(self.nonsense(format!("{method} {path}: the answer is longer than {MAX_ANSWER} bytes")))
            }
            Err(error) => Err(self.away(format!("{method} {path}: {error}"))),
        }
    }

    async fn connect(&self) -> Result<UnixStream, DaemonError> {
        let limit = Instant::now() + CONNECT_TIMEOUT;
        loop {
            match tokio::time::timeout_at(limit, UnixStream::connect(&self.socket)).await {
                Ok(Ok(stream)) => return Ok(stream),
                // The queue of connections is full: many pods start at once.
                Ok(Err(error)) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < limit => {
                    tokio::time::sleep(RETRY_PAUSE).await;
                }
                Ok(Err(error)) => return Err(self.away(error.to_string())),
                Err(_) => return Err(self.away("the connection was not accepted in time".to_owned())),
            }
        }
    }

    fn encode(&self, request: &impl Serialize) -> Result<Bytes, DaemonError> {
        match serde_json::to_vec(request) {
            Ok(body) => Ok(body.into()),
            Err(error) => Err(self.nonsense(format!("the request cannot be written as JSON: {error}"))),
        }
    }

    fn decode<T: DeserializeOwned>(&self, answer: &[u8]) -> Result<T, DaemonError> {
        serde_json::from_slice(answer).map_err(|error| self.nonsense(error.to_string()))
    }

    fn away(&self, reason: String) -> DaemonError {
        DaemonError::Away { socket: self.socket.clone(), reason, sent: false }
    }

    fn nonsense(&self, problem: String) -> DaemonError {
        DaemonError::Nonsense { socket: self.socket.clone(), problem }
    }
}

fn path(id: &AttachmentId) -> String {
    format!("/v1/attachments/{}/{}", segment(id.container()), segment(id.ifname()))
}

/// Percent-encodes whatever is not unreserved (RFC 3986, section 2.3): interface names may contain `%` or `?`.
fn segment(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => out.push(char::from(byte)),
            other => out.push_str(&format!("%{other:02X}")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    use super::*;

    fn daemon(socket: &Path, limit: Duration) -> Daemon {
        Daemon::new(socket, Duration::ZERO, limit).unwrap()
    }

    /// Answers one connection with these bytes.
    fn answer_once(listener: UnixListener, answer: Vec<u8>) -> std::thread::JoinHandle<()> {
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0u8; 4096];
            let _ = stream.read(&mut request).unwrap();
            // The client hangs up in the middle of an answer that is too long.
            let _ = stream.write_all(&answer);
        })
    }

    #[test]
    fn segments_are_encoded() {
        assert_eq!(segment("eth0.1-_~"), "eth0.1-_~");
        assert_eq!(segment("a%?#\u{e4}"), "a%25%3F%23%C3%A4");
    }

    #[test]
    fn s037_an_absent_daemon_is_code_11_and_named() {
        let error = daemon(Path::new("/nonexistent/meshd.sock"), Duration::from_secs(5)).ready().unwrap_err();
        assert!(error.is_away() && !error.may_have_worked());
        let error = CniError::from(error);
        assert_eq!(error.code(), Code::TryAgainLater);
        assert!(error.msg().contains("/nonexistent/meshd.sock"), "{error}");
        assert!(error.msg().contains("journalctl -u meshd"), "{error}");
    }

    #[test]
    fn a_daemon_that_comes_late_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let late = socket.clone();
        let server = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(300));
            let listener = UnixListener::bind(late).unwrap();
            answer_once(listener, b"HTTP/1.1 204 No Content\r\n\r\n".to_vec()).join().unwrap();
        });
        let daemon = Daemon::new(&socket, Duration::from_secs(5), Duration::from_secs(10)).unwrap();
        daemon.ready().unwrap();
        server.join().unwrap();
    }

    #[test]
    fn s085_a_daemon_that_never_answers_does_not_hang_the_plugin() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let _listener = UnixListener::bind(&socket).unwrap();
        let begin = std::time::Instant::now();
        let error = daemon(&socket, Duration::from_millis(300)).ready().unwrap_err();
        assert!(error.is_away() && error.may_have_worked());
        assert!(begin.elapsed() < Duration::from_secs(2));
    }

    #[test]
    fn answers_are_bounded_and_must_make_sense() {
        let endless =
            [b"HTTP/1.1 200 OK\r\ncontent-length: 9999999\r\n\r\n".to_vec(), vec![b' '; 2_000_000]].concat();
        for (answer, part) in [
            (endless, "longer than"),
            (b"HTTP/1.1 404 Not Found\r\ncontent-length: 2\r\n\r\nno".to_vec(), "without an error document"),
            (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}".to_vec(), "expected a sequence"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let socket = dir.path().join("s");
            let server = answer_once(UnixListener::bind(&socket).unwrap(), answer);
            let error = daemon(&socket, Duration::from_secs(5)).attachments().unwrap_err();
            assert!(matches!(error, DaemonError::Nonsense { .. }), "{error}");
            assert!(error.to_string().contains(part), "{error}");
            server.join().unwrap();
        }
    }

    #[test]
    fn s031_refusals_become_the_right_codes() {
        for (code, expected) in [
            (ErrorCode::NotReady, Code::TryAgainLater),
            (ErrorCode::Exhausted, Code::Exhausted),
            (ErrorCode::Conflict, Code::Exists),
            (ErrorCode::Invalid, Code::InvalidConfig),
            (ErrorCode::Internal, Code::Daemon),
            (ErrorCode::Unknown, Code::Daemon),
        ] {
            let error = CniError::from(DaemonError::Refused(ApiError::new(code, "because")));
            assert_eq!(error.code(), expected);
            assert!(error.msg().contains("because"));
        }
    }
}
