//! What operators do about dead letters, against real Kafka and PostgreSQL.

use std::time::Duration;

use crate::support::{Lane, Stack, until};
use futures_util::future::join_all;
use holdfast::bus::record::{Record, encode, encode_seal};
use holdfast::domain::event::{Event, RebuildToken, Seal};
use holdfast::domain::order::Status;
use holdfast::domain::time::Timestamp;
use holdfast::ledger::{ApplyError, Batch, Deed, LaneMove, LetterStatus, StoredLetter};
use holdfast::writer::{Options, retry};

impl Stack {
    /// All dead letters, oldest first.
    async fn letters(&self) -> Vec<StoredLetter> {
        let mut letters = self.ledger.list_dead_letters(None, None, 200).await.unwrap().items;
        letters.reverse();
        letters
    }

    async fn until_letters(&self, count: usize) -> Vec<StoredLetter> {
        until("the dead letters are there", || async { self.letters().await.len() == count }).await;
        self.letters().await
    }

    async fn until_parked(&self, count: usize) {
        until("the followers are parked", || async {
            self.number("SELECT count(*) FROM parked").await == count as i64
        })
        .await;
    }

    async fn retry(&self, id: i64, actor: &str) -> StoredLetter {
        retry(&self.ledger, id, &deed(actor)).await.unwrap().expect("it is there")
    }

    async fn discard(&self, id: i64) -> LetterStatus {
        self.ledger.discard_dead_letter(id, &deed("ops")).await.unwrap().expect("there").status
    }

    async fn sql(&self, sql: &'static str) {
        sqlx::query(sql).execute(&self.pool).await.unwrap();
    }

    /// From now on the letter reads as this event, as after an upgrade that can read it.
    async fn upgrade(&self, letter: &StoredLetter, event: &Event) {
        let done = sqlx::query("UPDATE dead_letters SET payload = $2 WHERE id = $1")
            .bind(letter.id)
            .bind(encode(event).payload);
        done.execute(&self.pool).await.unwrap();
    }
}

fn deed(actor: &str) -> Deed {
    Deed { actor: actor.parse().unwrap(), note: Some(format!("{actor} says so")) }
}

fn damaged(event: &Event) -> Record {
    Record { payload: b"{\"order\":".to_vec(), ..encode(event) }
}

