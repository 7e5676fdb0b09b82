//! Graph and gates -> Supernet: a training graph that any ONNX Runtime runs.
//!
//! Example: for an MLP group of 768 units whose sink is the second MatMul, the operand `[B, N, 768]` is multiplied by the input
//! `gate.mlp.0` `[768]` before the MatMul; the graph then also computes `loss` and `grad.gate.mlp.0` `[768]`.
//! Stages: rewrites that keep the function ([`rewrite`]), gates ([`gate`]), token masks ([`token`]), weights that become inputs
//! ([`params`]), then loss, gradients and update from `autodiff`.
//! Invariant: with all gates 1 the original outputs are the original's (contract C1); names of original inputs and outputs stay.

mod batch;
pub mod decompose;
mod decompose_attention;
mod from_anatomy;
pub mod gate;
pub mod params;
pub mod rewrite;
mod spread;
mod squares;
pub mod token;

use crate::autodiff::interface::{self, InputSpec, Role};
use crate::autodiff::loss::{self, Loss, Reduction};
use crate::autodiff::update::{self, AdamW, Trained};
use crate::autodiff::{AutodiffError, differentiate};
use crate::graph::build::Builder;
use crate::graph::{DType, DeclaredDim, Graph, Tensor, ValueId};
use crate::infer::{self, Facts, InferError};
pub use from_anatomy::gates_of;
use gate::Gates;
pub use gate::{GateGroup, GateSite};
pub use params::{Frozen, Param};
pub use squares::Squares;
use std::collections::BTreeMap;
pub use token::{TokenGate, TokenSite};

/// What trains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Train {
    /// Gates only.
    Gates,
    /// Gates, and scale and bias of normalizations.
    Norm,
    /// Gates and weights.
    All,
}

/// How a supernet is built.
#[derive(Clone, Debug)]
pub struct Options {
    /// Sets of groups, by id, that share one gate; each must have the same number of units.
    pub tied: Vec<Vec<String>>,
    /// Gates have a batch axis: [B, units]. The loss is then the sum over the batch, so that row b of a gradient is that of
    /// sample b alone.
    pub per_sample: bool,
    /// What trains.
    pub train: Train,
    /// What is minimized.
    pub loss: Loss,
    /// The outputs that the loss compares; empty for the default of [`loss::add`].
    pub loss_outputs: Vec<ValueId>,
    /// The optimizer in the graph; `None` to output gradients.
    pub optimizer: Option<AdamW>,
    /// Whether the optimizer keeps gates at 0 or above.
    pub gates_at_least_zero: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            tied: Vec::new(),
            per_sample: false,
            train: Train::Gates,
            loss: Loss::Ce,
            loss_outputs: Vec::new(),
            optimizer: None,
            gates_at_least_zero: false,
        }
    }
}

/// A gate input of the supernet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GateInput {
    /// Name of the input: `gate.<first group>`.
    pub input: String,
    /// The groups that it gates, more than one where tied.
    pub groups: Vec<String>,
    /// The kind of the first group: names the scalar `l1.<kind>`.
    pub kind: String,
    /// Number of units.
    pub units: usize,
}

/// A training graph.
#[derive(Clone, Debug)]
pub struct Supernet {
    /// The graph.
    pub graph: Graph,
    /// Its inputs in order.
    pub inputs: Vec<InputSpec>,
    /// Names of its outputs in order.
    pub outputs: Vec<String>,
    /// Its gates.
    pub gates: Vec<GateInput>,
    /// Trained weights with their values in the model.
    pub params: Vec<Param>,
    /// Constants that do not train although weights do.
    pub frozen: Vec<Frozen>,
}

