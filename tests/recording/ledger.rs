//! The ledger against a real PostgreSQL: migrations, catalog, lists, and whether the queries that
//! were checked at compile time still fit.

use std::sync::Arc;
use std::time::Duration;

use crate::support::{Lane, actor, definition, pool, unique, until};
use futures_util::future::join_all;
use holdfast::config;
use holdfast::domain::event::{Body, Event};
use holdfast::domain::ids::LaneId;
use holdfast::domain::names::{KeyName, SaleId};
use holdfast::domain::order::Status;
use holdfast::domain::stock::{Counters, Units};
use holdfast::ledger::catalog::CatalogMetrics;
use holdfast::ledger::{
    Applied, ApplyError, Batch, Catalog, LaneMove, Ledger, LedgerError, OrderFilter, Scope,
};
use sqlx::Row as _;

async fn ledger(name: &str) -> (Ledger, config::Database) {
    let database = crate::support::database(&unique(name));
    let ledger = Ledger::new(&database).unwrap();
    ledger.migrate().await.unwrap();
    (ledger, database)
}

fn catalog(ledger: &Ledger) -> Catalog {
    Catalog::new(ledger.clone(), &config::Catalog { refresh_ms: 10_000 }, CatalogMetrics::default())
}

async fn define(ledger: &Ledger, sale: &str, stock: i64) -> SaleId {
    let sale: SaleId = sale.parse().unwrap();
    ledger.begin_definition(&sale, &[3], 1).await.unwrap();
    let lock = ledger.lock_sale(&sale).await.unwrap();
    let version = lock.current().map_or(0, |sale| sale.version) + 1;
    lock.commit_definition(version, &definition(stock), &actor()).await.unwrap();
    sale
}

