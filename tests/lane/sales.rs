//! What a lane promises to operators.

use holdfast::domain::event::{Body, SaleStep};
use holdfast::domain::sale::Definition;
use holdfast::domain::stock::{Adjustment, Counters, Reason, TOTAL_MAX, TotalChange};
use holdfast::lanes::LaneError;
use holdfast::lanes::command::{Adjust, Command, Define, IfVersion, PhaseChange, Preview, Undo};
use holdfast::lanes::reply::{
    Adjusted, Cancelled, ChangeRefusal, Confirmed, Defined, Phased, Previewed, Refusal, Reserved,
    Undone,
};

use crate::raw::dump;
use crate::sale::{
    Outcome, Sale, adjusted, definition, held, note, refused, sku, undone, wait_past,
};

fn with_stock(mut definition: Definition, stock: i64) -> Definition {
    definition.skus[0].stock = stock;
    definition
}

#[tokio::test]
async fn an_adjustment_happens_once_and_shows_the_counters_before_it() {
    let sale = Sale::of(&[("phone", 10)]).await;
    held(sale.reserve("ann", "k", &[("phone", 3)]).await);
    let done = adjusted(sale.adjust("a", "phone", 5).await);
    let before = Counters { available: 7, held: 3, sold: 0, version: 0 };
    assert_eq!((Counters::from(done.before), done.delta), (before, 5));
    assert_eq!(sale.adjust("a", "phone", 5).await, Adjusted::Replayed(done));
    assert_eq!(sale.adjust("a", "phone", 6).await, Adjusted::KeyReused);
    let reworded = Adjust { note: note("another"), ..sale.adjusting("a", "phone", 5) };
    let outcome = sale.lanes.adjust(reworded).await.unwrap().outcome;
    assert_eq!(outcome, Adjusted::KeyReused, "what is said of it is part of what it means");
    let unknown = sale.adjust("b", "ghost", 5).await;
    assert_eq!(unknown, Adjusted::Refused(ChangeRefusal::UnknownSku));
    assert_eq!(sale.stock("phone").await, (12, 3, 0));
}

#[tokio::test]
async fn an_adjustment_never_takes_what_is_held_or_sold_nor_leaves_the_range() {
    let sale = Sale::of(&[("phone", 10)]).await;
    held(sale.reserve("ann", "k", &[("phone", 3)]).await);
    let now = Counters { available: 7, held: 3, sold: 0, version: 0 };
    let in_use = Adjusted::Refused(ChangeRefusal::StockInUse(now));
    let out_of_range = Adjusted::Refused(ChangeRefusal::OutOfRange(now));
    assert_eq!(sale.adjust("a", "phone", -8).await, in_use);
    assert_eq!(sale.set_total("a", "phone", 2, 0).await, in_use);
    assert_eq!(sale.adjust("a", "phone", -11).await, out_of_range);
    assert_eq!(sale.adjust("a", "phone", TOTAL_MAX - 9).await, out_of_range);
    assert_eq!(sale.adjust("a", "phone", i64::MAX).await, out_of_range);
    for (key, delta) in [("to-zero", -7), ("to-most", TOTAL_MAX - 3)] {
        adjusted(sale.adjust(key, "phone", delta).await);
    }
    assert_eq!(sale.stock("phone").await, (TOTAL_MAX - 3, 3, 0));
}

