//! A future that is polled only when it was woken itself, and at once where it wakes itself.
//!
//! Hyper's connection wakes its own task whenever a body has been read. To tokio a task that wakes itself
//! while it is polled has work to do later: it goes to the end of the queue, and a second thread is woken to
//! look whether it can take it, on a core that somebody else needs (hyper 1.12, `body/chan.rs`; tokio 1.54,
//! `yield_now` in its scheduler). And of several futures in one task each is polled when any is woken.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, Wake, Waker};

/// How often it is polled at once; after that it is the other tasks' turn.
const POLLS_MAX: usize = 4;

/// It has nothing to do until it is woken.
const RESTS: u8 = 0;
const IS_POLLED: u8 = 1;
const WOKEN: u8 = 2;

/// What wakes the future.
struct Bell {
    state: AtomicU8,
    task: Waker,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // While it is polled, whoever polls it looks again; and once is enough.
        if self.state.swap(WOKEN, Ordering::AcqRel) == RESTS {
            self.task.wake_by_ref();
        }
    }
}

/// Waits for this future.
pub async fn quiet<F: Future>(future: F) -> F::Output {
    let mut future = pin!(future);
    let mut bell: Option<(Arc<Bell>, Waker)> = None;
    poll_fn(|context| {
        let known = bell.take().filter(|(bell, _)| bell.task.will_wake(context.waker()));
        let (bell, waker) = bell.insert(known.unwrap_or_else(|| {
            let task = context.waker().clone();
            let bell = Arc::new(Bell { state: AtomicU8::new(WOKEN), task });
            (bell.clone(), bell.into())
        }));
        for _ in 0..POLLS_MAX {
            let woken = (WOKEN, IS_POLLED);
            if exchange(&bell.state, woken).is_err() {
                return Poll::Pending;
            }
            if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(waker)) {
                return Poll::Ready(output);
            }
            if exchange(&bell.state, (IS_POLLED, RESTS)).is_ok() {
                return Poll::Pending;
            }
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await
}

fn exchange(state: &AtomicU8, (from, to): (u8, u8)) -> Result<u8, u8> {
    state.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use tokio::sync::{mpsc, oneshot};

    use super::*;

    /// Wakes itself so often, then is ready; counts its polls.
    fn restless(mut wakes: usize, polls: &AtomicUsize) -> impl Future<Output = ()> {
        poll_fn(move |context| {
            polls.fetch_add(1, Ordering::Relaxed);
            if wakes == 0 {
                return Poll::Ready(());
            }
            wakes -= 1;
            context.waker().wake_by_ref();
            Poll::Pending
        })
    }

    /// How often a task is polled until this has ended.
    async fn task_polls(future: impl Future<Output = ()>) -> usize {
        let (mut future, mut count) = (pin!(future), 0);
        poll_fn(|context| {
            count += 1;
            future.as_mut().poll(context)
        })
        .await;
        count
    }

    #[tokio::test]
    async fn what_wakes_itself_is_polled_again_at_once_but_not_for_ever() {
        for (wakes, expected) in [(0, 1), (1, 1), (POLLS_MAX - 1, 1), (POLLS_MAX, 2), (100, 26)] {
            let polls = AtomicUsize::new(0);
            assert_eq!(task_polls(quiet(restless(wakes, &polls))).await, expected, "{wakes}");
            assert_eq!(polls.into_inner(), wakes + 1);
        }
    }

    #[tokio::test]
    async fn another_future_of_the_task_does_not_make_it_look() {
        let (polls, (end, ended)) = (AtomicUsize::new(0), oneshot::channel());
        let mut ended = pin!(ended);
        let counted = quiet(poll_fn(|context| {
            polls.fetch_add(1, Ordering::Relaxed);
            ended.as_mut().poll(context).map(drop)
        }));
        let other = async {
            for _ in 0..10 {
                tokio::task::yield_now().await;
            }
            end.send(()).expect("it waits");
        };
        tokio::join!(counted, other);
        assert_eq!(polls.into_inner(), 2);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn no_word_from_another_thread_is_missed() {
        const WORDS: usize = 100_000;
        let (sender, mut words) = mpsc::channel(1);
        let sending = tokio::spawn(async move {
            for word in 0..WORDS {
                sender.send(word).await.expect("somebody listens");
            }
        });
        let listening = quiet(async {
            for word in 0..WORDS {
                assert_eq!(words.recv().await, Some(word));
            }
        });
        listening.await;
        sending.await.expect("no panic");
    }
}
