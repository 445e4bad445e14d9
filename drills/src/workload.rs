//! Buyers and an operator that do everything a caller can do, at random from a seed, on one sale. They
//! share buyers, so that limits are met, and look at answers only as a caller may. What was not
//! answered they send again, unchanged, until it is.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use reqwest::Method;
use serde_json::{Value, json};

use crate::history::{Entry, History, Level, Lines, Outcome, Reply, Request, now_ms};

const CLIENTS: u64 = 6;
/// The mean pause between two requests of a client: all of them together must leave a machine of two
/// cores to the parts that are drilled.
const PAUSE_MEAN_MS: u64 = 30;
const OPERATOR_PAUSE_MS: u64 = 200;
/// How many of its orders a client goes on with.
const KNOWN_MAX: usize = 40;
/// How many adjustments the operator, and refunds a client, may come back to.
const REMEMBERED_MAX: usize = 12;
/// Buyers that order at the same time; after so many orders the next of them comes.
const BUYERS: u64 = 12;
const ORDERS_A_BUYER: u64 = 6;
/// How long an unanswered request is sent again, once the workload is to end.
const GIVE_UP: Duration = Duration::from_secs(90);
const ANSWER_MAX: Duration = Duration::from_secs(12);
const SEND_AGAIN: Duration = Duration::from_millis(150);

pub const SKUS: [&str; 3] = ["common", "scarce", "limited"];

/// What durability callers ask for, of what may ask for one.
#[derive(Debug, Clone, Copy, Default)]
pub enum Asks {
    #[default]
    Nothing,
    /// Each for this.
    Always(&'static str),
    /// Some for one of these, and if it is not there in time the same again without: a part that is away
    /// for long would leave all of them waiting.
    Sometimes(&'static [&'static str]),
}

/// Holds so short that many run out. Which name it has changes nothing else.
pub fn definition(name: u64) -> Value {
    json!({
        "name": format!("drill {name}"), "hold_seconds": 3, "payment_grace_seconds": 2, "max_hold_seconds": 6,
        "per_buyer_limit": 12,
        "skus": [
            {"sku": SKUS[0], "stock": 100_000},
            {"sku": SKUS[1], "stock": 40},
            {"sku": SKUS[2], "stock": 100_000, "per_buyer_limit": 4},
        ],
    })
}

/// Whom the requests go to.
pub struct Callee {
    pub urls: Vec<String>,
    pub orders_key: String,
    pub operator_key: String,
    pub webhook_secret: String,
    pub sale: String,
    asks: Asks,
    pub history: Arc<History>,
    http: reqwest::Client,
    stop: AtomicBool,
    placed: AtomicU64,
}

fn lines_json(lines: &Lines) -> Value {
    lines.iter().map(|(sku, units)| json!({"sku": sku, "quantity": units})).collect()
}

/// Leaves out what is null.
fn object<const N: usize>(members: [(&str, Value); N]) -> Value {
    let members = members.into_iter().filter(|(_, value)| !value.is_null());
    members.map(|(name, value)| (name.to_owned(), value)).collect()
}

