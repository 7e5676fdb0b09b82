//! Batches: samples in order, loaded by threads ahead of the device, in the same order whatever their number.
//!
//! Example: 10 images of which the third is damaged, batches of 4: images 0 1 3 4, then 5 6 7 8, then 9. Slot s of the order is
//! loaded by thread s mod T into a queue of its own, and the queues are read in turn; so order needs no sorting and memory is
//! bounded by the queues. A stream that starts at batch k equals the rest of one that started at batch 0.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;

use super::array::{Array, ArrayData};
use super::chance::{Augment, shuffled};
use super::dataset::{Dataset, SampleFault, Shared};
use super::decode::ImageFault;
use super::{DataError, Skipped};

/// Where a stream starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// At this batch of the epoch. Images before it are decoded once more, since which of them are unusable decides where it
    /// starts; archives go there at once.
    Batch(usize),
    /// At this slot of the order, as [`Batch::next_slot`] of the batch before said: nothing is decoded twice.
    Slot(usize),
}

/// What becomes of the last batch where it is not full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Tail {
    /// It comes as it is.
    #[default]
    Keep,
    /// It is left out.
    Drop,
}

/// The order of an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchOrder {
    /// Decides shuffles and augmentation, together with the epoch.
    pub seed: u64,
    /// Counted from 0.
    pub epoch: u64,
    /// Shuffled, or as the files are sorted.
    pub shuffle: bool,
    /// Where to start.
    pub start: Start,
    /// What becomes of a last batch that is not full.
    pub tail: Tail,
}

impl Default for BatchOrder {
    fn default() -> Self {
        BatchOrder { seed: 0, epoch: 0, shuffle: false, start: Start::Batch(0), tail: Tail::Keep }
    }
}

/// One batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// Each input's name and array, `[count, ..]`.
    pub inputs: Vec<(String, Array)>,
    /// One label per sample, where the data has labels.
    pub labels: Option<Vec<i64>>,
    /// How many samples.
    pub count: usize,
    /// Which samples: positions in the data set that [`Dataset::open`] gave.
    pub samples: Vec<usize>,
    /// Where the next batch starts, for [`Start::Slot`].
    pub next_slot: usize,
    /// Images left out while this batch was filled, each named once in the life of the data set.
    pub skipped: Vec<Skipped>,
}

type Loaded = Result<Vec<Array>, SampleFault>;

/// An iterator over batches. Its threads end with it.
pub struct Batches {
    shared: Arc<Shared>,
    order: Arc<Vec<usize>>,
    names: Vec<String>,
    size: usize,
    tail: Tail,
    /// The next slot to take, and the first one that was loaded.
    slot: usize,
    first: usize,
    /// Full batches still to be passed over.
    pass_over: usize,
    bad: usize,
    skipped: Vec<Skipped>,
    finished: bool,
    queues: Vec<Receiver<Loaded>>,
    threads: Vec<JoinHandle<()>>,
}

/// Each thread loads this many batches ahead, together with the others.
const BATCHES_AHEAD: usize = 2;

impl Dataset {
    /// Batches of up to `size` samples in the order asked for, loaded by `threads` threads (each at least 1).
    pub fn batches(&self, order: BatchOrder, size: usize, threads: usize, augment: Option<Augment>) -> Batches {
        let (size, threads) = (size.max(1), threads.max(1));
        let sequence: Vec<usize> = if order.shuffle {
            shuffled(self.len(), order.seed, order.epoch).into_iter().map(|i| self.picks[i]).collect()
        } else {
            self.picks.to_vec()
        };
        let (first, pass_over) = match order.start {
            Start::Slot(slot) => (slot.min(sequence.len()), 0),
            Start::Batch(k) if self.is_arrays() => (k.saturating_mul(size).min(sequence.len()), 0),
            Start::Batch(k) => (0, k),
        };
        let sequence = Arc::new(sequence);
        let threads = threads.min(sequence.len().saturating_sub(first)).max(1);
        let depth = (BATCHES_AHEAD * size).div_ceil(threads).max(1);
        let (mut queues, mut handles) = (Vec::with_capacity(threads), Vec::with_capacity(threads));
        for thread in 0..threads {
            let (send, receive) = sync_channel(depth);
            let (shared, sequence) = (Arc::clone(&self.shared), Arc::clone(&sequence));
            handles.push(std::thread::spawn(move || {
                for sample in sequence.iter().skip(first + thread).step_by(threads) {
                    let loaded = load(&shared, *sample, &order, augment);
                    // The receiver is gone: nobody wants the rest.
                    if send.send(loaded).is_err() {
                        return;
                    }
                }
            }));
            queues.push(receive);
        }
        Batches {
            names: self.shared.input_names(),
            shared: Arc::clone(&self.shared),
            order: sequence,
            size,
            tail: order.tail,
            slot: first,
            first,
            pass_over,
            bad: 0,
            skipped: Vec::new(),
            finished: false,
            queues,
            threads: handles,
        }
    }
}

