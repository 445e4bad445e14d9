//! The lane's script at 1, 8 and 64 commands a call, on a Redis of its own, and the reading of its
//! replies. Besides criterion's figures, which have the client and the round trip in them, it
//! prints what an order takes inside Redis: time in the script, CPU of the main thread (which a
//! busy machine does not blur, and which has the reading of the call in it), and memory.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use futures_util::future::join_all;
use holdfast::config::Config;
use holdfast::domain::ids::{IdSecret, LaneId, OrderId};
use holdfast::domain::order::Line;
use holdfast::domain::sale::Definition;
use holdfast::domain::time::Timestamp;
use holdfast::lanes::command::{Define, Reserve};
use holdfast::lanes::reply::{self, Reserved};
use holdfast::lanes::{LaneKeys, Lanes, Reached};
use prometheus_client::registry::Registry;
use redis_server::RedisServer;
use tokio::runtime::{Builder, Runtime};

#[path = "../tests/support/redis_server.rs"]
mod redis_server;

const CALL_SIZES: [u64; 3] = [1, 8, 64];
/// More than any run here sells.
const STOCK: i64 = 1_000_000_000;
/// An order's id has a keyed hash in it, so ids are made before the clock runs.
const PREPARED_CALLS_MAX: u64 = 512;

struct Bench {
    lanes: Lanes,
    lane: LaneId,
    secret: IdSecret,
    redis: redis::Connection,
    orders: u64,
    /// CPU seconds of Redis' main thread, outside of what is measured.
    idle_cpu: f64,
}

impl Bench {
    async fn new(server: &RedisServer) -> Self {
        let mut config = Config::load(None).expect("the defaults are valid");
        config.redis.url = server.url();
        let client = redis::Client::open(server.url()).expect("an address");
        let mut bench = Self {
            lanes: Lanes::new(&config.redis, &config.lanes, &mut Registry::default())
                .expect("an address"),
            lane: LaneId { sale: "bench".parse().expect("a sale"), lane: 0 },
            secret: IdSecret::new(1, &[7; 32]),
            redis: client.get_connection().expect("Redis is there"),
            orders: 0,
            idle_cpu: 0.0,
        };
        bench.start_anew().await;
        bench
    }

