//! Orders: hold, pay, cancel, take back, show, list.

mod archived;
pub(super) mod history;
pub(super) mod payments;
pub(super) mod returns;
mod view;

use axum::extract::State;
use axum::http::header::LOCATION;
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Deserializer, de};
use utoipa::{IntoParams, ToSchema};

pub use self::payments::{BeginPayment, ConfirmOrder};
pub use self::returns::ReturnOrder;
pub use self::view::{OrderList, OrderView};
use super::auth::OrdersCaller;
use super::durability::{PREFER, Preferred, UNREACHED, Wanted};
use super::extract::{
    Json, Keyed, Members, NoParameters, OptionalJson, Parameters, Params, PathNames, Query, Text,
    bare_key, order_not_found, sale_not_found, sku_not_found,
};
use super::problem::{Code, FieldError, Problem};
use super::{Answer, Api, cursor, json};
use crate::domain::ids::{LaneId, OrderId};
use crate::domain::names::{BuyerId, IdempotencyKey, SaleId};
use crate::domain::order::{LINES_MAX, Line, Status};
use crate::lanes::LaneError;
use crate::lanes::command::{Cancel, Reserve};
use crate::lanes::reply::{Cancelled, Refusal, Reserved, Stamped};
use crate::ledger::{OrderCursor, OrderFilter, Sale};

pub(super) const IDEMPOTENT_REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");
pub(super) const YES: HeaderValue = HeaderValue::from_static("true");

/// Hold stock for every line, all or nothing.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub struct PlaceOrder {
    pub sale_id: SaleId,
    pub buyer_id: BuyerId,
    /// No SKU twice.
    #[schema(min_items = 1, max_items = 8)]
    pub lines: Vec<Line>,
    /// How long to hold, at most as long as the sale does.
    #[serde(default)]
    #[schema(minimum = 1)]
    pub hold_seconds: Option<u64>,
}

impl Members for PlaceOrder {
    fn check(self) -> Result<Self, Vec<FieldError>> {
        let mut errors = check_lines(&self.lines);
        if self.hold_seconds == Some(0) {
            errors.push(FieldError::new("/hold_seconds", "must be 1 at least"));
        }
        if errors.is_empty() { Ok(self) } else { Err(errors) }
    }
}

pub(super) fn check_lines(lines: &[Line]) -> Vec<FieldError> {
    let mut errors = Vec::new();
    if !(1..=LINES_MAX).contains(&lines.len()) {
        errors.push(FieldError::new("/lines", format!("must be 1 to {LINES_MAX} lines")));
    } else {
        for (index, line) in lines.iter().enumerate() {
            if lines[..index].iter().any(|before| before.sku == line.sku) {
                let pointer = format!("/lines/{index}/sku");
                errors.push(FieldError::new(pointer, "is in the order twice"));
            }
        }
    }
    errors
}

/// Give back what an order holds.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub struct CancelOrder {
    #[serde(default)]
    pub reason: Option<Text>,
}

impl Members for CancelOrder {}

/// Name an order by what it was placed with.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub struct CancelByKey {
    pub sale_id: SaleId,
    pub buyer_id: BuyerId,
    /// As it was in the header, with or without its surrounding double quotes.
    #[serde(deserialize_with = "idempotency_key")]
    pub idempotency_key: IdempotencyKey,
}

impl Members for CancelByKey {}

/// The same text means the same key here and in the header.
fn idempotency_key<'de, D: Deserializer<'de>>(deserializer: D) -> Result<IdempotencyKey, D::Error> {
    let text = String::deserialize(deserializer)?;
    bare_key(&text).parse().map_err(de::Error::custom)
}

/// Which orders to list.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ListOrders {
    sale_id: Option<SaleId>,
    buyer_id: Option<BuyerId>,
    status: Option<Status>,
    /// How many on a page; 50 unless said otherwise.
    #[param(value_type = Option<u32>, minimum = 1, maximum = 200)]
    limit: u32,
    /// `next_cursor` of the page before.
    #[param(value_type = Option<String>)]
    cursor: Option<OrderCursor>,
}

impl Parameters for ListOrders {
    fn take(query: &mut Query) -> Self {
        let status = |word: &str| Status::from_word(word).ok_or_else(|| "is no status".to_owned());
        Self {
            sale_id: query.parse("sale_id"),
            buyer_id: query.parse("buyer_id"),
            status: query.take("status", status),
            limit: query.limit(),
            cursor: query
                .take("cursor", cursor::decode)
                .map(|(created_at, id)| OrderCursor { created_at, id }),
        }
    }
}

