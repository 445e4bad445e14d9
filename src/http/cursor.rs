//! Where a list goes on: the last of the page before, opaque to callers.

use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use crate::domain::time::Timestamp;

/// The end of the year 9999: the database can store any time until then.
const MILLIS_MAX: i64 = 253_402_300_799_999;

/// Writes `milliseconds.id`, in base64url.
pub fn encode(at: Timestamp, id: &impl ToString) -> String {
    URL_SAFE_NO_PAD.encode(format!("{}.{}", at.millis(), id.to_string()))
}

/// Reads what [`encode`] wrote.
///
/// # Errors
/// What a caller is told of anything else.
pub fn decode<T: FromStr>(text: &str) -> Result<(Timestamp, T), String> {
    let read = || {
        let text = String::from_utf8(URL_SAFE_NO_PAD.decode(text).ok()?).ok()?;
        let (millis, id) = text.split_once('.')?;
        let millis = millis.parse().ok().filter(|millis| (0..=MILLIS_MAX).contains(millis))?;
        Some((Timestamp::from_millis(millis), id.parse().ok()?))
    };
    read().ok_or_else(|| "is not a cursor of this list".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::names::SaleId;

    #[test]
    fn a_cursor_reads_back_and_nothing_else_is_one() {
        let (at, sale) = (Timestamp::from_millis(1_234), "a.b".parse::<SaleId>().unwrap());
        assert_eq!(decode(&encode(at, &sale)), Ok((at, sale)));
        for text in ["", "!", "MQ", "LTEuYQ", "MS4h4pyT"] {
            assert!(decode::<SaleId>(text).is_err(), "{text}");
        }
    }
}
