//! Rotation: q and k, or v and the output projection, in the basis of the data, head by head; the function stays the same.
//!
//! In: a graph, its anatomy, second moments of q, k and of what enters the output projection. Out: a graph with other weights that
//! computes the same, in which dims of a head are ordered by what they carry, so that keeping the first r is the best of rank r
//! (Eckart and Young; METHOD 3e).
//! Example: in a head of 64 dims of which the data use 12, units 0 to 11 carry what 64 did.
//! Invariant: `q A (k A^-T)^T = q k^T` and `(P v A) (A^-1 W) = P v W` for every invertible A; what lies between a projection and its
//! product must commute with A, which is proven on the graph ([`crate::fold::basis_sources`]) or refused with the node that does not.

mod turn;

use crate::anatomy::{Anatomy, Group, Kind, Site};
use crate::compensate::Consumer;
use crate::fold::{self, Source};
use crate::graph::{DType, Graph, Tensor, Use, ValueId};
use crate::infer::Facts;
use faer::Mat;
use std::collections::BTreeMap;
pub use turn::{Basis, of_logits, of_values};

/// A group that may be rotated.
#[derive(Clone, Debug)]
pub struct Rotatable {
    /// Its id.
    pub group: String,
    /// Heads that units are numbered by.
    pub heads: usize,
    /// Dims of a head.
    pub width: usize,
    /// What is multiplied with the basis.
    pub pair: Pair,
}

/// Two operands of which one is multiplied with a matrix and the other with its inverse.
#[derive(Clone, Debug)]
pub enum Pair {
    /// Queries and keys.
    Logits {
        /// The operand of queries.
        q: Site,
        /// The operand of keys.
        k: Site,
        /// Where queries come from.
        q_from: Vec<Source>,
        /// Where keys come from.
        k_from: Vec<Source>,
    },
    /// Values and the output projection.
    Values {
        /// Where values come from.
        v_from: Vec<Source>,
        /// What enters the projection.
        x: Site,
        /// The projection's weight, by units.
        weight: Source,
    },
}

/// A group that may not, and why. One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// The group.
    pub group: String,
    /// The reason.
    pub reason: String,
}

/// Decides for every `qk` and `vo` group whether it may be rotated.
pub fn rotatable(graph: &Graph, facts: &Facts, anatomy: &Anatomy, consumers: &[Consumer]) -> (Vec<Rotatable>, Vec<Refused>) {
    let (mut found, mut refused) = (Vec::new(), Vec::new());
    for group in anatomy.groups.iter().filter(|g| matches!(g.kind, Kind::Qk | Kind::Vo)) {
        let pair = in_plain_dims(group).and_then(|()| match group.kind {
            Kind::Qk => logits(graph, facts, anatomy, group),
            _ => values(graph, facts, anatomy, group, consumers),
        });
        match pair {
            Ok(pair) => {
                let (heads, width) = (group.nest_count(), group.stored.len());
                found.push(Rotatable { group: group.id.clone(), heads, width, pair });
            }
            Err(reason) => refused.push(Refused { group: group.id.clone(), reason }),
        }
    }
    (found, refused)
}

/// Dims that go in pairs are told apart by a rotation of positions; a table for all heads meets stored dims.
fn in_plain_dims(group: &Group) -> Result<(), String> {
    let is_plain = group.stored.iter().copied().eq(0..group.stored.len()) && group.sharers.is_empty() && group.run == 1;
    match (is_plain, group.spread.is_empty(), &group.sites[..]) {
        (false, ..) => Err("its dims go in pairs or blocks".to_string()),
        (_, false, _) => Err("a table of positions is multiplied with its dims".to_string()),
        (.., [_]) => Ok(()),
        _ => Err("it is contracted at several places".to_string()),
    }
}

fn logits(graph: &Graph, facts: &Facts, anatomy: &Anatomy, group: &Group) -> Result<Pair, String> {
    let site = &group.sites[0];
    let node = graph.node(site.at.node);
    let is_product = matches!(node.op(), "MatMul" | "FusedMatMul" | "Einsum");
    let is_fused = node.op() == "Attention" && node.domain().is_empty() && node.input(4).is_none() && node.input(5).is_none();
    if !is_product && !is_fused {
        return Err(format!("node {} ({}) makes its logits inside itself", graph.label(site.at.node), node.op()));
    }
    let at = |slot: usize| {
        let at = Use { node: site.at.node, slot };
        group.operand(graph, facts, &anatomy.axes, at).ok_or_else(|| "an operand of the logits has no dims of it".to_string())
    };
    let (q, k) = (at(0)?, at(1)?);
    let q_from = fold::basis_sources(graph, facts, &q)?;
    let k_from = fold::basis_sources(graph, facts, &k)?;
    Ok(Pair::Logits { q, k, q_from, k_from })
}

