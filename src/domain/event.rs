//! Events: what happened in a lane, one after the other. Redis writes them into the lane's
//! outbox, Kafka carries them, the database records them; each is `epoch-seq` of its lane.

use std::fmt;
use std::num::ParseIntError;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::ids::{EntityKey, LaneId};
use super::names::{KeyName, Sku};
use super::order::{Line, Order, RefundDue, Status};
use super::sale::Definition;
use super::stock::{Adjustment, Change};
use super::time::Timestamp;

/// One event of one lane.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    pub lane: LaneId,
    /// Rises when a lane is opened anew; 1 for the first.
    pub epoch: u32,
    /// Counts a lane's events from 1, without a gap, through all epochs.
    pub seq: u64,
    /// The lane's time, Redis' clock held monotonic.
    pub at: Timestamp,
    /// W3C `traceparent` of the request that caused it.
    pub traceparent: Option<String>,
    pub body: Body,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body {
    Order(OrderStep),
    Adjusted(Adjustment),
    Sale(SaleStep),
}

/// What became of an order, and the order after it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OrderStep {
    pub order: Order,
    pub step: Step,
    /// The status before; `None` for a new order.
    pub from: Option<Status>,
    pub cause: Cause,
    /// What the caller gave as a cancel's reason.
    pub reason: Option<String>,
}

/// One step in an order's life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    Held,
    PaymentBegun,
    PaymentFailed,
    /// Sold; `released` was held but not bought.
    Confirmed {
        released: Vec<Line>,
    },
    Cancelled,
    Expired,
    /// Taken back: on sale again, or out of the total.
    Returned {
        lines: Vec<Line>,
        restock: bool,
        /// Earlier versions' events lack it.
        request: Option<ReturnRequest>,
    },
    /// A payment must be given back; the order stays as it was.
    RefundDue(RefundDue),
}

/// What a return was asked for with: a replay must ask the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReturnRequest {
    pub key: EntityKey,
    /// Empty: all that was left.
    pub lines: Vec<Line>,
}

/// Who made a step happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Cause {
    Caller,
    /// The payment provider.
    Webhook,
    Sweeper,
}

impl Cause {
    pub const fn as_str(self) -> &'static str {
        match self {
            Cause::Caller => "caller",
            Cause::Webhook => "webhook",
            Cause::Sweeper => "sweeper",
        }
    }
}

/// The end of a lane's older epochs: of what they say, nothing counts that comes after it. It is no
/// event: it has no seq and changes nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seal {
    pub lane: LaneId,
    /// The epoch that begins.
    pub epoch: u32,
    /// What was given out with that epoch.
    pub token: RebuildToken,
    /// Whether it ends what still waits for something missing, too: an operator gave that up. Without,
    /// it does not count while its lane is in doubt.
    pub gives_up: bool,
    pub at: Timestamp,
}

/// What whoever took an epoch to open a lane anew must name at each step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RebuildToken(u64);

impl RebuildToken {
    /// From a random number, of which the sign is left out: the database has no unsigned ones.
    pub const fn new(random: u64) -> Self {
        Self(random >> 1)
    }

    /// As the database has it.
    pub const fn number(self) -> i64 {
        self.0 as i64
    }

    pub const fn from_number(number: i64) -> Self {
        Self(number as u64)
    }
}

impl fmt::Display for RebuildToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl From<RebuildToken> for String {
    fn from(token: RebuildToken) -> Self {
        token.to_string()
    }
}

impl TryFrom<String> for RebuildToken {
    type Error = ParseIntError;

    fn try_from(text: String) -> Result<Self, ParseIntError> {
        u64::from_str_radix(&text, 16).map(Self)
    }
}

