//! Model -> training graph.

use super::apart::Trainable;
use super::{Error, Model};
use crate::anatomy::Kind;
use crate::autodiff::loss::Loss;
use crate::search;
use crate::supernet::{self, Options, Supernet, SupernetError};
use std::collections::BTreeSet;

/// What a training graph should have.
#[derive(Clone, Debug)]
pub struct AugmentAsk {
    /// Kinds that get gates.
    pub kinds: BTreeSet<Kind>,
    /// Whether `qk` and `vo` of a layer share a gate.
    pub tie_qkv: bool,
    /// Everything else, but for tied groups and outputs of the loss.
    pub options: Options,
    /// The output that the loss compares.
    pub output: Option<String>,
}

/// Builds the training graph.
pub fn augment(model: &Model, ask: &AugmentAsk) -> Result<Supernet, Error> {
    let trainable = Trainable::of_model(model)?;
    let (graph, facts, _) = trainable.parts();
    let kinds: Vec<Kind> = ask.kinds.iter().copied().collect();
    let (groups, tokens) = trainable.gates(model, &kinds)?;
    let mut options = Options { loss_outputs: Vec::new(), ..ask.options.clone() };
    if ask.tie_qkv {
        options.tied = search::tied_groups(&groups);
    }
    if let Some(output) = &ask.output {
        super::class_output(model, Some(output))?;
        options.loss_outputs.extend(graph.find(output));
    } else if matches!(options.loss, Loss::Ce | Loss::SoftCe | Loss::Kd) {
        let output = super::class_output(model, None)?;
        options.loss_outputs.extend(output.and_then(|name| graph.find(&name)));
    }
    supernet::build(graph, facts, &groups, &tokens, &options).map_err(|cause| match cause {
        SupernetError::NothingToTrain if groups.is_empty() && tokens.is_empty() => {
            Error::unsuitable(&model.path, no_gates(model, &kinds))
        }
        cause => Error::Supernet { file: model.path.clone(), cause },
    })
}

/// Why no gate was made for any of `kinds`.
fn no_gates(model: &Model, kinds: &[Kind]) -> String {
    let list = |kinds: BTreeSet<Kind>| kinds.into_iter().map(Kind::as_str).collect::<Vec<_>>().join(", ");
    let has: BTreeSet<Kind> = model.anatomy.groups.iter().map(|g| g.kind).collect();
    let asked = list(kinds.iter().copied().collect());
    match has.is_empty() {
        true => format!("nothing to train: no group of kind {asked}, nor of any other; see vitrim inspect"),
        false => format!("nothing to train: no group of kind {asked}; the model has {}", list(has)),
    }
}
