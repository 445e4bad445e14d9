//! The writer: Kafka to database, in batches. What is decided about each record is in [`plan`];
//! what is written, in one transaction behind the lanes' marks, in `ledger`.
//!
//! Offsets are committed after the database, and are only a hint where to read on: what is read
//! twice is a repeat. So neither a crash nor a rebalance loses or repeats anything.

mod drain;
mod metrics;
pub mod plan;
mod retry;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::convert::Infallible;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::bus::BusError;
use crate::bus::consumer::{Consumer, Place as Reached, Received};
use crate::bus::record::{DecodeError, Message, decode};
use crate::config::{self, Config, millis};
use crate::domain::event::{Event, Seal};
use crate::domain::ids::LaneId;
use crate::failpoint;
use crate::ledger::{
    Applied, ApplyError, DeadReason, LaneMark, Ledger, LedgerError, ParkedKey, Place, StoredRecord,
};

use drain::Pace;
use metrics::ReasonLabel;
pub use metrics::WriterMetrics;
use plan::{Arrival, Content, Known, Left, Plan, plan};
pub use retry::retry;

const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// How often it is looked whether a lane of which something was left in Kafka has room again.
const LEFT_LOOK: Duration = Duration::from_secs(1);
/// How often offsets are committed: a broker works as much for one as for a batch of records, and they
/// are only a hint.
const COMMIT: Duration = Duration::from_millis(500);
/// A database that did not manage a batch in time is given half as many events at once, down to these.
const AT_ONCE_MIN: usize = 500;
/// How often a writer looks for parked records whose turn has come, and counts what is unapplied.
const LOOK: Duration = Duration::from_secs(5);
/// How often resolved dead letters that are old enough are forgotten.
const FORGET: Duration = Duration::from_secs(3_600);

/// Why the writer ends; servers that are merely away are no reason.
#[derive(Debug, thiserror::Error)]
pub enum WriterError {
    #[error(transparent)]
    Bus(#[from] BusError),
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}

/// What to configure.
#[derive(Debug, Clone)]
pub struct Options {
    pub kafka: config::Kafka,
    pub group: String,
    pub batch_max: usize,
    pub batch_age: Duration,
    /// Of one lane.
    pub parked_max: u64,
    /// Resolved dead letters are forgotten after this.
    pub dead_letters_kept_days: u32,
    /// Open ones, beyond which those of no lane are not kept.
    pub dead_letters_max: u64,
}

impl From<&Config> for Options {
    fn from(config: &Config) -> Self {
        Self {
            kafka: config.kafka.clone(),
            group: config.writer.group.clone(),
            batch_max: config.writer.batch_max,
            batch_age: millis(config.writer.batch_age_ms),
            parked_max: config.writer.parked_max as u64,
            dead_letters_kept_days: config.writer.dead_letters_kept_days,
            dead_letters_max: config.writer.dead_letters_max as u64,
        }
    }
}

/// The writer of one instance; others of the group share the partitions with it.
#[derive(Debug)]
pub struct Writer {
    options: Options,
    ledger: Ledger,
    metrics: WriterMetrics,
    pace: Mutex<Pace>,
    /// How many events are written at once: fewer for a while where the database was too slow for more.
    at_once: AtomicUsize,
}

/// What is left to do of a batch.
enum Task {
    Write(Vec<Arrival>),
    /// Write what was parked and whose turn has come.
    Unpark,
}

impl Task {
    fn has_seal(&self) -> bool {
        matches!(self, Self::Write(arrivals) if arrivals.iter().any(|one| one.seal().is_some()))
    }
}

/// By lane, from where it has to be read again.
type LeftLanes = BTreeMap<LaneId, Left>;

/// The writer was told to stop before the batch could be written.
struct Stopped;

impl Writer {
    pub fn new(options: Options, ledger: Ledger, metrics: WriterMetrics) -> Self {
        let at_once = AtomicUsize::new(options.batch_max);
        Self { options, ledger, metrics, pace: Mutex::default(), at_once }
    }

