//! vitrim.
pub mod data;
pub mod graph;
