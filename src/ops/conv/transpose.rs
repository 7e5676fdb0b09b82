//! ConvTranspose (opset 1 to 24): the convolution that spreads each input position over a window.
//!
//! Shape: `x [B, C, in..]`, `w [C, M/g, k..]`, `b [M]` -> `[B, M, out..]` with `out = s(in-1) + output_padding + d(k-1) + 1 - pads`.
//! Example: `[B, 8, 7, 7]`, `w [8, 4, 2, 2]`, stride 2 -> `[B, 4, 14, 14]` contracts 8 and costs `B * 7 * 7 * 8 * 4 * 2 * 2` MACs.

use super::{
    Geometry, Padding, Window, bias_grad, correlate, group, grouped, parts, refit_group, relate_bias_and_kernel, relate_spatial,
};
use crate::autodiff::GradCx;
use crate::axes::relation::{AxesCx, Relations, Slot};
use crate::graph::Node;
use crate::infer::{Dim, Fact, InferCx, InferError};
use crate::ops::matmul::contradict;
use crate::ops::{Axes, Cost, CostCx, Grad, OpRule, Refit};
use crate::slice::refit::{RefitCx, RefitError};

/// The record.
pub(super) const RULE: OpRule = OpRule {
    name: "ConvTranspose",
    domain: "",
    opsets: (1, 24),
    infer: conv_transpose_infer,
    axes: Axes::Rule(conv_transpose_axes),
    grad: Grad::Rule(conv_transpose_grad),
    cost: Cost::Rule(conv_transpose_cost),
    refit: Refit::Rule(conv_transpose_refit),
};

/// Output size, and the positions taken off before and after, of a spatial axis of ConvTranspose.
fn transpose_axis(node: &Node, window: &Window, axis: usize, input: &Dim) -> (Dim, Option<(i64, i64)>) {
    let extra = node.attr_ints("output_padding").and_then(|p| p.get(axis)).copied().unwrap_or(0);
    let covered = &(&(&(input - &Dim::from(1i64)) * &window.stride(axis)) + &window.reach(axis)) + &Dim::from(extra);
    let asked = node.attr_ints("output_shape").and_then(|s| s.get(s.len().checked_sub(window.rank())? + axis)).copied();
    let (out, upper) = match (asked, &window.padding) {
        (Some(n), Padding::Same { upper: true }) => (Dim::from(n), true),
        (Some(n), _) => (Dim::from(n), false),
        (None, Padding::Same { upper }) => (input * &window.stride(axis), *upper),
        (None, Padding::Explicit(p)) => {
            return (&(&covered - &Dim::from(p[axis].0)) - &Dim::from(p[axis].1), Some(p[axis]));
        }
    };
    let total = (&covered - &out).known().map(|t| t.max(0));
    let split = |t: i64| if upper { (t / 2, t - t / 2) } else { (t - t / 2, t / 2) };
    (out, total.map(split))
}

fn conv_transpose_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let Some((x, w, window)) = parts(cx.node, cx.shape(0), cx.shape(1)) else { return Ok(vec![Fact::new(cx.dtype(0), None)]) };
    let window = window.map_err(|e| cx.error(e))?;
    if contradict(&x[1], &w[0]) {
        return Err(cx.error(format!("{} input channels, the weight takes {}", x[1], w[0])));
    }
    let mut out = vec![x[0].clone(), &w[1] * &Dim::from(group(cx.node))];
    out.extend((0..window.rank()).map(|axis| transpose_axis(cx.node, &window, axis, &x[axis + 2]).0));
    Ok(vec![Fact::new(cx.dtype(0), Some(out))])
}

/// One group: `b |c| .., |c| m .. -> b m ..`. Groups: channels are `(g, c/g)` and `(g, m/g)`, the group is parallel.
fn conv_transpose_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    let (x, out) = (Slot::In(0), Slot::Out(0));
    let Some((_, w, Ok(window))) = parts(cx.node, Some(cx.shape(x)), Some(cx.shape(Slot::In(1)))) else { return relations };
    let g = Dim::from(group(cx.node));
    relations.same((x, 0), (out, 0));
    if g.is(1) {
        relations.contract((x, 1), (Slot::In(1), 0));
        relations.same((Slot::In(1), 1), (out, 1));
    } else {
        let per_group = w[0].floor_div(&g);
        let (x_group, x_inner) = grouped(&mut relations, (x, 1), &g, &per_group);
        let (w_group, w_inner) = grouped(&mut relations, (Slot::In(1), 0), &g, &per_group);
        let (y_group, y_inner) = grouped(&mut relations, (out, 1), &g, &w[1]);
        relations.same(x_group, w_group);
        relations.same(w_group, y_group);
        if let (Some(a), Some(b)) = (x_inner, w_inner) {
            relations.contract(a, b);
        }
        if let Some(inner) = y_inner {
            relations.same((Slot::In(1), 1), inner);
        }
    }
    relate_bias_and_kernel(cx, &mut relations, &window, Slot::In(1), Some(Slot::In(2)));
    let whole = |axis: usize| {
        let size = &cx.shape(x)[axis + 2];
        window.is_pointwise(axis) && transpose_axis(cx.node, &window, axis, size).0 == *size
    };
    relate_spatial(&mut relations, whole, window.rank(), "convolution mixes positions");
    relations
}