/// Why a supernet could not be built.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SupernetError {
    /// Loss, gradient or optimizer.
    #[error(transparent)]
    Autodiff(#[from] AutodiffError),
    /// The graph with gates contradicts itself.
    #[error("shapes of the graph with gates: {0}")]
    Infer(#[from] InferError),
    /// A gate does not fit its operand.
    #[error("group '{group}' at node {node}: {reason}")]
    Site {
        /// The group's id.
        group: String,
        /// Label of the node that reads the operand.
        node: String,
        /// What does not fit.
        reason: String,
    },
    /// Groups that cannot share a gate.
    #[error("groups {groups:?} cannot share a gate: {reason}")]
    Tie {
        /// Their ids.
        groups: Vec<String>,
        /// Why.
        reason: String,
    },
    /// Options that exclude each other.
    #[error("{0} cannot be used with {1}")]
    Exclusive(&'static str, &'static str),
    /// There is nothing to train.
    #[error("nothing to train: the loss depends on no gate and no weight")]
    NothingToTrain,
}

/// Builds the training graph of a model.
///
/// `facts` are those of `graph`; groups and tokens name its nodes and values. Errors: see [`SupernetError`].
pub fn build(
    graph: &Graph,
    facts: &Facts,
    groups: &[GateGroup],
    tokens: &[TokenGate],
    options: &Options,
) -> Result<Supernet, SupernetError> {
    if options.per_sample && options.optimizer.is_some() {
        return Err(SupernetError::Exclusive("per-sample gates", "an optimizer in the graph"));
    }
    let model = (graph, facts);
    let mut graph = graph.clone();
    let mut inputs: Vec<(ValueId, Role)> = graph.inputs().iter().map(|v| (*v, Role::Input)).collect();
    let (candidates, frozen) = params::choose(&mut graph, facts, options.train);
    let gates = Gates::new(&mut graph, facts, groups, tokens, options)?;
    let weights: Vec<ValueId> = candidates.iter().map(params::Candidate::value).collect();
    gate::insert(&mut graph, model, groups, &gates, &weights)?;
    token::insert(&mut graph, model, tokens, &gates)?;
    rewrite::run(&mut graph);
    graph.sort();
    let facts = infer::facts(&graph)?;
    let reduction = if options.per_sample { Reduction::Sum } else { Reduction::Mean };
    // A mean whose count is adjusted gave its name and its place among the outputs away.
    let now = |v: &ValueId| model.0.outputs().iter().position(|o| o == v).map_or(*v, |at| graph.outputs()[at]);
    let loss_outputs: Vec<ValueId> = options.loss_outputs.iter().map(now).collect();
    let nodes = loss::add(&mut graph, &facts, options.loss, &loss_outputs, reduction)?;
    inputs.extend(&nodes.inputs);
    let params = params::make_inputs(&mut graph, nodes.loss, candidates)?;
    let total = add_l1(&mut graph, &gates, nodes.loss, &mut inputs)?;
    inputs.extend(gates.inputs.iter().map(|g| (g.value, Role::Gate)));
    inputs.extend(params.iter().map(|p| (p.value, Role::Param)));
    let forward = graph.order().to_vec();
    let trained = gradients(&mut graph, &gates, &params, total, options)?;
    if trained.is_empty() {
        return Err(SupernetError::NothingToTrain);
    }
    rewrite::recompute_gelu(&mut graph, &forward);
    finish(&mut graph, trained, total, &mut inputs, options)?;
    rewrite::factor_out(&mut graph);
    Ok(Supernet {
        inputs: inputs.iter().map(|(v, role)| spec(&graph, *v, *role)).collect(),
        outputs: graph.outputs().iter().map(|v| graph.value(*v).name().to_string()).collect(),
        gates: gates.inputs.into_iter().map(|g| g.spec).collect(),
        params: params.into_iter().map(|p| p.param).collect(),
        frozen,
        graph,
    })
}

/// `loss.l1 = sum_kind l1.kind * sum |gate|` and `loss = loss.task + loss.l1`, which is returned with both outputs named.
fn add_l1(graph: &mut Graph, gates: &Gates, task: ValueId, inputs: &mut Vec<(ValueId, Role)>) -> Result<ValueId, SupernetError> {
    let mut by_kind: BTreeMap<&str, Vec<ValueId>> = BTreeMap::new();
    for gate in &gates.inputs {
        by_kind.entry(&gate.spec.kind).or_default().push(gate.value);
    }
    let mut terms = Vec::new();
    for (kind, values) in by_kind {
        let weight = interface::add_input(graph, &format!("l1.{kind}"), DType::F32, vec![])?;
        inputs.push((weight, Role::Scalar));
        let mut b = Builder::new(graph, "l1.");
        for gate in values {
            let size = b.op("Abs", &[gate], vec![]);
            let axes: Vec<i64> = if gates.per_sample { vec![0, 1] } else { vec![0] };
            let sum = b.reduce_sum(size, &axes, false);
            terms.push(b.mul(sum, weight));
        }
    }
    let mut b = Builder::new(graph, "l1.");
    let l1 = match terms[..] {
        [] => b.scalar(DType::F32, 0.0),
        [one] => one,
        _ => b.op("Sum", &terms, vec![]),
    };
    let total = b.add(task, l1);
    interface::add_output(graph, total, "loss", vec![])?;
    interface::add_output(graph, task, "loss.task", vec![])?;
    interface::add_output(graph, l1, "loss.l1", vec![])?;
    Ok(total)
}

/// Gates and weights with their gradients. A gate on which the loss does not depend gets zeros; such a weight does not train.
fn gradients(
    graph: &mut Graph,
    gates: &Gates,
    params: &[params::ParamInput],
    loss: ValueId,
    options: &Options,
) -> Result<Vec<Trained>, SupernetError> {
    let facts = infer::facts(graph)?;
    let wrt: Vec<ValueId> = gates.inputs.iter().map(|g| g.value).chain(params.iter().map(|p| p.value)).collect();
    let grads = differentiate(graph, &facts, loss, &wrt)?;
    let mut trained = Vec::new();
    for (gate, grad) in gates.inputs.iter().zip(&grads) {
        let zeros = |graph: &mut Graph| {
            let zero = graph.add_initializer("grad.zero", Tensor::f32(&[], &[0.0]));
            graph.add_op("Mul", &[gate.value, zero], vec![], "grad.Mul")
        };
        trained.push(Trained {
            value: gate.value,
            grad: grad.unwrap_or_else(|| zeros(graph)),
            dims: vec![gate.spec.units],
            decay: false,
            at_least_zero: options.gates_at_least_zero,
        });
    }
    for (param, grad) in params.iter().zip(&grads[gates.inputs.len()..]) {
        trained.extend(grad.map(|grad| Trained {
            value: param.value,
            grad,
            dims: param.param.initial.dims.clone(),
            decay: param.param.decay,
            at_least_zero: false,
        }));
    }
    Ok(trained)
}

/// Adds gradients or the update as outputs, and removes what no output needs.
fn finish(
    graph: &mut Graph,
    trained: Vec<Trained>,
    loss: ValueId,
    inputs: &mut Vec<(ValueId, Role)>,
    options: &Options,
) -> Result<(), SupernetError> {
    match &options.optimizer {
        None => {
            for t in &trained {
                let name = format!("grad.{}", graph.value(t.value).name());
                let declared = graph.value(t.value).declared().and_then(|d| d.dims.clone()).unwrap_or_default();
                interface::add_output(graph, t.grad, &name, declared)?;
            }
        }
        Some(adam) => {
            let grads: Vec<ValueId> = trained.iter().map(|t| t.grad).collect();
            graph.remove_dead(&|_, v| grads.contains(&v));
            let update = update::add(graph, adam, loss, &trained)?;
            inputs.extend(update.inputs);
        }
    }
    graph.remove_dead(&|_, _| false);
    graph.sort();
    Ok(())
}

fn spec(graph: &Graph, value: ValueId, role: Role) -> InputSpec {
    let declared = graph.value(value).declared();
    let shape: Vec<DeclaredDim> = declared.and_then(|d| d.dims.clone()).unwrap_or_default();
    let dtype = declared.and_then(|d| d.dtype).unwrap_or(DType::F32);
    InputSpec { name: graph.value(value).name().to_string(), shape, dtype, role }
}
