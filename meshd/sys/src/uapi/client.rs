//! Clients for the socket of a running device.

use std::io::{self, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use zeroize::Zeroizing;

use super::message::{Device, Request, SetDevice};
use super::parse::{ResponseError, parse_set_answer};
use super::stream::{Collector, Limits, ReadError, read_message};

/// Where userspace devices put their sockets.
pub const SOCKET_DIRECTORY: &str = "/var/run/wireguard";

/// How long one exchange may take unless the caller says otherwise. A set request with thousands of new peers costs
/// a key agreement each, about 50 µs.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);

/// The socket of the device `interface`.
#[must_use]
pub fn socket_path(interface: &str) -> PathBuf {
    Path::new(SOCKET_DIRECTORY).join(format!("{interface}.sock"))
}

/// Why an exchange with a device failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens there. Nothing was changed.
    #[error("no WireGuard device listens at {path} (is mesh-wg running?)")]
    NotRunning {
        /// The socket.
        path: PathBuf,
    },
    /// The exchange took too long. A set request may have been applied.
    #[error("the WireGuard device at {path} did not answer within {after:?}")]
    Timeout {
        /// The socket.
        path: PathBuf,
        /// The time allowed.
        after: Duration,
    },
    /// The socket failed. A set request may have been applied.
    #[error("talking to the WireGuard device at {path} failed: {source}")]
    Io {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The answer is too large or was cut off.
    #[error("the answer of the WireGuard device at {path} is unusable: {source}")]
    Read {
        /// The socket.
        path: PathBuf,
        /// What is wrong with it.
        source: ReadError,
    },
    /// The device refused the request, or its answer is malformed.
    #[error("the WireGuard device at {path}: {source}")]
    Response {
        /// The socket.
        path: PathBuf,
        /// What it answered.
        source: ResponseError,
    },
}

#[derive(Debug, Clone)]
struct Target {
    path: PathBuf,
    timeout: Duration,
}

impl Target {
    fn io(&self, error: io::Error) -> ClientError {
        let path = self.path.clone();
        let kind = error.kind();
        if matches!(kind, io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) {
            ClientError::NotRunning { path }
        } else if matches!(kind, io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock) {
            ClientError::Timeout { path, after: self.timeout }
        } else {
            ClientError::Io { path, source: error }
        }
    }

    fn read(&self, error: ReadError) -> ClientError {
        match error {
            ReadError::Io(error) => self.io(error),
            source @ (ReadError::CutOff { .. }
            | ReadError::LongLine { .. }
            | ReadError::LongMessage { .. }) => ClientError::Read { path: self.path.clone(), source },
        }
    }

    fn response(&self, source: ResponseError) -> ClientError {
        ClientError::Response { path: self.path.clone(), source }
    }
}

/// Speaks to a device from a tokio runtime. Each call is one connection.
#[derive(Debug, Clone)]
pub struct Client(Target);

impl Client {
    /// For the device `interface` at its usual socket.
    #[must_use]
    pub fn new(interface: &str) -> Self {
        Self::at(socket_path(interface))
    }

    /// For the device that listens at `path`.
    #[must_use]
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self(Target { path: path.into(), timeout: DEFAULT_TIMEOUT })
    }

    /// Changes how long one exchange may take.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.0.timeout = timeout;
        self
    }

    /// Reads the whole state of the device.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn get(&self) -> Result<Device, ClientError> {
        let answer = self.exchange(&Request::Get.to_text()).await?;
        Device::parse(&answer).map_err(|error| self.0.response(error))
    }

    /// Changes what `change` names.
    ///
    /// # Errors
    /// [`ClientError`]; its variants say whether the change may have been applied.
    pub async fn set(&self, change: &SetDevice) -> Result<(), ClientError> {
        let answer = self.exchange(&change.to_text()).await?;
        parse_set_answer(&answer).map_err(|error| self.0.response(error))
    }

    async fn exchange(&self, request: &str) -> Result<Zeroizing<Vec<u8>>, ClientError> {
        match tokio::time::timeout(self.0.timeout, self.exchange_unbounded(request)).await {
            Ok(result) => result,
            Err(_elapsed) => Err(self.0.io(io::ErrorKind::TimedOut.into())),
        }
    }

    async fn exchange_unbounded(&self, request: &str) -> Result<Zeroizing<Vec<u8>>, ClientError> {
        let io = |error| self.0.io(error);
        let mut stream = tokio::net::UnixStream::connect(&self.0.path).await.map_err(io)?;
        stream.write_all(request.as_bytes()).await.map_err(io)?;
        let mut answer = Collector::new(Limits::RESPONSE);
        let mut piece = Zeroizing::new([0; 16 << 10]);
        loop {
            let length = stream.read(&mut piece[..]).await.map_err(io)?;
            if length == 0 {
                return match answer.end_of_stream() {
                    Ok(Some(bytes)) => Ok(bytes),
                    Ok(None) => Err(self.0.read(ReadError::CutOff { line: 1 })),
                    Err(error) => Err(self.0.read(error)),
                };
            }
            let (_used, done) = answer.push(&piece[..length]).map_err(|error| self.0.read(error))?;
            if done {
                return Ok(answer.bytes);
            }
        }
    }
}

/// Speaks to a device from ordinary threads. Each call is one connection; the timeout holds for each read and write.
#[derive(Debug, Clone)]
pub struct BlockingClient(Target);

impl BlockingClient {
    /// For the device `interface` at its usual socket.
    #[must_use]
    pub fn new(interface: &str) -> Self {
        Self::at(socket_path(interface))
    }

    /// For the device that listens at `path`.
    #[must_use]
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self(Target { path: path.into(), timeout: DEFAULT_TIMEOUT })
    }

    /// Changes how long one read or write may take; at least a microsecond.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.0.timeout = timeout.max(Duration::from_micros(1));
        self
    }

    /// Reads the whole state of the device.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn get(&self) -> Result<Device, ClientError> {
        let answer = self.exchange(&Request::Get.to_text())?;
        Device::parse(&answer).map_err(|error| self.0.response(error))
    }

    /// Changes what `change` names.
    ///
    /// # Errors
    /// [`ClientError`]; its variants say whether the change may have been applied.
    pub fn set(&self, change: &SetDevice) -> Result<(), ClientError> {
        let answer = self.exchange(&change.to_text())?;
        parse_set_answer(&answer).map_err(|error| self.0.response(error))
    }

    fn exchange(&self, request: &str) -> Result<Zeroizing<Vec<u8>>, ClientError> {
        let io = |error| self.0.io(error);
        let mut stream = UnixStream::connect(&self.0.path).map_err(io)?;
        stream.set_read_timeout(Some(self.0.timeout)).map_err(io)?;
        stream.set_write_timeout(Some(self.0.timeout)).map_err(io)?;
        stream.write_all(request.as_bytes()).map_err(io)?;
        match read_message(&mut BufReader::new(stream), Limits::RESPONSE) {
            Ok(Some(bytes)) => Ok(bytes),
            Ok(None) => Err(self.0.read(ReadError::CutOff { line: 1 })),
            Err(error) => Err(self.0.read(error)),
        }
    }
}
