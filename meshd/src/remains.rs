//! What is left of attachments on this host, for the node's garbage collection.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::Result;
use mesh_core::api::{AttachmentId, NetnsId};
use mesh_core::node::{NetnsLook, Remains};
use mesh_sys::netns::{NetNs, NetNsError};
use mesh_sys::rtnl::Blocking;

/// Looks for the host's end of each attachment and, where it is gone, at the path of its network namespace. Blocks.
///
/// # Errors
/// The devices of the host cannot be listed: then nothing is known of any attachment.
pub fn look(attachments: Vec<(AttachmentId, PathBuf)>) -> Result<BTreeMap<AttachmentId, Remains>> {
    let links = Blocking::open()?.links()?;
    let devices: BTreeSet<&str> = links.iter().map(|link| link.name.as_str()).collect();
    let look = |(id, path): (AttachmentId, PathBuf)| {
        let host_end = devices.contains(id.host_ifname().as_str());
        // With the device there, the attachment lives, wherever its namespace is.
        let netns = if host_end { NetnsLook::Unknown } else { netns(&path) };
        (id, Remains { host_end, netns })
    };
    Ok(attachments.into_iter().map(look).collect())
}

fn netns(path: &Path) -> NetnsLook {
    match NetNs::open(path) {
        Ok(netns) => {
            let id = netns.id();
            NetnsLook::Found(NetnsId { dev: id.dev, ino: id.ino })
        }
        // The file that a name was bound to outlives the bind mount.
        Err(NetNsError::NotANamespace { .. }) => NetnsLook::Missing,
        Err(NetNsError::Open { source, .. }) if source.kind() == ErrorKind::NotFound => NetnsLook::Missing,
        Err(error) => {
            tracing::debug!(path = %path.display(), %error, "a network namespace cannot be looked at");
            NetnsLook::Unknown
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_leads_to_a_namespace_to_none_or_is_not_known() {
        let own = NetNs::current().unwrap().id();
        let found = NetnsLook::Found(NetnsId { dev: own.dev, ino: own.ino });
        assert_eq!(netns(Path::new("/proc/self/ns/net")), found);
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(netns(&dir.path().join("nothing")), NetnsLook::Missing);
        let file = dir.path().join("file");
        std::fs::write(&file, b"").unwrap();
        assert_eq!(netns(&file), NetnsLook::Missing);
        assert_eq!(netns(&file.join("below a file")), NetnsLook::Unknown);
    }

    #[test]
    fn a_namespace_is_looked_at_only_where_the_device_is_gone() {
        let id = AttachmentId::new("no-such-container", "eth0").unwrap();
        let found = look(vec![(id.clone(), "/proc/self/ns/net".into())]).unwrap();
        let own = NetNs::current().unwrap().id();
        let netns = NetnsLook::Found(NetnsId { dev: own.dev, ino: own.ino });
        assert_eq!(found, BTreeMap::from([(id, Remains { host_end: false, netns })]));
    }
}
