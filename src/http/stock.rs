//! Where a sale's units are, now.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use futures_util::future::try_join_all;
use serde::Serialize;
use utoipa::ToSchema;

use super::auth::OperatorCaller;
use super::extract::{NoParameters, Params, PathNames};
use super::problem::Problem;
use super::{Answer, Api, json};
use crate::domain::ids::LaneId;
use crate::domain::names::{SaleId, Sku};
use crate::domain::sale::{Phase, State as SaleState};
use crate::domain::stock::{Counters, CountersSnapshot};
use crate::domain::time::Timestamp;
use crate::lanes::LaneError;
use crate::lanes::reply::{Stamped, Stock};
use crate::ledger::Sale;

/// How old the copy of a definition may be when its lane has a newer one.
const DEFINITION_AGE_MAX: Duration = Duration::from_millis(100);

/// A sale, and its counters at one moment.
pub(super) struct Levels {
    pub sale: Arc<Sale>,
    pub state: SaleState,
    counters: HashMap<Sku, Counters>,
}

impl Levels {
    /// Of every SKU, in the order of the definition.
    pub fn skus(&self) -> impl Iterator<Item = (&Sku, Option<u32>, Counters)> {
        self.sale.definition.skus.iter().map(|defined| {
            let counters = self.counters.get(&defined.sku).copied().unwrap_or_default();
            (&defined.sku, defined.per_buyer_limit, counters)
        })
    }
}

/// What all lanes of a sale have together.
struct Live {
    now: Timestamp,
    version: u64,
    phase: Phase,
    counters: HashMap<Sku, Counters>,
}

impl Live {
    fn sum(lanes: Vec<Stamped<Stock>>) -> Self {
        let mut sum = Self {
            now: Timestamp::default(),
            version: 0,
            phase: Phase::default(),
            counters: HashMap::new(),
        };
        for Stamped { now, outcome: stock, .. } in lanes {
            sum.now = sum.now.max(now);
            if stock.version > sum.version {
                (sum.version, sum.phase) = (stock.version, stock.phase);
            }
            for sku in stock.skus {
                let total = sum.counters.entry(sku.sku).or_default();
                total.available += sku.counters.available;
                total.held += sku.counters.held;
                total.sold += sku.counters.sold;
                total.version += sku.counters.version;
            }
        }
        sum
    }
}

impl Api {
    /// The sale as its lanes have it; from the database once it is archived.
    pub(super) async fn levels(&self, id: &SaleId) -> Result<Levels, Problem> {
        let sale = self.sale(id).await?;
        if sale.phase.archived {
            return self.recorded_levels(sale).await;
        }
        let lane = |number| LaneId { sale: id.clone(), lane: number };
        let asked = sale.lanes.iter().map(async |one| self.lanes.stock(&lane(one.lane)).await);
        let live = match try_join_all(asked).await {
            Ok(lanes) => Live::sum(lanes),
            Err(LaneError::Missing | LaneError::Frozen(_)) if self.is_archived(id).await? => {
                return self.recorded_levels(self.sale(id).await?).await;
            }
            Err(error) => return Err(Problem::read(&error)),
        };
        let sale = if live.version > sale.version { self.newer(sale).await? } else { sale };
        let state = live.phase.state_at(live.now);
        Ok(Levels { sale, state, counters: live.counters })
    }

    /// A sale that another instance has just redefined. While the database is away, our copy does.
    async fn newer(&self, sale: Arc<Sale>) -> Result<Arc<Sale>, Problem> {
        match self.catalog.no_older_than(DEFINITION_AGE_MAX).await {
            Ok(()) => self.sale(&sale.id).await,
            Err(_) => Ok(sale),
        }
    }

    async fn recorded_levels(&self, sale: Arc<Sale>) -> Result<Levels, Problem> {
        let counters = self.ledger.counters(&sale.id).await.map_err(|e| Problem::ledger(&e))?;
        Ok(Levels { sale, state: SaleState::Archived, counters })
    }
}

/// Where one SKU's units are.
#[derive(Debug, Serialize, ToSchema)]
pub struct SkuLevels {
    pub sku: Sku,
    #[serde(flatten)]
    pub counters: CountersSnapshot,
}

/// Where a sale's units are, in the order of its definition.
#[derive(Debug, Serialize, ToSchema)]
pub struct StockView {
    pub skus: Vec<SkuLevels>,
}

/// Live counters.
#[utoipa::path(
    get, path = "/v1/sales/{sale_id}/stock", operation_id = "show_stock", tag = "stock",
    params(("sale_id" = SaleId, Path)),
    responses(
        (status = 200, description = "total = available + held + sold; version counts adjustments", body = StockView),
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
    let _in_flight = api.enter()?;
    let levels = api.levels(&names.sale_id()?).await?;
    let sku = |(sku, _, counters): (&Sku, _, Counters)| SkuLevels {
        sku: sku.clone(),
        counters: counters.into(),
    };
    Ok(json(StatusCode::OK, &StockView { skus: levels.skus().map(sku).collect() }))
}
