//! What a lane promises to buyers.

use holdfast::domain::event::Cause;
use holdfast::domain::order::{RefundReason, Status};
use holdfast::domain::time::Timestamp;
use holdfast::lanes::command::{Command, Confirm, PhaseChange, Reserve};
use holdfast::lanes::reply::{
    self, Begun, Cancelled, Confirmed, Failed, Refusal, Reserved, Returned, Shortage,
};
use redis::AsyncCommands;

use crate::sale::{Outcome, Sale, definition, held, lines, refused, wait_past};

fn sold_out(sku: &str, requested: u64, available: u64) -> Refusal {
    let sku = sku.parse().unwrap();
    Refusal::SoldOut { lines: vec![Shortage { sku, requested, available }] }
}

fn limit(limit: u64, already: u64, sku: Option<&str>) -> Refusal {
    Refusal::PurchaseLimit { limit, already, sku: sku.map(|sku| sku.parse().unwrap()) }
}

fn later(ms: i64) -> Option<Timestamp> {
    Some(Timestamp::from_millis(chrono::Utc::now().timestamp_millis() + ms))
}

#[tokio::test]
async fn the_last_unit_is_sold_and_not_one_more() {
    let sale = Sale::of(&[("phone", 3)]).await;
    held(sale.reserve("ann", "k", &[("phone", 2)]).await);
    assert_eq!(refused(sale.reserve("bob", "k", &[("phone", 2)]).await), sold_out("phone", 2, 1));
    held(sale.reserve("bob", "k", &[("phone", 1)]).await);
    assert_eq!(refused(sale.reserve("cy", "k", &[("phone", 1)]).await), sold_out("phone", 1, 0));
    assert_eq!(sale.stock("phone").await, (0, 3, 0));
}

#[tokio::test]
async fn an_order_takes_all_of_its_lines_or_none_and_hears_which_are_short() {
    let sale = Sale::of(&[("phone", 5), ("case", 1), ("pen", 0)]).await;
    let asked = [("phone", 1), ("case", 2), ("pen", 1)];
    let Refusal::SoldOut { lines } = refused(sale.reserve("ann", "k", &asked).await) else {
        panic!("it is short")
    };
    let short: Vec<_> = lines.iter().map(|l| (l.sku.as_str(), l.requested, l.available)).collect();
    assert_eq!(short, [("case", 2, 1), ("pen", 1, 0)]);
    assert_eq!(sale.stock("phone").await, (5, 0, 0));
}

#[tokio::test]
async fn the_limits_come_before_sold_out_and_the_skus_before_the_sales() {
    let mut limited = definition(&[("phone", 2), ("case", 9)]);
    limited.skus[0].per_buyer_limit = Some(2);
    limited.per_buyer_limit = Some(3);
    let sale = Sale::defined(limited).await;
    held(sale.reserve("ann", "k0", &[("phone", 2)]).await);
    let both = sale.reserve("ann", "k1", &[("case", 2), ("phone", 1)]).await;
    assert_eq!(refused(both), limit(2, 2, Some("phone")));
    assert_eq!(refused(sale.reserve("ann", "k1", &[("case", 2)]).await), limit(3, 2, None));
    assert_eq!(refused(sale.reserve("bob", "k1", &[("phone", 1)]).await), sold_out("phone", 1, 0));
    assert_eq!(
        refused(sale.reserve("bob", "k1", &[("phone", 3)]).await),
        limit(2, 0, Some("phone"))
    );
}

#[tokio::test]
async fn what_a_buyer_gave_back_no_longer_counts_to_the_limit_and_what_was_bought_does() {
    let mut limited = definition(&[("phone", 9)]);
    limited.per_buyer_limit = Some(1);
    let sale = Sale::defined(limited).await;
    let first = held(sale.reserve("ann", "k0", &[("phone", 1)]).await);
    sale.cancel(&first.id).await;
    let second = held(sale.reserve("ann", "k1", &[("phone", 1)]).await);
    sale.confirm(&second.id, "pay").await;
    assert_eq!(refused(sale.reserve("ann", "k2", &[("phone", 1)]).await), limit(1, 1, None));
}

