//! Rewrites of the graph before it trains: the same function, fewer or cheaper nodes in forward and backward together.
//!
//! An ordered list, each run once: [`drop_noops`] takes out Identity and Dropout as inference runs it; [`fold_gelu`] moves the
//! two scales of GELU into the weights around it. Behind the gradients, [`recompute_gelu`] computes again what is dear to keep, and
//! [`factor_out`] takes a common factor out of sums.
//! Invariant: graph inputs and outputs keep name, order and content (to rounding); constants keep their value ids.

use crate::graph::build::Builder;
use crate::graph::{DType, Graph, NodeId, Use, ValueId};

/// Runs all rewrites in order. Nodes need not be sorted.
pub fn run(graph: &mut Graph) {
    drop_noops(graph);
    fold_gelu(graph);
}

/// `y = x` nodes: readers of y read x.
pub fn drop_noops(graph: &mut Graph) {
    for id in graph.order().to_vec() {
        let node = graph.node(id);
        let (Some(x), Some(y)) = (node.input(0), node.output(0)) else { continue };
        let noop = match node.op() {
            "Identity" => true,
            "Dropout" => node.output(1).is_none_or(|m| graph.value(m).users().is_empty()) && node.input(2).is_none(),
            _ => false,
        };
        if noop && node.domain().is_empty() && !graph.outputs().contains(&y) {
            graph.replace_uses(y, x);
            if graph.value(y).users().is_empty() {
                graph.remove_node(id);
            }
        }
    }
}

/// One GELU of the graph: `y = x/2 (1 + erf(x / sqrt 2))`.
struct Gelu {
    x: ValueId,
    y: ValueId,
}

/// With `u = x / sqrt 2`, GELU is `u (1 + erf u) / sqrt 2`. Both scales move into what stands around it: the first into weight
/// and bias of the linear layer before, the second into the gate behind or the weight of the next layer. What remains between
/// the layers is Erf, Add, Mul instead of five nodes. Where a neighbour is not a layer, the scale stays a Mul in its place.
pub fn fold_gelu(graph: &mut Graph) {
    for id in graph.order().to_vec() {
        if let Some(found) = gelu_at(graph, id).filter(|g| is_closed(graph, g)) {
            write_gelu(graph, &found);
        }
    }
}

/// Whether somebody reads y, and nobody but GELU reads x and what is computed between both: scaling x would scale theirs too.
fn is_closed(graph: &Graph, gelu: &Gelu) -> bool {
    let is_read = |v: ValueId| !graph.value(v).users().is_empty() || graph.outputs().contains(&v);
    let mut inside = std::collections::BTreeSet::new();
    let mut values = vec![gelu.y];
    while let Some(v) = values.pop() {
        let Some((id, _)) = graph.value(v).producer().filter(|_| v != gelu.x && !graph.is_constant(v)) else { continue };
        inside.insert(id);
        values.extend(graph.node(id).inputs().iter().flatten());
    }
    let own = |v: ValueId| !graph.outputs().contains(&v) && graph.value(v).users().iter().all(|u| inside.contains(&u.node));
    let between = inside.iter().flat_map(|id| graph.node(*id).outputs().iter().flatten());
    is_read(gelu.y) && own(gelu.x) && between.filter(|v| **v != gelu.y).all(|v| own(*v))
}

/// Whether a node is the last of a GELU that [`fold_gelu`] will write anew.
pub(super) fn is_gelu(graph: &Graph, id: NodeId) -> bool {
    gelu_at(graph, id).is_some()
}

fn write_gelu(graph: &mut Graph, gelu: &Gelu) {
    let c = std::f32::consts::FRAC_1_SQRT_2;
    let u = match scalable_layer(graph, gelu.x) {
        Some(layer) => {
            scale_inputs(graph, &layer, c);
            gelu.x
        }
        None => scaled(graph, gelu.x, c),
    };
    let mut b = Builder::new(graph, "gelu.");
    let erf = b.op("Erf", &[u], vec![]);
    let one = b.scalar(DType::F32, 1.0);
    let above = b.add(erf, one);
    let product = b.mul(u, above);
    let readers = graph.value(gelu.y).users().to_vec();
    let mut rest = Vec::new();
    for at in readers {
        match scalable_reader(graph, at) {
            Some(other) => {
                let factor = graph.node(other.node).input(other.slot).expect("found there");
                let factor = scaled(graph, factor, c);
                graph.set_input(other, Some(factor));
                graph.set_input(at, Some(product));
            }
            None => rest.push(at),
        }
    }
    if !rest.is_empty() || graph.outputs().contains(&gelu.y) {
        let y = scaled(graph, product, c);
        for at in rest {
            graph.set_input(at, Some(y));
        }
        if graph.outputs().contains(&gelu.y) {
            graph.move_output(gelu.y, y);
        }
    }
    graph.remove_dead(&|_, _| false);
}

