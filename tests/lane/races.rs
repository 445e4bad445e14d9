//! Everything at once on one order, at its very deadline, from several processes: I1, I2, I6 and I7
//! hold of whatever comes of it.
//!
//! `LANE_SEED` repeats what is asked, though not how it interleaves.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use chrono::Utc;
use futures_util::future::join_all;
use holdfast::domain::event::{Body, Cause, OrderStep, Step};
use holdfast::domain::ids::OrderId;
use holdfast::domain::names::PaymentId;
use holdfast::domain::order::{Order, Status};
use holdfast::domain::time::Timestamp;
use holdfast::lanes::command::{BeginPayment, Command, Confirm, FailPayment, Reserve};
use holdfast::lanes::reply::{
    Adjusted, Begun, Cancelled, ChangeRefusal, Confirmed, Failed, Refusal, Reserved,
};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};

use crate::sale::{Outcome, Sale, definition, lines, wait_past};

const ORDERS: usize = 1_000;
/// One begins after the other, so that each has Redis to itself for a moment at its deadline.
const APART: Duration = Duration::from_micros(2_500);
const UNITS: u32 = 2;
const SKUS: [&str; 3] = ["phone", "case", "cable"];
/// Most orders hold for a second, which a payment makes longer; some for as long as any may, which
/// none makes shorter.
const HOLD_SECONDS: [u32; 4] = [1, 1, 1, 2];
const HOLD_LONGEST_SECONDS: u32 = 2;
const PAYMENTS: [&str; 3] = ["pay-0", "pay-1", "pay-2"];
/// Deadlines of one order that are raced for.
const VOLLEYS_MAX: usize = 4;
/// Commands of a volley set out at some moment from before the deadline to after it.
const AIM_MS: RangeInclusive<i64> = -9..=4;
/// A tenth sets out so early that it comes in time on a machine that is slow too.
const EARLY_MS: RangeInclusive<i64> = -200..=-50;

/// A command that was answered.
struct Said {
    command: Command,
    now: Timestamp,
    outcome: Outcome,
}

/// The order that an answer shows.
fn shown(outcome: &Outcome) -> Option<&Order> {
    match outcome {
        Outcome::Reserved(Reserved::Held(order) | Reserved::Replayed(order))
        | Outcome::Begun(Begun::Begun(order) | Begun::Same(order) | Begun::Over(order))
        | Outcome::Begun(Begun::Refund(_, order))
        | Outcome::Failed(Failed::Failed(order) | Failed::Ignored(order))
        | Outcome::Confirmed(Confirmed::Confirmed(order) | Confirmed::Same(order))
        | Outcome::Confirmed(Confirmed::Refund(_, order))
        | Outcome::Cancelled(
            Cancelled::Cancelled(order) | Cancelled::Same(order) | Cancelled::Sold(order),
        )
        | Outcome::Got(Some(order)) => Some(order),
        _ => None,
    }
}

/// The step that an answer claims to have made, if it claims one.
fn claimed(outcome: &Outcome) -> Option<(u64, &'static str)> {
    let step = match outcome {
        Outcome::Reserved(Reserved::Held(_)) => "holdfast.order.held",
        Outcome::Begun(Begun::Begun(_)) => "holdfast.order.payment_begun",
        Outcome::Failed(Failed::Failed(_)) => "holdfast.order.payment_failed",
        Outcome::Confirmed(Confirmed::Confirmed(_)) => "holdfast.order.confirmed",
        Outcome::Cancelled(Cancelled::Cancelled(_)) => "holdfast.order.cancelled",
        _ => return None,
    };
    Some((shown(outcome)?.seq, step))
}

/// One order, and whoever wants something of it.
struct Race {
    processes: [Sale; 3],
    number: usize,
    rng: StdRng,
    said: Vec<Said>,
}

