//! A graph that sums the squares of gradients at values inside a model, over all elements and images of a batch.
//!
//! Example: for the attention logits `[B, 3, 197, 197]` of a layer it has the output `grad.square.0`, one number.

use super::{SupernetError, rewrite};
use crate::autodiff::interface;
use crate::autodiff::loss::{self, Loss, Reduction};
use crate::autodiff::{Role, differentiate};
use crate::graph::build::Builder;
use crate::graph::{DType, Graph, ValueId};
use crate::infer::{self, Facts};

/// A graph that sums squared gradients.
#[derive(Clone, Debug)]
pub struct Squares {
    /// Inputs: those of the model, and `target.<output>` of each output that counts. Outputs: `grad.square.<n>`, one number each.
    pub graph: Graph,
    /// Names of the outputs that count.
    pub outputs: Vec<String>,
    /// Whether the one output holds class scores.
    pub is_classes: bool,
    /// For each value, whether an output that counts depends on it.
    pub is_felt: Vec<bool>,
}

impl Squares {
    /// The name of the output of value n.
    pub fn name_of(n: usize) -> String {
        format!("grad.square.{n}")
    }

    /// Of the gradients at `values`, of the cross entropy of the output with class scores, or of the squared errors of all float outputs
    /// where there is none.
    ///
    /// Errors: an output does not fit, or the gradient has to pass an operator that has none.
    pub fn new(graph: &Graph, classes: Option<ValueId>, values: &[ValueId]) -> Result<Self, SupernetError> {
        let mut graph = graph.clone();
        rewrite::drop_noops(&mut graph);
        graph.sort();
        let facts = infer::facts(&graph)?;
        let kind = if classes.is_some() { Loss::SoftCe } else { Loss::Mse };
        let outputs: Vec<ValueId> = classes.into_iter().collect();
        // Sums, so that what belongs to an image does not depend on how many others are in its batch.
        let nodes = loss::add(&mut graph, &facts, kind, &outputs, Reduction::Sum)?;
        let target = |(v, role): &(ValueId, Role)| {
            let name = graph.value(*v).name();
            (*role == Role::Target).then(|| name.strip_prefix("target.").unwrap_or(name).to_string())
        };
        let outputs = nodes.inputs.iter().filter_map(target).collect();
        let facts = infer::facts(&graph)?;
        let gradients = differentiate(&mut graph, &facts, nodes.loss, values)?;
        for output in graph.outputs().to_vec() {
            graph.remove_output(output);
        }
        for (n, gradient) in gradients.iter().enumerate() {
            let Some(gradient) = gradient else { continue };
            let square = square(&mut graph, &facts, (values[n], *gradient));
            interface::add_output(&mut graph, square, &Self::name_of(n), vec![])?;
        }
        graph.remove_dead(&|_, _| false);
        graph.sort();
        let is_felt = gradients.iter().map(Option::is_some).collect();
        Ok(Self { graph, outputs, is_classes: classes.is_some(), is_felt })
    }
}

/// The sum of squares of all elements of a gradient. Shape: [].
fn square(graph: &mut Graph, facts: &Facts, (value, gradient): (ValueId, ValueId)) -> ValueId {
    let is_float32 = facts.get(value).dtype == Some(DType::F32);
    let mut b = Builder::new(graph, "grad.square.");
    let x = if is_float32 { gradient } else { b.cast(gradient, DType::F32) };
    let flat = b.reshape(x, &[-1]);
    let squares = b.mul(flat, flat);
    b.reduce_sum(squares, &[0], false)
}
