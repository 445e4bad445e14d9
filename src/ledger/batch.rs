//! The writer's batch: everything that some events mean, in one transaction behind the lanes'
//! marks. Columns travel as arrays (`UNNEST`), one statement a table.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use futures_util::future::join;
use sqlx::PgConnection;
use sqlx::types::Json;

use super::dead_letters::{DeadLetter, Deed, bury, close_retried};
use super::lanes::columns;
use super::parked::{Parked, ParkedKey, bury_parked, park, unpark};
use super::refunds::insert_refund;
use super::row::{bigint, datetime};
use super::sales::set_definition;
use super::{Ledger, LedgerError};
use crate::domain::event::{Body, Event, OrderStep, SaleStep, Step};
use crate::domain::ids::LaneId;
use crate::domain::names::Sku;
use crate::domain::order::Order;
use crate::domain::stock::{Adjustment, Change};
use crate::failpoint;

/// How a batch moves one lane's mark. It does so only from `expected` and while `epoch` is open: this is
/// what keeps two writers, or one that was taken for dead, from applying anything twice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaneMove {
    pub lane: LaneId,
    pub epoch: u32,
    pub expected: u64,
    /// The same as `expected` for a lane of which the batch only parks.
    pub recorded: u64,
    /// The epoch that begins here; what is parked of older ones becomes dead letters.
    pub seal: Option<u32>,
}

/// What one transaction writes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// Each lane of `events` and `park`, once.
    pub moves: Vec<LaneMove>,
    /// In order of their seq within each lane, without a gap.
    pub events: Vec<Event>,
    pub park: Vec<Parked>,
    pub unpark: Vec<ParkedKey>,
    pub dead: Vec<DeadLetter>,
}

impl Batch {
    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.moves.is_empty() && self.unpark.is_empty() && self.dead.is_empty()
    }
}

/// What a batch did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Applied {
    /// Rows of orders, ledger and adjustments.
    pub rows: u64,
    pub parked: u64,
    pub dead: u64,
    /// Whether records are parked whose turn has come now.
    pub ready: bool,
}

/// Why a batch was rolled back, whole.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// Another writer moved a mark, an epoch was taken, a dead letter resolved, or the turn of records
    /// has come that a seal would bury: read anew and decide again.
    #[error("a lane's mark is not where it was read")]
    MarkMoved,
    /// The database refuses what some event says.
    #[error("{0}")]
    Unfit(String),
    #[error(transparent)]
    Ledger(LedgerError),
}

impl From<LedgerError> for ApplyError {
    fn from(error: LedgerError) -> Self {
        match error {
            LedgerError::Refused(error) => Self::Unfit(error.to_string()),
            error => Self::Ledger(error),
        }
    }
}

impl From<sqlx::Error> for ApplyError {
    fn from(error: sqlx::Error) -> Self {
        LedgerError::from(error).into()
    }
}

impl Ledger {
    /// Writes a batch, all of it or nothing.
    pub async fn apply(&self, batch: &Batch) -> Result<Applied, ApplyError> {
        let mut transaction = self.pool.begin().await?;
        let applied = write(&mut transaction, batch).await?;
        failpoint::pass("writer-written");
        transaction.commit().await?;
        Ok(applied)
    }

    /// Writes what an open dead letter says (an empty batch: that is recorded already) and closes
    /// the letter, both or neither.
    pub async fn apply_dead_letter(
        &self,
        batch: &Batch,
        id: i64,
        deed: &Deed,
    ) -> Result<Applied, ApplyError> {
        let mut transaction = self.pool.begin().await?;
        let applied = write(&mut transaction, batch).await?;
        if !close_retried(&mut transaction, id, deed).await? {
            return Err(ApplyError::MarkMoved);
        }
        transaction.commit().await?;
        Ok(applied)
    }
}

