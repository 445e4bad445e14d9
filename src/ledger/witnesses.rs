//! Who talks to lanes, and what each of them has seen of a lane that may have forgotten something.

use std::time::Duration;

use super::row::{bigint, corrupt, lane_id, number};
use super::{Ledger, LedgerError};
use crate::domain::ids::{EntityKey, LaneId};
use crate::domain::testimony::Testimony;

/// How often whoever asked looks for answers.
const LOOK_INTERVAL: Duration = Duration::from_millis(25);
/// How many rows one statement forgets.
const FORGOTTEN_AT_ONCE: i64 = 1_000;

/// Of those that were alive when they were asked: what each answered, and who ended unheard.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Testimonies {
    /// Instance and answer.
    pub heard: Vec<(String, Testimony)>,
    pub unheard: Vec<String>,
}

/// A question to this instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    pub request: i64,
    pub lane: LaneId,
}

struct Row {
    instance: String,
    is_alive: bool,
    epoch: Option<i64>,
    seq: Option<i64>,
    logged: Option<i64>,
    unlisted: Option<i64>,
    order_seqs: Option<Vec<i64>>,
    order_keys: Option<Vec<String>>,
}

impl Row {
    /// `None` where it has not answered.
    fn testimony(self) -> Result<Option<Testimony>, LedgerError> {
        let (Some(epoch), Some(seq), Some(logged), Some(unlisted), Some(seqs), Some(keys)) =
            (self.epoch, self.seq, self.logged, self.unlisted, self.order_seqs, self.order_keys)
        else {
            return Ok(None);
        };
        let order = |(seq, key): (i64, String)| {
            let read = EntityKey::decode(&key).ok_or_else(|| corrupt("order key", key))?;
            Ok((number("seq", seq)?, read))
        };
        Ok(Some(Testimony {
            epoch: number("epoch", epoch)?,
            seq: number("seq", seq)?,
            logged: number("mark", logged)?,
            orders: seqs.into_iter().zip(keys).map(order).collect::<Result<_, LedgerError>>()?,
            unlisted: number("seq", unlisted)?,
        }))
    }
}

fn order_columns(testimony: &Testimony) -> (Vec<i64>, Vec<String>) {
    testimony.orders.iter().map(|(seq, key)| (bigint(*seq), key.encode())).unzip()
}

