//! Whether the process lives, and whether requests should come to it.

use std::sync::Arc;

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use serde::Serialize;
use utoipa::ToSchema;

use super::{Api, json};
use crate::telemetry::health::{Health, Readiness};

const OPENMETRICS: HeaderValue =
    HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");

#[derive(Debug, Serialize, ToSchema)]
pub struct Live {
    /// `live`
    #[schema(value_type = String)]
    pub status: &'static str,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct Ready {
    /// `ready`, `degraded` while Kafka or the database is away, `starting`, `draining`, or
    /// `unavailable` without Redis
    #[schema(value_type = String)]
    pub status: Readiness,
}

/// The process lives.
#[utoipa::path(get, path = "/livez", tag = "health",
    responses((status = 200, description = "It does", body = Live)))]
pub async fn livez() -> Response {
    json(StatusCode::OK, &Live { status: "live" })
}

/// Whether requests should come here.
#[utoipa::path(get, path = "/readyz", tag = "health",
    responses(
        (status = 200, description = "ready, degraded", body = Ready),
        (status = 503, description = "starting, draining, unavailable", body = Ready)))]
pub async fn readyz(State(api): State<Api>) -> Response {
    let status = api.health.readiness();
    json(status_of(status), &Ready { status })
}

fn status_of(readiness: Readiness) -> StatusCode {
    if readiness.takes_orders() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

/// Readiness with every part and role, for the inner listener.
pub async fn readyz_detail(State(health): State<Health>) -> Response {
    let report = health.report();
    json(status_of(report.status), &report)
}

/// All metrics, as OpenMetrics.
pub async fn metrics(State(registry): State<Arc<Registry>>) -> Response {
    let mut text = String::new();
    match encode(&mut text, &registry) {
        Ok(()) => ([(CONTENT_TYPE, OPENMETRICS)], text).into_response(),
        Err(error) => {
            tracing::error!(%error, "the metrics cannot be written");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}
