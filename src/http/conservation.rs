//! Whether the books of a sale agree, now.

use axum::extract::State;
use axum::http::StatusCode;
use chrono::Utc;
use serde::Serialize;
use utoipa::ToSchema;

use super::auth::OperatorCaller;
use super::extract::{NoParameters, Params, PathNames};
use super::problem::Problem;
use super::{Answer, Api, json};
use crate::domain::ids::LaneId;
use crate::domain::names::{SaleId, Sku};
use crate::domain::stock::Units;
use crate::domain::time::Timestamp;
use crate::lanes::LaneError;
use crate::ledger::Sale;
use crate::reconciler::books::{CheckError, LaneBooks, SkuBooks, check, check_recorded};

/// Where one SKU's units are, by one of the books.
#[derive(Debug, Serialize, ToSchema)]
pub struct UnitsView {
    pub total: i64,
    pub available: i64,
    pub held: i64,
    pub sold: i64,
}

impl From<Units> for UnitsView {
    fn from(units: Units) -> Self {
        let Units { available, held, sold } = units;
        Self { total: units.total(), available, held, sold }
    }
}

/// What recorded orders hold and have bought.
#[derive(Debug, Serialize, ToSchema)]
pub struct OrdersView {
    pub held: i64,
    pub sold: i64,
}

/// All figures of one SKU in one lane.
#[derive(Debug, Serialize, ToSchema)]
pub struct SkuConservation {
    pub sku: Sku,
    pub lane: u8,
    /// Null once the sale is archived.
    pub redis: Option<UnitsView>,
    /// The recorded counters.
    pub database: UnitsView,
    /// The fold of the ledger.
    pub ledger: UnitsView,
    pub orders: OrdersView,
    /// Events of the lane that Redis' figures have in them and the others do not have yet.
    pub unrecorded_events: u64,
}

impl SkuConservation {
    /// All SKUs of a lane.
    pub(super) fn all(books: &LaneBooks) -> Vec<Self> {
        books.skus.iter().map(|sku| Self::new(books, sku)).collect()
    }

    fn new(books: &LaneBooks, sku: &SkuBooks) -> Self {
        let SkuBooks { sku, redis, recorded, on_its_way: _ } = sku.clone();
        Self {
            sku,
            lane: books.lane.lane,
            redis: redis.map(Into::into),
            database: recorded.counters.into(),
            ledger: recorded.ledger.into(),
            orders: OrdersView { held: recorded.orders.held, sold: recorded.orders.sold },
            unrecorded_events: books.unrecorded_events,
        }
    }
}

/// Two figures that should agree, and do not.
#[derive(Debug, Serialize, ToSchema)]
pub struct DifferenceView {
    pub lane: u8,
    /// `redis-counters`, `ledger-fold`, `recorded-orders`, `ledger-gap`, `lane-behind`.
    pub what: String,
    /// The SKU, or the lane.
    pub subject: String,
    pub detail: String,
}

impl DifferenceView {
    /// Those of a lane, and those that scans have told of it before.
    pub(super) fn all(books: LaneBooks, told: &[(String, String, String)]) -> Vec<Self> {
        let lane = books.lane.lane;
        let now = books.differences.into_iter();
        let mut views: Vec<_> = now
            .map(|one| Self {
                lane,
                what: one.what.to_owned(),
                subject: one.subject,
                detail: one.detail,
            })
            .collect();
        for (what, subject, detail) in told {
            if !views.iter().any(|view| (&view.what, &view.subject) == (what, subject)) {
                let (what, subject, detail) = (what.clone(), subject.clone(), detail.clone());
                views.push(Self { lane, what, subject, detail });
            }
        }
        views
    }
}

/// The books of a sale.
#[derive(Debug, Serialize, ToSchema)]
pub struct ConservationView {
    /// Whether all figures agree once what is on its way is counted. Null: not all could be
    /// compared, and `undecided` says why; what could be agrees.
    pub holds: Option<bool>,
    pub undecided: Option<String>,
    pub as_of: Timestamp,
    pub skus: Vec<SkuConservation>,
    pub differences: Vec<DifferenceView>,
}

impl ConservationView {
    fn new(lanes: Vec<LaneBooks>) -> Self {
        let undecided = lanes.iter().find_map(|books| books.undecided.clone());
        let skus = lanes.iter().flat_map(SkuConservation::all).collect();
        let differences: Vec<_> =
            lanes.into_iter().flat_map(|books| DifferenceView::all(books, &[])).collect();
        let holds = match (&undecided, differences.is_empty()) {
            (_, false) => Some(false),
            (Some(_), true) => None,
            (None, true) => Some(true),
        };
        Self { holds, undecided, as_of: Utc::now().into(), skus, differences }
    }
}

impl Api {
    async fn conservation(&self, id: &SaleId) -> Result<ConservationView, Problem> {
        let sale = self.sale(id).await?;
        let mut lanes = Vec::new();
        for lane in sale.lane_ids() {
            lanes.push(self.books(&sale, &lane).await?);
        }
        Ok(ConservationView::new(lanes))
    }

    /// What a frozen lane shows is not what is sold.
    async fn check_open(&self, lane: &LaneId) -> Result<(), Problem> {
        let found = self.lanes.find(lane).await.map_err(|error| Problem::read(&error))?;
        match found.frozen {
            Some(why) => Err(Problem::read(&LaneError::Frozen(why))),
            None => Ok(()),
        }
    }

    pub(super) async fn books(&self, sale: &Sale, lane: &LaneId) -> Result<LaneBooks, Problem> {
        if !sale.phase.archived {
            self.check_open(lane).await?;
        }
        let outcome = if sale.phase.archived {
            check_recorded(&self.ledger, lane).await
        } else {
            let secret = self.secret(sale.secret_version).await?;
            let events_max = self.options.reconcile_events_max;
            match check(&self.lanes, &self.ledger, lane, &secret, events_max).await {
                Err(CheckError::Lane(LaneError::Missing | LaneError::Frozen(_)))
                    if self.is_archived(&sale.id).await? =>
                {
                    check_recorded(&self.ledger, lane).await
                }
                outcome => outcome,
            }
        };
        outcome.map_err(|error| match error {
            CheckError::Lane(error) => Problem::read(&error),
            CheckError::Ledger(error) => Problem::ledger(&error),
        })
    }
}

/// Whether Redis and the database agree, while the sale runs.
#[utoipa::path(
    get, path = "/v1/sales/{sale_id}/conservation", operation_id = "show_conservation", tag = "stock",
    params(("sale_id" = SaleId, Path)),
    responses(
        (status = 200, description = "Compared at one event of each lane: what the database does not have yet is counted in, from the lane's outbox; figures that it had later are taken back", body = ConservationView),
        (status = 404, description = "sale-not-found"),
    ),
    security(("key" = []))
)]
pub async fn show(
    State(api): State<Api>,
    _caller: OperatorCaller,
    _query: Params<NoParameters>,
    names: PathNames,
) -> Answer {
    let in_flight = api.enter()?;
    let id = names.sale_id()?;
    // A task of its own: its transaction must end in order, whether or not the client is there.
    let task = tokio::spawn(async move {
        let _in_flight = in_flight;
        api.conservation(&id).await
    });
    let view = task.await.map_err(|error| Problem::internal(&error))??;
    Ok(json(StatusCode::OK, &view))
}
