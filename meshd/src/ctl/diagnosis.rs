//! `meshctl why` and `meshctl doctor`.

use std::fmt::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use mesh_core::api::{
    DoctorReport, EndStatus, Finding, Level, Pinged, Subject, Verdict, WhyReport, WhyRequest,
};

use super::{Client, EXIT_DEGRADED, EXIT_ELSEWHERE, Format, echo, print};

/// Longest pause that a daemon may ask for.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// What flow to explain.
#[derive(Debug, Args)]
pub(super) struct WhyArguments {
    /// Where it begins: an address in the mesh, a node's name or id, a container's id or a pod's name of this host
    #[arg(value_name = "SRC")]
    from: String,
    /// Where it ends; likewise
    #[arg(value_name = "DST[:PORT]")]
    to: String,
    /// Send nothing: say only what the daemon knows already
    #[arg(long)]
    passive: bool,
    /// As text, or as JSON with a versioned schema
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

/// How to look.
#[derive(Debug, Args)]
pub(super) struct DoctorArguments {
    /// Send nothing: say only what the daemon knows already
    #[arg(long)]
    passive: bool,
    /// As text, or as JSON with a versioned schema
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

pub(super) fn why(client: &Client, what: &WhyArguments) -> Result<ExitCode> {
    let mut request =
        WhyRequest { from: what.from.clone(), to: what.to.clone(), look: !what.passive, pinged: None };
    let mut report: WhyReport = client.ask("/v1/why", &request)?;
    let again = report.look_again_milliseconds;
    if !what.passive && (again.is_some() || report.ping.is_some()) {
        // The pings take longer than the probes where they are not answered.
        request.pinged = report.ping.and_then(echo::ping);
        if !matches!(request.pinged, Some(Pinged::Unanswered { .. })) {
            pause(again);
        }
        request.look = false;
        report = client.ask("/v1/why", &request)?;
    }
    let text = match what.output {
        Format::Json => serde_json::to_string_pretty(&report)?,
        Format::Table => why_text(&report),
    };
    print(text.trim_end())?;
    Ok(match report.verdict {
        Verdict::Flows => ExitCode::SUCCESS,
        Verdict::Stopped | Verdict::Unknown => ExitCode::from(EXIT_DEGRADED),
        Verdict::AskElsewhere => ExitCode::from(EXIT_ELSEWHERE),
    })
}

pub(super) fn doctor(client: &Client, how: &DoctorArguments) -> Result<ExitCode> {
    let mut report: DoctorReport = client.get(&format!("/v1/doctor?look={}", !how.passive))?;
    if report.look_again_milliseconds.is_some() {
        pause(report.look_again_milliseconds);
        report = client.get("/v1/doctor")?;
    }
    let text = match how.output {
        Format::Json => serde_json::to_string_pretty(&report)?,
        Format::Table => doctor_text(&report),
    };
    print(text.trim_end())?;
    let is_well = matches!(report.level, Level::Ok | Level::Note | Level::Warning);
    Ok(if is_well { ExitCode::SUCCESS } else { ExitCode::from(EXIT_DEGRADED) })
}

fn pause(milliseconds: Option<u64>) {
    if let Some(milliseconds) = milliseconds {
        std::thread::sleep(Duration::from_millis(milliseconds).min(LONGEST_PAUSE));
    }
}

fn why_text(report: &WhyReport) -> String {
    let port = report.port.map_or_else(String::new, |port| format!(", port {port}"));
    let mut out = format!("{} -> {}{port}\n", end(&report.source), end(&report.destination));
    let verdict = match report.verdict {
        Verdict::Flows => "FLOWS",
        Verdict::Stopped => "STOPPED",
        Verdict::AskElsewhere => "ASK ELSEWHERE",
        Verdict::Unknown => "UNKNOWN",
    };
    // Writing to a string does not fail.
    let _ = writeln!(out, "{verdict}: {}\n", report.summary);
    lines(&mut out, &report.findings);
    out
}

fn end(end: &EndStatus) -> String {
    let address = end.address.map(|address| address.to_string()).filter(|address| *address != end.text);
    let node = end.node.as_ref().map(|node| node.name.clone()).filter(|name| *name != end.text);
    let more: Vec<String> = address.into_iter().chain(node.map(|name| format!("on {name}"))).collect();
    if more.is_empty() { end.text.clone() } else { format!("{} ({})", end.text, more.join(" ")) }
}

fn doctor_text(report: &DoctorReport) -> String {
    let mut out = format!("node {} ({})\n", report.node.name, report.node.id);
    lines(&mut out, &report.findings);
    let count = |level| report.findings.iter().filter(|finding| finding.level == level).count();
    let number = |count: usize, what: &str| match count {
        0 => format!("no {what}s"),
        1 => format!("1 {what}"),
        several => format!("{several} {what}s"),
    };
    let (problems, warnings) =
        (number(count(Level::Problem), "problem"), number(count(Level::Warning), "warning"));
    let _ = writeln!(out, "\n{problems}, {warnings}");
    out
}

fn lines(out: &mut String, findings: &[Finding]) {
    for finding in findings {
        let level = match finding.level {
            Level::Ok => "ok",
            Level::Note => "note",
            Level::Warning => "WARNING",
            Level::Problem => "PROBLEM",
            Level::Unknown => "?",
        };
        let _ = writeln!(out, "{level:<8} {:<12} {}", subject(finding.about), finding.text);
        if let Some(advice) = finding.advice.as_ref().filter(|_| finding.level > Level::Note) {
            let _ = writeln!(out, "{:<8} {:<12} -> {advice}", "", "");
        }
    }
}

fn subject(about: Subject) -> &'static str {
    match about {
        Subject::Membership => "membership",
        Subject::Source => "source",
        Subject::Destination => "destination",
        Subject::Policy => "policy",
        Subject::Host => "host",
        Subject::Engine => "engine",
        Subject::Route => "route",
        Subject::Key => "key",
        Subject::Session => "session",
        Subject::Gossip => "gossip",
        Subject::Path => "path",
        Subject::Tunnel => "tunnel",
        Subject::Mtu => "mtu",
        Subject::Members => "members",
        Subject::Nat => "nat",
        Subject::Networks => "networks",
        Subject::Sysctls => "sysctls",
        Subject::Clock => "clock",
        Subject::Cluster => "cluster",
        Subject::Unknown => "?",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_is_shown_where_something_is_wrong() {
        let finding = |level, advice: &str| Finding {
            about: Subject::Tunnel,
            level,
            text: "a text".to_owned(),
            advice: Some(advice.to_owned()),
            failure: None,
            members: Vec::new(),
        };
        let mut out = String::new();
        lines(&mut out, &[finding(Level::Problem, "do this"), finding(Level::Ok, "nothing")]);
        assert_eq!(
            out,
            "PROBLEM  tunnel       a text\n                      -> do this\nok       tunnel       a text\n"
        );
    }

    #[test]
    fn an_end_is_named_once() {
        let named = |text: &str, address: &str| {
            end(&EndStatus {
                text: text.to_owned(),
                address: address.parse().ok(),
                node: Some(mesh_core::api::NodeName {
                    id: String::new(),
                    name: "h2".to_owned(),
                    this_node: false,
                }),
                attachment: None,
            })
        };
        assert_eq!(named("10.32.0.2", "10.32.0.2"), "10.32.0.2 (on h2)");
        assert_eq!(named("h2", "10.32.0.1"), "h2 (10.32.0.1)");
        assert_eq!(named("h2", ""), "h2");
    }
}
