//! What a shop page shows of a sale: open to all, cheap for us however many look.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::extract::State;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, ETAG, IF_NONE_MATCH};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use futures_util::future::try_join_all;
use moka::future::Cache;
use serde::de::IntoDeserializer;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::auth::Anybody;
use super::extract::{OpenParams, Parameters, PathNames, Query};
use super::problem::{Code, Problem};
use super::stock::Levels;
use super::{Answer, Api, cursor};
use crate::domain::names::{SaleId, Sku};
use crate::domain::sale::State as SaleState;
use crate::domain::time::Timestamp;
use crate::ledger::Sale;

/// Views that are remembered at most.
const REMEMBERED_MAX: u64 = 10_000;
/// A view that nobody asked for so long is forgotten.
const IDLE_AFTER: Duration = Duration::from_secs(60);
/// Sales of a list that are looked at together.
const LOOKED_AT_ONCE: usize = 64;

/// One SKU on a shop page.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct SkuView {
    pub sku: Sku,
    pub available: i64,
    pub per_buyer_limit: Option<u32>,
}

/// A sale on a shop page.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct SaleView {
    pub id: SaleId,
    pub name: String,
    pub state: SaleState,
    pub opens_at: Option<Timestamp>,
    pub closes_at: Option<Timestamp>,
    pub per_buyer_limit: Option<u32>,
    pub skus: Vec<SkuView>,
}

impl SaleView {
    pub(super) fn new(levels: &Levels) -> Self {
        let sku = |(sku, per_buyer_limit, counters): (&Sku, _, crate::domain::stock::Counters)| {
            SkuView { sku: sku.clone(), available: counters.available, per_buyer_limit }
        };
        let skus = levels.skus().map(sku).collect();
        Self::with(&levels.sale, levels.state, skus)
    }

    /// A sale whose lane cannot be sold from: nothing of it can be had now.
    fn frozen(sale: &Sale) -> Self {
        let sku = |defined: &crate::domain::sale::SkuDefinition| SkuView {
            sku: defined.sku.clone(),
            available: 0,
            per_buyer_limit: defined.per_buyer_limit,
        };
        let state = sale.phase.state_at(now());
        Self::with(sale, state, sale.definition.skus.iter().map(sku).collect())
    }

    fn with(sale: &Sale, state: SaleState, skus: Vec<SkuView>) -> Self {
        Self {
            id: sale.id.clone(),
            name: sale.definition.name.clone(),
            state,
            opens_at: sale.definition.opens_at,
            closes_at: sale.definition.closes_at,
            per_buyer_limit: sale.definition.per_buyer_limit,
            skus,
        }
    }
}

fn now() -> Timestamp {
    chrono::Utc::now().into()
}

/// A page of sales.
#[derive(Debug, Serialize, ToSchema)]
pub struct SaleList {
    pub sales: Vec<SaleView>,
    /// Where the next page begins; null on the last.
    pub next_cursor: Option<String>,
}

/// A view and when looking began: what happened before is in it.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    pub sale: SaleView,
    body: Bytes,
    etag: HeaderValue,
    began: Instant,
}

/// The views that were looked at last.
pub(super) struct Views(Cache<SaleId, Result<Arc<Seen>, Problem>>);

impl Views {
    pub fn new() -> Self {
        Self(Cache::builder().max_capacity(REMEMBERED_MAX).time_to_idle(IDLE_AFTER).build())
    }

    pub async fn forget(&self, sale: &SaleId) {
        self.0.invalidate(sale).await;
    }
}

impl Api {
    /// The sale's view, at most as old as is allowed. Whoever asks meanwhile waits for the same look.
    pub(super) async fn view(&self, id: &SaleId) -> Result<Arc<Seen>, Problem> {
        let age_max = self.options.view_age_max;
        let is_old = |seen: &Result<Arc<Seen>, Problem>| {
            seen.as_ref().map_or(true, |seen| seen.began.elapsed() >= age_max)
        };
        let entry = self.views.0.entry_by_ref(id);
        entry.or_insert_with_if(self.look(id), is_old).await.into_value()
    }

    async fn look(&self, id: &SaleId) -> Result<Arc<Seen>, Problem> {
        let began = Instant::now();
        let sale = SaleView::new(&self.levels(id).await?);
        let (body, etag) = tagged(&sale);
        Ok(Arc::new(Seen { sale, body, etag, began }))
    }

    /// The same for a list, which one frozen sale must not stop.
    async fn view_in_list(&self, sale: &Sale) -> Result<SaleView, Problem> {
        match self.view(&sale.id).await {
            Ok(seen) => Ok(seen.sale.clone()),
            Err(problem) if problem.code() == Code::LaneFrozen => Ok(SaleView::frozen(sale)),
            Err(problem) => Err(problem),
        }
    }

    /// Sales in this state, newest first, behind the cursor: one more than asked for, if there is.
    async fn views(&self, asked: &ListSales) -> Result<Vec<(Arc<Sale>, SaleView)>, Problem> {
        let mut sales = self.catalog.sales();
        // Archived is for good, so our copy may say so; of the others only the lanes know.
        let wants_archived = asked.state.is_none_or(|state| state == SaleState::Archived);
        sales.retain(|sale| wants_archived || !sale.phase.archived);
        sales.sort_unstable_by(|a, b| (b.created_at, &b.id).cmp(&(a.created_at, &a.id)));
        if let Some(SaleCursor { created_at, id }) = &asked.cursor {
            sales.retain(|sale| (sale.created_at, &sale.id) < (*created_at, id));
        }
        let mut found = Vec::new();
        for sales in sales.chunks(LOOKED_AT_ONCE) {
            let views = try_join_all(sales.iter().map(|sale| self.view_in_list(sale))).await?;
            let pairs = sales.iter().cloned().zip(views);
            found.extend(pairs.filter(|(_, view)| asked.state.is_none_or(|s| s == view.state)));
            if found.len() > asked.limit as usize {
                found.truncate(asked.limit as usize + 1);
                break;
            }
        }
        Ok(found)
    }
}

