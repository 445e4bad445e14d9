//! A lane as HTTP.md describes one, in plain Rust, as simple as it can be: it keeps orders and
//! adjustments and *derives* every counter from them. It shares nothing with `lua/` and `src/lanes`
//! but the words that commands and answers are spoken in.

use std::collections::BTreeMap;

use holdfast::domain::event::{
    Body, Cause, Event, OrderStep, ReturnRequest, SaleStep, Step, StockSet,
};
use holdfast::domain::ids::{AdjustmentId, EntityKey, IdSecret, LaneId, OrderId};
use holdfast::domain::names::{BuyerId, PaymentId, Sku};
use holdfast::domain::order::{Line, Order, RefundDue, RefundReason, Status};
use holdfast::domain::sale::{Definition, Phase};
use holdfast::domain::stock::{
    Adjustment, AdjustmentNote, Counters, Reason, TOTAL_MAX, TotalChange,
};
use holdfast::domain::time::Timestamp;
use holdfast::lanes::command::{
    Adjust, BeginPayment, Cancel, Command, Confirm, Define, FailPayment, IfVersion, PhaseChange,
    Reserve, Return, Undo,
};
use holdfast::lanes::reply::{
    Adjusted, Begun, Cancelled, ChangeRefusal, Confirmed, Defined, Expired, Failed, Marks, Phased,
    Previewed, Refusal, Reserved, Returned, Shortage, SkuStock, Stock, Undone,
};

use crate::sale::Outcome;

#[derive(Debug, Clone)]
struct Entry {
    order: Order,
    /// As it was asked for: part of what the request meant.
    hold_seconds: Option<u32>,
    asked: Vec<Line>,
    /// Payments that must be given back.
    refunds: BTreeMap<PaymentId, RefundReason>,
    /// Returns as they were asked for.
    returns: BTreeMap<EntityKey, (bool, Vec<Line>)>,
    /// What came back and is not on sale again.
    lost: Vec<Line>,
}

impl Entry {
    fn new(order: Order, hold_seconds: Option<u32>) -> Self {
        Self {
            asked: order.lines.clone(),
            order,
            hold_seconds,
            refunds: BTreeMap::new(),
            returns: BTreeMap::new(),
            lost: Vec::new(),
        }
    }
}

fn units_of(lines: &[Line], sku: Option<&Sku>) -> i64 {
    let counted = lines.iter().filter(|line| sku.is_none_or(|sku| line.sku == *sku));
    counted.map(|line| i64::from(line.quantity.get())).sum()
}

/// `from` without `taken`; `None` where that is no part of it.
fn minus(from: &[Line], taken: &[Line]) -> Option<Vec<Line>> {
    if taken.iter().any(|line| units_of(from, Some(&line.sku)) < units_of(taken, Some(&line.sku))) {
        return None;
    }
    let rest = |line: &Line| {
        let units = line.quantity.get() - units_of(taken, Some(&line.sku)) as u32;
        units.try_into().ok().map(|quantity| Line { sku: line.sku.clone(), quantity })
    };
    Some(from.iter().filter_map(rest).collect())
}

fn sorted_lines(lines: &[Line]) -> Vec<Line> {
    let mut lines = lines.to_vec();
    lines.sort_by(|a, b| a.sku.cmp(&b.sku));
    lines
}

#[derive(Debug, Clone)]
pub struct Model {
    lane: LaneId,
    secret: IdSecret,
    outbox_max: u64,
    pub marks: Marks,
    trimmed: u64,
    version: u64,
    digest: String,
    definition: Option<Definition>,
    paused: bool,
    closed_at: Option<Timestamp>,
    archived: bool,
    orders: BTreeMap<EntityKey, Entry>,
    adjustments: BTreeMap<EntityKey, Adjustment>,
    /// Deadlines that no `expire` has come by yet, those of settled orders included.
    deadlines: Vec<(Timestamp, EntityKey)>,
    events: Vec<Event>,
}

/// What the model cannot know beforehand.
pub struct Circumstances<'a> {
    /// The lane's time, as it answered.
    pub now: Timestamp,
    /// What was due: `now` or the caller's clock, whichever is earlier.
    pub due_at: Timestamp,
    /// Which holds ended in which order, where they were due at the same moment.
    pub ended: &'a [EntityKey],
}

