//! Adjustments of stock: changes of a total by an operator, answered once they are recorded.

use axum::extract::State;
use axum::http::header::IF_MATCH;
use axum::http::{HeaderMap, StatusCode};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::auth::{Caller, OperatorCaller};
use super::extract::{Keyed, Members, Parameters, Params, PathNames, Query, Text, sku_not_found};
use super::orders::{IDEMPOTENT_REPLAYED, YES, key_reused, sale_archived};
use super::problem::{Code, FieldError, Problem};
use super::{Answer, Api, cursor, json};
use crate::domain::ids::{AdjustmentId, LaneId};
use crate::domain::names::{IdempotencyKey, KeyName, SaleId, Sku};
use crate::domain::stock::{
    Adjustment, AdjustmentNote, Counters, CountersSnapshot, Reason, TOTAL_MAX,
};
use crate::domain::time::Timestamp;
use crate::lanes::LaneError;
use crate::lanes::command::Adjust;
use crate::lanes::reply::{Adjusted, Stamped};
use crate::ledger::{AdjustmentCursor, Sale};

/// Change the total of one SKU.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub struct AdjustStock {
    /// Units to add; negative: to take. Not 0.
    #[schema(minimum = -1_000_000_000, maximum = 1_000_000_000)]
    pub delta: i64,
    pub reason: Reason,
    #[serde(default)]
    pub reference: Option<Text>,
    #[serde(default)]
    pub note: Option<Text>,
}

impl Members for AdjustStock {
    fn check(self) -> Result<Self, Vec<FieldError>> {
        if self.delta == 0 || !(-TOTAL_MAX..=TOTAL_MAX).contains(&self.delta) {
            let detail = format!("must be -{TOTAL_MAX} to {TOTAL_MAX}, and not 0");
            return Err(vec![FieldError::new("/delta", detail)]);
        }
        Ok(self)
    }
}

/// An adjustment that has happened and is recorded.
#[derive(Debug, Serialize, ToSchema)]
pub struct AdjustmentView {
    pub id: AdjustmentId,
    pub sale_id: SaleId,
    pub sku: Sku,
    pub delta: i64,
    pub before: CountersSnapshot,
    pub after: CountersSnapshot,
    pub reason: Reason,
    pub reference: Option<String>,
    pub note: Option<String>,
    /// The name of the API key that asked for it.
    pub actor: KeyName,
    pub created_at: Timestamp,
    /// The adjustment that this one undoes.
    pub undoes: Option<AdjustmentId>,
    /// The adjustment that undoes this one.
    pub undone_by: Option<AdjustmentId>,
}

impl From<Adjustment> for AdjustmentView {
    fn from(adjustment: Adjustment) -> Self {
        let AdjustmentNote { reason, reference, note } = adjustment.note.clone();
        Self {
            sale_id: adjustment.sale().clone(),
            after: adjustment.after(),
            id: adjustment.id,
            sku: adjustment.sku,
            delta: adjustment.delta,
            before: adjustment.before,
            reason,
            reference,
            note,
            actor: adjustment.actor,
            created_at: adjustment.created_at,
            undoes: None,
            undone_by: None,
        }
    }
}

/// A page of adjustments.
#[derive(Debug, Serialize, ToSchema)]
pub struct AdjustmentList {
    pub adjustments: Vec<AdjustmentView>,
    /// Where the next page begins; null on the last.
    pub next_cursor: Option<String>,
}

