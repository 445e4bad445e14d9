//! What the bars do not show: a lane that has been sold from for long, an append-only file that is
//! rewritten meanwhile, five minutes without a rest, and what connections and waiting requests weigh.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::machine::resident_bytes;
use crate::report::{Bar, Row};
use crate::rows::{Bench, HOLD_SECONDS, LOOK, STOCK};
use crate::service::{Service, until};
use crate::wrk::Load;

/// How long Redis lets everybody wait while waiting requests are weighed; within the service's
/// patience.
const PAUSE: Duration = Duration::from_millis(1_500);

impl Bench<'_> {
    /// Rows 11 and 12.
    pub async fn crowded(&self) -> Result<Vec<Row>> {
        let service = self.deployment.serve("api").await?;
        let sale = service.define(STOCK, HOLD_SECONDS).await?;
        let load = self.load(&service.url, &sale);
        let mut live = 0;
        while live < self.effort.live_orders {
            live += self.press(&service, &load).await?.held;
        }
        let (mut crowded, mut rewriting, mut rewrites) = (Vec::new(), Vec::new(), Vec::new());
        let mut detail = String::new();
        for _ in 0..self.effort.runs {
            let empty = self.press_new_sale(&service, |_| {}).await?.held_per_second();
            let full = self.press(&service, &load).await?;
            live += full.held;
            let began = Instant::now();
            let _: String =
                redis::cmd("BGREWRITEAOF").query_async(&mut self.deployment.redis.clone()).await?;
            let meanwhile = self.press(&service, &load).await?;
            live += meanwhile.held;
            until("the file is rewritten", async || Ok(!self.deployment.rewrites().await?)).await?;
            rewrites.push(format!("{:.1} s", began.elapsed().as_secs_f64()));
            crowded.push(full.held_per_second() / empty);
            rewriting.push(meanwhile.held_per_second() / full.held_per_second());
            detail = format!(
                "last run: {:.0}/s with {live} live orders, {empty:.0}/s with none; while the file was \
                 rewritten {:.0}/s, p99 {:.0} ms (else {:.0} ms)",
                full.held_per_second(),
                meanwhile.held_per_second(),
                meanwhile.counted.p99 * 1e3,
                full.counted.p99 * 1e3,
            );
        }
        self.deployment.forget(&sale).await?;
        let took = format!("rewriting and its load took {}", rewrites.join(", "));
        let figure = "orders held in a lane with a million live ones / in an empty one";
        let rate = Row::new(11, figure, Bar::AtLeast(0.8), crowded, detail);
        let figure = "the same while Redis rewrites its file / while it does not";
        Ok(vec![rate, Row::new(12, figure, Bar::None, rewriting, took)])
    }

    /// Rows 13 and 19: as fast as orders are answered, for five minutes, from the second on beside as many holds that end.
    pub async fn drained(&self) -> Result<Vec<Row>> {
        let service = self.deployment.serve("api,relay,writer,sweeper").await?;
        let parts = 5;
        let seconds = self.effort.drained_seconds / parts;
        let sale = service.define(STOCK, seconds).await?;
        let duration = Duration::from_secs(seconds);
        let load = Load { duration, ..self.load(&service.url, &sale) };
        let (mut behind, mut said, mut placed) = (Vec::new(), Vec::new(), 0..=0);
        for _ in 0..parts {
            let pressing = self.press_unchecked(&service, &load);
            let watched = self.watch(&service, &sale, pressing, f64::INFINITY).await?;
            let (part, most) = watched.context("it may be behind")?;
            placed = placed.start() + part.held..=placed.end() + part.most();
            behind.push(most);
            said.push(format!("{:.0}/s, {most:.1} s", part.held_per_second()));
        }
        service.recorded(&sale).await?;
        let recorded = self.deployment.orders(&sale).await?;
        ensure!(placed.contains(&recorded), "{recorded} recorded, of {placed:?} answered");
        self.deployment.forget(&sale).await?;
        let last = behind[behind.len() - 1];
        let before = behind[..behind.len() - 1].iter().copied().fold(LOOK.as_secs_f64(), f64::max);
        let detail = format!("minute by minute, rate and most seconds behind: {}", said.join("; "));
        let figure = "most seconds behind at full rate, in the last of five minutes";
        let most = Row::new(13, figure, Bar::AtMost(1.0), vec![last], detail);
        let figure = "the same / most in the minutes before";
        let growth = Row::new(19, figure, Bar::AtMost(1.1), vec![last / before], String::new());
        Ok(vec![most, growth])
    }

    /// Rows 14 and 15.
    pub async fn weight(&self) -> Result<Vec<Row>> {
        let service = self.deployment.serve("api").await?;
        let sale = service.define(STOCK, HOLD_SECONDS).await?;
        let count = self.effort.connections;
        let before = resident_bytes(service.pid())?;
        let mut connections = Vec::new();
        for _ in 0..count {
            let address = service.url.trim_start_matches("http://");
            let mut connection = TcpStream::connect(address).await?;
            connection.write_all(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n").await?;
            answer(&mut connection).await?;
            connections.push(connection);
        }
        let each = |bytes: u64| bytes as f64 / count as f64;
        let resting = resident_bytes(service.pid())?;
        let mut pause = redis::cmd("CLIENT");
        pause.arg("PAUSE").arg(PAUSE.as_millis() as u64).arg("ALL");
        let _: String = pause.query_async(&mut self.deployment.redis.clone()).await?;
        let paused = Instant::now();
        for (n, connection) in connections.iter_mut().enumerate() {
            connection.write_all(self.order(&service, &sale, n).as_bytes()).await?;
        }
        tokio::time::sleep(PAUSE.saturating_sub(paused.elapsed()) * 2 / 3).await;
        let waiting = resident_bytes(service.pid())?;
        for connection in &mut connections {
            let said = answer(connection).await?;
            ensure!(said.starts_with("HTTP/1.1 201"), "{said}");
        }
        self.deployment.forget(&sale).await?;
        let detail =
            format!("{count} connections that have asked once, {before} bytes before them");
        let rest = vec![each(resting.saturating_sub(before))];
        let rest = Row::new(14, "bytes of a connection that rests", Bar::None, rest, detail);
        let wait = vec![each(waiting.saturating_sub(resting))];
        let detail = format!("on top, {count} orders while Redis does not answer");
        let wait =
            Row::new(15, "bytes of a request that waits for its lane", Bar::None, wait, detail);
        Ok(vec![rest, wait])
    }

    fn order(&self, service: &Service<'_>, sale: &str, n: usize) -> String {
        let body = format!(
            r#"{{"sale_id":"{sale}","buyer_id":"weight-{n}","lines":[{{"sku":"sku","quantity":1}}]}}"#
        );
        format!(
            "POST /v1/orders HTTP/1.1\r\nHost: {}\r\nAuthorization: Bearer {}\r\nIdempotency-Key: {n}\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            service.url,
            self.deployment.orders_key,
            body.len()
        )
    }
}

/// One answer, short enough to come in a piece.
async fn answer(connection: &mut TcpStream) -> Result<String> {
    let mut bytes = vec![0; 4096];
    let read = tokio::time::timeout(Duration::from_secs(10), connection.read(&mut bytes));
    let count = read.await.context("no answer")??;
    Ok(String::from_utf8_lossy(&bytes[..count]).into_owned())
}
