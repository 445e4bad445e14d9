//! A lane that may have forgotten what it answered is noticed before it sells: frozen, for all.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use holdfast::domain::durability::Durability;
use holdfast::domain::order::Order;
use holdfast::lanes::command::Command;
use holdfast::lanes::reply::{Frozen, Marks, Reserved};
use holdfast::lanes::{Advance, LaneError};
use redis::AsyncCommands;

use crate::failures::{busy_on, every_command};
use crate::raw::dump;
use crate::redis_server::RedisServer;
use crate::sale::{EPOCH, Outcome, PATIENCE, Sale, definition, held, lanes, options, wait_until};

/// A Redis whose files outlive its process; every process of it is met at one address.
struct Restarting {
    dir: PathBuf,
    options: Vec<(&'static str, &'static str)>,
    server: Option<RedisServer>,
}

impl Restarting {
    fn start(options: &[(&'static str, &'static str)]) -> Self {
        let dir = std::env::temp_dir().join(format!("hf-files-{:016x}", rand::random::<u64>()));
        fs::create_dir(&dir).unwrap();
        let mut server = Self { dir, options: options.to_vec(), server: None };
        server.run();
        server
    }

    fn run(&mut self) {
        let dir = self.dir.to_str().unwrap();
        let mut options = vec![("dir", dir)];
        options.extend(&self.options);
        let server = RedisServer::start(&options);
        fs::remove_file(self.dir.join("now.sock")).ok();
        symlink(Path::new(server.url().trim_start_matches("unix://")), self.dir.join("now.sock"))
            .unwrap();
        self.server = Some(server);
    }

    /// Killed, its files then changed, and started again.
    fn restart(&mut self, change: impl FnOnce(&Path)) {
        self.server = None;
        change(&self.dir);
        self.run();
    }

    fn url(&self) -> String {
        format!("unix://{}", self.dir.join("now.sock").display())
    }

    /// The file that all changes since the start are in.
    fn log(dir: &Path) -> PathBuf {
        let mut files = fs::read_dir(dir.join("appendonlydir")).unwrap();
        let log = files.find_map(|file| {
            let path = file.unwrap().path();
            path.to_str().unwrap().ends_with(".incr.aof").then_some(path)
        });
        log.expect("a log of changes")
    }
}

impl Drop for Restarting {
    fn drop(&mut self) {
        self.server = None;
        fs::remove_dir_all(&self.dir).ok();
    }
}

const AOF: [(&str, &str); 2] = [("appendonly", "yes"), ("appendfsync", "always")];

/// The same sale through a connection of its own to the server that is there now, as a process that has
/// seen nothing yet.
async fn anew(sale: &Sale, url: &str) -> Sale {
    let mut anew = Sale::on(url, &options()).await;
    anew.lane = sale.lane.clone();
    anew
}

/// Asks until the connection to a restarted server is there again.
async fn reconnected(sale: &Sale) {
    wait_until("the connection is there again", async || {
        !matches!(
            sale.lanes.marks(&sale.lane).await,
            Err(LaneError::Unavailable(_) | LaneError::Unknown(_))
        )
    })
    .await;
}

/// Whatever is asked, of whatever order, is answered by why the lane is frozen, and changes nothing.
async fn is_frozen(sale: &Sale, order: &Order, why: Frozen) {
    let frozen = |outcome: &Result<_, LaneError>| matches!(outcome, Err(LaneError::Frozen(known)) if *known == why);
    let asked = sale.lanes.marks(&sale.lane).await;
    assert!(matches!(asked, Err(LaneError::Frozen(known)) if known == why), "{asked:?}");
    let before = dump(&sale.redis, &sale.keys()).await;
    let mut commands = every_command(sale, order);
    commands.push(Command::Reserve(sale.reserving("ann", "k", &[("phone", 1)]))); // a replay
    for command in commands.clone() {
        let outcome = sale.ask(command.clone()).await;
        assert!(frozen(&outcome), "{command:?}: {outcome:?}");
    }
    for outcome in sale.ask_at_once(&commands).await {
        assert!(frozen(&outcome), "{outcome:?}");
    }
    assert!(dump(&sale.redis, &sale.keys()).await == before, "a frozen lane stays as it is");
    let state = sale.lanes.state(&sale.lane).await.unwrap().expect("it is there");
    assert_eq!((state.epoch, state.frozen), (EPOCH, Some(why)));
}

