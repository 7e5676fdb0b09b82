//! Reductions over axes (ReduceSum and its like, ArgMax), running sums, and the k greatest.
//!
//! Axes come as an attribute (ReduceSum before opset 13, the others before 18) or as an input; none at all means every axis,
//! or no axis with `noop_with_empty_axes`. Shape: the input's, the reduced axes being 1 or, with `keepdims = 0`, gone.
//! A sum over an axis is a sink: a unit that is zero adds nothing. Means, extremes and products are barriers there.

use crate::autodiff::GradCx;
use crate::axes::relation::{AxesCx, Relations, Slot};
use crate::graph::{AttrValue, DType, Node, Tensor, ValueId, build::attr};
use crate::infer::{Dim, Fact, InferCx, InferError, normalize_axis};
use crate::ops::elementwise::contents;
use crate::ops::norm::added_output;
use crate::ops::{Axes, Cost, Grad, OpRule, Refit};

/// The records of this family.
pub static RULES: &[OpRule] = &[
    reduction("ReduceSum", infer_reduce, sum_axes, Grad::Rule(sum_grad)),
    reduction("ReduceSumSquare", infer_reduce, sum_axes, Grad::Rule(sum_square_grad)),
    reduction("ReduceL1", infer_reduce, sum_axes, Grad::Rule(l1_grad)),
    reduction("ReduceL2", infer_reduce, sum_axes, Grad::Rule(l2_grad)),
    reduction("ReduceMean", infer_reduce, barrier_axes, Grad::Rule(mean_grad)),
    reduction("ReduceMax", infer_reduce, barrier_axes, Grad::Rule(extreme_grad)),
    reduction("ReduceMin", infer_reduce, barrier_axes, Grad::Rule(extreme_grad)),
    reduction("ReduceProd", infer_reduce, barrier_axes, Grad::Rule(prod_grad)),
    reduction("ReduceLogSumExp", infer_reduce, barrier_axes, Grad::Rule(log_sum_exp_grad)),
    reduction("ArgMax", infer_arg, barrier_axes, Grad::Zero),
    reduction("ArgMin", infer_arg, barrier_axes, Grad::Zero),
    reduction("CumSum", infer_cumsum, cumsum_axes, Grad::Rule(cumsum_grad)),
    reduction("TopK", infer_topk, topk_axes, Grad::Rule(topk_grad)),
];

