//! Sizes of activations -> Scores: what a unit hands to the sink that sums over it.
//!
//! At a sink the unit j adds `a_j b_j`: for `mlp`, `vo`, `head` and `channel` a is the activation and b the weight's row, for `qk` they
//! are the columns of q and of k. Its score is the product of both sizes, `sqrt(mean a_j^2) |b_j|`, where a size is the root of the
//! mean over images and positions for activations, and the norm for weights; several sinks add up in squares.
//! Example: mlp.0 of 384 units: hidden `[B, N, 384]` behind GELU, fc2 `[384, 96]`: 384 means of squares times 384 norms of rows.
//! In: the model (fused operators written out), its anatomy, images. The means are computed inside the graph; only `[units]` leave it.
//! Tokens, which no sink sums over, get equal scores. Sums over images in f64.
//! Source: Wanda (Sun et al. 2023) has this score for single weights; here it is that of a unit.

use super::Scores;
use super::images::{Images, MeasureError};
use crate::anatomy::{Anatomy, Group, Kind, Site};
use crate::axes::relation::Slot;
use crate::graph::build::Builder;
use crate::graph::{DType, Declared, Graph, ValueId};
use crate::infer::Facts;
use crate::runtime::Session;
use bytes::Bytes;
use std::collections::BTreeMap;

/// A graph that also computes sizes, and where they belong.
pub struct Probed {
    /// The model with one more output per operand.
    pub graph: Graph,
    groups: Vec<Measured>,
    /// Names of those outputs, with the positions that they are folded to.
    outputs: Vec<(String, usize)>,
}

struct Measured {
    id: String,
    sinks: Vec<Vec<Operand>>,
    bundles: Vec<Vec<usize>>,
    width: usize,
    units: usize,
}

/// Adds the outputs for all groups of these kinds.
///
/// Errors: [`MeasureError::Operand`] for a group of which no operand can be measured.
pub fn probe(graph: &Graph, facts: &Facts, anatomy: &Anatomy, kinds: &[Kind]) -> Result<Probed, MeasureError> {
    let mut probes = Probes { graph: graph.clone(), model: graph, facts, anatomy, at: BTreeMap::new(), outputs: Vec::new() };
    let mut groups = Vec::new();
    for group in anatomy.groups.iter().filter(|g| kinds.contains(&g.kind)) {
        let mut sinks: Vec<Vec<Site>> = Vec::new();
        if group.kind != Kind::Token {
            for sink in &anatomy.axes.classes()[group.leaf].sinks {
                let operands = group.operands(graph, facts, &anatomy.axes, sink);
                if !operands.is_empty() && !sinks.contains(&operands) {
                    sinks.push(operands);
                }
            }
            if sinks.is_empty() {
                let reason = "no operand that is summed over its units lies open".to_string();
                return Err(MeasureError::Operand { group: group.id.clone(), reason });
            }
        }
        let mut sink = |operands: Vec<Site>| operands.into_iter().map(|site| probes.operand(group, site)).collect();
        let sinks = sinks.into_iter().map(&mut sink).collect::<Result<_, _>>()?;
        let (id, width, units) = (group.id.clone(), group.stored.len(), group.units());
        groups.push(Measured { id, sinks, bundles: group.bundles(), width, units });
    }
    probes.graph.sort();
    Ok(Probed { graph: probes.graph, groups, outputs: probes.outputs })
}

/// Which output, and the unit at each position of it.
type Operand = (usize, Vec<Option<usize>>);

struct Probes<'a> {
    graph: Graph,
    model: &'a Graph,
    facts: &'a Facts,
    anatomy: &'a Anatomy,
    /// Outputs that are there: operand, axes, positions.
    at: BTreeMap<(ValueId, Vec<usize>, usize), usize>,
    outputs: Vec<(String, usize)>,
}

