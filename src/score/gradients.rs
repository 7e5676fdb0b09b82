//! Per-sample gradients of the gates -> Scores: `fisher`, diagonal or by blocks, and `taylor`.
//!
//! In: a training graph whose gates have a batch axis, the model that it was made of, and images without labels. What the loss
//! compares with is drawn from the model itself, image by image ([`super::target`]), so that the mean of `g g^T` is the Hessian, at
//! gate 1, of the KL divergence from the original; of the squared error where no output holds class scores. With one row of gates per
//! image, one backward pass gives `g[b, j] = dL_b / dm_j` for all images of a batch.
//! Example: 256 images and 384 units of `mlp.0` are G `[256, 384]`; fisher is the mean of the squares of its columns.
//! Memory: sums over images, but for `fisher` by blocks G itself, 4 bytes x images x units of all groups (57 MB for 256 images and the
//! 55,000 units of a ViT-B). Sums in f64.
//! Source: Kwon et al. 2022, "A fast post-training pruning framework for transformers", eq. 7 to 9, with gradients per sample instead
//! of per batch, and nothing of the given labels; Molchanov et al. 2019 for `taylor`.

use super::block;
use super::images::{Images, MeasureError};
use super::target::{Draw, Output, number_of};
use super::{Criterion, Scores};
use crate::anatomy::Group;
use crate::autodiff::Role;
use crate::data::{Array, ArrayData, Batch};
use crate::runtime::Session;
use crate::supernet::Supernet;

/// What gives gradients.
pub struct Engines<'a> {
    /// The model without gates: its outputs decide what is drawn.
    pub forward: &'a mut dyn Session,
    /// The training graph.
    pub step: &'a mut dyn Session,
    /// What the training graph is.
    pub net: &'a Supernet,
    /// The output with class scores, where the loss is the cross entropy.
    pub classes: Option<&'a str>,
}

/// What is summed over the images for one group. Units that go together are one column: their gradients add up.
struct Column<'a> {
    group: &'a Group,
    gate: &'a str,
    bundles: Vec<Vec<usize>>,
    sums: Vec<f64>,
    rows: Vec<f32>,
}

/// Scores of the groups that the training graph has gates for.
///
/// `seed` decides what is drawn. Errors: [`MeasureError`].
pub fn gradients(
    engines: &mut Engines<'_>,
    groups: &[Group],
    by: Criterion,
    images: &Images<'_>,
    seed: u64,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Scores, MeasureError> {
    let net = engines.net;
    let gate = |g: &Group| net.gates.iter().find(|gate| gate.groups.contains(&g.id)).map(|gate| gate.input.as_str());
    let mut columns: Vec<Column<'_>> = groups.iter().filter_map(|g| Some(Column::new(g, gate(g)?))).collect();
    let draw = Draw { seed };
    let n = images.each(progress, &mut |batch| {
        let outputs = engines.forward.run(&batch.inputs)?;
        let feeds = feeds(net, engines.classes, batch, &outputs, &draw)?;
        let found = engines.step.run(&feeds)?;
        for column in &mut columns {
            let name = format!("grad.{}", column.gate);
            let array = found.iter().find(|(n, _)| *n == name).map(|(_, a)| a);
            let misfit = |reason: &str| MeasureError::Output { name: name.clone(), reason: reason.to_string() };
            let array = array.ok_or_else(|| misfit("the training graph does not have it"))?;
            if array.dims != [batch.count, column.group.units()] {
                return Err(misfit(&format!("is {:?}, expected a row per image", array.dims)));
            }
            column.take(&array.as_f32(), by)?;
        }
        Ok(())
    })?;
    let scores = columns.iter().map(|c| (c.group.id.clone(), c.scores(by, n))).collect();
    Ok(Scores { groups: scores, by: by.word().into(), model_sha256: String::new() })
}

/// Everything that the training graph takes: the batch, what is drawn, all gates 1 and no penalty.
fn feeds(
    net: &Supernet,
    classes: Option<&str>,
    batch: &Batch,
    outputs: &[(String, Array)],
    draw: &Draw,
) -> Result<Vec<(String, Array)>, MeasureError> {
    let mut feeds = batch.inputs.clone();
    for spec in &net.inputs {
        let array = match spec.role {
            Role::Input | Role::Labels | Role::Param | Role::Moment => continue,
            Role::Target => {
                let name = spec.name.strip_prefix("target.").unwrap_or(&spec.name);
                let number = number_of(outputs, name, batch.count)?;
                let of = if classes == Some(name) { Output::ClassScores } else { Output::Numbers };
                draw.target(&outputs[number].1, of, number as u64, &batch.samples)
            }
            Role::Gate => {
                let units = net.gates.iter().find(|g| g.input == spec.name).map_or(0, |g| g.units);
                Array { dims: vec![batch.count, units], data: ArrayData::F32(vec![1.0; batch.count * units]) }
            }
            Role::Scalar => Array { dims: Vec::new(), data: ArrayData::F32(vec![0.0]) },
        };
        feeds.push((spec.name.clone(), array));
    }
    Ok(feeds)
}

impl<'a> Column<'a> {
    fn new(group: &'a Group, gate: &'a str) -> Self {
        let width = group.stored.len();
        let row = group.bundles();
        let first = |u: &usize| row[*u][0] == *u;
        let of_head = |head: usize| (0..width).filter(first).map(move |u| (head, u));
        let bundles: Vec<Vec<usize>> = (0..group.nest_count())
            .flat_map(of_head)
            .map(|(head, u)| row[u].iter().map(|v| head * width + v).collect())
            .collect();
        Self { group, gate, sums: vec![0.0; bundles.len()], bundles, rows: Vec::new() }
    }

    /// Adds rows of gradients, one per image.
    fn take(&mut self, rows: &[f32], by: Criterion) -> Result<(), MeasureError> {
        for row in rows.chunks_exact(self.group.units()) {
            if row.iter().any(|g| !g.is_finite()) {
                return Err(MeasureError::NotFinite { group: self.group.id.clone(), what: "the gradient of its gate" });
            }
            for (sum, bundle) in self.sums.iter_mut().zip(&self.bundles) {
                let g: f64 = bundle.iter().map(|u| f64::from(row[*u])).sum();
                match by {
                    Criterion::FisherBlock => self.rows.push(g as f32),
                    Criterion::Taylor => *sum += g.abs(),
                    Criterion::Fisher | Criterion::Activation => *sum += g * g,
                }
            }
        }
        Ok(())
    }

    /// A score per unit: each of those that go together has its share.
    fn scores(&self, by: Criterion, images: usize) -> Vec<f32> {
        let columns = match by {
            Criterion::FisherBlock => block::scores(&self.rows, self.bundles.len(), self.group.nest_count()),
            _ => self.sums.iter().map(|s| (s / images as f64) as f32).collect(),
        };
        let mut out = vec![0f32; self.group.units()];
        for (score, bundle) in columns.iter().zip(&self.bundles) {
            bundle.iter().for_each(|u| out[*u] = score / bundle.len() as f32);
        }
        out
    }
}
