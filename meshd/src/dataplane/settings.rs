//! Settings below `/proc/sys`, and what they were before us.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use mesh_core::api::BRIDGE;
use mesh_core::diagnose::Setting;
use mesh_sys::files::{self, FileError};
use mesh_sys::sysctl::{Sysctl, SysctlError};

/// Below the state directory: settings of the host as they were before we first changed them.
pub(super) const SAVED_FILE: &str = "sysctl.saved";

/// Far more than there are settings.
const MAX_SAVED: usize = 256 * 1024;

/// Why a setting was not changed.
#[derive(Debug, thiserror::Error)]
pub(super) enum SettingError {
    /// Reading or writing it.
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    /// Its old value could not be saved, so it was left alone.
    #[error("the setting was left as it is, because its old value cannot be saved: {0}")]
    File(#[from] FileError),
    /// The file with the old values is damaged, so nothing was changed.
    #[error("the setting was left as it is, because {path} is damaged: {source}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
}

/// The tree, and the file of old values.
#[derive(Debug)]
pub(super) struct Settings {
    sysctl: Sysctl,
    saved: PathBuf,
}

impl Settings {
    pub(super) fn new(proc_sys: Option<&Path>, state_dir: &Path) -> Self {
        let sysctl = proc_sys.map_or_else(Sysctl::new, Sysctl::with_root);
        Self { sysctl, saved: state_dir.join(SAVED_FILE) }
    }

