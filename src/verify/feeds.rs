//! Inputs for a check: random ones for any model, or samples of the user's data.
//!
//! Example: a model with `input_ids [batch, seq]` int64 that index a table of 30,522 rows gets `[1, 2]` and `[3, 2]` of numbers
//! below 30,522 if it runs with a sequence of 2; one with `x [batch, 3, height, width]` and patches of 16 gets `[1, 3, 16, 16]`.
//! Floats are standard normal, booleans true, integers within the tables that they index; an int32 or int64 input that indexes
//! nothing is a mask more often than anything else and gets ones. Sizes of symbols that are not given are the smallest, from 2 on,
//! with which the original runs (1 last: a softmax over one token hides every difference in q and k).
//!
//! Invariant: the same model, sizes and seed give the same numbers.

use std::collections::{BTreeMap, BTreeSet};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::cost::Sizes;
use crate::data::Batch;
use crate::data::array::{Array, ArrayData, ArrayKind};
use crate::eval;
use crate::graph::{DType, Graph, ValueId};
use crate::infer::{Dim, Facts};
use crate::runtime;
use crate::verify::bounds;

/// Named inputs of one run.
pub type Feeds = Vec<(String, Array)>;

/// Where the numbers of a run come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum InputSource {
    /// Made up.
    Random,
    /// The user's.
    Data,
}

/// The inputs of one run.
#[derive(Clone, Debug, PartialEq)]
pub struct FeedSet {
    /// Where they come from.
    pub input: InputSource,
    /// Samples.
    pub batch: usize,
    /// The inputs.
    pub feeds: Feeds,
}

/// What came of a run of the original.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tried {
    /// Outputs, all of them numbers.
    Finite,
    /// Outputs with NaN or infinity, or without any element.
    NotFinite,
    /// It does not run, for this reason.
    Failed(String),
}

/// Why no inputs could be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FeedError {
    /// An input whose rank is not declared.
    #[error("the shape of input '{input}' is not declared, so nothing can be made up for it: give --data")]
    Undeclared {
        /// The input.
        input: String,
    },
    /// An input of a type that has no random values.
    #[error("input '{input}' is of type {dtype}, for which nothing can be made up")]
    Type {
        /// The input.
        input: String,
        /// Its type.
        dtype: &'static str,
    },
    /// Nothing that was tried runs.
    #[error("cannot run the original: {reason}{}", hint(symbols))]
    NoneRuns {
        /// What the engine said.
        reason: String,
        /// Symbols whose sizes were tried.
        symbols: Vec<String>,
    },
}

fn hint(symbols: &[String]) -> String {
    if symbols.is_empty() {
        return String::new();
    }
    let flags: Vec<String> = symbols.iter().map(|s| format!("--size {s}=N")).collect();
    format!(" (no size that was tried runs; give {})", flags.join(" "))
}

/// Batch sizes of a check, where the batch is a symbol.
const BATCHES: [i64; 2] = [1, 3];

/// Sizes that are tried for symbols; 1 is last.
const SIZES: [i64; 30] =
    [2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 77, 96, 112, 128, 160, 192, 224, 256, 384, 512, 1];

/// Sizes that are tried where several symbols may need different ones.
const FEW_SIZES: [i64; 10] = [2, 4, 8, 16, 32, 64, 128, 224, 3, 1];

/// Runs of the original in a search for sizes at most.
const TRIES: usize = 400;

/// Elements of one made-up input at most.
const LARGEST: i64 = 1 << 28;

/// How integers that index something are drawn.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Indices {
    WithinBounds,
    Zero,
}

/// The inputs of a graph, as far as they matter here.
struct Plan<'a> {
    graph: &'a Graph,
    facts: &'a Facts,
    given: &'a Sizes,
    seed: u64,
}

