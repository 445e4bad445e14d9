//! Dead letters, as operators see them.

use std::borrow::Cow;

use holdfast::bus::record::{Record, encode};
use holdfast::domain::event::Event;
use holdfast::ledger::{Batch, DeadLetter, DeadReason, Parked, Place, StoredRecord};
use reqwest::Method;
use serde_json::{Value, json};

use crate::stack::{Reply, Stack};

fn stored(record: Record, offset: i64) -> StoredRecord {
    let header =
        |(name, value): (&str, Cow<'_, str>)| (name.to_owned(), value.into_owned().into_bytes());
    StoredRecord {
        topic: "t".to_owned(),
        partition: 0,
        offset,
        headers: record.headers.into_iter().map(header).collect(),
        payload: record.payload,
    }
}

fn letter(event: &Event, reason: DeadReason, offset: i64) -> DeadLetter {
    let Event { lane, epoch, seq, .. } = event;
    let place = Some(Place { lane: lane.clone(), epoch: *epoch, seq: *seq });
    let record = stored(encode(event), offset);
    DeadLetter { reason, detail: "as it was".to_owned(), place, record }
}

fn alien(offset: i64, payload: Vec<u8>) -> DeadLetter {
    let headers = vec![("h".to_owned(), b"v".to_vec()), ("b".to_owned(), vec![255])];
    let record = StoredRecord { topic: "t".to_owned(), partition: 1, offset, headers, payload };
    DeadLetter { reason: DeadReason::Undecodable, detail: "?".to_owned(), place: None, record }
}

async fn bury(stack: &Stack, dead: Vec<DeadLetter>) {
    stack.ledger.apply(&Batch { dead, ..Batch::default() }).await.unwrap();
}

async fn list(stack: &Stack, query: &str) -> Reply {
    let reply = stack.get(&format!("/v1/dead-letters{query}")).send().await;
    assert_eq!(reply.status, 200, "{reply:?}");
    reply
}

fn ids(reply: &Reply) -> Vec<String> {
    let letters = reply.body["dead_letters"].as_array().unwrap();
    letters.iter().map(|letter| letter["id"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn only_operators_see_dead_letters_and_an_unknown_one_is_not_found() {
    let stack = Stack::new("letters").await;
    let paths = [
        (Method::GET, "/v1/dead-letters"),
        (Method::GET, "/v1/dead-letters/1"),
        (Method::POST, "/v1/dead-letters/1/retry"),
        (Method::POST, "/v1/dead-letters/1/discard"),
    ];
    for (method, path) in paths {
        stack.call(method.clone(), path, "").send().await.is(401, "unauthenticated");
        stack.call(method, path, &stack.orders_key).send().await.is(403, "forbidden");
    }
    for id in ["1", "0", "-1", "99999999999999999999", "x"] {
        let path = format!("/v1/dead-letters/{id}");
        stack.get(&path).send().await.is(404, "dead-letter-not-found");
        for verb in ["retry", "discard"] {
            let reply = stack.post(&format!("{path}/{verb}")).send().await;
            reply.is(404, "dead-letter-not-found");
        }
    }
    for (query, pointer) in [
        ("?status=lost", "/status"),
        ("?limit=0", "/limit"),
        ("?limit=201", "/limit"),
        ("?cursor=x", "/cursor"),
        ("?sale_id=x", "/sale_id"),
    ] {
        let reply = stack.get(&format!("/v1/dead-letters{query}")).send().await;
        reply.is(400, "invalid-request");
        assert_eq!(reply.pointers(), [pointer]);
    }
    let noted = |body: Value| stack.post("/v1/dead-letters/1/discard").json(body).send();
    noted(json!({"note": ""})).await.is(400, "invalid-request");
    noted(json!({"nota": "x"})).await.is(400, "invalid-request");
}

#[tokio::test]
async fn a_list_is_newest_first_in_pages_and_shows_records_as_people_read_them() {
    let stack = Stack::new("pages").await;
    bury(&stack, (0..5).map(|offset| alien(offset, vec![b'a' + offset as u8])).collect()).await;
    let all = ids(&list(&stack, "").await);
    assert_eq!(all.len(), 5);
    let numbers: Vec<i64> = all.iter().map(|id| id.parse().unwrap()).collect();
    assert!(numbers.is_sorted_by(|a, b| a > b), "{numbers:?}");
    let (mut paged, mut query) = (Vec::new(), "?limit=2".to_owned());
    loop {
        let page = list(&stack, &query).await;
        paged.extend(ids(&page));
        let Some(cursor) = page.body["next_cursor"].as_str() else { break };
        query = format!("?limit=2&cursor={cursor}");
    }
    assert_eq!(paged, all);

    let path = format!("/v1/dead-letters/{}/discard", all[4]);
    let discarded = stack.post(&path).json(json!({"note": "not ours"})).send().await;
    assert_eq!(discarded.status, 200, "{discarded:?}");
    assert_eq!(ids(&list(&stack, "?status=open").await), all[..4]);
    assert_eq!(ids(&list(&stack, "?status=discarded").await), all[4..]);
    assert_eq!(ids(&list(&stack, "?status=retried").await), [""; 0]);
    assert_eq!(stack.post(&path).send().await.body, discarded.body, "the first word counts");
    let shown = &discarded.body;
    assert_eq!((&shown["status"], &shown["reason"]), (&json!("discarded"), &json!("undecodable")));
    assert_eq!((&shown["actor"], &shown["note"]), (&json!("operator"), &json!("not ours")));
    assert!(shown["resolved_at"].is_string() && shown["created_at"].is_string());
    assert_eq!((&shown["seq"], &shown["blocks_lane"]), (&Value::Null, &json!(false)));
    assert_eq!(
        (&shown["topic"], &shown["partition"], &shown["offset"]),
        (&json!("t"), &json!(1), &json!(0))
    );
    let headers = json!([{"name": "h", "text": "v"}, {"name": "b", "base64": "/w=="}]);
    assert_eq!((&shown["headers"], &shown["payload"]), (&headers, &json!({"text": "a"})));
    stack.post(&path.replace("discard", "retry")).send().await.is(409, "dead-letter-resolved");
}

#[tokio::test]
async fn a_list_stays_small_whatever_the_records_are() {
    let stack = Stack::new("large").await;
    let mut large = alien(0, vec![b'x'; 900_000]);
    large.record.headers[0].1 = vec![b'y'; 100_000];
    large.detail = "z".repeat(500_000);
    bury(&stack, vec![large, alien(1, vec![0])]).await;
    let listed = list(&stack, "").await;
    let (small, large) = (&listed.body["dead_letters"][0], &listed.body["dead_letters"][1]);
    assert_eq!((&small["truncated"], &small["payload"]), (&json!(false), &json!({"text": "\0"})));
    assert_eq!((&large["truncated"], &large["headers"]), (&json!(true), &json!([])));
    assert!(listed.body.to_string().len() < 40_000);
    let whole = stack.get(&format!("/v1/dead-letters/{}", large["id"].as_str().unwrap()));
    let whole = whole.send().await.body;
    assert_eq!(whole["payload"]["text"].as_str().map(str::len), Some(900_000));
    assert_eq!(whole["headers"][0]["text"].as_str().map(str::len), Some(100_000));
    assert_eq!(whole["truncated"], false);
}

#[tokio::test]
async fn a_retry_records_the_event_and_what_was_parked_behind_it() {
    let stack = Stack::new("retried").await;
    stack.define(5, json!({})).await;
    stack.record().await;
    for buyer in ["a", "b", "c"] {
        stack.hold(buyer).await;
    }
    let events = stack.unrecorded().await;
    let parked = |event: &Event| Parked {
        lane: event.lane.clone(),
        seq: event.seq,
        record: stored(encode(event), event.seq as i64),
    };
    let batch = Batch {
        dead: vec![letter(&events[0], DeadReason::NotApplicable, 0)],
        park: events[1..].iter().map(parked).collect(),
        ..Batch::default()
    };
    stack.ledger.apply(&batch).await.unwrap();
    let shown = list(&stack, "").await.body["dead_letters"][0].clone();
    assert_eq!((&shown["sale_id"], &shown["lane"]), (&json!(stack.sale), &json!(0)));
    assert_eq!((&shown["epoch"], &shown["seq"]), (&json!(1), &json!(events[0].seq)));
    assert_eq!(shown["blocks_lane"], true);
    let path = format!("/v1/dead-letters/{}", shown["id"].as_str().unwrap());

    let refused = stack.post(&format!("{path}/discard")).send().await;
    refused.is(409, "discard-needs-rebuild");
    assert_eq!(refused.body["dead_letter"], shown);
    let retry = || stack.post(&format!("{path}/retry")).json(json!({"note": "mended"})).send();
    let done = retry().await;
    assert_eq!(done.status, 200, "{done:?}");
    assert_eq!((&done.body["status"], &done.body["retries"]), (&json!("retried"), &json!(1)));
    assert_eq!((&done.body["actor"], &done.body["note"]), (&json!("operator"), &json!("mended")));
    let orders = stack.get(&format!("/v1/orders?sale_id={}", stack.sale)).send().await;
    assert_eq!(orders.body["orders"].as_array().unwrap().len(), 3, "{orders:?}");
    assert_eq!(retry().await.body, done.body, "again is the same");
    stack.post(&format!("{path}/discard")).send().await.is(409, "dead-letter-resolved");
    assert_eq!(stack.get(&path).send().await.body, done.body);
}

#[tokio::test]
async fn a_retry_that_still_cannot_be_applied_stays_open_and_says_why() {
    let stack = Stack::new("kept").await;
    stack.define(5, json!({})).await;
    stack.record().await;
    stack.hold("a").await;
    stack.hold("b").await;
    let events = stack.unrecorded().await;
    bury(&stack, vec![letter(&events[1], DeadReason::NotApplicable, 0), alien(1, vec![1])]).await;
    let ids = ids(&list(&stack, "").await);
    for (id, reason, retries) in
        [(&ids[1], "waiting", 1), (&ids[0], "undecodable", 1), (&ids[1], "waiting", 2)]
    {
        let reply = stack.post(&format!("/v1/dead-letters/{id}/retry")).send().await;
        reply.is(409, "dead-letter-not-applicable");
        let letter = &reply.body["dead_letter"];
        assert_eq!((&letter["status"], &letter["reason"]), (&json!("open"), &json!(reason)));
        assert_eq!((&letter["retries"], &letter["resolved_at"]), (&json!(retries), &Value::Null));
        assert!(reply.body["detail"].as_str().unwrap().starts_with(reason), "{reply:?}");
        assert!(letter["retried_at"].is_string());
    }
}