impl Race {
    fn sku(&self) -> &'static str {
        SKUS[self.number % SKUS.len()]
    }

    fn payment(&mut self) -> PaymentId {
        PAYMENTS.choose(&mut self.rng).expect("there are some").parse().unwrap()
    }

    fn command(&mut self, id: &OrderId, volley: usize) -> Command {
        let payment = self.payment();
        let choice = self.rng.random_range(0..12);
        let sale = &self.processes[0];
        let confirm = |cause, bought: &[(&str, u32)]| {
            let (id, payment) = (id.clone(), payment.clone());
            Command::Confirm(Confirm { id, payment, lines: lines(bought), cause, trace: None })
        };
        match choice {
            0 => confirm(Cause::Caller, &[]),
            1 => confirm(Cause::Caller, &[(self.sku(), 1)]),
            2 => confirm(Cause::Webhook, &[]),
            3 => Command::Cancel(sale.cancelling(id)),
            4..=7 => Command::BeginPayment(BeginPayment { id: id.clone(), payment, trace: None }),
            8 | 9 => {
                let (id, cause) = (id.clone(), Cause::Webhook);
                Command::FailPayment(FailPayment { id, payment, cause, trace: None })
            }
            // Somebody waits for what is released.
            10 => {
                let (buyer, key) = (format!("other-{}", self.number), format!("{volley}"));
                Command::Reserve(sale.reserving(&buyer, &key, &[(self.sku(), 1)]))
            }
            _ => Command::Get { id: id.clone() },
        }
    }

    /// Asks all these, each at its time, each of some process.
    async fn ask(&mut self, asked: Vec<(i64, Command)>) {
        let answers = asked.into_iter().map(|(at, command)| {
            let process = self.processes.choose(&mut self.rng).expect("there are some").clone();
            async move {
                let wait = at - Utc::now().timestamp_millis();
                tokio::time::sleep(Duration::from_millis(wait.max(0) as u64)).await;
                let answer = process.ask(command.clone()).await.expect("an answer");
                Said { command, now: answer.now.expect("a time"), outcome: answer.outcome }
            }
        });
        let answers = join_all(answers).await;
        self.said.extend(answers);
    }

    async fn run(mut self) -> Vec<Said> {
        tokio::time::sleep(APART * self.number as u32).await;
        let buyer = format!("buyer-{}", self.number);
        let reserve = self.processes[0].reserving(&buyer, "k", &[(self.sku(), UNITS)]);
        let id = reserve.id.clone();
        let hold_seconds = HOLD_SECONDS.choose(&mut self.rng).copied();
        self.ask(vec![(0, Command::Reserve(Reserve { hold_seconds, ..reserve }))]).await;
        // On a busy machine others may have taken its units by now.
        if !matches!(self.said[0].outcome, Outcome::Reserved(Reserved::Held(_))) {
            return self.said;
        }
        if self.rng.random_bool(0.5) {
            let at = Utc::now().timestamp_millis() + self.rng.random_range(0..1_000);
            let payment = self.payment();
            let begin = BeginPayment { id: id.clone(), payment, trace: None };
            self.ask(vec![(at, Command::BeginPayment(begin))]).await;
        }
        for volley in 0..VOLLEYS_MAX {
            let of_it = self.said.iter().filter_map(|said| Some((said.now, shown(&said.outcome)?)));
            let of_it = of_it.filter(|(_, order)| order.id == id);
            let Some((now, order)) = of_it.max_by_key(|(_, order)| order.seq) else { break };
            if !matches!(order.status_at(now), Status::Held | Status::Paying) {
                break;
            }
            let deadline = order.expires_at.millis();
            let count = self.rng.random_range(2..=6);
            let asked = (0..count).map(|_| {
                let aim = if self.rng.random_bool(0.1) { EARLY_MS } else { AIM_MS };
                let at = deadline + self.rng.random_range(aim);
                (at, self.command(&id, volley))
            });
            let asked = asked.collect();
            self.ask(asked).await;
        }
        self.said
    }
}

/// Ends what is due, again and again.
async fn sweep(sale: Sale, stop: &AtomicBool) {
    let mut pause = tokio::time::interval(Duration::from_millis(1));
    while !stop.load(Ordering::Relaxed) {
        pause.tick().await;
        sale.expire().await;
    }
}

/// Changes totals up and down, as far as there is anything to take.
async fn adjust(sale: Sale, mut rng: StdRng, stop: &AtomicBool) {
    let mut pause = tokio::time::interval(Duration::from_millis(3));
    for number in 0.. {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        pause.tick().await;
        let (sku, delta) = (SKUS[number % SKUS.len()], rng.random_range(-2..=2));
        match sale.adjust(&format!("a{number}"), sku, delta).await {
            Adjusted::Adjusted(_) | Adjusted::Refused(ChangeRefusal::StockInUse(_)) => {}
            other => panic!("{other:?}"),
        }
    }
}