/// Holds stock for every line, all or nothing.
#[utoipa::path(
    post, path = "/v1/orders", operation_id = "place_order", tag = "orders",
    params(("Idempotency-Key" = IdempotencyKey, Header,
        description = "Scoped to sale and buyer. The same key with the same meaning finds the same order."),
        ("Prefer" = Option<String>, Header, description = PREFER)),
    request_body = PlaceOrder,
    responses(
        (status = 201, description = "You have it: held, or a replay that is still held", body = OrderView,
            headers(("Location" = String, description = "/v1/orders/{id}"),
                ("Idempotent-Replayed" = bool, description = "true where the key was seen before"),
                ("Preference-Applied" = String, description = "durability=LEVEL, as served"))),
        (status = 200, description = "A replay; it has been confirmed since", body = OrderView,
            headers(("Idempotent-Replayed" = bool, description = "true"),
                ("Preference-Applied" = String, description = "durability=LEVEL, as served"))),
        (status = 409, description = "You don't: sale-archived, sale-closed, sale-not-open, sale-paused, purchase-limit, sold-out, order-cancelled, order-expired"),
        (status = 422, description = "idempotency-key-reused"),
        (status = 503, description = UNREACHED),
    ),
    security(("key" = []))
)]
pub async fn place(
    State(api): State<Api>,
    OrdersCaller(caller): OrdersCaller,
    preferred: Preferred,
    keyed: Keyed<PlaceOrder>,
) -> Answer {
    let Keyed { key, members: asked } = keyed;
    caller.context().check_buyer(api.admission.buyer(&asked.buyer_id))?;
    let _in_flight = api.enter()?;
    let sale = api.sale(&asked.sale_id).await?;
    let command = Reserve {
        id: api.order_id_of(&sale, &asked.buyer_id, &key).await?,
        buyer: asked.buyer_id,
        lines: asked.lines,
        // A longer time is refused by the sale, and the longest we can say is longer than any.
        hold_seconds: asked.hold_seconds.map(|s| u32::try_from(s).unwrap_or(u32::MAX)),
        trace: caller.trace(),
    };
    let wanted = api.wanted(preferred, Some(&sale));
    let answer = match api.lanes_for(wanted).reserve(command).await {
        Ok(Stamped { now, marks, proof, outcome }) => match outcome {
            Reserved::Held(order) => {
                let marks = api.reach(wanted, &order, marks, proof).await?;
                Ok(created(&OrderView::new(order, now, marks)))
            }
            Reserved::Replayed(order) => {
                let marks = match order.status_at(now) {
                    // Refused.
                    Status::Cancelled | Status::Expired => marks,
                    Status::Held | Status::Paying | Status::Confirmed | Status::Returned => {
                        api.reach(wanted, &order, marks, proof).await?
                    }
                };
                Ok(replayed(OrderView::new(order, now, marks)))
            }
            Reserved::KeyReused => Err(key_reused()),
            Reserved::Refused(refusal) => Err(refused(refusal)),
        },
        Err(LaneError::Missing | LaneError::Frozen(_)) if api.is_archived(&sale.id).await? => {
            Err(sale_archived())
        }
        Err(error) => Err(Problem::change(&error)),
    };
    wanted.told(answer)
}

fn created(order: &OrderView) -> Response {
    let mut response = json(StatusCode::CREATED, order);
    let location = HeaderValue::try_from("/v1/orders/".to_owned() + &order.id.to_string());
    response.headers_mut().insert(LOCATION, location.expect("an id is visible ASCII"));
    response
}

/// What the key found: the same answer as the first, or why there is nothing any more.
fn replayed(order: OrderView) -> Response {
    let mut response = match order.status {
        Status::Held | Status::Paying => created(&order),
        Status::Confirmed | Status::Returned => json(StatusCode::OK, &order),
        Status::Cancelled => about(Code::OrderCancelled, order).into_response(),
        Status::Expired => about(Code::OrderExpired, order).into_response(),
    };
    response.headers_mut().insert(IDEMPOTENT_REPLAYED, YES);
    response
}

/// Why nothing more can be had of an order that stands so.
fn over(status: Status) -> Code {
    match status {
        Status::Held | Status::Paying => Code::OrderNotConfirmed,
        Status::Confirmed => Code::OrderConfirmed,
        Status::Returned => Code::OrderReturned,
        Status::Cancelled => Code::OrderCancelled,
        Status::Expired => Code::OrderExpired,
    }
}

