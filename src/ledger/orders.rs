//! Recorded orders: reads. The writer's batch writes them.

use chrono::{DateTime, Utc};
use sqlx::types::Json;

use super::row::{corrupt, datetime, number, parse};
use super::{Ledger, LedgerError, Page};
use crate::domain::ids::OrderId;
use crate::domain::names::{BuyerId, PaymentId, SaleId};
use crate::domain::order::{Line, Order, Status};
use crate::domain::time::Timestamp;

/// Which orders a list shows; what is `None` is not asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OrderFilter {
    pub sale: Option<SaleId>,
    pub buyer: Option<BuyerId>,
    pub status: Option<Status>,
}

/// The last order of a page: the next page begins after it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OrderCursor {
    pub created_at: Timestamp,
    pub id: OrderId,
}

pub(super) struct OrderRow {
    pub id: String,
    pub buyer_id: Option<String>,
    pub status: String,
    pub lines: Json<Vec<Line>>,
    pub payment_id: Option<String>,
    pub created_at: DateTime<Utc>,
    pub expires_at: DateTime<Utc>,
    pub confirmed_at: Option<DateTime<Utc>>,
    pub seq: i64,
    pub returned: Json<Vec<Line>>,
    pub reacquired: bool,
    pub hold_seconds: Option<i32>,
    pub asked: Json<Vec<Line>>,
}

impl TryFrom<OrderRow> for Order {
    type Error = LedgerError;

    fn try_from(row: OrderRow) -> Result<Self, LedgerError> {
        let payment = |text: &String| parse::<PaymentId>("payment id", text);
        Ok(Self {
            id: parse("order id", &row.id)?,
            buyer_id: row.buyer_id.as_ref().map(|id| parse("buyer id", id)).transpose()?,
            status: Status::from_word(&row.status)
                .ok_or_else(|| corrupt("order status", &row.status))?,
            lines: row.lines.0,
            payment_id: row.payment_id.as_ref().map(payment).transpose()?,
            created_at: row.created_at.into(),
            expires_at: row.expires_at.into(),
            confirmed_at: row.confirmed_at.map(Into::into),
            seq: number("seq", row.seq)?,
            returned: row.returned.0,
            reacquired: row.reacquired,
            hold_seconds: row.hold_seconds.map(|s| number("hold", s)).transpose()?,
            asked: row.asked.0,
        })
    }
}

/// Where a list begins: after the cursor, or before everything. Comparing rows with a bound that
/// is always there lets PostgreSQL walk the index from it.
fn bounds(cursor: Option<&OrderCursor>) -> (DateTime<Utc>, String) {
    match cursor {
        Some(cursor) => (datetime(cursor.created_at), cursor.id.to_string()),
        None => (super::row::END_OF_TIME, String::new()),
    }
}

impl Ledger {
    /// The order as it was last recorded; `None` if none was.
    pub async fn order(&self, id: &OrderId) -> Result<Option<Order>, LedgerError> {
        let row = sqlx::query_as!(
            OrderRow,
            r#"SELECT id, buyer_id, status, lines AS "lines: Json<Vec<Line>>", payment_id,
                 created_at, expires_at, confirmed_at, seq,
                 returned AS "returned: Json<Vec<Line>>", reacquired,
                 hold_seconds, asked AS "asked: Json<Vec<Line>>"
             FROM orders WHERE id = $1"#,
            id.to_string()
        )
        .fetch_optional(&self.pool)
        .await?;
        row.map(TryInto::try_into).transpose()
    }

    /// Recorded orders, newest first, ties by id.
    pub async fn list_orders(
        &self,
        filter: &OrderFilter,
        cursor: Option<&OrderCursor>,
        limit: u32,
    ) -> Result<Page<Order, OrderCursor>, LedgerError> {
        let rows = match (&filter.buyer, &filter.sale) {
            (Some(buyer), sale) => {
                self.orders_of_buyer(buyer, sale.as_ref(), filter.status, cursor, limit).await?
            }
            (None, Some(sale)) => self.orders_of_sale(sale, filter.status, cursor, limit).await?,
            (None, None) => self.orders_of_all(filter.status, cursor, limit).await?,
        };
        let orders = rows.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?;
        let cursor =
            |order: &Order| OrderCursor { created_at: order.created_at, id: order.id.clone() };
        Ok(Page::cut(orders, limit, cursor))
    }

