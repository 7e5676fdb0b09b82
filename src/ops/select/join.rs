//! Concat (opset 4 to 24) and Split (opset 2 to 24): an axis as a sum of segments.
//!
//! Split's sizes are an attribute before opset 13 and an input from then on; without sizes the parts are equal, and from opset
//! 18 on the last one may be smaller (`num_outputs`).

use super::{Sized, listed};
use crate::autodiff::GradCx;
use crate::axes::relation::{AxesCx, Relations, Slot};
use crate::graph::{AttrValue, Node, Use, ValueId};
use crate::infer::content::along;
use crate::infer::{Dim, Fact, InferCx, InferError, Known, normalize_axis};
use crate::ops::shape::zeros_like;
use crate::ops::{Axes, Cost, Grad, OpRule, Refit};
use crate::slice::refit::{RefitCx, RefitError};

/// The records of this family.
pub static RULES: &[OpRule] = &[
    OpRule {
        name: "Concat",
        domain: "",
        opsets: (4, 24),
        infer: concat_infer,
        axes: Axes::Rule(concat_axes),
        grad: Grad::Rule(concat_grad),
        cost: Cost::Free,
        refit: Refit::Nothing,
    },
    OpRule {
        name: "Split",
        domain: "",
        opsets: (2, 24),
        infer: split_infer,
        axes: Axes::Rule(split_axes),
        grad: Grad::Rule(split_grad),
        cost: Cost::Free,
        refit: Refit::Rule(split_refit),
    },
];

pub(in crate::ops) fn axis_of(node: &Node, default: i64, rank: usize) -> Option<usize> {
    normalize_axis(node.attr_int("axis").unwrap_or(default), rank)
}

fn concat_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let slots: Vec<usize> = (0..cx.input_count()).filter(|s| cx.has_input(*s)).collect();
    let dtype = slots.iter().find_map(|s| cx.dtype(*s));
    let Some((shape, axis)) = joined_shape(cx, &slots)? else { return Ok(vec![Fact::new(dtype, None)]) };
    let known = joined(cx, &slots, axis, &shape);
    Ok(vec![Fact::new(dtype, Some(shape)).with_known(known)])
}

/// Shape of the inputs at `slots` joined, and the axis that they are joined along; `None` where no rank is known.
pub(in crate::ops) fn joined_shape(cx: &InferCx<'_>, slots: &[usize]) -> Result<Option<(Vec<Dim>, usize)>, InferError> {
    let Some(rank) = slots.iter().find_map(|s| cx.input(*s).rank()) else { return Ok(None) };
    let axis = axis_of(cx.node, 1, rank).ok_or_else(|| cx.error(format!("no such axis in rank {rank}")))?;
    let mut shape = vec![None::<Dim>; rank];
    let mut sum = Some(Dim::from(0i64));
    for slot in slots {
        let Some(input) = cx.shape(*slot) else {
            sum = None;
            continue;
        };
        if input.len() != rank {
            return Err(cx.error(format!("joins ranks {rank} and {}", input.len())));
        }
        sum = sum.map(|s| &s + &input[axis]);
        for (a, size) in input.iter().enumerate().filter(|(a, _)| *a != axis) {
            match &mut shape[a] {
                Some(old) if old.known().is_some() && size.known().is_some() && old != size => {
                    return Err(cx.error(format!("sizes {old} and {size} on axis {a}")));
                }
                Some(old) if old.known().is_some() || size.known().is_none() => {}
                entry => *entry = Some(size.clone()),
            }
        }
    }
    shape[axis] = Some(sum.unwrap_or_else(|| cx.fresh("concat")));
    Ok(Some((shape.into_iter().flatten().collect(), axis)))
}