impl Model {
    /// A lane that is not there yet.
    pub fn new(lane: LaneId, secret: IdSecret, outbox_max: u64) -> Self {
        Self {
            lane,
            secret,
            outbox_max,
            marks: Marks::default(),
            trimmed: 0,
            version: 0,
            digest: String::new(),
            definition: None,
            paused: false,
            closed_at: None,
            archived: false,
            orders: BTreeMap::new(),
            adjustments: BTreeMap::new(),
            deadlines: Vec::new(),
            events: Vec::new(),
        }
    }

    /// What the lane must answer.
    pub fn apply(&mut self, command: &Command, at: &Circumstances) -> Outcome {
        let now = at.now;
        if self.definition.is_none() && !matches!(command, Command::Define(_)) {
            return Outcome::Missing;
        }
        match command {
            Command::Reserve(c) => Outcome::Reserved(self.reserve(c, now)),
            Command::BeginPayment(c) => Outcome::Begun(self.begin(c, now)),
            Command::FailPayment(c) => Outcome::Failed(self.fail(c, now)),
            Command::Confirm(c) => Outcome::Confirmed(self.confirm(c, now)),
            Command::Return(c) => Outcome::Returned(self.take_back(c, now)),
            Command::Cancel(c) => Outcome::Cancelled(self.cancel(c, now)),
            Command::Expire { .. } => Outcome::Expired(self.expire(at)),
            Command::Get { id } => Outcome::Got(self.order(id.key())),
            Command::Stock => Outcome::Stock(self.stock()),
            Command::Preview(c) => {
                Outcome::Previewed(match self.delta(&c.sku, c.change, c.if_version.as_ref()) {
                    Ok(delta) => Previewed::Possible { delta, before: self.counters(&c.sku) },
                    Err(refusal) => Previewed::Refused(refusal),
                })
            }
            Command::Adjust(c) => Outcome::Adjusted(self.adjust(c, now)),
            Command::Undo(c) => Outcome::Undone(self.undo(c, now)),
            Command::Define(c) => self.define(c, now),
            Command::Phase(c) => {
                let actor = c.actor.clone();
                let (step, done) = match c.change {
                    _ if self.archived => return Outcome::Phased(Phased::Archived),
                    PhaseChange::Close => (SaleStep::Closed { actor }, self.closed_at.is_some()),
                    _ if self.closed_at.is_some() => return Outcome::Phased(Phased::Closed),
                    PhaseChange::Pause => (SaleStep::Paused { actor }, self.paused),
                    PhaseChange::Resume => (SaleStep::Resumed { actor }, !self.paused),
                };
                if !done {
                    match c.change {
                        PhaseChange::Close => self.closed_at = Some(now),
                        change => self.paused = change == PhaseChange::Pause,
                    }
                    self.emit(now, c.trace.as_ref(), Body::Sale(step));
                }
                Outcome::Phased(Phased::Done)
            }
            Command::Archive { retention_ms } => {
                Outcome::Archived(self.archive(*retention_ms, now))
            }
            Command::Marks => Outcome::Marks,
        }
    }

    /// The relay's word on how far Kafka and the database have got.
    pub fn advance(&mut self, logged: u64, recorded: u64) {
        let marks = &mut self.marks;
        marks.recorded = marks.recorded.max(recorded);
        marks.logged = marks.logged.max(marks.recorded).max(logged);
        let crowded = marks.seq - marks.recorded > self.outbox_max / 2;
        self.trimmed = self.trimmed.max(if crowded { marks.logged } else { marks.recorded });
    }

    /// Takes the events that `apply` has caused since the last time.
    pub fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    pub fn counters(&self, sku: &Sku) -> Counters {
        let skus = &self.definition.as_ref().expect("it is defined").skus;
        let initial = skus.iter().find(|s| s.sku == *sku).map_or(0, |s| s.stock);
        let adjustments: Vec<_> = self.adjustments.values().filter(|a| a.sku == *sku).collect();
        let units = |e: &Entry, status: [Status; 2]| match status.contains(&e.order.status) {
            true => units_of(&e.order.lines, Some(sku)) - units_of(&e.order.returned, Some(sku)),
            false => 0,
        };
        let orders = || self.orders.values();
        let held = orders().map(|e| units(e, [Status::Held, Status::Paying])).sum();
        let sold = orders().map(|e| units(e, [Status::Confirmed, Status::Returned])).sum();
        let lost = orders().map(|e| units_of(&e.lost, Some(sku))).sum::<i64>();
        let total = initial + adjustments.iter().map(|a| a.delta).sum::<i64>() - lost;
        Counters { available: total - held - sold, held, sold, version: adjustments.len() as i64 }
    }

