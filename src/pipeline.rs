//! The whole tool: one short function per command. Only this file calls stages; each stage knows no other stage's functions.

mod allocate;
mod apart;
mod augment;
mod calibrate;
mod data;
mod edit;
mod error;
mod exact;
mod measure;
mod predict;
mod proof;
mod repair;
mod sequential;
pub mod slim;
mod train;

pub use allocate::{CurveTime, Repaired, cut_calibrated, cut_trained};
pub use augment::{AugmentAsk, augment};
pub use calibrate::{BasisChoice, CalibrateAsk, Calibrating, Calibration, Compensation, calibrate};
pub use data::{DataChoice, check_not_chance, check_trains, class_output, open_data};
use edit::Base;
pub use edit::{Cut, Origin, cut, cut_early, read_run, record_trained};
pub use error::Error;
pub use measure::{ScoreAsk, measured_scores};
pub use predict::Predicted;
pub use proof::{ProofData, prove};
pub use repair::{Measured, RepairAsk, bases, cut_repaired, holds_statistics, read_measured};
pub use train::{EvalAsk, SearchAsk, bench, bench_feeds, check_search, evaluate, finetune, search};

use crate::anatomy::{self, Anatomy, Kind};
use crate::axes;
use crate::cost::{self, Cost, Sizes};
use crate::graph::Graph;
use crate::infer::{self, Facts, InferError};
use crate::onnx::{self, Loaded};
use crate::ops::control::{has_branches, known_branches};
use crate::plan::{self, Ask, BeforeAfter, Budget, KeptUnits, Limits, Measure, Plan, Promised, Targets};
use crate::runtime::Device;
use crate::score::{self, Scores};
use crate::search;
use crate::slice::{self, Sliced};
use std::path::{Path, PathBuf};

/// A model that was read and understood.
pub struct Model {
    /// Where it came from.
    pub path: PathBuf,
    /// Its graph, warnings and files.
    pub loaded: Loaded,
    /// Shapes and small contents.
    pub facts: Facts,
    /// What can be cut.
    pub anatomy: Anatomy,
    /// Sizes given for symbols.
    pub sizes: Sizes,
}

/// Reads a model and finds what can be cut.
pub fn load(path: &Path, sizes: &Sizes) -> Result<Model, Error> {
    let loaded = read(path)?;
    let (facts, anatomy) = analyse(&loaded.graph).map_err(|cause| Error::Infer { file: path.to_path_buf(), cause })?;
    Ok(Model { path: path.to_path_buf(), loaded, facts, anatomy, sizes: sizes.clone() })
}

/// Reads a model and opens every If whose condition is known without running it.
pub fn read(path: &Path) -> Result<Loaded, Error> {
    let mut loaded = onnx::read(path)?;
    open_known_branches(&mut loaded.graph, path)?;
    Ok(loaded)
}

/// Opens every If whose condition is known without running it.
fn open_known_branches(graph: &mut Graph, file: &Path) -> Result<(), Error> {
    while has_branches(graph) {
        let facts = infer::facts(graph).map_err(|cause| Error::Infer { file: file.to_path_buf(), cause })?;
        let chosen = known_branches(graph, &facts);
        if onnx::open_branches(graph, file, &chosen)? == 0 {
            break;
        }
    }
    Ok(())
}

/// Facts and anatomy of a graph.
pub fn analyse(graph: &Graph) -> Result<(Facts, Anatomy), InferError> {
    let facts = infer::facts(graph)?;
    let classes = axes::classes(graph, &facts);
    let anatomy = anatomy::name(graph, &facts, classes);
    Ok((facts, anatomy))
}

impl Model {
    /// Its graph.
    pub fn graph(&self) -> &Graph {
        &self.loaded.graph
    }

    /// SHA-256 of the file, in hexadecimal.
    pub fn sha256(&self) -> Result<String, Error> {
        Ok(onnx::sha256_of_file(&self.path)?)
    }

    /// What it costs.
    pub fn cost(&self) -> Cost {
        cost::count(self.graph(), &self.facts, &self.sizes)
    }
}

/// Scores by the size of weights.
pub fn magnitude(model: &Model) -> Scores {
    score::magnitude(model.graph(), &model.anatomy)
}

