//! Hand-made histories and books: a sale in which all is well, and the same with one thing wrong.

use serde_json::{Value, json};

use super::*;
use crate::books::{CounterRow, DeadLetter, LedgerRow, LiveOrder, OrderRow, Rebuild, RefundRow};
use crate::history::Reply;

const SALE: &str = "sale";
const HOLD_MS: i64 = 3_000;

fn lines(units: i64) -> Lines {
    [("a".to_owned(), units)].into()
}

fn lines_json(lines: &Lines) -> Value {
    lines.iter().map(|(sku, units)| json!({"sku": sku, "quantity": units})).collect()
}

fn rfc(ms: i64) -> String {
    let time = chrono::DateTime::from_timestamp_millis(ms).expect("a time");
    time.to_rfc3339_opts(chrono::SecondsFormat::Millis, true)
}

fn counters(available: i64, held: i64, sold: i64) -> Counters {
    Counters { available, held, sold }
}

/// A sale of one SKU, `a`, that keeps its books as Holdfast does.
struct Shop {
    history: Vec<Entry>,
    books: Books,
    now: i64,
}

impl Shop {
    /// 10 units, at most 4 a buyer.
    fn open() -> Self {
        let mut shop = Self { history: Vec::new(), books: Books::default(), now: 1_000_000 };
        let definition = json!({"per_buyer_limit": 4, "skus": [{"sku": "a", "stock": 10, "per_buyer_limit": 4}]});
        let define = Request::Define { sale: SALE.into(), definition };
        shop.answer(define, 201, Value::Null);
        shop.event("sale.defined", None, counters(10, 0, 0), json!({"version": 1}));
        shop
    }

    fn answer(&mut self, request: Request, status: u16, body: Value) {
        let ok = status < 300;
        let reply = Reply {
            outcome: if ok { Outcome::Ok } else { Outcome::Refused },
            status: Some(status),
            code: body["code"].as_str().map(str::to_owned),
            replayed: false,
            applied: None,
            body,
        };
        let (sent_ms, answered_ms) = (self.now, self.now + 1);
        let client = "c".to_owned();
        let (instance, asked) = (0, None);
        self.history.push(Entry { client, instance, asked, sent_ms, answered_ms, request, reply });
    }

    /// One event of the lane, through to the database.
    fn event(&mut self, kind: &str, order: Option<&str>, moved: Counters, mut data: Value) {
        self.now += 10;
        self.books.lane.seq += 1;
        let (seq, at_ms) = (self.books.lane.seq, self.now);
        let moves = moved != Counters::default();
        if let Some(order) = order {
            let row = self.row(order);
            row.seq = seq;
            let row = row.clone();
            data["order"] = json!({
                "id": row.id, "buyer_id": row.buyer, "status": row.status, "seq": seq,
                "lines": lines_json(&row.lines), "returned": lines_json(&row.returned),
                "payment_id": row.payment, "expires_at": rfc(row.expires_ms),
            });
            self.books.lane.orders.insert(key_of(order).to_owned(), live(&row, Vec::new()));
        }
        data["changes"] = if moves {
            json!([{"sku": "a", "available": moved.available, "held": moved.held, "sold": moved.sold}])
        } else {
            json!([])
        };
        self.books.lane.stock.entry("a".into()).or_default().add(moved);
        let database = &mut self.books.database;
        database.recorded = seq;
        (self.books.lane.epoch, database.epoch) = (1, 1);
        database.ledger.push(LedgerRow {
            epoch: 1,
            seq,
            line: 0,
            event: kind.rsplit('.').next().unwrap_or_default().into(),
            order: order.map(str::to_owned),
            sku: moves.then(|| "a".into()),
            moved,
            at_ms,
        });
        let row = database.counters.entry("a".into());
        let row = row.or_insert(CounterRow { total: 0, counters: Counters::default() });
        row.counters.add(moved);
        row.total = row.counters.total();
        let offset = seq - 1;
        let kind = kind.to_owned();
        self.books.topic.records.push(Record {
            partition: 0,
            offset,
            kind,
            epoch: 1,
            seq,
            at_ms,
            data,
        });
    }

    fn row(&mut self, id: &str) -> &mut OrderRow {
        let mut rows = self.books.database.orders.iter_mut();
        rows.find(|row| row.id == id).expect("a known order")
    }

    fn count(&mut self, buyer: &str, by: i64) {
        let count = self.books.lane.buyers.entry(buyer.into()).or_default();
        *count.entry("a".into()).or_default() += by;
        count.retain(|_, units| *units > 0);
        self.books.lane.buyers.retain(|_, count| !count.is_empty());
    }

    /// The order as it stands now.
    fn shown(&mut self, id: &str) -> Value {
        let row = self.row(id);
        json!({
            "id": row.id, "status": row.status, "lines": lines_json(&row.lines),
            "returned": lines_json(&row.returned), "payment_id": row.payment,
            "expires_at": rfc(row.expires_ms),
        })
    }

    fn place(&mut self, buyer: &str, key: &str, units: i64) -> String {
        let id = format!("ord_{:0>16}{:->22}.{SALE}", 1, format!("{buyer}{key}"));
        self.books.database.orders.push(OrderRow {
            id: id.clone(),
            buyer: buyer.into(),
            status: "held".into(),
            lines: lines(units),
            returned: Lines::new(),
            payment: None,
            expires_ms: self.now + 10 + HOLD_MS,
            seq: 0,
        });
        self.count(buyer, units);
        self.event("order.held", Some(&id), counters(-units, units, 0), json!({}));
        let shown = self.shown(&id);
        self.answer(place(buyer, key, units), 201, shown);
        id
    }

    fn confirm(&mut self, id: &str, payment: &str) {
        let row = self.row(id);
        (row.status, row.payment) = ("confirmed".into(), Some(payment.into()));
        let units = row.lines["a"];
        self.event("order.confirmed", Some(id), counters(0, -units, units), json!({}));
        let shown = self.shown(id);
        self.answer(confirm(id, payment), 200, shown);
    }

    /// Ends a hold, without any call.
    fn release(&mut self, id: &str, status: &str) {
        let row = self.row(id);
        row.status = status.into();
        let (units, buyer) = (row.lines["a"], row.buyer.clone());
        self.count(&buyer, -units);
        let kind = format!("order.{status}");
        self.event(&kind, Some(id), counters(units, -units, 0), json!({}));
    }

    fn cancel(&mut self, id: &str) {
        self.release(id, "cancelled");
        let shown = self.shown(id);
        self.answer(Request::Cancel { order: id.into() }, 200, shown);
    }

    fn expire(&mut self, id: &str) {
        self.now += HOLD_MS;
        self.release(id, "expired");
    }

