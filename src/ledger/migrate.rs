//! Bringing the schema up to date.

use sqlx::migrate::{MigrateError, Migrator};
use sqlx::{Connection, PgConnection};

use super::{Ledger, LedgerError};

/// How long an instance waits for another one that is migrating the same schema.
const LOCK_WAIT_MAX: &str = "60s";

fn migrator() -> Migrator {
    let mut migrator = sqlx::migrate!();
    // Our own lock below is per schema: sqlx's is per database, and would make unrelated schemas
    // wait for each other.
    migrator.set_locking(false);
    // During an upgrade the older version starts on what the newer one has already migrated.
    migrator.set_ignore_missing(true);
    migrator
}

impl Ledger {
    /// Creates the schema if there is none, applies the migrations that are missing, and makes the
    /// first secret for ids. Several instances may call it at once.
    ///
    /// # Errors
    /// [`LedgerError::Unavailable`] can be retried; anything else cannot.
    pub async fn migrate(&self) -> Result<(), LedgerError> {
        // A connection of its own: a migration may take longer than any other statement may, and
        // ending the session gives up the lock whatever happens.
        let options = self
            .options
            .clone()
            .options([("statement_timeout", "0"), ("lock_timeout", LOCK_WAIT_MAX)]);
        let mut connection = PgConnection::connect_with(&options).await?;
        let outcome = self.migrate_with(&mut connection).await;
        // The outcome is what matters; a connection that cannot say goodbye is gone all the same.
        connection.close().await.ok();
        outcome
    }

    async fn migrate_with(&self, connection: &mut PgConnection) -> Result<(), LedgerError> {
        let name = format!("holdfast migrate {}", self.schema);
        sqlx::query!("SELECT pg_advisory_lock(hashtextextended($1, 0))", name)
            .execute(&mut *connection)
            .await?;
        let create = format!("CREATE SCHEMA IF NOT EXISTS \"{}\"", self.schema);
        // The name was checked when the handle was made: it consists of word characters.
        sqlx::raw_sql(sqlx::AssertSqlSafe(create)).execute(&mut *connection).await?;
        // Not `run`: its bound on `Acquire` keeps the future from being spawned.
        migrator().run_direct(None, connection, false).await.map_err(|error| match error {
            MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => error.into(),
            error => LedgerError::Migrate(error),
        })?;
        let secret: [u8; 32] = rand::random();
        sqlx::query!(
            "INSERT INTO id_secrets (version, secret)
             SELECT 1, $1 WHERE NOT EXISTS (SELECT FROM id_secrets)",
            &secret[..]
        )
        .execute(connection)
        .await?;
        Ok(())
    }
}
