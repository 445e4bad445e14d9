//! The listener: time-outs, both versions of HTTP, heads that are too large, the end in order.

use std::time::{Duration, Instant};

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::stack::{Stack, until};

async fn connect(stack: &Stack) -> TcpStream {
    TcpStream::connect(stack.url.strip_prefix("http://").unwrap()).await.unwrap()
}

/// All that the service says until it hangs up.
async fn rest(connection: &mut TcpStream) -> String {
    let mut text = Vec::new();
    let read = connection.read_to_end(&mut text);
    let read = tokio::time::timeout(Duration::from_secs(10), read).await;
    // A reset is a hang-up as well.
    read.expect("it hangs up").ok();
    String::from_utf8_lossy(&text).into_owned()
}

#[tokio::test]
async fn a_head_that_does_not_come_is_not_waited_for() {
    let stack = Stack::with("head", |config| config.http.header_timeout_ms = 200).await;
    for begun in ["", "P", "PRI * HTTP/2.0\r\n", "GET /livez HTTP/1.1\r\nHost: x\r\n"] {
        let began = Instant::now();
        let mut connection = connect(&stack).await;
        connection.write_all(begun.as_bytes()).await.unwrap();
        rest(&mut connection).await;
        assert!(began.elapsed() < Duration::from_secs(2), "{begun:?}: {:?}", began.elapsed());
    }
}

const LIVEZ: &str = "GET /livez HTTP/1.1\r\nHost: x\r\n\r\n";

