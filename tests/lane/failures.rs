//! What a lane promises when its keys or its server are not as they should be.

use holdfast::domain::order::Order;
use holdfast::domain::stock::TotalChange;
use holdfast::lanes::command::{Command, PhaseChange};
use holdfast::lanes::reply::{Cancelled, Confirmed, Refusal, Reserved};
use holdfast::lanes::{Advance, LaneError, Reached};
use redis::AsyncCommands;

use crate::raw::dump;
use crate::redis_server::RedisServer;
use crate::sale::{
    EPOCH, Sale, adjusted, definition, held, options, redis_url, refused, undone, wait_past,
    wait_until,
};

/// A sale in which every kind of command has something to do: two holds, one of them overdue.
async fn busy() -> (Sale, Order) {
    busy_on(&redis_url()).await
}

pub async fn busy_on(url: &str) -> (Sale, Order) {
    let sale = Sale::on(url, &options()).await;
    sale.define(1, definition(&[("phone", 9)])).await;
    let order = held(sale.reserve("ann", "k", &[("phone", 1)]).await);
    let overdue = sale.hold("bob", "k", &[("phone", 1)], 1).await;
    sale.adjust("first", "phone", 1).await;
    wait_past(&sale, overdue.expires_at).await;
    (sale, order)
}

pub fn every_command(sale: &Sale, order: &Order) -> Vec<Command> {
    let mut more = definition(&[("phone", 9), ("pen", 1)]);
    more.per_buyer_limit = Some(5);
    let mut cancel_by_key = sale.cancelling(&sale.id("dee", "k"));
    cancel_by_key.tombstone_for = Some("dee".parse().unwrap());
    vec![
        Command::Reserve(sale.reserving("cy", "k", &[("phone", 1)])),
        Command::Confirm(sale.confirming(&order.id, "pay")),
        Command::Cancel(sale.cancelling(&order.id)),
        Command::Cancel(cancel_by_key),
        Command::Expire { max: 10 },
        Command::Get { id: order.id.clone() },
        Command::Stock,
        Command::Preview(sale.previewing("phone", TotalChange::By(2))),
        Command::Adjust(sale.adjusting("a", "phone", 2)),
        Command::Undo(sale.undoing("a", &sale.adjustment_id("first"))),
        Command::Define(Box::new(sale.defining(2, more))),
        Command::Phase(sale.changing(PhaseChange::Pause)),
        Command::Archive { retention_ms: 0 },
        Command::Marks,
    ]
}

/// Puts a value of the wrong type in a key's place; `restore` undoes it.
async fn spoil(sale: &Sale, key: &str) -> Option<Vec<u8>> {
    let mut redis = sale.redis.clone();
    let saved = redis::cmd("DUMP").arg(key).query_async(&mut redis).await.unwrap();
    let () = redis.set(key, "not what it should be").await.unwrap();
    saved
}

async fn restore(sale: &Sale, key: &str, saved: Option<Vec<u8>>) {
    let mut redis = sale.redis.clone();
    let () = redis.del(key).await.unwrap();
    if let Some(saved) = saved {
        let mut command = redis::cmd("RESTORE");
        command.arg(key).arg(0).arg(saved);
        let () = command.query_async(&mut redis).await.unwrap();
    }
}

/// Which keys, spoilt one by one, fail which command; it goes through with the others.
const NEEDED: [(&str, &str); 14] = [
    ("reserve", "lane stock buyers orders deadlines outbox"),
    ("confirm", "lane stock buyers orders outbox"),
    ("cancel", "lane stock buyers orders outbox"),
    ("cancel by key", "lane orders outbox"),
    ("expire", "lane stock buyers orders deadlines outbox"),
    ("get", "lane stock buyers orders"),
    ("stock", "lane stock"),
    ("preview", "lane stock"),
    ("adjust", "lane stock outbox adjustments"),
    ("undo", "lane stock outbox adjustments"),
    ("define", "lane stock outbox"),
    ("phase", "lane outbox"),
    ("archive", "lane stock"),
    ("marks", "lane"),
];

#[tokio::test]
async fn a_key_of_the_wrong_type_leaves_nothing_half_done_whatever_was_asked() {
    let all = (0..NEEDED.len()).flat_map(|kind| (0..7).map(move |key| (kind, key)));
    let cases = all.map(async |(kind, index)| {
        let (sale, order) = busy().await;
        let key = sale.keys().all()[index].clone();
        let part = key.rsplit(':').next().expect("a key has parts");
        let command = every_command(&sale, &order).swap_remove(kind);
        let (name, needed) = NEEDED[kind];
        let place = format!("{name} with {part} spoilt");

        let saved = spoil(&sale, &key).await;
        let before = dump(&sale.redis, &sale.keys()).await;
        let outcome = sale.ask(command.clone()).await;
        let after = dump(&sale.redis, &sale.keys()).await;
        restore(&sale, &key, saved).await;

        assert_eq!(outcome.is_err(), needed.split(' ').any(|n| n == part), "{place}: {outcome:?}");
        if outcome.is_err() {
            assert!(matches!(outcome, Err(LaneError::Unavailable(_))), "{place}: {outcome:?}");
            assert!(before == after, "{place} changed something");
            let again = sale.ask(command).await;
            assert!(again.is_ok(), "{place}, and now it is right: {again:?}");
        } else {
            assert!(before[index] == after[index], "{place} wrote to it");
        }
        sale.raw().await.check();
    });
    futures_util::future::join_all(cases).await;
}