#[tokio::test]
async fn a_total_is_set_for_the_version_that_it_was_counted_at() {
    let sale = Sale::of(&[("phone", 10)]).await;
    held(sale.reserve("ann", "k", &[("phone", 3)]).await);
    let unconditional = Adjust { if_version: None, ..sale.setting("a", "phone", 8, 0) };
    let ask = async |command| sale.lanes.adjust(command).await.unwrap().outcome;
    let required = Adjusted::Refused(ChangeRefusal::PreconditionRequired);
    assert_eq!(ask(unconditional.clone()).await, required);
    let done = adjusted(sale.set_total("a", "phone", 8, 0).await);
    assert_eq!((done.delta, done.set_total, done.after().total), (-2, Some(8), 8));

    let replayed = Adjusted::Replayed(done);
    assert_eq!(
        sale.set_total("a", "phone", 8, 0).await,
        replayed,
        "before its version is looked at"
    );
    assert_eq!(ask(unconditional).await, replayed);
    assert_eq!(sale.set_total("a", "phone", 9, 1).await, Adjusted::KeyReused);
    assert_eq!(sale.adjust("a", "phone", -2).await, Adjusted::KeyReused, "that is what came of it");

    let now = Counters { available: 5, held: 3, sold: 0, version: 1 };
    let stale = Adjusted::Refused(ChangeRefusal::PreconditionFailed(now));
    assert_eq!(sale.set_total("b", "phone", 9, 0).await, stale);
    let none =
        Adjust { if_version: Some(IfVersion::OneOf(vec![])), ..sale.adjusting("b", "phone", 1) };
    assert_eq!(ask(none).await, stale, "a change by some units may name a version too");
    let several = Adjust {
        if_version: Some(IfVersion::OneOf(vec![11, 1])),
        ..sale.adjusting("b", "phone", 1)
    };
    adjusted(ask(several).await);
    let any = Adjust { if_version: Some(IfVersion::Any), ..sale.setting("c", "phone", 20, 0) };
    assert_eq!(adjusted(ask(any).await).delta, 11);
    assert_eq!(sale.stock("phone").await, (17, 3, 0));
}

#[tokio::test]
async fn a_total_that_is_right_is_an_adjustment_by_nothing() {
    let sale = Sale::of(&[("phone", 10)]).await;
    let done = adjusted(sale.set_total("a", "phone", 10, 0).await);
    assert_eq!((done.delta, done.before.version, done.after().version), (0, 0, 1));
    let undo = undone(sale.undo("u", &done.id).await);
    assert_eq!((undo.delta, undo.set_total), (0, None));
    assert_eq!(sale.stock("phone").await, (10, 0, 0));
    assert_eq!(sale.raw().await.stock["phone"].version, 2);
    let events = sale.events_after(1).await;
    assert_eq!(events.len(), 2);
    sale.raw().await.check();
}

#[tokio::test]
async fn a_preview_says_what_an_adjustment_would_and_changes_nothing() {
    let sale = Sale::of(&[("phone", 10)]).await;
    held(sale.reserve("ann", "k", &[("phone", 3)]).await);
    let untouched = dump(&sale.redis, &sale.keys()).await;
    let before = Counters { available: 7, held: 3, sold: 0, version: 0 };
    let ask = async |change, if_version| {
        let preview = Preview { if_version, ..sale.previewing("phone", change) };
        sale.preview(preview).await
    };
    let first = Some(IfVersion::OneOf(vec![0]));
    let possible = |delta| Previewed::Possible { delta, before };
    assert_eq!(ask(TotalChange::By(-7), None).await, possible(-7));
    assert_eq!(ask(TotalChange::To(3), first.clone()).await, possible(-7));
    assert_eq!(ask(TotalChange::To(10), first.clone()).await, possible(0));
    for (change, if_version, refusal) in [
        (TotalChange::To(3), None, ChangeRefusal::PreconditionRequired),
        (
            TotalChange::To(3),
            Some(IfVersion::OneOf(vec![1])),
            ChangeRefusal::PreconditionFailed(before),
        ),
        (TotalChange::To(2), first, ChangeRefusal::StockInUse(before)),
        (TotalChange::By(-11), None, ChangeRefusal::OutOfRange(before)),
    ] {
        assert_eq!(ask(change, if_version).await, Previewed::Refused(refusal));
    }
    let ghost = sale.preview(sale.previewing("ghost", TotalChange::By(1))).await;
    assert_eq!(ghost, Previewed::Refused(ChangeRefusal::UnknownSku));
    assert!(dump(&sale.redis, &sale.keys()).await == untouched);
}

