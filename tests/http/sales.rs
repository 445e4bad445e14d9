//! Sales: definitions, views, phases.

use std::time::Duration;

use futures_util::future::join_all;
use holdfast::domain::sale::Definition;
use holdfast::lanes::command::Define;
use holdfast::ledger::digest;
use reqwest::Method;
use serde_json::{Value, json};

use crate::stack::{Stack, unique, until};

fn definition() -> Value {
    json!({"name": "Double Eleven", "skus": [{"sku": "a", "stock": 5}, {"sku": "b", "stock": 7}]})
}

#[tokio::test]
async fn a_sale_is_defined_once_and_then_anew() {
    let stack = Stack::new("define").await;
    let path = format!("/v1/sales/{}", stack.sale);
    let put = async |body: Value| stack.put(&path).json(body).send().await;
    let first = put(definition()).await;
    assert_eq!((first.status.as_u16(), first.header("etag")), (201, "\"1\""), "{first:?}");
    assert_eq!(first.body["version"], 1);
    assert_eq!(
        (&first.body["hold_seconds"], &first.body["max_hold_seconds"]),
        (&json!(300), &json!(420))
    );
    let same = put(definition()).await;
    assert_eq!((same.status.as_u16(), &same.body), (200, &first.body), "nothing changed");
    let mut longer = definition();
    longer["hold_seconds"] = json!(60);
    let second = put(longer).await;
    assert_eq!((second.status.as_u16(), second.header("etag")), (200, "\"2\""), "{second:?}");
    let shown = stack.get(&format!("{path}/definition")).send().await;
    assert_eq!((shown.header("etag"), &shown.body), ("\"2\"", &second.body));
    assert_eq!(stack.counters().await, [5, 5, 0, 0]);
}

#[tokio::test]
async fn sending_a_definition_again_completes_what_lane_or_database_lacks_of_it() {
    let stack = Stack::new("again").await;
    let path = format!("/v1/sales/{}", stack.sale);
    let body = |stock: u64| json!({"name": "n", "skus": [{"sku": "a", "stock": stock}]});
    let put = async |stock: u64| stack.put(&path).json(body(stock)).send().await;
    let definition = |stock: u64| {
        let definition: Definition = serde_json::from_value(body(stock)).unwrap();
        definition.check().unwrap()
    };
    assert_eq!(put(5).await.status, 201);
    // It was answered, and Redis has lost it since.
    let lock = stack.ledger.lock_sale(&stack.sale.parse().unwrap()).await.unwrap();
    lock.commit_definition(2, &definition(9), &"op".parse().unwrap()).await.unwrap();
    assert_eq!(stack.counters().await, [5, 5, 0, 0]);
    let again = put(9).await;
    assert_eq!((again.status.as_u16(), &again.body["version"]), (200, &json!(2)), "{again:?}");
    assert_eq!(stack.counters().await, [9, 9, 0, 0]);
    // The lane took a later one, whose commit was lost: to want the one before is a change.
    let define = Define {
        version: 3,
        create_epoch: None,
        digest: digest(&definition(7)),
        definition: definition(7),
        actor: "op".parse().unwrap(),
        trace: None,
    };
    stack.lanes.define(&stack.lane(), define).await.unwrap();
    assert_eq!(stack.counters().await, [7, 7, 0, 0]);
    let back = put(9).await;
    assert_eq!((back.status.as_u16(), &back.body["version"]), (200, &json!(4)), "{back:?}");
    assert_eq!(stack.counters().await, [9, 9, 0, 0]);
}

#[tokio::test]
async fn if_match_defines_what_was_seen_or_nothing() {
    let stack = Stack::new("if_match").await;
    let path = format!("/v1/sales/{}", stack.sale);
    let put = async |tag: &str, name: &str| {
        let mut body = definition();
        body["name"] = json!(name);
        stack.put(&path).header("If-Match", tag).json(body).send().await
    };
    put("*", "one").await.is(412, "precondition-failed");
    stack.get(&path).send().await.is(404, "sale-not-found");
    assert_eq!(stack.put(&path).json(definition()).send().await.status, 201);
    put("\"2\"", "one").await.is(412, "precondition-failed");
    assert_eq!(put("\"1\"", "one").await.body["version"], 2);
    put("\"1\"", "two").await.is(412, "precondition-failed");
    assert_eq!(put("\"1\"", "one").await.body["version"], 2, "a retry finds what it did");
}

