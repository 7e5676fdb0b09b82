//! Steps of all groups under a budget: in the order of the scores, or by what curves say that widths lose.
//!
//! Every choice is held against the true cost, in which kinds multiply (tokens with widths). Where curves are given, what a width
//! saves is taken at the current point, the rest as it stands; two ways to choose then compete ([`allocate`](super::allocate)),
//! both are brought to the budget by single stops, and the one that is predicted to lose less is taken.
//! Invariant: the cost of what is chosen meets every target.

use super::allocate::{self, Site};
use super::choose::{ChooseError, Measure, Targets};
use super::curve::{Curve, Losses};
use super::file::{Allocation, Way};
use super::ladder::Ladder;
use crate::anatomy::Kind;
use crate::cost::{ClassSizes, Cost, Model, TokenCounts};
use std::collections::BTreeMap;

/// Stops of one group that are weighed against each other; between them only single stops are tried.
const LEVELS_MAX: usize = 128;

/// Bins of what is saved, in the dynamic program.
const BINS: usize = 4096;

/// Parts into which the weight of several targets is divided.
const WEIGHT_PARTS: usize = 4;

/// So much of a target is close enough.
const CLOSE: f64 = 0.99;

/// Moves that are tried beyond one that overshoots.
const TRIALS_MAX: usize = 400;

/// Steps taken of each ladder.
type Counts = Vec<usize>;

/// A choice and its cost, which follows when one ladder moves.
struct Point {
    counts: Counts,
    sizes: ClassSizes,
    tokens: TokenCounts,
    cost: Cost,
}

/// What is to be chosen, and what it costs.
pub(super) struct Chooser<'a, 'm> {
    ladders: &'a [Ladder<'a>],
    /// By ladder and steps: what is lost.
    loss: Vec<Vec<f64>>,
    targets: &'a Targets,
    model: &'a Model<'m>,
    whole: Cost,
}

