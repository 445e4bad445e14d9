//! Points at which a fault drill has the process die, as by SIGKILL: only with the feature `failpoints`,
//! which no build for users has. Without it a point is nothing.
//!
//! `FAILPOINT=NAME:N` in the environment: the process kills itself when it passes the point NAME for the
//! N-th time. A name begins with the role that passes it.

/// The environment's variable that says where to die.
#[cfg(feature = "failpoints")]
const VARIABLE: &str = "FAILPOINT";

#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub(crate) fn pass(_name: &str) {}

#[cfg(feature = "failpoints")]
pub(crate) fn pass(name: &str) {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU32, Ordering};

    static WANTED: LazyLock<Option<(String, u32)>> = LazyLock::new(|| {
        let wanted = std::env::var(VARIABLE).ok()?;
        let parsed = wanted.split_once(':').and_then(|(name, count)| {
            let count = count.parse().ok().filter(|count| *count > 0)?;
            Some((name.to_owned(), count))
        });
        Some(parsed.unwrap_or_else(|| panic!("{VARIABLE} is not NAME:N: {wanted}")))
    });
    static PASSED: AtomicU32 = AtomicU32::new(0);

    let Some((wanted, count)) = &*WANTED else { return };
    if wanted != name || PASSED.fetch_add(1, Ordering::Relaxed) + 1 != *count {
        return;
    }
    let killed =
        rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    killed.expect("a process may kill itself");
    // Where the signal goes to another thread first, this one does nothing more.
    loop {
        std::thread::park();
    }
}
