//! The Redis side: each lane's state lives under one hash tag and is changed by one script, which
//! takes a batch of commands. [`Lanes`] is the handle through which everybody talks to a lane.
//!
//! ```text
//! submit ──▶ queue of the lane ──▶ combiner ──▶ EVALSHA lua/lane ──▶ reply ──▶ typed outcome
//! ```

mod combiner;
pub mod command;
mod connection;
mod keys;
pub mod look;
mod marks;
mod memory;
mod metrics;
pub mod outbox;
mod pace;
mod proof;
pub mod recovery;
pub mod reply;
mod scripts;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use chrono::Utc;
use futures_util::future::try_join_all;
use prometheus_client::registry::Registry;
use redis::FromRedisValue;
use tokio::runtime::Handle;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::TaskTracker;

use self::combiner::{RawReply, Waiting};
use self::command::{
    Adjust, BeginPayment, Cancel, Command, Confirm, Define, FailPayment, Phase, Preview, Reserve,
    Return, Undo,
};
use self::connection::Connections;
pub use self::connection::{BLOCK_MAX, CallError};
pub use self::keys::LaneKeys;
use self::marks::Watch;
use self::memory::Standing;
use self::metrics::Metrics;
pub use self::proof::Proof;
use self::reply::{
    Adjusted, Begun, Cancelled, Confirmed, Defined, Expired, Failed, Frozen, Marks, Phased,
    Previewed, Promises, ReplyError, Reserved, Returned, Stamped, Stock, Undone,
};
use self::scripts::Scripts;
use crate::config::{self, millis};
use crate::domain::ids::{LaneId, OrderId};
use crate::domain::order::Order;

/// Why a command has no outcome.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LaneError {
    /// Redis has no such lane although its sale is defined: it must not be sold from. Nothing done.
    #[error("the lane is not in Redis")]
    Missing,
    /// The lane may have forgotten what it answered, and waits for recovery. Nothing was done.
    #[error("the lane is frozen: {0}")]
    Frozen(Frozen),
    /// Too many commands wait for this lane. Nothing was done.
    #[error("too many commands wait for this lane")]
    QueueFull,
    /// Redis did not take the call. Nothing was done.
    #[error("{0}")]
    Unavailable(String),
    /// It may have been done.
    #[error("{0}")]
    Unknown(String),
    /// The reply cannot be read: it may have been done.
    #[error("{0}")]
    Protocol(String),
}

impl From<CallError> for LaneError {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Unavailable(why) => LaneError::Unavailable(why),
            CallError::Unknown(why) => LaneError::Unknown(why),
        }
    }
}

impl From<ReplyError> for LaneError {
    fn from(error: ReplyError) -> Self {
        LaneError::Protocol(error.to_string())
    }
}

/// What a relay knows of how far a lane's events have got.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Reached {
    pub epoch: u32,
    /// The highest seq that Kafka has acknowledged to anybody.
    pub logged: u64,
    /// The highest seq that the database has.
    pub recorded: u64,
    /// The highest seq that Kafka has acknowledged to this relay, which began behind `recorded`: below
    /// `logged` while it sends again what Kafka may have lost. Nothing beyond is trimmed.
    pub acknowledged: u64,
}

/// Where a lane stands after [`Lanes::advance`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Advance {
    /// This relay has the lane's lease; `trimmed`: up to where the outbox is gone.
    Leased { marks: Marks, trimmed: u64 },
    /// Another relay has it.
    LeasedElsewhere,
    /// Kafka or the database has events of the lane that it no longer has: Redis has lost what it
    /// had answered, and is frozen now.
    Behind { marks: Marks, trimmed: u64 },
    /// The lane has this other epoch.
    Epoch { epoch: u32 },
    /// Redis has no such lane.
    Missing,
}

/// What Redis says of itself, for start-up and readiness.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerInfo {
    pub version: String,
    pub aof_enabled: bool,
    pub maxmemory_bytes: i64,
    pub used_memory_bytes: i64,
    pub maxmemory_policy: String,
    /// It refuses writes that no replica would have.
    pub needs_replicas: bool,
}

