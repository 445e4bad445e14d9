//! The relay: outbox → Kafka. It reads each lane's outbox in order, produces its events, moves the
//! lane's `logged` mark when Kafka has acknowledged them, copies `recorded` from the database, and
//! has the outbox trimmed (`lua/advance.lua`).
//!
//! ```text
//!   lane:   ── recorded ──── logged ──── sent ──── seq ──▶
//!              the database  Kafka       on its    what
//!              has it        has it      way       happened
//! ```
//!
//! Nothing is only in its memory: one that dies is followed by one that begins at `logged`, and
//! what is sent twice the writer drops by its seq. A delivery that fails rewinds the lane to
//! `logged`. The lease keeps two relays from sending the same lane; it only saves double work.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::{BoxFuture, FutureExt, join_all};
use futures_util::stream::{FuturesUnordered, StreamExt};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio_util::sync::CancellationToken;

use crate::bus::producer::{Producer, SendError};
use crate::bus::record::encode;
use crate::config::{self, millis};
use crate::domain::ids::{IdSecret, LaneId};
use crate::lanes::outbox::{self, Entry};
use crate::lanes::reply::Marks;
use crate::lanes::{Advance, LaneError, Lanes};
use crate::ledger::{Catalog, Ledger};

/// How often marks are copied while there is something to copy.
const MARKS_INTERVAL: Duration = Duration::from_millis(20);
/// How long the relay rests after Redis, Kafka or the database failed it.
const PAUSE: Duration = Duration::from_millis(250);
/// How long the database may take to say how far it has got.
const ASK_MAX: Duration = Duration::from_secs(2);
/// Streams that one read names at most.
const LANES_A_READ: usize = 256;

struct Metrics {
    sent: Counter,
    acknowledged: Counter,
    rewinds: Counter,
    unreadable: Counter,
    lanes: Gauge,
    behind: Gauge,
    in_flight: Gauge,
    outbox_events: Gauge,
    unlogged: Gauge,
    unrecorded: Gauge,
}

impl Metrics {
    fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            sent: Counter::default(),
            acknowledged: Counter::default(),
            rewinds: Counter::default(),
            unreadable: Counter::default(),
            lanes: Gauge::default(),
            behind: Gauge::default(),
            in_flight: Gauge::default(),
            outbox_events: Gauge::default(),
            unlogged: Gauge::default(),
            unrecorded: Gauge::default(),
        };
        let registry = registry.sub_registry_with_prefix("holdfast_relay");
        let m = &metrics;
        registry.register("sent", "Events handed to the producer", m.sent.clone());
        registry.register("acknowledged", "Events that Kafka acknowledged", m.acknowledged.clone());
        registry.register("rewinds", "Lanes sent again from `logged`", m.rewinds.clone());
        registry.register("unreadable", "Outbox entries that cannot be read", m.unreadable.clone());
        registry.register("lanes", "Lanes that this relay has the lease of", m.lanes.clone());
        registry.register(
            "lanes_behind",
            "Lanes that have lost what Kafka or the database has of them",
            m.behind.clone(),
        );
        registry.register(
            "in_flight",
            "Events on their way to Kafka; at most relay.in_flight_max",
            m.in_flight.clone(),
        );
        registry.register(
            "outbox_events",
            "Events in the fullest outbox of these lanes; at lanes.outbox_events_max it is full",
            m.outbox_events.clone(),
        );
        registry.register("unlogged", "Events that Kafka does not have yet", m.unlogged.clone());
        registry.register(
            "unrecorded",
            "Events that the database does not have yet",
            m.unrecorded.clone(),
        );
        metrics
    }
}

/// One lane that this relay has the lease of.
struct Outbound {
    partition: i32,
    secret: Arc<IdSecret>,
    /// What the lane said of itself at the last advance, `logged` as high as Kafka acknowledged.
    marks: Marks,
    /// Up to where the outbox was trimmed.
    trimmed: u64,
    /// The last event handed to the producer.
    sent: u64,
    /// Entries on their way: the seq each ends with, and whether it was acknowledged.
    in_flight: VecDeque<(u64, bool)>,
    /// Events in them.
    in_flight_events: u64,
    /// The database has said how far it is since this relay has the lane.
    compared: bool,
    /// Redis lost events that Kafka or the database has: nothing may be trimmed.
    behind: bool,
    /// Rises at each rewind: deliveries of an older one no longer count.
    generation: u64,
    /// What the lane was told last.
    told: Marks,
    renew_at: Instant,
    /// When it was read from last: who waits longest is read first.
    read_at: Instant,
    /// Not read from before this: the producer was full or an entry unreadable.
    rest_until: Instant,
}

