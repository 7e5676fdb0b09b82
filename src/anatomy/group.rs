//! A group: the class that is cut, the classes that it is nested in, and its units.
//!
//! Units are numbered head by head: unit `h * width + e`. The class of a rotary q holds `width / 2` pairs; its units are the stored
//! dims, and [`Group::bundle`] says which of them go together.

use crate::axes::relation::Slot;
use crate::axes::{Axes, AxisOf, Class, ClassId, Of, Region};
use crate::graph::{Graph, NodeId, Use, ValueId};
use crate::infer::Facts;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// What a group is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Dims in which queries meet keys.
    Qk,
    /// Dims that values carry to the output projection.
    Vo,
    /// Whole heads.
    Head,
    /// Hidden units between two weights.
    Mlp,
    /// Channels between two convolutions.
    Channel,
    /// Positions of the sequence.
    Token,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Kind; 6] = [Kind::Qk, Kind::Vo, Kind::Head, Kind::Mlp, Kind::Channel, Kind::Token];

    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Qk => "qk",
            Kind::Vo => "vo",
            Kind::Head => "head",
            Kind::Mlp => "mlp",
            Kind::Channel => "channel",
            Kind::Token => "token",
        }
    }

    /// The kind with this word.
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|k| k.as_str() == word)
    }
}

/// Where a gate enters: an operand of a sink.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    /// The operand.
    pub at: Use,
    /// Axes of the operand over which the gate extends, ascending.
    pub axes: Vec<usize>,
    /// Unit of each position of the row-major product of those axes; `None` where no unit is.
    pub index: Vec<Option<usize>>,
}

/// A constant that is cut along an axis.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cut {
    /// The constant.
    pub value: ValueId,
    /// Its reader, where the cut is for this reader alone.
    pub reader: Option<Use>,
    /// The axis.
    pub axis: usize,
}

/// What must be cut together.
#[derive(Clone, Debug)]
pub struct Group {
    /// Its name: kind and number, `qk.3`.
    pub id: String,
    /// What it is.
    pub kind: Kind,
    /// Attention or MLP layer, counted from the input.
    pub layer: usize,
    /// Classes that the units are numbered by, outermost first, with their sizes: the heads, where there are any.
    pub nest: Vec<(ClassId, usize)>,
    /// The class that is cut.
    pub leaf: ClassId,
    /// Coordinate in the class of each stored dim of one head: `0, 1, ..` unless dims go together.
    pub stored: Vec<usize>,
    /// Coordinates of the class that stay or go together, because a weight stores them in blocks: `n * run` to `n * run + run - 1`.
    pub run: usize,
    /// Heads of the layer, for `qk` and `vo`.
    pub heads: Option<usize>,
    /// Where gates enter.
    pub sites: Vec<Site>,
    /// The constants that it cuts.
    pub cuts: Vec<Cut>,
}

impl Group {
    /// Number of heads that the units are numbered by; 1 where all heads keep the same dims.
    pub fn nest_count(&self) -> usize {
        self.nest.iter().map(|(_, n)| n).product()
    }

    /// Number of units.
    pub fn units(&self) -> usize {
        self.nest_count() * self.stored.len()
    }

    /// Units that stay or go together with `unit`, itself included.
    pub fn bundle(&self, unit: usize) -> Vec<usize> {
        let width = self.stored.len();
        let (head, run) = (unit / width, self.stored[unit % width] / self.run);
        (0..width).filter(|s| self.stored[*s] / self.run == run).map(|s| head * width + s).collect()
    }

    /// Number of positions of the class.
    pub fn class_size(&self) -> usize {
        self.stored.iter().max().map_or(0, |m| m + 1)
    }

