//! Reshape (opset 5 to 24) and Flatten (opset 1 to 24): the same elements, row-major, under another shape.
//!
//! Reshape's target holds sizes; -1 takes what is left, 0 copies the input's size at the same place (opset 14: not where
//! `allowzero` is set). Flatten's shape is the product of the sizes before `axis` by the product of those behind.

use super::shape::target_of;
use super::{Axes, Cost, Grad, OpRule, Refit};
use crate::autodiff::GradCx;
use crate::axes::relation::{AxesCx, Relations, Slot};
use crate::infer::{Dim, Fact, InferCx, InferError, normalize_axis};
use crate::slice::refit::{RefitCx, RefitError};

/// The records of this family.
pub static RULES: &[OpRule] = &[
    OpRule {
        name: "Reshape",
        domain: "",
        opsets: (5, 24),
        infer: reshape_infer,
        axes: Axes::Rule(regroup_axes),
        grad: Grad::Rule(reshape_grad),
        cost: Cost::Free,
        refit: Refit::Rule(reshape_refit),
    },
    OpRule {
        name: "Flatten",
        domain: "",
        opsets: (1, 24),
        infer: flatten_infer,
        axes: Axes::Rule(regroup_axes),
        grad: Grad::Rule(reshape_grad),
        cost: Cost::Free,
        refit: Refit::Nothing,
    },
];

/// Ranks above this are taken for nonsense: the rank of a run-time target is not believed.
const RANK_MAX: usize = 64;

fn reshape_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let shape = match cx.ints(1) {
        Some(target) => Some(reshape_target(cx, target)?),
        None => {
            let rank = cx.shape(1).and_then(|s| s.first()).and_then(Dim::size).filter(|r| *r <= RANK_MAX);
            rank.map(|r| (0..r).map(|i| cx.fresh(&format!("reshape{i}"))).collect())
        }
    };
    Ok(vec![Fact::new(cx.dtype(0), shape).with_known(cx.input(0).known.clone())])
}

/// The output's shape under a known target, whose entries may be symbols.
fn reshape_target(cx: &InferCx<'_>, target: &[Dim]) -> Result<Vec<Dim>, InferError> {
    let zero_copies = cx.node.attr_int("allowzero").unwrap_or(0) == 0;
    let mut shape = Vec::with_capacity(target.len());
    let mut open = None;
    for (axis, entry) in target.iter().enumerate() {
        shape.push(match entry.known() {
            Some(-1) => {
                if open.replace(axis).is_some() {
                    return Err(cx.error("the target has -1 twice"));
                }
                Dim::from(1i64)
            }
            Some(0) if zero_copies => match cx.shape(0) {
                Some(input) => input.get(axis).cloned().ok_or_else(|| cx.error("the target copies a size that is not there"))?,
                None => cx.fresh(&format!("reshape{axis}")),
            },
            Some(n) if n < 0 => return Err(cx.error(format!("the target has a size of {n}"))),
            _ => entry.clone(),
        });
    }
    let Some(input) = cx.shape(0) else {
        if let Some(axis) = open {
            shape[axis] = cx.fresh(&format!("reshape{axis}"));
        }
        return Ok(shape);
    };
    let (total, rest) = cancelled(input, &shape);
    match open {
        Some(axis) => shape[axis] = rest_size(cx, &total, &rest)?,
        None if total.known().is_some() && rest.known().is_some() && total != rest => {
            return Err(cx.error(format!("{input:?} has not as many elements as {shape:?}")));
        }
        None => {}
    }
    Ok(shape)
}

/// Products of two lists of sizes, without the sizes that stand in both.
fn cancelled(a: &[Dim], b: &[Dim]) -> (Dim, Dim) {
    let mut b: Vec<&Dim> = b.iter().collect();
    let mut rest = Vec::new();
    for size in a {
        match b.iter().position(|x| *x == size && !size.is(0)) {
            Some(at) => {
                b.swap_remove(at);
            }
            None => rest.push(size),
        }
    }
    (rest.into_iter().product(), b.into_iter().product())
}

