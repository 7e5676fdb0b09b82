//! Fine-tuning by distillation: the search's training without gates, for a model that was cut.
//!
//! In: the cut model, a teacher (the original), images. Out: the model with the best weights seen, judged on images that took no
//! part in training; the given weights where training did not help. Example: 8,000 images, 3 epochs: 7,200 train, 800 judge.
//! A short training can harm a good model, so "no better" is an ordinary result.
//! Invariant: equal inputs, settings and threads on a processor give equal weights; the result is never worse on the judging images
//! than what was given (higher KL to the teacher, or fewer right where there are labels).

use super::config::{Schedule, parse_device};
use super::read::set_weight;
use super::step::{self, StepOptions};
use super::trainer::{Teacher, Trainer};
use super::{Progress, SearchError, Speed, StepProgress, loader_count, loss_outputs, not_finite, rate, step_count};
use crate::autodiff::loss::Loss;
use crate::autodiff::update::AdamW;
use crate::data::{Augment, BatchOrder, Dataset, Start, Tail};
use crate::eval::{self, EvalOptions, Evaluation};
use crate::graph::{Graph, Tensor};
use crate::infer::Facts;
use crate::runtime::{self, LibraryChoice, RuntimeName, Session, SessionOptions};
use crate::supernet::{self, Options, Train};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// What is fine-tuned.
#[derive(Clone, Copy)]
pub struct FinetuneJob<'a> {
    /// The model.
    pub student: &'a Graph,
    /// Of that graph.
    pub facts: &'a Facts,
    /// What it should do: a model with the same inputs and the same class output.
    pub teacher: &'a Graph,
    /// The output with class scores; else the first that fits.
    pub output: Option<&'a str>,
    /// Which ONNX Runtime.
    pub library: &'a LibraryChoice,
}

/// Settings of a fine-tuning.
#[derive(Clone, Debug, PartialEq)]
pub struct FinetuneConfig {
    /// Passes over the data.
    pub epochs: u32,
    /// Stops after this many steps.
    pub max_steps: Option<u64>,
    /// Images of a step.
    pub batch: usize,
    /// Rate at its highest.
    pub lr: f64,
    /// Share of the steps over which it rises.
    pub warmup: f64,
    /// How it goes then.
    pub schedule: Schedule,
    /// Decoupled weight decay of contracted weights.
    pub weight_decay: f64,
    /// Largest norm of the gradient.
    pub clip: Option<f64>,
    /// Share of the labels in the targets, 0 to 1; the rest is the teacher's. 0 needs no labels.
    pub label_share: f64,
    /// Share of the images that judge and do not train, see [`Dataset::hold_out`].
    pub held_out: f64,
    /// Decides order and augmentation.
    pub seed: u64,
    /// Images are moved by up to this many pixels.
    pub shift: usize,
    /// Images are mirrored with probability one half.
    pub flip: bool,
    /// Decay of moving averages, which are then judged and given; `None` for the weights themselves.
    pub ema: Option<f64>,
    /// `cpu`, `cuda:N` or `auto`.
    pub device: String,
    /// Threads of the engine; 0 for as many as the process may use.
    pub threads: usize,
}

