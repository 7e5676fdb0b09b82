//! What a model computes in, which decides the tolerance, and whether it computes the same each time.
//!
//! Example: a graph with a float16 weight has tolerance 2e-2; one with a DequantizeLinear 1e-2; one with both the wider of them.

use std::collections::BTreeSet;

use crate::graph::{AttrValue, DType, Graph, Node, NodeId, ValueId};

/// The tolerance of an exactness check in units of each output's largest magnitude.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    /// Relative to max|b|.
    pub relative: f64,
    /// What it is for: `float32`, `float16`, `bfloat16`, `quantized weights`.
    pub number_format: &'static str,
    /// Whether operators on quantized numbers are in it.
    pub is_quantized: bool,
}

/// Operators that compute with quantized weights, beside those whose names start with `QLinear`.
const QUANTIZED: [&str; 15] = [
    "DequantizeLinear",
    "QuantizeLinear",
    "DynamicQuantizeLinear",
    "MatMulInteger",
    "ConvInteger",
    "MatMulNBits",
    "MatMulBnb4",
    "GatherBlockQuantized",
    "QGemm",
    "QAttention",
    "DynamicQuantizeMatMul",
    "MatMulIntegerToFloat",
    "DynamicQuantizeLSTM",
    "QEmbedLayerNormalization",
    "QOrderedMatMul",
];

/// The tolerance of a model, by its constants, its inputs and its operators.
pub fn tolerance(graph: &Graph) -> Tolerance {
    let mut types: BTreeSet<DType> = BTreeSet::new();
    types.extend(graph.initializers().iter().filter_map(|v| graph.value(*v).initializer()).map(|t| t.dtype));
    types.extend(graph.inputs().iter().filter_map(|v| graph.value(*v).declared()?.dtype));
    let mut quantized = false;
    for (_, node) in graph.nodes() {
        quantized |= QUANTIZED.contains(&node.op()) || node.op().starts_with("QLinear");
        types.extend(node.attrs().iter().filter_map(|a| match &a.value {
            AttrValue::Tensor(t) => Some(t.dtype),
            _ => None,
        }));
    }
    let candidates = [
        (quantized, 1e-2, "quantized weights"),
        (types.contains(&DType::F16), 2e-2, "float16"),
        (types.contains(&DType::BF16), 6e-2, "bfloat16"),
    ];
    let widest = candidates.into_iter().rfind(|(is_there, ..)| *is_there);
    let (_, relative, number_format) = widest.unwrap_or((true, 1e-4, "float32"));
    Tolerance { relative, number_format, is_quantized: quantized }
}

/// The first node in the path of an output that gives other numbers at each run.
pub fn random_node(graph: &Graph) -> Option<NodeId> {
    let mut needed: BTreeSet<ValueId> = graph.outputs().iter().copied().collect();
    let mut found = None;
    for id in graph.order().iter().rev() {
        let node = graph.node(*id);
        if !node.outputs().iter().flatten().any(|v| needed.contains(v)) {
            continue;
        }
        if is_random(graph, node) {
            found = Some(*id);
        }
        needed.extend(node.inputs().iter().flatten().chain(node.captures()));
    }
    found
}

fn is_random(graph: &Graph, node: &Node) -> bool {
    let draws = match node.op() {
        "RandomUniform" | "RandomNormal" | "RandomUniformLike" | "RandomNormalLike" | "Multinomial" | "Bernoulli" => true,
        // Input 2 switches it on; left out, it passes its input through.
        "Dropout" => match node.input(2) {
            None => false,
            Some(mode) => graph.constant(mode).and_then(|t| t.to_i64s()).is_none_or(|v| v != [0]),
        },
        _ => false,
    };
    draws && matches!(node.domain(), "" | "ai.onnx") && node.attr("seed").is_none()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::build::{Builder, attr};
    use crate::graph::{Declared, Tensor};

    fn with(op: &str, weight: DType) -> Graph {
        let mut graph = Graph::new(8, vec![(String::new(), 17)], bytes::Bytes::new());
        let x = graph.add_value("x");
        graph.add_input(x, Declared { dtype: Some(DType::F32), dims: None, extra: bytes::Bytes::new() });
        graph.add_initializer("w", Tensor::new(weight, vec![0], bytes::Bytes::new()));
        let y = graph.add_op(op, &[x], vec![], "y");
        graph.add_output(y, Declared { dtype: Some(DType::F32), dims: None, extra: bytes::Bytes::new() });
        graph
    }

    #[test]
    fn the_tolerance_follows_what_the_model_is_made_of() {
        let cases = [
            ("Relu", DType::F32, 1e-4),
            ("Relu", DType::F16, 2e-2),
            ("Relu", DType::BF16, 6e-2),
            ("DequantizeLinear", DType::F32, 1e-2),
            ("QLinearMatMul", DType::I8, 1e-2),
            ("MatMulNBits", DType::F16, 2e-2),
        ];
        for (op, dtype, expected) in cases {
            assert_eq!(tolerance(&with(op, dtype)).relative, expected, "{op} {dtype:?}");
        }
    }

    #[test]
    fn random_operators_count_only_in_the_path_of_an_output_and_without_a_seed() {
        assert!(random_node(&with("Relu", DType::F32)).is_none());
        let mut graph = with("RandomNormalLike", DType::F32);
        let node = random_node(&graph).expect("it has no seed");
        assert_eq!(graph.node(node).op(), "RandomNormalLike");
        graph.set_attr(node, "seed", AttrValue::Float(1.0));
        assert!(random_node(&graph).is_none());
        let mut aside = with("Relu", DType::F32);
        Builder::new(&mut aside, "z").op("RandomUniform", &[], vec![attr("shape", AttrValue::Ints(vec![1]))]);
        assert!(random_node(&aside).is_none());
    }
}
