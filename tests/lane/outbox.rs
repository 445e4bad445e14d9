//! What a lane promises to the relay.

use std::time::{Duration, Instant};

use holdfast::domain::durability::Durability;
use holdfast::lanes::reply::{Confirmed, Marks, Refusal, Reserved};
use holdfast::lanes::{Advance, Reached};

use crate::sale::{EPOCH, Sale, definition, held, options, redis_url, refused, wait_until};

async fn crowded(events: u64) -> Sale {
    let mut options = options();
    options.outbox_events_max = events;
    let sale = Sale::on(&redis_url(), &options).await;
    sale.define(1, definition(&[("phone", 1_000)])).await;
    sale
}

fn marks_of(seq: u64, logged: u64, recorded: u64) -> Marks {
    Marks { epoch: EPOCH, seq, replicated: 0, logged, recorded }
}

#[tokio::test]
async fn marks_only_rise() {
    let sale = Sale::of(&[("phone", 9)]).await;
    held(sale.reserve("ann", "k", &[("phone", 1)]).await);
    for (logged, recorded, expected) in [
        (1, 0, marks_of(2, 1, 0)),
        (0, 0, marks_of(2, 1, 0)),
        (0, 1, marks_of(2, 1, 1)),
        (2, 2, marks_of(2, 2, 2)),
        (1, 1, marks_of(2, 2, 2)),
    ] {
        let trimmed = expected.recorded;
        let advance = sale.advance("relay", logged, recorded).await;
        assert_eq!(advance, Advance::Leased { marks: expected, trimmed });
        assert_eq!(sale.lanes.marks(&sale.lane).await.unwrap(), expected);
    }
}

#[tokio::test]
async fn a_lane_behind_what_is_recorded_of_it_lets_go_of_nothing() {
    let sale = Sale::of(&[("phone", 9)]).await;
    held(sale.reserve("ann", "k", &[("phone", 1)]).await);
    sale.advance("relay", 1, 0).await;
    let kept = async || {
        let state = sale.lanes.state(&sale.lane).await.unwrap().unwrap();
        (sale.raw().await, (state.seq, state.logged, state.recorded, state.trimmed))
    };
    let (before, events) = (kept().await, sale.events_after(0).await);
    for (logged, recorded) in [(3, 0), (3, 3), (1, 3)] {
        let advance = sale.advance("relay", logged, recorded).await;
        assert_eq!(advance, Advance::Behind { marks: marks_of(2, 1, 0), trimmed: 0 });
    }
    assert_eq!((kept().await, sale.events_after(0).await), (before, events));
}

#[tokio::test]
async fn one_relay_at_a_time_has_a_lane_and_another_takes_it_when_the_lease_is_over() {
    let sale = Sale::of(&[("phone", 9)]).await;
    let advance = async |relay, lease_ms| {
        let lease = Duration::from_millis(lease_ms);
        let reached = Reached { epoch: EPOCH, logged: 1, recorded: 1, acknowledged: 1 };
        sale.lanes.advance(&sale.lane, reached, relay, lease).await.unwrap()
    };
    let ok = Advance::Leased { marks: marks_of(1, 1, 1), trimmed: 1 };
    assert_eq!(advance("one", 60_000).await, ok);
    assert_eq!(advance("two", 60_000).await, Advance::LeasedElsewhere);
    assert_eq!(advance("one", 50).await, ok, "it renews its own");
    wait_until("the lease is over", async || advance("two", 60_000).await == ok).await;
    assert_eq!(advance("one", 60_000).await, Advance::LeasedElsewhere);
}

#[tokio::test]
async fn a_relay_of_another_epoch_changes_nothing() {
    let sale = Sale::of(&[("phone", 9)]).await;
    let before = crate::raw::dump(&sale.redis, &sale.keys()).await;
    for epoch in [EPOCH - 1, EPOCH + 1] {
        let reached = Reached { epoch, logged: 1, recorded: 1, acknowledged: 1 };
        let lease = Duration::from_secs(1);
        let advance = sale.lanes.advance(&sale.lane, reached, "relay", lease).await.unwrap();
        assert_eq!(advance, Advance::Epoch { epoch: EPOCH });
    }
    assert_eq!(crate::raw::dump(&sale.redis, &sale.keys()).await, before);
    let gone = Sale::undefined().await;
    assert_eq!(gone.advance("relay", 0, 0).await, Advance::Missing);
}

