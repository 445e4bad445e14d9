//! The life of an order: which step may follow which status, and where it leads. The lane's script
//! decides; whoever reads what it wrote holds it to this. `docs/orders.md` draws it.

use super::event::{OrderStep, Step};
use super::order::{RefundReason, Status};

impl OrderStep {
    /// Whether an order may come to stand as this one does: the step can follow the status before
    /// it, and leads to the one after it.
    pub fn is_possible(&self) -> bool {
        let all_back = self.order.returned == self.order.lines;
        self.step.leads(self.from, all_back) == Some(self.order.status)
    }
}

impl Step {
    /// Where this step leads an order that stands at `from` (`None`: there is no order yet); `None`
    /// where it cannot follow. `all_back`: nothing is left of what was bought.
    pub fn leads(&self, from: Option<Status>, all_back: bool) -> Option<Status> {
        use Status::{Cancelled, Confirmed, Expired, Held, Paying, Returned};
        match (self, from) {
            (Step::Held, None) => Some(Held),
            (Step::PaymentBegun, Some(Held | Paying)) => Some(Paying),
            (Step::PaymentFailed, Some(Paying)) => Some(Held),
            (Step::Confirmed { .. }, Some(Held | Paying)) => Some(Confirmed),
            // What has expired holds nothing that could be released.
            (Step::Confirmed { released }, Some(Expired)) if released.is_empty() => Some(Confirmed),
            // From nothing it is a tombstone.
            (Step::Cancelled, None | Some(Held | Paying | Expired)) => Some(Cancelled),
            (Step::Expired, Some(Held | Paying)) => Some(Expired),
            (Step::Returned { .. }, Some(Confirmed)) if all_back => Some(Returned),
            (Step::Returned { .. }, Some(Confirmed)) => Some(Confirmed),
            (Step::RefundDue(due), Some(status)) => match (due.reason, status) {
                (RefundReason::PaymentTooLate, Expired)
                | (RefundReason::OrderCancelled, Cancelled)
                | (RefundReason::AlreadyPaid, Confirmed | Returned)
                | (RefundReason::LinesMismatch, Held | Paying | Expired) => Some(status),
                _ => None,
            },
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::ids::{IdSecret, LaneId};
    use crate::domain::order::{Line, RefundDue};

    /// The word of a step, whatever it carries.
    fn steps() -> Vec<(&'static str, Step)> {
        let secret = IdSecret::new(1, &[7; 32]);
        let lane = LaneId { sale: "s".parse().unwrap(), lane: 0 };
        let key = secret.order_key(&lane.sale, &"b".parse().unwrap(), &"k".parse().unwrap());
        let order = secret.order_id(&lane, key);
        let refund = |reason| {
            let payment_id = "pay".parse().unwrap();
            Step::RefundDue(RefundDue {
                id: secret.refund_id(&order, &payment_id),
                payment_id,
                reason,
            })
        };
        let line = Line { sku: "a".parse().unwrap(), quantity: 1.try_into().unwrap() };
        vec![
            ("held", Step::Held),
            ("begun", Step::PaymentBegun),
            ("failed", Step::PaymentFailed),
            ("confirmed", Step::Confirmed { released: vec![] }),
            ("confirmed in part", Step::Confirmed { released: vec![line] }),
            ("cancelled", Step::Cancelled),
            ("expired", Step::Expired),
            ("returned", Step::Returned { lines: vec![], restock: true, request: None }),
            ("too late", refund(RefundReason::PaymentTooLate)),
            ("refused", refund(RefundReason::OrderCancelled)),
            ("paid before", refund(RefundReason::AlreadyPaid)),
            ("of other lines", refund(RefundReason::LinesMismatch)),
        ]
    }

    #[test]
    fn each_status_allows_these_steps_and_no_others() {
        let allowed = |from: Option<Status>, all_back| {
            let of = |(word, step): (&str, Step)| {
                let to = step.leads(from, all_back)?;
                Some(format!("{word}: {}", to.as_str()))
            };
            steps().into_iter().filter_map(of).collect::<Vec<_>>().join(", ")
        };
        let unpaid = "confirmed: confirmed, confirmed in part: confirmed, cancelled: cancelled, \
                      expired: expired";
        for (from, steps) in [
            (None, "held: held, cancelled: cancelled".to_owned()),
            (Some(Status::Held), format!("begun: paying, {unpaid}, of other lines: held")),
            (
                Some(Status::Paying),
                format!("begun: paying, failed: held, {unpaid}, of other lines: paying"),
            ),
            (Some(Status::Confirmed), "returned: confirmed, paid before: confirmed".to_owned()),
            (Some(Status::Returned), "paid before: returned".to_owned()),
            (Some(Status::Cancelled), "refused: cancelled".to_owned()),
            (
                Some(Status::Expired),
                "confirmed: confirmed, cancelled: cancelled, too late: expired, \
                 of other lines: expired"
                    .to_owned(),
            ),
        ] {
            assert_eq!(allowed(from, false), steps, "from {from:?}");
        }
        let all_back = allowed(Some(Status::Confirmed), true);
        assert_eq!(all_back, "returned: returned, paid before: confirmed");
    }
}
