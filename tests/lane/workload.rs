//! Random commands for one sale: few buyers, keys and SKUs, so that they meet often.

use holdfast::domain::event::Cause;
use holdfast::domain::names::Sku;
use holdfast::domain::sale::Definition;
use holdfast::domain::stock::TotalChange;
use holdfast::lanes::command::{
    Adjust, BeginPayment, Cancel, Command, Confirm, FailPayment, IfVersion, PhaseChange, Preview,
    Reserve, Return, Undo,
};
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{RngExt, SeedableRng};

use crate::sale::{Sale, definition, lines, note};

const BUYERS: [&str; 5] = ["ann", "bob", "cy", "~!dee@shop", "eve,=1"];
const KEYS: [&str; 8] = ["k0", "k1", "k2", "k3", "k4", "k5", "k6", "k7"];
const SKUS: [&str; 4] = ["phone", "case.red", "cable-1", "pen_2"];
const PAYMENTS: [&str; 3] = ["pay-1", "pay-2", "pay=3,"];
const ADJUSTMENT_KEYS: [&str; 8] = ["a0", "a1", "a2", "a3", "a4", "a5", "a6", "a7"];
const TRACES: [&str; 2] =
    ["00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "00-aa-bb-00"];
/// How long the shorter holds last, in seconds: the shortest that a definition may say.
pub const SHORT_HOLD: u32 = 1;
const HOLD: u32 = 300;
/// More than there can be orders, so that one `expire` ends all that is due; yet so few that a
/// call has room for several.
const EXPIRE_MAX: usize = BUYERS.len() * KEYS.len() + 1;

pub struct Workload {
    pub rng: StdRng,
    reserves: Vec<Reserve>,
    version: u64,
}

impl Workload {
    pub fn new(seed: u64) -> Self {
        Self { rng: StdRng::seed_from_u64(seed), reserves: Vec::new(), version: 1 }
    }

    fn one_of<T: Copy>(&mut self, of: &[T]) -> T {
        *of.choose(&mut self.rng).expect("there are some")
    }

    /// What the sale is at first: three SKUs, scarce or plenty, with limits or without.
    pub fn first_definition(&mut self) -> Definition {
        let mut first = definition(&[("none", 0)]);
        first.skus.clear();
        let mut skus = SKUS;
        skus.shuffle(&mut self.rng);
        for name in &skus[..3] {
            first.skus.push(self.sku(name));
        }
        first.hold_seconds = HOLD;
        first.per_buyer_limit = self.limit();
        first
    }

    fn limit(&mut self) -> Option<u32> {
        self.rng.random_bool(0.5).then(|| self.rng.random_range(2..12))
    }

    fn sku(&mut self, name: &str) -> holdfast::domain::sale::SkuDefinition {
        let stock = self.one_of(&[0, 3, 10, 40]);
        holdfast::domain::sale::SkuDefinition {
            stock,
            per_buyer_limit: self.limit(),
            ..crate::sale::sku(name)
        }
    }

    /// The next call: up to `max` commands.
    pub fn batch(&mut self, sale: &Sale, current: Option<&Definition>, max: usize) -> Vec<Command> {
        let count = self.rng.random_range(1..=max);
        (0..count).map(|_| self.command(sale, current)).collect()
    }

    fn command(&mut self, sale: &Sale, current: Option<&Definition>) -> Command {
        let trace = self.rng.random_bool(0.3).then(|| self.one_of(&TRACES).to_owned());
        match self.rng.random_range(0..1000) {
            0..350 => Command::Reserve(Reserve { trace, ..self.reserve(sale) }),
            350..590 => self.payment(sale, trace),
            590..640 => self.take_back(sale, trace),
            640..700 => Command::Cancel(Cancel { trace, ..self.cancel(sale) }),
            700..750 => Command::Expire { max: EXPIRE_MAX },
            750..810 => {
                let (buyer, key) = (self.one_of(&BUYERS), self.one_of(&KEYS));
                Command::Get { id: sale.id(buyer, key) }
            }
            810..840 => Command::Stock,
            840..910 => match self.rng.random_range(0..10) {
                0..5 => Command::Adjust(Adjust { trace, ..self.adjust(sale) }),
                5..8 => Command::Undo(Undo { trace, ..self.undo(sale) }),
                _ => Command::Preview(self.preview(sale)),
            },
            910..950 => {
                let mut phase = sale.changing(match self.rng.random_range(0..24) {
                    0..8 => PhaseChange::Pause,
                    8..23 => PhaseChange::Resume,
                    _ => PhaseChange::Close,
                });
                phase.trace = trace;
                Command::Phase(phase)
            }
            950..980 => self.define(sale, current),
            980..990 => {
                let retention_ms = self.one_of(&[0, 1_000_000]);
                Command::Archive { retention_ms }
            }
            _ => Command::Marks,
        }
    }

    fn reserve(&mut self, sale: &Sale) -> Reserve {
        if let Some(mut earlier) = self.reserves.choose(&mut self.rng).cloned() {
            match self.rng.random_range(0..10) {
                0 | 1 => return earlier,
                2 => {
                    earlier.lines.shuffle(&mut self.rng);
                    return earlier;
                }
                3 => {
                    earlier.lines = self.lines();
                    return earlier;
                }
                4 => {
                    earlier.hold_seconds = self.hold();
                    return earlier;
                }
                _ => {}
            }
        }
        let (buyer, key) = (self.one_of(&BUYERS), self.one_of(&KEYS));
        let mut reserve = sale.reserving(buyer, key, &[]);
        reserve.lines = self.lines();
        reserve.hold_seconds = self.hold();
        self.reserves.push(reserve.clone());
        reserve
    }

    fn hold(&mut self) -> Option<u32> {
        self.one_of(&[None, None, Some(HOLD), Some(SHORT_HOLD), Some(SHORT_HOLD), Some(HOLD + 1)])
    }

    fn lines(&mut self) -> Vec<holdfast::domain::order::Line> {
        let mut skus = SKUS;
        skus.shuffle(&mut self.rng);
        let count = self.one_of(&[1, 1, 1, 2, 3, 4]);
        let asked: Vec<_> =
            skus[..count].iter().map(|sku| (*sku, self.rng.random_range(1..=3))).collect();
        lines(&asked)
    }

    fn payment(&mut self, sale: &Sale, trace: Option<String>) -> Command {
        let (buyer, key) = (self.one_of(&BUYERS), self.one_of(&KEYS));
        let id = sale.id(buyer, key);
        let payment = self.one_of(&PAYMENTS).parse().expect("a payment");
        let cause = self.one_of(&[Cause::Caller, Cause::Caller, Cause::Webhook]);
        match self.rng.random_range(0..10) {
            0..3 => Command::BeginPayment(BeginPayment { id, payment, trace }),
            3 => Command::FailPayment(FailPayment { id, payment, cause, trace }),
            4..9 => Command::Confirm(Confirm { id, payment, lines: Vec::new(), cause, trace }),
            _ => Command::Confirm(Confirm { id, payment, lines: self.lines(), cause, trace }),
        }
    }

    fn take_back(&mut self, sale: &Sale, trace: Option<String>) -> Command {
        let (buyer, key) = (self.one_of(&BUYERS), self.one_of(&KEYS));
        let id = sale.id(buyer, key);
        let lines = if self.rng.random_bool(0.5) { Vec::new() } else { self.lines() };
        let key = sale.return_key(&id, self.one_of(&["r0", "r1", "r2"]));
        let restock = self.rng.random_bool(0.5);
        Command::Return(Return { id, key, lines, restock, trace })
    }

    fn cancel(&mut self, sale: &Sale) -> Cancel {
        let (buyer, key) = (self.one_of(&BUYERS), self.one_of(&KEYS));
        let mut cancel = sale.cancelling(&sale.id(buyer, key));
        if self.rng.random_bool(0.2) {
            cancel.tombstone_for = Some(buyer.parse().expect("a buyer"));
        }
        if self.rng.random_bool(0.5) {
            cancel.reason = Some("the \"buyer\" left, für immer".into());
        }
        cancel
    }

    fn adjust(&mut self, sale: &Sale) -> Adjust {
        let (key, sku) = (self.one_of(&ADJUSTMENT_KEYS), self.one_of(&SKUS));
        let (change, if_version) = (self.change(), self.if_version());
        let mut adjust = Adjust { change, if_version, ..sale.adjusting(key, sku, 0) };
        if self.rng.random_bool(0.1) {
            adjust.note = note("another note");
        }
        adjust
    }

    fn change(&mut self) -> TotalChange {
        if self.rng.random_bool(0.3) {
            return TotalChange::To(self.one_of(&[0, 10, 40, 45]));
        }
        TotalChange::By(self.one_of(&[5, 5, 5, -1, -2, -50, 999_999_990, 2_000_000_000]))
    }

    fn if_version(&mut self) -> Option<IfVersion> {
        let versions = self.one_of(&[&[0][..], &[0, 1], &[1, 2, 3, 4], &[]]);
        match self.rng.random_range(0..10) {
            0..5 => None,
            5..7 => Some(IfVersion::Any),
            _ => Some(IfVersion::OneOf(versions.to_vec())),
        }
    }

    fn preview(&mut self, sale: &Sale) -> Preview {
        let (sku, change) = (self.one_of(&SKUS), self.change());
        Preview { if_version: self.if_version(), ..sale.previewing(sku, change) }
    }

    fn undo(&mut self, sale: &Sale) -> Undo {
        let (key, undoes) = (self.one_of(&ADJUSTMENT_KEYS), self.one_of(&ADJUSTMENT_KEYS));
        let note = self.rng.random_bool(0.3).then(|| "a \"mistake\", für immer".to_owned());
        Undo { note, ..sale.undoing(key, &sale.adjustment_id(undoes)) }
    }

    fn define(&mut self, sale: &Sale, current: Option<&Definition>) -> Command {
        let mut new = current.cloned().unwrap_or_else(|| self.first_definition());
        match self.rng.random_range(0..6) {
            0 => new.per_buyer_limit = self.limit(),
            1 => {
                let name: Sku = self.one_of(&SKUS).parse().expect("a SKU");
                if new.skus.iter().all(|s| s.sku != name) {
                    let sku = self.sku(name.as_str());
                    new.skus.push(sku);
                }
            }
            2 if new.skus.len() > 1 => drop(new.skus.remove(0)),
            3 => new.skus[0].stock += 1,
            4 => new.skus[0].per_buyer_limit = self.limit(),
            _ => {}
        }
        let version = match self.rng.random_range(0..4) {
            0 => self.rng.random_range(1..=self.version),
            _ => {
                self.version += 1;
                self.version
            }
        };
        Command::Define(Box::new(sale.defining(version, new)))
    }
}
