//! `examples/follow_orders.rs`, run for real: what `docs/events.md` says is enough to follow a
//! lane.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use crate::support::{Lane, Stack, until};
use holdfast::bus::record::encode_seal;
use holdfast::domain::event::{Body, Event, RebuildToken, Seal};
use holdfast::domain::order::Status;

/// The example as a process, and what it has printed.
struct Follower {
    child: Child,
    lines: Arc<Mutex<Vec<String>>>,
}

impl Drop for Follower {
    fn drop(&mut self) {
        // It has ended already, unless the test has failed.
        self.child.kill().ok();
    }
}

impl Follower {
    fn start(stack: &Stack) -> Self {
        // Cargo names only the binaries for tests; it puts examples beside them.
        let examples = Path::new(env!("CARGO_BIN_EXE_holdfast")).with_file_name("examples");
        let mut child = Command::new(examples.join("follow_orders"))
            .args([&stack.kafka.brokers, &stack.kafka.topic, &stack.group])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("it is built, by cargo build --examples where tests are picked by --test");
        let lines = Arc::new(Mutex::new(Vec::new()));
        let (printed, seen) = (child.stdout.take().unwrap(), lines.clone());
        std::thread::spawn(move || {
            for line in BufReader::new(printed).lines() {
                seen.lock().unwrap().push(line.unwrap());
            }
        });
        Self { child, lines }
    }

    fn lines(&self) -> Vec<String> {
        self.lines.lock().unwrap().clone()
    }

    /// The ids of this lane's events, in the order in which they were printed.
    fn seen(&self, lane: &Lane) -> Vec<String> {
        let ids = |line: &String| line.split(' ').nth(1).unwrap().to_owned();
        let of_lane = format!("{}/", lane.id);
        self.lines().iter().map(ids).filter(|id| id.starts_with(&of_lane)).collect()
    }

    async fn until_seen(&self, lane: &Lane, event: &Event) {
        let id = id_of(event);
        until(&format!("{id} is printed"), || async { self.seen(lane).contains(&id) }).await;
    }

    /// As by Ctrl-C; its exit code.
    async fn interrupt(mut self) -> Option<i32> {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
        let child = Mutex::new(&mut self.child);
        let ended = || child.lock().unwrap().try_wait().unwrap();
        until("it ends", || async { ended().is_some() }).await;
        ended().unwrap().code()
    }
}

fn id_of(event: &Event) -> String {
    format!("{}/{}-{}", event.lane, event.epoch, event.seq)
}

fn ids_of_orders<'a>(events: impl IntoIterator<Item = &'a Event>) -> Vec<String> {
    let of_orders = events.into_iter().filter(|event| matches!(event.body, Body::Order(_)));
    of_orders.map(id_of).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_sees_each_event_of_an_order_once_and_in_order() {
    let stack = Stack::new("follow").await;
    let (mut near, mut far) = (stack.lane("near", 0).await, stack.lane("far", 1).await);
    let follower = Follower::start(&stack);

    let story = near.story(6);
    stack.send(&near, &story[..7]).await;
    stack.send(&near, &story[2..9]).await; // rewound by a relay that took over
    stack.send(&near, &story[10..]).await; // Kafka lost one
    stack.send(&near, &story).await; // and all of it is sent again
    let last = near.then(&story[1], Status::Cancelled);
    stack.send(&near, std::slice::from_ref(&last)).await;
    follower.until_seen(&near, &last).await;
    assert_eq!(follower.seen(&near), ids_of_orders(story.iter().chain([&last])));

    let defined = far.defined(9);
    let before = far.held("before");
    let seq = far.seq;
    let echoes = [far.held("lost"), far.held("lost-too"), far.held("lost-as-well")];
    (far.epoch, far.seq) = (2, seq);
    let after = [far.held("x"), far.held("y"), far.held("z")];
    stack.send(&far, &[defined, before.clone()]).await;
    stack.send(&far, &echoes[1..2]).await; // waits for the first, in vain
    let (lane, token, at) = (far.id.clone(), RebuildToken::new(7), before.at);
    stack
        .send_records(1, &[encode_seal(&Seal { lane, epoch: 2, token, gives_up: false, at })])
        .await;
    stack.send(&far, &echoes).await; // of an epoch that has ended
    stack.send(&far, &after).await;
    follower.until_seen(&far, &after[2]).await;
    assert_eq!(follower.seen(&far), ids_of_orders([&before].into_iter().chain(&after)));

    let Body::Order(step) = &story[2].body else { panic!("the second event is of an order") };
    let printed = follower.lines().into_iter().find(|line| line.contains(&id_of(&story[2])));
    let expected =
        format!("{} {} confirmed {} buyer-0 1xphone", story[2].at, id_of(&story[2]), step.order.id);
    assert_eq!(printed, Some(expected));
    assert_eq!(follower.interrupt().await, Some(0));

    let again = Follower::start(&stack);
    let next = near.held("next");
    stack.send(&near, std::slice::from_ref(&next)).await;
    again.until_seen(&near, &next).await;
    assert_eq!(again.lines().len(), 1, "it goes on where the other has ended: {:?}", again.lines());
    assert_eq!(again.interrupt().await, Some(0));
}
