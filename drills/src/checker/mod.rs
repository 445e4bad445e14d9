//! Decides the invariants I1-I7 (docs/architecture.md) of one sale from what callers were answered
//! and what the three servers say afterwards. Pure: it asks nobody, and it knows of Holdfast only
//! what is documented for callers and consumers.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;

use serde::Serialize;
use serde_json::Value;

use crate::books::{AdjustmentRow, Books, Counters, Record, SEALED, key_of};
use crate::history::{Entry, Level, Lines, Outcome, Request, Shown, lines_of, time_of};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum Invariant {
    I1,
    I2,
    I3,
    I4,
    I5,
    I6,
    I7,
}

/// What is wrong, and how it can be seen.
#[derive(Debug, Clone, Serialize)]
pub struct Violation {
    pub invariant: Invariant,
    /// Which rule was broken: a name that tests and reports use.
    pub rule: &'static str,
    pub evidence: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {}: {}", self.invariant, self.rule, self.evidence)
    }
}

/// What a drill does to the books on purpose; everything else is a violation.
#[derive(Debug, Clone, Default)]
pub struct Expected {
    /// Reasons of dead letters that the drill brings about.
    pub dead_letters: &'static [&'static str],
    /// Records were taken out of the topic: what it lacks is not held against it.
    pub topic_truncated: bool,
    /// What Redis may forget of what it answered.
    pub forgets: Forgets,
    /// When it did so last: only what was asked before may be gone.
    pub forgot_ms: Option<i64>,
    /// The lowest level of which no answer may be forgotten.
    pub survives: Level,
    /// How far Redis' clock is put ahead of the callers' at most: by so much a hold may end before its
    /// deadline on theirs, never on the lane's.
    pub clock_ahead_ms: i64,
}

/// What became of answers below the level that survives.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Forgets {
    #[default]
    Nothing,
    /// A rebuild's report says how many events at most, and names the orders that are gone.
    Reported,
    /// Nobody lived who could have told.
    Untold,
}

/// What the definition says about limits.
#[derive(Debug, Default)]
struct Limits {
    all: Option<i64>,
    skus: BTreeMap<String, i64>,
}

/// One event as the topic tells it, where the ledger has recorded it.
struct Event<'a> {
    record: &'a Record,
    order: Option<EventOrder>,
}

struct EventOrder {
    id: String,
    buyer: String,
    status: String,
    lines: Lines,
    returned: Lines,
    expires_ms: i64,
}

/// What the ledger or the topic says of one event.
#[derive(Debug, PartialEq)]
struct Told<'a> {
    event: &'a str,
    order: Option<&'a str>,
    at_ms: i64,
    moved: BTreeMap<&'a str, Counters>,
}

impl<'a> Told<'a> {
    fn by(record: &'a Record) -> Self {
        Self {
            event: record.kind.rsplit('.').next().unwrap_or_default(),
            order: record.data["order"]["id"].as_str(),
            at_ms: record.at_ms,
            moved: changes_of(&record.data),
        }
    }
}

/// A payment that a caller said was made.
struct Paid<'a> {
    sent_ms: i64,
    payment: &'a str,
    lines: Option<&'a Lines>,
    /// It was taken, and bought nothing.
    refused: bool,
}

/// What callers asked of an order, without what was definitely not done.
#[derive(Default)]
struct Asked<'a> {
    cancelled_ms: Option<i64>,
    paid: Vec<Paid<'a>>,
    /// By key: when it was sent first, whether to restock, and the lines.
    returns: BTreeMap<&'a str, (i64, bool, Option<&'a Lines>)>,
}

/// By the order's id.
fn asked(history: &[Entry]) -> HashMap<&str, Asked<'_>> {
    let mut keys = HashMap::new();
    for entry in history {
        if let Request::Place { buyer, key, .. } | Request::CancelByKey { buyer, key, .. } =
            &entry.request
            && let Some(shown) = entry.reply.order()
        {
            keys.insert((buyer.as_str(), key.as_str()), shown.id);
        }
    }
    let mut asked: HashMap<&str, Asked> = HashMap::new();
    for entry in history {
        let refused = entry.reply.outcome == Outcome::Refused;
        // A refusal that owes the payment has done something: it may have left a tombstone.
        if refused && !entry.reply.body["refund_id"].is_string() {
            continue;
        }
        let sent_ms = entry.sent_ms;
        let (order, paid) = match &entry.request {
            Request::Cancel { order } => (order.as_str(), None),
            Request::CancelByKey { buyer, key, .. } => {
                let Some(order) = keys.get(&(buyer.as_str(), key.as_str())) else { continue };
                (*order, None)
            }
            Request::Confirm { order, payment, lines } => {
                (order.as_str(), Some((payment, lines.as_ref())))
            }
            Request::Webhook { order, payment, succeeded: true } => {
                (order.as_str(), Some((payment, None)))
            }
            Request::Return { order, key, lines, restock } => {
                let returns = &mut asked.entry(order).or_default().returns;
                let known = returns.entry(key).or_insert((sent_ms, *restock, lines.as_ref()));
                known.0 = known.0.min(sent_ms);
                continue;
            }
            _ => continue,
        };
        let of_order = asked.entry(order).or_default();
        if let Some((payment, lines)) = paid {
            of_order.paid.push(Paid { sent_ms, payment, lines, refused });
        } else {
            let first = of_order.cancelled_ms.map_or(sent_ms, |first| first.min(sent_ms));
            of_order.cancelled_ms = Some(first);
        }
    }
    asked
}

pub fn check(history: &[Entry], books: &Books, expected: &Expected) -> Vec<Violation> {
    let (found, undone) = (Vec::new(), BTreeSet::new());
    let mut case = Case { history, books, expected, found, undone };
    case.conservation();
    case.agreement();
    case.answers();
    case.totals();
    case.phases();
    case.limits();
    case.sequence();
    case.deadlines();
    case.steps();
    case.payments();
    case.settlements();
    case.forgotten();
    case.found
}

/// How far an answer said that it had got.
pub fn level(entry: &Entry) -> Level {
    if entry.reply.outcome != Outcome::Ok {
        return Level::Memory;
    }
    // By the header, which only who asks for a level is shown, and by the order itself.
    let shown = entry.reply.body["durability"].as_str().and_then(Level::from_word);
    [entry.reply.applied, shown].into_iter().flatten().max().unwrap_or_default()
}

/// Orders that were answered 2xx when they were placed, and that nothing ever held: the database has none,
/// or a tombstone that a later call left.
pub fn lost(history: &[Entry], books: &Books) -> Vec<String> {
    let held = books.database.ledger.iter().filter(|row| row.event == "held");
    let held: HashSet<_> = held.filter_map(|row| row.order.as_deref()).collect();
    let answered = history.iter().filter(|entry| entry.reply.outcome == Outcome::Ok);
    let placed = answered.filter(|entry| matches!(entry.request, Request::Place { .. }));
    let placed: BTreeSet<_> =
        placed.filter_map(|entry| Some(entry.reply.order()?.id.to_owned())).collect();
    placed.into_iter().filter(|id| !held.contains(id.as_str())).collect()
}