#[tokio::test]
async fn what_orders_rely_on_is_fixed_once_there_are_any() {
    let stack = Stack::new("in_use").await;
    let path = format!("/v1/sales/{}", stack.sale);
    let put =
        async |skus: Value| stack.put(&path).json(json!({"name": "n", "skus": skus})).send().await;
    put(json!([{"sku": "a", "stock": 5}, {"sku": "b", "stock": 1}])).await;
    assert_eq!(put(json!([{"sku": "a", "stock": 9}])).await.status, 200, "nobody has ordered");
    assert_eq!(stack.counters().await, [9, 9, 0, 0]);
    stack.hold("b").await;
    put(json!([{"sku": "a", "stock": 8}])).await.is(409, "sale-in-use");
    put(json!([{"sku": "c", "stock": 8}])).await.is(409, "sale-in-use");
    let more =
        put(json!([{"sku": "c", "stock": 3}, {"sku": "a", "stock": 9, "per_buyer_limit": 2}]))
            .await;
    assert_eq!(more.status, 200, "{more:?}");
    let stock = stack.get(&format!("{path}/stock")).send().await;
    let skus: Vec<_> = stock.body["skus"].as_array().unwrap().iter().map(|s| &s["sku"]).collect();
    assert_eq!(skus, ["c", "a"], "in the order of the definition");
    assert_eq!(
        stock.body["skus"][1],
        json!({"sku": "a", "total": 9, "available": 8, "held": 1, "sold": 0, "version": 0})
    );
}

#[tokio::test]
async fn impossible_definitions_are_refused() {
    let stack = Stack::new("impossible").await;
    let path = format!("/v1/sales/{}", stack.sale);
    for (change, pointer) in [
        (json!({"name": ""}), "/name"),
        (json!({"name": "a\u{0}b"}), "/name"),
        (json!({"hold_seconds": 0}), "/hold_seconds"),
        (json!({"hold_seconds": 60.0}), "/hold_seconds"),
        (json!({"max_hold_seconds": 10}), "/max_hold_seconds"),
        (json!({"retention_days": 3651}), "/retention_days"),
        (json!({"per_buyer_limit": 0}), "/per_buyer_limit"),
        (json!({"lanes": 2}), "/lanes"),
        (json!({"min_durability": "carved"}), "/min_durability"),
        (json!({"version": 1}), "/version"),
        (json!({"opens_at": "tomorrow"}), "/opens_at"),
        (json!({"skus": []}), "/skus"),
        (json!({"skus": [{"sku": "a", "stock": -1}]}), "/skus/0/stock"),
        (json!({"skus": [{"sku": "a", "stock": 1}, {"sku": "a", "stock": 1}]}), "/skus/1/sku"),
        (json!({"skus": [["a", 1]]}), "/skus/0"),
    ] {
        let mut body = definition();
        crate::stack::merge(&mut body, change);
        let reply = stack.put(&path).json(body).send().await;
        reply.is(400, "invalid-request");
        assert_eq!(reply.pointers(), [pointer], "{reply:?}");
    }
    let bad = stack.put("/v1/sales/a%20b").json(definition()).send().await;
    assert_eq!(bad.pointers(), ["/sale_id"], "{bad:?}");
    stack.get(&path).send().await.is(404, "sale-not-found");
}

