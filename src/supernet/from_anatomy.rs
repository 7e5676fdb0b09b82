//! Anatomy -> gates: every group with its sites, and every place where the sequence can be shortened.

use super::gate::{GateGroup, GateSite};
use super::token::{TokenGate, TokenSite};
use crate::anatomy::{self, Anatomy, Kind};
use crate::graph::{Graph, Use, ValueId};

/// Gates of all groups of an anatomy; tokens that always stay, and positions that hold none, are not gated.
pub fn gates_of(graph: &Graph, anatomy: &Anatomy) -> (Vec<GateGroup>, Vec<TokenGate>) {
    let (mut groups, mut tokens) = (Vec::new(), Vec::new());
    for group in &anatomy.groups {
        let (id, units) = (group.id.clone(), group.units());
        if group.kind != Kind::Token {
            let sites = group.sites.iter().map(gate_site).collect();
            groups.push(GateGroup { id, kind: group.kind.as_str().to_string(), units, sites });
        } else if let Some(site) = anatomy.tokens.iter().find(|s| s.layer == group.layer) {
            tokens.push(TokenGate { id, units, sites: token_sites(graph, site) });
        }
    }
    (groups, tokens)
}

fn gate_site(site: &anatomy::Site) -> GateSite {
    let index = site.index.iter().map(|u| u.and_then(|u| u32::try_from(u).ok())).collect();
    GateSite { value_use: site.at, axes: site.axes.clone(), index }
}

fn token_sites(graph: &Graph, site: &anatomy::TokenSite) -> Vec<TokenSite> {
    let index = |value: Option<ValueId>, axis: usize| -> Option<Vec<Option<u32>>> {
        let gated = |t: &usize| if *t == anatomy::FIXED || site.pinned.contains(t) { None } else { u32::try_from(*t).ok() };
        Some(site.reach.get(&(value?, axis))?.iter().map(gated).collect())
    };
    let keys = site.softmaxes.iter().filter_map(|(node, axis)| {
        let index = index(graph.node(*node).input(0), *axis)?;
        Some(TokenSite::Keys { at: Use { node: *node, slot: 0 }, axis: *axis, index })
    });
    let means = site.means.iter().filter_map(|(node, axis)| {
        let index = index(graph.node(*node).input(0), *axis)?;
        Some(TokenSite::Mean { node: *node, axis: *axis, index })
    });
    keys.chain(means).collect()
}
