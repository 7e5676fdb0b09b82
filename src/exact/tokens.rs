//! Tokens that no output depends on: what is computed of them alone is left out.
//!
//! Needs are carried from the outputs back through everything that treats tokens alike; what sums over tokens (keys and values of an
//! attention) needs all of them. Where readers need different parts of a value, it is narrowed to what they need together, a part
//! that one of them needs alone is computed apart where the rest is then smaller (the queries of a fused projection), and else
//! picked by a Gather.
//! Example: of a class token model's last block, `[B, 197, D]`, queries, their rows of the attention matrix, the output projection
//! and the MLP are computed for `[B, 1, D]`.

use super::demand::{Demand, Kept, Rect, Said, hull};
use super::{Part, Refused, Saving, What};
use crate::axes::depends_on_data;
use crate::axes::relation::{AxesCx, Link, Relations, Slot};
use crate::cost::{self, Sizes};
use crate::graph::build::Builder;
use crate::graph::{Graph, Id, NewNode, NodeId, SideMap, Use, ValueId, check};
use crate::infer::{self, Dim, Facts};
use crate::ops::{self, Refit};
use crate::slice::{self, refit::RefitCx, shapes};
use std::collections::{BTreeMap, BTreeSet};

/// Less than this share of the MACs is not worth other nodes.
const LEAST: f64 = 0.005;

/// A graph that computes less.
pub(super) struct Narrowed {
    pub(super) graph: Graph,
    pub(super) savings: Vec<Saving>,
    pub(super) parts: Vec<Part>,
}

/// Leaves out what is computed of tokens that no output depends on.
pub(super) fn narrow(graph: &Graph, facts: &Facts, sizes: &Sizes) -> Result<Narrowed, Refused> {
    let mut walk = Narrower::new(graph, facts, graph.clone());
    walk.run();
    let attention = walk.narrowed_attention();
    if attention.is_empty() {
        return Err(walk.why_not());
    }
    if !walk.unlike_splits.is_empty() {
        let opened = open_splits(graph, facts, &walk.unlike_splits);
        let broken = |_| walk.refused("the graph with its splits opened cannot be inferred".to_string());
        let opened_facts = infer::facts(&opened).map_err(broken)?;
        return narrow_opened(&opened, &opened_facts, (graph, facts), sizes);
    }
    narrow_opened(graph, facts, (graph, facts), sizes)
}

fn narrow_opened(
    graph: &Graph,
    facts: &Facts,
    (model, model_facts): (&Graph, &Facts),
    sizes: &Sizes,
) -> Result<Narrowed, Refused> {
    let mut walk = Narrower::new(graph, facts, graph.clone());
    walk.run();
    // Once more, with what is read off shapes that change made the numbers of before.
    let lengths = walk.lengths();
    let mut frozen = graph.clone();
    shapes::freeze(&mut frozen, facts, &|v, axis| lengths.get(&(v, axis)).and_then(Dim::size));
    let mut walk = Narrower::new(graph, facts, frozen);
    walk.run();
    let attention = walk.narrowed_attention();
    walk.cut_constants();
    walk.refit().map_err(|reason| walk.refused(reason))?;
    if let Some(reason) = walk.failed.take() {
        return Err(walk.refused(reason));
    }
    let Narrower { mut out, parts, .. } = walk;
    let unused: BTreeSet<ValueId> = model.values().filter(|(_, v)| v.users().is_empty()).map(|(id, _)| id).collect();
    let keeps = |_: &Graph, v: ValueId| unused.contains(&v);
    out.sort();
    out.remove_dead(&keeps);
    let refused = |reason: String| Refused {
        what: What::Tokens,
        node: attention.first().map(|id| graph.label(*id)).unwrap_or_default(),
        reason,
    };
    read_shapes_elsewhere(&mut out, graph, facts, &lengths).map_err(refused)?;
    let found = infer::facts(&out).map_err(|e| refused(e.to_string()))?;
    drop_idle_slices(&mut out, &found, graph.value_count().min(model.value_count()));
    out.remove_dead(&keeps);
    slice::keep_cut_branches(&mut out, model_facts).map_err(|e| refused(e.to_string()))?;
    check_shapes(&out, facts, &lengths, graph).map_err(refused)?;
    let (before, after) = (cost::count(model, model_facts, sizes), cost::count(&out, &found, sizes));
    let saved = before.macs.zip(after.macs).map(|(a, b)| a.saturating_sub(b));
    if let (Some(saved), Some(whole)) = (saved, before.macs)
        && saved as f64 <= LEAST * whole as f64
    {
        return Err(refused(format!("{saved} of {whole} MACs would be saved")));
    }
    let labels: Vec<String> = attention.iter().map(|id| graph.label(*id)).collect();
    Ok(Narrowed { graph: out, savings: vec![Saving { what: What::Tokens, node: labels.join(", "), macs_saved: saved }], parts })
}

