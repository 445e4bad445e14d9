//! What Kafka loses after it had acknowledged it: the relay finds out and sends it again.

use std::collections::BTreeMap;

use holdfast::bus::topic;
use holdfast::writer::Options;
use prometheus_client::registry::Registry;
use rdkafka::admin::{AdminClient, AdminOptions};
use rdkafka::client::DefaultClientContext;
use rdkafka::{ClientConfig, Offset, TopicPartitionList};

use crate::pipeline::Pipeline;
use crate::support::{metric, until};

/// The partition of the pipeline's lane.
const PARTITION: i32 = 1;

async fn pipeline(name: &str) -> Pipeline {
    let mut pipeline = Pipeline::new(name, 300).await;
    pipeline.config.relay.stall_ms = 300;
    pipeline
}

impl Pipeline {
    fn admin(&self) -> AdminClient<DefaultClientContext> {
        let mut client = ClientConfig::new();
        client.set("bootstrap.servers", &self.stack.kafka.brokers);
        client.create().expect("a client")
    }

    /// Deletes the topic and makes it anew, empty.
    async fn make_topic_anew(&self) {
        let topic = [self.stack.kafka.topic.as_str()];
        let deleted = self.admin().delete_topics(&topic, &AdminOptions::new()).await;
        assert!(deleted.expect("an answer")[0].is_ok());
        until("the topic is made", || async { topic::prepare(&self.stack.kafka).await.is_ok() })
            .await;
    }

    /// Deletes the lane's records up to this offset.
    async fn delete_records(&self, before: Offset) {
        let mut offsets = TopicPartitionList::new();
        let topic = &self.stack.kafka.topic;
        offsets.add_partition_offset(topic, PARTITION, before).expect("an offset");
        let deleted = self.admin().delete_records(&offsets, &AdminOptions::new()).await;
        deleted.expect("deleted");
    }

    async fn until_logged(&self) {
        until("Kafka has all of the lane", || async {
            let marks = self.lanes.marks(&self.lane).await.expect("marks");
            marks.logged == marks.seq
        })
        .await;
    }

    async fn recorded_orders(&self) -> i64 {
        self.stack.number("SELECT count(*) FROM orders").await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_topic_that_is_made_anew_no_longer_has_is_sent_again() {
    let pipeline = pipeline("anew").await;
    let mut registry = Registry::default();
    let relay = pipeline.relay_told(&mut registry);
    pipeline.hold(300).await;
    pipeline.until_logged().await;
    pipeline.make_topic_anew().await;
    let writer = pipeline.stack.writer();
    pipeline.until_recorded().await;
    assert!(metric(&registry, "holdfast_relay_losses_total") >= 1.0);
    // And on it goes.
    pipeline.hold(100).await;
    pipeline.until_recorded().await;
    assert_eq!(pipeline.recorded_orders().await, 400);
    relay.stop().await;
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_is_made_anew_while_orders_come_and_are_recorded_loses_none() {
    let pipeline = pipeline("traffic").await;
    let (relay, writer) = (pipeline.relay(), pipeline.stack.writer());
    pipeline.hold(200).await;
    pipeline.until_recorded().await;
    let selling = async {
        for _ in 0..40 {
            pipeline.hold(50).await;
        }
    };
    tokio::join!(selling, pipeline.make_topic_anew());
    pipeline.until_recorded().await;
    assert_eq!(pipeline.recorded_orders().await, 2_200);
    relay.stop().await;
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn records_that_kafka_deleted_before_they_were_read_are_sent_again() {
    for (name, before) in [("some", Offset::Offset(150)), ("all", Offset::End)] {
        let pipeline = pipeline(name).await;
        let mut registry = Registry::default();
        let relay = pipeline.relay_told(&mut registry);
        pipeline.hold(300).await;
        pipeline.until_logged().await;
        pipeline.delete_records(before).await;
        let writer = pipeline.stack.writer();
        pipeline.until_recorded().await;
        assert_eq!(pipeline.recorded_orders().await, 300);
        assert!(metric(&registry, "holdfast_relay_losses_total") >= 1.0, "{name}");
        relay.stop().await;
        writer.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_kafka_lost_is_sent_again_however_much_lies_behind_it() {
    let pipeline = pipeline("full").await;
    let mut registry = Registry::default();
    let relay = pipeline.relay_told(&mut registry);
    pipeline.hold(300).await;
    pipeline.until_logged().await;
    pipeline.delete_records(Offset::Offset(150)).await;
    let options = pipeline.stack.options();
    let writer = pipeline.stack.writer_with(Options { parked_max: 10, ..options });
    pipeline.until_recorded().await;
    assert_eq!(pipeline.recorded_orders().await, 300);
    assert!(metric(&registry, "holdfast_relay_losses_total") >= 1.0);
    relay.stop().await;
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_only_waits_is_not_sent_again() {
    let pipeline = pipeline("waits").await;
    let mut registry = Registry::default();
    let relay = pipeline.relay_told(&mut registry);
    pipeline.hold(100).await;
    pipeline.until_logged().await;
    let searched = || async { metric(&registry, "holdfast_relay_stalls_total") >= 3.0 };
    until("a writer that is away was noticed", searched).await;
    let lost = || metric(&registry, "holdfast_relay_losses_total");
    assert_eq!(lost(), 0.0, "Kafka has it all");

    // Nor is what a dead letter blocks: it would only be one more.
    let refuse = "ALTER TABLE orders ADD CONSTRAINT poison CHECK (seq <> 40)";
    sqlx::query(refuse).execute(&pipeline.stack.pool).await.expect("a constraint");
    let writer = pipeline.stack.writer();
    until("it is a dead letter", || async { !pipeline.stack.dead_letters().await.is_empty() })
        .await;
    let before = metric(&registry, "holdfast_relay_stalls_total");
    until("the lane was noticed", || async {
        metric(&registry, "holdfast_relay_stalls_total") >= before + 2.0
    })
    .await;
    assert_eq!((lost(), pipeline.stack.dead_letters().await.len()), (0.0, 1));
    relay.stop().await;
    writer.stop().await;
}

/// What the search goes by.
#[tokio::test(flavor = "multi_thread")]
async fn kafka_says_what_it_holds_and_how_far_a_group_has_read() {
    let pipeline = pipeline("extents").await;
    let (relay, writer) = (pipeline.relay(), pipeline.stack.writer());
    pipeline.hold(50).await;
    pipeline.until_recorded().await;
    writer.stop().await;
    relay.stop().await;
    let kafka = &pipeline.stack.kafka;
    let ask = async || -> BTreeMap<i32, topic::Extent> {
        let asked = topic::extents(kafka, &pipeline.stack.group, [0, PARTITION].into()).await;
        asked.expect("an answer")
    };
    let end = 51; // the definition and the orders
    let held = topic::Extent { first: 0, end, read: Some(end) };
    let empty = topic::Extent { first: 0, end: 0, read: None };
    assert_eq!(ask().await, [(0, empty), (PARTITION, held)].into());
    pipeline.delete_records(Offset::Offset(20)).await;
    assert_eq!(ask().await[&PARTITION], topic::Extent { first: 20, ..held });
}