/// The content of a Concat.
fn joined(cx: &InferCx<'_>, slots: &[usize], axis: usize, shape: &[Dim]) -> Option<Known> {
    let parts: Vec<&Known> = slots.iter().map(|s| cx.input(*s).known.as_ref()).collect::<Option<_>>()?;
    let outer: usize = shape[..axis].iter().map(Dim::size).product::<Option<usize>>()?;
    let total: usize = parts.iter().map(|p| p.len()).sum();
    if outer == 0 || total > crate::infer::KNOWN_MAX {
        return None;
    }
    let all = Known::joined(&parts)?;
    let mut positions = Vec::with_capacity(total);
    for row in 0..outer {
        let mut start = 0;
        for part in &parts {
            let chunk = part.len() / outer;
            positions.extend(start + row * chunk..start + (row + 1) * chunk);
            start += part.len();
        }
    }
    all.pick(&positions)
}

/// Relates the axes of a whole and of its parts: segments along `axis`, parallel elsewhere.
pub(in crate::ops) fn segments(cx: &AxesCx<'_>, whole: Slot, parts: &[Slot], axis: usize, reason: &str) -> Relations {
    let mut relations = Relations::default();
    let shape = cx.shape(whole);
    for part in parts {
        for (a, size) in cx.shape(*part).iter().enumerate().filter(|(a, _)| *a != axis) {
            if *size == shape[a] {
                relations.same((*part, a), (whole, a));
            } else {
                relations.barrier((*part, a), "joined with a size that is not known to be equal");
                relations.barrier((whole, a), "joined with a size that is not known to be equal");
            }
        }
    }
    let sizes: Option<Vec<usize>> = parts.iter().map(|p| listed(cx.shape(*p).get(axis)?)).collect();
    let one = parts.len() == 1 && cx.shape(parts[0])[axis] == shape[axis];
    match (sizes, listed(&shape[axis])) {
        _ if one => relations.same((parts[0], axis), (whole, axis)),
        (Some(sizes), Some(total)) if sizes.iter().sum::<usize>() == total => {
            let mut start = 0;
            for (part, size) in parts.iter().zip(sizes) {
                let is_input = matches!(whole, Slot::Out(_));
                match is_input {
                    true => relations.select((*part, axis), (whole, axis), (0..size).collect(), start),
                    false => relations.select((whole, axis), (*part, axis), (start..start + size).collect(), 0),
                }
                start += size;
            }
        }
        _ => {
            parts.iter().for_each(|p| relations.barrier((*p, axis), reason));
            relations.barrier((whole, axis), reason);
        }
    }
    relations
}

fn slots(values: &[Option<ValueId>], slot: fn(usize) -> Slot) -> Vec<Slot> {
    (0..values.len()).filter(|i| values[*i].is_some()).map(slot).collect()
}

fn concat_axes(cx: &AxesCx<'_>) -> Relations {
    let whole = Slot::Out(0);
    let Some(axis) = axis_of(cx.node, 1, cx.shape(whole).len()) else { return Relations::default() };
    segments(cx, whole, &slots(cx.node.inputs(), Slot::In), axis, "joined where sizes are only known at run time")
}

/// Every input's gradient is its segment of `dy`.
fn concat_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let dy = cx.dy()?;
    let inputs = cx.node().inputs().to_vec();
    let rank = cx.shape(cx.output(0)).len();
    let axis = axis_of(cx.node(), 1, rank).ok_or("the rank is not known")?;
    let sizes: Vec<Option<i64>> = inputs.iter().map(|v| cx.shape((*v)?).get(axis)?.known()).collect();
    if sizes.iter().filter(|s| s.is_none()).count() > 1 {
        return concat_grad_at_run_time(cx, dy, &inputs, axis);
    }
    let mut start = Some(0);
    for slot in 0..inputs.len() {
        let end = start.zip(sizes[slot]).map(|(s, n)| s + n);
        if cx.wants(slot) {
            // Behind the one unknown size, positions are counted from the end.
            let behind: Option<i64> = sizes[slot + 1..].iter().copied().sum();
            let from = start.or(behind.zip(sizes[slot]).map(|(b, n)| -(b + n)));
            let to = end.or(behind.map(|b| if b == 0 { i64::MAX } else { -b }));
            let (Some(from), Some(to)) = (from, to) else { return Err("the sizes joined are not known".into()) };
            let dx = if inputs.len() == 1 { dy } else { cx.b.slice(dy, &[from], &[to], &[axis as i64]) };
            cx.give(slot, dx);
        }
        start = end;
    }
    Ok(())
}

