//! Supernet -> the graph of one training step, whose state stays where it runs.
//!
//! To the supernet's loss and gradients this adds: sums of gradients over several passes (`acc.<x>`), AdamW, another rate for the
//! gates than for the weights, moving averages (`ema.<x>`), and the share of gates near zero. Example: with `gate.mlp.0` [384] the
//! graph has inputs `gate.mlp.0`, `adam.m.gate.mlp.0`, `adam.v.gate.mlp.0`, outputs `next.` of each, and `near_zero.mlp` [].
//! Invariant: an output `next.<x>` may be written where `<x>` stands. AdamW sees to it for its own nodes; what is added here reads
//! `<x>` only in the node that makes `next.<x>`, or in nodes that this node waits for.

use super::SearchError;
use crate::autodiff::interface::{self, Role};
use crate::autodiff::update::{self, AdamW, Trained};
use crate::graph::build::{Builder, attr};
use crate::graph::{AttrValue, DType, DeclaredDim, Graph, ValueId};
use crate::onnx;
use crate::supernet::{GateInput, Param, Supernet};
use bytes::Bytes;
use std::collections::BTreeMap;

/// A gate below this in size counts as near zero.
pub const NEAR_ZERO: f32 = 0.05;

/// How the step is built.
#[derive(Clone, Debug)]
pub(crate) struct StepOptions {
    pub(crate) adam: AdamW,
    /// Rate of the gates over that of the weights.
    pub(crate) gate_rate: f32,
    /// Passes of one step.
    pub(crate) accumulate: usize,
    pub(crate) ema: Option<f32>,
}

/// A tensor that lives in the session.
#[derive(Clone, Debug)]
pub(crate) struct StateTensor {
    /// Name of the input; the output is `next.<name>`.
    pub(crate) name: String,
    pub(crate) dims: Vec<usize>,
    /// Its first value; zeros where there is none.
    pub(crate) initial: Option<Vec<f32>>,
    /// Whether a step overwrites it.
    pub(crate) changes: bool,
    /// Whether a checkpoint holds it.
    pub(crate) kept: bool,
}

/// The graph of one step.
pub(crate) struct StepGraph {
    pub(crate) bytes: Bytes,
    pub(crate) state: Vec<StateTensor>,
    pub(crate) gates: Vec<GateInput>,
    pub(crate) params: Vec<Param>,
    /// Names of the outputs to be fetched: loss, loss.task, loss.l1, grad.norm, near_zero.<kind> ..
    pub(crate) fetch: Vec<String>,
    pub(crate) accumulate: usize,
    pub(crate) targets: Vec<String>,
    pub(crate) has_labels: bool,
}

/// Scalars and the graph while it is put together.
struct Parts {
    graph: Graph,
    /// bool []: whether this pass ends a step; where there is one pass per step, there is none.
    apply: Option<ValueId>,
    state: Vec<StateTensor>,
}

/// Adds the step to a supernet without an optimizer.
pub(crate) fn build(net: Supernet, options: &StepOptions) -> Result<StepGraph, SearchError> {
    let of_role = |role: Role| net.inputs.iter().filter(move |i| i.role == role).map(|i| i.name.clone());
    let targets: Vec<String> = of_role(Role::Target).collect();
    let has_labels = of_role(Role::Labels).next().is_some();
    let mut parts = Parts { graph: net.graph, apply: None, state: Vec::new() };
    let loss = parts.find("loss")?;
    let trained = parts.trained(&net.gates, &net.params)?;
    let mut fetch: Vec<String> = ["loss", "loss.task", "loss.l1"].map(String::from).to_vec();
    parts.keep_outputs(&fetch)?;
    let trained = if options.accumulate > 1 { parts.accumulate(trained, options.accumulate)? } else { trained };
    update::add(&mut parts.graph, &options.adam, loss, &trained).map_err(crate::supernet::SupernetError::from)?;
    fetch.push("grad.norm".to_string());
    let names: Vec<String> = trained.iter().map(|t| parts.graph.value(t.value).name().to_string()).collect();
    for (name, t) in names.iter().zip(&trained) {
        if name.starts_with("gate.") {
            parts.scale_move(name, t.value, options.gate_rate)?;
        }
        if let Some(decay) = options.ema {
            parts.average(name, t, decay)?;
        }
        parts.hold(name, t)?;
    }
    fetch.extend(parts.count_near_zero(&net.gates)?);
    parts.list_state(&net.gates, &net.params, &names);
    let mut graph = parts.graph;
    graph.remove_dead(&|_, _| false);
    graph.sort();
    let bytes = onnx::to_bytes(&graph)?;
    let (state, gates, params) = (parts.state, net.gates, net.params);
    Ok(StepGraph { bytes, state, gates, params, fetch, accumulate: options.accumulate, targets, has_labels })
}

