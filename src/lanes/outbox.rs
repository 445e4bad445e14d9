//! A lane's outbox: its entries as events, read by the relay.

use super::reply::{self, ReplyError, bad, fields};
use crate::domain::event::{
    Body, Cause, Event, OrderStep, ReturnRequest, SaleStep, Step, StockSet,
};
use crate::domain::ids::{EntityKey, IdSecret, LaneId, OrderId};
use crate::domain::names::PaymentId;
use crate::domain::order::RefundDue;
use crate::domain::time::Timestamp;

/// One outbox entry: its stream id, then fields and values in turn, in the order of the `XADD`.
pub type Entry = (String, Vec<String>);

/// The events of one entry, which one script call appended: id `epoch-lastseq`, the lane's time,
/// then a (kind, payload) pair an event.
///
/// # Errors
/// Whatever does not fit the script's format.
pub fn events(
    lane: &LaneId,
    secret: &IdSecret,
    (id, pairs): &Entry,
) -> Result<Vec<Event>, ReplyError> {
    let (epoch, last) = id.split_once('-').ok_or_else(|| bad(id))?;
    let epoch = epoch.parse().map_err(|_| bad(id))?;
    let last: u64 = last.parse().map_err(|_| bad(id))?;
    let [name, at, steps @ ..] = &pairs[..] else { return Err(bad("an empty entry")) };
    let (steps, rest) = steps.as_chunks::<2>();
    if name != "at" || !rest.is_empty() {
        return Err(bad(name));
    }
    let at = Timestamp::from_millis(at.parse().map_err(|_| bad(at))?);
    let first = last
        .checked_add(1)
        .and_then(|next| next.checked_sub(steps.len() as u64))
        .ok_or_else(|| bad(id))?;
    let read = |(seq, [kind, payload]): (u64, &[String; 2])| {
        let (trace, body) = body(lane, secret, kind, payload)?;
        let traceparent = (!trace.is_empty()).then(|| trace.to_owned());
        Ok(Event { lane: lane.clone(), epoch, seq, at, traceparent, body })
    };
    (first..).zip(steps).map(read).collect()
}

fn body<'a>(
    lane: &LaneId,
    secret: &IdSecret,
    kind: &str,
    payload: &'a str,
) -> Result<(&'a str, Body), ReplyError> {
    match kind {
        "adjusted" => {
            let [key, trace, record] = fields::<3>(payload)?;
            let key = EntityKey::decode(key).ok_or_else(|| bad(key))?;
            let adjustment = reply::adjustment(secret.adjustment_id(lane, key), record)?;
            Ok((trace, Body::Adjusted(adjustment)))
        }
        "defined" | "paused" | "resumed" | "closed" | "archived" => sale_step(kind, payload),
        _ => order_step(lane, secret, kind, payload),
    }
}

/// Reads `key from cause trace moved about reason RECORD`.
fn order_step<'a>(
    lane: &LaneId,
    secret: &IdSecret,
    kind: &str,
    payload: &'a str,
) -> Result<(&'a str, Body), ReplyError> {
    let [key, from, cause, trace, moved, about, reason, record] = fields::<8>(payload)?;
    let key = EntityKey::decode(key).ok_or_else(|| bad(key))?;
    let id = secret.order_id(lane, key);
    let step = OrderStep {
        step: step(secret, &id, kind, [moved, about, record])?,
        order: reply::order(id, record)?,
        from: if from == "-" { None } else { Some(reply::status(from)?) },
        cause: match cause {
            "c" => Cause::Caller,
            "w" => Cause::Webhook,
            "s" => Cause::Sweeper,
            other => return Err(bad(other)),
        },
        reason: match reason {
            "" => None,
            json => Some(serde_json::from_str(json).map_err(|_| bad(json))?),
        },
    };
    Ok((trace, Body::Order(step)))
}

fn step(
    secret: &IdSecret,
    id: &OrderId,
    kind: &str,
    [moved, about, record]: [&str; 3],
) -> Result<Step, ReplyError> {
    let two = || about.split_once(':').ok_or_else(|| bad(about));
    Ok(match kind {
        "held" => Step::Held,
        "payment_begun" => Step::PaymentBegun,
        "payment_failed" => Step::PaymentFailed,
        "confirmed" => Step::Confirmed { released: reply::lines(moved)? },
        "cancelled" => Step::Cancelled,
        "expired" => Step::Expired,
        "returned" => {
            let (restock, key) = two()?;
            let asked = reply::asked_of_return(record, key)?;
            let key = EntityKey::decode(key).ok_or_else(|| bad(about))?;
            let request = Some(ReturnRequest { key, lines: reply::lines(asked)? });
            Step::Returned { lines: reply::lines(moved)?, restock: restock == "1", request }
        }
        "refund_due" => {
            let (why, payment) = two()?;
            let payment_id: PaymentId = payment.parse().map_err(|_| bad(about))?;
            let id = secret.refund_id(id, &payment_id);
            Step::RefundDue(RefundDue { id, payment_id, reason: reply::refund_reason(why)? })
        }
        other => return Err(bad(other)),
    })
}

fn sale_step<'a>(kind: &str, payload: &'a str) -> Result<(&'a str, Body), ReplyError> {
    if kind == "archived" {
        return Ok(("", Body::Sale(SaleStep::Archived)));
    }
    if kind == "defined" {
        let [trace, actor, version, moved, definition] = fields::<5>(payload)?;
        let step = SaleStep::Defined {
            version: version.parse().map_err(|_| bad(version))?,
            definition: serde_json::from_str(definition).map_err(|_| bad(definition))?,
            stock: stock_sets(moved)?,
            actor: actor.parse().map_err(|_| bad(actor))?,
        };
        return Ok((trace, Body::Sale(step)));
    }
    let [trace, actor] = fields::<2>(payload)?;
    let actor = actor.parse().map_err(|_| bad(actor))?;
    let step = match kind {
        "paused" => SaleStep::Paused { actor },
        "resumed" => SaleStep::Resumed { actor },
        "closed" => SaleStep::Closed { actor },
        other => return Err(bad(other)),
    };
    Ok((trace, Body::Sale(step)))
}

fn stock_sets(text: &str) -> Result<Vec<StockSet>, ReplyError> {
    text.split(',')
        .filter(|part| !part.is_empty())
        .map(|part| {
            let (sku, delta) = part.split_once('=').ok_or_else(|| bad(text))?;
            Ok(StockSet {
                sku: sku.parse().map_err(|_| bad(text))?,
                delta: delta.parse().map_err(|_| bad(text))?,
            })
        })
        .collect()
}
