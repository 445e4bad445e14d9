//! From what the database holds to domain types, and back.

use std::fmt::Display;
use std::str::FromStr;

use chrono::{DateTime, Utc};

use super::LedgerError;
use crate::domain::ids::LaneId;
use crate::domain::time::Timestamp;

/// A text that was one of our types when it was written.
pub(super) fn parse<T>(what: &'static str, text: &str) -> Result<T, LedgerError>
where
    T: FromStr,
    T::Err: Display,
{
    text.parse().map_err(|e: T::Err| corrupt(what, format_args!("{text:?} {e}")))
}

/// A number that was in the range of our type when it was written.
pub(super) fn number<T, U>(what: &'static str, value: T) -> Result<U, LedgerError>
where
    T: Copy + Display,
    U: TryFrom<T>,
{
    U::try_from(value).map_err(|_| corrupt(what, value))
}

pub(super) fn corrupt(what: &'static str, detail: impl Display) -> LedgerError {
    LedgerError::Corrupt { what, detail: detail.to_string() }
}

pub(super) fn lane_id(sale: &str, lane: i16) -> Result<LaneId, LedgerError> {
    Ok(LaneId { sale: parse("sale id", sale)?, lane: number("lane", lane)? })
}

pub(super) fn bytes32(what: &'static str, bytes: Vec<u8>) -> Result<[u8; 32], LedgerError> {
    let length = bytes.len();
    bytes.try_into().map_err(|_| corrupt(what, format_args!("{length} bytes")))
}

/// For the database; a time beyond what it can store is the last one that it can.
pub(super) fn datetime(at: Timestamp) -> DateTime<Utc> {
    at.to_datetime().unwrap_or(END_OF_TIME)
}

/// A sequence number for the database. What comes from events is below 2^63 by their decoder.
pub(super) fn bigint(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// Later than any time that our own records have, and still one that PostgreSQL can store.
pub(super) const END_OF_TIME: DateTime<Utc> = match DateTime::from_timestamp(253_402_300_799, 0) {
    Some(at) => at, // 9999-12-31T23:59:59Z
    None => DateTime::<Utc>::UNIX_EPOCH,
};
