//! Gradients as ONNX nodes: a reverse sweep over the graph, only towards what needs a gradient.

pub mod context;
pub use context::GradCx;