impl Default for FinetuneConfig {
    fn default() -> Self {
        Self {
            epochs: 3,
            max_steps: None,
            batch: 64,
            lr: 2e-4,
            warmup: 0.05,
            schedule: Schedule::Cosine,
            weight_decay: 1e-3,
            clip: Some(1.0),
            label_share: 0.0,
            held_out: 0.1,
            seed: 0,
            shift: 0,
            flip: false,
            ema: None,
            device: "cpu".to_string(),
            threads: 0,
        }
    }
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Finetuned {
    /// The model with the best weights: those given, where none were better.
    pub graph: Graph,
    /// The weights that changed, by constant of the model; empty where none were better.
    pub weights: BTreeMap<String, Tensor>,
    /// The given model on the judging images, against the teacher.
    pub before: Evaluation,
    /// The resulting model on them.
    pub after: Evaluation,
    /// The epoch that the weights are of, counted from 1; `None` where training did not help.
    pub best_epoch: Option<u32>,
    /// Steps done.
    pub steps: u64,
    /// Whether the stop flag ended it.
    pub is_interrupted: bool,
}

/// Trains the student towards the teacher and gives the best weights.
///
/// Errors: [`SearchError`], among them data that is too small for a step, and a loss that is not finite from the first epoch on.
pub fn finetune(
    job: &FinetuneJob<'_>,
    data: &Dataset,
    config: &FinetuneConfig,
    progress: &mut dyn FnMut(Progress),
    stop: &AtomicBool,
) -> Result<Finetuned, SearchError> {
    check(config, data)?;
    let fixed = eval::fixed_batch(job.student, job.facts);
    let batch = fixed.unwrap_or(config.batch);
    let (train, judge) = data.hold_out(config.held_out);
    let of = step_count(train.len(), batch, 1, config.epochs, config.max_steps)?;
    let session = SessionOptions {
        threads: config.threads,
        device: parse_device(&config.device)?,
        library: job.library.clone(),
        ..SessionOptions::default()
    };
    let loaders = loader_count(config.threads);
    let options = EvalOptions { batch, is_batch_fixed: fixed.is_some(), loaders, output: job.output.map(String::from) };
    let mut judges = Judges { data: judge, options, session: session.clone(), teacher: open(job.teacher, &session)? };
    let before = judges.judge(job.student, stop)?;
    let mut run = Run { job, config, trainer: open_trainer(job, config, &session)?, batch, loaders, step: 0, of };
    let mut best = (before, job.student.clone(), BTreeMap::new(), None);
    let mut is_interrupted = false;
    let mut speed = Speed::start();
    for epoch in 0..config.epochs {
        match run.epoch(&train, epoch, &mut speed, progress, stop) {
            Ok(true) => {
                is_interrupted = true;
                break;
            }
            Ok(false) => {}
            // What was good before stays good.
            Err(error @ SearchError::NotFinite { .. }) if best.3.is_some() => {
                progress(Progress::Note(error.to_string()));
                break;
            }
            Err(error) => return Err(error),
        }
        let (graph, weights) = run.model()?;
        let found = match judges.judge(&graph, stop) {
            Err(SearchError::Eval(eval::EvalError::Interrupted)) => {
                is_interrupted = true;
                break;
            }
            other => other?,
        };
        if is_better(&found, &best.0, &before) {
            best = (found, graph, weights, Some(epoch + 1));
        }
        if run.step >= of {
            break;
        }
    }
    let (after, graph, weights, best_epoch) = best;
    Ok(Finetuned { graph, weights, before, after, best_epoch, steps: run.step, is_interrupted })
}

fn check(config: &FinetuneConfig, data: &Dataset) -> Result<(), SearchError> {
    let bad = |key: &str, reason: &str| Err(SearchError::Config { key: key.to_string(), reason: reason.to_string() });
    if config.epochs == 0 || config.batch == 0 {
        return bad(if config.batch == 0 { "batch" } else { "epochs" }, "is 0, expected 1 or more");
    }
    if !(config.lr.is_finite() && config.lr > 0.0) {
        return bad("lr", "expected a number above 0");
    }
    if !(0.0..=1.0).contains(&config.label_share) {
        return bad("label_share", "expected 0 to 1");
    }
    if !(config.held_out > 0.0 && config.held_out < 1.0) {
        return bad("held_out", "expected more than 0 and less than 1");
    }
    if config.label_share > 0.0 && data.labels().is_none() {
        return Err(SearchError::Unsuitable { what: "label_share is above 0 and the data has no labels".to_string() });
    }
    Ok(())
}

/// Lower KL than the best so far, and where there are labels, not fewer right than what was given.
fn is_better(found: &Evaluation, best: &Evaluation, given: &Evaluation) -> bool {
    let lower = match (found.kl, best.kl) {
        (Some(new), Some(old)) => new.is_finite() && (new < old || !old.is_finite()),
        _ => false,
    };
    let right = |e: &Evaluation| e.accuracy.map_or(0, |a| a.correct);
    lower && right(found) >= right(given)
}

fn open(graph: &Graph, options: &SessionOptions) -> Result<Box<dyn Session>, SearchError> {
    Ok(runtime::open_graph(RuntimeName::Ort, graph, options)?)
}

/// Judges models on images that do not train.
struct Judges {
    data: Dataset,
    options: EvalOptions,
    session: SessionOptions,
    teacher: Box<dyn Session>,
}

impl Judges {
    fn judge(&mut self, graph: &Graph, stop: &AtomicBool) -> Result<Evaluation, SearchError> {
        let mut model = open(graph, &self.session)?;
        Ok(eval::evaluate(model.as_mut(), Some(self.teacher.as_mut()), &self.data, &self.options, stop)?)
    }
}

fn open_trainer(job: &FinetuneJob<'_>, config: &FinetuneConfig, session: &SessionOptions) -> Result<Trainer, SearchError> {
    // With labels among them the targets are probabilities; without, KL is what is minimized and shown.
    let loss = if config.label_share > 0.0 { Loss::SoftCe } else { Loss::Kd };
    let options = Options { train: Train::All, loss, loss_outputs: loss_outputs(job.student, job.output)?, ..Options::default() };
    let net = supernet::build(job.student, job.facts, &[], &[], &options)?;
    let adam = AdamW { weight_decay: config.weight_decay as f32, clip_norm: config.clip.map(|c| c as f32), ..AdamW::default() };
    let graph = step::build(net, &StepOptions { adam, gate_rate: 1.0, accumulate: 1, ema: config.ema.map(|e| e as f32) })?;
    let teacher = Teacher::open(job.teacher, session, config.label_share)?;
    Trainer::new(graph, session, Some(teacher), None)
}

/// A fine-tuning under way.
struct Run<'a> {
    job: &'a FinetuneJob<'a>,
    config: &'a FinetuneConfig,
    trainer: Trainer,
    batch: usize,
    loaders: usize,
    step: u64,
    of: u64,
}

