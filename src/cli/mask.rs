//! `vitrim mask`: the twin of a plan.

use super::Verdict;
use super::failure::Failure;
use super::options::{ForceArgs, SizeArgs};
use crate::onnx;
use crate::pipeline;
use crate::plan::Plan;
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
    #[arg(short, long)]
    output: PathBuf,
    #[command(flatten)]
    sizes: SizeArgs,
    #[command(flatten)]
    force: ForceArgs,
}

pub(super) fn run(args: &Args) -> Result<Verdict, Failure> {
    onnx::check_output(&args.output, &[args.model.clone(), args.plan.clone()], args.force.overwrite())?;
    let model = pipeline::load(&args.model, &args.sizes.sizes()?)?;
    let plan = Plan::read(&args.plan).map_err(pipeline::Error::from)?;
    let from = args.from.as_ref().map(|p| onnx::read(p)).transpose()?;
    let twin = pipeline::make_twin(&model, &args.plan, &plan, from.as_ref().map(|l| &l.graph))?;
    onnx::save(&twin, &args.output, args.force.overwrite())?;
    Ok(Verdict::Done)
}
