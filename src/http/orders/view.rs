//! Orders as callers see them.

use serde::Serialize;
use utoipa::ToSchema;

use crate::domain::durability::Durability;
use crate::domain::ids::OrderId;
use crate::domain::names::{BuyerId, PaymentId, SaleId, Sku};
use crate::domain::order::{Line, Order, Status};
use crate::domain::time::Timestamp;
use crate::lanes::reply::{Marks, Shortage};

/// One buyer's claim on stock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct OrderView {
    pub id: OrderId,
    pub sale_id: SaleId,
    /// Null only for an order that a payment was the first to name.
    pub buyer_id: Option<BuyerId>,
    pub status: Status,
    /// What it holds, bought, or held last; empty where it was cancelled before it came.
    pub lines: Vec<Line>,
    /// Lines that were taken back.
    pub returned: Vec<Line>,
    /// The payment that runs or that bought it.
    pub payment_id: Option<PaymentId>,
    pub created_at: Timestamp,
    pub expires_at: Timestamp,
    pub confirmed_at: Option<Timestamp>,
    /// Confirmed after its deadline, with stock that was taken again.
    pub reacquired: bool,
    /// How far this has got.
    pub durability: Durability,
}

impl OrderView {
    /// The order as its lane has it, at the lane's time.
    pub fn new(order: Order, now: Timestamp, marks: Marks) -> Self {
        let status = order.status_at(now);
        // That its deadline has passed is nowhere but in the time until the sweeper has been.
        let durability =
            if status == order.status { marks.reached(order.seq) } else { Durability::Memory };
        Self::with(order, status, durability)
    }

    /// The order as the database has it.
    pub fn recorded(order: Order) -> Self {
        let status = order.status;
        Self::with(order, status, Durability::Recorded)
    }

    fn with(order: Order, status: Status, durability: Durability) -> Self {
        Self {
            sale_id: order.lane().sale.clone(),
            id: order.id,
            buyer_id: order.buyer_id,
            status,
            lines: order.lines,
            returned: order.returned,
            // The payment of a hold that has run out runs no more.
            payment_id: order.payment_id.filter(|_| status != Status::Expired),
            created_at: order.created_at,
            expires_at: order.expires_at,
            confirmed_at: order.confirmed_at,
            reacquired: order.reacquired,
            durability,
        }
    }
}

/// A page of orders.
#[derive(Debug, Serialize, ToSchema)]
pub struct OrderList {
    pub orders: Vec<OrderView>,
    /// Where the next page begins; null on the last.
    pub next_cursor: Option<String>,
}

/// A line of which too little is left, in a `sold-out`.
#[derive(Debug, Serialize, ToSchema)]
pub struct ShortLine {
    pub sku: Sku,
    pub requested: u64,
    pub available: u64,
}

impl From<Shortage> for ShortLine {
    fn from(Shortage { sku, requested, available }: Shortage) -> Self {
        Self { sku, requested, available }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::ids::{IdSecret, LaneId};

    fn order(status: Status) -> Order {
        let secret = IdSecret::new(1, &[7; 32]);
        let sale: SaleId = "s".parse().unwrap();
        let buyer_id = "b".parse().unwrap();
        let key = secret.order_key(&sale, &buyer_id, &"k".parse().unwrap());
        Order {
            id: secret.order_id(&LaneId { sale, lane: 0 }, key),
            buyer_id: Some(buyer_id),
            status,
            lines: Vec::new(),
            returned: Vec::new(),
            payment_id: None,
            created_at: Timestamp::from_millis(0),
            expires_at: Timestamp::from_millis(1_000),
            confirmed_at: None,
            hold_seconds: None,
            asked: Vec::new(),
            reacquired: false,
            seq: 5,
        }
    }

    #[test]
    fn durability_is_the_farthest_mark_that_has_reached_the_order() {
        let at = |replicated, logged, recorded| {
            let marks = Marks { epoch: 1, seq: 9, replicated, logged, recorded };
            OrderView::new(order(Status::Held), Timestamp::from_millis(0), marks).durability
        };
        assert_eq!(at(4, 4, 4), Durability::Memory);
        assert_eq!(at(5, 4, 4), Durability::Replicated);
        assert_eq!(at(0, 5, 4), Durability::Logged);
        assert_eq!(at(0, 9, 5), Durability::Recorded);
    }

    #[test]
    fn a_hold_is_expired_from_its_deadline_on() {
        let marks = Marks { epoch: 1, seq: 9, replicated: 9, logged: 9, recorded: 9 };
        let at = |now| OrderView::new(order(Status::Held), Timestamp::from_millis(now), marks);
        assert_eq!(at(999).status, Status::Held);
        assert_eq!((at(1_000).status, at(1_000).durability), (Status::Expired, Durability::Memory));
    }
}
