//! A lane's recorded books, all of them as of one moment: its counters, the fold of its ledger, the
//! sum over its orders, and the orders themselves.

use std::collections::BTreeMap;

use futures_util::TryStreamExt;
use sqlx::types::Json;
use sqlx::{Postgres, Transaction};
use tokio::sync::OwnedSemaphorePermit;

use super::orders::OrderRow;
use super::row::{bigint, corrupt, number, parse};
use super::{Ledger, LedgerError};
use crate::domain::ids::{LaneId, OrderId};
use crate::domain::names::{BuyerId, Sku};
use crate::domain::order::{Line, Order};
use crate::domain::stock::Units;

/// What is recorded of one SKU in three ways, which must agree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SkuFigures {
    pub counters: Units,
    /// The fold of the ledger.
    pub ledger: Units,
    /// What orders hold and have bought; `available` is 0.
    pub orders: Units,
}

/// A lane as recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Figures {
    /// The one whose events are recorded.
    pub epoch: u32,
    pub recorded: u64,
    /// Events in the ledger, and the last one's seq: both are `recorded` (I5).
    pub events: u64,
    pub last_event: u64,
    pub skus: BTreeMap<Sku, SkuFigures>,
}

/// Units of one order's that a recorded event moved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordedMove {
    pub seq: u64,
    pub order: OrderId,
    pub buyer: Option<BuyerId>,
    pub sku: Sku,
    pub units: Units,
}

/// One consistent look at a lane: every read of it sees the same moment, whatever the writer does.
pub struct Snapshot {
    pub(super) transaction: Transaction<'static, Postgres>,
    pub(super) lane: LaneId,
    _permit: OwnedSemaphorePermit,
}

impl Ledger {
    /// Begins a look, once few enough others go on; the moment is that of its first read.
    pub async fn snapshot(&self, lane: &LaneId) -> Result<Snapshot, LedgerError> {
        let permit = self.snapshots.clone().acquire_owned().await.expect("it is never closed");
        let begin = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY";
        let transaction = self.pool.begin_with(begin).await?;
        Ok(Snapshot { transaction, lane: lane.clone(), _permit: permit })
    }
}

impl Snapshot {
    /// The figures; where more than event `at` is recorded, what came later is taken away from
    /// them, as the ledger has it.
    pub async fn figures(&mut self, at: u64) -> Result<Figures, LedgerError> {
        let (sale, lane) = (self.lane.sale.to_string(), i16::from(self.lane.lane));
        let mark = sqlx::query!(
            "SELECT sealed_epoch AS epoch, recorded FROM lanes WHERE sale_id = $1 AND lane = $2",
            sale,
            lane
        )
        .fetch_optional(&mut *self.transaction)
        .await?;
        let mark = mark.ok_or_else(|| corrupt("lane", "its row is gone"))?;
        let mut figures = Figures {
            epoch: number("epoch", mark.epoch)?,
            recorded: number("recorded mark", mark.recorded)?,
            events: 0,
            last_event: 0,
            skus: self.sums_of_orders().await?,
        };
        let rows = sqlx::query!(
            "SELECT sku, available, held, sold FROM counters WHERE sale_id = $1 AND lane = $2",
            sale,
            lane
        )
        .fetch_all(&mut *self.transaction)
        .await?;
        for row in rows {
            let sku = figures.skus.entry(parse("SKU", &row.sku)?).or_default();
            sku.counters = Units { available: row.available, held: row.held, sold: row.sold };
        }
        self.fold(&mut figures, at).await?;
        Ok(figures)
    }

    async fn fold(&mut self, figures: &mut Figures, at: u64) -> Result<(), LedgerError> {
        let folded = sqlx::query!(
            r#"SELECT sku, count(*) FILTER (WHERE line = 0) AS "events!", max(seq) AS "last!",
                 sum(available)::bigint AS "available!", sum(held)::bigint AS "held!",
                 sum(sold)::bigint AS "sold!",
                 coalesce(sum(available) FILTER (WHERE seq > $3), 0)::bigint AS "later_available!",
                 coalesce(sum(held) FILTER (WHERE seq > $3), 0)::bigint AS "later_held!",
                 coalesce(sum(sold) FILTER (WHERE seq > $3), 0)::bigint AS "later_sold!",
                 coalesce(sum(held) FILTER (WHERE seq > $3 AND order_id IS NOT NULL), 0)::bigint
                   AS "later_held_by_orders!",
                 coalesce(sum(sold) FILTER (WHERE seq > $3 AND order_id IS NOT NULL), 0)::bigint
                   AS "later_sold_by_orders!"
             FROM ledger WHERE sale_id = $1 AND lane = $2 GROUP BY sku"#,
            self.lane.sale.as_str(),
            i16::from(self.lane.lane),
            bigint(at)
        )
        .fetch_all(&mut *self.transaction)
        .await?;
        for row in folded {
            figures.events += number::<_, u64>("count", row.events)?;
            figures.last_event = figures.last_event.max(number("seq", row.last)?);
            let Some(sku) = &row.sku else { continue };
            let sku = figures.skus.entry(parse("SKU", sku)?).or_default();
            let later = Units {
                available: row.later_available,
                held: row.later_held,
                sold: row.later_sold,
            };
            let sum = Units { available: row.available, held: row.held, sold: row.sold };
            sku.ledger = sum - later;
            sku.counters = sku.counters - later;
            sku.orders.held -= row.later_held_by_orders;
            sku.orders.sold -= row.later_sold_by_orders;
        }
        Ok(())
    }

