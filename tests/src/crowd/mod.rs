//! A crowd: many real daemons on one machine, split and healed, one removed, one added; and what that costs.
//!
//! `cargo xtask crowd` runs it with sixty; the suite `lab` with a few. What is promised in time is printed and not
//! asserted, because a busy machine may miss it: all waits end after [`Plan::patience`].

mod figures;
mod law;
mod pings;
mod watch;

use std::collections::BTreeSet;
use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mesh_lab::{Host, Lab, Options, Secret};

use figures::{Figures, Meter};
use law::{Law, Members};
use pings::{Pings, ping_everybody};
use watch::{Waited, wait_for_all};

/// Within this time of the last start everybody is connected with everybody, it is promised.
const PROMISE: Duration = Duration::from_secs(30);

/// How long it takes at least until what was done last has come to rest, and idleness can be measured.
const REST: Duration = Duration::from_secs(15);

/// A ping to an address that must not answer waits this long.
const SILENCE: Duration = Duration::from_secs(2);

/// So many hosts try what must not work: a proof by all would take long, and add little to what is read from all.
const SOME: usize = 6;

/// What to do.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Number of hosts at first; at least four.
    pub nodes: usize,
    /// How long the two halves are apart at least. They are until each calls the other unreachable, too.
    pub split: Duration,
    /// How long processor time is measured in a crowd that has nothing to do.
    pub idle: Duration,
    /// How long any wait may take.
    pub patience: Duration,
}

impl Plan {
    /// Sixty hosts, halves apart for 75 s, a minute of idleness.
    #[must_use]
    pub fn new(nodes: usize) -> Self {
        Self {
            nodes,
            split: Duration::from_secs(75),
            idle: Duration::from_secs(60),
            patience: Duration::from_secs(180),
        }
    }
}

/// Brings the crowd up and does all of it. The lab goes at the end, also when something fails, unless it is to be
/// kept.
///
/// # Errors
/// The first thing that is not as it should be.
pub fn run(options: Options, plan: &Plan, out: &mut dyn Write) -> Result<()> {
    ensure!(plan.nodes >= 4, "a crowd has at least 4 nodes, not {}", plan.nodes);
    options.binaries.check()?;
    let start = Instant::now();
    // By key: what is looked at is the crowd. Each join by password is a quarter of a second of Argon2id.
    let lab =
        Lab::up(Options { nodes: plan.nodes, pods: 0, daemons: false, secret: Secret::Key, ..options })?;
    let mut crowd = Crowd { lab, plan: *plan, out, start, figures: Figures::default(), removed: None };
    let outcome = crowd.through();
    // Also of a run that failed: they may say why.
    let complaints = crowd.complaints();
    outcome.and(complaints)
}

struct Crowd<'a> {
    lab: Lab,
    plan: Plan,
    out: &'a mut dyn Write,
    start: Instant,
    figures: Figures,
    removed: Option<Host>,
}

