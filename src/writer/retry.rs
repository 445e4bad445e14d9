//! A dead letter, tried again: by the same decisions and behind the same marks as in the writer,
//! so it is safe beside writers that run and beside another retry.

use crate::domain::ids::LaneId;
use crate::ledger::{
    ApplyError, Batch, DeadReason, Deed, Ledger, LedgerError, LetterStatus, StoredLetter,
};

use super::plan::{Arrival, Known, plan};
use super::{ask, content, read_parked};

/// How often a mark may be moved under a retry before it is given up.
const TRIES_MAX: usize = 10;
/// Parked records that follow in one transaction.
const BATCH_MAX: u32 = 1_000;

/// Applies what an open dead letter says, then what was parked behind it, in order; answers the
/// letter as it is after it, `None` if there is none of this id. One that still cannot be applied
/// stays open, with the reason of now. One that is resolved is left as it is.
///
/// # Errors
/// What the database could not do. Whether the letter was applied shows when it is tried again.
pub async fn retry(
    ledger: &Ledger,
    id: i64,
    deed: &Deed,
) -> Result<Option<StoredLetter>, LedgerError> {
    for _ in 0..TRIES_MAX {
        let Some(letter) = ledger.dead_letter(id).await? else { return Ok(None) };
        if letter.status != LetterStatus::Open {
            return Ok(Some(letter));
        }
        let content = content(&letter.record);
        let arrival = Arrival { content, record: letter.record, parked: None };
        let known = ask(ledger, std::slice::from_ref(&arrival)).await?;
        let (reason, detail) = match judge(&arrival, &known) {
            Verdict::Write(batch) => match ledger.apply_dead_letter(&batch, id, deed).await {
                Ok(_) => {
                    if let Some(event) = arrival.event() {
                        follow(ledger, &event.lane).await;
                    }
                    return ledger.dead_letter(id).await;
                }
                Err(ApplyError::MarkMoved) => continue,
                Err(ApplyError::Unfit(detail)) => (DeadReason::NotApplicable, detail),
                Err(ApplyError::Ledger(error)) => return Err(error),
            },
            Verdict::Keep(reason, detail) => (reason, detail),
        };
        ledger.keep_dead_letter(id, deed, reason, &detail).await?;
        return ledger.dead_letter(id).await;
    }
    Err(LedgerError::Unavailable("the lane's mark moved at each try".to_owned()))
}

enum Verdict {
    /// Empty: what it says is recorded.
    Write(Batch),
    Keep(DeadReason, String),
}

fn judge(arrival: &Arrival, known: &Known) -> Verdict {
    let mut plan = plan(std::slice::from_ref(arrival), known, 0);
    if let Some(letter) = plan.batch.dead.pop() {
        return Verdict::Keep(letter.reason, letter.detail);
    }
    if !plan.doubts.is_empty() {
        return Verdict::Keep(DeadReason::Waiting, plan.doubts.join("; "));
    }
    // With no room to park, what must wait is left.
    if let (Some(event), false) = (arrival.event(), plan.left.is_empty()) {
        let missing = known.marks.get(&event.lane).map_or(1, |mark| mark.recorded + 1);
        let detail = format!("seq {missing} of its lane is missing and comes first");
        return Verdict::Keep(DeadReason::Waiting, detail);
    }
    Verdict::Write(plan.batch)
}

/// Applies what was parked in a lane and whose turn has come. Where this fails, a writer goes on:
/// it looks for such records every few seconds, and knows what to do with those that are unfit.
async fn follow(ledger: &Ledger, lane: &LaneId) {
    loop {
        let followed = async {
            let ready = ledger.ready_parked(Some(lane), BATCH_MAX).await?;
            let arrivals: Vec<Arrival> = ready.into_iter().map(read_parked).collect();
            let known = ask(ledger, &arrivals).await?;
            let plan = plan(&arrivals, &known, 0);
            if !plan.batch.is_empty() {
                ledger.apply(&plan.batch).await?;
            }
            Ok::<bool, ApplyError>(!plan.batch.is_empty())
        };
        match ledger.within_patience(followed).await {
            Ok(true) | Err(ApplyError::MarkMoved) => {}
            Ok(false) => return,
            Err(error) => {
                tracing::info!(%lane, %error, "what is parked is left to the writer");
                return;
            }
        }
    }
}
