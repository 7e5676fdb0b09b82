//! Slicing with the savings that change no output.

use super::edit::{Analysed, analysed};
use super::{Error, Model, analyse};
use crate::anatomy::Anatomy;
use crate::exact::{self, Part, Refused, Saving};
use crate::graph::Graph;
use crate::infer::{self, Facts};
use crate::plan::Kept;
use crate::slice::{self, Sliced};
use std::collections::BTreeSet;

/// A sliced graph, and what was saved of it.
pub(super) struct Made {
    pub(super) sliced: Sliced,
    /// What was saved.
    pub(super) savings: Vec<Saving>,
    /// What was not, and why.
    pub(super) refused: Vec<Refused>,
    /// The graph before the savings, and constants that they took apart.
    apart: Option<(Box<Graph>, Vec<Part>)>,
}

/// Slices, and saves where `is_exact`.
pub(super) fn slice(
    model: &Model,
    (graph, facts, anatomy): (&Graph, &Facts, &Anatomy),
    kept: &Kept,
    is_exact: bool,
) -> Result<Made, Error> {
    let slice_error = |cause| Error::Slice { file: model.path.clone(), cause };
    let mut sliced = slice::apply(graph, facts, anatomy, kept, &analyse).map_err(slice_error)?;
    if !is_exact {
        return Ok(Made { sliced, savings: Vec::new(), refused: Vec::new(), apart: None });
    }
    let facts = infer::facts(&sliced.graph).map_err(|cause| Error::Infer { file: model.path.clone(), cause })?;
    let found = exact::tokens(&sliced.graph, &facts, &model.sizes);
    let before = std::mem::replace(&mut sliced.graph, found.graph);
    sliced.nodes = slice::node_changes(graph, &sliced.graph);
    Ok(Made { sliced, savings: found.savings, refused: found.refused, apart: Some((Box::new(before), found.parts)) })
}

impl Made {
    /// `out`, a graph of this structure, with constants put together again that the savings took apart: as [`Sliced`] would have them.
    pub(super) fn put_back(&self, out: &Graph) -> Graph {
        let mut whole = out.clone();
        if let Some((before, parts)) = &self.apart {
            exact::put_together(&mut whole, before, parts);
        }
        whole
    }

    /// Names of edited constants, with those of their parts.
    pub(super) fn with_parts(&self, mut names: BTreeSet<String>) -> BTreeSet<String> {
        let parts = self.apart.iter().flat_map(|(_, parts)| parts);
        let edited = |p: &&Part| names.contains(&p.initializer) || names.contains(&p.name);
        let sources: BTreeSet<String> = parts.clone().filter(edited).map(|p| p.initializer.clone()).collect();
        names.extend(parts.filter(|p| sources.contains(&p.initializer)).map(|p| p.name.clone()));
        names.extend(sources);
        names
    }
}

/// The model with what can be saved of it saved, where its groups are still the same: what cutting them costs there.
pub(super) fn saved(model: &Model) -> Option<Analysed> {
    let found = exact::tokens(model.graph(), &model.facts, &model.sizes);
    if found.savings.is_empty() {
        return None;
    }
    let own = analysed(model, found.graph).ok()?;
    let groups = |a: &Anatomy| a.groups.iter().map(|g| (g.id.clone(), g.units(), g.nest_count())).collect::<Vec<_>>();
    (groups(&own.anatomy) == groups(&model.anatomy)).then_some(own)
}
