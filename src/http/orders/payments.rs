//! Payments of an order: one begins, one buys, and what must be given back.

use axum::extract::State;
use axum::http::StatusCode;
use serde::Deserialize;
use utoipa::ToSchema;

use super::archived::is_archived;
use super::{OrderView, about, check_lines, over, sale_archived};
use crate::domain::event::Cause;
use crate::domain::ids::{OrderId, RefundId};
use crate::domain::names::PaymentId;
use crate::domain::order::{Line, RefundReason};
use crate::http::auth::OrdersCaller;
use crate::http::durability::{PREFER, Preferred, UNREACHED, Wanted};
use crate::http::extract::{Json, Members, PathNames, order_not_found};
use crate::http::problem::{Code, FieldError, Problem};
use crate::http::{Answer, Api, json};
use crate::lanes::LaneError;
use crate::lanes::command::{self, Confirm};
use crate::lanes::reply::{Begun, Confirmed, Stamped};

/// Keep the hold while a payment runs.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub struct BeginPayment {
    pub payment_id: PaymentId,
}

impl Members for BeginPayment {}

/// Sell what an order holds.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub struct ConfirmOrder {
    pub payment_id: PaymentId,
    /// A part of what is held; the rest is released. All of it, unless said otherwise.
    #[serde(default)]
    #[schema(min_items = 1, max_items = 8)]
    pub lines: Option<Vec<Line>>,
}

impl Members for ConfirmOrder {
    fn check(self) -> Result<Self, Vec<FieldError>> {
        let errors = self.lines.as_deref().map(check_lines).unwrap_or_default();
        if errors.is_empty() { Ok(self) } else { Err(errors) }
    }
}

/// Keeps the hold while this payment runs. The same payment again changes nothing, another takes
/// its place.
#[utoipa::path(
    post, path = "/v1/orders/{order_id}/begin-payment", operation_id = "begin_payment", tag = "orders",
    params(("order_id" = OrderId, Path), ("Prefer" = Option<String>, Header, description = PREFER)),
    request_body = BeginPayment,
    responses(
        (status = 200, description = "Held at least until `expires_at`", body = OrderView,
            headers(("Preference-Applied" = String, description = "durability=LEVEL, as served"))),
        (status = 404, description = "order-not-found"),
        (status = 409, description = "order-cancelled, order-expired, order-confirmed, order-returned, or, \
            where this payment must be given back, why; each with the order; sale-archived"),
        (status = 503, description = UNREACHED),
    ),
    security(("key" = []))
)]
pub async fn begin_payment(
    State(api): State<Api>,
    OrdersCaller(caller): OrdersCaller,
    names: PathNames,
    preferred: Preferred,
    Json(asked): Json<BeginPayment>,
) -> Answer {
    let _in_flight = api.enter()?;
    let id = api.genuine(&names)?;
    let sale = api.sale_of(&id).await?;
    if is_archived(sale.as_deref()) {
        return api.begin_recorded(&id).await;
    }
    let wanted = api.wanted(preferred, sale.as_deref());
    let payment = asked.payment_id.clone();
    let begin = command::BeginPayment { id: id.clone(), payment, trace: caller.trace() };
    match api.lanes_for(wanted).begin_payment(begin).await {
        Ok(Stamped { now, marks, proof, outcome }) => {
            let view = |order| OrderView::new(order, now, marks);
            match outcome {
                Begun::Begun(order) | Begun::Same(order) => {
                    let marks = api.reach(wanted, &order, marks, proof).await?;
                    wanted.told(Ok(json(StatusCode::OK, &OrderView::new(order, now, marks))))
                }
                Begun::Over(order) => {
                    let order = view(order);
                    Err(about(over(order.status), order))
                }
                Begun::Refund(reason, order) => {
                    Err(api.refund_due(&id, &asked.payment_id, reason, Some(view(order))).await?)
                }
                Begun::Unknown => Err(order_not_found()),
            }
        }
        Err(LaneError::Missing | LaneError::Frozen(_))
            if api.is_archived(&id.lane().sale).await? =>
        {
            api.begin_recorded(&id).await
        }
        Err(error) => Err(Problem::change(&error)),
    }
}