    fn refund(&mut self, id: &str, payment: &str) {
        self.event("order.refund_due", Some(id), Counters::default(), json!({}));
        let refund = format!("rfd_{payment}");
        self.books.database.refunds.push(refund_row(&refund, id, payment));
        let row = self.row(id).clone();
        self.books.lane.orders.insert(key_of(id).into(), live(&row, vec![payment.into()]));
        let shown = self.shown(id);
        let body = json!({"code": "order-cancelled", "refund_id": refund, "order": shown});
        self.answer(confirm(id, payment), 409, body);
    }

    /// Some of what was sold comes back, without any call.
    fn take_back(&mut self, id: &str, units: i64, restock: bool) {
        let row = self.row(id);
        *row.returned.entry("a".into()).or_default() += units;
        if row.returned == row.lines {
            row.status = "returned".into();
        }
        let buyer = row.buyer.clone();
        self.count(&buyer, -units);
        let moved = counters(if restock { units } else { 0 }, 0, -units);
        self.event("order.returned", Some(id), moved, json!({"restock": restock}));
    }

    fn give_back(&mut self, id: &str, key: &str, units: i64, restock: bool) {
        self.take_back(id, units, restock);
        let shown = self.shown(id);
        self.answer(give_back(id, key, Some(lines(units)), restock), 200, shown);
    }

    /// A change of the total, without any call.
    fn change_total(&mut self, key: &str, delta: i64, undoes: Option<&str>) -> String {
        self.change_total_to(key, delta, None, undoes)
    }

    fn change_total_to(
        &mut self,
        key: &str,
        delta: i64,
        set_total: Option<i64>,
        undoes: Option<&str>,
    ) -> String {
        let id = format!("adj_{key}");
        let said = json!({
            "id": id, "sku": "a", "delta": delta, "set_total": set_total, "undoes": undoes
        });
        let data = json!({"adjustment": said});
        self.event("stock.adjusted", None, counters(delta, 0, 0), data);
        let (sku, undoes) = ("a".into(), undoes.map(str::to_owned));
        let row = AdjustmentRow { sku, delta, set_total, undoes };
        self.books.database.adjustments.insert(id.clone(), row);
        id
    }

    fn adjust(&mut self, key: &str, delta: i64) -> String {
        let id = self.change_total(key, delta, None);
        let request =
            Request::Adjust { sale: SALE.into(), sku: "a".into(), key: key.into(), delta };
        self.answer(request, 201, json!({"id": id}));
        id
    }

    /// Sets the total of version 7 from one to the other; the answer says what was before.
    fn set_total(&mut self, key: &str, (from, to): (i64, i64), before: (i64, i64)) -> String {
        let id = self.change_total_to(key, to - from, Some(to), None);
        let request = Request::SetTotal {
            sale: SALE.into(),
            sku: "a".into(),
            key: key.into(),
            total: to,
            version: 7,
        };
        let before = json!({"total": before.0, "version": before.1});
        let body = json!({"id": id, "delta": to - from, "before": before});
        self.answer(request, 201, body);
        id
    }

    fn undo(&mut self, key: &str, adjustment: &str) -> String {
        let delta = -self.books.database.adjustments[adjustment].delta;
        let id = self.change_total(key, delta, Some(adjustment));
        self.answer(undo(key, adjustment), 201, json!({"id": id}));
        id
    }

    fn settle(&mut self, refund: &str) {
        self.now += 10;
        let settled_ms = self.now;
        let mut rows = self.books.database.refunds.iter_mut();
        let row = rows.find(|row| row.id == refund).expect("a known refund");
        let settled_ms = *row.settled_ms.get_or_insert(settled_ms);
        let body = json!({
            "id": refund, "order_id": row.order, "payment_id": row.payment,
            "settled_at": rfc(settled_ms),
        });
        self.answer(settle(refund), 200, body);
        self.history.last_mut().expect("an answer").sent_ms = self.now - 5;
    }

    /// ... by nobody, if `answered` is not set.
    fn close(&mut self, answered: bool) {
        self.event("sale.closed", None, Counters::default(), json!({}));
        self.books.lane.is_closed = true;
        if answered {
            self.answer(close(), 200, json!({"id": SALE, "state": "closed"}));
            self.history.last_mut().expect("an answer").sent_ms = self.now - 5;
        }
    }

    /// The last answer waited for this.
    fn promised(&mut self, level: &str) {
        let entry = self.history.last_mut().expect("an answer");
        (entry.asked, entry.reply.applied) = (Some(level.into()), Level::from_word(level));
    }

    fn rules(&self) -> BTreeSet<(Invariant, &'static str)> {
        self.rules_expecting(&Expected::default())
    }

    fn rules_expecting(&self, expected: &Expected) -> BTreeSet<(Invariant, &'static str)> {
        let found = check(&self.history, &self.books, expected);
        found.iter().map(|violation| (violation.invariant, violation.rule)).collect()
    }

    #[track_caller]
    fn breaks(&self, invariant: Invariant, rule: &'static str) {
        let found = check(&self.history, &self.books, &Expected::default());
        let caught = found.iter().any(|one| (one.invariant, one.rule) == (invariant, rule));
        assert!(caught, "{invariant:?} {rule} is not among {found:#?}");
    }
}

fn refund_row(id: &str, order: &str, payment: &str) -> RefundRow {
    let (order, payment) = (order.to_owned(), payment.to_owned());
    RefundRow { id: id.into(), order, payment, settled_ms: None }
}

fn live(row: &OrderRow, refunds: Vec<String>) -> LiveOrder {
    LiveOrder {
        status: row.status.clone(),
        seq: row.seq,
        buyer: row.buyer.clone(),
        lines: row.lines.clone(),
        returned: row.returned.clone(),
        payment: row.payment.clone(),
        expires_ms: row.expires_ms,
        refunds: refunds.into_iter().collect(),
    }
}

fn place(buyer: &str, key: &str, units: i64) -> Request {
    Request::Place {
        sale: SALE.into(),
        buyer: buyer.into(),
        key: key.into(),
        lines: lines(units),
        hold_seconds: None,
    }
}

fn confirm(order: &str, payment: &str) -> Request {
    Request::Confirm { order: order.into(), payment: payment.into(), lines: None }
}

fn undo(key: &str, adjustment: &str) -> Request {
    Request::Undo { adjustment: adjustment.into(), key: key.into() }
}

fn settle(refund: &str) -> Request {
    Request::SettleRefund { refund: refund.into() }
}

fn close() -> Request {
    Request::Close { sale: SALE.into() }
}

fn give_back(order: &str, key: &str, lines: Option<Lines>, restock: bool) -> Request {
    Request::Return { order: order.into(), key: key.into(), lines, restock }
}

