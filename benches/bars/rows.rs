//! One function a figure (or two that come from the same runs). Everything that is compared runs
//! alternately, so that what else the machine does falls on both.

use std::cell::Cell;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures_util::future::{Either, select};
use sqlx::{AssertSqlSafe, Row as _};

use crate::machine::Usage;
use crate::report::{Bar, Curve, Point, Row, median};
use crate::service::{Deployment, Service, until};
use crate::wrk::{Counted, Load};

const CONNECTIONS: usize = 256;
pub const STOCK: u64 = 1_000_000_000;
pub const HOLD_SECONDS: u64 = 3600;
/// How often it is looked how far the database is.
pub const LOOK: Duration = Duration::from_millis(20);
/// How many seconds the database may be behind at a rate that lasts.
const BEHIND_MAX: f64 = 1.0;
/// By how much the search for the highest such rate goes down, and how often.
const STEP: f64 = 1.06;
const STEPS_MAX: usize = 10;

/// How long and how often.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    pub runs: usize,
    pub seconds: u64,
    /// How long the highest rate has to be kept up.
    pub sustained_seconds: u64,
    /// How long all roles run as fast as they can.
    pub drained_seconds: u64,
    /// What a lane has that was sold from for long.
    pub live_orders: u64,
    /// Of which the weight is taken.
    pub connections: usize,
}

impl Effort {
    pub const FULL: Self = Self {
        runs: 5,
        seconds: 5,
        sustained_seconds: 120,
        drained_seconds: 300,
        live_orders: 1_000_000,
        connections: 4_000,
    };
    /// Shows that the harness works; says nothing.
    pub const QUICK: Self = Self {
        runs: 1,
        seconds: 1,
        sustained_seconds: 5,
        drained_seconds: 5,
        live_orders: 1_000,
        connections: 100,
    };
}

/// What there is to be measured.
pub struct Bench<'a> {
    pub deployment: &'a Deployment,
    pub bare: &'a Bare,
    pub effort: Effort,
}

/// The bare HTTP server.
pub struct Bare {
    pub url: String,
    pub pid: u32,
}

/// One load on Holdfast, with what it cost.
pub struct Pressed {
    pub counted: Counted,
    pub held: u64,
    /// wrk did not wait for so many at its end, which may be held without having been counted.
    uncounted: u64,
    service_us: f64,
    redis_us: f64,
    idle: f64,
}

impl Pressed {
    pub fn held_per_second(&self) -> f64 {
        self.held as f64 / self.counted.seconds
    }

    /// How many may have been held, with those that wrk did not wait for.
    pub fn most(&self) -> u64 {
        self.held + self.uncounted
    }
}

