//! A group: the class that is cut, the classes that it is nested in, and its units.
//!
//! Units are numbered head by head: unit `h * width + e`. The class of a rotary q holds `width / 2` pairs; its units are the stored
//! dims of all heads, and [`Group::bundle`] says which of them go together: the two of a pair, and where heads must keep the same
//! dims (one fused rotation for all of them, query heads that share a key) those of every head.

use super::nest::{self, Nest};
use crate::axes::relation::Slot;
use crate::axes::{Axes, AxisOf, CarrierId, Class, ClassId, Of, Region, SinkSite};
use crate::graph::{Graph, Id, NodeId, Use, ValueId};
use crate::infer::{Dim, Facts};
use crate::ops::quantize::operands;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

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
    /// Hidden units between two linear layers over features, however those are spelled.
    Mlp,
    /// Channels of convolutions that mix positions or single out groups of channels.
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
    /// Heads that keep the same dims, in every position of `nest`; empty unless dims go in pairs.
    pub sharers: Vec<(ClassId, usize)>,
    /// Coordinate in the class of each stored dim of one position of `nest`: `0, 1, ..` unless dims go together.
    pub stored: Vec<usize>,
    /// Coordinates of the class that stay or go together, because a weight stores them in blocks: `n * run` to `n * run + run - 1`.
    pub run: usize,
    /// Heads of the layer, for `qk` and `vo`.
    pub heads: Option<usize>,
    /// Constants that hold one value for all heads, which keep different dims: they stay whole.
    pub aside: BTreeSet<CarrierId>,
    /// Where those are multiplied with what has heads: there each head takes its own dims.
    pub spread: Vec<Use>,
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

    /// Heads of one position of `nest`.
    pub fn sharing(&self) -> usize {
        self.sharers.iter().map(|(_, n)| n).product()
    }

    /// Stored dims of one head.
    pub fn width(&self) -> usize {
        self.stored.len() / self.sharing().max(1)
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

    /// [`Group::bundle`] of each unit of the first position of `nest`.
    pub fn bundles(&self) -> Vec<Vec<usize>> {
        let mut at: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (unit, coordinate) in self.stored.iter().enumerate() {
            at.entry(*coordinate).or_default().push(unit);
        }
        self.stored.iter().map(|coordinate| at[coordinate].clone()).collect()
    }

    /// Whether the group's removed units, as `removed[nest coordinate][leaf coordinate]`, hit a position with these factors.
    ///
    /// Returns (row of the nest, coordinate of the leaf) of the position; `None` where the position is not of the group.
    pub fn locate(&self, region: &Region, offset: usize) -> Option<(usize, usize)> {
        let leaf = region.coordinate(offset, self.leaf)?;
        let row = self.nest.iter().try_fold(0, |row, (class, size)| Some(row * size + region.coordinate(offset, *class)?))?;
        Some((row, leaf))
    }

    /// For each position of an axis of `size`, the unit that it belongs to: `(row of the nest, coordinate of the leaf)`.
    ///
    /// Several cases may give one position different units only where the axis is cut differently in each; the first one counts.
    pub fn tags(&self, axes: &Axes, at: AxisOf, size: usize) -> Vec<Option<(usize, usize)>> {
        let mut tags = vec![None; size];
        for region in axes.regions(at) {
            for (offset, position) in region.positions.iter().enumerate() {
                if tags[*position].is_none() {
                    tags[*position] = self.locate(&region, offset);
                }
            }
        }
        tags
    }

    /// An input of a node, with the units along the axes that hold the group: keys and values too, which no gate multiplies. `None`
    /// where there are none.
    pub fn operand(&self, graph: &Graph, facts: &Facts, axes: &Axes, at: Use) -> Option<Site> {
        operand(graph, facts, axes, self, at)
    }

    /// The operands of a place where the class is summed over, with the units along their axes: activations and weights alike. Those
    /// that a fused operator has only inside itself, and those whose positions are not told apart, are missing.
    pub fn operands(&self, graph: &Graph, facts: &Facts, axes: &Axes, sink: &SinkSite) -> Vec<Site> {
        let one = |(slot, _): (Slot, usize)| match slot {
            Slot::In(number) => operand(graph, facts, axes, self, Use { node: sink.node, slot: number }),
            Slot::Out(_) | Slot::Virtual(_) => None,
        };
        std::iter::once(sink.a).chain(sink.b).filter_map(one).collect()
    }
}

