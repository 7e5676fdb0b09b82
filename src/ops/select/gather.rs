//! Gather (opset 1 to 24), GatherElements (opset 11 to 24), GatherND (opset 11 to 24): positions that a value names.
//!
//! Gather with a constant index is a selection: of one position (the axis goes away) or of several. With a run-time index (a
//! lookup of word vectors) the gathered axis is a barrier, and the axes of the index are those of the output.

use super::{Sized, listed, moved_to, scatter_add, scatter_along};
use crate::autodiff::GradCx;
use crate::axes::relation::{AxesCx, Relations, Slot};
use crate::graph::build::attr;
use crate::graph::{AttrValue, DType, Node, Tensor, Use, ValueId};
use crate::infer::content::along;
use crate::infer::{Dim, Fact, InferCx, InferError, normalize_axis};
use crate::ops::shape::zeros_like;
use crate::ops::{Axes, Cost, Grad, OpRule, Refit};
use crate::slice::refit::{RefitCx, RefitError};
use bytes::Bytes;

/// The records of this family.
pub static RULES: &[OpRule] = &[
    OpRule {
        name: "Gather",
        domain: "",
        opsets: (1, 24),
        infer: gather_infer,
        axes: Axes::Rule(gather_axes),
        grad: Grad::Rule(gather_grad),
        cost: Cost::Free,
        refit: Refit::Rule(gather_refit),
    },
    OpRule {
        name: "GatherElements",
        domain: "",
        opsets: (11, 24),
        infer: elements_infer,
        axes: Axes::Rule(elements_axes),
        grad: Grad::Rule(elements_grad),
        cost: Cost::Free,
        refit: Refit::Nothing,
    },
    OpRule {
        name: "GatherND",
        domain: "",
        opsets: (11, 24),
        infer: nd_infer,
        axes: Axes::Rule(nd_axes),
        grad: Grad::Rule(nd_grad),
        cost: Cost::Free,
        refit: Refit::Nothing,
    },
];

const LOOKUP: &str = "looked up at positions that are only known at run time";

fn axis_of(node: &Node, rank: usize) -> Option<usize> {
    normalize_axis(node.attr_int("axis").unwrap_or(0), rank)
}

/// Positions from the start, of an index that may count from the end.
fn from_start(index: &[i64], size: usize) -> Option<Vec<usize>> {
    index.iter().map(|i| normalize_axis(*i, size)).collect()
}

fn gather_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let (Some(input), Some(index)) = (cx.shape(0), cx.shape(1)) else { return Ok(vec![Fact::new(cx.dtype(0), None)]) };
    let axis = axis_of(cx.node, input.len()).ok_or_else(|| cx.error(format!("no such axis in rank {}", input.len())))?;
    let shape = [&input[..axis], index, &input[axis + 1..]].concat();
    let mut known = None;
    if let (Some(numbers), Some(size)) = (cx.numbers(1), input[axis].size()) {
        let list = from_start(&numbers, size).ok_or_else(|| cx.error(format!("an index outside axis {axis} of size {size}")))?;
        let numbers_are_few = list.len() <= crate::infer::KNOWN_MAX;
        // Row-major, the axes of the index are one axis.
        let flat = [&input[..axis], &[Dim::from(list.len())], &input[axis + 1..]].concat();
        known = numbers_are_few.then(|| cx.input(0).moved(&flat, |sizes, strides| picked(sizes, strides, axis, list))).flatten();
    }
    Ok(vec![Fact::new(cx.dtype(0), Some(shape)).with_known(known)])
}

fn picked(sizes: &[usize], strides: &[usize], axis: usize, list: Vec<usize>) -> Vec<Vec<usize>> {
    let mut offsets: Vec<Vec<usize>> = sizes.iter().zip(strides).map(|(n, s)| along(0..*n, *s)).collect();
    offsets[axis] = along(list, strides[axis]);
    offsets
}

/// The positions that a constant index takes of an axis of a fixed size.
fn constant_index(size: &Dim, index: Option<Vec<i64>>) -> Option<Vec<usize>> {
    let size = listed(size)?;
    from_start(&index?, size)
}