/// A refusal that is about this order.
fn about(code: Code, order: OrderView) -> Problem {
    let detail = match code {
        Code::OrderCancelled => "the order holds nothing; a new key buys again",
        Code::OrderExpired => "the order's deadline has passed; a new key buys again",
        Code::OrderConfirmed => "the order is sold and stays so",
        Code::OrderReturned => "the order was sold and taken back",
        Code::OrderNotConfirmed => "only what is sold can be taken back",
        Code::ReturnExceedsOrder => "less is left of the order than was asked to be taken back",
        Code::AlreadyPaid => "the order was bought by another payment: give this one back",
        Code::PaymentTooLate => "the order's deadline has passed: give the payment back",
        other => other.as_str(),
    };
    Problem::new(code, detail).with("order", order)
}

pub(super) fn key_reused() -> Problem {
    Problem::new(Code::IdempotencyKeyReused, "the key came with another body before")
}

pub(super) fn sale_archived() -> Problem {
    Problem::new(Code::SaleArchived, "the sale is archived and changes no more")
}

fn refused(refusal: Refusal) -> Problem {
    match refusal {
        Refusal::Archived => sale_archived(),
        Refusal::Closed => Problem::new(Code::SaleClosed, "the sale takes no more orders"),
        Refusal::NotOpen { opens_at } => {
            Problem::new(Code::SaleNotOpen, format!("the sale opens at {opens_at}"))
                .with("opens_at", opens_at)
        }
        Refusal::Paused => Problem::new(Code::SalePaused, "the sale takes no orders for now"),
        Refusal::UnknownSku { sku } => sku_not_found().with("sku", sku),
        Refusal::HoldTooLong { hold_seconds_max } => {
            let detail = format!("the sale holds for {hold_seconds_max} seconds at most");
            Problem::invalid_at("/hold_seconds", detail)
        }
        Refusal::PurchaseLimit { limit, already, sku } => {
            let whose = if sku.is_some() { "SKU" } else { "sale" };
            let detail = format!("the {whose} allows {limit} a buyer, who has {already}");
            let problem = Problem::new(Code::PurchaseLimit, detail)
                .with("limit", limit)
                .with("already", already);
            match sku {
                Some(sku) => problem.with("sku", sku),
                None => problem,
            }
        }
        Refusal::SoldOut { lines } => {
            let short: Vec<_> = lines.into_iter().map(view::ShortLine::from).collect();
            Problem::new(Code::SoldOut, "less is available than was asked for").with("lines", short)
        }
        Refusal::Overloaded => Problem::overloaded(),
    }
}

/// The order as it stands now.
#[utoipa::path(
    get, path = "/v1/orders/{order_id}", operation_id = "show_order", tag = "orders",
    params(("order_id" = OrderId, Path)),
    responses(
        (status = 200, description = "Live; from the database once its sale is archived", body = OrderView),
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
    if api.is_known_archived(&id).await? {
        return api.show_recorded(&id).await;
    }
    match api.lanes.get(id.clone()).await {
        Ok(Stamped { now, marks, outcome: Some(order), .. }) => {
            Ok(json(StatusCode::OK, &OrderView::new(order, now, marks)))
        }
        Ok(Stamped { outcome: None, .. }) => Err(order_not_found()),
        Err(LaneError::Missing | LaneError::Frozen(_))
            if api.is_archived(&id.lane().sale).await? =>
        {
            api.show_recorded(&id).await
        }
        Err(error) => Err(Problem::read(&error)),
    }
}

/// Recorded orders, newest first.
#[utoipa::path(
    get, path = "/v1/orders", operation_id = "list_orders", tag = "orders",
    params(ListOrders),
    responses((status = 200, description = "A page, ties by id", body = OrderList)),
    security(("key" = []))
)]
pub async fn list(
    State(api): State<Api>,
    _caller: OrdersCaller,
    Params(asked): Params<ListOrders>,
) -> Answer {
    let _in_flight = api.enter()?;
    let filter = OrderFilter { sale: asked.sale_id, buyer: asked.buyer_id, status: asked.status };
    let page = api.ledger.list_orders(&filter, asked.cursor.as_ref(), asked.limit).await;
    let page = page.map_err(|e| Problem::ledger(&e))?;
    let list = OrderList {
        orders: page.items.into_iter().map(OrderView::recorded).collect(),
        next_cursor: page.next.map(|next| cursor::encode(next.created_at, &next.id)),
    };
    Ok(json(StatusCode::OK, &list))
}

