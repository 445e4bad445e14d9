//! `openapi.json`, made from the handlers.

use axum::http::StatusCode;
use axum::response::Response;
use utoipa::openapi::content::ContentBuilder;
use utoipa::openapi::path::Operation;
use utoipa::openapi::schema::{ObjectBuilder, Type};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::openapi::{HeaderBuilder, OpenApi, Ref, RefOr, Response as Described, ResponseBuilder};
use utoipa::{Modify, OpenApi as _, ToSchema};

use super::auth::Anybody;
use super::problem::{CONTENT_TYPE_PROBLEM, Code, FieldError};
use super::{
    adjustments, conservation, dead_letters, health, json, orders, reconcile, refunds, sales,
    stock, views, webhook,
};
use crate::domain::ids::RefundId;

/// An error, RFC 9457. Further members say what a caller needs to act.
#[derive(ToSchema)]
#[allow(dead_code)] // a schema; problem.rs writes the body
struct Problem {
    r#type: String,
    title: String,
    status: u16,
    detail: String,
    code: Code,
    /// The trace of the request's `traceparent`, else a new one.
    trace_id: String,
    /// Of `invalid-request`.
    errors: Option<Vec<FieldError>>,
    /// Of those about an order.
    order: Option<orders::OrderView>,
    /// Of a payment that must be given back.
    refund_id: Option<RefundId>,
    /// Of those about a dead letter.
    dead_letter: Option<dead_letters::DeadLetterView>,
    /// Of `rate-limited`.
    retry_after_ms: Option<u64>,
}

#[derive(utoipa::OpenApi)]
#[openapi(
    info(title = "Holdfast", description = "Holds, sells and releases the limited stock of flash sales, exactly once."),
    paths(
        orders::place, orders::list, orders::show, orders::cancel, orders::cancel_by_key,
        orders::payments::begin_payment, orders::payments::confirm, orders::returns::take_back,
        orders::history::show, refunds::list, refunds::settle, webhook::receive,
        sales::define, sales::definition, sales::pause, sales::resume, sales::close,
        views::show, views::list,
        stock::show, conservation::show, reconcile::reconcile, adjustments::adjust, adjustments::list, adjustments::undo,
        dead_letters::list, dead_letters::show, dead_letters::retry, dead_letters::discard,
        health::livez, health::readyz, show,
    ),
    components(schemas(Problem, Code, FieldError, webhook::PaymentData)),
    modifiers(&Key, &Errors),
    tags((name = "orders"), (name = "payments"), (name = "refunds"), (name = "sales"), (name = "stock"), (name = "dead letters"), (name = "health")),
)]
struct Document;

/// The whole document.
pub fn document() -> OpenApi {
    Document::openapi()
}

/// This document.
#[utoipa::path(get, path = "/openapi.json", operation_id = "show_document", tag = "health",
    responses((status = 200, description = "OpenAPI 3.1")))]
pub async fn show(_caller: Anybody) -> Response {
    json(StatusCode::OK, &document())
}

struct Key;

impl Modify for Key {
    fn modify(&self, document: &mut OpenApi) {
        let scheme = HttpBuilder::new()
            .scheme(HttpAuthScheme::Bearer)
            .description(Some("An API key, of scope orders (/v1/orders) or operator (all)"))
            .build();
        let components = document.components.get_or_insert_default();
        components.add_security_scheme("key", SecurityScheme::Http(scheme));
    }
}

/// Adds the errors that follow from what an operation takes, so that handlers name their own only.
struct Errors;

impl Modify for Errors {
    fn modify(&self, document: &mut OpenApi) {
        for (path, item) in &mut document.paths.paths {
            let methods = [&mut item.get, &mut item.put, &mut item.post];
            for operation in methods.into_iter().flatten() {
                if path.starts_with("/v1/") {
                    add_errors(operation);
                }
                if path.starts_with("/v1/orders") {
                    add_rate_limit_headers(operation);
                }
            }
        }
    }
}