    /// Empties Redis and its statistics and defines a sale with limits.
    async fn start_anew(&mut self) {
        let mut pipe = redis::pipe();
        pipe.cmd("FLUSHALL").cmd("CONFIG").arg("RESETSTAT").exec(&mut self.redis).expect("Redis");
        let sku = format!(r#"{{"sku":"phone-256","stock":{STOCK},"per_buyer_limit":2}}"#);
        let text = format!(r#"{{"name":"bench","per_buyer_limit":4,"skus":[{sku}]}}"#);
        let definition: Definition = serde_json::from_str(&text).expect("a definition");
        let command = Define {
            version: 1,
            create_epoch: Some(1),
            digest: "1".into(),
            definition: definition.check().expect("a possible one"),
            actor: "bench".parse().expect("a name"),
            trace: None,
        };
        self.lanes.define(&self.lane, command).await.expect("defined");
        self.idle_cpu = self.main_thread_cpu();
    }

    fn main_thread_cpu(&mut self) -> f64 {
        let info: String = redis::cmd("INFO").arg("cpu").query(&mut self.redis).expect("INFO");
        let main_thread = info.lines().filter(|line| line.contains("main_thread"));
        let seconds = main_thread.map(|line| line.rsplit(':').next().expect("a value"));
        seconds.map(|seconds| seconds.parse::<f64>().expect("a number")).sum()
    }

    fn order(&mut self) -> Reserve {
        self.orders += 1;
        let buyer = format!("buyer-{:07}", self.orders).parse().expect("a buyer");
        let key = self.secret.order_key(&self.lane.sale, &buyer, &"k".parse().expect("a key"));
        Reserve {
            id: self.secret.order_id(&self.lane, key),
            buyer,
            lines: serde_json::from_str(r#"[{"sku":"phone-256","quantity":1}]"#).expect("lines"),
            hold_seconds: None,
            trace: None,
        }
    }

    /// How long so many calls of so many new orders each take.
    async fn calls(&mut self, calls: u64, orders: u64) -> Duration {
        let mut took = Duration::ZERO;
        let mut left = calls;
        while left > 0 {
            let now = left.min(PREPARED_CALLS_MAX);
            left -= now;
            let prepared: Vec<Vec<_>> =
                (0..now).map(|_| (0..orders).map(|_| self.order()).collect()).collect();
            let started = Instant::now();
            for call in prepared {
                let asked = call.into_iter().map(|order| self.lanes.reserve(order));
                for reply in tokio::task::unconstrained(join_all(asked)).await {
                    assert!(matches!(reply.expect("an answer").outcome, Reserved::Held(_)));
                }
            }
            took += started.elapsed();
            self.trim().await;
        }
        took
    }

    /// As the relay does, so that the outbox stays as short as it is in service.
    async fn trim(&self) {
        let marks = self.lanes.marks(&self.lane).await.expect("marks");
        let (epoch, seq) = (marks.epoch, marks.seq);
        let reached = Reached { epoch, logged: seq, recorded: seq, acknowledged: seq };
        let lease = Duration::from_secs(60);
        self.lanes.advance(&self.lane, reached, "bench", lease).await.expect("trimmed");
    }

    /// What an order took inside Redis since the last start.
    fn report(&mut self) {
        let cpu = self.main_thread_cpu() - self.idle_cpu;
        let keys = LaneKeys::new(&self.lane);
        let bytes: i64 = keys.all().iter().map(|key| memory(&mut self.redis, key)).sum();
        let orders: i64 = redis::cmd("HLEN").arg(&keys.all()[3]).query(&mut self.redis).expect("n");
        if orders == 0 {
            return; // the command line left this one out
        }
        let info: String =
            redis::cmd("INFO").arg("commandstats").query(&mut self.redis).expect("INFO");
        let calls = info.lines().find(|line| line.starts_with("cmdstat_evalsha:")).expect("calls");
        let in_script = calls.split(',').find_map(|f| f.strip_prefix("usec=")).expect("usec");
        let in_script = in_script.parse::<f64>().expect("a number") / orders as f64;
        let cpu = cpu * 1e6 / orders as f64;
        let bytes = bytes / orders;
        println!("an order: {in_script:.1} us in the script, {cpu:.1} us of CPU, {bytes} bytes");
    }
}

fn memory(redis: &mut redis::Connection, key: &str) -> i64 {
    let mut command = redis::cmd("MEMORY");
    command.arg("USAGE").arg(key).arg("SAMPLES").arg(0);
    command.query::<Option<i64>>(redis).expect("MEMORY").unwrap_or(0)
}

fn one_thread() -> Runtime {
    // On one thread a call's commands are all queued before the combiner takes them.
    Builder::new_current_thread().enable_all().build().expect("a runtime")
}

fn script(c: &mut Criterion) {
    let server = RedisServer::start(&[]);
    let runtime = one_thread();
    let mut bench = runtime.block_on(Bench::new(&server));
    let mut group = c.benchmark_group("lane/reserve");
    group.measurement_time(Duration::from_secs(3)).warm_up_time(Duration::from_secs(1));
    for size in CALL_SIZES {
        runtime.block_on(bench.start_anew());
        group.throughput(Throughput::Elements(size));
        group.bench_function(size.to_string(), |b| {
            b.iter_custom(|calls| runtime.block_on(bench.calls(calls, size)));
        });
        bench.report();
    }
    group.finish();
}

fn replies(c: &mut Criterion) {
    let lane = LaneId { sale: "bench".parse().expect("a sale"), lane: 0 };
    let secret = IdSecret::new(1, &[7; 32]);
    let names = ("u-42".parse().expect("a buyer"), "k".parse().expect("a key"));
    let id: OrderId = secret.order_id(&lane, secret.order_key(&lane.sale, &names.0, &names.1));
    let line = |sku: &str| Line {
        sku: sku.parse().expect("a SKU"),
        quantity: 1.try_into().expect("a quantity"),
    };
    let lines = vec![line("phone-256"), line("case.red")];
    let reserve = Reserve { id, buyer: names.0, lines, hold_seconds: None, trace: None };
    let now = Timestamp::from_millis(1_790_000_000_000);
    let read = |reply| reply::reserved(reserve.clone(), now, black_box(reply));
    let skus: Vec<_> = (0..100).map(|n| format!("sku-{n}=123456=7890=4321=2=5")).collect();
    let stock = format!("stock 3 1790000000000  0 0 0 {}", skus.join(","));
    let mut group = c.benchmark_group("lane/reply");
    group.measurement_time(Duration::from_secs(3)).warm_up_time(Duration::from_secs(1));
    group.bench_function("held", |b| b.iter(|| read("held 123456 1790000300000")));
    group.bench_function("sold-out", |b| b.iter(|| read("sold-out phone-256=1=0")));
    group.bench_function("stock of 100 SKUs", |b| b.iter(|| reply::stock(black_box(&stock))));
    group.finish();
}

criterion_group!(benches, script, replies);
criterion_main!(benches);