#[tokio::test]
async fn refusals_come_in_the_promised_order() {
    let mut wrong = definition(&[("phone", 0)]);
    wrong.skus[0].per_buyer_limit = Some(1);
    (wrong.opens_at, wrong.closes_at) = (later(3_000_000), later(6_000_000));
    let sale = Sale::defined(wrong.clone()).await;
    // Everything is wrong with it: too long a hold, no such SKU, over the limit, sold out.
    let bad = |asked| Reserve { hold_seconds: Some(301), ..sale.reserving("ann", "k", asked) };
    let all = bad(&[("phone", 2), ("ghost", 1)]);
    let ask = async |command: &Reserve| {
        refused(sale.lanes.reserve(command.clone()).await.unwrap().outcome)
    };
    sale.phase(PhaseChange::Pause).await;
    assert_eq!(ask(&all).await, Refusal::NotOpen { opens_at: wrong.opens_at.unwrap() });
    wrong.opens_at = None;
    sale.define(2, wrong.clone()).await;
    assert_eq!(ask(&all).await, Refusal::Paused);
    sale.phase(PhaseChange::Resume).await;
    assert_eq!(ask(&all).await, Refusal::UnknownSku { sku: "ghost".parse().unwrap() });
    let known = bad(&[("phone", 2)]);
    assert_eq!(ask(&known).await, Refusal::HoldTooLong { hold_seconds_max: 300 });
    let short = Reserve { hold_seconds: Some(300), ..known };
    assert_eq!(ask(&short).await, limit(1, 0, Some("phone")));
    let one = Reserve { lines: lines(&[("phone", 1)]), ..short };
    assert_eq!(ask(&one).await, sold_out("phone", 1, 0));
    wrong.closes_at = later(-1);
    sale.define(3, wrong).await;
    sale.phase(PhaseChange::Pause).await;
    assert_eq!(ask(&all).await, Refusal::Closed);
}

#[tokio::test]
async fn the_same_key_finds_its_order_though_the_sale_sold_out_paused_or_closed() {
    let sale = Sale::of(&[("phone", 1), ("case", 1)]).await;
    let asked = [("phone", 1), ("case", 1)];
    let order = held(sale.reserve("ann", "k", &asked).await);
    let again = Reserved::Replayed(order.clone());
    assert_eq!(sale.reserve("ann", "k", &asked).await, again);
    assert_eq!(sale.elsewhere().reserve("ann", "k", &asked).await, again, "from any process");
    assert_eq!(
        sale.reserve("ann", "k", &[("case", 1), ("phone", 1)]).await,
        again,
        "in any order of its lines"
    );
    for change in [PhaseChange::Pause, PhaseChange::Close] {
        sale.phase(change).await;
        assert_eq!(sale.reserve("ann", "k", &asked).await, again);
    }
    assert_eq!(sale.reserve("ann", "k", &[("phone", 1)]).await, Reserved::KeyReused);
    let held_otherwise = Reserve { hold_seconds: Some(300), ..sale.reserving("ann", "k", &asked) };
    let outcome = sale.lanes.reserve(held_otherwise).await.unwrap().outcome;
    assert_eq!(outcome, Reserved::KeyReused, "how long to hold is part of what it means");
}

#[tokio::test]
async fn a_replay_shows_the_order_as_it_stands_now() {
    let sale = Sale::of(&[("phone", 9)]).await;
    let order = held(sale.reserve("ann", "k", &[("phone", 1)]).await);
    sale.confirm(&order.id, "pay").await;
    let Reserved::Replayed(order) = sale.reserve("ann", "k", &[("phone", 1)]).await else {
        panic!("it is there")
    };
    assert_eq!(order.status, Status::Confirmed);
    assert_eq!(order.payment_id.unwrap().as_str(), "pay");
    assert_eq!(sale.stock("phone").await, (8, 0, 1));
}

