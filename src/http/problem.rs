//! Errors as callers see them: RFC 9457 problems with a stable `code`. A handler returns a
//! [`Problem`]; [`super::context::around`] writes its body, since only there the trace is known.

use std::time::Duration;

use axum::http::header::{CONTENT_TYPE, RETRY_AFTER};
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};
use serde_json::value::{RawValue, to_raw_value};
use utoipa::ToSchema;

use super::BODY_BYTES;
use crate::domain::sale::DefinitionError;
use crate::lanes::LaneError;
use crate::ledger::LedgerError;

pub const CONTENT_TYPE_PROBLEM: &str = "application/problem+json";
/// What every problem's `type` begins with; its code follows.
const TYPE_PREFIX: &str = "urn:problem-type:holdfast:";
/// When a caller may try again after an answer that was no fault of its own.
const RETRY_AFTER_DEFAULT: Duration = Duration::from_secs(1);
const DETAIL_CHARS_MAX: usize = 300;

macro_rules! codes {
    ($($variant:ident $word:literal $status:ident $title:literal;)*) => {
        /// The stable codes of problems, each with its status.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, ToSchema)]
        #[serde(rename_all = "kebab-case")]
        pub enum Code { $($variant,)* }

        impl Code {
            pub const ALL: &'static [Code] = &[$(Code::$variant,)*];

            pub const fn as_str(self) -> &'static str {
                match self { $(Code::$variant => $word,)* }
            }

            pub const fn status(self) -> StatusCode {
                match self { $(Code::$variant => StatusCode::$status,)* }
            }

            const fn title(self) -> &'static str {
                match self { $(Code::$variant => $title,)* }
            }
        }
    };
}

codes! {
    InvalidRequest "invalid-request" BAD_REQUEST "The request is not valid";
    IdempotencyKeyRequired "idempotency-key-required" BAD_REQUEST "The Idempotency-Key header is missing";
    IdempotencyKeyInvalid "idempotency-key-invalid" BAD_REQUEST "The Idempotency-Key header is not valid";
    Unauthenticated "unauthenticated" UNAUTHORIZED "A valid API key is needed";
    InvalidSignature "invalid-signature" UNAUTHORIZED "The signature is forged or stale";
    Forbidden "forbidden" FORBIDDEN "The API key may not do this";
    NotFound "not-found" NOT_FOUND "There is no such path";
    SaleNotFound "sale-not-found" NOT_FOUND "There is no such sale";
    SkuNotFound "sku-not-found" NOT_FOUND "The sale has no such SKU";
    OrderNotFound "order-not-found" NOT_FOUND "There is no such order";
    RefundNotFound "refund-not-found" NOT_FOUND "There is no such refund";
    AdjustmentNotFound "adjustment-not-found" NOT_FOUND "There is no such adjustment";
    DeadLetterNotFound "dead-letter-not-found" NOT_FOUND "There is no such dead letter";
    MethodNotAllowed "method-not-allowed" METHOD_NOT_ALLOWED "The path does not take this method";
    RequestTimeout "request-timeout" REQUEST_TIMEOUT "The request did not arrive in time";
    SaleClosed "sale-closed" CONFLICT "The sale is closed";
    SaleNotOpen "sale-not-open" CONFLICT "The sale is not open yet";
    SalePaused "sale-paused" CONFLICT "The sale is paused";
    PurchaseLimit "purchase-limit" CONFLICT "The buyer's limit is reached";
    SoldOut "sold-out" CONFLICT "There is not enough left";
    OrderCancelled "order-cancelled" CONFLICT "The order is cancelled";
    OrderExpired "order-expired" CONFLICT "The order has expired";
    OrderConfirmed "order-confirmed" CONFLICT "The order is confirmed";
    OrderReturned "order-returned" CONFLICT "The order was taken back";
    OrderNotConfirmed "order-not-confirmed" CONFLICT "The order is not confirmed";
    AlreadyPaid "already-paid" CONFLICT "Another payment has bought the order";
    PaymentTooLate "payment-too-late" CONFLICT "The payment came after the order's deadline";
    ReturnExceedsOrder "return-exceeds-order" CONFLICT "More is taken back than is left of the order";
    SaleArchived "sale-archived" CONFLICT "The sale is archived";
    SaleInUse "sale-in-use" CONFLICT "The sale has orders or adjustments";
    StockInUse "stock-in-use" CONFLICT "More is held or sold than would be left";
    AlreadyUndone "already-undone" CONFLICT "The adjustment is undone already";
    DeadLetterNotApplicable "dead-letter-not-applicable" CONFLICT "The dead letter still cannot be applied";
    DeadLetterResolved "dead-letter-resolved" CONFLICT "The dead letter is resolved otherwise";
    DiscardNeedsRebuild "discard-needs-rebuild" CONFLICT "The dead letter's lane waits for it";
    PreconditionFailed "precondition-failed" PRECONDITION_FAILED "If-Match names another version";
    PreconditionRequired "precondition-required" PRECONDITION_REQUIRED "If-Match is needed";
    BodyTooLarge "body-too-large" PAYLOAD_TOO_LARGE "The body is too large";
    UnsupportedMediaType "unsupported-media-type" UNSUPPORTED_MEDIA_TYPE "The body must be application/json";
    IdempotencyKeyReused "idempotency-key-reused" UNPROCESSABLE_ENTITY "The Idempotency-Key was used for something else";
    RateLimited "rate-limited" TOO_MANY_REQUESTS "Too many requests";
    Internal "internal" INTERNAL_SERVER_ERROR "Something went wrong here";
    Overloaded "overloaded" SERVICE_UNAVAILABLE "Too much is asked at the moment";
    LaneFrozen "lane-frozen" SERVICE_UNAVAILABLE "The sale is stopped until its stock is verified";
    Unavailable "unavailable" SERVICE_UNAVAILABLE "A part that this call needs is away";
    OutcomeUnknown "outcome-unknown" SERVICE_UNAVAILABLE "It may have happened: send the same again";
}