async fn write(connection: &mut PgConnection, batch: &Batch) -> Result<Applied, ApplyError> {
    // Columns are made while the database works on the statement before: it is polled first, and so
    // on its way.
    let marks = move_marks(connection, &batch.moves);
    let (moved, orders) = join(marks, async { Orders::of(&batch.events) }).await;
    moved?;
    let mut rows = 0;
    if !batch.events.is_empty() {
        let recorded = record_orders(connection, &orders);
        let (recorded, ledger) = join(recorded, async { LedgerColumns::of(&batch.events) }).await;
        rows += recorded?;
        rows += append_ledger(connection, &ledger).await?;
        rows += insert_adjustments(connection, &batch.events).await?;
        rows += insert_refunds(connection, &batch.events).await?;
        rows += insert_returns(connection, &batch.events).await?;
        add_to_counters(connection, &batch.events).await?;
        record_sale_steps(connection, &batch.events).await?;
    }
    let parked = park(connection, &batch.park).await?;
    if !batch.unpark.is_empty() {
        unpark(connection, &batch.unpark).await?;
    }
    let mut dead = bury(connection, &batch.dead).await?;
    for moved in &batch.moves {
        let Some(epoch) = moved.seal else { continue };
        // A retry has closed their gap since the mark was read: what can be recorded comes first.
        if has_ready(connection, std::slice::from_ref(moved)).await? {
            return Err(ApplyError::MarkMoved);
        }
        dead += bury_parked(connection, &moved.lane, epoch).await?;
    }
    // Asked under the marks' locks, by a statement of its own: another writer may have parked
    // since the marks were read.
    let ready = has_ready(connection, &batch.moves).await?;
    Ok(Applied { rows, parked, dead, ready })
}

/// Locks the marks in order of their key, so that writers with common lanes cannot deadlock, and
/// moves them.
async fn move_marks(connection: &mut PgConnection, moves: &[LaneMove]) -> Result<(), ApplyError> {
    let sales: Vec<&str> = moves.iter().map(|m| m.lane.sale.as_str()).collect();
    let lanes: Vec<i16> = moves.iter().map(|m| m.lane.lane.into()).collect();
    let epochs: Vec<i64> = moves.iter().map(|m| m.epoch.into()).collect();
    let expected: Vec<i64> = moves.iter().map(|m| bigint(m.expected)).collect();
    let recorded: Vec<i64> = moves.iter().map(|m| bigint(m.recorded)).collect();
    let seals: Vec<Option<i64>> = moves.iter().map(|m| m.seal.map(i64::from)).collect();
    let done = sqlx::query!(
        "WITH asked AS (
           SELECT * FROM UNNEST($1::text[], $2::smallint[], $3::bigint[], $4::bigint[], $5::bigint[],
             $6::bigint[]) AS asked (sale_id, lane, epoch, expected, recorded, seal)
         ), locked AS (
           SELECT l.sale_id, l.lane, asked.recorded, asked.seal
           FROM lanes l JOIN asked ON l.sale_id = asked.sale_id AND l.lane = asked.lane
           WHERE l.recorded = asked.expected AND l.sealed_epoch = asked.epoch
             AND l.epoch = coalesce(asked.seal, l.epoch)
           ORDER BY l.sale_id, l.lane FOR NO KEY UPDATE OF l
         )
         UPDATE lanes SET recorded = locked.recorded,
           sealed_epoch = coalesce(locked.seal, sealed_epoch),
           sealed_seq = CASE WHEN locked.seal IS NULL THEN sealed_seq ELSE locked.recorded END
         FROM locked
         WHERE lanes.sale_id = locked.sale_id AND lanes.lane = locked.lane",
        &sales as _,
        &lanes,
        &epochs,
        &expected,
        &recorded,
        &seals as _
    )
    .execute(connection)
    .await?;
    if done.rows_affected() == moves.len() as u64 { Ok(()) } else { Err(ApplyError::MarkMoved) }
}

/// Orders as the batch leaves them, a column each.
#[derive(Default)]
struct OrderColumns<'a> {
    id: Vec<String>,
    sale: Vec<&'a str>,
    lane: Vec<i16>,
    buyer: Vec<Option<&'a str>>,
    status: Vec<&'static str>,
    lines: Vec<String>,
    payment: Vec<Option<&'a str>>,
    created: Vec<DateTime<Utc>>,
    expires: Vec<DateTime<Utc>>,
    confirmed: Vec<Option<DateTime<Utc>>>,
    seq: Vec<i64>,
    returned: Vec<String>,
    reacquired: Vec<bool>,
    hold: Vec<Option<i32>>,
    asked: Vec<String>,
}

