//! What must hold of every graph, whatever it is: prunes it at random and compares with the original in which the test itself has
//! zeroed what was removed.
//!
//! The zeroing uses nothing of `slice` but its account of the cuts (`cuts`, `cloned`), which is what users and the twin go by.

use super::case::Case;
use super::harness::{Random, output};
use std::collections::{BTreeMap, BTreeSet};
use vitrim::anatomy::{Anatomy, Group, Kind};
use vitrim::axes::ClassId;
use vitrim::data::array::Array;
use vitrim::graph::{Graph, Tensor, Use};
use vitrim::pipeline::analyse;
use vitrim::plan::Kept;
use vitrim::runtime::{Optimize, RuntimeName, SessionOptions, open};
use vitrim::slice::{self, Sliced};

/// Largest difference, relative to the largest value of an output.
const TOLERANCE: f32 = 1e-4;

/// What a case came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Nothing is offered to be cut.
    Nothing,
    /// This many groups were pruned, and all is right.
    Cut(usize),
}

/// Checks one case; what is wrong with it, in words.
pub(crate) fn check(case: &Case) -> Result<Outcome, String> {
    let graph = &case.graph;
    let (facts, anatomy) = analyse(graph).map_err(|e| format!("analysis: {e}"))?;
    refusals_are_named(graph, &anatomy)?;
    all_is_offered(case, &anatomy)?;
    let kept = pruned(&anatomy, &mut case.pruning());
    if kept.is_empty() {
        return Ok(Outcome::Nothing);
    }
    let sliced = slice::apply(graph, &facts, &anatomy, &kept, &analyse).map_err(|e| format!("slicing {kept:?}: {e}"))?;
    let text = |e: String| format!("{e}\nkept {kept:?}\ncuts {:?}\ncloned {:?}", sliced.cuts, sliced.cloned);
    as_asked(&anatomy, &kept, graph, &sliced).map_err(text)?;
    untouched(graph, &sliced).map_err(text)?;
    let feeds = case.feeds();
    let found = outputs(&sliced.graph, &feeds).map_err(|e| text(format!("the sliced graph: {e}")))?;
    // The account promises that zeroing `cuts` alone is enough; what was copied for some readers may be zeroed for them, too.
    let mut copies = vec![Copies::Whole];
    if !sliced.cloned.is_empty() {
        copies.push(Copies::Zeroed);
    }
    for copies in copies {
        let zeroed = zeroed(graph, &sliced, copies).map_err(text)?;
        let expected = outputs(&zeroed, &feeds).map_err(|e| text(format!("the zeroed original: {e}")))?;
        for (name, expected) in &expected {
            compare(name, output(&found, name), expected).map_err(|e| text(format!("{e}, copies {copies:?}")))?;
        }
    }
    Ok(Outcome::Cut(kept.len()))
}

/// As [`check`]; a panic is a failure like any other.
pub(crate) fn check_caught(case: &Case) -> Result<Outcome, String> {
    let run = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| check(case)));
    run.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| s.to_string()));
        Err(format!("panic: {}", text.unwrap_or_default()))
    })
}

fn outputs(graph: &Graph, feeds: &[(String, Array)]) -> Result<Vec<(String, Array)>, String> {
    let bytes = vitrim::onnx::to_bytes(graph).map_err(|e| e.to_string())?;
    // Rewrites would cost more than they save on graphs that run once.
    let options = SessionOptions { threads: 1, optimize: Optimize::Off, ..SessionOptions::default() };
    let mut session = open(RuntimeName::Ort, &bytes, &options).map_err(|e| e.to_string())?;
    session.run(feeds).map_err(|e| e.to_string())
}

fn compare(name: &str, found: &Array, expected: &Array) -> Result<(), String> {
    if found.dims != expected.dims {
        return Err(format!("output {name} has shape {:?}, expected {:?}", found.dims, expected.dims));
    }
    let (found, expected) = (found.as_f32(), expected.as_f32());
    if expected.iter().any(|x| !x.is_finite()) {
        return Err(format!("output {name} of the zeroed original is not finite"));
    }
    let largest = expected.iter().fold(0f32, |m, x| m.max(x.abs()));
    let worst = found
        .iter()
        .zip(expected.iter())
        .fold(0f32, |m, (a, b)| if a.is_finite() { m.max((a - b).abs()) } else { f32::INFINITY });
    if worst > TOLERANCE * largest + 1e-6 {
        return Err(format!("output {name} differs by {worst} of {largest}"));
    }
    Ok(())
}

