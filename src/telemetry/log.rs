//! Log lines on standard error, as text or JSON.

use tracing_subscriber::EnvFilter;

use crate::config::{LogFormat, Telemetry};

/// Starts logging for the process.
///
/// # Errors
/// `telemetry.log` is no list of tracing directives.
pub fn start(config: &Telemetry) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&config.log)
        .map_err(|e| anyhow::anyhow!("telemetry.log = {:?} is impossible: {e}", config.log))?;
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match config.log_format {
        LogFormat::Text => subscriber.init(),
        LogFormat::Json => subscriber.json().flatten_event(true).init(),
    }
    Ok(())
}
