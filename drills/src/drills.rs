//! The drills. Each is what it does to the stack while callers press on it; it must show that its
//! fault bit (`Scene::bit`) in what it is about (`Drill::must_bite`), or it has proven nothing and fails.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use futures_util::future::LocalBoxFuture;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::books::{self, Rebuild, Record, lane_key};
use crate::checker::{Expected, Forgets, level, stale};
use crate::history::{Entry, Level, Outcome, Request, now_ms};
use crate::parts::{Service, eventually};
use crate::proxy::Replies;
use crate::scene::{Layout, Scene};
use crate::workload::{Asks, SKUS};

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
const STALE: &str = "lost events sent though their epoch was over";
const STALE_REFUSED: &str = "of them refused";
const FINISHED: &str = "rebuilds that another finished";
const OVERTAKEN: &str = "rebuilds given up by who had slept";
const AT_LOGGED: &str = "changes answered at `logged` before the loss";
const AT_RECORDED: &str = "changes answered at `recorded` before the loss";
const KAFKA_ALONE: &str = "changes answered at `logged` that only Kafka had";

/// What a drill stages again, where only luck decides whether it bites, and it has not.
const MORE_ROUNDS: u32 = 10;

/// Events that must have piled up before a fault that stops them counts.
const PILED_UP: i64 = 20;

const LAYOUT: Layout = Layout {
    services: WHOLE,
    settings: &[],
    redis: &[],
    replica: false,
    asks: Asks::Nothing,
    clocks: false,
    small_disk: None,
};
const EXPECTED: Expected = Expected {
    dead_letters: &[],
    topic_truncated: false,
    forgets: Forgets::Nothing,
    forgot_ms: None,
    survives: Level::Replicated,
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
                ("two", "api"),
                ("relay", "relay"),
                ("writer", "writer"),
                ("sweeper", "sweeper"),
                ("rebuild", "reconciler"),
            ],
            ..LAYOUT
        },
        expected: EXPECTED,
        must_bite: &[
            "relay-read",
            "relay-sent",
            "writer-written",
            "writer-committed",
            "sweeper-expired",
            "rebuild-taken",
            "rebuild-claimed",
            "rebuild-sealed",
            "rebuild-chunk",
            "rebuild-proven",
            "rebuild-taken of the role",
            "rebuild-claimed of the role",
            "rebuild-sealed of the role",
            "rebuild-chunk of the role",
            "rebuild-proven of the role",
        ],
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
        layout: Layout { asks: HIGHER, settings: IMPATIENT, ..LAYOUT },
        expected: REPORTED,
        must_bite: &[FORGOTTEN, AT_LOGGED, AT_RECORDED],
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
        layout: Layout { asks: HIGHER, settings: IMPATIENT, ..TAIL },
        expected: REPORTED,
        must_bite: &[FORGOTTEN, AT_LOGGED, AT_RECORDED],
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
        name: "logged-survives",
        about: "Redis forgets everything while only Kafka has what was answered at `logged`",
        short: true,
        layout: LEVELS,
        expected: REPORTED,
        must_bite: &[FORGOTTEN, KAFKA_ALONE, AT_RECORDED],
        run: |scene| Box::pin(redis_lost(scene, false)),
    },
    Drill {
        name: "recorded-survives",
        about: "Redis forgets everything, and Kafka what is not recorded",
        short: false,
        layout: LEVELS,
        // Kafka had acknowledged some of it, so that nobody remembers who was told of it.
        expected: Expected {
            forgets: Forgets::Untold,
            survives: Level::Recorded,
            topic_truncated: true,
            ..ECHOES
        },
        must_bite: &[FORGOTTEN, DELETED, KAFKA_ALONE, AT_RECORDED],
        run: |scene| Box::pin(redis_lost(scene, true)),
    },
    Drill {
        name: "fail-over-replicated",
        about: "the primary dies with a replica that lags, which is promoted; answers at `replicated`",
        short: true,
        layout: Layout {
            replica: true,
            asks: Asks::Always("replicated"),
            settings: IMPATIENT,
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
        layout: Layout { replica: true, asks: HIGHER, settings: IMPATIENT, ..TAIL },
        expected: REPORTED,
        must_bite: &[NEVER_HAD, AT_LOGGED, AT_RECORDED],
        run: |scene| Box::pin(fail_over_memory(scene)),
    },
    Drill {
        name: "relay-sleeps",
        about: "a relay is stopped with events in its hands, and sends them when its lane was rebuilt",
        short: false,
        layout: TAIL,
        expected: REPORTED,
        must_bite: &[FORGOTTEN, STALE, STALE_REFUSED],
        run: |scene| Box::pin(relay_sleeps(scene)),
    },
    Drill {
        name: "reconciler-sleeps",
        about: "a reconciler is stopped in the middle of a rebuild, another finishes it, and it goes on",
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
        must_bite: &[FINISHED, OVERTAKEN],
        run: |scene| Box::pin(reconciler_sleeps(scene)),
    },
];

