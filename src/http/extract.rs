//! What handlers take from a request, checked: bodies, query parameters, names in the path, the
//! idempotency key. Everything that is wrong is a [`Problem`].

use std::pin::pin;
use std::str::FromStr;

use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, FromRequestParts, Query as UrlQuery, RawPathParams, Request};
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE, EXPECT};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, Uri};
use axum::response::IntoResponse;
use futures_util::FutureExt;
use http_body_util::BodyExt;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_path_to_error::{Path, Segment, Track};

use super::Api;
use super::dead_letters::dead_letter_not_found;
use super::problem::{Code, FieldError, Problem};
use super::refunds::refund_not_found;
use super::strict::Strict;
use crate::domain::ids::{AdjustmentId, OrderId, RefundId};
use crate::domain::names::{IdempotencyKey, SaleId, Sku};

/// The body of most calls.
pub const BODY_BYTES_MAX: usize = 16 * 1024;
/// A sale's definition, and what the payment provider sends.
pub(super) const LARGE_BODY_BYTES_MAX: usize = 256 * 1024;
/// What is read, and thrown away, of a body that is too large, so that a client which only reads
/// after it has written gets to see the answer.
const DRAINED_BYTES_MAX: usize = 1024 * 1024;
pub const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
pub(super) const TEXT_CHARS_MAX: usize = 200;
const LIMIT_DEFAULT: u32 = 50;
const LIMIT_MAX: u32 = 200;

/// The members of a request's body. Unknown and duplicate ones are refused by serde
/// (`deny_unknown_fields`), what serde cannot say by `check`.
pub trait Members: DeserializeOwned {
    const BYTES_MAX: usize = BODY_BYTES_MAX;

    /// # Errors
    /// Every mistake that can be seen without asking anybody.
    fn check(self) -> Result<Self, Vec<FieldError>> {
        Ok(self)
    }
}

/// Members of a call that has none.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub struct NoMembers {}

impl Members for NoMembers {}

/// Reads a body. The entry point of everything that callers write, and of the fuzzer.
///
/// # Errors
/// What is wrong with it, and where.
pub fn decode<T: Members>(bytes: &[u8]) -> Result<T, Vec<FieldError>> {
    let mut json = serde_json::Deserializer::from_slice(bytes);
    // Where a mistake is costs more than all the rest: it is looked for once there is one.
    let members = match T::deserialize(Strict(&mut json)) {
        Ok(members) => members,
        Err(_) => return decode_tracked(bytes),
    };
    json.end().map_err(|error| vec![FieldError::new("", error.to_string())])?;
    members.check()
}

/// The same, for one that cannot be read: says where.
fn decode_tracked<T: Members>(bytes: &[u8]) -> Result<T, Vec<FieldError>> {
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let mut track = Track::new();
    let tracked = serde_path_to_error::Deserializer::new(&mut json, &mut track);
    let read = T::deserialize(Strict(tracked));
    read.map_err(|error| vec![located(&track.path(), &error.to_string())])
}

/// The mistake with a JSON pointer to it. What serde says of a member that is missing, unknown or
/// there twice, it says of the object; the member is named in the message alone.
fn located(path: &Path, message: &str) -> FieldError {
    let mut pointer = String::new();
    for segment in path.iter() {
        match segment {
            Segment::Seq { index } => push(&mut pointer, &index.to_string()),
            Segment::Map { key } => push(&mut pointer, key),
            Segment::Enum { .. } | Segment::Unknown => {}
        }
    }
    let member = ["missing field `", "duplicate field `"]
        .iter()
        .find_map(|prefix| message.strip_prefix(prefix)?.split_once('`'))
        .map(|(member, _)| member);
    if let Some(member) = member
        && !pointer.ends_with(&format!("/{member}"))
    {
        push(&mut pointer, member);
    }
    FieldError::new(pointer, message)
}

/// Appends a reference token, RFC 6901.
fn push(pointer: &mut String, token: &str) {
    pointer.push('/');
    pointer.push_str(&token.replace('~', "~0").replace('/', "~1"));
}

/// A text for people: 1-200 characters.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Text(String);

impl TryFrom<String> for Text {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        if !(1..=TEXT_CHARS_MAX).contains(&text.chars().count()) {
            Err(format!("must be 1 to {TEXT_CHARS_MAX} characters long"))
        } else if text.contains('\0') {
            Err("must not contain NUL: the database cannot store it".to_owned())
        } else {
            Ok(Self(text))
        }
    }
}

impl From<Text> for String {
    fn from(text: Text) -> String {
        text.0
    }
}

