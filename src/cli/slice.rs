//! `vitrim slice`: model and plan to a smaller model.

use super::failure::Failure;
use super::inspect::grouped;
use super::options::{ForceArgs, SizeArgs};
use super::plan::asked_promised_got;
use super::repair::{BasisArg, ImageArgs, Switch, looked_at, repairs_text};
use super::talk::Talk;
use super::{Verdict, interrupt, print_json, print_text};
use crate::basis::Refused;
use crate::exact;
use crate::onnx::{self, shown};
use crate::pipeline::{self, BasisChoice, Compensation, Model, Origin, RepairAsk, Repaired};
use crate::plan::Plan;
use serde_json::json;
use std::path::{Path, PathBuf};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The model
    model: PathBuf,
    /// The plan
    #[arg(long)]
    plan: PathBuf,
    /// The smaller model
    #[arg(short, value_name = "FILE")]
    out: PathBuf,
    /// A run directory: its trained weights, with its gates multiplied in
    #[arg(long, value_name = "RUN")]
    weights: Option<PathBuf>,
    /// Also leave out what no output depends on, such as all but the class token in the last block
    #[arg(long)]
    exact: bool,
    /// In which basis dims of heads are cut [default: that of the plan]
    #[arg(long, value_enum)]
    basis: Option<BasisArg>,
    /// Let the weights behind a cut make up for it, by what images say; needs --data, or --run with statistics
    #[arg(long)]
    compensate: bool,
    /// Whether layers are repaired one after the other, each behind what was already cut; needs --data, off is faster
    #[arg(long, value_enum, default_value_t = Switch::On)]
    sequential: Switch,
    #[command(flatten)]
    images: ImageArgs,
    /// Print one JSON object
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    sizes: SizeArgs,
    #[command(flatten)]
    force: ForceArgs,
}

/// Where the plan of a sliced model stands: `OUT.plan.json` for `OUT.onnx`.
pub(super) fn plan_path(model: &Path) -> PathBuf {
    model.with_extension("plan.json")
}

/// Writes a plan.
pub(super) fn write_plan(path: &Path, plan: &Plan, overwrite: onnx::Overwrite) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(plan).map_err(|e| Failure::internal(e.to_string()))?;
    Ok(onnx::write_file(path, format!("{text}\n").as_bytes(), overwrite)?)
}

/// Savings that change no output, and those that were not made.
pub(super) fn exact_json(plan: &Plan, refused: &[exact::Refused]) -> serde_json::Value {
    json!({ "saved": plan.exact, "refused": refused })
}

/// The same, one line each.
pub(super) fn exact_text(plan: &Plan, refused: &[exact::Refused]) -> String {
    let macs = |n: Option<u64>| n.map_or("MACs".to_string(), |n| format!("{} MACs", grouped(n)));
    let saved =
        plan.exact.iter().map(|s| format!("saved {} at {}: {}\n", macs(s.macs_saved), shown(&s.node), s.what.as_sentence()));
    let refused = refused.iter().map(|r| format!("not saved: {}: {}\n", r.what.as_sentence(), onnx::shown_to(&r.reason, 200)));
    saved.chain(refused).collect()
}

