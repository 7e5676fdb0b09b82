//! The main job: search, plan, cut, fine-tune, verify, measure.
//!
//! Everything that can be checked before the long work is checked by [`Slim::check`]. A part of the data takes no part in training
//! and is what accuracy is measured on.

use super::allocate::{CurveTime, Repaired, cut_calibrated, cut_trained, losses};
use super::calibrate::{BasisChoice, CalibrateAsk, Calibrating, Calibration, Compensation, calibrate};
use super::edit::{Cut, cut, record_trained};
use super::predict::Predicted;
use super::train::{EvalAsk, SearchAsk, bench, bench_feeds, check_search, evaluate, finetune, search};
use super::{Error, Model, ProofData, analyse, before_after, check_not_chance, class_output, make_plan, prove};
use crate::anatomy::Kind;
use crate::bench as latency;
use crate::compensate::Repair;
use crate::cost::Sizes;
use crate::curves::{Curves, How};
use crate::data::Dataset;
use crate::eval::Evaluation;
use crate::exact::Refused;
use crate::graph::Graph;
use crate::onnx::Loaded;
use crate::plan::{Ask, Limits, Plan, Promised};
use crate::runtime::{RuntimeName, SessionOptions};
use crate::score::{self, Scores};
use crate::search::{Config, FinetuneConfig, Finetuned, Outcome, Progress};
use crate::verify::{self, Floors, Settings, Verdict};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// How much is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recipe {
    /// Look at images, cut, repair; nothing trains and no label is read. Without images: cut by the size of weights.
    OneShot,
    /// Search, then cut.
    Search,
    /// Search, cut, then train towards the original.
    SearchFinetune,
}

/// What is asked for.
pub struct Slim<'a> {
    /// The model.
    pub model: &'a Model,
    /// Units or cost to keep.
    pub ask: &'a Ask,
    /// As the user wrote it.
    pub asked: &'a str,
    /// What limits the choice of units.
    pub limits: Limits,
    /// How much is done.
    pub recipe: Recipe,
    /// The images, where there are any.
    pub data: Option<SlimData>,
    /// The output with class scores.
    pub output: Option<String>,
    /// What images are asked for without training.
    pub repair: Repairing,
    /// Settings of the search.
    pub config: Config,
    /// Settings of the fine-tuning.
    pub finetune: FinetuneConfig,
    /// How sessions are opened that verify and measure.
    pub session: SessionOptions,
    /// Where to verify and measure.
    pub runtimes: Vec<RuntimeName>,
    /// What accuracy must reach.
    pub floors: Floors,
}

/// What images are asked for without training.
#[derive(Clone, Copy, Debug)]
pub struct Repairing {
    /// Images at most.
    pub images: usize,
    /// The basis in which dims of heads are cut.
    pub basis: BasisChoice,
    /// How what stays makes up for what goes.
    pub how: Compensation,
    /// How long the losses of cuts may be measured.
    pub curves: CurveTime,
}

/// Of the data, where no other data judges.
const JUDGING_SHARE: f64 = 0.1;

/// The images of a job.
#[derive(Clone)]
pub struct SlimData {
    /// Where they come from.
    pub path: PathBuf,
    /// For training.
    pub train: Dataset,
    /// For measuring.
    pub judge: Dataset,
}

impl SlimData {
    /// `judge` where it is given; else a tenth of `data`, 2,000 images at most, which then do not train.
    pub fn new(path: &Path, data: Dataset, judge: Option<Dataset>) -> Self {
        let (train, judge) = match judge {
            Some(judge) => (data, judge),
            None => data.hold_out(JUDGING_SHARE),
        };
        Self { path: path.to_path_buf(), train, judge }
    }
}

