//! The drills. Each is what it does to the stack while callers press on it; it must show that its
//! fault bit (`Scene::bit`) in what it is about (`Drill::must_bite`), or it has proven nothing and fails.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use futures_util::future::LocalBoxFuture;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::books::{self, Rebuild, Record, SEALED, lane_key};
use crate::checker::{Expected, Forgets};
use crate::history::{Entry, Outcome, Request, now_ms};
use crate::parts::{Service, eventually};
use crate::proxy::Replies;
use crate::scene::{Layout, Scene};
use crate::workload::SKUS;

pub struct Drill {
    pub name: &'static str,
    pub about: &'static str,
    /// In the selection that CI runs.
    pub short: bool,
    pub layout: Layout,
    pub expected: Expected,
    /// Without each of these, seen once at least, the drill has not done what it says.
    pub must_bite: &'static [&'static str],
    pub run: for<'a> fn(&'a Scene<'a>) -> LocalBoxFuture<'a, anyhow::Result<()>>,
}

impl Drill {
    /// What had to be seen of the fault, and was not.
    pub fn unbitten(&self, bites: &BTreeMap<&'static str, f64>) -> Vec<&'static str> {
        self.must_bite.iter().copied().filter(|what| !bites.contains_key(what)).collect()
    }
}

const UNANSWERED: &str = "requests without an answer";
const FELT: &str = "requests refused or without an answer";
const WAITED: &str = "events that waited";
const OVERDUE: &str = "holds left overdue";
const DISK_FULL: &str = "times that the disk was found full";
const KEPT_ALONE: &str = "holds kept that were over on Redis' clock alone";
const WENT_BACK: &str = "seconds that Redis' clock went back";
const HELD_UNTOLD: &str = "orders held though their reply was lost";
const ZOMBIE: &str = "events of the zombie found recorded";
const REBALANCES: &str = "rebalances";
const PARKED: &str = "records parked behind it";
const RETRIED: &str = "letters retried";
const SENT_TWICE: &str = "records sent twice";
const UNKNOWN_SCRIPTS: &str = "scripts that Redis did not know";
const WRONG_TYPE: &str = "calls that met a wrong type";
const NO_MEMORY: &str = "orders refused for want of memory";
const DELETED: &str = "records deleted";
const FORGOTTEN: &str = "events that Redis had forgotten";
const NEVER_HAD: &str = "events that the promoted replica never had";
const WITHHELD: &str = "answers withheld";
const SLEPT: &str = "rebuilds that the relay slept through";
const STALE: &str = "records sent of an epoch that was over";
const FINISHED: &str = "rebuilds that another finished";

/// What a drill stages again, where only luck decides whether it bites, and it has not.
const MORE_ROUNDS: u32 = 10;

/// Events that must have piled up before a fault that stops them counts.
const PILED_UP: i64 = 20;

const LAYOUT: Layout = Layout {
    services: WHOLE,
    settings: &[],
    redis: &[],
    replica: false,
    durability: None,
    clocks: false,
    small_disk: None,
};
const EXPECTED: Expected = Expected {
    dead_letters: &[],
    topic_truncated: false,
    forgets: Forgets::Nothing,
    clock_ahead_ms: 0,
};
/// A relay that was slow at a rebuild sends something of the epoch before.
const ECHOES: Expected = Expected { dead_letters: &["stale-epoch"], ..EXPECTED };
/// Redis forgets what it had answered at `memory`, and a report says so.
const REPORTED: Expected = Expected { forgets: Forgets::Reported, ..ECHOES };

/// Two instances that callers ask; one has all the roles.
const WHOLE: &[(&str, &str)] = &[("one", "api,relay,writer,sweeper,reconciler"), ("two", "api")];

pub const DRILLS: &[Drill] = &[
    Drill {
        name: "kill-service",
        about: "SIGKILL of an instance with all roles, again and again",
        short: true,
        layout: LAYOUT,
        expected: EXPECTED,
        must_bite: &[UNANSWERED],
        run: |scene| Box::pin(kill_service(scene)),
    },
    Drill {
        name: "kill-relay",
        about: "SIGKILL of the relay, with events on their way",
        short: false,
        layout: Layout {
            services: &[
                ("one", "api"),
                ("two", "api,writer,sweeper,reconciler"),
                ("relay", "relay"),
            ],
            ..LAYOUT
        },
        expected: EXPECTED,
        must_bite: &[WAITED],
        run: |scene| Box::pin(kill_role(scene, "relay")),
    },
    Drill {
        name: "kill-writer",
        about: "SIGKILL of the writer, with a batch in its hands",
        short: false,
        layout: Layout {
            services: &[
                ("one", "api"),
                ("two", "api,relay,sweeper,reconciler"),
                ("writer", "writer"),
            ],
            ..LAYOUT
        },
        expected: EXPECTED,
        must_bite: &[WAITED],
        run: |scene| Box::pin(kill_role(scene, "writer")),
    },
    Drill {
        name: "kill-sweeper",
        about: "SIGKILL of the sweeper, while holds run out",
        short: false,
        layout: Layout {
            services: &[
                ("one", "api"),
                ("two", "api,relay,writer,reconciler"),
                ("sweeper", "sweeper"),
            ],
            ..LAYOUT
        },
        expected: EXPECTED,
        must_bite: &[OVERDUE],
        run: |scene| Box::pin(kill_role(scene, "sweeper")),
    },
    Drill {
        name: "kill-at-points",
        about: "relay, writer, sweeper and a rebuild die at each point where it may matter",
        short: true,
        layout: Layout {
            services: &[
                ("one", "api"),
                ("two", "api,reconciler"),
                ("relay", "relay"),
                ("writer", "writer"),
                ("sweeper", "sweeper"),
            ],
            ..LAYOUT
        },
        expected: EXPECTED,
        must_bite: &["relay-sent", "writer-committed", "sweeper-expired", "rebuild-proven"],
        run: |scene| Box::pin(kill_at_points(scene)),
    },
    Drill {
        name: "kill-redis-everysec",
        about: "SIGKILL of Redis, appendfsync everysec",
        short: true,
        layout: LAYOUT,
        expected: EXPECTED,
        must_bite: &[FELT],
        run: |scene| Box::pin(kill_redis(scene)),
    },
    Drill {
        name: "kill-redis-always",
        about: "SIGKILL of Redis, appendfsync always",
        short: false,
        layout: Layout { redis: &["--appendfsync", "always"], ..LAYOUT },
        expected: EXPECTED,
        must_bite: &[FELT],
        run: |scene| Box::pin(kill_redis(scene)),
    },
    Drill {
        name: "kill-kafka",
        about: "SIGKILL of Kafka",
        short: false,
        layout: LAYOUT,
        expected: EXPECTED,
        must_bite: &[WAITED],
        run: |scene| Box::pin(kill_server(scene, "kafka")),
    },
    Drill {
        name: "kill-postgres",
        about: "SIGKILL of PostgreSQL",
        short: false,
        layout: LAYOUT,
        expected: EXPECTED,
        must_bite: &[WAITED],
        run: |scene| Box::pin(kill_server(scene, "postgres")),
    },
    Drill {
        name: "full-disk-postgres",
        about: "PostgreSQL's disk is full, and has room again; needs root, to mount a small one",
        short: false,
        layout: Layout { small_disk: Some("postgres"), ..LAYOUT },
        expected: EXPECTED,
        must_bite: &[DISK_FULL, WAITED],
        run: |scene| Box::pin(full_disk(scene, "postgres")),
    },
    Drill {
        name: "full-disk-kafka",
        about: "Kafka's disk is full, and has room again; needs root, to mount a small one",
        short: false,
        layout: Layout { small_disk: Some("kafka"), ..LAYOUT },
        expected: EXPECTED,
        must_bite: &[DISK_FULL, WAITED],
        run: |scene| Box::pin(full_disk(scene, "kafka")),
    },
    Drill {
        name: "clock-steps",
        about: "Redis' clock leaps ahead by 5 minutes, and back by 10; the sweeper's leaps later",
        short: true,
        layout: Layout {
            services: &[
                ("one", "api"),
                ("two", "api,relay,writer,reconciler"),
                ("sweeper", "sweeper"),
            ],
            clocks: true,
            ..LAYOUT
        },
        expected: Expected { clock_ahead_ms: STEP_MS * CLOCK_ROUNDS as i64, ..EXPECTED },
        must_bite: &[KEPT_ALONE, WENT_BACK],
        run: |scene| Box::pin(clock_steps(scene)),
    },
    Drill {
        name: "lost-replies",
        about: "replies of Redis are lost after their requests were carried out",
        short: true,
        layout: LAYOUT,
        expected: EXPECTED,
        must_bite: &[HELD_UNTOLD],
        run: |scene| Box::pin(lost_replies(scene)),
    },
    Drill {
        name: "kafka-away",
        about: "Kafka stays away under load",
        short: false,
        layout: LAYOUT,
        expected: EXPECTED,
        must_bite: &[WAITED],
        run: |scene| Box::pin(away(scene, "kafka")),
    },
    Drill {
        name: "postgres-away",
        about: "PostgreSQL stays away under load",
        short: true,
        layout: LAYOUT,
        expected: EXPECTED,
        must_bite: &[WAITED],
        run: |scene| Box::pin(away(scene, "postgres")),
    },
    Drill {
        name: "slow-postgres",
        about: "PostgreSQL answers each question 300 ms late",
        short: false,
        layout: LAYOUT,
        expected: EXPECTED,
        must_bite: &[WAITED],
        run: |scene| Box::pin(slow_postgres(scene)),
    },
    Drill {
        name: "zombie-writer",
        about: "a writer is stopped (SIGSTOP), loses its partitions to another, and goes on",
        short: false,
        layout: Layout {
            services: &[("one", "api,relay,sweeper,reconciler"), ("zombie", "writer")],
            ..LAYOUT
        },
        expected: EXPECTED,
        must_bite: &[ZOMBIE],
        run: |scene| Box::pin(zombie_writer(scene)),
    },
    Drill {
        name: "rebalance-storm",
        about: "writers come and go",
        short: false,
        layout: LAYOUT,
        expected: EXPECTED,
        must_bite: &[REBALANCES],
        run: |scene| Box::pin(rebalance_storm(scene)),
    },
    Drill {
        name: "poison-record",
        about: "a record that the database refuses, and its retry once it does not",
        short: true,
        layout: LAYOUT,
        expected: EXPECTED,
        must_bite: &[PARKED, RETRIED],
        run: |scene| Box::pin(poison_record(scene)),
    },
    Drill {
        name: "two-relays",
        about: "a relay is stopped (SIGSTOP) beyond its lease, another takes its lane, it goes on",
        short: true,
        layout: Layout {
            services: &[
                ("one", "api,writer,sweeper,reconciler"),
                ("first", "relay"),
                ("second", "relay"),
            ],
            ..LAYOUT
        },
        expected: EXPECTED,
        must_bite: &[SENT_TWICE],
        run: |scene| Box::pin(two_relays(scene)),
    },
    Drill {
        name: "script-flush",
        about: "SCRIPT FLUSH, again and again",
        short: true,
        layout: LAYOUT,
        expected: EXPECTED,
        must_bite: &[UNKNOWN_SCRIPTS],
        run: |scene| Box::pin(script_flush(scene)),
    },
    Drill {
        name: "wrong-types",
        about: "each key of the lane is a string for a moment",
        short: true,
        layout: LAYOUT,
        expected: EXPECTED,
        must_bite: &[WRONG_TYPE],
        run: |scene| Box::pin(wrong_types(scene)),
    },
    Drill {
        name: "full-redis",
        about: "Redis reaches maxmemory",
        short: true,
        layout: LAYOUT,
        expected: EXPECTED,
        must_bite: &[NO_MEMORY],
        run: |scene| Box::pin(full_redis(scene)),
    },
    Drill {
        name: "truncated-topic",
        about: "records are deleted from the topic before they are recorded",
        short: false,
        layout: Layout {
            services: &[
                ("one", "api,sweeper,reconciler"),
                ("relay", "relay"),
                ("writer", "writer"),
            ],
            ..LAYOUT
        },
        expected: Expected { topic_truncated: true, ..EXPECTED },
        must_bite: &[DELETED],
        run: |scene| Box::pin(truncated_topic(scene)),
    },
    Drill {
        name: "empty-restart",
        about: "Redis starts again without its files",
        short: true,
        layout: LAYOUT,
        expected: REPORTED,
        must_bite: &[FORGOTTEN],
        run: |scene| Box::pin(empty_restart(scene)),
    },
    Drill {
        name: "old-rdb",
        about: "Redis starts again from an old snapshot",
        short: false,
        layout: Layout { redis: &["--appendonly", "no"], ..LAYOUT },
        expected: REPORTED,
        must_bite: &[FORGOTTEN],
        run: |scene| Box::pin(old_rdb(scene)),
    },
    Drill {
        name: "cut-aof",
        about: "Redis starts again on an append-only file that lacks its end",
        short: true,
        layout: LAYOUT,
        expected: REPORTED,
        must_bite: &[FORGOTTEN],
        run: |scene| Box::pin(cut_aof(scene)),
    },
    Drill {
        name: "forgotten-tail",
        about: "Redis loses what nothing had relayed; two instances that answered it live",
        short: true,
        layout: TAIL,
        expected: REPORTED,
        must_bite: &[FORGOTTEN],
        run: |scene| Box::pin(forgotten_tail(scene)),
    },
    Drill {
        name: "fresh-fleet",
        about: "the same, and every process that answered dies with it",
        short: false,
        layout: TAIL,
        expected: Expected { forgets: Forgets::Untold, ..ECHOES },
        must_bite: &[FORGOTTEN],
        run: |scene| Box::pin(fresh_fleet(scene)),
    },
    Drill {
        name: "fail-over-replicated",
        about: "the primary dies with a replica that lags, which is promoted; answers at `replicated`",
        short: true,
        layout: Layout {
            replica: true,
            durability: Some("replicated"),
            settings: &[("HTTP__DURABILITY_TIMEOUT_MS", "1000")],
            ..LAYOUT
        },
        expected: REPORTED,
        must_bite: &[WITHHELD, NEVER_HAD],
        run: |scene| Box::pin(fail_over_replicated(scene)),
    },
    Drill {
        name: "fail-over-memory",
        about: "the same at `memory`, with the relay dead: orders are lost, and named",
        short: false,
        layout: Layout { replica: true, ..TAIL },
        expected: REPORTED,
        must_bite: &[NEVER_HAD],
        run: |scene| Box::pin(fail_over_memory(scene)),
    },
    Drill {
        name: "relay-sleeps",
        about: "a relay is stopped (SIGSTOP) across a rebuild of its lane; it may send old events, or have none",
        short: false,
        layout: TAIL,
        expected: REPORTED,
        must_bite: &[FORGOTTEN, SLEPT],
        run: |scene| Box::pin(relay_sleeps(scene)),
    },
    Drill {
        name: "reconciler-sleeps",
        about: "a reconciler is stopped (SIGSTOP) in the middle of a rebuild, another finishes it",
        short: false,
        layout: Layout {
            services: &[
                ("one", "api,relay,writer,sweeper"),
                ("two", "api"),
                ("sleeper", "reconciler"),
            ],
            ..LAYOUT
        },
        expected: REPORTED,
        must_bite: &[FINISHED],
        run: |scene| Box::pin(reconciler_sleeps(scene)),
    },
];

/// Two instances that see different things, and a relay that can be taken from them.
const TAIL: Layout = Layout {
    services: &[("one", "api"), ("two", "api,writer,sweeper,reconciler"), ("relay", "relay")],
    ..LAYOUT
};

/// Lets a random number of answers pass, so that faults fall anywhere.
struct Moments(StdRng);

impl Moments {
    fn of(scene: &Scene<'_>) -> Self {
        Self(StdRng::seed_from_u64(scene.extent.seed))
    }

