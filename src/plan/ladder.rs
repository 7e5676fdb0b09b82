//! What goes first: the steps of a group, in the order of its scores, and the widths where they may stop.

use super::choose::{ChooseError, Limits};
use super::file::Layout;
use crate::anatomy::Group;
use crate::score::Scores;
use std::collections::BTreeSet;

/// Widths of heads of their own are multiples of this where nothing else is asked: few widths, so few products.
const WIDTHS_ROUND: usize = 8;

/// The steps of one group: what goes first, one dim of every head at a time; or of one head, where heads have widths of their own.
pub(super) struct Ladder<'a> {
    pub(super) group: &'a Group,
    /// Where each head has a width of its own: widths are multiples of this.
    pub(super) own_widths: Option<usize>,
    /// Steps in the order of removal: units that go, and their score.
    pub(super) steps: Vec<(Vec<usize>, f64)>,
    /// Numbers of steps where it may stop, ascending, 0 first.
    pub(super) stops: Vec<usize>,
}

pub(super) fn ladder<'a>(group: &'a Group, scores: &Scores, limits: &Limits) -> Result<Ladder<'a>, ChooseError> {
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
    let least = limits.min_widths.get(&group.kind).copied().unwrap_or(0);
    let round = if limits.round > 1 { limits.round } else { WIDTHS_ROUND };
    // Heads that a table for all of them meets, or that share their dims, stay alike.
    let is_free = group.spread.is_empty() && group.sharers.is_empty() && group.run == 1;
    let has_own = limits.layout == Layout::Grouped && group.nest.len() == 1 && group.nest_count() > 1 && is_free;
    if let Some(round) = has_own.then_some(if width > round { round } else { 1 }) {
        // Each head keeps its best dims, and no fewer than it must.
        let mut steps: Vec<(Vec<usize>, f64)> = rows
            .into_iter()
            .flat_map(|r| {
                let per_step = r.first().map_or(1, |(_, bundle)| bundle.len()).max(1);
                let n = r.len().saturating_sub(least.div_ceil(per_step).max(1));
                r.into_iter().take(n)
            })
            .map(|(s, u)| (u, s))
            .collect();
        steps.sort_by(|a, b| a.1.total_cmp(&b.1).then_with(|| b.0.cmp(&a.0)));
        return Ok(Ladder { group, own_widths: Some(round), steps, stops: Vec::new() }.with_stops(limits.round));
    }
    let spare = usize::from(pinned.is_empty());
    let step_count = rows.iter().map(Vec::len).min().unwrap_or(0).saturating_sub(spare);
    let steps = (0..step_count)
        .map(|n| {
            let score = rows.iter().map(|r| r[n].0).sum();
            (rows.iter().flat_map(|r| r[n].1.iter().copied()).collect(), score)
        })
        .collect();
    let mut ladder = Ladder { group, own_widths: None, steps, stops: Vec::new() };
    let enough = (0..=ladder.steps.len()).rev().find(|n| ladder.width_after(*n) >= least).unwrap_or(0);
    ladder.steps.truncate(enough);
    Ok(ladder.with_stops(limits.round))
}

impl Ladder<'_> {
    fn with_stops(mut self, round: usize) -> Self {
        self.stops = self.stops(round);
        self
    }

    /// Units that stay after `n` steps.
    pub(super) fn kept(&self, n: usize) -> Vec<usize> {
        let mut gone: BTreeSet<usize> = self.steps[..n].iter().flat_map(|(units, _)| units.iter().copied()).collect();
        if let Some(round) = self.own_widths {
            // What went last of a head comes back until its width is a multiple.
            let width = self.group.stored.len();
            let mut left = vec![width; self.group.nest_count()];
            gone.iter().for_each(|u| left[u / width] -= 1);
            for (units, _) in self.steps[..n].iter().rev() {
                let head = units[0] / width;
                if !left[head].is_multiple_of(round) && left[head] < width {
                    left[head] += units.len();
                    units.iter().for_each(|u| {
                        gone.remove(u);
                    });
                }
            }
        }
        (0..self.group.units()).filter(|u| !gone.contains(u)).collect()
    }

    /// Stored dims per head after `n` steps; their mean, rounded up, where heads have widths of their own.
    pub(super) fn width_after(&self, n: usize) -> usize {
        if self.own_widths.is_some() {
            return self.kept(n).len().div_ceil(self.group.nest_count());
        }
        let heads = self.group.nest_count() * self.group.sharing();
        let per_head = self.steps.first().map_or(1, |(u, _)| u.len() / heads.max(1));
        self.group.width() - n * per_head
    }

    /// Positions of the class that `n` steps take away, per head.
    pub(super) fn lost(&self, n: usize) -> usize {
        match self.own_widths {
            None => n,
            Some(_) => {
                let per_step = self.steps.first().map_or(1, |(u, _)| u.len()).max(1);
                (self.group.stored.len() - self.width_after(n)) / per_step
            }
        }
    }

    /// Units that stay after `n` steps, over all heads.
    pub(super) fn units_after(&self, n: usize) -> usize {
        if self.own_widths.is_some() {
            return self.kept(n).len();
        }
        self.group.units() - n * self.steps.first().map_or(0, |(u, _)| u.len())
    }

    /// Numbers of steps that may be taken: those that leave a rounded width, and none at all.
    fn stops(&self, round: usize) -> Vec<usize> {
        let is_free = self.own_widths.is_some() || round <= 1 || self.group.width() < round;
        (0..=self.steps.len()).filter(|n| *n == 0 || is_free || self.width_after(*n).is_multiple_of(round)).collect()
    }

    /// The greatest number of steps up to `n` where it may stop.
    pub(super) fn rounded(&self, n: usize) -> usize {
        self.stops[..self.stops.partition_point(|stop| *stop <= n)].last().copied().unwrap_or(0)
    }

    /// The next stop with fewer steps than `n`.
    pub(super) fn before(&self, n: usize) -> Option<usize> {
        self.stops[..self.stops.partition_point(|stop| *stop < n)].last().copied()
    }

    /// The next stop with more steps than `n`.
    pub(super) fn behind(&self, n: usize) -> Option<usize> {
        self.stops.get(self.stops.partition_point(|stop| *stop <= n)).copied()
    }
}