fn gather_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    let (input, index) = (cx.shape(Slot::In(0)), cx.shape(Slot::In(1)));
    let Some(axis) = axis_of(cx.node, input.len()) else { return relations };
    let list = constant_index(&input[axis], cx.numbers(1));
    // With one position or a table of them, the selection is a value of its own, and the output a view of it.
    let written: Vec<usize> = (0..index.len()).filter(|a| !index[*a].is(1)).collect();
    let to_itself = list.as_ref().is_some_and(|l| index.is_empty() && l.len() == 1 || written.len() > 1);
    let selected = if to_itself {
        let mut shape = input.to_vec();
        shape[axis] = Dim::from(list.as_ref().map_or(0, Vec::len));
        relations.virtual_value(shape)
    } else {
        Slot::Out(0)
    };
    for a in (0..input.len()).filter(|a| *a != axis) {
        let out = if a < axis { a } else { a + index.len() - 1 };
        if to_itself {
            relations.same((Slot::In(0), a), (selected, a));
            relations.same((selected, a), (Slot::Out(0), out));
        } else {
            relations.same((Slot::In(0), a), (Slot::Out(0), out));
        }
    }
    match list {
        Some(list) if to_itself => {
            relations.select((Slot::In(0), axis), (selected, axis), list, 0);
            if !index.is_empty() {
                relations.regroup((selected, vec![axis]), (Slot::Out(0), written.iter().map(|a| axis + a).collect()));
            }
        }
        Some(list) => {
            let at = axis + written.first().copied().unwrap_or(0);
            relations.select((Slot::In(0), axis), (Slot::Out(0), at), list, 0);
        }
        None => looked_up(cx, &mut relations, axis, index.len()),
    }
    relations
}

/// A barrier on the gathered axis; the index's axes are those of the output, unless the index is a constant (which no cut of
/// the output can follow here).
fn looked_up(cx: &AxesCx<'_>, relations: &mut Relations, axis: usize, index_rank: usize) {
    relations.barrier((Slot::In(0), axis), LOOKUP);
    for a in 0..index_rank {
        if cx.numbers(1).is_some() {
            relations.barrier((Slot::Out(0), axis + a), "taken from an axis whose size is only known at run time");
        } else {
            relations.same((Slot::In(1), a), (Slot::Out(0), axis + a));
        }
    }
}

/// `dx` is `dy` added up at the positions taken.
fn gather_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    if !cx.wants(0) {
        return Ok(());
    }
    let (dy, x, index) = (cx.dy()?, cx.input(0), cx.input(1));
    let input = cx.shape(x).to_vec();
    let index_shape = cx.shape(index).to_vec();
    let axis = axis_of(cx.node(), input.len()).ok_or("the rank is not known")?;
    let Some(list) = constant_index(&input[axis], cx.numbers(index)) else {
        // Indices of scattering are int64.
        let index = if cx.dtype(index) == DType::I64 { index } else { cx.b.cast(index, DType::I64) };
        if axis != 0 || cx.b.opset() < 16 {
            let dx = lookup_grad(cx, dy, index, axis, index_shape.len())?;
            cx.give(0, dx);
            return Ok(());
        }
        let on = zeros_like(cx, x);
        let rows = cx.b.unsqueeze(index, &[index_shape.len() as i64]);
        let dx = scatter_add(cx, on, rows, dy)?;
        cx.give(0, dx);
        return Ok(());
    };
    let mut shape = input.clone();
    shape[axis] = Dim::from(list.len());
    let value = match index_shape.len() {
        0 => cx.b.unsqueeze(dy, &[axis as i64]),
        1 => dy,
        _ => {
            // Only sizes in front of the axis keep their place, so that 0 copies them.
            let size = |a: usize| if a < axis { Some(0) } else { shape[a].known() };
            let target: Vec<Option<i64>> = (0..shape.len()).map(size).collect();
            if target.iter().filter(|n| n.is_none()).count() > 1 {
                return Err("several sizes behind the gathered axis are only known at run time".into());
            }
            let target: Vec<i64> = target.into_iter().map(|n| n.unwrap_or(-1)).collect();
            cx.b.reshape(dy, &target)
        }
    };
    let size = input[axis].size().unwrap_or(0);
    let dx = scatter_along(cx, Sized { value, shape }, axis, &list, size)?;
    cx.give(0, dx.value);
    Ok(())
}