impl Callee {
    pub fn new(
        urls: Vec<String>,
        keys: [String; 3],
        sale: String,
        asks: Asks,
        history: Arc<History>,
    ) -> Self {
        let [orders_key, operator_key, webhook_secret] = keys;
        Self {
            urls,
            orders_key,
            operator_key,
            webhook_secret,
            sale,
            asks,
            history,
            http: reqwest::Client::new(),
            stop: AtomicBool::new(false),
            placed: AtomicU64::new(0),
        }
    }

    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    fn is_over(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Runs all clients until stopped.
    pub async fn press(self: &Arc<Self>, seed: u64) {
        let mut clients = tokio::task::JoinSet::new();
        for number in 0..CLIENTS {
            let client = Client {
                name: format!("c{number}"),
                callee: self.clone(),
                rng: StdRng::seed_from_u64(seed.wrapping_mul(1_000_003).wrapping_add(number)),
                known: Vec::new(),
                remembered: Vec::new(),
                unsettled: BTreeSet::new(),
                calls: 0,
            };
            clients.spawn(client.shop());
        }
        let operator = Client {
            name: "operator".into(),
            callee: self.clone(),
            rng: StdRng::seed_from_u64(seed),
            known: Vec::new(),
            remembered: Vec::new(),
            unsettled: BTreeSet::new(),
            calls: 0,
        };
        clients.spawn(operator.operate());
        clients.join_all().await;
    }

    /// One attempt, recorded; `asked`: `Prefer: durability=…`.
    pub async fn send(
        &self,
        client: &str,
        instance: usize,
        request: &Request,
        asked: Option<&str>,
    ) -> Reply {
        let sent_ms = now_ms();
        let reply = self.attempt(instance, request, asked).await;
        let entry = Entry {
            client: client.into(),
            instance,
            asked: asked.map(str::to_owned),
            sent_ms,
            answered_ms: now_ms(),
            request: request.clone(),
            reply: reply.clone(),
        };
        self.history.record(entry);
        reply
    }

    async fn attempt(&self, instance: usize, request: &Request, asked: Option<&str>) -> Reply {
        let unknown = |status| Reply {
            outcome: Outcome::Unknown,
            status,
            code: None,
            replayed: false,
            applied: None,
            body: Value::Null,
        };
        let url = &self.urls[instance % self.urls.len()];
        let mut http = self.http_request(url, request);
        if let Some(level) = asked {
            http = http.header("Prefer", format!("durability={level}"));
        }
        let Ok(answer) = http.timeout(ANSWER_MAX).send().await else {
            return unknown(None);
        };
        let status = answer.status();
        let replayed = answer.headers().contains_key("Idempotent-Replayed");
        let applied = answer.headers().get("Preference-Applied").and_then(|applied| {
            Level::from_word(applied.to_str().ok()?.strip_prefix("durability=")?)
        });
        let Ok(body) = answer.bytes().await else { return unknown(Some(status.as_u16())) };
        let body: Value = serde_json::from_slice(&body).unwrap_or_default();
        let code = body["code"].as_str().map(str::to_owned);
        let outcome = match code.as_deref() {
            _ if status.is_success() => Outcome::Ok,
            Some("outcome-unknown" | "internal") => Outcome::Unknown,
            Some(_) => Outcome::Refused,
            None => Outcome::Unknown,
        };
        Reply { outcome, status: Some(status.as_u16()), code, replayed, applied, body }
    }

    fn http_request(&self, url: &str, request: &Request) -> reqwest::RequestBuilder {
        let order_path = |order: &str, call: &str| format!("/v1/orders/{order}{call}");
        let (method, path, body) = match request {
            Request::Define { sale, definition } => {
                (Method::PUT, format!("/v1/sales/{sale}"), definition.clone())
            }
            Request::Place { sale, buyer, lines, hold_seconds, .. } => {
                let body = object([
                    ("sale_id", sale.as_str().into()),
                    ("buyer_id", buyer.as_str().into()),
                    ("lines", lines_json(lines)),
                    ("hold_seconds", hold_seconds.map_or(Value::Null, Value::from)),
                ]);
                (Method::POST, "/v1/orders".into(), body)
            }
            Request::BeginPayment { order, payment } => {
                (Method::POST, order_path(order, "/begin-payment"), json!({"payment_id": payment}))
            }
            Request::Confirm { order, payment, lines } => {
                let lines = lines.as_ref().map_or(Value::Null, lines_json);
                let body = object([("payment_id", payment.as_str().into()), ("lines", lines)]);
                (Method::POST, order_path(order, "/confirm"), body)
            }
            Request::Cancel { order } => (Method::POST, order_path(order, "/cancel"), Value::Null),
            Request::CancelByKey { sale, buyer, key } => {
                let body = json!({"sale_id": sale, "buyer_id": buyer, "idempotency_key": key});
                (Method::POST, "/v1/orders/cancel".into(), body)
            }
            Request::Return { order, lines, restock, .. } => {
                let lines = lines.as_ref().map_or(Value::Null, lines_json);
                let body = object([("lines", lines), ("restock", (*restock).into())]);
                (Method::POST, order_path(order, "/return"), body)
            }
            Request::Webhook { order, payment, succeeded } => {
                return self.webhook(url, order, payment, *succeeded);
            }
            Request::Adjust { sale, sku, delta, .. } => {
                let path = format!("/v1/sales/{sale}/stock/{sku}/adjustments");
                (Method::POST, path, json!({"delta": delta, "reason": "restock"}))
            }
            Request::SetTotal { sale, sku, total, .. } => {
                let path = format!("/v1/sales/{sale}/stock/{sku}/adjustments");
                (Method::POST, path, json!({"set_total": total, "reason": "recount"}))
            }
            Request::Undo { adjustment, .. } => {
                (Method::POST, format!("/v1/adjustments/{adjustment}/undo"), Value::Null)
            }
            Request::SettleRefund { refund } => {
                (Method::POST, format!("/v1/refunds/{refund}/settle"), Value::Null)
            }
            Request::Close { sale } => {
                (Method::POST, format!("/v1/sales/{sale}/close"), Value::Null)
            }
            Request::Pause { sale } => {
                (Method::POST, format!("/v1/sales/{sale}/pause"), Value::Null)
            }
            Request::Resume { sale } => {
                (Method::POST, format!("/v1/sales/{sale}/resume"), Value::Null)
            }
            Request::Get { order } => (Method::GET, order_path(order, ""), Value::Null),
            Request::Stock { sale } => {
                (Method::GET, format!("/v1/sales/{sale}/stock"), Value::Null)
            }
        };
        let of_orders = ["/v1/orders", "/v1/refunds"].iter().any(|of| path.starts_with(of));
        let key = if of_orders { &self.orders_key } else { &self.operator_key };
        let mut http = self.http.request(method, format!("{url}{path}")).bearer_auth(key);
        if let Request::Place { key, .. }
        | Request::Return { key, .. }
        | Request::Adjust { key, .. }
        | Request::SetTotal { key, .. }
        | Request::Undo { key, .. } = request
        {
            http = http.header("Idempotency-Key", key);
        }
        if let Request::SetTotal { version, .. } = request {
            http = http.header("If-Match", format!("\"{version}\""));
        }
        if body.is_null() { http } else { http.json(&body) }
    }

    /// As the payment provider signs it: <https://www.standardwebhooks.com>.
    fn webhook(
        &self,
        url: &str,
        order: &str,
        payment: &str,
        succeeded: bool,
    ) -> reqwest::RequestBuilder {
        let kind = if succeeded { "payment.succeeded" } else { "payment.failed" };
        let data = json!({"order_id": order, "payment_id": payment});
        let body = json!({"type": kind, "timestamp": "2026-11-11T00:00:00Z", "data": data});
        let body = body.to_string();
        let (id, now) = (format!("msg-{payment}-{kind}"), now_ms() / 1000);
        let signer = standardwebhooks::Webhook::new(&self.webhook_secret).expect("our own secret");
        let signature = signer.sign(&id, now, body.as_bytes()).expect("a delivery can be signed");
        let http = self.http.post(format!("{url}/v1/payments/webhook"));
        http.header("webhook-id", id)
            .header("webhook-timestamp", now)
            .header("webhook-signature", signature)
            .header("Content-Type", "application/json")
            .body(body)
    }
}

/// An order as its client knows it.
struct Known {
    id: String,
    place: Request,
    lines: Lines,
    payment: String,
}

struct Client {
    name: String,
    callee: Arc<Callee>,
    rng: StdRng,
    known: Vec<Known>,
    /// Ids of what it may come back to: the operator's adjustments, a shop's refunds.
    remembered: Vec<String>,
    /// Refunds of which it does not know whether they are settled.
    unsettled: BTreeSet<String>,
    calls: u64,
}

impl Client {
    async fn shop(mut self) {
        while !self.callee.is_over() {
            let request = self.choose();
            let reply = match &request {
                Request::SettleRefund { refund } => self.settle_refund(refund, &request).await,
                _ => self.settle(&request).await,
            };
            if let Some(refund) = reply.body["refund_id"].as_str() {
                self.remember(refund);
            }
            self.learn(request, &reply);
            self.pause(PAUSE_MEAN_MS).await;
        }
        for refund in std::mem::take(&mut self.unsettled) {
            self.settle(&Request::SettleRefund { refund }).await;
        }
    }