/// What became of a sale.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SaleStep {
    Defined {
        version: u64,
        /// The definition that the lane applied.
        definition: Box<Definition>,
        /// Units that the definition brought in or, while nobody had ordered, took out.
        stock: Vec<StockSet>,
        actor: KeyName,
    },
    Paused {
        actor: KeyName,
    },
    Resumed {
        actor: KeyName,
    },
    Closed {
        actor: KeyName,
    },
    /// Nothing is held, everything is recorded, its retention is over: the lane leaves Redis.
    Archived,
}

/// How a definition moved one SKU's available units.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StockSet {
    pub sku: Sku,
    pub delta: i64,
}

impl Body {
    /// The CloudEvents `type`.
    pub fn kind(&self) -> &'static str {
        match self {
            Body::Order(step) => match step.step {
                Step::Held => "holdfast.order.held",
                Step::PaymentBegun => "holdfast.order.payment_begun",
                Step::PaymentFailed => "holdfast.order.payment_failed",
                Step::Confirmed { .. } => "holdfast.order.confirmed",
                Step::Cancelled => "holdfast.order.cancelled",
                Step::Expired => "holdfast.order.expired",
                Step::Returned { .. } => "holdfast.order.returned",
                Step::RefundDue(_) => "holdfast.order.refund_due",
            },
            Body::Adjusted(_) => "holdfast.stock.adjusted",
            Body::Sale(step) => match step {
                SaleStep::Defined { .. } => "holdfast.sale.defined",
                SaleStep::Paused { .. } => "holdfast.sale.paused",
                SaleStep::Resumed { .. } => "holdfast.sale.resumed",
                SaleStep::Closed { .. } => "holdfast.sale.closed",
                SaleStep::Archived => "holdfast.sale.archived",
            },
        }
    }

    /// What the event did to the counters: the lines of the ledger. A step that moved no stock
    /// (a cancel of what had expired) has none; an adjustment by 0 has one, since it counts too.
    pub fn changes(&self) -> Vec<Change> {
        match self {
            Body::Order(step) => step.changes(),
            Body::Adjusted(adjustment) => vec![Change {
                sku: adjustment.sku.clone(),
                available: adjustment.delta,
                held: 0,
                sold: 0,
            }],
            Body::Sale(SaleStep::Defined { stock, .. }) => stock
                .iter()
                .map(|set| Change { sku: set.sku.clone(), available: set.delta, held: 0, sold: 0 })
                .collect(),
            Body::Sale(_) => Vec::new(),
        }
    }
}

impl OrderStep {
    /// Where a unit of an order is while the order stands so: (available, held, sold).
    const fn place(status: Option<Status>) -> (i64, i64, i64) {
        match status {
            Some(Status::Held | Status::Paying) => (0, 1, 0),
            Some(Status::Confirmed | Status::Returned) => (0, 0, 1),
            Some(Status::Cancelled | Status::Expired) | None => (1, 0, 0),
        }
    }

    fn changes(&self) -> Vec<Change> {
        let mut changes = Vec::new();
        let mut add = |lines: &[Line], (available, held, sold): (i64, i64, i64)| {
            if (available, held, sold) == (0, 0, 0) {
                return;
            }
            for line in lines {
                let units = i64::from(line.quantity.get());
                let at = changes.iter().position(|change: &Change| change.sku == line.sku);
                let at = at.unwrap_or_else(|| {
                    changes.push(Change { sku: line.sku.clone(), available: 0, held: 0, sold: 0 });
                    changes.len() - 1
                });
                changes[at].available += available * units;
                changes[at].held += held * units;
                changes[at].sold += sold * units;
            }
        };
        let (before, after) = (Self::place(self.from), Self::place(Some(self.order.status)));
        let between = (after.0 - before.0, after.1 - before.1, after.2 - before.2);
        match &self.step {
            Step::Returned { lines, restock, .. } => add(lines, (i64::from(*restock), 0, -1)),
            Step::Confirmed { released } => {
                add(&self.order.lines, between);
                add(released, (1, -1, 0));
            }
            _ => add(&self.order.lines, between),
        }
        changes
    }
}
