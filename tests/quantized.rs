//! Quantized networks, built here: what is cut equals the network with its removed units at their zero point, in ONNX Runtime.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "these are tests")]

mod harness;

use harness::{Random, f32s, has_ort, output, relative_error};
use std::collections::BTreeSet;
use vitrim::autodiff::interface::declare;
use vitrim::graph::build::attr;
use vitrim::graph::{Attr, AttrValue, DType, DeclaredDim, Graph, Tensor, ValueId};
use vitrim::plan::Kept;
use vitrim::runtime::{Optimize, RuntimeName, Session, SessionOptions, open};
use vitrim::{pipeline, slice};

const WIDTH: usize = 32;
const UNITS: usize = 96;

/// y = second(activation(first(x))), x `[batch, 32]`, 96 units in between.
struct Net {
    graph: Graph,
    at: ValueId,
    random: Random,
}

impl Net {
    fn new(opset: i64) -> Self {
        let opsets = vec![(String::new(), opset), ("com.microsoft".to_string(), 1)];
        let mut graph = Graph::new(10, opsets, Default::default());
        let at = graph.add_value("x");
        graph.add_input(at, declare(DType::F32, vec![DeclaredDim::Symbol("batch".into()), DeclaredDim::Size(WIDTH as i64)]));
        Self { graph, at, random: Random(5) }
    }

    fn bytes(&mut self, name: &str, dtype: DType, dims: &[usize]) -> ValueId {
        let count = dims.iter().product::<usize>() * dtype.bits() / 8;
        let bytes: Vec<u8> = (0..count).map(|_| (self.random.bits() >> 11) as u8).collect();
        self.graph.add_initializer(name, Tensor::new(dtype, dims.to_vec(), bytes.into()))
    }

    fn floats(&mut self, name: &str, dims: &[usize], low: f64, high: f64) -> ValueId {
        let values = self.random.f32s(dims.iter().product(), low, high);
        self.graph.add_initializer(name, Tensor::f32(dims, &values))
    }

    fn byte(&mut self, name: &str, value: u8) -> ValueId {
        self.graph.add_initializer(name, Tensor::new(DType::U8, vec![], vec![value].into()))
    }

    fn op(&mut self, op: &str, inputs: &[ValueId], attrs: Vec<Attr>) {
        self.at = self.graph.add_op(op, inputs, attrs, op);
    }

    fn microsoft(&mut self, op: &str, inputs: &[Option<ValueId>], attrs: Vec<Attr>) {
        let out = self.graph.add_value(op);
        let node = vitrim::graph::NewNode {
            name: String::new(),
            op: op.into(),
            domain: "com.microsoft".into(),
            inputs: inputs.to_vec(),
            outputs: vec![Some(out)],
            attrs,
            ..Default::default()
        };
        self.graph.add_node(node);
        self.at = out;
    }

    fn add_bias(&mut self, units: usize) {
        let bias = self.floats("bias", &[units], -0.5, 0.5);
        self.op("Add", &[self.at, bias], vec![]);
    }

    fn done(mut self, width: usize) -> Graph {
        self.graph.rename(self.at, "y");
        let dims = vec![DeclaredDim::Symbol("batch".into()), DeclaredDim::Size(width as i64)];
        self.graph.add_output(self.at, declare(DType::F32, dims));
        self.graph
    }
}

fn int(name: &str, value: usize) -> Attr {
    attr(name, AttrValue::Int(value as i64))
}

