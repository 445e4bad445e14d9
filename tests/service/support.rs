//! Starts the real binary against the real servers: each test has its own schema, topic, consumer
//! group and sales, so tests run in parallel.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use redis::AsyncCommands;
use reqwest::header::HeaderMap;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use sqlx::PgPool;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};

/// How long anything that must come about may take, on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The servers that `./dev test` has started, or a stack of the test's own.
#[derive(Clone)]
pub struct Servers {
    pub redis: String,
    pub kafka: String,
    pub database: String,
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: run ./dev test"))
}

impl Servers {
    pub fn shared() -> Self {
        Self {
            redis: variable("REDIS_URL"),
            kafka: variable("KAFKA_BROKERS"),
            database: variable("DATABASE_URL"),
        }
    }
}

/// Redis, Kafka and PostgreSQL of one test alone, for tests that take them away.
pub struct PrivateStack {
    home: PathBuf,
    port_base: u16,
    pub servers: Servers,
}

impl PrivateStack {
    pub fn start() -> Self {
        let port_base = free_port_range();
        let home =
            std::env::temp_dir().join(format!("holdfast-{}-{port_base}", std::process::id()));
        let servers = Servers {
            redis: format!("redis://127.0.0.1:{}", port_base + 2),
            kafka: format!("127.0.0.1:{}", port_base + 3),
            database: format!("postgres://holdfast@127.0.0.1:{}/holdfast", port_base + 4),
        };
        let stack = Self { home, port_base, servers };
        for name in ["redis", "kafka", "postgres"] {
            stack.dev(&["start", name]);
        }
        stack
    }

    /// SIGKILL of one server.
    pub fn kill(&self, name: &str) {
        self.dev(&["kill", name]);
    }

    pub fn start_again(&self, name: &str) {
        self.dev(&["start", name]);
    }

    fn dev(&self, arguments: &[&str]) {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("dev");
        let output = Command::new(script)
            .args(arguments)
            .env("HOLDFAST_HOME", &self.home)
            .env("HOLDFAST_PORT_BASE", self.port_base.to_string())
            .stdin(Stdio::null())
            .output()
            .expect("./dev runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "./dev {arguments:?}: {said}");
    }
}

impl Drop for PrivateStack {
    fn drop(&mut self) {
        self.dev(&["down"]);
        if let Err(error) = std::fs::remove_dir_all(&self.home) {
            eprintln!("{} stays: {error}", self.home.display());
        }
    }
}

fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("a bound socket has an address").port()
}

/// The first of six ports in a row that are free, below those that the system hands out.
fn free_port_range() -> u16 {
    let mut base = 20_000 + (rand::random::<u16>() % 1_000) * 10;
    while !(base..base + 6).all(|port| std::net::TcpListener::bind(("127.0.0.1", port)).is_ok()) {
        base += 10;
    }
    base
}

/// One deployment: a schema, a topic and keys, in which services run.
pub struct Deployment {
    pub servers: Servers,
    pub name: String,
    settings: Vec<(String, String)>,
    pub orders_key: String,
    pub operator_key: String,
}

impl Deployment {
    pub async fn new(servers: Servers) -> Self {
        Self::with(servers, &[]).await
    }

