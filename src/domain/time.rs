//! Points in time, to the millisecond.

use chrono::{DateTime, Datelike, SecondsFormat, Timelike, Utc};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::ops::Range;

/// Milliseconds since the Unix epoch, UTC. Shown as RFC 3339 with exactly three decimals.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp(i64);

impl Timestamp {
    pub const fn from_millis(millis: i64) -> Self {
        Self(millis)
    }

    pub const fn millis(self) -> i64 {
        self.0
    }

    /// The same instant for the database driver. `None` only beyond the year 262,000.
    pub fn to_datetime(self) -> Option<DateTime<Utc>> {
        DateTime::from_timestamp_millis(self.0)
    }
}

impl From<DateTime<Utc>> for Timestamp {
    fn from(at: DateTime<Utc>) -> Self {
        Self(at.timestamp_millis())
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.to_datetime() {
            Some(at) if (0..=9999).contains(&at.year()) => {
                f.write_str(str::from_utf8(&rfc3339(at)).expect("ASCII"))
            }
            Some(at) => f.write_str(&at.to_rfc3339_opts(SecondsFormat::Millis, true)),
            None => write!(f, "{} ms", self.0),
        }
    }
}

/// Of a year with four digits. Every answer about an order has two or three times, and chrono's own
/// formatting of them was 3 % of a request's instructions.
fn rfc3339(at: DateTime<Utc>) -> [u8; 24] {
    let mut text = *b"0000-00-00T00:00:00.000Z";
    let mut put = |place: Range<usize>, mut number: u32| {
        for digit in text[place].iter_mut().rev() {
            *digit = b'0' + (number % 10) as u8;
            number /= 10;
        }
    };
    put(0..4, at.year().unsigned_abs());
    put(5..7, at.month());
    put(8..10, at.day());
    put(11..13, at.hour());
    put(14..16, at.minute());
    put(17..19, at.second());
    put(20..23, at.timestamp_subsec_millis());
    text
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        DateTime::parse_from_rfc3339(&text)
            .map(|at| Self(at.timestamp_millis()))
            .map_err(|e| serde::de::Error::custom(format_args!("not an RFC 3339 time: {e}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn times_are_shown_as_chrono_shows_them(millis in -62_200_000_000_000i64..260_000_000_000_000) {
            let at = Timestamp::from_millis(millis);
            let expected =
                at.to_datetime().map(|at| at.to_rfc3339_opts(SecondsFormat::Millis, true));
            proptest::prop_assert_eq!(Some(at.to_string()), expected);
        }
    }

    #[test]
    fn a_time_is_shown_in_utc_with_milliseconds() {
        assert_eq!(Timestamp::from_millis(0).to_string(), "1970-01-01T00:00:00.000Z");
        let read: Timestamp = serde_json::from_str("\"2026-11-11T02:00:00+02:00\"").unwrap();
        assert_eq!(read.to_string(), "2026-11-11T00:00:00.000Z");
    }
}
