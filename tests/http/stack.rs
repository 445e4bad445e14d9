//! A service in this process, on a free port, with a schema of its own; and what a caller needs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use holdfast::admission::Admission;
use holdfast::config::Config;
use holdfast::domain::event::Event;
use holdfast::domain::ids::LaneId;
use holdfast::domain::names::SaleId;
use holdfast::http::{Api, ConnectionMetrics, Front, Options, ServeOptions, inside, public, serve};
use holdfast::lanes::{Lanes, Reached, outbox};
use holdfast::ledger::catalog::CatalogMetrics;
use holdfast::ledger::{Batch, Catalog, LaneMove, Ledger, Scope};
use holdfast::reconciler::rebuild::Recovery;
use holdfast::telemetry::health::{Condition, Health, Part};
use prometheus_client::registry::Registry;
use reqwest::header::HeaderMap;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

const DEADLINE: Duration = Duration::from_secs(20);

fn env(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} must name a real server: see ./dev env"))
}

/// A name that no other test and no other run has.
pub fn unique(name: &str) -> String {
    format!("{name}_{:012x}", rand::random::<u64>() >> 16)
}

/// Waits until it is so; panics with `what` if it never is.
pub async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let began = Instant::now();
    while !is_so().await {
        assert!(began.elapsed() < DEADLINE, "it never came true: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub struct Stack {
    pub url: String,
    pub inner_url: String,
    pub orders_key: String,
    pub operator_key: String,
    pub lanes: Lanes,
    pub ledger: Ledger,
    pub catalog: Catalog,
    pub health: Health,
    pub client: reqwest::Client,
    pub schema: String,
    /// A sale id of this test's own.
    pub sale: String,
    shutdown: CancellationToken,
}

impl Drop for Stack {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

impl Stack {
    pub async fn new(name: &str) -> Self {
        Self::with(name, |_| {}).await
    }

    /// With other settings.
    pub async fn with(name: &str, change: impl FnOnce(&mut Config)) -> Self {
        // What the service says is shown with a test that fails.
        tracing_subscriber::fmt().with_test_writer().try_init().ok();
        let mut config = Config::load(None).unwrap();
        config.redis.url = env("REDIS_URL");
        config.database.url = env("DATABASE_URL");
        config.database.schema = unique("http");
        config.database.connections_max = 4;
        change(&mut config);
        let sale = unique(name);
        println!("sale {sale}, schema {}", config.database.schema);

        let mut registry = Registry::default();
        let lanes = Lanes::new(&config.redis, &config.lanes, &mut registry).unwrap();
        let ledger = Ledger::new(&config.database).unwrap();
        ledger.migrate().await.unwrap();
        let metrics = CatalogMetrics::register(&mut registry);
        let catalog = Catalog::new(ledger.clone(), &config.catalog, metrics);
        let orders_key = add_key(&ledger, "shop", Scope::Orders).await;
        let operator_key = add_key(&ledger, "operator", Scope::Operator).await;
        catalog.refresh().await.unwrap();
        let health = Health::new(["api"]);
        for part in [Part::Redis, Part::Kafka, Part::Database] {
            health.set_part(part, Condition::Up, "");
        }
        let recovery =
            Recovery::new(lanes.clone(), ledger.clone(), catalog.clone(), &config, &mut registry);
        let api = Api::new(
            lanes.clone(),
            ledger.clone(),
            catalog.clone(),
            recovery,
            Admission::new(&config.admission, &mut registry),
            health.clone(),
            Options::new(&config),
            &mut registry,
        );
        let shutdown = CancellationToken::new();
        let options = ServeOptions::new(&config.http);
        let connections = ConnectionMetrics::register(&mut registry);
        let inner = inside(health.clone(), Arc::new(registry));
        Self {
            url: start(public(api), options, connections, &shutdown).await,
            inner_url: start(inner, options, ConnectionMetrics::default(), &shutdown).await,
            orders_key,
            operator_key,
            lanes,
            ledger,
            catalog,
            health,
            client: reqwest::Client::new(),
            schema: config.database.schema,
            sale,
            shutdown,
        }
    }

    pub fn shut_down(&self) {
        self.shutdown.cancel();
    }

    /// What the service answers on this path; `key` may be empty.
    pub fn call(&self, method: Method, path: &str, key: &str) -> Call {
        let request = self.client.request(method, format!("{}{path}", self.url));
        Call(if key.is_empty() { request } else { request.bearer_auth(key) })
    }

    pub fn get(&self, path: &str) -> Call {
        self.call(Method::GET, path, &self.operator_key)
    }

    pub fn post(&self, path: &str) -> Call {
        self.call(Method::POST, path, &self.operator_key)
    }

    pub fn put(&self, path: &str) -> Call {
        self.call(Method::PUT, path, &self.operator_key)
    }

    /// Defines this test's sale with one SKU `a` of so many units, and whatever else is given.
    pub async fn define(&self, stock: i64, others: Value) -> Reply {
        let mut definition = json!({"name": "Test", "skus": [{"sku": "a", "stock": stock}]});
        merge(&mut definition, others);
        let reply = self.put(&format!("/v1/sales/{}", self.sale)).json(definition).send().await;
        assert!(reply.status.is_success(), "{reply:?}");
        reply
    }

    /// Places an order of so many `a` for a buyer.
    pub async fn place(&self, buyer: &str, key: &str, quantity: u32) -> Reply {
        let body = json!({
            "sale_id": self.sale, "buyer_id": buyer, "lines": [{"sku": "a", "quantity": quantity}]
        });
        self.place_with(key, body).await
    }

    pub async fn place_with(&self, key: &str, body: Value) -> Reply {
        let call = self.call(Method::POST, "/v1/orders", &self.orders_key);
        call.header("Idempotency-Key", key).json(body).send().await
    }

    /// A hold of one `a`; its id.
    pub async fn hold(&self, buyer: &str) -> String {
        let reply = self.place(buyer, &unique("k"), 1).await;
        assert_eq!(reply.status, 201, "{reply:?}");
        reply.body["id"].as_str().unwrap().to_owned()
    }

    pub async fn confirm(&self, id: &str, payment: &str) -> Reply {
        let path = format!("/v1/orders/{id}/confirm");
        let call = self.call(Method::POST, &path, &self.orders_key);
        call.json(json!({"payment_id": payment})).send().await
    }

    pub async fn cancel(&self, id: &str) -> Reply {
        let path = format!("/v1/orders/{id}/cancel");
        self.call(Method::POST, &path, &self.orders_key).send().await
    }

    /// The counters of `a`: total, available, held, sold.
    pub async fn counters(&self) -> [i64; 4] {
        let reply = self.get(&format!("/v1/sales/{}/stock", self.sale)).send().await;
        ["total", "available", "held", "sold"]
            .map(|name| reply.body["skus"][0][name].as_i64().unwrap_or_else(|| panic!("{reply:?}")))
    }

    pub fn lane(&self) -> LaneId {
        LaneId { sale: self.sale.parse::<SaleId>().unwrap(), lane: 0 }
    }

    /// Records what has happened in this test's sale, as relay and writer do, without Kafka.
    pub async fn record(&self) {
        let lane = self.lane();
        let marks = self.lanes.marks(&lane).await.unwrap();
        let events = self.unrecorded().await;
        let Some(last) = events.last().map(|event| event.seq) else { return };
        let moved = LaneMove {
            lane: lane.clone(),
            epoch: marks.epoch,
            expected: marks.recorded,
            recorded: last,
            seal: None,
        };
        let batch = Batch { moves: vec![moved], events, ..Batch::default() };
        self.ledger.apply(&batch).await.unwrap();
        let epoch = marks.epoch;
        let reached = Reached { epoch, logged: last, recorded: last, acknowledged: last };
        let lease = Duration::from_secs(5);
        self.lanes.advance(&lane, reached, "test", lease).await.unwrap();
    }

    /// What has happened in this test's sale and is not recorded.
    pub async fn unrecorded(&self) -> Vec<Event> {
        let lane = self.lane();
        let marks = self.lanes.marks(&lane).await.unwrap();
        let from = (lane.clone(), marks.epoch, marks.recorded);
        let read = self.lanes.read_outboxes(&[from], 10_000, Duration::from_millis(1)).await;
        let secret = self.catalog.newest_secret().await.unwrap().unwrap();
        let entries = read.unwrap().into_iter().flat_map(|(_, entries)| entries);
        let events = entries.flat_map(|entry| outbox::events(&lane, &secret, &entry).unwrap());
        events.filter(|event| event.seq > marks.recorded).collect()
    }

    /// Records whatever happens while `work` goes on.
    pub async fn recording<T>(&self, work: impl Future<Output = T>) -> T {
        tokio::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return done,
                () = tokio::time::sleep(Duration::from_millis(5)) => self.record().await,
            }
        }
    }

    /// Closes the sale, records it, archives it and takes it out of Redis.
    pub async fn archive(&self) {
        let closed = self.post(&format!("/v1/sales/{}/close", self.sale)).send().await;
        assert_eq!(closed.status, 200, "{closed:?}");
        self.record().await;
        let archived = self.lanes.archive(&self.lane(), 0).await.unwrap().outcome;
        assert!(archived, "nothing is held or unrecorded");
        self.record().await;
        assert!(self.lanes.forget(&self.lane()).await.unwrap());
    }
}

