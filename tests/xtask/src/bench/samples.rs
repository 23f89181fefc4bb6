//! Repeated measurements of one quantity.

use serde_json::{Value, json};

/// The values of one quantity, one for each round.
#[derive(Clone, Debug, Default)]
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    /// Adds the value of a round.
    pub(crate) fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// The value in the middle; of an even number, the mean of the two in the middle. `None` without values.
    pub(crate) fn median(&self) -> Option<f64> {
        let sorted = self.sorted();
        let middle = sorted.len() / 2;
        match sorted.len() {
            0 => None,
            length if length % 2 == 1 => Some(sorted[middle]),
            _ => Some(f64::midpoint(sorted[middle - 1], sorted[middle])),
        }
    }

    /// The smallest value that at least this share (0 to 1) of all values does not exceed.
    pub(crate) fn quantile(&self, share: f64) -> Option<f64> {
        let sorted = self.sorted();
        let rank = (share * sorted.len() as f64).ceil() as usize;
        sorted.get(rank.saturating_sub(1)).copied()
    }

    /// Smallest and largest value.
    pub(crate) fn spread(&self) -> Option<(f64, f64)> {
        let sorted = self.sorted();
        Some((*sorted.first()?, *sorted.last()?))
    }

    /// `median (smallest–largest)`, or a dash without values.
    pub(crate) fn shown(&self, decimals: usize) -> String {
        match (self.median(), self.spread()) {
            (Some(median), Some((low, high))) => {
                format!("{median:.decimals$} ({low:.decimals$}–{high:.decimals$})")
            }
            _ => "–".to_owned(),
        }
    }

    /// The same for machines, with every value.
    pub(crate) fn to_json(&self) -> Value {
        let (min, max) = self.spread().unzip();
        json!({ "median": self.median(), "min": min, "max": max, "values": self.0 })
    }

    fn sorted(&self) -> Vec<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        sorted
    }
}

impl FromIterator<f64> for Samples {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> Self {
        Self(values.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(values: &[f64]) -> Samples {
        Samples(values.to_vec())
    }

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(of(&[]).median(), None);
        assert_eq!(of(&[3.0, 1.0, 2.0]).median(), Some(2.0));
        assert_eq!(of(&[4.0, 1.0, 2.0, 3.0]).median(), Some(2.5));
    }

    #[test]
    fn quantiles_are_values_that_were_measured() {
        assert_eq!(of(&[]).quantile(0.5), None);
        let hundred: Samples = (1..=100).rev().map(f64::from).collect();
        assert_eq!(hundred.quantile(0.0), Some(1.0));
        assert_eq!(hundred.quantile(0.5), Some(50.0));
        assert_eq!(hundred.quantile(0.99), Some(99.0));
        assert_eq!(hundred.quantile(1.0), Some(100.0));
        assert_eq!(of(&[3.0, 1.0]).quantile(0.99), Some(3.0));
    }

    #[test]
    fn spread_and_text() {
        assert_eq!(of(&[2.0, 1.0, 9.0]).spread(), Some((1.0, 9.0)));
        assert_eq!(of(&[2.0, 1.0, 9.0]).shown(1), "2.0 (1.0–9.0)");
        assert_eq!(of(&[]).shown(1), "–");
    }
}
