//! Shortening sequences: a Gather of constant positions on the residual before a block, and everything with a token axis behind it.

use super::constants::{self, Keeps};
use super::cutset::CutError;
use super::refit::{RefitCx, RefitError};
use super::shapes;
use super::{Cloned, TensorCut};
use crate::anatomy::{Anatomy, FIXED, Kind, TokenSite};
use crate::graph::{Graph, Use, ValueId};
use crate::infer::Facts;
use crate::ops::{self, Refit};
use crate::plan::Kept;
use std::collections::{BTreeMap, BTreeSet};

/// Tokens that stay at each site that loses some, in the order of layers: a token that is gone stays gone.
pub(super) fn kept_tokens<'a>(anatomy: &'a Anatomy, kept: &Kept) -> Vec<(&'a TokenSite, BTreeSet<usize>)> {
    let mut out: Vec<(&TokenSite, BTreeSet<usize>)> = Vec::new();
    for site in &anatomy.tokens.sites {
        let group = anatomy.groups.iter().find(|g| g.kind == Kind::Token && g.layer == site.layer);
        let Some(units) = group.and_then(|g| kept.get(&g.id)) else { continue };
        let mut stays: BTreeSet<usize> = units.iter().copied().chain(site.pinned.iter().copied()).collect();
        if let Some((_, before)) = out.last() {
            stays.retain(|t| before.contains(t));
        }
        let had = out.last().map_or(site.count, |(_, b)| b.len());
        if stays.len() < had {
            out.push((site, stays));
        }
    }
    out
}

/// The sites in the graph from which units were cut, by the value that is shortened. Where a layer has no attention any more, its
/// tokens go at the next site.
pub(super) fn find_again<'a>(
    before: &Anatomy,
    after: &'a Anatomy,
    sites: &[(&TokenSite, BTreeSet<usize>)],
) -> Result<Vec<(&'a TokenSite, BTreeSet<usize>)>, CutError> {
    let place = |site: &TokenSite| before.tokens.sites.iter().position(|s| s.value == site.value);
    let mut found: Vec<(&TokenSite, BTreeSet<usize>)> = Vec::new();
    for site in &after.tokens.sites {
        let Some(at) = place(site) else { continue };
        let due = sites.iter().rev().find(|(s, _)| before.tokens.sites[..=at].iter().any(|b| b.value == s.value));
        let had = found.last().map_or(site.count, |(_, b)| b.len());
        if let Some((_, stays)) = due.filter(|(s, stays)| s.count == site.count && stays.len() < had) {
            found.push((site, stays.clone()));
        }
    }
    match sites.last() {
        Some((last, stays)) if found.last().is_none_or(|(_, s)| s != stays) => {
            let group = before.groups.iter().find(|g| g.kind == Kind::Token && g.layer == last.layer);
            Err(CutError::NoSite(group.map(|g| g.id.clone()).unwrap_or_default()))
        }
        _ => Ok(found),
    }
}

/// The sites alone.
pub(super) fn sites_of<'a>(sites: &[(&'a TokenSite, BTreeSet<usize>)]) -> Vec<&'a TokenSite> {
    sites.iter().map(|(site, _)| *site).collect()
}

