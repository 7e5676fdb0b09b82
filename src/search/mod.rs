//! The search: one training run that finds out which units a model can do without.
//!
//! In: a model with the places of its gates, data, settings, a run directory. Gates (and weights) train under an l1 penalty; each
//! unit's |gate| is its score afterwards. Out: checkpoints and gates in the run directory, read by [`read`]; and [`finetune()`], the
//! same training without gates, for a model that was cut.
//! Example: a network of 6 layers on 8,000 images, 3 epochs of 64 images a step, is 375 steps.
//! Invariants: same inputs, settings and threads on a processor give the same bytes of checkpoints; a run that was killed and goes
//! on ends with the bytes of one that was not; nothing outside the run directory is written.

mod checkpoint;
mod config;
mod error;
pub mod finetune;
mod read;
mod rundir;
mod sites;
mod step;
mod trainer;

pub use checkpoint::Position;
pub use config::{CONFIG_SCHEMA, Config, LossChoice, Schedule, Tie, TrainChoice, parse_device};
pub use error::SearchError;
pub use finetune::{FinetuneConfig, FinetuneJob, Finetuned, finetune};
pub use read::{Run, read, read_gates, read_weights};
pub use sites::{gates, tied_groups};
pub use step::NEAR_ZERO;

use crate::autodiff::loss::Loss;
use crate::autodiff::update::AdamW;
use crate::data::{Batch, BatchOrder, Dataset, Start, Tail};
use crate::eval;
use crate::graph::{Graph, ValueId};
use crate::infer::Facts;
use crate::runtime::{LibraryChoice, SessionOptions};
use crate::supernet::{self, GateGroup, GateInput, Options, TokenGate, Train};
use checkpoint::{Checkpoint, Meta};
use rundir::RunDir;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use step::StepOptions;
use trainer::{StepNumbers, Teacher, Trainer};

/// What is searched.
#[derive(Clone, Copy)]
pub struct Job<'a> {
    /// The model.
    pub graph: &'a Graph,
    /// Of that graph.
    pub facts: &'a Facts,
    /// The places of gates, see [`gates`].
    pub groups: &'a [GateGroup],
    /// The places of token gates, see [`gates`].
    pub tokens: &'a [TokenGate],
    /// Of the model's file, in hexadecimal.
    pub model_sha256: &'a str,
    /// The output that the loss compares; else the first that fits (ce, kd) or all (mse, cosine).
    pub output: Option<&'a str>,
    /// Which ONNX Runtime.
    pub library: &'a LibraryChoice,
    /// Go on with the run that the directory holds.
    pub resume: bool,
}

/// How far a run is.
#[derive(Clone, Debug, PartialEq)]
pub struct StepProgress {
    /// Steps done.
    pub step: u64,
    /// Steps of the whole run.
    pub of: u64,
    /// The epoch under way, counted from 1.
    pub epoch: u64,
    /// Epochs of the whole run.
    pub epochs: u64,
    /// Of the step: task and penalty together.
    pub loss: f64,
    /// Without the penalty.
    pub task: f64,
    /// Share of gates below [`NEAR_ZERO`], by kind.
    pub near_zero: BTreeMap<String, f64>,
    /// Over the last steps.
    pub images_per_second: f64,
    /// At that speed.
    pub time_left: Duration,
}

/// What happens during a run.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Progress {
    /// Something that a user should know, one line.
    Note(String),
    /// A step was done.
    Step(StepProgress),
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Steps done and steps of the whole run.
    pub position: Position,
    /// Whether the stop flag ended it; its state is saved.
    pub is_interrupted: bool,
    /// Task loss of the last step; none where nothing was left to do.
    pub task: Option<f64>,
    /// Share of gates near zero by kind after the last step.
    pub near_zero: BTreeMap<String, f64>,
    /// The effective settings.
    pub config: Config,
}