    /// Writes until it is told to stop; the batch in hand is finished then.
    ///
    /// # Errors
    /// What somebody has to look at: a wrong setting, a missing right, a schema that does not fit.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), WriterError> {
        let Options { kafka, group, .. } = &self.options;
        let consumer = Consumer::new(kafka, group, self.metrics.consumer.clone())?;
        let house = consumer.clone();
        let mut session = Session {
            consumer,
            next: BTreeMap::new(),
            left: LeftLanes::new(),
            left_looked_at: Instant::now(),
            written: false,
            committed_at: Instant::now(),
        };
        let outcome = tokio::select! {
            outcome = self.session(&mut session, &shutdown) => outcome,
            never = self.keep_house(house) => match never {},
        };
        // Without this the next session only reads a little again.
        let places = session.places();
        if let Err(error) = session.consumer.commit_now(places).await {
            tracing::info!(%error, "the last offsets were not committed; they are read again");
        }
        outcome
    }

    async fn session(
        &self,
        session: &mut Session,
        shutdown: &CancellationToken,
    ) -> Result<(), WriterError> {
        let Options { batch_max, batch_age, .. } = self.options;
        // One batch is read and decoded while the one before it is written; by a task of its own, or
        // the answers of the database would wait for it.
        let read_ahead = |consumer: &Consumer| {
            AbortOnDropHandle::new(tokio::spawn(read_batch(consumer.clone(), batch_max, batch_age)))
        };
        let mut ahead = read_ahead(&session.consumer);
        let mut set_back = BTreeSet::new();
        let mut looked_at = None::<Instant>;
        loop {
            let was_read = tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                was_read = &mut ahead => was_read,
            };
            let mut arrivals = match was_read {
                Ok(Ok(arrivals)) => arrivals,
                Ok(Err(error @ BusError::Unavailable(_))) => {
                    tracing::warn!(%error, "reading from Kafka; trying again");
                    Vec::new()
                }
                Ok(Err(error)) => return Err(error.into()),
                Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
            };
            // These were read before their partitions were set back, and come again, in order.
            arrivals.retain(|arrival| !set_back.contains(&arrival.record.partition));
            session.resume(&set_back);
            // What came since it was read: so a batch grows while the one before it takes long.
            let more = session.consumer.at_hand(batch_max - arrivals.len());
            arrivals.extend(more.into_iter().map(read));
            let assigned = session.look()?;
            ahead = read_ahead(&session.consumer);
            let offsets = offsets_after(&arrivals);
            let mut todo = VecDeque::new();
            if !arrivals.is_empty() {
                self.pace().begin(arrivals.len(), Instant::now());
                todo.extend(in_turn(arrivals.into_iter()));
            }
            if looked_at.is_none_or(|at| at.elapsed() > LOOK) {
                // What became ready while no writer ran, or by a retry that was cut off, must not
                // wait for its lane's next event.
                looked_at = Some(Instant::now());
                todo.push_back(Task::Unpark);
            }
            let worked = !todo.is_empty();
            match self.write(todo, session.left.clone(), shutdown).await? {
                Ok(left) => session.leave(left),
                Err(Stopped) => return Ok(()),
            }
            self.pace().end(Instant::now());
            session.next.extend(offsets);
            set_back = match assigned {
                Some(assigned) => self.set_back(session, &assigned).await?,
                None => BTreeSet::new(),
            };
            session.written |= worked;
            session.commit()?;
            self.metrics.full_lanes.set(gauge(session.left.len()));
        }
    }

    /// Sets partitions back to what was left of a lane that has room again, or has got on; returns them,
    /// paused. A lane that is neither would only be left again.
    async fn set_back(
        &self,
        session: &mut Session,
        assigned: &BTreeSet<i32>,
    ) -> Result<BTreeSet<i32>, WriterError> {
        // Whoever has the others reads them from what is committed.
        session.left.retain(|_, left| assigned.contains(&left.partition));
        session.next.retain(|partition, _| assigned.contains(partition));
        let lanes: Vec<LaneId> = session.left.keys().cloned().collect();
        let marks = match self.ledger.within_patience(self.ledger.lane_marks(&lanes)).await {
            Ok(marks) => marks,
            Err(error @ LedgerError::Unavailable(_)) => {
                tracing::debug!(%error, "whether lanes have room again is not known");
                return Ok(BTreeSet::new());
            }
            Err(error) => return Err(error.into()),
        };
        let moved = |(lane, left): &(&LaneId, &Left)| {
            let parked_max = self.options.parked_max;
            let is_stuck =
                |mark: &LaneMark| mark.parked >= parked_max && mark.recorded <= left.recorded;
            !marks.get(lane).is_some_and(is_stuck)
        };
        let partitions = session.left.iter().filter(moved).map(|(_, left)| left.partition);
        let partitions: BTreeSet<i32> = partitions.collect();
        Ok(session.set_back(partitions)?)
    }

    /// Works off the tasks, however long the database is away. Nothing that it was given is lost:
    /// it is written, parked, a dead letter, or to be read again from what this returns, with what was
    /// left before.
    async fn write(
        &self,
        mut todo: VecDeque<Task>,
        mut left: LeftLanes,
        shutdown: &CancellationToken,
    ) -> Result<Result<LeftLanes, Stopped>, WriterError> {
        let mut backoff = Backoff::default();
        while let Some(mut task) = todo.pop_front() {
            let at_once = self.at_once.load(Ordering::Relaxed);
            if let Task::Write(arrivals) = &mut task
                && arrivals.len() > at_once
            {
                let rest = arrivals.split_off(at_once);
                todo.push_front(Task::Write(rest));
            }
            match self.ledger.within_patience(self.attempt(&task, &left, at_once)).await {
                Ok(done) => {
                    let more = (at_once * 2).min(self.options.batch_max);
                    self.at_once.store(more, Ordering::Relaxed);
                    backoff = Backoff::default();
                    self.metrics.paused.set(0);
                    leave(&mut left, done.left);
                    if done.ready {
                        todo.push_front(Task::Unpark);
                    }
                    if !done.arrivals.is_empty() {
                        todo.push_front(Task::Write(done.arrivals));
                    }
                }
                Err(ApplyError::Unfit(detail)) => {
                    let Task::Write(arrivals) = task else {
                        return Err(LedgerError::Corrupt { what: "parked record", detail }.into());
                    };
                    narrow(arrivals, detail, &mut todo)?;
                }
                Err(ApplyError::MarkMoved) => {
                    self.metrics.marks_moved.inc();
                    let seals = task.has_seal();
                    todo.push_front(task);
                    // What moved it may have closed a gap, and what waited for that comes first.
                    if seals {
                        todo.push_front(Task::Unpark);
                    }
                    if backoff.rest(shutdown).await.is_err() {
                        return Ok(Err(Stopped));
                    }
                }
                Err(ApplyError::Ledger(error @ LedgerError::Unavailable(_))) => {
                    tracing::warn!(%error, "writing to the database; trying again");
                    self.metrics.paused.set(1);
                    self.metrics.retries.inc();
                    todo.push_front(task);
                    let fewer = (at_once / 2).max(AT_ONCE_MIN).min(at_once);
                    self.at_once.store(fewer, Ordering::Relaxed);
                    if backoff.rest(shutdown).await.is_err() {
                        return Ok(Err(Stopped));
                    }
                }
                Err(ApplyError::Ledger(error)) => return Err(error.into()),
            }
        }
        Ok(Ok(left))
    }

    async fn attempt(
        &self,
        task: &Task,
        left: &LeftLanes,
        at_once: usize,
    ) -> Result<Done, ApplyError> {
        let arrivals = match task {
            Task::Write(arrivals) => arrivals,
            Task::Unpark => {
                let limit = u32::try_from(at_once).unwrap_or(u32::MAX);
                let ready = self.ledger.ready_parked(None, limit).await?;
                let arrivals = ready.into_iter().map(read_parked).collect();
                return Ok(Done { arrivals, ..Done::default() });
            }
        };
        let mut known = ask(&self.ledger, arrivals).await?;
        let sealed = arrivals.iter().find_map(Arrival::seal);
        known.left = sealed.and_then(|seal| left.get(&seal.lane).copied());
        let mut plan = plan(arrivals, &known, self.options.parked_max);
        let dropped = self.drop_strays(&mut plan, &known);
        if let (Some(Seal { lane, epoch, .. }), false) = (sealed, plan.doubts.is_empty()) {
            let doubts = plan.doubts.join("; ");
            tracing::warn!(%lane, epoch, doubts, "a seal does not count: its lane is in doubt");
        }
        if plan.batch.is_empty() {
            self.metrics.repeats.inc_by(plan.repeats);
            self.metrics.dead_letters_dropped.inc_by(dropped);
            return Ok(Done { left: plan.left, ..Done::default() });
        }
        let began = Instant::now();
        let applied = self.ledger.apply(&plan.batch).await?;
        failpoint::pass("writer-committed");
        self.metrics.batch_duration.observe(began.elapsed().as_secs_f64());
        self.tell(&plan, applied);
        self.metrics.dead_letters_dropped.inc_by(dropped);
        Ok(Done { left: plan.left, ready: applied.ready, arrivals: Vec::new() })
    }

    /// Drops dead letters of no lane while as many are open as may be: a topic that somebody else writes
    /// to must not fill the database. Nobody waits for them; what a lane waits for is always kept.
    /// Returns how many, to be counted once the batch is through: until then it may be tried again.
    fn drop_strays(&self, plan: &mut Plan, known: &Known) -> u64 {
        let open = u64::try_from(self.metrics.dead_letters_open.get()).unwrap_or(0);
        if plan.batch.dead.is_empty() || open < self.options.dead_letters_max {
            return 0;
        }
        let before = plan.batch.dead.len();
        plan.batch.dead.retain(|letter| {
            letter.place.as_ref().is_some_and(|place| known.marks.contains_key(&place.lane))
        });
        let dropped = before - plan.batch.dead.len();
        if dropped > 0 {
            tracing::error!(
                dropped,
                open,
                "records of no lane were not kept: see writer.dead_letters_max"
            );
        }
        dropped as u64
    }

    /// Says how much there is to do, counts what is unapplied, and forgets resolved dead letters in
    /// time. What a server that is away would have to tell stays as it was.
    async fn keep_house(&self, consumer: Consumer) -> Infallible {
        let mut forgot_at = None::<Instant>;
        let mut looks = tokio::time::interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            looks.tick().await;
            match consumer.lag_records().await {
                Ok(lag) => {
                    let drain_s = self.pace().drain_s(lag, Instant::now());
                    self.metrics.drain.set(drain_s);
                }
                Err(error) => tracing::debug!(%error, "Kafka did not say how far it is behind"),
            }
            match self.ledger.within_patience(self.ledger.unapplied()).await {
                Ok(unapplied) => {
                    self.metrics.dead_letters_open.set(unapplied.open);
                    self.metrics.parked_records.set(unapplied.parked);
                }
                Err(error) => tracing::debug!(%error, "what is unapplied was not counted"),
            }
            if forgot_at.is_none_or(|at| at.elapsed() > FORGET) {
                let forget = self.ledger.forget_dead_letters(self.options.dead_letters_kept_days);
                match self.ledger.within_patience(forget).await {
                    Ok(forgotten) => {
                        forgot_at = Some(Instant::now());
                        if forgotten > 0 {
                            tracing::info!(
                                forgotten,
                                "resolved dead letters were old enough to go"
                            );
                        }
                    }
                    Err(error) => tracing::debug!(%error, "no dead letters were forgotten"),
                }
            }
        }
    }

    fn pace(&self) -> MutexGuard<'_, Pace> {
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, plan: &Plan, applied: Applied) {
        let metrics = &self.metrics;
        metrics.batches.inc();
        metrics.events.inc_by(plan.batch.events.len() as u64);
        metrics.rows.inc_by(applied.rows);
        metrics.repeats.inc_by(plan.repeats);
        metrics.parked.inc_by(applied.parked);
        if let Some(newest) = plan.batch.events.iter().map(|event| event.at).max() {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let age_s = now.as_secs_f64() - newest.millis() as f64 / 1000.0;
            metrics.event_age.set(age_s.max(0.0));
        }
        for letter in &plan.batch.dead {
            let reason = letter.reason.as_str();
            metrics.dead_letters.get_or_create(&ReasonLabel { reason }).inc();
            let StoredRecord { partition, offset, .. } = letter.record;
            tracing::error!(reason, detail = letter.detail, partition, offset, place = ?letter.place,
                "a record is a dead letter");
        }
    }
}