/// What the history says of one order so far.
#[derive(Default)]
struct Life {
    order: Option<Order>,
    /// What must be given back, how often it was said, and why.
    refunds: BTreeMap<PaymentId, Vec<String>>,
}

/// How many orders came to which end.
#[derive(Debug, Default)]
struct Ends {
    in_time: usize,
    late: usize,
    cancelled: usize,
    expired: usize,
    refunds: usize,
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_at_once_at_the_deadline_has_one_outcome() {
    let seed: u64 = std::env::var("LANE_SEED")
        .map_or_else(|_| rand::random::<u32>().into(), |seed| seed.parse().expect("a number"));
    println!("LANE_SEED={seed}");
    let stock = (ORDERS.div_ceil(SKUS.len()) * UNITS as usize) as i64;
    let mut definition = definition(&SKUS.map(|sku| (sku, stock)));
    definition.hold_seconds = HOLD_LONGEST_SECONDS;
    definition.payment_grace_seconds = 1;
    definition.max_hold_seconds = Some(HOLD_LONGEST_SECONDS);
    let sale = Sale::defined(definition).await;
    let processes = [sale.clone(), sale.elsewhere(), sale.elsewhere()];
    let stop = AtomicBool::new(false);
    let races = join_all((0..ORDERS).map(|number| {
        let rng = StdRng::seed_from_u64(seed ^ ((number as u64) << 32));
        tokio::spawn(Race { processes: processes.clone(), number, rng, said: Vec::new() }.run())
    }));
    let raced = async {
        let said: Vec<_> = races.await.into_iter().flat_map(Result::unwrap).collect();
        let orders = said.iter().filter_map(|said| shown(&said.outcome));
        let last = orders.map(|order| order.expires_at).max().expect("some were held");
        wait_past(&sale, last).await;
        while sale.expire().await.more {}
        stop.store(true, Ordering::Relaxed);
        said
    };
    let rng = StdRng::seed_from_u64(!seed);
    let (said, ..) = tokio::join!(
        raced,
        sweep(processes[1].clone(), &stop),
        sweep(processes[2].clone(), &stop),
        adjust(processes[1].clone(), rng, &stop),
    );
    check(&sale, &said, stock, seed).await;
}

async fn check(sale: &Sale, said: &[Said], stock: i64, seed: u64) {
    let mut promised = HashMap::<OrderId, Timestamp>::new();
    for order in said.iter().filter_map(|said| shown(&said.outcome)) {
        let latest = promised.entry(order.id.clone()).or_insert(order.expires_at);
        *latest = order.expires_at.max(*latest);
    }

    // The history, step by step.
    let mut lives = BTreeMap::<String, Life>::new();
    let mut books = BTreeMap::from(SKUS.map(|sku| (sku.to_owned(), [0i64; 3])));
    let mut totals = BTreeMap::from(SKUS.map(|sku| (sku.to_owned(), stock)));
    let mut made = BTreeSet::new();
    for event in sale.events_after(0).await {
        for change in event.body.changes() {
            let counters = books.get_mut(change.sku.as_str()).expect("an SKU of the sale");
            let moved = [change.available, change.held, change.sold];
            (0..3).for_each(|at| counters[at] += moved[at]);
            assert!(counters.iter().all(|units| *units >= 0), "I1 at {event:?}; seed {seed}");
        }
        match &event.body {
            Body::Adjusted(a) => *totals.get_mut(a.sku.as_str()).expect("one of ours") += a.delta,
            Body::Order(step) => {
                let place = format!("{} at seq {}, seed {seed}", step.order.id, event.seq);
                let life = lives.entry(step.order.id.to_string()).or_default();
                check_step(life, step, event.at, promised.get(&step.order.id), &place);
                life.order = Some(step.order.clone());
                if let Step::RefundDue(due) = &step.step {
                    let reasons = life.refunds.entry(due.payment_id.clone()).or_default();
                    reasons.push(due.reason.as_str().to_owned());
                } else if step.cause != Cause::Sweeper {
                    made.insert((event.seq, event.body.kind()));
                }
            }
            Body::Sale(_) => {}
        }
    }

    // Who was told to have done something has done it, and nobody else.
    let claims: Vec<_> = said.iter().filter_map(|said| claimed(&said.outcome)).collect();
    let distinct = BTreeSet::from_iter(claims.iter().copied());
    assert_eq!(claims.len(), distinct.len(), "one winner; seed {seed}");
    assert_eq!(distinct, made, "each step was somebody's; seed {seed}");
    let mut ends = Ends::default();
    for (id, Life { order, refunds }) in &lives {
        let order = order.as_ref().expect("it has a step");
        match order.status {
            Status::Confirmed if order.reacquired => ends.late += 1,
            Status::Confirmed => ends.in_time += 1,
            Status::Cancelled => ends.cancelled += 1,
            Status::Expired => ends.expired += 1,
            other => panic!("{id} is still {other:?}; seed {seed}"),
        }
        ends.refunds += refunds.len();
        let found = sale.lanes.get(order.id.clone()).await.expect("an answer").outcome;
        assert_eq!(found.as_ref(), Some(order), "{id}; seed {seed}");
    }
    for said in said {
        check_answer(said, &lives, seed);
    }
    println!("{} answers, {} orders: {ends:?}", said.len(), lives.len());
    let Ends { in_time, late, cancelled, expired, refunds } = ends;
    let all = [in_time, late, cancelled, expired, refunds];
    assert!(all.iter().all(|count| *count > 0), "each end was come to: {ends:?}; seed {seed}");

    // I1 and I2: the fold of the events is what Redis has.
    let raw = sale.raw().await;
    raw.check();
    for (sku, counters) in books {
        let found = &raw.stock[&sku];
        assert_eq!(counters, [found.available, found.held, found.sold], "I2 of {sku}, seed {seed}");
        assert_eq!(counters.iter().sum::<i64>(), totals[&sku], "I1 of {sku}, seed {seed}");
        assert_eq!(found.held, 0, "all of {sku} is settled; seed {seed}");
    }
}

/// One step is legal, and breaks no promise.
fn check_step(
    life: &Life,
    step: &OrderStep,
    at: Timestamp,
    promised: Option<&Timestamp>,
    place: &str,
) {
    let before = life.order.as_ref();
    let order = &step.order;
    assert_eq!(
        step.from,
        before.map(|order| order.status),
        "it goes on from where it was: {place}"
    );
    assert!(step.is_possible(), "{place}: {step:?}");
    assert!(before.is_none_or(|before| before.expires_at <= order.expires_at), "I6: {place}");
    let held_ms = order.expires_at.millis() - order.created_at.millis();
    assert!(held_ms <= i64::from(HOLD_LONGEST_SECONDS) * 1000, "held for {held_ms} ms: {place}");
    match step.step {
        Step::Expired => {
            let promised = promised.expect("somebody was told of it");
            assert!(at >= *promised, "I6: released at {at}, promised until {promised}: {place}");
        }
        Step::Confirmed { .. } => {
            assert_eq!(order.reacquired, at >= order.expires_at, "late or not: {place}");
        }
        Step::PaymentBegun | Step::PaymentFailed => {
            let deadline = before.expect("it was held").expires_at;
            assert!(at < deadline, "its time was over: {place}");
        }
        _ => {}
    }
}

/// I7: a payment has bought, or must be given back, once; and its caller was told so.
fn check_answer(said: &Said, lives: &BTreeMap<String, Life>, seed: u64) {
    let place = format!("{:?}; seed {seed}", said.command);
    let (Command::Confirm(Confirm { id, payment, .. }), Outcome::Confirmed(outcome)) =
        (&said.command, &said.outcome)
    else {
        let sold_out =
            matches!(said.outcome, Outcome::Reserved(Reserved::Refused(Refusal::SoldOut { .. })));
        assert!(sold_out || shown(&said.outcome).is_some(), "{:?}: {place}", said.outcome);
        return;
    };
    let Life { order, refunds } = &lives[&id.to_string()];
    let order = order.as_ref().expect("it has a step");
    let bought = order.status == Status::Confirmed && order.payment_id.as_ref() == Some(payment);
    let due = refunds.get(payment).map_or(&[][..], Vec::as_slice);
    assert_eq!(usize::from(bought) + due.len(), 1, "I7: {bought}, {due:?}: {place}");
    match outcome {
        Confirmed::Confirmed(_) | Confirmed::Same(_) => assert!(bought, "I7: {place}"),
        Confirmed::Refund(reason, _) => assert_eq!(due, [reason.as_str()], "I7: {place}"),
        other => panic!("{other:?}: {place}"),
    }
}
