//! The whole tool: one short function per command. Only this file calls stages; each stage knows no other stage's functions.

mod apart;
mod augment;
mod data;
mod edit;
mod error;
mod measure;
mod proof;
pub mod slim;
mod train;

pub use augment::{AugmentAsk, augment};
pub use data::{DataChoice, check_not_chance, check_trains, class_output, open_data};
use edit::Base;
pub use edit::{Cut, cut, read_run, record_trained};
pub use error::Error;
pub use measure::{ScoreAsk, measured_scores};
pub use proof::{ProofData, prove};
pub use train::{EvalAsk, SearchAsk, bench, bench_feeds, check_search, evaluate, finetune, search};

use crate::anatomy::{self, Anatomy, Kind};
use crate::axes;
use crate::cost::{self, Cost, Sizes};
use crate::graph::Graph;
use crate::infer::{self, Facts, InferError};
use crate::onnx::{self, Loaded};
use crate::plan::{self, Ask, BeforeAfter, Budget, KeptUnits, Layout, Limits, Plan, Promised};
use crate::runtime::Device;
use crate::score::{self, Scores};
use crate::search;
use crate::slice::{self, Sliced};
use std::collections::BTreeSet;
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
    let loaded = onnx::read(path)?;
    let (facts, anatomy) = analyse(&loaded.graph).map_err(|cause| Error::Infer { file: path.to_path_buf(), cause })?;
    Ok(Model { path: path.to_path_buf(), loaded, facts, anatomy, sizes: sizes.clone() })
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

/// Scores + what is asked -> Plan, with the promised cost counted on the sliced graph.
pub fn make_plan(
    model: &Model,
    scores: &Scores,
    ask: &Ask,
    asked: &str,
    round: usize,
    protected: BTreeSet<String>,
    layout: Layout,
) -> Result<Plan, Error> {
    let file = || model.path.clone();
    let pinned = model.anatomy.tokens.sites.iter().filter_map(|site| {
        let group = model.anatomy.groups.iter().find(|g| g.kind == Kind::Token && g.layer == site.layer)?;
        Some((group.id.clone(), site.pinned.iter().copied().collect()))
    });
    let limits = Limits { round, protected, pinned: pinned.collect(), layout };
    let costs = cost::Model::new(model.graph(), &model.facts, &model.anatomy, &model.sizes);
    let kept =
        plan::choose(&model.anatomy, scores, ask, &limits, &costs).map_err(|cause| Error::Choose { file: file(), cause })?;
    let mut plan = Plan { layout, ..Plan::empty(&model.sha256()?) };
    for (id, kept) in &kept {
        let of = model.anatomy.groups.iter().find(|g| g.id == *id).map_or(0, anatomy::Group::units);
        plan.groups.insert(id.clone(), KeptUnits { kept: kept.clone(), of });
    }
    let hollow = model.graph().hollow();
    let sliced = slice::apply(&hollow, &model.facts, &model.anatomy, &kept, &analyse)
        .map_err(|cause| Error::Slice { file: file(), cause })?;
    plan.budget = Budget { asked: asked.to_string(), promised: before_after(model, &sliced)? };
    Ok(plan)
}

/// Params and MACs of a model and of what was sliced from it.
pub fn before_after(model: &Model, sliced: &Sliced) -> Result<Promised, Error> {
    let before = model.cost();
    let facts = infer::facts(&sliced.graph).map_err(|cause| Error::Infer { file: model.path.clone(), cause })?;
    let after = cost::count(&sliced.graph, &facts, &model.sizes);
    Ok(Promised {
        params: BeforeAfter { before: before.params, after: after.params },
        macs: before.macs.zip(after.macs).map(|(before, after)| BeforeAfter { before, after }),
    })
}

/// Model + plan -> the twin: nothing cut, removed units zeroed. `from` is the sliced model that holds edited tensors.
pub fn make_twin(model: &Model, plan_path: &Path, plan: &Plan, from: Option<&Graph>) -> Result<Graph, Error> {
    plan.check(plan_path, &model.sha256()?, &model.anatomy)?;
    let base = Base::of_plan(model, plan_path, plan)?;
    let (graph, facts, anatomy) = base.parts();
    let mut sliced = slice::apply(graph, facts, anatomy, &plan.kept(), &analyse)
        .map_err(|cause| Error::Slice { file: model.path.clone(), cause })?;
    let edited = plan.edited.iter().map(|e| e.initializer.clone()).collect();
    if let Some(graph) = from {
        sliced.graph = graph.clone();
    }
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