impl Outbound {
    fn rewind(&mut self) {
        self.generation += 1;
        self.in_flight.clear();
        self.in_flight_events = 0;
        self.sent = self.marks.logged;
        self.rest();
    }

    fn rest(&mut self) {
        self.rest_until = Instant::now() + PAUSE;
    }

    fn acknowledge(&mut self, seq: u64) {
        if let Some(entry) = self.in_flight.iter_mut().find(|entry| entry.0 == seq) {
            entry.1 = true;
        }
        while let Some((seq, true)) = self.in_flight.front().copied() {
            self.marks.logged = self.marks.logged.max(seq);
            self.in_flight.pop_front();
        }
    }
}

/// What becomes of a lane's lease when it is told its marks.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Lease {
    Renew,
    /// The next relay need not wait for it to run out.
    GiveBack,
}

/// One entry's delivery: its lane, the generation and seq it belongs to, and how it ended.
struct Delivery {
    lane: LaneId,
    generation: u64,
    seq: u64,
    events: u64,
    outcome: Result<(), SendError>,
}

/// Why the relay cannot go on. An unreachable server is no reason.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// The idempotent producer has lost its place; a new process begins at `logged`.
    #[error("{0}")]
    Producer(SendError),
}

type Asking = BoxFuture<'static, Result<HashMap<LaneId, u64>, String>>;
type Reading = BoxFuture<'static, Result<Vec<(LaneId, Vec<Entry>)>, LaneError>>;

/// The role: see the module's comment.
pub struct Relay {
    lanes: Lanes,
    catalog: Catalog,
    ledger: Ledger,
    producer: Producer,
    options: config::Relay,
    /// Names this process in leases.
    name: String,
    metrics: Metrics,
    outbound: HashMap<LaneId, Outbound>,
    /// How many leases it has taken.
    leases: u64,
    deliveries: FuturesUnordered<BoxFuture<'static, Delivery>>,
    /// When to try for the lease of a lane again.
    retry_at: HashMap<LaneId, Instant>,
}

impl Relay {
    pub fn new(
        lanes: Lanes,
        catalog: Catalog,
        ledger: Ledger,
        producer: Producer,
        options: config::Relay,
        registry: &mut Registry,
    ) -> Self {
        Self {
            lanes,
            catalog,
            ledger,
            producer,
            options,
            name: format!("relay-{:016x}", rand::random::<u64>()),
            metrics: Metrics::register(registry),
            outbound: HashMap::new(),
            leases: 0,
            deliveries: FuturesUnordered::new(),
            retry_at: HashMap::new(),
        }
    }

