//! A sale: a timed offer of some SKUs, as an operator defines it.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::durability::Durability;
use super::names::Sku;
use super::stock::TOTAL_MAX;
use super::time::Timestamp;

/// Most SKUs of one sale.
pub const SKUS_MAX: usize = 1_000;
/// The highest limit of units for a buyer.
pub const BUYER_LIMIT_MAX: u32 = 1_000_000;
const HOLD_SECONDS_MAX: u32 = 86_400;
const GRACE_SECONDS_MAX: u32 = 3_600;
const MAX_HOLD_SECONDS_MAX: u32 = 90_000;
const RETENTION_DAYS_MAX: u32 = 3_650;
const NAME_CHARS_MAX: usize = 200;

/// One SKU of a definition. `stock` is the initial one; adjustments change it from there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SkuDefinition {
    pub sku: Sku,
    #[schema(minimum = 0, maximum = 1_000_000_000)]
    pub stock: i64,
    #[serde(default)]
    #[schema(minimum = 1, maximum = 1_000_000)]
    pub per_buyer_limit: Option<u32>,
}

/// What an operator says a sale is. Reading fills in the defaults; [`Definition::check`] says
/// whether it is possible.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Definition {
    #[schema(min_length = 1, max_length = 200)]
    pub name: String,
    #[serde(default)]
    pub opens_at: Option<Timestamp>,
    #[serde(default)]
    pub closes_at: Option<Timestamp>,
    #[serde(default = "default_hold_seconds")]
    #[schema(minimum = 1, maximum = 86_400)]
    pub hold_seconds: u32,
    #[serde(default = "default_grace_seconds")]
    #[schema(minimum = 0, maximum = 3_600)]
    pub payment_grace_seconds: u32,
    /// `hold_seconds + payment_grace_seconds` unless said otherwise.
    #[serde(default)]
    #[schema(maximum = 90_000)]
    pub max_hold_seconds: Option<u32>,
    #[serde(default)]
    #[schema(minimum = 1, maximum = 1_000_000)]
    pub per_buyer_limit: Option<u32>,
    /// How far an order has got at least before it is answered. Left out where there is none, so that
    /// a version that does not know it can read the others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_durability: Option<Durability>,
    #[serde(default = "default_retention_days")]
    #[schema(minimum = 0, maximum = 3_650)]
    pub retention_days: u32,
    #[serde(default = "default_lanes")]
    #[schema(minimum = 1, maximum = 1)]
    pub lanes: u8,
    #[schema(min_items = 1, max_items = 1_000)]
    pub skus: Vec<SkuDefinition>,
}

const fn default_hold_seconds() -> u32 {
    300
}

const fn default_grace_seconds() -> u32 {
    120
}

const fn default_retention_days() -> u32 {
    7
}

const fn default_lanes() -> u8 {
    1
}

/// A member of a definition that cannot be, as a JSON pointer and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{pointer}: {detail}")]
pub struct DefinitionError {
    pub pointer: String,
    pub detail: String,
}

impl Definition {
    /// The longest that payments can keep an order held, from its beginning.
    pub fn longest_hold_seconds(&self) -> u32 {
        let sum = self.hold_seconds.saturating_add(self.payment_grace_seconds);
        self.max_hold_seconds.unwrap_or(sum)
    }

    /// Fills in what depends on other members and checks every range.
    ///
    /// # Errors
    /// Every member that is out of range, not only the first.
    pub fn check(mut self) -> Result<Self, Vec<DefinitionError>> {
        let max_hold = self.longest_hold_seconds();
        self.max_hold_seconds = Some(max_hold);
        let mut errors = Errors::default();

        let name_chars = self.name.chars().count();
        errors.range("/name", "characters", name_chars as i64, 1, NAME_CHARS_MAX as i64);
        if self.name.contains('\0') {
            errors.add("/name", "must not contain NUL: the database cannot store it");
        }
        let hold = self.hold_seconds;
        errors.range("/hold_seconds", "seconds", hold.into(), 1, HOLD_SECONDS_MAX.into());
        let grace = self.payment_grace_seconds;
        errors.range(
            "/payment_grace_seconds",
            "seconds",
            grace.into(),
            0,
            GRACE_SECONDS_MAX.into(),
        );
        let (low, high) = (hold.into(), MAX_HOLD_SECONDS_MAX.into());
        errors.range("/max_hold_seconds", "seconds", max_hold.into(), low, high);
        let retention = self.retention_days;
        errors.range("/retention_days", "days", retention.into(), 0, RETENTION_DAYS_MAX.into());
        errors.buyer_limit("/per_buyer_limit", self.per_buyer_limit);
        if self.lanes != 1 {
            errors.add("/lanes", "must be 1: sales of several lanes are not served yet");
        }
        if let (Some(opens), Some(closes)) = (self.opens_at, self.closes_at)
            && closes <= opens
        {
            errors.add("/closes_at", "must be after opens_at");
        }
        errors.range("/skus", "SKUs", self.skus.len() as i64, 1, SKUS_MAX as i64);
        let mut seen = HashSet::new();
        for (index, sku) in self.skus.iter().enumerate() {
            errors.range(&format!("/skus/{index}/stock"), "units", sku.stock, 0, TOTAL_MAX);
            errors.buyer_limit(&format!("/skus/{index}/per_buyer_limit"), sku.per_buyer_limit);
            if !seen.insert(&sku.sku) {
                errors.add(&format!("/skus/{index}/sku"), "is in the list twice");
            }
        }
        if errors.0.is_empty() { Ok(self) } else { Err(errors.0) }
    }
}

