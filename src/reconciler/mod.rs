//! The reconciler proves, while sales run, that Redis and the database say the same (I1, I2, I4): for
//! one lane after the other, again and again, it compares all figures ([`books`]), and every order and
//! buyer behind them ([`scan`]).
//!
//! What differs must differ in two scans in a row. Then it is a metric, a line in the log, and a row
//! in `reconciliations`. It repairs nothing. Any number of instances may run it: a lock in the
//! database gives a lane to one at a time, and is kept for the pause after a check, so that all of
//! them together check a lane as often as one would.

pub mod books;
pub mod rebuild;
mod scan;

use std::collections::BTreeSet;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use chrono::Utc;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};
use tokio_util::sync::CancellationToken;

use self::books::{CheckError, LaneBooks};
use crate::config::{self, millis};
use crate::domain::ids::{IdSecret, LaneId};
use crate::lanes::{LaneError, Lanes};
use crate::ledger::{Catalog, Ledger, LedgerError, Sale};

/// Differences of one lane that are told at most.
const TOLD_MAX: usize = 100;
/// How often old differences are forgotten.
const FORGET: Duration = Duration::from_secs(3_600);

struct Metrics {
    differences: Gauge,
    last_complete: Gauge<f64, AtomicU64>,
    scans: Counter,
    suspected: Counter,
    undecided: Counter,
    failures: Counter,
}

impl Metrics {
    fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            differences: Gauge::default(),
            last_complete: Gauge::default(),
            scans: Counter::default(),
            suspected: Counter::default(),
            undecided: Counter::default(),
            failures: Counter::default(),
        };
        let registry = registry.sub_registry_with_prefix("holdfast_reconciliation");
        let m = &metrics;
        registry.register(
            "differences",
            "Differences between the books that are there: in the database, so every instance says the same",
            m.differences.clone(),
        );
        registry.register_with_unit(
            "last_complete_timestamp",
            "When this instance last went through all sales and each could be judged, Unix time",
            Unit::Seconds,
            m.last_complete.clone(),
        );
        registry.register("scans", "Scans of a lane that came to an end", m.scans.clone());
        registry.register(
            "suspected",
            "Scans that saw a difference and were repeated to see whether it stays",
            m.suspected.clone(),
        );
        registry.register(
            "undecided",
            "Scans of which not all could be judged",
            m.undecided.clone(),
        );
        registry.register("failures", "Scans that failed", m.failures.clone());
        metrics
    }
}

/// The role: see the module's comment.
pub struct Reconciler {
    lanes: Lanes,
    ledger: Ledger,
    catalog: Catalog,
    options: config::Reconciler,
    metrics: Metrics,
}

impl Reconciler {
    pub fn new(
        lanes: Lanes,
        ledger: Ledger,
        catalog: Catalog,
        options: config::Reconciler,
        registry: &mut Registry,
    ) -> Self {
        Self { lanes, ledger, catalog, options, metrics: Metrics::register(registry) }
    }

