//! Gradients as ONNX nodes: losses, a reverse sweep, and the optimizer's step, all in the graph of the model itself.
//!
//! Example: [`loss::add`] appends mean cross entropy behind the logits, [`differentiate`] appends the nodes that compute
//! d loss / d weight, [`update::add`] appends AdamW, which reads `param.w` and writes `next.param.w`.
//! Invariant: only standard operators are written, and the batch stays dynamic where it was.

pub mod context;
pub mod cuda;
pub mod interface;
pub mod loss;
pub(crate) mod sweep;
pub mod update;

pub use context::GradCx;
pub use interface::{InputSpec, Role};
pub use sweep::differentiate;

/// Why a training graph could not be written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AutodiffError {
    /// The gradient has to pass a node that has no gradient.
    #[error("node {node} ({op}): the gradient has to pass here: {reason}")]
    NoGradient {
        /// The node's label.
        node: String,
        /// Its operator.
        op: String,
        /// Why it has none.
        reason: String,
    },
    /// What should be differentiated is not one number.
    #[error("'{value}' is not a scalar: its shape is {found}")]
    NotScalar {
        /// The value's name.
        value: String,
        /// Its shape.
        found: String,
    },
    /// A loss does not fit an output.
    #[error("loss '{loss}' does not fit output '{output}': {reason}")]
    LossMisfit {
        /// The loss as the command line spells it.
        loss: &'static str,
        /// The output's name.
        output: String,
        /// What does not fit.
        reason: String,
    },
    /// No output of the model fits a loss.
    #[error("loss '{loss}' needs {needs}, and the model has no such output")]
    NoOutput {
        /// The loss as the command line spells it.
        loss: &'static str,
        /// What it needs.
        needs: &'static str,
    },
    /// A name that the training graph needs is a graph input or output of the model.
    #[error("the model has an input or output called '{name}', a name that the training graph needs")]
    NameTaken {
        /// The name.
        name: String,
    },
}
