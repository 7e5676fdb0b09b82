//! `vitrim slim`: the main job, from a model and images to a smaller model that is proven.

use super::eval::share_words;
use super::failure::Failure;
use super::inspect::grouped;
use super::options::{EngineArgs, ForceArgs, ReadArgs, SizeArgs, fraction, runtimes};
use super::plan::{WidthArgs, ask, asked_promised_got, promise};
use super::repair::{CurvesArg, RepairArgs, Switch};
use super::slice::{plan_path, write_plan};
use super::talk::{Talk, clock};
use super::train::{GateArgs, StepArgs, finetune_config, search_config};
use super::verify::table as checks_table;
use super::{Verdict, interrupt, print_json, print_text};
use crate::anatomy::Kind;
use crate::eval::Accuracy;
use crate::onnx::{self, shown};
use crate::pipeline::slim::{Ended, Event, Forecast, Recipe, Repairing, Slim, SlimData, Slimmed, default_kinds};
use crate::pipeline::{self, CurveTime, Model};
use crate::plan::{Ask, Layout, Limits};
use crate::runtime::RuntimeName;
use crate::search::Config;
use crate::verify::Floors;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum RecipeArg {
    /// Look at images without labels, cut, and let what stays make up for what goes; nothing trains
    OneShot,
    /// Search, then cut
    Search,
    /// Search, cut, then train towards the original
    #[value(name = "search+finetune")]
    SearchFinetune,
}

#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("what").args(["keep", "budget"])))]
pub(super) struct Args {
    /// The model
    model: PathBuf,
    /// An image folder or an .npz archive
    #[arg(long)]
    data: Option<PathBuf>,
    /// Images to measure accuracy on [default: a tenth of DATA, which then does not train]
    #[arg(long, value_name = "DATA")]
    eval_data: Option<PathBuf>,
    /// The smaller model
    #[arg(short, value_name = "FILE")]
    out: PathBuf,
    /// Fraction of the cost to keep: macs=0.5, params=0.5, bytes=0.5 (of the constants), or several [default: macs=0.5]
    #[arg(long, value_name = "macs=F,..")]
    budget: Option<String>,
    /// Fraction of the units of each kind, or of one group, to keep, e.g. mlp=0.5,qk=0.5,vo=0.5,token=0.7,qk.3=1
    #[arg(long, value_name = "KIND=F,..")]
    keep: Option<String>,
    /// Kinds that a budget may cut [default: mlp,qk,vo,channel, and token where it is searched]
    #[arg(long, value_name = "KIND,..", conflicts_with = "keep")]
    kinds: Option<String>,
    /// How much is done [default: one-shot]
    #[arg(long)]
    recipe: Option<RecipeArg>,
    /// Holds the search, or what was measured; a second job with another budget reads it [default: OUT.run]
    #[arg(long, value_name = "DIR")]
    run: Option<PathBuf>,
    /// Remove the run directory at the end
    #[arg(long)]
    no_keep_run: bool,
    /// Go on with the run that is there
    #[arg(long)]
    resume: bool,
    /// Say what would be cut and how long it would take; write nothing
    #[arg(long)]
    dry_run: bool,
    /// Keep what did not verify as OUT.rejected.onnx
    #[arg(long)]
    keep_rejected: bool,
    #[command(flatten)]
    widths: WidthArgs,
    /// Passes over the data in fine-tuning
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    finetune_epochs: u32,
    /// Runtimes to verify and measure in [default: all of this build]
    #[arg(long, value_name = "ort,tract")]
    runtimes: Option<String>,
    /// Least top-1 accuracy of OUT, e.g. 0.8 or 80%
    #[arg(long, value_name = "A")]
    min_accuracy: Option<String>,
    /// Greatest loss of top-1 accuracy, in percentage points
    #[arg(long, value_name = "POINTS")]
    max_drop: Option<f64>,
    /// Whether what no output depends on is left out, such as all but the class token in the last block
    #[arg(long, value_enum, default_value_t = Switch::On)]
    exact: Switch,
    /// Print one JSON object
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    repair: RepairArgs,
    /// Where the losses of cuts come from: runs of the model, or, much faster, errors of layers times how much the output feels of them
    #[arg(long, value_enum, default_value_t = CurvesArg::Measured)]
    curves: CurvesArg,
    /// About how long the losses of cuts are measured, which decides on how many images. Unit: seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 180)]
    curve_time: u32,
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
    #[command(flatten)]
    force: ForceArgs,
}