fn concat_grad_at_run_time(cx: &mut GradCx<'_>, dy: ValueId, inputs: &[Option<ValueId>], axis: usize) -> Result<(), String> {
    if cx.opset() < 13 {
        return Err("several joined sizes are only known at run time, and Split takes such sizes from opset 13 on".into());
    }
    let at = cx.b.ints(&[axis as i64]);
    let mut sizes = Vec::new();
    for v in inputs.iter().flatten() {
        let shape = cx.b.shape_of(*v);
        sizes.push(cx.b.gather(shape, at, 0));
    }
    let sizes = cx.b.concat(&sizes, 0);
    let axis = crate::graph::build::attr("axis", AttrValue::Int(axis as i64));
    let parts = cx.b.ops("Split", &[dy, sizes], vec![axis], inputs.len());
    parts.into_iter().enumerate().for_each(|(slot, dx)| cx.give(slot, dx));
    Ok(())
}

/// Sizes of the parts of a Split; `None` where they are not known.
fn split_sizes(node: &Node, opset: i64, size: &Dim, known: impl Fn(usize) -> Option<Vec<Dim>>) -> Option<Vec<Dim>> {
    if let Some(sizes) = node.attr_ints("split") {
        return Some(sizes.iter().map(|s| Dim::from(*s)).collect());
    }
    if node.input(1).is_some() {
        return known(1);
    }
    let count = node.outputs().len();
    let parts = Dim::from(count);
    if opset < 18 {
        return Some(vec![size.floor_div(&parts); count]);
    }
    let part = size.ceil_div(&parts);
    let mut sizes = vec![part.clone(); count];
    if let Some(last) = sizes.last_mut() {
        *last = size - &(&part * &Dim::from(count.saturating_sub(1)));
    }
    Some(sizes)
}

fn split_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let count = cx.node.outputs().len();
    let Some(input) = cx.shape(0) else { return Ok(vec![Fact::new(cx.dtype(0), None); count]) };
    let axis = axis_of(cx.node, 0, input.len()).ok_or_else(|| cx.error(format!("no such axis in rank {}", input.len())))?;
    let sizes = split_sizes(cx.node, cx.opset, &input[axis], |slot| cx.ints(slot).map(<[_]>::to_vec));
    if let Some(sizes) = &sizes {
        if sizes.len() != count {
            return Err(cx.error(format!("{} sizes for {count} parts", sizes.len())));
        }
        let total: Dim = sizes.iter().cloned().sum();
        if total.known().is_some() && input[axis].known().is_some() && total != input[axis] {
            return Err(cx.error(format!("parts of {sizes:?} do not fill {}", input[axis])));
        }
    }
    let mut start = Some(0usize);
    let mut facts = Vec::with_capacity(count);
    for part in 0..count {
        let size = sizes.as_ref().map_or_else(|| cx.fresh(&format!("split{part}")), |s| s[part].clone());
        let mut shape = input.to_vec();
        shape[axis] = size.clone();
        let end = start.zip(size.size()).and_then(|(s, n)| s.checked_add(n));
        let known = start.zip(end).and_then(|(start, end)| part_content(cx.input(0), &shape, axis, start, end));
        facts.push(Fact::new(cx.dtype(0), Some(shape)).with_known(known));
        start = end;
    }
    Ok(facts)
}

fn part_content(whole: &Fact, shape: &[Dim], axis: usize, start: usize, end: usize) -> Option<Known> {
    whole.moved(shape, |sizes, strides| {
        let positions = |a: usize| if a == axis { start..end } else { 0..sizes[a] };
        (0..sizes.len()).map(|a| along(positions(a), strides[a])).collect()
    })
}

fn split_axes(cx: &AxesCx<'_>) -> Relations {
    let whole = Slot::In(0);
    let Some(axis) = axis_of(cx.node, 0, cx.shape(whole).len()) else { return Relations::default() };
    segments(cx, whole, &slots(cx.node.outputs(), Slot::Out), axis, "split where sizes are only known at run time")
}