async fn seq(sale: &Sale) -> u64 {
    sale.redis.clone().hget(sale.keys().lane(), "seq").await.unwrap()
}

async fn run_of(sale: &Sale) -> String {
    let mut info = redis::cmd("INFO");
    let text: String = info.arg("server").query_async(&mut sale.redis.clone()).await.unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("run_id:"));
    line.expect("a run id").to_owned()
}

/// What recovery does once it knows that nothing is lost, as far as a caller can tell.
async fn open(sale: &Sale, epoch: u32) {
    let fields = [
        ("epoch", epoch.to_string()),
        ("since", seq(sale).await.to_string()),
        ("run", run_of(sale).await),
        ("frozen", String::new()),
    ];
    let () = sale.redis.clone().hset_multiple(sale.keys().lane(), &fields).await.unwrap();
}

#[tokio::test]
async fn a_restarted_server_sells_nothing_though_its_files_are_whole() {
    let mut server = Restarting::start(&AOF);
    let (sale, order) = busy_on(&server.url()).await;
    let other = Sale::on(&server.url(), &options()).await;
    other.define(1, definition(&[("phone", 9)])).await;
    let had = seq(&sale).await;
    server.restart(|_| {});
    // Whoever comes first, and has seen nothing, freezes it for all.
    let fresh = anew(&sale, &server.url()).await;
    assert_eq!(seq(&fresh).await, had, "nothing is lost");
    is_frozen(&fresh, &order, Frozen::Run).await;
    reconnected(&sale).await;
    let known = Sale { redis: fresh.redis.clone(), ..sale };
    is_frozen(&known, &order, Frozen::Run).await;

    // Each lane is opened on its own; what is made on this server is not frozen.
    let made = Sale::on(&server.url(), &options()).await;
    made.define(1, definition(&[("phone", 9)])).await;
    held(made.reserve("bob", "k", &[("phone", 1)]).await);
    open(&fresh, EPOCH + 1).await;
    let replay = fresh.reserve("ann", "k", &[("phone", 1)]).await;
    assert!(matches!(replay, Reserved::Replayed(_)), "{replay:?}");
    let replay = known.reserve("ann", "k", &[("phone", 1)]).await;
    assert!(matches!(replay, Reserved::Replayed(_)), "{replay:?}");
    let shut = anew(&other, &server.url()).await;
    let stock = shut.lanes.stock(&shut.lane).await;
    assert!(matches!(stock, Err(LaneError::Frozen(Frozen::Run))), "{stock:?}");
}

#[tokio::test]
async fn a_server_that_came_back_with_less_sells_nothing() {
    let cut: fn(&Path, u64) = |dir, length| {
        let log = File::options().write(true).open(Restarting::log(dir)).unwrap();
        log.set_len(length).unwrap();
    };
    for (name, options) in [("cut AOF", AOF.as_slice()), ("old RDB", &[])] {
        let mut server = Restarting::start(options);
        let (sale, order) = busy_on(&server.url()).await;
        let had = seq(&sale).await;
        let mut length = 0;
        if options.is_empty() {
            let () = redis::cmd("SAVE").query_async(&mut sale.redis.clone()).await.unwrap();
        } else {
            length = fs::metadata(Restarting::log(&server.dir)).unwrap().len();
        }
        let lost = held(sale.reserve("zoe", "lost", &[("phone", 1)]).await);
        server.restart(|dir| {
            if length > 0 {
                cut(dir, length);
            }
        });
        let fresh = anew(&sale, &server.url()).await;
        assert_eq!(seq(&fresh).await, had, "{name}: the last order is gone");
        reconnected(&sale).await;
        let sale = Sale { redis: fresh.redis.clone(), ..sale };
        is_frozen(&sale, &order, Frozen::Run).await;
        is_frozen(&fresh, &order, Frozen::Run).await;

        // Who was told of the order can say so.
        let testimony = sale.lanes.testimony(&sale.lane);
        assert_eq!((testimony.epoch, testimony.seq), (EPOCH, had + 1), "{name}");
        assert!(testimony.orders.contains(&(lost.seq, lost.id.key())), "{name}: {testimony:?}");
        assert_eq!(fresh.lanes.testimony(&fresh.lane).seq, had, "{name}");
    }
}

