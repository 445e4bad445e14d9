//! What the three servers say, read raw once nothing moves any more: Redis' hashes, all records of
//! the topic, the tables. Formats are those of `lua/lane/1_read.lua`, `docs/events.md` and
//! `migrations/`; no code of Holdfast's reads them for us.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rdkafka::admin::{AdminClient, AdminOptions};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{Headers, Message};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};
use redis::AsyncCommands;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::PgPool;

use crate::history::{Lines, lines_of, time_of};

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    pub available: i64,
    pub held: i64,
    pub sold: i64,
}

impl Counters {
    pub fn total(self) -> i64 {
        self.available + self.held + self.sold
    }

    pub fn add(&mut self, other: Self) {
        self.available += other.available;
        self.held += other.held;
        self.sold += other.sold;
    }

    pub fn any_below_zero(self) -> bool {
        self.available < 0 || self.held < 0 || self.sold < 0
    }
}

/// An order in Redis.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LiveOrder {
    pub status: String,
    pub seq: i64,
    pub buyer: String,
    pub lines: Lines,
    pub returned: Lines,
    pub payment: Option<String>,
    pub expires_ms: i64,
    /// Payments that it remembers as to be given back.
    pub refunds: BTreeSet<String>,
}

/// A lane in Redis.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Lane {
    pub epoch: i64,
    pub seq: i64,
    /// For good.
    pub is_closed: bool,
    pub stock: BTreeMap<String, Counters>,
    /// By the 22 characters of their ids that name them here.
    pub orders: BTreeMap<String, LiveOrder>,
    pub buyers: BTreeMap<String, Lines>,
}

/// A record of the topic.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    pub partition: i32,
    pub offset: i64,
    pub kind: String,
    pub epoch: i64,
    pub seq: i64,
    pub at_ms: i64,
    pub data: Value,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct OrderRow {
    pub id: String,
    pub buyer: String,
    pub status: String,
    pub lines: Lines,
    pub returned: Lines,
    pub payment: Option<String>,
    pub expires_ms: i64,
    pub seq: i64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LedgerRow {
    pub epoch: i64,
    pub seq: i64,
    pub line: i64,
    pub event: String,
    pub order: Option<String>,
    pub sku: Option<String>,
    pub moved: Counters,
    pub at_ms: i64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CounterRow {
    pub total: i64,
    pub counters: Counters,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DeadLetter {
    pub reason: String,
    pub status: String,
    /// Of its record in the topic.
    pub partition: i32,
    pub offset: i64,
    pub epoch: Option<i64>,
    pub seq: Option<i64>,
}

/// A change of a total.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdjustmentRow {
    pub sku: String,
    pub delta: i64,
    /// The total that was asked for, where that was it.
    pub set_total: Option<i64>,
    /// Of which it is the opposite.
    pub undoes: Option<String>,
}

/// A payment to give back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefundRow {
    pub id: String,
    pub order: String,
    pub payment: String,
    /// Given back.
    pub settled_ms: Option<i64>,
}

/// A lane that was opened anew, or could not be.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Rebuild {
    pub outcome: String,
    pub why: String,
    /// Where the lane in Redis stood, if it was there.
    pub seq_before: Option<i64>,
    /// Orders that were answered and are nowhere any more.
    pub lost_orders: Vec<String>,
    /// ... and events, at most.
    pub lost_max: i64,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Database {
    pub recorded: i64,
    pub epoch: i64,
    pub partition: i32,
    pub orders: Vec<OrderRow>,
    pub ledger: Vec<LedgerRow>,
    pub counters: BTreeMap<String, CounterRow>,
    pub refunds: Vec<RefundRow>,
    /// By their ids.
    pub adjustments: BTreeMap<String, AdjustmentRow>,
    pub dead_letters: Vec<DeadLetter>,
    pub parked: i64,
    /// In the order of their end.
    pub rebuilds: Vec<Rebuild>,
}

/// What the topic has of a sale.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Topic {
    pub records: Vec<Record>,
    /// Records that do not say what every record must: where, and what is wrong.
    pub unreadable: Vec<String>,
}

