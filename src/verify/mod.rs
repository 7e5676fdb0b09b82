//! OUT against the twin, in every runtime that can tell, and OUT against MODEL on data. Two questions, never mixed.
//!
//! In: the graphs of MODEL, of the twin and of OUT, MODEL's facts, and data if there is any. Out: a
//! [`Verdict`]. Example: for a ViT with a symbolic batch, ONNX Runtime and tract both run twin and OUT on `[1, 3, 224, 224]` and
//! `[3, 3, 224, 224]` of random numbers and of the user's images, and every output must agree within 1e-4 of its largest magnitude.
//!
//! Invariants: a runtime checks only where it loads MODEL and reproduces ONNX Runtime on it, else it is skipped with that reason; if
//! none can check, that is a failure; what the engines do to MODEL by themselves is measured and shown, and raises no tolerance.

pub mod accuracy;
mod bounds;
pub mod compare;
pub mod feeds;
pub mod nature;
pub mod report;
pub mod weights;

use crate::cost::Sizes;
use crate::data::array::Array;
use crate::data::{Batch, DataError};
use crate::eval;
use crate::graph::Graph;
use crate::infer::Facts;
use crate::runtime::{self, Error as RuntimeError, Optimize, RuntimeName, Session, SessionOptions};
pub use accuracy::{Accuracy, AccuracyError, Floors};
use compare::Difference;
pub use feeds::{FeedError, FeedSet, Feeds, InputSource, Tried};
pub use report::{Check, Edits, SCHEMA_VERSION, Skipped, Verdict};
pub use weights::WeightDifference;

/// Noise by output, where both runs gave numbers.
type Noise = Vec<(String, Option<f64>)>;

/// What is verified.
#[derive(Clone, Copy)]
pub struct Subject<'a> {
    /// MODEL's graph.
    pub graph: &'a Graph,
    /// MODEL's facts.
    pub facts: &'a Facts,
    /// The twin.
    pub twin: &'a Graph,
    /// OUT.
    pub out: &'a Graph,
    /// Whether the plan records edited tensors.
    pub is_edited: bool,
    /// What [`weights::first_difference`] found.
    pub weights: Option<&'a WeightDifference>,
}

/// How it is verified.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Runtimes, each once; ONNX Runtime is always asked first, since it is the reference.
    pub runtimes: Vec<RuntimeName>,
    /// How sessions are opened. tract runs on the processor whatever this says.
    pub session: SessionOptions,
    /// Sizes given for symbols.
    pub sizes: Sizes,
    /// Seed of random inputs.
    pub seed: u64,
    /// The output that holds logits; `None` means the first that could.
    pub output: Option<String>,
    /// What OUT must reach on data.
    pub floors: Floors,
}

impl Default for Settings {
    /// All runtimes of this build, no floors.
    fn default() -> Self {
        Self {
            runtimes: [RuntimeName::Ort, RuntimeName::Tract].into_iter().filter(|r| r.is_built()).collect(),
            session: SessionOptions::default(),
            sizes: Sizes::new(),
            seed: 0,
            output: None,
            floors: Floors::default(),
        }
    }
}

