//! Adjustments: changes of a total, their audit trail, their idempotency.

use reqwest::Method;
use serde_json::{Value, json};

use crate::stack::{Call, Reply, Stack, unique, until};

impl Stack {
    /// An adjustment of this SKU, without a key.
    fn adjusting(&self, sku: &str, body: Value) -> Call {
        self.post(&format!("/v1/sales/{}/stock/{sku}/adjustments", self.sale)).json(body)
    }

    async fn adjust(&self, sku: &str, key: &str, body: Value) -> Reply {
        let call = self.adjusting(sku, body).header("Idempotency-Key", key);
        self.recording(call.send()).await
    }

    /// Sets the total of `a` as somebody counted it while it had this version.
    fn setting_total(&self, key: &str, total: i64, version: &str) -> Call {
        let call = self.adjusting("a", json!({"set_total": total, "reason": "recount"}));
        call.header("Idempotency-Key", key).header("If-Match", version)
    }

    async fn set_total(&self, key: &str, total: i64, version: &str) -> Reply {
        self.recording(self.setting_total(key, total, version).send()).await
    }

    fn undoing(&self, id: &str, key: &str) -> Call {
        self.post(&format!("/v1/adjustments/{id}/undo")).header("Idempotency-Key", key)
    }

    async fn undo(&self, id: &str, key: &str) -> Reply {
        self.recording(self.undoing(id, key).send()).await
    }

    async fn trail(&self) -> Value {
        let trail = self.get(&format!("/v1/sales/{}/adjustments", self.sale)).send().await;
        trail.body["adjustments"].clone()
    }
}

/// total, available, held, sold, version
fn counters(body: &Value) -> [i64; 5] {
    ["total", "available", "held", "sold", "version"]
        .map(|name| body[name].as_i64().unwrap_or_else(|| panic!("{body}")))
}

#[tokio::test]
async fn an_adjustment_is_answered_when_it_is_recorded() {
    let stack = Stack::new("adjust").await;
    stack.define(5, json!({})).await;
    stack.hold("b").await;
    let body = json!({"delta": 3, "reason": "restock", "reference": "PO-1", "note": "truck 7"});
    let done = stack.adjust("a", "k", body.clone()).await;
    assert_eq!(done.status, 201, "{done:?}");
    let mut expected = json!({
        "sale_id": stack.sale, "sku": "a", "delta": 3, "reason": "restock", "reference": "PO-1",
        "note": "truck 7", "actor": "operator", "undoes": null, "undone_by": null,
        "before": {"total": 5, "available": 4, "held": 1, "sold": 0, "version": 0},
        "after": {"total": 8, "available": 7, "held": 1, "sold": 0, "version": 1},
    });
    for member in ["id", "created_at"] {
        expected[member] = done.body[member].clone();
    }
    assert_eq!(done.body, expected);
    let again = stack.adjust("a", "k", body).await;
    assert_eq!((again.status.as_u16(), again.header("idempotent-replayed")), (200, "true"));
    assert_eq!(again.body, done.body);
    let other = stack.adjust("a", "k", json!({"delta": 4, "reason": "restock"})).await;
    other.is(422, "idempotency-key-reused");
    assert_eq!(stack.counters().await, [8, 7, 1, 0]);

    let trail = stack.get(&format!("/v1/sales/{}/adjustments", stack.sale)).send().await;
    assert_eq!(trail.body, json!({"adjustments": [done.body], "next_cursor": null}));
}

#[tokio::test]
async fn what_is_held_or_sold_is_never_taken() {
    let stack = Stack::new("in_use").await;
    stack.define(5, json!({})).await;
    let id = stack.hold("b").await;
    stack.confirm(&id, "p").await;
    stack.hold("c").await;
    let more = stack.adjust("a", "k", json!({"delta": -4, "reason": "lost"})).await;
    more.is(409, "stock-in-use");
    assert_eq!((&more.body["sku"], counters(&more.body)), (&json!("a"), [5, 3, 1, 1, 0]));
    let total = stack.set_total("k", 1, "\"0\"").await;
    total.is(409, "stock-in-use");
    assert_eq!(counters(&total.body), [5, 3, 1, 1, 0]);
    let below = stack.adjust("a", "k", json!({"delta": -6, "reason": "lost"})).await;
    assert_eq!(below.pointers(), ["/delta"], "{below:?}");
    let beyond = stack.adjust("a", "k", json!({"delta": 1_000_000_000, "reason": "restock"})).await;
    assert_eq!(beyond.pointers(), ["/delta"], "{beyond:?}");
    assert_eq!(stack.adjust("a", "k", json!({"delta": -3, "reason": "lost"})).await.status, 201);
    assert_eq!(stack.counters().await, [2, 0, 1, 1]);
}

