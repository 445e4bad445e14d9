//! What callers ask of a lane, and how the script reads it.

use redis::Cmd;

use crate::domain::event::Cause;
use crate::domain::ids::{AdjustmentId, EntityKey, OrderId};
use crate::domain::names::{BuyerId, KeyName, PaymentId, Sku};
use crate::domain::order::Line;
use crate::domain::sale::Definition;
use crate::domain::stock::{AdjustmentNote, TotalChange};

/// W3C `traceparent` of the request that a command belongs to.
pub type Trace = Option<String>;

/// Hold stock for every line, all or nothing.
#[derive(Debug, Clone)]
pub struct Reserve {
    pub id: OrderId,
    pub buyer: BuyerId,
    pub lines: Vec<Line>,
    /// How long to hold; the sale's own time unless said otherwise.
    pub hold_seconds: Option<u32>,
    pub trace: Trace,
}

/// Keep the hold while this payment runs.
#[derive(Debug, Clone)]
pub struct BeginPayment {
    pub id: OrderId,
    pub payment: PaymentId,
    pub trace: Trace,
}

/// This payment came to nothing.
#[derive(Debug, Clone)]
pub struct FailPayment {
    pub id: OrderId,
    pub payment: PaymentId,
    pub cause: Cause,
    pub trace: Trace,
}

/// Sell what an order holds, or a part of it and release the rest.
#[derive(Debug, Clone)]
pub struct Confirm {
    pub id: OrderId,
    pub payment: PaymentId,
    /// What is bought; empty for all.
    pub lines: Vec<Line>,
    pub cause: Cause,
    pub trace: Trace,
}

/// Take back what was sold.
#[derive(Debug, Clone)]
pub struct Return {
    pub id: OrderId,
    /// Which return of the order this is.
    pub key: EntityKey,
    /// What comes back; empty for all that is left.
    pub lines: Vec<Line>,
    /// On sale again, or out of the total.
    pub restock: bool,
    pub trace: Trace,
}

/// Give back what an order holds.
#[derive(Debug, Clone)]
pub struct Cancel {
    pub id: OrderId,
    /// The buyer, where the order is named by its idempotency key: then an order that has not come
    /// yet is cancelled in advance.
    pub tombstone_for: Option<BuyerId>,
    pub reason: Option<String>,
    pub trace: Trace,
}

/// Which version of a SKU's counters a change is meant for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IfVersion {
    Any,
    OneOf(Vec<u64>),
}

/// Ask what changing the total of one SKU would come to.
#[derive(Debug, Clone)]
pub struct Preview {
    pub sku: Sku,
    pub change: TotalChange,
    pub if_version: Option<IfVersion>,
}

/// Change the total of one SKU.
#[derive(Debug, Clone)]
pub struct Adjust {
    pub id: AdjustmentId,
    pub sku: Sku,
    pub change: TotalChange,
    /// Required to set a total.
    pub if_version: Option<IfVersion>,
    pub note: AdjustmentNote,
    pub actor: KeyName,
    pub trace: Trace,
}

/// Do the exact opposite of an adjustment, as a new one.
#[derive(Debug, Clone)]
pub struct Undo {
    /// Of the new one.
    pub id: AdjustmentId,
    pub undoes: AdjustmentId,
    pub note: Option<String>,
    pub actor: KeyName,
    pub trace: Trace,
}

/// Give the lane its sale's definition.
#[derive(Debug, Clone)]
pub struct Define {
    pub version: u64,
    /// The epoch under which to create the lane; `None` where it must exist already.
    pub create_epoch: Option<u32>,
    /// Tells whether two definitions of one version are the same.
    pub digest: String,
    /// One that passed [`Definition::check`].
    pub definition: Definition,
    pub actor: KeyName,
    pub trace: Trace,
}

/// What an operator may do to a sale while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PhaseChange {
    Pause,
    Resume,
    Close,
}

/// Pause, resume or close the sale.
#[derive(Debug, Clone)]
pub struct Phase {
    pub change: PhaseChange,
    pub actor: KeyName,
    pub trace: Trace,
}

