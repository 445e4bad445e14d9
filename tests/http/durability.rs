//! How far a change has got before it is answered.

use std::time::Duration;

use holdfast::domain::durability::Durability;
use holdfast::lanes::Reached;
use reqwest::Method;
use serde_json::json;

use crate::payments::{SECRETS, deliver, now};
use crate::stack::{Call, Reply, Stack, unique, until};

/// So long that whoever waits in vain gets the request's own time-out instead.
const FOR_EVER_MS: u64 = 60_000;

fn post(stack: &Stack, path: &str, prefer: &str) -> Call {
    let call = stack.call(Method::POST, path, &stack.orders_key);
    if prefer.is_empty() { call } else { call.header("Prefer", prefer) }
}

fn order(stack: &Stack, buyer: &str, quantity: u32) -> serde_json::Value {
    let lines = json!([{"sku": "a", "quantity": quantity}]);
    json!({"sale_id": stack.sale, "buyer_id": buyer, "lines": lines})
}

async fn place(stack: &Stack, key: &str, prefer: &str) -> Reply {
    let call = post(stack, "/v1/orders", prefer).header("Idempotency-Key", key);
    call.json(order(stack, "b", 1)).send().await
}

/// Tells the lane that Kafka has all of it.
async fn log(stack: &Stack) {
    let lane = stack.lane();
    let marks = stack.lanes.marks(&lane).await.unwrap();
    let (epoch, logged) = (marks.epoch, marks.seq);
    let reached = Reached { epoch, logged, recorded: marks.recorded, acknowledged: logged };
    stack.lanes.advance(&lane, reached, "test", Duration::from_secs(5)).await.unwrap();
}

#[track_caller]
fn is(reply: &Reply, status: u16, durability: &str, applied: &str) {
    assert_eq!(reply.status, status, "{reply:?}");
    assert_eq!(reply.body["durability"], durability, "{reply:?}");
    assert_eq!(reply.header("preference-applied"), applied, "{reply:?}");
}

#[tokio::test]
async fn an_answer_waits_for_kafka_where_it_was_asked_to() {
    let stack = Stack::with("logged", |c| c.http.durability_timeout_ms = FOR_EVER_MS).await;
    stack.define(9, json!({})).await;
    let placing = async { place(&stack, "k", "durability=logged").await };
    let logging = async {
        until("it is held", async || stack.lanes.marks(&stack.lane()).await.unwrap().seq == 2)
            .await;
        log(&stack).await;
    };
    let (held, ()) = tokio::join!(placing, logging);
    is(&held, 201, "logged", "durability=logged");
    let again = place(&stack, "k", "durability=logged").await;
    is(&again, 201, "logged", "durability=logged");
    assert_eq!(again.header("idempotent-replayed"), "true");
}

#[tokio::test]
async fn every_call_that_changes_an_order_waits_for_the_database_where_it_was_asked_to() {
    let stack = Stack::with("recorded", |c| c.http.durability_timeout_ms = FOR_EVER_MS).await;
    stack.define(9, json!({})).await;
    let prefer = "respond-async, durability=recorded";
    let applied = "durability=recorded";
    stack
        .recording(async {
            let held = place(&stack, "k", prefer).await;
            is(&held, 201, "recorded", applied);
            let path = |call: &str| format!("/v1/orders/{}/{call}", held.id());
            for (call, body) in [
                ("begin-payment", json!({"payment_id": "p"})),
                ("confirm", json!({"payment_id": "p"})),
                ("return", json!({"restock": true})),
            ] {
                let first = post(&stack, &path(call), prefer).header("Idempotency-Key", "r");
                is(&first.json(body.clone()).send().await, 200, "recorded", applied);
                let again = post(&stack, &path(call), prefer).header("Idempotency-Key", "r");
                is(&again.json(body).send().await, 200, "recorded", applied);
            }
            let other = place(&stack, "other", "").await;
            is(&other, 201, "memory", "");
            let path = format!("/v1/orders/{}/cancel", other.id());
            is(&post(&stack, &path, prefer).send().await, 200, "recorded", applied);
            for key in ["other", "never-came"] {
                let body = json!({"sale_id": stack.sale, "buyer_id": "b", "idempotency_key": key});
                let cancel = post(&stack, "/v1/orders/cancel", prefer).json(body).send().await;
                is(&cancel, 200, "recorded", applied);
            }
        })
        .await;
}

