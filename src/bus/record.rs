//! An event as a Kafka record: CloudEvents 1.0, Kafka protocol binding, binary mode (attributes
//! in headers, data in the value). `docs/events.md` shows each.

use std::borrow::Cow;
use std::fmt::Display;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::domain::event::{
    Body, Cause, Event, OrderStep, RebuildToken, ReturnRequest, SaleStep, Seal, Step, StockSet,
};
use crate::domain::ids::{AdjustmentId, LANES_MAX, LaneId};
use crate::domain::names::KeyName;
use crate::domain::order::{Line, Order, RefundDue, Status};
use crate::domain::sale::Definition;
use crate::domain::stock::{Adjustment, Change, Counters, CountersSnapshot, TOTAL_MAX};
use crate::domain::time::Timestamp;

/// Every header's name, here and nowhere else.
pub mod header {
    pub const CONTENT_TYPE: &str = "content-type";
    pub const SPECVERSION: &str = "ce_specversion";
    pub const ID: &str = "ce_id";
    pub const SOURCE: &str = "ce_source";
    pub const TYPE: &str = "ce_type";
    pub const TIME: &str = "ce_time";
    pub const SUBJECT: &str = "ce_subject";
    pub const SALEID: &str = "ce_saleid";
    pub const LANE: &str = "ce_lane";
    pub const EPOCH: &str = "ce_epoch";
    pub const SEQ: &str = "ce_seq";
    pub const TRACEPARENT: &str = "ce_traceparent";
}

const SPECVERSION: &str = "1.0";
/// The type of a [`Seal`]'s record.
const SEALED: &str = "holdfast.lane.sealed";
const CONTENT_TYPE: &str = "application/json";
/// Room for an order with a line or two: growing step by step costs more.
const PAYLOAD_BYTES: usize = 512;
/// What the database's bigint can count.
const SEQ_MAX: u64 = i64::MAX as u64;

/// A record ready to be produced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// `<sale>/<lane>`: for consumers and tools; the partition is the lane's own.
    pub key: String,
    pub headers: Vec<(&'static str, Cow<'static, str>)>,
    pub payload: Vec<u8>,
}

/// What a record says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    Event(Box<Event>),
    Seal(Seal),
}

/// Which event a record says it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Position {
    pub lane: LaneId,
    pub epoch: u32,
    pub seq: u64,
}

/// Why a record is no event.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{detail}")]
pub struct DecodeError {
    pub detail: String,
    /// Lane, epoch and seq, where these at least could be read.
    pub position: Option<Position>,
}

#[derive(Serialize, Deserialize)]
struct OrderData<'a> {
    order: Cow<'a, Order>,
    from: Option<Status>,
    cause: Cause,
    reason: Option<Cow<'a, str>>,
    /// Of a confirm: what was held but not bought.
    #[serde(default, skip_serializing_if = "is_empty")]
    released: Cow<'a, [Line]>,
    /// Of a return: what came back,
    #[serde(default, skip_serializing_if = "is_empty")]
    lines: Cow<'a, [Line]>,
    /// ... and whether it is on sale again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    restock: Option<bool>,
    /// ... and what its replays must ask.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    request: Option<Cow<'a, ReturnRequest>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    refund: Option<Cow<'a, RefundDue>>,
    changes: Vec<Change>,
}

fn is_empty(lines: &[Line]) -> bool {
    lines.is_empty()
}

#[derive(Serialize, Deserialize)]
struct AdjustedData {
    adjustment: Adjustment,
    after: CountersSnapshot,
    changes: Vec<Change>,
}

#[derive(Serialize, Deserialize)]
struct DefinedData {
    version: u64,
    definition: Box<Definition>,
    actor: KeyName,
    changes: Vec<Change>,
}

#[derive(Serialize, Deserialize)]
struct ActorData {
    actor: KeyName,
    changes: Vec<Change>,
}

#[derive(Serialize, Deserialize)]
struct ArchivedData {
    changes: Vec<Change>,
}

#[derive(Serialize, Deserialize)]
struct SealedData {
    token: RebuildToken,
    /// Versions before it did not say.
    #[serde(default)]
    gives_up: bool,
}

