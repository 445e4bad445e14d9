//! The reconciler: it raises no false alarm while orders run, and finds whatever is falsified.

use std::sync::Arc;

use futures_util::future::join_all;
use holdfast::domain::event::Cause;
use holdfast::domain::ids::OrderId;
use holdfast::lanes::command::Confirm;
use holdfast::reconciler::Reconciler;
use prometheus_client::registry::Registry;
use redis::AsyncCommands;
use tokio_util::sync::CancellationToken;

use crate::pipeline::{Pipeline, Role};
use crate::shopper::Shopper;
use crate::support::{metric, until};

const SHOPPERS: u64 = 6;
/// Scans that the test under load waits for.
const SCANS: f64 = 24.0;

/// A reconciler that runs, and what it tells of itself.
struct Reconciling {
    role: Role,
    registry: Arc<Registry>,
}

impl Reconciling {
    fn of(&self, name: &str) -> f64 {
        metric(&self.registry, &format!("holdfast_reconciliation_{name}"))
    }
}

impl Pipeline {
    /// It scans without a rest, in pages of `page` orders.
    fn reconciler(&self, pause_ms: u64, page: usize) -> Reconciling {
        let mut options = self.config.reconciler.clone();
        (options.pause_ms, options.time_share_max) = (pause_ms, 1.0);
        (options.page_max, options.page_pause_ms) = (page, 1);
        let mut registry = Registry::default();
        let reconciler = Reconciler::new(
            self.lanes.clone(),
            self.stack.ledger.clone(),
            self.catalog.clone(),
            options,
            &mut registry,
        );
        let stop = CancellationToken::new();
        let task = tokio::spawn(reconciler.run(stop.clone()));
        Reconciling { role: Role { stop, task }, registry: Arc::new(registry) }
    }

    /// What differs as of the last check: what and of whom, sorted.
    async fn open(&self) -> Vec<(String, String)> {
        let sql = "SELECT what, subject FROM reconciliations WHERE ended_at IS NULL ORDER BY 1, 2";
        sqlx::query_as(sql).fetch_all(&self.stack.pool).await.expect("rows")
    }

    fn key(&self, part: &str) -> String {
        format!("hf1:{{{}}}:{part}", self.lane)
    }

    /// Meddles with the database, what protects the ledger set aside.
    async fn meddle(&self, statement: String) {
        let statements = format!(
            "ALTER TABLE ledger DISABLE TRIGGER USER; {statement};
             ALTER TABLE ledger ENABLE TRIGGER USER"
        );
        let done = sqlx::raw_sql(sqlx::AssertSqlSafe(statements)).execute(&self.stack.pool).await;
        done.expect("the statements");
    }