impl Bench<'_> {
    pub fn load<'a>(&'a self, url: &'a str, sale: &'a str) -> Load<'a> {
        Load {
            url,
            key: &self.deployment.orders_key,
            sale,
            connections: CONNECTIONS,
            duration: Duration::from_secs(self.effort.seconds),
            rate: None,
            replays: 0,
            level: "memory",
        }
    }

    /// Requests a second of the bare server, and its CPU a request in microseconds.
    async fn press_bare(&self, load: &Load<'_>) -> Result<(Counted, f64)> {
        let before = Usage::of(&[self.bare.pid])?;
        let counted = Load { url: &self.bare.url, ..load.clone() }.run().await?;
        let used = Usage::of(&[self.bare.pid])?.since(&before);
        let cpu_us = used.busy[0].as_secs_f64() * 1e6 / counted.answered as f64;
        Ok((counted, cpu_us))
    }

    /// New orders on a sale: each that was answered 201 must be held afterwards.
    pub async fn press(&self, service: &Service<'_>, load: &Load<'_>) -> Result<Pressed> {
        let (_, held_before) = service.stock(load.sale).await?;
        let pressed = self.press_unchecked(service, load).await?;
        let held = service.stock(load.sale).await?.1 - held_before;
        let answered = pressed.held..=pressed.most();
        ensure!(answered.contains(&held), "{held} held, of {answered:?} answered");
        Ok(Pressed { held, ..pressed })
    }

    /// New orders on a sale, of which some may have ended before all are placed.
    pub async fn press_unchecked(&self, service: &Service<'_>, load: &Load<'_>) -> Result<Pressed> {
        let pids = [service.pid(), self.deployment.redis_pid];
        let before = Usage::of(&pids)?;
        let counted = load.run().await?;
        let used = Usage::of(&pids)?.since(&before);
        let held = counted.answered - counted.refused;
        let us = |process: usize| used.busy[process].as_secs_f64() * 1e6 / held as f64;
        let uncounted = counted.broken + load.connections as u64;
        let (service_us, redis_us, idle) = (us(0), us(1), used.idle);
        Ok(Pressed { held, uncounted, service_us, redis_us, idle, counted })
    }

    /// The same on a sale of its own, which then leaves Redis.
    pub async fn press_new_sale(
        &self,
        service: &Service<'_>,
        change: impl FnOnce(&mut Load<'_>),
    ) -> Result<Pressed> {
        let sale = service.define(STOCK, HOLD_SECONDS).await?;
        let mut load = self.load(&service.url, &sale);
        change(&mut load);
        let pressed = self.press(service, &load).await?;
        self.deployment.forget(&sale).await?;
        Ok(pressed)
    }

    /// Rows 1 and 2.
    pub async fn held(&self) -> Result<Vec<Row>> {
        let service = self.deployment.serve("api").await?;
        let (mut rates, mut costs, mut idle) = (Vec::new(), Vec::new(), Vec::new());
        let mut detail = String::new();
        self.press_new_sale(&service, |load| load.duration = Duration::from_secs(1)).await?;
        for _ in 0..self.effort.runs {
            let (bare, bare_us) = self.press_bare(&self.load("", "sale")).await?;
            let pressed = self.press_new_sale(&service, |_| {}).await?;
            let bare_rate = bare.answered as f64 / bare.seconds;
            rates.push(pressed.held_per_second() / bare_rate);
            costs.push((pressed.service_us + pressed.redis_us) / bare_us);
            idle.push(pressed.idle);
            detail = format!(
                "last run: {:.0}/s held, bare {bare_rate:.0}/s; p50 {:.1} ms, p99 {:.1} ms; CPU an order: \
                 service {:.1} us, Redis {:.1} us, bare {bare_us:.1} us",
                pressed.held_per_second(),
                pressed.counted.p50 * 1e3,
                pressed.counted.p99 * 1e3,
                pressed.service_us,
                pressed.redis_us,
            );
        }
        let rate = Row::new(
            1,
            "orders held / bare, 256 connections, api alone",
            Bar::AtLeast(0.6),
            rates,
            detail.clone(),
        );
        let cost =
            Row::new(2, "CPU of a held order / of a bare request", Bar::AtMost(2.3), costs, detail);
        Ok(vec![rate.void_where_idle(&idle), cost])
    }

    /// Row 3.
    pub async fn alone(&self) -> Result<Vec<Row>> {
        let service = self.deployment.serve("api").await?;
        let mut ratios = Vec::new();
        let mut detail = String::new();
        for _ in 0..self.effort.runs {
            let one = Load { connections: 1, ..self.load("", "sale") };
            let (bare, _) = self.press_bare(&one).await?;
            let script = self.trivial_script().await?;
            let pressed = self.press_new_sale(&service, |load| load.connections = 1).await?;
            ratios.push(pressed.counted.p50 / (bare.p50 + script));
            detail = format!(
                "last run: p50 {:.0} us; bare {:.0} us, a script that does nothing {:.0} us",
                pressed.counted.p50 * 1e6,
                bare.p50 * 1e6,
                script * 1e6
            );
        }
        let figure = "p50 of one connection / (bare + one trivial EVALSHA)";
        Ok(vec![Row::new(3, figure, Bar::AtMost(1.5), ratios, detail)])
    }

    /// Median seconds of an `EVALSHA` that does nothing, one after the other.
    async fn trivial_script(&self) -> Result<f64> {
        let mut redis = self.deployment.redis.clone();
        let script = redis::cmd("SCRIPT").arg("LOAD").arg("return 1").to_owned();
        let sha: String = script.query_async(&mut redis).await?;
        let (mut times, began) = (Vec::new(), Instant::now());
        while began.elapsed() < Duration::from_secs(self.effort.seconds) {
            let sent = Instant::now();
            let _: i64 = redis::cmd("EVALSHA").arg(&sha).arg(0).query_async(&mut redis).await?;
            times.push(sent.elapsed().as_secs_f64());
        }
        Ok(median(&times))
    }

    /// Row 4.
    pub async fn sold_out(&self) -> Result<Vec<Row>> {
        const ORDERS: usize = 1_000;
        let service = self.deployment.serve("api").await?;
        let sale = service.define(ORDERS as u64, HOLD_SECONDS).await?;
        for n in 1..=ORDERS {
            let (status, _) = service.place(&sale, &format!("replay-{n}")).await?;
            ensure!(status == 201, "order {n} was answered {status}");
        }
        let load = Load { replays: ORDERS, ..self.load(&service.url, &sale) };
        let (mut ratios, mut idle) = (Vec::new(), Vec::new());
        let mut detail = String::new();
        for _ in 0..self.effort.runs {
            let (bare, _) = self.press_bare(&load).await?;
            let pids = [service.pid()];
            let before = Usage::of(&pids)?;
            let counted = load.run().await?;
            idle.push(Usage::of(&pids)?.since(&before).idle);
            let share = counted.refused as f64 / counted.answered as f64;
            // Nine in ten; a few are still on their way when wrk ends.
            ensure!((0.85..0.95).contains(&share), "{share} of the answers are refusals");
            ensure!(service.stock(&sale).await? == (0, ORDERS as u64), "the stock has moved");
            let (rate, bare) =
                (counted.answered as f64 / counted.seconds, bare.answered as f64 / bare.seconds);
            ratios.push(rate / bare);
            detail = format!("last run: {rate:.0}/s, bare {bare:.0}/s");
        }
        self.deployment.forget(&sale).await?;
        let figure = "sold-out answers / bare, a tenth are replays";
        let row = Row::new(4, figure, Bar::AtLeast(0.7), ratios, detail);
        Ok(vec![row.void_where_idle(&idle)])
    }

    /// Rows 5 and 10.
    pub async fn sustained(&self) -> Result<Vec<Row>> {
        let service = self.deployment.serve("api,relay,writer,sweeper").await?;
        let seconds = 3 * self.effort.seconds;
        let bare = async || -> Result<f64> {
            let duration = Duration::from_secs(seconds);
            let (bare, _) = self.press_bare(&Load { duration, ..self.load("", "sale") }).await?;
            Ok(bare.answered as f64 / bare.seconds)
        };
        let warm = self.press_new_recorded(&service, None, seconds, f64::INFINITY).await?;
        let highest = warm.context("it may be behind")?.rate;
        // Callers who order as fast as they are answered bring about the highest rate there is. If that
        // does not last: fewer orders a second, down to what does. What is beside it was just before it
        // and just after, since the machine is not as fast at all times.
        let (mut rate, mut before, mut tried, mut kept) = (None, bare().await?, Vec::new(), None);
        for _ in 0..STEPS_MAX {
            let seconds = self.effort.sustained_seconds;
            let run = self.press_new_recorded(&service, rate, seconds, BEHIND_MAX).await?;
            let after = bare().await?;
            if let Some(run) = run {
                let behind = run.behind;
                tried.push(format!("{:.0}/s for {seconds} s: {behind:.1} s behind", run.rate));
                kept = Some((run, (before + after) / 2.0));
                break;
            }
            tried.push(match rate {
                Some(rate) => format!("{rate:.0}/s: more"),
                None => "as fast as they are answered: more".to_owned(),
            });
            (rate, before) = (Some(rate.unwrap_or(highest) / STEP), after);
        }
        let (held, bytes, bare_rate) = match kept {
            Some((kept, bare_rate)) => (kept.rate, kept.bytes_an_order, bare_rate),
            None => (0.0, f64::NAN, before),
        };
        let tried = tried.join(", ");
        let detail = format!("{held:.0}/s held and recorded, bare {bare_rate:.0}/s ({tried})");
        let figure = "held and recorded, at most 1 s behind / bare, all roles";
        let rate = Row::new(5, figure, Bar::AtLeast(0.25), vec![held / bare_rate], detail);
        let figure = "bytes in Redis a live one-line order, outbox drained";
        let memory = Row::new(10, figure, Bar::AtMost(320.0), vec![bytes], String::new());
        Ok(vec![rate, memory])
    }

    /// The same on a sale of its own, which then leaves Redis.
    async fn press_new_recorded(
        &self,
        service: &Service<'_>,
        rate: Option<f64>,
        seconds: u64,
        behind_max: f64,
    ) -> Result<Option<Recorded>> {
        let sale = service.define(STOCK, HOLD_SECONDS).await?;
        service.recorded(&sale).await?;
        let memory = self.deployment.used_memory().await?;
        let duration = Duration::from_secs(seconds);
        let load = Load { rate, duration, ..self.load(&service.url, &sale) };
        let pressing = self.press(service, &load);
        let watched = self.watch(service, &sale, pressing, behind_max).await?;
        service.recorded(&sale).await?;
        let grown = self.deployment.used_memory().await? - memory;
        self.deployment.forget(&sale).await?;
        Ok(watched.map(|(pressed, behind)| {
            let bytes_an_order = grown as f64 / pressed.held as f64;
            Recorded { rate: pressed.held_per_second(), behind, bytes_an_order }
        }))
    }

    /// Watches how far the database is behind while a sale is pressed on, in seconds at most; stops where it is
    /// more than it may be.
    pub async fn watch(
        &self,
        service: &Service<'_>,
        sale: &str,
        pressing: impl Future<Output = Result<Pressed>>,
        behind_max: f64,
    ) -> Result<Option<(Pressed, f64)>> {
        let behind = Cell::new(0.0_f64);
        let pressing = std::pin::pin!(pressing);
        let watching = std::pin::pin!(async {
            // When the lane was first seen to have reached a seq that is not recorded yet.
            let mut unrecorded: VecDeque<(Instant, u64)> = VecDeque::new();
            loop {
                let marks = service.marks(sale).await?;
                unrecorded.push_back((Instant::now(), marks.seq));
                while unrecorded.front().is_some_and(|(_, seq)| *seq <= marks.recorded) {
                    unrecorded.pop_front();
                }
                let oldest =
                    unrecorded.front().map_or(0.0, |(seen, _)| seen.elapsed().as_secs_f64());
                behind.set(behind.get().max(oldest));
                if oldest > behind_max {
                    return anyhow::Ok(());
                }
                tokio::time::sleep(LOOK).await;
            }
        });
        let pressed = match select(pressing, watching).await {
            Either::Left((pressed, _)) => pressed?,
            Either::Right((stopped, _)) => {
                stopped?;
                return Ok(None);
            }
        };
        Ok(Some((pressed, behind.get())))
    }

    /// Row 6: at half of the highest rate.
    pub async fn latency(&self) -> Result<Vec<Row>> {
        let service = self.deployment.serve("api").await?;
        let highest = self.press_new_sale(&service, |_| {}).await?.held_per_second();
        let rate = Some(highest / 2.0);
        let mut ratios = Vec::new();
        let mut detail = String::new();
        for _ in 0..self.effort.runs {
            let (bare, _) = self.press_bare(&Load { rate, ..self.load("", "sale") }).await?;
            let pressed = self.press_new_sale(&service, |load| load.rate = rate).await?;
            ratios.push(pressed.counted.p99 / bare.p99);
            detail = format!(
                "last run: p99 {:.2} ms, bare {:.2} ms, at {:.0}/s",
                pressed.counted.p99 * 1e3,
                bare.p99 * 1e3,
                pressed.held_per_second()
            );
        }
        let figure = "p99 at half of the highest rate / bare's at that rate";
        Ok(vec![Row::new(6, figure, Bar::AtMost(4.0), ratios, detail)])
    }

    /// Row 7: five times as many callers as at the highest rate, each asking again at once.
    pub async fn overload(&self) -> Result<Vec<Row>> {
        let service = self.deployment.serve("api").await?;
        let mut ratios = Vec::new();
        let mut detail = String::new();
        for _ in 0..self.effort.runs {
            let highest = self.press_new_sale(&service, |_| {}).await?;
            let many =
                self.press_new_sale(&service, |load| load.connections = 5 * CONNECTIONS).await?;
            ratios.push(many.held_per_second() / highest.held_per_second());
            detail = format!(
                "last run: {:.0}/s, {:.0}/s with {} connections, {} refused, p99 {:.0} ms",
                highest.held_per_second(),
                many.held_per_second(),
                5 * CONNECTIONS,
                many.counted.refused,
                many.counted.p99 * 1e3
            );
        }
        let figure = "answered correctly under five times the load / highest";
        Ok(vec![Row::new(7, figure, Bar::AtLeast(0.9), ratios, detail)])
    }

    /// Row 8.
    pub async fn writer(&self) -> Result<Vec<Row>> {
        let (mut ratios, mut detail) = (Vec::new(), String::new());
        for _ in 0..self.effort.runs {
            let (writer, plain) = self.writer_once().await?;
            ratios.push(writer / plain);
            detail = format!("last run: {writer:.0} rows/s, plain inserts {plain:.0} rows/s");
        }
        let figure = "rows the writer records from a full topic / plain UNNEST";
        Ok(vec![Row::new(8, figure, Bar::AtLeast(0.7), ratios, detail)])
    }

    /// Rows a second of a writer that begins with a full topic, and of plain inserts of the same.
    async fn writer_once(&self) -> Result<(f64, f64)> {
        let selling = self.deployment.serve("api,relay").await?;
        let sale = selling.define(STOCK, HOLD_SECONDS).await?;
        let seconds = Duration::from_secs(2 * self.effort.seconds);
        self.press(&selling, &Load { duration: seconds, ..self.load(&selling.url, &sale) }).await?;
        let lane = format!("hf1:{{{sale}/0}}:lane");
        until("Kafka has all", async || {
            let mut redis = self.deployment.redis.clone();
            let mut read = redis::cmd("HMGET");
            let (seq, logged): (u64, u64) =
                read.arg(&lane).arg(&["seq", "logged"]).query_async(&mut redis).await?;
            Ok(logged >= seq)
        })
        .await?;
        let seq = selling.marks(&sale).await?.seq;
        drop(selling);

        let recorded = async || -> Result<u64> {
            let mark = sqlx::query("SELECT recorded FROM lanes WHERE sale_id = $1").bind(&sale);
            let mark = mark.fetch_one(&self.deployment.database).await?;
            Ok(mark.get::<i64, _>(0) as u64)
        };
        let first = recorded().await?;
        let _writer = self.deployment.serve("writer").await?;
        let mut began = None;
        until("all is recorded", async || {
            let now = recorded().await?;
            if now > first && began.is_none() {
                began = Some((Instant::now(), now));
            }
            Ok(now >= seq)
        })
        .await?;
        let (began, from) = began.unwrap_or((Instant::now(), first));
        // A hold is a row in the orders and one in the ledger.
        let writer = 2.0 * (seq - from) as f64 / began.elapsed().as_secs_f64();
        drop(_writer);
        let plain = self.plain_inserts(&sale).await?;
        self.deployment.forget(&sale).await?;
        Ok((writer, plain))
    }

    /// Rows a second of the sale's recorded orders and ledger, copied by `UNNEST` into tables like
    /// them, in transactions of as many events as a writer's batch.
    async fn plain_inserts(&self, sale: &str) -> Result<f64> {
        const BATCH: i64 = 4_000;
        let mut connection = self.deployment.database.acquire().await?;
        let mut copies = Vec::new();
        for table in ["orders", "ledger"] {
            let copy = format!("CREATE TABLE plain_{table} (LIKE {table} INCLUDING ALL)");
            sqlx::query(AssertSqlSafe(copy)).execute(&mut *connection).await?;
            let columns = sqlx::query(
                "SELECT attname::text, format_type(atttypid, atttypmod) FROM pg_attribute
                 WHERE attrelid = $1::regclass AND attnum > 0 AND NOT attisdropped
                   AND attgenerated = '' ORDER BY attnum",
            );
            let columns = columns.bind(table).fetch_all(&mut *connection).await?;
            let names: Vec<String> = columns.iter().map(|column| column.get(0)).collect();
            let types: Vec<String> = columns.iter().map(|column| column.get(1)).collect();
            let lists: Vec<_> =
                names.iter().map(|name| format!("array_agg({name}::text)")).collect();
            let read = format!(
                "SELECT {} FROM (SELECT *, (row_number() OVER () - 1) / {BATCH} AS batch FROM {table}
                   WHERE sale_id = $1) numbered GROUP BY batch",
                lists.join(", ")
            );
            let batches =
                sqlx::query(AssertSqlSafe(read)).bind(sale).fetch_all(&mut *connection).await?;
            let batches: Vec<Vec<Vec<Option<String>>>> = batches
                .iter()
                .map(|batch| (0..names.len()).map(|column| batch.get(column)).collect())
                .collect();
            let arrays: Vec<_> = (1..=names.len()).map(|n| format!("${n}::text[]")).collect();
            let values: Vec<_> =
                types.iter().enumerate().map(|(n, t)| format!("c{n}::{t}")).collect();
            let given: Vec<_> = (0..names.len()).map(|n| format!("c{n}")).collect();
            let insert = format!(
                "INSERT INTO plain_{table} ({}) SELECT {} FROM UNNEST({}) AS rows({})",
                names.join(", "),
                values.join(", "),
                arrays.join(", "),
                given.join(", ")
            );
            copies.push((insert, batches));
        }
        let rounds = copies.iter().map(|(_, batches)| batches.len()).max().unwrap_or(0);
        let (mut rows, began) = (0, Instant::now());
        for round in 0..rounds {
            let mut transaction = sqlx::Connection::begin(&mut *connection).await?;
            for (insert, batches) in &mut copies {
                let Some(batch) = batches.get_mut(round) else { continue };
                let mut query = sqlx::query(AssertSqlSafe(insert.clone()));
                for column in std::mem::take(batch) {
                    query = query.bind(column);
                }
                rows += query.execute(&mut *transaction).await?.rows_affected();
            }
            transaction.commit().await?;
        }
        let rate = rows as f64 / began.elapsed().as_secs_f64();
        for table in ["orders", "ledger"] {
            let drop = format!("DROP TABLE plain_{table}");
            sqlx::query(AssertSqlSafe(drop)).execute(&mut *connection).await?;
        }
        Ok(rate)
    }

    /// Row 9.
    pub async fn expiry(&self) -> Result<Vec<Row>> {
        let service = self.deployment.serve("api").await?;
        let mut ratios = Vec::new();
        let mut detail = String::new();
        for _ in 0..self.effort.runs.min(3) {
            let hold = self.effort.seconds + 3;
            let sale = service.define(STOCK, hold).await?;
            let placed = self.press(&service, &self.load(&service.url, &sale)).await?;
            tokio::time::sleep(Duration::from_secs(hold)).await;
            let _sweeper = self.deployment.serve("sweeper").await?;
            let mut first = None;
            until("all holds are ended", async || {
                let held = service.stock(&sale).await?.1;
                if held < placed.held && first.is_none() {
                    first = Some((Instant::now(), held));
                }
                Ok(held == 0)
            })
            .await?;
            let (began, held) = first.unwrap_or((Instant::now(), 0));
            let ended = held as f64 / began.elapsed().as_secs_f64();
            ratios.push(ended / placed.held_per_second());
            self.deployment.forget(&sale).await?;
            detail = format!(
                "last run: {} overdue, {ended:.0}/s ended, {:.0}/s held",
                placed.held,
                placed.held_per_second()
            );
        }
        let figure = "overdue holds ended / orders held";
        Ok(vec![Row::new(9, figure, Bar::AtLeast(0.5), ratios, detail)])
    }

    /// Latency over throughput, of both.
    pub async fn curves(&self) -> Result<Vec<Curve>> {
        let service = self.deployment.serve("api").await?;
        let mut holdfast = Curve { name: "Holdfast, api alone", points: Vec::new() };
        let mut bare = Curve { name: "bare HTTP server", points: Vec::new() };
        for connections in [1, 2, 4, 8, 16, 32, 64, 128, 256, 512] {
            let point = |counted: &Counted, per_second: f64| Point {
                connections,
                per_second,
                p50_ms: counted.p50 * 1e3,
                p99_ms: counted.p99 * 1e3,
            };
            let (counted, _) =
                self.press_bare(&Load { connections, ..self.load("", "sale") }).await?;
            bare.points.push(point(&counted, counted.answered as f64 / counted.seconds));
            let pressed =
                self.press_new_sale(&service, |load| load.connections = connections).await?;
            holdfast.points.push(point(&pressed.counted, pressed.held_per_second()));
        }
        Ok(vec![holdfast, bare])
    }
}

struct Recorded {
    rate: f64,
    /// Seconds that the database was behind the lane at most.
    behind: f64,
    /// Once all is recorded.
    bytes_an_order: f64,
}
