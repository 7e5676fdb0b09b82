//! `vitrim score`: one number per unit, as a safetensors file.

use super::failure::Failure;
use super::options::{ForceArgs, SizeArgs};
use super::talk::Talk;
use super::{Verdict, interrupt, print_json};
use crate::onnx;
use crate::pipeline::{self, Model};
use crate::score::Scores;
use serde_json::json;
use std::path::PathBuf;

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(super) enum By {
    /// L2 norm of a unit's weights
    Magnitude,
    /// Chance, from --seed
    Random,
}

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The model
    model: PathBuf,
    /// Score units by this
    #[arg(long)]
    by: By,
    /// The file of scores
    #[arg(short, value_name = "FILE")]
    out: PathBuf,
    /// Seed of random scores
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print one JSON object
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    sizes: SizeArgs,
    #[command(flatten)]
    force: ForceArgs,
}

pub(super) fn run(args: &Args, talk: &Talk) -> Result<Verdict, Failure> {
    onnx::check_output(&args.out, std::slice::from_ref(&args.model), args.force.overwrite())?;
    let model = pipeline::load(&args.model, &args.sizes.sizes()?)?;
    model.loaded.warnings.iter().for_each(|w| talk.warn(w));
    onnx::check_output(&args.out, &model.loaded.files, args.force.overwrite())?;
    if model.anatomy.groups.is_empty() {
        return Err(Failure::of_file("V0401", &args.model, "no prunable group found; see vitrim inspect"));
    }
    let scores = scores(&model, args.by, args.seed);
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

/// The scores that need no file.
pub(super) fn scores(model: &Model, by: By, seed: u64) -> Scores {
    match by {
        By::Magnitude => pipeline::magnitude(model),
        By::Random => pipeline::random_scores(model, seed),
    }
}
