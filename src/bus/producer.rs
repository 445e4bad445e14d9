//! The producer: idempotent, acknowledged by every replica in sync, in order per partition.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use rdkafka::ClientConfig;
use rdkafka::error::KafkaError;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::future_producer::Delivery;
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
    /// The idempotent producer has lost its place and sends nothing more: see [`Producer::renew`].
    #[error("the producer is broken: {0}")]
    Fatal(String),
    /// Not delivered, and whatever was sent after it to the same partition may have been: rewind
    /// to this record and send from there, in order.
    #[error("not delivered: {0}")]
    Undelivered(KafkaError),
    /// Taken for delivered, but Kafka did not say where it lies: to be treated as undelivered.
    ///
    /// librdkafka counts a batch that failed as delivered once a later one of its partition is, for a
    /// broker takes a producer's batches in their order only. One that has just begun to lead a
    /// partition does not know the producer and takes whichever comes first: then the earlier batch is
    /// nowhere (<https://github.com/confluentinc/confluent-kafka-go/issues/921>). What a broker itself
    /// acknowledged has an offset.
    #[error("Kafka did not say where it lies")]
    Unplaced,
}

/// The handle on one producer; clones share it, and the one that takes its place.
#[derive(Clone)]
pub struct Producer {
    settings: ClientConfig,
    inner: Arc<ArcSwap<FutureProducer>>,
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
        let inner = Arc::new(ArcSwap::from_pointee(inner));
        Ok(Self { settings, inner, topic: config.topic.clone() })
    }

    /// Puts a new one in the place of one that is [`SendError::Fatal`]. Nothing that the old one had
    /// not delivered is delivered any more: rewind every partition to what was acknowledged.
    ///
    /// # Errors
    /// [`BusError::Broken`], where librdkafka cannot make one.
    pub fn renew(&self) -> Result<(), BusError> {
        let inner = self.settings.create().map_err(BusError::Broken)?;
        self.inner.store(Arc::new(inner));
        Ok(())
    }

    /// Queues a record for a partition, at once or not at all. Records for one partition are
    /// delivered in the order of these calls; await the deliveries in that order too.
    ///
    /// # Errors
    /// [`SendError::QueueFull`] and [`SendError::Fatal`] at once, [`SendError::Undelivered`],
    /// [`SendError::Unplaced`] and [`SendError::Fatal`] from the future.
    pub fn send(
        &self,
        partition: i32,
        record: &Record,
    ) -> Result<impl Future<Output = Result<Delivered, SendError>> + Send + use<>, SendError> {
        let mut headers = OwnedHeaders::new_with_capacity(record.headers.len());
        for (key, value) in &record.headers {
            headers = headers.insert(Header { key, value: Some(&**value) });
        }
        let message = FutureRecord::to(&self.topic)
            .partition(partition)
            .key(&record.key)
            .payload(&record.payload)
            .headers(headers);
        let producer = self.inner.load();
        let delivery =
            producer.send_result(message).map_err(|(error, _)| refusal(&producer, error))?;
        let producer = FutureProducer::clone(&producer);
        Ok(async move {
            match delivery.await {
                Ok(Ok(at)) => placed(&at),
                Ok(Err((error, _))) => Err(refusal(&producer, error)),
                Err(_) => Err(SendError::Undelivered(KafkaError::Canceled)),
            }
        })
    }

    /// Waits until everything queued is delivered, or has failed. Do so before the last handle is
    /// dropped: dropping it throws away what is queued.
    pub async fn flush(&self, timeout: Duration) -> Result<(), BusError> {
        let inner = self.inner.load_full();
        let flushed = tokio::task::spawn_blocking(move || inner.flush(timeout));
        match flushed.await {
            Ok(outcome) => outcome.map_err(classify),
            Err(_) => Err(BusError::Unavailable(KafkaError::Canceled)),
        }
    }

    /// Asks whether Kafka answers, for readiness.
    pub async fn ping(&self, timeout: Duration) -> Result<(), BusError> {
        let (inner, topic) = (self.inner.load_full(), self.topic.clone());
        let asked = tokio::task::spawn_blocking(move || {
            inner.client().fetch_metadata(Some(&topic), timeout).map(drop)
        });
        match asked.await {
            Ok(outcome) => outcome.map_err(classify),
            Err(_) => Err(BusError::Unavailable(KafkaError::Canceled)),
        }
    }
}

fn placed(at: &Delivery) -> Result<Delivered, SendError> {
    let delivered = Delivered { partition: at.partition, offset: at.offset };
    if at.offset < 0 { Err(SendError::Unplaced) } else { Ok(delivered) }
}

fn refusal(producer: &FutureProducer, error: KafkaError) -> SendError {
    if let Some((code, reason)) = producer.client().fatal_error() {
        return SendError::Fatal(format!("{code}: {reason}"));
    }
    match error.rdkafka_error_code() {
        Some(RDKafkaErrorCode::QueueFull) => SendError::QueueFull,
        _ => SendError::Undelivered(error),
    }
}

#[cfg(test)]
mod tests {
    use rdkafka::Timestamp;
    use rdkafka::bindings::RD_KAFKA_OFFSET_INVALID;
    use rdkafka::bindings::rd_kafka_test_fatal_error;
    use rdkafka::types::RDKafkaRespErr;

    use super::*;

    #[test]
    fn what_lies_nowhere_is_not_delivered() {
        let at = |offset| Delivery { partition: 0, offset, timestamp: Timestamp::NotAvailable };
        assert_eq!(placed(&at(0)).unwrap(), Delivered { partition: 0, offset: 0 });
        let invalid = placed(&at(i64::from(RD_KAFKA_OFFSET_INVALID)));
        assert!(matches!(invalid, Err(SendError::Unplaced)));
    }

    #[tokio::test]
    async fn one_that_lost_its_place_is_replaced_for_all_its_handles() {
        let config = Kafka {
            brokers: "localhost:1".into(),
            topic: "t".into(),
            partitions: 1,
            replication: 1,
            properties: [].into(),
        };
        let producer = Producer::new(&config).unwrap();
        let another = producer.clone();
        let record = Record { key: "k".into(), headers: Vec::new(), payload: Vec::new() };
        let code = RDKafkaRespErr::RD_KAFKA_RESP_ERR_OUT_OF_ORDER_SEQUENCE_NUMBER;
        let broken = producer.inner.load_full();
        // SAFETY: the client lives until the end of this test, the text for ever.
        unsafe {
            rd_kafka_test_fatal_error(broken.client().native_ptr(), code, c"staged".as_ptr())
        };
        assert!(matches!(another.send(0, &record), Err(SendError::Fatal(_))));
        producer.renew().unwrap();
        assert!(another.send(0, &record).is_ok());
    }
}
