//! Shape arithmetic after a cut.
//!
//! Two steps keep it simple. [`freeze`] makes every number that was read off a cut axis what it was before, so that run-time
//! arithmetic (the scale `1/sqrt(E)` among it) is that of the original; then each operator's `refit` asks [`patch`] for the entries
//! of its shape constant that the cut changes.

use crate::graph::build::{Builder, attr};
use crate::graph::{AttrValue, DType, Graph, NewNode, NodeId, SideMap, Tensor, Use, ValueId};
use crate::infer::{Dim, Fact, Facts, InferCx, Known};
use crate::ops;

/// Makes what Shape nodes read of cut axes the numbers of before. `size` gives the size that an axis has after the cut.
pub(crate) fn freeze(graph: &mut Graph, facts: &Facts, size: &dyn Fn(ValueId, usize) -> Option<usize>) {
    let mut tainted: SideMap<ValueId, Option<Fact>> = SideMap::filled(graph.value_count(), None);
    for id in graph.order().to_vec() {
        let node = graph.node(id).clone();
        let Some(rule) = ops::rule_of(graph, &node) else { continue };
        let inputs: Vec<Option<Fact>> = node.inputs().iter().map(|v| v.map(|v| after(graph, facts, &tainted, size, v))).collect();
        let reads_shape = matches!(rule.axes, ops::Axes::ShapeOnly);
        let reads_tainted = node.inputs().iter().flatten().any(|v| tainted.get(*v).is_some_and(Option::is_some));
        if !reads_shape && !reads_tainted {
            continue;
        }
        let cx = InferCx::with_inputs(graph, id, inputs.iter().map(Option::as_ref).collect());
        let new = (rule.infer)(&cx).unwrap_or_default();
        for (v, new) in node.outputs().iter().flatten().zip(new) {
            let old = facts.get(*v);
            if new.known == old.known && old.known.is_some() {
                continue;
            }
            match (&old.known, old.dtype) {
                (Some(known), Some(dtype)) if numbers(known).is_some() => {
                    let constant = constant_of(known, dtype, old.shape.as_deref().unwrap_or(&[]));
                    let name = format!("{}_frozen", graph.value(*v).name());
                    let frozen = graph.add_initializer(&name, constant);
                    graph.replace_uses(*v, frozen);
                }
                // A vector with symbols in it: what is read from it is looked at one by one.
                (Some(Known::Ints(_)), _) if reads_shape => tainted[*v] = Some(new),
                _ if reads_tainted && !reads_shape => restore_source(graph, facts, id, &tainted),
                _ => {}
            }
        }
        let known_outputs = node.outputs().iter().flatten().all(|v| facts.get(*v).known.is_some());
        if reads_tainted && !known_outputs {
            restore_source(graph, facts, id, &tainted);
        }
    }
}

/// The integers of a value as a constant, where all are known without running the graph.
pub(super) fn known_integers(facts: &Facts, v: ValueId) -> Option<Tensor> {
    let Fact { dtype: Some(dtype), shape, known: Some(known @ Known::Ints(_)) } = facts.get(v) else { return None };
    numbers(known).map(|_| constant_of(known, *dtype, shape.as_deref().unwrap_or(&[])))
}

/// The fact of a value after the cut, content included where it is shape arithmetic.
fn after(
    graph: &Graph,
    facts: &Facts,
    tainted: &SideMap<ValueId, Option<Fact>>,
    size: &dyn Fn(ValueId, usize) -> Option<usize>,
    v: ValueId,
) -> Fact {
    match tainted.get(v) {
        // A number that was frozen a moment ago.
        None => return graph.constant(v).map_or_else(Fact::default, |t| Fact::of_tensor(&t)),
        Some(Some(fact)) => return fact.clone(),
        Some(None) => {}
    }
    let mut fact = facts.get(v).clone();
    if let Some(shape) = &mut fact.shape {
        for (axis, d) in shape.iter_mut().enumerate() {
            if let Some(n) = size(v, axis) {
                *d = Dim::from(n);
            }
        }
    }
    fact
}

/// Gives a node that reads a changed shape vector the original's numbers: `Where(is number, number, vector)`.
fn restore_source(graph: &mut Graph, facts: &Facts, id: NodeId, tainted: &SideMap<ValueId, Option<Fact>>) {
    for slot in 0..graph.node(id).inputs().len() {
        let Some(v) = graph.node(id).input(slot).filter(|v| tainted.get(*v).is_some_and(Option::is_some)) else {
            continue;
        };
        let Some(Known::Ints(old)) = &facts.get(v).known else { continue };
        let entries: Vec<(usize, i64)> = old.iter().enumerate().filter_map(|(i, d)| d.known().map(|n| (i, n))).collect();
        let fixed = overlay(graph, v, old.len(), &entries);
        graph.set_input(Use { node: id, slot }, Some(fixed));
    }
}