/// Everything that a sale knows, and nothing wrong with it. Returns a confirmed, a cancelled and an
/// expired order, and one that is held.
fn busy_shop() -> (Shop, [String; 4]) {
    let mut shop = Shop::open();
    let sold = shop.place("u1", "k1", 2);
    shop.confirm(&sold, "pay-1");
    let cancelled = shop.place("u2", "k1", 1);
    shop.cancel(&cancelled);
    shop.refund(&cancelled, "pay-2");
    shop.settle("rfd_pay-2");
    shop.settle("rfd_pay-2");
    let expired = shop.place("u3", "k1", 3);
    shop.expire(&expired);
    let more = shop.adjust("more", 5);
    let less = shop.undo("not more", &more);
    shop.undo("more after all", &less);
    shop.answer(undo("again", &more), 409, json!({"code": "already-undone", "undone_by": less}));
    let back = shop.place("u5", "k0", 4);
    shop.confirm(&back, "pay-5");
    shop.give_back(&back, "b1", 1, true);
    shop.give_back(&back, "b2", 3, false);
    let held = shop.place("u4", "k1", 1);
    (shop, [sold, cancelled, expired, held])
}

#[test]
fn a_sale_in_which_all_is_well_passes() {
    let (shop, _) = busy_shop();
    assert_eq!(shop.rules(), BTreeSet::new());
    assert!(lost(&shop.history, &shop.books).is_empty());
}

#[test]
fn i1_more_sold_than_there_is() {
    let (mut shop, _) = busy_shop();
    for buyer in ["v1", "v2", "v3"] {
        shop.place(buyer, "k", 4);
        shop.place(&format!("{buyer}-too"), "k", 4);
    }
    shop.breaks(Invariant::I1, "below-zero");
}

#[test]
fn i1_units_that_come_from_nowhere() {
    let (mut shop, [sold, ..]) = busy_shop();
    let entry = shop.books.database.ledger.iter_mut().find(|row| row.order == Some(sold.clone()));
    entry.expect("its hold").moved.held += 1;
    shop.breaks(Invariant::I1, "units-from-nowhere");
}

#[test]
fn i1_an_answer_about_stock_that_does_not_add_up() {
    let (mut shop, _) = busy_shop();
    let skus = json!([{"sku": "a", "total": 15, "available": 12, "held": 1, "sold": 3}]);
    shop.answer(Request::Stock { sale: SALE.into() }, 200, json!({"skus": skus}));
    shop.breaks(Invariant::I1, "stock-does-not-add-up");
}

#[test]
fn what_cannot_be_read_is_not_passed_over() {
    let (mut shop, _) = busy_shop();
    shop.books.topic.unreadable.push("0/3: it has no ce_seq".into());
    shop.breaks(Invariant::I5, "unreadable-record");
    let (mut shop, _) = busy_shop();
    let mut records = shop.books.topic.records.iter_mut();
    let record = records.find(|record| record.kind == "order.refund_due").expect("a refund");
    record.data["order"]["expires_at"] = Value::Null;
    shop.breaks(Invariant::I5, "unreadable-record");
    let (mut shop, [sold, ..]) = busy_shop();
    shop.answer(Request::Get { order: sold }, 200, json!({"id": "ord_1"}));
    shop.breaks(Invariant::I3, "unreadable-answer");
}

#[test]
fn i2_counters_that_differ() {
    let (mut shop, _) = busy_shop();
    shop.books.lane.stock.get_mut("a").expect("an SKU").available += 1;
    shop.breaks(Invariant::I2, "counters-differ");
    let (mut shop, _) = busy_shop();
    let row = shop.books.database.counters.get_mut("a").expect("an SKU");
    (row.counters.held, row.counters.available) =
        (row.counters.held + 1, row.counters.available - 1);
    shop.breaks(Invariant::I2, "counters-differ");
}

#[test]
fn i2_orders_that_hold_something_else_than_the_counters_say() {
    let (mut shop, [_, _, _, held]) = busy_shop();
    shop.books.lane.orders.get_mut(key_of(&held)).expect("it is there").lines = lines(2);
    shop.breaks(Invariant::I2, "orders-differ-from-counters");
    shop.breaks(Invariant::I2, "order-differs");
}

#[test]
fn i2_an_order_that_only_redis_has() {
    let (mut shop, [sold, ..]) = busy_shop();
    let order = shop.books.lane.orders[key_of(&sold)].clone();
    shop.books
        .lane
        .orders
        .insert("another".into(), LiveOrder { status: "expired".into(), ..order });
    shop.breaks(Invariant::I2, "order-differs");
}

#[test]
fn i2_a_lane_that_is_not_drained() {
    let (mut shop, _) = busy_shop();
    shop.books.lane.seq += 1;
    shop.breaks(Invariant::I2, "not-drained");
}

#[test]
fn i3_an_answered_order_that_is_gone() {
    let (mut shop, [_, _, _, held]) = busy_shop();
    shop.books.lane.orders.remove(key_of(&held));
    shop.books.database.orders.retain(|row| row.id != held);
    shop.books.database.ledger.retain(|row| row.order.as_ref() != Some(&held));
    shop.breaks(Invariant::I3, "answered-order-is-gone");
    assert_eq!(lost(&shop.history, &shop.books), [held]);
}

#[test]
fn i3_an_answered_order_of_which_only_a_tombstone_is_there() {
    let (mut shop, gone) = forgetful_shop();
    shop.books.database.orders.push(OrderRow {
        id: gone.clone(),
        buyer: String::new(),
        status: "cancelled".into(),
        lines: Lines::new(),
        returned: Lines::new(),
        payment: None,
        expires_ms: shop.now,
        seq: 0,
    });
    shop.event("order.cancelled", Some(&gone), Counters::default(), json!({}));
    let shown = shop.shown(&gone);
    shop.answer(Request::Cancel { order: gone.clone() }, 200, shown);
    shop.breaks(Invariant::I3, "answered-order-is-gone");
    assert_eq!(lost(&shop.history, &shop.books), [gone]);
    assert_eq!(shop.rules_expecting(&forgets(Forgets::Untold)), BTreeSet::new());
}

#[test]
fn i3_an_order_that_nobody_placed() {
    let (mut shop, _) = busy_shop();
    shop.place("u7", "k1", 1);
    shop.history.pop();
    shop.breaks(Invariant::I3, "order-from-nowhere");
}

#[test]
fn i3_an_order_that_was_held_twice_or_of_other_lines() {
    let (mut shop, [_, _, _, held]) = busy_shop();
    shop.event("order.held", Some(&held), counters(-1, 1, 0), json!({}));
    shop.breaks(Invariant::I3, "not-held-once");
    let (mut shop, _) = busy_shop();
    let Some(Entry { request: Request::Place { lines, .. }, .. }) = shop.history.last_mut() else {
        panic!("the last call placed an order");
    };
    lines.insert("b".into(), 1);
    shop.breaks(Invariant::I3, "not-held-once");
}

