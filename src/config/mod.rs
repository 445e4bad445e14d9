//! The configuration: `config/default.toml` (compiled in), then a file, then `HOLDFAST_…`
//! variables. One struct a concern; each checks its own ranges.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::net::SocketAddr;
use std::path::Path;
use std::thread::available_parallelism;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use figment::Figment;
use figment::providers::{Env, Format, Toml};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::domain::durability::Durability;

const DEFAULTS: &str = include_str!("../../config/default.toml");
const ENV_PREFIX: &str = "HOLDFAST_";
const ENV_SEPARATOR: &str = "__";
/// Variables with our prefix that are no settings: the ones `./dev` reads or prints.
const ENV_OTHERS: [&str; 13] = [
    "CONFIG",
    "DEV",
    "HOME",
    "INNER_URL",
    "LOAD_DIR",
    "OPERATOR_KEY",
    "ORDERS_KEY",
    "PORT_BASE",
    "REDIS_MAXMEMORY",
    "TEST_PORT_BASE",
    "TOOLS",
    "URL",
    "WEBHOOK_SECRET",
];

/// Why the configuration cannot be used; each message names the setting.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("{0}")]
    Read(Box<figment::Error>),
    #[error("configuration file {0} does not exist")]
    NoFile(String),
    #[error("{0} is not a setting; settings are HOLDFAST_<SECTION>__<SETTING>")]
    UnknownVariable(String),
    #[error("{0}")]
    Impossible(String),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub http: Http,
    pub admission: Admission,
    pub payments: Payments,
    pub redis: Redis,
    pub lanes: Lanes,
    pub kafka: Kafka,
    pub relay: Relay,
    pub database: Database,
    pub catalog: Catalog,
    pub writer: Writer,
    pub sweeper: Sweeper,
    pub reconciler: Reconciler,
    pub witness: Witness,
    pub telemetry: Telemetry,
    pub runtime: Runtime,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Runtime {
    pub worker_threads: usize,
    pub front_niceness: i32,
}

