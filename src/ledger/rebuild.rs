//! What opening a lane anew takes of the database: the next epoch, where the seal found the lane, why
//! it may be in doubt, everything that a lane is folded from, and the reports of it all.

use std::collections::HashMap;

use chrono::{DateTime, Utc};
use sqlx::types::Json;
use sqlx::{Connection, PgConnection};

use super::adjustments::AdjustmentRow;
use super::books::Snapshot;
use super::row::{bigint, corrupt, datetime, lane_id, number, parse};
use super::{LaneLock, Ledger, LedgerError};
use crate::domain::event::RebuildToken;
use crate::domain::ids::{EntityKey, LaneId, OrderId};
use crate::domain::names::{KeyName, PaymentId, SaleId, Sku};
use crate::domain::order::{Line, RefundReason};
use crate::domain::sale::Definition;
use crate::domain::stock::{Adjustment, Counters};
use crate::domain::time::Timestamp;

/// What a lane is, beside its orders and adjustments, as of its last recorded event.
#[derive(Debug, Clone)]
pub struct RecordedLane {
    pub recorded: u64,
    /// The version of its definition; 0 and `None` where none is recorded.
    pub version: u64,
    pub definition: Option<Definition>,
    pub paused: bool,
    pub closed_at: Option<Timestamp>,
    pub archived: bool,
    /// It has had orders or adjustments.
    pub used: bool,
    /// When the latest of its events happened.
    pub latest: Option<Timestamp>,
    pub counters: Vec<(Sku, Counters)>,
}

/// What a lane remembers of an order for replays, beside the order itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Note {
    Refund { payment: PaymentId, reason: RefundReason },
    Return { key: EntityKey, restock: bool, lines: Vec<Line> },
}

/// How opening a lane anew ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// As it was: it had lost nothing.
    Opened,
    /// After it was written anew from the ledger.
    Rebuilt,
    /// It stays frozen until an operator decides.
    InDoubt,
    /// It stays frozen, and is tried again.
    Failed,
}

impl Outcome {
    const ALL: [Self; 4] = [Self::Opened, Self::Rebuilt, Self::InDoubt, Self::Failed];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Opened => "opened",
            Self::Rebuilt => "rebuilt",
            Self::InDoubt => "in-doubt",
            Self::Failed => "failed",
        }
    }

    fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|outcome| outcome.as_str() == word)
    }

    /// Whether the lane is sold from again.
    pub const fn is_open(self) -> bool {
        matches!(self, Self::Opened | Self::Rebuilt)
    }
}

/// One time that a lane was opened anew, or could not be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    pub lane: LaneId,
    pub epoch_before: u32,
    /// The epoch that was taken for it, where one was.
    pub epoch: Option<u32>,
    /// Why it was frozen, in a word; `missing` where Redis did not have it.
    pub why: String,
    pub actor: String,
    /// Where the lane in Redis stood; `None`: it was not there.
    pub seq_before: Option<u64>,
    /// Where it was opened.
    pub seq: Option<u64>,
    /// Orders that were answered and are nowhere, as far as a live instance remembers them,
    pub lost_orders: Vec<String>,
    /// ... and how many events at most are lost.
    pub lost_max: u64,
    pub outcome: Outcome,
    /// What is in doubt, or why it failed.
    pub detail: String,
    pub began_at: Timestamp,
    pub ended_at: Timestamp,
}

struct ReportRow {
    sale_id: String,
    lane: i16,
    epoch_before: i64,
    epoch: Option<i64>,
    why: String,
    actor: String,
    seq_before: Option<i64>,
    seq: Option<i64>,
    lost_orders: Vec<String>,
    lost_max: i64,
    outcome: String,
    detail: String,
    began_at: DateTime<Utc>,
    ended_at: DateTime<Utc>,
}

impl TryFrom<ReportRow> for Report {
    type Error = LedgerError;

    fn try_from(row: ReportRow) -> Result<Self, LedgerError> {
        let seq = |seq: Option<i64>| seq.map(|seq| number("seq", seq)).transpose();
        Ok(Self {
            lane: lane_id(&row.sale_id, row.lane)?,
            epoch_before: number("epoch", row.epoch_before)?,
            epoch: row.epoch.map(|epoch| number("epoch", epoch)).transpose()?,
            why: row.why,
            actor: row.actor,
            seq_before: seq(row.seq_before)?,
            seq: seq(row.seq)?,
            lost_orders: row.lost_orders,
            lost_max: number("count", row.lost_max)?,
            outcome: Outcome::from_word(&row.outcome)
                .ok_or_else(|| corrupt("rebuild's outcome", &row.outcome))?,
            detail: row.detail,
            began_at: row.began_at.into(),
            ended_at: row.ended_at.into(),
        })
    }
}

