//! The database side: every SQL statement of the service, a file a table family. Queries are
//! checked against the schema at compile time (`.sqlx/`).

mod adjustments;
mod batch;
mod books;
pub mod catalog;
mod counters;
mod dead_letters;
mod history;
mod keys;
mod lanes;
mod migrate;
mod orders;
mod parked;
mod rebuild;
mod reconciliations;
mod refunds;
mod row;
mod sales;
mod witnesses;

use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{Connection as _, PgPool};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::config::{Database, millis};

pub use adjustments::AdjustmentCursor;
pub use batch::{Applied, ApplyError, Batch, LaneMove};
pub use books::{Figures, RecordedMove, SkuFigures, Snapshot};
pub use catalog::Catalog;
pub use dead_letters::{DeadLetter, DeadReason, Deed, LetterStatus, Place, StoredLetter};
pub use keys::{ApiKey, Scope};
pub use lanes::{LaneMark, RecordedEvent};
pub use orders::{OrderCursor, OrderFilter};
pub use parked::{Parked, ParkedKey, StoredRecord};
pub use rebuild::{Note, Outcome, RecordedLane, Report};
pub use reconciliations::{Difference, LaneLock};
pub use refunds::{Refund, RefundCursor, RefundFilter};
pub use sales::{Sale, SaleLane, SaleLock, digest};
pub use witnesses::{Asked, Testimonies};

/// Longest that an open transaction may sit idle before the database ends it: a definition that
/// waits for a lane which never answers must not hold its lock for ever.
const IDLE_IN_TRANSACTION_MAX: &str = "60s";
/// A connection that rested for longer is asked whether it still answers before it is used.
const FRESH: Duration = Duration::from_secs(1);
/// A schema name is put into SQL and connection options, so it is kept to what needs no escape.
const SCHEMA_CHARS_MAX: usize = 63;
/// Of a call's statements, how many may run into their time-out before the call is given up.
const STATEMENTS_AT_THEIR_WORST: u32 = 3;