/// Lets who reads the shape of a value that lost positions of an axis of unknown size read that of another value which has the shape
/// of before: the number may be meant, not the shape.
fn read_shapes_elsewhere(
    out: &mut Graph,
    graph: &Graph,
    facts: &Facts,
    lengths: &BTreeMap<(ValueId, usize), Dim>,
) -> Result<(), String> {
    let narrowed: BTreeSet<ValueId> = lengths.keys().map(|(v, _)| *v).collect();
    let unknown = lengths.keys().filter(|(v, axis)| facts.shape(*v).is_some_and(|s| s[*axis].size().is_none()));
    let unknown: BTreeSet<ValueId> = unknown.map(|(v, _)| *v).collect();
    for v in unknown {
        for at in out.value(v).users().to_vec() {
            let is_shape_only = ops::rule_of(out, out.node(at.node)).is_some_and(|r| matches!(r.axes, ops::Axes::ShapeOnly));
            if !is_shape_only {
                continue;
            }
            let before = out.order().iter().take_while(|id| **id != at.node);
            let made = before.flat_map(|id| out.node(*id).outputs().iter().flatten().copied());
            let mut values = out.inputs().iter().copied().chain(made).filter(|u| u.index() < graph.value_count());
            let other = values.find(|u| !narrowed.contains(u) && facts.shape(*u) == facts.shape(v));
            let other = other.ok_or_else(|| format!("{} reads the shape of what would be narrowed", out.label(at.node)))?;
            out.set_input(at, Some(other));
        }
    }
    Ok(())
}

/// Replaces Splits by Slices, one for each part that is read.
fn open_splits(graph: &Graph, facts: &Facts, splits: &BTreeSet<NodeId>) -> Graph {
    let mut out = graph.clone();
    for id in splits {
        let node = graph.node(*id).clone();
        let Some(x) = node.input(0) else { continue };
        let rank = facts.shape(x).map_or(0, <[_]>::len);
        let Some(axis) = infer::normalize_axis(node.attr_int("axis").unwrap_or(0), rank) else { continue };
        let mut start = 0i64;
        let mut made = Vec::new();
        for v in node.outputs() {
            let Some(size) = v.and_then(|v| facts.shape(v)?.get(axis)?.known()) else { break };
            if let Some(v) = v.filter(|v| !graph.value(*v).users().is_empty()) {
                let name = graph.value(v).name().to_string();
                let part = Builder::new(&mut out, &format!("{name}.")).slice(x, &[start], &[start + size], &[axis as i64]);
                made.push((v, part));
            }
            start += size;
        }
        made.into_iter().for_each(|(v, part)| out.replace_uses(v, part));
    }
    out.sort();
    out.remove_dead(&|_, _| false);
    out
}

/// Takes Slices out that were put in and take all of their input.
fn drop_idle_slices(out: &mut Graph, facts: &Facts, old_count: usize) {
    for id in out.order().to_vec() {
        let node = out.node(id);
        let (Some(x), Some(y)) = (node.input(0), node.output(0)) else { continue };
        if node.op() == "Slice" && y.index() >= old_count && facts.shape(x).is_some() && facts.shape(x) == facts.shape(y) {
            out.replace_uses(y, x);
        }
    }
}

