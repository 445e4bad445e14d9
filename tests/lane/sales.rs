//! What a lane promises to operators.

use holdfast::domain::event::{Body, SaleStep};
use holdfast::domain::sale::Definition;
use holdfast::domain::stock::{Counters, TOTAL_MAX};
use holdfast::lanes::LaneError;
use holdfast::lanes::command::{Adjust, Command, Define, PhaseChange};
use holdfast::lanes::reply::{Adjusted, Cancelled, Confirmed, Defined, Phased, Refusal, Reserved};

use crate::raw::dump;
use crate::sale::{Sale, definition, held, note, refused, sku, wait_past};

fn with_stock(mut definition: Definition, stock: i64) -> Definition {
    definition.skus[0].stock = stock;
    definition
}

#[tokio::test]
async fn an_adjustment_happens_once_and_shows_the_counters_before_it() {
    let sale = Sale::of(&[("phone", 10)]).await;
    held(sale.reserve("ann", "k", &[("phone", 3)]).await);
    let Adjusted::Adjusted(done) = sale.adjust("a", "phone", 5).await else {
        panic!("it is possible")
    };
    let before = Counters { available: 7, held: 3, sold: 0, version: 0 };
    assert_eq!((Counters::from(done.before), done.delta), (before, 5));
    assert_eq!(sale.adjust("a", "phone", 5).await, Adjusted::Replayed(done));
    assert_eq!(sale.adjust("a", "phone", 6).await, Adjusted::KeyReused);
    let reworded = Adjust { note: note("another"), ..sale.adjusting("a", "phone", 5) };
    let outcome = sale.lanes.adjust(reworded).await.unwrap().outcome;
    assert_eq!(outcome, Adjusted::KeyReused, "what is said of it is part of what it means");
    assert_eq!(sale.adjust("b", "ghost", 5).await, Adjusted::UnknownSku);
    assert_eq!(sale.stock("phone").await, (12, 3, 0));
}

#[tokio::test]
async fn an_adjustment_never_takes_what_is_held_or_sold_nor_leaves_the_range() {
    let sale = Sale::of(&[("phone", 10)]).await;
    held(sale.reserve("ann", "k", &[("phone", 3)]).await);
    let now = Counters { available: 7, held: 3, sold: 0, version: 0 };
    assert_eq!(sale.adjust("a", "phone", -8).await, Adjusted::StockInUse(now));
    assert_eq!(sale.adjust("a", "phone", -11).await, Adjusted::OutOfRange(now));
    assert_eq!(sale.adjust("a", "phone", TOTAL_MAX - 9).await, Adjusted::OutOfRange(now));
    assert_eq!(sale.adjust("a", "phone", i64::MAX).await, Adjusted::OutOfRange(now));
    for (key, delta) in [("to-zero", -7), ("to-most", TOTAL_MAX - 3)] {
        let outcome = sale.adjust(key, "phone", delta).await;
        assert!(matches!(outcome, Adjusted::Adjusted(_)), "{outcome:?}");
    }
    assert_eq!(sale.stock("phone").await, (TOTAL_MAX - 3, 3, 0));
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
    assert_eq!(sale.adjust("a", "phone", 1).await, Adjusted::Archived);
    assert_eq!(sale.phase(PhaseChange::Close).await, Phased::Archived);
    assert_eq!(sale.define(9, definition(&[("phone", 9)])).await, Defined::Archived);

    assert!(!sale.lanes.forget(&sale.lane).await.unwrap(), "its last event is not recorded");
    sale.advance("relay", 7, 7).await;
    assert!(sale.lanes.forget(&sale.lane).await.unwrap());
    assert!(sale.lanes.forget(&sale.lane).await.unwrap(), "gone is gone");
    assert!(dump(&sale.redis, &sale.keys()).await.iter().all(Option::is_none));
}