impl ServerInfo {
    /// What about this server, which should have so many replicas, endangers the data, in a sentence
    /// each.
    pub fn warnings(&self, replicas: u32) -> Vec<String> {
        let mut warnings = Vec::new();
        if replicas > 0 && !self.needs_replicas {
            warnings.push(
                "redis.replicas is set, but Redis has no min-replicas-to-write: cut off from its \
                 replicas, it takes orders that are lost when one of them is promoted"
                    .into(),
            );
        }
        if !self.aof_enabled {
            warnings.push("Redis has no append-only file: a restart forgets every hold".into());
        }
        if self.maxmemory_policy != "noeviction" {
            warnings.push(format!(
                "Redis evicts keys (maxmemory-policy {}): it must be noeviction",
                self.maxmemory_policy
            ));
        }
        if self.maxmemory_bytes == 0 {
            warnings.push(
                "Redis has no maxmemory: new orders cannot be stopped before it is full".into(),
            );
        }
        warnings
    }
}

/// What all combiners share.
struct Shared {
    connections: Connections,
    scripts: Scripts,
    options: config::Lanes,
    metrics: Metrics,
    /// Redis' memory is beyond its share: new orders are refused.
    nearly_full: AtomicBool,
    /// How long a command may wait in its lane's queue.
    queue_wait_max: Duration,
    /// Replicas that could be promoted.
    replicas: u32,
}

/// One lane's queue, and who waits for its marks.
struct Lane {
    queue: mpsc::Sender<Waiting>,
    /// Of the commands that the replicas must have, once there was one.
    proving: Option<mpsc::Sender<Waiting>>,
    watch: Arc<Watch>,
    used: Instant,
}

/// The handle to all lanes. Clones share queues and connections.
#[derive(Clone)]
pub struct Lanes {
    shared: Arc<Shared>,
    lanes: Arc<Mutex<HashMap<LaneId, Lane>>>,
    combiners: TaskTracker,
    /// The runtime of the combiners; else that of who first talks to their lane.
    combiners_on: Option<Handle>,
    /// Calls through this handle are proven.
    proves: bool,
}

/// A lane nobody talked to for so long loses its queue and task until it is wanted again.
const IDLE_AFTER: Duration = Duration::from_secs(60);

impl Lanes {
    /// Connects to nothing yet.
    ///
    /// # Errors
    /// A Redis address that cannot be one.
    pub fn new(
        redis: &config::Redis,
        options: &config::Lanes,
        registry: &mut Registry,
    ) -> Result<Self, redis::RedisError> {
        let shared = Shared {
            connections: Connections::new(redis)?,
            scripts: Scripts::new(),
            options: options.clone(),
            metrics: Metrics::register(registry),
            nearly_full: AtomicBool::new(false),
            queue_wait_max: millis(redis.response_timeout_ms),
            replicas: redis.replicas,
        };
        Ok(Self {
            shared: Arc::new(shared),
            lanes: Arc::default(),
            combiners: TaskTracker::new(),
            combiners_on: None,
            proves: false,
        })
    }

    /// The same with all calls to lanes made on this runtime. To be set before a lane is talked to.
    pub fn combining_on(self, runtime: Handle) -> Self {
        Self { combiners_on: Some(runtime), ..self }
    }

    /// A handle through which each answer comes with its [`Proof`] that every replica has what it
    /// tells. Only for a deployment that has replicas.
    pub fn proving(&self) -> Self {
        Self { proves: true, ..self.clone() }
    }

    pub async fn reserve(&self, command: Reserve) -> Result<Stamped<Reserved>, LaneError> {
        let lane = command.id.lane().clone();
        let (asked, raw) = self.ask(&lane, Command::Reserve(command)).await?;
        let Command::Reserve(asked) = asked else { unreachable!("it comes back as it was") };
        let now = raw.now;
        self.promise(raw, |text| reply::reserved(asked, now, text))
    }

    pub async fn confirm(&self, command: Confirm) -> Result<Stamped<Confirmed>, LaneError> {
        let id = command.id.clone();
        let raw = self.submit(id.lane(), Command::Confirm(command)).await?;
        self.promise(raw, |text| reply::confirmed(id, text))
    }