/// The backward pass reads u, `a = 1 + erf u` and `u a` of every GELU, a network's widest values. It gets a product of its own, so
/// that `u a` need not be kept until then: a seventh of the activations of DeiT-Tiny's step, for less than 1 % of its time.
/// `forward` are the nodes before the gradients.
pub fn recompute_gelu(graph: &mut Graph, forward: &[NodeId]) {
    let forward: std::collections::BTreeSet<NodeId> = forward.iter().copied().collect();
    for id in &forward {
        let Some((u, a)) = folded_gelu(graph, *id) else { continue };
        let Some(product) = graph.node(*id).output(0) else { continue };
        let backward = |v: ValueId| graph.value(v).users().iter().filter(|at| !forward.contains(&at.node)).copied();
        let readers: Vec<Use> = backward(product).collect();
        if readers.is_empty() || backward(u).next().is_none() || backward(a).next().is_none() {
            continue;
        }
        // With its operands the other way round: a runtime joins nodes that are written alike.
        let (x, y) = if graph.node(*id).input(0) == Some(u) { (a, u) } else { (u, a) };
        let again = Builder::new(graph, "grad.").mul(x, y);
        for at in readers {
            graph.set_input(at, Some(again));
        }
    }
    graph.sort();
}

/// u and `a = erf u + 1` where a node is their product.
fn folded_gelu(graph: &Graph, id: NodeId) -> Option<(ValueId, ValueId)> {
    let node = graph.node(id);
    let (p, q) = (node.input(0)?, node.input(1)?);
    let is_above = |u: ValueId, a: ValueId| {
        let erf = operands(graph, a, "Add").and_then(|(e, f)| if is_scalar(graph, f, 1.0) { Some(e) } else { None });
        let made = erf.and_then(|e| graph.value(e).producer()).map(|(erf, _)| graph.node(erf));
        made.is_some_and(|n| n.op() == "Erf" && n.input(0) == Some(u))
    };
    let found = [(p, q), (q, p)].into_iter().find(|(u, a)| is_above(*u, *a));
    found.filter(|_| node.op() == "Mul" && node.domain().is_empty())
}

/// `d a + (d b) c = d (a + b c)`: one product less. The gradient of GELU `u (1 + erf u)` is such a sum, on a network's widest values.
pub fn factor_out(graph: &mut Graph) {
    for id in graph.order().to_vec() {
        let node = graph.node(id);
        let (Some(x), Some(y), Some(sum)) = (node.input(0), node.input(1), node.output(0)) else { continue };
        if node.op() != "Add" || !node.domain().is_empty() || x == y || graph.outputs().contains(&sum) {
            continue;
        }
        if let Some([d, a, b, c]) = common_factor(graph, x, y).or_else(|| common_factor(graph, y, x)) {
            let mut builder = Builder::new(graph, "grad.");
            let inner = builder.mul(b, c);
            let inner = builder.add(a, inner);
            let product = builder.mul(d, inner);
            graph.replace_uses(sum, product);
        }
    }
    graph.remove_dead(&|_, _| false);
    graph.sort();
}

/// `[d, a, b, c]` where `x = d a` and `y = (d b) c`, each read by one node only.
fn common_factor(graph: &Graph, x: ValueId, y: ValueId) -> Option<[ValueId; 4]> {
    let once = |v: ValueId| graph.value(v).users().len() == 1 && !graph.outputs().contains(&v);
    let product = |v: ValueId| operands(graph, v, "Mul").filter(|_| once(v));
    let ((p, q), (r, s)) = (product(x)?, product(y)?);
    for (d, a) in [(p, q), (q, p)] {
        for (inner, c) in [(r, s), (s, r)] {
            match product(inner) {
                Some((e, b)) | Some((b, e)) if e == d => return Some([d, a, b, c]),
                _ => {}
            }
        }
    }
    None
}

fn scaled(graph: &mut Graph, value: ValueId, c: f32) -> ValueId {
    let mut b = Builder::new(graph, "gelu.");
    let c = b.scalar(DType::F32, c);
    b.mul(value, c)
}

/// Places whose scaling scales `x`: weight and bias of the layer that makes it, where nothing but GELU reads x.
fn scalable_layer(graph: &Graph, x: ValueId) -> Option<Vec<Use>> {
    let (id, _) = graph.value(x).producer()?;
    if graph.outputs().contains(&x) {
        return None;
    }
    let node = graph.node(id);
    let constant = |slot: usize| node.input(slot).is_some_and(|v| graph.is_constant(v)).then_some(Use { node: id, slot });
    match node.op() {
        "Add" => {
            let (bias, product) = constant(0).map(|u| (u, 1)).or_else(|| constant(1).map(|u| (u, 0)))?;
            let made = node.input(product)?;
            let (matmul, _) = graph.value(made).producer()?;
            let single = graph.value(made).users().len() == 1 && !graph.outputs().contains(&made);
            let weight = graph.node(matmul).input(1).is_some_and(|w| graph.is_constant(w));
            let fits = single && weight && graph.node(matmul).op() == "MatMul";
            fits.then_some(vec![Use { node: matmul, slot: 1 }, bias])
        }
        "Gemm" => Some(vec![constant(1)?, constant(2)?]),
        _ => None,
    }
}