const fn reduction(
    name: &'static str,
    infer: fn(&InferCx<'_>) -> Result<Vec<Fact>, InferError>,
    axes: fn(&AxesCx<'_>) -> Relations,
    grad: Grad,
) -> OpRule {
    OpRule { name, domain: "", opsets: (11, 24), infer, axes: Axes::Rule(axes), grad, cost: Cost::Free, refit: Refit::Nothing }
}

/// The axes that a node lists; `None` where they are computed at run time. `input` is the content of input 1.
fn listed(node: &Node, input: Option<Vec<i64>>) -> Option<Vec<i64>> {
    if matches!(node.op(), "ArgMax" | "ArgMin") {
        return Some(vec![node.attr_int("axis").unwrap_or(0)]);
    }
    match (node.attr_ints("axes"), node.input(1)) {
        (Some(axes), _) => Some(axes.to_vec()),
        (None, Some(_)) => input,
        (None, None) => Some(Vec::new()),
    }
}

/// The axes that a node reduces, in ascending order; `None` where they are computed at run time or outside of the rank.
fn reduced(node: &Node, input: Option<Vec<i64>>, rank: usize) -> Option<Vec<usize>> {
    let listed = listed(node, input)?;
    if listed.is_empty() {
        return Some(if is_noop(node) { Vec::new() } else { (0..rank).collect() });
    }
    let mut axes = listed.into_iter().map(|axis| normalize_axis(axis, rank)).collect::<Option<Vec<_>>>()?;
    axes.sort_unstable();
    axes.dedup();
    Some(axes)
}

fn is_noop(node: &Node) -> bool {
    node.attr_int("noop_with_empty_axes").unwrap_or(0) != 0
}

fn keeps(node: &Node) -> bool {
    node.attr_int("keepdims").unwrap_or(1) != 0
}

/// What is left of a shape, and the axes that were reduced.
struct Left {
    shape: Vec<Dim>,
    axes: Vec<usize>,
}

/// The reduced shape and the reduced axes, where both are known.
fn infer_shape(cx: &InferCx<'_>) -> Result<Option<Left>, InferError> {
    let Some(shape) = cx.shape(0) else { return Ok(None) };
    let input = cx.numbers(1);
    let Some(axes) = reduced(cx.node, input.clone(), shape.len()) else {
        return match listed(cx.node, input) {
            Some(listed) => Err(cx.error(format!("axes {listed:?} lie outside of rank {}", shape.len()))),
            None => Ok(None),
        };
    };
    let keep = keeps(cx.node);
    let out = shape.iter().enumerate().filter_map(|(axis, size)| match axes.contains(&axis) {
        false => Some(size.clone()),
        true => keep.then(|| Dim::from(1i64)),
    });
    Ok(Some(Left { shape: out.collect(), axes }))
}

fn infer_reduce(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let dtype = cx.dtype(0);
    let Some(Left { shape, axes }) = infer_shape(cx)? else { return Ok(vec![Fact::new(dtype, None)]) };
    let known = reduce_ints(cx, &axes).and_then(|ints| contents::collect(ints, dtype?));
    Ok(vec![Fact::new(dtype, Some(shape)).with_known(known)])
}

/// Integer contents, reduced: products and sums of sizes.
fn reduce_ints(cx: &InferCx<'_>, axes: &[usize]) -> Option<Vec<contents::Scalar>> {
    type Step = fn(&Dim, &Dim) -> Option<Dim>;
    let step: Step = match cx.node.op() {
        "ReduceSum" => contents::add,
        "ReduceProd" => contents::mul,
        "ReduceMax" => contents::greater_of,
        "ReduceMin" => contents::smaller_of,
        _ => return None,
    };
    let (ints, shape) = (cx.ints(0)?, contents::sizes(cx.shape(0)?)?);
    let kept: Vec<usize> = shape.iter().enumerate().map(|(axis, n)| if axes.contains(&axis) { 1 } else { *n }).collect();
    let mut out: Vec<Option<Dim>> = vec![None; kept.iter().product()];
    for (value, place) in ints.iter().zip(contents::sources(&kept, &shape)?) {
        out[place] = Some(match &out[place] {
            Some(so_far) => step(so_far, value)?,
            None => value.clone(),
        });
    }
    out.into_iter().map(|v| v.map(contents::Scalar::Int)).collect()
}

fn infer_arg(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let shape = infer_shape(cx)?.map(|left| left.shape);
    Ok(vec![Fact::new(Some(DType::I64), shape)])
}

/// Relations of the axes that stay; the reduced ones are returned, or none where they are known only at run time.
fn kept_axes(cx: &AxesCx<'_>, relations: &mut Relations) -> Option<Vec<usize>> {
    let rank = cx.shape(Slot::In(0)).len();
    let Some(axes) = reduced(cx.node, cx.numbers(1), rank) else {
        for (slot, rank) in [(Slot::In(0), rank), (Slot::Out(0), cx.shape(Slot::Out(0)).len())] {
            (0..rank).for_each(|axis| relations.barrier((slot, axis), "which axes are reduced is known only at run time"));
        }
        return None;
    };
    let keep = keeps(cx.node);
    for axis in (0..rank).filter(|axis| !axes.contains(axis)) {
        let gone = if keep { 0 } else { axes.iter().filter(|a| **a < axis).count() };
        relations.same((Slot::In(0), axis), (Slot::Out(0), axis - gone));
    }
    Some(axes)
}

/// `b |n| -> b`: a sink.
fn sum_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    for axis in kept_axes(cx, &mut relations).unwrap_or_default() {
        relations.sum((Slot::In(0), axis));
    }
    relations
}

fn barrier_axes(cx: &AxesCx<'_>) -> Relations {
    let reason = match cx.node.op() {
        "ReduceMean" => "the mean over this axis changes with its size",
        "ReduceProd" => "a product over this axis has no unit that adds nothing",
        "ReduceLogSumExp" => "exponentials are summed over this axis, to which a zero adds one",
        "ReduceMax" => "the maximum over this axis may be a removed unit",
        "ReduceMin" => "the minimum over this axis may be a removed unit",
        _ => "positions on this axis are an output",
    };
    let mut relations = Relations::default();
    for axis in kept_axes(cx, &mut relations).unwrap_or_default() {
        relations.barrier((Slot::In(0), axis), reason);
    }
    relations
}

/// What a gradient rule needs: the input, the axes, and `dy` and `y` with the reduced axes put back as 1.
struct Reduced {
    x: ValueId,
    y: ValueId,
    dy: ValueId,
    axes: Vec<usize>,
}

fn reduced_values(cx: &mut GradCx<'_>) -> Result<Reduced, String> {
    let (x, dy, y) = (cx.input(0), cx.dy()?, cx.output(0));
    let rank = cx.shape(x).len();
    let input = cx.node().input(1).and_then(|v| cx.numbers(v));
    let axes = reduced(cx.node(), input, rank).filter(|_| rank > 0);
    let axes = axes.ok_or("the reduced axes are known only at run time")?;
    if keeps(cx.node()) || axes.is_empty() {
        return Ok(Reduced { x, y, dy, axes });
    }
    let gone: Vec<i64> = axes.iter().map(|axis| *axis as i64).collect();
    let (dy, y) = (cx.b.unsqueeze(dy, &gone), cx.b.unsqueeze(y, &gone));
    Ok(Reduced { x, y, dy, axes })
}

/// The values of a rule that is not linear; without any axis to reduce, engines disagree on what the operator does.
fn reduced_values_of_some(cx: &mut GradCx<'_>) -> Result<Reduced, String> {
    let values = reduced_values(cx)?;
    if values.axes.is_empty() { Err("reduced over no axis".to_string()) } else { Ok(values) }
}

/// Gives `grad`, stretched to the shape of the input.
fn give_stretched(cx: &mut GradCx<'_>, grad: ValueId, x: ValueId) -> Result<(), String> {
    let shape = cx.b.shape_of(x);
    let dx = cx.b.op("Expand", &[grad, shape], vec![]);
    cx.give(0, dx);
    Ok(())
}

fn give_product(cx: &mut GradCx<'_>, a: ValueId, b: ValueId) -> Result<(), String> {
    let dx = cx.b.mul(a, b);
    cx.give(0, dx);
    Ok(())
}

/// `v * groups / n`, `n` being the number of elements of the forward value `x` along `axes`.
///
/// Sizes that are known only at run time are read from the shape of `x`; `v` and `x` have the same element type.
pub(crate) fn over_count(cx: &mut GradCx<'_>, v: ValueId, x: ValueId, axes: &[usize], groups: i64) -> ValueId {
    let shape = cx.shape(x);
    let known: i64 = axes.iter().filter_map(|axis| shape[*axis].known()).product();
    let factor = cx.scalar((groups as f64 / known as f64) as f32, x);
    let mut share = cx.b.mul(v, factor);
    let open: Vec<i64> = axes.iter().filter(|axis| shape[**axis].known().is_none()).map(|axis| *axis as i64).collect();
    if open.is_empty() {
        return share;
    }
    let sizes = cx.b.shape_of(x);
    for axis in open {
        let index = cx.b.constant(Tensor::i64_scalar(axis));
        let size = cx.b.gather(sizes, index, 0);
        let size = cx.b.cast(size, cx.dtype(x));
        share = cx.b.div(share, size);
    }
    share
}

/// `dx = dy`
fn sum_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let r = reduced_values(cx)?;
    give_stretched(cx, r.dy, r.x)
}