/// What happens during the job.
pub enum Event {
    /// Another stage begins.
    Stage(&'static str),
    /// Training.
    Step(&'static str, Progress),
    /// Of something countable so many are done, of so many.
    Count(&'static str, usize, usize),
    /// What a user should know.
    Note(String),
}

/// What a job would do.
pub struct Forecast {
    /// The plan by the size of weights: as many units as a search would leave, though not the same ones.
    pub plan: Plan,
    /// One step of the search, measured; none where nothing trains.
    pub step: Option<Duration>,
    /// Steps of search and fine-tuning.
    pub steps: u64,
    /// Unit: bytes of memory at its highest so far, where the system tells.
    pub memory: Option<u64>,
}

/// A finished job.
pub struct Slimmed {
    /// The smaller model.
    pub graph: Graph,
    /// What was cut and edited.
    pub plan: Plan,
    /// Cost before and after.
    pub cost: Promised,
    /// The last verification.
    pub verdict: Verdict,
    /// The original on the judging images.
    pub before: Option<Evaluation>,
    /// The search, where there was one.
    pub search: Option<Outcome>,
    /// What was repaired, layer by layer.
    pub repairs: Vec<Repair>,
    /// Savings that were not made, and why.
    pub refused: Vec<Refused>,
    /// The fine-tuning, where there was one: on images of its own.
    pub finetuned: Option<FinetuneReport>,
    /// Latency of both, in turn; none where it was not verified.
    pub latency: Option<latency::Report>,
}

/// What fine-tuning did.
pub struct FinetuneReport {
    /// Before and after it, against the original.
    pub before: Evaluation,
    /// After it.
    pub after: Evaluation,
    /// The epoch that was best; `None` where the weights stayed as they were.
    pub best_epoch: Option<u32>,
    /// Steps done.
    pub steps: u64,
}

/// How a job ended.
pub enum Ended {
    /// To its end.
    Done(Box<Slimmed>),
    /// By a signal; what the search has is saved.
    Interrupted,
}

impl From<Slimmed> for Ended {
    fn from(slimmed: Slimmed) -> Self {
        Ended::Done(Box::new(slimmed))
    }
}

impl From<Calibrating> for Event {
    fn from(what: Calibrating) -> Self {
        let count = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
        match what {
            Calibrating::Statistics(done, of) => Event::Count("image", count(done), count(of)),
            Calibrating::Curves(done, of) => Event::Count("cut", done, of),
            Calibrating::Gradients(done, of) => Event::Count("image", done, of),
            Calibrating::Layers(done, of) => Event::Count("layer", done, of),
        }
    }
}

impl Slim<'_> {
    /// Checks what can be checked before the work: the budget, the weights, the output, the data.
    ///
    /// Gives a plan by the size of weights, with the cost that the job will have.
    pub fn check(&self) -> Result<Plan, Error> {
        class_output(self.model, self.output.as_deref())?;
        if self.recipe != Recipe::OneShot {
            check_search(self.model, &self.config.gates)?;
            if self.data.is_none() {
                return Err(Error::unsuitable(&self.model.path, "search and finetune need --data"));
            }
        }
        let scores = score::magnitude(self.model.graph(), &self.model.anatomy);
        self.plan(&scores)
    }

    /// A plan by the size of weights. Tokens have none, so they go only where the budget needs them to.
    fn guess(&self) -> Result<Plan, Error> {
        let scores = score::magnitude(self.model.graph(), &self.model.anatomy);
        if let Ask::Budget { targets, kinds } = self.ask {
            let kinds: BTreeSet<Kind> = kinds.iter().copied().filter(|k| *k != Kind::Token).collect();
            let ask = Ask::Budget { targets: targets.clone(), kinds };
            let plan = make_plan(self.model, &scores, &ask, self.asked, &self.limits);
            if let Ok(plan) = plan {
                return Ok(plan);
            }
        }
        self.plan(&scores)
    }

    fn plan(&self, scores: &Scores) -> Result<Plan, Error> {
        let mut plan = make_plan(self.model, scores, self.ask, self.asked, &self.limits)?;
        plan.seed = self.config.seed;
        Ok(plan)
    }

    /// Accuracy of the original on the judging images; refuses what is no better than chance.
    pub fn judge_original(&self, stop: &AtomicBool) -> Result<Option<Evaluation>, Error> {
        let Some(data) = &self.data else { return Ok(None) };
        let output = self.output.as_deref();
        let ask = EvalAsk { data: &data.judge, batch: self.config.batch, output, session: &self.session };
        let found = evaluate(self.model, None, &ask, stop)?;
        check_not_chance(self.model, &data.path, output, &found)?;
        Ok(Some(found))
    }

    /// Measures a few steps in a folder that is removed again.
    pub fn forecast(&self, stop: &AtomicBool) -> Result<Forecast, Error> {
        const STEPS: u64 = 3;
        self.check()?;
        let plan = self.guess()?;
        let (mut step, mut steps) = (None, 0);
        if let (Some(data), true) = (&self.data, self.recipe != Recipe::OneShot) {
            let folder = tempfile::tempdir().map_err(|e| Error::unsuitable(&std::env::temp_dir(), e.to_string()))?;
            let config = Config { max_steps: Some(STEPS), ..self.config.clone() };
            let mut seconds = Vec::new();
            let mut last = std::time::Instant::now();
            let mut count = |p: Progress| {
                if let Progress::Step(_) = p {
                    seconds.push(last.elapsed());
                    last = std::time::Instant::now();
                }
            };
            self.run_search(&config, data, folder.path(), false, &mut count, stop)?;
            // The first step also builds the session.
            step = seconds.get(1..).and_then(|s| s.iter().min().copied());
            let of = |epochs: u32, n: usize| u64::from(epochs) * (n / self.config.batch.max(1)) as u64;
            let tuning = if self.recipe == Recipe::SearchFinetune { self.finetune.epochs } else { 0 };
            let n = data.train.hold_out(self.held_out()).0.len();
            steps = of(self.config.epochs, n) + of(tuning, n);
        }
        Ok(Forecast { plan, step, steps, memory: peak_memory() })
    }

    fn held_out(&self) -> f64 {
        if self.recipe == Recipe::SearchFinetune { self.finetune.held_out } else { 0.0 }
    }

    fn run_search(
        &self,
        config: &Config,
        data: &SlimData,
        run_dir: &Path,
        resume: bool,
        progress: &mut dyn FnMut(Progress),
        stop: &AtomicBool,
    ) -> Result<Outcome, Error> {
        let (output, library) = (self.output.as_deref(), &self.session.library);
        // Fine-tuning judges on images that the search must not have seen.
        let config = &Config { held_out: self.held_out(), ..config.clone() };
        search(self.model, &SearchAsk { data: &data.train, config, run_dir, output, library, resume }, progress, stop)
    }

    /// Does the job. `run_dir` holds the search.
    pub fn run(&self, run_dir: &Path, resume: bool, tell: &mut dyn FnMut(Event), stop: &AtomicBool) -> Result<Ended, Error> {
        tell(Event::Stage("evaluating the original"));
        let before = self.judge_original(stop)?;
        let is_stopped = || stop.load(Ordering::Relaxed);
        let mut outcome = None;
        let cut = match (&self.data, self.recipe) {
            (Some(data), Recipe::Search | Recipe::SearchFinetune) => {
                tell(Event::Stage("searching"));
                let mut progress = |p: Progress| tell(Event::Step("search", p));
                let found = self.run_search(&self.config, data, run_dir, resume, &mut progress, stop)?;
                if found.is_interrupted {
                    return Ok(Ended::Interrupted);
                }
                outcome = Some(found);
                let plan = self.plan(&super::read_run(self.model, run_dir)?.scores())?;
                tell(Event::Stage("cutting"));
                match self.repair.how {
                    Compensation::Off => cut(self.model, Path::new("plan"), &plan, Some(run_dir), false)?.into(),
                    _ => self.repair_trained(&plan, data, run_dir, tell, stop)?,
                }
            }
            (Some(data), Recipe::OneShot) if !data.train.is_empty() => self.one_shot(data, run_dir, tell, stop)?,
            _ => {
                let plan = self.check()?;
                tell(Event::Stage("cutting"));
                cut(self.model, Path::new("plan"), &plan, None, false)?.into()
            }
        };
        if is_stopped() {
            return Ok(Ended::Interrupted);
        }
        let Repaired { cut: Cut { sliced, mut plan, warnings, refused }, repairs, .. } = cut;
        warnings.into_iter().for_each(|w| tell(Event::Note(w)));
        let cost = before_after(self.model, &sliced)?;
        let mut graph = sliced.graph;
        let mut finetuned = None;
        if let (Some(data), Recipe::SearchFinetune) = (&self.data, self.recipe) {
            tell(Event::Stage("verifying the cut"));
            let verdict = self.prove(&graph, &plan, None)?;
            if is_stopped() {
                return Ok(Ended::Interrupted);
            }
            if !verdict.pass {
                let search = outcome;
                return Ok(
                    Slimmed { graph, plan, cost, verdict, before, search, repairs, refused, finetuned, latency: None }.into()
                );
            }
            tell(Event::Stage("fine-tuning"));
            let tuned = self.tune(&graph, data, tell, stop)?;
            if tuned.is_interrupted {
                return Ok(Ended::Interrupted);
            }
            finetuned = Some(keep_tuned(&mut graph, &mut plan, tuned, tell));
        }
        tell(Event::Stage("verifying"));
        let verdict = self.prove(&graph, &plan, self.data.as_ref().map(|d| &d.judge))?;
        let mut latency = None;
        if verdict.pass && !is_stopped() {
            tell(Event::Stage("measuring latency"));
            latency = Some(self.latency(&graph)?);
        }
        if is_stopped() {
            return Ok(Ended::Interrupted);
        }
        Ok(Slimmed { graph, plan, cost, verdict, before, search: outcome, repairs, refused, finetuned, latency }.into())
    }

    fn calibration<'b>(&'b self, data: &'b SlimData, dir: Option<&'b Path>) -> CalibrateAsk<'b> {
        CalibrateAsk {
            data: Some(&data.train),
            images: self.repair.images,
            basis: self.repair.basis,
            batch: self.config.batch,
            seed: self.config.seed,
            output: self.output.as_deref(),
            session: &self.session,
            dir,
        }
    }

