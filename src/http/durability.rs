//! How far a change must have got before it is answered: the strongest of what the service, the
//! sale and the caller's `Prefer` ask for.

use std::borrow::Cow;
use std::convert::Infallible;

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use tokio::time::timeout;

use super::problem::{Code, Problem};
use super::{Answer, Api};
use crate::domain::durability::Durability;
use crate::domain::ids::LaneId;
use crate::domain::order::Order;
use crate::lanes::reply::Marks;
use crate::lanes::{Lanes, Proof};
use crate::ledger::Sale;

const PREFER_HEADER: HeaderName = HeaderName::from_static("prefer");
const PREFERENCE_APPLIED: HeaderName = HeaderName::from_static("preference-applied");
const PREFERENCE: &str = "durability";
/// As the API's description says it.
pub(super) const PREFER: &str = "durability=memory, replicated, logged or recorded (RFC 7240): how far the change \
    must have got before it is answered. The service and the sale may ask for more.";
pub(super) const UNREACHED: &str =
    "outcome-unknown: among others, it is not known to have got so far in time";

/// The level that the caller prefers, where it names one that there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preferred(Option<Durability>);

impl Preferred {
    /// Who calls cannot say.
    pub const NOTHING: Self = Self(None);
}

impl FromRequestParts<Api> for Preferred {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _api: &Api) -> Result<Self, Infallible> {
        Ok(Self(preferred(&parts.headers)))
    }
}

/// The preference in `Prefer` (RFC 7240): a list of `name=value; parameters`, in one header or
/// several. Of one that is there twice the first counts; what is unknown or unreadable is ignored.
fn preferred(headers: &HeaderMap) -> Option<Durability> {
    let lines = headers.get_all(PREFER_HEADER).into_iter().filter_map(|line| line.to_str().ok());
    let values = lines.flat_map(|line| split(line, ',')).filter_map(|preference| {
        let (name, value) = split(preference, ';').next()?.split_once('=')?;
        name.trim().eq_ignore_ascii_case(PREFERENCE).then(|| value.trim())
    });
    let word = values.into_iter().next()?;
    let quoted = word.strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
    Durability::from_word(quoted.unwrap_or(word))
}

/// The parts of a header between `separator`s that are not inside of a quoted string.
fn split(text: &str, separator: char) -> impl Iterator<Item = &str> {
    let (mut quoted, mut escaped) = (false, false);
    text.split(move |c| {
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            other => return other == separator && !quoted,
        }
        false
    })
}

/// What a change must reach before it is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    level: Durability,
    /// The caller asked for a level, and is told which one it got.
    is_preferred: bool,
}

impl Wanted {
    /// The strongest of the service's, the sale's and the caller's, as this deployment serves it.
    fn new(
        service: Durability,
        sale: Option<Durability>,
        Preferred(caller): Preferred,
        replicas: u32,
    ) -> Self {
        let asked = [sale, caller].into_iter().flatten();
        let strongest = asked.fold(service, Durability::max);
        Self { level: strongest.served(replicas), is_preferred: caller.is_some() }
    }

    /// The answer with the level that it has reached, where it says *you have it*.
    pub fn told(self, answer: Answer) -> Answer {
        let mut response = answer?;
        if self.is_preferred && response.status().is_success() {
            let applied = match self.level {
                Durability::Memory => HeaderValue::from_static("durability=memory"),
                Durability::Replicated => HeaderValue::from_static("durability=replicated"),
                Durability::Logged => HeaderValue::from_static("durability=logged"),
                Durability::Recorded => HeaderValue::from_static("durability=recorded"),
            };
            response.headers_mut().insert(PREFERENCE_APPLIED, applied);
        }
        Ok(response)
    }
}

impl Api {
    /// What a change in this sale must reach; of a sale that nobody knows what the service asks for.
    pub(super) fn wanted(&self, preferred: Preferred, sale: Option<&Sale>) -> Wanted {
        let of_sale = sale.and_then(|sale| sale.definition.min_durability);
        Wanted::new(self.options.durability, of_sale, preferred, self.options.replicas)
    }

