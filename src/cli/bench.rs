//! `vitrim bench`: latency of one model, or of two in turn.

use super::failure::Failure;
use super::options::{EngineArgs, SizeArgs, runtimes};
use super::talk::Talk;
use super::{Verdict, print_json, print_text};
use crate::bench::{Report, Settings};
use crate::onnx::{shown, shown_to};
use crate::pipeline;
use crate::runtime::RuntimeName;
use std::path::PathBuf;
use std::time::Duration;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The model
    model: PathBuf,
    /// Another one with the same inputs
    other: Option<PathBuf>,
    /// Runtimes to measure in [default: all of this build]
    #[arg(long, value_name = "ort,tract")]
    runtimes: Option<String>,
    /// Measured runs of each model
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    iterations: u32,
    /// Runs before the measured ones
    #[arg(long, value_name = "N", default_value_t = 10)]
    warmup: u32,
    /// End a measurement after this many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    time_limit: u64,
    /// Samples of one run
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65536))]
    batch: u32,
    /// Seed of made-up inputs
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print one JSON object
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    sizes: SizeArgs,
}

pub(super) fn run(args: &Args, talk: &Talk) -> Result<Verdict, Failure> {
    let sizes = args.sizes.sizes()?;
    let runtimes = runtimes(args.runtimes.as_deref())?;
    let session = args.engine.session("auto")?;
    let model = pipeline::load(&args.model, &sizes)?;
    let other = args.other.as_ref().map(|path| pipeline::load(path, &sizes)).transpose()?;
    if runtimes.contains(&RuntimeName::Ort) {
        args.engine.ready(talk)?;
    }
    let Some(first) = runtimes.first().copied() else {
        return Err(Failure::bad("V0002", None, "--runtimes: none of this build"));
    };
    let feeds = pipeline::bench_feeds(&model, args.batch as usize, args.seed, first, &session)?;
    let mut settings = Settings {
        runtimes,
        warmup: args.warmup as usize,
        iterations: args.iterations as usize,
        time_limit: Some(Duration::from_secs(args.time_limit)),
        session,
        ..Settings::default()
    };
    if args.engine.threads() > 0 {
        settings.threads = vec![args.engine.threads()];
    }
    let models: Vec<&pipeline::Model> = std::iter::once(&model).chain(&other).collect();
    let report = pipeline::bench(&models, &feeds, &settings)?;
    if args.json {
        print_json(&report)?;
    } else {
        print_text(&table(&report))?;
    }
    Ok(if report.measurements.is_empty() { Verdict::Negative } else { Verdict::Done })
}

fn table(report: &Report) -> String {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(vec!["runtime", "threads", "model", "p50 ms", "p90 ms", "p99 ms", "min ms", "samples/s", "n"]);
    for m in &report.measurements {
        for l in &m.models {
            let ms = |x: f64| format!("{x:.3}");
            table.add_row(vec![
                format!("{} {} {}", m.runtime, m.version, m.device),
                m.threads.to_string(),
                shown(&l.model),
                ms(l.latency_ms_p50),
                ms(l.latency_ms_p90),
                ms(l.latency_ms_p99),
                ms(l.latency_ms_min),
                format!("{:.1}", l.throughput_samples_per_s),
                m.iterations.to_string(),
            ]);
        }
    }
    let mut text = format!("{table}\n");
    for m in &report.measurements {
        if let Some(r) = m.ratio {
            let (runtime, threads) = (m.runtime, m.threads);
            text += &format!(
                "{runtime}, {threads} threads: second / first {:.3} (90 % of runs {:.3} to {:.3})\n",
                r.p50, r.p5, r.p95
            );
        }
    }
    for s in &report.skipped {
        text += &format!("skipped {}: {}\n", s.runtime, shown_to(&s.reason, 200));
    }
    text
}