#[test]
fn i3_an_order_that_is_anothers() {
    let (mut shop, [_, _, _, held]) = busy_shop();
    shop.row(&held).buyer = "u9".into();
    shop.breaks(Invariant::I3, "order-of-another");
}

#[test]
fn i3_a_cancellation_that_did_not_stay() {
    let (mut shop, [_, cancelled, ..]) = busy_shop();
    shop.row(&cancelled).status = "held".into();
    shop.breaks(Invariant::I3, "answer-was-undone");
}

#[test]
fn i3_adjustments_that_are_gone_or_come_from_nowhere() {
    let (mut shop, _) = busy_shop();
    shop.books.database.adjustments.clear();
    shop.breaks(Invariant::I3, "answered-adjustment-is-gone");
    let (mut shop, _) = busy_shop();
    let row = AdjustmentRow { sku: "a".into(), delta: 1, set_total: None, undoes: None };
    shop.books.database.adjustments.insert("adj_other".into(), row);
    shop.breaks(Invariant::I3, "adjustment-from-nowhere");
}

#[test]
fn i4_a_buyer_over_the_limit() {
    let (mut shop, _) = busy_shop();
    shop.place("u1", "k2", 3);
    shop.breaks(Invariant::I4, "over-the-limit");
    assert!(!shop.rules().contains(&(Invariant::I4, "buyers-count-differs")));
}

#[test]
fn i4_a_buyers_count_that_is_wrong() {
    let (mut shop, _) = busy_shop();
    shop.count("u1", 1);
    shop.breaks(Invariant::I4, "buyers-count-differs");
    let (mut shop, _) = busy_shop();
    shop.books.lane.buyers.remove("u1");
    shop.breaks(Invariant::I4, "buyers-count-differs");
}

#[test]
fn i4_one_key_that_got_two_orders_and_one_order_of_two_keys() {
    let (mut shop, [_, _, _, held]) = busy_shop();
    shop.place("u4", "k2", 1);
    let Some(Entry { request: Request::Place { key, .. }, .. }) = shop.history.last_mut() else {
        panic!("the last call placed an order");
    };
    *key = "k1".into();
    shop.breaks(Invariant::I4, "key-and-order-part");
    let (mut shop, _) = busy_shop();
    let shown = shop.shown(&held);
    shop.answer(place("u4", "k3", 1), 201, shown);
    shop.breaks(Invariant::I4, "key-and-order-part");
}

#[test]
fn i5_a_gap_a_repeat_and_a_mark_that_is_not_the_end() {
    let (mut shop, _) = busy_shop();
    shop.books.database.ledger.remove(3);
    shop.breaks(Invariant::I5, "gap-or-repeat");
    let (mut shop, _) = busy_shop();
    let again = shop.books.database.ledger[3].clone();
    shop.books.database.ledger.insert(4, again);
    shop.breaks(Invariant::I5, "gap-or-repeat");
    let (mut shop, _) = busy_shop();
    shop.books.database.recorded += 1;
    shop.breaks(Invariant::I5, "mark-differs");
}

#[test]
fn i5_a_topic_that_tells_another_story() {
    let (mut shop, _) = busy_shop();
    let mut fork = shop.books.topic.records[3].clone();
    fork.data["order"]["buyer_id"] = "another".into();
    shop.books.topic.records.push(fork);
    shop.breaks(Invariant::I5, "fork");
    let (mut shop, _) = busy_shop();
    shop.books.topic.records[1].data["changes"] = json!([]);
    shop.breaks(Invariant::I5, "topic-and-ledger-differ");
    let (mut shop, _) = busy_shop();
    shop.books.topic.records[2].partition = 1;
    shop.breaks(Invariant::I5, "wrong-partition");
}

#[test]
fn i5_a_record_that_is_missing_or_not_recorded() {
    let (mut shop, _) = busy_shop();
    shop.books.topic.records.remove(3);
    shop.breaks(Invariant::I5, "topic-and-ledger-differ");
    let truncated = Expected { topic_truncated: true, ..Expected::default() };
    assert_eq!(shop.rules_expecting(&truncated), BTreeSet::new());
    let (mut shop, _) = busy_shop();
    let last = shop.books.topic.records.last().expect("a record").clone();
    let (offset, seq) = (last.offset + 1, last.seq + 1);
    shop.books.topic.records.push(Record { offset, seq, ..last });
    shop.breaks(Invariant::I5, "topic-and-ledger-differ");
}

#[test]
fn i5_the_same_record_twice_and_an_echo_of_an_older_epoch_are_no_violation() {
    let (mut shop, _) = busy_shop();
    let again = shop.books.topic.records[3].clone();
    shop.books.topic.records.push(Record { offset: 100, ..again });
    assert_eq!(shop.rules(), BTreeSet::new());
    seal(&mut shop);
    let last = shop.books.database.recorded;
    // Behind the seal, or before it and behind a gap.
    for (offset, seq) in [(102, last + 1), (100, last + 3)] {
        let echo = shop.books.topic.records[3].clone();
        shop.books.topic.records.push(Record { offset, seq, ..echo });
    }
    assert_eq!(shop.rules(), BTreeSet::new());
}

/// The lane was opened anew.
fn seal(shop: &mut Shop) {
    (shop.books.lane.epoch, shop.books.database.epoch) = (2, 2);
    let seal = shop.books.topic.records[0].clone();
    let (kind, data) = (SEALED.to_owned(), json!({}));
    shop.books.topic.records.push(Record { offset: 101, kind, epoch: 2, seq: 0, data, ..seal });
}

#[test]
fn i5_a_record_from_before_the_seal_that_is_not_recorded() {
    let (mut shop, _) = busy_shop();
    seal(&mut shop);
    assert_eq!(shop.rules(), BTreeSet::new());
    let left_out = shop.books.topic.records[3].clone();
    let (offset, seq) = (100, shop.books.database.recorded + 1);
    shop.books.topic.records.push(Record { offset, seq, ..left_out });
    shop.breaks(Invariant::I5, "topic-and-ledger-differ");
}

#[test]
fn i5_epochs_that_go_back() {
    let (mut shop, _) = busy_shop();
    seal(&mut shop);
    shop.books.database.ledger[2].epoch = 2;
    shop.books.topic.records[2].epoch = 2;
    shop.breaks(Invariant::I5, "epoch-goes-back");
}

#[test]
fn i5_a_ledger_that_names_another_step_order_or_time() {
    let spoil: [fn(&mut LedgerRow); 3] = [
        |row| row.event = "expired".into(),
        |row| row.order = Some("ord_other".into()),
        |row| row.at_ms += 1,
    ];
    for spoil in spoil {
        let (mut shop, _) = busy_shop();
        let mut rows = shop.books.database.ledger.iter_mut();
        spoil(rows.find(|row| row.event == "cancelled").expect("a cancellation"));
        shop.breaks(Invariant::I5, "topic-and-ledger-differ");
    }
}