/// `dx = dy / n`
fn mean_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let r = reduced_values(cx)?;
    let share = over_count(cx, r.dy, r.x, &r.axes, 1);
    give_stretched(cx, share, r.x)
}

/// `dx = 2 * dy * x`
fn sum_square_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let r = reduced_values_of_some(cx)?;
    let two = cx.scalar(2.0, r.x);
    let twice = cx.b.mul(r.dy, two);
    give_product(cx, r.x, twice)
}

/// `dx = dy * sign(x)`
fn l1_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let r = reduced_values_of_some(cx)?;
    let sign = cx.b.op("Sign", &[r.x], vec![]);
    give_product(cx, sign, r.dy)
}

/// `dx = x * (dy / y)`; not defined where all elements are zero.
fn l2_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let r = reduced_values_of_some(cx)?;
    let share = cx.b.div(r.dy, r.y);
    give_product(cx, r.x, share)
}

/// `dx = m * dy / sum(m)` with `m = (x = y)`: equal extremes share the gradient.
fn extreme_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let r = reduced_values(cx)?;
    let at_extreme = cx.b.op("Equal", &[r.x, r.y], vec![]);
    let mask = cx.b.cast(at_extreme, cx.dtype(r.x));
    let axes: Vec<i64> = r.axes.iter().map(|axis| *axis as i64).collect();
    let count = if axes.is_empty() { mask } else { cx.b.reduce_sum(mask, &axes, true) };
    let share = cx.b.div(r.dy, count);
    give_product(cx, mask, share)
}

