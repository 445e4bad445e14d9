//! Metrics of requests. Labels are bounded: route templates, known methods, status classes, codes.

use std::time::Duration;

use axum::http::{Method, StatusCode};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use super::problem::Code;
use crate::domain::durability::Durability;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Request {
    method: &'static str,
    route: &'static str,
    status: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByCode {
    code: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByOutcome {
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByLevel {
    level: &'static str,
}

#[derive(Debug, Clone)]
pub struct Metrics {
    requests: Family<Request, Histogram, fn() -> Histogram>,
    problems: Family<ByCode, Counter>,
    webhooks: Family<ByOutcome, Counter>,
    durability_timeouts: Family<ByLevel, Counter>,
}

impl Metrics {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            requests: Family::new_with_constructor(|| {
                Histogram::new(exponential_buckets(0.000_25, 2.0, 16))
            }),
            problems: Family::default(),
            webhooks: Family::default(),
            durability_timeouts: Family::default(),
        };
        let registry = registry.sub_registry_with_prefix("holdfast_http");
        registry.register_with_unit(
            "request_duration",
            "Requests, by route (none: no route takes path and method), status class and duration",
            Unit::Seconds,
            metrics.requests.clone(),
        );
        registry.register(
            "webhooks",
            "Signed deliveries of the payment webhook, by what came of them",
            metrics.webhooks.clone(),
        );
        registry.register(
            "durability_timeouts",
            "Changes that were not known to have got as far as asked in time, by level",
            metrics.durability_timeouts.clone(),
        );
        registry.register("problems", "Errors answered, by code", metrics.problems.clone());
        metrics
    }

    pub(super) fn answered(
        &self,
        method: &Method,
        route: &'static str,
        status: StatusCode,
        took: Duration,
    ) {
        let request = Request { method: method_word(method), route, status: class(status) };
        self.requests.get_or_create(&request).observe(took.as_secs_f64());
    }

    pub(super) fn webhook(&self, outcome: &'static str) {
        self.webhooks.get_or_create(&ByOutcome { outcome }).inc();
    }

    pub(super) fn durability_timeout(&self, level: Durability) {
        self.durability_timeouts.get_or_create(&ByLevel { level: level.as_str() }).inc();
    }

    pub(super) fn problem(&self, code: Code) {
        self.problems.get_or_create(&ByCode { code: code.as_str() }).inc();
    }
}

/// A method is what the caller writes, and callers can write anything.
fn method_word(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::HEAD => "HEAD",
        Method::OPTIONS => "OPTIONS",
        Method::DELETE => "DELETE",
        Method::PATCH => "PATCH",
        _ => "other",
    }
}

fn class(status: StatusCode) -> &'static str {
    match status.as_u16() {
        100..=199 => "1xx",
        200..=299 => "2xx",
        300..=399 => "3xx",
        400..=499 => "4xx",
        _ => "5xx",
    }
}
