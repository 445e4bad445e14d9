//! Waiting for a lane's marks to reach an event. All who wait for one lane share what its replies
//! say and one look at it now and then, however many they are.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;

use super::Lanes;
use super::memory::Memory;
use super::reply::Marks;
use crate::domain::durability::Durability;
use crate::domain::ids::LaneId;

/// How often a lane that somebody waits for is looked at, whatever other calls it has.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);
/// The same while it does not answer.
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(100);

/// What those hear who wait for one lane, and what is remembered of it.
pub(super) struct Watch {
    marks: watch::Sender<Marks>,
    /// Somebody looks at the lane now and then.
    is_looked_at: AtomicBool,
    /// The highest epoch and seq that this process has seen every replica to have.
    proven: Mutex<(u32, u64)>,
    pub memory: Memory,
}

impl Watch {
    pub fn new() -> Self {
        Self {
            marks: watch::Sender::new(Marks::default()),
            is_looked_at: AtomicBool::new(false),
            proven: Mutex::default(),
            memory: Memory::default(),
        }
    }

    /// Every replica has the lane as it stood then.
    pub fn prove(&self, marks: Marks) {
        let mut proven = self.proven.lock().expect("no panic while it is locked");
        *proven = (*proven).max((marks.epoch, marks.seq));
    }

    /// Up to where that was seen.
    pub fn proven(&self) -> (u32, u64) {
        *self.proven.lock().expect("no panic while it is locked")
    }

    /// A reply's marks, with what this process has seen beside what the lane has been told of it.
    pub fn with_proof(&self, marks: Marks) -> Marks {
        match self.proven() {
            (epoch, seq) if epoch == marks.epoch && seq <= marks.seq => {
                Marks { replicated: marks.replicated.max(seq), ..marks }
            }
            _ => marks,
        }
    }

    /// Tells those who wait, if any.
    pub fn tell(&self, marks: Marks) {
        if self.marks.receiver_count() > 0 {
            self.marks.send_replace(marks);
        }
    }

    /// Whether whoever looks at the lane must go on doing so.
    fn is_wanted(&self) -> bool {
        if self.marks.receiver_count() > 0 {
            return true;
        }
        self.is_looked_at.store(false, Ordering::SeqCst);
        // Who came in between has seen that somebody looks, or is seen here: then it is one of us.
        self.marks.receiver_count() > 0 && !self.is_looked_at.swap(true, Ordering::SeqCst)
    }
}

impl Lanes {
    /// Waits until the lane's event `seq` has got as far as `level`, by the lane's own marks; `known`
    /// are those of a reply that told of the event. The marks that show it, or `None` if none did by
    /// `timeout`, or the lane began another epoch meanwhile: then nobody can say here.
    pub async fn wait_for(
        &self,
        lane: &LaneId,
        level: Durability,
        seq: u64,
        known: Marks,
        timeout: Duration,
    ) -> Option<Marks> {
        if known.reached(seq) >= level {
            return Some(known);
        }
        let watch = self.watch(lane);
        // What was told before counts for nothing: it may be of a Redis that has lost it since.
        let mut told = watch.marks.subscribe();
        self.look_at(lane, &watch);
        let reached = async {
            loop {
                told.changed().await.ok()?;
                let marks = *told.borrow_and_update();
                if marks.epoch != known.epoch {
                    return None;
                } else if marks.reached(seq) >= level {
                    return Some(marks);
                }
            }
        };
        tokio::time::timeout(timeout, reached).await.ok().flatten()
    }

    /// Has somebody look at the lane until nobody waits any more.
    fn look_at(&self, lane: &LaneId, watch: &Arc<Watch>) {
        if watch.is_looked_at.swap(true, Ordering::SeqCst) {
            return;
        }
        let (lanes, lane, watch) = (self.clone(), lane.clone(), watch.clone());
        tokio::spawn(async move {
            let mut pause = LOOK_INTERVAL;
            loop {
                tokio::time::sleep(pause).await;
                if !watch.is_wanted() {
                    return;
                }
                pause = match lanes.marks(&lane).await {
                    Ok(marks) => {
                        watch.tell(marks);
                        LOOK_INTERVAL
                    }
                    Err(error) => {
                        tracing::warn!(%error, ?lane, "a lane that is waited for does not answer");
                        LOOK_AGAIN_AFTER
                    }
                };
            }
        });
    }
}
