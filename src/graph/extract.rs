//! A part of a graph as a graph of its own.

use super::id::{Id, ValueId};
use super::model::{Declared, Graph};

impl Graph {
    /// The part that computes `outputs` from `inputs` and constants; whatever else it would need stays an input behind those.
    ///
    /// `inputs` are values of any source: what made them is left out, constants among them lose their content and are fed. Those that
    /// `outputs` do not depend on are left out too. Ids and names of values are those of this graph.
    /// Example: of `y = w2 relu(w1 x)`, the part from `relu(w1 x)` and `w2` to `y` is one product of two inputs.
    pub fn extract(&self, inputs: &[(ValueId, Declared)], outputs: &[(ValueId, Declared)]) -> Self {
        let mut part = self.clone();
        for (v, declared) in inputs {
            if let Some((node, slot)) = part.values[v.index()].producer.take()
                && let Some(Some(node)) = part.nodes.get_mut(node.index())
            {
                node.outputs[slot] = None;
            }
            part.take_initializer(*v);
            part.values[v.index()].declared = Some(declared.clone());
        }
        for (v, declared) in outputs {
            part.values[v.index()].declared = Some(declared.clone());
        }
        part.outputs = outputs.iter().map(|(v, _)| *v).collect();
        part.remove_dead(&|_, _| false);
        let own = self.inputs.iter().filter(|v| !inputs.iter().any(|(i, _)| i == *v));
        let all: Vec<ValueId> = inputs.iter().map(|(v, _)| v).chain(own).copied().collect();
        part.inputs = all.into_iter().filter(|v| !part.value(*v).users.is_empty() || part.outputs.contains(v)).collect();
        part
    }
}
