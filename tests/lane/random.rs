//! Random commands through the real scripts and through the [`Model`], compared after every call.
//!
//! `LANE_SEED` repeats a run, `LANE_CASES` says how many sales are tried.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::time::{Duration, Instant};

use chrono::Utc;
use holdfast::domain::event::{Body, Event, SaleStep};
use holdfast::domain::ids::EntityKey;
use holdfast::domain::order::{Order, Status};
use holdfast::domain::sale::Definition;
use holdfast::domain::time::Timestamp;
use holdfast::lanes::command::{Command, PhaseChange};
use holdfast::lanes::reply::Defined;
use rand::RngExt;

use crate::model::{Circumstances, Model};
use crate::raw::RawStock;
use crate::redis_server::RedisServer;
use crate::sale::{Answer, Outcome, Sale, options, redis_url, wait_past};
use crate::workload::{SHORT_HOLD, Workload};

/// Sales that are tried side by side, so that they wait for their deadlines together.
const SIDE_BY_SIDE: usize = 12;
const COMMANDS_MAX: usize = 50;
const CALLS_A_ROUND: usize = 5;
/// How long a machine may take to get one round done in time.
const PATIENCE: Duration = Duration::from_secs(60);
const ROUNDS: usize = 3;

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a number"))
}

fn seeds() -> impl Iterator<Item = u64> {
    let first = setting("LANE_SEED").unwrap_or_else(|| u64::from(rand::random::<u32>()));
    let cases = setting("LANE_CASES").unwrap_or(2 * SIDE_BY_SIDE as u64);
    println!("LANE_SEED={first} LANE_CASES={cases}");
    first..first + cases
}

/// In no particular order where a lane promises none.
fn sorted(mut outcome: Outcome) -> Outcome {
    if let Outcome::Stock(stock) = &mut outcome {
        stock.skus.sort_by(|a, b| a.sku.cmp(&b.sku));
    }
    outcome
}

fn sorted_events(mut events: Vec<Event>) -> Vec<Event> {
    for event in &mut events {
        if let Body::Sale(SaleStep::Defined { stock, .. }) = &mut event.body {
            stock.sort_by(|a, b| a.sku.cmp(&b.sku));
        }
    }
    events
}

fn ended(events: &[Event]) -> Vec<EntityKey> {
    let key = |event: &Event| match &event.body {
        Body::Order(step) if step.order.status == Status::Expired => Some(step.order.id.key()),
        _ => None,
    };
    events.iter().filter_map(key).collect()
}

struct Run {
    seed: u64,
    sale: Sale,
    workload: Workload,
    model: Model,
    /// The fold of all events' changes: (available, held, sold) by SKU.
    folded: BTreeMap<String, (i64, i64, i64)>,
    calls: usize,
}

impl Run {
    async fn new(seed: u64) -> Self {
        let mut options = options();
        let mut workload = Workload::new(seed);
        // Now and then so small a bound that the outbox reaches it.
        if workload.rng.random_bool(0.3) {
            options.outbox_events_max = 120;
        }
        let sale = Sale::on(&redis_url(), &options).await;
        let model = Model::new(sale.lane.clone(), sale.secret.clone(), options.outbox_events_max);
        Self { seed, sale, workload, model, folded: BTreeMap::new(), calls: 0 }
    }

    async fn case(mut self) {
        let first = self.workload.first_definition();
        // A lane that is not there yet answers nothing else.
        let mut call = self.workload.batch(&self.sale, Some(&first), 3);
        call.push(Command::Define(Box::new(self.sale.defining(1, first))));
        self.call(call).await;
        for round in 0..ROUNDS {
            for _ in 0..CALLS_A_ROUND {
                let batch = self.workload.batch(&self.sale, self.model.definition(), COMMANDS_MAX);
                self.call(batch).await;
                self.advance().await;
            }
            if round + 1 < ROUNDS {
                self.wait_for_short_holds().await;
            }
        }
        self.end().await;
    }

