//! The tables of `docs/orders.md`: every command, tried on an order in every state, twice. What is
//! seen must be what the document says; with `WRITE_DOCS=1` it is written there instead.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use futures_util::future::join_all;
use holdfast::domain::event::{Body, Event, OrderStep, Step};
use holdfast::domain::history::StepKind;
use holdfast::domain::ids::LaneId;
use holdfast::domain::order::RefundDue;
use holdfast::lanes::outbox;
use reqwest::Method;
use serde_json::{Value, json};

use crate::payments::{SECRETS, deliver, now};
use crate::stack::{Reply, Stack, unique, until};

const DOCUMENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/orders.md");
const BEGIN: &str = "<!-- tests/http/life.rs writes from here -->\n";
const END: &str = "<!-- to here -->\n";

/// Units of each order; a part is one.
const UNITS: i64 = 3;
const KEY: &str = "k";

/// How an order stands before a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Unknown,
    Held,
    Paying,
    HeldOverdue,
    PayingOverdue,
    Expired,
    ExpiredGone,
    ExpiredRefund,
    Confirmed,
    PartlyReturned,
    Returned,
    Cancelled,
    Tombstone,
}

const STATES: [(State, &str); 13] = [
    (State::Unknown, "unknown"),
    (State::Held, "`held`"),
    (State::Paying, "`paying`"),
    (State::HeldOverdue, "overdue `held`"),
    (State::PayingOverdue, "overdue `paying`"),
    (State::Expired, "`expired`, stock there"),
    (State::ExpiredGone, "`expired`, stock gone"),
    (State::ExpiredRefund, "`expired`, refund of `P` due"),
    (State::Confirmed, "`confirmed`, nothing returned"),
    (State::PartlyReturned, "`confirmed`, partly returned"),
    (State::Returned, "`returned`"),
    (State::Cancelled, "`cancelled`"),
    (State::Tombstone, "tombstone"),
];
/// What stands for several states that come after one another.
const TOGETHER: [(&str, &[State]); 4] = [
    ("overdue", &[State::HeldOverdue, State::PayingOverdue]),
    ("`expired`", &[State::Expired, State::ExpiredGone, State::ExpiredRefund]),
    ("`expired`, stock there or gone", &[State::Expired, State::ExpiredGone]),
    ("`confirmed`", &[State::Confirmed, State::PartlyReturned]),
];

impl State {
    fn runs_out(self) -> bool {
        matches!(self, Self::HeldOverdue | Self::PayingOverdue) || self.is_swept()
    }

