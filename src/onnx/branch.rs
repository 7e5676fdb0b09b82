//! Branches of an If whose condition is known, opened for analysis.
//!
//! Example: exporters write `squeeze` and `tile` of sizes that they did not look up as an If over those sizes. Where inference finds the
//! condition, `y = If(c) {then: z = Squeeze(x), else: Identity(x)}` becomes the node `y = Squeeze(x)`. Where nothing of it is cut, it
//! is written back as the If that it was, exactly as a call of a model-local function is.

use std::collections::BTreeMap;
use std::path::Path;

use onnx_proto::{AttributeProto, FunctionProto, GraphProto, NodeProto, OperatorSetIdProto, attribute_type};
use prost::Message;

use super::body;
use super::error::{Cause, Error};
use super::external::DataFiles;
use super::function::{Expansion, Library};
use super::read::{call_prefix, inlined};
use super::write::{function_list, write_node};
use crate::graph::{Graph, NodeId};

/// The domain of the function that a branch is read as; no file uses it.
const DOMAIN: &str = "vitrim.branch";

/// Replaces each If by the branch that its condition takes. What cannot be read as one stays closed: a branch with sparse
/// initializers, or an If with parameters in its other branch, which would be lost.
///
/// `file` is named in errors. Returns how many were opened. Errors: a branch contradicts itself.
pub fn open_branches(graph: &mut Graph, file: &Path, chosen: &[(NodeId, bool)]) -> Result<usize, Error> {
    let mut opened = 0;
    for (id, condition) in chosen {
        opened += usize::from(open(graph, *id, *condition).map_err(|cause| Error::new(file, cause))?);
    }
    if opened > 0 {
        graph.sort();
    }
    Ok(opened)
}

fn open(graph: &mut Graph, id: NodeId, condition: bool) -> Result<bool, Cause> {
    // What a call holds is written back as the call.
    if graph.node(id).call().is_some() {
        return Ok(false);
    }
    let node = write_node(graph, id, None)?;
    let functions = function_list(graph)?;
    let library = Library::new(&functions, graph.opsets())?;
    let prefix = call_prefix(&node, graph.calls().len());
    let Some(expansion) = expand(&node, condition, &library, graph.opsets(), &prefix)? else { return Ok(false) };
    graph.remove_node(id);
    let call = graph.add_call(node.encode_to_vec().into(), Some(condition));
    let names = node.input.iter().chain(&node.output).cloned().chain(body::captures(&node));
    let around: BTreeMap<String, _> = names.filter_map(|n| graph.find(&n).map(|v| (n, v))).collect();
    for new in inlined(graph, &mut DataFiles::none(), expansion, call, &|name| around.get(name).copied())? {
        graph.add_node(new);
    }
    Ok(true)
}

/// The nodes of the branch that an If takes, named as those of a call; `None` where it must stay closed.
pub(super) fn expand(
    node: &NodeProto,
    condition: bool,
    library: &Library<'_>,
    opsets: &[(String, i64)],
    prefix: &str,
) -> Result<Option<Expansion>, Cause> {
    let branch = |name: &str| node.attribute.iter().find(|a| a.name.as_deref() == Some(name)).and_then(|a| a.g.as_deref());
    let (Some(then), Some(other)) = (branch("then_branch"), branch("else_branch")) else { return Ok(None) };
    let (taken, left) = if condition { (then, other) } else { (other, then) };
    if body::param_count(left) > 0 || !taken.sparse_initializer.is_empty() || taken.output.len() != node.output.len() {
        return Ok(None);
    }
    let (function, call) = as_call(node, taken, opsets);
    library.with(&function)?.expand(&call, prefix).map(Some)
}

/// A branch as a function of what it captures, and the call of it.
fn as_call(node: &NodeProto, taken: &GraphProto, opsets: &[(String, i64)]) -> (FunctionProto, NodeProto) {
    let captured = body::free_names(taken);
    let constants = taken.initializer.iter().map(|tensor| NodeProto {
        op_type: Some("Constant".into()),
        output: tensor.name.clone().into_iter().collect(),
        attribute: vec![AttributeProto {
            name: Some("value".into()),
            r#type: Some(attribute_type::TENSOR),
            t: Some(Box::new(tensor.clone())),
            ..AttributeProto::default()
        }],
        ..NodeProto::default()
    });
    let import = |(domain, version): &(String, i64)| OperatorSetIdProto { domain: Some(domain.clone()), version: Some(*version) };
    let function = FunctionProto {
        domain: Some(DOMAIN.into()),
        name: Some("Branch".into()),
        input: captured.clone(),
        output: taken.output.iter().map(|v| v.name.clone().unwrap_or_default()).collect(),
        node: constants.chain(taken.node.iter().cloned()).collect(),
        opset_import: opsets.iter().map(import).collect(),
        ..FunctionProto::default()
    };
    let call = NodeProto {
        domain: Some(DOMAIN.into()),
        op_type: Some("Branch".into()),
        name: node.name.clone(),
        input: captured,
        output: node.output.clone(),
        ..NodeProto::default()
    };
    (function, call)
}