    /// Units that the buyer holds or has bought: of one SKU, or of all.
    pub fn units(&self, buyer: &BuyerId, sku: Option<&Sku>) -> u64 {
        let of_buyer = self.orders.values().map(|e| &e.order).filter(|order| {
            order.buyer_id.as_ref() == Some(buyer)
                && !matches!(order.status, Status::Cancelled | Status::Expired)
        });
        of_buyer
            .map(|order| units_of(&order.lines, sku) - units_of(&order.returned, sku))
            .sum::<i64>() as u64
    }

    pub fn orders(&self) -> impl Iterator<Item = (&Order, Option<u32>)> {
        self.orders.values().map(|entry| (&entry.order, entry.hold_seconds))
    }

    pub fn adjustments(&self) -> impl Iterator<Item = &Adjustment> {
        self.adjustments.values()
    }

    pub fn definition(&self) -> Option<&Definition> {
        self.definition.as_ref()
    }

    /// Deadlines that an `expire` has yet to come by.
    pub fn deadlines(&self) -> impl Iterator<Item = Timestamp> {
        self.deadlines.iter().map(|(at, _)| *at)
    }

    /// Every reason why this definition cannot replace the present one; a lane gives one of them.
    pub fn in_use(&self, new: &Definition) -> Vec<String> {
        let old = self.definition.iter().flat_map(|definition| &definition.skus);
        if self.orders.is_empty() && self.adjustments.is_empty() {
            return Vec::new();
        }
        old.filter_map(|old| match new.skus.iter().find(|new| new.sku == old.sku) {
            None => Some(format!("removes SKU {}", old.sku)),
            Some(new) if new.stock != old.stock => {
                Some(format!("changes the stock of SKU {}", old.sku))
            }
            Some(_) => None,
        })
        .collect()
    }

    fn emit(&mut self, at: Timestamp, trace: Option<&String>, body: Body) {
        self.marks.seq += 1;
        self.events.push(Event {
            lane: self.lane.clone(),
            epoch: self.marks.epoch,
            seq: self.marks.seq,
            at,
            traceparent: trace.cloned(),
            body,
        });
    }

    fn order(&self, key: EntityKey) -> Option<Order> {
        self.orders.get(&key).map(|entry| entry.order.clone())
    }

    /// Keeps the order as it is after its next event.
    fn step(
        &mut self,
        mut entry: Entry,
        step: Step,
        from: Option<Status>,
        at: Timestamp,
        cause: Cause,
        (trace, reason): (Option<&String>, Option<String>),
    ) -> Order {
        entry.order.seq = self.marks.seq + 1;
        let order = entry.order.clone();
        self.orders.insert(order.id.key(), entry);
        let step = OrderStep { order: order.clone(), step, from, cause, reason };
        self.emit(at, trace, Body::Order(step));
        order
    }

    fn reserve(&mut self, c: &Reserve, now: Timestamp) -> Reserved {
        if let Some(known) = self.orders.get(&c.id.key()) {
            let same = known.hold_seconds == c.hold_seconds
                && sorted_lines(&known.asked) == sorted_lines(&c.lines);
            let tombstone = known.order.lines.is_empty();
            return match same || tombstone {
                true => Reserved::Replayed(known.order.clone()),
                false => Reserved::KeyReused,
            };
        }
        match self.refusal(c, now) {
            Some(refusal) => Reserved::Refused(refusal),
            None => {
                let definition = self.definition.as_ref().expect("it is defined");
                let hold = c.hold_seconds.unwrap_or(definition.hold_seconds);
                let order = Order {
                    id: c.id.clone(),
                    buyer_id: Some(c.buyer.clone()),
                    status: Status::Held,
                    lines: c.lines.clone(),
                    returned: Vec::new(),
                    reacquired: false,
                    payment_id: None,
                    created_at: now,
                    expires_at: Timestamp::from_millis(now.millis() + i64::from(hold) * 1000),
                    confirmed_at: None,
                    hold_seconds: c.hold_seconds,
                    asked: Vec::new(),
                    seq: 0,
                };
                self.deadlines.push((order.expires_at, c.id.key()));
                let entry = Entry::new(order, c.hold_seconds);
                let words = (c.trace.as_ref(), None);
                Reserved::Held(self.step(entry, Step::Held, None, now, Cause::Caller, words))
            }
        }
    }