/// `total / rest`, which every run must divide; a named quotient where the division is not seen to be exact.
fn rest_size(cx: &InferCx<'_>, total: &Dim, rest: &Dim) -> Result<Dim, InferError> {
    if let Some(size) = total.exact_div(rest) {
        return Ok(size);
    }
    if rest.is(0) {
        return Err(cx.error("-1 beside a size of 0"));
    }
    if total.known().is_some() && rest.known().is_some() {
        return Err(cx.error(format!("{total} elements do not divide by {rest}")));
    }
    Ok(total.floor_div(rest))
}

fn flatten_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let shape = match cx.shape(0) {
        Some(input) => {
            let axis = cx.node.attr_int("axis").unwrap_or(1);
            // One behind the last axis is allowed.
            let at = if usize::try_from(axis) == Ok(input.len()) { Some(input.len()) } else { normalize_axis(axis, input.len()) };
            let at = at.ok_or_else(|| cx.error(format!("no axis {axis} in rank {}", input.len())))?;
            vec![input[..at].iter().product(), input[at..].iter().product()]
        }
        None => vec![cx.fresh("flatten0"), cx.fresh("flatten1")],
    };
    Ok(vec![Fact::new(cx.dtype(0), Some(shape)).with_known(cx.input(0).known.clone())])
}

/// Axes of sizes other than one, in order.
fn carrying(shape: &[Dim]) -> Vec<usize> {
    (0..shape.len()).filter(|a| !shape[*a].is(1)).collect()
}

/// The finest blocks of consecutive axes that hold the same elements: `Same` for one axis on either side, `Regroup` for more.
///
/// Example: `[batch*3, N, E]` to `[batch, 3, N, E]` has the blocks `{0} ~ {0, 1}`, `1 = 2`, `2 = 3`.
fn regroup_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    let (input, output) = (cx.shape(Slot::In(0)), cx.shape(Slot::Out(0)));
    if input.iter().chain(output).any(|d| d.is(0)) {
        bar(&mut relations, input.len(), output.len(), "a value without elements");
        return relations;
    }
    let (from, to) = (carrying(input), carrying(output));
    for window in cut_points(input, &from, output, &to).windows(2) {
        let (a, b) = (&from[window[0].0..window[1].0], &to[window[0].1..window[1].1]);
        let equal = product(input, a) == product(output, b);
        match (a, b) {
            (_, _) if !equal => {
                let reason = "reshaped to sizes that are not known to match";
                a.iter().for_each(|x| relations.barrier((Slot::In(0), *x), reason));
                b.iter().for_each(|x| relations.barrier((Slot::Out(0), *x), reason));
            }
            ([x], [y]) => relations.same((Slot::In(0), *x), (Slot::Out(0), *y)),
            _ => relations.regroup((Slot::In(0), a.to_vec()), (Slot::Out(0), b.to_vec())),
        }
    }
    relations
}

fn bar(relations: &mut Relations, input_rank: usize, output_rank: usize, reason: &str) {
    (0..input_rank).for_each(|a| relations.barrier((Slot::In(0), a), reason));
    (0..output_rank).for_each(|a| relations.barrier((Slot::Out(0), a), reason));
}

fn product(shape: &[Dim], axes: &[usize]) -> Dim {
    axes.iter().map(|a| &shape[*a]).product()
}

