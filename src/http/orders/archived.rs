//! Orders of a sale that has left Redis: they are read from the database, and change no more.

use std::sync::Arc;
use std::time::Duration;

use axum::http::StatusCode;

use super::view::OrderView;
use super::{about, sale_archived};
use crate::domain::ids::{IdSecret, OrderId};
use crate::domain::names::{PaymentId, SaleId};
use crate::domain::order::{Order, Status};
use crate::http::extract::order_not_found;
use crate::http::problem::{Code, Problem};
use crate::http::{Answer, Api, json};
use crate::ledger::Sale;

/// Missing lanes must not become a query each.
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(200);

/// What a call on an order that changes no more comes to; `Err`: refused with this code.
type Verdict = Result<(), Code>;

/// A payment for an order that changes no more.
fn confirm(order: &Order, payment: &PaymentId) -> Verdict {
    match order.status {
        Status::Confirmed if order.payment_id.as_ref() == Some(payment) => Ok(()),
        Status::Confirmed => Err(Code::AlreadyPaid),
        Status::Cancelled => Err(Code::OrderCancelled),
        Status::Held | Status::Expired => Err(Code::PaymentTooLate),
    }
}

/// A cancel of an order that changes no more.
fn cancel(order: &Order) -> Verdict {
    match order.status {
        Status::Cancelled => Ok(()),
        Status::Confirmed => Err(Code::OrderConfirmed),
        Status::Held | Status::Expired => Err(Code::SaleArchived),
    }
}

fn answer(order: Order, verdict: Verdict) -> Answer {
    match verdict {
        Ok(()) => Ok(json(StatusCode::OK, &OrderView::recorded(order))),
        Err(Code::SaleArchived) => Err(sale_archived()),
        Err(code) => Err(about(code, OrderView::recorded(order))),
    }
}

impl Api {
    pub(super) async fn show_recorded(&self, id: &OrderId) -> Answer {
        let order = self.recorded_order(id).await?.ok_or_else(order_not_found)?;
        Ok(json(StatusCode::OK, &OrderView::recorded(order)))
    }

    pub(super) async fn confirm_recorded(&self, id: &OrderId, payment: &PaymentId) -> Answer {
        let order = self.recorded_order(id).await?.ok_or_else(order_not_found)?;
        let verdict = confirm(&order, payment);
        answer(order, verdict)
    }

    pub(super) async fn cancel_recorded(&self, id: &OrderId, if_none: fn() -> Problem) -> Answer {
        let order = self.recorded_order(id).await?.ok_or_else(if_none)?;
        let verdict = cancel(&order);
        answer(order, verdict)
    }

    async fn recorded_order(&self, id: &OrderId) -> Result<Option<Order>, Problem> {
        self.ledger.order(id).await.map_err(|e| Problem::ledger(&e))
    }

    /// Whether our copy says that the order's sale is archived. Another instance may know better.
    pub(super) async fn is_known_archived(&self, id: &OrderId) -> Result<bool, Problem> {
        let sale = self.catalog.sale(&id.lane().sale).await.map_err(|e| Problem::ledger(&e))?;
        Ok(sale.is_some_and(|sale| sale.phase.archived))
    }

    /// The same, looking at the database where our copy is not of just now: asked where a lane is
    /// not in Redis. While the database is away, the copy has the last word.
    pub(in crate::http) async fn is_archived(&self, id: &SaleId) -> Result<bool, Problem> {
        let known = async || self.catalog.sale(id).await.map_err(|e| Problem::ledger(&e));
        let archived = |sale: Option<Arc<Sale>>| sale.is_some_and(|sale| sale.phase.archived);
        if archived(known().await?) {
            return Ok(true);
        }
        if let Err(error) = self.catalog.no_older_than(LOOK_AGAIN_AFTER).await {
            tracing::warn!(%error, sale = %id, "a lane is missing, and the catalog cannot be read");
        }
        Ok(archived(known().await?))
    }

    /// The secret of this version, which some sale is made with.
    pub(in crate::http) async fn secret(&self, version: u8) -> Result<Arc<IdSecret>, Problem> {
        let secret = self.catalog.secret(version).await.map_err(|e| Problem::ledger(&e))?;
        secret.ok_or_else(|| Problem::internal(&format_args!("id secret {version} is missing")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::ids::LaneId;
    use crate::domain::time::Timestamp;

    fn order(status: Status, payment: Option<&str>) -> Order {
        let secret = IdSecret::new(1, &[7; 32]);
        let sale: SaleId = "s".parse().unwrap();
        let buyer_id = "b".parse().unwrap();
        let key = secret.order_key(&sale, &buyer_id, &"k".parse().unwrap());
        Order {
            id: secret.order_id(&LaneId { sale, lane: 0 }, key),
            buyer_id,
            status,
            lines: Vec::new(),
            payment_id: payment.map(|payment| payment.parse().unwrap()),
            created_at: Timestamp::from_millis(0),
            expires_at: Timestamp::from_millis(0),
            confirmed_at: None,
            seq: 1,
        }
    }

    #[test]
    fn a_payment_after_the_archive_changes_nothing() {
        let payment = "p".parse().unwrap();
        assert_eq!(confirm(&order(Status::Confirmed, Some("p")), &payment), Ok(()));
        for (order, code) in [
            (order(Status::Confirmed, Some("q")), Code::AlreadyPaid),
            (order(Status::Cancelled, None), Code::OrderCancelled),
            (order(Status::Expired, None), Code::PaymentTooLate),
        ] {
            assert_eq!(confirm(&order, &payment), Err(code));
        }
    }

    #[test]
    fn a_cancel_after_the_archive_changes_nothing() {
        assert_eq!(cancel(&order(Status::Cancelled, None)), Ok(()));
        assert_eq!(cancel(&order(Status::Confirmed, Some("p"))), Err(Code::OrderConfirmed));
        assert_eq!(cancel(&order(Status::Expired, None)), Err(Code::SaleArchived));
    }
}