/// `dx = onehot(index)^T x dy` along `axis`: for an index of run time, or an axis whose size only run time knows.
fn lookup_grad(cx: &mut GradCx<'_>, dy: ValueId, index: ValueId, axis: usize, index_rank: usize) -> Result<ValueId, String> {
    let (x, dtype) = (cx.input(0), cx.dtype(cx.output(0)));
    let input = cx.shape(x).to_vec();
    let depth = match input[axis].known() {
        Some(size) => cx.b.constant(Tensor::i64_scalar(size)),
        None => {
            let (sizes, place) = (cx.b.shape_of(x), cx.b.constant(Tensor::i64_scalar(axis as i64)));
            cx.b.gather(sizes, place, 0)
        }
    };
    let off_on = cx.b.constant(Tensor::new(dtype, vec![2], Bytes::new()).with_f32s(&[0.0, 1.0]));
    let index = if index_rank == 0 { cx.b.unsqueeze(index, &[0]) } else { index };
    let one_hot = cx.b.op("OneHot", &[index, depth, off_on], vec![attr("axis", AttrValue::Int(-1))]);
    let behind = input.len() - axis - 1;
    if index_rank == 0 {
        let one_hot = cx.b.squeeze(one_hot, &[0]);
        let places: Vec<i64> = (1..=behind as i64).collect();
        let places = if places.is_empty() { one_hot } else { cx.b.unsqueeze(one_hot, &places) };
        let dy = cx.b.unsqueeze(dy, &[axis as i64]);
        return Ok(cx.b.mul(dy, places));
    }
    if axis == 0 {
        // [I.., Q..] and [I.., S] as matrices, then [S, Q..].
        let rest: Option<Vec<i64>> = input[1..].iter().map(Dim::known).collect();
        let rest = rest.ok_or("sizes behind the looked-up axis are only known at run time")?;
        let rows = cx.b.reshape(dy, &[-1, rest.iter().product()]);
        let depth = cx.b.unsqueeze(depth, &[0]);
        let all = cx.b.ints(&[-1]);
        let target = cx.b.concat(&[all, depth], 0);
        let one_hot = cx.b.reshape_to(one_hot, target);
        let columns = cx.b.transpose(one_hot, &[1, 0]);
        let dx = cx.b.matmul(columns, rows);
        return Ok(cx.b.reshape(dx, &[&[-1], &rest[..]].concat()));
    }
    if index_rank > 1 {
        return Err(format!("the gradient of a lookup of rank {index_rank} along axis {axis} has no rule"));
    }
    let mut perm: Vec<usize> = (0..input.len()).collect();
    perm.swap(axis, input.len() - 1);
    let turned = if behind == 0 { dy } else { cx.b.transpose(dy, &perm) };
    let dx = cx.b.matmul(turned, one_hot);
    Ok(if behind == 0 { dx } else { cx.b.transpose(dx, &perm) })
}

/// The index, counted in what stays of the gathered axis, without what the output lost.
fn gather_refit(cx: &mut RefitCx<'_>) -> Result<(), RefitError> {
    let (input, index_shape) = (cx.old_input(0), cx.old_input(1));
    let Some(axis) = axis_of(cx.node(), input.len()) else { return Ok(()) };
    let kept_in = cx.kept_input(0, axis);
    let kept_out: Vec<Option<&[usize]>> = (0..index_shape.len()).map(|a| cx.kept_output(0, axis + a)).collect();
    let numbers: Option<Vec<i64>> = cx.old_ints(1).and_then(|ints| ints.iter().map(Dim::known).collect());
    let output_cut = kept_out.iter().any(Option::is_some);
    // A run-time index has the output's axes and loses with them.
    if kept_in.is_none() && (!output_cut || numbers.is_none()) {
        return Ok(());
    }
    let list = input[axis].size().zip(numbers.as_ref()).and_then(|(size, n)| from_start(n, size));
    let (Some(numbers), Some(list)) = (numbers, list) else { return Err(cx.error("the index is only known at run time")) };
    let size = kept_in.map_or(input[axis].size().unwrap_or(0), <[_]>::len);
    let sizes: Vec<usize> = index_shape.iter().filter_map(Dim::size).collect();
    let lists = sizes.iter().zip(&kept_out).map(|(n, kept)| kept.map_or_else(|| (0..*n).collect(), <[_]>::to_vec));
    let lists: Vec<Vec<usize>> = lists.collect();
    let strides = crate::infer::content::strides(&sizes);
    let offsets: Vec<Vec<usize>> = lists.iter().zip(strides).map(|(l, s)| along(l.iter().copied(), s)).collect();
    let mut new = Vec::new();
    for j in crate::infer::content::grid(&offsets) {
        let to =
            moved_to(list[j], kept_in).ok_or_else(|| cx.error(format!("it takes position {}, which was removed", list[j])))?;
        // An index from the end stays where it still names the same position.
        let old = numbers[j];
        new.push(if old < 0 && old + size as i64 == to as i64 { old } else { to as i64 });
    }
    if output_cut {
        replace_index(cx, lists.iter().map(Vec::len).collect(), &new);
    } else {
        let entries = new.iter().enumerate().filter(|(j, n)| **n != numbers[*j]).map(|(j, n)| (j, *n)).collect();
        cx.patch_ints(1, entries);
    }
    Ok(())
}

