//! The bars: how fast Holdfast is beside a bare HTTP server, plain Redis and plain inserts, each a
//! ratio measured in one run. `./dev bench` starts the servers and runs this. wrk generates the
//! load, with one thread; everything shares the machine.

mod bare;
mod durability;
mod endurance;
mod machine;
mod report;
mod rows;
mod service;
mod wrk;

#[path = "../../tests/support/redis_server.rs"]
mod redis_server;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;
use clap::Parser;

use self::durability::Pair;
use self::report::{Curve, Row, Verdict};
use self::rows::{Bare, Bench, Effort};
use self::service::{Deployment, Process, free_port, until};

#[derive(Parser)]
struct Arguments {
    /// Under three minutes, to see that all of this works; judges nothing
    #[arg(long)]
    quick: bool,
    /// Only these rows, e.g. 1,2,4
    #[arg(long, value_delimiter = ',')]
    rows: Vec<u32>,
    /// Where bars.json and, with rows 1 and 2, latency.svg go
    #[arg(long, default_value = "target/bars")]
    output: PathBuf,
    /// Said by cargo bench
    #[arg(long, hide = true)]
    bench: bool,
    /// Be the bare server, at this address
    #[arg(long, hide = true)]
    bare: Option<SocketAddr>,
    #[arg(long, hide = true, default_value_t = 0)]
    filler: usize,
}

#[tokio::main]
async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if let Some(address) = arguments.bare {
        return bare::serve(address, arguments.filler).await;
    }
    let deployment = Deployment::new().await?;
    let began = machine::Stolen::now()?;
    let measured = measure(&deployment, &arguments).await;
    deployment.leave().await?;
    let (mut rows, curves) = measured?;
    rows.sort_by_key(|row| row.number);
    if arguments.quick {
        rows.iter_mut().for_each(|row| row.verdict = Verdict::Unjudged);
    }
    println!("{}", report::table(&rows));
    println!("the hypervisor took {:.1} % of the machine's time", 100.0 * began.share_since()?);
    report::write(&arguments.output, &rows, &curves)?;
    let missed = rows.iter().any(|row| !matches!(row.verdict, Verdict::Met | Verdict::Unjudged));
    std::process::exit(i32::from(missed));
}

/// The rows that are asked for, and the curves of latency.
async fn measure(deployment: &Deployment, arguments: &Arguments) -> Result<(Vec<Row>, Vec<Curve>)> {
    let effort = if arguments.quick { Effort::QUICK } else { Effort::FULL };
    let mut rows = Vec::new();
    let wanted = |numbers: &[u32]| {
        arguments.rows.is_empty() || numbers.iter().any(|n| arguments.rows.contains(n))
    };
    // The bare server answers as many bytes as an order has, or as a refusal.
    let (order_bytes, refusal_bytes) = answer_bytes(deployment).await?;
    let (process, bare) = start_bare(order_bytes).await?;
    let bench = Bench { deployment, bare: &bare, effort };
    if wanted(&[1, 2]) {
        rows.extend(bench.held().await?);
    }
    if wanted(&[3]) {
        rows.extend(bench.alone().await?);
    }
    if wanted(&[5, 10]) {
        rows.extend(bench.sustained().await?);
    }
    if wanted(&[6]) {
        rows.extend(bench.latency().await?);
    }
    if wanted(&[7]) {
        rows.extend(bench.overload().await?);
    }
    if wanted(&[8]) {
        rows.extend(bench.writer().await?);
    }
    if wanted(&[9]) {
        rows.extend(bench.expiry().await?);
    }
    if wanted(&[11, 12]) {
        rows.extend(bench.crowded().await?);
    }
    if wanted(&[13, 19]) {
        rows.extend(bench.drained().await?);
    }
    if wanted(&[14, 15]) {
        rows.extend(bench.weight().await?);
    }
    if wanted(&[16, 17, 18]) {
        let pair = Pair::start().await?;
        let deployment = Deployment::on(&pair.primary.url(), 1).await?;
        let bench = Bench { deployment: &deployment, bare: &bare, effort };
        rows.extend(bench.durability(|number| wanted(&[number])).await?);
        deployment.leave().await?;
    }
    let curves = if wanted(&[1, 2]) { bench.curves().await? } else { Vec::new() };
    drop(process);
    if wanted(&[4]) {
        let (_process, bare) = start_bare((9 * refusal_bytes + order_bytes) / 10).await?;
        let bench = Bench { deployment, bare: &bare, effort };
        rows.extend(bench.sold_out().await?);
    }
    Ok((rows, curves))
}

/// The sizes of the answers to an order that is held, and to one for which nothing is left.
async fn answer_bytes(deployment: &Deployment) -> Result<(usize, usize)> {
    let service = deployment.serve("api").await?;
    let sale = service.define(1, 60).await?;
    let (held, order) = service.place(&sale, "1762819200-1-100000").await?;
    let (sold_out, refusal) = service.place(&sale, "1762819200-1-100001").await?;
    anyhow::ensure!((held, sold_out) == (201, 409), "{held} and {sold_out}");
    deployment.forget(&sale).await?;
    Ok((order.len(), refusal.len()))
}

/// Starts the bare server so that it answers so many bytes.
async fn start_bare(bytes: usize) -> Result<(Process, Bare)> {
    let mut filler = 0;
    loop {
        let address = format!("127.0.0.1:{}", free_port()?);
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["--bare", &address, "--filler", &filler.to_string()]);
        let process = Process(command.spawn()?);
        let url = format!("http://{address}");
        let client = reqwest::Client::new();
        let mut answered = 0;
        until("the bare server answers", async || {
            let body = serde_json::json!({
                "sale_id": "bench-0123456789abcdef", "buyer_id": "1762819200-1-100000",
                "lines": [{"sku": "sku", "quantity": 1}]
            });
            let Ok(answer) = client.post(format!("{url}/v1/orders")).json(&body).send().await
            else {
                return Ok(false);
            };
            answered = answer.bytes().await?.len();
            Ok(true)
        })
        .await?;
        if answered >= bytes || filler > 0 {
            let pid = process.0.id();
            return Ok((process, Bare { url, pid }));
        }
        // `,"filler":""` takes 12 bytes by itself.
        filler = (bytes - answered).saturating_sub(12).max(1);
    }
}