/// Pairs (number of input axes, number of output axes) up to which, or from which on, both hold equally many elements; first
/// (0, 0), last all of them.
///
/// Counting from the end finds pairs behind a size that the target names anew and that is not seen to be equal.
fn cut_points(input: &[Dim], from: &[usize], output: &[Dim], to: &[usize]) -> Vec<(usize, usize)> {
    let mut points = vec![(0, 0)];
    let prefixes: Vec<Dim> = (0..=to.len()).map(|j| product(output, &to[..j])).collect();
    for i in 1..from.len() {
        let size = product(input, &from[..i]);
        let behind = points[points.len() - 1].1 + 1;
        if let Some(j) = (behind..to.len()).find(|j| prefixes[*j] == size) {
            points.push((i, j));
        }
    }
    let last = points[points.len() - 1];
    let mut tail = vec![(from.len(), to.len())];
    let suffixes: Vec<Dim> = (0..=to.len()).map(|j| product(output, &to[j..])).collect();
    for i in (last.0 + 1..from.len()).rev() {
        let size = product(input, &from[i..]);
        let before = tail[tail.len() - 1].1;
        if let Some(j) = (last.1 + 1..before).rev().find(|j| suffixes[*j] == size) {
            tail.push((i, j));
        }
    }
    points.extend(tail.into_iter().rev());
    points
}

/// `dx` is `dy` under the input's shape.
fn reshape_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let (dy, x) = (cx.dy()?, cx.input(0));
    let target = target_of(cx, x);
    let dx = cx.b.reshape_to(dy, target);
    cx.give(0, dx);
    Ok(())
}

