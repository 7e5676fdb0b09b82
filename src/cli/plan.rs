//! `vitrim plan`: scores and a budget to the units that stay.

use super::failure::Failure;
use super::options::{EngineArgs, ForceArgs, SizeArgs, budget, kind_widths, kinds, unit_fractions};
use super::repair::{BasisArg, looked_at};
use super::score::By;
use super::slice::write_plan;
use super::talk::Talk;
use super::{Verdict, interrupt, print_json};
use crate::anatomy::Kind;
use crate::onnx;
use crate::pipeline::{self, CalibrateAsk, Measured, Model};
use crate::plan::{Ask, Layout, Limits, Measure, Plan, Promised};
use crate::score::Scores;
use std::path::{Path, PathBuf};

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

/// What limits widths.
#[derive(Debug, clap::Args)]
pub(super) struct WidthArgs {
    /// Widths are multiples of this; heads of widths of their own (--layout grouped) take 8 where it is not given
    #[arg(long, default_value_t = 1)]
    round: usize,
    /// Least width by kind: dims of a head, units of an MLP, tokens; e.g. qk=8,mlp=64
    #[arg(long, value_name = "KIND=N,..")]
    min_width: Option<String>,
    /// Leave alone the groups whose id contains this
    #[arg(long, value_name = "PATTERN")]
    protect: Vec<String>,
}