    /// Whether the group's removed units, as `removed[nest coordinate][leaf coordinate]`, hit a position with these factors.
    ///
    /// Returns (row of the nest, coordinate of the leaf) of the position; `None` where the position is not of the group.
    pub fn locate(&self, region: &Region, offset: usize) -> Option<(usize, usize)> {
        let mut rest = offset;
        let mut coordinates = Vec::with_capacity(region.factors.len());
        for (class, size) in region.factors.iter().rev() {
            coordinates.push((*class, rest % size));
            rest /= size;
        }
        let of = |class: ClassId| coordinates.iter().find(|(c, _)| *c == class).map(|(_, at)| *at);
        let leaf = of(self.leaf)?;
        let row = self.nest.iter().try_fold(0, |row, (class, size)| of(*class).map(|at| row * size + at))?;
        Some((row, leaf))
    }
}

/// Builds the group of a class that can be cut; `None` where its shape turns out not to be understood.
pub(super) fn build(graph: &Graph, facts: &Facts, axes: &Axes, kind: Kind, layer: usize, leaf: ClassId) -> Option<Group> {
    let class = &axes.classes()[leaf];
    let size = class.size?;
    let nest = if matches!(kind, Kind::Qk | Kind::Vo) { nest_of(axes, leaf) } else { Vec::new() };
    let stored = if kind == Kind::Qk { stored_dims(graph, axes, leaf, size) } else { (0..size).collect() };
    let heads = match kind {
        Kind::Qk | Kind::Vo => Some(nest.iter().map(|(_, n)| n).product::<usize>().max(1)),
        Kind::Head | Kind::Mlp | Kind::Channel | Kind::Token => None,
    };
    let mut group = Group {
        id: String::new(),
        kind,
        layer,
        nest,
        leaf,
        stored,
        run: class.run,
        heads,
        sites: Vec::new(),
        cuts: cuts_of(axes, leaf),
    };
    for sink in &class.sinks {
        let site = site_of(graph, facts, axes, &group, sink.node, sink.a.0, sink.b.map(|b| b.0))?;
        if !group.sites.contains(&site) {
            group.sites.push(site);
        }
    }
    Some(group)
}

/// The group of a token site. It has no class: tokens are positions of one layer's sequence, not a factor.
pub(super) fn of_tokens(site: &super::TokenSite) -> Group {
    Group {
        id: String::new(),
        kind: Kind::Token,
        layer: site.layer,
        nest: Vec::new(),
        leaf: ClassId::MAX,
        stored: (0..site.count).collect(),
        run: 1,
        heads: None,
        sites: Vec::new(),
        cuts: Vec::new(),
    }
}

/// Gives groups their names: per kind in the order of layers; several of a kind in a layer get a letter.
pub(super) fn number(groups: &mut [Group]) {
    let keys: Vec<(Kind, usize)> = groups.iter().map(|g| (g.kind, g.layer)).collect();
    for (i, group) in groups.iter_mut().enumerate() {
        let twins = keys.iter().filter(|k| **k == keys[i]).count();
        let nth = keys[..i].iter().filter(|k| **k == keys[i]).count();
        let letter = if twins > 1 { format!("{}", (b'a' + u8::try_from(nth % 26).unwrap_or(0)) as char) } else { String::new() };
        group.id = format!("{}.{}{letter}", group.kind.as_str(), group.layer);
    }
}

/// Classes that stand beside the leaf wherever it occurs, on the same axis and outside of it in every constant: each of their
/// positions may keep different dims. Inside of it (`E x H`) what stays would not be a block of `E' x H` any more.
fn nest_of(axes: &Axes, leaf: ClassId) -> Vec<(ClassId, usize)> {
    let class = &axes.classes()[leaf];
    let mut common: Option<Vec<(ClassId, usize)>> = None;
    for member in &class.members {
        let at = (member.carrier, member.axis);
        let beside: Vec<(ClassId, usize)> = if axes.carriers()[member.carrier].constant {
            let factors = axes.region(at, member.case).map(|r| r.factors).unwrap_or_default();
            factors.into_iter().take_while(|(c, _)| *c != leaf).collect()
        } else {
            let all = axes.classes_in_case(member.carrier, member.case);
            all.into_iter().map(|(_, c)| (c, axes.classes()[c].size.unwrap_or(0))).collect()
        };
        let keep = |c: &(ClassId, usize)| c.0 != leaf && c.1 > 1 && beside.contains(c);
        common = Some(match common {
            None => beside.iter().copied().filter(keep).collect(),
            Some(old) => old.into_iter().filter(|c| keep(c)).collect(),
        });
    }
    // In the order of a constant's axis, each class once.
    let constant = class.members.iter().find(|m| axes.carriers()[m.carrier].constant);
    let order = constant.and_then(|m| axes.region((m.carrier, m.axis), m.case)).map(|r| r.factors).unwrap_or_default();
    let common = common.unwrap_or_default();
    let mut nest: Vec<(ClassId, usize)> = Vec::new();
    for factor in order {
        if common.contains(&factor) && !nest.contains(&factor) {
            nest.push(factor);
        }
    }
    nest
}