#[tokio::test]
async fn what_is_not_known_to_have_got_so_far_in_time_may_be_asked_again() {
    let stack = Stack::with("not_in_time", |c| c.http.durability_timeout_ms = 50).await;
    stack.define(9, json!({})).await;
    for level in ["logged", "recorded"] {
        let prefer = format!("durability={level}");
        place(&stack, "k", &prefer).await.is(503, "outcome-unknown");
        let metrics = reqwest::get(format!("{}/metrics", stack.inner_url)).await.unwrap();
        let metrics = metrics.text().await.unwrap();
        let counted = format!("holdfast_http_durability_timeouts_total{{level=\"{level}\"}} 1");
        assert!(metrics.contains(&counted), "{metrics}");
    }
    assert_eq!(stack.counters().await, [9, 8, 1, 0], "it was done, and once");
    log(&stack).await;
    is(&place(&stack, "k", "durability=logged").await, 201, "logged", "durability=logged");
    place(&stack, "k", "durability=recorded").await.is(503, "outcome-unknown");
    stack.record().await;
    is(&place(&stack, "k", "durability=recorded").await, 201, "recorded", "durability=recorded");
    is(&place(&stack, "k", "durability=logged").await, 201, "recorded", "durability=logged");
}

#[tokio::test]
async fn a_refusal_does_not_wait() {
    let stack = Stack::with("refusal", |c| c.http.durability_timeout_ms = FOR_EVER_MS).await;
    stack.define(2, json!({})).await;
    let prefer = "durability=recorded";
    let id = stack.hold("b").await;
    stack.confirm(&id, "p").await;
    let cancelled = stack.place("b", "cancelled", 1).await;
    stack.cancel(cancelled.id()).await;
    let too_many = post(&stack, "/v1/orders", prefer).header("Idempotency-Key", "x");
    let sold_out = too_many.json(order(&stack, "b", 2)).send().await;
    sold_out.is(409, "sold-out");
    place(&stack, "cancelled", prefer).await.is(409, "order-cancelled");
    let path = |call: &str| format!("/v1/orders/{id}/{call}");
    post(&stack, &path("cancel"), prefer).send().await.is(409, "order-confirmed");
    let other = json!({"payment_id": "q"});
    let begin = post(&stack, &path("begin-payment"), prefer).json(other.clone()).send().await;
    begin.is(409, "order-confirmed");
    let paid = post(&stack, &path("confirm"), prefer).json(other).send().await;
    paid.is(409, "already-paid");
    for reply in [sold_out, begin, paid] {
        assert_eq!(reply.header("preference-applied"), "", "{reply:?}");
    }
}

#[tokio::test]
async fn a_level_that_nobody_knows_is_ignored() {
    let stack = Stack::with("ignored", |c| c.http.durability_timeout_ms = FOR_EVER_MS).await;
    stack.define(9, json!({})).await;
    for prefer in ["durability=carved", "durability", "wait=10", ""] {
        is(&place(&stack, &unique("k"), prefer).await, 201, "memory", "");
    }
    is(&place(&stack, "k", "durability=memory").await, 201, "memory", "durability=memory");
}

#[tokio::test]
async fn a_level_that_the_deployment_does_not_have_is_served_by_the_next_stronger() {
    let stack = Stack::new("stronger").await;
    stack.define(9, json!({})).await;
    let placing = place(&stack, "k", "durability=replicated");
    let held = stack.recording(placing).await;
    assert_eq!(
        (held.status.as_u16(), held.header("preference-applied")),
        (201, "durability=logged")
    );
    assert_ne!(held.body["durability"], "memory");
}

