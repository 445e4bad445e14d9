//! The group consumer: batches of records, offsets committed only when the database has them.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::AtomicI64;
use std::time::Duration;

use futures_util::future::FutureExt;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use rdkafka::consumer::{
    BaseConsumer, CommitMode, Consumer as _, ConsumerContext, Rebalance, StreamConsumer,
};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::message::{BorrowedMessage, Headers as _, Message as _};
use rdkafka::topic_partition_list::TopicPartitionListElem;
use rdkafka::types::RDKafkaErrorCode;
use rdkafka::{ClientContext, Offset, TopicPartitionList};
use tokio::time::{Instant, sleep_until, timeout_at};

use super::topic::classify;
use super::{BusError, client};
use crate::config::Kafka;

/// How long one wait for a record lasts before it is begun anew: a StreamConsumer can miss a
/// wake-up, and this bounds what that costs.
const WAIT_MAX: Duration = Duration::from_millis(500);
/// Seeking is only begun: what was fetched from the old place is dropped by then, and a partition
/// that was taken meanwhile is nobody's to wait for.
const SEEK_TIMEOUT: Duration = Duration::ZERO;
/// How long Kafka may take to say how far the group is behind.
const LAG_TIMEOUT: Duration = Duration::from_secs(2);

/// A record as it came from Kafka.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received {
    pub topic: String,
    pub partition: i32,
    pub offset: i64,
    pub headers: Vec<(String, Vec<u8>)>,
    pub payload: Vec<u8>,
}

impl From<&BorrowedMessage<'_>> for Received {
    fn from(message: &BorrowedMessage<'_>) -> Self {
        Self {
            topic: message.topic().to_owned(),
            partition: message.partition(),
            offset: message.offset(),
            // The driver panics at a header whose name is not UTF-8. Anybody with access to the
            // topic can send one, and it must not end the process: without its headers the
            // record is merely undecodable.
            headers: catch_unwind(AssertUnwindSafe(|| headers_of(message))).unwrap_or_default(),
            payload: message.payload().unwrap_or_default().to_vec(),
        }
    }
}

fn headers_of(message: &BorrowedMessage<'_>) -> Vec<(String, Vec<u8>)> {
    let Some(headers) = message.headers() else { return Vec::new() };
    headers
        .iter()
        .map(|header| (header.key.to_owned(), header.value.unwrap_or_default().to_vec()))
        .collect()
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PartitionLabel {
    partition: i32,
}

/// What the consumer tells of itself.
#[derive(Debug, Clone, Default)]
pub struct ConsumerMetrics {
    lag: Family<PartitionLabel, Gauge<i64, AtomicI64>>,
    assigned: Gauge<i64, AtomicI64>,
    rebalances: prometheus_client::metrics::counter::Counter,
}

impl ConsumerMetrics {
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "holdfast_consumer_lag_records",
            "Records of a partition that the group has not committed yet",
            metrics.lag.clone(),
        );
        registry.register(
            "holdfast_consumer_assigned_partitions",
            "Partitions that this instance reads",
            metrics.assigned.clone(),
        );
        registry.register(
            "holdfast_consumer_rebalances",
            "Times that partitions were given or taken",
            metrics.rebalances.clone(),
        );
        metrics
    }
}

struct Context {
    metrics: ConsumerMetrics,
}

impl ClientContext for Context {}

impl ConsumerContext for Context {
    /// Nothing has to be handed over when partitions are taken: what is in hand can still be
    /// written, for the lane's mark in the database is the fence, and whoever reads the same
    /// records again finds them repeats.
    fn post_rebalance(&self, consumer: &BaseConsumer<Self>, _rebalance: &Rebalance<'_>) {
        self.metrics.rebalances.inc();
        if let Ok(assigned) = consumer.assignment() {
            self.metrics.assigned.set(i64::try_from(assigned.count()).unwrap_or(i64::MAX));
        }
    }

    fn commit_callback(&self, result: KafkaResult<()>, _offsets: &TopicPartitionList) {
        if let Err(error) = result {
            // Offsets are a hint: what is read again is found to be a repeat.
            tracing::debug!(%error, "offsets were not committed");
        }
    }
}

