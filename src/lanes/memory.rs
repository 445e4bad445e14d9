//! What a process must not forget of a lane: how far it has seen it, and which orders it has told
//! somebody of that Kafka may not have yet. A lane that has forgotten them is frozen by the first
//! ([`Memory::seen`] goes with every call), and recovery names by the second what was lost.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};

use super::Lanes;
use super::reply::{Frozen, Marks};
use crate::domain::ids::{EntityKey, LaneId};
use crate::domain::testimony::Testimony;

/// Whether a lane can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Standing {
    #[default]
    Open,
    Frozen(Frozen),
    Missing,
}

#[derive(Default)]
struct Remembered {
    epoch: u32,
    seq: u64,
    logged: u64,
    orders: BTreeMap<u64, EntityKey>,
    unlisted: u64,
    standing: Standing,
}

/// The memory of one lane.
#[derive(Default)]
pub(super) struct Memory(Mutex<Remembered>);

impl Memory {
    fn lock(&self) -> MutexGuard<'_, Remembered> {
        self.0.lock().expect("no panic while it is locked")
    }

    /// The highest epoch and seq that the lane has shown.
    pub fn seen(&self) -> Option<(u32, u64)> {
        let remembered = self.lock();
        (remembered.epoch > 0).then_some((remembered.epoch, remembered.seq))
    }

    /// Takes note of what a reply says; true where the lane stands otherwise than before. Of a lane
    /// that is frozen or gone nothing is unlearnt.
    pub fn see(&self, marks: Marks, standing: Standing) -> bool {
        let mut remembered = self.lock();
        remembered.learn(marks);
        let was = remembered.standing;
        // One that was never there is not gone.
        if standing != Standing::Missing || remembered.epoch > 0 {
            remembered.standing = standing;
        }
        remembered.standing != was
    }

    /// The same of marks that say nothing about whether it is frozen.
    pub fn learn(&self, marks: Marks) {
        self.lock().learn(marks);
    }

    /// Somebody is told of an order that stands at `seq`; false where there is no room to keep that.
    pub fn told(&self, epoch: u32, seq: u64, order: EntityKey, orders_max: usize) -> bool {
        let mut remembered = self.lock();
        if epoch != remembered.epoch || seq <= remembered.logged {
            return true;
        }
        let fits = remembered.orders.len() < orders_max || remembered.orders.contains_key(&seq);
        if fits {
            remembered.orders.insert(seq, order);
        } else {
            remembered.unlisted = remembered.unlisted.max(seq);
        }
        fits
    }

    fn testimony(&self) -> Testimony {
        let remembered = self.lock();
        Testimony {
            epoch: remembered.epoch,
            seq: remembered.seq,
            logged: remembered.logged,
            orders: remembered.orders.iter().map(|(seq, order)| (*seq, *order)).collect(),
            unlisted: remembered.unlisted,
        }
    }

    /// Nothing that Kafka may not have: the lane may be forgotten.
    pub fn is_settled(&self) -> bool {
        let remembered = self.lock();
        remembered.seq <= remembered.logged
    }

    pub fn standing(&self) -> Standing {
        self.lock().standing
    }

    pub fn orders(&self) -> usize {
        self.lock().orders.len()
    }
}

impl Remembered {
    fn learn(&mut self, marks: Marks) {
        if marks.epoch > self.epoch {
            // Before that epoch began recovery has asked what was known of the last one.
            *self = Self { epoch: marks.epoch, standing: self.standing, ..Self::default() };
        } else if marks.epoch < self.epoch {
            return;
        }
        self.seq = self.seq.max(marks.seq);
        if marks.logged > self.logged {
            self.logged = marks.logged;
            while let Some(first) = self.orders.first_entry()
                && *first.key() <= marks.logged
            {
                first.remove();
            }
            if self.unlisted <= marks.logged {
                self.unlisted = 0;
            }
        }
    }
}

impl Lanes {
    /// What this process remembers of a lane.
    pub fn testimony(&self, lane: &LaneId) -> Testimony {
        let lanes = self.lanes.lock().expect("no panic while the lanes are locked");
        lanes.get(lane).map(|lane| lane.watch.memory.testimony()).unwrap_or_default()
    }

    /// Lanes that have shown events here of which it is not known that Kafka has them.
    pub fn unsettled(&self) -> Vec<LaneId> {
        let lanes = self.lanes.lock().expect("no panic while the lanes are locked");
        let unsettled = lanes.iter().filter(|(_, lane)| !lane.watch.memory.is_settled());
        unsettled.map(|(id, _)| id.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn marks(epoch: u32, seq: u64, logged: u64) -> Marks {
        Marks { epoch, seq, logged, ..Marks::default() }
    }

    #[test]
    fn what_kafka_may_not_have_is_not_to_be_forgotten() {
        let memory = Memory::default();
        assert!(memory.is_settled(), "nothing was seen");
        memory.learn(marks(1, 5, 4));
        assert!(!memory.is_settled());
        memory.see(marks(1, 4, 4), Standing::Frozen(Frozen::Behind));
        assert_eq!((memory.seen(), memory.is_settled()), (Some((1, 5)), false), "it has lost it");
        memory.see(Marks::default(), Standing::Missing);
        assert_eq!((memory.seen(), memory.is_settled()), (Some((1, 5)), false));
        memory.learn(marks(2, 4, 4));
        assert_eq!(
            (memory.seen(), memory.is_settled()),
            (Some((2, 4)), true),
            "it was opened anew"
        );
        memory.learn(marks(1, 9, 9));
        assert_eq!(memory.seen(), Some((2, 4)), "an old answer that comes late");
    }

    #[test]
    fn a_lane_that_was_never_there_is_not_gone() {
        let memory = Memory::default();
        assert!(!memory.see(Marks::default(), Standing::Missing));
        assert!(!memory.see(marks(1, 1, 0), Standing::Open));
        assert!(memory.see(Marks::default(), Standing::Missing));
        assert!(memory.see(marks(1, 1, 0), Standing::Open), "it is back");
    }
}
