//! What cuts cost: the loss of every group at several widths, measured with the group cut and repaired.

use super::calibrate::{BasisChoice, CalibrateAsk, Calibrating, Calibration, Compensation, calibrate_from, on_all_cores};
use super::edit::{Cut, changed, edited, splits_between, trained};
use super::{Error, Model, analyse, class_output, exact};
use crate::anatomy::{Group, Kind};
use crate::basis::Refused;
use crate::compensate::{Layer, Repair};
use crate::curves::{self, CurveError, Curves, How, Measure, Point, Trial};
use crate::graph::{Graph, Tensor, ValueId};
use crate::plan::{Kept, Losses, Plan};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

/// Where curves come from, how long they may take, and on how many images.
#[derive(Clone, Copy, Debug)]
pub struct CurveTime {
    /// Measured, or predicted where that can be.
    pub how: How,
    /// Unit: seconds, about.
    pub seconds: f64,
    /// Images at most.
    pub images: usize,
}

/// Shares of a head's dims, or of an MLP's units, at which losses are measured; beside these, one alone.
const LEVELS: [f64; 7] = [0.875, 0.75, 0.5, 0.375, 0.25, 0.125, 0.0625];

/// Widths of a group that are tried, falling: bundles that stay of each head.
pub(super) fn levels(group: &Group) -> Vec<usize> {
    let all = bundles(group);
    let shares = LEVELS.iter().map(|l| ((l * all as f64).round() as usize).max(1));
    let counts: BTreeSet<usize> = shares.chain([1]).filter(|n| *n < all).collect();
    counts.into_iter().rev().collect()
}

/// Bundles of one head.
fn bundles(group: &Group) -> usize {
    group.bundles().iter().enumerate().filter(|(u, b)| b.first() == Some(u)).count()
}

/// The units that stay where `count` bundles of each head do: the best by `scores`.
pub(super) fn best(group: &Group, scores: &[f32], count: usize) -> Vec<usize> {
    best_of_heads(group, scores, &vec![count; group.nest_count()])
}

/// The units that stay where each head keeps so many bundles: the best by `scores`.
pub(super) fn best_of_heads(group: &Group, scores: &[f32], counts: &[usize]) -> Vec<usize> {
    let width = group.stored.len();
    let together = group.bundles();
    let mut kept = Vec::new();
    for (head, count) in counts.iter().enumerate() {
        let worth = |b: &[usize]| b.iter().map(|u| f64::from(scores[head * width + u])).sum::<f64>();
        let mut all: Vec<&Vec<usize>> =
            together.iter().enumerate().filter(|(u, b)| b.first() == Some(u)).map(|(_, b)| b).collect();
        all.sort_by(|a, b| worth(b).total_cmp(&worth(a)).then(a[0].cmp(&b[0])));
        kept.extend(all.into_iter().take(*count).flatten().map(|u| head * width + u));
    }
    kept.sort_unstable();
    kept
}

impl Calibration {
    /// Losses of all groups that a plan may cut, each cut and repaired alone. Read from the folder where it has them.
    pub fn curves(
        &self,
        model: &Model,
        ask: &CalibrateAsk<'_>,
        time: &CurveTime,
        kinds: &BTreeSet<Kind>,
        tell: &mut dyn FnMut(Calibrating),
        stop: &AtomicBool,
    ) -> Result<Curves, Error> {
        let failed = |cause: CurveError| Error::Curves { file: model.path.clone(), cause: Box::new(cause) };
        let sha256 = model.sha256()?;
        let groups = self.groups_of(kinds);
        let file = self.curves_file(ask.dir, How::Measured);
        if let Some(known) = known(file.as_deref(), &sha256, &groups)? {
            return Ok(known);
        }
        let Some(data) = ask.data else {
            let reason = "has no curves of what cuts lose: give images with --data";
            return Err(Error::unsuitable(ask.dir.unwrap_or(&model.path), reason));
        };
        let output = class_output(model, ask.output)?;
        let (graph, facts) = (&self.base.graph, &self.base.facts);
        let loaders = std::thread::available_parallelism().map_or(1, usize::from);
        let settings =
            curves::Settings { session: ask.session.clone(), batch: ask.batch, loaders, ..curves::Settings::default() };
        let span = curves::Time { sites: groups.len(), trials: LEVELS.len() + 1, seconds: time.seconds, at_most: time.images };
        let count = curves::images_within((graph, facts), output.as_deref(), data, &settings, &span).map_err(failed)?;
        let images = if count < data.len() { data.draw(count, ask.seed) } else { data.clone() };
        let mut measure = Measure::new(graph, facts, output.as_deref(), &images, &settings, stop).map_err(failed)?;
        let mut sites: Vec<(usize, &Group)> = Vec::new();
        for group in groups {
            sites.extend(measure.order(&self.constants(group)).map(|place| (place, group)));
        }
        sites.sort_by_key(|(place, _)| *place);
        let all: usize = sites.iter().map(|(_, group)| levels(group).len()).sum();
        let mut found = Curves::empty(How::Measured, measure.images(), &sha256);
        let mut done = 0;
        for (_, group) in sites {
            let constants = self.constants(group);
            let (widths, trials): (Vec<usize>, Vec<Trial>) = self.trials(group).into_iter().unzip();
            measure.advance_to(&constants).map_err(failed)?;
            let mut count = |n: usize, of: usize| tell(Calibrating::Curves(done + n * trials.len() / of.max(1), all));
            let losses = measure.losses(&constants, &trials, &mut count, stop).map_err(failed)?;
            done += trials.len();
            let points = widths.iter().zip(losses).map(|(width, loss)| Point { width: *width, loss: loss.max(0.0) });
            found
                .insert(&group.id, group.units(), points.collect())
                .map_err(|f| Error::unsuitable(&model.path, f.to_string()))?;
        }
        if let Some(file) = &file {
            found.write(file)?;
        }
        Ok(found)
    }