/// A body that must be there.
#[derive(Debug)]
pub struct Json<T>(pub T);

/// A body all of whose members are optional: without a body, and then without a type, it is `{}`.
#[derive(Debug)]
pub struct OptionalJson<T>(pub T);

/// A body that must be there, and the idempotency key that goes with it.
#[derive(Debug)]
pub struct Keyed<T> {
    pub key: IdempotencyKey,
    pub members: T,
}

impl<T: Members> FromRequest<Api> for Json<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, api: &Api) -> Result<Self, Problem> {
        let (parts, body) = request.into_parts();
        let bytes = read(&parts, body, T::BYTES_MAX, api).await?;
        check_type(&parts.headers)?;
        members(&parts.uri, &bytes).map(Self)
    }
}

impl<T: Members> FromRequest<Api> for OptionalJson<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, api: &Api) -> Result<Self, Problem> {
        let (parts, body) = request.into_parts();
        let bytes = read(&parts, body, T::BYTES_MAX, api).await?;
        if bytes.is_empty() && !parts.headers.contains_key(CONTENT_TYPE) {
            return members(&parts.uri, b"{}").map(Self);
        }
        check_type(&parts.headers)?;
        let bytes: &[u8] = if bytes.is_empty() { b"{}" } else { &bytes };
        members(&parts.uri, bytes).map(Self)
    }
}

/// A body as it came, for whoever must check its signature before reading it.
#[derive(Debug)]
pub struct Raw {
    pub parts: Parts,
    pub body: Bytes,
}

impl FromRequest<Api> for Raw {
    type Rejection = Problem;

    async fn from_request(request: Request, api: &Api) -> Result<Self, Problem> {
        let (parts, body) = request.into_parts();
        let body = read(&parts, body, LARGE_BODY_BYTES_MAX, api).await?;
        Ok(Self { parts, body })
    }
}

impl<T: Members> FromRequest<Api> for Keyed<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, api: &Api) -> Result<Self, Problem> {
        // What is wrong with the body is said first.
        let key = idempotency_key(request.headers());
        let Json(members) = Json::from_request(request, api).await?;
        Ok(Self { key: key?, members })
    }
}

/// Reads the body up to its bound and within its time.
async fn read(parts: &Parts, body: Body, max: usize, api: &Api) -> Result<Bytes, Problem> {
    let declared = parts.headers.get(CONTENT_LENGTH);
    let declared = declared.and_then(|length| length.to_str().ok()?.parse().ok()).unwrap_or(0);
    // Who waits for our word before sending has not sent anything that needs to be drained.
    let drains = declared <= DRAINED_BYTES_MAX && !parts.headers.contains_key(EXPECT);
    if declared > max && !drains {
        return Err(too_large(max));
    }
    let mut collecting = pin!(collect(body, max));
    // Most bodies have come with their heads: those need no timer.
    if let Some(read) = collecting.as_mut().now_or_never() {
        return read;
    }
    match tokio::time::timeout(api.options.body_timeout, collecting).await {
        Ok(read) => read,
        Err(_) => Err(Problem::new(
            Code::RequestTimeout,
            "the body did not arrive in time; nothing was done",
        )),
    }
}

async fn collect(mut body: Body, max: usize) -> Result<Bytes, Problem> {
    let mut bytes = Vec::new();
    let mut seen = 0;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Problem::invalid_at("", error.to_string()))?;
        let Ok(data) = frame.into_data() else { continue };
        seen += data.len();
        if seen > DRAINED_BYTES_MAX {
            break;
        }
        if seen <= max {
            bytes.extend_from_slice(&data);
        }
    }
    if seen > max { Err(too_large(max)) } else { Ok(bytes.into()) }
}

fn too_large(max: usize) -> Problem {
    Problem::new(Code::BodyTooLarge, format!("the body may have {max} bytes at most"))
}

/// `application/json`, which is UTF-8 whatever is said of it (RFC 8259).
pub(super) fn check_type(headers: &HeaderMap) -> Result<(), Problem> {
    let mut lines = headers.get_all(CONTENT_TYPE).into_iter();
    let only = match (lines.next(), lines.next()) {
        (Some(line), None) => line.to_str().unwrap_or_default(),
        _ => "",
    };
    let (media, parameters) = only.split_once(';').unwrap_or((only, ""));
    let utf8 = |parameter: &str| {
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        !name.trim().eq_ignore_ascii_case("charset")
            || value.trim().trim_matches('"').eq_ignore_ascii_case("utf-8")
    };
    if media.trim().eq_ignore_ascii_case("application/json") && parameters.split(';').all(utf8) {
        return Ok(());
    }
    Err(Problem::new(Code::UnsupportedMediaType, "the Content-Type must be application/json"))
}