/// All that the servers say of one sale of one lane.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Books {
    pub lane: Lane,
    pub topic: Topic,
    pub database: Database,
}

/// The record that ends a lane's older epochs.
pub const SEALED: &str = "lane.sealed";

/// Where a sale's lane keeps something in Redis.
pub fn lane_key(sale: &str, what: &str) -> String {
    format!("hf1:{{{sale}/0}}:{what}")
}

/// How an order is named in Redis: the 22 characters of its id before the dot.
pub fn key_of(order: &str) -> &str {
    let head = order.split('.').next().unwrap_or_default();
    head.get(head.len().saturating_sub(22)..).unwrap_or_default()
}

/// `sku=units,sku=units`
fn words_to_lines(words: &str) -> anyhow::Result<Lines> {
    let parts = words.split(',').filter(|part| !part.is_empty());
    parts
        .map(|part| {
            let (sku, units) = part.split_once('=').with_context(|| part.to_owned())?;
            Ok((sku.to_owned(), units.parse()?))
        })
        .collect()
}

fn live_order(record: &str) -> anyhow::Result<LiveOrder> {
    let words: Vec<_> = record.splitn(13, ' ').collect();
    let [status, seq, created, lasts, _, _, payment, _, buyer, lines, _, returned, notes] =
        words[..]
    else {
        bail!("the record of an order cannot be read: {record}");
    };
    let status = match status {
        "h" => "held",
        "p" => "paying",
        "c" => "confirmed",
        "r" => "returned",
        "x" => "cancelled",
        "e" => "expired",
        other => bail!("no such status: {other}"),
    };
    let refunds = notes.split(' ').filter_map(|note| {
        let (why, payment) = note.split_once(':')?;
        ["l", "x", "a", "m"].contains(&why).then(|| payment.to_owned())
    });
    Ok(LiveOrder {
        status: status.to_owned(),
        seq: seq.parse()?,
        buyer: buyer.to_owned(),
        lines: words_to_lines(lines)?,
        returned: words_to_lines(returned)?,
        payment: (!payment.is_empty()).then(|| payment.to_owned()),
        expires_ms: created.parse::<i64>()? + lasts.parse::<i64>()?,
        refunds: refunds.collect(),
    })
}

pub async fn lane(url: &str, sale: &str) -> anyhow::Result<Lane> {
    let mut redis = redis::Client::open(url)?.get_multiplexed_async_connection().await?;
    let own: HashMap<String, String> = redis.hgetall(lane_key(sale, "lane")).await?;
    let number = |field: &str| {
        let value = own.get(field).with_context(|| format!("the lane has no {field}"))?;
        value.parse::<i64>().with_context(|| format!("{field} of the lane is {value}"))
    };
    let (epoch, seq) = (number("epoch")?, number("seq")?);
    let is_closed = own.get("closed").is_some_and(|at| !at.is_empty());
    let mut lane = Lane { epoch, seq, is_closed, ..Lane::default() };
    let stock: HashMap<String, String> = redis.hgetall(lane_key(sale, "stock")).await?;
    for (sku, words) in stock {
        let numbers = words.split(' ').take(3).map(str::parse::<i64>);
        let [available, held, sold] = numbers.collect::<Result<Vec<_>, _>>()?[..] else {
            bail!("the counters of {sku} cannot be read: {words}");
        };
        lane.stock.insert(sku, Counters { available, held, sold });
    }
    let orders: HashMap<String, String> = redis.hgetall(lane_key(sale, "orders")).await?;
    for (key, record) in orders {
        lane.orders.insert(key, live_order(&record)?);
    }
    let buyers: HashMap<String, String> = redis.hgetall(lane_key(sale, "buyers")).await?;
    for (buyer, words) in buyers {
        lane.buyers.insert(buyer, words_to_lines(&words)?);
    }
    Ok(lane)
}

/// How long the topic may take to be read.
const READING_MAX: Duration = Duration::from_secs(60);

