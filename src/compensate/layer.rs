//! A consumer with what is known of its rows: how well it does without some of its features.

use super::Consumer;
use super::feedback::{self, Affine, Joint};
use super::obs::{self, Order};
use super::ridge::{self, Refit, Rows};
use crate::graph::{Graph, Tensor, ValueId};
use crate::stats::{Gathered, Moments};
use faer::Mat;
use std::collections::BTreeMap;

/// A consumer, its weight, and the moments of its features.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Who it is.
    pub consumer: Consumer,
    weight: Mat<f64>,
    moments: Gathered,
}

/// What a repair did to a layer. Errors are mean squared differences of its output on rows that were kept out of the fit, as shares
/// of the output's variance there.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Repair {
    /// The groups whose units went.
    pub groups: Vec<String>,
    /// Features that stay.
    pub kept: usize,
    /// Features.
    pub of: usize,
    /// The error of the plain cut.
    pub error_plain: f64,
    /// The error after the refit.
    pub error: f64,
    /// Whether the refit was taken: it is not where it makes the error larger.
    pub is_refitted: bool,
    /// The share of the mean variance that was added to the diagonal.
    pub ridge: f64,
}

fn rows(m: &Moments) -> Rows<'_> {
    Rows { mean: &m.mean, cov: &m.cov }
}

impl Layer {
    /// A consumer of a graph; `None` where its weight is no matrix of floats or the moments are of other features.
    pub fn new(graph: &Graph, consumer: Consumer, moments: Gathered) -> Option<Self> {
        let weight = consumer.matrix(graph)?;
        (moments.fit.mean.len() == weight.nrows()).then_some(Self { consumer, weight, moments })
    }

    /// The moments of features.
    pub fn moments(&self) -> &Gathered {
        &self.moments
    }

    /// The same layer with features `x T` and the weight that the graph has now, `T^-1 W`.
    pub fn turned(&self, graph: &Graph, turn: &Mat<f64>) -> Option<Self> {
        let turn_one = |m: &Moments| {
            let mean = (0..turn.ncols()).map(|j| (0..turn.nrows()).map(|i| m.mean[i] * turn[(i, j)]).sum()).collect();
            Moments { rows: m.rows, mean, cov: turn.transpose() * &m.cov * turn }
        };
        let moments = Gathered { fit: turn_one(&self.moments.fit), held: turn_one(&self.moments.held) };
        Self::new(graph, self.consumer.clone(), moments)
    }

    /// The order in which sets of features are best removed.
    pub fn order(&self, parts: &[Vec<usize>]) -> Option<Order> {
        obs::order(rows(&self.moments.fit), &self.weight, parts, self.consumer.bias.is_some())
    }

    /// Variance of the output over the rows of the fit, summed over outputs.
    pub fn output_variance(&self) -> f64 {
        ridge::output_variance(rows(&self.moments.fit), &self.weight)
    }

    /// The weight, `[features, outputs]`.
    pub fn weight(&self) -> &Mat<f64> {
        &self.weight
    }

    /// Mean squared error of the output, summed over outputs, on rows that were kept out of the fit, after the repair; 0 where all
    /// features stay.
    pub fn error(&self, kept: &BTreeMap<String, Vec<usize>>) -> f64 {
        let variance = ridge::output_variance(rows(&self.moments.held), &self.weight).max(f64::MIN_POSITIVE);
        self.repair(kept).map_or(0.0, |(_, told)| told.error * variance)
    }

