//! Dead letters: what the writer could not apply, and what operators do about it.

use axum::extract::State;
use axum::http::StatusCode;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::auth::OperatorCaller;
use super::extract::{Members, OptionalJson, Parameters, Params, PathNames, Query, Text};
use super::problem::{Code, Problem};
use super::{Answer, Api, json};
use crate::domain::names::SaleId;
use crate::domain::time::Timestamp;
use crate::ledger::{Deed, LetterStatus, StoredLetter};
use crate::writer;

/// What became of a dead letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum DeadLetterStatus {
    Open,
    /// What it says is recorded.
    Retried,
    /// An operator said that it need not be.
    Discarded,
}

impl From<LetterStatus> for DeadLetterStatus {
    fn from(status: LetterStatus) -> Self {
        match status {
            LetterStatus::Open => Self::Open,
            LetterStatus::Retried => Self::Retried,
            LetterStatus::Discarded => Self::Discarded,
        }
    }
}

/// Bytes as people can read them.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Readable {
    /// UTF-8.
    Text(String),
    /// Anything else.
    Base64(String),
}

impl From<Vec<u8>> for Readable {
    fn from(bytes: Vec<u8>) -> Self {
        String::from_utf8(bytes)
            .map_or_else(|error| Self::Base64(STANDARD.encode(error.as_bytes())), Self::Text)
    }
}

/// A header of a Kafka record.
#[derive(Debug, Serialize, ToSchema)]
pub struct HeaderView {
    pub name: String,
    #[serde(flatten)]
    pub value: Readable,
}

/// A record that could not be applied.
#[derive(Debug, Serialize, ToSchema)]
pub struct DeadLetterView {
    pub id: String,
    pub topic: String,
    pub partition: i32,
    pub offset: i64,
    /// Where it says it belongs; null where it does not say.
    pub sale_id: Option<SaleId>,
    pub lane: Option<u8>,
    pub epoch: Option<u32>,
    pub seq: Option<u64>,
    /// Why it is not applied, as of the last try: `undecodable`, `unknown-lane`, `stale-epoch`,
    /// `unknown-epoch`, `fork`, `not-applicable`, `waiting`.
    pub reason: String,
    pub detail: String,
    pub status: DeadLetterStatus,
    /// Whether its lane waits for it: then it can be retried, but not discarded.
    pub blocks_lane: bool,
    pub created_at: Timestamp,
    pub resolved_at: Option<Timestamp>,
    /// Whose key last retried or discarded it.
    pub actor: Option<String>,
    /// What they said.
    pub note: Option<String>,
    pub retries: u32,
    pub retried_at: Option<Timestamp>,
    pub headers: Vec<HeaderView>,
    pub payload: Readable,
    /// Whether headers or payload are longer than a list shows.
    pub truncated: bool,
}

impl From<StoredLetter> for DeadLetterView {
    fn from(letter: StoredLetter) -> Self {
        let StoredLetter { record, place, .. } = letter;
        let header =
            |(name, value): (String, Vec<u8>)| HeaderView { name, value: Readable::from(value) };
        Self {
            id: letter.id.to_string(),
            topic: record.topic,
            partition: record.partition,
            offset: record.offset,
            lane: place.as_ref().map(|place| place.lane.lane),
            epoch: place.as_ref().map(|place| place.epoch),
            seq: place.as_ref().map(|place| place.seq),
            sale_id: place.map(|place| place.lane.sale),
            reason: letter.reason,
            detail: letter.detail,
            status: letter.status.into(),
            blocks_lane: letter.blocks_lane,
            created_at: letter.created_at,
            resolved_at: letter.resolved_at,
            actor: letter.actor,
            note: letter.note,
            retries: letter.retries,
            retried_at: letter.retried_at,
            headers: record.headers.into_iter().map(header).collect(),
            payload: record.payload.into(),
            truncated: letter.truncated,
        }
    }
}

/// A page of dead letters.
#[derive(Debug, Serialize, ToSchema)]
pub struct DeadLetterList {
    pub dead_letters: Vec<DeadLetterView>,
    /// Where the next page begins; null on the last.
    pub next_cursor: Option<String>,
}

/// Which dead letters to list.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ListDeadLetters {
    /// `open`, `retried` or `discarded`
    #[param(value_type = Option<DeadLetterStatus>)]
    status: Option<LetterStatus>,
    /// How many on a page; 50 unless said otherwise.
    #[param(value_type = Option<u32>, minimum = 1, maximum = 200)]
    limit: u32,
    /// `next_cursor` of the page before.
    #[param(value_type = Option<String>)]
    cursor: Option<i64>,
}

impl Parameters for ListDeadLetters {
    fn take(query: &mut Query) -> Self {
        let status = |word: &str| {
            LetterStatus::from_word(word)
                .ok_or_else(|| "must be open, retried or discarded".to_owned())
        };
        let cursor =
            |text: &str| text.parse().map_err(|_| "is not a cursor of this list".to_owned());
        Self {
            status: query.take("status", status),
            limit: query.limit(),
            cursor: query.take("cursor", cursor),
        }
    }
}

/// What an operator says about it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub struct ResolveDeadLetter {
    #[serde(default)]
    pub note: Option<Text>,
}

impl Members for ResolveDeadLetter {}