    async fn next(&mut self, scene: &Scene<'_>) -> anyhow::Result<()> {
        scene.answered(self.0.random_range(3..30)).await
    }
}

async fn kill_service(scene: &Scene<'_>) -> anyhow::Result<()> {
    let mut moments = Moments::of(scene);
    for _ in 0..scene.extent.times {
        moments.next(scene).await?;
        let began = scene.fault();
        scene.service("one").kill();
        scene.service("one").start_again().await?;
        scene.mended(began).await?;
        scene.bit(UNANSWERED, scene.unknown_since(began) as f64);
    }
    Ok(())
}

/// How far what a role does lies behind: it is 0 or nearly so while the role runs.
async fn behind(scene: &Scene<'_>, role: &str) -> anyhow::Result<i64> {
    let seq = scene.mark("seq").await?;
    Ok(match role {
        "relay" | "kafka" => seq - scene.mark("logged").await?,
        "writer" | "postgres" => seq - scene.mark("recorded").await?,
        _ => {
            let mut overdue = redis::cmd("ZCOUNT");
            overdue.arg(lane_key(&scene.sale, "deadlines")).arg(0).arg(now_ms() - 1_000);
            scene.redis.ask(&overdue).await?
        }
    })
}

async fn kill_role(scene: &Scene<'_>, role: &'static str) -> anyhow::Result<()> {
    let mut moments = Moments::of(scene);
    for _ in 0..scene.extent.times {
        moments.next(scene).await?;
        let began = scene.fault();
        scene.service(role).kill();
        piled_up(scene, role).await?;
        scene.service(role).start_again().await?;
        scene.mended(began).await?;
    }
    Ok(())
}

/// Waits until what the role or server would have done lies undone.
async fn piled_up(scene: &Scene<'_>, role: &str) -> anyhow::Result<()> {
    let wanted = if role == "sweeper" { 1 } else { PILED_UP };
    let what = format!("work piles up for {role}");
    eventually(&what, async || behind(scene, role).await.is_ok_and(|left| left >= wanted)).await?;
    let what = if role == "sweeper" { OVERDUE } else { WAITED };
    scene.bit(what, behind(scene, role).await? as f64);
    Ok(())
}

async fn kill_redis(scene: &Scene<'_>) -> anyhow::Result<()> {
    let mut moments = Moments::of(scene);
    for _ in 0..scene.extent.times {
        moments.next(scene).await?;
        let began = scene.fault();
        scene.redis.kill();
        scene.redis.start_again().await?;
        scene.mended(began).await?;
        let felt = scene.unknown_since(began) + scene.refused_since(began, "unavailable");
        scene.bit(FELT, felt as f64);
    }
    Ok(())
}

async fn kill_server(scene: &Scene<'_>, server: &'static str) -> anyhow::Result<()> {
    let mut moments = Moments::of(scene);
    for _ in 0..scene.extent.times {
        moments.next(scene).await?;
        let began = scene.fault();
        tokio::task::block_in_place(|| scene.stack.kill(server))?;
        piled_up(scene, server).await?;
        tokio::task::block_in_place(|| scene.stack.up(server))?;
        scene.mended(began).await?;
    }
    Ok(())
}

async fn away(scene: &Scene<'_>, server: &'static str) -> anyhow::Result<()> {
    let began = scene.fault();
    tokio::task::block_in_place(|| scene.stack.kill(server))?;
    let gone = now_ms();
    tokio::time::sleep(scene.extent.away).await;
    piled_up(scene, server).await?;
    sold_since(scene, gone)?;
    tokio::task::block_in_place(|| scene.stack.up(server))?;
    scene.mended(began).await
}

/// Selling went on since then.
fn sold_since(scene: &Scene<'_>, since_ms: i64) -> anyhow::Result<()> {
    if scene.newly_placed_since(since_ms) == 0 {
        bail!("nothing was sold meanwhile");
    }
    Ok(())
}

/// A server that ended itself is started again once there is room, as whoever runs it would do.
async fn full_disk(scene: &Scene<'_>, server: &'static str) -> anyhow::Result<()> {
    let mut moments = Moments::of(scene);
    for _ in 0..scene.extent.times.min(3) {
        moments.next(scene).await?;
        let (began, before) = (scene.fault(), scene.stack.complaints_of_disk(server)?);
        tokio::task::block_in_place(|| scene.stack.fill_disk())?;
        eventually(&format!("{server} finds its disk full"), async || {
            scene.stack.complaints_of_disk(server).is_ok_and(|now| now > before)
        })
        .await?;
        scene.bit(DISK_FULL, 1.0);
        let full = now_ms();
        piled_up(scene, server).await?;
        sold_since(scene, full)?;
        scene.stack.free_disk()?;
        eventually(&format!("{server} runs"), async || {
            tokio::task::block_in_place(|| scene.stack.up(server)).is_ok()
        })
        .await?;
        scene.mended(began).await?;
    }
    Ok(())
}

/// Where a process dies, and at its how many-th passing at most; the seed says at which.
const POINTS: [(&str, u32); 10] = [
    ("relay-read", 6),       // nothing of it sent
    ("relay-sent", 6),       // acknowledged, the lane not told
    ("writer-written", 4),   // not committed
    ("writer-committed", 4), // the offsets not
    ("sweeper-expired", 3),  // done, its answer not heeded
    ("rebuild-taken", 1),    // the epoch, nothing else
    ("rebuild-claimed", 1),  // frozen under its token
    ("rebuild-sealed", 1),
    ("rebuild-chunk", 4),  // a part of the lane written
    ("rebuild-proven", 1), // not opened
];

/// Each process dies by itself where it is told to, and is started again. A rebuild is begun by an
/// operator on an open lane, so nothing may be lost; the role finishes what it left.
async fn kill_at_points(scene: &Scene<'_>) -> anyhow::Result<()> {
    let mut moments = Moments::of(scene);
    // A round is ten deaths.
    for _ in 0..scene.extent.times.div_ceil(4) {
        for (point, passing_max) in POINTS {
            moments.next(scene).await?;
            let passing = moments.0.random_range(1..=passing_max);
            let (role, _) = point.split_once('-').context("a point begins with its role")?;
            let began = scene.fault();
            if role == "rebuild" {
                let rebuild = ["rebuild", scene.sale.as_str()];
                tokio::task::block_in_place(|| scene.holdfast_dies(&rebuild, (point, passing)))?;
            } else {
                let service = scene.service(role);
                service.terminate().await?;
                service.die_at(point, passing).await?;
                service.start_again().await?;
            }
            scene.bit(point, 1.0);
            scene.mended(began).await?;
        }
    }
    Ok(())
}

const STEP_MS: i64 = 300_000;
const CLOCK_ROUNDS: u32 = 3;
/// Holds that must have been kept before the sweeper's clock leaps as well.
const KEPT: i64 = 5;

/// Round by round the clocks of Redis and the sweeper go further ahead of everybody else's.
async fn clock_steps(scene: &Scene<'_>) -> anyhow::Result<()> {
    let clocks = scene.clocks.as_ref().context("the layout has clocks")?;
    let mut moments = Moments::of(scene);
    let mut ahead_ms = 0;
    for _ in 0..scene.extent.times.min(CLOCK_ROUNDS) {
        moments.next(scene).await?;
        let began = scene.fault();
        // Holds that are over on Redis' clock, and not on the sweeper's.
        let sweeper_ahead_ms = ahead_ms;
        let kept = async || -> anyhow::Result<i64> {
            let mut count = redis::cmd("ZCOUNT");
            count.arg(lane_key(&scene.sale, "deadlines")).arg(now_ms() + sweeper_ahead_ms + 1_000);
            scene.redis.ask(count.arg(scene.redis.time_ms().await? - 1_000)).await
        };
        let before = scene.redis.time_ms().await?;
        ahead_ms += STEP_MS;
        clocks.redis.set(ahead_ms)?;
        let leapt = scene.redis.time_ms().await? - before;
        if leapt < STEP_MS {
            bail!("Redis' clock did not leap: {leapt} ms");
        }
        scene.bit("seconds that Redis' clock leapt ahead", (leapt / 1000) as f64);
        let enough = async || kept().await.is_ok_and(|kept| kept >= KEPT);
        eventually("holds are kept though Redis' clock says that they are over", enough).await?;
        scene.bit(KEPT_ALONE, kept().await? as f64);
        clocks.sweeper.set(ahead_ms)?;
        let none = async || kept().await.is_ok_and(|kept| kept == 0);
        eventually("they are ended once the sweeper's clock says so, too", none).await?;
        let before = scene.redis.time_ms().await?;
        clocks.redis.set(ahead_ms - 2 * STEP_MS)?;
        let back = before - scene.redis.time_ms().await?;
        if back < STEP_MS {
            bail!("Redis' clock did not go back: {back} ms");
        }
        scene.bit(WENT_BACK, (back / 1000) as f64);
        // The lane's time stands still meanwhile: the checker finds one that went back.
        let went_back = now_ms();
        scene.settled().await?;
        sold_since(scene, went_back)?;
        clocks.redis.set(ahead_ms)?;
        scene.mended(began).await?;
    }
    Ok(())
}

async fn lost_replies(scene: &Scene<'_>) -> anyhow::Result<()> {
    let mut moments = Moments::of(scene);
    let found = || found_again(&scene.history().entries());
    let times = scene.extent.times;
    // Which replies are lost, of orders or of others, luck decides.
    for round in 0..times + MORE_ROUNDS {
        if round >= times && found() > 0 {
            break;
        }
        moments.next(scene).await?;
        let (began, lost) = (scene.fault(), scene.to_redis.lost());
        scene.to_redis.replies(Replies::Lose);
        let enough = async || scene.to_redis.lost() >= lost + 3;
        eventually("replies are lost", enough).await?;
        scene.to_redis.replies(Replies::Pass);
        scene.mended(began).await?;
    }
    scene.bit("replies lost", scene.to_redis.lost() as f64);
    scene.bit(HELD_UNTOLD, found() as f64);
    Ok(())
}

/// Orders whose placing was not answered, and was found done when it was sent again.
fn found_again(history: &[Entry]) -> usize {
    let placed = |entry: &&Entry| matches!(entry.request, Request::Place { .. });
    let unknown: Vec<_> = history
        .iter()
        .filter(placed)
        .filter(|entry| entry.reply.outcome == Outcome::Unknown)
        .collect();
    let again = history.iter().filter(placed).filter(|entry| entry.reply.replayed);
    again
        .filter(|entry| {
            let same = |one: &&&Entry| one.request == entry.request && one.sent_ms < entry.sent_ms;
            let first = history.iter().find(|one| one.request == entry.request);
            unknown.iter().any(|one| same(&one))
                && first.is_some_and(|first| first.reply.outcome == Outcome::Unknown)
        })
        .map(|entry| entry.reply.order().map(|order| order.id.to_owned()))
        .collect::<HashSet<_>>()
        .len()
}

async fn slow_postgres(scene: &Scene<'_>) -> anyhow::Result<()> {
    let began = scene.fault();
    scene.to_postgres.replies(Replies::Delay(Duration::from_millis(300)));
    tokio::time::sleep(scene.extent.away / 4).await;
    piled_up(scene, "postgres").await?;
    scene.to_postgres.replies(Replies::Pass);
    scene.mended(began).await
}

/// What a writer has found done by another when it came to do it.
async fn overtaken(writer: &Service) -> anyhow::Result<f64> {
    let repeats = writer.metric("holdfast_writer_repeats_total").await?;
    Ok(repeats + writer.metric("holdfast_writer_marks_moved_total").await?)
}

/// Whether this writer has so many partitions.
async fn has_partitions(writer: &Service, count: f64) -> bool {
    let assigned = writer.metric("holdfast_consumer_assigned_partitions").await;
    assigned.is_ok_and(|assigned| assigned >= count)
}

async fn zombie_writer(scene: &Scene<'_>) -> anyhow::Result<()> {
    let zombie = scene.service("zombie");
    let other = scene.another("other", "writer").await?;
    let mut moments = Moments::of(scene);
    for _ in 0..scene.extent.times.min(3) {
        // It must have the lane's partition to be stopped in the middle of its work.
        eventually("each writer has partitions", async || {
            has_partitions(zombie, 1.0).await && has_partitions(&other, 1.0).await
        })
        .await?;
        moments.next(scene).await?;
        let before = (overtaken(zombie).await?, overtaken(&other).await?);
        let began = scene.fault();
        // Whichever has the lane's partition stands still: `recorded` does, too.
        let (stopped, goes_on) =
            if writes_the_lane(zombie, scene).await? { (zombie, &other) } else { (&other, zombie) };
        stopped.freeze()?;
        piled_up(scene, "writer").await?;
        eventually("the other writer has all partitions", async || {
            has_partitions(goes_on, 3.0).await
        })
        .await?;
        stopped.thaw()?;
        scene.mended(began).await?;
        let after = (overtaken(zombie).await?, overtaken(&other).await?);
        let stale = after.0 - before.0 + after.1 - before.1;
        scene.bit(ZOMBIE, stale);
    }
    other.terminate().await
}

/// Whether this writer applies events now.
async fn writes_the_lane(writer: &Service, scene: &Scene<'_>) -> anyhow::Result<bool> {
    let before = writer.metric("holdfast_writer_events_total").await?;
    let seq = scene.mark("seq").await?;
    eventually("something is recorded", async || {
        scene.recorded().await.is_ok_and(|recorded| recorded >= seq)
    })
    .await?;
    Ok(writer.metric("holdfast_writer_events_total").await? > before)
}

async fn rebalance_storm(scene: &Scene<'_>) -> anyhow::Result<()> {
    let first = scene.service("one");
    let before = first.metric("holdfast_consumer_rebalances_total").await?;
    let mut moments = Moments::of(scene);
    for _ in 0..scene.extent.times {
        let began = scene.fault();
        let other = scene.another("other", "writer").await?;
        eventually("the other writer has partitions", async || has_partitions(&other, 1.0).await)
            .await?;
        moments.next(scene).await?;
        other.terminate().await?;
        scene.mended(began).await?;
    }
    let after = first.metric("holdfast_consumer_rebalances_total").await?;
    scene.bit(REBALANCES, after - before);
    Ok(())
}

async fn poison_record(scene: &Scene<'_>) -> anyhow::Result<()> {
    let database = &scene.database;
    for round in 0..scene.extent.times.min(3) {
        let began = scene.fault();
        let poison =
            "ALTER TABLE orders ADD CONSTRAINT poison CHECK (buyer_id <> 'poison') NOT VALID";
        sqlx::query(poison).execute(database).await?;
        let request = Request::Place {
            sale: scene.sale.clone(),
            buyer: "poison".into(),
            key: format!("poison-{round}"),
            lines: [(SKUS[0].to_owned(), 1)].into(),
            hold_seconds: None,
        };
        eventually("the poisonous order is placed", async || {
            // A paused sale refuses it for a moment.
            scene.callee.send("poisoner", 0, &request).await.outcome == Outcome::Ok
        })
        .await?;
        let query = "SELECT id FROM dead_letters
            WHERE status = 'open' AND reason = 'not-applicable' ORDER BY id LIMIT 1";
        let letter = async || -> Option<i64> {
            sqlx::query_scalar(query).fetch_optional(database).await.ok()?
        };
        eventually("there is a dead letter", async || letter().await.is_some()).await?;
        let parked = async || -> sqlx::Result<i64> {
            sqlx::query_scalar("SELECT count(*) FROM parked").fetch_one(database).await
        };
        let enough = async || parked().await.is_ok_and(|count| count >= PILED_UP);
        eventually("what follows is parked", enough).await?;
        scene.bit(PARKED, parked().await? as f64);
        sqlx::query("ALTER TABLE orders DROP CONSTRAINT poison").execute(database).await?;
        // Its later steps, if it ran out meanwhile, wait behind it as everything does.
        let id = letter().await.context("the dead letter is gone")?.to_string();
        scene.holdfast(&["dead-letters", "retry", &id])?;
        scene.bit(RETRIED, 1.0);
        scene.mended(began).await?;
    }
    Ok(())
}

async fn two_relays(scene: &Scene<'_>) -> anyhow::Result<()> {
    let relays = [scene.service("first"), scene.service("second")];
    let mut moments = Moments::of(scene);
    let times = scene.extent.times;
    // Whether it was stopped with records on their way, luck decides.
    for round in 0..times + MORE_ROUNDS {
        if round >= times && sent_twice(&records(scene).await?) > 0 {
            break;
        }
        moments.next(scene).await?;
        let first_has_it = relays[0].metric("holdfast_relay_lanes").await? >= 1.0;
        let (holder, next) =
            if first_has_it { (relays[0], relays[1]) } else { (relays[1], relays[0]) };
        let began = scene.fault();
        holder.freeze()?;
        eventually("the other relay takes the lane", async || {
            next.metric("holdfast_relay_lanes").await.is_ok_and(|lanes| lanes >= 1.0)
        })
        .await?;
        holder.thaw()?;
        scene.mended(began).await?;
        eventually("the relay that was stopped sees that it lost the lane", async || {
            holder.metric("holdfast_relay_lanes").await.is_ok_and(|lanes| lanes == 0.0)
        })
        .await?;
        scene.bit("leases lost to another", 1.0);
    }
    scene.bit(SENT_TWICE, sent_twice(&records(scene).await?) as f64);
    Ok(())
}

/// What is in the topic so far.
async fn records(scene: &Scene<'_>) -> anyhow::Result<Vec<Record>> {
    let (brokers, topic, sale) = (scene.stack.brokers(), scene.topic.clone(), scene.sale.clone());
    let topic = tokio::task::spawn_blocking(move || books::topic(&brokers, &topic, &sale));
    Ok(topic.await??.records)
}

fn sent_twice(records: &[Record]) -> usize {
    let places: HashSet<_> = records.iter().map(|record| (record.epoch, record.seq)).collect();
    records.len() - places.len()
}

/// Records that stand behind one of a later epoch: who sent them had slept through a rebuild.
fn stale(records: &[Record]) -> usize {
    let mut in_order: Vec<_> = records.iter().filter(|record| record.kind != SEALED).collect();
    in_order.sort_by_key(|record| (record.partition, record.offset));
    let mut latest = HashMap::new();
    let is_stale = |record: &&&Record| {
        let latest = latest.entry(record.partition).or_insert(record.epoch);
        *latest = record.epoch.max(*latest);
        record.epoch < *latest
    };
    in_order.iter().filter(is_stale).count()
}

async fn script_flush(scene: &Scene<'_>) -> anyhow::Result<()> {
    let mut moments = Moments::of(scene);
    // A server that has just been started knows none either.
    let unknown = async || scene.redis.info("errorstats", "errorstat_NOSCRIPT").await;
    let before = unknown().await?;
    for _ in 0..scene.extent.times {
        let began = scene.fault();
        scene.redis.ask::<()>(redis::cmd("SCRIPT").arg("FLUSH")).await?;
        moments.next(scene).await?;
        scene.mended(began).await?;
    }
    scene.bit(UNKNOWN_SCRIPTS, (unknown().await? - before) as f64);
    Ok(())
}

/// Nothing could be put back of a key that is not there, as that of no deadlines: it stays as it is.
const PUT_A_STRING: &str = "if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
    redis.call('RENAME', KEYS[1], KEYS[2])
    redis.call('SET', KEYS[1], 'x')
    return 1";

async fn wrong_types(scene: &Scene<'_>) -> anyhow::Result<()> {
    let errors = async || scene.redis.info("errorstats", "errorstat_WRONGTYPE").await;
    let mut moments = Moments::of(scene);
    let keys = ["stock", "buyers", "orders", "deadlines", "outbox"];
    for key in keys.iter().cycle().take(keys.len().max(scene.extent.times as usize)) {
        moments.next(scene).await?;
        let (began, before) = (scene.fault(), errors().await?);
        let (name, aside) = (lane_key(&scene.sale, key), lane_key(&scene.sale, "aside"));
        let mut change = redis::cmd("EVAL");
        change.arg(PUT_A_STRING).arg(2).arg(&name).arg(&aside);
        eventually(&format!("the lane has {key}"), async || {
            scene.redis.ask::<bool>(&change).await.is_ok_and(|done| done)
        })
        .await?;
        let met = eventually(&format!("somebody meets the wrong type of {key}"), async || {
            errors().await.is_ok_and(|now| now > before)
        })
        .await;
        scene.redis.ask::<()>(redis::cmd("RENAME").arg(&aside).arg(&name)).await?;
        met?;
        scene.mended(began).await?;
        scene.bit(WRONG_TYPE, (errors().await? - before) as f64);
    }
    Ok(())
}

async fn full_redis(scene: &Scene<'_>) -> anyhow::Result<()> {
    let limit = async |bytes: u64| {
        let mut set = redis::cmd("CONFIG");
        scene.redis.ask::<()>(set.arg("SET").arg("maxmemory").arg(bytes)).await
    };
    for _ in 0..scene.extent.times.min(5) {
        let began = scene.fault();
        limit(scene.redis.info("memory", "used_memory").await?).await?;
        eventually("new orders are refused", async || scene.refused_since(began, "overloaded") > 5)
            .await?;
        let since = now_ms();
        eventually("what was held is settled all the same", async || {
            scene.history().count_since(since, |entry| {
                let settles = entry.request.settles();
                settles && entry.sent_ms >= since && entry.reply.outcome == Outcome::Ok
            }) > 5
        })
        .await?;
        limit(1 << 30).await?;
        scene.mended(began).await?;
        scene.bit(NO_MEMORY, scene.refused_since(began, "overloaded") as f64);
    }
    Ok(())
}

/// Where Redis keeps its append-only files.
const AOF: &str = "appendonlydir";

/// Reports about the lane so far.
async fn reports(scene: &Scene<'_>) -> anyhow::Result<Vec<Rebuild>> {
    books::rebuilds(&scene.database, &scene.sale).await
}

/// Waits until a report beyond so many says that the lane is open again.
async fn reopened(scene: &Scene<'_>, before: usize) -> anyhow::Result<Rebuild> {
    let open = async || -> Option<Rebuild> {
        let reports = reports(scene).await.ok()?;
        let mut new = reports.into_iter().skip(before);
        new.find(|report| ["opened", "rebuilt"].contains(&report.outcome.as_str()))
    };
    eventually("the lane is opened anew", async || open().await.is_some()).await?;
    open().await.context("the report is gone")
}

/// Of a Redis that forgot something: how long the lane stays shut is counted from `up`.
struct Outage {
    began: i64,
    up: i64,
}

/// Redis is killed, its files are put as `harm` leaves them, and it starts again: it must not sell before
/// the lane was opened anew.
async fn restart_forgetful(
    scene: &Scene<'_>,
    harm: impl FnOnce(&Path) -> anyhow::Result<()>,
) -> anyhow::Result<Outage> {
    let (began, before) = (scene.fault(), reports(scene).await?.len());
    let seq = scene.mark("seq").await?;
    scene.redis.kill();
    harm(scene.redis.dir())?;
    scene.redis.start_again().await?;
    let up = now_ms();
    let report = reopened(scene, before).await?;
    let forgot = seq - report.seq_before.unwrap_or_default();
    scene.bit(FORGOTTEN, forgot as f64);
    scene
        .bit("requests refused by a frozen lane", scene.refused_since(began, "lane-frozen") as f64);
    Ok(Outage { began, up })
}

fn copy_files(from: &Path, to: &Path) -> anyhow::Result<()> {
    if to.exists() {
        std::fs::remove_dir_all(to)?;
    }
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        std::fs::copy(entry.path(), to.join(entry.file_name()))?;
    }
    Ok(())
}