fn numbers(known: &Known) -> Option<usize> {
    match known {
        Known::Ints(v) => v.iter().all(|d| d.known().is_some()).then_some(v.len()),
        Known::Floats(v) => Some(v.len()),
    }
}

fn constant_of(known: &Known, dtype: DType, shape: &[Dim]) -> Tensor {
    let dims: Vec<usize> = shape.iter().filter_map(Dim::size).collect();
    match known {
        Known::Floats(v) => {
            let values: Vec<f32> = v.iter().map(|x| *x as f32).collect();
            Tensor { dims, ..Tensor::new(dtype, vec![], bytes::Bytes::new()).with_f32s(&values) }
        }
        Known::Ints(v) => {
            let values = v.iter().map(|d| d.known().unwrap_or(0));
            let bytes: Vec<u8> = match dtype.bits() {
                8 => values.map(|x| x.to_le_bytes()[0]).collect(),
                32 => values.flat_map(|x| (x as i32).to_le_bytes()).collect(),
                _ => values.flat_map(i64::to_le_bytes).collect(),
            };
            Tensor::new(dtype, dims, bytes.into())
        }
    }
}

/// `vector` with some entries replaced by numbers.
fn overlay(graph: &mut Graph, vector: ValueId, len: usize, entries: &[(usize, i64)]) -> ValueId {
    let (mut mask, mut values) = (vec![false; len], vec![0i64; len]);
    for (i, n) in entries {
        mask[*i] = true;
        values[*i] = *n;
    }
    let name = graph.value(vector).name().to_string();
    let mut b = Builder::new(graph, &format!("{name}_cut."));
    let (mask, values) = (b.constant(Tensor::bools(&mask)), b.ints(&values));
    b.op("Where", &[mask, values, vector], vec![])
}

/// Gives entries of the integer vector at an input new values, in the cheapest form that touches nobody else.
pub(crate) fn patch(graph: &mut Graph, facts: &Facts, at: Use, entries: &[(usize, i64)]) {
    let Some(v) = graph.node(at.node).input(at.slot) else { return };
    let alone = graph.value(v).users().len() == 1 && !graph.outputs().contains(&v);
    if let Some(t) = graph.constant(v) {
        let patched = patched_constant(&t, entries);
        if alone {
            graph.set_constant(v, patched);
        } else {
            let name = format!("{}_cut", graph.value(v).name());
            let clone = graph.add_initializer(&name, patched);
            graph.set_input(at, Some(clone));
        }
        return;
    }
    let len = length(graph, facts, v).unwrap_or_else(|| entries.iter().map(|(i, _)| i + 1).max().unwrap_or(0));
    match graph.value(v).producer().map(|(n, _)| (n, graph.node(n).clone())) {
        Some((concat, node)) if node.op() == "Concat" => {
            let target = if alone { concat } else { copy_node(graph, concat, at) };
            patch_pieces(graph, facts, target, entries);
        }
        _ => {
            let fixed = overlay(graph, v, len, entries);
            graph.set_input(at, Some(fixed));
        }
    }
}

/// Length of an integer vector; of one that was put in a moment ago, too.
fn length(graph: &Graph, facts: &Facts, v: ValueId) -> Option<usize> {
    let new = facts.shape(v).is_none();
    match (graph.constant(v), graph.value(v).producer()) {
        (Some(t), _) => t.dims.first().copied(),
        // An overlay: as long as its numbers.
        (None, Some((n, _))) if new && graph.node(n).op() == "Where" => length(graph, facts, graph.node(n).input(1)?),
        _ => facts.shape(v)?.first()?.size(),
    }
}

/// A copy of a node for one reader of its first output.
fn copy_node(graph: &mut Graph, id: NodeId, reader: Use) -> NodeId {
    let node = graph.node(id).clone();
    let name = node.output(0).map(|v| graph.value(v).name().to_string()).unwrap_or_default();
    let out = graph.add_value(&format!("{name}_cut"));
    let copy = graph.add_node(NewNode {
        name: graph.value(out).name().to_string(),
        op: node.op().to_string(),
        domain: node.domain().to_string(),
        inputs: node.inputs().to_vec(),
        outputs: vec![Some(out)],
        attrs: node.attrs().to_vec(),
        ..NewNode::default()
    });
    graph.set_input(reader, Some(out));
    copy
}

