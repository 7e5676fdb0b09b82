//! The pass over the data.
//!
//! The first batch is run twice: without a shift for its means, then with those means subtracted, which stay for the whole pass, so
//! that variances far below the squared mean survive float32. Images that are fitted to and images held out are never in one batch.

use super::sums::Sums;
use super::{Gathered, Probe, Stats, StatsError, Tap, probe_graph};
use crate::data::{Array, ArrayData, Batch, BatchOrder, Dataset};
use crate::eval;
use crate::graph::Graph;
use crate::infer::Facts;
use crate::runtime::{self, RuntimeName, Session, SessionOptions};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

/// What is gathered, from what.
#[derive(Clone, Copy)]
pub struct Job<'a> {
    /// The model.
    pub graph: &'a Graph,
    /// Its facts.
    pub facts: &'a Facts,
    /// SHA-256 of its file.
    pub model_sha256: &'a str,
    /// Where.
    pub probes: &'a [Probe],
    /// Images, opened for the model's inputs; labels are not looked at.
    pub data: &'a Dataset,
    /// At most this many of them, drawn by the seed; all, where `None`.
    pub images: Option<usize>,
    /// Draws the images.
    pub seed: u64,
    /// Images of one run; a model with a fixed batch is run with that.
    pub batch: usize,
    /// Threads that load data.
    pub loaders: usize,
    /// How the session is opened.
    pub session: &'a SessionOptions,
}

/// How far a pass is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Images done.
    pub images: u64,
    /// Images in all, unusable ones included.
    pub of: u64,
}

/// One image of this many is held out, the last of each run of them: 8 from 16 images on. With fewer, half of their number, so that
/// from 4 images on two are held out and a fold is never one image's accident; but never less than 2, so that most are fitted to.
pub fn held_every(images: usize) -> usize {
    (images / 2).clamp(2, 8)
}

/// Gathers the moments of all probes. Order and images depend on the data and the seed only.
///
/// Errors: [`StatsError`].
pub fn collect(job: &Job<'_>, progress: &mut dyn FnMut(Progress), stop: &AtomicBool) -> Result<Stats, StatsError> {
    let built = probe_graph(job.graph, job.facts, job.probes)?;
    let data = match job.images {
        Some(count) if count < job.data.len() => job.data.draw(count, job.seed),
        _ => job.data.clone(),
    };
    let every = held_every(data.len());
    let (fit, held): (Vec<usize>, Vec<usize>) = (0..data.len()).partition(|i| i % every != every - 1);
    let too_few = |images, held| StatsError::TooFewImages { images, held };
    if fit.is_empty() || held.is_empty() {
        return Err(too_few(data.len() as u64, held.len() as u64));
    }
    let mut pass = Pass {
        session: runtime::open_graph(RuntimeName::Ort, &built.graph, job.session)?,
        fixed: eval::fixed_batch(job.graph, job.facts),
        outputs: outputs_of(&built.taps),
        shifts: built.taps.iter().map(|tap| vec![0.0; tap.features]).collect(),
        taps: built.taps,
        has_shifts: false,
    };
    // The graph was encoded for the session; a second copy is not needed while it runs.
    drop(built.graph);
    let mut done = Progress { images: 0, of: data.len() as u64 };
    let mut see = |more: u64| {
        done.images += more;
        progress(done);
    };
    let (fit_sums, fit_images) = pass.over(&data.select(&fit), job, &mut see, stop)?;
    let (held_sums, held_images) = pass.over(&data.select(&held), job, &mut see, stop)?;
    if fit_images == 0 || held_images == 0 {
        return Err(too_few(fit_images + held_images, held_images));
    }
    let parts = pass.taps.into_iter().zip(pass.shifts).zip(fit_sums.into_iter().zip(held_sums));
    let gathered =
        parts.map(|((tap, shift), (fit, held))| (tap.probe, Gathered { fit: fit.moments(&shift), held: held.moments(&shift) }));
    Ok(Stats {
        probes: gathered.collect(),
        images: fit_images + held_images,
        held_images,
        seed: job.seed,
        model_sha256: job.model_sha256.to_string(),
    })
}

#[derive(Clone, Copy)]
enum Output {
    Rows,
    Sum,
    Gram,
}

/// Which tap an output belongs to.
fn outputs_of(taps: &[Tap]) -> BTreeMap<String, (usize, Output)> {
    let of = |(i, tap): (usize, &Tap)| {
        [(tap.rows.clone(), (i, Output::Rows)), (tap.sum.clone(), (i, Output::Sum)), (tap.gram.clone(), (i, Output::Gram))]
    };
    taps.iter().enumerate().flat_map(of).collect()
}

struct Pass {
    session: Box<dyn Session>,
    taps: Vec<Tap>,
    outputs: BTreeMap<String, (usize, Output)>,
    /// The batch that the model is fixed to.
    fixed: Option<usize>,
    /// By tap.
    shifts: Vec<Vec<f32>>,
    has_shifts: bool,
}

/// One run: what is fed, how many images that is, and what its sums count.
struct Run {
    inputs: Vec<(String, Array)>,
    fed: usize,
    weight: f64,
}