    /// Closes, settles, archives and forgets the sale.
    async fn end(&mut self) {
        let closing = Command::Phase(self.sale.changing(PhaseChange::Close));
        let unpaid = |order: &Order| matches!(order.status, Status::Held | Status::Paying);
        let held = self.model.orders().filter(|(order, _)| unpaid(order));
        let cancels = held.map(|(order, _)| Command::Cancel(self.sale.cancelling(&order.id)));
        let batch = std::iter::once(closing).chain(cancels).collect();
        self.call(batch).await;
        let seq = self.model.marks.seq;
        self.sale.advance("relay", seq, seq).await;
        self.model.advance(seq, seq);
        self.call(vec![Command::Archive { retention_ms: 0 }]).await;
        let batch = self.workload.batch(&self.sale, self.model.definition(), COMMANDS_MAX);
        self.call(batch).await;
        let seq = self.model.marks.seq;
        self.sale.advance("relay", seq, seq).await;
        assert!(self.sale.lanes.forget(&self.sale.lane).await.unwrap(), "{}", self.place());
        let left = crate::raw::dump(&self.sale.redis, &self.sale.keys()).await;
        assert!(left.iter().all(Option::is_none), "a forgotten lane has no keys");
    }

    fn place(&self) -> String {
        format!("call {} of LANE_SEED={} LANE_CASES=1", self.calls, self.seed)
    }

    async fn wait_for_short_holds(&self) {
        let horizon = i64::from(SHORT_HOLD) * 1000 + Utc::now().timestamp_millis();
        let short = self.model.deadlines().filter(|deadline| deadline.millis() <= horizon);
        if let Some(last) = short.max() {
            wait_past(&self.sale, last).await;
        }
    }

    /// What the relay would say, at random.
    async fn advance(&mut self) {
        let seq = self.model.marks.seq;
        if self.workload.rng.random_bool(0.5) {
            let logged = self.workload.rng.random_range(0..=seq);
            let recorded = self.workload.rng.random_range(0..=logged);
            self.sale.advance("relay", logged, recorded).await;
            self.model.advance(logged, recorded);
        }
    }

    async fn call(&mut self, batch: Vec<Command>) {
        self.calls += 1;
        let seen = self.model.marks.seq;
        let before = Utc::now().into();
        let answers = self.sale.ask_at_once(&batch).await;
        let answers: Vec<Answer> =
            answers.into_iter().map(|answer| answer.expect("Redis answers")).collect();
        let entries = self.sale.entries_after(seen).await;
        assert!(entries.len() <= 1, "one call appends one entry: {}", self.place());
        let events = entries.concat();
        self.compare(&batch, &answers, sorted_events(events.clone()), before);
        self.fold(&events);
        self.compare_keys().await;
    }

    /// The model must say the same, given what the lane's clock said.
    fn compare(
        &mut self,
        batch: &[Command],
        answers: &[Answer],
        events: Vec<Event>,
        before: Timestamp,
    ) {
        let now = answers.iter().find_map(|answer| answer.now).unwrap_or(before);
        for answer in answers {
            assert!(answer.now.is_none_or(|at| at == now), "one call has one time");
        }
        // The caller's clock was read somewhere between `before` and `now`: all that can differ is
        // which deadlines of that moment were due.
        let between = self.model.deadlines().filter(|at| *at > before && *at <= now);
        let mut due_ats: Vec<_> = std::iter::once(before.min(now)).chain(between).collect();
        due_ats.sort();
        let ended = ended(&events);
        let mut differences = Vec::new();
        for due_at in due_ats {
            let mut model = self.model.clone();
            let at = Circumstances { now, due_at, ended: &ended };
            match agrees(&mut model, batch, answers, &events, &at) {
                Ok(()) => {
                    self.model = model;
                    return;
                }
                Err(difference) => differences.push(difference),
            }
        }
        panic!("{}:\n{}", self.place(), differences[0]);
    }

    /// I2: what the events say adds up to the counters.
    fn fold(&mut self, events: &[Event]) {
        for event in events {
            if let Body::Order(step) = &event.body {
                assert!(step.is_possible(), "{}: {event:?}", self.place());
            }
        }
        for change in events.iter().flat_map(|event| event.body.changes()) {
            let sum = self.folded.entry(change.sku.to_string()).or_default();
            *sum = (sum.0 + change.available, sum.1 + change.held, sum.2 + change.sold);
        }
    }