/// Steps of each ladder so that the targets are met.
pub(super) fn steps_for_budget(
    ladders: &[Ladder<'_>],
    targets: &Targets,
    losses: Option<&Losses>,
    model: &Model<'_>,
) -> Result<(Counts, Option<Allocation>), ChooseError> {
    let curves = |l: &Ladder<'_>| Curve::new(losses?.groups.get(&l.group.id)?, l.group.units());
    let of_curve = |l: &Ladder<'_>| curves(l).map(|c| (0..=l.steps.len()).map(|n| c.at(l.units_after(n))).collect());
    let loss = ladders.iter().map(|l| of_curve(l).unwrap_or_else(|| summed_scores(l))).collect();
    let whole = model.under(&ClassSizes::new(), &TokenCounts::new());
    if targets.contains_key(&Measure::Macs) && whole.macs.is_none() {
        return Err(ChooseError::UnknownMacs);
    }
    let chooser = Chooser { ladders, loss, targets, model, whole };
    chooser.check_reachable()?;
    if losses.is_none() {
        return Ok((chooser.cut_off(&chooser.moves_by_scores(), &chooser.weights()[0]), None));
    }
    let (counts, allocation) = chooser.by_curves(losses.map_or("", |l| &l.how));
    Ok((counts, Some(allocation)))
}

/// Scores of all that went, by the number of steps.
fn summed_scores(ladder: &Ladder<'_>) -> Vec<f64> {
    let mut sum = 0.0;
    let mut out = vec![0.0];
    out.extend(ladder.steps.iter().map(|(_, score)| {
        sum += score.max(0.0);
        sum
    }));
    out
}

impl Chooser<'_, '_> {
    fn set(ladder: &Ladder<'_>, n: usize, sizes: &mut ClassSizes, tokens: &mut TokenCounts) {
        let group = ladder.group;
        match (group.kind, n) {
            (Kind::Token, 0) => drop(tokens.remove(&group.layer)),
            (Kind::Token, _) => drop(tokens.insert(group.layer, ladder.width_after(n))),
            (_, 0) => drop(sizes.remove(&group.leaf)),
            _ => drop(sizes.insert(group.leaf, group.class_size() - ladder.lost(n) * group.run)),
        }
    }

    fn sizes(&self, counts: &[usize]) -> (ClassSizes, TokenCounts) {
        let (mut sizes, mut tokens) = (ClassSizes::new(), TokenCounts::new());
        self.ladders.iter().zip(counts).for_each(|(l, n)| Self::set(l, *n, &mut sizes, &mut tokens));
        (sizes, tokens)
    }

    fn cost(&self, counts: &[usize]) -> Cost {
        let (sizes, tokens) = self.sizes(counts);
        self.model.under(&sizes, &tokens)
    }

    fn point(&self, counts: Counts) -> Point {
        let (sizes, tokens) = self.sizes(&counts);
        let cost = self.model.under(&sizes, &tokens);
        Point { counts, sizes, tokens, cost }
    }

    /// Moves one ladder. Only what its group bears on is counted again.
    fn go(&self, at: &mut Point, i: usize, n: usize) {
        let ladder = &self.ladders[i];
        let before = self.model.around(ladder.group, &at.sizes, &at.tokens);
        Self::set(ladder, n, &mut at.sizes, &mut at.tokens);
        let after = self.model.around(ladder.group, &at.sizes, &at.tokens);
        at.counts[i] = n;
        at.cost = Cost {
            params: at.cost.params + after.params - before.params,
            bytes: at.cost.bytes + after.bytes - before.bytes,
            macs: at.cost.macs.zip(after.macs).zip(before.macs).map(|((all, after), before)| all + after - before),
        };
    }

    fn is_met(&self, cost: &Cost) -> bool {
        self.fullness(cost) <= 1.0
    }

    fn predicted(&self, counts: &[usize]) -> f64 {
        counts.iter().zip(&self.loss).map(|(n, loss)| loss[*n]).sum()
    }

    fn check_reachable(&self) -> Result<(), ChooseError> {
        let least: Counts = self.ladders.iter().map(|l| l.rounded(l.steps.len())).collect();
        let cost = self.cost(&least);
        for (measure, asked) in self.targets {
            let smallest = measure.share(&cost, &self.whole);
            if smallest > *asked {
                return Err(ChooseError::Unreachable { what: measure.name(), smallest: smallest * 100.0, asked: asked * 100.0 });
            }
        }
        Ok(())
    }

    /// One step at a time, in the order of score per cost.
    fn moves_by_scores(&self) -> Vec<(usize, usize)> {
        let by_macs = self.targets.contains_key(&Measure::Macs);
        let mut steps: Vec<(f64, usize, usize)> = Vec::new();
        for (i, l) in self.ladders.iter().enumerate().filter(|(_, l)| !l.steps.is_empty()) {
            let step = self.model.first_step(l.group);
            let saved = if by_macs { step.macs.unwrap_or(step.params) } else { step.params };
            // A step of one head alone saves its share.
            let saved = if l.own_widths.is_some() { saved / l.group.nest_count().max(1) as u64 } else { saved };
            let mut floor = f64::NEG_INFINITY;
            for (n, (_, score)) in l.steps.iter().enumerate() {
                floor = floor.max(score / saved.max(1) as f64);
                steps.push((floor, i, n));
            }
        }
        steps.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.2.cmp(&b.2)).then(a.1.cmp(&b.1)));
        let stops = |(_, i, n): &(f64, usize, usize)| (self.ladders[*i].rounded(n + 1) == n + 1).then_some((*i, n + 1));
        steps.iter().filter_map(stops).collect()
    }

    /// The state after the first moves (ladder, its steps then) that meet the targets, and what they leave room for given back.
    ///
    /// One move may overshoot by far (a token of an early layer), so that nothing brings the rest back. Then going on without it, and
    /// without others that overshoot, may come closer.
    fn cut_off(&self, moves: &[(usize, usize)], weights: &BTreeMap<Measure, f64>) -> Counts {
        let after = |taken: usize| {
            let mut counts = vec![0; self.ladders.len()];
            moves[..taken].iter().for_each(|(i, n)| counts[*i] = *n);
            counts
        };
        let (mut low, mut high) = (0, moves.len());
        while low < high {
            let middle = (low + high) / 2;
            if self.is_met(&self.cost(&after(middle))) { high = middle } else { low = middle + 1 }
        }
        let counts = self.given_back(self.repaired(after(high), weights), weights);
        let fullness = self.fullness(&self.cost(&counts));
        if high == 0 || fullness >= CLOSE {
            return counts;
        }
        let mut current = self.point(after(high - 1));
        let mut best = (fullness, counts);
        for (i, n) in moves[high - 1..].iter().take(TRIALS_MAX) {
            let old = current.counts[*i];
            self.go(&mut current, *i, *n);
            let fullness = self.fullness(&current.cost);
            if fullness > 1.0 {
                continue;
            }
            if fullness > best.0 {
                best = (fullness, current.counts.clone());
            }
            self.go(&mut current, *i, old);
        }
        self.given_back(best.1, weights)
    }

    /// Cost as a fraction of the target that is closest: above 1 exactly where a target is missed.
    fn fullness(&self, cost: &Cost) -> f64 {
        let of = |(measure, target): (&Measure, &f64)| {
            let share = measure.share(cost, &self.whole);
            if share <= *target { (share / target).min(1.0) } else { (share / target).max(1.0 + f64::EPSILON) }
        };
        self.targets.iter().map(of).fold(0.0, f64::max)
    }

    /// Ways to weigh the targets against each other, evenly first. Targets that ask for nothing have no weight.
    fn weights(&self) -> Vec<BTreeMap<Measure, f64>> {
        let real: Vec<Measure> = self.targets.iter().filter(|(_, t)| **t < 1.0).map(|(m, _)| *m).collect();
        let even = real.iter().map(|m| (*m, 1.0 / real.len() as f64)).collect();
        let mut out = vec![even];
        if real.len() > 1 {
            let parts = |left: usize| (0..=left).map(move |n| (n, left - n));
            for (first, rest) in parts(WEIGHT_PARTS) {
                for (second, third) in parts(rest).filter(|(_, third)| real.len() > 2 || *third == 0) {
                    let shares = [first, second, third].map(|n| n as f64 / WEIGHT_PARTS as f64);
                    out.push(real.iter().copied().zip(shares).collect());
                }
            }
        }
        out
    }

    /// What is saved of what must be saved, weighed: 1 where all of it is.
    fn saved(&self, cost: &Cost, weights: &BTreeMap<Measure, f64>) -> f64 {
        let part = |(m, w): (&Measure, &f64)| w * (1.0 - m.share(cost, &self.whole)) / (1.0 - self.targets[m]);
        weights.iter().map(part).sum()
    }

    /// Stops of a ladder that are weighed: all, or evenly many of them.
    fn levels(ladder: &Ladder<'_>) -> Vec<usize> {
        let last = ladder.stops.len() - 1;
        if last <= LEVELS_MAX {
            return ladder.stops.clone();
        }
        (0..=LEVELS_MAX).map(|i| ladder.stops[i * last / LEVELS_MAX]).collect()
    }

    fn all_levels(&self) -> Vec<Vec<usize>> {
        self.ladders.iter().map(Self::levels).collect()
    }

    /// What the levels of each ladder save where the others stand at `base`, and lose.
    fn sites(&self, base: &[usize], weights: &BTreeMap<Measure, f64>) -> Vec<Site> {
        let (mut sizes, mut tokens) = self.sizes(base);
        let mut out = Vec::new();
        for (i, ladder) in self.ladders.iter().enumerate() {
            let levels = Self::levels(ladder);
            let group = ladder.group;
            let mut at = |level: usize| {
                Self::set(ladder, levels[level], &mut sizes, &mut tokens);
                self.saved(&self.model.around(group, &sizes, &tokens), weights)
            };
            let mut saved = vec![0.0; levels.len()];
            let (none, all) = (at(0), at(levels.len() - 1));
            (saved[0], saved[levels.len() - 1]) = (none, all);
            between(&levels, &mut saved, (0, levels.len() - 1), &mut at);
            saved.iter_mut().for_each(|s| *s -= none);
            Self::set(ladder, base[i], &mut sizes, &mut tokens);
            out.push(Site { saved, loss: levels.iter().map(|n| self.loss[i][*n]).collect() });
        }
        out
    }

    /// Both ways; what is predicted to lose less.
    fn by_curves(&self, how: &str) -> (Counts, Allocation) {
        let mut greedy: Option<(f64, Counts, BTreeMap<Measure, f64>)> = None;
        for weights in self.weights() {
            let mut counts = vec![0; self.ladders.len()];
            // The second time savings are those where the first time ended.
            for _ in 0..2 {
                let sites = self.sites(&counts, &weights);
                let levels = self.all_levels();
                let moves: Vec<_> = allocate::hull(&sites).iter().map(|m| (m.site, levels[m.site][m.level])).collect();
                let found = self.cut_off(&moves, &weights);
                let loss = self.predicted(&found);
                if greedy.as_ref().is_none_or(|(least, ..)| loss < *least) {
                    greedy = Some((loss, found.clone(), weights.clone()));
                }
                counts = found;
            }
        }
        let (greedy_loss, counts, weights) = greedy.unwrap_or_default();
        let dynamic = self.by_program(&counts, &weights);
        let dynamic_loss = dynamic.as_ref().map(|d| self.predicted(d));
        let (way, counts) = match (dynamic, dynamic_loss) {
            (Some(d), Some(loss)) if loss < greedy_loss => (Way::Dynamic, d),
            _ => (Way::Greedy, counts),
        };
        (counts, Allocation { curves: how.to_string(), way, greedy_loss, dynamic_loss })
    }

    /// The dynamic program around a point, brought to the budget.
    fn by_program(&self, base: &[usize], weights: &BTreeMap<Measure, f64>) -> Option<Counts> {
        let sites = self.sites(base, weights);
        let levels = self.all_levels();
        // What single savings at the point say of it, beside what it really saves.
        let alone: f64 = base.iter().enumerate().map(|(i, n)| interpolated(&levels[i], &sites[i].saved, *n)).sum();
        let needed = 1.0 - self.saved(&self.cost(base), weights) + alone;
        // The last bit of a sum must not decide.
        let chosen = allocate::dynamic(&sites, needed * (1.0 - 1e-12), BINS)?;
        let counts = chosen.iter().zip(&levels).map(|(level, levels)| levels[*level]).collect();
        let counts = self.repaired(counts, weights);
        self.is_met(&self.cost(&counts)).then(|| self.given_back(counts, weights))
    }

    /// Further stops, the least loss per saving first, until the targets are met.
    fn repaired(&self, counts: Counts, weights: &BTreeMap<Measure, f64>) -> Counts {
        let mut at = self.point(counts);
        if self.is_met(&at.cost) {
            return at.counts;
        }
        let (sites, levels) = (self.sites(&at.counts, weights), self.all_levels());
        while !self.is_met(&at.cost) {
            let slope = |i: usize| {
                let (old, n) = (at.counts[i], self.ladders[i].behind(at.counts[i])?);
                let saved = |n: usize| interpolated(&levels[i], &sites[i].saved, n);
                let saving = (saved(n) - saved(old)).max(f64::MIN_POSITIVE);
                Some((i, n, (self.loss[i][n] - self.loss[i][old]) / saving))
            };
            let Some((i, n, _)) = (0..self.ladders.len()).filter_map(slope).min_by(|a, b| a.2.total_cmp(&b.2)) else { break };
            self.go(&mut at, i, n);
        }
        at.counts
    }

    /// Gives back what the targets leave room for: stops that lose most per saving first, whole levels before single ones.
    fn given_back(&self, counts: Counts, weights: &BTreeMap<Measure, f64>) -> Counts {
        let (sites, levels) = (self.sites(&counts, weights), self.all_levels());
        let mut at = self.point(counts);
        let one_level = |i: usize, n: usize| levels[i][..levels[i].partition_point(|l| *l < n)].last().copied();
        let one_stop = |i: usize, n: usize| self.ladders[i].before(n);
        for less in [&one_level as &dyn Fn(usize, usize) -> Option<usize>, &one_stop] {
            let mut open = vec![true; self.ladders.len()];
            loop {
                let worth = |i: usize| {
                    let (old, n) = (at.counts[i], less(i, at.counts[i])?);
                    let saved = |n: usize| interpolated(&levels[i], &sites[i].saved, n);
                    let saving = (saved(old) - saved(n)).max(f64::MIN_POSITIVE);
                    Some((i, n, (self.loss[i][old] - self.loss[i][n]) / saving))
                };
                let candidates = (0..self.ladders.len()).filter(|i| open[*i]).filter_map(worth);
                let Some((i, n, _)) = candidates.max_by(|a, b| a.2.total_cmp(&b.2).then(b.0.cmp(&a.0))) else { break };
                let old = at.counts[i];
                self.go(&mut at, i, n);
                if !self.is_met(&at.cost) {
                    self.go(&mut at, i, old);
                    open[i] = false;
                }
            }
        }
        at.counts
    }
}