impl<'a> OrderColumns<'a> {
    fn push(&mut self, id: String, order: &'a Order) {
        self.id.push(id);
        self.sale.push(order.lane().sale.as_str());
        self.lane.push(order.lane().lane.into());
        self.buyer.push(order.buyer_id.as_ref().map(AsRef::as_ref));
        self.status.push(order.status.as_str());
        self.lines.push(json(&order.lines));
        self.payment.push(order.payment_id.as_ref().map(AsRef::as_ref));
        self.created.push(datetime(order.created_at));
        self.expires.push(datetime(order.expires_at));
        self.confirmed.push(order.confirmed_at.map(datetime));
        self.seq.push(bigint(order.seq));
        self.returned.push(json(&order.returned));
        self.reacquired.push(order.reacquired);
        self.hold.push(order.hold_seconds.map(seconds));
        self.asked.push(json(&order.asked));
    }
}

/// The orders of a batch: only the last state of each, sorted by id.
#[derive(Default)]
struct Orders<'a> {
    /// Those that begin in this batch.
    new: OrderColumns<'a>,
    known: OrderColumns<'a>,
}

impl<'a> Orders<'a> {
    fn of(events: &'a [Event]) -> Self {
        let mut last: BTreeMap<String, (bool, &Order)> = BTreeMap::new();
        for event in events {
            let Body::Order(OrderStep { order, from, .. }) = &event.body else { continue };
            let (_, seen) =
                last.entry(order.id.to_string()).or_insert_with(|| (from.is_none(), order));
            *seen = order;
        }
        let mut orders = Self::default();
        for (id, (is_new, order)) in last {
            let columns = if is_new { &mut orders.new } else { &mut orders.known };
            columns.push(id, order);
        }
        orders
    }
}

async fn record_orders(
    connection: &mut PgConnection,
    orders: &Orders<'_>,
) -> Result<u64, ApplyError> {
    let inserted = insert_orders(connection, &orders.new).await?;
    Ok(inserted + update_orders(connection, &orders.known).await?)
}

/// By a plain insert: an upsert costs the database a fifth more, and an order does not begin twice.
async fn insert_orders(
    connection: &mut PgConnection,
    orders: &OrderColumns<'_>,
) -> Result<u64, ApplyError> {
    if orders.id.is_empty() {
        return Ok(0);
    }
    let done = sqlx::query!(
        "INSERT INTO orders (id, sale_id, lane, buyer_id, status, lines, payment_id,
           created_at, expires_at, confirmed_at, seq, returned, reacquired, hold_seconds, asked)
         SELECT id, sale_id, lane, buyer_id, status, lines::jsonb, payment_id,
           created_at, expires_at, confirmed_at, seq, returned::jsonb, reacquired, hold_seconds,
           asked::jsonb
         FROM UNNEST($1::text[], $2::text[], $3::smallint[], $4::text[], $5::text[], $6::text[],
           $7::text[], $8::timestamptz[], $9::timestamptz[], $10::timestamptz[], $11::bigint[],
           $12::text[], $13::boolean[], $14::integer[], $15::text[])
           AS seen (id, sale_id, lane, buyer_id, status, lines, payment_id,
             created_at, expires_at, confirmed_at, seq, returned, reacquired, hold_seconds, asked)",
        &orders.id,
        &orders.sale as _,
        &orders.lane,
        &orders.buyer as _,
        &orders.status as _,
        &orders.lines,
        &orders.payment as _,
        &orders.created,
        &orders.expires,
        &orders.confirmed as _,
        &orders.seq,
        &orders.returned,
        &orders.reacquired,
        &orders.hold as _,
        &orders.asked
    )
    .execute(connection)
    .await?;
    Ok(done.rows_affected())
}