/// How far a group is with a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Where whoever comes next begins to read: some records from here on are not dealt with.
    pub from: i64,
    /// Up to where it was read all the same. Kafka keeps it as what goes with the offset.
    pub read: i64,
}

/// A member of the group; clones are the same member.
#[derive(Clone)]
pub struct Consumer {
    inner: Arc<StreamConsumer<Context>>,
    topic: String,
}

impl Consumer {
    /// Joins the group in the background; Kafka need not be there yet.
    ///
    /// # Errors
    /// A setting that is unknown or may not be changed, by its name.
    pub fn new(config: &Kafka, group: &str, metrics: ConsumerMetrics) -> Result<Self, BusError> {
        let ours = [
            // A partition that stays where it was keeps its reader through a rebalance.
            ("partition.assignment.strategy", "cooperative-sticky"),
            ("session.timeout.ms", "10000"),
            ("heartbeat.interval.ms", "2000"),
            // librdkafka's default is 64 MB and 100,000 records, a consumer.
            ("queued.min.messages", "5000"),
            ("queued.max.messages.kbytes", "16384"),
            ("fetch.message.max.bytes", "1048576"),
            ("fetch.wait.max.ms", "100"),
            // How long a full queue rests: by default a second, and a backlog was read in bursts of
            // one queue a second.
            ("fetch.queue.backoff.ms", "5"),
            ("socket.keepalive.enable", "true"),
        ];
        let mut settings = client(config, &ours)?;
        settings
            .set("group.id", group)
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("auto.offset.reset", "earliest");
        let context = Context { metrics };
        let inner: StreamConsumer<Context> =
            settings.create_with_context(context).map_err(BusError::Broken)?;
        inner.subscribe(&[&config.topic]).map_err(BusError::Broken)?;
        Ok(Self { inner: Arc::new(inner), topic: config.topic.clone() })
    }

    /// Waits for a record, then gathers more until there are `count` or the first is `age` old.
    /// May return nothing. Records of a future that is dropped are read again by the next session
    /// only: drop it at the end of one.
    ///
    /// # Errors
    /// [`BusError::Unavailable`] after a while of nothing but errors; the consumer heals by itself.
    pub async fn batch(&self, count: usize, age: Duration) -> Result<Vec<Received>, BusError> {
        let mut records = Vec::new();
        let Some(first) = self.next(WAIT_MAX).await? else { return Ok(records) };
        records.push(first);
        let deadline = Instant::now() + age;
        while records.len() < count {
            tokio::select! {
                biased;
                received = self.inner.recv() => match received {
                    Ok(message) => records.push((&message).into()),
                    // What is in hand is good; the error comes again if it lasts.
                    Err(_) => break,
                },
                () = sleep_until(deadline) => break,
            }
        }
        Ok(records)
    }

    /// Records that are here already, at most so many.
    pub fn at_hand(&self, count: usize) -> Vec<Received> {
        let mut records = Vec::new();
        while records.len() < count {
            // An error comes again if it lasts.
            let Some(Ok(message)) = self.inner.recv().now_or_never() else { break };
            records.push((&message).into());
        }
        records
    }

    /// The next record; `None` if there is none for a while. Errors are events of the same queue,
    /// and many while Kafka is away: they are passed over, or the first record after it would wait
    /// behind them all.
    async fn next(&self, wait: Duration) -> Result<Option<Received>, BusError> {
        let deadline = Instant::now() + wait;
        let mut away = None;
        loop {
            let error = match timeout_at(deadline, self.inner.recv()).await {
                Err(_) => return away.map_or(Ok(None), Err),
                Ok(Ok(message)) => return Ok(Some((&message).into())),
                Ok(Err(error)) => error,
            };
            // A missing topic is about to be made, or its leader to be elected.
            if error.rdkafka_error_code() != Some(RDKafkaErrorCode::UnknownTopicOrPartition) {
                match classify(error) {
                    error @ BusError::Unavailable(_) => away = Some(error),
                    error => return Err(error),
                }
            }
        }
    }

