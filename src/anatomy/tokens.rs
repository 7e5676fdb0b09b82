//! Token groups: where a sequence can be shortened.
//!
//! A site is the residual value before a block, gathered at constant positions. It is legal if every path from it to the outputs is
//! parallel in tokens, contracts tokens with tokens (attention), takes their mean, or selects tokens that always stay (class,
//! distillation, registers). The walk below carries, for each axis that holds tokens, which token stands at each position.

use crate::axes::depends_on_data;
use crate::axes::relation::{At, AxesCx, Blocks, Link, Relations, Slot};
use crate::graph::{Graph, Id, NodeId, SideMap, Use, ValueId};
use crate::infer::Facts;
use crate::ops;
use std::collections::{BTreeMap, BTreeSet};

/// A position that holds no token of the site: it always stays.
pub const FIXED: usize = usize::MAX;

/// A place where the sequence can be shortened.
#[derive(Clone, Debug)]
pub struct TokenSite {
    /// Attention layer that it stands before.
    pub layer: usize,
    /// The residual value.
    pub value: ValueId,
    /// Its token axis.
    pub axis: usize,
    /// Number of tokens.
    pub count: usize,
    /// Tokens that always stay.
    pub pinned: BTreeSet<usize>,
    /// Token at each position of every axis behind the site that holds tokens.
    pub reach: BTreeMap<(ValueId, usize), Vec<usize>>,
    /// Softmaxes behind the site, and the axis that they normalize, which holds tokens (keys).
    pub softmaxes: Vec<(NodeId, usize)>,
    /// Means over tokens.
    pub means: Vec<(NodeId, usize)>,
    /// Constants with a token axis.
    pub constants: Vec<(Use, usize, Vec<usize>)>,
    /// Values that are zero where a key is masked: what comes from a softmax until it is contracted.
    probabilities: BTreeSet<ValueId>,
}

/// Operators that keep a zero a zero, so that a masked key adds nothing behind them.
const KEEPS_ZERO: &[&str] = &[
    "Softmax",
    "Mul",
    "Div",
    "Cast",
    "CastLike",
    "Identity",
    "Dropout",
    "Reshape",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "MatMul",
    "Einsum",
    "Where",
    "IsNaN",
    "Split",
    "Slice",
    "Gather",
    "Concat",
    "Relu",
    "QuantizeLinear",
    "DequantizeLinear",
];

/// What a walk found, or the reason why the site is not legal.
type Walk = Result<TokenSite, String>;

struct Walker<'a> {
    graph: &'a Graph,
    facts: &'a Facts,
    depends: SideMap<ValueId, bool>,
    /// Relations of each node, where its operator has a rule.
    relations: BTreeMap<NodeId, Relations>,
}

/// Finds the site before each attention layer; `layers` are the logits and softmax nodes, from the input on.
///
/// Second list: layers without a site, with the reason.
pub(super) fn token_sites(
    graph: &Graph,
    facts: &Facts,
    layers: &[(NodeId, NodeId)],
) -> (Vec<TokenSite>, Vec<(usize, NodeId, String)>) {
    let depends = depends_on_data(graph);
    let walker = Walker { graph, facts, relations: relations_of(graph, facts), depends };
    let dominators = dominators(graph, &walker.depends);
    let (mut sites, mut refused) = (Vec::<TokenSite>::new(), Vec::new());
    for (layer, (logits, softmax)) in layers.iter().enumerate() {
        let mut reason = "no value before the block carries the whole sequence".to_string();
        let mut found = None;
        let mut at = dominators[*logits];
        while let (Some(id), None) = (at, &found) {
            let value = graph.node(id).output(0);
            for axis in value.map_or(0..0, |v| 0..facts.shape(v).map_or(0, <[_]>::len).min(2)) {
                let Some(v) = value.filter(|v| graph.value(*v).users().len() > 1) else { continue };
                match walker.walk(layer, v, axis) {
                    Ok(site) if site.softmaxes.iter().any(|(n, _)| n == softmax) => found = Some(site),
                    Ok(_) => {}
                    Err(r) => reason = r,
                }
            }
            at = dominators[id];
        }
        match found {
            Some(site) if sites.iter().any(|s| s.value == site.value) => {}
            // Sites follow each other along one sequence, so that a token that is gone stays gone.
            Some(site) if sites.last().is_some_and(|last| !continues(last, &site)) => {
                refused.push((layer, *softmax, "belongs to another sequence".to_string()));
            }
            Some(site) => sites.push(site),
            None => refused.push((layer, *softmax, reason)),
        }
    }
    (sites, refused)
}