    fn refusal(&self, c: &Reserve, now: Timestamp) -> Option<Refusal> {
        let definition = self.definition.as_ref().expect("it is defined");
        if self.marks.seq - self.trimmed >= self.outbox_max {
            return Some(Refusal::Overloaded);
        }
        if self.archived {
            return Some(Refusal::Archived);
        }
        if self.closed_at.is_some() || definition.closes_at.is_some_and(|closes| now >= closes) {
            return Some(Refusal::Closed);
        }
        if let Some(opens_at) = definition.opens_at.filter(|opens| now < *opens) {
            return Some(Refusal::NotOpen { opens_at });
        }
        if self.paused {
            return Some(Refusal::Paused);
        }
        let sold_here = |line: &&Line| definition.skus.iter().any(|s| s.sku == line.sku);
        if let Some(unknown) = c.lines.iter().find(|line| !sold_here(line)) {
            return Some(Refusal::UnknownSku { sku: unknown.sku.clone() });
        }
        if c.hold_seconds.is_some_and(|hold| hold > definition.hold_seconds) {
            return Some(Refusal::HoldTooLong { hold_seconds_max: definition.hold_seconds });
        }
        self.short_of(&c.buyer, &c.lines)
    }

    /// Why this buyer cannot have these lines now.
    fn short_of(&self, buyer: &BuyerId, wanted: &[Line]) -> Option<Refusal> {
        let definition = self.definition.as_ref().expect("it is defined");
        let over = |limit: Option<u32>, already: u64, more: u64, sku: Option<&Sku>| {
            let limit = u64::from(limit?);
            (already + more > limit).then(|| Refusal::PurchaseLimit {
                limit,
                already,
                sku: sku.cloned(),
            })
        };
        for line in wanted {
            let sku = definition.skus.iter().find(|s| s.sku == line.sku).expect("sold here");
            let limit = sku.per_buyer_limit;
            let already = self.units(buyer, Some(&line.sku));
            let more = line.quantity.get().into();
            if let Some(refusal) = over(limit, already, more, Some(&line.sku)) {
                return Some(refusal);
            }
        }
        let more = units_of(wanted, None) as u64;
        let already = self.units(buyer, None);
        if let Some(refusal) = over(definition.per_buyer_limit, already, more, None) {
            return Some(refusal);
        }
        let short = |line: &Line| {
            let available = self.counters(&line.sku).available as u64;
            let requested = line.quantity.get().into();
            let shortage = Shortage { sku: line.sku.clone(), requested, available };
            (requested > available).then_some(shortage)
        };
        let lines: Vec<_> = wanted.iter().filter_map(short).collect();
        (!lines.is_empty()).then_some(Refusal::SoldOut { lines })
    }

    /// Notes that the payment must be given back.
    fn refund(
        &mut self,
        mut entry: Entry,
        payment: &PaymentId,
        reason: RefundReason,
        at: Timestamp,
        cause: Cause,
        trace: Option<&String>,
    ) -> (RefundReason, Order) {
        entry.refunds.insert(payment.clone(), reason);
        let id = self.secret.refund_id(&entry.order.id, payment);
        let due = Step::RefundDue(RefundDue { id, payment_id: payment.clone(), reason });
        let from = Some(entry.order.status);
        (reason, self.step(entry, due, from, at, cause, (trace, None)))
    }