    /// Looks at images, measures what cuts lose, plans by that, cuts and repairs. No labels, no training.
    fn one_shot(&self, data: &SlimData, dir: &Path, tell: &mut dyn FnMut(Event), stop: &AtomicBool) -> Result<Repaired, Error> {
        std::fs::create_dir_all(dir).map_err(|e| Error::unsuitable(dir, e.to_string()))?;
        tell(Event::Stage("looking at images"));
        let ask = self.calibration(data, Some(dir));
        let found = calibrate(self.model, &ask, &mut |c| tell(c.into()), stop)?;
        let Ask::Budget { kinds, .. } = self.ask else {
            let plan = self.plan(&found.scores)?;
            tell(Event::Stage("cutting"));
            let plan = (Path::new("plan"), &plan);
            return cut_calibrated(self.model, plan, &found, (self.repair.how, false), &ask, &mut |c| tell(c.into()), stop);
        };
        let curves = self.curves(&found, &ask, kinds, tell, stop)?;
        let limits = Limits { losses: Some(losses(&curves)), ..self.limits.clone() };
        let mut plan = make_plan(self.model, &found.scores, self.ask, self.asked, &limits)?;
        plan.seed = self.config.seed;
        tell(Event::Stage("cutting"));
        let plan = (Path::new("plan"), &plan);
        cut_calibrated(self.model, plan, &found, (self.repair.how, false), &ask, &mut |c| tell(c.into()), stop)
    }