fn of_epoch(lane: &Lane, epoch: u32, seq: u64) -> Lane {
    let (id, secret) = (lane.id.clone(), lane.secret.clone());
    Lane { id, partition: lane.partition, epoch, seq, secret }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_poison_record_stops_its_lane_alone_until_its_retry_lets_all_follow_in_order() {
    let stack = Stack::new("retry").await;
    let (mut sick, mut well) = (stack.lane("sick", 0).await, stack.lane("well", 0).await);
    stack.sql("ALTER TABLE orders ADD CONSTRAINT no_poison CHECK (buyer_id <> 'poison')").await;
    let mut events = vec![sick.defined(50), sick.held("a"), sick.held("poison")];
    // Its own next step is behind it: only the right order makes it a confirmed order.
    events.push(sick.then(&events[2], Status::Confirmed));
    for number in 0..40 {
        events.push(sick.held(&format!("b{number}")));
    }
    let writer = stack.writer();
    stack.send(&sick, &events).await;
    let good = well.story(20);
    stack.send(&well, &good).await;
    stack.until_recorded(&well, well.seq).await;
    stack.until_parked(41).await;
    let letter = stack.until_letters(1).await.remove(0);
    assert_eq!((letter.reason.as_str(), letter.status), ("not-applicable", LetterStatus::Open));
    assert_eq!(letter.place.as_ref().map(|place| place.seq), Some(3));
    assert!(letter.blocks_lane);
    until("the gauges say so", || async {
        writer.metric("holdfast_writer_dead_letters_open") == 1.0
            && writer.metric("holdfast_writer_parked_records") == 41.0
    })
    .await;

    let kept = stack.retry(letter.id, "first").await;
    assert_eq!((kept.status, kept.retries), (LetterStatus::Open, 1));
    assert!(kept.detail.contains("no_poison"), "{}", kept.detail);
    assert!(kept.retried_at.is_some() && kept.resolved_at.is_none());
    assert_eq!(kept.note.as_deref(), Some("first says so"));
    assert_eq!(stack.discard(letter.id).await, LetterStatus::Open, "its lane waits for it");
    assert_eq!(stack.recorded(&sick.id).await, Some(2));

    stack.sql("ALTER TABLE orders DROP CONSTRAINT no_poison").await;
    let done = stack.retry(letter.id, "second").await;
    assert_eq!((done.status, done.retries), (LetterStatus::Retried, 2));
    assert!(done.resolved_at.is_some() && !done.blocks_lane);
    stack.until_recorded(&sick, sick.seq).await;
    stack.until_parked(0).await;
    assert_eq!(
        stack
            .number(
                "SELECT count(*) FROM orders WHERE status = 'confirmed' AND buyer_id = 'poison'"
            )
            .await,
        1
    );
    assert_eq!(stack.retry(letter.id, "third").await, done, "again changes nothing");
    assert_eq!(stack.discard(letter.id).await, LetterStatus::Retried);
    assert!(retry(&stack.ledger, letter.id + 1_000, &deed("ops")).await.unwrap().is_none());
    stack.check_books().await;
    until("nothing is unapplied", || async {
        writer.metric("holdfast_writer_dead_letters_open") == 0.0
            && writer.metric("holdfast_writer_parked_records") == 0.0
    })
    .await;
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retry_needs_no_writer_and_takes_more_than_a_batch_along() {
    let stack = Stack::new("alone").await;
    let mut lane = stack.lane("s", 0).await;
    let events = lane.story(900);
    let mut records: Vec<_> = events.iter().map(encode).collect();
    records[0] = damaged(&events[0]);
    let writer = stack.writer_with(Options { parked_max: 10_000, ..stack.options() });
    stack.send_records(0, &records).await;
    stack.until_parked(events.len() - 1).await;
    assert!(events.len() > 1_100, "more than one batch follows");
    writer.stop().await;
    let letter = stack.letters().await.remove(0);
    let kept = stack.retry(letter.id, "early").await;
    assert_eq!((kept.reason.as_str(), kept.status), ("undecodable", LetterStatus::Open));
    stack.upgrade(&letter, &events[0]).await;
    assert_eq!(stack.retry(letter.id, "ops").await.status, LetterStatus::Retried);
    assert_eq!(stack.recorded(&lane.id).await, Some(lane.seq));
    assert_eq!(stack.number("SELECT count(*) FROM parked").await, 0);
    stack.check_books().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_retries_at_once_beside_writers_and_a_copy_that_comes_again_record_it_once() {
    let stack = Stack::new("race").await;
    let mut lane = stack.lane("s", 0).await;
    let mut events = lane.story(300);
    let mut records: Vec<_> = events.iter().map(encode).collect();
    records[7] = damaged(&events[7]);
    let writer = stack.writer();
    let group = crate::support::unique("rival");
    let rival = stack.writer_with(Options { group, ..stack.options() });
    stack.send_records(0, &records).await;
    stack.until_parked(events.len() - 8).await;
    let letter = stack.until_letters(1).await.remove(0);
    stack.upgrade(&letter, &events[7]).await;
    let more: Vec<_> = (0..90).map(|number| lane.held(&format!("more-{number}"))).collect();
    let operators = ["a", "b", "c", "d", "e", "f", "g", "h"];
    let retries = join_all(operators.map(|actor| stack.retry(letter.id, actor)));
    let again = async {
        stack.send(&lane, &events[7..8]).await;
        stack.send(&lane, &more).await;
    };
    let (retried, ()) = tokio::join!(retries, again);
    for letter in &retried {
        assert_eq!((letter.status, letter.retries), (LetterStatus::Retried, 1));
        assert_eq!(letter.actor, retried[0].actor, "one of them did it");
    }
    stack.until_recorded(&lane, lane.seq).await;
    stack.until_parked(0).await;
    events.extend(more);
    let rows = stack.number("SELECT count(*) FROM ledger WHERE line = 0").await;
    assert_eq!(rows, events.len() as i64);
    assert_eq!(stack.letters().await.len(), 1);
    stack.check_books().await;
    writer.stop().await;
    rival.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_in_one_lane_the_later_one_waits_for_the_earlier() {
    let stack = Stack::new("turn").await;
    let mut lane = stack.lane("s", 0).await;
    let events = lane.story(5);
    let mut records: Vec<_> = events.iter().map(encode).collect();
    records[2] = damaged(&events[2]);
    records[4] = damaged(&events[4]);
    let writer = stack.writer();
    stack.send_records(0, &records).await;
    let letters = stack.until_letters(2).await;
    stack.until_parked(events.len() - 4).await;
    stack.upgrade(&letters[0], &events[2]).await;
    stack.upgrade(&letters[1], &events[4]).await;
    let later = stack.retry(letters[1].id, "ops").await;
    assert_eq!((later.reason.as_str(), later.status), ("waiting", LetterStatus::Open));
    assert!(later.detail.contains("seq 3"), "{}", later.detail);
    assert_eq!(stack.number("SELECT count(*) FROM parked").await, events.len() as i64 - 4);
    assert_eq!(stack.retry(letters[0].id, "ops").await.status, LetterStatus::Retried);
    assert_eq!(stack.recorded(&lane.id).await, Some(4));
    assert_eq!(stack.retry(letters[1].id, "ops").await.status, LetterStatus::Retried);
    stack.until_recorded(&lane, lane.seq).await;
    stack.check_books().await;
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_lane_waits_for_can_be_discarded_and_stays_so_when_it_is_read_again() {
    let stack = Stack::new("discard").await;
    let mut lane = stack.lane("s", 0).await;
    let events = [lane.defined(9), lane.held("a"), lane.held("b"), lane.held("c")];
    let writer = stack.writer();
    stack.send(&lane, &events[..3]).await;
    stack.until_recorded(&lane, 3).await;
    let fork = of_epoch(&lane, 1, 1).held("fork");
    let mut never_made = of_epoch(&lane, 1, 0);
    never_made.id.sale = "never-made".parse().unwrap();
    let alien = Record { key: "?".into(), headers: Vec::new(), payload: vec![0, 255] };
    let unheard = of_epoch(&lane, 7, 3).held("unheard");
    stack
        .send_records(
            0,
            &[
                encode(&fork),
                encode(&never_made.held("x")),
                alien,
                encode(&unheard),
                damaged(&events[3]),
            ],
        )
        .await;
    let letters = stack.until_letters(5).await;
    let open: Vec<_> =
        letters.iter().map(|letter| (letter.reason.as_str(), letter.blocks_lane)).collect();
    let [unknown_lane, undecodable] = ["unknown-lane", "undecodable"].map(|reason| (reason, false));
    for expected in
        [("fork", false), unknown_lane, undecodable, ("unknown-epoch", true), ("undecodable", true)]
    {
        assert!(open.contains(&expected), "{expected:?} in {open:?}");
    }
    for letter in &letters {
        let expected =
            if letter.blocks_lane { LetterStatus::Open } else { LetterStatus::Discarded };
        assert_eq!(stack.discard(letter.id).await, expected, "{}", letter.reason);
        assert_eq!(stack.discard(letter.id).await, expected, "again is the same");
    }
    let fork = letters.iter().find(|letter| letter.reason == "fork").unwrap();
    let discarded = stack.retry(fork.id, "somebody").await;
    assert_eq!((discarded.status, discarded.retries), (LetterStatus::Discarded, 0));
    assert_eq!(discarded.actor.as_deref(), Some("ops"));

    // The event comes again, whole: now nobody waits for what is damaged, or for an epoch that is
    // over by then.
    stack.send(&lane, &events[3..]).await;
    stack.until_recorded(&lane, 4).await;
    for letter in letters.iter().filter(|letter| letter.blocks_lane) {
        assert_eq!(stack.retry(letter.id, "ops").await.status, LetterStatus::Open);
        assert_eq!(stack.discard(letter.id).await, LetterStatus::Discarded);
    }
    writer.stop().await;
    let group = crate::support::unique("anew");
    let writer = stack.writer_with(Options { group, ..stack.options() });
    until("everything is seen again", || async {
        writer.metric("holdfast_writer_repeats_total") == 4.0
            && writer.metric("holdfast_writer_dead_letters_total") == 5.0
    })
    .await;
    let again = stack.letters().await;
    assert!(again.len() == 5 && again.iter().all(|l| l.status == LetterStatus::Discarded));
    stack.check_books().await;
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_epoch_that_has_ended_waits_for_nothing() {
    let stack = Stack::new("ended").await;
    let mut lane = stack.lane("s", 0).await;
    let events = [lane.defined(9), lane.held("a")];
    let writer = stack.writer();
    stack.send_records(0, &[encode(&events[0]), damaged(&events[1])]).await;
    let letter = stack.until_letters(1).await.remove(0);
    assert_eq!(stack.discard(letter.id).await, LetterStatus::Open);
    stack.sql("UPDATE lanes SET epoch = 2, sealed_epoch = 2").await;
    stack.upgrade(&letter, &events[1]).await;
    let kept = stack.retry(letter.id, "ops").await;
    assert_eq!((kept.reason.as_str(), kept.status), ("stale-epoch", LetterStatus::Open));
    assert_eq!(stack.recorded(&lane.id).await, Some(1));
    assert_eq!(stack.discard(letter.id).await, LetterStatus::Discarded);
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn resolved_letters_are_forgotten_in_time_and_open_ones_never() {
    let stack = Stack::new("forget").await;
    let lane = stack.lane("s", 0).await;
    let alien = |byte| Record { key: "?".into(), headers: Vec::new(), payload: vec![byte] };
    let writer = stack.writer();
    stack.send_records(lane.partition, &[alien(1), alien(2), alien(3)]).await;
    let letters = stack.until_letters(3).await;
    writer.stop().await;
    stack.discard(letters[0].id).await;
    stack.discard(letters[1].id).await;
    stack.sql("UPDATE dead_letters SET created_at = created_at - interval '400 days'").await;
    stack.sql("UPDATE dead_letters SET resolved_at = resolved_at - interval '25 hours' WHERE payload = '\\x01'").await;
    let writer = stack.writer();
    until("the old one is gone", || async { stack.letters().await.len() == 2 }).await;
    let left: Vec<_> = stack.letters().await.iter().map(|letter| letter.id).collect();
    assert_eq!(left, [letters[1].id, letters[2].id]);
    writer.stop().await;
}

/// What a lane waits for is kept all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_topic_full_of_what_belongs_to_no_lane_does_not_fill_the_database() {
    let stack = Stack::new("strays").await;
    let mut lane = stack.lane("s", 0).await;
    let events = [lane.defined(9), lane.held("a")];
    let mut never_made = of_epoch(&lane, 1, 0);
    never_made.id.sale = "never-made".parse().unwrap();
    let of_nobody = [never_made.held("x"), never_made.held("y")];
    let strays = |byte| {
        let alien = Record { key: "?".into(), headers: Vec::new(), payload: vec![byte] };
        [alien, encode(&of_nobody[0]), damaged(&of_nobody[1])]
    };
    let writer = stack.writer_with(Options { dead_letters_max: 3, ..stack.options() });
    stack.send_records(0, &strays(1)).await;
    until("they are counted", || async {
        writer.metric("holdfast_writer_dead_letters_open") == 3.0
    })
    .await;
    stack.send_records(0, &strays(2)).await;
    stack.send_records(0, &[encode(&events[0]), damaged(&events[1])]).await;
    stack.until_recorded(&lane, 1).await;
    let letters = stack.until_letters(4).await;
    assert!(letters[3].blocks_lane, "{:?}", letters[3]);
    assert_eq!(writer.metric("holdfast_writer_dead_letters_dropped_total"), 3.0);
    for letter in letters.iter().filter(|letter| !letter.blocks_lane) {
        assert_eq!(stack.discard(letter.id).await, LetterStatus::Discarded);
    }
    until("there is room", || async { writer.metric("holdfast_writer_dead_letters_open") == 1.0 })
        .await;
    stack.send_records(0, &strays(3)).await;
    stack.until_letters(7).await;
    writer.stop().await;
}

/// A retry that dies between its record and those behind it leaves these to the writer, however busy
/// that is with other lanes.
#[tokio::test(flavor = "multi_thread")]
async fn what_became_ready_is_found_by_a_busy_writer_too() {
    let stack = Stack::new("busy").await;
    let (mut lane, mut other) = (stack.lane("s", 0).await, stack.lane("other", 1).await);
    let other_id = other.id.clone();
    let events = lane.story(20);
    let writer = stack.writer();
    stack.send(&lane, &events[1..]).await;
    stack.until_parked(events.len() - 1).await;
    let defined = other.defined(1_000_000);
    stack.send(&other, &[defined]).await;
    let feed = async {
        for number in 0.. {
            let held = other.held(&format!("b{number}"));
            stack.send(&other, &[held]).await;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let cut_off = async {
        until("the writer is busy", || async {
            stack.recorded(&other_id).await.is_some_and(|recorded| recorded > 20)
        })
        .await;
        let moved =
            LaneMove { lane: lane.id.clone(), epoch: 1, expected: 0, recorded: 1, seal: None };
        let batch = Batch { moves: vec![moved], events: events[..1].to_vec(), ..Batch::default() };
        assert!(stack.ledger.apply(&batch).await.unwrap().ready);
        stack.until_recorded(&lane, lane.seq).await;
    };
    tokio::select! {
        () = feed => {}
        () = cut_off => {}
    }
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_time_to_drain_is_told_while_the_database_takes_nothing() {
    let stack = Stack::new("drain").await;
    let mut lane = stack.lane("s", 1).await;
    let events = lane.story(300);
    let (first, rest) = events.split_at(100);
    let writer = stack.writer();
    stack.send(&lane, first).await;
    stack.until_recorded(&lane, 100).await;
    let mut lock = stack.pool.begin().await.unwrap();
    sqlx::query("LOCK TABLE lanes IN ACCESS EXCLUSIVE MODE").execute(&mut *lock).await.unwrap();
    stack.send(&lane, rest).await;
    until("it is told", || async { writer.metric("holdfast_writer_drain_seconds") > 1.0 }).await;
    lock.rollback().await.unwrap();
    stack.until_recorded(&lane, lane.seq).await;
    until("nothing is left", || async { writer.metric("holdfast_writer_drain_seconds") == 0.0 })
        .await;
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_letter_blocks_its_lane_until_its_epoch_is_sealed() {
    let stack = Stack::new("blocks").await;
    let mut lane = stack.lane("s", 0).await;
    let events = lane.story(3);
    let mut records: Vec<_> = events.iter().map(encode).collect();
    records[1] = damaged(&events[1]);
    let writer = stack.writer();
    stack.send_records(lane.partition, &records).await;
    stack.until_letters(1).await;
    stack.until_recorded(&lane, 1).await;
    let lanes = [lane.id.clone()];
    let unblocked = async || stack.ledger.unblocked_marks(&lanes).await.unwrap();
    assert!(unblocked().await.is_empty());
    let (ledger, token) = (&stack.ledger, RebuildToken::new(7));
    assert_eq!(ledger.take_epoch(&lane.id, 1, token).await.unwrap(), Some(2));
    assert!(unblocked().await.is_empty(), "the next epoch is only given out");
    let at = Timestamp::from_millis(0);
    let seal =
        |gives_up| encode_seal(&Seal { lane: lane.id.clone(), epoch: 2, token, gives_up, at });
    stack.send_records(lane.partition, &[seal(false), seal(true)]).await;
    until("it is sealed", || async { unblocked().await == [(lane.id.clone(), 1)].into() }).await;
    writer.stop().await;
}

/// A letter that an operator may retry, and what follows it, is ended by nobody who did not say so.
#[tokio::test(flavor = "multi_thread")]
async fn a_seal_that_gives_nothing_up_ends_nothing_while_a_letter_blocks_its_lane() {
    for followers in [0, 7] {
        let stack = Stack::new("unforced").await;
        let (mut lane, mut other) = (stack.lane("s", 0).await, stack.lane("other", 0).await);
        let mut events = vec![lane.defined(9), lane.held("poison")];
        events.extend((0..followers).map(|number| lane.held(&format!("b{number}"))));
        let mut records: Vec<_> = events.iter().map(encode).collect();
        records[1] = damaged(&events[1]);
        let writer = stack.writer();
        stack.send_records(0, &records).await;
        let letter = stack.until_letters(1).await.remove(0);
        stack.until_parked(followers).await;
        let seal = async |epoch: u32| {
            let (token, at) = (RebuildToken::new(epoch.into()), Timestamp::from_millis(0));
            let taken = stack.ledger.take_epoch(&lane.id, epoch - 1, token).await.unwrap();
            assert_eq!(taken, Some(epoch));
            let (lane, gives_up) = (lane.id.clone(), false);
            encode_seal(&Seal { lane, epoch, token, gives_up, at })
        };
        stack.send_records(0, &[seal(2).await]).await;
        let behind = other.story(3);
        stack.send(&other, &behind).await;
        stack.until_recorded(&other, other.seq).await;
        let sealed = "SELECT sealed_epoch FROM lanes WHERE sale_id = 's'";
        assert_eq!(stack.number(sealed).await, 1);
        assert_eq!(stack.number("SELECT count(*) FROM parked").await, followers as i64);
        assert_eq!(stack.dead_letters().await, ["undecodable"]);

        stack.upgrade(&letter, &events[1]).await;
        assert_eq!(stack.retry(letter.id, "ops").await.status, LetterStatus::Retried);
        assert_eq!(stack.recorded(&lane.id).await, Some(lane.seq));
        stack.send_records(0, &[seal(3).await]).await;
        until("it is sealed", || async { stack.number(sealed).await == 3 }).await;
        assert_eq!(stack.dead_letters().await, ["undecodable"]);
        stack.check_books().await;
        writer.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seal_buries_nothing_whose_turn_has_come() {
    let stack = Stack::new("turn_come").await;
    let mut lane = stack.lane("s", 0).await;
    let events = lane.story(3);
    let writer = stack.writer();
    stack.send(&lane, &events[1..]).await;
    stack.until_parked(events.len() - 1).await;
    writer.stop().await;
    stack.ledger.take_epoch(&lane.id, 1, RebuildToken::new(7)).await.unwrap();
    let moved = |expected, recorded, seal| {
        vec![LaneMove { lane: lane.id.clone(), epoch: 1, expected, recorded, seal }]
    };
    let retried =
        Batch { moves: moved(0, 1, None), events: events[..1].to_vec(), ..Batch::default() };
    assert!(stack.ledger.apply(&retried).await.unwrap().ready);
    let seal = Batch { moves: moved(1, 1, Some(2)), ..Batch::default() };
    let sealed = stack.ledger.apply(&seal).await;
    assert!(matches!(sealed, Err(ApplyError::MarkMoved)), "{sealed:?}");
    let parked = stack.number("SELECT count(*) FROM parked").await;
    assert_eq!(parked, events.len() as i64 - 1);
    assert_eq!(stack.number("SELECT sealed_epoch FROM lanes").await, 1);
}

/// A retry closes the gap between the writer's look at what is parked and its seal.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_retry_makes_ready_under_a_seal_is_recorded_before_it() {
    let stack = Stack::new("under").await;
    let mut lane = stack.lane("s", 0).await;
    let events = lane.story(20);
    let writer = stack.writer();
    stack.send(&lane, &events[1..]).await;
    stack.until_parked(events.len() - 1).await;
    let token = RebuildToken::new(7);
    stack.ledger.take_epoch(&lane.id, 1, token).await.unwrap();
    let at = Timestamp::from_millis(0);
    let seal = Seal { lane: lane.id.clone(), epoch: 2, token, gives_up: true, at };

    // Both wait for the lane's row, the retry's transaction first.
    let mut lock = stack.pool.begin().await.unwrap();
    sqlx::query("SELECT FROM lanes FOR UPDATE").execute(&mut *lock).await.unwrap();
    let waiting = async || -> i64 {
        sqlx::query_scalar(
            "SELECT count(DISTINCT l.pid) FROM pg_locks l JOIN pg_class c ON c.oid = l.relation
             JOIN pg_namespace n ON n.oid = c.relnamespace
             WHERE n.nspname = $1 AND c.relname = 'lanes' AND l.mode = 'RowExclusiveLock'",
        )
        .bind(&stack.database.schema)
        .fetch_one(&stack.pool)
        .await
        .unwrap()
    };
    let moved = LaneMove { lane: lane.id.clone(), epoch: 1, expected: 0, recorded: 1, seal: None };
    let batch = Batch { moves: vec![moved], events: events[..1].to_vec(), ..Batch::default() };
    let retried = stack.ledger.apply(&batch);
    let sealed = async {
        until("the retry waits", || async { waiting().await == 1 }).await;
        stack.send_records(0, &[encode_seal(&seal)]).await;
        until("the seal waits behind it", || async { waiting().await == 2 }).await;
        lock.rollback().await.unwrap();
    };
    let (retried, ()) = tokio::join!(retried, sealed);
    assert!(retried.unwrap().ready);
    until("it is sealed", || async { stack.number("SELECT sealed_epoch FROM lanes").await == 2 })
        .await;
    assert_eq!(stack.recorded(&lane.id).await, Some(lane.seq));
    assert!(stack.dead_letters().await.is_empty());
    stack.check_books().await;
    writer.stop().await;
}
