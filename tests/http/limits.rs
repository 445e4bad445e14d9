//! Rate limits, and the bound on requests in flight.

use futures_util::future::join_all;
use reqwest::Method;
use serde_json::json;

use crate::stack::{Reply, Stack};

fn check_limited(reply: &Reply) {
    reply.is(429, "rate-limited");
    let wait_ms = reply.body["retry_after_ms"].as_u64().unwrap();
    let seconds: u64 = reply.header("retry-after").parse().unwrap();
    assert!(wait_ms > 0);
    assert_eq!(seconds, wait_ms.div_ceil(1_000), "the same in whole seconds, rounded up");
}

#[tokio::test]
async fn a_buyer_is_limited_after_the_fields_and_before_the_sale() {
    let stack = Stack::with("buyer", |config| {
        config.admission.buyer_per_second = 1;
        config.admission.buyer_burst = 2;
    })
    .await;
    for _ in 0..2 {
        let reply = stack.place("b", "k", 1).await;
        reply.is(404, "sale-not-found");
    }
    let limited = stack.place("b", "k", 1).await;
    check_limited(&limited);
    assert!(limited.header("ratelimit").contains("\"buyer\";r=0;t="), "{limited:?}");
    stack.place("other", "k", 1).await.is(404, "sale-not-found");
    let invalid = stack.place_with("k", json!({"buyer_id": "b"})).await;
    invalid.is(400, "invalid-request");
}

#[tokio::test]
async fn a_key_is_limited_before_the_body_and_after_the_scope() {
    let stack = Stack::with("key", |config| {
        config.admission.key_per_second = 1;
        config.admission.key_burst = 1;
    })
    .await;
    let post = |key: &str| stack.call(Method::POST, "/v1/orders", key).body("text/plain", "x");
    post(&stack.orders_key).send().await.is(415, "unsupported-media-type");
    check_limited(&post(&stack.orders_key).send().await);
    post("made-up").send().await.is(401, "unauthenticated");
    let stock = format!("/v1/sales/{}/stock", stack.sale);
    stack.call(Method::GET, &stock, &stack.orders_key).send().await.is(403, "forbidden");
    post(&stack.operator_key).send().await.is(415, "unsupported-media-type");
}

#[tokio::test]
async fn an_address_is_limited_even_without_a_key_but_not_its_probes() {
    let stack = Stack::with("address", |config| {
        config.admission.address_per_second = 1;
        config.admission.address_burst = 2;
    })
    .await;
    for _ in 0..2 {
        assert_eq!(stack.call(Method::GET, "/v1/sales", "").send().await.status, 200);
    }
    check_limited(&stack.call(Method::GET, "/v1/sales", "").send().await);
    let orders = stack.call(Method::GET, "/v1/orders", &stack.orders_key).send().await;
    check_limited(&orders);
    assert!(orders.header("ratelimit").contains("\"address\";r=0"), "{orders:?}");
    stack.call(Method::GET, "/v1/orders", "").send().await.is(401, "unauthenticated");
    stack.call(Method::GET, "/v1/nothing", "").send().await.is(404, "not-found");
    assert_eq!(stack.call(Method::GET, "/livez", "").send().await.status, 200);
    assert_eq!(stack.call(Method::GET, "/readyz", "").send().await.status, 200);
}

#[tokio::test]
async fn only_a_trusted_proxy_is_believed() {
    let limited = |config: &mut holdfast::config::Config| {
        config.admission.address_per_second = 1;
        config.admission.address_burst = 1;
    };
    let from = |stack: &Stack, client: &str| {
        stack.call(Method::GET, "/v1/sales", "").header("X-Forwarded-For", client)
    };
    let stack = Stack::with("stranger", limited).await;
    assert_eq!(from(&stack, "198.51.100.1").send().await.status, 200);
    check_limited(&from(&stack, "198.51.100.2").send().await);

    let stack = Stack::with("proxy", |config| {
        limited(config);
        config.admission.trusted_proxies = vec!["127.0.0.0/8".parse().unwrap()];
    })
    .await;
    assert_eq!(from(&stack, "198.51.100.1").send().await.status, 200);
    assert_eq!(from(&stack, "198.51.100.2").send().await.status, 200);
    check_limited(&from(&stack, "203.0.113.9, 198.51.100.2").send().await);
}

#[tokio::test]
async fn answers_about_orders_tell_their_limits() {
    let stack = Stack::new("headers").await;
    stack.define(5, json!({})).await;
    let placed = stack.place("b", "k", 1).await;
    assert_eq!(
        placed.header("ratelimit-policy"),
        "\"address\";q=200000;w=1, \"key\";q=200000;w=1, \"buyer\";q=200;w=4"
    );
    let limits = placed.header("ratelimit");
    for name in ["\"address\";r=", "\"key\";r=", "\"buyer\";r=199;t=1"] {
        assert!(limits.contains(name), "{limits}");
    }
    for reply in [
        stack.call(Method::GET, "/v1/orders", "").send().await,
        stack.call(Method::GET, "/v1/orders", &stack.orders_key).send().await,
        stack.call(Method::GET, "/v1/orders/x/history", "").send().await,
    ] {
        assert!(!reply.header("ratelimit").is_empty(), "{reply:?}");
        assert!(!reply.header("ratelimit-policy").is_empty(), "{reply:?}");
    }
    let sale = stack.get("/v1/sales").send().await;
    assert_eq!(sale.header("ratelimit"), "");
}

#[tokio::test]
async fn one_request_too_many_is_overloaded_after_the_fields() {
    let stack = Stack::with("load", |config| {
        config.admission.in_flight_max = 1;
        config.http.durability_timeout_ms = 1_500;
    })
    .await;
    stack.define(5, json!({})).await;
    let path = format!("/v1/sales/{}/stock/a/adjustments", stack.sale);
    // Nobody records it, so it waits, and is the one that is in flight.
    let adjust = stack.post(&path).header("Idempotency-Key", "k");
    let waiting = adjust.json(json!({"delta": 1, "reason": "other"})).send();
    let meanwhile = async {
        crate::stack::until("it is in flight", async || {
            stack.get("/v1/orders").send().await.code() == "overloaded"
        })
        .await;
        stack.place("b", "k", 1).await.is(503, "overloaded");
        stack.get("/v1/sales").send().await.is(503, "overloaded");
        stack.place_with("k", json!({})).await.is(400, "invalid-request");
        assert_eq!(stack.get("/livez").send().await.status, 200);
        assert_eq!(stack.get("/readyz").send().await.status, 200);
    };
    let (waited, ()) = tokio::join!(waiting, meanwhile);
    waited.is(503, "outcome-unknown");
    assert_eq!(stack.counters().await[0], 6, "and there is a place again");
}

#[tokio::test]
async fn a_full_lane_is_overloaded() {
    let stack = Stack::with("queue", |config| config.lanes.queue_max = 1).await;
    stack.define(500, json!({})).await;
    let buyers: Vec<_> = (0..200).map(|n| format!("b{n}")).collect();
    let replies = join_all(buyers.iter().map(|buyer| stack.place(buyer, "k", 1))).await;
    let sold = replies.iter().filter(|reply| reply.status == 201).count();
    for reply in replies.iter().filter(|reply| reply.status != 201) {
        reply.is(503, "overloaded");
    }
    assert!(sold > 0 && sold < 200, "{sold}");
    assert_eq!(stack.counters().await[2], sold as i64, "overloaded means nothing was done");
}
