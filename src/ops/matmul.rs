//! MatMul (opset 1 to 24) and Gemm (opset 7 to 24): products of matrices.
//!
//! Shape, MatMul: `[..a, M, K] x [..b, K, N] -> [..max(a, b), M, N]`; a 1-D operand is a row (left) or a column (right) whose
//! axis of size 1 is taken out of the output. Gemm: `alpha * A' B' + beta * C` with `A'` of `[M, K]`, `B'` of `[K, N]`, each
//! stored transposed where its attribute says so, and `C` broadcast to `[M, N]`.
//! Example: `[B, 197, 192] x [192, 768]` contracts 192, keeps 197 parallel, and costs `B * 197 * 192 * 768` MACs.

use super::{Axes, Cost, CostCx, Grad, OpRule, Refit};
use crate::autodiff::GradCx;
use crate::axes::relation::{At, AxesCx, Relations, Slot};
use crate::graph::build::attr;
use crate::graph::{AttrValue, Node, ValueId};
use crate::infer::{Dim, Fact, InferCx, InferError};

/// The records of this family.
pub static RULES: &[OpRule] = &[
    OpRule {
        name: "MatMul",
        domain: "",
        opsets: (1, 24),
        infer: matmul_infer,
        axes: Axes::Rule(matmul_axes),
        grad: Grad::Rule(matmul_grad),
        cost: Cost::Rule(matmul_cost),
        refit: Refit::Nothing,
    },
    OpRule {
        name: "Gemm",
        domain: "",
        opsets: (7, 24),
        infer: gemm_infer,
        axes: Axes::Rule(gemm_axes),
        grad: Grad::Rule(gemm_grad),
        cost: Cost::Rule(gemm_cost),
        refit: Refit::Nothing,
    },
];

/// The size to which two axes are broadcast together; `None` where they contradict.
pub(super) fn broadcast_dim(a: &Dim, b: &Dim) -> Option<Dim> {
    match (a.known(), b.known()) {
        _ if a == b => Some(a.clone()),
        (Some(1), _) => Some(b.clone()),
        (_, Some(1)) => Some(a.clone()),
        (Some(_), Some(_)) => None,
        (Some(_), None) => Some(a.clone()),
        (None, Some(_)) => Some(b.clone()),
        (None, None) => Some(a.max(b)),
    }
}

/// Whether two sizes are numbers and differ.
pub(super) fn contradict(a: &Dim, b: &Dim) -> bool {
    matches!((a.known(), b.known()), (Some(a), Some(b)) if a != b)
}

/// Batch axes, rows and columns of an operand: everything, `M` or none, `K` or none.
fn split(shape: &[Dim]) -> (&[Dim], &[Dim]) {
    shape.split_at(shape.len().saturating_sub(2))
}

pub(super) fn matmul_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    Ok(vec![Fact::new(cx.dtype(0), product_shape(cx, 0, 1)?)])
}

/// Shape of the product of the operands at two slots; `None` where a rank is unknown.
pub(super) fn product_shape(cx: &InferCx<'_>, a: usize, b: usize) -> Result<Option<Vec<Dim>>, InferError> {
    let (Some(a), Some(b)) = (cx.shape(a), cx.shape(b)) else { return Ok(None) };
    shape_of_product(a, b).map(Some).map_err(|e| cx.error(e))
}