/// Reads what has to be known to decide about these.
async fn ask(ledger: &Ledger, arrivals: &[Arrival]) -> Result<Known, LedgerError> {
    let events = || arrivals.iter().filter_map(|arrival| Some((arrival, arrival.event()?)));
    let lanes: HashSet<&LaneId> = arrivals.iter().filter_map(Arrival::lane).collect();
    if lanes.is_empty() {
        return Ok(Known::default());
    }
    let lanes: Vec<LaneId> = lanes.into_iter().cloned().collect();
    let marks = ledger.lane_marks(&lanes).await?;
    let (mut passed, mut waiting) = (Vec::new(), Vec::new());
    for (arrival, event) in events() {
        let Some(mark) = marks.get(&event.lane) else { continue };
        if event.seq <= mark.recorded {
            passed.push((event.lane.clone(), event.seq));
        } else if mark.parked > 0 && arrival.parked.is_none() {
            waiting.push(arrival.parked_key(event));
        }
    }
    let (mut recorded, mut parked, mut doubts) = (HashMap::new(), HashSet::new(), Vec::new());
    if !passed.is_empty() {
        recorded = ledger.recorded_events(&passed).await?;
    }
    if !waiting.is_empty() {
        parked = ledger.parked_among(&waiting).await?;
    }
    let sealed = arrivals.iter().find_map(Arrival::seal);
    if let Some(seal) = sealed.filter(|seal| marks.contains_key(&seal.lane)) {
        doubts = ledger.doubts(&seal.lane, false).await?;
    }
    Ok(Known { marks, recorded, parked, doubts, left: None })
}

