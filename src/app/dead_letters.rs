//! `holdfast dead-letters`: what the writer could not apply, for whoever has the database but not
//! the API.

use anyhow::{Context, bail};

use crate::config::Config;
use crate::domain::names::KeyName;
use crate::http::DeadLetterView;
use crate::ledger::{Deed, Ledger, LetterStatus, StoredLetter};
use crate::writer;

/// Lists dead letters, newest first, a line each.
pub async fn list(config: &Config, status: Option<LetterStatus>, limit: u32) -> anyhow::Result<()> {
    let page = Ledger::new(&config.database)?.list_dead_letters(status, None, limit).await?;
    for letter in &page.items {
        println!("{}", line(letter));
    }
    if page.next.is_some() {
        eprintln!("There are older ones: --limit shows more.");
    }
    Ok(())
}

/// Prints a dead letter as the API shows it.
pub async fn show(config: &Config, id: i64) -> anyhow::Result<()> {
    let letter = Ledger::new(&config.database)?.dead_letter(id).await?;
    let letter = DeadLetterView::from(letter.with_context(|| no_such(id))?);
    println!("{}", serde_json::to_string_pretty(&letter)?);
    Ok(())
}

/// Applies dead letters, in this order, and what was parked behind each.
///
/// # Errors
/// The first that still cannot be applied, and why.
pub async fn retry(config: &Config, ids: &[i64], note: Option<String>) -> anyhow::Result<()> {
    let ledger = Ledger::new(&config.database)?;
    let deed = deed(note)?;
    for &id in ids {
        let letter = writer::retry(&ledger, id, &deed).await?.with_context(|| no_such(id))?;
        println!("{}", line(&letter));
        match letter.status {
            LetterStatus::Retried => {}
            LetterStatus::Discarded => bail!("dead letter {id} is discarded"),
            LetterStatus::Open => bail!("dead letter {id} still cannot be applied"),
        }
    }
    Ok(())
}

/// Says of a dead letter that it need not be applied.
///
/// # Errors
/// Where its lane waits for it.
pub async fn discard(config: &Config, id: i64, note: Option<String>) -> anyhow::Result<()> {
    let ledger = Ledger::new(&config.database)?;
    let letter = ledger.discard_dead_letter(id, &deed(note)?).await?;
    let letter = letter.with_context(|| no_such(id))?;
    println!("{}", line(&letter));
    match letter.status {
        LetterStatus::Discarded => Ok(()),
        LetterStatus::Retried => bail!("dead letter {id} is retried"),
        LetterStatus::Open => bail!("its lane waits for dead letter {id}: that needs a rebuild"),
    }
}

fn deed(note: Option<String>) -> anyhow::Result<Deed> {
    let actor: KeyName = super::COMMAND_LINE.parse()?;
    Ok(Deed { actor, note })
}

fn no_such(id: i64) -> String {
    format!("there is no dead letter {id}")
}

fn line(letter: &StoredLetter) -> String {
    let place = letter.place.as_ref();
    let place = place.map_or("-".to_owned(), |at| format!("{}/{}-{}", at.lane, at.epoch, at.seq));
    let StoredLetter { id, created_at, reason, detail, .. } = letter;
    let status = letter.status.as_str();
    let blocks = if letter.blocks_lane { "blocks its lane" } else { "-" };
    // One line each, whatever the record made the detail say.
    let detail = detail.replace(char::is_control, " ");
    format!("{id}\t{created_at}\t{status}\t{place}\t{blocks}\t{reason}\t{detail}")
}
