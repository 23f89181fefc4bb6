//! `remove`, `join-window` and admin keys: what an authority says to the cluster.
//!
//! The admin key is read, used and wiped here. The daemon says what is to be signed and gets it signed.

use std::fs::OpenOptions;
use std::io::{BufRead as _, IsTerminal as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, bail};
use clap::{Args, Subcommand};
use hyper::Method;
use mesh_core::api::{JoinWindowRequest, JoinWindowStatus, RemovalPlan, RemovalRequest};
use mesh_keys::rand_core::OsRng;
use mesh_keys::{AdminKey, IdentityKey, JoinWindow, NodeId, SignedJoinPolicy, SignedRemoval, admin};
use mesh_sys::files;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};

use super::{Client, print};

/// Longest file with an admin key.
const MAX_KEY_FILE: usize = 4096;

#[derive(Debug, Args)]
pub(super) struct RemoveArguments {
    /// Its name, or its id or the first 8 or more digits of it
    node: String,
    /// File with the secret admin key, in a cluster that has one
    #[arg(long, value_name = "FILE")]
    admin_key_file: Option<PathBuf>,
    /// Do not ask, although the node is alive or an admin key signs
    #[arg(long)]
    yes: bool,
    /// In a cluster with an admin key: leave joining as it is, although the removed node may know the secret for it
    #[arg(long)]
    keep_joins_open: bool,
}

#[derive(Debug, Subcommand)]
pub(super) enum WindowVerb {
    /// Let nodes join
    Open {
        /// Only for so long, such as 90s, 15m, 24h or 7d
        #[arg(long = "for", value_name = "TIME", value_parser = duration)]
        span: Option<Duration>,
        /// File with the secret admin key, in a cluster that has one
        #[arg(long, value_name = "FILE")]
        admin_key_file: Option<PathBuf>,
    },
    /// Let no nodes join
    Close {
        /// File with the secret admin key, in a cluster that has one
        #[arg(long, value_name = "FILE")]
        admin_key_file: Option<PathBuf>,
    },
    /// Whether nodes may join, and who said so
    Show,
}

/// Makes an admin key: the secret one in a new file, the public one on standard output.
pub(super) fn make_admin_key(path: &Path) -> Result<ExitCode> {
    let key = AdminKey::generate(&mut OsRng);
    // Never over another key: that would be gone for good.
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("cannot make the file {}", path.display()))?;
    file.write_all(key.to_text().as_bytes())
        .and_then(|()| file.sync_all())
        .with_context(|| format!("cannot write {}", path.display()))?;
    print(&admin::public_to_text(&key.public()))
}

pub(super) fn remove(client: &Client, arguments: &RemoveArguments) -> Result<ExitCode> {
    let node = utf8_percent_encode(&arguments.node, NON_ALPHANUMERIC);
    let plan: RemovalPlan = client.get(&format!("/v1/removals/prepare?node={node}"))?;
    check_plan(&plan, &arguments.node)?;
    let called = called(&plan);
    let key = admin_key(arguments.admin_key_file.as_deref(), &plan.admin_keys)?;
    if let Some(question) = question(&plan, key.is_some()) {
        if arguments.yes {
            writeln!(std::io::stderr(), "{question}").context("standard error")?;
        } else {
            confirm(&format!("{question} Remove it?"))?;
        }
    }
    let close = key.is_some() && plan.knows_join_secret && !arguments.keep_joins_open;
    let request = match &key {
        None => RemovalRequest::Node(plan.node),
        Some(key) => {
            let signer = key.signer();
            let removal = SignedRemoval::issue_naming(
                plan.cluster,
                plan.subject,
                plan.heir,
                plan.keep.clone(),
                &plan.grants,
                signer,
            )?;
            let policy = if close {
                let serial = next_serial(&plan.joins, unix_now())?;
                Some(SignedJoinPolicy::issue(plan.cluster, serial, JoinWindow::Closed, signer)?)
            } else {
                None
            };
            RemovalRequest::Signed { removal, policy }
        }
    };
    client.send(Method::POST, "/v1/removals", &request)?;
    let joins = match (close, plan.knows_join_secret, key.is_some()) {
        (_, false, _) => "",
        // What the others hold may be newer than what was known here.
        (true, ..) => match client.get::<JoinWindowStatus>("/v1/join-window") {
            Ok(status) if status.window == JoinWindow::Closed => {
                "\nJoining is closed now, because the removed node may know the password or key. Give the members a new one, then: meshctl join-window open --admin-key-file FILE"
            }
            Ok(_) => {
                "\nJoining is NOT closed, although the removed node may know the password or key: another admin key, or a later command, has said otherwise. meshctl join-window show tells who; to close it: meshctl join-window close --admin-key-file FILE"
            }
            Err(_) => {
                "\nThe removed node may know the password or key, and whether joining is closed cannot be asked here any more: see meshctl join-window show on another member."
            }
        },
        (false, _, true) => {
            "\nJoining stays as it was: the removed node can join again under another identity if it knows the password or key."
        }
        (false, _, false) => {
            "\nIf it knows the password or key it can join again under another identity: in a flat cluster nothing keeps a malicious node out."
        }
    };
    print(&format!("{called} is removed for good.{joins}"))
}