#[tokio::test]
async fn an_undo_is_the_exact_opposite_once_and_can_be_undone() {
    let sale = Sale::of(&[("phone", 10)]).await;
    let done = adjusted(sale.adjust("a", "phone", -4).await);
    let undo = Undo { note: Some("it was there".into()), ..sale.undoing("u", &done.id) };
    let ask = async |undo: &Undo| sale.lanes.undo(undo.clone()).await.unwrap().outcome;
    let second = undone(ask(&undo).await);
    assert_eq!((second.delta, second.note.reason), (4, Reason::Correction));
    assert_eq!(second.note.reference, done.note.reference, "the original's");
    assert_eq!(second.note.note.as_deref(), Some("it was there"));
    assert_eq!(second.undoes.as_ref(), Some(&done.id));
    assert_eq!(Counters::from(second.before).version, 1);

    assert_eq!(ask(&undo).await, Undone::Replayed(second.clone()));
    assert_eq!(sale.undo("u", &done.id).await, Undone::KeyReused, "another note");
    assert_eq!(sale.undo("u", &second.id).await, Undone::KeyReused, "another adjustment");
    assert_eq!(sale.undo("a", &done.id).await, Undone::KeyReused, "no undo at all");
    let likewise = Adjust { note: second.note.clone(), ..sale.adjusting("u", "phone", 4) };
    let outcome = sale.lanes.adjust(likewise).await.unwrap().outcome;
    assert_eq!(outcome, Adjusted::KeyReused, "no plain adjustment, whatever it says");
    let by = second.id.clone();
    assert_eq!(sale.undo("v", &done.id).await, Undone::AlreadyUndone { by: by.clone() });
    let shown = Adjustment { undone_by: Some(by), ..done.clone() };
    assert_eq!(sale.adjust("a", "phone", -4).await, Adjusted::Replayed(shown));

    let third = undone(sale.undo("v", &second.id).await);
    assert_eq!((third.delta, third.undoes.as_ref()), (-4, Some(&second.id)));
    let again = sale.undo("w", &done.id).await;
    assert!(matches!(again, Undone::AlreadyUndone { .. }), "the original stays undone: {again:?}");
    assert_eq!(sale.undo("w", &sale.adjustment_id("never")).await, Undone::Unknown);
    assert_eq!(sale.undo("w", &sale.adjustment_id("w")).await, Undone::Unknown, "nor itself");
    assert_eq!(sale.stock("phone").await, (6, 0, 0));
    sale.raw().await.check();
}

#[tokio::test]
async fn an_undo_takes_only_what_is_available_and_keeps_the_range() {
    let sale = Sale::of(&[("phone", 1)]).await;
    let restock = adjusted(sale.adjust("a", "phone", 2).await);
    held(sale.reserve("ann", "k", &[("phone", 2)]).await);
    let sku = restock.sku.clone();
    let counters = Counters { available: 1, held: 2, sold: 0, version: 1 };
    assert_eq!(
        sale.undo("u", &restock.id).await,
        Undone::StockInUse { sku: sku.clone(), counters }
    );
    let loss = adjusted(sale.adjust("b", "phone", -1).await);
    adjusted(sale.adjust("c", "phone", TOTAL_MAX - 2).await);
    let counters = Counters { available: TOTAL_MAX - 2, held: 2, sold: 0, version: 3 };
    assert_eq!(sale.undo("u", &loss.id).await, Undone::OutOfRange { sku, counters });
    undone(sale.undo("u", &restock.id).await);
    undone(sale.undo("v", &loss.id).await);
    assert_eq!(sale.stock("phone").await, (TOTAL_MAX - 3, 2, 0));
}

