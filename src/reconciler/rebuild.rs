//! Recovery: a frozen or missing lane is opened anew, as it is where it has lost nothing, else after it
//! was written anew from the ledger and proven.
//!
//! ```text
//!   ask who has seen what ─▶ take the next epoch (database) ─▶ claim the lane (Redis) ─▶ drain its outbox (Kafka)
//!     ─▶ seal the older epochs (Kafka) ─▶ wait for the writer at the seal
//!     ─▶ Redis stands where the ledger does? open it : fold, write, prove, open
//! ```
//!
//! At the seal the ledger has all that Kafka and the outbox had, and nothing of an older epoch is
//! added to it any more: so what the lane's orders are is decided there, once. Whoever was stopped on
//! the way can do nothing any more once another has taken a later epoch: its seal is not the newest,
//! and its token is not the lane's. A recovery that died is begun anew by whoever comes.
//!
//! Where something is in doubt the lane stays frozen, and a report says why: an operator decides. The
//! writer heeds no seal of such a lane, unless the seal says that the doubt was given up: what it met only
//! on its way there can be retried as well.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use chrono::Utc;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, sleep};
use tokio_util::sync::CancellationToken;

use super::books::CheckError;
use super::scan::scan_at_rest;
use crate::bus::BusError;
use crate::bus::producer::{Producer, SendError};
use crate::bus::record::{Record, encode, encode_seal};
use crate::config::{self, Config, millis};
use crate::domain::event::{RebuildToken, Seal};
use crate::domain::ids::{EntityKey, IdSecret, LaneId};
use crate::domain::names::{BuyerId, KeyName, Sku};
use crate::domain::order::{Order, Status};
use crate::domain::stock::Adjustment;
use crate::domain::time::Timestamp;
use crate::failpoint;
use crate::lanes::command::Define;
use crate::lanes::recovery::{
    Claim, Claimed, Found, Part, adjustment_record, order_record, refund_note, return_note,
    stock_record, units_record,
};
use crate::lanes::reply::{Defined, Frozen, ReplyError};
use crate::lanes::{LaneError, Lanes, outbox};
use crate::ledger::{
    Catalog, LaneMark, Ledger, LedgerError, Note, Outcome, RecordedLane, Report, Sale, digest,
};

/// Who is named in reports of what nobody asked for.
const ACTOR: &str = "reconciler";
/// Entries of an outbox that one read takes: each has up to `lanes.batch_max` events.
const ENTRIES_A_READ: usize = 8;
/// How often it is looked whether the writer has come to the seal, and when it is sent again: Kafka may
/// have lost it, or the lane was in doubt when the writer came to it.
const SEAL_LOOK: Duration = Duration::from_millis(20);
const SEAL_AGAIN: Duration = Duration::from_secs(2);
/// How long a doubt may clear up by itself: records that come out of order are parked for a moment.
const DOUBT_SETTLES: Duration = Duration::from_millis(500);
/// The pause before a full producer is tried again.
const QUEUE_FULL_PAUSE: Duration = Duration::from_millis(10);
/// The proof reads a lane that nobody else may use: in larger pages, without rests.
const PROOF_PAGE: usize = 200;
/// Lanes in a row that could not be looked at before it is Redis that cannot.
const UNREADABLE_MAX: usize = 3;

