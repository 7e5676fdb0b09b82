//! Which operators carry a zero on: of what inputs the output is zero where they are.
//!
//! For quantized values zero is what the zero point stands for. An operator that is not listed makes something of zero that is not
//! known here, as `Exp` and `Sigmoid` do, and `Add` with a number. Used where a removed unit must be zero on its way, not at its sink.

use crate::graph::{Graph, Node};

/// The output is zero at a position where one of `factors` is, and all of `terms` are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Zeros {
    /// Input slots of which one suffices. Without any, the terms decide.
    pub factors: Vec<usize>,
    /// Input slots that must all be zero, or left out.
    pub terms: Vec<usize>,
    /// Input slots that must be zero where they have the position at all.
    pub parts: Vec<usize>,
}

/// Operators whose output is zero where their first input is.
const FIRST: &[&str] = &[
    "Abs",
    "AveragePool",
    "Cast",
    "CastLike",
    "Ceil",
    "Celu",
    "CumSum",
    "DepthToSpace",
    "DequantizeLinear",
    "Div",
    "Dropout",
    "DynamicQuantizeLinear",
    "Elu",
    "Erf",
    "Expand",
    "Flatten",
    "Floor",
    "Gather",
    "Gelu",
    "GlobalAveragePool",
    "GlobalMaxPool",
    "HardSwish",
    "Identity",
    "LeakyRelu",
    "LpNormalization",
    "MaxPool",
    "Mish",
    "Neg",
    "PRelu",
    "QuantizeLinear",
    "QuickGelu",
    "RMSNormalization",
    "ReduceL1",
    "ReduceL2",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceSum",
    "ReduceSumSquare",
    "Relu",
    "Reshape",
    "Resize",
    "RotaryEmbedding",
    "Round",
    "Selu",
    "Sign",
    "SimplifiedLayerNormalization",
    "Sin",
    "Slice",
    "SpaceToDepth",
    "Split",
    "Sqrt",
    "Squeeze",
    "Swish",
    "Tanh",
    "ThresholdedRelu",
    "Tile",
    "Transpose",
    "Trilu",
    "Unsqueeze",
];

/// Operators whose output is zero where all their inputs are.
const SUMS: &[&str] = &["Add", "BiasGelu", "FastGelu", "Max", "Mean", "Min", "Sub", "Sum"];

/// Operator, factors, terms.
const PRODUCTS: &[(&str, &[usize], &[usize])] = &[
    ("Attention", &[2], &[]),
    ("BatchNormalization", &[1], &[2]),
    ("Conv", &[0, 1], &[2]),
    ("ConvInteger", &[0, 1], &[]),
    ("ConvTranspose", &[0, 1], &[2]),
    ("DynamicQuantizeMatMul", &[0, 1], &[4]),
    ("Einsum", &[0, 1, 2, 3], &[]),
    ("FusedMatMul", &[0, 1], &[]),
    ("Gemm", &[0, 1], &[2]),
    ("MatMul", &[0, 1], &[]),
    ("MatMulInteger", &[0, 1], &[]),
    ("MatMulIntegerToFloat", &[0, 1], &[6]),
    ("MatMulNBits", &[1], &[5]),
    ("Mul", &[0, 1], &[]),
    ("MultiHeadAttention", &[2], &[]),
    ("Pad", &[], &[0, 2]),
    ("QGemm", &[0, 3], &[6]),
    ("QLinearAdd", &[], &[0, 3]),
    ("QLinearConv", &[0, 3], &[8]),
    ("QLinearMatMul", &[0, 3], &[]),
    ("QLinearMul", &[0, 3], &[]),
    ("Where", &[], &[1, 2]),
];

/// What makes the output of an operator zero; `None` where nothing is known to.
pub fn of(domain: &str, op: &str, inputs: usize) -> Option<Zeros> {
    if !matches!(domain, "" | "ai.onnx" | "com.microsoft") {
        return None;
    }
    if FIRST.contains(&op) {
        return Some(Zeros { factors: vec![0], ..Zeros::default() });
    }
    if SUMS.contains(&op) {
        return Some(Zeros { terms: (0..inputs).collect(), ..Zeros::default() });
    }
    if op == "Concat" {
        return Some(Zeros { parts: (0..inputs).collect(), ..Zeros::default() });
    }
    let (_, factors, terms) = PRODUCTS.iter().find(|(name, ..)| *name == op)?;
    Some(Zeros { factors: factors.to_vec(), terms: terms.to_vec(), parts: Vec::new() })
}

/// Input slots at which a zero makes the output infinite, or no number.
pub fn poles(graph: &Graph, node: &Node) -> &'static [usize] {
    if !matches!(node.domain(), "" | "ai.onnx") {
        return &[];
    }
    let is_negative = |slot: usize| {
        let exponent = node.input(slot).and_then(|v| graph.constant(v)).and_then(|t| t.to_f32s());
        exponent.is_some_and(|e| e.iter().any(|x| *x < 0.0))
    };
    match node.op() {
        "Div" => &[1],
        "Reciprocal" | "Log" => &[0],
        "Pow" if is_negative(1) => &[0],
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_listed_keeps_a_zero() {
        assert_eq!(of("", "Mul", 2).map(|z| z.factors), Some(vec![0, 1]));
        assert_eq!(of("", "Add", 2).map(|z| z.terms), Some(vec![0, 1]));
        for op in ["Exp", "Sigmoid", "Softmax", "Cos", "LayerNormalization", "Clip", "Pow"] {
            assert_eq!(of("", op, 1), None, "{op}");
        }
        assert_eq!(of("com.example", "Mul", 2), None);
    }
}
