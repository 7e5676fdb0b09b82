//! Inputs of a model as plain arrays.
pub mod array;
