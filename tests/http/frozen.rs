//! A lane that may have forgotten what it answered, as callers meet it; and what instances testify of
//! it to whoever recovers it.

use std::time::{Duration, Instant};

use holdfast::config::Config;
use holdfast::domain::ids::OrderId;
use holdfast::domain::testimony::Testimony;
use holdfast::lanes::Lanes;
use holdfast::lanes::command::Reserve;
use holdfast::lanes::reply::Reserved;
use holdfast::ledger::{Ledger, Testimonies};
use holdfast::witness::Witness;
use prometheus_client::registry::Registry;
use redis::AsyncCommands;
use reqwest::Method;
use serde_json::json;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::redis_server::RedisServer;
use crate::stack::{Stack, unique, until};

/// Longer than a busy machine takes to let an instance give a sign.
const GONE_AFTER: Duration = Duration::from_secs(4);

async fn set(stack: &Stack, url: &str, field: &str, value: &str) {
    let client = redis::Client::open(url).unwrap();
    let mut redis = client.get_multiplexed_async_connection().await.unwrap();
    let keys = holdfast::lanes::LaneKeys::new(&stack.lane());
    let () = redis.hset(keys.lane(), field, value).await.unwrap();
}

#[tokio::test]
async fn whatever_is_asked_of_a_frozen_lane_is_lane_frozen_and_other_sales_go_on() {
    let server = RedisServer::start(&[]);
    let stack = Stack::with("frozen", |config| config.redis.url = server.url()).await;
    stack.define(9, json!({})).await;
    let placed = stack.place("b", "k", 1).await;
    let id = placed.id().to_owned();
    let frozen = async || {
        stack.lanes.prune(); // which the service does twice a second
        let metrics =
            stack.client.get(format!("{}/metrics", stack.inner_url)).send().await.unwrap();
        let text = metrics.text().await.unwrap();
        text.lines().any(|line| line == "holdfast_lanes_frozen 1")
    };
    assert!(!frozen().await);
    // As if this lane had been opened on the server as it ran before.
    set(&stack, &server.url(), "run", &"0".repeat(40)).await;

    stack.place("b", "k2", 1).await.is(503, "lane-frozen");
    stack.place("b", "k", 1).await.is(503, "lane-frozen"); // a replay
    stack.get(&format!("/v1/orders/{id}")).send().await.is(503, "lane-frozen");
    stack.confirm(&id, "p").await.is(503, "lane-frozen");
    stack.cancel(&id).await.is(503, "lane-frozen");
    let sale = format!("/v1/sales/{}", stack.sale);
    let (by_anybody, by_operators) = ([&sale[..]], [format!("{sale}/stock")]);
    for path in by_anybody.into_iter().chain(by_operators.iter().map(|path| &path[..])) {
        until("what was seen of it before is old", async || {
            stack.get(path).send().await.code() == "lane-frozen"
        })
        .await;
    }
    stack.post(&format!("{sale}/pause")).send().await.is(503, "lane-frozen");
    let definition = json!({"name": "n", "skus": [{"sku": "a", "stock": 9}]});
    stack.put(&sale).json(definition.clone()).send().await.is(503, "lane-frozen");
    let adjust = stack.post(&format!("{sale}/stock/a/adjustments"));
    let adjust =
        adjust.header("Idempotency-Key", "a").json(json!({"delta": 1, "reason": "restock"}));
    adjust.send().await.is(503, "lane-frozen");
    assert!(frozen().await);

    let list = stack.call(Method::GET, "/v1/sales", "").send().await;
    assert_eq!(list.status, 200, "{list:?}");
    assert_eq!(list.body["sales"][0]["skus"][0]["available"], 0, "none of it can be had");
    let other = unique("other");
    let defined = stack.put(&format!("/v1/sales/{other}")).json(definition).send().await;
    assert_eq!(defined.status, 201, "{defined:?}");
    let lines = json!([{"sku": "a", "quantity": 1}]);
    let body = json!({"sale_id": other, "buyer_id": "b", "lines": lines});
    assert_eq!(stack.place_with("k", body).await.status, 201);
}

/// Another process: what it knows of lanes, and its witness.
struct Instance {
    lanes: Lanes,
    witness: Witness,
    end: CancellationToken,
    task: JoinHandle<()>,
}

impl Instance {
    async fn start(stack: &Stack, lanes: Lanes) -> Self {
        let config = Config::load(None).unwrap().witness;
        let registry = &mut Registry::default();
        let witness =
            Witness::new(lanes.clone(), stack.ledger.clone(), config, vec!["api"], registry);
        witness.heartbeat().await.unwrap();
        let (end, running) = (CancellationToken::new(), witness.clone());
        let token = end.clone();
        let task = tokio::spawn(async move { running.run(token).await });
        Self { lanes, witness, end, task }
    }

    async fn fresh(stack: &Stack) -> Self {
        let mut config = Config::load(None).unwrap();
        config.redis.url = std::env::var("REDIS_URL").unwrap();
        let lanes = Lanes::new(&config.redis, &config.lanes, &mut Registry::default()).unwrap();
        Self::start(stack, lanes).await
    }

    async fn reserve(&self, stack: &Stack, buyer: &str) -> OrderId {
        let secret = stack.catalog.newest_secret().await.unwrap().unwrap();
        let (buyer, key) = (buyer.parse().unwrap(), "k".parse().unwrap());
        let key = secret.order_key(&stack.lane().sale, &buyer, &key);
        let id = secret.order_id(&stack.lane(), key);
        let lines = serde_json::from_value(json!([{"sku": "a", "quantity": 1}])).unwrap();
        let reserve = Reserve { id: id.clone(), buyer, lines, hold_seconds: None, trace: None };
        let answer = self.lanes.reserve(reserve).await.unwrap().outcome;
        assert!(matches!(answer, Reserved::Held(_)), "{answer:?}");
        id
    }

