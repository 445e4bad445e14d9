//! The command line.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use holdfast::app::{self, Role};
use holdfast::config::Config;
use holdfast::domain::names::{KeyName, SaleId};
use holdfast::ledger::{LetterStatus, Scope};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Inventory deduction for flash sales: holds stock atomically, records every event, never sells
/// a unit twice.
#[derive(Parser)]
#[command(version)]
struct Cli {
    /// Settings that override the defaults (TOML). `holdfast config` shows them all.
    #[arg(long, global = true, env = "HOLDFAST_CONFIG")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the service: all roles in one process, or some of them.
    Serve {
        #[arg(
            long,
            value_enum,
            value_delimiter = ',',
            default_value = "api,relay,writer,sweeper,reconciler"
        )]
        roles: Vec<Role>,
    },
    /// Bring the database's schema up to this version.
    Migrate,
    /// API keys.
    #[command(subcommand)]
    Keys(Keys),
    /// Sales.
    #[command(subcommand)]
    Sale(Sale),
    /// Records that could not be applied.
    #[command(subcommand)]
    DeadLetters(DeadLetters),
    /// Rebuild a sale's lanes from the ledger: freeze, seal, fold, prove, open.
    Rebuild {
        sale: SaleId,
        /// Only this lane.
        #[arg(long)]
        lane: Option<u8>,
        /// Even where something is in doubt: give up what the ledger lacks.
        #[arg(long)]
        force: bool,
    },
    /// List how lanes were opened anew, newest first: time, lane, outcome, why, by whom, epochs, seqs,
    /// what was lost, detail.
    Rebuilds {
        /// Only of this sale.
        #[arg(long)]
        sale: Option<SaleId>,
        #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=10_000))]
        limit: u32,
    },
    /// Print the effective configuration, secrets hidden.
    Config,
}

#[derive(Subcommand)]
enum Keys {
    /// Make a key and print it; it is shown only now.
    Create {
        /// Who it is for; audit rows name it. 1-64 of A-Z a-z 0-9 . _ -
        #[arg(long)]
        name: KeyName,
        /// orders, or operator (may also do all that orders may).
        #[arg(long)]
        scope: Scope,
    },
    /// List all keys.
    List,
    /// Revoke a key; it is refused within `catalog.refresh_ms`.
    Revoke {
        /// Its id or its name.
        key: String,
    },
}

#[derive(Subcommand)]
enum DeadLetters {
    /// List them, newest first: id, time, status, place (sale/lane/epoch-seq), whether its lane
    /// waits for it, reason, detail.
    List {
        /// open, retried or discarded; else all.
        #[arg(long, value_parser = status)]
        status: Option<LetterStatus>,
        #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=10_000))]
        limit: u32,
    },
    /// Print one, its record whole, as JSON.
    Show { id: i64 },
    /// Apply them, in this order, and what was parked behind each. Safe beside running writers.
    Retry {
        #[arg(required = true)]
        ids: Vec<i64>,
        /// Goes into the row.
        #[arg(long)]
        note: Option<String>,
    },
    /// Say that it need not be applied; refused while its lane waits for it.
    Discard {
        id: i64,
        /// Goes into the row.
        #[arg(long)]
        note: Option<String>,
    },
}

fn status(word: &str) -> Result<LetterStatus, String> {
    LetterStatus::from_word(word).ok_or_else(|| "open, retried or discarded".to_owned())
}

#[derive(Subcommand)]
enum Sale {
    /// Define or redefine a sale from a file (JSON or TOML): its `id` and its definition.
    Apply { file: PathBuf },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("holdfast: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    let config = Config::load(cli.config.as_deref())?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let outcome = runtime.block_on(async {
        match cli.command {
            Command::Serve { roles } => app::serve(config, &roles).await,
            Command::Migrate => app::migrate(&config).await,
            Command::Keys(Keys::Create { name, scope }) => {
                app::keys::create(&config, &name, scope).await
            }
            Command::Keys(Keys::List) => app::keys::list(&config).await,
            Command::Keys(Keys::Revoke { key }) => app::keys::revoke(&config, &key).await,
            Command::Sale(Sale::Apply { file }) => app::apply_sale(&config, &file).await,
            Command::DeadLetters(DeadLetters::List { status, limit }) => {
                app::dead_letters::list(&config, status, limit).await
            }
            Command::DeadLetters(DeadLetters::Show { id }) => {
                app::dead_letters::show(&config, id).await
            }
            Command::DeadLetters(DeadLetters::Retry { ids, note }) => {
                app::dead_letters::retry(&config, &ids, note).await
            }
            Command::DeadLetters(DeadLetters::Discard { id, note }) => {
                app::dead_letters::discard(&config, id, note).await
            }
            Command::Rebuild { sale, lane, force } => {
                app::rebuild::rebuild(config, sale, lane, force).await
            }
            Command::Rebuilds { sale, limit } => app::rebuild::list(&config, sale, limit).await,
            Command::Config => {
                print!("{}", config.to_redacted_toml());
                Ok(())
            }
        }
    });
    // What blocks is a question to Kafka that nobody waits for any more.
    runtime.shutdown_timeout(Duration::from_millis(100));
    outcome
}