    /// What cuts lose: predicted where that is asked for and can be, else measured.
    fn curves(
        &self,
        found: &Calibration,
        ask: &CalibrateAsk<'_>,
        kinds: &BTreeSet<Kind>,
        tell: &mut dyn FnMut(Event),
        stop: &AtomicBool,
    ) -> Result<Curves, Error> {
        if self.repair.curves.how == How::Predicted {
            tell(Event::Stage("predicting what cuts lose"));
            match found.predicted(self.model, ask, kinds, &mut |c| tell(c.into()), stop)? {
                Predicted::Curves(curves) => return Ok(curves),
                Predicted::Refused(reason) => {
                    tell(Event::Note(format!("no curves can be predicted: {reason}; they are measured")))
                }
            }
        }
        tell(Event::Stage("measuring what cuts lose"));
        found.curves(self.model, ask, &self.repair.curves, kinds, &mut |c| tell(c.into()), stop)
    }

    /// Cuts what a search trained, and repairs it.
    fn repair_trained(
        &self,
        plan: &Plan,
        data: &SlimData,
        run_dir: &Path,
        tell: &mut dyn FnMut(Event),
        stop: &AtomicBool,
    ) -> Result<Repaired, Error> {
        let ask = self.calibration(data, None);
        cut_trained(self.model, (Path::new("plan"), plan), run_dir, (self.repair.how, false), &ask, &mut |c| tell(c.into()), stop)
    }

