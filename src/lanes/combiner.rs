//! The combiner of one lane: whatever commands gather while the lane's previous script call is in
//! flight go to Redis as one; a lone command goes at once. So latency is one round trip when idle,
//! and throughput grows with load.
//!
//! Commands that the replicas must have ([`super::Lanes::proving`]) have a combiner of their own in their
//! lane, whose calls take a connection each: nobody else waits for a replica.
//!
//! A queued command is sent even if its caller has gone away: a replay finds what it did. A call
//! that was not answered is [`LaneError::Unknown`] to all whose commands it carried.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use chrono::Utc;
use deadpool_redis::Connection;
use redis::FromRedisValue;
use tokio::sync::{mpsc, oneshot};

use super::command::Command;
use super::keys::LaneKeys;
use super::marks::Watch;
use super::memory::Standing;
use super::pace::Pace;
use super::proof::Proof;
use super::reply::{Frozen, Marks, ReplyError, bad, fields};
use super::{LaneError, Shared};
use crate::domain::time::Timestamp;

/// A lane's answer to one command, before its outcome is read.
pub(super) struct RawReply {
    pub now: Timestamp,
    pub marks: Marks,
    /// Where it was asked for.
    pub proof: Option<Proof>,
    /// Where what is told of it is kept.
    pub watch: Arc<Watch>,
    pub text: String,
}

/// A command and whom to answer.
pub(super) struct Waiting {
    pub command: Command,
    /// Gets the command back: an outcome repeats much of it.
    pub answer: oneshot::Sender<Result<(Command, RawReply), LaneError>>,
    /// By when it must be sent: whoever waits longer is better told to come back.
    pub send_by: Instant,
}

/// Where the lane stands, and what it says to each command.
type Replies = (Marks, Vec<Result<RawReply, LaneError>>);

/// Runs until every sender is gone and the queue is empty.
pub(super) async fn run(
    shared: Arc<Shared>,
    keys: LaneKeys,
    watch: Arc<Watch>,
    mut queue: mpsc::Receiver<Waiting>,
    proves: bool,
) {
    let mut batch = Batch::default();
    // The first command that no longer fitted into the last call.
    let mut left_over = None;
    let mut pace = Pace::default();
    loop {
        let first = match left_over.take() {
            Some(waiting) => waiting,
            None => match queue.recv().await {
                Some(waiting) => waiting,
                None => return,
            },
        };
        // Commands gather while all connections for proofs wait for replicas.
        let proving = match proves {
            true => match shared.connections.proving().await {
                Ok(connection) => Some(connection),
                Err(error) => {
                    answer(first, Err(error.into()));
                    continue;
                }
            },
            false => None,
        };
        batch.add(first);
        while batch.waiting.len() < shared.options.batch_max {
            let Ok(next) = queue.try_recv() else { break };
            if batch.weight + next.command.weight() > shared.options.batch_lines_max {
                left_over = Some(next);
                break;
            }
            batch.add(next);
        }
        if let Some(marks) = batch.send(&shared, &keys, &watch, proving).await {
            watch.tell(marks);
            // Who has to end does not rest.
            if let Some(rest) = pace.rest(marks, &shared.options).filter(|_| !queue.is_closed()) {
                shared.metrics.paced_seconds.inc_by(rest.as_secs_f64());
                tokio::time::sleep(rest).await;
            }
        }
    }
}

#[derive(Default)]
struct Batch {
    waiting: Vec<Waiting>,
    weight: usize,
}

impl Batch {
    fn add(&mut self, waiting: Waiting) {
        self.weight += waiting.command.weight();
        self.waiting.push(waiting);
    }

    /// Sends it and answers everybody; says where the lane stands.
    async fn send(
        &mut self,
        shared: &Shared,
        keys: &LaneKeys,
        watch: &Arc<Watch>,
        proving: Option<Connection>,
    ) -> Option<Marks> {
        self.weight = 0;
        let now = Instant::now();
        for late in self.waiting.extract_if(.., |waiting| waiting.send_by < now) {
            shared.metrics.queued_too_long.inc();
            answer(late, Err(LaneError::Unavailable("the lane did not get to it in time".into())));
        }
        if self.waiting.is_empty() {
            return None;
        }
        let sent = self.waiting.len();
        let started = Instant::now();
        let result = call(shared, keys, watch, proving, &self.waiting).await;
        shared.metrics.call_seconds.observe(started.elapsed().as_secs_f64());
        shared.metrics.call_commands.observe(sent as f64);
        match result {
            Ok((marks, replies)) => {
                for (waiting, reply) in self.waiting.drain(..).zip(replies) {
                    answer(waiting, reply);
                }
                // What a lane says that may have forgotten something proves nothing to anybody.
                (watch.memory.standing() == Standing::Open).then_some(marks)
            }
            Err(error) => {
                tracing::warn!(lane = keys.lane(), commands = sent, %error, "a lane's call failed");
                for waiting in self.waiting.drain(..) {
                    answer(waiting, Err(error.clone()));
                }
                None
            }
        }
    }
}