/// Why a lane was not opened. It stays frozen, and is tried again.
#[derive(Debug, thiserror::Error)]
pub enum RecoveryError {
    #[error(transparent)]
    Lane(#[from] LaneError),
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    #[error("Kafka: {0}")]
    Bus(#[from] BusError),
    #[error("Kafka: {0}")]
    Send(#[from] SendError),
    /// Another process recovers the lane.
    #[error("another process recovers the lane")]
    Busy,
    /// Another recovery has begun since, or Redis another run.
    #[error("another recovery of the lane, or another run of Redis, has begun since")]
    Lost,
    #[error("the writer did not come to the seal in time")]
    Slow,
    /// The ledger's books, or the lane as it was written, contradict themselves.
    #[error("not proven: {0}")]
    NotProven(String),
    #[error("no such sale, or it has no such lane")]
    Unknown,
}

impl From<ReplyError> for RecoveryError {
    fn from(error: ReplyError) -> Self {
        Self::Lane(error.into())
    }
}

impl From<CheckError> for RecoveryError {
    fn from(error: CheckError) -> Self {
        match error {
            CheckError::Lane(error) => Self::Lane(error),
            CheckError::Ledger(error) => Self::Ledger(error),
        }
    }
}

/// What whoever wants a lane recovered may take on themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Despite {
    /// Nothing: a lane that is in doubt stays frozen.
    Nothing,
    /// Open differences: it is Redis that was found to be wrong.
    Differences,
    /// Everything that is in doubt: what the ledger lacks is given up.
    Everything,
}

/// Who wants a lane recovered, and how.
#[derive(Debug, Clone)]
pub struct Wish {
    pub actor: KeyName,
    /// Freeze the lane if it is open, and rebuild it even where it has lost nothing.
    pub rebuild: bool,
    pub despite: Despite,
}

impl Wish {
    /// What the role does by itself.
    fn automatic() -> Self {
        let actor = ACTOR.parse().expect("it is a key's name");
        Self { actor, rebuild: false, despite: Despite::Nothing }
    }
}

struct Metrics {
    opened: Counter,
    rebuilt: Counter,
    failed: Counter,
    lost_events: Counter,
    in_doubt: Gauge,
    running: Gauge,
    last: Gauge<f64, AtomicU64>,
}

impl Metrics {
    fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            opened: Counter::default(),
            rebuilt: Counter::default(),
            failed: Counter::default(),
            lost_events: Counter::default(),
            in_doubt: Gauge::default(),
            running: Gauge::default(),
            last: Gauge::default(),
        };
        let registry = registry.sub_registry_with_prefix("holdfast_recovery");
        let m = &metrics;
        registry.register("opened", "Lanes opened as they were", m.opened.clone());
        registry.register("rebuilt", "Lanes rebuilt from the ledger", m.rebuilt.clone());
        registry.register(
            "failures",
            "Recoveries that failed, to be tried again",
            m.failed.clone(),
        );
        registry.register(
            "lost_events",
            "Events at most that Redis answered and that are nowhere any more",
            m.lost_events.clone(),
        );
        registry.register(
            "lanes_in_doubt",
            "Lanes that this instance found in doubt: frozen until an operator decides",
            m.in_doubt.clone(),
        );
        registry.register("running", "Lanes that are being recovered", m.running.clone());
        registry.register_with_unit(
            "last_duration",
            "How long the last lane that was opened took",
            Unit::Seconds,
            m.last.clone(),
        );
        metrics
    }
}

struct Shared {
    lanes: Lanes,
    ledger: Ledger,
    catalog: Catalog,
    kafka: config::Kafka,
    options: config::Reconciler,
    /// A process that gave no sign for so long is not waited for.
    gone_after: Duration,
    metrics: Metrics,
}

/// Opens lanes anew: see the module's comment. Clones are the same.
#[derive(Clone)]
pub struct Recovery(Arc<Shared>);

impl Recovery {
    pub fn new(
        lanes: Lanes,
        ledger: Ledger,
        catalog: Catalog,
        config: &Config,
        registry: &mut Registry,
    ) -> Self {
        let (options, metrics) = (config.reconciler.clone(), Metrics::register(registry));
        let kafka = config.kafka.clone();
        let gone_after = millis(config.witness.gone_after_ms);
        let shared = Shared { lanes, ledger, catalog, kafka, options, gone_after, metrics };
        Self(Arc::new(shared))
    }

