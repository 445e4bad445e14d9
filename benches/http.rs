//! Decoding of what callers send: bodies, the Idempotency-Key header, ids; and answering a problem.
//! No server is needed.

use std::hint::black_box;
use std::time::Duration;

use axum::http::{HeaderMap, HeaderValue};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use holdfast::domain::ids::{IdSecret, LaneId, OrderId};
use holdfast::domain::sale::Definition;
use holdfast::http::extract::{IDEMPOTENCY_KEY, decode, idempotency_key};
use holdfast::http::orders::{ConfirmOrder, PlaceOrder};
use holdfast::http::problem::Problem;

const ONE_LINE: &str = r#"{"sale_id": "double-11", "buyer_id": "u-42", "lines": [{"sku": "phone-256", "quantity": 1}]}"#;

fn eight_lines() -> String {
    let lines: Vec<_> =
        (0..8).map(|n| format!(r#"{{"sku":"phone-256-{n}","quantity":{}}}"#, n + 1)).collect();
    format!(r#"{{"sale_id":"double-11","buyer_id":"u-42","lines":[{}]}}"#, lines.join(","))
}

fn definition(skus: usize) -> String {
    let skus: Vec<_> = (0..skus)
        .map(|n| format!(r#"{{"sku":"sku-{n}","stock":100,"per_buyer_limit":2}}"#))
        .collect();
    format!(r#"{{"name":"bench","skus":[{}]}}"#, skus.join(","))
}

fn bodies(c: &mut Criterion) {
    let mut group = c.benchmark_group("http/decode");
    group.measurement_time(Duration::from_secs(3)).warm_up_time(Duration::from_secs(1));
    let (eight, large) = (eight_lines(), definition(1_000));
    for (name, body) in [("order of 1 line", ONE_LINE), ("order of 8 lines", &eight)] {
        group.throughput(Throughput::Bytes(body.len() as u64));
        group.bench_function(name, |b| {
            b.iter(|| decode::<PlaceOrder>(black_box(body.as_bytes())));
        });
    }
    group.throughput(Throughput::Elements(1));
    group.bench_function("confirm", |b| {
        b.iter(|| decode::<ConfirmOrder>(black_box(br#"{"payment_id":"pay-42"}"#)));
    });
    group.bench_function("a mistake, and its answer", |b| {
        b.iter(|| {
            let errors = decode::<PlaceOrder>(black_box(br#"{"sale_id":"s","quantitiy":1}"#));
            errors.map_err(|errors| {
                Problem::invalid(errors).render("4bf92f3577b34da6a3ce929d0e0e4736")
            })
        });
    });
    group.throughput(Throughput::Bytes(large.len() as u64));
    group.bench_function("definition of 1000 SKUs", |b| {
        b.iter(|| decode::<Definition>(black_box(large.as_bytes())));
    });
    group.finish();
}

fn headers_and_ids(c: &mut Criterion) {
    let mut headers = HeaderMap::new();
    let key = HeaderValue::from_static("\"8e03978e-40d5-43e8-bc93-6894a57f9324\"");
    headers.insert(IDEMPOTENCY_KEY, key);
    let secret = IdSecret::new(1, &[7; 32]);
    let lane = LaneId { sale: "double-11".parse().expect("a sale"), lane: 0 };
    let (buyer, key) = ("u-42".parse().expect("a buyer"), "k".parse().expect("a key"));
    let id = secret.order_id(&lane, secret.order_key(&lane.sale, &buyer, &key)).to_string();
    let mut group = c.benchmark_group("http/names");
    group.measurement_time(Duration::from_secs(3)).warm_up_time(Duration::from_secs(1));
    group.bench_function("idempotency key", |b| b.iter(|| idempotency_key(black_box(&headers))));
    group.bench_function("order id made", |b| {
        b.iter(|| secret.order_id(&lane, secret.order_key(&lane.sale, black_box(&buyer), &key)));
    });
    group.bench_function("order id read and found genuine", |b| {
        b.iter(|| black_box(&id).parse::<OrderId>().is_ok_and(|id| id.is_genuine(&secret)));
    });
    group.finish();
}

criterion_group!(benches, bodies, headers_and_ids);
criterion_main!(benches);