/// Records that stand behind the seal of a later epoch: who sent them had slept through a rebuild.
pub fn stale(records: &[Record]) -> impl Iterator<Item = &Record> {
    let mut sealed: HashMap<(i32, i64), i64> = HashMap::new();
    for seal in records.iter().filter(|record| record.kind == SEALED) {
        let offset = sealed.entry((seal.partition, seal.epoch)).or_insert(seal.offset);
        *offset = seal.offset.min(*offset);
    }
    records.iter().filter(move |record| {
        record.kind != SEALED
            && sealed.iter().any(|((partition, epoch), offset)| {
                (*partition == record.partition) && *epoch > record.epoch && *offset < record.offset
            })
    })
}

struct Case<'a> {
    history: &'a [Entry],
    books: &'a Books,
    expected: &'a Expected,
    found: Vec<Violation>,
    /// Orders of which Redis has forgotten something that it had answered, as it may in this drill.
    undone: BTreeSet<String>,
}

/// Units by SKU that an order of this status has, as (held, sold).
fn units(status: &str, lines: &Lines, returned: &Lines) -> BTreeMap<String, (i64, i64)> {
    let left = |sku: &String, units: i64| units - returned.get(sku).copied().unwrap_or_default();
    lines
        .iter()
        .filter_map(|(sku, count)| match status {
            "held" | "paying" => Some((sku.clone(), (*count, 0))),
            "confirmed" | "returned" => Some((sku.clone(), (0, left(sku, *count)))),
            _ => None,
        })
        .collect()
}

/// Which event may lead an order from which status to which: docs/orders.md. `refund_due` moves none.
fn may_follow(from: Option<&str>, event: &str, to: &str) -> bool {
    matches!(
        (from, event, to),
        (None, "held", "held")
            | (None, "cancelled", "cancelled")
            | (Some("held" | "paying"), "payment_begun", "paying")
            | (Some("paying"), "payment_failed", "held")
            | (Some("held" | "paying" | "expired"), "confirmed", "confirmed")
            | (Some("held" | "paying"), "expired", "expired")
            | (Some("held" | "paying" | "expired"), "cancelled", "cancelled")
            | (Some("confirmed"), "returned", "confirmed" | "returned")
    ) || (event == "refund_due" && from == Some(to))
}

impl<'a> Case<'a> {
    fn violated(&mut self, invariant: Invariant, rule: &'static str, evidence: String) {
        self.found.push(Violation { invariant, rule, evidence });
    }

    /// An answer about an order that the books contradict.
    fn contradicted(
        &mut self,
        entry: &Entry,
        order: &str,
        invariant: Invariant,
        rule: &'static str,
        evidence: String,
    ) {
        if self.may_be_forgotten(entry) {
            self.undone.insert(order.to_owned());
        } else {
            self.violated(invariant, rule, evidence);
        }
    }

    /// Whether Redis may have forgotten what it answered here: nothing that was asked once it had lost what
    /// it lost, and nothing that was promised to outlive that.
    fn may_be_forgotten(&self, entry: &Entry) -> bool {
        let Expected { forgets, forgot_ms, survives, .. } = *self.expected;
        let before = forgot_ms.is_some_and(|forgot_ms| entry.sent_ms < forgot_ms);
        forgets != Forgets::Nothing && before && level(entry) < survives
    }

    /// What Redis forgot was said by a rebuild, where somebody lived who knew.
    fn forgotten(&mut self) {
        if self.expected.forgets != Forgets::Reported {
            return;
        }
        let rebuilds = &self.books.database.rebuilds;
        let named: BTreeSet<_> = rebuilds.iter().flat_map(|rebuild| &rebuild.lost_orders).collect();
        let most: i64 = rebuilds.iter().map(|rebuild| rebuild.lost_max).sum();
        let untold: Vec<_> = lost(self.history, self.books);
        let untold: Vec<_> = untold.iter().filter(|id| !named.contains(id)).collect();
        if !untold.is_empty() {
            let evidence = format!("orders that are gone and that no report names: {untold:?}");
            self.violated(Invariant::I3, "forgotten-and-not-told", evidence);
        }
        let undone = self.undone.len();
        if usize::try_from(most).is_ok_and(|most| most < undone) {
            let evidence = format!(
                "answers about {undone} orders were undone, reports say {most} events at most: {:?}",
                self.undone
            );
            self.violated(Invariant::I3, "forgotten-and-not-told", evidence);
        }
    }

    fn ok(&self) -> impl Iterator<Item = &'a Entry> + use<'a> {
        self.history.iter().filter(|entry| entry.reply.outcome == Outcome::Ok)
    }