/// Shape of the product of two shapes.
pub(super) fn shape_of_product(a: &[Dim], b: &[Dim]) -> Result<Vec<Dim>, String> {
    if a.is_empty() || b.is_empty() {
        return Err("a scalar operand".to_string());
    }
    let ((batch_a, last_a), (batch_b, last_b)) = (split(a), split(b));
    let (k_a, k_b) = (&last_a[last_a.len() - 1], &last_b[0]);
    if contradict(k_a, k_b) {
        return Err(format!("inner sizes differ: {k_a} of the first operand, {k_b} of the second"));
    }
    let rank = batch_a.len().max(batch_b.len());
    let mut out = Vec::with_capacity(rank + 2);
    for axis in 0..rank {
        let at = |batch: &[Dim]| (axis + batch.len()).checked_sub(rank).map_or(Dim::from(1i64), |i| batch[i].clone());
        let (x, y) = (at(batch_a), at(batch_b));
        out.push(broadcast_dim(&x, &y).ok_or_else(|| format!("batch sizes {x} and {y} do not broadcast"))?);
    }
    out.extend(last_a[..last_a.len() - 1].iter().cloned());
    out.extend(last_b[1..].iter().cloned());
    Ok(out)
}

pub(super) fn matmul_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    relate_product(cx, &mut relations, 0, 1);
    relations
}

/// `..b m |k|, ..b |k| n -> ..b m n` for the operands at two slots.
pub(super) fn relate_product(cx: &AxesCx<'_>, relations: &mut Relations, left: usize, right: usize) {
    let order = |slot: usize| (0..cx.shape(Slot::In(slot)).len()).collect::<Vec<_>>();
    relate_ordered_product(cx, relations, [(left, &order(left)), (right, &order(right))]);
}

/// The same for operands whose axes are stored in another order: axis i of an operand of the product is axis `order[i]` of the input.
pub(super) fn relate_ordered_product(cx: &AxesCx<'_>, relations: &mut Relations, operands: [(usize, &[usize]); 2]) {
    let out = cx.shape(Slot::Out(0));
    let [(left, a), (right, b)] = operands.map(|(slot, order)| (Slot::In(slot), order));
    if a.is_empty() || b.is_empty() {
        return;
    }
    let (rows, columns) = (usize::from(a.len() > 1), usize::from(b.len() > 1));
    let batch = out.len() - rows - columns;
    for (slot, order) in [(left, a), (right, b)] {
        let own = order.len().saturating_sub(2);
        for (axis, stored) in order.iter().enumerate().take(own) {
            relate_broadcast(relations, ((slot, *stored), &cx.shape(slot)[*stored]), batch - own + axis, out);
        }
    }
    if rows == 1 {
        relations.same((left, a[a.len() - 2]), (Slot::Out(0), batch));
    }
    if columns == 1 {
        relations.same((right, b[b.len() - 1]), (Slot::Out(0), batch + rows));
    }
    relations.contract((left, a[a.len() - 1]), (right, b[b.len().saturating_sub(2)]));
}

/// Relates an axis of an input to the axis of output 0 that it is broadcast to.
fn relate_broadcast(relations: &mut Relations, (at, size): (At, &Dim), axis: usize, out: &[Dim]) {
    if *size == out[axis] {
        relations.same(at, (Slot::Out(0), axis));
    } else if !size.is(1) {
        relations.barrier(at, "broadcast between sizes that are not known to be equal");
        relations.barrier((Slot::Out(0), axis), "broadcast between sizes that are not known to be equal");
    }
}

/// `elements of the output * K`
pub(super) fn matmul_cost(cx: &CostCx<'_>) -> Option<Dim> {
    let (input, out) = (cx.inputs.first().copied().flatten()?, cx.outputs.first().copied().flatten()?);
    Some(&out.iter().product::<Dim>() * input.last()?)
}

