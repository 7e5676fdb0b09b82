//! Which axes must be cut together.
pub mod relation;