impl Pass {
    /// The sums over all of `data`, and how many images that was.
    fn over(
        &mut self,
        data: &Dataset,
        job: &Job<'_>,
        see: &mut dyn FnMut(u64),
        stop: &AtomicBool,
    ) -> Result<(Vec<Sums>, u64), StatsError> {
        let mut sums = self.zeros();
        let mut images = 0;
        for batch in data.batches(BatchOrder::default(), self.fixed.unwrap_or(job.batch), job.loaders, None) {
            if stop.load(Ordering::Relaxed) {
                return Err(StatsError::Interrupted);
            }
            let batch = batch?;
            let count = batch.count as u64;
            let runs = self.runs(batch);
            if !self.has_shifts {
                let mut first = self.zeros();
                self.add(&runs, count, &mut first, true)?;
                let zeros = std::mem::take(&mut self.shifts);
                let mean = |(sums, zero): (&Sums, &Vec<f32>)| sums.mean(zero).into_iter().map(|x| x as f32).collect();
                self.shifts = first.iter().zip(&zeros).map(mean).collect();
                self.has_shifts = true;
            }
            self.add(&runs, count, &mut sums, false)?;
            images += count;
            see(count);
        }
        Ok((sums, images))
    }

    fn zeros(&self) -> Vec<Sums> {
        self.taps.iter().map(|tap| Sums::new(tap.features)).collect()
    }

    /// The runs whose weighted sums are those of the batch.
    ///
    /// A batch of k images for a model fixed to B is filled up with its first image: its sums hold that B - k times too often. A run
    /// of B times the first image says how much that is, and is taken off with the weight (B - k) / B.
    fn runs(&self, batch: Batch) -> Vec<Run> {
        let whole = |batch: Batch| Run { fed: batch.count, inputs: batch.inputs, weight: 1.0 };
        let Some(size) = self.fixed.filter(|size| *size != batch.count) else { return vec![whole(batch)] };
        let filled = Run { inputs: eval::filled(&batch, size), fed: size, weight: 1.0 };
        let surplus = (size - batch.count) as f64 / size as f64;
        let first = Run { inputs: eval::filled(&Batch { count: 1, ..batch }, size), fed: size, weight: -surplus };
        vec![filled, first]
    }

    /// Adds the sums of the runs of `count` images; only the sums of rows where `only_means`.
    fn add(&mut self, runs: &[Run], count: u64, into: &mut [Sums], only_means: bool) -> Result<(), StatsError> {
        for (number, run) in runs.iter().enumerate() {
            let shifts =
                self.taps.iter().zip(&self.shifts).map(|(tap, shift)| {
                    (tap.shift.clone(), Array { dims: vec![tap.features], data: ArrayData::F32(shift.clone()) })
                });
            let feeds: Vec<(String, Array)> = run.inputs.iter().cloned().chain(shifts).collect();
            let (taps, outputs) = (&self.taps, &self.outputs);
            let mut found = Ok(());
            self.session.run_each(&feeds, &mut |name, array| {
                let Some((i, output)) = outputs.get(name).copied() else { return };
                let not_finite = || StatsError::NotFinite { probe: taps[i].probe.clone(), value: taps[i].value.clone() };
                let added = match (output, &array.data) {
                    (Output::Rows, _) if number > 0 => Ok(()),
                    (Output::Rows, data) => rows_of(&taps[i], data, run.fed as u64).map(|rows| into[i].add_rows(rows * count)),
                    (Output::Gram, _) if only_means => Ok(()),
                    (Output::Sum, ArrayData::F32(x)) => into[i].add_sum(x, run.weight).then_some(()).ok_or_else(not_finite),
                    (Output::Gram, ArrayData::F32(x)) => into[i].add_gram(x, run.weight).then_some(()).ok_or_else(not_finite),
                    (_, other) => Err(StatsError::Internal { what: format!("'{name}' is {}", other.kind().name()) }),
                };
                if found.is_ok() {
                    found = added;
                }
            })?;
            found?;
        }
        Ok(())
    }
}

/// Rows of one image, from the shape `[R, F]` of the rows of `fed` images.
fn rows_of(tap: &Tap, shape: &ArrayData, fed: u64) -> Result<u64, StatsError> {
    let rows = shape.to_i64().and_then(|dims| u64::try_from(*dims.first()?).ok()).unwrap_or(0);
    if rows == 0 || !rows.is_multiple_of(fed.max(1)) {
        let reason = format!("its {rows} rows are not the same number for each of {fed} images");
        return Err(StatsError::Probe { probe: tap.probe.clone(), value: tap.value.clone(), reason });
    }
    Ok(rows / fed.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_eighth_image_is_held_out_and_with_few_two() {
        let held = |n: usize| (0..n).filter(|i| i % held_every(n) == held_every(n) - 1).count();
        let counts: Vec<usize> = [1, 2, 3, 4, 5, 8, 15, 16, 17, 23, 24, 1024].into_iter().map(held).collect();
        assert_eq!(counts, [0, 1, 1, 2, 2, 2, 2, 2, 2, 2, 3, 128]);
    }
}