impl Run<'_> {
    /// One epoch; true where the stop flag ended it.
    fn epoch(
        &mut self,
        data: &Dataset,
        epoch: u32,
        speed: &mut Speed,
        progress: &mut dyn FnMut(Progress),
        stop: &AtomicBool,
    ) -> Result<bool, SearchError> {
        let (seed, config) = (self.config.seed, self.config);
        let order = BatchOrder { seed, epoch: epoch.into(), shuffle: true, start: Start::Batch(0), tail: Tail::Drop };
        let augment = (config.shift > 0 || config.flip).then_some(Augment { shift: config.shift, flip: config.flip });
        for batch in data.batches(order, self.batch, self.loaders, augment) {
            if stop.load(Ordering::Relaxed) {
                return Ok(true);
            }
            if self.step >= self.of {
                break;
            }
            let batch = batch?;
            let step = self.step + 1;
            let lr = rate(config.lr, config.warmup, config.schedule, step, self.of);
            let numbers = self.trainer.step(std::slice::from_ref(&batch), step, lr)?;
            if let Some(what) = not_finite(&numbers) {
                let advice = format!("Use a lower lr (it is {}), and check the data's normalisation", config.lr);
                return Err(SearchError::NotFinite { step, what, kept: "the weights before this epoch are kept".into(), advice });
            }
            self.step = step;
            let seconds = speed.tick();
            progress(Progress::Step(StepProgress {
                step,
                of: self.of,
                epoch: u64::from(epoch) + 1,
                epochs: config.epochs.into(),
                loss: numbers.loss,
                task: numbers.task,
                near_zero: numbers.near_zero,
                images_per_second: batch.count as f64 / seconds.max(1e-9),
                time_left: Duration::from_secs_f64(seconds * (self.of - step) as f64),
            }));
        }
        Ok(false)
    }

    /// The student with the weights of now.
    fn model(&self) -> Result<(Graph, BTreeMap<String, Tensor>), SearchError> {
        let mut graph = self.job.student.clone();
        let mut weights = BTreeMap::new();
        for p in &self.trainer.params {
            let name = self.trainer.averaged(&p.input).unwrap_or_else(|| p.input.clone());
            let weight = Tensor::f32(&p.initial.dims, &self.trainer.read(&name)?);
            let key = p.input.strip_prefix("param.").unwrap_or(&p.input);
            set_weight(&mut graph, &p.initializer, key, &weight, &p.uses)?;
            weights.insert(key.to_string(), weight);
        }
        Ok((graph, weights))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::Accuracy;

    fn result(kl: f64, correct: u64) -> Evaluation {
        Evaluation { n: 10, accuracy: Some(Accuracy { correct, n: 10 }), kl: Some(kl), agreement: None }
    }

    #[test]
    fn only_what_is_better_in_both_ways_replaces_what_was_given() {
        let given = result(0.5, 8);
        assert!(is_better(&result(0.4, 8), &given, &given));
        assert!(!is_better(&result(0.4, 7), &given, &given));
        assert!(!is_better(&result(0.6, 9), &given, &given));
        assert!(!is_better(&result(f64::NAN, 9), &given, &given));
        assert!(is_better(&result(0.3, 8), &result(0.4, 9), &given));
    }
}