fn values(graph: &Graph, facts: &Facts, anatomy: &Anatomy, group: &Group, consumers: &[Consumer]) -> Result<Pair, String> {
    let of_group = |c: &&Consumer| c.groups.iter().any(|(id, _)| *id == group.id);
    let consumer = consumers.iter().find(of_group).ok_or("its output projection is no plain product with one weight")?;
    let (_, index) = consumer.groups.iter().find(|(id, _)| *id == group.id).ok_or("it has no units there")?;
    let layer = anatomy.attention.get(group.layer).ok_or("its layer has no attention")?;
    let [mix] = layer.mixes[..] else { return Err("the attention matrix is multiplied with several values".to_string()) };
    let node = graph.node(mix);
    let slots: Vec<usize> = match (node.op(), node.domain()) {
        ("MatMul" | "FusedMatMul" | "Einsum", _) => vec![0, 1],
        ("Attention", "") if node.input(4).is_none() && node.input(5).is_none() => vec![2],
        (op, _) => return Err(format!("node {} ({op}) makes its values inside itself", graph.label(mix))),
    };
    let dims_of = |slot: &usize| {
        let carrier = anatomy.axes.carrier_at(graph, mix, crate::axes::relation::Slot::In(*slot))?;
        let rank = anatomy.axes.carriers()[carrier].shape.len();
        (0..rank).any(|a| anatomy.axes.classes_on((carrier, a)).contains(&group.leaf)).then_some(*slot)
    };
    let slot = slots.iter().find_map(dims_of).ok_or("the values have no dims of it")?;
    let v = group.operand(graph, facts, &anatomy.axes, Use { node: mix, slot }).ok_or("the values have no dims of it")?;
    fold::commutes_back_to(graph, facts, &Site { index: index.clone(), ..consumer.site.clone() }, &[mix])?;
    let v_from = fold::basis_sources(graph, facts, &v)?;
    let units = consumer.weight.units.iter().map(|f| f.and_then(|f| index[f])).collect();
    let weight = Source { units, ..consumer.weight.clone() };
    Ok(Pair::Values { v_from, x: Site { index: index.clone(), ..consumer.site.clone() }, weight })
}

/// Multiplies every basis into the weights. All or nothing for each group; returns what was left as it was, and why.
pub fn rotate(graph: &mut Graph, bases: &[(&Rotatable, &Basis)]) -> Vec<Refused> {
    let mut refused = Vec::new();
    for (rotatable, basis) in bases {
        match edits(graph, rotatable, basis) {
            Ok(edits) => edits.into_iter().for_each(|(v, tensor)| graph.set_constant(v, tensor)),
            Err(reason) => refused.push(Refused { group: rotatable.group.clone(), reason }),
        }
    }
    refused
}

fn edits(graph: &Graph, rotatable: &Rotatable, basis: &Basis) -> Result<BTreeMap<ValueId, Tensor>, String> {
    let sides: [(&[Source], &[Mat<f64>]); 2] = match &rotatable.pair {
        Pair::Logits { q_from, k_from, .. } => [(q_from, &basis.first), (k_from, &basis.second)],
        Pair::Values { v_from, weight, .. } => [(v_from, &basis.first), (std::slice::from_ref(weight), &basis.second)],
    };
    let mut edited: BTreeMap<ValueId, Tensor> = BTreeMap::new();
    for (sources, matrices) in sides {
        for source in sources {
            let name = || graph.value(source.constant).name();
            let tensor = match edited.remove(&source.constant) {
                Some(t) => t,
                None => graph.constant(source.constant).ok_or("a constant is missing")?,
            };
            if tensor.dtype != DType::F32 {
                return Err(format!("'{}' is {}", name(), tensor.dtype.name()));
            }
            let turned = turn::multiply(&tensor, source, rotatable.width, matrices);
            edited.insert(source.constant, turned.ok_or_else(|| format!("'{}' lacks dims of a head", name()))?);
        }
    }
    Ok(edited)
}