/// Coordinates of the stored dims along the contracted axis: `0..size`, or each coordinate as often as it occurs there.
fn stored_dims(graph: &Graph, axes: &Axes, leaf: ClassId, size: usize) -> Vec<usize> {
    let class = &axes.classes()[leaf];
    let mut best: Option<Vec<usize>> = None;
    for sink in &class.sinks {
        for (slot, axis) in std::iter::once(sink.a).chain(sink.b) {
            let Some(carrier) = axes.carrier_at(graph, sink.node, slot) else { continue };
            let mut at: Vec<(usize, usize)> = Vec::new();
            for region in axes.regions((carrier, axis)) {
                if region.factors.len() == 1 && region.factors[0].0 == leaf {
                    at.extend(region.positions.iter().enumerate().map(|(i, p)| (*p, i)));
                }
            }
            at.sort_unstable();
            at.dedup();
            let dims: Vec<usize> = at.into_iter().map(|(_, i)| i).collect();
            if dims.len() >= size && best.as_ref().is_none_or(|b| dims.len() < b.len()) {
                best = Some(dims);
            }
        }
    }
    best.unwrap_or_else(|| (0..size).collect())
}

/// The operand that a gate multiplies: an activation, of two the first.
fn site_of(graph: &Graph, facts: &Facts, axes: &Axes, group: &Group, node: NodeId, a: Slot, b: Option<Slot>) -> Option<Site> {
    let candidates = std::iter::once(a).chain(b).chain((0..graph.node(node).inputs().len()).map(Slot::In));
    for slot in candidates {
        let Slot::In(number) = slot else { continue };
        let Some(carrier) = axes.carrier_at(graph, node, slot) else { continue };
        if axes.carriers()[carrier].constant {
            continue;
        }
        let rank = axes.carriers()[carrier].shape.len();
        let holds = |axis: &usize| {
            let on = axes.classes_on((carrier, *axis));
            on.contains(&group.leaf) || group.nest.iter().any(|(c, _)| on.contains(c))
        };
        let gate_axes: Vec<usize> = (0..rank).filter(holds).collect();
        let index = site_index(facts, axes, group, carrier, &gate_axes, graph.node(node).input(number)?);
        if let Some(index) = index.filter(|i| i.iter().any(Option::is_some)) {
            return Some(Site { at: Use { node, slot: number }, axes: gate_axes, index });
        }
    }
    None
}