/// One record, from its headers and its payload; `None`: it is of another sale.
fn record_of(
    (partition, offset): (i32, i64),
    headers: &HashMap<&str, &[u8]>,
    payload: &[u8],
    sale: &str,
) -> anyhow::Result<Option<Record>> {
    let head = |name: &str| {
        let value = headers.get(name).with_context(|| format!("it has no {name}"))?;
        std::str::from_utf8(value).with_context(|| format!("{name} is no text"))
    };
    let number = |name: &str| {
        let value = head(name)?;
        value.parse::<i64>().with_context(|| format!("{name} is {value:?}"))
    };
    if head("ce_saleid")? != sale {
        return Ok(None);
    }
    let kind = head("ce_type")?;
    let kind = kind.strip_prefix("holdfast.").with_context(|| format!("ce_type is {kind:?}"))?;
    let time = head("ce_time")?;
    Ok(Some(Record {
        partition,
        offset,
        kind: kind.to_owned(),
        epoch: number("ce_epoch")?,
        // The seal of an epoch has none: it is no event of the lane's own.
        seq: if kind == SEALED { 0 } else { number("ce_seq")? },
        at_ms: time_of(&Value::from(time)).with_context(|| format!("ce_time is {time:?}"))?,
        data: serde_json::from_slice(payload).context("its payload is no JSON")?,
    }))
}

/// Every record of the topic that says it is of this sale, from its beginning to its end of now.
/// Blocks.
pub fn topic(brokers: &str, topic: &str, sale: &str) -> anyhow::Result<Topic> {
    let deadline = Instant::now() + READING_MAX;
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", "holdfast-drills-checker")
        .set("enable.auto.commit", "false")
        .create()?;
    let metadata = consumer.fetch_metadata(Some(topic), Duration::from_secs(10))?;
    let mut left = HashMap::new();
    let mut from = TopicPartitionList::new();
    for partition in metadata.topics().iter().flat_map(|topic| topic.partitions()) {
        let (low, high) =
            consumer.fetch_watermarks(topic, partition.id(), Duration::from_secs(10))?;
        if low < high {
            left.insert(partition.id(), high);
            from.add_partition_offset(topic, partition.id(), Offset::Offset(low))?;
        }
    }
    consumer.assign(&from)?;
    let mut found = Topic::default();
    while !left.is_empty() {
        if Instant::now() > deadline {
            bail!("the topic could not be read to its end in {READING_MAX:?}: {left:?}");
        }
        let Some(message) = consumer.poll(Duration::from_millis(200)) else { continue };
        let message = message?;
        let (partition, offset) = (message.partition(), message.offset());
        if left.get(&partition).is_some_and(|high| offset + 1 >= *high) {
            left.remove(&partition);
        }
        let headers = message.headers().into_iter().flat_map(|headers| headers.iter());
        let headers = headers.filter_map(|header| Some((header.key, header.value?)));
        let headers: HashMap<_, _> = headers.collect();
        let payload = message.payload().unwrap_or_default();
        match record_of((partition, offset), &headers, payload, sale) {
            Ok(record) => found.records.extend(record),
            Err(error) => found.unreadable.push(format!("{partition}/{offset}: {error:#}")),
        }
    }
    Ok(found)
}

/// Deletes every record that the topic has now; how many.
pub async fn delete_records(brokers: &str, topic: &str) -> anyhow::Result<i64> {
    let mut settings = ClientConfig::new();
    settings.set("bootstrap.servers", brokers).set("group.id", "holdfast-drills");
    let consumer: BaseConsumer = settings.create()?;
    let metadata = consumer.fetch_metadata(Some(topic), Duration::from_secs(10))?;
    let (mut count, mut upto) = (0, TopicPartitionList::new());
    for partition in metadata.topics().iter().flat_map(|topic| topic.partitions()) {
        let (low, high) =
            consumer.fetch_watermarks(topic, partition.id(), Duration::from_secs(10))?;
        if low < high {
            count += high - low;
            upto.add_partition_offset(topic, partition.id(), Offset::Offset(high))?;
        }
    }
    let admin: AdminClient<DefaultClientContext> = settings.create()?;
    admin.delete_records(&upto, &AdminOptions::new()).await?;
    Ok(count)
}

