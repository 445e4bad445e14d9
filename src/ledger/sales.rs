//! Sales: their definitions, versions and lanes.

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::types::Json;
use sqlx::{PgConnection, Postgres, Transaction};
use tokio::sync::OwnedSemaphorePermit;

use super::row::{bigint, corrupt, datetime, number, parse};
use super::{Ledger, LedgerError};
use crate::domain::ids::LaneId;
use crate::domain::names::{KeyName, SaleId};
use crate::domain::sale::{Definition, Phase};
use crate::domain::time::Timestamp;

/// A sale that is defined: version 1 or higher.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sale {
    pub id: SaleId,
    pub version: u64,
    pub definition: Definition,
    /// Tells one definition from another: [`digest`] of it.
    pub digest: String,
    /// The secret that the sale's ids are made with.
    pub secret_version: u8,
    /// In order of their number, as many as the definition says.
    pub lanes: Vec<SaleLane>,
    /// As the writer recorded it: it follows the lane by the writer's lag.
    pub phase: Phase,
    pub created_at: Timestamp,
}

impl Sale {
    /// The names of its lanes, in the order of `lanes`.
    pub fn lane_ids(&self) -> impl Iterator<Item = LaneId> + '_ {
        self.lanes.iter().map(|lane| LaneId { sale: self.id.clone(), lane: lane.lane })
    }
}

/// One lane of a sale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SaleLane {
    pub lane: u8,
    /// Of the Kafka topic.
    pub partition: i32,
    pub epoch: u32,
}

/// What tells definitions apart: BLAKE3 of the checked definition's JSON, in hex.
pub fn digest(definition: &Definition) -> String {
    let json = serde_json::to_vec(definition).expect("a definition is plain data");
    blake3::hash(&json).to_hex().to_string()
}

struct SaleRow {
    sale_id: String,
    version: i64,
    definition: Option<Value>,
    digest: Option<String>,
    id_secret_version: i16,
    paused: bool,
    closed_at: Option<DateTime<Utc>>,
    archived_at: Option<DateTime<Utc>>,
    created_at: DateTime<Utc>,
    lanes: Vec<i16>,
    partitions: Vec<i32>,
    epochs: Vec<i64>,
}

impl TryFrom<SaleRow> for Sale {
    type Error = LedgerError;

    fn try_from(row: SaleRow) -> Result<Self, LedgerError> {
        let unreadable = |detail: &dyn std::fmt::Display| {
            corrupt("sale", format_args!("{}: {detail}", row.sale_id))
        };
        let definition = row.definition.ok_or_else(|| unreadable(&"it has no definition"))?;
        let definition: Definition =
            serde_json::from_value(definition).map_err(|e| unreadable(&e))?;
        let lanes = row.lanes.iter().zip(&row.partitions).zip(&row.epochs);
        let lane = |((lane, partition), epoch): ((&i16, &i32), &i64)| {
            Ok(SaleLane {
                lane: number("lane", *lane)?,
                partition: *partition,
                epoch: number("epoch", *epoch)?,
            })
        };
        let lanes: Vec<_> =
            lanes.take(definition.lanes.into()).map(lane).collect::<Result<_, LedgerError>>()?;
        if lanes.len() != usize::from(definition.lanes) {
            return Err(unreadable(&"a lane is missing"));
        }
        let phase = Phase {
            opens_at: definition.opens_at,
            closes_at: definition.closes_at,
            paused: row.paused,
            closed: row.closed_at.is_some(),
            archived: row.archived_at.is_some(),
        };
        Ok(Self {
            id: parse("sale id", &row.sale_id)?,
            version: number("version", row.version)?,
            definition,
            digest: row.digest.unwrap_or_default(),
            secret_version: number("secret version", row.id_secret_version)?,
            lanes,
            phase,
            created_at: row.created_at.into(),
        })
    }
}

/// The right to define one sale, until it is committed or dropped. Other definitions of the sale
/// wait; the writer, which records the sale's steps, does not.
#[derive(Debug)]
pub struct SaleLock {
    transaction: Transaction<'static, Postgres>,
    sale: SaleId,
    current: Option<Sale>,
    _permit: OwnedSemaphorePermit,
}

impl SaleLock {
    /// The sale as it is defined now; `None` while it is being defined for the first time.
    pub fn current(&self) -> Option<&Sale> {
        self.current.as_ref()
    }

    /// Makes this the definition, and the sale visible. The lanes must have it by now.
    ///
    /// # Errors
    /// [`LedgerError::Unavailable`]: it may have happened; defining the same again finds out.
    pub async fn commit_definition(
        mut self,
        version: u64,
        definition: &Definition,
        actor: &KeyName,
    ) -> Result<(), LedgerError> {
        set_definition(&mut self.transaction, &self.sale, version, definition, actor).await?;
        Ok(self.transaction.commit().await?)
    }
}

