//! A lane as HTTP.md describes one, in plain Rust, as simple as it can be: it keeps orders and
//! adjustments and *derives* every counter from them. It shares nothing with `lua/` and `src/lanes`
//! but the words that commands and answers are spoken in.

use std::collections::BTreeMap;

use holdfast::domain::event::{Body, Cause, Event, OrderStep, SaleStep, StockSet};
use holdfast::domain::ids::{AdjustmentId, EntityKey, LaneId};
use holdfast::domain::names::{BuyerId, Sku};
use holdfast::domain::order::{Line, Order, Status};
use holdfast::domain::sale::{Definition, Phase};
use holdfast::domain::stock::{
    Adjustment, AdjustmentNote, Counters, Reason, TOTAL_MAX, TotalChange,
};
use holdfast::domain::time::Timestamp;
use holdfast::lanes::command::{
    Adjust, Cancel, Command, Confirm, Define, IfVersion, PhaseChange, Reserve, Undo,
};
use holdfast::lanes::reply::{
    Adjusted, Cancelled, ChangeRefusal, Confirmed, Defined, Expired, Marks, Phased, Previewed,
    Refusal, Reserved, Shortage, SkuStock, Stock, Undone,
};

use crate::sale::Outcome;

#[derive(Debug, Clone)]
struct Entry {
    order: Order,
    /// As it was asked for: part of what the request meant.
    hold_seconds: Option<u32>,
}