impl Parts {
    fn find(&self, name: &str) -> Result<ValueId, SearchError> {
        self.graph.find(name).ok_or_else(|| SearchError::internal(format!("the training graph has no '{name}'")))
    }

    fn input(&mut self, name: &str, dims: &[usize]) -> Result<ValueId, SearchError> {
        let declared = dims.iter().map(|d| DeclaredDim::Size(*d as i64)).collect();
        let added = interface::add_input(&mut self.graph, name, DType::F32, declared);
        Ok(added.map_err(crate::supernet::SupernetError::from)?)
    }

    fn output(&mut self, value: ValueId, name: &str, dims: &[usize]) -> Result<(), SearchError> {
        let declared = dims.iter().map(|d| DeclaredDim::Size(*d as i64)).collect();
        interface::add_output(&mut self.graph, value, name, declared).map_err(crate::supernet::SupernetError::from)?;
        Ok(())
    }

    /// Gates and weights that have a gradient, which is no output any more.
    fn trained(&mut self, gates: &[GateInput], params: &[Param]) -> Result<Vec<Trained>, SearchError> {
        let all_gates = gates.iter().map(|g| (g.input.clone(), vec![g.units], false, true));
        let all_params = params.iter().map(|p| (p.input.clone(), p.initial.dims.clone(), p.decay, false));
        let mut trained = Vec::new();
        for (name, dims, decay, at_least_zero) in all_gates.chain(all_params) {
            let value = self.find(&name)?;
            let Some(grad) = self.graph.find(&format!("grad.{name}")) else { continue };
            trained.push(Trained { value, grad, dims, decay, at_least_zero });
        }
        Ok(trained)
    }

    /// Only these stay outputs; what other outputs needed goes, unless a gradient needs it.
    fn keep_outputs(&mut self, names: &[String]) -> Result<(), SearchError> {
        let kept = names.iter().map(|n| self.find(n)).collect::<Result<Vec<_>, _>>()?;
        for output in self.graph.outputs().to_vec() {
            if !kept.contains(&output) {
                self.graph.remove_output(output);
            }
        }
        Ok(())
    }

    /// `next.acc = keep * acc + grad`; the gradient becomes the mean over the passes.
    fn accumulate(&mut self, trained: Vec<Trained>, passes: usize) -> Result<Vec<Trained>, SearchError> {
        let keep = self.input("keep", &[])?;
        let apply = self.input("apply", &[])?;
        let mut out = Vec::with_capacity(trained.len());
        for t in trained {
            let name = format!("acc.{}", self.graph.value(t.value).name());
            let acc = self.input(&name, &t.dims)?;
            let mut b = Builder::new(&mut self.graph, "acc.");
            let old = b.mul(acc, keep);
            let sum = b.add(old, t.grad);
            let share = b.scalar(DType::F32, 1.0 / passes as f32);
            let grad = b.mul(sum, share);
            self.output(sum, &format!("next.{name}"), &t.dims)?;
            self.state.push(StateTensor { name, dims: t.dims.clone(), initial: None, changes: true, kept: false });
            out.push(Trained { grad, ..t });
        }
        let mut b = Builder::new(&mut self.graph, "acc.");
        let half = b.scalar(DType::F32, 0.5);
        self.apply = Some(b.op("Greater", &[apply, half], vec![]));
        Ok(out)
    }

    /// `next = max(x + rate * (next - x), 0)`.
    fn scale_move(&mut self, name: &str, x: ValueId, rate: f32) -> Result<(), SearchError> {
        if (rate - 1.0).abs() < f32::EPSILON {
            return Ok(());
        }
        let next = self.find(&format!("next.{name}"))?;
        let mut b = Builder::new(&mut self.graph, "rate.");
        let (rate, zero) = (b.scalar(DType::F32, rate), b.scalar(DType::F32, 0.0));
        let moved = b.sub(next, x);
        let scaled = b.mul(moved, rate);
        let sum = b.add(x, scaled);
        let positive = b.op("Max", &[sum, zero], vec![]);
        self.graph.move_output(next, positive);
        Ok(())
    }