/// The body's members; a call that has a body takes no query parameters.
fn members<T: Members>(uri: &Uri, bytes: &[u8]) -> Result<T, Problem> {
    let query = Query::of(uri).refused();
    match (decode(bytes), query) {
        (Ok(members), None) => Ok(members),
        (Ok(_), Some(errors)) => Err(Problem::invalid(errors)),
        (Err(mut errors), query) => {
            errors.extend(query.into_iter().flatten());
            Err(Problem::invalid(errors))
        }
    }
}

/// The one `Idempotency-Key` header.
pub fn idempotency_key(headers: &HeaderMap) -> Result<IdempotencyKey, Problem> {
    let invalid = |detail: String| Problem::new(Code::IdempotencyKeyInvalid, detail);
    let mut lines = headers.get_all(IDEMPOTENCY_KEY).into_iter();
    let line = match (lines.next(), lines.next()) {
        (Some(line), None) => line,
        (Some(_), Some(_)) => return Err(invalid("there are two Idempotency-Key headers".into())),
        (None, _) => {
            let detail = "the Idempotency-Key header is missing";
            return Err(Problem::new(Code::IdempotencyKeyRequired, detail));
        }
    };
    let text = line.to_str().map_err(|_| invalid("it must be visible ASCII".into()))?;
    bare_key(text).parse().map_err(|error| invalid(format!("the Idempotency-Key {error}")))
}

/// A key without the double quotes around it, where there are: as a header it may be written as a
/// structured field's string.
pub fn bare_key(text: &str) -> &str {
    text.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).unwrap_or(text)
}

/// Names in the path, percent-decoded.
#[derive(Debug)]
pub struct PathNames(Vec<(String, String)>);

impl FromRequestParts<Api> for PathNames {
    type Rejection = std::convert::Infallible;

    /// A name that is not UTF-8 once decoded is nobody's: it is left out.
    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Result<Self, Self::Rejection> {
        let names = RawPathParams::from_request_parts(parts, api).await;
        let owned = |(name, text): (&str, &str)| (name.to_owned(), text.to_owned());
        Ok(Self(names.map(|names| names.iter().map(owned).collect()).unwrap_or_default()))
    }
}

impl PathNames {
    fn get<T: FromStr>(&self, name: &str) -> Option<Result<T, T::Err>> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, text)| text.parse())
    }

    /// An order's id that has the form of one.
    pub fn order_id(&self) -> Result<OrderId, Problem> {
        self.get("order_id").and_then(Result::ok).ok_or_else(order_not_found)
    }

    /// A refund's id that has the form of one.
    pub fn refund_id(&self) -> Result<RefundId, Problem> {
        self.get("refund_id").and_then(Result::ok).ok_or_else(refund_not_found)
    }

    /// A dead letter's id that has the form of one.
    pub fn dead_letter_id(&self) -> Result<i64, Problem> {
        self.get("dead_letter_id").and_then(Result::ok).ok_or_else(dead_letter_not_found)
    }

    /// An adjustment's id that has the form of one.
    pub fn adjustment_id(&self) -> Result<AdjustmentId, Problem> {
        self.get("adjustment_id").and_then(Result::ok).ok_or_else(adjustment_not_found)
    }

    pub fn sale_id(&self) -> Result<SaleId, Problem> {
        self.get("sale_id").and_then(Result::ok).ok_or_else(sale_not_found)
    }

    /// Of a sale that may be about to be.
    pub fn new_sale_id(&self) -> Result<SaleId, Problem> {
        match self.get("sale_id") {
            Some(Ok(sale)) => Ok(sale),
            Some(Err(error)) => Err(Problem::invalid_at("/sale_id", error.to_string())),
            None => Err(Problem::invalid_at("/sale_id", "must be UTF-8")),
        }
    }

    pub fn sku(&self) -> Result<Sku, Problem> {
        self.get("sku").and_then(Result::ok).ok_or_else(sku_not_found)
    }
}

pub fn order_not_found() -> Problem {
    Problem::new(Code::OrderNotFound, "no order has this id")
}

pub fn adjustment_not_found() -> Problem {
    Problem::new(Code::AdjustmentNotFound, "no adjustment has this id")
}

pub fn sale_not_found() -> Problem {
    Problem::new(Code::SaleNotFound, "no sale has this id")
}