#[derive(Debug, Clone)]
pub enum Command {
    Reserve(Reserve),
    BeginPayment(BeginPayment),
    FailPayment(FailPayment),
    Confirm(Confirm),
    Cancel(Cancel),
    Return(Return),
    /// End overdue holds until so many are found; see [`super::Lanes::expire`].
    Expire {
        max: usize,
    },
    Get {
        id: OrderId,
    },
    Stock,
    Preview(Preview),
    Adjust(Adjust),
    Undo(Undo),
    Define(Box<Define>),
    Phase(Phase),
    /// End a closed sale whose retention, in milliseconds, is over.
    Archive {
        retention_ms: u64,
    },
    Marks,
}

/// `sku=units,sku=units`: the form in which a record keeps lines.
pub(super) fn encode_lines(lines: &[Line]) -> String {
    let mut text = String::with_capacity(24 * lines.len());
    for line in lines {
        if !text.is_empty() {
            text.push(',');
        }
        text.push_str(line.sku.as_str());
        text.push('=');
        text.push_str(itoa::Buffer::new().format(line.quantity.get()));
    }
    text
}

/// As events say who made them happen.
pub(super) fn cause(cause: Cause) -> &'static str {
    match cause {
        Cause::Caller => "c",
        Cause::Webhook => "w",
        Cause::Sweeper => "s",
    }
}

pub(super) fn optional<T: ToString>(value: Option<T>) -> String {
    value.map(|value| value.to_string()).unwrap_or_default()
}

fn json<T: serde::Serialize>(value: &T) -> String {
    serde_json::to_string(value).expect("plain data is always JSON")
}

impl Command {
    /// How many order lines, SKUs or due orders the script handles for it: what bounds a call.
    pub fn weight(&self) -> usize {
        match self {
            Command::Reserve(reserve) => reserve.lines.len(),
            Command::Define(define) => define.definition.skus.len(),
            Command::Expire { max } => *max,
            Command::Return(c) => c.lines.len().max(1),
            Command::BeginPayment(_)
            | Command::FailPayment(_)
            | Command::Confirm(_)
            | Command::Cancel(_)
            | Command::Get { .. }
            | Command::Stock
            | Command::Preview(_)
            | Command::Adjust(_)
            | Command::Undo(_)
            | Command::Phase(_)
            | Command::Archive { .. }
            | Command::Marks => 1,
        }
    }

    /// Whether both are new orders that ask for the same: where they follow each other they say it once.
    pub(super) fn asks_like(&self, other: &Self) -> bool {
        match (self, other) {
            (Command::Reserve(one), Command::Reserve(other)) => {
                one.hold_seconds == other.hold_seconds && one.lines == other.lines
            }
            _ => false,
        }
    }

    /// Appends what so many commands that ask for the same, of which this is the first, have in common.
    pub(super) fn encode_shared(&self, count: usize, call: &mut Cmd) {
        if let Command::Reserve(c) = self {
            call.arg("reserve")
                .arg(optional(c.hold_seconds))
                .arg(encode_lines(&c.lines))
                .arg(count);
        }
    }

