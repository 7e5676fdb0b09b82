//! Which element of which constant a position of an operand comes from, or meets in a sink.
//!
//! The walk of a factor is taken with numbers that name units: what arrives at a constant says which unit each of its positions is of.
//! Example: q `[B, 3, N, 16]` of a fused projection comes from the first 48 columns of W `[48, 144]` and of the bias `[144]`.

use super::back::Walk;
use super::factor::Factor;
use crate::anatomy::Site;
use crate::graph::{Graph, NodeId, ValueId};
use crate::infer::{Dim, Facts};

/// A constant and the units of its positions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The constant.
    pub constant: ValueId,
    /// Axes along which units lie, ascending.
    pub axes: Vec<usize>,
    /// Unit of each position of the row-major product of those axes; `None` where the operand does not come from there.
    pub units: Vec<Option<usize>>,
}

/// Below this a factor is no unit: 1 means that a position is not met.
const FIRST: f32 = 2.0;
/// A unit must be exact as a f32.
const UNITS_MAX: usize = 1 << 23;

/// Where the operand of a site comes from, if everything on the way commutes with a change of basis of its units.
///
/// Errors: the node that does not, or a reader beside that would see the new basis.
pub fn basis_sources(graph: &Graph, facts: &Facts, site: &Site) -> Result<Vec<Source>, String> {
    let operand = graph.node(site.at.node).input(site.at.slot).ok_or("the operand is missing")?;
    let found = Walk::of_basis(graph, facts, &[]).back(operand, &units_of(graph, facts, site)?, site.at)?;
    found.iter().map(|(v, f)| source(graph, *v, f)).collect()
}

/// Whether everything from the operand of a site back to one of `ends` commutes with a change of basis of its units.
///
/// Errors: the node that does not.
pub fn commutes_back_to(graph: &Graph, facts: &Facts, site: &Site, ends: &[NodeId]) -> Result<(), String> {
    let operand = graph.node(site.at.node).input(site.at.slot).ok_or("the operand is missing")?;
    let found = Walk::of_basis(graph, facts, ends).back(operand, &units_of(graph, facts, site)?, site.at)?;
    if found.is_empty() { Ok(()) } else { Err("something is added on the way".to_string()) }
}

/// The constant that a site's operand is multiplied with and summed over; positions instead of units.
///
/// Errors: where the sink is no plain product with one weight.
pub fn weight_of_sink(graph: &Graph, facts: &Facts, site: &Site) -> Result<Source, String> {
    let positions = Site { index: (0..site.index.len()).map(Some).collect(), ..site.clone() };
    let found = Walk::new(graph, facts).to_sink(site.at, &units_of(graph, facts, &positions)?)?;
    match &found[..] {
        [(v, f)] => source(graph, *v, f),
        _ => Err("it meets no single weight".to_string()),
    }
}

fn units_of(graph: &Graph, facts: &Facts, site: &Site) -> Result<Factor, String> {
    let operand = graph.node(site.at.node).input(site.at.slot).ok_or("the operand is missing")?;
    let shape = facts.shape(operand).ok_or("the operand's rank is unknown")?;
    let sizes: Option<Vec<usize>> = site.axes.iter().map(|a| shape.get(*a).and_then(Dim::size)).collect();
    let sizes = sizes.ok_or("heads share an axis with the batch")?;
    if sizes.iter().product::<usize>() != site.index.len() || site.index.len() > UNITS_MAX {
        return Err("heads share an axis with the batch".to_string());
    }
    let mut dims = vec![1; shape.len()];
    for (axis, size) in site.axes.iter().zip(&sizes) {
        dims[*axis] = *size;
    }
    Ok(Factor::new(dims, site.index.iter().map(|u| u.map_or(1.0, |u| u as f32 + FIRST)).collect()))
}

fn source(graph: &Graph, constant: ValueId, factor: &Factor) -> Result<Source, String> {
    let tensor = graph.constant(constant).ok_or("a constant is missing")?;
    let axes: Vec<usize> = factor.axes().collect();
    if tensor.dims.len() != factor.dims.len() || axes.iter().any(|a| tensor.dims[*a] != factor.dims[*a]) {
        return Err(format!("'{}' is broadcast", graph.value(constant).name()));
    }
    let units = factor.values.iter().map(|x| (*x >= FIRST).then_some((*x - FIRST) as usize)).collect();
    Ok(Source { constant, axes, units })
}
