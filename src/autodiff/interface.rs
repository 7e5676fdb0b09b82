//! Inputs and outputs of a training graph: names, shapes and roles, and how they are added to a graph.

use super::AutodiffError;
use crate::graph::{DType, Declared, DeclaredDim, Graph, Tensor, ValueId};
use crate::infer::Dim;
use bytes::Bytes;

/// What an input of a training graph is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// An input of the original model.
    Input,
    /// What an output should be: `target.<output>`.
    Target,
    /// Class numbers: `labels`.
    Labels,
    /// A gate: `gate.<group>`.
    Gate,
    /// A trained weight: `param.<initializer>`.
    Param,
    /// State of the optimizer: `adam.m.<x>`, `adam.v.<x>`.
    Moment,
    /// A number that the host gives at every step: `lr`, `step`, `l1.<kind>`.
    Scalar,
}

/// One input of a training graph.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InputSpec {
    /// Its name.
    pub name: String,
    /// Its shape; symbols where it is dynamic.
    pub shape: Vec<DeclaredDim>,
    /// Element type.
    pub dtype: DType,
    /// What it is for.
    pub role: Role,
}

/// A dimension as it is declared in a file: a number, a symbol, or an empty symbol for anything computed.
pub fn declared_dim(dim: &Dim) -> DeclaredDim {
    match (dim.known(), &dim.names()[..]) {
        (Some(n), _) => DeclaredDim::Size(n),
        (None, [name]) if Dim::named(name) == *dim => DeclaredDim::Symbol(name.to_string()),
        (None, _) => DeclaredDim::Symbol(String::new()),
    }
}

/// Dimensions as they are declared in a file.
pub fn declared_dims(dims: &[Dim]) -> Vec<DeclaredDim> {
    dims.iter().map(declared_dim).collect()
}

/// A declaration without anything else.
pub fn declare(dtype: DType, dims: Vec<DeclaredDim>) -> Declared {
    Declared { dtype: Some(dtype), dims: Some(dims), extra: Bytes::new() }
}

/// Adds a graph input with exactly this name.
///
/// Errors: the name belongs to a graph input or output.
pub fn add_input(graph: &mut Graph, name: &str, dtype: DType, dims: Vec<DeclaredDim>) -> Result<ValueId, AutodiffError> {
    free_name(graph, name)?;
    let id = graph.add_value(name);
    graph.add_input(id, declare(dtype, dims));
    Ok(id)
}

/// Makes a value that nothing produces any more a graph input with exactly this name.
///
/// Errors: the name belongs to a graph input or output.
pub(crate) fn make_input(
    graph: &mut Graph,
    value: ValueId,
    name: &str,
    dtype: DType,
    dims: Vec<DeclaredDim>,
) -> Result<(), AutodiffError> {
    free_name(graph, name)?;
    graph.rename(value, name);
    graph.add_input(value, declare(dtype, dims));
    Ok(())
}

/// Makes `value` a graph output with exactly this name; a copy where it is already an input, an output or a constant.
///
/// Errors: the name belongs to a graph input or output.
pub fn add_output(graph: &mut Graph, value: ValueId, name: &str, dims: Vec<DeclaredDim>) -> Result<ValueId, AutodiffError> {
    let is_output = graph.outputs().contains(&value);
    let value = if is_output || graph.value(value).producer().is_none() {
        graph.add_op("Identity", &[value], vec![], "output.Identity")
    } else {
        value
    };
    if graph.value(value).name() != name {
        free_name(graph, name)?;
        graph.rename(value, name);
    }
    graph.add_output(value, declare(DType::F32, dims));
    Ok(value)
}

/// Frees a name that an inner value of the model has.
fn free_name(graph: &mut Graph, name: &str) -> Result<(), AutodiffError> {
    let Some(owner) = graph.find(name) else { return Ok(()) };
    if graph.inputs().contains(&owner) || graph.outputs().contains(&owner) {
        return Err(AutodiffError::NameTaken { name: name.to_string() });
    }
    let mut n = 0;
    let free = loop {
        let candidate = format!("{name}.model{n}");
        if graph.find(&candidate).is_none() {
            break candidate;
        }
        n += 1;
    };
    graph.rename(owner, &free);
    Ok(())
}

/// A float32 scalar constant.
pub(crate) fn scalar(graph: &mut Graph, value: f32) -> ValueId {
    graph.add_initializer("train.constant", Tensor::f32(&[], &[value]))
}