/// A random choice of what stays of most groups: the same number in every head, in one case of six a single one.
fn pruned(anatomy: &Anatomy, random: &mut Random) -> Kept {
    let mut below = |n: usize| (random.bits() >> 33) as usize % n.max(1);
    let groups: Vec<&Group> = anatomy.groups.iter().filter(|g| g.kind != Kind::Token).collect();
    let mut kept = Kept::new();
    let certain = below(groups.len());
    for (number, group) in groups.iter().enumerate() {
        if number != certain && below(10) < 3 {
            continue;
        }
        let coordinates: BTreeSet<usize> = group.stored.iter().copied().collect();
        let coordinates: Vec<usize> = coordinates.into_iter().collect();
        let stay = if below(6) == 0 { 1 } else { 1 + below(coordinates.len() - 1) };
        let width = group.stored.len();
        let mut units = Vec::new();
        for row in 0..group.nest_count() {
            let mut left = coordinates.clone();
            while left.len() > stay {
                left.remove(below(left.len()));
            }
            units.extend((0..width).filter(|s| left.contains(&group.stored[*s])).map(|s| row * width + s));
        }
        kept.insert(group.id.clone(), units);
    }
    kept
}

/// What becomes of constants that were copied for some of their readers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Copies {
    Whole,
    Zeroed,
}

/// Axis and removed positions, for each cut of a tensor.
type Cuts<'a> = Vec<(usize, &'a [usize])>;

/// The original with zeros in the place of what was removed; a constant that was copied for a reader may be copied here too.
fn zeroed(graph: &Graph, sliced: &Sliced, copies: Copies) -> Result<Graph, String> {
    let mut out = graph.clone();
    let constant = |name: &str| {
        let v = graph.find(name).ok_or_else(|| format!("'{name}' is cut and not there"))?;
        graph.constant(v).map(|t| (v, t)).ok_or_else(|| format!("'{name}' is cut and no constant"))
    };
    let mut cuts: BTreeMap<&str, Cuts<'_>> = BTreeMap::new();
    for cut in &sliced.cuts {
        cuts.entry(&cut.initializer).or_default().push((cut.axis, &cut.removed));
    }
    for (name, cuts) in cuts {
        let (v, tensor) = constant(name)?;
        out.set_constant(v, zero(&tensor, &cuts)?);
    }
    let mut copied: BTreeMap<(&str, &str), Cuts<'_>> = BTreeMap::new();
    for copy in sliced.cloned.iter().filter(|_| copies == Copies::Zeroed) {
        copied.entry((&copy.initializer, &copy.user)).or_default().push((copy.axis, &copy.removed));
    }
    for ((name, user), cuts) in copied {
        let (v, tensor) = constant(name)?;
        let copy = sliced.graph.find(user).ok_or_else(|| format!("the copy '{user}' is not there"))?;
        let zeroed = out.add_initializer("zeroed", zero(&tensor, &cuts)?);
        let readers: Vec<Use> = sliced.graph.value(copy).users().to_vec();
        // Nodes keep their numbers; one that the slice added stands for none of the original.
        let readers: Vec<Use> = readers
            .into_iter()
            .filter(|at| {
                at.node < graph_end(graph) && graph.order().contains(&at.node) && graph.node(at.node).input(at.slot) == Some(v)
            })
            .collect();
        if readers.is_empty() {
            return Err(format!("no node of the original reads the copy '{user}' of '{name}'"));
        }
        for at in readers {
            out.set_input(at, Some(zeroed));
        }
    }
    out.sort();
    Ok(out)
}

fn graph_end(graph: &Graph) -> vitrim::graph::NodeId {
    vitrim::graph::Id::new(graph.node_capacity())
}

fn zero(tensor: &Tensor, cuts: &[(usize, &[usize])]) -> Result<Tensor, String> {
    let width = tensor.dtype.bits() / 8;
    let mut bytes = tensor.bytes.to_vec();
    for (axis, removed) in cuts {
        let size = tensor.dims[*axis];
        if removed.iter().any(|r| *r >= size) || removed.is_empty() {
            return Err(format!("removes {removed:?} of {size}"));
        }
        let inner: usize = tensor.dims[axis + 1..].iter().product();
        for (element, chunk) in bytes.chunks_exact_mut(width).enumerate() {
            if removed.contains(&(element / inner % size)) {
                chunk.fill(0);
            }
        }
    }
    Ok(Tensor { bytes: bytes.into(), ..tensor.clone() })
}

