//! How fast a lane goes on while what happened in it is far from recorded.
//!
//! Redis takes more events a second than one writer puts into a database. A burst is taken at full speed; but
//! what goes on for longer would fill the outbox, and all who come then would be refused at once. So from
//! `lanes.pace_from_events` unrecorded events on, a process rests after a call for as long as the events that the
//! lane had since its last one should have taken. These are everybody's events, not only its own, so the lane
//! keeps its pace with one process or many; and a lane in which nothing happens, since it is sold out, is not
//! slowed at all. All commands of a lane share its calls, so those that settle wait as well.

use std::time::Duration;

use super::reply::Marks;
use crate::config;

/// Timers go by milliseconds: less is owed until it is as much.
const REST_MIN: Duration = Duration::from_millis(1);
/// However much others have done meanwhile: with a hundred processes and more a lane is faster than its pace.
const REST_MAX: Duration = Duration::from_secs(1);

/// The pace of one lane's calls.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// Where the lane stood at the last call.
    seen: (u32, u64),
    owed: Duration,
}

impl Pace {
    /// For how long to rest, after a call that found the lane so.
    pub fn rest(&mut self, marks: Marks, options: &config::Lanes) -> Option<Duration> {
        let (epoch, seq) = std::mem::replace(&mut self.seen, (marks.epoch, marks.seq));
        let happened = if epoch == marks.epoch { marks.seq.saturating_sub(seq) } else { 0 };
        let Some(rate) = rate(marks.seq.saturating_sub(marks.recorded), options) else {
            self.owed = Duration::ZERO;
            return None;
        };
        self.owed = REST_MAX.min(self.owed + Duration::from_secs_f64(happened as f64 / rate));
        (self.owed >= REST_MIN).then(|| std::mem::take(&mut self.owed))
    }
}

/// Events a second that a lane may have of which so many are unrecorded: any number up to
/// `lanes.pace_from_events`, then the fewer the more there are, down to `lanes.pace_rate_min` at twice as many.
fn rate(unrecorded: u64, options: &config::Lanes) -> Option<f64> {
    let from = options.pace_from_events;
    let excess = unrecorded.saturating_sub(from).min(from);
    (excess > 0).then(|| options.pace_rate_min as f64 * from as f64 / excess as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn options() -> config::Lanes {
        let options = Config::load(None).expect("the defaults").lanes;
        config::Lanes { pace_from_events: 1_000, pace_rate_min: 100, ..options }
    }

    fn marks(seq: u64, recorded: u64) -> Marks {
        Marks { epoch: 1, seq, logged: seq, recorded, ..Marks::default() }
    }

    #[test]
    fn the_more_is_unrecorded_the_slower_down_to_a_rate_that_is_never_below() {
        let rates = [0, 1_000, 1_001, 1_500, 2_000, 9_000].map(|n| rate(n, &options()));
        let expected = [None, None, Some(100_000.0), Some(200.0), Some(100.0), Some(100.0)];
        assert_eq!(rates, expected);
    }

    #[test]
    fn a_call_is_followed_by_the_time_that_the_lanes_events_since_the_last_should_take() {
        let (mut pace, options) = (Pace::default(), options());
        assert_eq!(pace.rest(marks(2_000, 0), &options), None, "how many are new is not known yet");
        assert_eq!(pace.rest(marks(2_004, 0), &options), Some(Duration::from_millis(40)));
        assert_eq!(pace.rest(marks(2_004, 0), &options), None, "nothing has happened");
        assert_eq!(pace.rest(marks(9_000, 0), &options), Some(REST_MAX));
        assert_eq!(pace.rest(marks(9_900, 8_900), &options), None, "little is unrecorded");
    }

    #[test]
    fn less_than_a_timer_can_tell_is_owed() {
        let mut pace = Pace::default();
        let options = config::Lanes { pace_rate_min: 4_000, ..options() };
        let rests = (2_000..2_009).map(|seq| pace.rest(marks(seq, 0), &options));
        let rest = Some(REST_MIN);
        assert_eq!(
            rests.collect::<Vec<_>>(),
            [None, None, None, None, rest, None, None, None, rest]
        );
    }

    #[test]
    fn a_new_epoch_owes_nothing_of_the_old() {
        let (mut pace, options) = (Pace::default(), options());
        pace.rest(marks(2_000, 0), &options);
        let next = Marks { epoch: 2, ..marks(3_000, 0) };
        assert_eq!(pace.rest(next, &options), None);
    }
}
