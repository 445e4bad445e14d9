//! From held to paid, and what must be given back.

use std::time::{SystemTime, UNIX_EPOCH};

use reqwest::Method;
use serde_json::{Value, json};
use standardwebhooks::Webhook;

use crate::conservation::database;
use crate::stack::{Reply, Stack, until};

pub const SECRETS: [&str; 2] =
    ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"];

async fn post(stack: &Stack, path: &str, body: Value) -> Reply {
    stack.call(Method::POST, path, &stack.orders_key).json(body).send().await
}

async fn begin(stack: &Stack, id: &str, payment: &str) -> Reply {
    post(stack, &format!("/v1/orders/{id}/begin-payment"), json!({"payment_id": payment})).await
}

async fn take_back(stack: &Stack, id: &str, key: &str, body: Value) -> Reply {
    let call = stack.call(Method::POST, &format!("/v1/orders/{id}/return"), &stack.orders_key);
    call.header("Idempotency-Key", key).json(body).send().await
}

/// A hold of one `a` that has run out and was swept.
async fn expired(stack: &Stack, buyer: &str) -> String {
    let lines = json!([{"sku": "a", "quantity": 1}]);
    let body = json!({"sale_id": stack.sale, "buyer_id": buyer, "hold_seconds": 1, "lines": lines});
    let id = stack.place_with("short", body).await.id().to_owned();
    let path = format!("/v1/orders/{id}");
    until("it has run out", async || {
        stack.lanes.expire(&stack.lane(), 10).await.unwrap();
        stack.get(&path).send().await.body["status"] == "expired"
    })
    .await;
    stack.lanes.expire(&stack.lane(), 10).await.unwrap();
    id
}

#[tokio::test]
async fn a_payment_runs_and_buys() {
    let stack = Stack::new("pays").await;
    stack.define(5, json!({"hold_seconds": 10, "payment_grace_seconds": 60})).await;
    let held = stack.place("b", "k", 1).await;
    let paying = begin(&stack, held.id(), "p-1").await;
    assert_eq!((paying.status.as_u16(), &paying.body["status"]), (200, &json!("paying")));
    assert_eq!(paying.body["payment_id"], "p-1");
    assert!(paying.body["expires_at"].as_str() > held.body["expires_at"].as_str());
    let again = begin(&stack, held.id(), "p-1").await;
    assert_eq!(again.body["expires_at"], paying.body["expires_at"]);
    let replay = stack.place("b", "k", 1).await;
    assert_eq!((replay.status.as_u16(), &replay.body["status"]), (201, &json!("paying")));
    assert_eq!(stack.counters().await, [5, 4, 1, 0]);
    let bought = stack.confirm(held.id(), "p-1").await;
    assert_eq!(
        (&bought.body["status"], &bought.body["reacquired"]),
        (&json!("confirmed"), &json!(false))
    );
    begin(&stack, held.id(), "p-2").await.is(409, "order-confirmed");
    let cancelled = stack.hold("c").await;
    stack.cancel(&cancelled).await;
    begin(&stack, &cancelled, "p").await.is(409, "order-cancelled");
    let over = expired(&stack, "d").await;
    let refused = begin(&stack, &over, "p").await;
    refused.is(409, "order-expired");
    assert_eq!(refused.body["order"]["payment_id"], Value::Null);
    begin(&stack, "ord_made-up", "p").await.is(404, "order-not-found");
}