impl Ledger {
    /// Takes the right to open a lane anew; `None`: another process has it. As with
    /// [`Ledger::lock_for_reconciling`], the end of its connection gives it back.
    pub async fn lock_for_recovery(&self, lane: &LaneId) -> Result<Option<LaneLock>, LedgerError> {
        self.lock_lane("recover", lane).await
    }

    /// Takes the epoch after `epoch`, and the token that goes with it; `None` where it is taken.
    pub async fn take_epoch(
        &self,
        lane: &LaneId,
        epoch: u32,
        token: RebuildToken,
    ) -> Result<Option<u32>, LedgerError> {
        let taken = sqlx::query_scalar!(
            "UPDATE lanes SET epoch = epoch + 1, rebuild_token = $4
             WHERE sale_id = $1 AND lane = $2 AND epoch = $3 RETURNING epoch",
            lane.sale.as_str(),
            i16::from(lane.lane),
            i64::from(epoch),
            token.number()
        )
        .fetch_optional(&self.pool)
        .await?;
        taken.map(|epoch| number("epoch", epoch)).transpose()
    }

    /// Why nobody but an operator may say what became of a lane, a sentence each: events that it
    /// lacks or could not apply, and, where they count, differences that were found before. That a lane
    /// is behind what is recorded of it is no doubt: its rebuild is what cures it.
    pub async fn doubts(
        &self,
        lane: &LaneId,
        differences_count: bool,
    ) -> Result<Vec<String>, LedgerError> {
        let (sale, lane) = (lane.sale.as_str(), i16::from(lane.lane));
        let row = sqlx::query!(
            r#"SELECT l.recorded,
                 (SELECT count(*) FROM parked p WHERE p.sale_id = $1 AND p.lane = $2) AS "parked!",
                 (SELECT count(*) FROM dead_letters d WHERE d.sale_id = $1 AND d.lane = $2
                    AND d.status = 'open' AND d.seq > l.recorded
                    -- Of an epoch that was ended it can only be discarded.
                    AND d.epoch >= l.sealed_epoch) AS "ahead!",
                 (SELECT count(*) FROM dead_letters d WHERE d.sale_id = $1 AND d.lane = $2
                    AND d.status = 'open' AND d.reason = 'fork') AS "forks!",
                 (SELECT count(*) FROM reconciliations r WHERE r.sale_id = $1 AND r.lane = $2
                    AND $3 AND r.ended_at IS NULL AND r.what <> 'lane-behind') AS "differences!"
             FROM lanes l WHERE l.sale_id = $1 AND l.lane = $2"#,
            sale,
            lane,
            differences_count
        )
        .fetch_one(&self.pool)
        .await?;
        let next = row.recorded + 1;
        let doubts = [
            (row.parked, format!("records are parked, since event {next} is missing")),
            (row.ahead, format!("dead letters are open from event {next} on")),
            (row.forks, "forks are open among the dead letters".to_owned()),
            (row.differences, "differences are open in reconciliations".to_owned()),
        ];
        let there = doubts.into_iter().filter(|(count, _)| *count > 0);
        Ok(there.map(|(count, what)| format!("{count} {what}")).collect())
    }