/// Writes an event as a record.
pub fn encode(event: &Event) -> Record {
    let Event { lane, epoch, seq, at, traceparent, body } = event;
    let subject = match body {
        Body::Order(step) => step.order.id.to_string(),
        Body::Adjusted(adjustment) => adjustment.sku.to_string(),
        Body::Sale(_) => lane.sale.to_string(),
    };
    let seq = itoa::Buffer::new().format(*seq).to_owned();
    let mut record = record(lane, *epoch, &seq, body.kind(), subject, *at, encode_body(body));
    record.headers.push((header::SEQ, seq.into()));
    if let Some(traceparent) = traceparent {
        record.headers.push((header::TRACEPARENT, traceparent.clone().into()));
    }
    record
}

/// Writes a seal as a record, of its lane's partition as all others.
pub fn encode_seal(seal: &Seal) -> Record {
    let Seal { lane, epoch, token, gives_up, at } = seal;
    let data = SealedData { token: *token, gives_up: *gives_up };
    record(lane, *epoch, "sealed", SEALED, lane.sale.to_string(), *at, json(&data))
}

/// A record with all headers that every record has. The relay makes one of each event: texts are put
/// together, since formatting them took a tenth of its instructions.
fn record(
    lane: &LaneId,
    epoch: u32,
    which: &str,
    kind: &'static str,
    subject: String,
    at: Timestamp,
    payload: Vec<u8>,
) -> Record {
    let sale = lane.sale.as_str();
    let number = itoa::Buffer::new().format(lane.lane).to_owned();
    let epoch = itoa::Buffer::new().format(epoch).to_owned();
    let key = [sale, "/", &number].concat();
    let headers = vec![
        (header::SPECVERSION, SPECVERSION.into()),
        (header::ID, [&key, "/", &epoch, "-", which].concat().into()),
        (header::SOURCE, ["/holdfast/sales/", sale, "/lanes/", &number].concat().into()),
        (header::TYPE, kind.into()),
        (header::TIME, at.to_string().into()),
        (header::SUBJECT, subject.into()),
        (header::CONTENT_TYPE, CONTENT_TYPE.into()),
        (header::SALEID, sale.to_owned().into()),
        (header::LANE, number.into()),
        (header::EPOCH, epoch.into()),
    ];
    Record { key, headers, payload }
}

fn encode_body(body: &Body) -> Vec<u8> {
    let changes = body.changes();
    match body {
        Body::Order(step) => {
            let OrderStep { order, step, from, cause, reason } = step;
            let mut data = OrderData {
                order: Cow::Borrowed(order),
                from: *from,
                cause: *cause,
                reason: reason.as_deref().map(Cow::Borrowed),
                released: Cow::default(),
                lines: Cow::default(),
                restock: None,
                request: None,
                refund: None,
                changes,
            };
            match step {
                Step::Confirmed { released } => data.released = Cow::Borrowed(released),
                Step::Returned { lines, restock, request } => {
                    data.lines = Cow::Borrowed(lines);
                    data.restock = Some(*restock);
                    data.request = request.as_ref().map(Cow::Borrowed);
                }
                Step::RefundDue(due) => data.refund = Some(Cow::Borrowed(due)),
                _ => {}
            }
            json(&data)
        }
        Body::Adjusted(adjustment) => {
            let after = adjustment.after();
            json(&AdjustedData { adjustment: adjustment.clone(), after, changes })
        }
        Body::Sale(step) => match step.clone() {
            SaleStep::Defined { version, definition, actor, stock: _ } => {
                json(&DefinedData { version, definition, actor, changes })
            }
            SaleStep::Paused { actor }
            | SaleStep::Resumed { actor }
            | SaleStep::Closed { actor } => json(&ActorData { actor, changes }),
            SaleStep::Archived => json(&ArchivedData { changes }),
        },
    }
}

fn json(data: &impl Serialize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(PAYLOAD_BYTES);
    serde_json::to_writer(&mut bytes, data).expect("plain data is always JSON");
    bytes
}