/// Keeps these units of the only group, and compares with the twin.
fn check(graph: &Graph, kept: &[usize]) -> slice::Sliced {
    let (facts, anatomy) = pipeline::analyse(graph).unwrap();
    let group = match &anatomy.groups[..] {
        [group] => group,
        groups => panic!("{} groups, refused: {:?}", groups.len(), anatomy.refused),
    };
    assert_eq!(group.units(), UNITS);
    let kept: Kept = [(group.id.clone(), kept.to_vec())].into();
    let sliced = slice::apply(graph, &facts, &anatomy, &kept, &pipeline::analyse).unwrap();
    let twin = slice::twin::build(graph, &facts, &anatomy, &kept, &sliced, &BTreeSet::new());
    if has_ort() {
        let x = vec![("x".to_string(), f32s(&[3, WIDTH], Random(9).f32s(3 * WIDTH, -1.0, 1.0)))];
        let run = |graph: &Graph| output(&as_written(graph).run(&x).unwrap(), "y").as_f32();
        let (out, of_twin, whole) = (run(&sliced.graph), run(&twin), run(graph));
        let error = relative_error(&out, &of_twin);
        assert!(error < 1e-5, "{error}");
        assert!(relative_error(&whole, &of_twin) > 1e-3, "the units do not matter");
    }
    sliced
}

/// Without fusions, which quantize activations in blocks of their own.
fn as_written(graph: &Graph) -> Box<dyn Session> {
    let options = SessionOptions { threads: 1, optimize: Optimize::Off, ..SessionOptions::default() };
    open(RuntimeName::Ort, &vitrim::onnx::to_bytes(graph).unwrap(), &options).unwrap()
}

fn dims(graph: &Graph, name: &str) -> Vec<usize> {
    graph.constant(graph.find(name).unwrap()).unwrap().dims
}

fn some_units() -> Vec<usize> {
    (0..UNITS).filter(|u| u % 5 < 3).collect()
}

/// Weights of one byte with a scale and zero point for each column, or of one for all.
fn dequantized(net: &mut Net, name: &str, shape: &[usize], per_channel: bool) -> ValueId {
    let q = net.bytes(name, DType::U8, shape);
    let parameters = if per_channel { vec![shape[1]] } else { vec![] };
    let scale = net.floats(&format!("{name}_scale"), &parameters, 0.002, 0.004);
    let zero = net.bytes(&format!("{name}_zero"), DType::U8, &parameters);
    net.op("DequantizeLinear", &[q, scale, zero], vec![int("axis", 1)]);
    net.at
}

fn qdq_mlp(per_channel: bool) -> Graph {
    let mut net = Net::new(17);
    let x = net.at;
    let w1 = dequantized(&mut net, "w1", &[WIDTH, UNITS], per_channel);
    net.op("MatMul", &[x, w1], vec![]);
    net.add_bias(UNITS);
    // 0.5 at a removed unit, which only its zeroed rows of w2 make nothing of.
    net.op("Sigmoid", &[net.at], vec![]);
    let (scale, zero) = (net.floats("s", &[], 0.004, 0.0041), net.byte("z", 3));
    net.op("QuantizeLinear", &[net.at, scale, zero], vec![]);
    net.op("DequantizeLinear", &[net.at, scale, zero], vec![]);
    let hidden = net.at;
    let w2 = dequantized(&mut net, "w2", &[UNITS, 8], per_channel);
    net.op("MatMul", &[hidden, w2], vec![]);
    net.done(8)
}

#[test]
fn scales_and_zero_points_are_cut_with_their_axis() {
    let sliced = check(&qdq_mlp(true), &some_units());
    let left = some_units().len();
    for (name, expected) in [("w1", vec![WIDTH, left]), ("w1_scale", vec![left]), ("w1_zero", vec![left]), ("w2", vec![left, 8])]
    {
        assert_eq!(dims(&sliced.graph, name), expected, "{name}");
    }
    assert_eq!(dims(&sliced.graph, "w2_scale"), [8]);
    assert_eq!(dims(&check(&qdq_mlp(false), &some_units()).graph, "w1_scale"), [0usize; 0]);
}

/// Scale and zero point of a value.
fn parameters(net: &mut Net, name: &str, scale: f32, zero: u8) -> [ValueId; 2] {
    let scale = net.graph.add_initializer(&format!("{name}_scale"), Tensor::f32(&[], &[scale]));
    [scale, net.byte(&format!("{name}_zero"), zero)]
}

