//! What DEL leaves behind when the daemon is away, so that the lease is released later.

use std::path::{Path, PathBuf};

use mesh_core::api::{AttachmentId, TOMBSTONE_DIR, Tombstone};
use mesh_sys::files::{self, Ours};

use crate::error::{CniError, Code};
use crate::lock::secure_state_dir;

fn path(state_dir: &Path, id: &AttachmentId) -> PathBuf {
    state_dir.join(TOMBSTONE_DIR).join(id.tombstone_name())
}

/// Writes the tombstone of an attachment; it survives a power cut once this returns.
pub(crate) fn write(state_dir: &Path, id: &AttachmentId) -> Result<(), CniError> {
    let failed =
        |reason: String| CniError::new(Code::Io, format!("cannot leave a tombstone for {id}: {reason}"));
    let contents =
        serde_json::to_vec(&Tombstone { id: id.clone() }).map_err(|error| failed(error.to_string()))?;
    secure_state_dir(state_dir).map_err(|error| failed(error.to_string()))?;
    files::secure_dir(&state_dir.join(TOMBSTONE_DIR), 0o700, Ours::Known)
        .map_err(|error| failed(error.to_string()))?;
    files::write_atomic(&path(state_dir, id), &contents, 0o600).map_err(|error| failed(error.to_string()))
}

/// Whether there is a tombstone of this attachment.
pub(crate) fn exists(state_dir: &Path, id: &AttachmentId) -> bool {
    path(state_dir, id).symlink_metadata().is_ok()
}

/// Removes the tombstone of an attachment, if there is one.
pub(crate) fn remove(state_dir: &Path, id: &AttachmentId) -> Result<(), CniError> {
    match files::remove_durable(&path(state_dir, id)) {
        Ok(_) => Ok(()),
        Err(error) => Err(CniError::new(Code::Io, format!("cannot remove the tombstone of {id}: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn s071_a_tombstone_can_be_read_back_as_the_daemon_does() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let id = AttachmentId::new("c1", "eth0").unwrap();
        assert!(!exists(&state, &id));
        write(&state, &id).unwrap();
        write(&state, &id).unwrap();
        assert!(exists(&state, &id));
        let mut names = std::fs::read_dir(state.join(TOMBSTONE_DIR)).unwrap();
        let entry = names.next().unwrap().unwrap();
        assert!(names.next().is_none(), "written twice, one file, no leftovers");
        assert_eq!(entry.file_name().to_str(), Some(id.tombstone_name().as_str()));
        assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        let read: Tombstone = serde_json::from_slice(&std::fs::read(entry.path()).unwrap()).unwrap();
        assert_eq!(read.id, id);
        remove(&state, &id).unwrap();
        remove(&state, &id).unwrap();
        assert!(!exists(&state, &id));
    }
}
