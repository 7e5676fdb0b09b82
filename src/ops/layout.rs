//! Transpose, Squeeze, Unsqueeze, Expand, Tile (opset 11 to 24): axes in another order, put in, taken out, or repeated.
//!
//! Squeeze and Unsqueeze have `axes` as an attribute before opset 13 and as an input from then on. An axis that is stretched
//! from size one holds copies of one position, however many there are: nothing in the input speaks of it, and it may lose any.

use super::shape::{sizes_of, target_of};
use super::{Axes, Cost, Grad, OpRule, Refit};
use crate::autodiff::GradCx;
use crate::axes::relation::{AxesCx, Relations, Slot};
use crate::graph::Node;
use crate::infer::content::along;
use crate::infer::{Dim, Fact, InferCx, InferError, normalize_axis};
use crate::slice::refit::{RefitCx, RefitError};

/// The records of this family.
pub static RULES: &[OpRule] = &[
    OpRule {
        name: "Transpose",
        domain: "",
        opsets: (1, 24),
        infer: transpose_infer,
        axes: Axes::Rule(transpose_axes),
        grad: Grad::Rule(transpose_grad),
        cost: Cost::Free,
        refit: Refit::Nothing,
    },
    OpRule {
        name: "Squeeze",
        domain: "",
        opsets: (1, 24),
        infer: squeeze_infer,
        axes: Axes::Rule(squeeze_axes),
        grad: Grad::Rule(resize_grad),
        cost: Cost::Free,
        refit: Refit::Nothing,
    },
    OpRule {
        name: "Unsqueeze",
        domain: "",
        opsets: (1, 24),
        infer: unsqueeze_infer,
        axes: Axes::Rule(unsqueeze_axes),
        grad: Grad::Rule(resize_grad),
        cost: Cost::Free,
        refit: Refit::Nothing,
    },
    OpRule {
        name: "Expand",
        domain: "",
        opsets: (8, 24),
        infer: expand_infer,
        axes: Axes::Rule(expand_axes),
        grad: Grad::Rule(expand_grad),
        cost: Cost::Free,
        refit: Refit::Rule(expand_refit),
    },
    OpRule {
        name: "Tile",
        domain: "",
        opsets: (6, 24),
        infer: tile_infer,
        axes: Axes::Rule(tile_axes),
        grad: Grad::Rule(tile_grad),
        cost: Cost::Free,
        refit: Refit::Rule(tile_refit),
    },
];

/// Input axis of each output axis of a Transpose; the reverse order where `perm` is left out, `None` where it is no order.
fn permutation(node: &Node, rank: usize) -> Option<Vec<usize>> {
    let Some(perm) = node.attr_ints("perm") else { return Some((0..rank).rev().collect()) };
    let perm: Vec<usize> = perm.iter().map(|p| usize::try_from(*p).ok()).collect::<Option<_>>()?;
    let mut sorted = perm.clone();
    sorted.sort_unstable();
    sorted.into_iter().eq(0..rank).then_some(perm)
}

fn transpose_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let Some(input) = cx.shape(0) else { return Ok(vec![Fact::new(cx.dtype(0), None)]) };
    let perm = permutation(cx.node, input.len()).ok_or_else(|| cx.error(format!("perm is no order of {} axes", input.len())))?;
    let shape: Vec<Dim> = perm.iter().map(|p| input[*p].clone()).collect();
    let known = cx.input(0).moved(&shape, |sizes, strides| perm.iter().map(|p| along(0..sizes[*p], strides[*p])).collect());
    Ok(vec![Fact::new(cx.dtype(0), Some(shape)).with_known(known)])
}

fn transpose_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    for (out, axis) in permutation(cx.node, cx.shape(Slot::In(0)).len()).into_iter().flatten().enumerate() {
        relations.same((Slot::In(0), axis), (Slot::Out(0), out));
    }
    relations
}

/// `dx` is `dy` in the opposite order.
fn transpose_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let dy = cx.dy()?;
    let perm = permutation(cx.node(), cx.shape(cx.input(0)).len()).ok_or("the order of the axes is not known")?;
    let mut inverse = vec![0; perm.len()];
    perm.iter().enumerate().for_each(|(out, axis)| inverse[*axis] = out);
    let dx = cx.b.transpose(dy, &inverse);
    cx.give(0, dx);
    Ok(())
}