    /// Writes a report; one that only says again what the lane's last one said is left out.
    pub async fn report_rebuild(&self, report: &Report) -> Result<(), LedgerError> {
        let seq = |seq: Option<u64>| seq.map(bigint);
        let (sale, lane) = (report.lane.sale.as_str(), i16::from(report.lane.lane));
        sqlx::query!(
            "INSERT INTO rebuilds (sale_id, lane, epoch_before, epoch, why, actor, seq_before, seq,
               lost_orders, lost_max, outcome, detail, began_at, ended_at)
             SELECT $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14
             WHERE $11 IN ('opened', 'rebuilt') OR NOT EXISTS (
               SELECT FROM rebuilds r
               WHERE r.id = (SELECT max(id) FROM rebuilds WHERE sale_id = $1 AND lane = $2)
                 AND (r.outcome, r.detail, r.why, r.actor) = ($11, $12, $5, $6)
             )",
            sale,
            lane,
            i64::from(report.epoch_before),
            report.epoch.map(i64::from),
            report.why,
            report.actor,
            seq(report.seq_before),
            seq(report.seq),
            &report.lost_orders,
            bigint(report.lost_max),
            report.outcome.as_str(),
            report.detail.replace('\0', "\u{FFFD}"),
            datetime(report.began_at),
            datetime(report.ended_at)
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Reports, newest first, of one sale or of all.
    pub async fn rebuilds(
        &self,
        sale: Option<&SaleId>,
        limit: u32,
    ) -> Result<Vec<Report>, LedgerError> {
        let rows = sqlx::query_as!(
            ReportRow,
            "SELECT sale_id, lane, epoch_before, epoch, why, actor, seq_before, seq, lost_orders,
               lost_max, outcome, detail, began_at, ended_at
             FROM rebuilds WHERE $1::text IS NULL OR sale_id = $1 ORDER BY id DESC LIMIT $2",
            sale.map(SaleId::as_str),
            i64::from(limit)
        )
        .fetch_all(&self.pool)
        .await?;
        rows.into_iter().map(TryInto::try_into).collect()
    }

    /// Which differences of a lane are open: what, and of whom.
    pub async fn differences_of(
        &self,
        lane: &LaneId,
    ) -> Result<Vec<(String, String, String)>, LedgerError> {
        let rows = sqlx::query!(
            "SELECT what, subject, detail FROM reconciliations
             WHERE sale_id = $1 AND lane = $2 AND ended_at IS NULL ORDER BY what, subject",
            lane.sale.as_str(),
            i16::from(lane.lane)
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(rows.into_iter().map(|row| (row.what, row.subject, row.detail)).collect())
    }

    /// Takes a lane for one purpose, for as long as the connection lasts and gives signs of life.
    pub(super) async fn lock_lane(
        &self,
        purpose: &str,
        lane: &LaneId,
    ) -> Result<Option<LaneLock>, LedgerError> {
        let still_max = LaneLock::STILL_MAX.as_millis().to_string();
        let options = self.options.clone().options([("idle_session_timeout", still_max)]);
        let mut connection = PgConnection::connect_with(&options).await?;
        let name = format!("holdfast {purpose} {} {lane}", self.schema);
        let locked = sqlx::query_scalar!(
            r#"SELECT pg_try_advisory_lock(hashtextextended($1, 0)) AS "locked!""#,
            name
        )
        .fetch_one(&mut connection)
        .await?;
        if locked {
            return Ok(Some(LaneLock::new(connection)));
        }
        connection.close().await?;
        Ok(None)
    }
}

impl Snapshot {
    /// Lets the look last: reading all of a large lane takes longer than a request's statement may.
    pub async fn lasting(&mut self) -> Result<(), LedgerError> {
        sqlx::query!("SELECT set_config('statement_timeout', '0', true)")
            .fetch_one(&mut *self.transaction)
            .await?;
        Ok(())
    }

    /// What the lane is, beside its orders and adjustments.
    pub async fn recorded_lane(&mut self) -> Result<RecordedLane, LedgerError> {
        let (sale, lane) = (self.lane.sale.to_string(), i16::from(self.lane.lane));
        let row = sqlx::query!(
            r#"SELECT l.recorded, l.version, d.definition AS "definition?: Json<Definition>"
             FROM lanes l
             LEFT JOIN sale_definitions d ON d.sale_id = l.sale_id AND d.version = l.version
             WHERE l.sale_id = $1 AND l.lane = $2"#,
            sale,
            lane
        )
        .fetch_optional(&mut *self.transaction)
        .await?;
        let row = row.ok_or_else(|| corrupt("lane", "its row is gone"))?;
        if row.version > 0 && row.definition.is_none() {
            return Err(corrupt("definition", format_args!("version {} is gone", row.version)));
        }
        let told = sqlx::query!(
            r#"SELECT max(at) AS latest,
                 max(seq) FILTER (WHERE event = 'holdfast.sale.paused') AS paused,
                 max(seq) FILTER (WHERE event = 'holdfast.sale.resumed') AS resumed,
                 min(at) FILTER (WHERE event = 'holdfast.sale.closed') AS closed_at,
                 coalesce(bool_or(event = 'holdfast.sale.archived'), false) AS "archived!",
                 coalesce(bool_or(order_id IS NOT NULL OR adjustment_id IS NOT NULL), false) AS "used!"
             FROM ledger WHERE sale_id = $1 AND lane = $2"#,
            sale,
            lane
        )
        .fetch_one(&mut *self.transaction)
        .await?;
        Ok(RecordedLane {
            recorded: number("recorded mark", row.recorded)?,
            version: number("version", row.version)?,
            definition: row.definition.map(|definition| definition.0),
            paused: told.paused > told.resumed,
            closed_at: told.closed_at.map(Into::into),
            archived: told.archived,
            used: told.used,
            latest: told.latest.map(Into::into),
            counters: self.counters().await?,
        })
    }

    async fn counters(&mut self) -> Result<Vec<(Sku, Counters)>, LedgerError> {
        let rows = sqlx::query!(
            "SELECT sku, available, held, sold, version FROM counters
             WHERE sale_id = $1 AND lane = $2",
            self.lane.sale.as_str(),
            i16::from(self.lane.lane)
        )
        .fetch_all(&mut *self.transaction)
        .await?;
        rows.into_iter()
            .map(|row| {
                let counters = Counters {
                    available: row.available,
                    held: row.held,
                    sold: row.sold,
                    version: row.version,
                };
                Ok((parse("SKU", &row.sku)?, counters))
            })
            .collect()
    }

    /// What the lane remembers of orders beside the orders themselves, oldest first.
    pub async fn notes(&mut self) -> Result<HashMap<EntityKey, Vec<Note>>, LedgerError> {
        let (sale, lane) = (self.lane.sale.to_string(), i16::from(self.lane.lane));
        let mut notes: HashMap<EntityKey, Vec<Note>> = HashMap::new();
        let refunds = sqlx::query!(
            "SELECT order_id, payment_id, reason FROM refunds WHERE sale_id = $1 ORDER BY created_at",
            sale
        )
        .fetch_all(&mut *self.transaction)
        .await?;
        for row in refunds {
            let order: OrderId = parse("order id", &row.order_id)?;
            if *order.lane() != self.lane {
                continue;
            }
            let payment = parse("payment id", &row.payment_id)?;
            let reason = RefundReason::from_word(&row.reason)
                .ok_or_else(|| corrupt("refund reason", &row.reason))?;
            notes.entry(order.key()).or_default().push(Note::Refund { payment, reason });
        }
        let returns = sqlx::query!(
            r#"SELECT order_id, key, restock, lines AS "lines: Json<Vec<Line>>"
             FROM returns WHERE sale_id = $1 AND lane = $2 ORDER BY seq"#,
            sale,
            lane
        )
        .fetch_all(&mut *self.transaction)
        .await?;
        for row in returns {
            let order: OrderId = parse("order id", &row.order_id)?;
            let key = EntityKey::decode(&row.key).ok_or_else(|| corrupt("return key", &row.key))?;
            let (restock, lines) = (row.restock, row.lines.0);
            notes.entry(order.key()).or_default().push(Note::Return { key, restock, lines });
        }
        Ok(notes)
    }

    /// The lane's adjustments, each with what undid it.
    pub async fn adjustments(&mut self) -> Result<Vec<Adjustment>, LedgerError> {
        let rows = sqlx::query_as!(
            AdjustmentRow,
            r#"SELECT a.id, a.sku, a.delta, a.set_total, a.before_available, a.before_held,
               a.before_sold, a.before_version, a.reason, a.reference, a.note, a.actor, a.created_at,
               a.seq, a.undoes, u.id AS "undone_by?"
             FROM adjustments a LEFT JOIN adjustments u ON u.undoes = a.id
             WHERE a.sale_id = $1 AND a.lane = $2"#,
            self.lane.sale.as_str(),
            i16::from(self.lane.lane)
        )
        .fetch_all(&mut *self.transaction)
        .await?;
        rows.into_iter().map(TryInto::try_into).collect()
    }
}

impl Report {
    /// One that has just begun.
    pub fn begin(lane: &LaneId, epoch_before: u32, actor: &KeyName) -> Self {
        let now = Utc::now().into();
        Self {
            lane: lane.clone(),
            epoch_before,
            epoch: None,
            why: String::new(),
            actor: actor.to_string(),
            seq_before: None,
            seq: None,
            lost_orders: Vec::new(),
            lost_max: 0,
            outcome: Outcome::Failed,
            detail: String::new(),
            began_at: now,
            ended_at: now,
        }
    }
}