/// `dA = dY * B^T`, `dB = A^T * dY`, each summed over the batch axes along which its operand was broadcast.
fn matmul_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let dy = cx.dy()?;
    let (a, b) = (cx.input(0), cx.input(1));
    let (shape_a, shape_b) = (cx.shape(a), cx.shape(b));
    if shape_a.is_empty() || shape_b.is_empty() {
        return Err("the rank of an operand is not known".to_string());
    }
    if shape_a.len() >= 2 && shape_b.len() == 2 {
        return weight_grad(cx, dy);
    }
    // 1-D operands become a row or a column, and the gradient gets the axis back that the product dropped.
    let (mut a2, mut b2, mut dy2) = (a, b, dy);
    let (mut full_a, mut full_b) = (shape_a.to_vec(), shape_b.to_vec());
    let mut out = cx.shape(cx.output(0)).to_vec();
    if full_b.len() == 1 {
        b2 = cx.b.unsqueeze(b, &[1]);
        dy2 = cx.b.unsqueeze(dy2, &[out.len() as i64]);
        full_b.push(Dim::from(1i64));
        out.push(Dim::from(1i64));
    }
    if full_a.len() == 1 {
        a2 = cx.b.unsqueeze(a, &[0]);
        dy2 = cx.b.unsqueeze(dy2, &[out.len() as i64 - 1]);
        full_a.insert(0, Dim::from(1i64));
        out.insert(out.len() - 1, Dim::from(1i64));
    }
    let batch = &out[..out.len() - 2];
    for full in [&full_a, &full_b] {
        let own = &full[..full.len() - 2];
        if own.iter().zip(&batch[batch.len() - own.len()..]).any(|(x, y)| x != y && !x.is(1)) {
            return Err("batch axes are broadcast between sizes that are not known to be equal".to_string());
        }
    }
    if cx.wants(0) {
        let b_t = swap_last(cx, b2, full_b.len());
        let grad = cx.b.matmul(dy2, b_t);
        let grad = cx.sum_from(grad, &[batch, &full_a[full_a.len() - 2..]].concat(), 0);
        cx.give(0, grad);
    }
    if cx.wants(1) {
        let a_t = swap_last(cx, a2, full_a.len());
        let mut grad = cx.b.matmul(a_t, dy2);
        let mut from = [batch, &full_b[full_b.len() - 2..]].concat();
        if shape_b.len() == 1 {
            from.pop();
            grad = cx.b.squeeze(grad, &[from.len() as i64]);
        }
        let grad = cx.sum_from(grad, &from, 1);
        cx.give(1, grad);
    }
    Ok(())
}

/// A 2-D right operand: `dX = dY * W^T`, and `dW = X^T * dY` as one product of flattened operands.
fn weight_grad(cx: &mut GradCx<'_>, dy: ValueId) -> Result<(), String> {
    let (x, w) = (cx.input(0), cx.input(1));
    let rank = cx.shape(x).len();
    if cx.wants(0) {
        let w_t = cx.b.transpose(w, &[1, 0]);
        let dx = cx.b.matmul(dy, w_t);
        cx.give(0, dx);
    }
    if cx.wants(1) {
        let (x2, dy2) = if rank == 2 {
            (x, dy)
        } else {
            let (k, n) = (cx.shape(w)[0].clone(), cx.shape(w)[1].clone());
            (flatten(cx, x, w, 0, &k), flatten(cx, dy, w, 1, &n))
        };
        let dw = product(cx, (x2, true), (dy2, false), 1.0);
        cx.give(1, dw);
    }
    Ok(())
}

/// `value` as `[-1, size]`, where `size` is axis `axis` of `like`.
fn flatten(cx: &mut GradCx<'_>, value: ValueId, like: ValueId, axis: i64, size: &Dim) -> ValueId {
    if let Some(n) = size.known() {
        return cx.b.reshape(value, &[-1, n]);
    }
    let shape = cx.b.shape_of(like);
    let at = cx.b.ints(&[axis]);
    let size = cx.b.gather(shape, at, 0);
    let rest = cx.b.ints(&[-1]);
    let target = cx.b.concat(&[rest, size], 0);
    cx.b.reshape_to(value, target)
}

/// Swaps the last two of `rank` axes.
pub(super) fn swap_last(cx: &mut GradCx<'_>, value: ValueId, rank: usize) -> ValueId {
    let mut perm: Vec<usize> = (0..rank).collect();
    perm.swap(rank - 2, rank - 1);
    cx.b.transpose(value, &perm)
}

