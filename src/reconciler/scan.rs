//! A scan of all orders and buyers of a lane that is being sold from, page by page.
//!
//! Each page comes with the seq at which it is so, and an order or buyer counts as of its page. At
//! the end the lane's counters are read as its event `seq` left them, and every order and buyer is
//! wound forward to that one seq: an event of theirs behind their page moves units, and is added. The
//! events since the scan began are in the ledger as far as it is recorded, and in the outbox from
//! there. So the sums are exact, however much was sold meanwhile; nothing is ever wound back, since
//! no page is later than `seq`.
//!
//! An order that no page has was placed since (orders are never removed): all its events count. Of a
//! buyer that no page has, but of whom an event tells, it is not known when the count began: whoever
//! comes or goes during a scan is left to the next one.
//!
//! Against the recorded rows, all as of one moment, an order is compared by the seq of its last
//! event: the same must have the same content; Redis may be ahead of a row by what is not recorded,
//! and a row ahead of Redis by what came after the order's page.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};

use super::books::{CheckError, LaneBooks, Live, is_behind, judge};
use crate::config::{self, millis};
use crate::domain::ids::{EntityKey, IdSecret, LaneId};
use crate::domain::names::{BuyerId, Sku};
use crate::domain::order::{Order, Status};
use crate::domain::stock::Units;
use crate::lanes::Lanes;
use crate::lanes::look::{BuyerEntry, OrderEntry, Page, Shown};
use crate::ledger::{Ledger, RecordedMove, Snapshot};

/// Differences that a scan collects at most.
const DIFFERENCES_MAX: usize = 10_000;

/// An order that was on a page.
#[derive(Debug, Clone, Copy)]
struct SeenOrder {
    seq: u64,
    /// When its page was so.
    page: u64,
    status: Status,
    content: u64,
}

/// What a buyer has, by SKU: as counted against the limits, and as the orders say.
#[derive(Debug, Default)]
struct Tally {
    /// When the page was so that the buyer was on.
    page: Option<u64>,
    /// An event told of the buyer.
    moved: bool,
    units: Vec<(Sku, i64, i64)>,
}

impl Tally {
    fn add(&mut self, sku: &Sku, counted: i64, of_orders: i64) {
        let at = self.units.iter().position(|(known, ..)| known == sku).unwrap_or_else(|| {
            self.units.push((sku.clone(), 0, 0));
            self.units.len() - 1
        });
        self.units[at].1 += counted;
        self.units[at].2 += of_orders;
    }
}

/// What the pages showed, wound forward as events are added.
#[derive(Debug)]
struct Scan {
    epoch: u32,
    /// The lane's seq when the first page was read.
    began: u64,
    orders: HashMap<EntityKey, SeenOrder>,
    /// What the orders hold and have bought.
    sums: BTreeMap<Sku, Units>,
    buyers: HashMap<BuyerId, Tally>,
    /// Fields that cannot be read, and why.
    unreadable: Vec<(String, String)>,
    /// Why it ended before all was seen.
    gave_up: Option<String>,
}

/// Checks a lane's figures as [`super::books::check`] does, and everything behind them.
pub(super) async fn scan(
    lanes: &Lanes,
    ledger: &Ledger,
    lane: &LaneId,
    secret: &IdSecret,
    options: &config::Reconciler,
) -> Result<LaneBooks, CheckError> {
    let scan = Scan::read(lanes, lane, secret, options).await?;
    let live = Live::read(lanes, lane, secret, options.events_max).await?;
    let compared = async { scan.compare(lanes, ledger.snapshot(lane).await?, lane, &live).await };
    ledger.within_patience(compared).await
}

/// The same of a lane that nobody uses, however long it takes.
pub(super) async fn scan_at_rest(
    lanes: &Lanes,
    ledger: &Ledger,
    lane: &LaneId,
    secret: &IdSecret,
    options: &config::Reconciler,
) -> Result<LaneBooks, CheckError> {
    let scan = Scan::read(lanes, lane, secret, options).await?;
    let live = Live::read(lanes, lane, secret, options.events_max).await?;
    let mut snapshot = ledger.snapshot(lane).await?;
    snapshot.lasting().await?;
    scan.compare(lanes, snapshot, lane, &live).await
}

