//! What an edit costs: graph, facts, images -> losses of edits of a few constants; and the curves made of them.
//!
//! Example: six widths of the MLP of block 7 are six trials, each with its own weight of the second layer. [`Measure`] holds the
//! activations of all images before block 7, computed once, and runs only what lies behind for each trial.
//!
//! A loss is the mean over images of `KL(model as it is || model with the edit)` of the class probabilities, in nats. Where no output
//! has class scores, it is the mean squared error of each float output over that output's variance (over images and positions; an
//! output that never varies counts with its plain squared error), summed over outputs.
//! Invariants: the model's own constants have loss 0 (to rounding: where a weight is fed, an engine may pick another kernel); a loss
//! is that of the whole edited graph; the same inputs on the same machine give the same numbers.

mod file;
mod loss;
mod measure;
mod place;

use crate::data::DataError;
use crate::graph::{Tensor, ValueId};
use crate::runtime;
pub use file::{CurveFault, Curves, CurvesFileError, How, Point, SCHEMA_VERSION, predicted};
pub use measure::{FEWEST_IMAGES, Measure, Settings, Time, images_within};

/// Constants of the full-width graph that are replaced, each by one of the same type and shape.
#[derive(Clone, Debug, Default)]
pub struct Trial {
    /// The constants with their new content.
    pub edits: Vec<(ValueId, Tensor)>,
}

/// Why losses could not be measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CurveError {
    /// The data.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The engine.
    #[error(transparent)]
    Runtime(#[from] runtime::Error),
    /// An output that cannot be compared.
    #[error("output '{output}': {reason}")]
    Output {
        /// Its name.
        output: String,
        /// What is wrong.
        reason: String,
    },
    /// Nothing can be compared.
    #[error("the model has no float output")]
    NoOutput,
    /// A site before one that was visited already.
    #[error("'{name}' is read before the kept activations: visit sites in the order of the graph")]
    Behind {
        /// The constant.
        name: String,
    },
    /// An edit of what is no constant.
    #[error("'{name}' is not a constant")]
    NotConstant {
        /// The value.
        name: String,
    },
    /// An edit of a constant that was not announced.
    #[error("'{name}' is edited by a trial and is not among the constants given")]
    NotListed {
        /// The constant.
        name: String,
    },
    /// Two edits of one constant.
    #[error("'{name}' is edited twice in one trial")]
    Twice {
        /// The constant.
        name: String,
    },
    /// An edit that does not fit.
    #[error("'{name}' is {expected}, its edit is {found}")]
    Shape {
        /// The constant.
        name: String,
        /// Its type and dims.
        expected: String,
        /// Those of the edit.
        found: String,
    },
    /// A constant of a type that engines are not fed.
    #[error("'{name}' is {dtype}, which cannot be fed")]
    Type {
        /// The constant.
        name: String,
        /// Its type.
        dtype: &'static str,
    },
    /// The stop flag was set.
    #[error("interrupted")]
    Interrupted,
}
