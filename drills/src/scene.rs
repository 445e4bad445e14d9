//! One drill's deployment: a Redis, a schema, a topic and service processes of its own, a sale, and
//! callers that press on it while the drill does its harm.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, bail};
use sqlx::PgPool;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};

use crate::books::{self, Books, lane_key};
use crate::history::{Entry, History, Outcome, Request, now_ms};
use crate::parts::{Clock, Redis, Service, Stack, eventually, run, run_to_death};
use crate::proxy::Proxy;
use crate::workload::{Asks, Callee, definition};

/// Answers before the first fault, and after the last.
const SETTLED: u64 = 60;

/// How much of everything: the short selection does less of the same.
#[derive(Debug, Clone)]
pub struct Extent {
    pub seed: u64,
    /// How often a drill repeats its fault.
    pub times: u32,
    /// How long a server stays away.
    pub away: Duration,
    /// How long a drill may take.
    pub longest: Duration,
}

/// What a drill starts from.
#[derive(Default)]
pub struct Layout {
    /// The service's processes: name and roles. The callers ask those with the role `api`.
    pub services: &'static [(&'static str, &'static str)],
    pub settings: &'static [(&'static str, &'static str)],
    /// Options of `redis-server`, beside ours.
    pub redis: &'static [&'static str],
    /// Has a replica of Redis, which calls wait for where they ask for `replicated`.
    pub replica: bool,
    /// What durability callers ask for.
    pub asks: Asks,
    /// Redis and the service's process `sweeper` have clocks of their own, which can be set.
    pub clocks: bool,
    /// The server, of PostgreSQL and Kafka, that has a small disk to itself.
    pub small_disk: Option<&'static str>,
}

/// The wall clocks that a drill may set.
pub struct Clocks {
    pub redis: Clock,
    pub sweeper: Clock,
}

/// One fault: from when to when, and when all was well again.
#[derive(Debug, Clone, Copy)]
pub struct Fault {
    pub began_ms: i64,
    pub mended_ms: i64,
    pub recovered_ms: i64,
}

pub struct Scene<'a> {
    pub extent: Extent,
    pub stack: &'a Stack,
    pub redis: Redis,
    pub clocks: Option<Clocks>,
    pub replica: Option<Redis>,
    pub to_redis: Proxy,
    /// What the replica replicates through.
    pub to_primary: Proxy,
    pub to_postgres: Proxy,
    pub database: PgPool,
    pub topic: String,
    pub sale: String,
    pub callee: Arc<Callee>,
    settings: Vec<(String, String)>,
    services: Vec<Service>,
    binary: PathBuf,
    /// A replica of the promoted replica.
    second: Mutex<Option<Redis>>,
    forgot_ms: Mutex<Option<i64>>,
    faults: Mutex<Vec<Fault>>,
    bites: Mutex<BTreeMap<&'static str, f64>>,
}

impl Clocks {
    fn of(binary: &Path, home: &Path) -> anyhow::Result<Self> {
        // It is built beside the service.
        let library = binary.with_file_name("libholdfast_drills_clock.so");
        let clock = |name| Clock::new(library.clone(), home.join("clocks").join(name));
        Ok(Self { redis: clock("redis")?, sweeper: clock("sweeper")? })
    }
}