    /// The value of a setting; `None` when there is no such setting.
    ///
    /// # Errors
    /// It cannot be read.
    pub(super) fn read(&self, path: &str) -> Result<Option<String>, SysctlError> {
        match self.sysctl.get(&key(path)) {
            Ok(value) => Ok(Some(value)),
            Err(error) if error.is_missing() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Gives a setting of the host this value. The old one is on disk before it changes.
    ///
    /// # Errors
    /// [`SettingError`]; the setting is as it was.
    pub(super) fn set(&self, path: &str, value: &str, lanes: &[&str]) -> Result<(), SettingError> {
        let old = self.sysctl.get(&key(path))?;
        if same(&old, value) {
            return Ok(());
        }
        if !is_ours(path, lanes) {
            self.save(path, &old)?;
            tracing::info!(
                setting = path,
                old,
                new = value,
                "setting of the host changes; the old value is saved"
            );
        }
        Ok(self.sysctl.set(&key(path), value)?)
    }

    /// Gives a setting of a device of ours this value, where the kernel has it.
    ///
    /// # Errors
    /// The kernel refused.
    pub(super) fn set_own(&self, path: &str, value: &str) -> Result<(), SysctlError> {
        match self.sysctl.set_if_different(&key(path), value) {
            Err(error) if !error.is_missing() => Err(error),
            // Without IPv6 there is nothing to switch off.
            Ok(_) | Err(_) => Ok(()),
        }
    }

    fn save(&self, path: &str, old: &str) -> Result<(), SettingError> {
        let mut saved = self.saved()?;
        // The first value is the host's own; later ones may be ours or an administrator's reaction to ours.
        if saved.contains_key(path) {
            return Ok(());
        }
        saved.insert(path.to_owned(), old.to_owned());
        let damaged = |source| SettingError::Damaged { path: self.saved.clone(), source };
        let text = serde_json::to_vec_pretty(&saved).map_err(damaged)?;
        Ok(files::write_atomic(&self.saved, &text, 0o600)?)
    }

    /// Settings of the host as they were before us.
    fn saved(&self) -> Result<BTreeMap<String, String>, SettingError> {
        match files::read_limited(&self.saved, MAX_SAVED) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|source| SettingError::Damaged { path: self.saved.clone(), source }),
            Err(error) if error.is_missing() => Ok(BTreeMap::new()),
            Err(error) => Err(error.into()),
        }
    }
}

/// The settings of the host that the daemon has changed since it first ran here with this state directory.
///
/// # Errors
/// The file that says so cannot be read, in a sentence.
pub fn changed_settings(state_dir: &Path) -> Result<Vec<Setting>, String> {
    let settings = Settings::new(None, state_dir);
    let now = |path: &str| settings.read(path).ok().flatten().map(|value| value.trim().to_owned());
    let saved = settings.saved().map_err(|error| error.to_string())?;
    let changed = saved.into_iter().map(|(path, before)| Setting {
        now: now(&path),
        before: before.trim().to_owned(),
        path,
    });
    Ok(changed.collect())
}

/// The components of a path. Names of devices may contain dots, never slashes.
fn key(path: &str) -> Vec<&str> {
    path.split('/').collect()
}

/// White space between fields makes no difference.
pub(super) fn same(one: &str, other: &str) -> bool {
    one.split_whitespace().eq(other.split_whitespace())
}

/// Whether a setting goes away with a device of ours.
fn is_ours(path: &str, lanes: &[&str]) -> bool {
    let Some(device) = path.split_once("/conf/").and_then(|(_, rest)| rest.split('/').next()) else {
        return false;
    };
    device == BRIDGE || device.starts_with("meshwg") || device.starts_with("mv") || lanes.contains(&device)
}

/// The order in which settings are made: a host that forwards forgets what it learned from routers, unless it was
/// told before to listen to them all the same.
pub(super) fn order(path: &str) -> u8 {
    match path.rsplit('/').next() {
        Some("accept_ra") => 0,
        Some("forwarding" | "ip_forward") => 2,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn tree(values: &[(&str, &str)]) -> (tempfile::TempDir, Settings) {
        let dir = tempfile::tempdir().unwrap();
        for (path, value) in values {
            let file = dir.path().join("sys").join(path);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, format!("{value}\n")).unwrap();
        }
        let settings = Settings::new(Some(&dir.path().join("sys")), dir.path());
        (dir, settings)
    }

    #[test]
    fn the_first_value_of_a_host_setting_is_kept_and_no_later_one() {
        let (dir, settings) = tree(&[("net/ipv4/ip_forward", "0"), ("net/ipv4/conf/mesh0/rp_filter", "1")]);
        settings.set("net/ipv4/ip_forward", "1", &[]).unwrap();
        settings.set("net/ipv4/conf/mesh0/rp_filter", "2", &[]).unwrap();
        assert_eq!(settings.read("net/ipv4/ip_forward").unwrap().unwrap().trim(), "1");
        // Somebody else changes it again, to something that is neither.
        fs::write(dir.path().join("sys/net/ipv4/ip_forward"), "7\n").unwrap();
        settings.set("net/ipv4/ip_forward", "1", &[]).unwrap();
        let expected = BTreeMap::from([("net/ipv4/ip_forward".to_owned(), "0".to_owned())]);
        assert_eq!(settings.saved().unwrap(), expected, "our own devices' settings are not saved");
    }

    #[test]
    fn a_setting_whose_old_value_cannot_be_saved_is_left_alone() {
        let (dir, settings) = tree(&[("net/ipv4/ip_forward", "0")]);
        fs::write(dir.path().join(SAVED_FILE), b"{").unwrap();
        assert!(matches!(settings.set("net/ipv4/ip_forward", "1", &[]), Err(SettingError::Damaged { .. })));
        assert_eq!(settings.read("net/ipv4/ip_forward").unwrap().as_deref(), Some("0"));
    }

    #[test]
    fn a_setting_that_is_right_is_not_saved() {
        let (_dir, settings) = tree(&[("net/ipv4/ip_forward", "1")]);
        settings.set("net/ipv4/ip_forward", "1", &[]).unwrap();
        assert!(settings.saved().unwrap().is_empty());
    }

    #[test]
    fn settings_of_our_devices_are_told_from_the_hosts() {
        for ours in
            ["net/ipv4/conf/mesh0/rp_filter", "net/ipv6/conf/meshwg12/accept_ra", "net/ipv6/conf/mv0a/x"]
        {
            assert!(is_ours(ours, &[]), "{ours}");
        }
        for hosts in [
            "net/ipv4/ip_forward",
            "net/ipv6/fib_multipath_hash_policy",
            "net/ipv6/conf/all/forwarding",
            "net/ipv6/conf/eth0/accept_ra",
        ] {
            assert!(!is_ours(hosts, &[]), "{hosts}");
        }
        assert!(is_ours("net/ipv4/conf/lane7/rp_filter", &["lane7"]));
    }

    #[test]
    fn routers_are_listened_to_before_forwarding_begins() {
        assert!(order("net/ipv6/conf/eth0/accept_ra") < order("net/ipv6/conf/all/forwarding"));
    }
}