/// `dx` is all parts' gradients joined, zeros where a part has none.
fn split_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let x = Sized { value: cx.input(0), shape: cx.shape(cx.input(0)).to_vec() };
    let axis = axis_of(cx.node(), 0, x.shape.len()).ok_or("the rank is not known")?;
    let outputs = cx.node().outputs().to_vec();
    let mut parts = Vec::new();
    for (slot, output) in outputs.iter().enumerate() {
        let output = output.ok_or("a part without a name")?;
        parts.push(match cx.grad(slot) {
            Some(dy) => dy,
            None => zeros_like(cx, output),
        });
    }
    let dx = if parts.len() == 1 { parts[0] } else { cx.b.concat(&parts, axis as i64) };
    cx.give(0, dx);
    Ok(())
}

/// New sizes of the parts.
fn split_refit(cx: &mut RefitCx<'_>) -> Result<(), RefitError> {
    let input = cx.old_input(0);
    let Some(axis) = axis_of(cx.node(), 0, input.len()) else { return Ok(()) };
    let count = cx.node().outputs().len();
    if cx.kept_input(0, axis).is_none() && (0..count).all(|part| cx.kept_output(part, axis).is_none()) {
        return Ok(());
    }
    let mut kept = Vec::new();
    let mut sizes = Vec::new();
    for part in 0..count {
        let old = cx.old_output(part).get(axis).and_then(Dim::size).ok_or_else(|| cx.error("a part has no fixed size"))?;
        let start = kept_start(cx, axis, part)?;
        let stay = cx.kept_output(part, axis).map_or_else(|| (0..old).collect(), <[_]>::to_vec);
        sizes.push(stay.len() as i64);
        kept.extend(stay.into_iter().map(|p| start + p));
    }
    let whole = cx.kept_input(0, axis).map_or_else(|| (0..input[axis].size().unwrap_or(0)).collect(), <[_]>::to_vec);
    if kept != whole {
        return Err(cx.error("the parts keep other positions than the whole"));
    }
    set_sizes(cx, &sizes, whole.len() as i64);
    Ok(())
}

/// First position of a part in the whole.
fn kept_start(cx: &RefitCx<'_>, axis: usize, part: usize) -> Result<usize, RefitError> {
    let size = |p: usize| cx.old_output(p).get(axis).and_then(Dim::size);
    (0..part).map(size).sum::<Option<usize>>().ok_or_else(|| cx.error("a part has no fixed size"))
}

/// Writes the sizes where the node has them, and into the node where its equal parts are no longer equal.
fn set_sizes(cx: &mut RefitCx<'_>, sizes: &[i64], total: i64) {
    let opset = cx.opset();
    if cx.node().input(1).is_some() {
        let old: Vec<Option<i64>> = cx.old_ints(1).unwrap_or(&[]).iter().map(Dim::known).collect();
        let changed = sizes.iter().enumerate().filter(|(i, s)| old.get(*i) != Some(&Some(**s)));
        let entries = changed.map(|(i, s)| (i, *s)).collect();
        cx.patch_ints(1, entries);
        return;
    }
    let by_default = || split_sizes(cx.node(), opset, &Dim::from(total), |_| None);
    let unchanged = |old: Vec<Dim>| old.iter().map(Dim::known).eq(sizes.iter().map(|s| Some(*s)));
    if cx.node().attr("split").is_none() && by_default().is_some_and(unchanged) {
        return;
    }
    if opset < 13 {
        cx.set_attr("split", AttrValue::Ints(sizes.to_vec()));
        return;
    }
    let constant = cx.graph.add_initializer("split_sizes", crate::graph::Tensor::i64s(sizes));
    cx.graph.set_input(Use { node: cx.id, slot: 1 }, Some(constant));
    cx.graph.remove_attr(cx.id, "num_outputs");
}

#[cfg(test)]
mod tests {
    use crate::ops::probe::{Probe, int_attr, ints_attr};

