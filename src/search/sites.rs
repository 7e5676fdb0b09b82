//! Anatomy -> the places of gates, as the supernet takes them.
//!
//! Example: group `qk.3` of 3 heads x 64 becomes a gate of 192 units on the operand q; the token site before layer 3 becomes a gate
//! of 197 units on the keys of layers 3 to 11, without the class token, which always stays.

use super::config::{Config, Tie};
use crate::anatomy::{Anatomy, FIXED, Kind, TokenSite};
use crate::graph::{Graph, Use};
use crate::supernet::{self, GateGroup, GateSite, TokenGate};

/// The groups of `kinds` (tokens apart) with the places of their gates.
pub fn gate_groups(anatomy: &Anatomy, kinds: &[Kind]) -> Vec<GateGroup> {
    let wanted = anatomy.groups.iter().filter(|g| g.kind != Kind::Token && kinds.contains(&g.kind));
    wanted
        .map(|g| GateGroup {
            id: g.id.clone(),
            kind: g.kind.as_str().to_string(),
            units: g.units(),
            sites: g
                .sites
                .iter()
                .map(|s| GateSite {
                    value_use: s.at,
                    axes: s.axes.clone(),
                    index: s.index.iter().map(|unit| unit.and_then(|u| u32::try_from(u).ok())).collect(),
                })
                .collect(),
        })
        .collect()
}

/// The token groups, where `kinds` has tokens.
pub fn token_gates(graph: &Graph, anatomy: &Anatomy, kinds: &[Kind]) -> Vec<TokenGate> {
    if !kinds.contains(&Kind::Token) {
        return Vec::new();
    }
    let named = anatomy.tokens.iter().filter_map(|site| {
        let group = anatomy.groups.iter().find(|g| g.kind == Kind::Token && g.layer == site.layer)?;
        Some(TokenGate { id: group.id.clone(), units: site.count, sites: token_sites(graph, site) })
    });
    named.collect()
}

fn token_sites(graph: &Graph, site: &TokenSite) -> Vec<supernet::TokenSite> {
    let index_of = |at: Use, axis: usize| -> Option<Vec<Option<u32>>> {
        let value = graph.node(at.node).input(at.slot)?;
        let tokens = site.reach.get(&(value, axis))?;
        let unit = |t: &usize| (*t != FIXED && !site.pinned.contains(t)).then(|| u32::try_from(*t).ok()).flatten();
        Some(tokens.iter().map(unit).collect())
    };
    let keys = site.softmaxes.iter().filter_map(|(node, axis)| {
        let at = Use { node: *node, slot: 0 };
        Some(supernet::TokenSite::Keys { at, axis: *axis, index: index_of(at, *axis)? })
    });
    let means = site.means.iter().filter_map(|(node, axis)| {
        let at = Use { node: *node, slot: 0 };
        Some(supernet::TokenSite::Mean { node: *node, axis: *axis, index: index_of(at, *axis)? })
    });
    keys.chain(means).collect()
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
