//! The state directory: what a node must not lose, and must not show to anyone.
//!
//! ```text
//! /var/lib/meshd/            0700
//!   lock                     held by the running daemon
//!   identity.key             0600  the node's identity
//!   wireguard-0.key          0600  key of lane 0
//!   cluster.state changes.state node.state leases.state keys.state group.state
//!                            0600  see mesh_core::state
//!   sysctl.saved             what settings of the host were before
//!   tombstones/              attachments deleted while the daemon was away
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use mesh_core::api::{AttachmentId, DEFAULT_STATE_DIR, TOMBSTONE_DIR, Tombstone};
use mesh_core::node::StartMark;
use mesh_core::state::{StateFile, Stored};
use mesh_keys::rand_core::{CryptoRng, RngCore};
use mesh_keys::{Identity, NodeId, WgSecret};
use mesh_sys::files::{self, LockFile, Ours};
use zeroize::Zeroizing;

/// Largest state file: far more than the largest cluster needs.
const MAX_STATE: usize = 64 << 20;

/// Largest key file.
const MAX_KEY: usize = 4096;

/// The node's identity.
const IDENTITY_FILE: &str = "identity.key";

/// The state directory, locked.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    _lock: LockFile,
}

impl Store {
    /// Opens the directory, makes it if it is not there, and locks it.
    ///
    /// # Errors
    /// Another daemon uses it, or it cannot be used; the message says which.
    pub fn open(dir: &Path) -> Result<Self> {
        let known = dir == Path::new(DEFAULT_STATE_DIR) || dir.join(IDENTITY_FILE).exists();
        let ours = if known { Ours::Known } else { Ours::WhenEmpty };
        files::secure_dir(dir, 0o700, ours).context("state-dir")?;
        files::secure_dir(&dir.join(TOMBSTONE_DIR), 0o700, Ours::Known).context("state-dir")?;
        let lock = LockFile::acquire(&dir.join("lock")).context("another meshd uses this state directory")?;
        Ok(Self { dir: dir.to_owned(), _lock: lock })
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The node's identity; made at the first start.
    ///
    /// # Errors
    /// The file cannot be read, is damaged, or cannot be written.
    pub fn identity(&self, rng: &mut (impl RngCore + CryptoRng)) -> Result<Identity> {
        let path = self.dir.join(IDENTITY_FILE);
        match self.read_text(&path)? {
            Some(text) => {
                Identity::from_text(&text).with_context(|| format!("identity file {}", path.display()))
            }
            None => {
                if let Some(file) = StateFile::ALL.iter().find(|file| self.dir.join(file.name()).exists()) {
                    bail!(
                        "{} is gone, but {} is there: restore the whole directory, or remove all of it to join as a new node",
                        path.display(),
                        file.name()
                    );
                }
                let identity = Identity::generate(rng);
                files::write_atomic(&path, identity.to_text().as_bytes(), 0o600)?;
                Ok(identity)
            }
        }
    }

    /// The key of a lane; made at the first start.
    ///
    /// # Errors
    /// The file cannot be read, is damaged, or cannot be written.
    pub fn lane_key(&self, index: u8, rng: &mut (impl RngCore + CryptoRng)) -> Result<WgSecret> {
        let path = self.dir.join(format!("wireguard-{index}.key"));
        match self.read_text(&path)? {
            Some(text) => WgSecret::from_text(&text).with_context(|| format!("key file {}", path.display())),
            None => {
                let secret = WgSecret::generate(rng);
                files::write_atomic(&path, secret.to_text().as_bytes(), 0o600)?;
                Ok(secret)
            }
        }
    }

    /// Reads the state files.
    ///
    /// # Errors
    /// Names the file that cannot be used. Nothing is thrown away.
    pub fn read(&self) -> Result<Stored> {
        let mut contents = BTreeMap::new();
        for file in StateFile::ALL {
            match files::read_limited(&self.dir.join(file.name()), MAX_STATE) {
                Ok(bytes) => {
                    contents.insert(file, bytes);
                }
                Err(error) if error.is_missing() => {}
                Err(error) => return Err(error.into()),
            }
        }
        Stored::decode(&contents).with_context(|| format!("state directory {}", self.dir.display()))
    }

    /// Counts this start durably. To be called when nothing that can fail is left to do before the node runs: the next
    /// start goes on from this one without being confirmed only if this one ran.
    ///
    /// # Errors
    /// The start is not counted then.
    pub fn count_start(&self, stored: &mut Stored, node: &NodeId, before: Option<&StartMark>) -> Result<()> {
        let (file, bytes) = stored.count_start(node, before);
        self.write(file, &bytes)
    }

    /// Replaces a state file durably.
    ///
    /// # Errors
    /// The old file is intact then.
    pub fn write(&self, file: StateFile, bytes: &[u8]) -> Result<()> {
        Ok(files::write_atomic(&self.dir.join(file.name()), bytes, 0o600)?)
    }

    /// The attachments that were deleted while nobody was here, and the files that say so.
    pub fn tombstones(&self) -> Vec<(AttachmentId, PathBuf)> {
        let entries = match std::fs::read_dir(self.dir.join(TOMBSTONE_DIR)) {
            Ok(entries) => entries,
            Err(error) => {
                tracing::warn!(%error, "tombstones cannot be read");
                return Vec::new();
            }
        };
        let mut found = Vec::new();
        for path in entries.flatten().map(|entry| entry.path()) {
            if path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b".")) {
                continue;
            }
            let tombstone = files::read_limited(&path, 64 * 1024)
                .map_err(anyhow::Error::from)
                .and_then(|bytes| Ok(serde_json::from_slice::<Tombstone>(&bytes)?));
            match tombstone {
                Ok(tombstone) => found.push((tombstone.id, path)),
                Err(error) => tracing::warn!(path = %path.display(), "tombstone is left alone: {error:#}"),
            }
        }
        found
    }

    fn read_text(&self, path: &Path) -> Result<Option<Zeroizing<String>>> {
        match files::read_secret(path, MAX_KEY) {
            Ok(bytes) => {
                let text =
                    std::str::from_utf8(&bytes).with_context(|| format!("{} is not text", path.display()))?;
                Ok(Some(Zeroizing::new(text.to_owned())))
            }
            Err(error) if error.is_missing() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}