fn milliseconds(column: &str) -> String {
    format!("(extract(epoch FROM {column}) * 1000)::bigint")
}

pub async fn database(pool: &PgPool, sale: &str) -> anyhow::Result<Database> {
    let mut books = Database::default();
    let lane: (i32, i64, i64) =
        sqlx::query_as("SELECT partition, epoch, recorded FROM lanes WHERE sale_id = $1")
            .bind(sale)
            .fetch_one(pool)
            .await?;
    (books.partition, books.epoch, books.recorded) = lane;

    type Order = (String, Option<String>, String, Value, Value, Option<String>, i64, i64);
    let query = format!(
        "SELECT id, buyer_id, status, lines, returned, payment_id, {}, seq
         FROM orders WHERE sale_id = $1 ORDER BY id",
        milliseconds("expires_at")
    );
    let rows: Vec<Order> =
        sqlx::query_as(sqlx::AssertSqlSafe(query)).bind(sale).fetch_all(pool).await?;
    let rows =
        rows.into_iter().map(|(id, buyer, status, lines, returned, payment, expires_ms, seq)| {
            OrderRow {
                id,
                buyer: buyer.unwrap_or_default(),
                status,
                lines: lines_of(&lines),
                returned: lines_of(&returned),
                payment,
                expires_ms,
                seq,
            }
        });
    books.orders = rows.collect();

    type Entry = (i64, i64, i16, String, Option<String>, Option<String>, i64, i64, i64, i64);
    let query = format!(
        "SELECT epoch, seq, line, event, order_id, sku, available, held, sold, {}
         FROM ledger WHERE sale_id = $1 ORDER BY seq, line",
        milliseconds("at")
    );
    let rows: Vec<Entry> =
        sqlx::query_as(sqlx::AssertSqlSafe(query)).bind(sale).fetch_all(pool).await?;
    let rows = rows.into_iter().map(
        |(epoch, seq, line, event, order, sku, available, held, sold, at_ms)| LedgerRow {
            epoch,
            seq,
            line: line.into(),
            event: event.rsplit('.').next().unwrap_or_default().to_owned(),
            order,
            sku,
            moved: Counters { available, held, sold },
            at_ms,
        },
    );
    books.ledger = rows.collect();

    let rows: Vec<(String, i64, i64, i64, i64)> =
        sqlx::query_as("SELECT sku, total, available, held, sold FROM counters WHERE sale_id = $1")
            .bind(sale)
            .fetch_all(pool)
            .await?;
    let rows = rows.into_iter().map(|(sku, total, available, held, sold)| {
        (sku, CounterRow { total, counters: Counters { available, held, sold } })
    });
    books.counters = rows.collect();
    let query = format!(
        "SELECT id, order_id, payment_id, {} FROM refunds WHERE sale_id = $1 ORDER BY id",
        milliseconds("settled_at")
    );
    let rows: Vec<(String, String, String, Option<i64>)> =
        sqlx::query_as(sqlx::AssertSqlSafe(query)).bind(sale).fetch_all(pool).await?;
    let rows = rows.into_iter().map(|(id, order, payment, settled_ms)| RefundRow {
        id,
        order,
        payment,
        settled_ms,
    });
    books.refunds = rows.collect();
    type Adjustment = (String, String, i64, Option<i64>, Option<String>);
    let rows: Vec<Adjustment> = sqlx::query_as(
        "SELECT id, sku, delta, set_total, undoes FROM adjustments WHERE sale_id = $1",
    )
    .bind(sale)
    .fetch_all(pool)
    .await?;
    let rows = rows.into_iter().map(|(id, sku, delta, set_total, undoes)| {
        (id, AdjustmentRow { sku, delta, set_total, undoes })
    });
    books.adjustments = rows.collect();
    type Letter = (String, String, i32, i64, Option<i64>, Option<i64>);
    let rows: Vec<Letter> = sqlx::query_as(
        "SELECT reason, status, partition, record_offset, epoch, seq FROM dead_letters ORDER BY id",
    )
    .fetch_all(pool)
    .await?;
    let rows = rows.into_iter().map(|(reason, status, partition, offset, epoch, seq)| DeadLetter {
        reason,
        status,
        partition,
        offset,
        epoch,
        seq,
    });
    books.dead_letters = rows.collect();
    books.parked = sqlx::query_scalar("SELECT count(*) FROM parked").fetch_one(pool).await?;
    books.rebuilds = rebuilds(pool, sale).await?;
    Ok(books)
}

