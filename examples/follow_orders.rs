//! Prints a line for each thing that happens to an order: a consumer of the events in Kafka, to
//! begin your own with. All that it knows of Holdfast is in `docs/events.md`.
//!
//! ```sh
//! cargo run --example follow_orders -- BROKERS [TOPIC [GROUP]]
//! ```
//!
//! Ctrl-C ends it; the next run of the same group goes on from there.

use std::collections::{BTreeMap, HashMap};
use std::error::Error;
use std::io::Write as _;
use std::pin::pin;
use std::sync::Mutex;
use std::time::Duration;

use rdkafka::client::ClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer as _, ConsumerContext, Rebalance, StreamConsumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedMessage, Headers as _, Message as _};
use serde_json::Value;

const TOPIC: &str = "holdfast.events";
const GROUP: &str = "follow-orders";
/// What comes between the epochs of a lane.
const SEALED: &str = "holdfast.lane.sealed";
/// Events of one lane that wait for a missing one. A gap is closed by what is sent again, soon; one
/// that stays means that the topic has lost events, and going on without them would hide it.
const WAITING_MAX: usize = 10_000;
/// How long one wait for a record lasts before it is begun anew, should a wake-up get lost.
const WAIT_MAX: Duration = Duration::from_millis(500);

/// An event, as its headers say; its body is read once its turn has come.
struct Event {
    kind: String,
    /// `<sale>/<lane>/<epoch>-<seq>`
    id: String,
    time: String,
    /// `<sale>/<lane>`
    lane: String,
    epoch: u64,
    /// 0 of a seal, which is none of its lane's events.
    seq: u64,
    body: Vec<u8>,
}

impl Event {
    /// Reads a record as a CloudEvent of the Kafka binding's binary mode. Headers that it does not
    /// know are ignored.
    fn decode(message: &BorrowedMessage<'_>) -> Result<Self, String> {
        let header = |name: &str| {
            let mut headers = message.headers().into_iter().flat_map(|headers| headers.iter());
            let value = headers.find(|header| header.key == name).and_then(|header| header.value);
            let text = value.and_then(|value| std::str::from_utf8(value).ok());
            text.ok_or_else(|| format!("{name} is missing or not text"))
        };
        let number =
            |name: &str| header(name)?.parse::<u64>().map_err(|error| format!("{name}: {error}"));
        if header("ce_specversion")? != "1.0" {
            return Err("it is no CloudEvent 1.0".to_owned());
        }
        let kind = header("ce_type")?;
        Ok(Self {
            kind: kind.to_owned(),
            id: header("ce_id")?.to_owned(),
            time: header("ce_time")?.to_owned(),
            lane: format!("{}/{}", header("ce_saleid")?, header("ce_lane")?),
            epoch: number("ce_epoch")?,
            seq: if kind == SEALED { 0 } else { number("ce_seq")? },
            body: message.payload().unwrap_or_default().to_vec(),
        })
    }

    /// What became of an order, in a line; `None` where the event is of something else. Types and
    /// members that later versions add are ignored.
    fn line(&self) -> Result<Option<String>, serde_json::Error> {
        let Some(step) = self.kind.strip_prefix("holdfast.order.") else { return Ok(None) };
        let body: Value = serde_json::from_slice(&self.body)?;
        let order = &body["order"];
        let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
        let mut line = format!("{} {} {step}", self.time, self.id);
        for member in ["id", "buyer_id"] {
            line = format!("{line} {}", text(&order[member]));
        }
        for bought in order["lines"].as_array().into_iter().flatten() {
            line = format!("{line} {}x{}", bought["quantity"], text(&bought["sku"]));
        }
        Ok(Some(line))
    }
}

/// How far the events of one lane are dealt with.
///
/// Here it is in memory, so what is sent again across a restart is printed again, and a gap that
/// was open then is not seen. A consumer whose work must count once stores `epoch` and `done` by
/// lane, **in the transaction that stores what it did about the event**, and reads them when it is
/// given the lane's partition. They decide; Kafka's offsets only say where to begin to read.
struct Lane<T> {
    epoch: u64,
    /// The highest seq that was dealt with, and all before it.
    done: u64,
    /// By seq: what came before its turn.
    waiting: BTreeMap<u64, T>,
}

impl<T> Lane<T> {
    /// A lane of which nothing is known begins with the first event that is seen of it: the topic
    /// forgets what came earlier, after some days.
    fn beginning_with(epoch: u64, seq: u64) -> Self {
        Self { epoch, done: seq.saturating_sub(1), waiting: BTreeMap::new() }
    }

