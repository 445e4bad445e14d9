//! An order's history: read from the ledger, which the writer's batch appends to.

use chrono::{DateTime, Utc};

use super::row::{corrupt, number, parse};
use super::{Ledger, LedgerError};
use crate::domain::history::{HistoryStep, StepKind};
use crate::domain::ids::OrderId;
use crate::domain::order::Line;

/// Most steps of a history. An order takes a handful; only payments sent again and again, each
/// under another id, could make it many.
const STEPS_MAX: i64 = 200;

struct LineRow {
    seq: i64,
    event: String,
    at: DateTime<Utc>,
    cause: String,
    trace_id: Option<String>,
    sku: Option<String>,
    held: i64,
    sold: i64,
}

impl LineRow {
    /// What it moved: what was sold or came back, else what was held or released. What a confirm
    /// released beside what it sold is not what it is about.
    fn line(&self, kind: StepKind) -> Result<Option<Line>, LedgerError> {
        let Some(sku) = &self.sku else { return Ok(None) };
        let units = match kind {
            StepKind::Confirmed | StepKind::Returned => self.sold,
            _ => self.held,
        };
        if units == 0 {
            return Ok(None);
        }
        let quantity: u32 = number("quantity", units.unsigned_abs())?;
        let quantity = quantity.try_into().map_err(|e| corrupt("quantity", e))?;
        Ok(Some(Line { sku: parse("SKU", sku)?, quantity }))
    }
}

/// The rows of one event.
fn step(rows: &[LineRow]) -> Result<HistoryStep, LedgerError> {
    let LineRow { seq, event, at, cause, trace_id, .. } = &rows[0];
    let kind = StepKind::of_event(event).ok_or_else(|| corrupt("event", event))?;
    Ok(HistoryStep {
        kind,
        seq: number("seq", *seq)?,
        at: (*at).into(),
        cause: serde_json::from_value(cause.as_str().into()).map_err(|e| corrupt("cause", e))?,
        trace_id: trace_id.clone(),
        lines: rows
            .iter()
            .filter_map(|row| row.line(kind).transpose())
            .collect::<Result<_, _>>()?,
    })
}

impl Ledger {
    /// The recorded steps of an order, oldest first, the first [`STEPS_MAX`]; empty if none is.
    pub async fn order_history(&self, id: &OrderId) -> Result<Vec<HistoryStep>, LedgerError> {
        // The index knows the first lines only; the primary key leads from them to the others.
        let rows = sqlx::query_as!(
            LineRow,
            r#"SELECT l.seq, l.event, l.at, l.cause AS "cause!", l.trace_id, l.sku,
                 l.held, l.sold
             FROM (
               SELECT sale_id, lane, seq FROM ledger WHERE order_id = $1 AND line = 0
               ORDER BY seq LIMIT $2
             ) AS step JOIN ledger l USING (sale_id, lane, seq)
             ORDER BY l.seq, l.line"#,
            id.to_string(),
            STEPS_MAX
        )
        .fetch_all(&self.pool)
        .await?;
        rows.chunk_by(|a, b| a.seq == b.seq).map(step).collect()
    }
}