/// What became of orders that began in an earlier batch; never backwards.
async fn update_orders(
    connection: &mut PgConnection,
    orders: &OrderColumns<'_>,
) -> Result<u64, ApplyError> {
    if orders.id.is_empty() {
        return Ok(0);
    }
    let done = sqlx::query!(
        "UPDATE orders o SET status = seen.status, lines = seen.lines::jsonb,
           payment_id = seen.payment_id, expires_at = seen.expires_at,
           confirmed_at = seen.confirmed_at, seq = seen.seq, returned = seen.returned::jsonb,
           reacquired = seen.reacquired, hold_seconds = seen.hold_seconds,
           asked = seen.asked::jsonb
         FROM UNNEST($1::text[], $2::text[], $3::text[], $4::text[], $5::timestamptz[],
           $6::timestamptz[], $7::bigint[], $8::text[], $9::boolean[], $10::integer[], $11::text[])
           AS seen (id, status, lines, payment_id, expires_at, confirmed_at, seq, returned,
             reacquired, hold_seconds, asked)
         WHERE o.id = seen.id AND o.seq < seen.seq",
        &orders.id,
        &orders.status as _,
        &orders.lines,
        &orders.payment as _,
        &orders.expires,
        &orders.confirmed as _,
        &orders.seq,
        &orders.returned,
        &orders.reacquired,
        &orders.hold as _,
        &orders.asked
    )
    .execute(connection)
    .await?;
    if done.rows_affected() == orders.id.len() as u64 {
        return Ok(done.rows_affected());
    }
    Err(ApplyError::Unfit("an event goes on with an order that never began".to_owned()))
}

/// A definition's holds are far below what the database's integer can count; an event's is whatever
/// it says.
fn seconds(hold: u32) -> i32 {
    i32::try_from(hold).unwrap_or(i32::MAX)
}

fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).expect("plain data")
}

/// The ledger's rows, a column each.
#[derive(Default)]
struct LedgerColumns<'a> {
    sale: Vec<&'a str>,
    lane: Vec<i16>,
    epoch: Vec<i64>,
    seq: Vec<i64>,
    line: Vec<i16>,
    event: Vec<&'static str>,
    order: Vec<Option<String>>,
    adjustment: Vec<Option<String>>,
    cause: Vec<Option<&'static str>>,
    reason: Vec<Option<&'a str>>,
    actor: Vec<Option<&'a str>>,
    trace: Vec<Option<&'a str>>,
    sku: Vec<Option<String>>,
    available: Vec<i64>,
    held: Vec<i64>,
    sold: Vec<i64>,
    at: Vec<DateTime<Utc>>,
}

impl<'a> LedgerColumns<'a> {
    fn of(events: &'a [Event]) -> Self {
        let mut rows = Self::default();
        for event in events {
            rows.push(event);
        }
        rows
    }

    /// One row a change, or one without SKU where nothing moved: every event has a line 0.
    fn push(&mut self, event: &'a Event) {
        let changes = event.body.changes();
        if changes.is_empty() {
            self.push_line(event, 0, None);
        }
        for (line, change) in (0..).zip(&changes) {
            self.push_line(event, line, Some(change));
        }
    }

    fn push_line(&mut self, event: &'a Event, line: i16, change: Option<&Change>) {
        let (mut order, mut adjustment, mut cause, mut reason, mut actor) = Default::default();
        match &event.body {
            Body::Order(step) => {
                order = Some(step.order.id.to_string());
                cause = Some(step.cause.as_str());
                reason = step.reason.as_deref();
            }
            Body::Adjusted(adjusted) => {
                adjustment = Some(adjusted.id.to_string());
                reason = Some(adjusted.note.reason.as_str());
                actor = Some(adjusted.actor.as_str());
            }
            Body::Sale(step) => actor = sale_actor(step),
        }
        self.sale.push(event.lane.sale.as_str());
        self.lane.push(event.lane.lane.into());
        self.epoch.push(event.epoch.into());
        self.seq.push(bigint(event.seq));
        self.line.push(line);
        self.event.push(event.body.kind());
        self.order.push(order);
        self.adjustment.push(adjustment);
        self.cause.push(cause);
        self.reason.push(reason);
        self.actor.push(actor);
        self.trace.push(event.traceparent.as_deref().and_then(trace_id));
        self.sku.push(change.map(|c| c.sku.as_str().to_owned()));
        self.available.push(change.map_or(0, |c| c.available));
        self.held.push(change.map_or(0, |c| c.held));
        self.sold.push(change.map_or(0, |c| c.sold));
        self.at.push(datetime(event.at));
    }
}