/// Unit of each position of the row-major product of `gate_axes`.
fn site_index(
    facts: &Facts,
    axes: &Axes,
    group: &Group,
    carrier: usize,
    gate_axes: &[usize],
    v: ValueId,
) -> Option<Vec<Option<usize>>> {
    let shape = facts.shape(v)?;
    let sizes: Vec<usize> = gate_axes.iter().map(|a| shape[*a].size()).collect::<Option<_>>()?;
    let mut index = vec![None; sizes.iter().product()];
    for case in 0..axes.case_count(carrier) {
        let regions: Vec<Region> = gate_axes.iter().map(|a| axes.region((carrier, *a), case)).collect::<Option<_>>()?;
        let joined = Region {
            positions: regions.iter().zip(&sizes).fold(vec![0], |base, (r, size)| {
                base.iter().flat_map(|b| r.positions.iter().map(move |p| b * size + p)).collect()
            }),
            factors: regions.iter().flat_map(|r| r.factors.iter().copied()).collect(),
        };
        for (offset, position) in joined.positions.iter().enumerate() {
            if let Some((row, leaf)) = group.locate(&joined, offset) {
                index[*position] = Some((row, leaf));
            }
        }
    }
    // Stored dims of one coordinate are told apart by their order along the axis.
    let mut seen: std::collections::BTreeMap<(usize, usize), usize> = std::collections::BTreeMap::new();
    let width = group.stored.len();
    let unit = |(row, leaf): (usize, usize), seen: &mut std::collections::BTreeMap<(usize, usize), usize>| {
        let same: Vec<usize> = (0..width).filter(|s| group.stored[*s] == leaf).collect();
        let n = seen.entry((row, leaf)).or_insert(0);
        let stored = same[*n % same.len()];
        *n += 1;
        row * width + stored
    };
    Some(index.into_iter().map(|at| at.map(|at| unit(at, &mut seen))).collect())
}

/// All constants with the class on an axis.
fn cuts_of(axes: &Axes, leaf: ClassId) -> Vec<Cut> {
    let mut cuts = BTreeSet::new();
    for member in &axes.classes()[leaf].members {
        match axes.carriers()[member.carrier].of {
            Of::Value(value) if axes.carriers()[member.carrier].constant => {
                cuts.insert(Cut { value, reader: None, axis: member.axis });
            }
            Of::Private(value, reader) => {
                cuts.insert(Cut { value, reader: Some(reader), axis: member.axis });
            }
            Of::Value(_) | Of::Virtual(..) => {}
        }
    }
    cuts.into_iter().collect()
}

/// Carriers of the class that are contracted away: the weights behind it.
fn contracted(axes: &Axes, class: &Class) -> BTreeSet<AxisOf> {
    class
        .members
        .iter()
        .filter(|m| axes.carriers()[m.carrier].constant)
        .map(|m| (m.carrier, m.axis))
        .filter(|at| {
            class
                .sinks
                .iter()
                .any(|s| [Some(s.a), s.b].into_iter().flatten().any(|(slot, axis)| axes.is_at(s.node, slot, axis, *at)))
        })
        .collect()
}

/// Whether the class starts in a constant: occurs on an axis of one that is not contracted away.
pub(super) fn is_born(axes: &Axes, class: &Class) -> bool {
    let ends = contracted(axes, class);
    let constant = |m: &&crate::axes::Member| axes.carriers()[m.carrier].constant;
    class
        .members
        .iter()
        .filter(constant)
        .any(|m| !ends.contains(&(m.carrier, m.axis)) && axes.carriers()[m.carrier].shape.iter().filter(|d| !d.is(1)).count() > 1)
}

/// Whether the class is contracted with a weight.
pub(super) fn ends_in_weight(axes: &Axes, class: &Class) -> bool {
    !contracted(axes, class).is_empty()
}

/// Whether a weight of the class belongs to a convolution.
pub(super) fn is_convolutional(graph: &Graph, axes: &Axes, class: ClassId) -> bool {
    axes.classes()[class].sinks.iter().any(|s| graph.node(s.node).op().contains("Conv"))
}

/// For each position of an axis, the units of a group that it belongs to: `(row of the nest, coordinate of the leaf)`.
///
/// Several cases may give one position different units only where the axis is cut differently in each; the first one counts.
pub fn unit_tags(axes: &Axes, group: &Group, at: AxisOf, size: usize) -> Vec<Option<(usize, usize)>> {
    let mut tags = vec![None; size];
    for region in axes.regions(at) {
        for (offset, position) in region.positions.iter().enumerate() {
            if tags[*position].is_none() {
                tags[*position] = group.locate(&region, offset);
            }
        }
    }
    tags
}