fn called(plan: &RemovalPlan) -> String {
    format!("{} ({})", plan.name.as_deref().unwrap_or("the node without a name"), plan.node)
}

/// Whether the daemon's proposal is about what the operator has typed. What it says of names cannot be checked: that is
/// why the id is shown.
fn check_plan(plan: &RemovalPlan, typed: &str) -> Result<()> {
    let called = called(plan);
    if plan.subject.node_id() != plan.node {
        bail!("the daemon's answer makes no sense: {called} has another key");
    }
    let (id, digits) = (plan.node.to_string(), typed.to_ascii_lowercase());
    let is_id = typed.len() >= MIN_PREFIX && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    let named = plan.name.as_deref() == Some(typed) && typed.len() < id.len();
    if !(named || (is_id && id.starts_with(&digits))) {
        bail!("the daemon's answer makes no sense: it was asked for {typed:?} and proposes {called}");
    }
    Ok(())
}

/// Fewest digits that name a node.
const MIN_PREFIX: usize = 8;

/// What the operator should know before the node goes, if there is something.
fn question(plan: &RemovalPlan, with_admin_key: bool) -> Option<String> {
    let alive = plan.alive.as_ref().map(|alive| format!("; it is alive: {alive}"));
    if alive.is_none() && !with_admin_key {
        return None;
    }
    let kept = match plan.keep.len() {
        0 => "and nobody whom it has let in stays".to_owned(),
        1 => format!("and {} stays, which it has let in", list(&plan.keep)),
        count => format!("and these {count} stay, which it has let in: {}", list(&plan.keep)),
    };
    Some(format!(
        "{} leaves for good, and its pods lose the mesh at once{}. {} takes over its addresses, {kept}.",
        called(plan),
        alive.unwrap_or_default(),
        plan.heir.node_id(),
    ))
}

fn list(nodes: &[NodeId]) -> String {
    const MOST: usize = 8;
    let mut shown: Vec<String> = nodes.iter().take(MOST).map(NodeId::to_string).collect();
    if nodes.len() > MOST {
        shown.push(format!("and {} more", nodes.len() - MOST));
    }
    shown.join(", ")
}

/// The serial of the next statement: also higher than what members say that this one has not heard of, most likely. One
/// far in the future is refused: no later statement could take its place.
fn next_serial(status: &JoinWindowStatus, now: u64) -> Result<u64> {
    if status.next_serial > now.saturating_add(LONGEST.as_secs()) {
        bail!(
            "the daemon proposes the serial {}, which is years ahead of this host's clock ({now}): nothing could take the place of such a statement. Is the clock of this host right?",
            status.next_serial
        );
    }
    Ok(status.next_serial.max(now))
}

