//! What every request needs of the database, whole, in memory: sales, keys and secrets. It is
//! read anew every few seconds, and stays good while the database is away.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

use super::keys::ApiKey;
use super::sales::Sale;
use super::{Ledger, LedgerError};
use crate::config::{self, millis};
use crate::domain::ids::{AdjustmentId, IdSecret, OrderId};
use crate::domain::names::SaleId;

/// What is not in the copy is looked for in the database, but at most so often: an unknown id in
/// a loop must not become a query each.
const MISS_REFRESH_MIN: Duration = Duration::from_millis(200);

/// One copy of everything.
#[derive(Debug)]
struct Snapshot {
    sales: HashMap<SaleId, Arc<Sale>>,
    keys: HashMap<[u8; 32], Arc<ApiKey>>,
    /// Oldest first.
    secrets: Vec<Arc<IdSecret>>,
    /// When reading it began: what was committed before is in it. `None`: nothing was ever read.
    read_at: Option<Instant>,
}

/// What the catalog tells of itself.
#[derive(Debug, Clone, Default)]
pub struct CatalogMetrics {
    age: Gauge<f64, AtomicU64>,
    sales: Gauge,
    unreadable: Gauge,
    failures: Counter,
}

impl CatalogMetrics {
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register_with_unit(
            "holdfast_catalog_age",
            "Age of the copy of sales and keys; it grows while the database is away",
            Unit::Seconds,
            metrics.age.clone(),
        );
        registry.register("holdfast_catalog_sales", "Sales in the copy", metrics.sales.clone());
        registry.register(
            "holdfast_catalog_unreadable_sales",
            "Stored sales that this version of the service cannot read",
            metrics.unreadable.clone(),
        );
        registry.register(
            "holdfast_catalog_refresh_failures",
            "Reads of the whole catalog that failed",
            metrics.failures.clone(),
        );
        metrics
    }
}

/// The last attempt to read everything.
#[derive(Debug, Default)]
struct Attempt {
    began: Option<Instant>,
    failure: Option<String>,
}

#[derive(Debug)]
struct Shared {
    ledger: Ledger,
    refresh_every: Duration,
    snapshot: ArcSwap<Snapshot>,
    /// Held while reading, so that callers who miss at once share one read.
    attempt: Mutex<Attempt>,
    metrics: CatalogMetrics,
}

/// The handle: clones share one copy.
#[derive(Debug, Clone)]
pub struct Catalog(Arc<Shared>);

impl Catalog {
    /// Empty until the first refresh.
    pub fn new(ledger: Ledger, config: &config::Catalog, metrics: CatalogMetrics) -> Self {
        let empty = Snapshot {
            sales: HashMap::new(),
            keys: HashMap::new(),
            secrets: Vec::new(),
            read_at: None,
        };
        Self(Arc::new(Shared {
            ledger,
            refresh_every: millis(config.refresh_ms),
            snapshot: ArcSwap::from_pointee(empty),
            attempt: Mutex::default(),
            metrics,
        }))
    }