#[derive(Debug, Clone)]
pub struct Model {
    lane: LaneId,
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
    pub fn new(lane: LaneId, outbox_max: u64) -> Self {
        Self {
            lane,
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
            Command::Confirm(c) => Outcome::Confirmed(self.confirm(c, now)),
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
        if logged.max(recorded) > marks.seq {
            return;
        }
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
        let units = |status| -> i64 {
            let of_status = self.orders.values().filter(|e| e.order.status == status);
            let lines = of_status.flat_map(|e| &e.order.lines);
            lines.filter(|l| l.sku == *sku).map(|l| i64::from(l.quantity.get())).sum()
        };
        let (held, sold) = (units(Status::Held), units(Status::Confirmed));
        let total = initial + adjustments.iter().map(|a| a.delta).sum::<i64>();
        Counters { available: total - held - sold, held, sold, version: adjustments.len() as i64 }
    }

    /// Units that the buyer holds or has bought: of one SKU, or of all.
    pub fn units(&self, buyer: &BuyerId, sku: Option<&Sku>) -> u64 {
        let of_buyer = self.orders.values().map(|e| &e.order).filter(|order| {
            order.buyer_id == *buyer && matches!(order.status, Status::Held | Status::Confirmed)
        });
        let lines = of_buyer.flat_map(|order| &order.lines);
        let counted = lines.filter(|line| sku.is_none_or(|sku| line.sku == *sku));
        counted.map(|line| u64::from(line.quantity.get())).sum()
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
        from: Option<Status>,
        at: Timestamp,
        cause: Cause,
        (trace, reason): (Option<&String>, Option<String>),
    ) -> Order {
        entry.order.seq = self.marks.seq + 1;
        let order = entry.order.clone();
        self.orders.insert(order.id.key(), entry);
        let step = OrderStep { order: order.clone(), from, cause, reason };
        self.emit(at, trace, Body::Order(step));
        order
    }

    fn reserve(&mut self, c: &Reserve, now: Timestamp) -> Reserved {
        if let Some(known) = self.orders.get(&c.id.key()) {
            let sorted = |lines: &[Line]| {
                let mut lines: Vec<_> = lines.iter().map(|l| (l.sku.clone(), l.quantity)).collect();
                lines.sort();
                lines
            };
            let same = known.hold_seconds == c.hold_seconds
                && sorted(&known.order.lines) == sorted(&c.lines);
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
                    buyer_id: c.buyer.clone(),
                    status: Status::Held,
                    lines: c.lines.clone(),
                    payment_id: None,
                    created_at: now,
                    expires_at: Timestamp::from_millis(now.millis() + i64::from(hold) * 1000),
                    confirmed_at: None,
                    seq: 0,
                };
                self.deadlines.push((order.expires_at, c.id.key()));
                let entry = Entry { order, hold_seconds: c.hold_seconds };
                Reserved::Held(self.step(entry, None, now, Cause::Caller, (c.trace.as_ref(), None)))
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
        let over = |limit: Option<u32>, already: u64, more: u64, sku: Option<&Sku>| {
            let limit = u64::from(limit?);
            (already + more > limit).then(|| Refusal::PurchaseLimit {
                limit,
                already,
                sku: sku.cloned(),
            })
        };
        for line in &c.lines {
            let sku = definition.skus.iter().find(|s| s.sku == line.sku).expect("sold here");
            let limit = sku.per_buyer_limit;
            let already = self.units(&c.buyer, Some(&line.sku));
            let more = line.quantity.get().into();
            if let Some(refusal) = over(limit, already, more, Some(&line.sku)) {
                return Some(refusal);
            }
        }
        let more = c.lines.iter().map(|line| u64::from(line.quantity.get())).sum();
        let already = self.units(&c.buyer, None);
        if let Some(refusal) = over(definition.per_buyer_limit, already, more, None) {
            return Some(refusal);
        }
        let short = |line: &Line| {
            let available = self.counters(&line.sku).available as u64;
            let requested = line.quantity.get().into();
            let shortage = Shortage { sku: line.sku.clone(), requested, available };
            (requested > available).then_some(shortage)
        };
        let lines: Vec<_> = c.lines.iter().filter_map(short).collect();
        (!lines.is_empty()).then_some(Refusal::SoldOut { lines })
    }

    fn confirm(&mut self, c: &Confirm, now: Timestamp) -> Confirmed {
        let Some(mut entry) = self.orders.get(&c.id.key()).cloned() else {
            return Confirmed::Unknown;
        };
        let order = entry.order.clone();
        match order.status_at(now) {
            Status::Confirmed if order.payment_id.as_ref() == Some(&c.payment) => {
                Confirmed::Same(order)
            }
            Status::Confirmed => Confirmed::AlreadyPaid(order),
            Status::Cancelled => Confirmed::Cancelled(order),
            Status::Expired => Confirmed::TooLate(order),
            Status::Held => {
                entry.order.status = Status::Confirmed;
                entry.order.payment_id = Some(c.payment.clone());
                entry.order.confirmed_at = Some(now);
                let words = (c.trace.as_ref(), None);
                let from = Some(Status::Held);
                Confirmed::Confirmed(self.step(entry, from, now, Cause::Caller, words))
            }
        }
    }

    fn cancel(&mut self, c: &Cancel, now: Timestamp) -> Cancelled {
        let known = self.orders.get(&c.id.key()).cloned();
        let from = known.as_ref().map(|entry| entry.order.status);
        let mut entry = match (known, &c.tombstone_for) {
            (Some(known), _) if known.order.status == Status::Cancelled => {
                return Cancelled::Same(known.order);
            }
            (Some(known), _) if known.order.status == Status::Confirmed => {
                return Cancelled::Confirmed(known.order);
            }
            (None, None) => return Cancelled::Unknown,
            _ if self.archived => return Cancelled::Archived,
            (Some(known), _) => known,
            (None, Some(buyer)) => Entry {
                order: Order {
                    id: c.id.clone(),
                    buyer_id: buyer.clone(),
                    status: Status::Cancelled,
                    lines: Vec::new(),
                    payment_id: None,
                    created_at: now,
                    expires_at: now,
                    confirmed_at: None,
                    seq: 0,
                },
                hold_seconds: None,
            },
        };
        entry.order.status = Status::Cancelled;
        let words = (c.trace.as_ref(), c.reason.clone());
        Cancelled::Cancelled(self.step(entry, from, now, Cause::Caller, words))
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
            if entry.order.status == Status::Held {
                entry.order.status = Status::Expired;
                let entry = entry.clone();
                self.step(entry, Some(Status::Held), at.now, Cause::Sweeper, (None, None));
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
        let holds = self.orders.values().any(|entry| entry.order.status == Status::Held);
        if !over || holds || self.marks.recorded < self.marks.seq {
            return false;
        }
        self.archived = true;
        self.emit(now, None, Body::Sale(SaleStep::Archived));
        true
    }
}