    fn begin(&mut self, c: &BeginPayment, now: Timestamp) -> Begun {
        let Some(mut entry) = self.orders.get(&c.id.key()).cloned() else { return Begun::Unknown };
        if let Some(reason) = entry.refunds.get(&c.payment) {
            return Begun::Refund(*reason, entry.order);
        }
        let from = entry.order.status;
        if !matches!(entry.order.status_at(now), Status::Held | Status::Paying) {
            return Begun::Over(entry.order);
        }
        if entry.order.payment_id.as_ref() == Some(&c.payment) {
            return Begun::Same(entry.order);
        }
        let definition = self.definition.as_ref().expect("it is defined");
        let after = |from: Timestamp, seconds: u32| from.millis() + i64::from(seconds) * 1000;
        let longest = definition.max_hold_seconds.expect("a checked definition");
        let until = after(now, definition.payment_grace_seconds)
            .min(after(entry.order.created_at, longest));
        if until > entry.order.expires_at.millis() {
            entry.order.expires_at = Timestamp::from_millis(until);
            self.deadlines.push((entry.order.expires_at, c.id.key()));
        }
        entry.order.status = Status::Paying;
        entry.order.payment_id = Some(c.payment.clone());
        let words = (c.trace.as_ref(), None);
        Begun::Begun(self.step(entry, Step::PaymentBegun, Some(from), now, Cause::Caller, words))
    }

    fn fail(&mut self, c: &FailPayment, now: Timestamp) -> Failed {
        let Some(mut entry) = self.orders.get(&c.id.key()).cloned() else { return Failed::Unknown };
        let runs = entry.order.payment_id.as_ref() == Some(&c.payment);
        if entry.order.status_at(now) != Status::Paying || !runs {
            return Failed::Ignored(entry.order);
        }
        entry.order.status = Status::Held;
        entry.order.payment_id = None;
        let words = (c.trace.as_ref(), None);
        let from = Some(Status::Paying);
        Failed::Failed(self.step(entry, Step::PaymentFailed, from, now, c.cause, words))
    }

    fn confirm(&mut self, c: &Confirm, now: Timestamp) -> Confirmed {
        let known = self.orders.get(&c.id.key()).cloned();
        let bought = |order: &Order| matches!(order.status, Status::Confirmed | Status::Returned);
        if let Some(entry) = &known {
            if let Some(reason) = entry.refunds.get(&c.payment) {
                return Confirmed::Refund(*reason, entry.order.clone());
            }
            if bought(&entry.order) && entry.order.payment_id.as_ref() == Some(&c.payment) {
                return Confirmed::Same(entry.order.clone());
            }
        }
        if self.archived {
            return Confirmed::Archived;
        }
        let trace = c.trace.as_ref();
        let (mut entry, due) = match known {
            None => {
                let entry = tombstone(&c.id, None, now);
                let words = (trace, None);
                self.step(entry, Step::Cancelled, None, now, c.cause, words);
                let entry = self.orders[&c.id.key()].clone();
                (entry, Some(RefundReason::OrderCancelled))
            }
            Some(entry) if bought(&entry.order) => (entry, Some(RefundReason::AlreadyPaid)),
            Some(entry) if entry.order.status == Status::Cancelled => {
                (entry, Some(RefundReason::OrderCancelled))
            }
            Some(entry) => (entry, None),
        };
        let wanted = match c.lines.is_empty() {
            true => entry.order.lines.clone(),
            false => c.lines.clone(),
        };
        let rest = minus(&entry.order.lines, &wanted);
        let due = match (due, &rest) {
            (None, None) if c.cause == Cause::Caller => return Confirmed::NotPart,
            (None, None) => Some(RefundReason::LinesMismatch),
            (None, Some(_)) if entry.order.status == Status::Expired => {
                let definition = self.definition.as_ref().expect("it is defined");
                let sold_here = |line: &Line| definition.skus.iter().any(|s| s.sku == line.sku);
                let buyer = entry.order.buyer_id.clone().expect("only tombstones have none");
                let gone =
                    !wanted.iter().all(sold_here) || self.short_of(&buyer, &wanted).is_some();
                gone.then_some(RefundReason::PaymentTooLate)
            }
            (due, _) => due,
        };
        if let Some(reason) = due {
            let (reason, order) = self.refund(entry, &c.payment, reason, now, c.cause, trace);
            return Confirmed::Refund(reason, order);
        }
        let rest = rest.expect("else something is due");
        let from = entry.order.status;
        let released = if from == Status::Expired { Vec::new() } else { rest.clone() };
        entry.order.reacquired = entry.order.status_at(now) == Status::Expired;
        if !rest.is_empty() {
            if entry.order.asked.is_empty() {
                entry.order.asked = std::mem::take(&mut entry.order.lines);
            }
            entry.order.lines = wanted;
        }
        entry.order.status = Status::Confirmed;
        entry.order.payment_id = Some(c.payment.clone());
        entry.order.confirmed_at = Some(now);
        let step = Step::Confirmed { released };
        Confirmed::Confirmed(self.step(entry, step, Some(from), now, c.cause, (trace, None)))
    }

