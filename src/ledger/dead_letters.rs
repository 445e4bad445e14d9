//! Records that cannot be applied, kept with reason and place, and what operators did about them.

use std::ops::RangeInclusive;

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use sqlx::types::Json;

use super::parked::{StoredHeader, StoredRecord, read_headers, store_headers};
use super::row::{bigint, corrupt, lane_id, number};
use super::{Ledger, LedgerError, Page};
use crate::domain::ids::LaneId;
use crate::domain::names::KeyName;
use crate::domain::time::Timestamp;

/// How much of a record's payload, and of its headers, a list shows.
pub const LISTED_BYTES_MAX: i32 = 16 * 1024;
/// A detail can quote the record, which may be a megabyte.
const DETAIL_CHARS_MAX: usize = 1_000;
/// How many resolved letters one statement forgets.
const FORGOTTEN_AT_ONCE: i64 = 1_000;

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
    /// Of a retry: an earlier one of its lane is missing too.
    Waiting,
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
            DeadReason::Waiting => "waiting",
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

/// What became of a dead letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LetterStatus {
    Open,
    /// What it says is recorded.
    Retried,
    /// An operator said that it need not be.
    Discarded,
}

impl LetterStatus {
    pub const ALL: [Self; 3] = [Self::Open, Self::Retried, Self::Discarded];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Retried => "retried",
            Self::Discarded => "discarded",
        }
    }

    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.as_str() == word)
    }
}

/// A dead letter as it lies in the database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredLetter {
    pub id: i64,
    /// As of the last try. A newer version may know reasons that this one does not.
    pub reason: String,
    pub detail: String,
    pub place: Option<Place>,
    pub record: StoredRecord,
    /// Whether something of the record was left out.
    pub truncated: bool,
    /// Whether its lane waits for this seq: it is not recorded, and its epoch has not ended.
    pub blocks_lane: bool,
    pub status: LetterStatus,
    pub created_at: Timestamp,
    pub resolved_at: Option<Timestamp>,
    /// Who last retried or discarded it,
    pub actor: Option<String>,
    /// ... and what they said.
    pub note: Option<String>,
    pub retries: u32,
    pub retried_at: Option<Timestamp>,
}

/// Who does something about a letter, and what they say.
#[derive(Debug, Clone)]
pub struct Deed {
    pub actor: KeyName,
    pub note: Option<String>,
}

struct LetterRow {
    id: i64,
    reason: String,
    detail: String,
    sale_id: Option<String>,
    lane: Option<i16>,
    epoch: Option<i64>,
    seq: Option<i64>,
    topic: String,
    partition: i32,
    record_offset: i64,
    headers: Json<Vec<StoredHeader>>,
    payload: Vec<u8>,
    truncated: bool,
    blocks_lane: bool,
    status: String,
    created_at: DateTime<Utc>,
    resolved_at: Option<DateTime<Utc>>,
    actor: Option<String>,
    note: Option<String>,
    retries: i32,
    retried_at: Option<DateTime<Utc>>,
}

impl TryFrom<LetterRow> for StoredLetter {
    type Error = LedgerError;

    fn try_from(row: LetterRow) -> Result<Self, LedgerError> {
        let place = match (row.sale_id, row.lane, row.epoch, row.seq) {
            (Some(sale), Some(lane), Some(epoch), Some(seq)) => Some(Place {
                lane: lane_id(&sale, lane)?,
                epoch: number("epoch", epoch)?,
                seq: number("seq", seq)?,
            }),
            _ => None,
        };
        Ok(Self {
            id: row.id,
            reason: row.reason,
            detail: row.detail,
            place,
            record: StoredRecord {
                topic: row.topic,
                partition: row.partition,
                offset: row.record_offset,
                headers: read_headers(row.headers.0)?,
                payload: row.payload,
            },
            truncated: row.truncated,
            blocks_lane: row.blocks_lane,
            status: LetterStatus::from_word(&row.status)
                .ok_or_else(|| corrupt("dead letter status", &row.status))?,
            created_at: row.created_at.into(),
            resolved_at: row.resolved_at.map(Into::into),
            actor: row.actor,
            note: row.note,
            retries: number("count", row.retries)?,
            retried_at: row.retried_at.map(Into::into),
        })
    }
}

impl Ledger {
    /// A dead letter, whole; `None` if there is none of this id.
    pub async fn dead_letter(&self, id: i64) -> Result<Option<StoredLetter>, LedgerError> {
        Ok(self.dead_letters(id..=id, None, 1, i32::MAX).await?.pop())
    }

    /// Dead letters, newest first. A cursor is the id of the last one of the page before. Of a record
    /// at most [`LISTED_BYTES_MAX`] are shown.
    pub async fn list_dead_letters(
        &self,
        status: Option<LetterStatus>,
        cursor: Option<i64>,
        limit: u32,
    ) -> Result<Page<StoredLetter, i64>, LedgerError> {
        let newest = cursor.map_or(i64::MAX, |before| before.saturating_sub(1));
        let rows = i64::from(limit) + 1;
        let letters = self.dead_letters(0..=newest, status, rows, LISTED_BYTES_MAX).await?;
        Ok(Page::cut(letters, limit, |letter| letter.id))
    }

