//! How the process and the servers it needs are doing: written by `app`, read by the readiness
//! endpoints.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use chrono::{DateTime, SecondsFormat, Utc};
use serde::{Serialize, Serializer};

/// A server that the service needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Part {
    Redis,
    Kafka,
    Database,
}

/// How a part or a role is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Condition {
    Starting,
    Up,
    Down,
}

/// What the process as a whole is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Readiness {
    Starting,
    Ready,
    /// Sells, but Kafka or the database is away.
    Degraded,
    /// Redis is away.
    Unavailable,
    Draining,
}

impl Readiness {
    /// Whether orders should be sent here.
    pub const fn takes_orders(self) -> bool {
        matches!(self, Readiness::Ready | Readiness::Degraded)
    }
}

/// One part's or role's condition, since when, and why.
#[derive(Debug, Clone, Serialize)]
pub struct Entry {
    pub status: Condition,
    #[serde(serialize_with = "rfc3339")]
    pub since: DateTime<Utc>,
    pub detail: String,
}

fn rfc3339<S: Serializer>(at: &DateTime<Utc>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&at.to_rfc3339_opts(SecondsFormat::Millis, true))
}

/// Everything at once, as the inner listener shows it.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    pub status: Readiness,
    pub parts: BTreeMap<Part, Entry>,
    pub roles: BTreeMap<&'static str, Entry>,
}

#[derive(Debug)]
struct State {
    parts: BTreeMap<Part, Entry>,
    roles: BTreeMap<&'static str, Entry>,
    draining: bool,
}

/// The shared record; clones share it.
#[derive(Debug, Clone)]
pub struct Health(Arc<Mutex<State>>);

impl Health {
    /// Every part and role is starting.
    pub fn new(roles: impl IntoIterator<Item = &'static str>) -> Self {
        let entry =
            || Entry { status: Condition::Starting, since: Utc::now(), detail: String::new() };
        let parts = [Part::Redis, Part::Kafka, Part::Database];
        Self(Arc::new(Mutex::new(State {
            parts: parts.into_iter().map(|part| (part, entry())).collect(),
            roles: roles.into_iter().map(|role| (role, entry())).collect(),
            draining: false,
        })))
    }

    pub fn set_part(&self, part: Part, status: Condition, detail: impl Into<String>) {
        let mut state = self.state();
        if let Some(entry) = state.parts.get_mut(&part) {
            change(entry, status, detail.into());
        }
    }

    pub fn set_role(&self, role: &'static str, status: Condition, detail: impl Into<String>) {
        let mut state = self.state();
        if let Some(entry) = state.roles.get_mut(role) {
            change(entry, status, detail.into());
        }
    }

    pub fn is_starting(&self, part: Part) -> bool {
        self.state().parts[&part].status == Condition::Starting
    }

    /// From now on no orders should come.
    pub fn drain(&self) {
        self.state().draining = true;
    }

    pub fn readiness(&self) -> Readiness {
        readiness(&self.state())
    }

    pub fn report(&self) -> Report {
        let state = self.state();
        Report { status: readiness(&state), parts: state.parts.clone(), roles: state.roles.clone() }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().expect("no panic while the health record is locked")
    }
}

fn change(entry: &mut Entry, status: Condition, detail: String) {
    if entry.status != status {
        entry.since = Utc::now();
    }
    (entry.status, entry.detail) = (status, detail);
}

fn readiness(state: &State) -> Readiness {
    let is = |condition| state.parts.values().any(|entry| entry.status == condition);
    if state.draining {
        Readiness::Draining
    } else if state.parts[&Part::Redis].status == Condition::Down {
        Readiness::Unavailable
    } else if is(Condition::Starting) {
        Readiness::Starting
    } else if is(Condition::Down) {
        Readiness::Degraded
    } else {
        Readiness::Ready
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(redis: Condition, kafka: Condition, database: Condition) -> Readiness {
        let health = Health::new(["api"]);
        health.set_part(Part::Redis, redis, "");
        health.set_part(Part::Kafka, kafka, "");
        health.set_part(Part::Database, database, "");
        health.readiness()
    }

    #[test]
    fn it_sells_without_kafka_or_the_database_but_not_without_redis() {
        use Condition::{Down, Starting, Up};
        assert_eq!(with(Up, Up, Up), Readiness::Ready);
        assert_eq!(with(Up, Down, Up), Readiness::Degraded);
        assert_eq!(with(Up, Up, Down), Readiness::Degraded);
        assert_eq!(with(Down, Up, Up), Readiness::Unavailable);
        assert_eq!(with(Up, Starting, Up), Readiness::Starting);
        assert_eq!(with(Starting, Down, Up), Readiness::Starting);
    }

    #[test]
    fn a_draining_process_takes_no_orders() {
        let health = Health::new([]);
        health.drain();
        assert!(!health.readiness().takes_orders());
    }
}