/// One mistake in a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct FieldError {
    /// JSON pointer (RFC 6901) to the member of the body; for a query parameter, `/` and its name.
    pub pointer: String,
    pub detail: String,
}

impl FieldError {
    pub fn new(pointer: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { pointer: pointer.into(), detail: shortened(detail.into()) }
    }
}

impl From<DefinitionError> for FieldError {
    fn from(error: DefinitionError) -> Self {
        Self::new(error.pointer, error.detail)
    }
}

/// An answer that is not what the caller asked for, and what it needs to act.
#[derive(Debug, Clone)]
pub struct Problem {
    code: Code,
    detail: String,
    members: Vec<(&'static str, Box<RawValue>)>,
    headers: Vec<(HeaderName, HeaderValue)>,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.code.as_str(), self.detail)
    }
}

impl Problem {
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        let problem = Self {
            code,
            detail: shortened(detail.into()),
            members: Vec::new(),
            headers: Vec::new(),
        };
        match code.status() {
            StatusCode::SERVICE_UNAVAILABLE => problem.retry_after(RETRY_AFTER_DEFAULT),
            _ => problem,
        }
    }

    /// A request that is wrong in these places.
    pub fn invalid(errors: Vec<FieldError>) -> Self {
        let detail = match &errors[..] {
            [only] if only.pointer.is_empty() => only.detail.clone(),
            [first, ..] => format!("{}: {}", first.pointer, first.detail),
            [] => String::new(),
        };
        Self::new(Code::InvalidRequest, detail).with("errors", errors)
    }

    /// The same for one place.
    pub fn invalid_at(pointer: &str, detail: impl Into<String>) -> Self {
        Self::invalid(vec![FieldError::new(pointer, detail)])
    }

    /// Something that only we can mend; what it was is for the log.
    pub fn internal(cause: &dyn std::fmt::Display) -> Self {
        tracing::error!(%cause, "a request failed");
        Self::new(Code::Internal, "the failure was logged; treat it as outcome-unknown")
    }

    pub fn rate_limited(policy: &str, wait: Duration) -> Self {
        let wait_ms = u64::try_from(wait.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX).max(1);
        Self::new(Code::RateLimited, format!("the limit for one {policy} is reached"))
            .with("retry_after_ms", wait_ms)
            .retry_after(Duration::from_millis(wait_ms))
    }

    /// A database that did not answer a question; nothing was done.
    pub fn ledger(error: &LedgerError) -> Self {
        match error {
            LedgerError::Unavailable(why) => {
                tracing::warn!(%why, "a request needed the database");
                Self::new(Code::Unavailable, "the database is not available; nothing was done")
            }
            other => Self::internal(other),
        }
    }

    /// The same of a call that changes something there: a database that went away in the middle may have
    /// done it all the same.
    pub fn ledger_change(error: &LedgerError) -> Self {
        match error {
            LedgerError::Unavailable(why) => {
                tracing::warn!(%why, "what became of a change in the database is not known");
                Self::outcome_unknown()
            }
            other => Self::internal(other),
        }
    }

    /// A lane that did not answer a question.
    pub fn read(error: &LaneError) -> Self {
        match error {
            LaneError::Unknown(_) | LaneError::Protocol(_) => Self::redis_away(),
            other => Self::change(other),
        }
    }

    /// A lane that did not answer a call that changes something.
    pub fn change(error: &LaneError) -> Self {
        match error {
            LaneError::Missing => {
                Self::new(Code::LaneFrozen, "the sale's lane is not in Redis; nothing was done")
            }
            LaneError::Frozen(why) => Self::new(
                Code::LaneFrozen,
                format!("the sale's lane is frozen ({why}) until it is verified; nothing was done"),
            ),
            LaneError::QueueFull => Self::overloaded(),
            LaneError::Unavailable(_) => Self::redis_away(),
            LaneError::Unknown(_) | LaneError::Protocol(_) => Self::outcome_unknown(),
        }
    }

    fn redis_away() -> Self {
        Self::new(Code::Unavailable, "Redis is not available; nothing was done")
    }

    pub fn overloaded() -> Self {
        Self::new(Code::Overloaded, "too many requests are waiting; nothing was done")
    }

    pub fn outcome_unknown() -> Self {
        Self::new(
            Code::OutcomeUnknown,
            "there was no answer in time, and it may have happened; the same request again finds out",
        )
    }

    /// Adds a member for the caller to act on.
    pub fn with(mut self, member: &'static str, value: impl Serialize) -> Self {
        let value = to_raw_value(&value).expect("plain data is always JSON");
        self.members.push((member, value));
        self
    }

    /// Adds a header.
    pub fn header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.push((name, value));
        self
    }

    /// In whole seconds, rounded up.
    fn retry_after(self, wait: Duration) -> Self {
        let seconds = u64::try_from(wait.as_millis().div_ceil(1_000)).unwrap_or(u64::MAX).max(1);
        self.header(RETRY_AFTER, HeaderValue::from(seconds))
    }

    pub fn code(&self) -> Code {
        self.code
    }

    /// Writes the body.
    pub fn render(&self, trace_id: &str) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(BODY_BYTES);
        let mut json = serde_json::Serializer::new(&mut bytes);
        let rendered = (|| {
            let mut body = json.serialize_map(None)?;
            let code = self.code.as_str();
            body.serialize_entry("type", &(TYPE_PREFIX.to_owned() + code))?;
            body.serialize_entry("title", self.code.title())?;
            body.serialize_entry("status", &self.code.status().as_u16())?;
            body.serialize_entry("detail", &self.detail)?;
            body.serialize_entry("code", code)?;
            body.serialize_entry("trace_id", trace_id)?;
            for (name, value) in &self.members {
                body.serialize_entry(name, value)?;
            }
            body.end()
        })();
        rendered.expect("plain data is always JSON");
        bytes
    }
}

