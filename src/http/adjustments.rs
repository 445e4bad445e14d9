//! Adjustments of stock: changes of a total by an operator, answered once they are recorded.

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::auth::{Caller, OperatorCaller};
use super::etag::IfMatch;
use super::extract::{
    Json, Members, OptionalJson, Parameters, Params, PathNames, Query, Text, adjustment_not_found,
    idempotency_key, sku_not_found,
};
use super::orders::{IDEMPOTENT_REPLAYED, YES, key_reused, sale_archived};
use super::problem::{Code, FieldError, Problem};
use super::{Answer, Api, cursor, json};
use crate::domain::durability::Durability;
use crate::domain::ids::{AdjustmentId, LaneId};
use crate::domain::names::{IdempotencyKey, KeyName, SaleId, Sku};
use crate::domain::stock::{
    Adjustment, AdjustmentNote, Counters, CountersSnapshot, Reason, TOTAL_MAX, TotalChange,
};
use crate::domain::time::Timestamp;
use crate::lanes::LaneError;
use crate::lanes::command::{Adjust, IfVersion, Preview, Undo};
use crate::lanes::reply::{Adjusted, ChangeRefusal, Marks, Previewed, Stamped, Undone};
use crate::ledger::{AdjustmentCursor, Sale};

/// Change the total of one SKU, by `delta` or to `set_total`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub struct AdjustStock {
    /// Units to add; negative: to take. Not 0.
    #[serde(default)]
    #[schema(minimum = -1_000_000_000, maximum = 1_000_000_000)]
    pub delta: Option<i64>,
    /// How many there shall be in all. Needs `If-Match`. As many as there are: an adjustment by 0.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 1_000_000_000)]
    pub set_total: Option<i64>,
    pub reason: Reason,
    #[serde(default)]
    pub reference: Option<Text>,
    #[serde(default)]
    pub note: Option<Text>,
    /// Only say what would come of it.
    #[serde(default)]
    pub dry_run: bool,
}

impl AdjustStock {
    /// # Errors
    /// Where it is not one change, or not in its range.
    pub fn change(&self) -> Result<TotalChange, FieldError> {
        let error = |pointer: &str, detail: String| Err(FieldError::new(pointer, detail));
        match (self.delta, self.set_total) {
            (Some(delta), None) if delta == 0 || !(-TOTAL_MAX..=TOTAL_MAX).contains(&delta) => {
                error("/delta", format!("must be -{TOTAL_MAX} to {TOTAL_MAX}, and not 0"))
            }
            (Some(delta), None) => Ok(TotalChange::By(delta)),
            (None, Some(total)) if !(0..=TOTAL_MAX).contains(&total) => {
                error("/set_total", format!("must be 0 to {TOTAL_MAX}"))
            }
            (None, Some(total)) => Ok(TotalChange::To(total)),
            (Some(_), Some(_)) => error("/set_total", "cannot be there beside delta".to_owned()),
            (None, None) => error("/delta", "this or set_total must be there".to_owned()),
        }
    }
}

impl Members for AdjustStock {
    fn check(self) -> Result<Self, Vec<FieldError>> {
        match self.change() {
            Ok(_) => Ok(self),
            Err(error) => Err(vec![error]),
        }
    }
}

/// Do the opposite of an adjustment.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub struct UndoAdjustment {
    #[serde(default)]
    pub note: Option<Text>,
}

impl Members for UndoAdjustment {}

