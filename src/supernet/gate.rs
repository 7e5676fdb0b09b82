//! Gates: inputs of the supernet that multiply the operand of a sink.
//!
//! Example: group `qk.3` of 3 heads x 64 gates the operand q `[B, 3, N, 64]` over axes 1 and 3: its gate `[192]`, reshaped to
//! `[3, 1, 64]`, multiplies q. Where the gate covers its axis unit by unit, it costs one Mul and nothing else.
//! Several gates of one operand are first multiplied with each other, since they are small.
//! Where a weight trains, the gate of the axis that it contracts multiplies the weight: `(x g) W = x (g W)`. The gradient of W is
//! computed anyway, W is smaller than x, and no second x is kept for the backward pass (a tenth of a DeiT's activations).

use super::spread::{Fill, Place};
use super::token::TokenGate;
use super::{GateInput, Options, SupernetError, rewrite};
use crate::autodiff::interface;
use crate::graph::build::Builder;
use crate::graph::{DType, DeclaredDim, Graph, Use, ValueId};
use crate::infer::{Dim, Facts};
use std::collections::BTreeMap;

/// One operand that a gate multiplies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GateSite {
    /// The sink and which of its inputs.
    pub value_use: Use,
    /// Axes of the operand over which the gate extends, increasing. Where the first is larger than `index` says (a batch in
    /// front of the heads: [B*H, N, E]), the gate repeats along it.
    pub axes: Vec<usize>,
    /// For each position of the axes' row-major product: the unit that multiplies it; `None` where nothing does.
    pub index: Vec<Option<u32>>,
}

/// A group with the places of its gate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GateGroup {
    /// Its id.
    pub id: String,
    /// Its kind: `mlp`, `qk`, `vo`, `head`, `channel`.
    pub kind: String,
    /// Number of units.
    pub units: usize,
    /// Where its gate enters.
    pub sites: Vec<GateSite>,
}

/// A gate input in the graph.
pub(super) struct GateValue {
    pub(super) value: ValueId,
    pub(super) spec: GateInput,
}

/// All gate inputs.
pub(super) struct Gates {
    pub(super) inputs: Vec<GateValue>,
    by_group: BTreeMap<String, usize>,
    pub(super) per_sample: bool,
    pub(super) batch: Option<Dim>,
}

impl Gates {
    /// Adds one graph input per group, or per tied set of groups.
    pub(super) fn new(
        graph: &mut Graph,
        facts: &Facts,
        groups: &[GateGroup],
        tokens: &[TokenGate],
        options: &Options,
    ) -> Result<Self, SupernetError> {
        let batch = graph.inputs().first().and_then(|v| facts.shape(*v)).and_then(|s| s.first().cloned());
        let mut gates = Self { inputs: Vec::new(), by_group: BTreeMap::new(), per_sample: options.per_sample, batch };
        let all = groups.iter().map(|g| (&g.id, g.kind.as_str(), g.units));
        for (id, kind, units) in all.chain(tokens.iter().map(|t| (&t.id, "token", t.units))) {
            gates.add(graph, options, id, kind, units)?;
        }
        Ok(gates)
    }

    fn add(&mut self, graph: &mut Graph, options: &Options, id: &str, kind: &str, units: usize) -> Result<(), SupernetError> {
        let tie = options.tied.iter().find(|set| set.iter().any(|g| g == id));
        let shared = tie.and_then(|set| set.iter().find_map(|g| self.by_group.get(g))).copied();
        if let (Some(at), Some(set)) = (shared, tie) {
            let first = &mut self.inputs[at].spec;
            if first.units != units {
                let reason = format!("'{}' has {} units, '{id}' has {units}", first.groups[0], first.units);
                return Err(SupernetError::Tie { groups: set.clone(), reason });
            }
            first.groups.push(id.to_string());
            self.by_group.insert(id.to_string(), at);
            return Ok(());
        }
        let mut dims = vec![DeclaredDim::Size(units as i64)];
        if self.per_sample {
            dims.insert(0, self.batch.as_ref().map_or(DeclaredDim::Symbol(String::new()), interface::declared_dim));
        }
        let input = format!("gate.{id}");
        let value = interface::add_input(graph, &input, DType::F32, dims)?;
        self.by_group.insert(id.to_string(), self.inputs.len());
        let spec = GateInput { input, groups: vec![id.to_string()], kind: kind.to_string(), units };
        self.inputs.push(GateValue { value, spec });
        Ok(())
    }

    /// The gate input of a group.
    pub(super) fn of(&self, group: &str) -> ValueId {
        self.inputs[self.by_group[group]].value
    }

    /// The batch, where gates have one.
    pub(super) fn batch_of_gates(&self) -> Option<&Dim> {
        if self.per_sample { self.batch.as_ref() } else { None }
    }
}

/// What multiplies one operand: gate, axes, index.
type Factors = Vec<(ValueId, Vec<usize>, Vec<Option<u32>>)>;