/// The axes that a Squeeze or Unsqueeze names. `Ok(None)`: left out; `Err`: an input whose content is not known.
fn named_axes(node: &Node, known: impl Fn(usize) -> Option<Vec<i64>>) -> Result<Option<Vec<i64>>, ()> {
    if let Some(axes) = node.attr_ints("axes") {
        return Ok(Some(axes.to_vec()));
    }
    match node.input(1) {
        Some(_) => known(1).map(Some).ok_or(()),
        None => Ok(None),
    }
}

/// Axes inside `rank`, sorted; `None` where one lies outside or stands twice.
fn normalized(axes: &[i64], rank: usize) -> Option<Vec<usize>> {
    let mut out: Vec<usize> = axes.iter().map(|a| normalize_axis(*a, rank)).collect::<Option<_>>()?;
    out.sort_unstable();
    out.windows(2).all(|w| w[0] != w[1]).then_some(out)
}

/// Axes that a Squeeze takes out; without `axes` those of size one, which must be seen.
fn squeezed(node: &Node, input: &[Dim], known: impl Fn(usize) -> Option<Vec<i64>>) -> Option<Vec<usize>> {
    match named_axes(node, known) {
        Ok(Some(axes)) => normalized(&axes, input.len()),
        Ok(None) if input.iter().all(|d| d.known().is_some()) => Some((0..input.len()).filter(|a| input[*a].is(1)).collect()),
        _ => None,
    }
}

fn squeeze_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let known = cx.input(0).known.clone();
    let shape = cx.shape(0).and_then(|input| {
        let gone = squeezed(cx.node, input, |slot| cx.numbers(slot))?;
        Some((gone, input))
    });
    let Some((gone, input)) = shape else { return Ok(vec![Fact::new(cx.dtype(0), None).with_known(known)]) };
    if let Some(axis) = gone.iter().find(|a| input[**a].known().is_some_and(|n| n != 1)) {
        return Err(cx.error(format!("axis {axis} has the size {} and cannot be taken out", input[*axis])));
    }
    let shape = (0..input.len()).filter(|a| !gone.contains(a)).map(|a| input[a].clone()).collect();
    Ok(vec![Fact::new(cx.dtype(0), Some(shape)).with_known(known)])
}

fn squeeze_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    let input = cx.shape(Slot::In(0));
    let gone = squeezed(cx.node, input, |slot| cx.numbers(slot)).unwrap_or_default();
    let mut out = 0;
    for (axis, size) in input.iter().enumerate() {
        if !gone.contains(&axis) {
            relations.same((Slot::In(0), axis), (Slot::Out(0), out));
            out += 1;
        } else if !size.is(1) {
            relations.barrier((Slot::In(0), axis), "taken out by Squeeze");
        }
    }
    relations
}

fn unsqueeze_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let known = cx.input(0).known.clone();
    let axes = named_axes(cx.node, |slot| cx.numbers(slot)).ok().flatten();
    let (Some(input), Some(axes)) = (cx.shape(0), axes) else { return Ok(vec![Fact::new(cx.dtype(0), None).with_known(known)]) };
    let rank = input.len() + axes.len();
    let new = normalized(&axes, rank).ok_or_else(|| cx.error(format!("axes {axes:?} do not fit into rank {rank}")))?;
    let mut old = input.iter().cloned();
    let shape = (0..rank).filter_map(|a| if new.contains(&a) { Some(Dim::from(1i64)) } else { old.next() }).collect();
    Ok(vec![Fact::new(cx.dtype(0), Some(shape)).with_known(known)])
}

fn unsqueeze_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    let rank = cx.shape(Slot::Out(0)).len();
    let axes = named_axes(cx.node, |slot| cx.numbers(slot)).ok().flatten().unwrap_or_default();
    let new = normalized(&axes, rank).unwrap_or_default();
    for (axis, out) in (0..rank).filter(|a| !new.contains(a)).enumerate() {
        relations.same((Slot::In(0), axis), (Slot::Out(0), out));
    }
    relations
}

/// `dx` is `dy` under the input's shape.
fn resize_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let (dy, x) = (cx.dy()?, cx.input(0));
    let target = target_of(cx, x);
    let dx = cx.b.reshape_to(dy, target);
    cx.give(0, dx);
    Ok(())
}

