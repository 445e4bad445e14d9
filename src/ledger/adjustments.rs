//! Recorded stock adjustments, the audit trail: reads. The writer's batch writes them.

use chrono::{DateTime, Utc};

use super::row::{END_OF_TIME, corrupt, datetime, number, parse};
use super::{Ledger, LedgerError, Page};
use crate::domain::ids::AdjustmentId;
use crate::domain::names::{SaleId, Sku};
use crate::domain::stock::{Adjustment, AdjustmentNote, Counters};
use crate::domain::time::Timestamp;

/// The last adjustment of a page: the next page begins after it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdjustmentCursor {
    pub created_at: Timestamp,
    pub id: AdjustmentId,
}

pub(super) struct AdjustmentRow {
    pub id: String,
    pub sku: String,
    pub delta: i64,
    pub set_total: Option<i64>,
    pub before_available: i64,
    pub before_held: i64,
    pub before_sold: i64,
    pub before_version: i64,
    pub reason: String,
    pub reference: Option<String>,
    pub note: Option<String>,
    pub actor: String,
    pub created_at: DateTime<Utc>,
    pub seq: i64,
    pub undoes: Option<String>,
    pub undone_by: Option<String>,
}

impl TryFrom<AdjustmentRow> for Adjustment {
    type Error = LedgerError;

    fn try_from(row: AdjustmentRow) -> Result<Self, LedgerError> {
        let reason = serde_json::from_value(row.reason.into())
            .map_err(|e| corrupt("adjustment reason", e))?;
        let before = Counters {
            available: row.before_available,
            held: row.before_held,
            sold: row.before_sold,
            version: row.before_version,
        };
        let other = |id: Option<String>| id.map(|id| parse("adjustment id", &id)).transpose();
        Ok(Self {
            id: parse("adjustment id", &row.id)?,
            sku: parse("SKU", &row.sku)?,
            delta: row.delta,
            set_total: row.set_total,
            before: before.into(),
            note: AdjustmentNote { reason, reference: row.reference, note: row.note },
            actor: parse("actor", &row.actor)?,
            created_at: row.created_at.into(),
            seq: number("seq", row.seq)?,
            undoes: other(row.undoes)?,
            undone_by: other(row.undone_by)?,
        })
    }
}

impl Ledger {
    /// An adjustment, once it is recorded.
    pub async fn adjustment(&self, id: &AdjustmentId) -> Result<Option<Adjustment>, LedgerError> {
        let row = sqlx::query_as!(
            AdjustmentRow,
            r#"SELECT a.id, a.sku, a.delta, a.set_total, a.before_available, a.before_held,
               a.before_sold, a.before_version, a.reason, a.reference, a.note, a.actor, a.created_at,
               a.seq, a.undoes, u.id AS "undone_by?"
             FROM adjustments a LEFT JOIN adjustments u ON u.undoes = a.id
             WHERE a.id = $1"#,
            id.to_string()
        )
        .fetch_optional(&self.pool)
        .await?;
        row.map(TryInto::try_into).transpose()
    }

    /// A sale's adjustments, or those of one SKU, newest first, ties by id.
    pub async fn list_adjustments(
        &self,
        sale: &SaleId,
        sku: Option<&Sku>,
        cursor: Option<&AdjustmentCursor>,
        limit: u32,
    ) -> Result<Page<Adjustment, AdjustmentCursor>, LedgerError> {
        let before = cursor.map_or(END_OF_TIME, |cursor| datetime(cursor.created_at));
        let before_id = cursor.map_or_else(String::new, |cursor| cursor.id.to_string());
        let rows = match sku {
            Some(sku) => self.adjustments_of_sku(sale, sku, before, before_id, limit).await?,
            None => self.adjustments_of_sale(sale, before, before_id, limit).await?,
        };
        let items = rows.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?;
        let cursor = |adjustment: &Adjustment| AdjustmentCursor {
            created_at: adjustment.created_at,
            id: adjustment.id.clone(),
        };
        Ok(Page::cut(items, limit, cursor))
    }

    async fn adjustments_of_sku(
        &self,
        sale: &SaleId,
        sku: &Sku,
        before: DateTime<Utc>,
        before_id: String,
        limit: u32,
    ) -> Result<Vec<AdjustmentRow>, LedgerError> {
        Ok(sqlx::query_as!(
            AdjustmentRow,
            r#"SELECT a.id, a.sku, a.delta, a.set_total, a.before_available, a.before_held,
               a.before_sold, a.before_version, a.reason, a.reference, a.note, a.actor, a.created_at,
               a.seq, a.undoes, u.id AS "undone_by?"
             FROM adjustments a LEFT JOIN adjustments u ON u.undoes = a.id
             WHERE a.sale_id = $1 AND a.sku = $2 AND (a.created_at, a.id) < ($3, $4)
             ORDER BY a.created_at DESC, a.id DESC LIMIT $5"#,
            sale.as_str(),
            sku.as_str(),
            before,
            before_id,
            i64::from(limit) + 1
        )
        .fetch_all(&self.pool)
        .await?)
    }

    async fn adjustments_of_sale(
        &self,
        sale: &SaleId,
        before: DateTime<Utc>,
        before_id: String,
        limit: u32,
    ) -> Result<Vec<AdjustmentRow>, LedgerError> {
        Ok(sqlx::query_as!(
            AdjustmentRow,
            r#"SELECT a.id, a.sku, a.delta, a.set_total, a.before_available, a.before_held,
               a.before_sold, a.before_version, a.reason, a.reference, a.note, a.actor, a.created_at,
               a.seq, a.undoes, u.id AS "undone_by?"
             FROM adjustments a LEFT JOIN adjustments u ON u.undoes = a.id
             WHERE a.sale_id = $1 AND (a.created_at, a.id) < ($2, $3)
             ORDER BY a.created_at DESC, a.id DESC LIMIT $4"#,
            sale.as_str(),
            before,
            before_id,
            i64::from(limit) + 1
        )
        .fetch_all(&self.pool)
        .await?)
    }
}
