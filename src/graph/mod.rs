//! The graph.
pub mod id;
pub mod tensor;