    /// Takes what came from the topic; returns that whose turn has come, in its order.
    fn take(&mut self, epoch: u64, seq: u64, event: T) -> Vec<T> {
        if epoch > self.epoch {
            // The lane was opened anew after a loss: what still waits for older events is lost.
            self.epoch = epoch;
            self.waiting.clear();
        }
        // Seen before, or an echo of what an older epoch has lost.
        if seq <= self.done || epoch < self.epoch {
            return Vec::new();
        }
        self.waiting.insert(seq, event);
        let mut due = Vec::new();
        while let Some(event) = self.waiting.remove(&(self.done + 1)) {
            self.done += 1;
            due.push(event);
        }
        due
    }
}

/// The lanes of each partition that this member of the group reads.
#[derive(Default)]
struct Progress(Mutex<HashMap<i32, Lanes>>);

/// By `<sale>/<lane>`.
type Lanes = HashMap<String, Lane<Event>>;

impl ClientContext for Progress {}

impl ConsumerContext for Progress {
    /// Another member goes on with these partitions: what is known of them here grows old.
    fn post_rebalance(&self, _: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        if let Rebalance::Revoke(taken) = rebalance {
            let mut partitions = self.0.lock().expect("no panic while it is locked");
            for element in taken.elements() {
                partitions.remove(&element.partition());
            }
        }
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let usage = "usage: follow_orders BROKERS [TOPIC [GROUP]]";
    let brokers = arguments.next().ok_or(usage)?;
    let topic = arguments.next().unwrap_or_else(|| TOPIC.to_owned());
    let group = arguments.next().unwrap_or_else(|| GROUP.to_owned());

    let consumer: StreamConsumer<Progress> = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", group)
        .set("auto.offset.reset", "earliest") // a new group begins with the oldest event
        .set("enable.auto.offset.store", "false") // what is committed is what was dealt with
        .create_with_context(Progress::default())?;
    consumer.subscribe(&[&topic])?;
    eprintln!("following {topic}; Ctrl-C ends it");

    let mut stop = pin!(tokio::signal::ctrl_c());
    let mut last_error = None;
    loop {
        let received = tokio::select! {
            stopped = &mut stop => return Ok(stopped?),
            received = tokio::time::timeout(WAIT_MAX, consumer.recv()) => received,
        };
        match received {
            Ok(Ok(message)) => deal_with(&consumer, &message)?,
            Ok(Err(error @ KafkaError::MessageConsumptionFatal(_))) => return Err(error.into()),
            // The client goes on by itself; while Kafka is away it says so many times a second.
            Ok(Err(error)) if last_error.as_ref() == Some(&error) => {}
            Ok(Err(error)) => {
                eprintln!("Kafka: {error}");
                last_error = Some(error);
            }
            Err(_nothing_came) => {}
        }
    }
}

fn deal_with(
    consumer: &StreamConsumer<Progress>,
    message: &BorrowedMessage<'_>,
) -> Result<(), Box<dyn Error>> {
    let mut partitions = consumer.context().0.lock().expect("no panic while it is locked");
    let lanes = partitions.entry(message.partition()).or_default();
    match Event::decode(message) {
        Ok(event) => follow(lanes, event)?,
        // Nothing of Holdfast's, so nothing that somebody waits for.
        Err(why) => eprintln!("{}@{}: {why}", message.partition(), message.offset()),
    }
    // What waits is in memory only: until its turn has come, a restart must read it again.
    if lanes.values().all(|lane| lane.waiting.is_empty()) {
        consumer.store_offset_from_message(message)?;
    }
    Ok(())
}

/// Deals with an event and those that waited for it.
fn follow(lanes: &mut Lanes, event: Event) -> Result<(), Box<dyn Error>> {
    let (name, epoch, seq) = (event.lane.clone(), event.epoch, event.seq);
    if event.kind == SEALED && !lanes.contains_key(&name) {
        return Ok(()); // it says nothing about where its lane stands
    }
    let lane = lanes.entry(name.clone()).or_insert_with(|| Lane::beginning_with(epoch, seq));
    for event in lane.take(epoch, seq, event) {
        // Your work goes here, and `done` is stored with what comes of it.
        match event.line() {
            Ok(Some(line)) => writeln!(std::io::stdout(), "{line}")?,
            Ok(None) => {}
            Err(error) => eprintln!("{}: the body cannot be read: {error}", event.id),
        }
    }
    if lane.waiting.len() > WAITING_MAX {
        let missing = lane.done + 1;
        return Err(format!("{name}: seq {missing} never came, but {seq} did").into());
    }
    Ok(())
}
