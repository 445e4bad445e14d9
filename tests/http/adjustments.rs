//! Adjustments: changes of a total, their audit trail, their idempotency.

use reqwest::Method;
use serde_json::{Value, json};

use crate::stack::{Reply, Stack, unique};

impl Stack {
    async fn adjust(&self, sku: &str, key: &str, body: Value) -> Reply {
        let path = format!("/v1/sales/{}/stock/{sku}/adjustments", self.sale);
        self.recording(self.post(&path).header("Idempotency-Key", key).json(body).send()).await
    }
}

#[tokio::test]
async fn an_adjustment_is_answered_when_it_is_recorded() {
    let stack = Stack::new("adjust").await;
    stack.define(5, json!({})).await;
    stack.hold("b").await;
    let body = json!({"delta": 3, "reason": "restock", "reference": "PO-1", "note": "truck 7"});
    let done = stack.adjust("a", "k", body.clone()).await;
    assert_eq!(done.status, 201, "{done:?}");
    let mut expected = json!({
        "sale_id": stack.sale, "sku": "a", "delta": 3, "reason": "restock", "reference": "PO-1",
        "note": "truck 7", "actor": "operator", "undoes": null, "undone_by": null,
        "before": {"total": 5, "available": 4, "held": 1, "sold": 0, "version": 0},
        "after": {"total": 8, "available": 7, "held": 1, "sold": 0, "version": 1},
    });
    for member in ["id", "created_at"] {
        expected[member] = done.body[member].clone();
    }
    assert_eq!(done.body, expected);
    let again = stack.adjust("a", "k", body).await;
    assert_eq!((again.status.as_u16(), again.header("idempotent-replayed")), (200, "true"));
    assert_eq!(again.body, done.body);
    let other = stack.adjust("a", "k", json!({"delta": 4, "reason": "restock"})).await;
    other.is(422, "idempotency-key-reused");
    assert_eq!(stack.counters().await, [8, 7, 1, 0]);

    let trail = stack.get(&format!("/v1/sales/{}/adjustments", stack.sale)).send().await;
    assert_eq!(trail.body, json!({"adjustments": [done.body], "next_cursor": null}));
}

#[tokio::test]
async fn what_is_held_or_sold_is_never_taken() {
    let stack = Stack::new("in_use").await;
    stack.define(5, json!({})).await;
    let id = stack.hold("b").await;
    stack.confirm(&id, "p").await;
    stack.hold("c").await;
    let more = stack.adjust("a", "k", json!({"delta": -4, "reason": "lost"})).await;
    more.is(409, "stock-in-use");
    let counters =
        ["total", "available", "held", "sold"].map(|name| more.body[name].as_i64().unwrap());
    assert_eq!(counters, [5, 3, 1, 1]);
    let below = stack.adjust("a", "k", json!({"delta": -6, "reason": "lost"})).await;
    assert_eq!(below.pointers(), ["/delta"], "{below:?}");
    let beyond = stack.adjust("a", "k", json!({"delta": 1_000_000_000, "reason": "restock"})).await;
    assert_eq!(beyond.pointers(), ["/delta"], "{beyond:?}");
    assert_eq!(stack.adjust("a", "k", json!({"delta": -3, "reason": "lost"})).await.status, 201);
    assert_eq!(stack.counters().await, [2, 0, 1, 1]);
}

#[tokio::test]
async fn what_an_adjustment_needs_is_checked_in_order() {
    let stack = Stack::new("checks").await;
    let body = json!({"delta": 1, "reason": "other"});
    let path = |sku: &str| format!("/v1/sales/{}/stock/{sku}/adjustments", stack.sale);
    let post = |sku: &str| stack.post(&path(sku)).json(body.clone());
    post("a").send().await.is(400, "idempotency-key-required");
    post("a").header("Idempotency-Key", "k").send().await.is(404, "sale-not-found");
    stack.define(5, json!({})).await;
    post("x").header("Idempotency-Key", "k").send().await.is(404, "sku-not-found");
    post("a%20b").header("Idempotency-Key", "k").send().await.is(404, "sku-not-found");
    let relied = post("a").header("Idempotency-Key", "k").header("If-Match", "\"0\"");
    relied.send().await.is(400, "invalid-request");
    for (body, pointer) in [
        (json!({"delta": 0, "reason": "other"}), "/delta"),
        (json!({"set_total": 9, "reason": "other"}), "/set_total"),
        (json!({"delta": 1, "reason": "other", "dry_run": true}), "/dry_run"),
        (json!({"delta": 1, "reason": "theft"}), "/reason"),
    ] {
        let reply = stack.adjust("a", "k", body).await;
        assert_eq!(reply.pointers(), [pointer], "{reply:?}");
    }
    assert_eq!(stack.counters().await, [5, 5, 0, 0]);
}

#[tokio::test]
async fn an_adjustment_that_is_not_recorded_in_time_may_have_happened() {
    let stack = Stack::with("unrecorded", |config| config.http.recorded_timeout_ms = 50).await;
    stack.define(5, json!({})).await;
    let path = format!("/v1/sales/{}/stock/a/adjustments", stack.sale);
    let body = json!({"delta": 1, "reason": "other"});
    let post = || stack.post(&path).header("Idempotency-Key", "k").json(body.clone());
    post().send().await.is(503, "outcome-unknown");
    post().send().await.is(503, "outcome-unknown");
    stack.record().await;
    let found = post().send().await;
    assert_eq!((found.status.as_u16(), found.header("idempotent-replayed")), (200, "true"));
    assert_eq!(stack.counters().await, [6, 6, 0, 0], "once");
}

#[tokio::test]
async fn the_audit_trail_is_listed_by_sku_and_page() {
    let stack = Stack::new("trail").await;
    stack.define(5, json!({"skus": [{"sku": "a", "stock": 5}, {"sku": "b", "stock": 5}]})).await;
    for n in 0..5 {
        let sku = if n == 3 { "b" } else { "a" };
        let body = json!({"delta": n + 1, "reason": "recount"});
        assert_eq!(stack.adjust(sku, &unique("k"), body).await.status, 201);
    }
    let list = async |query: &str| {
        let path = format!("/v1/sales/{}/adjustments?{query}", stack.sale);
        stack.get(&path).send().await
    };
    let deltas = |reply: &Reply| -> Vec<i64> {
        let all = reply.body["adjustments"].as_array().unwrap().iter();
        all.map(|adjustment| adjustment["delta"].as_i64().unwrap()).collect()
    };
    assert_eq!(deltas(&list("").await), [5, 4, 3, 2, 1]);
    assert_eq!(deltas(&list("sku=b").await), [4]);
    let first = list("limit=2&sku=a").await;
    assert_eq!(deltas(&first), [5, 3]);
    let next = first.body["next_cursor"].as_str().unwrap();
    let second = list(&format!("limit=2&sku=a&cursor={next}")).await;
    assert_eq!((deltas(&second), &second.body["next_cursor"]), (vec![2, 1], &Value::Null));
    list("sku=a%20b").await.is(400, "invalid-request");
    let unknown = stack.get(&format!("/v1/sales/{}/adjustments", unique("no"))).send().await;
    unknown.is(404, "sale-not-found");
    let orders = format!("/v1/sales/{}/adjustments", stack.sale);
    stack.call(Method::GET, &orders, &stack.orders_key).send().await.is(403, "forbidden");
}
