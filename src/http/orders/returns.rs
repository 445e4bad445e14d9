//! Returns: what was sold and comes back.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use serde::Deserialize;
use utoipa::ToSchema;

use super::archived::is_archived;
use super::{
    IDEMPOTENT_REPLAYED, OrderView, YES, about, check_lines, key_reused, over, sale_archived,
};
use crate::domain::ids::OrderId;
use crate::domain::order::Line;
use crate::http::auth::OrdersCaller;
use crate::http::durability::{PREFER, Preferred, UNREACHED};
use crate::http::extract::{Keyed, Members, PathNames, order_not_found};
use crate::http::problem::{Code, FieldError, Problem};
use crate::http::{Answer, Api, json};
use crate::lanes::LaneError;
use crate::lanes::command::Return;
use crate::lanes::reply::{Returned, Stamped};

/// Take back what was sold.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub struct ReturnOrder {
    /// All that is left, unless said otherwise.
    #[serde(default)]
    #[schema(min_items = 1, max_items = 8)]
    pub lines: Option<Vec<Line>>,
    /// Whether it is on sale again; otherwise it leaves the total.
    pub restock: bool,
}

impl Members for ReturnOrder {
    fn check(self) -> Result<Self, Vec<FieldError>> {
        let errors = self.lines.as_deref().map(check_lines).unwrap_or_default();
        if errors.is_empty() { Ok(self) } else { Err(errors) }
    }
}

/// Takes back what was sold, all or a part. The key's scope is the order.
#[utoipa::path(
    post, path = "/v1/orders/{order_id}/return", operation_id = "return_order", tag = "orders",
    params(("order_id" = OrderId, Path), ("Idempotency-Key" = String, Header),
        ("Prefer" = Option<String>, Header, description = PREFER)),
    request_body = ReturnOrder,
    responses(
        (status = 200, description = "Taken back, now or before", body = OrderView,
            headers(("Idempotent-Replayed" = String),
                ("Preference-Applied" = String, description = "durability=LEVEL, as served"))),
        (status = 404, description = "order-not-found"),
        (status = 409, description = "return-exceeds-order, order-not-confirmed, order-cancelled, \
            order-expired, order-returned, each with the order; sale-archived"),
        (status = 422, description = "idempotency-key-reused"),
        (status = 503, description = UNREACHED),
    ),
    security(("key" = []))
)]
pub async fn take_back(
    State(api): State<Api>,
    OrdersCaller(caller): OrdersCaller,
    names: PathNames,
    preferred: Preferred,
    keyed: Keyed<ReturnOrder>,
) -> Answer {
    let Keyed { key, members: asked } = keyed;
    let _in_flight = api.enter()?;
    let id = api.genuine(&names)?;
    let sale = api.sale_of(&id).await?;
    if is_archived(sale.as_deref()) {
        return api.return_recorded(&id).await;
    }
    let wanted = api.wanted(preferred, sale.as_deref());
    let command = Return {
        key: api.secret(id.secret_version()).await?.return_key(&id, &key),
        id: id.clone(),
        lines: asked.lines.unwrap_or_default(),
        restock: asked.restock,
        trace: caller.trace(),
    };
    match api.lanes_for(wanted).take_back(command).await {
        Ok(Stamped { now, marks, proof, outcome }) => {
            let view = |order| OrderView::new(order, now, marks);
            match outcome {
                Returned::Returned(order) => {
                    let marks = api.reach(wanted, &order, marks, proof).await?;
                    wanted.told(Ok(json(StatusCode::OK, &OrderView::new(order, now, marks))))
                }
                Returned::Replayed(order) => {
                    let marks = api.reach(wanted, &order, marks, proof).await?;
                    wanted.told(Ok(replayed(&OrderView::new(order, now, marks))))
                }
                Returned::KeyReused => Err(key_reused()),
                Returned::Exceeds(order) => Err(about(Code::ReturnExceedsOrder, view(order))),
                Returned::Over(order) => {
                    let order = view(order);
                    Err(about(over(order.status), order))
                }
                Returned::Unknown => Err(order_not_found()),
                Returned::Archived => Err(sale_archived()),
                Returned::Overloaded => Err(Problem::overloaded()),
            }
        }
        Err(LaneError::Missing | LaneError::Frozen(_))
            if api.is_archived(&id.lane().sale).await? =>
        {
            api.return_recorded(&id).await
        }
        Err(error) => Err(Problem::change(&error)),
    }
}

fn replayed(order: &OrderView) -> Response {
    let mut response = json(StatusCode::OK, order);
    response.headers_mut().insert(IDEMPOTENT_REPLAYED, YES);
    response
}

impl Api {
    async fn return_recorded(&self, id: &OrderId) -> Answer {
        self.recorded_order(id).await?.ok_or_else(order_not_found)?;
        Err(sale_archived())
    }
}