    /// The recorded events that the topic has, in order.
    fn events(&self) -> Vec<Event<'a>> {
        let mut records = HashMap::new();
        for record in &self.books.topic.records {
            records.entry((record.epoch, record.seq)).or_insert(record);
        }
        let first_rows = self.books.database.ledger.iter().filter(|row| row.line == 0);
        let recorded = first_rows.filter_map(|row| records.get(&(row.epoch, row.seq)).copied());
        recorded.map(|record| Event { record, order: event_order(&record.data) }).collect()
    }

    /// I1: never sold more than there is, in every state that can be seen.
    fn conservation(&mut self) {
        for (sku, counters) in &self.books.lane.stock {
            if counters.any_below_zero() {
                let evidence = format!("Redis has {counters:?} of {sku}");
                self.violated(Invariant::I1, "below-zero", evidence);
            }
        }
        for (sku, row) in &self.books.database.counters {
            if row.total != row.counters.total() || row.counters.any_below_zero() {
                let evidence = format!("the database has {row:?} of {sku}");
                self.violated(Invariant::I1, "below-zero", evidence);
            }
        }
        let mut fold: BTreeMap<&str, Counters> = BTreeMap::new();
        for row in &self.books.database.ledger {
            let Some(sku) = row.sku.as_deref() else { continue };
            let counters = fold.entry(sku).or_default();
            counters.add(row.moved);
            if counters.any_below_zero() {
                let evidence = format!("after seq {} there are {counters:?} of {sku}", row.seq);
                self.violated(Invariant::I1, "below-zero", evidence);
            }
            // A return that is not restocked leaves the total; nothing of an order's else moves it.
            let moved = row.moved.total();
            let allowed = row.order.is_none() || (row.event == "returned" && moved < 0);
            if moved != 0 && !allowed {
                let evidence = format!("seq {} moves the total of {sku} by {moved}", row.seq);
                self.violated(Invariant::I1, "units-from-nowhere", evidence);
            }
        }
        for entry in self.ok() {
            for sku in entry.reply.body["skus"].as_array().into_iter().flatten() {
                let number = |name: &str| sku[name].as_i64();
                let parts = [number("total"), number("available"), number("held"), number("sold")];
                let [Some(total), Some(available), Some(held), Some(sold)] = parts else {
                    continue;
                };
                let counters = Counters { available, held, sold };
                if total != counters.total() || counters.any_below_zero() {
                    let evidence = format!("answered at {}: {sku}", entry.answered_ms);
                    self.violated(Invariant::I1, "stock-does-not-add-up", evidence);
                }
            }
        }
    }

    /// I2: ledger = counters = Redis = the sum over the orders of each, once nothing is on its way.
    fn agreement(&mut self) {
        let Books { lane, database, .. } = self.books;
        if lane.seq != database.recorded {
            let evidence =
                format!("Redis is at seq {}, the database at {}", lane.seq, database.recorded);
            self.violated(Invariant::I2, "not-drained", evidence);
        }
        let mut fold: BTreeMap<String, Counters> = BTreeMap::new();
        for row in &database.ledger {
            if let Some(sku) = &row.sku {
                fold.entry(sku.clone()).or_default().add(row.moved);
            }
        }
        let sum = |orders: &mut dyn Iterator<Item = (&str, &Lines, &Lines)>| {
            let mut sum: BTreeMap<String, (i64, i64)> = BTreeMap::new();
            for (status, lines, returned) in orders {
                for (sku, (held, sold)) in units(status, lines, returned) {
                    let counts = sum.entry(sku).or_default();
                    counts.0 += held;
                    counts.1 += sold;
                }
            }
            sum
        };
        let live = sum(&mut lane
            .orders
            .values()
            .map(|order| (order.status.as_str(), &order.lines, &order.returned)));
        let recorded = sum(&mut database
            .orders
            .iter()
            .map(|order| (order.status.as_str(), &order.lines, &order.returned)));
        let skus: BTreeSet<_> =
            fold.keys().chain(lane.stock.keys()).chain(database.counters.keys()).collect();
        for sku in skus {
            let of_ledger = fold.get(sku).copied().unwrap_or_default();
            let of_redis = lane.stock.get(sku).copied().unwrap_or_default();
            let of_database =
                database.counters.get(sku).map_or_else(Counters::default, |row| row.counters);
            if of_ledger != of_redis || of_ledger != of_database {
                let evidence = format!(
                    "{sku}: ledger {of_ledger:?}, database {of_database:?}, Redis {of_redis:?}"
                );
                self.violated(Invariant::I2, "counters-differ", evidence);
            }
            for (whose, sum) in [("Redis", &live), ("the database", &recorded)] {
                let of_orders = sum.get(sku).copied().unwrap_or_default();
                if of_orders != (of_ledger.held, of_ledger.sold) {
                    let evidence = format!(
                        "{sku}: {whose} has orders of (held, sold) {of_orders:?}, counters {of_ledger:?}"
                    );
                    self.violated(Invariant::I2, "orders-differ-from-counters", evidence);
                }
            }
        }
        for row in &database.orders {
            let live = lane.orders.get(key_of(&row.id));
            let same = live.is_some_and(|live| {
                (&live.status, live.seq, &live.buyer) == (&row.status, row.seq, &row.buyer)
                    && (&live.lines, &live.returned) == (&row.lines, &row.returned)
                    && (&live.payment, live.expires_ms) == (&row.payment, row.expires_ms)
            });
            if !same {
                let evidence = format!("{row:?} is in Redis {live:?}");
                self.violated(Invariant::I2, "order-differs", evidence);
            }
        }
        if lane.orders.len() > database.orders.len() {
            let evidence = format!(
                "Redis has {} orders, the database {}",
                lane.orders.len(),
                database.orders.len()
            );
            self.violated(Invariant::I2, "order-differs", evidence);
        }
    }

    /// I3: every 201 has exactly one order and one ledger entry a line; no order comes from nowhere;
    /// what was answered stays so.
    fn answers(&mut self) {
        let database = &self.books.database;
        let rows: HashMap<_, _> =
            database.orders.iter().map(|row| (row.id.as_str(), row)).collect();
        let mut holds: HashMap<&str, Vec<(&str, Counters)>> = HashMap::new();
        for row in database.ledger.iter().filter(|row| row.event == "held") {
            if let (Some(order), Some(sku)) = (&row.order, &row.sku) {
                holds.entry(order).or_default().push((sku, row.moved));
            }
        }
        let mut told = HashSet::new();
        let mut judged = HashSet::new();
        for entry in self.history {
            let Some(shown) = entry.reply.order() else {
                if entry.reply.outcome == Outcome::Ok && entry.request.shows_an_order() {
                    let evidence =
                        format!("answered at {}: {}", entry.answered_ms, entry.reply.body);
                    self.violated(Invariant::I3, "unreadable-answer", evidence);
                }
                continue;
            };
            told.insert(shown.id);
            if entry.reply.outcome != Outcome::Ok {
                continue;
            }
            let excused = self.may_be_forgotten(entry);
            let Some(row) = rows.get(shown.id) else {
                if judged.insert((shown.id, "lost", excused)) {
                    let evidence = format!("{} was answered at {}", shown.id, entry.answered_ms);
                    let rule = "answered-order-is-gone";
                    self.contradicted(entry, shown.id, Invariant::I3, rule, evidence);
                }
                continue;
            };
            if let Some(why) = not_kept(&shown, row)
                && judged.insert((shown.id, "kept", excused))
            {
                let evidence = format!("{}, answered at {}: {why}", shown.id, entry.answered_ms);
                self.contradicted(entry, shown.id, Invariant::I3, "answer-was-undone", evidence);
            }
            let Request::Place { buyer, lines, .. } = &entry.request else { continue };
            if !judged.insert((shown.id, "placed", excused)) {
                continue;
            }
            let mut held: Vec<_> = holds.get(shown.id).cloned().unwrap_or_default();
            if held.is_empty() {
                let evidence = format!("{} was answered, and never held: {row:?}", shown.id);
                let rule = "answered-order-is-gone";
                self.contradicted(entry, shown.id, Invariant::I3, rule, evidence);
                continue;
            }
            if *buyer != row.buyer {
                let evidence = format!("{} was placed by {buyer} and is {}'s", shown.id, row.buyer);
                self.violated(Invariant::I3, "order-of-another", evidence);
            }
            held.sort_by_key(|(sku, _)| *sku);
            let wanted: Vec<_> = lines
                .iter()
                .map(|(sku, n)| (sku.as_str(), Counters { available: -n, held: *n, sold: 0 }))
                .collect();
            if held != wanted {
                let evidence =
                    format!("{} asked for {lines:?}, the ledger held {held:?}", shown.id);
                self.violated(Invariant::I3, "not-held-once", evidence);
            }
        }
        for row in &database.orders {
            if !told.contains(row.id.as_str()) {
                let evidence = format!("no caller was ever told of {row:?}");
                self.violated(Invariant::I3, "order-from-nowhere", evidence);
            }
        }
        self.preferences();
        self.adjustments();
    }

    /// Who asked for a durability was told that it was reached, that or a higher one, and is shown no other.
    fn preferences(&mut self) {
        for entry in self.ok() {
            let Some(asked) = &entry.asked else { continue };
            let shown = entry.reply.body["durability"].as_str().and_then(Level::from_word);
            let applied = entry.reply.applied;
            let asked = Level::from_word(asked);
            if applied < asked || (shown.is_some() && shown < applied) {
                let evidence = format!(
                    "asked for {asked:?}, answered {applied:?} at {}, the order says {shown:?}",
                    entry.answered_ms
                );
                self.violated(Invariant::I3, "preference-not-kept", evidence);
            }
        }
    }

    /// The adjustments and undos that callers were told of are those that there are: each is what was asked
    /// for, none is undone twice, and one key has one.
    fn adjustments(&mut self) {
        let rows = &self.books.database.adjustments;
        let mut answered = BTreeSet::new();
        let mut of_keys: HashMap<&str, &str> = HashMap::new();
        let mut undoers: HashMap<&str, &str> = HashMap::new();
        for (id, row) in rows {
            let Some(undone) = row.undoes.as_deref() else { continue };
            if let Some(other) = undoers.insert(undone, id) {
                let evidence = format!("{other} and {id} both undo {undone}");
                self.violated(Invariant::I1, "undone-twice", evidence);
            }
            let original = rows.get(undone);
            let opposite = original
                .is_some_and(|original| original.sku == row.sku && original.delta == -row.delta);
            if !opposite {
                let evidence = format!("{id}, {row:?}, undoes {undone}, {original:?}");
                self.violated(Invariant::I1, "no-opposite", evidence);
            }
        }
        for entry in self.history {
            let (key, undoes) = match &entry.request {
                Request::Adjust { key, .. } | Request::SetTotal { key, .. } => (key, None),
                Request::Undo { adjustment, key } => (key, Some(adjustment)),
                _ => continue,
            };
            let body = &entry.reply.body;
            if entry.reply.code.as_deref() == Some("already-undone") {
                let (undone, by) = (undoes.map(String::as_str), body["undone_by"].as_str());
                let undoer = undone.and_then(|undone| undoers.get(undone).copied());
                if undoer.is_none() || undoer != by {
                    let evidence =
                        format!("{undone:?} was said to be undone by {by:?}: {undoer:?}");
                    self.contradicted(entry, key, Invariant::I3, "undone-by-nothing", evidence);
                }
            }
            if entry.reply.outcome != Outcome::Ok {
                continue;
            }
            let id = body["id"].as_str().unwrap_or_default();
            answered.insert(id);
            let first = *of_keys.entry(key).or_insert(id);
            if first != id {
                let evidence = format!("{key} got {first} and {id}");
                self.violated(Invariant::I4, "key-and-adjustment-part", evidence);
            }
            let row = rows.get(id);
            let as_asked = row.is_some_and(|row| match &entry.request {
                Request::Adjust { sku, delta, .. } => {
                    let (sku, delta) = (sku.clone(), *delta);
                    *row == AdjustmentRow { sku, delta, set_total: None, undoes: None }
                }
                Request::SetTotal { sku, total, version, .. } => {
                    let (before, delta) = (&body["before"], row.delta);
                    let sku = sku.clone();
                    *row == AdjustmentRow { sku, delta, set_total: Some(*total), undoes: None }
                        && body["delta"].as_i64() == Some(delta)
                        && before["total"].as_i64() == Some(total - delta)
                        && before["version"].as_i64() == Some(*version)
                }
                _ => row.undoes.as_ref() == undoes,
            });
            if !as_asked {
                let (asked, at) = (&entry.request, entry.answered_ms);
                let evidence = format!("{id} for {asked:?} was answered at {at}: {row:?}");
                self.violated(Invariant::I3, "answered-adjustment-is-gone", evidence);
            }
        }
        for id in rows.keys() {
            if !answered.contains(id.as_str()) {
                let evidence = format!("nobody was told of {id}");
                self.violated(Invariant::I3, "adjustment-from-nowhere", evidence);
            }
        }
        let mut changed = BTreeSet::new();
        for event in self.events() {
            let told = &event.record.data["adjustment"];
            let Some(id) = told["id"].as_str() else {
                if event.record.kind.ends_with(".adjusted") {
                    let evidence = format!("{:?} does not say by which", event.record);
                    self.violated(Invariant::I2, "adjustment-without-id", evidence);
                }
                continue;
            };
            let said = AdjustmentRow {
                sku: told["sku"].as_str().unwrap_or_default().to_owned(),
                delta: told["delta"].as_i64().unwrap_or_default(),
                set_total: told["set_total"].as_i64(),
                undoes: told["undoes"].as_str().map(str::to_owned),
            };
            let moved = Counters { available: said.delta, ..Counters::default() };
            let moves = changes_of(&event.record.data);
            let as_said = moves.into_iter().eq([(said.sku.as_str(), moved)]);
            if !changed.insert(id) || rows.get(id) != Some(&said) || !as_said {
                let evidence = format!("{:?}, the row is {:?}", event.record, rows.get(id));
                self.violated(Invariant::I2, "adjustment-differs", evidence);
            }
        }
    }

    /// I1: what there is is what was defined, adjusted and taken back for good, by what callers were told.
    fn totals(&mut self) {
        let database = &self.books.database;
        let mut totals: BTreeMap<&str, i64> = BTreeMap::new();
        let mut adjusted: BTreeMap<&str, (&str, i64)> = BTreeMap::new();
        for entry in self.ok() {
            let id = entry.reply.body["id"].as_str().unwrap_or_default();
            match &entry.request {
                Request::Define { definition, .. } => {
                    let skus = definition["skus"].as_array().into_iter().flatten();
                    totals = skus
                        .filter_map(|sku| Some((sku["sku"].as_str()?, sku["stock"].as_i64()?)))
                        .collect();
                }
                Request::Adjust { sku, delta, .. } => {
                    adjusted.insert(id, (sku.as_str(), *delta));
                }
                Request::SetTotal { sku, .. } => {
                    let delta = entry.reply.body["delta"].as_i64().unwrap_or_default();
                    adjusted.insert(id, (sku.as_str(), delta));
                }
                Request::Undo { adjustment, .. } => {
                    if let Some((sku, delta)) = adjusted.get(adjustment.as_str()).copied() {
                        adjusted.insert(id, (sku, -delta));
                    }
                }
                _ => {}
            }
        }
        for (sku, delta) in adjusted.into_values() {
            *totals.entry(sku).or_default() += delta;
        }
        // That somebody asked for these: `steps`.
        for row in database.ledger.iter().filter(|row| row.event == "returned") {
            if let Some(sku) = row.sku.as_deref() {
                *totals.entry(sku).or_default() += row.moved.total();
            }
        }
        for (sku, row) in &database.counters {
            let total = totals.remove(sku.as_str()).unwrap_or_default();
            if total != row.total {
                let evidence = format!("{sku}: callers know of {total}, the database has {row:?}");
                self.violated(Invariant::I1, "total-from-nowhere", evidence);
            }
        }
        if totals.values().any(|total| *total != 0) {
            let evidence = format!("the database does not have {totals:?}");
            self.violated(Invariant::I1, "total-from-nowhere", evidence);
        }
        let events =
            database.ledger.iter().filter(|row| row.event == "adjusted" && row.line == 0).count();
        if events != database.adjustments.len() {
            let rows = database.adjustments.len();
            let evidence = format!("{events} events adjusted something, there are {rows} rows");
            self.violated(Invariant::I3, "adjustment-from-nowhere", evidence);
        }
    }

    /// I3: a sale is closed by whoever closed it, once and for good: from then on nothing is held anew.
    fn phases(&mut self) {
        let database = &self.books.database;
        let asked = |entry: &&Entry| matches!(entry.request, Request::Close { .. });
        let asked: Vec<_> = self.history.iter().filter(asked).collect();
        let first = |rows: &mut dyn Iterator<Item = i64>| rows.min();
        let sent_ms = first(
            &mut asked
                .iter()
                .filter(|entry| entry.reply.outcome != Outcome::Refused)
                .map(|entry| entry.sent_ms),
        );
        let events: Vec<_> =
            database.ledger.iter().filter(|row| row.event == "closed" && row.line == 0).collect();
        if let Some(row) = events.get(1) {
            self.violated(Invariant::I3, "closed-twice", format!("{row:?}"));
        }
        if self.books.lane.is_closed == events.is_empty() {
            let evidence = format!(
                "in Redis it is closed: {}; events that closed it: {events:?}",
                self.books.lane.is_closed
            );
            self.violated(Invariant::I2, "phase-differs", evidence);
        }
        if let Some(row) = events.first() {
            if sent_ms.is_none_or(|sent_ms| row.at_ms < sent_ms) {
                self.violated(Invariant::I3, "closed-by-nobody", format!("{row:?}"));
            }
            let undoes = |event: &str| ["held", "paused", "resumed"].contains(&event);
            let after = database.ledger.iter().filter(|later| later.seq > row.seq);
            for later in after.filter(|later| undoes(&later.event) && later.line == 0) {
                let evidence = format!("{later:?} comes behind {row:?}");
                self.violated(Invariant::I3, "sold-though-closed", evidence);
            }
        }
        let closed = asked.iter().filter(|entry| entry.reply.outcome == Outcome::Ok);
        let Some(closed) = closed.min_by_key(|entry| entry.answered_ms) else { return };
        if events.is_empty() {
            let evidence = format!("it was answered as closed at {}", closed.answered_ms);
            self.contradicted(closed, "the sale", Invariant::I3, "closed-is-open", evidence);
        }
        for entry in self.ok().filter(|entry| entry.sent_ms > closed.answered_ms) {
            if matches!(entry.request, Request::Place { .. }) && !entry.reply.replayed {
                let evidence = format!("{entry:?}, closed at {}", closed.answered_ms);
                self.violated(Invariant::I3, "sold-though-closed", evidence);
            }
        }
    }

    /// I4: no buyer is over a limit, at any event; the same key gives the same order.
    fn limits(&mut self) {
        let mut limits = Limits::default();
        for entry in self.ok() {
            if let Request::Define { definition, .. } = &entry.request {
                limits.all = definition["per_buyer_limit"].as_i64();
                let skus = definition["skus"].as_array().into_iter().flatten();
                limits.skus = skus
                    .filter_map(|sku| {
                        Some((sku["sku"].as_str()?.to_owned(), sku["per_buyer_limit"].as_i64()?))
                    })
                    .collect();
            }
        }
        let mut orders: HashMap<String, (String, Lines)> = HashMap::new();
        let mut buyers: HashMap<String, Lines> = HashMap::new();
        for event in self.events() {
            let Some(order) = event.order else { continue };
            if let Some((buyer, had)) = orders.remove(&order.id) {
                let count = buyers.entry(buyer).or_default();
                had.iter().for_each(|(sku, units)| *count.entry(sku.clone()).or_default() -= units);
            }
            let has: Lines = units(&order.status, &order.lines, &order.returned)
                .into_iter()
                .map(|(sku, (held, sold))| (sku, held + sold))
                .collect();
            let count = buyers.entry(order.buyer.clone()).or_default();
            has.iter().for_each(|(sku, units)| *count.entry(sku.clone()).or_default() += units);
            let over = over_limit(&limits, count);
            orders.insert(order.id, (order.buyer.clone(), has));
            if let (Some(over), "order.held" | "order.confirmed") =
                (over, event.record.kind.as_str())
            {
                let evidence = format!("{} {over} at seq {}", order.buyer, event.record.seq);
                self.violated(Invariant::I4, "over-the-limit", evidence);
            }
        }
        self.live_counts();
        self.keys();
    }

    /// What Redis counts of each buyer is what that buyer's orders have.
    fn live_counts(&mut self) {
        let mut counts: BTreeMap<&str, Lines> = BTreeMap::new();
        for order in self.books.lane.orders.values() {
            for (sku, (held, sold)) in units(&order.status, &order.lines, &order.returned) {
                if held + sold > 0 {
                    let count = counts.entry(&order.buyer).or_default();
                    *count.entry(sku).or_default() += held + sold;
                }
            }
        }
        let buyers: BTreeSet<_> = counts
            .keys()
            .copied()
            .chain(self.books.lane.buyers.keys().map(String::as_str))
            .collect();
        for buyer in buyers {
            let (of_orders, counted) = (counts.get(buyer), self.books.lane.buyers.get(buyer));
            if of_orders != counted {
                let evidence = format!("{buyer}: counted {counted:?}, of orders {of_orders:?}");
                self.violated(Invariant::I4, "buyers-count-differs", evidence);
            }
        }
    }

    fn keys(&mut self) {
        let mut orders: HashMap<(&str, &str), &str> = HashMap::new();
        let mut keys: HashMap<&str, (&str, &str)> = HashMap::new();
        for entry in self.history {
            let (Request::Place { buyer, key, .. } | Request::CancelByKey { buyer, key, .. }) =
                &entry.request
            else {
                continue;
            };
            let Some(shown) = entry.reply.order() else { continue };
            let asked = (buyer.as_str(), key.as_str());
            let known = *orders.entry(asked).or_insert(shown.id);
            let owner = *keys.entry(shown.id).or_insert(asked);
            if known != shown.id || owner != asked {
                let evidence =
                    format!("{asked:?} got {} and {known}, which is {owner:?}'s", shown.id);
                self.violated(Invariant::I4, "key-and-order-part", evidence);
            }
        }
    }

    /// I5: a lane's recorded seq has no gap and no repeat, and the topic tells the same story.
    fn sequence(&mut self) {
        let database = &self.books.database;
        let mut last: Option<(i64, i64)> = None;
        for row in &database.ledger {
            let place = (row.seq, row.line);
            let follows = match last {
                None => place == (1, 0),
                Some((seq, line)) => place == (seq, line + 1) || place == (seq + 1, 0),
            };
            if !follows {
                let evidence = format!("the ledger has (seq, line) {place:?} behind {last:?}");
                self.violated(Invariant::I5, "gap-or-repeat", evidence);
            }
            last = Some(place);
        }
        let last = database.ledger.last().map_or(0, |row| row.seq);
        if last != database.recorded {
            let evidence = format!("the mark is {}, the ledger ends at {last}", database.recorded);
            self.violated(Invariant::I5, "mark-differs", evidence);
        }
        if database.parked > 0 {
            let evidence = format!("{} records wait for a missing one", database.parked);
            self.violated(Invariant::I5, "parked", evidence);
        }
        for letter in &database.dead_letters {
            if letter.status == "open"
                && !self.expected.dead_letters.contains(&letter.reason.as_str())
            {
                let evidence = format!("{letter:?}");
                self.violated(Invariant::I5, "dead-letter", evidence);
            }
        }
        self.topic();
    }

    fn topic(&mut self) {
        let database = &self.books.database;
        let mut recorded: HashMap<(i64, i64), Told> = HashMap::new();
        let mut epochs = HashMap::new();
        for row in &database.ledger {
            let of_event = recorded.entry((row.epoch, row.seq)).or_insert_with(|| Told {
                event: &row.event,
                order: row.order.as_deref(),
                at_ms: row.at_ms,
                moved: BTreeMap::new(),
            });
            if let Some(sku) = row.sku.as_deref() {
                of_event.moved.insert(sku, row.moved);
            }
            epochs.insert(row.seq, row.epoch);
        }
        // Older records behind a seal are echoes, and so is what still waited for a missing one when
        // the seal came.
        let echo = |record: &Record| {
            let seals = self.books.topic.records.iter().filter(|seal| {
                (&*seal.kind, seal.partition) == (SEALED, record.partition)
                    && seal.epoch > record.epoch
            });
            let sealed = seals.map(|seal| seal.offset).min();
            let waited = epochs.get(&(record.seq - 1)).is_none_or(|epoch| *epoch > record.epoch);
            record.epoch < database.epoch
                && (self.expected.topic_truncated
                    || sealed.is_some_and(|sealed| waited || sealed < record.offset))
        };
        let mut found = Vec::new();
        let mut known: HashMap<(i64, i64), &Record> = HashMap::new();
        for what in &self.books.topic.unreadable {
            self.violated(Invariant::I5, "unreadable-record", what.clone());
        }
        for record in &self.books.topic.records {
            if record.kind.starts_with("order.") && event_order(&record.data).is_none() {
                let evidence = format!("{record:?} shows no order");
                self.violated(Invariant::I5, "unreadable-record", evidence);
            }
            if record.partition != database.partition {
                let evidence = format!("{record:?} is not in partition {}", database.partition);
                self.violated(Invariant::I5, "wrong-partition", evidence);
            }
            if record.kind == SEALED {
                continue;
            }
            let place = (record.epoch, record.seq);
            let first = *known.entry(place).or_insert(record);
            if (&first.kind, &first.data) != (&record.kind, &record.data) {
                let evidence = format!("{first:?} and {record:?}");
                self.violated(Invariant::I5, "fork", evidence);
            }
            match recorded.get(&place) {
                Some(recorded) if *recorded != Told::by(record) => {
                    found.push(format!("{record:?} is in the ledger as {recorded:?}"));
                }
                None if !echo(record) => found.push(format!("{record:?} is not in the ledger")),
                _ => {}
            }
        }
        for evidence in found {
            self.violated(Invariant::I5, "topic-and-ledger-differ", evidence);
        }
        self.echoes(&recorded.keys().copied().collect());
        let missing: Vec<_> = recorded.keys().filter(|place| !known.contains_key(place)).collect();
        if !missing.is_empty() && !self.expected.topic_truncated {
            let evidence = format!("recorded, but not in the topic: {missing:?}");
            self.violated(Invariant::I5, "topic-and-ledger-differ", evidence);
        }
        let rows = database.ledger.windows(2);
        let back = rows.filter(|rows| rows[1].at_ms < rows[0].at_ms);
        let back: Vec<_> = back.map(|rows| (rows[0].seq, rows[1].seq)).collect();
        if !back.is_empty() {
            let evidence = format!("the lane's time goes back between {back:?}");
            self.violated(Invariant::I5, "time-goes-back", evidence);
        }
        for rows in database.ledger.windows(2).filter(|rows| rows[1].epoch < rows[0].epoch) {
            let evidence = format!("{:?} comes behind {:?}", rows[1], rows[0]);
            self.violated(Invariant::I5, "epoch-goes-back", evidence);
        }
    }

    /// What was sent of an epoch that was over, and says something that is not recorded, was refused: by a
    /// dead letter, not by silence. What lies behind the last record that is recorded may not be read yet.
    fn echoes(&mut self, recorded: &HashSet<(i64, i64)>) {
        let Books { topic, database, .. } = self.books;
        let is_recorded = |record: &&Record| recorded.contains(&(record.epoch, record.seq));
        let read = topic.records.iter().filter(is_recorded).map(|record| record.offset).max();
        let refused: HashSet<_> = database
            .dead_letters
            .iter()
            .filter(|letter| letter.reason == "stale-epoch")
            .map(|letter| (letter.partition, letter.offset))
            .collect();
        for record in stale(&topic.records) {
            let place = (record.partition, record.offset);
            if !is_recorded(&record) && Some(record.offset) < read && !refused.contains(&place) {
                let evidence = format!("{record:?} is no dead letter");
                self.violated(Invariant::I5, "echo-not-refused", evidence);
            }
        }
    }

    /// I6: never released before the deadline that was promised, nor once it is paid.
    fn deadlines(&mut self) {
        // When each was answered, and until when.
        let mut promises: HashMap<&str, Vec<(i64, i64)>> = HashMap::new();
        // What Redis may have forgotten since.
        let mut told: HashMap<&str, i64> = HashMap::new();
        for entry in self.ok() {
            let Some(shown) = entry.reply.order() else { continue };
            if matches!(shown.status, "held" | "paying") {
                if self.may_be_forgotten(entry) {
                    let deadline = told.entry(shown.id).or_default();
                    *deadline = shown.expires_ms.max(*deadline);
                } else {
                    let promises = promises.entry(shown.id).or_default();
                    promises.push((entry.answered_ms, shown.expires_ms));
                }
            }
        }
        let promised = |order: &str, before_ms: i64| {
            let promises = promises.get(order).into_iter().flatten();
            let promises = promises.filter(|(answered_ms, _)| *answered_ms <= before_ms);
            promises.map(|(_, expires_ms)| *expires_ms).max().unwrap_or_default()
        };
        for entry in self.history.iter().filter(|entry| entry.reply.outcome == Outcome::Refused) {
            let Some(shown) = entry.reply.order() else { continue };
            // An order that was over, and was forgotten, may have been placed anew since.
            let forgotten = self.may_be_forgotten(entry);
            let before_ms = if forgotten { entry.sent_ms } else { i64::MAX };
            let deadline = promised(shown.id, before_ms);
            let early = entry.reply.code.as_deref() == Some("order-expired")
                && entry.answered_ms + self.expected.clock_ahead_ms < deadline;
            if early {
                let evidence = format!(
                    "{} was said to be over at {}, promised until {deadline}",
                    shown.id, entry.answered_ms
                );
                self.violated(Invariant::I6, "over-before-its-deadline", evidence);
            }
        }
        let mut before: HashMap<String, (String, i64)> = HashMap::new();
        for event in self.events() {
            let Some(order) = event.order else { continue };
            let (from, deadline) = match before.get(&order.id) {
                Some((status, deadline)) => (Some(status.as_str()), *deadline),
                None => (None, 0),
            };
            let step = event.record.kind.trim_start_matches("order.");
            if step == "expired" {
                let deadline = deadline.max(promised(&order.id, i64::MAX));
                if event.record.at_ms < deadline {
                    let evidence = format!(
                        "{} was released at {}, promised until {deadline}",
                        order.id, event.record.at_ms
                    );
                    self.violated(Invariant::I6, "released-before-its-deadline", evidence);
                } else if told.get(order.id.as_str()).is_some_and(|told| event.record.at_ms < *told)
                {
                    self.undone.insert(order.id.clone());
                }
            }
            // Where records are missing, what came before is not known.
            let known = from.is_some() || !self.expected.topic_truncated;
            if known && !may_follow(from, step, &order.status) {
                let rule =
                    if from == Some("confirmed") { "released-once-paid" } else { "no-such-step" };
                let evidence = format!(
                    "{}: {step} from {from:?} to {} at seq {}",
                    order.id, order.status, event.record.seq
                );
                self.violated(Invariant::I6, rule, evidence);
            }
            let deadline = deadline.max(order.expires_ms);
            before.insert(order.id, (order.status, deadline));
        }
    }

    /// I1, I3, I6: an event moves the units that its order gained or lost by it, and nothing is bought,
    /// cancelled or taken back but what somebody asked for.
    fn steps(&mut self) {
        let (asked, nothing) = (asked(self.history), Asked::default());
        let mut before: HashMap<String, EventOrder> = HashMap::new();
        let mut taken_back: HashMap<(String, bool), (usize, Lines)> = HashMap::new();
        for event in self.events() {
            let Some(order) = event.order else { continue };
            let asked = asked.get(order.id.as_str()).unwrap_or(&nothing);
            let (record, at_ms) = (event.record, event.record.at_ms);
            let step = record.kind.trim_start_matches("order.");
            let from = before.get(&order.id);
            let evidence = |wrong: String| format!("{} at seq {}: {wrong}", order.id, record.seq);
            // Where records are missing, what came before is not known.
            if (from.is_some() || !self.expected.topic_truncated)
                && let Some(wrong) = moved_otherwise(from, &order, record)
            {
                self.violated(Invariant::I1, "moved-otherwise", evidence(wrong));
            }
            match step {
                "confirmed" => {
                    let payment = record.data["order"]["payment_id"].as_str();
                    let mut paid = asked.paid.iter().filter(|paid| {
                        !paid.refused && paid.sent_ms <= at_ms && Some(paid.payment) == payment
                    });
                    let wanted = |paid: &Paid| {
                        let all = from.map(|from| &from.lines);
                        paid.lines.or(all).is_none_or(|lines| *lines == order.lines)
                    };
                    if !paid.any(wanted) {
                        let wrong = format!("nobody bought {:?} by {payment:?}", order.lines);
                        self.violated(Invariant::I3, "bought-otherwise", evidence(wrong));
                    }
                }
                "cancelled" => {
                    let by_payment =
                        from.is_none() && asked.paid.iter().any(|paid| paid.sent_ms <= at_ms);
                    if !by_payment && asked.cancelled_ms.is_none_or(|sent_ms| sent_ms > at_ms) {
                        let wrong = "nobody asked for it to be cancelled".to_owned();
                        self.violated(Invariant::I6, "cancelled-by-nobody", evidence(wrong));
                    }
                }
                "returned" => {
                    let restock = record.data["restock"].as_bool().unwrap_or_default();
                    let (count, taken) = taken_back.entry((order.id.clone(), restock)).or_default();
                    *count += 1;
                    for (sku, units) in &order.returned {
                        let had = from.and_then(|from| from.returned.get(sku));
                        // Without what came before, it cannot be told how many of them are new.
                        let new = from.map_or(0, |_| units - had.copied().unwrap_or_default());
                        *taken.entry(sku.clone()).or_default() += new;
                    }
                    let sent = asked.returns.values();
                    let sent: Vec<_> = sent
                        .filter(|(sent_ms, wanted, _)| *sent_ms <= at_ms && *wanted == restock)
                        .map(|(_, _, lines)| *lines)
                        .collect();
                    // One without lines asked for all that was left.
                    let too_many = |(sku, units): (&String, &i64)| {
                        let wanted = sent.iter().map(|lines| {
                            lines.map(|lines| lines.get(sku).copied().unwrap_or_default())
                        });
                        wanted.sum::<Option<i64>>().is_some_and(|wanted| wanted < *units)
                    };
                    if *count > sent.len() || taken.iter().any(too_many) {
                        let wrong = format!(
                            "{count} returns of {taken:?} (restock: {restock}), asked for: {sent:?}"
                        );
                        self.violated(Invariant::I6, "returned-by-nobody", evidence(wrong));
                    }
                }
                _ => {}
            }
            before.insert(order.id.clone(), order);
        }
    }

    /// I7: paid = confirmed + refund due.
    fn payments(&mut self) {
        let database = &self.books.database;
        let due: HashSet<(&str, &str)> = database
            .refunds
            .iter()
            .map(|refund| (refund.order.as_str(), refund.payment.as_str()))
            .collect();
        let rows: HashMap<_, _> =
            database.orders.iter().map(|row| (row.id.as_str(), row)).collect();
        let bought = |order: &str, payment: &str| {
            rows.get(order).is_some_and(|row| {
                matches!(row.status.as_str(), "confirmed" | "returned")
                    && row.payment.as_deref() == Some(payment)
            })
        };
        let mut paid: BTreeSet<(&str, &str)> = BTreeSet::new();
        let mut judged = HashSet::new();
        for entry in self.history {
            let (order, payment) = match &entry.request {
                Request::Confirm { order, payment, .. }
                | Request::Webhook { order, payment, succeeded: true } => (order, payment),
                _ => continue,
            };
            let place = (order.as_str(), payment.as_str());
            let (has, owed) = (bought(order, payment), due.contains(&place));
            let refund = entry.reply.body["refund_id"].is_string();
            // A refusal that does not owe it has not taken it.
            if refund || entry.reply.outcome != Outcome::Refused {
                paid.insert(place);
            }
            let rule = "money-and-goods-part";
            let evidence = |wrong| format!("payment {payment} of {order}: {wrong}");
            if has && owed && judged.insert((place, "both", false)) {
                let evidence = evidence("bought, and due as well");
                self.violated(Invariant::I7, rule, evidence);
            }
            let final_no = matches!(
                entry.reply.code.as_deref(),
                Some("payment-too-late" | "order-cancelled" | "already-paid")
            );
            if entry.reply.outcome == Outcome::Refused && final_no && !refund {
                let evidence = evidence("refused for good, and the answer names no refund");
                self.violated(Invariant::I7, rule, evidence);
            }
            let wrong = match (&entry.request, entry.reply.outcome) {
                (Request::Confirm { .. }, Outcome::Ok) if !has => "answered as bought, and is not",
                (Request::Webhook { .. }, Outcome::Ok) if !has && !owed => {
                    "taken, and neither bought nor due"
                }
                (_, Outcome::Refused) if refund && !owed => "answered as due, and is not",
                _ => continue,
            };
            if judged.insert((place, wrong, self.may_be_forgotten(entry))) {
                self.contradicted(entry, order, Invariant::I7, rule, evidence(wrong));
            }
        }
        for row in
            database.orders.iter().filter(|row| matches!(&*row.status, "confirmed" | "returned"))
        {
            let payment = row.payment.as_deref().unwrap_or_default();
            if !paid.contains(&(row.id.as_str(), payment)) {
                let evidence = format!("{row:?} was never paid by that");
                self.violated(Invariant::I7, "goods-without-money", evidence);
            }
        }
        for (order, payment) in &due {
            if !paid.contains(&(*order, *payment)) {
                let evidence = format!("payment {payment} of {order} was never made");
                self.violated(Invariant::I7, "refund-from-nowhere", evidence);
            }
        }
        let mut remembered: BTreeSet<(&str, &str)> = BTreeSet::new();
        for row in &database.orders {
            let live = self.books.lane.orders.get(key_of(&row.id));
            let payments = live.into_iter().flat_map(|live| &live.refunds);
            remembered.extend(payments.map(|payment| (row.id.as_str(), payment.as_str())));
        }
        let due: BTreeSet<_> = due.into_iter().collect();
        if remembered != due {
            let differ: Vec<_> = remembered.symmetric_difference(&due).collect();
            let evidence = format!("Redis and the database differ in refunds: {differ:?}");
            self.violated(Invariant::I7, "refunds-differ", evidence);
        }
    }

    /// I7: there is one refund for an order and payment, and it is settled by whoever said so, once and for
    /// good. The database alone holds it: no loss of Redis or Kafka excuses anything here.
    fn settlements(&mut self) {
        let rows = &self.books.database.refunds;
        let mut places = HashMap::new();
        for row in rows {
            if let Some(other) = places.insert((&row.order, &row.payment), &row.id) {
                let evidence = format!("{row:?}, and {other} for the same");
                self.violated(Invariant::I7, "due-twice", evidence);
            }
        }
        let mut asked: HashMap<&str, i64> = HashMap::new();
        for entry in self.history {
            let Request::SettleRefund { refund } = &entry.request else { continue };
            if entry.reply.outcome == Outcome::Refused {
                continue;
            }
            let first = asked.entry(refund).or_insert(entry.sent_ms);
            *first = entry.sent_ms.min(*first);
            if entry.reply.outcome == Outcome::Unknown {
                continue;
            }
            let row = rows.iter().find(|row| row.id == *refund);
            let body = &entry.reply.body;
            let told = (body["order_id"].as_str(), body["payment_id"].as_str());
            let settled_ms = time_of(&body["settled_at"]);
            let kept = row.is_some_and(|row| {
                told == (Some(&row.order), Some(&row.payment))
                    && settled_ms.is_some()
                    && row.settled_ms == settled_ms
            });
            if !kept {
                let evidence = format!("{body} was answered at {}: {row:?}", entry.answered_ms);
                self.violated(Invariant::I7, "settled-otherwise", evidence);
            }
        }
        for row in rows {
            let Some(settled_ms) = row.settled_ms else { continue };
            if asked.get(row.id.as_str()).is_none_or(|sent_ms| settled_ms < *sent_ms) {
                let evidence = format!("nobody had said so by then: {row:?}");
                self.violated(Invariant::I7, "settled-by-nobody", evidence);
            }
        }
        let rows: HashMap<_, _> = rows.iter().map(|row| (row.id.as_str(), row)).collect();
        for entry in self.history {
            let (Some(refund), Request::Confirm { order, payment, .. }) =
                (entry.reply.body["refund_id"].as_str(), &entry.request)
            else {
                continue;
            };
            let Some(row) = rows.get(refund) else { continue };
            if (&row.order, &row.payment) != (order, payment) {
                let evidence = format!("{refund} was named for {payment} of {order}: {row:?}");
                self.violated(Invariant::I7, "refund-of-another", evidence);
            }
        }
    }
}

