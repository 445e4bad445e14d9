//! Orders: hold, replay, refusals, confirm, cancel, deadlines, lists.

use std::collections::BTreeSet;
use std::time::Duration;

use futures_util::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};

use crate::stack::{Reply, Stack, unique, until};

#[tokio::test]
async fn an_order_holds_stock_and_is_shown_in_full() {
    let stack = Stack::new("hold").await;
    stack.define(5, json!({})).await;
    let reply = stack.place("u-42", "k", 2).await;
    assert_eq!(reply.status, 201, "{reply:?}");
    assert_eq!(reply.header("location"), format!("/v1/orders/{}", reply.id()));
    assert_eq!(reply.header("idempotent-replayed"), "");
    let order = reply.body.as_object().unwrap();
    let names: Vec<_> = order.keys().map(String::as_str).collect();
    let mut expected = vec![
        "id",
        "sale_id",
        "buyer_id",
        "status",
        "lines",
        "returned",
        "payment_id",
        "created_at",
        "expires_at",
        "confirmed_at",
        "reacquired",
        "durability",
    ];
    expected.sort_unstable();
    assert_eq!(BTreeSet::from_iter(names), BTreeSet::from_iter(expected));
    assert_eq!(reply.body["status"], "held");
    assert_eq!(reply.body["lines"], json!([{"sku": "a", "quantity": 2}]));
    assert_eq!(reply.body["returned"], json!([]));
    assert_eq!(
        (&reply.body["payment_id"], &reply.body["reacquired"]),
        (&Value::Null, &json!(false))
    );
    assert_eq!(reply.body["durability"], "memory");
    assert_eq!(stack.counters().await, [5, 3, 2, 0]);

    let shown = stack.get(reply.header("location")).send().await;
    assert_eq!(shown.body, reply.body);
    stack.record().await;
    let shown = stack.get(reply.header("location")).send().await;
    assert_eq!(shown.body["durability"], "recorded");
}

#[tokio::test]
async fn refusals_come_in_their_order() {
    let stack = Stack::new("refusals").await;
    stack.place("b", "k", 1).await.is(404, "sale-not-found");
    let opens_at = "2999-01-01T00:00:00.000Z";
    let others = json!({
        "opens_at": opens_at, "per_buyer_limit": 3, "hold_seconds": 60,
        "skus": [{"sku": "a", "stock": 2}, {"sku": "b", "stock": 9, "per_buyer_limit": 1}],
    });
    stack.define(2, others).await;
    let not_open = stack.place("b", "k", 1).await;
    not_open.is(409, "sale-not-open");
    assert_eq!(not_open.body["opens_at"], opens_at);
    let path = format!("/v1/sales/{}/pause", stack.sale);
    assert_eq!(stack.post(&path).send().await.body["state"], "paused");
    stack.place("b", "k", 1).await.is(409, "sale-not-open");
    stack
        .define(
            2,
            json!({
                "per_buyer_limit": 3, "hold_seconds": 60,
                "skus": [{"sku": "a", "stock": 2}, {"sku": "b", "stock": 9, "per_buyer_limit": 1}],
            }),
        )
        .await;
    stack.place("b", "k", 1).await.is(409, "sale-paused");
    let path = format!("/v1/sales/{}/resume", stack.sale);
    assert_eq!(stack.post(&path).send().await.body["state"], "open");

    let lines = async |lines: Value, hold: u64| {
        let body = json!({
            "sale_id": stack.sale, "buyer_id": "b", "hold_seconds": hold, "lines": lines
        });
        stack.place_with("k", body).await
    };
    let unknown = lines(json!([{"sku": "x", "quantity": 9}]), 99_999_999_999).await;
    unknown.is(404, "sku-not-found");
    let too_long = lines(json!([{"sku": "a", "quantity": 9}]), 61).await;
    too_long.is(400, "invalid-request");
    assert_eq!(too_long.pointers(), ["/hold_seconds"]);
    let sku_limit =
        lines(json!([{"sku": "a", "quantity": 9}, {"sku": "b", "quantity": 2}]), 60).await;
    sku_limit.is(409, "purchase-limit");
    assert_eq!((&sku_limit.body["limit"], &sku_limit.body["already"]), (&json!(1), &json!(0)));
    assert_eq!(sku_limit.body["sku"], "b");
    let sale_limit = lines(json!([{"sku": "a", "quantity": 4}]), 60).await;
    sale_limit.is(409, "purchase-limit");
    assert_eq!((&sale_limit.body["limit"], sale_limit.body.get("sku")), (&json!(3), None));
    let sold_out =
        lines(json!([{"sku": "b", "quantity": 1}, {"sku": "a", "quantity": 2}]), 60).await;
    assert_eq!(sold_out.status, 201, "{sold_out:?}");
    let reply = stack.place("c", "k", 1).await;
    reply.is(409, "sold-out");
    assert_eq!(reply.body["lines"], json!([{"sku": "a", "requested": 1, "available": 0}]));

    let path = format!("/v1/sales/{}/close", stack.sale);
    assert_eq!(stack.post(&path).send().await.body["state"], "closed");
    stack.place("c", "k", 1).await.is(409, "sale-closed");
    let replay = lines(json!([{"sku": "a", "quantity": 2}, {"sku": "b", "quantity": 1}]), 60).await;
    assert_eq!(replay.status, 201, "a replay comes before them all: {replay:?}");
}