/// A new constant index, of the old one's element type.
fn replace_index(cx: &mut RefitCx<'_>, dims: Vec<usize>, index: &[i64]) {
    let old = cx.node().input(1);
    let dtype = old.and_then(|v| cx.facts.get(v).dtype);
    let tensor = match dtype {
        Some(DType::I32) => Tensor::new(DType::I32, dims, index.iter().flat_map(|i| (*i as i32).to_le_bytes()).collect()),
        _ => Tensor { dims, ..Tensor::i64s(index) },
    };
    let constant = cx.graph.add_initializer("gather_index", tensor);
    cx.graph.set_input(Use { node: cx.id, slot: 1 }, Some(constant));
}

fn elements_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    Ok(vec![Fact::new(cx.dtype(0), cx.shape(1).map(<[_]>::to_vec))])
}

/// The gathered axis is a barrier; elsewhere position i of the output is position i of both inputs.
fn elements_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    let (input, output) = (cx.shape(Slot::In(0)), cx.shape(Slot::Out(0)));
    let gathered = axis_of(cx.node, input.len());
    for (axis, size) in input.iter().enumerate() {
        let all = [(Slot::In(0), axis), (Slot::In(1), axis), (Slot::Out(0), axis)];
        if Some(axis) != gathered && *size == output[axis] {
            relations.same(all[0], all[2]);
            relations.same(all[1], all[2]);
        } else {
            all.into_iter().for_each(|at| relations.barrier(at, LOOKUP));
        }
    }
    relations
}

/// `dx[index] += dy` along the axis.
fn elements_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    if !cx.wants(0) {
        return Ok(());
    }
    if cx.opset() < 16 {
        return Err("the gradient of GatherElements needs ScatterElements with addition, which opset 16 has".into());
    }
    let (dy, x, index) = (cx.dy()?, cx.input(0), cx.input(1));
    let axis = cx.node().attr_int("axis").unwrap_or(0);
    let on = zeros_like(cx, x);
    let attrs = vec![attr("axis", AttrValue::Int(axis)), attr("reduction", AttrValue::Str("add".into()))];
    let dx = cx.b.op("ScatterElements", &[on, index, dy], attrs);
    cx.give(0, dx);
    Ok(())
}

/// Shared leading axes, and the number of axes that one row of the index names.
fn nd_split(node: &Node, input: &[Dim], index: &[Dim]) -> Option<(usize, usize)> {
    let batch = usize::try_from(node.attr_int("batch_dims").unwrap_or(0)).ok()?;
    let named = index.last()?.size()?;
    (batch < index.len() && batch + named <= input.len()).then_some((batch, named))
}

fn nd_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let (Some(input), Some(index)) = (cx.shape(0), cx.shape(1)) else { return Ok(vec![Fact::new(cx.dtype(0), None)]) };
    let shape = match nd_split(cx.node, input, index) {
        Some((batch, named)) => Some([&index[..index.len() - 1], &input[batch + named..]].concat()),
        None if index.last().is_some_and(|n| n.known().is_none()) => None,
        None => return Err(cx.error(format!("an index of shape {index:?} does not fit {input:?}"))),
    };
    Ok(vec![Fact::new(cx.dtype(0), shape)])
}