#[tokio::test]
async fn the_strongest_of_service_sale_and_caller_is_waited_for() {
    let stack = Stack::with("strongest", |c| c.http.durability_timeout_ms = 50).await;
    stack.define(9, json!({"min_durability": "logged"})).await;
    place(&stack, "k", "").await.is(503, "outcome-unknown");
    log(&stack).await;
    is(&place(&stack, "k", "").await, 201, "logged", "");
    is(&place(&stack, "k", "durability=memory").await, 201, "logged", "durability=logged");
    place(&stack, "k", "durability=recorded").await.is(503, "outcome-unknown");

    let service = Stack::with("service", |config| {
        config.http.durability = Durability::Logged;
        config.http.durability_timeout_ms = 50;
    })
    .await;
    service.define(9, json!({"min_durability": "memory"})).await;
    place(&service, "k", "durability=memory").await.is(503, "outcome-unknown");
    log(&service).await;
    is(&place(&service, "k", "durability=memory").await, 201, "logged", "durability=logged");
}

#[tokio::test]
async fn a_sale_keeps_its_level_and_may_change_it() {
    let stack = Stack::with("keeps", |c| c.http.durability_timeout_ms = 50).await;
    let path = format!("/v1/sales/{}/definition", stack.sale);
    stack.define(9, json!({})).await;
    assert!(stack.get(&path).send().await.body.get("min_durability").is_none());
    let held = stack.hold("b").await;
    for level in ["recorded", "replicated", "memory", "logged"] {
        let put = stack.define(9, json!({"min_durability": level})).await;
        assert_eq!(put.body["min_durability"], level);
        stack.catalog.refresh().await.unwrap();
        assert_eq!(stack.get(&path).send().await.body["min_durability"], level);
    }
    let same = stack.define(9, json!({"min_durability": "logged"})).await;
    assert_eq!(same.body["version"], 5, "the same again changes nothing: {same:?}");
    stack.cancel(&held).await.is(503, "outcome-unknown");
    stack.record().await;
    assert_eq!(stack.cancel(&held).await.status, 200);
    let unknown =
        json!({"name": "n", "skus": [{"sku": "a", "stock": 1}], "min_durability": "carved"});
    let refused = stack.put(&format!("/v1/sales/{}", stack.sale)).json(unknown).send().await;
    assert_eq!(refused.pointers(), ["/min_durability"]);
}

#[tokio::test]
async fn the_webhook_waits_as_its_sale_asks_for_who_delivers_will_not_ask_again() {
    let stack = Stack::with("webhook_waits", |config| {
        config.payments.webhook_secrets = vec![SECRETS[0].to_owned()];
        config.http.durability_timeout_ms = 50;
    })
    .await;
    stack.define(9, json!({})).await;
    let bought = stack.hold("b").await;
    let cancelled = stack.hold("b").await;
    stack.cancel(&cancelled).await;
    let failed = stack.hold("b").await;
    let path = format!("/v1/orders/{failed}/begin-payment");
    post(&stack, &path, "").json(json!({"payment_id": "p"})).send().await;
    stack.define(9, json!({"min_durability": "logged"})).await;
    let deliveries = [
        ("payment.succeeded", &bought),
        ("payment.succeeded", &cancelled),
        ("payment.failed", &failed),
    ];
    for (kind, id) in deliveries {
        let data = json!({"order_id": id, "payment_id": "p"});
        let body = json!({"type": kind, "timestamp": "2026-01-01T00:00:00Z", "data": data});
        let deliver = async || deliver(&stack, SECRETS[0], now(), &body.to_string()).await;
        deliver().await.is(503, "outcome-unknown");
        log(&stack).await;
        assert_eq!(deliver().await.status, 204, "{kind}");
    }
}

#[tokio::test]
async fn an_archived_sale_has_every_level() {
    let stack = Stack::with("archive", |c| c.http.durability_timeout_ms = 50).await;
    stack.define(9, json!({"retention_days": 0})).await;
    let id = stack.hold("b").await;
    stack.confirm(&id, "p").await;
    stack.record().await;
    stack.archive().await;
    stack.catalog.refresh().await.unwrap();
    let path = format!("/v1/orders/{id}/confirm");
    let call = post(&stack, &path, "durability=logged").json(json!({"payment_id": "p"}));
    is(&call.send().await, 200, "recorded", "durability=logged");
}