/// The result is sound, and every value has the shape that it should have.
fn check_shapes(out: &Graph, facts: &Facts, lengths: &BTreeMap<(ValueId, usize), Dim>, graph: &Graph) -> Result<(), String> {
    let is_whole = |v: &check::Violation| v.rule != "I6" || !v.what.contains(": 0 bytes");
    if let Some(violation) = check::check(out).into_iter().find(is_whole) {
        return Err(violation.to_string());
    }
    let new = infer::facts(out).map_err(|e| e.to_string())?;
    for (v, value) in out.values().take(graph.value_count()) {
        let (Some(old), Some(found)) = (facts.shape(v), new.shape(v)) else { continue };
        if value.producer().is_none() || out.is_constant(v) {
            continue;
        }
        let expected: Vec<Dim> = old.iter().enumerate().map(|(axis, d)| lengths.get(&(v, axis)).unwrap_or(d).clone()).collect();
        let differs = |(a, b): (&Dim, &Dim)| a != b && (a.known().is_some() || b.known().is_some());
        if found.len() != expected.len() || found.iter().zip(&expected).any(differs) {
            return Err(format!("'{}' would have shape {found:?} instead of {expected:?}", value.name()));
        }
    }
    Ok(())
}

/// What a node works on in the end.
#[derive(Clone, Debug)]
struct Work {
    /// The node that it is a copy of; itself otherwise.
    origin: NodeId,
    inputs: BTreeMap<usize, Rect>,
    outputs: BTreeMap<usize, Rect>,
}

struct Narrower<'a> {
    graph: &'a Graph,
    facts: &'a Facts,
    depends: SideMap<ValueId, bool>,
    relations: BTreeMap<NodeId, Relations>,
    out: Graph,
    /// What each input of each node is needed for; whole where there is none.
    demands: BTreeMap<Use, Demand>,
    work: BTreeMap<NodeId, Work>,
    /// Gathers that were put in, by value, axis and positions.
    gathers: BTreeMap<(ValueId, Rect), ValueId>,
    /// Splits whose parts are needed at unlike positions.
    unlike_splits: BTreeSet<NodeId>,
    parts: Vec<Part>,
    /// Why a reader cannot be given what it needs.
    failed: Option<String>,
}

impl<'a> Narrower<'a> {
    fn new(graph: &'a Graph, facts: &'a Facts, out: Graph) -> Self {
        let mut relations = BTreeMap::new();
        for (id, node) in graph.nodes() {
            let known = node.inputs().iter().chain(node.outputs()).flatten().all(|v| facts.shape(*v).is_some());
            if let (true, Some(ops::Axes::Rule(rule))) = (known, ops::rule_of(graph, node).map(|r| &r.axes)) {
                let opset = graph.opset(node.domain()).unwrap_or(0);
                relations.insert(id, rule(&AxesCx { graph, facts, node, id, opset }));
            }
        }
        Self {
            graph,
            facts,
            depends: depends_on_data(graph),
            relations,
            out,
            demands: BTreeMap::new(),
            work: BTreeMap::new(),
            gathers: BTreeMap::new(),
            unlike_splits: BTreeSet::new(),
            parts: Vec::new(),
            failed: None,
        }
    }

    fn size(&self, v: ValueId, axis: usize) -> Option<usize> {
        self.facts.shape(v)?.get(axis)?.size()
    }

    fn inputs_for(&self, id: NodeId, outputs: &BTreeMap<usize, Rect>) -> Result<BTreeMap<usize, Demand>, String> {
        let relations = self.relations.get(&id).ok_or("it has no rule for axes")?;
        Said { graph: self.graph, facts: self.facts, id, relations }.inputs_for(outputs)
    }

    fn is_shape_only(&self, id: NodeId) -> bool {
        let id = self.work.get(&id).map_or(id, |w| w.origin);
        id.index() < self.graph.node_capacity()
            && ops::rule_of(self.graph, self.graph.node(id)).is_some_and(|r| matches!(r.axes, ops::Axes::ShapeOnly))
    }