#[tokio::test]
async fn a_payment_counts_once_and_another_one_is_told_so() {
    let sale = Sale::of(&[("phone", 9)]).await;
    let order = held(sale.reserve("ann", "k", &[("phone", 2)]).await);
    let Confirmed::Confirmed(paid) = sale.confirm(&order.id, "pay-1").await else {
        panic!("it is held")
    };
    assert_eq!(sale.confirm(&order.id, "pay-1").await, Confirmed::Same(paid.clone()));
    for _ in 0..2 {
        let Confirmed::Refund(RefundReason::AlreadyPaid, due) =
            sale.confirm(&order.id, "pay-2").await
        else {
            panic!("it is bought")
        };
        assert_eq!((due.seq, due.payment_id), (paid.seq + 1, paid.payment_id.clone()));
    }
    assert!(matches!(sale.cancel(&order.id).await, Cancelled::Sold(_)));
    assert_eq!(sale.stock("phone").await, (7, 0, 2));
    assert_eq!(sale.cancel(&sale.id("nobody", "k")).await, Cancelled::Unknown);
}

#[tokio::test]
async fn a_late_payment_takes_the_stock_again_where_it_is_still_there() {
    let sale = Sale::of(&[("phone", 1)]).await;
    let order = sale.hold("ann", "k", &[("phone", 1)], 1).await;
    assert_eq!(order.expires_at.millis(), order.created_at.millis() + 1000);
    wait_past(&sale, order.expires_at).await;
    assert_eq!(sale.expire().await.count, 1);
    assert_eq!(sale.stock("phone").await, (1, 0, 0));
    let Confirmed::Confirmed(bought) = sale.confirm(&order.id, "pay").await else {
        panic!("nobody else has it")
    };
    assert!(bought.reacquired);
    assert_eq!((bought.expires_at, sale.stock("phone").await), (order.expires_at, (0, 0, 1)));
    sale.raw().await.check();
}

#[tokio::test]
async fn a_late_payment_whose_stock_is_gone_is_given_back_for_good() {
    let sale = Sale::of(&[("phone", 1)]).await;
    let order = sale.hold("ann", "k", &[("phone", 1)], 1).await;
    wait_past(&sale, order.expires_at).await;
    sale.expire().await;
    let next = held(sale.reserve("bob", "k", &[("phone", 1)]).await);
    let late = |answer| matches!(answer, Confirmed::Refund(RefundReason::PaymentTooLate, _));
    assert!(late(sale.confirm(&order.id, "pay").await));
    sale.cancel(&next.id).await;
    let seq = sale.raw().await.seq;
    assert!(late(sale.confirm(&order.id, "pay").await), "though the stock is back");
    assert!(matches!(sale.begin(&order.id, "pay").await, Begun::Refund(_, _)));
    assert_eq!(sale.raw().await.seq, seq, "it is said once");
    assert!(matches!(sale.confirm(&order.id, "another").await, Confirmed::Confirmed(_)));
    assert!(late(sale.confirm(&order.id, "pay").await));
}

#[tokio::test]
async fn a_late_payment_counts_against_the_buyers_limit() {
    let sale = Sale::undefined().await;
    let mut limited = definition(&[("phone", 9)]);
    limited.per_buyer_limit = Some(1);
    sale.define(1, limited).await;
    let order = sale.hold("ann", "k", &[("phone", 1)], 1).await;
    wait_past(&sale, order.expires_at).await;
    sale.expire().await;
    held(sale.reserve("ann", "k2", &[("phone", 1)]).await);
    let answer = sale.confirm(&order.id, "pay").await;
    assert!(matches!(answer, Confirmed::Refund(RefundReason::PaymentTooLate, _)), "{answer:?}");
}

