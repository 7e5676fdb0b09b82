//! Scores that images are needed for.

use super::apart::Trainable;
use super::{Error, Model, class_output};
use crate::anatomy::Kind;
use crate::autodiff::loss::Loss;
use crate::data::Dataset;
use crate::eval;
use crate::infer::Dim;
use crate::runtime::{self, RuntimeName, SessionOptions};
use crate::score::{self, Criterion, Engines, Images, MeasureError, Scores};
use crate::supernet::{self, Options, Supernet};
use std::sync::atomic::AtomicBool;

/// What is scored, on what.
#[derive(Clone, Copy)]
pub struct ScoreAsk<'a> {
    /// What is measured.
    pub by: Criterion,
    /// Kinds of groups that get scores.
    pub kinds: &'a [Kind],
    /// The images; labels are not looked at.
    pub data: &'a Dataset,
    /// How many of them at most, picked by the seed.
    pub images: usize,
    /// Images of one run.
    pub batch: usize,
    /// Picks images, labels and noise.
    pub seed: u64,
    /// The output with class scores; or any one that counts alone.
    pub output: Option<&'a str>,
    /// How sessions are opened.
    pub session: &'a SessionOptions,
}

/// Scores of a model's groups, measured on images. `progress` gets images done and images of all.
pub fn measured_scores(
    model: &Model,
    ask: &ScoreAsk<'_>,
    progress: &mut dyn FnMut(usize, usize),
    stop: &AtomicBool,
) -> Result<Scores, Error> {
    let fail = |cause: MeasureError| match cause {
        MeasureError::Runtime(e) => Error::Runtime(e),
        cause => Error::Measure { file: model.path.clone(), cause: Box::new(cause) },
    };
    let fixed = eval::fixed_batch(model.graph(), &model.facts);
    let images = Images {
        data: &ask.data.draw(ask.images, ask.seed),
        batch: fixed.unwrap_or(ask.batch),
        is_batch_fixed: fixed.is_some(),
        loaders: std::thread::available_parallelism().map_or(1, usize::from),
        stop,
    };
    let kinds: Vec<Kind> = ask.kinds.iter().copied().filter(|k| model.anatomy.groups.iter().any(|g| g.kind == *k)).collect();
    let trainable = Trainable::of_model(model)?;
    let (graph, facts, anatomy) = trainable.parts();
    if ask.by == Criterion::Activation {
        trainable.gates(model, &kinds)?;
        let probed = score::probe(graph, facts, anatomy, &kinds).map_err(fail)?;
        let mut session = runtime::open_graph(RuntimeName::Ort, &probed.graph, ask.session)?;
        return score::activation(session.as_mut(), &probed, &images, progress).map_err(fail);
    }
    let (net, classes) = gated(model, &trainable, &kinds, ask.output)?;
    let mut forward = runtime::open_graph(RuntimeName::Ort, model.graph(), ask.session)?;
    let mut step = runtime::open_graph(RuntimeName::Ort, &net.graph, ask.session)?;
    let mut engines = Engines { forward: forward.as_mut(), step: step.as_mut(), net: &net, classes: classes.as_deref() };
    score::gradients(&mut engines, &model.anatomy.groups, ask.by, &images, ask.seed, progress).map_err(fail)
}

/// The training graph with a gate per image and unit, and the output with class scores where its loss is the cross entropy.
fn gated(
    model: &Model,
    trainable: &Trainable<'_>,
    kinds: &[Kind],
    output: Option<&str>,
) -> Result<(Supernet, Option<String>), Error> {
    let (graph, facts, _) = trainable.parts();
    let (groups, tokens) = trainable.gates(model, kinds)?;
    let found = class_output(model, output)?;
    let value = found.as_ref().and_then(|name| graph.find(name));
    // An output that is named need not hold class scores; then it is the one that the squared error is of.
    let holds_classes = |v| facts.shape(v).is_some_and(|s: &[Dim]| s.len() == 2 && !s[1].is(1));
    let is_classes = value.is_some_and(holds_classes);
    let options = Options {
        per_sample: true,
        loss: if is_classes { Loss::SoftCe } else { Loss::Mse },
        loss_outputs: value.into_iter().collect(),
        ..Options::default()
    };
    let net = supernet::build(graph, facts, &groups, &tokens, &options)
        .map_err(|cause| Error::Supernet { file: model.path.clone(), cause })?;
    Ok((net, found.filter(|_| is_classes)))
}
