//! What tests of the recording side share: a schema, a topic and a group of their own on the real
//! servers, and a lane whose events are made here.

use std::future::Future;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use holdfast::bus::producer::Producer;
use holdfast::bus::record::{Record, encode};
use holdfast::bus::topic;
use holdfast::config::{Database, Kafka};
use holdfast::domain::event::{Body, Cause, Event, OrderStep, SaleStep, Step, StockSet};
use holdfast::domain::ids::{AdjustmentId, IdSecret, LaneId};
use holdfast::domain::names::{KeyName, SaleId, Sku};
use holdfast::domain::order::{Line, Order, Status};
use holdfast::domain::sale::Definition;
use holdfast::domain::stock::{Adjustment, AdjustmentNote, Counters, Reason};
use holdfast::domain::time::Timestamp;
use holdfast::ledger::Ledger;
use holdfast::writer::{Options, Writer, WriterError, WriterMetrics};
use prometheus_client::registry::Registry;
use sqlx::PgPool;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const DEADLINE: Duration = Duration::from_secs(40);
pub const PARTITIONS: i32 = 4;

fn env(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} must name a real server: see ./dev env"))
}

/// Waits until it is so; panics with `what` if it never is.
pub async fn until<F: Future<Output = bool>>(what: &str, mut is_so: impl FnMut() -> F) {
    let began = Instant::now();
    while !is_so().await {
        assert!(began.elapsed() < DEADLINE, "it never came true: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// One test's own part of the real servers.
pub struct Stack {
    pub ledger: Ledger,
    pub pool: PgPool,
    pub database: Database,
    pub kafka: Kafka,
    pub group: String,
    pub secret: IdSecret,
    producer: Producer,
}

pub fn database(schema: &str) -> Database {
    Database {
        url: env("DATABASE_URL"),
        schema: schema.to_owned(),
        connections_max: 4,
        acquire_timeout_ms: 3_000,
        statement_timeout_ms: 10_000,
    }
}

/// A name that no other test and no other run has.
pub fn unique(name: &str) -> String {
    format!("{name}_{:016x}", rand::random::<u64>())
}

/// A pool that looks at the tables directly, as an operator with psql would.
pub fn pool(database: &Database) -> PgPool {
    let options: sqlx::postgres::PgConnectOptions = database.url.parse().unwrap();
    let options = options.options([("search_path", database.schema.as_str())]);
    sqlx::postgres::PgPoolOptions::new().max_connections(2).connect_lazy_with(options)
}

impl Stack {
    pub async fn new(name: &str) -> Self {
        let name = unique(name);
        println!("schema, topic and group {name}");
        let database = database(&name);
        let ledger = Ledger::new(&database).unwrap();
        ledger.migrate().await.unwrap();
        let kafka = Kafka {
            brokers: env("KAFKA_BROKERS"),
            topic: name.clone(),
            partitions: PARTITIONS,
            replication: 1,
            properties: [].into(),
        };
        until("the topic is made", || async { topic::prepare(&kafka).await.is_ok() }).await;
        let secret = ledger.id_secrets().await.unwrap().remove(0);
        let producer = Producer::new(&kafka).unwrap();
        Self { ledger, pool: pool(&database), database, kafka, group: name, secret, producer }
    }

    pub async fn lane(&self, sale: &str, partition: i32) -> Lane {
        let sale: SaleId = sale.parse().unwrap();
        self.ledger.begin_definition(&sale, &[partition], 1).await.unwrap();
        Lane {
            id: LaneId { sale, lane: 0 },
            partition,
            epoch: 1,
            seq: 0,
            secret: self.secret.clone(),
        }
    }

    /// One that goes on as a lane in Redis would, after event `seq`.
    pub fn lane_of(&self, id: &LaneId, seq: u64) -> Lane {
        Lane { id: id.clone(), partition: 1, epoch: 1, seq, secret: self.secret.clone() }
    }

    pub fn options(&self) -> Options {
        Options {
            kafka: self.kafka.clone(),
            group: self.group.clone(),
            batch_max: 1_000,
            batch_age: Duration::from_millis(20),
            parked_max: 10_000,
            dead_letters_kept_days: 1,
            dead_letters_max: 1_000,
        }
    }

    pub fn writer(&self) -> Running {
        self.writer_with(self.options())
    }

    pub fn writer_with(&self, options: Options) -> Running {
        let mut registry = Registry::default();
        let metrics = WriterMetrics::register(&mut registry);
        let stop = CancellationToken::new();
        let writer = Writer::new(options, self.ledger.clone(), metrics);
        Running { ended: tokio::spawn(writer.run(stop.clone())), stop, registry }
    }

    pub async fn send(&self, lane: &Lane, events: &[Event]) {
        let records: Vec<_> = events.iter().map(encode).collect();
        self.send_records(lane.partition, &records).await;
    }

    pub async fn send_records(&self, partition: i32, records: &[Record]) {
        let sent: Vec<_> =
            records.iter().map(|record| self.producer.send(partition, record).unwrap()).collect();
        for delivered in join_all(sent).await {
            delivered.unwrap();
        }
    }

    pub async fn number(&self, sql: &'static str) -> i64 {
        sqlx::query_scalar(sql).fetch_one(&self.pool).await.unwrap()
    }

    /// By reason, sorted.
    pub async fn dead_letters(&self) -> Vec<String> {
        sqlx::query_scalar("SELECT reason FROM dead_letters ORDER BY reason, seq")
            .fetch_all(&self.pool)
            .await
            .unwrap()
    }

    /// How far a lane is recorded; `None` as well while the database does not say.
    pub async fn recorded(&self, lane: &LaneId) -> Option<u64> {
        self.ledger.recorded_many(std::slice::from_ref(lane)).await.ok()?.remove(lane)
    }

    pub async fn until_recorded(&self, lane: &Lane, seq: u64) {
        until(&format!("{} is recorded up to {seq}", lane.id), || async {
            self.recorded(&lane.id).await.is_some_and(|recorded| recorded >= seq)
        })
        .await;
    }

    /// I2 and I5: the fold of the ledger is the counters, and no lane has a gap or a repeat.
    pub async fn check_books(&self) {
        let apart = self
            .number(
                "SELECT count(*) FROM counters c FULL JOIN (
                   SELECT sale_id, lane, sku, sum(available)::bigint AS available,
                     sum(held)::bigint AS held, sum(sold)::bigint AS sold
                   FROM ledger WHERE sku IS NOT NULL GROUP BY sale_id, lane, sku
                 ) f USING (sale_id, lane, sku)
                 WHERE (c.available, c.held, c.sold)
                   IS DISTINCT FROM (coalesce(f.available, 0), coalesce(f.held, 0), coalesce(f.sold, 0))",
            )
            .await;
        assert_eq!(apart, 0, "counters that are not the fold of the ledger");
        let gaps = self
            .number(
                "SELECT count(*) FROM lanes l WHERE recorded <> (
                   SELECT count(DISTINCT seq) FROM ledger g
                   WHERE g.sale_id = l.sale_id AND g.lane = l.lane AND g.seq <= l.recorded
                 )",
            )
            .await;
        assert_eq!(gaps, 0, "lanes with a gap");
    }
}

/// A writer that runs.
pub struct Running {
    stop: CancellationToken,
    ended: JoinHandle<Result<(), WriterError>>,
    registry: Registry,
}

impl Running {
    pub async fn stop(self) -> Registry {
        self.stop.cancel();
        let ended = tokio::time::timeout(Duration::from_secs(10), self.ended).await;
        ended.expect("the writer stops within 10 s").unwrap().unwrap();
        self.registry
    }

    /// As a crash: nothing is finished, nothing is committed.
    pub async fn abort(self) {
        self.ended.abort();
        self.ended.await.unwrap_err();
    }

    pub fn metric(&self, name: &str) -> f64 {
        metric(&self.registry, name)
    }
}

/// The sum of a metric over its labels.
pub fn metric(registry: &Registry, name: &str) -> f64 {
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, registry).unwrap();
    let of_name = |line: &&str| line.split([' ', '{']).next() == Some(name);
    let value = |line: &str| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap();
    text.lines().filter(of_name).map(value).sum()
}

