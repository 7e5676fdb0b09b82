//! Activations: Gelu, FastGelu and BiasGelu (with a bias added first), QuickGelu (`x * sigmoid(alpha x)`).
//!
//! Shape: the first input's; the bias is a vector along its last axis. Example: `[B, 197, 768]` and `[768]`: 768 is one factor in
//! both and in the output.

use super::fused;
use crate::ops::OpRule;
use crate::ops::elementwise::{broadcast_axes, infer_like_first};

/// The records of this family.
pub static RULES: &[OpRule] = &[
    fused("Gelu", infer_like_first, broadcast_axes),
    fused("BiasGelu", infer_like_first, broadcast_axes),
    fused("FastGelu", infer_like_first, broadcast_axes),
    fused("QuickGelu", infer_like_first, broadcast_axes),
];
