//! Plan + model + what images say -> the sliced graph in the basis of the data, repaired.

use super::allocate::{Repaired, best_of_heads, cut_calibrated, cut_trained, losses};
use super::calibrate::{BasisChoice, CalibrateAsk, Calibrating, Calibration, Compensation, STATS_FILE, calibrate};
use super::edit::cut;
use super::{Error, Model};
use crate::anatomy::Group;
use crate::basis;
use crate::compensate;
use crate::curves::{Curves, How};
use crate::plan::{Losses, Plan};
use crate::score::Scores;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::AtomicBool;

/// How a plan is applied by what images say.
pub struct RepairAsk<'a> {
    /// The plan.
    pub plan: &'a Plan,
    /// Its file.
    pub plan_path: &'a Path,
    /// A run whose weights are cut.
    pub weights: Option<&'a Path>,
    /// How the weights behind a cut make up for it.
    pub how: Compensation,
    /// Whether savings that change no output are made.
    pub is_exact: bool,
    /// The images, and the basis.
    pub images: CalibrateAsk<'a>,
}

/// Applies a plan in the basis asked for, repaired where that is asked.
///
/// A plan of the model's own basis that is applied in the basis of the data says how many dims of each head stay; which ones is
/// decided by what they carry.
///
/// Errors: a plan of another basis than asked for, weights of a run in the basis of the data; those of [`calibrate`].
pub fn cut_repaired(
    model: &Model,
    ask: &RepairAsk<'_>,
    tell: &mut dyn FnMut(Calibrating),
    stop: &AtomicBool,
) -> Result<Repaired, Error> {
    let is_rotated = ask.plan.basis == ROTATED;
    if is_rotated && ask.images.basis == BasisChoice::Original {
        return Err(Error::unsuitable(
            ask.plan_path,
            "its units are dims in the basis of the data: --basis original has no such dims",
        ));
    }
    if let Some(run) = ask.weights {
        if is_rotated || ask.images.basis == BasisChoice::Rotated {
            let reason = "weights of a run are cut in the basis of the model, in which they were searched";
            return Err(Error::unsuitable(ask.plan_path, reason));
        }
        if ask.how == Compensation::Off {
            return Ok(cut(model, ask.plan_path, ask.plan, Some(run), ask.is_exact)?.into());
        }
        return cut_trained(model, (ask.plan_path, ask.plan), run, (ask.how, ask.is_exact), &ask.images, tell, stop);
    }
    ask.plan.check(ask.plan_path, &model.sha256()?, &model.anatomy)?;
    let found = calibrate(model, &ask.images, tell, stop)?;
    let plan = if is_rotated { ask.plan.clone() } else { in_rotated_dims(model, ask.plan, &found) };
    cut_calibrated(model, (ask.plan_path, &plan), &found, (ask.how, ask.is_exact), &ask.images, tell, stop)
}

/// The word of a plan whose units are dims in the basis of the data.
const ROTATED: &str = "rotated";

/// The plan with as many dims of each head of the rotated groups, those that carry most.
fn in_rotated_dims(model: &Model, plan: &Plan, found: &Calibration) -> Plan {
    let mut plan = plan.clone();
    let groups: Vec<&Group> = model.anatomy.groups.iter().filter(|g| found.rotated.contains(&g.id)).collect();
    for group in groups {
        let (Some(kept), Some(scores)) = (plan.groups.get_mut(&group.id), found.scores.groups.get(&group.id)) else { continue };
        let mut counts = vec![0; group.nest_count()];
        kept.kept.iter().filter_map(|u| u.checked_div(group.stored.len())).for_each(|head| {
            if let Some(n) = counts.get_mut(head) {
                *n += 1;
            }
        });
        kept.kept = best_of_heads(group, scores, &counts);
    }
    plan
}

/// Whether a folder holds statistics of images, as one-shot jobs leave them.
pub fn holds_statistics(dir: &Path) -> bool {
    dir.join(STATS_FILE).is_file()
}

/// What a one-shot job measured.
pub struct Measured {
    /// How much each unit is worth.
    pub scores: Scores,
    /// What cuts lose, where that was measured.
    pub losses: Option<Losses>,
    /// Whether units of heads are dims in the basis of the data.
    pub is_rotated: bool,
    /// Images of the statistics.
    pub images: u64,
}

/// Scores and losses of a model by statistics of images: of `ask.data`, or of a folder alone.
///
/// Errors: those of [`calibrate`]; a file of curves that is damaged or of another model.
pub fn read_measured(
    model: &Model,
    ask: &CalibrateAsk<'_>,
    tell: &mut dyn FnMut(Calibrating),
    stop: &AtomicBool,
) -> Result<Measured, Error> {
    let found = calibrate(model, ask, tell, stop)?;
    // Measured ones where there are both.
    let mut files = [How::Measured, How::Predicted].into_iter().filter_map(|how| found.curves_file(ask.dir, how));
    let curves = match files.find(|f| f.is_file()) {
        Some(file) => Some(Curves::read(&file, &model.sha256()?)?),
        None => None,
    };
    let is_rotated = !found.rotated.is_empty();
    Ok(Measured { losses: curves.as_ref().map(losses), is_rotated, images: found.images, scores: found.scores })
}

/// Whether dims of each `qk` and `vo` group may be cut in the basis of the data, or why not: by the graph alone.
pub fn bases(model: &Model) -> BTreeMap<String, Result<(), String>> {
    let (consumers, _) = compensate::consumers(model.graph(), &model.facts, &model.anatomy);
    let (rotatable, refused) = basis::rotatable(model.graph(), &model.facts, &model.anatomy, &consumers);
    let fine = rotatable.into_iter().map(|r| (r.group, Ok(())));
    fine.chain(refused.into_iter().map(|r| (r.group, Err(r.reason)))).collect()
}
