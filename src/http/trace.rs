//! W3C Trace Context (<https://www.w3.org/TR/trace-context/>): a request's `traceparent` is taken
//! up, or a new trace begun, and passed on with what the request causes.

use std::ops::Range;

use axum::http::HeaderMap;

const TRACEPARENT: &str = "traceparent";
/// `00-TRACE_ID-PARENT_ID-FLAGS`
const CHARS: usize = 55;
const TRACE_ID_CHARS: usize = 32;
const PARENT_ID_CHARS: usize = 16;
const TRACE_ID: Range<usize> = 3..3 + TRACE_ID_CHARS;
const PARENT_ID: Range<usize> = TRACE_ID.end + 1..TRACE_ID.end + 1 + PARENT_ID_CHARS;
const FLAGS: Range<usize> = PARENT_ID.end + 1..CHARS;

/// The trace that a request belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    /// As the next in line takes it up: our own span is the parent.
    traceparent: [u8; CHARS],
}

impl Trace {
    /// Takes up the request's trace; one that is missing, malformed or there twice begins a new.
    pub fn of(headers: &HeaderMap) -> Self {
        let mut lines = headers.get_all(TRACEPARENT).into_iter();
        let only = match (lines.next(), lines.next()) {
            (Some(line), None) => line.to_str().ok(),
            _ => None,
        };
        let mut traceparent = *b"00-................................-................-00";
        match only.and_then(parse) {
            Some((trace_id, flags)) => {
                traceparent[TRACE_ID].copy_from_slice(trace_id.as_bytes());
                traceparent[FLAGS].copy_from_slice(flags.as_bytes());
            }
            None => hex(&nonzero::<16>(), &mut traceparent[TRACE_ID]),
        }
        hex(&nonzero::<8>(), &mut traceparent[PARENT_ID]);
        Self { traceparent }
    }

    pub fn traceparent(&self) -> &str {
        str::from_utf8(&self.traceparent).expect("hexadecimal digits and hyphens")
    }

    pub fn id(&self) -> &str {
        &self.traceparent()[TRACE_ID]
    }
}

/// Trace id and flags of a valid `traceparent`. A version after 00 may have more to say behind
/// its flags; ff is no version.
fn parse(line: &str) -> Option<(&str, &str)> {
    let mut parts = line.trim().splitn(5, '-');
    let (version, trace_id) = (parts.next()?, parts.next()?);
    let (parent_id, flags, rest) = (parts.next()?, parts.next()?, parts.next());
    let valid = is_hex(version, 2)
        && version != "ff"
        && (version != "00" || rest.is_none())
        && is_hex(trace_id, TRACE_ID_CHARS)
        && is_hex(parent_id, PARENT_ID_CHARS)
        && is_hex(flags, 2)
        && [trace_id, parent_id].iter().all(|id| id.bytes().any(|byte| byte != b'0'));
    valid.then_some((trace_id, flags))
}

fn is_hex(text: &str, chars: usize) -> bool {
    text.len() == chars && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// Ids of all zeros are invalid.
fn nonzero<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    rand::fill(&mut bytes[..]);
    bytes[N - 1] |= 1;
    bytes
}

fn hex(bytes: &[u8], into: &mut [u8]) {
    hex::encode_to_slice(bytes, into).expect("two digits a byte");
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GIVEN: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn of(lines: &[&str]) -> Trace {
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append(TRACEPARENT, line.parse().unwrap());
        }
        Trace::of(&headers)
    }

    #[test]
    fn a_trace_is_taken_up_under_a_span_of_our_own() {
        let trace = of(&[GIVEN]);
        assert_eq!(trace.id(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_ne!(trace.traceparent(), GIVEN);
        assert!(trace.traceparent().ends_with("-01"));
        assert!(
            of(&["cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-what-ever"])
                .traceparent()
                .starts_with("00-4bf92f3577b34da6a3ce929d0e0e4736-")
        );
    }

    #[test]
    fn an_invalid_trace_is_replaced() {
        let zeros = "00-00000000000000000000000000000000-00f067aa0ba902b7-01";
        let upper = GIVEN.to_uppercase();
        let longer = format!("{GIVEN}-more");
        for lines in [&[][..], &[GIVEN, GIVEN], &[zeros], &[&upper], &[&longer], &["ff-x"]] {
            let trace = of(lines);
            assert_ne!(trace.id(), "4bf92f3577b34da6a3ce929d0e0e4736", "{lines:?}");
            assert!(parse(trace.traceparent()).is_some(), "{lines:?}");
        }
    }

    proptest! {
        #[test]
        fn whatever_comes_a_valid_one_goes_on(line in "[ -~]{0,80}") {
            let trace = of(&[&line]);
            prop_assert!(parse(trace.traceparent()).is_some());
        }
    }
}