async fn empty_restart(scene: &Scene<'_>) -> anyhow::Result<()> {
    let mut moments = Moments::of(scene);
    for _ in 0..scene.extent.times.min(5) {
        moments.next(scene).await?;
        let harm = |dir: &Path| Ok(std::fs::remove_dir_all(dir.join(AOF))?);
        let outage = restart_forgetful(scene, harm).await?;
        scene.mended_from(outage.began, outage.up).await?;
    }
    Ok(())
}

async fn old_rdb(scene: &Scene<'_>) -> anyhow::Result<()> {
    for _ in 0..scene.extent.times.min(5) {
        scene.redis.ask::<()>(&redis::cmd("SAVE")).await?;
        scene.settled().await?;
        let outage = restart_forgetful(scene, |_| Ok(())).await?;
        scene.mended_from(outage.began, outage.up).await?;
    }
    Ok(())
}

async fn cut_aof(scene: &Scene<'_>) -> anyhow::Result<()> {
    for _ in 0..scene.extent.times.min(5) {
        scene.settled().await?;
        let outage = restart_forgetful(scene, cut_tail).await?;
        scene.mended_from(outage.began, outage.up).await?;
    }
    Ok(())
}

/// Takes away the last quarter of what Redis has appended since its last rewrite.
fn cut_tail(dir: &Path) -> anyhow::Result<()> {
    let entries: Vec<_> = std::fs::read_dir(dir.join(AOF))?.collect::<Result<_, _>>()?;
    let mut names: Vec<_> = entries.iter().map(std::fs::DirEntry::path).collect();
    names.retain(|path| path.to_string_lossy().ends_with(".incr.aof"));
    names.sort();
    let path = names.last().context("there is no append-only file")?;
    let file = std::fs::File::options().write(true).open(path)?;
    let length = file.metadata()?.len();
    Ok(file.set_len(length - length / 4)?)
}

