//! The graph that is run: a copy of the model with sums at its probes and nothing that no probe needs.
//!
//! For each probe: the value (as float32) less its mean over `centre`, as rows `[R, F]`, less the input `stats.shift.<name>` `[F]`;
//! of that the outputs `stats.rows.<name>` (the shape `[R, F]`), `stats.sum.<name>` `[F]` and `stats.gram.<name>` `[F, F]`.

use super::{Probe, StatsError};
use crate::graph::build::Builder;
use crate::graph::{DType, Declared, DeclaredDim, Graph, ValueId, check};
use crate::infer::{Dim, Facts};
use bytes::Bytes;
use std::collections::BTreeSet;

/// The names of what a probe added.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tap {
    /// The probe's name.
    pub probe: String,
    /// The name of the value in the model.
    pub value: String,
    /// F.
    pub features: usize,
    /// Input `[F]` float32: what is subtracted from each row.
    pub shift: String,
    /// Output `[2]` int64: R and F.
    pub rows: String,
    /// Output `[F]` float32.
    pub sum: String,
    /// Output `[F, F]` float32.
    pub gram: String,
}

/// A graph whose outputs are sums.
#[derive(Clone, Debug)]
pub struct ProbeGraph {
    /// The graph.
    pub graph: Graph,
    /// One per probe, in their order.
    pub taps: Vec<Tap>,
}

/// Builds it.
///
/// Errors: [`StatsError::Probe`] for a value that is no float of known rank, axes that are not there or have no fixed size, an axis
/// that is both features and rows, rows that do not grow with the batch, and names given twice.
pub fn probe_graph(graph: &Graph, facts: &Facts, probes: &[Probe]) -> Result<ProbeGraph, StatsError> {
    let mut names = BTreeSet::new();
    let mut out = graph.clone();
    for output in graph.outputs() {
        out.remove_output(*output);
    }
    let mut taps = Vec::with_capacity(probes.len());
    for probe in probes {
        let fail = |reason: String| StatsError::Probe {
            probe: probe.name.clone(),
            value: graph.value(probe.value).name().to_string(),
            reason,
        };
        if !names.insert(probe.name.as_str()) {
            return Err(fail("its name is given twice".to_string()));
        }
        let features = check_probe(graph, facts, probe).map_err(fail)?;
        taps.push(add(&mut out, facts, probe, features));
    }
    out.remove_dead(&|_, _| false);
    if let Some(violation) = check::check(&out).into_iter().next() {
        return Err(StatsError::Internal { what: format!("graph of probes: {violation}") });
    }
    Ok(ProbeGraph { graph: out, taps })
}

/// Whether moments can be taken there; else the reason, in one line.
pub fn can_be_probed(graph: &Graph, facts: &Facts, probe: &Probe) -> Result<(), String> {
    check_probe(graph, facts, probe).map(drop)
}

/// The number of features, where the probe can be.
fn check_probe(graph: &Graph, facts: &Facts, probe: &Probe) -> Result<usize, String> {
    let fact = facts.get(probe.value);
    let Some(shape) = fact.shape.as_deref() else { return Err("its rank is not known".to_string()) };
    match fact.dtype {
        Some(dtype) if dtype.is_float() => {}
        Some(dtype) => return Err(format!("it is {}, not floating-point", dtype.name())),
        None => return Err("its element type is not known".to_string()),
    }
    let mut features = 1usize;
    for (i, axis) in probe.axes.iter().enumerate() {
        let dim = shape.get(*axis).ok_or_else(|| format!("axis {axis} is not among the {} of {shape:?}", shape.len()))?;
        if probe.axes[..i].contains(axis) {
            return Err(format!("axis {axis} is given twice"));
        }
        let size = dim.size().ok_or_else(|| format!("axis {axis} of {shape:?} has no fixed size"))?;
        features = features.checked_mul(size).ok_or_else(|| format!("the axes {:?} of {shape:?} are too large", probe.axes))?;
    }
    if features == 0 || probe.axes.is_empty() {
        return Err(format!("the axes {:?} of {shape:?} hold no features", probe.axes));
    }
    let batch = graph.inputs().iter().find_map(|v| facts.shape(*v)?.first()).filter(|dim| dim.size().is_none());
    if let Some(axis) = probe.centre {
        let dim = shape.get(axis).ok_or_else(|| format!("axis {axis} is not among the {} of {shape:?}", shape.len()))?;
        if probe.axes.contains(&axis) {
            return Err(format!("axis {axis} is one of features, only rows are centred"));
        }
        if Some(dim) == batch {
            return Err(format!("axis {axis} of {shape:?} is the batch: centring there would mix images"));
        }
    }
    let rows: Dim = shape.iter().enumerate().filter(|(axis, _)| !probe.axes.contains(axis)).map(|(_, dim)| dim).product();
    match (batch, rows.size()) {
        // Counted once per batch, it would weigh images by the batch that they fell to.
        (Some(batch), Some(rows)) => Err(format!("its {rows} rows do not grow with the batch {batch}")),
        _ => Ok(features),
    }
}

fn add(graph: &mut Graph, facts: &Facts, probe: &Probe, features: usize) -> Tap {
    let rank = facts.shape(probe.value).map_or(0, <[Dim]>::len);
    let declared = |dtype: DType, dims: &[usize]| Declared {
        dtype: Some(dtype),
        dims: Some(dims.iter().map(|d| DeclaredDim::Size(*d as i64)).collect()),
        extra: Bytes::new(),
    };
    let shift = graph.add_value(&format!("stats.shift.{}", probe.name));
    graph.add_input(shift, declared(DType::F32, &[features]));
    let mut b = Builder::new(graph, "stats.");
    let mut x = probe.value;
    if facts.get(x).dtype != Some(DType::F32) {
        x = b.cast(x, DType::F32);
    }
    if let Some(axis) = probe.centre {
        let mean = b.reduce_mean(x, &[axis as i64], true);
        x = b.sub(x, mean);
    }
    let order: Vec<usize> = (0..rank).filter(|axis| !probe.axes.contains(axis)).chain(probe.axes.iter().copied()).collect();
    if !order.is_sorted() {
        x = b.transpose(x, &order);
    }
    x = b.reshape(x, &[-1, features as i64]);
    x = b.sub(x, shift);
    let rows = b.shape_of(x);
    let sum = b.reduce_sum(x, &[0], false);
    let turned = b.transpose(x, &[1, 0]);
    let gram = b.matmul(turned, x);
    let mut name = |value: ValueId, what: &str, declared: Declared| {
        let wanted = format!("stats.{what}.{}", probe.name);
        if graph.find(&wanted).is_none() {
            graph.rename(value, &wanted);
        }
        graph.add_output(value, declared);
        graph.value(value).name().to_string()
    };
    let rows = name(rows, "rows", declared(DType::I64, &[2]));
    let sum = name(sum, "sum", declared(DType::F32, &[features]));
    let gram = name(gram, "gram", declared(DType::F32, &[features, features]));
    Tap {
        probe: probe.name.clone(),
        value: graph.value(probe.value).name().to_string(),
        features,
        shift: graph.value(shift).name().to_string(),
        rows,
        sum,
        gram,
    }
}