fn expand_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let (Some(input), Some(target)) = (cx.shape(0), cx.ints(1)) else {
        let target_rank = cx.shape(1).and_then(|s| s.first()).and_then(Dim::size).filter(|r| *r <= 64);
        let rank = target_rank.and_then(|t| Some(t.max(cx.input(0).rank()?)));
        let shape = rank.map(|r| (0..r).map(|i| cx.fresh(&format!("expand{i}"))).collect());
        return Ok(vec![Fact::new(cx.dtype(0), shape)]);
    };
    let rank = input.len().max(target.len());
    let one = Dim::from(1i64);
    let at = |dims: &[Dim], axis: usize| (axis + dims.len()).checked_sub(rank).map_or(one.clone(), |a| dims[a].clone());
    let shape: Vec<Dim> = (0..rank).map(|a| stretched(cx, &at(input, a), &at(target, a))).collect::<Result<_, _>>()?;
    let known = cx.input(0).moved(&shape, |sizes, strides| {
        let out = shape.iter().filter_map(Dim::size).enumerate();
        out.map(|(axis, size)| match (axis + sizes.len()).checked_sub(rank) {
            Some(a) if sizes[a] != 1 => along(0..size, strides[a]),
            _ => vec![0; size],
        })
        .collect()
    });
    Ok(vec![Fact::new(cx.dtype(0), Some(shape)).with_known(known)])
}

/// The size that both sizes are broadcast to. Two symbols stretch to the greater one, as every run has them equal or one of
/// them 1.
fn stretched(cx: &InferCx<'_>, input: &Dim, target: &Dim) -> Result<Dim, InferError> {
    match (input.known(), target.known()) {
        _ if input == target => Ok(input.clone()),
        (Some(1), _) => Ok(target.clone()),
        (_, Some(1)) => Ok(input.clone()),
        (Some(a), Some(b)) => Err(cx.error(format!("a size of {a} cannot become {b}"))),
        (Some(_), None) => Ok(input.clone()),
        (None, Some(_)) => Ok(target.clone()),
        (None, None) => Ok(input.max(target)),
    }
}

fn expand_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    let (input, output) = (cx.shape(Slot::In(0)), cx.shape(Slot::Out(0)));
    for (axis, size) in output.iter().enumerate() {
        let to = (Slot::Out(0), axis);
        match (axis + input.len()).checked_sub(output.len()) {
            Some(a) if input[a] == *size => relations.same((Slot::In(0), a), to),
            Some(a) if !input[a].is(1) => {
                relations.barrier((Slot::In(0), a), "expanded between sizes that are not known to be equal");
                relations.barrier(to, "expanded between sizes that are not known to be equal");
            }
            _ => relations.unread(to),
        }
    }
    relations
}

/// `dx` is the sum of `dy` over the stretched axes.
fn expand_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let dy = cx.dy()?;
    let (input, output) = (cx.shape(cx.input(0)), cx.shape(cx.output(0)));
    let shift = output.len().saturating_sub(input.len());
    if let Some(axis) = (0..input.len()).find(|a| !input[*a].is(1) && input[*a] != output[a + shift]) {
        return Err(format!("whether Expand stretches axis {axis} is only known at run time"));
    }
    let dx = cx.sum_to(dy, 0);
    cx.give(0, dx);
    Ok(())
}

/// Target entries of cut axes; an entry of 1 leaves the axis as the input has it.
fn expand_refit(cx: &mut RefitCx<'_>) -> Result<(), RefitError> {
    let output = cx.old_output(0).len();
    let target = cx.old_ints(1);
    let entries_count = target.map(<[_]>::len).or(cx.old_input(1).first().and_then(Dim::size)).unwrap_or(output);
    let mut entries = Vec::new();
    for axis in 0..output {
        let Some(kept) = cx.kept_output(0, axis).map(<[_]>::len) else { continue };
        // The target is aligned at the end; axes before it come from the input alone.
        let Some(entry) = (axis + entries_count).checked_sub(output) else { continue };
        if !target.is_some_and(|t| t[entry].is(1)) {
            // 1 takes the input's own size, where that is only known at run time.
            entries.push((entry, kept.max(1) as i64));
        }
    }
    cx.patch_ints(1, entries);
    Ok(())
}