/// Redis loses what nobody else has seen but those who answered it: nothing relayed it.
async fn forgotten_tail(scene: &Scene<'_>) -> anyhow::Result<()> {
    let aside = scene.redis.dir().join("aside");
    scene.service("relay").kill();
    copy_files(&scene.redis.dir().join(AOF), &aside)?;
    scene.settled().await?;
    let harm = |dir: &Path| copy_files(&aside, &dir.join(AOF));
    let outage = restart_forgetful(scene, harm).await?;
    scene.service("relay").start_again().await?;
    scene.mended_from(outage.began, outage.up).await
}

/// The same, and everybody who could tell dies with it.
async fn fresh_fleet(scene: &Scene<'_>) -> anyhow::Result<()> {
    let aside = scene.redis.dir().join("aside");
    scene.service("relay").kill();
    copy_files(&scene.redis.dir().join(AOF), &aside)?;
    scene.settled().await?;
    let (began, seq) = (scene.fault(), scene.mark("seq").await?);
    scene.stop_services();
    scene.redis.kill();
    copy_files(&aside, &scene.redis.dir().join(AOF))?;
    scene.redis.start_again().await?;
    let up = now_ms();
    scene.bit(FORGOTTEN, (seq - scene.mark("seq").await?) as f64);
    let before = reports(scene).await?.len();
    scene.start_services().await?;
    reopened(scene, before).await?;
    scene.mended_from(began, up).await
}

