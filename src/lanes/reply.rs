//! What a lane answers, read from the script's replies. An outcome that the caller must handle is
//! an enum; a reply that does not fit the protocol is [`ReplyError`], never a panic.

use std::fmt;
use std::str::FromStr;

use super::command::Reserve;
use super::proof::Proof;
use crate::domain::durability::Durability;
use crate::domain::ids::{AdjustmentId, OrderId};
use crate::domain::names::Sku;
use crate::domain::order::{Line, Order, Quantity, RefundReason, Status};
use crate::domain::sale::Phase;
use crate::domain::stock::{Adjustment, AdjustmentNote, Counters, TOTAL_MAX};
use crate::domain::time::Timestamp;

/// How far a lane has got: what happened, what every replica, Kafka, the database has of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Marks {
    pub epoch: u32,
    pub seq: u64,
    pub replicated: u64,
    pub logged: u64,
    pub recorded: u64,
}

impl Marks {
    /// How far event `seq` of the lane has got.
    pub fn reached(&self, seq: u64) -> Durability {
        if self.recorded >= seq {
            Durability::Recorded
        } else if self.logged >= seq {
            Durability::Logged
        } else if self.replicated >= seq {
            Durability::Replicated
        } else {
            Durability::Memory
        }
    }
}

/// Why nobody may use a lane until recovery has opened it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frozen {
    /// Its server is another run than the one it was opened on: it may have forgotten what it answered.
    Run,
    /// A caller, Kafka or the database has seen more of it than it has.
    Behind,
    /// It is being rebuilt.
    Rebuild,
    /// An operator wants it so.
    Operator,
}

impl Frozen {
    /// The word that the lane keeps.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Run => "run",
            Self::Behind => "behind",
            Self::Rebuild => "rebuild",
            Self::Operator => "operator",
        }
    }
}

impl fmt::Display for Frozen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Frozen {
    type Err = ReplyError;

    fn from_str(word: &str) -> Result<Self, ReplyError> {
        let all = [Self::Run, Self::Behind, Self::Rebuild, Self::Operator];
        all.into_iter().find(|why| why.as_str() == word).ok_or_else(|| bad(word))
    }
}

/// An outcome, the lane's time and marks when it came about.
#[derive(Debug, Clone)]
pub struct Stamped<T> {
    pub now: Timestamp,
    pub marks: Marks,
    /// Of a call through [`super::Lanes::proving`].
    pub proof: Option<Proof>,
    pub outcome: T,
}

/// The reply does not fit the script's protocol: script and service are of different versions.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the lane's reply cannot be read: {0}")]
pub struct ReplyError(String);

pub(super) fn bad(what: &str) -> ReplyError {
    ReplyError(what.chars().take(200).collect())
}

/// Why an order was not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    Archived,
    Closed,
    NotOpen {
        opens_at: Timestamp,
    },
    Paused,
    UnknownSku {
        sku: Sku,
    },
    HoldTooLong {
        hold_seconds_max: u32,
    },
    /// `sku` where the limit is the SKU's, else it is the sale's.
    PurchaseLimit {
        limit: u64,
        already: u64,
        sku: Option<Sku>,
    },
    SoldOut {
        lines: Vec<Shortage>,
    },
    /// The lane's outbox or Redis' memory is full to its bound.
    Overloaded,
}

