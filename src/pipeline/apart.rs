//! Models with fused operators, as they train: a copy in which those are written out in standard operators.
//!
//! Groups of the copy have the ids and units of the model's, so gates and weights of a training go back to the model, which is cut as
//! it is.

use super::edit::Analysed;
use super::{Error, Model, analyse};
use crate::anatomy::{Anatomy, Group, Kind};
use crate::graph::Graph;
use crate::infer::Facts;
use crate::search;
use crate::supernet::decompose::{self, Apart};
use crate::supernet::{GateGroup, TokenGate};
use std::path::Path;

/// What is trained of a model.
pub(super) enum Trainable<'a> {
    /// The model itself.
    Itself(&'a Graph, &'a Facts, &'a Anatomy),
    /// The copy with fused operators written out.
    Copy(Box<(Analysed, Apart)>),
}

impl<'a> Trainable<'a> {
    /// Of a graph that was read from `path`.
    pub(super) fn of(path: &Path, (graph, facts, anatomy): (&'a Graph, &'a Facts, &'a Anatomy)) -> Result<Self, Error> {
        let infer_error = |cause| Error::Infer { file: path.to_path_buf(), cause };
        let has_masks = anatomy.tokens.all().flat_map(|s| &s.fused).next().is_some();
        if !decompose::applies(graph) && !has_masks {
            return Ok(Trainable::Itself(graph, facts, anatomy));
        }
        let mut copy = graph.clone();
        let apart = if decompose::applies(graph) { decompose::run(&mut copy).map_err(infer_error)? } else { Apart::default() };
        let (mut facts, mut anatomy) = analyse(&copy).map_err(infer_error)?;
        // What stays fused is masked by an input, which may be missing.
        if decompose::open_masks(&mut copy, &facts, anatomy.tokens.all().flat_map(|s| &s.fused)) {
            (facts, anatomy) = analyse(&copy).map_err(infer_error)?;
        }
        Ok(Trainable::Copy(Box::new((Analysed { graph: copy, facts, anatomy }, apart))))
    }

    /// Of a model.
    pub(super) fn of_model(model: &'a Model) -> Result<Self, Error> {
        Self::of(&model.path, (model.graph(), &model.facts, &model.anatomy))
    }

    pub(super) fn parts(&self) -> (&Graph, &Facts, &Anatomy) {
        match self {
            Trainable::Itself(graph, facts, anatomy) => (graph, facts, anatomy),
            Trainable::Copy(copy) => (&copy.0.graph, &copy.0.facts, &copy.0.anatomy),
        }
    }

    /// Gates of these kinds, with their places: those of the groups of `model`.
    ///
    /// Errors: the copy has no such group.
    pub(super) fn gates(&self, model: &Model, kinds: &[Kind]) -> Result<(Vec<GateGroup>, Vec<TokenGate>), Error> {
        let (graph, facts, anatomy) = self.parts();
        let (mut groups, mut tokens) = search::gates(graph, facts, anatomy, kinds);
        let known = |id: &str, units: usize| model.anatomy.groups.iter().any(|g| g.id == id && g.units() == units);
        groups.retain(|g| known(&g.id, g.units));
        tokens.retain(|t| known(&t.id, t.units));
        let has = |g: &Group| groups.iter().any(|x| x.id == g.id) || tokens.iter().any(|x| x.id == g.id);
        match model.anatomy.groups.iter().find(|g| kinds.contains(&g.kind) && !has(g)) {
            None => Ok((groups, tokens)),
            Some(missing) => {
                let reason =
                    format!("group '{}' is lost where fused operators are written out: it cannot be trained", missing.id);
                Err(Error::unsuitable(&model.path, reason))
            }
        }
    }

    /// `model`, which this was made of, with the constants of `trained`, which was made of this.
    ///
    /// Errors: the reason why the model cannot have them.
    pub(super) fn put_back(&self, model: &Graph, trained: Graph) -> Result<Graph, String> {
        match self {
            Trainable::Itself(..) => Ok(trained),
            Trainable::Copy(copy) => decompose::put_back(model, &copy.1, &copy.0.graph, &trained),
        }
    }
}
