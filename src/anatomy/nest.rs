//! Heads: which of them keep dims of their own, and which must keep the same.
//!
//! Example: q and k `[B, H, N, E]`, rotated by tables `[N, E]`. The projections store `H x E`, so every head could keep dims of its
//! own; the table has one row for all heads. As q and k are multiplied with it, it may stay whole, and each head takes its own part
//! of it there. Where the table enters an operator that rotates all heads alike, they keep the same dims.

use crate::axes::relation::Slot;
use crate::axes::{Axes, CarrierId, ClassId, Member, Of};
use crate::graph::{Graph, Id, Use};
use crate::ops;
use std::collections::BTreeSet;

/// The heads that a class is nested in.
#[derive(Default)]
pub(super) struct Nest {
    /// Classes that the units are numbered by, outermost first, with their sizes.
    pub(super) classes: Vec<(ClassId, usize)>,
    /// Constants that have the class but not all of these.
    pub(super) aside: BTreeSet<CarrierId>,
    /// Where those meet what has them.
    pub(super) spread: Vec<Use>,
}

/// Classes that stand beside the leaf wherever it occurs, on the same axis in every constant that is cut: each of their positions
/// may keep different dims.
pub(super) fn of(graph: &Graph, axes: &Axes, leaf: ClassId) -> Nest {
    let members = &axes.classes()[leaf].members;
    let constant = |m: &&Member| axes.carriers()[m.carrier].constant;
    let inside = inside(axes, leaf);
    let outside = |mut classes: Vec<(ClassId, usize)>| {
        classes.retain(|c| !inside.contains(&c.0));
        classes
    };
    let of_data = outside(common(axes, leaf, members.iter().filter(|m| !constant(m))));
    // Tokens stand beside the leaf in all data, too; heads are stored with it.
    let stored = members.iter().filter(constant).map(|m| ordered(axes, m, &of_data));
    let heads = stored.max_by_key(Vec::len).unwrap_or_default();
    let lacks = |m: &&Member| {
        let beside = beside(axes, m);
        heads.iter().any(|c| !beside.contains(c))
    };
    let aside: BTreeSet<CarrierId> = members.iter().filter(constant).filter(lacks).map(|m| m.carrier).collect();
    if aside.is_empty() {
        return Nest { classes: heads, ..Nest::default() };
    }
    if let Some(spread) = uses(graph, axes, leaf, &heads, &aside) {
        return Nest { classes: heads, aside, spread };
    }
    let everywhere = outside(common(axes, leaf, members.iter()));
    let first = members.iter().find(constant);
    Nest { classes: first.map(|m| ordered(axes, m, &everywhere)).unwrap_or_default(), ..Nest::default() }
}

/// Classes that stand inside the leaf somewhere: where heads are merged as `E x H`, dims of unlike rank would trade places in what is
/// left, so all heads keep the same.
fn inside(axes: &Axes, leaf: ClassId) -> BTreeSet<ClassId> {
    let factors = |m: &Member| axes.region((m.carrier, m.axis), m.case).map(|r| r.factors).unwrap_or_default();
    let behind = |m: &Member| factors(m).into_iter().map(|(c, _)| c).skip_while(|c| *c != leaf).skip(1).collect::<Vec<_>>();
    axes.classes()[leaf].members.iter().flat_map(behind).collect()
}

/// Classes beside a member: on its axis in a constant, on any axis in data.
fn beside(axes: &Axes, member: &Member) -> Vec<(ClassId, usize)> {
    if axes.carriers()[member.carrier].constant {
        return axes.region((member.carrier, member.axis), member.case).map(|r| r.factors).unwrap_or_default();
    }
    let all = axes.classes_in_case(member.carrier, member.case);
    all.into_iter().map(|(_, c)| (c, axes.classes()[c].size.unwrap_or(0))).collect()
}

