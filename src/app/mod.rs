//! Which roles run, how they start and how they end.
//!
//! Start: the listeners first (readiness says `starting`), then each server is connected to, for as
//! long as it takes. End, at SIGTERM: stop accepting and answer what is in flight; send what is
//! queued for lanes; let the relay wait for its deliveries; let the writer commit its batch.

pub mod dead_letters;
mod front;
pub mod keys;
mod monitor;
pub mod rebuild;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use prometheus_client::registry::Registry;
use serde::Deserialize;
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use self::front::Front;
use crate::admission::Admission;
use crate::bus::producer::Producer;
use crate::bus::{BusError, topic};
use crate::config::{self, Config, millis, redact_url};
use crate::domain::names::{KeyName, SaleId};
use crate::domain::sale::Definition;
use crate::http::{self, Api, ConnectionMetrics, ServeOptions};
use crate::lanes::Lanes;
use crate::ledger::catalog::{Catalog, CatalogMetrics};
use crate::ledger::{Ledger, LedgerError};
use crate::reconciler::Reconciler;
use crate::reconciler::rebuild::Recovery;
use crate::relay::Relay;
use crate::sweeper::Sweeper;
use crate::telemetry::health::{Condition, Health, Part};
use crate::telemetry::log;
use crate::witness::Witness;
use crate::writer::{Writer, WriterMetrics};

/// Who is named as the one who did what was asked for on the command line.
const COMMAND_LINE: &str = "command-line";
/// How long an unreachable server is left alone before it is tried again: at first, and at most,
/// after doubling.
const RETRY_MIN: Duration = Duration::from_millis(250);
const RETRY_MAX: Duration = Duration::from_secs(5);
/// How long each role may take to end, after those before it.
const ROLE_END_MAX: Duration = Duration::from_millis(1_500);
/// ... and all of it together: below the ten seconds that supervisors commonly wait.
const END_MAX: Duration = Duration::from_secs(9);

/// A part of the service that can run in a process of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Role {
    Api,
    Relay,
    Writer,
    Sweeper,
    Reconciler,
}

impl Role {
    const fn as_str(self) -> &'static str {
        match self {
            Role::Api => "api",
            Role::Relay => "relay",
            Role::Writer => "writer",
            Role::Sweeper => "sweeper",
            Role::Reconciler => "reconciler",
        }
    }

    const fn talks_to_lanes(self) -> bool {
        !matches!(self, Role::Writer)
    }
}

/// Brings the schema up to date.
pub async fn migrate(config: &Config) -> anyhow::Result<()> {
    log::start(&config.telemetry)?;
    let ledger = Ledger::new(&config.database)?;
    ledger.migrate().await?;
    tracing::info!(schema = config.database.schema, "the database is up to date");
    Ok(())
}

/// What `holdfast sale apply` reads.
#[derive(Deserialize)]
struct SaleFile {
    id: SaleId,
    #[serde(flatten)]
    definition: serde_json::Value,
}

/// Defines or redefines a sale from a JSON or TOML file and prints its definition.
pub async fn apply_sale(config: &Config, file: &Path) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
    let sale: SaleFile = if file.extension().is_some_and(|extension| extension == "toml") {
        toml::from_str(&text)?
    } else {
        serde_json::from_str(&text)?
    };
    let definition: Definition = serde_json::from_value(sale.definition)?;
    let definition = definition.check().map_err(|errors| {
        anyhow!("{}", errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))
    })?;
    let mut service = Service::new(config.clone(), &[], Handle::current())?;
    let actor: KeyName = COMMAND_LINE.parse()?;
    let applied = service.api().define(sale.id.clone(), definition, actor).await;
    let applied = applied.map_err(|problem| anyhow!("{problem}"))?;
    let what = if applied.created { "defined" } else { "applied" };
    println!("{} {what}, version {}", sale.id, applied.version);
    Ok(())
}