impl Plan<'_> {
    fn shape(&self, input: ValueId) -> Result<&[Dim], FeedError> {
        let undeclared = || FeedError::Undeclared { input: self.graph.value(input).name().to_string() };
        self.facts.shape(input).ok_or_else(undeclared)
    }

    /// Symbols that lead an input, and all others, without those that are given.
    fn symbols(&self) -> Result<(BTreeSet<String>, BTreeSet<String>), FeedError> {
        let (mut leading, mut others) = (BTreeSet::new(), BTreeSet::new());
        for input in self.graph.inputs() {
            for (axis, dim) in self.shape(*input)?.iter().enumerate() {
                let names = dim.names().into_iter().map(|n| n.to_string()).filter(|n| !self.given.contains_key(n));
                if axis == 0 { leading.extend(names) } else { others.extend(names) }
            }
        }
        others.retain(|name| !leading.contains(name));
        Ok((leading, others))
    }

    /// Random inputs under these sizes; `None` where they are too large or not known.
    fn draw(&self, sizes: &Sizes, indices: Indices) -> Result<Option<FeedSet>, FeedError> {
        let size = |name: &str| sizes.get(name).copied();
        let (mut feeds, mut batch) = (Feeds::new(), None);
        for (number, input) in self.graph.inputs().iter().enumerate() {
            let dims: Option<Vec<i64>> = self.shape(*input)?.iter().map(|d| d.eval(&size).filter(|n| *n >= 0)).collect();
            let Some(dims) = dims else { return Ok(None) };
            let count = dims.iter().try_fold(1i64, |n, d| n.checked_mul(*d)).filter(|n| *n <= LARGEST);
            let (Some(count), Ok(dims)) = (count, dims.iter().map(|d| usize::try_from(*d)).collect::<Result<Vec<_>, _>>()) else {
                return Ok(None);
            };
            batch = batch.or(dims.first().copied());
            let mut numbers = Numbers::new(self.seed, batch.unwrap_or(1), number);
            let data = self.elements(*input, count as usize, indices, &size, &mut numbers)?;
            feeds.push((self.graph.value(*input).name().to_string(), Array { dims, data }));
        }
        Ok(Some(FeedSet { input: InputSource::Random, batch: batch.unwrap_or(1), feeds }))
    }

    fn elements(
        &self,
        input: ValueId,
        count: usize,
        indices: Indices,
        size: &dyn Fn(&str) -> Option<i64>,
        numbers: &mut Numbers,
    ) -> Result<ArrayData, FeedError> {
        let dtype = self.facts.get(input).dtype;
        let Some(kind) = dtype.and_then(runtime::kind_of) else {
            let input = self.graph.value(input).name().to_string();
            return Err(FeedError::Type { input, dtype: dtype.map_or("unknown", DType::name) });
        };
        if kind.is_float() {
            let wide = ArrayData::F64((0..count).map(|_| numbers.normal()).collect());
            return Ok(wide.cast(kind).unwrap_or(wide));
        }
        let top = match kind {
            ArrayKind::U8 => 255,
            ArrayKind::I8 => 127,
            ArrayKind::I32 => i64::from(i32::MAX),
            _ => i64::MAX - 1,
        };
        let wide: Vec<i64> = match (kind, bounds::greatest(self.graph, self.facts, input, size)) {
            (ArrayKind::Bool, _) => vec![1; count],
            (_, Some(_)) if indices == Indices::Zero => vec![0; count],
            (_, Some(greatest)) => (0..count).map(|_| numbers.up_to(greatest.min(top))).collect(),
            // Bytes are pictures.
            (ArrayKind::U8 | ArrayKind::I8, None) => (0..count).map(|_| numbers.up_to(top)).collect(),
            (_, None) => vec![1; count],
        };
        let wide = ArrayData::I64(wide);
        Ok(wide.cast(kind).unwrap_or(wide))
    }

    /// Whether any input indexes a table.
    fn indexes(&self) -> bool {
        let any = |_: &str| Some(1);
        self.graph.inputs().iter().any(|v| bounds::greatest(self.graph, self.facts, *v, &any).is_some())
    }
}

/// Random inputs with which the original runs: batch 1, and 3 where the batch is a symbol and the model really takes 3.
///
/// `given` holds sizes of symbols, the batch too if wanted. `run` runs the original.
///
/// Errors: an input for which nothing can be made up, or that nothing runs.
pub fn random(
    graph: &Graph,
    facts: &Facts,
    given: &Sizes,
    seed: u64,
    run: &mut dyn FnMut(&Feeds) -> Tried,
) -> Result<Vec<FeedSet>, FeedError> {
    let plan = Plan { graph, facts, given, seed };
    let (leading, others) = plan.symbols()?;
    let ways: &[Indices] = if plan.indexes() { &[Indices::WithinBounds, Indices::Zero] } else { &[Indices::WithinBounds] };
    let mut tried = 0;
    let mut reason = None;
    let mut not_finite = None;
    let found = candidates(graph, &others).take(TRIES).find_map(|chosen| {
        let mut sizes = given.clone();
        sizes.extend(chosen);
        sizes.extend(leading.iter().map(|name| (name.clone(), BATCHES[0])));
        for way in ways {
            tried += 1;
            match plan.draw(&sizes, *way) {
                Err(error) => return Some(Err(error)),
                Ok(None) => {}
                Ok(Some(set)) => match run(&set.feeds) {
                    Tried::Finite => return Some(Ok((sizes, *way, set))),
                    Tried::NotFinite => not_finite = not_finite.take().or(Some((sizes.clone(), *way, set))),
                    Tried::Failed(why) => reason = Some(why),
                },
            }
        }
        None
    });
    let symbols = || others.iter().cloned().collect();
    let none =
        || FeedError::NoneRuns { reason: reason.unwrap_or_else(|| "its inputs are too large".to_string()), symbols: symbols() };
    let (mut sizes, way, first) = match found {
        Some(found) => found?,
        None => not_finite.ok_or_else(none)?,
    };
    let mut sets = vec![first];
    if !leading.is_empty() {
        sizes.extend(leading.iter().map(|name| (name.clone(), BATCHES[1])));
        if let Some(more) = plan.draw(&sizes, way)?
            && !matches!(run(&more.feeds), Tried::Failed(_))
        {
            sets.push(more);
        }
    }
    Ok(sets)
}

