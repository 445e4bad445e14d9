//! The books of one lane from every side, brought to one event: what Redis counts, what the database
//! counts, the fold of the ledger, and the sum over the recorded orders.
//!
//! Redis is read first: its counters as its event `seq` left them, then the events behind its
//! `recorded` mark that its outbox still has. Then the database, all of it at one moment, with its
//! own mark, which can only have risen since:
//!
//! ```text
//!   outbox:        since ├───────────────────────────┤ seq: Redis' counters
//!   database:  ──────────────────┤ recorded
//!                                 ╰ these events are added to the database's figures
//! ```
//!
//! Where the database is ahead (`recorded` > `seq`: it was read later), what came after `seq` is
//! taken away from its figures, by its own ledger. Where the outbox no longer has what is missing
//! (`since` > `recorded`: it was over half full and trimmed up to what Kafka has), nothing can be said
//! about Redis: that is *undecided*, not a difference.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::domain::event::{Body, Event};
use crate::domain::ids::{EntityKey, IdSecret, LaneId};
use crate::domain::names::{BuyerId, Sku};
use crate::domain::stock::{Change, Units};
use crate::lanes::{LaneError, Lanes, look, outbox};
use crate::ledger::{Difference, Figures, Ledger, LedgerError, SkuFigures};

/// Entries of an outbox that one read takes: each has up to `lanes.batch_max` events, and Redis must
/// not be held for long.
const ENTRIES_A_READ: usize = 8;

/// Why a check has no outcome.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    #[error(transparent)]
    Lane(#[from] LaneError),
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}

/// What one SKU's figures are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SkuBooks {
    pub sku: Sku,
    /// `None` where the lane has left Redis.
    pub redis: Option<Units>,
    pub recorded: SkuFigures,
    /// What events moved that are not recorded yet.
    pub on_its_way: Units,
}

/// What a check found in one lane.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaneBooks {
    pub lane: LaneId,
    /// Events that the database does not have yet.
    pub unrecorded_events: u64,
    /// In order of their names.
    pub skus: Vec<SkuBooks>,
    pub differences: Vec<Difference>,
    /// Why not all could be compared.
    pub undecided: Option<String>,
}

/// An event as far as it moves units.
#[derive(Debug, Clone)]
pub(super) struct Move {
    pub seq: u64,
    pub order: Option<EntityKey>,
    pub buyer: Option<BuyerId>,
    pub changes: Vec<Change>,
}

impl From<Event> for Move {
    fn from(event: Event) -> Self {
        let changes = event.body.changes();
        let (order, buyer) = match event.body {
            Body::Order(step) => (Some(step.order.id.key()), step.order.buyer_id),
            _ => (None, None),
        };
        Self { seq: event.seq, order, buyer, changes }
    }
}

/// A lane in Redis, as its event `seq` left it.
#[derive(Debug, Clone)]
pub(super) struct Live {
    pub epoch: u32,
    pub seq: u64,
    pub counters: BTreeMap<Sku, Units>,
    /// `moves` are all events after this one, up to `seq`.
    pub since: u64,
    pub moves: Vec<Move>,
}

impl Live {
    /// Reads the counters, then at most `events_max` events that were not recorded by then.
    pub async fn read(
        lanes: &Lanes,
        lane: &LaneId,
        secret: &IdSecret,
        events_max: u64,
    ) -> Result<Self, LaneError> {
        let look::Shown { epoch, seq, recorded, what } = lanes.counters(lane).await?;
        let counters = what.into_iter().map(|(sku, counters)| (sku, counters.into())).collect();
        let mut live = Self { epoch, seq, counters, since: recorded, moves: Vec::new() };
        if seq.saturating_sub(recorded) > events_max {
            live.since = seq;
            return Ok(live);
        }
        let mut at = recorded;
        while at < seq {
            let from = (lane.clone(), epoch, at);
            let found = lanes.read_outboxes(&[from], ENTRIES_A_READ, Duration::ZERO).await?;
            let before = at;
            for entry in found.iter().flat_map(|(_, entries)| entries) {
                at = live.take(outbox::events(lane, secret, entry)?, at);
            }
            if at == before {
                // The outbox no longer has what comes next.
                (live.since, live.moves) = (seq, Vec::new());
                break;
            }
        }
        Ok(live)
    }

    /// Takes the events behind `at`, and answers up to where there are some now.
    fn take(&mut self, events: Vec<Event>, mut at: u64) -> u64 {
        for event in events {
            if event.seq <= at || event.seq > self.seq {
                continue;
            }
            if event.seq != at + 1 {
                // Trimmed while it was being read: it begins anew behind the hole.
                (self.since, self.moves) = (event.seq - 1, Vec::new());
            }
            at = event.seq;
            self.moves.push(event.into());
        }
        at
    }

