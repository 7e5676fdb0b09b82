//! vitrim.
pub mod graph;
