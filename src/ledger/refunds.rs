//! Payments to give back: the shop's work list.

use chrono::{DateTime, Utc};
use sqlx::PgConnection;

use super::row::{END_OF_TIME, corrupt, datetime, parse};
use super::{Ledger, LedgerError, Page};
use crate::domain::ids::{OrderId, RefundId};
use crate::domain::names::{PaymentId, SaleId};
use crate::domain::order::{RefundDue, RefundReason};
use crate::domain::time::Timestamp;

/// A payment that had to be given back, and whether it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refund {
    pub id: RefundId,
    pub order_id: OrderId,
    pub payment_id: PaymentId,
    pub reason: RefundReason,
    pub created_at: Timestamp,
    /// When the shop said that it was given back.
    pub settled_at: Option<Timestamp>,
}

/// Which refunds a list shows; what is `None` is not asked for.
#[derive(Debug, Clone, Default)]
pub struct RefundFilter {
    pub sale: Option<SaleId>,
    pub settled: Option<bool>,
}

/// The last refund of a page: the next page begins after it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RefundCursor {
    pub created_at: Timestamp,
    pub id: RefundId,
}

struct RefundRow {
    id: String,
    order_id: String,
    payment_id: String,
    reason: String,
    created_at: DateTime<Utc>,
    settled_at: Option<DateTime<Utc>>,
}

impl TryFrom<RefundRow> for Refund {
    type Error = LedgerError;

    fn try_from(row: RefundRow) -> Result<Self, LedgerError> {
        Ok(Self {
            id: parse("refund id", &row.id)?,
            order_id: parse("order id", &row.order_id)?,
            payment_id: parse("payment id", &row.payment_id)?,
            reason: RefundReason::from_word(&row.reason)
                .ok_or_else(|| corrupt("refund reason", &row.reason))?,
            created_at: row.created_at.into(),
            settled_at: row.settled_at.map(Into::into),
        })
    }
}

/// One per order and payment, whoever says so first; returns the rows written.
pub(super) async fn insert_refund(
    connection: &mut PgConnection,
    order: &OrderId,
    due: &RefundDue,
    at: Timestamp,
) -> Result<u64, sqlx::Error> {
    let done = sqlx::query!(
        "INSERT INTO refunds (id, sale_id, order_id, payment_id, reason, created_at)
         VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (id) DO NOTHING",
        due.id.to_string(),
        order.lane().sale.as_str(),
        order.to_string(),
        due.payment_id.as_str(),
        due.reason.as_str(),
        datetime(at)
    )
    .execute(connection)
    .await?;
    Ok(done.rows_affected())
}

impl Ledger {
    /// A payment for an order whose sale has left Redis: no lane is left to say so.
    pub async fn add_refund(
        &self,
        order: &OrderId,
        due: &RefundDue,
        at: Timestamp,
    ) -> Result<(), LedgerError> {
        let mut connection = self.pool.acquire().await?;
        insert_refund(&mut connection, order, due, at).await?;
        Ok(())
    }

    /// A refund, once it is recorded.
    pub async fn refund(&self, id: &RefundId) -> Result<Option<Refund>, LedgerError> {
        let row = sqlx::query_as!(
            RefundRow,
            "SELECT id, order_id, payment_id, reason, created_at, settled_at
             FROM refunds WHERE id = $1",
            id.to_string()
        )
        .fetch_optional(&self.pool)
        .await?;
        row.map(TryInto::try_into).transpose()
    }

    /// Notes that the payment was given back; the first word counts. `None`: no such refund.
    pub async fn settle_refund(&self, id: &RefundId) -> Result<Option<Refund>, LedgerError> {
        let row = sqlx::query_as!(
            RefundRow,
            "UPDATE refunds SET settled_at = coalesce(settled_at, date_trunc('milliseconds', now()))
             WHERE id = $1
             RETURNING id, order_id, payment_id, reason, created_at, settled_at",
            id.to_string()
        )
        .fetch_optional(&self.pool)
        .await?;
        row.map(TryInto::try_into).transpose()
    }

    /// Refunds, newest first, ties by id.
    pub async fn list_refunds(
        &self,
        filter: &RefundFilter,
        cursor: Option<&RefundCursor>,
        limit: u32,
    ) -> Result<Page<Refund, RefundCursor>, LedgerError> {
        let before = cursor.map_or(END_OF_TIME, |cursor| datetime(cursor.created_at));
        let before_id = cursor.map_or_else(String::new, |cursor| cursor.id.to_string());
        let rows = sqlx::query_as!(
            RefundRow,
            "SELECT id, order_id, payment_id, reason, created_at, settled_at FROM refunds
             WHERE (created_at, id) < ($1, $2) AND ($3::text IS NULL OR sale_id = $3)
               AND ($4::boolean IS NULL OR (settled_at IS NOT NULL) = $4)
             ORDER BY created_at DESC, id DESC LIMIT $5",
            before,
            before_id,
            filter.sale.as_ref().map(SaleId::as_str),
            filter.settled,
            i64::from(limit) + 1
        )
        .fetch_all(&self.pool)
        .await?;
        let refunds = rows.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?;
        let cursor =
            |refund: &Refund| RefundCursor { created_at: refund.created_at, id: refund.id.clone() };
        Ok(Page::cut(refunds, limit, cursor))
    }
}