/// Rows that attend to each other, in integers up to the logits: q and k are products with a bias added behind them.
fn integer_logits() -> Graph {
    let mut net = Net::new(17);
    let tokens = net.graph.add_initializer("tokens", Tensor::i64s(&[1, -1, WIDTH as i64]));
    net.op("Reshape", &[net.at, tokens], vec![]);
    let x = net.at;
    let [scale, zero] = parameters(&mut net, "x", 0.008, 128);
    net.op("QuantizeLinear", &[x, scale, zero], vec![]);
    let rows = [net.at, scale, zero];
    let q = projected(&mut net, rows, "q");
    let k = projected(&mut net, rows, "k");
    net.op("Transpose", &[k[0]], vec![attr("perm", AttrValue::Ints(vec![0, 2, 1]))]);
    let (columns, logits) = (net.at, parameters(&mut net, "logits", 0.25, 128));
    net.op("QLinearMatMul", &[&q[..], &[columns], &k[1..], &logits[..]].concat(), vec![]);
    net.op("DequantizeLinear", &[net.at, logits[0], logits[1]], vec![]);
    net.op("Softmax", &[net.at], vec![]);
    let (weights, wv) = (net.at, net.floats("wv", &[WIDTH, 8], -1.0, 1.0));
    net.op("MatMul", &[x, wv], vec![]);
    net.op("MatMul", &[weights, net.at], vec![]);
    let rows = net.graph.add_initializer("rows", Tensor::i64s(&[-1, 8]));
    net.op("Reshape", &[net.at, rows], vec![]);
    net.done(8)
}

fn projected(net: &mut Net, rows: [ValueId; 3], name: &str) -> [ValueId; 3] {
    let weight = net.bytes(&format!("{name}_weight"), DType::I8, &[WIDTH, UNITS]);
    let scale = net.graph.add_initializer(&format!("{name}_weight_scale"), Tensor::f32(&[], &[0.002]));
    let zero = net.bytes(&format!("{name}_weight_zero"), DType::I8, &[]);
    let product = parameters(net, &format!("{name}_product"), 0.02, 120);
    net.op("QLinearMatMul", &[&rows[..], &[weight, scale, zero], &product[..]].concat(), vec![]);
    let at = net.at;
    let bias = net.bytes(&format!("{name}_bias"), DType::U8, &[UNITS]);
    let [bias_scale, bias_zero] = parameters(net, &format!("{name}_bias"), 0.01, 148);
    let sum = parameters(net, name, 0.03, 131);
    let inputs = [bias, bias_scale, bias_zero, at, product[0], product[1], sum[0], sum[1]];
    net.microsoft("QLinearAdd", &inputs.map(Some), vec![]);
    [net.at, sum[0], sum[1]]
}

#[test]
fn a_bias_in_integers_is_removed_at_its_zero_point() {
    let (graph, kept) = (integer_logits(), some_units());
    check(&graph, &kept);
    // A raw 0 is not zero, but the least number that the bias can stand for: what it adds to the logits of a row is the same for all
    // columns, and a softmax of reals would not see it; one of integers does, which are rounded and end at 0 and 255.
    let raw = |graph: &Graph, name: &str| -> Tensor {
        let tensor = graph.constant(graph.find(name).unwrap()).unwrap();
        let byte = |unit: usize| if kept.contains(&unit) { tensor.bytes[unit] } else { 0 };
        Tensor { bytes: (0..UNITS).map(byte).collect::<Vec<u8>>().into(), ..tensor.clone() }
    };
    let (facts, anatomy) = pipeline::analyse(&graph).unwrap();
    let plan: Kept = [(anatomy.groups[0].id.clone(), kept.clone())].into();
    let sliced = slice::apply(&graph, &facts, &anatomy, &plan, &pipeline::analyse).unwrap();
    let twin = slice::twin::build(&graph, &facts, &anatomy, &plan, &sliced, &BTreeSet::new());
    let mut zeroed = twin.clone();
    for name in ["q_bias", "k_bias"] {
        let in_twin = twin.constant(twin.find(name).unwrap()).unwrap();
        assert!((0..UNITS).filter(|u| !kept.contains(u)).all(|u| in_twin.bytes[u] == 148), "{name}");
        zeroed.set_constant(twin.find(name).unwrap(), raw(&twin, name));
    }
    if has_ort() {
        let x = vec![("x".to_string(), f32s(&[3, WIDTH], Random(9).f32s(3 * WIDTH, -1.0, 1.0)))];
        let run = |graph: &Graph| output(&as_written(graph).run(&x).unwrap(), "y").as_f32();
        assert!(relative_error(&run(&zeroed), &run(&twin)) > 1e-2);
    }
}