impl Ledger {
    /// Says that an instance is there: at its start, and again and again.
    pub async fn heartbeat(&self, instance: &str, roles: &[&str]) -> Result<(), LedgerError> {
        sqlx::query!(
            "INSERT INTO instances (name, roles) VALUES ($1, $2)
             ON CONFLICT (name) DO UPDATE SET heartbeat_at = now()",
            instance,
            roles as _
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Leaves what an instance that ends has seen of a lane, for whoever recovers that later. Nobody
    /// asked for it: that is what answering as it is asked shows.
    pub async fn leave_testimony(
        &self,
        instance: &str,
        lane: &LaneId,
        testimony: &Testimony,
    ) -> Result<(), LedgerError> {
        let (seqs, keys) = order_columns(testimony);
        sqlx::query!(
            "INSERT INTO testimonies (request, instance, sale_id, lane, asked_at, answered_at, epoch,
               seq, logged, unlisted, order_seqs, order_keys)
             VALUES ($1, $2, $3, $4, now(), now(), $5, $6, $7, $8, $9, $10)",
            rand::random::<i64>(),
            instance,
            lane.sale.as_str(),
            i16::from(lane.lane),
            i64::from(testimony.epoch),
            bigint(testimony.seq),
            bigint(testimony.logged),
            bigint(testimony.unlisted),
            &seqs,
            &keys as _
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// The epoch under which a lane was last open, as far as the database knows: of its last event, or
    /// of the last report that opened it.
    pub async fn opened_epoch(&self, lane: &LaneId) -> Result<u32, LedgerError> {
        let epoch = sqlx::query_scalar!(
            r#"SELECT greatest(1, (
                 SELECT max(g.epoch) FROM lanes l JOIN ledger g ON g.sale_id = l.sale_id
                   AND g.lane = l.lane AND g.seq = l.recorded
                 WHERE l.sale_id = $1 AND l.lane = $2
               ), (
                 SELECT max(epoch) FROM rebuilds
                 WHERE sale_id = $1 AND lane = $2 AND outcome IN ('opened', 'rebuilt')
               )) AS "epoch!""#,
            lane.sale.as_str(),
            i16::from(lane.lane)
        )
        .fetch_one(&self.pool)
        .await?;
        number("epoch", epoch)
    }

    /// All that was ever testified of a lane from this epoch on, whoever asked.
    pub async fn testified(
        &self,
        lane: &LaneId,
        epoch: u32,
    ) -> Result<Vec<Testimony>, LedgerError> {
        let rows = sqlx::query_as!(
            Row,
            r#"SELECT instance, epoch, seq, logged, unlisted, order_seqs, order_keys,
                 false AS "is_alive!"
             FROM testimonies WHERE sale_id = $1 AND lane = $2 AND epoch >= $3"#,
            lane.sale.as_str(),
            i16::from(lane.lane),
            i64::from(epoch)
        )
        .fetch_all(&self.pool)
        .await?;
        rows.into_iter().filter_map(|row| row.testimony().transpose()).collect()
    }

    /// An instance that ends in order need not be waited for.
    pub async fn leave(&self, instance: &str) -> Result<(), LedgerError> {
        sqlx::query!("DELETE FROM instances WHERE name = $1", instance).execute(&self.pool).await?;
        Ok(())
    }

    /// What an instance has been asked and has not answered.
    pub async fn asked(&self, instance: &str) -> Result<Vec<Asked>, LedgerError> {
        let rows = sqlx::query!(
            "SELECT request, sale_id, lane FROM testimonies
             WHERE instance = $1 AND answered_at IS NULL",
            instance
        )
        .fetch_all(&self.pool)
        .await?;
        rows.into_iter()
            .map(|row| Ok(Asked { request: row.request, lane: lane_id(&row.sale_id, row.lane)? }))
            .collect()
    }

    /// Answers one such question. What this instance answered before of the lane's epoch is in it: a
    /// process sees no less of an epoch later, and forgets orders only once Kafka has them.
    pub async fn testify(
        &self,
        request: i64,
        instance: &str,
        testimony: &Testimony,
    ) -> Result<(), LedgerError> {
        let (seqs, keys) = order_columns(testimony);
        sqlx::query!(
            "WITH asked AS (
               UPDATE testimonies SET answered_at = now(), epoch = $3, seq = $4, logged = $5,
                 unlisted = $6, order_seqs = $7, order_keys = $8
               WHERE request = $1 AND instance = $2 RETURNING sale_id, lane
             )
             DELETE FROM testimonies t USING asked
             WHERE t.sale_id = asked.sale_id AND t.lane = asked.lane AND t.instance = $2
               AND t.epoch = $3 AND t.answered_at IS NOT NULL AND t.request <> $1",
            request,
            instance,
            i64::from(testimony.epoch),
            bigint(testimony.seq),
            bigint(testimony.logged),
            bigint(testimony.unlisted),
            &seqs,
            &keys as _
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Asks every instance that has given a sign within `gone_after` what it has seen of a lane, and
    /// waits until each has answered or given no more signs for so long; for twice as long at most.
    pub async fn testimonies(
        &self,
        lane: &LaneId,
        gone_after: Duration,
    ) -> Result<Testimonies, LedgerError> {
        let request = rand::random::<i64>();
        sqlx::query!(
            "INSERT INTO testimonies (request, instance, sale_id, lane)
             SELECT $1, name, $2, $3 FROM instances WHERE heartbeat_at > now() - make_interval(secs => $4)",
            request,
            lane.sale.as_str(),
            i16::from(lane.lane),
            gone_after.as_secs_f64()
        )
        .execute(&self.pool)
        .await?;
        let give_up = tokio::time::Instant::now() + 2 * gone_after;
        loop {
            let rows = self.answers(request, gone_after).await?;
            let waits = rows.iter().any(|row| row.epoch.is_none() && row.is_alive);
            if !waits || tokio::time::Instant::now() >= give_up {
                let mut testimonies = Testimonies::default();
                for row in rows {
                    let instance = row.instance.clone();
                    match row.testimony()? {
                        Some(testimony) => testimonies.heard.push((instance, testimony)),
                        None => testimonies.unheard.push(instance),
                    }
                }
                return Ok(testimonies);
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    async fn answers(&self, request: i64, gone_after: Duration) -> Result<Vec<Row>, LedgerError> {
        Ok(sqlx::query_as!(
            Row,
            r#"SELECT t.instance, t.epoch, t.seq, t.logged, t.unlisted, t.order_seqs, t.order_keys,
                 EXISTS (
                   SELECT FROM instances i
                   WHERE i.name = t.instance AND i.heartbeat_at > now() - make_interval(secs => $2)
                 ) AS "is_alive!"
             FROM testimonies t WHERE t.request = $1 ORDER BY t.instance"#,
            request,
            gone_after.as_secs_f64()
        )
        .fetch_all(&self.pool)
        .await?)
    }

    /// Forgets instances that gave no sign, and testimonies that were given, longer ago than this, and
    /// those that nobody asked for and whose lane is recorded up to what they say; some at a time:
    /// whoever calls comes again.
    pub async fn forget_witnesses(&self, kept: Duration) -> Result<(), LedgerError> {
        sqlx::query!(
            "DELETE FROM instances WHERE name IN (
               SELECT name FROM instances WHERE heartbeat_at < now() - make_interval(secs => $1) LIMIT $2
             )",
            kept.as_secs_f64(),
            FORGOTTEN_AT_ONCE
        )
        .execute(&self.pool)
        .await?;
        sqlx::query!(
            "DELETE FROM testimonies WHERE (request, instance) IN (
               SELECT t.request, t.instance FROM testimonies t
               WHERE t.asked_at < now() - make_interval(secs => $1)
                 OR t.answered_at = t.asked_at AND EXISTS (
                   SELECT FROM lanes l
                   WHERE l.sale_id = t.sale_id AND l.lane = t.lane AND l.recorded >= t.seq
                 )
               LIMIT $2
             )",
            kept.as_secs_f64(),
            FORGOTTEN_AT_ONCE
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }
}