/// Classes beside all of some members of the leaf.
fn common<'a>(axes: &Axes, leaf: ClassId, members: impl Iterator<Item = &'a Member>) -> Vec<(ClassId, usize)> {
    let mut common: Option<Vec<(ClassId, usize)>> = None;
    for member in members {
        let beside = beside(axes, member);
        common = Some(match common {
            None => beside.into_iter().filter(|c| c.0 != leaf && c.1 > 1).collect(),
            Some(old) => old.into_iter().filter(|c| beside.contains(c)).collect(),
        });
    }
    common.unwrap_or_default()
}

/// Classes in the order of a constant's axis, each once.
fn ordered(axes: &Axes, constant: &Member, classes: &[(ClassId, usize)]) -> Vec<(ClassId, usize)> {
    let mut out: Vec<(ClassId, usize)> = Vec::new();
    for factor in beside(axes, constant) {
        if classes.contains(&factor) && !out.contains(&factor) {
            out.push(factor);
        }
    }
    out
}

/// Where constants that hold one value for all heads are multiplied with what has heads. `None` where one of them is used in another
/// way: a product alone leaves what a head removed at zero, and takes a table for each head in the place of one for all.
fn uses(graph: &Graph, axes: &Axes, leaf: ClassId, heads: &[(ClassId, usize)], aside: &BTreeSet<CarrierId>) -> Option<Vec<Use>> {
    let mut found = Vec::new();
    for carrier in aside {
        let readers = match axes.carriers()[*carrier].of {
            Of::Private(_, reader) => vec![reader],
            Of::Value(v) => graph.value(v).users().to_vec(),
            Of::Virtual(..) => return None,
        };
        for at in readers {
            if axes.carrier_at(graph, at.node, Slot::In(at.slot)) != Some(*carrier) {
                continue;
            }
            let node = graph.node(at.node);
            let mut outputs = node.outputs().iter().flatten().map(|v| v.index());
            if outputs.clone().all(|o| axes.carriers()[o].constant) {
                let has_leaf = |o: &usize| (0..axes.carriers()[*o].shape.len()).any(|a| axes.classes_on((*o, a)).contains(&leaf));
                if outputs.any(|o| !aside.contains(&o) && has_leaf(&o)) {
                    return None;
                }
                continue;
            }
            let factor = matches!(node.op(), "Mul" | "Div") && ops::is_factor(node.domain(), node.op(), at.slot);
            let product = node.output(0).filter(|_| factor)?.index();
            let known = |c: &ClassId| {
                let on = |axis: &usize| axes.classes_on((product, *axis)).contains(c);
                let axis = (0..axes.carriers()[product].shape.len()).find(on);
                axis.is_some_and(|a| {
                    axes.carriers()[product].shape[a].size().is_some() && !axes.classes_on((product, a)).contains(&leaf)
                })
            };
            if !heads.iter().all(|(c, _)| known(c)) {
                return None;
            }
            found.push(at);
        }
    }
    found.sort_unstable();
    Some(found)
}

/// Heads that keep the same dims in every position of `nest`: they stand beside the leaf where it starts, in a weight, and where it
/// is summed over.
pub(super) fn sharers(graph: &Graph, axes: &Axes, leaf: ClassId, nest: &[(ClassId, usize)]) -> Vec<(ClassId, usize)> {
    let class = &axes.classes()[leaf];
    let mut best: Vec<(ClassId, usize)> = Vec::new();
    for sink in &class.sinks {
        for (slot, _) in std::iter::once(sink.a).chain(sink.b) {
            let Some(operand) = axes.carrier_at(graph, sink.node, slot) else { continue };
            let on: BTreeSet<ClassId> =
                (0..axes.carriers()[operand].shape.len()).flat_map(|axis| axes.classes_on((operand, axis))).collect();
            for member in class.members.iter().filter(|m| axes.carriers()[m.carrier].constant) {
                let mut heads: Vec<(ClassId, usize)> = Vec::new();
                for factor in beside(axes, member) {
                    let counted = factor.0 != leaf && on.contains(&factor.0) && !nest.contains(&factor);
                    if counted && !heads.contains(&factor) {
                        heads.push(factor);
                    }
                }
                let count = |h: &[(ClassId, usize)]| h.iter().map(|(_, n)| n).product::<usize>();
                if count(&heads) > count(&best) {
                    best = heads;
                }
            }
        }
    }
    best
}