/// The primary dies while its replica lags, and the replica takes its place, with one of its own behind it.
async fn promote(scene: &Scene<'_>) -> anyhow::Result<Outage> {
    let (began, before) = (scene.fault(), reports(scene).await?.len());
    let seq = scene.mark("seq").await?;
    let replica = scene.replica.as_ref().context("the layout has a replica")?;
    scene.redis.kill();
    replica.ask::<()>(redis::cmd("REPLICAOF").arg("NO").arg("ONE")).await?;
    scene.add_replica(replica.port).await?;
    scene.to_redis.lead_to(replica.port);
    let up = now_ms();
    let report = reopened(scene, before).await?;
    let forgot = seq - report.seq_before.unwrap_or_default();
    scene.bit(NEVER_HAD, forgot as f64);
    scene
        .bit("requests refused by a frozen lane", scene.refused_since(began, "lane-frozen") as f64);
    Ok(Outage { began, up })
}

async fn fail_over_replicated(scene: &Scene<'_>) -> anyhow::Result<()> {
    let began = scene.fault();
    scene.to_primary.replies(Replies::Lose);
    let withheld = async || scene.unknown_since(began) >= 10;
    eventually("answers are withheld", withheld).await?;
    scene.bit(WITHHELD, scene.unknown_since(began) as f64);
    let outage = promote(scene).await?;
    scene.mended_from(outage.began, outage.up).await
}