    fn tune(&self, graph: &Graph, data: &SlimData, tell: &mut dyn FnMut(Event), stop: &AtomicBool) -> Result<Finetuned, Error> {
        let student = self.small(graph)?;
        let mut progress = |p: Progress| tell(Event::Step("finetune", p));
        let images = (&data.train, self.output.as_deref());
        finetune(&student, self.model, images, &self.finetune, &self.session.library, &mut progress, stop)
    }

    /// The smaller model as a model of its own.
    fn small(&self, graph: &Graph) -> Result<Model, Error> {
        let path = self.model.path.with_extension("slim");
        let (facts, anatomy) = analyse(graph).map_err(|cause| Error::Infer { file: path.clone(), cause })?;
        let loaded = Loaded { graph: graph.clone(), warnings: Vec::new(), files: Vec::new() };
        Ok(Model { path, loaded, facts, anatomy, sizes: self.model.sizes.clone() })
    }

    fn prove(&self, graph: &Graph, plan: &Plan, judge: Option<&Dataset>) -> Result<Verdict, Error> {
        let settings = Settings {
            runtimes: self.runtimes.clone(),
            session: self.session.clone(),
            sizes: Sizes::clone(&self.model.sizes),
            seed: self.config.seed,
            output: self.output.clone(),
            floors: if judge.is_some() { self.floors } else { Floors::default() },
        };
        let data = judge.map(|data| ProofData { data, batch: self.config.batch, loaders: 2 });
        prove(self.model, graph, Path::new("plan"), plan, data, &settings)
    }

    fn latency(&self, graph: &Graph) -> Result<latency::Report, Error> {
        let small = self.small(graph)?;
        let first = self.runtimes.first().copied().unwrap_or(RuntimeName::Ort);
        let feeds = bench_feeds(self.model, 1, self.config.seed, first, &self.session)?;
        let threads = vec![if self.session.threads == 0 { 1 } else { self.session.threads }];
        let settings = latency::Settings {
            runtimes: self.runtimes.clone(),
            threads,
            warmup: 3,
            iterations: 50,
            time_limit: Some(Duration::from_secs(10)),
            session: self.session.clone(),
        };
        bench(&[self.model, &small], &feeds, &settings)
    }

    /// Whether a verdict says that floors hold but for exactness, or the other way round: the sentence for a report.
    pub fn why_not(verdict: &Verdict) -> String {
        let failed = verdict.checks.iter().find(|c| !c.pass);
        if let Some(c) = failed {
            return format!("{}: output '{}' {}", c.runtime, c.output, c.reason.as_deref().unwrap_or("differs"));
        }
        if let Some(reason) = verdict.accuracy.as_ref().and_then(|a: &verify::Accuracy| a.reason.clone()) {
            return reason;
        }
        let skipped: Vec<String> = verdict.skipped.iter().map(|s| format!("{}: {}", s.runtime, s.reason)).collect();
        format!("no runtime could check: {}", skipped.join("; "))
    }
}

/// Takes the tuned weights over, unless the plan cannot say where they came from.
fn keep_tuned(graph: &mut Graph, plan: &mut Plan, tuned: Finetuned, tell: &mut dyn FnMut(Event)) -> FinetuneReport {
    let mut report =
        FinetuneReport { before: tuned.before, after: tuned.after, best_epoch: tuned.best_epoch, steps: tuned.steps };
    if tuned.best_epoch.is_none() {
        tell(Event::Note("fine-tuning did not help: the weights of the search are kept".to_string()));
    } else if record_trained(plan, graph, &tuned.graph) {
        *graph = tuned.graph;
    } else {
        tell(Event::Note("fine-tuned weights are not used: constants that several nodes read were taken apart".to_string()));
        (report.best_epoch, report.after) = (None, report.before);
    }
    report
}

/// Kinds that a job may cut where none are named: tokens only where their gates are searched.
pub fn default_kinds(model: &Model, recipe: Recipe) -> BTreeSet<Kind> {
    let has = |kind: Kind| model.anatomy.groups.iter().any(|g| g.kind == kind);
    let mut kinds: BTreeSet<Kind> = [Kind::Mlp, Kind::Qk, Kind::Vo, Kind::Channel].into_iter().filter(|k| has(*k)).collect();
    if recipe != Recipe::OneShot && has(Kind::Token) {
        kinds.insert(Kind::Token);
    }
    kinds
}

/// Unit: bytes of memory that this process had at its highest; Linux only.
fn peak_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}
