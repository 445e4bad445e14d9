//! Sales as operators make them: definitions, and pause, resume, close.

use axum::extract::State;
use axum::http::header::ETAG;
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::Response;
use serde::Serialize;
use utoipa::ToSchema;

use super::auth::{Caller, OperatorCaller};
use super::etag::{IfMatch, etag};
use super::extract::{
    Json, LARGE_BODY_BYTES_MAX, Members, NoMembers, NoParameters, OptionalJson, Params, PathNames,
};
use super::orders::sale_archived;
use super::problem::{Code, FieldError, Problem};
use super::views::SaleView;
use super::{Answer, Api, json};
use crate::domain::ids::LaneId;
use crate::domain::names::{KeyName, SaleId};
use crate::domain::sale::Definition;
use crate::lanes::LaneError;
use crate::lanes::command::{Define, Phase, PhaseChange};
use crate::lanes::reply::{Defined, Phased};
use crate::ledger::{SaleLock, digest};

/// The epoch under which a lane is made for the first time.
const FIRST_EPOCH: u32 = 1;
/// How often a definition follows its lane when that is ahead of the database.
const DEFINE_TRIES_MAX: usize = 3;

impl Members for Definition {
    const BYTES_MAX: usize = LARGE_BODY_BYTES_MAX;

    fn check(self) -> Result<Self, Vec<FieldError>> {
        Definition::check(self).map_err(|errors| errors.into_iter().map(Into::into).collect())
    }
}

/// A sale's definition, and which one in turn it is.
#[derive(Debug, Serialize, ToSchema)]
pub struct DefinitionView {
    pub id: SaleId,
    pub version: u64,
    #[serde(flatten)]
    pub definition: Definition,
}

/// Defines a sale, or defines it anew. The same again changes nothing.
#[utoipa::path(
    put, path = "/v1/sales/{sale_id}", operation_id = "define_sale", tag = "sales",
    params(("sale_id" = SaleId, Path),
        ("If-Match" = Option<String>, Header, description = "The ETag of the version that this is to replace")),
    request_body = Definition,
    responses(
        (status = 201, description = "Defined: every lane has it", body = DefinitionView,
            headers(("ETag" = String, description = "The version"))),
        (status = 200, description = "Redefined, or the same as before", body = DefinitionView,
            headers(("ETag" = String, description = "The version"))),
        (status = 409, description = "sale-in-use, sale-archived"),
        (status = 412, description = "precondition-failed"),
    ),
    security(("key" = []))
)]
pub async fn define(
    State(api): State<Api>,
    OperatorCaller(caller): OperatorCaller,
    names: PathNames,
    headers: HeaderMap,
    Json(definition): Json<Definition>,
) -> Answer {
    let sale = names.new_sale_id()?;
    let in_flight = api.enter()?;
    let view = DefinitionView { id: sale.clone(), version: 0, definition: definition.clone() };
    let (actor, trace) = (caller.actor(), caller.trace());
    let if_match = IfMatch::of(&headers);
    let defining = Defining { api, sale, definition, actor, trace, if_match };
    // A task of its own: the transaction around the lane's call must end in order, whether or not
    // the client is still there.
    let task = tokio::spawn(async move {
        let _in_flight = in_flight;
        defining.run().await
    });
    let applied = task.await.unwrap_or_else(|error| Err(Problem::internal(&error)))?;
    let status = if applied.created { StatusCode::CREATED } else { StatusCode::OK };
    Ok(definition_answer(status, DefinitionView { version: applied.version, ..view }))
}

/// What came of a definition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Applied {
    pub version: u64,
    /// Whether the sale is new.
    pub created: bool,
}

impl Api {
    /// Defines a sale, or defines it anew, for whoever runs the command line.
    ///
    /// # Errors
    /// What the API would answer.
    pub async fn define(
        self,
        sale: SaleId,
        definition: Definition,
        actor: KeyName,
    ) -> Result<Applied, Problem> {
        Defining { api: self, sale, definition, actor, trace: None, if_match: None }.run().await
    }
}

struct Defining {
    api: Api,
    sale: SaleId,
    definition: Definition,
    actor: KeyName,
    trace: Option<String>,
    if_match: Option<IfMatch>,
}

impl Defining {
    async fn run(self) -> Result<Applied, Problem> {
        let lock = self.lock().await?;
        let current = lock.current().map(|sale| (sale.version, sale.digest.clone()));
        let digest = digest(&self.definition);
        let is_archived = lock.current().is_some_and(|sale| sale.phase.archived);
        if let Some((version, before)) = &current
            && *before == digest
        {
            // A lane may have lost it with the end of what Redis wrote, or have a later one whose commit
            // was lost: then this is a change.
            if is_archived || self.tell_lanes_version(*version, false, &digest).await?.is_none() {
                return Ok(Applied { version: *version, created: false });
            }
        }
        self.check_version(current.as_ref().map(|(version, _)| *version))?;
        if is_archived {
            return Err(sale_archived());
        }
        let version =
            self.tell_lanes(current.as_ref().map(|(version, _)| *version), digest).await?;
        let committed = lock.commit_definition(version, &self.definition, &self.actor).await;
        // The lanes have it already: whoever sends the same again completes it.
        committed.map_err(|error| {
            tracing::warn!(%error, sale = %self.sale, "a definition was not committed");
            Problem::outcome_unknown()
        })?;
        self.api.forget_copies(&self.sale).await;
        Ok(Applied { version, created: current.is_none() })
    }

