//! Plan + model (+ run) -> the sliced graph, with the plan completed by what was edited.

use super::apart::Trainable;
use super::exact::{self, Made};
use super::{Error, Model, analyse};
use crate::anatomy::{Anatomy, Kind};
use crate::exact::Refused;
use crate::fold;
use crate::graph::{DType, Graph, Tensor, Use, ValueId};
use crate::infer::Facts;
use crate::onnx;
use crate::plan::{Edited, Kept, Plan, Split, SplitUse, Weights};
use crate::search::{self, Run};
use crate::slice::Sliced;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

/// What a plan is applied to: the model, or the model with merged constants taken apart.
pub(super) enum Base<'a> {
    Model(&'a Model),
    Own(Box<Analysed>),
}

/// A graph with what is known of it.
pub(super) struct Analysed {
    pub(super) graph: Graph,
    pub(super) facts: Facts,
    pub(super) anatomy: Anatomy,
}

impl<'a> Base<'a> {
    /// The base that a completed plan was applied to.
    pub(super) fn of_plan(model: &'a Model, plan_path: &Path, plan: &Plan) -> Result<Self, Error> {
        if plan.split.is_empty() {
            return Ok(Base::Model(model));
        }
        let graph = split_constants(model.graph(), &plan.split).map_err(|reason| Error::unsuitable(plan_path, reason))?;
        Ok(Base::Own(Box::new(analysed(model, graph)?)))
    }

    pub(super) fn parts(&self) -> (&Graph, &Facts, &Anatomy) {
        match self {
            Base::Model(m) => (m.graph(), &m.facts, &m.anatomy),
            Base::Own(own) => (&own.graph, &own.facts, &own.anatomy),
        }
    }
}

pub(super) fn analysed(model: &Model, graph: Graph) -> Result<Analysed, Error> {
    let (facts, anatomy) = analyse(&graph).map_err(|cause| Error::Infer { file: model.path.clone(), cause })?;
    Ok(Analysed { graph, facts, anatomy })
}

/// A sliced graph, its completed plan, and what a user should know.
pub struct Cut {
    /// What was cut.
    pub sliced: Sliced,
    /// The plan, completed.
    pub plan: Plan,
    /// Gates that could not be folded, with the reason; one line each.
    pub warnings: Vec<String>,
    /// Savings that were not made, and why.
    pub refused: Vec<Refused>,
}

/// Applies a plan to the model's own weights, or to those of a run with its gates folded in. Savings that change no output are made where
/// the plan has some, or where they are asked for here.
pub fn cut(model: &Model, plan_path: &Path, plan: &Plan, run: Option<&Path>, is_exact: bool) -> Result<Cut, Error> {
    let (cut, origin) = cut_early(model, plan_path, plan, run, is_exact)?;
    origin.check(plan_path, plan)?;
    Ok(cut)
}

/// As [`cut`], before it is known whether the plan belongs to the model: nothing may come of the result until
/// [`Origin::check`] says so. The file is read once more for its hash, which takes as long as cutting and writing.
pub fn cut_early(
    model: &Model,
    plan_path: &Path,
    plan: &Plan,
    run: Option<&Path>,
    is_exact: bool,
) -> Result<(Cut, Origin), Error> {
    let path = model.path.clone();
    let origin = Origin { model: path.clone(), hash: std::thread::spawn(move || onnx::sha256_of_file(&path)) };
    match cut_fitting(model, plan_path, plan, run, is_exact) {
        Ok(cut) => Ok((cut, origin)),
        Err(error) => origin.check(plan_path, plan).and(Err(error)),
    }
}

/// The hash of a model's file while it is being found.
pub struct Origin {
    model: PathBuf,
    hash: JoinHandle<Result<String, onnx::Error>>,
}

impl Origin {
    /// Waits for the hash. Errors: the plan is of another model; the file cannot be read.
    pub fn check(self, plan_path: &Path, plan: &Plan) -> Result<(), Error> {
        let found = self.hash.join().map_err(|_| Error::unsuitable(&self.model, "cannot be hashed".to_string()))??;
        Ok(plan.check_model(plan_path, &found)?)
    }
}

