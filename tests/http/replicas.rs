//! `durability=replicated`, on a Redis of the test's own and a replica of it.

use std::net::TcpListener;
use std::process::Command;

use holdfast::config::Config;
use redis::AsyncCommands;
use redis::aio::MultiplexedConnection;
use reqwest::Method;
use serde_json::json;

use crate::redis_server::RedisServer;
use crate::stack::{Reply, Stack, unique, until};

const PREFER: &str = "durability=replicated";

/// A primary and its replica.
struct Pair {
    primary: RedisServer,
    replica: RedisServer,
    /// Of the replica.
    pid: String,
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.resume();
    }
}

async fn connect(server: &RedisServer) -> MultiplexedConnection {
    let client = redis::Client::open(server.url()).unwrap();
    client.get_multiplexed_async_connection().await.unwrap()
}

/// What a server says of itself under this name.
async fn info(server: &RedisServer, name: &str) -> String {
    let mut redis = connect(server).await;
    let text: String = redis::cmd("INFO").query_async(&mut redis).await.unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_default().to_owned()
}

fn signal(pid: &str, name: &str) {
    let status = Command::new("kill").args([name, pid]).status().unwrap();
    assert!(status.success(), "{name} {pid}");
}

impl Pair {
    async fn start() -> Self {
        // A replica finds its primary by TCP only.
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let options = [
            ("port", port.to_string()),
            ("bind", "127.0.0.1".into()),
            ("repl-diskless-sync-delay", "0".into()),
        ];
        let primary = RedisServer::start(&options.each_ref().map(|(n, v)| (*n, v.as_str())));
        let replica = RedisServer::start(&[("replicaof", &format!("127.0.0.1 {port}"))]);
        until("the replica has caught up", async || {
            info(&replica, "master_link_status").await == "up"
        })
        .await;
        // Until its first acknowledgement, a second later, it is sent nothing more.
        let () = connect(&primary).await.set("began", "yes").await.unwrap();
        until("the replica is sent what happens", async || {
            connect(&replica).await.exists("began").await.unwrap()
        })
        .await;
        let pid = info(&replica, "process_id").await;
        Self { primary, replica, pid }
    }

    fn pause(&self) {
        signal(&self.pid, "-STOP");
    }

    fn resume(&self) {
        signal(&self.pid, "-CONT");
    }

    async fn stack(&self, name: &str, change: impl FnOnce(&mut Config)) -> Stack {
        let stack = Stack::with(name, |config| {
            config.redis.url = self.primary.url();
            config.redis.replicas = 1;
            change(config);
        })
        .await;
        stack.define(1_000, json!({})).await;
        stack
    }

    /// The lane's seq and its orders, as the replica has them.
    async fn replicated(&self, stack: &Stack) -> (u64, u64) {
        let key = |part| format!("hf1:{{{}/0}}:{part}", stack.sale);
        let mut pipe = redis::pipe();
        pipe.cmd("HGET").arg(key("lane")).arg("seq").cmd("HLEN").arg(key("orders"));
        pipe.query_async(&mut connect(&self.replica).await).await.unwrap()
    }

    /// How often the primary's data were changed.
    async fn changes(&self) -> u64 {
        info(&self.primary, "rdb_changes_since_last_save").await.parse().unwrap()
    }
}

async fn place(stack: &Stack, key: &str, prefer: &str) -> Reply {
    let call = stack.call(Method::POST, "/v1/orders", &stack.orders_key);
    let call = call.header("Idempotency-Key", key).header("Prefer", prefer);
    let lines = json!([{"sku": "a", "quantity": 1}]);
    call.json(json!({"sale_id": stack.sale, "buyer_id": "b", "lines": lines})).send().await
}

#[track_caller]
fn is_replicated(reply: &Reply) {
    assert_eq!(reply.status, 201, "{reply:?}");
    assert_eq!(reply.body["durability"], "replicated", "{reply:?}");
    assert_eq!(reply.header("preference-applied"), PREFER, "{reply:?}");
}

#[tokio::test]
async fn the_replica_has_an_order_that_was_answered_so() {
    let pair = Pair::start().await;
    let stack = pair.stack("replicated", |_| {}).await;
    for n in 1..=20 {
        is_replicated(&place(&stack, &unique("k"), PREFER).await);
        assert_eq!(pair.replicated(&stack).await, (n + 1, n));
    }
    let keys: Vec<_> = (0..150).map(|_| unique("k")).collect();
    let crowd = keys.iter().map(|key| place(&stack, key, PREFER));
    let crowd = futures_util::future::join_all(crowd).await;
    crowd.iter().for_each(is_replicated);
    assert_eq!(pair.replicated(&stack).await, (171, 170));
}

#[tokio::test]
async fn without_the_replica_nothing_is_answered_so_and_a_replay_proves_it_later() {
    let pair = Pair::start().await;
    let stack = pair
        .stack("frozen", |config| {
            config.http.durability_timeout_ms = 300;
            config.redis.response_timeout_ms = 1_000;
        })
        .await;
    is_replicated(&place(&stack, "before", PREFER).await);
    pair.pause();
    place(&stack, "k", PREFER).await.is(503, "outcome-unknown");
    // Nothing is written for it but the mark: that it is the same order proves nothing.
    place(&stack, "k", PREFER).await.is(503, "outcome-unknown");
    let proven = place(&stack, "before", PREFER).await;
    is_replicated(&proven);
    let refused =
        json!({"sale_id": stack.sale, "buyer_id": "b", "lines": [{"sku": "a", "quantity": 999}]});
    let call = stack.post("/v1/orders").header("Idempotency-Key", "x").header("Prefer", PREFER);
    call.json(refused).send().await.is(409, "sold-out");
    let memory = place(&stack, "other", "").await;
    assert_eq!((memory.status.as_u16(), &memory.body["durability"]), (201, &json!("memory")));
    pair.resume();
    until("a replay proves it", async || {
        let again = place(&stack, "k", PREFER).await;
        assert_eq!(again.status == 201, again.header("idempotent-replayed") == "true");
        again.status == 201
    })
    .await;
    assert_eq!(pair.replicated(&stack).await, (4, 3), "each order once");
}

