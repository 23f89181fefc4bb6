//! What each daemon and engine uses, over all hosts.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use anyhow::{Result, ensure};
use mesh_lab::{Host, Usage};

/// The programs that are looked at.
const PROGRAMS: [&str; 2] = ["meshd", "mesh-wg"];

/// What the programs of all hosts use at one time.
pub(super) struct Meter(BTreeMap<String, Reading>);

#[derive(Clone, Default)]
struct Reading {
    usage: [Usage; 2],
    /// Bytes on the underlay.
    sent: u64,
}

impl Meter {
    /// Looks at all hosts.
    ///
    /// # Errors
    /// When one has not one process of each program.
    pub(super) fn read(hosts: &[Host]) -> Result<Self> {
        let mut readings = BTreeMap::new();
        for host in hosts {
            let mut reading = Reading { sent: host.underlay_bytes_sent()?, ..Reading::default() };
            for (usage, program) in reading.usage.iter_mut().zip(PROGRAMS) {
                let processes = host.processes_of(program)?;
                ensure!(processes.len() == 1, "{} has {} processes {program}", host.name(), processes.len());
                *usage = processes[0].usage()?;
            }
            readings.insert(host.name().to_owned(), reading);
        }
        Ok(Self(readings))
    }

    /// As if nothing had been used yet.
    pub(super) fn none(hosts: &[Host]) -> Self {
        Self(hosts.iter().map(|host| (host.name().to_owned(), Reading::default())).collect())
    }

    /// What changed since an earlier time on the hosts that were there then.
    fn since<'a, T>(
        &'a self,
        before: &'a Self,
        change: impl Fn(&Reading, &Reading) -> T + 'a,
    ) -> impl Iterator<Item = T> + 'a {
        let both = self.0.iter().filter_map(|(name, now)| Some((before.0.get(name)?, now)));
        both.map(move |(then, now)| change(then, now))
    }
}

/// Least, middle and greatest of each quantity, as a table.
#[derive(Default)]
pub(super) struct Figures(Vec<(String, [String; 4])>);

impl Figures {
    /// Processor time between two looks.
    pub(super) fn processor(&mut self, when: &str, before: &Meter, after: &Meter) {
        for (index, program) in PROGRAMS.iter().enumerate() {
            let used = after.since(before, |then, now| {
                now.usage[index].processor.saturating_sub(then.usage[index].processor)
            });
            let seconds = |used: f64| format!("{used:.2} s");
            self.add(
                format!("{program}, processor time {when}"),
                used.map(|used: Duration| used.as_secs_f64()),
                seconds,
            );
        }
    }

    /// Bytes on the underlay between two looks.
    pub(super) fn sent(&mut self, when: &str, before: &Meter, after: &Meter) {
        let sent = after.since(before, |then, now| now.sent.saturating_sub(then.sent) as f64);
        self.add(format!("host, {when}"), sent, |bytes| format!("{:.1} kB", bytes / 1000.0));
    }

    /// Memory at one time.
    pub(super) fn memory(&mut self, meter: &Meter) {
        let mebibytes = |bytes: f64| format!("{:.1} MiB", bytes / f64::from(1 << 20));
        for (index, program) in PROGRAMS.iter().enumerate() {
            let of = |what: fn(&Usage) -> u64| {
                meter.0.values().map(move |reading| what(&reading.usage[index]) as f64)
            };
            self.add(
                format!("{program}, proportional memory (PSS)"),
                of(|usage| usage.proportional),
                mebibytes,
            );
            self.add(format!("{program}, resident memory (RSS)"), of(|usage| usage.resident), mebibytes);
        }
    }

    fn add(&mut self, what: String, values: impl Iterator<Item = f64>, show: impl Fn(f64) -> String) {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        let (Some(least), Some(greatest)) = (values.first(), values.last()) else { return };
        let (middle, sum) = (values[values.len() / 2], values.iter().sum());
        self.0.push((what, [show(*least), show(middle), show(*greatest), show(sum)]));
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.0.iter().map(|(what, _)| what.chars().count()).max().unwrap_or_default();
        let mut line = |what: &str, columns: [&str; 4]| {
            write!(f, "{what:width$}")?;
            columns.iter().try_for_each(|column| write!(f, " {column:>12}"))?;
            writeln!(f)
        };
        line("", ["least", "median", "greatest", "all together"])?;
        self.0.iter().try_for_each(|(what, columns)| line(what, columns.each_ref().map(String::as_str)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meter(figures: &[(&str, u64)]) -> Meter {
        let reading = |used: u64| {
            let usage = Usage { resident: used << 20, proportional: 0, processor: Duration::from_secs(used) };
            Reading { usage: [usage; 2], sent: used * 1000 }
        };
        Meter(figures.iter().map(|(name, used)| ((*name).to_owned(), reading(*used))).collect())
    }

    #[test]
    fn the_table_has_least_middle_greatest_and_sum_of_what_changed() {
        let (before, after) =
            (meter(&[("a", 1), ("b", 1), ("c", 1)]), meter(&[("a", 2), ("b", 5), ("c", 3), ("new", 99)]));
        let mut figures = Figures::default();
        figures.processor("x", &before, &after);
        figures.sent("sent", &before, &after);
        figures.memory(&after);
        let table = figures.to_string();
        let words = |start: &str| {
            let line = table.lines().find(|line| line.starts_with(start)).unwrap();
            line[start.len()..].split_ascii_whitespace().map(str::to_owned).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(words("meshd, processor time x"), "1.00 s 2.00 s 4.00 s 7.00 s");
        assert_eq!(words("host, sent"), "1.0 kB 2.0 kB 4.0 kB 7.0 kB");
        assert_eq!(words("mesh-wg, resident memory (RSS)"), "2.0 MiB 5.0 MiB 99.0 MiB 109.0 MiB");
    }
}
