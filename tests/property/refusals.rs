//! What is refused is named: an MLP with one operator between its weights that no unit may be cut through.

use super::blocks::hidden;
use super::harness::Random;
use super::net::{Net, Val, int};
use vitrim::anatomy::Refusal;
use vitrim::graph::{AttrValue, NewNode, build::attr};
use vitrim::pipeline::analyse;

/// An operator on the last axis of `[B, N, M]`.
type Obstacle = fn(&mut Net, &Val) -> Val;

/// Name of the operator that must be named, and how it is put in the way.
const OBSTACLES: &[(&str, Obstacle)] = &[
    ("Mystery", |net, v| foreign(net, v, "com.example")),
    ("Mystery", |net, v| foreign(net, v, "")),
    ("Softmax", |net, v| net.softmax(v, 2)),
    ("LogSoftmax", |net, v| net.op("LogSoftmax", &[v.id], vec![int("axis", -1)], v.dims.clone())),
    ("LayerNormalization", |net, v| {
        let n = v.n(2);
        let (scale, shift) = (net.positive(&[n]), net.constant(&[n]));
        net.op("LayerNormalization", &[v.id, scale, shift], vec![int("axis", -1)], v.dims.clone())
    }),
    ("LpNormalization", |net, v| net.op("LpNormalization", &[v.id], vec![int("axis", 2)], v.dims.clone())),
    ("CumSum", |net, v| {
        let axis = net.b().ints(&[2]);
        net.op("CumSum", &[v.id, axis], vec![], v.dims.clone())
    }),
    ("ReduceMean", |net, v| {
        let mean = net.b().reduce_mean(v.id, &[2], true);
        net.op("Sub", &[v.id, mean], vec![], v.dims.clone())
    }),
    ("ReduceMax", |net, v| {
        let most = net.b().reduce_max(v.id, &[2], true);
        net.op("Sub", &[v.id, most], vec![], v.dims.clone())
    }),
    ("ReduceSum", |net, v| {
        // The sigmoid of a removed unit is not zero.
        let s = net.op("Sigmoid", &[v.id], vec![], v.dims.clone());
        let sum = net.b().reduce_sum(s.id, &[2], true);
        net.op("Mul", &[v.id, sum], vec![], v.dims.clone())
    }),
    ("Div", |net, v| {
        let n = v.n(2);
        let c = net.constant_from(&[n], 0.5);
        net.op("Div", &[v.id, c], vec![], v.dims.clone())
    }),
];

/// Operators that make another axis of the hidden one, so that nothing lies between two weights: not offered, and nobody would ask.
const OTHER_AXIS: &[(&str, Obstacle)] = &[
    ("Pad", |net, v| {
        let pads = net.b().ints(&[0, 0, 1, 0, 0, 1]);
        let mut dims = v.dims.clone();
        dims[2].n += 2;
        let mode = attr("mode", AttrValue::Str("reflect".into()));
        net.op("Pad", &[v.id, pads], vec![mode], dims)
    }),
    ("TopK", |net, v| {
        let k = net.b().ints(&[2]);
        let id = net.b().ops("TopK", &[v.id, k], vec![int("axis", 2)], 2)[0];
        let mut dims = v.dims.clone();
        dims[2].n = 2;
        Val { id, dims }
    }),
];

/// An operator that no record knows.
fn foreign(net: &mut Net, v: &Val, domain: &str) -> Val {
    if !domain.is_empty() {
        net.graph.set_opset(domain, 1);
    }
    let out = net.graph.add_value("mystery");
    net.graph.add_node(NewNode {
        name: "mystery".into(),
        op: "Mystery".into(),
        domain: domain.into(),
        inputs: vec![Some(v.id)],
        outputs: vec![Some(out)],
        ..NewNode::default()
    });
    Val { id: out, dims: v.dims.clone() }
}

/// The refusals of an MLP with the obstacle in it; an error where its first weight is offered all the same.
pub(crate) fn refused(seed: u64, obstacle: Obstacle) -> Result<Vec<Refusal>, String> {
    let batch = if seed.is_multiple_of(2) { None } else { Some(2) };
    let mut net = Net::new(Random(seed), 18, batch);
    let x = net.input("x", &[3, 5]);
    let m = 4 + net.below(5) * 2;
    let h = hidden(&mut net, &x, m);
    let h = net.unary(&h);
    let h = obstacle(&mut net, &h);
    let y = net.dense(&h, 3);
    net.output(&y);
    net.graph.sort();
    let (_, anatomy) = analyse(&net.graph).map_err(|e| e.to_string())?;
    for (value, axis) in &net.must {
        let offered = anatomy.groups.iter().find(|g| g.cuts.iter().any(|c| c.value == *value && c.axis == *axis));
        if let Some(group) = offered {
            return Err(format!("{} is offered", group.id));
        }
    }
    Ok(anatomy.refused)
}

#[test]
fn what_is_refused_is_named() {
    for (op, obstacle) in OBSTACLES {
        for seed in 0..20 {
            let refused = refused(seed, *obstacle).unwrap_or_else(|e| panic!("{op}, seed {seed}: {e}"));
            let named = refused.iter().any(|r| r.op == *op && !r.node.is_empty() && !r.reason.is_empty());
            assert!(named, "{op}, seed {seed}: {refused:?}");
        }
    }
    for (op, obstacle) in OTHER_AXIS {
        (0..20).for_each(|seed| assert!(refused(seed, *obstacle).is_ok(), "{op}, seed {seed}"));
    }
}
