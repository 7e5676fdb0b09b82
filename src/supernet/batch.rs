//! Where the samples of a batch are in an operand.
//!
//! Examples: [B, N, 48] has them on axis 0; [N, B, 48] on axis 1; windows [B*nW, 49, 96] on axis 0 with the samples outermost;
//! a sequence-first [N*B, 48] on axis 0 with the samples innermost. The shape alone does not tell the last two apart, so the way
//! back to where the batch still had an axis of its own is followed. What cannot be told is refused.

use crate::graph::{Graph, NodeId, ValueId};
use crate::infer::{Dim, Facts};

/// How samples stand on an axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// The axis is the batch.
    Alone,
    /// Size B * k, all positions of a sample together.
    Outermost,
    /// Size k * B, samples next to each other.
    Innermost,
}

/// Steps back after which the search ends.
const STEPS_MAX: usize = 200;

/// The axis of `value` that holds the batch, and how; axes for which `is_gated` are not looked at.
pub(super) fn find(
    graph: &Graph,
    facts: &Facts,
    value: ValueId,
    batch: &Dim,
    is_gated: &dyn Fn(usize) -> bool,
) -> Result<(usize, Order), String> {
    let shape = facts.shape(value).unwrap_or(&[]);
    let free = || shape.iter().enumerate().filter(|(axis, _)| !is_gated(*axis));
    if let Some((axis, _)) = free().find(|(_, dim)| *dim == batch) {
        return Ok((axis, Order::Alone));
    }
    let merged = free().find(|(_, dim)| dim.exact_div(batch).is_some()).map(|(axis, _)| axis);
    let axis = merged.ok_or_else(|| format!("no axis of {shape:?} holds the batch {batch}"))?;
    let order = trace(graph, facts, value, axis, batch);
    Ok((axis, order.ok_or_else(|| format!("how axis {axis} of {shape:?} holds the batch {batch} cannot be told"))?))
}

/// Follows an axis back to where the batch is an axis of its own.
fn trace(graph: &Graph, facts: &Facts, value: ValueId, axis: usize, batch: &Dim) -> Option<Order> {
    let (mut value, mut axis) = (value, axis);
    for _ in 0..STEPS_MAX {
        let (node, _) = graph.value(value).producer()?;
        let shape = facts.shape(value)?;
        match step(graph, facts, node, shape, axis, batch)? {
            Step::Found(order) => return Some(order),
            Step::On(v, a) => (value, axis) = (v, a),
        }
    }
    None
}

enum Step {
    Found(Order),
    On(ValueId, usize),
}

fn step(graph: &Graph, facts: &Facts, id: NodeId, shape: &[Dim], axis: usize, batch: &Dim) -> Option<Step> {
    let node = graph.node(id);
    let first = node.input(0)?;
    if let Some(perm) = node.attr_ints("perm") {
        return Some(Step::On(first, usize::try_from(*perm.get(axis)?).ok()?));
    }
    // Inputs that have the axis as it is: elementwise operators, normalizations, products.
    let same = |v: &ValueId| facts.shape(*v).is_some_and(|s| s.len() == shape.len() && s.get(axis) == Some(&shape[axis]));
    if let Some(v) = node.inputs().iter().flatten().find(|v| same(v) && !graph.is_constant(**v)) {
        return Some(Step::On(*v, axis));
    }
    regrouped(facts.shape(first)?, &shape[..axis], &shape[axis], batch).map(|found| match found {
        Regrouped::Same(a) => Step::On(first, a),
        Regrouped::Merged(order) => Step::Found(order),
    })
}

enum Regrouped {
    /// The axis of the input that it is.
    Same(usize),
    /// It was made of several, the batch among them.
    Merged(Order),
}

/// Which axes of `input` the axis of size `size` behind `front` is made of, row-major.
fn regrouped(input: &[Dim], front: &[Dim], size: &Dim, batch: &Dim) -> Option<Regrouped> {
    let one = Dim::from(1i64);
    let before: Dim = front.iter().product();
    let start = (0..=input.len()).find(|i| input[..*i].iter().product::<Dim>() == before)?;
    let Some(end) = (start + 1..=input.len()).find(|j| input[start..*j].iter().product::<Dim>() == *size) else {
        // It ends inside an axis, as in [N, B, H*E] to [N, B*H, E].
        let leading = input[start..].iter().find(|d| **d != one)?;
        return (leading == batch).then_some(Regrouped::Merged(Order::Outermost));
    };
    let large: Vec<usize> = (start..end).filter(|a| input[*a] != one).collect();
    if let [only] = large[..] {
        return Some(Regrouped::Same(only));
    }
    match large.iter().position(|a| input[*a] == *batch)? {
        0 => Some(Regrouped::Merged(Order::Outermost)),
        at if at + 1 == large.len() => Some(Regrouped::Merged(Order::Innermost)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merged_axes_tell_where_the_samples_are() {
        let (b, n) = (Dim::named("b"), Dim::from(7i64));
        let order = |input: &[Dim], front: &[Dim], size: &Dim| match regrouped(input, front, size, &b) {
            Some(Regrouped::Merged(order)) => Some(order),
            _ => None,
        };
        let both = &b * &n;
        let d = Dim::from(48i64);
        assert_eq!(order(&[b.clone(), n.clone(), d.clone()], &[], &both), Some(Order::Outermost));
        assert_eq!(order(&[n.clone(), b.clone(), d.clone()], &[], &both), Some(Order::Innermost));
        assert_eq!(order(&[d.clone(), n.clone(), b.clone()], std::slice::from_ref(&d), &both), Some(Order::Innermost));
        let wide = [n.clone(), b.clone(), d.clone()];
        assert_eq!(order(&wide, std::slice::from_ref(&n), &(&b * &Dim::from(3i64))), Some(Order::Outermost));
        // Samples between others are not understood.
        assert_eq!(order(&[n.clone(), b.clone(), n.clone()], &[], &(&both * &n)), None);
    }
}
