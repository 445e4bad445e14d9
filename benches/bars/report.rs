//! What was measured: a table, `bars.json`, and latency over throughput as a picture.

use std::fmt::Write;
use std::path::Path;

use anyhow::Result;
use serde::Serialize;

/// On which side of the bar a figure has to be.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bar {
    AtLeast(f64),
    AtMost(f64),
    /// For information.
    None,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Met,
    Missed,
    /// Too short a look to say, or no bar.
    Unjudged,
    /// The machine had time to spare: this says nothing of how fast the service is.
    Void,
}

/// One figure, measured several times.
#[derive(Debug, Serialize)]
pub struct Row {
    pub number: u32,
    pub figure: &'static str,
    pub bar: Bar,
    pub median: f64,
    pub runs: Vec<f64>,
    pub verdict: Verdict,
    /// The absolute figures behind it.
    pub detail: String,
}

pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() % 2 {
        _ if sorted.is_empty() => f64::NAN,
        0 => f64::midpoint(sorted[middle - 1], sorted[middle]),
        _ => sorted[middle],
    }
}

impl Row {
    pub fn new(
        number: u32,
        figure: &'static str,
        bar: Bar,
        runs: Vec<f64>,
        detail: String,
    ) -> Self {
        let median = median(&runs);
        eprintln!("{number:>2} {figure}: {median:.2}");
        let verdict = match bar {
            Bar::None => Verdict::Unjudged,
            Bar::AtLeast(bar) if median >= bar => Verdict::Met,
            Bar::AtMost(bar) if median <= bar => Verdict::Met,
            Bar::AtLeast(_) | Bar::AtMost(_) => Verdict::Missed,
        };
        Self { number, figure, bar, median, runs, verdict, detail }
    }

    /// Not to be judged where more than a tenth of the machine idled.
    pub fn void_where_idle(mut self, idle: &[f64]) -> Self {
        if median(idle) > 0.1 {
            self.verdict = Verdict::Void;
            write!(self.detail, "; {:.0} % of the machine was idle", 100.0 * median(idle)).ok();
        }
        self
    }
}

pub fn table(rows: &[Row]) -> String {
    let mut text = format!("\n{:<64} {:>8} {:>8}  {:<7} runs\n", "figure", "median", "bar", "");
    for row in rows {
        let bar = match row.bar {
            Bar::AtLeast(bar) => format!(">= {bar:.2}"),
            Bar::AtMost(bar) => format!("<= {bar:.2}"),
            Bar::None => String::new(),
        };
        let verdict = match row.verdict {
            Verdict::Met => "met",
            Verdict::Missed => "missed",
            Verdict::Void => "void",
            Verdict::Unjudged => "",
        };
        let runs: Vec<_> = row.runs.iter().map(|run| format!("{run:.2}")).collect();
        let figure = format!("{:>2} {}", row.number, row.figure);
        let (median, runs) = (row.median, runs.join(" "));
        writeln!(text, "{figure:<64} {median:>8.2} {bar:>8}  {verdict:<7} {runs}").ok();
        writeln!(text, "   {}", row.detail).ok();
    }
    text
}

/// One load and what came of it.
#[derive(Debug, Clone, Serialize)]
pub struct Point {
    pub connections: usize,
    pub per_second: f64,
    pub p50_ms: f64,
    pub p99_ms: f64,
}

/// Latency over throughput, of one server.
#[derive(Debug, Serialize)]
pub struct Curve {
    pub name: &'static str,
    pub points: Vec<Point>,
}

#[derive(Serialize)]
struct Report<'a> {
    rows: &'a [Row],
    curves: &'a [Curve],
}

pub fn write(folder: &Path, rows: &[Row], curves: &[Curve]) -> Result<()> {
    std::fs::create_dir_all(folder)?;
    let report = serde_json::to_string_pretty(&Report { rows, curves })?;
    std::fs::write(folder.join("bars.json"), report)?;
    std::fs::write(folder.join("latency.svg"), picture(curves))?;
    Ok(())
}

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 400.0;
const MARGIN: f64 = 60.0;
const COLOURS: [&str; 2] = ["#1f6feb", "#8b949e"];

/// Linear throughput, logarithmic latency; p50 as a line, p99 dashed.
fn picture(curves: &[Curve]) -> String {
    let all = || curves.iter().flat_map(|curve| &curve.points);
    let most = all().map(|point| point.per_second).fold(1.0, f64::max);
    let slowest = all().map(|point| point.p99_ms).fold(1.0, f64::max).log10().ceil();
    let fastest = all().map(|point| point.p50_ms).fold(1.0, f64::min).log10().floor();
    let x = |per_second: f64| MARGIN + (WIDTH - 2.0 * MARGIN) * per_second / most;
    let y = |ms: f64| {
        HEIGHT - MARGIN - (HEIGHT - 2.0 * MARGIN) * (ms.log10() - fastest) / (slowest - fastest)
    };
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n"
    );
    let mut decade = fastest;
    while decade <= slowest {
        let (ms, at) = (10_f64.powf(decade), y(10_f64.powf(decade)));
        let (left, right) = (MARGIN, WIDTH - MARGIN);
        writeln!(svg, "<path d=\"M{left} {at:.1}H{right}\" stroke=\"#ddd\"/>").ok();
        let (at, left) = (at + 4.0, left - 6.0);
        writeln!(svg, "<text x=\"{left}\" y=\"{at:.1}\" text-anchor=\"end\">{ms} ms</text>").ok();
        decade += 1.0;
    }
    for quarter in 0..=4 {
        let rate = most * f64::from(quarter) / 4.0;
        let (at, below) = (x(rate), HEIGHT - MARGIN + 18.0);
        let label = format!("{rate:.0}/s");
        writeln!(svg, "<text x=\"{at:.1}\" y=\"{below}\" text-anchor=\"middle\">{label}</text>")
            .ok();
    }
    for (index, curve) in curves.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        for (dashes, is_p99) in [("none", false), ("5 4", true)] {
            let ms = |point: &Point| if is_p99 { point.p99_ms } else { point.p50_ms };
            let mut path = String::new();
            for point in &curve.points {
                let command = if path.is_empty() { 'M' } else { 'L' };
                write!(path, "{command}{:.1} {:.1}", x(point.per_second), y(ms(point))).ok();
            }
            writeln!(
                svg,
                "<path d=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\" \
                 stroke-dasharray=\"{dashes}\"/>"
            )
            .ok();
        }
        let (at, left) = (24.0 + 18.0 * index as f64, MARGIN + 10.0);
        let name = curve.name;
        writeln!(
            svg,
            "<text x=\"{left}\" y=\"{at}\" fill=\"{colour}\">{name}: p50, dashed p99</text>"
        )
        .ok();
    }
    svg + "</svg>\n"
}