    fn parts(p: &Probe, first: crate::graph::ValueId) -> Vec<String> {
        let id = p.producer(first);
        (0..p.graph.node(id).outputs().len()).map(|i| p.shape(p.out(id, i))).collect()
    }

    #[test]
    fn concat_adds_sizes() {
        let mut p = Probe::new(17);
        let (x, y, z) = (p.input("x", "b 1 64"), p.input("y", "b n 64"), p.input("z", "b 3 64"));
        let dynamic = p.op("Concat", &[x, y], vec![int_attr("axis", 1)]);
        assert_eq!(p.shape(dynamic), "b n+1 64");
        assert_eq!(
            p.axes(dynamic)[4..],
            ["in0.1", "in1.1", "out0.1"].map(|a| format!("{a} | joined where sizes are only known at run time"))
        );
        let fixed = p.op("Concat", &[x, z], vec![int_attr("axis", -2)]);
        assert_eq!(p.shape(fixed), "b 4 64");
        let links = p.axes(fixed);
        assert_eq!(links[..4], ["in0.0 = out0.0", "in0.2 = out0.2", "in1.0 = out0.0", "in1.2 = out0.2"]);
        assert_eq!(links[4..], ["in0.1[0] -> out0.1@0", "in1.1[0, 1, 2] -> out0.1@1"]);
        p.op("Concat", &[x, z], vec![int_attr("axis", 0)]);
        assert_eq!(p.error().what, "sizes 1 and 3 on axis 1");
    }

    #[test]
    fn concat_takes_the_size_that_is_a_number() {
        let mut p = Probe::new(17);
        let (x, y) = (p.input("x", "b 1"), p.input("y", "2 3"));
        let z = p.op("Concat", &[x, y], vec![int_attr("axis", 1)]);
        assert_eq!(p.shape(z), "2 4");
        assert_eq!(
            p.axes(z)[..2],
            ["in0.0", "out0.0"].map(|a| format!("{a} | joined with a size that is not known to be equal"))
        );
    }

    #[test]
    fn contents_interleave_by_rows() {
        let mut p = Probe::new(17);
        let (a, b) = (p.ints_of(&[2, 1], &[1, 2]), p.ints_of(&[2, 2], &[3, 4, 5, 6]));
        let y = p.op("Concat", &[a, b], vec![int_attr("axis", 1)]);
        assert_eq!((p.shape(y).as_str(), p.content(y).as_str()), ("2 3", "1 3 4 2 5 6"));
    }

    #[test]
    fn concat_gradients_are_segments() {
        let mut p = Probe::new(17);
        let (x, y, z) = (p.input("x", "b 2"), p.input("y", "b n"), p.input("z", "b 3"));
        let one = p.op("Concat", &[x, y, z], vec![int_attr("axis", 1)]);
        assert_eq!(p.grad(one), Ok(vec!["Slice".to_string(); 3]));
        let two = p.op("Concat", &[y, x, y], vec![int_attr("axis", 1)]);
        assert_eq!(p.grad(two).map(|ops| ops.last().cloned()), Ok(Some("Split".into())));
    }

    #[test]
    fn splits_follow_each_opset() {
        let mut p = Probe::new(11);
        let x = p.input("x", "b 10");
        let y = p.node("Split", &[Some(x)], vec![int_attr("axis", 1), ints_attr("split", &[4, 6])], 2);
        assert_eq!(parts(&p, p.out(y, 0)), ["b 4", "b 6"]);
        let mut p = Probe::new(13);
        let x = p.input("x", "b 10");
        let sizes = p.ints(&[1, 9]);
        let y = p.node("Split", &[Some(x), Some(sizes)], vec![int_attr("axis", -1)], 2);
        assert_eq!(parts(&p, p.out(y, 0)), ["b 1", "b 9"]);
        assert_eq!(p.axes(p.out(y, 0))[2], "in0.1[0] -> out0.1@0");
        assert_eq!(p.axes(p.out(y, 0))[3], "in0.1[1, 2, 3, 4, 5, 6, 7, 8, 9] -> out1.1@0");
        let equal = p.node("Split", &[Some(x)], vec![int_attr("axis", 1)], 2);
        assert_eq!(parts(&p, p.out(equal, 0)), ["b 5", "b 5"]);
        let mut p = Probe::new(18);
        let (x, w) = (p.input("x", "10 n"), p.input("w", "2 9*n"));
        let y = p.node("Split", &[Some(x)], vec![int_attr("num_outputs", 3)], 3);
        assert_eq!(parts(&p, p.out(y, 0)), ["4 n", "4 n", "2 n"]);
        let z = p.node("Split", &[Some(w)], vec![int_attr("axis", 1), int_attr("num_outputs", 3)], 3);
        assert_eq!(p.axes(p.out(z, 0)).last().map(String::as_str), Some("in0.1 | split where sizes are only known at run time"));
        let bad = p.ints(&[4, 4]);
        p.node("Split", &[Some(x), Some(bad)], vec![], 2);
        assert_eq!(p.error().what, "parts of [4, 4] do not fill 10");
    }

