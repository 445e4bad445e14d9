//! A shopper who places orders and does with them whatever can be done.

use holdfast::domain::event::Cause;
use holdfast::domain::ids::{IdSecret, LaneId, OrderId};
use holdfast::domain::order::Line;
use holdfast::domain::stock::{AdjustmentNote, Reason, TotalChange};
use holdfast::lanes::Lanes;
use holdfast::lanes::command::{
    Adjust, BeginPayment, Cancel, Confirm, FailPayment, Reserve, Return, Undo,
};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// So few buyers that each has several orders at a time.
const BUYERS: u32 = 40;

pub struct Shopper {
    pub lanes: Lanes,
    pub lane: LaneId,
    pub secret: IdSecret,
    pub skus: Vec<&'static str>,
    rng: StdRng,
    /// Tells this shopper's keys from others'.
    name: u64,
    orders: u32,
    earlier: Vec<OrderId>,
}

impl Shopper {
    pub fn new(
        lanes: &Lanes,
        lane: &LaneId,
        secret: &IdSecret,
        skus: &[&'static str],
        seed: u64,
    ) -> Self {
        Self {
            lanes: lanes.clone(),
            lane: lane.clone(),
            secret: secret.clone(),
            skus: skus.to_vec(),
            rng: StdRng::seed_from_u64(seed),
            name: seed,
            orders: 0,
            earlier: Vec::new(),
        }
    }

    fn lines(&self, units: u32) -> Vec<Line> {
        let line = |sku: &&str| Line {
            sku: sku.parse().expect("a SKU"),
            quantity: units.try_into().expect("a quantity"),
        };
        self.skus.iter().map(line).collect()
    }

    fn id(&self, buyer: &str, key: &str) -> OrderId {
        let (buyer, key) = (buyer.parse().expect("a buyer"), key.parse().expect("a key"));
        self.secret.order_id(&self.lane, self.secret.order_key(&self.lane.sale, &buyer, &key))
    }

    /// Places one order, and does one thing with it or with an earlier one.
    pub async fn shop(&mut self) {
        self.orders += 1;
        let buyer = format!("u-{}", self.rng.random_range(0..BUYERS));
        let id = self.id(&buyer, &format!("{}-{}", self.name, self.orders));
        let reserve = Reserve {
            id: id.clone(),
            buyer: buyer.parse().expect("a buyer"),
            lines: self.lines(2),
            hold_seconds: None,
            trace: None,
        };
        self.lanes.reserve(reserve).await.expect("an answer");
        let step = self.rng.random_range(0..10);
        match step {
            0 => self.earlier.push(id), // it runs out, unless its payment comes later
            1 => self.cancel(id).await,
            2 => self.cancel_in_advance(&buyer).await,
            3 => self.adjust().await,
            _ => self.pay(id, step).await,
        }
        if self.earlier.len() > 20 {
            let late = self.earlier.remove(0);
            self.confirm(late, Vec::new()).await;
        }
    }

    async fn cancel(&self, id: OrderId) {
        let cancel = Cancel { id, tombstone_for: None, reason: None, trace: None };
        self.lanes.cancel(cancel).await.expect("an answer");
    }

    async fn cancel_in_advance(&self, buyer: &str) {
        let id = self.id(buyer, &format!("never-{}-{}", self.name, self.orders));
        let tombstone_for = Some(buyer.parse().expect("a buyer"));
        let cancel = Cancel { id, tombstone_for, reason: None, trace: None };
        self.lanes.cancel(cancel).await.expect("an answer");
    }

    async fn confirm(&self, id: OrderId, lines: Vec<Line>) {
        let payment = "pay-1".parse().expect("a payment");
        let confirm = Confirm { id, payment, lines, cause: Cause::Caller, trace: None };
        self.lanes.confirm(confirm).await.expect("an answer");
    }

    async fn pay(&self, id: OrderId, step: u32) {
        let payment = || "pay-1".parse().expect("a payment");
        let begin = BeginPayment { id: id.clone(), payment: payment(), trace: None };
        self.lanes.begin_payment(begin).await.expect("an answer");
        if step == 4 {
            let cause = Cause::Webhook;
            let fail = FailPayment { id, payment: payment(), cause, trace: None };
            self.lanes.fail_payment(fail).await.expect("an answer");
            return;
        }
        let part = if step == 5 { self.lines(1) } else { Vec::new() };
        self.confirm(id.clone(), part).await;
        if step >= 8 {
            let key = self.secret.return_key(&id, &"back".parse().expect("a key"));
            let (lines, restock) = (self.lines(1), step == 8);
            let back = Return { id, key, lines, restock, trace: None };
            self.lanes.take_back(back).await.expect("an answer");
        }
    }

    /// More stock, and half of the time the opposite at once.
    async fn adjust(&mut self) {
        let of = |what: &str| {
            let key = format!("{what}-{}-{}", self.name, self.orders).parse().expect("a key");
            self.secret.adjustment_id(&self.lane, self.secret.adjustment_key(&self.lane.sale, &key))
        };
        let (id, undo) = (of("more"), of("less"));
        let actor = || "ops".parse().expect("an actor");
        let adjust = Adjust {
            id: id.clone(),
            sku: self.skus[0].parse().expect("a SKU"),
            change: TotalChange::By(3),
            if_version: None,
            note: AdjustmentNote { reason: Reason::Restock, reference: None, note: None },
            actor: actor(),
            trace: None,
        };
        self.lanes.adjust(adjust).await.expect("an answer");
        if self.rng.random_bool(0.5) {
            let undo = Undo { id: undo, undoes: id, note: None, actor: actor(), trace: None };
            self.lanes.undo(undo).await.expect("an answer");
        }
    }
}