/// Why this event cannot have moved what it says, from what its order was to what it is.
fn moved_otherwise(
    from: Option<&EventOrder>,
    order: &EventOrder,
    record: &Record,
) -> Option<String> {
    let has = |order: &EventOrder| units(&order.status, &order.lines, &order.returned);
    let mut moved: BTreeMap<_, Counters> = BTreeMap::new();
    for (had, sign) in [(from.map(has).unwrap_or_default(), -1), (has(order), 1)] {
        for (sku, (held, sold)) in had {
            let (held, sold) = (sign * held, sign * sold);
            moved.entry(sku).or_default().add(Counters { available: -(held + sold), held, sold });
        }
    }
    let returned = record.kind == "order.returned";
    if returned && record.data["restock"] == Value::Bool(false) {
        moved.values_mut().for_each(|moved| moved.available = 0);
    }
    let mut changes = changes_of(&record.data);
    changes.retain(|_, moved| *moved != Counters::default());
    moved.retain(|_, moved| *moved != Counters::default());
    if changes != moved.iter().map(|(sku, moved)| (sku.as_str(), *moved)).collect() {
        return Some(format!("moved {changes:?}, and its order {moved:?}"));
    }
    let from = from?;
    let part = |less: &Lines, more: &Lines| {
        less.iter().all(|(sku, units)| more.get(sku).is_some_and(|most| units <= most))
    };
    let lines_fit = if record.kind == "order.confirmed" {
        part(&order.lines, &from.lines)
    } else {
        order.lines == from.lines
    };
    let returned_fit = if returned {
        part(&from.returned, &order.returned) && part(&order.returned, &order.lines)
    } else {
        order.returned == from.returned
    };
    let fits = lines_fit && returned_fit && order.buyer == from.buyer;
    (!fits).then(|| {
        format!(
            "{}'s lines {:?}, returned {:?}, were {}'s {:?}, {:?}",
            order.buyer, order.lines, order.returned, from.buyer, from.lines, from.returned
        )
    })
}

