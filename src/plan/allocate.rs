//! How much goes where: of several sites with levels, one level each, so that enough is saved and little is lost.
//!
//! Two ways. [`hull`]: along the convex hulls of loss against saving, the least loss per saving first; wherever it stops, no choice
//! that saves as much loses less (the solution of the Lagrangian), and what it loses beyond the best choice that saves enough is at
//! most the loss of the move that it stopped in. [`dynamic`]: the multiple-choice knapsack by dynamic programming over what is
//! saved, in bins; exact while each sum has a bin of its own, else off by at most a bin's width of saving per site.
//! Example: levels (saving, loss) (0, 0), (4, 1), (5, 9) and (0, 0), (2, 2), asked for 6: the first site's second level and the
//! second site's last.

/// One thing to decide. Level 0 saves and loses nothing; further levels lose more, and mostly save more.
#[derive(Clone, Debug, Default)]
pub(super) struct Site {
    /// What each level saves.
    pub(super) saved: Vec<f64>,
    /// What each level loses.
    pub(super) loss: Vec<f64>,
}

/// A site goes to a level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Move {
    pub(super) site: usize,
    pub(super) level: usize,
}

/// Levels on the lower convex hull of loss against saving, 0 included.
fn corners(site: &Site) -> Vec<usize> {
    let mut hull: Vec<usize> = vec![0];
    for level in 1..site.saved.len() {
        // Of equal savings the earlier level loses less.
        if site.saved[level] <= site.saved[*hull.last().unwrap_or(&0)] {
            continue;
        }
        while let [.., a, b] = hull[..] {
            if slope(site, a, b) < slope(site, a, level) {
                break;
            }
            hull.pop();
        }
        hull.push(level);
    }
    hull
}

/// Loss per saving from one level to another.
fn slope(site: &Site, from: usize, to: usize) -> f64 {
    (site.loss[to] - site.loss[from]) / (site.saved[to] - site.saved[from])
}

/// Moves along the hulls, the least loss per saving first.
pub(super) fn hull(sites: &[Site]) -> Vec<Move> {
    let mut moves: Vec<(f64, Move)> = Vec::new();
    for (number, site) in sites.iter().enumerate() {
        let hull = corners(site);
        moves.extend(hull.windows(2).map(|w| (slope(site, w[0], w[1]), Move { site: number, level: w[1] })));
    }
    moves.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.level.cmp(&b.1.level)).then(a.1.site.cmp(&b.1.site)));
    moves.into_iter().map(|(_, m)| m).collect()
}

/// The best that was found for a bin: what it loses and saves, and how it came about.
#[derive(Clone, Copy)]
struct State {
    loss: f64,
    saved: f64,
}

