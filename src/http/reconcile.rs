//! The repair of a sale whose Redis is wrong: its lanes are rebuilt from the ledger.

use axum::extract::State;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::auth::OperatorCaller;
use super::conservation::{DifferenceView, SkuConservation};
use super::extract::{Members, OptionalJson, PathNames};
use super::orders::sale_archived;
use super::problem::Problem;
use super::{Answer, Api, json};
use crate::domain::ids::LaneId;
use crate::domain::names::{KeyName, SaleId};
use crate::lanes::LaneError;
use crate::ledger::Sale;
use crate::reconciler::books::LaneBooks;
use crate::reconciler::rebuild::{Despite, RecoveryError, Wish};

/// What of a lane's books is recorded: where these differ, no rebuild can say which is right.
const RECORDED: [&str; 3] = ["ledger-gap", "ledger-fold", "recorded-orders"];

/// How a sale is to be repaired.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub struct Reconcile {
    /// Only say what would be done.
    #[serde(default)]
    pub dry_run: bool,
}

impl Members for Reconcile {}

/// What is done about a lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Repair {
    /// Nothing differs.
    None,
    /// Of a dry run: it would be rebuilt.
    Rebuild,
    Rebuilt,
    /// It would be a guess; `detail` says why. The lane is as it was, or frozen where `detail` says so.
    Refused,
}

/// A lane before and after its repair.
#[derive(Debug, Serialize, ToSchema)]
pub struct LaneRepair {
    pub lane: u8,
    pub repair: Repair,
    pub detail: String,
    pub differences: Vec<DifferenceView>,
    pub before: Vec<SkuConservation>,
    /// Of a dry run: Redis as it would be, once all that has happened is recorded.
    pub after: Vec<SkuConservation>,
}

/// The repair of a sale.
#[derive(Debug, Serialize, ToSchema)]
pub struct ReconcileView {
    pub dry_run: bool,
    pub lanes: Vec<LaneRepair>,
}

impl LaneRepair {
    fn new(books: LaneBooks, told: &[(String, String, String)]) -> Self {
        let recorded = books.differences.iter().map(|one| one.what);
        let recorded = recorded.chain(told.iter().map(|(what, ..)| what.as_str()));
        let is_recorded = recorded.filter(|what| RECORDED.contains(what)).count() > 0;
        let (repair, detail) = if is_recorded {
            (Repair::Refused, "what is recorded contradicts itself".to_owned())
        } else if let Some(why) = books.undecided.clone() {
            (Repair::Refused, why)
        } else if books.differences.is_empty() && told.is_empty() {
            (Repair::None, String::new())
        } else {
            (Repair::Rebuild, "Redis differs from what is recorded".to_owned())
        };
        let lane = books.lane.lane;
        let before = SkuConservation::all(&books);
        let after = match repair {
            Repair::Rebuild => SkuConservation::all(&books.repaired()),
            _ => SkuConservation::all(&books),
        };
        let differences = DifferenceView::all(books, told);
        Self { lane, repair, detail, differences, before, after }
    }
}

impl Api {
    async fn reconcile(
        &self,
        id: &SaleId,
        dry_run: bool,
        actor: &KeyName,
    ) -> Result<ReconcileView, Problem> {
        let sale = self.sale(id).await?;
        let mut lanes = Vec::new();
        for lane in sale.lane_ids() {
            let mut repair = self.plan_repair(&sale, &lane).await?;
            if repair.repair == Repair::Rebuild && !dry_run {
                self.repair(&sale, &lane, actor, &mut repair).await?;
            }
            lanes.push(repair);
        }
        Ok(ReconcileView { dry_run, lanes })
    }

    /// What the books of now and the scans before them say together.
    async fn plan_repair(&self, sale: &Sale, lane: &LaneId) -> Result<LaneRepair, Problem> {
        let books = self.books(sale, lane).await?;
        let told = self.ledger.within_patience(self.ledger.differences_of(lane)).await;
        Ok(LaneRepair::new(books, &told.map_err(|e| Problem::ledger(&e))?))
    }

    async fn repair(
        &self,
        sale: &Sale,
        lane: &LaneId,
        actor: &KeyName,
        repair: &mut LaneRepair,
    ) -> Result<(), Problem> {
        let wish = Wish { actor: actor.clone(), rebuild: true, despite: Despite::Differences };
        match self.recovery.recover(lane, &wish).await {
            Ok(Some(report)) if report.outcome.is_open() => {
                (repair.repair, repair.detail) = (Repair::Rebuilt, String::new());
                repair.after = SkuConservation::all(&self.books(sale, lane).await?);
            }
            Ok(report) => {
                let detail = report.map(|report| report.detail).unwrap_or_default();
                (repair.repair, repair.detail) = (Repair::Refused, detail);
            }
            Err(RecoveryError::Lane(error @ LaneError::Unavailable(_))) => {
                return Err(Problem::read(&error));
            }
            Err(error) => {
                let detail = format!("{error}; if the lane is frozen, that is tried again");
                (repair.repair, repair.detail) = (Repair::Refused, detail);
            }
        }
        Ok(())
    }
}

/// Repairs a sale whose Redis is wrong; with `dry_run` says what that would change.
#[utoipa::path(
    post, path = "/v1/sales/{sale_id}/reconcile", operation_id = "reconcile_sale", tag = "stock",
    params(("sale_id" = SaleId, Path)),
    request_body = Reconcile,
    responses(
        (status = 200, description = "Per lane what differs, and what was done: where only Redis differs it was frozen, rebuilt from the ledger, proven and opened; each leaves a row in rebuilds", body = ReconcileView),
        (status = 404, description = "sale-not-found"),
        (status = 409, description = "sale-archived"),
    ),
    security(("key" = []))
)]
pub async fn reconcile(
    State(api): State<Api>,
    OperatorCaller(caller): OperatorCaller,
    names: PathNames,
    OptionalJson(asked): OptionalJson<Reconcile>,
) -> Answer {
    let in_flight = api.enter()?;
    let (id, actor) = (names.sale_id()?, caller.actor());
    if api.sale(&id).await?.phase.archived {
        return Err(sale_archived());
    }
    // A task of its own: it goes on to its end, whether or not the client is there.
    let task = tokio::spawn(async move {
        let _in_flight = in_flight;
        api.reconcile(&id, asked.dry_run, &actor).await
    });
    let view = task.await.map_err(|error| Problem::internal(&error))??;
    Ok(json(StatusCode::OK, &view))
}
