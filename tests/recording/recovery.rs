//! Lanes that are opened anew: as they were where Redis has lost nothing, else from the ledger, so
//! that nobody can tell them from what they were.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use holdfast::bus::producer::Producer;
use holdfast::bus::record::encode_seal;
use holdfast::config::Config;
use holdfast::domain::event::{RebuildToken, Seal};
use holdfast::domain::order::Order;
use holdfast::domain::sale::Definition;
use holdfast::domain::time::Timestamp;
use holdfast::lanes::LaneError;
use holdfast::lanes::command::{Phase, PhaseChange};
use holdfast::lanes::recovery::{Claim, Claimed, Part};
use holdfast::lanes::reply::{Frozen, Reserved};
use holdfast::ledger::{Deed, LetterStatus, Outcome, Report};
use holdfast::reconciler::rebuild::{Despite, Recovery, RecoveryError, Wish};
use holdfast::witness::Witness;
use holdfast::writer::{Options, retry};
use prometheus_client::registry::Registry;
use redis::AsyncCommands;
use tokio_util::sync::CancellationToken;

use crate::pipeline::{Pipeline, Role};
use crate::shopper::Shopper;
use crate::support::{Running, actor, until};

type Hash = BTreeMap<String, String>;

/// All of a lane, in a form in which two that mean the same are the same.
#[derive(Debug, PartialEq)]
struct Image {
    stock: Hash,
    buyers: Hash,
    orders: Hash,
    adjustments: Hash,
    /// Of orders that hold stock, and when each falls due.
    deadlines: BTreeMap<String, String>,
    lane: Hash,
}

/// Parts in order, since nothing depends on theirs.
fn sorted(text: &str, separator: char) -> String {
    let mut parts: Vec<_> = text.split(separator).collect();
    parts.sort_unstable();
    parts.join(&separator.to_string())
}

/// Status and due time (ms) of an order's record.
fn due(record: &str) -> Option<String> {
    let fields: Vec<_> = record.split(' ').collect();
    let number = |index: usize| fields[index].parse::<u64>().expect("a number");
    matches!(fields[0], "h" | "p").then(|| (number(2) + number(3)).to_string())
}

impl Pipeline {
    fn recovery(&self) -> Recovery {
        let mut config = Config { kafka: self.stack.kafka.clone(), ..self.config.clone() };
        config.reconciler.recovery_retry_ms = 200;
        let (lanes, ledger) = (self.lanes.clone(), self.stack.ledger.clone());
        let registry = &mut Registry::default();
        Recovery::new(lanes, ledger, self.catalog.clone(), &config, registry)
    }

    /// The lane's one report, which is written once the lane is open.
    async fn report(&self) -> Report {
        until("it is reported", || async { !self.reports().await.is_empty() }).await;
        let mut reports = self.reports().await;
        assert_eq!(reports.len(), 1, "{reports:?}");
        reports.remove(0)
    }

    /// The role, as it looks for frozen lanes by itself.
    fn recovering(&self) -> Role {
        let stop = CancellationToken::new();
        let (recovery, token) = (self.recovery(), stop.clone());
        let task = tokio::spawn(recovery.run(token));
        Role { stop, task }
    }

    async fn image_of_lane(&self) -> Image {
        let mut redis = self.redis().await;
        let key = |part: &str| format!("hf1:{{{}}}:{part}", self.lane);
        let mut hashes = Vec::new();
        for part in ["stock", "buyers", "orders", "adjustments", "lane"] {
            hashes.push(redis.hgetall::<_, Hash>(key(part)).await.expect("a hash"));
        }
        let [stock, mut buyers, mut orders, adjustments, mut lane] =
            hashes.try_into().expect("five of them");
        let due_times: Vec<(String, f64)> =
            redis.zrange_withscores(key("deadlines"), 0, -1).await.expect("deadlines");
        for units in buyers.values_mut() {
            *units = sorted(units, ',');
        }
        let mut deadlines = BTreeMap::new();
        for (key, record) in &mut orders {
            let holds = due(record);
            if let Some(expires) = holds {
                let is_due = |(keys, at): &&(String, f64)| {
                    let keys = keys.as_bytes().chunks(22);
                    keys.into_iter().any(|one| one == key.as_bytes()) && at.to_string() == expires
                };
                assert!(due_times.iter().find(is_due).is_some(), "{key} falls due at {expires}");
                deadlines.insert(key.clone(), expires);
            }
            let at = record.match_indices(' ').nth(11).expect("twelve fields before the notes").0;
            *record = format!("{} {}", &record[..at], sorted(&record[at + 1..], ' '));
        }
        let own = [
            "seq", "version", "digest", "opens", "closes", "hold", "grace", "longest", "limit",
            "closed", "used",
        ];
        let paused = lane.get("paused").is_some_and(|paused| paused == "1");
        lane.retain(|field, _| own.contains(&field.as_str()));
        lane.retain(|_, value| !value.is_empty());
        lane.insert("paused".to_owned(), paused.to_string());
        Image { stock, buyers, orders, adjustments, deadlines, lane }
    }

