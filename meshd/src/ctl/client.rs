//! A client of the control API.

use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use mesh_core::api::ApiError;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

/// Longest answer, in bytes: a status of the largest cluster.
const MAX_ANSWER: usize = 64 << 20;

/// Time for an answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Talks to the daemon of this host.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens on the socket, or this user may not use it.
    #[error("the daemon does not answer on {}: {source}; does meshd run, and are you root?", socket.display())]
    Unreachable {
        /// The socket.
        socket: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The daemon took too long.
    #[error("the daemon did not answer within {PATIENCE:?}")]
    Timeout,
    /// The daemon refused.
    #[error("{0}")]
    Refused(#[from] ApiError),
    /// What came back is no answer.
    #[error("the daemon's answer makes no sense: {0}; is it of another version?")]
    Answer(String),
}

impl Client {
    /// A client of the daemon with that socket.
    pub fn new(socket: impl AsRef<Path>) -> Self {
        Self { socket: socket.as_ref().to_owned() }
    }

    /// Asks for a document.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.call(Method::GET, path, Bytes::new())
    }

    /// Has the daemon do something.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn send(&self, method: Method, path: &str, request: &impl Serialize) -> Result<(), ClientError> {
        let body = serde_json::to_vec(request).map_err(|error| ClientError::Answer(error.to_string()))?;
        self.call(method, path, body.into())
    }

    /// Asks for a document that depends on what is said.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn ask<T: DeserializeOwned>(&self, path: &str, request: &impl Serialize) -> Result<T, ClientError> {
        let body = serde_json::to_vec(request).map_err(|error| ClientError::Answer(error.to_string()))?;
        self.call(Method::POST, path, body.into())
    }

    /// Likewise, where the path says it all.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn order(&self, method: Method, path: &str) -> Result<(), ClientError> {
        self.call(method, path, Bytes::new())
    }

    fn call<T: DeserializeOwned>(&self, method: Method, path: &str, body: Bytes) -> Result<T, ClientError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| ClientError::Answer(error.to_string()))?;
        runtime.block_on(async {
            let exchange = self.exchange(method, path, body);
            tokio::time::timeout(PATIENCE, exchange).await.map_err(|_| ClientError::Timeout)?
        })
    }

    async fn exchange<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<T, ClientError> {
        let answer = |error: &dyn std::fmt::Display| ClientError::Answer(error.to_string());
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|source| ClientError::Unreachable { socket: self.socket.clone(), source })?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| answer(&error))?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(hyper::header::HOST, "meshd")
            .header(hyper::header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|error| answer(&error))?;
        let response = sender.send_request(request).await.map_err(|error| answer(&error))?;
        let status = response.status();
        let body =
            Limited::new(response.into_body(), MAX_ANSWER).collect().await.map_err(|error| answer(&error))?;
        let bytes = body.to_bytes();
        if status == StatusCode::NO_CONTENT {
            return serde_json::from_str("null").map_err(|error| answer(&error));
        }
        if status == StatusCode::OK {
            return serde_json::from_slice(&bytes).map_err(|error| answer(&error));
        }
        match serde_json::from_slice::<ApiError>(&bytes) {
            Ok(error) => Err(error.into()),
            Err(error) => Err(ClientError::Answer(format!("HTTP {status}: {error}"))),
        }
    }
}