    async fn sums_of_orders(&mut self) -> Result<BTreeMap<Sku, SkuFigures>, LedgerError> {
        let rows = sqlx::query!(
            r#"SELECT line.sku AS "sku!",
                 coalesce(sum(line.quantity) FILTER (WHERE o.status IN ('held', 'paying')), 0)::bigint
                   AS "held!",
                 coalesce(sum(line.quantity) FILTER (WHERE o.status IN ('confirmed', 'returned')), 0)::bigint
                   AS "sold!"
             FROM orders o, LATERAL (
               SELECT l ->> 'sku' AS sku, (l ->> 'quantity')::bigint AS quantity
               FROM jsonb_array_elements(o.lines) l
               UNION ALL
               SELECT l ->> 'sku', -(l ->> 'quantity')::bigint FROM jsonb_array_elements(o.returned) l
             ) line
             WHERE o.sale_id = $1 AND o.lane = $2
               AND o.status IN ('held', 'paying', 'confirmed', 'returned')
             GROUP BY line.sku"#,
            self.lane.sale.as_str(),
            i16::from(self.lane.lane)
        )
        .fetch_all(&mut *self.transaction)
        .await?;
        rows.into_iter()
            .map(|row| {
                let orders = Units { available: 0, held: row.held, sold: row.sold };
                Ok((parse("SKU", &row.sku)?, SkuFigures { orders, ..SkuFigures::default() }))
            })
            .collect()
    }

    /// Hands on what recorded events moved for orders: those after `after`, up to `until`.
    pub async fn moves(
        &mut self,
        after: u64,
        until: u64,
        mut each: impl FnMut(RecordedMove) + Send,
    ) -> Result<(), LedgerError> {
        let mut rows = sqlx::query!(
            r#"SELECT l.seq, l.order_id AS "order_id!", o.buyer_id AS "buyer_id?", l.sku AS "sku!",
                 l.available, l.held, l.sold
             FROM ledger l LEFT JOIN orders o ON o.id = l.order_id
             WHERE l.sale_id = $1 AND l.lane = $2 AND l.seq > $3 AND l.seq <= $4
               AND l.order_id IS NOT NULL AND l.sku IS NOT NULL"#,
            self.lane.sale.as_str(),
            i16::from(self.lane.lane),
            bigint(after),
            bigint(until)
        )
        .fetch(&mut *self.transaction);
        while let Some(row) = rows.try_next().await? {
            each(RecordedMove {
                seq: number("seq", row.seq)?,
                order: parse("order id", &row.order_id)?,
                buyer: row.buyer_id.as_ref().map(|id| parse("buyer id", id)).transpose()?,
                sku: parse("SKU", &row.sku)?,
                units: Units { available: row.available, held: row.held, sold: row.sold },
            });
        }
        Ok(())
    }

    /// Hands on every recorded order of the lane, in no particular order.
    pub async fn orders(&mut self, mut each: impl FnMut(Order) + Send) -> Result<(), LedgerError> {
        let mut rows = sqlx::query_as!(
            OrderRow,
            r#"SELECT id, buyer_id, status, lines AS "lines: Json<Vec<Line>>", payment_id,
                 created_at, expires_at, confirmed_at, seq,
                 returned AS "returned: Json<Vec<Line>>", reacquired,
                 hold_seconds, asked AS "asked: Json<Vec<Line>>"
             FROM orders WHERE sale_id = $1 AND lane = $2"#,
            self.lane.sale.as_str(),
            i16::from(self.lane.lane)
        )
        .fetch(&mut *self.transaction);
        while let Some(row) = rows.try_next().await? {
            each(row.try_into()?);
        }
        Ok(())
    }

    /// Ends the look.
    pub async fn end(self) -> Result<(), LedgerError> {
        Ok(self.transaction.rollback().await?)
    }
}