#[tokio::test]
async fn of_two_undos_at_once_one_wins() {
    for alike in [false, true] {
        let sale = Sale::of(&[("phone", 10)]).await;
        let done = adjusted(sale.adjust("a", "phone", 5).await);
        // Half of them meet in one call of the script, the others in calls of their own.
        let undo = async |sale: &Sale, n: usize| {
            let key = if alike { "u".to_owned() } else { format!("u{n}") };
            sale.undo(&key, &done.id).await
        };
        let elsewhere = sale.elsewhere();
        let undos = (0..20).map(|n| undo(if n % 2 == 0 { &sale } else { &elsewhere }, n));
        let outcomes = futures_util::future::join_all(undos).await;
        let won: Vec<_> = outcomes.iter().filter(|o| matches!(o, Undone::Undone(_))).collect();
        let [Undone::Undone(winner)] = won[..] else { panic!("{outcomes:?}") };
        let same = if alike {
            Undone::Replayed(winner.clone())
        } else {
            Undone::AlreadyUndone { by: winner.id.clone() }
        };
        assert_eq!(outcomes.iter().filter(|outcome| **outcome == same).count(), 19, "{outcomes:?}");
        assert_eq!(sale.stock("phone").await, (10, 0, 0));
        sale.raw().await.check();
    }
}

#[tokio::test]
async fn an_adjustment_its_undo_and_that_ones_undo_may_come_in_one_call() {
    let sale = Sale::of(&[("phone", 10)]).await;
    let [a, u] = ["a", "u"].map(|key| sale.adjustment_id(key));
    let commands = [
        Command::Adjust(sale.adjusting("a", "phone", 5)),
        Command::Undo(sale.undoing("u", &a)),
        Command::Undo(sale.undoing("v", &u)),
        Command::Undo(sale.undoing("w", &a)),
    ];
    let answers = sale.ask_at_once(&commands).await;
    let outcomes: Vec<_> = answers.into_iter().map(|answer| answer.unwrap().outcome).collect();
    assert!(matches!(outcomes[2], Outcome::Undone(Undone::Undone(_))), "{outcomes:?}");
    assert_eq!(outcomes[3], Outcome::Undone(Undone::AlreadyUndone { by: u }));
    assert_eq!(sale.stock("phone").await, (15, 0, 0));
    assert_eq!(sale.entries_after(1).await.len(), 1, "one call");
    sale.raw().await.check();
}

#[tokio::test]
async fn in_an_archived_sale_nothing_is_undone_but_keys_find_what_was() {
    let sale = Sale::of(&[("phone", 9)]).await;
    let done = adjusted(sale.adjust("a", "phone", 1).await);
    let undo = undone(sale.undo("u", &done.id).await);
    sale.phase(PhaseChange::Close).await;
    sale.advance("relay", 4, 4).await;
    assert!(sale.lanes.archive(&sale.lane, 0).await.unwrap().outcome);
    assert_eq!(sale.undo("v", &undo.id).await, Undone::Archived);
    assert_eq!(sale.undo("v", &sale.adjustment_id("never")).await, Undone::Unknown);
    assert_eq!(sale.undo("u", &done.id).await, Undone::Replayed(undo));
    let preview = sale.previewing("phone", TotalChange::By(1));
    assert_eq!(sale.preview(preview).await, Previewed::Refused(ChangeRefusal::Archived));
    assert_eq!(sale.stock("phone").await, (9, 0, 0));
}

#[tokio::test]
async fn a_definition_is_applied_once_and_an_older_one_never() {
    let first = definition(&[("phone", 10)]);
    let sale = Sale::defined(first.clone()).await;
    assert_eq!(sale.define(1, first.clone()).await, Defined::Same);
    assert_eq!(sale.define(1, with_stock(first.clone(), 11)).await, Defined::Stale { version: 1 });
    assert_eq!(sale.define(3, with_stock(first.clone(), 12)).await, Defined::Defined);
    assert_eq!(sale.define(2, first).await, Defined::Stale { version: 3 });
    assert_eq!(sale.stock("phone").await, (12, 0, 0));
}