#[tokio::test]
async fn the_outbox_keeps_what_the_database_has_not_though_kafka_has_it() {
    let sale = crowded(100).await;
    for key in 0..9 {
        held(sale.reserve("ann", &key.to_string(), &[("phone", 1)]).await);
    }
    sale.advance("relay", 10, 4).await;
    let kept: Vec<_> = sale.events_after(0).await.iter().map(|event| event.seq).collect();
    assert_eq!(kept, [5, 6, 7, 8, 9, 10]);
}

#[tokio::test]
async fn an_entry_is_kept_whole_until_its_last_event_is_recorded() {
    let sale = Sale::of(&[("phone", 9)]).await;
    let ask = |buyer| {
        holdfast::lanes::command::Command::Reserve(sale.reserving(buyer, "k", &[("phone", 1)]))
    };
    sale.ask_at_once(&[ask("ann"), ask("bob"), ask("cy")]).await;
    sale.advance("relay", 4, 3).await;
    let kept: Vec<_> = sale.events_after(0).await.iter().map(|event| event.seq).collect();
    assert_eq!(kept, [2, 3, 4]);
}

#[tokio::test]
async fn beyond_half_its_bound_the_outbox_lets_go_of_what_kafka_has() {
    let sale = crowded(20).await;
    for key in 0..10 {
        held(sale.reserve("ann", &key.to_string(), &[("phone", 1)]).await);
    }
    // 11 events, of which 1 is recorded: not yet beyond half.
    let advance = sale.advance("relay", 8, 1).await;
    assert_eq!(advance, Advance::Leased { marks: marks_of(11, 8, 1), trimmed: 1 });
    held(sale.reserve("ann", "one-more", &[("phone", 1)]).await);
    let advance = sale.advance("relay", 9, 1).await;
    assert_eq!(advance, Advance::Leased { marks: marks_of(12, 9, 1), trimmed: 9 });
    let kept: Vec<_> = sale.events_after(0).await.iter().map(|event| event.seq).collect();
    assert_eq!(kept, [10, 11, 12]);
}

#[tokio::test]
async fn beyond_half_its_bound_the_outbox_keeps_what_is_being_sent_again() {
    let sale = crowded(20).await;
    for key in 0..11 {
        held(sale.reserve("ann", &key.to_string(), &[("phone", 1)]).await);
    }
    // Kafka had acknowledged ten and lost them; of what was sent again it has acknowledged four.
    for (acknowledged, trimmed) in [(0, 1), (4, 4), (11, 10)] {
        let advance = sale.advance_again("relay", 10, 1, acknowledged).await;
        assert_eq!(advance, Advance::Leased { marks: marks_of(12, 10, 1), trimmed });
    }
    let kept: Vec<_> = sale.events_after(0).await.iter().map(|event| event.seq).collect();
    assert_eq!(kept, [11, 12]);
}

#[tokio::test]
async fn a_full_outbox_stops_new_orders_and_nothing_else() {
    let sale = crowded(5).await;
    let mut ids = Vec::new();
    for key in ["k0", "k1", "k2", "k3"] {
        ids.push(held(sale.reserve("ann", key, &[("phone", 1)]).await).id);
    }
    assert_eq!(refused(sale.reserve("ann", "k4", &[("phone", 1)]).await), Refusal::Overloaded);
    assert!(matches!(sale.confirm(&ids[0], "pay").await, Confirmed::Confirmed(_)));
    sale.cancel(&ids[1]).await;
    assert_eq!(sale.stock("phone").await, (997, 2, 1));
    assert_eq!(refused(sale.reserve("ann", "k4", &[("phone", 1)]).await), Refusal::Overloaded);
    sale.advance("relay", 7, 7).await;
    held(sale.reserve("ann", "k4", &[("phone", 1)]).await);
}