/// As [`cut`], of a plan that may belong to another model.
fn cut_fitting(model: &Model, plan_path: &Path, plan: &Plan, run: Option<&Path>, is_asked: bool) -> Result<Cut, Error> {
    plan.check_groups(plan_path, &model.anatomy)?;
    let kept = plan.kept();
    check_elements(model, &kept)?;
    let mut plan = Plan { weights: None, edited: Vec::new(), split: Vec::new(), ..plan.clone() };
    let is_exact = is_asked || !plan.exact.is_empty();
    let Some(dir) = run else {
        let made = exact::slice(model, (model.graph(), &model.facts, &model.anatomy), &kept, is_exact)?;
        return Ok(Cut::new(made, plan, Vec::new()));
    };
    let Trained { base: Analysed { graph, facts, anatomy }, why, warnings, weights } = trained(model, dir, &kept)?;
    plan.split = splits_between(model.graph(), &graph).map_err(|reason| Error::unsuitable(dir, reason))?;
    let made = exact::slice(model, (&graph, &facts, &anatomy), &kept, is_exact)?;
    plan.edited = edited(why);
    plan.weights = Some(weights);
    Ok(Cut::new(made, plan, warnings))
}

impl Cut {
    /// What was made of a plan.
    pub(super) fn new(made: Made, plan: Plan, warnings: Vec<String>) -> Self {
        let Made { sliced, savings, refused, .. } = made;
        Self { sliced, plan: Plan { exact: savings, ..plan }, warnings, refused }
    }
}