/// Sells what the order holds, or a part of it. Idempotent by `payment_id`. After the deadline the
/// stock is taken again where it is still there.
#[utoipa::path(
    post, path = "/v1/orders/{order_id}/confirm", operation_id = "confirm_order", tag = "orders",
    params(("order_id" = OrderId, Path), ("Prefer" = Option<String>, Header, description = PREFER)),
    request_body = ConfirmOrder,
    responses(
        (status = 200, description = "Sold", body = OrderView,
            headers(("Preference-Applied" = String, description = "durability=LEVEL, as served"))),
        (status = 404, description = "order-not-found: the id was made up"),
        (status = 409, description = "already-paid, order-cancelled, payment-too-late: the payment must be \
            given back, see `refund_id`; each with the order"),
        (status = 503, description = UNREACHED),
    ),
    security(("key" = []))
)]
pub async fn confirm(
    State(api): State<Api>,
    OrdersCaller(caller): OrdersCaller,
    names: PathNames,
    preferred: Preferred,
    Json(asked): Json<ConfirmOrder>,
) -> Answer {
    let _in_flight = api.enter()?;
    let id = api.genuine(&names)?;
    let payment = asked.payment_id;
    let lines = asked.lines.unwrap_or_default();
    let command = Confirm { id, payment, lines, cause: Cause::Caller, trace: caller.trace() };
    api.pay(command, preferred).await
}

impl Api {
    /// A payment, whoever says that it was made.
    pub(in crate::http) async fn pay(&self, command: Confirm, preferred: Preferred) -> Answer {
        let sale = self.sale_of(&command.id).await?;
        let wanted = self.wanted(preferred, sale.as_deref());
        let answer = if is_archived(sale.as_deref()) {
            self.confirm_recorded(&command.id, &command.payment).await
        } else {
            self.pay_live(command, wanted).await
        };
        wanted.told(answer)
    }

    /// The same where the lane is there, as far as we know.
    async fn pay_live(&self, command: Confirm, wanted: Wanted) -> Answer {
        let (id, payment) = (command.id.clone(), command.payment.clone());
        let cause = command.cause;
        match self.lanes_for(wanted).confirm(command).await {
            Ok(Stamped { now, marks, proof, outcome }) => {
                let view = |order| OrderView::new(order, now, marks);
                match outcome {
                    Confirmed::Confirmed(order) | Confirmed::Same(order) => {
                        let marks = self.reach(wanted, &order, marks, proof).await?;
                        Ok(json(StatusCode::OK, &OrderView::new(order, now, marks)))
                    }
                    Confirmed::Refund(reason, order) => {
                        // A caller has its answer, and can ask again. The provider will not.
                        if cause == Cause::Webhook {
                            self.reach(wanted, &order, marks, proof).await?;
                        }
                        Err(self.refund_due(&id, &payment, reason, Some(view(order))).await?)
                    }
                    Confirmed::NotPart => {
                        Err(Problem::invalid_at("/lines", "must be a part of what is held"))
                    }
                    Confirmed::Archived => self.confirm_recorded(&id, &payment).await,
                    Confirmed::Overloaded => Err(Problem::overloaded()),
                }
            }
            Err(LaneError::Missing | LaneError::Frozen(_))
                if self.is_archived(&id.lane().sale).await? =>
            {
                self.confirm_recorded(&id, &payment).await
            }
            Err(error) => Err(Problem::change(&error)),
        }
    }

    /// The id of the refund of this payment for this order.
    pub(super) async fn refund_id(
        &self,
        order: &OrderId,
        payment: &PaymentId,
    ) -> Result<RefundId, Problem> {
        Ok(self.secret(order.secret_version()).await?.refund_id(order, payment))
    }

    /// That this payment must be given back: what the caller needs to do so.
    pub(super) async fn refund_due(
        &self,
        id: &OrderId,
        payment: &PaymentId,
        reason: RefundReason,
        order: Option<OrderView>,
    ) -> Result<Problem, Problem> {
        let code = match reason {
            RefundReason::PaymentTooLate | RefundReason::LinesMismatch => Code::PaymentTooLate,
            RefundReason::OrderCancelled => Code::OrderCancelled,
            RefundReason::AlreadyPaid => Code::AlreadyPaid,
        };
        let problem = match order {
            Some(order) => about(code, order),
            None => Problem::new(code, "nobody knows the order any more: give the payment back"),
        };
        Ok(problem.with("refund_id", self.refund_id(id, payment).await?))
    }

    /// An order that changes no more takes no payment.
    async fn begin_recorded(&self, id: &OrderId) -> Answer {
        let order = self.recorded_order(id).await?.ok_or_else(order_not_found)?;
        let order = OrderView::recorded(order);
        Err(match over(order.status) {
            Code::OrderNotConfirmed => sale_archived(),
            code => about(code, order),
        })
    }
}