impl Crowd<'_> {
    fn through(&mut self) -> Result<()> {
        let hosts = self.lab.hosts();
        self.say(&format!("{} hosts are there, none of them with a daemon", hosts.len()))?;
        let members = self.meet(&hosts)?;
        self.split_and_heal(&hosts, &members)?;
        let rest = self.remove_one(&hosts, &members)?;
        let crowd = self.add_one(rest)?;
        self.idle(&crowd)?;
        self.last_pings(&crowd)
    }

    fn say(&mut self, line: &str) -> Result<()> {
        writeln!(self.out, "{:7.2} s  {line}", self.start.elapsed().as_secs_f64())?;
        Ok(self.out.flush()?)
    }

    /// Says how long something took since `since`, and whether a promise was kept.
    fn say_met(&mut self, what: &str, waited: &Waited, promise: Option<Duration>) -> Result<()> {
        let verdict = match promise {
            Some(limit) if waited.all > limit => {
                format!("  ** MISSED: {:.0} s are promised **", limit.as_secs_f64())
            }
            Some(limit) => format!("  (promised: {:.0} s)", limit.as_secs_f64()),
            None => String::new(),
        };
        let (half, all) = (waited.half.as_secs_f64(), waited.all.as_secs_f64());
        self.say(&format!("{what}: {all:.2} s, half of them after {half:.2} s{verdict}"))
    }

    fn meter(&self, hosts: &[Host]) -> Result<Meter> {
        Meter::read(hosts)
    }

    /// Starts all daemons and waits for the full mesh.
    fn meet(&mut self, hosts: &[Host]) -> Result<Members> {
        let first = Instant::now();
        for host in hosts {
            host.spawn_daemon(&[])?;
        }
        let last_start = Instant::now();
        self.say(&format!("all daemons were started within {:.2} s", (last_start - first).as_secs_f64()))?;
        let waited = wait_for_all(hosts, last_start, self.plan.patience, |_, status| {
            law::connected(status, hosts.len())
        })
        .context("waiting for the full mesh")?;
        self.say_met("full mesh since the last start", &waited, Some(PROMISE))?;
        let members = Members::learn(hosts)?;
        self.pings_must_all_answer("every pair, first ping of each tunnel", hosts, &members)?;
        self.figures.processor(
            "until the full mesh and the first pings",
            &Meter::none(hosts),
            &self.meter(hosts)?,
        );
        Ok(members)
    }

    fn pings_must_all_answer(&mut self, what: &str, hosts: &[Host], members: &Members) -> Result<Pings> {
        let pings = ping_everybody(hosts, self.plan.patience, |from| {
            members.addresses(hosts.iter().filter(|to| to.name() != from.name()))
        })?;
        self.say(&format!("{what}: {pings}"))?;
        ensure!(pings.unanswered.is_empty(), "{what}: no answer: {}", pings.some_unanswered());
        Ok(pings)
    }

    /// Cuts one half from the other: nothing is withdrawn, the halves go on; then heals it.
    fn split_and_heal(&mut self, hosts: &[Host], members: &Members) -> Result<()> {
        let before = Law::of_all(hosts)?;
        let meter = self.meter(hosts)?;
        let (left, right) = hosts.split_at(hosts.len() / 2);
        self.lab.cut_groups(&[left, right])?;
        let cut = Instant::now();
        let ids = [members.ids(left)?, members.ids(right)?];
        let sides = |host: &Host| {
            let on_the_left = left.iter().any(|other| other.name() == host.name());
            if on_the_left { (&ids[0], &ids[1]) } else { (&ids[1], &ids[0]) }
        };
        let waited = wait_for_all(hosts, cut, self.plan.patience, |host, status| {
            let (near, far) = sides(host);
            law::split(status, near, far)
        })
        .context("waiting for the halves to call each other unreachable")?;
        let halves = format!(
            "{} and {} hosts cut from each other, each half calls the other unreachable",
            left.len(),
            right.len()
        );
        self.say_met(&halves, &waited, None)?;
        std::thread::sleep(self.plan.split.saturating_sub(cut.elapsed()));

        for half in [left, right] {
            self.pings_must_all_answer("within a half", half, members)?;
        }
        let across = ping_everybody(&[left[0].clone(), right[0].clone()], SILENCE, |from| {
            let far = if from.name() == left[0].name() { right } else { left };
            members.addresses(far)
        })?;
        ensure!(across.answered == 0, "the cut is none: {across}");
        let after = Law::of_all(hosts)?;
        law::same(hosts, &before, &after).context("something was withdrawn while the halves were apart")?;
        self.say(&format!(
            "after {:.0} s apart: tunnels, routes and addresses of all are what they were",
            cut.elapsed().as_secs_f64()
        ))?;

        self.lab.heal_all()?;
        let healed = Instant::now();
        let waited =
            wait_for_all(hosts, healed, self.plan.patience, |_, status| law::connected(status, hosts.len()))
                .context("waiting for the halves to find each other")?;
        self.say_met("full mesh since the halves were joined again", &waited, None)?;
        self.pings_must_all_answer("every pair", hosts, members)?;
        self.figures.processor("from the cut to the pings after it", &meter, &self.meter(hosts)?);
        Ok(())
    }

    /// Removes one by the word of another; neither is the founder. Returns those that stay.
    fn remove_one(&mut self, hosts: &[Host], members: &Members) -> Result<Vec<Host>> {
        let gone = hosts[hosts.len() / 2 - 1].clone();
        let rest: Vec<Host> = hosts.iter().filter(|host| host.name() != gone.name()).cloned().collect();
        let by = rest.last().context("nobody is left")?;
        let key = law::tunnel_key(&gone)?;
        let id = members.id(&gone)?;
        let start = Instant::now();
        by.exec_ok(&["meshctl", "remove", id, "--yes"])?;
        self.removed = Some(gone.clone());
        let waited = wait_for_all(&rest, start, self.plan.patience, |_, status| law::gone(status, id))
            .context("waiting for the removed node to be known no more")?;
        let what = format!("{} was removed by {}, and no other knows it any more", gone.name(), by.name());
        self.say_met(&what, &waited, None)?;
        let itself = std::slice::from_ref(&gone);
        let waited = wait_for_all(itself, start, self.plan.patience, |_, status| law::says_removed(status))?;
        self.say_met("the removed node says so itself", &waited, None)?;
        let waited =
            wait_for_all(&rest, start, self.plan.patience, |_, status| law::connected(status, rest.len()))
                .context("waiting for the removal to be settled")?;
        self.say_met("no problem is left on any other", &waited, None)?;
        for host in &rest {
            ensure!(!law::tunnels(host)?.contains(&key), "{} has a tunnel to the removed node", host.name());
        }
        let some = &rest[..rest.len().min(SOME)];
        let silent = ping_everybody(some, SILENCE, |_| members.addresses([&gone]))?;
        ensure!(silent.answered == 0, "the removed node is reached: {silent}");
        Ok(rest)
    }

    /// A new host joins. Returns all members.
    fn add_one(&mut self, mut hosts: Vec<Host>) -> Result<Vec<Host>> {
        let host = self.lab.add_host()?;
        let name = host.name().to_owned();
        host.spawn_daemon(&[])?;
        let start = Instant::now();
        hosts.push(host);
        let waited =
            wait_for_all(&hosts, start, self.plan.patience, |_, status| law::connected(status, hosts.len()))
                .context("waiting for the new host to be connected with all")?;
        self.say_met(&format!("{name} was added, full mesh since its start"), &waited, None)?;
        Ok(hosts)
    }

    /// Measures a crowd that has nothing to do, and prints the table.
    fn idle(&mut self, hosts: &[Host]) -> Result<()> {
        std::thread::sleep(REST.min(self.plan.idle));
        let before = self.meter(hosts)?;
        std::thread::sleep(self.plan.idle);
        let after = self.meter(hosts)?;
        let seconds = self.plan.idle.as_secs();
        self.figures.processor(&format!("in {seconds} s with nothing to do"), &before, &after);
        self.figures.processor("in total", &Meter::none(hosts), &after);
        self.figures.sent(&format!("sent in {seconds} s with nothing to do"), &before, &after);
        self.figures.memory(&after);
        writeln!(self.out, "\nFigures of each of {} hosts:\n{}\n", hosts.len(), self.figures)?;
        Ok(())
    }

    fn last_pings(&mut self, hosts: &[Host]) -> Result<()> {
        let members = Members::learn(hosts)?;
        self.pings_must_all_answer("every pair at the end", hosts, &members)?;
        let text = hosts[0].exec_ok(&["meshctl", "status"])?;
        let words = format!("{} members", hosts.len());
        ensure!(text.contains(&words), "`meshctl status` does not say {words:?}:\n{text}");
        Ok(())
    }

    /// Tells what the daemons complain about in their logs. Errors, and daemons that ended, are a failure.
    fn complaints(&mut self) -> Result<()> {
        let hosts = self.lab.hosts();
        let ended: BTreeSet<String> = hosts
            .iter()
            .filter(|host| host.daemon().is_some_and(|daemon| !daemon.process.is_alive()))
            .map(|host| format!("{} ({:?})", host.name(), host.daemon_ending()))
            .collect();
        let complaints = law::complaints(&hosts, self.removed.as_ref())?;
        if complaints.is_empty() {
            self.say("no daemon has logged a warning or an error")?;
        }
        for (line, found) in &complaints {
            let hosts = found.hosts.len();
            self.say(&format!(
                "{} × on {hosts} hosts: {line}\n           such as {}",
                found.times, found.example
            ))?;
        }
        ensure!(ended.is_empty(), "daemons have ended: {}", ended.into_iter().collect::<Vec<_>>().join(", "));
        let errors = complaints.values().filter(|found| found.is_error).count();
        ensure!(errors == 0, "daemons have logged {errors} kinds of errors; the lines are above");
        Ok(())
    }
}
