//! An order: one buyer's claim on stock, and what may become of it.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::ids::{LaneId, OrderId, RefundId};
use super::names::{BuyerId, PaymentId, Sku};
use super::stock::Units;
use super::time::Timestamp;

/// Most lines of one order.
pub const LINES_MAX: usize = 8;
/// Most units of one line.
pub const QUANTITY_MAX: u32 = 1_000;

/// Units of one SKU in one order: 1 to [`QUANTITY_MAX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Quantity(u32);

impl Quantity {
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl TryFrom<u32> for Quantity {
    type Error = String;

    fn try_from(units: u32) -> Result<Self, String> {
        if (1..=QUANTITY_MAX).contains(&units) {
            Ok(Self(units))
        } else {
            Err(format!("must be 1 to {QUANTITY_MAX}"))
        }
    }
}

impl From<Quantity> for u32 {
    fn from(quantity: Quantity) -> u32 {
        quantity.0
    }
}

/// So many units of one SKU.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Line {
    pub sku: Sku,
    pub quantity: Quantity,
}

/// Where an order stands. `held` and `paying` keep stock without having sold it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    Held,
    /// Held while a payment runs.
    Paying,
    Confirmed,
    /// Confirmed, and all of it taken back.
    Returned,
    Cancelled,
    Expired,
}

impl Status {
    pub const ALL: [Status; 6] =
        [Self::Held, Self::Paying, Self::Confirmed, Self::Returned, Self::Cancelled, Self::Expired];

    /// The word that callers see and the database stores.
    pub const fn as_str(self) -> &'static str {
        match self {
            Status::Held => "held",
            Status::Paying => "paying",
            Status::Confirmed => "confirmed",
            Status::Returned => "returned",
            Status::Cancelled => "cancelled",
            Status::Expired => "expired",
        }
    }

    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.as_str() == word)
    }
}

/// An order as it stands after its last event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    pub id: OrderId,
    /// `None` for a tombstone that a payment left: nobody knows the order any more.
    pub buyer_id: Option<BuyerId>,
    pub status: Status,
    /// What it holds, bought, or held last, in the caller's order. Empty for a tombstone: an order
    /// that was cancelled before it came.
    pub lines: Vec<Line>,
    /// What of it was taken back.
    #[serde(default)]
    pub returned: Vec<Line>,
    /// The payment that runs or that bought it.
    pub payment_id: Option<PaymentId>,
    pub created_at: Timestamp,
    pub expires_at: Timestamp,
    pub confirmed_at: Option<Timestamp>,
    /// Confirmed after its deadline.
    #[serde(default)]
    pub reacquired: bool,
    /// How long it was asked to be held, where the caller said so,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hold_seconds: Option<u32>,
    /// ... and what was asked for, where that was more than `lines`: a replay must ask the same.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub asked: Vec<Line>,
    /// The lane's sequence number of its last event.
    pub seq: u64,
}

impl Order {
    pub fn lane(&self) -> &LaneId {
        self.id.lane()
    }

    /// Where the order has its units, as it stands: none once it is cancelled or has expired.
    pub fn units(&self) -> impl Iterator<Item = (&Sku, Units)> {
        let (held, sold) = match self.status {
            Status::Held | Status::Paying => (1, 0),
            Status::Confirmed | Status::Returned => (0, 1),
            Status::Cancelled | Status::Expired => (0, 0),
        };
        let lines = self.lines.iter().map(|line| (line, 1));
        let returned = self.returned.iter().map(|line| (line, -1));
        lines.chain(returned).map(move |(line, sign)| {
            let units = sign * i64::from(line.quantity.get());
            (&line.sku, Units { available: 0, held: held * units, sold: sold * units })
        })
    }

    /// How the order answers at `now`: a hold whose deadline has come is expired, whether or not
    /// the sweeper has come by.
    pub fn status_at(&self, now: Timestamp) -> Status {
        match self.status {
            Status::Held | Status::Paying if now >= self.expires_at => Status::Expired,
            status => status,
        }
    }
}

/// Why a payment must be given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RefundReason {
    /// It came after the deadline, and the stock was gone.
    PaymentTooLate,
    /// It came for an order that was cancelled, or that nobody knows any more.
    OrderCancelled,
    /// Another payment had bought the order.
    AlreadyPaid,
    /// It paid for lines that are no part of the order.
    LinesMismatch,
}

impl RefundReason {
    const ALL: [RefundReason; 4] =
        [Self::PaymentTooLate, Self::OrderCancelled, Self::AlreadyPaid, Self::LinesMismatch];

    /// The word that callers see and the database stores.
    pub const fn as_str(self) -> &'static str {
        match self {
            RefundReason::PaymentTooLate => "payment-too-late",
            RefundReason::OrderCancelled => "order-cancelled",
            RefundReason::AlreadyPaid => "already-paid",
            RefundReason::LinesMismatch => "lines-mismatch",
        }
    }

    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.as_str() == word)
    }
}

/// A payment that must be given back: one per order and payment, for good.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefundDue {
    pub id: RefundId,
    pub payment_id: PaymentId,
    pub reason: RefundReason,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantity_cannot_be_zero_or_beyond_its_bound() {
        for units in [0, QUANTITY_MAX + 1] {
            assert!(Quantity::try_from(units).is_err());
        }
        assert!(serde_json::from_str::<Quantity>("1.0").is_err(), "integers only");
    }
}