    /// Makes room for a sale that is new, and takes the right to define it.
    async fn lock(&self) -> Result<SaleLock, Problem> {
        let ledger = &self.api.ledger;
        let unavailable = |e| Problem::ledger(&e);
        if ledger.sale(&self.sale).await.map_err(unavailable)?.is_none() {
            self.check_version(None)?;
            let secret = self.api.catalog.newest_secret().await.map_err(unavailable)?;
            let secret = secret.ok_or_else(|| {
                Problem::new(Code::Unavailable, "the database is not migrated yet")
            })?;
            let partitions: Vec<_> =
                self.lanes().map(|lane| partition(&lane, self.api.options.partitions)).collect();
            let begun = ledger.begin_definition(&self.sale, &partitions, secret.version()).await;
            begun.map_err(unavailable)?;
        }
        ledger.lock_sale(&self.sale).await.map_err(unavailable)
    }

    fn lanes(&self) -> impl Iterator<Item = LaneId> {
        let sale = &self.sale;
        (0..self.definition.lanes).map(move |lane| LaneId { sale: sale.clone(), lane })
    }

    fn check_version(&self, current: Option<u64>) -> Result<(), Problem> {
        match &self.if_match {
            Some(if_match) if !if_match.matches(current) => {
                let detail = match current {
                    Some(version) => format!("the sale's version is {version}"),
                    None => "the sale is not defined".to_owned(),
                };
                Err(Problem::new(Code::PreconditionFailed, detail))
            }
            _ => Ok(()),
        }
    }

    /// Gives the definition to every lane; returns the version under which they have it. A lane can
    /// be ahead of the database, where it took a definition whose commit was lost.
    async fn tell_lanes(&self, current: Option<u64>, digest: String) -> Result<u64, Problem> {
        let mut version = current.unwrap_or(0) + 1;
        for _ in 0..DEFINE_TRIES_MAX {
            match self.tell_lanes_version(version, current.is_none(), &digest).await? {
                Some(newer) => version = newer + 1,
                None => return Ok(version),
            }
        }
        Err(Problem::new(
            Code::Unavailable,
            "the sale is being defined by others; nothing was done",
        ))
    }

    /// The same under this version; returns the version of a lane that has a newer one.
    async fn tell_lanes_version(
        &self,
        version: u64,
        create: bool,
        digest: &str,
    ) -> Result<Option<u64>, Problem> {
        for lane in self.lanes() {
            let command = Define {
                version,
                create_epoch: create.then_some(FIRST_EPOCH),
                digest: digest.to_owned(),
                definition: self.definition.clone(),
                actor: self.actor.clone(),
                trace: self.trace.clone(),
            };
            match self.api.lanes.define(&lane, command).await {
                Ok(stamped) => match stamped.outcome {
                    Defined::Defined | Defined::Same => {}
                    Defined::Stale { version } => return Ok(Some(version)),
                    Defined::InUse { why } => {
                        let detail =
                            format!("the definition {why}, and the sale has orders or adjustments");
                        return Err(Problem::new(Code::SaleInUse, detail));
                    }
                    Defined::Archived => return Err(sale_archived()),
                },
                Err(error) => return Err(self.api.change_refused(&self.sale, error).await),
            }
        }
        Ok(None)
    }
}

fn definition_answer(status: StatusCode, view: DefinitionView) -> Response {
    let mut response = json(status, &view);
    let etag = HeaderValue::try_from(etag(view.version)).expect("a number is visible ASCII");
    response.headers_mut().insert(ETAG, etag);
    response
}

/// The lane's Kafka partition: chosen once, when it is made, and stored.
fn partition(lane: &LaneId, partitions: i32) -> i32 {
    let hash = blake3::hash(lane.to_string().as_bytes());
    let number = u32::from_le_bytes(hash.as_bytes()[..4].try_into().expect("4 of 32 bytes"));
    (i64::from(number) % i64::from(partitions.max(1))) as i32
}

/// A sale's definition.
#[utoipa::path(
    get, path = "/v1/sales/{sale_id}/definition", operation_id = "show_definition", tag = "sales",
    params(("sale_id" = SaleId, Path)),
    responses(
        (status = 200, description = "As it was defined last", body = DefinitionView,
            headers(("ETag" = String, description = "The version"))),
        (status = 404, description = "sale-not-found"),
    ),
    security(("key" = []))
)]
pub async fn definition(
    State(api): State<Api>,
    _caller: OperatorCaller,
    _query: Params<NoParameters>,
    names: PathNames,
) -> Answer {
    let _in_flight = api.enter()?;
    let sale = api.sale(&names.sale_id()?).await?;
    let (id, version, definition) = (sale.id.clone(), sale.version, sale.definition.clone());
    Ok(definition_answer(StatusCode::OK, DefinitionView { id, version, definition }))
}