/// Runs a search in `run_dir`, from the start or from its newest checkpoint.
///
/// `stop` is looked at after each step; where it is set, the state is saved and the outcome is interrupted.
/// Errors: [`SearchError`]; whatever the error, the run directory keeps its last complete checkpoint.
pub fn run(
    job: &Job<'_>,
    data: &Dataset,
    config: &Config,
    run_dir: &Path,
    progress: &mut dyn FnMut(Progress),
    stop: &AtomicBool,
) -> Result<Outcome, SearchError> {
    config.check()?;
    let (config, steps) = decide(job, data, config, progress)?;
    let (data, _) = &data.hold_out(config.held_out);
    let mut dir = RunDir::open(run_dir, job.resume)?;
    if let Some(warning) = dir.warning.take() {
        progress(Progress::Note(warning));
    }
    let fingerprint = fingerprint(data)?;
    let saved = if job.resume { Checkpoint::newest(run_dir)? } else { None };
    if let Some(saved) = &saved {
        saved.meta.check(run_dir, job.model_sha256, &fingerprint, &config)?;
    }
    let position = saved.as_ref().map_or(Position { of: steps, ..Position::default() }, |c| c.meta.position);
    if saved.as_ref().is_some_and(|c| c.meta.finished) {
        return Ok(Outcome { position, is_interrupted: false, task: None, near_zero: BTreeMap::new(), config });
    }
    let trainer = open_trainer(job, &config, saved.map(|c| c.state))?;
    if let Some(why) = &trainer.device().why_not_cuda {
        progress(Progress::Note(format!("training on the processor: {why}")));
    }
    dir.write_config(&config)?;
    dir.open_log(position.step)?;
    let loaders = loader_count(config.threads);
    let search = Search { job, config, dir, fingerprint, trainer, position, last: None, loaders };
    search.train(data, progress, stop)
}

/// The effective settings, and the number of steps.
fn decide(
    job: &Job<'_>,
    data: &Dataset,
    config: &Config,
    progress: &mut dyn FnMut(Progress),
) -> Result<(Config, u64), SearchError> {
    let has_labels = data.labels().is_some();
    let loss = config.loss.unwrap_or(if has_labels { LossChoice::Ce } else { LossChoice::Kd });
    let mut config = config.clone();
    if let Some(fixed) = eval::fixed_batch(job.graph, job.facts)
        && fixed != config.batch
    {
        progress(Progress::Note(format!("the model's batch is fixed to {fixed}: batch = {fixed}, not {}", config.batch)));
        config.batch = fixed;
    }
    if loss == LossChoice::Ce
        && let Some(classes) = classes(job)
    {
        data.check_labels(classes)?;
    }
    let (train, _) = data.hold_out(config.held_out);
    let steps = step_count(train.len(), config.batch, config.accumulate, config.epochs, config.max_steps)?;
    Ok((config.decided(steps, loss), steps))
}

/// Steps of a run: only full batches count.
pub(crate) fn step_count(n: usize, batch: usize, accumulate: usize, epochs: u32, max: Option<u64>) -> Result<u64, SearchError> {
    let per_epoch = (n / (batch * accumulate).max(1)) as u64;
    if per_epoch == 0 {
        let what = format!(
            "the data has {n} samples that train, one step needs {} (batch {batch} x accumulate {accumulate})",
            batch * accumulate
        );
        return Err(SearchError::Unsuitable { what });
    }
    let steps = per_epoch * u64::from(epochs);
    Ok(max.map_or(steps, |max| steps.min(max)))
}

/// Classes of the output that cross entropy compares, where they are known.
fn classes(job: &Job<'_>) -> Option<usize> {
    let outputs = job.graph.outputs().iter().copied();
    let mut fitting = outputs.filter(|v| job.output.is_none_or(|name| job.graph.value(*v).name() == name));
    fitting.find_map(|v| {
        let shape = job.facts.shape(v)?;
        (shape.len() == 2).then(|| shape[1].size()).flatten()
    })
}

/// A hash that tells data sets apart: count, labels, and up to 64 samples.
pub(crate) fn fingerprint(data: &Dataset) -> Result<String, SearchError> {
    const SAMPLES: usize = 64;
    let every = data.len().div_ceil(SAMPLES).max(1);
    let positions: Vec<usize> = (0..data.len()).step_by(every).collect();
    let mut hash = Sha256::new();
    hash.update((data.len() as u64).to_le_bytes());
    for label in data.labels().unwrap_or_default() {
        hash.update(label.to_le_bytes());
    }
    for sample in data.select(&positions).hashes()? {
        hash.update(sample);
    }
    Ok(hash.finalize().iter().take(8).map(|b| format!("{b:02x}")).collect())
}