#[tokio::test]
async fn a_part_is_bought_and_the_rest_released() {
    let stack = Stack::new("parts").await;
    stack.define(5, json!({})).await;
    let order = stack.place("b", "k", 3).await;
    let path = format!("/v1/orders/{}/confirm", order.id());
    let confirm = |lines: Value| post(&stack, &path, json!({"payment_id": "p", "lines": lines}));
    for (lines, pointer) in [
        (json!([]), "/lines"),
        (json!([{"sku": "a", "quantity": 4}]), "/lines"),
        (json!([{"sku": "b", "quantity": 1}]), "/lines"),
        (json!([{"sku": "a", "quantity": 1}, {"sku": "a", "quantity": 1}]), "/lines/1/sku"),
    ] {
        let refused = confirm(lines).await;
        refused.is(400, "invalid-request");
        assert_eq!(refused.pointers(), [pointer]);
    }
    let bought = confirm(json!([{"sku": "a", "quantity": 2}])).await;
    assert_eq!(bought.body["lines"], json!([{"sku": "a", "quantity": 2}]));
    assert_eq!(stack.counters().await, [5, 3, 0, 2]);
    assert_eq!(stack.place("b", "k", 3).await.status, 200, "the key means what was asked for");
    stack.record().await;
    let steps = stack.get(&format!("/v1/orders/{}/history", order.id())).send().await;
    assert_eq!(steps.body["steps"][1]["lines"], json!([{"sku": "a", "quantity": 2}]));
}

