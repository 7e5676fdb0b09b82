//! Which gates a search has, and which of them are one.

use super::config::{Config, Tie};
use crate::anatomy::{Anatomy, Kind};
use crate::graph::Graph;
use crate::infer::Facts;
use crate::supernet::{self, GateGroup, TokenGate};

/// The gates of these kinds, with their places.
pub fn gates(graph: &Graph, facts: &Facts, anatomy: &Anatomy, kinds: &[Kind]) -> (Vec<GateGroup>, Vec<TokenGate>) {
    let (mut groups, mut tokens) = supernet::gates_of(graph, facts, anatomy);
    groups.retain(|g| kinds.iter().any(|k| k.as_str() == g.kind));
    if !kinds.contains(&Kind::Token) {
        tokens.clear();
    }
    (groups, tokens)
}

/// Sets of groups that share a gate.
pub(super) fn tied(groups: &[GateGroup], config: &Config) -> Vec<Vec<String>> {
    if config.tie == Tie::None { Vec::new() } else { tied_groups(groups) }
}

/// `qk` and `vo` of each layer, as sets that share a gate.
pub fn tied_groups(groups: &[GateGroup]) -> Vec<Vec<String>> {
    let layer = |g: &GateGroup| g.id.split_once('.').map(|(_, rest)| rest.to_string());
    let of = |kind: Kind| groups.iter().filter(move |g| g.kind == kind.as_str());
    let pairs = of(Kind::Qk).filter_map(|qk| {
        let vo = of(Kind::Vo).find(|vo| layer(vo) == layer(qk))?;
        Some(vec![qk.id.clone(), vo.id.clone()])
    });
    pairs.collect()
}
