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
use std::rc::Rc;

/// A position that holds no token of the site: it always stays.
pub const FIXED: usize = usize::MAX;

/// Axes of a value that may be those of a sequence: batch and tokens, in either order.
const SITE_AXES: usize = 2;

/// A place where the sequence can be shortened.
#[derive(Clone, Debug)]
pub struct TokenSite {
    /// Attention layer that it stands before.
    pub layer: usize,
    /// The residual value.
    pub value: ValueId,
    /// Other outputs of the node that makes it, which hold the same tokens on the same axis (a sum beside its normalization).
    pub beside: Vec<ValueId>,
    /// Its token axis.
    pub axis: usize,
    /// Number of tokens.
    pub count: usize,
    /// Tokens that always stay.
    pub pinned: BTreeSet<usize>,
    /// Number of the stretch that begins here; [`TokenSites::behind`] gives all that lies behind.
    pub stretch: usize,
}

/// A fused attention whose keys are tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FusedKeys {
    /// The node.
    pub node: NodeId,
    /// The value with the keys, and its token axis.
    pub keys: (ValueId, usize),
    /// The same of the queries, whose number is known.
    pub queries: (ValueId, usize),
    /// The input that is added to the logits `[.., queries, keys]`.
    pub bias: usize,
}

/// What tokens pass from one value on: to the outputs, or to a value from which another stretch begins. Sites of a deep model
/// share what lies behind all of them.
#[derive(Clone, Debug, Default)]
pub struct Stretch {
    /// Token at each position of every axis that holds tokens.
    pub reach: BTreeMap<(ValueId, usize), Vec<usize>>,
    /// Softmaxes, and the axis that they normalize, which holds tokens (keys).
    pub softmaxes: Vec<(NodeId, usize)>,
    /// Operators that compute the whole of attention, over keys that are tokens.
    pub fused: Vec<FusedKeys>,
    /// Means over tokens.
    pub means: Vec<(NodeId, usize)>,
    /// Constants with a token axis.
    pub constants: Vec<(Use, usize, Vec<usize>)>,
    /// The stretch into which all tokens go on, in their order.
    next: Option<usize>,
}

/// All places where the sequence can be shortened, from the input on.
#[derive(Clone, Debug, Default)]
pub struct TokenSites {
    /// The sites.
    pub sites: Vec<TokenSite>,
    stretches: Vec<Stretch>,
}

impl TokenSites {
    /// Everything behind a site, nearest first.
    pub fn behind(&self, site: &TokenSite) -> impl Iterator<Item = &Stretch> {
        chain(&self.stretches, site.stretch)
    }

    /// All stretches.
    pub fn all(&self) -> impl Iterator<Item = &Stretch> {
        self.stretches.iter()
    }

    /// Every stretch behind some of `sites` (given from the input on), once, with the place in the list of the last site before it;
    /// later ones first. A value that occurs in several is behind the first of them.
    pub fn last_before(&self, sites: &[&TokenSite]) -> Vec<(usize, &Stretch)> {
        let mut seen = vec![false; self.stretches.len()];
        let mut out = Vec::new();
        for (number, site) in sites.iter().enumerate().rev() {
            let mut at = Some(site.stretch);
            while let Some(stretch) = at.filter(|s| !std::mem::replace(&mut seen[*s], true)) {
                out.push((number, &self.stretches[stretch]));
                at = self.stretches[stretch].next;
            }
        }
        out
    }
}

fn chain(stretches: &[Stretch], first: usize) -> impl Iterator<Item = &Stretch> {
    std::iter::successors(stretches.get(first), |s| s.next.and_then(|n| stretches.get(n)))
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

/// The beginning of a stretch: a value and its token axis.
type Start = (ValueId, usize);

/// What a walk found: the tokens that always stay behind it, and its stretch; or the reason why it is not legal.
type Walk = Result<(BTreeSet<usize>, usize), String>;

/// A walk under way.
struct Path {
    pinned: BTreeSet<usize>,
    stretch: Stretch,
    /// Values that are zero where a key is masked: what comes from a softmax until it is contracted.
    probabilities: BTreeSet<ValueId>,
}

struct Walker<'a> {
    graph: &'a Graph,
    facts: &'a Facts,
    depends: SideMap<ValueId, bool>,
    /// Relations of each node, where its operator has a rule.
    relations: BTreeMap<NodeId, Relations>,
    /// Place of each node in the order of the graph.
    place: Vec<usize>,
    /// Place of the last node that reads a value's elements; graph outputs are read behind all nodes.
    last_read: SideMap<ValueId, usize>,
    /// Tokens that were put into the sequence from constants, by the value and its axis.
    origins: BTreeMap<Start, Rc<BTreeSet<usize>>>,
    walks: BTreeMap<Start, Walk>,
    stretches: Vec<Stretch>,
}

