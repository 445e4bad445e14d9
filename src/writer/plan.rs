//! What becomes of each record of a batch: decided here, without asking anybody, from what was
//! read of the database before.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::domain::event::{Body, Event, Seal};
use crate::domain::ids::LaneId;
use crate::ledger::{
    Batch, DeadLetter, DeadReason, LaneMark, LaneMove, Parked, ParkedKey, Place, RecordedEvent,
    StoredRecord,
};

/// A record and what it says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arrival {
    pub record: StoredRecord,
    pub content: Content,
    /// Its place in the parked records, if it waited there.
    pub parked: Option<ParkedKey>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    Event(Box<Event>),
    Seal(Seal),
    /// Known to be a dead letter before anything is asked.
    Dead {
        reason: DeadReason,
        detail: String,
        place: Option<Place>,
    },
}

impl Arrival {
    /// Where it is to be parked, or is.
    pub fn parked_key(&self, event: &Event) -> ParkedKey {
        self.parked.clone().unwrap_or_else(|| ParkedKey {
            lane: event.lane.clone(),
            seq: event.seq,
            digest: self.record.digest(),
        })
    }

    pub fn event(&self) -> Option<&Event> {
        match &self.content {
            Content::Event(event) => Some(event),
            Content::Seal(_) | Content::Dead { .. } => None,
        }
    }

    pub fn seal(&self) -> Option<&Seal> {
        match &self.content {
            Content::Seal(seal) => Some(seal),
            Content::Event(_) | Content::Dead { .. } => None,
        }
    }

    /// What it belongs to, or says so.
    pub fn lane(&self) -> Option<&LaneId> {
        match &self.content {
            Content::Event(event) => Some(&event.lane),
            Content::Seal(seal) => Some(&seal.lane),
            Content::Dead { place, .. } => place.as_ref().map(|place| &place.lane),
        }
    }
}

/// What the database knew when it was asked, and what this writer has left in Kafka.
#[derive(Debug, Clone, Default)]
pub struct Known {
    /// Of each lane that exists.
    pub marks: HashMap<LaneId, LaneMark>,
    /// What was recorded under seqs that a mark has passed.
    pub recorded: HashMap<(LaneId, u64), RecordedEvent>,
    /// Which records of the batch are parked already.
    pub parked: HashSet<ParkedKey>,
    /// Of the lane of a seal: why it is in doubt, a sentence each,
    pub doubts: Vec<String>,
    /// ... and what was left of it.
    pub left: Option<Left>,
}

/// What to write, and what to leave in Kafka.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    pub batch: Batch,
    /// Records that say what was said before.
    pub repeats: u64,
    /// Lanes of which a record can neither be applied nor parked: as many are parked as may be.
    pub left: BTreeMap<LaneId, Left>,
    /// Why a seal does not count, if it does not.
    pub doubts: Vec<String>,
}

/// What is left in Kafka of a lane, to be read again once there is room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Left {
    /// Of the first record that was left.
    pub partition: i32,
    pub offset: i64,
    /// How far the lane was recorded then.
    pub recorded: u64,
}

impl Left {
    /// Both were left, of one lane.
    pub fn and(self, other: Self) -> Self {
        Self {
            offset: self.offset.min(other.offset),
            recorded: self.recorded.min(other.recorded),
            ..self
        }
    }
}

/// What tells an event from another that claims its seq.
pub fn identity(event: &Event) -> RecordedEvent {
    let entity = match &event.body {
        Body::Order(step) => Some(step.order.id.to_string()),
        Body::Adjusted(adjustment) => Some(adjustment.id.to_string()),
        Body::Sale(_) => None,
    };
    let event_type = event.body.kind().to_owned();
    RecordedEvent { epoch: event.epoch, event: event_type, entity, at: event.at }
}

