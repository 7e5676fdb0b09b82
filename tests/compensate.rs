//! What a layer must give behind layers that were cut.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "these are tests")]

use bytes::Bytes;
use vitrim::compensate::{both_streams, consumers};
use vitrim::graph::build::Builder;
use vitrim::graph::{DType, Declared, DeclaredDim, Graph, Tensor, ValueId};
use vitrim::pipeline::analyse;

mod harness;
use harness::{Random, f32s, has_ort, relative_error, session};

const N: usize = 4;
const D: usize = 3;
const M: usize = 5;

/// Two residual MLPs; the second one's output goes through a scale, and its products are Gemms over flat rows where asked for.
fn net(is_flat: bool) -> Graph {
    let mut r = Random(3);
    let mut g = Graph::new(9, vec![(String::new(), 17)], Bytes::new());
    let mut x = g.add_value("x");
    let dims = vec![DeclaredDim::Symbol("batch".into()), DeclaredDim::Size(N as i64), DeclaredDim::Size(D as i64)];
    let declared = Declared { dtype: Some(DType::F32), dims: Some(dims), extra: Bytes::new() };
    g.add_input(x, declared.clone());
    let mut b = Builder::new(&mut g, "n");
    for layer in 0..2 {
        let mut constant = |b: &mut Builder<'_>, dims: &[usize]| {
            let count = dims.iter().product();
            b.constant(Tensor::f32(dims, &r.f32s(count, -1.0, 1.0)))
        };
        let (w1, b1) = (constant(&mut b, &[D, M]), constant(&mut b, &[M]));
        let (w2, b2) = (constant(&mut b, &[M, D]), constant(&mut b, &[D]));
        let scale = constant(&mut b, &[D]);
        let mut y = if is_flat {
            let flat = b.reshape(x, &[-1, D as i64]);
            let h = b.op("Gemm", &[flat, w1, b1], vec![]);
            let h = b.op("Relu", &[h], vec![]);
            let y = b.op("Gemm", &[h, w2, b2], vec![]);
            b.reshape(y, &[-1, N as i64, D as i64])
        } else {
            let h = b.matmul(x, w1);
            let h = b.add(h, b1);
            let h = b.op("Relu", &[h], vec![]);
            let y = b.matmul(h, w2);
            b.add(b2, y)
        };
        if layer == 1 {
            y = b.mul(scale, y);
        }
        x = b.add(y, x);
    }
    g.add_output(x, declared);
    g.sort();
    g
}

fn rows_of(graph: &Graph, rows: ValueId) -> Vec<f32> {
    let mut graph = graph.clone();
    graph.add_output(rows, Declared { dtype: Some(DType::F32), dims: None, extra: Bytes::new() });
    let feeds = [("x".to_string(), f32s(&[2, N, D], Random(5).f32s(2 * N * D, -1.0, 1.0)))];
    session(&graph).unwrap().run(&feeds).unwrap().pop().unwrap().1.as_f32()
}

/// What the layer gives for the features in rows `[x, Y]`, and Y.
fn given_and_wanted(rows: &[f32], weight: &[f32], bias: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let (mut given, mut wanted) = (Vec::new(), Vec::new());
    for row in rows.chunks_exact(M + D) {
        for o in 0..D {
            given.push((0..M).map(|f| row[f] * weight[f * D + o]).sum::<f32>() + bias[o]);
        }
        wanted.extend(&row[M..]);
    }
    (given, wanted)
}

#[test]
fn a_layer_is_asked_for_what_the_residual_stream_lacks() {
    if !has_ort() {
        return;
    }
    for is_flat in [false, true] {
        let graph = net(is_flat);
        let (facts, anatomy) = analyse(&graph).unwrap();
        let (consumers, refused) = consumers(&graph, &facts, &anatomy);
        assert!(refused.is_empty() && consumers.len() == 2, "{refused:?}");
        let constant = |graph: &Graph, v: ValueId| graph.constant(v).unwrap().to_f32s().unwrap();
        for consumer in &consumers {
            // Nothing was edited: the layer gives what is asked for.
            let (both, rows) = both_streams((&graph, &facts), &graph, consumer).unwrap();
            let bias = constant(&graph, consumer.bias.unwrap().constant);
            let (given, wanted) = given_and_wanted(&rows_of(&both, rows), &constant(&graph, consumer.weight.constant), &bias);
            assert!(relative_error(&given, &wanted) < 1e-5, "flat: {is_flat}");
        }
        // The first layer gives half of what it gave: the second one is asked for the other half as well.
        let mut edited = graph.clone();
        for v in [consumers[0].weight.constant, consumers[0].bias.unwrap().constant] {
            let tensor = graph.constant(v).unwrap();
            let half: Vec<f32> = constant(&graph, v).iter().map(|x| x / 2.0).collect();
            edited.set_constant(v, tensor.with_f32s(&half));
        }
        let (both, rows) = both_streams((&graph, &facts), &edited, &consumers[1]).unwrap();
        let second = &consumers[1];
        let bias = constant(&graph, second.bias.unwrap().constant);
        let rows = rows_of(&both, rows);
        let (given, wanted) = given_and_wanted(&rows, &constant(&graph, second.weight.constant), &bias);
        assert!(relative_error(&given, &wanted) > 0.1, "what is asked for is not what it gives");
        // With what is asked for in its place, the end of the network is that of the model as it was.
        let scale_node = graph.nodes().find(|(_, n)| n.op() == "Mul").unwrap().1;
        let scale = scale_node.inputs().iter().flatten().find(|v| graph.is_constant(**v)).unwrap();
        let scale = constant(&graph, *scale);
        let end = |graph: &Graph| rows_of(graph, graph.outputs()[0]);
        let missing = |i: usize| (wanted[i] - given[i]) * scale[i % D];
        let repaired: Vec<f32> = end(&edited).iter().enumerate().map(|(i, y)| y + missing(i)).collect();
        assert!(relative_error(&repaired, &end(&graph)) < 1e-5, "flat: {is_flat}");
    }
}
