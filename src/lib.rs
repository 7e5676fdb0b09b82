//! vitrim.
pub mod data;
pub mod graph;
pub mod runtime;