/// Scores by chance.
pub fn random_scores(model: &Model, seed: u64) -> Scores {
    score::random(&model.anatomy, seed)
}

/// A device by its word: `auto`, `cpu`, `cuda:N`.
pub fn device(word: &str) -> Result<Device, Error> {
    search::parse_device(word).map_err(|cause| Error::Search { file: PathBuf::from("--device"), cause: Box::new(cause) })
}

/// Scores from a file, which must be of this model where it says which it is of.
pub fn read_scores(model: &Model, file: &Path) -> Result<Scores, Error> {
    let scores = Scores::read(file)?;
    let found = model.sha256()?;
    if !scores.model_sha256.is_empty() && scores.model_sha256 != found {
        let start = |s: &str| s.chars().take(8).collect::<String>();
        let reason = format!("belongs to model sha256 {}.., not {}..", start(&scores.model_sha256), start(&found));
        return Err(Error::unsuitable(file, reason));
    }
    Ok(scores)
}

/// Scores + what is asked -> Plan, with the promised cost counted on the sliced graph. Pinned tokens are added to the limits.
pub fn make_plan(model: &Model, scores: &Scores, ask: &Ask, asked: &str, limits: &Limits) -> Result<Plan, Error> {
    let mut limits = limits.clone();
    limits.pinned.extend(model.anatomy.tokens.sites.iter().filter_map(|site| {
        let group = model.anatomy.groups.iter().find(|g| g.kind == Kind::Token && g.layer == site.layer)?;
        Some((group.id.clone(), site.pinned.iter().copied().collect()))
    }));
    let saved = if limits.is_exact { exact::saved(model) } else { None };
    let (graph, facts, anatomy) =
        saved.as_ref().map_or((model.graph(), &model.facts, &model.anatomy), |s| (&s.graph, &s.facts, &s.anatomy));
    let costs = cost::Model::new(graph, facts, anatomy, &model.sizes);
    let hollow = model.graph().hollow();
    let mut ask = ask.clone();
    let wanted = targets(&ask);
    if let (Some(saved), Ask::Budget { targets, .. }) = (&saved, &mut ask) {
        let (whole, left) = (model.cost(), cost::count(&saved.graph, &saved.facts, &model.sizes));
        targets.iter_mut().for_each(|(measure, t)| *t = (*t * measure.ratio(&whole, &left)).min(1.0));
    }
    let mut tries = 0;
    loop {
        let chosen = plan::choose(anatomy, scores, &ask, &limits, &costs)
            .map_err(|cause| Error::Choose { file: model.path.clone(), cause })?;
        let made = exact::slice(model, (&hollow, &model.facts, &model.anatomy), &chosen.kept, limits.is_exact)?;
        let promised = before_after(model, &made.sliced)?;
        // Copies of shared constants are counted here only; what they take must be saved elsewhere.
        let excess = |(measure, target): (&Measure, &f64)| {
            let over = promised.share(*measure)? - target;
            (over > 0.0).then_some((*measure, over))
        };
        let over: Targets = wanted.iter().filter_map(excess).collect();
        tries += 1;
        if let (Ask::Budget { targets, .. }, false, true) = (&mut ask, over.is_empty(), tries < TRIES_MAX) {
            over.iter().for_each(|(measure, over)| *targets.entry(*measure).or_insert(1.0) -= over);
            continue;
        }
        let note = budget_note(&wanted, &promised);
        let mut plan = Plan { layout: limits.layout, exact: made.savings, ..Plan::empty(&model.sha256()?) };
        for (id, kept) in chosen.kept {
            let of = model.anatomy.groups.iter().find(|g| g.id == id).map_or(0, anatomy::Group::units);
            plan.groups.insert(id, KeptUnits { kept, of });
        }
        plan.budget = Budget { asked: asked.to_string(), promised, allocation: chosen.allocation, note };
        return Ok(plan);
    }
}

/// How often a budget is tightened where copies of constants exceed it.
const TRIES_MAX: usize = 6;

fn targets(ask: &Ask) -> Targets {
    match ask {
        Ask::Budget { targets, .. } => targets.clone(),
        Ask::Fractions(_) => Targets::new(),
    }
}