/// Gives the stock back.
#[utoipa::path(
    post, path = "/v1/orders/{order_id}/cancel", operation_id = "cancel_order", tag = "orders",
    params(("order_id" = OrderId, Path), ("Prefer" = Option<String>, Header, description = PREFER)),
    request_body(content = Option<CancelOrder>, description = "May be left out"),
    responses(
        (status = 200, description = "Cancelled, now or before", body = OrderView,
            headers(("Preference-Applied" = String, description = "durability=LEVEL, as served"))),
        (status = 404, description = "order-not-found"),
        (status = 409, description = "order-confirmed, with the order; sale-archived"),
        (status = 503, description = UNREACHED),
    ),
    security(("key" = []))
)]
pub async fn cancel(
    State(api): State<Api>,
    OrdersCaller(caller): OrdersCaller,
    names: PathNames,
    preferred: Preferred,
    OptionalJson(asked): OptionalJson<CancelOrder>,
) -> Answer {
    let _in_flight = api.enter()?;
    let id = api.genuine(&names)?;
    let sale = api.sale_of(&id).await?;
    let wanted = api.wanted(preferred, sale.as_deref());
    if archived::is_archived(sale.as_deref()) {
        return wanted.told(api.cancel_recorded(&id, order_not_found).await);
    }
    let reason = asked.reason.map(String::from);
    let command = Cancel { id, tombstone_for: None, reason, trace: caller.trace() };
    wanted.told(api.cancel(command, wanted, order_not_found).await)
}

/// Cancels by what the order was placed with, for a caller that never got its answer. Where there
/// is no order, the one that comes later with that key gets `order-cancelled`.
#[utoipa::path(
    post, path = "/v1/orders/cancel", operation_id = "cancel_order_by_key", tag = "orders",
    params(("Prefer" = Option<String>, Header, description = PREFER)),
    request_body = CancelByKey,
    responses(
        (status = 200, description = "Cancelled, now or before; without lines where there was no order", body = OrderView,
            headers(("Preference-Applied" = String, description = "durability=LEVEL, as served"))),
        (status = 404, description = "sale-not-found"),
        (status = 409, description = "order-confirmed, with the order; sale-archived"),
        (status = 503, description = UNREACHED),
    ),
    security(("key" = []))
)]
pub async fn cancel_by_key(
    State(api): State<Api>,
    OrdersCaller(caller): OrdersCaller,
    preferred: Preferred,
    Json(asked): Json<CancelByKey>,
) -> Answer {
    let _in_flight = api.enter()?;
    let sale = api.sale(&asked.sale_id).await?;
    let id = api.order_id_of(&sale, &asked.buyer_id, &asked.idempotency_key).await?;
    let wanted = api.wanted(preferred, Some(&sale));
    if sale.phase.archived {
        return wanted.told(api.cancel_recorded(&id, sale_archived).await);
    }
    let tombstone_for = Some(asked.buyer_id);
    let command = Cancel { id, tombstone_for, reason: None, trace: caller.trace() };
    wanted.told(api.cancel(command, wanted, sale_archived).await)
}

impl Api {
    /// A defined sale.
    pub(super) async fn sale(&self, id: &SaleId) -> Result<std::sync::Arc<Sale>, Problem> {
        let sale = self.catalog.sale(id).await.map_err(|e| Problem::ledger(&e))?;
        sale.ok_or_else(sale_not_found)
    }

    /// The id of the order that this buyer places with this key, whether or not it exists.
    async fn order_id_of(
        &self,
        sale: &Sale,
        buyer: &BuyerId,
        key: &IdempotencyKey,
    ) -> Result<OrderId, Problem> {
        let secret = self.secret(sale.secret_version).await?;
        let lane = secret.lane_of(&sale.id, buyer, sale.definition.lanes);
        let lane = LaneId { sale: sale.id.clone(), lane };
        Ok(secret.order_id(&lane, secret.order_key(&sale.id, buyer, key)))
    }

    /// The id in the path, if one of us made it: then its sale exists, and only its lane knows more.
    fn genuine(&self, names: &PathNames) -> Result<OrderId, Problem> {
        let id = names.order_id()?;
        let genuine = self.catalog.is_genuine_order(&id).map_err(|e| Problem::ledger(&e))?;
        if genuine { Ok(id) } else { Err(order_not_found()) }
    }