impl IntoResponse for Problem {
    /// The body is empty until the trace is known.
    fn into_response(self) -> Response {
        let mut response = self.code.status().into_response();
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(CONTENT_TYPE_PROBLEM));
        for (name, value) in &self.headers {
            headers.insert(name.clone(), value.clone());
        }
        response.extensions_mut().insert(self);
        response
    }
}

/// A caller's own text can come back in a detail: not all of it.
fn shortened(mut detail: String) -> String {
    if let Some((end, _)) = detail.char_indices().nth(DETAIL_CHARS_MAX) {
        detail.truncate(end);
        detail.push('…');
    }
    detail
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn body(problem: &Problem) -> Value {
        serde_json::from_slice(&problem.render("4bf92f3577b34da6a3ce929d0e0e4736")).unwrap()
    }

    #[test]
    fn a_code_is_the_kebab_case_of_its_name_and_unique() {
        for code in Code::ALL {
            assert_eq!(serde_json::to_value(code).unwrap(), code.as_str());
        }
    }

    #[test]
    fn a_problem_has_what_rfc_9457_asks_for_and_our_members() {
        let problem = Problem::invalid_at("/lines/0/quantity", "must be 1 to 1000");
        let body = body(&problem);
        assert_eq!(body["type"], "urn:problem-type:holdfast:invalid-request");
        assert_eq!((&body["status"], &body["code"]), (&400.into(), &"invalid-request".into()));
        assert_eq!(body["errors"][0]["pointer"], "/lines/0/quantity");
        assert_eq!(body["trace_id"], "4bf92f3577b34da6a3ce929d0e0e4736");
        assert!(body["title"].is_string() && body["detail"].is_string());
    }

    #[test]
    fn retry_after_is_the_wait_in_whole_seconds_rounded_up() {
        for (wait_us, ms, seconds) in
            [(1, 1, "1"), (1_000_000, 1_000, "1"), (1_000_001, 1_001, "2")]
        {
            let problem = Problem::rate_limited("key", Duration::from_micros(wait_us));
            assert_eq!(body(&problem)["retry_after_ms"], ms);
            assert_eq!(problem.into_response().headers()[RETRY_AFTER], seconds);
        }
        assert!(Problem::overloaded().into_response().headers().contains_key(RETRY_AFTER));
    }

    #[test]
    fn what_a_caller_sent_comes_back_shortened() {
        let problem = Problem::invalid_at("/x", "é".repeat(10_000));
        assert!(problem.render("").len() < 3_000);
    }
}