#[tokio::test]
async fn a_record_that_cannot_be_read_changes_nothing() {
    for (part, field, corrupt) in [
        ("orders", "", "h 2 nonsense"),
        ("orders", "", "h 2 1 1   0 ann phone=x"),
        ("orders", "", "h 2 1 9999999999999    ann phone=1,pen"),
        ("orders", "", "h 2 1 9999999999999    ann phone=7"),
        ("stock", "phone", "9 1 0"),
        ("buyers", "ann", "phone"),
    ] {
        let sale = Sale::of(&[("phone", 9)]).await;
        let order = held(sale.reserve("ann", "k", &[("phone", 1)]).await);
        let keys = sale.keys();
        let key = keys.all().iter().find(|key| key.ends_with(part)).expect("such a key");
        let field = if field.is_empty() { order.id.key().encode() } else { field.to_owned() };
        let mut redis = sale.redis.clone();
        let right: String = redis.hget(key, &field).await.unwrap();
        let () = redis.hset(key, &field, corrupt).await.unwrap();
        let before = dump(&sale.redis, &keys).await;
        let confirm = Command::Confirm(sale.confirming(&order.id, "pay"));
        let cancel = Command::Cancel(sale.cancelling(&order.id));
        for command in [confirm.clone(), cancel] {
            let outcome = sale.ask(command).await;
            assert!(matches!(outcome, Err(LaneError::Unavailable(_))), "{corrupt}: {outcome:?}");
            assert!(dump(&sale.redis, &keys).await == before, "{corrupt}");
        }
        let () = redis.hset(key, &field, right).await.unwrap();
        sale.ask(confirm).await.expect("it is right again");
        sale.raw().await.check();
    }
}

#[tokio::test]
async fn a_record_of_an_adjustment_that_cannot_be_read_changes_nothing() {
    let sale = Sale::of(&[("phone", 9)]).await;
    let id = adjusted(sale.adjust("a", "phone", 1).await).id;
    let key = sale.keys().all().last().expect("the adjustments").clone();
    let (mut redis, field) = (sale.redis.clone(), id.key().encode());
    let right: String = redis.hget(&key, &field).await.unwrap();
    for corrupt in ["", "2 1 phone 1", &right.replace(" 9 ", " x "), &format!("{right} more")] {
        let () = redis.hset(&key, &field, corrupt).await.unwrap();
        let before = dump(&sale.redis, &sale.keys()).await;
        let adjust = Command::Adjust(sale.adjusting("a", "phone", 1));
        for command in [adjust, Command::Undo(sale.undoing("u", &id))] {
            let outcome = sale.ask(command).await;
            assert!(matches!(outcome, Err(LaneError::Unavailable(_))), "{corrupt}: {outcome:?}");
            assert!(dump(&sale.redis, &sale.keys()).await == before, "{corrupt}");
        }
    }
    let () = redis.hset(&key, &field, right).await.unwrap();
    undone(sale.undo("u", &id).await);
}

#[tokio::test]
async fn a_lane_of_a_layout_that_the_script_does_not_know_is_left_alone() {
    let sale = Sale::of(&[("phone", 9)]).await;
    let () = sale.redis.clone().hset(sale.keys().lane(), "layout", 1).await.unwrap();
    let before = dump(&sale.redis, &sale.keys()).await;
    let outcome = sale.ask(Command::Reserve(sale.reserving("ann", "k", &[("phone", 1)]))).await;
    assert!(matches!(outcome, Err(LaneError::Unavailable(_))), "{outcome:?}");
    assert!(dump(&sale.redis, &sale.keys()).await == before);
}

#[tokio::test]
async fn an_outbox_that_is_ahead_of_its_lane_stops_every_change() {
    let sale = Sale::of(&[("phone", 9)]).await;
    let mut redis = sale.redis.clone();
    let ahead = format!("{EPOCH}-99");
    let mut append = redis::cmd("XADD");
    append.arg(sale.keys().outbox()).arg(ahead).arg("at").arg(1);
    let _: String = append.query_async(&mut redis).await.unwrap();
    let before = dump(&sale.redis, &sale.keys()).await;
    let outcome = sale.ask(Command::Reserve(sale.reserving("ann", "k", &[("phone", 1)]))).await;
    assert!(matches!(outcome, Err(LaneError::Unavailable(_))), "{outcome:?}");
    assert!(dump(&sale.redis, &sale.keys()).await == before);
    sale.lanes.stock(&sale.lane).await.expect("what only reads goes on");
}