#[tokio::test]
async fn what_an_adjustment_needs_is_checked_in_order() {
    let stack = Stack::new("checks").await;
    let body = json!({"delta": 1, "reason": "other"});
    let path = |sku: &str| format!("/v1/sales/{}/stock/{sku}/adjustments", stack.sale);
    let post = |sku: &str| stack.post(&path(sku)).json(body.clone());
    post("a").send().await.is(400, "idempotency-key-required");
    post("a").header("Idempotency-Key", "k").send().await.is(404, "sale-not-found");
    stack.define(5, json!({})).await;
    post("x").header("Idempotency-Key", "k").send().await.is(404, "sku-not-found");
    post("a%20b").header("Idempotency-Key", "k").send().await.is(404, "sku-not-found");
    for (body, pointer) in [
        (json!({"delta": 0, "reason": "other"}), "/delta"),
        (json!({"reason": "other"}), "/delta"),
        (json!({"delta": 1, "set_total": 9, "reason": "other"}), "/set_total"),
        (json!({"set_total": 1_000_000_001, "reason": "other"}), "/set_total"),
        (json!({"set_total": -1, "reason": "other"}), "/set_total"),
        (json!({"delta": 1, "reason": "other", "dry_run": 1}), "/dry_run"),
        (json!({"delta": 1, "reason": "theft"}), "/reason"),
    ] {
        let reply = stack.adjust("a", "k", body).await;
        assert_eq!(reply.pointers(), [pointer], "{reply:?}");
    }
    assert_eq!(stack.counters().await, [5, 5, 0, 0]);
}

#[tokio::test]
async fn an_adjustment_that_is_not_recorded_in_time_may_have_happened() {
    let stack = Stack::with("unrecorded", |config| config.http.durability_timeout_ms = 50).await;
    stack.define(5, json!({})).await;
    let path = format!("/v1/sales/{}/stock/a/adjustments", stack.sale);
    let body = json!({"delta": 1, "reason": "other"});
    let post = || stack.post(&path).header("Idempotency-Key", "k").json(body.clone());
    post().send().await.is(503, "outcome-unknown");
    post().send().await.is(503, "outcome-unknown");
    stack.record().await;
    let found = post().send().await;
    assert_eq!((found.status.as_u16(), found.header("idempotent-replayed")), (200, "true"));
    assert_eq!(stack.counters().await, [6, 6, 0, 0], "once");
}

#[tokio::test]
async fn the_audit_trail_is_listed_by_sku_and_page() {
    let stack = Stack::new("trail").await;
    stack.define(5, json!({"skus": [{"sku": "a", "stock": 5}, {"sku": "b", "stock": 5}]})).await;
    for n in 0..5 {
        let sku = if n == 3 { "b" } else { "a" };
        let body = json!({"delta": n + 1, "reason": "recount"});
        assert_eq!(stack.adjust(sku, &unique("k"), body).await.status, 201);
    }
    let list = async |query: &str| {
        let path = format!("/v1/sales/{}/adjustments?{query}", stack.sale);
        stack.get(&path).send().await
    };
    let deltas = |reply: &Reply| -> Vec<i64> {
        let all = reply.body["adjustments"].as_array().unwrap().iter();
        all.map(|adjustment| adjustment["delta"].as_i64().unwrap()).collect()
    };
    assert_eq!(deltas(&list("").await), [5, 4, 3, 2, 1]);
    assert_eq!(deltas(&list("sku=b").await), [4]);
    let first = list("limit=2&sku=a").await;
    assert_eq!(deltas(&first), [5, 3]);
    let next = first.body["next_cursor"].as_str().unwrap();
    let second = list(&format!("limit=2&sku=a&cursor={next}")).await;
    assert_eq!((deltas(&second), &second.body["next_cursor"]), (vec![2, 1], &Value::Null));
    list("sku=a%20b").await.is(400, "invalid-request");
    let unknown = stack.get(&format!("/v1/sales/{}/adjustments", unique("no"))).send().await;
    unknown.is(404, "sale-not-found");
    let orders = format!("/v1/sales/{}/adjustments", stack.sale);
    stack.call(Method::GET, &orders, &stack.orders_key).send().await.is(403, "forbidden");
}