/// A model with the weights of a run, its gates multiplied in.
pub(super) struct Trained {
    /// The graph, constants that trained apart taken apart.
    pub(super) base: Analysed,
    /// Which constants differ from the model's, and why.
    pub(super) why: Vec<(String, &'static str)>,
    /// Gates that could not be folded.
    pub(super) warnings: Vec<String>,
    /// Where the weights come from.
    pub(super) weights: Weights,
}

/// The model with the weights of a run.
pub(super) fn trained(model: &Model, dir: &Path, kept: &Kept) -> Result<Trained, Error> {
    let run = read_run(model, dir)?;
    let searched = Trainable::of_model(model)?;
    let trained = run.apply_weights(searched.parts().0).map_err(|e| search_error(dir, e))?;
    let trained = searched.put_back(model.graph(), trained).map_err(|reason| Error::unsuitable(dir, reason))?;
    let splits = splits_between(model.graph(), &trained).map_err(|reason| Error::unsuitable(dir, reason))?;
    let mut base = analysed(model, trained)?;
    let mut why = changed(model.graph(), &base.graph, &splits, "trained");
    let trained = base.graph.clone();
    let trainable = Trainable::of(&model.path, (&trained, &base.facts, &base.anatomy))?;
    let warnings = fold_gates(&mut base.graph, &trainable, &run, kept, dir)?;
    why.extend(changed(&trained, &base.graph, &[], "folded"));
    let checkpoint = dir.join("checkpoint.safetensors");
    let weights = Weights { path: dir.display().to_string(), sha256: onnx::sha256_of_file(&checkpoint)? };
    Ok(Trained { base, why, warnings, weights })
}

/// The run, which must be of this model.
pub fn read_run(model: &Model, dir: &Path) -> Result<Run, Error> {
    let run = search::read(dir).map_err(|e| search_error(dir, e))?;
    let (found, expected) = (run.model_sha256.clone(), model.sha256()?);
    if found != expected {
        let file = dir.join("checkpoint.safetensors");
        return Err(search_error(dir, search::SearchError::OtherModel { file, found, expected }));
    }
    Ok(run)
}

pub(super) fn search_error(file: &Path, cause: search::SearchError) -> Error {
    match cause {
        search::SearchError::Runtime(e) => Error::Runtime(e),
        cause => Error::Search { file: file.to_path_buf(), cause: Box::new(cause) },
    }
}

/// Multiplies the gates of a run into the weights of `graph`, of which `trainable` was made. Tokens have no weights: a token that
/// stays counts fully. Returns gates that could not be folded, with the reason.
fn fold_gates(graph: &mut Graph, trainable: &Trainable<'_>, run: &Run, kept: &Kept, dir: &Path) -> Result<Vec<String>, Error> {
    let mut warnings = Vec::new();
    let (written, facts, anatomy) = trainable.parts();
    let (model, mut scaled) = (graph.clone(), written.clone());
    for group in anatomy.groups.iter().filter(|g| g.kind != Kind::Token) {
        let Some(gates) = run.gates.get(&group.id) else { continue };
        if gates.len() != group.units() {
            let cause = fold::FoldError::Units { group: group.id.clone(), found: gates.len(), units: group.units() };
            return Err(Error::Fold { file: dir.to_path_buf(), cause });
        }
        let mut next = scaled.clone();
        let folded = fold::group(&mut next, facts, group, gates);
        match folded.and_then(|_| Ok((trainable.put_back(&model, next.clone())?, next))) {
            Ok((whole, next)) => (*graph, scaled) = (whole, next),
            Err(reason) => {
                let is_cut = if kept.contains_key(&group.id) { "what stays of it counts" } else { "it counts" };
                warnings.push(format!("gates of {} cannot be multiplied into weights ({reason}): {is_cut} fully", group.id));
            }
        }
    }
    Ok(warnings)
}

/// Why a tensor is edited.
const WHY: [&str; 5] = ["folded", "trained", "rotated", "compensated", "finetuned"];

/// The edited tensors by name; where there are two reasons, both are told.
pub(super) fn edited(why: Vec<(String, &'static str)>) -> Vec<Edited> {
    let mut reasons: BTreeMap<String, BTreeSet<&str>> = BTreeMap::new();
    for (name, reason) in why {
        reasons.entry(name).or_default().insert(reason);
    }
    let join = |set: BTreeSet<&str>| set.into_iter().collect::<Vec<_>>().join(", ");
    reasons.into_iter().map(|(initializer, set)| Edited { initializer, why: join(set) }).collect()
}

/// Names of the constants of `new` that hold other elements than in `old`.
pub(super) fn changed(old: &Graph, new: &Graph, splits: &[Split], why: &'static str) -> Vec<(String, &'static str)> {
    let source = |name: &str| splits.iter().find(|s| s.copy == name).map_or(name.to_string(), |s| s.initializer.clone());
    let mut names = Vec::new();
    for (v, value) in new.values().filter(|(v, _)| new.is_constant(*v)) {
        let before = old.find(&source(value.name())).and_then(|v| old.constant(v));
        if before.map(|t| t.bytes) != new.constant(v).map(|t| t.bytes) {
            names.push((value.name().to_string(), why));
        }
    }
    names
}

/// Adds what `new` changed of `old` (a graph that a completed plan made) to the plan; `false` where the plan cannot express it.
pub fn record_trained(plan: &mut Plan, old: &Graph, new: &Graph) -> bool {
    if splits_between(old, new).is_ok_and(|s| !s.is_empty()) {
        return false;
    }
    let before = plan.edited.drain(..).flat_map(|e| {
        let words: Vec<&'static str> = WHY.into_iter().filter(|w| e.why.contains(w)).collect();
        words.into_iter().map(move |w| (e.initializer.clone(), w)).collect::<Vec<_>>()
    });
    let mut why: Vec<(String, &'static str)> = before.collect();
    why.extend(changed(old, new, &[], "finetuned"));
    plan.edited = edited(why);
    true
}

/// How constants of `old` were taken apart in `new`: by the outputs of the nodes that read each copy.
pub(super) fn splits_between(old: &Graph, new: &Graph) -> Result<Vec<Split>, String> {
    let mut splits = Vec::new();
    for (v, value) in new.values().skip(old.value_count()) {
        if value.initializer().is_none() || value.users().is_empty() {
            continue;
        }
        let mut uses = Vec::new();
        let mut sources = BTreeSet::new();
        for at in new.value(v).users() {
            let node = new.node(at.node);
            let output = node.outputs().iter().flatten().next().ok_or("a node without outputs reads a copy")?;
            sources.extend(old.node(at.node).input(at.slot).map(|s| old.value(s).name().to_string()));
            uses.push(SplitUse { output: new.value(*output).name().to_string(), slot: at.slot });
        }
        let Some(initializer) = sources.into_iter().next() else { return Err("a copy of no constant".into()) };
        splits.push(Split { initializer, copy: value.name().to_string(), uses });
    }
    Ok(splits)
}

/// Takes constants apart as recorded.
fn split_constants(graph: &Graph, splits: &[Split]) -> Result<Graph, String> {
    let mut out = graph.clone();
    for split in splits {
        let missing = || format!("the model has no constant '{}' to be taken apart as the plan says", split.initializer);
        let source = graph.find(&split.initializer).ok_or_else(missing)?;
        let tensor = graph.constant(source).ok_or_else(missing)?;
        let copy = out.add_initializer(&split.initializer, tensor);
        if out.value(copy).name() != split.copy {
            return Err(format!("the copy '{}' of a constant would get another name", split.copy));
        }
        for at in &split.uses {
            let producer = graph.find(&at.output).and_then(|v| graph.value(v).producer());
            let (node, _) = producer.ok_or_else(|| format!("the model has no node that makes '{}'", at.output))?;
            if graph.node(node).input(at.slot) != Some(source) {
                return Err(format!("the node that makes '{}' does not read '{}'", at.output, split.initializer));
            }
            out.set_input(Use { node, slot: at.slot }, Some(copy));
        }
        if out.value(source).users().is_empty() && !out.outputs().contains(&source) {
            out.take_initializer(source);
        }
    }
    Ok(out)
}

/// Refuses NaN in any constant that the plan cuts, and infinity in a weight: both would spread.
pub(super) fn check_elements(model: &Model, kept: &Kept) -> Result<(), Error> {
    let mut seen = BTreeSet::new();
    for group in model.anatomy.groups.iter().filter(|g| kept.contains_key(&g.id)) {
        for cut in &group.cuts {
            if !seen.insert(cut.value) {
                continue;
            }
            if let Some(reason) = bad_elements(model.graph(), cut.value) {
                return Err(Error::unsuitable(&model.path, reason));
            }
        }
    }
    Ok(())
}

/// As [`check_elements`], of all groups: what a search would train on.
pub(super) fn check_all_elements(model: &Model) -> Result<(), Error> {
    check_elements(model, &model.anatomy.groups.iter().map(|g| (g.id.clone(), Vec::new())).collect())
}

fn bad_elements(graph: &Graph, v: ValueId) -> Option<String> {
    let tensor = graph.constant(v)?;
    let name = onnx::shown(graph.value(v).name());
    if !(tensor.dtype.is_float() || is_integer(tensor.dtype)) {
        return Some(format!("initializer {name} has type {}, not supported", tensor.dtype.name()));
    }
    if tensor.is_finite() {
        return None;
    }
    let values = tensor.to_f32s()?;
    let is_weight = tensor.dims.iter().filter(|d| **d > 1).count() >= 2;
    let find = |what: &str, is_bad: &dyn Fn(f32) -> bool| {
        let first = values.iter().position(|x| is_bad(*x))?;
        let count = values.iter().filter(|x| is_bad(**x)).count();
        Some(format!("initializer {name} holds {count} {what} values (first at {})", place(&tensor, first)))
    };
    find("NaN", &|x| x.is_nan()).or_else(|| if is_weight { find("infinite", &|x| x.is_infinite()) } else { None })
}

/// `0,3` for the element at this flat position.
fn place(tensor: &Tensor, flat: usize) -> String {
    let mut rest = flat;
    let mut at: Vec<String> = Vec::new();
    for dim in tensor.dims.iter().rev() {
        at.push((rest % (*dim).max(1)).to_string());
        rest /= (*dim).max(1);
    }
    at.reverse();
    at.join(",")
}

/// Types whose elements can be cut without being understood: all integers.
fn is_integer(dtype: DType) -> bool {
    use DType::*;
    matches!(dtype, U8 | I8 | U16 | I16 | I32 | I64 | Bool | U32 | U64 | U4 | I4 | U2 | I2)
}
