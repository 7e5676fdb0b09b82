//! Cuts the weights.
pub mod refit;