/// Decides about a batch. Each lane is taken in order of its seqs, and records of one seq in the
/// order in which they came. A seal comes alone: it parts what came before it from what comes after.
pub fn plan(arrivals: &[Arrival], known: &Known, parked_max: u64) -> Plan {
    let mut plan = Plan::default();
    let mut lanes: BTreeMap<&LaneId, Vec<(&Arrival, &Event)>> = BTreeMap::new();
    for arrival in arrivals {
        match &arrival.content {
            Content::Event(event) => lanes.entry(&event.lane).or_default().push((arrival, event)),
            Content::Seal(seal) => plan.seal(arrival, seal, known),
            Content::Dead { reason, detail, place } => {
                plan.bury(arrival, *reason, detail.clone(), place.clone());
            }
        }
    }
    for (lane, mut arrived) in lanes {
        arrived.sort_by_key(|(_, event)| event.seq);
        match known.marks.get(lane) {
            Some(mark) => plan.lane(lane, *mark, &arrived, known, parked_max),
            None => {
                for (arrival, event) in arrived {
                    let detail = "no such lane was made".to_owned();
                    plan.bury(arrival, DeadReason::UnknownLane, detail, Some(place(event)));
                }
            }
        }
    }
    plan
}

fn place(event: &Event) -> Place {
    Place { lane: event.lane.clone(), epoch: event.epoch, seq: event.seq }
}

/// What one event is to its lane.
enum Fate {
    Apply,
    Repeat,
    Wait,
    Dead(DeadReason, String),
}

impl Plan {
    /// Seals a lane's older epochs. A seal is good only as long as its epoch is the newest that was
    /// given out: whoever took a newer one has what is left of the older ones sent first.
    ///
    /// All that Kafka has before it and that can be recorded is recorded first. If its lane has got on
    /// since something was left of it, that may follow the mark now: the seal is left as well, and both
    /// are read again, in order. If it has not, every record before the seal was read while the lane
    /// lacked the same event, and was none of them: more room would not help, so nothing waits for it.
    ///
    /// What can never be recorded then ends as a dead letter, and so may only what somebody gave up: a
    /// dead letter that an operator may yet retry is one of the lane's doubts, and what follows it.
    fn seal(&mut self, arrival: &Arrival, seal: &Seal, known: &Known) {
        match known.marks.get(&seal.lane) {
            None => {
                let detail = "no such lane was made".to_owned();
                self.bury(arrival, DeadReason::UnknownLane, detail, None);
            }
            Some(mark) if seal.epoch > mark.epoch => {
                let detail =
                    format!("epoch {} was never given out, {} was", seal.epoch, mark.epoch);
                self.bury(arrival, DeadReason::UnknownEpoch, detail, None);
            }
            Some(mark) if seal.epoch == mark.epoch && mark.token != Some(seal.token) => {
                let detail = format!("epoch {} was given out with another token", seal.epoch);
                self.bury(arrival, DeadReason::UnknownEpoch, detail, None);
            }
            Some(mark) if seal.epoch < mark.epoch || seal.epoch == mark.sealed_epoch => {
                self.repeats += 1;
            }
            Some(mark) if known.left.is_some_and(|left| left.recorded < mark.recorded) => {
                self.leave(arrival, &seal.lane, mark.recorded);
            }
            Some(_) if !seal.gives_up && !known.doubts.is_empty() => {
                self.doubts.clone_from(&known.doubts);
            }
            Some(mark) => self.batch.moves.push(LaneMove {
                lane: seal.lane.clone(),
                epoch: mark.sealed_epoch,
                expected: mark.recorded,
                recorded: mark.recorded,
                seal: Some(seal.epoch),
            }),
        }
    }

