//! Counters of one SKU, and the adjustments that operators make to them.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::ids::AdjustmentId;
use super::names::{KeyName, SaleId, Sku};
use super::time::Timestamp;

/// The most units that a SKU may have in all.
pub const TOTAL_MAX: i64 = 1_000_000_000;

/// Where a SKU's units are. `total` is their sum, by construction (I1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    pub available: i64,
    pub held: i64,
    pub sold: i64,
    /// Counts this SKU's adjustments; nothing else moves it.
    pub version: i64,
}

impl Counters {
    pub const fn total(&self) -> i64 {
        self.available + self.held + self.sold
    }

    /// After an adjustment by so many units.
    pub const fn adjusted(self, delta: i64) -> Self {
        Self { available: self.available + delta, version: self.version + 1, ..self }
    }
}

/// Units of one SKU by where they are, or by where they moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Units {
    pub available: i64,
    pub held: i64,
    pub sold: i64,
}

impl Units {
    pub const fn total(&self) -> i64 {
        self.available + self.held + self.sold
    }

    /// Those that an order has: they count against its buyer's limits.
    pub const fn taken(&self) -> i64 {
        self.held + self.sold
    }
}

impl std::ops::Add for Units {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            available: self.available + other.available,
            held: self.held + other.held,
            sold: self.sold + other.sold,
        }
    }
}

impl std::ops::AddAssign for Units {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl std::ops::Sub for Units {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self {
            available: self.available - other.available,
            held: self.held - other.held,
            sold: self.sold - other.sold,
        }
    }
}

impl std::fmt::Display for Units {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} available, {} held, {} sold", self.available, self.held, self.sold)
    }
}

impl From<Counters> for Units {
    fn from(counters: Counters) -> Self {
        let Counters { available, held, sold, version: _ } = counters;
        Self { available, held, sold }
    }
}

impl From<&Change> for Units {
    fn from(change: &Change) -> Self {
        Self { available: change.available, held: change.held, sold: change.sold }
    }
}

/// What one event changed of one SKU: a row of the ledger.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    pub sku: Sku,
    pub available: i64,
    pub held: i64,
    pub sold: i64,
}

/// Why an operator changed a total.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Reason {
    Restock,
    Damaged,
    Lost,
    Recount,
    Correction,
    Other,
}

impl Reason {
    pub const fn as_str(self) -> &'static str {
        match self {
            Reason::Restock => "restock",
            Reason::Damaged => "damaged",
            Reason::Lost => "lost",
            Reason::Recount => "recount",
            Reason::Correction => "correction",
            Reason::Other => "other",
        }
    }
}

/// How a total is to change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TotalChange {
    /// By so many units: not 0, negative to take.
    By(i64),
    /// To so many units, 0 to [`TOTAL_MAX`]. Where there are as many already, it is an adjustment by
    /// 0: somebody counted, and the audit trail shows it.
    To(i64),
}

/// What an operator says about an adjustment; two requests with one key must say the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdjustmentNote {
    pub reason: Reason,
    pub reference: Option<String>,
    pub note: Option<String>,
}

/// A change of one SKU's total that has happened. Its event, once recorded, is the audit row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adjustment {
    pub id: AdjustmentId,
    pub sku: Sku,
    pub delta: i64,
    /// The total that was asked for, where it was not the delta.
    pub set_total: Option<i64>,
    pub before: CountersSnapshot,
    #[serde(flatten)]
    pub note: AdjustmentNote,
    /// The name of the API key that asked for it.
    pub actor: KeyName,
    pub created_at: Timestamp,
    pub seq: u64,
    /// The adjustment of which this one is the exact opposite.
    pub undoes: Option<AdjustmentId>,
    /// The adjustment that undoes this one. It comes later, so no event of this one has it.
    #[serde(skip)]
    pub undone_by: Option<AdjustmentId>,
}

impl Adjustment {
    pub fn sale(&self) -> &SaleId {
        &self.id.lane().sale
    }

    /// What was asked for.
    pub fn change(&self) -> TotalChange {
        self.set_total.map_or(TotalChange::By(self.delta), TotalChange::To)
    }

    pub fn after(&self) -> CountersSnapshot {
        Counters::from(self.before).adjusted(self.delta).into()
    }
}

/// [`Counters`] as callers and events see them, the total spelt out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CountersSnapshot {
    pub total: i64,
    pub available: i64,
    pub held: i64,
    pub sold: i64,
    pub version: i64,
}

impl From<Counters> for CountersSnapshot {
    fn from(counters: Counters) -> Self {
        let Counters { available, held, sold, version } = counters;
        Self { total: counters.total(), available, held, sold, version }
    }
}

impl From<CountersSnapshot> for Counters {
    fn from(snapshot: CountersSnapshot) -> Self {
        let CountersSnapshot { available, held, sold, version, .. } = snapshot;
        Self { available, held, sold, version }
    }
}
