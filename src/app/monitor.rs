//! Keeps an eye on the servers: readiness, a line in the log when one comes or goes, and whether
//! Redis still has memory for new orders.

use std::time::Duration;

use crate::bus::producer::Producer;
use crate::lanes::Lanes;
use crate::ledger::Ledger;
use crate::telemetry::health::{Condition, Health, Part};

/// How often Redis is asked for its memory; a burst of orders takes longer to fill the share that
/// `lanes.memory_share_max` leaves.
const INTERVAL: Duration = Duration::from_millis(500);
/// How long a server may take to answer.
const PATIENCE: Duration = Duration::from_secs(2);

pub struct Watched {
    /// As it may be shown.
    pub redis_url: String,
    pub lanes: Lanes,
    pub ledger: Ledger,
    pub producer: Producer,
    pub health: Health,
}

/// Watches until dropped.
pub async fn run(watched: Watched) {
    let (mut warned, mut known) = (false, [Condition::Starting; 3]);
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let (redis, kafka, database) = tokio::join!(
            redis(&watched, &mut warned),
            answer(watched.producer.ping(PATIENCE)),
            answer(watched.ledger.ping()),
        );
        let parts = [(Part::Redis, redis), (Part::Kafka, kafka), (Part::Database, database)];
        for ((part, outcome), known) in parts.into_iter().zip(&mut known) {
            note(&watched.health, part, outcome, known);
        }
    }
}

async fn redis(watched: &Watched, warned: &mut bool) -> Result<(), String> {
    let server = match tokio::time::timeout(PATIENCE, watched.lanes.check_server()).await {
        Ok(server) => server.map_err(|error| error.to_string())?,
        Err(_) => return Err("no answer".into()),
    };
    if !*warned {
        *warned = true;
        let (version, url) = (&server.version, &watched.redis_url);
        let maxmemory = server.maxmemory_bytes;
        tracing::info!(version, url, maxmemory, policy = server.maxmemory_policy, "connected to Redis");
        for warning in server.warnings() {
            tracing::warn!("{warning}");
        }
    }
    Ok(())
}

async fn answer<E: std::fmt::Display>(ask: impl Future<Output = Result<(), E>>) -> Result<(), String> {
    match tokio::time::timeout(PATIENCE, ask).await {
        Ok(outcome) => outcome.map_err(|error| error.to_string()),
        Err(_) => Err("no answer".into()),
    }
}

fn note(health: &Health, part: Part, outcome: Result<(), String>, known: &mut Condition) {
    let (condition, detail) = match outcome {
        Ok(()) => (Condition::Up, String::new()),
        Err(detail) => (Condition::Down, detail),
    };
    // Until the schema is there and the first catalog read, an answer of the database is not
    // enough: `app` says when that is.
    let starting = *known == Condition::Starting;
    if starting && part != Part::Redis && health.is_starting(part) {
        return;
    }
    if !starting && *known != condition {
        match condition {
            Condition::Down => tracing::error!(?part, detail, "lost"),
            _ => tracing::info!(?part, "back"),
        }
    }
    *known = condition;
    health.set_part(part, condition, detail);
}
