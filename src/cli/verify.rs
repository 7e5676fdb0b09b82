//! `vitrim verify`: OUT against its twin, in two runtimes, and against MODEL on data.

use super::failure::Failure;
use super::options::{EngineArgs, ReadArgs, SizeArgs, runtimes};
use super::slice::plan_path;
use super::talk::Talk;
use super::{Verdict, print_json, print_text};
use crate::onnx::{self, shown};
use crate::pipeline::{self, ProofData};
use crate::plan::Plan;
use crate::runtime::RuntimeName;
use crate::verify::{self, Edits, Floors, Settings};
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The sliced model
    out: PathBuf,
    /// The model that it was made from
    #[arg(long, value_name = "MODEL")]
    against: PathBuf,
    /// The plan [default: OUT.plan.json]
    #[arg(long, value_name = "FILE")]
    plan: Option<PathBuf>,
    /// Images, for accuracy and as inputs of the comparison
    #[arg(long)]
    data: Option<PathBuf>,
    /// Runtimes to check in [default: all of this build]
    #[arg(long, value_name = "ort,tract")]
    runtimes: Option<String>,
    /// Least top-1 accuracy of OUT, e.g. 0.8 or 80%
    #[arg(long, value_name = "A")]
    min_accuracy: Option<String>,
    /// Greatest loss of top-1 accuracy, in percentage points
    #[arg(long, value_name = "POINTS")]
    max_drop: Option<f64>,
    /// Samples of one run
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=65536))]
    batch: u32,
    /// Seed of made-up inputs
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print one JSON object
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    read: ReadArgs,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    sizes: SizeArgs,
}

pub(super) fn run(args: &Args, talk: &Talk) -> Result<Verdict, Failure> {
    let floors = Floors {
        min_accuracy: args.min_accuracy.as_deref().map(|a| super::options::fraction("--min-accuracy", a)).transpose()?,
        max_drop_points: args.max_drop,
    };
    let settings = Settings {
        runtimes: runtimes(args.runtimes.as_deref())?,
        session: args.engine.session("cpu")?,
        sizes: args.sizes.sizes()?,
        seed: args.seed,
        output: args.read.output.clone(),
        floors,
    };
    let model = pipeline::load(&args.against, &settings.sizes)?;
    let out = pipeline::read(&args.out)?;
    let plan_file = args.plan.clone().unwrap_or_else(|| plan_path(&args.out));
    let plan = Plan::read(&plan_file).map_err(pipeline::Error::from)?;
    if args.read.output.is_some() {
        pipeline::class_output(&model, args.read.output.as_deref())?;
    }
    let data = args.data.as_ref().map(|path| pipeline::open_data(&model, &args.read.choice(path))).transpose()?;
    if settings.runtimes.contains(&RuntimeName::Ort) {
        args.engine.ready(talk)?;
    }
    let batch = args.batch as usize;
    let data = data.as_ref().map(|data| ProofData { data, batch, loaders: 2 });
    let verdict = pipeline::prove(&model, &out.graph, &plan_file, &plan, data, &settings)?;
    if args.json {
        print_json(&verdict)?;
    } else {
        print_text(&table(&verdict))?;
    }
    Ok(if verdict.pass { Verdict::Done } else { Verdict::Negative })
}

/// One row per check, then what was skipped, then the result.
pub(super) fn table(verdict: &verify::Verdict) -> String {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(vec!["runtime", "input", "batch", "output", "max |a-b|", "tolerance", "noise", "top-1 equal", ""]);
    let number = |x: Option<f64>| x.map_or("-".to_string(), |x| format!("{x:.1e}"));
    for c in &verdict.checks {
        let input = match c.input {
            Some(verify::InputSource::Random) => "random",
            Some(verify::InputSource::Data) => "data",
            None => "-",
        };
        let equal = c.argmax_agree.map_or("-", |a| if a { "yes" } else { "no" });
        let result = if c.pass { "ok".to_string() } else { format!("FAILED {}", shown(c.reason.as_deref().unwrap_or(""))) };
        let runtime = format!("{} {}", c.runtime, c.version);
        let (max, tolerance, noise) = (number(c.max_abs), number(Some(c.tolerance)), number(c.noise));
        table.add_row(vec![
            runtime,
            input.into(),
            c.batch.to_string(),
            shown(&c.output),
            max,
            tolerance,
            noise,
            equal.into(),
            result,
        ]);
    }
    let mut text = if verdict.checks.is_empty() { String::new() } else { format!("{table}\n") };
    for s in &verdict.skipped {
        text += &format!("skipped {}: {}\n", s.runtime, onnx::shown_to(&s.reason, 200));
    }
    match &verdict.edits {
        Edits::None => {}
        Edits::Unproven => text += "edits: unproven (weights were changed on purpose; give --data to measure what that does)\n",
        Edits::Measured { n, kl, top1_agreement } => {
            let kl = kl.map_or("not finite".to_string(), |kl| format!("{kl:.4}"));
            text +=
                &format!("edits: KL from the original {kl} nats, top-1 agreement {:.2} % (n = {n})\n", top1_agreement * 100.0);
        }
    }
    if let Some(a) = &verdict.accuracy {
        if let Some(t) = &a.top1 {
            let [low, high] = t.after_ci95.map(|x| x * 100.0);
            let (before, after) = (t.before * 100.0, t.after * 100.0);
            text += &format!("top-1 {before:.2} % -> {after:.2} % (95 % interval {low:.2} to {high:.2}, n = {})\n", a.n);
        }
        if let Some(reason) = &a.reason {
            text += &format!("FAILED: {}\n", onnx::shown_to(reason, 200));
        }
    }
    if verdict.checks.is_empty() {
        text += "no runtime could check\n";
    }
    text + if verdict.pass { "verified\n" } else { "NOT verified\n" }
}