/// Finds the site before each attention layer; `layers` are the logits and softmax nodes, from the input on.
///
/// Second list: layers without a site, with the reason.
pub(super) fn token_sites(
    graph: &Graph,
    facts: &Facts,
    layers: &[(NodeId, NodeId)],
) -> (TokenSites, Vec<(usize, NodeId, String)>) {
    let mut walker = Walker::new(graph, facts);
    let dominators = dominators(graph, &walker.depends, &walker.place);
    // From the last layer on, so that each walk ends where it meets one that was made before: every node is walked over about once.
    let mut found: Vec<_> =
        layers.iter().rev().map(|(logits, softmax)| walker.site_before(*logits, *softmax, &dominators)).collect();
    found.reverse();
    let (mut sites, mut refused) = (Vec::<TokenSite>::new(), Vec::new());
    for ((layer, (_, softmax)), found) in layers.iter().enumerate().zip(found) {
        match found {
            Ok(((value, _), ..)) if sites.iter().rev().any(|s| s.value == value) => {}
            // Sites follow each other along one sequence, so that a token that is gone stays gone.
            Ok((start, ..)) if sites.last().is_some_and(|last| !walker.continues(last, start)) => {
                refused.push((layer, *softmax, "belongs to another sequence".to_string()));
            }
            Ok(((value, axis), pinned, stretch)) => {
                let count = walker.length((value, axis)).unwrap_or(0);
                let beside = walker.beside((value, axis));
                sites.push(TokenSite { layer, value, beside, axis, count, pinned, stretch });
            }
            Err(reason) => refused.push((layer, *softmax, reason)),
        }
    }
    (TokenSites { sites, stretches: walker.stretches }, refused)
}

fn relations_of(graph: &Graph, facts: &Facts) -> BTreeMap<NodeId, Relations> {
    let mut all = BTreeMap::new();
    for (id, node) in graph.nodes() {
        let known = node.inputs().iter().chain(node.outputs()).flatten().all(|v| facts.shape(*v).is_some());
        if let (true, Some(ops::Axes::Rule(rule))) = (known, ops::rule_of(graph, node).map(|r| &r.axes)) {
            let opset = graph.opset(node.domain()).unwrap_or(0);
            all.insert(id, rule(&AxesCx { graph, facts, node, id, opset }));
        }
    }
    all
}