/// Reads a record. Headers that it does not know are ignored; what it knows must be there and
/// agree with the rest.
///
/// # Errors
/// What is wrong, and which event it claims to be where that can be read.
pub fn decode<'a>(
    headers: impl IntoIterator<Item = (&'a str, &'a [u8])>,
    payload: &[u8],
) -> Result<Message, DecodeError> {
    let headers = Headers(headers.into_iter().collect());
    let unplaced = |detail| DecodeError { detail, position: None };
    if headers.find(header::TYPE) == Ok(Some(SEALED)) {
        return decode_seal(&headers, payload).map(Message::Seal).map_err(unplaced);
    }
    let position = headers.position().map_err(unplaced)?;
    match decode_at(&headers, &position, payload) {
        Ok(event) => Ok(Message::Event(Box::new(event))),
        Err(detail) => Err(DecodeError { detail, position: Some(position) }),
    }
}

fn decode_seal(headers: &Headers<'_>, payload: &[u8]) -> Result<Seal, String> {
    let (lane, epoch, at) = (headers.lane()?, headers.parsed(header::EPOCH)?, headers.time()?);
    if epoch == 0 {
        return Err("epoch is out of range".to_owned());
    }
    let SealedData { token, gives_up } = read(payload)?;
    Ok(Seal { lane, epoch, token, gives_up, at })
}

struct Headers<'a>(Vec<(&'a str, &'a [u8])>);

impl<'a> Headers<'a> {
    fn find(&self, name: &str) -> Result<Option<&'a str>, String> {
        let Some((_, value)) = self.0.iter().find(|(known, _)| *known == name) else {
            return Ok(None);
        };
        std::str::from_utf8(value).map(Some).map_err(|_| format!("{name} is not UTF-8"))
    }

    fn text(&self, name: &str) -> Result<&'a str, String> {
        self.find(name)?.ok_or_else(|| format!("{name} is missing"))
    }

    fn parsed<T: FromStr>(&self, name: &str) -> Result<T, String>
    where
        T::Err: Display,
    {
        let text = self.text(name)?;
        text.parse().map_err(|e: T::Err| format!("{name} {e}"))
    }

    fn lane(&self) -> Result<LaneId, String> {
        let lane = LaneId { sale: self.parsed(header::SALEID)?, lane: self.parsed(header::LANE)? };
        if lane.lane < LANES_MAX { Ok(lane) } else { Err("lane is out of range".to_owned()) }
    }

    fn position(&self) -> Result<Position, String> {
        let lane = self.lane()?;
        let (epoch, seq) = (self.parsed(header::EPOCH)?, self.parsed(header::SEQ)?);
        if epoch == 0 || seq == 0 || seq > SEQ_MAX {
            return Err("epoch or seq is out of range".to_owned());
        }
        Ok(Position { lane, epoch, seq })
    }

    /// When it happened, of a record of a version that is known.
    fn time(&self) -> Result<Timestamp, String> {
        let version = self.text(header::SPECVERSION)?;
        if version != SPECVERSION {
            return Err(format!("CloudEvents {version:?} is not {SPECVERSION}"));
        }
        let time = serde_json::Value::from(self.text(header::TIME)?);
        serde_json::from_value(time).map_err(|e| format!("{} is {e}", header::TIME))
    }
}

fn decode_at(headers: &Headers<'_>, at: &Position, payload: &[u8]) -> Result<Event, String> {
    let time = headers.time()?;
    let kind = headers.text(header::TYPE)?;
    let (body, changes) = decode_body(kind, payload)?;
    check(&body, at)?;
    if body.kind() != kind {
        return Err(format!("says {kind} but is {}", body.kind()));
    }
    if let Body::Order(step) = &body
        && !step.is_possible()
    {
        let from = step.from.map_or("nothing", Status::as_str);
        return Err(format!("{kind} cannot lead from {from} to {}", step.order.status.as_str()));
    }
    if body.changes() != changes {
        return Err("its changes do not follow from it".to_owned());
    }
    Ok(Event {
        lane: at.lane.clone(),
        epoch: at.epoch,
        seq: at.seq,
        at: time,
        traceparent: headers.find(header::TRACEPARENT)?.map(str::to_owned),
        body,
    })
}