/// A body and its strong ETag.
fn tagged(body: &impl Serialize) -> (Bytes, HeaderValue) {
    let body = serde_json::to_vec(body).expect("plain data is always JSON");
    let hash = blake3::hash(&body).to_hex();
    let etag = HeaderValue::try_from(format!("\"{}\"", &hash[..22])).expect("hex is ASCII");
    (body.into(), etag)
}

/// The body, or 304 where the caller has it.
fn answer(headers: &HeaderMap, body: Bytes, etag: HeaderValue) -> Response {
    let known = has(headers, &etag);
    let no_cache = HeaderValue::from_static("no-cache");
    let tags = [(ETAG, etag), (CACHE_CONTROL, no_cache)];
    if known {
        return (StatusCode::NOT_MODIFIED, tags).into_response();
    }
    let json = HeaderValue::from_static("application/json");
    (StatusCode::OK, tags, [(CONTENT_TYPE, json)], body).into_response()
}

/// Whether `If-None-Match` names this tag; weak comparison (RFC 9110, 13.1.2).
fn has(headers: &HeaderMap, etag: &HeaderValue) -> bool {
    let lines = headers.get_all(IF_NONE_MATCH).into_iter();
    let mut tags = lines.flat_map(|line| line.as_bytes().split(|byte| *byte == b','));
    tags.any(|tag| {
        let tag = tag.trim_ascii();
        tag == b"*" || tag.strip_prefix(b"W/").unwrap_or(tag) == etag.as_bytes()
    })
}

/// What a shop page shows of a sale.
#[utoipa::path(
    get, path = "/v1/sales/{sale_id}", operation_id = "show_sale", tag = "sales",
    params(("sale_id" = SaleId, Path),
        ("If-None-Match" = Option<String>, Header, description = "The ETag of the answer before")),
    responses(
        (status = 200, description = "At most 250 ms old; readable from other origins", body = SaleView,
            headers(("ETag" = String), ("Cache-Control" = String), ("Access-Control-Allow-Origin" = String))),
        (status = 304, description = "Unchanged"),
        (status = 404, description = "sale-not-found"),
    )
)]
pub async fn show(
    State(api): State<Api>,
    _caller: Anybody,
    names: PathNames,
    headers: HeaderMap,
) -> Answer {
    let _in_flight = api.enter()?;
    let seen = api.view(&names.sale_id()?).await?;
    Ok(answer(&headers, seen.body.clone(), seen.etag.clone()))
}

/// The last sale of a page: the next page begins after it.
#[derive(Debug)]
struct SaleCursor {
    created_at: Timestamp,
    id: SaleId,
}

/// Which sales to list.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ListSales {
    state: Option<SaleState>,
    /// How many on a page; 50 unless said otherwise.
    #[param(value_type = Option<u32>, minimum = 1, maximum = 200)]
    limit: u32,
    /// `next_cursor` of the page before.
    #[param(value_type = Option<String>)]
    cursor: Option<SaleCursor>,
}

impl Parameters for ListSales {
    fn take(query: &mut Query) -> Self {
        Self {
            state: query.take("state", state),
            limit: query.limit(),
            cursor: query
                .take("cursor", cursor::decode)
                .map(|(created_at, id)| SaleCursor { created_at, id }),
        }
    }
}

fn state(word: &str) -> Result<SaleState, String> {
    let state = SaleState::deserialize(word.into_deserializer());
    state.map_err(|_: serde::de::value::Error| "is no state of a sale".to_owned())
}

/// Sales, newest first.
#[utoipa::path(
    get, path = "/v1/sales", operation_id = "list_sales", tag = "sales",
    params(ListSales,
        ("If-None-Match" = Option<String>, Header, description = "The ETag of the answer before")),
    responses(
        (status = 200, description = "A page; at most 250 ms old; readable from other origins", body = SaleList,
            headers(("ETag" = String), ("Cache-Control" = String), ("Access-Control-Allow-Origin" = String))),
        (status = 304, description = "Unchanged"),
    )
)]
pub async fn list(
    State(api): State<Api>,
    _caller: Anybody,
    OpenParams(asked): OpenParams<ListSales>,
    headers: HeaderMap,
) -> Answer {
    let _in_flight = api.enter()?;
    let mut found = api.views(&asked).await?;
    let limit = asked.limit as usize;
    let more = found.len() > limit;
    found.truncate(limit);
    let last = found.last().filter(|_| more);
    let next_cursor = last.map(|(sale, _)| cursor::encode(sale.created_at, &sale.id));
    let sales = found.into_iter().map(|(_, view)| view).collect();
    let (body, etag) = tagged(&SaleList { sales, next_cursor });
    Ok(answer(&headers, body, etag))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn if_none_match_compares_weakly() {
        let etag = HeaderValue::from_static("\"a\"");
        let names = |line: &'static str| {
            has(&HeaderMap::from_iter([(IF_NONE_MATCH, HeaderValue::from_static(line))]), &etag)
        };
        for line in ["\"a\"", "W/\"a\"", "\"b\", \"a\"", "*"] {
            assert!(names(line), "{line}");
        }
        for line in ["\"b\"", "a", ""] {
            assert!(!names(line), "{line}");
        }
    }
}
