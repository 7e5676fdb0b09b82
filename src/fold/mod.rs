//! Soft gates -> weights: what multiplies an operand of a sink is multiplied into constants instead.
//!
//! In: a graph, a group with its sites, one gate per unit. Out: names of the constants that changed. Example: the gate of an `mlp`
//! of 192 units scales the 192 rows of the second weight; that of a `qk`, whose sink has no weight, goes back from q through
//! Transpose, Reshape and Split to the columns of W_q and to the bias.
//! Invariant: the graph afterwards computes what the graph with the gates computes, or nothing was changed.

mod back;
mod factor;
mod source;

use crate::anatomy::{Group, Site};
use crate::graph::{Graph, ValueId};
use crate::infer::Facts;
use back::Walk;
use factor::Factor;
pub use source::{Source, basis_sources, commutes_back_to, weight_of_sink};
use std::collections::{BTreeMap, BTreeSet};

/// Why gates do not fit a model.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FoldError {
    /// Another number of units.
    #[error("gates of group '{group}' have {found} entries, the group has {units} units")]
    Units {
        /// The group.
        group: String,
        /// Entries found.
        found: usize,
        /// Units of the group.
        units: usize,
    },
}

/// Multiplies the gate of a group into constants.
///
/// Errors: the reason why that cannot be done exactly; the graph is then as it was.
pub fn group(graph: &mut Graph, facts: &Facts, group: &Group, gate: &[f32]) -> Result<BTreeSet<String>, String> {
    let mut changes: BTreeMap<ValueId, Factor> = BTreeMap::new();
    for site in &group.sites {
        let factor = site_factor(graph, facts, site, gate)?;
        if factor.is_one() {
            continue;
        }
        let forwards = Walk::new(graph, facts).to_sink(site.at, &factor);
        let found = forwards.or_else(|reason| {
            let operand = graph.node(site.at.node).input(site.at.slot).ok_or("the operand is missing")?;
            Walk::new(graph, facts).back(operand, &factor, site.at).map_err(|back| format!("{back}; {reason}"))
        })?;
        for (v, f) in found {
            let product = match changes.remove(&v) {
                Some(old) => old.times(&f).ok_or("two sites scale one constant in different ways")?,
                None => f,
            };
            changes.insert(v, product);
        }
    }
    let mut names = BTreeSet::new();
    let mut scaled = Vec::new();
    for (v, factor) in &changes {
        let tensor = graph.constant(*v).ok_or("a constant is missing")?;
        scaled.push((*v, factor.scale(&tensor).ok_or("a constant has another shape than its factor")?));
    }
    for (v, tensor) in scaled {
        names.insert(graph.value(v).name().to_string());
        graph.set_constant(v, tensor);
    }
    Ok(names)
}

/// What multiplies the operand of a site.
fn site_factor(graph: &Graph, facts: &Facts, site: &Site, gate: &[f32]) -> Result<Factor, String> {
    let operand = graph.node(site.at.node).input(site.at.slot).ok_or("the operand is missing")?;
    let shape = facts.shape(operand).ok_or("the operand's rank is unknown")?;
    let sizes: Option<Vec<usize>> = site.axes.iter().map(|a| shape.get(*a).and_then(crate::infer::Dim::size)).collect();
    let sizes = sizes.ok_or("a size of the operand is unknown")?;
    if sizes.iter().product::<usize>() != site.index.len() {
        return Err("the gate repeats along the batch".to_string());
    }
    let mut dims = vec![1; shape.len()];
    for (axis, size) in site.axes.iter().zip(&sizes) {
        dims[*axis] = *size;
    }
    let values = site.index.iter().map(|u| u.and_then(|u| gate.get(u)).copied().unwrap_or(1.0)).collect();
    Ok(Factor::new(dims, values))
}

#[cfg(test)]
mod tests;