/// Levels, one per site, that save `needed` together and lose least; `None` where no choice saves so much.
///
/// States keep what they really save. Bins, to which savings are rounded, only say which states compete.
pub(super) fn dynamic(sites: &[Site], needed: f64, bins: usize) -> Option<Vec<usize>> {
    let whole = needed <= bins as f64 && sites.iter().flat_map(|s| &s.saved).all(|s| s.fract() == 0.0);
    let scale = if whole { 1.0 } else { bins as f64 / needed.max(f64::MIN_POSITIVE) };
    // The last bin has all that save enough, and nothing else.
    let last = (needed * scale).ceil().max(1.0) as usize;
    let bin = |saved: f64| if saved >= needed { last } else { ((saved * scale).round().max(0.0) as usize).min(last - 1) };
    let mut states: Vec<Option<State>> = vec![None; last + 1];
    states[bin(0.0)] = Some(State { loss: 0.0, saved: 0.0 });
    let mut came: Vec<Vec<(u32, u32)>> = Vec::with_capacity(sites.len());
    for site in sites {
        let mut next: Vec<Option<State>> = vec![None; last + 1];
        let mut from = vec![(0u32, 0u32); last + 1];
        for (at, state) in states.iter().enumerate() {
            let Some(state) = state else { continue };
            for (level, (saved, loss)) in site.saved.iter().zip(&site.loss).enumerate() {
                let new = State { loss: state.loss + loss, saved: state.saved + saved };
                let to = bin(new.saved);
                let is_better = |old: State| (new.loss, -new.saved) < (old.loss, -old.saved);
                if next[to].is_none_or(is_better) {
                    next[to] = Some(new);
                    from[to] = (at as u32, level as u32);
                }
            }
        }
        states = next;
        came.push(from);
    }
    states[last]?;
    let mut at = last;
    let mut levels: Vec<usize> = came
        .iter()
        .rev()
        .map(|from| {
            let (before, level) = from[at];
            at = before as usize;
            level as usize
        })
        .collect();
    levels.reverse();
    Some(levels)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers by chance, from a seed.
    struct Chance(u64);

    impl Chance {
        fn below(&mut self, n: u64) -> u64 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 33) % n
        }

        /// Sites with growing savings and losses; convex where asked.
        fn sites(&mut self, is_convex: bool, unit: u64) -> Vec<Site> {
            let one = |chance: &mut Self| {
                let levels = 2 + chance.below(5) as usize;
                let mut rises: Vec<(u64, f64)> =
                    (1..levels).map(|_| (1 + chance.below(9 * unit), chance.below(1000) as f64 / 100.0)).collect();
                if is_convex {
                    rises.sort_by(|a, b| (a.1 / a.0 as f64).total_cmp(&(b.1 / b.0 as f64)));
                }
                let (mut saved, mut loss) = (vec![0.0], vec![0.0]);
                for (n, (s, l)) in rises.iter().enumerate() {
                    saved.push(saved[n] + *s as f64);
                    loss.push(loss[n] + l);
                }
                Site { saved, loss }
            };
            let count = 1 + self.below(5);
            (0..count).map(|_| one(self)).collect()
        }
    }

    fn total(sites: &[Site], levels: &[usize]) -> (f64, f64) {
        let pairs = || sites.iter().zip(levels);
        (pairs().map(|(s, l)| s.saved[*l]).sum(), pairs().map(|(s, l)| s.loss[*l]).sum())
    }

    /// The least loss of all choices that save so much.
    fn best(sites: &[Site], needed: f64) -> Option<f64> {
        let mut levels = vec![0; sites.len()];
        let mut best: Option<f64> = None;
        loop {
            let (saved, loss) = total(sites, &levels);
            if saved >= needed && best.is_none_or(|b| loss < b) {
                best = Some(loss);
            }
            let Some(next) = (0..sites.len()).find(|i| levels[*i] + 1 < sites[*i].saved.len()) else { return best };
            levels[next] += 1;
            levels[..next].fill(0);
        }
    }

    /// Levels where the hull's moves first save enough, and what the last of them loses.
    fn stopped(sites: &[Site], needed: f64) -> Option<(Vec<usize>, f64)> {
        let mut levels = vec![0; sites.len()];
        let mut last = 0.0;
        let mut moves = hull(sites).into_iter();
        while total(sites, &levels).0 < needed {
            let m = moves.next()?;
            let site = &sites[m.site];
            last = site.loss[m.level] - site.loss[levels[m.site]];
            assert!(m.level > levels[m.site], "a hull goes up");
            levels[m.site] = m.level;
        }
        Some((levels, last))
    }

    fn everything(sites: &[Site]) -> f64 {
        sites.iter().map(|s| s.saved[s.saved.len() - 1]).sum()
    }

    const TRIALS: u64 = 400;

    #[test]
    fn dynamic_programming_finds_the_best_where_every_sum_has_its_bin() {
        for seed in 0..TRIALS {
            let mut chance = Chance(seed);
            let sites = chance.sites(seed.is_multiple_of(2), 1);
            let all = everything(&sites);
            let mut before = 0.0;
            for tenth in 1..=10 {
                let needed = (all * f64::from(tenth) / 10.0).floor();
                let levels = dynamic(&sites, needed, 4096).unwrap();
                let (saved, loss) = total(&sites, &levels);
                assert!(saved >= needed, "seed {seed}: {saved} of {needed}");
                assert!((loss - best(&sites, needed).unwrap()).abs() < 1e-9, "seed {seed}, {needed}: {sites:?}");
                // What saves more never loses less.
                assert!(loss >= before - 1e-9, "seed {seed}: {loss} after {before}");
                before = loss;
            }
            assert!(dynamic(&sites, all + 1.0, 4096).is_none());
        }
    }

    #[test]
    fn dynamic_programming_in_few_bins_is_off_by_a_bin_per_site() {
        const BINS: usize = 64;
        for seed in 0..TRIALS {
            let mut chance = Chance(seed);
            let sites = chance.sites(seed.is_multiple_of(2), 1000);
            let needed = everything(&sites) * 0.6;
            let levels = dynamic(&sites, needed, BINS).unwrap();
            let (saved, loss) = total(&sites, &levels);
            let slack = needed / BINS as f64 * sites.len() as f64;
            assert!(saved >= needed, "seed {seed}");
            let bound = best(&sites, needed + slack).unwrap_or(f64::INFINITY);
            assert!(loss <= bound + 1e-9, "seed {seed}: {loss} of {bound}");
        }
    }

    #[test]
    fn the_hull_loses_at_most_its_last_move_more_than_the_best() {
        for seed in 0..TRIALS {
            let mut chance = Chance(seed);
            let sites = chance.sites(seed.is_multiple_of(2), 1);
            for tenth in 1..=9 {
                let needed = everything(&sites) * f64::from(tenth) / 10.0;
                let (levels, last) = stopped(&sites, needed).unwrap();
                let (saved, loss) = total(&sites, &levels);
                assert!(saved >= needed);
                assert!(loss <= best(&sites, needed).unwrap() + last + 1e-9, "seed {seed}, {needed}: {sites:?}");
                // Where it stopped nothing better saves as much.
                assert!((loss - best(&sites, saved).unwrap()).abs() < 1e-9, "seed {seed}, {saved}: {sites:?}");
            }
        }
    }

    #[test]
    fn corners_leave_out_what_lies_above_the_hull() {
        let site = Site { saved: vec![0.0, 4.0, 5.0, 5.0, 8.0], loss: vec![0.0, 1.0, 9.0, 9.5, 10.0] };
        assert_eq!(corners(&site), [0, 1, 4]);
        let moves = hull(&[site, Site { saved: vec![0.0, 2.0], loss: vec![0.0, 2.0] }]);
        assert_eq!(moves, [Move { site: 0, level: 1 }, Move { site: 1, level: 1 }, Move { site: 0, level: 4 }]);
    }
}
