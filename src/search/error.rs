//! What can go wrong in a search or a fine-tuning.

use crate::data::DataError;
use crate::onnx;
use crate::runtime;
use crate::supernet::SupernetError;
use std::path::PathBuf;

/// Why a search cannot start, go on, or be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SearchError {
    /// A file or folder of the run.
    #[error("{}: {source}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A setting.
    #[error("{key}: {reason}")]
    Config {
        /// Its key, or the file.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The folder holds something else.
    #[error("{} is not a vitrim run directory (it is not empty); name a new or empty folder", dir.display())]
    NotOurs {
        /// The folder.
        dir: PathBuf,
    },
    /// The folder holds a run, and it was not asked to go on with it.
    #[error("{} already holds a run; go on with it by --resume, or name another folder", dir.display())]
    Exists {
        /// The folder.
        dir: PathBuf,
    },
    /// There is no run to go on with.
    #[error("{} holds no run to resume", dir.display())]
    NothingToResume {
        /// The folder.
        dir: PathBuf,
    },
    /// Another process works on the folder.
    #[error("{} is in use by {by}", dir.display())]
    InUse {
        /// The folder.
        dir: PathBuf,
        /// `pid N since T`.
        by: String,
    },
    /// The checkpoint cannot be read.
    #[error("checkpoint {} is damaged: {cause}{}", file.display(), older(*has_older))]
    Damaged {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        cause: String,
        /// Whether the checkpoint before it is there and complete.
        has_older: bool,
    },
    /// The checkpoint of another model.
    #[error("checkpoint {} belongs to model sha256 {found}, not {expected}", file.display())]
    OtherModel {
        /// The file.
        file: PathBuf,
        /// The model in it.
        found: String,
        /// The model given.
        expected: String,
    },
    /// The checkpoint of other data.
    #[error("checkpoint {} belongs to data {found}, not {expected}", file.display())]
    OtherData {
        /// The file.
        file: PathBuf,
        /// The data in it.
        found: String,
        /// The data given.
        expected: String,
    },
    /// The checkpoint of other settings.
    #[error("checkpoint {} was made with {key} = {found}, not {expected}", file.display())]
    OtherConfig {
        /// The file.
        file: PathBuf,
        /// The first setting that differs.
        key: String,
        /// Its value in the file.
        found: String,
        /// Its value now.
        expected: String,
    },
    /// The checkpoint of a later version.
    #[error("checkpoint {} was written by vitrim {version} (schema {schema}), this is {} (schema {})", file.display(), env!("CARGO_PKG_VERSION"), super::checkpoint::SCHEMA)]
    Newer {
        /// The file.
        file: PathBuf,
        /// Of the vitrim that wrote it.
        version: String,
        /// Of the file.
        schema: u64,
    },
    /// Gates that no search can have made.
    #[error("checkpoint {} holds invalid mask values (gate '{gate}')", file.display())]
    InvalidGates {
        /// The file.
        file: PathBuf,
        /// The gate.
        gate: String,
    },
    /// Loss or gradient is infinite or NaN.
    #[error("step {step}: the {what} is not finite; {kept}. {advice}")]
    NotFinite {
        /// The step.
        step: u64,
        /// `loss`, `gradient` or `new weights`.
        what: &'static str,
        /// What is left.
        kept: String,
        /// What to change.
        advice: String,
    },
    /// The data does not suit the run.
    #[error("{what}")]
    Unsuitable {
        /// Why not.
        what: String,
    },
    /// The training graph.
    #[error(transparent)]
    Supernet(#[from] SupernetError),
    /// The data.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The engine.
    #[error(transparent)]
    Runtime(#[from] runtime::Error),
    /// The training graph as a file.
    #[error(transparent)]
    Onnx(#[from] onnx::Error),
    /// Accuracy between epochs.
    #[error(transparent)]
    Eval(#[from] crate::eval::EvalError),
    /// vitrim contradicts itself.
    #[error("internal: {0}")]
    Internal(String),
}

fn older(has_older: bool) -> &'static str {
    if has_older {
        "; the checkpoint before it, checkpoint.old.safetensors, is complete: rename it to go on from there"
    } else {
        ""
    }
}

impl SearchError {
    pub(crate) fn internal(what: impl Into<String>) -> Self {
        SearchError::Internal(what.into())
    }
}
