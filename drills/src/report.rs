//! What came of the drills: a table for people, the same as Markdown and as JSON.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde::Serialize;

use crate::history::Entry;
use crate::scene::{Fault, noticed_ms};

/// Violations that are printed of one drill; its directory has what they were found in.
const SHOWN_MAX: usize = 12;

#[derive(Debug, Default, Serialize)]
pub struct Row {
    pub name: &'static str,
    pub seed: u64,
    pub requests: usize,
    pub ok: usize,
    pub refused: usize,
    pub unknown: usize,
    pub faults: usize,
    /// From a fault to the first caller that was told of it; the longest.
    pub noticed_ms: Option<i64>,
    /// From its end until orders were answered and recorded as before; the longest.
    pub recovered_ms: Option<i64>,
    /// Answered, and gone.
    pub lost: usize,
    /// How it shows that the fault did its harm.
    pub bites: BTreeMap<&'static str, f64>,
    pub failures: Vec<String>,
    pub seconds: u64,
    /// Where the history and the books are.
    pub kept: Option<String>,
}

impl Row {
    pub fn passed(&self) -> bool {
        self.failures.is_empty()
    }

    pub fn timed(&mut self, history: &[Entry], faults: &[Fault]) {
        self.faults = faults.len();
        self.noticed_ms = faults.iter().filter_map(|fault| noticed_ms(history, fault)).max();
        self.recovered_ms = faults.iter().map(|fault| fault.recovered_ms - fault.mended_ms).max();
    }

    fn bitten(&self) -> String {
        let bites: Vec<_> =
            self.bites.iter().map(|(what, much)| format!("{what} {much:.0}")).collect();
        bites.join(", ")
    }

    fn verdict(&self) -> &'static str {
        if self.passed() { "passed" } else { "FAILED" }
    }
}

fn seconds(ms: Option<i64>) -> String {
    ms.map_or_else(|| "–".into(), |ms| format!("{}.{:01} s", ms / 1000, ms % 1000 / 100))
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "    {} in {} s: {}", self.verdict(), self.seconds, self.bitten())?;
        for failure in self.failures.iter().take(SHOWN_MAX) {
            write!(f, "\n    {failure}")?;
        }
        if self.failures.len() > SHOWN_MAX {
            write!(f, "\n    and {} more", self.failures.len() - SHOWN_MAX)?;
        }
        if let Some(kept) = &self.kept {
            write!(f, "\n    seed {}; history and books: {kept}", self.seed)?;
        }
        Ok(())
    }
}

pub fn markdown(rows: &[Row]) -> String {
    let mut table = String::from(
        "| drill | requests | ok | refused | unknown | faults | it bit | callers notice | recovered | lost | took | verdict |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n",
    );
    for row in rows {
        table += &format!(
            "| {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} s | {} |\n",
            row.name,
            row.requests,
            row.ok,
            row.refused,
            row.unknown,
            row.faults,
            row.bitten(),
            seconds(row.noticed_ms),
            seconds(row.recovered_ms),
            row.lost,
            row.seconds,
            row.verdict(),
        );
    }
    table
}

/// Leaves the table as `table.md` and `table.json`.
pub fn write(home: &Path, rows: &[Row]) -> anyhow::Result<()> {
    std::fs::write(home.join("table.md"), markdown(rows))?;
    std::fs::write(home.join("table.json"), serde_json::to_string_pretty(rows)?)?;
    Ok(())
}
