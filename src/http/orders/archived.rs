//! Orders of a sale that has left Redis: they are read from the database, and change no more.

use std::sync::Arc;
use std::time::Duration;

use axum::http::StatusCode;
use chrono::Utc;

use super::view::OrderView;
use super::{about, over, sale_archived};
use crate::domain::ids::{IdSecret, OrderId};
use crate::domain::names::{PaymentId, SaleId};
use crate::domain::order::{Order, RefundDue, RefundReason, Status};
use crate::http::extract::order_not_found;
use crate::http::problem::Problem;
use crate::http::{Answer, Api, json};
use crate::ledger::Sale;

/// Missing lanes must not become a query each.
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(200);

/// A payment for an order that changes no more: bought by it, or to be given back.
fn confirm(order: &Order, payment: &PaymentId) -> Result<(), RefundReason> {
    match order.status {
        Status::Confirmed | Status::Returned if order.payment_id.as_ref() == Some(payment) => {
            Ok(())
        }
        Status::Confirmed | Status::Returned => Err(RefundReason::AlreadyPaid),
        Status::Cancelled => Err(RefundReason::OrderCancelled),
        Status::Held | Status::Paying | Status::Expired => Err(RefundReason::PaymentTooLate),
    }
}

/// Whether a sale is, as somebody has it.
pub(super) fn is_archived(sale: Option<&Sale>) -> bool {
    sale.is_some_and(|sale| sale.phase.archived)
}

impl Api {
    pub(super) async fn show_recorded(&self, id: &OrderId) -> Answer {
        let order = self.recorded_order(id).await?.ok_or_else(order_not_found)?;
        Ok(json(StatusCode::OK, &OrderView::recorded(order)))
    }

    /// A payment for it. No lane is left to say that it must be given back, so this does.
    pub(super) async fn confirm_recorded(&self, id: &OrderId, payment: &PaymentId) -> Answer {
        let order = self.recorded_order(id).await?;
        let refund_id = self.refund_id(id, payment).await?;
        let known = self.ledger.refund(&refund_id).await.map_err(|e| Problem::ledger(&e))?;
        let verdict = match (known, &order) {
            (Some(refund), _) => Err(refund.reason),
            (None, Some(order)) => confirm(order, payment),
            (None, None) => Err(RefundReason::OrderCancelled),
        };
        let view = order.map(OrderView::recorded);
        let Err(reason) = verdict else {
            return Ok(json(StatusCode::OK, &view));
        };
        let due = RefundDue { id: refund_id, payment_id: payment.clone(), reason };
        let added = self.ledger.add_refund(id, &due, Utc::now().into()).await;
        added.map_err(|e| Problem::ledger_change(&e))?;
        Err(self.refund_due(id, payment, reason, view).await?)
    }

    /// A cancel of it.
    pub(super) async fn cancel_recorded(&self, id: &OrderId, if_none: fn() -> Problem) -> Answer {
        let order = self.recorded_order(id).await?.ok_or_else(if_none)?;
        let order = OrderView::recorded(order);
        match order.status {
            Status::Cancelled => Ok(json(StatusCode::OK, &order)),
            Status::Confirmed | Status::Returned => Err(about(over(order.status), order)),
            Status::Held | Status::Paying | Status::Expired => Err(sale_archived()),
        }
    }

    pub(super) async fn recorded_order(&self, id: &OrderId) -> Result<Option<Order>, Problem> {
        self.ledger.order(id).await.map_err(|e| Problem::ledger(&e))
    }

    /// The order's sale as our copy has it. Another instance may know better.
    pub(in crate::http) async fn sale_of(
        &self,
        id: &OrderId,
    ) -> Result<Option<Arc<Sale>>, Problem> {
        self.catalog.sale(&id.lane().sale).await.map_err(|e| Problem::ledger(&e))
    }

    /// Whether our copy says that the order's sale is archived.
    pub(super) async fn is_known_archived(&self, id: &OrderId) -> Result<bool, Problem> {
        Ok(is_archived(self.sale_of(id).await?.as_deref()))
    }

    /// The same, looking at the database where our copy is not of just now: asked where a lane is
    /// not in Redis. While the database is away, the copy has the last word.
    pub(in crate::http) async fn is_archived(&self, id: &SaleId) -> Result<bool, Problem> {
        let known = async || self.catalog.sale(id).await.map_err(|e| Problem::ledger(&e));
        if is_archived(known().await?.as_deref()) {
            return Ok(true);
        }
        if let Err(error) = self.catalog.no_older_than(LOOK_AGAIN_AFTER).await {
            tracing::warn!(%error, sale = %id, "a lane is missing, and the catalog cannot be read");
        }
        Ok(is_archived(known().await?.as_deref()))
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
            buyer_id: Some(buyer_id),
            status,
            lines: Vec::new(),
            returned: Vec::new(),
            payment_id: payment.map(|payment| payment.parse().unwrap()),
            created_at: Timestamp::from_millis(0),
            expires_at: Timestamp::from_millis(0),
            confirmed_at: None,
            hold_seconds: None,
            asked: Vec::new(),
            reacquired: false,
            seq: 1,
        }
    }

    #[test]
    fn a_payment_after_the_archive_has_bought_it_or_must_be_given_back() {
        let payment = "p".parse().unwrap();
        assert_eq!(confirm(&order(Status::Confirmed, Some("p")), &payment), Ok(()));
        for (order, reason) in [
            (order(Status::Confirmed, Some("q")), RefundReason::AlreadyPaid),
            (order(Status::Returned, Some("q")), RefundReason::AlreadyPaid),
            (order(Status::Cancelled, None), RefundReason::OrderCancelled),
            (order(Status::Expired, None), RefundReason::PaymentTooLate),
        ] {
            assert_eq!(confirm(&order, &payment), Err(reason));
        }
    }
}
