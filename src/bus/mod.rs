//! The Kafka side: the topic, what its records look like, and how they are written and read.

pub mod consumer;
pub mod producer;
pub mod record;
pub mod topic;

use rdkafka::ClientConfig;

use crate::config::Kafka;

/// What Kafka could not do.
#[derive(Debug, thiserror::Error)]
pub enum BusError {
    /// Away or slow: the same call can succeed later.
    #[error("Kafka is not available: {0}")]
    Unavailable(rdkafka::error::KafkaError),
    /// Somebody has to look: a wrong setting, a missing right.
    #[error("Kafka cannot do this: {0}")]
    Broken(rdkafka::error::KafkaError),
    #[error("kafka.{name}: {detail}")]
    Setting { name: String, detail: String },
}

/// What `kafka.properties` may not change, and where else it is set or why it must stay.
const FIXED: [(&str, &str); 9] = [
    ("bootstrap.servers", "is kafka.brokers"),
    ("metadata.broker.list", "is kafka.brokers"),
    ("group.id", "is writer.group"),
    ("acks", "must stay all: an event that a leader alone has can be lost"),
    ("request.required.acks", "must stay all: an event that a leader alone has can be lost"),
    ("enable.idempotence", "must stay true: a retry would repeat and reorder events"),
    ("enable.auto.commit", "must stay false: offsets follow the database"),
    ("enable.auto.offset.store", "must stay false: offsets follow the database"),
    ("auto.offset.reset", "must stay earliest: a group without offsets would skip events"),
];

/// The connection's settings: ours where nothing else is said, then the operator's.
///
/// # Errors
/// [`BusError::Setting`] for a setting that keeps events safe.
fn client(config: &Kafka, ours: &[(&str, &str)]) -> Result<ClientConfig, BusError> {
    let mut client = ClientConfig::new();
    client.set("bootstrap.servers", &config.brokers).set("client.id", "holdfast");
    // A topic that a question creates would have one partition; `topic` makes it as it must be.
    client.set("allow.auto.create.topics", "false");
    // A broker that comes back may answer at first as if it had no topics. By default librdkafka
    // believes that for five minutes.
    client.set("topic.metadata.refresh.interval.ms", "5000");
    for (name, value) in ours {
        client.set(*name, *value);
    }
    for (name, value) in &config.properties {
        let canonical = name.to_ascii_lowercase();
        if let Some((_, detail)) = FIXED.iter().find(|(fixed, _)| *fixed == canonical) {
            let (name, detail) = (format!("properties.{name}"), (*detail).to_owned());
            return Err(BusError::Setting { name, detail });
        }
        client.set(name, value);
    }
    Ok(client)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(name: &str, value: &str) -> Result<ClientConfig, BusError> {
        let config = Kafka {
            brokers: "localhost:1".into(),
            topic: "t".into(),
            partitions: 1,
            replication: 1,
            properties: [(name.to_owned(), value.to_owned())].into(),
        };
        client(&config, &[("linger.ms", "5")])
    }

    #[test]
    fn what_keeps_events_safe_cannot_be_set_and_is_named() {
        for name in ["acks", "Acks", "enable.idempotence", "enable.auto.commit"] {
            let error = with(name, "0").unwrap_err().to_string();
            assert!(error.contains(&format!("kafka.properties.{name}")), "{error}");
        }
    }

    #[test]
    fn anything_else_can() {
        assert_eq!(with("linger.ms", "9").unwrap().get("linger.ms"), Some("9"));
        assert_eq!(with("sasl.username", "u").unwrap().get("linger.ms"), Some("5"));
    }
}