/// Every constant that the cuts do not name is as it was, and the others are what the cuts leave of them.
fn untouched(graph: &Graph, sliced: &Sliced) -> Result<(), String> {
    for (v, value) in graph.values() {
        let Some(before) = graph.constant(v).filter(|t| t.dtype.is_float()) else { continue };
        let Some(after) = sliced.graph.find(value.name()).and_then(|v| sliced.graph.constant(v)) else { continue };
        let cuts = sliced.cuts.iter().filter(|c| c.initializer == value.name());
        let expected = cuts.fold(before, |t, c| {
            let stays: Vec<usize> = (0..c.of).filter(|i| !c.removed.contains(i)).collect();
            t.take(c.axis, &stays)
        });
        if expected.dims != after.dims || expected.bytes != after.bytes {
            return Err(format!("'{}' is not what its cuts leave of it", value.name()));
        }
    }
    Ok(())
}

/// As many positions as asked for are gone of every axis that one pruned group alone stands on.
fn as_asked(anatomy: &Anatomy, kept: &Kept, graph: &Graph, sliced: &Sliced) -> Result<(), String> {
    let by = |class: ClassId| anatomy.groups.iter().find(|g| g.leaf == class && kept.contains_key(&g.id));
    for group in anatomy.groups.iter().filter(|g| kept.contains_key(&g.id)) {
        for cut in &group.cuts {
            let name = graph.value(cut.value).name();
            let carriers = anatomy.axes.carriers().iter().enumerate();
            let mine: Vec<usize> =
                carriers.filter(|(_, c)| matches!(c.of, vitrim::axes::Of::Value(v) if v == cut.value)).map(|(c, _)| c).collect();
            let Some(carrier) = mine.first().filter(|_| cut.reader.is_none()) else { continue };
            let regions = anatomy.axes.regions((*carrier, cut.axis));
            let [region] = &regions[..] else { continue };
            let pruned = region.factors.iter().filter(|(c, _)| by(*c).is_some()).count();
            if pruned != 1 {
                continue;
            }
            let Some(record) = sliced.cuts.iter().find(|c| c.initializer == name && c.axis == cut.axis) else { continue };
            let expected = record.of * (group.units() - kept[&group.id].len()) / group.units();
            let nested = group.nest.iter().any(|(c, _)| by(*c).is_some());
            if record.removed.len() != expected && !nested {
                return Err(format!("{} of '{name}' are gone, expected {expected}", record.removed.len()));
            }
        }
    }
    Ok(())
}

/// Every refusal says of which node, which operator, which axis and why; at a graph input or output there is no node.
fn refusals_are_named(graph: &Graph, anatomy: &Anatomy) -> Result<(), String> {
    for refusal in &anatomy.refused {
        let wrong = |what: &str| Err(format!("{what}: {refusal:?}"));
        if refusal.reason.is_empty() {
            return wrong("a refusal without a reason");
        }
        if refusal.node.is_empty() {
            if !refusal.op.is_empty() || !refusal.reason.starts_with("graph ") {
                return wrong("a refusal without a node");
            }
            continue;
        }
        let Some((_, node)) = graph.nodes().find(|(id, _)| graph.label(*id) == refusal.node) else {
            return wrong("a refusal at a node that is not there");
        };
        if node.op() != refusal.op {
            return wrong("a refusal of another operator");
        }
    }
    Ok(())
}

/// What a block says must be offered is among the cuts of a group.
fn all_is_offered(case: &Case, anatomy: &Anatomy) -> Result<(), String> {
    for (value, axis) in &case.must {
        let offered = anatomy.groups.iter().flat_map(|g| &g.cuts).any(|c| c.value == *value && c.axis == *axis);
        if !offered && !case.graph.value(*value).users().is_empty() {
            let name = case.graph.value(*value).name();
            return Err(format!("axis {axis} of '{name}' is not offered; refused {:?}", anatomy.refused));
        }
    }
    Ok(())
}