/// `alpha * a' b'` of 2-D values, each transposed where its flag says so. Gemm without `C` exists from opset 11 on.
pub(super) fn product(cx: &mut GradCx<'_>, a: (ValueId, bool), b: (ValueId, bool), alpha: f32) -> ValueId {
    if cx.b.opset() >= 11 {
        let mut attrs = Vec::new();
        for (name, on) in [("transA", a.1), ("transB", b.1)] {
            if on {
                attrs.push(attr(name, AttrValue::Int(1)));
            }
        }
        if alpha != 1.0 {
            attrs.push(attr("alpha", AttrValue::Float(alpha)));
        }
        return cx.b.op("Gemm", &[a.0, b.0], attrs);
    }
    let like = cx.output(0);
    let left = if a.1 { cx.b.transpose(a.0, &[1, 0]) } else { a.0 };
    let right = if b.1 { cx.b.transpose(b.0, &[1, 0]) } else { b.0 };
    let out = cx.b.matmul(left, right);
    scaled(cx, out, alpha, like)
}

/// `value * factor`, in the element type of the forward value `like`.
pub(super) fn scaled(cx: &mut GradCx<'_>, value: ValueId, factor: f32, like: ValueId) -> ValueId {
    if factor == 1.0 {
        return value;
    }
    let factor = cx.scalar(factor, like);
    cx.b.mul(value, factor)
}

/// Whether an operand of Gemm is stored transposed.
fn transposed(node: &Node, name: &str) -> bool {
    node.attr_int(name).unwrap_or(0) != 0
}

/// Axes of `(M, K)` in A and `(K, N)` in B.
pub(super) fn gemm_layout(node: &Node) -> ((usize, usize), (usize, usize)) {
    let a = if transposed(node, "transA") { (1, 0) } else { (0, 1) };
    let b = if transposed(node, "transB") { (1, 0) } else { (0, 1) };
    (a, b)
}

pub(super) fn gemm_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    Ok(vec![Fact::new(cx.dtype(0), gemm_shape(cx, 0, 1, 2)?)])
}

/// Shape of `A' B' + C` for the operands at three slots; `None` where a rank is unknown.
pub(super) fn gemm_shape(cx: &InferCx<'_>, a: usize, b: usize, c: usize) -> Result<Option<Vec<Dim>>, InferError> {
    let (Some(a), Some(b)) = (cx.shape(a), cx.shape(b)) else { return Ok(None) };
    if a.len() != 2 || b.len() != 2 {
        return Err(cx.error(format!("operands of rank {} and {}, expected 2", a.len(), b.len())));
    }
    let ((m, k_a), (k_b, n)) = gemm_layout(cx.node);
    if contradict(&a[k_a], &b[k_b]) {
        return Err(cx.error(format!("inner sizes differ: {} of A, {} of B", a[k_a], b[k_b])));
    }
    let out = vec![a[m].clone(), b[n].clone()];
    if let Some(c) = cx.shape(c) {
        let fits = c.len() <= 2 && c.iter().rev().zip(out.iter().rev()).all(|(c, y)| c.is(1) || !contradict(c, y));
        if !fits {
            return Err(cx.error(format!("C of shape {c:?} does not broadcast to {out:?}")));
        }
    }
    Ok(Some(out))
}

pub(super) fn gemm_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    relate_gemm(cx, &mut relations, 0, 1, 2);
    relations
}

/// `m |k|, |k| n, c -> m n`, C being broadcast, for the operands at three slots.
pub(super) fn relate_gemm(cx: &AxesCx<'_>, relations: &mut Relations, a: usize, b: usize, c: usize) {
    let ((m, k_a), (k_b, n)) = gemm_layout(cx.node);
    relations.same((Slot::In(a), m), (Slot::Out(0), 0));
    relations.same((Slot::In(b), n), (Slot::Out(0), 1));
    relations.contract((Slot::In(a), k_a), (Slot::In(b), k_b));
    if cx.has(Slot::In(c)) {
        cx.broadcast(relations, c);
    }
}