#[test]
fn blocks_of_dequantized_rows_go_whole_or_halved() {
    let mut net = Net::new(21);
    let x = net.at;
    let w1 = net.floats("w1", &[WIDTH, UNITS], -1.0, 1.0);
    net.op("MatMul", &[x, w1], vec![]);
    net.op("Relu", &[net.at], vec![]);
    let hidden = net.at;
    let w2 = net.bytes("w2", DType::I4, &[UNITS, 8]);
    let scale = net.floats("scale", &[UNITS / 32, 8], 0.1, 0.2);
    net.op("DequantizeLinear", &[w2, scale], vec![int("axis", 0), int("block_size", 32)]);
    net.op("MatMul", &[hidden, net.at], vec![]);
    let graph = net.done(8);
    let (_, anatomy) = pipeline::analyse(&graph).unwrap();
    assert_eq!(anatomy.groups[0].bundle(17), (16..32).collect::<Vec<_>>());
    let whole = check(&graph, &(32..96).collect::<Vec<_>>());
    assert_eq!(dims(&whole.graph, "scale"), [2, 8]);
    let half = check(&graph, &(0..80).filter(|u| u / 16 != 2).collect::<Vec<_>>());
    assert_eq!((dims(&half.graph, "w2"), dims(&half.graph, "scale")), (vec![64, 8], vec![4, 8]));
}

fn n_bits(units: usize, bits: usize, block: usize, level: usize, flat: bool) -> Graph {
    let mut net = Net::new(17);
    let blocks = |k: usize| k.div_ceil(block);
    let weight = |net: &mut Net, name: &str, k: usize, n: usize| {
        let b = net.bytes(name, DType::U8, &[n, blocks(k), block * bits / 8]);
        let shape = if flat { vec![n * blocks(k)] } else { vec![n, blocks(k)] };
        let scales = net.floats(&format!("{name}_scales"), &shape, 0.01, 0.02);
        let bytes = (blocks(k) * bits).div_ceil(8);
        let shape = if flat { vec![n * bytes] } else { vec![n, bytes] };
        let zeros = net.bytes(&format!("{name}_zeros"), DType::U8, &shape);
        let attrs = vec![int("K", k), int("N", n), int("bits", bits), int("block_size", block), int("accuracy_level", level)];
        net.microsoft("MatMulNBits", &[Some(net.at), Some(b), Some(scales), Some(zeros)], attrs);
    };
    weight(&mut net, "w1", WIDTH, units);
    net.add_bias(units);
    net.op("Relu", &[net.at], vec![]);
    weight(&mut net, "w2", units, 8);
    net.done(8)
}

#[test]
fn packed_blocks_drop_out_of_all_constants() {
    for flat in [false, true] {
        let graph = n_bits(UNITS, 4, 32, 0, flat);
        let whole = check(&graph, &(32..96).collect::<Vec<_>>());
        assert_eq!((dims(&whole.graph, "w1"), dims(&whole.graph, "w2")), (vec![64, 1, 16], vec![8, 2, 16]));
        let half = check(&graph, &(0..80).filter(|u| u / 16 != 2).collect::<Vec<_>>());
        assert_eq!(dims(&half.graph, "w2"), [8, 4, 8]);
        assert_eq!(dims(&half.graph, "w2_zeros"), if flat { vec![16] } else { vec![8, 2] });
    }
    check(&n_bits(UNITS, 8, 16, 0, false), &(16..64).collect::<Vec<_>>());
    // Activations are quantized along the blocks as well: they stay as long as they are.
    let (_, anatomy) = pipeline::analyse(&n_bits(UNITS, 4, 32, 4, false)).unwrap();
    assert_eq!(anatomy.groups[0].bundle(17), (0..32).collect::<Vec<_>>());
}

