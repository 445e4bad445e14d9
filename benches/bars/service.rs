//! Holdfast itself, the real binary on the real servers, with a schema and a topic of its own.

use std::collections::HashMap;
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions};
use rdkafka::client::DefaultClientContext;
use redis::ToRedisArgs;
use redis::aio::MultiplexedConnection;
use reqwest::{Client, Method};
use serde_json::{Value, json};

/// How Redis is set meanwhile. It does not rewrite its file by itself: a file of which a sale was just taken
/// out doubles every few seconds under this load, and would be rewritten as often. What a rewrite costs is
/// row 12; between the runs the file is made small. And it has room for five minutes' orders.
const REDIS: [(&str, &str); 2] = [("auto-aof-rewrite-percentage", "0"), ("maxmemory", "4gb")];
/// Some rows look at some roles alone, and nothing is recorded.
const UNRECORDED: [(&str, &str); 2] = [
    ("HOLDFAST_LANES__OUTBOX_EVENTS_MAX", "100000000"),
    ("HOLDFAST_LANES__PACE_FROM_EVENTS", "100000000"),
];
const PATIENCE: Duration = Duration::from_secs(120);

/// The servers, the schema and the keys that every run shares.
pub struct Deployment {
    settings: Vec<(String, String)>,
    pub orders_key: String,
    pub operator_key: String,
    pub redis: MultiplexedConnection,
    pub redis_pid: u32,
    /// What `REDIS` sets, as it was.
    redis_before: HashMap<String, String>,
    pub database: sqlx::PgPool,
    pub schema: String,
}

fn variable(name: &str) -> Result<String> {
    std::env::var(name).with_context(|| format!("{name} is not set: run ./dev bench"))
}

pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// Waits until `condition` is so.
pub async fn until(what: &str, mut condition: impl AsyncFnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !condition().await? {
        ensure!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

impl Deployment {
    pub async fn new() -> Result<Self> {
        Self::on(&variable("REDIS_URL")?, 0).await
    }

    /// On another Redis than the rest, which has so many replicas.
    pub async fn on(redis_url: &str, replicas: u32) -> Result<Self> {
        let database_url = variable("DATABASE_URL")?;
        let schema = format!("bench_{:016x}", rand::random::<u64>());
        let settings = [
            ("HOLDFAST_REDIS__URL", redis_url),
            ("HOLDFAST_REDIS__REPLICAS", &replicas.to_string()),
            ("HOLDFAST_DATABASE__URL", &database_url),
            ("HOLDFAST_DATABASE__SCHEMA", &schema),
            ("HOLDFAST_KAFKA__BROKERS", &variable("KAFKA_BROKERS")?),
            ("HOLDFAST_KAFKA__TOPIC", &schema),
            ("HOLDFAST_WRITER__GROUP", &schema),
        ];
        let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
        // The machine is as busy as it gets: what is asked meanwhile may wait.
        let patient = redis::AsyncConnectionConfig::new().set_response_timeout(Some(PATIENCE));
        let client = redis::Client::open(redis_url)?;
        let connecting = client.get_multiplexed_async_connection_with_config(&patient);
        let mut redis = connecting.await.context("Redis")?;
        let info: redis::InfoDict = redis::cmd("INFO").query_async(&mut redis).await?;
        let names = REDIS.map(|(name, _)| name);
        let before = redis::cmd("CONFIG").arg("GET").arg(&names).to_owned();
        let redis_before: HashMap<String, String> = before.query_async(&mut redis).await?;
        let options: sqlx::postgres::PgConnectOptions = database_url.parse()?;
        let database = sqlx::PgPool::connect_lazy_with(options.options([("search_path", &schema)]));
        let mut deployment = Self {
            settings,
            orders_key: String::new(),
            operator_key: String::new(),
            redis,
            redis_pid: info.get("process_id").context("INFO has no process_id")?,
            redis_before,
            database,
            schema,
        };
        deployment.run(&["migrate"]).await?;
        deployment.orders_key = deployment.create_key("orders").await?;
        deployment.operator_key = deployment.create_key("operator").await?;
        deployment.set_redis(REDIS).await?;
        Ok(deployment)
    }

    async fn create_key(&self, scope: &str) -> Result<String> {
        let key = self.run(&["keys", "create", "--name", scope, "--scope", scope]).await?;
        Ok(key.trim().to_owned())
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_holdfast"));
        command.args(arguments).envs(self.settings.iter().cloned());
        command
    }

    async fn run(&self, arguments: &[&str]) -> Result<String> {
        let output = self.command(arguments).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "holdfast {arguments:?}: {said}");
        Ok(String::from_utf8(output.stdout)?)
    }

    pub async fn serve(&self, roles: &str) -> Result<Service<'_>> {
        let (port, inner_port) = (free_port()?, free_port()?);
        let mut command = self.command(&["serve", "--roles", roles]);
        command
            .env("HOLDFAST_HTTP__LISTEN", format!("127.0.0.1:{port}"))
            .env("HOLDFAST_HTTP__INNER_LISTEN", format!("127.0.0.1:{inner_port}"))
            .stderr(Stdio::null());
        if !roles.contains("writer") {
            command.envs(UNRECORDED);
        }
        let service = Service {
            deployment: self,
            process: Process(command.spawn()?),
            url: format!("http://127.0.0.1:{port}"),
            client: Client::new(),
        };
        let readiness = format!("http://127.0.0.1:{inner_port}/readyz");
        until("the service is ready", async || {
            let answer = service.client.get(&readiness).send().await;
            Ok(answer.is_ok_and(|answer| answer.status() == 200))
        })
        .await?;
        Ok(service)
    }

    /// How many orders of a sale the database has.
    pub async fn orders(&self, sale: &str) -> Result<u64> {
        let count = sqlx::query_scalar("SELECT count(*) FROM orders WHERE sale_id = $1").bind(sale);
        let count: i64 = count.fetch_one(&self.database).await?;
        Ok(u64::try_from(count)?)
    }

    pub async fn used_memory(&self) -> Result<i64> {
        let info: redis::InfoDict = redis::cmd("INFO").query_async(&mut self.redis.clone()).await?;
        info.get("used_memory").context("INFO has no used_memory")
    }

    /// Whether Redis is rewriting its append-only file, or is about to.
    pub async fn rewrites(&self) -> Result<bool> {
        let info: redis::InfoDict =
            redis::cmd("INFO").arg("persistence").query_async(&mut self.redis.clone()).await?;
        let is_so = |name: &str| info.get::<i64>(name).context("INFO persistence").map(|n| n == 1);
        Ok(is_so("aof_rewrite_in_progress")? || is_so("aof_rewrite_scheduled")?)
    }

    async fn set_redis(
        &self,
        settings: impl IntoIterator<Item = (impl ToRedisArgs, impl ToRedisArgs)>,
    ) -> Result<()> {
        let mut set = redis::cmd("CONFIG");
        set.arg("SET");
        for (name, value) in settings {
            set.arg(name).arg(value);
        }
        Ok(set.exec_async(&mut self.redis.clone()).await?)
    }

    /// Takes a sale out of Redis, and out of its file: the next one needs the room.
    pub async fn forget(&self, sale: &str) -> Result<()> {
        let mut redis = self.redis.clone();
        let keys: Vec<String> =
            redis::cmd("KEYS").arg(format!("hf1:{{{sale}/*")).query_async(&mut redis).await?;
        if !keys.is_empty() {
            let _: i64 = redis::cmd("DEL").arg(keys).query_async(&mut redis).await?;
        }
        redis::cmd("BGREWRITEAOF").exec_async(&mut redis).await?;
        until("the file is rewritten", async || Ok(!self.rewrites().await?)).await
    }

    /// Leaves the servers as they were.
    pub async fn leave(&self) -> Result<()> {
        self.set_redis(&self.redis_before).await?;
        let drop = format!("DROP SCHEMA {} CASCADE", self.schema);
        sqlx::query(sqlx::AssertSqlSafe(drop)).execute(&self.database).await?;
        // Some gigabytes, after all rows.
        let mut kafka = ClientConfig::new();
        kafka.set("bootstrap.servers", variable("KAFKA_BROKERS")?);
        let admin: AdminClient<DefaultClientContext> = kafka.create()?;
        admin.delete_topics(&[&self.schema], &AdminOptions::new()).await?;
        Ok(())
    }
}

