//! The ranking, and where it is cut off.

use crate::anatomy::{Anatomy, Group, Kind};
use crate::axes::ClassId;
use crate::cost::{Cost, Model};
use crate::score::Scores;
use crate::slice::cutset::Kept;
use std::collections::{BTreeMap, BTreeSet};

/// What is asked for.
#[derive(Clone, Debug, PartialEq)]
pub enum Ask {
    /// A fraction of the units of each kind.
    Fractions(BTreeMap<Kind, f64>),
    /// A fraction of the MACs, of the parameters, or of both.
    Budget {
        /// Fraction of the MACs to keep.
        macs: Option<f64>,
        /// Fraction of the parameters to keep.
        params: Option<f64>,
        /// Kinds that may be cut.
        kinds: BTreeSet<Kind>,
    },
}

/// What limits the choice.
#[derive(Clone, Debug, Default)]
pub struct Limits {
    /// Widths are multiples of this, where the group is at least that wide; 0 and 1 mean any.
    pub round: usize,
    /// Groups that are left alone.
    pub protected: BTreeSet<String>,
    /// Tokens of each token group that must stay.
    pub pinned: BTreeMap<String, Vec<usize>>,
}

/// Why no plan could be made.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ChooseError {
    /// Nothing can be cut.
    #[error("no prunable group found: {reasons}; see vitrim inspect")]
    NothingToCut {
        /// The most frequent reasons.
        reasons: String,
    },
    /// The budget is below what the parts that stay cost.
    #[error("smallest possible is {} % of {what}; asked for {} %", percent(*smallest), percent(*asked))]
    Unreachable {
        /// `MACs` or `params`.
        what: &'static str,
        /// Unit: percent.
        smallest: f64,
        /// Unit: percent.
        asked: f64,
    },
    /// MACs are not known.
    #[error("a size of the model is not known, so MACs cannot be counted: give it with --size NAME=N")]
    UnknownMacs,
    /// A group has no scores, or another number of them.
    #[error("scores of group '{group}' have {found} entries, the group has {units} units")]
    ScoresDiffer {
        /// The group.
        group: String,
        /// Entries found.
        found: usize,
        /// Units of the group.
        units: usize,
    },
}

/// Whole percents from 1 on; below that two digits that are not zero.
fn percent(x: f64) -> String {
    match x {
        x if x >= 1.0 || x <= 0.0 => format!("{x:.0}"),
        x => format!("{x:.*}", (1.0 - x.log10().floor()) as usize),
    }
}

/// The steps of one group: what goes first, one dim of every head at a time.
struct Ladder<'a> {
    group: &'a Group,
    /// Steps in the order of removal: units that go, and their score.
    steps: Vec<(Vec<usize>, f64)>,
}

/// Chooses the units that stay.
pub fn choose(anatomy: &Anatomy, scores: &Scores, ask: &Ask, limits: &Limits, model: &Model<'_>) -> Result<Kept, ChooseError> {
    let kinds: BTreeSet<Kind> = match ask {
        Ask::Fractions(f) => f.keys().copied().collect(),
        Ask::Budget { kinds, .. } => kinds.clone(),
    };
    let wanted = |g: &&Group| kinds.contains(&g.kind) && !limits.protected.contains(&g.id);
    let ladders = anatomy.groups.iter().filter(wanted).map(|g| ladder(g, scores, limits)).collect::<Result<Vec<_>, _>>()?;
    if ladders.iter().all(|l| l.steps.is_empty()) {
        return Err(nothing_to_cut(anatomy));
    }
    let counts = match ask {
        Ask::Fractions(f) => ladders.iter().map(|l| steps_for_fraction(l, f[&l.group.kind], limits)).collect(),
        Ask::Budget { macs, params, .. } => steps_for_budget(&ladders, *macs, *params, limits, model)?,
    };
    let mut kept = kept_tokens(&ladders, &counts, scores, limits);
    let cut = ladders.iter().zip(&counts).filter(|(l, n)| **n > 0 && l.group.kind != Kind::Token);
    kept.extend(cut.map(|(l, n)| (l.group.id.clone(), l.kept(*n))));
    Ok(kept)
}

fn nothing_to_cut(anatomy: &Anatomy) -> ChooseError {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for r in &anatomy.refused {
        *counts.entry(r.reason.as_str()).or_insert(0) += 1;
    }
    let mut reasons: Vec<(usize, &str)> = counts.into_iter().map(|(r, n)| (n, r)).collect();
    reasons.sort_by(|a, b| b.cmp(a));
    let top: Vec<&str> = reasons.into_iter().take(2).map(|(_, r)| r).collect();
    ChooseError::NothingToCut { reasons: if top.is_empty() { "no attention and no MLP".into() } else { top.join(", ") } }
}