    async fn cancel(&self, command: Cancel, wanted: Wanted, if_unknown: fn() -> Problem) -> Answer {
        let id = command.id.clone();
        match self.lanes_for(wanted).cancel(command).await {
            Ok(Stamped { now, marks, proof, outcome }) => match outcome {
                Cancelled::Cancelled(order) | Cancelled::Same(order) => {
                    let marks = self.reach(wanted, &order, marks, proof).await?;
                    Ok(json(StatusCode::OK, &OrderView::new(order, now, marks)))
                }
                Cancelled::Sold(order) => {
                    let order = OrderView::new(order, now, marks);
                    Err(about(over(order.status), order))
                }
                Cancelled::Unknown => Err(order_not_found()),
                Cancelled::Archived => Err(sale_archived()),
                Cancelled::Overloaded => Err(Problem::overloaded()),
            },
            Err(LaneError::Missing | LaneError::Frozen(_))
                if self.is_archived(&id.lane().sale).await? =>
            {
                self.cancel_recorded(&id, if_unknown).await
            }
            Err(error) => Err(Problem::change(&error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::extract::decode;

    fn place(text: &str) -> Result<PlaceOrder, Vec<String>> {
        let pointers = |errors: Vec<FieldError>| errors.into_iter().map(|e| e.pointer).collect();
        decode(text.as_bytes()).map_err(pointers)
    }

    fn with_lines(lines: &str) -> Result<PlaceOrder, Vec<String>> {
        place(&format!(r#"{{"sale_id":"s","buyer_id":"b","lines":[{lines}]}}"#))
    }

    #[test]
    fn an_order_has_one_to_eight_lines_and_no_sku_twice() {
        let line = |n: usize| format!(r#"{{"sku":"{n}","quantity":1}}"#);
        let lines = |count: usize| (0..count).map(line).collect::<Vec<_>>().join(",");
        assert_eq!(with_lines(&lines(8)).unwrap().lines.len(), 8);
        assert_eq!(with_lines(""), Err(vec!["/lines".into()]));
        assert_eq!(with_lines(&lines(9)), Err(vec!["/lines".into()]));
        let twice = format!("{},{},{}", line(1), line(2), line(1));
        assert_eq!(with_lines(&twice), Err(vec!["/lines/2/sku".into()]));
    }

    #[test]
    fn a_line_says_how_many_in_its_range() {
        for quantity in ["0", "1001", "-1", "1.0", "1e2", "\"1\"", "null"] {
            let line = format!(r#"{{"sku":"a","quantity":{quantity}}}"#);
            assert_eq!(with_lines(&line), Err(vec!["/lines/0/quantity".into()]), "{quantity}");
        }
        assert_eq!(with_lines(r#"{"sku":"a b","quantity":1}"#), Err(vec!["/lines/0/sku".into()]));
        let misspelt = r#"{"sku":"a","quantity":1,"quantitiy":2}"#;
        assert_eq!(with_lines(misspelt), Err(vec!["/lines/0/quantitiy".into()]));
    }

    #[test]
    fn a_hold_that_no_sale_allows_is_left_to_the_sale_to_refuse() {
        let text = |hold: &str| {
            format!(
                r#"{{"sale_id":"s","buyer_id":"b","hold_seconds":{hold},"lines":[{{"sku":"a","quantity":1}}]}}"#
            )
        };
        assert_eq!(place(&text("0")), Err(vec!["/hold_seconds".into()]));
        assert_eq!(place(&text("9999999999")).unwrap().hold_seconds, Some(9_999_999_999));
        assert_eq!(place(&text("null")).unwrap().hold_seconds, None);
    }

    #[test]
    fn the_key_in_a_cancel_means_what_it_meant_in_the_header() {
        let cancel = |key: &str| {
            let text = format!(r#"{{"sale_id":"s","buyer_id":"b","idempotency_key":{key}}}"#);
            decode::<CancelByKey>(text.as_bytes()).map(|c| c.idempotency_key.to_string())
        };
        assert_eq!(cancel(r#""k""#).unwrap(), "k");
        assert_eq!(cancel(r#""\"k\"""#).unwrap(), "k");
        assert_eq!(cancel(r#""a b""#).unwrap_err()[0].pointer, "/idempotency_key");
    }

    #[test]
    fn members_of_later_versions_are_refused() {
        let pointer = decode::<ReturnOrder>(br#"{"restock":true,"refund":1}"#).unwrap_err();
        assert_eq!(pointer[0].pointer, "/refund");
    }
}
