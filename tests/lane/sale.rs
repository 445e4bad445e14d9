//! A sale of a test's own, on the real Redis, and short ways to say what is done to it.

use std::time::{Duration, Instant};

use holdfast::config;
use holdfast::domain::event::{Cause, Event};
use holdfast::domain::ids::{AdjustmentId, EntityKey, IdSecret, LaneId, OrderId};
use holdfast::domain::order::{Line, Order};
use holdfast::domain::sale::{Definition, SkuDefinition};
use holdfast::domain::stock::{Adjustment, AdjustmentNote, Reason, TotalChange};
use holdfast::domain::time::Timestamp;
use holdfast::lanes::command::{
    Adjust, BeginPayment, Cancel, Command, Confirm, Define, FailPayment, IfVersion, Phase,
    PhaseChange, Preview, Reserve, Return, Undo,
};
use holdfast::lanes::reply::{
    Adjusted, Begun, Cancelled, Confirmed, Defined, Expired, Failed, Marks, Phased, Previewed,
    Refusal, Reserved, Returned, Stamped, Stock, Undone,
};
use holdfast::lanes::{Advance, LaneError, LaneKeys, Lanes, Reached, outbox};
use prometheus_client::registry::Registry;
use redis::aio::MultiplexedConnection;

use crate::raw::Raw;

/// How long a test waits for what must come.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// The epoch under which tests create their lanes.
pub const EPOCH: u32 = 1;

pub fn redis_url() -> String {
    std::env::var("REDIS_URL").expect("REDIS_URL names a Redis for the tests; see ./dev")
}

/// What a lane answers to any command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Reserved(Reserved),
    Begun(Begun),
    Failed(Failed),
    Confirmed(Confirmed),
    Returned(Returned),
    Cancelled(Cancelled),
    Got(Option<Order>),
    Previewed(Previewed),
    Adjusted(Adjusted),
    Undone(Undone),
    Defined(Defined),
    Phased(Phased),
    Stock(Stock),
    Expired(Expired),
    Archived(bool),
    Marks,
    Missing,
}

/// An outcome with the lane's time and marks, where it said them.
#[derive(Debug, Clone)]
pub struct Answer {
    pub now: Option<Timestamp>,
    pub marks: Option<Marks>,
    pub outcome: Outcome,
}

#[derive(Clone)]
pub struct Sale {
    pub lanes: Lanes,
    pub lane: LaneId,
    pub secret: IdSecret,
    pub redis: MultiplexedConnection,
}

pub fn options() -> config::Lanes {
    config::Config::load(None).expect("the defaults are valid").lanes
}

/// The handle to the lanes of the Redis at `url`.
pub fn lanes(url: &str, options: &config::Lanes) -> Lanes {
    lanes_told(url, options, &mut Registry::default())
}

/// ... which tells of itself there.
pub fn lanes_told(url: &str, options: &config::Lanes, registry: &mut Registry) -> Lanes {
    let mut redis = config::Config::load(None).expect("the defaults are valid").redis;
    redis.url = url.to_owned();
    // A shared machine may be slow; what is tested is not how fast it is.
    redis.response_timeout_ms = PATIENCE.as_millis() as u64;
    redis.connect_timeout_ms = PATIENCE.as_millis() as u64;
    Lanes::new(&redis, options, registry).expect("an address of Redis")
}

pub fn sku(name: &str) -> SkuDefinition {
    SkuDefinition { sku: name.parse().unwrap(), stock: 100, per_buyer_limit: None }
}

/// A definition that says no more than it must: these SKUs, with so many units each.
pub fn definition(skus: &[(&str, i64)]) -> Definition {
    Definition {
        name: "a sale".into(),
        opens_at: None,
        closes_at: None,
        hold_seconds: 300,
        payment_grace_seconds: 0,
        max_hold_seconds: None,
        per_buyer_limit: None,
        min_durability: None,
        retention_days: 7,
        lanes: 1,
        skus: skus
            .iter()
            .map(|(name, stock)| SkuDefinition { stock: *stock, ..sku(name) })
            .collect(),
    }
    .check()
    .expect("a possible definition")
}