    /// Looks for frozen and missing lanes and recovers them, until shut down. What it is at then is
    /// dropped: whoever comes begins it anew.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut looks = tokio::time::interval(millis(self.0.options.look_ms));
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut running: JoinSet<(LaneId, Option<Outcome>)> = JoinSet::new();
        // Lanes that are not to be looked at before then; and those among them that are in doubt.
        let mut resting: HashMap<LaneId, Option<Instant>> = HashMap::new();
        let mut in_doubt: BTreeSet<LaneId> = BTreeSet::new();
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                Some(ended) = running.join_next() => {
                    let Ok((lane, outcome)) = ended else {
                        // It panicked, and does not say at which lane: all may be begun again, and those
                        // that run are locked.
                        resting.retain(|_, until| until.is_some());
                        continue;
                    };
                    if outcome.is_none_or(Outcome::is_open) {
                        resting.remove(&lane);
                    } else {
                        let again = Instant::now() + millis(self.0.options.recovery_retry_ms);
                        resting.insert(lane.clone(), Some(again));
                        if outcome == Some(Outcome::InDoubt) {
                            in_doubt.insert(lane);
                        }
                    }
                }
                _ = looks.tick() => {
                    let now = Instant::now();
                    resting.retain(|_, until| until.is_none_or(|until| until > now));
                    let frozen = match self.frozen().await {
                        Ok(frozen) => frozen,
                        Err(error) => {
                            tracing::debug!(%error, "it is not known which lanes are frozen");
                            continue;
                        }
                    };
                    in_doubt.retain(|lane| frozen.contains(lane));
                    for lane in frozen {
                        if running.len() < self.0.options.recoveries_max && !resting.contains_key(&lane) {
                            resting.insert(lane.clone(), None);
                            let recovery = self.clone();
                            running.spawn(async move { recovery.attend(lane).await });
                        }
                    }
                }
            }
            self.0.metrics.in_doubt.set(in_doubt.len() as i64);
            self.0.metrics.running.set(running.len() as i64);
        }
    }

    /// Lanes that nobody can sell from.
    async fn frozen(&self) -> Result<BTreeSet<LaneId>, LaneError> {
        let mut frozen = BTreeSet::new();
        let mut failed_in_a_row = 0;
        for sale in self.0.catalog.sales().iter().filter(|sale| !sale.phase.archived) {
            for lane in sale.lane_ids() {
                match self.0.lanes.find(&lane).await {
                    Ok(found) => {
                        failed_in_a_row = 0;
                        if !found.is_open() {
                            frozen.insert(lane);
                        }
                    }
                    // One that cannot be read must not keep the others shut; a Redis that is away answers
                    // for none.
                    Err(error) if failed_in_a_row < UNREADABLE_MAX => {
                        failed_in_a_row += 1;
                        tracing::debug!(%lane, %error, "whether it is frozen is not known");
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(frozen)
    }

    /// Recovers a lane that was seen frozen; `None`: there was nothing to do.
    async fn attend(&self, lane: LaneId) -> (LaneId, Option<Outcome>) {
        let outcome = match self.recover(&lane, &Wish::automatic()).await {
            Ok(report) => report.map(|report| report.outcome),
            Err(error) => {
                tracing::debug!(%lane, %error, "not recovered");
                Some(Outcome::Failed)
            }
        };
        (lane, outcome)
    }

    /// Opens a lane anew, and reports it; `None`: it is open, or its sale is archived.
    ///
    /// # Errors
    /// Why it is still frozen. That it is in doubt is no error, but the report's outcome.
    pub async fn recover(
        &self,
        lane: &LaneId,
        wish: &Wish,
    ) -> Result<Option<Report>, RecoveryError> {
        let ledger = &self.0.ledger;
        let lock = ledger.within_patience(ledger.lock_for_recovery(lane)).await?;
        let lock = lock.ok_or(RecoveryError::Busy)?;
        let recovered = self.recover_locked(lane, wish).await;
        if let Err(error) = lock.release().await {
            tracing::debug!(%error, %lane, "the lock ended with its connection");
        }
        recovered
    }

    async fn recover_locked(
        &self,
        lane: &LaneId,
        wish: &Wish,
    ) -> Result<Option<Report>, RecoveryError> {
        let ledger = &self.0.ledger;
        let sale = ledger.within_patience(ledger.sale(&lane.sale)).await?;
        let sale = sale.ok_or(RecoveryError::Unknown)?;
        let found = self.0.lanes.find(lane).await?;
        if sale.phase.archived || (found.is_open() && !wish.rebuild) {
            return Ok(None);
        }
        let began = Instant::now();
        let marks = self.marks(lane).await?;
        let mut report = Report::begin(lane, marks.sealed_epoch, &wish.actor);
        report.why = if found.is_open() { Frozen::Operator.as_str() } else { found.why() }.into();
        let is_open = found.is_open();
        // One of its own: it is rare, and one that has lost its place is not kept.
        let producer = Producer::new(&self.0.kafka)?;
        let attempt = Attempt { recovery: self, producer, sale: &sale, lane, wish, marks, is_open };
        let attempted = attempt.run(&mut report).await;
        match &attempted {
            Ok(Some(outcome)) => report.outcome = *outcome,
            Ok(None) => return Ok(None),
            Err(error) => (report.outcome, report.detail) = (Outcome::Failed, error.to_string()),
        }
        report.ended_at = Utc::now().into();
        self.tell(&report, began.elapsed());
        let reported = ledger.within_patience(ledger.report_rebuild(&report)).await;
        if let Err(error) = reported {
            tracing::error!(%lane, %error, ?report, "a report could not be written");
        }
        attempted.map(|_| Some(report))
    }

    fn tell(&self, report: &Report, took: Duration) {
        let metrics = &self.0.metrics;
        let Report { lane, why, epoch, seq, lost_max, detail, .. } = report;
        match report.outcome {
            Outcome::Opened => metrics.opened.inc(),
            Outcome::Rebuilt => metrics.rebuilt.inc(),
            Outcome::Failed => metrics.failed.inc(),
            Outcome::InDoubt => 0,
        };
        if report.outcome.is_open() {
            metrics.last.set(took.as_secs_f64());
            metrics.lost_events.inc_by(*lost_max);
            let (took_ms, outcome) = (took.as_millis() as u64, report.outcome.as_str());
            tracing::warn!(%lane, why, epoch, seq, lost_max, took_ms, outcome, "a lane is open again");
            for order in &report.lost_orders {
                tracing::error!(%lane, order, "an order that was answered is lost");
            }
        } else if report.outcome == Outcome::InDoubt {
            tracing::error!(%lane, why, detail, "a lane stays frozen until an operator decides");
        } else {
            tracing::warn!(%lane, why, detail, "a lane could not be opened; trying again");
        }
    }

    async fn marks(&self, lane: &LaneId) -> Result<LaneMark, RecoveryError> {
        let ledger = &self.0.ledger;
        let marks = ledger.lane_marks(std::slice::from_ref(lane));
        let mut marks = ledger.within_patience(marks).await?;
        marks.remove(lane).ok_or(RecoveryError::Unknown)
    }
}

/// One try at one lane.
struct Attempt<'a> {
    recovery: &'a Recovery,
    producer: Producer,
    sale: &'a Sale,
    lane: &'a LaneId,
    wish: &'a Wish,
    /// As the database had them before.
    marks: LaneMark,
    /// It was not frozen before this.
    is_open: bool,
}

impl Attempt<'_> {
    fn shared(&self) -> &Shared {
        &self.recovery.0
    }

    async fn send(
        &self,
        partition: i32,
        record: &Record,
    ) -> Result<impl Future<Output = Result<(), SendError>> + use<>, SendError> {
        loop {
            match self.producer.send(partition, record) {
                Ok(delivery) => return Ok(async move { delivery.await.map(drop) }),
                Err(SendError::QueueFull) => sleep(QUEUE_FULL_PAUSE).await,
                Err(error) => return Err(error),
            }
        }
    }

    /// How it ended; `None`: the lane turned out to be open.
    async fn run(&self, report: &mut Report) -> Result<Option<Outcome>, RecoveryError> {
        let Shared { lanes, ledger, .. } = self.shared();
        // Before the epoch ends: what is parked can be applied until then, and an operator may have a
        // dead letter to retry.
        if self.is_in_doubt(report).await? {
            return Ok(Some(Outcome::InDoubt));
        }
        // A claim of a lane that is gone begins its next epoch, by which processes forget the last one.
        let unheard = if self.is_open { None } else { Some(self.ask().await?) };
        let token = RebuildToken::new(rand::random());
        let taken = ledger.within_patience(ledger.take_epoch(self.lane, self.marks.epoch, token));
        let epoch = taken.await?.ok_or(RecoveryError::Lost)?;
        failpoint::pass("rebuild-taken");
        let claim = Claim { lane: self.lane.clone(), epoch, token };
        let found = match lanes.claim(&claim, self.wish.rebuild).await? {
            Claimed::Ours(found) => found,
            Claimed::Open => return Ok(None),
            Claimed::Lost => return Err(RecoveryError::Lost),
        };
        failpoint::pass("rebuild-claimed");
        report.epoch = Some(epoch);
        report.seq_before = found.is_there.then_some(found.seq);
        let secret = self.shared().catalog.secret(self.sale.secret_version).await?;
        let secret = secret.ok_or(RecoveryError::Unknown)?;
        let unheard = match unheard {
            Some(unheard) => unheard,
            None => self.ask().await?,
        };
        self.drain(&found, &secret).await?;
        let Some(recorded) = self.seal(&claim, report).await? else {
            return Ok(Some(Outcome::InDoubt));
        };
        failpoint::pass("rebuild-sealed");
        report.seq = Some(recorded);
        self.note_losses(&found, recorded, &secret, report).await?;
        let has_lost_nothing = report.lost_max == 0 && self.is_whole(&found, recorded);
        if has_lost_nothing && !self.wish.rebuild {
            if !lanes.open(&claim, recorded).await? {
                return Err(RecoveryError::Lost);
            }
            self.define_again().await;
            return Ok(Some(Outcome::Opened));
        }
        if self.is_in_doubt(report).await? {
            return Ok(Some(Outcome::InDoubt));
        }
        self.rebuild(&claim, recorded, &secret).await?;
        if !unheard.is_empty() {
            report.detail = format!("not heard: instances {}", unheard.join(", "));
        }
        Ok(Some(Outcome::Rebuilt))
    }

    /// Has every live process testify what it has seen of the lane; who did not.
    async fn ask(&self) -> Result<Vec<String>, RecoveryError> {
        let Shared { ledger, gone_after, .. } = self.shared();
        let testimonies = ledger.testimonies(self.lane, *gone_after);
        Ok(ledger.within_patience(testimonies).await?.unheard)
    }

    /// What was answered since the lane was last opened, and is nowhere any more. What was testified to
    /// a recovery that died counts as well: processes forget an epoch once the next has begun.
    async fn note_losses(
        &self,
        found: &Found,
        recorded: u64,
        secret: &IdSecret,
        report: &mut Report,
    ) -> Result<(), RecoveryError> {
        let Shared { ledger, .. } = self.shared();
        let testified = async {
            let opened = ledger.opened_epoch(self.lane).await?;
            Ok::<_, LedgerError>((opened, ledger.testified(self.lane, opened).await?))
        };
        let (opened, testified) = ledger.within_patience(testified).await?;
        // How far each epoch was seen: one that was opened and died before its report is told here too.
        let mut seen = BTreeMap::new();
        if found.is_there && found.epoch >= opened {
            seen.insert(found.epoch, found.seq);
        }
        let mut lost = BTreeSet::new();
        for told in &testified {
            let seq = seen.entry(told.epoch).or_default();
            *seq = told.seq.max(*seq);
            let orders = told.orders.iter().filter(|(seq, _)| *seq > recorded);
            lost.extend(orders.map(|(_, key)| *key));
        }
        report.lost_max = seen.values().map(|seq| seq.saturating_sub(recorded)).sum();
        let id = |key| secret.order_id(self.lane, key).to_string();
        report.lost_orders = lost.into_iter().map(id).collect();
        Ok(())
    }

    /// Whether something is in doubt that this wish does not take on itself. What relay and writer are
    /// about to clear up is given a moment.
    async fn is_in_doubt(&self, report: &mut Report) -> Result<bool, RecoveryError> {
        let Shared { ledger, .. } = self.shared();
        let (began, despite) = (Instant::now(), self.wish.despite);
        loop {
            let doubts = ledger.doubts(self.lane, despite < Despite::Differences);
            let doubts = ledger.within_patience(doubts).await?;
            report.detail = doubts.join("; ");
            if doubts.is_empty() || despite == Despite::Everything {
                return Ok(false);
            } else if began.elapsed() > DOUBT_SETTLES {
                return Ok(true);
            }
            sleep(SEAL_LOOK).await;
        }
    }

    fn is_whole(&self, found: &Found, recorded: u64) -> bool {
        let has_all_keys = found.is_there && found.frozen != Some(Frozen::Rebuild);
        has_all_keys && (found.epoch, found.seq) == (self.marks.sealed_epoch, recorded)
    }

    fn partition(&self) -> Result<i32, RecoveryError> {
        let place = self.sale.lanes.iter().find(|place| place.lane == self.lane.lane);
        Ok(place.ok_or(RecoveryError::Unknown)?.partition)
    }

    /// Sends what the outbox still has and the database lacks, relay or no relay: after the seal it
    /// would be an echo. What the relay sends of it as well is a repeat.
    async fn drain(&self, found: &Found, secret: &IdSecret) -> Result<(), RecoveryError> {
        if found.epoch != self.marks.sealed_epoch {
            return Ok(());
        }
        let (partition, mut at) = (self.partition()?, self.marks.recorded);
        while at < found.seq {
            let from = [(self.lane.clone(), found.epoch, at)];
            let read = self.shared().lanes.read_outboxes(&from, ENTRIES_A_READ, Duration::ZERO);
            let (before, mut sent) = (at, Vec::new());
            for entry in read.await?.iter().flat_map(|(_, entries)| entries) {
                for event in outbox::events(self.lane, secret, entry)? {
                    sent.push(self.send(partition, &encode(&event)).await?);
                    at = event.seq;
                }
            }
            for delivered in sent {
                delivered.await?;
            }
            if at == before {
                break; // the rest was trimmed, since Kafka has it
            }
        }
        Ok(())
    }

    /// Seals the older epochs, and waits until the writer has come to it; how much is recorded there.
    /// `None`: the writer has met on its way what puts the lane in doubt, and the seal has ended nothing.
    async fn seal(&self, claim: &Claim, report: &mut Report) -> Result<Option<u64>, RecoveryError> {
        let Claim { lane, epoch, token } = claim.clone();
        let (gives_up, at) = (self.wish.despite == Despite::Everything, Utc::now().into());
        let record = encode_seal(&Seal { lane, epoch, token, gives_up, at });
        let (began, partition) = (Instant::now(), self.partition()?);
        let wait_max = millis(self.shared().options.recovery_wait_ms);
        let mut again = Duration::ZERO;
        while began.elapsed() < wait_max {
            if began.elapsed() >= again {
                if !again.is_zero() && self.is_in_doubt(report).await? {
                    return Ok(None);
                }
                self.send(partition, &record).await?.await?;
                again = began.elapsed() + SEAL_AGAIN;
            }
            let marks = self.recovery.marks(self.lane).await?;
            if marks.epoch != claim.epoch {
                return Err(RecoveryError::Lost);
            } else if marks.sealed_epoch == claim.epoch {
                return Ok(Some(marks.recorded));
            }
            sleep(SEAL_LOOK).await;
        }
        Err(RecoveryError::Slow)
    }

    /// Writes the lane anew as the ledger has it, proves that, and opens it.
    async fn rebuild(
        &self,
        claim: &Claim,
        recorded: u64,
        secret: &IdSecret,
    ) -> Result<(), RecoveryError> {
        let Shared { lanes, options, .. } = self.shared();
        let image = Image::read(&self.shared().ledger, self.lane, recorded).await?;
        let kept = |ours: bool| if ours { Ok(()) } else { Err(RecoveryError::Lost) };
        kept(lanes.clear(claim).await?)?;
        for (part, pairs) in &image.parts {
            for chunk in pairs.chunks(options.recovery_chunk) {
                kept(lanes.write(claim, *part, chunk).await?)?;
                failpoint::pass("rebuild-chunk");
            }
        }
        self.prove(&image, secret).await?;
        failpoint::pass("rebuild-proven");
        kept(lanes.open(claim, recorded).await?)?;
        self.define_again().await;
        Ok(())
    }

    /// Every figure, order and buyer of the lane against the ledger, as of a running lane; and as many
    /// orders, deadlines and adjustments are there as were folded. What only replays need is not read
    /// back.
    async fn prove(&self, image: &Image, secret: &IdSecret) -> Result<(), RecoveryError> {
        let Shared { lanes, ledger, options, .. } = self.shared();
        let sizes = lanes.sizes(self.lane).await?;
        if sizes != image.sizes {
            let expected = image.sizes;
            return Err(RecoveryError::NotProven(format!("{sizes:?} instead of {expected:?}")));
        }
        let proof = config::Reconciler {
            page_max: PROOF_PAGE,
            page_pause_ms: 0,
            orders_max: usize::MAX,
            ..options.clone()
        };
        let books = scan_at_rest(lanes, ledger, self.lane, secret, &proof).await?;
        let mut faults: Vec<_> = books
            .differences
            .iter()
            .map(|one| format!("{} of {}: {}", one.what, one.subject, one.detail))
            .chain(books.undecided)
            .collect();
        let count = faults.len();
        faults.truncate(FAULTS_SHOWN);
        match count {
            0 => Ok(()),
            _ => Err(RecoveryError::NotProven(format!("{count} faults: {}", faults.join("; ")))),
        }
    }

    /// A lane that is open is told its definition once more: the event may have been lost, although
    /// whoever defined it was answered and nobody is left to testify.
    async fn define_again(&self) {
        let sale = self.sale;
        let define = Define {
            version: sale.version,
            create_epoch: None,
            digest: sale.digest.clone(),
            definition: sale.definition.clone(),
            actor: self.wish.actor.clone(),
            trace: None,
        };
        match self.shared().lanes.define(self.lane, define).await.map(|stamped| stamped.outcome) {
            // Stale: it was defined anew meanwhile.
            Ok(Defined::Defined | Defined::Same | Defined::Stale { .. }) => {}
            other => tracing::error!(lane = %self.lane, version = sale.version, ?other,
                "the lane has lost a definition and does not take it again"),
        }
    }
}

/// Faults of a proof that its error shows.
const FAULTS_SHOWN: usize = 5;

/// All that is written of a lane, folded from the ledger.
struct Image {
    /// In this order: the lane's own fields, which say that it is whole, come last.
    parts: [(Part, Vec<(String, String)>); 6],
    /// As [`Lanes::sizes`] tells them.
    sizes: [usize; 3],
}

impl Image {
    async fn read(ledger: &Ledger, lane: &LaneId, recorded: u64) -> Result<Self, RecoveryError> {
        let mut snapshot = ledger.snapshot(lane).await?;
        snapshot.lasting().await?;
        let state = snapshot.recorded_lane().await?;
        if state.recorded != recorded {
            return Err(RecoveryError::Lost);
        }
        let notes = snapshot.notes().await?;
        let adjustments = snapshot.adjustments().await?;
        let mut orders = Vec::new();
        snapshot.orders(|order| orders.push(order)).await?;
        snapshot.end().await?;
        Self::fold(&state, &orders, &notes, &adjustments).map_err(RecoveryError::NotProven)
    }

    fn fold(
        state: &RecordedLane,
        orders: &[Order],
        notes: &HashMap<EntityKey, Vec<Note>>,
        adjustments: &[Adjustment],
    ) -> Result<Self, String> {
        let mut records = Vec::with_capacity(orders.len());
        let mut deadlines = Vec::new();
        let mut buyers: BTreeMap<&BuyerId, BTreeMap<&Sku, i64>> = BTreeMap::new();
        for order in orders {
            let key = order.id.key();
            let notes: Vec<_> = notes.get(&key).into_iter().flatten().map(note).collect();
            records.push((key.encode(), order_record(order, &notes)));
            if matches!(order.status, Status::Held | Status::Paying) {
                deadlines.push((order.expires_at.millis().to_string(), key.encode()));
            }
            let Some(buyer) = &order.buyer_id else { continue };
            for (sku, units) in order.units().filter(|(_, units)| units.taken() != 0) {
                *buyers.entry(buyer).or_default().entry(sku).or_default() += units.taken();
            }
        }
        let mut counts = Vec::with_capacity(buyers.len());
        for (buyer, mut units) in buyers {
            units.retain(|_, units| *units != 0);
            if !units.is_empty() {
                counts.push((buyer.to_string(), units_record(&units)));
            }
        }
        let of_key = |one: &Adjustment| (one.id.key().encode(), adjustment_record(one));
        let adjustments: Vec<_> = adjustments.iter().map(of_key).collect();
        let sizes = [records.len(), deadlines.len(), adjustments.len()];
        let parts = [
            (Part::Stock, stock(state)?),
            (Part::Buyers, counts),
            (Part::Orders, records),
            (Part::Deadlines, deadlines),
            (Part::Adjustments, adjustments),
            (Part::Lane, fields(state)),
        ];
        Ok(Self { parts, sizes })
    }
}

fn note(note: &Note) -> String {
    match note {
        Note::Refund { payment, reason } => refund_note(payment.as_ref(), *reason),
        Note::Return { key, restock, lines } => return_note(*key, *restock, lines),
    }
}

fn stock(state: &RecordedLane) -> Result<Vec<(String, String)>, String> {
    let defined = state.definition.iter().flat_map(|definition| &definition.skus);
    let defined: HashMap<_, _> = defined.map(|sku| (&sku.sku, sku)).collect();
    let mut stock = Vec::new();
    for (sku, counters) in &state.counters {
        match defined.get(sku) {
            Some(defined) => stock.push((
                sku.to_string(),
                stock_record(*counters, defined.per_buyer_limit, defined.stock),
            )),
            // A definition took it out while nobody had ordered.
            None if counters.total() == 0 => {}
            None => return Err(format!("{sku} has units, but no definition")),
        }
    }
    if stock.len() != defined.len() {
        return Err("a defined SKU has no counters".to_owned());
    }
    Ok(stock)
}

/// The lane's own fields, beside those that its opening sets.
fn fields(state: &RecordedLane) -> Vec<(String, String)> {
    let time = |at: Option<Timestamp>| at.map(|at| at.millis().to_string()).unwrap_or_default();
    let flag = |value: bool| u8::from(value).to_string();
    let mut fields = vec![
        // 0 where nothing was ever recorded: the lane is defined anew.
        ("now", state.latest.map_or(0, Timestamp::millis).to_string()),
        ("paused", flag(state.paused)),
        ("closed", time(state.closed_at)),
        ("archived", flag(state.archived)),
        ("used", flag(state.used)),
    ];
    if let Some(definition) = &state.definition {
        fields.extend([
            ("version", state.version.to_string()),
            ("digest", digest(definition)),
            ("opens", time(definition.opens_at)),
            ("closes", time(definition.closes_at)),
            ("hold", definition.hold_seconds.to_string()),
            ("grace", definition.payment_grace_seconds.to_string()),
            ("longest", definition.longest_hold_seconds().to_string()),
            ("limit", definition.per_buyer_limit.map(|l| l.to_string()).unwrap_or_default()),
        ]);
    }
    fields.push(("seq", state.recorded.to_string()));
    fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}
