//! An order's history: what became of it, step by step.

use serde::de::IntoDeserializer as _;
use serde::de::value::Error;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::event::Cause;
use super::order::Line;
use super::time::Timestamp;

/// What the event of every step of an order begins with; the step's own word follows.
const EVENT_PREFIX: &str = "holdfast.order.";

/// What a step did to its order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum StepKind {
    Held,
    PaymentBegun,
    PaymentFailed,
    Confirmed,
    Cancelled,
    Expired,
    Returned,
    RefundDue,
}

impl StepKind {
    /// Of an event by its name, `holdfast.order.…`; `None` where that is no step of an order that
    /// this version knows.
    pub fn of_event(name: &str) -> Option<Self> {
        let word: serde::de::value::StrDeserializer<'_, Error> =
            name.strip_prefix(EVENT_PREFIX)?.into_deserializer();
        Self::deserialize(word).ok()
    }
}

/// One event of an order, as it is recorded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct HistoryStep {
    #[serde(rename = "event")]
    pub kind: StepKind,
    /// Its number among the events of the order's lane.
    pub seq: u64,
    pub at: Timestamp,
    pub cause: Cause,
    /// The trace of the request that caused it; null where none did.
    pub trace_id: Option<String>,
    /// The units that it moved: none where it only changed what is said of the order.
    pub lines: Vec<Line>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_of_an_order_is_a_step_and_others_are_none() {
        assert_eq!(StepKind::of_event("holdfast.order.held"), Some(StepKind::Held));
        assert_eq!(StepKind::of_event("holdfast.order.refund_due"), Some(StepKind::RefundDue));
        assert_eq!(StepKind::of_event("holdfast.sale.paused"), None);
    }
}