/// A seal is a task of its own, and before it comes all whose turn it is by then: what is parked at a
/// seal may end there.
fn in_turn(arrivals: impl Iterator<Item = Arrival>) -> Vec<Task> {
    let (mut tasks, mut events) = (Vec::new(), Vec::new());
    for arrival in arrivals {
        if arrival.seal().is_some() {
            tasks.extend([Task::Write(std::mem::take(&mut events)), Task::Unpark]);
            tasks.push(Task::Write(vec![arrival]));
        } else {
            events.push(arrival);
        }
    }
    tasks.push(Task::Write(events));
    tasks
}

/// What one attempt came to.
#[derive(Default)]
struct Done {
    left: LeftLanes,
    /// Parked records wait whose turn has come.
    ready: bool,
    /// To be written next.
    arrivals: Vec<Arrival>,
}

fn leave(left: &mut LeftLanes, more: LeftLanes) {
    for (lane, of_lane) in more {
        left.entry(lane).and_modify(|first| *first = first.and(of_lane)).or_insert(of_lane);
    }
}

/// One membership in the group.
struct Session {
    consumer: Consumer,
    /// By partition, the offset to read next.
    next: BTreeMap<i32, i64>,
    /// What found no room among the parked and is still in Kafka: offsets are committed no further, and
    /// when it was last looked whether there is room.
    left: LeftLanes,
    left_looked_at: Instant,
    /// Something was written since offsets were committed, and when that was.
    written: bool,
    committed_at: Instant,
}

