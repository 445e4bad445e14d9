//! Records that wait for a missing earlier event of their lane.

use std::collections::HashSet;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use sqlx::PgConnection;
use sqlx::types::Json;

use super::dead_letters::DeadReason;
use super::row::{bigint, bytes32, corrupt, lane_id, number};
use super::{Ledger, LedgerError};
use crate::domain::ids::LaneId;

/// Where a record says which epoch it is of.
const EPOCH_HEADER: &str = "ce_epoch";

/// A Kafka record as it came, kept whole so that it can be tried again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredRecord {
    pub topic: String,
    pub partition: i32,
    pub offset: i64,
    pub headers: Vec<(String, Vec<u8>)>,
    pub payload: Vec<u8>,
}

impl StoredRecord {
    /// BLAKE3 of headers and payload: what tells records apart wherever they lie.
    pub fn digest(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        let mut part = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
        };
        for (name, value) in &self.headers {
            part(name.as_bytes());
            part(value);
        }
        part(&self.payload);
        *hasher.finalize().as_bytes()
    }
}

/// A record that waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parked {
    pub lane: LaneId,
    pub seq: u64,
    pub record: StoredRecord,
}

/// Which parked record.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ParkedKey {
    pub lane: LaneId,
    pub seq: u64,
    pub digest: [u8; 32],
}

impl Parked {
    pub fn key(&self) -> ParkedKey {
        ParkedKey { lane: self.lane.clone(), seq: self.seq, digest: self.record.digest() }
    }
}

/// A header as people can read it in the database, and as nothing is lost.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct StoredHeader {
    name: String,
    #[serde(flatten)]
    value: StoredValue,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum StoredValue {
    Value(String),
    Base64(String),
}

/// PostgreSQL's text and jsonb take any Unicode but NUL.
fn is_storable(text: &str) -> bool {
    !text.contains('\0')
}

pub(super) fn store_headers(record: &StoredRecord) -> Json<Vec<StoredHeader>> {
    let header = |(name, value): &(String, Vec<u8>)| StoredHeader {
        name: name.replace('\0', "\u{FFFD}"),
        value: match std::str::from_utf8(value) {
            Ok(text) if is_storable(text) => StoredValue::Value(text.to_owned()),
            _ => StoredValue::Base64(STANDARD.encode(value)),
        },
    };
    Json(record.headers.iter().map(header).collect())
}

pub(super) fn read_headers(
    stored: Vec<StoredHeader>,
) -> Result<Vec<(String, Vec<u8>)>, LedgerError> {
    let read = |header: StoredHeader| {
        let value = match header.value {
            StoredValue::Value(text) => text.into_bytes(),
            StoredValue::Base64(text) => STANDARD.decode(text).map_err(|e| corrupt("header", e))?,
        };
        Ok((header.name, value))
    };
    stored.into_iter().map(read).collect()
}

impl Ledger {
    /// Parked records whose turn has come, of one lane or of any, in order: those that follow their
    /// lane's mark without a gap, and those that it has passed (they turn out repeats or forks).
    pub async fn ready_parked(
        &self,
        lane: Option<&LaneId>,
        limit: u32,
    ) -> Result<Vec<Parked>, LedgerError> {
        // Lanes first, so that what still waits for its gap costs nothing. Numbered by seq, not by
        // row: a fork has two rows of one seq and neither may end the run.
        let rows = sqlx::query!(
            r#"SELECT sale_id AS "sale_id!", lane AS "lane!", seq AS "seq!", topic AS "topic!",
                 partition AS "partition!", record_offset AS "record_offset!",
                 headers AS "headers!: Json<Vec<StoredHeader>>", payload AS "payload!"
             FROM (
               SELECT p.*, l.recorded, dense_rank() OVER (
                 PARTITION BY p.sale_id, p.lane, p.seq > l.recorded ORDER BY p.seq
               ) AS place
               FROM (
                 SELECT sale_id, lane, recorded FROM lanes
                 WHERE ($2::text IS NULL OR (sale_id, lane) = ($2, $3)) AND EXISTS (
                   SELECT FROM parked n WHERE n.sale_id = lanes.sale_id AND n.lane = lanes.lane
                     AND n.seq <= lanes.recorded + 1
                 )
               ) AS l JOIN parked p ON p.sale_id = l.sale_id AND p.lane = l.lane
                 AND p.seq <= l.recorded + $1
             ) AS waiting
             WHERE seq <= recorded OR seq = recorded + place
             ORDER BY sale_id, lane, seq, parked_at, record_offset LIMIT $1"#,
            i64::from(limit),
            lane.map(|lane| lane.sale.as_str()),
            lane.map(|lane| i16::from(lane.lane))
        )
        .fetch_all(&self.pool)
        .await?;
        rows.into_iter()
            .map(|row| {
                Ok(Parked {
                    lane: lane_id(&row.sale_id, row.lane)?,
                    seq: number("seq", row.seq)?,
                    record: StoredRecord {
                        topic: row.topic,
                        partition: row.partition,
                        offset: row.record_offset,
                        headers: read_headers(row.headers.0)?,
                        payload: row.payload,
                    },
                })
            })
            .collect()
    }
}