    /// Repairs what units that are not kept leave behind; `None` where all features stay.
    pub fn repair(&self, kept: &BTreeMap<String, Vec<usize>>) -> Option<(Refit, Repair)> {
        let stays = self.consumer.kept(kept);
        if stays.iter().all(|s| *s) {
            return None;
        }
        let (fit, held) = (rows(&self.moments.fit), rows(&self.moments.held));
        let variance = ridge::output_variance(held, &self.weight).max(f64::MIN_POSITIVE);
        let plain = ridge::plain(&self.weight, &stays);
        let refit = ridge::refit(fit, &self.weight, &stays, self.consumer.bias.is_some());
        let (before, after) = (ridge::error(held, &self.weight, &plain), ridge::error(held, &self.weight, &refit));
        let is_refitted = after < before;
        let ids = self.consumer.groups.iter().map(|(id, _)| id.clone()).filter(|id| kept.contains_key(id));
        let told = Repair {
            groups: ids.collect(),
            kept: stays.iter().filter(|s| **s).count(),
            of: stays.len(),
            error_plain: before / variance,
            error: if is_refitted { after } else { before } / variance,
            is_refitted,
            ridge: if is_refitted { refit.ridge } else { 0.0 },
        };
        Some((if is_refitted { refit } else { plain }, told))
    }

    /// As [`Layer::repair`], by the moments `[x, Y]` behind layers that were cut before: of the plain cut, the refit by what the model as
    /// it was says, and the one towards Y, the one that is nearest to Y on rows kept out of the fit. Errors are shares of Y's variance.
    pub fn repair_behind(
        &self,
        graph: &Graph,
        kept: &BTreeMap<String, Vec<usize>>,
        behind: &Gathered,
    ) -> Option<(Refit, Repair)> {
        let (at_once, mut told) = self.repair(kept)?;
        let stays = self.consumer.kept(kept);
        let features = stays.len();
        let (fit, held) = (Joint { moments: &behind.fit, features }, Joint { moments: &behind.held, features });
        let outputs = self.weight.ncols();
        let scale = self.consumer.bias.map_or(1.0, |b| b.scale);
        let bias: Vec<f64> = self.consumer.bias_values(graph, outputs).iter().map(|b| b / scale).collect();
        let variance: f64 = (0..outputs).map(|o| behind.held.cov[(features + o, features + o)]).sum();
        let error = |refit: &Refit| {
            let bias = bias.iter().zip(&refit.shift).map(|(b, s)| b + s).collect();
            feedback::error(held, &Affine { weight: refit.weight.clone(), bias, ridge: refit.ridge })
                / variance.max(f64::MIN_POSITIVE)
        };
        let plain = ridge::plain(&self.weight, &stays);
        let fresh = feedback::fit(fit, &self.weight, &bias, &stays, self.consumer.bias.is_some()).map(|f| {
            let shift = f.bias.iter().zip(&bias).map(|(new, old)| new - old).collect();
            Refit { weight: f.weight, shift, ridge: f.ridge }
        });
        told.error_plain = error(&plain);
        let mut best = (told.error_plain, plain);
        told.is_refitted = false;
        for refit in std::iter::once(at_once).chain(fresh) {
            let error = error(&refit);
            if error < best.0 {
                best = (error, refit);
                told.is_refitted = true;
            }
        }
        (told.error, told.ridge) = (best.0, best.1.ridge);
        Some((best.1, told))
    }

    /// The constants with which a graph has a refitted layer.
    pub fn edits(&self, graph: &Graph, refit: &Refit) -> Vec<(ValueId, Tensor)> {
        let mut edits: Vec<(ValueId, Tensor)> = Vec::new();
        if let Some(tensor) = self.consumer.tensor_of(graph, &refit.weight) {
            edits.push((self.consumer.weight.constant, tensor));
        }
        let bias = self.consumer.bias.filter(|_| refit.shift.iter().any(|s| *s != 0.0));
        if let Some((bias, tensor)) = bias.and_then(|b| Some((b, graph.constant(b.constant)?))) {
            let shifted = tensor.to_f32s().map(|old| {
                let new = old.iter().zip(&refit.shift).map(|(b, s)| (f64::from(*b) + s * bias.scale) as f32);
                tensor.with_f32s(&new.collect::<Vec<_>>())
            });
            edits.extend(shifted.map(|t| (bias.constant, t)));
        }
        edits
    }
}