/// One sample, augmented.
fn load(shared: &Shared, sample: usize, order: &BatchOrder, augment: Option<Augment>) -> Loaded {
    let mut arrays = shared.sample(sample)?;
    let Some(augment) = augment else { return Ok(arrays) };
    for (array, _) in arrays.iter_mut().zip(shared.image_inputs()).filter(|(_, is_image)| *is_image) {
        let (dims, seed, epoch) = (&array.dims, order.seed, order.epoch);
        match &mut array.data {
            ArrayData::F32(v) => augment.apply(v, dims, seed, epoch, sample),
            ArrayData::F64(v) => augment.apply(v, dims, seed, epoch, sample),
            ArrayData::F16(v) | ArrayData::BF16(v) => augment.apply(v, dims, seed, epoch, sample),
            ArrayData::U8(v) => augment.apply(v, dims, seed, epoch, sample),
            // Images are floats or bytes.
            ArrayData::I64(_) | ArrayData::I32(_) | ArrayData::I8(_) | ArrayData::Bool(_) => {}
        }
    }
    Ok(arrays)
}

impl Batches {
    /// The next sample that can be used, with its number.
    fn next_sample(&mut self) -> Result<Option<(usize, Vec<Array>)>, DataError> {
        while let Some(&sample) = self.order.get(self.slot) {
            let queue = (self.slot - self.first) % self.queues.len();
            let loaded = self.queues[queue].recv().map_err(|_| DataError::ThreadLost)?;
            self.slot += 1;
            match loaded {
                Ok(arrays) => return Ok(Some((sample, arrays))),
                Err(SampleFault::Stop(error)) => return Err(error),
                Err(SampleFault::Image(fault)) => self.leave_out(sample, fault)?,
            }
        }
        Ok(None)
    }

    /// Counts an unusable image. One alone never stops a run; more than 1 % do.
    fn leave_out(&mut self, sample: usize, fault: ImageFault) -> Result<(), DataError> {
        self.bad += 1;
        let first_time = self.shared.note_bad(sample, &fault);
        let Some(last) = self.shared.skipped(sample, fault) else { return Ok(()) };
        let (bad, total, strict) = (self.bad, self.order.len(), self.shared.strict);
        if strict || (bad > 1 && bad * 100 > total) {
            return Err(DataError::TooManyBad { path: self.shared.path.clone(), bad, total, strict, last });
        }
        if first_time {
            self.skipped.push(last);
        }
        Ok(())
    }

    /// Collects one batch; `None` at the end of the epoch.
    fn collect_batch(&mut self) -> Result<Option<Batch>, DataError> {
        let mut columns: Vec<Vec<Array>> = self.names.iter().map(|_| Vec::with_capacity(self.size)).collect();
        let mut samples = Vec::with_capacity(self.size);
        while samples.len() < self.size {
            let Some((sample, arrays)) = self.next_sample()? else { break };
            samples.push(sample);
            for (column, array) in columns.iter_mut().zip(arrays) {
                column.push(array);
            }
        }
        let count = samples.len();
        if count == 0 || (count < self.size && self.tail == Tail::Drop) {
            return Ok(None);
        }
        let mut inputs = Vec::with_capacity(columns.len());
        for (name, parts) in self.names.iter().zip(columns) {
            let sizes: Vec<Vec<usize>> = parts.iter().map(|p| p.dims.clone()).collect();
            let array = Array::stack(parts).ok_or_else(|| DataError::Uneven {
                path: self.shared.path.clone(),
                input: name.clone(),
                first: sizes[0].clone(),
                other: sizes.iter().find(|s| **s != sizes[0]).cloned().unwrap_or_default(),
            })?;
            inputs.push((name.clone(), array));
        }
        let labels = self.shared.labels.as_ref().map(|labels| samples.iter().map(|s| labels[*s]).collect());
        let skipped = std::mem::take(&mut self.skipped);
        Ok(Some(Batch { inputs, labels, count, samples, next_slot: self.slot, skipped }))
    }

    /// Passes over the samples of the batches before the first one asked for.
    fn reach_start(&mut self) -> Result<(), DataError> {
        for _ in 0..std::mem::take(&mut self.pass_over).saturating_mul(self.size) {
            if self.next_sample()?.is_none() {
                break;
            }
        }
        Ok(())
    }
}

impl Iterator for Batches {
    type Item = Result<Batch, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.finished {
            return None;
        }
        let batch = self.reach_start().and_then(|()| self.collect_batch());
        self.finished = !matches!(batch, Ok(Some(_)));
        batch.transpose()
    }
}

impl Drop for Batches {
    fn drop(&mut self) {
        // Without receivers the threads' next send fails and they end.
        self.queues.clear();
        for thread in self.threads.drain(..) {
            // A panic of a thread was reported as ThreadLost where it mattered.
            let _ = thread.join();
        }
    }
}