    /// Who reads the elements of a value, and what of it.
    fn readers(&self, v: ValueId) -> Vec<(Use, Demand)> {
        let users = self.out.value(v).users().iter().filter(|at| !self.is_shape_only(at.node));
        users.map(|at| (*at, self.demands.get(at).cloned().unwrap_or_default())).collect()
    }

    fn run(&mut self) {
        for id in self.graph.order().iter().rev() {
            let node = self.graph.node(*id);
            if node.outputs().iter().flatten().any(|v| self.graph.is_constant(*v)) || self.is_shape_only(*id) {
                continue;
            }
            let used: Vec<(usize, ValueId)> = node
                .outputs()
                .iter()
                .enumerate()
                .filter_map(|(o, v)| Some((o, (*v)?)))
                .filter(|(_, v)| !self.out.value(*v).users().is_empty() || self.out.outputs().contains(v))
                .collect();
            match used[..] {
                [(slot, v)] => self.one(*id, slot, v),
                _ => self.several(*id, &used),
            }
        }
        for v in self.graph.inputs() {
            self.give(*v, &Rect::new());
        }
    }

    /// Decides about a node with one output that is read.
    fn one(&mut self, id: NodeId, slot: usize, v: ValueId) {
        let is_float = self.facts.get(v).dtype.is_some_and(crate::graph::DType::is_float);
        let may_change =
            (self.depends[v] || is_float) && self.graph.node(id).captures().is_empty() && !self.out.outputs().contains(&v);
        let mut whole = Rect::new();
        if may_change {
            while self.split_off(id, slot, v) {}
            let rects: Vec<Rect> = self.readers(v).into_iter().map(|(_, d)| d.rect).collect();
            whole = hull(rects.iter(), &|axis| self.size(v, axis));
            whole = self.allowed(id, &[(slot, v)], whole);
        }
        self.settle(id, id, BTreeMap::from([(slot, whole.clone())]));
        self.give(v, &whole);
    }

    /// Decides about a node with several outputs that are read: it is narrowed where they are needed alike.
    fn several(&mut self, id: NodeId, used: &[(usize, ValueId)]) {
        let mut rects: Vec<Rect> = Vec::new();
        for (_, v) in used {
            let demands: Vec<Rect> = self.readers(*v).into_iter().map(|(_, d)| d.rect).collect();
            let is_free = self.depends[*v] && !self.out.outputs().contains(v);
            rects.push(if is_free { hull(demands.iter(), &|axis| self.size(*v, axis)) } else { Rect::new() });
        }
        let alike = rects.windows(2).all(|w| w[0] == w[1]) && self.graph.node(id).captures().is_empty();
        if !alike && self.graph.node(id).op() == "Split" && self.out.opset("").is_some_and(|n| n >= 10) {
            self.unlike_splits.insert(id);
        }
        let whole = match rects.into_iter().next() {
            Some(rect) if alike => self.allowed(id, used, rect),
            _ => Rect::new(),
        };
        self.settle(id, id, used.iter().map(|(slot, _)| (*slot, whole.clone())).collect());
        used.iter().for_each(|(_, v)| self.give(*v, &whole));
    }

    /// What of `rect` a node can be narrowed to: all of it, else the axes that it allows by themselves.
    fn allowed(&self, id: NodeId, used: &[(usize, ValueId)], mut rect: Rect) -> Rect {
        for (_, v) in used {
            rect.retain(|axis, positions| self.serves_pickers(*v, *axis, positions));
        }
        let outputs = |rect: &Rect| used.iter().map(|(slot, _)| (*slot, rect.clone())).collect::<BTreeMap<_, _>>();
        if self.inputs_for(id, &outputs(&rect)).is_ok() {
            return rect;
        }
        rect.retain(|axis, positions| self.inputs_for(id, &outputs(&Rect::from([(*axis, positions.clone())]))).is_ok());
        if self.inputs_for(id, &outputs(&rect)).is_ok() { rect } else { Rect::new() }
    }

