//! `vitrim eval`: accuracy on data, and distance from another model.

use super::failure::Failure;
use super::options::{EngineArgs, ReadArgs, SizeArgs};
use super::talk::Talk;
use super::{Verdict, interrupt, print_json, print_text};
use crate::eval::{Accuracy, EvalError, Evaluation};
use crate::pipeline::{self, EvalAsk};
use serde_json::{Value, json};
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The model
    model: PathBuf,
    /// An image folder or an .npz archive
    #[arg(long)]
    data: PathBuf,
    /// Compare with this model
    #[arg(long, value_name = "MODEL")]
    against: Option<PathBuf>,
    /// Samples of one run
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=65536))]
    batch: u32,
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
    let sizes = args.sizes.sizes()?;
    let session = args.engine.session("auto")?;
    let model = pipeline::load(&args.model, &sizes)?;
    let reference = args.against.as_ref().map(|path| pipeline::load(path, &sizes)).transpose()?;
    pipeline::class_output(&model, args.read.output.as_deref())?;
    let data = pipeline::open_data(&model, &args.read.choice(&args.data))?;
    data.warnings().iter().for_each(|w| talk.warn(w));
    if data.labels().is_none() && reference.is_none() {
        let reason = "has no labels (class subfolders, or the key labels): name a model to compare with by --against";
        return Err(Failure::of_file("V0803", &args.data, reason));
    }
    args.engine.ready(talk)?;
    let ask = EvalAsk { data: &data, batch: args.batch as usize, output: args.read.output.as_deref(), session: &session };
    let found = interrupt::stoppable(|stop| pipeline::evaluate(&model, reference.as_ref(), &ask, stop));
    let found = match found {
        Err(pipeline::Error::Eval { cause, .. }) if matches!(*cause, EvalError::Interrupted) => {
            return Err(Failure::interrupted("interrupted; nothing was measured"));
        }
        found => found?,
    };
    data.skipped().iter().for_each(|s| talk.warn(format!("left out: {s}")));
    if args.json {
        let mut object = evaluation_json(&found);
        object["schema_version"] = json!(crate::plan::SCHEMA_VERSION);
        print_json(&object)?;
    } else {
        print_text(&lines(&found))?;
    }
    Ok(Verdict::Done)
}

/// `{ n, top1, kl, top1_agreement }`.
pub(super) fn evaluation_json(found: &Evaluation) -> Value {
    json!({
        "n": found.n,
        "top1": found.accuracy.map(|a| share_json(&a)),
        "kl": found.kl,
        "top1_agreement": found.agreement.map(|a| share_json(&a)),
    })
}

fn share_json(a: &Accuracy) -> Value {
    let (low, high) = a.interval();
    json!({ "share": a.share(), "ci95": [low, high], "correct": a.correct, "n": a.n })
}

fn lines(found: &Evaluation) -> String {
    let mut text = String::new();
    if let Some(a) = found.accuracy {
        text += &format!("top-1 {}\n", share_words(&a));
    }
    if let Some(a) = found.agreement {
        text += &format!("top-1 agreement {}\n", share_words(&a));
    }
    if let Some(kl) = found.kl {
        text += &format!("KL from the reference {kl:.4} nats (n = {})\n", found.n);
    }
    text
}

/// `98.25 % (95 % interval 97.58 to 98.74, n = 2000)`.
pub(super) fn share_words(a: &Accuracy) -> String {
    let (low, high) = a.interval();
    format!("{:.2} % (95 % interval {:.2} to {:.2}, n = {})", a.share() * 100.0, low * 100.0, high * 100.0, a.n)
}