/// Patches the pieces of a Concat of integer vectors.
fn patch_pieces(graph: &mut Graph, facts: &Facts, concat: NodeId, entries: &[(usize, i64)]) {
    let mut start = 0;
    for slot in 0..graph.node(concat).inputs().len() {
        let Some(piece) = graph.node(concat).input(slot) else { continue };
        let len = length(graph, facts, piece).unwrap_or(1);
        let inside: Vec<(usize, i64)> =
            entries.iter().filter(|(i, _)| (start..start + len).contains(i)).map(|(i, n)| (i - start, *n)).collect();
        if inside.len() == len && graph.constant(piece).is_none() {
            let values: Vec<i64> = inside.iter().map(|(_, n)| *n).collect();
            let name = format!("{}_cut", graph.value(piece).name());
            let constant = graph.add_initializer(&name, Tensor::i64s(&values));
            graph.set_input(Use { node: concat, slot }, Some(constant));
        } else if !inside.is_empty() {
            patch(graph, facts, Use { node: concat, slot }, &inside);
        }
        start += len;
    }
}

fn patched_constant(t: &Tensor, entries: &[(usize, i64)]) -> Tensor {
    let mut values = t.to_i64s().unwrap_or_default();
    for (i, n) in entries {
        values[*i] = *n;
    }
    let bytes: Vec<u8> = if t.dtype == DType::I32 {
        values.iter().flat_map(|v| (*v as i32).to_le_bytes()).collect()
    } else {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    };
    Tensor { bytes: bytes.into(), ..t.clone() }
}

/// A Gather of constant positions, for what no constant can be cut for; its values are named after `v` and `suffix`.
pub(crate) fn gather(graph: &mut Graph, v: ValueId, axis: usize, positions: &[usize], suffix: &str) -> ValueId {
    let name = graph.value(v).name().to_string();
    let index: Vec<i64> = positions.iter().map(|p| *p as i64).collect();
    let mut b = Builder::new(graph, &format!("{name}_{suffix}."));
    let index = b.ints(&index);
    b.op("Gather", &[v, index], vec![attr("axis", AttrValue::Int(axis as i64))])
}

/// An integer vector with these sizes at run time: a constant where all are numbers, else joined from the shapes of values that are
/// there before the node `reader` runs. `shape` gives the shape of a value that may be asked.
///
/// Error: the size that no value has.
pub(super) fn size_vector(
    graph: &mut Graph,
    reader: NodeId,
    sizes: &[Dim],
    shape: &dyn Fn(&Graph, ValueId) -> Option<Vec<Dim>>,
) -> Result<ValueId, Dim> {
    if let Some(numbers) = sizes.iter().map(Dim::known).collect::<Option<Vec<i64>>>() {
        return Ok(Builder::new(graph, "sizes.").ints(&numbers));
    }
    let place = graph.order().iter().position(|id| *id == reader).unwrap_or(0);
    let made = graph.order()[..place].iter().flat_map(|id| graph.node(*id).outputs().iter().flatten().copied());
    let candidates: Vec<(ValueId, Vec<Dim>)> =
        graph.inputs().iter().copied().chain(made).filter_map(|v| Some((v, shape(graph, v)?))).collect();
    let find = |size: &Dim| candidates.iter().find_map(|(v, dims)| Some((*v, dims.iter().position(|d| d == size)?)));
    // A multiple of a size that can be read is computed.
    let multiple = |size: &Dim| {
        let parts = size.names().into_iter().map(|name| Dim::named(&name));
        parts.into_iter().find_map(|part| Some((find(&part)?, size.exact_div(&part)?.known()?)))
    };
    let sources = sizes.iter().map(|d| match d.known() {
        Some(n) => Ok((None, n)),
        None => find(d).map(|at| (at, 1)).or_else(|| multiple(d)).map(|(at, n)| (Some(at), n)).ok_or_else(|| d.clone()),
    });
    let sources: Vec<(Option<(ValueId, usize)>, i64)> = sources.collect::<Result<_, _>>()?;
    let mut b = Builder::new(graph, "sizes.");
    let mut pieces = Vec::new();
    for (source, n) in sources {
        let number = b.ints(&[n]);
        pieces.push(match source {
            None => number,
            Some((v, axis)) => {
                let (all, at) = (b.shape_of(v), b.ints(&[axis as i64]));
                let size = b.gather(all, at, 0);
                if n == 1 { size } else { b.mul(size, number) }
            }
        });
    }
    Ok(b.concat(&pieces, 0))
}