async fn start(
    front: impl Front,
    options: ServeOptions,
    metrics: ConnectionMetrics,
    stop: &CancellationToken,
) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(serve(listener, front, options, metrics, stop.clone()));
    url
}

async fn add_key(ledger: &Ledger, name: &str, scope: Scope) -> String {
    let key = unique("hf");
    let sha256: [u8; 32] = Sha256::digest(key.as_bytes()).into();
    ledger.insert_key(&name.parse().unwrap(), scope, &sha256).await.unwrap();
    key
}

/// Puts the members of one object into another.
pub fn merge(into: &mut Value, others: Value) {
    let Value::Object(others) = others else { return };
    for (name, value) in others {
        into[name] = value;
    }
}

/// A request to be sent.
pub struct Call(reqwest::RequestBuilder);

impl Call {
    pub fn header(self, name: &str, value: &str) -> Self {
        Self(self.0.header(name, value))
    }

    pub fn json(self, body: Value) -> Self {
        Self(self.0.header("Content-Type", "application/json").body(body.to_string()))
    }

    pub fn body(self, content_type: &str, body: impl Into<reqwest::Body>) -> Self {
        Self(self.0.header("Content-Type", content_type).body(body))
    }

    pub fn untyped(self, body: impl Into<reqwest::Body>) -> Self {
        Self(self.0.body(body))
    }