    /// Relays until shut down; then waits for what is on its way, tells the lanes and gives back
    /// its leases. Redis, Kafka or the database away is a pause, never an end.
    pub async fn run(mut self, shutdown: CancellationToken) -> Result<(), RelayError> {
        let mut marks = tokio::time::interval(MARKS_INTERVAL);
        marks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut reading: Option<Reading> = None;
        let mut asking: Option<Asking> = None;
        loop {
            if reading.is_none() {
                reading = self.read();
            }
            let read = pending_or(&mut reading);
            let asked = pending_or(&mut asking);
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                Some(delivered) = self.deliveries.next() => self.delivered(delivered)?,
                found = read => {
                    reading = None;
                    self.found(found)?;
                }
                recorded = asked => {
                    asking = None;
                    self.recorded(recorded);
                }
                _ = marks.tick() => {
                    if asking.is_none() {
                        asking = self.ask_recorded();
                    }
                    self.take_leases().await;
                    self.advance(Lease::Renew).await;
                }
            }
        }
        while let Some(delivered) = self.deliveries.next().await {
            self.delivered(delivered)?;
        }
        self.advance(Lease::GiveBack).await;
        Ok(())
    }

    /// Tries for the lease of every lane that this relay does not have.
    async fn take_leases(&mut self) {
        let now = Instant::now();
        let retry = millis(self.options.lease_ms / 2);
        for sale in self.catalog.sales().iter().filter(|sale| !sale.phase.archived) {
            for (lane, place) in sale.lane_ids().zip(&sale.lanes) {
                let waits = self.retry_at.get(&lane).is_some_and(|at| *at > now);
                if waits || self.outbound.contains_key(&lane) {
                    continue;
                }
                self.retry_at.insert(lane.clone(), now + retry);
                let Ok(Some(secret)) = self.catalog.secret(sale.secret_version).await else {
                    continue;
                };
                match Self::lease(&self.lanes, &self.name, &lane, place.epoch, retry * 2).await {
                    Ok(Advance::Leased { marks, trimmed }) => {
                        tracing::info!(%lane, logged = marks.logged, seq = marks.seq, "relaying");
                        let renew_at = now + retry;
                        self.leases += 1;
                        let mut outbound =
                            outbound(place.partition, secret, marks, trimmed, renew_at);
                        // What an earlier lease of the lane still has on its way is not of this one.
                        outbound.generation = self.leases << 32;
                        self.outbound.insert(lane, outbound);
                    }
                    Ok(other) => tracing::debug!(%lane, ?other, "no lease"),
                    Err(error) => tracing::warn!(%lane, %error, "no lease"),
                }
            }
        }
        self.metrics.lanes.set(self.outbound.len() as i64);
    }

    /// Tries for the lease of one lane, whose epoch the catalog may know too late or, while the lane
    /// is being opened anew, too early.
    async fn lease(
        lanes: &Lanes,
        name: &str,
        lane: &LaneId,
        epoch: u32,
        duration: Duration,
    ) -> Result<Advance, LaneError> {
        let nothing = Marks { epoch, ..Marks::default() };
        match lanes.advance(lane, nothing, name, duration).await {
            Ok(Advance::Epoch { epoch }) => {
                let nothing = Marks { epoch, ..Marks::default() };
                lanes.advance(lane, nothing, name, duration).await
            }
            other => other,
        }
    }

    /// Begins to read what has not been sent, from the lanes that have waited longest.
    fn read(&mut self) -> Option<Reading> {
        let now = Instant::now();
        let in_flight: u64 = self.outbound.values().map(|outbound| outbound.in_flight_events).sum();
        self.metrics.in_flight.set(in_flight as i64);
        let room = self.options.in_flight_max.saturating_sub(in_flight as usize);
        let mut lanes: Vec<_> =
            self.outbound.iter_mut().filter(|(_, outbound)| outbound.rest_until <= now).collect();
        if room == 0 || lanes.is_empty() {
            return None;
        }
        let wait = if lanes.len() > LANES_A_READ { 0 } else { self.options.poll_ms };
        lanes.sort_by_key(|(_, outbound)| outbound.read_at);
        lanes.truncate(LANES_A_READ);
        let from: Vec<_> = lanes
            .into_iter()
            .map(|(lane, outbound)| {
                outbound.read_at = now;
                (lane.clone(), outbound.marks.epoch, outbound.sent)
            })
            .collect();
        let (lanes, count) = (self.lanes.clone(), self.options.read_max.min(room));
        Some(async move { lanes.read_outboxes(&from, count, millis(wait)).await }.boxed())
    }

    fn found(
        &mut self,
        found: Result<Vec<(LaneId, Vec<Entry>)>, LaneError>,
    ) -> Result<(), RelayError> {
        match found {
            Ok(found) => {
                for (lane, entries) in found {
                    self.send(&lane, &entries)?;
                }
            }
            Err(error) => {
                tracing::warn!(%error, "the outboxes could not be read");
                self.outbound.values_mut().for_each(Outbound::rest);
            }
        }
        Ok(())
    }

    /// Hands the entries of one lane to the producer, in order, as far as it takes them.
    fn send(&mut self, lane: &LaneId, entries: &[Entry]) -> Result<(), RelayError> {
        // The lease may have been lost, or the lane rewound, while this was being read.
        let Some(outbound) = self.outbound.get_mut(lane) else { return Ok(()) };
        for entry in entries {
            let events = match outbox::events(lane, &outbound.secret, entry) {
                Ok(events) => events,
                Err(error) => {
                    self.metrics.unreadable.inc();
                    tracing::error!(%lane, id = entry.0, %error, "an outbox entry cannot be read: the lane waits");
                    outbound.rest();
                    return Ok(());
                }
            };
            let (Some(first), Some(last)) = (events.first(), events.last()) else { continue };
            let (first, last) = (first.seq, last.seq);
            if last <= outbound.sent {
                continue;
            }
            if first > outbound.sent + 1 {
                // A read that was begun before a rewind: the next one starts where it must.
                outbound.rest();
                return Ok(());
            }
            let mut sent = Vec::with_capacity(events.len());
            for event in &events {
                match self.producer.send(outbound.partition, &encode(event)) {
                    Ok(delivery) => sent.push(delivery),
                    Err(fatal @ SendError::Fatal(_)) => return Err(RelayError::Producer(fatal)),
                    Err(error) => {
                        // The entry is sent again whole: its first events are then repeats.
                        tracing::debug!(%lane, %error, "Kafka's producer takes no more");
                        outbound.rest();
                        return Ok(());
                    }
                }
            }
            self.metrics.sent.inc_by(sent.len() as u64);
            outbound.sent = last;
            outbound.in_flight.push_back((last, false));
            outbound.in_flight_events += sent.len() as u64;
            let (lane, generation) = (lane.clone(), outbound.generation);
            let delivery = async move {
                let events = sent.len() as u64;
                let ended = join_all(sent).await.into_iter().collect::<Result<Vec<_>, _>>();
                let outcome = ended.map(drop);
                Delivery { lane, generation, seq: last, events, outcome }
            };
            self.deliveries.push(delivery.boxed());
        }
        Ok(())
    }

    fn delivered(&mut self, delivered: Delivery) -> Result<(), RelayError> {
        if let Err(fatal @ SendError::Fatal(_)) = delivered.outcome {
            return Err(RelayError::Producer(fatal));
        }
        let Some(outbound) = self.outbound.get_mut(&delivered.lane) else { return Ok(()) };
        if outbound.generation != delivered.generation {
            return Ok(());
        }
        match delivered.outcome {
            Ok(()) => {
                outbound.in_flight_events -= delivered.events;
                self.metrics.acknowledged.inc_by(delivered.events);
                outbound.acknowledge(delivered.seq);
            }
            Err(error) => {
                let lane = &delivered.lane;
                tracing::warn!(%lane, logged = outbound.marks.logged, %error, "Kafka did not take it: sending again");
                outbound.rewind();
                self.metrics.rewinds.inc();
            }
        }
        Ok(())
    }

    /// Tells each lane that has something to learn how far it has got.
    async fn advance(&mut self, lease: Lease) {
        let now = Instant::now();
        let duration = match lease {
            Lease::Renew => millis(self.options.lease_ms),
            Lease::GiveBack => Duration::from_millis(1),
        };
        let due = |outbound: &Outbound| {
            let (told, marks) = (&outbound.told, &outbound.marks);
            lease == Lease::GiveBack
                || told.logged < marks.logged
                || told.recorded < marks.recorded
                || outbound.renew_at <= now
        };
        let told: Vec<_> = self
            .outbound
            .iter()
            .filter(|(_, outbound)| due(outbound))
            .map(|(lane, outbound)| (lane.clone(), outbound.marks))
            .collect();
        let answers = join_all(told.iter().map(|(lane, marks)| async {
            let answer = self.lanes.advance(lane, *marks, &self.name, duration).await;
            (lane.clone(), *marks, answer)
        }));
        for (lane, marks, answer) in answers.await {
            self.advanced(lane, marks, answer);
        }
        self.measure();
    }

    /// Begins to ask the database how far it has got; one that is away must hold up nothing else.
    fn ask_recorded(&self) -> Option<Asking> {
        // A lane that has forgotten what is recorded of it does not say that it lacks anything.
        let lacking = |outbound: &Outbound| {
            !outbound.compared || outbound.marks.recorded < outbound.marks.logged
        };
        let lanes: Vec<_> = self
            .outbound
            .iter()
            .filter(|(_, outbound)| lacking(outbound))
            .map(|(lane, _)| lane.clone())
            .collect();
        if lanes.is_empty() {
            return None;
        }
        let ledger = self.ledger.clone();
        let ask = async move {
            match tokio::time::timeout(ASK_MAX, ledger.recorded_many(&lanes)).await {
                Ok(recorded) => recorded.map_err(|error| error.to_string()),
                Err(_) => Err("no answer".to_owned()),
            }
        };
        Some(ask.boxed())
    }

    fn recorded(&mut self, recorded: Result<HashMap<LaneId, u64>, String>) {
        match recorded {
            Ok(recorded) => {
                for (lane, seq) in recorded {
                    if let Some(outbound) = self.outbound.get_mut(&lane).filter(|o| !o.behind) {
                        outbound.compared = true;
                        outbound.marks.recorded = outbound.marks.recorded.max(seq);
                    }
                }
            }
            Err(error) => tracing::debug!(error, "the recorded marks could not be read"),
        }
    }

    fn advanced(&mut self, lane: LaneId, told: Marks, answer: Result<Advance, LaneError>) {
        let Some(outbound) = self.outbound.get_mut(&lane) else { return };
        match answer {
            Ok(Advance::Leased { marks, trimmed }) => {
                outbound.trimmed = trimmed;
                // Another relay may have been further before this one had the lease.
                let jump = marks.logged > outbound.sent.max(told.logged);
                outbound.marks.seq = marks.seq;
                outbound.marks.recorded = outbound.marks.recorded.max(marks.recorded);
                if jump {
                    outbound.marks.logged = marks.logged;
                    outbound.rewind();
                }
                outbound.behind = false;
                outbound.told = told;
                outbound.renew_at = Instant::now() + millis(self.options.lease_ms / 3);
            }
            Ok(Advance::Behind { marks }) => {
                // What the lane does under those seqs now is sent all the same: the writer finds
                // the fork and keeps it as dead letters. Only the marks stay, and so the outbox.
                if !outbound.behind {
                    tracing::error!(%lane, ?marks, ?told, "Redis has lost what it had answered");
                    outbound.marks = marks;
                    outbound.rewind();
                    outbound.behind = true;
                }
                outbound.told = outbound.marks;
                outbound.renew_at = Instant::now() + millis(self.options.lease_ms / 3);
            }
            Ok(lost) => {
                tracing::info!(%lane, ?lost, "no longer relaying");
                self.outbound.remove(&lane);
            }
            Err(error) => {
                tracing::debug!(%lane, %error, "a lane could not be told its marks");
                // Its lease has run out, and one lane that cannot be read fails the read of all.
                if outbound.renew_at + millis(self.options.lease_ms) < Instant::now() {
                    self.outbound.remove(&lane);
                }
            }
        }
    }

    fn measure(&self) {
        let sum = |of: fn(&Marks) -> u64| -> i64 {
            let behind = |o: &Outbound| o.marks.seq.max(o.sent).saturating_sub(of(&o.marks)) as i64;
            self.outbound.values().map(behind).sum()
        };
        let kept = self.outbound.values().map(|o| o.marks.seq.saturating_sub(o.trimmed) as i64);
        self.metrics.outbox_events.set(kept.max().unwrap_or(0));
        self.metrics.behind.set(self.outbound.values().filter(|o| o.behind).count() as i64);
        self.metrics.unlogged.set(sum(|marks| marks.logged));
        self.metrics.unrecorded.set(sum(|marks| marks.recorded));
    }
}

fn outbound(
    partition: i32,
    secret: Arc<IdSecret>,
    marks: Marks,
    trimmed: u64,
    renew_at: Instant,
) -> Outbound {
    Outbound {
        partition,
        secret,
        marks,
        trimmed,
        // From what the database lacks, not from `logged`: what Kafka lost since it acknowledged
        // it is sent again, and the rest is dropped as repeats.
        sent: marks.recorded.max(trimmed),
        in_flight: VecDeque::new(),
        in_flight_events: 0,
        compared: false,
        behind: false,
        generation: 0,
        told: marks,
        renew_at,
        read_at: Instant::now(),
        rest_until: Instant::now(),
    }
}

/// The outcome of what is under way, if anything is.
async fn pending_or<T>(under_way: &mut Option<BoxFuture<'static, T>>) -> T {
    match under_way {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}
