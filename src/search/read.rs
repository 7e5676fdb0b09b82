//! What a run left behind: gates as scores, and trained weights.
//!
//! Example: with tokens searched before layers 3 and 6, a token's score at layer 6 is the product of its two gates, since what is
//! dropped at layer 3 is not there at layer 6.

use super::SearchError;
use super::checkpoint::{Checkpoint, Meta, ParamMeta, Position};
use super::config::Config;
use super::trainer::State;
use crate::anatomy::Kind;
use crate::graph::{Graph, Id, NodeId, Tensor, Use};
use crate::score::Scores;
use std::collections::BTreeMap;
use std::path::Path;

/// A run as its newest checkpoint has it.
#[derive(Clone, Debug)]
pub struct Run {
    /// Its settings.
    pub config: Config,
    /// The model that was searched.
    pub model_sha256: String,
    /// How far it is.
    pub position: Position,
    /// Whether it has done all of its steps.
    pub finished: bool,
    /// Gate values by group, in the order of units, as they were trained.
    pub gates: BTreeMap<String, Vec<f32>>,
    /// Trained weights by constant of the model; `name@n` for copies of a constant that several nodes read.
    pub weights: BTreeMap<String, Tensor>,
    params: Vec<ParamMeta>,
}

/// Reads a run from its newest checkpoint.
///
/// Errors: [`SearchError::NothingToResume`] where there is none; those of a damaged or newer checkpoint.
pub fn read(run_dir: &Path) -> Result<Run, SearchError> {
    let checkpoint = Checkpoint::newest(run_dir)?.ok_or_else(|| SearchError::NothingToResume { dir: run_dir.to_path_buf() })?;
    Ok(Run::from(checkpoint))
}

/// The gates of a run as scores: |gate| by group and unit; groups that share a gate have equal scores, and those of tokens are
/// products over the layers up to their own.
///
/// Errors: as [`read`].
pub fn read_gates(run_dir: &Path) -> Result<Scores, SearchError> {
    Ok(read(run_dir)?.scores())
}

/// The trained weights of a run.
///
/// Errors: as [`read`].
pub fn read_weights(run_dir: &Path) -> Result<BTreeMap<String, Tensor>, SearchError> {
    Ok(read(run_dir)?.weights)
}

impl From<Checkpoint> for Run {
    fn from(checkpoint: Checkpoint) -> Self {
        let Checkpoint { meta, mut state } = checkpoint;
        let gates = gate_values(&meta, &mut state);
        let weights = meta.params.iter().filter_map(|p| {
            let (dims, values) = result(&mut state, &p.input)?;
            Some((p.input.strip_prefix("param.").unwrap_or(&p.input).to_string(), Tensor::f32(&dims, &values)))
        });
        let weights = weights.collect();
        let Meta { config, model_sha256, position, finished, params, .. } = meta;
        Self { config, model_sha256, position, finished, gates, weights, params }
    }
}

/// The moving average where there is one, else the value.
fn result(state: &mut State, name: &str) -> Option<(Vec<usize>, Vec<f32>)> {
    state.remove(&format!("ema.{name}")).or_else(|| state.remove(name))
}

fn gate_values(meta: &Meta, state: &mut State) -> BTreeMap<String, Vec<f32>> {
    let mut gates = BTreeMap::new();
    for gate in &meta.gates {
        let Some((_, values)) = result(state, &gate.input) else { continue };
        for group in &gate.groups {
            gates.insert(group.clone(), values.clone());
        }
    }
    gates
}