#[tokio::test]
async fn definitions_at_once_follow_each_other() {
    let stack = Stack::new("define_at_once").await;
    let path = format!("/v1/sales/{}", stack.sale);
    let put = |n: usize| {
        let mut body = definition();
        body["name"] = json!(format!("name {}", n % 4));
        stack.put(&path).json(body).send()
    };
    let replies = join_all((0..12).map(put)).await;
    assert!(replies.iter().all(|reply| reply.status.is_success()), "{replies:?}");
    assert_eq!(replies.iter().filter(|reply| reply.status == 201).count(), 1);
    let last = stack.get(&format!("{path}/definition")).send().await;
    let highest = replies.iter().map(|reply| reply.body["version"].as_u64().unwrap()).max();
    assert_eq!(last.body["version"].as_u64(), highest);
    assert_eq!(stack.counters().await, [5, 5, 0, 0]);
}

#[tokio::test]
async fn a_definition_whose_commit_was_lost_is_completed_by_the_same_again() {
    let stack = Stack::new("lost").await;
    let path = format!("/v1/sales/{}", stack.sale);
    let checked: holdfast::domain::sale::Definition =
        serde_json::from_value::<holdfast::domain::sale::Definition>(definition())
            .unwrap()
            .check()
            .unwrap();
    let define = |version, name: &str| {
        let mut definition = checked.clone();
        definition.name = name.to_owned();
        holdfast::lanes::command::Define {
            version,
            create_epoch: Some(1),
            digest: holdfast::ledger::digest(&definition),
            definition,
            actor: "operator".parse().unwrap(),
            trace: None,
        }
    };
    stack.lanes.define(&stack.lane(), define(1, "Double Eleven")).await.unwrap();
    let reply = stack.put(&path).json(definition()).send().await;
    assert_eq!((reply.status.as_u16(), &reply.body["version"]), (201, &json!(1)), "{reply:?}");

    stack.lanes.define(&stack.lane(), define(2, "lost")).await.unwrap();
    let mut other = definition();
    other["name"] = json!("another");
    let reply = stack.put(&path).json(other).send().await;
    assert_eq!((reply.status.as_u16(), &reply.body["version"]), (200, &json!(3)), "{reply:?}");
}

#[tokio::test]
async fn anybody_sees_a_sale_and_from_any_origin() {
    let stack = Stack::new("view").await;
    let closes_at = "2999-01-01T00:00:00.000Z";
    stack.define(5, json!({"closes_at": closes_at, "per_buyer_limit": 2})).await;
    let path = format!("/v1/sales/{}", stack.sale);
    let open = |method: Method| stack.call(method, &path, "");
    let seen = open(Method::GET).send().await;
    assert_eq!(
        seen.body,
        json!({
            "id": stack.sale, "name": "Test", "state": "open", "opens_at": null,
            "closes_at": closes_at, "per_buyer_limit": 2,
            "skus": [{"sku": "a", "available": 5, "per_buyer_limit": null}],
        })
    );
    assert_eq!(seen.header("access-control-allow-origin"), "*");
    assert_eq!(seen.header("cache-control"), "no-cache");
    let etag = seen.header("etag").to_owned();
    let again = open(Method::GET).header("If-None-Match", &etag).send_raw().await;
    assert_eq!(again, (304, String::new()));
    stack.hold("b").await;
    until("the hold is seen", async || {
        open(Method::GET).header("If-None-Match", &etag).send().await.body["skus"][0]["available"]
            == 4
    })
    .await;
    let preflight = open(Method::OPTIONS).header("Origin", "https://shop.example").send().await;
    assert_eq!(preflight.status, 204);
    assert!(preflight.header("access-control-allow-headers").contains("If-None-Match"));
    let unknown = stack.call(Method::GET, &format!("/v1/sales/{}", unique("no")), "").send().await;
    unknown.is(404, "sale-not-found");
    assert_eq!(unknown.header("access-control-allow-origin"), "*", "a page may read why");
    let keyed = stack.get(&format!("{path}/stock")).send().await;
    assert_eq!(keyed.header("access-control-allow-origin"), "");
    let put = stack.put(&path).json(json!({})).send().await;
    assert_eq!(put.header("access-control-allow-origin"), "");
}

