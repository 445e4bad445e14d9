//! The steps by which a frozen lane is opened anew (`lua/recover.lua`), and the records that a lane is
//! written from: the opposite of what [`super::reply`] reads.

use std::collections::BTreeMap;

use redis::FromRedisValue;

use super::command::{encode_lines, optional, word};
use super::reply::Frozen;
use super::{LaneError, LaneKeys, Lanes};
use crate::domain::event::RebuildToken;
use crate::domain::ids::{EntityKey, LaneId};
use crate::domain::names::Sku;
use crate::domain::order::{Line, Order, RefundReason, Status};
use crate::domain::stock::{Adjustment, Counters};

/// Who opens a lane anew: the epoch that was taken for it, and the token that goes with that.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    pub lane: LaneId,
    pub epoch: u32,
    pub token: RebuildToken,
}

/// A lane as it was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    pub is_there: bool,
    /// Why it is frozen, where it is.
    pub frozen: Option<Frozen>,
    pub epoch: u32,
    pub seq: u64,
}

impl Found {
    pub fn is_open(&self) -> bool {
        self.is_there && self.frozen.is_none()
    }

    /// Why it is not open, in a word.
    pub fn why(&self) -> &'static str {
        match self.frozen {
            _ if !self.is_there => MISSING,
            Some(why) => why.as_str(),
            None => "open",
        }
    }
}

/// What came of a claim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Claimed {
    /// The lane is frozen, and this claim's until a later one comes.
    Ours(Found),
    /// The lane is open.
    Open,
    /// A later claim is there.
    Lost,
}

/// What of a lane is written; its number is that of its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    Lane = 1,
    Stock = 2,
    Buyers = 3,
    Orders = 4,
    Deadlines = 5,
    Adjustments = 7,
}

impl Part {
    /// The command that takes pairs of words.
    const fn command(self) -> &'static str {
        match self {
            Self::Deadlines => "ZADD",
            _ => "HSET",
        }
    }
}

/// As the script says of a lane that is not there.
const MISSING: &str = "missing";

type Reply = (String, String, String, String);

impl Lanes {
    /// Whether the lane is there, and frozen.
    pub async fn find(&self, lane: &LaneId) -> Result<Found, LaneError> {
        let mut call = redis::cmd("HMGET");
        call.arg(LaneKeys::new(lane).lane()).arg("frozen").arg("epoch").arg("seq");
        let value = self.shared.connections.call(&call).await?;
        let (why, epoch, seq): (Option<String>, Option<String>, Option<String>) =
            FromRedisValue::from_redis_value(value)
                .map_err(|e| LaneError::Protocol(e.to_string()))?;
        let why = if epoch.is_some() { why.unwrap_or_default() } else { MISSING.to_owned() };
        found(&why, &epoch.unwrap_or_default(), &seq.unwrap_or_default())
    }

    /// Claims the lane for whoever has taken its next epoch. With `freeze`, one that is open is frozen.
    pub async fn claim(&self, claim: &Claim, freeze: bool) -> Result<Claimed, LaneError> {
        let (outcome, why, epoch, seq) = self.recover(claim, "claim", &[flag(freeze)]).await?;
        match outcome.as_str() {
            "ok" => Ok(Claimed::Ours(found(&why, &epoch, &seq)?)),
            "open" => Ok(Claimed::Open),
            "lost" => Ok(Claimed::Lost),
            other => Err(LaneError::Protocol(other.to_owned())),
        }
    }

    /// Empties a claimed lane; false, as with all that follows, where the claim is lost.
    pub async fn clear(&self, claim: &Claim) -> Result<bool, LaneError> {
        self.step(claim, "clear", &[]).await
    }

    /// Writes pairs of words into a cleared lane: fields and values, or due times and keys.
    pub async fn write(
        &self,
        claim: &Claim,
        part: Part,
        pairs: &[(String, String)],
    ) -> Result<bool, LaneError> {
        let mut words = vec![(part as u8).to_string(), part.command().to_owned()];
        words.extend(pairs.iter().flat_map(|(one, two)| [one.clone(), two.clone()]));
        self.step(claim, "write", &words).await
    }

    /// Opens a claimed lane under its claim's epoch, where it stands at event `seq`.
    pub async fn open(&self, claim: &Claim, seq: u64) -> Result<bool, LaneError> {
        self.step(claim, "open", &[seq.to_string()]).await
    }

    /// How many orders, deadlines and adjustments the lane has.
    pub async fn sizes(&self, lane: &LaneId) -> Result<[usize; 3], LaneError> {
        let keys = LaneKeys::new(lane);
        let mut sizes = [0; 3];
        let counted =
            [("HLEN", keys.orders()), ("ZCARD", keys.deadlines()), ("HLEN", keys.adjustments())];
        for (size, (command, key)) in sizes.iter_mut().zip(counted) {
            let call = redis::cmd(command).arg(key).to_owned();
            let value = self.shared.connections.call(&call).await?;
            *size = FromRedisValue::from_redis_value(value)
                .map_err(|e: redis::ParsingError| LaneError::Protocol(e.to_string()))?;
        }
        Ok(sizes)
    }

