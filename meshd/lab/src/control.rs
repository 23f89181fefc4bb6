//! Asking a daemon over its control socket, without a process for each question.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::host::Host;

/// Where the daemon has its socket, from the root of the host.
const SOCKET: &str = "run/meshd/meshd.sock";

/// A daemon that says nothing for this long is not answering.
const PATIENCE: Duration = Duration::from_secs(10);

/// More than the status of a cluster of thousands, in bytes.
const MAX_ANSWER: u64 = 64 << 20;

impl Host {
    /// Asks the daemon for a document of its control API, such as `/v1/status`.
    ///
    /// For those who ask many daemons again and again: a `meshctl` for each question would be most of the load.
    ///
    /// # Errors
    /// When the daemon does not answer, or with something else than success.
    pub fn ask(&self, path: &str) -> Result<Value> {
        let answer = self.exchange(path).with_context(|| format!("asking the daemon of {}", self.name()))?;
        serde_json::from_slice(body(&answer)?).context("the daemon's answer is not JSON")
    }

    fn exchange(&self, path: &str) -> Result<Vec<u8>> {
        ensure!(path.starts_with('/') && !path.contains(char::is_whitespace), "{path:?} is no path");
        let mut stream =
            UnixStream::connect(self.file(SOCKET)).context("connecting to the control socket")?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut answer = Vec::new();
        stream.take(MAX_ANSWER).read_to_end(&mut answer)?;
        Ok(answer)
    }
}

/// The body of a successful answer that came whole.
fn body(answer: &[u8]) -> Result<&[u8]> {
    const BLANK_LINE: &[u8] = b"\r\n\r\n";
    let end = memchr::memmem::find(answer, BLANK_LINE).context("the daemon's answer has no head")?;
    let head = std::str::from_utf8(&answer[..end]).context("the head of the daemon's answer is no text")?;
    let body = &answer[end + BLANK_LINE.len()..];
    let mut lines = head.split("\r\n");
    let status = lines.next().unwrap_or_default();
    if status.split(' ').nth(1) != Some("200") {
        bail!("the daemon answers {status:?}: {}", String::from_utf8_lossy(body));
    }
    let length = lines.filter_map(|line| line.split_once(':')).find_map(|(name, value)| {
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
    });
    ensure!(length == Some(body.len()), "the daemon's answer has {} bytes of {length:?}", body.len());
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_and_successful_answer_counts() {
        let whole = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nconnection: close\r\n\r\n{}";
        assert_eq!(body(whole).unwrap(), b"{}");
        assert!(body(&whole[..whole.len() - 1]).is_err());
        assert!(body(b"HTTP/1.1 200 OK\r\n\r\n{}").is_err());
        let refused = body(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 4\r\n\r\nbusy").unwrap_err();
        assert!(refused.to_string().contains("503") && refused.to_string().contains("busy"), "{refused}");
        assert!(body(b"").is_err());
    }
}
