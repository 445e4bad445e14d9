//! What the machine did meanwhile, from `/proc`.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// Linux reports CPU time in ticks of 10 ms (USER_HZ).
fn time(ticks: u64) -> Duration {
    Duration::from_millis(10 * ticks)
}

/// CPU time that processes and the idle machine have used so far.
#[derive(Clone)]
pub struct Usage {
    at: Instant,
    busy: Vec<Duration>,
    idle: Duration,
}

/// The difference of two.
pub struct Used {
    /// By process, in the order they were named.
    pub busy: Vec<Duration>,
    /// Share of the machine that nobody used, 0-1.
    pub idle: f64,
}

impl Usage {
    pub fn of(pids: &[u32]) -> Result<Self> {
        let busy = pids.iter().map(|pid| busy(*pid)).collect::<Result<_>>()?;
        let total = machine_ticks()?;
        let idle = total.get(3..5).context("/proc/stat has no idle time")?;
        Ok(Self { at: Instant::now(), busy, idle: time(idle.iter().sum()) })
    }

    pub fn since(&self, before: &Self) -> Used {
        let busy = self.busy.iter().zip(&before.busy).map(|(after, before)| *after - *before);
        let idle = (self.idle - before.idle).as_secs_f64();
        Used { busy: busy.collect(), idle: idle / ((self.at - before.at).as_secs_f64() * cores()) }
    }
}

/// Time that others on the hypervisor had of what this machine had use for, so far.
pub struct Stolen {
    at: Instant,
    time: Duration,
}

impl Stolen {
    pub fn now() -> Result<Self> {
        let stolen = *machine_ticks()?.get(7).context("/proc/stat has no stolen time")?;
        Ok(Self { at: Instant::now(), time: time(stolen) })
    }

    /// Share of the machine that was stolen since then, 0-1. Not every hypervisor says so.
    pub fn share_since(&self) -> Result<f64> {
        let now = Self::now()?;
        let stolen = (now.time - self.time).as_secs_f64();
        Ok(stolen / ((now.at - self.at).as_secs_f64() * cores()))
    }
}

fn cores() -> f64 {
    std::thread::available_parallelism().map_or(1, usize::from) as f64
}

/// What all CPUs did, kind by kind, proc(5).
fn machine_ticks() -> Result<Vec<u64>> {
    let stat = std::fs::read_to_string("/proc/stat")?;
    let all = stat.lines().next().and_then(|line| line.strip_prefix("cpu "));
    // One that was left out would shift all that follow.
    let kinds = all.context("/proc/stat does not begin with all CPUs")?.split_whitespace();
    Ok(kinds.map(str::parse).collect::<Result<_, _>>()?)
}

/// User and system time of a process, proc(5).
fn busy(pid: u32) -> Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, after_name) = stat.rsplit_once(')').context("/proc/PID/stat")?;
    let fields: Vec<_> = after_name.split_whitespace().collect();
    let ticks = |field: usize| -> Result<u64> { Ok(fields[field].parse()?) };
    Ok(time(ticks(11)? + ticks(12)?))
}

/// Memory that a process has in use, proc(5).
pub fn resident_bytes(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()).context("no VmRSS")?;
    Ok(1024 * kib.parse::<u64>()?)
}