impl<'a> Scene<'a> {
    pub async fn set(
        stack: &'a Stack,
        binary: &Path,
        name: &str,
        extent: &Extent,
        layout: &Layout,
        history: Arc<History>,
    ) -> anyhow::Result<Self> {
        // A run of its own, whatever an earlier one of the same seed left behind.
        let run_name = format!("{}_{:x}", name.replace('-', "_"), now_ms());
        let options = [&["--appendfsync", "everysec"], layout.redis].concat();
        let clocks = if layout.clocks { Some(Clocks::of(binary, &stack.home)?) } else { None };
        let clock = clocks.as_ref().map(|clocks| &clocks.redis);
        let port = stack.port_base + 2;
        let redis = Redis::start(&stack.home, "primary", port, &options, clock).await?;
        let to_primary = Proxy::start(redis.port).await?;
        let replica = if layout.replica {
            Some(replica_of(stack, "replica", stack.port_base + 6, to_primary.port).await?)
        } else {
            None
        };
        let to_redis = Proxy::start(redis.port).await?;
        let to_postgres = Proxy::start(stack.postgres_port()).await?;
        let webhook_secret = "whsec_ZHJpbGxzIHNpZ24gd2l0aCB0aGlzIHNlY3JldCE=".to_owned();
        let database_url = |port| format!("postgres://holdfast@127.0.0.1:{port}/holdfast");
        let mut settings: Vec<(String, String)> = [
            ("REDIS__URL", format!("redis://127.0.0.1:{}", to_redis.port)),
            ("REDIS__REPLICAS", u8::from(layout.replica).to_string()),
            ("KAFKA__BROKERS", stack.brokers()),
            ("KAFKA__TOPIC", run_name.clone()),
            ("KAFKA__PARTITIONS", "3".into()),
            ("WRITER__GROUP", run_name.clone()),
            ("DATABASE__URL", database_url(to_postgres.port)),
            ("DATABASE__SCHEMA", run_name.clone()),
            ("DATABASE__CONNECTIONS_MAX", "4".into()),
            ("RECONCILER__PAUSE_MS", "500".into()),
            ("PAYMENTS__WEBHOOK_SECRETS", format!("[\"{webhook_secret}\"]")),
        ]
        .map(|(name, value)| (format!("HOLDFAST_{name}"), value))
        .into();
        settings.extend(
            layout
                .settings
                .iter()
                .map(|(name, value)| (format!("HOLDFAST_{name}"), (*value).to_owned())),
        );
        run(binary, &settings, &["migrate"]).await?;
        let key = async |scope| {
            run(binary, &settings, &["keys", "create", "--name", scope, "--scope", scope]).await
        };
        let keys = [key("orders").await?, key("operator").await?, webhook_secret];
        let options: PgConnectOptions = database_url(stack.postgres_port()).parse()?;
        let options = options.options([("search_path", run_name.as_str())]);
        let database = PgPoolOptions::new()
            .max_connections(2)
            .acquire_timeout(Duration::from_secs(3))
            .connect_lazy_with(options);
        let mut services = Vec::new();
        for (name, roles) in layout.services {
            let mut settings = settings.clone();
            if let Some(clocks) = clocks.as_ref().filter(|_| *name == "sweeper") {
                settings.extend(clocks.sweeper.variables());
            }
            services.push(Service::start(stack, binary, name, roles, &settings).await?);
        }
        let urls = layout.services.iter().zip(&services);
        let urls = urls.filter(|((_, roles), _)| roles.contains("api"));
        let urls = urls.map(|(_, service)| service.url.clone()).collect();
        let sale = name.to_owned();
        let callee = Arc::new(Callee::new(urls, keys, sale.clone(), layout.asks, history));
        let define = Request::Define { sale: sale.clone(), definition: definition(0) };
        let reply = callee.send("operator", 0, &define, None).await;
        if reply.outcome != Outcome::Ok {
            bail!("the sale could not be defined: {reply:?}");
        }
        Ok(Self {
            extent: extent.clone(),
            stack,
            redis,
            clocks,
            replica,
            to_redis,
            to_primary,
            to_postgres,
            database,
            topic: run_name,
            sale,
            callee,
            settings,
            services,
            binary: binary.into(),
            second: Mutex::default(),
            forgot_ms: Mutex::default(),
            faults: Mutex::default(),
            bites: Mutex::default(),
        })
    }

    pub fn history(&self) -> &History {
        &self.callee.history
    }

    pub fn service(&self, name: &str) -> &Service {
        let mut services = self.services.iter();
        services.find(|service| service.name == name).expect("a service of the drill's layout")
    }

    /// One more process of the service, which no caller asks.
    pub async fn another(&self, name: &str, roles: &str) -> anyhow::Result<Service> {
        Service::start(self.stack, &self.binary, name, roles, &self.settings).await
    }

    /// All processes of the layout, after they were stopped.
    pub async fn start_services(&self) -> anyhow::Result<()> {
        for service in &self.services {
            service.start_again().await?;
        }
        Ok(())
    }