impl Session {
    /// Which partitions are this member's, if it is time to look what became of those that something was
    /// left of. To be asked before more is read: what comes then of another partition was read by nobody
    /// before, while a seal in hand may be behind what was left.
    fn look(&mut self) -> Result<Option<BTreeSet<i32>>, BusError> {
        if self.left.is_empty() || self.left_looked_at.elapsed() < LEFT_LOOK {
            return Ok(None);
        }
        self.left_looked_at = Instant::now();
        self.consumer.assigned().map(Some)
    }

    /// Reads on past what finds no room: what it waits for may lie behind it.
    fn leave(&mut self, left: LeftLanes) {
        for (lane, Left { partition, offset, .. }) in &left {
            if !self.left.contains_key(lane) {
                tracing::warn!(%lane, partition, offset,
                    "a lane has writer.parked_max parked: what follows is left in Kafka for now");
            }
        }
        leave(&mut self.left, left);
    }

    /// Pauses these partitions where something was left, and reads on there once they are resumed.
    fn set_back(&mut self, partitions: BTreeSet<i32>) -> Result<BTreeSet<i32>, BusError> {
        let mut set_back = BTreeSet::new();
        for (partition, Reached { from, .. }) in self.places() {
            if !partitions.contains(&partition) {
                continue;
            }
            match self.consumer.pause_at(partition, from) {
                Ok(()) => {
                    self.next.insert(partition, from);
                    self.left.retain(|_, left| left.partition != partition);
                    set_back.insert(partition);
                }
                // Taken from us meanwhile: whoever has it now reads from what is committed.
                Err(BusError::Unavailable(error)) => {
                    tracing::debug!(%error, partition, "not set back");
                    self.resume(&[partition].into());
                }
                Err(error) => return Err(error),
            }
        }
        Ok(set_back)
    }

    fn resume(&self, partitions: &BTreeSet<i32>) {
        for &partition in partitions {
            if let Err(error) = self.consumer.resume(partition) {
                tracing::debug!(%error, partition, "not resumed: it was taken meanwhile");
            }
        }
    }

