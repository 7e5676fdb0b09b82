//! Losses of edits, with what lies before the edited constants computed once.

use super::loss::{Dense, Run};
use super::place::Places;
use super::{CurveError, Trial};
use crate::data::{Array, BatchOrder, Dataset};
use crate::eval;
use crate::graph::{DType, Declared, DeclaredDim, Graph, Tensor, ValueId};
use crate::infer::{Dim, Facts};
use crate::runtime::{self, RuntimeName, Session, SessionOptions};
use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// How losses are measured.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How sessions are opened.
    pub session: SessionOptions,
    /// Images of one run, where the model does not fix that.
    pub batch: usize,
    /// Threads that load images.
    pub loaders: usize,
    /// What the kept activations should take at most. Unit: bytes. Where no place is that narrow, the narrowest is taken.
    pub cache_bytes: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self { session: SessionOptions::default(), batch: 32, loaders: 2, cache_bytes: 512 << 20 }
    }
}

/// A batch as it stands at the place.
struct Kept {
    /// Samples that count.
    count: usize,
    /// Samples of a run.
    samples: usize,
    /// Values alive at the place, by name.
    alive: Vec<(String, Array)>,
}

type Feeds = Vec<(String, Array)>;

/// Measures what edits of constants cost: the activations of all images at one place of the graph, and the model's own outputs.
///
/// Sites are visited in the order of the graph: [`Measure::order`] tells it. After an error of the engine it is of no further use.
pub struct Measure<'a> {
    graph: &'a Graph,
    facts: &'a Facts,
    settings: Settings,
    places: Places,
    outputs: Vec<ValueId>,
    dense: Dense,
    /// Sizes of named dimensions, as the first batch has them.
    sizes: BTreeMap<String, i64>,
    place: usize,
    batches: Vec<Kept>,
}

/// A part of the graph in an engine.
struct Part {
    session: Box<dyn Session>,
    reads: Vec<String>,
}

impl Part {
    fn open(
        (graph, facts): (&Graph, &Facts),
        inputs: &[ValueId],
        outputs: &[ValueId],
        options: &SessionOptions,
    ) -> Result<Self, CurveError> {
        let with = |vs: &[ValueId]| vs.iter().map(|v| (*v, declared(graph, facts, *v))).collect::<Vec<_>>();
        let part = graph.extract(&with(inputs), &with(outputs));
        let reads = part.inputs().iter().map(|v| part.value(*v).name().to_string()).collect();
        Ok(Self { session: runtime::open_graph(RuntimeName::Ort, &part, options)?, reads })
    }

    fn reads(&self, name: &str) -> bool {
        self.reads.iter().any(|r| r == name)
    }

    /// The values that the part reads, and the others.
    fn divide(&self, values: Feeds) -> (Feeds, Feeds) {
        values.into_iter().partition(|(name, _)| self.reads(name))
    }
}

/// What is declared of a value at the edge of a part: what is known for sure, before what a file says of its outputs.
fn declared(graph: &Graph, facts: &Facts, v: ValueId) -> Declared {
    let fact = facts.get(v);
    let given = graph.value(v).declared().filter(|_| fact.dtype.is_none() || graph.inputs().contains(&v));
    if let Some(d) = given {
        return d.clone();
    }
    let dim = |d: &Dim| match (d.known(), &d.names()[..]) {
        (Some(n), _) => DeclaredDim::Size(n),
        (None, [name]) if Dim::named(name) == *d => DeclaredDim::Symbol(name.to_string()),
        (None, _) => DeclaredDim::Symbol(String::new()),
    };
    let dims = fact.shape.as_ref().map(|s| s.iter().map(dim).collect());
    Declared { dtype: fact.dtype, dims, extra: Bytes::new() }
}

