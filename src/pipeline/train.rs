//! What trains or runs models: search, fine-tuning, evaluation, latency.

use super::apart::Trainable;
use super::edit::{check_all_elements, search_error};
use super::{Error, Model, check_trains, class_output};
use crate::anatomy::Kind;
use crate::bench::{self, Contender};
use crate::data::Dataset;
use crate::eval::{self, EvalError, EvalOptions, Evaluation};
use crate::graph::Graph;
use crate::runtime::{self, LibraryChoice, RuntimeName, SessionOptions};
use crate::search::{self, Config, FinetuneConfig, FinetuneJob, Finetuned, Job, Outcome, Progress};
use crate::verify::feeds::{self, Feeds};
use crate::verify::{Tried, compare};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::AtomicBool;

/// What is searched, and where.
#[derive(Clone, Copy)]
pub struct SearchAsk<'a> {
    /// The images.
    pub data: &'a Dataset,
    /// The settings.
    pub config: &'a Config,
    /// The run directory.
    pub run_dir: &'a Path,
    /// The output that the loss compares.
    pub output: Option<&'a str>,
    /// Which ONNX Runtime.
    pub library: &'a LibraryChoice,
    /// Go on with the run that is there.
    pub resume: bool,
}

/// Checks what can be checked before a search.
pub fn check_search(model: &Model, kinds: &[Kind]) -> Result<(), Error> {
    check_trains(model)?;
    check_all_elements(model)?;
    if !model.anatomy.groups.iter().any(|g| kinds.contains(&g.kind)) {
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        for r in &model.anatomy.refused {
            *counts.entry(&r.reason).or_insert(0) += 1;
        }
        let most = counts.into_iter().max_by_key(|(_, n)| *n).map_or("no attention and no MLP", |(reason, _)| reason);
        return Err(Error::unsuitable(&model.path, format!("no prunable group found: {most}; see vitrim inspect")));
    }
    Ok(())
}

/// Searches. See [`search::run`].
pub fn search(
    model: &Model,
    ask: &SearchAsk<'_>,
    progress: &mut dyn FnMut(Progress),
    stop: &AtomicBool,
) -> Result<Outcome, Error> {
    check_search(model, &ask.config.gates)?;
    let output = class_output(model, ask.output)?;
    let sha256 = model.sha256()?;
    let trainable = Trainable::of_model(model)?;
    let (graph, facts, _) = trainable.parts();
    let (groups, tokens) = trainable.gates(model, &ask.config.gates)?;
    let job = Job {
        graph,
        facts,
        groups: &groups,
        tokens: &tokens,
        model_sha256: &sha256,
        output: output.as_deref(),
        library: ask.library,
        resume: ask.resume,
    };
    search::run(&job, ask.data, ask.config, ask.run_dir, progress, stop).map_err(|cause| {
        use search::SearchError::{Exists, InUse, Io, NotOurs, NothingToResume};
        let is_of_run = matches!(cause, Exists { .. } | InUse { .. } | Io { .. } | NotOurs { .. } | NothingToResume { .. });
        search_error(if is_of_run { ask.run_dir } else { &model.path }, cause)
    })
}

/// Trains `student`, which was cut from `teacher`, towards it. See [`search::finetune()`].
pub fn finetune(
    student: &Model,
    teacher: &Model,
    (data, output): (&Dataset, Option<&str>),
    config: &FinetuneConfig,
    library: &LibraryChoice,
    progress: &mut dyn FnMut(Progress),
    stop: &AtomicBool,
) -> Result<Finetuned, Error> {
    check_trains(student)?;
    let output = class_output(student, output)?;
    let output = output.as_deref();
    let trainable = Trainable::of_model(student)?;
    let (graph, facts, _) = trainable.parts();
    let job = FinetuneJob { student: graph, facts, teacher: teacher.graph(), output, library };
    let tuned = search::finetune(&job, data, config, progress, stop).map_err(|cause| search_error(&student.path, cause))?;
    let graph = trainable.put_back(student.graph(), tuned.graph).map_err(|reason| Error::unsuitable(&student.path, reason))?;
    Ok(Finetuned { graph, ..tuned })
}

/// How a model is evaluated.
#[derive(Clone, Copy)]
pub struct EvalAsk<'a> {
    /// The samples.
    pub data: &'a Dataset,
    /// Samples of one run.
    pub batch: usize,
    /// The output with class scores.
    pub output: Option<&'a str>,
    /// How sessions are opened.
    pub session: &'a SessionOptions,
}

/// Accuracy of a model, and how far it is from another.
pub fn evaluate(model: &Model, reference: Option<&Model>, ask: &EvalAsk<'_>, stop: &AtomicBool) -> Result<Evaluation, Error> {
    let output = class_output(model, ask.output)?;
    let fixed = eval::fixed_batch(model.graph(), &model.facts);
    let loaders = std::thread::available_parallelism().map_or(1, usize::from);
    let options = EvalOptions { batch: fixed.unwrap_or(ask.batch), is_batch_fixed: fixed.is_some(), loaders, output };
    let open = |graph: &Graph| -> Result<_, Error> { Ok(runtime::open_graph(RuntimeName::Ort, graph, ask.session)?) };
    let mut session = open(model.graph())?;
    let mut other = reference.map(|r| open(r.graph())).transpose()?;
    let found = match &mut other {
        Some(other) => eval::evaluate(session.as_mut(), Some(other.as_mut()), ask.data, &options, stop),
        None => eval::evaluate(session.as_mut(), None, ask.data, &options, stop),
    };
    found.map_err(|cause| match cause {
        EvalError::Runtime(e) => Error::Runtime(e),
        cause => Error::Eval { file: model.path.clone(), cause: Box::new(cause) },
    })
}

/// Made-up inputs with which a model runs, `batch` samples of them where its batch is a symbol.
pub fn bench_feeds(
    model: &Model,
    batch: usize,
    seed: u64,
    runtime: RuntimeName,
    options: &SessionOptions,
) -> Result<Feeds, Error> {
    let graph = model.graph();
    let mut sizes = model.sizes.clone();
    let leading = graph.inputs().iter().filter_map(|v| model.facts.shape(*v)?.first());
    for name in leading.flat_map(|d| d.names()) {
        sizes.entry(name.to_string()).or_insert(batch as i64);
    }
    let mut session = runtime::open_graph(runtime, graph, options)?;
    let mut run = |feeds: &Feeds| match session.run(feeds) {
        Ok(outputs) if outputs.iter().all(|(_, a)| compare::is_finite(a)) => Tried::Finite,
        Ok(_) => Tried::NotFinite,
        Err(error) => Tried::Failed(error.to_string()),
    };
    let found = feeds::random(graph, &model.facts, &sizes, seed, &mut run);
    let sets = found.map_err(|e| Error::unsuitable(&model.path, e.to_string()))?;
    let first = sets.into_iter().next().ok_or_else(|| Error::unsuitable(&model.path, "no inputs can be made up"))?;
    Ok(first.feeds)
}

/// Latency of one model, or of several in turn, on the same inputs.
pub fn bench(models: &[&Model], feeds: &Feeds, settings: &bench::Settings) -> Result<bench::Report, Error> {
    let names: Vec<String> = models.iter().map(|m| m.path.display().to_string()).collect();
    let contenders: Vec<Contender<'_>> =
        models.iter().zip(&names).map(|(m, name)| Contender { name, graph: m.graph(), feeds }).collect();
    Ok(bench::measure(&contenders, settings)?)
}