pub fn lines(lines: &[(&str, u32)]) -> Vec<Line> {
    let line = |(sku, units): &(&str, u32)| Line {
        sku: sku.parse().unwrap(),
        quantity: (*units).try_into().unwrap(),
    };
    lines.iter().map(line).collect()
}

pub fn note(text: &str) -> AdjustmentNote {
    let reference = Some("PO 7".into());
    AdjustmentNote { reason: Reason::Restock, reference, note: Some(text.into()) }
}

impl Sale {
    /// A sale that nobody has defined yet, under a name of its own, on the tests' Redis.
    pub async fn undefined() -> Self {
        Self::on(&redis_url(), &options()).await
    }

    /// The same on some other Redis or with other options.
    pub async fn on(url: &str, options: &config::Lanes) -> Self {
        let sale = format!("test-{:016x}", rand::random::<u64>()).parse().unwrap();
        let client = redis::Client::open(url).unwrap();
        let patient = redis::AsyncConnectionConfig::new()
            .set_connection_timeout(Some(PATIENCE))
            .set_response_timeout(Some(PATIENCE));
        let redis = client.get_multiplexed_async_connection_with_config(&patient).await;
        Self {
            lanes: lanes(url, options),
            lane: LaneId { sale, lane: 0 },
            secret: IdSecret::new(1, &[7; 32]),
            redis: redis.expect("Redis is there"),
        }
    }

    /// A sale of these SKUs with so many units each.
    pub async fn of(skus: &[(&str, i64)]) -> Self {
        Self::defined(definition(skus)).await
    }

    pub async fn defined(definition: Definition) -> Self {
        let sale = Self::undefined().await;
        sale.define(1, definition).await;
        sale
    }

    /// Another process' view of the same sale.
    pub fn elsewhere(&self) -> Self {
        Self { lanes: lanes(&redis_url(), &options()), ..self.clone() }
    }

    pub fn keys(&self) -> LaneKeys {
        LaneKeys::new(&self.lane)
    }

    pub fn key(&self, buyer: &str, key: &str) -> EntityKey {
        let (buyer, key) = (buyer.parse().unwrap(), key.parse().unwrap());
        self.secret.order_key(&self.lane.sale, &buyer, &key)
    }

    pub fn id(&self, buyer: &str, key: &str) -> OrderId {
        self.secret.order_id(&self.lane, self.key(buyer, key))
    }

    pub fn reserving(&self, buyer: &str, key: &str, asked: &[(&str, u32)]) -> Reserve {
        Reserve {
            id: self.id(buyer, key),
            buyer: buyer.parse().unwrap(),
            lines: lines(asked),
            hold_seconds: None,
            trace: None,
        }
    }

    pub fn confirming(&self, id: &OrderId, payment: &str) -> Confirm {
        Confirm {
            id: id.clone(),
            payment: payment.parse().unwrap(),
            lines: Vec::new(),
            cause: Cause::Caller,
            trace: None,
        }
    }

    /// The key of a return of this order.
    pub fn return_key(&self, id: &OrderId, key: &str) -> EntityKey {
        self.secret.return_key(id, &key.parse().unwrap())
    }

    pub fn cancelling(&self, id: &OrderId) -> Cancel {
        Cancel { id: id.clone(), tombstone_for: None, reason: None, trace: None }
    }

    pub fn adjustment_id(&self, key: &str) -> AdjustmentId {
        let key = self.secret.adjustment_key(&self.lane.sale, &key.parse().unwrap());
        self.secret.adjustment_id(&self.lane, key)
    }

