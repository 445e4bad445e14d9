//! One rate limit over many keys, in bounded memory. Keys are hashed to 64 bits with a secret of
//! this process, so a remembered one takes 36-59 bytes whatever its length, and nobody can choose
//! keys that collide.

use std::hash::{BuildHasher, RandomState};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use governor::clock::{Clock, DefaultClock};
use governor::middleware::StateInformationMiddleware;
use governor::state::keyed::DashMapStateStore;
use governor::{Quota, RateLimiter};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;

/// The keys are hashes with a secret already: in the map a cheap one is good enough.
type Store = DashMapStateStore<u64, foldhash::fast::RandomState>;
type Keyed = RateLimiter<u64, Store, DefaultClock, StateInformationMiddleware>;

/// What share of the bound may come new between two looks at it.
const LOOK_EVERY_SHARE: usize = 8;

/// A limit as callers are told of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    pub name: &'static str,
    pub per_second: u32,
    /// At once, after a rest.
    pub burst: u32,
}

impl Policy {
    /// How long an empty allowance takes to be full again, in whole seconds, rounded up.
    pub fn window_seconds(&self) -> u32 {
        self.burst.div_ceil(self.per_second)
    }

    fn quota(&self) -> Quota {
        let positive = |number| NonZeroU32::new(number).unwrap_or(NonZeroU32::MIN);
        Quota::per_second(positive(self.per_second)).allow_burst(positive(self.burst))
    }
}

/// Whether a request is within a limit, and what is left of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    pub policy: Policy,
    /// Requests that would be let through now.
    pub remaining: u32,
    /// How long until one is let through; `None`: this one is.
    pub wait: Option<Duration>,
}

impl Verdict {
    /// Seconds until all of the allowance is there again, rounded up.
    pub fn reset_seconds(&self) -> u32 {
        (self.policy.burst.saturating_sub(self.remaining)).div_ceil(self.policy.per_second)
    }
}

/// What a limiter counts of itself.
#[derive(Debug, Clone)]
pub struct Metrics {
    pub limited: Counter,
    pub remembered: Gauge,
    pub forgotten: Counter,
}

#[derive(Debug)]
pub struct Limiter {
    policy: Policy,
    limiter: ArcSwap<Keyed>,
    hasher: RandomState,
    clock: DefaultClock,
    remembered_max: usize,
    /// Checks since somebody looked at how many keys are remembered.
    unlooked: AtomicUsize,
    metrics: Metrics,
}

impl Limiter {
    pub fn new(policy: Policy, remembered_max: usize, metrics: Metrics) -> Self {
        Self {
            policy,
            limiter: ArcSwap::from_pointee(fresh(policy)),
            hasher: RandomState::new(),
            clock: DefaultClock::default(),
            remembered_max,
            unlooked: AtomicUsize::new(0),
            metrics,
        }
    }

    pub fn policy(&self) -> Policy {
        self.policy
    }

    /// Counts one request of this key.
    pub fn check(self: &Arc<Self>, key: &[u8]) -> Verdict {
        self.look_now_and_then();
        match self.limiter.load().check_key(&self.hasher.hash_one(key)) {
            Ok(state) => {
                let remaining = state.remaining_burst_capacity();
                Verdict { policy: self.policy, remaining, wait: None }
            }
            Err(not_until) => {
                self.metrics.limited.inc();
                let wait = not_until.wait_time_from(self.clock.now());
                Verdict { policy: self.policy, remaining: 0, wait: Some(wait) }
            }
        }
    }

    /// A check remembers one key at most, so a look every so many checks is often enough. It goes
    /// through all keys: not on the thread that serves a request, where there is another.
    fn look_now_and_then(self: &Arc<Self>) {
        let every = self.remembered_max / LOOK_EVERY_SHARE;
        if self.unlooked.fetch_add(1, Ordering::Relaxed) != every {
            return;
        }
        let limiter = self.clone();
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(move || limiter.look())),
            Err(_) => limiter.look(),
        }
    }

    /// Forgets the keys that have rested; where too many are left even then, all: for a moment
    /// everybody has a full allowance, which is better than no memory.
    fn look(&self) {
        let limiter = self.limiter.load();
        if limiter.len() > self.remembered_max {
            limiter.retain_recent();
            limiter.shrink_to_fit();
        }
        if limiter.len() > self.remembered_max {
            tracing::warn!(
                policy = self.policy.name,
                max = self.remembered_max,
                "too many callers to remember: all are forgotten"
            );
            self.metrics.forgotten.inc();
            self.limiter.store(Arc::new(fresh(self.policy)));
        }
        let remembered = self.limiter.load().len();
        self.metrics.remembered.set(i64::try_from(remembered).unwrap_or(i64::MAX));
        self.unlooked.store(0, Ordering::Relaxed);
    }
}

fn fresh(policy: Policy) -> Keyed {
    let hasher = foldhash::fast::RandomState::default();
    RateLimiter::dashmap_with_hasher(policy.quota(), hasher).with_middleware()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limiter(per_second: u32, burst: u32, remembered_max: usize) -> Arc<Limiter> {
        let metrics = Metrics {
            limited: Counter::default(),
            remembered: Gauge::default(),
            forgotten: Counter::default(),
        };
        let policy = Policy { name: "test", per_second, burst };
        Arc::new(Limiter::new(policy, remembered_max, metrics))
    }

    #[test]
    fn what_is_over_the_burst_is_told_how_long_to_wait() {
        let limiter = limiter(1, 2, 1_000);
        assert_eq!(limiter.check(b"a").remaining, 1);
        let last = limiter.check(b"a");
        assert_eq!((last.remaining, last.wait, last.reset_seconds()), (0, None, 2));
        let wait = limiter.check(b"a").wait.unwrap();
        assert!(wait > Duration::ZERO && wait <= Duration::from_secs(1), "{wait:?}");
        assert_eq!(limiter.check(b"b").wait, None, "another key has its own allowance");
    }

    #[test]
    fn a_million_keys_are_not_all_remembered() {
        let limiter = limiter(1, 1, 10_000);
        for key in 0_u64..1_000_000 {
            limiter.check(&key.to_le_bytes());
            assert!(limiter.limiter.load().len() <= 10_000 + 10_000 / LOOK_EVERY_SHARE + 2);
        }
        assert!(limiter.metrics.forgotten.get() > 0);
    }

    #[test]
    fn who_has_rested_is_forgotten_first() {
        let limiter = limiter(1_000_000, 1, 1_000);
        for key in 0_u64..10_000 {
            limiter.check(&key.to_le_bytes());
        }
        assert_eq!(limiter.metrics.forgotten.get(), 0, "the idle alone were enough");
    }
}
