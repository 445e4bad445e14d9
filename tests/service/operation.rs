//! What an operator relies on.

use futures_util::future::join_all;
use redis::AsyncCommands;
use reqwest::{Method, StatusCode};
use serde_json::json;

use crate::support::{Deployment, Servers, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_ends_the_service_in_time_and_loses_nothing() {
    let deployment = Deployment::new(Servers::shared()).await;
    let service = deployment.serve().await;
    let sale = service.define(1_000, json!({})).await;
    for n in 0..200 {
        assert_eq!(
            service.order(&sale, &format!("u-{n}"), "k", 1).await.status,
            StatusCode::CREATED
        );
    }
    let (code, took) = service.terminate().await;
    assert_eq!(code, Some(0));
    assert!(took.as_secs() < 10, "{took:?}");
    let service = deployment.serve().await;
    assert_eq!(service.balanced_books(&sale).await.len(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn roles_run_apart() {
    let patience = [("HOLDFAST_HTTP__DURABILITY_TIMEOUT_MS", "15000")];
    let deployment = Deployment::with(Servers::shared(), &patience).await;
    let api = deployment.serve_roles("api").await;
    let _relay = deployment.serve_roles("relay").await;
    let _writer = deployment.serve_roles("writer").await;
    let _sweeper = deployment.serve_roles("sweeper").await;
    let sale = api.define(10, json!({"hold_seconds": 1, "min_durability": "recorded"})).await;
    let order = api.order(&sale, "u-1", "k-1", 1).await;
    assert_eq!(order.body["durability"], "recorded", "{}", order.body);
    eventually("the sweeper ends the hold", async || api.stock(&sale).await == [10, 10, 0, 0])
        .await;
    let recorded = api.balanced_books(&sale).await;
    assert_eq!(recorded.len(), 1);
    assert_eq!(recorded[0].1, "expired");
}

#[tokio::test(flavor = "multi_thread")]
async fn threads_that_answer_callers_give_way_to_all_others() {
    let settings = [("HOLDFAST_RUNTIME__FRONT_NICENESS", "3")];
    let deployment = Deployment::with(Servers::shared(), &settings).await;
    let service = deployment.serve().await;
    let sale = service.define(10, json!({})).await;
    assert_eq!(service.order(&sale, "u", "k", 1).await.status, StatusCode::CREATED);
    let (front, others): (Vec<_>, Vec<_>) =
        service.threads().into_iter().partition(|(name, _)| name == "front");
    let (_, own) = others[0];
    assert!(
        !front.is_empty() && front.iter().all(|(_, niceness)| *niceness == own + 3),
        "{front:?}"
    );
    assert!(others.iter().all(|(_, niceness)| *niceness == own), "{others:?}");

    let relay = deployment.serve_roles("relay").await;
    assert!(relay.threads().iter().all(|(_, niceness)| *niceness == own), "{:?}", relay.threads());
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_who_wait_for_the_database_keep_no_order_from_being_recorded() {
    let settings = [
        ("HOLDFAST_DATABASE__CONNECTIONS_MAX", "2"),
        ("HOLDFAST_DATABASE__STATEMENT_TIMEOUT_MS", "60000"),
    ];
    let deployment = Deployment::with(Servers::shared(), &settings).await;
    let service = deployment.serve_roles("api,relay,writer").await;
    let sale = service.define(10, json!({})).await;
    assert_eq!(service.order(&sale, "u", "before", 1).await.status, StatusCode::CREATED);
    let database = deployment.database().await;
    let count = async |query: &'static str, of: &str| -> i64 {
        sqlx::query_scalar(query).bind(of).fetch_one(&database).await.expect("a number")
    };
    let waiting = async || {
        let query = "SELECT count(*) FROM pg_locks l JOIN pg_class c ON c.oid = l.relation
             WHERE c.relname = 'refunds' AND c.relnamespace = to_regnamespace($1) AND NOT l.granted";
        count(query, &deployment.name).await
    };
    let recorded =
        async || count("SELECT count(*) FROM orders WHERE sale_id = $1", sale.as_str()).await;
    eventually("the first order is recorded", async || recorded().await == 1).await;

    let mut lock = database.begin().await.expect("a transaction");
    sqlx::query("LOCK TABLE refunds").execute(&mut *lock).await.expect("the lock");
    let lists = join_all((0..6).map(|_| service.get("/v1/refunds")));
    let selling = async {
        eventually("all of their connections wait", async || waiting().await == 2).await;
        let order = service.order(&sale, "u", "meanwhile", 1).await;
        assert_eq!(order.status, StatusCode::CREATED, "{}", order.body);
        eventually("the second is recorded", async || recorded().await == 2).await;
        assert_eq!(waiting().await, 2, "it waited until they were done");
        lock.rollback().await.expect("the lock is given back");
    };
    tokio::join!(lists, selling);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_key_is_refused_soon() {
    let deployment = Deployment::new(Servers::shared()).await;
    let service = deployment.serve().await;
    let key = deployment.create_key("leaked", "orders");
    let path = "/v1/orders?sale_id=none";
    let ask = async || {
        let answer = service.try_send(Method::GET, path, &key, None, None).await;
        answer.expect("an answer").status
    };
    assert_eq!(ask().await, StatusCode::OK, "a new key works at once");
    deployment.run(&["keys", "revoke", "leaked"]);
    eventually("the key is refused", async || ask().await == StatusCode::UNAUTHORIZED).await;
    let list = deployment.run(&["keys", "list"]);
    assert!(list.contains("leaked") && !list.contains(&key), "{list}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sale_is_applied_from_a_file() {
    let deployment = Deployment::new(Servers::shared()).await;
    let service = deployment.serve().await;
    let id = format!("file-{:08x}", rand::random::<u32>());
    let file = std::env::temp_dir().join(format!("{id}.toml"));
    let text =
        format!("id = \"{id}\"\nname = \"From a file\"\n[[skus]]\nsku = \"sku\"\nstock = 7\n");
    std::fs::write(&file, text).expect("a temporary file");
    deployment.run(&["sale", "apply", file.to_str().expect("a path")]);
    std::fs::remove_file(&file).expect("the temporary file");
    assert_eq!(service.stock(&id).await, [7, 7, 0, 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_is_found_mended_and_retried_on_the_command_line() {
    let deployment = Deployment::new(Servers::shared()).await;
    let service = deployment.serve().await;
    let sale = service.define(9, json!({})).await;
    let database = deployment.database().await;
    let poison = "ALTER TABLE orders ADD CONSTRAINT no_poison CHECK (buyer_id <> 'poison')";
    sqlx::query(poison).execute(&database).await.expect("a constraint");
    for buyer in ["u-1", "poison", "u-2", "u-3"] {
        assert_eq!(service.order(&sale, buyer, "k", 1).await.status, StatusCode::CREATED);
    }
    let list = || deployment.run(&["dead-letters", "list", "--status", "open"]);
    eventually("it is a dead letter", async || list().lines().count() == 1).await;
    let line = list();
    let columns: Vec<_> = line.trim_end().split('\t').collect();
    let id = columns[0];
    assert_eq!(
        columns[2..6],
        ["open", &format!("{sale}/0/1-3"), "blocks its lane", "not-applicable"]
    );
    let shown = deployment.run(&["dead-letters", "show", id]);
    let shown: serde_json::Value = serde_json::from_str(&shown).expect("JSON");
    let listed = service.get("/v1/dead-letters").await;
    assert_eq!(listed.body["dead_letters"], json!([shown]));
    let refused = |arguments: &[&str], why: &str| {
        let output = deployment.command(arguments).output().expect("it runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(why), "{said}");
    };
    refused(&["dead-letters", "retry", id], "still cannot be applied");
    refused(&["dead-letters", "discard", id], "rebuild");
    refused(&["dead-letters", "show", "4711"], "no dead letter 4711");
    let mended = "ALTER TABLE orders DROP CONSTRAINT no_poison";
    sqlx::query(mended).execute(&database).await.expect("no constraint");
    let retried = deployment.run(&["dead-letters", "retry", id, "--note", "mended"]);
    assert!(retried.contains("retried"), "{retried}");
    assert_eq!(service.balanced_books(&sale).await.len(), 4);
    let shown = service.get(&format!("/v1/dead-letters/{id}")).await.body;
    assert_eq!((&shown["actor"], &shown["note"]), (&json!("command-line"), &json!("mended")));
    assert_eq!(list(), "");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_impossible_setting_ends_the_start_and_is_named() {
    let servers = Servers::shared();
    let deployment = Deployment::new(servers).await;
    for (name, value) in [("HOLDFAST_LANES__BATCH_MAX", "0"), ("HOLDFAST_REDIS__ULR", "x")] {
        let output = deployment.command(&["serve"]).env(name, value).output().expect("it runs");
        assert!(!output.status.success());
        let said = String::from_utf8_lossy(&output.stderr).to_lowercase();
        let setting = name.rsplit("__").next().unwrap_or_default().to_lowercase();
        assert!(said.contains(&setting), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_are_open_metrics_and_on_the_inner_listener_only() {
    let deployment = Deployment::new(Servers::shared()).await;
    let service = deployment.serve().await;
    let client = reqwest::Client::new();
    let answer =
        client.get(format!("{}/metrics", service.inner_url)).send().await.expect("metrics");
    let kind = answer.headers()["content-type"].to_str().expect("text").to_owned();
    assert!(kind.starts_with("application/openmetrics-text"), "{kind}");
    let text = answer.text().await.expect("text");
    assert!(text.ends_with("# EOF\n"));
    assert!(text.contains("holdfast_relay_sent") && text.contains("holdfast_lanes_call_seconds"));
    assert_eq!(service.get("/metrics").await.status, StatusCode::NOT_FOUND);

    let operations = include_str!("../../docs/operations.md");
    let names = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
    let missing: Vec<_> = names.filter(|name| !operations.contains(&format!("`{name}`"))).collect();
    assert!(missing.is_empty(), "not in docs/operations.md: {missing:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sale_whose_redis_was_changed_is_repaired_by_an_operator() {
    let deployment = Deployment::new(Servers::shared()).await;
    let service = deployment.serve().await;
    let sale = service.define(100, json!({})).await;
    let mut placed = Vec::new();
    for n in 0..5 {
        placed.push(service.order(&sale, &format!("u-{n}"), "k", 1).await.id().to_owned());
    }
    service.balanced_books(&sale).await;
    let redis = redis::Client::open(deployment.servers.redis.as_str()).expect("a URL");
    let mut redis = redis.get_multiplexed_async_connection().await.expect("Redis");
    let stock = format!("hf1:{{{sale}/0}}:stock");
    let _: () = redis.hset(&stock, "sku", "50 5 0 0  100").await.expect("written");

    let path = format!("/v1/sales/{sale}/reconcile");
    let repair = async |body: serde_json::Value| {
        let answer = service.operate(Method::POST, &path, body).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.body);
        answer.body["lanes"][0].clone()
    };
    let planned = repair(json!({"dry_run": true})).await;
    assert_eq!(planned["repair"], "rebuild", "{planned}");
    assert_eq!(planned["differences"][0]["what"], "redis-counters");
    let available = |one: &serde_json::Value| one[0]["redis"]["available"].clone();
    assert_eq!(
        (available(&planned["before"]), available(&planned["after"])),
        (json!(50), json!(95))
    );
    assert_eq!(service.stock(&sale).await, [55, 50, 5, 0], "a dry run changes nothing");

    let done = repair(json!({})).await;
    assert_eq!(done["repair"], "rebuilt", "{done}");
    assert_eq!((available(&done["before"]), available(&done["after"])), (json!(50), json!(95)));
    assert_eq!(service.stock(&sale).await, [100, 95, 5, 0]);
    assert_eq!(service.order(&sale, "u-1", "k", 1).await.id(), placed[1], "a replay");
    assert_eq!(service.order(&sale, "u-9", "k", 1).await.status, StatusCode::CREATED);
    let reports = deployment.run(&["rebuilds", "--sale", &sale]);
    assert!(reports.contains("rebuilt\toperator\tops\tepoch 1 to 2"), "{reports}");
    service.balanced_books(&sale).await;
    assert_eq!(repair(json!({})).await["repair"], "none");

    let counters = "UPDATE counters SET available = available - 1, held = held + 1";
    sqlx::query(counters).execute(&deployment.database().await).await.expect("changed");
    let refused = repair(json!({})).await;
    assert_eq!(refused["repair"], "refused", "{refused}");
    let forbidden = service.post(&path, json!({})).await;
    assert_eq!(forbidden.status, StatusCode::FORBIDDEN);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flushed_sale_comes_back_by_itself_and_is_rebuilt_on_demand() {
    let deployment = Deployment::new(Servers::shared()).await;
    let service = deployment.serve().await;
    let (sale, other) = (service.define(9, json!({})).await, service.define(9, json!({})).await);
    let placed = service.order(&sale, "u-1", "k", 2).await;
    assert_eq!(placed.status, StatusCode::CREATED);
    service.balanced_books(&sale).await;
    let redis = redis::Client::open(deployment.servers.redis.as_str()).expect("a URL");
    let mut redis = redis.get_multiplexed_async_connection().await.expect("Redis");
    let keys: Vec<String> = redis.keys(format!("hf1:{{{sale}/0}}:*")).await.expect("keys");
    let _: () = redis.del(keys).await.expect("deleted");
    let mut frozen = 0;
    eventually("the sale is open again", async || {
        let next = service.order(&sale, "u-2", "k", 1).await;
        frozen += u32::from(next.code() == "lane-frozen");
        let elsewhere = service.order(&other, "u-1", "k", 1).await.status;
        assert!(elsewhere.is_success(), "other lanes go on: {elsewhere}");
        next.status == StatusCode::CREATED
    })
    .await;
    println!("refused {frozen} times");
    assert_eq!(service.stock(&sale).await, [9, 6, 3, 0]);
    let again = service.order(&sale, "u-1", "k", 2).await;
    assert_eq!(again.id(), placed.id(), "a replay");

    let report = deployment.run(&["rebuild", &sale]);
    assert!(report.contains("rebuilt\toperator\tcommand-line\tepoch 2 to 3"), "{report}");
    let reports = deployment.run(&["rebuilds", "--sale", &sale]);
    assert!(reports.contains("rebuilt\tmissing\treconciler\tepoch 1 to 2"), "{reports}");
    assert_eq!(service.order(&sale, "u-3", "k", 1).await.status, StatusCode::CREATED);
    assert_eq!(service.balanced_books(&sale).await.len(), 3);
}
