//! The payment provider's webhook: Standard Webhooks
//! (<https://github.com/standard-webhooks/standard-webhooks>). What is signed and readable is 204,
//! whatever comes of it, for a provider would only send it again. A delivery is idempotent by what
//! it says, so the same one twice does no harm.

use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::{HeaderMap, RETRY_AFTER};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use standardwebhooks::{HEADER_WEBHOOK_TIMESTAMP, Webhook};
use utoipa::ToSchema;

use super::context::Context;
use super::durability::Preferred;
use super::extract::Raw;
use super::orders::check_lines;
use super::problem::{Code, Problem};
use super::{Answer, Api};
use crate::domain::event::Cause;
use crate::domain::ids::OrderId;
use crate::domain::names::PaymentId;
use crate::domain::order::Line;
use crate::lanes::LaneError;
use crate::lanes::command::{Confirm, FailPayment};
use crate::lanes::reply::{Failed, Stamped};

/// Seconds since 1970 have ten digits for another 260 years.
const TIMESTAMP_DIGITS_MAX: usize = 12;

/// What the provider says. Other members are ignored.
#[derive(Debug, Deserialize, ToSchema)]
pub struct Delivery {
    /// `payment.succeeded` or `payment.failed`; others are ignored.
    r#type: String,
    #[serde(default)]
    #[schema(value_type = PaymentData)]
    data: Value,
}

/// The payment that it is about.
#[derive(Debug, Deserialize, ToSchema)]
pub struct PaymentData {
    order_id: String,
    payment_id: PaymentId,
    /// Of a success: what it paid for; all that is held, unless said otherwise.
    #[serde(default)]
    lines: Option<Vec<Line>>,
}

/// What the payment provider says.
#[utoipa::path(
    post, path = "/v1/payments/webhook", operation_id = "payment_webhook", tag = "payments",
    params(
        ("webhook-id" = String, Header), ("webhook-timestamp" = String, Header),
        ("webhook-signature" = String, Header, description = "v1,<base64>; several, separated by spaces"),
    ),
    request_body = Delivery,
    responses(
        (status = 204, description = "Heard, whatever comes of it"),
        (status = 401, description = "invalid-signature: forged or stale"),
        (status = 503, description = "Not done, or not known to be as durable as service and sale ask for: send it again"),
    ),
)]
pub async fn receive(State(api): State<Api>, Raw { parts, body }: Raw) -> Answer {
    let context = Context::of(&parts);
    context.check_address()?;
    check_signature(&api.options.webhook_secrets, &parts.headers, &body)?;
    super::extract::check_type(&parts.headers)?;
    let _in_flight = api.enter()?;
    let delivery: Delivery = read(&body)?;
    let trace = Some(context.trace().traceparent().to_owned());
    let outcome = match delivery.r#type.as_str() {
        "payment.succeeded" => succeeded(&api, payment(delivery.data)?, trace).await?,
        "payment.failed" => failed(&api, payment(delivery.data)?, trace).await?,
        other => {
            tracing::warn!(r#type = other, "the payment webhook speaks of what nobody knows");
            "unknown-type"
        }
    };
    api.metrics.webhook(outcome);
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// Whether one of the secrets signed it, at most five minutes ago.
fn check_signature(secrets: &[String], headers: &HeaderMap, body: &[u8]) -> Result<(), Problem> {
    let timestamp = headers.get(HEADER_WEBHOOK_TIMESTAMP);
    let possible = timestamp.is_some_and(|digits| digits.len() <= TIMESTAMP_DIGITS_MAX);
    let signed = |secret: &String| {
        Webhook::new(secret).is_ok_and(|webhook| webhook.verify(body, headers).is_ok())
    };
    if possible && secrets.iter().any(signed) {
        return Ok(());
    }
    Err(Problem::new(Code::InvalidSignature, "no known secret signed this within five minutes"))
}

fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, Problem> {
    serde_json::from_slice(body).map_err(|error| Problem::invalid_at("", error.to_string()))
}

fn payment(data: Value) -> Result<PaymentData, Problem> {
    let data: PaymentData = serde_json::from_value(data)
        .map_err(|error| Problem::invalid_at("/data", error.to_string()))?;
    let errors = data.lines.as_deref().map(check_lines).unwrap_or_default();
    if errors.is_empty() { Ok(data) } else { Err(Problem::invalid(errors)) }
}

/// The order that it names, if one of us made the id.
fn order(api: &Api, text: &str) -> Result<Option<OrderId>, Problem> {
    let Ok(id) = text.parse::<OrderId>() else { return Ok(unknown_order(text)) };
    let genuine = api.catalog.is_genuine_order(&id).map_err(|e| Problem::ledger(&e))?;
    Ok(if genuine { Some(id) } else { unknown_order(text) })
}

fn unknown_order(text: &str) -> Option<OrderId> {
    tracing::warn!(order_id = text, "the payment webhook names an order that was never made");
    None
}

async fn succeeded(
    api: &Api,
    paid: PaymentData,
    trace: Option<String>,
) -> Result<&'static str, Problem> {
    let Some(id) = order(api, &paid.order_id)? else { return Ok("unknown-order") };
    let lines = paid.lines.unwrap_or_default();
    let payment = paid.payment_id;
    let command = Confirm { id, payment, lines, cause: Cause::Webhook, trace };
    match api.pay(command, Preferred::NOTHING).await {
        Ok(_) => Ok("confirmed"),
        Err(problem) if is_final(&problem) => Ok("refund-due"),
        Err(problem) => Err(problem),
    }
}

/// Sent again it would come to the same.
fn is_final(problem: &Problem) -> bool {
    let response: Response = problem.clone().into_response();
    response.status() == StatusCode::CONFLICT && !response.headers().contains_key(RETRY_AFTER)
}

async fn failed(
    api: &Api,
    failed: PaymentData,
    trace: Option<String>,
) -> Result<&'static str, Problem> {
    let Some(id) = order(api, &failed.order_id)? else { return Ok("unknown-order") };
    let payment = failed.payment_id;
    let command = FailPayment { id: id.clone(), payment, cause: Cause::Webhook, trace };
    let wanted = api.wanted(Preferred::NOTHING, api.sale_of(&id).await?.as_deref());
    match api.lanes_for(wanted).fail_payment(command).await {
        Ok(Stamped { marks, proof, outcome, .. }) => {
            if let Failed::Failed(order) | Failed::Ignored(order) = outcome {
                api.reach(wanted, &order, marks, proof).await?;
            }
            Ok("failed")
        }
        Err(LaneError::Missing | LaneError::Frozen(_))
            if api.is_archived(&id.lane().sale).await? =>
        {
            Ok("failed")
        }
        Err(error) => Err(Problem::change(&error)),
    }
}