impl<'a> Measure<'a> {
    /// Runs the model as it is over all of `data` and keeps its outputs and inputs.
    ///
    /// `class_output` names the output with class scores, float \[batch, classes\]: then losses are KL divergences from the model as it
    /// is. Without one they are squared errors of all float outputs; see the module.
    /// Errors: the data, the engine, no such output, or one that is not finite.
    pub fn new(
        graph: &'a Graph,
        facts: &'a Facts,
        class_output: Option<&str>,
        data: &Dataset,
        settings: &Settings,
        stop: &AtomicBool,
    ) -> Result<Self, CurveError> {
        let outputs = scored(graph, facts, class_output)?;
        let places = Places::of(graph);
        let names = outputs.iter().map(|v| graph.value(*v).name().to_string()).collect();
        let mut dense = Dense::new(names, class_output.is_some());
        let fixed = eval::fixed_batch(graph, facts);
        let size = fixed.unwrap_or(settings.batch).max(1);
        let mut part = Part::open((graph, facts), graph.inputs(), &outputs, &settings.session)?;
        let (mut batches, mut sizes) = (Vec::new(), BTreeMap::new());
        for batch in data.batches(BatchOrder::default(), size, settings.loaders, None) {
            stopped(stop)?;
            let batch = batch?;
            let samples = fixed.unwrap_or(batch.count);
            let (alive, _) = part.divide(eval::filled(&batch, samples));
            if batches.is_empty() {
                sizes = sizes_of(graph, facts, &alive);
            }
            let results = part.session.run(&alive)?;
            dense.push(&Run { outputs: &results, samples, count: batch.count })?;
            batches.push(Kept { count: batch.count, samples, alive });
        }
        dense.finish();
        Ok(Self { graph, facts, settings: settings.clone(), places, outputs, dense, sizes, place: 0, batches })
    }

    /// How many images losses are means of.
    pub fn images(&self) -> u64 {
        self.batches.iter().map(|b| b.count as u64).sum()
    }

    /// Where a site with these constants comes: sites with smaller numbers first. `None` where no output depends on them.
    pub fn order(&self, constants: &[ValueId]) -> Option<usize> {
        self.places.before(self.graph, constants)
    }

    /// Moves the kept activations forward, as near as memory allows to where the first of `constants` is read.
    ///
    /// Errors: the activations are behind that already ([`CurveError::Behind`]); the engine.
    pub fn advance_to(&mut self, constants: &[ValueId]) -> Result<(), CurveError> {
        let Some(until) = self.check_place(constants)? else { return Ok(()) };
        let bytes = |v: ValueId| self.bytes(v).saturating_mul(self.batches.len() as u64);
        let to = self.places.choose(self.facts, (self.place, until), self.settings.cache_bytes, &bytes);
        if to == self.place {
            return Ok(());
        }
        let (before, after) = (self.places.alive(self.place), self.places.alive(to));
        let made: Vec<ValueId> = after.iter().copied().filter(|v| !before.contains(v)).collect();
        let stay: Vec<&str> = after.iter().map(|v| self.graph.value(*v).name()).collect();
        let mut part = match made.is_empty() {
            true => None,
            false => Some(Part::open((self.graph, self.facts), &before, &made, &self.settings.session)?),
        };
        for batch in &mut self.batches {
            let mut alive = std::mem::take(&mut batch.alive);
            if let Some(part) = &mut part {
                let (feeds, mut rest) = part.divide(alive);
                let made = part.session.run(&feeds)?;
                rest.extend(feeds);
                alive = rest;
                alive.extend(made);
            }
            alive.retain(|(name, _)| stay.contains(&name.as_str()));
            batch.alive = alive;
        }
        self.place = to;
        Ok(())
    }