fn decode_body(kind: &str, payload: &[u8]) -> Result<(Body, Vec<Change>), String> {
    let step = match kind {
        order if order.starts_with("holdfast.order.") => return decode_order(kind, payload),
        "holdfast.stock.adjusted" => return decode_adjusted(payload),
        "holdfast.sale.defined" => return decode_defined(payload),
        "holdfast.sale.paused" => |actor| SaleStep::Paused { actor },
        "holdfast.sale.resumed" => |actor| SaleStep::Resumed { actor },
        "holdfast.sale.closed" => |actor| SaleStep::Closed { actor },
        "holdfast.sale.archived" => {
            let ArchivedData { changes } = read(payload)?;
            return Ok((Body::Sale(SaleStep::Archived), changes));
        }
        _ => return Err(unknown(kind)),
    };
    let ActorData { actor, changes } = read(payload)?;
    Ok((Body::Sale(step(actor)), changes))
}

fn decode_order(kind: &str, payload: &[u8]) -> Result<(Body, Vec<Change>), String> {
    let data: OrderData = read(payload)?;
    let missing = |member| move || format!("{member} is missing");
    let step = match kind {
        "holdfast.order.held" => Step::Held,
        "holdfast.order.payment_begun" => Step::PaymentBegun,
        "holdfast.order.payment_failed" => Step::PaymentFailed,
        "holdfast.order.confirmed" => Step::Confirmed { released: data.released.into_owned() },
        "holdfast.order.cancelled" => Step::Cancelled,
        "holdfast.order.expired" => Step::Expired,
        "holdfast.order.returned" => Step::Returned {
            lines: data.lines.into_owned(),
            restock: data.restock.ok_or_else(missing("restock"))?,
            request: data.request.map(Cow::into_owned),
        },
        "holdfast.order.refund_due" => {
            Step::RefundDue(data.refund.ok_or_else(missing("refund"))?.into_owned())
        }
        _ => return Err(unknown(kind)),
    };
    let OrderData { order, from, cause, reason, changes, .. } = data;
    let (order, reason) = (order.into_owned(), reason.map(Cow::into_owned));
    Ok((Body::Order(OrderStep { order, step, from, cause, reason }), changes))
}

fn unknown(kind: &str) -> String {
    format!("{kind:?} is no event that this version knows")
}

fn decode_adjusted(payload: &[u8]) -> Result<(Body, Vec<Change>), String> {
    let AdjustedData { adjustment, after, changes } = read(payload)?;
    let before = adjustment.before;
    let units = [before.available, before.held, before.sold, before.total];
    let possible = |n: i64| (0..=TOTAL_MAX).contains(&n);
    // Checked before anything is added up: the numbers are whatever the bytes say.
    if !units.into_iter().all(possible)
        || !possible(before.version)
        || !possible(adjustment.delta.saturating_abs())
        || before != CountersSnapshot::from(Counters::from(before))
    {
        return Err("its counters are impossible".to_owned());
    }
    if after != adjustment.after() {
        return Err("its counters after do not follow from those before".to_owned());
    }
    if adjustment.set_total.is_some_and(|total| total != after.total) {
        return Err("its total is not the one that was asked for".to_owned());
    }
    let of_its_lane = |undoes: &AdjustmentId| undoes.lane() == adjustment.id.lane();
    if !adjustment.undoes.as_ref().is_none_or(of_its_lane) {
        return Err("what it undoes is of another lane".to_owned());
    }
    Ok((Body::Adjusted(adjustment), changes))
}

fn decode_defined(payload: &[u8]) -> Result<(Body, Vec<Change>), String> {
    let DefinedData { version, definition, actor, changes } = read(payload)?;
    let set = |change: &Change| StockSet { sku: change.sku.clone(), delta: change.available };
    let stock: Vec<StockSet> = changes.iter().map(set).collect();
    if stock.iter().any(|set| set.delta.saturating_abs() > TOTAL_MAX) || version > SEQ_MAX {
        return Err("its numbers are out of range".to_owned());
    }
    Ok((Body::Sale(SaleStep::Defined { version, definition, stock, actor }), changes))
}

fn read<'a, T: Deserialize<'a>>(payload: &'a [u8]) -> Result<T, String> {
    serde_json::from_slice(payload).map_err(|e| format!("the body cannot be read: {e}"))
}

