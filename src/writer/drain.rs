//! How long the writer needs for what is left to record.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// How many batches say how fast the writer is.
const BATCHES: usize = 32;
/// What is said at most, and where nothing is known: a day.
const DRAIN_MAX_S: f64 = 86_400.0;

/// The pace of the last batches: records, and the time from having them to having them written. The
/// time between batches does not count, so a writer with little to do is not taken for a slow one.
#[derive(Debug, Default)]
pub(super) struct Pace {
    written: VecDeque<(usize, Duration)>,
    /// The batch in hand: its records, and since when. It counts as time alone, so the pace sinks
    /// while the database does not take it.
    in_hand: Option<(usize, Instant)>,
}

impl Pace {
    pub fn begin(&mut self, records: usize, now: Instant) {
        self.in_hand = Some((records, now));
    }

    /// The batch in hand, if there is one, is written.
    pub fn end(&mut self, now: Instant) {
        let Some((records, since)) = self.in_hand.take() else { return };
        self.written.truncate(BATCHES - 1);
        self.written.push_front((records, now.saturating_duration_since(since)));
    }

    /// Seconds until this many records are written, at this pace; at most [`DRAIN_MAX_S`].
    pub fn drain_s(&self, lag_records: u64, now: Instant) -> f64 {
        if lag_records == 0 {
            return 0.0;
        }
        let records: usize = self.written.iter().map(|(records, _)| records).sum();
        let worked: Duration = self.written.iter().map(|(_, worked)| *worked).sum();
        let in_hand = self.in_hand.map(|(_, since)| now.saturating_duration_since(since));
        let worked = worked + in_hand.unwrap_or_default();
        if records == 0 {
            return DRAIN_MAX_S;
        }
        (lag_records as f64 * worked.as_secs_f64() / records as f64).min(DRAIN_MAX_S)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(s: u64) -> Duration {
        Duration::from_secs(s)
    }

    /// Batches one after the other, each of so many records and seconds; and the time at the end.
    fn pace(batches: &[(usize, u64)]) -> (Pace, Instant) {
        let (mut pace, mut now) = (Pace::default(), Instant::now());
        for &(records, worked_s) in batches {
            pace.begin(records, now);
            now += seconds(worked_s);
            pace.end(now);
            now += seconds(1_000);
        }
        (pace, now)
    }

    #[test]
    fn the_time_to_drain_is_the_lag_at_the_pace_of_the_last_batches() {
        let (pace, now) = pace(&[(100, 1), (300, 3)]);
        assert_eq!(pace.drain_s(1_000, now), 10.0);
        assert_eq!(pace.drain_s(0, now), 0.0);
        let mut many = vec![(1, 1_000)];
        many.extend([(100, 1); BATCHES]);
        let (many, now) = self::pace(&many);
        assert_eq!(many.drain_s(1_000, now), 10.0, "what is long ago is forgotten");
    }

    #[test]
    fn it_grows_while_a_batch_is_not_taken_and_has_a_bound() {
        let (mut pace, now) = pace(&[(100, 1)]);
        pace.begin(100, now);
        assert_eq!(pace.drain_s(100, now + seconds(9)), 10.0);
        assert_eq!(pace.drain_s(u64::MAX, now), DRAIN_MAX_S);
        pace.end(now + seconds(1));
        assert_eq!(pace.drain_s(100, now + seconds(9)), 1.0);
        assert_eq!(Pace::default().drain_s(1, now), DRAIN_MAX_S);
    }
}