    fn take_back(&mut self, c: &Return, now: Timestamp) -> Returned {
        let Some(mut entry) = self.orders.get(&c.id.key()).cloned() else {
            return Returned::Unknown;
        };
        if let Some((restock, lines)) = entry.returns.get(&c.key) {
            let same = *restock == c.restock && sorted_lines(lines) == sorted_lines(&c.lines);
            return match same {
                true => Returned::Replayed(entry.order),
                false => Returned::KeyReused,
            };
        }
        if entry.order.status != Status::Confirmed {
            return Returned::Over(entry.order);
        }
        if self.archived {
            return Returned::Archived;
        }
        let left = minus(&entry.order.lines, &entry.order.returned).expect("no more than it has");
        let wanted = if c.lines.is_empty() { left.clone() } else { c.lines.clone() };
        let Some(rest) = minus(&left, &wanted) else { return Returned::Exceeds(entry.order) };
        entry.returns.insert(c.key, (c.restock, c.lines.clone()));
        if !c.restock {
            entry.lost.extend(wanted.iter().cloned());
        }
        entry.order.returned = minus(&entry.order.lines, &rest).expect("what is left is a part");
        if rest.is_empty() {
            entry.order.status = Status::Returned;
        }
        let step = Step::Returned {
            lines: wanted,
            restock: c.restock,
            request: Some(ReturnRequest { key: c.key, lines: c.lines.clone() }),
        };
        let (from, words) = (Some(Status::Confirmed), (c.trace.as_ref(), None));
        Returned::Returned(self.step(entry, step, from, now, Cause::Caller, words))
    }

    fn cancel(&mut self, c: &Cancel, now: Timestamp) -> Cancelled {
        let known = self.orders.get(&c.id.key()).cloned();
        let from = known.as_ref().map(|entry| entry.order.status);
        let mut entry = match (known, &c.tombstone_for) {
            (Some(known), _) if known.order.status == Status::Cancelled => {
                return Cancelled::Same(known.order);
            }
            (Some(known), _)
                if matches!(known.order.status, Status::Confirmed | Status::Returned) =>
            {
                return Cancelled::Sold(known.order);
            }
            (None, None) => return Cancelled::Unknown,
            _ if self.archived => return Cancelled::Archived,
            (Some(known), _) => known,
            (None, Some(buyer)) => tombstone(&c.id, Some(buyer), now),
        };
        entry.order.status = Status::Cancelled;
        entry.order.payment_id = None;
        let words = (c.trace.as_ref(), c.reason.clone());
        Cancelled::Cancelled(self.step(entry, Step::Cancelled, from, now, Cause::Caller, words))
    }

    fn expire(&mut self, at: &Circumstances) -> Expired {
        let due_at = at.due_at;
        let (mut due, later): (Vec<_>, _) =
            self.deadlines.drain(..).partition(|(deadline, _)| *deadline <= due_at);
        self.deadlines = later;
        due.sort_by_key(|(deadline, key)| (*deadline, at.ended.iter().position(|k| k == key)));
        let (mut count, mut first_deadline) = (0, None);
        for (deadline, key) in due {
            let entry = self.orders.get_mut(&key).expect("a deadline is some order's");
            let from = entry.order.status;
            let unpaid = matches!(from, Status::Held | Status::Paying);
            if unpaid && entry.order.expires_at <= due_at {
                entry.order.status = Status::Expired;
                entry.order.payment_id = None;
                let entry = entry.clone();
                let words = (None, None);
                self.step(entry, Step::Expired, Some(from), at.now, Cause::Sweeper, words);
                count += 1;
                first_deadline = first_deadline.or(Some(deadline));
            }
        }
        Expired { count, first_deadline, more: false, next_deadline: self.deadlines().min() }
    }