fn tile_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let Some(input) = cx.shape(0) else { return Ok(vec![Fact::new(cx.dtype(0), None)]) };
    let Some(repeats) = cx.ints(1) else {
        let shape = (0..input.len()).map(|i| cx.fresh(&format!("tile{i}"))).collect();
        return Ok(vec![Fact::new(cx.dtype(0), Some(shape))]);
    };
    if repeats.len() != input.len() {
        return Err(cx.error(format!("{} repeats for {} axes", repeats.len(), input.len())));
    }
    let shape: Vec<Dim> = input.iter().zip(repeats).map(|(size, n)| size * n).collect();
    let known = cx.input(0).moved(&shape, |sizes, strides| {
        let out = shape.iter().filter_map(Dim::size).enumerate();
        out.map(|(axis, size)| along((0..size).map(|i| i % sizes[axis]), strides[axis])).collect()
    });
    Ok(vec![Fact::new(cx.dtype(0), Some(shape)).with_known(known)])
}

fn tile_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    let (input, output) = (cx.shape(Slot::In(0)), cx.shape(Slot::Out(0)));
    for (axis, (size, tiled)) in input.iter().zip(output).enumerate() {
        let (from, to) = ((Slot::In(0), axis), (Slot::Out(0), axis));
        if size == tiled {
            relations.same(from, to);
        } else if size.is(1) {
            relations.unread(to);
        } else if let Some(repeats) = tiled.exact_div(size).filter(|n| n.known().is_some()) {
            // Position `r * size + i` holds what position `i` does: repeats outside, the axis inside. Repeats that are computed at
            // run time may be computed from a size that a cut changes.
            let inside = relations.virtual_value(vec![repeats, size.clone()]);
            relations.same(from, (inside, 1));
            relations.regroup((inside, vec![0, 1]), (Slot::Out(0), vec![axis]));
            relations.unread((inside, 0));
        } else {
            relations.barrier(from, "repeated by Tile");
            relations.barrier(to, "repeated by Tile");
        }
    }
    relations
}

/// Repeats of cut axes that had one position; others are cut in the input.
fn tile_refit(cx: &mut RefitCx<'_>) -> Result<(), RefitError> {
    let input = cx.old_input(0);
    let stretched = (0..input.len()).filter(|a| input[*a].is(1));
    let entries = stretched.filter_map(|a| cx.kept_output(0, a).map(|kept| (a, kept.len() as i64))).collect();
    cx.patch_ints(1, entries);
    Ok(())
}

