//! The producer: idempotent, acknowledged by every replica in sync, in order per partition.

use std::future::Future;
use std::time::Duration;

use rdkafka::error::KafkaError;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord, Producer as _};
use rdkafka::types::RDKafkaErrorCode;

use super::record::Record;
use super::topic::classify;
use super::{BusError, client};
use crate::config::Kafka;

/// Where a record came to lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delivered {
    pub partition: i32,
    pub offset: i64,
}

/// Why a record was not taken. Nothing is lost: the lane still has the event.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// As much is on its way as may be: wait for a delivery and send this one again.
    #[error("the producer's queue is full")]
    QueueFull,
    /// The idempotent producer has lost its place and sends nothing more: make a new one.
    #[error("the producer is broken: {0}")]
    Fatal(String),
    /// Not delivered, and whatever was sent after it to the same partition may have been: rewind
    /// to this record and send from there, in order.
    #[error("not delivered: {0}")]
    Undelivered(KafkaError),
}

/// The handle on one producer; clones share it.
#[derive(Clone)]
pub struct Producer {
    inner: FutureProducer,
    topic: String,
}

impl Producer {
    /// Connects in the background; Kafka need not be there yet.
    ///
    /// # Errors
    /// A setting that is unknown or may not be changed, by its name.
    pub fn new(config: &Kafka) -> Result<Self, BusError> {
        let ours = [
            ("compression.type", "lz4"),
            // Long enough to fill batches, short beside the writer's own age of a batch.
            ("linger.ms", "5"),
            // Bounds the producer's memory; the relay's own bound is lower and comes first.
            ("queue.buffering.max.messages", "200000"),
            ("queue.buffering.max.kbytes", "131072"),
            // Longer than an election of a leader takes, short enough that the relay soon rewinds.
            ("message.timeout.ms", "30000"),
            ("socket.keepalive.enable", "true"),
        ];
        let mut settings = client(config, &ours)?;
        // After the operator's: these are what the relay's marks rely on.
        settings.set("enable.idempotence", "true").set("acks", "all");
        let inner = settings.create().map_err(BusError::Broken)?;
        Ok(Self { inner, topic: config.topic.clone() })
    }

    /// Queues a record for a partition, at once or not at all. Records for one partition are
    /// delivered in the order of these calls; await the deliveries in that order too.
    ///
    /// # Errors
    /// [`SendError::QueueFull`] and [`SendError::Fatal`] at once, [`SendError::Undelivered`] and
    /// [`SendError::Fatal`] from the future.
    pub fn send(
        &self,
        partition: i32,
        record: &Record,
    ) -> Result<impl Future<Output = Result<Delivered, SendError>> + Send + use<>, SendError> {
        let mut headers = OwnedHeaders::new_with_capacity(record.headers.len());
        for (key, value) in &record.headers {
            headers = headers.insert(Header { key, value: Some(value) });
        }
        let message = FutureRecord::to(&self.topic)
            .partition(partition)
            .key(&record.key)
            .payload(&record.payload)
            .headers(headers);
        let delivery = self.inner.send_result(message).map_err(|(error, _)| self.refusal(error))?;
        let producer = self.clone();
        Ok(async move {
            match delivery.await {
                Ok(Ok(at)) => Ok(Delivered { partition: at.partition, offset: at.offset }),
                Ok(Err((error, _))) => Err(producer.refusal(error)),
                Err(_) => Err(SendError::Undelivered(KafkaError::Canceled)),
            }
        })
    }

    fn refusal(&self, error: KafkaError) -> SendError {
        if let Some((code, reason)) = self.inner.client().fatal_error() {
            return SendError::Fatal(format!("{code}: {reason}"));
        }
        match error.rdkafka_error_code() {
            Some(RDKafkaErrorCode::QueueFull) => SendError::QueueFull,
            _ => SendError::Undelivered(error),
        }
    }

    /// Waits until everything queued is delivered, or has failed. Do so before the last handle is
    /// dropped: dropping it throws away what is queued.
    pub async fn flush(&self, timeout: Duration) -> Result<(), BusError> {
        let inner = self.inner.clone();
        let flushed = tokio::task::spawn_blocking(move || inner.flush(timeout));
        match flushed.await {
            Ok(outcome) => outcome.map_err(classify),
            Err(_) => Err(BusError::Unavailable(KafkaError::Canceled)),
        }
    }

    /// Asks whether Kafka answers, for readiness.
    pub async fn ping(&self, timeout: Duration) -> Result<(), BusError> {
        let (inner, topic) = (self.inner.clone(), self.topic.clone());
        let asked = tokio::task::spawn_blocking(move || {
            inner.client().fetch_metadata(Some(&topic), timeout).map(drop)
        });
        match asked.await {
            Ok(outcome) => outcome.map_err(classify),
            Err(_) => Err(BusError::Unavailable(KafkaError::Canceled)),
        }
    }
}
