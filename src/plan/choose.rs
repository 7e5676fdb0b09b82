//! What is asked for, and the units that stay.

use super::budget::steps_for_budget;
use super::curve::Losses;
use super::file::{Allocation, Kept, Layout};
use super::ladder::{Ladder, ladder};
use crate::anatomy::{Anatomy, Group, Kind};
use crate::cost::{Cost, Model};
use crate::score::Scores;
use std::collections::{BTreeMap, BTreeSet};

/// What is asked for.
#[derive(Clone, Debug, PartialEq)]
pub enum Ask {
    /// A fraction of the units.
    Fractions(Fractions),
    /// A fraction of the cost.
    Budget {
        /// What to keep of each measure; all of them hold.
        targets: Targets,
        /// Kinds that may be cut.
        kinds: BTreeSet<Kind>,
    },
}

/// Fractions of the units to keep.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Fractions {
    /// By kind.
    pub kinds: BTreeMap<Kind, f64>,
    /// By group id; these come before those of the kind.
    pub groups: BTreeMap<String, f64>,
}

impl<const N: usize> From<[(Kind, f64); N]> for Fractions {
    fn from(kinds: [(Kind, f64); N]) -> Self {
        Self { kinds: kinds.into(), groups: BTreeMap::new() }
    }
}

impl Fractions {
    /// Kinds that it speaks of.
    pub fn kinds_of(&self, anatomy: &Anatomy) -> BTreeSet<Kind> {
        let alone = anatomy.groups.iter().filter(|g| self.groups.contains_key(&g.id)).map(|g| g.kind);
        self.kinds.keys().copied().chain(alone).collect()
    }

    fn of(&self, group: &Group) -> Option<f64> {
        self.groups.get(&group.id).or_else(|| self.kinds.get(&group.kind)).copied()
    }
}

/// What a budget counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Measure {
    /// Multiply-accumulates per sample.
    Macs,
    /// Parameters.
    Params,
    /// Bytes of constants as they are stored.
    Bytes,
}

/// Fractions of the cost to keep.
pub type Targets = BTreeMap<Measure, f64>;

impl Measure {
    /// All measures.
    pub const ALL: [Measure; 3] = [Measure::Macs, Measure::Params, Measure::Bytes];

    /// The word of a budget: `macs`.
    pub fn as_str(self) -> &'static str {
        match self {
            Measure::Macs => "macs",
            Measure::Params => "params",
            Measure::Bytes => "bytes",
        }
    }

    /// As a sentence names it: `MACs`.
    pub fn name(self) -> &'static str {
        match self {
            Measure::Macs => "MACs",
            Measure::Params | Measure::Bytes => self.as_str(),
        }
    }

    /// How often `part` goes into `whole`; 1 where that is not known.
    pub fn ratio(self, whole: &Cost, part: &Cost) -> f64 {
        let (whole, part) = match self {
            Measure::Macs => (whole.macs.unwrap_or(0), part.macs.unwrap_or(0)),
            Measure::Params => (whole.params, part.params),
            Measure::Bytes => (whole.bytes, part.bytes),
        };
        if whole == 0 || part == 0 { 1.0 } else { whole as f64 / part as f64 }
    }

    /// A cost as a fraction of the whole; 0 where it is not known.
    pub(super) fn share(self, cost: &Cost, whole: &Cost) -> f64 {
        let (part, whole) = match self {
            Measure::Macs => (cost.macs.unwrap_or(0), whole.macs.unwrap_or(0)),
            Measure::Params => (cost.params, whole.params),
            Measure::Bytes => (cost.bytes, whole.bytes),
        };
        part as f64 / whole.max(1) as f64
    }
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
    /// How the heads of a layer may differ.
    pub layout: Layout,
    /// Dims of each head, or units, that must stay, by kind.
    pub min_widths: BTreeMap<Kind, usize>,
    /// What widths lose: where it is given, a budget is met by it, and scores say only which units of a group go first. Groups that
    /// it does not know are left alone.
    pub losses: Option<Losses>,
    /// Whether savings that change no output are made: what they save need not be cut.
    pub is_exact: bool,
}