    /// Answers for this process, with the role that does so.
    async fn witness(&self) -> (Witness, Role) {
        let (lanes, ledger) = (self.lanes.clone(), self.stack.ledger.clone());
        let (options, registry) = (self.config.witness.clone(), &mut Registry::default());
        let witness = Witness::new(lanes, ledger, options, vec!["api"], registry);
        witness.heartbeat().await.expect("a sign");
        let stop = CancellationToken::new();
        let (testifying, token) = (witness.clone(), stop.clone());
        let task = tokio::spawn(async move { testifying.run(token).await });
        (witness, Role { stop, task })
    }

    /// One with relay and writer, and so many orders that are recorded.
    async fn sold(name: &str, orders: usize) -> (Self, Role, Running) {
        let pipeline = Self::new(name, 300).await;
        let (relay, writer) = (pipeline.relay(), pipeline.stack.writer());
        pipeline.hold(orders).await;
        pipeline.until_recorded().await;
        (pipeline, relay, writer)
    }

    /// Recovers the lane once whoever had it has given back its lock.
    async fn recover(&self, wish: &Wish) -> Result<Option<Report>, RecoveryError> {
        let (recovery, began) = (self.recovery(), Instant::now());
        loop {
            match recovery.recover(&self.lane, wish).await {
                Err(RecoveryError::Busy) if began.elapsed() < Duration::from_secs(10) => {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                ended => return ended,
            }
        }
    }

    async fn recovered(&self, wish: &Wish) -> Report {
        self.recover(wish).await.expect("no error").expect("it was not left as it was")
    }

    /// Why the lane refuses.
    async fn frozen(&self) -> Frozen {
        match self.lanes.marks(&self.lane).await {
            Err(LaneError::Frozen(why)) => why,
            other => panic!("{other:?}"),
        }
    }

    /// As after a restart of Redis that lost nothing.
    async fn begin_another_run(&self) {
        let mut redis = self.redis().await;
        let key = format!("hf1:{{{}}}:lane", self.lane);
        let _: () = redis.hset(key, "run", "another").await.expect("written");
    }

    /// As after `FLUSHALL`.
    async fn forget_lane(&self) {
        self.restore(&[]).await;
    }

    async fn reports(&self) -> Vec<Report> {
        self.stack.ledger.rebuilds(Some(&self.lane.sale), 100).await.expect("reports")
    }

    async fn until_sold_from(&self) {
        until("the lane is open", || async { self.lanes.marks(&self.lane).await.is_ok() }).await;
    }

    async fn shop(&self, seed: u64, rounds: usize) {
        let shop = async |number: u64| {
            let (lanes, lane, secret) = (&self.lanes, &self.lane, &self.stack.secret);
            let mut shopper = Shopper::new(lanes, lane, secret, &["sku"], seed + number);
            for _ in 0..rounds {
                shopper.shop().await;
            }
        };
        join_all((0..4).map(shop)).await;
    }

    /// What an order answers to its own placement, sent again.
    async fn replay(&self, key: &str) -> Order {
        match self.reserve(key).await.outcome {
            Reserved::Replayed(order) => order,
            other => panic!("{other:?}"),
        }
    }
}

fn ids(orders: &[Order]) -> BTreeSet<String> {
    orders.iter().map(|order| order.id.to_string()).collect()
}

fn listed(report: &Report) -> BTreeSet<String> {
    report.lost_orders.iter().cloned().collect()
}

fn wish(despite: Despite) -> Wish {
    Wish { actor: actor(), rebuild: true, despite }
}

fn seed() -> u64 {
    let seed = u64::from(rand::random::<u32>());
    println!("seed {seed}");
    seed
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lane_that_redis_lost_is_rebuilt_as_it_was() {
    let pipeline = Pipeline::new("rebuilt", 300).await;
    let (relay, writer) = (pipeline.relay(), pipeline.stack.writer());
    let seed = seed();
    pipeline.shop(seed, 60).await;
    pipeline.reserve("replayed").await;
    let short = pipeline.reserve_for("short", Some(60)).await;
    assert!(matches!(short.outcome, Reserved::Held(_)), "{short:?}");
    let phase = |change| Phase { change, actor: actor(), trace: None };
    for change in [PhaseChange::Pause, PhaseChange::Resume, PhaseChange::Pause] {
        pipeline.lanes.phase(&pipeline.lane, phase(change)).await.expect("an answer");
    }
    pipeline.until_recorded().await;
    let before = pipeline.image_of_lane().await;
    let marks = pipeline.lanes.marks(&pipeline.lane).await.expect("marks");
    let replayed = pipeline.replay("replayed").await;

    pipeline.forget_lane().await;
    let frozen = pipeline.lanes.marks(&pipeline.lane).await;
    assert!(matches!(frozen, Err(LaneError::Missing)), "{frozen:?}");
    let recovering = pipeline.recovering();
    pipeline.until_sold_from().await;
    assert_eq!(pipeline.image_of_lane().await, before);
    let report = &pipeline.report().await;
    let Report { epoch, why, outcome, seq, lost_max, .. } = report;
    assert_eq!((epoch, why.as_str(), outcome), (&Some(2), "missing", &Outcome::Rebuilt));
    assert_eq!((*seq, *lost_max), (Some(marks.seq), 0));
    let after = pipeline.lanes.marks(&pipeline.lane).await.expect("marks");
    assert_eq!((after.epoch, after.seq, after.recorded), (2, marks.seq, marks.seq));
    assert_eq!(pipeline.replay("replayed").await, replayed);
    let short = pipeline.reserve_for("short", Some(60)).await.outcome;
    assert!(matches!(short, Reserved::Replayed(_)), "{short:?}");
    let other = pipeline.reserve_for("short", None).await.outcome;
    assert_eq!(other, Reserved::KeyReused, "another hold than was asked for");

    pipeline.lanes.phase(&pipeline.lane, phase(PhaseChange::Resume)).await.expect("an answer");
    pipeline.shop(seed + 100, 30).await;
    pipeline.until_recorded().await;
    recovering.stop().await;
    relay.stop().await;
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deadlines_run_and_limits_count_after_a_rebuild() {
    let pipeline = Pipeline::new("deadlines", 2).await;
    let (relay, writer) = (pipeline.relay(), pipeline.stack.writer());
    let held = pipeline.hold(50).await;
    pipeline.until_recorded().await;
    pipeline.forget_lane().await;
    let recovering = pipeline.recovering();
    pipeline.until_sold_from().await;
    let sweeper = pipeline.sweeper();
    until("all holds are ended", || async {
        let stock = pipeline.lanes.stock(&pipeline.lane).await.expect("stock").outcome;
        stock.skus[0].counters.held == 0
    })
    .await;
    pipeline.until_recorded().await;
    let last = held.iter().map(|order| order.expires_at).max().expect("some");
    let early = "SELECT count(*) FROM ledger l JOIN orders o ON o.id = l.order_id
        WHERE l.event = 'holdfast.order.expired' AND l.at < o.expires_at";
    assert_eq!(pipeline.stack.number(early).await, 0, "none before {last}");
    recovering.stop().await;
    sweeper.stop().await;
    relay.stop().await;
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lane_that_lost_nothing_is_opened_as_it_is() {
    let pipeline = Pipeline::new("opened", 300).await;
    let (relay, writer, recovering) =
        (pipeline.relay(), pipeline.stack.writer(), pipeline.recovering());
    let seed = seed();
    pipeline.shop(seed, 30).await;
    let before = pipeline.image_of_lane().await;
    pipeline.begin_another_run().await;
    let began = Instant::now();
    pipeline.frozen().await;
    pipeline.until_sold_from().await;
    println!("open again after {:?}", began.elapsed());
    assert_eq!(pipeline.image_of_lane().await, before);
    let report = &pipeline.report().await;
    assert_eq!((report.why.as_str(), report.outcome), ("run", Outcome::Opened));
    pipeline.shop(seed + 100, 30).await;
    pipeline.until_recorded().await;
    let epochs = "SELECT count(DISTINCT epoch) FROM ledger";
    assert_eq!(pipeline.stack.number(epochs).await, 2);
    recovering.stop().await;
    relay.stop().await;
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_copy_is_not_sold_from_but_rebuilt_with_what_kafka_has() {
    let pipeline = Pipeline::new("old_copy", 300).await;
    let (relay, writer) = (pipeline.relay(), pipeline.stack.writer());
    let seed = seed();
    pipeline.shop(seed, 10).await;
    let image = pipeline.image().await;
    pipeline.shop(seed + 100, 20).await;
    pipeline.until_recorded().await;
    let before = pipeline.image_of_lane().await;
    pipeline.restore(&image).await;
    pipeline.frozen().await;
    let recovering = pipeline.recovering();
    pipeline.until_sold_from().await;
    assert_eq!(pipeline.image_of_lane().await, before);
    let report = &pipeline.report().await;
    assert_eq!((report.why.as_str(), report.outcome), ("behind", Outcome::Rebuilt));
    assert!(report.seq_before < report.seq, "{report:?}");
    recovering.stop().await;
    relay.stop().await;
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_only_in_the_outbox_is_drained_before_the_seal_without_a_relay() {
    let pipeline = Pipeline::new("drained", 300).await;
    let writer = pipeline.stack.writer();
    pipeline.hold(100).await;
    let report = pipeline.recovered(&wish(Despite::Nothing)).await;
    assert_eq!((report.outcome, report.seq), (Outcome::Rebuilt, Some(101)));
    assert_eq!(pipeline.stack.number("SELECT count(*) FROM orders").await, 100);
    pipeline.until_recorded().await;
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn orders_that_only_redis_had_are_listed_by_whoever_answered_them() {
    let (pipeline, relay, writer) = Pipeline::sold("lost", 20).await;
    relay.stop().await;
    let image = pipeline.image().await;
    let lost = pipeline.hold(5).await;
    let (_, witness) = pipeline.witness().await;

    pipeline.restore(&image).await;
    let (relay, recovering) = (pipeline.relay(), pipeline.recovering());
    pipeline.frozen().await;
    pipeline.until_sold_from().await;
    let report = &pipeline.report().await;
    assert_eq!((report.outcome, report.seq, report.lost_max), (Outcome::Rebuilt, Some(21), 5));
    assert_eq!(listed(report), ids(&lost));
    for order in lost {
        let known = pipeline.lanes.get(order.id).await.expect("an answer").outcome;
        assert_eq!(known, None, "it is not sold twice, nor half there");
    }
    let stock = pipeline.lanes.stock(&pipeline.lane).await.expect("stock").outcome;
    assert_eq!(stock.skus[0].counters.held, 20);
    for role in [recovering, witness, relay] {
        role.stop().await;
    }
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_testified_to_a_rebuild_that_died_is_told_by_whoever_finishes_it_and_once() {
    let (pipeline, relay, writer) = Pipeline::sold("finisher", 20).await;
    relay.stop().await;
    let lost = pipeline.hold(5).await;
    let (_, witness) = pipeline.witness().await;
    pipeline.forget_lane().await;

    let (ledger, gone_after) = (&pipeline.stack.ledger, Duration::from_secs(3));
    ledger.testimonies(&pipeline.lane, gone_after).await.expect("answers");
    let Claim { lane, epoch, token } = stopped_recovery(&pipeline).await;
    let claim = Claim { lane: lane.clone(), epoch, token };
    let (gives_up, at) = (false, Timestamp::from_millis(0));
    let seal = encode_seal(&Seal { lane, epoch, token, gives_up, at });
    pipeline.stack.send_records(1, &[seal]).await;
    until("it is sealed", || async {
        pipeline.stack.number("SELECT sealed_epoch FROM lanes").await == i64::from(epoch)
    })
    .await;
    assert!(pipeline.lanes.clear(&claim).await.expect("an answer"));
    assert_eq!(pipeline.frozen().await, Frozen::Rebuild);
    let forgotten = pipeline.lanes.testimony(&pipeline.lane);
    assert_eq!((forgotten.epoch, forgotten.orders), (epoch, Vec::new()));

    let report = pipeline.recovered(&wish(Despite::Nothing)).await;
    assert_eq!((report.outcome, report.seq, report.lost_max), (Outcome::Rebuilt, Some(21), 5));
    assert_eq!(listed(&report), ids(&lost));

    let more = pipeline.hold(2).await;
    pipeline.forget_lane().await;
    let report = pipeline.recovered(&wish(Despite::Nothing)).await;
    assert_eq!((report.seq, report.lost_max), (Some(21), 2), "{report:?}");
    assert_eq!(listed(&report), ids(&more));
    witness.stop().await;
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_ends_in_order_leaves_what_it_has_seen() {
    let (pipeline, relay, writer) = Pipeline::sold("parting", 20).await;
    relay.stop().await;
    let image = pipeline.image().await;
    let lost = pipeline.hold(5).await;
    let (witness, role) = pipeline.witness().await;
    role.stop().await;
    witness.leave().await.expect("left");
    assert_eq!(pipeline.stack.number("SELECT count(*) FROM instances").await, 0);

    pipeline.restore(&image).await;
    let report = pipeline.recovered(&wish(Despite::Nothing)).await;
    assert_eq!((report.outcome, report.lost_max), (Outcome::Rebuilt, 5));
    assert_eq!(listed(&report), ids(&lost));

    // What it says is of use until its lane is recorded as far.
    let left = async || {
        pipeline.stack.ledger.forget_witnesses(Duration::from_secs(3_600)).await.expect("done");
        pipeline.stack.number("SELECT count(*) FROM testimonies").await
    };
    assert_eq!(left().await, 1);
    let relay = pipeline.relay();
    pipeline.hold(5).await;
    pipeline.until_recorded().await;
    assert_eq!(left().await, 0);
    relay.stop().await;
    writer.stop().await;
}

/// Figures for `docs/reliability.md`: nothing is judged but that the lane is opened each time.
#[tokio::test(flavor = "multi_thread")]
async fn how_long_a_testimony_takes_and_a_lane_that_lost_nothing() {
    const TIMES: usize = 11;
    let pipeline = Pipeline::new("times", 300).await;
    let (relay, writer) = (pipeline.relay(), pipeline.stack.writer());
    let (_, witness) = pipeline.witness().await;
    let recovering = pipeline.recovering();
    let mut redis = pipeline.redis().await;
    let lane = format!("hf1:{{{}}}:lane", pipeline.lane);
    let (mut asked, mut opened) = (Vec::new(), Vec::new());
    for _ in 0..TIMES {
        pipeline.hold(50).await;
        pipeline.until_recorded().await;
        let (ledger, began) = (&pipeline.stack.ledger, Instant::now());
        let heard = ledger.testimonies(&pipeline.lane, Duration::from_secs(3)).await;
        assert_eq!(heard.expect("answers").heard.len(), 1);
        asked.push(began.elapsed());
        let _: () = redis.hset(&lane, "run", "another").await.expect("written");
        let began = Instant::now();
        assert!(pipeline.lanes.marks(&pipeline.lane).await.is_err());
        pipeline.until_sold_from().await;
        opened.push(began.elapsed());
    }
    asked.sort_unstable();
    opened.sort_unstable();
    let (median, last) = (TIMES / 2, TIMES - 1);
    println!("a testimony: median {:?}, longest {:?}", asked[median], asked[last]);
    println!("open again: median {:?}, longest {:?}", opened[median], opened[last]);
    until("all are reported", || async { pipeline.reports().await.len() == TIMES }).await;
    assert!(pipeline.reports().await.iter().all(|report| report.outcome == Outcome::Opened));
    for role in [recovering, witness, relay] {
        role.stop().await;
    }
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lane_of_which_nothing_was_recorded_is_defined_anew() {
    let pipeline = Pipeline::new("nothing", 300).await;
    let writer = pipeline.stack.writer();
    pipeline.forget_lane().await;
    let report = pipeline.recovered(&wish(Despite::Nothing)).await;
    assert_eq!((report.outcome, report.seq), (Outcome::Rebuilt, Some(0)));
    let relay = pipeline.relay();
    pipeline.hold(3).await;
    pipeline.until_recorded().await;
    relay.stop().await;
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lane_that_is_opened_as_it_is_gets_the_definition_that_it_has_lost() {
    let (pipeline, relay, writer) = Pipeline::sold("redefined", 3).await;
    // It was answered, and Redis lost it before anybody else had it.
    let text = r#"{"name": "n2", "hold_seconds": 300, "skus": [{"sku": "sku", "stock": 1000000}]}"#;
    let definition: Definition = serde_json::from_str(text).expect("a definition");
    let definition = definition.check().expect("a possible definition");
    let lock = pipeline.stack.ledger.lock_sale(&pipeline.lane.sale).await.expect("the lock");
    lock.commit_definition(2, &definition, &actor()).await.expect("the definition");
    pipeline.begin_another_run().await;
    assert!(pipeline.lanes.marks(&pipeline.lane).await.is_err(), "it is frozen");
    let wish = Wish { rebuild: false, ..wish(Despite::Nothing) };
    let report = pipeline.recovered(&wish).await;
    assert_eq!(report.outcome, Outcome::Opened);
    let lane = format!("hf1:{{{}}}:lane", pipeline.lane);
    let version: u64 = pipeline.redis().await.hget(lane, "version").await.expect("a version");
    assert_eq!(version, 2);
    relay.stop().await;
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lane_that_another_has_claimed_since_is_no_longer_written_or_opened() {
    let pipeline = Pipeline::new("claimed", 300).await;
    let (first, second) = (stopped_recovery(&pipeline).await, stopped_recovery(&pipeline).await);
    let before = pipeline.image().await;
    let (lanes, pairs) = (&pipeline.lanes, [("sku".to_owned(), "9 0 0 0  9".to_owned())]);
    assert!(!lanes.clear(&first).await.expect("an answer"));
    assert!(!lanes.open(&first, 1).await.expect("an answer"));
    assert_eq!(pipeline.image().await, before);
    assert!(lanes.clear(&second).await.expect("an answer"));
    assert!(!lanes.write(&first, Part::Stock, &pairs).await.expect("an answer"));
    assert!(lanes.write(&second, Part::Stock, &pairs).await.expect("an answer"));
}

/// Takes the lane's next epoch and claims the lane, as a process does that is then stopped.
async fn stopped_recovery(pipeline: &Pipeline) -> Claim {
    let (ledger, lane) = (&pipeline.stack.ledger, pipeline.lane.clone());
    let marks = ledger.lane_marks(std::slice::from_ref(&lane)).await.expect("marks")[&lane];
    let token = RebuildToken::new(rand::random());
    let epoch = ledger.take_epoch(&lane, marks.epoch, token).await.expect("an answer");
    let claim = Claim { lane, epoch: epoch.expect("nobody else takes it"), token };
    let claimed = pipeline.lanes.claim(&claim, true).await.expect("an answer");
    assert!(matches!(claimed, Claimed::Ours(_)), "{claimed:?}");
    claim
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recovery_that_was_stopped_can_do_nothing_once_another_has_finished() {
    let (pipeline, relay, writer) = Pipeline::sold("zombie", 20).await;
    let zombie = stopped_recovery(&pipeline).await;
    assert!(pipeline.lanes.clear(&zombie).await.expect("an answer"), "it is its lane yet");
    assert_eq!(pipeline.recovered(&wish(Despite::Nothing)).await.outcome, Outcome::Rebuilt);
    let before = pipeline.image_of_lane().await;

    let (lanes, pairs) = (&pipeline.lanes, [("sku".to_owned(), "9 0 0 0  9".to_owned())]);
    assert!(!lanes.write(&zombie, Part::Stock, &pairs).await.expect("an answer"));
    assert!(!lanes.clear(&zombie).await.expect("an answer"));
    assert!(!lanes.open(&zombie, 21).await.expect("an answer"));
    assert_eq!(lanes.claim(&zombie, true).await.expect("an answer"), Claimed::Lost);
    let Claim { lane, epoch, token } = zombie;
    let (gives_up, at) = (false, Timestamp::from_millis(0));
    let seal = encode_seal(&Seal { lane, epoch, token, gives_up, at });
    let producer = Producer::new(&pipeline.stack.kafka).expect("a producer");
    producer.send(1, &seal).expect("room").await.expect("sent");
    assert_eq!(pipeline.image_of_lane().await, before);
    pipeline.hold(20).await;
    pipeline.until_recorded().await;
    assert_eq!(pipeline.stack.number("SELECT count(*) FROM orders").await, 40);
    relay.stop().await;
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rebuild_that_died_half_way_is_begun_anew() {
    let (pipeline, relay, writer) = Pipeline::sold("died", 20).await;
    let before = pipeline.image_of_lane().await;
    let dead = stopped_recovery(&pipeline).await;
    assert!(pipeline.lanes.clear(&dead).await.expect("an answer"));
    let pairs = [("sku".to_owned(), "9 0 0 0  9".to_owned())];
    assert!(pipeline.lanes.write(&dead, Part::Stock, &pairs).await.expect("an answer"));
    pipeline.frozen().await;
    let recovering = pipeline.recovering();
    pipeline.until_sold_from().await;
    assert_eq!(pipeline.image_of_lane().await, before);
    assert_eq!(pipeline.lanes.marks(&pipeline.lane).await.expect("marks").epoch, 3);
    pipeline.hold(5).await;
    pipeline.until_recorded().await;
    recovering.stop().await;
    relay.stop().await;
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_that_began_another_run_in_the_middle_makes_the_rebuild_begin_anew() {
    let pipeline = Pipeline::new("other_run", 300).await;
    let claim = stopped_recovery(&pipeline).await;
    assert!(pipeline.lanes.clear(&claim).await.expect("an answer"));
    pipeline.begin_another_run().await;
    assert!(!pipeline.lanes.open(&claim, 0).await.expect("an answer"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lane_that_is_in_doubt_stays_frozen_until_an_operator_gives_up_what_it_lacks() {
    let (pipeline, relay, writer) = Pipeline::sold("doubt", 20).await;
    let before = pipeline.image_of_lane().await;
    relay.stop().await;
    // Kafka has event 23 and 24, and nobody has 22 any more.
    let mut copy = pipeline.stack.lane_of(&pipeline.lane, 22);
    let events = [copy.held("a"), copy.held("b")];
    pipeline.stack.send(&copy, &events).await;
    until("they are parked", || async {
        pipeline.stack.number("SELECT count(*) FROM parked").await == 2
    })
    .await;
    pipeline.forget_lane().await;

    let recovering = pipeline.recovering();
    let report = &pipeline.report().await;
    assert_eq!((report.outcome, report.seq), (Outcome::InDoubt, None), "{report:?}");
    assert!(report.detail.contains("2 records are parked, since event 22 is missing"));
    let refused = pipeline.lanes.marks(&pipeline.lane).await;
    assert!(matches!(refused, Err(LaneError::Missing)), "{refused:?}");
    recovering.stop().await;

    assert_eq!(pipeline.recovered(&wish(Despite::Nothing)).await.outcome, Outcome::InDoubt);
    let forced = pipeline.recovered(&wish(Despite::Everything)).await;
    assert_eq!((forced.outcome, forced.seq), (Outcome::Rebuilt, Some(21)), "{forced:?}");
    assert_eq!(pipeline.image_of_lane().await, before);
    let letters = pipeline.stack.dead_letters().await;
    assert_eq!(letters, ["stale-epoch"; 2], "what was behind the gap is kept");
    let blocking = "SELECT count(*) FROM dead_letters d JOIN lanes l USING (sale_id, lane)
        WHERE d.seq > l.recorded AND d.epoch >= l.sealed_epoch";
    assert_eq!(pipeline.stack.number(blocking).await, 0, "and can be discarded");

    pipeline.forget_lane().await;
    let report = pipeline.recovered(&wish(Despite::Nothing)).await;
    assert_eq!(report.outcome, Outcome::Rebuilt, "what was given up is no doubt: {report:?}");
    writer.stop().await;
}

/// The writer comes to it, and finds no room for all that follows it, only after the epoch was taken.
#[tokio::test(flavor = "multi_thread")]
async fn a_poison_record_met_on_the_way_to_the_seal_is_retried_with_all_that_follows_it() {
    let pipeline = Pipeline::new("met", 300).await;
    let sql = async |sql| sqlx::query(sql).execute(&pipeline.stack.pool).await.expect("done");
    sql("ALTER TABLE orders ADD CONSTRAINT no_poison CHECK (hold_seconds <> 61)").await;
    let relay = pipeline.relay();
    pipeline.reserve_for("poison", Some(61)).await;
    pipeline.hold(40).await;
    until("Kafka has all of it", || async {
        let marks = pipeline.lanes.marks(&pipeline.lane).await.expect("marks");
        marks.logged == marks.seq
    })
    .await;
    relay.stop().await;
    let before = pipeline.image_of_lane().await;
    pipeline.forget_lane().await;

    let wish = wish(Despite::Nothing);
    let meets = async {
        let epoch = "SELECT epoch FROM lanes";
        until("its epoch is taken", || async { pipeline.stack.number(epoch).await == 2 }).await;
        let options = pipeline.stack.options();
        pipeline.stack.writer_with(Options { parked_max: 10, batch_max: 8, ..options })
    };
    let (report, writer) = tokio::join!(pipeline.recovered(&wish), meets);
    assert_eq!((report.outcome, report.epoch, report.seq), (Outcome::InDoubt, Some(2), None));
    let parked = "10 records are parked, since event 2 is missing";
    assert!(report.detail.contains(parked), "{report:?}");
    assert_eq!(pipeline.stack.dead_letters().await, ["not-applicable"], "and nothing has ended");

    sql("ALTER TABLE orders DROP CONSTRAINT no_poison").await;
    let letter = pipeline.stack.number("SELECT id FROM dead_letters").await;
    let deed = Deed { actor: actor(), note: None };
    let retried = retry(&pipeline.stack.ledger, letter, &deed).await.expect("no error");
    assert_eq!(retried.expect("it is there").status, LetterStatus::Retried);
    let report = pipeline.recovered(&wish).await;
    assert_eq!((report.outcome, report.seq), (Outcome::Rebuilt, Some(42)), "{report:?}");
    assert_eq!(pipeline.image_of_lane().await, before);
    assert_eq!(pipeline.stack.dead_letters().await, ["not-applicable"]);
    pipeline.stack.check_books().await;
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ledger_that_contradicts_itself_opens_nothing() {
    let (pipeline, relay, writer) = Pipeline::sold("contradicts", 10).await;
    let sql = "UPDATE counters SET held = held - 1, available = available + 1";
    sqlx::query(sql).execute(&pipeline.stack.pool).await.expect("changed");
    pipeline.forget_lane().await;
    let recovered = pipeline.recover(&wish(Despite::Everything)).await;
    assert!(matches!(recovered, Err(RecoveryError::NotProven(_))), "{recovered:?}");
    pipeline.frozen().await;
    assert_eq!(pipeline.reports().await[0].outcome, Outcome::Failed);
    relay.stop().await;
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archived_sale_is_left_where_it_is() {
    let pipeline = Pipeline::new("archived", 300).await;
    let sql = "UPDATE sales SET archived_at = now()";
    sqlx::query(sql).execute(&pipeline.stack.pool).await.expect("archived");
    pipeline.forget_lane().await;
    let recovered = pipeline.recover(&wish(Despite::Everything)).await;
    assert!(matches!(recovered, Ok(None)), "{recovered:?}");
    assert!(pipeline.reports().await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn one_process_at_a_time_recovers_a_lane() {
    let pipeline = Pipeline::new("busy", 300).await;
    let lock = pipeline.stack.ledger.lock_for_recovery(&pipeline.lane).await.expect("an answer");
    let lock = lock.expect("nobody else has it");
    let recovered = pipeline.recovery().recover(&pipeline.lane, &wish(Despite::Nothing)).await;
    assert!(matches!(recovered, Err(RecoveryError::Busy)), "{recovered:?}");
    lock.release().await.expect("released");
    tokio::time::timeout(Duration::from_secs(20), async {
        let writer = pipeline.stack.writer();
        let report = pipeline.recovered(&wish(Despite::Nothing)).await;
        assert_eq!(report.outcome, Outcome::Rebuilt);
        writer.stop().await;
    })
    .await
    .expect("in time");
}
