//! Asks every operator for its relations, and decides which value each of them speaks of.
//!
//! A constant that several nodes combine with data is private to each reader (its own [`Carrier`]) unless it is contracted there: two layers
//! that share one zero bias are not tied by it, two layers that share one weight matrix are. So is what is computed from positions
//! (rotary tables for the position ids of the run) where data is multiplied with it.

use crate::axes::relation::{AxesCx, Blocks, FusedAttention, Link, Relations, Slot};
use crate::graph::{DType, Graph, Id, NodeId, SideMap, Use, ValueId};
use crate::infer::{Dim, Facts};
use crate::ops::{self, Axes as AxesRule};
use std::collections::BTreeMap;

/// What has axes: a value, a constant as one of its readers sees it, or a value inside an operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Of {
    /// A value.
    Value(ValueId),
    /// A shared constant, or what is computed from positions, as this reader sees it.
    Private(ValueId, Use),
    /// A value that an operator computes inside itself.
    Virtual(NodeId, usize),
}

/// Something with axes.
#[derive(Clone, Debug)]
pub struct Carrier {
    /// What it is.
    pub of: Of,
    /// Its shape.
    pub shape: Vec<Dim>,
    /// Whether its content depends on constants, shapes and positions alone.
    pub constant: bool,
}

/// Index of a carrier.
pub type CarrierId = usize;
/// An axis of a carrier.
pub type AxisOf = (CarrierId, usize);

/// A relation, with carriers in the place of slots.
#[derive(Clone, Debug)]
pub(super) enum Relation {
    /// Equal row-major products.
    Product(Vec<AxisOf>, Vec<AxisOf>),
    /// `to[at + j] = from[index[j]]`.
    Select { from: AxisOf, to: AxisOf, index: Vec<usize>, at: usize },
}

/// The two slots of a node that a relation is between, in order. A value may enter a node twice, and each entry has its own relations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ends {
    pub(super) node: NodeId,
    first: Slot,
    second: Slot,
}

impl Ends {
    fn new(node: NodeId, a: Slot, b: Slot) -> Self {
        Self { node, first: a.min(b), second: a.max(b) }
    }

    /// The slots.
    pub(super) fn slots(self) -> [Slot; 2] {
        [self.first, self.second]
    }
}

/// Where a factor is summed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SinkSite {
    /// The node.
    pub node: NodeId,
    /// The operand's slot, and the axis of it.
    pub a: (Slot, usize),
    /// The other operand's, where products are summed.
    pub b: Option<(Slot, usize)>,
}

/// Why an axis cannot be cut.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Barrier {
    /// The node, where it is one; graph inputs and outputs have none.
    pub node: Option<NodeId>,
    /// The axis of the value there.
    pub axis: usize,
    /// The reason.
    pub reason: String,
}

/// Everything the operators say.
pub(super) struct Collected {
    pub(super) carriers: Vec<Carrier>,
    pub(super) relations: Vec<(Ends, Relation)>,
    pub(super) barriers: Vec<(AxisOf, Barrier)>,
    pub(super) sinks: Vec<(AxisOf, SinkSite)>,
    /// Axes that are stored in blocks.
    pub(super) blocks: Vec<(AxisOf, NodeId, Blocks)>,
    /// Axes whose removed positions must hold zero, with the barrier that they are otherwise.
    pub(super) vanishing: Vec<(AxisOf, Barrier)>,
    /// Carrier of each input slot of each node.
    pub(super) inputs: SideMap<NodeId, Vec<Option<CarrierId>>>,
    /// First virtual carrier of each node.
    pub(super) virtuals: SideMap<NodeId, usize>,
    /// Nodes that compute the whole of attention.
    pub(super) attention: BTreeMap<NodeId, FusedAttention>,
}

/// What values depend on.
struct Origins {
    /// On what is fed in, and not on shapes and constants alone.
    data: SideMap<ValueId, bool>,
    /// On integers that are fed in, and on no product of matrices.
    positions: SideMap<ValueId, bool>,
}

