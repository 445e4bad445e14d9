//! What the reconciler found, and the lock that keeps two of them from the same lane.

use std::collections::BTreeSet;
use std::time::Duration;

use sqlx::{Connection, PgConnection};
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{Ledger, LedgerError};
use crate::domain::ids::LaneId;

/// How many rows one statement forgets.
const FORGOTTEN_AT_ONCE: i64 = 1_000;

/// Two figures that should agree and do not.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Difference {
    /// Which figures, in a word.
    pub what: &'static str,
    /// The SKU, order or buyer that they are of.
    pub subject: String,
    /// The figures.
    pub detail: String,
}

/// A lane that this process alone reconciles, until it is dropped or its connection lost. A process that
/// stands still for [`LaneLock::STILL_MAX`] loses it: PostgreSQL ends a session that says nothing for so
/// long.
#[derive(Debug)]
pub struct LaneLock {
    end: DropGuard,
    kept: JoinHandle<Result<(), sqlx::Error>>,
}

impl LaneLock {
    pub(super) const STILL_MAX: Duration = Duration::from_secs(10);
    const SIGN_INTERVAL: Duration = Duration::from_secs(2);

    /// The lock is the connection's.
    pub(super) fn new(mut connection: PgConnection) -> Self {
        let end = CancellationToken::new();
        let ended = end.clone();
        let kept = tokio::spawn(async move {
            while ended.run_until_cancelled(tokio::time::sleep(Self::SIGN_INTERVAL)).await.is_some()
            {
                connection.ping().await?;
            }
            connection.close().await
        });
        Self { end: end.drop_guard(), kept }
    }

    /// Gives it back.
    pub async fn release(self) -> Result<(), LedgerError> {
        drop(self.end);
        match self.kept.await {
            Ok(closed) => Ok(closed?),
            Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
        }
    }
}

impl Ledger {
    /// Takes the lane for reconciling; `None`: another process has it. It has a connection of its
    /// own, whose end gives the lock back whatever happens.
    pub async fn lock_for_reconciling(
        &self,
        lane: &LaneId,
    ) -> Result<Option<LaneLock>, LedgerError> {
        self.lock_lane("reconcile", lane).await
    }

    /// Writes what was found in a lane: a difference that is known is seen again; with `all`, one
    /// that is not among them has ended. Answers those that are new, as (what, subject).
    pub async fn record_differences(
        &self,
        lane: &LaneId,
        found: &[Difference],
        all: bool,
    ) -> Result<BTreeSet<(String, String)>, LedgerError> {
        let (sale, number) = (lane.sale.as_str(), i16::from(lane.lane));
        let whats: Vec<&str> = found.iter().map(|difference| difference.what).collect();
        let subjects: Vec<&str> = found.iter().map(|d| d.subject.as_str()).collect();
        let details: Vec<&str> = found.iter().map(|d| d.detail.as_str()).collect();
        let mut transaction = self.pool.begin().await?;
        if all {
            sqlx::query!(
                "UPDATE reconciliations SET ended_at = date_trunc('milliseconds', now())
                 WHERE sale_id = $1 AND lane = $2 AND ended_at IS NULL
                   AND (what, subject) NOT IN (SELECT * FROM UNNEST($3::text[], $4::text[]))",
                sale,
                number,
                &whats as _,
                &subjects as _
            )
            .execute(&mut *transaction)
            .await?;
        }
        let rows = sqlx::query!(
            r#"INSERT INTO reconciliations (sale_id, lane, what, subject, detail)
             SELECT $1, $2, what, subject, detail
             FROM UNNEST($3::text[], $4::text[], $5::text[]) AS found (what, subject, detail)
             ON CONFLICT (sale_id, lane, what, subject) WHERE ended_at IS NULL
             DO UPDATE SET last_seen_at = excluded.last_seen_at, detail = excluded.detail
             RETURNING what, subject, first_seen_at = last_seen_at AS "is_new!""#,
            sale,
            number,
            &whats as _,
            &subjects as _,
            &details as _
        )
        .fetch_all(&mut *transaction)
        .await?;
        transaction.commit().await?;
        let new = rows.into_iter().filter(|row| row.is_new);
        Ok(new.map(|row| (row.what, row.subject)).collect())
    }

    /// Differences that were there when their lane was last checked; those of archived sales are
    /// no longer checked, and do not count.
    pub async fn open_differences(&self) -> Result<i64, LedgerError> {
        Ok(sqlx::query_scalar!(
            r#"SELECT count(*) AS "open!" FROM reconciliations r
             WHERE ended_at IS NULL AND NOT EXISTS (
               SELECT FROM sales s WHERE s.sale_id = r.sale_id AND s.archived_at IS NOT NULL
             )"#
        )
        .fetch_one(&self.pool)
        .await?)
    }

    /// Forgets differences that ended longer ago than this; answers how many.
    pub async fn forget_reconciliations(&self, kept_days: u32) -> Result<u64, LedgerError> {
        let mut forgotten = 0;
        loop {
            let done = sqlx::query!(
                "DELETE FROM reconciliations WHERE id IN (
                   SELECT id FROM reconciliations
                   WHERE ended_at < now() - make_interval(days => $1) LIMIT $2
                 )",
                i32::try_from(kept_days).unwrap_or(i32::MAX),
                FORGOTTEN_AT_ONCE
            )
            .execute(&self.pool)
            .await?;
            forgotten += done.rows_affected();
            if done.rows_affected() < FORGOTTEN_AT_ONCE as u64 {
                return Ok(forgotten);
            }
        }
    }
}