#[tokio::test]
async fn an_emptied_server_sells_nothing_and_makes_no_lane_anew() {
    let server = Restarting::start(&[]);
    let (sale, order) = busy_on(&server.url()).await;
    let () = redis::cmd("FLUSHALL").query_async(&mut sale.redis.clone()).await.unwrap();
    for command in every_command(&sale, &order) {
        // The first definition of a sale, which nobody can have bought from, is none of these.
        let outcome = sale.ask(command.clone()).await.unwrap().outcome;
        assert_eq!(outcome, Outcome::Missing, "{command:?}");
    }
    let size: i64 = redis::cmd("DBSIZE").query_async(&mut sale.redis.clone()).await.unwrap();
    assert_eq!(size, 0);
    assert_eq!(sale.lanes.state(&sale.lane).await.unwrap(), None);
    let testimony = sale.lanes.testimony(&sale.lane);
    assert!(testimony.orders.iter().any(|(_, key)| *key == order.id.key()), "{testimony:?}");
}

/// A sale whose lane was put back, on the same server, to where it stood before `more`; and another
/// process that saw it no later than that.
async fn put_back(more: impl AsyncFnOnce(&Sale)) -> (Sale, Sale, Order) {
    let server = crate::sale::redis_url();
    let (sale, order) = busy_on(&server).await;
    let other = anew(&sale, &server).await;
    other.lanes.marks(&sale.lane).await.unwrap();
    let mut redis = sale.redis.clone();
    let mut saved = Vec::new();
    for key in sale.keys().all() {
        let bytes: Option<Vec<u8>> =
            redis::cmd("DUMP").arg(key).query_async(&mut redis).await.unwrap();
        saved.push((key.clone(), bytes));
    }
    more(&sale).await;
    let mut back = redis::pipe();
    back.atomic();
    for (key, bytes) in saved {
        back.del(&key).ignore();
        if let Some(bytes) = bytes {
            back.cmd("RESTORE").arg(&key).arg(0).arg(bytes).ignore();
        }
    }
    let () = back.query_async(&mut redis).await.unwrap();
    (sale, other, order)
}

#[tokio::test]
async fn of_two_processes_the_one_that_has_seen_more_freezes_the_lane_for_both() {
    let (sale, other, order) = put_back(async |sale| {
        held(sale.reserve("zoe", "lost", &[("phone", 1)]).await);
    })
    .await;
    assert!(other.lanes.marks(&sale.lane).await.is_ok(), "it knows of nothing more");
    is_frozen(&sale, &order, Frozen::Behind).await;
    is_frozen(&other, &order, Frozen::Behind).await;
}

#[tokio::test]
async fn what_was_seen_by_a_call_that_is_proven_counts_for_the_others() {
    let (sale, _, order) = put_back(async |sale| {
        let reserve = sale.reserving("zoe", "lost", &[("phone", 1)]);
        held(sale.lanes.proving().reserve(reserve).await.unwrap().outcome);
    })
    .await;
    is_frozen(&sale, &order, Frozen::Behind).await;
}