    async fn until_open(&self, expected: &[(&str, &str)]) {
        until(&format!("{expected:?} is told"), || async {
            let open = self.open().await;
            let open = open.iter().map(|(what, subject)| (what.as_str(), subject.as_str()));
            open.eq(expected.iter().copied())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn while_orders_run_nothing_differs() {
    let pipeline = Pipeline::new("reconciled", 1).await;
    let (relay, writer) = (pipeline.relay(), pipeline.stack.writer());
    let (sweeper, reconcilers) =
        (pipeline.sweeper(), [pipeline.reconciler(10, 50), pipeline.reconciler(10, 20)]);
    let total = |name: &str| reconcilers.iter().map(|one| one.of(name)).sum::<f64>();
    let seed = u64::from(rand::random::<u32>());
    println!("seed {seed}");
    let (lanes, lane, secret) = (&pipeline.lanes, &pipeline.lane, &pipeline.stack.secret);
    let shop = async |number: u64| {
        let mut shopper = Shopper::new(lanes, lane, secret, &["sku"], seed + number);
        while total("scans_total") < SCANS {
            shopper.shop().await;
        }
    };
    let shopping = join_all((0..SHOPPERS).map(shop));
    let time = tokio::time::timeout(std::time::Duration::from_secs(120), shopping);
    time.await.expect("there are scans enough");

    let (suspected, undecided) = (total("suspected_total"), total("undecided_total"));
    let orders = pipeline.lanes.marks(lane).await.expect("marks").seq;
    println!("{} scans, {undecided} undecided; {orders} events", total("scans_total"));
    assert_eq!(suspected, 0.0, "seed {seed}: {:?}", pipeline.open().await);
    assert_eq!((undecided, total("failures_total")), (0.0, 0.0), "seed {seed}");
    assert_eq!(pipeline.stack.number("SELECT count(*) FROM reconciliations").await, 0);
    assert!(total("last_complete_timestamp_seconds") > 0.0);
    for reconciler in reconcilers {
        reconciler.role.stop().await;
    }
    sweeper.stop().await;
    pipeline.until_recorded().await;
    relay.stop().await;
    writer.stop().await;
}

/// Thirty orders of one unit for one buyer, ten of them confirmed, all recorded.
async fn at_rest(name: &str) -> (Pipeline, Vec<OrderId>) {
    let pipeline = Pipeline::new(name, 300).await;
    let (relay, writer) = (pipeline.relay(), pipeline.stack.writer());
    let ids: Vec<_> = pipeline.hold(30).await.into_iter().map(|order| order.id).collect();
    for id in &ids[..10] {
        let payment = "pay-1".parse().expect("a payment");
        let (id, lines, cause) = (id.clone(), Vec::new(), Cause::Caller);
        let confirm = Confirm { id, payment, lines, cause, trace: None };
        pipeline.lanes.confirm(confirm).await.expect("an answer");
    }
    pipeline.until_recorded().await;
    relay.stop().await;
    writer.stop().await;
    (pipeline, ids)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_falsified_in_redis_is_told_until_it_is_repaired() {
    let (pipeline, ids) = at_rest("in_redis").await;
    let reconciler = pipeline.reconciler(10, 100);
    let mut redis = pipeline.redis().await;
    let sold = ids[0].to_string();
    let field = ids[0].key().encode();

    // (what is meddled with, its field, its new value or none, what is told of it)
    let (stock, buyers, orders) =
        (pipeline.key("stock"), pipeline.key("buyers"), pipeline.key("orders"));
    let record: String = redis.hget(&orders, &field).await.expect("a record");
    let paid_by_another = record.replace("pay-1", "pay-2");
    let older = record.replacen(&format!("c {} ", seq_of(&record)), "c 2 ", 1);
    let counters = [("redis-counters", "sku"), ("redis-orders", "sku")];
    let order_and_sums =
        [("buyer-count", "u-1"), ("order", sold.as_str()), ("redis-orders", "sku")];
    let order = [("order", sold.as_str())];
    let buyer = [("buyer-count", "u-1")];
    let unreadable = [
        ("buyer-count", "u-1"),
        ("order", sold.as_str()),
        ("redis-orders", "sku"),
        ("unreadable", field.as_str()),
    ];
    for (key, field, value, told) in [
        (&stock, "sku", Some("999971 19 10 0  1000000"), &counters[..]),
        (&orders, field.as_str(), None, &order_and_sums[..]),
        (&orders, field.as_str(), Some(paid_by_another.as_str()), &order[..]),
        (&orders, field.as_str(), Some(older.as_str()), &order[..]),
        (&orders, field.as_str(), Some("nonsense"), &unreadable[..]),
        (&buyers, "u-1", Some("sku=29"), &buyer[..]),
        (&buyers, "u-1", None, &buyer[..]),
        (&buyers, "u-2", Some("sku=1"), &[("buyer-count", "u-2")][..]),
    ] {
        let was: Option<String> = redis.hget(key, field).await.expect("a value");
        assert_ne!(was.as_deref(), value);
        match value {
            Some(value) => redis.hset(key, field, value).await.expect("written"),
            None => redis.hdel(key, field).await.expect("written"),
        }
        println!("{key} {field} {value:?}");
        pipeline.until_open(told).await;
        until("the metric tells it", || async {
            reconciler.of("differences") == told.len() as f64
        })
        .await;
        match was {
            Some(was) => redis.hset(key, field, was).await.expect("written"),
            None => redis.hdel(key, field).await.expect("written"),
        }
        pipeline.until_open(&[]).await;
    }
    until("the metric tells it", || async { reconciler.of("differences") == 0.0 }).await;
    reconciler.role.stop().await;
}

fn seq_of(record: &str) -> &str {
    record.split(' ').nth(1).expect("a seq")
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_falsified_in_the_database_is_told_until_it_is_repaired() {
    let (pipeline, ids) = at_rest("in_database").await;
    let reconciler = pipeline.reconciler(10, 100);
    let id = ids[0].to_string();
    pipeline.meddle(format!("CREATE TABLE kept AS SELECT * FROM orders WHERE id = '{id}'")).await;
    let held = "FROM ledger WHERE event = 'holdfast.order.held'";
    pipeline.meddle(format!("CREATE TABLE kept_event AS SELECT * {held} LIMIT 1")).await;
    let redo =
        format!("DELETE FROM orders WHERE id = '{id}'; INSERT INTO orders SELECT * FROM kept");
    let without_row = format!("{} {}", pipeline.lane, ids[0].key().encode());
    let order = [("order", id.as_str())];
    let order_and_sum = [("order", id.as_str()), ("recorded-orders", "sku")];
    let row_gone = [("order", without_row.as_str()), ("recorded-orders", "sku")];
    let counters = [("ledger-fold", "sku"), ("recorded-orders", "sku"), ("redis-counters", "sku")];
    let lane = pipeline.lane.to_string();
    let event_gone = [("ledger-fold", "sku"), ("ledger-gap", lane.as_str())];
    let of_order = |change: &str| format!("UPDATE orders SET {change} WHERE id = '{id}'");
    let move_one = |sign: &str, back: &str| {
        format!("UPDATE counters SET held = held {sign} 1, available = available {back} 1")
    };
    for (meddled, repaired, told) in [
        (of_order("payment_id = 'pay-2'"), redo.clone(), &order[..]),
        (of_order("status = 'expired'"), redo.clone(), &order_and_sum[..]),
        (of_order("seq = seq + 100"), redo.clone(), &order[..]),
        (of_order("seq = seq - 1"), redo.clone(), &order[..]),
        (format!("DELETE FROM orders WHERE id = '{id}'"), redo.clone(), &row_gone[..]),
        (move_one("+", "-"), move_one("-", "+"), &counters[..]),
        (
            "DELETE FROM ledger WHERE seq = (SELECT seq FROM kept_event)".to_owned(),
            "INSERT INTO ledger SELECT * FROM kept_event".to_owned(),
            &event_gone[..],
        ),
    ] {
        println!("{meddled}");
        pipeline.meddle(meddled).await;
        pipeline.until_open(told).await;
        pipeline.meddle(repaired).await;
        pipeline.until_open(&[]).await;
    }
    let ended = "SELECT count(*) FROM reconciliations WHERE ended_at >= first_seen_at";
    assert_eq!(pipeline.stack.number(ended).await, 12, "each stays as a row that has ended");
    reconciler.role.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_differs_once_is_not_told() {
    let (pipeline, _) = at_rest("once").await;
    let mut redis = pipeline.redis().await;
    let buyers = pipeline.key("buyers");
    let _: () = redis.hset(&buyers, "u-1", "sku=29").await.expect("written");
    // It is looked at again after three seconds: time enough to repair it.
    let reconciler = pipeline.reconciler(3_000, 100);
    until("it is seen once", || async { reconciler.of("suspected_total") == 1.0 }).await;
    let _: () = redis.hset(&buyers, "u-1", "sku=30").await.expect("written");
    until("it was looked at again", || async { reconciler.of("scans_total") >= 3.0 }).await;
    assert_eq!(pipeline.stack.number("SELECT count(*) FROM reconciliations").await, 0);
    reconciler.role.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lane_that_another_instance_reconciles_is_left_to_it() {
    let (pipeline, _) = at_rest("locked").await;
    let lock = pipeline.stack.ledger.lock_for_reconciling(&pipeline.lane).await.expect("an answer");
    let lock = lock.expect("nobody else has it");
    let reconciler = pipeline.reconciler(10, 100);
    until("it went round", || async { reconciler.of("last_complete_timestamp_seconds") > 0.0 })
        .await;
    assert_eq!(reconciler.of("scans_total"), 0.0);
    lock.release().await.expect("released");
    until("its turn has come", || async { reconciler.of("scans_total") > 0.0 }).await;
    reconciler.role.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_lane_is_left_to_recovery() {
    let (pipeline, _) = at_rest("frozen").await;
    let mut redis = pipeline.redis().await;
    let (lane, buyers) = (pipeline.key("lane"), pipeline.key("buyers"));
    let _: () = redis.hset(&lane, "frozen", "operator").await.expect("written");
    let _: () = redis.hset(&buyers, "u-1", "sku=29").await.expect("written");
    let reconciler = pipeline.reconciler(300, 100);
    // Whoever has the lock is at the lane.
    let is_visited = async || {
        let lock = pipeline.stack.ledger.lock_for_reconciling(&pipeline.lane).await;
        match lock.expect("an answer") {
            Some(lock) => {
                lock.release().await.expect("released");
                false
            }
            None => true,
        }
    };
    for _ in 0..3 {
        until("it looks at the lane", &is_visited).await;
        until("it has looked", || async { !is_visited().await }).await;
    }
    assert_eq!((reconciler.of("scans_total"), reconciler.of("suspected_total")), (0.0, 0.0));
    assert!(pipeline.open().await.is_empty());
    let _: () = redis.hset(&lane, "frozen", "").await.expect("written");
    until("it is told", || async { !pipeline.open().await.is_empty() }).await;
    reconciler.role.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn differences_that_ended_long_ago_are_forgotten() {
    let (pipeline, _) = at_rest("forgotten").await;
    pipeline
        .meddle(
            "INSERT INTO reconciliations (sale_id, lane, what, subject, detail, ended_at)
             VALUES ('s', 0, 'order', 'old', '', now() - interval '91 days'),
               ('s', 0, 'order', 'younger', '', now() - interval '89 days'),
               ('s', 0, 'order', 'open', '', NULL)"
                .to_owned(),
        )
        .await;
    let reconciler = pipeline.reconciler(10, 100);
    until("the old is gone", || async {
        pipeline.stack.number("SELECT count(*) FROM reconciliations WHERE sale_id = 's'").await == 2
    })
    .await;
    reconciler.role.stop().await;
}
