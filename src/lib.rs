//! vitrim.
pub mod graph;
pub mod onnx;
