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
//! Nothing is only in its memory: one that dies is followed by one that begins at `recorded`, and
//! what is sent twice the writer drops by its seq. A delivery that fails rewinds the lane to what was
//! acknowledged. Where the database does not get on with what was acknowledged, Kafka is asked whether
//! it still has it; what it lost is sent again from `recorded`. The lease keeps two relays from
//! sending the same lane; it only saves double work.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::{BoxFuture, FutureExt, join_all};
use futures_util::stream::{FuturesUnordered, StreamExt};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio_util::sync::CancellationToken;

use crate::bus::BusError;
use crate::bus::producer::{Delivered, Producer, SendError};
use crate::bus::record::encode;
use crate::bus::topic::{Extent, extents};
use crate::config::{self, Config, millis};
use crate::domain::ids::{IdSecret, LaneId};
use crate::failpoint;
use crate::lanes::outbox::{self, Entry};
use crate::lanes::reply::Marks;
use crate::lanes::{Advance, LaneError, Lanes, Reached};
use crate::ledger::{Catalog, Ledger};

/// How often marks are copied while there is something to copy, and lanes read that have news all the
/// time. One that had none is read at once when it has.
const MARKS_INTERVAL: Duration = Duration::from_millis(20);
/// How long the relay rests after Redis, Kafka or the database failed it.
const PAUSE: Duration = Duration::from_millis(250);
/// How long the database may take to say how far it has got.
const ASK_MAX: Duration = Duration::from_secs(2);
/// Longest pause before Kafka is asked once more whether it lost what the database lacks of a lane.
const STALL_MAX: Duration = Duration::from_secs(300);
/// Streams that one read names at most.
const LANES_A_READ: usize = 256;

struct Metrics {
    sent: Counter,
    acknowledged: Counter,
    rewinds: Counter,
    stalls: Counter,
    losses: Counter,
    producers: Counter,
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
            stalls: Counter::default(),
            losses: Counter::default(),
            producers: Counter::default(),
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
        registry.register("rewinds", "Lanes sent again since a delivery failed", m.rewinds.clone());
        registry.register(
            "stalls",
            "Times that Kafka was asked whether it lost what the database lacks of a lane",
            m.stalls.clone(),
        );
        registry.register(
            "losses",
            "Lanes sent again from `recorded` since Kafka had lost what it had acknowledged",
            m.losses.clone(),
        );
        registry.register(
            "producers_renewed",
            "Producers that lost their place and were made anew",
            m.producers.clone(),
        );
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
    /// Up to where Kafka acknowledged what this relay sent, which began behind `recorded`: it can be
    /// below what another relay had acknowledged before.
    acknowledged: u64,
    /// Where in its partition the last event lies that was acknowledged.
    offset: Option<i64>,
    /// Since when the database lacks what was acknowledged, and stands still.
    stall: Option<Stall>,
    /// Entries on their way: the seq each ends with, and whether it was acknowledged.
    in_flight: VecDeque<(u64, bool)>,
    /// Events in them.
    in_flight_events: u64,
    /// The database has said how far it is since this relay has the lane.
    compared: bool,
    /// Redis lost events that Kafka or the database has. It stays so: the lane is opened again under
    /// another epoch. Until then it is told nothing but its own marks.
    behind: bool,
    /// Rises at each rewind: deliveries of an older one no longer count.
    generation: u64,
    /// What the lane was told last.
    told: Reached,
    renew_at: Instant,
    /// When it was read from last: who waits longest is read first.
    read_at: Instant,
    /// Not read from before this: the producer was full or an entry unreadable.
    rest_until: Instant,
}

/// A lane that the database does not get on with.
#[derive(Debug, Clone, Copy)]
struct Stall {
    /// Where the database stands.
    recorded: u64,
    /// The offset of an event beyond it, that Kafka had acknowledged by then.
    offset: i64,
    /// When to ask Kafka whether it still has that, and how long to wait before the next time.
    ask_at: Instant,
    wait: Duration,
}

impl Outbound {
    /// Sends again, beginning behind this event.
    fn rewind_to(&mut self, seq: u64) {
        self.generation += 1;
        self.in_flight.clear();
        self.in_flight_events = 0;
        (self.acknowledged, self.sent) = (seq, seq);
        self.rest();
    }

    fn reached(&self) -> Reached {
        let Marks { epoch, logged, recorded, .. } = self.marks;
        Reached { epoch, logged, recorded, acknowledged: self.acknowledged }
    }

    fn rewind(&mut self) {
        self.rewind_to(self.acknowledged);
    }