    /// A deployment whose services have these settings too.
    pub async fn with(servers: Servers, settings: &[(&str, &str)]) -> Self {
        let name = format!("test_{:016x}", rand::random::<u64>());
        let mut all = vec![
            ("HOLDFAST_REDIS__URL".into(), servers.redis.clone()),
            ("HOLDFAST_KAFKA__BROKERS".into(), servers.kafka.clone()),
            ("HOLDFAST_KAFKA__TOPIC".into(), name.clone()),
            ("HOLDFAST_WRITER__GROUP".into(), name.clone()),
            ("HOLDFAST_DATABASE__URL".into(), servers.database.clone()),
            ("HOLDFAST_DATABASE__SCHEMA".into(), name.clone()),
            ("HOLDFAST_DATABASE__CONNECTIONS_MAX".into(), "4".into()),
            ("HOLDFAST_SWEEPER__ARCHIVE_CHECK_MS".into(), "200".into()),
        ];
        all.extend(settings.iter().map(|(name, value)| ((*name).into(), (*value).into())));
        let mut deployment = Self {
            servers,
            name,
            settings: all,
            orders_key: String::new(),
            operator_key: String::new(),
        };
        deployment.run(&["migrate"]);
        deployment.orders_key = deployment.create_key("shop", "orders");
        deployment.operator_key = deployment.create_key("ops", "operator");
        deployment
    }

    /// For the services that start from now on.
    pub fn set(&mut self, name: &str, value: &str) {
        self.settings.push((name.into(), value.into()));
    }

    pub fn create_key(&self, name: &str, scope: &str) -> String {
        self.run(&["keys", "create", "--name", name, "--scope", scope]).trim().to_owned()
    }

    /// Runs the binary to its end and returns its standard output.
    pub fn run(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().expect("the binary runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "holdfast {arguments:?}: {said}");
        String::from_utf8(output.stdout).expect("text")
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_holdfast"));
        command.args(arguments).envs(self.settings.iter().cloned()).stdin(Stdio::null());
        command
    }

    /// Starts all roles and waits until they are ready.
    pub async fn serve(&self) -> Service<'_> {
        self.serve_roles("api,relay,writer,sweeper,reconciler").await
    }

    pub async fn serve_roles(&self, roles: &str) -> Service<'_> {
        let (port, inner_port) = (free_port(), free_port());
        let child = self
            .command(&["serve", "--roles", roles])
            .env("HOLDFAST_HTTP__LISTEN", format!("127.0.0.1:{port}"))
            .env("HOLDFAST_HTTP__INNER_LISTEN", format!("127.0.0.1:{inner_port}"))
            .spawn()
            .expect("the binary runs");
        let service = Service {
            deployment: self,
            child,
            url: format!("http://127.0.0.1:{port}"),
            inner_url: format!("http://127.0.0.1:{inner_port}"),
            client: reqwest::Client::new(),
        };
        let ready = async || {
            let answer = service.client.get(format!("{}/readyz", service.inner_url)).send().await;
            answer.is_ok_and(|answer| answer.status() == StatusCode::OK)
        };
        eventually("the service is ready", ready).await;
        service
    }

    pub async fn database(&self) -> PgPool {
        let options: PgConnectOptions = self.servers.database.parse().expect("a database URL");
        let options = options.options([("search_path", &self.name)]);
        PgPoolOptions::new().max_connections(2).connect_with(options).await.expect("the database")
    }
}

/// Waits until `condition` holds; panics with `what` if it does not in time.
pub async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition().await {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A running process of the service; killed when dropped.
pub struct Service<'a> {
    pub deployment: &'a Deployment,
    child: Child,
    pub url: String,
    pub inner_url: String,
    client: reqwest::Client,
}

impl Drop for Service<'_> {
    fn drop(&mut self) {
        self.kill();
    }
}

pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Value,
}

impl Answer {
    pub fn code(&self) -> &str {
        self.body["code"].as_str().unwrap_or_default()
    }

    pub fn id(&self) -> &str {
        self.body["id"].as_str().unwrap_or_else(|| panic!("no id in {}", self.body))
    }
}

/// SIGKILL of a process that somebody else waits for.
pub fn sigkill(pid: u32) {
    let sent = Command::new("kill").args(["-KILL", &pid.to_string()]).status().expect("kill runs");
    assert!(sent.success());
}