    /// A replica of the Redis at this port, for as long as the scene lasts.
    pub async fn add_replica(&self, primary: u16) -> anyhow::Result<()> {
        let port = self.stack.port_base + 7;
        let second = replica_of(self.stack, "second", port, primary).await?;
        *self.second.lock().expect("no panic") = Some(second);
        Ok(())
    }

    /// Runs the service's command line to its end.
    pub async fn holdfast(&self, arguments: &[&str]) -> anyhow::Result<String> {
        run(&self.binary, &self.settings, arguments).await
    }

    /// The same, but it kills itself at its passing of this point.
    pub async fn holdfast_dies(&self, arguments: &[&str], at: (&str, u32)) -> anyhow::Result<()> {
        run_to_death(&self.binary, &self.settings, arguments, at).await
    }

    /// Redis is gone, and what it had answered by now may be gone with it.
    pub fn forgets(&self) {
        *self.forgot_ms.lock().expect("no panic") = Some(now_ms());
    }

    /// When it last forgot something.
    pub fn forgot_ms(&self) -> Option<i64> {
        *self.forgot_ms.lock().expect("no panic")
    }

    /// Says that the fault did its harm: what was seen of it, and how much.
    pub fn bit(&self, what: &'static str, how_much: f64) {
        if how_much > 0.0 {
            *self.bites.lock().expect("no panic").entry(what).or_default() += how_much;
        }
    }