/// Stores a definition unless there is one of this version or newer: the operator's call and the
/// lane's event both do it, in whichever order they come.
pub(super) async fn set_definition(
    connection: &mut PgConnection,
    sale: &SaleId,
    version: u64,
    definition: &Definition,
    actor: &KeyName,
) -> Result<(), LedgerError> {
    let json = Json(definition);
    sqlx::query!(
        "UPDATE sales SET version = $2, definition = $3, digest = $4, opens_at = $5, closes_at = $6
         WHERE sale_id = $1 AND version < $2",
        sale.as_str(),
        bigint(version),
        &json as _,
        digest(definition),
        definition.opens_at.map(datetime),
        definition.closes_at.map(datetime)
    )
    .execute(&mut *connection)
    .await?;
    sqlx::query!(
        "INSERT INTO sale_definitions (sale_id, version, definition, actor)
         VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING",
        sale.as_str(),
        bigint(version),
        &json as _,
        actor.as_str()
    )
    .execute(connection)
    .await?;
    Ok(())
}

impl Ledger {
    /// Makes room for a sale that is about to be defined: version 0, which nobody sees, and its
    /// lanes, one for each Kafka partition given. What is there already stays as it is.
    pub async fn begin_definition(
        &self,
        sale: &SaleId,
        partitions: &[i32],
        secret_version: u8,
    ) -> Result<(), LedgerError> {
        let mut transaction = self.pool.begin().await?;
        sqlx::query!(
            "INSERT INTO sales (sale_id, id_secret_version) VALUES ($1, $2) ON CONFLICT DO NOTHING",
            sale.as_str(),
            i16::from(secret_version)
        )
        .execute(&mut *transaction)
        .await?;
        sqlx::query!(
            "INSERT INTO lanes (sale_id, lane, partition)
             SELECT $1, ordinality - 1, partition
             FROM UNNEST($2::integer[]) WITH ORDINALITY AS made (partition, ordinality)
             ON CONFLICT DO NOTHING",
            sale.as_str(),
            partitions
        )
        .execute(&mut *transaction)
        .await?;
        Ok(transaction.commit().await?)
    }

    /// Takes the right to define this sale, waiting for whoever has it. Call it from a task of
    /// its own: a transaction must not be dropped with a client's connection.
    ///
    /// # Errors
    /// [`LedgerError::Unavailable`] also when others kept it for too long.
    pub async fn lock_sale(&self, sale: &SaleId) -> Result<SaleLock, LedgerError> {
        let permit = self.definitions.clone().acquire_owned().await;
        let permit = permit.map_err(|_| LedgerError::from(sqlx::Error::PoolClosed))?;
        let mut transaction = self.pool.begin().await?;
        // Not a row's lock: the writer updates that row and must never wait for an operator.
        sqlx::query!(
            "SELECT pg_advisory_xact_lock(hashtextextended(current_schema() || ' sale ' || $1, 0))",
            sale.as_str()
        )
        .execute(&mut *transaction)
        .await?;
        let current = sale_by_id(&mut transaction, sale).await?;
        Ok(SaleLock { transaction, sale: sale.clone(), current, _permit: permit })
    }

    /// A sale; `None` if it is not defined.
    pub async fn sale(&self, id: &SaleId) -> Result<Option<Sale>, LedgerError> {
        let mut connection = self.pool.acquire().await?;
        sale_by_id(&mut connection, id).await
    }

    /// Every sale that is defined, each readable or not: one that a newer version of the service
    /// wrote must not hide the others.
    pub async fn all_sales(&self) -> Result<Vec<Result<Sale, LedgerError>>, LedgerError> {
        let rows = sqlx::query_as!(
            SaleRow,
            r#"SELECT s.sale_id, s.version, s.definition, s.digest, s.id_secret_version, s.paused,
                 s.closed_at, s.archived_at, s.created_at,
                 array_agg(l.lane ORDER BY l.lane) AS "lanes!",
                 array_agg(l.partition ORDER BY l.lane) AS "partitions!",
                 array_agg(l.epoch ORDER BY l.lane) AS "epochs!"
             FROM sales s JOIN lanes l USING (sale_id)
             WHERE s.version > 0 GROUP BY s.sale_id"#
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(rows.into_iter().map(TryInto::try_into).collect())
    }
}

async fn sale_by_id(
    connection: &mut PgConnection,
    id: &SaleId,
) -> Result<Option<Sale>, LedgerError> {
    let row = sqlx::query_as!(
        SaleRow,
        r#"SELECT s.sale_id, s.version, s.definition, s.digest, s.id_secret_version, s.paused,
             s.closed_at, s.archived_at, s.created_at,
             array_agg(l.lane ORDER BY l.lane) AS "lanes!",
             array_agg(l.partition ORDER BY l.lane) AS "partitions!",
             array_agg(l.epoch ORDER BY l.lane) AS "epochs!"
         FROM sales s JOIN lanes l USING (sale_id)
         WHERE s.version > 0 AND s.sale_id = $1 GROUP BY s.sale_id"#,
        id.as_str()
    )
    .fetch_optional(connection)
    .await?;
    row.map(TryInto::try_into).transpose()
}