    /// Appends the command, or what it does not share with those before it, as the readers of
    /// `lua/lane/1_read.lua` take it.
    pub(super) fn encode(&self, call: &mut Cmd) {
        match self {
            Command::Reserve(c) => {
                call.arg(c.trace.as_deref().unwrap_or_default()).arg(c.id.key().encode());
                call.arg(c.buyer.as_str());
            }
            Command::BeginPayment(c) => {
                call.arg("begin")
                    .arg(c.trace.as_deref().unwrap_or_default())
                    .arg(c.id.key().encode());
                call.arg(c.payment.as_str());
            }
            Command::FailPayment(c) => {
                call.arg("fail").arg(c.trace.as_deref().unwrap_or_default()).arg(cause(c.cause));
                call.arg(c.id.key().encode()).arg(c.payment.as_str());
            }
            Command::Confirm(c) => {
                call.arg("confirm").arg(c.trace.as_deref().unwrap_or_default()).arg(cause(c.cause));
                call.arg(c.id.key().encode()).arg(c.payment.as_str()).arg(encode_lines(&c.lines));
            }
            Command::Return(c) => {
                call.arg("return")
                    .arg(c.trace.as_deref().unwrap_or_default())
                    .arg(c.id.key().encode());
                call.arg(c.key.encode()).arg(u8::from(c.restock)).arg(encode_lines(&c.lines));
            }
            Command::Cancel(c) => {
                call.arg("cancel")
                    .arg(c.trace.as_deref().unwrap_or_default())
                    .arg(c.id.key().encode());
                call.arg(optional(c.tombstone_for.as_ref()));
                call.arg(word(c.reason.as_ref()));
            }
            Command::Expire { max } => {
                call.arg("expire").arg(*max);
            }
            Command::Get { id } => {
                call.arg("get").arg(id.key().encode());
            }
            Command::Stock => {
                call.arg("stock");
            }
            Command::Preview(c) => {
                call.arg("preview");
                encode_change(&c.sku, c.change, c.if_version.as_ref(), call);
            }
            Command::Adjust(c) => {
                call.arg("adjust")
                    .arg(c.trace.as_deref().unwrap_or_default())
                    .arg(c.id.key().encode());
                encode_change(&c.sku, c.change, c.if_version.as_ref(), call);
                call.arg(c.actor.as_str()).arg(c.note.reason.as_str());
                call.arg(word(c.note.reference.as_ref())).arg(word(c.note.note.as_ref()));
            }
            Command::Undo(c) => {
                call.arg("undo").arg(c.trace.as_deref().unwrap_or_default());
                for id in [&c.id, &c.undoes] {
                    call.arg(id.key().encode()).arg(id.to_string());
                }
                call.arg(c.actor.as_str()).arg(word(c.note.as_ref()));
            }
            Command::Define(c) => encode_define(c, call),
            Command::Phase(c) => {
                let change = match c.change {
                    PhaseChange::Pause => "pause",
                    PhaseChange::Resume => "resume",
                    PhaseChange::Close => "close",
                };
                call.arg("phase").arg(c.trace.as_deref().unwrap_or_default());
                call.arg(c.actor.as_str()).arg(change);
            }
            Command::Archive { retention_ms } => {
                call.arg("archive").arg(*retention_ms);
            }
            Command::Marks => {
                call.arg("marks");
            }
        }
    }
}

/// A text as JSON without spaces, since these part a record's fields; or nothing.
pub(super) fn word(text: Option<&String>) -> String {
    text.map(|text| json(text).replace(' ', "\\u0020")).unwrap_or_default()
}

fn encode_change(sku: &Sku, change: TotalChange, version: Option<&IfVersion>, call: &mut Cmd) {
    let (delta, total) = match change {
        TotalChange::By(delta) => (Some(delta), None),
        TotalChange::To(total) => (None, Some(total)),
    };
    call.arg(sku.as_str()).arg(optional(delta)).arg(optional(total));
    call.arg(match version {
        None => String::new(),
        Some(IfVersion::Any) => "*".to_owned(),
        Some(IfVersion::OneOf(versions)) => {
            versions.iter().fold(",".to_owned(), |list, version| format!("{list}{version},"))
        }
    });
}

fn encode_define(c: &Define, call: &mut Cmd) {
    let definition = &c.definition;
    call.arg("define").arg(c.trace.as_deref().unwrap_or_default()).arg(c.version);
    call.arg(optional(c.create_epoch)).arg(&c.digest);
    call.arg(optional(definition.opens_at.map(|at| at.millis())));
    call.arg(optional(definition.closes_at.map(|at| at.millis())));
    call.arg(definition.hold_seconds).arg(definition.payment_grace_seconds);
    call.arg(definition.longest_hold_seconds()).arg(optional(definition.per_buyer_limit));
    call.arg(c.actor.as_str()).arg(json(definition)).arg(definition.skus.len());
    for sku in &definition.skus {
        call.arg(sku.sku.as_str()).arg(sku.stock).arg(optional(sku.per_buyer_limit));
    }
}
