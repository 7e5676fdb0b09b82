//! What cuts cost without a run of the model for each: errors of layers times how much the output feels of them.
//!
//! To second order, `loss = 1/2 E[(g . d)^2]` for an error d of a layer's output with the gradient g there. With d of mean 0,
//! independent of g and alike in all directions: the mean square of d times half the sum of the squares of g.
//! Errors come from the statistics alone; gradients take one pass forward and back over a few images.

use super::allocate::{best, known, levels};
use super::apart::Trainable;
use super::calibrate::{CalibrateAsk, Calibrating, Calibration, heads_of, on_all_cores, queries_and_keys};
use super::{Error, Model, class_output};
use crate::anatomy::{Anatomy, Group, Kind};
use crate::compensate::{self, Consumer, Layer};
use crate::curves::{self, Curves, How};
use crate::data::Dataset;
use crate::eval;
use crate::graph::{Graph, NodeId, ValueId};
use crate::plan::Kept;
use crate::runtime::{self, RuntimeName};
use crate::score::{self, Images, MeasureError};
use crate::supernet::Squares;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::AtomicBool;

/// Images that gradients are taken of, at most.
const IMAGES: usize = 256;
/// Images of one run at most: going back keeps all values of the way forward.
const BATCH: usize = 16;

/// What a prediction came to.
#[derive(Clone, Debug)]
pub enum Predicted {
    /// The curves.
    Curves(Curves),
    /// Why there are none; one line.
    Refused(String),
}

/// A product whose output has an error when a group is cut.
struct Product {
    /// Its output, in the graph that is differentiated.
    value: ValueId,
    /// What multiplies the product of its operands there.
    factor: f64,
    /// What an error is summed over: outputs, or heads of queries.
    parts: usize,
}

/// A group and the products that feel its cut.
struct Felt<'a> {
    group: &'a Group,
    layers: Vec<&'a Layer>,
    products: Vec<Product>,
}

impl Calibration {
    /// Losses of all groups that a plan may cut, each cut and repaired alone, at the widths at which [`Calibration::curves`] measures
    /// them, to second order. Read from the folder where it has them.
    ///
    /// Errors: data, engine, files. A model without such gradients is no error but [`Predicted::Refused`].
    pub fn predicted(
        &self,
        model: &Model,
        ask: &CalibrateAsk<'_>,
        kinds: &BTreeSet<Kind>,
        tell: &mut dyn FnMut(Calibrating),
        stop: &AtomicBool,
    ) -> Result<Predicted, Error> {
        let sha256 = model.sha256()?;
        let groups = self.groups_of(kinds);
        let file = self.curves_file(ask.dir, How::Predicted);
        if let Some(known) = known(file.as_deref(), &sha256, &groups)? {
            return Ok(Predicted::Curves(known));
        }
        let Some(data) = ask.data else { return Ok(Predicted::Refused("there are no images".to_string())) };
        let base = (&self.base.graph, &self.base.facts, &self.base.anatomy);
        let trainable = Trainable::of(&model.path, base)?;
        let (graph, facts, anatomy) = trainable.parts();
        let (consumers, _) = compensate::consumers(graph, facts, anatomy);
        let felt: Result<Vec<Felt<'_>>, String> = groups.iter().map(|g| self.felt(g, (graph, anatomy), &consumers)).collect();
        let felt = match felt {
            Ok(felt) => felt,
            Err(reason) => return Ok(Predicted::Refused(reason)),
        };
        let values: BTreeSet<ValueId> = felt.iter().flat_map(|f| &f.products).map(|p| p.value).collect();
        let values: Vec<ValueId> = values.into_iter().collect();
        let output = class_output(model, ask.output)?;
        let classes = output.as_ref().and_then(|name| graph.find(name));
        let squares = match Squares::new(graph, classes, &values) {
            Ok(squares) => squares,
            Err(reason) => return Ok(Predicted::Refused(reason.to_string())),
        };
        let (images, found) = self.squares(model, &squares, (ask, data), tell, stop)?;
        let found: BTreeMap<ValueId, f64> = values.into_iter().zip(found).filter_map(|(v, s)| Some((v, s?))).collect();
        let mut curves = Curves::empty(How::Predicted, images, &sha256);
        let points = on_all_cores(&felt, |felt| self.points(felt, &found));
        for (felt, points) in felt.iter().zip(points) {
            // As with measured curves, what no output depends on has none.
            if felt.products.iter().any(|p| found.contains_key(&p.value)) {
                let unsuitable = |f: curves::CurveFault| Error::unsuitable(&model.path, f.to_string());
                curves.insert(&felt.group.id, felt.group.units(), points).map_err(unsuitable)?;
            }
        }
        if let Some(file) = &file {
            curves.write(file)?;
        }
        Ok(Predicted::Curves(curves))
    }