fn sale_actor(step: &SaleStep) -> Option<&str> {
    match step {
        SaleStep::Defined { actor, .. }
        | SaleStep::Paused { actor }
        | SaleStep::Resumed { actor }
        | SaleStep::Closed { actor } => Some(actor.as_str()),
        SaleStep::Archived => None,
    }
}

/// The trace id of a W3C `traceparent`: its second field, 32 hex digits.
fn trace_id(traceparent: &str) -> Option<&str> {
    let id = traceparent.split('-').nth(1)?;
    (id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit())).then_some(id)
}

async fn append_ledger(
    connection: &mut PgConnection,
    rows: &LedgerColumns<'_>,
) -> Result<u64, ApplyError> {
    let done = sqlx::query!(
        "INSERT INTO ledger (sale_id, lane, epoch, seq, line, event, order_id, adjustment_id,
           cause, reason, actor, trace_id, sku, available, held, sold, at)
         SELECT * FROM UNNEST($1::text[], $2::smallint[], $3::bigint[], $4::bigint[],
           $5::smallint[], $6::text[], $7::text[], $8::text[], $9::text[], $10::text[],
           $11::text[], $12::text[], $13::text[], $14::bigint[], $15::bigint[], $16::bigint[],
           $17::timestamptz[])",
        &rows.sale as _,
        &rows.lane,
        &rows.epoch,
        &rows.seq,
        &rows.line,
        &rows.event as _,
        &rows.order as _,
        &rows.adjustment as _,
        &rows.cause as _,
        &rows.reason as _,
        &rows.actor as _,
        &rows.trace as _,
        &rows.sku as _,
        &rows.available,
        &rows.held,
        &rows.sold,
        &rows.at
    )
    .execute(connection)
    .await?;
    Ok(done.rows_affected())
}

async fn insert_adjustments(
    connection: &mut PgConnection,
    events: &[Event],
) -> Result<u64, ApplyError> {
    let mut rows = 0;
    // Operators make these by hand, one at a time: a statement each.
    for event in events {
        let Body::Adjusted(adjustment) = &event.body else { continue };
        rows += insert_adjustment(connection, adjustment).await?;
    }
    Ok(rows)
}

async fn insert_adjustment(
    connection: &mut PgConnection,
    adjustment: &Adjustment,
) -> Result<u64, ApplyError> {
    let Adjustment {
        id,
        sku,
        delta,
        set_total,
        before,
        note,
        actor,
        created_at,
        seq,
        undoes,
        undone_by: _,
    } = adjustment;
    let done = sqlx::query!(
        "INSERT INTO adjustments (id, sale_id, lane, sku, delta, set_total, before_available,
           before_held, before_sold, before_version, reason, reference, note, actor, created_at, seq,
           undoes)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17)",
        id.to_string(),
        id.lane().sale.as_str(),
        i16::from(id.lane().lane),
        sku.as_str(),
        delta,
        *set_total,
        before.available,
        before.held,
        before.sold,
        before.version,
        note.reason.as_str(),
        note.reference,
        note.note,
        actor.as_str(),
        datetime(*created_at),
        bigint(*seq),
        undoes.as_ref().map(ToString::to_string)
    )
    .execute(connection)
    .await?;
    Ok(done.rows_affected())
}