/// Values whose content depends on what is fed in, and not on shapes and constants alone.
pub fn depends_on_data(graph: &Graph) -> SideMap<ValueId, bool> {
    let mut depends = SideMap::filled(graph.value_count(), false);
    for v in graph.inputs() {
        depends[*v] = true;
    }
    for (_, node) in graph.nodes() {
        let shape_only = ops::rule_of(graph, node).is_some_and(|r| matches!(r.axes, AxesRule::ShapeOnly));
        let any = node.inputs().iter().flatten().chain(node.captures()).any(|v| depends[*v]);
        for v in node.outputs().iter().flatten() {
            depends[*v] = any && !shape_only;
        }
    }
    depends
}

pub(super) fn collect(graph: &Graph, facts: &Facts) -> Collected {
    let mut origins = Origins { data: depends_on_data(graph), positions: SideMap::filled(graph.value_count(), false) };
    for v in graph.inputs() {
        origins.positions[*v] = matches!(facts.get(*v).dtype, Some(DType::I64 | DType::I32));
    }
    let carriers = graph
        .values()
        .map(|(id, _)| Carrier { of: Of::Value(id), shape: facts.shape(id).unwrap_or(&[]).to_vec(), constant: !origins.data[id] })
        .collect();
    let mut all = Collected {
        carriers,
        relations: Vec::new(),
        barriers: Vec::new(),
        sinks: Vec::new(),
        blocks: Vec::new(),
        vanishing: Vec::new(),
        inputs: SideMap::filled(graph.node_capacity(), Vec::new()),
        virtuals: SideMap::filled(graph.node_capacity(), 0),
        attention: BTreeMap::new(),
    };
    for v in graph.inputs() {
        all.bar_all(v.index(), None, "graph input");
    }
    for v in graph.outputs() {
        all.bar_all(v.index(), None, "graph output");
    }
    let said: Vec<(NodeId, Said)> = graph.nodes().map(|(id, _)| (id, said(graph, facts, id))).collect();
    let weights = weights(graph, &said, &origins.data);
    for (id, relations) in said {
        all.node(graph, facts, id, relations, &weights, &mut origins);
    }
    all
}

/// What an operator says of its axes: nothing where it reads shapes alone, or why they are barriers.
type Said = Option<Result<Relations, String>>;

fn said(graph: &Graph, facts: &Facts, id: NodeId) -> Said {
    let node = graph.node(id);
    let opset = graph.opset(node.domain()).unwrap_or(0);
    let ranks_known = node.inputs().iter().chain(node.outputs()).flatten().all(|v| facts.shape(*v).is_some());
    match ops::rule_of(graph, node).map(|r| &r.axes) {
        Some(AxesRule::ShapeOnly) => None,
        Some(AxesRule::Rule(rule)) if ranks_known => Some(Ok(rule(&AxesCx { graph, facts, node, id, opset }))),
        Some(AxesRule::Rule(_)) => Some(Err("a shape here is not known".to_string())),
        Some(AxesRule::Barrier(reason)) => Some(Err((*reason).to_string())),
        None => Some(Err(ops::why_unknown(graph, node))),
    }
}

fn contracts(relations: &Relations, slot: usize) -> bool {
    let at = Slot::In(slot);
    relations.links.iter().any(|l| matches!(l, Link::Contract((a, _), (b, _)) if *a == at || *b == at))
}

fn takes_parts(relations: &Relations, slot: usize) -> bool {
    relations.links.iter().any(|l| matches!(l, Link::Select { from: (a, _), .. } if *a == Slot::In(slot)))
}

/// Constants that some reader contracts, at once or behind nodes that only pass them on: an Identity for each use, where an exporter
/// merged equal tensors, or a Transpose.
fn weights(graph: &Graph, said: &[(NodeId, Said)], depends: &SideMap<ValueId, bool>) -> SideMap<ValueId, bool> {
    let mut weights = SideMap::filled(graph.value_count(), false);
    for (id, relations) in said.iter().rev() {
        let Some(Ok(relations)) = relations else { continue };
        let node = graph.node(*id);
        let behind = node.outputs().iter().flatten().any(|v| weights[*v]) && passes_one(relations);
        for (slot, v) in node.inputs().iter().enumerate() {
            if let Some(v) = v.filter(|v| !depends[*v]) {
                weights[v] |= contracts(relations, slot) || behind;
            }
        }
    }
    weights
}

