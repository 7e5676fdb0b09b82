//! Operators on quantized numbers: `x = (q - zero point) * scale`.
//!
//! A quantized value is cut as the float value it stands for, scales and zero points along with it where there is one per position.
//! A removed unit is zero in the twin: its quantized constants hold their zero point there ([`part_at`]), so a product with them adds
//! nothing, whatever integer the activation is. Quantizing activations keeps a zero, because the zero point is one of the integers.
//! Nothing here has a gradient: a step function has none, and quantized weights do not train.

pub mod blocks;
pub mod conv;
pub mod linear;
pub mod matmul;
pub mod pointwise;
pub mod values;

use super::Grad;
use super::matmul::gemm_layout;
use crate::graph::Node;
use crate::infer::{Fact, InferCx, normalize_axis};

/// The domain of what is not in the standard.
const MICROSOFT: &str = "com.microsoft";

/// Why there is no gradient.
const NO_GRAD: Grad = Grad::No("quantized numbers have no gradient: train the model before");

/// What a constant is to a node that reads it as part of quantized numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The integers; their zero point is at this slot, and is 0 where that is left out.
    Data {
        /// Slot of the scale, where the node has it.
        scale: Option<usize>,
        /// Slot of the zero point.
        zero_point: usize,
    },
    /// A scale or a zero point.
    Parameter,
}

/// Data and zero point slots of each operator whose zero points are values of the graph; all other inputs but those that `OTHERS`
/// lists are scales and zero points.
const DATA: &[(&str, &[(usize, usize)])] = &[
    ("ConvInteger", &[(0, 2), (1, 3)]),
    ("DequantizeLinear", &[(0, 2)]),
    ("DynamicQuantizeMatMul", &[(1, 3)]),
    ("MatMulInteger", &[(0, 2), (1, 3)]),
    ("MatMulIntegerToFloat", &[(0, 4), (1, 5)]),
    ("QGemm", &[(0, 2), (3, 5)]),
    ("QLinearAdd", &[(0, 2), (3, 5)]),
    ("QLinearConv", &[(0, 2), (3, 5)]),
    ("QLinearMatMul", &[(0, 2), (3, 5)]),
    ("QLinearMul", &[(0, 2), (3, 5)]),
    ("QLinearWhere", &[(1, 3), (4, 6)]),
];

/// Inputs of those operators that are plain: floats, conditions, and the accumulators' bias, whose zero is 0.
const OTHERS: &[(&str, usize)] = &[
    ("DynamicQuantizeMatMul", 0),
    ("DynamicQuantizeMatMul", 4),
    ("MatMulIntegerToFloat", 6),
    ("QGemm", 6),
    ("QLinearConv", 8),
    ("QLinearWhere", 0),
];

/// Whether an operator has a record here: it reads or makes quantized numbers.
pub fn is_quantized(domain: &str, op: &str) -> bool {
    let domain = if domain == "ai.onnx" { "" } else { domain };
    let families = [linear::RULES, matmul::RULES, conv::RULES, pointwise::RULES, blocks::RULES];
    families.into_iter().flatten().any(|r| r.name == op && r.domain == domain)
}

/// What an input is in quantized numbers; `None` where it is none of them.
pub fn part_at(domain: &str, op: &str, slot: usize) -> Option<Part> {
    if !matches!(domain, "" | "ai.onnx" | MICROSOFT) {
        return None;
    }
    if op == "QuantizeLinear" {
        return (slot > 0).then_some(Part::Parameter);
    }
    let (_, data) = DATA.iter().find(|(name, _)| *name == op)?;
    if let Some((_, zero_point)) = data.iter().find(|(d, _)| *d == slot) {
        let scale = match op {
            "MatMulInteger" | "ConvInteger" => None,
            "MatMulIntegerToFloat" => Some(zero_point - 2),
            _ => Some(zero_point - 1),
        };
        return Some(Part::Data { scale, zero_point: *zero_point });
    }
    (!OTHERS.contains(&(op, slot))).then_some(Part::Parameter)
}

/// Axis of the integers at `slot` along which there is one scale or zero point per position, where there are several.
fn parameter_axis(node: &Node, slot: usize, dims: &[usize]) -> Option<usize> {
    match (node.op(), slot) {
        ("DequantizeLinear", _) => normalize_axis(node.attr_int("axis").unwrap_or(1), dims.len()),
        ("QLinearConv" | "ConvInteger", _) => Some(0),
        ("QGemm", 3) => Some(gemm_layout(node).1.1),
        // Of a left operand per row, of a right one per column.
        (_, 0) => dims.len().checked_sub(2),
        _ => dims.len().checked_sub(1),
    }
}

/// The operands of a product of two values: slots 0 and 1, or where a quantized operator has them.
pub fn operands(op: &str) -> (usize, usize) {
    if matches!(op, "QLinearMatMul" | "QLinearConv" | "QGemm") { (0, 3) } else { (0, 1) }
}

/// The fact of a quantized output: of the type of its zero point, or of `x` where that is left out.
fn quantized(cx: &InferCx<'_>, zero_point: usize, fact: Fact) -> Vec<Fact> {
    vec![Fact { dtype: cx.dtype(zero_point).or(fact.dtype), ..fact }]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_know_their_zero_point() {
        assert_eq!(part_at("", "DequantizeLinear", 0), Some(Part::Data { scale: Some(1), zero_point: 2 }));
        assert_eq!(part_at("", "QLinearConv", 3), Some(Part::Data { scale: Some(4), zero_point: 5 }));
        assert_eq!(part_at("", "MatMulInteger", 1), Some(Part::Data { scale: None, zero_point: 3 }));
        assert_eq!(part_at("", "QLinearConv", 4), Some(Part::Parameter));
        assert_eq!(part_at("", "QLinearConv", 8), None);
        assert_eq!((part_at("", "QuantizeLinear", 0), part_at("", "QuantizeLinear", 1)), (None, Some(Part::Parameter)));
        assert_eq!((part_at("", "MatMul", 1), part_at("com.example", "QGemm", 3)), (None, None));
    }
}
