//! What may die, and what must not be lost. Each test that takes a server away has a stack of its
//! own.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use futures_util::future::join_all;
use reqwest::StatusCode;
use serde_json::json;

use crate::support::{Deployment, PrivateStack, Servers, Service, eventually, sigkill};

/// Orders that were answered 201, and how many were not answered at all.
#[derive(Default)]
struct Load {
    answered: Mutex<Vec<String>>,
    unknown: AtomicU64,
    refused: AtomicU64,
    buyers: AtomicU64,
    stop: AtomicBool,
}

impl Load {
    fn answered(&self) -> usize {
        self.answered.lock().expect("no panic in a client").len()
    }

    /// Buyers order one unit each, from 16 connections, until told to stop.
    async fn run(&self, service: &Service<'_>, sale: &str) {
        join_all((0..16).map(|_| self.client(service, sale))).await;
    }

    async fn client(&self, service: &Service<'_>, sale: &str) {
        while !self.stop.load(Ordering::Relaxed) {
            let buyer = format!("u-{}", self.buyers.fetch_add(1, Ordering::Relaxed));
            match service.try_order(sale, &buyer, "k", 1).await {
                Some(answer) if answer.status == StatusCode::CREATED => {
                    let id = answer.id().to_owned();
                    self.answered.lock().expect("no panic in a client").push(id);
                }
                Some(answer) if answer.code() == "outcome-unknown" => {
                    self.unknown.fetch_add(1, Ordering::Relaxed);
                }
                Some(_) => {
                    self.refused.fetch_add(1, Ordering::Relaxed);
                }
                None => {
                    self.unknown.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    }

    /// Every answered order is recorded once, and none came from nowhere (I3).
    fn assert_recorded(&self, recorded: &[(String, String)]) {
        let lost = self.lost(recorded);
        assert!(lost.is_empty(), "answered but not recorded: {lost:?}");
    }

    /// Orders that were answered and are not recorded; none is recorded twice or came from nowhere.
    fn lost(&self, recorded: &[(String, String)]) -> Vec<String> {
        let answered = self.answered.lock().expect("no panic in a client");
        let ids: std::collections::HashSet<_> = recorded.iter().map(|(id, _)| id).collect();
        assert_eq!(ids.len(), recorded.len(), "no order is recorded twice");
        let most = answered.len() as u64 + self.unknown.load(Ordering::Relaxed);
        assert!(
            recorded.len() as u64 <= most,
            "{} recorded, at most {most} placed",
            recorded.len()
        );
        answered.iter().filter(|id| !ids.contains(id)).cloned().collect()
    }

    async fn until_answered(&self, more: usize) {
        let goal = self.answered() + more;
        eventually("orders are answered", async || self.answered() >= goal).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sigkill_of_the_service_loses_no_answered_order_and_sells_none_twice() {
    let deployment = Deployment::new(Servers::shared()).await;
    let keeper = deployment.serve_roles("api").await;
    let sale = keeper.define(100_000, json!({})).await;
    let load = Load::default();
    for _ in 0..3 {
        let mut victim = deployment.serve().await;
        load.stop.store(false, Ordering::Relaxed);
        let victim_pid = victim.pid();
        tokio::join!(load.run(&victim, &sale), async {
            load.until_answered(300).await;
            sigkill(victim_pid);
            load.stop.store(true, Ordering::Relaxed);
        });
        victim.kill();
        println!("{} answered, {:?} not", load.answered(), load.unknown);
    }
    let service = deployment.serve().await;
    load.assert_recorded(&service.balanced_books(&sale).await);
}

/// Takes a server away under load for a while, sells on meanwhile, and checks the books afterwards.
async fn sells_on_without(server: &str) {
    let stack = PrivateStack::start();
    let deployment = Deployment::new(stack.servers.clone()).await;
    let service = deployment.serve().await;
    let sale = service.define(1_000_000, json!({})).await;
    let load = Load::default();
    tokio::join!(load.run(&service, &sale), async {
        load.until_answered(200).await;
        tokio::task::block_in_place(|| stack.kill(server));
        load.until_answered(500).await;
        tokio::task::block_in_place(|| stack.start_again(server));
        load.until_answered(200).await;
        load.stop.store(true, Ordering::Relaxed);
    });
    load.assert_recorded(&service.balanced_books(&sale).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn kafka_away_for_a_while_stops_no_sale_and_loses_nothing() {
    sells_on_without("kafka").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_ends_the_service_in_time_though_kafka_is_away() {
    let stack = PrivateStack::start();
    let deployment = Deployment::new(stack.servers.clone()).await;
    let service = deployment.serve().await;
    let sale = service.define(100, json!({})).await;
    assert_eq!(service.order(&sale, "u-1", "k", 1).await.status, StatusCode::CREATED);
    stack.kill("kafka");
    assert_eq!(service.order(&sale, "u-2", "k", 1).await.status, StatusCode::CREATED);
    let (code, took) = service.terminate().await;
    assert_eq!(code, Some(0));
    assert!(took.as_secs() < 10, "{took:?}");
    stack.start_again("kafka");
    let service = deployment.serve().await;
    assert_eq!(service.balanced_books(&sale).await.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_away_for_a_while_stops_no_sale_and_loses_nothing() {
    sells_on_without("postgres").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_shut_down_and_restarted_on_its_append_only_file_loses_nothing() {
    let stack = PrivateStack::start();
    let deployment = Deployment::new(stack.servers.clone()).await;
    let service = deployment.serve().await;
    let sale = service.define(1_000_000, json!({})).await;
    let load = Load::default();
    tokio::join!(load.run(&service, &sale), async {
        load.until_answered(200).await;
        // In an orderly shutdown Redis writes its file to the end, unlike in a SIGKILL.
        let client = redis::Client::open(stack.servers.redis.as_str()).expect("a Redis URL");
        let mut connection = client.get_multiplexed_async_connection().await.expect("Redis");
        let ended = redis::cmd("SHUTDOWN").exec_async(&mut connection).await;
        println!("SHUTDOWN: {ended:?}");
        tokio::task::block_in_place(|| stack.start_again("redis"));
        load.until_answered(200).await;
        load.stop.store(true, Ordering::Relaxed);
    });
    load.assert_recorded(&service.balanced_books(&sale).await);
    let sql =
        "SELECT why, outcome, lost_max, (extract(epoch FROM ended_at - began_at) * 1000)::bigint
        FROM rebuilds";
    let reports: Vec<(String, String, i64, i64)> =
        sqlx::query_as(sql).fetch_all(&deployment.database().await).await.expect("reports");
    println!("{reports:?}, the last in ms");
    let [(why, outcome, 0, _)] = &reports[..] else { panic!("it lost nothing: {reports:?}") };
    assert_eq!((why.as_str(), outcome.as_str()), ("run", "opened"));
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_flushed_under_load_loses_no_order_that_is_not_listed() {
    let stack = PrivateStack::start();
    let deployment = Deployment::new(stack.servers.clone()).await;
    let service = deployment.serve().await;
    let sale = service.define(1_000_000, json!({})).await;
    let load = Load::default();
    tokio::join!(load.run(&service, &sale), async {
        load.until_answered(500).await;
        let client = redis::Client::open(stack.servers.redis.as_str()).expect("a Redis URL");
        let mut connection = client.get_multiplexed_async_connection().await.expect("Redis");
        redis::cmd("FLUSHALL").exec_async(&mut connection).await.expect("flushed");
        load.until_answered(200).await;
        load.stop.store(true, Ordering::Relaxed);
    });
    let lost = load.lost(&service.balanced_books(&sale).await);
    let sql = "SELECT outcome, lost_orders, lost_max FROM rebuilds";
    let reports: Vec<(String, Vec<String>, i64)> =
        sqlx::query_as(sql).fetch_all(&deployment.database().await).await.expect("reports");
    let [(outcome, listed, lost_max)] = &reports[..] else { panic!("one report: {reports:?}") };
    println!("{} lost, {} listed, at most {lost_max}", lost.len(), listed.len());
    assert_eq!(outcome, "rebuilt");
    assert!(lost.iter().all(|order| listed.contains(order)), "{lost:?}, listed {listed:?}");
    assert!(lost.len() as i64 <= *lost_max);
}