    async fn compare_keys(&self) {
        let raw = self.sale.raw().await;
        let place = self.place();
        raw.check();
        assert_eq!(raw.seq, self.model.marks.seq, "{place}");
        let skus = self.model.definition().into_iter().flat_map(|definition| &definition.skus);
        let expected = skus.map(|s| {
            let counters = self.model.counters(&s.sku);
            let stock = RawStock {
                available: counters.available,
                held: counters.held,
                sold: counters.sold,
                version: counters.version,
                limit: s.per_buyer_limit.map(i64::from),
                initial: s.stock,
            };
            (s.sku.to_string(), stock)
        });
        assert_eq!(raw.stock, expected.collect(), "{place}");
        for (sku, stock) in &raw.stock {
            let folded = self.folded.get(sku).copied().unwrap_or_default();
            assert_eq!(folded, (stock.available, stock.held, stock.sold), "I2 of {sku}, {place}");
        }
        let adjustments = self.model.adjustments().map(|a| (a.id.key().encode(), a));
        let expected = adjustments.map(|(key, a)| (key, (a.sku.to_string(), a.delta)));
        let kept = raw.adjustments.iter().map(|(key, a)| (key.clone(), (a.sku.clone(), a.delta)));
        assert_eq!(BTreeMap::from_iter(kept), expected.collect(), "{place}");
        assert_eq!(raw.orders.len(), self.model.orders().count(), "{place}");
        for (order, hold) in self.model.orders() {
            let raw = &raw.orders[&order.id.key().encode()];
            let status = match order.status {
                Status::Held => "h",
                Status::Paying => "p",
                Status::Returned => "r",
                Status::Confirmed => "c",
                Status::Cancelled => "x",
                Status::Expired => "e",
            };
            assert_eq!(raw.status, status, "{place}");
            assert_eq!((raw.seq, raw.hold), (order.seq, hold), "{place}");
            assert_eq!(raw.created, order.created_at.millis(), "{place}");
            assert_eq!(raw.expires, order.expires_at.millis(), "{place}");
            assert_eq!(raw.confirmed, order.confirmed_at.map(Timestamp::millis), "{place}");
            let payment = order.payment_id.as_ref().map(ToString::to_string);
            let buyer = order.buyer_id.as_ref().map_or("", |buyer| buyer.as_str());
            assert_eq!((&raw.payment, raw.buyer.as_str()), (&payment, buyer));
            let lines = order.lines.iter();
            let lines: Vec<_> =
                lines.map(|l| (l.sku.to_string(), i64::from(l.quantity.get()))).collect();
            assert_eq!(raw.lines, lines, "{place}");
            let returned = order.returned.iter();
            let returned: Vec<_> =
                returned.map(|l| (l.sku.to_string(), i64::from(l.quantity.get()))).collect();
            assert_eq!(raw.returned, returned, "{place}");
        }
    }
}

fn agrees(
    model: &mut Model,
    batch: &[Command],
    answers: &[Answer],
    events: &[Event],
    at: &Circumstances,
) -> Result<(), String> {
    for (index, (command, answer)) in batch.iter().zip(answers).enumerate() {
        let reasons = match command {
            Command::Define(define) => model.in_use(&define.definition),
            _ => Vec::new(),
        };
        let expected = sorted(model.apply(command, at));
        let same = match (&expected, &answer.outcome) {
            (Outcome::Defined(Defined::InUse { .. }), Outcome::Defined(Defined::InUse { why })) => {
                reasons.contains(why)
            }
            (expected, found) => *expected == sorted(found.clone()),
        };
        if !same {
            let before = &batch[..index];
            return Err(format!(
                "{command:#?}\nmodel {expected:#?}\nlane {:#?}\nafter, in this call, {before:?}",
                answer.outcome
            ));
        }
    }
    let expected = sorted_events(model.take_events());
    if let Some((expected, found)) = expected.iter().zip(events).find(|(a, b)| a != b) {
        return Err(format!("model {expected:#?}\nlane {found:#?}\nof {batch:?}"));
    }
    same("how many events", expected.len(), events.len())?;
    for marks in answers.iter().filter_map(|answer| answer.marks) {
        same("the marks", model.marks, marks)?;
    }
    Ok(())
}

fn same<T: PartialEq + Debug>(what: &str, expected: T, found: T) -> Result<(), String> {
    (expected == found).then_some(()).ok_or(format!("{what}: model {expected:?}, lane {found:?}"))
}

#[tokio::test]
async fn a_lane_answers_keeps_and_tells_what_the_model_says() {
    let seeds: Vec<_> = seeds().collect();
    for side_by_side in seeds.chunks(SIDE_BY_SIDE) {
        let cases = side_by_side.iter().map(async |seed| Run::new(*seed).await.case().await);
        futures_util::future::join_all(cases).await;
    }
}

