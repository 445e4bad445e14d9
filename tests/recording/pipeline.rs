//! The background roles together: lane → outbox → Kafka → database, and overdue holds back on sale.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::time::Duration;

use crate::support::{Stack, actor, metric, unique, until};
use futures_util::future::join_all;
use holdfast::bus::producer::Producer;
use holdfast::config::{self, Config};
use holdfast::domain::event::Cause;
use holdfast::domain::ids::LaneId;
use holdfast::domain::order::Order;
use holdfast::domain::sale::Definition;
use holdfast::lanes::command::{Confirm, Define, Reserve};
use holdfast::lanes::reply::{Defined, Frozen, Reserved, Stamped};
use holdfast::lanes::{LaneError, Lanes};
use holdfast::ledger::catalog::CatalogMetrics;
use holdfast::ledger::{Catalog, digest};
use holdfast::relay::Relay;
use holdfast::sweeper::Sweeper;
use prometheus_client::registry::Registry;
use redis::AsyncCommands;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// One sale with its lane in Redis, and the roles on demand.
pub struct Pipeline {
    pub stack: Stack,
    pub lanes: Lanes,
    pub catalog: Catalog,
    pub lane: LaneId,
    pub config: Config,
}

/// A role that runs until stopped.
pub struct Role {
    pub stop: CancellationToken,
    pub task: JoinHandle<()>,
}

impl Role {
    pub async fn stop(self) {
        self.stop.cancel();
        self.task.await.expect("the role ends");
    }

    /// As a process that is killed: nothing is told to anybody.
    fn abort(self) {
        self.task.abort();
    }
}