/// `elements of the input * M/g * kernel positions`
fn conv_transpose_cost(cx: &CostCx<'_>) -> Option<Dim> {
    let (x, w) = (cx.inputs.first().copied().flatten()?, cx.inputs.get(1).copied().flatten()?);
    Some(&x.iter().product::<Dim>() * &w.get(1..)?.iter().product::<Dim>())
}

/// Groups that remain = output channels that remain / those of one group.
fn conv_transpose_refit(cx: &mut RefitCx<'_>) -> Result<(), RefitError> {
    refit_group(cx, 1, cx.kept_output(0, 1).map(<[usize]>::len), cx.old_output(0).get(1).and_then(Dim::size))
}

/// `dX = Conv(dY, W)` with the same window; `dW` as for Conv, input and output having changed places.
fn conv_transpose_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let dy = cx.dy()?;
    let (x, w) = (cx.input(0), cx.input(1));
    let (shape_x, shape_w) = (cx.shape(x), cx.shape(w));
    let Some((_, _, window)) = parts(cx.node(), Some(shape_x), Some(shape_w)) else { return Err("no shapes".to_string()) };
    let window = window?;
    let rank = window.rank();
    bias_grad(cx, dy, rank);
    let pads: Option<Vec<_>> = (0..rank).map(|a| transpose_axis(cx.node(), &window, a, &shape_x[a + 2]).1).collect();
    let pads = pads.ok_or("the padding depends on sizes that are not known")?;
    let extra = cx.node().attr_ints("output_padding").unwrap_or(&[]);
    if extra.iter().zip(&window.strides).any(|(e, s)| e >= s) {
        return Err("an output padding of a whole stride".to_string());
    }
    let geometry = Geometry { strides: window.strides, dilations: window.dilations, pads, group: group(cx.node()) };
    if cx.wants(0) {
        let dx = cx.b.op("Conv", &[dy, w], geometry.attrs());
        cx.give(0, dx);
    }
    if cx.wants(1) {
        let dw = correlate(cx, (dy, x), &geometry, shape_w)?;
        cx.give(1, dw);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::graph::build::attr;
    use crate::graph::{Attr, AttrValue};
    use crate::ops::matmul::one_node::{graph, ints, links, macs, refit, shapes};
    use bytes::Bytes;

    fn strides(values: &[i64]) -> Attr {
        attr("strides", AttrValue::Ints(values.to_vec()))
    }

    #[test]
    fn output_sizes_spread_the_input() {
        let g = graph("ConvTranspose", 17, &["b 8 7 7", "8 4 2 2"], vec![strides(&[2, 2])], 1);
        assert_eq!(shapes(&g), Ok(vec!["b 4 14 14".into()]));
        assert_eq!(macs(&g), (7 * 7 * 8 * 4 * 4).to_string() + "*b");
        let same = vec![attr("auto_pad", AttrValue::Str(Bytes::from_static(b"SAME_UPPER"))), strides(&[2, 2])];
        assert_eq!(shapes(&graph("ConvTranspose", 17, &["b 8 7 h", "8 4 3 3"], same, 1)), Ok(vec!["b 4 14 2*h".into()]));
        assert!(shapes(&graph("ConvTranspose", 17, &["b 7 7 7", "8 4 2 2"], vec![], 1)).is_err());
    }

    #[test]
    fn channels_are_contracted_or_parallel() {
        let g = graph("ConvTranspose", 17, &["b 8 7", "8 4 1", "4"], vec![], 1);
        assert_eq!(links(&g), ["in0.0=out0.0", "in0.1*in1.0", "in1.1=out0.1", "in2.0=out0.1", "in0.2=out0.2"]);
        let g = graph("ConvTranspose", 17, &["b 8 7", "8 1 2"], ints(&[("group", 8)]), 1);
        assert_eq!(links(&g), ["in0.0=out0.0", "in0.1=in1.0", "in1.0=out0.1", "!in1.2", "!in0.2", "!out0.2"]);
    }

    #[test]
    fn an_uncut_node_keeps_its_groups() {
        let mut g = graph("ConvTranspose", 17, &["b 8 7", "8 1 2"], ints(&[("group", 8)]), 1);
        assert_eq!(refit(&mut g, &[]), Ok(vec![]));
        assert_eq!(g.node(g.order()[0]).attr_int("group"), Some(8));
    }
}