    pub fn bites(&self) -> BTreeMap<&'static str, f64> {
        self.bites.lock().expect("no panic").clone()
    }

    pub fn faults(&self) -> Vec<Fault> {
        self.faults.lock().expect("no panic").clone()
    }

    /// Waits for so many more answers that are 2xx.
    pub async fn answered(&self, more: u64) -> anyhow::Result<()> {
        let goal = self.history().ok() + more;
        eventually(&format!("{more} more answers"), async || self.history().ok() >= goal).await
    }

    pub async fn settled(&self) -> anyhow::Result<()> {
        self.answered(SETTLED).await
    }

    /// Waits until all parts have found the sale: what happens is recorded.
    pub async fn flows(&self) -> anyhow::Result<()> {
        let seq = self.mark("seq").await?;
        eventually("events are recorded", async || {
            self.recorded().await.is_ok_and(|recorded| recorded >= seq)
        })
        .await
    }

    /// Requests that began after this moment and whose outcome their callers do not know.
    pub fn unknown_since(&self, since_ms: i64) -> usize {
        self.history().count_since(since_ms, |entry| entry.reply.outcome == Outcome::Unknown)
    }

    /// ... and that were refused with this code.
    pub fn refused_since(&self, since_ms: i64, code: &str) -> usize {
        self.history().count_since(since_ms, |entry| entry.reply.code.as_deref() == Some(code))
    }

    /// New orders that were sent and held since then: no replays, which sell nothing.
    pub fn newly_placed_since(&self, since_ms: i64) -> usize {
        self.history().count_since(since_ms, |entry| {
            entry.sent_ms >= since_ms
                && entry.reply.outcome == Outcome::Ok
                && !entry.reply.replayed
                && matches!(entry.request, Request::Place { .. })
        })
    }

    /// A mark of the lane, as Redis has it.
    pub async fn mark(&self, name: &str) -> anyhow::Result<i64> {
        let mut ask = redis::cmd("HGET");
        let mark: Option<i64> =
            self.redis_now().ask(ask.arg(lane_key(&self.sale, "lane")).arg(name)).await?;
        mark.with_context(|| format!("the lane has no {name}"))
    }

    /// The Redis that the service talks to now.
    fn redis_now(&self) -> &Redis {
        match &self.replica {
            Some(replica) if self.to_redis.leads_to() == replica.port => replica,
            _ => &self.redis,
        }
    }

    /// How far the database has got with the lane.
    pub async fn recorded(&self) -> anyhow::Result<i64> {
        let recorded = sqlx::query_scalar("SELECT recorded FROM lanes WHERE sale_id = $1");
        Ok(recorded.bind(&self.sale).fetch_one(&self.database).await?)
    }

    /// A fault begins; `mended` ends it.
    pub fn fault(&self) -> i64 {
        now_ms()
    }

    /// The cause is gone; waits until new orders are held again and all that had happened by then is
    /// recorded.
    pub async fn mended(&self, began_ms: i64) -> anyhow::Result<()> {
        self.mended_from(began_ms, now_ms()).await
    }

    /// The same, where the cause was gone a while ago.
    pub async fn mended_from(&self, began_ms: i64, mended_ms: i64) -> anyhow::Result<()> {
        eventually("the lane can be read", async || self.mark("seq").await.is_ok()).await?;
        let seq = self.mark("seq").await?;
        eventually("new orders are held again", async || self.newly_placed_since(mended_ms) > 0)
            .await?;
        eventually("all that had happened is recorded", async || {
            self.recorded().await.is_ok_and(|recorded| recorded >= seq)
        })
        .await?;
        let fault = Fault { began_ms, mended_ms, recovered_ms: now_ms() };
        self.faults.lock().expect("no panic").push(fault);
        Ok(())
    }

    /// Closes the sale for good, and waits until new orders are refused for it while what was sold before is
    /// settled all the same.
    pub async fn closed(&self) -> anyhow::Result<()> {
        let close = Request::Close { sale: self.sale.clone() };
        let urls = self.callee.urls.len();
        let mut attempt = 0;
        eventually("the sale is closed", async || {
            attempt += 1;
            let reply = self.callee.send("operator", attempt % urls, &close, None).await;
            reply.outcome == Outcome::Ok
        })
        .await?;
        let closed = now_ms();
        eventually("new orders are refused, and others settled", async || {
            let settled = self.history().count_since(closed, |entry| {
                entry.request.settles() && entry.reply.outcome == Outcome::Ok
            });
            settled > 0 && self.refused_since(closed, "sale-closed") > 0
        })
        .await
    }

    /// Waits until nothing is held and everything is recorded; the callers have stopped.
    pub async fn drained(&self) -> anyhow::Result<()> {
        eventually("nothing is held and everything is recorded", async || {
            let Ok(lane) = books::lane(&self.redis_now().url(), &self.sale).await else {
                return false;
            };
            if lane.stock.values().any(|counters| counters.held > 0) {
                return false;
            }
            // What ended the last hold may have come after the mark that was read with the lane.
            let Ok(seq) = self.mark("seq").await else { return false };
            self.recorded().await.is_ok_and(|recorded| recorded >= seq)
        })
        .await
    }

    /// A process that ended without being told to is no drill's wish.
    pub fn ended(&self) -> Option<String> {
        self.services.iter().find_map(Service::ended)
    }

    pub fn stop_services(&self) {
        self.services.iter().for_each(Service::kill);
    }

    pub async fn books(&self) -> anyhow::Result<Books> {
        let lane = books::lane(&self.redis_now().url(), &self.sale).await.context("Redis")?;
        let (brokers, topic, sale) = (self.stack.brokers(), self.topic.clone(), self.sale.clone());
        let topic = tokio::task::spawn_blocking(move || books::topic(&brokers, &topic, &sale))
            .await?
            .context("Kafka")?;
        let database = books::database(&self.database, &self.sale).await.context("PostgreSQL")?;
        Ok(Books { lane, topic, database })
    }
}

/// Returns when it has all that the primary has.
async fn replica_of(stack: &Stack, name: &str, port: u16, primary: u16) -> anyhow::Result<Redis> {
    let options = ["--appendfsync", "everysec", "--replicaof", "127.0.0.1", &primary.to_string()];
    let replica = Redis::start(&stack.home, name, port, &options, None).await?;
    eventually("the replica follows", async || {
        let link = replica.info_word("replication", "master_link_status").await;
        link.is_ok_and(|link| link == "up")
    })
    .await?;
    Ok(replica)
}

/// Seen by callers: the first answer that says so, or that never came.
pub fn noticed_ms(history: &[Entry], fault: &Fault) -> Option<i64> {
    let bad = history.iter().filter(|entry| {
        let answered = entry.answered_ms;
        let down = entry.reply.status.is_none_or(|status| status >= 500);
        down && answered >= fault.began_ms && answered <= fault.recovered_ms
    });
    bad.map(|entry| entry.answered_ms - fault.began_ms).min()
}
