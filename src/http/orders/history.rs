//! What became of an order, step by step, from the ledger.

use axum::extract::State;
use axum::http::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;

use crate::domain::durability::Durability;
use crate::domain::history::HistoryStep;
use crate::domain::ids::OrderId;
use crate::http::auth::OrdersCaller;
use crate::http::extract::{NoParameters, Params, PathNames, order_not_found};
use crate::http::problem::{Code, Problem};
use crate::http::{Answer, Api, json};
use crate::lanes::LaneError;
use crate::lanes::reply::Stamped;

/// An order's recorded steps.
#[derive(Debug, Serialize, ToSchema)]
pub struct OrderHistory {
    /// Oldest first.
    #[schema(max_items = 200)]
    pub steps: Vec<HistoryStep>,
}

/// What became of the order, step by step.
///
/// The steps that the database has: all of them once the order's own `durability` is `recorded`.
/// Of an order that was placed just now it waits for the first, so there is always one.
#[utoipa::path(
    get, path = "/v1/orders/{order_id}/history", operation_id = "order_history", tag = "orders",
    params(("order_id" = OrderId, Path)),
    responses(
        (status = 200, description = "Its recorded steps", body = OrderHistory),
        (status = 404, description = "order-not-found"),
    ),
    security(("key" = []))
)]
pub async fn show(
    State(api): State<Api>,
    _caller: OrdersCaller,
    _query: Params<NoParameters>,
    names: PathNames,
) -> Answer {
    let _in_flight = api.enter()?;
    let id = api.genuine(&names)?;
    let mut steps = api.recorded_steps(&id).await?;
    if steps.is_empty() {
        api.wait_order_recorded(&id).await?;
        steps = api.recorded_steps(&id).await?;
    }
    if steps.is_empty() {
        return Err(order_not_found());
    }
    Ok(json(StatusCode::OK, &OrderHistory { steps }))
}

impl Api {
    async fn recorded_steps(&self, id: &OrderId) -> Result<Vec<HistoryStep>, Problem> {
        self.ledger.order_history(id).await.map_err(|e| Problem::ledger(&e))
    }

    /// Waits until what the lane knows of the order is recorded. Nothing is left to wait for once
    /// its sale is archived.
    async fn wait_order_recorded(&self, id: &OrderId) -> Result<(), Problem> {
        let lane = id.lane();
        if self.is_known_archived(id).await? {
            return Ok(());
        }
        let (order, marks) = match self.lanes.get(id.clone()).await {
            Ok(Stamped { outcome: Some(order), marks, .. }) => (order, marks),
            Ok(Stamped { outcome: None, .. }) => return Err(order_not_found()),
            Err(LaneError::Missing | LaneError::Frozen(_))
                if self.is_archived(&lane.sale).await? =>
            {
                return Ok(());
            }
            Err(error) => return Err(Problem::read(&error)),
        };
        let timeout = self.options.durability_timeout;
        let recorded =
            self.lanes.wait_for(lane, Durability::Recorded, order.seq, marks, timeout).await;
        let unrecorded = || Problem::new(Code::Unavailable, "the order is not recorded yet");
        recorded.map(|_| ()).ok_or_else(unrecorded)
    }
}