#[tokio::test]
async fn nobody_but_its_creator_defines_a_lane_that_is_not_there() {
    let sale = Sale::undefined().await;
    let command = Define { create_epoch: None, ..sale.defining(1, definition(&[("phone", 1)])) };
    let outcome = sale.lanes.define(&sale.lane, command).await;
    assert!(matches!(outcome, Err(LaneError::Missing)), "{outcome:?}");
    assert!(matches!(sale.lanes.stock(&sale.lane).await, Err(LaneError::Missing)));
    assert!(dump(&sale.redis, &sale.keys()).await.iter().all(Option::is_none));
}

#[tokio::test]
async fn a_lane_that_lost_its_head_is_neither_sold_from_nor_made_anew_nor_changed() {
    let sale = Sale::of(&[("phone", 9)]).await;
    let order = sale.hold("ann", "k", &[("phone", 1)], 1).await;
    wait_past(&sale, order.expires_at).await;
    let mut redis = sale.redis.clone();
    let () = redis::cmd("DEL").arg(sale.keys().lane()).query_async(&mut redis).await.unwrap();
    let before = dump(&sale.redis, &sale.keys()).await;
    for command in [
        Command::Reserve(sale.reserving("bob", "k", &[("phone", 1)])),
        Command::Confirm(sale.confirming(&order.id, "pay")),
        Command::Expire { max: 10 },
        Command::Define(Box::new(sale.defining(1, definition(&[("phone", 9)])))),
    ] {
        assert_eq!(sale.ask(command).await.unwrap().outcome, crate::sale::Outcome::Missing);
    }
    assert_eq!(dump(&sale.redis, &sale.keys()).await, before);
}

#[tokio::test]
async fn until_somebody_orders_a_definition_may_change_everything() {
    let sale = Sale::of(&[("phone", 10), ("case", 5)]).await;
    let outcome = sale.define(2, definition(&[("phone", 8), ("pen", 7)])).await;
    assert_eq!(outcome, Defined::Defined);
    let raw = sale.raw().await;
    raw.check();
    let stock: Vec<_> = raw.stock.iter().map(|(sku, s)| (sku.as_str(), s.available)).collect();
    assert_eq!(stock, [("pen", 7), ("phone", 8)]);
    let events = sale.events_after(1).await;
    let Body::Sale(SaleStep::Defined { stock, .. }) = &events[0].body else { panic!("{events:?}") };
    let mut moved: Vec<_> = stock.iter().map(|set| (set.sku.as_str(), set.delta)).collect();
    moved.sort();
    assert_eq!(moved, [("case", -5), ("pen", 7), ("phone", -2)]);
}

#[tokio::test]
async fn once_somebody_ordered_stock_is_fixed_and_the_rest_may_change() {
    let first = definition(&[("phone", 10), ("case", 5)]);
    let sale = Sale::defined(first.clone()).await;
    sale.cancel_by_key("ann", "k").await;
    let outcome = sale.define(2, with_stock(first.clone(), 11)).await;
    assert_eq!(outcome, Defined::InUse { why: "changes the stock of SKU phone".into() });
    let outcome = sale.define(2, definition(&[("phone", 10)])).await;
    assert_eq!(outcome, Defined::InUse { why: "removes SKU case".into() });
    let mut more = first;
    more.skus.push(sku("pen"));
    more.per_buyer_limit = Some(1);
    assert_eq!(sale.define(2, more).await, Defined::Defined);
    assert_eq!(sale.stock("pen").await, (100, 0, 0));
    let over = refused(sale.reserve("bob", "k", &[("pen", 2)]).await);
    assert_eq!(over, Refusal::PurchaseLimit { limit: 1, already: 0, sku: None });
}