    fn lane(
        &mut self,
        lane: &LaneId,
        mark: LaneMark,
        arrived: &[(&Arrival, &Event)],
        known: &Known,
        parked_max: u64,
    ) {
        let first = self.batch.events.len();
        let (mut recorded, mut parked) = (mark.recorded, mark.parked);
        let mut parks = false;
        for &(arrival, event) in arrived {
            let before = if event.seq <= mark.recorded {
                known.recorded.get(&(lane.clone(), event.seq)).cloned()
            } else {
                // Applied by this very batch, if at all: its lane's events follow without a gap.
                let index = first + (event.seq - mark.recorded - 1) as usize;
                self.batch.events.get(index).map(identity)
            };
            match fate(event, mark, recorded, before) {
                Fate::Apply => {
                    recorded = event.seq;
                    self.batch.events.push(event.clone());
                    self.batch.unpark.extend(arrival.parked.clone());
                }
                Fate::Repeat => {
                    self.repeats += 1;
                    self.batch.unpark.extend(arrival.parked.clone());
                }
                Fate::Dead(reason, detail) => {
                    self.bury(arrival, reason, detail, Some(place(event)));
                }
                Fate::Wait if known.parked.contains(&arrival.parked_key(event)) => {}
                Fate::Wait if arrival.parked.is_some() => {}
                Fate::Wait if parked < parked_max => {
                    parked += 1;
                    parks = true;
                    self.park(arrival, event);
                }
                Fate::Wait => self.leave(arrival, lane, recorded),
            }
        }
        if recorded > mark.recorded || parks {
            self.batch.moves.push(LaneMove {
                lane: lane.clone(),
                epoch: mark.sealed_epoch,
                expected: mark.recorded,
                recorded,
                seal: None,
            });
        }
    }

    fn bury(
        &mut self,
        arrival: &Arrival,
        reason: DeadReason,
        detail: String,
        place: Option<Place>,
    ) {
        self.batch.unpark.extend(arrival.parked.clone());
        self.batch.dead.push(DeadLetter { reason, detail, place, record: arrival.record.clone() });
    }

    fn park(&mut self, arrival: &Arrival, event: &Event) {
        self.batch.park.push(Parked {
            lane: event.lane.clone(),
            seq: event.seq,
            record: arrival.record.clone(),
        });
    }

    fn leave(&mut self, arrival: &Arrival, lane: &LaneId, recorded: u64) {
        let StoredRecord { partition, offset, .. } = arrival.record;
        let left = Left { partition, offset, recorded };
        self.left.entry(lane.clone()).and_modify(|first| *first = first.and(left)).or_insert(left);
    }
}

fn fate(event: &Event, mark: LaneMark, recorded: u64, before: Option<RecordedEvent>) -> Fate {
    if event.seq <= recorded {
        let mine = identity(event);
        return match before {
            Some(before) if before == mine => Fate::Repeat,
            _ if event.epoch < mark.sealed_epoch => stale(event, mark),
            before => Fate::Dead(DeadReason::Fork, fork(&mine, before.as_ref())),
        };
    }
    if event.epoch < mark.sealed_epoch {
        return stale(event, mark);
    }
    if event.epoch > mark.sealed_epoch {
        let detail = format!("epoch {} never began, {} is open", event.epoch, mark.sealed_epoch);
        return Fate::Dead(DeadReason::UnknownEpoch, detail);
    }
    if event.seq == recorded + 1 { Fate::Apply } else { Fate::Wait }
}

fn stale(event: &Event, mark: LaneMark) -> Fate {
    let detail = format!("epoch {} has ended, {} is open", event.epoch, mark.sealed_epoch);
    Fate::Dead(DeadReason::StaleEpoch, detail)
}

