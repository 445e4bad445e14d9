//! What a durability level costs: the same load, answered once an order has got so far, beside the
//! same answered at `memory`. On servers where there is something to prove: a Redis of its own,
//! with a replica.

use std::net::TcpListener;

use anyhow::Result;
use redis::AsyncCommands;

use crate::redis_server::RedisServer;
use crate::report::{Bar, Row, median};
use crate::rows::{Bench, HOLD_SECONDS, Pressed, STOCK};
use crate::service::{Service, until};
use crate::wrk::{Counted, Load};

/// A primary and its replica, both gone when dropped.
pub struct Pair {
    pub primary: RedisServer,
    _replica: RedisServer,
}

impl Pair {
    /// Returns once the replica acknowledges what the primary writes.
    pub async fn start() -> Result<Self> {
        // A replica finds its primary by TCP only.
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port().to_string();
        // To disk as the other rows' server, and a replica has its first copy at once.
        let primary = RedisServer::start(&[
            ("port", &port),
            ("bind", "127.0.0.1"),
            ("appendonly", "yes"),
            ("appendfsync", "everysec"),
            ("repl-diskless-sync-delay", "0"),
        ]);
        let replica = RedisServer::start(&[("replicaof", &format!("127.0.0.1 {port}"))]);
        let client = redis::Client::open(primary.url())?;
        let mut redis = client.get_multiplexed_async_connection().await?;
        until("the replica has what the primary wrote", async || {
            let () = redis.set("began", "yes").await?;
            let has: u64 = redis::cmd("WAIT").arg(1).arg(100).query_async(&mut redis).await?;
            Ok(has == 1)
        })
        .await?;
        Ok(Self { primary, _replica: replica })
    }
}

/// A level, what it needs, and how it is judged.
struct Level {
    number: u32,
    name: &'static str,
    roles: &'static str,
    bar: Bar,
    figure: &'static str,
}

const LEVELS: [Level; 3] = [
    Level {
        number: 16,
        name: "replicated",
        roles: "api",
        bar: Bar::AtLeast(0.8),
        figure: "orders held at replicated / at memory, api alone",
    },
    Level {
        number: 17,
        name: "logged",
        roles: "api,relay,writer,sweeper",
        bar: Bar::None,
        figure: "orders held at logged / at memory, all roles",
    },
    Level {
        number: 18,
        name: "recorded",
        roles: "api,relay,writer,sweeper",
        bar: Bar::None,
        figure: "orders held at recorded / at memory, all roles",
    },
];

impl Bench<'_> {
    /// Rows 16, 17 and 18, as far as they are wanted.
    pub async fn durability(&self, wanted: impl Fn(u32) -> bool) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        for level in LEVELS.iter().filter(|level| wanted(level.number)) {
            rows.push(self.level(level).await?);
        }
        Ok(rows)
    }

    async fn level(&self, level: &Level) -> Result<Row> {
        let service = self.deployment.serve(level.roles).await?;
        self.answers_say(&service, level.name).await?;
        let (mut ratios, mut p50, mut p99) = (Vec::new(), Vec::new(), Vec::new());
        let mut detail = String::new();
        for _ in 0..self.effort.runs {
            let memory = self.press_level(&service, level, "memory").await?;
            let proven = self.press_level(&service, level, level.name).await?;
            ratios.push(proven.held_per_second() / memory.held_per_second());
            p50.push(proven.counted.p50 / memory.counted.p50);
            p99.push(proven.counted.p99 / memory.counted.p99);
            let said = |pressed: &Pressed| {
                let Counted { p50, p99, .. } = pressed.counted;
                let rate = pressed.held_per_second();
                format!("{rate:.0}/s, p50 {:.1} ms, p99 {:.1} ms", p50 * 1e3, p99 * 1e3)
            };
            detail = format!(
                "p50 times {:.1}, p99 times {:.1}; last run: {}, memory {}",
                median(&p50),
                median(&p99),
                said(&proven),
                said(&memory)
            );
        }
        Ok(Row::new(level.number, level.figure, level.bar, ratios, detail))
    }

    /// Waits until an order is answered at this level, as soon as Kafka has forgotten the writer of the
    /// row before: what is measured is what is asked for.
    async fn answers_say(&self, service: &Service<'_>, level: &str) -> Result<()> {
        let sale = service.define(STOCK, HOLD_SECONDS).await?;
        let says = format!(r#""durability":"{level}""#);
        until("an order gets as far as was asked", async || {
            let (status, order) = service.place_at(&sale, "first", level).await?;
            Ok(status == 201 && order.contains(&says))
        })
        .await
    }

    /// New orders on a sale of their own, which leaves Redis once whatever runs beside is done with it.
    async fn press_level(
        &self,
        service: &Service<'_>,
        level: &Level,
        prefer: &str,
    ) -> Result<Pressed> {
        let sale = service.define(STOCK, HOLD_SECONDS).await?;
        let load = Load { level: prefer, ..self.load(&service.url, &sale) };
        let pressed = self.press(service, &load).await?;
        if level.roles.contains("writer") {
            service.recorded(&sale).await?;
        }
        self.deployment.forget(&sale).await?;
        Ok(pressed)
    }
}
