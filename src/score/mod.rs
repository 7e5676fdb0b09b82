//! Scores: one number per unit, whoever made them. The greater, the more the unit is worth keeping.
//!
//! In: the anatomy, and weights, a seed, a search's gates, or unlabelled images: gradients of gates ([`gradients()`]) and sizes of
//! activations ([`activation()`]). Out: [`Scores`], a safetensors file with one f32 vector per group.

mod activation;
mod block;
mod gradients;
mod images;
mod squares;
mod target;
mod weights;

pub use activation::{Probed, activation, probe};
pub use gradients::{Engines, gradients};
pub use images::{Images, MeasureError};
pub use squares::squares;
pub use weights::{magnitude, random};

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// What is measured on images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Criterion {
    /// Mean over images of the squared gradient of a unit's gate: twice what its removal costs, to second order.
    Fisher,
    /// The same for all units of a group together, as an order of removal.
    FisherBlock,
    /// Mean over images of the size of that gradient: what the removal changes, to first order.
    Taylor,
    /// Size of a unit's activation times the norm of its weight's row.
    Activation,
}

impl Criterion {
    /// As [`Scores::by`] says it.
    pub fn word(self) -> &'static str {
        match self {
            Criterion::Fisher => "fisher",
            Criterion::FisherBlock => "fisher-block",
            Criterion::Taylor => "taylor",
            Criterion::Activation => "activation",
        }
    }
}

/// One score per unit of each group.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scores {
    /// Scores by group id, in the order of units.
    pub groups: BTreeMap<String, Vec<f32>>,
    /// How they were made: `magnitude`, `random`, `search`, or the word of a [`Criterion`].
    pub by: String,
    /// The model that they belong to.
    pub model_sha256: String,
}

/// Why a file of scores cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ScoresError {
    /// Not readable.
    #[error("{file}: {cause}")]
    Io {
        /// The file.
        file: String,
        /// The cause.
        cause: std::io::Error,
    },
    /// Not a file of scores.
    #[error("{file}: file of scores is damaged: {cause}")]
    Damaged {
        /// The file.
        file: String,
        /// The cause.
        cause: String,
    },
}

impl Scores {
    /// The file's content.
    pub fn to_bytes(&self) -> Result<Vec<u8>, String> {
        let data: Vec<(String, Vec<u8>, usize)> =
            self.groups.iter().map(|(id, v)| (id.clone(), v.iter().flat_map(|x| x.to_le_bytes()).collect(), v.len())).collect();
        let views: Vec<(&str, TensorView<'_>)> = data
            .iter()
            .map(|(id, bytes, len)| TensorView::new(Dtype::F32, vec![*len], bytes).map(|t| (id.as_str(), t)))
            .collect::<Result<_, _>>()
            .map_err(|e| e.to_string())?;
        let meta = serde_json::json!({
            "by": self.by, "model_sha256": self.model_sha256, "vitrim": env!("CARGO_PKG_VERSION")
        });
        // One key alone: with several their order would be left to chance.
        let meta = HashMap::from([("vitrim".to_string(), meta.to_string())]);
        let bytes = safetensors::serialize(views, Some(meta)).map_err(|e| e.to_string())?;
        Ok(bytes)
    }

    /// Reads a file of scores.
    pub fn read(path: &Path) -> Result<Self, ScoresError> {
        let file = path.display().to_string();
        let bytes = std::fs::read(path).map_err(|cause| ScoresError::Io { file: file.clone(), cause })?;
        let damaged = |cause: String| ScoresError::Damaged { file: file.clone(), cause };
        let (_, meta) = SafeTensors::read_metadata(&bytes).map_err(|e| damaged(e.to_string()))?;
        let meta = meta.metadata().clone().unwrap_or_default();
        let tensors = SafeTensors::deserialize(&bytes).map_err(|e| damaged(e.to_string()))?;
        let mut groups = BTreeMap::new();
        for (name, t) in tensors.tensors() {
            if t.dtype() != Dtype::F32 {
                return Err(damaged(format!("'{name}' is not float32")));
            }
            let values: Vec<f32> = t.data().as_chunks::<4>().0.iter().map(|c| f32::from_le_bytes(*c)).collect();
            if values.iter().any(|v| !v.is_finite()) {
                return Err(damaged(format!("'{name}' holds invalid values")));
            }
            groups.insert(name.strip_prefix("gate.").unwrap_or(&name).to_string(), values);
        }
        let meta: serde_json::Value = meta.get("vitrim").and_then(|t| serde_json::from_str(t).ok()).unwrap_or_default();
        let text = |key: &str| meta.get(key).and_then(|v| v.as_str()).unwrap_or_default().to_string();
        Ok(Self { groups, by: text("by"), model_sha256: text("model_sha256") })
    }
}