impl Pipeline {
    pub async fn new(name: &str, hold_seconds: u32) -> Self {
        let stack = Stack::new(name).await;
        let mut config = Config::load(None).expect("the defaults");
        config.redis.url = std::env::var("REDIS_URL").expect("REDIS_URL names a real server");
        config.relay.lease_ms = 1_000;
        config.kafka = stack.kafka.clone();
        config.writer.group = stack.group.clone();
        let mut registry = Registry::default();
        let lanes = Lanes::new(&config.redis, &config.lanes, &mut registry).expect("a Redis URL");
        let metrics = CatalogMetrics::register(&mut registry);
        let catalog = Catalog::new(stack.ledger.clone(), &config.catalog, metrics);
        let lane = LaneId { sale: unique("sale").parse().expect("a sale id"), lane: 0 };
        stack.ledger.begin_definition(&lane.sale, &[1], 1).await.expect("the sale's rows");
        let skus = r#"[{"sku": "sku", "stock": 1000000}]"#;
        let text = format!(r#"{{"name": "n", "hold_seconds": {hold_seconds}, "skus": {skus}}}"#);
        let definition: Definition = serde_json::from_str(&text).expect("a definition");
        let definition = definition.check().expect("a possible definition");
        let define = Define {
            version: 1,
            create_epoch: Some(1),
            digest: digest(&definition),
            definition: definition.clone(),
            actor: actor(),
            trace: None,
        };
        let defined = lanes.define(&lane, define).await.expect("the lane");
        assert_eq!(defined.outcome, Defined::Defined);
        let lock = stack.ledger.lock_sale(&lane.sale).await.expect("the lock");
        lock.commit_definition(1, &definition, &actor()).await.expect("the definition");
        catalog.refresh().await.expect("the catalog");
        Self { stack, lanes, catalog, lane, config }
    }

    pub async fn reserve(&self, key: &str) -> Stamped<Reserved> {
        self.reserve_for(key, None).await
    }

    pub async fn reserve_for(&self, key: &str, hold_seconds: Option<u32>) -> Stamped<Reserved> {
        let buyer = "u-1".parse().expect("a buyer");
        let key = key.parse().expect("a key");
        let key = self.stack.secret.order_key(&self.lane.sale, &buyer, &key);
        let id = self.stack.secret.order_id(&self.lane, key);
        let lines = serde_json::from_str(r#"[{"sku": "sku", "quantity": 1}]"#).expect("lines");
        let trace = Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".to_owned());
        let reserve = Reserve { id, buyer, lines, hold_seconds, trace };
        self.lanes.reserve(reserve).await.expect("an answer")
    }

    pub async fn hold(&self, orders: usize) -> Vec<Order> {
        let keys: Vec<_> = (0..orders).map(|_| unique("k")).collect();
        let answers = join_all(keys.iter().map(|key| self.reserve(key))).await;
        let held = |answer: Stamped<Reserved>| match answer.outcome {
            Reserved::Held(order) => order,
            other => panic!("{other:?}"),
        };
        answers.into_iter().map(held).collect()
    }

    pub fn relay(&self) -> Role {
        self.relay_told(&mut Registry::default())
    }

    /// A relay that tells of itself there.
    pub fn relay_told(&self, registry: &mut Registry) -> Role {
        let producer = Producer::new(&self.stack.kafka).expect("a producer");
        let relay = Relay::new(
            self.lanes.clone(),
            self.catalog.clone(),
            self.stack.ledger.clone(),
            producer,
            &self.config,
            registry,
        );
        let stop = CancellationToken::new();
        let token = stop.clone();
        let task = tokio::spawn(async move { relay.run(token).await.expect("the relay") });
        Role { stop, task }
    }

    pub fn sweeper(&self) -> Role {
        let options = config::Sweeper { batch_max: 256, archive_check_ms: 100 };
        let (lanes, catalog) = (self.lanes.clone(), self.catalog.clone());
        let sweeper = Sweeper::new(lanes, catalog, options, &mut Registry::default());
        let stop = CancellationToken::new();
        let token = stop.clone();
        Role { stop, task: tokio::spawn(sweeper.run(token)) }
    }

    /// Waits until the lane itself knows that all of it is recorded, then checks the books.
    pub async fn until_recorded(&self) {
        until("the lane is recorded", || async {
            let marks = self.lanes.marks(&self.lane).await.expect("marks");
            marks.recorded == marks.seq && marks.logged == marks.seq
        })
        .await;
        self.stack.check_books().await;
        assert_eq!(self.stack.dead_letters().await, [""; 0]);
    }

    pub async fn redis(&self) -> redis::aio::MultiplexedConnection {
        let client = redis::Client::open(self.config.redis.url.as_str()).expect("a Redis URL");
        client.get_multiplexed_async_connection().await.expect("Redis")
    }

    /// All of the lane as Redis has it now.
    pub async fn image(&self) -> Vec<(String, Vec<u8>)> {
        let mut redis = self.redis().await;
        let pattern = format!("hf1:{{{}}}:*", self.lane);
        let keys: Vec<String> = redis.keys(pattern).await.expect("keys");
        assert!(!keys.is_empty());
        let mut image = Vec::new();
        for key in keys {
            let value = redis::cmd("DUMP").arg(&key).query_async(&mut redis).await.expect("a dump");
            image.push((key, value));
        }
        image
    }

    /// Makes Redis forget what happened since, as after a crash with `appendfsync everysec`.
    pub async fn restore(&self, image: &[(String, Vec<u8>)]) {
        let mut redis = self.redis().await;
        let pattern = format!("hf1:{{{}}}:*", self.lane);
        let keys: Vec<String> = redis.keys(pattern).await.expect("keys");
        let mut pipe = redis::pipe();
        pipe.atomic().del(keys).ignore();
        for (key, value) in image {
            pipe.cmd("RESTORE").arg(key).arg(0).arg(value).ignore();
        }
        pipe.exec_async(&mut redis).await.expect("restored");
    }

    /// As a new process, which has seen nothing of any lane.
    fn forget_what_was_seen(&mut self) {
        let lanes = Lanes::new(&self.config.redis, &self.config.lanes, &mut Registry::default());
        self.lanes = lanes.expect("a Redis URL");
    }

    async fn outbox_entries(&self) -> usize {
        let wait = Duration::from_millis(1);
        let from = [(self.lane.clone(), 0, 0)];
        let found = self.lanes.read_outboxes(&from, 1_000, wait).await.expect("the outbox");
        found.into_iter().map(|(_, entries)| entries.len()).sum()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_happened_is_recorded_and_leaves_the_outbox() {
    let pipeline = Pipeline::new("recorded", 300).await;
    let orders = pipeline.hold(500).await;
    for order in &orders[..100] {
        let payment = "pay-1".parse().expect("a payment");
        let (id, lines, cause) = (order.id.clone(), Vec::new(), Cause::Caller);
        let confirm = Confirm { id, payment, lines, cause, trace: None };
        pipeline.lanes.confirm(confirm).await.expect("an answer");
    }
    assert!(pipeline.outbox_entries().await > 0);
    let (relay, writer) = (pipeline.relay(), pipeline.stack.writer());
    pipeline.until_recorded().await;
    assert_eq!(pipeline.outbox_entries().await, 0);
    let confirmed = "SELECT count(*) FROM orders WHERE status = 'confirmed'";
    assert_eq!(pipeline.stack.number(confirmed).await, 100);
    let traced = "SELECT count(*) FROM ledger WHERE trace_id = '0af7651916cd43dd8448eb211c80319c'";
    assert_eq!(pipeline.stack.number(traced).await, 500);
    relay.stop().await;
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_is_killed_is_followed_by_the_other_and_nothing_is_recorded_twice() {
    let pipeline = Pipeline::new("relays", 300).await;
    let writer = pipeline.stack.writer();
    let (first, second) = (pipeline.relay(), pipeline.relay());
    pipeline.hold(300).await;
    first.abort();
    pipeline.hold(300).await;
    pipeline.until_recorded().await;
    let orders = "SELECT count(*) FROM orders WHERE status = 'held'";
    assert_eq!(pipeline.stack.number(orders).await, 600);
    second.stop().await;
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_goes_on_behind_what_was_trimmed_before_it_could_read_it() {
    let mut pipeline = Pipeline::new("trimmed", 300).await;
    let first = pipeline.relay();
    // One by one, so that each is an entry of the outbox.
    for order in 0..300 {
        pipeline.reserve(&format!("k-{order}")).await;
    }
    until("Kafka has all of the lane", || async {
        let marks = pipeline.lanes.marks(&pipeline.lane).await.expect("marks");
        marks.logged == marks.seq
    })
    .await;
    first.abort();
    // What nobody told the lane is recorded: the next relay begins at its first event.
    let seq = pipeline.lanes.marks(&pipeline.lane).await.expect("marks").seq;
    let writer = pipeline.stack.writer();
    until("all of it is recorded", || async {
        pipeline.stack.recorded(&pipeline.lane).await == Some(seq)
    })
    .await;
    // It reads slowly, and hears from the database long before it is through.
    pipeline.config.relay.read_max = 1;
    let second = pipeline.relay();
    until("the lane knows that it is recorded", || async {
        pipeline.lanes.marks(&pipeline.lane).await.expect("marks").recorded == seq
    })
    .await;
    pipeline.hold(10).await;
    pipeline.until_recorded().await;
    second.stop().await;
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fresh_fleet_that_has_seen_nothing_learns_from_the_database_that_a_lane_lost_what_is_recorded()
 {
    let mut pipeline = Pipeline::new("behind", 300).await;
    let (relay, writer) = (pipeline.relay(), pipeline.stack.writer());
    pipeline.hold(5).await;
    pipeline.until_recorded().await;
    // By its own marks it lacks nothing.
    let image = pipeline.image().await;
    pipeline.hold(50).await;
    pipeline.until_recorded().await;
    relay.stop().await;
    pipeline.restore(&image).await;

    pipeline.forget_what_was_seen();
    assert!(pipeline.lanes.marks(&pipeline.lane).await.is_ok(), "nobody knows of more so far");
    let relay = pipeline.relay();
    until("the lane is frozen", || async {
        matches!(pipeline.lanes.marks(&pipeline.lane).await, Err(LaneError::Frozen(Frozen::Behind)))
    })
    .await;
    assert_eq!(pipeline.stack.number("SELECT count(*) FROM orders").await, 55);
    relay.stop().await;
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_lane_has_that_lost_its_tail_is_not_sent_again_and_again() {
    let mut pipeline = Pipeline::new("tail", 300).await;
    let (relay, writer) = (pipeline.relay(), pipeline.stack.writer());
    pipeline.hold(5).await;
    pipeline.until_recorded().await;
    relay.stop().await;
    // In its outbox alone.
    pipeline.hold(5).await;
    let image = pipeline.image().await;
    let relay = pipeline.relay();
    pipeline.hold(50).await;
    pipeline.until_recorded().await;
    relay.stop().await;
    pipeline.restore(&image).await;

    pipeline.forget_what_was_seen();
    let mut registry = Registry::default();
    let relay = pipeline.relay_told(&mut registry);
    let is_behind = || metric(&registry, "holdfast_relay_lanes_behind") > 0.0;
    until("the relay knows", || async { is_behind() }).await;
    let lane = format!("hf1:{{{}}}:lane", pipeline.lane);
    let redis = pipeline.redis().await;
    let leases = RefCell::new(BTreeSet::new());
    let until_renewed = async |times: usize| {
        let enough = leases.borrow().len() + times;
        until("the lease is renewed", || async {
            let leased: String = redis.clone().hget(&lane, "leased").await.expect("a lease");
            leases.borrow_mut().insert(leased);
            leases.borrow().len() >= enough
        })
        .await;
    };
    until_renewed(3).await;
    let sent = metric(&registry, "holdfast_relay_sent_total");
    until_renewed(3).await;
    assert_eq!(metric(&registry, "holdfast_relay_sent_total"), sent, "sent again meanwhile");
    assert!((5.0..=10.0).contains(&sent), "once, or once more when it was found out: {sent}");
    assert!(is_behind());
    relay.stop().await;
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn several_sweepers_end_each_overdue_hold_once() {
    let pipeline = Pipeline::new("sweepers", 1).await;
    let (relay, writer) = (pipeline.relay(), pipeline.stack.writer());
    let sweepers = [pipeline.sweeper(), pipeline.sweeper()];
    pipeline.hold(2_000).await;
    until("all holds are ended", || async {
        let stock = pipeline.lanes.stock(&pipeline.lane).await.expect("stock").outcome;
        stock.skus[0].counters.held == 0
    })
    .await;
    pipeline.until_recorded().await;
    let expired = "SELECT count(*) FROM ledger WHERE event = 'holdfast.order.expired'";
    assert_eq!(pipeline.stack.number(expired).await, 2_000);
    for role in sweepers {
        role.stop().await;
    }
    relay.stop().await;
    writer.stop().await;
}