/// Whether a later site stands on the sequence of an earlier one, with all of its tokens in order.
fn continues(earlier: &TokenSite, later: &TokenSite) -> bool {
    earlier.reach.get(&(later.value, later.axis)).is_some_and(|tokens| tokens.iter().copied().eq(0..earlier.count))
}

fn relations_of(graph: &Graph, facts: &Facts) -> BTreeMap<NodeId, Relations> {
    let mut all = BTreeMap::new();
    for (id, node) in graph.nodes() {
        let known = node.inputs().iter().chain(node.outputs()).flatten().all(|v| facts.shape(*v).is_some());
        if let (true, Some(ops::Axes::Rule(rule))) = (known, ops::lookup(node.domain(), node.op()).map(|r| &r.axes)) {
            let opset = graph.opset(node.domain()).unwrap_or(0);
            all.insert(id, rule(&AxesCx { graph, facts, node, id, opset }));
        }
    }
    all
}

/// The nearest node that every path from the graph inputs to a node passes.
fn dominators(graph: &Graph, depends: &SideMap<ValueId, bool>) -> SideMap<NodeId, Option<NodeId>> {
    let mut place = vec![0usize; graph.node_capacity()];
    let mut idom: SideMap<NodeId, Option<NodeId>> = SideMap::filled(graph.node_capacity(), None);
    for (i, (id, node)) in graph.nodes().enumerate() {
        place[id.index()] = i;
        let mut meet: Option<Option<NodeId>> = None;
        for v in node.inputs().iter().flatten().filter(|v| depends[**v]) {
            let source = graph.value(*v).producer().map(|(n, _)| n);
            meet = Some(match meet {
                None => source,
                Some(other) => nearest_common(&idom, &place, other, source),
            });
        }
        idom[id] = meet.flatten();
    }
    idom
}

fn nearest_common(
    idom: &SideMap<NodeId, Option<NodeId>>,
    place: &[usize],
    mut a: Option<NodeId>,
    mut b: Option<NodeId>,
) -> Option<NodeId> {
    while a != b {
        match (a, b) {
            (Some(x), Some(y)) if place[x.index()] > place[y.index()] => a = idom[x],
            (Some(_), Some(y)) => b = idom[y],
            _ => return None,
        }
    }
    a
}