/// Why nothing could be verified. A negative result is no error but a [`Verdict`] without `pass`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The runtime itself is missing or unusable.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The data.
    #[error(transparent)]
    Data(#[from] DataError),
    /// Accuracy could not be measured.
    #[error(transparent)]
    Accuracy(#[from] AccuracyError),
    /// No inputs could be made.
    #[error(transparent)]
    Feeds(#[from] FeedError),
    /// The model gives other numbers at each run.
    #[error("node '{node}' ({op}) draws random numbers without a seed, so no two runs can be compared")]
    Random {
        /// The node.
        node: String,
        /// Its operator.
        op: String,
    },
    /// A floor needs data.
    #[error("--min-accuracy and --max-drop need --data")]
    FloorWithoutData,
}

/// The data of a verification.
pub type DataBatches<'a> = &'a mut dyn Iterator<Item = Result<Batch, DataError>>;

type Outputs = Vec<(String, Array)>;

/// What the original does in a runtime on one of the sets of inputs.
type Original = Result<Outputs, String>;

/// Verifies OUT. With data, its first batch also serves as input of the exactness checks.
///
/// Errors: a runtime that is missing or broken, data that cannot be read, a model that is not deterministic. A runtime that
/// refuses a model is no error.
pub fn compare(subject: &Subject<'_>, data: Option<DataBatches<'_>>, settings: &Settings) -> Result<Verdict, Error> {
    if let Some(id) = nature::random_node(subject.graph) {
        let op = subject.graph.node(id).op().to_string();
        return Err(Error::Random { node: subject.graph.label(id), op });
    }
    if data.is_none() && settings.floors.is_some() {
        return Err(Error::FloorWithoutData);
    }
    let mut data = data;
    let first = match &mut data {
        Some(batches) => batches.next().transpose()?,
        None => None,
    };
    let mut round = Round::new(subject, settings);
    if let Some(batch) = &first {
        round.data_sets = feeds::of_batch(subject.graph, subject.facts, batch);
    }
    let mut able = None;
    for runtime in round.order() {
        if round.check(runtime)? {
            able = able.or(Some(runtime));
        }
    }
    let accuracy = match (data, able) {
        (Some(rest), Some(runtime)) => Some(accuracy_in(runtime, subject, settings, &mut first.map(Ok).into_iter().chain(rest))?),
        _ => None,
    };
    let edits = match (&accuracy, subject.is_edited) {
        (_, false) => Edits::None,
        (None, true) => Edits::Unproven,
        (Some(a), true) => Edits::Measured { n: a.n, kl: a.kl, top1_agreement: a.top1_agreement },
    };
    let mut checks = weight_check(subject);
    checks.append(&mut round.checks);
    let pass = able.is_some() && checks.iter().all(|c| c.pass) && accuracy.as_ref().is_none_or(|a| a.pass);
    Ok(Verdict { schema_version: SCHEMA_VERSION, pass, checks, skipped: round.skipped, edits, accuracy })
}

/// A difference of weights as a failed check.
fn weight_check(subject: &Subject<'_>) -> Vec<Check> {
    let failed = |difference: &WeightDifference| Check {
        runtime: "weights",
        version: env!("CARGO_PKG_VERSION").to_string(),
        input: None,
        batch: 0,
        output: difference.name.clone(),
        max_abs: difference.max_abs,
        tolerance: 0.0,
        argmax_agree: None,
        pass: false,
        noise: None,
        reason: Some(difference.reason.clone()),
    };
    subject.weights.map(failed).into_iter().collect()
}

fn accuracy_in(
    runtime: RuntimeName,
    subject: &Subject<'_>,
    settings: &Settings,
    batches: DataBatches<'_>,
) -> Result<Accuracy, Error> {
    let options = options(runtime, settings, Optimize::On);
    let mut model = runtime::open_graph(runtime, subject.graph, &options)?;
    let mut out = match opened(runtime::open_graph(runtime, subject.out, &options))? {
        Ok(session) => session,
        // The checks have already failed for this reason, and say so.
        Err(reason) => {
            let none = Accuracy {
                n: 0,
                kl: None,
                top1_agreement: 0.0,
                top1_agreement_ci95: [0.0, 1.0],
                top1: None,
                pass: false,
                reason: Some(reason),
            };
            return Ok(none);
        }
    };
    let fixed = eval::fixed_batch(subject.graph, subject.facts);
    let sessions: [&mut dyn Session; 2] = [model.as_mut(), out.as_mut()];
    Ok(accuracy::measure(sessions, batches, settings.output.as_deref(), fixed, &settings.floors)?)
}

fn options(runtime: RuntimeName, settings: &Settings, optimize: Optimize) -> SessionOptions {
    let mut options = SessionOptions { optimize, ..settings.session.clone() };
    if runtime == RuntimeName::Tract {
        options.device = runtime::Device::Cpu;
    }
    options
}

/// What an engine says of a model is told apart from what is wrong with the engine: only the latter is an error.
fn opened<T>(result: Result<T, RuntimeError>) -> Result<Result<T, String>, Error> {
    match result {
        Ok(value) => Ok(Ok(value)),
        Err(RuntimeError::Load { reason, .. } | RuntimeError::Run { reason, .. }) => Ok(Err(reason)),
        Err(error @ (RuntimeError::Unsupported { .. } | RuntimeError::Name { .. } | RuntimeError::Array { .. })) => {
            Ok(Err(error.to_string()))
        }
        Err(error) => Err(error.into()),
    }
}

/// The checks of all runtimes on the same inputs.
struct Round<'a> {
    subject: &'a Subject<'a>,
    settings: &'a Settings,
    relative: f64,
    /// Whether the runtime may rewrite the models. Around quantized values it fuses into integer kernels, which round elsewhere: the mask
    /// of a twin would come between what it fuses in the result. So these run as they are written.
    optimize: Optimize,
    data_sets: Vec<FeedSet>,
    /// Found by the first runtime that runs the original.
    sets: Option<Vec<FeedSet>>,
    /// What ONNX Runtime makes of the original on each set.
    reference: Option<Vec<Original>>,
    checks: Vec<Check>,
    skipped: Vec<Skipped>,
}

impl<'a> Round<'a> {
    fn new(subject: &'a Subject<'a>, settings: &'a Settings) -> Self {
        let nature::Tolerance { relative, is_quantized, .. } = nature::tolerance(subject.graph);
        let optimize = if is_quantized { Optimize::Off } else { Optimize::On };
        let (data_sets, checks, skipped) = (Vec::new(), Vec::new(), Vec::new());
        Self { subject, settings, relative, optimize, data_sets, sets: None, reference: None, checks, skipped }
    }

    fn order(&self) -> Vec<RuntimeName> {
        let mut order = self.settings.runtimes.clone();
        order.sort_unstable();
        order.dedup();
        order
    }

    fn open(&self, runtime: RuntimeName, graph: &Graph, optimize: Optimize) -> Result<Result<Box<dyn Session>, String>, Error> {
        opened(runtime::open_graph(runtime, graph, &options(runtime, self.settings, optimize)))
    }

    fn skip(&mut self, runtime: RuntimeName, reason: String) {
        let skipped = Skipped { runtime: runtime.feature(), reason };
        if !self.skipped.contains(&skipped) {
            self.skipped.push(skipped);
        }
    }

    /// Checks in one runtime; `false` where it cannot.
    fn check(&mut self, runtime: RuntimeName) -> Result<bool, Error> {
        let mut session = match self.open(runtime, self.subject.graph, self.optimize)? {
            Ok(session) => session,
            Err(reason) => {
                self.skip(runtime, format!("cannot load the original: {reason}"));
                return Ok(false);
            }
        };
        let Some(sets) = self.find_sets(runtime, session.as_mut())? else { return Ok(false) };
        let originals: Vec<Original> = sets.iter().map(|set| run(session.as_mut(), &set.feeds)).collect::<Result<_, _>>()?;
        let version = session.version();
        drop(session);
        let usable = self.usable(runtime, &sets, &originals);
        if usable.is_empty() {
            return Ok(false);
        }
        let noise =
            if runtime == RuntimeName::Ort { self.noise(runtime, &sets, &originals)? } else { vec![Vec::new(); sets.len()] };
        let twins = self.run_all(runtime, self.subject.twin, &sets, &usable)?;
        let outs = self.run_all(runtime, self.subject.out, &sets, &usable)?;
        for ((i, twin), out) in usable.iter().zip(twins).zip(outs) {
            for (output, difference) in self.differences(twin, out) {
                let noise = noise[*i].iter().find(|(name, _)| *name == output).and_then(|(_, noise)| *noise);
                self.checks.push(check_of(runtime, &version, &sets[*i], output, difference, noise));
            }
        }
        if runtime == RuntimeName::Ort {
            self.reference = Some(originals);
        }
        Ok(true)
    }

    /// The inputs: found once, by the first runtime that runs the original on any.
    fn find_sets(&mut self, runtime: RuntimeName, session: &mut dyn Session) -> Result<Option<Vec<FeedSet>>, Error> {
        if let Some(sets) = &self.sets {
            return Ok(Some(sets.clone()));
        }
        let mut broken = None;
        let mut try_run = |feeds: &Feeds| match run(session, feeds) {
            Ok(Ok(outputs))
                if outputs.iter().all(|(_, a)| compare::is_finite(a)) && outputs.iter().any(|(_, a)| !a.is_empty()) =>
            {
                Tried::Finite
            }
            Ok(Ok(_)) => Tried::NotFinite,
            Ok(Err(reason)) => Tried::Failed(reason),
            Err(error) => {
                let reason = error.to_string();
                broken = Some(error);
                Tried::Failed(reason)
            }
        };
        let Settings { sizes, seed, .. } = self.settings;
        let found = feeds::random(self.subject.graph, self.subject.facts, sizes, *seed, &mut try_run);
        if let Some(error) = broken {
            return Err(error);
        }
        let mut sets = match found {
            Ok(sets) => sets,
            // The user's own inputs still can be run.
            Err(_) if !self.data_sets.is_empty() => Vec::new(),
            Err(error @ FeedError::NoneRuns { .. }) => {
                self.skip(runtime, error.to_string());
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        };
        sets.extend(self.data_sets.iter().cloned());
        self.sets = Some(sets.clone());
        Ok(Some(sets))
    }

    /// Sets on which the runtime does with the original what it should. Why not on the others is kept: once if there is none.
    fn usable(&mut self, runtime: RuntimeName, sets: &[FeedSet], originals: &[Original]) -> Vec<usize> {
        let reasons: Vec<Option<String>> = originals.iter().enumerate().map(|(i, o)| self.unusable(i, o)).collect();
        let usable: Vec<usize> = (0..sets.len()).filter(|i| reasons[*i].is_none()).collect();
        for (set, reason) in sets.iter().zip(reasons).filter_map(|(set, reason)| Some((set, reason?))) {
            if usable.is_empty() {
                self.skip(runtime, reason);
                break;
            }
            let input = match set.input {
                InputSource::Random => "random input",
                InputSource::Data => "data",
            };
            self.skip(runtime, format!("{input}, batch {}: {reason}", set.batch));
        }
        usable
    }

    /// Why a runtime that makes `original` of MODEL on set `index` cannot be used there.
    fn unusable(&self, index: usize, original: &Original) -> Option<String> {
        let found = match original {
            Ok(outputs) => outputs,
            Err(reason) => return Some(format!("cannot run the original: {reason}")),
        };
        let Some(Ok(reference)) = self.reference.as_ref().map(|r| &r[index]) else { return None };
        let (output, difference) = compare::outputs(found, reference, self.relative).into_iter().find(|(_, d)| !d.pass)?;
        let reason = difference.reason.unwrap_or_default();
        Some(format!("does not reproduce ONNX Runtime on the original: output '{output}' {reason}"))
    }

    /// What the runtime's rewrites alone do to the original, by output. Checks run with them, or without them where the model is
    /// quantized, and this is the distance to the other.
    fn noise(&self, runtime: RuntimeName, sets: &[FeedSet], originals: &[Original]) -> Result<Vec<Noise>, Error> {
        let other = if self.optimize == Optimize::On { Optimize::Off } else { Optimize::On };
        let mut plain = match self.open(runtime, self.subject.graph, other)? {
            Ok(session) => session,
            Err(_) => return Ok(vec![Vec::new(); sets.len()]),
        };
        let mut all = Vec::new();
        for (set, original) in sets.iter().zip(originals) {
            all.push(match (original, run(plain.as_mut(), &set.feeds)?) {
                (Ok(on), Ok(off)) => {
                    compare::outputs(&off, on, self.relative).into_iter().map(|(name, d)| (name, d.max_abs)).collect()
                }
                _ => Vec::new(),
            });
        }
        Ok(all)
    }

    fn run_all(&self, runtime: RuntimeName, graph: &Graph, sets: &[FeedSet], usable: &[usize]) -> Result<Vec<Original>, Error> {
        match self.open(runtime, graph, self.optimize)? {
            Ok(mut session) => usable.iter().map(|i| run(session.as_mut(), &sets[*i].feeds)).collect(),
            Err(reason) => Ok(usable.iter().map(|_| Err(format!("cannot be loaded: {reason}"))).collect()),
        }
    }

    /// By output; a model that does not run fails for all of them.
    fn differences(&self, twin: Original, out: Original) -> Vec<(String, Difference)> {
        let reason = match (twin, out) {
            (Ok(twin), Ok(out)) => return compare::outputs(&out, &twin, self.relative),
            (_, Err(reason)) => format!("the result: {reason}"),
            (Err(reason), _) => format!("the twin: {reason}"),
        };
        let name = |v: &crate::graph::ValueId| self.subject.graph.value(*v).name().to_string();
        self.subject.graph.outputs().iter().map(|v| (name(v), Difference::impossible(reason.clone()))).collect()
    }
}

fn run(session: &mut dyn Session, feeds: &Feeds) -> Result<Original, Error> {
    opened(session.run(feeds))
}

fn check_of(runtime: RuntimeName, version: &str, set: &FeedSet, output: String, d: Difference, noise: Option<f64>) -> Check {
    Check {
        runtime: runtime.feature(),
        version: version.to_string(),
        input: Some(set.input),
        batch: set.batch,
        output,
        max_abs: d.max_abs,
        tolerance: d.tolerance,
        argmax_agree: d.argmax_agree,
        pass: d.pass,
        noise,
        reason: d.reason,
    }
}
