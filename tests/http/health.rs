//! Liveness, readiness, metrics, the OpenAPI document.

use holdfast::telemetry::health::{Condition, Part};
use reqwest::Method;
use serde_json::json;

use crate::stack::Stack;

#[tokio::test]
async fn readiness_says_what_is_missing() {
    let stack = Stack::new("ready").await;
    let ready = async || {
        let reply = stack.call(Method::GET, "/readyz", "").send().await;
        (reply.status.as_u16(), reply.body["status"].as_str().unwrap().to_owned())
    };
    assert_eq!(ready().await, (200, "ready".into()));
    stack.health.set_part(Part::Kafka, Condition::Down, "no broker");
    assert_eq!(ready().await, (200, "degraded".into()));
    let detail = reqwest::get(format!("{}/readyz", stack.inner_url)).await.unwrap();
    assert_eq!(detail.status(), 200);
    let detail: serde_json::Value = serde_json::from_str(&detail.text().await.unwrap()).unwrap();
    assert_eq!(detail["status"], "degraded");
    assert_eq!(
        (&detail["parts"]["kafka"]["status"], &detail["parts"]["kafka"]["detail"]),
        (&json!("down"), &json!("no broker"))
    );
    assert!(detail["parts"]["redis"]["since"].is_string() && detail["roles"]["api"].is_object());
    stack.health.set_part(Part::Redis, Condition::Down, "");
    assert_eq!(ready().await, (503, "unavailable".into()));
    stack.health.drain();
    assert_eq!(ready().await, (503, "draining".into()));
    assert_eq!(stack.call(Method::GET, "/livez", "").send().await.status, 200);
}

#[tokio::test]
async fn metrics_are_openmetrics_with_bounded_labels_and_for_the_inside_only() {
    let stack = Stack::new("metrics").await;
    stack.define(1, json!({})).await;
    for n in 0..3 {
        stack.get(&format!("/v1/orders/made-up-{n}")).send().await.is(404, "order-not-found");
        stack.get(&format!("/v1/made-up-{n}")).send().await.is(404, "not-found");
    }
    let reply = reqwest::get(format!("{}/metrics", stack.inner_url)).await.unwrap();
    let kind = reply.headers()["content-type"].to_str().unwrap().to_owned();
    assert_eq!(kind, "application/openmetrics-text; version=1.0.0; charset=utf-8");
    let text = reply.text().await.unwrap();
    assert!(text.ends_with("# EOF\n"));
    let count = |line: &str| text.lines().any(|known| known == line);
    assert!(
        count(
            r#"holdfast_http_request_duration_seconds_count{method="GET",route="/v1/orders/{order_id}",status="4xx"} 3"#
        ),
        "{text}"
    );
    assert!(
        count(
            r#"holdfast_http_request_duration_seconds_count{method="GET",route="none",status="4xx"} 3"#
        ),
        "{text}"
    );
    assert!(count(r#"holdfast_http_problems_total{code="order-not-found"} 3"#), "{text}");
    assert!(text.contains("holdfast_admission_in_flight 0"), "{text}");
    assert!(!text.contains("made-up"), "what callers write is no label");
    stack.call(Method::GET, "/metrics", "").send().await.is(404, "not-found");
    let inside = reqwest::get(format!("{}/v1/sales", stack.inner_url)).await.unwrap();
    assert_eq!(inside.headers()["content-type"], "application/problem+json");
    assert_eq!(inside.json::<serde_json::Value>().await.unwrap()["code"], "not-found");
}

#[tokio::test]
async fn the_document_is_there_for_all() {
    let stack = Stack::new("openapi").await;
    let reply = stack.call(Method::GET, "/openapi.json", "").send().await;
    assert_eq!(reply.status, 200);
    assert!(reply.body["openapi"].as_str().unwrap().starts_with("3.1"));
    assert!(reply.body["paths"]["/v1/orders"]["post"].is_object());
}