    pub fn adjusting(&self, key: &str, sku: &str, delta: i64) -> Adjust {
        Adjust {
            id: self.adjustment_id(key),
            sku: sku.parse().unwrap(),
            change: TotalChange::By(delta),
            if_version: None,
            note: note("a note"),
            actor: "operator".parse().unwrap(),
            trace: None,
        }
    }

    /// Sets a total that had this version.
    pub fn setting(&self, key: &str, sku: &str, total: i64, version: u64) -> Adjust {
        Adjust {
            change: TotalChange::To(total),
            if_version: Some(IfVersion::OneOf(vec![version])),
            ..self.adjusting(key, sku, 0)
        }
    }

    pub fn previewing(&self, sku: &str, change: TotalChange) -> Preview {
        Preview { sku: sku.parse().unwrap(), change, if_version: None }
    }

    pub fn undoing(&self, key: &str, undoes: &AdjustmentId) -> Undo {
        Undo {
            id: self.adjustment_id(key),
            undoes: undoes.clone(),
            note: None,
            actor: "operator".parse().unwrap(),
            trace: None,
        }
    }

    pub fn defining(&self, version: u64, definition: Definition) -> Define {
        Define {
            version,
            create_epoch: (version == 1).then_some(EPOCH),
            digest: serde_json::to_string(&definition).unwrap(),
            definition,
            actor: "operator".parse().unwrap(),
            trace: None,
        }
    }

    pub fn changing(&self, change: PhaseChange) -> Phase {
        Phase { change, actor: "operator".parse().unwrap(), trace: None }
    }

    /// Holds `asked`, or says why not.
    pub async fn reserve(&self, buyer: &str, key: &str, asked: &[(&str, u32)]) -> Reserved {
        self.lanes.reserve(self.reserving(buyer, key, asked)).await.expect("an answer").outcome
    }

    /// Holds `asked` for so many seconds, which must succeed.
    pub async fn hold(&self, buyer: &str, key: &str, asked: &[(&str, u32)], seconds: u32) -> Order {
        let command = Reserve { hold_seconds: Some(seconds), ..self.reserving(buyer, key, asked) };
        held(self.lanes.reserve(command).await.expect("an answer").outcome)
    }

    pub async fn confirm(&self, id: &OrderId, payment: &str) -> Confirmed {
        self.lanes.confirm(self.confirming(id, payment)).await.expect("an answer").outcome
    }

    pub async fn confirm_part(
        &self,
        id: &OrderId,
        payment: &str,
        bought: &[(&str, u32)],
    ) -> Confirmed {
        let command = Confirm { lines: lines(bought), ..self.confirming(id, payment) };
        self.lanes.confirm(command).await.expect("an answer").outcome
    }

    pub async fn begin(&self, id: &OrderId, payment: &str) -> Begun {
        let payment = payment.parse().unwrap();
        let command = BeginPayment { id: id.clone(), payment, trace: None };
        self.lanes.begin_payment(command).await.expect("an answer").outcome
    }

    pub async fn fail(&self, id: &OrderId, payment: &str) -> Failed {
        let payment = payment.parse().unwrap();
        let command = FailPayment { id: id.clone(), payment, cause: Cause::Webhook, trace: None };
        self.lanes.fail_payment(command).await.expect("an answer").outcome
    }

    pub async fn take_back(
        &self,
        id: &OrderId,
        key: &str,
        back: &[(&str, u32)],
        restock: bool,
    ) -> Returned {
        let key = self.return_key(id, key);
        let command = Return { id: id.clone(), key, lines: lines(back), restock, trace: None };
        self.lanes.take_back(command).await.expect("an answer").outcome
    }

    pub async fn cancel(&self, id: &OrderId) -> Cancelled {
        self.lanes.cancel(self.cancelling(id)).await.expect("an answer").outcome
    }

    pub async fn cancel_by_key(&self, buyer: &str, key: &str) -> Cancelled {
        let command = Cancel {
            tombstone_for: Some(buyer.parse().unwrap()),
            ..self.cancelling(&self.id(buyer, key))
        };
        self.lanes.cancel(command).await.expect("an answer").outcome
    }