#[derive(Default)]
struct Errors(Vec<DefinitionError>);

impl Errors {
    fn add(&mut self, pointer: &str, detail: impl Into<String>) {
        self.0.push(DefinitionError { pointer: pointer.to_owned(), detail: detail.into() });
    }

    fn range(&mut self, pointer: &str, unit: &str, value: i64, low: i64, high: i64) {
        if !(low..=high).contains(&value) {
            self.add(pointer, format!("must be {low} to {high} {unit}"));
        }
    }

    fn buyer_limit(&mut self, pointer: &str, limit: Option<u32>) {
        if let Some(limit) = limit {
            self.range(pointer, "units", limit.into(), 1, BUYER_LIMIT_MAX.into());
        }
    }
}

/// What buyers may do with a sale now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum State {
    Scheduled,
    Open,
    Paused,
    Closed,
    Archived,
}

impl State {
    pub const fn as_str(self) -> &'static str {
        match self {
            State::Scheduled => "scheduled",
            State::Open => "open",
            State::Paused => "paused",
            State::Closed => "closed",
            State::Archived => "archived",
        }
    }
}

/// What decides a sale's state besides the time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Phase {
    pub opens_at: Option<Timestamp>,
    pub closes_at: Option<Timestamp>,
    pub paused: bool,
    pub closed: bool,
    pub archived: bool,
}

impl Phase {
    /// Archived before closed before paused before scheduled.
    pub fn state_at(&self, now: Timestamp) -> State {
        if self.archived {
            State::Archived
        } else if self.closed || self.closes_at.is_some_and(|closes| now >= closes) {
            State::Closed
        } else if self.paused {
            State::Paused
        } else if self.opens_at.is_some_and(|opens| now < opens) {
            State::Scheduled
        } else {
            State::Open
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn definition(members: &str) -> Result<Definition, Vec<DefinitionError>> {
        let skus = r#""skus":[{"sku":"a","stock":1}]"#;
        let text = format!(r#"{{"name":"n",{members}{skus}}}"#);
        serde_json::from_str::<Definition>(&text).unwrap().check()
    }

    #[test]
    fn what_is_left_out_gets_the_documented_default() {
        let definition = definition("").unwrap();
        assert_eq!(definition.hold_seconds, 300);
        assert_eq!(definition.max_hold_seconds, Some(420));
        assert_eq!((definition.retention_days, definition.lanes), (7, 1));
    }

    #[test]
    fn every_impossible_member_is_named() {
        let errors = definition(r#""hold_seconds":0,"retention_days":3651,"#).unwrap_err();
        let pointers: Vec<_> = errors.iter().map(|e| e.pointer.as_str()).collect();
        assert_eq!(pointers, ["/hold_seconds", "/retention_days"]);
    }

    #[test]
    fn a_window_must_not_end_before_it_begins() {
        let window = r#""opens_at":"2026-11-11T00:00:00Z","closes_at":"2026-11-11T00:00:00Z","#;
        assert_eq!(definition(window).unwrap_err()[0].pointer, "/closes_at");
    }

    #[test]
    fn an_unknown_member_is_refused() {
        for member in [r#""min_stock":1"#, r#""min_durability":"carved""#] {
            let text = format!(r#"{{"name":"n","skus":[],{member}}}"#);
            assert!(serde_json::from_str::<Definition>(&text).is_err(), "{member}");
        }
    }

    #[test]
    fn a_definition_says_how_durable_its_orders_are_only_where_it_was_told() {
        let written = |members: &str| serde_json::to_value(definition(members).unwrap()).unwrap();
        assert_eq!(written(r#""min_durability":"logged","#)["min_durability"], "logged");
        assert!(written("").get("min_durability").is_none(), "an older version can read it");
        assert_eq!(written(""), written(r#""min_durability":null,"#));
    }

    #[test]
    fn paused_wins_over_scheduled_and_closed_over_both() {
        let later = Some(Timestamp::from_millis(10));
        let now = Timestamp::from_millis(5);
        let mut phase = Phase { opens_at: later, paused: true, ..Phase::default() };
        assert_eq!(phase.state_at(now), State::Paused);
        phase.paused = false;
        assert_eq!(phase.state_at(now), State::Scheduled);
        assert_eq!(
            phase.state_at(Timestamp::from_millis(10)),
            State::Open,
            "the first moment counts"
        );
        phase.closes_at = Some(now);
        assert_eq!(phase.state_at(now), State::Closed, "the last moment does not");
    }
}