/// Builds the group of a class that can be cut; `None` where its shape turns out not to be understood.
pub(super) fn build(graph: &Graph, facts: &Facts, axes: &Axes, kind: Kind, layer: usize, leaf: ClassId) -> Option<Group> {
    let class = &axes.classes()[leaf];
    let size = class.size?;
    let in_heads = matches!(kind, Kind::Qk | Kind::Vo);
    let Nest { classes: nest, aside, spread } = if in_heads { nest::of(graph, axes, leaf) } else { Nest::default() };
    let dims = if kind == Kind::Qk { stored_dims(graph, axes, leaf, size) } else { (0..size).collect() };
    let sharers = if dims.len() > size { nest::sharers(graph, axes, leaf, &nest) } else { Vec::new() };
    let count = |heads: &[(ClassId, usize)]| heads.iter().map(|(_, n)| n).product::<usize>();
    let heads = in_heads.then(|| count(&nest) * count(&sharers));
    let stored = (0..count(&sharers)).flat_map(|_| dims.iter().copied()).collect();
    let cuts = cuts_of(axes, leaf, &aside);
    let (id, run, sites) = (String::new(), class.run, Vec::new());
    let mut group = Group { id, kind, layer, nest, leaf, sharers, stored, run, heads, aside, spread, sites, cuts };
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
        sharers: Vec::new(),
        stored: (0..site.count).collect(),
        run: 1,
        heads: None,
        aside: BTreeSet::new(),
        spread: Vec::new(),
        sites: Vec::new(),
        cuts: Vec::new(),
    }
}

/// Gives groups their names: per kind in the order of layers; several of a kind in a layer get a letter.
pub(super) fn number(groups: &mut [Group]) {
    let mut twins: BTreeMap<(Kind, usize), (usize, usize)> = BTreeMap::new();
    for group in groups.iter() {
        twins.entry((group.kind, group.layer)).or_default().1 += 1;
    }
    for group in groups {
        let (next, count) = twins.entry((group.kind, group.layer)).or_default();
        let nth = std::mem::replace(next, *next + 1);
        let letter = if *count > 1 { format!("{}", (b'a' + u8::try_from(nth % 26).unwrap_or(0)) as char) } else { String::new() };
        group.id = format!("{}.{}{letter}", group.kind.as_str(), group.layer);
    }
}

/// Coordinates of the stored dims of one head along the contracted axis: `0..size`, or each coordinate as often as it occurs there.
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

/// The operand that a gate multiplies: an activation, of two the first that has all heads. Where all are computed from constants (an
/// MLP that makes a table of relative positions), one that is computed. A fused operator that makes the operand inside itself has
/// the constant that it makes it from; training graphs write such an operator out first.
fn site_of(graph: &Graph, facts: &Facts, axes: &Axes, group: &Group, node: NodeId, a: Slot, b: Option<Slot>) -> Option<Site> {
    let is_inside = std::iter::once(a).chain(b).all(|slot| matches!(slot, Slot::Virtual(_)));
    let operands: Vec<(usize, CarrierId)> = std::iter::once(a)
        .chain(b)
        .chain((0..graph.node(node).inputs().len()).map(Slot::In))
        .filter_map(|slot| match slot {
            Slot::In(number) => axes.carrier_at(graph, node, slot).map(|c| (number, c)),
            Slot::Out(_) | Slot::Virtual(_) => None,
        })
        .collect();
    let (constant, data): (Vec<_>, Vec<_>) = operands.into_iter().partition(|(_, c)| axes.carriers()[*c].constant);
    let serves = |n: &usize| {
        let computed = graph.node(node).input(*n).is_some_and(|v| !graph.is_constant(v));
        is_inside || (computed && is_hidden_in_constants(graph, axes, group))
    };
    let mut best: Option<Site> = None;
    let served = data.into_iter().map(|(n, _)| n).chain(constant.into_iter().map(|(n, _)| n).filter(serves));
    for number in served {
        let Some(site) = operand(graph, facts, axes, group, Use { node, slot: number }) else { continue };
        if best.as_ref().is_none_or(|b| b.index.len() < site.index.len()) {
            best = Some(site);
        }
    }
    best
}

/// An input of a node, with the units along the axes that hold the group; `None` where there are none.
fn operand(graph: &Graph, facts: &Facts, axes: &Axes, group: &Group, at: Use) -> Option<Site> {
    let carrier = axes.carrier_at(graph, at.node, Slot::In(at.slot))?;
    let holds = |axis: &usize| {
        let on = axes.classes_on((carrier, *axis));
        on.contains(&group.leaf) || group.nest.iter().chain(&group.sharers).any(|(c, _)| on.contains(c))
    };
    let gate_axes: Vec<usize> = (0..axes.carriers()[carrier].shape.len()).filter(holds).collect();
    let index = site_index(facts, axes, group, carrier, &gate_axes, graph.node(at.node).input(at.slot)?)?;
    index.iter().any(Option::is_some).then_some(Site { at, axes: gate_axes, index })
}