    fn stock(&self) -> Stock {
        let definition = self.definition.as_ref().expect("it is defined");
        let phase = Phase {
            opens_at: definition.opens_at,
            closes_at: definition.closes_at,
            paused: self.paused,
            closed: self.closed_at.is_some(),
            archived: self.archived,
        };
        let sku = |s: &holdfast::domain::sale::SkuDefinition| SkuStock {
            sku: s.sku.clone(),
            counters: self.counters(&s.sku),
            per_buyer_limit: s.per_buyer_limit.map(u64::from),
        };
        Stock { version: self.version, phase, skus: definition.skus.iter().map(sku).collect() }
    }

    /// The units that a change would add, or why it cannot be.
    fn delta(
        &self,
        sku: &Sku,
        change: TotalChange,
        if_version: Option<&IfVersion>,
    ) -> Result<i64, ChangeRefusal> {
        if self.archived {
            return Err(ChangeRefusal::Archived);
        }
        let skus = &self.definition.as_ref().expect("it is defined").skus;
        if skus.iter().all(|s| s.sku != *sku) {
            return Err(ChangeRefusal::UnknownSku);
        }
        let before = self.counters(sku);
        match if_version {
            None if matches!(change, TotalChange::To(_)) => {
                return Err(ChangeRefusal::PreconditionRequired);
            }
            Some(IfVersion::OneOf(versions))
                if versions.iter().all(|version| *version != before.version as u64) =>
            {
                return Err(ChangeRefusal::PreconditionFailed(before));
            }
            _ => {}
        }
        let delta = match change {
            TotalChange::By(delta) => delta,
            TotalChange::To(total) => total - before.total(),
        };
        if !(0..=TOTAL_MAX).contains(&(before.total() + delta)) {
            return Err(ChangeRefusal::OutOfRange(before));
        }
        if before.available + delta < 0 {
            return Err(ChangeRefusal::StockInUse(before));
        }
        Ok(delta)
    }

    fn undone_by(&self, id: &AdjustmentId) -> Option<AdjustmentId> {
        let undo = self.adjustments.values().find(|other| other.undoes.as_ref() == Some(id));
        undo.map(|undo| undo.id.clone())
    }

    fn replayed(&self, known: &Adjustment) -> Adjustment {
        Adjustment { undone_by: self.undone_by(&known.id), ..known.clone() }
    }

    fn adjust(&mut self, c: &Adjust, now: Timestamp) -> Adjusted {
        if let Some(known) = self.adjustments.get(&c.id.key()) {
            let asked = match known.set_total {
                None => TotalChange::By(known.delta),
                Some(total) => TotalChange::To(total),
            };
            let same = known.undoes.is_none()
                && (&known.sku, asked, &known.note) == (&c.sku, c.change, &c.note);
            return match same {
                true => Adjusted::Replayed(self.replayed(known)),
                false => Adjusted::KeyReused,
            };
        }
        let delta = match self.delta(&c.sku, c.change, c.if_version.as_ref()) {
            Ok(delta) => delta,
            Err(refusal) => return Adjusted::Refused(refusal),
        };
        let adjustment = Adjustment {
            id: c.id.clone(),
            sku: c.sku.clone(),
            delta,
            set_total: match c.change {
                TotalChange::By(_) => None,
                TotalChange::To(total) => Some(total),
            },
            before: self.counters(&c.sku).into(),
            note: c.note.clone(),
            actor: c.actor.clone(),
            created_at: now,
            seq: self.marks.seq + 1,
            undoes: None,
            undone_by: None,
        };
        Adjusted::Adjusted(self.record(adjustment, c.trace.as_ref()))
    }