impl Walker<'_> {
    fn walk(&self, layer: usize, value: ValueId, axis: usize) -> Walk {
        let count = self.facts.shape(value).and_then(|s| s[axis].size()).filter(|n| *n > 1).ok_or("its length is not known")?;
        let pinned = self.pinned_by_origin(value, axis, count);
        let mut site = TokenSite {
            layer,
            value,
            axis,
            count,
            pinned,
            reach: BTreeMap::from([((value, axis), (0..count).collect())]),
            softmaxes: Vec::new(),
            means: Vec::new(),
            constants: Vec::new(),
            probabilities: BTreeSet::new(),
        };
        let start = self.graph.value(value).producer().map(|(n, _)| n);
        let mut after = start.is_none();
        for (id, node) in self.graph.nodes() {
            if !after {
                after = Some(id) == start;
                continue;
            }
            let rank = |v: &ValueId| self.facts.shape(*v).map_or(0, <[_]>::len);
            let tagged = |v: &ValueId| (0..rank(v)).any(|a| site.reach.contains_key(&(*v, a)));
            if node.captures().iter().any(tagged) {
                return Err(format!("{} reads tokens inside a subgraph", self.graph.label(id)));
            }
            if node.inputs().iter().flatten().any(tagged) && !self.is_shape_only(id) {
                self.step(&mut site, id)?;
            }
        }
        for v in self.graph.outputs() {
            if site.reach.keys().any(|(x, _)| x == v) {
                return Err(format!("graph output '{}' has the token axis", self.graph.value(*v).name()));
            }
        }
        if site.pinned.len() >= count { Err("all tokens are read one by one".into()) } else { Ok(site) }
    }

    fn is_shape_only(&self, id: NodeId) -> bool {
        let node = self.graph.node(id);
        ops::lookup(node.domain(), node.op()).is_some_and(|r| matches!(r.axes, ops::Axes::ShapeOnly))
    }

    /// Tokens that were put into the sequence from constants: class, distillation, registers.
    fn pinned_by_origin(&self, value: ValueId, axis: usize, count: usize) -> BTreeSet<usize> {
        let mut pinned = BTreeSet::new();
        let mut stack = vec![value];
        let mut seen = BTreeSet::new();
        while let Some(v) = stack.pop() {
            let Some((id, _)) = self.graph.value(v).producer() else { continue };
            let same_length = self.facts.shape(v).and_then(|s| s.get(axis)).is_some_and(|d| d.size() == Some(count));
            if !seen.insert(id) || !same_length || !self.depends[v] {
                continue;
            }
            let node = self.graph.node(id);
            let Some(relations) = self.relations.get(&id) else { continue };
            for link in &relations.links {
                if let Link::Select { from: (Slot::In(i), _), to: (Slot::Out(0), to), index, at } = link
                    && *to == axis
                    && node.op() == "Concat"
                    && node.input(*i).is_some_and(|x| !self.depends[x])
                {
                    pinned.extend(*at..at + index.len());
                }
            }
            stack.extend(node.inputs().iter().flatten());
        }
        pinned
    }

    /// Carries tokens over one node.
    fn step(&self, site: &mut TokenSite, id: NodeId) -> Result<(), String> {
        let node = self.graph.node(id);
        let label = || self.graph.label(id);
        let relations = self.relations.get(&id).ok_or_else(|| format!("{} has no rule for tokens", label()))?;
        let mut tags: BTreeMap<At, Vec<usize>> = BTreeMap::new();
        for (slot, v) in node.inputs().iter().enumerate() {
            let Some(v) = v else { continue };
            for axis in 0..self.facts.shape(*v).map_or(0, <[_]>::len) {
                if let Some(tokens) = site.reach.get(&(*v, axis)) {
                    tags.insert((Slot::In(slot), axis), tokens.clone());
                }
            }
        }
        let masked = node.inputs().iter().flatten().any(|v| site.probabilities.contains(v));
        if masked && !(node.domain().is_empty() && KEEPS_ZERO.contains(&node.op())) {
            return Err(format!("{} adds to what a masked key gives", label()));
        }
        for _ in 0..3 {
            for link in &relations.links {
                self.follow(site, id, link, &mut tags)?;
            }
        }
        let contracts = relations.links.iter().any(|l| matches!(l, Link::Contract(a, _) if tags.contains_key(a)));
        if contracts && !masked {
            return Err(format!("{} sums over tokens outside an attention", label()));
        }
        if (masked && !contracts) || node.op() == "Softmax" {
            site.probabilities.extend(node.outputs().iter().flatten());
        }
        for ((slot, axis), tokens) in tags {
            if let (Slot::Out(o), true) = (slot, tokens.iter().any(|t| *t != FIXED && !site.pinned.contains(t)))
                && let Some(v) = node.output(o)
            {
                site.reach.insert((v, axis), tokens);
            }
        }
        Ok(())
    }

    fn follow(&self, site: &mut TokenSite, id: NodeId, link: &Link, tags: &mut BTreeMap<At, Vec<usize>>) -> Result<(), String> {
        match link {
            Link::Same(a, b) => {
                self.equal(site, id, *a, *b, tags)?;
                self.equal(site, id, *b, *a, tags)
            }
            Link::Contract(a, b) => {
                self.equal(site, id, *a, *b, tags)?;
                self.equal(site, id, *b, *a, tags)
            }
            Link::Sum(a) if tags.contains_key(a) => Err(format!("{} sums over tokens", self.graph.label(id))),
            Link::Sum(_) | Link::Unread(_) => Ok(()),
            Link::Vanish(a, reason) | Link::Blocks(a, Blocks { else_barrier: Some(reason), .. }) if tags.contains_key(a) => {
                Err(format!("{}: {reason}", self.graph.label(id)))
            }
            Link::Vanish(..) | Link::Blocks(..) => Ok(()),
            Link::Regroup(a, b) => self.regroup(site, id, a, b, tags),
            Link::Select { from, to, index, at } => self.select(site, id, *from, *to, index, *at, tags),
            Link::Barrier(a, reason) if tags.contains_key(a) => self.barrier(site, id, *a, reason),
            Link::Barrier(..) => Ok(()),
        }
    }

    /// `b` holds what `a` holds.
    fn equal(&self, site: &mut TokenSite, id: NodeId, a: At, b: At, tags: &mut BTreeMap<At, Vec<usize>>) -> Result<(), String> {
        let Some(tokens) = tags.get(&a).cloned() else { return Ok(()) };
        match (tags.get(&b), b.0) {
            (Some(known), _) if *known == tokens => Ok(()),
            (Some(_), _) => Err(format!("{} combines different selections of tokens", self.graph.label(id))),
            (None, Slot::In(slot)) => {
                let v = self.graph.node(id).input(slot).ok_or("an input is missing")?;
                if self.depends[v] {
                    return Err(format!("{} meets a sequence that is not shortened", self.graph.label(id)));
                }
                site.constants.push((Use { node: id, slot }, b.1, tokens.clone()));
                tags.insert(b, tokens);
                Ok(())
            }
            (None, _) => {
                tags.insert(b, tokens);
                Ok(())
            }
        }
    }

    fn regroup(
        &self,
        site: &mut TokenSite,
        id: NodeId,
        a: &(Slot, Vec<usize>),
        b: &(Slot, Vec<usize>),
        tags: &mut BTreeMap<At, Vec<usize>>,
    ) -> Result<(), String> {
        let touched = |(slot, axes): &(Slot, Vec<usize>)| axes.iter().any(|x| tags.contains_key(&(*slot, *x)));
        if !touched(a) && !touched(b) {
            return Ok(());
        }
        match (a.1.as_slice(), b.1.as_slice()) {
            ([x], [y]) => self.equal(site, id, (a.0, *x), (b.0, *y), tags),
            _ => Err(format!("{} regroups tokens (windows or a grid)", self.graph.label(id))),
        }
    }

    #[allow(clippy::too_many_arguments, reason = "the fields of one relation")]
    fn select(
        &self,
        site: &mut TokenSite,
        id: NodeId,
        from: At,
        to: At,
        index: &[usize],
        at: usize,
        tags: &mut BTreeMap<At, Vec<usize>>,
    ) -> Result<(), String> {
        let Some(tokens) = tags.get(&from).cloned() else { return Ok(()) };
        let picked: Vec<usize> = index.iter().map(|i| tokens[*i]).collect();
        let whole = picked.len() == tokens.len();
        if !whole && (picked.len() == 1 || picked.iter().all(|t| *t == FIXED || site.pinned.contains(t))) {
            site.pinned.extend(picked.iter().filter(|t| **t != FIXED));
            return Ok(());
        }
        let missing_is_pinned = tokens.iter().all(|t| picked.contains(t) || *t == FIXED || site.pinned.contains(t));
        if !whole && !missing_is_pinned {
            return Err(format!("{} selects some of the tokens", self.graph.label(id)));
        }
        let Slot::Out(o) = to.0 else { return Err(format!("{} selects tokens inside itself", self.graph.label(id))) };
        let out = self.graph.node(id).output(o).ok_or("an output is missing")?;
        let size = self.facts.shape(out).and_then(|s| s[to.1].size()).ok_or("a length is not known")?;
        let list = tags.entry(to).or_insert_with(|| vec![FIXED; size]);
        list[at..at + picked.len()].copy_from_slice(&picked);
        Ok(())
    }

    fn barrier(&self, site: &mut TokenSite, id: NodeId, at: At, reason: &str) -> Result<(), String> {
        let node = self.graph.node(id);
        let mut record = |list: fn(&mut TokenSite) -> &mut Vec<(NodeId, usize)>| {
            if !list(site).contains(&(id, at.1)) {
                list(site).push((id, at.1));
            }
        };
        match (node.op(), at.0) {
            ("Softmax", _) => record(|s| &mut s.softmaxes),
            ("ReduceMean", Slot::In(0)) => record(|s| &mut s.means),
            _ => return Err(format!("{}: {reason}", self.graph.label(id))),
        }
        Ok(())
    }
}
