//! What became of an order: its steps, from the ledger.

use holdfast::domain::ids::IdSecret;
use reqwest::Method;
use serde_json::{Value, json};

use crate::stack::{Reply, Stack, until};

const FIRST_TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const SECOND_TRACE: &str = "1bf7651916cd43dd8448eb211c80319d";

fn traceparent(trace_id: &str) -> String {
    format!("00-{trace_id}-b7ad6b7169203331-01")
}

async fn history(stack: &Stack, id: &str) -> Reply {
    let path = format!("/v1/orders/{id}/history");
    stack.call(Method::GET, &path, &stack.orders_key).send().await
}

async fn steps(stack: &Stack, id: &str) -> Vec<Value> {
    let reply = history(stack, id).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    reply.body["steps"].as_array().unwrap().clone()
}

/// Event, cause and lines of each step.
fn told(steps: &[Value]) -> Vec<Value> {
    steps.iter().map(|step| json!([step["event"], step["cause"], step["lines"]])).collect()
}

/// The id that this secret makes for an order that nobody placed.
fn id_of_nobody(stack: &Stack, secret: &IdSecret) -> String {
    let (lane, buyer) = (stack.lane(), "nobody".parse().unwrap());
    let key = secret.order_key(&lane.sale, &buyer, &"never".parse().unwrap());
    secret.order_id(&lane, key).to_string()
}

#[tokio::test]
async fn each_step_of_an_order_is_told_with_its_request_and_what_it_moved() {
    let stack = Stack::new("life").await;
    let skus = json!([{"sku": "a", "stock": 9}, {"sku": "b", "stock": 9}]);
    stack.define(9, json!({"skus": skus})).await;
    let lines = json!([{"sku": "b", "quantity": 3}, {"sku": "a", "quantity": 1}]);
    let body = json!({"sale_id": stack.sale, "buyer_id": "u-1", "lines": lines});
    let place = stack.post("/v1/orders").header("Idempotency-Key", "k");
    let held = place.header("traceparent", &traceparent(FIRST_TRACE)).json(body).send().await;
    let other = stack.hold("u-2").await;
    let confirm = stack.post(&format!("/v1/orders/{}/confirm", held.id()));
    let confirm = confirm.header("traceparent", &traceparent(SECOND_TRACE));
    let bought = confirm.json(json!({"payment_id": "p"})).send().await;
    assert_eq!(bought.status, 200, "{bought:?}");
    stack.record().await;

    let expected = json!([
        {
            "event": "held", "seq": 2, "at": held.body["created_at"], "cause": "caller",
            "trace_id": FIRST_TRACE, "lines": lines,
        },
        {
            "event": "confirmed", "seq": 4, "at": bought.body["confirmed_at"], "cause": "caller",
            "trace_id": SECOND_TRACE, "lines": lines,
        },
    ]);
    assert_eq!(history(&stack, held.id()).await.body, json!({"steps": expected}));
    assert_eq!(steps(&stack, &other).await.len(), 1, "the other order's own only");
}

#[tokio::test]
async fn a_cancel_that_finds_nothing_held_moves_nothing() {
    let stack = Stack::new("moves_nothing").await;
    stack.define(9, json!({"hold_seconds": 1})).await;
    let by_key = json!({"sale_id": stack.sale, "buyer_id": "b", "idempotency_key": "late"});
    let tombstone = stack.post("/v1/orders/cancel").json(by_key).send().await;
    let expired = stack.hold("c").await;
    until("the hold is over", async || {
        stack.lanes.expire(&stack.lane(), 10).await.unwrap();
        stack.counters().await[2] == 0
    })
    .await;
    assert_eq!(stack.cancel(&expired).await.status, 200);
    let cancelled = stack.hold("d").await;
    assert_eq!(stack.cancel(&cancelled).await.status, 200);
    stack.record().await;

    assert_eq!(told(&steps(&stack, tombstone.id()).await), [json!(["cancelled", "caller", []])]);
    let line = json!([{"sku": "a", "quantity": 1}]);
    let of_expired = steps(&stack, &expired).await;
    assert_eq!(
        told(&of_expired),
        [
            json!(["held", "caller", line]),
            json!(["expired", "sweeper", line]),
            json!(["cancelled", "caller", []]),
        ]
    );
    assert_eq!(of_expired[1]["trace_id"], Value::Null, "no request made it expire");
    let of_cancelled = steps(&stack, &cancelled).await;
    assert_eq!(told(&of_cancelled)[1], json!(["cancelled", "caller", line]));
}

#[tokio::test]
async fn an_order_that_nobody_placed_has_no_history() {
    let stack = Stack::new("no_history").await;
    stack.define(9, json!({})).await;
    let secret = stack.catalog.newest_secret().await.unwrap().unwrap();
    let genuine = id_of_nobody(&stack, &secret);
    history(&stack, &genuine).await.is(404, "order-not-found");
    stack.ledger.close().await;
    let made_up = id_of_nobody(&stack, &IdSecret::new(1, &[7; 32]));
    for id in ["x", &made_up] {
        history(&stack, id).await.is(404, "order-not-found");
    }
    history(&stack, &genuine).await.is(503, "unavailable");
}

#[tokio::test]
async fn the_history_of_an_order_placed_just_now_waits_for_its_first_step() {
    let stack = Stack::with("waits", |config| config.http.durability_timeout_ms = 50).await;
    stack.define(9, json!({})).await;
    let id = stack.hold("b").await;
    history(&stack, &id).await.is(503, "unavailable");
    stack.record().await;
    assert_eq!(steps(&stack, &id).await.len(), 1);
    stack.confirm(&id, "p").await;
    assert_eq!(steps(&stack, &id).await.len(), 1, "as far as it is recorded");
    stack.record().await;
    assert_eq!(steps(&stack, &id).await.len(), 2);

    let patient = Stack::with("patient", |config| config.http.durability_timeout_ms = 20_000).await;
    patient.define(9, json!({})).await;
    let id = patient.hold("b").await;
    let steps = patient.recording(steps(&patient, &id)).await;
    assert_eq!(told(&steps), [json!(["held", "caller", [{"sku": "a", "quantity": 1}]])]);
}

#[tokio::test]
async fn the_history_of_an_archived_sale_stays() {
    let stack = Stack::new("archived_history").await;
    stack.define(9, json!({"retention_days": 0})).await;
    let id = stack.hold("b").await;
    stack.confirm(&id, "p").await;
    stack.record().await;
    let before = steps(&stack, &id).await;
    stack.archive().await;
    assert_eq!(steps(&stack, &id).await, before);
    assert_eq!(before.len(), 2);
    let secret = stack.catalog.newest_secret().await.unwrap().unwrap();
    let genuine = id_of_nobody(&stack, &secret);
    until("it is known that the sale is archived", async || {
        history(&stack, &genuine).await.status == 404
    })
    .await;
}
