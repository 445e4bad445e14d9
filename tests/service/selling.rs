//! What a shop relies on.

use futures_util::future::join_all;
use futures_util::stream::{self, StreamExt};
use reqwest::{Method, StatusCode};
use serde_json::json;

use crate::support::{Deployment, Servers, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn an_order_is_held_paid_and_recorded() {
    let deployment = Deployment::new(Servers::shared()).await;
    let service = deployment.serve().await;
    let sale = service.define(10, json!({})).await;
    let order = service.order(&sale, "u-1", "k-1", 2).await;
    assert_eq!(order.status, StatusCode::CREATED);
    assert_eq!(order.body["status"], "held");
    assert_eq!(service.stock(&sale).await, [10, 8, 2, 0]);

    let path = format!("/v1/orders/{}/confirm", order.id());
    let confirmed = service.post(&path, json!({"payment_id": "pay-1"})).await;
    assert_eq!(confirmed.status, StatusCode::OK, "{}", confirmed.body);
    assert_eq!(confirmed.body["status"], "confirmed");
    let recorded = service.balanced_books(&sale).await;
    assert_eq!(recorded, [(order.id().to_owned(), "confirmed".to_owned())]);

    let path = format!("/v1/orders/{}", order.id());
    eventually("the lane is told that the database has it", async || {
        service.get(&path).await.body["durability"] == "recorded"
    })
    .await;
    let list = service.get(&format!("/v1/orders?sale_id={sale}")).await;
    assert_eq!(list.body["orders"][0]["id"], order.id());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hold_that_is_not_paid_in_time_goes_back_on_sale() {
    let deployment = Deployment::new(Servers::shared()).await;
    let service = deployment.serve().await;
    let sale = service.define(1, json!({})).await;
    let lines = json!([{"sku": "sku", "quantity": 1}]);
    let short = json!({"sale_id": sale, "buyer_id": "u-1", "hold_seconds": 1, "lines": lines});
    let key = &service.deployment.orders_key;
    let order = service.try_send(Method::POST, "/v1/orders", key, Some("k-1"), Some(&short)).await;
    let order = order.expect("an answer");
    assert_eq!(service.order(&sale, "u-2", "k-2", 1).await.code(), "sold-out");
    eventually("the stock is back", async || service.stock(&sale).await == [1, 1, 0, 0]).await;

    let path = format!("/v1/orders/{}/confirm", order.id());
    assert_eq!(service.order(&sale, "u-2", "k-2", 1).await.status, StatusCode::CREATED);
    let late = service.post(&path, json!({"payment_id": "pay-1"})).await;
    assert_eq!((late.status, late.code()), (StatusCode::CONFLICT, "payment-too-late"));
    eventually("the refund is on the list", async || {
        let list = service.get(&format!("/v1/refunds?sale_id={sale}&status=due")).await;
        list.body["refunds"][0]["id"] == late.body["refund_id"]
    })
    .await;
    service.balanced_books(&sale).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_thousand_buyers_on_a_hundred_units_buy_exactly_a_hundred() {
    let deployment = Deployment::new(Servers::shared()).await;
    let service = deployment.serve().await;
    let sale = service.define(100, json!({"per_buyer_limit": 1})).await;
    let buyers = stream::iter(0..2_000).map(|n| {
        let (service, sale) = (&service, &sale);
        async move { service.order(sale, &format!("u-{n}"), "k", 1).await }
    });
    let answers: Vec<_> = buyers.buffer_unordered(200).collect().await;
    let held = answers.iter().filter(|a| a.status == StatusCode::CREATED).count();
    let sold_out = answers.iter().filter(|a| a.code() == "sold-out").count();
    assert_eq!((held, sold_out), (100, 1_900));
    assert_eq!(service.balanced_books(&sale).await.len(), 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_key_fifty_times_at_once_is_one_order() {
    let deployment = Deployment::new(Servers::shared()).await;
    let (one, two) = (deployment.serve().await, deployment.serve().await);
    let sale = one.define(100, json!({})).await;
    let answers = join_all((0..50).map(|n| {
        let service = if n % 2 == 0 { &one } else { &two };
        service.order(&sale, "u-1", "the-key", 1)
    }))
    .await;
    let first = answers[0].id();
    assert!(answers.iter().all(|a| a.status == StatusCode::CREATED && a.id() == first));
    let replayed = answers.iter().filter(|a| a.headers.contains_key("idempotent-replayed")).count();
    assert_eq!(replayed, 49);
    assert_eq!(one.balanced_books(&sale).await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adjustment_is_answered_when_it_is_recorded() {
    let deployment = Deployment::new(Servers::shared()).await;
    let service = deployment.serve().await;
    let sale = service.define(10, json!({})).await;
    let adjusted = service.adjust(&sale, "a-1", 5).await;
    assert_eq!(adjusted.status, StatusCode::CREATED, "{}", adjusted.body);
    assert_eq!(adjusted.body["after"]["total"], 15);
    assert_eq!(adjusted.body["actor"], "ops");
    let audit = service.get(&format!("/v1/sales/{sale}/adjustments")).await;
    assert_eq!(audit.body["adjustments"][0]["id"], adjusted.id());

    let again = service.adjust(&sale, "a-1", 5).await;
    assert_eq!(again.status, StatusCode::OK);
    assert_eq!(again.headers["idempotent-replayed"], "true");
    assert_eq!(service.adjust(&sale, "a-1", 6).await.code(), "idempotency-key-reused");
    let below_zero = service.adjust(&sale, "a-2", -16).await;
    assert_eq!(below_zero.status, StatusCode::BAD_REQUEST);
    assert_eq!(service.stock(&sale).await, [15, 15, 0, 0]);
    service.balanced_books(&sale).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archived_sale_is_read_from_the_database() {
    let deployment = Deployment::new(Servers::shared()).await;
    let service = deployment.serve().await;
    let sale = service.define(10, json!({"retention_days": 0})).await;
    let order = service.order(&sale, "u-1", "k-1", 1).await;
    let path = format!("/v1/orders/{}", order.id());
    let confirm = format!("{path}/confirm");
    service.post(&confirm, json!({"payment_id": "pay-1"})).await;
    let close = format!("/v1/sales/{sale}/close");
    assert_eq!(service.operate(Method::POST, &close, json!(null)).await.status, StatusCode::OK);
    let view = format!("/v1/sales/{sale}");
    let archived = async || service.get(&view).await.body["state"] == "archived";
    eventually("the sale is archived", archived).await;

    let redis = redis::Client::open(deployment.servers.redis.as_str()).expect("a Redis URL");
    let mut redis = redis.get_multiplexed_async_connection().await.expect("Redis");
    eventually("the lane has left Redis", async || {
        let keys: Vec<String> = redis::cmd("KEYS")
            .arg(format!("hf1:{{{sale}/*"))
            .query_async(&mut redis)
            .await
            .expect("keys");
        keys.is_empty()
    })
    .await;
    assert_eq!(service.get(&path).await.body["status"], "confirmed");
    assert_eq!(service.order(&sale, "u-2", "k-2", 1).await.code(), "sale-archived");
    let same = service.post(&confirm, json!({"payment_id": "pay-1"})).await;
    assert_eq!(same.status, StatusCode::OK, "{}", same.body);
    let other = service.post(&confirm, json!({"payment_id": "pay-2"})).await;
    assert_eq!(other.code(), "already-paid");
}