/// `dx` is the sum of `dy` over the repeats: `dy` seen as `[n0, d0, n1, d1, ..]`, summed over every other axis.
fn tile_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let (dy, x, repeats) = (cx.dy()?, cx.input(0), cx.input(1));
    let rank = cx.shape(x).len();
    if rank == 0 {
        cx.give(0, dy);
        return Ok(());
    }
    let sizes = sizes_of(cx, x);
    let column = |cx: &mut GradCx<'_>, v| cx.b.unsqueeze(v, &[1]);
    let pairs = [column(cx, repeats), column(cx, sizes)];
    let pairs = cx.b.concat(&pairs, 1);
    let target = cx.b.reshape(pairs, &[-1]);
    let blocks = cx.b.reshape_to(dy, target);
    let every_other: Vec<i64> = (0..rank as i64).map(|a| 2 * a).collect();
    let dx = cx.b.reduce_sum(blocks, &every_other, false);
    cx.give(0, dx);
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::ops::probe::{Probe, ints_attr};

    #[test]
    fn transposes_move_axes_and_contents() {
        let mut p = Probe::new(17);
        let x = p.input("x", "b n 3 64");
        let y = p.op("Transpose", &[x], vec![ints_attr("perm", &[2, 0, 3, 1])]);
        assert_eq!(p.shape(y), "3 b 64 n");
        assert_eq!(p.axes(y), ["in0.2 = out0.0", "in0.0 = out0.1", "in0.3 = out0.2", "in0.1 = out0.3"]);
        assert_eq!(p.grad(y), Ok(vec!["Transpose".into()]));
        let c = p.ints_of(&[2, 3], &[0, 1, 2, 3, 4, 5]);
        let t = p.op("Transpose", &[c], vec![]);
        assert_eq!((p.shape(t).as_str(), p.content(t).as_str()), ("3 2", "0 3 1 4 2 5"));
        p.op("Transpose", &[x], vec![ints_attr("perm", &[0, 0, 1, 2])]);
        assert_eq!(p.error().what, "perm is no order of 4 axes");
    }

    #[test]
    fn axes_are_an_attribute_before_opset_13_and_an_input_after() {
        for opset in [11, 13] {
            let mut p = Probe::new(opset);
            let x = p.input("x", "b 1 n 1");
            let on_axes = |p: &mut Probe, op: &str, v, axes: &[i64]| {
                if opset == 11 {
                    p.op(op, &[v], vec![ints_attr("axes", axes)])
                } else {
                    let axes = p.ints(axes);
                    p.op(op, &[v, axes], vec![])
                }
            };
            let y = on_axes(&mut p, "Squeeze", x, &[-1, 1]);
            assert_eq!(p.shape(y), "b n");
            assert_eq!(p.axes(y), ["in0.0 = out0.0", "in0.2 = out0.1"]);
            let z = on_axes(&mut p, "Unsqueeze", y, &[0, -1]);
            assert_eq!(p.shape(z), "1 b n 1");
            assert_eq!(p.axes(z), ["in0.0 = out0.1", "in0.1 = out0.2"]);
            assert_eq!(p.grad(z), Ok(vec!["Shape".into(), "Reshape".into()]));
            on_axes(&mut p, "Unsqueeze", y, &[0, 0]);
            assert_eq!(p.error().op, "Unsqueeze");
        }
    }

    #[test]
    fn squeeze_without_axes_needs_numbers() {
        let mut p = Probe::new(17);
        let (x, y) = (p.input("x", "1 5 1"), p.input("y", "b 1"));
        let (a, b) = (p.op("Squeeze", &[x], vec![]), p.op("Squeeze", &[y], vec![]));
        assert_eq!((p.shape(a), p.shape(b)), ("5".to_string(), "?".to_string()));
        let five = p.ints(&[1]);
        p.op("Squeeze", &[x, five], vec![]);
        assert_eq!(p.error().what, "axis 1 has the size 5 and cannot be taken out");
    }

    #[test]
    fn expand_stretches_ones() {
        let mut p = Probe::new(17);
        let x = p.input("x", "1 n 64");
        let like = p.input("like", "b n 64");
        let target = p.op("Shape", &[like], vec![]);
        let y = p.op("Expand", &[x, target], vec![]);
        assert_eq!(p.shape(y), "b n 64");
        assert_eq!(p.axes(y), ["out0.0 unread", "in0.1 = out0.1", "in0.2 = out0.2"]);
        assert_eq!(p.grad(y), Ok(vec!["ReduceSum".into()]));
        let c = p.ints_of(&[2, 1], &[3, 4]);
        let t = p.ints(&[2, 1, 2]);
        let e = p.op("Expand", &[c, t], vec![]);
        assert_eq!((p.shape(e).as_str(), p.content(e).as_str()), ("2 2 2", "3 3 4 4 3 3 4 4"));
        let t = p.ints(&[3, 4]);
        p.op("Expand", &[c, t], vec![]);
        assert_eq!(p.error().what, "a size of 2 cannot become 3");
    }

    #[test]
    fn expand_targets_follow_cuts() {
        let mut p = Probe::new(17);
        let x = p.input("x", "b 2 1 5 64");
        let t = p.ints(&[1, 3, 5, 64]);
        let y = p.op("Expand", &[x, t], vec![]);
        assert_eq!(p.shape(y), "b 2 3 5 64");
        assert_eq!(p.refit(y, &[(y, 4, &[0, 1]), (y, 1, &[0]), (x, 4, &[0, 1])]), Ok(vec![(1, vec![(3, 2)])]));
    }

    #[test]
    fn tiles_repeat() {
        let mut p = Probe::new(17);
        let x = p.input("x", "b 1 3");
        let n = p.ints(&[1, 4, 2]);
        let y = p.op("Tile", &[x, n], vec![]);
        assert_eq!(p.shape(y), "b 4 6");
        let links = ["in0.0 = out0.0", "out0.1 unread", "in0.2 = v0.1", "v0[0, 1] ~ out0[2]", "v0.0 unread"];
        assert_eq!(p.axes(y), links);
        assert_eq!(p.grad(y).map(|ops| ops.last().cloned()), Ok(Some("ReduceSum".into())));
        assert_eq!(p.refit(y, &[(y, 1, &[0, 3])]), Ok(vec![(1, vec![(1, 2)])]));
        let c = p.ints_of(&[1, 2], &[3, 4]);
        let n = p.ints(&[2, 2]);
        let t = p.op("Tile", &[c, n], vec![]);
        assert_eq!((p.shape(t).as_str(), p.content(t).as_str()), ("2 4", "3 4 3 4 3 4 3 4"));
    }
}
