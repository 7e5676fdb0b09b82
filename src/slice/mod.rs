//! Graph + Anatomy + kept units -> a smaller graph.
//!
//! In: the graph as it was read, its facts and anatomy, and the units kept. Out: [`Sliced`], the graph with the units gone and an
//! account of what was cut. Example: half of the `mlp` of a block with weights `[48, 192]` and `[192, 48]` leaves `[48, 96]` and
//! `[96, 48]`, and a bias of 96. Order of work: shape arithmetic is frozen, operators refit their constants, values that stop being
//! blocks are taken apart, constants are cut, what died is removed.
//! Invariant (C2): the result computes what the original computes with the removed units zeroed. (C4): nothing else changes.

mod branch;
mod constants;
pub mod cutset;
mod empty;
mod heads;
pub mod refit;
pub(crate) mod shapes;
mod tokens;
pub mod twin;
mod widths;

use crate::anatomy::Anatomy;
use crate::axes::CarrierId;
use crate::axes::relation::Slot;
use crate::graph::{Graph, Id, NodeId, Use, ValueId, check};
use crate::infer::{self, Facts, InferError};
use crate::ops::{self, Refit};
use crate::plan::Kept;
use cutset::{CutError, CutSet, Stays};
use refit::{Edit, RefitCx, RefitError};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// A constant that was cut along an axis, all of its readers losing the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TensorCut {
    /// Its name in the original.
    pub initializer: String,
    /// The axis.
    pub axis: usize,
    /// Positions removed, in the original.
    pub removed: Vec<usize>,
    /// Size of the axis in the original.
    pub of: usize,
    /// What stays, in the order of the result; told as `order` where it is not ascending: where heads were sorted by their width.
    #[serde(rename = "order", skip_serializing_if = "is_ascending")]
    pub kept: Vec<usize>,
}

fn is_ascending(kept: &[usize]) -> bool {
    kept.is_sorted()
}

/// A copy of a constant that was cut for some of its readers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Cloned {
    /// Name of the constant in the original.
    pub initializer: String,
    /// The axis.
    pub axis: usize,
    /// Name of the copy.
    pub user: String,
    /// Positions removed, in the original.
    pub removed: Vec<usize>,
    /// Size of the axis in the original.
    pub of: usize,
}

/// Nodes that a cut took away or put in.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct NodeChanges {
    /// Labels of nodes that are gone.
    pub removed: Vec<String>,
    /// Labels of nodes that are new.
    pub added: Vec<String>,
}

/// A sliced graph and what was done to it.
#[derive(Clone, Debug)]
pub struct Sliced {
    /// The graph.
    pub graph: Graph,
    /// Constants cut for all readers.
    pub cuts: Vec<TensorCut>,
    /// Constants copied for some.
    pub cloned: Vec<Cloned>,
    /// Nodes changed.
    pub nodes: NodeChanges,
}

