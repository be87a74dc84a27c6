//! Figures: measured values by name, their summaries, and how they are printed.

use std::{collections::BTreeMap, time::Instant};

use pericarp_tests::Runtime;
use serde::Serialize;
use serde_json::{Map, Value, json};

/// Values of each figure, in the order in which figures were first seen.
#[derive(Default)]
pub struct Figures(Vec<(String, Vec<f64>)>);

impl Figures {
    pub fn add(&mut self, name: &str, value: f64) {
        match self.0.iter_mut().find(|(known, _)| known == name) {
            Some((_, values)) => values.push(value),
            None => self.0.push((name.to_owned(), vec![value])),
        }
    }

    pub fn extend(&mut self, more: Figures) {
        for (name, values) in more.0 {
            for value in values {
                self.add(&name, value);
            }
        }
    }

    fn summaries(&self) -> Vec<(&str, Summary)> {
        self.0.iter().filter_map(|(name, values)| Some((name.as_str(), Summary::of(values)?))).collect()
    }

    fn of(&self, name: &str) -> Option<Summary> {
        self.0.iter().find(|(known, _)| known == name).and_then(|(_, values)| Summary::of(values))
    }

    pub fn print(&self, title: &str) {
        println!("\n{title:<44}{:>9}{:>9}", "p50", "p95");
        for (name, summary) in self.summaries() {
            println!("  {name:<42}{:>9.1}{:>9.1}", summary.p50, summary.p95);
        }
    }

    pub fn json(&self) -> Value {
        let summaries = self.summaries().into_iter();
        summaries.map(|(name, summary)| (name.to_owned(), json!(summary))).collect::<Map<_, _>>().into()
    }
}

/// Waits for something, and adds how many milliseconds that took.
pub async fn timed<T, E>(
    times: &mut Figures,
    name: &str,
    future: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    let start = Instant::now();
    let outcome = Box::pin(future).await;
    times.add(name, start.elapsed().as_secs_f64() * 1e3);
    outcome
}

/// Figures that are measured of both runtimes.
#[derive(Default)]
pub struct Comparison(BTreeMap<String, Figures>);

impl Comparison {
    pub fn of(&mut self, runtime: Runtime) -> &mut Figures {
        self.0.entry(runtime.to_string()).or_default()
    }

    /// One line for each figure that both have.
    pub fn print(&self, title: &str) {
        println!(
            "\n{title:<26}{:>13}{:>10}{:>10}{:>10}{:>8}",
            "pericarp p50", "p95", "runc p50", "p95", "ratio"
        );
        let (Some(ours), Some(theirs)) = (self.0.get("pericarp"), self.0.get("runc")) else { return };
        for (name, ours) in ours.summaries() {
            let Some(theirs) = theirs.of(name) else { continue };
            println!(
                "{name:<26}{:>13.1}{:>10.1}{:>10.1}{:>10.1}{:>8.2}",
                ours.p50,
                ours.p95,
                theirs.p50,
                theirs.p95,
                ours.p50 / theirs.p50
            );
        }
    }

    pub fn json(&self) -> Value {
        self.0
            .iter()
            .map(|(runtime, figures)| (runtime.clone(), figures.json()))
            .collect::<Map<_, _>>()
            .into()
    }
}

/// Median, 95th percentile and count of one figure.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// Half of the values are not above it.
    pub p50: f64,
    /// 95 of 100 values are not above it.
    pub p95: f64,
    /// How many values there were.
    pub count: usize,
}

impl Summary {
    /// Summarises values; `None` if there are none.
    pub fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        // Nearest rank: always a value that was measured.
        let rank =
            |percent: usize| sorted.get((sorted.len() * percent).div_ceil(100).saturating_sub(1)).copied();
        Some(Self { p50: rank(50)?, p95: rank(95)?, count: sorted.len() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_measured_values() {
        let values: Vec<f64> = (1..=20).rev().map(f64::from).collect();
        assert_eq!(Summary::of(&values), Some(Summary { p50: 10.0, p95: 19.0, count: 20 }));
        assert_eq!(Summary::of(&[7.0]), Some(Summary { p50: 7.0, p95: 7.0, count: 1 }));
        assert_eq!(Summary::of(&[]), None);
    }
}