fn add_errors(operation: &mut Operation) {
    let mut common = vec![
        (400, "invalid-request, idempotency-key-required, idempotency-key-invalid"),
        (429, "rate-limited: nothing was done"),
        (500, "internal: treat as outcome-unknown"),
        (503, "overloaded, lane-frozen, unavailable: nothing was done; outcome-unknown"),
    ];
    if operation.security.is_some() {
        common.push((401, "unauthenticated"));
        common.push((403, "forbidden"));
    }
    if operation.request_body.is_some() {
        common.push((408, "request-timeout: nothing was done"));
        common.push((413, "body-too-large"));
        common.push((415, "unsupported-media-type"));
    }
    let responses = &mut operation.responses.responses;
    for (status, description) in common {
        let described = ResponseBuilder::new().description(description).build();
        responses.entry(status.to_string()).or_insert(RefOr::T(described));
    }
    for (status, response) in responses {
        if let RefOr::T(response) = response
            && status.as_str() >= "400"
        {
            describe_problem(status, response);
        }
    }
}

fn describe_problem(status: &str, response: &mut Described) {
    let schema = Ref::from_schema_name("Problem");
    let content = ContentBuilder::new().schema(Some(schema)).build();
    response.content.insert(CONTENT_TYPE_PROBLEM.to_owned(), content.into());
    if matches!(status, "429" | "503") {
        add_header(response, "Retry-After", Type::Integer, "Seconds");
    }
    if status == "401" {
        add_header(response, "WWW-Authenticate", Type::String, "Bearer");
    }
}

fn add_rate_limit_headers(operation: &mut Operation) {
    for response in operation.responses.responses.values_mut() {
        if let RefOr::T(response) = response {
            let draft = "draft-ietf-httpapi-ratelimit-headers-10";
            add_header(response, "RateLimit-Policy", Type::String, draft);
            add_header(response, "RateLimit", Type::String, draft);
        }
    }
}

fn add_header(response: &mut Described, name: &str, kind: Type, description: &str) {
    let schema = ObjectBuilder::new().schema_type(kind).build();
    let header = HeaderBuilder::new().schema(Some(schema)).description(Some(description)).build();
    response.headers.insert(name.to_owned(), header.into());
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_route_is_in_the_document_and_the_other_way_round() {
        let mut described = BTreeSet::new();
        for (path, item) in &document().paths.paths {
            let methods = [("GET", &item.get), ("PUT", &item.put), ("POST", &item.post)];
            for (method, _) in methods.into_iter().filter(|(_, operation)| operation.is_some()) {
                described.insert((method, path.clone()));
            }
        }
        let routed: BTreeSet<_> = crate::http::routes::routes()
            .listed()
            .iter()
            .map(|(method, path)| (*method, (*path).to_owned()))
            .collect();
        assert_eq!(described, routed);
    }

    #[test]
    fn every_operation_has_a_name_of_its_own() {
        let paths = document().paths.paths;
        let operations = paths.values().flat_map(|item| [&item.get, &item.put, &item.post]);
        let names = operations.flatten().map(|operation| operation.operation_id.as_deref());
        let names: Vec<_> = names.collect();
        let distinct: BTreeSet<_> = names.iter().flatten().collect();
        assert_eq!(distinct.len(), names.len(), "{names:?}");
    }

    #[test]
    fn every_reference_leads_somewhere() {
        let text = document().to_json().unwrap();
        let document: serde_json::Value = serde_json::from_str(&text).unwrap();
        let mut references = 0;
        for part in text.split("\"#/components/schemas/").skip(1) {
            let name = part.split('"').next().unwrap();
            assert!(document["components"]["schemas"][name].is_object(), "{name}");
            references += 1;
        }
        assert!(references > 30, "{references}");
    }

    #[test]
    fn every_operation_with_a_key_says_so_and_what_can_go_wrong() {
        let document: serde_json::Value =
            serde_json::from_str(&document().to_json().unwrap()).unwrap();
        let place = &document["paths"]["/v1/orders"]["post"];
        assert_eq!(place["security"][0]["key"], serde_json::json!([]));
        for status in [
            "201", "200", "400", "401", "403", "408", "409", "413", "415", "422", "429", "500",
            "503",
        ] {
            assert!(place["responses"][status].is_object(), "{status}");
        }
        let problem = &place["responses"]["409"]["content"][CONTENT_TYPE_PROBLEM];
        assert_eq!(problem["schema"]["$ref"], "#/components/schemas/Problem");
        assert!(place["responses"]["429"]["headers"]["Retry-After"].is_object());
        assert_eq!(document["components"]["securitySchemes"]["key"]["scheme"], "bearer");
        let open = &document["paths"]["/v1/sales/{sale_id}"]["get"];
        assert!(open["security"].is_null() && open["responses"]["401"].is_null());
    }
}