/// Changes a total; answered when the database has it.
#[utoipa::path(
    post, path = "/v1/sales/{sale_id}/stock/{sku}/adjustments", operation_id = "adjust_stock", tag = "stock",
    params(("sale_id" = SaleId, Path), ("sku" = Sku, Path),
        ("Idempotency-Key" = IdempotencyKey, Header, description = "Scoped to the sale, and kept for ever")),
    request_body = AdjustStock,
    responses(
        (status = 201, description = "Changed and recorded", body = AdjustmentView),
        (status = 200, description = "A replay", body = AdjustmentView,
            headers(("Idempotent-Replayed" = bool, description = "true"))),
        (status = 404, description = "sale-not-found, sku-not-found"),
        (status = 409, description = "stock-in-use, with the counters; sale-archived"),
        (status = 422, description = "idempotency-key-reused"),
    ),
    security(("key" = []))
)]
pub async fn adjust(
    State(api): State<Api>,
    OperatorCaller(caller): OperatorCaller,
    names: PathNames,
    headers: HeaderMap,
    keyed: Keyed<AdjustStock>,
) -> Answer {
    let Keyed { key, members: asked } = keyed;
    if headers.contains_key(IF_MATCH) {
        // Better refused than ignored: the caller relies on it.
        return Err(Problem::invalid_at("", "If-Match is not served on adjustments yet"));
    }
    let _in_flight = api.enter()?;
    let sale = api.sale(&names.sale_id()?).await?;
    let adjust = api.adjust_command(&sale, names.sku()?, &key, asked, &caller).await?;
    if sale.phase.archived {
        return api.adjusted_before_archive(&adjust).await;
    }
    match api.lanes.adjust(adjust.clone()).await {
        Ok(Stamped { marks, outcome, .. }) => match outcome {
            Adjusted::Adjusted(done) => {
                api.wait_recorded(&done, marks.recorded).await?;
                Ok(json(StatusCode::CREATED, &AdjustmentView::from(done)))
            }
            Adjusted::Replayed(done) => {
                api.wait_recorded(&done, marks.recorded).await?;
                Ok(replayed(done))
            }
            Adjusted::KeyReused => Err(key_reused()),
            Adjusted::UnknownSku => Err(sku_not_found().with("sku", adjust.sku)),
            Adjusted::StockInUse(counters) => Err(stock_in_use(&adjust.sku, counters)),
            Adjusted::OutOfRange(counters) => Err(out_of_range(counters)),
            Adjusted::Archived => Err(sale_archived()),
        },
        Err(LaneError::Missing) if api.is_archived(&sale.id).await? => {
            api.adjusted_before_archive(&adjust).await
        }
        Err(error) => Err(Problem::change(&error)),
    }
}

fn replayed(done: Adjustment) -> axum::response::Response {
    let mut response = json(StatusCode::OK, &AdjustmentView::from(done));
    response.headers_mut().insert(IDEMPOTENT_REPLAYED, YES);
    response
}

fn stock_in_use(sku: &Sku, counters: Counters) -> Problem {
    let CountersSnapshot { total, available, held, sold, version } = counters.into();
    Problem::new(Code::StockInUse, "what is held or sold is never taken")
        .with("sku", sku)
        .with("total", total)
        .with("available", available)
        .with("held", held)
        .with("sold", sold)
        .with("version", version)
}

fn out_of_range(counters: Counters) -> Problem {
    let now = counters.total();
    Problem::invalid_at(
        "/delta",
        format!("the total, {now} now, must stay within 0 and {TOTAL_MAX}"),
    )
}

/// Which adjustments to list.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ListAdjustments {
    sku: Option<Sku>,
    /// How many on a page; 50 unless said otherwise.
    #[param(value_type = Option<u32>, minimum = 1, maximum = 200)]
    limit: u32,
    /// `next_cursor` of the page before.
    #[param(value_type = Option<String>)]
    cursor: Option<AdjustmentCursor>,
}

impl Parameters for ListAdjustments {
    fn take(query: &mut Query) -> Self {
        Self {
            sku: query.parse("sku"),
            limit: query.limit(),
            cursor: query
                .take("cursor", cursor::decode)
                .map(|(created_at, id)| AdjustmentCursor { created_at, id }),
        }
    }
}