#[tokio::test]
async fn a_payment_keeps_the_hold_while_it_runs_and_never_beyond_the_longest() {
    let sale = Sale::undefined().await;
    let mut definition = definition(&[("phone", 9)]);
    definition.hold_seconds = 10;
    definition.payment_grace_seconds = 60;
    definition.max_hold_seconds = Some(65);
    sale.define(1, definition).await;
    let order = held(sale.reserve("ann", "k", &[("phone", 1)]).await);
    let Begun::Begun(paying) = sale.begin(&order.id, "pay-1").await else { panic!("it is held") };
    assert_eq!((paying.status, sale.stock("phone").await), (Status::Paying, (8, 1, 0)));
    let now = sale.lanes.get(order.id.clone()).await.unwrap().now.millis();
    assert!(
        (order.created_at.millis() + 60_000..=now + 60_000).contains(&paying.expires_at.millis())
    );
    assert_eq!(sale.begin(&order.id, "pay-1").await, Begun::Same(paying.clone()));

    turn_time_to(&sale, order.created_at.millis() + 50_000).await;
    assert_eq!(
        sweep_by_clock(&sale, order.created_at.millis() + 50_000).await,
        0,
        "it is paid for"
    );
    let Begun::Begun(again) = sale.begin(&order.id, "pay-2").await else { panic!("it is held") };
    assert_eq!(again.expires_at.millis(), order.created_at.millis() + 65_000);
    assert!(matches!(sale.fail(&order.id, "pay-1").await, Failed::Ignored(_)), "it runs no more");
    let Failed::Failed(failed) = sale.fail(&order.id, "pay-2").await else { panic!("it runs") };
    assert_eq!((failed.status, failed.payment_id), (Status::Held, None));
    assert_eq!(failed.expires_at, again.expires_at, "what was promised stays");

    turn_time_to(&sale, order.created_at.millis() + 65_000).await;
    assert!(matches!(sale.begin(&order.id, "pay-3").await, Begun::Over(_)));
    assert_eq!(sweep_by_clock(&sale, order.created_at.millis() + 65_000).await, 1);
    assert_eq!(sale.stock("phone").await, (9, 0, 0));
}

#[tokio::test]
async fn a_part_can_be_bought_and_the_rest_goes_back() {
    let sale = Sale::of(&[("phone", 5), ("case", 5)]).await;
    let order = held(sale.reserve("ann", "k", &[("phone", 3), ("case", 1)]).await);
    for none in [&[("phone", 4)][..], &[("pen", 1)], &[("phone", 1), ("case", 2)]] {
        assert_eq!(sale.confirm_part(&order.id, "pay", none).await, Confirmed::NotPart);
    }
    let Confirmed::Confirmed(bought) = sale.confirm_part(&order.id, "pay", &[("phone", 2)]).await
    else {
        panic!("it is a part")
    };
    assert_eq!(bought.lines, lines(&[("phone", 2)]));
    assert_eq!((sale.stock("phone").await, sale.stock("case").await), ((3, 0, 2), (5, 0, 0)));
    assert!(
        matches!(sale.confirm(&order.id, "pay").await, Confirmed::Same(_)),
        "whatever its lines"
    );
    let replay = sale.reserve("ann", "k", &[("case", 1), ("phone", 3)]).await;
    assert_eq!(replay, Reserved::Replayed(bought), "the key means what was asked for");
    sale.raw().await.check();
}

#[tokio::test]
async fn what_comes_back_is_on_sale_again_or_leaves_the_total() {
    let sale = Sale::of(&[("phone", 5)]).await;
    let order = held(sale.reserve("ann", "k", &[("phone", 4)]).await);
    assert!(matches!(sale.take_back(&order.id, "r", &[], true).await, Returned::Over(_)));
    sale.confirm(&order.id, "pay").await;
    let Returned::Returned(part) = sale.take_back(&order.id, "r1", &[("phone", 1)], true).await
    else {
        panic!("it is sold")
    };
    assert_eq!((part.status, part.returned.clone()), (Status::Confirmed, lines(&[("phone", 1)])));
    assert_eq!(sale.stock("phone").await, (2, 0, 3));
    let again = sale.take_back(&order.id, "r1", &[("phone", 1)], true).await;
    assert_eq!(again, Returned::Replayed(part));
    for (back, restock) in [(&[("phone", 2)][..], true), (&[("phone", 1)], false), (&[], true)] {
        assert_eq!(sale.take_back(&order.id, "r1", back, restock).await, Returned::KeyReused);
    }
    let more = sale.take_back(&order.id, "r2", &[("phone", 4)], true).await;
    assert!(matches!(more, Returned::Exceeds(_)), "{more:?}");
    let Returned::Returned(all) = sale.take_back(&order.id, "r2", &[], false).await else {
        panic!("three are left")
    };
    assert_eq!((all.status, all.returned), (Status::Returned, lines(&[("phone", 4)])));
    assert_eq!(sale.stock("phone").await, (2, 0, 0), "three have left the total");
    assert!(matches!(sale.take_back(&order.id, "r3", &[], true).await, Returned::Over(_)));
    assert!(matches!(sale.confirm(&order.id, "pay").await, Confirmed::Same(_)));
    assert!(matches!(sale.cancel(&order.id).await, Cancelled::Sold(_)));
    sale.raw().await.check();
}