/// `dx = dy * y / x`; no element may be zero.
fn prod_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let r = reduced_values(cx)?;
    let product = cx.b.mul(r.dy, r.y);
    let dx = cx.b.div(product, r.x);
    cx.give(0, dx);
    Ok(())
}

/// `dx = dy * exp(x - y)`
fn log_sum_exp_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let r = reduced_values_of_some(cx)?;
    let difference = cx.b.sub(r.x, r.y);
    let share = cx.b.op("Exp", &[difference], vec![]);
    give_product(cx, share, r.dy)
}

fn infer_cumsum(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    Ok(vec![Fact::new(cx.dtype(0), cx.shape(0).map(<[_]>::to_vec))])
}

/// All axes where `axis` is not known, which is none of them.
fn one_or_all(axis: Option<i64>, rank: usize) -> Vec<usize> {
    match axis.and_then(|axis| normalize_axis(axis, rank)) {
        Some(axis) => vec![axis],
        None => (0..rank).collect(),
    }
}

fn cumsum_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    cx.parallel(&mut relations, 0, 0, &[]);
    let axis = cx.numbers(1).and_then(|v| v.first().copied());
    for axis in one_or_all(axis, cx.shape(Slot::In(0)).len()) {
        relations.barrier((Slot::In(0), axis), "a running sum along this axis");
    }
    relations
}

/// `dx` = the running sum of `dy` from the other end.
fn cumsum_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let (dy, axis) = (cx.dy()?, cx.input(1));
    let flag = |name: &str| cx.node().attr_int(name).unwrap_or(0);
    let attrs = vec![
        attr("exclusive", AttrValue::Int(flag("exclusive"))),
        attr("reverse", AttrValue::Int(i64::from(flag("reverse") == 0))),
    ];
    let dx = cx.b.op("CumSum", &[dy, axis], attrs);
    cx.give(0, dx);
    Ok(())
}

/// Outputs: the values, and their positions on the axis.
fn infer_topk(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let axis = cx.node.attr_int("axis").unwrap_or(-1);
    let shape = match cx.shape(0) {
        Some(shape) => {
            let axis = normalize_axis(axis, shape.len());
            let axis = axis.ok_or_else(|| cx.error(format!("axis lies outside of rank {}", shape.len())))?;
            let mut out = shape.to_vec();
            out[axis] = cx.ints(1).and_then(|k| k.first().cloned()).unwrap_or_else(|| cx.fresh("topk"));
            Some(out)
        }
        None => None,
    };
    Ok(vec![Fact::new(cx.dtype(0), shape.clone()), Fact::new(Some(DType::I64), shape)])
}

fn topk_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    let rank = cx.shape(Slot::In(0)).len();
    let chosen = one_or_all(Some(cx.node.attr_int("axis").unwrap_or(-1)), rank);
    for out in (0..2).filter(|out| cx.has(Slot::Out(*out))) {
        cx.parallel(&mut relations, 0, out, &chosen);
        chosen.iter().for_each(|axis| relations.barrier((Slot::Out(out), *axis), "the order along this axis depends on data"));
    }
    chosen.iter().for_each(|axis| relations.barrier((Slot::In(0), *axis), "the order along this axis depends on data"));
    relations
}

