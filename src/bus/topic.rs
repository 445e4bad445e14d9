//! The topic: made where it is missing, and looked at for what endangers the events.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use rdkafka::admin::{
    AdminClient, AdminOptions, ConfigResource, NewTopic, ResourceSpecifier, TopicReplication,
};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::KafkaError;
use rdkafka::types::RDKafkaErrorCode;
use rdkafka::{Offset, TopicPartitionList};

use super::{BusError, client};
use crate::config::Kafka;

const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// A week. The database keeps events for good and lanes keep what is not recorded, so the topic
/// need only outlast a writer, or another consumer, that stands still over a long weekend.
const RETENTION_MS: i64 = 7 * DAY_MS;
const DAY_MS: i64 = 24 * 60 * 60 * 1000;

/// Makes the topic if it is missing, and says what about it endangers the events.
///
/// # Errors
/// [`BusError::Unavailable`] can be retried.
pub async fn prepare(config: &Kafka) -> Result<Vec<String>, BusError> {
    let admin: AdminClient<DefaultClientContext> =
        client(config, &[])?.create().map_err(BusError::Broken)?;
    create(&admin, config).await?;
    let options = AdminOptions::new().request_timeout(Some(REQUEST_TIMEOUT));
    let described = admin
        .describe_configs([&ResourceSpecifier::Topic(&config.topic)], &options)
        .await
        .map_err(classify)?;
    let settings = match described.into_iter().next() {
        Some(Ok(settings)) => settings,
        Some(Err(code)) => return Err(classify(KafkaError::AdminOp(code))),
        None => return Err(BusError::Unavailable(KafkaError::NoMessageReceived)),
    };
    let (partitions, replication) = layout(admin, &config.topic).await?;
    // Lanes are spread over kafka.partitions: events for one that is not there would never leave.
    if partitions < usize::try_from(config.partitions).unwrap_or(0) {
        let detail = format!("topic {} has only {partitions}", config.topic);
        return Err(BusError::Setting { name: "partitions".into(), detail });
    }
    Ok(warnings(config, &settings, replication))
}

async fn create(admin: &AdminClient<DefaultClientContext>, config: &Kafka) -> Result<(), BusError> {
    // With one replica more than must be in sync, one broker may be away and nothing is lost.
    let in_sync = (config.replication - 1).max(1).to_string();
    let retention = RETENTION_MS.to_string();
    let topic = NewTopic::new(
        &config.topic,
        config.partitions,
        TopicReplication::Fixed(config.replication),
    )
    .set("cleanup.policy", "delete")
    .set("retention.ms", &retention)
    .set("min.insync.replicas", &in_sync)
    .set("compression.type", "producer");
    let options = AdminOptions::new()
        .request_timeout(Some(REQUEST_TIMEOUT))
        .operation_timeout(Some(REQUEST_TIMEOUT));
    let made = admin.create_topics([&topic], &options).await.map_err(classify)?;
    match made.into_iter().next() {
        Some(Err((_, code))) if code != RDKafkaErrorCode::TopicAlreadyExists => {
            Err(classify(KafkaError::AdminOp(code)))
        }
        _ => Ok(()),
    }
}

/// Partitions of the topic, and replicas of the one that has fewest.
async fn layout(
    admin: AdminClient<DefaultClientContext>,
    topic: &str,
) -> Result<(usize, usize), BusError> {
    let name = topic.to_owned();
    // librdkafka has no other than a blocking call for this.
    let fetched = tokio::task::spawn_blocking(move || {
        admin.inner().fetch_metadata(Some(&name), REQUEST_TIMEOUT)
    });
    let metadata = fetched
        .await
        .map_err(|_| BusError::Unavailable(KafkaError::Canceled))?
        .map_err(classify)?;
    let partitions = metadata.topics().first().map(|topic| topic.partitions());
    match partitions {
        Some(partitions) if !partitions.is_empty() => {
            let fewest = partitions.iter().map(|p| p.replicas().len()).min();
            Ok((partitions.len(), fewest.unwrap_or(0)))
        }
        // Just made, and not known everywhere yet.
        _ => Err(BusError::Unavailable(KafkaError::MetadataFetch(
            RDKafkaErrorCode::UnknownTopicOrPartition,
        ))),
    }
}

