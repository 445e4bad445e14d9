//! Who calls: `Authorization: Bearer <key>`. Keys are compared by their SHA-256, so looking one up
//! tells nothing about how near a guess was.
//!
//! An extractor for each scope, and one for what is open to all. Each goes through the first
//! checks of the contract in their order: key, scope, limits by address and key.

use std::sync::Arc;

use axum::extract::FromRequestParts;
use axum::http::header::{AUTHORIZATION, WWW_AUTHENTICATE};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue};
use sha2::{Digest, Sha256};

use super::Api;
use super::context::Context;
use super::problem::{Code, Problem};
use crate::domain::names::KeyName;
use crate::ledger::{ApiKey, Scope};

/// Nobody's key is longer; hashing more would be work for nothing.
const KEY_BYTES_MAX: usize = 256;

/// Whoever called, and the request that it is about.
#[derive(Debug)]
pub struct Caller {
    key: Arc<ApiKey>,
    context: Arc<Context>,
}

impl Caller {
    /// Who is named as the one who did it.
    pub fn actor(&self) -> KeyName {
        self.key.name.clone()
    }

    /// What goes along with a command.
    pub fn trace(&self) -> Option<String> {
        Some(self.context.trace().traceparent().to_owned())
    }

    pub fn context(&self) -> &Context {
        &self.context
    }
}

/// A caller who may place and settle orders.
#[derive(Debug)]
pub struct OrdersCaller(pub Caller);

/// A caller who may do everything.
#[derive(Debug)]
pub struct OperatorCaller(pub Caller);

/// Anybody, as long as their address is within its limit.
#[derive(Debug)]
pub struct Anybody;

impl FromRequestParts<Api> for OrdersCaller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Result<Self, Problem> {
        caller(parts, api, Scope::Orders).await.map(Self)
    }
}

impl FromRequestParts<Api> for OperatorCaller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Result<Self, Problem> {
        caller(parts, api, Scope::Operator).await.map(Self)
    }
}

impl FromRequestParts<Api> for Anybody {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _api: &Api) -> Result<Self, Problem> {
        Context::of(parts).check_address()?;
        Ok(Self)
    }
}

async fn caller(parts: &Parts, api: &Api, needed: Scope) -> Result<Caller, Problem> {
    let token = bearer(&parts.headers)?;
    let sha256: [u8; 32] = Sha256::digest(token).into();
    let key = api.catalog.key(&sha256).await.map_err(|e| Problem::ledger(&e))?;
    let key = key.ok_or_else(|| unauthenticated(INVALID_TOKEN, "the API key is not valid"))?;
    let may = key.scope == Scope::Operator || key.scope == needed;
    if !may {
        let detail = format!("this needs an API key with scope {}", needed.as_str());
        return Err(Problem::new(Code::Forbidden, detail));
    }
    let context = Context::of(parts);
    context.check_address()?;
    context.check_key(api.admission.key(&sha256))?;
    Ok(Caller { key, context })
}

const NO_TOKEN: HeaderValue = HeaderValue::from_static("Bearer realm=\"holdfast\"");
const INVALID_TOKEN: HeaderValue =
    HeaderValue::from_static("Bearer realm=\"holdfast\", error=\"invalid_token\"");

fn unauthenticated(challenge: HeaderValue, detail: &str) -> Problem {
    Problem::new(Code::Unauthenticated, detail).header(WWW_AUTHENTICATE, challenge)
}

/// The token of the one `Authorization` header, RFC 6750.
fn bearer(headers: &HeaderMap) -> Result<&[u8], Problem> {
    let mut lines = headers.get_all(AUTHORIZATION).into_iter();
    let line = match (lines.next(), lines.next()) {
        (Some(line), None) => line.as_bytes(),
        (None, _) => return Err(unauthenticated(NO_TOKEN, "the Authorization header is missing")),
        (Some(_), Some(_)) => {
            return Err(unauthenticated(NO_TOKEN, "there are two Authorization headers"));
        }
    };
    let (scheme, token) = line.split_at(line.iter().position(|b| *b == b' ').unwrap_or(line.len()));
    let token = token.trim_ascii();
    if !scheme.eq_ignore_ascii_case(b"bearer") || token.is_empty() {
        return Err(unauthenticated(NO_TOKEN, "the Authorization header must be Bearer and a key"));
    }
    if token.len() > KEY_BYTES_MAX {
        return Err(unauthenticated(INVALID_TOKEN, "the API key is not valid"));
    }
    Ok(token)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(lines: &[&'static str]) -> Option<Vec<u8>> {
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append(AUTHORIZATION, HeaderValue::from_static(line));
        }
        bearer(&headers).ok().map(<[u8]>::to_vec)
    }

    #[test]
    fn one_bearer_token_is_taken_whatever_the_case_of_its_scheme() {
        assert_eq!(token(&["Bearer hf_1"]), Some(b"hf_1".to_vec()));
        assert_eq!(token(&["bearer  hf_1"]), Some(b"hf_1".to_vec()));
    }

    #[test]
    fn anything_else_is_no_key() {
        for lines in [&[][..], &["Bearer"], &["Bearer "], &["Basic eA=="], &["hf_1"]] {
            assert_eq!(token(lines), None, "{lines:?}");
        }
        assert_eq!(token(&["Bearer hf_1", "Bearer hf_1"]), None);
    }
}