/// Whether the group is what lies between two weights of an MLP over constants. Most that is computed from constants is none: object
/// queries, position tables.
fn is_hidden_in_constants(graph: &Graph, axes: &Axes, group: &Group) -> bool {
    let class = &axes.classes()[group.leaf];
    let out_of = |sink: &SinkSite| {
        std::iter::once(sink.a).chain(sink.b).any(|(slot, axis)| {
            let carrier = axes.carrier_at(graph, sink.node, slot);
            class.members.iter().any(|m| axes.carriers()[m.carrier].constant && Some(m.carrier) == carrier && m.axis != axis)
        })
    };
    group.kind == Kind::Mlp && class.sinks.len() == 1 && axes.classes().iter().flat_map(|c| &c.sinks).any(out_of)
}

/// Unit of each position of the row-major product of `gate_axes`. Of a first axis of symbolic size (`batch * heads`) only what lies
/// behind the symbol counts: the gate repeats along it.
fn site_index(
    facts: &Facts,
    axes: &Axes,
    group: &Group,
    carrier: usize,
    gate_axes: &[usize],
    v: ValueId,
) -> Option<Vec<Option<usize>>> {
    let shape = facts.shape(v)?;
    let region = |axis: &usize, case: usize| {
        let at = (carrier, *axis);
        if gate_axes.first() == Some(axis) { axes.inner_region(at, case) } else { axes.region(at, case) }
    };
    let all_cases: Vec<Vec<Region>> = (0..axes.case_count(carrier))
        .map(|case| gate_axes.iter().map(|a| region(a, case)).collect::<Option<_>>())
        .collect::<Option<_>>()?;
    let behind = |n: usize| all_cases.iter().flat_map(|r| &r[n].positions).max().map_or(1, |p| p + 1);
    let sizes: Vec<usize> = gate_axes.iter().enumerate().map(|(n, a)| shape[*a].size().unwrap_or_else(|| behind(n))).collect();
    let mut index = vec![None; sizes.iter().product()];
    for regions in &all_cases {
        let joined = Region {
            positions: regions.iter().zip(&sizes).fold(vec![0], |base, (r, size)| {
                base.iter().flat_map(|b| r.positions.iter().map(move |p| b * size + p)).collect()
            }),
            factors: regions.iter().flat_map(|r| r.factors.iter().copied()).collect(),
        };
        for (offset, position) in joined.positions.iter().enumerate() {
            if let Some((row, leaf)) = group.locate(&joined, offset) {
                let of = |class| joined.coordinate(offset, class).unwrap_or(0);
                let head = group.sharers.iter().fold(0, |head, (c, n)| head * n + of(*c));
                index[*position] = Some((row, head, leaf));
            }
        }
    }
    // Stored dims of one coordinate are told apart by their order along the axis.
    let mut seen: BTreeMap<(usize, usize, usize), usize> = BTreeMap::new();
    let width = group.width();
    let mut stored: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for (dim, coordinate) in group.stored[..width].iter().enumerate() {
        stored.entry(*coordinate).or_default().push(dim);
    }
    let mut unit = |(row, head, leaf): (usize, usize, usize)| {
        let same = &stored[&leaf];
        let n = seen.entry((row, head, leaf)).or_insert(0);
        let stored = same[*n % same.len()];
        *n += 1;
        row * group.stored.len() + head * width + stored
    };
    Some(index.into_iter().map(|at| at.map(&mut unit)).collect())
}