fn nd_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    let (input, index) = (cx.shape(Slot::In(0)), cx.shape(Slot::In(1)));
    let Some((batch, named)) = nd_split(cx.node, input, index) else { return relations };
    for axis in 0..input.len() {
        let from = (Slot::In(0), axis);
        if axis < batch && input[axis] == index[axis] {
            relations.same(from, (Slot::Out(0), axis));
        } else if axis < batch + named {
            relations.barrier(from, LOOKUP);
        } else {
            relations.same(from, (Slot::Out(0), index.len() - 1 + axis - batch - named));
        }
    }
    (0..index.len() - 1).for_each(|a| relations.same((Slot::In(1), a), (Slot::Out(0), a)));
    relations.barrier((Slot::In(1), index.len() - 1), LOOKUP);
    relations
}

fn nd_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    if !cx.wants(0) {
        return Ok(());
    }
    if cx.node().attr_int("batch_dims").unwrap_or(0) != 0 {
        return Err("GatherND with batch_dims has no gradient rule".into());
    }
    let (dy, x, index) = (cx.dy()?, cx.input(0), cx.input(1));
    let on = zeros_like(cx, x);
    let dx = scatter_add(cx, on, index, dy)?;
    cx.give(0, dx);
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::graph::DType;
    use crate::ops::probe::{Probe, int_attr};

    #[test]
    fn a_scalar_index_drops_the_axis() {
        let mut p = Probe::new(17);
        let x = p.input("qkv", "3 b 6 n 64");
        let one = p.int(1);
        let y = p.op("Gather", &[x, one], vec![int_attr("axis", 0)]);
        assert_eq!(p.shape(y), "b 6 n 64");
        let links = p.axes(y);
        assert_eq!(links[..2], ["in0.1 = v0.1", "v0.1 = out0.0"]);
        assert_eq!(links.last().map(String::as_str), Some("in0.0[1] -> v0.0@0"));
        assert_eq!(p.grad(y).map(|ops| ops.last().cloned()), Ok(Some("Concat".into())));
    }

    #[test]
    fn vectors_and_tables_of_positions() {
        let mut p = Probe::new(17);
        let x = p.input("x", "b 5 8");
        let index = p.ints(&[4, -5, 4]);
        let y = p.op("Gather", &[x, index], vec![int_attr("axis", 1)]);
        assert_eq!(p.shape(y), "b 3 8");
        assert_eq!(p.axes(y), ["in0.0 = out0.0", "in0.2 = out0.2", "in0.1[4, 0, 4] -> out0.1@0"]);
        assert_eq!(p.grad(y), Ok(["Transpose", "MatMul", "Transpose"].map(String::from).to_vec()));
        let table = p.ints_of(&[2, 2], &[0, 1, 1, 0]);
        let y = p.op("Gather", &[x, table], vec![int_attr("axis", 1)]);
        assert_eq!(p.shape(y), "b 2 2 8");
        let links = p.axes(y);
        assert_eq!(links[2..], ["in0.2 = v0.2", "v0.2 = out0.3", "in0.1[0, 1, 1, 0] -> v0.1@0", "v0[1] ~ out0[1, 2]"]);
        assert_eq!(p.grad(y).map(|ops| ops[0].clone()), Ok("Reshape".into()));
        let row = p.ints_of(&[1, 3], &[0, 1, 2]);
        let y = p.op("Gather", &[x, row], vec![int_attr("axis", 1)]);
        assert_eq!(p.axes(y).last().map(String::as_str), Some("in0.1[0, 1, 2] -> out0.2@0"));
        let bad = p.ints(&[5]);
        p.op("Gather", &[x, bad], vec![int_attr("axis", 1)]);
        assert_eq!(p.error().what, "an index outside axis 1 of size 5");
    }

    #[test]
    fn lookups_keep_the_axes_of_the_index() {
        let mut p = Probe::new(17);
        let words = p.input("words", "1000 64");
        let ids = p.typed_input("ids", "b n", DType::I64);
        let y = p.op("Gather", &[words, ids], vec![]);
        assert_eq!(p.shape(y), "b n 64");
        let barrier = "in0.0 | looked up at positions that are only known at run time";
        assert_eq!(p.axes(y), ["in0.1 = out0.2", barrier, "in1.0 = out0.0", "in1.1 = out0.1"]);
        assert_eq!(p.grad(y), Ok(["Expand", "Unsqueeze", "ScatterND"].map(String::from).to_vec()));
        let mut p = Probe::new(14);
        let (words, ids) = (p.input("words", "1000 64"), p.typed_input("ids", "b n", DType::I64));
        let y = p.op("Gather", &[words, ids], vec![]);
        assert_eq!(p.grad(y).map(|ops| ops[0].clone()), Ok("OneHot".into()));
    }

    #[test]
    fn an_axis_of_unknown_size_is_a_barrier() {
        let mut p = Probe::new(17);
        let x = p.input("x", "b n 8");
        let first = p.int(0);
        let y = p.op("Gather", &[x, first], vec![int_attr("axis", 1)]);
        assert_eq!(p.shape(y), "b 8");
        let barrier = "in0.1 | looked up at positions that are only known at run time";
        assert_eq!(p.axes(y), ["in0.0 = out0.0", "in0.2 = out0.1", barrier]);
    }

    #[test]
    fn contents_flow_through() {
        let mut p = Probe::new(17);
        let c = p.ints_of(&[2, 3], &[0, 1, 2, 3, 4, 5]);
        let index = p.ints_of(&[1, 2], &[2, 0]);
        let y = p.op("Gather", &[c, index], vec![int_attr("axis", 1)]);
        assert_eq!((p.shape(y).as_str(), p.content(y).as_str()), ("2 1 2", "2 0 5 3"));
        let last = p.int(-1);
        let z = p.op("Gather", &[c, last], vec![int_attr("axis", 0)]);
        assert_eq!(p.content(z), "3 4 5");
    }

    #[test]
    fn indices_follow_cuts() {
        let mut p = Probe::new(17);
        let x = p.input("x", "b 6 8");
        let (last, third) = (p.int(-1), p.int(3));
        let y = p.op("Gather", &[x, last], vec![int_attr("axis", 1)]);
        assert_eq!(p.refit(y, &[(x, 1, &[0, 5])]), Ok(vec![]), "still the last one");
        let z = p.op("Gather", &[x, third], vec![int_attr("axis", 1)]);
        assert_eq!(p.refit(z, &[(x, 1, &[0, 3, 5])]), Ok(vec![(1, vec![(0, 1)])]));
        assert_eq!(p.refit(z, &[(x, 1, &[0, 5])]), Err("it takes position 3, which was removed".into()));
        let index = p.ints_of(&[2, 2], &[0, 3, 5, 0]);
        let w = p.op("Gather", &[x, index], vec![int_attr("axis", 1)]);
        assert_eq!(p.refit(w, &[(x, 1, &[0, 3, 5])]), Ok(vec![(1, vec![(1, 1), (2, 2)])]));
        assert_eq!(p.refit(w, &[(x, 1, &[0, 3]), (w, 1, &[0])]), Ok(vec![]));
        assert_eq!(
            (p.shape(w).as_str(), p.content(p.graph.node(p.producer(w)).input(1).expect("replaced"))),
            ("b 1 2 8", "0 1".into())
        );
    }

    #[test]
    fn other_gathers_have_the_shape_of_their_index() {
        let mut p = Probe::new(17);
        let x = p.input("x", "b 6 8");
        let index = p.typed_input("index", "b 2 8", DType::I64);
        let y = p.op("GatherElements", &[x, index], vec![int_attr("axis", 1)]);
        assert_eq!((p.shape(y).as_str(), p.axes(y).len()), ("b 2 8", 7));
        assert_eq!(p.axes(y)[..2], ["in0.0 = out0.0", "in1.0 = out0.0"]);
        assert_eq!(p.grad(y).map(|ops| ops.last().cloned()), Ok(Some("ScatterElements".into())));
        let rows = p.typed_input("rows", "b 7 2", DType::I64);
        let z = p.op("GatherND", &[x, rows], vec![]);
        assert_eq!(p.shape(z), "b 7 8");
        assert_eq!(p.axes(z)[2..5], ["in0.2 = out0.2", "in1.0 = out0.0", "in1.1 = out0.1"]);
        let w = p.op("GatherND", &[x, rows], vec![int_attr("batch_dims", 1)]);
        assert_eq!(p.shape(w), "b 7");
        assert!(p.grad(w).is_err());
    }
}
