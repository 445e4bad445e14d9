//! The sweeper ends holds that are overdue, by the same script that settles payments, so exactly
//! one of expiry and payment wins. It also takes sales out of Redis whose retention is over.
//!
//! Any number of instances may sweep the same lanes: what one has ended is no longer due for the
//! next. A lane is asked again at its next deadline, or after a second if that is earlier: no hold
//! is shorter than a second, so none that was placed meanwhile can be overdue by then.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::Utc;
use futures_util::stream::{self, StreamExt};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use tokio_util::sync::CancellationToken;

use crate::config::{self, millis};
use crate::domain::ids::LaneId;
use crate::domain::sale::State;
use crate::domain::time::Timestamp;
use crate::failpoint;
use crate::lanes::reply::Stamped;
use crate::lanes::{LaneError, Lanes};
use crate::ledger::{Catalog, Sale};

/// The shortest hold: how long a lane without deadlines need not be looked at.
const LOOK_AFTER: Duration = Duration::from_secs(1);
/// How long the loop rests between two rounds; the precision of deadlines.
const ROUND: Duration = Duration::from_millis(10);
/// Lanes that are swept at once.
const LANES_AT_ONCE: usize = 16;
const DAY_MS: u64 = 86_400_000;

struct Metrics {
    expired: Counter,
    lateness_seconds: Histogram,
    archived: Counter,
    failures: Counter,
}

impl Metrics {
    fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            expired: Counter::default(),
            lateness_seconds: Histogram::new(exponential_buckets(0.005, 2.0, 12)),
            archived: Counter::default(),
            failures: Counter::default(),
        };
        let registry = registry.sub_registry_with_prefix("holdfast_sweeper");
        let m = &metrics;
        registry.register("expired", "Holds ended because they were overdue", m.expired.clone());
        registry.register(
            "lateness_seconds",
            "How long after its deadline the earliest hold was ended that a sweep found",
            m.lateness_seconds.clone(),
        );
        registry.register("archived", "Lanes taken out of Redis", m.archived.clone());
        registry.register("failures", "Sweeps of a lane that failed", m.failures.clone());
        metrics
    }
}

/// The role: see the module's comment.
pub struct Sweeper {
    lanes: Lanes,
    catalog: Catalog,
    options: config::Sweeper,
    metrics: Metrics,
}

impl Sweeper {
    pub fn new(
        lanes: Lanes,
        catalog: Catalog,
        options: config::Sweeper,
        registry: &mut Registry,
    ) -> Self {
        Self { lanes, catalog, options, metrics: Metrics::register(registry) }
    }

    /// Sweeps until shut down. Redis away is a pause, never an end.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut schedule = HashMap::new();
        let mut gone = HashSet::new();
        let mut archive_at = Instant::now();
        while !shutdown.is_cancelled() {
            let round = async {
                let sales = self.catalog.sales();
                let more = self.sweep_due(&sales, &gone, &mut schedule).await;
                if Instant::now() >= archive_at {
                    self.archive(&sales, &mut gone).await;
                    archive_at = Instant::now() + millis(self.options.archive_check_ms);
                }
                if !more {
                    tokio::time::sleep(ROUND).await;
                }
            };
            tokio::select! {
                () = shutdown.cancelled() => {}
                () = round => {}
            }
        }
    }

    /// Sweeps the lanes whose turn has come; says whether one has more that is due.
    async fn sweep_due(
        &self,
        sales: &[Arc<Sale>],
        gone: &HashSet<LaneId>,
        schedule: &mut HashMap<LaneId, Instant>,
    ) -> bool {
        let now = Instant::now();
        let live = sales.iter().filter(|sale| !sale.phase.archived);
        let lanes: HashSet<LaneId> = live.flat_map(|sale| sale.lane_ids()).collect();
        schedule.retain(|lane, _| lanes.contains(lane));
        let due = lanes.into_iter().filter_map(|lane| {
            let at = *schedule.get(&lane).unwrap_or(&now);
            (at <= now && !gone.contains(&lane)).then_some(lane)
        });
        let swept = stream::iter(due).map(|lane| async move {
            let next = self.sweep(&lane).await;
            (lane, next)
        });
        let swept: Vec<_> = swept.buffer_unordered(LANES_AT_ONCE).collect().await;
        let more = swept.iter().any(|(_, next)| *next <= Instant::now());
        schedule.extend(swept);
        more
    }

    /// Ends what one call can of what is due in a lane; returns when to look again: at once where
    /// more is due, but after the other lanes.
    async fn sweep(&self, lane: &LaneId) -> Instant {
        let asked = Instant::now();
        match self.lanes.expire(lane, self.options.batch_max).await {
            Ok(Stamped { now, outcome, .. }) => {
                if let Some(first) = outcome.first_deadline {
                    failpoint::pass("sweeper-expired");
                    let late_ms = (now.millis() - first.millis()) as f64;
                    self.metrics.lateness_seconds.observe(late_ms / 1000.0);
                    self.metrics.expired.inc_by(outcome.count);
                }
                let next = outcome.next_deadline.map_or(LOOK_AFTER, |next| {
                    millis((next.millis() - now.millis()).max(0).unsigned_abs())
                });
                if outcome.more { asked } else { asked + next.min(LOOK_AFTER) }
            }
            // The lane of a sale that is being archived or defined right now, or that waits for recovery:
            // nothing of it is released before that.
            Err(LaneError::Missing | LaneError::Frozen(_)) => asked + LOOK_AFTER,
            Err(error) => {
                self.metrics.failures.inc();
                tracing::warn!(%lane, %error, "a lane could not be swept");
                asked + LOOK_AFTER
            }
        }
    }

    async fn archive(&self, sales: &[Arc<Sale>], gone: &mut HashSet<LaneId>) {
        let now = Timestamp::from(Utc::now());
        for sale in sales {
            let state = sale.phase.state_at(now);
            if !matches!(state, State::Closed | State::Archived) {
                continue;
            }
            for lane in sale.lane_ids().filter(|lane| !gone.contains(lane)).collect::<Vec<_>>() {
                match self.archive_lane(sale, &lane).await {
                    Ok(true) => {
                        self.metrics.archived.inc();
                        tracing::info!(%lane, "archived: the lane has left Redis");
                        gone.insert(lane);
                    }
                    Ok(false) => {}
                    Err(LaneError::Missing) if state == State::Archived => {
                        gone.insert(lane);
                    }
                    Err(LaneError::Frozen(_)) => {}
                    Err(error) => tracing::warn!(%lane, %error, "a lane could not be archived"),
                }
            }
        }
    }

    /// True once the lane is gone from Redis.
    async fn archive_lane(&self, sale: &Sale, lane: &LaneId) -> Result<bool, LaneError> {
        let retention_ms = u64::from(sale.definition.retention_days) * DAY_MS;
        if !self.lanes.archive(lane, retention_ms).await?.outcome {
            return Ok(false);
        }
        self.lanes.forget(lane).await
    }
}