    /// The file of curves in a folder.
    pub(super) fn curves_file(&self, dir: Option<&Path>, how: How) -> Option<PathBuf> {
        let word = if self.rotated.is_empty() { "original" } else { "rotated" };
        dir.map(|d| match how {
            How::Measured => d.join(format!("curves-{word}.json")),
            How::Predicted => d.join(format!("curves-predicted-{word}.json")),
        })
    }

    /// Groups of these kinds that have units of their own.
    pub(super) fn groups_of(&self, kinds: &BTreeSet<Kind>) -> Vec<&Group> {
        self.base.anatomy.groups.iter().filter(|g| kinds.contains(&g.kind) && g.kind != Kind::Token).collect()
    }

    /// Constants that trials of a group edit.
    fn constants(&self, group: &Group) -> Vec<ValueId> {
        let of_group = |l: &&Layer| l.consumer.groups.iter().any(|(id, _)| *id == group.id);
        let of_layer = |l: &Layer| std::iter::once(l.consumer.weight.constant).chain(l.consumer.bias.map(|b| b.constant));
        let found: BTreeSet<ValueId> = self.layers.iter().filter(of_group).flat_map(of_layer).collect();
        if found.is_empty() { self.zeroed(group, &[]).into_keys().collect() } else { found.into_iter().collect() }
    }

    /// The group cut to each width and repaired, as edits of constants.
    fn trials(&self, group: &Group) -> Vec<(usize, Trial)> {
        let scores = &self.scores.groups[&group.id];
        on_all_cores(&levels(group), |count| {
            let units = best(group, scores, *count);
            let kept = Kept::from([(group.id.clone(), units.clone())]);
            let mut edits: BTreeMap<ValueId, Tensor> = BTreeMap::new();
            for layer in &self.layers {
                if let Some((refit, _)) = layer.repair(&kept) {
                    edits.extend(layer.edits(&self.base.graph, &refit));
                }
            }
            if edits.is_empty() {
                edits = self.zeroed(group, &units);
            }
            (units.len(), Trial { edits: edits.into_iter().collect() })
        })
    }

    /// The weights of a group with the positions of units that go zeroed.
    pub(super) fn zeroed(&self, group: &Group, kept: &[usize]) -> BTreeMap<ValueId, Tensor> {
        let base = &self.base;
        let width = group.stored.len();
        let class = group.class_size();
        let stays: BTreeSet<usize> = kept.iter().map(|u| u / width * class + group.stored[u % width]).collect();
        let mut edits: BTreeMap<ValueId, Tensor> = BTreeMap::new();
        for cut in group.cuts.iter().filter(|c| c.reader.is_none()) {
            let Some(tensor) = edits.remove(&cut.value).or_else(|| base.graph.constant(cut.value)) else { continue };
            let Some(mut values) = tensor.to_f32s().filter(|_| tensor.dtype.is_float()) else { continue };
            let size = tensor.dims[cut.axis];
            let tags = group.tags(&base.anatomy.axes, (crate::graph::Id::index(cut.value), cut.axis), size);
            let inner: usize = tensor.dims[cut.axis + 1..].iter().product();
            for (flat, value) in values.iter_mut().enumerate() {
                if tags[flat / inner % size].is_some_and(|(row, leaf)| !stays.contains(&(row * class + leaf))) {
                    *value = 0.0;
                }
            }
            edits.insert(cut.value, tensor.with_f32s(&values));
        }
        edits
    }
}

/// The curves of a file, where it has all of these groups.
pub(super) fn known(file: Option<&Path>, sha256: &str, groups: &[&Group]) -> Result<Option<Curves>, Error> {
    let Some(file) = file.filter(|f| f.exists()) else { return Ok(None) };
    let known = Curves::read(file, sha256)?;
    Ok(groups.iter().all(|g| known.groups.contains_key(&g.id)).then_some(known))
}

