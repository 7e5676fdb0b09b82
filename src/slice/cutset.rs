//! What a plan removes, seen from any axis of the graph.
//!
//! A head may keep dims of its own, so on the axis `E` of `[B, H, N, E]` positions have no fate of their own: there the first head
//! that stays stands for all, and only the number that stays counts. On a flat axis of `H x E` each position has its fate.

use crate::anatomy::{Anatomy, Group, Kind};
use crate::axes::{AxisOf, CarrierId, ClassId, Region};
use crate::graph::Use;
use crate::plan::Kept;
use std::collections::{BTreeMap, BTreeSet};

/// Why units cannot be removed as asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CutError {
    /// The plan names a group that the model does not have.
    #[error("plan names group '{0}', which the model does not have")]
    UnknownGroup(String),
    /// The plan names a unit that the group does not have.
    #[error("plan keeps unit {unit} of group '{group}', which has {units}")]
    UnknownUnit {
        /// The group.
        group: String,
        /// The unit.
        unit: usize,
        /// How many units there are.
        units: usize,
    },
    /// Dims that go together are torn apart.
    #[error("plan keeps unit {unit} of group '{group}' without its partner {partner}")]
    TornPair {
        /// The group.
        group: String,
        /// The kept unit.
        unit: usize,
        /// The one that must stay with it.
        partner: usize,
    },
    /// Heads of a layer keep different numbers of dims, and cannot be told apart.
    #[error("heads of group '{group}' cannot keep different numbers of dims: {why}")]
    Apart {
        /// The group.
        group: String,
        /// What stands in the way.
        why: String,
    },
    /// A group loses everything, and a node cannot do without it.
    #[error("plan keeps nothing of group '{group}', and node {node} ({op}) cannot do without it: {why}")]
    Needed {
        /// The group.
        group: String,
        /// The node.
        node: String,
        /// Its operator.
        op: String,
        /// What it needs.
        why: String,
    },
    /// Without the layers that lose all units there is no place to shorten the sequence.
    #[error(
        "the tokens of group '{0}' cannot go: beside the units that the plan removes no attention layer is left to shorten them at"
    )]
    NoSite(String),
    /// A sequence of no tokens.
    #[error("plan keeps no token of group '{0}'")]
    NoToken(String),
}

/// What stays of an axis.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stays {
    /// Everything.
    Whole,
    /// These positions, in order.
    Positions(Vec<usize>),
    /// Fewer, on an axis whose size is only known at run time (`batch * heads`).
    Scaled,
    /// A different number in different cases: the value is not a block any more.
    Ragged,
}

/// One group's removal.
struct Removal<'a> {
    group: &'a Group,
    /// Removed (row of the nest, coordinate of the leaf).
    gone: BTreeSet<(usize, usize)>,
}

/// All removals of a plan.
pub struct CutSet<'a> {
    anatomy: &'a Anatomy,
    removals: Vec<Removal<'a>>,
    /// For classes that lose whole positions: the first one that stays.
    stand_in: BTreeMap<ClassId, usize>,
    /// Numbers of the removals that cut a class.
    of_class: BTreeMap<ClassId, Vec<usize>>,
    /// Numbers of the removals that a use spreads.
    spread: BTreeMap<Use, Vec<usize>>,
    /// For classes of heads of unlike width: the heads of each width, the widest first.
    widths: BTreeMap<ClassId, Vec<Vec<usize>>>,
}

/// The heads of one width: their class, and their number among the widths.
pub type HeadsOf = (ClassId, usize);

impl<'a> CutSet<'a> {
    /// Checks what a plan keeps and turns it around.
    pub fn new(anatomy: &'a Anatomy, kept: &Kept) -> Result<Self, CutError> {
        let by_id: BTreeMap<&str, &Group> = anatomy.groups.iter().map(|g| (g.id.as_str(), g)).collect();
        let mut removals = Vec::new();
        for (id, units) in kept {
            let group = by_id.get(id.as_str()).copied().ok_or_else(|| CutError::UnknownGroup(id.clone()))?;
            let gone = gone_of(group, units)?;
            let is_pinned = |g: &Group| anatomy.tokens.sites.iter().any(|s| s.layer == g.layer && !s.pinned.is_empty());
            if group.kind == Kind::Token && units.is_empty() && !is_pinned(group) {
                return Err(CutError::NoToken(id.clone()));
            }
            if !gone.is_empty() && group.kind != Kind::Token {
                removals.push(Removal { group, gone });
            }
        }
        let mut stand_in = BTreeMap::new();
        for r in removals.iter().filter(|r| r.group.nest.is_empty()) {
            let size = anatomy.axes.classes()[r.group.leaf].size.unwrap_or(0);
            let first = (0..size).find(|c| !r.gone.contains(&(0, *c))).unwrap_or(0);
            stand_in.insert(r.group.leaf, first);
        }
        let mut of_class: BTreeMap<ClassId, Vec<usize>> = BTreeMap::new();
        let mut spread: BTreeMap<Use, Vec<usize>> = BTreeMap::new();
        for (number, r) in removals.iter().enumerate() {
            of_class.entry(r.group.leaf).or_default().push(number);
            r.group.spread.iter().for_each(|at| spread.entry(*at).or_default().push(number));
        }
        let mut set = Self { anatomy, removals, stand_in, of_class, spread, widths: BTreeMap::new() };
        set.widths = set.find_widths()?;
        Ok(set)
    }

