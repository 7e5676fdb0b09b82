//! What can go wrong in a command, with the code and the file that a report names.

use crate::curves::{CurveError, CurvesFileError};
use crate::data::DataError;
use crate::eval::EvalError;
use crate::fold::FoldError;
use crate::infer::InferError;
use crate::onnx;
use crate::plan::{ChooseError, PlanFileError};
use crate::runtime;
use crate::score::{MeasureError, ScoresError};
use crate::search::SearchError;
use crate::slice::SliceError;
use crate::stats::StatsError;
use crate::supernet::SupernetError;
use crate::verify;
use std::path::{Path, PathBuf};

/// What can go wrong in a command.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file, or the model in it.
    #[error(transparent)]
    Onnx(#[from] onnx::Error),
    /// The model contradicts itself.
    #[error("{}: {cause}", file.display())]
    Infer {
        /// The file.
        file: PathBuf,
        /// The cause.
        cause: InferError,
    },
    /// No plan could be made.
    #[error("{}: {cause}", file.display())]
    Choose {
        /// The model.
        file: PathBuf,
        /// The cause.
        cause: ChooseError,
    },
    /// The plan file.
    #[error(transparent)]
    PlanFile(#[from] PlanFileError),
    /// The plan cannot be applied.
    #[error("{}: {cause}", file.display())]
    Slice {
        /// The model.
        file: PathBuf,
        /// The cause.
        cause: SliceError,
    },
    /// Images said nothing of the model.
    #[error("{}{cause}", unless_named(file, cause))]
    Stats {
        /// The model.
        file: PathBuf,
        /// The cause.
        cause: Box<StatsError>,
    },
    /// The cost of cuts could not be measured.
    #[error("{}: {cause}", file.display())]
    Curves {
        /// The model.
        file: PathBuf,
        /// The cause.
        cause: Box<CurveError>,
    },
    /// A file of curves.
    #[error(transparent)]
    CurvesFile(#[from] CurvesFileError),
    /// No training graph could be made.
    #[error("{}: {cause}", file.display())]
    Supernet {
        /// The model.
        file: PathBuf,
        /// The cause.
        cause: SupernetError,
    },
    /// A run's gates or weights do not fit the model.
    #[error("{}: {cause}", file.display())]
    Fold {
        /// The run.
        file: PathBuf,
        /// The cause.
        cause: FoldError,
    },
    /// Scores could not be measured.
    #[error("{}{cause}", unless_named(file, cause))]
    Measure {
        /// The model.
        file: PathBuf,
        /// The cause.
        cause: Box<MeasureError>,
    },
    /// A file of scores.
    #[error(transparent)]
    Scores(#[from] ScoresError),
    /// The engine.
    #[error(transparent)]
    Runtime(#[from] runtime::Error),
    /// The data.
    #[error("{}{cause}", unless_named(file, cause))]
    Data {
        /// The data.
        file: PathBuf,
        /// The cause.
        cause: Box<DataError>,
    },
    /// Search and fine-tuning.
    #[error("{}{cause}", unless_named(file, cause))]
    Search {
        /// The run, or the model.
        file: PathBuf,
        /// The cause.
        cause: Box<SearchError>,
    },
    /// Evaluation.
    #[error("{}{cause}", unless_named(file, cause))]
    Eval {
        /// The model.
        file: PathBuf,
        /// The cause.
        cause: Box<EvalError>,
    },
    /// Verification.
    #[error("{}{cause}", unless_named(file, cause))]
    Verify {
        /// The model.
        file: PathBuf,
        /// The cause.
        cause: Box<verify::Error>,
    },
    /// What was asked does not suit the model, the data or the run.
    #[error("{}: {reason}", file.display())]
    Unsuitable {
        /// Which of them.
        file: PathBuf,
        /// Why not.
        reason: String,
    },
    /// What was written cannot be read again: a fault of vitrim.
    #[error("{}: what was written is not sound: {reason}", file.display())]
    Written {
        /// The file, removed again.
        file: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// The file and a colon, unless the message has it already.
fn unless_named(file: &Path, cause: &dyn std::fmt::Display) -> String {
    let name = file.display().to_string();
    if cause.to_string().contains(&name) { String::new() } else { format!("{name}: ") }
}

impl Error {
    /// A request that does not suit `file`.
    pub(super) fn unsuitable(file: &Path, reason: impl Into<String>) -> Self {
        Error::Unsuitable { file: file.to_path_buf(), reason: reason.into() }
    }

    /// Exit code, stable code for scripts, and the file that it is about.
    pub fn class(&self) -> (u8, &'static str, Option<&Path>) {
        match self {
            Error::Onnx(e) => (2, e.code(), e.file()),
            Error::Infer { file, .. } => (2, "V0301", Some(file)),
            Error::Choose { file, .. } => (2, "V0401", Some(file)),
            Error::PlanFile(_) => (2, "V0402", None),
            Error::Scores(_) => (2, "V0403", None),
            Error::Measure { file, cause } => match **cause {
                MeasureError::Data(_) => (2, "V0801", Some(file)),
                _ => (2, "V0404", Some(file)),
            },
            Error::Slice { file, cause } => (if matches!(cause, SliceError::Cut(_)) { 2 } else { 3 }, "V0501", Some(file)),
            Error::Fold { file, .. } => (2, "V0502", Some(file)),
            Error::Written { file, .. } => (3, "V0503", Some(file)),
            Error::Supernet { file, .. } => (2, "V0601", Some(file)),
            Error::Stats { file, .. } => (2, "V0602", Some(file)),
            Error::Curves { file, .. } => (2, "V0603", Some(file)),
            Error::CurvesFile(_) => (2, "V0404", None),
            Error::Runtime(_) => (2, "V0701", None),
            Error::Data { file, .. } => (2, "V0801", Some(file)),
            Error::Unsuitable { file, .. } => (2, "V0802", Some(file)),
            // A loss that is not finite is a check that did not hold: the run keeps its last good state.
            Error::Search { file, cause } => match **cause {
                SearchError::NotFinite { .. } => (1, "V0902", Some(file)),
                SearchError::Internal(_) => (3, "V0999", Some(file)),
                SearchError::Runtime(_) => (2, "V0701", Some(file)),
                SearchError::Data(_) => (2, "V0801", Some(file)),
                _ => (2, "V0901", Some(file)),
            },
            Error::Eval { file, .. } => (2, "V1001", Some(file)),
            Error::Verify { file, .. } => (2, "V1002", Some(file)),
        }
    }
}