    /// As if the lease was new: what another relay sent lies who knows where.
    fn begin_again(&mut self) {
        self.offset = None;
        self.rewind_to(self.marks.recorded.max(self.trimmed));
    }

    /// Notes whether the database gets on with what Kafka acknowledged.
    fn watch(&mut self, patience: Duration) {
        let recorded = self.marks.recorded;
        let Some(offset) = self.offset.filter(|_| recorded < self.acknowledged) else {
            self.stall = None;
            return;
        };
        if self.stall.is_none_or(|stall| stall.recorded != recorded) {
            let ask_at = Instant::now() + patience;
            self.stall = Some(Stall { recorded, offset, ask_at, wait: patience });
        }
    }

    fn rest(&mut self) {
        self.rest_until = Instant::now() + PAUSE;
    }

    fn acknowledge(&mut self, seq: u64, offset: Option<i64>) {
        self.offset = offset;
        if let Some(entry) = self.in_flight.iter_mut().find(|entry| entry.0 == seq) {
            entry.1 = true;
        }
        while let Some((seq, true)) = self.in_flight.front().copied() {
            self.acknowledged = seq;
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
    /// The offset of the last.
    outcome: Result<Option<i64>, SendError>,
}

/// Why the relay cannot go on. An unreachable server is no reason.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// Kafka's producer lost its place and cannot be made anew.
    #[error(transparent)]
    Producer(#[from] BusError),
}

type Asking = BoxFuture<'static, Result<HashMap<LaneId, u64>, String>>;
/// Lanes of which Kafka lost what the database lacks, and where the database stands.
type Searching = BoxFuture<'static, Result<HashMap<LaneId, u64>, String>>;
type Reading = BoxFuture<'static, Result<Vec<(LaneId, Vec<Entry>)>, LaneError>>;

/// The role: see the module's comment.
pub struct Relay {
    lanes: Lanes,
    catalog: Catalog,
    ledger: Ledger,
    producer: Producer,
    kafka: config::Kafka,
    /// Of the writers.
    group: String,
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
    /// Entries of a lane that the last read asked for at most.
    asked: usize,
    /// Something was found a moment ago: what comes next gathers until the next tick. A read, and a
    /// request to Kafka, for each of the lanes' calls cost more than the events.
    gathers: bool,
}

impl Relay {
    pub fn new(
        lanes: Lanes,
        catalog: Catalog,
        ledger: Ledger,
        producer: Producer,
        config: &Config,
        registry: &mut Registry,
    ) -> Self {
        Self {
            lanes,
            catalog,
            ledger,
            producer,
            kafka: config.kafka.clone(),
            group: config.writer.group.clone(),
            options: config.relay.clone(),
            name: format!("relay-{:016x}", rand::random::<u64>()),
            metrics: Metrics::register(registry),
            outbound: HashMap::new(),
            leases: 0,
            deliveries: FuturesUnordered::new(),
            retry_at: HashMap::new(),
            asked: 0,
            gathers: false,
        }
    }

    /// Relays until shut down; then waits for what is on its way, tells the lanes and gives back
    /// its leases. Redis, Kafka or the database away is a pause, never an end.
    pub async fn run(mut self, shutdown: CancellationToken) -> Result<(), RelayError> {
        let mut marks = tokio::time::interval(MARKS_INTERVAL);
        marks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut reading: Option<Reading> = None;
        let mut asking: Option<Asking> = None;
        let mut searching: Option<Searching> = None;
        loop {
            if reading.is_none() && !self.gathers {
                reading = self.read();
            }
            let read = pending_or(&mut reading);
            let asked = pending_or(&mut asking);
            let searched = pending_or(&mut searching);
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
                lost = searched => {
                    searching = None;
                    self.lost(lost);
                }
                _ = marks.tick() => {
                    self.gathers = false;
                    if asking.is_none() {
                        asking = self.ask_recorded();
                    }
                    if searching.is_none() {
                        searching = self.search();
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
        let nothing = Reached { epoch, ..Reached::default() };
        match lanes.advance(lane, nothing, name, duration).await {
            Ok(Advance::Epoch { epoch }) => {
                let nothing = Reached { epoch, ..Reached::default() };
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
        self.asked = count;
        Some(async move { lanes.read_outboxes(&from, count, millis(wait)).await }.boxed())
    }

    fn found(
        &mut self,
        found: Result<Vec<(LaneId, Vec<Entry>)>, LaneError>,
    ) -> Result<(), RelayError> {
        match found {
            Ok(found) => {
                let more = found.iter().any(|(_, entries)| entries.len() >= self.asked);
                self.gathers = !found.is_empty() && !more;
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
            failpoint::pass("relay-read");
            let mut sent = Vec::with_capacity(events.len());
            for event in &events {
                match self.producer.send(outbound.partition, &encode(event)) {
                    Ok(delivery) => sent.push(delivery),
                    Err(fatal @ SendError::Fatal(_)) => return self.renew_producer(&fatal),
                    // The entry is sent again whole: its first events are then repeats.
                    Err(SendError::QueueFull) => {
                        outbound.rest();
                        return Ok(());
                    }
                    Err(error) => {
                        tracing::warn!(%lane, seq = event.seq, %error, "Kafka's producer does not take it: the lane waits");
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
                let outcome = last_offset(sent).await;
                Delivery { lane, generation, seq: last, events, outcome }
            };
            self.deliveries.push(delivery.boxed());
        }
        Ok(())
    }

    fn delivered(&mut self, delivered: Delivery) -> Result<(), RelayError> {
        let Some(outbound) = self.outbound.get_mut(&delivered.lane) else { return Ok(()) };
        if outbound.generation != delivered.generation {
            return Ok(());
        }
        match delivered.outcome {
            Ok(offset) => {
                failpoint::pass("relay-sent");
                outbound.in_flight_events -= delivered.events;
                self.metrics.acknowledged.inc_by(delivered.events);
                outbound.acknowledge(delivered.seq, offset);
            }
            Err(fatal @ SendError::Fatal(_)) => return self.renew_producer(&fatal),
            Err(error) => {
                let (lane, from) = (&delivered.lane, outbound.acknowledged);
                tracing::warn!(%lane, from, %error, "Kafka did not take it: sending again");
                outbound.rewind();
                self.metrics.rewinds.inc();
            }
        }
        Ok(())
    }

    /// A producer that lost its place delivers nothing more, of any lane: another begins at what Kafka
    /// acknowledged of each.
    fn renew_producer(&mut self, fatal: &SendError) -> Result<(), RelayError> {
        tracing::warn!(error = %fatal, "Kafka's producer is made anew");
        self.producer.renew()?;
        self.outbound.values_mut().for_each(Outbound::rewind);
        self.metrics.producers.inc();
        Ok(())
    }

    /// Begins to find out whether Kafka still has what the database has been lacking for a while.
    fn search(&mut self) -> Option<Searching> {
        let (now, patience) = (Instant::now(), millis(self.options.stall_ms));
        let mut stalled = Vec::new();
        for (lane, outbound) in self.outbound.iter_mut().filter(|(_, outbound)| !outbound.behind) {
            outbound.watch(patience);
            if let Some(stall) = outbound.stall.as_mut().filter(|stall| stall.ask_at <= now) {
                stall.wait = (stall.wait * 2).min(STALL_MAX);
                stall.ask_at = now + stall.wait;
                stalled.push((lane.clone(), outbound.partition, *stall));
            }
        }
        if stalled.is_empty() {
            return None;
        }
        self.metrics.stalls.inc_by(stalled.len() as u64);
        let (kafka, group, ledger) = (self.kafka.clone(), self.group.clone(), self.ledger.clone());
        Some(async move { search(&kafka, &group, &ledger, stalled).await }.boxed())
    }

    fn lost(&mut self, lost: Result<HashMap<LaneId, u64>, String>) {
        let lost = match lost {
            Ok(lost) => lost,
            Err(error) => {
                tracing::debug!(error, "whether Kafka lost something could not be found out");
                return;
            }
        };
        for (lane, recorded) in lost {
            let Some(outbound) = self.outbound.get_mut(&lane) else { continue };
            let (acknowledged, from) = (outbound.acknowledged, recorded.max(outbound.trimmed));
            tracing::error!(%lane, acknowledged, from, "Kafka has lost what it had acknowledged: sending again");
            if from > recorded {
                tracing::error!(%lane, recorded, trimmed = from, "the outbox no longer has all of it");
            }
            outbound.rewind_to(from);
            self.metrics.losses.inc();
        }
    }

    /// Tells each lane that has something to learn how far it has got.
    async fn advance(&mut self, lease: Lease) {
        let now = Instant::now();
        let duration = match lease {
            Lease::Renew => millis(self.options.lease_ms),
            Lease::GiveBack => Duration::from_millis(1),
        };
        let due = |outbound: &Outbound| {
            lease == Lease::GiveBack
                || outbound.told != outbound.reached()
                || outbound.renew_at <= now
        };
        let told: Vec<_> = self
            .outbound
            .iter()
            .filter(|(_, outbound)| due(outbound))
            .map(|(lane, outbound)| (lane.clone(), outbound.reached()))
            .collect();
        let answers = join_all(told.iter().map(|(lane, reached)| async {
            let answer = self.lanes.advance(lane, *reached, &self.name, duration).await;
            (lane.clone(), *reached, answer)
        }));
        for (lane, reached, answer) in answers.await {
            self.advanced(lane, reached, answer);
        }
        self.measure();
    }

    /// Begins to ask the database how far it has got; one that is away must hold up nothing else.
    fn ask_recorded(&self) -> Option<Asking> {
        // A lane that has forgotten what is recorded of it does not say that it lacks anything.
        let lacking = |outbound: &Outbound| {
            let unrecorded = outbound.marks.recorded < outbound.marks.logged;
            !outbound.behind && (!outbound.compared || unrecorded)
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

    fn advanced(&mut self, lane: LaneId, told: Reached, answer: Result<Advance, LaneError>) {
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
                }
                // What was trimmed cannot be read any more: nobody had told the lane how much of it is
                // recorded when this relay took it.
                if jump || trimmed > outbound.sent {
                    outbound.begin_again();
                }
                outbound.told = told;
                outbound.renew_at = Instant::now() + millis(self.options.lease_ms / 3);
            }
            Ok(Advance::Behind { marks, trimmed }) => {
                // What the lane did under those seqs since is sent all the same, once: the writer
                // finds the fork and keeps it as dead letters.
                if !outbound.behind {
                    tracing::error!(%lane, ?marks, ?told, "Redis has lost what it had answered");
                    (outbound.marks, outbound.trimmed) = (marks, trimmed);
                    outbound.begin_again();
                    outbound.behind = true;
                }
                outbound.told = outbound.reached();
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
    // From what the database lacks, not from `logged`: what Kafka lost since it acknowledged it is
    // sent again, and the rest is dropped as repeats.
    let acknowledged = marks.recorded.max(trimmed);
    let Marks { epoch, logged, recorded, .. } = marks;
    Outbound {
        partition,
        secret,
        marks,
        trimmed,
        sent: acknowledged,
        acknowledged,
        offset: None,
        stall: None,
        in_flight: VecDeque::new(),
        in_flight_events: 0,
        compared: false,
        behind: false,
        generation: 0,
        told: Reached { epoch, logged, recorded, acknowledged },
        renew_at,
        read_at: Instant::now(),
        rest_until: Instant::now(),
    }
}

/// Waits for deliveries in the order in which they were sent. They end in that order, so this wakes up
/// once or twice for all of them.
async fn last_offset(
    sent: Vec<impl Future<Output = Result<Delivered, SendError>>>,
) -> Result<Option<i64>, SendError> {
    let mut last = None;
    for delivery in sent {
        last = Some(delivery.await?.offset);
    }
    Ok(last)
}

/// Of these lanes, those of which the group has read all that Kafka has, up to beyond what Kafka had
/// acknowledged, and of which the database still lacks it: where the database stands. A lane that a
/// dead letter blocks is none of them: sent again, it would only be one more.
async fn search(
    kafka: &config::Kafka,
    group: &str,
    ledger: &Ledger,
    stalled: Vec<(LaneId, i32, Stall)>,
) -> Result<HashMap<LaneId, u64>, String> {
    let partitions: BTreeSet<i32> = stalled.iter().map(|(_, partition, _)| *partition).collect();
    let extents = extents(kafka, group, partitions).await.map_err(|error| error.to_string())?;
    let gone = |(_, partition, stall): &&(LaneId, i32, Stall)| {
        extents.get(partition).is_some_and(|extent| is_passed(*extent, stall.offset))
    };
    let passed: Vec<_> = stalled.iter().filter(gone).collect();
    let lanes: Vec<LaneId> = passed.iter().map(|(lane, ..)| lane.clone()).collect();
    // Asked after Kafka: what the group had read by then is recorded.
    let asked = tokio::time::timeout(ASK_MAX, ledger.unblocked_marks(&lanes)).await;
    let waiting = asked.map_err(|_| "no answer")?.map_err(|error| error.to_string())?;
    let still = |(lane, _, stall): &&(LaneId, i32, Stall)| {
        waiting.get(lane).filter(|recorded| **recorded == stall.recorded).copied()
    };
    Ok(passed.iter().filter_map(|at| Some((at.0.clone(), still(at)?))).collect())
}

/// Whether a record that was acknowledged at this offset is gone, or was read by the group.
fn is_passed(extent: Extent, offset: i64) -> bool {
    extent.end <= offset || extent.first > offset || extent.read.is_some_and(|read| read > offset)
}

/// The outcome of what is under way, if anything is.
async fn pending_or<T>(under_way: &mut Option<BoxFuture<'static, T>>) -> T {
    match under_way {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}