/// An adjustment that has happened and is recorded; or, for a dry run, would.
#[derive(Debug, Serialize, ToSchema)]
pub struct AdjustmentView {
    /// None for a dry run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<AdjustmentId>,
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
            id: Some(adjustment.id),
            sku: adjustment.sku,
            delta: adjustment.delta,
            before: adjustment.before,
            reason,
            reference,
            note,
            actor: adjustment.actor,
            created_at: adjustment.created_at,
            undoes: adjustment.undoes,
            undone_by: adjustment.undone_by,
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
        ("Idempotency-Key" = Option<IdempotencyKey>, Header,
            description = "Scoped to the sale, and kept for ever. Required, but for a dry run"),
        ("If-Match" = Option<String>, Header,
            description = "The SKU's version, in double quotes. Required with set_total")),
    request_body = AdjustStock,
    responses(
        (status = 201, description = "Changed and recorded", body = AdjustmentView),
        (status = 200, description = "A replay; or a dry run, then without id", body = AdjustmentView,
            headers(("Idempotent-Replayed" = bool, description = "true for a replay"))),
        (status = 404, description = "sale-not-found, sku-not-found"),
        (status = 409, description = "stock-in-use, with the counters; sale-archived"),
        (status = 412, description = "precondition-failed, with the counters"),
        (status = 422, description = "idempotency-key-reused"),
        (status = 428, description = "precondition-required"),
    ),
    security(("key" = []))
)]
pub async fn adjust(
    State(api): State<Api>,
    OperatorCaller(caller): OperatorCaller,
    names: PathNames,
    headers: HeaderMap,
    Json(asked): Json<AdjustStock>,
) -> Answer {
    let change = asked.change().map_err(|error| Problem::invalid(vec![error]))?;
    let key = if asked.dry_run { None } else { Some(idempotency_key(&headers)?) };
    let _in_flight = api.enter()?;
    let sale = api.sale(&names.sale_id()?).await?;
    let asking = Asking {
        sku: names.sku()?,
        change,
        if_version: if_version(&headers),
        note: AdjustmentNote {
            reason: asked.reason,
            reference: asked.reference.map(Into::into),
            note: asked.note.map(Into::into),
        },
        caller: &caller,
    };
    match key {
        Some(key) => api.adjust(&sale, &key, asking).await,
        None => api.preview(&sale, asking).await,
    }
}

/// `If-Match`, as a lane takes it.
fn if_version(headers: &HeaderMap) -> Option<IfVersion> {
    let if_match = IfMatch::of(headers)?;
    let any = if_match.is_any();
    Some(if any { IfVersion::Any } else { IfVersion::OneOf(if_match.versions()) })
}

/// Does the exact opposite of an adjustment, as a new one; answered when the database has it.
#[utoipa::path(
    post, path = "/v1/adjustments/{adjustment_id}/undo", operation_id = "undo_adjustment", tag = "stock",
    params(("adjustment_id" = AdjustmentId, Path),
        ("Idempotency-Key" = IdempotencyKey, Header, description = "Scoped to the sale, and kept for ever")),
    request_body(content = Option<UndoAdjustment>, description = "May be left out"),
    responses(
        (status = 201, description = "Undone and recorded: the new adjustment", body = AdjustmentView),
        (status = 200, description = "A replay", body = AdjustmentView,
            headers(("Idempotent-Replayed" = bool, description = "true"))),
        (status = 404, description = "adjustment-not-found"),
        (status = 409, description = "already-undone, with undone_by; stock-in-use, with the counters; sale-archived"),
        (status = 422, description = "idempotency-key-reused"),
    ),
    security(("key" = []))
)]
pub async fn undo(
    State(api): State<Api>,
    OperatorCaller(caller): OperatorCaller,
    names: PathNames,
    headers: HeaderMap,
    OptionalJson(asked): OptionalJson<UndoAdjustment>,
) -> Answer {
    let key = idempotency_key(&headers)?;
    let _in_flight = api.enter()?;
    let undoes = api.genuine_adjustment(&names)?;
    let sale = api.sale(&undoes.lane().sale).await?;
    let secret = api.secret(sale.secret_version).await?;
    let undo = Undo {
        id: secret.adjustment_id(undoes.lane(), secret.adjustment_key(&sale.id, &key)),
        undoes,
        note: asked.note.map(Into::into),
        actor: caller.actor(),
        trace: caller.trace(),
    };
    if sale.phase.archived {
        return api.undone_before_archive(&undo).await;
    }
    match api.lanes.undo(undo.clone()).await {
        Ok(Stamped { marks, outcome, .. }) => match outcome {
            Undone::Undone(done) => api.created(done, marks).await,
            Undone::Replayed(done) => api.replayed(done, marks).await,
            Undone::KeyReused => Err(key_reused()),
            Undone::Unknown => Err(adjustment_not_found()),
            Undone::Archived => Err(sale_archived()),
            Undone::AlreadyUndone { by } => {
                let detail = "another adjustment undid it; undo that one to have it again";
                Err(Problem::new(Code::AlreadyUndone, detail).with("undone_by", by))
            }
            Undone::StockInUse { sku, counters } => Err(stock_in_use(&sku, counters)),
            Undone::OutOfRange { sku, counters } => Err(out_of_range("", &sku, counters)),
        },
        Err(LaneError::Missing | LaneError::Frozen(_)) if api.is_archived(&sale.id).await? => {
            api.undone_before_archive(&undo).await
        }
        Err(error) => Err(Problem::change(&error)),
    }
}