    /// The loss of each trial: the mean over images of how far the outputs are from the model's own, with the trial's constants
    /// instead of the model's. NaN where an output is not finite. Unit: nats (KL), or shares of the outputs' variances.
    ///
    /// `constants` are all that any of the trials edits; a trial that leaves one out uses the model's own. `progress` hears of each
    /// run of a batch: how many are done, of how many.
    /// Errors: an edit of what is not among `constants`, or of another type or shape; [`CurveError::Behind`]; the engine.
    pub fn losses(
        &mut self,
        constants: &[ValueId],
        trials: &[Trial],
        progress: &mut dyn FnMut(usize, usize),
        stop: &AtomicBool,
    ) -> Result<Vec<f64>, CurveError> {
        let mut sums = vec![0.0; trials.len()];
        let constants = &BTreeSet::from_iter(constants.iter().copied()).into_iter().collect::<Vec<_>>()[..];
        let edits = trials.iter().map(|t| self.edits(constants, t)).collect::<Result<Vec<_>, _>>()?;
        // Outputs that were made before the place do not depend on the constants.
        let outputs: Vec<ValueId> = self.outputs.iter().copied().filter(|v| !self.places.is_made(*v, self.place)).collect();
        if self.check_place(constants)?.is_none() || trials.is_empty() || outputs.is_empty() {
            return Ok(sums);
        }
        let mut inputs = self.places.alive(self.place);
        inputs.extend(constants);
        let mut part = Part::open((self.graph, self.facts), &inputs, &outputs, &self.settings.session)?;
        let own = constants.iter().map(|v| self.fed(*v, None)).collect::<Result<Feeds, _>>()?;
        let (mut own, _) = part.divide(own);
        let mut edits: Vec<Feeds> = edits.into_iter().map(|e| part.divide(e).0).collect();
        let (total, mut done) = (self.batches.len() * trials.len(), 0);
        for (number, batch) in self.batches.iter_mut().enumerate() {
            let (mut feeds, rest) = part.divide(std::mem::take(&mut batch.alive));
            let values = feeds.len();
            feeds.append(&mut own);
            let mut run_all = || -> Result<(), CurveError> {
                for (edit, sum) in edits.iter_mut().zip(&mut sums) {
                    stopped(stop)?;
                    exchange(&mut feeds, edit);
                    let outputs = part.session.run(&feeds);
                    exchange(&mut feeds, edit);
                    let run = Run { outputs: &outputs?, samples: batch.samples, count: batch.count };
                    *sum += self.dense.loss(number, &run)?;
                    done += 1;
                    progress(done, total);
                }
                Ok(())
            };
            let result = run_all();
            own = feeds.split_off(values);
            feeds.extend(rest);
            batch.alive = feeds;
            result?;
        }
        let images = self.images().max(1) as f64;
        // Rounding can leave a sum of zeros slightly negative; `max` would hide NaN.
        Ok(sums.into_iter().map(|sum| sum / images).map(|loss| if loss < 0.0 { 0.0 } else { loss }).collect())
    }

    /// The last place before the constants' readers; an error where the activations are behind it.
    fn check_place(&self, constants: &[ValueId]) -> Result<Option<usize>, CurveError> {
        let name = |v: &ValueId| self.graph.value(*v).name().to_string();
        if let Some(v) = constants.iter().find(|v| !self.graph.is_constant(**v)) {
            return Err(CurveError::NotConstant { name: name(v) });
        }
        let before = |v: &ValueId| self.places.before(self.graph, &[*v]);
        if let Some(v) = constants.iter().find(|v| before(v).is_some_and(|p| p < self.place)) {
            return Err(CurveError::Behind { name: name(v) });
        }
        Ok(self.places.before(self.graph, constants))
    }

    /// The edited constants of a trial as they are fed.
    fn edits(&self, constants: &[ValueId], trial: &Trial) -> Result<Feeds, CurveError> {
        let checked = trial.edits.iter().map(|(v, tensor)| match constants.contains(v) {
            true => self.fed(*v, Some(tensor)),
            false => Err(CurveError::NotListed { name: self.graph.value(*v).name().to_string() }),
        });
        let mut feeds = checked.collect::<Result<Feeds, _>>()?;
        feeds.sort_by(|a, b| a.0.cmp(&b.0));
        match feeds.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            Some(pair) => Err(CurveError::Twice { name: pair[0].0.clone() }),
            None => Ok(feeds),
        }
    }

    /// A constant as it is fed, edited or not.
    fn fed(&self, v: ValueId, edited: Option<&Tensor>) -> Result<(String, Array), CurveError> {
        let name = self.graph.value(v).name().to_string();
        let Some(own) = self.graph.constant(v) else { return Err(CurveError::NotConstant { name }) };
        let tensor = edited.unwrap_or(&own);
        if (tensor.dtype, &tensor.dims) != (own.dtype, &own.dims) {
            let text = |t: &Tensor| format!("{} {:?}", t.dtype.name(), t.dims);
            return Err(CurveError::Shape { name, expected: text(&own), found: text(tensor) });
        }
        match runtime::array_of(tensor) {
            Some(array) => Ok((name, array)),
            None => Err(CurveError::Type { name, dtype: own.dtype.name() }),
        }
    }

    /// Bytes of a value in one run. A size that depends on data counts as 1.
    fn bytes(&self, v: ValueId) -> u64 {
        let fact = self.facts.get(v);
        let size = |d: &Dim| d.eval(&|name| Some(self.sizes.get(name).copied().unwrap_or(1))).unwrap_or(1).max(0) as u64;
        let count: u64 = fact.shape.iter().flatten().map(size).fold(1, u64::saturating_mul);
        count.saturating_mul(fact.dtype.map_or(32, DType::bits) as u64).div_ceil(8)
    }
}