impl Service<'_> {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The names of its threads, and their niceness, proc(5).
    pub fn threads(&self) -> Vec<(String, i32)> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid())).expect("it runs");
        let stats =
            tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("stat")).ok());
        let thread = |stat: String| {
            let (name, rest) = stat.split_once('(')?.1.rsplit_once(')')?;
            Some((name.to_owned(), rest.split_whitespace().nth(16)?.parse().ok()?))
        };
        stats.map(|stat| thread(stat).expect("a line of /proc/PID/task/TID/stat")).collect()
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        // An error says that it has ended already.
        if self.child.kill().is_ok() {
            self.child.wait().expect("a killed child ends");
        }
    }

    /// SIGTERM, then the exit code and how long it took.
    pub async fn terminate(mut self) -> (Option<i32>, Duration) {
        let started = Instant::now();
        let pid = self.child.id().to_string();
        let sent = Command::new("kill").args(["-TERM", &pid]).status().expect("kill runs");
        assert!(sent.success());
        let mut code = None;
        eventually("the service ends after SIGTERM", async || match self.child.try_wait() {
            Ok(Some(status)) => {
                code = Some(status.code());
                true
            }
            _ => false,
        })
        .await;
        (code.flatten(), started.elapsed())
    }

    /// One request; `None` if it was not answered.
    pub async fn try_send(
        &self,
        method: Method,
        path: &str,
        key: &str,
        idempotency_key: Option<&str>,
        body: Option<&Value>,
    ) -> Option<Answer> {
        let mut request = self.client.request(method, format!("{}{path}", self.url));
        request = request.bearer_auth(key).timeout(Duration::from_secs(15));
        if let Some(idempotency_key) = idempotency_key {
            request = request.header("Idempotency-Key", idempotency_key);
        }
        if let Some(body) = body {
            request = request.json(body);
        }
        let answer = request.send().await.ok()?;
        let (status, headers) = (answer.status(), answer.headers().clone());
        let body = answer.bytes().await.ok()?;
        let body =
            if body.is_empty() { Value::Null } else { serde_json::from_slice(&body).ok()? };
        Some(Answer { status, headers, body })
    }

    pub async fn get(&self, path: &str) -> Answer {
        let key = &self.deployment.operator_key;
        self.try_send(Method::GET, path, key, None, None).await.expect("an answer")
    }

    pub async fn operate(&self, method: Method, path: &str, body: Value) -> Answer {
        let key = &self.deployment.operator_key;
        let body = (!body.is_null()).then_some(&body);
        self.try_send(method, path, key, None, body).await.expect("an answer")
    }

    pub async fn post(&self, path: &str, body: Value) -> Answer {
        let key = &self.deployment.orders_key;
        self.try_send(Method::POST, path, key, None, Some(&body)).await.expect("an answer")
    }

    /// Defines a sale of one SKU, `sku`, and returns its id.
    pub async fn define(&self, stock: u64, members: Value) -> String {
        let id = format!("sale-{:08x}", rand::random::<u32>());
        let mut definition = json!({"name": "test", "skus": [{"sku": "sku", "stock": stock}]});
        let more = members.as_object().expect("members of a definition").clone();
        definition.as_object_mut().expect("an object").extend(more);
        let answer = self.operate(Method::PUT, &format!("/v1/sales/{id}"), definition).await;
        assert_eq!(answer.status, StatusCode::CREATED, "{}", answer.body);
        id
    }

    pub async fn try_order(
        &self,
        sale: &str,
        buyer: &str,
        key: &str,
        units: u32,
    ) -> Option<Answer> {
        let lines = json!([{"sku": "sku", "quantity": units}]);
        let body = json!({"sale_id": sale, "buyer_id": buyer, "lines": lines});
        let orders_key = &self.deployment.orders_key;
        self.try_send(Method::POST, "/v1/orders", orders_key, Some(key), Some(&body)).await
    }

    pub async fn order(&self, sale: &str, buyer: &str, key: &str, units: u32) -> Answer {
        self.try_order(sale, buyer, key, units).await.expect("an answer")
    }

    pub async fn adjust(&self, sale: &str, key: &str, delta: i64) -> Answer {
        let body = json!({"delta": delta, "reason": "recount"});
        let path = format!("/v1/sales/{sale}/stock/sku/adjustments");
        let operator_key = &self.deployment.operator_key;
        self.try_send(Method::POST, &path, operator_key, Some(key), Some(&body))
            .await
            .expect("an answer")
    }

    /// The counters of `sku` as the lane has them: (total, available, held, sold).
    pub async fn stock(&self, sale: &str) -> [i64; 4] {
        let answer = self.get(&format!("/v1/sales/{sale}/stock")).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.body);
        ["total", "available", "held", "sold"]
            .map(|name| answer.body["skus"][0][name].as_i64().expect("a counter"))
    }

    /// Waits until the database has all that happened, then checks I1, I2, I3 and I5 against Redis
    /// and returns the recorded orders as (id, status). Nothing may happen any more: no hold may be
    /// about to run out.
    pub async fn balanced_books(&self, sale: &str) -> Vec<(String, String)> {
        let database = self.deployment.database().await;
        let redis = redis::Client::open(self.deployment.servers.redis.as_str()).expect("a URL");
        let mut redis = redis.get_multiplexed_async_connection().await.expect("Redis");
        let lane = format!("hf1:{{{sale}/0}}:lane");
        let seq: i64 = redis.hget(&lane, "seq").await.expect("the lane's seq");
        eventually("the database has all that happened", async || {
            let recorded: i64 = sqlx::query_scalar("SELECT recorded FROM lanes WHERE sale_id = $1")
                .bind(sale)
                .fetch_one(&database)
                .await
                .expect("the lane's row");
            recorded >= seq
        })
        .await;
        let [total, available, held, sold] = self.stock(sale).await;
        let counters: (i64, i64, i64, i64) = sqlx::query_as(
            "SELECT total, available, held, sold FROM counters WHERE sale_id = $1 AND sku = 'sku'",
        )
        .bind(sale)
        .fetch_one(&database)
        .await
        .expect("counters");
        assert_eq!(counters, (total, available, held, sold), "database = Redis");
        assert_eq!(total, available + held + sold, "I1");
        assert!(available >= 0 && held >= 0 && sold >= 0, "I1");

        let fold: (i64, i64, i64) = sqlx::query_as(
            "SELECT sum(available)::bigint, sum(held)::bigint, sum(sold)::bigint FROM ledger WHERE sale_id = $1",
        )
        .bind(sale)
        .fetch_one(&database)
        .await
        .expect("the ledger");
        assert_eq!(fold, (available, held, sold), "I2");

        let (recorded, events, last): (i64, i64, i64) = sqlx::query_as(
            "SELECT (SELECT recorded FROM lanes WHERE sale_id = $1), count(DISTINCT seq), max(seq)
             FROM ledger WHERE sale_id = $1",
        )
        .bind(sale)
        .fetch_one(&database)
        .await
        .expect("the ledger");
        assert_eq!((recorded, events), (last, last), "I5: no gap and no repeat");

        let units: (i64, i64) = sqlx::query_as(
            "SELECT coalesce(sum(units) FILTER (WHERE status = 'held'), 0)::bigint,
                    coalesce(sum(units) FILTER (WHERE status = 'confirmed'), 0)::bigint
             FROM (SELECT status, (line ->> 'quantity')::bigint AS units
                   FROM orders, jsonb_array_elements(lines) AS line WHERE sale_id = $1) AS each",
        )
        .bind(sale)
        .fetch_one(&database)
        .await
        .expect("orders");
        assert_eq!(units, (held, sold), "I3: the orders hold and bought what the counters say");
        sqlx::query_as("SELECT id, status FROM orders WHERE sale_id = $1")
            .bind(sale)
            .fetch_all(&database)
            .await
            .expect("orders")
    }
}
