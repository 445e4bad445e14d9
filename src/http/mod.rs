//! The HTTP order API. `routes.rs` is its table of contents; a file a resource; whatever a caller
//! is refused is a [`problem`].
//!
//! A request goes through [`context::around`] (trace, the address's limit), then the handler's
//! extractors in the order of the contract: who calls ([`auth`]), body or query ([`extract`]).
//! The handler itself counts the buyer, takes a place among the requests in flight, and asks.

mod adjustments;
mod auth;
mod conservation;
mod context;
mod cursor;
mod dead_letters;
mod durability;
mod etag;
pub mod extract;
mod health;
mod metrics;
mod openapi;
pub mod orders;
pub mod problem;
mod quiet;
mod reconcile;
mod refunds;
mod routes;
pub mod sales;
mod schema;
mod serve;
mod stock;
mod strict;
mod trace;
mod views;
mod webhook;

use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use prometheus_client::registry::Registry;
use serde::Serialize;

pub use self::adjustments::{AdjustStock, UndoAdjustment};
pub use self::dead_letters::{DeadLetterView, ResolveDeadLetter};
pub use self::metrics::Metrics;
pub use self::openapi::document;
use self::problem::Problem;
pub use self::routes::{inside, public};
pub use self::serve::{ConnectionMetrics, Front, ServeOptions, serve};
use self::views::Views;
use crate::admission::{Admission, InFlight};
use crate::config::{Config, millis};
use crate::domain::durability::Durability;
use crate::lanes::Lanes;
use crate::ledger::{Catalog, Ledger};
use crate::reconciler::rebuild::Recovery;
use crate::telemetry::health::Health;

/// What can be set.
#[derive(Debug, Clone)]
pub struct Options {
    /// How long a body may take to arrive.
    pub body_timeout: Duration,
    /// How long a request may take from its head to its answer.
    pub request_timeout: Duration,
    /// How old the public view of a sale may be.
    pub view_age_max: Duration,
    /// How far every change has got at least before it is answered.
    pub durability: Durability,
    /// Replicas of Redis that could be promoted.
    pub replicas: u32,
    /// How long an answer may wait to get as far as is asked.
    pub durability_timeout: Duration,
    /// Any of them signs a delivery of the webhook.
    pub webhook_secrets: Vec<String>,
    /// Of the Kafka topic: a new sale's lanes are spread over them.
    pub partitions: i32,
    /// Unrecorded events of a lane that a look at its books takes in at most.
    pub reconcile_events_max: u64,
}

impl Options {
    pub fn new(config: &Config) -> Self {
        let http = &config.http;
        Self {
            body_timeout: millis(http.body_timeout_ms),
            request_timeout: millis(http.request_timeout_ms),
            view_age_max: millis(http.view_age_max_ms),
            durability: http.durability,
            replicas: config.redis.replicas,
            durability_timeout: millis(http.durability_timeout_ms),
            webhook_secrets: config.payments.webhook_secrets.clone(),
            partitions: config.kafka.partitions,
            reconcile_events_max: config.reconciler.events_max,
        }
    }
}

/// What the handlers work with.
pub struct Parts {
    pub lanes: Lanes,
    pub ledger: Ledger,
    pub catalog: Catalog,
    pub recovery: Recovery,
    pub admission: Arc<Admission>,
    pub health: Health,
    pub metrics: Metrics,
    pub options: Options,
    /// The `RateLimit-Policy` of every answer about orders.
    rate_limit_policy: HeaderValue,
    views: Views,
}

/// The handle that every handler has; clones are cheap.
#[derive(Clone)]
pub struct Api(Arc<Parts>);

impl Deref for Api {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        &self.0
    }
}

impl Api {
    #[expect(clippy::too_many_arguments, reason = "each is a part that handlers work with")]
    pub fn new(
        lanes: Lanes,
        ledger: Ledger,
        catalog: Catalog,
        recovery: Recovery,
        admission: Admission,
        health: Health,
        options: Options,
        registry: &mut Registry,
    ) -> Self {
        let (admission, metrics) = (Arc::new(admission), Metrics::register(registry));
        let rate_limit_policy = context::policies(&admission.policies());
        let views = Views::new();
        Self(Arc::new(Parts {
            lanes,
            ledger,
            catalog,
            recovery,
            admission,
            health,
            metrics,
            options,
            rate_limit_policy,
            views,
        }))
    }

    /// Takes a place among the requests being handled, or refuses this one.
    fn enter(&self) -> Result<InFlight, Problem> {
        self.admission.enter().ok_or_else(Problem::overloaded)
    }
}

/// Room for an answer about an order with a line or two: growing step by step costs more.
const BODY_BYTES: usize = 512;

/// What a handler answers.
type Answer = Result<Response, Problem>;

fn json(status: StatusCode, body: &impl Serialize) -> Response {
    let mut bytes = Vec::with_capacity(BODY_BYTES);
    serde_json::to_writer(&mut bytes, body).expect("plain data is always JSON");
    let json = HeaderValue::from_static("application/json");
    (status, [(header::CONTENT_TYPE, json)], bytes).into_response()
}