    /// By partition, how far it is read, and from where whoever comes next has to read.
    fn places(&self) -> BTreeMap<i32, Reached> {
        let reached = |(&partition, &read): (&i32, &i64)| (partition, Reached { from: read, read });
        let mut places: BTreeMap<_, _> = self.next.iter().map(reached).collect();
        for left in self.left.values() {
            if let Some(place) = places.get_mut(&left.partition) {
                place.from = place.from.min(left.offset);
            }
        }
        places
    }

    /// Commits what this member still reads: of the rest, somebody else knows more.
    fn commit(&mut self) -> Result<(), BusError> {
        if !self.written || self.committed_at.elapsed() < COMMIT {
            return Ok(());
        }
        (self.written, self.committed_at) = (false, Instant::now());
        let assigned = self.consumer.assigned()?;
        self.next.retain(|partition, _| assigned.contains(partition));
        if let Err(error) = self.consumer.commit(&self.places()) {
            tracing::debug!(%error, "offsets were not committed; they are read again");
        }
        Ok(())
    }
}

/// Gets nearer to the event that the database refuses: the halves are tried one after the other,
/// and a single one is a dead letter. What follows it in its lane finds a gap and is parked.
fn narrow(
    mut arrivals: Vec<Arrival>,
    detail: String,
    todo: &mut VecDeque<Task>,
) -> Result<(), LedgerError> {
    // In each lane's order, or what is fine could park only since its half came first.
    arrivals.sort_by_cached_key(|a| a.event().map(|event| (event.lane.clone(), event.seq)));
    if arrivals.len() > 1 {
        let rest = arrivals.split_off(arrivals.len() / 2);
        todo.push_front(Task::Write(rest));
    } else if let [arrival] = arrivals.as_mut_slice() {
        let Content::Event(event) = &arrival.content else {
            // Dead letters are stored as bytes: the database has no reason to refuse one.
            return Err(LedgerError::Corrupt { what: "dead letter", detail });
        };
        let place = Some(place(event));
        arrival.content = Content::Dead { reason: DeadReason::NotApplicable, detail, place };
    }
    todo.push_front(Task::Write(arrivals));
    Ok(())
}

fn place(event: &Event) -> Place {
    Place { lane: event.lane.clone(), epoch: event.epoch, seq: event.seq }
}

async fn read_batch(
    consumer: Consumer,
    batch_max: usize,
    batch_age: Duration,
) -> Result<Vec<Arrival>, BusError> {
    let records = consumer.batch(batch_max, batch_age).await?;
    Ok(records.into_iter().map(read).collect())
}

fn offsets_after(arrivals: &[Arrival]) -> BTreeMap<i32, i64> {
    // Records of one partition come in order, so the last one counts.
    let next = |arrival: &Arrival| (arrival.record.partition, arrival.record.offset + 1);
    arrivals.iter().map(next).collect()
}

fn read(record: Received) -> Arrival {
    let Received { topic, partition, offset, headers, payload } = record;
    let record = StoredRecord { topic, partition, offset, headers, payload };
    Arrival { content: content(&record), record, parked: None }
}

fn read_parked(parked: crate::ledger::Parked) -> Arrival {
    let key: ParkedKey = parked.key();
    Arrival { content: content(&parked.record), record: parked.record, parked: Some(key) }
}

fn content(record: &StoredRecord) -> Content {
    let headers = record.headers.iter().map(|(name, value)| (name.as_str(), value.as_slice()));
    match decode(headers, &record.payload) {
        Ok(Message::Event(event)) => Content::Event(event),
        Ok(Message::Seal(seal)) => Content::Seal(seal),
        Err(DecodeError { detail, position }) => Content::Dead {
            reason: DeadReason::Undecodable,
            detail,
            place: position.map(|at| Place { lane: at.lane, epoch: at.epoch, seq: at.seq }),
        },
    }
}

fn gauge(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// Rests that grow, with jitter, so that writers do not come back all at once.
#[derive(Default)]
struct Backoff {
    rests: u32,
}

impl Backoff {
    async fn rest(&mut self, shutdown: &CancellationToken) -> Result<(), Stopped> {
        let longest = BACKOFF_MIN.saturating_mul(1 << self.rests.min(10)).min(BACKOFF_MAX);
        self.rests += 1;
        let rest = longest.mul_f64(rand::random_range(0.5..1.0));
        tokio::select! {
            () = shutdown.cancelled() => Err(Stopped),
            () = tokio::time::sleep(rest) => Ok(()),
        }
    }
}
