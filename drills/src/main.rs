//! Fault drills: each starts Holdfast on real servers of its own, presses on it with random callers,
//! does harm, mends it, and has an independent checker judge what callers were told and what the
//! servers say. `./dev drill` builds and runs it; `docs/reliability.md` shows what came of it.

mod books;
mod checker;
mod drills;
mod history;
mod parts;
mod proxy;
mod report;
mod scene;
mod workload;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail};
use clap::Parser;

use crate::checker::Expected;
use crate::drills::{DRILLS, Drill};
use crate::history::{History, Outcome};
use crate::parts::Stack;
use crate::report::Row;
use crate::scene::{Extent, Scene};

#[derive(Parser)]
struct Cli {
    /// Names of drills; `short`: the selection that CI runs; `all`: every one; `list`: what there is.
    #[arg(required = true)]
    names: Vec<String>,
    /// What the callers do follows from it, and is printed; else random.
    #[arg(long)]
    seed: Option<u64>,
    /// After so many minutes a drill is given up, and has failed.
    #[arg(long, default_value_t = 30)]
    minutes_max: u64,
    /// How often a fault is repeated; 20, in the short selection 2.
    #[arg(long)]
    times: Option<u32>,
    /// How long a server stays away; 120, in the short selection 5.
    #[arg(long)]
    away_seconds: Option<u64>,
    /// Where the drills' servers and results go.
    #[arg(long)]
    home: PathBuf,
    #[arg(long)]
    port_base: u16,
    #[arg(long)]
    dev: PathBuf,
    #[arg(long)]
    binary: PathBuf,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("drills: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn chosen(names: &[String]) -> anyhow::Result<Vec<&'static Drill>> {
    let mut chosen = Vec::new();
    for name in names {
        let before = chosen.len();
        chosen.extend(DRILLS.iter().filter(|drill| match name.as_str() {
            "all" => true,
            "short" => drill.short,
            name => drill.name == name,
        }));
        if chosen.len() == before {
            bail!("there is no drill {name}: see ./dev drill list");
        }
    }
    Ok(chosen)
}

/// Whether all of them passed.
fn run(cli: &Cli) -> anyhow::Result<bool> {
    if cli.names == ["list"] {
        for drill in DRILLS {
            println!("{:<22} {}", drill.name, drill.about);
        }
        return Ok(true);
    }
    let drills = chosen(&cli.names)?;
    let short = cli.names == ["short"];
    let extent = Extent {
        seed: cli.seed.unwrap_or_else(rand::random),
        times: cli.times.unwrap_or(if short { 2 } else { 20 }),
        away: Duration::from_secs(cli.away_seconds.unwrap_or(if short { 5 } else { 120 })),
        longest: Duration::from_secs(60 * cli.minutes_max),
    };
    let (seed, count) = (extent.seed, drills.len());
    println!("seed {seed}; {count} drills, each of {} minutes at most", cli.minutes_max);
    let stack = Stack::start(cli.home.join("stack"), cli.port_base, cli.dev.clone())?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let mut rows = Vec::new();
    for drill in drills {
        let dir = cli.home.join(drill.name);
        let row = runtime.block_on(one(drill, &stack, &cli.binary, &dir, &extent))?;
        println!("{row}");
        rows.push(row);
        // Whatever ends the run, what was found so far is there.
        report::write(&cli.home, &rows)?;
    }
    // What hangs in a call to Kafka ends with the process.
    runtime.shutdown_timeout(Duration::from_millis(100));
    println!("\n{}", report::markdown(&rows));
    Ok(rows.iter().all(Row::passed))
}

/// Runs one drill and judges it; one that cannot begin has failed. Its history and books stay only where
/// it failed.
async fn one(
    drill: &Drill,
    stack: &Stack,
    binary: &Path,
    dir: &Path,
    extent: &Extent,
) -> anyhow::Result<Row> {
    println!("==> {}: {}", drill.name, drill.about);
    if dir.exists() {
        std::fs::remove_dir_all(dir)?;
    }
    std::fs::create_dir_all(dir)?;
    let began = Instant::now();
    let history = Arc::new(History::create(&dir.join("history.jsonl"))?);
    let failed = |error: anyhow::Error| Row {
        name: drill.name,
        seed: extent.seed,
        failures: vec![format!("it could not begin: {error:#}")],
        seconds: began.elapsed().as_secs(),
        ..Row::default()
    };
    let small;
    let stack = match drill.layout.small_disk.map(|part| stack.with_small_disk(part)) {
        None => stack,
        Some(Ok(own)) => {
            small = own;
            &small
        }
        Some(Err(error)) => return Ok(failed(error)),
    };
    let set = Scene::set(stack, binary, drill.name, extent, &drill.layout, history.clone());
    let scene = match within(extent.longest, set).await {
        Ok(scene) => scene,
        Err(error) => return Ok(failed(error)),
    };
    let ended = pressed(drill, &scene).await;
    let entries = history.entries();
    let count = |outcome| entries.iter().filter(|entry| entry.reply.outcome == outcome).count();
    let mut row = Row {
        name: drill.name,
        requests: entries.len(),
        ok: count(Outcome::Ok),
        refused: count(Outcome::Refused),
        unknown: count(Outcome::Unknown),
        bites: scene.bites(),
        seed: extent.seed,
        ..Row::default()
    };
    row.timed(&entries, &scene.faults());
    if let Err(error) = ended {
        row.failures.push(format!("{error:#}"));
    }
    for what in drill.unbitten(&row.bites) {
        row.failures.push(format!("it did not bite: no {what}"));
    }
    scene.stop_services();
    match scene.books().await {
        Ok(books) => {
            let expected = Expected { forgot_ms: scene.forgot_ms(), ..drill.expected.clone() };
            let found = checker::check(&entries, &books, &expected);
            row.failures.extend(found.iter().map(ToString::to_string));
            row.lost = checker::lost(&entries, &books).len();
            serde_json::to_writer(std::fs::File::create(dir.join("books.json"))?, &books)?;
        }
        Err(error) => row.failures.push(format!("the books could not be read: {error:#}")),
    }
    row.seconds = began.elapsed().as_secs();
    if row.passed() {
        std::fs::remove_dir_all(dir)?;
    } else {
        row.kept = Some(dir.display().to_string());
    }
    Ok(row)
}

/// What takes longer is given up.
async fn within<T>(
    longest: Duration,
    work: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    let done = tokio::time::timeout(longest, work).await;
    done.unwrap_or_else(|_| Err(anyhow!("given up after {longest:?}")))
}

/// The drill, with callers around it; then waits until nothing moves any more.
async fn pressed(drill: &Drill, scene: &Scene<'_>) -> anyhow::Result<()> {
    let callers = tokio::spawn({
        let (callee, seed) = (scene.callee.clone(), scene.extent.seed);
        async move { callee.press(seed).await }
    });
    let drilled = async {
        scene.settled().await?;
        scene.flows().await?;
        (drill.run)(scene).await?;
        drills::levels_bit(scene);
        scene.settled().await?;
        scene.closed().await
    };
    let drilled = within(scene.extent.longest, drilled).await;
    scene.callee.stop();
    callers.await?;
    drilled?;
    if let Some(why) = scene.ended() {
        bail!(why);
    }
    scene.drained().await
}
