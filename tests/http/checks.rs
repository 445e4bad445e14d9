//! Errors, and the order in which a request is checked: path and method, key, scope, limits by
//! address and key, size, type, JSON and fields, limit by buyer, load, then what the call says.

use reqwest::Method;
use serde_json::json;

use crate::stack::{Stack, unique};

const TOO_LARGE: usize = 16 * 1024 + 1;

#[tokio::test]
async fn paths_and_methods_come_before_keys() {
    let stack = Stack::new("paths").await;
    for path in [
        "/",
        "/v1",
        "/v1/order",
        "/v1/orders/",
        "/v1/sales/x/events",
        "/v1/sales/x/rebuild",
        "/v1/adjustments/x",
        "/metrics",
        "/v1/orders/x/y/z",
        "/v1//orders",
        "/v1/orders%2Fx",
        "/console",
    ] {
        stack.call(Method::POST, path, "").send().await.is(404, "not-found");
    }
    for (method, path, allow) in [
        (Method::DELETE, "/v1/orders", "POST,GET,HEAD"),
        (Method::OPTIONS, "/v1/orders", "POST,GET,HEAD"),
        (Method::POST, "/v1/orders/x/history", "GET,HEAD"),
        (Method::GET, "/v1/orders/x/confirm", "POST"),
        (Method::GET, "/v1/payments/webhook", "POST"),
        (Method::GET, "/v1/orders/cancel", "POST"),
        (Method::GET, "/v1/adjustments/x/undo", "POST"),
        (Method::POST, "/v1/sales/x", "GET,HEAD,OPTIONS,PUT"),
        (Method::POST, "/livez", "GET,HEAD"),
        (Method::from_bytes(b"BREW").unwrap(), "/v1/sales", "GET,HEAD,OPTIONS"),
    ] {
        let reply = stack.call(method, path, "").send().await;
        reply.is(405, "method-not-allowed");
        let mut allowed: Vec<_> = reply.header("allow").split(',').collect();
        let mut expected: Vec<_> = allow.split(',').collect();
        allowed.sort_unstable();
        expected.sort_unstable();
        assert_eq!(allowed, expected, "{path}");
    }
}

#[tokio::test]
async fn a_key_comes_before_its_scope_and_both_before_the_body() {
    let stack = Stack::new("keys").await;
    let path = format!("/v1/sales/{}", stack.sale);
    let put = |key| stack.call(Method::PUT, &path, key).body("text/plain", "x".repeat(TOO_LARGE));
    for key in ["", "made-up"] {
        let reply = put(key).send().await;
        reply.is(401, "unauthenticated");
        assert!(reply.header("www-authenticate").starts_with("Bearer"), "{reply:?}");
    }
    put(&stack.orders_key).send().await.is(403, "forbidden");
    for path in ["definition", "stock", "adjustments"] {
        let path = format!("/v1/sales/{}/{path}", stack.sale);
        stack.call(Method::GET, &path, &stack.orders_key).send().await.is(403, "forbidden");
        stack.call(Method::GET, &path, "").send().await.is(401, "unauthenticated");
    }
    stack.define(1, json!({})).await;
    let operators = stack.call(Method::POST, "/v1/orders", &stack.operator_key);
    let body =
        json!({"sale_id": stack.sale, "buyer_id": "b", "lines": [{"sku": "a", "quantity": 1}]});
    let reply = operators.header("Idempotency-Key", "k").json(body).send().await;
    assert_eq!(reply.status, 201, "an operator may all that orders may: {reply:?}");
}

#[tokio::test]
async fn a_revoked_key_is_refused_once_the_copy_is_read_anew() {
    let stack = Stack::new("revoked").await;
    stack.ledger.revoke_keys("shop").await.unwrap();
    stack.catalog.refresh().await.unwrap();
    let reply = stack.call(Method::GET, "/v1/orders", &stack.orders_key).send().await;
    reply.is(401, "unauthenticated");
}

#[tokio::test]
async fn size_comes_before_type_and_type_before_json() {
    let stack = Stack::new("sizes").await;
    let post = || stack.call(Method::POST, "/v1/orders", &stack.orders_key);
    let large = "x".repeat(TOO_LARGE);
    post().body("text/plain", large).send().await.is(413, "body-too-large");
    post().body("text/plain", "{").send().await.is(415, "unsupported-media-type");
    post().untyped("{}").send().await.is(415, "unsupported-media-type");
    post().send().await.is(415, "unsupported-media-type");
    let reply = post().body("application/json", "{").send().await;
    reply.is(400, "invalid-request");
    post().body("application/json", "").send().await.is(400, "invalid-request");
    post().body("application/json", vec![b'"', 0xff, b'"']).send().await.is(400, "invalid-request");
    let largest = format!("{{{}}}", " ".repeat(TOO_LARGE - 3));
    post().body("application/json", largest).send().await.is(400, "invalid-request");
}

