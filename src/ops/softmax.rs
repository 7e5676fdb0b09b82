//! Softmax (opset 1 to 24) and LogSoftmax.
//!
//! Shape: output as input. From opset 13 on one axis is normalized (default -1); before, everything behind `axis`
//! (default 1) is flattened and normalized together.

use super::{Axes, Cost, Grad, OpRule, Refit};
use crate::autodiff::GradCx;
use crate::axes::relation::{AxesCx, Relations, Slot};
use crate::graph::Node;
use crate::infer::{Fact, InferCx, InferError, normalize_axis};

/// The records of this family.
pub static RULES: &[OpRule] = &[
    OpRule {
        name: "Softmax",
        domain: "",
        opsets: (1, 24),
        infer: same_fact,
        axes: Axes::Rule(softmax_axes),
        grad: Grad::Rule(softmax_grad),
        cost: Cost::Free,
        refit: Refit::Nothing,
    },
    OpRule {
        name: "LogSoftmax",
        domain: "",
        opsets: (1, 24),
        infer: same_fact,
        axes: Axes::Rule(softmax_axes),
        grad: Grad::Rule(log_softmax_grad),
        cost: Cost::Free,
        refit: Refit::Nothing,
    },
];

pub(super) fn same_fact(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    Ok(vec![Fact::new(cx.dtype(0), cx.shape(0).map(<[_]>::to_vec))])
}

/// Axes that are normalized together.
pub(super) fn normalized(node: &Node, opset: i64, rank: usize) -> Vec<usize> {
    let default = if opset >= 13 { -1 } else { 1 };
    let Some(axis) = normalize_axis(node.attr_int("axis").unwrap_or(default), rank) else { return (0..rank).collect() };
    if opset >= 13 { vec![axis] } else { (axis..rank).collect() }
}

/// `b n -> b n`, the normalized axes being barriers.
fn softmax_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    cx.parallel(&mut relations, 0, 0, &[]);
    for axis in normalized(cx.node, cx.opset, cx.shape(Slot::In(0)).len()) {
        relations.barrier((Slot::In(0), axis), "softmax is normalized over this axis");
    }
    relations
}

/// `dx = y * (dy - sum(dy * y))`
fn softmax_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let (dy, y) = (cx.dy()?, cx.output(0));
    let axes = grad_axes(cx);
    let product = cx.b.mul(dy, y);
    let sum = cx.b.reduce_sum(product, &axes, true);
    let centred = cx.b.sub(dy, sum);
    let dx = cx.b.mul(centred, y);
    cx.give(0, dx);
    Ok(())
}

/// `dx = dy - exp(y) * sum(dy)`
fn log_softmax_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let (dy, y) = (cx.dy()?, cx.output(0));
    let axes = grad_axes(cx);
    let sum = cx.b.reduce_sum(dy, &axes, true);
    let p = cx.b.op("Exp", &[y], vec![]);
    let share = cx.b.mul(p, sum);
    let dx = cx.b.sub(dy, share);
    cx.give(0, dx);
    Ok(())
}

fn grad_axes(cx: &GradCx<'_>) -> Vec<i64> {
    let rank = cx.shape(cx.input(0)).len();
    normalized(cx.node(), cx.opset(), rank).into_iter().map(|a| a as i64).collect()
}

#[cfg(test)]
mod tests {
    use crate::graph::AttrValue;
    use crate::ops::elementwise::tests::OneNode;

    #[test]
    fn the_opset_says_what_is_normalized() {
        let same = "in0.0=out0.0 in0.1=out0.1 in0.2=out0.2";
        let axis = |v| ("axis", AttrValue::Int(v));
        for (opset, attrs, barriers) in
            [(17, vec![], "in0.2!"), (17, vec![axis(1)], "in0.1!"), (11, vec![], "in0.1! in0.2!"), (11, vec![axis(-1)], "in0.2!")]
        {
            let done = OneNode::new(opset).floats("b m n").run("Softmax", &attrs, 1).expect("no shape to fit");
            assert_eq!(done.shape(0), "b m n");
            assert_eq!(done.links(), format!("{same} {barriers}"), "opset {opset}, {attrs:?}");
        }
    }
}