    pub async fn adjust(&self, key: &str, sku: &str, delta: i64) -> Adjusted {
        self.lanes.adjust(self.adjusting(key, sku, delta)).await.expect("an answer").outcome
    }

    pub async fn set_total(&self, key: &str, sku: &str, total: i64, version: u64) -> Adjusted {
        let command = self.setting(key, sku, total, version);
        self.lanes.adjust(command).await.expect("an answer").outcome
    }

    pub async fn preview(&self, command: Preview) -> Previewed {
        self.lanes.preview(&self.lane, command).await.expect("an answer").outcome
    }

    pub async fn undo(&self, key: &str, undoes: &AdjustmentId) -> Undone {
        self.lanes.undo(self.undoing(key, undoes)).await.expect("an answer").outcome
    }

    pub async fn define(&self, version: u64, definition: Definition) -> Defined {
        let command = self.defining(version, definition);
        self.lanes.define(&self.lane, command).await.expect("an answer").outcome
    }

    pub async fn phase(&self, change: PhaseChange) -> Phased {
        self.lanes.phase(&self.lane, self.changing(change)).await.expect("an answer").outcome
    }

    pub async fn expire(&self) -> Expired {
        self.lanes.expire(&self.lane, 256).await.expect("an answer").outcome
    }

    /// (available, held, sold) of one SKU.
    pub async fn stock(&self, sku: &str) -> (i64, i64, i64) {
        let stock = self.lanes.stock(&self.lane).await.expect("an answer").outcome;
        let found = stock.skus.iter().find(|s| s.sku.as_str() == sku).expect("the sale has it");
        (found.counters.available, found.counters.held, found.counters.sold)
    }

    /// As the relay named `relay`: tells the lane that Kafka and the database have so much.
    pub async fn advance(&self, relay: &str, logged: u64, recorded: u64) -> Advance {
        self.advance_again(relay, logged, recorded, logged).await
    }

    /// The same of a relay that has seen Kafka take only so much of it.
    pub async fn advance_again(
        &self,
        relay: &str,
        logged: u64,
        recorded: u64,
        acknowledged: u64,
    ) -> Advance {
        let reached = Reached { epoch: EPOCH, logged, recorded, acknowledged };
        let lease = Duration::from_secs(60);
        self.lanes.advance(&self.lane, reached, relay, lease).await.expect("an answer")
    }

    /// The lane's events after `seq` that the outbox still has, an element an entry.
    pub async fn entries_after(&self, seq: u64) -> Vec<Vec<Event>> {
        let from = [(self.lane.clone(), EPOCH, seq)];
        let read = self.lanes.read_outboxes(&from, 100_000, Duration::ZERO).await.expect("read");
        let entries = read.into_iter().flat_map(|(_, entries)| entries);
        entries
            .map(|entry| outbox::events(&self.lane, &self.secret, &entry).expect("readable events"))
            .collect()
    }

    pub async fn events_after(&self, seq: u64) -> Vec<Event> {
        self.entries_after(seq).await.concat()
    }

    pub async fn raw(&self) -> Raw {
        Raw::read(&self.redis, &self.keys()).await
    }

