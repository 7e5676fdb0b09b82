//! `vitrim score`: one number per unit, as a safetensors file.

use super::failure::Failure;
use super::options::{EngineArgs, ForceArgs, ReadArgs, SizeArgs, kinds};
use super::repair::looked_at;
use super::talk::Talk;
use super::{Verdict, interrupt, print_json};
use crate::anatomy::Kind;
use crate::onnx;
use crate::pipeline::{self, BasisChoice, CalibrateAsk, Model, ScoreAsk};
use crate::score::{Criterion, MeasureError, Scores};
use serde_json::json;
use std::path::PathBuf;

/// Scores that need no images.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(super) enum By {
    /// L2 norm of a unit's weights
    Magnitude,
    /// Chance, from --seed
    Random,
}

#[derive(Clone, Copy, Debug, PartialEq, clap::ValueEnum)]
enum ScoreBy {
    /// L2 norm of a unit's weights
    Magnitude,
    /// Chance, from --seed
    Random,
    /// Squared gradient of a unit's gate, image by image, for labels drawn from the model itself
    Fisher,
    /// Size of that gradient
    Taylor,
    /// Size of a unit's activation times the norm of its weights behind it
    Activation,
    /// What a removal adds to the error of the layer behind, where what stays makes up for it
    Obs,
}

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The model
    model: PathBuf,
    /// Score units by this
    #[arg(long)]
    by: ScoreBy,
    /// With fisher: an order of removal in which all units of a group count together
    #[arg(long)]
    block: bool,
    /// An image folder or an .npz archive, for fisher, taylor, activation and obs; labels are not looked at
    #[arg(long)]
    data: Option<PathBuf>,
    /// Images at most, picked by --seed
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    images: u32,
    /// Images of one run
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=65536))]
    batch: u32,
    /// Kinds that get scores from images [default: all that the model has]
    #[arg(long, value_name = "KIND,..")]
    kinds: Option<String>,
    /// The file of scores
    #[arg(short, value_name = "FILE")]
    out: PathBuf,
    /// Seed of random scores, of the images, and of what is drawn for them
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
    #[command(flatten)]
    force: ForceArgs,
}

/// Where scores come from.
enum Source<'a> {
    Weights(By),
    Removals(&'a PathBuf),
    Images(Criterion, &'a PathBuf),
}

pub(super) fn run(args: &Args, talk: &Talk) -> Result<Verdict, Failure> {
    let source = source(args)?;
    let wanted: Vec<Kind> = match &args.kinds {
        Some(words) => kinds("--kinds", words)?.into_iter().collect(),
        None => Kind::ALL.to_vec(),
    };
    onnx::check_output(&args.out, std::slice::from_ref(&args.model), args.force.overwrite())?;
    let model = pipeline::load(&args.model, &args.sizes.sizes()?)?;
    model.loaded.warnings.iter().for_each(|w| talk.warn(w));
    onnx::check_output(&args.out, &model.loaded.files, args.force.overwrite())?;
    if model.anatomy.groups.is_empty() {
        return Err(Failure::of_file("V0401", &args.model, "no prunable group found; see vitrim inspect"));
    }
    if let (Some(_), false) = (&args.kinds, model.anatomy.groups.iter().any(|g| wanted.contains(&g.kind))) {
        return Err(Failure::of_file("V0401", &args.model, "has no group of the kinds asked for; see vitrim inspect"));
    }
    let scores = match source {
        Source::Weights(by) => scores(&model, by, args.seed),
        Source::Removals(data) => removals(args, &model, data, talk)?,
        Source::Images(by, data) => measured(args, &model, (by, data), &wanted, talk)?,
    };
    let scores = Scores { model_sha256: model.sha256()?, ..scores };
    let bytes = scores.to_bytes().map_err(Failure::internal)?;
    {
        let _guard = interrupt::writing();
        onnx::write_file(&args.out, &bytes, args.force.overwrite())?;
    }
    let units: usize = scores.groups.values().map(Vec::len).sum();
    if args.json {
        let groups: std::collections::BTreeMap<&String, usize> = scores.groups.iter().map(|(id, v)| (id, v.len())).collect();
        print_json(&json!({ "schema_version": crate::plan::SCHEMA_VERSION, "by": scores.by, "groups": groups }))?;
    } else {
        talk.say(format!("{}: {units} units of {} groups", args.out.display(), scores.groups.len()));
    }
    Ok(Verdict::Done)
}

fn source(args: &Args) -> Result<Source<'_>, Failure> {
    let by = match args.by {
        ScoreBy::Fisher if args.block => Criterion::FisherBlock,
        _ if args.block => return Err(Failure::bad("V0003", None, "--block: goes with --by fisher only")),
        ScoreBy::Magnitude => return Ok(Source::Weights(By::Magnitude)),
        ScoreBy::Random => return Ok(Source::Weights(By::Random)),
        ScoreBy::Fisher => Criterion::Fisher,
        ScoreBy::Taylor => Criterion::Taylor,
        ScoreBy::Activation => Criterion::Activation,
        ScoreBy::Obs => {
            let missing = "--by obs: needs images: --data FOLDER or FILE.npz, labels or not";
            return args.data.as_ref().map(Source::Removals).ok_or_else(|| Failure::bad("V0003", None, missing));
        }
    };
    let missing = || format!("--by {}: needs images: --data FOLDER or FILE.npz, labels or not", by.word());
    args.data.as_ref().map(|data| Source::Images(by, data)).ok_or_else(|| Failure::bad("V0003", None, missing()))
}

