//! What a lane promises when everybody comes at once, to several processes.

use std::collections::HashSet;

use futures_util::future::join_all;
use holdfast::config;
use holdfast::domain::order::Status;
use holdfast::lanes::LaneError;
use holdfast::lanes::command::Command;
use holdfast::lanes::reply::{Cancelled, Confirmed, Refusal, Reserved};
use prometheus_client::registry::Registry;

use crate::sale::{Outcome, Sale, definition, held, lanes_told, options, redis_url, wait_past};

#[tokio::test(flavor = "multi_thread")]
async fn two_thousand_buyers_of_a_hundred_units_get_exactly_a_hundred() {
    let sale = Sale::of(&[("phone", 100)]).await;
    let processes = [sale.clone(), sale.elsewhere(), sale.elsewhere()];
    let buyers = (0..2_000).map(|n| {
        let process = processes[n % processes.len()].clone();
        tokio::spawn(async move {
            match process.reserve(&format!("buyer-{n}"), "k", &[("phone", 1)]).await {
                Reserved::Held(order) => Some(order.id),
                Reserved::Refused(Refusal::SoldOut { .. }) => None,
                other => panic!("{other:?}"),
            }
        })
    });
    let ids = join_all(buyers).await.into_iter().filter_map(Result::unwrap);
    assert_eq!(ids.collect::<HashSet<_>>().len(), 100);
    assert_eq!(sale.stock("phone").await, (0, 100, 0));
    sale.raw().await.check();
    let events = sale.events_after(1).await;
    let seqs: Vec<_> = events.iter().map(|event| event.seq).collect();
    assert_eq!(seqs, (2..=101).collect::<Vec<_>>(), "gapless, one event an order");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_key_fifty_times_at_once_is_one_order() {
    let sale = Sale::of(&[("phone", 100)]).await;
    let processes = [sale.clone(), sale.elsewhere()];
    let copies = (0..50).map(|n| {
        let process = processes[n % processes.len()].clone();
        tokio::spawn(async move { process.reserve("ann", "k", &[("phone", 2)]).await })
    });
    let mut held = 0;
    let orders = join_all(copies).await.into_iter().map(|outcome| match outcome.unwrap() {
        Reserved::Held(order) => {
            held += 1;
            order
        }
        Reserved::Replayed(order) => order,
        other => panic!("{other:?}"),
    });
    let seqs: HashSet<_> = orders.map(|order| (order.id, order.seq)).collect();
    assert_eq!((seqs.len(), held), (1, 1));
    assert_eq!(sale.stock("phone").await, (98, 2, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn two_sweepers_at_once_end_every_overdue_hold_exactly_once() {
    let sale = Sale::of(&[("phone", 300)]).await;
    let holds = (0..300).map(|n| {
        let sale = sale.clone();
        tokio::spawn(async move { sale.hold(&n.to_string(), "k", &[("phone", 1)], 1).await })
    });
    let deadlines = join_all(holds).await.into_iter().map(|order| order.unwrap().expires_at);
    wait_past(&sale, deadlines.max().expect("300 of them")).await;
    let sweepers = [sale.clone(), sale.elsewhere()].map(|sweeper| {
        tokio::spawn(async move {
            let mut ended = 0;
            loop {
                let sweep = sweeper.lanes.expire(&sweeper.lane, 20).await.unwrap().outcome;
                ended += sweep.count;
                if !sweep.more {
                    return ended;
                }
            }
        })
    });
    let ended: u64 = join_all(sweepers).await.into_iter().map(Result::unwrap).sum();
    assert_eq!(ended, 300);
    assert_eq!(sale.stock("phone").await, (300, 0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_payment_and_the_sweeper_race_and_exactly_one_wins() {
    let sale = Sale::of(&[("phone", 40)]).await;
    let mut orders = Vec::new();
    for n in 0..40 {
        orders.push(sale.hold(&n.to_string(), "k", &[("phone", 1)], 1).await);
    }
    let end = orders.iter().map(|order| order.expires_at).max().expect("40 of them");
    let sweeper = sale.elsewhere();
    let sweeping =
        tokio::spawn(async move { while sweeper.expire().await.next_deadline.is_some() {} });
    let paying = orders.into_iter().map(|order| {
        let sale = sale.clone();
        tokio::spawn(async move {
            // Pays at the last moment.
            while sale.lanes.get(order.id.clone()).await.unwrap().now.millis() + 2
                < order.expires_at.millis()
            {}
            match sale.confirm(&order.id, "pay").await {
                Confirmed::Confirmed(order) => !order.reacquired,
                other => panic!("{other:?}"),
            }
        })
    });
    let paid = join_all(paying).await.into_iter().filter(|paid| *paid.as_ref().unwrap()).count();
    sweeping.await.unwrap();
    wait_past(&sale, end).await;
    sale.expire().await;
    println!("{paid} of 40 in time");
    assert_eq!(sale.stock("phone").await, (0, 0, 40), "the others took their unit again");
    sale.raw().await.check();
}

#[tokio::test]
async fn more_lines_than_a_call_may_carry_go_in_several() {
    let mut options = options();
    options.batch_lines_max = 64;
    let sale = Sale::on(&redis_url(), &options).await;
    let skus = ["a", "b", "c", "d", "e", "f", "g", "h"];
    sale.define(1, definition(&skus.map(|sku| (sku, 1_000)))).await;
    let buyers: Vec<_> = (0..30).map(|n| n.to_string()).collect();
    let ask = |b: &String| Command::Reserve(sale.reserving(b, "k", &skus.map(|sku| (sku, 1))));
    let asked: Vec<_> = buyers.iter().map(ask).collect();
    for answer in sale.ask_at_once(&asked).await {
        let held = matches!(answer.unwrap().outcome, Outcome::Reserved(Reserved::Held(_)));
        assert!(held, "all of them");
    }
    let entries: Vec<_> = sale.entries_after(1).await.iter().map(Vec::len).collect();
    assert_eq!(entries, [8, 8, 8, 6], "64 lines a call");
}

#[tokio::test]
async fn the_largest_call_there_may_be_fits_lua() {
    let mut options = options();
    (options.batch_max, options.batch_lines_max) = (256, 2_000);
    let sale = Sale::on(&redis_url(), &options).await;
    let skus: Vec<_> = (0..1_000).map(|n| format!("sku-{n:060}")).collect();
    let all: Vec<_> = skus.iter().map(|sku| (sku.as_str(), 1_000)).collect();
    sale.define(1, definition(&all)).await;
    let asked: Vec<_> = (0..256)
        .map(|n| {
            let lines: Vec<_> = (0..8).map(|i| (skus[(n * 8 + i) % 1_000].as_str(), 1)).collect();
            let mut reserve = sale.reserving(&format!("{n:0128}"), "k", &lines);
            reserve.hold_seconds = Some(1);
            Command::Reserve(reserve)
        })
        .collect();
    let mut last = None;
    for answer in sale.ask_at_once(&asked).await {
        let Outcome::Reserved(Reserved::Held(order)) = answer.unwrap().outcome else {
            panic!("there is enough")
        };
        last = Some(order.expires_at);
    }
    assert!(sale.entries_after(1).await.len() <= 2, "2,000 of the 2,048 lines in one call");
    wait_past(&sale, last.expect("256 of them")).await;
    let mut ended = 0;
    loop {
        let sweep = sale.expire().await;
        ended += sweep.count;
        if !sweep.more {
            break;
        }
    }
    assert_eq!(ended, 256);
    sale.raw().await.check();
}

#[tokio::test]
async fn a_queue_that_is_full_says_so_and_nothing_is_done() {
    let mut options = options();
    options.queue_max = 4;
    let sale = Sale::on(&redis_url(), &options).await;
    sale.define(1, definition(&[("phone", 100)])).await;
    let buyers: Vec<_> = (0..10).map(|n| n.to_string()).collect();
    let ask = |b: &String| Command::Reserve(sale.reserving(b, "k", &[("phone", 1)]));
    let asked: Vec<_> = buyers.iter().map(ask).collect();
    let answers = sale.ask_at_once(&asked).await;
    let full = answers.iter().filter(|a| matches!(a, Err(LaneError::QueueFull))).count();
    assert_eq!(full, 6);
    assert_eq!(sale.stock("phone").await, (96, 4, 0));
}

#[tokio::test]
async fn draining_answers_what_is_queued() {
    let sale = Sale::of(&[("phone", 100)]).await;
    let waiting = tokio::spawn({
        let sale = sale.clone();
        async move { sale.reserve("ann", "k", &[("phone", 1)]).await }
    });
    tokio::task::yield_now().await;
    sale.lanes.drain().await;
    let Reserved::Held(order) = waiting.await.unwrap() else { panic!("it was queued") };
    assert_eq!(order.status, Status::Held);
    assert_eq!(sale.stock("phone").await, (99, 1, 0), "a command that comes later starts anew");
}

/// How long its calls were held back, in all.
fn paced_seconds(registry: &Registry) -> f64 {
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, registry).unwrap();
    let line =
        text.lines().find_map(|line| line.strip_prefix("holdfast_lanes_paced_seconds_total "));
    line.expect("it is told").parse().unwrap()
}

#[tokio::test]
async fn a_lane_of_which_much_is_unrecorded_is_paced_unless_it_only_answers() {
    let mut sale = Sale::of(&[("phone", 40)]).await;
    let options = config::Lanes { pace_from_events: 10, pace_rate_min: 1_000, ..options() };
    let mut registry = Registry::default();
    sale.lanes = lanes_told(&redis_url(), &options, &mut registry);
    let order =
        async |number: usize| sale.reserve("ann", &number.to_string(), &[("phone", 1)]).await;
    for number in 0..8 {
        held(order(number).await);
    }
    assert_eq!(paced_seconds(&registry), 0.0, "ten events are few enough");
    for number in 8..40 {
        held(order(number).await);
    }
    let paced = paced_seconds(&registry);
    assert!(paced > 0.0);
    for number in 40..60 {
        assert!(matches!(order(number).await, Reserved::Refused(Refusal::SoldOut { .. })));
    }
    assert_eq!(paced_seconds(&registry), paced, "nothing has happened since");
    sale.advance("relay", 41, 41).await;
    assert!(matches!(sale.cancel(&sale.id("ann", "0")).await, Cancelled::Cancelled(_)));
    held(sale.reserve("ann", "again", &[("phone", 1)]).await);
    assert_eq!(paced_seconds(&registry), paced, "all was recorded");
}
