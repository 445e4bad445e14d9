//! Whether the books agree: while the sale runs, and after somebody has meddled with them.

use futures_util::future::join_all;
use holdfast::lanes::Reached;
use redis::AsyncCommands;
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};

use crate::shopper::Shopper;
use crate::stack::{Reply, Stack};

const SHOPPERS: u64 = 6;
const ORDERS_EACH: u32 = 600;

async fn conservation(stack: &Stack) -> Reply {
    let reply = stack.get(&format!("/v1/sales/{}/conservation", stack.sale)).send().await;
    assert_eq!(reply.status, 200, "{reply:?}");
    reply
}

/// What differs, sorted.
async fn differences(stack: &Stack) -> Vec<String> {
    let reply = conservation(stack).await;
    let differences = reply.body["differences"].as_array().unwrap();
    assert_eq!(reply.body["holds"], differences.is_empty(), "{reply:?}");
    let mut whats: Vec<_> =
        differences.iter().map(|one| one["what"].as_str().unwrap().to_owned()).collect();
    whats.sort();
    whats
}

async fn redis() -> redis::aio::MultiplexedConnection {
    let url = std::env::var("REDIS_URL").expect("REDIS_URL names a real server");
    redis::Client::open(url).unwrap().get_multiplexed_async_connection().await.unwrap()
}

pub async fn database(stack: &Stack) -> PgConnection {
    let url = std::env::var("DATABASE_URL").expect("DATABASE_URL names a real server");
    let options: sqlx::postgres::PgConnectOptions = url.parse().unwrap();
    let options = options.options([("search_path", stack.schema.as_str())]);
    PgConnection::connect_with(&options).await.unwrap()
}

/// Meddles with the database, what protects the ledger set aside.
async fn meddle(stack: &Stack, statements: &'static str) {
    let mut connection = database(stack).await;
    for sql in [
        "ALTER TABLE ledger DISABLE TRIGGER USER",
        statements,
        "ALTER TABLE ledger ENABLE TRIGGER USER",
    ] {
        sqlx::raw_sql(sql).execute(&mut connection).await.unwrap();
    }
}

fn key(stack: &Stack, part: &str) -> String {
    format!("hf1:{{{}/0}}:{part}", stack.sale)
}

