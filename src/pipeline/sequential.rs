//! Repair layer by layer over the depth: each layer is refitted on what the layers before it give after they were cut and repaired,
//! towards what the residual stream of the model as it was holds behind it.

use super::Error;
use super::Model;
use super::calibrate::{CalibrateAsk, Calibrating, Calibration, stats_error};
use crate::compensate::{Layer, Repair, both_streams};
use crate::data::Dataset;
use crate::graph::Graph;
use crate::infer;
use crate::plan::Kept;
use crate::stats::{self, Probe};
use std::sync::atomic::AtomicBool;

impl Calibration {
    /// As [`Calibration::repair`], each layer with fresh statistics behind what was cut before it.
    pub fn repair_in_order(
        &self,
        model: &Model,
        kept: &Kept,
        (ask, data): (&CalibrateAsk<'_>, &Dataset),
        tell: &mut dyn FnMut(Calibrating),
        stop: &AtomicBool,
    ) -> Result<(Graph, Vec<Repair>), Error> {
        let base = &self.base;
        let mut repaired = base.graph.clone();
        // Of groups that no layer stands behind the units are zeroed here, as the cut will leave them out.
        let mut edited = base.graph.clone();
        for group in base.anatomy.groups.iter().filter(|g| !self.has_layer(&g.id)) {
            if let Some(units) = kept.get(&group.id) {
                self.zeroed(group, units).into_iter().for_each(|(v, tensor)| edited.set_constant(v, tensor));
            }
        }
        let cut: Vec<&Layer> = self.layers.iter().filter(|l| l.consumer.kept(kept).contains(&false)).collect();
        let mut told = Vec::new();
        for (n, layer) in cut.iter().enumerate() {
            tell(Calibrating::Layers(n, cut.len()));
            let found = match self.behind(model, layer, &edited, (ask, data), stop)? {
                Some(behind) => layer.repair_behind(&base.graph, kept, &behind),
                None => layer.repair(kept),
            };
            let Some((refit, repair)) = found else { continue };
            for (v, tensor) in layer.edits(&base.graph, &refit) {
                edited.set_constant(v, tensor.clone());
                repaired.set_constant(v, tensor);
            }
            told.push(repair);
        }
        Ok((repaired, told))
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
        (ask, data): (&CalibrateAsk<'_>, &Dataset),
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
            data,
            images: Some(ask.images.min(data.len())),
            seed: ask.seed,
            batch: ask.batch,
            loaders,
            session: ask.session,
        };
        let mut found = stats::collect(&job, &mut |_| {}, stop).map_err(|cause| stats_error(model, cause))?;
        Ok(found.probes.remove("xy"))
    }
}
