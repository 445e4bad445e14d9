//! The threads that answer callers.

use rustix::process::{getpriority_process, setpriority_process};
use tokio::runtime::{Builder, Handle, Runtime};

use crate::config;

/// What Linux has at most.
const NICEST: i32 = 19;

/// A runtime for the public listener and the lanes' calls. Its threads give way to whatever else the
/// machine has to do: what was answered must get from Redis to the database, and callers who order as
/// fast as they are answered would leave relay, writer and their servers too little to keep up. Where
/// a core is free nobody waits.
pub struct Front(Option<Runtime>);

impl Front {
    pub fn start(config: &config::Runtime) -> std::io::Result<Self> {
        // Asked for once: threads inherit it, and those of the front start some of their own.
        let own = getpriority_process(None)?;
        let niceness = NICEST.min(own + config.front_niceness);
        let runtime = Builder::new_multi_thread()
            .worker_threads(config.worker_threads())
            .thread_name("front")
            // To Linux, unlike POSIX, niceness is a thread's, not a process' (setpriority(2)).
            .on_thread_start(move || {
                if let Err(error) = setpriority_process(None, niceness) {
                    tracing::warn!(%error, niceness, "a thread keeps the priority of all others");
                }
            })
            .enable_all()
            .build()?;
        Ok(Self(Some(runtime)))
    }

    pub fn handle(&self) -> &Handle {
        self.0.as_ref().expect("it is taken only when dropped").handle()
    }
}

impl Drop for Front {
    /// A runtime must not be waited for where it was not blocked on.
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}