pub(super) fn run(args: &Args, talk: &Talk) -> Result<Verdict, Failure> {
    let start = Instant::now();
    let recipe = match args.recipe {
        Some(RecipeArg::OneShot) | None => Recipe::OneShot,
        Some(RecipeArg::Search) => Recipe::Search,
        Some(RecipeArg::SearchFinetune) => Recipe::SearchFinetune,
    };
    // Texts first: what is wrong there needs no model.
    ask_of(args, &Default::default())?;
    let run_dir = args.run.clone().unwrap_or_else(|| args.out.with_extension("run"));
    check_outputs(args, std::slice::from_ref(&args.model))?;
    let model = pipeline::load(&args.model, &args.sizes.sizes()?)?;
    model.loaded.warnings.iter().for_each(|w| talk.warn(w));
    check_outputs(args, &model.loaded.files)?;
    let kinds = default_kinds(&model, recipe);
    let (ask, asked) = ask_of(args, &kinds)?;
    let mut base =
        if args.resume { Config::read(&run_dir).map_err(|e| Failure::of_file("V0901", &run_dir, e))? } else { Config::default() };
    if !args.resume {
        base.gates = match &ask {
            Ask::Fractions(f) => f.kinds_of(&model.anatomy).into_iter().collect(),
            Ask::Budget { kinds, .. } => kinds.iter().copied().collect(),
        };
    }
    let config = search_config(base, &args.gate, &args.steps, &args.engine)?;
    let mut finetune = finetune_config(&args.steps, &args.engine)?;
    finetune.epochs = args.finetune_epochs;
    let mut job = Slim {
        model: &model,
        ask: &ask,
        asked: &asked,
        limits: Limits { is_exact: args.exact == Switch::On, ..args.widths.limits(&model, Layout::Equal)? },
        recipe,
        data: None,
        output: args.read.output.clone(),
        repair: Repairing {
            images: args.repair.images,
            basis: args.repair.basis.into(),
            how: args.repair.how(),
            curves: CurveTime { how: args.curves.into(), seconds: f64::from(args.curve_time), images: args.repair.images },
        },
        config,
        finetune,
        session: args.engine.session("cpu")?,
        runtimes: runtimes(args.runtimes.as_deref())?,
        floors: floors(args)?,
    };
    job.data = open_data(args, &model, talk)?;
    job.check()?;
    if recipe != Recipe::OneShot && !args.resume && !args.dry_run && run_dir.join("config.toml").exists() {
        let reason = "already holds a run; go on with it by --resume, or name another folder by --run";
        return Err(Failure::of_file("V0901", &run_dir, reason));
    }
    if recipe != Recipe::OneShot || job.data.is_some() || job.runtimes.contains(&RuntimeName::Ort) {
        args.engine.ready(talk)?;
    }
    talk.flush();
    if args.dry_run {
        return dry_run(args, &job, talk);
    }
    let ended = work(&job, args, &run_dir, talk)?;
    let Some(slimmed) = ended else {
        let message = if recipe == Recipe::OneShot {
            "interrupted; nothing was written".to_string()
        } else {
            let dir = run_dir.display();
            format!("interrupted; resume with the same command and --resume (the run is in {dir})")
        };
        return Err(Failure::interrupted(message));
    };
    finish(args, &job, &slimmed, &run_dir, start.elapsed(), talk)
}

fn ask_of(args: &Args, kinds: &std::collections::BTreeSet<Kind>) -> Result<(Ask, String), Failure> {
    let words = match &args.kinds {
        Some(words) => words.clone(),
        None if kinds.is_empty() => super::plan::KINDS.to_string(),
        None => kinds.iter().map(|k| k.as_str()).collect::<Vec<_>>().join(","),
    };
    let budget = if args.keep.is_none() { Some(args.budget.as_deref().unwrap_or("macs=0.5")) } else { None };
    ask(args.keep.as_deref(), budget, &words)
}

fn floors(args: &Args) -> Result<Floors, Failure> {
    let min_accuracy = args.min_accuracy.as_deref().map(|a| fraction("--min-accuracy", a)).transpose()?;
    let floors = Floors { min_accuracy, max_drop_points: args.max_drop };
    if floors.is_some() && args.data.is_none() && args.eval_data.is_none() {
        return Err(Failure::bad("V0003", None, "--min-accuracy and --max-drop need --data or --eval-data"));
    }
    Ok(floors)
}