/// `M * N * K`
pub(super) fn gemm_cost(cx: &CostCx<'_>) -> Option<Dim> {
    let (a, out) = (cx.inputs.first().copied().flatten()?, cx.outputs.first().copied().flatten()?);
    Some(&out.iter().product::<Dim>() * a.get(gemm_layout(cx.node).0.1)?)
}

/// `dA' = alpha * dY * B'^T`, `dB' = alpha * A'^T * dY`, `dC = beta * dY` summed to C's shape.
fn gemm_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let dy = cx.dy()?;
    let (a, b) = (cx.input(0), cx.input(1));
    let (trans_a, trans_b) = (transposed(cx.node(), "transA"), transposed(cx.node(), "transB"));
    let alpha = cx.node().attr_float("alpha").unwrap_or(1.0);
    let beta = cx.node().attr_float("beta").unwrap_or(1.0);
    if cx.wants(0) {
        let da =
            if trans_a { product(cx, (b, trans_b), (dy, true), alpha) } else { product(cx, (dy, false), (b, !trans_b), alpha) };
        cx.give(0, da);
    }
    if cx.wants(1) {
        let db =
            if trans_b { product(cx, (dy, true), (a, trans_a), alpha) } else { product(cx, (a, !trans_a), (dy, false), alpha) };
        cx.give(1, db);
    }
    if cx.wants(2) {
        let dc = cx.sum_to(dy, 2);
        let like = cx.output(0);
        let dc = scaled(cx, dc, beta, like);
        cx.give(2, dc);
    }
    Ok(())
}

/// Graphs of one node, for the tests of several families.
#[cfg(test)]
pub(super) mod one_node {
    use super::*;
    use crate::graph::{Attr, DType, Declared, DeclaredDim, Graph, NewNode, NodeId};
    use crate::infer::{Facts, facts};
    use crate::ops::lookup;
    use crate::slice::refit::RefitCx;
    use bytes::Bytes;

    /// Entries of the integers at an input slot that change.
    pub(crate) type Patch = (usize, Vec<(usize, i64)>);

    /// A dimension: a number, or a name.
    pub(crate) fn shape(text: &str) -> Vec<DeclaredDim> {
        let dim = |d: &str| d.parse().map_or_else(|_| DeclaredDim::Symbol(d.to_string()), DeclaredDim::Size);
        text.split_whitespace().map(dim).collect()
    }

    /// The node `op` on float inputs of the given shapes (`-` where left out), with `outputs` outputs.
    pub(crate) fn graph(op: &str, opset: i64, inputs: &[&str], attrs: Vec<Attr>, outputs: usize) -> Graph {
        of_domain(("", op), opset, inputs, attrs, outputs)
    }

    /// The same for an operator of com.microsoft.
    pub(crate) fn microsoft(op: &str, inputs: &[&str], attrs: Vec<Attr>, outputs: usize) -> Graph {
        of_domain(("com.microsoft", op), 17, inputs, attrs, outputs)
    }

    fn of_domain((domain, op): (&str, &str), opset: i64, inputs: &[&str], attrs: Vec<Attr>, outputs: usize) -> Graph {
        let mut opsets = vec![(String::new(), opset)];
        opsets.extend((!domain.is_empty()).then(|| (domain.to_string(), 1)));
        let mut g = Graph::new(8, opsets, Bytes::new());
        let mut ids = Vec::new();
        for (i, text) in inputs.iter().enumerate() {
            ids.push((*text != "-").then(|| {
                let id = g.add_value(&format!("x{i}"));
                g.add_input(id, Declared { dtype: Some(DType::F32), dims: Some(shape(text)), extra: Bytes::new() });
                id
            }));
        }
        let outs = (0..outputs).map(|i| Some(g.add_value(&format!("y{i}")))).collect();
        g.add_node(NewNode {
            op: op.to_string(),
            domain: domain.to_string(),
            inputs: ids,
            outputs: outs,
            attrs,
            ..NewNode::default()
        });
        g
    }