/// Shortens the sequence at every site that loses tokens.
pub(super) fn cut(
    graph: &Graph,
    facts: &Facts,
    anatomy: &Anatomy,
    sites: &[(&TokenSite, BTreeSet<usize>)],
) -> Result<(Graph, Vec<TensorCut>, Vec<Cloned>), RefitError> {
    let mut out = graph.clone();
    // Which positions stay of each axis that holds tokens: by the last site before it.
    let mut stays: BTreeMap<(ValueId, usize), Vec<usize>> = BTreeMap::new();
    let mut needs: BTreeMap<ValueId, BTreeMap<Use, Keeps>> = BTreeMap::new();
    for (number, stretch) in anatomy.tokens.last_before(&sites_of(sites)) {
        let kept = &sites[number].1;
        let positions = |list: &[usize]| -> Vec<usize> {
            (0..list.len()).filter(|i| list[*i] == FIXED || kept.contains(&list[*i])).collect()
        };
        for (at, list) in &stretch.reach {
            stays.entry(*at).or_insert_with(|| positions(list));
        }
        for (at, axis, list) in &stretch.constants {
            if let Some(v) = graph.node(at.node).input(at.slot) {
                needs.entry(v).or_default().entry(*at).or_default().entry(*axis).or_insert_with(|| positions(list));
            }
        }
    }
    let mut patches = Vec::new();
    for (id, node) in graph.nodes() {
        let values = || node.inputs().iter().chain(node.outputs()).flatten();
        if !values().any(|v| stays.range((*v, 0)..=(*v, usize::MAX)).next().is_some()) {
            continue;
        }
        let Some(Refit::Rule(rule)) = ops::rule_of(graph, node).map(|r| &r.refit) else { continue };
        let look = |v: ValueId, axis: usize| stays.get(&(v, axis)).map(Vec::as_slice);
        let mut cx = RefitCx {
            graph: &mut out,
            original: graph,
            origin: id,
            id,
            facts,
            kept: &look,
            patches: Vec::new(),
            edits: Vec::new(),
        };
        rule(&mut cx)?;
        patches.extend(std::mem::take(&mut cx.patches).into_iter().map(|(slot, entries)| (Use { node: id, slot }, entries)));
    }
    for (at, entries) in patches {
        shapes::patch(&mut out, facts, at, &entries);
    }
    freeze_tables(&mut out, graph, facts, needs.keys(), &|v| stays.range((v, 0)..=(v, usize::MAX)).next().is_some());
    let needs = needs.into_iter().map(|(v, readers)| (v, readers_of(graph, v, readers))).collect();
    let (cuts, cloned) = constants::cut(&mut out, needs);
    gather_sites(&mut out, sites);
    out.sort();
    Ok((out, cuts, cloned))
}

/// Tables that are gathered stay what they were: where one is computed from the length of the sequence (relative positions of a range of
/// that length), the numbers that it is computed from are frozen.
fn freeze_tables<'a>(
    out: &mut Graph,
    graph: &Graph,
    facts: &Facts,
    tables: impl Iterator<Item = &'a ValueId>,
    is_shortened: &dyn Fn(ValueId) -> bool,
) {
    let mut follows: BTreeSet<ValueId> = BTreeSet::new();
    for (_, node) in graph.nodes() {
        let reads_length = || node.inputs().iter().flatten().any(|v| is_shortened(*v));
        let inside = || node.inputs().iter().flatten().any(|v| follows.contains(v));
        let shape_only = ops::rule_of(graph, node).is_some_and(|r| matches!(r.axes, ops::Axes::ShapeOnly));
        if if shape_only { reads_length() } else { inside() } {
            follows.extend(node.outputs().iter().flatten());
        }
    }
    let mut stack: Vec<ValueId> = tables.copied().collect();
    let mut seen: BTreeSet<ValueId> = stack.iter().copied().collect();
    while let Some((id, _)) = stack.pop().and_then(|v| graph.value(v).producer()) {
        for (slot, v) in graph.node(id).inputs().iter().enumerate() {
            let Some(v) = v.filter(|v| follows.contains(v)) else { continue };
            match shapes::known_integers(facts, v) {
                Some(constant) => {
                    let frozen = out.add_initializer(&format!("{}_frozen", graph.value(v).name()), constant);
                    out.set_input(Use { node: id, slot }, Some(frozen));
                }
                None if seen.insert(v) => stack.push(v),
                None => {}
            }
        }
    }
}

/// All readers of a constant: those that need it whole, too.
fn readers_of(graph: &Graph, v: ValueId, mut needs: BTreeMap<Use, Keeps>) -> Vec<(Use, Keeps)> {
    let users = graph.value(v).users().iter().filter(|u| u.slot < graph.node(u.node).inputs().len());
    users.map(|u| (*u, needs.remove(u).unwrap_or_default())).collect()
}

/// Puts the Gathers in: each picks from what the one before it left.
fn gather_sites(out: &mut Graph, sites: &[(&TokenSite, BTreeSet<usize>)]) {
    let mut before: Option<&BTreeSet<usize>> = None;
    for (site, kept) in sites {
        let there: Vec<usize> = match before {
            None => (0..site.count).collect(),
            Some(b) => b.iter().copied().collect(),
        };
        let positions: Vec<usize> = (0..there.len()).filter(|i| kept.contains(&there[*i])).collect();
        for value in std::iter::once(&site.value).chain(&site.beside) {
            let users = out.value(*value).users().to_vec();
            let gathered = shapes::gather(out, *value, site.axis, &positions, "cut");
            for at in users.iter().filter(|at| at.slot < out.node(at.node).inputs().len()).collect::<Vec<_>>() {
                out.set_input(*at, Some(gathered));
            }
        }
        before = Some(kept);
    }
}