#[tokio::test]
async fn a_payment_for_an_order_that_nobody_knows_leaves_a_tombstone_and_a_refund() {
    let sale = Sale::of(&[("phone", 5)]).await;
    let id = sale.id("ann", "k");
    for _ in 0..2 {
        let answer = sale.confirm(&id, "pay").await;
        let Confirmed::Refund(RefundReason::OrderCancelled, order) = answer else {
            panic!("{answer:?}")
        };
        assert_eq!((order.status, order.buyer_id, order.lines), (Status::Cancelled, None, vec![]));
    }
    let Reserved::Replayed(order) = sale.reserve("ann", "k", &[("phone", 1)]).await else {
        panic!("it is cancelled")
    };
    assert_eq!((order.status, sale.stock("phone").await), (Status::Cancelled, (5, 0, 0)));
    assert_eq!(sale.raw().await.seq, 3, "defined, cancelled, refund due");
}

#[tokio::test]
async fn payments_of_one_order_are_remembered_up_to_a_bound() {
    let sale = Sale::of(&[("phone", 5)]).await;
    let order = held(sale.reserve("ann", "k", &[("phone", 1)]).await);
    sale.cancel(&order.id).await;
    for n in 0..64 {
        let answer = sale.confirm(&order.id, &format!("l:pay:{n}")).await;
        assert!(matches!(answer, Confirmed::Refund(_, _)), "{answer:?}");
    }
    assert_eq!(sale.confirm(&order.id, "one-more").await, Confirmed::Overloaded);
    assert!(matches!(sale.confirm(&order.id, "l:pay:0").await, Confirmed::Refund(_, _)));
}

#[tokio::test]
async fn what_a_provider_was_paid_for_and_is_no_part_of_the_order_is_given_back() {
    let sale = Sale::of(&[("phone", 5)]).await;
    let order = held(sale.reserve("ann", "k", &[("phone", 1)]).await);
    let command = Confirm {
        lines: lines(&[("phone", 2)]),
        cause: Cause::Webhook,
        ..sale.confirming(&order.id, "pay")
    };
    let answer = sale.lanes.confirm(command).await.unwrap().outcome;
    let Confirmed::Refund(RefundReason::LinesMismatch, order) = answer else {
        panic!("{answer:?}")
    };
    assert_eq!((order.status, sale.stock("phone").await), (Status::Held, (4, 1, 0)));
}

/// Turns the lane's time forward. It never goes back, so from then on it stands still.
async fn turn_time_to(sale: &Sale, ms: i64) {
    let () = sale.redis.clone().hset(sale.keys().lane(), "now", ms).await.unwrap();
}

/// Sweeps as a process whose own clock says `ms`; answers how many holds that ended.
async fn sweep_by_clock(sale: &Sale, ms: i64) -> u64 {
    let mut call = redis::cmd("EVAL");
    call.arg(concat!(
        include_str!("../../lua/lane/1_read.lua"),
        include_str!("../../lua/lane/2_orders.lua"),
        include_str!("../../lua/lane/3_stock.lua"),
        include_str!("../../lua/lane/4_write.lua"),
    ));
    call.arg(7).arg(sale.keys().all());
    call.arg(ms).arg(1_000).arg(0).arg("").arg("").arg(1).arg("expire").arg(10);
    let answer: Vec<String> = call.query_async(&mut sale.redis.clone()).await.unwrap();
    reply::expired(answer.last().expect("a reply")).unwrap().count
}