/// Whether the node only passes one of its inputs on.
fn passes_one(relations: &Relations) -> bool {
    let mut from = None;
    relations.links.iter().all(|l| match l {
        Link::Same((a, _), (Slot::Out(_), _)) | Link::Regroup((a, _), (Slot::Out(_), _)) => *from.get_or_insert(*a) == *a,
        Link::Unread(_) => true,
        _ => false,
    })
}

impl Collected {
    /// The carrier behind a slot of a node; none of a node that was added since.
    pub(super) fn carrier(&self, graph: &Graph, node: NodeId, slot: Slot) -> Option<CarrierId> {
        match slot {
            Slot::In(i) => self.inputs.get(node)?.get(i).copied().flatten(),
            Slot::Out(o) => graph.node(node).output(o).map(Id::index),
            Slot::Virtual(v) => Some(self.virtuals[node] + v),
        }
    }

    fn bar_all(&mut self, carrier: CarrierId, node: Option<NodeId>, reason: &str) {
        for axis in 0..self.carriers[carrier].shape.len() {
            self.barriers.push(((carrier, axis), Barrier { node, axis, reason: reason.to_string() }));
        }
    }

    fn node(
        &mut self,
        graph: &Graph,
        facts: &Facts,
        id: NodeId,
        relations: Said,
        weights: &SideMap<ValueId, bool>,
        origins: &mut Origins,
    ) {
        let node = graph.node(id);
        // A weight is one weight for all its readers, and so are the parts that are sliced from a packed one. Readers that only pass
        // a constant on (an Identity for each layer, where an exporter merged equal biases) tie those behind them if it is a weight.
        let is_weight = |slot: usize| node.input(slot).is_some_and(|v| weights[v]);
        let one_for_all = |slot: usize| is_weight(slot) || matches!(&relations, Some(Ok(r)) if takes_parts(r, slot));
        let sums = matches!(&relations, Some(Ok(r)) if r.links.iter().any(|l| match l {
            Link::Contract((Slot::In(slot), axis), _) => {
                !node.input(*slot).and_then(|v| facts.shape(v)?.get(*axis)).is_some_and(|d| d.is(1))
            }
            Link::Contract(..) => true,
            _ => false,
        }));
        let of_positions = |v: &ValueId| !origins.data[*v] || origins.positions[*v];
        let only_positions = !sums && matches!(relations, Some(Ok(_))) && node.inputs().iter().flatten().all(of_positions);
        for v in node.outputs().iter().flatten() {
            origins.positions[*v] = only_positions && origins.data[*v];
        }
        let inputs = node.inputs().iter().enumerate();
        let inputs = inputs.map(|(slot, v)| v.map(|v| self.reader(graph, v, Use { node: id, slot }, one_for_all(slot), origins)));
        self.inputs[id] = inputs.collect();
        match relations {
            None => {}
            Some(Err(reason)) => {
                let touched: Vec<CarrierId> = self.inputs[id].iter().flatten().copied().collect();
                for carrier in touched.into_iter().chain(node.captures().iter().map(|v| v.index())) {
                    self.bar_all(carrier, Some(id), &reason);
                }
                for v in node.outputs().iter().flatten() {
                    self.bar_all(v.index(), Some(id), &reason);
                }
            }
            Some(Ok(relations)) => self.relations_of(graph, id, relations),
        }
    }

    /// The carrier that a reader sees.
    fn reader(&mut self, graph: &Graph, v: ValueId, at: Use, one_for_all: bool, origins: &Origins) -> CarrierId {
        let (value, node) = (graph.value(v), graph.node(at.node));
        let shared = value.users().len() > 1 || graph.outputs().contains(&v);
        let private = if origins.data[v] {
            let of_data = node.outputs().iter().flatten().any(|o| origins.data[*o] && !origins.positions[*o]);
            origins.positions[v] && of_data && ops::is_factor(node.domain(), node.op(), at.slot)
        } else {
            shared && !one_for_all
        };
        if !private {
            return v.index();
        }
        let shape = self.carriers[v.index()].shape.clone();
        self.carriers.push(Carrier { of: Of::Private(v, at), shape, constant: true });
        self.carriers.len() - 1
    }