    async fn end(self) {
        self.end.cancel();
        self.task.await.unwrap();
    }
}

async fn ask(stack: &Stack) -> Testimonies {
    stack.ledger.testimonies(&stack.lane(), GONE_AFTER).await.unwrap()
}

fn of<'a>(testimonies: &'a Testimonies, instance: &Instance) -> &'a Testimony {
    let name = instance.witness.name();
    let of_it = testimonies.heard.iter().find(|(heard, _)| heard == name);
    &of_it.unwrap_or_else(|| panic!("{name} is not heard: {testimonies:?}")).1
}

#[tokio::test(flavor = "multi_thread")]
async fn each_instance_testifies_to_the_orders_that_it_has_told_of() {
    let stack = Stack::new("testify").await;
    stack.define(9, json!({})).await;
    let (one, two) =
        (Instance::start(&stack, stack.lanes.clone()).await, Instance::fresh(&stack).await);
    let idle = Instance::fresh(&stack).await;
    let first: OrderId = stack.hold("ann").await.parse().unwrap(); // of one, by HTTP
    let second = two.reserve(&stack, "bob").await;
    two.lanes.get(first.clone()).await.unwrap();

    let began = Instant::now();
    let heard = ask(&stack).await;
    println!("heard after {:?}", began.elapsed());
    assert!(began.elapsed() < GONE_AFTER, "nobody waits for signs of those who answer");
    assert_eq!((heard.heard.len(), heard.unheard.len()), (3, 0), "{heard:?}");
    let orders = |list: &[(u64, &OrderId)]| -> Vec<_> {
        list.iter().map(|(seq, id)| (*seq, id.key())).collect()
    };
    let seen = |seq, orders| Testimony { epoch: 1, seq, logged: 0, orders, unlisted: 0 };
    assert_eq!(*of(&heard, &one), seen(2, orders(&[(2, &first)])));
    assert_eq!(*of(&heard, &two), seen(3, orders(&[(2, &first), (3, &second)])));
    assert_eq!(*of(&heard, &idle), Testimony::default(), "it has seen nothing");

    // Once Kafka has them nobody keeps them, though nobody asks the lane any more.
    stack.record().await;
    until("they are logged", async || {
        let heard = ask(&stack).await;
        let (one, two) = (of(&heard, &one), of(&heard, &two));
        one.orders.is_empty() && two.orders.is_empty() && two.logged == 3
    })
    .await;
    for instance in [one, two, idle] {
        instance.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_gives_no_signs_is_waited_for_only_so_long() {
    let stack = Stack::new("gone").await;
    stack.define(9, json!({})).await;
    let (dead, alive) = (Instance::fresh(&stack).await, Instance::fresh(&stack).await);
    let left = Instance::fresh(&stack).await;
    dead.reserve(&stack, "bob").await;
    let name = dead.witness.name().to_owned();
    dead.task.abort(); // killed: it says nothing to anybody
    let (leaving, _) = (left.witness.clone(), left.end().await);
    leaving.leave().await.unwrap();

    let began = Instant::now();
    let heard = ask(&stack).await;
    assert!(began.elapsed() < 2 * GONE_AFTER, "no longer than its signs stay away");
    assert_eq!(heard.unheard, [name], "it has been asked, and told to be missing");
    assert_eq!(heard.heard.len(), 1, "{heard:?}");
    assert_eq!(*of(&heard, &alive), Testimony::default());
    let again = ask(&stack).await;
    assert_eq!((again.heard.len(), again.unheard.len()), (1, 0), "it counts as gone by now");
    alive.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_database_is_away_orders_are_answered_and_remembered() {
    let stack = Stack::new("blind").await;
    stack.define(9, json!({})).await;
    let mut config = Config::load(None).unwrap();
    config.database.url = "postgres://nobody@127.0.0.1:1/nothing".into();
    let away = Ledger::new(&config.database).unwrap();
    let registry = &mut Registry::default();
    let witness = Witness::new(stack.lanes.clone(), away, config.witness, vec!["api"], registry);
    assert!(witness.heartbeat().await.is_err());
    let end = CancellationToken::new();
    let running = tokio::spawn({
        let end = end.clone();
        async move { witness.run(end).await }
    });
    for number in 0..5 {
        stack.hold(&format!("b-{number}")).await;
    }
    assert_eq!(stack.lanes.testimony(&stack.lane()).orders.len(), 5);
    end.cancel();
    running.await.unwrap();
}

#[tokio::test]
async fn what_witnesses_leave_behind_is_forgotten() {
    let stack = Stack::new("forget").await;
    let count = async || {
        let heard = stack.ledger.testimonies(&stack.lane(), Duration::from_millis(500)).await;
        let heard = heard.unwrap();
        heard.heard.len() + heard.unheard.len()
    };
    stack.ledger.heartbeat("a", &["relay"]).await.unwrap();
    assert_eq!(count().await, 1);
    stack.ledger.forget_witnesses(Duration::from_secs(3_600)).await.unwrap();
    assert_eq!(stack.ledger.asked("a").await.unwrap().len(), 1, "it is not old");
    stack.ledger.forget_witnesses(Duration::ZERO).await.unwrap();
    assert_eq!(stack.ledger.asked("a").await.unwrap().len(), 0);
    assert_eq!(count().await, 0, "nobody is there to be asked");
}
