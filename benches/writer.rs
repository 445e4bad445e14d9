//! The writer's batch into PostgreSQL: how fast events of one lane are applied, by batch size.
//! `DATABASE_URL` names the server; a schema of its own is made there and dropped at the end.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput};
use holdfast::config::Database;
use holdfast::domain::event::{Body, Cause, Event, OrderStep, SaleStep, Step, StockSet};
use holdfast::domain::ids::{IdSecret, LaneId};
use holdfast::domain::order::{Line, Order, Status};
use holdfast::domain::sale::Definition;
use holdfast::domain::time::Timestamp;
use holdfast::ledger::{Batch, LaneMove, Ledger};

const STOCK: i64 = 1_000_000_000;
const SIZES: [u64; 6] = [100, 500, 1_000, 2_000, 5_000, 10_000];

/// A lane that makes events faster than they can be written.
struct Lane {
    id: LaneId,
    secret: IdSecret,
    recorded: u64,
}

impl Lane {
    fn event(&self, seq: u64, body: Body) -> Event {
        let at = Timestamp::from_millis(1_762_819_200_000 + seq as i64);
        let traceparent =
            Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".to_owned());
        Event { lane: self.id.clone(), epoch: 1, seq, at, traceparent, body }
    }

    fn defined(&self) -> Event {
        let sku = r#"{"name":"bench","skus":[{"sku":"phone","stock":1000000000}]}"#;
        let definition: Definition = serde_json::from_str(sku).expect("a definition");
        let stock = vec![StockSet { sku: "phone".parse().expect("a SKU"), delta: STOCK }];
        let actor = "bench".parse().expect("a name");
        let definition = Box::new(definition);
        self.event(1, Body::Sale(SaleStep::Defined { version: 1, definition, stock, actor }))
    }

    fn held(&self, seq: u64) -> Event {
        let buyer_id = format!("buyer-{seq}").parse().expect("a buyer");
        let key = self.secret.order_key(&self.id.sale, &buyer_id, &"k".parse().expect("a key"));
        let at = Timestamp::from_millis(1_762_819_200_000 + seq as i64);
        let line = Line {
            sku: "phone".parse().expect("a SKU"),
            quantity: 1.try_into().expect("a quantity"),
        };
        let order = Order {
            id: self.secret.order_id(&self.id, key),
            buyer_id: Some(buyer_id),
            status: Status::Held,
            returned: Vec::new(),
            reacquired: false,
            lines: vec![line],
            payment_id: None,
            created_at: at,
            expires_at: at,
            confirmed_at: None,
            hold_seconds: None,
            asked: Vec::new(),
            seq,
        };
        self.event(
            seq,
            Body::Order(OrderStep {
                order,
                step: Step::Held,
                from: None,
                cause: Cause::Caller,
                reason: None,
            }),
        )
    }

    fn batch(&mut self, events: Vec<Event>) -> Batch {
        let expected = self.recorded;
        self.recorded += events.len() as u64;
        let moves = vec![LaneMove {
            lane: self.id.clone(),
            epoch: 1,
            expected,
            recorded: self.recorded,
            seal: None,
        }];
        Batch { moves, events, ..Batch::default() }
    }

    fn next(&mut self, size: u64) -> Batch {
        let events = (1..=size).map(|ahead| self.held(self.recorded + ahead)).collect();
        self.batch(events)
    }
}

async fn prepare(database: &Database) -> (Ledger, Lane) {
    let ledger = Ledger::new(database).expect("DATABASE_URL is a PostgreSQL address");
    ledger.migrate().await.expect("the schema is made");
    let secret = ledger.id_secrets().await.expect("secrets").remove(0);
    let id = LaneId { sale: "bench".parse().expect("a sale"), lane: 0 };
    ledger.begin_definition(&id.sale, &[0], 1).await.expect("a lane");
    let mut lane = Lane { id, secret, recorded: 0 };
    let defined = vec![lane.defined()];
    ledger.apply(&lane.batch(defined)).await.expect("the definition is applied");
    (ledger, lane)
}

fn main() {
    let Ok(url) = std::env::var("DATABASE_URL") else {
        eprintln!(
            "benches/writer needs DATABASE_URL, a PostgreSQL server to write to: see ./dev env"
        );
        return;
    };
    let database = Database {
        url,
        schema: format!("bench_{:016x}", rand::random::<u64>()),
        connections_max: 2,
        acquire_timeout_ms: 3_000,
        statement_timeout_ms: 60_000,
    };
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let (ledger, lane) = runtime.block_on(prepare(&database));
    let lane = RefCell::new(lane);
    let mut criterion = Criterion::default().configure_from_args();
    let mut group = criterion.benchmark_group("writer_batch");
    group.sample_size(20).measurement_time(Duration::from_secs(8));
    for size in SIZES {
        // An order and its line in the ledger: two rows an event.
        group.throughput(Throughput::Elements(2 * size));
        group.bench_function(BenchmarkId::new("rows", 2 * size), |bencher| {
            bencher.iter_custom(|rounds| {
                let batches: Vec<_> = (0..rounds).map(|_| lane.borrow_mut().next(size)).collect();
                let began = Instant::now();
                for batch in &batches {
                    runtime.block_on(ledger.apply(batch)).expect("the batch is applied");
                }
                began.elapsed()
            });
        });
    }
    group.finish();
    criterion.final_summary();
    runtime.block_on(drop_schema(&database));
}

async fn drop_schema(database: &Database) {
    use sqlx::Connection as _;
    let mut connection =
        sqlx::PgConnection::connect(&database.url).await.expect("the database is there");
    let drop = format!("DROP SCHEMA {} CASCADE", database.schema);
    sqlx::raw_sql(sqlx::AssertSqlSafe(drop)).execute(&mut connection).await.expect("dropped");
}