/// Asks whether the service lives, and reads the answer.
async fn ask(connection: &mut TcpStream) {
    connection.write_all(LIVEZ.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(br#"{"status":"live"}"#) {
        assert!(connection.read_buf(&mut answer).await.unwrap() > 0, "it hung up");
    }
}

#[tokio::test]
async fn a_connection_may_rest_for_longer_than_a_head_may_take() {
    let stack = Stack::with("rest", |config| config.http.header_timeout_ms = 200).await;
    let mut connection = connect(&stack).await;
    ask(&mut connection).await;
    tokio::time::sleep(Duration::from_millis(500)).await; // the rest itself
    ask(&mut connection).await;
    let (began, (half, _)) = (Instant::now(), LIVEZ.split_at(20));
    connection.write_all(half.as_bytes()).await.unwrap();
    rest(&mut connection).await;
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_connection_does_not_rest_for_ever() {
    let stack = Stack::with("idle", |config| config.http.idle_timeout_ms = 200).await;
    let mut connection = connect(&stack).await;
    ask(&mut connection).await;
    let began = Instant::now();
    rest(&mut connection).await;
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_body_that_does_not_come_is_408_and_nothing_was_done() {
    let stack = Stack::with("body", |config| config.http.body_timeout_ms = 200).await;
    stack.define(1, json!({})).await;
    let mut connection = connect(&stack).await;
    let head = format!(
        "POST /v1/orders HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nIdempotency-Key: k\r\n\
         Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{{\"sale_id\"",
        stack.orders_key
    );
    connection.write_all(head.as_bytes()).await.unwrap();
    let answer = rest(&mut connection).await;
    assert!(
        answer.starts_with("HTTP/1.1 408 ") && answer.contains("\"request-timeout\""),
        "{answer}"
    );
    assert_eq!(stack.counters().await, [1, 1, 0, 0]);
}

#[tokio::test]
async fn a_body_that_does_not_say_its_size_is_counted() {
    let stack = Stack::new("chunked").await;
    let mut connection = connect(&stack).await;
    let head = format!(
        "POST /v1/orders HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {}\r\n\
         Content-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n4001\r\n{}\r\n0\r\n\r\n",
        stack.orders_key,
        "x".repeat(0x4001)
    );
    connection.write_all(head.as_bytes()).await.unwrap();
    let answer = rest(&mut connection).await;
    assert!(
        answer.starts_with("HTTP/1.1 413 ") && answer.contains("\"body-too-large\""),
        "{answer}"
    );
}

#[tokio::test]
async fn a_request_that_is_cut_off_does_nothing() {
    let stack = Stack::new("cut").await;
    stack.define(1, json!({})).await;
    let body =
        json!({"sale_id": stack.sale, "buyer_id": "b", "lines": [{"sku": "a", "quantity": 1}]})
            .to_string();
    let mut connection = connect(&stack).await;
    let head = format!(
        "POST /v1/orders HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nIdempotency-Key: k\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        stack.orders_key,
        body.len() + 1
    );
    connection.write_all(head.as_bytes()).await.unwrap();
    connection.shutdown().await.unwrap();
    rest(&mut connection).await;
    assert_eq!(stack.counters().await, [1, 1, 0, 0]);
}

#[tokio::test]
async fn what_the_parser_refuses_has_no_body() {
    let stack = Stack::new("parser").await;
    let huge_header =
        format!("GET /livez HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n", "x".repeat(100_000));
    let huge_path = format!("GET /{} HTTP/1.1\r\nHost: x\r\n\r\n", "x".repeat(70_000));
    let many = format!("GET /livez HTTP/1.1\r\nHost: x\r\n{}\r\n", "A: b\r\n".repeat(200));
    for (request, statuses) in [
        (huge_header.as_str(), ["431", "400"]),
        (&huge_path, ["414", "431"]),
        (&many, ["431", "400"]),
        ("GET /livez HTTP/1.1\r\nHost: x\r\nA : b\r\n\r\n", ["400", "400"]),
        (
            "GET /livez HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\nx",
            ["400", "200"],
        ),
        ("nonsense\r\n\r\n", ["400", "400"]),
    ] {
        let mut connection = connect(&stack).await;
        connection.write_all(request.as_bytes()).await.ok();
        connection.shutdown().await.ok();
        let answer = rest(&mut connection).await;
        let status = answer.split(' ').nth(1).unwrap_or("");
        let start: String = request.chars().take(60).collect();
        assert!(statuses.contains(&status), "{start}: {answer}");
    }
}

#[tokio::test]
async fn a_path_is_what_it_says_and_leads_nowhere_else() {
    let stack = Stack::new("traversal").await;
    for (path, code) in [
        ("/v1/orders/../sales", "not-found"),
        ("/v1/orders/..", "order-not-found"),
        ("/v1/orders/%2e%2e%2fsales", "order-not-found"),
        ("/v1/orders/x%0d%0aSet-Cookie:%20a", "order-not-found"),
        ("http://elsewhere/v1/orders/x", "order-not-found"),
    ] {
        let mut connection = connect(&stack).await;
        let head = format!(
            "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {}\r\n\r\n",
            stack.orders_key
        );
        connection.write_all(head.as_bytes()).await.unwrap();
        let answer = rest(&mut connection).await;
        let expected = format!("\"code\":\"{code}\"");
        assert!(
            answer.starts_with("HTTP/1.1 404 ") && answer.contains(&expected),
            "{path}: {answer}"
        );
        assert!(!answer.contains("Set-Cookie"), "{answer}");
    }
}

#[tokio::test]
async fn http_2_is_spoken_by_prior_knowledge() {
    let stack = Stack::new("h2c").await;
    let client = reqwest::Client::builder().http2_prior_knowledge().build().unwrap();
    let reply = client.get(format!("{}/v1/x", stack.url)).send().await.unwrap();
    assert_eq!((reply.version(), reply.status().as_u16()), (reqwest::Version::HTTP_2, 404));
    assert!(reply.text().await.unwrap().contains("not-found"));
}

#[tokio::test]
async fn what_is_in_flight_is_answered_before_the_end() {
    let stack = Stack::with("drain", |config| config.http.durability_timeout_ms = 5_000).await;
    stack.define(5, json!({})).await;
    let path = format!("/v1/sales/{}/stock/a/adjustments", stack.sale);
    let adjust = stack.post(&path).header("Idempotency-Key", "k");
    let waiting = adjust.json(json!({"delta": 1, "reason": "other"})).send();
    let mut silent = connect(&stack).await;
    let ending = async {
        let lane = stack.lane();
        crate::stack::until("it has happened", async || {
            stack.lanes.marks(&lane).await.unwrap().seq == 2
        })
        .await;
        stack.shut_down();
        crate::stack::until("nobody is accepted", async || {
            TcpStream::connect(stack.url.strip_prefix("http://").unwrap()).await.is_err()
        })
        .await;
        rest(&mut silent).await;
        stack.record().await;
    };
    let (answered, ()) = tokio::join!(waiting, ending);
    assert_eq!(answered.status, 201, "{answered:?}");
}

/// The value of a gauge or counter, as the inner listener tells it.
async fn metric(stack: &Stack, name: &str) -> i64 {
    let answer = reqwest::get(format!("{}/metrics", stack.inner_url)).await.unwrap();
    let text = answer.text().await.unwrap();
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.unwrap_or_else(|| panic!("no {name}")).parse().unwrap()
}

#[tokio::test]
async fn one_connection_too_many_is_closed_at_once_and_its_place_is_free_again() {
    let stack = Stack::with("places", |config| config.http.connections_max = 2).await;
    let first = connect(&stack).await;
    let _second = connect(&stack).await;
    until("both have a place", async || metric(&stack, "holdfast_http_connections").await == 2)
        .await;
    assert_eq!(rest(&mut connect(&stack).await).await, "");
    assert_eq!(metric(&stack, "holdfast_http_connections_refused_total").await, 1);
    drop(first);
    until("a place is free", async || metric(&stack, "holdfast_http_connections").await == 1).await;
    let mut third = connect(&stack).await;
    third.write_all(b"GET /livez HTTP/1.0\r\n\r\n").await.unwrap();
    assert!(rest(&mut third).await.starts_with("HTTP/1.0 200"));
}

#[tokio::test]
async fn a_client_that_does_not_read_is_cut_off() {
    let stack = Stack::with("unread", |config| config.http.write_timeout_ms = 3_000).await;
    let mut connection = connect(&stack).await;
    let asked = "GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n".repeat(500);
    connection.write_all(asked.as_bytes()).await.unwrap();
    until("it is connected", async || metric(&stack, "holdfast_http_connections").await == 1).await;
    until("it is cut off", async || metric(&stack, "holdfast_http_connections").await == 0).await;
}