    /// Keeps the copy fresh until shut down. A database that is away is no reason to end.
    pub async fn run(&self, shutdown: CancellationToken) {
        let mut ticks = tokio::time::interval(self.0.refresh_every);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                _ = ticks.tick() => {}
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                outcome = self.refresh() => if let Err(error) = outcome {
                    tracing::warn!(%error, age_s = self.age().map(|age| age.as_secs()),
                        "the catalog could not be read; going on with the last copy");
                }
            }
            if let Some(age) = self.age() {
                self.0.metrics.age.set(age.as_secs_f64());
            }
        }
    }

    /// Reads everything anew, so that what was written before this call is in the copy after it.
    pub async fn refresh(&self) -> Result<(), LedgerError> {
        let mut attempt = self.0.attempt.lock().await;
        self.read(&mut attempt).await
    }

    /// Makes sure that the copy is no older than `age`; callers at once share one read.
    pub async fn no_older_than(&self, age: Duration) -> Result<(), LedgerError> {
        let mut attempt = self.0.attempt.lock().await;
        let recent = attempt.began.is_some_and(|at| at.elapsed() < age);
        match (recent, &attempt.failure) {
            (true, Some(failure)) => Err(LedgerError::Unavailable(failure.clone())),
            (true, None) => Ok(()),
            (false, _) => self.read(&mut attempt).await,
        }
    }

    /// A defined sale. One that is not in the copy is looked for in the database first, so that
    /// what another instance has just defined is found.
    ///
    /// # Errors
    /// [`LedgerError::Unavailable`] if it is not in the copy and the database cannot be asked.
    pub async fn sale(&self, id: &SaleId) -> Result<Option<Arc<Sale>>, LedgerError> {
        self.find(|snapshot| snapshot.sales.get(id).cloned()).await
    }

    /// The key, not revoked, whose SHA-256 this is; found and failing like [`Catalog::sale`].
    pub async fn key(&self, sha256: &[u8; 32]) -> Result<Option<Arc<ApiKey>>, LedgerError> {
        self.find(|snapshot| snapshot.keys.get(sha256).cloned()).await
    }

    /// The secret of that version; found and failing like [`Catalog::sale`].
    pub async fn secret(&self, version: u8) -> Result<Option<Arc<IdSecret>>, LedgerError> {
        let of_version = |secret: &&Arc<IdSecret>| secret.version() == version;
        self.find(|snapshot| snapshot.secrets.iter().find(of_version).cloned()).await
    }

    /// The secret that a new sale's ids are made with; `None` before the database is migrated.
    pub async fn newest_secret(&self) -> Result<Option<Arc<IdSecret>>, LedgerError> {
        self.find(|snapshot| snapshot.secrets.last().cloned()).await
    }

    /// Whether one of us made this order id, told without asking anybody.
    ///
    /// # Errors
    /// [`LedgerError::Unavailable`] while no secret was ever read.
    pub fn is_genuine_order(&self, id: &OrderId) -> Result<bool, LedgerError> {
        self.any_secret(|secret| id.is_genuine(secret))
    }

    /// The same for an adjustment's.
    pub fn is_genuine_adjustment(&self, id: &AdjustmentId) -> Result<bool, LedgerError> {
        self.any_secret(|secret| id.is_genuine(secret))
    }

    fn any_secret(&self, made: impl Fn(&IdSecret) -> bool) -> Result<bool, LedgerError> {
        let snapshot = self.0.snapshot.load();
        if snapshot.secrets.is_empty() {
            return Err(LedgerError::Unavailable("no secret was read yet".to_owned()));
        }
        Ok(snapshot.secrets.iter().any(|secret| made(secret)))
    }

    /// All sales in the copy: what relay and sweeper go through.
    pub fn sales(&self) -> Vec<Arc<Sale>> {
        self.0.snapshot.load().sales.values().cloned().collect()
    }

    /// How old the copy is; `None` before the first.
    pub fn age(&self) -> Option<Duration> {
        self.0.snapshot.load().read_at.map(|at| at.elapsed())
    }

    async fn find<T>(
        &self,
        get: impl Fn(&Snapshot) -> Option<T>,
    ) -> Result<Option<T>, LedgerError> {
        if let Some(found) = get(&self.0.snapshot.load()) {
            return Ok(Some(found));
        }
        let asked = Instant::now();
        let mut attempt = self.0.attempt.lock().await;
        // Only a read that began after this call was made can say that there is no such thing:
        // another instance may have made it a moment before.
        if let Some(began) = attempt.began.filter(|began| *began < asked) {
            tokio::time::sleep_until((began + MISS_REFRESH_MIN).into()).await;
        }
        if attempt.began.is_none_or(|began| began < asked) {
            self.read(&mut attempt).await?;
        } else if let Some(failure) = &attempt.failure {
            return Err(LedgerError::Unavailable(failure.clone()));
        }
        Ok(get(&self.0.snapshot.load()))
    }

    async fn read(&self, attempt: &mut Attempt) -> Result<(), LedgerError> {
        let began = Instant::now();
        // A reader that is dropped half-way leaves `began` unset, so the next one reads.
        attempt.began = None;
        let outcome = self.0.ledger.within_patience(self.load(began)).await;
        *attempt = Attempt {
            began: Some(began),
            failure: outcome.as_ref().err().map(ToString::to_string),
        };
        if outcome.is_err() {
            self.0.metrics.failures.inc();
        }
        outcome
    }

    async fn load(&self, began: Instant) -> Result<(), LedgerError> {
        let ledger = &self.0.ledger;
        // Secrets and keys first: a sale must not be seen before the secret of its ids.
        let secrets = ledger.id_secrets().await?.into_iter().map(Arc::new).collect();
        let keys = ledger.active_keys().await?;
        let keys = keys.into_iter().map(|key| (key.sha256, Arc::new(key))).collect();
        let mut sales = HashMap::new();
        let mut unreadable = 0;
        for sale in ledger.all_sales().await? {
            match sale {
                Ok(sale) => {
                    sales.insert(sale.id.clone(), Arc::new(sale));
                }
                Err(error) => {
                    tracing::error!(%error, "a stored sale is left out");
                    unreadable += 1;
                }
            }
        }
        let metrics = &self.0.metrics;
        metrics.age.set(began.elapsed().as_secs_f64());
        metrics.sales.set(i64::try_from(sales.len()).unwrap_or(i64::MAX));
        metrics.unreadable.set(unreadable);
        self.0.snapshot.store(Arc::new(Snapshot { sales, keys, secrets, read_at: Some(began) }));
        Ok(())
    }
}