    /// What the events after this one moved, by SKU.
    fn moved_since(&self, recorded: u64) -> BTreeMap<&Sku, Units> {
        let mut moved: BTreeMap<&Sku, Units> = BTreeMap::new();
        let later = self.moves.iter().filter(|one| one.seq > recorded);
        for change in later.flat_map(|one| &one.changes) {
            *moved.entry(&change.sku).or_default() += change.into();
        }
        moved
    }
}

/// Compares all figures of a lane that is in Redis.
pub async fn check(
    lanes: &Lanes,
    ledger: &Ledger,
    lane: &LaneId,
    secret: &IdSecret,
    events_max: u64,
) -> Result<LaneBooks, CheckError> {
    let live = Live::read(lanes, lane, secret, events_max).await?;
    let figures = ledger.within_patience(figures(ledger, lane, live.seq)).await?;
    let behind = is_behind(lanes, lane, &live, &figures).await?;
    Ok(judge(lane, Some(&live), &figures, behind))
}

/// The same of a lane that has left Redis: the database's figures alone.
pub async fn check_recorded(ledger: &Ledger, lane: &LaneId) -> Result<LaneBooks, CheckError> {
    let figures = ledger.within_patience(figures(ledger, lane, u64::MAX)).await?;
    Ok(judge(lane, None, &figures, None))
}

async fn figures(ledger: &Ledger, lane: &LaneId, at: u64) -> Result<Figures, LedgerError> {
    let mut snapshot = ledger.snapshot(lane).await?;
    let figures = snapshot.figures(at).await?;
    snapshot.end().await?;
    Ok(figures)
}

/// A lane's seq where it is below what is recorded of it: whatever is recorded happened before, so
/// Redis has lost it since.
pub(super) async fn is_behind(
    lanes: &Lanes,
    lane: &LaneId,
    live: &Live,
    figures: &Figures,
) -> Result<Option<u64>, LaneError> {
    if figures.recorded <= live.seq {
        return Ok(None);
    }
    let now = lanes.counters(lane).await?.seq;
    Ok((now < figures.recorded).then_some(now))
}

/// `behind`: the lane's seq, where it is below what is recorded of it.
pub(super) fn judge(
    lane: &LaneId,
    live: Option<&Live>,
    figures: &Figures,
    behind: Option<u64>,
) -> LaneBooks {
    let mut books = LaneBooks {
        lane: lane.clone(),
        unrecorded_events: live.map_or(0, |live| live.seq.saturating_sub(figures.recorded)),
        skus: Vec::new(),
        differences: Vec::new(),
        undecided: live.and_then(|live| undecided(live, figures)),
    };
    if (figures.events, figures.last_event) != (figures.recorded, figures.recorded) {
        let Figures { events, last_event, recorded, .. } = figures;
        books.differs(
            "ledger-gap",
            lane.to_string(),
            format!(
                "{events} events in the ledger, the last {last_event}; {recorded} are recorded"
            ),
        );
    }
    if let Some(seq) = behind {
        let detail = format!("event {} is recorded, Redis is at {seq}", figures.recorded);
        books.differs("lane-behind", lane.to_string(), detail);
    }
    let moved = live.map(|live| live.moved_since(figures.recorded)).unwrap_or_default();
    let in_redis = live.into_iter().flat_map(|live| live.counters.keys());
    let skus: BTreeSet<&Sku> =
        figures.skus.keys().chain(in_redis).chain(moved.keys().copied()).collect();
    for sku in skus {
        let recorded = figures.skus.get(sku).copied().unwrap_or_default();
        let redis = live.map(|live| live.counters.get(sku).copied().unwrap_or_default());
        let on_its_way = moved.get(sku).copied().unwrap_or_default();
        books.compare(sku, redis, recorded, on_its_way);
    }
    books
}

fn undecided(live: &Live, figures: &Figures) -> Option<String> {
    if live.epoch != figures.epoch {
        Some(format!("Redis has epoch {}, the database {}", live.epoch, figures.epoch))
    } else if live.since > figures.recorded && live.seq > figures.recorded {
        let (from, to) = (figures.recorded + 1, live.since);
        Some(format!("events {from} to {to} are neither recorded nor looked at in the outbox"))
    } else {
        None
    }
}

impl LaneBooks {
    /// With Redis as a rebuild would make it.
    pub fn repaired(&self) -> Self {
        let mut repaired = self.clone();
        for sku in &mut repaired.skus {
            sku.redis = Some(sku.recorded.counters + sku.on_its_way);
        }
        repaired
    }