#[test]
fn i5_records_left_parked_dead_letters_and_time_that_goes_back() {
    let (mut shop, _) = busy_shop();
    shop.books.database.parked = 1;
    shop.breaks(Invariant::I5, "parked");
    let (mut shop, _) = busy_shop();
    let (reason, status) = ("fork".to_owned(), "open".to_owned());
    let (partition, offset, epoch, seq) = (0, 7, None, None);
    let letter = DeadLetter { reason, status, partition, offset, epoch, seq };
    shop.books.database.dead_letters.push(letter);
    shop.breaks(Invariant::I5, "dead-letter");
    let expected = Expected { dead_letters: &["fork"], ..Expected::default() };
    assert_eq!(shop.rules_expecting(&expected), BTreeSet::new());
    let (mut shop, _) = busy_shop();
    shop.books.database.ledger[2].at_ms -= 1_000;
    shop.breaks(Invariant::I5, "time-goes-back");
}

#[test]
fn i6_a_hold_released_before_its_time() {
    let (mut shop, [_, _, _, held]) = busy_shop();
    shop.release(&held, "expired");
    shop.breaks(Invariant::I6, "released-before-its-deadline");
}

#[test]
fn i6_an_answer_promised_more_time_than_the_order_got() {
    let (mut shop, [_, _, _, held]) = busy_shop();
    let shown = shop.shown(&held);
    let code = json!({"code": "order-expired", "order": shown});
    shop.answer(place("u4", "k1", 1), 409, code);
    shop.breaks(Invariant::I6, "over-before-its-deadline");
}

#[test]
fn i6_an_order_that_was_over_and_forgotten_and_is_placed_anew() {
    let (mut shop, _) = busy_shop();
    let before = shop.books.clone();
    let id = shop.place("u6", "k1", 1);
    shop.expire(&id);
    let shown = shop.shown(&id);
    shop.answer(place("u6", "k1", 1), 409, json!({"code": "order-expired", "order": shown}));
    let forgot_ms = shop.now + 1;
    (shop.books, shop.now) = (before, shop.now + 10);
    shop.place("u6", "k1", 1);
    let expected = |forgot_ms| Expected { forgot_ms, ..forgets(Forgets::Untold) };
    assert_eq!(shop.rules_expecting(&expected(Some(forgot_ms))), BTreeSet::new());
    let early = (Invariant::I6, "over-before-its-deadline");
    assert!(shop.rules_expecting(&expected(Some(forgot_ms - 1))).contains(&early));
}

#[test]
fn i6_a_clock_that_is_ahead_ends_holds_early_by_so_much_and_never_on_the_lanes_clock() {
    let (mut shop, [_, _, _, held]) = busy_shop();
    let shown = shop.shown(&held);
    let code = json!({"code": "order-expired", "order": shown});
    shop.answer(place("u4", "k1", 1), 409, code);
    let early = (Invariant::I6, "over-before-its-deadline");
    let ahead = |ms| Expected { clock_ahead_ms: ms, ..Expected::default() };
    assert_eq!(shop.rules_expecting(&ahead(HOLD_MS)), BTreeSet::new());
    assert_eq!(shop.rules_expecting(&ahead(HOLD_MS / 2)), BTreeSet::from([early]));
    shop.release(&held, "expired");
    let released = (Invariant::I6, "released-before-its-deadline");
    assert!(shop.rules_expecting(&ahead(HOLD_MS)).contains(&released));
}

#[test]
fn i6_an_order_released_once_it_is_paid_and_a_step_that_is_none() {
    let (mut shop, [sold, ..]) = busy_shop();
    shop.expire(&sold);
    shop.breaks(Invariant::I6, "released-once-paid");
    let (mut shop, [_, cancelled, ..]) = busy_shop();
    shop.row(&cancelled).status = "held".into();
    shop.event("order.held", Some(&cancelled), counters(-1, 1, 0), json!({}));
    shop.breaks(Invariant::I6, "no-such-step");
}

#[test]
fn i7_money_without_goods() {
    let (mut shop, [_, cancelled, ..]) = busy_shop();
    shop.books.database.refunds.clear();
    shop.breaks(Invariant::I7, "money-and-goods-part");
    shop.breaks(Invariant::I7, "refunds-differ");
    let webhook = Request::Webhook { order: cancelled, payment: "pay-3".into(), succeeded: true };
    let (mut shop, _) = busy_shop();
    shop.answer(webhook, 204, Value::Null);
    shop.breaks(Invariant::I7, "money-and-goods-part");
}

#[test]
fn i7_bought_and_due_as_well_and_bought_twice() {
    let (mut shop, [sold, ..]) = busy_shop();
    shop.books.database.refunds.push(refund_row("rfd_1", &sold, "pay-1"));
    shop.breaks(Invariant::I7, "money-and-goods-part");
    let (mut shop, _) = busy_shop();
    let shown = shop.shown(&sold);
    shop.answer(confirm(&sold, "pay-other"), 200, shown);
    shop.breaks(Invariant::I7, "money-and-goods-part");
}

#[test]
fn i7_goods_without_money_and_refunds_of_nothing() {
    let (mut shop, [sold, ..]) = busy_shop();
    shop.history.retain(
        |entry| !matches!(&entry.request, Request::Confirm { order, .. } if *order == sold),
    );
    shop.breaks(Invariant::I7, "goods-without-money");
    let (mut shop, [sold, ..]) = busy_shop();
    shop.books.database.refunds.push(refund_row("rfd_9", &sold, "pay-9"));
    shop.breaks(Invariant::I7, "refund-from-nowhere");
}

/// A sale whose last order Redis has forgotten, before anybody else knew of it.
fn forgetful_shop() -> (Shop, String) {
    let (mut shop, _) = busy_shop();
    let before = shop.books.clone();
    let gone = shop.place("u6", "k1", 1);
    shop.books = before;
    (shop, gone)
}

fn forgets(forgets: Forgets) -> Expected {
    let (forgot_ms, survives) = (Some(i64::MAX), Level::Replicated);
    Expected { forgets, forgot_ms, survives, ..Expected::default() }
}