    pub async fn begin_payment(&self, command: BeginPayment) -> Result<Stamped<Begun>, LaneError> {
        let id = command.id.clone();
        let raw = self.submit(id.lane(), Command::BeginPayment(command)).await?;
        self.promise(raw, |text| reply::begun(id, text))
    }

    pub async fn fail_payment(&self, command: FailPayment) -> Result<Stamped<Failed>, LaneError> {
        let id = command.id.clone();
        let raw = self.submit(id.lane(), Command::FailPayment(command)).await?;
        self.promise(raw, |text| reply::failed(id, text))
    }

    pub async fn take_back(&self, command: Return) -> Result<Stamped<Returned>, LaneError> {
        let id = command.id.clone();
        let raw = self.submit(id.lane(), Command::Return(command)).await?;
        self.promise(raw, |text| reply::returned(id, text))
    }

    pub async fn cancel(&self, command: Cancel) -> Result<Stamped<Cancelled>, LaneError> {
        let id = command.id.clone();
        let raw = self.submit(id.lane(), Command::Cancel(command)).await?;
        self.promise(raw, |text| reply::cancelled(id, text))
    }

    /// The order as it stands, or `None` where the lane has none of this id.
    pub async fn get(&self, id: OrderId) -> Result<Stamped<Option<Order>>, LaneError> {
        let raw = self.submit(id.lane(), Command::Get { id: id.clone() }).await?;
        self.promise(raw, |text| reply::got(id, text))
    }

    pub async fn adjust(&self, command: Adjust) -> Result<Stamped<Adjusted>, LaneError> {
        let id = command.id.clone();
        let raw = self.submit(id.lane(), Command::Adjust(command)).await?;
        read(raw, |text| reply::adjusted(id, text))
    }

    /// What an adjustment would come to now.
    pub async fn preview(
        &self,
        lane: &LaneId,
        command: Preview,
    ) -> Result<Stamped<Previewed>, LaneError> {
        read(self.submit(lane, Command::Preview(command)).await?, reply::previewed)
    }

    pub async fn undo(&self, command: Undo) -> Result<Stamped<Undone>, LaneError> {
        let id = command.id.clone();
        let raw = self.submit(id.lane(), Command::Undo(command)).await?;
        read(raw, |text| reply::undone(id, text))
    }

    pub async fn define(
        &self,
        lane: &LaneId,
        command: Define,
    ) -> Result<Stamped<Defined>, LaneError> {
        read(self.submit(lane, Command::Define(Box::new(command))).await?, reply::defined)
    }

    pub async fn phase(&self, lane: &LaneId, command: Phase) -> Result<Stamped<Phased>, LaneError> {
        read(self.submit(lane, Command::Phase(command)).await?, reply::phased)
    }

    pub async fn stock(&self, lane: &LaneId) -> Result<Stamped<Stock>, LaneError> {
        read(self.submit(lane, Command::Stock).await?, reply::stock)
    }

    /// Ends overdue holds, by this process' clock and Redis', until `max` are found or no more are
    /// due; those that one call took with the same deadline end together, even beyond `max`.
    pub async fn expire(&self, lane: &LaneId, max: usize) -> Result<Stamped<Expired>, LaneError> {
        let sent_ms = Utc::now().timestamp_millis();
        let expired = read(self.submit(lane, Command::Expire { max }).await?, reply::expired)?;
        // The lane read its clock between these two: only beyond them is it apart from ours.
        let earliest = expired.now.millis() - Utc::now().timestamp_millis();
        let latest = expired.now.millis() - sent_ms;
        self.shared.metrics.clock_skew_ms.set(if earliest > 0 { earliest } else { latest.min(0) });
        Ok(expired)
    }

    /// Archives a closed sale whose retention is over; says whether it is archived now.
    pub async fn archive(
        &self,
        lane: &LaneId,
        retention_ms: u64,
    ) -> Result<Stamped<bool>, LaneError> {
        read(self.submit(lane, Command::Archive { retention_ms }).await?, reply::archived)
    }

    pub async fn marks(&self, lane: &LaneId) -> Result<Marks, LaneError> {
        Ok(read(self.submit(lane, Command::Marks).await?, reply::marks)?.marks)
    }