/// Dead letters, newest first. Of a record's headers and payload 16 KiB each are shown.
#[utoipa::path(
    get, path = "/v1/dead-letters", operation_id = "list_dead_letters", tag = "dead letters",
    params(ListDeadLetters),
    responses((status = 200, description = "A page", body = DeadLetterList)),
    security(("key" = []))
)]
pub async fn list(
    State(api): State<Api>,
    _caller: OperatorCaller,
    Params(asked): Params<ListDeadLetters>,
) -> Answer {
    let _in_flight = api.enter()?;
    let page = api.ledger.list_dead_letters(asked.status, asked.cursor, asked.limit).await;
    let page = page.map_err(|e| Problem::ledger(&e))?;
    let list = DeadLetterList {
        dead_letters: page.items.into_iter().map(DeadLetterView::from).collect(),
        next_cursor: page.next.map(|id| id.to_string()),
    };
    Ok(json(StatusCode::OK, &list))
}

/// A dead letter, its record whole.
#[utoipa::path(
    get, path = "/v1/dead-letters/{dead_letter_id}", operation_id = "show_dead_letter", tag = "dead letters",
    params(("dead_letter_id" = String, Path)),
    responses(
        (status = 200, description = "As it is", body = DeadLetterView),
        (status = 404, description = "dead-letter-not-found"),
    ),
    security(("key" = []))
)]
pub async fn show(State(api): State<Api>, _caller: OperatorCaller, names: PathNames) -> Answer {
    let _in_flight = api.enter()?;
    let letter = api.ledger.dead_letter(names.dead_letter_id()?).await;
    let letter = letter.map_err(|e| Problem::ledger(&e))?.ok_or_else(dead_letter_not_found)?;
    Ok(json(StatusCode::OK, &DeadLetterView::from(letter)))
}

/// Applies what it says, then what was parked behind it, in order. Again is the same answer.
#[utoipa::path(
    post, path = "/v1/dead-letters/{dead_letter_id}/retry", operation_id = "retry_dead_letter", tag = "dead letters",
    params(("dead_letter_id" = String, Path)),
    request_body(content = Option<ResolveDeadLetter>, description = "May be left out"),
    responses(
        (status = 200, description = "What it says is recorded, now or before", body = DeadLetterView),
        (status = 404, description = "dead-letter-not-found"),
        (status = 409, description = "dead-letter-not-applicable: it stays open, and says why; dead-letter-resolved: it was discarded. Both with dead_letter"),
    ),
    security(("key" = []))
)]
pub async fn retry(
    State(api): State<Api>,
    OperatorCaller(caller): OperatorCaller,
    names: PathNames,
    OptionalJson(asked): OptionalJson<ResolveDeadLetter>,
) -> Answer {
    let in_flight = api.enter()?;
    let id = names.dead_letter_id()?;
    let deed = Deed { actor: caller.actor(), note: asked.note.map(Into::into) };
    // A task of its own: its transactions must end in order, whether or not the client is there.
    let task = tokio::spawn(async move {
        let _in_flight = in_flight;
        writer::retry(&api.ledger, id, &deed).await
    });
    let letter = task.await.map_err(|error| Problem::internal(&error))?;
    let letter = letter.map_err(|e| Problem::ledger_change(&e))?;
    let letter = letter.ok_or_else(dead_letter_not_found)?;
    match letter.status {
        LetterStatus::Retried => Ok(json(StatusCode::OK, &DeadLetterView::from(letter))),
        LetterStatus::Discarded => Err(resolved(letter)),
        LetterStatus::Open => {
            let detail = format!("{}: {}", letter.reason, letter.detail);
            Err(with_letter(Problem::new(Code::DeadLetterNotApplicable, detail), letter))
        }
    }
}

/// Says that it need not be applied. Again is the same answer.
#[utoipa::path(
    post, path = "/v1/dead-letters/{dead_letter_id}/discard", operation_id = "discard_dead_letter", tag = "dead letters",
    params(("dead_letter_id" = String, Path)),
    request_body(content = Option<ResolveDeadLetter>, description = "May be left out"),
    responses(
        (status = 200, description = "Discarded, now or before", body = DeadLetterView),
        (status = 404, description = "dead-letter-not-found"),
        (status = 409, description = "discard-needs-rebuild: its lane waits for it; dead-letter-resolved: it was retried. Both with dead_letter"),
    ),
    security(("key" = []))
)]
pub async fn discard(
    State(api): State<Api>,
    OperatorCaller(caller): OperatorCaller,
    names: PathNames,
    OptionalJson(asked): OptionalJson<ResolveDeadLetter>,
) -> Answer {
    let _in_flight = api.enter()?;
    let deed = Deed { actor: caller.actor(), note: asked.note.map(Into::into) };
    let letter = api.ledger.discard_dead_letter(names.dead_letter_id()?, &deed).await;
    let letter =
        letter.map_err(|e| Problem::ledger_change(&e))?.ok_or_else(dead_letter_not_found)?;
    match letter.status {
        LetterStatus::Discarded => Ok(json(StatusCode::OK, &DeadLetterView::from(letter))),
        LetterStatus::Retried => Err(resolved(letter)),
        LetterStatus::Open => {
            let detail = "its lane waits for it: without it, what follows would wait for ever";
            Err(with_letter(Problem::new(Code::DiscardNeedsRebuild, detail), letter))
        }
    }
}

pub fn dead_letter_not_found() -> Problem {
    Problem::new(Code::DeadLetterNotFound, "no dead letter has this id")
}

fn resolved(letter: StoredLetter) -> Problem {
    let detail = format!("it is {} already", letter.status.as_str());
    with_letter(Problem::new(Code::DeadLetterResolved, detail), letter)
}

fn with_letter(problem: Problem, letter: StoredLetter) -> Problem {
    problem.with("dead_letter", DeadLetterView::from(letter))
}