fn fork(mine: &RecordedEvent, before: Option<&RecordedEvent>) -> String {
    let show = |event: &RecordedEvent| {
        let entity = event.entity.as_deref().unwrap_or("the sale");
        format!("{} of {entity} at {} in epoch {}", event.event, event.at, event.epoch)
    };
    match before {
        Some(before) => format!("recorded is {}; this is {}", show(before), show(mine)),
        None => format!("its seq is recorded, but the ledger lacks it; this is {}", show(mine)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::domain::event::{RebuildToken, SaleStep};
    use crate::domain::time::Timestamp;

    fn lane() -> LaneId {
        LaneId { sale: "s".parse().unwrap(), lane: 0 }
    }

    /// An event whose time is its content: another `at` is another event.
    fn event(epoch: u32, seq: u64, at: i64) -> Event {
        Event {
            lane: lane(),
            epoch,
            seq,
            at: Timestamp::from_millis(at),
            traceparent: None,
            body: Body::Sale(SaleStep::Archived),
        }
    }

    fn arrival(event: Event, offset: i64) -> Arrival {
        let record = StoredRecord {
            topic: "t".into(),
            partition: 3,
            offset,
            headers: Vec::new(),
            payload: format!("{event:?}").into_bytes(),
        };
        Arrival { record, content: Content::Event(Box::new(event)), parked: None }
    }

    const TOKEN: RebuildToken = RebuildToken::new(0x1234);

    fn mark(epoch: u32, sealed_epoch: u32, recorded: u64, parked: u64) -> LaneMark {
        LaneMark { epoch, token: Some(TOKEN), sealed_epoch, recorded, parked }
    }

    fn seal(epoch: u32, token: RebuildToken) -> Arrival {
        let at = Timestamp::from_millis(0);
        let content = Content::Seal(Seal { lane: lane(), epoch, token, gives_up: false, at });
        Arrival { content, ..arrival(event(epoch, 1, 0), 99) }
    }

    fn known(epoch: u32, recorded: u64, parked: u64) -> Known {
        let seqs = 1..=recorded;
        Known {
            marks: [(lane(), mark(epoch, epoch, recorded, parked))].into(),
            recorded: seqs.map(|seq| ((lane(), seq), identity(&event(1, seq, 0)))).collect(),
            ..Known::default()
        }
    }

    fn decide(events: Vec<Event>, known: &Known) -> Plan {
        let arrivals: Vec<_> =
            (0..).zip(events).map(|(offset, event)| arrival(event, offset)).collect();
        plan(&arrivals, known, 100)
    }

    fn applied(plan: &Plan) -> Vec<u64> {
        plan.batch.events.iter().map(|event| event.seq).collect()
    }

    #[test]
    fn what_follows_the_mark_is_applied_and_what_leaves_a_gap_waits() {
        let plan = decide(
            vec![event(1, 5, 0), event(1, 3, 0), event(1, 7, 0), event(1, 4, 0)],
            &known(1, 2, 0),
        );
        assert_eq!(applied(&plan), [3, 4, 5]);
        assert_eq!(plan.batch.park.iter().map(|p| p.seq).collect::<Vec<_>>(), [7]);
        let moved = &plan.batch.moves[0];
        assert_eq!((moved.expected, moved.recorded), (2, 5));
    }

    #[test]
    fn the_same_again_is_a_repeat_and_another_content_is_a_fork() {
        let events =
            vec![event(1, 1, 0), event(1, 2, 99), event(1, 3, 0), event(1, 3, 0), event(1, 3, 7)];
        let plan = decide(events, &known(1, 2, 0));
        assert_eq!((applied(&plan), plan.repeats), (vec![3], 2));
        let reasons: Vec<_> = plan.batch.dead.iter().map(|letter| letter.reason).collect();
        assert_eq!(reasons, [DeadReason::Fork, DeadReason::Fork]);
    }

    #[test]
    fn an_older_epoch_is_stale_unless_it_only_says_what_is_recorded() {
        let events =
            vec![event(1, 1, 0), event(1, 2, 9), event(1, 3, 0), event(2, 3, 0), event(3, 4, 0)];
        let plan = decide(events, &known(2, 2, 0));
        assert_eq!((applied(&plan), plan.repeats), (vec![3], 1));
        let reasons: Vec<_> = plan.batch.dead.iter().map(|letter| letter.reason).collect();
        use DeadReason::{StaleEpoch, UnknownEpoch};
        assert_eq!(reasons, [StaleEpoch, StaleEpoch, UnknownEpoch]);
    }

    #[test]
    fn an_epoch_that_is_given_out_ends_none_before_its_seal() {
        let mut known = known(1, 2, 0);
        known.marks.insert(lane(), mark(2, 1, 2, 0));
        let plan = decide(vec![event(1, 3, 0), event(2, 4, 0)], &known);
        assert_eq!(applied(&plan), [3]);
        assert_eq!(plan.batch.dead[0].reason, DeadReason::UnknownEpoch);
    }

    #[test]
    fn a_seal_counts_once_and_only_of_the_newest_epoch_with_its_token() {
        let other = RebuildToken::new(0x5678);
        for (what, sealed, expected) in [
            (seal(3, TOKEN), 1, "seals"),
            (seal(3, TOKEN), 3, "repeat"),
            (seal(2, other), 1, "repeat"),
            (seal(3, other), 1, "unknown-epoch"),
            (seal(4, TOKEN), 1, "unknown-epoch"),
        ] {
            let known =
                Known { marks: [(lane(), mark(3, sealed, 7, 0))].into(), ..Known::default() };
            let plan = plan(std::slice::from_ref(&what), &known, 100);
            let outcome = match (&plan.batch.dead[..], &plan.batch.moves[..]) {
                ([letter], []) => letter.reason.as_str(),
                ([], [moved]) => {
                    let LaneMove { epoch, expected, recorded, seal, .. } = moved;
                    assert_eq!((*epoch, *expected, *recorded, *seal), (1, 7, 7, Some(3)));
                    "seals"
                }
                _ => "repeat",
            };
            assert_eq!(outcome, expected, "{what:?}");
        }
        let plan = plan(&[seal(2, TOKEN)], &Known::default(), 100);
        assert_eq!(plan.batch.dead[0].reason, DeadReason::UnknownLane);
    }

    #[test]
    fn a_seal_waits_for_what_may_be_recorded_and_ends_what_is_in_doubt_only_where_that_is_given_up()
    {
        // What was left was left at event 5 or 7; the lane is at 7.
        for (left_at, is_in_doubt, gives_up, expected) in [
            (None, false, false, "seals"),
            (None, true, false, "in doubt"),
            (None, true, true, "seals"),
            (Some(7), true, false, "in doubt"),
            (Some(7), true, true, "seals"),
            (Some(5), true, false, "left"),
            (Some(5), false, false, "left"),
            (Some(5), true, true, "left"),
        ] {
            let mut arrival = seal(3, TOKEN);
            let Content::Seal(seal) = &mut arrival.content else { unreachable!("it is one") };
            seal.gives_up = gives_up;
            let known = Known {
                marks: [(lane(), mark(3, 1, 7, 1))].into(),
                doubts: is_in_doubt.then(|| "a doubt".to_owned()).into_iter().collect(),
                left: left_at.map(|recorded| Left { partition: 3, offset: 11, recorded }),
                ..Known::default()
            };
            let plan = plan(&[arrival], &known, 100);
            let outcome = match (&plan.batch.moves[..], &plan.doubts[..], plan.left.get(&lane())) {
                ([_], [], None) => "seals",
                ([], [_], None) => "in doubt",
                ([], [], Some(Left { partition: 3, offset: 99, recorded: 7 })) => "left",
                other => panic!("{other:?}"),
            };
            assert_eq!(outcome, expected, "{left_at:?}, {is_in_doubt}, {gives_up}");
        }
    }

    #[test]
    fn an_unknown_lane_is_a_dead_letter() {
        let plan = decide(vec![event(1, 1, 0)], &Known::default());
        assert_eq!(plan.batch.dead[0].reason, DeadReason::UnknownLane);
        assert!(plan.batch.moves.is_empty());
    }

    #[test]
    fn beyond_the_bound_records_are_left_in_kafka_and_what_is_parked_is_not_counted_twice() {
        let arrivals: Vec<_> =
            [5, 6, 7].into_iter().map(|seq| arrival(event(1, seq, 0), 10 + seq as i64)).collect();
        let mut known = known(1, 2, 1);
        known.parked = [arrivals[0].parked_key(&event(1, 5, 0))].into();
        let plan = plan(&arrivals, &known, 2);
        assert_eq!(plan.batch.park.iter().map(|p| p.seq).collect::<Vec<_>>(), [6]);
        assert_eq!(plan.left, [(lane(), Left { partition: 3, offset: 17, recorded: 2 })].into());
    }

    /// A zombie's events, seals and the new epoch's events, in the order in which Kafka has them, and
    /// some of them again.
    fn sealed_history() -> impl Strategy<Value = (u64, Vec<(u32, u64)>)> {
        (1..=8u64).prop_flat_map(|end| {
            let before = prop::collection::vec(1..=end, 0..30).prop_map(|seqs| of_epoch(1, seqs));
            let after = prop::collection::vec((1..=2u32, 1..=12u64), 0..40);
            (before, after).prop_map(move |(before, after)| {
                let whole: Vec<_> = of_epoch(1, (1..=end).collect());
                (end, [before, whole, vec![(2, 0)], after].concat())
            })
        })
    }

    fn of_epoch(epoch: u32, seqs: Vec<u64>) -> Vec<(u32, u64)> {
        seqs.into_iter().map(|seq| (epoch, seq)).collect()
    }

    proptest! {
        /// Of an epoch that is sealed, what comes after the seal is never applied; and what the next
        /// epoch says is, in order and once, from where the seal was.
        #[test]
        fn a_seal_parts_epochs((end, history) in sealed_history(), room in 0..20u64) {
            let mut known = known(1, 0, 0);
            known.marks.insert(lane(), mark(2, 1, 0, 0));
            let mut sealed = false;
            for (epoch, seq) in history {
                let what = match seq {
                    0 => seal(2, TOKEN),
                    _ => arrival(event(epoch, seq, epoch.into()), 0),
                };
                let plan = plan(std::slice::from_ref(&what), &known, room);
                let mark = known.marks.get_mut(&lane()).unwrap();
                for moved in &plan.batch.moves {
                    prop_assert_eq!((moved.epoch, moved.expected), (mark.sealed_epoch, mark.recorded));
                    if let Some(epoch) = moved.seal {
                        prop_assert_eq!(mark.recorded, end);
                        (mark.sealed_epoch, sealed) = (epoch, true);
                    }
                }
                for event in &plan.batch.events {
                    prop_assert_eq!(event.seq, mark.recorded + 1);
                    prop_assert_eq!(event.epoch, if sealed { 2 } else { 1 });
                    mark.recorded = event.seq;
                    known.recorded.insert((lane(), event.seq), identity(event));
                }
            }
            prop_assert!(sealed);
        }

        /// Whatever order, repetition and batches records come in, each lane is applied in order,
        /// without a gap, and once; and nothing is lost.
        #[test]
        fn every_event_is_applied_once_and_in_order(
            seqs in prop::collection::vec(1..=12u64, 1..60),
            cut in prop::sample::Index::arbitrary(),
        ) {
            let mut known = known(1, 0, 0);
            let mut waiting: Vec<Arrival> = Vec::new();
            let (head, tail) = seqs.split_at(cut.index(seqs.len()));
            for part in [head, tail] {
                let mut arrivals = std::mem::take(&mut waiting);
                arrivals.extend(part.iter().map(|seq| arrival(event(1, *seq, 0), 0)));
                let plan = plan(&arrivals, &known, u64::MAX);
                prop_assert!(plan.batch.dead.is_empty() && plan.left.is_empty());
                let mark = known.marks.get_mut(&lane()).unwrap();
                for event in &plan.batch.events {
                    prop_assert_eq!(event.seq, mark.recorded + 1);
                    mark.recorded = event.seq;
                    known.recorded.insert((lane(), event.seq), identity(event));
                }
                waiting = plan.batch.park.iter().map(|p| arrival(event(1, p.seq, 0), 0)).collect();
            }
            let whole = (1..).find(|seq| !seqs.contains(seq)).unwrap() - 1;
            prop_assert_eq!(known.marks[&lane()].recorded, whole);
            let mut left: Vec<u64> = waiting.iter().filter_map(Arrival::event).map(|e| e.seq).collect();
            left.dedup();
            let mut expected: Vec<u64> = seqs.iter().copied().filter(|seq| *seq > whole).collect();
            expected.sort_unstable();
            expected.dedup();
            prop_assert_eq!(left, expected);
        }
    }
}