fn event_order(data: &Value) -> Option<EventOrder> {
    let order = &data["order"];
    Some(EventOrder {
        id: order["id"].as_str()?.to_owned(),
        buyer: order["buyer_id"].as_str().unwrap_or_default().to_owned(),
        status: order["status"].as_str()?.to_owned(),
        lines: lines_of(&order["lines"]),
        returned: lines_of(&order["returned"]),
        expires_ms: time_of(&order["expires_at"])?,
    })
}

fn changes_of(data: &Value) -> BTreeMap<&str, Counters> {
    let changes = data["changes"].as_array().into_iter().flatten();
    changes
        .filter_map(|change| {
            let number = |name: &str| change[name].as_i64();
            let moved = Counters {
                available: number("available")?,
                held: number("held")?,
                sold: number("sold")?,
            };
            Some((change["sku"].as_str()?, moved))
        })
        .collect()
}

/// Why the order as it was shown cannot have become what it is.
fn not_kept(shown: &Shown<'_>, row: &crate::books::OrderRow) -> Option<String> {
    let status = row.status.as_str();
    let kept = match shown.status {
        "cancelled" => status == "cancelled",
        "confirmed" => matches!(status, "confirmed" | "returned"),
        "returned" => status == "returned",
        "expired" => matches!(status, "expired" | "confirmed" | "returned" | "cancelled"),
        _ => true,
    };
    if !kept {
        return Some(format!("it was {}, and is {status}", shown.status));
    }
    if matches!(shown.status, "confirmed" | "returned")
        && (shown.payment != row.payment.as_deref() || shown.lines != row.lines)
    {
        return Some(format!("it was {shown:?}, and is {row:?}"));
    }
    let fewer = shown
        .returned
        .iter()
        .any(|(sku, units)| row.returned.get(sku).copied().unwrap_or_default() < *units);
    fewer.then(|| format!("{:?} had come back, and are {:?}", shown.returned, row.returned))
}

fn over_limit(limits: &Limits, count: &Lines) -> Option<String> {
    let all: i64 = count.values().sum();
    if let Some(limit) = limits.all.filter(|limit| all > *limit) {
        return Some(format!("has {all} of at most {limit}"));
    }
    let over =
        limits.skus.iter().find(|(sku, limit)| count.get(*sku).is_some_and(|units| units > *limit));
    over.map(|(sku, limit)| format!("has {} {sku} of at most {limit}", count[sku]))
}