    /// Once: it needs the database, and whoever waited for that would buy nothing while it is away.
    async fn settle_refund(&mut self, refund: &str, request: &Request) -> Reply {
        let instance = self.rng.random_range(0..self.callee.urls.len());
        let reply = self.callee.send(&self.name, instance, request, None).await;
        match reply.outcome {
            Outcome::Ok => self.unsettled.remove(refund),
            Outcome::Unknown => self.unsettled.insert(refund.to_owned()),
            Outcome::Refused => false,
        };
        reply
    }

    /// Restocks, recounts, takes both back, pauses, resumes and renames; leaves the sale open.
    async fn operate(mut self) {
        let sale = self.callee.sale.clone();
        while !self.callee.is_over() {
            self.calls += 1;
            match self.rng.random_range(0..9) {
                0 => {
                    self.settle(&Request::Pause { sale: sale.clone() }).await;
                    self.pause(PAUSE_MEAN_MS).await;
                    self.settle(&Request::Resume { sale: sale.clone() }).await;
                }
                1 => {
                    let stock = self.settle(&Request::Stock { sale: sale.clone() }).await;
                    self.recount(&sale, &stock).await;
                }
                2 => {
                    let definition = definition(self.calls);
                    self.settle(&Request::Define { sale: sale.clone(), definition }).await;
                }
                // One that was undone, and one that undid another, too.
                3..5 if !self.remembered.is_empty() => {
                    let at = self.rng.random_range(0..self.remembered.len());
                    let key = format!("undo-{}", self.calls);
                    let adjustment = self.remembered[at].clone();
                    let reply = self.settle(&Request::Undo { adjustment, key }).await;
                    self.remember_adjustment(&reply);
                }
                _ => {
                    let key = format!("adjust-{}", self.calls);
                    let sku = SKUS[self.rng.random_range(0..SKUS.len())].to_owned();
                    let delta = if self.rng.random_bool(0.8) { 9 } else { -2 };
                    let adjust = Request::Adjust { sale: sale.clone(), sku, key, delta };
                    let reply = self.settle(&adjust).await;
                    self.remember_adjustment(&reply);
                }
            }
            self.pause(OPERATOR_PAUSE_MS).await;
        }
        self.settle(&Request::Resume { sale }).await;
    }