    #[test]
    fn split_contents_and_gradients() {
        let mut p = Probe::new(17);
        let c = p.ints_of(&[2, 3], &[0, 1, 2, 3, 4, 5]);
        let sizes = p.ints(&[1, 2]);
        let y = p.node("Split", &[Some(c), Some(sizes)], vec![int_attr("axis", 1)], 2);
        assert_eq!([0, 1].map(|i| p.content(p.out(y, i))), ["0 3", "1 2 4 5"]);
        let x = p.input("x", "b 3");
        let y = p.node("Split", &[Some(x), Some(sizes)], vec![int_attr("axis", 1)], 2);
        assert_eq!(p.grad(p.out(y, 0)), Ok(vec!["Concat".into()]));
    }

    #[test]
    fn split_sizes_follow_cuts() {
        let mut p = Probe::new(17);
        let x = p.input("x", "b 9");
        let sizes = p.ints(&[4, 5]);
        let y = p.node("Split", &[Some(x), Some(sizes)], vec![int_attr("axis", 1)], 2);
        let (a, b) = (p.out(y, 0), p.out(y, 1));
        let cut = p.refit(a, &[(x, 1, &[0, 2, 4, 5, 8]), (a, 1, &[0, 2]), (b, 1, &[0, 1, 4])]);
        assert_eq!(cut, Ok(vec![(1, vec![(0, 2), (1, 3)])]));
        let bad = p.refit(a, &[(x, 1, &[0, 2, 4, 5, 8]), (a, 1, &[0, 1])]);
        assert_eq!(bad, Err("the parts keep other positions than the whole".into()));
        assert_eq!(p.refit(a, &[(x, 0, &[0])]), Ok(vec![]));
    }

    #[test]
    fn equal_parts_that_no_longer_are_get_sizes() {
        for opset in [11, 13, 18] {
            let mut p = Probe::new(opset);
            let x = p.input("x", "b 6");
            let attrs = if opset == 18 { vec![int_attr("num_outputs", 2)] } else { vec![] };
            let y = p.node("Split", &[Some(x)], [vec![int_attr("axis", 1)], attrs].concat(), 2);
            let (a, b) = (p.out(y, 0), p.out(y, 1));
            assert_eq!(p.refit(a, &[(x, 1, &[0, 1, 3, 4]), (a, 1, &[0, 1]), (b, 1, &[0, 1])]), Ok(vec![]));
            assert!(p.graph.node(y).input(1).is_none() && p.graph.node(y).attr("split").is_none(), "still equal");
            assert_eq!(p.refit(a, &[(x, 1, &[2, 3, 4, 5]), (a, 1, &[2])]), Ok(vec![]));
            let node = p.graph.node(y);
            assert!(node.attr("num_outputs").is_none());
            match node.input(1) {
                Some(sizes) => {
                    let sizes = p.graph.value(sizes).initializer().and_then(|t| t.to_i64s());
                    assert_eq!((sizes, opset >= 13), (Some(vec![1, 3]), true));
                }
                None => assert_eq!(node.attr_ints("split"), Some(&[1, 3][..])),
            }
        }
    }
}
