//! API keys and the secrets behind ids.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::{DateTime, Utc};

use super::row::{bytes32, number, parse};
use super::{Ledger, LedgerError};
use crate::domain::ids::IdSecret;
use crate::domain::names::KeyName;
use crate::domain::time::Timestamp;

/// What a key may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scope {
    /// Place and settle orders for any buyer.
    Orders,
    /// All that `orders` may, and sales, stock and adjustments.
    Operator,
}

impl Scope {
    pub const fn as_str(self) -> &'static str {
        match self {
            Scope::Orders => "orders",
            Scope::Operator => "operator",
        }
    }
}

impl std::str::FromStr for Scope {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        [Scope::Orders, Scope::Operator]
            .into_iter()
            .find(|scope| scope.as_str() == word)
            .ok_or_else(|| "must be orders or operator".to_owned())
    }
}

/// A caller's key. What the caller holds is not stored, only its SHA-256.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiKey {
    pub id: String,
    pub name: KeyName,
    pub scope: Scope,
    pub sha256: [u8; 32],
    pub created_at: Timestamp,
    pub revoked_at: Option<Timestamp>,
}

struct KeyRow {
    id: String,
    name: String,
    scope: String,
    sha256: Vec<u8>,
    created_at: DateTime<Utc>,
    revoked_at: Option<DateTime<Utc>>,
}

impl TryFrom<KeyRow> for ApiKey {
    type Error = LedgerError;

    fn try_from(row: KeyRow) -> Result<Self, LedgerError> {
        Ok(Self {
            name: parse("key name", &row.name)?,
            scope: parse("key scope", &row.scope)?,
            sha256: bytes32("key hash", row.sha256)?,
            created_at: row.created_at.into(),
            revoked_at: row.revoked_at.map(Into::into),
            id: row.id,
        })
    }
}

impl Ledger {
    /// Stores a new key under a new id.
    ///
    /// # Errors
    /// [`LedgerError::Refused`] if this very key is there already.
    pub async fn insert_key(
        &self,
        name: &KeyName,
        scope: Scope,
        sha256: &[u8; 32],
    ) -> Result<ApiKey, LedgerError> {
        let id = format!("key_{}", URL_SAFE_NO_PAD.encode(rand::random::<[u8; 9]>()));
        let row = sqlx::query_as!(
            KeyRow,
            "INSERT INTO api_keys (id, name, scope, sha256) VALUES ($1, $2, $3, $4)
             RETURNING id, name, scope, sha256, created_at, revoked_at",
            id,
            name.as_str(),
            scope.as_str(),
            &sha256[..]
        )
        .fetch_one(&self.pool)
        .await?;
        row.try_into()
    }

    /// Revokes the key of that id, or every key of that name; says how many that were.
    pub async fn revoke_keys(&self, id_or_name: &str) -> Result<u64, LedgerError> {
        let done = sqlx::query!(
            "UPDATE api_keys SET revoked_at = now()
             WHERE (id = $1 OR name = $1) AND revoked_at IS NULL",
            id_or_name
        )
        .execute(&self.pool)
        .await?;
        Ok(done.rows_affected())
    }

    /// Every key that there ever was, newest first.
    pub async fn list_keys(&self) -> Result<Vec<ApiKey>, LedgerError> {
        let rows = sqlx::query_as!(
            KeyRow,
            "SELECT id, name, scope, sha256, created_at, revoked_at
             FROM api_keys ORDER BY created_at DESC, id DESC"
        )
        .fetch_all(&self.pool)
        .await?;
        rows.into_iter().map(TryInto::try_into).collect()
    }

    /// The keys that are good now.
    pub async fn active_keys(&self) -> Result<Vec<ApiKey>, LedgerError> {
        let rows = sqlx::query_as!(
            KeyRow,
            "SELECT id, name, scope, sha256, created_at, revoked_at
             FROM api_keys WHERE revoked_at IS NULL"
        )
        .fetch_all(&self.pool)
        .await?;
        rows.into_iter().map(TryInto::try_into).collect()
    }

    /// Every secret that an id may have been made with, oldest first; new ids use the last.
    pub async fn id_secrets(&self) -> Result<Vec<IdSecret>, LedgerError> {
        let rows = sqlx::query!("SELECT version, secret FROM id_secrets ORDER BY version")
            .fetch_all(&self.pool)
            .await?;
        rows.into_iter()
            .map(|row| {
                let version = number("secret version", row.version)?;
                Ok(IdSecret::new(version, &bytes32("secret", row.secret)?))
            })
            .collect()
    }
}