    /// Asks the lane anything, by the same methods that the service uses.
    pub async fn ask(&self, command: Command) -> Result<Answer, LaneError> {
        fn answer<T>(stamped: Stamped<T>, outcome: impl FnOnce(T) -> Outcome) -> Answer {
            Answer {
                now: Some(stamped.now),
                marks: Some(stamped.marks),
                outcome: outcome(stamped.outcome),
            }
        }
        let (lanes, lane) = (&self.lanes, &self.lane);
        let asked = match command {
            Command::Reserve(c) => lanes.reserve(c).await.map(|s| answer(s, Outcome::Reserved)),
            Command::BeginPayment(c) => {
                lanes.begin_payment(c).await.map(|s| answer(s, Outcome::Begun))
            }
            Command::FailPayment(c) => {
                lanes.fail_payment(c).await.map(|s| answer(s, Outcome::Failed))
            }
            Command::Confirm(c) => lanes.confirm(c).await.map(|s| answer(s, Outcome::Confirmed)),
            Command::Return(c) => lanes.take_back(c).await.map(|s| answer(s, Outcome::Returned)),
            Command::Cancel(c) => lanes.cancel(c).await.map(|s| answer(s, Outcome::Cancelled)),
            Command::Get { id } => lanes.get(id).await.map(|s| answer(s, Outcome::Got)),
            Command::Preview(c) => {
                lanes.preview(lane, c).await.map(|s| answer(s, Outcome::Previewed))
            }
            Command::Adjust(c) => lanes.adjust(c).await.map(|s| answer(s, Outcome::Adjusted)),
            Command::Undo(c) => lanes.undo(c).await.map(|s| answer(s, Outcome::Undone)),
            Command::Define(c) => lanes.define(lane, *c).await.map(|s| answer(s, Outcome::Defined)),
            Command::Phase(c) => lanes.phase(lane, c).await.map(|s| answer(s, Outcome::Phased)),
            Command::Stock => lanes.stock(lane).await.map(|s| answer(s, Outcome::Stock)),
            Command::Expire { max } => {
                lanes.expire(lane, max).await.map(|s| answer(s, Outcome::Expired))
            }
            Command::Archive { retention_ms } => {
                lanes.archive(lane, retention_ms).await.map(|s| answer(s, Outcome::Archived))
            }
            Command::Marks => lanes.marks(lane).await.map(|marks| Answer {
                now: None,
                marks: Some(marks),
                outcome: Outcome::Marks,
            }),
        };
        match asked {
            Err(LaneError::Missing) => {
                Ok(Answer { now: None, marks: None, outcome: Outcome::Missing })
            }
            other => other,
        }
    }

    /// Asks all of it in one script call: on the one thread of a test, every command is queued
    /// before the lane's combiner runs (`unconstrained`: tokio must not take turns in between).
    pub async fn ask_at_once(&self, commands: &[Command]) -> Vec<Result<Answer, LaneError>> {
        let asked = commands.iter().map(|command| self.ask(command.clone()));
        tokio::task::unconstrained(futures_util::future::join_all(asked)).await
    }
}

/// The order that was held just now.
pub fn held(outcome: Reserved) -> Order {
    match outcome {
        Reserved::Held(order) => order,
        other => panic!("not held: {other:?}"),
    }
}

/// The adjustment that was made just now.
pub fn adjusted(outcome: Adjusted) -> Adjustment {
    match outcome {
        Adjusted::Adjusted(adjustment) => adjustment,
        other => panic!("not adjusted: {other:?}"),
    }
}

/// The adjustment that undid another just now.
pub fn undone(outcome: Undone) -> Adjustment {
    match outcome {
        Undone::Undone(adjustment) => adjustment,
        other => panic!("not undone: {other:?}"),
    }
}

/// Why an order was refused.
pub fn refused(outcome: Reserved) -> Refusal {
    match outcome {
        Reserved::Refused(refusal) => refusal,
        other => panic!("not refused: {other:?}"),
    }
}

/// Asks again and again until `condition` holds.
pub async fn wait_until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    let mut pause = tokio::time::interval(Duration::from_millis(5));
    while !condition().await {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        pause.tick().await;
    }
}

/// Waits until both Redis' and this process' clock are past the deadlines of all these.
pub async fn wait_past(sale: &Sale, deadline: Timestamp) {
    wait_until("the deadline is past", async || {
        let now = sale.lanes.stock(&sale.lane).await.expect("an answer").now;
        now.min(chrono::Utc::now().into()) >= deadline
    })
    .await;
}
