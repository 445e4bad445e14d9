//! Who is let in, and how much at once: rate limits by client address, API key and buyer (GCRA, by
//! `governor`), and a bound on the requests that are handled at once.

mod address;
mod limiter;

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::http::HeaderMap;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use self::address::Proxies;
use self::limiter::Limiter;
pub use self::limiter::{Policy, Verdict};
use crate::config;
use crate::domain::names::BuyerId;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByPolicy {
    policy: &'static str,
}

#[derive(Debug, Clone, Default)]
struct Metrics {
    limited: Family<ByPolicy, Counter>,
    remembered: Family<ByPolicy, Gauge>,
    forgotten: Family<ByPolicy, Counter>,
    overloaded: Counter,
    in_flight: Gauge,
}

impl Metrics {
    fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let registry = registry.sub_registry_with_prefix("holdfast_admission");
        registry.register("limited", "Requests refused by a rate limit", metrics.limited.clone());
        registry.register(
            "remembered",
            "Addresses, keys and buyers whose recent use is remembered",
            metrics.remembered.clone(),
        );
        registry.register(
            "forgotten",
            "Times that all were forgotten since too many were remembered",
            metrics.forgotten.clone(),
        );
        registry.register(
            "overloaded",
            "Requests refused since too many were in flight",
            metrics.overloaded.clone(),
        );
        registry.register("in_flight", "Requests being handled", metrics.in_flight.clone());
        metrics
    }
}

/// The handle: shared by all requests.
#[derive(Debug)]
pub struct Admission {
    proxies: Proxies,
    addresses: Arc<Limiter>,
    keys: Arc<Limiter>,
    buyers: Arc<Limiter>,
    in_flight: AtomicUsize,
    in_flight_max: usize,
    metrics: Metrics,
}

/// One request's place among those being handled, until it is dropped.
#[derive(Debug)]
pub struct InFlight(Arc<Admission>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
        self.0.metrics.in_flight.dec();
    }
}

impl Admission {
    pub fn new(config: &config::Admission, registry: &mut Registry) -> Self {
        let metrics = Metrics::register(registry);
        let limiter = |name, per_second, burst| {
            let policy = Policy { name, per_second, burst };
            let label = ByPolicy { policy: name };
            Arc::new(Limiter::new(
                policy,
                config.remembered_max,
                limiter::Metrics {
                    limited: metrics.limited.get_or_create(&label).clone(),
                    remembered: metrics.remembered.get_or_create(&label).clone(),
                    forgotten: metrics.forgotten.get_or_create(&label).clone(),
                },
            ))
        };
        Self {
            proxies: Proxies::new(config.trusted_proxies.clone()),
            addresses: limiter("address", config.address_per_second, config.address_burst),
            keys: limiter("key", config.key_per_second, config.key_burst),
            buyers: limiter("buyer", config.buyer_per_second, config.buyer_burst),
            in_flight: AtomicUsize::new(0),
            in_flight_max: config.in_flight_max,
            metrics,
        }
    }

    /// Counts a request of this client: the peer's own address, or the one that a trusted proxy
    /// names.
    pub fn address(&self, peer: IpAddr, headers: &HeaderMap) -> Verdict {
        let client = self.proxies.client(peer, headers);
        self.addresses.check(&address::network(client))
    }

    /// Counts a request of this API key.
    pub fn key(&self, sha256: &[u8; 32]) -> Verdict {
        self.keys.check(sha256)
    }

    /// Counts an order of this buyer.
    pub fn buyer(&self, buyer: &BuyerId) -> Verdict {
        self.buyers.check(buyer.as_str().as_bytes())
    }

    /// The limits that orders are placed under, as `RateLimit-Policy` tells them.
    pub fn policies(&self) -> [Policy; 3] {
        [self.addresses.policy(), self.keys.policy(), self.buyers.policy()]
    }

    /// Takes a place among the requests being handled; `None` when there is none left.
    pub fn enter(self: &Arc<Self>) -> Option<InFlight> {
        if self.in_flight.fetch_add(1, Ordering::Relaxed) >= self.in_flight_max {
            self.in_flight.fetch_sub(1, Ordering::Relaxed);
            self.metrics.overloaded.inc();
            return None;
        }
        self.metrics.in_flight.inc();
        Some(InFlight(self.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_free_again_when_its_request_is_done() {
        let config = config::Admission {
            in_flight_max: 1,
            trusted_proxies: Vec::new(),
            address_per_second: 1,
            address_burst: 1,
            key_per_second: 1,
            key_burst: 1,
            buyer_per_second: 1,
            buyer_burst: 1,
            remembered_max: 1_000,
        };
        let admission = Arc::new(Admission::new(&config, &mut Registry::default()));
        let place = admission.enter();
        assert!(place.is_some());
        assert!(admission.enter().is_none());
        drop(place);
        assert!(admission.enter().is_some());
    }
}
