//! `vitrim slice`: model and plan to a smaller model.

use super::failure::Failure;
use super::inspect::grouped;
use super::options::{ForceArgs, SizeArgs};
use super::plan::asked_promised_got;
use super::talk::Talk;
use super::{Verdict, interrupt, print_json, print_text};
use crate::onnx;
use crate::pipeline;
use crate::plan::Plan;
use serde_json::json;
use std::path::{Path, PathBuf};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The model
    model: PathBuf,
    /// The plan
    #[arg(long)]
    plan: PathBuf,
    /// The smaller model
    #[arg(short, value_name = "FILE")]
    out: PathBuf,
    /// A run directory: its trained weights, with its gates multiplied in
    #[arg(long, value_name = "RUN")]
    weights: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    sizes: SizeArgs,
    #[command(flatten)]
    force: ForceArgs,
}

/// Where the plan of a sliced model stands: `OUT.plan.json` for `OUT.onnx`.
pub(super) fn plan_path(model: &Path) -> PathBuf {
    model.with_extension("plan.json")
}

/// Writes a plan.
pub(super) fn write_plan(path: &Path, plan: &Plan, overwrite: onnx::Overwrite) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(plan).map_err(|e| Failure::internal(e.to_string()))?;
    Ok(onnx::write_file(path, format!("{text}\n").as_bytes(), overwrite)?)
}

pub(super) fn run(args: &Args, talk: &Talk) -> Result<Verdict, Failure> {
    let (plan_out, overwrite) = (plan_path(&args.out), args.force.overwrite());
    onnx::check_output(&args.out, &[args.model.clone(), args.plan.clone()], overwrite)?;
    let is_own_plan = plan_out == args.plan;
    if !is_own_plan {
        onnx::check_output(&plan_out, &[args.model.clone(), args.plan.clone()], onnx::Overwrite::Force)?;
    }
    let model = pipeline::load(&args.model, &args.sizes.sizes()?)?;
    model.loaded.warnings.iter().for_each(|w| talk.warn(w));
    onnx::check_output(&args.out, &model.loaded.files, overwrite)?;
    let plan = Plan::read(&args.plan).map_err(pipeline::Error::from)?;
    let (cut, origin) = pipeline::cut_early(&model, &args.plan, &plan, args.weights.as_deref())?;
    cut.warnings.iter().for_each(|w| talk.warn(w));
    let sliced = &cut.sliced;
    let got = pipeline::before_after(&model, sliced)?;
    {
        let _guard = interrupt::writing();
        onnx::save_if(&sliced.graph, &args.out, overwrite, || origin.check(&args.plan, &plan))?;
        pipeline::check_written(&args.out)?;
        if !is_own_plan || cut.plan != plan {
            write_plan(&plan_out, &cut.plan, onnx::Overwrite::Force)?;
        }
    }
    let (budget, line) = asked_promised_got(&cut.plan, &got);
    let before_bytes = pipeline::file_bytes(&model);
    let after_bytes = pipeline::bytes_on_disk(&args.out);
    if args.json {
        print_json(&json!({
            "schema_version": crate::plan::SCHEMA_VERSION,
            "params": got.params,
            "macs": got.macs.map_or(json!({ "before": null, "after": null }), |m| json!(m)),
            "bytes": { "before": before_bytes, "after": after_bytes },
            "budget": budget,
            "cuts": sliced.cuts,
            "cloned": sliced.cloned,
            "nodes": sliced.nodes,
        }))?;
    } else {
        let row = |name: &str, a: u64, b: u64| {
            format!("{name:<10} {:>15} {:>15} {:>7.1} %\n", grouped(a), grouped(b), 100.0 * b as f64 / a.max(1) as f64)
        };
        let mut text = format!("{:<10} {:>15} {:>15} {:>9}\n", "", "before", "after", "left");
        text += &row("params", got.params.before, got.params.after);
        if let Some(m) = got.macs {
            text += &row("MACs", m.before, m.after);
        }
        text += &row("bytes", before_bytes, after_bytes);
        text += &format!("{line}\n");
        print_text(&text)?;
    }
    Ok(Verdict::Done)
}