/// What the body says of its place must be what the headers say.
fn check(body: &Body, at: &Position) -> Result<(), String> {
    let (lane, seq) = match body {
        Body::Order(step) => (step.order.lane(), step.order.seq),
        Body::Adjusted(adjustment) => (adjustment.id.lane(), adjustment.seq),
        Body::Sale(_) => return Ok(()),
    };
    if (lane, seq) == (&at.lane, at.seq) {
        Ok(())
    } else {
        Err(format!("the body is of {lane} seq {seq}, the headers of another"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::domain::ids::IdSecret;
    use crate::domain::order::RefundReason;
    use crate::domain::stock::{AdjustmentNote, Reason};

    fn headers_of(record: &Record) -> Vec<(&str, &[u8])> {
        record.headers.iter().map(|(name, value)| (*name, value.as_bytes())).collect()
    }

    fn read_back(record: &Record) -> Result<Message, DecodeError> {
        decode(headers_of(record), &record.payload)
    }

    fn time() -> impl Strategy<Value = Timestamp> {
        (0..253_402_300_799_999i64).prop_map(Timestamp::from_millis)
    }

    fn order(lane: LaneId, seq: u64) -> impl Strategy<Value = Order> {
        let lines = prop::collection::vec(("[a-zA-Z0-9._-]{1,64}", 1..=1000u32), 0..=8);
        let payment = prop::option::of("[!-~]{1,255}");
        ("[!-~]{1,128}", lines, payment, time(), time(), prop::option::of(time())).prop_map(
            move |(buyer, lines, payment, created_at, expires_at, confirmed_at)| {
                let secret = IdSecret::new(1, &[7; 32]);
                let buyer_id = buyer.parse().unwrap();
                let key = secret.order_key(&lane.sale, &buyer_id, &"k".parse().unwrap());
                let line = |(sku, quantity): (String, u32)| Line {
                    sku: sku.parse().unwrap(),
                    quantity: quantity.try_into().unwrap(),
                };
                Order {
                    id: secret.order_id(&lane, key),
                    buyer_id: Some(buyer_id),
                    status: Status::Held,
                    returned: lines.iter().take(1).cloned().map(line).collect(),
                    hold_seconds: confirmed_at.map(|_| 60),
                    asked: lines.iter().skip(1).cloned().map(line).collect(),
                    lines: lines.into_iter().map(line).collect(),
                    payment_id: payment.map(|p| p.parse().unwrap()),
                    created_at,
                    expires_at,
                    confirmed_at,
                    reacquired: confirmed_at.is_some(),
                    seq,
                }
            },
        )
    }

    /// Any step that may follow some status.
    fn order_step(lane: LaneId, seq: u64) -> impl Strategy<Value = Body> {
        let from = prop::option::of(prop::sample::select(Status::ALL.to_vec()));
        let cause = prop::sample::select(vec![Cause::Caller, Cause::Webhook, Cause::Sweeper]);
        let reason = prop::option::of("\\PC{1,50}");
        let kind = (0..8u8, any::<bool>());
        (order(lane, seq), kind, from, cause, reason).prop_filter_map(
            "a step that cannot follow",
            |(mut order, (kind, restock), from, cause, reason)| {
                let step = step(&order, kind, restock);
                order.status = step.leads(from, order.returned == order.lines)?;
                Some(Body::Order(OrderStep { order, step, from, cause, reason }))
            },
        )
    }

    fn step(order: &Order, kind: u8, restock: bool) -> Step {
        let payment_id = "pay".parse().unwrap();
        match kind {
            0 => Step::Held,
            1 => Step::PaymentBegun,
            2 => Step::PaymentFailed,
            3 => Step::Confirmed { released: order.lines.clone() },
            4 => Step::Cancelled,
            5 => Step::Expired,
            6 => Step::Returned {
                lines: order.lines.clone(),
                restock,
                request: restock
                    .then(|| ReturnRequest { key: order.id.key(), lines: order.lines.clone() }),
            },
            _ => Step::RefundDue(RefundDue {
                id: IdSecret::new(1, &[7; 32]).refund_id(&order.id, &payment_id),
                payment_id,
                reason: RefundReason::AlreadyPaid,
            }),
        }
    }

    fn adjusted(lane: LaneId, seq: u64) -> impl Strategy<Value = Body> {
        let counters = (0..=1_000_000i64, 0..=1_000_000i64, 0..=1_000_000i64, 0..=9i64);
        let text = prop::option::of("\\PC{1,50}");
        let delta = -1_000_000..=1_000_000i64;
        (counters, delta, any::<(bool, bool)>(), text, time()).prop_map(
            move |(counters, delta, (sets_total, undoes), note, created_at)| {
                let (available, held, sold, version) = counters;
                let before = Counters { available, held, sold, version };
                let secret = IdSecret::new(1, &[7; 32]);
                let id = |key: &str| {
                    let key = secret.adjustment_key(&lane.sale, &key.parse().unwrap());
                    secret.adjustment_id(&lane, key)
                };
                Body::Adjusted(Adjustment {
                    id: id("k"),
                    sku: "sku".parse().unwrap(),
                    delta,
                    set_total: sets_total.then(|| before.total() + delta),
                    before: before.into(),
                    note: AdjustmentNote { reason: Reason::Recount, reference: None, note },
                    actor: "ops".parse().unwrap(),
                    created_at,
                    seq,
                    undoes: undoes.then(|| id("undone")),
                    undone_by: None,
                })
            },
        )
    }

    fn sale_step() -> impl Strategy<Value = Body> {
        let actor: KeyName = "ops".parse().unwrap();
        let json = r#"{"name":"n","skus":[{"sku":"a","stock":5}]}"#;
        let definition: Box<Definition> = serde_json::from_str(json).unwrap();
        let stock = vec![StockSet { sku: "a".parse().unwrap(), delta: 5 }];
        let steps = vec![
            SaleStep::Defined { version: 3, definition, stock, actor: actor.clone() },
            SaleStep::Paused { actor: actor.clone() },
            SaleStep::Resumed { actor: actor.clone() },
            SaleStep::Closed { actor },
            SaleStep::Archived,
        ];
        prop::sample::select(steps).prop_map(Body::Sale)
    }

    fn event() -> impl Strategy<Value = Event> {
        ("[a-zA-Z0-9._-]{1,64}", 0..LANES_MAX, 1..=u32::MAX, 1..=SEQ_MAX).prop_flat_map(
            |(sale, lane, epoch, seq)| {
                let lane = LaneId { sale: sale.parse().unwrap(), lane };
                let body = prop_oneof![
                    order_step(lane.clone(), seq),
                    adjusted(lane.clone(), seq),
                    sale_step()
                ];
                (body, time(), prop::option::of("[ -~]{0,60}")).prop_map(
                    move |(body, at, traceparent)| Event {
                        lane: lane.clone(),
                        epoch,
                        seq,
                        at,
                        traceparent,
                        body,
                    },
                )
            },
        )
    }

    proptest! {
        #[test]
        fn an_event_reads_back_as_itself(event in event()) {
            prop_assert_eq!(read_back(&encode(&event)), Ok(Message::Event(Box::new(event))));
        }

        #[test]
        fn a_seal_reads_back_as_itself_and_damaged_never_panics(
            lane in 0..LANES_MAX, epoch in 1..=u32::MAX, token: u64, gives_up: bool, at in time(),
            cut: prop::sample::Index, byte: u8, header in 0usize..10, value: Vec<u8>,
        ) {
            let lane = LaneId { sale: "s".parse().unwrap(), lane };
            let seal = Seal { lane, epoch, token: RebuildToken::new(token), gives_up, at };
            let mut record = encode_seal(&seal);
            prop_assert_eq!(read_back(&record), Ok(Message::Seal(seal)));
            let mut headers = headers_of(&record);
            headers[header].1 = &value;
            let _ = decode(headers, &record.payload);
            let position = cut.index(record.payload.len());
            record.payload[position] = byte;
            let _ = read_back(&record);
            record.payload.truncate(position);
            prop_assert!(read_back(&record).is_err());
        }

        #[test]
        fn any_bytes_are_an_error_and_never_a_panic(
            event in event(), payload: Vec<u8>, header in 0usize..11, value: Vec<u8>,
        ) {
            let record = encode(&event);
            let mut headers = headers_of(&record);
            prop_assert!(decode(headers.clone(), &payload).is_err());
            headers[header].1 = &value;
            let _ = decode(headers, &record.payload);
        }

        #[test]
        fn a_damaged_body_never_panics(
            event in event(), cut: prop::sample::Index, byte: u8,
        ) {
            let mut record = encode(&event);
            let position = cut.index(record.payload.len());
            record.payload[position] = byte;
            let _ = read_back(&record);
            record.payload.truncate(position);
            prop_assert!(read_back(&record).is_err());
        }
    }

    fn paused() -> Record {
        encode(&Event {
            lane: LaneId { sale: "s".parse().unwrap(), lane: 0 },
            epoch: 1,
            seq: 9,
            at: Timestamp::from_millis(0),
            traceparent: None,
            body: Body::Sale(SaleStep::Paused { actor: "ops".parse().unwrap() }),
        })
    }

    #[test]
    fn an_unreadable_body_still_says_which_event_it_was() {
        let record = paused();
        let error = decode(headers_of(&record), b"{").unwrap_err();
        assert_eq!(error.position.unwrap().seq, 9);
        let error = decode([], b"{}").unwrap_err();
        assert_eq!((error.detail.as_str(), error.position), ("ce_saleid is missing", None));
    }

    #[test]
    fn a_step_that_cannot_follow_is_no_event() {
        for (status, from, detail) in [
            ("paying", "cancelled", "cannot lead from cancelled to paying"),
            ("held", "held", "cannot lead from held to held"),
        ] {
            let (headers, body) = documented()
                .into_iter()
                .find(|(headers, _)| {
                    headers.contains(&("ce_type", b"holdfast.order.payment_begun"))
                })
                .unwrap();
            let mut body: serde_json::Value = serde_json::from_slice(body).unwrap();
            (body["order"]["status"], body["from"]) = (status.into(), from.into());
            let error = decode(headers, body.to_string().as_bytes()).unwrap_err();
            assert!(error.detail.contains(detail), "{error}");
            assert!(error.position.is_some());
        }
    }

    #[test]
    fn an_event_that_this_version_does_not_know_is_named() {
        let mut record = paused();
        record.headers[3].1 = "holdfast.lane.moved".into();
        assert!(read_back(&record).unwrap_err().detail.contains("holdfast.lane.moved"));
    }

    #[test]
    fn a_body_of_another_place_is_refused() {
        let json = r#"{"adjustment":{}}"#;
        let mut record = paused();
        record.payload = json.into();
        assert!(read_back(&record).is_err());
    }

    #[test]
    fn impossible_counters_are_refused_before_they_are_added_up() {
        let body = r#"{"adjustment":{"id":"adj_AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA.s","sku":"a",
            "delta":9223372036854775807,"before":{"total":1,"available":9223372036854775807,"held":1,
            "sold":1,"version":9223372036854775807},"reason":"other","reference":null,"note":null,
            "actor":"ops","created_at":"2026-01-01T00:00:00Z","seq":9},
            "after":{"total":0,"available":0,"held":0,"sold":0,"version":0},"changes":[]}"#;
        let mut record = paused();
        record.headers[3].1 = "holdfast.stock.adjusted".into();
        record.payload = body.into();
        let error = read_back(&record).unwrap_err();
        assert_eq!(error.detail, "its counters are impossible");
    }

    type RawHeaders = Vec<(&'static str, &'static [u8])>;

    /// The records that the documentation shows, as headers and body.
    fn documented() -> Vec<(RawHeaders, &'static [u8])> {
        include_str!("../../docs/events.md")
            .split("```http\n")
            .skip(1)
            .map(|rest| {
                let (record, _) = rest.split_once("```").unwrap();
                let (head, body) = record.split_once("\n\n").unwrap();
                let header = |line: &'static str| {
                    let (name, value) = line.split_once(": ").unwrap();
                    (name, value.as_bytes())
                };
                (head.lines().map(header).collect(), body.as_bytes())
            })
            .collect()
    }

    #[test]
    fn the_documented_records_are_what_is_written() {
        let mut kinds = Vec::new();
        for (headers, body) in documented() {
            let (record, kind) = match decode(headers.clone(), body).unwrap() {
                Message::Event(event) => (encode(&event), event.body.kind()),
                Message::Seal(seal) => (encode_seal(&seal), SEALED),
            };
            assert_eq!(headers_of(&record), headers);
            let json = |bytes| serde_json::from_slice::<serde_json::Value>(bytes).unwrap();
            assert_eq!(json(&record.payload), json(body));
            kinds.push(kind);
        }
        kinds.sort_unstable();
        kinds.dedup();
        assert_eq!(kinds.len(), 15, "each type is shown: {kinds:?}");
    }
}