async fn fail_over_memory(scene: &Scene<'_>) -> anyhow::Result<()> {
    scene.service("relay").kill();
    scene.to_primary.replies(Replies::Lose);
    scene.settled().await?;
    let outage = promote(scene).await?;
    scene.service("relay").start_again().await?;
    scene.mended_from(outage.began, outage.up).await
}

/// A relay that is stopped while its lane is rebuilt may have events of the old epoch in its hands. That it
/// sends them cannot be brought about from outside: where it does, it is counted.
async fn relay_sleeps(scene: &Scene<'_>) -> anyhow::Result<()> {
    let relay = scene.service("relay");
    let mut moments = Moments::of(scene);
    for _ in 0..scene.extent.times.min(5) {
        moments.next(scene).await?;
        relay.freeze()?;
        scene.answered(20).await?;
        let harm = |dir: &Path| Ok(std::fs::remove_dir_all(dir.join(AOF))?);
        let outage = restart_forgetful(scene, harm).await?;
        relay.thaw()?;
        scene.mended_from(outage.began, outage.up).await?;
        scene.bit(SLEPT, 1.0);
    }
    scene.bit(STALE, stale(&records(scene).await?) as f64);
    Ok(())
}

/// A reconciler that is stopped in the middle of a rebuild, which another finishes.
async fn reconciler_sleeps(scene: &Scene<'_>) -> anyhow::Result<()> {
    let sleeper = scene.service("sleeper");
    let epoch = async || -> anyhow::Result<i64> {
        let epoch = sqlx::query_scalar("SELECT epoch FROM lanes WHERE sale_id = $1");
        Ok(epoch.bind(&scene.sale).fetch_one(&scene.database).await?)
    };
    let (began, before) = (scene.fault(), epoch().await?);
    let reports_before = reports(scene).await?.len();
    scene.redis.kill();
    std::fs::remove_dir_all(scene.redis.dir().join(AOF))?;
    scene.redis.start_again().await?;
    let up = now_ms();
    eventually("a rebuild has begun", async || epoch().await.is_ok_and(|now| now > before)).await?;
    sleeper.freeze()?;
    if reports(scene).await?.len() > reports_before {
        bail!("the rebuild was over before it could be stopped");
    }
    let other = scene.another("other", "reconciler").await?;
    reopened(scene, reports_before).await?;
    scene.bit(FINISHED, 1.0);
    sleeper.thaw()?;
    scene.mended_from(began, up).await?;
    other.terminate().await
}