/// Fills in what lies between two known levels: on a line where the middle is, as costs are polynomials of sizes, else by halves.
fn between(levels: &[usize], saved: &mut [f64], (low, high): (usize, usize), at: &mut dyn FnMut(usize) -> f64) {
    if high - low < 2 {
        return;
    }
    let (a, b) = (saved[low], saved[high]);
    let (start, length) = (levels[low] as f64, (levels[high] - levels[low]) as f64);
    let line = |level: usize| a + (b - a) * (levels[level] as f64 - start) / length;
    let middle = (low + high) / 2;
    saved[middle] = at(middle);
    if (saved[middle] - line(middle)).abs() <= 1e-12 * (1.0 + b.abs()) {
        (low + 1..high).for_each(|level| saved[level] = line(level));
        return;
    }
    between(levels, saved, (low, middle), at);
    between(levels, saved, (middle, high), at);
}

/// A value between levels.
fn interpolated(levels: &[usize], values: &[f64], n: usize) -> f64 {
    let above = levels.partition_point(|l| *l < n).min(levels.len() - 1);
    if levels[above] == n || above == 0 {
        return values[above];
    }
    let (low, high) = (levels[above - 1] as f64, levels[above] as f64);
    values[above - 1] + (values[above] - values[above - 1]) * (n as f64 - low) / (high - low)
}