#[tokio::test]
async fn what_a_relay_has_seen_of_a_lane_counts() {
    let (sale, other, order) = put_back(async |sale| {
        held(sale.reserve("zoe", "lost", &[("phone", 1)]).await);
    })
    .await;
    // The handle that knows more is gone; this one has only told the lane its marks since.
    let relay = anew(&sale, &crate::sale::redis_url()).await;
    let had = seq(&sale).await;
    let () = sale.redis.clone().hset(sale.keys().lane(), "seq", had + 1).await.unwrap();
    let leased = relay.advance("relay", 0, 0).await;
    assert!(matches!(leased, Advance::Leased { .. }), "{leased:?}");
    let () = sale.redis.clone().hset(sale.keys().lane(), "seq", had).await.unwrap();
    assert!(other.lanes.marks(&sale.lane).await.is_ok());
    is_frozen(&relay, &order, Frozen::Behind).await;
}

#[tokio::test]
async fn what_kafka_or_the_database_has_seen_freezes_a_lane() {
    for (logged, recorded) in [(1, 0), (0, 1)] {
        let (sale, order) = busy_on(&crate::sale::redis_url()).await;
        let had = seq(&sale).await;
        let told = sale.advance("relay", (had + 1) * logged, (had + 1) * recorded).await;
        assert!(matches!(told, Advance::Behind { .. }), "{told:?}");
        is_frozen(&sale, &order, Frozen::Behind).await;
        let told = sale.advance("relay", 0, 0).await;
        assert!(matches!(told, Advance::Leased { .. }), "{told:?}");
        is_frozen(&sale, &order, Frozen::Behind).await;
    }
}

#[tokio::test]
async fn a_frozen_lane_still_gives_away_what_its_outbox_has() {
    let (sale, order) = busy_on(&crate::sale::redis_url()).await;
    let had = seq(&sale).await;
    let () = sale.redis.clone().hset(sale.keys().lane(), "frozen", "operator").await.unwrap();
    is_frozen(&sale, &order, Frozen::Operator).await;
    assert_eq!(sale.events_after(0).await.len() as u64, had);
    let advanced = sale.advance("relay", had, had - 1).await;
    let marks = Marks { epoch: EPOCH, seq: had, replicated: 0, logged: had, recorded: had - 1 };
    assert_eq!(advanced, Advance::Leased { marks, trimmed: had - 1 });
    assert_eq!(sale.events_after(0).await.len(), 1);
    is_frozen(&sale, &order, Frozen::Operator).await;
    let state = sale.lanes.state(&sale.lane).await.unwrap().unwrap();
    let stands = (state.since, state.seq, state.logged, state.recorded, state.trimmed);
    assert_eq!(stands, (0, had, had, had - 1, had - 1));
    assert_eq!(state.run, Some(run_of(&sale).await));
}

#[tokio::test]
async fn an_epoch_that_was_opened_is_not_behind_what_was_seen_of_the_last_one() {
    let (sale, other, _) = put_back(async |sale| {
        for key in ["lost", "too"] {
            held(sale.reserve("zoe", key, &[("phone", 1)]).await);
        }
    })
    .await;
    open(&sale, EPOCH + 1).await;
    let order = held(sale.reserve("yan", "k", &[("phone", 1)]).await);
    let testimony = sale.lanes.testimony(&sale.lane);
    assert_eq!((testimony.epoch, testimony.seq), (EPOCH + 1, seq(&sale).await));
    assert_eq!(testimony.orders, [(order.seq, order.id.key())], "the last epoch is over");
    held(other.reserve("ida", "k", &[("phone", 1)]).await);

    // Who has seen the new epoch is not satisfied by the old one, however far that got.
    let fields = [("epoch", EPOCH.to_string()), ("seq", "900".to_owned())];
    let () = sale.redis.clone().hset_multiple(sale.keys().lane(), &fields).await.unwrap();
    is_frozen(&sale, &order, Frozen::Behind).await;
}