    async fn orders_of_buyer(
        &self,
        buyer: &BuyerId,
        sale: Option<&SaleId>,
        status: Option<Status>,
        cursor: Option<&OrderCursor>,
        limit: u32,
    ) -> Result<Vec<OrderRow>, LedgerError> {
        let (before, before_id) = bounds(cursor);
        Ok(sqlx::query_as!(
            OrderRow,
            r#"SELECT id, buyer_id, status, lines AS "lines: Json<Vec<Line>>", payment_id,
                 created_at, expires_at, confirmed_at, seq,
                 returned AS "returned: Json<Vec<Line>>", reacquired,
                 hold_seconds, asked AS "asked: Json<Vec<Line>>"
             FROM orders
             WHERE buyer_id = $1 AND (created_at, id) < ($2, $3)
               AND ($4::text IS NULL OR sale_id = $4) AND ($5::text IS NULL OR status = $5)
             ORDER BY created_at DESC, id DESC LIMIT $6"#,
            buyer.as_str(),
            before,
            before_id,
            sale.map(SaleId::as_str),
            status.map(Status::as_str),
            i64::from(limit) + 1
        )
        .fetch_all(&self.pool)
        .await?)
    }

    async fn orders_of_sale(
        &self,
        sale: &SaleId,
        status: Option<Status>,
        cursor: Option<&OrderCursor>,
        limit: u32,
    ) -> Result<Vec<OrderRow>, LedgerError> {
        let (before, before_id) = bounds(cursor);
        Ok(sqlx::query_as!(
            OrderRow,
            r#"SELECT o.id AS "id!", o.buyer_id, o.status AS "status!",
                 o.lines AS "lines!: Json<Vec<Line>>", o.payment_id,
                 o.created_at AS "created_at!", o.expires_at AS "expires_at!", o.confirmed_at,
                 o.seq AS "seq!", o.returned AS "returned!: Json<Vec<Line>>",
                 o.reacquired AS "reacquired!",
                 o.hold_seconds, o.asked AS "asked!: Json<Vec<Line>>"
             FROM UNNEST($2::text[]) AS asked (status), LATERAL (
               SELECT * FROM orders
               WHERE sale_id = $1 AND status = asked.status AND (created_at, id) < ($3, $4)
               ORDER BY created_at DESC, id DESC LIMIT $5
             ) AS o
             ORDER BY o.created_at DESC, o.id DESC LIMIT $5"#,
            sale.as_str(),
            &statuses(status) as _,
            before,
            before_id,
            i64::from(limit) + 1
        )
        .fetch_all(&self.pool)
        .await?)
    }

    async fn orders_of_all(
        &self,
        status: Option<Status>,
        cursor: Option<&OrderCursor>,
        limit: u32,
    ) -> Result<Vec<OrderRow>, LedgerError> {
        let (before, before_id) = bounds(cursor);
        Ok(sqlx::query_as!(
            OrderRow,
            r#"SELECT o.id AS "id!", o.buyer_id, o.status AS "status!",
                 o.lines AS "lines!: Json<Vec<Line>>", o.payment_id,
                 o.created_at AS "created_at!", o.expires_at AS "expires_at!", o.confirmed_at,
                 o.seq AS "seq!", o.returned AS "returned!: Json<Vec<Line>>",
                 o.reacquired AS "reacquired!",
                 o.hold_seconds, o.asked AS "asked!: Json<Vec<Line>>"
             FROM UNNEST($1::text[]) AS asked (status), LATERAL (
               SELECT * FROM orders
               WHERE status = asked.status AND (created_at, id) < ($2, $3)
               ORDER BY created_at DESC, id DESC LIMIT $4
             ) AS o
             ORDER BY o.created_at DESC, o.id DESC LIMIT $4"#,
            &statuses(status) as _,
            before,
            before_id,
            i64::from(limit) + 1
        )
        .fetch_all(&self.pool)
        .await?)
    }
}

/// The statuses to merge: the one asked for, or all.
fn statuses(status: Option<Status>) -> Vec<&'static str> {
    status.map_or_else(|| Status::ALL.map(Status::as_str).to_vec(), |one| vec![one.as_str()])
}
