//! `holdfast keys`: API keys, made, listed and revoked.

use anyhow::bail;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest, Sha256};

use crate::config::Config;
use crate::domain::names::KeyName;
use crate::ledger::{Ledger, Scope};

/// What every key begins with, so that a leaked one is recognised by scanners.
const PREFIX: &str = "hf_";

/// Makes a key of 256 random bits and prints it. Only its SHA-256 is stored.
pub async fn create(config: &Config, name: &KeyName, scope: Scope) -> anyhow::Result<()> {
    let key = format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(rand::random::<[u8; 32]>()));
    let sha256 = Sha256::digest(&key).into();
    let made = Ledger::new(&config.database)?.insert_key(name, scope, &sha256).await?;
    eprintln!("Key {} ({name}, {}): it is shown only now.", made.id, scope.as_str());
    println!("{key}");
    Ok(())
}

/// Lists all keys, revoked ones too, but never the keys themselves.
pub async fn list(config: &Config) -> anyhow::Result<()> {
    for key in Ledger::new(&config.database)?.list_keys().await? {
        let state = key.revoked_at.map_or("active".to_owned(), |at| format!("revoked {at}"));
        println!("{}\t{}\t{}\t{}\t{state}", key.id, key.name, key.scope.as_str(), key.created_at);
    }
    Ok(())
}

/// Revokes the key of this id, or all of this name.
pub async fn revoke(config: &Config, id_or_name: &str) -> anyhow::Result<()> {
    let revoked = Ledger::new(&config.database)?.revoke_keys(id_or_name).await?;
    if revoked == 0 {
        bail!("no active key has the id or name {id_or_name}");
    }
    eprintln!("{revoked} revoked; refused everywhere within {} ms.", config.catalog.refresh_ms);
    Ok(())
}