impl Scan {
    /// Reads all pages, resting between them.
    async fn read(
        lanes: &Lanes,
        lane: &LaneId,
        secret: &IdSecret,
        options: &config::Reconciler,
    ) -> Result<Self, CheckError> {
        let (count, rest) = (options.page_max, millis(options.page_pause_ms));
        let mut page = lanes.orders_page(lane, secret, None, count).await?;
        let mut scan = Self::new(page.epoch, page.seq);
        loop {
            let next = page.what.next.take();
            scan.take_orders(page);
            if scan.orders.len() > options.orders_max {
                scan.gave_up = Some(format!("it has more than {} orders", options.orders_max));
                return Ok(scan);
            }
            tokio::time::sleep(rest).await;
            let Some(cursor) = next else { break };
            page = lanes.orders_page(lane, secret, Some(&cursor), count).await?;
        }
        let mut page = lanes.buyers_page(lane, None, count).await?;
        loop {
            let next = page.what.next.take();
            scan.take_buyers(page);
            let Some(cursor) = next else { return Ok(scan) };
            tokio::time::sleep(rest).await;
            page = lanes.buyers_page(lane, Some(&cursor), count).await?;
        }
    }

    fn new(epoch: u32, began: u64) -> Self {
        Self {
            epoch,
            began,
            orders: HashMap::new(),
            sums: BTreeMap::new(),
            buyers: HashMap::new(),
            unreadable: Vec::new(),
            gave_up: None,
        }
    }

    fn take_orders(&mut self, page: Shown<Page<OrderEntry>>) {
        for entry in page.what.entries {
            let (key, order) = match entry {
                Ok(entry) => entry,
                Err((field, why)) => {
                    self.unreadable.push((field, why.to_string()));
                    continue;
                }
            };
            let (seq, status) = (order.seq, order.status);
            let seen = SeenOrder { seq, page: page.seq, status, content: content(&order) };
            // Redis may show an entry twice; the first page counts.
            if self.orders.contains_key(&key) {
                continue;
            }
            self.orders.insert(key, seen);
            for (sku, units) in order.units() {
                self.add(order.buyer_id.as_ref(), sku, units);
            }
        }
    }

    fn take_buyers(&mut self, page: Shown<Page<BuyerEntry>>) {
        for entry in page.what.entries {
            match entry {
                Ok((buyer, units)) => {
                    let tally = self.buyers.entry(buyer).or_default();
                    if tally.page.is_none() {
                        tally.page = Some(page.seq);
                        units.iter().for_each(|(sku, units)| tally.add(sku, *units, 0));
                    }
                }
                Err((field, why)) => self.unreadable.push((field, why.to_string())),
            }
        }
    }

    /// Units that an order has, or that an event gave it.
    fn add(&mut self, buyer: Option<&BuyerId>, sku: &Sku, units: Units) {
        *self.sums.entry(sku.clone()).or_default() += units;
        if let Some(buyer) = buyer {
            self.buyers.entry(buyer.clone()).or_default().add(sku, 0, units.taken());
        }
    }

    /// Adds what an event moved for an order, to whatever was seen before it.
    fn wind(&mut self, seq: u64, key: EntityKey, buyer: Option<&BuyerId>, sku: &Sku, units: Units) {
        if self.orders.get(&key).is_none_or(|seen| seq > seen.page) {
            self.add(buyer, sku, units);
        }
        let Some(buyer) = buyer else { return };
        let tally = self.buyers.entry(buyer.clone()).or_default();
        tally.moved = true;
        if tally.page.is_some_and(|page| seq > page) {
            tally.add(sku, units.taken(), 0);
        }
    }

    fn wind_recorded(&mut self, moved: &RecordedMove) {
        let RecordedMove { seq, order, buyer, sku, units } = moved;
        self.wind(*seq, order.key(), buyer.as_ref(), sku, *units);
    }

    fn wind_unrecorded(&mut self, live: &Live, recorded: u64) {
        let after = recorded.max(self.began);
        for moved in live.moves.iter().filter(|moved| moved.seq > after) {
            let Some(key) = moved.order else { continue };
            for change in &moved.changes {
                self.wind(moved.seq, key, moved.buyer.as_ref(), &change.sku, change.into());
            }
        }
    }

