//! The images that scores are measured on, batch by batch.

use crate::data::{Batch, BatchOrder, DataError, Dataset, Tail};
use crate::runtime;
use std::sync::atomic::{AtomicBool, Ordering};

/// Why scores could not be measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MeasureError {
    /// The data.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The engine.
    #[error(transparent)]
    Runtime(#[from] runtime::Error),
    /// Fewer images than one batch of a model whose batch is fixed.
    #[error("{found} images, and the model's batch is fixed to {batch}")]
    TooFew {
        /// Images.
        found: usize,
        /// The batch.
        batch: usize,
    },
    /// A number that is no number.
    #[error("group '{group}': {what} is not finite")]
    NotFinite {
        /// The group.
        group: String,
        /// What was measured.
        what: &'static str,
    },
    /// An output that is needed is not there, or has another shape.
    #[error("output '{name}': {reason}")]
    Output {
        /// Its name.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// A group whose operands cannot be measured.
    #[error("group '{group}': {reason}")]
    Operand {
        /// The group.
        group: String,
        /// Why not.
        reason: String,
    },
    /// The stop flag was set.
    #[error("interrupted")]
    Interrupted,
}

/// The images, and how they are taken.
#[derive(Clone, Copy)]
pub struct Images<'a> {
    /// All of them are used, in their order; where the batch is fixed, those that fill whole batches.
    pub data: &'a Dataset,
    /// Images of one run.
    pub batch: usize,
    /// Whether every run must have exactly that many.
    pub is_batch_fixed: bool,
    /// Threads that load data.
    pub loaders: usize,
    /// Set from outside to end early.
    pub stop: &'a AtomicBool,
}

impl Images<'_> {
    /// Calls `work` with each batch and `progress` with the images done and the images of all. Returns how many were used.
    pub(super) fn each(
        &self,
        progress: &mut dyn FnMut(usize, usize),
        work: &mut dyn FnMut(&Batch) -> Result<(), MeasureError>,
    ) -> Result<usize, MeasureError> {
        let tail = if self.is_batch_fixed { Tail::Drop } else { Tail::Keep };
        let all = if self.is_batch_fixed { self.data.len() / self.batch * self.batch } else { self.data.len() };
        let mut done = 0;
        progress(0, all);
        for batch in self.data.batches(BatchOrder { tail, ..BatchOrder::default() }, self.batch, self.loaders, None) {
            if self.stop.load(Ordering::Relaxed) {
                return Err(MeasureError::Interrupted);
            }
            let batch = batch?;
            work(&batch)?;
            done += batch.count;
            progress(done, all);
        }
        if done == 0 { Err(MeasureError::TooFew { found: self.data.len(), batch: self.batch }) } else { Ok(done) }
    }
}
