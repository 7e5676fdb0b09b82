//! `vitrim slice`: model and plan to a smaller model.

use super::failure::Failure;
use super::inspect::grouped;
use super::options::{ForceArgs, SizeArgs};
use super::{Verdict, print_json, print_text};
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
    #[arg(short, long)]
    output: PathBuf,
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

pub(super) fn run(args: &Args) -> Result<Verdict, Failure> {
    onnx::check_output(&args.output, &[args.model.clone(), args.plan.clone()], args.force.overwrite())?;
    let model = pipeline::load(&args.model, &args.sizes.sizes()?)?;
    onnx::check_output(&args.output, &model.loaded.files, args.force.overwrite())?;
    let plan = Plan::read(&args.plan).map_err(pipeline::Error::from)?;
    let sliced = pipeline::apply_plan(&model, &args.plan, &plan)?;
    let promised = pipeline::before_after(&model, &sliced)?;
    onnx::save(&sliced.graph, &args.output, args.force.overwrite())?;
    let beside = plan_path(&args.output);
    if beside != args.plan {
        let text = serde_json::to_string_pretty(&plan).map_err(|e| Failure::internal(e.to_string()))?;
        onnx::write_file(&beside, format!("{text}\n").as_bytes(), onnx::Overwrite::Force)?;
    }
    let before_bytes = pipeline::file_bytes(&model);
    let after_bytes = pipeline::bytes_on_disk(&args.output);
    if args.json {
        print_json(&json!({
            "schema_version": crate::plan::SCHEMA_VERSION,
            "params": promised.params,
            "macs": promised.macs.map_or(json!({ "before": null, "after": null }), |m| json!(m)),
            "bytes": { "before": before_bytes, "after": after_bytes },
            "cuts": sliced.cuts,
            "cloned": sliced.cloned,
            "nodes": sliced.nodes,
        }))?;
    } else {
        let row = |name: &str, a: u64, b: u64| {
            format!("{name:<10} {:>15} {:>15} {:>7.1} %\n", grouped(a), grouped(b), 100.0 * b as f64 / a.max(1) as f64)
        };
        let mut text = format!("{:<10} {:>15} {:>15} {:>9}\n", "", "before", "after", "left");
        text += &row("params", promised.params.before, promised.params.after);
        if let Some(m) = promised.macs {
            text += &row("MACs", m.before, m.after);
        }
        text += &row("bytes", before_bytes, after_bytes);
        print_text(&text)?;
    }
    Ok(Verdict::Done)
}