fn measured(
    args: &Args,
    model: &Model,
    (by, data_path): (Criterion, &PathBuf),
    kinds: &[Kind],
    talk: &Talk,
) -> Result<Scores, Failure> {
    let session = args.engine.session("auto")?;
    let data = pipeline::open_data(model, &args.read.choice(data_path))?;
    data.warnings().iter().for_each(|w| talk.warn(w));
    args.engine.ready(talk)?;
    talk.flush();
    let (images, batch) = (args.images as usize, args.batch as usize);
    let output = args.read.output.as_deref();
    let ask = ScoreAsk { by, kinds, data: &data, images, batch, seed: args.seed, output, session: &session };
    let mut shown = talk.counts("image");
    let found = interrupt::stoppable(|stop| pipeline::measured_scores(model, &ask, &mut |n, of| shown.show(n, of), stop));
    shown.done();
    data.skipped().iter().for_each(|s| talk.warn(format!("left out: {s}")));
    match found {
        Err(pipeline::Error::Measure { cause, .. }) if matches!(*cause, MeasureError::Interrupted) => {
            Err(Failure::interrupted("interrupted; nothing was written"))
        }
        found => Ok(found?),
    }
}

/// Scores by the errors of layers, in the basis of the model.
fn removals(args: &Args, model: &Model, data_path: &PathBuf, talk: &Talk) -> Result<Scores, Failure> {
    let session = args.engine.session("cpu")?;
    let data = pipeline::open_data(model, &args.read.choice(data_path))?;
    data.warnings().iter().for_each(|w| talk.warn(w));
    args.engine.ready(talk)?;
    talk.flush();
    let ask = CalibrateAsk {
        data: Some(&data),
        images: args.images as usize,
        basis: BasisChoice::Original,
        batch: args.batch as usize,
        seed: args.seed,
        output: args.read.output.as_deref(),
        session: &session,
        dir: None,
    };
    Ok(looked_at(talk, |tell, stop| pipeline::read_measured(model, &ask, tell, stop))?.scores)
}

/// The scores that need no file.
pub(super) fn scores(model: &Model, by: By, seed: u64) -> Scores {
    match by {
        By::Magnitude => pipeline::magnitude(model),
        By::Random => pipeline::random_scores(model, seed),
    }
}