fn refused(sku: &Sku, refusal: ChangeRefusal) -> Problem {
    match refusal {
        ChangeRefusal::Archived => sale_archived(),
        ChangeRefusal::UnknownSku => sku_not_found().with("sku", sku),
        ChangeRefusal::PreconditionRequired => Problem::new(
            Code::PreconditionRequired,
            "a total is set for the version that If-Match names: what it was when somebody counted",
        ),
        ChangeRefusal::PreconditionFailed(counters) => {
            let detail = format!("the SKU's version is {}", counters.version);
            with_counters(Problem::new(Code::PreconditionFailed, detail), sku, counters)
        }
        ChangeRefusal::StockInUse(counters) => stock_in_use(sku, counters),
        ChangeRefusal::OutOfRange(counters) => out_of_range("/delta", sku, counters),
    }
}

fn stock_in_use(sku: &Sku, counters: Counters) -> Problem {
    let problem = Problem::new(Code::StockInUse, "what is held or sold is never taken");
    with_counters(problem, sku, counters)
}

fn out_of_range(pointer: &str, sku: &Sku, counters: Counters) -> Problem {
    let now = counters.total();
    let detail = format!("the total, {now} now, must stay within 0 and {TOTAL_MAX}");
    with_counters(Problem::invalid_at(pointer, detail), sku, counters)
}

fn with_counters(problem: Problem, sku: &Sku, counters: Counters) -> Problem {
    let CountersSnapshot { total, available, held, sold, version } = counters.into();
    problem
        .with("sku", sku)
        .with("total", total)
        .with("available", available)
        .with("held", held)
        .with("sold", sold)
        .with("version", version)
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

/// A change of a total as it is asked for, to be made or to be tried.
struct Asking<'a> {
    sku: Sku,
    change: TotalChange,
    if_version: Option<IfVersion>,
    note: AdjustmentNote,
    caller: &'a Caller,
}

/// Where a sale's totals are adjusted.
fn lane_of(sale: &Sale) -> LaneId {
    LaneId { sale: sale.id.clone(), lane: 0 }
}

impl Api {
    async fn adjust(&self, sale: &Sale, key: &IdempotencyKey, asking: Asking<'_>) -> Answer {
        let secret = self.secret(sale.secret_version).await?;
        let adjust = Adjust {
            id: secret.adjustment_id(&lane_of(sale), secret.adjustment_key(&sale.id, key)),
            sku: asking.sku,
            change: asking.change,
            if_version: asking.if_version,
            note: asking.note,
            actor: asking.caller.actor(),
            trace: asking.caller.trace(),
        };
        if sale.phase.archived {
            return self.adjusted_before_archive(&adjust).await;
        }
        match self.lanes.adjust(adjust.clone()).await {
            Ok(Stamped { marks, outcome, .. }) => match outcome {
                Adjusted::Adjusted(done) => self.created(done, marks).await,
                Adjusted::Replayed(done) => self.replayed(done, marks).await,
                Adjusted::KeyReused => Err(key_reused()),
                Adjusted::Refused(refusal) => Err(refused(&adjust.sku, refusal)),
            },
            Err(LaneError::Missing | LaneError::Frozen(_))
                if self.is_archived(&sale.id).await? =>
            {
                self.adjusted_before_archive(&adjust).await
            }
            Err(error) => Err(Problem::change(&error)),
        }
    }

    async fn preview(&self, sale: &Sale, asking: Asking<'_>) -> Answer {
        let Asking { sku, change, if_version, note, caller } = asking;
        if sale.phase.archived {
            return Err(sale_archived());
        }
        let preview = Preview { sku: sku.clone(), change, if_version };
        let (now, delta, before) = match self.lanes.preview(&lane_of(sale), preview).await {
            Ok(Stamped { now, outcome, .. }) => match outcome {
                Previewed::Possible { delta, before } => (now, delta, before),
                Previewed::Refused(refusal) => return Err(refused(&sku, refusal)),
            },
            Err(LaneError::Missing | LaneError::Frozen(_))
                if self.is_archived(&sale.id).await? =>
            {
                return Err(sale_archived());
            }
            Err(error) => return Err(Problem::read(&error)),
        };
        let view = AdjustmentView {
            id: None,
            sale_id: sale.id.clone(),
            sku,
            delta,
            before: before.into(),
            after: before.adjusted(delta).into(),
            reason: note.reason,
            reference: note.reference,
            note: note.note,
            actor: caller.actor(),
            created_at: now,
            undoes: None,
            undone_by: None,
        };
        Ok(json(StatusCode::OK, &view))
    }

