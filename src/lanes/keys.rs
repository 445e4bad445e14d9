//! Every Redis key, built in one place. All keys of a lane share one hash tag, so a lane lives on
//! one server of a cluster and one script may touch all of it.

use crate::domain::ids::LaneId;

/// The layout of keys and records that the scripts read and write; part of every key.
pub const LAYOUT: u8 = 1;

/// The keys of one lane, in the order in which `lua/lane/1_read.lua` lists them.
#[derive(Debug, Clone)]
pub struct LaneKeys([String; 7]);

impl LaneKeys {
    pub fn new(lane: &LaneId) -> Self {
        let key = |part| format!("hf{LAYOUT}:{{{}/{}}}:{part}", lane.sale, lane.lane);
        Self(["lane", "stock", "buyers", "orders", "deadlines", "outbox", "adjustments"].map(key))
    }

    pub fn all(&self) -> &[String] {
        &self.0
    }

    pub fn lane(&self) -> &str {
        &self.0[0]
    }

    pub fn stock(&self) -> &str {
        &self.0[1]
    }

    pub fn buyers(&self) -> &str {
        &self.0[2]
    }

    pub fn orders(&self) -> &str {
        &self.0[3]
    }

    pub fn deadlines(&self) -> &str {
        &self.0[4]
    }

    pub fn adjustments(&self) -> &str {
        &self.0[6]
    }

    pub fn outbox(&self) -> &str {
        &self.0[5]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_keys_of_a_lane_share_one_hash_tag() {
        let keys = LaneKeys::new(&LaneId { sale: "double-11".parse().unwrap(), lane: 0 });
        assert_eq!(keys.lane(), "hf1:{double-11/0}:lane");
        assert_eq!(keys.stock(), "hf1:{double-11/0}:stock");
        assert_eq!(keys.buyers(), "hf1:{double-11/0}:buyers");
        assert_eq!(keys.orders(), "hf1:{double-11/0}:orders");
        assert_eq!(keys.outbox(), "hf1:{double-11/0}:outbox");
        assert!(keys.all().iter().all(|key| key.contains("{double-11/0}")));
    }
}
