//! `vitrim plan`: scores and a budget to the units that stay.

use super::failure::Failure;
use super::options::{ForceArgs, SizeArgs, budget, kind_fractions, kinds};
use super::score::By;
use super::slice::write_plan;
use super::talk::Talk;
use super::{Verdict, interrupt, print_json};
use crate::anatomy::Kind;
use crate::onnx;
use crate::pipeline::{self, Model};
use crate::plan::{Ask, Layout, Plan};
use crate::score::Scores;
use std::collections::BTreeSet;
use std::path::PathBuf;

/// Kinds that a budget may cut.
pub(super) const KINDS: &str = "mlp,qk,vo,channel";

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum HeadLayout {
    /// Every head of a layer keeps the same number of dims
    Equal,
    /// Whole heads may go; those that stay keep the same number of dims
    Drop,
    /// Heads keep dims of their own, and those of one width are computed together
    Grouped,
}

impl From<HeadLayout> for Layout {
    fn from(word: HeadLayout) -> Self {
        match word {
            HeadLayout::Equal => Layout::Equal,
            HeadLayout::Drop => Layout::Drop,
            HeadLayout::Grouped => Layout::Grouped,
        }
    }
}

#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("what").required(true).args(["keep", "budget"])))]
#[command(group(clap::ArgGroup::new("source").required(true).args(["by", "scores", "run"])))]
pub(super) struct Args {
    /// The model
    model: PathBuf,
    /// Score units by this
    #[arg(long)]
    by: Option<By>,
    /// Score units from a file
    #[arg(long)]
    scores: Option<PathBuf>,
    /// Score units by the gates of a run
    #[arg(long, value_name = "DIR")]
    run: Option<PathBuf>,
    /// Fraction of the units of each kind to keep, e.g. mlp=0.5,qk=0.5,vo=0.75
    #[arg(long, value_name = "KIND=F,..")]
    keep: Option<String>,
    /// Fraction of the cost to keep: macs=0.5, params=0.5, or both
    #[arg(long, value_name = "macs=F,params=F")]
    budget: Option<String>,
    /// Kinds that a budget may cut [default: mlp,qk,vo,channel, and token where a run searched tokens]
    #[arg(long, value_name = "KIND,..")]
    kinds: Option<String>,
    /// How the heads of a layer may differ
    #[arg(long, value_enum, default_value_t = HeadLayout::Equal)]
    layout: HeadLayout,
    /// Widths are multiples of this; with --layout grouped 8 where it is not given
    #[arg(long, default_value_t = 1)]
    round: usize,
    /// Leave alone the groups whose id contains this
    #[arg(long, value_name = "PATTERN")]
    protect: Vec<String>,
    /// Seed of random scores
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The plan
    #[arg(short, value_name = "FILE")]
    out: PathBuf,
    /// Print the plan as one JSON object
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    sizes: SizeArgs,
    #[command(flatten)]
    force: ForceArgs,
}

pub(super) fn run(args: &Args, talk: &Talk) -> Result<Verdict, Failure> {
    let words = args.kinds.as_deref().unwrap_or(KINDS);
    let (mut ask, asked) = ask(args.keep.as_deref(), args.budget.as_deref(), words)?;
    onnx::check_output(&args.out, std::slice::from_ref(&args.model), args.force.overwrite())?;
    let model = pipeline::load(&args.model, &args.sizes.sizes()?)?;
    model.loaded.warnings.iter().for_each(|w| talk.warn(w));
    onnx::check_output(&args.out, &model.loaded.files, args.force.overwrite())?;
    let scores = scores(args, &model)?;
    if let (Ask::Budget { kinds, .. }, None, Some(_)) = (&mut ask, &args.kinds, &args.run) {
        // Scores of tokens can be compared with others only where both were searched.
        kinds.extend(scores.groups.keys().any(|id| id.starts_with(Kind::Token.as_str())).then_some(Kind::Token));
    }
    let mut plan =
        pipeline::make_plan(&model, &scores, &ask, &asked, args.round, protected(&model, &args.protect), args.layout.into())?;
    plan.seed = args.seed;
    {
        let _guard = interrupt::writing();
        write_plan(&args.out, &plan, args.force.overwrite())?;
    }
    if args.json {
        print_json(&plan)?;
    } else {
        talk.say(promise(&plan));
    }
    Ok(Verdict::Done)
}

/// One line: what was asked and what comes of it.
pub(super) fn promise(plan: &Plan) -> String {
    let p = &plan.budget.promised;
    let share = |b: &crate::plan::BeforeAfter| 100.0 * b.after as f64 / b.before.max(1) as f64;
    let macs = p.macs.as_ref().map_or("MACs unknown".to_string(), |m| format!("MACs {:.1} %", share(m)));
    format!("asked {}; promised params {:.1} %, {macs}; {} groups cut", plan.budget.asked, share(&p.params), plan.kept().len())
}

/// Ids of the groups that contain one of the patterns.
pub(super) fn protected(model: &Model, patterns: &[String]) -> BTreeSet<String> {
    let ids = model.anatomy.groups.iter().map(|g| &g.id);
    ids.filter(|id| patterns.iter().any(|p| id.contains(p.as_str()))).cloned().collect()
}

/// What is asked for, and its text.
pub(super) fn ask(keep: Option<&str>, budget_text: Option<&str>, kind_words: &str) -> Result<(Ask, String), Failure> {
    if let Some(keep) = keep {
        return Ok((Ask::Fractions(kind_fractions("--keep", keep)?), keep.to_string()));
    }
    let text = budget_text.unwrap_or_default();
    let (macs, params) = budget(text)?;
    Ok((Ask::Budget { macs, params, kinds: kinds("--kinds", kind_words)? }, text.to_string()))
}

fn scores(args: &Args, model: &Model) -> Result<Scores, Failure> {
    match (&args.by, &args.scores, &args.run) {
        (Some(by), ..) => Ok(super::score::scores(model, *by, args.seed)),
        (None, Some(file), _) => Ok(pipeline::read_scores(model, file)?),
        (None, None, Some(dir)) => Ok(pipeline::read_run(model, dir)?.scores()),
        (None, None, None) => Err(Failure::internal("one source of scores is required")),
    }
}
