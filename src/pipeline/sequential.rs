//! Repair layer by layer over the depth: each layer is refitted on what the layers before it give after they were cut and repaired,
//! towards what the residual stream of the model as it was holds behind it.

use super::Error;
use super::Model;
use super::calibrate::{CalibrateAsk, Calibrating, Calibration, stats_error};
use crate::compensate::feedback::{self, Affine, Joint};
use crate::compensate::{Layer, Repair, both_streams};
use crate::graph::Graph;
use crate::infer;
use crate::plan::Kept;
use crate::stats::{self, Probe};
use faer::Mat;
use std::sync::atomic::AtomicBool;

impl Calibration {
    /// As [`Calibration::repair`], each layer with fresh statistics behind what was cut before it.
    pub fn repair_in_order(
        &self,
        model: &Model,
        kept: &Kept,
        ask: &CalibrateAsk<'_>,
        tell: &mut dyn FnMut(Calibrating),
        stop: &AtomicBool,
    ) -> Result<(Graph, Vec<Repair>), Error> {
        let base = &self.base;
        let mut edited = base.graph.clone();
        // What has no weight to refit is cut from the start: it lies before or behind every layer all the same.
        for group in base.anatomy.groups.iter().filter(|g| !self.has_layer(&g.id)) {
            if let Some(units) = kept.get(&group.id) {
                self.zeroed(group, units).into_iter().for_each(|(v, tensor)| edited.set_constant(v, tensor));
            }
        }
        let cut: Vec<&Layer> = self.layers.iter().filter(|l| l.consumer.kept(kept).contains(&false)).collect();
        let mut told = Vec::new();
        for (n, layer) in cut.iter().enumerate() {
            tell(Calibrating::Layers(n, cut.len()));
            let Some((refit, mut repair)) = layer.repair(kept) else { continue };
            let mut edits = layer.edits(&base.graph, &refit);
            if let Some(found) = self.behind(model, layer, &edited, ask, stop)? {
                let stays = layer.consumer.kept(kept);
                let outputs = refit.weight.ncols();
                let bias = layer.consumer.bias_values(&base.graph, outputs);
                let scale = layer.consumer.bias.map_or(1.0, |b| b.scale);
                let (fit, held) =
                    (Joint { moments: &found.fit, features: stays.len() }, Joint { moments: &found.held, features: stays.len() });
                let old: Vec<f64> = bias.iter().map(|b| b / scale).collect();
                let shifted = old.iter().zip(&refit.shift).map(|(b, s)| b + s).collect();
                let before = Affine { weight: refit.weight.clone(), bias: shifted };
                let variance: f64 = (0..outputs).map(|o| found.held.cov[(stays.len() + o, stays.len() + o)]).sum();
                let error = |layer: &Affine| feedback::error(held, layer) / variance.max(f64::MIN_POSITIVE);
                let weight = layer.consumer.matrix(&base.graph).unwrap_or_else(|| before.weight.clone());
                let fresh = feedback::fit(fit, &weight, &old, &stays, layer.consumer.bias.is_some());
                let plain = Affine { weight: masked(&weight, &stays), bias: old.clone() };
                repair.error_plain = error(&plain);
                repair.error = error(&before).min(repair.error_plain);
                if let Some(fresh) = fresh.filter(|f| error(f) < repair.error) {
                    repair.error = error(&fresh);
                    repair.is_refitted = true;
                    let shift = fresh.bias.iter().zip(&old).map(|(new, old)| new - old).collect();
                    let refit = crate::compensate::ridge::Refit { weight: fresh.weight, shift, ridge: repair.ridge };
                    edits = layer.edits(&base.graph, &refit);
                }
            }
            edits.into_iter().for_each(|(v, tensor)| edited.set_constant(v, tensor));
            told.push(repair);
        }
        // The cut removes what was zeroed: groups without a layer keep their own weights.
        for group in base.anatomy.groups.iter().filter(|g| !self.has_layer(&g.id) && kept.contains_key(&g.id)) {
            for cut in &group.cuts {
                let is_layer = self.layers.iter().any(|l| l.consumer.weight.constant == cut.value);
                if let (false, Some(tensor)) = (is_layer, base.graph.constant(cut.value)) {
                    edited.set_constant(cut.value, tensor);
                }
            }
        }
        Ok((edited, told))
    }

    fn has_layer(&self, id: &str) -> bool {
        self.layers.iter().any(|l| l.consumer.groups.iter().any(|(g, _)| g == id))
    }

    /// Moments of `[x, Y]` of a layer: x of the edited graph, Y what it must give there so that the residual stream is that of the
    /// model as it was; where there is none, what it gave in the model. `None` where the layer cannot be seen.
    fn behind(
        &self,
        model: &Model,
        layer: &Layer,
        edited: &Graph,
        ask: &CalibrateAsk<'_>,
        stop: &AtomicBool,
    ) -> Result<Option<stats::Gathered>, Error> {
        let base = &self.base;
        let Some((graph, rows)) = both_streams((&base.graph, &base.facts), edited, &layer.consumer) else { return Ok(None) };
        let facts = infer::facts(&graph).map_err(|cause| Error::Infer { file: model.path.clone(), cause })?;
        let probe = Probe { name: "xy".to_string(), value: rows, axes: vec![1], centre: None };
        let loaders = std::thread::available_parallelism().map_or(1, usize::from);
        let job = stats::Job {
            graph: &graph,
            facts: &facts,
            model_sha256: "",
            probes: std::slice::from_ref(&probe),
            data: ask.data,
            images: Some(ask.images.min(ask.data.len())),
            seed: ask.seed,
            batch: ask.batch,
            loaders,
            session: ask.session,
        };
        let mut found = stats::collect(&job, &mut |_| {}, stop).map_err(|cause| stats_error(model, cause))?;
        Ok(found.probes.remove("xy"))
    }
}

fn masked(weight: &Mat<f64>, stays: &[bool]) -> Mat<f64> {
    Mat::from_fn(weight.nrows(), weight.ncols(), |f, o| if stays[f] { weight[(f, o)] } else { 0.0 })
}