    /// Whether those who pick from an axis of unknown size still find their positions where they look for them.
    fn serves_pickers(&self, v: ValueId, axis: usize, kept: &Kept) -> bool {
        let picks = |(_, d): (Use, Demand)| d.picked.contains(&axis);
        self.size(v, axis).is_some()
            || !self.readers(v).into_iter().any(picks)
            || matches!(kept, Kept::List(list) if list.iter().copied().eq(0..list.len()))
    }

    /// Computes apart what some readers need of a value, where less is left for the others then. `false` where there is no such part.
    fn split_off(&mut self, id: NodeId, slot: usize, v: ValueId) -> bool {
        let readers = self.readers(v);
        let size = |axis: usize| self.size(v, axis);
        let hull_of = |keep: &dyn Fn(&Demand) -> bool| {
            let rects: Vec<&Rect> = readers.iter().filter(|(_, d)| keep(d)).map(|(_, d)| &d.rect).collect();
            hull(rects.into_iter(), &size)
        };
        let share = |rect: &Rect| -> f64 { rect.iter().map(|(a, kept)| kept.share(size(*a))).product() };
        // Of a factor of an axis nothing can be gathered simply; what costs nothing is made again instead.
        let is_free = ops::rule_of(self.graph, self.graph.node(id)).is_some_and(|r| matches!(r.cost, ops::Cost::Free));
        let is_factor = |rect: &Rect| rect.values().any(|kept| matches!(kept, Kept::Factor { .. }));
        let all = hull_of(&|_| true);
        let rects: BTreeSet<&Rect> = readers.iter().map(|(_, d)| &d.rect).filter(|r| **r != all).collect();
        let mut found = None;
        for rect in rects {
            let rest = hull_of(&|d| d.rect != *rect);
            // Parts of what is computed from constants are made of parts of those.
            let is_less = rest != all && (!self.depends[v] || share(rect) + share(&rest) < 0.999 * share(&all));
            if readers.iter().all(|(_, d)| d.rect == *rect) || !(is_less || is_free && is_factor(rect)) {
                continue;
            }
            let can = |r: &Rect| self.inputs_for(id, &BTreeMap::from([(slot, r.clone())])).is_ok();
            let serves = rect.iter().all(|(axis, p)| self.serves_pickers(v, *axis, p));
            if can(rect) && can(&rest) && serves {
                found = Some(rect.clone());
                break;
            }
        }
        let Some(rect) = found else { return false };
        let users: Vec<Use> = readers.iter().filter(|(_, d)| d.rect == rect).map(|(at, _)| *at).collect();
        self.copy(id, slot, v, rect, &users);
        true
    }

    /// A copy of a node that makes a part of its output for some readers.
    fn copy(&mut self, id: NodeId, slot: usize, v: ValueId, rect: Rect, users: &[Use]) {
        let node = self.graph.node(id).clone();
        let name = format!("{}_part", self.graph.value(v).name());
        let made = self.out.add_value(&name);
        let mut outputs = vec![None; slot + 1];
        outputs[slot] = Some(made);
        let inputs = self.out.node(id).inputs().to_vec();
        let copy = self.out.add_node(NewNode {
            name: self.out.value(made).name().to_string(),
            op: node.op().to_string(),
            domain: node.domain().to_string(),
            inputs,
            outputs,
            attrs: node.attrs().to_vec(),
            ..NewNode::default()
        });
        for at in users {
            self.out.set_input(*at, Some(made));
            self.record_input(*at, rect.clone());
        }
        self.settle(copy, id, BTreeMap::from([(slot, rect)]));
    }

    /// Writes down what a node computes and what it needs for that.
    fn settle(&mut self, id: NodeId, origin: NodeId, outputs: BTreeMap<usize, Rect>) {
        if let Ok(demands) = self.inputs_for(origin, &outputs) {
            self.demands.extend(demands.into_iter().map(|(slot, d)| (Use { node: id, slot }, d)));
        }
        let work = self.work.entry(id).or_insert(Work { origin, inputs: BTreeMap::new(), outputs: BTreeMap::new() });
        work.outputs = outputs;
    }