    /// Sets the total of one SKU to some more than the shop said that there are.
    async fn recount(&mut self, sale: &str, stock: &Reply) {
        let Some(skus) = stock.body["skus"].as_array() else { return };
        let Some(counters) = skus.choose(&mut self.rng) else { return };
        let number = |name: &str| counters[name].as_i64();
        let (Some(sku), Some(total), Some(version)) =
            (counters["sku"].as_str(), number("total"), number("version"))
        else {
            return;
        };
        let set = Request::SetTotal {
            sale: sale.to_owned(),
            sku: sku.to_owned(),
            key: format!("recount-{}", self.calls),
            total: total + self.rng.random_range(0..4),
            // One in five is of counters that have changed since.
            version: version - i64::from(self.rng.random_bool(0.2)),
        };
        let reply = self.settle(&set).await;
        self.remember_adjustment(&reply);
    }

    fn remember(&mut self, id: &str) {
        if self.remembered.iter().any(|known| known == id) {
            return;
        }
        if self.remembered.len() == REMEMBERED_MAX {
            self.remembered.remove(0);
        }
        self.remembered.push(id.to_owned());
    }

    fn remember_adjustment(&mut self, reply: &Reply) {
        let answered = (reply.outcome == Outcome::Ok).then(|| reply.body["id"].as_str());
        if let Some(id) = answered.flatten() {
            self.remember(id);
        }
    }

    /// What durability a request asks for at first, and if that did not come in time.
    fn preference(&mut self, request: &Request) -> (Option<&'static str>, Option<&'static str>) {
        match self.callee.asks {
            _ if !request.takes_a_preference() => (None, None),
            Asks::Nothing => (None, None),
            Asks::Always(level) => (Some(level), Some(level)),
            Asks::Sometimes(levels) if self.rng.random_bool(0.4) => {
                (levels.choose(&mut self.rng).copied(), None)
            }
            Asks::Sometimes(_) => (None, None),
        }
    }

    async fn pause(&mut self, mean_ms: u64) {
        let pause = self.rng.random_range(0..=2 * mean_ms);
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }

    /// Sends a request until it is answered, from one instance to the next.
    async fn settle(&mut self, request: &Request) -> Reply {
        let mut give_up: Option<Instant> = None;
        let first = self.rng.random_range(0..self.callee.urls.len());
        let mut attempt = 0;
        // A refusal for now says nothing of an attempt before it that may have been carried out, as that of
        // a refund was. And a resume must not be forgotten, or nothing is sold any more.
        let mut must = matches!(request, Request::Resume { .. } | Request::SettleRefund { .. });
        let (mut asked, later) = self.preference(request);
        loop {
            let reply = self.callee.send(&self.name, first + attempt, request, asked).await;
            asked = later;
            attempt += 1;
            let for_now = matches!(reply.status, Some(429 | 503));
            must |= reply.outcome == Outcome::Unknown;
            if reply.outcome != Outcome::Unknown && !(must && for_now) {
                return reply;
            }
            if self.callee.is_over() {
                let give_up = *give_up.get_or_insert_with(|| Instant::now() + GIVE_UP);
                if Instant::now() > give_up {
                    return reply;
                }
            }
            tokio::time::sleep(SEND_AGAIN).await;
        }
    }

    fn lines(&mut self, units_max: i64) -> Lines {
        let count = if self.rng.random_bool(0.2) { 2 } else { 1 };
        let skus: Vec<_> = SKUS.sample(&mut self.rng, count).copied().collect();
        skus.into_iter().map(|sku| (sku.to_owned(), self.rng.random_range(1..=units_max))).collect()
    }

    fn choose(&mut self) -> Request {
        self.calls += 1;
        if self.rng.random_bool(0.03)
            && let Some(refund) = self.remembered.choose(&mut self.rng)
        {
            return Request::SettleRefund { refund: refund.clone() };
        }
        let new = self.known.is_empty() || self.rng.random_bool(0.4);
        if new { self.place() } else { self.go_on() }
    }

    fn place(&mut self) -> Request {
        let placed = self.callee.placed.fetch_add(1, Ordering::Relaxed);
        let buyer = placed / ORDERS_A_BUYER + self.rng.random_range(0..BUYERS);
        let lines = self.lines(3);
        Request::Place {
            sale: self.callee.sale.clone(),
            buyer: format!("u-{buyer}"),
            key: format!("{}-{}", self.name, self.calls),
            lines,
            hold_seconds: self.rng.random_bool(0.3).then_some(1),
        }
    }

    /// Something with one of the orders that it knows.
    fn go_on(&mut self) -> Request {
        let at = self.rng.random_range(0..self.known.len());
        let roll = self.rng.random_range(0..100);
        let other = format!("pay-{}-{}", self.name, self.calls);
        let part = self.rng.random_bool(0.3);
        let known = &self.known[at];
        let (order, payment) = (known.id.clone(), known.payment.clone());
        // One unit of its first SKU.
        let lines = part.then(|| known.lines.keys().take(1).map(|sku| (sku.clone(), 1)).collect());
        match roll {
            0..14 => known.place.clone(),
            14..30 => Request::BeginPayment { order, payment },
            30..52 => Request::Confirm { order, payment, lines },
            52..57 => Request::Confirm { order, payment: other, lines },
            57..65 => Request::Cancel { order },
            65..70 => match &known.place {
                Request::Place { sale, buyer, key, .. } => {
                    let (sale, buyer) = (sale.clone(), buyer.clone());
                    // Half of them cancel what never comes.
                    let key = if part { format!("never-{other}") } else { key.clone() };
                    Request::CancelByKey { sale, buyer, key }
                }
                other => other.clone(),
            },
            70..82 => {
                let restock = self.rng.random_bool(0.7);
                Request::Return { order, key: format!("back-{other}"), lines, restock }
            }
            82..94 => {
                let succeeded = self.rng.random_bool(0.6);
                Request::Webhook { order, payment, succeeded }
            }
            _ => Request::Get { order },
        }
    }

    fn learn(&mut self, request: Request, reply: &Reply) {
        let Request::Place { lines, .. } = &request else { return };
        let Some(shown) = reply.order() else { return };
        if self.known.iter().any(|known| known.id == shown.id) {
            return;
        }
        if self.known.len() == KNOWN_MAX {
            self.known.remove(0);
        }
        let (id, lines) = (shown.id.to_owned(), lines.clone());
        let payment = format!("pay-{}-{}-own", self.name, self.calls);
        self.known.push(Known { id, place: request, lines, payment });
    }
}
