//! Recorded counters: reads, for sales whose lanes have left Redis. The writer's batch writes them.

use std::collections::HashMap;

use super::row::parse;
use super::{Ledger, LedgerError};
use crate::domain::names::{SaleId, Sku};
use crate::domain::stock::Counters;

impl Ledger {
    /// Where a sale's units are, as recorded: the sum over its lanes, by SKU.
    pub async fn counters(&self, sale: &SaleId) -> Result<HashMap<Sku, Counters>, LedgerError> {
        let rows = sqlx::query!(
            r#"SELECT sku, sum(available)::bigint AS "available!", sum(held)::bigint AS "held!",
                 sum(sold)::bigint AS "sold!", sum(version)::bigint AS "version!"
             FROM counters WHERE sale_id = $1 GROUP BY sku"#,
            sale.as_str()
        )
        .fetch_all(&self.pool)
        .await?;
        rows.into_iter()
            .map(|row| {
                let counters = Counters {
                    available: row.available,
                    held: row.held,
                    sold: row.sold,
                    version: row.version,
                };
                Ok((parse("SKU", &row.sku)?, counters))
            })
            .collect()
    }
}
