//! Everything that our own servers tell: a lane's replies, its outbox, Kafka's records. The first
//! byte says which. Nothing may panic; a record that is read is written as it was meant.

#![no_main]

use std::sync::LazyLock;

use holdfast::bus::record::{self, Message};
use holdfast::domain::ids::{AdjustmentId, IdSecret, LaneId, OrderId};
use holdfast::domain::time::Timestamp;
use holdfast::lanes::command::Reserve;
use holdfast::lanes::{outbox, reply};
use libfuzzer_sys::fuzz_target;

struct Fixture {
    secret: IdSecret,
    lane: LaneId,
    order: OrderId,
    adjustment: AdjustmentId,
}

static FIXTURE: LazyLock<Fixture> = LazyLock::new(|| {
    let secret = IdSecret::new(1, &[7; 32]);
    let lane = LaneId { sale: "s".parse().expect("a sale"), lane: 0 };
    let (buyer, key) = ("b".parse().expect("a buyer"), "k".parse().expect("a key"));
    let order = secret.order_id(&lane, secret.order_key(&lane.sale, &buyer, &key));
    let adjustment = secret.adjustment_id(&lane, secret.adjustment_key(&lane.sale, &key));
    Fixture { secret, lane, order, adjustment }
});

fuzz_target!(|data: &[u8]| {
    let Some((which, bytes)) = data.split_first() else { return };
    let text = String::from_utf8_lossy(bytes);
    match which % 5 {
        0 => orders(&text),
        1 => sale(&text),
        2 => adjustments(&text),
        3 => events(&text),
        _ => records(bytes),
    }
});

fn orders(text: &str) {
    let asked = Reserve {
        id: FIXTURE.order.clone(),
        buyer: "b".parse().expect("a buyer"),
        lines: Vec::new(),
        hold_seconds: None,
        trace: None,
    };
    drop(reply::reserved(asked, Timestamp::from_millis(0), text));
    drop(reply::confirmed(FIXTURE.order.clone(), text));
    drop(reply::cancelled(FIXTURE.order.clone(), text));
    drop(reply::got(FIXTURE.order.clone(), text));
    drop(reply::expired(text));
}

fn adjustments(text: &str) {
    drop(reply::adjusted(FIXTURE.adjustment.clone(), text));
    drop(reply::undone(FIXTURE.adjustment.clone(), text));
    drop(reply::previewed(text));
}

fn sale(text: &str) {
    drop((reply::defined(text), reply::phased(text), reply::archived(text), reply::marks(text)));
    drop(reply::stock(text));
}

/// An entry: its id on the first line, then a field or value a line.
fn events(text: &str) {
    let mut lines = text.split('\n').map(str::to_owned);
    let Some(id) = lines.next() else { return };
    let entry = (id, lines.collect());
    if let Ok(events) = outbox::events(&FIXTURE.lane, &FIXTURE.secret, &entry) {
        assert!(events.windows(2).all(|pair| pair[0].seq + 1 == pair[1].seq));
    }
}

/// A record: `name: value` a line for its headers, an empty line, the payload.
fn records(bytes: &[u8]) {
    let end = bytes.windows(2).position(|pair| pair == b"\n\n").unwrap_or(bytes.len());
    let (head, payload) = (&bytes[..end], bytes.get(end + 2..).unwrap_or_default());
    let headers = head.split(|byte| *byte == b'\n').filter_map(|line| {
        let colon = line.windows(2).position(|pair| pair == b": ")?;
        Some((std::str::from_utf8(&line[..colon]).ok()?, &line[colon + 2..]))
    });
    if let Ok(message) = record::decode(headers, payload) {
        let written = match &message {
            Message::Event(event) => record::encode(event),
            Message::Seal(seal) => record::encode_seal(seal),
        };
        let headers = written.headers.iter().map(|(name, value)| (*name, value.as_bytes()));
        assert_eq!(record::decode(headers, &written.payload), Ok(message));
    }
}