    /// Compares with the lane's counters, and with the database as of one moment.
    async fn compare(
        mut self,
        lanes: &Lanes,
        mut snapshot: Snapshot,
        lane: &LaneId,
        live: &Live,
    ) -> Result<LaneBooks, CheckError> {
        let figures = snapshot.figures(live.seq).await?;
        let recorded = figures.recorded;
        let behind = is_behind(lanes, lane, live, &figures).await?;
        let mut books = judge(lane, Some(live), &figures, behind);
        if self.epoch != live.epoch {
            self.gave_up = Some("its epoch changed meanwhile".to_owned());
        }
        // Of a lane that has lost events, what follows would be noise: other events have their seqs.
        if behind.is_none() && self.gave_up.is_none() {
            if books.undecided.is_none() {
                let until = recorded.min(live.seq);
                snapshot.moves(self.began, until, |moved| self.wind_recorded(&moved)).await?;
                self.wind_unrecorded(live, recorded);
                self.compare_sums(live, &mut books);
                self.compare_buyers(&mut books);
            }
            snapshot.orders(|row| self.compare_row(&row, recorded, &mut books)).await?;
            self.compare_rest(lane, recorded, &mut books);
        }
        snapshot.end().await?;
        for (field, why) in self.unreadable {
            books.differs("unreadable", field, why);
        }
        books.undecided = books.undecided.or(self.gave_up);
        books.differences.truncate(DIFFERENCES_MAX);
        Ok(books)
    }

    fn compare_sums(&self, live: &Live, books: &mut LaneBooks) {
        let skus: BTreeSet<&Sku> = live.counters.keys().chain(self.sums.keys()).collect();
        for sku in skus {
            let counters = live.counters.get(sku).copied().unwrap_or_default();
            let Units { held, sold, .. } = self.sums.get(sku).copied().unwrap_or_default();
            if (counters.held, counters.sold) != (held, sold) {
                let detail =
                    format!("Redis' counters: {counters}; its orders: {held} held, {sold} sold");
                books.differs("redis-orders", sku.to_string(), detail);
            }
        }
    }

    fn compare_buyers(&self, books: &mut LaneBooks) {
        for (buyer, tally) in &self.buyers {
            if tally.page.is_none() && tally.moved {
                continue; // came or went meanwhile: the next scan knows
            }
            for (sku, counted, of_orders) in &tally.units {
                if counted != of_orders {
                    let detail = format!("{sku}: {counted} counted, {of_orders} in orders");
                    books.differs("buyer-count", buyer.to_string(), detail);
                }
            }
        }
    }

    /// Compares a recorded order with the one that was seen, which is done with then.
    fn compare_row(&mut self, row: &Order, recorded: u64, books: &mut LaneBooks) {
        let at = |seq: u64, status: Status| format!("{} as of event {seq}", status.as_str());
        let in_database = at(row.seq, row.status);
        let Some(seen) = self.orders.remove(&row.id.key()) else {
            if row.seq <= self.began || row.seq > recorded {
                let detail = format!("recorded: {in_database}; not in Redis");
                books.differs("order", row.id.to_string(), detail);
            }
            return;
        };
        let in_redis = at(seen.seq, seen.status);
        let differs = match row.seq {
            seq if seq == seen.seq => content(row) != seen.content,
            seq if seq < seen.seq => seen.seq <= recorded,
            // Ahead of what was recorded with it, a row is of no event at all.
            seq => seq <= seen.page || seq > recorded,
        };
        if differs {
            let detail = format!("recorded: {in_database}; Redis: {in_redis}");
            books.differs("order", row.id.to_string(), detail);
        }
    }

    /// What is left has no row.
    fn compare_rest(&self, lane: &LaneId, recorded: u64, books: &mut LaneBooks) {
        for (key, seen) in self.orders.iter().filter(|(_, seen)| seen.seq <= recorded) {
            let (seq, status) = (seen.seq, seen.status.as_str());
            let detail = format!("not recorded; Redis: {status} as of event {seq}");
            books.differs("order", format!("{lane} {}", key.encode()), detail);
        }
    }
}

/// What tells two states of an order with the same seq apart.
fn content(order: &Order) -> u64 {
    let Order {
        id: _,
        buyer_id,
        status,
        lines,
        returned,
        payment_id,
        created_at,
        expires_at,
        confirmed_at,
        reacquired,
        // Rows of earlier versions lack these.
        hold_seconds: _,
        asked: _,
        seq: _,
    } = order;
    let mut hasher = DefaultHasher::new();
    (buyer_id, status, lines, returned, payment_id).hash(&mut hasher);
    (created_at, expires_at, confirmed_at, reacquired).hash(&mut hasher);
    hasher.finish()
}
