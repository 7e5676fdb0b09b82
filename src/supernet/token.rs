//! Token gates: masks on the key logits of attention, and on pooled means.
//!
//! A token that is cut is gone for every query, so its gate g enters the softmax as `log(max(g, 1e-6))` on the key's logits,
//! and as -1e4 at a hard 0, where the token then has no weight at all. A mean over tokens becomes the mean weighted by g.
//! Multiplying a normalized input by g instead would not be removal: the key would keep its share of the softmax.

use super::SupernetError;
use super::gate::Gates;
use super::spread::{Fill, Place, Spread};
use crate::graph::build::Builder;
use crate::graph::{DType, Graph, NodeId, Use, ValueId};
use crate::infer::Facts;
use std::collections::BTreeMap;

/// Where a token gate acts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenSite {
    /// On key logits, behind any mask and before the softmax.
    Keys {
        /// The softmax and its input.
        at: Use,
        /// The key axis of the logits.
        axis: usize,
        /// The token at each position of that axis; `None` where it cannot be cut.
        index: Vec<Option<u32>>,
    },
    /// On a mean over tokens.
    Mean {
        /// The node that takes the mean of its input 0.
        node: NodeId,
        /// The token axis of its input.
        axis: usize,
        /// The token at each position of that axis; `None` where it cannot be cut.
        index: Vec<Option<u32>>,
    },
}

/// A token group with the places of its gate. A token that a layer drops is masked in all layers behind it too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenGate {
    /// Its id.
    pub id: String,
    /// Number of tokens.
    pub units: usize,
    /// Where it acts.
    pub sites: Vec<TokenSite>,
}

/// log(g) is not taken below this.
const LOG_FLOOR: f32 = 1e-6;
/// The logit of a token that is cut.
const HARD_ZERO: f32 = -1e4;

/// Adds all token gates to their sites. Several gates of one site are combined first, since they are small.
pub(super) fn insert(
    graph: &mut Graph,
    model: (&Graph, &Facts),
    tokens: &[TokenGate],
    gates: &Gates,
) -> Result<(), SupernetError> {
    let mut logits: BTreeMap<Use, ValueId> = BTreeMap::new();
    let mut means: BTreeMap<NodeId, Vec<(ValueId, usize)>> = BTreeMap::new();
    for token in tokens {
        let gate = gates.of(&token.id);
        let mut mask = None;
        for site in &token.sites {
            match site {
                TokenSite::Keys { at, axis, index } => {
                    let mask = *mask.get_or_insert_with(|| log_mask(graph, gate));
                    let term = spread(graph, model, gates, token, (*at, *axis, index), mask, Fill::Zero)?.value;
                    let sum = logits.get(at).map(|old| Builder::new(graph, "token.").add(*old, term));
                    logits.insert(*at, sum.unwrap_or(term));
                }
                TokenSite::Mean { node, axis, index } => {
                    let at = Use { node: *node, slot: 0 };
                    let factor = spread(graph, model, gates, token, (at, *axis, index), gate, Fill::One)?.value;
                    means.entry(*node).or_default().push((factor, *axis));
                }
            }
        }
    }
    for (at, mask) in logits {
        let operand = graph.node(at.node).input(at.slot).expect("spread looked at it");
        let masked = Builder::new(graph, "token.").add(operand, mask);
        graph.set_input(at, Some(masked));
    }
    for (node, factors) in means {
        weigh_mean(graph, model.1, node, &factors);
    }
    Ok(())
}

/// `log(max(g, 1e-6))`, and -1e4 where g is not above 0.
fn log_mask(graph: &mut Graph, gate: ValueId) -> ValueId {
    let mut b = Builder::new(graph, "token.");
    let (floor, zero) = (b.scalar(DType::F32, LOG_FLOOR), b.scalar(DType::F32, 0.0));
    let hard = b.scalar(DType::F32, HARD_ZERO);
    let positive = b.op("Max", &[gate, floor], vec![]);
    let log = b.op("Log", &[positive], vec![]);
    let kept = b.op("Greater", &[gate, zero], vec![]);
    b.op("Where", &[kept, log, hard], vec![])
}

fn spread(
    graph: &mut Graph,
    model: (&Graph, &Facts),
    gates: &Gates,
    token: &TokenGate,
    (at, axis, index): (Use, usize, &[Option<u32>]),
    value: ValueId,
    fill: Fill,
) -> Result<Spread, SupernetError> {
    let (model, facts) = model;
    let error = |graph: &Graph, reason| SupernetError::Site { group: token.id.clone(), node: graph.label(at.node), reason };
    let operand = graph.node(at.node).input(at.slot);
    let Some((operand, shape)) = operand.and_then(|v| Some((v, facts.shape(v)?))) else {
        return Err(error(graph, format!("the rank of input {} is unknown", at.slot)));
    };
    let batch = gates.batch_of_gates();
    let place = Place { model, facts, operand, shape, axes: &[axis], index, units: token.units, batch };
    let mut b = Builder::new(graph, "token.");
    let spread = place.spread(&mut b, value, fill);
    match (spread, facts.get(operand).dtype) {
        (Ok(s), Some(dtype)) if s.split.is_none() && dtype != DType::F32 => Ok(Spread { value: b.cast(s.value, dtype), ..s }),
        (spread, _) => spread,
    }
    .map_err(|reason| error(graph, reason))
    .and_then(|s| match s.split {
        None => Ok(s),
        Some(_) => Err(error(graph, format!("axis {axis} of {shape:?} does not have {} positions", index.len()))),
    })
}

/// `mean(x)` over tokens becomes `mean(x g) * (n / sum g)`, which is `sum(x g) / sum g`.
fn weigh_mean(graph: &mut Graph, facts: &Facts, node: NodeId, factors: &[(ValueId, usize)]) {
    let at = Use { node, slot: 0 };
    let input = graph.node(node).input(0).expect("spread looked at it");
    let output = graph.node(node).output(0).expect("a mean has an output");
    let axis = factors[0].1;
    let rank = facts.get(input).rank().expect("spread looked at it");
    let out_rank = facts.get(output).rank().unwrap_or(rank);
    let readers = graph.value(output).users().to_vec();
    let is_output = graph.outputs().contains(&output);
    let mut b = Builder::new(graph, "token.");
    let weight = factors.iter().map(|f| f.0).reduce(|a, f| b.mul(a, f)).expect("a site has a gate");
    let weighted = b.mul(input, weight);
    // The weight's shape ends at the operand's last axis, so its token axis counted from the end is the operand's.
    let from_end = axis as i64 - rank as i64;
    let mean = b.reduce_mean(weight, &[from_end], true);
    let scale = if out_rank < rank { b.squeeze(mean, &[from_end]) } else { mean };
    b.graph.set_input(at, Some(weighted));
    let scaled = b.div(output, scale);
    for reader in readers {
        b.graph.set_input(reader, Some(scaled));
    }
    if is_output {
        b.graph.move_output(output, scaled);
    }
}
