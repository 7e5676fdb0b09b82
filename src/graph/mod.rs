//! The graph as a value: no operator meaning, no input or output.
//!
//! In: what `onnx::read` found, or what a stage builds. Out: a [`Graph`] in which [`check::check`] finds no violation.

pub mod build;
pub mod check;
pub mod edit;
pub mod elements;
mod extract;
pub mod id;
pub mod model;
pub mod tensor;

pub use edit::NewNode;
pub use elements::Elements;
pub use id::{Id, NodeId, SideMap, ValueId};
pub use model::{Attr, AttrValue, Call, Declared, DeclaredDim, Graph, Node, Subgraph, Use, Value};
pub use tensor::{DType, Storage, Tensor};