#[tokio::test]
async fn a_key_finds_its_order_while_it_holds_something() {
    let stack = Stack::new("replay").await;
    stack.define(9, json!({})).await;
    let first = stack.place("b", "k", 1).await;
    for key in ["k", "\"k\""] {
        let again = stack.place("b", key, 1).await;
        assert_eq!(again.status, 201, "{again:?}");
        assert_eq!(again.header("idempotent-replayed"), "true");
        assert_eq!(again.id(), first.id());
    }
    stack.place("b", "k", 2).await.is(422, "idempotency-key-reused");
    assert_ne!(stack.place("other", "k", 1).await.id(), first.id(), "the key is the buyer's own");

    assert_eq!(stack.confirm(first.id(), "p").await.status, 200);
    let bought = stack.place("b", "k", 1).await;
    assert_eq!((bought.status.as_u16(), bought.header("idempotent-replayed")), (200, "true"));
    assert_eq!(bought.body["status"], "confirmed");

    let second = stack.place("b", "k2", 1).await;
    assert_eq!(stack.cancel(second.id()).await.status, 200);
    let gone = stack.place("b", "k2", 1).await;
    gone.is(409, "order-cancelled");
    assert_eq!(gone.header("idempotent-replayed"), "true");
    assert_eq!(gone.body["order"]["id"], second.id());
    stack.place("b", "k2", 2).await.is(422, "idempotency-key-reused");
}

#[tokio::test]
async fn fifty_at_once_with_one_key_are_one_order() {
    let stack = Stack::new("at_once").await;
    stack.define(100, json!({})).await;
    let replies = join_all((0..50).map(|_| stack.place("b", "k", 1))).await;
    let ids: BTreeSet<_> = replies.iter().map(Reply::id).collect();
    assert_eq!(ids.len(), 1);
    let first = replies.iter().filter(|r| r.header("idempotent-replayed").is_empty()).count();
    assert_eq!(first, 1, "all but one are replays");
    assert_eq!(stack.counters().await, [100, 99, 1, 0]);
}

#[tokio::test]
async fn a_payment_buys_once() {
    let stack = Stack::new("confirm").await;
    stack.define(3, json!({})).await;
    let id = stack.hold("b").await;
    let bought = stack.confirm(&id, "p").await;
    assert_eq!(bought.status, 200, "{bought:?}");
    assert_eq!(
        (&bought.body["status"], &bought.body["payment_id"]),
        (&json!("confirmed"), &json!("p"))
    );
    assert!(bought.body["confirmed_at"].is_string());
    assert_eq!(stack.confirm(&id, "p").await.body, bought.body);
    let other = stack.confirm(&id, "q").await;
    other.is(409, "already-paid");
    assert_eq!(other.body["order"], bought.body);
    let cancel = stack.cancel(&id).await;
    cancel.is(409, "order-confirmed");
    assert_eq!(cancel.body["order"]["id"], id.as_str());
    let partial = stack.post(&format!("/v1/orders/{id}/confirm"));
    let partial = partial.json(json!({"payment_id": "p", "lines": []})).send().await;
    assert_eq!(partial.pointers(), ["/lines"], "not yet: {partial:?}");
    assert_eq!(stack.counters().await, [3, 2, 0, 1]);
}