    /// Reads an outcome, and remembers the order that it tells of until Kafka has it.
    fn promise<T: Promises>(
        &self,
        raw: RawReply,
        parse: impl FnOnce(&str) -> Result<T, ReplyError>,
    ) -> Result<Stamped<T>, LaneError> {
        let watch = raw.watch.clone();
        let stamped = read(raw, parse)?;
        if let Some(order) = stamped.outcome.order() {
            let (epoch, orders_max) = (stamped.marks.epoch, self.shared.options.told_max);
            if !watch.memory.told(epoch, order.seq, order.id.key(), orders_max) {
                self.shared.metrics.told_unlisted.inc();
            }
        }
        Ok(stamped)
    }

    async fn submit(&self, lane: &LaneId, command: Command) -> Result<RawReply, LaneError> {
        Ok(self.ask(lane, command).await?.1)
    }

    /// Puts a command into its lane's queue and waits for the answer, which brings it back.
    async fn ask(&self, lane: &LaneId, command: Command) -> Result<(Command, RawReply), LaneError> {
        let (answer, answered) = oneshot::channel();
        let send_by = Instant::now() + self.shared.queue_wait_max;
        self.enqueue(lane, Waiting { command, answer, send_by })?;
        answered
            .await
            .unwrap_or_else(|_| Err(LaneError::Unknown("the lane's queue is gone".into())))
    }

    fn enqueue(&self, lane: &LaneId, waiting: Waiting) -> Result<(), LaneError> {
        self.with(lane, |known| {
            let start = || self.start(lane, known.watch.clone(), self.proves);
            let queue = match self.proves {
                true => known.proving.get_or_insert_with(start),
                false => &mut known.queue,
            };
            match queue.try_send(waiting) {
                Ok(()) => Ok(()),
                Err(TrySendError::Full(_)) => {
                    self.shared.metrics.queue_full.inc();
                    Err(LaneError::QueueFull)
                }
                Err(TrySendError::Closed(_)) => {
                    // It can only have panicked: the next command gets a new one.
                    *queue = start();
                    Err(LaneError::Unavailable("the lane's combiner ended".into()))
                }
            }
        })
    }

    fn watch(&self, lane: &LaneId) -> Arc<Watch> {
        self.with(lane, |lane| lane.watch.clone())
    }

    /// What somebody wants of a lane, which gets its queue and task where it has none.
    fn with<T>(&self, id: &LaneId, want: impl FnOnce(&mut Lane) -> T) -> T {
        let mut lanes = self.lanes.lock().expect("no panic while the lanes are locked");
        if let Some(lane) = lanes.get_mut(id) {
            lane.used = Instant::now();
            return want(lane);
        }
        let watch = Arc::new(Watch::new());
        let queue = self.start(id, watch.clone(), false);
        let mut lane = Lane { queue, proving: None, watch, used: Instant::now() };
        let wanted = want(&mut lane);
        lanes.insert(id.clone(), lane);
        self.shared.metrics.lanes.set(lanes.len() as i64);
        wanted
    }

    /// Starts a combiner of the lane; its queue.
    fn start(&self, id: &LaneId, watch: Arc<Watch>, proves: bool) -> mpsc::Sender<Waiting> {
        let (queue, waitings) = mpsc::channel(self.shared.options.queue_max);
        let (shared, keys) = (self.shared.clone(), LaneKeys::new(id));
        let combiner = combiner::run(shared, keys, watch, waitings, proves);
        match &self.combiners_on {
            Some(runtime) => self.combiners.spawn_on(combiner, runtime),
            None => self.combiners.spawn(combiner),
        };
        queue
    }

    /// Forgets lanes that nobody has talked to for a minute, unless they showed what Kafka may not
    /// have; their combiners end. Counts those that remain.
    pub fn prune(&self) {
        let mut lanes = self.lanes.lock().expect("no panic while the lanes are locked");
        lanes.retain(|_, lane| lane.used.elapsed() < IDLE_AFTER || !lane.watch.memory.is_settled());
        let metrics = &self.shared.metrics;
        metrics.lanes.set(lanes.len() as i64);
        let count = |is: fn(Standing) -> bool| {
            lanes.values().filter(|lane| is(lane.watch.memory.standing())).count() as i64
        };
        metrics.frozen.set(count(|standing| matches!(standing, Standing::Frozen(_))));
        metrics.missing.set(count(|standing| standing == Standing::Missing));
        let told: usize = lanes.values().map(|lane| lane.watch.memory.orders()).sum();
        metrics.told.set(told as i64);
    }