pub(super) fn run(args: &Args, talk: &Talk) -> Result<Verdict, Failure> {
    let (plan_out, overwrite) = (plan_path(&args.out), args.force.overwrite());
    onnx::check_output(&args.out, &[args.model.clone(), args.plan.clone()], overwrite)?;
    let is_own_plan = plan_out == args.plan;
    if !is_own_plan {
        onnx::check_output(&plan_out, &[args.model.clone(), args.plan.clone()], onnx::Overwrite::Force)?;
    }
    let model = pipeline::load(&args.model, &args.sizes.sizes()?)?;
    model.loaded.warnings.iter().for_each(|w| talk.warn(w));
    onnx::check_output(&args.out, &model.loaded.files, overwrite)?;
    let plan = Plan::read(&args.plan).map_err(pipeline::Error::from)?;
    let (repaired, origin) = cut(args, &model, &plan, talk)?;
    let cut = &repaired.cut;
    cut.warnings.iter().for_each(|w| talk.warn(w));
    let sliced = &cut.sliced;
    let got = pipeline::before_after(&model, sliced)?;
    {
        let _guard = interrupt::writing();
        let belongs = || origin.map_or(Ok(()), |origin| origin.check(&args.plan, &plan));
        onnx::save_if(&sliced.graph, &args.out, overwrite, belongs)?;
        pipeline::check_written(&args.out)?;
        if !is_own_plan || cut.plan != plan {
            write_plan(&plan_out, &cut.plan, onnx::Overwrite::Force)?;
        }
    }
    let (budget, line) = asked_promised_got(&cut.plan, &got);
    let before_bytes = pipeline::file_bytes(&model);
    let after_bytes = pipeline::bytes_on_disk(&args.out);
    if args.json {
        let reasons =
            |list: &[Refused]| -> Vec<_> { list.iter().map(|r| json!({ "group": r.group, "reason": r.reason })).collect() };
        print_json(&json!({
            "schema_version": crate::plan::SCHEMA_VERSION,
            "params": got.params,
            "macs": got.macs.map_or(json!({ "before": null, "after": null }), |m| json!(m)),
            "bytes": { "before": before_bytes, "after": after_bytes },
            "budget": budget,
            "cuts": sliced.cuts,
            "cloned": sliced.cloned,
            "nodes": sliced.nodes,
            "exact": exact_json(&cut.plan, &cut.refused),
            "basis": cut.plan.basis,
            "images": repaired.images,
            "rotated": repaired.rotated,
            "not_rotated": reasons(&repaired.refused),
            "not_repaired": reasons(&repaired.unrepaired),
            "repairs": repaired.repairs,
        }))?;
    } else {
        let row = |name: &str, a: u64, b: u64| {
            format!("{name:<10} {:>15} {:>15} {:>7.1} %\n", grouped(a), grouped(b), 100.0 * b as f64 / a.max(1) as f64)
        };
        let mut text = format!("{:<10} {:>15} {:>15} {:>9}\n", "", "before", "after", "left");
        text += &row("params", got.params.before, got.params.after);
        if let Some(m) = got.macs {
            text += &row("MACs", m.before, m.after);
        }
        text += &row("bytes", before_bytes, after_bytes);
        text += &exact_text(&cut.plan, &cut.refused);
        text += &repairs_text(&repaired.repairs);
        if !repaired.rotated.is_empty() {
            text += &format!("rotated: {}\n", repaired.rotated.iter().cloned().collect::<Vec<_>>().join(", "));
        }
        for (what, list) in [("rotated", &repaired.refused), ("repaired", &repaired.unrepaired)] {
            for r in list {
                text += &format!("not {what}: {}: {}\n", r.group, onnx::shown_to(&r.reason, 200));
            }
        }
        text += &format!("{line}\n");
        print_text(&text)?;
    }
    Ok(Verdict::Done)
}

/// Cuts; looks at images where the basis or a repair needs them. Where the model's hash is still being found, that comes too.
fn cut(args: &Args, model: &Model, plan: &Plan, talk: &Talk) -> Result<(Repaired, Option<Origin>), Failure> {
    let basis = match args.basis {
        Some(word) => word.into(),
        None if plan.basis == "rotated" => BasisChoice::Auto,
        None => BasisChoice::Original,
    };
    if basis == BasisChoice::Original && plan.basis != "rotated" && !args.compensate {
        if args.images.is_given() {
            let message = "--data and --run: say what for: --compensate, --basis auto or --basis rotated";
            return Err(Failure::bad("V0003", None, message));
        }
        let (cut, origin) = pipeline::cut_early(model, &args.plan, plan, args.weights.as_deref(), args.exact)?;
        return Ok((cut.into(), Some(origin)));
    }
    if !args.images.is_given() {
        let why = if args.compensate { "--compensate" } else { "the rotated basis" };
        let message = format!(
            "{why}: needs images (--data FOLDER or FILE.npz, labels or not) or a run directory with their statistics (--run)"
        );
        return Err(Failure::bad("V0003", None, message));
    }
    let opened = args.images.open(model, talk)?;
    let ask = RepairAsk {
        plan,
        plan_path: &args.plan,
        weights: args.weights.as_deref(),
        how: if args.compensate { args.sequential.into() } else { Compensation::Off },
        is_exact: args.exact,
        images: args.images.ask(&opened, basis),
    };
    Ok((looked_at(talk, |tell, stop| pipeline::cut_repaired(model, &ask, tell, stop))?, None))
}