fn ladder<'a>(group: &'a Group, scores: &Scores, limits: &Limits) -> Result<Ladder<'a>, ChooseError> {
    let units = group.units();
    let values = scores.groups.get(&group.id).map_or(&[][..], Vec::as_slice);
    if values.len() != units {
        return Err(ChooseError::ScoresDiffer { group: group.id.clone(), found: values.len(), units });
    }
    let pinned: BTreeSet<usize> = limits.pinned.get(&group.id).into_iter().flatten().copied().collect();
    let (width, first_row) = (group.stored.len(), group.bundles());
    let mut rows: Vec<Vec<(f64, Vec<usize>)>> = Vec::new();
    for head in 0..group.nest_count() {
        let mut bundles: Vec<(f64, Vec<usize>)> = Vec::new();
        for (unit, bundle) in (head * width..).zip(&first_row) {
            let bundle: Vec<usize> = bundle.iter().map(|u| head * width + u).collect();
            if bundle[0] == unit && !bundle.iter().any(|u| pinned.contains(u)) {
                bundles.push((bundle.iter().map(|u| f64::from(values[*u])).sum(), bundle));
            }
        }
        // The weakest first; of equals the later one, so that the order does not depend on chance.
        bundles.sort_by(|a, b| a.0.total_cmp(&b.0).then_with(|| b.1.cmp(&a.1)));
        rows.push(bundles);
    }
    let spare = usize::from(pinned.is_empty());
    let step_count = rows.iter().map(Vec::len).min().unwrap_or(0).saturating_sub(spare);
    let steps = (0..step_count)
        .map(|n| {
            let score = rows.iter().map(|r| r[n].0).sum();
            (rows.iter().flat_map(|r| r[n].1.iter().copied()).collect(), score)
        })
        .collect();
    Ok(Ladder { group, steps })
}

impl Ladder<'_> {
    /// Units that stay after `n` steps.
    fn kept(&self, n: usize) -> Vec<usize> {
        let gone: BTreeSet<usize> = self.steps[..n].iter().flat_map(|(units, _)| units.iter().copied()).collect();
        (0..self.group.units()).filter(|u| !gone.contains(u)).collect()
    }

    /// Stored dims per head after `n` steps.
    fn width_after(&self, n: usize) -> usize {
        let heads = self.group.nest_count() * self.group.sharing();
        let per_head = self.steps.first().map_or(1, |(u, _)| u.len() / heads.max(1));
        self.group.width() - n * per_head
    }

    /// The greatest number of steps up to `n` that leaves a rounded width.
    fn rounded(&self, n: usize, round: usize) -> usize {
        if round <= 1 || self.group.width() < round {
            return n;
        }
        (0..=n).rev().find(|m| self.width_after(*m).is_multiple_of(round)).unwrap_or(0)
    }
}

fn steps_for_fraction(ladder: &Ladder<'_>, fraction: f64, limits: &Limits) -> usize {
    let width = ladder.group.width();
    let target = (fraction * width as f64).round() as usize;
    let n = (0..=ladder.steps.len()).find(|n| ladder.width_after(*n) <= target).unwrap_or(ladder.steps.len());
    ladder.rounded(n, limits.round)
}

/// All steps of all ladders, in the order of score per cost.
fn ranking(ladders: &[Ladder<'_>], by_macs: bool, model: &Model<'_>) -> Vec<usize> {
    let mut steps: Vec<(f64, usize, usize)> = Vec::new();
    for (i, l) in ladders.iter().enumerate() {
        if l.steps.is_empty() {
            continue;
        }
        let step = model.first_step(l.group);
        let saved = if by_macs { step.macs.unwrap_or(step.params) } else { step.params };
        let mut floor = f64::NEG_INFINITY;
        for (n, (_, score)) in l.steps.iter().enumerate() {
            floor = floor.max(score / saved.max(1) as f64);
            steps.push((floor, i, n));
        }
    }
    steps.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.2.cmp(&b.2)).then(a.1.cmp(&b.1)));
    steps.into_iter().map(|(_, i, _)| i).collect()
}