pub(super) fn join_window(client: &Client, verb: &WindowVerb) -> Result<ExitCode> {
    let status: JoinWindowStatus = client.get("/v1/join-window")?;
    let (window, key_file) = match verb {
        WindowVerb::Show => return print(&describe(&status)),
        WindowVerb::Open { span: None, admin_key_file } => (JoinWindow::Open, admin_key_file),
        WindowVerb::Open { span: Some(span), admin_key_file } => {
            (JoinWindow::Until(unix_now() + span.as_secs()), admin_key_file)
        }
        WindowVerb::Close { admin_key_file } => (JoinWindow::Closed, admin_key_file),
    };
    let request = match admin_key(key_file.as_deref(), &status.admin_keys)? {
        None => JoinWindowRequest::Set(window),
        Some(key) => JoinWindowRequest::Signed(SignedJoinPolicy::issue(
            status.cluster,
            next_serial(&status, unix_now())?,
            window,
            key.signer(),
        )?),
    };
    client.send(Method::PUT, "/v1/join-window", &request)?;
    let status: JoinWindowStatus = client.get("/v1/join-window")?;
    if status.window != window {
        bail!("it was said, but is not in force: {}", describe(&status));
    }
    print(&describe(&status))
}

fn describe(status: &JoinWindowStatus) -> String {
    let state = match status.window {
        JoinWindow::Open => "open: nodes with the password or key may join".to_owned(),
        JoinWindow::Closed => "closed: no node may join by password or key".to_owned(),
        JoinWindow::Until(end) if status.open => {
            format!("open for another {} s", end.saturating_sub(unix_now()))
        }
        JoinWindow::Until(_) => "closed: the time for which it was open is over".to_owned(),
    };
    match &status.signer {
        Some(signer) if status.admin_keys.contains(signer) => {
            format!("{state}\nsaid by the admin key {}", admin::public_to_text(signer))
        }
        Some(signer) => format!("{state}\nsaid by node {}", signer.node_id()),
        None => format!("{state}\nnobody has said anything: that is the default"),
    }
}

/// The admin key for a cluster with these; `None` where there are none.
pub(super) fn admin_key(file: Option<&Path>, wanted: &[IdentityKey]) -> Result<Option<AdminKey>> {
    let Some(path) = file else {
        if wanted.is_empty() {
            return Ok(None);
        }
        bail!("this cluster has an admin key, which has to sign: give its file with --admin-key-file");
    };
    if wanted.is_empty() {
        bail!("this cluster is flat: it has no admin key; leave --admin-key-file out");
    }
    let bytes = files::read_secret(path, MAX_KEY_FILE).context("admin-key-file")?;
    let text = std::str::from_utf8(&bytes).with_context(|| format!("{} is not text", path.display()))?;
    let key = AdminKey::from_text(text).with_context(|| format!("admin-key-file {}", path.display()))?;
    if !wanted.contains(&key.public()) {
        bail!("{} is none of the admin keys of this cluster", path.display());
    }
    Ok(Some(key))
}

pub(super) fn confirm(question: &str) -> Result<()> {
    let mut input = std::io::stdin().lock();
    if !input.is_terminal() {
        bail!("{question} Say so with --yes");
    }
    write!(std::io::stderr(), "{question} [y/N] ").context("standard error")?;
    let mut answer = String::new();
    input.read_line(&mut answer).context("standard input")?;
    if matches!(answer.trim(), "y" | "Y" | "yes") { Ok(()) } else { bail!("nothing was changed") }
}

/// Seconds since 1970.
pub(super) fn unix_now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |now| now.as_secs())
}

/// Reads a number with s, m, h or d behind it.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let bad = || format!("{text:?} is not a time such as 90s, 15m, 24h or 7d");
    let unit = text.chars().last().ok_or_else(bad)?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 86_400,
        _ => return Err(bad()),
    };
    let count: u64 = text[..text.len() - unit.len_utf8()].parse().map_err(|_| bad())?;
    match count.checked_mul(seconds) {
        None | Some(0) => Err(bad()),
        Some(seconds) if seconds > LONGEST.as_secs() => Err(format!("{text} is longer than ten years")),
        Some(seconds) => Ok(Duration::from_secs(seconds)),
    }
}