    /// Sorts the heads of each layer by the numbers of dims that they keep, where these differ.
    fn find_widths(&self) -> Result<BTreeMap<ClassId, Vec<Vec<usize>>>, CutError> {
        let mut unlike = BTreeSet::new();
        for r in self.removals.iter().filter(|r| r.group.nest_count() > 1) {
            let rows = (0..r.group.nest_count()).filter(|row| !self.row_is_gone(r.group, *row));
            let counts: BTreeSet<usize> = rows.map(|row| r.gone.range((row, 0)..(row + 1, 0)).count()).collect();
            match &r.group.nest[..] {
                _ if counts.len() < 2 => {}
                [(class, _)] => {
                    unlike.insert(*class);
                }
                _ => {
                    let why = "they are numbered by more than one axis".to_string();
                    return Err(CutError::Apart { group: r.group.id.clone(), why });
                }
            }
        }
        let mut widths = BTreeMap::new();
        for class in unlike {
            let of_class: Vec<&Removal<'_>> =
                self.removals.iter().filter(|r| r.group.nest.first().is_some_and(|(c, _)| *c == class)).collect();
            let Some(first) = of_class.first() else { continue };
            if let Some(r) = of_class.iter().find(|r| !r.group.spread.is_empty()) {
                let why = "a table for all of them, of a rotation, meets them".to_string();
                return Err(CutError::Apart { group: r.group.id.clone(), why });
            }
            let mut by_width: BTreeMap<Vec<usize>, Vec<usize>> = BTreeMap::new();
            for head in (0..first.group.nest_count()).filter(|row| !self.row_is_gone(first.group, *row)) {
                let lost = of_class.iter().map(|r| r.gone.range((head, 0)..(head + 1, 0)).count()).collect();
                by_width.entry(lost).or_default().push(head);
            }
            widths.insert(class, by_width.into_values().collect());
        }
        Ok(widths)
    }

    /// Classes of heads of unlike width, and the heads of each width.
    pub fn widths(&self) -> &BTreeMap<ClassId, Vec<Vec<usize>>> {
        &self.widths
    }

    /// The group that a class of heads is known by to the user.
    pub fn name_of_heads(&self, class: ClassId) -> String {
        let nested = self.removals.iter().find(|r| r.group.nest.first().is_some_and(|(c, _)| *c == class));
        nested.map(|r| r.group.id.clone()).unwrap_or_default()
    }