/// `dx` = zeros, `dy` put at the positions that were chosen.
fn topk_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let (dy, x) = (cx.dy()?, cx.input(0));
    let at = added_output(cx, 1)?;
    let shape = cx.b.shape_of(x);
    let zero = cx.scalar(0.0, x);
    let zeros = cx.b.op("Expand", &[zero, shape], vec![]);
    let axis = attr("axis", AttrValue::Int(cx.node().attr_int("axis").unwrap_or(-1)));
    let dx = cx.b.op("ScatterElements", &[zeros, at, dy], vec![axis]);
    cx.give(0, dx);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::infer::Known;
    use crate::ops::elementwise::tests::OneNode;

    fn ints(values: &[i64]) -> AttrValue {
        AttrValue::Ints(values.to_vec())
    }

    const DROP: (&str, AttrValue) = ("keepdims", AttrValue::Int(0));

    #[test]
    fn shapes_and_relations_follow_the_axes() {
        let case = |op: &str, opset: i64, attrs: &[(&str, AttrValue)], axes: Option<&[i64]>| {
            let node = OneNode::new(opset).floats("b 197 n");
            let node = if let Some(axes) = axes { node.constant(Tensor::i64s(axes)) } else { node };
            let done = node.run(op, attrs, 1).expect("the axes fit");
            (done.shape(0), done.links())
        };
        let expect = |shape: &str, links: &str| (shape.to_string(), links.to_string());
        assert_eq!(case("ReduceSum", 17, &[], Some(&[-1])), expect("b 197 1", "in0.0=out0.0 in0.1=out0.1 in0.2+"));
        assert_eq!(case("ReduceSum", 17, &[DROP], Some(&[1])), expect("b n", "in0.0=out0.0 in0.2=out0.1 in0.1+"));
        assert_eq!(case("ReduceL2", 17, &[("axes", ints(&[2, 0]))], None), expect("1 197 1", "in0.1=out0.1 in0.0+ in0.2+"));
        assert_eq!(
            case("ReduceMean", 17, &[("axes", ints(&[-2])), DROP], None),
            expect("b n", "in0.0=out0.0 in0.2=out0.1 in0.1!")
        );
        assert_eq!(case("ReduceMax", 18, &[DROP], None), expect("", "in0.0! in0.1! in0.2!"));
        let noop = ("noop_with_empty_axes", AttrValue::Int(1));
        assert_eq!(case("ReduceSum", 18, &[noop], None), expect("b 197 n", "in0.0=out0.0 in0.1=out0.1 in0.2=out0.2"));
        assert_eq!(
            case("ArgMax", 17, &[("axis", AttrValue::Int(-1)), DROP], None),
            expect("b 197", "in0.0=out0.0 in0.1=out0.1 in0.2!")
        );
        let all = "in0.0=out0.0 in0.1=out0.1 in0.2=out0.2 in0.0!";
        assert_eq!(case("CumSum", 17, &[], Some(&[0])), expect("b 197 n", all));
    }

    #[test]
    fn axes_computed_at_run_time_leave_nothing_known() {
        let node = OneNode::new(18).floats("b n").input(DType::I64, "1");
        let done = node.run("ReduceMean", &[], 1).expect("nothing contradicts");
        assert_eq!((done.fact(0).shape.clone(), done.links().as_str()), (None, "in0.0! in0.1!"));
        let wrong = OneNode::new(17).floats("b n").run("ReduceMean", &[("axes", ints(&[2]))], 1);
        assert_eq!(wrong.err().map(|e| e.what), Some("axes [2] lie outside of rank 2".to_string()));
    }

    #[test]
    fn products_of_sizes_are_known() {
        let sizes = Tensor { dims: vec![2, 3], ..Tensor::i64s(&[2, 3, 4, 5, 6, 7]) };
        let known = |op: &str, axes: &[i64]| {
            let node = OneNode::new(18).constant(sizes.clone()).constant(Tensor::i64s(axes));
            node.run(op, &[DROP], 1).expect("the axes fit").fact(0).known.clone()
        };
        let expect = |values: &[i64]| Some(Known::Ints(values.iter().map(|v| Dim::from(*v)).collect()));
        assert_eq!(known("ReduceProd", &[1]), expect(&[24, 210]));
        assert_eq!(known("ReduceProd", &[0, 1]), expect(&[5040]));
        assert_eq!(known("ReduceSum", &[0]), expect(&[7, 9, 11]));
        assert_eq!(known("ReduceMax", &[-1]), expect(&[4, 7]));
        assert_eq!(known("ReduceMin", &[-1]), expect(&[2, 5]));
    }

    #[test]
    fn top_k_has_k_places() {
        let done = OneNode::new(17).floats("b n").constant(Tensor::i64s(&[5])).run("TopK", &[], 2).expect("the axis fits");
        assert_eq!((done.shape(0).as_str(), done.fact(1).dtype), ("b 5", Some(DType::I64)));
        assert_eq!(done.links(), "in0.0=out0.0 out0.1! in0.0=out1.0 out1.1! in0.1!");
    }
}