/// Kafka's records are deleted before the writer has read them; the relay that comes next sends them again.
async fn truncated_topic(scene: &Scene<'_>) -> anyhow::Result<()> {
    let mut moments = Moments::of(scene);
    for _ in 0..scene.extent.times.min(5) {
        moments.next(scene).await?;
        let began = scene.fault();
        scene.service("writer").kill();
        let recorded = scene.recorded().await?;
        eventually("Kafka has what the database lacks", async || {
            scene.mark("logged").await.is_ok_and(|logged| logged >= recorded + PILED_UP)
        })
        .await?;
        scene.service("relay").kill();
        let deleted = books::delete_records(&scene.stack.brokers(), &scene.topic).await?;
        scene.bit(DELETED, deleted as f64);
        scene.service("relay").start_again().await?;
        scene.service("writer").start_again().await?;
        scene.mended(began).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_drill_says_what_it_must_do_and_a_weaker_bite_does_not_stand_for_it() {
        for drill in DRILLS {
            assert!(!drill.must_bite.is_empty(), "{} need not bite", drill.name);
            let mut bites = BTreeMap::from([("something else", 1.0)]);
            assert_eq!(drill.unbitten(&bites), drill.must_bite, "{}", drill.name);
            bites.extend(drill.must_bite.iter().map(|&what| (what, 1.0)));
            assert!(drill.unbitten(&bites).is_empty(), "{}", drill.name);
        }
    }

    #[test]
    fn a_record_is_stale_behind_one_of_a_later_epoch_in_its_partition() {
        let record = |partition, offset, epoch, kind: &str| Record {
            partition,
            offset,
            kind: kind.into(),
            epoch,
            seq: offset,
            at_ms: 0,
            data: serde_json::Value::Null,
        };
        let mut records = vec![
            record(0, 0, 1, "order.held"),
            record(0, 1, 1, SEALED),
            record(0, 2, 2, "order.held"),
            record(0, 3, 2, "order.held"),
            record(1, 9, 1, "order.held"),
        ];
        assert_eq!(stale(&records), 0);
        records.insert(0, record(0, 4, 1, "order.held"));
        assert_eq!(stale(&records), 1);
    }
}
