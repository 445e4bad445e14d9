//! Versions as entity tags, and `If-Match` (RFC 9110): whoever changes something may say which
//! version of it they have seen.

use axum::http::HeaderMap;
use axum::http::header::IF_MATCH;

pub fn etag(version: u64) -> String {
    format!("\"{version}\"")
}

/// The tags of an `If-Match`.
#[derive(Debug)]
pub struct IfMatch(Vec<String>);

impl IfMatch {
    /// `None` where there is no such header.
    pub fn of(headers: &HeaderMap) -> Option<Self> {
        let lines = headers.get_all(IF_MATCH);
        let tags = lines.iter().filter_map(|line| line.to_str().ok());
        let tags = tags.flat_map(|line| line.split(',')).map(|tag| tag.trim().to_owned());
        headers.contains_key(IF_MATCH).then(|| Self(tags.collect()))
    }

    /// Whether it takes whatever version there is.
    pub fn is_any(&self) -> bool {
        self.0.iter().any(|tag| tag == "*")
    }

    /// Strong comparison: `W/"1"` matches nothing.
    pub fn matches(&self, current: Option<u64>) -> bool {
        current.is_some_and(|version| self.is_any() || self.0.contains(&etag(version)))
    }

    /// The versions that it names; what is no tag of ours matches none.
    pub fn versions(&self) -> Vec<u64> {
        let version = |tag: &String| {
            let version = tag.trim_matches('"').parse().ok()?;
            (etag(version) == *tag).then_some(version)
        };
        self.0.iter().filter_map(version).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    fn if_match(lines: &[&'static str]) -> Option<IfMatch> {
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append(IF_MATCH, HeaderValue::from_static(line));
        }
        IfMatch::of(&headers)
    }

    #[test]
    fn if_match_compares_strongly() {
        let matches = |lines: &[&'static str], current| {
            if_match(lines).map(|if_match| if_match.matches(current))
        };
        assert_eq!(matches(&[], Some(1)), None);
        assert_eq!(matches(&["\"1\""], Some(1)), Some(true));
        assert_eq!(matches(&["\"3\", \"1\""], Some(1)), Some(true));
        assert_eq!(matches(&["\"3\"", "\"1\""], Some(1)), Some(true));
        assert_eq!(matches(&["*"], Some(1)), Some(true));
        for (line, current) in [("*", None), ("W/\"1\"", Some(1)), ("1", Some(1)), ("", Some(1))] {
            assert_eq!(matches(&[line], current), Some(false), "{line}");
        }
    }

    #[test]
    fn only_our_own_tags_name_versions() {
        let line = r#""0", "17", W/"3", 4, "05", "+6", "x", "", "99999999999999999999""#;
        let named = if_match(&[line, "\"8\""]).unwrap();
        assert_eq!((named.is_any(), named.versions()), (false, vec![0, 17, 8]));
        let any = if_match(&["*"]).unwrap();
        assert_eq!((any.is_any(), any.versions()), (true, vec![]));
    }
}
