//! What a lane's keys hold, read as an operator with `redis-cli` would, past all code of the
//! service.

use std::collections::{BTreeMap, HashMap};

use holdfast::lanes::LaneKeys;
use redis::AsyncCommands;
use redis::aio::MultiplexedConnection;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RawStock {
    pub available: i64,
    pub held: i64,
    pub sold: i64,
    pub version: i64,
    pub limit: Option<i64>,
    pub initial: i64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawOrder {
    /// `h`, `p`, `c`, `r`, `x` or `e`.
    pub status: String,
    pub seq: u64,
    pub created: i64,
    pub expires: i64,
    pub confirmed: Option<i64>,
    pub hold: Option<u32>,
    pub payment: Option<String>,
    pub buyer: String,
    pub lines: Vec<(String, i64)>,
    pub returned: Vec<(String, i64)>,
    /// Units that came back and are not on sale again.
    pub lost: Vec<(String, i64)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawAdjustment {
    pub sku: String,
    pub delta: i64,
    /// Keys, cut out of the ids.
    pub undoes: Option<String>,
    pub undone_by: Option<String>,
}

/// The four keys in which a lane keeps what it promised, and its last seq.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Raw {
    pub seq: u64,
    pub stock: BTreeMap<String, RawStock>,
    /// Units held or bought, by buyer, then SKU.
    pub buyers: BTreeMap<String, BTreeMap<String, i64>>,
    pub orders: BTreeMap<String, RawOrder>,
    pub adjustments: BTreeMap<String, RawAdjustment>,
}

fn optional<T: std::str::FromStr<Err: std::fmt::Debug>>(text: &str) -> Option<T> {
    (!text.is_empty()).then(|| text.parse().unwrap())
}

fn units(text: &str) -> Vec<(String, i64)> {
    let part = |part: &str| {
        let (sku, units) = part.split_once('=').unwrap();
        (sku.to_owned(), units.parse().unwrap())
    };
    text.split(',').filter(|text| !text.is_empty()).map(part).collect()
}

fn stock(record: &str) -> RawStock {
    let f: Vec<_> = record.split(' ').collect();
    assert_eq!(f.len(), 6, "{record}");
    let number = |text: &str| text.parse().unwrap();
    RawStock {
        available: number(f[0]),
        held: number(f[1]),
        sold: number(f[2]),
        version: number(f[3]),
        limit: optional(f[4]),
        initial: number(f[5]),
    }
}

fn order(record: &str) -> RawOrder {
    let f: Vec<_> = record.split(' ').collect();
    assert!(f.len() >= 13, "{record}");
    let mut lost = Vec::new();
    let (mut left, returned) = (units(f[9]), units(f[11]));
    for note in f[12..].iter().filter_map(|note| note.strip_prefix("r:")) {
        let parts: Vec<_> = note.split(':').collect();
        // A return without lines was of all that was left then.
        let lines = if parts[2].is_empty() { left.clone() } else { units(parts[2]) };
        for (sku, count) in &lines {
            let of_sku = left.iter_mut().find(|(known, _)| known == sku).expect("it was bought");
            of_sku.1 -= count;
        }
        if parts[1] == "0" {
            lost.extend(lines);
        }
    }
    RawOrder {
        status: f[0].to_owned(),
        seq: f[1].parse().unwrap(),
        created: f[2].parse().unwrap(),
        expires: f[2].parse::<i64>().unwrap() + f[3].parse::<i64>().unwrap(),
        confirmed: optional(f[4]),
        hold: optional(f[5]),
        payment: optional(f[6]),
        buyer: f[8].to_owned(),
        lines: units(f[9]),
        returned,
        lost,
    }
}

fn adjustment(record: &str) -> RawAdjustment {
    let f: Vec<_> = record.split(' ').collect();
    assert_eq!(f.len(), 15, "{record}");
    let key = |id: &str| id.rsplit_once('.').map(|(id, _)| id[id.len() - 22..].to_owned());
    RawAdjustment {
        sku: f[2].to_owned(),
        delta: f[3].parse().unwrap(),
        undoes: key(f[9]),
        undone_by: key(f[10]),
    }
}

impl Raw {
    pub async fn read(redis: &MultiplexedConnection, keys: &LaneKeys) -> Self {
        let mut redis = redis.clone();
        let [lane, stock_key, buyers, orders, _, _, adjustments] = keys.all() else {
            panic!("a lane has seven keys")
        };
        let mut all = redis::pipe();
        all.atomic().hgetall(stock_key).hgetall(buyers).hgetall(orders).hgetall(adjustments);
        let [stocks, buyers, orders, adjustments]: [HashMap<String, String>; 4] =
            all.query_async(&mut redis).await.unwrap();
        let seq: Option<u64> = redis.hget(lane, "seq").await.unwrap();
        Self {
            seq: seq.unwrap_or(0),
            stock: stocks.into_iter().map(|(sku, r)| (sku, stock(&r))).collect(),
            buyers: buyers.into_iter().map(|(b, r)| (b, units(&r).into_iter().collect())).collect(),
            orders: orders.into_iter().map(|(key, r)| (key, order(&r))).collect(),
            adjustments: adjustments.into_iter().map(|(key, r)| (key, adjustment(&r))).collect(),
        }
    }

    /// Checks what must hold of a lane's keys among themselves, in every state: nothing is sold
    /// that is not there (I1), and each counter is the sum of the orders behind it.
    pub fn check(&self) {
        let mut adjusted = BTreeMap::<_, i64>::new();
        for (key, a) in &self.adjustments {
            *adjusted.entry(&a.sku).or_default() += a.delta;
            if let Some(undone) = &a.undoes {
                let undone = &self.adjustments[undone];
                assert_eq!(undone.undone_by.as_ref(), Some(key), "it knows what undid it");
                assert_eq!((&undone.sku, undone.delta), (&a.sku, -a.delta), "the exact opposite");
            }
            if let Some(by) = &a.undone_by {
                assert_eq!(self.adjustments[by].undoes.as_ref(), Some(key), "once, and by that");
            }
        }
        let mut lost = BTreeMap::<_, i64>::new();
        let (mut held, mut sold) = (BTreeMap::<_, i64>::new(), BTreeMap::<_, i64>::new());
        let mut buyers = BTreeMap::<String, BTreeMap<String, i64>>::new();
        for order in self.orders.values() {
            for (sku, units) in &order.lost {
                *lost.entry(sku).or_default() += units;
            }
            for (sku, units) in &order.lines {
                let sum = match order.status.as_str() {
                    "h" | "p" => &mut held,
                    "c" | "r" => &mut sold,
                    _ => continue,
                };
                let back = order.returned.iter().find(|(back, _)| back == sku);
                let units = units - back.map_or(0, |(_, units)| *units);
                if units == 0 {
                    continue;
                }
                *sum.entry(sku).or_default() += units;
                let buyer = buyers.entry(order.buyer.clone()).or_default();
                *buyer.entry(sku.clone()).or_default() += units;
            }
        }
        for (sku, stock) in &self.stock {
            let total =
                stock.initial + adjusted.get(sku).unwrap_or(&0) - lost.get(sku).unwrap_or(&0);
            assert_eq!(stock.available + stock.held + stock.sold, total, "I1 of {sku}: {stock:?}");
            assert!(stock.available.min(stock.held).min(stock.sold) >= 0, "I1 of {sku}: {stock:?}");
            assert_eq!(stock.held, *held.get(sku).unwrap_or(&0), "what orders hold of {sku}");
            assert_eq!(stock.sold, *sold.get(sku).unwrap_or(&0), "what orders bought of {sku}");
        }
        assert_eq!(self.buyers, buyers, "the buyers' counts are those of their orders");
    }
}

/// Each key of a lane, byte by byte; `None` where there is none.
pub async fn dump(redis: &MultiplexedConnection, keys: &LaneKeys) -> Vec<Option<Vec<u8>>> {
    let mut redis = redis.clone();
    let mut all = Vec::new();
    for key in keys.all() {
        let kind: String = redis::cmd("TYPE").arg(key).query_async(&mut redis).await.unwrap();
        let bytes: Option<Vec<u8>> = match kind.as_str() {
            // `DUMP` shows a hash in the order of its table, which Redis changes by and by.
            "hash" => {
                let fields: BTreeMap<String, String> = redis.hgetall(key).await.unwrap();
                Some(format!("{fields:?}").into_bytes())
            }
            _ => redis::cmd("DUMP").arg(key).query_async(&mut redis).await.unwrap(),
        };
        all.push(bytes);
    }
    all
}