#[test]
fn what_redis_alone_knew_may_be_forgotten_where_a_report_names_it() {
    let (mut shop, gone) = forgetful_shop();
    shop.breaks(Invariant::I3, "answered-order-is-gone");
    let told = BTreeSet::from([(Invariant::I3, "forgotten-and-not-told")]);
    assert_eq!(shop.rules_expecting(&forgets(Forgets::Untold)), BTreeSet::new());
    assert_eq!(shop.rules_expecting(&forgets(Forgets::Reported)), told);
    let report = |lost_orders, lost_max| Rebuild {
        outcome: "rebuilt".into(),
        why: "run".into(),
        seq_before: Some(1),
        lost_orders,
        lost_max,
    };
    shop.books.database.rebuilds = vec![report(Vec::new(), 1)];
    assert_eq!(shop.rules_expecting(&forgets(Forgets::Reported)), told);
    shop.books.database.rebuilds = vec![report(vec![gone.clone()], 0)];
    assert_eq!(shop.rules_expecting(&forgets(Forgets::Reported)), told);
    shop.books.database.rebuilds = vec![report(vec![gone], 1)];
    assert_eq!(shop.rules_expecting(&forgets(Forgets::Reported)), BTreeSet::new());
}

#[test]
fn what_was_promised_more_than_memory_is_never_forgotten() {
    let gone = BTreeSet::from([(Invariant::I3, "answered-order-is-gone")]);
    let (mut shop, _) = forgetful_shop();
    shop.promised("replicated");
    assert_eq!(shop.rules_expecting(&forgets(Forgets::Untold)), gone);
    let (mut shop, _) = forgetful_shop();
    shop.history.last_mut().expect("an answer").reply.body["durability"] = "recorded".into();
    assert_eq!(shop.rules_expecting(&forgets(Forgets::Untold)), gone);
}

#[test]
fn what_was_promised_is_judged_though_the_same_was_answered_at_memory_before() {
    let (mut shop, gone) = forgetful_shop();
    let again = shop.history.last().expect("an answer").clone();
    shop.history.push(again);
    shop.promised("replicated");
    // A tombstone is there, so that only the hold itself is missing.
    shop.books.database.orders.push(OrderRow {
        id: gone.clone(),
        buyer: String::new(),
        status: "cancelled".into(),
        lines: Lines::new(),
        returned: Lines::new(),
        payment: None,
        expires_ms: shop.now,
        seq: 0,
    });
    shop.event("order.cancelled", Some(&gone), Counters::default(), json!({}));
    let shown = shop.shown(&gone);
    shop.answer(Request::Cancel { order: gone }, 200, shown);
    let found = BTreeSet::from([(Invariant::I3, "answered-order-is-gone")]);
    assert_eq!(shop.rules_expecting(&forgets(Forgets::Untold)), found);
}

#[test]
fn what_a_level_outlives_depends_on_what_was_lost() {
    let gone = BTreeSet::from([(Invariant::I3, "answered-order-is-gone")]);
    let levels = ["memory", "replicated", "logged", "recorded"];
    for (survives, kept) in [(Level::Replicated, 1), (Level::Logged, 2), (Level::Recorded, 3)] {
        let expected = Expected { survives, ..forgets(Forgets::Untold) };
        for (at, level) in levels.into_iter().enumerate() {
            let (mut shop, _) = forgetful_shop();
            shop.promised(level);
            let found = if at < kept { BTreeSet::new() } else { gone.clone() };
            assert_eq!(shop.rules_expecting(&expected), found, "{level}, {survives:?}");
        }
    }
}

#[test]
fn only_what_was_asked_before_the_loss_may_be_forgotten() {
    let gone = BTreeSet::from([(Invariant::I3, "answered-order-is-gone")]);
    let (shop, _) = forgetful_shop();
    let sent_ms = shop.history.last().expect("an answer").sent_ms;
    let lost_at = |ms| Expected { forgot_ms: ms, ..forgets(Forgets::Untold) };
    assert_eq!(shop.rules_expecting(&lost_at(Some(sent_ms + 1))), BTreeSet::new());
    assert_eq!(shop.rules_expecting(&lost_at(Some(sent_ms))), gone);
    assert_eq!(shop.rules_expecting(&lost_at(None)), gone);
    // Answered once more since: found again, and not there.
    let (mut shop, _) = forgetful_shop();
    let again = shop.history.last().expect("an answer").clone();
    shop.history.push(Entry { sent_ms: sent_ms + 5, ..again });
    assert_eq!(shop.rules_expecting(&lost_at(Some(sent_ms + 1))), gone);
}

#[test]
fn a_durability_that_was_asked_for_and_not_served() {
    let broken = BTreeSet::from([(Invariant::I3, "preference-not-kept")]);
    let answered = |applied, shown: &str| {
        let (mut shop, _) = busy_shop();
        let entry = shop.history.last_mut().expect("an answer");
        (entry.asked, entry.reply.applied) = (Some("logged".into()), applied);
        entry.reply.body["durability"] = shown.into();
        shop.rules()
    };
    assert_eq!(answered(Some(Level::Logged), "logged"), BTreeSet::new());
    assert_eq!(answered(Some(Level::Recorded), "recorded"), BTreeSet::new());
    assert_eq!(answered(None, "logged"), broken);
    assert_eq!(answered(Some(Level::Memory), "logged"), broken);
    assert_eq!(answered(Some(Level::Logged), "memory"), broken);
}

#[test]
fn i1_an_undo_that_was_done_twice_or_is_no_opposite() {
    let (mut shop, _) = busy_shop();
    let taken = shop.adjust("some", 3);
    shop.undo("once", &taken);
    assert_eq!(shop.rules(), BTreeSet::new());
    let twice = shop.undo("twice", &taken);
    let found = (Invariant::I1, "undone-twice");
    assert_eq!(shop.rules(), BTreeSet::from([found]));
    // Of which the second was never answered, or as the first.
    shop.history.pop();
    assert!(shop.rules().contains(&found));
    shop.answer(undo("once", &taken), 200, json!({"id": twice}));
    shop.breaks(Invariant::I4, "key-and-adjustment-part");
    let (mut shop, _) = busy_shop();
    let taken = shop.adjust("some", 3);
    let id = shop.change_total("once", -6, Some(&taken));
    shop.answer(undo("once", &taken), 201, json!({"id": id}));
    let found = [(Invariant::I1, "no-opposite"), (Invariant::I1, "total-from-nowhere")];
    assert_eq!(shop.rules(), BTreeSet::from(found));
}

#[test]
fn i3_a_total_that_was_not_set_as_asked() {
    let (mut shop, _) = busy_shop();
    let set = shop.set_total("count", (10, 14), (10, 7));
    shop.undo("recount", &set);
    assert_eq!(shop.rules(), BTreeSet::new());
    shop.books.database.adjustments.get_mut(&set).expect("its row").set_total = Some(15);
    shop.breaks(Invariant::I3, "answered-adjustment-is-gone");
    shop.breaks(Invariant::I2, "adjustment-differs");
    // By its answer it comes to another total, or the counters were not those that were looked at.
    for before in [(11, 7), (10, 8)] {
        let (mut shop, _) = busy_shop();
        shop.set_total("count", (10, 14), before);
        assert_eq!(shop.rules(), BTreeSet::from([(Invariant::I3, "answered-adjustment-is-gone")]));
    }
}