#[tokio::test]
async fn a_view_is_at_most_250_ms_old() {
    let stack = Stack::new("age").await;
    stack.define(50, json!({})).await;
    let path = format!("/v1/sales/{}", stack.sale);
    for left in (40..50).rev() {
        stack.call(Method::GET, &path, "").send().await;
        stack.hold("b").await;
        tokio::time::sleep(Duration::from_millis(250)).await;
        let seen = stack.call(Method::GET, &path, "").send().await;
        assert_eq!(seen.body["skus"][0]["available"], left);
    }
}

#[tokio::test]
async fn sales_are_listed_newest_first_and_by_state() {
    let stack = Stack::new("list").await;
    let mut ids = Vec::new();
    for n in 0..5 {
        let id = unique(&format!("s{n}"));
        let mut body = definition();
        if n == 2 {
            body["opens_at"] = json!("2999-01-01T00:00:00Z");
        }
        assert_eq!(stack.put(&format!("/v1/sales/{id}")).json(body).send().await.status, 201);
        ids.insert(0, id);
    }
    stack.post(&format!("/v1/sales/{}/close", ids[4])).send().await;
    let list = async |query: &str| {
        let reply = stack.call(Method::GET, &format!("/v1/sales?{query}"), "").send().await;
        assert_eq!(
            (reply.status.as_u16(), reply.header("access-control-allow-origin")),
            (200, "*")
        );
        assert!(!reply.header("etag").is_empty());
        reply.body
    };
    let of = |page: &Value| -> Vec<String> {
        let sales = page["sales"].as_array().unwrap().iter();
        sales.map(|sale| sale["id"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(of(&list("").await), ids);
    assert_eq!(of(&list("state=scheduled").await), [ids[2].clone()]);
    assert_eq!(
        of(&list("state=closed").await),
        [ids[4].clone()],
        "at once, not when it is recorded"
    );
    assert_eq!(of(&list("state=open").await), [ids[0].clone(), ids[1].clone(), ids[3].clone()]);
    assert_eq!(of(&list("state=archived").await).len(), 0);
    let (mut pages, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = list(&format!("limit=2{cursor}")).await;
        pages.extend(of(&page));
        match page["next_cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => break,
        }
    }
    assert_eq!(pages, ids);
}

#[tokio::test]
async fn close_is_final_and_settling_goes_on() {
    let stack = Stack::new("phases").await;
    stack.define(5, json!({})).await;
    let (paid, cancelled) = (stack.hold("a").await, stack.hold("b").await);
    let phase =
        async |what: &str| stack.post(&format!("/v1/sales/{}/{what}", stack.sale)).send().await;
    assert_eq!(phase("pause").await.body["state"], "paused");
    assert_eq!(phase("pause").await.body["state"], "paused");
    assert_eq!(stack.confirm(&paid, "p").await.status, 200);
    assert_eq!(phase("resume").await.body["state"], "open");
    assert_eq!(phase("close").await.body["state"], "closed");
    assert_eq!(phase("close").await.body["state"], "closed");
    phase("pause").await.is(409, "sale-closed");
    phase("resume").await.is(409, "sale-closed");
    assert_eq!(stack.cancel(&cancelled).await.status, 200);
    assert_eq!(stack.counters().await, [5, 4, 0, 1]);
    for what in ["pause", "resume", "close"] {
        let unknown = stack.post(&format!("/v1/sales/{}/{what}", unique("no"))).send().await;
        unknown.is(404, "sale-not-found");
    }
}

#[tokio::test]
async fn a_sale_whose_end_passed_opens_again_by_a_later_one() {
    let stack = Stack::new("reopen").await;
    stack.define(5, json!({"closes_at": "2020-01-01T00:00:00Z"})).await;
    stack.place("b", "k", 1).await.is(409, "sale-closed");
    stack.define(5, json!({"closes_at": "2999-01-01T00:00:00Z"})).await;
    assert_eq!(stack.place("b", "k", 1).await.status, 201);
}
