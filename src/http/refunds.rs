//! Refunds: the work list of payments to give back.

use axum::extract::State;
use axum::http::StatusCode;
use serde::Serialize;
use utoipa::{IntoParams, ToSchema};

use super::auth::OrdersCaller;
use super::extract::{NoMembers, OptionalJson, Parameters, Params, PathNames, Query};
use super::problem::{Code, Problem};
use super::{Answer, Api, cursor, json};
use crate::domain::ids::{OrderId, RefundId};
use crate::domain::names::{PaymentId, SaleId};
use crate::domain::order::RefundReason;
use crate::domain::time::Timestamp;
use crate::ledger::{Refund, RefundCursor, RefundFilter};

/// Whether a payment was given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum RefundStatus {
    Due,
    Settled,
}

/// A payment to give back: one per order and payment.
#[derive(Debug, Serialize, ToSchema)]
pub struct RefundView {
    pub id: RefundId,
    pub sale_id: SaleId,
    pub order_id: OrderId,
    pub payment_id: PaymentId,
    pub reason: RefundReason,
    pub status: RefundStatus,
    pub created_at: Timestamp,
    pub settled_at: Option<Timestamp>,
}

impl From<Refund> for RefundView {
    fn from(refund: Refund) -> Self {
        Self {
            sale_id: refund.order_id.lane().sale.clone(),
            id: refund.id,
            order_id: refund.order_id,
            payment_id: refund.payment_id,
            reason: refund.reason,
            status: refund.settled_at.map_or(RefundStatus::Due, |_| RefundStatus::Settled),
            created_at: refund.created_at,
            settled_at: refund.settled_at,
        }
    }
}

/// A page of refunds.
#[derive(Debug, Serialize, ToSchema)]
pub struct RefundList {
    pub refunds: Vec<RefundView>,
    /// Where the next page begins; null on the last.
    pub next_cursor: Option<String>,
}

/// Which refunds to list.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ListRefunds {
    sale_id: Option<SaleId>,
    /// `due` or `settled`
    #[param(value_type = Option<RefundStatus>)]
    status: Option<RefundStatus>,
    /// How many on a page; 50 unless said otherwise.
    #[param(value_type = Option<u32>, minimum = 1, maximum = 200)]
    limit: u32,
    /// `next_cursor` of the page before.
    #[param(value_type = Option<String>)]
    cursor: Option<RefundCursor>,
}

impl Parameters for ListRefunds {
    fn take(query: &mut Query) -> Self {
        let status = |word: &str| match word {
            "due" => Ok(RefundStatus::Due),
            "settled" => Ok(RefundStatus::Settled),
            _ => Err("must be due or settled".to_owned()),
        };
        Self {
            sale_id: query.parse("sale_id"),
            status: query.take("status", status),
            limit: query.limit(),
            cursor: query
                .take("cursor", cursor::decode)
                .map(|(created_at, id)| RefundCursor { created_at, id }),
        }
    }
}

/// Recorded refunds, newest first.
#[utoipa::path(
    get, path = "/v1/refunds", operation_id = "list_refunds", tag = "refunds",
    params(ListRefunds),
    responses((status = 200, description = "A page, ties by id", body = RefundList)),
    security(("key" = []))
)]
pub async fn list(
    State(api): State<Api>,
    _caller: OrdersCaller,
    Params(asked): Params<ListRefunds>,
) -> Answer {
    let _in_flight = api.enter()?;
    let settled = asked.status.map(|status| status == RefundStatus::Settled);
    let filter = RefundFilter { sale: asked.sale_id, settled };
    let page = api.ledger.list_refunds(&filter, asked.cursor.as_ref(), asked.limit).await;
    let page = page.map_err(|e| Problem::ledger(&e))?;
    let list = RefundList {
        refunds: page.items.into_iter().map(RefundView::from).collect(),
        next_cursor: page.next.map(|next| cursor::encode(next.created_at, &next.id)),
    };
    Ok(json(StatusCode::OK, &list))
}

/// Notes that the payment was given back. Again is the same answer.
#[utoipa::path(
    post, path = "/v1/refunds/{refund_id}/settle", operation_id = "settle_refund", tag = "refunds",
    params(("refund_id" = RefundId, Path)),
    responses(
        (status = 200, description = "Settled, now or before", body = RefundView),
        (status = 404, description = "refund-not-found: none such, or not recorded yet"),
    ),
    security(("key" = []))
)]
pub async fn settle(
    State(api): State<Api>,
    _caller: OrdersCaller,
    names: PathNames,
    _body: OptionalJson<NoMembers>,
) -> Answer {
    let _in_flight = api.enter()?;
    let id = names.refund_id()?;
    let refund = api.ledger.settle_refund(&id).await;
    let refund = refund.map_err(|e| Problem::ledger_change(&e))?;
    let refund = refund.ok_or_else(refund_not_found)?;
    Ok(json(StatusCode::OK, &RefundView::from(refund)))
}

pub fn refund_not_found() -> Problem {
    Problem::new(Code::RefundNotFound, "no recorded refund has this id")
}