/// All constants with the class on an axis, but those that stay whole.
fn cuts_of(axes: &Axes, leaf: ClassId, aside: &BTreeSet<CarrierId>) -> Vec<Cut> {
    let mut cuts = BTreeSet::new();
    for member in axes.classes()[leaf].members.iter().filter(|m| !aside.contains(&m.carrier)) {
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
    let sides = class.sinks.iter().flat_map(|s| std::iter::once(s.a).chain(s.b).map(move |side| (s.node, side)));
    let ends: BTreeSet<AxisOf> = sides.filter_map(|(node, (slot, axis))| Some((axes.carrier_read(node, slot)?, axis))).collect();
    let weights = class.members.iter().filter(|m| axes.carriers()[m.carrier].constant).map(|m| (m.carrier, m.axis));
    weights.filter(|at| ends.contains(at)).collect()
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

/// Classes that come out of a weight: they occur on an axis of a constant that is contracted with data along another. The number of
/// windows of an image, which a mask may have as an axis, is none of them.
pub(super) fn grown_from_weights(graph: &Graph, axes: &Axes) -> BTreeSet<ClassId> {
    let mut ends: BTreeMap<CarrierId, BTreeSet<usize>> = BTreeMap::new();
    for sink in axes.classes().iter().flat_map(|c| &c.sinks) {
        let Some(b) = sink.b else { continue };
        let sides = [sink.a, b].map(|(slot, axis)| (axes.carrier_at(graph, sink.node, slot), axis));
        let constant = |c: Option<CarrierId>| c.is_some_and(|c| axes.carriers()[c].constant);
        for ((weight, axis), (data, _)) in [(sides[0], sides[1]), (sides[1], sides[0])] {
            if let (Some(weight), true, false) = (weight, constant(weight), constant(data)) {
                ends.entry(weight).or_default().insert(axis);
            }
        }
    }
    let mut grown = BTreeSet::new();
    for (id, class) in axes.classes().iter().enumerate() {
        let another = |m: &crate::axes::Member| ends.get(&m.carrier).is_some_and(|e| e.iter().any(|axis| *axis != m.axis));
        if class.members.iter().any(another) {
            grown.insert(id);
        }
    }
    grown
}

/// A node that sees a value computed from constants as its own, of which the class cuts what the value itself is: one cut cannot
/// serve both readers. With the axis there.
pub(super) fn read_apart(graph: &Graph, axes: &Axes, class: &Class) -> Option<(NodeId, usize)> {
    let reader_apart = |v: ValueId| {
        let users = graph.value(v).users().iter();
        let own = |at: &&Use| axes.carrier_at(graph, at.node, Slot::In(at.slot)).is_some_and(|c| c != v.index());
        users.filter(own).map(|at| at.node).find(|n| !super::is_shape_only(graph, *n))
    };
    class.members.iter().find_map(|m| match axes.carriers()[m.carrier].of {
        Of::Value(v) if axes.carriers()[m.carrier].constant && !graph.is_constant(v) => reader_apart(v).map(|n| (n, m.axis)),
        _ => None,
    })
}

/// Whether the class is contracted with a weight.
pub(super) fn ends_in_weight(axes: &Axes, class: &Class) -> bool {
    !contracted(axes, class).is_empty()
}

/// Classes that a convolution sums over as a CNN does. Not those that run from one linear layer to another, at every position alike,
/// which is an MLP whatever its layers are spelled as; a residual stream has several readers, and is none.
pub(super) fn convolutional(graph: &Graph, facts: &Facts, axes: &Axes) -> BTreeSet<ClassId> {
    let is_conv = |id: &NodeId| graph.node(*id).op().contains("Conv");
    let nodes = graph.order().iter().copied().filter(|id| is_conv(id) && !is_pointwise(graph, facts, *id));
    let slots = nodes.flat_map(|id| (0..graph.node(id).inputs().len()).map(move |slot| (id, slot)));
    let carriers: BTreeSet<_> = slots.filter_map(|(id, slot)| axes.carrier_at(graph, id, Slot::In(slot))).collect();
    let sides = carriers.into_iter().flat_map(|c| (0..axes.carriers()[c].shape.len()).map(move |axis| (c, axis)));
    let mixed: BTreeSet<ClassId> = sides.flat_map(|at| axes.classes_on(at)).collect();
    let ends = |class: &Class| class.sinks.iter().any(|s| is_conv(&s.node));
    let is_cnn = |(id, class): &(ClassId, &Class)| ends(class) && (class.sinks.len() > 1 || mixed.contains(id));
    axes.classes().iter().enumerate().filter(is_cnn).map(|(id, _)| id).collect()
}

/// Whether a convolution is a linear layer over channels, the same at each of several positions.
fn is_pointwise(graph: &Graph, facts: &Facts, id: NodeId) -> bool {
    let node = graph.node(id);
    let spatial = |v: Option<ValueId>| v.and_then(|v| facts.shape(v)).and_then(|s| s.get(2..)).filter(|s| !s.is_empty());
    let is_one = |s: &[Dim]| s.iter().all(|d| d.is(1));
    let kernel = spatial(node.input(operands(node.op()).1));
    let positions = spatial(node.outputs().first().copied().flatten());
    let is_dense =
        node.attr_int("group").unwrap_or(1) == 1 && node.attr_ints("strides").is_none_or(|s| s.iter().all(|n| *n == 1));
    kernel.is_some_and(is_one) && !positions.is_some_and(is_one) && is_dense
}
