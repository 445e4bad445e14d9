//! How the process and the parts it needs are doing. Whoever talks to a part, and each role, say
//! so here; `readyz` shows it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use chrono::{DateTime, SecondsFormat, Utc};
use serde::Serialize;

/// A server that the process needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
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
    /// Not heard of yet.
    Starting,
    Up,
    Down,
    /// A role that has ended in order.
    Stopped,
}

/// Whether requests should come here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Readiness {
    Starting,
    Draining,
    /// Without Redis nothing can be answered.
    Unavailable,
    /// Selling goes on, but what is sold is not recorded for now.
    Degraded,
    Ready,
}

impl Readiness {
    /// Whether requests should come here.
    pub fn serves(self) -> bool {
        matches!(self, Readiness::Ready | Readiness::Degraded)
    }
}

/// A condition, since when, and what there is to say about it.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    pub status: Condition,
    /// RFC 3339.
    pub since: String,
    pub detail: String,
}

/// All that is known, for those inside.
#[derive(Debug, Clone, Serialize)]
pub struct Detail {
    pub status: Readiness,
    pub parts: BTreeMap<Part, Report>,
    pub roles: BTreeMap<&'static str, Report>,
}

#[derive(Debug, Clone)]
struct Heard {
    condition: Condition,
    since: DateTime<Utc>,
    detail: String,
}

impl Heard {
    fn new(condition: Condition, detail: String) -> Self {
        Self { condition, since: Utc::now(), detail }
    }

    /// `since` moves only when the condition does.
    fn hear(&mut self, condition: Condition, detail: String) {
        if self.condition != condition {
            self.since = Utc::now();
        }
        self.condition = condition;
        self.detail = detail;
    }

    fn report(&self) -> Report {
        Report {
            status: self.condition,
            since: self.since.to_rfc3339_opts(SecondsFormat::Millis, true),
            detail: self.detail.clone(),
        }
    }
}

#[derive(Debug)]
struct State {
    started: bool,
    draining: bool,
    parts: BTreeMap<Part, Heard>,
    roles: BTreeMap<&'static str, Heard>,
}

/// The handle: clones share what is known.
#[derive(Debug, Clone)]
pub struct Health(Arc<Mutex<State>>);

impl Default for Health {
    fn default() -> Self {
        let parts = [Part::Redis, Part::Kafka, Part::Database];
        let unheard = |part| (part, Heard::new(Condition::Starting, String::new()));
        Self(Arc::new(Mutex::new(State {
            started: false,
            draining: false,
            parts: parts.map(unheard).into(),
            roles: BTreeMap::new(),
        })))
    }
}

impl Health {
    /// Says how a part answered last: `Err` is why it did not.
    pub fn part(&self, part: Part, outcome: Result<String, String>) {
        let (condition, detail) = match outcome {
            Ok(detail) => (Condition::Up, detail),
            Err(detail) => (Condition::Down, detail),
        };
        if let Some(heard) = self.state().parts.get_mut(&part) {
            heard.hear(condition, detail);
        }
    }

    /// Says how a role is doing.
    pub fn role(&self, role: &'static str, condition: Condition, detail: impl Into<String>) {
        let detail = detail.into();
        let mut state = self.state();
        let heard = state.roles.entry(role);
        heard.or_insert_with(|| Heard::new(condition, String::new())).hear(condition, detail);
    }

    /// Start-up is over: from now on the parts decide.
    pub fn started(&self) {
        self.state().started = true;
    }

    /// The process is about to end: no new requests, please.
    pub fn draining(&self) {
        self.state().draining = true;
    }

    pub fn readiness(&self) -> Readiness {
        readiness(&self.state())
    }

    pub fn detail(&self) -> Detail {
        let state = self.state();
        Detail {
            status: readiness(&state),
            parts: state.parts.iter().map(|(part, heard)| (*part, heard.report())).collect(),
            roles: state.roles.iter().map(|(role, heard)| (*role, heard.report())).collect(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no panic while health is locked")
    }
}

fn readiness(state: &State) -> Readiness {
    let down = |part| state.parts.get(&part).is_some_and(|h| h.condition == Condition::Down);
    if state.draining {
        Readiness::Draining
    } else if !state.started {
        Readiness::Starting
    } else if down(Part::Redis) {
        Readiness::Unavailable
    } else if down(Part::Kafka) || down(Part::Database) {
        Readiness::Degraded
    } else {
        Readiness::Ready
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redis_decides_whether_it_serves_and_the_others_how_well() {
        let health = Health::default();
        assert_eq!(health.readiness(), Readiness::Starting);
        health.started();
        assert_eq!(health.readiness(), Readiness::Ready);
        health.part(Part::Kafka, Err("away".into()));
        assert_eq!(health.readiness(), Readiness::Degraded);
        health.part(Part::Redis, Err("away".into()));
        assert_eq!(health.readiness(), Readiness::Unavailable);
        health.part(Part::Redis, Ok("7.0".into()));
        health.part(Part::Kafka, Ok(String::new()));
        assert_eq!(health.readiness(), Readiness::Ready);
        health.draining();
        assert_eq!(health.readiness(), Readiness::Draining);
    }

    #[test]
    fn since_is_when_the_condition_changed_and_not_when_it_was_heard_last() {
        let health = Health::default();
        health.role("relay", Condition::Up, "");
        let since = health.detail().roles["relay"].since.clone();
        health.role("relay", Condition::Up, "12 lanes");
        let relay = &health.detail().roles["relay"];
        assert_eq!((&relay.since, relay.detail.as_str()), (&since, "12 lanes"));
    }
}
