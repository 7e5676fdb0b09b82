//! Gates: inputs of the supernet that multiply the operand of a sink.
//!
//! Example: group `qk.3` of 3 heads x 64 gates the operand q `[B, 3, N, 64]` over axes 1 and 3: its gate `[192]`, reshaped to
//! `[3, 1, 64]`, multiplies q. Where the gate covers its axis unit by unit, it costs one Mul and nothing else.
//! Several gates of one operand are first multiplied with each other, since they are small.

use super::spread::{Fill, Place};
use super::token::TokenGate;
use super::{GateInput, Options, SupernetError};
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

/// Multiplies every site's operand with its gates; equal operands with equal gates share one product.
pub(super) fn insert(
    graph: &mut Graph,
    model: (&Graph, &Facts),
    groups: &[GateGroup],
    gates: &Gates,
) -> Result<(), SupernetError> {
    let mut by_use: BTreeMap<Use, Vec<(&GateGroup, &GateSite)>> = BTreeMap::new();
    for group in groups {
        for site in &group.sites {
            by_use.entry(site.value_use).or_default().push((group, site));
        }
    }
    let mut done: BTreeMap<(ValueId, Factors), ValueId> = BTreeMap::new();
    for (at, sites) in by_use {
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
    Ok(())
}

fn site_error(graph: &Graph, group: &GateGroup, at: Use, reason: String) -> SupernetError {
    SupernetError::Site { group: group.id.clone(), node: graph.label(at.node), reason }
}

fn gate_operand<'a>(
    graph: &mut Graph,
    model: (&Graph, &Facts),
    gates: &Gates,
    operand: ValueId,
    sites: &[(&'a GateGroup, &GateSite)],
) -> Result<ValueId, (&'a GateGroup, String)> {
    let (model, facts) = model;
    let dtype = facts.get(operand).dtype.unwrap_or(DType::F32);
    let mut whole: Option<ValueId> = None;
    let mut operand_now = operand;
    for (group, site) in sites {
        let shape = facts.shape(operand).ok_or((*group, "the operand's rank is unknown".to_string()))?;
        let (axes, index, batch) = (&site.axes, &site.index, gates.batch_of_gates());
        let place = Place { model, facts, operand, shape, axes, index, units: group.units, batch };
        let mut b = Builder::new(graph, "gate.");
        let spread = place.spread(&mut b, gates.of(&group.id), Fill::One).map_err(|reason| (*group, reason))?;
        let factor = if dtype == DType::F32 { spread.value } else { b.cast(spread.value, dtype) };
        match spread.split {
            None => whole = Some(whole.map_or(factor, |w| b.mul(w, factor))),
            Some(split) => {
                let parts = b.reshape(operand_now, &split.apart);
                let product = b.mul(parts, factor);
                operand_now = b.reshape(product, &split.together);
            }
        }
    }
    Ok(match whole {
        Some(factor) => Builder::new(graph, "gate.").mul(operand_now, factor),
        None => operand_now,
    })
}
