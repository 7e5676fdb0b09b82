//! Which operators have a CUDA kernel in ONNX Runtime, and for which types.
//!
//! A training graph that holds an operator without one would copy its data to the host and back at every step.
//! Source: docs/OperatorKernels.md of microsoft/onnxruntime, commit 001d12d2, section CUDAExecutionProvider, domain ai.onnx.

use crate::graph::{DType, Graph, NodeId};
use crate::infer::Facts;

/// An operator with a CUDA kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Operator type, default domain.
    pub op: &'static str,
    /// First opset of the default domain with a float32 kernel.
    pub since: i64,
    /// First opset with a bfloat16 kernel; none where there is no such kernel. float16 goes with float32 throughout.
    pub bfloat16_since: Option<i64>,
}

const fn fh(op: &'static str, since: i64) -> Kernel {
    Kernel { op, since, bfloat16_since: None }
}

const fn fhb(op: &'static str, since: i64, bfloat16_since: i64) -> Kernel {
    Kernel { op, since, bfloat16_since: Some(bfloat16_since) }
}

/// The kernels whose data may be float32, in alphabetical order.
pub static KERNELS: &[Kernel] = &[
    fhb("Abs", 6, 13),
    fhb("Add", 7, 13),
    fhb("Attention", 23, 23),
    fhb("AveragePool", 7, 22),
    fh("BatchNormalization", 7),
    fhb("Cast", 6, 13),
    fh("Ceil", 6),
    fh("Clip", 6),
    fhb("Concat", 4, 4),
    fhb("ConstantOfShape", 9, 9),
    fhb("Conv", 1, 22),
    fh("ConvTranspose", 1),
    fh("Cos", 7),
    fh("CumSum", 11),
    fh("DepthToSpace", 1),
    fhb("Div", 7, 13),
    fhb("Dropout", 7, 13),
    fh("Einsum", 12),
    fh("Elu", 6),
    fh("Equal", 11),
    fhb("Erf", 9, 13),
    fhb("Exp", 6, 13),
    fhb("Expand", 8, 8),
    fhb("Flatten", 1, 1),
    fh("Floor", 6),
    fhb("Gather", 1, 1),
    fhb("GatherElements", 11, 11),
    fhb("GatherND", 11, 13),
    fhb("Gelu", 20, 20),
    fhb("Gemm", 7, 13),
    fh("GlobalAveragePool", 1),
    fh("GlobalMaxPool", 1),
    fh("Greater", 7),
    fh("GreaterOrEqual", 12),
    fhb("HardSigmoid", 6, 22),
    fhb("HardSwish", 14, 22),
    fhb("Identity", 1, 1),
    fh("InstanceNormalization", 6),
    fhb("IsInf", 10, 20),
    fhb("IsNaN", 9, 13),
    fhb("LayerNormalization", 1, 1),
    fh("LeakyRelu", 6),
    fh("Less", 7),
    fh("LessOrEqual", 12),
    fh("Log", 6),
    fh("LogSoftmax", 1),
    fhb("MatMul", 1, 13),
    fhb("Max", 6, 6),
    fh("MaxPool", 1),
    fhb("Min", 6, 6),
    fhb("Mod", 10, 13),
    fhb("Mul", 7, 13),
    fhb("Neg", 6, 13),
    fh("OneHot", 11),
    fh("PRelu", 7),
    fh("Pad", 2),
    fhb("Pow", 7, 13),
    fhb("RMSNormalization", 23, 23),
    fh("Range", 11),
    fh("Reciprocal", 6),
    fh("ReduceL1", 1),
    fh("ReduceL2", 1),
    fh("ReduceLogSum", 1),
    fh("ReduceLogSumExp", 1),
    fh("ReduceMax", 1),
    fh("ReduceMean", 1),
    fh("ReduceMin", 1),
    fh("ReduceProd", 1),
    fhb("ReduceSum", 1, 13),
    fh("ReduceSumSquare", 1),
    fhb("Relu", 6, 13),
    fhb("Reshape", 1, 1),
    fh("Resize", 10),
    fhb("RotaryEmbedding", 23, 23),
    fh("Round", 11),
    fhb("ScatterElements", 11, 11),
    fhb("ScatterND", 11, 11),
    fh("Selu", 6),
    fhb("Shape", 1, 1),
    fhb("Sigmoid", 6, 13),
    fhb("Sign", 13, 13),
    fh("Sin", 7),
    fhb("Size", 1, 1),
    fhb("Slice", 1, 1),
    fhb("Softmax", 1, 13),
    fh("Softplus", 1),
    fh("Softsign", 1),
    fh("SpaceToDepth", 1),
    fhb("Split", 2, 2),
    fhb("Sqrt", 6, 13),
    fhb("Squeeze", 1, 1),
    fhb("Sub", 7, 13),
    fhb("Sum", 6, 13),
    fhb("Tanh", 6, 13),
    fhb("Tile", 6, 13),
    fh("TopK", 1),
    fhb("Transpose", 1, 1),
    fhb("Trilu", 14, 14),
    fhb("Unsqueeze", 1, 1),
    fhb("Where", 9, 16),
];

/// The kernel of an operator of the default domain.
pub fn kernel(op: &str) -> Option<&'static Kernel> {
    KERNELS.binary_search_by(|k| k.op.cmp(op)).ok().map(|i| &KERNELS[i])
}

/// Nodes that compute on floats and for which CUDA has no kernel, in order. `facts` are those of this graph: a value
/// of unknown type counts as float. Shape arithmetic on integers runs on the host by design and is not looked at.
pub fn nodes_without_kernel(graph: &Graph, facts: &Facts) -> Vec<NodeId> {
    let lacks = |id: NodeId| {
        let node = graph.node(id);
        let mut values = node.inputs().iter().chain(node.outputs()).flatten();
        let is_float = values.any(|v| facts.get(*v).dtype.is_none_or(DType::is_float));
        let opset = graph.opset("").unwrap_or(0);
        let known = node.op() == "Constant" || kernel(node.op()).is_some_and(|k| k.since <= opset);
        is_float && !(node.domain().is_empty() && known)
    };
    graph.order().iter().copied().filter(|id| lacks(*id)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted_so_that_every_entry_is_found() {
        for k in KERNELS {
            assert_eq!(kernel(k.op), Some(k), "{}", k.op);
        }
        assert_eq!(kernel("BitShift"), None);
    }
}