/// Why a plan could not be applied.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SliceError {
    /// The plan does not fit the model.
    #[error(transparent)]
    Cut(#[from] CutError),
    /// A node cannot follow.
    #[error(transparent)]
    Refit(#[from] RefitError),
    /// The result contradicts itself: a fault of vitrim.
    #[error("the sliced graph contradicts itself: {0}")]
    Broken(#[from] InferError),
    /// The result has other shapes than the plan says: a fault of vitrim.
    #[error("'{value}' has shape {found} after the cut, expected {expected}")]
    Shape {
        /// The value.
        value: String,
        /// What inference finds.
        found: String,
        /// What the plan says.
        expected: String,
    },
    /// An invariant of the graph broke: a fault of vitrim.
    #[error("the sliced graph breaks {0}")]
    Invariant(String),
}

/// Removes all units that are not kept. Groups that `kept` does not name stay whole. Units go first; the graph without them is then
/// analysed again by `analyse`, which finds in it the places where the sequence is shortened.
pub fn apply(graph: &Graph, facts: &Facts, anatomy: &Anatomy, kept: &Kept, analyse: &Analyse<'_>) -> Result<Sliced, SliceError> {
    let sites = tokens::kept_tokens(anatomy, kept);
    let mut out = cut_units(graph, facts, anatomy, kept)?;
    if !sites.is_empty() {
        let (facts, found) = analyse(&out.graph)?;
        let sites = tokens::find_again(anatomy, &found, &sites)?;
        let (shorter, cuts, cloned) = tokens::cut(&out.graph, &facts, &found, &sites)?;
        out = Sliced { graph: shorter, nodes: NodeChanges::default(), ..out };
        out.add(cuts, cloned);
        out.nodes = node_changes(graph, &out.graph);
    }
    keep_cut_branches(&mut out.graph, facts)?;
    Ok(out)
}

/// Lets branches of known condition stay inlined where a cut went through them: the other branch, and the shapes that the file declares
/// of both, no longer fit.
pub(crate) fn keep_cut_branches(graph: &mut Graph, old: &Facts) -> Result<(), InferError> {
    if graph.calls().iter().all(|c| c.condition.is_none()) {
        return Ok(());
    }
    let new = infer::facts(graph)?;
    let is_other = |v: &ValueId| old.shape(*v) != new.shape(*v);
    let through = |node: &crate::graph::Node| node.inputs().iter().chain(node.outputs()).flatten().any(is_other);
    let cut: BTreeSet<usize> = graph.nodes().filter(|(_, node)| through(node)).filter_map(|(_, node)| node.call()).collect();
    for call in cut.into_iter().filter(|c| graph.calls()[*c].condition.is_some()).collect::<Vec<_>>() {
        graph.keep_inlined(call);
    }
    Ok(())
}

impl Sliced {
    /// Adds what a second cut did, in the names of the original.
    fn add(&mut self, cuts: Vec<TensorCut>, cloned: Vec<Cloned>) {
        let source = |name: &str, known: &[Cloned]| known.iter().find(|c| c.user == name).map(|c| c.initializer.clone());
        for cut in cuts {
            match source(&cut.initializer, &self.cloned) {
                None => self.cuts.push(cut),
                Some(initializer) => {
                    let TensorCut { initializer: user, axis, removed, of, .. } = cut;
                    self.cloned.push(Cloned { initializer, axis, user, removed, of });
                }
            }
        }
        for copy in cloned {
            if let Some(initializer) = source(&copy.initializer, &self.cloned) {
                // What the first copy lost, the second one lacks too.
                let first = self.cloned.iter().filter(|c| c.user == copy.initializer);
                let lost: Vec<Cloned> = first.map(|c| Cloned { user: copy.user.clone(), ..c.clone() }).collect();
                self.cloned.extend(lost.into_iter().filter(|c| c.axis != copy.axis));
                self.cloned.push(Cloned { initializer, ..copy });
            } else {
                let cut_first = self.cuts.iter().filter(|c| c.initializer == copy.initializer && c.axis != copy.axis);
                let lost = cut_first.map(|c| Cloned {
                    initializer: c.initializer.clone(),
                    axis: c.axis,
                    user: copy.user.clone(),
                    removed: c.removed.clone(),
                    of: c.of,
                });
                self.cloned.extend(lost.collect::<Vec<_>>());
                self.cloned.push(copy);
            }
        }
        let graph = &self.graph;
        self.cloned.retain(|c| graph.find(&c.user).is_some_and(|v| graph.is_constant(v)));
        self.cloned.dedup();
    }
}

/// Nodes of the original that are gone, and nodes that it does not have.
pub(crate) fn node_changes(old: &Graph, new: &Graph) -> NodeChanges {
    let (before, after): (BTreeSet<NodeId>, BTreeSet<NodeId>) =
        (old.order().iter().copied().collect(), new.order().iter().copied().collect());
    NodeChanges {
        removed: old.order().iter().filter(|id| !after.contains(id)).map(|id| old.label(*id)).collect(),
        added: new.order().iter().filter(|id| !before.contains(id)).map(|id| new.label(*id)).collect(),
    }
}

/// Facts and anatomy of a graph: what the stages before this one find.
pub type Analyse<'a> = dyn Fn(&Graph) -> Result<(Facts, Anatomy), InferError> + 'a;

fn cut_units(graph: &Graph, facts: &Facts, anatomy: &Anatomy, kept: &Kept) -> Result<Sliced, SliceError> {
    let cut = CutSet::new(anatomy, kept)?;
    let stays = stays_of(&cut);
    let ragged: BTreeSet<CarrierId> = stays.iter().filter(|(_, s)| **s == Stays::Ragged).map(|((c, _), _)| *c).collect();
    let split = widths::split(graph, anatomy, &cut)?;
    let copied = widths::copied(graph, &split);
    let unused = unused_values(graph);
    let keeps_unused = |g: &Graph, v: ValueId| v.index() < unused.len() && unused[v.index()] && g.value(v).users().is_empty();
    let mut needs = constants::needs(graph, &anatomy.axes, &cut, &copied);
    let mut out = graph.clone();

    let new_size = |v: ValueId, axis: usize| match stays.get(&(v.index(), axis)) {
        // Of a value that falls apart no size is what it was.
        Some(_) if split.contains_key(&v.index()) => Some(0),
        Some(Stays::Positions(p)) => Some(p.len()),
        // Of a value that is taken apart one part is asked, which has its sizes nowhere but where they are only known at run time.
        _ if ragged.contains(&v.index()) => facts.shape(v).and_then(|s| s[axis].known()).map(|_| 0),
        _ => None,
    };
    let new_shape = |v: ValueId| {
        let old = facts.shape(v)?.iter().enumerate();
        Some(old.map(|(axis, d)| new_size(v, axis).map_or(d.clone(), infer::Dim::from)).collect::<Vec<_>>())
    };
    let detached = empty::detach(&mut out, facts, &anatomy.axes, &cut)?;
    let is_emptied = !detached.is_empty();
    if is_emptied {
        out.remove_dead(&keeps_unused);
    }
    let gone = stays.iter().filter(|(_, s)| matches!(s, Stays::Positions(p) if p.is_empty())).map(|((c, _), _)| *c);
    let unreadable: BTreeSet<CarrierId> = gone.chain(split.keys().copied()).chain(ragged.iter().copied()).collect();
    if !unreadable.is_empty() {
        empty::read_sizes_elsewhere(&mut out, graph, facts, &unreadable).map_err(|(id, why)| match split.values().next() {
            Some(class) if !is_emptied => {
                CutError::Apart { group: cut.name_of_heads(*class), why: format!("node {}: {why}", graph.label(id)) }
            }
            _ => empty::needed(graph, id, &empty::ids(&cut), why),
        })?;
        out.remove_dead(&keeps_unused);
    }
    if is_emptied {
        empty::check_dead(&out, graph, &anatomy.axes, &cut)?;
    }
    let mut cuts = constants::drop_dead(graph, &out, &mut needs);
    shapes::freeze(&mut out, facts, &new_size);
    let (mut patches, mut edits) = refit_nodes(&mut out, graph, facts, anatomy, &stays, &ragged, &copied)?;
    let mut brancher = branch::Brancher::new(&mut out, graph, facts, &anatomy.axes, &cut, &ragged, &split);
    brancher.run().map_err(|e| match split.values().next() {
        Some(class) => SliceError::Cut(CutError::Apart { group: cut.name_of_heads(*class), why: e.to_string() }),
        None => SliceError::Refit(e),
    })?;
    patches.append(&mut brancher.patches);
    edits.append(&mut brancher.edits);
    let mut cloned = std::mem::take(&mut brancher.cloned);
    if !split.is_empty() {
        out.sort();
        out.remove_dead(&keeps_unused);
    }
    let alive: BTreeSet<NodeId> = out.order().iter().copied().collect();
    for (at, entries) in patches.into_iter().filter(|(at, _)| alive.contains(&at.node)) {
        shapes::patch(&mut out, facts, at, &entries);
    }
    let (own_cuts, own_cloned) = constants::cut(&mut out, needs);
    cuts.extend(own_cuts);
    cloned.extend(own_cloned);
    for (at, edit) in edits.into_iter().filter(|(at, _)| alive.contains(&at.node)) {
        constants::edit(&mut out, at, &edit, &mut cuts, &mut cloned);
    }
    heads::spread(&mut out, graph, &anatomy.axes, &cut);
    out.sort();
    let loose = if is_emptied { empty::settle(&mut out, detached, facts, &cut, &new_shape)? } else { BTreeSet::new() };
    out.sort();
    out.remove_dead(&keeps_unused);
    check_result(&out, facts, &stays, &loose, graph.value_count())?;
    let nodes = node_changes(graph, &out);
    Ok(Sliced { graph: out, cuts, cloned, nodes })
}

/// What stays of each axis that loses positions.
fn stays_of(cut: &CutSet<'_>) -> BTreeMap<(CarrierId, usize), Stays> {
    cut.touched().into_iter().map(|at| (at, cut.stays(at))).filter(|(_, s)| *s != Stays::Whole).collect()
}

/// Values that nothing reads in the original, no output among them: they stay as they are.
fn unused_values(graph: &Graph) -> Vec<bool> {
    graph.values().map(|(id, v)| v.users().is_empty() && !graph.outputs().contains(&id)).collect()
}

type Patches = Vec<(Use, Vec<(usize, i64)>)>;
type Edits = Vec<(Use, Edit)>;

/// Lets every node that touches a cut axis follow it.
fn refit_nodes(
    out: &mut Graph,
    graph: &Graph,
    facts: &Facts,
    anatomy: &Anatomy,
    stays: &BTreeMap<(CarrierId, usize), Stays>,
    ragged: &BTreeSet<CarrierId>,
    copied: &BTreeSet<NodeId>,
) -> Result<(Patches, Edits), RefitError> {
    let touched: BTreeSet<CarrierId> = stays.keys().map(|(c, _)| *c).collect();
    let alive: BTreeSet<NodeId> = out.order().iter().copied().collect();
    let (mut patches, mut edits) = (Vec::new(), Vec::new());
    for (id, node) in graph.nodes().filter(|(id, _)| alive.contains(id) && !copied.contains(id)) {
        let slots = (0..node.inputs().len()).map(Slot::In).chain((0..node.outputs().len()).map(Slot::Out));
        let carriers: Vec<(Slot, CarrierId)> = slots
            .filter_map(|s| anatomy.axes.carrier_at(graph, id, s).map(|c| (s, c)))
            .filter(|(_, c)| touched.contains(c))
            .collect();
        if carriers.is_empty() || carriers.iter().any(|(_, c)| ragged.contains(c)) {
            continue;
        }
        let Some(Refit::Rule(rule)) = ops::rule_of(graph, node).map(|r| &r.refit) else { continue };
        let look = |v: ValueId, axis: usize| {
            let at = |slot: &Slot| match slot {
                Slot::In(i) => node.input(*i),
                Slot::Out(o) => node.output(*o),
                Slot::Virtual(_) => None,
            };
            let carrier = carriers.iter().find(|(s, _)| at(s) == Some(v)).map(|(_, c)| *c)?;
            match stays.get(&(carrier, axis)) {
                Some(Stays::Positions(p)) => Some(p.as_slice()),
                Some(Stays::Scaled) => Some(&[][..]),
                _ => None,
            }
        };
        let mut cx =
            RefitCx { graph: out, original: graph, origin: id, id, facts, kept: &look, patches: Vec::new(), edits: Vec::new() };
        rule(&mut cx)?;
        let found = std::mem::take(&mut cx.patches);
        let edited = std::mem::take(&mut cx.edits);
        patches.extend(found.into_iter().map(|(slot, entries)| (Use { node: id, slot }, entries)));
        edits.extend(edited.into_iter().map(|(slot, edit)| (Use { node: id, slot }, edit)));
    }
    Ok((patches, edits))
}

/// Whether two sizes are known to differ: for some sizes of the inputs.
fn differ(a: &infer::Dim, b: &infer::Dim, symbols: &BTreeSet<std::sync::Arc<str>>) -> bool {
    // Sizes that windows and strides are likely to divide.
    a != b
        && [96, 448].into_iter().any(|size| {
            let of_inputs = |name: &str| symbols.contains(name).then_some(size);
            matches!((a.eval(&of_inputs), b.eval(&of_inputs)), (Some(a), Some(b)) if a != b)
        })
}

/// The result is a sound graph, and every value that is still there has the shape that the plan says.
fn check_result(
    out: &Graph,
    facts: &Facts,
    stays: &BTreeMap<(CarrierId, usize), Stays>,
    loose: &BTreeSet<ValueId>,
    old_count: usize,
) -> Result<(), SliceError> {
    // I6 does not hold of a graph whose elements were left out to count only.
    let whole = |v: &check::Violation| v.rule != "I6" || !v.what.contains(": 0 bytes");
    if let Some(violation) = check::check(out).into_iter().find(whole) {
        return Err(SliceError::Invariant(violation.to_string()));
    }
    let new = infer::facts(out)?;
    let sizes = out.inputs().iter().filter_map(|v| facts.shape(*v)).flatten();
    let symbols: BTreeSet<_> = sizes.flat_map(infer::Dim::names).collect();
    for (id, value) in out.values().take(old_count) {
        let made = value.producer().is_some() && !out.is_constant(id);
        let (Some(old), Some(found)) = (facts.shape(id), new.shape(id)) else { continue };
        if !made || loose.contains(&id) || (value.users().is_empty() && !out.outputs().contains(&id)) {
            continue;
        }
        let expected: Vec<infer::Dim> = old
            .iter()
            .enumerate()
            .map(|(axis, d)| match stays.get(&(id.index(), axis)) {
                Some(Stays::Positions(p)) => p.len().into(),
                _ => d.clone(),
            })
            .collect();
        let scaled = |axis: usize| matches!(stays.get(&(id.index(), axis)), Some(Stays::Scaled));
        let differs = |(axis, (a, b)): (usize, (&infer::Dim, &infer::Dim))| !scaled(axis) && differ(a, b, &symbols);
        if found.len() != expected.len() || found.iter().zip(&expected).enumerate().any(differs) {
            return Err(SliceError::Shape {
                value: value.name().to_string(),
                found: format!("{found:?}"),
                expected: format!("{expected:?}"),
            });
        }
    }
    Ok(())
}