/// Two instances that see different things, and a relay that can be taken from them.
const TAIL: Layout = Layout {
    services: &[("one", "api"), ("two", "api,writer,sweeper,reconciler"), ("relay", "relay")],
    ..LAYOUT
};

/// The same, with a writer that can be taken, too.
const LEVELS: Layout = Layout {
    services: &[
        ("one", "api"),
        ("two", "api,sweeper,reconciler"),
        ("relay", "relay"),
        ("writer", "writer"),
    ],
    asks: HIGHER,
    settings: IMPATIENT,
    ..LAYOUT
};
const HIGHER: Asks = Asks::Sometimes(&["logged", "recorded"]);
/// Callers learn soon that a level is not reached.
const IMPATIENT: &[(&str, &str)] = &[("HTTP__DURABILITY_TIMEOUT_MS", "1000")];

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
        scene.stack.kill(server).await?;
        piled_up(scene, server).await?;
        scene.stack.up(server).await?;
        scene.mended(began).await?;
    }
    Ok(())
}

async fn away(scene: &Scene<'_>, server: &'static str) -> anyhow::Result<()> {
    let began = scene.fault();
    scene.stack.kill(server).await?;
    let gone = now_ms();
    tokio::time::sleep(scene.extent.away).await;
    piled_up(scene, server).await?;
    sold_since(scene, gone)?;
    scene.stack.up(server).await?;
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
        eventually(&format!("{server} runs"), async || scene.stack.up(server).await.is_ok())
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

/// How it is said that the role's own rebuild died there, as that of an operator did.
const POINTS_OF_ROLE: [(&str, &str); 5] = [
    ("rebuild-taken", "rebuild-taken of the role"),
    ("rebuild-claimed", "rebuild-claimed of the role"),
    ("rebuild-sealed", "rebuild-sealed of the role"),
    ("rebuild-chunk", "rebuild-chunk of the role"),
    ("rebuild-proven", "rebuild-proven of the role"),
];

/// Each process dies by itself where it is told to, and is started again. A rebuild is begun by an
/// operator on an open lane, so nothing may be lost; the role finishes what it left, or dies of the same
/// and finishes it when it is started again.
async fn kill_at_points(scene: &Scene<'_>) -> anyhow::Result<()> {
    let mut moments = Moments::of(scene);
    // A round is ten deaths, and five of the role beside.
    for _ in 0..scene.extent.times.div_ceil(4) {
        for (point, passing_max) in POINTS {
            moments.next(scene).await?;
            let passing = moments.0.random_range(1..=passing_max);
            let (role, _) = point.split_once('-').context("a point begins with its role")?;
            let began = scene.fault();
            if role == "rebuild" {
                let rebuild = ["rebuild", scene.sale.as_str()];
                scene.holdfast_dies(&rebuild, (point, passing)).await?;
            } else {
                let service = scene.service(role);
                service.terminate().await?;
                service.die_at(point, passing).await?;
                service.start_again().await?;
            }
            scene.bit(point, 1.0);
            scene.mended(began).await?;
        }
        for (point, bite) in POINTS_OF_ROLE {
            moments.next(scene).await?;
            let most = POINTS.iter().find(|(name, _)| *name == point).map_or(1, |(_, most)| *most);
            let passing = moments.0.random_range(1..=most);
            let (began, role) = (scene.fault(), scene.service("rebuild"));
            role.terminate().await?;
            // A lane that an operator left half written: the role writes all of it anew.
            let rebuild = ["rebuild", scene.sale.as_str()];
            scene.holdfast_dies(&rebuild, ("rebuild-chunk", 1)).await?;
            role.die_at(point, passing).await?;
            scene.bit(bite, 1.0);
            role.start_again().await?;
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
            scene.callee.send("poisoner", 0, &request, None).await.outcome == Outcome::Ok
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
        scene.holdfast(&["dead-letters", "retry", &id]).await?;
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
    /// Where the lane stood, and how many reports there were of it.
    seq: i64,
    reports: usize,
}

impl Outage {
    /// Redis is killed, its files are put as `harm` leaves them, and it starts again.
    async fn of(
        scene: &Scene<'_>,
        harm: impl FnOnce(&Path) -> anyhow::Result<()>,
    ) -> anyhow::Result<Self> {
        let (began, reports) = (scene.fault(), reports(scene).await?.len());
        let seq = scene.mark("seq").await?;
        scene.redis.kill();
        scene.forgets();
        harm(scene.redis.dir())?;
        scene.redis.start_again().await?;
        Ok(Self { began, up: now_ms(), seq, reports })
    }

    /// It must not sell before the lane was opened anew.
    async fn reopened(&self, scene: &Scene<'_>, lost: &'static str) -> anyhow::Result<()> {
        let report = reopened(scene, self.reports).await?;
        scene.bit(lost, (self.seq - report.seq_before.unwrap_or_default()) as f64);
        let refused = scene.refused_since(self.began, "lane-frozen");
        scene.bit("requests refused by a frozen lane", refused as f64);
        Ok(())
    }

    async fn mended(&self, scene: &Scene<'_>) -> anyhow::Result<()> {
        scene.mended_from(self.began, self.up).await
    }
}

/// What callers had been promised when Redis forgot: the checker demands that it is there.
pub fn levels_bit(scene: &Scene<'_>) {
    let Some(forgot_ms) = scene.forgot_ms() else { return };
    let entries = scene.history().entries();
    let before = entries.iter().filter(|entry| entry.answered_ms < forgot_ms);
    for entry in before {
        match entry.reply.applied {
            Some(Level::Logged) => scene.bit(AT_LOGGED, 1.0),
            Some(Level::Recorded) => scene.bit(AT_RECORDED, 1.0),
            _ => {}
        }
    }
}

/// A Redis without its files.
fn empty(dir: &Path) -> anyhow::Result<()> {
    Ok(std::fs::remove_dir_all(dir.join(AOF))?)
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

/// Redis is started again on what `harm` leaves of its files, again and again.
async fn restart_forgetful(
    scene: &Scene<'_>,
    harm: impl FnOnce(&Path) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let outage = Outage::of(scene, harm).await?;
    outage.reopened(scene, FORGOTTEN).await?;
    outage.mended(scene).await
}

async fn empty_restart(scene: &Scene<'_>) -> anyhow::Result<()> {
    let mut moments = Moments::of(scene);
    for _ in 0..scene.extent.times.min(5) {
        moments.next(scene).await?;
        restart_forgetful(scene, empty).await?;
    }
    Ok(())
}

async fn old_rdb(scene: &Scene<'_>) -> anyhow::Result<()> {
    for _ in 0..scene.extent.times.min(5) {
        scene.redis.ask::<()>(&redis::cmd("SAVE")).await?;
        scene.settled().await?;
        restart_forgetful(scene, |_| Ok(())).await?;
    }
    Ok(())
}

async fn cut_aof(scene: &Scene<'_>) -> anyhow::Result<()> {
    for _ in 0..scene.extent.times.min(5) {
        scene.settled().await?;
        restart_forgetful(scene, cut_tail).await?;
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
    let outage = Outage::of(scene, harm).await?;
    outage.reopened(scene, FORGOTTEN).await?;
    scene.service("relay").start_again().await?;
    outage.mended(scene).await
}

/// The same, and everybody who could tell dies with it.
async fn fresh_fleet(scene: &Scene<'_>) -> anyhow::Result<()> {
    let aside = scene.redis.dir().join("aside");
    scene.service("relay").kill();
    copy_files(&scene.redis.dir().join(AOF), &aside)?;
    scene.settled().await?;
    scene.stop_services();
    let outage = Outage::of(scene, |dir| copy_files(&aside, &dir.join(AOF))).await?;
    scene.bit(FORGOTTEN, (outage.seq - scene.mark("seq").await?) as f64);
    scene.start_services().await?;
    reopened(scene, outage.reports).await?;
    outage.mended(scene).await
}

/// Answers at `logged` that must have been given while nothing was recorded.
const LOGGED_ALONE: usize = 5;

/// Redis loses everything. Of what was answered some is in no more than Kafka, some nowhere, and where Kafka
/// loses what it has as well only what is recorded is left.
async fn redis_lost(scene: &Scene<'_>, kafka_too: bool) -> anyhow::Result<()> {
    let mut moments = Moments::of(scene);
    let (relay, writer) = (scene.service("relay"), scene.service("writer"));
    for _ in 0..scene.extent.times.min(5) {
        moments.next(scene).await?;
        writer.kill();
        let recorded = scene.recorded().await?;
        let since = now_ms();
        let logged = || {
            scene.history().count_since(since, |entry| {
                let seq_is_new = entry.sent_ms >= since && !entry.reply.replayed;
                seq_is_new && level(entry) == Level::Logged
            })
        };
        eventually("answers are given at `logged`", async || logged() >= LOGGED_ALONE).await?;
        scene.bit(KAFKA_ALONE, logged() as f64);
        relay.kill();
        // These stand in Redis alone.
        scene.answered(20).await?;
        if kafka_too {
            let deleted = books::delete_records(&scene.stack.brokers(), &scene.topic).await?;
            scene.bit(DELETED, deleted as f64);
        }
        let outage = Outage::of(scene, empty).await?;
        if scene.recorded().await? != recorded {
            bail!("something was recorded without a writer");
        }
        writer.start_again().await?;
        relay.start_again().await?;
        outage.reopened(scene, FORGOTTEN).await?;
        outage.mended(scene).await?;
    }
    Ok(())
}

/// The primary dies while its replica lags, and the replica takes its place, with one of its own behind it.
async fn promote(scene: &Scene<'_>) -> anyhow::Result<Outage> {
    let (began, reports) = (scene.fault(), reports(scene).await?.len());
    let seq = scene.mark("seq").await?;
    let replica = scene.replica.as_ref().context("the layout has a replica")?;
    scene.redis.kill();
    scene.forgets();
    replica.ask::<()>(redis::cmd("REPLICAOF").arg("NO").arg("ONE")).await?;
    scene.add_replica(replica.port).await?;
    scene.to_redis.lead_to(replica.port);
    let outage = Outage { began, up: now_ms(), seq, reports };
    outage.reopened(scene, NEVER_HAD).await?;
    Ok(outage)
}

async fn fail_over_replicated(scene: &Scene<'_>) -> anyhow::Result<()> {
    let began = scene.fault();
    scene.to_primary.replies(Replies::Lose);
    let withheld = async || scene.unknown_since(began) >= 10;
    eventually("answers are withheld", withheld).await?;
    scene.bit(WITHHELD, scene.unknown_since(began) as f64);
    promote(scene).await?.mended(scene).await
}

async fn fail_over_memory(scene: &Scene<'_>) -> anyhow::Result<()> {
    scene.service("relay").kill();
    scene.to_primary.replies(Replies::Lose);
    scene.settled().await?;
    let outage = promote(scene).await?;
    scene.service("relay").start_again().await?;
    outage.mended(scene).await
}

/// A relay stops itself with events in its hands that nobody else has. Redis loses them, the lane is opened
/// under another epoch, and the relay sends them all the same: the writer must refuse each.
async fn relay_sleeps(scene: &Scene<'_>) -> anyhow::Result<()> {
    let relay = scene.service("relay");
    let mut moments = Moments::of(scene);
    for _ in 0..scene.extent.times.min(5) {
        moments.next(scene).await?;
        let passing = moments.0.random_range(1..=6);
        relay.terminate().await?;
        relay.start_to_stop_at("relay-read", passing)?;
        relay.stopped().await?;
        scene.answered(20).await?;
        let outage = Outage::of(scene, empty).await?;
        outage.reopened(scene, FORGOTTEN).await?;
        let before = echoes(scene).await?.0;
        relay.thaw()?;
        // Its other repeats say only what is recorded.
        eventually("what the relay had read comes out, and is refused", async || {
            echoes(scene).await.is_ok_and(|(sent, refused)| sent > before && refused == sent)
        })
        .await?;
        outage.mended(scene).await?;
    }
    let (sent, refused) = echoes(scene).await?;
    scene.bit(STALE, sent as f64);
    scene.bit(STALE_REFUSED, refused as f64);
    Ok(())
}

/// Records of an epoch that was over when they were sent, and that say what is recorded nowhere; and how many
/// of them the writer refused.
async fn echoes(scene: &Scene<'_>) -> anyhow::Result<(usize, usize)> {
    let records = records(scene).await?;
    let database = books::database(&scene.database, &scene.sale).await?;
    let recorded: HashSet<_> = database.ledger.iter().map(|row| (row.epoch, row.seq)).collect();
    let refused: HashSet<_> = database
        .dead_letters
        .iter()
        .filter(|letter| letter.reason == "stale-epoch")
        .map(|letter| (letter.partition, letter.offset))
        .collect();
    let lost = |record: &&Record| !recorded.contains(&(record.epoch, record.seq));
    let echoes: Vec<_> = stale(&records).filter(lost).collect();
    let are_refused =
        echoes.iter().filter(|record| refused.contains(&(record.partition, record.offset))).count();
    Ok((echoes.len(), are_refused))
}

/// Where a reconciler stops: it has taken the lane, and not yet opened it.
const ASLEEP_AT: [&str; 4] =
    ["rebuild-claimed", "rebuild-sealed", "rebuild-chunk", "rebuild-proven"];

/// A reconciler stops itself in the middle of a rebuild, which another finishes. Then it goes on, and must
/// find that it has lost the lane.
async fn reconciler_sleeps(scene: &Scene<'_>) -> anyhow::Result<()> {
    let sleeper = scene.service("sleeper");
    let mut moments = Moments::of(scene);
    for _ in 0..scene.extent.times.min(5) {
        moments.next(scene).await?;
        let point = ASLEEP_AT[moments.0.random_range(0..ASLEEP_AT.len())];
        sleeper.terminate().await?;
        sleeper.start_to_stop_at(point, 1)?;
        sleeper.ready().await?;
        let outage = Outage::of(scene, empty).await?;
        sleeper.stopped().await?;
        let other = scene.another("other", "reconciler").await?;
        outage.reopened(scene, FORGOTTEN).await?;
        scene.bit(FINISHED, 1.0);
        let given_up = async || -> anyhow::Result<bool> {
            let reports = reports(scene).await?;
            Ok(reports.iter().skip(outage.reports).any(|report| report.outcome == "failed"))
        };
        if given_up().await? {
            bail!("a rebuild failed though nobody was in its way");
        }
        sleeper.thaw()?;
        let gives_up = async || given_up().await.unwrap_or_default();
        eventually("who had slept gives its rebuild up", gives_up).await?;
        scene.bit(OVERTAKEN, 1.0);
        outage.mended(scene).await?;
        other.terminate().await?;
    }
    Ok(())
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
}