#[tokio::test]
async fn the_books_agree_in_every_state_while_orders_run() {
    let stack = Stack::new("running").await;
    let skus = json!([{"sku": "a", "stock": 2_000}, {"sku": "b", "stock": 4_000}]);
    stack.define(1, json!({"skus": skus, "hold_seconds": 1})).await;
    let secret = stack.catalog.newest_secret().await.unwrap().unwrap();
    let seed: u64 = u64::from(rand::random::<u32>());
    println!("seed {seed}");
    let shop = async |number: u64| {
        let mut shopper =
            Shopper::new(&stack.lanes, &stack.lane(), &secret, &["a", "b"], seed + number);
        for _ in 0..ORDERS_EACH {
            shopper.shop().await;
        }
    };
    let sweep = async {
        loop {
            stack.lanes.expire(&stack.lane(), 256).await.unwrap();
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    let (mut polls, mut on_their_way) = (0, 0);
    let poll = async {
        loop {
            let reply = conservation(&stack).await;
            let told = (&reply.body["holds"], &reply.body["undecided"]);
            assert!(told == (&json!(true), &Value::Null), "seed {seed}: {reply:?}");
            polls += 1;
            let unrecorded = reply.body["skus"][0]["unrecorded_events"].as_u64().unwrap();
            on_their_way += u64::from(unrecorded > 0);
        }
    };
    let shopped = stack.recording(join_all((0..SHOPPERS).map(shop)));
    tokio::select! {
        _ = shopped => {}
        () = poll => {}
        () = sweep => {}
    }
    println!("{polls} looks, {on_their_way} of them with events on their way");
    assert!(on_their_way > 10, "a look at books at rest proves nothing");

    stack.record().await;
    let reply = conservation(&stack).await;
    assert_eq!(reply.body["holds"], true, "{reply:?}");
    for sku in reply.body["skus"].as_array().unwrap() {
        assert_eq!(sku["unrecorded_events"], 0);
        assert_eq!((&sku["redis"], &sku["database"]), (&sku["ledger"], &sku["redis"]));
        assert_eq!(sku["orders"]["sold"], sku["redis"]["sold"]);
        assert!(sku["redis"]["sold"].as_i64().unwrap() > 100, "{sku}");
    }
    let by_a_shop = stack.call(
        Method::GET,
        &format!("/v1/sales/{}/conservation", stack.sale),
        &stack.orders_key,
    );
    by_a_shop.send().await.is(403, "forbidden");
    stack.get("/v1/sales/nobody/conservation").send().await.is(404, "sale-not-found");
}

#[tokio::test]
async fn each_book_that_is_falsified_is_found() {
    let stack = Stack::new("falsified").await;
    stack.define(100, json!({})).await;
    for buyer in 0..6 {
        let id = stack.hold(&format!("u-{buyer}")).await;
        if buyer < 3 {
            assert_eq!(stack.confirm(&id, "p").await.status, 200);
        }
    }
    stack.record().await;
    stack.hold("on-its-way").await;
    assert_eq!(differences(&stack).await, [""; 0]);

    let mut redis = redis().await;
    let was: String = redis.hget(key(&stack, "stock"), "a").await.unwrap();
    assert_eq!(was, "93 4 3 0  100");
    for meddled in ["94 4 3 0  100", "93 3 4 0  100", "92 4 3 0  100"] {
        let _: () = redis.hset(key(&stack, "stock"), "a", meddled).await.unwrap();
        assert_eq!(differences(&stack).await, ["redis-counters"], "{meddled}");
    }
    let _: () = redis.hset(key(&stack, "stock"), "a", was).await.unwrap();

    let counters = "UPDATE counters SET available = available + 1, held = held - 1";
    let back = "UPDATE counters SET available = available - 1, held = held + 1";
    meddle(&stack, counters).await;
    let all = ["ledger-fold", "recorded-orders", "redis-counters"];
    assert_eq!(differences(&stack).await, all);
    meddle(&stack, back).await;

    meddle(
        &stack,
        "UPDATE orders SET status = 'cancelled' WHERE status = 'held' AND buyer_id = 'u-5'",
    )
    .await;
    assert_eq!(differences(&stack).await, ["recorded-orders"]);
    meddle(&stack, "UPDATE orders SET status = 'held' WHERE status = 'cancelled'").await;

    meddle(&stack, "CREATE TABLE gone AS SELECT * FROM ledger WHERE event = 'holdfast.order.confirmed' ORDER BY seq LIMIT 1; DELETE FROM ledger WHERE seq = (SELECT seq FROM gone)").await;
    assert_eq!(differences(&stack).await, ["ledger-fold", "ledger-gap"]);
    meddle(&stack, "INSERT INTO ledger SELECT * FROM gone").await;
    assert_eq!(differences(&stack).await, [""; 0]);

    // Redis loses the tail of what is recorded, and counts on from there.
    stack.record().await;
    let seq: i64 = redis.hget(key(&stack, "lane"), "seq").await.unwrap();
    for mark in ["seq", "logged", "recorded"] {
        let _: () = redis.hset(key(&stack, "lane"), mark, seq - 1).await.unwrap();
    }
    let found = differences(&stack).await;
    assert!(found.contains(&"lane-behind".to_owned()), "{found:?}");
}

#[tokio::test]
async fn what_cannot_be_compared_is_undecided() {
    let stack = Stack::with("undecided", |config| config.lanes.outbox_events_max = 1_000).await;
    stack.define(1_000, json!({})).await;
    stack.record().await;
    let hold = async |number: usize| stack.hold(&format!("u-{number}")).await;
    join_all((0..520).map(hold)).await;
    assert_eq!(conservation(&stack).await.body["holds"], true);

    // Kafka has it all, the database nothing: over half full, the outbox is trimmed up to `logged`.
    let marks = stack.lanes.marks(&stack.lane()).await.unwrap();
    let (epoch, logged) = (marks.epoch, marks.seq);
    let logged = Reached { epoch, logged, recorded: marks.recorded, acknowledged: logged };
    let lease = std::time::Duration::from_secs(5);
    stack.lanes.advance(&stack.lane(), logged, "test", lease).await.unwrap();
    let reply = conservation(&stack).await;
    assert_eq!(reply.body["holds"], Value::Null, "{reply:?}");
    assert!(reply.body["undecided"].as_str().unwrap().contains("events 2 to 521"), "{reply:?}");

    // What can be compared still is.
    meddle(&stack, "UPDATE counters SET available = available + 1, total = total + 1").await;
    assert_eq!(differences(&stack).await, ["ledger-fold"]);
}

#[tokio::test]
async fn an_archived_sale_is_compared_without_redis() {
    let stack = Stack::new("archived").await;
    stack.define(5, json!({"retention_days": 0})).await;
    let id = stack.hold("u").await;
    stack.confirm(&id, "p").await;
    stack.archive().await;
    stack.catalog.refresh().await.unwrap();
    let reply = conservation(&stack).await;
    assert_eq!(reply.body["holds"], true, "{reply:?}");
    let sku = &reply.body["skus"][0];
    assert_eq!((&sku["redis"], &sku["database"]["sold"]), (&Value::Null, &json!(1)));
    meddle(&stack, "UPDATE counters SET sold = sold + 1, total = total + 1").await;
    assert_eq!(differences(&stack).await, ["ledger-fold", "recorded-orders"]);
}

#[tokio::test]
async fn a_lane_that_is_gone_is_frozen() {
    let stack = Stack::new("gone").await;
    stack.define(5, json!({})).await;
    stack.record().await;
    let mut redis = redis().await;
    let _: () = redis.del(key(&stack, "lane")).await.unwrap();
    let reply = stack.get(&format!("/v1/sales/{}/conservation", stack.sale)).send().await;
    reply.is(503, "lane-frozen");
}