    /// Sends what is queued and ends the combiners. Commands that come later start them anew.
    pub async fn drain(&self) {
        self.lanes.lock().expect("no panic while the lanes are locked").clear();
        self.combiners.close();
        self.combiners.wait().await;
    }

    /// Asks Redis about itself and from that decides whether it takes new orders.
    pub async fn check_server(&self) -> Result<ServerInfo, CallError> {
        let info = redis::cmd("INFO").to_owned();
        let text = String::from_redis_value(self.shared.connections.call(&info).await?)
            .map_err(|e| CallError::Unavailable(e.to_string()))?;
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.unwrap_or_default().to_owned()
        };
        let server = ServerInfo {
            version: field("redis_version"),
            aof_enabled: field("aof_enabled") == "1",
            maxmemory_bytes: field("maxmemory").parse().unwrap_or(0),
            used_memory_bytes: field("used_memory").parse().unwrap_or(0),
            maxmemory_policy: field("maxmemory_policy"),
            // Redis says how many good ones it has only where it needs some.
            needs_replicas: !field("min_slaves_good_slaves").is_empty(),
        };
        self.judge_memory(&server);
        Ok(server)
    }

    /// Asks Redis what the outboxes take of the lanes that somebody here talks to: one beyond
    /// `lanes.outbox_bytes_max` takes no new orders.
    pub async fn check_outboxes(&self) -> Result<(), CallError> {
        let watches: Vec<(LaneId, Arc<Watch>)> = {
            let lanes = self.lanes.lock().expect("no panic while the lanes are locked");
            lanes.iter().map(|(id, lane)| (id.clone(), lane.watch.clone())).collect()
        };
        let asked = watches.iter().map(|(lane, watch)| async move {
            let mut ask = redis::cmd("MEMORY");
            ask.arg("USAGE").arg(LaneKeys::new(lane).outbox());
            // An outbox that was never written to takes nothing.
            let bytes = Option::<u64>::from_redis_value(self.shared.connections.call(&ask).await?)
                .map_err(|e| CallError::Unavailable(e.to_string()))?
                .unwrap_or(0);
            let (max, before) = (self.shared.options.outbox_bytes_max, &watch.outbox_bytes);
            if (before.swap(bytes, Ordering::Relaxed) >= max) != (bytes >= max) {
                tracing::warn!(%lane, bytes, max, "the outbox crossed its bound for new orders");
            }
            Ok::<u64, CallError>(bytes)
        });
        let sizes = try_join_all(asked).await?;
        let largest = sizes.into_iter().max().unwrap_or(0);
        self.shared.metrics.outbox_bytes.set(i64::try_from(largest).unwrap_or(i64::MAX));
        Ok(())
    }

    fn judge_memory(&self, server: &ServerInfo) {
        let bound = server.maxmemory_bytes as f64 * self.shared.options.memory_share_max;
        let full = server.maxmemory_bytes > 0 && server.used_memory_bytes as f64 >= bound;
        if self.shared.nearly_full.swap(full, Ordering::Relaxed) != full {
            let (used, max) = (server.used_memory_bytes, server.maxmemory_bytes);
            tracing::warn!(full, used, max, "Redis' memory crossed its bound for new orders");
        }
        let metrics = &self.shared.metrics;
        metrics.nearly_full.set(i64::from(full));
        metrics.memory_used_bytes.set(server.used_memory_bytes);
        metrics.memory_max_bytes.set(server.maxmemory_bytes);
    }

    /// Tells the lane what Kafka and the database have and trims its outbox; takes or renews the
    /// relay's lease. Beyond half of one of the outbox's bounds it is trimmed up to what this relay has seen
    /// Kafka take.
    pub async fn advance(
        &self,
        lane: &LaneId,
        reached: Reached,
        relay: &str,
        lease: Duration,
    ) -> Result<Advance, LaneError> {
        let keys = LaneKeys::new(lane);
        let script = &self.shared.scripts.advance;
        let mut call = script.call(&[keys.lane().to_owned(), keys.outbox().to_owned()]);
        call.arg(reached.epoch).arg(reached.logged).arg(reached.recorded);
        let options = &self.shared.options;
        let bytes = self.watch(lane).outbox_bytes.load(Ordering::Relaxed);
        let kept_events = match bytes > options.outbox_bytes_max / 2 {
            true => 0,
            false => options.outbox_events_max / 2,
        };
        call.arg(kept_events).arg(relay).arg(lease.as_millis() as u64).arg(reached.acknowledged);
        let value = self.shared.connections.call_script(script, &call).await?;
        let [outcome, epoch, seq, logged, recorded, trimmed]: [String; 6] =
            FromRedisValue::from_redis_value(value)
                .map_err(|e| LaneError::Protocol(e.to_string()))?;
        let number = |text: &str| {
            text.parse::<u64>().map_err(|_| LaneError::Protocol(format!("not a number: {text}")))
        };
        let marks = Marks {
            epoch: number(&epoch)? as u32,
            seq: number(&seq)?,
            replicated: 0,
            logged: number(&logged)?,
            recorded: number(&recorded)?,
        };
        if marks.epoch > 0 {
            self.watch(lane).memory.learn(marks);
        }
        Ok(match outcome.as_str() {
            "missing" => Advance::Missing,
            "epoch" => Advance::Epoch { epoch: marks.epoch },
            "leased" => Advance::LeasedElsewhere,
            "behind" => Advance::Behind { marks, trimmed: number(&trimmed)? },
            "ok" => Advance::Leased { marks, trimmed: number(&trimmed)? },
            other => return Err(LaneError::Protocol(other.to_owned())),
        })
    }

    /// Takes an archived lane out of Redis; true once it is gone.
    pub async fn forget(&self, lane: &LaneId) -> Result<bool, LaneError> {
        let script = &self.shared.scripts.forget;
        let call = script.call(LaneKeys::new(lane).all());
        let value = self.shared.connections.call_script(script, &call).await?;
        let outcome: String = FromRedisValue::from_redis_value(value)
            .map_err(|e| LaneError::Protocol(e.to_string()))?;
        let is_gone = outcome != "not-yet";
        if is_gone {
            self.lanes.lock().expect("no panic while the lanes are locked").remove(lane);
        }
        Ok(is_gone)
    }

    /// Reads the outboxes of some lanes, each from behind the given `epoch-seq`; waits up to `block`
    /// where none has news. Lanes without news are not in the answer.
    pub async fn read_outboxes(
        &self,
        from: &[(LaneId, u32, u64)],
        count: usize,
        block: Duration,
    ) -> Result<Vec<(LaneId, Vec<outbox::Entry>)>, LaneError> {
        let mut read = redis::cmd("XREAD");
        read.arg("COUNT").arg(count);
        // To Redis, to block for 0 ms is to block for ever.
        let block_ms = block.min(BLOCK_MAX).as_millis() as u64;
        if block_ms > 0 {
            read.arg("BLOCK").arg(block_ms);
        }
        read.arg("STREAMS");
        let names: Vec<_> =
            from.iter().map(|(lane, ..)| LaneKeys::new(lane).outbox().to_owned()).collect();
        read.arg(&names);
        for (_, epoch, seq) in from {
            read.arg(format!("{epoch}-{seq}"));
        }
        let mut connection = self.shared.connections.exclusive().await?;
        let found: Option<Vec<(String, Vec<outbox::Entry>)>> =
            read.query_async(&mut connection).await.map_err(CallError::from)?;
        let lane_of = |name: String| {
            let index = names.iter().position(|known| *known == name)?;
            Some(from[index].0.clone())
        };
        let by_lane = found.unwrap_or_default().into_iter();
        Ok(by_lane.filter_map(|(name, entries)| Some((lane_of(name)?, entries))).collect())
    }
}

/// Reads an outcome with `parse` and keeps the lane's time and marks beside it.
fn read<T>(
    raw: RawReply,
    parse: impl FnOnce(&str) -> Result<T, ReplyError>,
) -> Result<Stamped<T>, LaneError> {
    let outcome = parse(&raw.text)?;
    Ok(Stamped { now: raw.now, marks: raw.marks, proof: raw.proof, outcome })
}