#[tokio::test]
async fn a_body_that_is_far_too_large_is_answered_too() {
    let stack = Stack::new("huge").await;
    let post = stack.call(Method::POST, "/v1/orders", &stack.orders_key);
    post.body("application/json", "x".repeat(900_000)).send().await.is(413, "body-too-large");
}

#[tokio::test]
async fn a_definition_may_be_larger() {
    let stack = Stack::new("larger").await;
    let put = || stack.put(&format!("/v1/sales/{}", stack.sale));
    put()
        .json(json!({"name": "n", "skus": "x".repeat(200_000)}))
        .send()
        .await
        .is(400, "invalid-request");
    let large = json!({"name": "x".repeat(256 * 1024)});
    put().json(large).send().await.is(413, "body-too-large");
}

#[tokio::test]
async fn every_mistake_is_pointed_at_before_anything_is_asked() {
    let stack = Stack::new("fields").await;
    let good =
        json!({"sale_id": stack.sale, "buyer_id": "b", "lines": [{"sku": "a", "quantity": 1}]});
    let place = async |change: serde_json::Value| {
        let mut body = good.clone();
        crate::stack::merge(&mut body, change);
        stack.place_with("k", body).await
    };
    for (change, pointer) in [
        (json!({"sale_id": "a b"}), "/sale_id"),
        (json!({"buyer_id": ""}), "/buyer_id"),
        (json!({"buyer_id": 42}), "/buyer_id"),
        (json!({"lines": []}), "/lines"),
        (json!({"lines": {"sku": "a"}}), "/lines"),
        (json!({"lines": [["a", 1]]}), "/lines/0"),
        (json!({"lines": [{"sku": "a", "quantity": 1.0}]}), "/lines/0/quantity"),
        (json!({"lines": [{"sku": "a"}]}), "/lines/0/quantity"),
        (json!({"lines": [{"sku": "a", "quantitiy": 1}]}), "/lines/0/quantitiy"),
        (json!({"dry_run": true}), "/dry_run"),
    ] {
        let reply = place(change).await;
        reply.is(400, "invalid-request");
        assert_eq!(reply.pointers(), [pointer], "{reply:?}");
    }
    let twice =
        format!(r#"{{"sale_id":"s","sale_id":"{}","buyer_id":"b","lines":[]}}"#, stack.sale);
    let post = stack.call(Method::POST, "/v1/orders", &stack.orders_key);
    let reply = post.header("Idempotency-Key", "k").body("application/json", twice).send().await;
    assert_eq!(reply.pointers(), ["/sale_id"], "{reply:?}");
    place(json!({})).await.is(404, "sale-not-found");
}

#[tokio::test]
async fn an_idempotency_key_is_there_once_and_valid_and_comes_after_the_body() {
    let stack = Stack::new("idempotency").await;
    let body =
        json!({"sale_id": stack.sale, "buyer_id": "b", "lines": [{"sku": "a", "quantity": 1}]});
    let post = || stack.call(Method::POST, "/v1/orders", &stack.orders_key);
    post().json(json!({})).send().await.is(400, "invalid-request");
    post().json(body.clone()).send().await.is(400, "idempotency-key-required");
    for key in ["", "a b", &"k".repeat(256)] {
        let reply = post().header("Idempotency-Key", key).json(body.clone()).send().await;
        reply.is(400, "idempotency-key-invalid");
    }
    let two = post().header("Idempotency-Key", "k").header("Idempotency-Key", "k");
    two.json(body).send().await.is(400, "idempotency-key-invalid");
}

#[tokio::test]
async fn unknown_parameters_are_refused_but_on_what_is_open_to_all() {
    let stack = Stack::new("parameters").await;
    stack.define(1, json!({})).await;
    let id = stack.hold("b").await;
    for path in [
        "/v1/orders?page=2".to_owned(),
        format!("/v1/orders/{id}?page=2"),
        format!("/v1/orders/{id}/history?page=2"),
        format!("/v1/sales/{}/stock?page=2", stack.sale),
        format!("/v1/sales/{}/definition?page=2", stack.sale),
        format!("/v1/sales/{}/adjustments?page=2", stack.sale),
    ] {
        let reply = stack.get(&path).send().await;
        reply.is(400, "invalid-request");
        assert_eq!(reply.pointers(), ["/page"], "{path}");
    }
    let cancel = stack.post(&format!("/v1/orders/{id}/cancel?page=2")).send().await;
    cancel.is(400, "invalid-request");
    assert_eq!(stack.counters().await, [1, 0, 1, 0], "nothing was cancelled");
    for path in
        ["/v1/sales?page=2", &format!("/v1/sales/{}?page=2", stack.sale), "/livez?x", "/readyz?x"]
    {
        assert_eq!(stack.call(Method::GET, path, "").send().await.status, 200, "{path}");
    }
    stack.call(Method::GET, "/v1/sales?limit=0", "").send().await.is(400, "invalid-request");
}

#[tokio::test]
async fn a_call_without_members_may_come_without_a_body_and_nothing_else_in_it() {
    let stack = Stack::new("bodies").await;
    stack.define(3, json!({})).await;
    let cancel = async |id: String| stack.post(&format!("/v1/orders/{id}/cancel"));
    assert_eq!(cancel(stack.hold("a").await).await.send().await.status, 200);
    let empty = cancel(stack.hold("b").await).await.body("application/json", "");
    assert_eq!(empty.send().await.status, 200);
    let text = cancel(stack.hold("c").await).await.body("text/plain", "{}").send().await;
    text.is(415, "unsupported-media-type");
    let pause = || stack.post(&format!("/v1/sales/{}/pause", stack.sale));
    let reply = pause().json(json!({"why": "x"})).send().await;
    assert_eq!(reply.pointers(), ["/why"], "{reply:?}");
    assert_eq!(pause().json(json!({})).send().await.status, 200);
}

#[tokio::test]
async fn a_trace_is_taken_up_or_begun() {
    let stack = Stack::new("trace").await;
    let given = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let reply = stack.get("/v1/x").header("traceparent", given).send().await;
    assert_eq!(reply.body["trace_id"], "4bf92f3577b34da6a3ce929d0e0e4736");
    let (one, other) = (stack.get("/v1/x").send().await, stack.get("/v1/x").send().await);
    assert_ne!(one.body["trace_id"], other.body["trace_id"]);

    stack.define(1, json!({})).await;
    let body =
        json!({"sale_id": stack.sale, "buyer_id": "b", "lines": [{"sku": "a", "quantity": 1}]});
    let post = stack.post("/v1/orders").header("Idempotency-Key", "k").header("traceparent", given);
    assert_eq!(post.json(body).send().await.status, 201);
    let secret = stack.catalog.newest_secret().await.unwrap().unwrap();
    let from = (stack.lane(), 1, 1);
    let read =
        stack.lanes.read_outboxes(&[from], 10, std::time::Duration::from_secs(1)).await.unwrap();
    let events = holdfast::lanes::outbox::events(&stack.lane(), &secret, &read[0].1[0]).unwrap();
    let traceparent = events[0].traceparent.clone().unwrap();
    assert!(traceparent.starts_with("00-4bf92f3577b34da6a3ce929d0e0e4736-"), "{traceparent}");
}

#[tokio::test]
async fn a_made_up_or_malformed_order_id_is_nobodys() {
    let stack = Stack::new("ids").await;
    stack.define(1, json!({})).await;
    let genuine = stack.hold("b").await;
    let other_sale = genuine.replace(&stack.sale, &unique("other"));
    for id in ["x", "ord_", "%FF", "%00", "a%2Fb", &other_sale, &"o".repeat(4_000)] {
        stack.get(&format!("/v1/orders/{id}")).send().await.is(404, "order-not-found");
        stack.confirm(id, "p").await.is(404, "order-not-found");
        stack.cancel(id).await.is(404, "order-not-found");
    }
    let invalid = stack.post("/v1/orders/x/confirm").json(json!({})).send().await;
    invalid.is(400, "invalid-request");
}

#[tokio::test]
async fn head_is_get_without_the_body() {
    let stack = Stack::new("head").await;
    stack.define(1, json!({})).await;
    let head = |path: &str, key: &str| stack.call(Method::HEAD, path, key);
    let sale = format!("/v1/sales/{}", stack.sale);
    let reply = head(&sale, "").send_raw().await;
    assert_eq!((reply.0, reply.1.is_empty()), (200, true));
    let reply = head("/v1/orders/x", &stack.orders_key).send_raw().await;
    assert_eq!((reply.0, reply.1.is_empty()), (404, true));
}
