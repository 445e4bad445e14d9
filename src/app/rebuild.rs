//! `holdfast rebuild` and `holdfast rebuilds`: lanes opened anew, for whoever has the servers but not
//! the API.

use std::time::Duration;

use anyhow::{Context, bail};
use tokio::runtime::Handle;
use tokio::time::{Instant, sleep};

use super::{COMMAND_LINE, Service};
use crate::config::Config;
use crate::domain::ids::LaneId;
use crate::domain::names::{KeyName, SaleId};
use crate::ledger::{Ledger, Report};
use crate::reconciler::rebuild::{Despite, RecoveryError, Wish};

/// How long a lane is waited for that another process recovers, and how often it is looked: one that has just
/// been opened still belongs to who did it while the report is written.
const BUSY_MAX: Duration = Duration::from_secs(10);
const BUSY_PAUSE: Duration = Duration::from_millis(100);

/// Rebuilds the lanes of a sale from the ledger, or one of them, and prints a report each.
///
/// # Errors
/// The first lane that is not open after it, and why.
pub async fn rebuild(
    config: Config,
    sale: SaleId,
    lane: Option<u8>,
    force: bool,
) -> anyhow::Result<()> {
    let service = Service::new(config, &[], Handle::current())?;
    let known = service.ledger.sale(&sale).await?.context("there is no such sale")?;
    service.catalog.refresh().await?;
    let actor: KeyName = COMMAND_LINE.parse()?;
    let despite = if force { Despite::Everything } else { Despite::Nothing };
    let wish = Wish { actor, rebuild: true, despite };
    let lanes: Vec<LaneId> =
        known.lane_ids().filter(|known| lane.is_none_or(|lane| known.lane == lane)).collect();
    if lanes.is_empty() {
        bail!("the sale has no such lane");
    }
    for lane in lanes {
        let give_up = Instant::now() + BUSY_MAX;
        let report = loop {
            match service.recovery.recover(&lane, &wish).await {
                Err(RecoveryError::Busy) if Instant::now() < give_up => sleep(BUSY_PAUSE).await,
                recovered => break recovered.with_context(|| lane.to_string())?,
            }
        };
        let report = report.context("the sale is archived: it has left Redis for good")?;
        println!("{}", line(&report));
        if !report.outcome.is_open() {
            bail!("{lane} is in doubt: {}. --force gives up what the ledger lacks", report.detail);
        }
    }
    Ok(())
}

/// Lists reports, newest first, a line each.
pub async fn list(config: &Config, sale: Option<SaleId>, limit: u32) -> anyhow::Result<()> {
    for report in Ledger::new(&config.database)?.rebuilds(sale.as_ref(), limit).await? {
        println!("{}", line(&report));
    }
    Ok(())
}

fn line(report: &Report) -> String {
    let Report { lane, epoch_before, why, actor, lost_orders, lost_max, detail, .. } = report;
    let (began, outcome) = (report.began_at, report.outcome.as_str());
    let number = |number: Option<u64>| number.map_or("-".to_owned(), |number| number.to_string());
    let epoch = number(report.epoch.map(u64::from));
    let (before, after) = (number(report.seq_before), number(report.seq));
    let lost = match lost_max {
        0 => "nothing lost".to_owned(),
        max => format!("at most {max} events lost, of orders: {}", lost_orders.join(" ")),
    };
    let detail = detail.replace(char::is_control, " ");
    format!(
        "{began}\t{lane}\t{outcome}\t{why}\t{actor}\tepoch {epoch_before} to {epoch}\tseq {before} to {after}\t{lost}\t{detail}"
    )
}