impl Probes<'_> {
    /// The squares of an operand, over all axes but those that hold the group: their mean, of weights their sum.
    fn operand(&mut self, group: &Group, site: Site) -> Result<Operand, MeasureError> {
        let refused = |reason: String| MeasureError::Operand { group: group.id.clone(), reason };
        let value = self.graph.node(site.at.node).input(site.at.slot);
        let value = value.ok_or_else(|| refused(format!("{} has no such input", self.graph.label(site.at.node))))?;
        let key = (value, site.axes.clone(), site.index.len());
        if let Some(at) = self.at.get(&key) {
            return Ok((*at, site.index));
        }
        let name = self.graph.value(value).name().to_string();
        let tensor = self.graph.constant(value);
        let dtype = tensor.as_ref().map(|t| t.dtype).or_else(|| self.facts.get(value).dtype);
        if !dtype.is_some_and(DType::is_float) {
            return Err(refused(format!("operand '{name}' is {}, expected floats", dtype.map_or("unknown", DType::name))));
        }
        let rank = tensor.as_ref().map(|t| t.dims.len()).or_else(|| self.facts.get(value).rank());
        let rank = rank.ok_or_else(|| refused(format!("the rank of operand '{name}' is unknown")))?;
        let axes = &self.anatomy.axes;
        let carrier = axes.carrier_at(self.model, site.at.node, Slot::In(site.at.slot));
        let is_weight = carrier.is_some_and(|c| axes.carriers()[c].constant);
        let others: Vec<i64> = (0..rank).filter(|a| !site.axes.contains(a)).map(|a| a as i64).collect();
        let mut b = Builder::new(&mut self.graph, "activation.");
        let x = if dtype == Some(DType::F32) { value } else { b.cast(value, DType::F32) };
        let square = b.mul(x, x);
        let size = match (others.is_empty(), is_weight) {
            (true, _) => square,
            (false, true) => b.reduce_sum(square, &others, false),
            (false, false) => b.reduce_mean(square, &others, false),
        };
        let at = self.outputs.len();
        self.outputs.push((self.graph.value(size).name().to_string(), site.index.len()));
        self.graph.add_output(size, Declared { dtype: Some(DType::F32), dims: None, extra: Bytes::new() });
        self.at.insert(key, at);
        Ok((at, site.index))
    }
}

/// Scores of the groups that were probed; `session` runs [`Probed::graph`].
pub fn activation(
    session: &mut dyn Session,
    probed: &Probed,
    images: &Images<'_>,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Scores, MeasureError> {
    let mut sums: Vec<Vec<f64>> = probed.outputs.iter().map(|(_, len)| vec![0.0; *len]).collect();
    let n = images.each(progress, &mut |batch| {
        let found = session.run(&batch.inputs)?;
        for (sum, (name, len)) in sums.iter_mut().zip(&probed.outputs) {
            let missing = || MeasureError::Output { name: name.clone(), reason: "the model did not give it".into() };
            let values = found.iter().find(|(n, _)| n == name).ok_or_else(missing)?.1.as_f32();
            // A first axis that is longer than the units repeats them: a batch in front of the heads.
            let weight = batch.count as f64 / (values.len() / len).max(1) as f64;
            values.iter().enumerate().for_each(|(position, v)| sum[position % len] += f64::from(*v) * weight);
        }
        Ok(())
    })?;
    let scores = probed.groups.iter().map(|g| Ok((g.id.clone(), g.scores(&sums, n)?)));
    Ok(Scores { groups: scores.collect::<Result<_, MeasureError>>()?, by: "activation".into(), model_sha256: String::new() })
}

impl Measured {
    fn scores(&self, sums: &[Vec<f64>], images: usize) -> Result<Vec<f32>, MeasureError> {
        if self.sinks.is_empty() {
            return Ok(vec![1.0; self.units]);
        }
        let bundle = |unit: usize| self.bundles[unit % self.width].iter().map(move |u| unit / self.width * self.width + u);
        let mut squares = vec![0f64; self.units];
        for operands in &self.sinks {
            let mut product = vec![1f64; self.units];
            for (output, index) in operands {
                let mut energy = vec![0f64; self.units];
                for (unit, sum) in index.iter().zip(&sums[*output]) {
                    if let Some(unit) = unit {
                        energy[*unit] += sum / images as f64;
                    }
                }
                product.iter_mut().enumerate().for_each(|(u, p)| *p *= bundle(u).map(|v| energy[v]).sum::<f64>());
            }
            squares.iter_mut().zip(product).for_each(|(s, p)| *s += p);
        }
        if squares.iter().any(|s| !s.is_finite()) {
            return Err(MeasureError::NotFinite { group: self.id.clone(), what: "the size of an operand" });
        }
        Ok(squares.iter().enumerate().map(|(u, s)| (s.sqrt() / bundle(u).count() as f64) as f32).collect())
    }
}