#[tokio::test]
async fn a_relay_that_meets_an_outbox_of_the_wrong_type_moves_no_mark() {
    let sale = Sale::of(&[("phone", 9)]).await;
    let saved = spoil(&sale, sale.keys().outbox()).await;
    let before = dump(&sale.redis, &sale.keys()).await;
    let reached = Reached { epoch: EPOCH, logged: 1, ..Reached::default() };
    let lease = std::time::Duration::from_secs(1);
    let advance = sale.lanes.advance(&sale.lane, reached, "relay", lease).await;
    assert!(matches!(advance, Err(LaneError::Unavailable(_))), "{advance:?}");
    assert!(dump(&sale.redis, &sale.keys()).await == before);
    restore(&sale, sale.keys().outbox(), saved).await;
    assert!(matches!(sale.advance("relay", 1, 1).await, Advance::Leased { trimmed: 1, .. }));
}

#[tokio::test]
async fn scripts_that_redis_forgot_in_mid_load_are_given_again() {
    let server = RedisServer::start(&[]);
    let sale = Sale::on(&server.url(), &options()).await;
    sale.define(1, definition(&[("phone", 1_000)])).await;
    for round in 0..20 {
        let flush = async {
            let mut redis = sale.redis.clone();
            redis::cmd("SCRIPT").arg("FLUSH").query_async::<()>(&mut redis).await.unwrap();
        };
        let buyers: Vec<_> = (0..20).map(|n| format!("{round}-{n}")).collect();
        let asked = buyers.iter().map(|buyer| sale.reserve(buyer, "k", &[("phone", 1)]));
        let (outcomes, ()) = tokio::join!(futures_util::future::join_all(asked), flush);
        outcomes.into_iter().for_each(|outcome| drop(held(outcome)));
    }
    assert_eq!(sale.stock("phone").await, (600, 400, 0));
}

#[tokio::test]
async fn a_full_redis_takes_no_new_orders_and_settles_the_others() {
    let server = RedisServer::start(&[("maxmemory", "8mb"), ("maxmemory-policy", "noeviction")]);
    let sale = Sale::on(&server.url(), &options()).await;
    sale.define(1, definition(&[("phone", 100)])).await;
    let paid = held(sale.reserve("ann", "k", &[("phone", 1)]).await);
    let left = held(sale.reserve("bob", "k", &[("phone", 1)]).await);
    let overdue = sale.hold("cy", "k", &[("phone", 1)], 1).await;
    assert!(sale.lanes.check_server().await.unwrap().warnings(0).len() < 2, "all but the file");
    held(sale.reserve("dee", "k", &[("phone", 1)]).await);

    // Something else fills it, until Redis itself refuses.
    let mut redis = sale.redis.clone();
    let mut fillers = 0;
    wait_until("Redis is full", async || {
        fillers += 1;
        let filled: Result<(), _> =
            redis.set(format!("filler-{fillers}"), "x".repeat(50_000)).await;
        filled.is_err_and(|error| error.to_string().contains("OOM"))
    })
    .await;
    let info = sale.lanes.check_server().await.unwrap();
    assert!(info.used_memory_bytes >= info.maxmemory_bytes * 9 / 10);
    () = redis::cmd("SCRIPT").arg("FLUSH").query_async(&mut redis).await.unwrap();

    let refusal = refused(sale.reserve("eve", "k", &[("phone", 1)]).await);
    assert_eq!(refusal, Refusal::Overloaded);
    assert!(matches!(sale.reserve("ann", "k", &[("phone", 1)]).await, Reserved::Replayed(_)));
    assert!(matches!(sale.confirm(&paid.id, "pay").await, Confirmed::Confirmed(_)));
    assert!(matches!(sale.cancel(&left.id).await, Cancelled::Cancelled(_)));
    wait_past(&sale, overdue.expires_at).await;
    assert_eq!(sale.expire().await.count, 1);
    assert_eq!(sale.stock("phone").await, (98, 1, 1));
    let advanced = sale.advance("relay", 8, 8).await;
    assert!(matches!(advanced, Advance::Leased { trimmed: 8, .. }), "{advanced:?}");

    for filler in 1..=fillers {
        let () = redis.del(format!("filler-{filler}")).await.unwrap();
    }
    sale.lanes.check_server().await.unwrap();
    held(sale.reserve("eve", "k", &[("phone", 1)]).await);
    sale.raw().await.check();
}

#[tokio::test]
async fn of_a_server_that_is_away_one_hears_that_nothing_was_done() {
    let server = RedisServer::start(&[]);
    let sale = Sale::on(&server.url(), &options()).await;
    sale.define(1, definition(&[("phone", 9)])).await;
    drop(server);
    let reserve = Command::Reserve(sale.reserving("ann", "k", &[("phone", 1)]));
    assert!(sale.ask(reserve.clone()).await.is_err());
    wait_until("the connection is known to be gone", async || {
        matches!(sale.ask(reserve.clone()).await, Err(LaneError::Unavailable(_)))
    })
    .await;
}
