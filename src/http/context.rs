//! What belongs to one request, and what is around all handlers: it takes up the trace, counts
//! the client's address, bounds the time, and finishes the answer (a problem's body, rate-limit headers, metrics).

use std::net::IpAddr;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::header::CONTENT_LENGTH;
use axum::http::request::Parts;
use axum::http::{HeaderName, HeaderValue, Method};
use axum::response::{IntoResponse, Response};
use futures_util::FutureExt;
use tokio::time::timeout;
use tower::Service;

use super::Api;
use super::problem::{Code, Problem};
use super::trace::Trace;
use crate::admission::{Policy, Verdict};

const RATE_LIMIT: HeaderName = HeaderName::from_static("ratelimit");
const RATE_LIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");
/// Answers below this carry rate-limit headers.
const ORDERS: &str = "/v1/orders";

/// What belongs to one request.
#[derive(Debug)]
pub struct Context {
    trace: Trace,
    address: Verdict,
    key: OnceLock<Verdict>,
    buyer: OnceLock<Verdict>,
    route: OnceLock<&'static str>,
}

impl Context {
    fn new(trace: Trace, address: Verdict) -> Self {
        let (key, buyer, route) = (OnceLock::new(), OnceLock::new(), OnceLock::new());
        Self { trace, address, key, buyer, route }
    }

    /// Of the request that a handler or extractor looks at.
    pub fn of(parts: &Parts) -> Arc<Self> {
        parts.extensions.get().cloned().expect("it is set around all handlers")
    }

    pub fn trace(&self) -> &Trace {
        &self.trace
    }

    /// The address was counted when the request came; what comes of it is said in its turn.
    pub fn check_address(&self) -> Result<(), Problem> {
        within(self.address)
    }

    pub fn check_key(&self, verdict: Verdict) -> Result<(), Problem> {
        within(*self.key.get_or_init(|| verdict))
    }

    pub fn check_buyer(&self, verdict: Verdict) -> Result<(), Problem> {
        within(*self.buyer.get_or_init(|| verdict))
    }

    /// The route that the request was found to take, as metrics name it.
    pub fn takes(&self, route: &'static str) {
        self.route.get_or_init(|| route);
    }

    fn verdicts(&self) -> impl Iterator<Item = Verdict> {
        let later = [self.key.get().copied(), self.buyer.get().copied()];
        std::iter::once(self.address).chain(later.into_iter().flatten())
    }
}

fn within(verdict: Verdict) -> Result<(), Problem> {
    match verdict.wait {
        Some(wait) => Err(Problem::rate_limited(verdict.policy.name, wait)),
        None => Ok(()),
    }
}

/// Answers a request of the public listener. Outside the router and not one of its layers: each of those
/// costs every request six allocations more.
pub async fn around(api: &Api, mut router: Router, peer: IpAddr, mut request: Request) -> Response {
    let started = Instant::now();
    let address = api.admission.address(peer, request.headers());
    let context = Arc::new(Context::new(Trace::of(request.headers()), address));
    request.extensions_mut().insert(context.clone());
    let method = request.method().clone();
    let about_orders = is_about_orders(request.uri().path());

    let answering = AssertUnwindSafe(router.call(request)).catch_unwind();
    let mut response = match timeout(api.options.request_timeout, answering).await {
        Ok(Ok(Ok(response))) => response,
        Ok(Err(_panic)) => Problem::internal(&"a handler panicked").into_response(),
        Err(_) => Problem::outcome_unknown().into_response(),
    };
    if let Some(code) = finish(&mut response, &method, context.trace()) {
        api.metrics.problem(code);
    }
    if about_orders {
        let headers = response.headers_mut();
        headers.insert(RATE_LIMIT_POLICY, api.rate_limit_policy.clone());
        headers.insert(RATE_LIMIT, limits(context.verdicts()));
    }
    let route = context.route.get().copied().unwrap_or("none");
    api.metrics.answered(&method, route, response.status(), started.elapsed());
    response
}

/// The same for the listener of the inside, which has no limits and no callers to count.
pub async fn around_inner(mut router: Router, request: Request) -> Response {
    let (method, trace) = (request.method().clone(), Trace::of(request.headers()));
    let Ok(mut response) = router.call(request).await;
    finish(&mut response, &method, &trace);
    response
}