    /// The products that feel a group's cut, in the graph that is differentiated. Errors: the reason why they cannot be told.
    fn felt<'a>(
        &'a self,
        group: &'a Group,
        (graph, anatomy): (&Graph, &Anatomy),
        consumers: &[Consumer],
    ) -> Result<Felt<'a>, String> {
        let refused = |what: &str| format!("group '{}': {what}", group.id);
        let mut felt = Felt { group, layers: Vec::new(), products: Vec::new() };
        if group.kind == Kind::Qk {
            let seen = queries_and_keys(&self.base, group).filter(|_| self.logits.contains_key(&group.id));
            let (q, _) = seen.ok_or_else(|| refused("its queries and keys cannot be seen"))?;
            let heads = heads_of(&q.index, group.nest_count(), group.stored.len()).iter().map(Vec::len).sum();
            let there = anatomy.groups.iter().find(|g| g.id == group.id && g.units() == group.units());
            let Some([site]) = there.map(|g| &g.sites[..]) else { return Err(refused("its logits are not one product")) };
            let product = product(graph, site.at.node, heads);
            felt.products.push(product.ok_or_else(|| refused("its logits cannot be told from what is computed with them"))?);
            return Ok(felt);
        }
        for layer in self.layers.iter().filter(|l| l.consumer.groups.iter().any(|(id, _)| *id == group.id)) {
            let is_same = |c: &&Consumer| c.groups == layer.consumer.groups && c.matrix(graph).as_ref() == Some(layer.weight());
            let there = consumers.iter().find(|c| c.site.at == layer.consumer.site.at && is_same(c));
            let there =
                there.or_else(|| consumers.iter().find(is_same)).ok_or_else(|| refused("its layer is written otherwise"))?;
            let product = product(graph, there.site.at.node, layer.weight().ncols());
            felt.products
                .push(product.ok_or_else(|| refused("its layer's output cannot be told from what is computed with it"))?);
            felt.layers.push(layer);
        }
        // Every place where its units are read must be a layer, or the error of one would go unseen.
        if felt.layers.is_empty() || felt.layers.len() < group.sites.len() {
            return Err(refused("not all that reads it is a layer whose error is known"));
        }
        Ok(felt)
    }

    /// Predicted losses at the widths at which they are measured.
    fn points(&self, felt: &Felt<'_>, found: &BTreeMap<ValueId, f64>) -> Vec<curves::Point> {
        let group = felt.group;
        let scores = &self.scores.groups[&group.id];
        let kept: Vec<Vec<usize>> = levels(group).into_iter().map(|count| best(group, scores, count)).collect();
        let mut all: BTreeMap<usize, f64> = kept.iter().map(|units| (units.len(), 0.0)).collect();
        for (n, product) in felt.products.iter().enumerate() {
            let square = found.get(&product.value).copied().unwrap_or(0.0) * product.factor * product.factor;
            let weight = 0.5 * square / product.parts.max(1) as f64;
            let error = |units: &Vec<usize>| match felt.layers.get(n) {
                Some(layer) => layer.error(&Kept::from([(group.id.clone(), units.clone())])),
                None => self.error_of_logits(group, units),
            };
            let errors: Vec<(usize, f64)> = kept.iter().map(|units| (units.len(), error(units))).collect();
            for point in curves::predicted(&errors, weight) {
                all.entry(point.width).and_modify(|loss| *loss += point.loss);
            }
        }
        all.into_iter().map(|(width, loss)| curves::Point { width, loss: loss.max(0.0) }).collect()
    }

    /// The mean squared error of a logit, summed over heads of queries, where these units stay.
    fn error_of_logits(&self, group: &Group, kept: &[usize]) -> f64 {
        let width = group.stored.len();
        let shares = self.logits.get(&group.id).map(Vec::as_slice).unwrap_or_default();
        let of_head = |(head, share): (usize, &faer::Mat<f64>)| {
            let gone: Vec<usize> = (0..width).filter(|e| kept.binary_search(&(head * width + e)).is_err()).collect();
            gone.iter().flat_map(|i| gone.iter().map(|j| share[(*i, *j)])).sum::<f64>()
        };
        shares.iter().enumerate().map(of_head).sum::<f64>().max(0.0)
    }

    /// Runs the graph of squared gradients on images: how many, and the means.
    fn squares(
        &self,
        model: &Model,
        squares: &Squares,
        (ask, data): (&CalibrateAsk<'_>, &Dataset),
        tell: &mut dyn FnMut(Calibrating),
        stop: &AtomicBool,
    ) -> Result<(u64, Vec<Option<f64>>), Error> {
        let fail = |cause: MeasureError| match cause {
            MeasureError::Runtime(e) => Error::Runtime(e),
            cause => Error::Measure { file: model.path.clone(), cause: Box::new(cause) },
        };
        let fixed = eval::fixed_batch(&self.base.graph, &self.base.facts);
        let data = data.draw(ask.images.min(IMAGES), ask.seed);
        let images = Images {
            data: &data,
            batch: fixed.unwrap_or(ask.batch.min(BATCH)).max(1),
            is_batch_fixed: fixed.is_some(),
            loaders: std::thread::available_parallelism().map_or(1, usize::from),
            stop,
        };
        let mut forward = runtime::open_graph(RuntimeName::Ort, &self.base.graph, ask.session)?;
        let mut step = runtime::open_graph(RuntimeName::Ort, &squares.graph, ask.session)?;
        let mut used = 0;
        let mut progress = |done: usize, of: usize| {
            used = done;
            tell(Calibrating::Gradients(done, of));
        };
        let found = score::squares(squares, (forward.as_mut(), step.as_mut()), &images, ask.seed, &mut progress).map_err(fail)?;
        Ok((used as u64, found))
    }
}

/// The output of a product, where nothing but a factor stands between it and the product of the operands.
fn product(graph: &Graph, id: NodeId, parts: usize) -> Option<Product> {
    let node = graph.node(id);
    let is_plain = node.domain() != "com.microsoft" || node.op() == "FusedMatMul";
    let factor = f64::from(node.attr_float("alpha").unwrap_or(1.0));
    node.output(0).filter(|_| is_plain).map(|value| Product { value, factor, parts })
}