#[tokio::test]
async fn calls_that_wait_for_the_replica_keep_no_other_waiting() {
    let pair = Pair::start().await;
    let stack = pair
        .stack("beside", |config| {
            config.http.durability_timeout_ms = 20_000;
            config.redis.response_timeout_ms = 20_000;
            config.redis.connect_timeout_ms = 20_000;
            config.redis.pool_max = 2;
        })
        .await;
    pair.pause();
    let blocked = async |count: &str| {
        let what = format!("{count} calls wait for the replica");
        until(&what, async || info(&pair.primary, "blocked_clients").await == count).await;
    };
    let place = async |prefer| place(&stack, &unique("k"), prefer).await;
    let second = async {
        blocked("1").await;
        place(PREFER).await
    };
    let rest = async {
        blocked("2").await;
        futures_util::future::join_all((0..20).map(|_| place(PREFER))).await
    };
    let beside = async {
        blocked("2").await;
        for _ in 0..20 {
            assert_eq!(place("").await.body["durability"], "memory");
        }
        assert_eq!(info(&pair.primary, "blocked_clients").await, "2", "they still wait");
        pair.resume();
    };
    let (first, second, rest, ()) = tokio::join!(place(PREFER), second, rest, beside);
    [first, second].iter().chain(&rest).for_each(is_replicated);
}

#[tokio::test]
async fn what_is_proven_is_told_by_later_answers_and_proven_once() {
    let pair = Pair::start().await;
    let stack = pair.stack("mark", |_| {}).await;
    let memory = place(&stack, "k", "").await;
    assert_eq!(memory.body["durability"], "memory");
    let before = pair.changes().await;
    is_replicated(&place(&stack, "k", PREFER).await);
    assert_eq!(pair.changes().await, before + 1, "the mark, which the replica is asked for");
    is_replicated(&place(&stack, "k", PREFER).await);
    assert_eq!(pair.changes().await, before + 1, "it was proven before");
    let shown = stack.get(&format!("/v1/orders/{}", memory.id())).send().await;
    assert_eq!(shown.body["durability"], "replicated");

    // Another process knows it once the lane was told, with the next call that is proven.
    is_replicated(&place(&stack, "next", PREFER).await);
    let other = pair.stack("other", |_| {}).await;
    let marks = other.lanes.marks(&stack.lane()).await.unwrap();
    assert_eq!((marks.seq, marks.replicated), (3, 2));
}

#[tokio::test]
async fn every_replica_that_could_be_promoted_must_have_it() {
    let pair = Pair::start().await;
    let stack = pair
        .stack("two", |config| {
            config.redis.replicas = 2;
            // What counts is what WAIT says, and not that it says nothing.
            config.redis.response_timeout_ms = 500;
            config.http.durability_timeout_ms = 60_000;
        })
        .await;
    place(&stack, "k", PREFER).await.is(503, "outcome-unknown");
}

#[tokio::test]
async fn a_primary_that_dies_before_its_replica_has_it_leaves_the_outcome_unknown() {
    let pair = Pair::start().await;
    let stack = pair.stack("dies", |c| c.redis.response_timeout_ms = 10_000).await;
    pair.pause();
    let dying = async {
        until("a call waits for the replica", async || {
            info(&pair.primary, "blocked_clients").await == "1"
        })
        .await;
        signal(&info(&pair.primary, "process_id").await, "-KILL");
    };
    let (placed, ()) = tokio::join!(place(&stack, "k", PREFER), dying);
    placed.is(503, "outcome-unknown");
}

#[tokio::test]
async fn a_script_that_redis_has_forgotten_is_proven_all_the_same() {
    let pair = Pair::start().await;
    let stack = pair.stack("forgotten", |_| {}).await;
    is_replicated(&place(&stack, "k", PREFER).await);
    for n in 2..6 {
        let mut redis = connect(&pair.primary).await;
        let () = redis::cmd("SCRIPT").arg("FLUSH").query_async(&mut redis).await.unwrap();
        is_replicated(&place(&stack, &unique("k"), PREFER).await);
        assert_eq!(pair.replicated(&stack).await, (n + 1, n));
    }
}

#[tokio::test]
async fn a_primary_that_goes_on_without_its_replicas_is_warned_of() {
    let pair = Pair::start().await;
    let stack = pair.stack("warned", |_| {}).await;
    let warned = async |replicas| {
        let server = stack.lanes.check_server().await.unwrap();
        server.warnings(replicas).iter().any(|warning| warning.contains("min-replicas-to-write"))
    };
    assert!(warned(1).await);
    assert!(!warned(0).await);
    let mut set = redis::cmd("CONFIG");
    set.arg("SET").arg("min-replicas-to-write").arg(1);
    let () = set.query_async(&mut connect(&pair.primary).await).await.unwrap();
    assert!(!warned(1).await);
}