/// Writes a problem's body, now that its trace is known.
fn finish(response: &mut Response, method: &Method, trace: &Trace) -> Option<Code> {
    let problem = response.extensions_mut().remove::<Problem>()?;
    let body = problem.render(trace.id());
    response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
    if method != Method::HEAD {
        *response.body_mut() = Body::from(body);
    }
    Some(problem.code())
}

fn is_about_orders(path: &str) -> bool {
    path.strip_prefix(ORDERS).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// `RateLimit-Policy`: "name";q=quota;w=seconds (draft-ietf-httpapi-ratelimit-headers-10).
pub(super) fn policies(policies: &[Policy]) -> HeaderValue {
    let mut list = String::with_capacity(80);
    for policy in policies {
        item(&mut list, policy.name, [(";q=", policy.burst), (";w=", policy.window_seconds())]);
    }
    value(&list)
}

/// `RateLimit`: "name";r=remaining;t=seconds until all of it is there again.
fn limits(verdicts: impl Iterator<Item = Verdict>) -> HeaderValue {
    let mut list = String::with_capacity(80);
    for verdict in verdicts {
        let parameters = [(";r=", verdict.remaining), (";t=", verdict.reset_seconds())];
        item(&mut list, verdict.policy.name, parameters);
    }
    value(&list)
}

/// Adds one string with its parameters to a structured field's list (RFC 9651).
fn item(list: &mut String, name: &str, parameters: [(&str, u32); 2]) {
    list.push_str(if list.is_empty() { "\"" } else { ", \"" });
    list.push_str(name);
    list.push('"');
    for (parameter, number) in parameters {
        list.push_str(parameter);
        list.push_str(itoa::Buffer::new().format(number));
    }
}

fn value(list: &str) -> HeaderValue {
    HeaderValue::from_str(list).expect("names and numbers are visible ASCII")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn api() -> Api {
        let mut registry = prometheus_client::registry::Registry::default();
        let config = crate::config::Config::load(None).unwrap();
        let ledger = crate::ledger::Ledger::new(&config.database).unwrap();
        let metrics = crate::ledger::catalog::CatalogMetrics::register(&mut registry);
        let lanes = crate::lanes::Lanes::new(&config.redis, &config.lanes, &mut registry).unwrap();
        let catalog = crate::ledger::Catalog::new(ledger.clone(), &config.catalog, metrics);
        let recovery = crate::reconciler::rebuild::Recovery::new(
            lanes.clone(),
            ledger.clone(),
            catalog.clone(),
            &config,
            &mut registry,
        );
        Api::new(
            lanes,
            ledger,
            catalog,
            recovery,
            crate::admission::Admission::new(&config.admission, &mut registry),
            crate::telemetry::health::Health::new([]),
            super::super::Options::new(&config),
            &mut registry,
        )
    }

    #[tokio::test]
    async fn a_handler_that_panics_is_an_internal_error_without_its_reason() {
        async fn panics() -> Response {
            panic!("a secret")
        }
        let router = Router::new().route("/x", axum::routing::get(panics));
        let request = Request::get("/x").body(Body::empty()).unwrap();
        let response = around(&api(), router, IpAddr::from([127, 0, 0, 1]), request).await;
        assert_eq!(response.status(), 500);
        let body = axum::body::to_bytes(response.into_body(), 10_000).await.unwrap();
        let body = String::from_utf8(body.to_vec()).unwrap();
        assert!(body.contains("\"internal\"") && !body.contains("secret"), "{body}");
    }

    #[test]
    fn limits_are_told_as_lists_of_structured_fields() {
        let key = Policy { name: "key", per_second: 20, burst: 50 };
        let buyer = Policy { name: "buyer", per_second: 1, burst: 1 };
        assert_eq!(policies(&[key, buyer]), "\"key\";q=50;w=3, \"buyer\";q=1;w=1");
        let verdicts = [
            Verdict { policy: key, remaining: 49, wait: None },
            Verdict { policy: buyer, remaining: 0, wait: Some(Duration::from_millis(10)) },
        ];
        assert_eq!(limits(verdicts.into_iter()), "\"key\";r=49;t=1, \"buyer\";r=0;t=1");
    }

    #[test]
    fn the_orders_are_all_below_their_path_and_nothing_else() {
        for (path, about) in [
            ("/v1/orders", true),
            ("/v1/orders/x/confirm", true),
            ("/v1/ordersheet", false),
            ("/v1/sales", false),
        ] {
            assert_eq!(is_about_orders(path), about, "{path}");
        }
    }
}
