//! Everything that callers write: bodies, ids, the Idempotency-Key header, queries. The first byte
//! says which. Nothing may panic, and what is taken must be what was meant.

#![no_main]

use axum::http::{HeaderMap, HeaderValue, Uri};
use holdfast::domain::ids::{AdjustmentId, OrderId};
use holdfast::domain::order::{LINES_MAX, QUANTITY_MAX};
use holdfast::domain::sale::Definition;
use holdfast::domain::stock::{TOTAL_MAX, TotalChange};
use holdfast::http::{AdjustStock, ResolveDeadLetter, UndoAdjustment};
use holdfast::http::extract::{self, IDEMPOTENCY_KEY, decode, idempotency_key};
use holdfast::http::orders::{CancelByKey, CancelOrder, ConfirmOrder, ListOrders, PlaceOrder};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((which, bytes)) = data.split_first() else { return };
    match which % 8 {
        0 => place(bytes),
        1 => drop(decode::<ConfirmOrder>(bytes)),
        2 => drop((decode::<CancelOrder>(bytes), decode::<CancelByKey>(bytes))),
        3 => define(bytes),
        4 => adjust(bytes),
        5 => ids(bytes),
        6 => key(bytes),
        _ => query(bytes),
    }
});

fn place(bytes: &[u8]) {
    match decode::<PlaceOrder>(bytes) {
        Ok(order) => {
            assert!((1..=LINES_MAX).contains(&order.lines.len()));
            for (index, line) in order.lines.iter().enumerate() {
                assert!((1..=QUANTITY_MAX).contains(&line.quantity.get()));
                assert!(order.lines[..index].iter().all(|before| before.sku != line.sku));
            }
            assert!(serde_json::from_slice::<serde_json::Value>(bytes).is_ok_and(|v| v.is_object()));
        }
        Err(errors) => assert!(!errors.is_empty()),
    }
}

/// A definition that is taken is the same when it is read back.
fn define(bytes: &[u8]) {
    let Ok(definition) = decode::<Definition>(bytes) else { return };
    let written = serde_json::to_vec(&definition).expect("plain data is JSON");
    assert_eq!(decode::<Definition>(&written), Ok(definition));
}

fn adjust(bytes: &[u8]) {
    if let Ok(asked) = decode::<AdjustStock>(bytes) {
        match asked.change().expect("it was checked") {
            TotalChange::By(delta) => assert!(delta != 0 && delta.abs() <= TOTAL_MAX),
            TotalChange::To(total) => assert!((0..=TOTAL_MAX).contains(&total)),
        }
    }
    drop((decode::<UndoAdjustment>(bytes), decode::<ResolveDeadLetter>(bytes)));
}

/// An id that is read is written as it was.
fn ids(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(id) = text.parse::<OrderId>() {
        assert_eq!(id.to_string(), text);
    }
    if let Ok(id) = text.parse::<AdjustmentId>() {
        assert_eq!(id.to_string(), text);
    }
}

fn key(bytes: &[u8]) {
    let mut headers = HeaderMap::new();
    for line in bytes.split(|byte| *byte == b'\n') {
        if let Ok(value) = HeaderValue::from_bytes(line) {
            headers.append(IDEMPOTENCY_KEY, value);
        }
    }
    if let Ok(key) = idempotency_key(&headers) {
        assert!((1..=255).contains(&key.as_str().len()));
        assert!(key.as_str().bytes().all(|byte| (0x21..=0x7E).contains(&byte)));
        assert_eq!(headers.len(), 1);
    }
}

fn query(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(uri) = format!("/v1/orders?{text}").parse::<Uri>() {
        drop(extract::parameters::<ListOrders>(&uri));
    }
}