impl WidthArgs {
    /// As the plan takes them.
    pub(super) fn limits(&self, model: &Model, layout: Layout) -> Result<Limits, Failure> {
        let min_widths = self.min_width.as_deref().map_or(Ok(Default::default()), |text| kind_widths("--min-width", text))?;
        let ids = model.anatomy.groups.iter().map(|g| &g.id);
        let protected = ids.filter(|id| self.protect.iter().any(|p| id.contains(p.as_str()))).cloned().collect();
        Ok(Limits { round: self.round, min_widths, protected, layout, ..Limits::default() })
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
    /// Score units by the gates of a search, or by what a one-shot job measured
    #[arg(long, value_name = "DIR")]
    run: Option<PathBuf>,
    /// Fraction of the units of each kind, or of one group, to keep, e.g. mlp=0.5,qk=0.5,vo=0.75,qk.3=1
    #[arg(long, value_name = "KIND=F,..")]
    keep: Option<String>,
    /// Fraction of the cost to keep, met from below: macs=0.5, params=0.5, bytes=0.5 (of the constants), or several
    #[arg(long, value_name = "macs=F,..")]
    budget: Option<String>,
    /// Kinds that a budget may cut [default: mlp,qk,vo,channel, and token where a run searched tokens]
    #[arg(long, value_name = "KIND,..")]
    kinds: Option<String>,
    /// How the heads of a layer may differ
    #[arg(long, value_enum, default_value_t = HeadLayout::Equal)]
    layout: HeadLayout,
    #[command(flatten)]
    widths: WidthArgs,
    /// Seed of random scores
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The plan
    #[arg(short, value_name = "FILE")]
    out: PathBuf,
    /// Print the plan as one JSON object
    #[arg(long)]
    pub(super) json: bool,
    /// With --run of a one-shot job: in which basis dims of heads are cut
    #[arg(long, value_enum, default_value_t = BasisArg::Auto)]
    basis: BasisArg,
    #[command(flatten)]
    engine: EngineArgs,
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
    let mut limits = args.widths.limits(&model, args.layout.into())?;
    let measured = match &args.run {
        Some(dir) if pipeline::holds_statistics(dir) => Some(measured(args, &model, dir, talk)?),
        _ => None,
    };
    let is_rotated = measured.as_ref().is_some_and(|m| m.is_rotated);
    let scores = match measured {
        Some(found) => {
            limits.losses = found.losses.filter(|_| args.budget.is_some());
            found.scores
        }
        None => scores(args, &model)?,
    };
    if let (Ask::Budget { kinds, .. }, None, Some(_)) = (&mut ask, &args.kinds, &args.run) {
        // Scores of tokens can be compared with others only where both were searched.
        kinds.extend(scores.groups.keys().any(|id| id.starts_with(Kind::Token.as_str())).then_some(Kind::Token));
    }
    let mut plan = pipeline::make_plan(&model, &scores, &ask, &asked, &limits)?;
    plan.seed = args.seed;
    if is_rotated {
        plan.basis = "rotated".to_string();
    }
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

/// What was asked and what comes of it, and how it was decided.
pub(super) fn promise(plan: &Plan) -> String {
    let b = &plan.budget;
    let mut text = format!("asked {}; promised {}; {} groups cut", b.asked, shares(&b.promised), plan.kept().len());
    if let Some(a) = &b.allocation {
        let other = a.dynamic_loss.map_or(String::new(), |loss| format!(", dynamic program {loss:.5}"));
        text += &format!("; predicted loss ({} curves): greedy {:.5}{other}; taken: {}", a.curves, a.greedy_loss, a.way.as_str());
    }
    if let Some(note) = &b.note {
        text += &format!("; {note}");
    }
    text
}

/// What is left of each measure.
fn shares(cost: &Promised) -> String {
    let one = |m: Measure| cost.share(m).map(|share| format!("{} {:.1} %", m.name(), share * 100.0));
    Measure::ALL.into_iter().filter_map(one).collect::<Vec<_>>().join(", ")
}

/// The budget of a plan beside what was counted on the result: JSON, and one line.
pub(super) fn asked_promised_got(plan: &Plan, got: &Promised) -> (serde_json::Value, String) {
    // A plan that was written by hand may promise nothing.
    let promised = Some(&plan.budget.promised).filter(|p| p.params.before > 0);
    let asked = Some(plan.budget.asked.as_str()).filter(|a| !a.is_empty());
    let line = format!(
        "asked {}; promised {}; got {}",
        asked.unwrap_or("by hand"),
        promised.map_or("nothing".to_string(), shares),
        shares(got)
    );
    (serde_json::json!({ "asked": asked, "promised": promised, "got": got }), line)
}

/// What is asked for, and its text.
pub(super) fn ask(keep: Option<&str>, budget_text: Option<&str>, kind_words: &str) -> Result<(Ask, String), Failure> {
    if let Some(keep) = keep {
        return Ok((Ask::Fractions(unit_fractions("--keep", keep)?), keep.to_string()));
    }
    let text = budget_text.unwrap_or_default();
    Ok((Ask::Budget { targets: budget(text)?, kinds: kinds("--kinds", kind_words)? }, text.to_string()))
}

fn scores(args: &Args, model: &Model) -> Result<Scores, Failure> {
    match (&args.by, &args.scores, &args.run) {
        (Some(by), ..) => Ok(super::score::scores(model, *by, args.seed)),
        (None, Some(file), _) => Ok(pipeline::read_scores(model, file)?),
        (None, None, Some(dir)) => Ok(pipeline::read_run(model, dir)?.scores()),
        (None, None, None) => Err(Failure::internal("one source of scores is required")),
    }
}

/// What a one-shot job left in its run directory; no image is looked at again.
fn measured(args: &Args, model: &Model, dir: &Path, talk: &Talk) -> Result<Measured, Failure> {
    let session = args.engine.session("cpu")?;
    args.engine.ready(talk)?;
    let (images, batch) = (0, 16);
    let basis = args.basis.into();
    let ask = CalibrateAsk { data: None, images, basis, batch, seed: args.seed, output: None, session: &session, dir: Some(dir) };
    let found = looked_at(talk, |tell, stop| pipeline::read_measured(model, &ask, tell, stop))?;
    let basis = if found.is_rotated { "rotated" } else { "original" };
    let curves = match (&found.losses, &args.budget) {
        (Some(losses), Some(_)) => format!("{} curves", losses.how),
        (None, Some(_)) => "scores, since it holds no curves".to_string(),
        (_, None) => "scores".to_string(),
    };
    talk.say(format!("{}: by statistics of {} images, {curves}, basis {basis}", dir.display(), found.images));
    Ok(found)
}