fn cost_after(ladders: &[Ladder<'_>], counts: &[usize], model: &Model<'_>) -> Cost {
    let shortened = || ladders.iter().zip(counts).filter(|(_, n)| **n > 0);
    let sizes: BTreeMap<ClassId, usize> = shortened()
        .filter(|(l, _)| l.group.kind != Kind::Token)
        .map(|(l, n)| (l.group.leaf, l.group.class_size() - n * l.group.run))
        .collect();
    let tokens: BTreeMap<usize, usize> =
        shortened().filter(|(l, _)| l.group.kind == Kind::Token).map(|(l, n)| (l.group.layer, l.width_after(*n))).collect();
    model.under(&sizes, &tokens)
}

fn steps_for_budget(
    ladders: &[Ladder<'_>],
    macs: Option<f64>,
    params: Option<f64>,
    limits: &Limits,
    model: &Model<'_>,
) -> Result<Vec<usize>, ChooseError> {
    let whole = cost_after(ladders, &vec![0; ladders.len()], model);
    if macs.is_some() && whole.macs.is_none() {
        return Err(ChooseError::UnknownMacs);
    }
    let order = ranking(ladders, macs.is_some(), model);
    let counts_at = |taken: usize| -> Vec<usize> {
        let mut counts = vec![0; ladders.len()];
        for i in &order[..taken] {
            counts[*i] += 1;
        }
        counts.iter().zip(ladders).map(|(n, l)| l.rounded(*n, limits.round)).collect()
    };
    let met = |taken: usize| within(&cost_after(ladders, &counts_at(taken), model), &whole, macs, params);
    if !met(order.len()) {
        let (m, p) = shares(&cost_after(ladders, &counts_at(order.len()), model), &whole);
        return Err(match macs.filter(|f| m > *f) {
            Some(f) => ChooseError::Unreachable { what: "MACs", smallest: m * 100.0, asked: f * 100.0 },
            None => ChooseError::Unreachable { what: "params", smallest: p * 100.0, asked: params.unwrap_or(0.0) * 100.0 },
        });
    }
    let (mut low, mut high) = (0, order.len());
    while low < high {
        let middle = (low + high) / 2;
        if met(middle) { high = middle } else { low = middle + 1 }
    }
    let counts = counts_at(high);
    if high == 0 || limits.round > 1 {
        return Ok(counts);
    }
    Ok(come_closer(ladders, &order, high, counts, &|counts| {
        let cost = cost_after(ladders, counts, model);
        (within(&cost, &whole, macs, params), cost)
    }))
}

/// One step may overshoot by far (a token of an early layer). Going on without it, and without others that overshoot, may come
/// closer to the budget.
fn come_closer(
    ladders: &[Ladder<'_>],
    order: &[usize],
    taken: usize,
    counts: Vec<usize>,
    try_out: &dyn Fn(&[usize]) -> (bool, Cost),
) -> Vec<usize> {
    const TRIALS_MAX: usize = 400;
    let size = |c: &Cost| (c.macs, c.params);
    let mut best = (size(&try_out(&counts).1), counts);
    let mut current = vec![0; ladders.len()];
    for i in &order[..taken - 1] {
        current[*i] += 1;
    }
    for i in order[taken - 1..].iter().take(TRIALS_MAX) {
        if current[*i] >= ladders[*i].steps.len() {
            continue;
        }
        let mut trial = current.clone();
        trial[*i] += 1;
        let (met, cost) = try_out(&trial);
        if !met {
            current = trial;
        } else if size(&cost) > best.0 {
            best = (size(&cost), trial);
        }
    }
    best.1
}

/// Whether a cost meets the budget.
fn within(cost: &Cost, whole: &Cost, macs: Option<f64>, params: Option<f64>) -> bool {
    let (m, p) = shares(cost, whole);
    macs.is_none_or(|f| m <= f) && params.is_none_or(|f| p <= f)
}

/// MACs and parameters as fractions of the whole.
fn shares(cost: &Cost, whole: &Cost) -> (f64, f64) {
    (cost.macs.zip(whole.macs).map_or(0.0, |(a, b)| a as f64 / b as f64), cost.params as f64 / whole.params.max(1) as f64)
}

/// Kept tokens, layer by layer: of those that the layer before kept, the best by the layer's own scores.
fn kept_tokens(ladders: &[Ladder<'_>], counts: &[usize], scores: &Scores, limits: &Limits) -> Kept {
    let mut order: Vec<usize> = (0..ladders.len()).filter(|i| ladders[*i].group.kind == Kind::Token).collect();
    order.sort_by_key(|i| ladders[*i].group.layer);
    let mut alive: Option<Vec<usize>> = None;
    let mut kept = Kept::new();
    for i in order {
        let group = ladders[i].group;
        let before = alive.clone().unwrap_or_else(|| (0..group.units()).collect());
        let pinned = limits.pinned.get(&group.id).map_or(&[][..], Vec::as_slice);
        let values = &scores.groups[&group.id];
        let mut free: Vec<usize> = before.iter().copied().filter(|t| !pinned.contains(t)).collect();
        free.sort_by(|a, b| values[*b].total_cmp(&values[*a]).then(a.cmp(b)));
        let wanted = ladders[i].width_after(counts[i]).saturating_sub(pinned.len());
        let mut now: Vec<usize> =
            before.iter().copied().filter(|t| pinned.contains(t)).chain(free.into_iter().take(wanted)).collect();
        now.sort_unstable();
        if now.len() < group.units() {
            kept.insert(group.id.clone(), now.clone());
        }
        alive = Some(now);
    }
    kept
}
