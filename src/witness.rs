//! The witness: says in the database that this process is there, and answers whoever recovers a lane
//! what this process has seen of it. Nobody waits for it but them: while the database is away, orders
//! are answered as ever.
//!
//! A process that gives no sign for `witness.gone_after_ms` counts as gone, with what only it had seen.

use std::time::{Duration, Instant};

use futures_util::stream::{self, StreamExt};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;
use tokio_util::sync::CancellationToken;

use crate::config::{self, millis};
use crate::lanes::Lanes;
use crate::ledger::{Ledger, LedgerError};

/// How often it gives a sign; how often lanes are looked at that Kafka may not have all of.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// How often it looks whether it is asked something: whoever asks waits for it, and the lane with them.
const LOOK: Duration = Duration::from_millis(100);
/// How often what is old is forgotten.
const FORGET: Duration = Duration::from_secs(600);
/// Lanes that are looked at at once.
const LANES_AT_ONCE: usize = 16;

#[derive(Clone, Default)]
struct Metrics {
    answered: Counter,
    failures: Counter,
}

impl Metrics {
    fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let registry = registry.sub_registry_with_prefix("holdfast_witness");
        let m = &metrics;
        registry.register(
            "answered",
            "Testimonies that this process has given of a lane",
            m.answered.clone(),
        );
        registry.register(
            "failures",
            "Signs and testimonies that the database did not take",
            m.failures.clone(),
        );
        metrics
    }
}

/// See the module's comment.
#[derive(Clone)]
pub struct Witness {
    lanes: Lanes,
    ledger: Ledger,
    options: config::Witness,
    /// Names this process.
    name: String,
    roles: Vec<&'static str>,
    metrics: Metrics,
}

impl Witness {
    pub fn new(
        lanes: Lanes,
        ledger: Ledger,
        options: config::Witness,
        roles: Vec<&'static str>,
        registry: &mut Registry,
    ) -> Self {
        let name = format!("{:016x}", rand::random::<u64>());
        Self { lanes, ledger, options, name, roles, metrics: Metrics::register(registry) }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Gives a sign. The first one must be given before this process talks to any lane.
    pub async fn heartbeat(&self) -> Result<(), LedgerError> {
        self.in_time(self.ledger.heartbeat(&self.name, &self.roles)).await
    }

    /// Says that this process ends, so that nobody waits for its signs to stay away; before that, what
    /// it has seen of lanes of which Kafka may not have all.
    pub async fn leave(&self) -> Result<(), LedgerError> {
        for lane in self.lanes.unsettled() {
            let testimony = self.lanes.testimony(&lane);
            let (seq, orders) = (testimony.seq, testimony.orders.len());
            self.in_time(self.ledger.leave_testimony(&self.name, &lane, &testimony)).await?;
            tracing::info!(%lane, epoch = testimony.epoch, seq, orders, "left what was seen of it");
        }
        self.in_time(self.ledger.leave(&self.name)).await
    }

    /// Gives signs and answers until `end`.
    pub async fn run(&self, end: CancellationToken) {
        tokio::select! {
            biased;
            () = end.cancelled() => {}
            () = self.answer() => {}
            () = self.look_at_lanes() => {}
        }
    }

    async fn answer(&self) {
        let mut looks = tokio::time::interval(LOOK);
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let (mut gave_sign, mut forgot) = (None, None);
        let mut fails = false;
        loop {
            looks.tick().await;
            let outcome = self.round(&mut gave_sign, &mut forgot).await;
            if let Err(error) = &outcome {
                self.metrics.failures.inc();
                if !fails {
                    tracing::warn!(%error, "the database does not take this process' signs");
                }
            } else if fails {
                tracing::info!("the database takes this process' signs again");
            }
            fails = outcome.is_err();
        }
    }

    async fn round(
        &self,
        gave_sign: &mut Option<Instant>,
        forgot: &mut Option<Instant>,
    ) -> Result<(), LedgerError> {
        let is_due = |last: &Option<Instant>, every| last.is_none_or(|at| at.elapsed() >= every);
        if is_due(gave_sign, HEARTBEAT) {
            self.heartbeat().await?;
            *gave_sign = Some(Instant::now());
        }
        for asked in self.in_time(self.ledger.asked(&self.name)).await? {
            let testimony = self.lanes.testimony(&asked.lane);
            let (lane, seq, orders) = (&asked.lane, testimony.seq, testimony.orders.len());
            self.in_time(self.ledger.testify(asked.request, &self.name, &testimony)).await?;
            self.metrics.answered.inc();
            tracing::info!(%lane, epoch = testimony.epoch, seq, orders, "testified");
        }
        if is_due(forgot, FORGET) {
            let kept = Duration::from_secs(u64::from(self.options.kept_days) * 86_400);
            self.in_time(self.ledger.forget_witnesses(kept)).await?;
            *forgot = Some(Instant::now());
        }
        Ok(())
    }

    /// Has lanes say how far Kafka is that nobody here asks any more: what it has need not be kept. And
    /// one that has forgotten what this process has seen is frozen by that, before anybody orders.
    async fn look_at_lanes(&self) {
        let mut looks = tokio::time::interval(HEARTBEAT);
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            looks.tick().await;
            let look = |lane| async move {
                if let Err(error) = self.lanes.marks(&lane).await {
                    tracing::debug!(%lane, %error, "a lane did not say where it stands");
                }
            };
            let lanes = stream::iter(self.lanes.unsettled());
            lanes.for_each_concurrent(LANES_AT_ONCE, look).await;
        }
    }

    /// After so long this process counts as gone: a call that hangs must not make it so.
    async fn in_time<T>(
        &self,
        call: impl Future<Output = Result<T, LedgerError>>,
    ) -> Result<T, LedgerError> {
        match tokio::time::timeout(millis(self.options.gone_after_ms) / 2, call).await {
            Ok(outcome) => outcome,
            Err(_) => Err(LedgerError::Unavailable("no answer".to_owned())),
        }
    }
}