/// Payments that must be given back: one row per order and payment, whoever says so first.
async fn insert_refunds(
    connection: &mut PgConnection,
    events: &[Event],
) -> Result<u64, ApplyError> {
    let mut rows = 0;
    // Rare beside orders: a statement each.
    for event in events {
        let Body::Order(order) = &event.body else { continue };
        let Step::RefundDue(due) = &order.step else { continue };
        rows += insert_refund(connection, &order.order.id, due, event.at).await?;
    }
    Ok(rows)
}

/// Returns as they were asked for, which a replay must find.
async fn insert_returns(
    connection: &mut PgConnection,
    events: &[Event],
) -> Result<u64, ApplyError> {
    let mut rows = 0;
    // Rare beside orders: a statement each.
    for event in events {
        let Body::Order(OrderStep { order, step, .. }) = &event.body else { continue };
        let Step::Returned { restock, request: Some(request), .. } = step else { continue };
        let done = sqlx::query!(
            "INSERT INTO returns (sale_id, lane, order_id, key, restock, lines, seq)
             VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT DO NOTHING",
            event.lane.sale.as_str(),
            i16::from(event.lane.lane),
            order.id.to_string(),
            request.key.encode(),
            restock,
            &Json(&request.lines) as _,
            bigint(event.seq)
        )
        .execute(&mut *connection)
        .await?;
        rows += done.rows_affected();
    }
    Ok(rows)
}

/// What a batch adds to the counters of one SKU of one lane.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Delta {
    total: i64,
    available: i64,
    held: i64,
    sold: i64,
    version: i64,
}

/// Sums up what the events change. The total moves by definitions, adjustments and returns that are
/// not restocked alone, so any other step that does not conserve its units breaks the table's check
/// (I1).
fn deltas(events: &[Event]) -> BTreeMap<(&LaneId, Sku), Delta> {
    let mut deltas: BTreeMap<(&LaneId, Sku), Delta> = BTreeMap::new();
    for event in events {
        let (moves_total, version) = match &event.body {
            Body::Order(step) => (matches!(step.step, Step::Returned { restock: false, .. }), 0),
            Body::Adjusted(_) => (true, 1),
            Body::Sale(_) => (true, 0),
        };
        for change in event.body.changes() {
            let delta = deltas.entry((&event.lane, change.sku)).or_default();
            delta.available += change.available;
            delta.held += change.held;
            delta.sold += change.sold;
            delta.version += version;
            if moves_total {
                delta.total += change.available + change.held + change.sold;
            }
        }
    }
    deltas
}

async fn add_to_counters(
    connection: &mut PgConnection,
    events: &[Event],
) -> Result<(), ApplyError> {
    make_counters(connection, events).await?;
    let deltas = deltas(events);
    if deltas.is_empty() {
        return Ok(());
    }
    let sales: Vec<&str> = deltas.keys().map(|(lane, _)| lane.sale.as_str()).collect();
    let lanes: Vec<i16> = deltas.keys().map(|(lane, _)| lane.lane.into()).collect();
    let skus: Vec<&str> = deltas.keys().map(|(_, sku)| sku.as_str()).collect();
    let column = |field: fn(&Delta) -> i64| deltas.values().map(field).collect::<Vec<i64>>();
    // The marks that this transaction has locked keep others from these rows, whatever the order
    // in which they are updated. An upsert would not do: the checks see the bare delta first.
    let done = sqlx::query!(
        "UPDATE counters c SET total = c.total + d.total, available = c.available + d.available,
           held = c.held + d.held, sold = c.sold + d.sold, version = c.version + d.version
         FROM UNNEST($1::text[], $2::smallint[], $3::text[], $4::bigint[], $5::bigint[],
           $6::bigint[], $7::bigint[], $8::bigint[])
           AS d (sale_id, lane, sku, total, available, held, sold, version)
         WHERE c.sale_id = d.sale_id AND c.lane = d.lane AND c.sku = d.sku",
        &sales as _,
        &lanes,
        &skus as _,
        &column(|d| d.total),
        &column(|d| d.available),
        &column(|d| d.held),
        &column(|d| d.sold),
        &column(|d| d.version)
    )
    .execute(connection)
    .await?;
    if done.rows_affected() == deltas.len() as u64 {
        return Ok(());
    }
    Err(ApplyError::Unfit("an event names an SKU that its lane was never defined with".to_owned()))
}