#[tokio::test]
async fn the_millisecond_of_the_deadline_is_late_and_the_one_before_is_not() {
    let sale = Sale::of(&[("phone", 2)]).await;
    let first = held(sale.reserve("ann", "k", &[("phone", 1)]).await);
    turn_time_to(&sale, first.expires_at.millis() - 1).await;
    let Confirmed::Confirmed(paid) = sale.confirm(&first.id, "pay").await else {
        panic!("it is in time")
    };
    assert_eq!(paid.confirmed_at.unwrap().millis(), first.expires_at.millis() - 1);
    let second = held(sale.reserve("bob", "k", &[("phone", 1)]).await);
    turn_time_to(&sale, second.expires_at.millis()).await;
    let Confirmed::Confirmed(late) = sale.confirm(&second.id, "pay").await else {
        panic!("its unit is still there")
    };
    assert!(late.reacquired && !paid.reacquired);
}

#[tokio::test]
async fn a_hold_ends_when_it_is_due_on_the_lanes_clock_and_on_the_sweepers() {
    let sale = Sale::of(&[("phone", 1)]).await;
    let due = held(sale.reserve("ann", "k", &[("phone", 1)]).await).expires_at.millis();
    assert_eq!(sweep_by_clock(&sale, due + 60_000).await, 0, "the sweeper's clock is ahead");
    turn_time_to(&sale, due).await;
    assert_eq!(sweep_by_clock(&sale, due - 1).await, 0, "the sweeper's clock is behind");
    assert_eq!(sale.stock("phone").await, (0, 1, 0));
    assert_eq!(sweep_by_clock(&sale, due).await, 1);
    assert_eq!(sale.stock("phone").await, (1, 0, 0));
}

#[tokio::test]
async fn the_window_opens_and_closes_at_its_first_millisecond() {
    let mut window = definition(&[("phone", 9)]);
    let opens = later(1_000_000).expect("a time");
    let closes = later(2_000_000).expect("a time");
    (window.opens_at, window.closes_at) = (Some(opens), Some(closes));
    let sale = Sale::defined(window).await;
    turn_time_to(&sale, opens.millis() - 1).await;
    let early = refused(sale.reserve("ann", "k", &[("phone", 1)]).await);
    assert_eq!(early, Refusal::NotOpen { opens_at: opens });
    turn_time_to(&sale, opens.millis()).await;
    held(sale.reserve("ann", "k", &[("phone", 1)]).await);
    turn_time_to(&sale, closes.millis() - 1).await;
    held(sale.reserve("bob", "k", &[("phone", 1)]).await);
    turn_time_to(&sale, closes.millis()).await;
    assert_eq!(refused(sale.reserve("cy", "k", &[("phone", 1)]).await), Refusal::Closed);
}

#[tokio::test]
async fn nothing_is_released_before_its_deadline() {
    let sale = Sale::of(&[("phone", 2)]).await;
    let long = held(sale.reserve("ann", "k", &[("phone", 1)]).await);
    let short = sale.hold("bob", "k", &[("phone", 1)], 1).await;
    let first = sale.lanes.expire(&sale.lane, 10).await.unwrap();
    if first.now < short.expires_at {
        assert_eq!((first.outcome.count, first.outcome.next_deadline), (0, Some(short.expires_at)));
    }
    wait_past(&sale, short.expires_at).await;
    let ended = sale.expire().await;
    assert_eq!(first.outcome.count + ended.count, 1);
    assert_eq!((ended.more, ended.next_deadline), (false, Some(long.expires_at)));
    assert_eq!(sale.stock("phone").await, (1, 1, 0));
}