/// Threads that load data: as many as the engine has, since either waits for the other.
pub(crate) fn loader_count(threads: usize) -> usize {
    if threads > 0 { threads } else { std::thread::available_parallelism().map_or(1, usize::from) }
}

fn session_options(config: &Config, library: &LibraryChoice) -> Result<SessionOptions, SearchError> {
    Ok(SessionOptions {
        threads: config.threads,
        device: config.device()?,
        library: library.clone(),
        ..SessionOptions::default()
    })
}

/// The output named, as the loss takes it.
pub(crate) fn loss_outputs(graph: &Graph, output: Option<&str>) -> Result<Vec<ValueId>, SearchError> {
    let Some(name) = output else { return Ok(Vec::new()) };
    let found = graph.outputs().iter().find(|v| graph.value(**v).name() == name);
    found
        .map(|v| vec![*v])
        .ok_or_else(|| SearchError::Unsuitable { what: format!("the model has no output '{}'", name.escape_debug()) })
}

fn open_trainer(job: &Job<'_>, config: &Config, state: Option<trainer::State>) -> Result<Trainer, SearchError> {
    let loss = match config.loss {
        Some(LossChoice::Ce) | None => Loss::Ce,
        Some(LossChoice::Kd) => Loss::Kd,
        Some(LossChoice::Mse) => Loss::Mse,
        Some(LossChoice::Cosine) => Loss::Cosine,
    };
    let train = match config.train {
        TrainChoice::All => Train::All,
        TrainChoice::Norm => Train::Norm,
        TrainChoice::Gates => Train::Gates,
    };
    let options = Options {
        tied: sites::tied(job.groups, config),
        per_sample: false,
        train,
        loss,
        loss_outputs: loss_outputs(job.graph, job.output)?,
        optimizer: None,
        gates_at_least_zero: true,
    };
    let net = supernet::build(job.graph, job.facts, job.groups, job.tokens, &options)?;
    let adam = AdamW { weight_decay: config.weight_decay as f32, clip_norm: config.clip.map(|c| c as f32), ..AdamW::default() };
    let gate_rate = (config.gate_lr.unwrap_or(config.lr) / config.lr) as f32;
    let options = StepOptions { adam, gate_rate, accumulate: config.accumulate, ema: config.ema.map(|e| e as f32) };
    let graph = step::build(net, &options)?;
    let session = session_options(config, job.library)?;
    let teacher = if loss == Loss::Ce { None } else { Some(Teacher::open(job.graph, &session, 0.0)?) };
    let mut trainer = Trainer::new(graph, &session, teacher, state)?;
    for (kind, units) in units_by_kind(&trainer.gates) {
        trainer.set_scalar(&format!("l1.{kind}"), config.l1_of(&kind) / units.max(1) as f64)?;
    }
    Ok(trainer)
}

fn units_by_kind(gates: &[GateInput]) -> BTreeMap<String, usize> {
    let mut units = BTreeMap::new();
    for gate in gates {
        *units.entry(gate.kind.clone()).or_insert(0) += gate.units;
    }
    units
}

/// The rate at a step, counted from 1.
pub(crate) fn rate(lr: f64, warmup: f64, schedule: Schedule, step: u64, of: u64) -> f64 {
    let rising = (warmup * of as f64).floor();
    let done = step.saturating_sub(1) as f64;
    if done < rising {
        return lr * (done + 1.0) / (rising + 1.0);
    }
    match schedule {
        Schedule::Constant => lr,
        Schedule::Cosine => {
            let share = (done - rising) / (of as f64 - rising).max(1.0);
            lr * 0.5 * (1.0 + (std::f64::consts::PI * share.min(1.0)).cos())
        }
    }
}

/// Speed over the last steps.
pub(crate) struct Speed {
    last: Instant,
    seconds_per_step: Option<f64>,
}

impl Speed {
    pub(crate) fn start() -> Self {
        Self { last: Instant::now(), seconds_per_step: None }
    }

    /// Seconds of one step, as a moving average that forgets in about ten steps.
    pub(crate) fn tick(&mut self) -> f64 {
        let now = Instant::now();
        let seconds = now.duration_since(self.last).as_secs_f64();
        self.last = now;
        let mean = self.seconds_per_step.map_or(seconds, |old| old + 0.1 * (seconds - old));
        self.seconds_per_step = Some(mean);
        mean
    }
}