/// Longest time that can be asked for.
const LONGEST: Duration = Duration::from_secs(10 * 366 * 86_400);

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn times_have_units() {
        for (text, seconds) in [("90s", 90), ("15m", 900), ("24h", 86_400), ("7d", 604_800)] {
            assert_eq!(duration(text), Ok(Duration::from_secs(seconds)));
        }
        for text in ["", "15", "m", "0h", "-1h", "1.5h", "15 m", "99999999d", "15µ"] {
            assert!(duration(text).is_err(), "{text:?}");
        }
    }

    fn plan() -> RemovalPlan {
        let key = |byte| mesh_keys::Identity::from_bytes(&[byte; 32]).public();
        let cluster = mesh_keys::ClusterId::from_bytes([9; 32]);
        RemovalPlan {
            cluster,
            admin_keys: vec![key(9)],
            node: key(1).node_id(),
            name: Some("web-1".into()),
            this_node: false,
            alive: None,
            knows_join_secret: true,
            subject: key(1),
            heir: key(2),
            keep: vec![key(3).node_id()],
            grants: Vec::new(),
            joins: JoinWindowStatus {
                cluster,
                admin_keys: vec![key(9)],
                window: JoinWindow::Open,
                open: true,
                signer: None,
                next_serial: 1,
            },
        }
    }

    #[test]
    fn only_what_was_typed_is_signed_away() {
        let plan = plan();
        let id = plan.node.to_string();
        for typed in ["web-1", &id, &id[..8], &id.to_uppercase()] {
            check_plan(&plan, typed).unwrap();
        }
        let other = plan.heir.node_id().to_string();
        for typed in ["web-2", &other, &other[..8], &id[..7], ""] {
            assert!(
                check_plan(&plan, typed).unwrap_err().to_string().contains("makes no sense"),
                "{typed:?}"
            );
        }
        // A daemon that calls a node by the id of another.
        let lie = RemovalPlan { name: Some(other.clone()), ..plan.clone() };
        assert!(check_plan(&lie, &other).is_err());
        let lie = RemovalPlan { subject: plan.heir, ..plan };
        assert!(check_plan(&lie, "web-1").is_err());
    }

    #[test]
    fn an_admin_key_signs_nothing_that_was_not_shown() {
        let plan = plan();
        assert_eq!(question(&plan, false), None, "flat, and nothing is heard of it");
        let alive = RemovalPlan { alive: Some("it answers".into()), ..plan.clone() };
        assert!(question(&alive, false).unwrap().contains("it answers"));
        let shown = question(&plan, true).unwrap();
        for what in [plan.node, plan.heir.node_id(), plan.keep[0]] {
            assert!(shown.contains(&what.to_string()), "{shown}");
        }
        let many = RemovalPlan { keep: vec![plan.node; 11], ..plan };
        assert!(question(&many, true).unwrap().contains("and 3 more"));
    }

    #[test]
    fn serials_follow_the_clock_and_absurd_ones_are_refused() {
        let now = 1_800_000_000;
        let proposed = |next_serial| next_serial_of(next_serial, now);
        fn next_serial_of(proposed: u64, now: u64) -> Result<u64> {
            next_serial(&JoinWindowStatus { next_serial: proposed, ..plan().joins }, now)
        }
        assert_eq!(proposed(1).unwrap(), now);
        assert_eq!(proposed(now + 5).unwrap(), now + 5);
        assert!(proposed(u64::MAX).unwrap_err().to_string().contains("clock"));
    }

    #[test]
    fn an_admin_key_is_written_for_its_owner_only_and_never_over_another() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin.key");
        make_admin_key(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let before = std::fs::read_to_string(&path).unwrap();
        assert!(make_admin_key(&path).is_err());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), before);

        let public = AdminKey::from_text(&before).unwrap().public();
        let other = AdminKey::generate(&mut OsRng).public();
        let read = |file: Option<&Path>, wanted: &[IdentityKey]| {
            admin_key(file, wanted)
                .map(|key| key.map(|key| key.public()))
                .map_err(|error| format!("{error:#}"))
        };
        assert_eq!(read(Some(&path), &[other, public]), Ok(Some(public)));
        assert_eq!(read(None, &[]), Ok(None));
        for (file, wanted, words) in [
            (Some(path.as_path()), vec![other], "none of the admin keys"),
            (Some(&path), vec![], "flat"),
            (None, vec![public], "--admin-key-file"),
        ] {
            assert!(read(file, &wanted).unwrap_err().contains(words));
        }
    }
}