/// Sizes to be tried for symbols, in order: all the same first, then each its own.
fn candidates(graph: &Graph, symbols: &BTreeSet<String>) -> impl Iterator<Item = Sizes> {
    let names: Vec<String> = symbols.iter().cloned().collect();
    let mut sizes: Vec<i64> = SIZES.to_vec();
    if names.is_empty() {
        sizes.truncate(1);
    } else {
        // What the first convolutions step by, and some multiples: 14 and 30 occur as well as 16.
        let steps = graph.nodes().filter(|(_, n)| n.op() == "Conv").filter_map(|(_, n)| n.attr_ints("strides")?.first().copied());
        let mut more: BTreeSet<i64> =
            steps.filter(|s| (2..=64).contains(s)).flat_map(|s| [s, 2 * s, 4 * s, 7 * s, 14 * s]).collect();
        more.retain(|s| !sizes.contains(s));
        sizes.extend(more);
        sizes.sort_by_key(|s| (*s == 1, *s));
    }
    let alike: Vec<Sizes> = sizes.iter().map(|s| names.iter().map(|n| (n.clone(), *s)).collect()).collect();
    let several = names.len() > 1;
    let count = if several { FEW_SIZES.len().saturating_pow(names.len().min(4) as u32) } else { 0 };
    let apart = (0..count).map(move |mut number| {
        let mut pick = || {
            let size = FEW_SIZES[number % FEW_SIZES.len()];
            number /= FEW_SIZES.len();
            size
        };
        names.iter().map(|name| (name.clone(), pick())).collect::<BTreeMap<_, _>>()
    });
    alike.into_iter().chain(apart)
}

/// The first samples of a batch of data: one, and three where the model's batch is a symbol; all of a fixed batch.
///
/// Inputs that lack a batch axis of their own are not in `batch`. Empty where it holds fewer samples than a fixed batch.
pub fn of_batch(graph: &Graph, facts: &Facts, batch: &Batch) -> Vec<FeedSet> {
    let fixed = eval::fixed_batch(graph, facts);
    let sizes = match fixed {
        Some(fixed) => vec![fixed],
        None => BTreeSet::from([1, batch.count.min(BATCHES[1] as usize)]).into_iter().collect(),
    };
    let set = |count: usize| Some(FeedSet { input: InputSource::Data, batch: count, feeds: first_samples(batch, count)? });
    sizes.into_iter().filter_map(set).collect()
}

fn first_samples(batch: &Batch, count: usize) -> Option<Feeds> {
    let first = |array: &Array| {
        let (rows, rest) = array.dims.split_first()?;
        let size: usize = rest.iter().product();
        let dims = std::iter::once(count).chain(rest.iter().copied()).collect();
        (count <= *rows).then_some(())?;
        Some(Array { dims, data: array.data.window(0, count * size)? })
    };
    batch.inputs.iter().map(|(name, array)| Some((name.clone(), first(array)?))).collect()
}

/// A stream of random numbers for one input of one run.
struct Numbers {
    generator: ChaCha8Rng,
    spare: Option<f64>,
}

impl Numbers {
    fn new(seed: u64, batch: usize, input: usize) -> Self {
        let mut key = [0u8; 32];
        for (part, value) in key.as_chunks_mut::<8>().0.iter_mut().zip([seed, batch as u64, input as u64, 0]) {
            *part = value.to_le_bytes();
        }
        Self { generator: ChaCha8Rng::from_seed(key), spare: None }
    }

    /// In (0, 1].
    fn unit(&mut self) -> f64 {
        ((self.generator.next_u64() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// Standard normal. Source: Box and Muller 1958: sqrt(-2 ln u) times cos and sin of 2 pi v.
    fn normal(&mut self) -> f64 {
        if let Some(spare) = self.spare.take() {
            return spare;
        }
        let (u, v) = (self.unit(), self.unit());
        let radius = (-2.0 * u.ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * v).sin_cos();
        self.spare = Some(radius * sin);
        radius * cos
    }

    /// An integer from 0 to `greatest`. The remainder's bias is below 2^-30 for tables of up to 2^33 rows.
    fn up_to(&mut self, greatest: i64) -> i64 {
        (self.generator.next_u64() % (greatest.max(0) as u64 + 1)) as i64
    }
}