/// Entries of the target that no longer say the size of the cut output.
fn reshape_refit(cx: &mut RefitCx<'_>) -> Result<(), RefitError> {
    let zero_copies = cx.node().attr_int("allowzero").unwrap_or(0) == 0;
    let (input, output) = (cx.old_input(0), cx.old_output(0));
    let mut entries = Vec::new();
    for (axis, size) in output.iter().enumerate() {
        // Of an axis that is only known at run time what is left is computed.
        let kept = cx.kept_output(0, axis).map(<[_]>::len);
        let wanted = kept.or(size.size());
        let cut = match cx.old_ints(1).and_then(|t| t.get(axis)).and_then(Dim::known) {
            // The other entries are right, so what is left is right.
            Some(-1) => false,
            Some(0) if zero_copies => {
                let cut_input = cx.kept_input(0, axis).map(<[_]>::len);
                let copied = cut_input.or(input.get(axis).and_then(Dim::size));
                (kept.is_some() || cut_input.is_some()) && copied != wanted
            }
            _ => kept.is_some(),
        };
        if cut && cx.kept_output(0, axis).is_some_and(<[_]>::is_empty) {
            entries.push((axis, -1));
        } else if cut {
            let wanted =
                wanted.ok_or_else(|| cx.error(format!("output axis {axis} has no fixed size to write into the target")))?;
            entries.push((axis, wanted as i64));
        }
    }
    let open = cx.old_ints(1).and_then(|t| t.iter().position(|d| d.is(-1)));
    if let (Some(axis), true) = (open, entries.iter().any(|(_, n)| *n == -1)) {
        let size = cx.kept_output(0, axis).map(<[_]>::len).or(output[axis].size());
        let size = size.ok_or_else(|| cx.error(format!("output axes {axis} and another are only known at run time")))?;
        entries.push((axis, size as i64));
    }
    cx.patch_ints(1, entries);
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::ops::probe::{Probe, int_attr};

    fn reshaped(input: &str, target: &[i64]) -> (Probe, crate::graph::ValueId) {
        let mut p = Probe::new(17);
        let x = p.input("x", input);
        let t = p.ints(target);
        let y = p.op("Reshape", &[x, t], vec![]);
        (p, y)
    }

    #[test]
    fn targets_copy_and_fill() {
        for (input, target, shape) in [
            ("b 197 192", &[0i64, 0, 3, 64][..], "b 197 3 64"),
            ("b 197 192", &[-1, 197, 3, 64], "b 197 3 64"),
            ("b n 192", &[0, -1, 64], "b 3*n 64"),
            ("2 3", &[6], "6"),
            ("b n 192", &[7, -1], "7 floor((192*b*n)/(7))"),
            ("1", &[], ""),
        ] {
            let (p, y) = reshaped(input, target);
            assert_eq!(p.shape(y), shape, "{input} {target:?}");
        }
    }

    #[test]
    fn contradictions_are_errors() {
        for (input, target) in [("2 3", &[4i64, 2][..]), ("2 3", &[4, -1]), ("2 3", &[-1, -1]), ("2", &[2, 0]), ("2 3", &[-2, 3])]
        {
            let (p, _) = reshaped(input, target);
            assert_eq!(p.error().op, "Reshape", "{input} {target:?}");
        }
    }

    #[test]
    fn symbolic_targets_give_symbolic_shapes() {
        let mut p = Probe::new(17);
        let x = p.input("x", "b n 192");
        let shape = p.op("Shape", &[x], vec![]);
        let zero = p.ints(&[0]);
        let batch = p.op("Gather", &[shape, zero], vec![int_attr("axis", 0)]);
        let rest = p.ints(&[-1, 3, 64]);
        let target = p.op("Concat", &[batch, rest], vec![int_attr("axis", 0)]);
        let y = p.op("Reshape", &[x, target], vec![]);
        assert_eq!((p.content(target).as_str(), p.shape(y).as_str()), ("b -1 3 64", "b n 3 64"));
        assert_eq!(p.axes(y), ["in0.0 = out0.0", "in0.1 = out0.1", "in0[2] ~ out0[2, 3]"]);
    }

    #[test]
    fn unknown_targets_have_a_rank() {
        let mut p = Probe::new(17);
        let x = p.input("x", "b 4");
        let target = p.typed_input("t", "3", crate::graph::DType::I64);
        let y = p.op("Reshape", &[x, target], vec![]);
        assert_eq!(p.shape(y), "reshape0.n0 reshape1.n0 reshape2.n0");
        assert_eq!(p.axes(y).len(), 5);
    }

    #[test]
    fn blocks_are_the_finest() {
        for (input, target, links) in [
            ("1 197 576", &[1i64, 197, 3, 3, 64][..], &["in0.1 = out0.1", "in0[2] ~ out0[2, 3, 4]"][..]),
            ("6 4", &[4, 6], &["in0[0, 1] ~ out0[0, 1]"]),
            ("4 6 8", &[24, 8], &["in0[0, 1] ~ out0[0]", "in0.2 = out0.1"]),
            ("b 8 8 4", &[-1, 64, 4], &["in0.0 = out0.0", "in0[1, 2] ~ out0[1]", "in0.3 = out0.2"]),
            // 3 does not follow b in the output: the first three axes are one block.
            ("b 3 n 16", &[-1, 0, 4, 4], &["in0[0, 1, 2] ~ out0[0, 1]", "in0[3] ~ out0[2, 3]"]),
            ("1 5 1", &[5], &["in0.1 = out0.0"]),
        ] {
            let (p, y) = reshaped(input, target);
            assert_eq!(p.axes(y), links, "{input} {target:?}");
        }
    }

    #[test]
    fn a_product_of_symbols_splits() {
        let mut p = Probe::new(17);
        let x = p.input("x", "b 3 n 16");
        let t = p.ints(&[-1, 5, 16]);
        let first = p.op("Reshape", &[x, t], vec![]);
        assert_eq!(p.axes(first)[0], "in0.0 | reshaped to sizes that are not known to match");
        assert_eq!(p.axes(first).last().map(String::as_str), Some("in0.3 = out0.2"));
        let t = p.input("like", "b 3 n 16");
        let shape = p.op("Shape", &[t], vec![]);
        let index = p.ints(&[2, 3]);
        let tail = p.op("Gather", &[shape, index], vec![]);
        let minus = p.ints(&[-1]);
        let target = p.op("Concat", &[minus, tail], vec![int_attr("axis", 0)]);
        let merged = p.op("Reshape", &[x, target], vec![]);
        assert_eq!(p.shape(merged), "3*b n 16");
        assert_eq!(p.axes(merged), ["in0[0, 1] ~ out0[0]", "in0.2 = out0.1", "in0.3 = out0.2"]);
        let back = p.op("Reshape", &[merged, shape], vec![]);
        assert_eq!(p.axes(back), ["in0[0] ~ out0[0, 1]", "in0.1 = out0.2", "in0.2 = out0.3"]);
    }

    #[test]
    fn cut_axes_are_written_into_the_target() {
        let (mut p, y) = reshaped("b 197 192", &[0, 0, 3, 64]);
        let x = p.graph.inputs()[0];
        let kept: Vec<usize> = (0..96).collect();
        let heads = p.refit(y, &[(x, 2, &kept), (y, 3, &kept[..32])]);
        assert_eq!(heads, Ok(vec![(1, vec![(3, 32)])]));
        assert_eq!(p.refit(y, &[(x, 1, &kept), (y, 1, &kept)]), Ok(vec![]), "0 copies the cut size");
        let (mut p, y) = reshaped("b 197 3 64", &[0, 0, 192]);
        assert_eq!(p.refit(y, &[(y, 2, &kept)]), Ok(vec![(1, vec![(2, 96)])]));
        let (mut p, y) = reshaped("b 197 3 64", &[0, 0, -1]);
        assert_eq!(p.refit(y, &[(y, 2, &kept)]), Ok(vec![]), "-1 takes what is left");
    }

    #[test]
    fn a_zero_that_copies_another_axis_becomes_a_number() {
        // Output axis 1 has the size of input axis 1 by chance only.
        let (mut p, y) = reshaped("2 3 6", &[6, 0, 2]);
        let x = p.graph.inputs()[0];
        assert_eq!(p.refit(y, &[(x, 1, &[0, 1]), (y, 0, &[0, 1, 3, 4])]), Ok(vec![(1, vec![(0, 4), (1, 3)])]));
    }

    #[test]
    fn a_target_has_one_open_size_after_a_cut() {
        // SAM: q, k and v as [3, batch * heads, tokens, -1], of which whole heads go.
        let mut p = Probe::new(17);
        let x = p.input("x", "3 b 4 16 8");
        let like = p.input("like", "b");
        let images = p.op("Shape", &[like], vec![]);
        let (three, heads, rest) = (p.ints(&[3]), p.ints(&[4]), p.ints(&[16, -1]));
        let rows = p.op("Mul", &[images, heads], vec![]);
        let target = p.op("Concat", &[three, rows, rest], vec![int_attr("axis", 0)]);
        let y = p.op("Reshape", &[x, target], vec![]);
        assert_eq!(p.refit(y, &[(x, 2, &[0]), (y, 1, &[])]), Ok(vec![(1, vec![(1, -1), (3, 8)])]));
    }

    #[test]
    fn flatten_joins_both_sides() {
        let mut p = Probe::new(13);
        let x = p.input("x", "b 8 4 4");
        let y = p.op("Flatten", &[x], vec![]);
        assert_eq!(p.shape(y), "b 128");
        assert_eq!(p.axes(y), ["in0.0 = out0.0", "in0[1, 2, 3] ~ out0[1]"]);
        let z = p.op("Flatten", &[x], vec![int_attr("axis", -1)]);
        assert_eq!(p.shape(z), "32*b 4");
        let w = p.op("Flatten", &[x], vec![int_attr("axis", 4)]);
        assert_eq!(p.shape(w), "128*b 1");
    }

    #[test]
    fn gradients_have_the_input_shape() {
        let (mut p, y) = reshaped("b 197 192", &[0, 0, 3, 64]);
        assert_eq!(p.grad(y), Ok(vec!["Reshape".into()]), "one symbol: a constant target");
        let (mut p, y) = reshaped("b n 192", &[0, 0, 3, 64]);
        assert_eq!(p.grad(y), Ok(vec!["Shape".into(), "Reshape".into()]));
    }
}
