//! A lane as it is looked at by whoever proves its books: its counters, its orders and its buyers'
//! counts, page by page, each with the seq at which it is so.

use redis::FromRedisValue;

use super::reply::{self, Frozen, ReplyError, bad};
use super::{LaneError, LaneKeys, Lanes};
use crate::domain::ids::{EntityKey, IdSecret, LaneId};
use crate::domain::names::{BuyerId, Sku};
use crate::domain::order::Order;
use crate::domain::stock::Counters;

/// Something that a lane showed, as its event `seq` left it.
#[derive(Debug, Clone)]
pub struct Shown<T> {
    pub epoch: u32,
    pub seq: u64,
    /// The lane's copy of how far it is recorded.
    pub recorded: u64,
    pub what: T,
}

impl<T> Shown<T> {
    fn map<U>(self, read: impl FnOnce(T) -> U) -> Shown<U> {
        let Self { epoch, seq, recorded, what } = self;
        Shown { epoch, seq, recorded, what: read(what) }
    }
}

/// Some of a lane's entries. What is there all the while is on some page, once or more often.
#[derive(Debug, Clone)]
pub struct Page<T> {
    /// Where the next page begins; `None` on the last.
    pub next: Option<String>,
    pub entries: Vec<T>,
}

/// A record that does not fit the script's format: its field, and why.
pub type Unreadable = (String, ReplyError);
/// An order's key, and the order.
pub type OrderEntry = Result<(EntityKey, Order), Unreadable>;
/// A buyer, and the units that count against the limits.
pub type BuyerEntry = Result<(BuyerId, Vec<(Sku, i64)>), Unreadable>;

/// What a lane says of itself, for recovery.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaneState {
    pub epoch: u32,
    /// The seq after which its epoch began.
    pub since: u64,
    pub seq: u64,
    pub logged: u64,
    pub recorded: u64,
    /// Up to where its outbox is gone.
    pub trimmed: u64,
    /// The run of the server that it was opened on; `None` where an older version made it.
    pub run: Option<String>,
    pub frozen: Option<Frozen>,
}

type Reply = (String, String, String, String, Vec<(String, String)>);

impl Lanes {
    /// A lane's state, frozen or not; `None` where Redis has no such lane. It is asked as any caller
    /// asks it first, so one that must be frozen is.
    pub async fn state(&self, lane: &LaneId) -> Result<Option<LaneState>, LaneError> {
        match self.marks(lane).await {
            Ok(_) | Err(LaneError::Frozen(_)) => {}
            Err(LaneError::Missing) => return Ok(None),
            Err(error) => return Err(error),
        }
        let fields = ["epoch", "since", "seq", "logged", "recorded", "trimmed", "run", "frozen"];
        let mut read = redis::cmd("HMGET");
        read.arg(LaneKeys::new(lane).lane()).arg(&fields);
        let value = self.shared.connections.call(&read).await?;
        let values: [Option<String>; 8] = FromRedisValue::from_redis_value(value)
            .map_err(|e| LaneError::Protocol(e.to_string()))?;
        let [Some(epoch), since, seq, logged, recorded, trimmed, run, frozen] = values else {
            return Ok(None);
        };
        let number = |text: Option<String>| {
            let text = text.unwrap_or_else(|| "0".to_owned());
            text.parse::<u64>().map_err(|_| bad(&text))
        };
        let frozen = frozen.filter(|why| !why.is_empty());
        Ok(Some(LaneState {
            epoch: epoch.parse().map_err(|_| bad(&epoch))?,
            since: number(since)?,
            seq: number(seq)?,
            logged: number(logged)?,
            recorded: number(recorded)?,
            trimmed: number(trimmed)?,
            run,
            frozen: frozen.map(|why| why.parse()).transpose()?,
        }))
    }

    /// Where each SKU's units are.
    pub async fn counters(&self, lane: &LaneId) -> Result<Shown<Vec<(Sku, Counters)>>, LaneError> {
        let keys = LaneKeys::new(lane);
        let (shown, pairs) = self.look(&keys, keys.stock(), "all", 0).await?;
        let read = |(sku, value): (String, String)| {
            let sku = sku.parse().map_err(|_| bad(&sku))?;
            Ok((sku, reply::stored_counters(&value)?))
        };
        let what = pairs.into_iter().map(read).collect::<Result<_, ReplyError>>()?;
        Ok(shown.map(|_| what))
    }

    /// About `count` orders; `cursor`: where the page before said that this one begins.
    pub async fn orders_page(
        &self,
        lane: &LaneId,
        secret: &IdSecret,
        cursor: Option<&str>,
        count: usize,
    ) -> Result<Shown<Page<OrderEntry>>, LaneError> {
        let keys = LaneKeys::new(lane);
        let (shown, pairs) = self.look(&keys, keys.orders(), cursor.unwrap_or("0"), count).await?;
        let read = |(field, value): (String, String)| {
            let order = || {
                let key = EntityKey::decode(&field).ok_or_else(|| bad(&field))?;
                Ok((key, reply::order(secret.order_id(lane, key), &value)?))
            };
            order().map_err(|error| (field.clone(), error))
        };
        Ok(page(shown, pairs.into_iter().map(read).collect()))
    }

    /// The same of buyers.
    pub async fn buyers_page(
        &self,
        lane: &LaneId,
        cursor: Option<&str>,
        count: usize,
    ) -> Result<Shown<Page<BuyerEntry>>, LaneError> {
        let keys = LaneKeys::new(lane);
        let (shown, pairs) = self.look(&keys, keys.buyers(), cursor.unwrap_or("0"), count).await?;
        let read = |(field, value): (String, String)| {
            let buyer = || {
                let buyer = field.parse().map_err(|_| bad(&field))?;
                Ok((buyer, reply::units(&value)?))
            };
            buyer().map_err(|error| (field.clone(), error))
        };
        Ok(page(shown, pairs.into_iter().map(read).collect()))
    }

    async fn look(
        &self,
        keys: &LaneKeys,
        hash: &str,
        cursor: &str,
        count: usize,
    ) -> Result<(Shown<String>, Vec<(String, String)>), LaneError> {
        let script = &self.shared.scripts.look;
        let mut call = script.call(&[keys.lane().to_owned(), hash.to_owned()]);
        call.arg(cursor).arg(count);
        let value = self.shared.connections.call_script(script, &call).await?;
        let (epoch, seq, recorded, cursor, pairs): Reply = FromRedisValue::from_redis_value(value)
            .map_err(|e| LaneError::Protocol(e.to_string()))?;
        let shown = Shown {
            epoch: epoch.parse().map_err(|_| bad(&epoch))?,
            seq: seq.parse().map_err(|_| bad(&seq))?,
            recorded: recorded.parse().map_err(|_| bad(&recorded))?,
            what: cursor,
        };
        if shown.epoch == 0 { Err(LaneError::Missing) } else { Ok((shown, pairs)) }
    }
}

fn page<T>(shown: Shown<String>, entries: Vec<T>) -> Shown<Page<T>> {
    shown.map(|cursor| Page { next: (cursor != "0").then_some(cursor), entries })
}