    fn is_swept(self) -> bool {
        matches!(self, Self::Expired | Self::ExpiredGone | Self::ExpiredRefund)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Command {
    Place { units: i64 },
    Begin(&'static str),
    Confirm { payment: &'static str, units: Option<i64> },
    Succeeded { payment: &'static str, units: Option<i64> },
    Failed(&'static str),
    Cancel,
    CancelByKey,
    Return { units: Back, restock: bool },
    Sweep,
}

impl Command {
    /// The payment that is or was made.
    fn payment(self) -> Option<&'static str> {
        match self {
            Self::Begin(payment)
            | Self::Confirm { payment, .. }
            | Self::Succeeded { payment, .. } => Some(payment),
            _ => None,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Back {
    All,
    Part,
    TooMany,
}

/// A heading, what its first column is, and its commands.
type Section = (&'static str, &'static str, &'static [(&'static str, Command)]);

const SECTIONS: [Section; 8] = [
    (
        "Place again: `POST /v1/orders` with the same `Idempotency-Key`",
        "body",
        &[
            ("the same", Command::Place { units: UNITS }),
            ("another", Command::Place { units: UNITS - 1 }),
        ],
    ),
    (
        "`POST /v1/orders/{id}/begin-payment`",
        "payment",
        &[("`P`", Command::Begin("P")), ("`Q`", Command::Begin("Q"))],
    ),
    (
        "`POST /v1/orders/{id}/confirm`",
        "payment",
        &[
            ("`P`", Command::Confirm { payment: "P", units: None }),
            ("`Q`", Command::Confirm { payment: "Q", units: None }),
            ("`P`, for a part", Command::Confirm { payment: "P", units: Some(1) }),
            ("`P`, `lines` are no part", Command::Confirm { payment: "P", units: Some(UNITS + 1) }),
        ],
    ),
    (
        "`POST /v1/payments/webhook`: `payment.succeeded`",
        "payment",
        &[
            ("`P`", Command::Succeeded { payment: "P", units: None }),
            ("`Q`", Command::Succeeded { payment: "Q", units: None }),
            (
                "`P`, `lines` are no part",
                Command::Succeeded { payment: "P", units: Some(UNITS + 1) },
            ),
        ],
    ),
    (
        "`POST /v1/payments/webhook`: `payment.failed`",
        "payment",
        &[("`P`", Command::Failed("P")), ("`Q`", Command::Failed("Q"))],
    ),
    (
        "`POST /v1/orders/{id}/cancel`, `POST /v1/orders/cancel`",
        "by",
        &[("id", Command::Cancel), ("key", Command::CancelByKey)],
    ),
    (
        "`POST /v1/orders/{id}/return`",
        "what",
        &[
            ("all, `restock`", Command::Return { units: Back::All, restock: true }),
            ("all, no `restock`", Command::Return { units: Back::All, restock: false }),
            ("a part, `restock`", Command::Return { units: Back::Part, restock: true }),
            ("more than is left", Command::Return { units: Back::TooMany, restock: true }),
        ],
    ),
    // The last, for it ends whatever is overdue in its sale.
    ("The sweeper comes by", "", &[("", Command::Sweep)]),
];

/// What a command did, in the document's words.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    answer: String,
    after: String,
    events: String,
    stock: String,
}

/// All orders of one state: a sale, in which each command has an SKU and an order of its own.
struct Row<'a> {
    stack: &'a Stack,
    state: State,
    lane: LaneId,
}

/// One order, and the command that it is for.
struct Cell<'a> {
    row: &'a Row<'a>,
    command: Command,
    number: usize,
    id: String,
}

fn commands() -> impl Iterator<Item = Command> {
    SECTIONS.into_iter().flat_map(|(_, _, commands)| commands.iter().map(|(_, command)| *command))
}

impl<'a> Row<'a> {
    async fn new(stack: &'a Stack, state: State) -> Self {
        let sale = unique(&format!("{state:?}"));
        let sku = |number| json!({"sku": format!("s{number}"), "stock": UNITS});
        let hold = if state.runs_out() { 1 } else { 300 };
        let definition = json!({
            "name": sale, "hold_seconds": hold, "payment_grace_seconds": 0,
            "skus": (0..commands().count()).map(sku).collect::<Vec<_>>(),
        });
        let defined = stack.put(&format!("/v1/sales/{sale}")).json(definition).send().await;
        assert_eq!(defined.status, 201, "{defined:?}");
        Self { stack, state, lane: LaneId { sale: sale.parse().unwrap(), lane: 0 } }
    }

    /// What every command does to an order in this state.
    async fn try_all(&self) -> Vec<Seen> {
        let cells =
            commands().enumerate().map(|(number, command)| Cell::new(self, command, number));
        let cells = join_all(cells).await;
        if self.state.runs_out() {
            for cell in &cells {
                until("it has run out", async || cell.show().await["status"] == "expired").await;
            }
        }
        if self.state.is_swept() {
            until("all are swept", async || {
                self.sweep().await;
                self.counters(cells.len() - 1).await[1] == 0
            })
            .await;
        }
        if self.state == State::ExpiredGone {
            join_all(cells.iter().map(Cell::buy_all)).await;
        }
        if self.state == State::ExpiredRefund {
            join_all(cells.iter().map(Cell::refund)).await;
        }
        let mut seen = Vec::new();
        for cell in &cells {
            seen.push(cell.observe().await);
        }
        seen
    }

    async fn sweep(&self) {
        self.stack.lanes.expire(&self.lane, 1_000).await.unwrap();
    }

    async fn seq(&self) -> u64 {
        self.stack.lanes.marks(&self.lane).await.unwrap().seq
    }

    async fn events_after(&self, seq: u64) -> Vec<Event> {
        let from = [(self.lane.clone(), 1, seq)];
        let read = self.stack.lanes.read_outboxes(&from, 1_000, Duration::ZERO).await.unwrap();
        let secret = self.stack.catalog.newest_secret().await.unwrap().unwrap();
        let entries = read.into_iter().flat_map(|(_, entries)| entries);
        entries.flat_map(|entry| outbox::events(&self.lane, &secret, &entry).unwrap()).collect()
    }

    /// Of one cell's SKU: available, held, sold.
    async fn counters(&self, number: usize) -> [i64; 3] {
        let stock = self.stack.lanes.stock(&self.lane).await.unwrap().outcome;
        let sku = stock.skus.into_iter().find(|s| s.sku.as_str() == format!("s{number}")).unwrap();
        [sku.counters.available, sku.counters.held, sku.counters.sold]
    }
}

impl<'a> Cell<'a> {
    /// An order that stands as its row says, or is about to.
    async fn new(row: &'a Row<'a>, command: Command, number: usize) -> Self {
        let mut cell = Self { row, command, number, id: String::new() };
        cell.id = cell.order_id().await;
        let done = match row.state {
            State::Unknown => Vec::new(),
            State::Tombstone => vec![Command::CancelByKey],
            state => {
                let mut commands = vec![Command::Place { units: UNITS }];
                let bought = Command::Confirm { payment: "P", units: None };
                let back = |units| Command::Return { units, restock: true };
                commands.extend(match state {
                    State::Paying | State::PayingOverdue => vec![Command::Begin("P")],
                    State::Confirmed => vec![bought],
                    State::PartlyReturned => vec![bought, back(Back::Part)],
                    State::Returned => vec![bought, back(Back::All)],
                    State::Cancelled => vec![Command::Cancel],
                    _ => vec![],
                });
                commands
            }
        };
        for command in done {
            let reply = cell.send(command, "before").await.unwrap();
            assert!(reply.status.is_success(), "{:?}: {reply:?}", row.state);
        }
        cell
    }

    fn buyer(&self) -> String {
        format!("b{}", self.number)
    }

    /// The id that this order has or would have.
    async fn order_id(&self) -> String {
        let secret = self.row.stack.catalog.newest_secret().await.unwrap().unwrap();
        let buyer = self.buyer().parse().unwrap();
        let key = secret.order_key(&self.row.lane.sale, &buyer, &KEY.parse().unwrap());
        secret.order_id(&self.row.lane, key).to_string()
    }

    fn lines(&self, units: i64) -> Value {
        json!([{"sku": format!("s{}", self.number), "quantity": units}])
    }

    /// The order as it is shown, but for how durable it is; null where nobody knows it.
    async fn show(&self) -> Value {
        let reply = self.row.stack.get(&format!("/v1/orders/{}", self.id)).send().await;
        if reply.status == 404 { Value::Null } else { lasting(&reply.body) }
    }

    /// Somebody else buys what is on sale; the id of that order.
    async fn buy_all(&self) -> String {
        let (stack, lines) = (self.row.stack, self.lines(UNITS));
        let body = json!({"sale_id": self.row.lane.sale, "buyer_id": "x", "lines": lines});
        let order = stack.place_with(&format!("x{}", self.number), body).await;
        let bought = stack.confirm(order.id(), "X").await;
        assert_eq!(bought.status, 200, "{bought:?}");
        order.id().to_owned()
    }

    /// `P` comes while the stock is gone, which then comes back.
    async fn refund(&self) {
        let other = self.buy_all().await;
        self.row.stack.confirm(&self.id, "P").await.is(409, "payment-too-late");
        let path = format!("/v1/orders/{other}/return");
        let call = self.row.stack.post(&path).header("Idempotency-Key", "back");
        assert_eq!(call.json(json!({"restock": true})).send().await.status, 200);
    }

    /// Sends a command; `None` where nobody is answered. `key`: of a return.
    async fn send(&self, command: Command, key: &str) -> Option<Reply> {
        let (stack, id) = (self.row.stack, &self.id);
        let (sale, buyer) = (&self.row.lane.sale, self.buyer());
        let post = |what: &str| {
            stack.call(Method::POST, &format!("/v1/orders/{id}/{what}"), &stack.orders_key)
        };
        let with_lines = |mut body: Value, units: Option<i64>| {
            if let Some(units) = units {
                body["lines"] = self.lines(units);
            }
            body
        };
        let reply = match command {
            Command::Place { units } => {
                let body = json!({"sale_id": sale, "buyer_id": buyer, "lines": self.lines(units)});
                stack.place_with(KEY, body).await
            }
            Command::Begin(payment) => {
                post("begin-payment").json(json!({"payment_id": payment})).send().await
            }
            Command::Confirm { payment, units } => {
                let body = with_lines(json!({"payment_id": payment}), units);
                post("confirm").json(body).send().await
            }
            Command::Succeeded { payment, units } => {
                let data = with_lines(json!({"order_id": id, "payment_id": payment}), units);
                let body = json!({"type": "payment.succeeded", "data": data}).to_string();
                deliver(stack, SECRETS[0], now(), &body).await
            }
            Command::Failed(payment) => {
                let data = json!({"order_id": id, "payment_id": payment});
                let body = json!({"type": "payment.failed", "data": data}).to_string();
                deliver(stack, SECRETS[0], now(), &body).await
            }
            Command::Cancel => post("cancel").send().await,
            Command::CancelByKey => {
                let body = json!({"sale_id": sale, "buyer_id": buyer, "idempotency_key": KEY});
                stack
                    .call(Method::POST, "/v1/orders/cancel", &stack.orders_key)
                    .json(body)
                    .send()
                    .await
            }
            Command::Return { units, restock } => {
                let left = if self.row.state == State::PartlyReturned { UNITS - 1 } else { UNITS };
                let units = match units {
                    Back::All => None,
                    Back::Part => Some(1),
                    Back::TooMany => Some(left + 1),
                };
                let body = with_lines(json!({"restock": restock}), units);
                post("return").header("Idempotency-Key", key).json(body).send().await
            }
            Command::Sweep => {
                self.row.sweep().await;
                return None;
            }
        };
        Some(reply)
    }

    /// What the command does, and that it does nothing the second time.
    async fn observe(&self) -> Seen {
        let place = format!("{:?} of {} in {:?}", self.command, self.id, self.row.state);
        let (row, number) = (self.row, self.number);
        let (before, stock, seq) = (self.show().await, row.counters(number).await, row.seq().await);
        let reply = self.send(self.command, "now").await;
        let (after, moved) = (self.show().await, row.counters(number).await);
        let events = row.events_after(seq).await;
        let steps: Vec<_> = events.iter().filter_map(|event| self.step(event)).collect();
        if self.command != Command::Sweep {
            assert_eq!(steps.len(), events.len(), "{place}: an event that is not the order's");
        }
        for step in &steps {
            assert!(step.is_possible(), "{place}: {step:?}");
        }
        if let Some(reply) = &reply {
            check_order(reply, &after, &place);
            self.check_refund(reply, &steps, &place).await;
        }

        let seq = row.seq().await;
        let again = self.send(self.command, "now").await;
        assert_eq!(
            again.as_ref().map(meaning),
            reply.as_ref().map(meaning),
            "{place}: the second time is as the first"
        );
        let unmoved = (self.show().await, row.counters(number).await, row.seq().await);
        assert_eq!(unmoved, (after.clone(), moved, seq), "{place}: a replay writes nothing");

        let same = words(&before) == words(&after);
        assert!(!same || before == after, "{place}: a change that the table would not show");
        let its = self.command.payment().map(|payment| format!("by `{payment}`"));
        let after = its.map_or(words(&after), |its| words(&after).replace(&its, "by it"));
        Seen {
            answer: reply.as_ref().map_or("–".to_owned(), answer),
            after: if same { "–".to_owned() } else { after },
            events: listed(steps.iter().map(|step| event(step))),
            stock: listed(["available", "held", "sold"].iter().enumerate().filter_map(
                |(at, name)| {
                    let delta = moved[at] - stock[at];
                    let sign = if delta < 0 { "−" } else { "+" };
                    (delta != 0).then(|| format!("{name} {sign}{}", delta.abs()))
                },
            )),
        }
    }

    /// Who is told of a refund is told the one of this order and payment, as is the event.
    async fn check_refund(&self, reply: &Reply, steps: &[&OrderStep], place: &str) {
        let Some(payment) = self.command.payment() else {
            assert_eq!(reply.body.get("refund_id"), None, "{place}");
            return;
        };
        let secret = self.row.stack.catalog.newest_secret().await.unwrap().unwrap();
        let id = secret.refund_id(&self.id.parse().unwrap(), &payment.parse().unwrap()).to_string();
        let due = steps.iter().find_map(|step| match &step.step {
            Step::RefundDue(due) => Some((due.id.to_string(), due.payment_id.as_str())),
            _ => None,
        });
        assert!(due.as_ref().is_none_or(|due| *due == (id.clone(), payment)), "{place}");
        let told = reply.body["refund_id"].as_str();
        assert!(told.is_none_or(|told| told == id), "{place}");
        // Over HTTP nobody's payment is kept without a word.
        assert!(due.is_none() || told.is_some() || reply.status == 204, "{place}");
    }

    fn step<'e>(&self, event: &'e Event) -> Option<&'e OrderStep> {
        match &event.body {
            Body::Order(step) if step.order.id.to_string() == self.id => Some(step),
            _ => None,
        }
    }
}

fn lasting(order: &Value) -> Value {
    let mut order = order.clone();
    order.as_object_mut().unwrap().remove("durability");
    order
}

/// An answer that speaks of the order shows it as the call left it.
fn check_order(reply: &Reply, after: &Value, place: &str) {
    let code = reply.code();
    let about = code.starts_with("order-") && code != "order-not-found"
        || ["already-paid", "payment-too-late", "return-exceeds-order"].contains(&code);
    if about {
        assert_eq!(lasting(&reply.body["order"]), *after, "{place}");
    } else if [200, 201].contains(&reply.status.as_u16()) {
        assert_eq!(lasting(&reply.body), *after, "{place}");
    }
}

/// What a caller acts on.
fn meaning(reply: &Reply) -> (u16, String, Value) {
    (reply.status.as_u16(), reply.code().to_owned(), reply.body["refund_id"].clone())
}

fn answer(reply: &Reply) -> String {
    let mut text = reply.status.as_u16().to_string();
    if !reply.code().is_empty() {
        write!(text, " `{}`", reply.code()).unwrap();
    }
    if reply.body["refund_id"].is_string() {
        text += ", `refund_id`";
    }
    if reply.body["reacquired"] == true {
        text += ", `reacquired`";
    }
    if reply.header("idempotent-replayed") == "true" {
        text += ", replayed";
    }
    text
}

/// An order as the table shows it.
fn words(order: &Value) -> String {
    let units = |lines: &str| {
        let lines = order[lines].as_array().unwrap().iter();
        lines.map(|line| line["quantity"].as_i64().unwrap()).sum::<i64>()
    };
    match order["status"].as_str() {
        None => "unknown".to_owned(),
        Some("cancelled") if units("lines") == 0 => "tombstone".to_owned(),
        Some(status @ ("paying" | "confirmed")) => {
            let mut text = format!("`{status}` by `{}`", order["payment_id"].as_str().unwrap());
            if units("lines") < UNITS {
                write!(text, ", {} bought", units("lines")).unwrap();
            }
            if units("returned") > 0 {
                write!(text, ", {} returned", units("returned")).unwrap();
            }
            text
        }
        Some(status) => format!("`{status}`"),
    }
}

fn event(step: &OrderStep) -> String {
    let kind = Body::Order(step.clone()).kind();
    let kind = serde_json::to_value(StepKind::of_event(kind).unwrap()).unwrap();
    let kind = format!("`{}`", kind.as_str().unwrap());
    match &step.step {
        Step::RefundDue(RefundDue { reason, .. }) => format!("{kind}: {}", reason.as_str()),
        _ => kind,
    }
}

fn listed(parts: impl Iterator<Item = String>) -> String {
    let text = parts.collect::<Vec<_>>().join(", ");
    if text.is_empty() { "–".to_owned() } else { text }
}

/// What the document calls these states, which are in the order of [`STATES`].
fn names(states: &[State]) -> String {
    let mut names = Vec::new();
    let mut rest = states;
    while let [first, after @ ..] = rest {
        match TOGETHER.iter().find(|(_, together)| rest.starts_with(together)) {
            Some((name, together)) => {
                names.push(*name);
                rest = &rest[together.len()..];
            }
            None => {
                names.extend(STATES.iter().find(|(state, _)| state == first).map(|(_, name)| name));
                rest = after;
            }
        }
    }
    names.join("; ")
}

/// The tables. Of one section, states in which a command does the same share a row, and so do
/// commands that do the same in just these states. `seen`: by state, then command.
fn tables(seen: &[Vec<Seen>]) -> String {
    let mut text = String::new();
    let mut number = 0;
    for (heading, which, commands) in SECTIONS {
        let mut rows: Vec<(&Seen, Vec<State>, Vec<&str>)> = Vec::new();
        for (variant, _) in commands {
            let mut of_command: Vec<(&Seen, Vec<State>)> = Vec::new();
            for ((state, _), seen) in STATES.iter().zip(seen) {
                match of_command.iter_mut().find(|(known, _)| **known == seen[number]) {
                    Some((_, states)) => states.push(*state),
                    None => of_command.push((&seen[number], vec![*state])),
                }
            }
            for (seen, states) in of_command {
                match rows.iter_mut().find(|row| (row.0, &row.1) == (seen, &states)) {
                    Some((_, _, variants)) => variants.push(variant),
                    None => rows.push((seen, states, vec![variant])),
                }
            }
            number += 1;
        }
        rows.sort_by_key(|(_, states, _)| STATES.iter().position(|(state, _)| *state == states[0]));
        writeln!(text, "\n### {heading}\n").unwrap();
        writeln!(text, "| the order is | {which} | answer | afterwards | event | stock |").unwrap();
        writeln!(text, "| --- | --- | --- | --- | --- | --- |").unwrap();
        for (Seen { answer, after, events, stock }, states, variants) in rows {
            let states = names(&states);
            let all = variants.len() == commands.len() && variants.len() > 1;
            let variants = if all { "any".to_owned() } else { variants.join("; ") };
            writeln!(text, "| {states} | {variants} | {answer} | {after} | {events} | {stock} |")
                .unwrap();
        }
    }
    text + "\n"
}

#[tokio::test]
async fn the_tables_of_orders_md_are_what_happens() {
    let stack = Stack::with("life", |config| {
        config.payments.webhook_secrets = vec![SECRETS[0].to_owned()];
    })
    .await;
    let rows = join_all(STATES.map(|(state, _)| Row::new(&stack, state))).await;
    let seen = join_all(rows.iter().map(Row::try_all)).await;
    let seen = tables(&seen);

    let document = std::fs::read_to_string(Path::new(DOCUMENT)).unwrap();
    let (head, rest) = document.split_once(BEGIN).expect("where the tables begin");
    let (written, tail) = rest.split_once(END).expect("where the tables end");
    if std::env::var_os("WRITE_DOCS").is_some() {
        std::fs::write(DOCUMENT, format!("{head}{BEGIN}{seen}{END}{tail}")).unwrap();
        return;
    }
    for (seen, written) in seen.lines().zip(written.lines()) {
        assert_eq!(seen, written, "what happens, and docs/orders.md (WRITE_DOCS=1 writes it)");
    }
    assert_eq!(seen, written);
}