    fn record_input(&mut self, at: Use, rect: Rect) {
        let work =
            self.work.entry(at.node).or_insert(Work { origin: at.node, inputs: BTreeMap::new(), outputs: BTreeMap::new() });
        work.inputs.insert(at.slot, rect);
    }

    /// Gives every reader of a value that has been narrowed to `has` what it needs.
    fn give(&mut self, v: ValueId, has: &Rect) {
        for (at, demand) in self.readers(v) {
            let mut given = has.clone();
            let mut missing = Rect::new();
            for (axis, kept) in demand.exact() {
                if has.get(&axis) != Some(&kept) {
                    match kept.inside(has.get(&axis)) {
                        Some(missed) => drop(missing.insert(axis, missed)),
                        None => self.failed = Some(format!("'{}' cannot be narrowed", self.graph.value(v).name())),
                    }
                }
                given.insert(axis, kept);
            }
            if !missing.is_empty() {
                let gathered = self.gathered(v, missing);
                self.out.set_input(at, Some(gathered));
            }
            self.record_input(at, given);
        }
    }

    fn gathered(&mut self, v: ValueId, missing: Rect) -> ValueId {
        if let Some(known) = self.gathers.get(&(v, missing.clone())) {
            return *known;
        }
        let mut made = v;
        for (axis, kept) in &missing {
            made = match kept {
                Kept::List(list) => shapes::gather(&mut self.out, made, *axis, list, "rows"),
                Kept::Factor { of, behind, list } => self.gathered_inside(made, v, *axis, (*of, behind, list)),
            };
        }
        self.gathers.insert((v, missing), made);
        made
    }

    /// Positions of a factor of an axis: the factor gets an axis of its own for as long as they are picked.
    fn gathered_inside(&mut self, v: ValueId, of: ValueId, axis: usize, factor: (usize, &Dim, &[usize])) -> ValueId {
        let (size, behind, list) = factor;
        let shape = self.facts.shape(of).unwrap_or_default();
        let whole = &Dim::from(size) * behind;
        let before = shape.get(axis).and_then(|d| d.exact_div(&whole));
        let (before, inner) = (before.and_then(|d| d.known()), behind.known());
        let around = |range: &[Dim]| range.iter().map(Dim::known).collect::<Option<Vec<i64>>>();
        let (front, back) = (around(&shape[..axis]), around(&shape[axis + 1..]));
        let (Some(front), Some(back), true) = (front, back, before.is_some() || inner.is_some()) else {
            self.failed = Some(format!("'{}' has sizes that only run time knows", self.graph.value(of).name()));
            return v;
        };
        let name = format!("{}_rows.", self.graph.value(of).name());
        let open = |n: Option<i64>| n.unwrap_or(-1);
        let split = [&front[..], &[open(before), size as i64, open(inner)], &back].concat();
        let apart = Builder::new(&mut self.out, &name).reshape(v, &split);
        let picked = shapes::gather(&mut self.out, apart, axis + 1, list, "rows");
        Builder::new(&mut self.out, &name).reshape(picked, &[&front[..], &[-1], &back].concat())
    }