#[tokio::test]
async fn a_cancel_gives_the_stock_back_once() {
    let stack = Stack::new("cancel").await;
    stack.define(3, json!({})).await;
    let id = stack.hold("b").await;
    let path = format!("/v1/orders/{id}/cancel");
    let cancelled = stack.post(&path).json(json!({"reason": "changed my mind ✂"})).send().await;
    assert_eq!((cancelled.status.as_u16(), &cancelled.body["status"]), (200, &json!("cancelled")));
    assert_eq!(stack.cancel(&id).await.body, cancelled.body);
    let paid = stack.confirm(&id, "p").await;
    paid.is(409, "order-cancelled");
    assert_eq!(paid.body["order"]["lines"], json!([{"sku": "a", "quantity": 1}]));
    assert_eq!(stack.counters().await, [3, 3, 0, 0]);
    let long = stack.post(&path).json(json!({"reason": "x".repeat(201)})).send().await;
    assert_eq!(long.pointers(), ["/reason"], "{long:?}");
}

#[tokio::test]
async fn who_never_got_an_answer_cancels_by_key() {
    let stack = Stack::new("by_key").await;
    stack.define(3, json!({})).await;
    let cancel = async |sale: &str, key: &str| {
        let body = json!({"sale_id": sale, "buyer_id": "b", "idempotency_key": key});
        stack.post("/v1/orders/cancel").json(body).send().await
    };
    let held = stack.place("b", "k", 1).await;
    let cancelled = cancel(&stack.sale, "k").await;
    assert_eq!((cancelled.status.as_u16(), cancelled.id()), (200, held.id()));

    let tombstone = cancel(&stack.sale, "late").await;
    assert_eq!((tombstone.status.as_u16(), &tombstone.body["status"]), (200, &json!("cancelled")));
    assert_eq!(tombstone.body["lines"], json!([]));
    assert_eq!(cancel(&stack.sale, "late").await.body, tombstone.body);
    for quantity in [1, 2] {
        let late = stack.place("b", "late", quantity).await;
        late.is(409, "order-cancelled");
        assert_eq!(late.body["order"]["id"], tombstone.id());
    }
    let bought = stack.place("b", "bought", 1).await;
    stack.confirm(bought.id(), "p").await;
    cancel(&stack.sale, "bought").await.is(409, "order-confirmed");
    cancel(&unique("nowhere"), "k").await.is(404, "sale-not-found");
}

#[tokio::test]
async fn the_deadline_decides_and_not_the_sweeper() {
    let stack = Stack::new("deadline").await;
    stack.define(3, json!({"hold_seconds": 1})).await;
    let (paid, cancelled) = (stack.place("b", "k", 1).await, stack.place("c", "k", 1).await);
    let path = format!("/v1/orders/{}", paid.id());
    until("it answers as expired", async || {
        stack.get(&path).send().await.body["status"] == "expired"
    })
    .await;
    assert_eq!(stack.counters().await[2], 2, "nobody has swept");
    let replay = stack.place("b", "k", 1).await;
    replay.is(409, "order-expired");
    assert_eq!(replay.body["order"]["expires_at"], paid.body["expires_at"]);
    assert_eq!(stack.cancel(cancelled.id()).await.body["status"], "cancelled");
    stack.lanes.expire(&stack.lane(), 10).await.unwrap();
    assert_eq!(stack.counters().await, [3, 3, 0, 0]);
    assert_eq!(stack.cancel(paid.id()).await.body["status"], "cancelled");
}

