//! What a run has found: tables for people, an object for programs.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::{Map, Value, json};

use super::carrier::Carrier;
use super::quantity::Quantity;
use super::samples::Samples;

/// The values of all carriers, and why others have none.
pub(crate) struct Report {
    quantities: Vec<Quantity>,
    values: BTreeMap<Carrier, BTreeMap<&'static str, Samples>>,
    missing: BTreeMap<Carrier, String>,
}

impl Report {
    /// An empty report about these quantities, in the order of the tables.
    pub(crate) fn new(quantities: Vec<Quantity>) -> Self {
        Self { quantities, values: BTreeMap::new(), missing: BTreeMap::new() }
    }

    /// Adds the value of a round; of a quantity that nobody asked for, nothing.
    pub(crate) fn push(&mut self, carrier: Carrier, quantity: &Quantity, value: f64) {
        if self.quantities.contains(quantity) {
            self.values.entry(carrier).or_default().entry(quantity.name).or_default().push(value);
        }
    }

    /// Notes that a carrier is left out from now on. The values that it has so far remain.
    pub(crate) fn leave_out(&mut self, carrier: Carrier, reason: String) {
        self.missing.insert(carrier, reason);
    }

    /// Whether a carrier was left out.
    pub(crate) fn is_missing(&self, carrier: Carrier) -> bool {
        self.missing.contains_key(&carrier)
    }

    /// Medians with their spread, ratios, and what is missing.
    pub(crate) fn tables(&self) -> String {
        let mut text = "median (smallest–largest)\n".to_owned();
        let carriers: Vec<Carrier> = self.values.keys().copied().collect();
        text += &self.table(&carriers, |carrier, quantity| {
            self.samples(carrier, quantity).map(|samples| samples.shown(quantity.unit.decimals()))
        });
        let peers: Vec<Carrier> = carriers.iter().copied().filter(|found| *found != OURS).collect();
        if peers.len() < carriers.len() && !peers.is_empty() {
            text += &format!("\n{} / peer (better is ↑ above 1, ↓ below 1)\n", OURS.name());
            text += &self.table(&peers, |peer, quantity| Some(format!("{:.2}", self.ratio(quantity, peer)?)));
        }
        for (carrier, reason) in &self.missing {
            // Writing to a string cannot fail.
            let _written = write!(text, "\nMISSING: {}: {reason}", carrier.name());
        }
        text
    }

    /// The part of the JSON output that was measured.
    pub(crate) fn to_json(&self) -> Map<String, Value> {
        let carriers = self.values.iter().map(|(carrier, found)| {
            let samples = found.iter().map(|(name, samples)| ((*name).to_owned(), samples.to_json()));
            (carrier.name().to_owned(), Value::Object(samples.collect()))
        });
        let ratios = self.quantities.iter().filter_map(|quantity| {
            let peers = self.values.keys().filter(|carrier| **carrier != OURS);
            let ratio = |peer: &Carrier| Some((peer.name().to_owned(), self.ratio(quantity, *peer)?.into()));
            let ratios: Map<String, Value> = peers.filter_map(ratio).collect();
            (!ratios.is_empty()).then(|| (quantity.name.to_owned(), Value::Object(ratios)))
        });
        let units = self.quantities.iter().map(|found| (found.name.to_owned(), found.unit.name().into()));
        let missing = self.missing.iter().map(|(carrier, reason)| (carrier.name().to_owned(), json!(reason)));
        Map::from_iter([
            ("units".to_owned(), Value::Object(units.collect())),
            ("carriers".to_owned(), Value::Object(carriers.collect())),
            ("ratios".to_owned(), Value::Object(ratios.collect())),
            ("missing".to_owned(), Value::Object(missing.collect())),
        ])
    }

    fn samples(&self, carrier: Carrier, quantity: &Quantity) -> Option<&Samples> {
        self.values.get(&carrier)?.get(quantity.name)
    }

    /// Our median by that of a peer; `None` unless both have one and it is a number.
    fn ratio(&self, quantity: &Quantity, peer: Carrier) -> Option<f64> {
        let median = |carrier| self.samples(carrier, quantity)?.median();
        Some(median(OURS)? / median(peer)?).filter(|ratio| ratio.is_finite())
    }

    /// A row for each quantity that has a cell, a column for each carrier.
    fn table(&self, carriers: &[Carrier], cell: impl Fn(Carrier, &Quantity) -> Option<String>) -> String {
        let mut rows = vec![vec![String::new()]];
        rows[0].extend(carriers.iter().map(|carrier| carrier.name().to_owned()));
        for quantity in &self.quantities {
            let cells: Vec<Option<String>> = carriers.iter().map(|found| cell(*found, quantity)).collect();
            if cells.iter().any(Option::is_some) {
                let arrow = if quantity.unit.more_is_better() { '↑' } else { '↓' };
                let mut row = vec![format!("{}, {} {arrow}", quantity.name, quantity.unit.name())];
                row.extend(cells.into_iter().map(|cell| cell.unwrap_or_else(|| "–".to_owned())));
                rows.push(row);
            }
        }
        aligned(&rows)
    }
}

/// Rows of equal length with their columns below each other: the first to the left, the others to the right.
fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
            text += &if column == 0 { format!("{cell:<width$}") } else { format!("  {cell:>width$}") };
        }
        text += "\n";
    }
    text
}

/// The carrier that the others are compared with.
const OURS: Carrier = Carrier::MeshWg;

#[cfg(test)]
mod tests {
    use super::super::quantity::TESTS;
    use super::*;

    fn quantity(name: &str) -> Quantity {
        *TESTS.iter().flat_map(|test| test.quantities).find(|found| found.name == name).unwrap()
    }

    fn example() -> Report {
        let (tcp, cpu) = (quantity("tcp4_1"), quantity("cpu_per_gb"));
        let mut report = Report::new(vec![tcp, cpu]);
        for value in [1.0, 3.0, 2.0] {
            report.push(Carrier::MeshWg, &tcp, value);
            report.push(Carrier::Gotatun, &tcp, value * 2.0);
            report.push(Carrier::Veth, &tcp, 0.0);
            report.push(Carrier::MeshWg, &cpu, value);
            report.push(Carrier::MeshWg, &quantity("udp64"), value);
        }
        report.leave_out(Carrier::Boringtun, "it does not build".to_owned());
        report
    }

    #[test]
    fn programs_get_medians_ratios_and_what_is_missing() {
        let json = Value::Object(example().to_json());
        let expected = json!({"median": 4.0, "min": 2.0, "max": 6.0, "values": [2.0, 6.0, 4.0]});
        assert_eq!(json["carriers"]["gotatun"]["tcp4_1"], expected);
        assert_eq!(json["units"]["tcp4_1"], "Gbit/s");
        // No ratio to nothing, and none without a peer that has the quantity.
        assert_eq!(json["ratios"], json!({"tcp4_1": {"gotatun": 0.5}}));
        assert_eq!(json["missing"], json!({"boringtun": "it does not build"}));
        // Nobody asked for it.
        assert_eq!(json["carriers"]["mesh-wg"].get("udp64"), None);
    }

    #[test]
    fn people_get_aligned_tables() {
        let text = example().tables();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[1], "                                veth           gotatun           mesh-wg");
        assert_eq!(lines[2], "tcp4_1, Gbit/s ↑    0.00 (0.00–0.00)  4.00 (2.00–6.00)  2.00 (1.00–3.00)");
        assert_eq!(lines[3], "cpu_per_gb, s/GB ↓                 –                 –  2.00 (1.00–3.00)");
        assert!(text.contains("\nMISSING: boringtun: it does not build"));
    }
}