    /// Groups of which nothing is left, in the order of the plan.
    pub fn emptied(&self) -> Vec<&'a Group> {
        let size = |r: &Removal<'_>| self.anatomy.axes.classes()[r.group.leaf].size.unwrap_or(0);
        let is_row_empty = |r: &Removal<'_>, row: usize| r.gone.range((row, 0)..(row + 1, 0)).count() == size(r);
        let is_empty =
            |r: &&Removal<'a>| (0..r.group.nest_count()).all(|row| is_row_empty(r, row) || self.row_is_gone(r.group, row));
        self.removals.iter().filter(is_empty).map(|r| r.group).collect()
    }

    /// Removals that cut a class.
    fn of_class(&self, class: ClassId) -> impl Iterator<Item = &Removal<'a>> {
        self.of_class.get(&class).into_iter().flatten().map(|number| &self.removals[*number])
    }

    /// Whether a head that the group's units are nested in is removed as a whole.
    fn row_is_gone(&self, group: &Group, row: usize) -> bool {
        let mut rest = row;
        for (class, size) in group.nest.iter().rev() {
            let at = rest % size;
            rest /= size;
            if self.of_class(*class).any(|r| r.group.nest.is_empty() && r.gone.contains(&(0, at))) {
                return true;
            }
        }
        false
    }

    /// Number of positions that stay of a class, in each head.
    pub fn class_size(&self, class: ClassId) -> Option<usize> {
        let size = self.anatomy.axes.classes()[class].size?;
        let Some(r) = self.of_class(class).next() else { return Some(size) };
        let row = (0..r.group.nest_count()).find(|row| !self.row_is_gone(r.group, *row)).unwrap_or(0);
        Some(size - r.gone.iter().filter(|(x, _)| *x == row).count())
    }

    /// Whether anything is removed.
    pub fn is_empty(&self) -> bool {
        self.removals.is_empty()
    }

    /// Carriers and axes that lose positions.
    pub fn touched(&self) -> BTreeSet<AxisOf> {
        let members = |r: &'_ Removal<'a>| {
            let all = self.anatomy.axes.classes()[r.group.leaf].members.iter();
            all.filter(|m| !r.group.aside.contains(&m.carrier)).map(|m| (m.carrier, m.axis)).collect::<Vec<_>>()
        };
        self.removals.iter().flat_map(members).collect()
    }

    /// Which positions of a region of a carrier are removed; of a class of heads, all that are not of `heads`.
    fn gone_in(&self, carrier: CarrierId, region: &Region, heads: Option<HeadsOf>) -> Vec<bool> {
        let of_width = heads.and_then(|(class, n)| Some((class, self.widths.get(&class)?.get(n)?)));
        let mut gone = vec![false; region.positions.len()];
        if let Some((class, list)) = of_width {
            for (offset, gone) in gone.iter_mut().enumerate() {
                *gone = region.coordinate(offset, class).is_some_and(|head| !list.contains(&head));
            }
        }
        let first = |class: ClassId| match of_width {
            Some((c, list)) if c == class => list.first().copied(),
            _ => self.stand_in.get(&class).copied(),
        };
        let classes: BTreeSet<ClassId> = region.factors.iter().map(|(c, _)| *c).collect();
        for r in classes.iter().flat_map(|c| self.of_class(*c)).filter(|r| !r.group.aside.contains(&carrier)) {
            for (offset, gone) in gone.iter_mut().enumerate() {
                let of = |class| region.coordinate(offset, class);
                let row = r
                    .group
                    .nest
                    .iter()
                    .fold(0, |row, (class, size)| row * size + of(*class).or_else(|| first(*class)).unwrap_or(0));
                *gone |= of(r.group.leaf).is_some_and(|leaf| r.gone.contains(&(row, leaf)));
            }
        }
        gone
    }

    /// What stays of an axis of a carrier, all cases together.
    pub fn stays(&self, at: AxisOf) -> Stays {
        let sections = self.anatomy.axes.sections(at);
        if sections.is_empty() {
            let cut = self.anatomy.axes.classes_on(at).iter().any(|c| self.of_class.contains_key(c));
            return if cut { Stays::Scaled } else { Stays::Whole };
        }
        // The first section stands for all of them, as long as the others keep as much: in all, and of equal cells.
        let mut counts: BTreeMap<&[usize], usize> = BTreeMap::new();
        let mut first: Option<Vec<usize>> = None;
        let mut lost = false;
        for section in &sections {
            let mut kept: Vec<usize> = Vec::new();
            for region in section {
                let gone = self.gone_in(at.0, region, None);
                lost |= gone.contains(&true);
                let left = region.positions.iter().zip(gone).filter(|(_, gone)| !gone).map(|(p, _)| *p);
                let before = kept.len();
                kept.extend(left);
                let count = kept.len() - before;
                if *counts.entry(&region.positions).or_insert(count) != count {
                    return Stays::Ragged;
                }
            }
            kept.sort_unstable();
            let one = first.get_or_insert_with(|| kept.clone());
            if one.len() != kept.len() {
                return Stays::Ragged;
            }
        }
        let mut kept = first.unwrap_or_default();
        if lost && !self.widths.is_empty() {
            self.sort_by_width(&sections[0], &mut kept);
        }
        if lost { Stays::Positions(kept) } else { Stays::Whole }
    }

    /// Puts heads of one width beside each other: within each part of the axis, or on the whole of it where parts alternate.
    fn sort_by_width(&self, regions: &[Region], kept: &mut [usize]) {
        let is_run = |r: &Region| r.positions.windows(2).all(|w| w[1] == w[0] + 1);
        let in_runs = regions.iter().all(is_run);
        let mut key: BTreeMap<usize, (usize, usize)> = BTreeMap::new();
        for region in regions {
            let Some((k, list)) = (0..region.factors.len()).find_map(|k| Some((k, self.widths.get(&region.factors[k].0)?)))
            else {
                continue;
            };
            // Parts beside each other are sorted each by itself; parts that alternate within a head go with the head.
            if in_runs && !region.factors.iter().any(|(c, _)| self.of_class.contains_key(c)) {
                continue;
            }
            let inner: usize = region.factors[k + 1..].iter().map(|(_, n)| n).product();
            for (offset, position) in region.positions.iter().enumerate() {
                let head = offset / inner % region.factors[k].1;
                let width = list.iter().position(|heads| heads.contains(&head)).unwrap_or(list.len());
                let start = region.positions.first().copied().filter(|_| in_runs).unwrap_or(0);
                key.entry(*position).or_insert((start, width));
            }
        }
        kept.sort_by_key(|p| match key.get(p) {
            Some((start, width)) => (*start, *width, *p),
            None => (if in_runs { *p } else { 0 }, 0, *p),
        });
    }

    /// What stays of an axis of a carrier in one case, and the positions that the case covers; of a class of heads, only `heads`.
    pub fn stays_in_case(&self, at: AxisOf, case: usize, heads: Option<HeadsOf>) -> Option<(Vec<usize>, Vec<usize>)> {
        let region = self.anatomy.axes.region(at, case)?;
        let gone = self.gone_in(at.0, &region, heads);
        let kept = region.positions.iter().zip(gone).filter(|(_, g)| !g).map(|(p, _)| *p).collect();
        Some((kept, region.positions))
    }

    /// Whether nothing is left of an axis.
    pub fn is_emptied(&self, at: AxisOf) -> bool {
        matches!(self.stays(at), Stays::Positions(p) if p.is_empty())
    }

    /// Where constants that hold one value for all heads meet heads that keep different dims.
    pub(super) fn spread(&self) -> BTreeSet<Use> {
        self.spread.keys().copied().collect()
    }

    /// Classes of the heads that keep different dims where `at` reads a constant.
    pub(super) fn heads_at(&self, at: Use) -> BTreeSet<ClassId> {
        self.spread_at(at).flat_map(|r| r.group.nest.iter().map(|(c, _)| *c)).collect()
    }

    /// Positions on an axis of a constant that stay for one head, where `at` reads it.
    pub(super) fn stays_for_head(&self, at: Use, axis: AxisOf, head: &BTreeMap<ClassId, usize>) -> Vec<usize> {
        let mut gone: BTreeSet<usize> = BTreeSet::new();
        for r in self.spread_at(at) {
            let row = r.group.nest.iter().fold(0, |row, (class, size)| row * size + head.get(class).copied().unwrap_or(0));
            for region in self.anatomy.axes.regions(axis) {
                for (offset, position) in region.positions.iter().enumerate() {
                    let leaf = region.coordinates(offset).get(&r.group.leaf).copied();
                    if leaf.is_some_and(|leaf| r.gone.contains(&(row, leaf))) {
                        gone.insert(*position);
                    }
                }
            }
        }
        let size = self.anatomy.axes.carriers()[axis.0].shape[axis.1].size().unwrap_or(0);
        (0..size).filter(|p| !gone.contains(p)).collect()
    }

    /// Whether an axis holds a class that a constant keeps whole where `at` reads it.
    pub(super) fn is_spread(&self, at: Use, axis: AxisOf) -> bool {
        let on = self.anatomy.axes.classes_on(axis);
        self.spread_at(at).any(|r| on.contains(&r.group.leaf))
    }

    fn spread_at(&self, at: Use) -> impl Iterator<Item = &Removal<'a>> {
        self.spread.get(&at).into_iter().flatten().map(|number| &self.removals[*number])
    }

    /// Number of cases of a carrier.
    pub fn case_count(&self, carrier: CarrierId) -> usize {
        self.anatomy.axes.case_count(carrier)
    }
}

fn gone_of(group: &Group, kept: &[usize]) -> Result<BTreeSet<(usize, usize)>, CutError> {
    let stays: BTreeSet<usize> = kept.iter().copied().collect();
    let units = group.units();
    if let Some(unit) = stays.iter().find(|u| **u >= units) {
        return Err(CutError::UnknownUnit { group: group.id.clone(), unit: *unit, units });
    }
    let (width, bundles) = (group.stored.len(), group.bundles());
    let mut gone = BTreeSet::new();
    for unit in 0..units {
        let torn = bundles[unit % width].iter().map(|p| unit / width * width + p).find(|p| !stays.contains(p));
        match (stays.contains(&unit), torn) {
            (true, Some(partner)) => {
                return Err(CutError::TornPair { group: group.id.clone(), unit, partner });
            }
            (true, None) => {}
            (false, _) => {
                gone.insert((unit / width, group.stored[unit % width]));
            }
        }
    }
    Ok(gone)
}