fn answer(waiting: Waiting, reply: Result<RawReply, LaneError>) {
    let Waiting { command, answer, .. } = waiting;
    if answer.send(reply.map(|reply| (command, reply))).is_err() {
        tracing::debug!("the caller of a command went away before its answer");
    }
}

async fn call(
    shared: &Shared,
    keys: &LaneKeys,
    watch: &Arc<Watch>,
    proving: Option<Connection>,
    batch: &[Waiting],
) -> Result<Replies, LaneError> {
    let script = &shared.scripts.lane;
    let mut call = script.call(keys.all());
    call.arg(Utc::now().timestamp_millis());
    call.arg(shared.options.outbox_events_max);
    let outbox_full = watch.outbox_bytes.load(Ordering::Relaxed) >= shared.options.outbox_bytes_max;
    call.arg(u8::from(outbox_full || shared.nearly_full.load(Ordering::Relaxed)));
    match &proving {
        Some(_) => {
            let (epoch, seq) = watch.proven();
            call.arg(format!("{epoch}-{seq}"));
        }
        None => {
            call.arg("");
        }
    }
    match watch.memory.seen() {
        Some((epoch, seq)) => call.arg(format!("{epoch}-{seq}")),
        None => call.arg(""),
    };
    call.arg(batch.len());
    for alike in batch.chunk_by(|one, next| one.command.asks_like(&next.command)) {
        alike[0].command.encode_shared(alike.len(), &mut call);
        for waiting in alike {
            waiting.command.encode(&mut call);
        }
    }
    let (value, acknowledged) = match proving {
        None => (shared.connections.call_lane(script, &call).await?, None),
        Some(connection) => {
            let sent = shared.connections.call_script_proving(connection, script, &call);
            let (value, acknowledged) = sent.await?;
            (value, Some(acknowledged))
        }
    };
    let [stands, replies]: [String; 2] =
        FromRedisValue::from_redis_value(value).map_err(|e| LaneError::Protocol(e.to_string()))?;
    let (now, mut marks) = read_marks(&stands)?;
    let standing = match frozen(&replies)? {
        Some(why) => Standing::Frozen(why),
        None if marks.epoch == 0 => Standing::Missing,
        None => Standing::Open,
    };
    if watch.memory.see(marks, standing) {
        let lane = keys.lane();
        match standing {
            Standing::Frozen(why) => tracing::error!(lane, %why, ?marks, "a lane is frozen"),
            Standing::Missing => tracing::error!(lane, "a lane is gone from Redis"),
            Standing::Open => tracing::info!(lane, ?marks, "a lane is open again"),
        }
    }
    if shared.replicas > 0 {
        marks = watch.with_proof(marks);
    }
    let proof = acknowledged.map(|acknowledged| Proof::of(acknowledged, marks, watch.clone()));
    let reply = |text: &str| match text {
        "missing" => Err(LaneError::Missing),
        text => match frozen(text)? {
            Some(why) => Err(LaneError::Frozen(why)),
            None => Ok(RawReply {
                now,
                marks,
                proof: proof.clone(),
                watch: watch.clone(),
                text: text.to_owned(),
            }),
        },
    };
    let replies: Vec<_> = replies.split('\n').map(reply).collect();
    if replies.len() != batch.len() {
        let what = "the number of replies is not that of the commands";
        return Err(LaneError::Protocol(what.to_owned()));
    }
    Ok((marks, replies))
}

/// Reads `frozen WHY`, which is said to every command of a call; any other outcome is `None`.
fn frozen(reply: &str) -> Result<Option<Frozen>, ReplyError> {
    let why = reply.strip_prefix("frozen ");
    why.map(|why| why.split('\n').next().unwrap_or(why).parse()).transpose()
}

/// Reads `now epoch seq logged recorded proven`.
fn read_marks(stands: &str) -> Result<(Timestamp, Marks), ReplyError> {
    let [now, epoch, seq, logged, recorded, proven] = fields::<6>(stands)?;
    let number = |text: &str| text.parse::<u64>().map_err(|_| bad(text));
    let marks = Marks {
        epoch: number(epoch)? as u32,
        seq: number(seq)?,
        replicated: number(proven)?,
        logged: number(logged)?,
        recorded: number(recorded)?,
    };
    Ok((Timestamp::from_millis(number(now)? as i64), marks))
}