fn scale_inputs(graph: &mut Graph, places: &[Use], c: f32) {
    for at in places {
        let old = graph.node(at.node).input(at.slot).expect("found there");
        let new = scaled(graph, old, c);
        graph.set_input(*at, Some(new));
    }
}

/// The small factor of a product with y: the weight of a layer, or a gate. Scaling it scales the product.
fn scalable_reader(graph: &Graph, at: Use) -> Option<Use> {
    let node = graph.node(at.node);
    let other = Use { node: at.node, slot: 1 };
    let factor = node.input(1)?;
    if at.slot != 0 || Some(factor) == node.input(0) {
        return None;
    }
    let gate = || {
        let declared = |v: ValueId| graph.value(v).name().starts_with("gate.");
        declared(factor) && !graph.outputs().contains(&factor)
    };
    match node.op() {
        "MatMul" | "Gemm" if graph.is_constant(factor) => Some(other),
        "MatMul" | "Gemm" => gate_of_weight(graph, factor),
        "Mul" if gate() => Some(other),
        _ => None,
    }
}

/// The gate where `factor` is a weight times a gate that nothing else reads.
fn gate_of_weight(graph: &Graph, factor: ValueId) -> Option<Use> {
    let (id, _) = graph.value(factor).producer()?;
    let node = graph.node(id);
    let is_ours = node.op() == "Mul" && node.input(0).is_some_and(|w| graph.is_constant(w));
    let gate = node.input(1).filter(|g| is_ours && !graph.is_constant(*g) && graph.value(factor).users().len() == 1)?;
    let small = graph.value(gate).name().starts_with("gate.") && !graph.outputs().contains(&factor);
    small.then_some(Use { node: id, slot: 1 })
}

/// The GELU whose last node is `id`: the operator, or one of the ways in which exporters write it out.
fn gelu_at(graph: &Graph, id: NodeId) -> Option<Gelu> {
    let node = graph.nodes().find(|(n, _)| *n == id)?.1;
    let y = node.output(0)?;
    if node.op() == "Gelu" {
        let exact = node.attr_str("approximate").is_none_or(|a| a == "none");
        return if exact { Some(Gelu { x: node.input(0)?, y }) } else { None };
    }
    let (a, b) = (node.input(0)?, node.input(1)?);
    if node.op() != "Mul" {
        return None;
    }
    // (x (1 + erf)) / 2, (x / 2) (1 + erf), or x ((1 + erf) / 2).
    for (a, b) in [(a, b), (b, a)] {
        if is_scalar(graph, b, 0.5)
            && let Some((p, q)) = operands(graph, a, "Mul")
        {
            for (x, e) in [(p, q), (q, p)] {
                if erf_argument(graph, e) == Some(x) {
                    return Some(Gelu { x, y });
                }
            }
        }
        if let Some(x) = erf_argument(graph, b)
            && half_of(graph, a) == Some(x)
        {
            return Some(Gelu { x, y });
        }
        if let Some(e) = half_of(graph, b)
            && erf_argument(graph, e) == Some(a)
        {
            return Some(Gelu { x: a, y });
        }
    }
    None
}

/// x where `value` is `1 + erf(x / sqrt 2)`.
fn erf_argument(graph: &Graph, value: ValueId) -> Option<ValueId> {
    let (a, b) = operands(graph, value, "Add")?;
    let erf = if is_scalar(graph, b, 1.0) {
        a
    } else if is_scalar(graph, a, 1.0) {
        b
    } else {
        return None;
    };
    let (p, _) = graph.value(erf).producer()?;
    let inner = graph.node(p).input(0).filter(|_| graph.node(p).op() == "Erf")?;
    let root = std::f32::consts::SQRT_2;
    if let Some((x, c)) = operands(graph, inner, "Div") {
        return is_scalar(graph, c, root).then_some(x);
    }
    let (x, c) = operands(graph, inner, "Mul")?;
    if is_scalar(graph, c, 1.0 / root) { Some(x) } else { is_scalar(graph, x, 1.0 / root).then_some(c) }
}

fn half_of(graph: &Graph, value: ValueId) -> Option<ValueId> {
    if let Some((x, c)) = operands(graph, value, "Mul") {
        return if is_scalar(graph, c, 0.5) { Some(x) } else { is_scalar(graph, x, 0.5).then_some(c) };
    }
    let (x, c) = operands(graph, value, "Div")?;
    is_scalar(graph, c, 2.0).then_some(x)
}

fn operands(graph: &Graph, value: ValueId, op: &str) -> Option<(ValueId, ValueId)> {
    let (p, _) = graph.value(value).producer()?;
    let node = graph.node(p);
    if node.op() == op && node.domain().is_empty() { Some((node.input(0)?, node.input(1)?)) } else { None }
}

fn is_scalar(graph: &Graph, value: ValueId, expected: f32) -> bool {
    let found = graph.constant(value).filter(|t| t.element_count() == 1).and_then(|t| t.to_f32s());
    found.is_some_and(|v| (v[0] - expected).abs() <= 1e-6 * expected.abs())
}