    /// `next.ema = ema + (1 - decay) * (next - ema)`.
    fn average(&mut self, name: &str, t: &Trained, decay: f32) -> Result<(), SearchError> {
        let next = self.find(&format!("next.{name}"))?;
        let ema_name = format!("ema.{name}");
        let ema = self.input(&ema_name, &t.dims)?;
        let mut b = Builder::new(&mut self.graph, "ema.");
        let share = b.scalar(DType::F32, 1.0 - decay);
        let away = b.sub(next, ema);
        let step = b.mul(away, share);
        let average = b.add(ema, step);
        self.output(average, &format!("next.{ema_name}"), &t.dims)?;
        self.hold_one(&ema_name, ema)
    }

    /// Where several passes make a step, all but the last leave weights, gates and moments as they are.
    fn hold(&mut self, name: &str, t: &Trained) -> Result<(), SearchError> {
        self.hold_one(name, t.value)?;
        for moment in ["m", "v"] {
            let moment = format!("adam.{moment}.{name}");
            let value = self.find(&moment)?;
            self.hold_one(&moment, value)?;
        }
        Ok(())
    }

    fn hold_one(&mut self, name: &str, old: ValueId) -> Result<(), SearchError> {
        let Some(apply) = self.apply else { return Ok(()) };
        let next = self.find(&format!("next.{name}"))?;
        let held = Builder::new(&mut self.graph, "hold.").op("Where", &[apply, next, old], vec![]);
        self.graph.move_output(next, held);
        Ok(())
    }

    /// Adds `near_zero.<kind>`: the share of gates near zero after the step.
    fn count_near_zero(&mut self, gates: &[GateInput]) -> Result<Vec<String>, SearchError> {
        let mut kinds: BTreeMap<&str, Vec<&GateInput>> = BTreeMap::new();
        for gate in gates {
            kinds.entry(&gate.kind).or_default().push(gate);
        }
        let mut names = Vec::new();
        for (kind, gates) in kinds {
            let units: usize = gates.iter().map(|g| g.units).sum();
            let mut counts = Vec::new();
            for gate in gates {
                let next = self.find(&format!("next.{}", gate.input))?;
                let mut b = Builder::new(&mut self.graph, "near.");
                let limit = b.scalar(DType::F32, NEAR_ZERO);
                let small = b.op("Less", &[next, limit], vec![]);
                let one = b.cast(small, DType::F32);
                counts.push(b.op("ReduceSum", &[one], vec![attr("keepdims", AttrValue::Int(0))]));
            }
            let mut b = Builder::new(&mut self.graph, "near.");
            let count = if counts.len() == 1 { counts[0] } else { b.op("Sum", &counts, vec![]) };
            let share = b.scalar(DType::F32, 1.0 / units.max(1) as f32);
            let share = b.mul(count, share);
            let name = format!("near_zero.{kind}");
            self.output(share, &name, &[])?;
            names.push(name);
        }
        Ok(names)
    }

    /// The state besides sums of gradients. Gates start at 1, moving averages where the value starts, moments at 0.
    fn list_state(&mut self, gates: &[GateInput], params: &[Param], trained: &[String]) {
        let all_gates = gates.iter().map(|g| (&g.input, vec![g.units], vec![1.0; g.units]));
        let all_params = params.iter().map(|p| (&p.input, p.initial.dims.clone(), p.initial.to_f32s().unwrap_or_default()));
        for (name, dims, first) in all_gates.chain(all_params) {
            let changes = trained.contains(name);
            let mut add = |name: String, initial: Option<Vec<f32>>| {
                self.state.push(StateTensor { name, dims: dims.clone(), initial, changes, kept: true });
            };
            if changes {
                add(format!("adam.m.{name}"), None);
                add(format!("adam.v.{name}"), None);
                if self.graph.find(&format!("ema.{name}")).is_some() {
                    add(format!("ema.{name}"), Some(first.clone()));
                }
            }
            add(name.clone(), Some(first));
        }
    }
}