/// A lane's own word on how far it has got.
#[derive(Debug, Clone, Copy)]
pub struct Marks {
    pub seq: u64,
    pub recorded: u64,
}

/// A running process; killed when dropped.
pub struct Process(pub Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// A running Holdfast.
pub struct Service<'a> {
    pub deployment: &'a Deployment,
    process: Process,
    pub url: String,
    client: Client,
}

impl Service<'_> {
    pub fn pid(&self) -> u32 {
        self.process.0.id()
    }

    async fn call(&self, method: Method, path: &str, body: Option<Value>) -> Result<Value> {
        let request = self.client.request(method, format!("{}{path}", self.url));
        let mut request = request.bearer_auth(&self.deployment.operator_key);
        if let Some(body) = body {
            request = request.json(&body);
        }
        let answer = request.send().await?;
        let (status, body) = (answer.status(), answer.json::<Value>().await?);
        if !status.is_success() {
            bail!("{path}: {body}");
        }
        Ok(body)
    }

    /// A sale of one SKU, under a name of its own.
    pub async fn define(&self, stock: u64, hold_seconds: u64) -> Result<String> {
        let sale = format!("bench-{:016x}", rand::random::<u64>());
        let skus = json!([{"sku": "sku", "stock": stock}]);
        let definition = json!({"name": "bench", "hold_seconds": hold_seconds, "skus": skus});
        self.call(Method::PUT, &format!("/v1/sales/{sale}"), Some(definition)).await?;
        Ok(sale)
    }

    /// Units available and held.
    pub async fn stock(&self, sale: &str) -> Result<(u64, u64)> {
        let stock = self.call(Method::GET, &format!("/v1/sales/{sale}/stock"), None).await?;
        let units = |name: &str| stock["skus"][0][name].as_u64().context("a counter");
        Ok((units("available")?, units("held")?))
    }

    /// Places one order; its answer's status and body.
    pub async fn place(&self, sale: &str, buyer: &str) -> Result<(u16, String)> {
        self.place_at(sale, buyer, "memory").await
    }

    /// ... answered once it has got so far.
    pub async fn place_at(&self, sale: &str, buyer: &str, level: &str) -> Result<(u16, String)> {
        let lines = json!([{"sku": "sku", "quantity": 1}]);
        let answer = self
            .client
            .post(format!("{}/v1/orders", self.url))
            .bearer_auth(&self.deployment.orders_key)
            .header("Idempotency-Key", buyer)
            .header("Prefer", format!("durability={level}"))
            .json(&json!({"sale_id": sale, "buyer_id": buyer, "lines": lines}))
            .send()
            .await?;
        Ok((answer.status().as_u16(), answer.text().await?))
    }

    pub async fn marks(&self, sale: &str) -> Result<Marks> {
        let mut redis = self.deployment.redis.clone();
        let lane = format!("hf1:{{{sale}/0}}:lane");
        let mut read = redis::cmd("HMGET");
        let (seq, recorded) =
            read.arg(lane).arg(&["seq", "recorded"]).query_async(&mut redis).await?;
        Ok(Marks { seq, recorded })
    }

    pub async fn recorded(&self, sale: &str) -> Result<()> {
        until("all is recorded", async || {
            let marks = self.marks(sale).await?;
            Ok(marks.recorded >= marks.seq)
        })
        .await
    }
}
