//! Constants that hold one value for all heads, where heads keep different dims.
//!
//! A rotary table `[N, E]` multiplies q `[B, H, N, E]`. It stays whole, as others may read it; where it meets q each head takes its
//! own dims: `[N, E]` -> Gather of positions `[H, E']` -> `[N, H, E']` -> Transpose -> `[H, N, E']`. A table that has an axis for the
//! heads, of size 1 or H, is first brought to `[.., H * E]`, so that one Gather serves both.

use super::cutset::{CutSet, Stays};
use crate::axes::relation::Slot;
use crate::axes::{Axes, AxisOf, CarrierId, ClassId};
use crate::graph::build::Builder;
use crate::graph::{Graph, Id, Tensor, Use, ValueId};
use std::collections::{BTreeMap, BTreeSet};

/// What is read where.
struct Reading {
    at: Use,
    carrier: CarrierId,
    /// Axis of the constant that holds the dims, and the axes of the product that hold heads.
    dims: usize,
    head_axes: Vec<usize>,
    /// Positions on the axis `dims`, for each combination of heads that stay, row-major; counted after other cuts of the axis.
    taken: Vec<Vec<usize>>,
    /// Size of that axis then.
    width: usize,
    /// Heads that stay on each of `head_axes`.
    heads: Vec<usize>,
    rank: usize,
}

impl Reading {
    /// Whether another reading takes the same of the same constant.
    fn takes_as(&self, other: &Self) -> bool {
        (self.dims, self.rank, &self.head_axes, &self.taken) == (other.dims, other.rank, &other.head_axes, &other.taken)
    }
}

/// Lets every head take its own part. `original` is the graph as it was analysed; `graph` has its constants cut already.
pub(super) fn spread(graph: &mut Graph, original: &Graph, axes: &Axes, cut: &CutSet<'_>) {
    let readings: Vec<Reading> = cut.spread().into_iter().filter_map(|at| reading(original, axes, cut, at)).collect();
    // q and k take the same of one table.
    let mut made: Vec<(ValueId, Reading, ValueId)> = Vec::new();
    for r in readings {
        let Some(v) = graph.node(r.at.node).input(r.at.slot) else { continue };
        let like = |known: &&(ValueId, Reading, ValueId)| known.0 == v && known.1.takes_as(&r);
        let part = made.iter().find(like).map(|(_, _, part)| *part);
        let part = part.unwrap_or_else(|| take(graph, v, axes, &r));
        graph.set_input(r.at, Some(part));
        made.push((v, r, part));
    }
}

fn reading(graph: &Graph, axes: &Axes, cut: &CutSet<'_>, at: Use) -> Option<Reading> {
    let carrier = axes.carrier_at(graph, at.node, Slot::In(at.slot))?;
    let product = graph.node(at.node).output(0)?.index();
    let rank = axes.carriers()[product].shape.len();
    let dims = (0..axes.carriers()[carrier].shape.len()).find(|axis| cut.is_spread(at, (carrier, *axis)))?;
    let classes = cut.heads_at(at);
    let holds = |axis: &usize| axes.classes_on((product, *axis)).iter().any(|c| classes.contains(c));
    let head_axes: Vec<usize> = (0..rank).filter(holds).collect();
    let staying = |axis: AxisOf| match cut.stays(axis) {
        Stays::Positions(p) => p,
        _ => (0..axes.carriers()[axis.0].shape[axis.1].size().unwrap_or(0)).collect(),
    };
    let mut combinations: Vec<BTreeMap<ClassId, usize>> = vec![BTreeMap::new()];
    let mut heads = Vec::new();
    for axis in &head_axes {
        let places = places_on(axes, (product, *axis), &classes);
        let stay = staying((product, *axis));
        heads.push(stay.len());
        let with = |old: &BTreeMap<ClassId, usize>, p: &usize| {
            let mut new = old.clone();
            new.extend(places[p].iter().map(|(c, n)| (*c, *n)));
            new
        };
        combinations = combinations.iter().flat_map(|old| stay.iter().map(move |p| with(old, p))).collect();
    }
    // Other groups may have cut the axis already.
    let left = staying((carrier, dims));
    let number = |p: usize| left.binary_search(&p).ok();
    let taken =
        combinations.iter().map(|head| cut.stays_for_head(at, (carrier, dims), head).into_iter().filter_map(number).collect());
    Some(Reading { at, carrier, dims, head_axes, taken: taken.collect(), width: left.len(), heads, rank })
}

