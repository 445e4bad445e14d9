//! Records that cannot be applied, kept with reason and place.

use sqlx::PgConnection;

use super::LedgerError;
use super::parked::{StoredRecord, store_headers};
use super::row::bigint;
use crate::domain::ids::LaneId;

/// Why a record is a dead letter: also the label of the metric that counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DeadReason {
    /// Not a record of ours, or damaged.
    Undecodable,
    /// No such lane was ever made.
    UnknownLane,
    /// Of an epoch that was taken from its writer.
    StaleEpoch,
    /// Of an epoch that the database never gave out.
    UnknownEpoch,
    /// Claims a seq that was recorded with other content.
    Fork,
    /// The database refuses what it says.
    NotApplicable,
}

impl DeadReason {
    pub const fn as_str(self) -> &'static str {
        match self {
            DeadReason::Undecodable => "undecodable",
            DeadReason::UnknownLane => "unknown-lane",
            DeadReason::StaleEpoch => "stale-epoch",
            DeadReason::UnknownEpoch => "unknown-epoch",
            DeadReason::Fork => "fork",
            DeadReason::NotApplicable => "not-applicable",
        }
    }
}

/// Which event a record claims to be, where that could be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub lane: LaneId,
    pub epoch: u32,
    pub seq: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetter {
    pub reason: DeadReason,
    pub detail: String,
    pub place: Option<Place>,
    pub record: StoredRecord,
}

/// Stores dead letters; the same record from the same place in Kafka is stored once.
pub(super) async fn bury(
    connection: &mut PgConnection,
    letters: &[DeadLetter],
) -> Result<u64, LedgerError> {
    let mut stored = 0;
    for DeadLetter { reason, detail, place, record } in letters {
        let done = sqlx::query!(
            "INSERT INTO dead_letters (reason, detail, sale_id, lane, epoch, seq,
               topic, partition, record_offset, digest, headers, payload)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12) ON CONFLICT DO NOTHING",
            reason.as_str(),
            detail.replace('\0', "\u{FFFD}"),
            place.as_ref().map(|place| place.lane.sale.as_str()),
            place.as_ref().map(|place| i16::from(place.lane.lane)),
            place.as_ref().map(|place| i64::from(place.epoch)),
            place.as_ref().map(|place| bigint(place.seq)),
            record.topic,
            record.partition,
            record.offset,
            &record.digest()[..],
            &store_headers(record) as _,
            record.payload
        )
        .execute(&mut *connection)
        .await?;
        stored += done.rows_affected();
    }
    Ok(stored)
}