    fn undo(&mut self, c: &Undo, now: Timestamp) -> Undone {
        if let Some(known) = self.adjustments.get(&c.id.key()) {
            let same = known.undoes.as_ref() == Some(&c.undoes) && known.note.note == c.note;
            return match same {
                true => Undone::Replayed(self.replayed(known)),
                false => Undone::KeyReused,
            };
        }
        let Some(original) = self.adjustments.get(&c.undoes.key()).cloned() else {
            return Undone::Unknown;
        };
        if self.archived {
            return Undone::Archived;
        }
        if let Some(by) = self.undone_by(&original.id) {
            return Undone::AlreadyUndone { by };
        }
        let (sku, counters) = (original.sku.clone(), self.counters(&original.sku));
        if counters.available < original.delta {
            return Undone::StockInUse { sku, counters };
        }
        if counters.total() - original.delta > TOTAL_MAX {
            return Undone::OutOfRange { sku, counters };
        }
        let adjustment = Adjustment {
            id: c.id.clone(),
            sku,
            delta: -original.delta,
            set_total: None,
            before: counters.into(),
            note: AdjustmentNote {
                reason: Reason::Correction,
                reference: original.note.reference,
                note: c.note.clone(),
            },
            actor: c.actor.clone(),
            created_at: now,
            seq: self.marks.seq + 1,
            undoes: Some(original.id),
            undone_by: None,
        };
        Undone::Undone(self.record(adjustment, c.trace.as_ref()))
    }

    fn record(&mut self, adjustment: Adjustment, trace: Option<&String>) -> Adjustment {
        self.adjustments.insert(adjustment.id.key(), adjustment.clone());
        self.emit(adjustment.created_at, trace, Body::Adjusted(adjustment.clone()));
        adjustment
    }

    fn define(&mut self, c: &Define, now: Timestamp) -> Outcome {
        if self.definition.is_none() {
            match c.create_epoch {
                None => return Outcome::Missing,
                Some(epoch) => self.marks.epoch = epoch,
            }
        } else if self.archived {
            return Outcome::Defined(Defined::Archived);
        } else if c.version == self.version && c.digest == self.digest {
            return Outcome::Defined(Defined::Same);
        } else if c.version <= self.version {
            return Outcome::Defined(Defined::Stale { version: self.version });
        }
        if let Some(why) = self.in_use(&c.definition).into_iter().next() {
            return Outcome::Defined(Defined::InUse { why });
        }
        let old = self.definition.replace(c.definition.clone());
        let old = old.map(|definition| definition.skus).unwrap_or_default();
        let mut moved = BTreeMap::<Sku, i64>::new();
        for sku in &old {
            *moved.entry(sku.sku.clone()).or_default() -= sku.stock;
        }
        for sku in &c.definition.skus {
            *moved.entry(sku.sku.clone()).or_default() += sku.stock;
        }
        let moved = moved.into_iter().filter(|(_, delta)| *delta != 0);
        (self.version, self.digest) = (c.version, c.digest.clone());
        let step = SaleStep::Defined {
            version: c.version,
            definition: Box::new(c.definition.clone()),
            stock: moved.map(|(sku, delta)| StockSet { sku, delta }).collect(),
            actor: c.actor.clone(),
        };
        self.emit(now, c.trace.as_ref(), Body::Sale(step));
        Outcome::Defined(Defined::Defined)
    }

    fn archive(&mut self, retention_ms: u64, now: Timestamp) -> bool {
        if self.archived {
            return true;
        }
        let closes = self.definition.as_ref().and_then(|definition| definition.closes_at);
        let ended = [self.closed_at, closes.filter(|closes| now >= *closes)];
        let over = ended.into_iter().flatten().min().is_some_and(|ended| {
            now.millis() - ended.millis() >= i64::try_from(retention_ms).unwrap_or(i64::MAX)
        });
        let unpaid = |entry: &Entry| matches!(entry.order.status, Status::Held | Status::Paying);
        let holds = self.orders.values().any(unpaid);
        if !over || holds || self.marks.recorded < self.marks.seq {
            return false;
        }
        self.archived = true;
        self.emit(now, None, Body::Sale(SaleStep::Archived));
        true
    }
}

/// An order that was over before it came.
fn tombstone(id: &OrderId, buyer: Option<&BuyerId>, now: Timestamp) -> Entry {
    let order = Order {
        id: id.clone(),
        buyer_id: buyer.cloned(),
        status: Status::Cancelled,
        lines: Vec::new(),
        returned: Vec::new(),
        payment_id: None,
        created_at: now,
        expires_at: now,
        confirmed_at: None,
        hold_seconds: None,
        asked: Vec::new(),
        reacquired: false,
        seq: 0,
    };
    Entry::new(order, None)
}
