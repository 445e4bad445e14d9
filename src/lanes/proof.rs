//! Proof that every replica of Redis that could be promoted has what a call told: a `WAIT` right
//! behind the call, on the same connection.

use std::sync::Arc;

use tokio::sync::watch;

use super::marks::Watch;
use super::reply::Marks;

/// What the replicas say of a call, sooner or later; all commands of the call share it.
#[derive(Debug, Clone)]
pub struct Proof(watch::Receiver<Option<bool>>);

impl Proof {
    /// Of a call that left the lane at `marks`; `acknowledged` says whether every replica has all that
    /// was before it.
    pub(super) fn of(
        acknowledged: impl Future<Output = bool> + Send + 'static,
        marks: Marks,
        lane: Arc<Watch>,
    ) -> Self {
        let (verdict, proof) = watch::channel(None);
        tokio::spawn(async move {
            let holds = acknowledged.await;
            if holds {
                lane.prove(marks);
            }
            verdict.send_replace(Some(holds));
        });
        Self(proof)
    }

    /// Waits for what they say; false where they did not answer in time.
    pub async fn holds(mut self) -> bool {
        let verdict = self.0.wait_for(Option::is_some).await;
        verdict.is_ok_and(|verdict| *verdict == Some(true))
    }
}
