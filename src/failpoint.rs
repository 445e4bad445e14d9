//! Points at which a fault drill has the process die, as by SIGKILL, or stop, as by SIGSTOP: only with the
//! feature `failpoints`, which no build for users has. Without it a point is nothing.
//!
//! `FAILPOINT=NAME:N` in the environment: the process kills itself when it passes the point NAME for the
//! N-th time. `FAILPOINT=NAME:N:stop`: it stops itself there, until somebody sends it SIGCONT. A name begins
//! with the role that passes it.

/// The environment's variable that says where to die or stop.
#[cfg(feature = "failpoints")]
const VARIABLE: &str = "FAILPOINT";

#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub(crate) fn pass(_name: &str) {}

#[cfg(feature = "failpoints")]
pub(crate) fn pass(name: &str) {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    use rustix::process::{Signal, getpid, kill_process};

    /// A signal may go to another thread first, and to this one a moment later: it must not go on meanwhile.
    const SIGNAL_ARRIVES: Duration = Duration::from_millis(100);

    static WANTED: LazyLock<Option<(String, u32, Signal)>> = LazyLock::new(|| {
        let wanted = std::env::var(VARIABLE).ok()?;
        let words: Vec<_> = wanted.split(':').collect();
        let parsed = match words[..] {
            [name, count] => Some((name, count, Signal::KILL)),
            [name, count, "stop"] => Some((name, count, Signal::STOP)),
            _ => None,
        };
        let parsed = parsed.and_then(|(name, count, signal)| {
            let count = count.parse().ok().filter(|count| *count > 0)?;
            Some((name.to_owned(), count, signal))
        });
        Some(parsed.unwrap_or_else(|| panic!("{VARIABLE} is not NAME:N or NAME:N:stop: {wanted}")))
    });
    static PASSED: AtomicU32 = AtomicU32::new(0);

    let Some((wanted, count, signal)) = &*WANTED else { return };
    if wanted != name || PASSED.fetch_add(1, Ordering::Relaxed) + 1 != *count {
        return;
    }
    kill_process(getpid(), *signal).expect("a process may send itself a signal");
    std::thread::sleep(SIGNAL_ARRIVES);
}