/// A lane that makes events, as Redis would.
pub struct Lane {
    pub id: LaneId,
    pub partition: i32,
    pub epoch: u32,
    pub seq: u64,
    pub secret: IdSecret,
}

pub fn sku() -> Sku {
    "phone".parse().unwrap()
}

pub fn actor() -> KeyName {
    "ops".parse().unwrap()
}

pub fn definition(stock: i64) -> Definition {
    let json = format!(r#"{{"name":"n","skus":[{{"sku":"phone","stock":{stock}}}]}}"#);
    serde_json::from_str::<Definition>(&json).unwrap().check().unwrap()
}

impl Lane {
    fn event(&mut self, body: impl FnOnce(u64) -> Body) -> Event {
        self.seq += 1;
        Event {
            lane: self.id.clone(),
            epoch: self.epoch,
            seq: self.seq,
            at: self.now(),
            traceparent: Some(format!("00-{:032x}-{:016x}-01", self.seq, self.seq)),
            body: body(self.seq),
        }
    }

    fn now(&self) -> Timestamp {
        Timestamp::from_millis(1_762_819_200_000 + self.seq as i64)
    }

    pub fn defined(&mut self, stock: i64) -> Event {
        let set = StockSet { sku: sku(), delta: stock };
        self.event(|_| {
            Body::Sale(SaleStep::Defined {
                version: 1,
                definition: Box::new(definition(stock)),
                stock: vec![set],
                actor: actor(),
            })
        })
    }

    pub fn sale_step(&mut self, step: SaleStep) -> Event {
        self.event(|_| Body::Sale(step))
    }

    pub fn held(&mut self, buyer: &str) -> Event {
        let buyer_id = buyer.parse().unwrap();
        let key = self.secret.order_key(&self.id.sale, &buyer_id, &"k".parse().unwrap());
        let id = self.secret.order_id(&self.id, key);
        let created_at = self.now();
        self.event(|seq| {
            let order = Order {
                id,
                buyer_id: Some(buyer_id),
                status: Status::Held,
                returned: Vec::new(),
                reacquired: false,
                lines: vec![Line { sku: sku(), quantity: 1.try_into().unwrap() }],
                payment_id: None,
                created_at,
                expires_at: Timestamp::from_millis(created_at.millis() + 300_000),
                confirmed_at: None,
                hold_seconds: None,
                asked: Vec::new(),
                seq,
            };
            let (step, cause) = (Step::Held, Cause::Caller);
            Body::Order(OrderStep { order, step, from: None, cause, reason: None })
        })
    }

    /// The order of that event, one step further.
    pub fn then(&mut self, before: &Event, status: Status) -> Event {
        let Body::Order(before) = &before.body else { panic!("not an order's event") };
        let (mut order, from) = (before.order.clone(), before.order.status);
        let now = self.now();
        self.event(|seq| {
            (order.status, order.seq) = (status, seq);
            if status == Status::Confirmed {
                order.payment_id = Some("pay".parse().unwrap());
                order.confirmed_at = Some(now);
            }
            let step = match status {
                Status::Confirmed => Step::Confirmed { released: Vec::new() },
                Status::Cancelled => Step::Cancelled,
                Status::Expired => Step::Expired,
                other => panic!("no step to {other:?}"),
            };
            let (from, cause) = (Some(from), Cause::Caller);
            Body::Order(OrderStep { order, step, from, cause, reason: None })
        })
    }

    pub fn adjustment_id(&self, key: &str) -> AdjustmentId {
        let key = self.secret.adjustment_key(&self.id.sale, &key.parse().unwrap());
        self.secret.adjustment_id(&self.id, key)
    }

    /// The adjustment `key`, as the opposite of the adjustment `undoes`.
    pub fn undone(&mut self, key: &str, before: Counters, delta: i64, undoes: &str) -> Event {
        let undoes = self.adjustment_id(undoes);
        let mut event = self.adjusted(key, before, delta, "undone");
        let Body::Adjusted(adjustment) = &mut event.body else { unreachable!("it is one") };
        adjustment.undoes = Some(undoes);
        event
    }

    pub fn adjusted(&mut self, key: &str, before: Counters, delta: i64, note: &str) -> Event {
        let id = self.adjustment_id(key);
        let created_at = self.now();
        let note =
            AdjustmentNote { reason: Reason::Restock, reference: None, note: Some(note.into()) };
        self.event(|seq| {
            Body::Adjusted(Adjustment {
                id,
                sku: sku(),
                delta,
                set_total: None,
                before: before.into(),
                note,
                actor: actor(),
                created_at,
                seq,
                undoes: None,
                undone_by: None,
            })
        })
    }

    /// A definition, then orders of which each third is confirmed and each third cancelled.
    pub fn story(&mut self, orders: usize) -> Vec<Event> {
        let mut events = vec![self.defined(orders as i64)];
        for number in 0..orders {
            let held = self.held(&format!("buyer-{number}"));
            let step = match number % 3 {
                0 => Some(self.then(&held, Status::Confirmed)),
                1 => Some(self.then(&held, Status::Cancelled)),
                _ => None,
            };
            events.push(held);
            events.extend(step);
        }
        events
    }
}