/// Runs the roles until SIGTERM or SIGINT, or until one of them fails.
///
/// # Errors
/// Why a role failed: a server that is merely unreachable is no reason.
pub async fn serve(config: Config, roles: &[Role]) -> anyhow::Result<()> {
    log::start(&config.telemetry)?;
    // As far as the system lets it; http.connections_max is the bound that we set ourselves.
    if let Err(error) = rlimit::increase_nofile_limit(rlimit::INFINITY) {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
    // Until the very end: what was begun on its threads is waited for elsewhere.
    let front = roles.contains(&Role::Api).then(|| Front::start(&config.runtime)).transpose()?;
    let runtime = front.as_ref().map_or_else(Handle::current, |front| front.handle().clone());
    Service::new(config, roles, runtime)?.run(roles).await
}

/// The handles that roles share.
struct Service {
    config: Config,
    /// Where callers are answered and lanes are called.
    front: Handle,
    registry: Registry,
    health: Health,
    ledger: Ledger,
    /// For what callers ask of the database: it takes none of the connections that all else needs.
    front_ledger: Ledger,
    lanes: Lanes,
    catalog: Catalog,
    producer: Producer,
    recovery: Recovery,
    /// Of a process that talks to lanes.
    witness: Option<Witness>,
}

/// One token a stage of the end, in this order.
#[derive(Clone, Default)]
struct Stages {
    front: CancellationToken,
    witness: CancellationToken,
    relay: CancellationToken,
    writer: CancellationToken,
    rest: CancellationToken,
}

impl Service {
    fn new(config: Config, roles: &[Role], front: Handle) -> anyhow::Result<Self> {
        let mut registry = Registry::default();
        let health = Health::new(roles.iter().map(|role| role.as_str()));
        let ledger = Ledger::new(&config.database)?;
        let front_ledger = Ledger::new(&config.database)?;
        let lanes = Lanes::new(&config.redis, &config.lanes, &mut registry)?;
        let lanes = lanes.combining_on(front.clone());
        let metrics = CatalogMetrics::register(&mut registry);
        let catalog = Catalog::new(ledger.clone(), &config.catalog, metrics);
        let producer = Producer::new(&config.kafka)?;
        let recovery =
            Recovery::new(lanes.clone(), ledger.clone(), catalog.clone(), &config, &mut registry);
        let witness = roles.iter().any(|role| role.talks_to_lanes()).then(|| {
            let roles = roles.iter().map(|role| role.as_str()).collect();
            let (lanes, ledger) = (lanes.clone(), ledger.clone());
            Witness::new(lanes, ledger, config.witness.clone(), roles, &mut registry)
        });
        Ok(Self {
            config,
            front,
            registry,
            health,
            ledger,
            front_ledger,
            lanes,
            catalog,
            producer,
            recovery,
            witness,
        })
    }

    async fn run(mut self, wanted: &[Role]) -> anyhow::Result<()> {
        let stages = Stages::default();
        let mut signals = Signals::new()?;
        // Whoever needs the schema or the topic waits for these.
        let (migrated, topic) = (watch::Sender::new(false), watch::Sender::new(false));
        let mut roles = self.spawn_roles(wanted, &stages, &migrated, &topic).await?;
        let mut background = self.spawn_background(&stages, migrated, topic);
        background.spawn(self.inner_listener().await?);

        let failure = tokio::select! {
            () = signals.next() => None,
            error = roles.failure(&self.health) => Some(error),
            error = failure(&mut background) => Some(error),
        };
        self.health.drain();
        if let Some(error) = &failure {
            tracing::error!("{error:#}");
        }
        tracing::info!("draining");
        self.drain(&stages, &mut roles).await;
        stages.rest.cancel();
        background.shutdown().await;
        tracing::info!("ended");
        failure.map_or(Ok(()), Err)
    }

    async fn spawn_roles(
        &mut self,
        wanted: &[Role],
        stages: &Stages,
        migrated: &watch::Sender<bool>,
        topic: &watch::Sender<bool>,
    ) -> anyhow::Result<Roles> {
        let mut roles = Roles::default();
        for role in wanted {
            self.health.set_role(role.as_str(), Condition::Up, "");
            match role {
                Role::Api => {
                    let front = http::public(self.api());
                    let options = ServeOptions::new(&self.config.http);
                    let listening = listen("http.listen", self.config.http.listen);
                    let listener = self.front.spawn(listening).await??;
                    let metrics = ConnectionMetrics::register(&mut self.registry);
                    let token = stages.front.clone();
                    let serving = http::serve(listener, front, options, metrics, token);
                    let serving = self.front.spawn(serving);
                    roles.spawn(Role::Api, async move { Ok(serving.await?) });
                }
                Role::Sweeper => {
                    let sweeper = Sweeper::new(
                        self.lanes.clone(),
                        self.catalog.clone(),
                        self.config.sweeper.clone(),
                        &mut self.registry,
                    );
                    let token = stages.front.clone();
                    roles.spawn(Role::Sweeper, async move {
                        sweeper.run(token).await;
                        Ok(())
                    });
                }
                Role::Reconciler => {
                    let reconciler = Reconciler::new(
                        self.lanes.clone(),
                        self.ledger.clone(),
                        self.catalog.clone(),
                        self.config.reconciler.clone(),
                        &mut self.registry,
                    );
                    let (recovery, token) = (self.recovery.clone(), stages.front.clone());
                    let (migrated, topic) = (migrated.subscribe(), topic.subscribe());
                    roles.spawn(Role::Reconciler, async move {
                        if wait(migrated, &token).await && wait(topic, &token).await {
                            tokio::join!(reconciler.run(token.clone()), recovery.run(token));
                        }
                        Ok(())
                    });
                }
                Role::Relay => {
                    let relay = Relay::new(
                        self.lanes.clone(),
                        self.catalog.clone(),
                        self.ledger.clone(),
                        self.producer.clone(),
                        &self.config,
                        &mut self.registry,
                    );
                    let (token, topic) = (stages.relay.clone(), topic.subscribe());
                    roles.spawn(Role::Relay, async move {
                        if wait(topic, &token).await {
                            relay.run(token).await?;
                        }
                        Ok(())
                    });
                }
                Role::Writer => {
                    let metrics = WriterMetrics::register(&mut self.registry);
                    let writer = Writer::new((&self.config).into(), self.ledger.clone(), metrics);
                    let token = stages.writer.clone();
                    let (migrated, topic) = (migrated.subscribe(), topic.subscribe());
                    roles.spawn(Role::Writer, async move {
                        if wait(migrated, &token).await && wait(topic, &token).await {
                            writer.run(token).await?;
                        }
                        Ok(())
                    });
                }
            }
        }
        Ok(roles)
    }

    fn api(&mut self) -> Api {
        let admission = Admission::new(&self.config.admission, &mut self.registry);
        Api::new(
            self.lanes.clone(),
            self.front_ledger.clone(),
            self.catalog.clone(),
            self.recovery.clone(),
            admission,
            self.health.clone(),
            http::Options::new(&self.config),
            &mut self.registry,
        )
    }

    /// The listener for the inside; it answers until the very end.
    async fn inner_listener(
        &mut self,
    ) -> anyhow::Result<impl Future<Output = anyhow::Result<()>> + use<>> {
        let registry = Arc::new(std::mem::take(&mut self.registry));
        let front = http::inside(self.health.clone(), registry);
        let listener = listen("http.inner_listen", self.config.http.inner_listen).await?;
        let options = ServeOptions::new(&self.config.http);
        let never = CancellationToken::new();
        Ok(async move {
            let metrics = ConnectionMetrics::default();
            http::serve(listener, front, options, metrics, never).await;
            Ok(())
        })
    }

    /// Connections, the catalog and the watch over servers. One that ends with an error ends the
    /// process: its server is there, but not as we need it.
    fn spawn_background(
        &self,
        stages: &Stages,
        migrated: watch::Sender<bool>,
        topic: watch::Sender<bool>,
    ) -> JoinSet<anyhow::Result<()>> {
        let mut background = JoinSet::new();
        background.spawn(connect_database(
            self.config.database.clone(),
            self.ledger.clone(),
            self.catalog.clone(),
            self.witness.clone(),
            self.health.clone(),
            migrated,
            stages.clone(),
        ));
        background.spawn(connect_kafka(self.config.kafka.clone(), self.health.clone(), topic));
        background.spawn(monitor::run(monitor::Watched {
            redis_url: redact_url(&self.config.redis.url),
            replicas: self.config.redis.replicas,
            lanes: self.lanes.clone(),
            ledger: self.ledger.clone(),
            producer: self.producer.clone(),
            health: self.health.clone(),
        }));
        background
    }

    async fn drain(&self, stages: &Stages, roles: &mut Roles) {
        let end = Instant::now() + END_MAX;
        let within = |most: Duration| end.min(Instant::now() + most);
        stages.front.cancel();
        let listeners = millis(self.config.http.drain_timeout_ms) + ROLE_END_MAX;
        roles.end(within(listeners), &[Role::Api, Role::Sweeper, Role::Reconciler]).await;
        // What it has seen of lanes is forgotten with their queues: it must not answer that it saw nothing.
        stages.witness.cancel();
        if let Some(witness) = &self.witness
            && !matches!(timeout_at(within(ROLE_END_MAX / 3), witness.leave()).await, Ok(Ok(())))
        {
            tracing::debug!("this process counts as there until its signs have stayed away");
        }
        if timeout_at(within(ROLE_END_MAX), self.lanes.drain()).await.is_err() {
            tracing::warn!("commands were still queued for lanes; their callers got no answer");
        }
        stages.relay.cancel();
        roles.end(within(ROLE_END_MAX), &[Role::Relay]).await;
        let flush_max = within(ROLE_END_MAX / 3) - Instant::now();
        if let Err(error) = self.producer.flush(flush_max).await {
            tracing::warn!(%error, "not all events reached Kafka; the next relay sends them");
        }
        stages.writer.cancel();
        roles.end(within(ROLE_END_MAX), &[Role::Writer]).await;
    }
}

/// SIGTERM and SIGINT.
struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

async fn listen(setting: &str, address: SocketAddr) -> anyhow::Result<TcpListener> {
    let listener =
        TcpListener::bind(address).await.with_context(|| format!("{setting} = {address}"))?;
    tracing::info!(%address, setting, "listening");
    Ok(listener)
}

/// Waits for `ready`; false if the process ends first.
async fn wait(mut ready: watch::Receiver<bool>, end: &CancellationToken) -> bool {
    tokio::select! {
        () = end.cancelled() => false,
        outcome = ready.wait_for(|ready| *ready) => outcome.is_ok(),
    }
}

/// The roles that run.
#[derive(Default)]
struct Roles {
    tasks: JoinSet<(Role, anyhow::Result<()>)>,
    left: Vec<Role>,
}

impl Roles {
    fn spawn(
        &mut self,
        role: Role,
        task: impl Future<Output = anyhow::Result<()>> + Send + 'static,
    ) {
        self.left.push(role);
        self.tasks.spawn(async move { (role, task.await) });
    }

    /// Waits until one ends before it was asked to, and says why the process must end with it.
    async fn failure(&mut self, health: &Health) -> anyhow::Error {
        match self.tasks.join_next().await {
            Some(Ok((role, outcome))) => {
                self.left.retain(|left| *left != role);
                let error = outcome.err().unwrap_or_else(|| anyhow!("it ended by itself"));
                health.set_role(role.as_str(), Condition::Down, error.to_string());
                error.context(format!("role {}", role.as_str()))
            }
            Some(Err(panic)) => anyhow!(panic).context("a role panicked"),
            None => std::future::pending().await,
        }
    }

    /// Waits until none of `these` runs any more, or `deadline` is there.
    async fn end(&mut self, deadline: Instant, these: &[Role]) {
        let all = async {
            while self.left.iter().any(|role| these.contains(role)) {
                match self.tasks.join_next().await {
                    Some(Ok((role, outcome))) => {
                        self.left.retain(|left| *left != role);
                        if let Err(error) = outcome {
                            tracing::warn!("role {}: {error:#}", role.as_str());
                        }
                    }
                    Some(Err(panic)) => tracing::error!("a role panicked: {panic}"),
                    None => return,
                }
            }
        };
        if timeout_at(deadline, all).await.is_err() {
            tracing::warn!(
                ?these,
                "did not end in time; nothing is lost, the next process goes on"
            );
        }
    }
}

/// Waits until something in the background fails. What ends in order is no failure.
async fn failure(background: &mut JoinSet<anyhow::Result<()>>) -> anyhow::Error {
    loop {
        match background.join_next().await {
            Some(Ok(Ok(()))) => {}
            Some(Ok(Err(error))) => return error,
            Some(Err(panic)) => return anyhow!(panic).context("a background task panicked"),
            None => std::future::pending().await,
        }
    }
}

/// Brings the schema up to date, then keeps the catalog fresh, and answers for this process.
async fn connect_database(
    config: config::Database,
    ledger: Ledger,
    catalog: Catalog,
    witness: Option<Witness>,
    health: Health,
    migrated: watch::Sender<bool>,
    stages: Stages,
) -> anyhow::Result<()> {
    let mut retry = Retry::new("PostgreSQL");
    // Without the catalog nobody talks to a lane.
    let prepare = async || {
        ledger.migrate().await?;
        match &witness {
            Some(witness) => witness.heartbeat().await,
            None => Ok(()),
        }
    };
    loop {
        match prepare().await {
            Ok(()) => break,
            Err(error @ LedgerError::Unavailable(_)) => retry.after(&error).await,
            Err(error) => return Err(error.into()),
        }
    }
    let version = ledger.server_version().await.unwrap_or_default();
    let (url, schema) = (redact_url(&config.url), &config.schema);
    tracing::info!(version, url, schema, "connected to PostgreSQL");
    if let Err(error) = catalog.refresh().await {
        tracing::warn!(%error, "the catalog could not be read");
    }
    health.set_part(Part::Database, Condition::Up, version);
    migrated.send_replace(true);
    let testify = async {
        if let Some(witness) = &witness {
            witness.run(stages.witness).await;
        }
    };
    tokio::join!(catalog.run(stages.rest), testify);
    Ok(())
}

/// Makes the topic where it is missing, and says what about it endangers the events.
async fn connect_kafka(
    config: config::Kafka,
    health: Health,
    ready: watch::Sender<bool>,
) -> anyhow::Result<()> {
    let mut retry = Retry::new("Kafka");
    let warnings = loop {
        match topic::prepare(&config).await {
            Ok(warnings) => break warnings,
            Err(error @ BusError::Unavailable(_)) => {
                health.set_part(Part::Kafka, Condition::Down, error.to_string());
                retry.after(&error).await;
            }
            Err(error) => return Err(error.into()),
        }
    };
    let (brokers, topic) = (&config.brokers, &config.topic);
    tracing::info!(brokers, topic, "connected to Kafka");
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    health.set_part(Part::Kafka, Condition::Up, "");
    ready.send_replace(true);
    Ok(())
}

/// The pause before an unreachable server is tried again.
struct Retry {
    server: &'static str,
    pause: Duration,
}

impl Retry {
    fn new(server: &'static str) -> Self {
        Self { server, pause: RETRY_MIN }
    }

    async fn after(&mut self, error: &(dyn std::error::Error + Sync)) {
        tracing::warn!("{} is not there yet, trying again: {error}", self.server);
        tokio::time::sleep(self.pause).await;
        self.pause = (self.pause * 2).min(RETRY_MAX);
    }
}