#[tokio::test]
async fn cancelling_what_has_expired_gives_nothing_back_twice() {
    let sale = Sale::of(&[("phone", 1)]).await;
    let order = sale.hold("ann", "k", &[("phone", 1)], 1).await;
    wait_past(&sale, order.expires_at).await;
    assert_eq!(sale.expire().await.count, 1);
    let Cancelled::Cancelled(order) = sale.cancel(&order.id).await else { panic!("it may be") };
    assert_eq!(order.status, Status::Cancelled);
    assert_eq!(sale.cancel(&order.id).await, Cancelled::Same(order.clone()));
    let answer = sale.confirm(&order.id, "pay").await;
    assert!(matches!(answer, Confirmed::Refund(RefundReason::OrderCancelled, _)), "{answer:?}");
    assert_eq!(sale.stock("phone").await, (1, 0, 0));
}

#[tokio::test]
async fn an_order_cancelled_before_it_came_stays_cancelled_whatever_its_body() {
    let sale = Sale::of(&[("phone", 1)]).await;
    let Cancelled::Cancelled(tombstone) = sale.cancel_by_key("ann", "k").await else {
        panic!("a tombstone")
    };
    assert_eq!((tombstone.status, tombstone.lines.len()), (Status::Cancelled, 0));
    assert_eq!(sale.cancel_by_key("ann", "k").await, Cancelled::Same(tombstone.clone()));
    for units in [1, 5] {
        let outcome = sale.reserve("ann", "k", &[("phone", units)]).await;
        assert_eq!(outcome, Reserved::Replayed(tombstone.clone()));
    }
    let other_key = held(sale.reserve("ann", "k2", &[("phone", 1)]).await);
    let Cancelled::Cancelled(order) = sale.cancel_by_key("ann", "k2").await else {
        panic!("by key, where there is an order")
    };
    assert_eq!((order.id, order.lines), (other_key.id, other_key.lines));
    assert_eq!(sale.stock("phone").await, (1, 0, 0));
}

#[tokio::test]
async fn orders_of_one_call_see_what_those_before_them_took() {
    let sale = Sale::of(&[("phone", 2)]).await;
    let ask = |buyer| Command::Reserve(sale.reserving(buyer, "k", &[("phone", 1)]));
    let mut call: Vec<_> = ["ann", "bob", "cy", "ann"].into_iter().map(ask).collect();
    call.push(Command::Cancel(sale.cancelling(&sale.id("ann", "k"))));
    call.push(ask("cy"));
    let answers = sale.ask_at_once(&call).await.into_iter().map(|answer| answer.unwrap().outcome);
    let words = answers.map(|outcome| match outcome {
        Outcome::Reserved(Reserved::Held(_)) => "held",
        Outcome::Reserved(Reserved::Replayed(_)) => "replayed",
        Outcome::Reserved(Reserved::Refused(Refusal::SoldOut { .. })) => "sold out",
        Outcome::Cancelled(Cancelled::Cancelled(_)) => "cancelled",
        other => panic!("{other:?}"),
    });
    let words: Vec<_> = words.collect();
    assert_eq!(words, ["held", "held", "sold out", "replayed", "cancelled", "held"]);
    assert_eq!(sale.entries_after(1).await.len(), 1, "one call, one entry");
}

#[tokio::test]
async fn a_sweep_says_when_more_is_due_and_the_next_one_ends_it() {
    let sale = Sale::of(&[("phone", 9)]).await;
    let mut last = None;
    for key in ["k0", "k1", "k2"] {
        last = Some(sale.hold("ann", key, &[("phone", 1)], 1).await);
    }
    wait_past(&sale, last.expect("three").expires_at).await;
    let mut ended = Vec::new();
    loop {
        let sweep = sale.lanes.expire(&sale.lane, 1).await.unwrap().outcome;
        ended.push((sweep.count, sweep.more));
        if !sweep.more {
            break;
        }
    }
    assert_eq!(ended, [(1, true), (1, true), (1, false)]);
    assert_eq!(sale.stock("phone").await, (9, 0, 0));
}