    /// The id in the path, if one of us made it: then its sale exists, and only its lane knows more.
    fn genuine_adjustment(&self, names: &PathNames) -> Result<AdjustmentId, Problem> {
        let id = names.adjustment_id()?;
        let genuine = self.catalog.is_genuine_adjustment(&id).map_err(|e| Problem::ledger(&e))?;
        if genuine { Ok(id) } else { Err(adjustment_not_found()) }
    }

    async fn created(&self, done: Adjustment, marks: Marks) -> Answer {
        self.wait_recorded(&done, done.seq, marks).await?;
        Ok(json(StatusCode::CREATED, &AdjustmentView::from(done)))
    }

    async fn replayed(&self, done: Adjustment, marks: Marks) -> Answer {
        // What undid it is told once it is recorded too; it has happened before now.
        let seq = if done.undone_by.is_some() { marks.seq } else { done.seq };
        self.wait_recorded(&done, seq, marks).await?;
        Ok(replay(done))
    }

    /// Waits until event `seq` is recorded, the adjustment's or a later one: only then it is answered.
    async fn wait_recorded(
        &self,
        done: &Adjustment,
        seq: u64,
        marks: Marks,
    ) -> Result<(), Problem> {
        self.wait_for(done.id.lane(), Durability::Recorded, seq, marks).await.map(|_| ())
    }

    /// A key is kept for ever: after the archive it is looked for in the audit trail.
    async fn adjusted_before_archive(&self, asked: &Adjust) -> Answer {
        let Some(done) = self.recorded_adjustment(&asked.id).await? else {
            return Err(sale_archived());
        };
        let same = (&done.sku, done.change(), &done.note, &done.undoes)
            == (&asked.sku, asked.change, &asked.note, &None);
        if same { Ok(replay(done)) } else { Err(key_reused()) }
    }

    async fn undone_before_archive(&self, asked: &Undo) -> Answer {
        if let Some(done) = self.recorded_adjustment(&asked.id).await? {
            let same =
                (done.undoes.as_ref(), &done.note.note) == (Some(&asked.undoes), &asked.note);
            return if same { Ok(replay(done)) } else { Err(key_reused()) };
        }
        let original = self.recorded_adjustment(&asked.undoes).await?;
        Err(original.map_or_else(adjustment_not_found, |_| sale_archived()))
    }

    async fn recorded_adjustment(&self, id: &AdjustmentId) -> Result<Option<Adjustment>, Problem> {
        self.ledger.adjustment(id).await.map_err(|e| Problem::ledger(&e))
    }
}

fn replay(done: Adjustment) -> Response {
    let mut response = json(StatusCode::OK, &AdjustmentView::from(done));
    response.headers_mut().insert(IDEMPOTENT_REPLAYED, YES);
    response
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
        assert_eq!(pointer(r#"{"set_total":0,"reason":"recount","dry_run":true}"#), None);
        for (text, at) in [
            (r#"{"delta":0,"reason":"restock"}"#, "/delta"),
            (r#"{"delta":1000000001,"reason":"restock"}"#, "/delta"),
            (r#"{"delta":1.0,"reason":"restock"}"#, "/delta"),
            (r#"{"delta":1}"#, "/reason"),
            (r#"{"delta":1,"reason":"theft"}"#, "/reason"),
            (r#"{"delta":1,"reason":{"lost":null}}"#, "/reason"),
            (r#"{"delta":1,"reason":"lost","note":""}"#, "/note"),
            (r#"{"reason":"lost"}"#, "/delta"),
            (r#"{"delta":1,"set_total":1,"reason":"lost"}"#, "/set_total"),
            (r#"{"set_total":-1,"reason":"lost"}"#, "/set_total"),
            (r#"{"set_total":1000000001,"reason":"lost"}"#, "/set_total"),
            (r#"{"delta":1,"reason":"lost","dry_run":"yes"}"#, "/dry_run"),
        ] {
            assert_eq!(pointer(text).as_deref(), Some(at), "{text}");
        }
    }
}
