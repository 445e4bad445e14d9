//! Metrics of the lanes.

use std::sync::atomic::AtomicU64;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

pub struct Metrics {
    pub call_seconds: Histogram,
    pub call_commands: Histogram,
    pub paced_seconds: Counter<f64, AtomicU64>,
    pub queue_full: Counter,
    pub queued_too_long: Counter,
    pub lanes: Gauge,
    pub frozen: Gauge,
    pub missing: Gauge,
    pub told: Gauge,
    pub told_unlisted: Counter,
    pub memory_used_bytes: Gauge,
    pub memory_max_bytes: Gauge,
    pub nearly_full: Gauge,
    pub outbox_bytes: Gauge,
    pub clock_skew_ms: Gauge,
}

impl Metrics {
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            call_seconds: Histogram::new(exponential_buckets(0.000_1, 2.0, 16)),
            call_commands: Histogram::new(exponential_buckets(1.0, 2.0, 9)),
            paced_seconds: Counter::default(),
            queue_full: Counter::default(),
            queued_too_long: Counter::default(),
            lanes: Gauge::default(),
            frozen: Gauge::default(),
            missing: Gauge::default(),
            told: Gauge::default(),
            told_unlisted: Counter::default(),
            memory_used_bytes: Gauge::default(),
            memory_max_bytes: Gauge::default(),
            nearly_full: Gauge::default(),
            outbox_bytes: Gauge::default(),
            clock_skew_ms: Gauge::default(),
        };
        let registry = registry.sub_registry_with_prefix("holdfast_lanes");
        let m = &metrics;
        registry.register("call_seconds", "Script calls, by duration", m.call_seconds.clone());
        registry.register(
            "call_commands",
            "Commands that a script call carried",
            m.call_commands.clone(),
        );
        registry.register(
            "paced_seconds",
            "Time that lanes' calls were held back because more than lanes.pace_from_events were unrecorded",
            m.paced_seconds.clone(),
        );
        registry.register(
            "queued_too_long",
            "Commands refused unsent because they waited longer than redis.response_timeout_ms",
            m.queued_too_long.clone(),
        );
        registry.register(
            "queue_full",
            "Commands refused because their lane's queue was full",
            m.queue_full.clone(),
        );
        registry.register("active", "Lanes that this process has a queue for", m.lanes.clone());
        registry.register(
            "frozen",
            "Lanes that told this process last that they are frozen",
            m.frozen.clone(),
        );
        registry.register(
            "missing",
            "Lanes that this process has talked to and that are gone from Redis",
            m.missing.clone(),
        );
        registry.register(
            "told",
            "Orders that this process has told of and that Kafka may not have; at most lanes.told_max a lane",
            m.told.clone(),
        );
        registry.register(
            "told_unlisted",
            "Orders told of beyond lanes.told_max: were they lost, they could not be named",
            m.told_unlisted.clone(),
        );
        registry.register(
            "redis_memory_used_bytes",
            "Redis used_memory",
            m.memory_used_bytes.clone(),
        );
        registry.register(
            "redis_memory_max_bytes",
            "Redis maxmemory; 0: none",
            m.memory_max_bytes.clone(),
        );
        registry.register(
            "redis_nearly_full",
            "1 while new orders are refused for want of Redis memory",
            m.nearly_full.clone(),
        );
        registry.register(
            "outbox_bytes",
            "What the largest outbox of these lanes takes in Redis; at lanes.outbox_bytes_max it is full",
            m.outbox_bytes.clone(),
        );
        registry.register(
            "clock_skew_milliseconds",
            "By how much Redis' clock is at least ahead of this process', or behind: negative",
            m.clock_skew_ms.clone(),
        );
        metrics
    }
}