/// What the database could not answer.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// Away, too slow, or busy: the same call can succeed later. http answers `unavailable`.
    #[error("the database is not available: {0}")]
    Unavailable(String),
    /// The data breaks a rule of the schema; the same call fails for ever.
    #[error("the database refuses the data: {0}")]
    Refused(#[source] sqlx::Error),
    /// A wrong schema, a missing right: somebody has to look.
    #[error("the database cannot do this: {0}")]
    Broken(#[source] sqlx::Error),
    #[error("a stored {what} cannot be read: {detail}")]
    Corrupt { what: &'static str, detail: String },
    #[error("{0}")]
    Config(String),
    #[error("migrating the database: {0}")]
    Migrate(#[source] sqlx::migrate::MigrateError),
}

impl From<sqlx::Error> for LedgerError {
    fn from(error: sqlx::Error) -> Self {
        use sqlx::Error;
        let code = match &error {
            Error::Database(database) => database.code(),
            Error::Io(_)
            | Error::Tls(_)
            | Error::Protocol(_)
            | Error::PoolTimedOut
            | Error::PoolClosed
            | Error::WorkerCrashed
            | Error::BeginFailed => return Self::Unavailable(error.to_string()),
            _ => return Self::Broken(error),
        };
        // SQLSTATE classes: https://www.postgresql.org/docs/current/errcodes-appendix.html
        match code.as_deref().and_then(|code| code.get(..2)) {
            // Connection, read-only after a fail-over, login (rotated), no such database (yet),
            // deadlock, resources, locks, cancelled or shut down, the system's own.
            Some("08" | "25" | "28" | "3D" | "40" | "53" | "55" | "57" | "58") => {
                Self::Unavailable(error.to_string())
            }
            // Data exception, integrity constraint violation.
            Some("22" | "23") => Self::Refused(error),
            _ => Self::Broken(error),
        }
    }
}

/// One page of a list, newest first, and where the next one begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page<T, C> {
    pub items: Vec<T>,
    /// `None` on the last page.
    pub next: Option<C>,
}

impl<T, C> Page<T, C> {
    /// Makes a page of `limit` out of a result that was asked for one row more.
    fn cut(mut items: Vec<T>, limit: u32, cursor: impl Fn(&T) -> C) -> Self {
        let limit = limit as usize;
        let next = (items.len() > limit).then(|| cursor(&items[limit - 1]));
        items.truncate(limit);
        Self { items, next }
    }
}

/// The handle on the database; clones share one pool. Connections are made when they are needed,
/// so an unreachable database is an error of each call and never of the start.
///
/// A call that opens a transaction must not be dropped half-way (sqlx can lose the connection),
/// unless it hangs: http spawns those.
#[derive(Debug, Clone)]
pub struct Ledger {
    pool: PgPool,
    options: PgConnectOptions,
    schema: String,
    /// See [`Ledger::within_patience`].
    patience: Duration,
    /// Definitions hold a connection while their lane is asked: at most a quarter of the pool.
    definitions: Arc<Semaphore>,
    /// Looks at a lane's whole books are long: at most a quarter as well.
    snapshots: Arc<Semaphore>,
}

impl Ledger {
    /// Prepares the pool; connects nowhere yet.
    ///
    /// # Errors
    /// [`LedgerError::Config`], naming the setting.
    pub fn new(config: &Database) -> Result<Self, LedgerError> {
        check_schema(&config.schema)?;
        let options = PgConnectOptions::from_str(&config.url)
            .map_err(|e| LedgerError::Config(format!("database.url: {e}")))?
            .application_name("holdfast")
            .options([
                ("search_path", format!("\"{}\"", config.schema)),
                ("statement_timeout", format!("{}ms", config.statement_timeout_ms)),
                ("idle_in_transaction_session_timeout", IDLE_IN_TRANSACTION_MAX.to_owned()),
            ]);
        let pool = PgPoolOptions::new()
            .max_connections(config.connections_max)
            .acquire_timeout(millis(config.acquire_timeout_ms))
            // One that has just been given back has answered then; to ask it each time is a round trip
            // more in every call.
            .test_before_acquire(false)
            .before_acquire(|connection, idle| {
                Box::pin(async move {
                    if idle.idle_for > FRESH {
                        connection.ping().await?;
                    }
                    Ok(true)
                })
            })
            .connect_lazy_with(options.clone());
        let quarter = || Arc::new(Semaphore::new((config.connections_max / 4).max(1) as usize));
        Ok(Self {
            pool,
            options,
            schema: config.schema.clone(),
            patience: millis(config.acquire_timeout_ms)
                + STATEMENTS_AT_THEIR_WORST * millis(config.statement_timeout_ms),
            definitions: quarter(),
            snapshots: quarter(),
        })
    }

    /// Gives up on a call that is not answered at all: a server that vanished without a word would
    /// hold it until TCP gives up, a quarter of an hour later. One that is merely slow ends its
    /// statements itself before that.
    pub async fn within_patience<T, E: From<LedgerError>>(
        &self,
        call: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        match timeout(self.patience, call).await {
            Ok(outcome) => outcome,
            Err(_) => Err(LedgerError::Unavailable("no answer".to_owned()).into()),
        }
    }

    /// Asks whether the database answers, for readiness.
    pub async fn ping(&self) -> Result<(), LedgerError> {
        sqlx::query!("SELECT 1 AS one").fetch_one(&self.pool).await?;
        Ok(())
    }

    /// The server's version, for the line at start that says what was connected to.
    pub async fn server_version(&self) -> Result<String, LedgerError> {
        Ok(sqlx::query_scalar!(r#"SELECT current_setting('server_version') AS "version!""#)
            .fetch_one(&self.pool)
            .await?)
    }

    /// Ends all connections, once whoever uses them is done.
    pub async fn close(&self) {
        self.pool.close().await;
    }
}

fn check_schema(schema: &str) -> Result<(), LedgerError> {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let starts_well = schema.bytes().next().is_some_and(|b| word(b) && !b.is_ascii_digit());
    if starts_well && schema.bytes().all(word) && schema.len() <= SCHEMA_CHARS_MAX {
        return Ok(());
    }
    Err(LedgerError::Config(format!(
        "database.schema = {schema:?} is impossible: 1 to {SCHEMA_CHARS_MAX} of A-Z a-z 0-9 _, no digit first"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_schema_name_cannot_break_out_of_its_quotes() {
        for schema in ["", "1st", "a b", "a\"b", "a;b", &"s".repeat(64)] {
            assert!(check_schema(schema).is_err(), "{schema:?}");
        }
        assert!(check_schema("holdfast_test_7").is_ok());
    }

    #[test]
    fn a_page_names_the_next_only_where_there_is_one() {
        let page = Page::cut(vec![5, 4, 3], 2, |n| *n);
        assert_eq!(page, Page { items: vec![5, 4], next: Some(4) });
        assert_eq!(Page::cut(vec![5, 4], 2, |n| *n).next, None);
    }
}