/// Takes no orders until it is resumed; settling goes on.
#[utoipa::path(
    post, path = "/v1/sales/{sale_id}/pause", operation_id = "pause_sale", tag = "sales",
    params(("sale_id" = SaleId, Path)),
    responses(
        (status = 200, description = "The sale", body = SaleView),
        (status = 404, description = "sale-not-found"),
        (status = 409, description = "sale-closed, sale-archived"),
    ),
    security(("key" = []))
)]
pub async fn pause(
    State(api): State<Api>,
    OperatorCaller(caller): OperatorCaller,
    names: PathNames,
    _members: OptionalJson<NoMembers>,
) -> Answer {
    api.change_phase(&names, &caller, PhaseChange::Pause).await
}

/// Takes orders again.
#[utoipa::path(
    post, path = "/v1/sales/{sale_id}/resume", operation_id = "resume_sale", tag = "sales",
    params(("sale_id" = SaleId, Path)),
    responses(
        (status = 200, description = "The sale", body = SaleView),
        (status = 404, description = "sale-not-found"),
        (status = 409, description = "sale-closed, sale-archived"),
    ),
    security(("key" = []))
)]
pub async fn resume(
    State(api): State<Api>,
    OperatorCaller(caller): OperatorCaller,
    names: PathNames,
    _members: OptionalJson<NoMembers>,
) -> Answer {
    api.change_phase(&names, &caller, PhaseChange::Resume).await
}

/// Takes no more orders, for good; holds run to their deadlines.
#[utoipa::path(
    post, path = "/v1/sales/{sale_id}/close", operation_id = "close_sale", tag = "sales",
    params(("sale_id" = SaleId, Path)),
    responses(
        (status = 200, description = "The sale", body = SaleView),
        (status = 404, description = "sale-not-found"),
        (status = 409, description = "sale-archived"),
    ),
    security(("key" = []))
)]
pub async fn close(
    State(api): State<Api>,
    OperatorCaller(caller): OperatorCaller,
    names: PathNames,
    _members: OptionalJson<NoMembers>,
) -> Answer {
    api.change_phase(&names, &caller, PhaseChange::Close).await
}

impl Api {
    async fn change_phase(
        &self,
        names: &PathNames,
        caller: &Caller,
        change: PhaseChange,
    ) -> Answer {
        let _in_flight = self.enter()?;
        let sale = self.sale(&names.sale_id()?).await?;
        if sale.phase.archived {
            return Err(sale_archived());
        }
        for lane in &sale.lanes {
            let lane = LaneId { sale: sale.id.clone(), lane: lane.lane };
            let command = Phase { change, actor: caller.actor(), trace: caller.trace() };
            let changed = self.lanes.phase(&lane, command).await;
            match changed.map(|stamped| stamped.outcome) {
                Ok(Phased::Done) => {}
                Ok(Phased::Closed) => {
                    return Err(Problem::new(Code::SaleClosed, "the sale is closed for good"));
                }
                Ok(Phased::Archived) => return Err(sale_archived()),
                Err(error) => return Err(self.change_refused(&sale.id, error).await),
            }
        }
        self.views.forget(&sale.id).await;
        // Not by way of the views: a look that began before the change could still be under way.
        // The change has happened; where it cannot be shown, whoever asks again finds out.
        let levels = self.levels(&sale.id).await.map_err(|_| Problem::outcome_unknown())?;
        Ok(json(StatusCode::OK, &SaleView::new(&levels)))
    }

    /// Why a change did not reach a lane.
    pub(super) async fn change_refused(&self, sale: &SaleId, error: LaneError) -> Problem {
        match error {
            LaneError::Missing | LaneError::Frozen(_) => match self.is_archived(sale).await {
                Ok(true) => sale_archived(),
                Ok(false) => Problem::change(&error),
                Err(problem) => problem,
            },
            error => Problem::change(&error),
        }
    }

    /// After a change of ours: what this process remembers of the sale is looked up anew.
    async fn forget_copies(&self, sale: &SaleId) {
        if let Err(error) = self.catalog.refresh().await {
            tracing::warn!(%error, %sale, "a new definition is seen with the next refresh only");
        }
        self.views.forget(sale).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lane_falls_into_a_partition_for_good() {
        let lane = |sale: &str| LaneId { sale: sale.parse().unwrap(), lane: 0 };
        assert_eq!(partition(&lane("double-11"), 12), partition(&lane("double-11"), 12));
        let used: std::collections::HashSet<_> =
            (0..100).map(|n| partition(&lane(&n.to_string()), 12)).collect();
        assert!(used.len() > 8 && used.iter().all(|p| (0..12).contains(p)), "{used:?}");
    }
}