/// What was said or kept, without what differs between two calls at different times: the times
/// themselves, and the seqs of holds that ended one after the other in another order.
fn timeless(text: &str) -> String {
    let mut out = text.to_owned();
    for mark in ["Timestamp(", "seq: "] {
        let parts: Vec<_> = out.split(mark).collect();
        let (first, rest) = parts.split_first().expect("a split has a first part");
        let rest = rest.iter().map(|part| part.trim_start_matches(|c: char| c.is_ascii_digit()));
        out = std::iter::once(*first).chain(rest).collect::<Vec<_>>().join(mark);
    }
    out
}

/// Each event without its time; holds that ended one after the other in the order of their keys.
fn timeless_events(events: Vec<Event>) -> Vec<String> {
    let mut events = sorted_events(events);
    let expired = |event: &Event| !ended(std::slice::from_ref(event)).is_empty();
    for run in events.chunk_by_mut(|a, b| expired(a) && expired(b)) {
        run.sort_by_key(|event| ended(std::slice::from_ref(event)));
    }
    events.iter().map(|event| timeless(&format!("{event:?}"))).collect()
}

/// One sale, twice: on two servers, so that even the ids are the same.
struct Twins {
    together: Sale,
    alone: Sale,
    workload: Workload,
    first: Definition,
}

impl Twins {
    /// Whether the same commands did the same; `None` where the call took so long that holds may
    /// have run out within it.
    async fn round(&mut self, place: &str) -> Option<()> {
        let started = Instant::now();
        let short = Duration::from_secs(SHORT_HOLD.into()) / 2;
        for _ in 0..CALLS_A_ROUND {
            let batch = self.workload.batch(&self.together, Some(&self.first), COMMANDS_MAX);
            let seen = (self.together.raw().await.seq, self.alone.raw().await.seq);
            assert_eq!(seen.0, seen.1, "{place}");
            let together = self.together.ask_at_once(&batch).await;
            let mut alone = Vec::new();
            for command in &batch {
                alone.push(self.alone.ask(command.clone()).await);
            }
            let answers =
                (self.together.entries_after(seen.0).await, self.alone.events_after(seen.1).await);
            if started.elapsed() > short {
                return None;
            }
            for ((command, together), alone) in batch.iter().zip(together).zip(alone) {
                let (together, alone) = (together.unwrap().outcome, alone.unwrap().outcome);
                let [together, alone] =
                    [together, alone].map(|o| timeless(&format!("{:?}", sorted(o))));
                assert_eq!(together, alone, "{place}: {command:?} of {batch:?}");
            }
            assert!(answers.0.len() <= 1, "one call appends one entry");
            assert_eq!(timeless_events(answers.0.concat()), timeless_events(answers.1), "{place}");
        }
        self.compare_keys(place).await;
        Some(())
    }

    async fn compare_keys(&self, place: &str) {
        let mut raws = [self.together.raw().await, self.alone.raw().await];
        for raw in &mut raws {
            raw.check();
            for order in raw.orders.values_mut() {
                (order.seq, order.created, order.expires) = (0, 0, 0);
                order.confirmed = order.confirmed.map(|_| 0);
            }
        }
        assert_eq!(raws[0], raws[1], "{place}");
    }

    async fn wait_for_short_holds(&self) {
        for sale in [&self.together, &self.alone] {
            let raw = sale.raw().await;
            let horizon = i64::from(SHORT_HOLD) * 1000 + Utc::now().timestamp_millis();
            let deadlines = raw.orders.values().map(|order| order.expires);
            if let Some(last) = deadlines.filter(|deadline| *deadline <= horizon).max() {
                wait_past(sale, Timestamp::from_millis(last)).await;
            }
        }
    }
}

#[tokio::test]
async fn many_commands_in_one_call_are_as_many_calls() {
    let server = RedisServer::start(&[]);
    let mut compared = 0;
    let deadline = Instant::now() + PATIENCE;
    // A round that a busy machine held up says nothing: then there are more.
    while compared == 0 {
        assert!(Instant::now() < deadline, "this machine is too slow for every round");
        for seed in seeds().take(4) {
            let together = Sale::undefined().await;
            let mut alone = Sale::on(&server.url(), &options()).await;
            alone.lane = together.lane.clone();
            let mut workload = Workload::new(seed);
            let first = workload.first_definition();
            for sale in [&together, &alone] {
                sale.define(1, first.clone()).await;
            }
            let mut twins = Twins { together, alone, workload, first };
            for round in 0..ROUNDS {
                let place = format!("round {round} of LANE_SEED={seed}");
                if twins.round(&place).await.is_none() {
                    println!("{place} took too long to compare");
                    break;
                }
                compared += 1;
                twins.wait_for_short_holds().await;
            }
        }
    }
}