    pub(super) fn differs(&mut self, what: &'static str, subject: String, detail: String) {
        self.differences.push(Difference { what, subject, detail });
    }

    fn compare(
        &mut self,
        sku: &Sku,
        redis: Option<Units>,
        recorded: SkuFigures,
        on_its_way: Units,
    ) {
        let SkuFigures { counters, ledger, orders } = recorded;
        let mut found = Vec::new();
        if counters != ledger {
            found.push(("ledger-fold", format!("counters: {counters}; ledger: {ledger}")));
        }
        if (counters.held, counters.sold) != (orders.held, orders.sold) {
            let Units { held, sold, .. } = orders;
            found.push((
                "recorded-orders",
                format!("counters: {counters}; orders: {held} held, {sold} sold"),
            ));
        }
        if let Some(redis) = redis
            && self.undecided.is_none()
            && redis != counters + on_its_way
        {
            found.push((
                "redis-counters",
                format!("Redis: {redis}; database: {}", counters + on_its_way),
            ));
        }
        for (what, detail) in found {
            self.differs(what, sku.to_string(), detail);
        }
        self.skus.push(SkuBooks { sku: sku.clone(), redis, recorded, on_its_way });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sku() -> Sku {
        "a".parse().unwrap()
    }

    fn units(available: i64, held: i64, sold: i64) -> Units {
        Units { available, held, sold }
    }

    fn lane() -> LaneId {
        LaneId { sale: "s".parse().unwrap(), lane: 0 }
    }

    /// Ten units; five events are recorded, the last two held one each.
    fn figures() -> Figures {
        let sku_figures =
            SkuFigures { counters: units(8, 2, 0), ledger: units(8, 2, 0), orders: units(0, 2, 0) };
        let skus = [(sku(), sku_figures)].into();
        Figures { epoch: 1, recorded: 5, events: 5, last_event: 5, skus }
    }

    /// Redis at event 7: another was held, and one of the three sold.
    fn live() -> Live {
        let moved = |seq, units: Units| Move {
            seq,
            order: None,
            buyer: None,
            changes: vec![Change {
                sku: sku(),
                available: units.available,
                held: units.held,
                sold: units.sold,
            }],
        };
        let moves = vec![moved(6, units(-1, 1, 0)), moved(7, units(0, -1, 1))];
        Live { epoch: 1, seq: 7, counters: [(sku(), units(7, 2, 1))].into(), since: 5, moves }
    }

    fn found(live: &Live, figures: &Figures) -> Vec<&'static str> {
        let books = judge(&lane(), Some(live), figures, None);
        books.differences.iter().map(|difference| difference.what).collect()
    }

    #[test]
    fn books_agree_once_what_is_on_its_way_is_counted() {
        let books = judge(&lane(), Some(&live()), &figures(), None);
        assert_eq!((books.differences, books.undecided), (vec![], None));
        assert_eq!(books.unrecorded_events, 2);
        let earlier = Live { since: 3, moves: live().moves, ..live() };
        assert!(found(&earlier, &figures()).is_empty(), "more than is needed does no harm");
    }

    #[test]
    fn each_figure_that_is_changed_is_found() {
        let mut redis = live();
        redis.counters.insert(sku(), units(8, 2, 1));
        assert_eq!(found(&redis, &figures()), ["redis-counters"]);
        let mut database = figures();
        database.skus.get_mut(&sku()).unwrap().counters = units(7, 3, 0);
        let whats = ["ledger-fold", "recorded-orders", "redis-counters"];
        assert_eq!(found(&live(), &database), whats);
        let mut orders = figures();
        orders.skus.get_mut(&sku()).unwrap().orders = units(0, 1, 1);
        assert_eq!(found(&live(), &orders), ["recorded-orders"]);
        let gap = Figures { events: 4, ..figures() };
        assert_eq!(found(&live(), &gap), ["ledger-gap"]);
        let books = judge(&lane(), Some(&live()), &figures(), Some(4));
        assert_eq!(books.differences[0].what, "lane-behind");
    }

    #[test]
    fn what_the_outbox_no_longer_has_is_undecided_and_the_rest_is_compared() {
        let trimmed = Live { since: 6, moves: live().moves.split_off(1), ..live() };
        let books = judge(&lane(), Some(&trimmed), &figures(), None);
        assert!(books.differences.is_empty());
        assert!(books.undecided.unwrap().contains("events 6 to 6"));
        let other = Live { epoch: 2, ..live() };
        assert!(judge(&lane(), Some(&other), &figures(), None).undecided.is_some());
        let mut orders = figures();
        orders.skus.get_mut(&sku()).unwrap().orders = units(0, 1, 1);
        assert_eq!(found(&trimmed, &orders), ["recorded-orders"]);
    }
}