#[tokio::test(flavor = "multi_thread")]
async fn instances_may_migrate_at_once_and_agree_on_the_secret() {
    let database = crate::support::database(&unique("migrate"));
    let ledgers: Vec<_> = (0..4).map(|_| Ledger::new(&database).unwrap()).collect();
    for outcome in join_all(ledgers.iter().map(Ledger::migrate)).await {
        outcome.unwrap();
    }
    assert_eq!(ledgers[0].id_secrets().await.unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_prepared_queries_fit_the_migrations() {
    let (_, database) = ledger("fits").await;
    let pool = pool(&database);
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/.sqlx");
    let mut checked = 0;
    for file in std::fs::read_dir(folder).unwrap() {
        let text = std::fs::read_to_string(file.unwrap().path()).unwrap();
        let stored: serde_json::Value = serde_json::from_str(&text).unwrap();
        let query = stored["query"].as_str().unwrap();
        let prepare = format!("PREPARE fits AS {query}");
        let mut connection = pool.acquire().await.unwrap();
        let outcome = sqlx::raw_sql(sqlx::AssertSqlSafe(prepare)).execute(&mut *connection).await;
        assert!(outcome.is_ok(), "prepare .sqlx anew: {outcome:?}\n{query}");
        let described =
            sqlx::query("SELECT cardinality(parameter_types) FROM pg_prepared_statements")
                .fetch_one(&mut *connection)
                .await
                .unwrap();
        let parameters = stored["describe"]["parameters"]["Left"].as_array().map_or(0, Vec::len);
        assert_eq!(described.get::<i32, _>(0), parameters as i32, "{query}");
        sqlx::raw_sql("DEALLOCATE fits").execute(&mut *connection).await.unwrap();
        checked += 1;
    }
    assert!(checked > 30, "{checked}");
}

/// What the first `count` events come to: all of it, and what of it orders have.
fn fold(events: &[Event], count: u64) -> (Units, Units) {
    let (mut all, mut of_orders) = (Units::default(), Units::default());
    for event in &events[..count as usize] {
        for change in event.body.changes() {
            all += Units::from(&change);
            if let Body::Order(_) = &event.body {
                of_orders += Units { available: 0, ..Units::from(&change) };
            }
        }
    }
    (all, of_orders)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_books_can_be_read_as_of_any_recorded_event() {
    let (ledger, _) = ledger("as_of").await;
    let sale: SaleId = "s".parse().unwrap();
    ledger.begin_definition(&sale, &[0], 1).await.unwrap();
    let mut lane = crate::support::Lane {
        id: LaneId { sale, lane: 0 },
        partition: 0,
        epoch: 1,
        seq: 0,
        secret: ledger.id_secrets().await.unwrap().remove(0),
    };
    let mut events = lane.story(9);
    let before = Counters { available: 3, held: 3, sold: 3, version: 0 };
    events.push(lane.adjusted("more", before, 5, "more"));
    let recorded = lane.seq;
    let moved = LaneMove { lane: lane.id.clone(), epoch: 1, expected: 0, recorded, seal: None };
    let batch = Batch { moves: vec![moved], events: events.clone(), ..Batch::default() };
    ledger.apply(&batch).await.unwrap();
    for at in 0..=recorded + 1 {
        let mut snapshot = ledger.snapshot(&lane.id).await.unwrap();
        let figures = snapshot.figures(at).await.unwrap();
        snapshot.end().await.unwrap();
        let (all, of_orders) = fold(&events, at.min(recorded));
        let sku = figures.skus[&crate::support::sku()];
        assert_eq!((sku.counters, sku.ledger, sku.orders), (all, all, of_orders), "at {at}");
        let marks = (figures.recorded, figures.events, figures.last_event);
        assert_eq!(marks, (recorded, recorded, recorded));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_ledger_is_append_only() {
    let stack = crate::support::Stack::new("append").await;
    let mut lane = stack.lane("s", 0).await;
    let event = lane.defined(1);
    let moves =
        vec![LaneMove { lane: lane.id.clone(), epoch: 1, expected: 0, recorded: 1, seal: None }];
    let batch = Batch { moves, events: vec![event], ..Batch::default() };
    stack.ledger.apply(&batch).await.unwrap();
    for sql in ["UPDATE ledger SET held = 1", "DELETE FROM ledger", "TRUNCATE ledger"] {
        let error = sqlx::query(sql).execute(&stack.pool).await.unwrap_err().to_string();
        assert!(error.contains("append-only"), "{error}");
    }
    let again = stack.ledger.apply(&batch).await.unwrap_err();
    assert!(matches!(again, ApplyError::MarkMoved), "{again}");
}

/// Writes what happened next in a lane of which `expected` events are recorded.
async fn apply(ledger: &Ledger, expected: u64, events: Vec<Event>) -> Result<Applied, ApplyError> {
    let moved = LaneMove {
        lane: events[0].lane.clone(),
        epoch: 1,
        expected,
        recorded: events.len() as u64 + expected,
        seal: None,
    };
    ledger.apply(&Batch { moves: vec![moved], events, ..Batch::default() }).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_begins_once_and_goes_on_only_where_it_began() {
    let stack = crate::support::Stack::new("begins").await;
    let mut lane = stack.lane("s", 0).await;
    let (defined, known) = (lane.defined(3), lane.held("known"));
    // Begun and gone on with in one batch, and in a later one.
    let begun = lane.held("begun");
    let first = vec![defined, known.clone(), begun.clone(), lane.then(&begun, Status::Confirmed)];
    apply(&stack.ledger, 0, first).await.unwrap();
    let next = vec![lane.held("new"), lane.then(&known, Status::Cancelled)];
    let applied = apply(&stack.ledger, 4, next).await.unwrap();
    assert_eq!(applied.rows, 4, "a row of each order, and of each event");
    stack.check_books().await;

    let again = lane.held("known");
    lane.seq -= 1;
    let mut copy =
        Lane { id: lane.id.clone(), partition: 0, epoch: 1, seq: 5, secret: lane.secret.clone() };
    let never = copy.held("never");
    let never = copy.then(&never, Status::Expired);
    let never = Event { seq: again.seq, ..never };
    for event in [again, never] {
        let refused = apply(&stack.ledger, 6, vec![event]).await.unwrap_err();
        assert!(matches!(refused, ApplyError::Unfit(_)), "{refused}");
    }
    stack.check_books().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adjustment_is_undone_once_and_shows_by_what() {
    let stack = crate::support::Stack::new("undo").await;
    let mut lane = stack.lane("s", 0).await;
    let first = Counters { available: 30, held: 0, sold: 0, version: 0 };
    let mut story = vec![
        lane.defined(30),
        lane.adjusted("a", first, 5, "found"),
        lane.adjusted("count", first.adjusted(5), 0, "right"),
        lane.undone("u", first.adjusted(5).adjusted(0), -5, "a"),
    ];
    let Body::Adjusted(count) = &mut story[2].body else { unreachable!("it is an adjustment") };
    count.set_total = Some(35);
    let apply = async |expected, events| apply(&stack.ledger, expected, events).await;
    apply(0, story).await.unwrap();
    let found = async |key: &str| {
        stack.ledger.adjustment(&lane.adjustment_id(key)).await.unwrap().expect("it is recorded")
    };
    let (a, count, u) = (found("a").await, found("count").await, found("u").await);
    assert_eq!((a.undoes, a.undone_by.as_ref()), (None, Some(&u.id)));
    assert_eq!((u.undoes.as_ref(), u.undone_by), (Some(&a.id), None));
    assert_eq!((count.delta, count.set_total, count.undone_by), (0, Some(35), None));
    let listed = stack.ledger.list_adjustments(&lane.id.sale, None, None, 9).await.unwrap().items;
    let undone_by: Vec<_> = listed.into_iter().map(|adjustment| adjustment.undone_by).collect();
    assert_eq!(undone_by, [None, None, Some(u.id)], "newest first");
    assert_eq!(stack.number("SELECT version FROM counters").await, 3);
    stack.check_books().await;

    let now = Counters { available: 30, held: 0, sold: 0, version: 3 };
    let again = lane.undone("v", now, -5, "a");
    lane.seq -= 1;
    let unknown = lane.undone("w", now, -5, "never");
    for event in [again, unknown] {
        let refused = apply(4, vec![event]).await.unwrap_err();
        assert!(matches!(refused, ApplyError::Unfit(_)), "{refused}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_instance_has_just_made_is_found_at_once() {
    let (ledger, _) = ledger("catalog").await;
    let catalog = catalog(&ledger);
    let (sale, key): (SaleId, [u8; 32]) = ("new".parse().unwrap(), rand::random());
    assert_eq!(catalog.sale(&sale).await.unwrap(), None);
    define(&ledger, "new", 7).await;
    let stored = ledger.insert_key(&actor(), Scope::Operator, &key).await.unwrap();
    let found = catalog.sale(&sale).await.unwrap().unwrap();
    assert_eq!((found.version, found.definition.skus[0].stock), (1, 7));
    assert_eq!(catalog.key(&key).await.unwrap().as_deref(), Some(&stored));
    assert_eq!(ledger.revoke_keys("ops").await.unwrap(), 1);
    catalog.refresh().await.unwrap();
    assert_eq!(catalog.key(&key).await.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_who_miss_at_once_share_one_read() {
    let (ledger, _) = ledger("coalesce").await;
    let catalog = Arc::new(catalog(&ledger));
    let sales: Vec<SaleId> = (0..200).map(|n| format!("none-{n}").parse().unwrap()).collect();
    let began = std::time::Instant::now();
    for found in join_all(sales.iter().map(|sale| catalog.sale(sale))).await {
        assert_eq!(found.unwrap(), None);
    }
    assert!(began.elapsed() < Duration::from_secs(2), "200 misses took {:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_copy_serves_while_the_database_is_away_and_a_miss_says_so() {
    let (ledger, database) = ledger("away").await;
    let sale = define(&ledger, "s", 1).await;
    let catalog = catalog(&ledger);
    catalog.refresh().await.unwrap();
    ledger.close().await;
    assert!(catalog.sale(&sale).await.unwrap().is_some());
    let miss = catalog.sale(&"other".parse().unwrap()).await;
    assert!(matches!(miss, Err(LedgerError::Unavailable(_))), "{miss:?}");

    let nowhere = "postgres://nobody@127.0.0.1:1/nothing".to_owned();
    let away = Ledger::new(&config::Database { url: nowhere, ..database }).unwrap();
    let error = away.migrate().await.unwrap_err();
    assert!(matches!(error, LedgerError::Unavailable(_)), "{error}");
    let error = away.recorded_many(&[]).await.unwrap_err();
    assert!(matches!(error, LedgerError::Unavailable(_)), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn definitions_of_one_sale_wait_for_each_other() {
    let (ledger, _) = ledger("lock").await;
    let sale = define(&ledger, "s", 1).await;
    let lock = ledger.lock_sale(&sale).await.unwrap();
    assert_eq!(lock.current().unwrap().version, 1);
    let second = tokio::spawn({
        let (ledger, sale) = (ledger.clone(), sale.clone());
        async move { ledger.lock_sale(&sale).await.unwrap().current().unwrap().version }
    });
    lock.commit_definition(2, &definition(2), &actor()).await.unwrap();
    assert_eq!(second.await.unwrap(), 2);
    assert_eq!(ledger.sale(&sale).await.unwrap().unwrap().definition, definition(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_list_of_orders_walks_an_index_and_misses_none() {
    let stack = crate::support::Stack::new("lists").await;
    let mut lane = stack.lane("s", 0).await;
    let events = lane.story(90);
    let writer = stack.writer();
    stack.send(&lane, &events).await;
    stack.until_recorded(&lane, lane.seq).await;
    writer.stop().await;
    every_list_misses_none(&stack, &lane.id.sale).await;
    let at_once = "UPDATE orders SET created_at = date_trunc('minute', created_at)";
    sqlx::raw_sql(at_once).execute(&stack.pool).await.unwrap();
    every_list_misses_none(&stack, &lane.id.sale).await;
    explain_the_list_of_a_sale(&stack).await;
}

async fn every_list_misses_none(stack: &crate::support::Stack, sale: &SaleId) {
    let sale = Some(sale.clone());
    let buyer = Some("buyer-7".parse().unwrap());
    for (filter, expected) in [
        (OrderFilter::default(), 90),
        (OrderFilter { sale: sale.clone(), ..OrderFilter::default() }, 90),
        (
            OrderFilter { sale, status: Some(holdfast::domain::order::Status::Held), buyer: None },
            30,
        ),
        (OrderFilter { buyer, ..OrderFilter::default() }, 1),
    ] {
        let (mut seen, mut cursor) = (Vec::new(), None);
        loop {
            let page = stack.ledger.list_orders(&filter, cursor.as_ref(), 7).await.unwrap();
            seen.extend(
                page.items.into_iter().map(|order| (order.created_at, order.id.to_string())),
            );
            cursor = page.next;
            if cursor.is_none() {
                break;
            }
        }
        assert_eq!(seen.len(), expected, "{filter:?}");
        assert!(seen.windows(2).all(|pair| pair[0] > pair[1]), "newest first: {filter:?}");
    }
}

/// Among many sales, one sale's list of one status reads that sale's part of its index only.
async fn explain_the_list_of_a_sale(stack: &crate::support::Stack) {
    sqlx::raw_sql(
        "INSERT INTO orders SELECT 'o' || n, 'sale-' || n % 50, 0, 'b' || n, 'held', '[]', NULL,
           now(), now(), NULL, n FROM generate_series(1, 20000) AS n;
         ANALYZE orders",
    )
    .execute(&stack.pool)
    .await
    .unwrap();
    let plan: Vec<String> = sqlx::query_scalar(
        "EXPLAIN SELECT o.* FROM UNNEST(ARRAY['held', 'confirmed']) AS asked (status), LATERAL (
           SELECT * FROM orders WHERE sale_id = 's' AND status = asked.status
             AND (created_at, id) < (now(), '') ORDER BY created_at DESC, id DESC LIMIT 5
         ) AS o ORDER BY o.created_at DESC LIMIT 5",
    )
    .fetch_all(&stack.pool)
    .await
    .unwrap();
    let plan = plan.join("\n");
    assert!(plan.contains("Index Scan Backward using orders_by_sale"), "{plan}");
    assert!(plan.contains("(created_at <= now())"), "{plan}");
    assert!(plan.contains("Incremental Sort"), "{plan}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_history_is_found_by_indexes_however_long_the_ledger_is() {
    let (_, database) = ledger("history").await;
    let pool = pool(&database);
    sqlx::raw_sql(
        "INSERT INTO ledger SELECT 's', n % 4, 1, n, 0, 'holdfast.order.held', 'o' || n / 2, NULL,
           'caller', NULL, NULL, NULL, 'phone', -1, 1, 0, now() FROM generate_series(1, 20000) AS n;
         ANALYZE ledger",
    )
    .execute(&pool)
    .await
    .unwrap();
    let mut connection = pool.acquire().await.unwrap();
    let prepare = format!("PREPARE history AS {}", the_prepared_query("AS step JOIN ledger"));
    sqlx::raw_sql(sqlx::AssertSqlSafe(prepare)).execute(&mut *connection).await.unwrap();
    let plan: Vec<String> = sqlx::query_scalar("EXPLAIN EXECUTE history ('o7', 200)")
        .fetch_all(&mut *connection)
        .await
        .unwrap();
    let plan = plan.join("\n");
    for index in ["ledger_by_order", "ledger_pkey"] {
        assert!(plan.contains(index), "{plan}");
    }
    assert!(!plan.contains("Seq Scan"), "{plan}");
}

/// The one of the prepared queries that has these words in it.
fn the_prepared_query(words: &str) -> String {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/.sqlx");
    let files = std::fs::read_dir(folder).unwrap();
    let texts = files.map(|file| std::fs::read_to_string(file.unwrap().path()).unwrap());
    let stored = texts.map(|text| serde_json::from_str::<serde_json::Value>(&text).unwrap());
    let queries = stored.map(|stored| stored["query"].as_str().unwrap().to_owned());
    let mut found: Vec<_> = queries.filter(|query| query.contains(words)).collect();
    assert_eq!(found.len(), 1, "{found:?}");
    found.remove(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_catalog_keeps_itself_fresh() {
    let (ledger, _) = ledger("fresh").await;
    let every = config::Catalog { refresh_ms: 100 };
    let catalog = Catalog::new(ledger.clone(), &every, CatalogMetrics::default());
    let stop = tokio_util::sync::CancellationToken::new();
    let running = tokio::spawn({
        let (catalog, stop) = (catalog.clone(), stop.clone());
        async move { catalog.run(stop).await }
    });
    define(&ledger, "s", 1).await;
    until("the sale is in the copy", || async { catalog.sales().len() == 1 }).await;
    let name: KeyName = "shop".parse().unwrap();
    let key = ledger.insert_key(&name, Scope::Orders, &[9; 32]).await.unwrap();
    assert!(ledger.insert_key(&name, Scope::Orders, &[9; 32]).await.is_err(), "the same key");
    until("a revoked key is gone", || async {
        ledger.revoke_keys(&key.id).await.unwrap();
        catalog.key(&[9; 32]).await.unwrap().is_none()
    })
    .await;
    stop.cancel();
    running.await.unwrap();
}