fn check_outputs(args: &Args, inputs: &[PathBuf]) -> Result<(), Failure> {
    let overwrite = args.force.overwrite();
    onnx::check_output(&args.out, inputs, overwrite)?;
    Ok(onnx::check_output(&plan_path(&args.out), inputs, overwrite)?)
}

fn open_data(args: &Args, model: &Model, talk: &Talk) -> Result<Option<SlimData>, Failure> {
    let open = |path: &Path| -> Result<_, Failure> {
        let data = pipeline::open_data(model, &args.read.choice(path))?;
        data.warnings().iter().for_each(|w| talk.warn(w));
        Ok(data)
    };
    let judge = args.eval_data.as_deref().map(open).transpose()?;
    match (&args.data, judge) {
        (Some(path), judge) => {
            let data = open(path)?;
            if let Some(judge) = &judge {
                let shared = judge.count_shared(&data).map_err(|e| Failure::of_file("V0801", path, e))?;
                if shared > 0 {
                    talk.warn(format!("{shared} images are in both --data and --eval-data"));
                }
            }
            Ok(Some(SlimData::new(path, data, judge)))
        }
        (None, Some(judge)) => {
            let path = args.eval_data.clone().unwrap_or_default();
            Ok(Some(SlimData { path, train: judge.select(&[]), judge }))
        }
        (None, None) => Ok(None),
    }
}

fn dry_run(args: &Args, job: &Slim<'_>, talk: &Talk) -> Result<Verdict, Failure> {
    let forecast = interrupt::stoppable(|stop| job.forecast(stop))?;
    if interrupt::STOP.load(std::sync::atomic::Ordering::Relaxed) {
        return Err(Failure::interrupted("interrupted; nothing was written"));
    }
    if args.json {
        print_json(&forecast_json(&forecast))?;
        return Ok(Verdict::Done);
    }
    talk.say(promise(&forecast.plan));
    print_text(&forecast_text(&forecast, job.model))?;
    Ok(Verdict::Done)
}

fn training_time(f: &Forecast) -> Option<Duration> {
    f.step.map(|step| step.saturating_mul(u32::try_from(f.steps).unwrap_or(u32::MAX)))
}

fn forecast_json(f: &Forecast) -> Value {
    let promised = &f.plan.budget.promised;
    let groups: std::collections::BTreeMap<&String, Value> =
        f.plan.groups.iter().map(|(id, k)| (id, json!({ "kept": k.kept.len(), "of": k.of }))).collect();
    json!({
        "schema_version": crate::plan::SCHEMA_VERSION,
        "dry_run": true,
        "params": promised.params,
        "macs": promised.macs,
        "groups": groups,
        "steps": f.steps,
        "step_ms": f.step.map(|s| s.as_secs_f64() * 1e3),
        "training_s": training_time(f).map(|t| t.as_secs_f64()),
        "memory_bytes": f.memory,
    })
}

fn forecast_text(f: &Forecast, model: &Model) -> String {
    let mut text = String::from("would keep (widths by the size of weights; a search decides anew):\n");
    for group in &model.anatomy.groups {
        if let Some(k) = f.plan.groups.get(&group.id) {
            text += &format!("  {:<10} {:>6} of {}\n", group.id, k.kept.len(), k.of);
        }
    }
    let promised = &f.plan.budget.promised;
    text += &format!("params {} -> {}\n", grouped(promised.params.before), grouped(promised.params.after));
    if let Some(m) = &promised.macs {
        text += &format!("MACs {} -> {}\n", grouped(m.before), grouped(m.after));
    }
    if let (Some(step), Some(time)) = (f.step, training_time(f)) {
        text += &format!("training: {} steps of {:.0} ms (measured) = {}\n", f.steps, step.as_secs_f64() * 1e3, clock(time));
    }
    if let Some(bytes) = f.memory {
        text += &format!("memory: {} MB at its highest in the steps measured\n", bytes / 1_000_000);
    }
    text
}