    /// Status and body, whatever they are.
    pub async fn send_raw(self) -> (u16, String) {
        let response = self.0.send().await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    }

    pub async fn send(self) -> Reply {
        let response = self.0.send().await.unwrap();
        let (status, headers) = (response.status(), response.headers().clone());
        let text = response.text().await.unwrap();
        let body = serde_json::from_str(&text).unwrap_or(Value::Null);
        let reply = Reply { status, headers, body };
        reply.check_problem();
        reply
    }
}

#[derive(Debug)]
pub struct Reply {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Value,
}

impl Reply {
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    pub fn code(&self) -> &str {
        self.body["code"].as_str().unwrap_or("")
    }

    pub fn id(&self) -> &str {
        self.body["id"].as_str().unwrap_or_else(|| panic!("{self:?}"))
    }

    /// Status and code at once.
    #[track_caller]
    pub fn is(&self, status: u16, code: &str) {
        assert_eq!((self.status.as_u16(), self.code()), (status, code), "{self:?}");
    }

    /// Where an invalid request is wrong.
    pub fn pointers(&self) -> Vec<&str> {
        let errors = self.body["errors"].as_array().map(Vec::as_slice).unwrap_or_default();
        errors.iter().map(|error| error["pointer"].as_str().unwrap()).collect()
    }

    /// Every error answer of the API is a problem with all that the contract names.
    #[track_caller]
    fn check_problem(&self) {
        let readiness = self.body.get("code").is_none() && self.body.get("status").is_some();
        if !(self.status.is_client_error() || self.status.is_server_error()) || readiness {
            return;
        }
        assert_eq!(self.header("content-type"), "application/problem+json", "{self:?}");
        assert_eq!(self.body["status"], self.status.as_u16(), "{self:?}");
        for member in ["type", "title", "detail", "code"] {
            assert!(self.body[member].as_str().is_some_and(|text| !text.is_empty()), "{self:?}");
        }
        assert_eq!(self.body["trace_id"].as_str().map(str::len), Some(32), "{self:?}");
        let retry_after = [429, 503].contains(&self.status.as_u16());
        assert_eq!(retry_after, !self.header("retry-after").is_empty(), "{self:?}");
    }
}