    /// Constants lose what their readers do not need.
    fn cut_constants(&mut self) {
        let constants: Vec<ValueId> = self.graph.values().map(|(v, _)| v).filter(|v| self.graph.is_constant(*v)).collect();
        for v in constants {
            let readers: Vec<(Use, Rect)> = self.readers(v).into_iter().map(|(at, d)| (at, d.exact())).collect();
            if readers.iter().all(|(_, rect)| rect.is_empty()) {
                continue;
            }
            let is_own = |at: &Use| self.work.get(&at.node).is_none_or(|w| w.origin == at.node);
            let own: BTreeSet<&Rect> = readers.iter().filter(|(at, _)| is_own(at)).map(|(_, r)| r).collect();
            let all_told = readers.len() == self.out.value(v).users().len() && !self.out.outputs().contains(&v);
            let in_place = match own.iter().next() {
                Some(rect) if own.len() == 1 && all_told => Some((*rect).clone()),
                None if all_told => readers.first().map(|(_, r)| r.clone()),
                _ => None,
            };
            let Some(tensor) = self.graph.constant(v) else { continue };
            let name = self.graph.value(v).name().to_string();
            let taken = |rect: &Rect| {
                rect.iter()
                    .fold(tensor.clone(), |t, (axis, kept)| if let Kept::List(list) = kept { t.take(*axis, list) } else { t })
            };
            let mut copies: BTreeMap<Rect, ValueId> = BTreeMap::new();
            for (at, rect) in readers {
                if Some(&rect) != in_place.as_ref() && !rect.is_empty() {
                    let copy = match copies.get(&rect) {
                        Some(copy) => *copy,
                        None => {
                            let copy = self.out.add_initializer(&format!("{name}_part"), taken(&rect));
                            let user = self.out.value(copy).name().to_string();
                            self.parts.push(Part { initializer: name.clone(), name: user, rect: rect.clone() });
                            copies.insert(rect.clone(), copy);
                            copy
                        }
                    };
                    self.out.set_input(at, Some(copy));
                }
                self.record_input(at, rect);
            }
            if let Some(rect) = in_place.filter(|r| !r.is_empty()) {
                self.out.set_constant(v, taken(&rect));
                self.parts.push(Part { initializer: name.clone(), name, rect });
            }
        }
    }

    /// Lets every node follow what it lost.
    fn refit(&mut self) -> Result<(), String> {
        let work: Vec<(NodeId, Work)> = self.work.iter().map(|(id, w)| (*id, w.clone())).collect();
        let mut patches = Vec::new();
        for (id, work) in work {
            let node = self.graph.node(work.origin);
            let Some(Refit::Rule(rule)) = ops::rule_of(self.graph, node).map(|r| &r.refit) else { continue };
            let mut kept: BTreeMap<(ValueId, usize), Vec<usize>> = BTreeMap::new();
            let ends = work.inputs.iter().map(|(slot, r)| (Some(*slot), node.input(*slot), r));
            let ends = ends.chain(work.outputs.iter().map(|(slot, r)| (None, node.output(*slot), r)));
            for (slot, v, rect) in ends {
                let Some(v) = v else { continue };
                let picked = slot.and_then(|slot| self.demands.get(&Use { node: id, slot })).map(|d| &d.picked);
                for (axis, of_axis) in rect {
                    // What is picked from the front of an axis of unknown size stays where it was.
                    let is_front = self.size(v, *axis).is_none() && picked.is_some_and(|p| p.contains(axis));
                    let list = if let Kept::List(list) = of_axis { list.clone() } else { Vec::new() };
                    if !is_front {
                        kept.insert((v, *axis), list);
                    }
                }
            }
            if kept.is_empty() {
                continue;
            }
            let look = |v: ValueId, axis: usize| kept.get(&(v, axis)).map(Vec::as_slice);
            let mut cx = RefitCx {
                graph: &mut self.out,
                original: self.graph,
                origin: work.origin,
                id,
                facts: self.facts,
                kept: &look,
                patches: Vec::new(),
                edits: Vec::new(),
            };
            rule(&mut cx).map_err(|e| e.to_string())?;
            if !cx.edits.is_empty() {
                return Err(format!("{} stores tokens in blocks", self.graph.label(work.origin)));
            }
            patches.extend(std::mem::take(&mut cx.patches).into_iter().map(|(slot, e)| (Use { node: id, slot }, e)));
        }
        for (at, entries) in patches {
            shapes::patch(&mut self.out, self.facts, at, &entries);
        }
        Ok(())
    }

    /// Sizes of the axes of values that were narrowed in place.
    fn lengths(&self) -> BTreeMap<(ValueId, usize), Dim> {
        let mut lengths = BTreeMap::new();
        for (id, work) in self.work.iter().filter(|(id, w)| **id == w.origin) {
            for (slot, rect) in &work.outputs {
                let Some(v) = self.graph.node(*id).output(*slot) else { continue };
                let whole = |axis: &usize| self.facts.shape(v).and_then(|s| s.get(*axis));
                lengths.extend(rect.iter().filter_map(|(axis, kept)| Some(((v, *axis), kept.size_of(whole(axis)?)?))));
            }
        }
        lengths
    }