#[tokio::test]
async fn an_outbox_of_too_many_bytes_stops_new_orders_and_nothing_else() {
    let mut options = options();
    options.outbox_bytes_max = 1 << 16;
    let sale = Sale::on(&redis_url(), &options).await;
    sale.define(1, definition(&[("phone", 10_000)])).await;
    let first = held(sale.reserve("ann", "first", &[("phone", 1)]).await).id;
    let mut orders = 1;
    let mut refusal = None;
    while refusal.is_none() {
        sale.lanes.check_outboxes().await.unwrap();
        match sale.reserve("ann", &orders.to_string(), &[("phone", 1)]).await {
            Reserved::Held(_) => orders += 1,
            refused => refusal = Some(refused),
        }
        assert!(orders < 1_000, "an event takes more than 65 bytes");
    }
    assert_eq!(refused(refusal.unwrap()), Refusal::Overloaded);
    assert!(matches!(sale.confirm(&first, "pay").await, Confirmed::Confirmed(_)));
    // It is beyond half: what Kafka has is let go of, though the database lacks it.
    let (seq, logged) = (orders + 2, orders);
    let advance = sale.advance("relay", logged, 1).await;
    assert_eq!(advance, Advance::Leased { marks: marks_of(seq, logged, 1), trimmed: logged });
    sale.lanes.check_outboxes().await.unwrap();
    held(sale.reserve("ann", "again", &[("phone", 1)]).await);
}

#[tokio::test]
async fn a_read_that_may_wait_ends_when_there_is_news() {
    let sale = Sale::of(&[("phone", 9)]).await;
    assert!(sale.events_after(1).await.is_empty(), "one that may not wait ends at once");
    let from = [(sale.lane.clone(), EPOCH, 1)];
    let waiting = sale.lanes.read_outboxes(&from, 10, Duration::from_secs(10));
    let (read, _) = tokio::join!(waiting, sale.reserve("ann", "k", &[("phone", 1)]));
    assert_eq!(read.unwrap()[0].0, sale.lane);
}

#[tokio::test]
async fn all_who_wait_for_a_lane_share_one_look_at_it() {
    let server = crate::redis_server::RedisServer::start(&[]);
    let sale = Sale::on(&server.url(), &options()).await;
    sale.define(1, definition(&[("phone", 9)])).await;
    held(sale.reserve("ann", "k", &[("phone", 1)]).await);
    let known = sale.lanes.marks(&sale.lane).await.unwrap();
    let calls = async || {
        let mut redis = sale.redis.clone();
        let mut info = redis::cmd("INFO");
        let stats: String = info.arg("commandstats").query_async(&mut redis).await.unwrap();
        let line = stats.lines().find_map(|line| line.strip_prefix("cmdstat_evalsha:calls="));
        line.unwrap().split_once(',').unwrap().0.parse::<u64>().unwrap()
    };
    let wait = |level, timeout| sale.lanes.wait_for(&sale.lane, level, 2, known, timeout);
    let (before, began) = (calls().await, Instant::now());
    let in_vain = || wait(Durability::Recorded, Duration::from_millis(300));
    let waited = futures_util::future::join_all((0..200).map(|_| in_vain())).await;
    assert!(waited.iter().all(Option::is_none));
    let looks = calls().await - before;
    assert!((1..=began.elapsed().as_millis() as u64 / 10).contains(&looks), "{looks}");

    let patient = || wait(Durability::Logged, Duration::from_secs(60));
    let waiting = futures_util::future::join_all((0..200).map(|_| patient()));
    let (waited, _) = tokio::join!(waiting, sale.advance("relay", 2, 0));
    assert!(waited.iter().all(|marks| *marks == Some(marks_of(2, 2, 0))), "{waited:?}");
    assert!(wait(Durability::Memory, Duration::ZERO).await.is_some(), "it has that already");

    // Whoever looks ends when nobody waits, and another begins when somebody does.
    wait_until("nobody looks at the lane", async || {
        let before = calls().await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        calls().await == before
    })
    .await;
    let (waited, _) = tokio::join!(
        wait(Durability::Recorded, Duration::from_secs(60)),
        sale.advance("relay", 2, 2)
    );
    assert_eq!(waited, Some(marks_of(2, 2, 2)));
}