    async fn dead_letters(
        &self,
        ids: RangeInclusive<i64>,
        status: Option<LetterStatus>,
        limit: i64,
        bytes_max: i32,
    ) -> Result<Vec<StoredLetter>, LedgerError> {
        let rows = sqlx::query_as!(
            LetterRow,
            r#"SELECT d.id, d.reason, d.detail, d.sale_id, d.lane, d.epoch, d.seq, d.topic,
                 d.partition, d.record_offset,
                 CASE WHEN octet_length(d.headers::text) <= $5 THEN d.headers ELSE '[]' END
                   AS "headers!: Json<Vec<StoredHeader>>",
                 substr(d.payload, 1, $5) AS "payload!",
                 octet_length(d.payload) > $5 OR octet_length(d.headers::text) > $5
                   AS "truncated!",
                 d.status = 'open' AND coalesce(d.seq > l.recorded AND d.epoch >= l.sealed_epoch, false)
                   AS "blocks_lane!",
                 d.status, d.created_at, d.resolved_at, d.actor, d.note, d.retries, d.retried_at
             FROM dead_letters d
             LEFT JOIN lanes l ON l.sale_id = d.sale_id AND l.lane = d.lane
             WHERE d.id BETWEEN $1 AND $2 AND ($3::text IS NULL OR d.status = $3)
             ORDER BY d.id DESC LIMIT $4"#,
            ids.start(),
            ids.end(),
            status.map(LetterStatus::as_str),
            limit,
            bytes_max
        )
        .fetch_all(&self.pool)
        .await?;
        rows.into_iter().map(TryInto::try_into).collect()
    }

    /// Discards an open letter that no lane waits for, and answers the letter as it then is: still
    /// open where its lane waits for it. Marks and epochs only rise, so what may be discarded once
    /// may be for ever.
    pub async fn discard_dead_letter(
        &self,
        id: i64,
        deed: &Deed,
    ) -> Result<Option<StoredLetter>, LedgerError> {
        sqlx::query!(
            "UPDATE dead_letters d SET status = 'discarded', actor = $2, note = $3,
               resolved_at = date_trunc('milliseconds', now())
             WHERE id = $1 AND status = 'open' AND NOT EXISTS (
               SELECT FROM lanes l WHERE l.sale_id = d.sale_id AND l.lane = d.lane
                 AND d.seq > l.recorded AND d.epoch >= l.sealed_epoch
             )",
            id,
            deed.actor.as_str(),
            deed.note
        )
        .execute(&self.pool)
        .await?;
        self.dead_letter(id).await
    }

    /// Notes of an open letter that a retry could not apply it, and why.
    pub async fn keep_dead_letter(
        &self,
        id: i64,
        deed: &Deed,
        reason: DeadReason,
        detail: &str,
    ) -> Result<(), LedgerError> {
        sqlx::query!(
            "UPDATE dead_letters SET reason = $2, detail = $3, actor = $4, note = $5,
               retries = retries + 1, retried_at = date_trunc('milliseconds', now())
             WHERE id = $1 AND status = 'open'",
            id,
            reason.as_str(),
            storable(detail),
            deed.actor.as_str(),
            deed.note
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Forgets letters that were resolved longer ago than this; answers how many.
    pub async fn forget_dead_letters(&self, kept_days: u32) -> Result<u64, LedgerError> {
        let mut forgotten = 0;
        loop {
            let done = sqlx::query!(
                "DELETE FROM dead_letters WHERE id IN (
                   SELECT id FROM dead_letters
                   WHERE status <> 'open' AND resolved_at < now() - make_interval(days => $1)
                   LIMIT $2
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

    /// How many letters are open, and how many records are parked.
    pub async fn unapplied(&self) -> Result<Unapplied, LedgerError> {
        let row = sqlx::query!(
            r#"SELECT (SELECT count(*) FROM dead_letters WHERE status = 'open') AS "open!",
                 (SELECT count(*) FROM parked) AS "parked!""#
        )
        .fetch_one(&self.pool)
        .await?;
        Ok(Unapplied { open: row.open, parked: row.parked })
    }
}

/// How much there is that the writer could not apply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unapplied {
    pub open: i64,
    pub parked: i64,
}

/// Closes an open letter whose record is being applied; false: somebody else has resolved it.
pub(super) async fn close_retried(
    connection: &mut PgConnection,
    id: i64,
    deed: &Deed,
) -> Result<bool, sqlx::Error> {
    let done = sqlx::query!(
        "UPDATE dead_letters SET status = 'retried', actor = $2, note = $3, retries = retries + 1,
           retried_at = date_trunc('milliseconds', now()),
           resolved_at = date_trunc('milliseconds', now())
         WHERE id = $1 AND status = 'open'",
        id,
        deed.actor.as_str(),
        deed.note
    )
    .execute(connection)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// A detail as the database can store it.
fn storable(detail: &str) -> String {
    detail.replace('\0', "\u{FFFD}").chars().take(DETAIL_CHARS_MAX).collect()
}

/// Stores dead letters; the same record from the same place in Kafka is stored once, also when it
/// is resolved by then.
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
            storable(detail),
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
