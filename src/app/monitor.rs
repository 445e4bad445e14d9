//! Keeps an eye on the servers: readiness, a line in the log when one comes or goes, and whether
//! Redis, and the outboxes in it, still have room for new orders.

use std::time::Duration;

use crate::bus::producer::Producer;
use crate::lanes::Lanes;
use crate::ledger::Ledger;
use crate::telemetry::health::{Condition, Health, Part};

/// How often Redis is asked for its memory and the outboxes'; a burst of orders takes longer to fill the
/// share that `lanes.memory_share_max` leaves.
const INTERVAL: Duration = Duration::from_millis(500);
/// How long a server may take to answer.
const PATIENCE: Duration = Duration::from_secs(2);

pub struct Watched {
    /// As it may be shown.
    pub redis_url: String,
    /// Replicas that Redis should have.
    pub replicas: u32,
    pub lanes: Lanes,
    pub ledger: Ledger,
    pub producer: Producer,
    pub health: Health,
}

/// Watches until dropped.
pub async fn run(watched: Watched) -> anyhow::Result<()> {
    let (mut warned, mut known) = (false, [None; 3]);
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        watched.lanes.prune();
        let (redis, kafka, database) = tokio::join!(
            redis(&watched, &mut warned),
            answer(watched.producer.ping(PATIENCE)),
            answer(watched.ledger.ping()),
        );
        let parts = [(Part::Redis, redis), (Part::Kafka, kafka), (Part::Database, database)];
        for ((part, outcome), up) in parts.into_iter().zip(&mut known) {
            note(&watched.health, part, outcome, up);
        }
    }
}

async fn redis(watched: &Watched, warned: &mut bool) -> Result<String, String> {
    let server = match tokio::time::timeout(PATIENCE, watched.lanes.check_server()).await {
        Ok(server) => server.map_err(|error| error.to_string())?,
        Err(_) => return Err("no answer".into()),
    };
    if !*warned {
        *warned = true;
        let (version, url) = (&server.version, &watched.redis_url);
        let maxmemory = server.maxmemory_bytes;
        tracing::info!(
            version,
            url,
            maxmemory,
            policy = server.maxmemory_policy,
            "connected to Redis"
        );
        for warning in server.warnings(watched.replicas) {
            tracing::warn!("{warning}");
        }
    }
    if let Err(error) = watched.lanes.check_outboxes().await {
        tracing::debug!(%error, "the size of the outboxes could not be read");
    }
    Ok(server.version)
}

async fn answer<E: std::fmt::Display>(
    ask: impl Future<Output = Result<(), E>>,
) -> Result<String, String> {
    match tokio::time::timeout(PATIENCE, ask).await {
        Ok(outcome) => outcome.map(|()| String::new()).map_err(|error| error.to_string()),
        Err(_) => Err("no answer".into()),
    }
}

fn note(health: &Health, part: Part, outcome: Result<String, String>, up: &mut Option<bool>) {
    // Kafka and the database are not there before `app` has made topic and schema; Redis needs
    // nothing but an answer.
    if part != Part::Redis && health.is_starting(part) {
        return;
    }
    let is_up = outcome.is_ok();
    if up.is_some_and(|up| up != is_up) {
        match &outcome {
            Ok(_) => tracing::info!(?part, "back"),
            Err(detail) => tracing::error!(?part, detail, "lost"),
        }
    }
    *up = Some(is_up);
    match outcome {
        Ok(detail) => health.set_part(part, Condition::Up, detail),
        Err(detail) => health.set_part(part, Condition::Down, detail),
    }
}
