//! `vitrim finetune`: trains a cut model towards the original.

use super::eval::{evaluation_json, share_words};
use super::failure::Failure;
use super::options::{EngineArgs, ForceArgs, ReadArgs, SizeArgs};
use super::slice::{plan_path, write_plan};
use super::talk::Talk;
use super::train::{StepArgs, finetune_config};
use super::{Verdict, interrupt, print_json, print_text};
use crate::eval::Evaluation;
use crate::onnx;
use crate::pipeline;
use crate::plan::Plan;
use serde_json::json;
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The model to train
    model: PathBuf,
    /// The model that it should agree with
    #[arg(long, value_name = "MODEL")]
    teacher: PathBuf,
    /// An image folder or an .npz archive
    #[arg(long)]
    data: PathBuf,
    /// The trained model
    #[arg(short, value_name = "FILE")]
    out: PathBuf,
    /// Passes over the data
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    epochs: u32,
    /// Share of the labels in the targets, the rest is the teacher's
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    label_share: f64,
    /// Print one JSON object
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    steps: StepArgs,
    #[command(flatten)]
    read: ReadArgs,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    sizes: SizeArgs,
    #[command(flatten)]
    force: ForceArgs,
}

pub(super) fn run(args: &Args, talk: &Talk) -> Result<Verdict, Failure> {
    let mut config = finetune_config(&args.steps, &args.engine)?;
    (config.epochs, config.label_share) = (args.epochs, args.label_share);
    if !(0.0..=1.0).contains(&config.label_share) {
        return Err(Failure::bad("V0003", None, format!("--label-share: is {}, expected 0 to 1", config.label_share)));
    }
    let overwrite = args.force.overwrite();
    onnx::check_output(&args.out, &[args.model.clone(), args.teacher.clone()], overwrite)?;
    let sizes = args.sizes.sizes()?;
    let (student, teacher) = (pipeline::load(&args.model, &sizes)?, pipeline::load(&args.teacher, &sizes)?);
    for files in [&student.loaded.files, &teacher.loaded.files] {
        onnx::check_output(&args.out, files, overwrite)?;
    }
    let plan_file = plan_path(&args.model);
    let plan = if plan_file.exists() { Some(Plan::read(&plan_file).map_err(pipeline::Error::from)?) } else { None };
    pipeline::check_trains(&student)?;
    let data = pipeline::open_data(&student, &args.read.choice(&args.data))?;
    data.warnings().iter().for_each(|w| talk.warn(w));
    args.engine.ready(talk)?;
    talk.flush();
    let (images, library) = ((&data, args.read.output.as_deref()), args.engine.library());
    let mut steps = talk.steps("finetune");
    let tuned = interrupt::stoppable(|stop| {
        pipeline::finetune(&student, &teacher, images, &config, &library, &mut |p| steps.show(&p), stop)
    });
    steps.done();
    let tuned = tuned?;
    if tuned.is_interrupted && tuned.best_epoch.is_none() {
        return Err(Failure::interrupted("interrupted before the first epoch ended; nothing was written"));
    }
    {
        let _guard = interrupt::writing();
        onnx::save(&tuned.graph, &args.out, overwrite)?;
        pipeline::check_written(&args.out)?;
        if let Some(mut plan) = plan {
            if pipeline::record_trained(&mut plan, student.graph(), &tuned.graph) {
                write_plan(&plan_path(&args.out), &plan, onnx::Overwrite::Force)?;
            } else {
                talk.warn("no plan is written beside the output: constants that several nodes read were taken apart");
            }
        }
    }
    if args.json {
        print_json(&json!({
            "schema_version": crate::plan::SCHEMA_VERSION,
            "steps": tuned.steps,
            "best_epoch": tuned.best_epoch,
            "before": evaluation_json(&tuned.before),
            "after": evaluation_json(&tuned.after),
        }))?;
    } else {
        let mut text = format!("before: {}\nafter:  {}\n", words(&tuned.before), words(&tuned.after));
        if tuned.best_epoch.is_none() {
            text += "training did not help: the weights are those given\n";
        }
        print_text(&text)?;
    }
    if tuned.is_interrupted {
        return Err(Failure::interrupted(format!("interrupted; {} holds the best epoch so far", args.out.display())));
    }
    Ok(Verdict::Done)
}

fn words(found: &Evaluation) -> String {
    let kl = found.kl.map_or("unknown".to_string(), |kl| format!("{kl:.4} nats"));
    let top1 = found.accuracy.map_or(String::new(), |a| format!(", top-1 {}", share_words(&a)));
    format!("KL from the teacher {kl}{top1}")
}