#[tokio::test]
async fn a_total_is_set_for_the_version_that_it_was_counted_at() {
    let stack = Stack::new("total").await;
    stack.define(5, json!({})).await;
    stack.hold("b").await;
    let body = json!({"set_total": 9, "reason": "recount"});
    stack.adjust("a", "k", body.clone()).await.is(428, "precondition-required");
    stack.adjust("x", "k", body.clone()).await.is(404, "sku-not-found");
    for other in ["\"1\"", "W/\"0\"", "0"] {
        let stale = stack.set_total("k", 9, other).await;
        stale.is(412, "precondition-failed");
        assert_eq!((&stale.body["sku"], counters(&stale.body)), (&json!("a"), [5, 4, 1, 0, 0]));
    }
    let done = stack.set_total("k", 9, "\"0\"").await;
    assert_eq!((done.status.as_u16(), &done.body["delta"]), (201, &json!(4)), "{done:?}");
    assert_eq!(counters(&done.body["after"]), [9, 8, 1, 0, 1]);
    assert_eq!(done.body.get("set_total"), None, "the answer says what came of it");

    stack.set_total("l", 7, "\"0\"").await.is(412, "precondition-failed");
    for again in [stack.set_total("k", 9, "\"0\"").await, stack.adjust("a", "k", body).await] {
        let header = again.header("idempotent-replayed");
        assert_eq!((again.status.as_u16(), header), (200, "true"), "before If-Match: {again:?}");
        assert_eq!(again.body, done.body);
    }
    stack.set_total("k", 8, "\"1\"").await.is(422, "idempotency-key-reused");
    let delta = json!({"delta": 4, "reason": "recount"});
    stack.adjust("a", "k", delta.clone()).await.is(422, "idempotency-key-reused");

    let stale = stack.adjusting("a", delta.clone()).header("Idempotency-Key", "m");
    stale.header("If-Match", "\"0\"").send().await.is(412, "precondition-failed");
    let either = stack.adjusting("a", delta).header("Idempotency-Key", "m");
    let either = stack.recording(either.header("If-Match", "\"0\", \"1\"").send()).await;
    assert_eq!(either.status, 201, "{either:?}");
    assert_eq!(stack.set_total("n", 5, "*").await.body["delta"], -8);
    assert_eq!(stack.counters().await, [5, 4, 1, 0]);
}