/// Does the job; `None` where a signal ended it.
fn work(job: &Slim<'_>, args: &Args, run_dir: &Path, talk: &Talk) -> Result<Option<Box<Slimmed>>, Failure> {
    let (mut steps, mut counts) = (None, None);
    let mut tell = |event: Event| match event {
        Event::Stage(stage) => {
            if let Some(display) = counts.take() {
                super::talk::Counts::done(display);
            }
            if let Some(display) = steps.take() {
                super::talk::Steps::done(display);
            }
            talk.say(stage);
        }
        Event::Step(what, p) => steps.get_or_insert_with(|| talk.steps(what)).show(&p),
        Event::Count(what, done, of) => counts.get_or_insert_with(|| talk.counts(what)).show(done, of),
        Event::Note(note) => talk.say(format!("note: {note}")),
    };
    let ended = interrupt::stoppable(|stop| job.run(run_dir, args.resume, &mut tell, stop));
    if let Some(display) = steps.take() {
        display.done();
    }
    if let Some(display) = counts.take() {
        display.done();
    }
    match ended {
        Ok(Ended::Done(slimmed)) => Ok(Some(slimmed)),
        Ok(Ended::Interrupted) => Ok(None),
        Err(_) if interrupt::STOP.load(std::sync::atomic::Ordering::Relaxed) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn finish(args: &Args, job: &Slim<'_>, s: &Slimmed, run_dir: &Path, took: Duration, talk: &Talk) -> Result<Verdict, Failure> {
    let overwrite = args.force.overwrite();
    if !s.verdict.pass {
        let mut kept = String::new();
        if args.keep_rejected {
            let _guard = interrupt::writing();
            let place = args.out.with_extension("rejected.onnx");
            onnx::save(&s.graph, &place, onnx::Overwrite::Force)?;
            write_plan(&plan_path(&place), &s.plan, onnx::Overwrite::Force)?;
            kept = format!("; it is kept as {}", place.display());
        }
        if args.json {
            print_json(&report(args, job, s, run_dir, took, None))?;
        } else {
            print_text(&checks_table(&s.verdict))?;
        }
        talk.flush();
        let why = Slim::why_not(&s.verdict);
        super::tell(format_args!(
            "error: {}: not written, since it did not verify: {}{kept}",
            shown(&args.out.display().to_string()),
            onnx::shown_to(&why, 160)
        ));
        return Ok(Verdict::Negative);
    }
    {
        let _guard = interrupt::writing();
        onnx::save(&s.graph, &args.out, overwrite)?;
        pipeline::check_written(&args.out)?;
        write_plan(&plan_path(&args.out), &s.plan, overwrite)?;
    }
    let is_run = job.recipe != Recipe::OneShot || job.data.is_some();
    if is_run && args.no_keep_run {
        if let Err(e) = std::fs::remove_dir_all(run_dir) {
            talk.warn(format!("{}: {e}", run_dir.display()));
        }
    } else if is_run {
        let what = if job.recipe == Recipe::OneShot { "what was measured" } else { "the search" };
        talk.say(format!("{what} is kept in {} (--no-keep-run removes it)", run_dir.display()));
    }
    let bytes = (pipeline::file_bytes(job.model), pipeline::bytes_on_disk(&args.out));
    if args.json {
        print_json(&report(args, job, s, run_dir, took, Some(bytes)))?;
    } else {
        print_text(&table(s, bytes))?;
    }
    let missed = missed(job, s);
    if let Some(missed) = &missed {
        super::tell(format_args!("error: {}: {missed}", shown(&args.out.display().to_string())));
    }
    Ok(if missed.is_some() { Verdict::Negative } else { Verdict::Done })
}

/// A budget that the measured cost misses.
fn missed(job: &Slim<'_>, s: &Slimmed) -> Option<String> {
    let Ask::Budget { targets, .. } = job.ask else { return None };
    targets.iter().find_map(|(measure, asked)| {
        let share = s.cost.share(*measure)?;
        let (name, share_percent) = (measure.name(), share * 100.0);
        (share > asked + 1e-9)
            .then(|| format!("{name} are {share_percent:.2} % of the original, asked for {:.2} %", asked * 100.0))
    })
}

fn report(args: &Args, job: &Slim<'_>, s: &Slimmed, run_dir: &Path, took: Duration, bytes: Option<(u64, u64)>) -> Value {
    let accuracy = s.verdict.accuracy.as_ref().map(|a| {
        let share = |share: f64| {
            let (low, high) = counted(share, a.n).interval();
            json!({ "top1": share, "ci95": [low, high] })
        };
        json!({
            "n": a.n,
            "before": a.top1.as_ref().map(|t| share(t.before)),
            "after": a.top1.as_ref().map(|t| share(t.after)),
            "kl": a.kl,
            "top1_agreement": a.top1_agreement,
            "top1_agreement_ci95": a.top1_agreement_ci95,
        })
    });
    let out = bytes.map(|_| args.out.display().to_string());
    json!({
        "schema_version": crate::plan::SCHEMA_VERSION,
        "pass": s.verdict.pass && missed(job, s).is_none(),
        "out": out,
        "plan": out.as_ref().map(|_| plan_path(&args.out).display().to_string()),
        "run": ((job.recipe != Recipe::OneShot || job.data.is_some()) && !args.no_keep_run).then(|| run_dir.display().to_string()),
        "asked": job.asked,
        "budget": asked_promised_got(&s.plan, &s.cost).0,
        "params": s.cost.params,
        "macs": s.cost.macs,
        "bytes": bytes.map(|(before, after)| json!({ "before": before, "after": after })),
        "accuracy": accuracy,
        "latency": s.latency,
        "basis": s.plan.basis,
        "curves": s.plan.budget.allocation.as_ref().map(|a| &a.curves),
        "repairs": s.repairs,
        "exact": super::slice::exact_json(&s.plan, &s.refused),
        "search": s.search.as_ref().map(|o| json!({ "steps": o.position.step, "loss_task": o.task, "near_zero": o.near_zero })),
        "finetune": s.finetuned.as_ref().map(|f| json!({
            "steps": f.steps,
            "best_epoch": f.best_epoch,
            "before": super::eval::evaluation_json(&f.before),
            "after": super::eval::evaluation_json(&f.after),
        })),
        "verify": s.verdict,
        "seconds": took.as_secs_f64(),
    })
}

/// A share of `n` samples as the count that it is.
fn counted(share: f64, n: usize) -> Accuracy {
    Accuracy { correct: (share * n as f64).round() as u64, n: n as u64 }
}

/// Before and after, one row per number.
fn table(s: &Slimmed, bytes: (u64, u64)) -> String {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(vec!["", "before", "after", ""]);
    let share = |a: u64, b: u64| format!("{:.1} % left", 100.0 * b as f64 / a.max(1) as f64);
    let mut count = |what: &str, a: u64, b: u64| {
        table.add_row(vec![what.to_string(), grouped(a), grouped(b), share(a, b)]);
    };
    count("params", s.cost.params.before, s.cost.params.after);
    if let Some(m) = &s.cost.macs {
        count("MACs", m.before, m.after);
    }
    count("bytes", bytes.0, bytes.1);
    if let Some(a) = &s.verdict.accuracy {
        let n = a.n;
        if let Some(t) = &a.top1 {
            let ends = |x: f64| {
                let (low, high) = counted(x, n).interval();
                format!("{:.2} % ({:.2} to {:.2})", x * 100.0, low * 100.0, high * 100.0)
            };
            table.add_row(vec!["top-1 (95 % interval)".into(), ends(t.before), ends(t.after), format!("n = {n}")]);
        }
        let kl = a.kl.map_or("not finite".to_string(), |kl| format!("{kl:.4} nats"));
        table.add_row(vec!["KL from the original".into(), String::new(), kl, format!("n = {n}")]);
    }
    for m in s.latency.iter().flat_map(|l| &l.measurements) {
        if let [a, b] = m.models.as_slice() {
            let name = format!("latency p50, {} {}, {} threads", m.runtime, m.device, m.threads);
            let ms = |x: f64| format!("{x:.3} ms");
            let ratio = m.ratio.map_or(String::new(), |r| format!("x {:.2}, n = {}", r.p50, m.iterations));
            table.add_row(vec![name, ms(a.latency_ms_p50), ms(b.latency_ms_p50), ratio]);
        }
    }
    let mut text = format!("{table}\n");
    if let Some(a) = &s.plan.budget.allocation {
        text += &format!("losses of cuts: {}\n", a.curves);
    }
    if let Some(a) = &s.verdict.accuracy {
        text += &format!("agrees with the original on {}\n", share_words(&counted(a.top1_agreement, a.n)));
    }
    for skipped in s.verdict.skipped.iter().map(|x| (x.runtime, &x.reason)) {
        text += &format!("skipped {}: {}\n", skipped.0, onnx::shown_to(skipped.1, 200));
    }
    text += &super::slice::exact_text(&s.plan, &s.refused);
    let mut engines: Vec<String> = s.verdict.checks.iter().map(|c| format!("{} {}", c.runtime, c.version)).collect();
    engines.dedup();
    text + &format!("verified in {}\n{}\n", engines.join(", "), asked_promised_got(&s.plan, &s.cost).1)
}