/// The nearest node that every path from the graph inputs to a node passes.
fn dominators(graph: &Graph, depends: &SideMap<ValueId, bool>, place: &[usize]) -> SideMap<NodeId, Option<NodeId>> {
    let mut idom: SideMap<NodeId, Option<NodeId>> = SideMap::filled(graph.node_capacity(), None);
    for (id, node) in graph.nodes() {
        let mut meet: Option<Option<NodeId>> = None;
        for v in node.inputs().iter().flatten().filter(|v| depends[**v]) {
            let source = graph.value(*v).producer().map(|(n, _)| n);
            meet = Some(match meet {
                None => source,
                Some(other) => nearest_common(&idom, place, other, source),
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

impl<'a> Walker<'a> {
    fn new(graph: &'a Graph, facts: &'a Facts) -> Self {
        let mut walker = Self {
            graph,
            facts,
            depends: depends_on_data(graph),
            relations: relations_of(graph, facts),
            place: super::places(graph),
            last_read: SideMap::filled(graph.value_count(), 0),
            origins: BTreeMap::new(),
            walks: BTreeMap::new(),
            stretches: Vec::new(),
        };
        for (id, node) in graph.nodes() {
            if !super::is_shape_only(graph, id) {
                for v in node.inputs().iter().flatten().chain(node.captures()) {
                    walker.last_read[*v] = walker.place[id.index()];
                }
            }
            walker.find_origins(id);
        }
        for v in graph.outputs() {
            walker.last_read[*v] = usize::MAX;
        }
        walker
    }

    /// Number of tokens of an axis, where it is known and more than one.
    fn length(&self, (value, axis): Start) -> Option<usize> {
        self.facts.shape(value)?.get(axis)?.size().filter(|n| *n > 1)
    }

    /// Other outputs of the node that makes a value, which hold its tokens on the same axis: all go on from one axis of an input.
    fn beside(&self, (value, axis): Start) -> Vec<ValueId> {
        let Some((id, number)) = self.graph.value(value).producer() else { return Vec::new() };
        let Some(relations) = self.relations.get(&id) else { return Vec::new() };
        let sources = |at: At| -> BTreeSet<At> {
            let source = |link: &Link| match link {
                Link::Same(a, b) if *b == at => Some(*a),
                Link::Same(a, b) if *a == at => Some(*b),
                _ => None,
            };
            relations.links.iter().filter_map(source).filter(|(slot, _)| matches!(slot, Slot::In(_))).collect()
        };
        let own = sources((Slot::Out(number), axis));
        let read = |v: &ValueId| !self.graph.value(*v).users().is_empty() || self.graph.outputs().contains(v);
        let outputs = self.graph.node(id).outputs().iter().enumerate().filter(|(o, _)| *o != number);
        let others = outputs.filter_map(|(o, v)| v.filter(|v| read(v) && !own.is_disjoint(&sources((Slot::Out(o), axis)))));
        others.filter(|v| self.length((*v, axis)) == self.length((value, axis))).collect()
    }

    /// Tokens that were put into the sequence from constants (class, distillation, registers): by this node, or before it.
    fn find_origins(&mut self, id: NodeId) {
        let (node, Some(relations)) = (self.graph.node(id), self.relations.get(&id)) else { return };
        for v in node.outputs().iter().flatten().copied().filter(|v| self.depends[*v]) {
            for axis in 0..self.facts.shape(v).map_or(0, <[_]>::len).min(SITE_AXES) {
                let Some(length) = self.length((v, axis)) else { continue };
                let put = relations.links.iter().filter_map(|link| match link {
                    Link::Select { from: (Slot::In(i), _), to: (Slot::Out(0), to), index, at } => {
                        let constant = node.input(*i).is_some_and(|x| !self.depends[x]);
                        (*to == axis && node.op() == "Concat" && constant).then(|| *at..at + index.len())
                    }
                    _ => None,
                });
                let put: BTreeSet<usize> = put.flatten().collect();
                let inputs = node.inputs().iter().flatten().filter(|x| self.length((**x, axis)) == Some(length));
                let mut before: Vec<&Rc<BTreeSet<usize>>> = inputs.filter_map(|x| self.origins.get(&(*x, axis))).collect();
                before.dedup_by(|a, b| Rc::ptr_eq(a, b));
                let all = match before[..] {
                    [] if put.is_empty() => continue,
                    [one] if put.is_empty() => Rc::clone(one),
                    _ => Rc::new(before.into_iter().flat_map(|b| b.iter().copied()).chain(put).collect()),
                };
                self.origins.insert((v, axis), all);
            }
        }
    }

    /// The nearest value before an attention layer from which tokens can be taken away; the tokens that always stay; its stretch.
    fn site_before(
        &mut self,
        logits: NodeId,
        softmax: NodeId,
        dominators: &SideMap<NodeId, Option<NodeId>>,
    ) -> Result<(Start, BTreeSet<usize>, usize), String> {
        let mut reason = "no value before the block carries the whole sequence".to_string();
        let mut at = dominators[logits];
        while let Some(id) = at {
            let is_shared = |v: &ValueId| self.graph.value(*v).users().len() > 1 || self.graph.node(id).outputs().len() > 1;
            let value = self.graph.node(id).output(0).filter(is_shared);
            for axis in value.map_or(0..0, |v| 0..self.facts.shape(v).map_or(0, <[_]>::len).min(SITE_AXES)) {
                let Some(v) = value else { continue };
                self.walk((v, axis));
                match &self.walks[&(v, axis)] {
                    Ok((pinned, stretch)) => {
                        let holds = |s: &Stretch| {
                            s.softmaxes.iter().any(|(n, _)| *n == softmax) || s.fused.iter().any(|f| f.node == softmax)
                        };
                        if chain(&self.stretches, *stretch).any(holds) {
                            return Ok(((v, axis), pinned.clone(), *stretch));
                        }
                    }
                    Err(r) => reason.clone_from(r),
                }
            }
            at = dominators[id];
        }
        Err(reason)
    }

    /// Whether a later site stands on the sequence of an earlier one, with all of its tokens in order.
    fn continues(&self, earlier: &TokenSite, later: Start) -> bool {
        let tokens = chain(&self.stretches, earlier.stretch).find_map(|s| s.reach.get(&later));
        tokens.is_some_and(|tokens| tokens.iter().copied().eq(0..earlier.count))
    }

    /// Walks from a start unless that was done.
    fn walk(&mut self, start: Start) {
        if !self.walks.contains_key(&start) {
            let walk = self.new_walk(start);
            self.walks.insert(start, walk);
        }
    }

    fn new_walk(&mut self, start: Start) -> Walk {
        let value = start.0;
        let count = self.length(start).ok_or("its length is not known")?;
        let pinned = self.origins.get(&start).map(|p| BTreeSet::clone(p)).unwrap_or_default();
        let values: Vec<ValueId> = std::iter::once(value).chain(self.beside(start)).collect();
        let reach = values.iter().map(|v| ((*v, start.1), (0..count).collect())).collect();
        let stretch = Stretch { reach, ..Stretch::default() };
        let mut path = Path { pinned, stretch, probabilities: BTreeSet::new() };
        let rank = |v: &ValueId| self.facts.shape(*v).map_or(0, <[_]>::len);
        let first = self.graph.value(value).producer().map_or(0, |(n, _)| self.place[n.index()] + 1);
        // The place of the last node that reads what was reached: behind it there is nothing to be seen.
        let mut horizon = values.iter().map(|v| self.last_read[*v]).max().unwrap_or(0);
        for (place, id) in self.graph.order().iter().enumerate().skip(first) {
            if place > horizon {
                break;
            }
            let node = self.graph.node(*id);
            let tagged = |v: &ValueId| (0..rank(v)).any(|a| path.stretch.reach.contains_key(&(*v, a)));
            if node.captures().iter().any(tagged) {
                return Err(format!("{} reads tokens inside a subgraph", self.graph.label(*id)));
            }
            if !node.inputs().iter().flatten().any(tagged) || super::is_shape_only(self.graph, *id) {
                continue;
            }
            self.step(&mut path, *id)?;
            if horizon <= place
                && let Some((starts, walk)) = self.joined(&path, *id, count)
            {
                let (pinned, stretch) = walk.clone()?;
                starts.iter().for_each(|start| drop(path.stretch.reach.remove(start)));
                path.stretch.next = Some(stretch);
                self.check_outputs(&path.stretch)?;
                self.stretches.push(path.stretch);
                return Ok((pinned, self.stretches.len() - 1));
            }
            let reached =
                node.outputs().iter().flatten().filter(|v| (0..rank(v)).any(|a| path.stretch.reach.contains_key(&(**v, a))));
            horizon = reached.map(|v| self.last_read[*v]).fold(horizon, usize::max);
        }
        self.check_outputs(&path.stretch)?;
        if path.pinned.len() >= count {
            return Err("all tokens are read one by one".into());
        }
        self.stretches.push(path.stretch);
        Ok((path.pinned, self.stretches.len() - 1))
    }

    /// The walk that begins at the outputs of a node, where all tokens went into them in order and nothing else holds any: from here on
    /// both are the same.
    fn joined(&self, path: &Path, id: NodeId, count: usize) -> Option<(Vec<Start>, &Walk)> {
        let mut starts: Vec<Start> = Vec::new();
        for v in self.graph.node(id).outputs().iter().flatten() {
            for (start, tokens) in path.stretch.reach.range((*v, 0)..=(*v, usize::MAX)) {
                let whole = tokens.len() == count && tokens.iter().copied().eq(0..count);
                if !whole || path.probabilities.contains(v) {
                    return None;
                }
                starts.push(*start);
            }
        }
        let first = *starts.first()?;
        let mut begun = vec![first];
        begun.extend(self.beside(first).into_iter().map(|v| (v, first.1)));
        let walk = self.walks.get(&first)?;
        let same_pinned = match self.origins.get(&first) {
            Some(p) => **p == path.pinned,
            None => path.pinned.is_empty(),
        };
        let read = |start: &Start| self.last_read[start.0] > 0;
        (same_pinned && starts.iter().filter(|s| read(s)).all(|s| begun.contains(s))).then_some((starts, walk))
    }

    fn check_outputs(&self, stretch: &Stretch) -> Result<(), String> {
        for v in self.graph.outputs() {
            if stretch.reach.range((*v, 0)..=(*v, usize::MAX)).next().is_some() {
                return Err(format!("graph output '{}' has the token axis", self.graph.value(*v).name()));
            }
        }
        Ok(())
    }

    /// Carries tokens over one node.
    fn step(&self, path: &mut Path, id: NodeId) -> Result<(), String> {
        let node = self.graph.node(id);
        let label = || self.graph.label(id);
        let relations = self.relations.get(&id).ok_or_else(|| format!("{} has no rule for tokens", label()))?;
        let mut tags: BTreeMap<At, Vec<usize>> = BTreeMap::new();
        for (slot, v) in node.inputs().iter().enumerate() {
            let Some(v) = v else { continue };
            for axis in 0..self.facts.shape(*v).map_or(0, <[_]>::len) {
                if let Some(tokens) = path.stretch.reach.get(&(*v, axis)) {
                    tags.insert((Slot::In(slot), axis), tokens.clone());
                }
            }
        }
        let masked = node.inputs().iter().flatten().any(|v| path.probabilities.contains(v));
        let keeps_zero = match node.domain() {
            "" => KEEPS_ZERO.contains(&node.op()),
            "com.microsoft" => matches!(node.op(), "FusedMatMul" | "TransposeMatMul"),
            _ => false,
        };
        if masked && !keeps_zero {
            return Err(format!("{} adds to what a masked key gives", label()));
        }
        for _ in 0..3 {
            for link in &relations.links {
                self.follow(path, id, link, &mut tags)?;
            }
        }
        // Inside a fused attention keys are contracted with the probabilities.
        let keys = relations.attention.and_then(|a| a.mask).map(|m| m.keys);
        let contracts =
            relations.links.iter().any(|l| matches!(l, Link::Contract(a, _) if tags.contains_key(a) && Some(*a) != keys));
        if contracts && !masked {
            return Err(format!("{} sums over tokens outside an attention", label()));
        }
        if (masked && !contracts) || node.op() == "Softmax" {
            path.probabilities.extend(node.outputs().iter().flatten());
        }
        for ((slot, axis), tokens) in tags {
            if let (Slot::Out(o), true) = (slot, tokens.iter().any(|t| *t != FIXED && !path.pinned.contains(t)))
                && let Some(v) = node.output(o)
            {
                path.stretch.reach.insert((v, axis), tokens);
            }
        }
        Ok(())
    }

    fn follow(&self, path: &mut Path, id: NodeId, link: &Link, tags: &mut BTreeMap<At, Vec<usize>>) -> Result<(), String> {
        match link {
            Link::Same(a, b) => {
                self.equal(path, id, *a, *b, tags)?;
                self.equal(path, id, *b, *a, tags)
            }
            Link::Contract(a, b) => {
                self.equal(path, id, *a, *b, tags)?;
                self.equal(path, id, *b, *a, tags)
            }
            Link::Sum(a) if tags.contains_key(a) => Err(format!("{} sums over tokens", self.graph.label(id))),
            Link::Sum(_) | Link::Unread(_) => Ok(()),
            Link::Vanish(a, reason) | Link::Blocks(a, Blocks { else_barrier: Some(reason), .. }) if tags.contains_key(a) => {
                Err(format!("{}: {reason}", self.graph.label(id)))
            }
            Link::Vanish(..) | Link::Blocks(..) => Ok(()),
            Link::Regroup(a, b) => self.regroup(path, id, a, b, tags),
            Link::Select { from, to, index, at } => self.select(path, id, *from, *to, index, *at, tags),
            Link::Barrier(a, reason) if tags.contains_key(a) => self.barrier(path, id, *a, reason),
            Link::Barrier(..) => Ok(()),
        }
    }

    /// `b` holds what `a` holds.
    fn equal(&self, path: &mut Path, id: NodeId, a: At, b: At, tags: &mut BTreeMap<At, Vec<usize>>) -> Result<(), String> {
        let Some(tokens) = tags.get(&a).cloned() else { return Ok(()) };
        // A token that stays whatever happens may have been carried on as something that is no token of the site.
        let free =
            |list: &[usize]| -> Vec<usize> { list.iter().map(|t| if path.pinned.contains(t) { FIXED } else { *t }).collect() };
        match (tags.get(&b), b.0) {
            (Some(known), _) if free(known) == free(&tokens) => Ok(()),
            (Some(_), _) => Err(format!("{} combines different selections of tokens", self.graph.label(id))),
            (None, Slot::In(slot)) => {
                let v = self.graph.node(id).input(slot).ok_or("an input is missing")?;
                if self.depends[v] {
                    return Err(format!("{} meets a sequence that is not shortened", self.graph.label(id)));
                }
                path.stretch.constants.push((Use { node: id, slot }, b.1, tokens.clone()));
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
        path: &mut Path,
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
            ([x], [y]) => self.equal(path, id, (a.0, *x), (b.0, *y), tags),
            _ => Err(format!("{} regroups tokens (windows or a grid)", self.graph.label(id))),
        }
    }

    #[allow(clippy::too_many_arguments, reason = "the fields of one relation")]
    fn select(
        &self,
        path: &mut Path,
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
        if !whole && (picked.len() == 1 || picked.iter().all(|t| *t == FIXED || path.pinned.contains(t))) {
            path.pinned.extend(picked.iter().filter(|t| **t != FIXED));
            return Ok(());
        }
        let missing_is_pinned = tokens.iter().all(|t| picked.contains(t) || *t == FIXED || path.pinned.contains(t));
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

    fn barrier(&self, path: &mut Path, id: NodeId, at: At, reason: &str) -> Result<(), String> {
        let node = self.graph.node(id);
        let mut record = |list: fn(&mut Stretch) -> &mut Vec<(NodeId, usize)>| {
            if !list(&mut path.stretch).contains(&(id, at.1)) {
                list(&mut path.stretch).push((id, at.1));
            }
        };
        match (node.op(), at.0) {
            ("Softmax", _) => record(|s| &mut s.softmaxes),
            ("ReduceMean", Slot::In(0)) => record(|s| &mut s.means),
            _ if self.fused_keys(id, at).is_some() => {
                let fused = self.fused_keys(id, at).filter(|f| !path.stretch.fused.contains(f));
                path.stretch.fused.extend(fused);
            }
            _ => return Err(format!("{}: {reason}", self.graph.label(id))),
        }
        Ok(())
    }

    /// The fused attention whose keys are at `at`, where they can be masked.
    fn fused_keys(&self, id: NodeId, at: At) -> Option<FusedKeys> {
        let mask = self.relations.get(&id)?.attention?.mask.filter(|m| m.keys == at)?;
        let input = |(slot, axis): At| match slot {
            Slot::In(slot) => Some((self.graph.node(id).input(slot)?, axis)),
            Slot::Out(_) | Slot::Virtual(_) => None,
        };
        let queries = input(mask.queries)?;
        self.facts.shape(queries.0)?.get(queries.1)?.size()?;
        Some(FusedKeys { node: id, keys: input(mask.keys)?, queries, bias: mask.bias })
    }
}