#[tokio::test]
async fn a_count_that_finds_the_total_right_is_recorded_too() {
    let stack = Stack::new("right").await;
    stack.define(5, json!({})).await;
    let done = stack.set_total("k", 5, "\"0\"").await;
    assert_eq!((done.status.as_u16(), &done.body["delta"]), (201, &json!(0)), "{done:?}");
    assert_eq!(counters(&done.body["after"]), [5, 5, 0, 0, 1]);
    stack.set_total("l", 5, "\"0\"").await.is(412, "precondition-failed");
    assert_eq!(stack.set_total("k", 5, "\"0\"").await.body, done.body);
    let undo = stack.undo(done.id(), "u").await;
    assert_eq!((undo.status.as_u16(), &undo.body["delta"]), (201, &json!(0)), "{undo:?}");
    assert_eq!(stack.trail().await.as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn a_dry_run_says_what_would_come_of_it_and_changes_nothing() {
    let stack = Stack::new("dry").await;
    stack.define(5, json!({})).await;
    stack.hold("b").await;
    let seq = stack.lanes.marks(&stack.lane()).await.unwrap().seq;
    let body = json!({"delta": 3, "reason": "restock", "reference": "PO-1", "dry_run": true});
    let tried = stack.adjusting("a", body.clone()).send().await;
    assert_eq!(tried.status, 200, "{tried:?}");
    let mut expected = json!({
        "sale_id": stack.sale, "sku": "a", "delta": 3, "reason": "restock", "reference": "PO-1",
        "note": null, "actor": "operator", "undoes": null, "undone_by": null,
        "before": {"total": 5, "available": 4, "held": 1, "sold": 0, "version": 0},
        "after": {"total": 8, "available": 7, "held": 1, "sold": 0, "version": 1},
    });
    expected["created_at"] = tried.body["created_at"].clone();
    assert!(expected["created_at"].is_string());
    assert_eq!(tried.body, expected, "no id");

    let keyed = stack.adjusting("a", body).header("Idempotency-Key", "k");
    let keyed = keyed.send().await;
    assert_eq!((keyed.status.as_u16(), keyed.header("idempotent-replayed")), (200, ""));
    let total = |total: i64| {
        stack.adjusting("a", json!({"set_total": total, "reason": "recount", "dry_run": true}))
    };
    total(4).send().await.is(428, "precondition-required");
    total(4).header("If-Match", "\"1\"").send().await.is(412, "precondition-failed");
    total(0).header("If-Match", "\"0\"").send().await.is(409, "stock-in-use");
    assert_eq!(total(4).header("If-Match", "\"0\"").send().await.body["delta"], -1);
    let taking = json!({"delta": -9, "reason": "lost", "dry_run": true});
    assert_eq!(stack.adjusting("a", taking.clone()).send().await.pointers(), ["/delta"]);
    stack.adjusting("x", taking).send().await.is(404, "sku-not-found");

    assert_eq!(stack.lanes.marks(&stack.lane()).await.unwrap().seq, seq, "nothing has happened");
    assert_eq!(stack.counters().await, [5, 4, 1, 0]);
    let real = stack.adjust("a", "k", json!({"delta": 1, "reason": "other"})).await;
    assert_eq!(real.status, 201, "the dry run's key was not recorded: {real:?}");
    assert_eq!(counters(&real.body["after"])[4], 1);
}

#[tokio::test]
async fn an_undo_is_the_exact_opposite_and_can_be_undone() {
    let stack = Stack::new("undo").await;
    stack.define(5, json!({})).await;
    stack.hold("b").await;
    let body = json!({"delta": 3, "reason": "restock", "reference": "PO 1, \"late\""});
    let done = stack.adjust("a", "k", body.clone()).await;
    let undo = stack
        .recording(stack.undoing(done.id(), "u").json(json!({"note": "it went to Zürich"})).send());
    let undo = undo.await;
    assert_eq!(undo.status, 201, "{undo:?}");
    let mut expected = json!({
        "sale_id": stack.sale, "sku": "a", "delta": -3, "reason": "correction",
        "reference": "PO 1, \"late\"", "note": "it went to Zürich", "actor": "operator",
        "undoes": done.id(), "undone_by": null,
        "before": {"total": 8, "available": 7, "held": 1, "sold": 0, "version": 1},
        "after": {"total": 5, "available": 4, "held": 1, "sold": 0, "version": 2},
    });
    for member in ["id", "created_at"] {
        expected[member] = undo.body[member].clone();
    }
    assert_eq!(undo.body, expected);

    let twice = stack.undo(done.id(), "v").await;
    twice.is(409, "already-undone");
    assert_eq!(twice.body["undone_by"], undo.id());
    let original = stack.adjust("a", "k", body).await;
    let header = original.header("idempotent-replayed");
    assert_eq!((original.status.as_u16(), header), (200, "true"));
    assert_eq!(original.body["undone_by"], undo.id(), "the original shows it");

    let redo = stack.undo(undo.id(), "v").await;
    assert_eq!((redo.status.as_u16(), &redo.body["delta"]), (201, &json!(3)), "{redo:?}");
    assert_eq!(stack.counters().await, [8, 7, 1, 0]);
    let trail = stack.trail().await;
    let links = |n: usize| (trail[n]["undoes"].as_str(), trail[n]["undone_by"].as_str());
    assert_eq!(links(0), (Some(undo.id()), None));
    assert_eq!(links(1), (Some(done.id()), Some(redo.id())));
    assert_eq!(links(2), (None, Some(undo.id())));
}

#[tokio::test]
async fn an_undo_is_idempotent_by_its_key() {
    let stack = Stack::new("undo_key").await;
    stack.define(5, json!({})).await;
    let done = stack.adjust("a", "k", json!({"delta": 3, "reason": "restock"})).await;
    let other = stack.adjust("a", "l", json!({"delta": 1, "reason": "restock"})).await;
    let undo = stack.undo(done.id(), "u").await;
    assert_eq!((undo.status.as_u16(), &undo.body["note"]), (201, &Value::Null), "{undo:?}");
    let again = stack.undo(done.id(), "u").await;
    assert_eq!((again.status.as_u16(), again.header("idempotent-replayed")), (200, "true"));
    assert_eq!(again.body, undo.body);
    let noted = stack.undoing(done.id(), "u").json(json!({"note": "now with one"}));
    noted.send().await.is(422, "idempotency-key-reused");
    stack.undo(other.id(), "u").await.is(422, "idempotency-key-reused");
    stack.undo(done.id(), "k").await.is(422, "idempotency-key-reused");
    let plain = json!({"delta": -3, "reason": "correction"});
    stack.adjust("a", "u", plain).await.is(422, "idempotency-key-reused");
    assert_eq!(stack.counters().await[0], 6);
}

#[tokio::test]
async fn of_two_undos_at_once_one_wins() {
    let stack = Stack::new("undo_race").await;
    stack.define(5, json!({})).await;
    let done = stack.adjust("a", "k", json!({"delta": 3, "reason": "restock"})).await;
    let undos = (0..8).map(|n| stack.undoing(done.id(), &format!("u{n}")).send());
    let replies = stack.recording(futures_util::future::join_all(undos)).await;
    let winner = replies.iter().find(|reply| reply.status == 201).expect("one wins").id();
    for reply in replies.iter().filter(|reply| reply.status != 201) {
        reply.is(409, "already-undone");
        assert_eq!(reply.body["undone_by"], winner);
    }
    assert_eq!(stack.counters().await, [5, 5, 0, 0]);
}

#[tokio::test]
async fn an_undo_takes_no_more_than_is_available() {
    let stack = Stack::new("undo_in_use").await;
    stack.define(0, json!({})).await;
    let done = stack.adjust("a", "k", json!({"delta": 1, "reason": "restock"})).await;
    let order = stack.hold("b").await;
    let refused = stack.undo(done.id(), "u").await;
    refused.is(409, "stock-in-use");
    assert_eq!((&refused.body["sku"], counters(&refused.body)), (&json!("a"), [1, 0, 1, 0, 1]));
    stack.cancel(&order).await;
    assert_eq!(stack.undo(done.id(), "u").await.status, 201, "a refusal is not stored");

    let loss = stack.set_total("l", 0, "\"2\"").await;
    let most = stack.adjust("a", "m", json!({"delta": 1_000_000_000, "reason": "other"})).await;
    assert_eq!(most.status, 201, "{most:?}");
    assert_eq!(loss.body["delta"], 0);
    let one = stack.adjust("a", "n", json!({"delta": -1, "reason": "lost"})).await;
    stack.adjust("a", "o", json!({"delta": 1, "reason": "other"})).await;
    let beyond = stack.undo(one.id(), "v").await;
    beyond.is(400, "invalid-request");
    assert_eq!(beyond.pointers(), [""]);
}

#[tokio::test]
async fn what_an_undo_needs_is_checked_in_order() {
    let stack = Stack::new("undo_checks").await;
    stack.define(5, json!({})).await;
    let done = stack.adjust("a", "k", json!({"delta": 3, "reason": "restock"})).await;
    let path = format!("/v1/adjustments/{}/undo", done.id());
    stack.call(Method::POST, &path, "").send().await.is(401, "unauthenticated");
    stack.call(Method::POST, &path, &stack.orders_key).send().await.is(403, "forbidden");
    let text = stack.undoing(done.id(), "u").body("text/plain", "{}");
    text.send().await.is(415, "unsupported-media-type");
    let unknown = stack.undoing(done.id(), "u").json(json!({"reason": "lost"})).send().await;
    assert_eq!(unknown.pointers(), ["/reason"], "{unknown:?}");
    stack.post(&path).send().await.is(400, "idempotency-key-required");
    let asked = stack.post(&format!("{path}?dry_run=true")).header("Idempotency-Key", "u");
    asked.send().await.is(400, "invalid-request");

    let made_up = done.id().replace("adj_A", "adj_B");
    let no_adjustment = stack.hold("b").await.replace("ord_", "adj_");
    for id in ["x", &made_up, &no_adjustment] {
        stack.undo(id, "u").await.is(404, "adjustment-not-found");
    }
    let secret = stack.catalog.newest_secret().await.unwrap().unwrap();
    let key = secret.adjustment_key(&stack.lane().sale, &"never".parse().unwrap());
    let genuine = secret.adjustment_id(&stack.lane(), key).to_string();
    stack.undo(&genuine, "u").await.is(404, "adjustment-not-found");
    assert_eq!(stack.counters().await[0], 8);
}

#[tokio::test]
async fn an_undo_that_is_not_recorded_in_time_may_have_happened() {
    let stack = Stack::with("undo_unknown", |config| config.http.durability_timeout_ms = 50).await;
    stack.define(5, json!({})).await;
    let adjust = || {
        let call = stack.adjusting("a", json!({"delta": 1, "reason": "other"}));
        call.header("Idempotency-Key", "k").send()
    };
    adjust().await.is(503, "outcome-unknown");
    stack.record().await;
    let done = adjust().await;
    stack.undoing(done.id(), "u").send().await.is(503, "outcome-unknown");
    adjust().await.is(503, "outcome-unknown");
    stack.record().await;
    let found = stack.undoing(done.id(), "u").send().await;
    assert_eq!((found.status.as_u16(), found.header("idempotent-replayed")), (200, "true"));
    assert_eq!(adjust().await.body["undone_by"], found.id());
    assert_eq!(stack.counters().await, [5, 5, 0, 0], "once");
}

#[tokio::test]
async fn in_an_archived_sale_nothing_is_undone_but_keys_find_what_was() {
    let stack = Stack::new("undo_archived").await;
    stack.define(5, json!({"retention_days": 0})).await;
    let total = stack.set_total("k", 9, "\"0\"").await;
    let done = stack.adjust("a", "l", json!({"delta": 3, "reason": "restock"})).await;
    let undo = stack.undo(done.id(), "u").await;
    stack.archive().await;
    let undo_with = |id: &str, key: &str| stack.undoing(id, key).send();
    let adjust_with =
        |key: &str, body| stack.adjusting("a", body).header("Idempotency-Key", key).send();

    // The lane is gone at once; that it was archived is looked up a few times a second.
    until("the instance knows why", async || undo_with(total.id(), "v").await.status != 503).await;
    undo_with(total.id(), "v").await.is(409, "sale-archived");
    undo_with(done.id(), "v").await.is(409, "sale-archived");
    let secret = stack.catalog.newest_secret().await.unwrap().unwrap();
    let key = secret.adjustment_key(&stack.lane().sale, &"never".parse().unwrap());
    let genuine = secret.adjustment_id(&stack.lane(), key).to_string();
    undo_with(&genuine, "v").await.is(404, "adjustment-not-found");
    let dry = json!({"delta": 1, "reason": "other", "dry_run": true});
    stack.adjusting("a", dry).send().await.is(409, "sale-archived");

    let again = undo_with(done.id(), "u").await;
    assert_eq!((again.status.as_u16(), &again.body), (200, &undo.body));
    undo_with(total.id(), "u").await.is(422, "idempotency-key-reused");
    let again = stack.setting_total("k", 9, "\"0\"").send().await;
    assert_eq!((again.status.as_u16(), &again.body), (200, &total.body));
    stack.setting_total("k", 8, "\"0\"").send().await.is(422, "idempotency-key-reused");
    let delta = json!({"delta": 4, "reason": "recount"});
    adjust_with("k", delta).await.is(422, "idempotency-key-reused");
    let original = adjust_with("l", json!({"delta": 3, "reason": "restock"})).await;
    assert_eq!(original.body["undone_by"], undo.id());
}
