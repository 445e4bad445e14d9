//! The generator: wrk, one thread, with `loadtest/orders.lua`.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use tokio::process::Command;

/// What to send, and how hard.
#[derive(Clone)]
pub struct Load<'a> {
    pub url: &'a str,
    pub key: &'a str,
    pub sale: &'a str,
    pub connections: usize,
    pub duration: Duration,
    /// Requests a second; as many as are answered unless said otherwise.
    pub rate: Option<f64>,
    /// A tenth of the requests places again one of so many orders; see the script.
    pub replays: usize,
    /// How far an order must have got before it is answered.
    pub level: &'a str,
}

/// What wrk counted; times in seconds, corrected for requests that were not sent because the
/// answer before them was late.
#[derive(Debug, Clone, Deserialize)]
pub struct Counted {
    pub seconds: f64,
    pub answered: u64,
    /// Answers of 400 and above.
    pub refused: u64,
    /// Connections refused or cut, and answers that took two seconds or more.
    pub broken: u64,
    pub p50: f64,
    pub p99: f64,
}

impl Load<'_> {
    pub async fn run(&self) -> Result<Counted> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("loadtest/orders.lua");
        let mut wrk = Command::new("wrk");
        wrk.args(["-t1", "-c"])
            .arg(self.connections.to_string())
            .arg(format!("-d{}s", self.duration.as_secs().max(1)))
            .arg("-s")
            .arg(script)
            .arg(self.url)
            .env("HOLDFAST_ORDERS_KEY", self.key)
            .env("SALE", self.sale)
            .env("RATE", self.rate.map(|rate| rate.to_string()).unwrap_or_default())
            .env("REPLAYS", self.replays.to_string())
            .env("LEVEL", self.level);
        // Whoever has seen enough does not wait for the rest.
        let output = wrk
            .kill_on_drop(true)
            .output()
            .await
            .context("wrk, of Debian's package of that name")?;
        let said = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success(), "wrk: {said}{}", String::from_utf8_lossy(&output.stderr));
        let summary = said.lines().find_map(|line| line.strip_prefix("summary "));
        Ok(serde_json::from_str(summary.context("wrk said no summary")?)?)
    }
}