/// What a partition holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Offset of the first record that is there.
    pub first: i64,
    /// Offset that the next one gets.
    pub end: i64,
    /// Up to where a group has read, if it ever said so. What it has left on the way lies before that:
    /// see [`super::consumer::Place`].
    pub read: Option<i64>,
}

/// Asks what partitions hold and how far a group has got with each, by a client of its own: for rare
/// questions.
///
/// # Errors
/// [`BusError::Unavailable`], also while the topic is not there.
pub async fn extents(
    config: &Kafka,
    group: &str,
    partitions: BTreeSet<i32>,
) -> Result<BTreeMap<i32, Extent>, BusError> {
    let mut settings = client(config, &[])?;
    settings.set("group.id", group);
    let topic = config.topic.clone();
    // librdkafka has no other than blocking calls for this.
    let asked = tokio::task::spawn_blocking(move || {
        let consumer: BaseConsumer = settings.create().map_err(BusError::Broken)?;
        let mut list = TopicPartitionList::with_capacity(partitions.len());
        for &partition in &partitions {
            list.add_partition(&topic, partition);
        }
        let committed = consumer.committed_offsets(list, REQUEST_TIMEOUT).map_err(classify)?;
        let mut extents = BTreeMap::new();
        for partition in partitions {
            let watermarks = consumer.fetch_watermarks(&topic, partition, REQUEST_TIMEOUT);
            let (first, end) = watermarks.map_err(classify)?;
            let committed = committed.find_partition(&topic, partition);
            let read = committed.and_then(|element| match element.offset() {
                Offset::Offset(offset) => Some(element.metadata().parse().unwrap_or(offset)),
                _ => None,
            });
            extents.insert(partition, Extent { first, end, read });
        }
        Ok(extents)
    });
    asked.await.map_err(|_| BusError::Unavailable(KafkaError::Canceled))?
}

fn warnings(config: &Kafka, settings: &ConfigResource, replication: usize) -> Vec<String> {
    let text = |name| settings.get(name).and_then(|entry| entry.value.as_deref());
    let number = |name| text(name).and_then(|value| value.parse::<i64>().ok());
    let topic = &config.topic;
    let mut warnings = Vec::new();
    if text("cleanup.policy").is_some_and(|policy| policy.contains("compact")) {
        warnings.push(format!(
            "topic {topic} has cleanup.policy compact: it keeps one event a lane and loses the others"
        ));
    }
    if let Some(ms @ 0..DAY_MS) = number("retention.ms") {
        warnings.push(format!(
            "topic {topic} has retention.ms {ms}, below a day: a writer that is down for longer loses events"
        ));
    }
    if number("retention.bytes").is_some_and(|bytes| bytes >= 0) {
        warnings.push(format!(
            "topic {topic} has retention.bytes set: a burst can push out events that are not recorded"
        ));
    }
    if replication > 1 && number("min.insync.replicas") == Some(1) {
        warnings.push(format!(
            "topic {topic} has min.insync.replicas 1 with {replication} replicas: the loss of one broker can lose events"
        ));
    }
    if text("unclean.leader.election.enable") == Some("true") {
        warnings.push(format!(
            "topic {topic} has unclean.leader.election.enable: a replica that lacks events may lead"
        ));
    }
    warnings
}

/// What another attempt can cure, and what it cannot.
pub(super) fn classify(error: KafkaError) -> BusError {
    use RDKafkaErrorCode as Code;
    match error.rdkafka_error_code() {
        Some(
            Code::TopicAuthorizationFailed
            | Code::GroupAuthorizationFailed
            | Code::ClusterAuthorizationFailed
            | Code::InvalidTopic
            | Code::InvalidPartitions
            | Code::InvalidConfig
            | Code::PolicyViolation
            | Code::Fatal,
        ) => BusError::Broken(error),
        _ => BusError::Unavailable(error),
    }
}