    async fn step(&self, claim: &Claim, step: &str, words: &[String]) -> Result<bool, LaneError> {
        let (outcome, ..) = self.recover(claim, step, words).await?;
        match outcome.as_str() {
            "ok" => Ok(true),
            "lost" => Ok(false),
            other => Err(LaneError::Protocol(other.to_owned())),
        }
    }

    async fn recover(
        &self,
        claim: &Claim,
        step: &str,
        words: &[String],
    ) -> Result<Reply, LaneError> {
        let script = &self.shared.scripts.recover;
        let mut call = script.call(LaneKeys::new(&claim.lane).all());
        call.arg(step).arg(claim.epoch).arg(claim.token.to_string()).arg(words);
        let value = self.shared.connections.call_script(script, &call).await?;
        FromRedisValue::from_redis_value(value).map_err(|e| LaneError::Protocol(e.to_string()))
    }
}

fn found(why: &str, epoch: &str, seq: &str) -> Result<Found, LaneError> {
    // A lane that is not there has neither.
    let number = |text: &str| match text {
        "" => Ok(0),
        text => text.parse::<u64>().map_err(|_| LaneError::Protocol(format!("number {text}"))),
    };
    let epoch = u32::try_from(number(epoch)?).map_err(|e| LaneError::Protocol(e.to_string()))?;
    let frozen = match why {
        "" | MISSING => None,
        why => Some(why.parse()?),
    };
    Ok(Found { is_there: why != MISSING, frozen, epoch, seq: number(seq)? })
}

fn flag(value: bool) -> String {
    u8::from(value).to_string()
}

const fn status(status: Status) -> &'static str {
    match status {
        Status::Held => "h",
        Status::Paying => "p",
        Status::Confirmed => "c",
        Status::Returned => "r",
        Status::Cancelled => "x",
        Status::Expired => "e",
    }
}

/// An order as its lane keeps it; `notes` by [`refund_note`] and [`return_note`].
pub fn order_record(order: &Order, notes: &[String]) -> String {
    let Order {
        id: _,
        buyer_id,
        status: stands,
        lines,
        returned,
        payment_id,
        created_at,
        expires_at,
        confirmed_at,
        reacquired,
        hold_seconds,
        asked,
        seq,
    } = order;
    let confirmed = optional(confirmed_at.map(|at| at.millis()));
    [
        status(*stands),
        &seq.to_string(),
        &created_at.millis().to_string(),
        &(expires_at.millis() - created_at.millis()).to_string(),
        &confirmed,
        &optional(*hold_seconds),
        &optional(payment_id.as_ref()),
        if *reacquired { "1" } else { "" },
        &optional(buyer_id.as_ref()),
        &encode_lines(lines),
        &encode_lines(asked),
        &encode_lines(returned),
        &notes.join(" "),
    ]
    .join(" ")
}

/// That this payment must be given back.
pub fn refund_note(payment: &str, reason: RefundReason) -> String {
    let letter = match reason {
        RefundReason::PaymentTooLate => "l",
        RefundReason::OrderCancelled => "x",
        RefundReason::AlreadyPaid => "a",
        RefundReason::LinesMismatch => "m",
    };
    format!("{letter}:{payment}")
}

/// A return as it was asked for.
pub fn return_note(key: EntityKey, restock: bool, lines: &[Line]) -> String {
    format!("r:{}:{}:{}", key.encode(), u8::from(restock), encode_lines(lines))
}

/// An SKU's counters with its limit and its initial stock.
pub fn stock_record(counters: Counters, limit: Option<u32>, initial: i64) -> String {
    let Counters { available, held, sold, version } = counters;
    format!("{available} {held} {sold} {version} {} {initial}", optional(limit))
}

pub fn adjustment_record(adjustment: &Adjustment) -> String {
    let Adjustment {
        id: _,
        sku,
        delta,
        set_total,
        before,
        note,
        actor,
        created_at,
        seq,
        undoes,
        undone_by,
    } = adjustment;
    let Counters { available, held, sold, version } = (*before).into();
    format!(
        "{seq} {} {sku} {delta} {} {available} {held} {sold} {version} {} {} {actor} {} {} {}",
        created_at.millis(),
        optional(*set_total),
        optional(undoes.as_ref()),
        optional(undone_by.as_ref()),
        note.reason.as_str(),
        word(note.reference.as_ref()),
        word(note.note.as_ref()),
    )
}

/// What a buyer has, as it counts against the limits.
pub fn units_record(units: &BTreeMap<&Sku, i64>) -> String {
    let parts: Vec<_> = units.iter().map(|(sku, units)| format!("{sku}={units}")).collect();
    parts.join(",")
}