/// The audit trail, newest first.
#[utoipa::path(
    get, path = "/v1/sales/{sale_id}/adjustments", operation_id = "list_adjustments", tag = "stock",
    params(("sale_id" = SaleId, Path), ListAdjustments),
    responses(
        (status = 200, description = "A page, ties by id", body = AdjustmentList),
        (status = 404, description = "sale-not-found"),
    ),
    security(("key" = []))
)]
pub async fn list(
    State(api): State<Api>,
    _caller: OperatorCaller,
    Params(asked): Params<ListAdjustments>,
    names: PathNames,
) -> Answer {
    let _in_flight = api.enter()?;
    let sale = api.sale(&names.sale_id()?).await?;
    let (sku, cursor) = (asked.sku.as_ref(), asked.cursor.as_ref());
    let page = api.ledger.list_adjustments(&sale.id, sku, cursor, asked.limit).await;
    let page = page.map_err(|e| Problem::ledger(&e))?;
    let list = AdjustmentList {
        adjustments: page.items.into_iter().map(Into::into).collect(),
        next_cursor: page.next.map(|next| cursor::encode(next.created_at, &next.id)),
    };
    Ok(json(StatusCode::OK, &list))
}

impl Api {
    async fn adjust_command(
        &self,
        sale: &Sale,
        sku: Sku,
        key: &IdempotencyKey,
        asked: AdjustStock,
        caller: &Caller,
    ) -> Result<Adjust, Problem> {
        let secret = self.secret(sale.secret_version).await?;
        let lane = LaneId { sale: sale.id.clone(), lane: 0 };
        Ok(Adjust {
            id: secret.adjustment_id(&lane, secret.adjustment_key(&sale.id, key)),
            sku,
            delta: asked.delta,
            note: AdjustmentNote {
                reason: asked.reason,
                reference: asked.reference.map(Into::into),
                note: asked.note.map(Into::into),
            },
            actor: caller.actor(),
            trace: caller.trace(),
        })
    }

    /// Waits until the adjustment is recorded: only then it is answered.
    async fn wait_recorded(&self, done: &Adjustment, recorded: u64) -> Result<(), Problem> {
        if recorded >= done.seq {
            return Ok(());
        }
        let timeout = self.options.recorded_timeout;
        match self.lanes.wait_recorded(done.id.lane(), done.seq, timeout).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(Problem::outcome_unknown()),
            Err(error) => {
                tracing::warn!(%error, "an adjustment was made, and its lane does not say whether it is recorded");
                Err(Problem::outcome_unknown())
            }
        }
    }

    /// A key is kept for ever: after the archive it is looked for in the audit trail.
    async fn adjusted_before_archive(&self, asked: &Adjust) -> Answer {
        let known = self.ledger.adjustment(&asked.id).await.map_err(|e| Problem::ledger(&e))?;
        match known {
            None => Err(sale_archived()),
            Some(done) => {
                let same =
                    (&done.sku, done.delta, &done.note) == (&asked.sku, asked.delta, &asked.note);
                if same { Ok(replayed(done)) } else { Err(key_reused()) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::extract::decode;

    fn pointer(text: &str) -> Option<String> {
        let errors = decode::<AdjustStock>(text.as_bytes()).err()?;
        Some(errors[0].pointer.clone())
    }

    #[test]
    fn an_adjustment_changes_something_for_a_reason() {
        assert_eq!(pointer(r#"{"delta":-5,"reason":"damaged","note":"wet"}"#), None);
        for (text, at) in [
            (r#"{"delta":0,"reason":"restock"}"#, "/delta"),
            (r#"{"delta":1000000001,"reason":"restock"}"#, "/delta"),
            (r#"{"delta":1.0,"reason":"restock"}"#, "/delta"),
            (r#"{"delta":1}"#, "/reason"),
            (r#"{"delta":1,"reason":"theft"}"#, "/reason"),
            (r#"{"delta":1,"reason":{"lost":null}}"#, "/reason"),
            (r#"{"delta":1,"reason":"lost","note":""}"#, "/note"),
            (r#"{"delta":1,"reason":"lost","dry_run":true}"#, "/dry_run"),
            (r#"{"set_total":1,"reason":"lost"}"#, "/set_total"),
        ] {
            assert_eq!(pointer(text).as_deref(), Some(at), "{text}");
        }
    }
}