pub async fn rebuilds(pool: &PgPool, sale: &str) -> anyhow::Result<Vec<Rebuild>> {
    type Row = (String, String, Option<i64>, Vec<String>, i64);
    let rows: Vec<Row> = sqlx::query_as(
        "SELECT outcome, why, seq_before, lost_orders, lost_max
         FROM rebuilds WHERE sale_id = $1 ORDER BY id",
    )
    .bind(sale)
    .fetch_all(pool)
    .await?;
    let rows = rows.into_iter().map(|(outcome, why, seq_before, lost_orders, lost_max)| Rebuild {
        outcome,
        why,
        seq_before,
        lost_orders,
        lost_max,
    });
    Ok(rows.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_is_read_as_the_lane_writes_it() {
        let record = "c 17 1000 3000 2500  pay-1 1 u-1 a=2,b=1 a=3,b=1 a=1 l:pay-0 r:key:1:a=1";
        let order = live_order(record).expect("it can be read");
        assert_eq!((order.status.as_str(), order.seq, order.expires_ms), ("confirmed", 17, 4000));
        assert_eq!(order.payment.as_deref(), Some("pay-1"));
        assert_eq!(order.lines, [("a".into(), 2), ("b".into(), 1)].into());
        assert_eq!(order.returned, [("a".into(), 1)].into());
        assert_eq!(order.refunds, ["pay-0".to_owned()].into());
        assert!(live_order("c 17").is_err());
    }

    #[test]
    fn a_record_that_lacks_a_header_is_none() {
        let good: [(&str, &[u8]); 5] = [
            ("ce_saleid", b"sale"),
            ("ce_type", b"holdfast.order.held"),
            ("ce_epoch", b"1"),
            ("ce_seq", b"7"),
            ("ce_time", b"2026-11-11T00:00:00.000Z"),
        ];
        let read = |headers: &HashMap<&str, &[u8]>, payload: &[u8]| {
            record_of((0, 0), headers, payload, "sale")
        };
        let headers = HashMap::from(good);
        let record = read(&headers, b"{}").expect("it can be read").expect("of this sale");
        assert_eq!((record.kind.as_str(), record.epoch, record.seq), ("order.held", 1, 7));
        for (name, _) in good {
            let mut headers = HashMap::from(good);
            headers.remove(name);
            assert!(read(&headers, b"{}").is_err(), "without {name}");
            headers.insert(name, b"\xff");
            assert!(read(&headers, b"{}").is_err(), "no text in {name}");
            headers.insert(name, b"");
            assert!(name == "ce_saleid" || read(&headers, b"{}").is_err(), "nothing in {name}");
        }
        assert!(read(&headers, b"{").is_err());
        let mut seal = HashMap::from(good);
        seal.remove("ce_seq");
        seal.insert("ce_type", b"holdfast.lane.sealed");
        assert!(read(&seal, b"{}").is_ok());
        let mut other = HashMap::from(good);
        other.insert("ce_saleid", b"other");
        assert_eq!(read(&other, b"{}").expect("it can be read"), None);
    }

    #[test]
    fn an_orders_name_in_redis_is_cut_out_of_its_id() {
        let id = "ord_AQD5gY-unMt95Y2HPgu12lC-4WYFp2M3HN8UFg.double.11";
        assert_eq!(key_of(id), "Pgu12lC-4WYFp2M3HN8UFg");
    }
}