    fn relations_of(&mut self, graph: &Graph, id: NodeId, relations: Relations) {
        self.virtuals[id] = self.carriers.len();
        self.attention.extend(relations.attention.map(|a| (id, a)));
        for (n, shape) in relations.virtuals.into_iter().enumerate() {
            let constant = relations.constant_virtuals.contains(&n);
            self.carriers.push(Carrier { of: Of::Virtual(id, n), shape, constant });
        }
        let mut touched = std::collections::BTreeSet::new();
        for link in relations.links {
            self.link(graph, id, link, &mut touched);
        }
        // What a rule does not speak of is not understood: it must not be cut.
        let node = graph.node(id);
        let inputs = (0..node.inputs().len()).map(Slot::In);
        let outputs = (0..node.outputs().len()).map(Slot::Out);
        for slot in inputs.chain(outputs) {
            let Some(carrier) = self.carrier(graph, id, slot) else { continue };
            for axis in 0..self.carriers[carrier].shape.len() {
                if !touched.contains(&(carrier, axis)) && !self.carriers[carrier].shape[axis].is(1) {
                    let reason = format!("{} does not carry this axis on", node.op());
                    self.barriers.push(((carrier, axis), Barrier { node: Some(id), axis, reason }));
                }
            }
        }
    }

    fn link(&mut self, graph: &Graph, id: NodeId, link: Link, touched: &mut std::collections::BTreeSet<AxisOf>) {
        let at = |(slot, axis): (Slot, usize)| self.carrier(graph, id, slot).map(|c| (c, axis));
        let many = |(slot, axes): &(Slot, Vec<usize>)| -> Option<Vec<AxisOf>> {
            self.carrier(graph, id, *slot).map(|c| axes.iter().map(|a| (c, *a)).collect())
        };
        match link {
            Link::Same(a, b) => {
                let ends = Ends::new(id, a.0, b.0);
                if let (Some(a), Some(b)) = (at(a), at(b)) {
                    touched.extend([a, b]);
                    self.relations.push((ends, Relation::Product(vec![a], vec![b])));
                }
            }
            Link::Contract(a, b) => {
                let site = SinkSite { node: id, a, b: Some(b) };
                let ends = Ends::new(id, a.0, b.0);
                if let (Some(a), Some(b)) = (at(a), at(b)) {
                    touched.extend([a, b]);
                    self.relations.push((ends, Relation::Product(vec![a], vec![b])));
                    self.sinks.push((a, site));
                }
            }
            Link::Sum(a) => {
                if let Some(x) = at(a) {
                    touched.insert(x);
                    self.sinks.push((x, SinkSite { node: id, a, b: None }));
                }
            }
            Link::Regroup(a, b) => {
                let ends = Ends::new(id, a.0, b.0);
                if let (Some(a), Some(b)) = (many(&a), many(&b)) {
                    touched.extend(a.iter().chain(&b).copied());
                    self.relations.push((ends, Relation::Product(a, b)));
                }
            }
            Link::Select { from, to, index, at: offset } => {
                let ends = Ends::new(id, from.0, to.0);
                if let (Some(from), Some(to)) = (at(from), at(to)) {
                    touched.extend([from, to]);
                    self.relations.push((ends, Relation::Select { from, to, index, at: offset }));
                }
            }
            Link::Unread(a) => touched.extend(at(a)),
            // What becomes of the positions is for other links to say.
            Link::Vanish(a, reason) => {
                self.vanishing.extend(at(a).map(|x| (x, Barrier { node: Some(id), axis: a.1, reason })));
            }
            Link::Blocks(a, blocks) => self.blocks.extend(at(a).map(|x| (x, id, blocks))),
            Link::Barrier(a, reason) => {
                if let Some(x) = at(a) {
                    touched.insert(x);
                    self.barriers.push((x, Barrier { node: Some(id), axis: a.1, reason }));
                }
            }
        }
    }
}