/// Curves as a plan takes them.
pub(super) fn losses(curves: &Curves) -> Losses {
    let how = match curves.how {
        How::Measured => "measured",
        How::Predicted => "predicted",
    };
    let points = |(id, points): (&String, &Vec<Point>)| (id.clone(), points.iter().map(|p| (p.width, p.loss)).collect());
    Losses { how: how.to_string(), groups: curves.groups.iter().map(points).collect() }
}

/// A cut whose layers were repaired.
pub struct Repaired {
    /// The cut, its plan completed.
    pub cut: Cut,
    /// What was done, layer by layer.
    pub repairs: Vec<Repair>,
    /// Groups in the basis of the data.
    pub rotated: BTreeSet<String>,
    /// Groups that were to be rotated and stay in the basis of the model, and why.
    pub refused: Vec<Refused>,
    /// Groups whose layers cannot be repaired, and why.
    pub unrepaired: Vec<Refused>,
    /// Images that this was read off; 0 where none were looked at.
    pub images: u64,
}

impl From<Cut> for Repaired {
    fn from(cut: Cut) -> Self {
        Self { cut, repairs: Vec::new(), rotated: BTreeSet::new(), refused: Vec::new(), unrepaired: Vec::new(), images: 0 }
    }
}

/// Applies a plan to the weights of a calibration.
pub fn cut_calibrated(
    model: &Model,
    (plan_path, plan): (&Path, &Plan),
    calibration: &Calibration,
    (how, is_exact): (Compensation, bool),
    ask: &CalibrateAsk<'_>,
    tell: &mut dyn FnMut(Calibrating),
    stop: &AtomicBool,
) -> Result<Repaired, Error> {
    let plan = Plan { weights: None, ..plan.clone() };
    check(model, plan_path, &plan)?;
    let weights = calibration.weights(model, &plan.kept(), how, ask, tell, stop)?;
    cut_edited(model, plan_path, plan, (model.graph(), Vec::new()), calibration, (how, is_exact, weights))
}

/// Applies a plan to the weights of a run, its gates multiplied in, repaired by what images say of them.
pub fn cut_trained(
    model: &Model,
    (plan_path, plan): (&Path, &Plan),
    run: &Path,
    (how, is_exact): (Compensation, bool),
    ask: &CalibrateAsk<'_>,
    tell: &mut dyn FnMut(Calibrating),
    stop: &AtomicBool,
) -> Result<Repaired, Error> {
    check(model, plan_path, plan)?;
    let trained = trained(model, run, &plan.kept())?;
    let base = (&trained.base.graph, &trained.base.facts, &trained.base.anatomy);
    // The search chose dims of the model's own basis.
    let ask = CalibrateAsk { basis: BasisChoice::Original, ..*ask };
    let calibration = calibrate_from(model, base, &ask, tell, stop)?;
    let plan = Plan { weights: Some(trained.weights), ..plan.clone() };
    let weights = calibration.weights(model, &plan.kept(), how, &ask, tell, stop)?;
    let mut repaired =
        cut_edited(model, plan_path, plan, (&trained.base.graph, trained.why), &calibration, (how, is_exact, weights))?;
    repaired.cut.warnings = trained.warnings;
    Ok(repaired)
}

fn check(model: &Model, plan_path: &Path, plan: &Plan) -> Result<(), Error> {
    plan.check(plan_path, &model.sha256()?, &model.anatomy)?;
    super::edit::check_elements(model, &plan.kept())
}

/// `start` is the graph that was calibrated, with why its constants differ from the model's.
fn cut_edited(
    model: &Model,
    plan_path: &Path,
    mut plan: Plan,
    (start, mut why): (&Graph, Vec<(String, &'static str)>),
    calibration: &Calibration,
    (how, is_exact, (graph, repairs)): (Compensation, bool, (Graph, Vec<Repair>)),
) -> Result<Repaired, Error> {
    plan.split = splits_between(model.graph(), &graph).map_err(|reason| Error::unsuitable(plan_path, reason))?;
    plan.basis = if calibration.rotated.is_empty() { "original" } else { "rotated" }.to_string();
    why.extend(changed(start, &calibration.base.graph, &plan.split, "rotated"));
    why.extend(changed(&calibration.base.graph, &graph, &[], "compensated"));
    plan.edited = edited(why);
    let infer_error = |cause| Error::Infer { file: model.path.clone(), cause };
    let (facts, anatomy) = analyse(&graph).map_err(infer_error)?;
    let made = exact::slice(model, (&graph, &facts, &anatomy), &plan.kept(), is_exact || !plan.exact.is_empty())?;
    let unrepaired = calibration.unrepaired.iter().filter(|r| how != Compensation::Off && plan.kept().contains_key(&r.group));
    let unrepaired = unrepaired.cloned().collect();
    Ok(Repaired {
        cut: Cut::new(made, plan, Vec::new()),
        repairs,
        rotated: calibration.rotated.clone(),
        refused: calibration.refused.clone(),
        unrepaired,
        images: calibration.images,
    })
}
