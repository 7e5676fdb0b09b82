//! `vitrim plan`: scores and a budget to the units that stay.

use super::Verdict;
use super::failure::Failure;
use super::options::{ForceArgs, SizeArgs, fractions, kind_fractions};
use crate::anatomy::Kind;
use crate::onnx;
use crate::pipeline::{self, Model};
use crate::plan::Ask;
use crate::score::{self, Scores};
use std::collections::BTreeSet;
use std::path::PathBuf;

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum By {
    /// L2 norm of a unit's weights
    Magnitude,
    /// Chance, from --seed
    Random,
}

#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("what").required(true).args(["keep", "budget"])))]
#[command(group(clap::ArgGroup::new("source").required(true).args(["by", "scores"])))]
pub(super) struct Args {
    /// The model
    model: PathBuf,
    /// Score units by this
    #[arg(long)]
    by: Option<By>,
    /// Score units from a file
    #[arg(long)]
    scores: Option<PathBuf>,
    /// Fraction of the units of each kind to keep, e.g. mlp=0.5,qk=0.5,vo=0.75
    #[arg(long, value_name = "KIND=F,..")]
    keep: Option<String>,
    /// Fraction of the cost to keep: macs=0.5, params=0.5, or both
    #[arg(long, value_name = "macs=F,params=F")]
    budget: Option<String>,
    /// Kinds that a budget may cut
    #[arg(long, value_name = "KIND,..", default_value = "mlp,qk,vo,channel")]
    kinds: String,
    /// Widths are multiples of this
    #[arg(long, default_value_t = 1)]
    round: usize,
    /// Leave alone the groups whose id contains this
    #[arg(long, value_name = "PATTERN")]
    protect: Vec<String>,
    /// Seed of random scores
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The plan
    #[arg(short, long)]
    output: PathBuf,
    #[command(flatten)]
    sizes: SizeArgs,
    #[command(flatten)]
    force: ForceArgs,
}

pub(super) fn run(args: &Args) -> Result<Verdict, Failure> {
    let (ask, asked) = ask(args)?;
    onnx::check_output(&args.output, &[args.model.clone()], args.force.overwrite())?;
    let model = pipeline::load(&args.model, &args.sizes.sizes()?)?;
    let scores = scores(args, &model)?;
    let protected: BTreeSet<String> = model
        .anatomy
        .groups
        .iter()
        .filter(|g| args.protect.iter().any(|p| g.id.contains(p.as_str())))
        .map(|g| g.id.clone())
        .collect();
    let mut plan = pipeline::make_plan(&model, &scores, &ask, &asked, args.round, protected)?;
    plan.seed = args.seed;
    let text = serde_json::to_string_pretty(&plan).map_err(|e| Failure::internal(e.to_string()))?;
    onnx::write_file(&args.output, format!("{text}\n").as_bytes(), args.force.overwrite())?;
    let p = &plan.budget.promised;
    let share = |b: &crate::plan::BeforeAfter| 100.0 * b.after as f64 / b.before.max(1) as f64;
    let macs = p.macs.as_ref().map_or("MACs unknown".to_string(), |m| format!("MACs {:.1} %", share(m)));
    eprintln!("asked {asked}; promised params {:.1} %, {macs}; {} groups cut", share(&p.params), plan.kept().len());
    Ok(Verdict::Done)
}

fn ask(args: &Args) -> Result<(Ask, String), Failure> {
    if let Some(keep) = &args.keep {
        return Ok((Ask::Fractions(kind_fractions("--keep", keep)?), keep.clone()));
    }
    let budget = args.budget.as_deref().unwrap_or_default();
    let parts = fractions("--budget", budget)?;
    if let Some(unknown) = parts.keys().find(|k| !matches!(k.as_str(), "macs" | "params")) {
        return Err(Failure::bad("V0002", None, format!("--budget: unknown '{unknown}'; budgets are macs, params")));
    }
    let kinds: BTreeSet<Kind> = args
        .kinds
        .split(',')
        .map(|w| Kind::from_word(w.trim()).ok_or_else(|| Failure::bad("V0002", None, format!("--kinds: unknown kind '{w}'"))))
        .collect::<Result<_, _>>()?;
    let ask = Ask::Budget { macs: parts.get("macs").copied(), params: parts.get("params").copied(), kinds };
    Ok((ask, budget.to_string()))
}

fn scores(args: &Args, model: &Model) -> Result<Scores, Failure> {
    match (&args.by, &args.scores) {
        (Some(By::Random), _) => Ok(score::random(&model.anatomy, args.seed)),
        (Some(By::Magnitude), _) => Ok(score::magnitude(model.graph(), &model.anatomy)),
        (None, Some(file)) => Scores::read(file).map_err(|e| Failure::bad("V0403", file.to_str(), e.to_string())),
        (None, None) => Err(Failure::internal("clap asks for one of both")),
    }
}
