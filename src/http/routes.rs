//! The table of contents: every path, and who answers it.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::Request;
use axum::handler::Handler;
use axum::http::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
    ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE,
};
use axum::http::{HeaderValue, StatusCode};
use axum::middleware::map_response;
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post, put};
use prometheus_client::registry::Registry;
use tower::service_fn;

use super::context::Context;
use super::problem::{Code, Problem};
use super::serve::Front;
use super::{
    Api, adjustments, conservation, context, dead_letters, health, openapi, orders, reconcile,
    refunds, sales, stock, views, webhook,
};
use crate::telemetry::health::Health;

/// What callers can ask for.
pub(super) fn routes() -> Routes {
    Routes::default()
        .post("/v1/orders", orders::place)
        .get("/v1/orders", orders::list)
        .get("/v1/orders/{order_id}", orders::show)
        .get("/v1/orders/{order_id}/history", orders::history::show)
        .post("/v1/orders/{order_id}/begin-payment", orders::payments::begin_payment)
        .post("/v1/orders/{order_id}/confirm", orders::payments::confirm)
        .post("/v1/orders/{order_id}/return", orders::returns::take_back)
        .post("/v1/orders/{order_id}/cancel", orders::cancel)
        .post("/v1/orders/cancel", orders::cancel_by_key)
        .post("/v1/payments/webhook", webhook::receive)
        .get("/v1/refunds", refunds::list)
        .post("/v1/refunds/{refund_id}/settle", refunds::settle)
        .open("/v1/sales", views::list)
        .open("/v1/sales/{sale_id}", views::show)
        .put("/v1/sales/{sale_id}", sales::define)
        .get("/v1/sales/{sale_id}/definition", sales::definition)
        .post("/v1/sales/{sale_id}/pause", sales::pause)
        .post("/v1/sales/{sale_id}/resume", sales::resume)
        .post("/v1/sales/{sale_id}/close", sales::close)
        .get("/v1/sales/{sale_id}/stock", stock::show)
        .get("/v1/sales/{sale_id}/conservation", conservation::show)
        .post("/v1/sales/{sale_id}/reconcile", reconcile::reconcile)
        .post("/v1/sales/{sale_id}/stock/{sku}/adjustments", adjustments::adjust)
        .get("/v1/sales/{sale_id}/adjustments", adjustments::list)
        .post("/v1/adjustments/{adjustment_id}/undo", adjustments::undo)
        .get("/v1/dead-letters", dead_letters::list)
        .get("/v1/dead-letters/{dead_letter_id}", dead_letters::show)
        .post("/v1/dead-letters/{dead_letter_id}/retry", dead_letters::retry)
        .post("/v1/dead-letters/{dead_letter_id}/discard", dead_letters::discard)
        .get("/livez", health::livez)
        .get("/readyz", health::readyz)
        .get("/openapi.json", openapi::show)
}

/// Answers the public listener.
pub fn public(api: Api) -> impl Front {
    let router = routes()
        .router
        .fallback(no_such_path)
        .method_not_allowed_fallback(no_such_method)
        .with_state(api.clone());
    service_fn(move |(peer, request): (SocketAddr, Request)| {
        let (api, router) = (api.clone(), router.clone());
        async move { Ok(context::around(&api, router, peer.ip(), request).await) }
    })
}

/// Answers the listener for the inside.
pub fn inside(health: Health, registry: Arc<Registry>) -> impl Front {
    let router = Router::new()
        .route("/livez", get(health::livez))
        .route("/readyz", get(health::readyz_detail).with_state(health))
        .route("/metrics", get(health::metrics).with_state(registry))
        .fallback(no_such_path)
        .method_not_allowed_fallback(no_such_method);
    service_fn(move |(_peer, request): (SocketAddr, Request)| {
        let router = router.clone();
        async move { Ok(context::around_inner(router, request).await) }
    })
}

async fn no_such_path() -> Problem {
    Problem::new(Code::NotFound, "there is no such path")
}

/// The router adds `Allow`.
async fn no_such_method() -> Problem {
    Problem::new(Code::MethodNotAllowed, "the path does not take this method; see Allow")
}

/// A router, and a list of what is in it: the OpenAPI document is held against it.
#[derive(Default)]
pub(super) struct Routes {
    router: Router<Api>,
    listed: Vec<(&'static str, &'static str)>,
}

impl Routes {
    fn get<T: 'static>(self, path: &'static str, handler: impl Handler<T, Api>) -> Self {
        self.add("GET", path, get(Routed { handler, path }))
    }

    fn post<T: 'static>(self, path: &'static str, handler: impl Handler<T, Api>) -> Self {
        self.add("POST", path, post(Routed { handler, path }))
    }

    fn put<T: 'static>(self, path: &'static str, handler: impl Handler<T, Api>) -> Self {
        self.add("PUT", path, put(Routed { handler, path }))
    }

    /// A GET that pages of other origins may read.
    fn open<T: 'static>(self, path: &'static str, handler: impl Handler<T, Api>) -> Self {
        let any_origin = map_response(allow_any_origin);
        let handlers = get(Routed { handler, path }).options(Routed { handler: preflight, path });
        self.add("GET", path, handlers.route_layer(any_origin))
    }

    fn add(
        mut self,
        method: &'static str,
        path: &'static str,
        handlers: MethodRouter<Api>,
    ) -> Self {
        self.router = self.router.route(path, handlers);
        self.listed.push((method, path));
        self
    }

    #[cfg(test)]
    pub fn listed(&self) -> &[(&'static str, &'static str)] {
        &self.listed
    }
}

/// A handler that says whose route it is.
#[derive(Clone)]
struct Routed<H> {
    handler: H,
    path: &'static str,
}

impl<T, H: Handler<T, Api>> Handler<T, Api> for Routed<H> {
    type Future = H::Future;

    fn call(self, request: Request, api: Api) -> H::Future {
        if let Some(context) = request.extensions().get::<Arc<Context>>() {
            context.takes(self.path);
        }
        self.handler.call(request, api)
    }
}

async fn allow_any_origin(mut response: Response) -> Response {
    let headers = response.headers_mut();
    headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static("ETag, Retry-After"));
    response
}

/// The answer to a browser that asks before it reads with `If-None-Match`.
async fn preflight() -> Response {
    let say = HeaderValue::from_static;
    let headers = [
        (ACCESS_CONTROL_ALLOW_METHODS, say("GET, HEAD")),
        (ACCESS_CONTROL_ALLOW_HEADERS, say("If-None-Match, traceparent")),
        (ACCESS_CONTROL_MAX_AGE, say("86400")),
    ];
    (StatusCode::NO_CONTENT, headers).into_response()
}