#[tokio::test]
async fn a_sku_that_was_out_of_the_definition_may_come_back_in_the_same_call() {
    let both = definition(&[("phone", 10), ("case", 5)]);
    let sale = Sale::defined(both.clone()).await;
    let call = [(2, definition(&[("phone", 10)])), (3, with_stock(both, 4))]
        .map(|(version, new)| Command::Define(Box::new(sale.defining(version, new))));
    for answer in sale.ask_at_once(&call).await {
        assert_eq!(answer.unwrap().outcome, crate::sale::Outcome::Defined(Defined::Defined));
    }
    assert_eq!((sale.stock("phone").await, sale.stock("case").await), ((4, 0, 0), (5, 0, 0)));
}

#[tokio::test]
async fn settling_goes_on_while_a_sale_is_paused_and_after_it_closed() {
    let sale = Sale::of(&[("phone", 9)]).await;
    let mut ids = Vec::new();
    for key in ["k0", "k1", "k2"] {
        ids.push(held(sale.reserve("ann", key, &[("phone", 1)]).await).id);
    }
    sale.phase(PhaseChange::Pause).await;
    assert!(matches!(sale.confirm(&ids[0], "pay").await, Confirmed::Confirmed(_)));
    assert_eq!(sale.phase(PhaseChange::Close).await, Phased::Done);
    assert_eq!(sale.phase(PhaseChange::Close).await, Phased::Done);
    assert_eq!(sale.phase(PhaseChange::Resume).await, Phased::Closed, "close is final");
    assert!(matches!(sale.confirm(&ids[1], "pay").await, Confirmed::Confirmed(_)));
    assert!(matches!(sale.cancel(&ids[2]).await, Cancelled::Cancelled(_)));
    assert!(matches!(sale.adjust("a", "phone", 1).await, Adjusted::Adjusted(_)));
    assert_eq!(sale.stock("phone").await, (8, 0, 2));
}

#[tokio::test]
async fn a_sale_leaves_redis_only_closed_settled_recorded_and_after_its_retention() {
    let sale = Sale::of(&[("phone", 9)]).await;
    let archive = async |retention_ms| sale.lanes.archive(&sale.lane, retention_ms).await.unwrap();
    let bought = held(sale.reserve("ann", "k0", &[("phone", 1)]).await);
    sale.confirm(&bought.id, "pay").await;
    let order = held(sale.reserve("ann", "k1", &[("phone", 1)]).await);
    sale.advance("relay", 4, 4).await;
    assert!(!archive(0).await.outcome, "it is open");
    sale.phase(PhaseChange::Close).await;
    sale.advance("relay", 5, 5).await;
    assert!(!archive(0).await.outcome, "something is held");
    sale.cancel(&order.id).await;
    assert!(!archive(0).await.outcome, "the cancel is not recorded");
    sale.advance("relay", 6, 6).await;
    assert!(!archive(3_600_000).await.outcome, "its retention is not over");
    assert!(!sale.lanes.forget(&sale.lane).await.unwrap(), "it is not archived");

    assert!(archive(0).await.outcome);
    assert!(archive(0).await.outcome, "and stays so");
    assert_eq!(refused(sale.reserve("bob", "k", &[("phone", 1)]).await), Refusal::Archived);
    assert!(matches!(sale.reserve("ann", "k0", &[("phone", 1)]).await, Reserved::Replayed(_)));
    assert_eq!(sale.cancel_by_key("bob", "k").await, Cancelled::Archived);
    let archived = Adjusted::Refused(ChangeRefusal::Archived);
    assert_eq!(sale.adjust("a", "phone", 1).await, archived);
    assert_eq!(sale.phase(PhaseChange::Close).await, Phased::Archived);
    assert_eq!(sale.define(9, definition(&[("phone", 9)])).await, Defined::Archived);

    assert!(!sale.lanes.forget(&sale.lane).await.unwrap(), "its last event is not recorded");
    sale.advance("relay", 7, 7).await;
    assert!(sale.lanes.forget(&sale.lane).await.unwrap());
    assert!(sale.lanes.forget(&sale.lane).await.unwrap(), "gone is gone");
    assert!(dump(&sale.redis, &sale.keys()).await.iter().all(Option::is_none));
}