/// What to say of a budget that is not met within 1 %: widths move in steps, and of several targets one decides.
fn budget_note(targets: &Targets, promised: &Promised) -> Option<String> {
    let part = |(measure, target): (&Measure, &f64)| Some((*measure, *target, promised.share(*measure)?));
    let parts: Vec<(Measure, f64, f64)> = targets.iter().filter_map(part).collect();
    let (measure, target, share) = *parts.iter().max_by(|a, b| (a.2 / a.1).total_cmp(&(b.2 / b.1)))?;
    let (name, percent) = (measure.name(), share * 100.0);
    if share > target {
        return Some(format!("{name} are {percent:.2} % of the original, asked for {:.2} %", target * 100.0));
    }
    (share < 0.99 * target)
        .then(|| format!("{name} are {percent:.2} % of the original: widths allow nothing closer to {:.2} %", target * 100.0))
}

/// Params, MACs and bytes of a model and of what was sliced from it.
pub fn before_after(model: &Model, sliced: &Sliced) -> Result<Promised, Error> {
    let before = model.cost();
    let facts = infer::facts(&sliced.graph).map_err(|cause| Error::Infer { file: model.path.clone(), cause })?;
    let after = cost::count(&sliced.graph, &facts, &model.sizes);
    Ok(Promised {
        params: BeforeAfter { before: before.params, after: after.params },
        macs: before.macs.zip(after.macs).map(|(before, after)| BeforeAfter { before, after }),
        bytes: Some(BeforeAfter { before: before.bytes, after: after.bytes }),
    })
}

/// Model + plan -> the twin: nothing cut, removed units zeroed. `from` is the sliced model that holds edited tensors.
pub fn make_twin(model: &Model, plan_path: &Path, plan: &Plan, from: Option<&Graph>) -> Result<Graph, Error> {
    plan.check(plan_path, &model.sha256()?, &model.anatomy)?;
    let base = Base::of_plan(model, plan_path, plan)?;
    let (graph, facts, anatomy) = base.parts();
    let made = exact::slice(model, base.parts(), &plan.kept(), !plan.exact.is_empty() && from.is_some())?;
    let edited = plan.edited.iter().map(|e| e.initializer.clone()).collect();
    let whole = made.put_back(from.unwrap_or(&made.sliced.graph));
    let sliced = Sliced { graph: whole, ..made.sliced };
    Ok(slice::twin::build(graph, facts, anatomy, &plan.kept(), &sliced, &edited))
}

/// Reads and infers again what was written; what is not sound is removed.
pub fn check_written(path: &Path) -> Result<(), Error> {
    let read = onnx::read(path).map_err(|e| e.to_string());
    let sound = read.and_then(|loaded| infer::facts(&loaded.graph).map(drop).map_err(|e| e.to_string()));
    sound.map_err(|reason| {
        // Whether it can be removed or not, the error names it.
        let _ = std::fs::remove_file(path);
        Error::Written { file: path.to_path_buf(), reason }
    })
}

/// What one unit of a group costs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GroupCost {
    /// Parameters.
    pub params_per_unit: u64,
    /// MACs per sample; `None` where a size is not known.
    pub macs_per_unit: Option<u64>,
}

/// What one unit of each group costs: the saving of the first step, divided by the units that go with it.
pub fn group_costs(model: &Model) -> Vec<GroupCost> {
    let costs = cost::Model::new(model.graph(), &model.facts, &model.anatomy, &model.sizes);
    let one = |g: &anatomy::Group| {
        let step = costs.first_step(g);
        let of_step = || g.nest_count() * g.stored.len() * g.run / g.class_size().max(1);
        let units = if g.kind == Kind::Token { 1 } else { of_step().max(1) as u64 };
        GroupCost { params_per_unit: step.params / units, macs_per_unit: step.macs.map(|m| m / units) }
    };
    model.anatomy.groups.iter().map(one).collect()
}

/// Unit: bytes of a model file and of its data files.
pub fn file_bytes(model: &Model) -> u64 {
    model.loaded.files.iter().map(|f| std::fs::metadata(f).map_or(0, |m| m.len())).sum()
}

/// Unit: bytes of a model file and of its one data file, where it has one.
pub fn bytes_on_disk(path: &Path) -> u64 {
    [path.to_path_buf(), onnx::data_path(path)].iter().map(|f| std::fs::metadata(f).map_or(0, |m| m.len())).sum()
}