#[test]
fn i1_units_moved_by_an_undo_without_its_row() {
    let (mut shop, _) = busy_shop();
    let taken = shop.adjust("some", 3);
    let undone = shop.undo("once", &taken);
    let data = shop.books.topic.records.last().expect("its event").data.clone();
    shop.event("stock.adjusted", None, counters(-3, 0, 0), data);
    shop.breaks(Invariant::I1, "total-from-nowhere");
    shop.breaks(Invariant::I2, "adjustment-differs");
    let (mut shop, _) = busy_shop();
    let taken = shop.adjust("some", 3);
    shop.undo("once", &taken);
    shop.books.database.adjustments.get_mut(&undone).expect("its row").undoes = None;
    shop.breaks(Invariant::I2, "adjustment-differs");
}

#[test]
fn i3_an_undo_that_is_gone_or_that_nobody_asked_for() {
    let (mut shop, _) = busy_shop();
    let taken = shop.adjust("some", 3);
    shop.answer(undo("once", &taken), 201, json!({"id": "adj_once"}));
    shop.breaks(Invariant::I3, "answered-adjustment-is-gone");
    shop.breaks(Invariant::I1, "total-from-nowhere");
    // Not at `memory` either: an adjustment is answered when it is recorded.
    let expected = forgets(Forgets::Untold);
    assert!(
        shop.rules_expecting(&expected).contains(&(Invariant::I3, "answered-adjustment-is-gone"))
    );
    let (mut shop, _) = busy_shop();
    let taken = shop.adjust("some", 3);
    shop.change_total("nobody", -3, Some(&taken));
    shop.breaks(Invariant::I3, "adjustment-from-nowhere");
    let (mut shop, _) = busy_shop();
    let taken = shop.adjust("some", 3);
    let refused = json!({"code": "already-undone", "undone_by": "adj_other"});
    shop.answer(undo("once", &taken), 409, refused);
    assert_eq!(shop.rules(), BTreeSet::from([(Invariant::I3, "undone-by-nothing")]));
}

#[test]
fn i3_a_sale_that_sells_though_it_is_closed() {
    let (mut shop, [_, _, _, held]) = busy_shop();
    shop.close(true);
    // Settling goes on, and so do changes of stock and another that closes it.
    shop.confirm(&held, "pay-4");
    shop.adjust("for returns", 1);
    shop.answer(close(), 200, json!({"id": SALE, "state": "closed"}));
    assert_eq!(shop.rules(), BTreeSet::new());
    let found = BTreeSet::from([(Invariant::I3, "sold-though-closed")]);
    shop.place("u9", "k1", 1);
    assert_eq!(shop.rules(), found);
    // Said only by an answer, of which the ledger knows nothing more than it should.
    let (mut shop, [_, _, _, held]) = busy_shop();
    shop.close(true);
    let shown = shop.shown(&held);
    shop.now += 10;
    shop.answer(place("u4", "k1", 1), 201, shown);
    assert_eq!(shop.rules(), found);
    shop.history.last_mut().expect("an answer").reply.replayed = true;
    assert_eq!(shop.rules(), BTreeSet::new());
    shop.event("sale.resumed", None, Counters::default(), json!({}));
    assert_eq!(shop.rules(), found);
}

#[test]
fn i3_a_sale_that_was_closed_twice_by_nobody_or_not_for_good() {
    let (mut shop, _) = busy_shop();
    shop.close(false);
    assert_eq!(shop.rules(), BTreeSet::from([(Invariant::I3, "closed-by-nobody")]));
    shop.answer(close(), 409, json!({"code": "overloaded"}));
    assert_eq!(shop.rules(), BTreeSet::from([(Invariant::I3, "closed-by-nobody")]));
    let (mut shop, _) = busy_shop();
    shop.close(true);
    shop.event("sale.closed", None, Counters::default(), json!({}));
    assert_eq!(shop.rules(), BTreeSet::from([(Invariant::I3, "closed-twice")]));
    let (mut shop, _) = busy_shop();
    shop.answer(close(), 200, json!({"id": SALE, "state": "closed"}));
    assert_eq!(shop.rules(), BTreeSet::from([(Invariant::I3, "closed-is-open")]));
    let (mut shop, _) = busy_shop();
    shop.close(true);
    shop.books.lane.is_closed = false;
    assert_eq!(shop.rules(), BTreeSet::from([(Invariant::I2, "phase-differs")]));
}

#[test]
fn i7_a_refund_that_was_settled_otherwise_than_somebody_said() {
    // Forgotten.
    let (mut shop, _) = busy_shop();
    shop.books.database.refunds[0].settled_ms = None;
    assert_eq!(shop.rules(), BTreeSet::from([(Invariant::I7, "settled-otherwise")]));
    assert_eq!(
        shop.rules_expecting(&forgets(Forgets::Untold)),
        BTreeSet::from([(Invariant::I7, "settled-otherwise")])
    );
    // Settled twice: the second word counted.
    let (mut shop, _) = busy_shop();
    let again = shop.history.iter_mut().rfind(|entry| entry.request == settle("rfd_pay-2"));
    again.expect("an answer").reply.body["settled_at"] = rfc(shop.now).into();
    assert_eq!(shop.rules(), BTreeSet::from([(Invariant::I7, "settled-otherwise")]));
    // Another's.
    let (mut shop, _) = busy_shop();
    let again = shop.history.iter_mut().rfind(|entry| entry.request == settle("rfd_pay-2"));
    again.expect("an answer").reply.body["payment_id"] = "pay-9".into();
    assert_eq!(shop.rules(), BTreeSet::from([(Invariant::I7, "settled-otherwise")]));
}

#[test]
fn i7_a_refund_that_nobody_settled_or_that_is_due_twice() {
    let (mut shop, _) = busy_shop();
    shop.history.retain(|entry| entry.request != settle("rfd_pay-2"));
    let nobody = BTreeSet::from([(Invariant::I7, "settled-by-nobody")]);
    assert_eq!(shop.rules(), nobody);
    shop.answer(settle("rfd_pay-2"), 404, json!({"code": "refund-not-found"}));
    assert_eq!(shop.rules(), nobody);
    let (mut shop, [_, cancelled, ..]) = busy_shop();
    shop.books.database.refunds.push(refund_row("rfd_other", &cancelled, "pay-2"));
    assert_eq!(shop.rules(), BTreeSet::from([(Invariant::I7, "due-twice")]));
    let (mut shop, _) = busy_shop();
    let told = shop.history.iter_mut().find(|entry| entry.reply.body["refund_id"].is_string());
    let told = told.expect("an answer");
    told.request = confirm("ord_other", "pay-2");
    shop.breaks(Invariant::I7, "refund-of-another");
}

