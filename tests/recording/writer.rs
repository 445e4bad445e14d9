//! The writer against real Kafka and PostgreSQL: whatever comes, in whatever order, is recorded
//! once.

use std::time::Duration;

use crate::support::{Lane, PARTITIONS, Running, Stack, actor, metric, sku, until};
use holdfast::bus::consumer::{Consumer, ConsumerMetrics};
use holdfast::bus::record::{Record, encode, encode_seal};
use holdfast::bus::topic;
use holdfast::domain::event::{Event, RebuildToken, SaleStep, Seal};
use holdfast::domain::ids::AdjustmentId;
use holdfast::domain::order::Status;
use holdfast::domain::stock::Counters;
use holdfast::ledger::{OrderFilter, Place};
use holdfast::writer::Options;
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions};

/// A generator whose seed the test's output says.
fn seeded() -> StdRng {
    let seed = rand::random();
    println!("seed {seed}");
    StdRng::seed_from_u64(seed)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lane_is_recorded_whole() {
    let stack = Stack::new("whole").await;
    let mut lane = stack.lane("double-11", 1).await;
    let mut events = lane.story(30);
    let before = Counters { available: 10, held: 10, sold: 10, version: 0 };
    events.push(lane.adjusted("a1", before, 5, "found"));
    events.push(lane.sale_step(SaleStep::Paused { actor: actor() }));
    events.push(lane.sale_step(SaleStep::Resumed { actor: actor() }));
    events.push(lane.sale_step(SaleStep::Closed { actor: actor() }));
    let writer = stack.writer();
    stack.send(&lane, &events).await;
    stack.until_recorded(&lane, lane.seq).await;
    stack.check_books().await;

    let sale = stack.ledger.sale(&lane.id.sale).await.unwrap().unwrap();
    assert!(sale.phase.closed && !sale.phase.paused && !sale.phase.archived);
    assert_eq!((sale.version, sale.lanes[0].partition), (1, 1), "the event made it visible");
    let filter = OrderFilter { status: Some(Status::Confirmed), ..OrderFilter::default() };
    assert_eq!(stack.ledger.list_orders(&filter, None, 200).await.unwrap().items.len(), 10);
    let adjustments =
        stack.ledger.list_adjustments(&lane.id.sale, Some(&sku()), None, 9).await.unwrap();
    let adjustment = &adjustments.items[0];
    assert_eq!((&adjustment.set_total, &adjustment.undoes), (&None, &None));
    assert_eq!((adjustment.delta, adjustment.after().total), (5, 35));
    let id: AdjustmentId = adjustment.id.clone();
    assert_eq!(stack.ledger.adjustment(&id).await.unwrap().as_ref(), Some(adjustment));
    let counters: (i64, i64, i64, i64, i64) =
        sqlx::query_as("SELECT total, available, held, sold, version FROM counters")
            .fetch_one(&stack.pool)
            .await
            .unwrap();
    assert_eq!(counters, (35, 15, 10, 10, 1));
    let registry = writer.stop().await;
    assert_eq!(metric(&registry, "holdfast_writer_events_total"), lane.seq as f64);
}

#[tokio::test(flavor = "multi_thread")]
async fn events_out_of_order_wait_for_what_is_missing() {
    let stack = Stack::new("order").await;
    let mut lane = stack.lane("s", 0).await;
    let mut events = lane.story(200);
    let first = events.remove(0);
    events.shuffle(&mut seeded());
    let writer = stack.writer();
    stack.send(&lane, &events).await;
    until("all are parked", || async {
        stack.number("SELECT count(*) FROM parked").await == events.len() as i64
    })
    .await;
    assert_eq!(stack.recorded(&lane.id).await, Some(0));
    stack.send(&lane, &[first]).await;
    stack.until_recorded(&lane, lane.seq).await;
    stack.check_books().await;
    until("none is parked", || async { stack.number("SELECT count(*) FROM parked").await == 0 })
        .await;
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_parked_is_applied_in_batches_too() {
    let stack = Stack::new("batches").await;
    let mut lane = stack.lane("s", 0).await;
    let events = lane.story(60);
    let writer = stack.writer_with(holdfast::writer::Options { batch_max: 7, ..stack.options() });
    stack.send(&lane, &events[1..]).await;
    until("all are parked", || async {
        stack.number("SELECT count(*) FROM parked").await == events.len() as i64 - 1
    })
    .await;
    stack.send(&lane, &events[..1]).await;
    stack.until_recorded(&lane, lane.seq).await;
    stack.check_books().await;
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backlog_is_written_in_large_batches_and_never_beyond_their_bound() {
    let stack = Stack::new("backlog").await;
    let mut lane = stack.lane("s", 0).await;
    let events = lane.story(1_500);
    stack.send(&lane, &events).await;
    let writer = stack.writer_with(holdfast::writer::Options { batch_max: 500, ..stack.options() });
    stack.until_recorded(&lane, lane.seq).await;
    let batches = writer.stop().await;
    let batches = metric(&batches, "holdfast_writer_batches_total");
    println!("{batches} batches of {} events", events.len());
    assert!((events.len() as f64 / 500.0..50.0).contains(&batches));
}

#[tokio::test(flavor = "multi_thread")]
async fn repeats_change_nothing() {
    let stack = Stack::new("repeats").await;
    let mut lane = stack.lane("s", 0).await;
    let events = lane.story(50);
    let writer = stack.writer();
    stack.send(&lane, &events).await;
    stack.until_recorded(&lane, lane.seq).await;
    let mut again = events.clone();
    again.shuffle(&mut seeded());
    stack.send(&lane, &again).await;
    until("the repeats are seen", || async {
        writer.metric("holdfast_writer_repeats_total") == events.len() as f64
    })
    .await;
    assert!(stack.dead_letters().await.is_empty());
    stack.check_books().await;
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fork_is_a_dead_letter_and_what_was_recorded_stands() {
    let stack = Stack::new("fork").await;
    let mut lane = stack.lane("s", 0).await;
    let events = vec![lane.defined(5), lane.held("a")];
    let mut other = Lane { seq: 1, ..copy(&lane) };
    let fork = other.held("b");
    let writer = stack.writer();
    stack.send(&lane, &events).await;
    stack.until_recorded(&lane, 2).await;
    let next = lane.held("c");
    stack.send(&lane, &[fork, next]).await;
    stack.until_recorded(&lane, 3).await;
    assert_eq!(stack.dead_letters().await, ["fork"]);
    stack.check_books().await;
    writer.stop().await;
}

fn copy(lane: &Lane) -> Lane {
    let Lane { id, partition, epoch, seq, secret } = lane;
    let (id, secret) = (id.clone(), secret.clone());
    Lane { id, partition: *partition, epoch: *epoch, seq: *seq, secret }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stale_epoch_is_fenced_off() {
    let stack = Stack::new("stale").await;
    let mut lane = stack.lane("s", 0).await;
    let events = [lane.defined(5), lane.held("a")];
    let writer = stack.writer();
    stack.send(&lane, &events).await;
    stack.until_recorded(&lane, 2).await;
    let mut old = copy(&lane);
    sqlx::query("UPDATE lanes SET epoch = 2, sealed_epoch = 2").execute(&stack.pool).await.unwrap();
    lane.epoch = 2;
    let new = lane.held("new");
    stack.send(&lane, &[old.held("late"), new, events[1].clone()]).await;
    stack.until_recorded(&lane, 3).await;
    until("the repeat is seen", || async { writer.metric("holdfast_writer_repeats_total") == 1.0 })
        .await;
    assert_eq!(stack.dead_letters().await, ["stale-epoch"]);
    assert_eq!(stack.number("SELECT epoch FROM ledger WHERE seq = 3").await, 2);
    stack.check_books().await;
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_that_no_order_can_take_is_a_dead_letter_and_not_in_the_books() {
    let stack = Stack::new("impossible").await;
    let mut lane = stack.lane("s", 0).await;
    let held = [lane.defined(5), lane.held("a")];
    let cancelled = lane.then(&held[1], Status::Cancelled);
    // As if the lane had sold what it had given back.
    let sold = Lane { seq: 3, ..copy(&lane) }.then(&cancelled, Status::Confirmed);
    let writer = stack.writer();
    stack.send(&lane, &held).await;
    stack.send(&lane, &[cancelled.clone(), sold]).await;
    stack.until_recorded(&lane, 3).await;
    until("it is a dead letter", || async { !stack.dead_letters().await.is_empty() }).await;
    assert_eq!(stack.dead_letters().await, ["undecodable"]);
    let why = "holdfast.order.confirmed cannot lead from cancelled to confirmed";
    let detail: String =
        sqlx::query_scalar("SELECT detail FROM dead_letters").fetch_one(&stack.pool).await.unwrap();
    assert_eq!(detail, why);
    assert_eq!(stack.number("SELECT sold FROM counters").await, 0);
    assert_eq!(stack.number("SELECT count(*) FROM orders WHERE status = 'cancelled'").await, 1);
    stack.check_books().await;
    // The lane goes on with what may follow.
    let next = lane.held("b");
    stack.send(&lane, &[next]).await;
    stack.until_recorded(&lane, 4).await;
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_after_a_seal_of_the_epoch_before_is_not_applied() {
    let stack = Stack::new("sealed").await;
    let (mut lane, mut other) = (stack.lane("s", 0).await, stack.lane("other", 0).await);
    let token = RebuildToken::new(0x1234);
    let taken = stack.ledger.take_epoch(&lane.id, 1, token).await.unwrap();
    assert_eq!(taken, Some(2));
    assert_eq!(stack.ledger.take_epoch(&lane.id, 1, token).await.unwrap(), None, "it is taken");

    // Its own epoch ends at the seal, not when the next one is given out.
    let first = [lane.defined(9), lane.held("a")];
    let (mut zombie, gap) = (copy(&lane), lane.held("never-sent"));
    let parked = lane.held("parked");
    let at = first[1].at;
    let seal = |epoch, token| {
        encode_seal(&Seal { lane: gap.lane.clone(), epoch, token, gives_up: true, at })
    };
    stack.send(&lane, &first).await;
    stack.send(&lane, std::slice::from_ref(&parked)).await;
    stack.send_records(0, &[seal(2, token)]).await;
    let echo = zombie.held("zombie");
    stack.send(&zombie, &[echo]).await;
    (lane.epoch, lane.seq) = (2, 2);
    let next = [lane.held("b"), lane.held("c")];
    stack.send(&lane, &next).await;
    // Again, as after a rewind; of an epoch that was never given out; with another token.
    stack.send_records(0, &[seal(2, token), seal(3, token)]).await;
    stack.send_records(0, &[seal(2, RebuildToken::new(0x5678))]).await;
    let story = other.story(5);
    stack.send(&other, &story).await;
    let writer = stack.writer();
    stack.until_recorded(&other, other.seq).await;
    assert_eq!(stack.recorded(&lane.id).await, Some(4));
    let letters = ["stale-epoch", "stale-epoch", "unknown-epoch", "unknown-epoch"];
    assert_eq!(stack.dead_letters().await, letters);
    assert_eq!(stack.number("SELECT count(*) FROM parked").await, 0);
    let of_parked = "SELECT epoch FROM dead_letters WHERE seq = 4";
    assert_eq!(stack.number(of_parked).await, 1);
    let sealed = "SELECT sealed_seq FROM lanes WHERE sale_id = 's' AND sealed_epoch = 2";
    assert_eq!(stack.number(sealed).await, 2);
    stack.check_books().await;
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_cannot_be_read_stops_its_own_lane_only() {
    let stack = Stack::new("undecodable").await;
    let (mut sick, mut well) = (stack.lane("sick", 0).await, stack.lane("well", 0).await);
    let mut bad = vec![sick.defined(5), sick.held("a"), sick.held("b")];
    let good = well.story(20);
    let mut records: Vec<_> = bad.iter().map(encode).collect();
    records[1].payload = b"{\"order\":".to_vec();
    records.push(holdfast::bus::record::Record {
        key: "?".into(),
        headers: vec![("content-type", "\0".into())],
        payload: vec![0, 255],
    });
    let mut unknown = Lane { id: sick.id.clone(), ..copy(&sick) };
    unknown.id.sale = "never-made".parse().unwrap();
    unknown.seq = 0;
    let writer = stack.writer();
    stack.send_records(0, &records).await;
    stack.send(&unknown, &[unknown_event(&unknown)]).await;
    stack.send(&well, &good).await;
    stack.until_recorded(&well, well.seq).await;
    assert_eq!(stack.dead_letters().await, ["undecodable", "undecodable", "unknown-lane"]);
    assert_eq!(stack.recorded(&sick.id).await, Some(1));
    assert_eq!(stack.number("SELECT seq FROM dead_letters WHERE sale_id = 'sick'").await, 2);
    // Sent again whole, the lane goes on, and what was parked with it.
    stack.send(&sick, &[bad.remove(1)]).await;
    stack.until_recorded(&sick, 3).await;
    writer.stop().await;
    // Read all over again, by a group that knows of nothing.
    let anew =
        holdfast::writer::Options { group: crate::support::unique("anew"), ..stack.options() };
    let writer = stack.writer_with(anew);
    until("everything is seen again", || async {
        writer.metric("holdfast_writer_repeats_total") == (good.len() + 3) as f64
    })
    .await;
    assert_eq!(stack.dead_letters().await, ["undecodable", "undecodable", "unknown-lane"]);
    stack.check_books().await;
    writer.stop().await;
}

fn unknown_event(lane: &Lane) -> Event {
    copy(lane).held("a")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_one_event_that_the_database_refuses_is_found_and_the_rest_is_written() {
    let stack = Stack::new("poison").await;
    let (mut sick, mut well) = (stack.lane("sick", 0).await, stack.lane("well", 1).await);
    let mut events = sick.story(40);
    // More than there is: the check on the counters refuses it.
    let poison = sick.adjusted("p", Counters::default(), -1_000, "too much");
    events.push(poison.clone());
    // NUL is no text for PostgreSQL; it is behind the poison, so it waits and is judged later.
    events.push(sick.adjusted("n", Counters::default(), 1, "a\0b"));
    events.push(sick.held("after"));
    let good = well.story(40);
    stack.send(&sick, &events).await;
    stack.send(&well, &good).await;
    let writer = stack.writer();
    stack.until_recorded(&well, well.seq).await;
    stack.until_recorded(&sick, poison.seq - 1).await;
    until("the poison is found", || async { stack.dead_letters().await == ["not-applicable"] })
        .await;
    let dead: (String, i64) = sqlx::query_as("SELECT detail, seq FROM dead_letters")
        .fetch_one(&stack.pool)
        .await
        .unwrap();
    let place = Place { lane: sick.id.clone(), epoch: 1, seq: poison.seq };
    assert!(dead.0.contains("counters") && dead.1 as u64 == place.seq, "{dead:?}");
    until("its followers are parked", || async {
        stack.number("SELECT count(*) FROM parked").await == 2
    })
    .await;
    assert_eq!(stack.recorded(&sick.id).await, Some(poison.seq - 1));
    // Somebody sends what should have been there: what was parked is judged in its turn.
    let mut cure = copy(&sick);
    cure.seq = poison.seq - 1;
    stack.send(&sick, &[cure.held("cure")]).await;
    until("the text with a NUL is found too", || async { stack.dead_letters().await.len() == 2 })
        .await;
    assert_eq!(stack.recorded(&sick.id).await, Some(poison.seq));
    assert_eq!(stack.number("SELECT count(*) FROM parked").await, 1);
    stack.check_books().await;
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_too_slow_for_a_whole_batch_gets_it_in_parts() {
    let mut stack = Stack::new("slow").await;
    let slow = holdfast::config::Database { statement_timeout_ms: 1_000, ..stack.database.clone() };
    stack.ledger = holdfast::ledger::Ledger::new(&slow).unwrap();
    for sql in [
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
         'BEGIN IF (SELECT count(*) FROM added) > 500 THEN PERFORM pg_sleep(60); END IF; RETURN NULL; END'",
        "CREATE TRIGGER slow AFTER INSERT ON orders REFERENCING NEW TABLE AS added
         FOR EACH STATEMENT EXECUTE FUNCTION slow()",
    ] {
        sqlx::query(sql).execute(&stack.pool).await.unwrap();
    }
    let mut lane = stack.lane("s", 1).await;
    let mut events = vec![lane.defined(1_200)];
    events.extend((0..1_200).map(|number| lane.held(&format!("buyer-{number}"))));
    stack.send(&lane, &events).await;
    // Long enough for all of it to come as one.
    let batch_age = Duration::from_secs(2);
    let writer = stack.writer_with(Options { batch_max: 4_000, batch_age, ..stack.options() });
    stack.until_recorded(&lane, lane.seq).await;
    assert!(
        writer.metric("holdfast_writer_retries_total") >= 1.0,
        "all of it was too much at once"
    );
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_stands_still_for_longer_than_kafka_waits_costs_nothing() {
    let mut stack = Stack::new("still").await;
    stack.kafka.properties.insert("session.timeout.ms".into(), "6000".into());
    stack.kafka.properties.insert("max.poll.interval.ms".into(), "6000".into());
    let slow = holdfast::config::Database { statement_timeout_ms: 500, ..stack.database.clone() };
    stack.ledger = holdfast::ledger::Ledger::new(&slow).unwrap();
    let mut lane = stack.lane("s", 1).await;
    let events = lane.story(300);
    let (first, rest) = events.split_at(100);
    let writer = stack.writer();
    stack.send(&lane, first).await;
    stack.until_recorded(&lane, 100).await;
    let mut lock = stack.pool.begin().await.unwrap();
    sqlx::query("LOCK TABLE lanes IN ACCESS EXCLUSIVE MODE").execute(&mut *lock).await.unwrap();
    stack.send(&lane, rest).await;
    until("Kafka gave the partitions away", || async {
        writer.metric("holdfast_writer_paused") == 1.0
            && writer.metric("holdfast_writer_retries_total") > 9.0
    })
    .await;
    lock.rollback().await.unwrap();
    stack.until_recorded(&lane, lane.seq).await;
    let more = lane.held("afterwards");
    stack.send(&lane, &[more]).await;
    stack.until_recorded(&lane, lane.seq).await;
    assert_eq!(writer.metric("holdfast_writer_paused"), 0.0);
    assert!(stack.dead_letters().await.is_empty());
    stack.check_books().await;
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn writers_that_race_and_come_and_go_record_everything_once() {
    let stack = Stack::new("rebalance").await;
    let mut lanes = Vec::new();
    for number in 0..8 {
        lanes.push(stack.lane(&format!("s{number}"), number % crate::support::PARTITIONS).await);
    }
    let steady = stack.writer();
    // Of another group, it reads what the others read, at the same time: as one that was taken
    // for dead and is not. Only the marks keep them apart.
    let group = crate::support::unique("rival");
    let rival = stack.writer_with(holdfast::writer::Options { group, ..stack.options() });
    let mut passing = stack.writer();
    for round in 0..4 {
        for lane in &mut lanes {
            let mut events = if round == 0 { lane.story(40) } else { Vec::new() };
            for number in 0..60 * usize::from(round > 0) {
                events.push(lane.adjusted(
                    &format!("{round}-{number}"),
                    Counters::default(),
                    1,
                    "n",
                ));
            }
            stack.send(lane, &events).await;
        }
        if round % 2 == 0 {
            passing.abort().await;
        } else {
            passing.stop().await;
        }
        passing = stack.writer();
    }
    for lane in &lanes {
        stack.until_recorded(lane, lane.seq).await;
    }
    assert!(stack.dead_letters().await.is_empty());
    stack.check_books().await;
    for writer in [passing, steady, rival] {
        let registry = writer.stop().await;
        println!("marks moved: {}", metric(&registry, "holdfast_writer_marks_moved_total"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writer_that_dies_in_mid_stream_is_taken_up_where_it_was() {
    let stack = Stack::new("restart").await;
    let mut lane = stack.lane("s", 2).await;
    let events = lane.story(1_500);
    stack.send(&lane, &events).await;
    let options = holdfast::writer::Options { batch_max: 50, ..stack.options() };
    for part in 1..=4 {
        let writer = stack.writer_with(options.clone());
        stack.until_recorded(&lane, part * 400).await;
        writer.abort().await;
    }
    let writer = stack.writer();
    stack.until_recorded(&lane, lane.seq).await;
    assert!(stack.dead_letters().await.is_empty());
    stack.check_books().await;
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writer_that_is_stopped_commits_what_it_wrote_and_not_what_it_has_read_ahead() {
    let stack = Stack::new("stopped").await;
    let mut lane = stack.lane("s", 2).await;
    let events = lane.story(1_500);
    stack.send(&lane, &events).await;
    let options = holdfast::writer::Options { batch_max: 20, ..stack.options() };
    let writer = stack.writer_with(options);
    stack.until_recorded(&lane, 200).await;
    writer.stop().await;
    let recorded = stack.recorded(&lane.id).await.unwrap();
    assert!(recorded < lane.seq, "there was something to read ahead");
    let extents = topic::extents(&stack.kafka, &stack.group, [2].into()).await.unwrap();
    // The lane has its partition to itself, so its first event is the record at offset 0.
    assert_eq!(extents[&2].read, Some(recorded as i64));
    let writer = stack.writer();
    stack.until_recorded(&lane, lane.seq).await;
    assert_eq!(writer.metric("holdfast_writer_repeats_total"), 0.0);
    stack.check_books().await;
    writer.stop().await;
}

/// A disk that is full is not the fault of what was to be written.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_whose_disk_is_full_is_a_pause_and_no_dead_letter() {
    let stack = Stack::new("full").await;
    let mut lane = stack.lane("s", 1).await;
    let events = lane.story(100);
    for statement in [
        "CREATE FUNCTION fill() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
           RAISE EXCEPTION 'could not extend file: No space left on device'
             USING ERRCODE = 'disk_full';
         END $$",
        "CREATE TRIGGER fill BEFORE INSERT ON ledger FOR EACH ROW EXECUTE FUNCTION fill()",
    ] {
        sqlx::query(statement).execute(&stack.pool).await.unwrap();
    }
    let writer = stack.writer();
    stack.send(&lane, &events).await;
    until("the writer has tried more than once", || async {
        writer.metric("holdfast_writer_retries_total") > 2.0
    })
    .await;
    assert_eq!(writer.metric("holdfast_writer_paused"), 1.0);
    assert_eq!(stack.recorded(&lane.id).await, Some(0));
    sqlx::query("DROP TRIGGER fill ON ledger").execute(&stack.pool).await.unwrap();
    stack.until_recorded(&lane, lane.seq).await;
    until("it goes on", || async { writer.metric("holdfast_writer_paused") == 0.0 }).await;
    assert!(stack.dead_letters().await.is_empty());
    stack.check_books().await;
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cut_connections_lose_nothing_and_repeat_nothing() {
    let stack = Stack::new("cut").await;
    let mut lane = stack.lane("s", 3).await;
    let events = lane.story(3_000);
    let options = holdfast::writer::Options { batch_max: 100, ..stack.options() };
    let writer = stack.writer_with(options);
    let sending = stack.send(&lane, &events);
    let cutting = async {
        let schema = stack.database.schema.clone();
        // On a busy machine every batch may be cut: then it must get through in the end.
        let (mut cut, cut_max) = (0, 40);
        while cut < cut_max && stack.recorded(&lane.id).await != Some(events.len() as u64) {
            // Of this schema only: the tables' locks say whose backend it is, or that it is an
            // autovacuum, which nobody may end.
            let ended: i64 = sqlx::query_scalar(
                "SELECT count(pg_terminate_backend(pid)) FROM (
                   SELECT DISTINCT l.pid FROM pg_locks l JOIN pg_class c ON c.oid = l.relation
                   JOIN pg_namespace n ON n.oid = c.relnamespace
                   JOIN pg_stat_activity a ON a.pid = l.pid AND a.backend_type = 'client backend'
                   WHERE n.nspname = $1 AND l.pid <> pg_backend_pid()
                     AND l.mode = 'RowExclusiveLock'
                 ) busy",
            )
            .bind(&schema)
            .fetch_one(&stack.pool)
            .await
            .unwrap();
            cut += ended;
            tokio::time::sleep(Duration::from_millis(if ended > 0 { 150 } else { 1 })).await;
        }
        cut
    };
    let ((), cut) = tokio::join!(sending, cutting);
    println!("{cut} connections cut");
    assert!(cut > 0);
    stack.until_recorded(&lane, lane.seq).await;
    assert!(writer.metric("holdfast_writer_retries_total") > 0.0);
    stack.check_books().await;
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_lane_with_too_much_parked_lacks_is_found_behind_it() {
    let stack = Stack::new("full").await;
    let (mut sick, mut well) = (stack.lane("sick", 0).await, stack.lane("well", 0).await);
    let (events, good) = (sick.story(60), well.story(20));
    let options = holdfast::writer::Options { parked_max: 10, batch_max: 8, ..stack.options() };
    let writer = stack.writer_with(options);
    stack.send(&sick, &events[1..]).await;
    stack.send(&well, &good).await;
    stack.until_recorded(&well, well.seq).await;
    assert_eq!(writer.metric("holdfast_writer_full_lanes"), 1.0);
    assert_eq!(stack.number("SELECT count(*) FROM parked").await, 10);
    // Some of it, in the wrong order: all that is parked still waits.
    let first = events[..1].iter().chain(&events[1..6]);
    let again: Vec<Event> = first.rev().cloned().collect();
    stack.send(&sick, &again).await;
    stack.until_recorded(&sick, sick.seq).await;
    stack.check_books().await;
    let metric = || writer.metric("holdfast_writer_full_lanes");
    until("there is room again", || async { metric() == 0.0 }).await;
    assert!(stack.dead_letters().await.is_empty());
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writer_that_follows_one_with_a_full_lane_reads_what_that_left() {
    let stack = Stack::new("left").await;
    let mut lane = stack.lane("s", 0).await;
    let events = lane.story(60);
    let options = holdfast::writer::Options { parked_max: 10, batch_max: 8, ..stack.options() };
    let writer = stack.writer_with(options.clone());
    stack.send(&lane, &events[1..]).await;
    until_read(&stack, events.len() - 1).await;
    writer.stop().await;
    let writer = stack.writer_with(options);
    stack.send(&lane, &events[..1]).await;
    stack.until_recorded(&lane, lane.seq).await;
    stack.check_books().await;
    writer.stop().await;
}

/// Of partition 0.
async fn until_read(stack: &Stack, records: usize) {
    until("all was read", || async {
        let extents = topic::extents(&stack.kafka, &stack.group, [0].into()).await.unwrap();
        extents[&0].read == Some(records as i64)
    })
    .await;
}

/// A lane of a writer that may park 10 of it and has read all of this but its first event; and the
/// seal of its next epoch.
async fn full_lane(stack: &Stack, gives_up: bool) -> (Lane, Vec<Event>, Running, Record) {
    let mut lane = stack.lane("s", 0).await;
    let events = lane.story(60);
    let options = holdfast::writer::Options { parked_max: 10, batch_max: 8, ..stack.options() };
    let writer = stack.writer_with(options);
    stack.send(&lane, &events[1..]).await;
    until_read(stack, events.len() - 1).await;
    let (token, at) = (RebuildToken::new(7), events[0].at);
    assert_eq!(stack.ledger.take_epoch(&lane.id, 1, token).await.unwrap(), Some(2));
    let seal = encode_seal(&Seal { lane: lane.id.clone(), epoch: 2, token, gives_up, at });
    (lane, events, writer, seal)
}

async fn until_sealed(stack: &Stack) {
    let sealed = "SELECT sealed_epoch FROM lanes";
    until("it is sealed", || async { stack.number(sealed).await == 2 }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seal_counts_behind_all_that_was_left_before_it_and_can_be_recorded() {
    for gives_up in [false, true] {
        let stack = Stack::new("joined").await;
        let (lane, events, writer, seal) = full_lane(&stack, gives_up).await;
        stack.send_records(0, &[encode(&events[0]), seal]).await;
        until_sealed(&stack).await;
        assert_eq!(stack.number("SELECT sealed_seq FROM lanes").await, lane.seq as i64);
        assert!(stack.dead_letters().await.is_empty());
        stack.check_books().await;
        until("nothing is left", || async { writer.metric("holdfast_writer_full_lanes") == 0.0 })
            .await;
        writer.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gap_that_nobody_fills_holds_up_no_seal_that_gives_up_what_is_behind_it() {
    let stack = Stack::new("given_up").await;
    let (mut lane, events, writer, seal) = full_lane(&stack, true).await;
    stack.send_records(0, &[seal]).await;
    until_sealed(&stack).await;
    assert_eq!(stack.recorded(&lane.id).await, Some(0));
    until("all is kept as dead letters", || async {
        stack.dead_letters().await == vec!["stale-epoch"; events.len() - 1]
    })
    .await;
    assert_eq!(stack.number("SELECT count(*) FROM parked").await, 0);
    (lane.epoch, lane.seq) = (2, 0);
    let story = lane.story(5);
    stack.send(&lane, &story).await;
    stack.until_recorded(&lane, lane.seq).await;
    stack.check_books().await;
    writer.stop().await;
}

/// A broker that comes back may answer for a moment as if it had no topics: a group that agrees then
/// on nothing to read has to find out soon.
#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_was_not_known_for_a_moment_is_read_again() {
    let stack = Stack::new("unknown").await;
    let consumer = Consumer::new(&stack.kafka, &stack.group, ConsumerMetrics::default()).unwrap();
    let assigned = async |partitions: i32| {
        consumer.batch(10, Duration::ZERO).await.ok();
        consumer.assigned().unwrap().len() == partitions as usize
    };
    until("it is read", || assigned(PARTITIONS)).await;
    let mut client = ClientConfig::new();
    client.set("bootstrap.servers", &stack.kafka.brokers);
    let admin: AdminClient<_> = client.create().unwrap();
    let deleted = admin.delete_topics(&[&stack.kafka.topic], &AdminOptions::new()).await;
    assert!(deleted.unwrap()[0].is_ok());
    until("nothing is left to read", || assigned(0)).await;
    until("the topic is made", || async { topic::prepare(&stack.kafka).await.is_ok() }).await;
    until("it is read again", || assigned(PARTITIONS)).await;
}