#[tokio::test]
async fn recorded_orders_are_listed_newest_first() {
    let stack = Stack::new("list").await;
    stack.define(50, json!({})).await;
    let mut ids = Vec::new();
    for n in 0..7 {
        ids.push(stack.hold(&format!("b{}", n % 2)).await);
    }
    stack.confirm(&ids[6], "p").await;
    stack.record().await;
    let list = async |query: &str| {
        let path = format!("/v1/orders?sale_id={}{query}", stack.sale);
        let reply = stack.call(Method::GET, &path, &stack.orders_key).send().await;
        assert_eq!(reply.status, 200, "{reply:?}");
        reply.body
    };
    let of = |page: &Value| -> Vec<String> {
        let orders = page["orders"].as_array().unwrap().iter();
        orders.map(|order| order["id"].as_str().unwrap().to_owned()).collect()
    };
    let all = list("").await;
    assert_eq!((of(&all).len(), &all["next_cursor"]), (7, &Value::Null));
    assert!(all["orders"].as_array().unwrap().iter().all(|o| o["durability"] == "recorded"));
    let times: Vec<_> = all["orders"]
        .as_array()
        .unwrap()
        .iter()
        .map(|o| (o["created_at"].as_str().unwrap(), o["id"].as_str().unwrap()))
        .collect();
    assert!(times.is_sorted_by(|a, b| a > b), "{times:?}");

    let (mut pages, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = list(&format!("&limit=3{cursor}")).await;
        pages.extend(of(&page));
        match page["next_cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => break,
        }
    }
    assert_eq!(pages, of(&all), "page by page it is the same list");
    assert_eq!(of(&list("&status=confirmed").await), [ids[6].clone()]);
    assert_eq!(of(&list("&buyer_id=b1").await).len(), 3);
    assert_eq!(of(&list("&buyer_id=b1&status=cancelled").await).len(), 0);
    for (query, pointer) in [
        ("limit=201", "/limit"),
        ("status=sold", "/status"),
        ("cursor=x", "/cursor"),
        ("buyer_id=a%20b", "/buyer_id"),
        ("sale_id=", "/sale_id"),
        ("limit=1&limit=2", "/limit"),
    ] {
        let reply = stack.get(&format!("/v1/orders?{query}")).send().await;
        reply.is(400, "invalid-request");
        assert_eq!(reply.pointers(), [pointer]);
    }
}

#[tokio::test]
async fn a_lane_that_is_not_in_redis_is_frozen() {
    let stack = Stack::new("frozen").await;
    stack.define(3, json!({})).await;
    let id = stack.hold("b").await;
    let client = redis::Client::open(std::env::var("REDIS_URL").unwrap()).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    let keys = holdfast::lanes::LaneKeys::new(&stack.lane());
    let _: () = redis::cmd("DEL").arg(keys.all()).query_async(&mut connection).await.unwrap();
    stack.place("b", "k", 1).await.is(503, "lane-frozen");
    stack.get(&format!("/v1/orders/{id}")).send().await.is(503, "lane-frozen");
    stack.confirm(&id, "p").await.is(503, "lane-frozen");
    stack.cancel(&id).await.is(503, "lane-frozen");
    let sale = format!("/v1/sales/{}", stack.sale);
    stack.post(&format!("{sale}/pause")).send().await.is(503, "lane-frozen");
    stack
        .put(&sale)
        .json(json!({"name": "n", "skus": [{"sku": "a", "stock": 3}]}))
        .send()
        .await
        .is(503, "lane-frozen");
    tokio::time::timeout(Duration::from_secs(5), async {
        let list = stack.call(Method::GET, "/v1/sales", "").send().await;
        assert_eq!(list.status, 200, "one frozen sale does not hide the others: {list:?}");
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn without_redis_nothing_is_done_and_nothing_is_lost() {
    let stack = Stack::with("away", |config| {
        config.redis.url = "redis://127.0.0.1:1".into();
        config.redis.connect_timeout_ms = 200;
    })
    .await;
    let path = format!("/v1/sales/{}", stack.sale);
    let definition = json!({"name": "n", "skus": [{"sku": "a", "stock": 1}]});
    stack.put(&path).json(definition).send().await.is(503, "unavailable");
    stack.get(&path).send().await.is(404, "sale-not-found");
}
