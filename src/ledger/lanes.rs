//! Lanes' marks: how far each is recorded.

use std::collections::HashMap;

use chrono::{DateTime, Utc};

use super::row::{bigint, lane_id, number};
use super::{Ledger, LedgerError};
use crate::domain::event::RebuildToken;
use crate::domain::ids::LaneId;
use crate::domain::time::Timestamp;

/// What the writer needs to know of a lane before it applies anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LaneMark {
    /// The highest that was given out, and what was given out with it.
    pub epoch: u32,
    pub token: Option<RebuildToken>,
    /// The one whose events are applied.
    pub sealed_epoch: u32,
    /// Seq of the last event applied; 0 before the first.
    pub recorded: u64,
    /// Records that wait for a missing one.
    pub parked: u64,
}

/// What tells an event that was recorded from another that claims its seq.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordedEvent {
    pub epoch: u32,
    /// The CloudEvents type.
    pub event: String,
    /// Id of the order or adjustment; `None` for a sale's own steps.
    pub entity: Option<String>,
    pub at: Timestamp,
}

struct EventRow {
    sale_id: String,
    lane: i16,
    seq: i64,
    epoch: i64,
    event: String,
    entity: Option<String>,
    at: DateTime<Utc>,
}

impl Ledger {
    /// How far lanes are recorded; one that was never made is left out.
    pub async fn recorded_many(
        &self,
        lanes: &[LaneId],
    ) -> Result<HashMap<LaneId, u64>, LedgerError> {
        self.recorded_of(lanes, true).await
    }

    /// How far lanes are recorded, of those that wait for no dead letter: what they lack next, Kafka
    /// has yet to bring.
    pub async fn unblocked_marks(
        &self,
        lanes: &[LaneId],
    ) -> Result<HashMap<LaneId, u64>, LedgerError> {
        self.recorded_of(lanes, false).await
    }

    async fn recorded_of(
        &self,
        lanes: &[LaneId],
        blocked_too: bool,
    ) -> Result<HashMap<LaneId, u64>, LedgerError> {
        let (sales, numbers) = columns(lanes);
        let rows = sqlx::query!(
            "SELECT l.sale_id, l.lane, l.recorded
             FROM lanes l JOIN UNNEST($1::text[], $2::smallint[]) AS asked (sale_id, lane)
             ON l.sale_id = asked.sale_id AND l.lane = asked.lane
             WHERE $3 OR NOT EXISTS (
               SELECT FROM dead_letters d WHERE d.sale_id = l.sale_id AND d.lane = l.lane
                 AND d.epoch = l.sealed_epoch AND d.seq = l.recorded + 1 AND d.status = 'open'
             )",
            &sales as _,
            &numbers,
            blocked_too
        )
        .fetch_all(&self.pool)
        .await?;
        rows.into_iter()
            .map(|row| {
                Ok((lane_id(&row.sale_id, row.lane)?, number("recorded mark", row.recorded)?))
            })
            .collect()
    }

    /// Epochs, mark and how much is parked, of each lane that exists.
    pub async fn lane_marks(
        &self,
        lanes: &[LaneId],
    ) -> Result<HashMap<LaneId, LaneMark>, LedgerError> {
        let (sales, numbers) = columns(lanes);
        let rows = sqlx::query!(
            r#"SELECT l.sale_id, l.lane, l.epoch, l.rebuild_token, l.sealed_epoch, l.recorded, (
                 SELECT count(*) FROM parked p WHERE p.sale_id = l.sale_id AND p.lane = l.lane
               ) AS "parked!"
             FROM lanes l JOIN UNNEST($1::text[], $2::smallint[]) AS asked (sale_id, lane)
             ON l.sale_id = asked.sale_id AND l.lane = asked.lane"#,
            &sales as _,
            &numbers
        )
        .fetch_all(&self.pool)
        .await?;
        rows.into_iter()
            .map(|row| {
                let mark = LaneMark {
                    epoch: number("epoch", row.epoch)?,
                    token: row.rebuild_token.map(RebuildToken::from_number),
                    sealed_epoch: number("epoch", row.sealed_epoch)?,
                    recorded: number("recorded mark", row.recorded)?,
                    parked: number("count", row.parked)?,
                };
                Ok((lane_id(&row.sale_id, row.lane)?, mark))
            })
            .collect()
    }

    /// What was recorded under these seqs, for telling a repeat from a fork.
    pub async fn recorded_events(
        &self,
        asked: &[(LaneId, u64)],
    ) -> Result<HashMap<(LaneId, u64), RecordedEvent>, LedgerError> {
        let sales: Vec<&str> = asked.iter().map(|(lane, _)| lane.sale.as_str()).collect();
        let numbers: Vec<i16> = asked.iter().map(|(lane, _)| lane.lane.into()).collect();
        let seqs: Vec<i64> = asked.iter().map(|(_, seq)| bigint(*seq)).collect();
        let rows = sqlx::query_as!(
            EventRow,
            r#"SELECT l.sale_id, l.lane, l.seq, l.epoch, l.event,
                 coalesce(l.order_id, l.adjustment_id) AS entity, l.at
             FROM UNNEST($1::text[], $2::smallint[], $3::bigint[]) AS asked (sale_id, lane, seq)
             JOIN ledger l ON l.sale_id = asked.sale_id AND l.lane = asked.lane
               AND l.seq = asked.seq AND l.line = 0"#,
            &sales as _,
            &numbers,
            &seqs
        )
        .fetch_all(&self.pool)
        .await?;
        rows.into_iter()
            .map(|row| {
                let key = (lane_id(&row.sale_id, row.lane)?, number("seq", row.seq)?);
                let event = RecordedEvent {
                    epoch: number("epoch", row.epoch)?,
                    event: row.event,
                    entity: row.entity,
                    at: row.at.into(),
                };
                Ok((key, event))
            })
            .collect()
    }
}

/// Lanes as two columns, for `UNNEST`.
pub(super) fn columns(lanes: &[LaneId]) -> (Vec<&str>, Vec<i16>) {
    lanes.iter().map(|lane| (lane.sale.as_str(), i16::from(lane.lane))).unzip()
}