    fn attention_nodes(&self) -> impl Iterator<Item = (NodeId, usize)> + '_ {
        self.graph.nodes().filter_map(|(id, node)| {
            let is_fused = ops::attention::is_fused_attention(node.domain(), node.op());
            let rank = self.facts.shape(node.output(0)?)?.len();
            match node.op() {
                // Rows are the axis before the one that is normalized.
                "Softmax" if rank >= 3 => Some((id, rank - 2)),
                _ if is_fused => Some((id, rank - 2)),
                _ => None,
            }
        })
    }

    /// Attention layers that have less queries.
    fn narrowed_attention(&self) -> Vec<NodeId> {
        let few = |(id, _): &(NodeId, usize)| {
            let Some(v) = self.graph.node(*id).output(0) else { return false };
            let rect = self.work.get(id).and_then(|w| w.outputs.get(&0));
            rect.is_some_and(|r| r.iter().any(|(axis, kept)| kept.share(self.size(v, *axis)) < 1.0))
        };
        self.attention_nodes().filter(few).map(|(id, _)| id).collect()
    }

    fn refused(&self, reason: String) -> Refused {
        let node = self.attention_nodes().last().map(|(id, _)| self.graph.label(id)).unwrap_or_default();
        Refused { what: What::Tokens, node, reason }
    }

    /// What needs all rows of the last attention: the first node on their way that does not treat them alike, or an output.
    fn why_not(&self) -> Refused {
        let Some((last, rows)) = self.attention_nodes().last() else {
            return self.refused("there is no attention".to_string());
        };
        let mut at: BTreeSet<(ValueId, usize)> = self.graph.node(last).output(0).map(|v| (v, rows)).into_iter().collect();
        for (id, node) in self.graph.nodes() {
            let reads = |(v, _): &&(ValueId, usize)| node.inputs().contains(&Some(*v));
            let Some((v, axis)) = at.iter().find(reads).copied() else { continue };
            if self.is_shape_only(id) {
                continue;
            }
            let Some(relations) = self.relations.get(&id) else {
                return self.refused(format!("{} ({}) needs all tokens", self.graph.label(id), node.op()));
            };
            let slot = (0..node.inputs().len()).find(|s| node.input(*s) == Some(v)).unwrap_or(0);
            let start = (Slot::In(slot), axis);
            let mut same = BTreeSet::from([start]);
            for _ in 0..3 {
                for link in &relations.links {
                    if let Link::Same(a, b) = link
                        && (same.contains(a) || same.contains(b))
                    {
                        same.extend([*a, *b]);
                    }
                }
            }
            let next = same.iter().filter_map(|(s, axis)| match s {
                Slot::Out(o) => node.output(*o).map(|v| (v, *axis)),
                Slot::In(_) | Slot::Virtual(_) => None,
            });
            let next: Vec<(ValueId, usize)> = next.collect();
            let said = Said { graph: self.graph, facts: self.facts, id, relations };
            let picks = relations.links.iter().any(|l| matches!(l, Link::Select { from, .. } if same.contains(from)))
                || said.picks_of_unknown_size().is_some_and(|(from, _)| same.contains(&from));
            if next.is_empty() && !picks {
                return self.refused(format!("{} ({}) needs all tokens", self.graph.label(id), node.op()));
            }
            at.extend(next);
        }
        let is_held = |v: &&ValueId| at.iter().any(|(x, _)| x == *v);
        match self.graph.outputs().iter().find(is_held) {
            Some(v) => self.refused(format!("output '{}' holds all tokens", self.graph.value(*v).name())),
            None => {
                let one = Rect::from([(rows, Kept::List(vec![0]))]);
                let reason = self.inputs_for(last, &BTreeMap::from([(0, one)])).err();
                self.refused(reason.unwrap_or_else(|| "something behind it needs all tokens".to_string()))
            }
        }
    }
}