/// Multiplies every site's operand with its gates; equal operands with equal gates share one product. `weights` are the
/// constants that will train.
pub(super) fn insert(
    graph: &mut Graph,
    model: (&Graph, &Facts),
    groups: &[GateGroup],
    gates: &Gates,
    weights: &[ValueId],
) -> Result<(), SupernetError> {
    let facts = model.1;
    let mut by_use: BTreeMap<Use, Vec<(&GateGroup, GateSite)>> = BTreeMap::new();
    for group in groups {
        for site in &group.sites {
            by_use.entry(site.value_use).or_default().push((group, site.clone()));
        }
    }
    let mut done: BTreeMap<(ValueId, Factors), ValueId> = BTreeMap::new();
    for (mut at, mut sites) in by_use {
        if let Some((weight, axis)) = weight_side(graph, facts, at, &sites).filter(|_| !gates.per_sample)
            && graph.node(weight.node).input(weight.slot).is_some_and(|w| weights.contains(&w))
        {
            at = weight;
            sites.iter_mut().for_each(|(_, site)| site.axes = vec![axis]);
        }
        let factors = sites.iter().map(|(g, s)| (gates.of(&g.id), s.axes.clone(), s.index.clone())).collect();
        let Some(operand) = graph.node(at.node).input(at.slot) else {
            return Err(site_error(graph, sites[0].0, at, format!("it has no input {}", at.slot)));
        };
        let key = (operand, factors);
        let gated = match done.get(&key) {
            Some(value) => *value,
            None => {
                let value = gate_operand(graph, model, gates, operand, &sites)
                    .map_err(|(group, reason)| site_error(graph, group, at, reason))?;
                done.insert(key, value);
                value
            }
        };
        graph.set_input(at, Some(gated));
    }
    // A scale that went into a gate left its product behind, which must not be taken for part of the network.
    graph.remove_dead(&|_, _| false);
    Ok(())
}

/// The other operand of a product with a matrix, and its axis that is contracted, where all gates lie on just that axis.
fn weight_side(graph: &Graph, facts: &Facts, at: Use, sites: &[(&GateGroup, GateSite)]) -> Option<(Use, usize)> {
    let node = graph.node(at.node);
    let transposed = |name: &str| node.attr_int(name).unwrap_or(0) != 0;
    let rank = shape_of(graph, facts, node.input(0)?)?.len();
    let (own, other) = match node.op() {
        "MatMul" => (rank.checked_sub(1)?, 0),
        "Gemm" => (usize::from(!transposed("transA")), usize::from(transposed("transB"))),
        _ => return None,
    };
    let weight = shape_of(graph, facts, node.input(1)?)?;
    let fits = |site: &GateSite| site.axes == [own] && weight[other].is(site.index.len() as i64);
    let all = at.slot == 0 && node.domain().is_empty() && weight.len() == 2 && sites.iter().all(|(_, s)| fits(s));
    all.then_some((Use { node: at.node, slot: 1 }, other))
}

/// Constants are looked at themselves: copies of merged ones are younger than the facts.
fn shape_of(graph: &Graph, facts: &Facts, value: ValueId) -> Option<Vec<Dim>> {
    match graph.constant(value) {
        Some(tensor) => Some(tensor.dims.iter().map(|d| Dim::from(*d as i64)).collect()),
        None => facts.shape(value).map(<[Dim]>::to_vec),
    }
}

fn site_error(graph: &Graph, group: &GateGroup, at: Use, reason: String) -> SupernetError {
    SupernetError::Site { group: group.id.clone(), node: graph.label(at.node), reason }
}

fn gate_operand<'a>(
    graph: &mut Graph,
    model: (&Graph, &Facts),
    gates: &Gates,
    operand: ValueId,
    sites: &[(&'a GateGroup, GateSite)],
) -> Result<ValueId, (&'a GateGroup, String)> {
    let (model, facts) = model;
    let constant = graph.constant(operand).map(|tensor| tensor.dtype);
    let dtype = constant.or_else(|| facts.get(operand).dtype).unwrap_or(DType::F32);
    if !dtype.is_float() {
        return Err((sites[0].0, format!("its operand is {}: quantized numbers take no gate", dtype.name())));
    }
    let shape = shape_of(graph, facts, operand).ok_or((sites[0].0, "the operand's rank is unknown".to_string()))?;
    let mut whole: Option<ValueId> = None;
    let mut operand_now = operand;
    for (group, site) in sites {
        let (axes, index, batch) = (&site.axes, &site.index, gates.batch_of_gates());
        let place = Place { model, facts, operand, shape: &shape, axes, index, units: group.units, batch };
        let mut b = Builder::new(graph, "gate.");
        let spread = place.spread(&mut b, gates.of(&group.id), Fill::One).map_err(|reason| (*group, reason))?;
        let factor = if dtype == DType::F32 { spread.value } else { b.cast(spread.value, dtype) };
        match spread.split {
            None => whole = Some(whole.map_or(factor, |w| b.mul(w, factor))),
            Some(split) => {
                let parts = split.apart(&mut b, operand_now);
                let product = b.mul(parts, factor);
                operand_now = split.together(&mut b, product, operand_now);
            }
        }
    }
    let Some(mut factor) = whole else { return Ok(operand_now) };
    if let Some((x, scale)) = scaled_by_number(graph, facts, operand_now) {
        factor = Builder::new(graph, "gate.").mul(factor, scale);
        operand_now = x;
    }
    Ok(Builder::new(graph, "gate.").mul(operand_now, factor))
}

/// x and s where `value` is `x s`, s is a single number, and nothing but the sink reads it: s then goes into the gate, which is
/// smaller than x. Attention scales q so. The half of GELU stays where it is: [`rewrite`] finds a better place for it.
fn scaled_by_number(graph: &Graph, facts: &Facts, value: ValueId) -> Option<(ValueId, ValueId)> {
    let (id, _) = graph.value(value).producer()?;
    let node = graph.node(id);
    let single = graph.value(value).users().len() == 1 && !graph.outputs().contains(&value);
    if node.op() != "Mul" || !node.domain().is_empty() || !single || rewrite::is_gelu(graph, id) {
        return None;
    }
    let (a, b) = (node.input(0)?, node.input(1)?);
    let rank = shape_of(graph, facts, value)?.len();
    let is_number = |v: ValueId| shape_of(graph, facts, v).is_some_and(|s| s.len() < rank && s.iter().all(|d| d.is(1)));
    match (is_number(a), is_number(b)) {
        (false, true) => Some((a, b)),
        (true, false) => Some((b, a)),
        _ => None,
    }
}