    /// Shapes of the outputs as text, or the error.
    pub(crate) fn shapes(g: &Graph) -> Result<Vec<String>, String> {
        let f = facts(g).map_err(|e| e.what)?;
        let node = g.node(g.order()[0]);
        Ok(node.outputs().iter().flatten().map(|v| shape_text(f.shape(*v))).collect())
    }

    fn shape_text(shape: Option<&[Dim]>) -> String {
        shape.map_or("?".into(), |s| s.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "))
    }

    /// Relations of the node.
    pub(crate) fn relations(g: &Graph) -> Relations {
        let f = facts(g).expect("the graph is consistent");
        let id = g.order()[0];
        let node = g.node(id);
        let opset = g.opset("").expect("set above");
        match lookup(node.domain(), node.op()).map(|r| &r.axes) {
            Some(Axes::Rule(rule)) => rule(&AxesCx { graph: g, facts: &f, node, id, opset }),
            _ => Relations::default(),
        }
    }

    fn at(at: &At) -> String {
        match at.0 {
            Slot::In(i) => format!("in{i}.{}", at.1),
            Slot::Out(i) => format!("out{i}.{}", at.1),
            Slot::Virtual(i) => format!("v{i}.{}", at.1),
        }
    }

    /// Relations as text, one each: `in0.1=out0.1`, `in0.2*in1.0`, `in0.2~v0.0,v0.1`, `!in0.2`, `+in0.1`.
    pub(crate) fn links(g: &Graph) -> Vec<String> {
        use crate::axes::relation::Link;
        let list = |(slot, axes): &(Slot, Vec<usize>)| axes.iter().map(|a| at(&(*slot, *a))).collect::<Vec<_>>().join(",");
        let text = |link: &Link| match link {
            Link::Same(a, b) => format!("{}={}", at(a), at(b)),
            Link::Contract(a, b) => format!("{}*{}", at(a), at(b)),
            Link::Sum(a) => format!("+{}", at(a)),
            Link::Regroup(a, b) => format!("{}~{}", list(a), list(b)),
            Link::Select { from, to, index, at: start } => {
                let (first, last) = (index.first().copied().unwrap_or(0), index.last().copied().unwrap_or(0));
                format!("{}[{first}..={last}]>{}@{start}", at(from), at(to))
            }
            Link::Unread(a) => format!("?{}", at(a)),
            Link::Vanish(a, _) => format!("0{}", at(a)),
            Link::Blocks(a, b) => format!("#{}:{}", at(a), b.size),
            Link::Barrier(a, _) => format!("!{}", at(a)),
        };
        relations(g).links.iter().map(text).collect()
    }

    /// MACs of the node as text.
    pub(crate) fn macs(g: &Graph) -> String {
        let f = facts(g).expect("the graph is consistent");
        let node = g.node(g.order()[0]);
        let of = |v: &[Option<ValueId>]| v.iter().map(|v| v.and_then(|v| f.shape(v))).collect();
        let cx = CostCx { node, inputs: of(node.inputs()), outputs: of(node.outputs()) };
        match lookup(node.domain(), node.op()).map(|r| &r.cost) {
            Some(Cost::Rule(rule)) => rule(&cx).map_or("?".into(), |d| d.to_string()),
            _ => "free".into(),
        }
    }

    /// Runs the node's `refit` rule with the positions that stay of some axes of inputs; returns the patches that it asked for.
    pub(crate) fn refit(g: &mut Graph, kept: &[(usize, usize, Vec<usize>)]) -> Result<Vec<Patch>, String> {
        let f: Facts = facts(g).map_err(|e| e.what)?;
        let id: NodeId = g.order()[0];
        let ids: Vec<_> = kept.iter().map(|(slot, axis, k)| (g.node(id).input(*slot), *axis, k.as_slice())).collect();
        let find = |v: ValueId, axis: usize| ids.iter().find(|(i, a, _)| *i == Some(v) && *a == axis).map(|(_, _, k)| *k);
        let Some(Refit::Rule(rule)) = lookup(g.node(id).domain(), g.node(id).op()).map(|r| &r.refit) else { return Ok(vec![]) };
        let original = g.clone();
        let mut cx = RefitCx {
            graph: g,
            original: &original,
            origin: id,
            id,
            facts: &f,
            kept: &find,
            patches: Vec::new(),
            edits: Vec::new(),
        };
        rule(&mut cx).map_err(|e| e.what)?;
        Ok(cx.patches)
    }

    /// Integer attributes.
    pub(crate) fn ints(pairs: &[(&str, i64)]) -> Vec<Attr> {
        pairs.iter().map(|(n, v)| attr(n, AttrValue::Int(*v))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::one_node::{graph, ints, links, macs, shapes};

    #[test]
    fn matmul_follows_numpy_shapes() {
        for (a, b, out) in [
            ("b 197 192", "192 768", "b 197 768"),
            ("3", "3", ""),
            ("3", "5 3 4", "5 4"),
            ("5 2 3", "3", "5 2"),
            ("b 1 2 3", "4 3 5", "b 4 2 5"),
            ("3", "3 4", "4"),
        ] {
            assert_eq!(shapes(&graph("MatMul", 13, &[a, b], vec![], 1)), Ok(vec![out.to_string()]), "{a} x {b}");
        }
        assert!(shapes(&graph("MatMul", 13, &["2 3", "4 5"], vec![], 1)).is_err());
        assert!(shapes(&graph("MatMul", 13, &["2 2 3", "3 3 5"], vec![], 1)).is_err());
    }

    #[test]
    fn matmul_contracts_the_inner_axes() {
        let g = graph("MatMul", 13, &["b 197 192", "192 768"], vec![], 1);
        assert_eq!(links(&g), ["in0.0=out0.0", "in0.1=out0.1", "in1.1=out0.2", "in0.2*in1.0"]);
        assert_eq!(macs(&g), "29048832*b");
        // The stretched axis 1 of the first operand has no relation.
        let g = graph("MatMul", 13, &["b 1 2 3", "4 3 5"], vec![], 1);
        assert_eq!(links(&g), ["in0.0=out0.0", "in1.0=out0.1", "in0.2=out0.2", "in1.2=out0.3", "in0.3*in1.1"]);
        assert_eq!(links(&graph("MatMul", 13, &["3", "3"], vec![], 1)), ["in0.0*in1.0"]);
        assert_eq!(links(&graph("MatMul", 13, &["3", "5 3 4"], vec![], 1)), ["in1.0=out0.0", "in1.2=out0.1", "in0.0*in1.1"]);
    }

    #[test]
    fn gemm_with_trans_b_cuts_rows() {
        let g = graph("Gemm", 13, &["b 192", "768 192", "768"], ints(&[("transB", 1)]), 1);
        assert_eq!(shapes(&g), Ok(vec!["b 768".to_string()]));
        assert_eq!(links(&g), ["in0.0=out0.0", "in1.0=out0.1", "in0.1*in1.1", "in2.0=out0.1"]);
        assert_eq!(macs(&g), "147456*b");
        let g = graph("Gemm", 13, &["3 2", "3 5", "2 1"], ints(&[("transA", 1)]), 1);
        assert_eq!(shapes(&g), Ok(vec!["2 5".to_string()]));
        assert_eq!(links(&g), ["in0.1=out0.0", "in1.1=out0.1", "in0.0*in1.0", "in2.0=out0.0"]);
        assert_eq!(macs(&g), "30");
        assert!(shapes(&graph("Gemm", 13, &["2 3", "3 5", "4"], vec![], 1)).is_err());
    }
}