/// A line that asked for more than is available.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shortage {
    pub sku: Sku,
    pub requested: u64,
    pub available: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reserved {
    Held(Order),
    /// The same key with the same meaning: the order as it stands now.
    Replayed(Order),
    /// The same key with another meaning.
    KeyReused,
    Refused(Refusal),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Begun {
    Begun(Order),
    /// This payment runs already.
    Same(Order),
    /// It is neither held nor being paid any more.
    Over(Order),
    /// This payment must be given back.
    Refund(RefundReason, Order),
    Unknown,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failed {
    Failed(Order),
    /// It is not this payment that runs.
    Ignored(Order),
    Unknown,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Confirmed {
    Confirmed(Order),
    /// This payment had bought it before.
    Same(Order),
    /// This payment must be given back: now, and whenever it is asked again.
    Refund(RefundReason, Order),
    /// The lines are no part of what is held.
    NotPart,
    Archived,
    /// As much is remembered of the order as may be.
    Overloaded,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Returned {
    Returned(Order),
    /// The same key with the same meaning: the order as it stands now.
    Replayed(Order),
    /// The same key with another meaning.
    KeyReused,
    /// More than is left of it.
    Exceeds(Order),
    /// It is not confirmed.
    Over(Order),
    Unknown,
    Archived,
    /// As much is remembered of the order as may be.
    Overloaded,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cancelled {
    Cancelled(Order),
    /// It was cancelled before.
    Same(Order),
    /// It is sold, and stays so, also where all of it came back.
    Sold(Order),
    Unknown,
    Archived,
    /// There is no room for the tombstone of an order that has not come.
    Overloaded,
}

/// Why a total was not changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChangeRefusal {
    Archived,
    UnknownSku,
    /// A total is set for one version of the counters only, and none was named.
    PreconditionRequired,
    /// The counters have another version.
    PreconditionFailed(Counters),
    StockInUse(Counters),
    OutOfRange(Counters),
}

/// What a change of a total would come to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Previewed {
    Possible { delta: i64, before: Counters },
    Refused(ChangeRefusal),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Adjusted {
    Adjusted(Adjustment),
    /// The same key with the same meaning: the adjustment, and what undid it since.
    Replayed(Adjustment),
    KeyReused,
    Refused(ChangeRefusal),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Undone {
    /// The new adjustment.
    Undone(Adjustment),
    Replayed(Adjustment),
    KeyReused,
    /// There is no adjustment to undo.
    Unknown,
    Archived,
    AlreadyUndone {
        by: AdjustmentId,
    },
    StockInUse {
        sku: Sku,
        counters: Counters,
    },
    OutOfRange {
        sku: Sku,
        counters: Counters,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Defined {
    Defined,
    /// The lane has exactly this definition.
    Same,
    /// The lane has a newer one, or another one of this version.
    Stale {
        version: u64,
    },
    InUse {
        why: String,
    },
    Archived,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phased {
    Done,
    Closed,
    Archived,
}

/// An outcome that may tell its caller of an order that it has, or of a refund that is due to it.
pub(super) trait Promises {
    fn order(&self) -> Option<&Order>;
}

impl Promises for Reserved {
    fn order(&self) -> Option<&Order> {
        match self {
            Self::Held(order) | Self::Replayed(order) => Some(order),
            Self::KeyReused | Self::Refused(_) => None,
        }
    }
}

impl Promises for Begun {
    fn order(&self) -> Option<&Order> {
        match self {
            Self::Begun(order) | Self::Same(order) | Self::Refund(_, order) => Some(order),
            Self::Over(_) | Self::Unknown => None,
        }
    }
}

impl Promises for Failed {
    fn order(&self) -> Option<&Order> {
        match self {
            Self::Failed(order) => Some(order),
            Self::Ignored(_) | Self::Unknown => None,
        }
    }
}

impl Promises for Confirmed {
    fn order(&self) -> Option<&Order> {
        match self {
            Self::Confirmed(order) | Self::Same(order) | Self::Refund(_, order) => Some(order),
            Self::NotPart | Self::Archived | Self::Overloaded => None,
        }
    }
}

impl Promises for Returned {
    fn order(&self) -> Option<&Order> {
        match self {
            Self::Returned(order) | Self::Replayed(order) => Some(order),
            Self::KeyReused
            | Self::Exceeds(_)
            | Self::Over(_)
            | Self::Unknown
            | Self::Archived
            | Self::Overloaded => None,
        }
    }
}

impl Promises for Cancelled {
    fn order(&self) -> Option<&Order> {
        match self {
            Self::Cancelled(order) | Self::Same(order) => Some(order),
            Self::Sold(_) | Self::Unknown | Self::Archived | Self::Overloaded => None,
        }
    }
}

impl Promises for Option<Order> {
    fn order(&self) -> Option<&Order> {
        self.as_ref()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expired {
    pub count: u64,
    /// The earliest deadline of those that were ended.
    pub first_deadline: Option<Timestamp>,
    /// More is due than one call ends.
    pub more: bool,
    pub next_deadline: Option<Timestamp>,
}

/// A sale's counters as its lane has them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stock {
    pub version: u64,
    pub phase: Phase,
    /// In no particular order.
    pub skus: Vec<SkuStock>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SkuStock {
    pub sku: Sku,
    pub counters: Counters,
    pub per_buyer_limit: Option<u64>,
}

fn number<T: FromStr>(text: &str) -> Result<T, ReplyError> {
    text.parse().map_err(|_| bad(text))
}

fn optional<T: FromStr>(text: &str) -> Result<Option<T>, ReplyError> {
    if text.is_empty() { Ok(None) } else { number(text).map(Some) }
}

fn time(text: &str) -> Result<Timestamp, ReplyError> {
    number(text).map(Timestamp::from_millis)
}

fn optional_time(text: &str) -> Result<Option<Timestamp>, ReplyError> {
    Ok(optional(text)?.map(Timestamp::from_millis))
}

/// Splits a text into exactly `N` fields at single spaces; the last takes the rest.
pub(super) fn fields<const N: usize>(text: &str) -> Result<[&str; N], ReplyError> {
    let mut parts = text.splitn(N, ' ');
    let mut out = [""; N];
    for slot in &mut out {
        *slot = parts.next().ok_or_else(|| bad(text))?;
    }
    Ok(out)
}

/// The outcome's name and what belongs to it.
fn outcome(text: &str) -> (&str, &str) {
    text.split_once(' ').unwrap_or((text, ""))
}

/// A status as records write it.
pub(super) fn status(letter: &str) -> Result<Status, ReplyError> {
    match letter {
        "h" => Ok(Status::Held),
        "p" => Ok(Status::Paying),
        "r" => Ok(Status::Returned),
        "c" => Ok(Status::Confirmed),
        "x" => Ok(Status::Cancelled),
        "e" => Ok(Status::Expired),
        other => Err(bad(other)),
    }
}

pub(super) fn lines(text: &str) -> Result<Vec<Line>, ReplyError> {
    if text.is_empty() {
        return Ok(Vec::new());
    }
    text.split(',')
        .map(|part| {
            let (sku, units) = part.split_once('=').ok_or_else(|| bad(text))?;
            let quantity = Quantity::try_from(number::<u32>(units)?).map_err(|_| bad(text))?;
            Ok(Line { sku: number(sku)?, quantity })
        })
        .collect()
}

/// Reads `status seq created lasts confirmed hold payment reacquired buyer lines asked returned
/// notes`, the notes being the lane's own.
pub(super) fn order(id: OrderId, record: &str) -> Result<Order, ReplyError> {
    let [
        letter,
        seq,
        created,
        lasts,
        confirmed,
        hold,
        payment,
        reacquired,
        buyer,
        bought,
        asked,
        returned,
        _notes,
    ] = fields::<13>(record)?;
    let created_at = time(created)?;
    let expires = created_at.millis().checked_add(number(lasts)?).ok_or_else(|| bad(lasts))?;
    Ok(Order {
        id,
        buyer_id: optional(buyer)?,
        status: status(letter)?,
        lines: lines(bought)?,
        returned: lines(returned)?,
        payment_id: optional(payment)?,
        reacquired: reacquired == "1",
        created_at,
        expires_at: Timestamp::from_millis(expires),
        confirmed_at: optional_time(confirmed)?,
        hold_seconds: optional(hold)?,
        asked: lines(asked)?,
        seq: number(seq)?,
    })
}

/// The lines that a return was asked for with, from the notes of its order's record.
pub(super) fn asked_of_return<'a>(record: &'a str, key: &str) -> Result<&'a str, ReplyError> {
    let [.., notes] = fields::<13>(record)?;
    let asked = notes.split(' ').find_map(|note| {
        let (known, rest) = note.strip_prefix("r:")?.split_once(':')?;
        let (_restock, lines) = rest.split_once(':')?;
        (known == key).then_some(lines)
    });
    asked.ok_or_else(|| bad(notes))
}

fn counters(texts: [&str; 4]) -> Result<Counters, ReplyError> {
    let [available, held, sold, version] = texts;
    // Beyond its bound a counter is no counter, and sums of them could overflow.
    let units = |text: &str| match number(text) {
        Ok(units) if (0..=TOTAL_MAX).contains(&units) => Ok(units),
        _ => Err(bad(text)),
    };
    Ok(Counters {
        available: units(available)?,
        held: units(held)?,
        sold: units(sold)?,
        version: number(version)?,
    })
}

/// Reads `available held sold version limit initial`, as a lane keeps an SKU's counters.
pub(super) fn stored_counters(value: &str) -> Result<Counters, ReplyError> {
    let [available, held, sold, version, _limit, _initial] = fields::<6>(value)?;
    counters([available, held, sold, version])
}

/// Reads `sku=units,…`, as a lane counts a buyer's.
pub(super) fn units(text: &str) -> Result<Vec<(Sku, i64)>, ReplyError> {
    let unit = |part: &str| {
        let (sku, units) = part.split_once('=').ok_or_else(|| bad(text))?;
        Ok((number(sku)?, number(units)?))
    };
    text.split(',').map(unit).collect()
}

/// A text as [`super::command`] writes it: JSON, or nothing.
fn optional_json(word: &str) -> Result<Option<String>, ReplyError> {
    if word.is_empty() {
        return Ok(None);
    }
    serde_json::from_str(word).map(Some).map_err(|_| bad(word))
}

/// Reads `seq at sku delta total available held sold version undoes undone_by actor reason reference
/// note`.
pub(super) fn adjustment(id: AdjustmentId, record: &str) -> Result<Adjustment, ReplyError> {
    let [seq, at, sku, delta, total, rest] = fields::<6>(record)?;
    let [available, held, sold, version, undoes, undone_by, actor, rest] = fields::<8>(rest)?;
    let [reason, reference, note] = fields::<3>(rest)?;
    let before = counters([available, held, sold, version])?;
    let reason = serde_json::from_value(reason.into()).map_err(|_| bad(reason))?;
    let (reference, note) = (optional_json(reference)?, optional_json(note)?);
    Ok(Adjustment {
        id,
        sku: number(sku)?,
        delta: number(delta)?,
        set_total: optional(total)?,
        before: before.into(),
        note: AdjustmentNote { reason, reference, note },
        actor: number(actor)?,
        created_at: time(at)?,
        seq: number(seq)?,
        undoes: optional(undoes)?,
        undone_by: optional(undone_by)?,
    })
}

/// Of an order that is held now the lane says only what the command did not: its seq and deadline.
pub fn reserved(command: Reserve, now: Timestamp, reply: &str) -> Result<Reserved, ReplyError> {
    let (name, rest) = outcome(reply);
    let refusal = match name {
        "held" => {
            let [seq, expires] = fields::<2>(rest)?;
            return Ok(Reserved::Held(Order {
                id: command.id,
                buyer_id: Some(command.buyer),
                status: Status::Held,
                lines: command.lines,
                returned: Vec::new(),
                payment_id: None,
                reacquired: false,
                created_at: now,
                expires_at: time(expires)?,
                confirmed_at: None,
                hold_seconds: command.hold_seconds,
                asked: Vec::new(),
                seq: number(seq)?,
            }));
        }
        "replayed" => return order(command.id, rest).map(Reserved::Replayed),
        "reused" => return Ok(Reserved::KeyReused),
        "overloaded" => Refusal::Overloaded,
        "archived" => Refusal::Archived,
        "closed" => Refusal::Closed,
        "not-open" => Refusal::NotOpen { opens_at: time(rest)? },
        "paused" => Refusal::Paused,
        "unknown-sku" => Refusal::UnknownSku { sku: number(rest)? },
        "hold-too-long" => Refusal::HoldTooLong { hold_seconds_max: number(rest)? },
        "purchase-limit" => {
            let [limit, already, sku] = fields::<3>(rest)?;
            Refusal::PurchaseLimit {
                limit: number(limit)?,
                already: number(already)?,
                sku: optional(sku)?,
            }
        }
        "sold-out" => Refusal::SoldOut { lines: shortages(rest)? },
        _ => return Err(bad(reply)),
    };
    Ok(Reserved::Refused(refusal))
}

fn shortages(text: &str) -> Result<Vec<Shortage>, ReplyError> {
    text.split(',')
        .map(|part| {
            let mut parts = part.split('=');
            let mut next = || parts.next().ok_or_else(|| bad(text));
            let (sku, requested, available) = (next()?, next()?, next()?);
            Ok(Shortage {
                sku: number(sku)?,
                requested: number(requested)?,
                available: number(available)?,
            })
        })
        .collect()
}

/// Why a payment must be given back, as records write it.
pub(super) fn refund_reason(letter: &str) -> Result<RefundReason, ReplyError> {
    match letter {
        "l" => Ok(RefundReason::PaymentTooLate),
        "x" => Ok(RefundReason::OrderCancelled),
        "a" => Ok(RefundReason::AlreadyPaid),
        "m" => Ok(RefundReason::LinesMismatch),
        other => Err(bad(other)),
    }
}

/// Reads `why RECORD`.
fn refund(id: OrderId, text: &str) -> Result<(RefundReason, Order), ReplyError> {
    let [why, record] = fields::<2>(text)?;
    Ok((refund_reason(why)?, order(id, record)?))
}

pub fn begun(id: OrderId, reply: &str) -> Result<Begun, ReplyError> {
    let (name, rest) = outcome(reply);
    Ok(match name {
        "unknown" => Begun::Unknown,
        "begun" => Begun::Begun(order(id, rest)?),
        "same" => Begun::Same(order(id, rest)?),
        "over" => Begun::Over(order(id, rest)?),
        "refund" => refund(id, rest).map(|(why, order)| Begun::Refund(why, order))?,
        _ => return Err(bad(reply)),
    })
}

pub fn failed(id: OrderId, reply: &str) -> Result<Failed, ReplyError> {
    let (name, rest) = outcome(reply);
    Ok(match name {
        "unknown" => Failed::Unknown,
        "failed" => Failed::Failed(order(id, rest)?),
        "ignored" => Failed::Ignored(order(id, rest)?),
        _ => return Err(bad(reply)),
    })
}

pub fn confirmed(id: OrderId, reply: &str) -> Result<Confirmed, ReplyError> {
    let (name, rest) = outcome(reply);
    Ok(match name {
        "archived" => Confirmed::Archived,
        "overloaded" => Confirmed::Overloaded,
        "not-part" => Confirmed::NotPart,
        "confirmed" => Confirmed::Confirmed(order(id, rest)?),
        "same" => Confirmed::Same(order(id, rest)?),
        "refund" => refund(id, rest).map(|(why, order)| Confirmed::Refund(why, order))?,
        _ => return Err(bad(reply)),
    })
}

pub fn returned(id: OrderId, reply: &str) -> Result<Returned, ReplyError> {
    let (name, rest) = outcome(reply);
    Ok(match name {
        "unknown" => Returned::Unknown,
        "archived" => Returned::Archived,
        "overloaded" => Returned::Overloaded,
        "reused" => Returned::KeyReused,
        "returned" => Returned::Returned(order(id, rest)?),
        "replayed" => Returned::Replayed(order(id, rest)?),
        "exceeds" => Returned::Exceeds(order(id, rest)?),
        "over" => Returned::Over(order(id, rest)?),
        _ => return Err(bad(reply)),
    })
}

pub fn cancelled(id: OrderId, reply: &str) -> Result<Cancelled, ReplyError> {
    let (name, rest) = outcome(reply);
    Ok(match name {
        "unknown" => Cancelled::Unknown,
        "archived" => Cancelled::Archived,
        "overloaded" => Cancelled::Overloaded,
        "cancelled" => Cancelled::Cancelled(order(id, rest)?),
        "same" => Cancelled::Same(order(id, rest)?),
        "sold" => Cancelled::Sold(order(id, rest)?),
        _ => return Err(bad(reply)),
    })
}

/// The order, or `None` where the lane has none of this id.
pub fn got(id: OrderId, reply: &str) -> Result<Option<Order>, ReplyError> {
    match outcome(reply) {
        ("unknown", _) => Ok(None),
        ("order", rest) => order(id, rest).map(Some),
        _ => Err(bad(reply)),
    }
}

pub fn adjusted(id: AdjustmentId, reply: &str) -> Result<Adjusted, ReplyError> {
    let (name, rest) = outcome(reply);
    Ok(match name {
        "adjusted" => Adjusted::Adjusted(adjustment(id, rest)?),
        "replayed" => Adjusted::Replayed(adjustment(id, rest)?),
        "reused" => Adjusted::KeyReused,
        _ => Adjusted::Refused(change_refusal(reply)?),
    })
}

pub fn previewed(reply: &str) -> Result<Previewed, ReplyError> {
    let ("possible", rest) = outcome(reply) else {
        return change_refusal(reply).map(Previewed::Refused);
    };
    let [delta, before @ ..] = fields::<5>(rest)?;
    Ok(Previewed::Possible { delta: number(delta)?, before: counters(before)? })
}

fn change_refusal(reply: &str) -> Result<ChangeRefusal, ReplyError> {
    let (name, rest) = outcome(reply);
    let counters = || counters(fields::<4>(rest)?);
    Ok(match name {
        "archived" => ChangeRefusal::Archived,
        "unknown-sku" => ChangeRefusal::UnknownSku,
        "precondition-required" => ChangeRefusal::PreconditionRequired,
        "precondition-failed" => ChangeRefusal::PreconditionFailed(counters()?),
        "stock-in-use" => ChangeRefusal::StockInUse(counters()?),
        "out-of-range" => ChangeRefusal::OutOfRange(counters()?),
        _ => return Err(bad(reply)),
    })
}

pub fn undone(id: AdjustmentId, reply: &str) -> Result<Undone, ReplyError> {
    let (name, rest) = outcome(reply);
    let sku_counters = || {
        let [sku, rest @ ..] = fields::<5>(rest)?;
        Ok((number(sku)?, counters(rest)?))
    };
    Ok(match name {
        "adjusted" => Undone::Undone(adjustment(id, rest)?),
        "replayed" => Undone::Replayed(adjustment(id, rest)?),
        "reused" => Undone::KeyReused,
        "unknown" => Undone::Unknown,
        "archived" => Undone::Archived,
        "already-undone" => Undone::AlreadyUndone { by: number(rest)? },
        "stock-in-use" => {
            let (sku, counters) = sku_counters()?;
            Undone::StockInUse { sku, counters }
        }
        "out-of-range" => {
            let (sku, counters) = sku_counters()?;
            Undone::OutOfRange { sku, counters }
        }
        _ => return Err(bad(reply)),
    })
}

pub fn defined(reply: &str) -> Result<Defined, ReplyError> {
    let (name, rest) = outcome(reply);
    Ok(match name {
        "defined" => Defined::Defined,
        "same" => Defined::Same,
        "stale" => Defined::Stale { version: number(rest)? },
        "in-use" => Defined::InUse { why: rest.to_owned() },
        "archived" => Defined::Archived,
        _ => return Err(bad(reply)),
    })
}

pub fn phased(reply: &str) -> Result<Phased, ReplyError> {
    match reply {
        "done" => Ok(Phased::Done),
        "closed" => Ok(Phased::Closed),
        "archived" => Ok(Phased::Archived),
        _ => Err(bad(reply)),
    }
}

/// Whether the lane is archived now.
pub fn archived(reply: &str) -> Result<bool, ReplyError> {
    match reply {
        "archived" => Ok(true),
        "not-yet" => Ok(false),
        _ => Err(bad(reply)),
    }
}

pub fn expired(reply: &str) -> Result<Expired, ReplyError> {
    let ("expired", rest) = outcome(reply) else { return Err(bad(reply)) };
    let [count, first, more, next] = fields::<4>(rest)?;
    Ok(Expired {
        count: number(count)?,
        first_deadline: optional_time(first)?,
        more: more == "1",
        next_deadline: optional_time(next)?,
    })
}

pub fn stock(reply: &str) -> Result<Stock, ReplyError> {
    let ("stock", rest) = outcome(reply) else { return Err(bad(reply)) };
    let [version, opens, closes, paused, closed, archived, list] = fields::<7>(rest)?;
    let phase = Phase {
        opens_at: optional_time(opens)?,
        closes_at: optional_time(closes)?,
        paused: paused == "1",
        closed: closed == "1",
        archived: archived == "1",
    };
    let skus =
        list.split(',').filter(|part| !part.is_empty()).map(sku_stock).collect::<Result<_, _>>()?;
    Ok(Stock { version: number(version)?, phase, skus })
}

fn sku_stock(text: &str) -> Result<SkuStock, ReplyError> {
    let parts: Vec<_> = text.split('=').collect();
    let [sku, available, held, sold, version, limit] = parts[..] else { return Err(bad(text)) };
    Ok(SkuStock {
        sku: number(sku)?,
        counters: counters([available, held, sold, version])?,
        per_buyer_limit: optional(limit)?,
    })
}

pub fn marks(reply: &str) -> Result<(), ReplyError> {
    if reply == "marks" { Ok(()) } else { Err(bad(reply)) }
}
