//! A sale that has left Redis: its orders are read from the database and change no more.

use reqwest::Method;
use serde_json::json;

use crate::stack::{Stack, until};

#[tokio::test]
async fn an_archived_sale_is_read_from_the_database() {
    let stack = Stack::new("archive").await;
    stack.define(5, json!({"hold_seconds": 1, "retention_days": 0})).await;
    let bought = stack.place("a", "k", 1).await;
    stack.confirm(bought.id(), "p").await;
    let cancelled = stack.hold("b").await;
    stack.cancel(&cancelled).await;
    let expired = stack.hold("c").await;
    let adjust = json!({"delta": 2, "reason": "restock"});
    let path = format!("/v1/sales/{}/stock/a/adjustments", stack.sale);
    let adjustment =
        |key: &str, body| stack.post(&path).header("Idempotency-Key", key).json(body).send();
    let adjusted = stack.recording(adjustment("k", adjust.clone())).await;
    assert_eq!(adjusted.status, 201, "{adjusted:?}");
    until("the hold is over", async || {
        stack.lanes.expire(&stack.lane(), 10).await.unwrap();
        stack.counters().await[2] == 0
    })
    .await;
    let live = stack.counters().await;
    stack.archive().await;

    let order = |id: &str| stack.get(&format!("/v1/orders/{id}"));
    let shown = order(bought.id()).send().await;
    assert_eq!(
        (&shown.body["status"], &shown.body["durability"]),
        (&json!("confirmed"), &json!("recorded"))
    );
    assert_eq!(order(&expired).send().await.body["status"], "expired");
    assert_eq!(stack.confirm(bought.id(), "p").await.status, 200);
    stack.confirm(bought.id(), "q").await.is(409, "already-paid");
    stack.confirm(&cancelled, "p").await.is(409, "order-cancelled");
    let late = stack.confirm(&expired, "p").await;
    late.is(409, "payment-too-late");
    assert_eq!(late.body["order"]["id"], expired.as_str());
    assert_eq!(stack.cancel(&cancelled).await.status, 200);
    stack.cancel(bought.id()).await.is(409, "order-confirmed");
    stack.cancel(&expired).await.is(409, "sale-archived");
    stack.place("a", "new", 1).await.is(409, "sale-archived");

    let by_key = async |buyer: &str, key: &str| {
        let body = json!({"sale_id": stack.sale, "buyer_id": buyer, "idempotency_key": key});
        stack.post("/v1/orders/cancel").json(body).send().await
    };
    by_key("a", "k").await.is(409, "order-confirmed");
    by_key("a", "never").await.is(409, "sale-archived");

    let replay = adjustment("k", adjust).await;
    assert_eq!(
        (replay.status.as_u16(), &replay.body),
        (200, &adjusted.body),
        "a key is kept for ever"
    );
    adjustment("k", json!({"delta": 3, "reason": "restock"}))
        .await
        .is(422, "idempotency-key-reused");
    adjustment("new", json!({"delta": 3, "reason": "restock"})).await.is(409, "sale-archived");

    assert_eq!(stack.counters().await, live, "recorded as they were");
    let sale = format!("/v1/sales/{}", stack.sale);
    let seen = stack.call(Method::GET, &sale, "").send().await;
    assert_eq!(seen.body["state"], "archived");
    let listed = stack.call(Method::GET, "/v1/sales?state=archived", "").send().await;
    assert_eq!(listed.body["sales"][0]["id"], stack.sale.as_str());
    let redefine = json!({"name": "again", "skus": [{"sku": "a", "stock": 5}]});
    stack.put(&sale).json(redefine).send().await.is(409, "sale-archived");
    for what in ["pause", "resume", "close"] {
        stack.post(&format!("{sale}/{what}")).send().await.is(409, "sale-archived");
    }
}

#[tokio::test]
async fn an_archived_sale_that_is_still_in_redis_finds_its_keys() {
    let stack = Stack::new("archiving").await;
    stack.define(5, json!({"retention_days": 0})).await;
    let bought = stack.place("a", "k", 1).await;
    stack.confirm(bought.id(), "p").await;
    stack.post(&format!("/v1/sales/{}/close", stack.sale)).send().await;
    stack.record().await;
    assert!(stack.lanes.archive(&stack.lane(), 0).await.unwrap().outcome);
    let replay = stack.place("a", "k", 1).await;
    assert_eq!((replay.status.as_u16(), replay.id()), (200, bought.id()), "a replay comes first");
    stack.place("a", "new", 1).await.is(409, "sale-archived");
    stack.post(&format!("/v1/sales/{}/pause", stack.sale)).send().await.is(409, "sale-archived");
}