impl Ledger {
    /// Which of these are parked already.
    pub async fn parked_among(
        &self,
        keys: &[ParkedKey],
    ) -> Result<HashSet<ParkedKey>, LedgerError> {
        let (sales, lanes, seqs, digests) = key_columns(keys);
        let rows = sqlx::query!(
            "SELECT p.sale_id, p.lane, p.seq, p.digest
             FROM UNNEST($1::text[], $2::smallint[], $3::bigint[], $4::bytea[])
               AS asked (sale_id, lane, seq, digest)
             JOIN parked p ON p.sale_id = asked.sale_id AND p.lane = asked.lane
               AND p.seq = asked.seq AND p.digest = asked.digest",
            &sales as _,
            &lanes,
            &seqs,
            &digests as _
        )
        .fetch_all(&self.pool)
        .await?;
        rows.into_iter()
            .map(|row| {
                Ok(ParkedKey {
                    lane: lane_id(&row.sale_id, row.lane)?,
                    seq: number("seq", row.seq)?,
                    digest: bytes32("parked digest", row.digest)?,
                })
            })
            .collect()
    }
}

type KeyColumns<'a> = (Vec<&'a str>, Vec<i16>, Vec<i64>, Vec<&'a [u8]>);

fn key_columns(keys: &[ParkedKey]) -> KeyColumns<'_> {
    (
        keys.iter().map(|key| key.lane.sale.as_str()).collect(),
        keys.iter().map(|key| key.lane.lane.into()).collect(),
        keys.iter().map(|key| bigint(key.seq)).collect(),
        keys.iter().map(|key| &key.digest[..]).collect(),
    )
}

/// Parks records; one that is parked already stays as it is.
pub(super) async fn park(
    connection: &mut PgConnection,
    records: &[Parked],
) -> Result<u64, LedgerError> {
    let mut parked = 0;
    // A gap is rare: one row a statement keeps this plain.
    for Parked { lane, seq, record } in records {
        let done = sqlx::query!(
            "INSERT INTO parked
               (sale_id, lane, seq, digest, topic, partition, record_offset, headers, payload)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) ON CONFLICT DO NOTHING",
            lane.sale.as_str(),
            i16::from(lane.lane),
            bigint(*seq),
            &record.digest()[..],
            record.topic,
            record.partition,
            record.offset,
            &store_headers(record) as _,
            record.payload
        )
        .execute(&mut *connection)
        .await?;
        parked += done.rows_affected();
    }
    Ok(parked)
}

/// Forgets parked records that were applied, or turned out repeats or dead.
pub(super) async fn unpark(
    connection: &mut PgConnection,
    keys: &[ParkedKey],
) -> Result<(), LedgerError> {
    let (sales, lanes, seqs, digests) = key_columns(keys);
    sqlx::query!(
        "DELETE FROM parked p
         USING UNNEST($1::text[], $2::smallint[], $3::bigint[], $4::bytea[])
           AS done (sale_id, lane, seq, digest)
         WHERE p.sale_id = done.sale_id AND p.lane = done.lane AND p.seq = done.seq
           AND p.digest = done.digest",
        &sales as _,
        &lanes,
        &seqs,
        &digests as _
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Makes dead letters of all that is parked in a lane: the epoch of it has ended.
pub(super) async fn bury_parked(
    connection: &mut PgConnection,
    lane: &LaneId,
    epoch: u32,
) -> Result<u64, LedgerError> {
    let done = sqlx::query!(
        "WITH gone AS (DELETE FROM parked WHERE sale_id = $1 AND lane = $2 RETURNING *)
         INSERT INTO dead_letters (reason, detail, sale_id, lane, epoch, seq, topic, partition,
           record_offset, digest, headers, payload)
         SELECT $3, $4, sale_id, lane, (
             SELECT (header ->> 'value')::bigint
             FROM jsonb_array_elements(headers) WITH ORDINALITY AS h (header, place)
             WHERE header ->> 'name' = $5 ORDER BY place LIMIT 1
           ), seq, topic, partition, record_offset, digest, headers, payload
         FROM gone ORDER BY seq ON CONFLICT DO NOTHING",
        lane.sale.as_str(),
        i16::from(lane.lane),
        DeadReason::StaleEpoch.as_str(),
        format!("what comes before it never came, and epoch {epoch} began"),
        EPOCH_HEADER
    )
    .execute(connection)
    .await?;
    Ok(done.rows_affected())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_of_any_bytes_are_stored_and_read_back() {
        let headers = vec![
            ("ce_id".to_owned(), b"s/0/1-1".to_vec()),
            ("nul".to_owned(), b"a\0b".to_vec()),
            ("bytes".to_owned(), vec![0xFF, 0xFE]),
        ];
        let record = StoredRecord {
            topic: "t".into(),
            partition: 0,
            offset: 0,
            headers: headers.clone(),
            payload: Vec::new(),
        };
        let json = serde_json::to_string(&store_headers(&record).0).unwrap();
        assert!(json.contains(r#"{"name":"ce_id","value":"s/0/1-1"}"#), "{json}");
        let stored: Vec<StoredHeader> = serde_json::from_str(&json).unwrap();
        assert_eq!(read_headers(stored).unwrap(), headers);
    }
}
