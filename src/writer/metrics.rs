//! What the writer tells of itself.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::bus::consumer::ConsumerMetrics;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ReasonLabel {
    pub reason: &'static str,
}

#[derive(Debug, Clone)]
pub struct WriterMetrics {
    pub(super) events: Counter,
    pub(super) rows: Counter,
    pub(super) batches: Counter,
    pub(super) batch_duration: Histogram,
    pub(super) event_age: Gauge<f64, AtomicU64>,
    pub(super) repeats: Counter,
    pub(super) parked: Counter,
    pub(super) dead_letters: Family<ReasonLabel, Counter>,
    pub(super) dead_letters_dropped: Counter,
    pub(super) marks_moved: Counter,
    pub(super) retries: Counter,
    pub(super) paused: Gauge,
    pub(super) full_lanes: Gauge,
    pub(super) dead_letters_open: Gauge,
    pub(super) parked_records: Gauge,
    pub(super) drain: Gauge<f64, AtomicU64>,
    pub(super) consumer: ConsumerMetrics,
}

impl WriterMetrics {
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            events: Counter::default(),
            rows: Counter::default(),
            batches: Counter::default(),
            batch_duration: Histogram::new(exponential_buckets(0.001, 2.0, 14)),
            event_age: Gauge::default(),
            repeats: Counter::default(),
            parked: Counter::default(),
            dead_letters: Family::default(),
            dead_letters_dropped: Counter::default(),
            marks_moved: Counter::default(),
            retries: Counter::default(),
            paused: Gauge::default(),
            full_lanes: Gauge::default(),
            dead_letters_open: Gauge::default(),
            parked_records: Gauge::default(),
            drain: Gauge::default(),
            consumer: ConsumerMetrics::register(registry),
        };
        metrics.register_counters(registry);
        metrics.register_backlog(registry);
        registry.register_with_unit(
            "holdfast_writer_batch_duration",
            "Time to write one batch, retries not counted",
            Unit::Seconds,
            metrics.batch_duration.clone(),
        );
        registry.register_with_unit(
            "holdfast_writer_event_age",
            "Age of the newest event when it was written",
            Unit::Seconds,
            metrics.event_age.clone(),
        );
        registry.register(
            "holdfast_writer_paused",
            "1 while the database does not take what the writer has",
            metrics.paused.clone(),
        );
        registry.register(
            "holdfast_writer_full_lanes",
            "Lanes that have writer.parked_max parked: what follows is left in Kafka until there is room",
            metrics.full_lanes.clone(),
        );
        metrics
    }

    fn register_backlog(&self, registry: &mut Registry) {
        registry.register_with_unit(
            "holdfast_writer_drain",
            "Time to record what Kafka has and the database lacks, at the pace of the last batches",
            Unit::Seconds,
            self.drain.clone(),
        );
        registry.register(
            "holdfast_writer_dead_letters_open",
            "Dead letters that nobody has resolved",
            self.dead_letters_open.clone(),
        );
        registry.register(
            "holdfast_writer_parked_records",
            "Records that wait for a missing one of their lane",
            self.parked_records.clone(),
        );
    }

    fn register_counters(&self, registry: &mut Registry) {
        for (name, help, counter) in [
            ("holdfast_writer_events", "Events applied", &self.events),
            ("holdfast_writer_rows", "Rows of orders, ledger and adjustments written", &self.rows),
            ("holdfast_writer_batches", "Transactions committed", &self.batches),
            ("holdfast_writer_repeats", "Records that said what was recorded", &self.repeats),
            ("holdfast_writer_parked", "Records parked for a missing one", &self.parked),
            (
                "holdfast_writer_marks_moved",
                "Batches begun anew, a mark having moved",
                &self.marks_moved,
            ),
            (
                "holdfast_writer_dead_letters_dropped",
                "Records of no lane that were not kept, writer.dead_letters_max being open",
                &self.dead_letters_dropped,
            ),
            (
                "holdfast_writer_retries",
                "Batches tried again, the database being away",
                &self.retries,
            ),
        ] {
            registry.register(name, help, counter.clone());
        }
        registry.register(
            "holdfast_writer_dead_letters",
            "Records that cannot be applied, by reason",
            self.dead_letters.clone(),
        );
    }
}