/// Exchanges arrays of `feeds` with those of `edit` that have the same name.
fn exchange(feeds: &mut Feeds, edit: &mut Feeds) {
    for (name, array) in edit {
        if let Some((_, own)) = feeds.iter_mut().find(|(n, _)| n == name) {
            std::mem::swap(own, array);
        }
    }
}

fn stopped(stop: &AtomicBool) -> Result<(), CurveError> {
    if stop.load(Ordering::Relaxed) { Err(CurveError::Interrupted) } else { Ok(()) }
}

/// The outputs that the loss compares.
fn scored(graph: &Graph, facts: &Facts, class_output: Option<&str>) -> Result<Vec<ValueId>, CurveError> {
    let is_float = |v: &ValueId| {
        let declared = graph.value(*v).declared().and_then(|d| d.dtype);
        facts.get(*v).dtype.or(declared).is_some_and(DType::is_float)
    };
    let all = || graph.outputs().iter().copied();
    let found: Vec<ValueId> = match class_output {
        Some(name) => all().filter(|v| graph.value(*v).name() == name).collect(),
        None => all().filter(is_float).collect(),
    };
    match (found.is_empty(), class_output) {
        (false, _) => Ok(found),
        (true, Some(name)) => Err(CurveError::Output { output: name.to_string(), reason: "is not there".into() }),
        (true, None) => Err(CurveError::NoOutput),
    }
}

/// Sizes that the arrays give to named dimensions of the graph's inputs.
fn sizes_of(graph: &Graph, facts: &Facts, arrays: &Feeds) -> BTreeMap<String, i64> {
    let mut sizes = BTreeMap::new();
    for (name, array) in arrays {
        let shape = graph.find(name).and_then(|v| facts.shape(v)).unwrap_or_default();
        for (dim, size) in shape.iter().zip(&array.dims).filter(|(dim, _)| dim.known().is_none()) {
            for n in dim.names() {
                sizes.entry(n.to_string()).or_insert(*size as i64);
            }
        }
    }
    sizes
}

/// What is to be measured, and in which time.
#[derive(Clone, Copy, Debug)]
pub struct Time {
    /// How many times constants and trials are given to [`Measure::losses`].
    pub sites: usize,
    /// Trials of each.
    pub trials: usize,
    /// Unit: seconds.
    pub seconds: f64,
    /// Images to use at most.
    pub at_most: usize,
}

/// Fewer images than these say little about a loss.
pub const FEWEST_IMAGES: usize = 32;

/// As many images as the time allows, from [`FEWEST_IMAGES`] to `time.at_most`, and no more than there are.
///
/// Opens the model, runs one batch to warm up and times a second run. A trial is taken for half a run, the mean over sites that are
/// spread over the depth; a site beside that for one session that is opened. So the number depends on the machine and its load.
/// Errors: the data, the engine, no such output.
pub fn images_within(
    (graph, facts): (&Graph, &Facts),
    class_output: Option<&str>,
    data: &Dataset,
    settings: &Settings,
    time: &Time,
) -> Result<usize, CurveError> {
    let at_most = time.at_most.min(data.len());
    let start = Instant::now();
    let mut part = Part::open((graph, facts), graph.inputs(), &scored(graph, facts, class_output)?, &settings.session)?;
    let opening = start.elapsed().as_secs_f64();
    let fixed = eval::fixed_batch(graph, facts);
    let size = fixed.unwrap_or(settings.batch).max(1);
    let Some(batch) = data.batches(BatchOrder::default(), size, settings.loaders, None).next() else { return Ok(at_most) };
    let batch = batch?;
    let (feeds, _) = part.divide(eval::filled(&batch, fixed.unwrap_or(batch.count)));
    part.session.run(&feeds)?;
    let start = Instant::now();
    part.session.run(&feeds)?;
    let image = start.elapsed().as_secs_f64() / batch.count.max(1) as f64;
    // One run for the model's own outputs, one for the activations that move on.
    let runs = 2.0 + 0.5 * (time.sites * time.trials) as f64;
    let left = time.seconds - opening * (1 + time.sites) as f64;
    let images = (left / (image * runs).max(f64::MIN_POSITIVE)).max(0.0) as usize;
    Ok(images.max(FEWEST_IMAGES).min(at_most))
}
