//! Anatomy -> gates: every group with its sites, and every place where the sequence can be shortened.

use super::gate::{GateGroup, GateSite};
use super::token::{TokenGate, TokenSite};
use crate::anatomy::{self, Anatomy, Kind, Stretch};
use crate::graph::{Graph, NodeId, Use};
use crate::infer::Facts;

/// Gates of all groups of an anatomy; tokens that always stay, and positions that hold none, are not gated.
pub fn gates_of(graph: &Graph, facts: &Facts, anatomy: &Anatomy) -> (Vec<GateGroup>, Vec<TokenGate>) {
    let (mut groups, mut tokens) = (Vec::new(), Vec::new());
    for group in &anatomy.groups {
        let (id, units) = (group.id.clone(), group.units());
        if group.kind != Kind::Token {
            let sites = group.sites.iter().map(gate_site).collect();
            groups.push(GateGroup { id, kind: group.kind.as_str().to_string(), units, sites });
        } else if let Some(site) = anatomy.tokens.sites.iter().find(|s| s.layer == group.layer) {
            tokens.push(TokenGate { id, units, sites: token_sites(graph, facts, anatomy, site) });
        }
    }
    (groups, tokens)
}

fn gate_site(site: &anatomy::Site) -> GateSite {
    let index = site.index.iter().map(|u| u.and_then(|u| u32::try_from(u).ok())).collect();
    GateSite { value_use: site.at, axes: site.axes.clone(), index }
}

fn token_sites(graph: &Graph, facts: &Facts, anatomy: &Anatomy, site: &anatomy::TokenSite) -> Vec<TokenSite> {
    let input = |node: NodeId| graph.node(node).input(0);
    let gated = |t: &usize| if *t == anatomy::FIXED || site.pinned.contains(t) { None } else { u32::try_from(*t).ok() };
    let index = |stretch: &Stretch, (node, axis): &(NodeId, usize)| -> Option<Vec<Option<u32>>> {
        Some(stretch.reach.get(&(input(*node)?, *axis))?.iter().map(gated).collect())
    };
    let behind = || anatomy.tokens.behind(site);
    let keys = behind().flat_map(|s| s.softmaxes.iter().map(move |at| (s, at))).filter_map(|(stretch, at)| {
        let index = index(stretch, at)?;
        Some(TokenSite::Keys { at: Use { node: at.0, slot: 0 }, axis: at.1, index })
    });
    let means = behind().flat_map(|s| s.means.iter().map(move |at| (s, at))).filter_map(|(stretch, at)| {
        let index = index(stretch, at)?;
        Some(TokenSite::Mean { node: at.0, axis: at.1, index })
    });
    let fused = behind().flat_map(|s| s.fused.iter().map(move |f| (s, f))).filter_map(|(stretch, f)| {
        let rank = graph.node(f.node).input(f.bias).and_then(|v| facts.shape(v)).map_or(1, <[_]>::len);
        let index = stretch.reach.get(&f.keys)?.iter().map(gated).collect();
        Some(TokenSite::Keys { at: Use { node: f.node, slot: f.bias }, axis: rank.saturating_sub(1), index })
    });
    keys.chain(means).chain(fused).collect()
}
