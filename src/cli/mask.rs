//! `vitrim mask`: the twin of a plan.

use super::failure::Failure;
use super::options::{ForceArgs, SizeArgs};
use super::talk::Talk;
use super::{Verdict, interrupt, print_json};
use crate::onnx;
use crate::pipeline;
use crate::plan::Plan;
use serde_json::json;
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The model
    model: PathBuf,
    /// The plan
    #[arg(long)]
    plan: PathBuf,
    /// Take edited tensors from this sliced model
    #[arg(long)]
    from: Option<PathBuf>,
    /// The twin
    #[arg(short, value_name = "FILE")]
    out: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    sizes: SizeArgs,
    #[command(flatten)]
    force: ForceArgs,
}

pub(super) fn run(args: &Args, talk: &Talk) -> Result<Verdict, Failure> {
    let mut read = vec![args.model.clone(), args.plan.clone()];
    read.extend(args.from.clone());
    onnx::check_output(&args.out, &read, args.force.overwrite())?;
    let model = pipeline::load(&args.model, &args.sizes.sizes()?)?;
    model.loaded.warnings.iter().for_each(|w| talk.warn(w));
    onnx::check_output(&args.out, &model.loaded.files, args.force.overwrite())?;
    let plan = Plan::read(&args.plan).map_err(pipeline::Error::from)?;
    if !plan.edited.is_empty() && args.from.is_none() {
        talk.warn(format!("{}: the plan names edited tensors; without --from the twin has the model's own", args.plan.display()));
    }
    let from = args.from.as_ref().map(|p| pipeline::read(p)).transpose()?;
    let twin = pipeline::make_twin(&model, &args.plan, &plan, from.as_ref().map(|l| &l.graph))?;
    {
        let _guard = interrupt::writing();
        onnx::save(&twin, &args.out, args.force.overwrite())?;
    }
    if args.json {
        print_json(&json!({ "schema_version": crate::plan::SCHEMA_VERSION, "bytes": pipeline::bytes_on_disk(&args.out) }))?;
    }
    Ok(Verdict::Done)
}