#[tokio::test]
async fn a_lane_that_an_older_version_made_takes_its_servers_run_with_its_next_event() {
    let (sale, _) = busy_on(&crate::sale::redis_url()).await;
    let run = async || -> Option<String> {
        sale.redis.clone().hget(sale.keys().lane(), "run").await.unwrap()
    };
    assert_eq!(run().await, Some(run_of(&sale).await), "whoever makes it");
    let () = sale.redis.clone().hdel(sale.keys().lane(), "run").await.unwrap();
    sale.lanes.stock(&sale.lane).await.unwrap();
    assert_eq!(run().await, None, "a read writes nothing");
    held(sale.reserve("zoe", "k", &[("phone", 1)]).await);
    assert_eq!(run().await, Some(run_of(&sale).await));
    sale.raw().await.check();
}

#[tokio::test]
async fn orders_told_of_are_remembered_until_kafka_has_them() {
    let mut options = options();
    options.told_max = 3;
    let url = crate::sale::redis_url();
    let sale = Sale::on(&url, &options).await;
    sale.define(1, definition(&[("phone", 9)])).await;
    let told = || {
        let testimony = sale.lanes.testimony(&sale.lane);
        let seqs: Vec<_> = testimony.orders.iter().map(|(seq, _)| *seq).collect();
        (testimony.logged, seqs, testimony.unlisted)
    };
    let order = held(sale.reserve("ann", "k", &[("phone", 1)]).await); // 2
    sale.reserve("ann", "k", &[("phone", 1)]).await;
    sale.lanes.get(order.id.clone()).await.unwrap();
    assert_eq!(told(), (0, vec![2], 0), "the same again is no more than that");
    sale.confirm(&order.id, "pay").await; // 3
    let second = held(sale.reserve("bob", "k", &[("phone", 1)]).await); // 4
    sale.cancel(&second.id).await; // 5
    assert_eq!(told(), (0, vec![2, 3, 4], 5), "no room for the last");
    sale.advance("relay", 3, 0).await;
    assert_eq!(told(), (3, vec![4], 5));
    sale.advance("relay", 5, 5).await;
    assert_eq!(told(), (5, vec![], 0));
    assert!(sale.lanes.unsettled().is_empty());
    sale.lanes.get(second.id.clone()).await.unwrap();
    assert_eq!(told(), (5, vec![], 0), "Kafka has it");

    // A process that only showed an order answers for it as well.
    let third = held(sale.reserve("cy", "k", &[("phone", 1)]).await);
    let other = Sale { lanes: lanes(&url, &options), ..sale.clone() };
    other.lanes.get(third.id.clone()).await.unwrap();
    assert_eq!(other.lanes.testimony(&sale.lane).orders, [(third.seq, third.id.key())]);
    assert_eq!(other.lanes.unsettled(), std::slice::from_ref(&sale.lane));
}

#[tokio::test]
async fn who_waits_for_a_lane_hears_nothing_from_it_while_it_is_frozen() {
    let sale = Sale::of(&[("phone", 9)]).await;
    held(sale.reserve("ann", "k", &[("phone", 1)]).await);
    let known = sale.lanes.marks(&sale.lane).await.unwrap();
    let wait = |timeout| sale.lanes.wait_for(&sale.lane, Durability::Logged, 2, known, timeout);
    let freeze = async |why: &str| -> () {
        sale.redis.clone().hset(sale.keys().lane(), "frozen", why).await.unwrap()
    };
    freeze("operator").await;
    assert!(matches!(sale.advance("relay", 2, 2).await, Advance::Leased { .. }));
    assert_eq!(wait(Duration::from_millis(300)).await, None, "it may have forgotten that event");
    let (heard, ()) = tokio::join!(wait(PATIENCE), freeze(""));
    assert!(heard.is_some_and(|marks| marks.logged == 2), "{heard:?}");
}