    /// Reconciles until shut down. A server that is away is a pause, never an end.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut forgot_at = None;
        while !shutdown.is_cancelled() {
            tokio::select! {
                () = shutdown.cancelled() => {}
                () = self.round(&mut forgot_at) => {}
            }
        }
    }

    /// Goes through all lanes once.
    async fn round(&self, forgot_at: &mut Option<Instant>) {
        let sales = self.catalog.sales();
        let mut complete = true;
        let mut lanes = 0;
        for sale in sales.iter().filter(|sale| !sale.phase.archived) {
            for lane in sale.lane_ids() {
                lanes += 1;
                complete &= self.visit(sale, &lane).await;
            }
        }
        if complete {
            self.metrics.last_complete.set(Utc::now().timestamp_millis() as f64 / 1_000.0);
        }
        if forgot_at.is_none_or(|at| at.elapsed() > FORGET) {
            let forget = self.ledger.forget_reconciliations(self.options.kept_days);
            match self.ledger.within_patience(forget).await {
                Ok(_) => *forgot_at = Some(Instant::now()),
                Err(error) => tracing::debug!(%error, "no reconciliations were forgotten"),
            }
        }
        if lanes == 0 {
            tokio::time::sleep(millis(self.options.pause_ms)).await;
        }
    }

    /// Checks a lane unless another instance does, and pauses; says whether it is judged, by
    /// whomever.
    async fn visit(&self, sale: &Sale, lane: &LaneId) -> bool {
        let began = Instant::now();
        let pause = millis(self.options.pause_ms);
        let lock = match self.ledger.within_patience(self.ledger.lock_for_reconciling(lane)).await {
            Ok(Some(lock)) => lock,
            Ok(None) => {
                tokio::time::sleep(pause).await;
                return true;
            }
            Err(error) => {
                self.failed(lane, &error.into());
                tokio::time::sleep(pause).await;
                return false;
            }
        };
        let judged = match self.reconcile(sale, lane).await {
            Ok(judged) => judged,
            Err(error) => {
                self.failed(lane, &error);
                false
            }
        };
        let share = self.options.time_share_max;
        let rest = began.elapsed().mul_f64((1.0 - share) / share);
        tokio::time::sleep(pause.max(rest)).await;
        if let Err(error) = lock.release().await {
            tracing::debug!(%error, %lane, "the lock ended with its connection");
        }
        judged
    }

    fn failed(&self, lane: &LaneId, error: &CheckError) {
        self.metrics.failures.inc();
        match error {
            // Being defined or archived right now, or lost, or frozen: then callers are told, and the
            // time of the last complete round stands still.
            CheckError::Lane(error @ (LaneError::Missing | LaneError::Frozen(_))) => {
                tracing::debug!(%lane, %error, "not reconciled");
            }
            error => tracing::warn!(%lane, %error, "a lane could not be reconciled"),
        }
    }

    async fn reconcile(&self, sale: &Sale, lane: &LaneId) -> Result<bool, CheckError> {
        let secret = self.catalog.secret(sale.secret_version).await?;
        let Some(secret) = secret else { return Ok(false) };
        let before = self.lanes.find(lane).await?;
        if !before.is_open() {
            return Ok(false);
        }
        let mut books = self.scan(lane, &secret).await?;
        if !books.differences.is_empty() {
            self.metrics.suspected.inc();
            tokio::time::sleep(millis(self.options.pause_ms)).await;
            let before = books.differences;
            let before: BTreeSet<_> = before.iter().map(|one| (one.what, &one.subject)).collect();
            books = self.scan(lane, &secret).await?;
            books.differences.retain(|one| before.contains(&(one.what, &one.subject)));
        }
        // What a lane shows while it is frozen, or is written anew, is recovery's concern.
        let now = self.lanes.find(lane).await?;
        if !now.is_open() || now.epoch != before.epoch {
            return Ok(false);
        }
        let judged = books.undecided.is_none();
        self.ledger.within_patience(self.tell(books)).await?;
        Ok(judged)
    }

    async fn scan(&self, lane: &LaneId, secret: &IdSecret) -> Result<LaneBooks, CheckError> {
        // One that is frozen waits for recovery: what differs there is known.
        self.lanes.marks(lane).await?;
        let books = scan::scan(&self.lanes, &self.ledger, lane, secret, &self.options).await?;
        self.metrics.scans.inc();
        if let Some(why) = &books.undecided {
            self.metrics.undecided.inc();
            tracing::warn!(%lane, why, "not all of a lane's books could be compared");
        }
        Ok(books)
    }

    /// Writes down what differs, and says so.
    async fn tell(&self, books: LaneBooks) -> Result<(), LedgerError> {
        let LaneBooks { lane, mut differences, undecided, .. } = books;
        differences.sort_unstable();
        // An order or buyer with several SKUs is one subject.
        differences.dedup_by(|a, b| (a.what, &a.subject) == (b.what, &b.subject));
        let count = differences.len();
        differences.truncate(TOLD_MAX);
        let new = self.ledger.record_differences(&lane, &differences, undecided.is_none()).await?;
        for one in differences {
            let (what, subject, detail) = (one.what, one.subject, one.detail);
            if new.contains(&(what.to_owned(), subject.clone())) {
                tracing::error!(%lane, what, subject, detail, "the books differ");
            }
        }
        if count > 0 {
            tracing::error!(%lane, differences = count, "the books differ: see reconciliations");
        }
        self.metrics.differences.set(self.ledger.open_differences().await?);
        Ok(())
    }
}