#[test]
fn i5_an_echo_that_was_passed_over_in_silence() {
    let (mut shop, _) = busy_shop();
    seal(&mut shop);
    let echo = shop.books.topic.records[3].clone();
    let (offset, seq) = (102, shop.books.database.recorded + 1);
    shop.books.topic.records.push(Record { offset, seq, ..echo });
    // It may not be read yet.
    assert_eq!(shop.rules(), BTreeSet::new());
    shop.place("u9", "k1", 1);
    let record = shop.books.topic.records.last_mut().expect("its event");
    (record.offset, record.epoch) = (103, 2);
    shop.books.database.ledger.last_mut().expect("its row").epoch = 2;
    assert_eq!(stale(&shop.books.topic.records).count(), 1);
    shop.breaks(Invariant::I5, "echo-not-refused");
    let (reason, status) = ("stale-epoch".to_owned(), "open".to_owned());
    let (partition, epoch) = (0, Some(1));
    let letter = DeadLetter { reason, status, partition, offset, epoch, seq: Some(seq) };
    shop.books.database.dead_letters.push(letter);
    let expected = Expected { dead_letters: &["stale-epoch"], ..Expected::default() };
    let echo = (Invariant::I5, "echo-not-refused");
    assert!(!shop.rules_expecting(&expected).contains(&echo));
    shop.books.database.dead_letters[0].offset = 101;
    assert!(shop.rules_expecting(&expected).contains(&echo));
}

#[test]
fn i1_a_total_that_callers_cannot_explain() {
    let (mut shop, _) = busy_shop();
    shop.event("stock.adjusted", None, counters(3, 0, 0), json!({}));
    shop.breaks(Invariant::I1, "total-from-nowhere");
    shop.breaks(Invariant::I3, "adjustment-from-nowhere");
    shop.breaks(Invariant::I2, "adjustment-without-id");
    let (mut shop, _) = busy_shop();
    shop.event("sale.defined", None, counters(3, 0, 0), json!({"version": 2}));
    shop.breaks(Invariant::I1, "total-from-nowhere");
}

#[test]
fn i1_an_event_that_moves_other_units_than_its_order_has() {
    let (mut shop, [_, _, _, held]) = busy_shop();
    // Released twice over, and consistently so everywhere.
    let row = shop.row(&held);
    row.status = "cancelled".into();
    shop.count("u4", -1);
    shop.event("order.cancelled", Some(&held), counters(2, -2, 0), json!({}));
    let shown = shop.shown(&held);
    shop.answer(Request::Cancel { order: held }, 200, shown);
    shop.breaks(Invariant::I1, "moved-otherwise");
    let (mut shop, [_, _, _, held]) = busy_shop();
    shop.row(&held).lines = lines(2);
    shop.confirm(&held, "pay-4");
    shop.breaks(Invariant::I1, "moved-otherwise");
}

#[test]
fn i3_other_lines_bought_than_were_asked_for() {
    let (mut shop, _) = busy_shop();
    let part = shop.place("u8", "k1", 2);
    shop.confirm(&part, "pay-8");
    assert_eq!(shop.rules(), BTreeSet::new());
    let asked = |shop: &mut Shop, asked: Lines| {
        let Some(Entry { request: Request::Confirm { lines, .. }, .. }) = shop.history.last_mut()
        else {
            panic!("the last call confirmed");
        };
        *lines = Some(asked);
    };
    asked(&mut shop, lines(1));
    assert_eq!(shop.rules(), BTreeSet::from([(Invariant::I3, "bought-otherwise")]));
    asked(&mut shop, lines(2));
    assert_eq!(shop.rules(), BTreeSet::new());
    shop.history.last_mut().expect("a call").sent_ms += 1;
    shop.breaks(Invariant::I3, "bought-otherwise");
}

#[test]
fn i6_a_hold_given_up_that_nobody_cancelled() {
    let nobody = BTreeSet::from([(Invariant::I6, "cancelled-by-nobody")]);
    let (mut shop, [_, _, _, held]) = busy_shop();
    shop.release(&held, "cancelled");
    assert_eq!(shop.rules(), nobody);
    let refused = json!({"code": "overloaded"});
    shop.answer(Request::Cancel { order: held.clone() }, 503, refused);
    assert_eq!(shop.rules(), nobody);
    let (sale, buyer, key) = (SALE.into(), "u4".into(), "k1".into());
    let shown = shop.shown(&held);
    shop.answer(Request::CancelByKey { sale, buyer, key }, 200, shown);
    assert_eq!(shop.rules(), BTreeSet::new());
    shop.history.last_mut().expect("a call").sent_ms += 1;
    assert_eq!(shop.rules(), nobody);
}

#[test]
fn i6_what_was_sold_taken_back_though_nobody_asked_or_more_than_was_asked() {
    let nobody = BTreeSet::from([(Invariant::I6, "returned-by-nobody")]);
    let (mut shop, [sold, ..]) = busy_shop();
    shop.take_back(&sold, 1, true);
    assert_eq!(shop.rules(), nobody);
    shop.answer(give_back(&sold, "b3", None, false), 503, Value::Null);
    assert_eq!(shop.rules(), nobody);
    let (mut shop, [sold, ..]) = busy_shop();
    // Once would have been right.
    shop.give_back(&sold, "b3", 1, true);
    assert_eq!(shop.rules(), BTreeSet::new());
    shop.take_back(&sold, 1, true);
    shop.answer(give_back(&sold, "b3", Some(lines(1)), true), 503, Value::Null);
    assert_eq!(shop.rules(), nobody);
    let (mut shop, [sold, ..]) = busy_shop();
    shop.take_back(&sold, 2, true);
    let shown = shop.shown(&sold);
    shop.answer(give_back(&sold, "b3", Some(lines(1)), true), 200, shown);
    assert_eq!(shop.rules(), nobody);
}

#[test]
fn i7_a_payment_refused_for_good_that_nobody_owes() {
    for code in ["payment-too-late", "order-cancelled", "already-paid"] {
        let (mut shop, [_, cancelled, ..]) = busy_shop();
        shop.answer(confirm(&cancelled, "pay-9"), 409, json!({"code": code}));
        shop.breaks(Invariant::I7, "money-and-goods-part");
    }
}

#[test]
fn i7_goods_without_money_though_they_came_back_or_the_payment_was_not_taken() {
    for refused in [false, true] {
        let (mut shop, _) = busy_shop();
        let mut calls = shop.history.iter_mut().filter(
            |entry| matches!(&entry.request, Request::Confirm { payment, .. } if payment == "pay-5"),
        );
        let call = calls.next().expect("a payment");
        if refused {
            (call.reply.outcome, call.reply.body) = (Outcome::Refused, json!({}));
        } else {
            call.request = Request::Stock { sale: SALE.into() };
        }
        shop.breaks(Invariant::I7, "goods-without-money");
    }
}