    /// The partitions that this member reads at the moment.
    pub fn assigned(&self) -> Result<BTreeSet<i32>, BusError> {
        let assigned = self.inner.assignment().map_err(classify)?;
        Ok(assigned.elements().iter().map(|element| element.partition()).collect())
    }

    /// Asks Kafka how many records there are behind what the group has committed, of the partitions
    /// that this member reads. librdkafka's own statistics would not do: they stand still while no
    /// record is asked for, as while the database is away.
    pub async fn lag_records(&self) -> Result<u64, BusError> {
        let consumer = self.clone();
        let asked = tokio::task::spawn_blocking(move || consumer.ask_lag()).await;
        asked.map_err(|_| BusError::Unavailable(KafkaError::Canceled))?
    }

    fn ask_lag(&self) -> Result<u64, BusError> {
        let assigned = self.assigned()?;
        let mut lags = BTreeMap::new();
        if !assigned.is_empty() {
            let mut asked = TopicPartitionList::with_capacity(assigned.len());
            for &partition in &assigned {
                asked
                    .add_partition_offset(&self.topic, partition, Offset::End)
                    .map_err(BusError::Broken)?;
            }
            let committed = self.inner.committed_offsets(asked.clone(), LAG_TIMEOUT);
            let committed = offsets(&committed.map_err(classify)?);
            let ends = self.inner.offsets_for_times(asked, LAG_TIMEOUT).map_err(classify)?;
            for (partition, end) in offsets(&ends) {
                // A partition of which nothing was ever committed is read from its beginning.
                let next = committed.get(&partition).copied().unwrap_or(0);
                lags.insert(partition, (end - next).max(0));
            }
        }
        let metrics = &self.inner.context().metrics;
        metrics.lag.clear();
        for (&partition, &lag) in &lags {
            metrics.lag.get_or_create(&PartitionLabel { partition }).set(lag);
        }
        Ok(lags.values().map(|lag| lag.unsigned_abs()).sum())
    }

    /// Commits how far each partition is dealt with; answered in the background.
    pub fn commit(&self, places: &BTreeMap<i32, Place>) -> Result<(), BusError> {
        self.commit_with(places, CommitMode::Async)
    }

    /// The same, answered: at the end of a session.
    pub async fn commit_now(self, places: BTreeMap<i32, Place>) -> Result<(), BusError> {
        let committed =
            tokio::task::spawn_blocking(move || self.commit_with(&places, CommitMode::Sync)).await;
        committed.map_err(|_| BusError::Unavailable(KafkaError::Canceled))?
    }

    fn commit_with(&self, places: &BTreeMap<i32, Place>, mode: CommitMode) -> Result<(), BusError> {
        if places.is_empty() {
            return Ok(());
        }
        let mut offsets = TopicPartitionList::with_capacity(places.len());
        for (&partition, &Place { from, read }) in places {
            let mut element = offsets.add_partition(&self.topic, partition);
            element.set_offset(Offset::Offset(from)).map_err(BusError::Broken)?;
            element.set_metadata(read.to_string());
        }
        self.inner.commit(&offsets, mode).map_err(classify)
    }

    /// Goes on reading a partition at this offset, and not before [`Consumer::resume`].
    pub fn pause_at(&self, partition: i32, offset: i64) -> Result<(), BusError> {
        self.inner.pause(&self.one(partition)).map_err(classify)?;
        self.inner
            .seek(&self.topic, partition, Offset::Offset(offset), SEEK_TIMEOUT)
            .map_err(classify)
    }

    /// Reads a paused partition again.
    pub fn resume(&self, partition: i32) -> Result<(), BusError> {
        self.inner.resume(&self.one(partition)).map_err(classify)
    }

    fn one(&self, partition: i32) -> TopicPartitionList {
        let mut list = TopicPartitionList::with_capacity(1);
        list.add_partition(&self.topic, partition);
        list
    }
}

/// By partition, the offsets that are known.
fn offsets(list: &TopicPartitionList) -> BTreeMap<i32, i64> {
    let known = |element: TopicPartitionListElem<'_>| match element.offset() {
        Offset::Offset(offset) => Some((element.partition(), offset)),
        _ => None,
    };
    list.elements().into_iter().filter_map(known).collect()
}