pub fn sku_not_found() -> Problem {
    Problem::new(Code::SkuNotFound, "the sale has no such SKU")
}

/// A request's query parameters, taken one by one.
#[derive(Debug)]
pub struct Query {
    pairs: Vec<(String, String)>,
    errors: Vec<FieldError>,
}

impl Query {
    fn of(uri: &Uri) -> Self {
        if uri.query().is_none() {
            return Self { pairs: Vec::new(), errors: Vec::new() };
        }
        let pairs = UrlQuery::<Vec<(String, String)>>::try_from_uri(uri);
        match pairs {
            Ok(UrlQuery(pairs)) => Self { pairs, errors: Vec::new() },
            Err(error) => {
                let text = error.into_response().status().to_string();
                Self { pairs: Vec::new(), errors: vec![FieldError::new("", text)] }
            }
        }
    }

    /// The parameter of this name, where it is there and `read` can read it.
    pub fn take<T>(
        &mut self,
        name: &str,
        read: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        let position = self.pairs.iter().position(|(known, _)| known == name)?;
        let (_, text) = self.pairs.remove(position);
        let twice = self.pairs.iter().any(|(known, _)| known == name);
        let value = if twice {
            self.pairs.retain(|(known, _)| known != name);
            Err("is there twice".to_owned())
        } else {
            read(&text)
        };
        value.map_err(|detail| self.errors.push(FieldError::new(format!("/{name}"), detail))).ok()
    }

    /// A parameter that is one of our names or ids.
    pub fn parse<T: FromStr<Err: std::fmt::Display>>(&mut self, name: &str) -> Option<T> {
        self.take(name, |text| text.parse().map_err(|error: T::Err| error.to_string()))
    }

    /// How many a page has.
    pub fn limit(&mut self) -> u32 {
        let read = |text: &str| match text.parse() {
            Ok(limit) if (1..=LIMIT_MAX).contains(&limit) => Ok(limit),
            _ => Err(format!("must be 1 to {LIMIT_MAX}")),
        };
        self.take("limit", read).unwrap_or(LIMIT_DEFAULT)
    }

    /// What is wrong, what nobody took included; `None`: nothing.
    fn refused(mut self) -> Option<Vec<FieldError>> {
        for (name, _) in &self.pairs {
            let mut pointer = String::new();
            push(&mut pointer, name);
            self.errors.push(FieldError::new(pointer, "is not a parameter of this call"));
        }
        (!self.errors.is_empty()).then_some(self.errors)
    }
}

/// The parameters that a call takes.
pub trait Parameters: Sized {
    /// Takes them; a mistake is noted in the query.
    fn take(query: &mut Query) -> Self;
}

/// Reads a query that may have these parameters only.
///
/// # Errors
/// What is wrong with it, and where.
pub fn parameters<T: Parameters>(uri: &Uri) -> Result<T, Vec<FieldError>> {
    let mut query = Query::of(uri);
    let taken = T::take(&mut query);
    query.refused().map_or(Ok(taken), Err)
}

/// Parameters of a call that has none.
#[derive(Debug)]
pub struct NoParameters;

impl Parameters for NoParameters {
    fn take(_query: &mut Query) -> Self {
        Self
    }
}

/// A call's query parameters; unknown ones are refused.
#[derive(Debug)]
pub struct Params<T>(pub T);

/// Query parameters of what is open to all; unknown ones are ignored.
#[derive(Debug)]
pub struct OpenParams<T>(pub T);

impl<T: Parameters> FromRequestParts<Api> for Params<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _api: &Api) -> Result<Self, Problem> {
        parameters(&parts.uri).map(Self).map_err(Problem::invalid)
    }
}