/// Coordinates of some classes at each position of an axis.
fn places_on(axes: &Axes, at: AxisOf, classes: &BTreeSet<ClassId>) -> BTreeMap<usize, BTreeMap<ClassId, usize>> {
    let mut places: BTreeMap<usize, BTreeMap<ClassId, usize>> = BTreeMap::new();
    for region in axes.regions(at) {
        for (offset, position) in region.positions.iter().enumerate() {
            let found = region.coordinates(offset).into_iter().filter(|(c, _)| classes.contains(c));
            places.entry(*position).or_default().extend(found);
        }
    }
    places
}

/// The parts of all heads, with the axes of the product.
fn take(graph: &mut Graph, v: ValueId, axes: &Axes, r: &Reading) -> ValueId {
    let shape = &axes.carriers()[r.carrier].shape;
    let shift = r.rank - shape.len();
    let dims = r.dims + shift;
    let is_whole = |axis: usize| axis >= shift && !shape[axis - shift].is(1);
    let present: Vec<bool> = r.head_axes.iter().map(|a| is_whole(*a)).collect();
    // Places of the flattened axis: heads that the table tells apart, then dims.
    let mut index = Vec::new();
    let mut combination = vec![0usize; r.heads.len()];
    for taken in &r.taken {
        let head = combination
            .iter()
            .zip(&r.heads)
            .zip(&present)
            .fold(0, |n, ((h, count), there)| if *there { n * count + h } else { n });
        index.extend(taken.iter().map(|d| (head * r.width + d) as i64));
        for (h, count) in combination.iter_mut().zip(&r.heads).rev() {
            *h += 1;
            if *h < *count {
                break;
            }
            *h = 0;
        }
    }
    let kept = r.taken.first().map_or(0, Vec::len);
    let name = graph.value(v).name().to_string();
    let mut b = Builder::new(graph, &format!("{name}_heads."));
    let sizes: Vec<usize> = r.heads.iter().copied().chain([kept]).collect();
    let index = b.constant(Tensor { dims: sizes, ..Tensor::i64s(&index) });
    let count = r.head_axes.len();
    if shift >= count && r.head_axes.iter().copied().eq(shift - count..shift) {
        // No axis for the heads yet: Gather puts it in beside the dims, and it goes in front.
        let parts = b.gather(v, index, r.dims as i64);
        let order: Vec<usize> = (r.dims..r.dims + count).chain(0..r.dims).chain(r.dims + count..shape.len() + count).collect();
        return transposed(&mut b, parts, &order);
    }
    let mut whole = v;
    if shift > 0 {
        whole = b.unsqueeze(whole, &(0..shift as i64).collect::<Vec<_>>());
    }
    let rest: Vec<usize> = (0..r.rank).filter(|a| *a != dims && !r.head_axes.contains(a)).collect();
    let order: Vec<usize> = rest.iter().chain(&r.head_axes).chain([&dims]).copied().collect();
    whole = transposed(&mut b, whole, &order);
    let flat: Vec<i64> = rest.iter().map(|_| 0).chain([-1]).collect();
    whole = b.reshape(whole, &flat);
    whole = b.gather(whole, index, rest.len() as i64);
    let mut back = vec![0; r.rank];
    order.iter().enumerate().for_each(|(now, axis)| back[*axis] = now);
    transposed(&mut b, whole, &back)
}

fn transposed(b: &mut Builder<'_>, v: ValueId, order: &[usize]) -> ValueId {
    if order.iter().copied().eq(0..order.len()) { v } else { b.transpose(v, order) }
}