#[tokio::test]
async fn a_late_payment_takes_the_stock_again_or_is_given_back() {
    let stack = Stack::new("late").await;
    stack.define(1, json!({})).await;
    let first = expired(&stack, "b").await;
    let bought = stack.confirm(&first, "p").await;
    assert_eq!((bought.status.as_u16(), &bought.body["reacquired"]), (200, &json!(true)));

    let stack = Stack::new("too_late").await;
    stack.define(1, json!({})).await;
    let late = expired(&stack, "b").await;
    let other = stack.hold("c").await;
    let refused = stack.confirm(&late, "p").await;
    refused.is(409, "payment-too-late");
    assert_eq!(refused.body["order"]["status"], "expired");
    stack.cancel(&other).await;
    let again = stack.confirm(&late, "p").await;
    again.is(409, "payment-too-late");
    assert_eq!(again.body["refund_id"], refused.body["refund_id"], "for ever");
    let twice = stack.confirm(&late, "q").await;
    assert_eq!(twice.status, 200, "another payment finds the stock");
    stack.confirm(&late, "r").await.is(409, "already-paid");
    stack.record().await;

    let list = async |query: &str| {
        let path = format!("/v1/refunds?sale_id={}{query}", stack.sale);
        stack.call(Method::GET, &path, &stack.orders_key).send().await.body["refunds"].clone()
    };
    let due = list("&status=due").await;
    assert_eq!((&due[0]["payment_id"], &due[0]["reason"]), (&json!("r"), &json!("already-paid")));
    assert_eq!(due[1]["id"], refused.body["refund_id"]);
    assert_eq!(due[1]["order_id"], late);
    assert_eq!(due.as_array().unwrap().len(), 2);
    let settle =
        async |id: &str| post(&stack, &format!("/v1/refunds/{id}/settle"), json!({})).await;
    let id = due[1]["id"].as_str().unwrap();
    let settled = settle(id).await;
    assert_eq!(settled.body["status"], "settled");
    assert_eq!(settle(id).await.body, settled.body, "again is the same");
    settle("rfd_made-up").await.is(404, "refund-not-found");
    assert_eq!(list("&status=due").await.as_array().unwrap().len(), 1);
    assert_eq!(list("&status=settled").await[0]["id"], id);
    assert_eq!(list("&limit=1").await.as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn what_was_sold_comes_back() {
    let stack = Stack::new("returns").await;
    stack.define(5, json!({"per_buyer_limit": 3})).await;
    let order = stack.place("b", "k", 3).await;
    let restock = json!({"lines": [{"sku": "a", "quantity": 1}], "restock": true});
    take_back(&stack, order.id(), "r", restock.clone()).await.is(409, "order-not-confirmed");
    stack.confirm(order.id(), "p").await;
    let part = take_back(&stack, order.id(), "r", restock.clone()).await;
    assert_eq!(
        (&part.body["status"], &part.body["returned"][0]["quantity"]),
        (&json!("confirmed"), &json!(1))
    );
    let replay = take_back(&stack, order.id(), "r", restock).await;
    assert_eq!(replay.header("idempotent-replayed"), "true");
    take_back(&stack, order.id(), "r", json!({"restock": false}))
        .await
        .is(422, "idempotency-key-reused");
    let more = json!({"lines": [{"sku": "a", "quantity": 3}], "restock": true});
    take_back(&stack, order.id(), "r2", more).await.is(409, "return-exceeds-order");
    assert_eq!(stack.place("b", "k2", 1).await.status, 201, "the buyer's limit is free again");
    let rest = take_back(&stack, order.id(), "r3", json!({"restock": false})).await;
    assert_eq!(rest.body["status"], "returned");
    assert_eq!(stack.counters().await, [3, 2, 1, 0], "two have left the total");
    take_back(&stack, order.id(), "r4", json!({"restock": true})).await.is(409, "order-returned");
    stack.cancel(order.id()).await.is(409, "order-returned");
    assert_eq!(stack.confirm(order.id(), "p").await.status, 200);
    stack.confirm(order.id(), "q").await.is(409, "already-paid");
    let path = format!("/v1/orders/{}/return", order.id());
    post(&stack, &path, json!({"restock": true})).await.is(400, "idempotency-key-required");
    stack.record().await;
    let recorded =
        stack.get(&format!("/v1/orders?sale_id={}&status=returned", stack.sale)).send().await;
    assert_eq!(recorded.body["orders"][0]["returned"], json!([{"sku": "a", "quantity": 3}]));
}

#[tokio::test]
async fn an_archived_sales_payments_are_given_back() {
    let stack = Stack::new("archived_pay").await;
    stack.define(5, json!({"retention_days": 0})).await;
    let (bought, cancelled) = (stack.hold("a").await, stack.hold("b").await);
    stack.confirm(&bought, "p").await;
    stack.cancel(&cancelled).await;
    stack.archive().await;
    // An instance may take a moment to learn that a lane which is gone was archived.
    until("it is known", async || stack.confirm(&cancelled, "p").await.code() != "lane-frozen")
        .await;
    let refused = stack.confirm(&cancelled, "p").await;
    refused.is(409, "order-cancelled");
    let refund = |reply: &Reply| reply.body["refund_id"].as_str().unwrap().to_owned();
    assert_eq!(refund(&stack.confirm(&cancelled, "p").await), refund(&refused));
    stack.confirm(&bought, "q").await.is(409, "already-paid");
    assert_eq!(stack.confirm(&bought, "p").await.status, 200);
    begin(&stack, &bought, "p").await.is(409, "order-confirmed");
    take_back(&stack, &bought, "r", json!({"restock": true})).await.is(409, "sale-archived");
    let list = stack.get(&format!("/v1/refunds?sale_id={}", stack.sale)).send().await;
    assert_eq!(list.body["refunds"].as_array().unwrap().len(), 2);
}

pub fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64
}

/// Delivers what a provider with this secret says.
pub async fn deliver(stack: &Stack, secret: &str, at: i64, body: &str) -> Reply {
    let signature = Webhook::new(secret).unwrap().sign("msg_1", at, body.as_bytes()).unwrap();
    let call = stack.call(Method::POST, "/v1/payments/webhook", "");
    let call = call
        .header("webhook-id", "msg_1")
        .header("webhook-timestamp", &at.to_string())
        .header("webhook-signature", &signature);
    call.body("application/json", body.to_owned()).send().await
}

#[tokio::test]
async fn the_provider_says_what_became_of_payments() {
    let stack = Stack::with("webhook", |config| {
        config.payments.webhook_secrets = SECRETS.map(str::to_owned).to_vec();
    })
    .await;
    stack.define(5, json!({})).await;
    let say = async |kind: &str, order: &str, payment: &str| {
        let data = json!({"order_id": order, "payment_id": payment, "amount": 1});
        let body = json!({"type": kind, "timestamp": "2026-01-01T00:00:00Z", "data": data, "x": 1});
        deliver(&stack, SECRETS[1], now(), &body.to_string()).await.status
    };
    let show = async |id: &str| stack.get(&format!("/v1/orders/{id}")).send().await.body;
    let id = stack.hold("b").await;
    begin(&stack, &id, "p").await;
    assert_eq!(say("payment.failed", &id, "another").await, 204);
    assert_eq!(show(&id).await["status"], "paying");
    assert_eq!(say("payment.failed", &id, "p").await, 204);
    assert_eq!(
        (&show(&id).await["status"], &show(&id).await["payment_id"]),
        (&json!("held"), &Value::Null)
    );
    for _ in 0..2 {
        assert_eq!(say("payment.succeeded", &id, "p2").await, 204);
    }
    assert_eq!(
        (&show(&id).await["status"], &show(&id).await["payment_id"]),
        (&json!("confirmed"), &json!("p2"))
    );
    assert_eq!(say("payment.succeeded", &id, "p3").await, 204, "a refund, not an error");
    assert_eq!(say("payment.succeeded", "ord_made-up", "p").await, 204);
    assert_eq!(say("customer.created", &id, "p").await, 204);
    stack.record().await;
    let list = stack.get(&format!("/v1/refunds?sale_id={}", stack.sale)).send().await;
    assert_eq!(list.body["refunds"][0]["payment_id"], "p3");
    let steps = stack.get(&format!("/v1/orders/{id}/history")).send().await.body["steps"].clone();
    let kinds: Vec<_> =
        steps.as_array().unwrap().iter().map(|step| step["event"].clone()).collect();
    assert_eq!(kinds, ["held", "payment_begun", "payment_failed", "confirmed", "refund_due"]);
    assert_eq!(steps[3]["cause"], "webhook");
}

#[tokio::test]
async fn a_delivery_that_is_forged_stale_or_unreadable_changes_nothing() {
    let stack = Stack::with("forged", |config| {
        config.payments.webhook_secrets = vec![SECRETS[0].to_owned()];
    })
    .await;
    stack.define(5, json!({})).await;
    let id = stack.hold("b").await;
    let data = json!({"order_id": id, "payment_id": "p"});
    let body = json!({"type": "payment.succeeded", "data": data}).to_string();
    assert_eq!(deliver(&stack, SECRETS[1], now(), &body).await.status, 401);
    // 300 s are allowed, and the clock runs on while this is delivered.
    for at in [now() - 301, now() + 360, i64::MAX, i64::MIN] {
        assert_eq!(deliver(&stack, SECRETS[0], at, &body).await.status, 401, "{at}");
    }
    let unsigned = stack.call(Method::POST, "/v1/payments/webhook", "");
    unsigned.body("application/json", body.clone()).send().await.is(401, "invalid-signature");
    for unreadable in ["{", "[]", r#"{"type":"payment.succeeded"}"#] {
        assert_eq!(
            deliver(&stack, SECRETS[0], now(), unreadable).await.status,
            400,
            "{unreadable}"
        );
    }
    let shown = stack.get(&format!("/v1/orders/{id}")).send().await;
    assert_eq!(shown.body["status"], "held");
    assert_eq!(deliver(&stack, SECRETS[0], now(), &body).await.status, 204);
}

/// Has whoever settles a refund lose its connection before the answer.
const GO_AWAY: &str = "
    CREATE FUNCTION go_away() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        PERFORM pg_terminate_backend(pg_backend_pid());
        RETURN NEW;
    END $$;
    CREATE TRIGGER go_away BEFORE UPDATE ON refunds FOR EACH ROW EXECUTE FUNCTION go_away()";

#[tokio::test]
async fn a_settlement_whose_connection_was_lost_may_have_happened() {
    let stack = Stack::new("settling").await;
    stack.define(1, json!({})).await;
    let order = stack.hold("b").await;
    stack.cancel(&order).await;
    let refused = stack.confirm(&order, "p").await;
    refused.is(409, "order-cancelled");
    stack.record().await;
    let path = format!("/v1/refunds/{}/settle", refused.body["refund_id"].as_str().unwrap());
    let mut connection = database(&stack).await;
    sqlx::raw_sql(GO_AWAY).execute(&mut connection).await.unwrap();
    post(&stack, &path, json!({})).await.is(503, "outcome-unknown");
    sqlx::raw_sql("DROP TRIGGER go_away ON refunds").execute(&mut connection).await.unwrap();
    let settled = post(&stack, &path, json!({})).await;
    assert_eq!(settled.body["status"], "settled", "{settled:?}");
}