/// Counters begin at nothing when a definition first names their SKU.
async fn make_counters(connection: &mut PgConnection, events: &[Event]) -> Result<(), ApplyError> {
    for event in events {
        let Body::Sale(SaleStep::Defined { definition, .. }) = &event.body else { continue };
        let skus: Vec<&str> = definition.skus.iter().map(|sku| sku.sku.as_str()).collect();
        sqlx::query!(
            "INSERT INTO counters (sale_id, lane, sku, total, available, held, sold, version)
             SELECT $1, $2, sku, 0, 0, 0, 0, 0 FROM UNNEST($3::text[]) AS named (sku)
             ON CONFLICT DO NOTHING",
            event.lane.sale.as_str(),
            i16::from(event.lane.lane),
            &skus as _
        )
        .execute(&mut *connection)
        .await?;
    }
    Ok(())
}

/// Brings the sales' rows up to what lane 0 says; the other lanes say the same, later or sooner.
async fn record_sale_steps(
    connection: &mut PgConnection,
    events: &[Event],
) -> Result<(), ApplyError> {
    for event in events {
        let Body::Sale(step) = &event.body else { continue };
        if let SaleStep::Defined { version, .. } = step {
            note_version(connection, &event.lane, *version).await?;
        }
        if event.lane.lane == 0 {
            record_sale_step(connection, event, step).await?;
        }
    }
    Ok(())
}

/// Which definition the lane has: the sale's own can be newer where the lane has lost it.
async fn note_version(
    connection: &mut PgConnection,
    lane: &LaneId,
    version: u64,
) -> Result<(), ApplyError> {
    sqlx::query!(
        "UPDATE lanes SET version = $3 WHERE sale_id = $1 AND lane = $2",
        lane.sale.as_str(),
        i16::from(lane.lane),
        bigint(version)
    )
    .execute(connection)
    .await?;
    Ok(())
}

async fn record_sale_step(
    connection: &mut PgConnection,
    event: &Event,
    step: &SaleStep,
) -> Result<(), ApplyError> {
    let (mut paused, mut closed_at, mut archived_at) = (None, None, None);
    match step {
        SaleStep::Defined { version, definition, actor, .. } => {
            // Heals an operator's call that died between the lane and the database.
            let sale = &event.lane.sale;
            set_definition(connection, sale, *version, definition, actor).await?;
            return Ok(());
        }
        SaleStep::Paused { .. } => paused = Some(true),
        SaleStep::Resumed { .. } => paused = Some(false),
        SaleStep::Closed { .. } => closed_at = Some(datetime(event.at)),
        SaleStep::Archived => archived_at = Some(datetime(event.at)),
    }
    sqlx::query!(
        "UPDATE sales SET paused = coalesce($3, paused), closed_at = coalesce(closed_at, $4),
           archived_at = coalesce(archived_at, $5), steps_seq = $2
         WHERE sale_id = $1 AND steps_seq < $2",
        event.lane.sale.as_str(),
        bigint(event.seq),
        paused,
        closed_at,
        archived_at
    )
    .execute(connection)
    .await?;
    Ok(())
}

async fn has_ready(connection: &mut PgConnection, moves: &[LaneMove]) -> Result<bool, ApplyError> {
    let lanes: Vec<LaneId> = moves.iter().map(|m| m.lane.clone()).collect();
    let (sales, numbers) = columns(&lanes);
    let ready = sqlx::query_scalar!(
        r#"SELECT EXISTS (
             SELECT FROM UNNEST($1::text[], $2::smallint[]) AS moved (sale_id, lane)
             JOIN lanes l ON l.sale_id = moved.sale_id AND l.lane = moved.lane
             JOIN parked p ON p.sale_id = l.sale_id AND p.lane = l.lane AND p.seq <= l.recorded + 1
           ) AS "ready!""#,
        &sales as _,
        &numbers
    )
    .fetch_one(connection)
    .await?;
    Ok(ready)
}