/// What was chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Chosen {
    /// Units that stay, of the groups that lose some.
    pub kept: Kept,
    /// How losses decided, where they did.
    pub allocation: Option<Allocation>,
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
        /// `MACs`, `params` or `bytes`.
        what: &'static str,
        /// Unit: percent.
        smallest: f64,
        /// Unit: percent.
        asked: f64,
    },
    /// MACs are not known.
    #[error("a size of the model is not known, so MACs cannot be counted: give it with --size NAME=N")]
    UnknownMacs,
    /// A fraction is asked of a group that is not there.
    #[error("--keep: the model has no group '{0}'; see vitrim inspect")]
    UnknownGroup(String),
    /// No group that may be cut has a curve.
    #[error("no group that may be cut has a curve of losses; the curves know {known}")]
    NoCurve {
        /// Groups that have one.
        known: String,
    },
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

/// Chooses the units that stay.
pub fn choose(anatomy: &Anatomy, scores: &Scores, ask: &Ask, limits: &Limits, model: &Model<'_>) -> Result<Chosen, ChooseError> {
    let scores = &scores_of_heads(anatomy, scores, limits.layout);
    let may_go = |g: &Group| match ask {
        Ask::Fractions(f) => f.of(g).is_some(),
        Ask::Budget { kinds, .. } => kinds.contains(&g.kind) || limits.layout == Layout::Drop && g.kind == Kind::Head,
    };
    if let Ask::Fractions(f) = ask
        && let Some(id) = f.groups.keys().find(|id| anatomy.groups.iter().all(|g| g.id != **id))
    {
        return Err(ChooseError::UnknownGroup(id.clone()));
    }
    let wanted = |g: &&Group| may_go(g) && !limits.protected.contains(&g.id);
    let mut ladders = anatomy.groups.iter().filter(wanted).map(|g| ladder(g, scores, limits)).collect::<Result<Vec<_>, _>>()?;
    if ladders.iter().all(|l| l.steps.is_empty()) {
        return Err(nothing_to_cut(anatomy));
    }
    let (counts, allocation) = match ask {
        Ask::Fractions(f) => (ladders.iter().map(|l| steps_for_fraction(l, f.of(l.group).unwrap_or(1.0))).collect(), None),
        Ask::Budget { targets, .. } => {
            if let Some(losses) = &limits.losses {
                let is_known =
                    |l: &Ladder<'_>| losses.groups.get(&l.group.id).is_some_and(|p| p.iter().any(|(w, _)| *w < l.group.units()));
                ladders.retain(is_known);
                if ladders.is_empty() {
                    let known: Vec<&str> = losses.groups.keys().map(String::as_str).take(5).collect();
                    return Err(ChooseError::NoCurve { known: if known.is_empty() { "none".into() } else { known.join(", ") } });
                }
            }
            steps_for_budget(&ladders, targets, limits.losses.as_ref(), model)?
        }
    };
    let mut kept = kept_tokens(&ladders, &counts, scores, limits);
    let cut = ladders.iter().zip(&counts).filter(|(l, n)| **n > 0 && l.group.kind != Kind::Token);
    kept.extend(cut.map(|(l, n)| (l.group.id.clone(), l.kept(*n))));
    Ok(Chosen { kept, allocation })
}

/// With layout `drop` a head is worth what its dims are worth, so that heads and dims compare.
fn scores_of_heads(anatomy: &Anatomy, scores: &Scores, layout: Layout) -> Scores {
    let mut out = scores.clone();
    for head in anatomy.groups.iter().filter(|g| g.kind == Kind::Head && layout == Layout::Drop) {
        let of_head = |g: &&Group| matches!(g.nest[..], [(class, _)] if class == head.leaf);
        let nested = anatomy.groups.iter().filter(of_head).filter_map(|g| Some((g, scores.groups.get(&g.id)?)));
        let mut sums = vec![0f64; head.units()];
        let mut found = false;
        for (group, values) in nested.filter(|(g, v)| v.len() == g.units()) {
            found = true;
            values.iter().enumerate().for_each(|(unit, v)| sums[unit / group.stored.len()] += f64::from(*v));
        }
        if found {
            out.groups.insert(head.id.clone(), sums.into_iter().map(|s| s as f32).collect());
        }
    }
    out
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

fn steps_for_fraction(ladder: &Ladder<'_>, fraction: f64) -> usize {
    let width = ladder.group.width();
    let target = (fraction * width as f64).round() as usize;
    let n = (0..=ladder.steps.len()).find(|n| ladder.width_after(*n) <= target).unwrap_or(ladder.steps.len());
    ladder.rounded(n)
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