    /// The lanes, through which a call comes with its proof where that is wanted.
    pub(super) fn lanes_for(&self, wanted: Wanted) -> Cow<'_, Lanes> {
        match wanted.level {
            Durability::Replicated => Cow::Owned(self.lanes.proving()),
            Durability::Memory | Durability::Logged | Durability::Recorded => {
                Cow::Borrowed(&self.lanes)
            }
        }
    }

    /// Waits until the order, as an answer is about to show it, has got as far as is wanted; the
    /// lane's marks by then.
    pub(super) async fn reach(
        &self,
        wanted: Wanted,
        order: &Order,
        marks: Marks,
        proof: Option<Proof>,
    ) -> Result<Marks, Problem> {
        if marks.reached(order.seq) >= wanted.level {
            return Ok(marks);
        }
        // Boxed, so that the many who do not wait carry no room for it.
        Box::pin(self.reach_later(wanted, order, marks, proof)).await
    }

    async fn reach_later(
        &self,
        wanted: Wanted,
        order: &Order,
        marks: Marks,
        proof: Option<Proof>,
    ) -> Result<Marks, Problem> {
        if let Some(proof) = proof {
            let holds = timeout(self.options.durability_timeout, proof.holds()).await;
            return match holds {
                Ok(true) => Ok(Marks { replicated: marks.seq, ..marks }),
                Ok(false) | Err(_) => Err(self.unreached(wanted.level)),
            };
        }
        self.wait_for(order.lane(), wanted.level, order.seq, marks).await
    }

    /// Waits until the lane's event `seq` has got so far.
    pub(super) async fn wait_for(
        &self,
        lane: &LaneId,
        level: Durability,
        seq: u64,
        marks: Marks,
    ) -> Result<Marks, Problem> {
        let timeout = self.options.durability_timeout;
        let reached = self.lanes.wait_for(lane, level, seq, marks, timeout).await;
        reached.ok_or_else(|| self.unreached(level))
    }

    fn unreached(&self, level: Durability) -> Problem {
        self.metrics.durability_timeout(level);
        let detail = format!(
            "it was done, but is not known to be {} in time; the same request again finds out",
            level.as_str()
        );
        Problem::new(Code::OutcomeUnknown, detail)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Durability::{Logged, Memory, Recorded, Replicated};

    fn of(lines: &[&str]) -> Option<Durability> {
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append(PREFER_HEADER, HeaderValue::from_bytes(line.as_bytes()).unwrap());
        }
        preferred(&headers)
    }

    #[test]
    fn a_preference_is_found_wherever_rfc_7240_lets_it_stand() {
        for lines in [
            &["durability=logged"][..],
            &["durability=\"logged\""],
            &["Durability = logged"],
            &["respond-async, durability=logged"],
            &["respond-async;wait=10, durability=logged; since=now"],
            &["wait=10", "durability=logged"],
            &["return=\"a, durability=recorded\", durability=logged"],
            &["return=\"\\\", durability=recorded\", durability=logged"],
            &["caf\u{e9}=1", "durability=logged"],
            &[", ,durability=logged,"],
            &["durability=logged, durability=recorded"],
            &["durability=logged", "durability=recorded"],
        ] {
            assert_eq!(of(lines), Some(Logged), "{lines:?}");
        }
    }

    #[test]
    fn a_preference_that_nobody_knows_is_ignored() {
        for lines in [
            &[][..],
            &[""],
            &["durability"],
            &["durability="],
            &["durability=carved"],
            &["durability=Logged"],
            &["durability=\"logged"],
            &["durabilities=logged"],
            &["x; durability=logged"],
            &["durability=carved, durability=logged"],
            &["return=\"durability=logged"],
        ] {
            assert_eq!(of(lines), None, "{lines:?}");
        }
    }

    #[test]
    fn the_strongest_level_is_wanted_as_the_deployment_serves_it() {
        let level = |service, sale, caller, replicas| {
            Wanted::new(service, sale, Preferred(caller), replicas).level
        };
        assert_eq!(level(Memory, None, None, 0), Memory);
        assert_eq!(level(Memory, None, Some(Recorded), 0), Recorded);
        assert_eq!(level(Memory, Some(Logged), Some(Memory), 0), Logged);
        assert_eq!(level(Recorded, Some(Logged), Some(Replicated), 1), Recorded);
        assert_eq!(level(Memory, None, Some(Replicated), 1), Replicated);
        assert_eq!(level(Memory, None, Some(Replicated), 0), Logged);
        assert_eq!(level(Memory, Some(Replicated), None, 0), Logged);
        assert_eq!(level(Replicated, Some(Memory), None, 2), Replicated);
    }
}
