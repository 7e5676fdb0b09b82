//! `vitrim search`: the training run that finds out what can go.

use super::failure::Failure;
use super::options::{EngineArgs, ReadArgs, SizeArgs};
use super::talk::Talk;
use super::train::{GateArgs, StepArgs, gate_kinds, search_config};
use super::{Verdict, interrupt, print_json};
use crate::pipeline::{self, SearchAsk};
use crate::search::Config;
use serde_json::json;
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The model
    model: PathBuf,
    /// An image folder or an .npz archive
    #[arg(long)]
    data: PathBuf,
    /// The run directory
    #[arg(long, value_name = "DIR")]
    run: PathBuf,
    /// Go on with the run that is there
    #[arg(long)]
    resume: bool,
    /// Kinds that get gates [default: mlp,qk,vo]
    #[arg(long, value_name = "KIND,..")]
    gates: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    gate: GateArgs,
    #[command(flatten)]
    steps: StepArgs,
    #[command(flatten)]
    read: ReadArgs,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    sizes: SizeArgs,
}

pub(super) fn run(args: &Args, talk: &Talk) -> Result<Verdict, Failure> {
    let mut base = if args.resume {
        Config::read(&args.run).map_err(|e| Failure::of_file("V0901", &args.run, e))?
    } else {
        Config::default()
    };
    if let Some(words) = &args.gates {
        base.gates = gate_kinds(words)?;
    }
    let config = search_config(base, &args.gate, &args.steps, &args.engine)?;
    let model = pipeline::load(&args.model, &args.sizes.sizes()?)?;
    model.loaded.warnings.iter().for_each(|w| talk.warn(w));
    pipeline::check_search(&model, &config.gates)?;
    let data = pipeline::open_data(&model, &args.read.choice(&args.data))?;
    data.warnings().iter().for_each(|w| talk.warn(w));
    args.engine.ready(talk)?;
    talk.flush();
    let (output, library) = (args.read.output.as_deref(), args.engine.library());
    let ask = SearchAsk { data: &data, config: &config, run_dir: &args.run, output, library: &library, resume: args.resume };
    let mut steps = talk.steps("search");
    let outcome = interrupt::stoppable(|stop| pipeline::search(&model, &ask, &mut |p| steps.show(&p), stop));
    steps.done();
    let outcome = outcome?;
    if outcome.is_interrupted {
        let dir = args.run.display();
        return Err(Failure::interrupted(format!(
            "interrupted after step {}; resume with --resume --run {dir}",
            outcome.position.step
        )));
    }
    if args.json {
        print_json(&json!({
            "schema_version": crate::plan::SCHEMA_VERSION,
            "run": args.run.display().to_string(),
            "steps": outcome.position.step,
            "loss_task": outcome.task,
            "near_zero": outcome.near_zero,
        }))?;
    } else {
        let shares: Vec<String> = outcome.near_zero.iter().map(|(k, s)| format!("{k} {:.0} %", s * 100.0)).collect();
        talk.say(format!("{}: {} steps; gates near zero: {}", args.run.display(), outcome.position.step, shares.join(", ")));
    }
    Ok(Verdict::Done)
}