impl<T: Parameters> FromRequestParts<Api> for OpenParams<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _api: &Api) -> Result<Self, Problem> {
        let mut query = Query::of(&parts.uri);
        let taken = T::take(&mut query);
        query.pairs.clear();
        query.refused().map_or(Ok(Self(taken)), |errors| Err(Problem::invalid(errors)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;
    use proptest::prelude::*;

    fn key(lines: &[&[u8]]) -> Result<String, Code> {
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append(IDEMPOTENCY_KEY, HeaderValue::from_bytes(line).unwrap());
        }
        idempotency_key(&headers).map(|key| key.to_string()).map_err(|problem| problem.code())
    }

    #[test]
    fn double_quotes_around_a_key_are_no_part_of_it() {
        assert_eq!(key(&[b"\"k-1\""]), Ok("k-1".into()));
        assert_eq!(key(&[b"k-1"]), Ok("k-1".into()));
        assert_eq!(key(&[b"\"k-1"]), Ok("\"k-1".into()), "these are not around it");
        assert_eq!(key(&[b"\""]), Ok("\"".into()));
    }

    #[test]
    fn a_key_is_there_once_and_is_visible_ascii() {
        assert_eq!(key(&[]), Err(Code::IdempotencyKeyRequired));
        let long = [b'k'; 256];
        for lines in [&[&b"a"[..], b"a"][..], &[b""], &[b"\"\""], &[b"a b"], &[&long], &[b"\xff"]] {
            assert_eq!(key(lines), Err(Code::IdempotencyKeyInvalid), "{lines:?}");
        }
    }

    #[test]
    fn the_type_is_json_and_nothing_else() {
        let check = |lines: &[&'static str]| {
            let mut headers = HeaderMap::new();
            for line in lines {
                headers.append(CONTENT_TYPE, HeaderValue::from_static(line));
            }
            check_type(&headers).is_ok()
        };
        for good in ["application/json", "Application/JSON; charset=UTF-8", "application/json;"] {
            assert!(check(&[good]), "{good}");
        }
        for bad in ["text/plain", "application/json-seq", "application/json;charset=latin1", ""] {
            assert!(!check(&[bad]), "{bad}");
        }
        assert!(!check(&[]) && !check(&["application/json", "application/json"]));
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields, expecting = "an object")]
    #[allow(dead_code)] // only that it reads matters
    struct Body {
        name: String,
        lines: Vec<Line>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields, expecting = "an object")]
    #[allow(dead_code)]
    struct Line {
        #[serde(rename = "a/b")]
        units: u32,
    }

    impl Members for Body {}

    fn pointer(text: &str) -> String {
        let errors = decode::<Body>(text.as_bytes()).unwrap_err();
        assert_eq!(errors.len(), 1);
        errors[0].pointer.clone()
    }

    #[test]
    fn a_text_has_characters_not_bytes_and_nothing_that_cannot_be_stored() {
        assert!(Text::try_from("é".repeat(200)).is_ok());
        for bad in [String::new(), "é".repeat(201), "a\0b".into()] {
            assert!(Text::try_from(bad).is_err());
        }
    }

    #[test]
    fn a_mistake_is_pointed_at() {
        assert!(decode::<Body>(br#"{"name":"n","lines":[{"a/b":1}]}"#).is_ok());
        for (text, at) in [
            ("", ""),
            ("{", ""),
            ("[]", ""),
            ("null", ""),
            (r#"{"name":"n","lines":[]} {}"#, ""),
            (r#"{"lines":[]}"#, "/name"),
            (r#"{"name":"n","name":"n","lines":[]}"#, "/name"),
            (r#"{"name":"n","lines":[],"quantitiy":1}"#, "/quantitiy"),
            (r#"{"name":1,"lines":[]}"#, "/name"),
            (r#"{"name":"n","lines":[{"a/b":1},{"a/b":1.0}]}"#, "/lines/1/a~1b"),
            (r#"{"name":"n","lines":[{"a/b":"1"}]}"#, "/lines/0/a~1b"),
            (r#"{"name":"n","lines":[[1]]}"#, "/lines/0"),
            (r#"["n",[]]"#, ""),
        ] {
            assert_eq!(pointer(text), at, "{text}");
        }
    }

    struct Page(u32);

    impl Parameters for Page {
        fn take(query: &mut Query) -> Self {
            Self(query.limit())
        }
    }

    fn page(query: &str) -> Result<u32, Vec<FieldError>> {
        parameters(&format!("/x?{query}").parse().unwrap()).map(|Page(limit)| limit)
    }

    #[test]
    fn a_parameter_is_known_there_once_and_in_its_range() {
        assert_eq!(page(""), Ok(50));
        assert_eq!(page("limit=200"), Ok(200));
        for (query, at) in [
            ("limit=0", "/limit"),
            ("limit=201", "/limit"),
            ("limit=", "/limit"),
            ("limit=1&limit=1", "/limit"),
            ("li%6Dit=1&limits=2", "/limits"),
        ] {
            assert_eq!(page(query).unwrap_err()[0].pointer, at, "{query}");
        }
    }

    proptest! {
        #[test]
        fn no_body_or_query_makes_it_panic(text in "\\PC{0,80}", query in "[!-~&&[^#]]{0,40}") {
            decode::<Body>(text.as_bytes()).ok();
            if format!("/x?{query}").parse::<Uri>().is_ok() {
                page(&query).ok();
            }
        }
    }
}
