//! If, Loop, Scan: their bodies are not analysed.
//!
//! What a body captures is a use like an input; the barrier holds for inputs, captures and outputs alike.

use super::{Axes, Cost, Grad, OpRule, Refit};
use crate::infer::{Fact, InferCx, InferError};

/// The records of this family.
pub static RULES: &[OpRule] = &[
    record("If", "the branches of If are not analysed"),
    record("Loop", "the body of Loop is not analysed"),
    record("Scan", "the body of Scan is not analysed"),
];

const fn record(name: &'static str, reason: &'static str) -> OpRule {
    OpRule {
        name,
        domain: "",
        opsets: (1, 24),
        infer: unknown,
        axes: Axes::Barrier(reason),
        grad: Grad::No(reason),
        cost: Cost::Free,
        refit: Refit::Nothing,
    }
}

/// Nothing is known of the outputs.
fn unknown(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    Ok(vec![Fact::default(); cx.node.outputs().len()])
}

#[cfg(test)]
mod tests {
    use crate::ops::probe::Probe;

    #[test]
    fn bodies_are_barriers_of_unknown_shape() {
        let mut p = Probe::new(17);
        let x = p.input("x", "2 3");
        for op in ["If", "Loop", "Scan"] {
            let y = p.op(op, &[x], vec![]);
            assert_eq!(p.shape(y), "?");
            assert!(p.axes(y)[0].starts_with("all | "), "{op}");
            assert!(p.facts().get(y).dtype.is_none());
        }
    }
}