/// What is not finite in a step, if anything is.
pub(crate) fn not_finite(numbers: &StepNumbers) -> Option<&'static str> {
    match (numbers.loss.is_finite(), numbers.norm.is_finite()) {
        (false, _) => Some("loss"),
        (_, false) => Some("gradient"),
        _ => None,
    }
}

/// A run under way.
struct Search<'a> {
    job: &'a Job<'a>,
    config: Config,
    dir: RunDir,
    fingerprint: String,
    trainer: Trainer,
    position: Position,
    last: Option<StepNumbers>,
    loaders: usize,
}

impl Search<'_> {
    fn train(mut self, data: &Dataset, progress: &mut dyn FnMut(Progress), stop: &AtomicBool) -> Result<Outcome, SearchError> {
        let mut speed = Speed::start();
        while self.position.step < self.position.of {
            let before = self.position.step;
            if self.epoch(data, &mut speed, progress, stop)? {
                self.save(false)?;
                return Ok(self.outcome(true));
            }
            if self.position.step == before && self.position.slot == 0 {
                return Err(SearchError::Unsuitable { what: "no full batch could be read from the data".to_string() });
            }
            let is_last = self.position.step >= self.position.of || self.position.epoch + 1 >= u64::from(self.config.epochs);
            self.write_gates()?;
            self.position.epoch += 1;
            self.position.slot = 0;
            if is_last {
                break;
            }
            self.save(false)?;
        }
        // Unusable images make fewer steps than were counted at the start.
        self.position.of = self.position.step;
        self.save(true)?;
        Ok(self.outcome(false))
    }

    /// The rest of an epoch; true where the stop flag ended it.
    fn epoch(
        &mut self,
        data: &Dataset,
        speed: &mut Speed,
        progress: &mut dyn FnMut(Progress),
        stop: &AtomicBool,
    ) -> Result<bool, SearchError> {
        let (seed, epoch, start) = (self.config.seed, self.position.epoch, Start::Slot(self.position.slot));
        let order = BatchOrder { seed, epoch, shuffle: true, start, tail: Tail::Drop };
        let mut batches = data.batches(order, self.config.batch, self.loaders, self.config.augment());
        let mut group: Vec<Batch> = Vec::with_capacity(self.config.accumulate);
        while self.position.step < self.position.of {
            if stop.load(Ordering::Relaxed) {
                return Ok(true);
            }
            let Some(batch) = batches.next().transpose()? else { break };
            for skipped in &batch.skipped {
                progress(Progress::Note(format!("left out: {skipped}")));
            }
            group.push(batch);
            if group.len() < self.config.accumulate {
                continue;
            }
            self.one_step(&group, speed, progress)?;
            group.clear();
            if self.position.step.is_multiple_of(self.config.checkpoint_every) && self.position.step < self.position.of {
                self.save(false)?;
            }
        }
        Ok(false)
    }

    fn one_step(&mut self, group: &[Batch], speed: &mut Speed, progress: &mut dyn FnMut(Progress)) -> Result<(), SearchError> {
        let (step, of) = (self.position.step + 1, self.position.of);
        let lr = rate(self.config.lr, self.config.warmup, self.config.schedule, step, of);
        let numbers = self.trainer.step(group, step, lr)?;
        if let Some(what) = not_finite(&numbers) {
            return Err(self.not_finite(step, what));
        }
        let images: usize = group.iter().map(|b| b.count).sum();
        let seconds = speed.tick();
        self.position.step = step;
        self.position.slot = group.last().map_or(0, |b| b.next_slot);
        let images_per_second = images as f64 / seconds.max(1e-9);
        self.dir.log(&serde_json::json!({
            "step": step,
            "epoch": self.position.epoch + 1,
            "loss": numbers.loss,
            "task": numbers.task,
            "l1": numbers.l1,
            "lr": lr,
            "grad_norm": numbers.norm,
            "near_zero": numbers.near_zero,
            "images_per_s": images_per_second,
        }))?;
        progress(Progress::Step(StepProgress {
            step,
            of,
            epoch: self.position.epoch + 1,
            epochs: u64::from(self.config.epochs),
            loss: numbers.loss,
            task: numbers.task,
            near_zero: numbers.near_zero.clone(),
            images_per_second,
            time_left: Duration::from_secs_f64(seconds * (of - step) as f64),
        }));
        self.last = Some(numbers);
        Ok(())
    }

    fn not_finite(&self, step: u64, what: &'static str) -> SearchError {
        let saved = Checkpoint::newest(&self.dir.path).ok().flatten().map(|c| c.meta.position.step);
        let kept = match saved {
            Some(step) => format!("{} keeps the state after step {step}", self.dir.path.display()),
            None => "no step was saved yet".to_string(),
        };
        let clip = if self.config.clip.is_none() { ", or set a clip of 1" } else { "" };
        let advice = format!(
            "Use a lower lr (it is {}) or gate_lr (it is {}){clip}; and check the model's weights and the data's \
             normalisation",
            self.config.lr,
            self.config.gate_lr.unwrap_or(self.config.lr)
        );
        SearchError::NotFinite { step, what, kept, advice }
    }

    fn save(&self, finished: bool) -> Result<(), SearchError> {
        let meta = Meta {
            schema_version: checkpoint::SCHEMA,
            vitrim: env!("CARGO_PKG_VERSION").to_string(),
            model_sha256: self.job.model_sha256.to_string(),
            data: self.fingerprint.clone(),
            position: self.position,
            finished,
            config: self.config.clone(),
            gates: self.trainer.gates.iter().map(Into::into).collect(),
            params: self.trainer.params.iter().map(Into::into).collect(),
        };
        checkpoint::write(&self.dir.path, &meta, &self.trainer.kept(), &|name| {
            let values = self.trainer.read(name)?;
            let is_finite = values.iter().all(|v| v.is_finite());
            if is_finite { Ok(values) } else { Err(self.not_finite(self.position.step, "new weights")) }
        })
    }

    /// The gates at the end of an epoch, by group.
    fn write_gates(&self) -> Result<(), SearchError> {
        let mut gates: Vec<(&String, Vec<f32>)> = Vec::new();
        for gate in &self.trainer.gates {
            let name = self.trainer.averaged(&gate.input).unwrap_or_else(|| gate.input.clone());
            let values = self.trainer.read(&name)?;
            gates.extend(gate.groups.iter().map(|group| (group, values.clone())));
        }
        let dims: Vec<[usize; 1]> = gates.iter().map(|(_, v)| [v.len()]).collect();
        let tensors = gates.iter().zip(&dims).map(|((group, v), d)| (group.as_str(), &d[..], &v[..]));
        let meta =
            serde_json::json!({ "schema_version": checkpoint::SCHEMA, "model_sha256": self.job.model_sha256, "by": "search" });
        let epoch = self.position.epoch + 1;
        self.dir.write_gates(epoch, &checkpoint::encode(tensors, meta.to_string())?)
    }

    fn outcome(self, is_interrupted: bool) -> Outcome {
        let near_zero = self.last.as_ref().map(|n| n.near_zero.clone()).unwrap_or_default();
        Outcome { position: self.position, is_interrupted, task: self.last.map(|n| n.task), near_zero, config: self.config }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_rises_then_falls() {
        let at = |step| rate(1.0, 0.1, Schedule::Cosine, step, 100);
        assert!(at(1) > 0.0 && at(1) < at(10) && at(10) < 1.0);
        assert_eq!(at(11), 1.0);
        assert!((at(56) - 0.5).abs() < 0.01 && at(100) > 0.0 && at(100) < 0.001);
        assert_eq!(rate(1.0, 0.0, Schedule::Constant, 1, 100), 1.0);
        assert_eq!(rate(1.0, 0.0, Schedule::Cosine, 1, 1), 1.0);
    }

    #[test]
    fn only_full_steps_count() {
        assert_eq!(step_count(8000, 64, 1, 3, None).ok(), Some(375));
        assert_eq!(step_count(8000, 64, 2, 3, None).ok(), Some(186));
        assert_eq!(step_count(8000, 64, 1, 3, Some(10)).ok(), Some(10));
        assert!(
            step_count(63, 64, 1, 3, None).is_err_and(|e| e.to_string().contains("63 samples that train, one step needs 64"))
        );
    }
}