#[test]
fn units_that_share_a_block_are_put_back_among_zeros() {
    // One block of 128 holds all units: no run of them fills blocks that remain.
    let mut net = Net::new(17);
    let x = net.at;
    let (w1, b) = (net.floats("w1", &[WIDTH, UNITS], -1.0, 1.0), net.bytes("w2", DType::U8, &[8, 1, 64]));
    net.op("MatMul", &[x, w1], vec![]);
    net.op("Tanh", &[net.at], vec![]);
    let (scales, groups) = (net.floats("scales", &[8, 1], 0.01, 0.02), net.graph.add_initializer("groups", group_index()));
    let attrs = vec![int("K", UNITS), int("N", 8), int("bits", 4), int("block_size", 128)];
    net.microsoft("MatMulNBits", &[Some(net.at), Some(b), Some(scales), None, Some(groups)], attrs);
    let graph = net.done(8);
    let kept: Vec<usize> = (0..UNITS).filter(|u| u / 16 % 2 == 0).collect();
    let sliced = check(&graph, &kept);
    assert_eq!((dims(&sliced.graph, "w1"), dims(&sliced.graph, "w2")), (vec![WIDTH, 48], vec![8, 1, 64]));
    assert!(sliced.graph.nodes().any(|(_, n)| n.op() == "Pad"));
}

fn group_index() -> Tensor {
    Tensor::new(DType::I32, vec![UNITS], vec![0u8; 4 * UNITS].into())
}

fn dynamic(activation: &str) -> Graph {
    let mut net = Net::new(17);
    let x = net.at;
    let w1 = net.floats("w1", &[WIDTH, UNITS], -1.0, 1.0);
    net.op("MatMul", &[x, w1], vec![]);
    net.op(activation, &[net.at], vec![]);
    let w2 = net.bytes("w2", DType::I8, &[UNITS, 8]);
    let (scale, zero) = (net.floats("scale", &[8], 0.01, 0.02), net.bytes("zero", DType::I8, &[8]));
    net.microsoft("DynamicQuantizeMatMul", &[Some(net.at), Some(w2), Some(scale), Some(zero)], vec![]);
    net.done(8)
}

#[test]
fn a_range_over_all_units_asks_for_zeros() {
    check(&dynamic("Relu"), &some_units());
    let (_, anatomy) = pipeline::analyse(&dynamic("Sigmoid")).unwrap();
    assert!(anatomy.groups.is_empty());
    let reasons: Vec<&str> = anatomy.refused.iter().map(|r| r.reason.as_str()).collect();
    assert!(reasons.iter().any(|r| r.contains("range of the whole value")), "{reasons:?}");
}

#[test]
fn a_gradient_through_quantized_values_is_refused_by_name() {
    use vitrim::autodiff::{AutodiffError, differentiate};
    let mut graph = qdq_mlp(false);
    let y = graph.find("y").unwrap();
    let loss = vitrim::graph::build::Builder::new(&mut graph, "loss").reduce_sum(y, &[0, 1], false);
    let facts = vitrim::infer::facts(&graph).unwrap();
    let bias = graph.find("bias").unwrap();
    match differentiate(&mut graph, &facts, loss, &[bias]) {
        Err(AutodiffError::NoGradient { op, reason, .. }) => {
            assert!(op == "DequantizeLinear" && reason.contains("quantized"), "{op}: {reason}");
        }
        other => panic!("{other:?}"),
    }
}