impl Runtime {
    /// As many as set, else one a core.
    pub fn worker_threads(&self) -> usize {
        match self.worker_threads {
            0 => available_parallelism().map_or(1, usize::from),
            threads => threads,
        }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Http {
    pub listen: SocketAddr,
    pub inner_listen: SocketAddr,
    pub header_timeout_ms: u64,
    pub idle_timeout_ms: u64,
    pub body_timeout_ms: u64,
    pub request_timeout_ms: u64,
    pub write_timeout_ms: u64,
    pub drain_timeout_ms: u64,
    pub connections_max: usize,
    pub view_age_max_ms: u64,
    pub durability: Durability,
    pub durability_timeout_ms: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Admission {
    pub in_flight_max: usize,
    pub trusted_proxies: Vec<IpNet>,
    pub address_per_second: u32,
    pub address_burst: u32,
    pub key_per_second: u32,
    pub key_burst: u32,
    pub buyer_per_second: u32,
    pub buyer_burst: u32,
    pub remembered_max: usize,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Payments {
    pub webhook_secrets: Vec<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Redis {
    pub url: String,
    pub response_timeout_ms: u64,
    pub connect_timeout_ms: u64,
    pub pool_max: usize,
    pub replicas: u32,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lanes {
    pub batch_max: usize,
    pub batch_lines_max: usize,
    pub queue_max: usize,
    pub outbox_events_max: u64,
    pub outbox_bytes_max: u64,
    pub pace_from_events: u64,
    pub pace_rate_min: u64,
    pub told_max: usize,
    pub memory_share_max: f64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kafka {
    pub brokers: String,
    pub topic: String,
    pub partitions: i32,
    pub replication: i32,
    pub properties: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Relay {
    pub read_max: usize,
    pub in_flight_max: usize,
    pub poll_ms: u64,
    pub lease_ms: u64,
    pub stall_ms: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Database {
    pub url: String,
    pub schema: String,
    pub connections_max: u32,
    pub acquire_timeout_ms: u64,
    pub statement_timeout_ms: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Catalog {
    pub refresh_ms: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Writer {
    pub group: String,
    pub batch_max: usize,
    pub batch_age_ms: u64,
    pub parked_max: usize,
    pub dead_letters_kept_days: u32,
    pub dead_letters_max: usize,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sweeper {
    pub batch_max: usize,
    pub archive_check_ms: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reconciler {
    pub pause_ms: u64,
    pub time_share_max: f64,
    pub page_max: usize,
    pub page_pause_ms: u64,
    pub orders_max: usize,
    pub events_max: u64,
    pub kept_days: u32,
    pub look_ms: u64,
    pub recoveries_max: usize,
    pub recovery_chunk: usize,
    pub recovery_wait_ms: u64,
    pub recovery_retry_ms: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Witness {
    pub gone_after_ms: u64,
    pub kept_days: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Telemetry {
    pub log: String,
    pub log_format: LogFormat,
}

/// A setting in milliseconds as a duration.
pub const fn millis(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

impl Config {
    /// Reads the defaults, then `file`, then the environment.
    ///
    /// # Errors
    /// A setting that is unknown, of the wrong type or out of range, by its name.
    pub fn load(file: Option<&Path>) -> Result<Self, ConfigError> {
        for (name, _) in std::env::vars_os() {
            check_variable(&name.to_string_lossy())?;
        }
        let mut figment = Figment::from(Toml::string(DEFAULTS));
        if let Some(file) = file {
            if !file.exists() {
                return Err(ConfigError::NoFile(file.display().to_string()));
            }
            figment = figment.merge(Toml::file_exact(file));
        }
        let env = Env::prefixed(ENV_PREFIX)
            .filter(|name| name.as_str().contains(ENV_SEPARATOR))
            .split(ENV_SEPARATOR);
        Self::read(figment.merge(env))
    }

    fn read(figment: Figment) -> Result<Self, ConfigError> {
        let config: Self = figment.extract().map_err(|e| ConfigError::Read(Box::new(e)))?;
        config.check().map_err(ConfigError::Impossible)?;
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        let http = &self.http;
        range("runtime.worker_threads", self.runtime.worker_threads, 0, 256)?;
        range("runtime.front_niceness", self.runtime.front_niceness, 0, 19)?;
        range("http.header_timeout_ms", http.header_timeout_ms, 1, 60_000)?;
        range("http.idle_timeout_ms", http.idle_timeout_ms, 1, 3_600_000)?;
        range("http.body_timeout_ms", http.body_timeout_ms, 1, 60_000)?;
        range("http.write_timeout_ms", http.write_timeout_ms, 1_000, 600_000)?;
        range("http.connections_max", http.connections_max, 1, 1_000_000)?;
        range("http.drain_timeout_ms", http.drain_timeout_ms, 0, 5_000)?;
        range("http.request_timeout_ms", http.request_timeout_ms, 1, 120_000)?;
        range("http.view_age_max_ms", http.view_age_max_ms, 0, 250)?;
        range("http.durability_timeout_ms", http.durability_timeout_ms, 1, 60_000)?;
        let admission = &self.admission;
        range("admission.in_flight_max", admission.in_flight_max, 1, 1_000_000)?;
        for (name, rate) in [
            ("admission.address_per_second", admission.address_per_second),
            ("admission.address_burst", admission.address_burst),
            ("admission.key_per_second", admission.key_per_second),
            ("admission.key_burst", admission.key_burst),
            ("admission.buyer_per_second", admission.buyer_per_second),
            ("admission.buyer_burst", admission.buyer_burst),
        ] {
            range(name, rate, 1, 10_000_000)?;
        }
        for secret in &self.payments.webhook_secrets {
            if !is_webhook_secret(secret) {
                return Err(
                    "payments.webhook_secrets has one that is not whsec_ and base64 of 24-64 bytes"
                        .into(),
                );
            }
        }
        range("admission.remembered_max", admission.remembered_max, 1_000, 100_000_000)?;
        range("redis.response_timeout_ms", self.redis.response_timeout_ms, 10, 60_000)?;
        range("redis.connect_timeout_ms", self.redis.connect_timeout_ms, 10, 60_000)?;
        range("redis.pool_max", self.redis.pool_max, 2, 1_000)?;
        range("redis.replicas", self.redis.replicas, 0, 16)?;
        let lanes = &self.lanes;
        range("lanes.batch_max", lanes.batch_max, 1, 256)?;
        range("lanes.batch_lines_max", lanes.batch_lines_max, 64, 2_000)?;
        range("lanes.queue_max", lanes.queue_max, 1, 1_000_000)?;
        range("lanes.outbox_events_max", lanes.outbox_events_max, 1_000, 100_000_000)?;
        range("lanes.outbox_bytes_max", lanes.outbox_bytes_max, 1 << 16, 1 << 40)?;
        range("lanes.pace_from_events", lanes.pace_from_events, 1_000, 100_000_000)?;
        range("lanes.pace_rate_min", lanes.pace_rate_min, 1_000, 1_000_000)?;
        range("lanes.told_max", lanes.told_max, 0, 10_000_000)?;
        range("lanes.memory_share_max", lanes.memory_share_max, 0.1, 1.0)?;
        range("kafka.partitions", self.kafka.partitions, 1, 1_000)?;
        range("kafka.replication", self.kafka.replication, 1, 10)?;
        let relay = &self.relay;
        range("relay.read_max", relay.read_max, 1, 10_000)?;
        range("relay.in_flight_max", relay.in_flight_max, 1, 150_000)?;
        range("relay.poll_ms", relay.poll_ms, 1, 10_000)?;
        range("relay.lease_ms", relay.lease_ms, 1_000, 60_000)?;
        range("relay.stall_ms", relay.stall_ms, 100, 600_000)?;
        let database = &self.database;
        range("database.connections_max", database.connections_max, 2, 1_000)?;
        range("database.acquire_timeout_ms", database.acquire_timeout_ms, 10, 60_000)?;
        range("database.statement_timeout_ms", database.statement_timeout_ms, 10, 600_000)?;
        range("catalog.refresh_ms", self.catalog.refresh_ms, 100, 10_000)?;
        let writer = &self.writer;
        range("writer.batch_max", writer.batch_max, 1, 10_000)?;
        range("writer.batch_age_ms", writer.batch_age_ms, 1, 10_000)?;
        range("writer.parked_max", writer.parked_max, 1, 10_000_000)?;
        range("writer.dead_letters_kept_days", writer.dead_letters_kept_days, 1, 3_650)?;
        range("writer.dead_letters_max", writer.dead_letters_max, 1, 10_000_000)?;
        range("sweeper.batch_max", self.sweeper.batch_max, 1, 256)?;
        range("sweeper.archive_check_ms", self.sweeper.archive_check_ms, 100, 3_600_000)?;
        let reconciler = &self.reconciler;
        range("reconciler.pause_ms", reconciler.pause_ms, 10, 3_600_000)?;
        range("reconciler.time_share_max", reconciler.time_share_max, 0.001, 1.0)?;
        range("reconciler.page_max", reconciler.page_max, 10, 200)?;
        range("reconciler.page_pause_ms", reconciler.page_pause_ms, 0, 1_000)?;
        range("reconciler.orders_max", reconciler.orders_max, 1_000, 100_000_000)?;
        range("reconciler.events_max", reconciler.events_max, 1_000, 10_000_000)?;
        range("reconciler.kept_days", reconciler.kept_days, 1, 3_650)?;
        range("reconciler.look_ms", reconciler.look_ms, 10, 60_000)?;
        range("reconciler.recoveries_max", reconciler.recoveries_max, 1, 64)?;
        range("reconciler.recovery_chunk", reconciler.recovery_chunk, 10, 2_000)?;
        range("reconciler.recovery_wait_ms", reconciler.recovery_wait_ms, 1_000, 86_400_000)?;
        range("reconciler.recovery_retry_ms", reconciler.recovery_retry_ms, 100, 3_600_000)?;
        range("witness.gone_after_ms", self.witness.gone_after_ms, 2_000, 60_000)?;
        range("witness.kept_days", self.witness.kept_days, 1, 3_650)?;
        Ok(())
    }

    /// The effective configuration as TOML, passwords and the like replaced by `***`.
    pub fn to_redacted_toml(&self) -> String {
        let mut shown = self.clone();
        shown.redis.url = redact_url(&shown.redis.url);
        shown.database.url = redact_url(&shown.database.url);
        shown.payments.webhook_secrets.fill("***".to_owned());
        for (name, value) in &mut shown.kafka.properties {
            let name = name.to_ascii_lowercase();
            if ["password", "secret", "key.pem", "sasl.oauthbearer.config"]
                .iter()
                .any(|word| name.contains(word))
            {
                *value = "***".to_owned();
            }
        }
        toml::to_string(&shown).expect("plain settings are always TOML")
    }
}

/// A variable with our prefix must be a setting or one that `./dev` uses: a misspelt one would
/// otherwise be ignored in silence.
fn check_variable(name: &str) -> Result<(), ConfigError> {
    let Some(rest) = name.strip_prefix(ENV_PREFIX) else { return Ok(()) };
    if rest.contains(ENV_SEPARATOR) || ENV_OTHERS.contains(&rest) {
        return Ok(());
    }
    Err(ConfigError::UnknownVariable(name.to_owned()))
}

/// As Standard Webhooks has them.
fn is_webhook_secret(secret: &str) -> bool {
    let decoded = secret.strip_prefix("whsec_").map(|encoded| STANDARD.decode(encoded));
    decoded.is_some_and(|bytes| bytes.is_ok_and(|bytes| (24..=64).contains(&bytes.len())))
}

fn range<T: PartialOrd + Display>(name: &str, value: T, low: T, high: T) -> Result<(), String> {
    if value >= low && value <= high {
        Ok(())
    } else {
        Err(format!("{name} = {value} is impossible: it must be {low} to {high}"))
    }
}

/// Replaces the password in `scheme://user:password@host` and in a `password=` parameter.
pub fn redact_url(url: &str) -> String {
    let (base, query) = url.split_once('?').map_or((url, None), |(b, q)| (b, Some(q)));
    let mut shown = match (base.split_once("://"), base.rfind('@')) {
        (Some((scheme, _)), Some(at)) if at > scheme.len() => {
            let credentials = &base[scheme.len() + 3..at];
            let user = credentials.split_once(':').map(|(user, _)| user);
            match user {
                Some(user) => format!("{scheme}://{user}:***{}", &base[at..]),
                None => base.to_owned(),
            }
        }
        _ => base.to_owned(),
    };
    if let Some(query) = query {
        let parameters: Vec<_> = query
            .split('&')
            .map(|parameter| match parameter.split_once('=') {
                Some((name, _)) if name.contains("password") => format!("{name}=***"),
                _ => parameter.to_owned(),
            })
            .collect();
        shown = format!("{shown}?{}", parameters.join("&"));
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(toml: &str) -> Result<Config, ConfigError> {
        Config::read(Figment::from(Toml::string(DEFAULTS)).merge(Toml::string(toml)))
    }

    #[test]
    fn the_documented_defaults_are_a_valid_configuration() {
        with("").unwrap();
    }

    #[test]
    fn there_is_a_thread_whatever_the_machine_and_as_many_as_are_set() {
        assert!(with("").unwrap().runtime.worker_threads() >= 1);
        let three = with("[runtime]\nworker_threads = 3").unwrap();
        assert_eq!(three.runtime.worker_threads(), 3);
    }

    #[test]
    fn an_unknown_setting_is_named() {
        let error = with("[redis]\nurll = \"x\"").unwrap_err().to_string();
        assert!(error.contains("urll"), "{error}");
    }

    #[test]
    fn an_impossible_setting_is_named() {
        let error = with("[lanes]\nbatch_max = 0").unwrap_err().to_string();
        assert!(error.contains("lanes.batch_max = 0"), "{error}");
        let error = with("[http]\nlisten = \"nowhere\"").unwrap_err().to_string();
        assert!(error.contains("listen"), "{error}");
    }

    #[test]
    fn a_webhook_secret_that_anybody_could_guess_is_refused() {
        let secret = |text: &str| with(&format!("[payments]\nwebhook_secrets = [\"{text}\"]"));
        assert!(secret("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").is_ok());
        for weak in ["", "whsec_", "whsec_c2hvcnQ=", "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"] {
            assert!(secret(weak).unwrap_err().to_string().contains("payments.webhook_secrets"));
        }
    }

    #[test]
    fn a_misspelt_variable_is_named() {
        assert!(check_variable("HOLDFAST_REDIS__URL").is_ok());
        assert!(check_variable("HOLDFAST_HOME").is_ok());
        let error = check_variable("HOLDFAST_REDIS_URL").unwrap_err().to_string();
        assert!(error.contains("HOLDFAST_REDIS_URL"), "{error}");
    }

    #[test]
    fn secrets_are_not_shown() {
        let mut config = with("").unwrap();
        config.redis.url = "rediss://u:pa@ss@host:6380/1".into();
        config.database.url = "postgres://u:hush@host/db?sslpassword=quiet&sslmode=require".into();
        config.payments.webhook_secrets = vec!["whsec_hidden".into()];
        config.kafka.properties.insert("sasl.password".into(), "psst".into());
        let shown = config.to_redacted_toml();
        for secret in ["pa@ss", "hush", "quiet", "psst", "hidden"] {
            assert!(!shown.contains(secret), "{shown}");
        }
        assert!(shown.contains("host:6380/1") && shown.contains("sslmode=require"));
    }
}