impl Run {
    /// Its gates as scores, see [`read_gates`].
    pub fn scores(&self) -> Scores {
        let sizes = |values: &Vec<f32>| values.iter().map(|g| g.abs()).collect::<Vec<f32>>();
        let mut groups: BTreeMap<String, Vec<f32>> = self.gates.iter().map(|(id, v)| (id.clone(), sizes(v))).collect();
        let mut tokens: Vec<(usize, String)> = groups.keys().filter_map(|id| Some((token_layer(id)?, id.clone()))).collect();
        tokens.sort();
        let mut before: Option<Vec<f32>> = None;
        for (_, id) in tokens {
            let Some(values) = groups.get_mut(&id) else { continue };
            if let Some(before) = before.filter(|b| b.len() == values.len()) {
                values.iter_mut().zip(before).for_each(|(v, b)| *v *= b);
            }
            before = Some(values.clone());
        }
        Scores { groups, by: "search".to_string(), model_sha256: self.model_sha256.clone() }
    }

    /// The model with the trained weights in the place of its own. `graph` is the model that was searched, as it was read.
    ///
    /// Errors: [`SearchError::Unsuitable`] where the model has no such constant.
    pub fn apply_weights(&self, graph: &Graph) -> Result<Graph, SearchError> {
        let mut graph = graph.clone();
        for p in &self.params {
            let key = p.input.strip_prefix("param.").unwrap_or(&p.input);
            if let Some(weight) = self.weights.get(key) {
                let uses = p.uses.iter().map(|(node, slot)| Use { node: NodeId::new(*node), slot: *slot });
                set_weight(&mut graph, &p.initializer, key, weight, &uses.collect::<Vec<_>>())?;
            }
        }
        Ok(graph)
    }
}

/// The layer of a token group, `token.3`.
fn token_layer(id: &str) -> Option<usize> {
    id.strip_prefix(Kind::Token.as_str())?.strip_prefix('.')?.parse().ok()
}

/// Gives a constant a new value: as a whole, or at these uses only where `key` names a copy.
pub(super) fn set_weight(
    graph: &mut Graph,
    initializer: &str,
    key: &str,
    weight: &Tensor,
    uses: &[Use],
) -> Result<(), SearchError> {
    let unsuitable =
        |what: &str| SearchError::Unsuitable { what: format!("the model's constant '{}' {what}", initializer.escape_debug()) };
    let value = graph.find(initializer).ok_or_else(|| unsuitable("is missing"))?;
    let old = graph.constant(value).ok_or_else(|| unsuitable("is no constant"))?;
    if old.dims != weight.dims {
        return Err(unsuitable(&format!("is {:?}, the trained weight is {:?}", old.dims, weight.dims)));
    }
    let values = weight.to_f32s().unwrap_or_default();
    let new = old.with_f32s(&values);
    if key == initializer {
        graph.set_constant(value, new);
        return Ok(());
    }
    let copy = graph.add_initializer(initializer, new);
    for at in uses {
        let reads = graph.order().contains(&at.node) && graph.node(at.node).input(at.slot) == Some(value);
        if !reads {
            return Err(unsuitable("is read elsewhere than in the model that was searched"));
        }
        graph.set_input(*at, Some(copy));
    }
    // A constant that every reader has its own copy of by now has none left.
    if graph.value(value).users().is_empty() && !graph.outputs().contains(&value) {
        graph.take_initializer(value);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_multiply_over_depth_and_others_do_not() {
        let gates =
            [("token.10", vec![0.5, 1.0]), ("token.2", vec![0.5, 0.25]), ("token.4", vec![1.0, 2.0]), ("mlp.0", vec![0.3])];
        let run = Run {
            config: Config::default(),
            model_sha256: "m".into(),
            position: Position::default(),
            finished: true,
            gates: gates.into_iter().map(|(id, v)| (id.to_string(), v)).collect(),
            weights: BTreeMap::new(),
            params: Vec::new(),
        };
        let scores = run.scores();
        assert_eq!(scores.groups["token.2"], [0.5, 0.25]);
        assert_eq!(scores.groups["token.4"], [0.5, 0.5]);
        assert_eq!(scores.groups["token.10"], [0.25, 0.5]);
        assert_eq!(scores.groups["mlp.0"], [0.3]);
    }
}
