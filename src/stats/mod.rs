//! Second moments of values of a graph over images: one pass, the sums made inside the graph, no labels.
//!
//! Example: the hidden value `[B, 197, 3072]` of an MLP, probed at axis 2, gives over 1,024 images a mean `[3072]` and a covariance
//! `[3072, 3072]` of 201,728 rows. An attention operand `[B, H, N, E]` probed at the axes 1 and 3 gives those of `H * E` features
//! over `B * N` rows, features in the row-major order of (head, dim).
//!
//! In: a graph, its facts, [`Probe`]s, data. Out: [`Stats`], which are also a safetensors file.
//! Invariant: same model, probes, data, options, library: same numbers on the CPU. Memory does not grow with the number of images.

mod collect;
mod file;
mod probes;
mod sums;

pub use collect::{Job, Progress, collect, held_every};
pub use probes::{ProbeGraph, Tap, can_be_probed, probe_graph};

use crate::data::DataError;
use crate::graph::ValueId;
use crate::{onnx, runtime};
use faer::Mat;
use std::collections::BTreeMap;

/// Where moments are taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Its name, one of its kind.
    pub name: String,
    /// A floating-point value of the graph.
    pub value: ValueId,
    /// Its axes that are features, in row-major order of their product. All other axes are rows.
    pub axes: Vec<usize>,
    /// An axis of rows whose mean is subtracted first (of keys: the tokens, so that the mean of each image and head goes).
    pub centre: Option<usize>,
}

/// Mean and covariance of rows of features.
#[derive(Clone, Debug, PartialEq)]
pub struct Moments {
    /// How many rows.
    pub rows: u64,
    /// Mean over rows, `[F]`.
    pub mean: Vec<f64>,
    /// Mean over rows of `(x - mean)(x - mean)^T`, `[F, F]`, symmetric. Divided by `rows`.
    pub cov: Mat<f64>,
}

impl Moments {
    /// Mean over rows of `x x^T`, `[F, F]`: `cov + mean mean^T`.
    pub fn second(&self) -> Mat<f64> {
        Mat::from_fn(self.cov.nrows(), self.cov.ncols(), |i, j| self.cov[(i, j)] + self.mean[i] * self.mean[j])
    }
}

/// The moments of a probe.
#[derive(Clone, Debug, PartialEq)]
pub struct Gathered {
    /// Over the images that things are fitted to.
    pub fit: Moments,
    /// Over a part of the images that is kept out of every fit; see [`held_every`].
    pub held: Moments,
}

/// What was gathered.
#[derive(Clone, Debug, PartialEq)]
pub struct Stats {
    /// By the name of the probe.
    pub probes: BTreeMap<String, Gathered>,
    /// Images that were seen, those held out included.
    pub images: u64,
    /// Images among them that were held out.
    pub held_images: u64,
    /// Which drew the images.
    pub seed: u64,
    /// The model that they belong to.
    pub model_sha256: String,
}

/// Why there are no statistics.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StatsError {
    /// The data.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The engine.
    #[error(transparent)]
    Runtime(#[from] runtime::Error),
    /// The file cannot be read or written.
    #[error(transparent)]
    File(#[from] onnx::Error),
    /// A probe that cannot be.
    #[error("probe '{probe}' at '{value}': {reason}")]
    Probe {
        /// The probe's name.
        probe: String,
        /// The value's name.
        value: String,
        /// What is wrong.
        reason: String,
    },
    /// Images can neither be fitted to nor held out.
    #[error("statistics need at least 2 usable images, there are {images} ({held} of them held out)")]
    TooFewImages {
        /// Usable ones.
        images: u64,
        /// Of them held out.
        held: u64,
    },
    /// NaN or infinity.
    #[error(
        "probe '{probe}': sums over '{value}' are not finite: the model gives NaN or infinity on this data, or numbers whose \
         squares float32 cannot hold"
    )]
    NotFinite {
        /// The probe's name.
        probe: String,
        /// The value's name.
        value: String,
    },
    /// Not a file of statistics.
    #[error("{file}: file of statistics is damaged: {cause}")]
    Damaged {
        /// The file.
        file: String,
        /// The cause.
        cause: String,
    },
    /// Of another model, or of other probes.
    #[error("{file}: statistics do not fit: {reason}; gather them again")]
    Stale {
        /// The file.
        file: String,
        /// What differs.
        reason: String,
    },
    /// The stop flag was set.
    #[error("interrupted")]
    Interrupted,
    /// A mistake of vitrim.
    #[error("internal error: {what}")]
    Internal {
        /// What happened.
        what: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn second_moments_are_about_zero() {
        let cov = Mat::from_fn(2, 2, |i, j| if i == j { 1.0 } else { 0.5 });
        let second = Moments { rows: 4, mean: vec![2.0, -3.0], cov }.second();
        assert_eq!((second[(0, 0)], second[(0, 1)], second[(1, 0)], second[(1, 1)]), (5.0, -5.5, -5.5, 10.0));
    }
}
