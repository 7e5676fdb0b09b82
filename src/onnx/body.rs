//! Bodies of subgraphs (If, Loop, Scan): walked for names, tensors and calls, never analysed.
//!
//! Example: the body `y = Add(x, w); output y` of an If defines `y` and captures `x` and `w` from around it.

use std::collections::{BTreeMap, BTreeSet};

use onnx_proto::{AttributeProto, GraphProto, NodeProto, TensorProto, TypeProto, attribute_type};

use super::error::Cause;
use crate::graph::DType;

/// The graphs in the attributes of a node, in order.
pub(super) fn bodies(node: &NodeProto) -> impl Iterator<Item = &GraphProto> {
    node.attribute.iter().flat_map(|a| a.g.as_deref().into_iter().chain(&a.graphs))
}

fn bodies_mut(node: &mut NodeProto) -> impl Iterator<Item = &mut GraphProto> {
    node.attribute.iter_mut().flat_map(|a| a.g.as_deref_mut().into_iter().chain(&mut a.graphs))
}

/// Names that a body makes itself.
fn defined(body: &GraphProto) -> BTreeSet<&str> {
    let inputs = body.input.iter().filter_map(|v| v.name.as_deref());
    let initializers = body.initializer.iter().chain(body.sparse_initializer.iter().filter_map(|s| s.values.as_ref()));
    let outputs = body.node.iter().flat_map(|n| &n.output).map(String::as_str);
    inputs.chain(initializers.filter_map(|t| t.name.as_deref())).chain(outputs).collect()
}

/// Names that a body reads and does not make, each once, in the order of their first use.
pub(super) fn free_names(body: &GraphProto) -> Vec<String> {
    let defined = defined(body);
    let mut seen = BTreeSet::new();
    let mut free = Vec::new();
    let mut read = |name: &str| {
        if !name.is_empty() && !defined.contains(name) && seen.insert(name.to_string()) {
            free.push(name.to_string());
        }
    };
    for node in &body.node {
        node.input.iter().for_each(|n| read(n));
        bodies(node).flat_map(free_names).for_each(|n| read(&n));
    }
    body.output.iter().filter_map(|v| v.name.as_deref()).for_each(read);
    free
}

/// Names that the subgraphs of a node capture, each once, in the order of their first use.
pub(super) fn captures(node: &NodeProto) -> Vec<String> {
    let mut seen = BTreeSet::new();
    bodies(node).flat_map(free_names).filter(|n| seen.insert(n.clone())).collect()
}

/// Renames what the subgraphs of a node capture, by `names`; and what they make, by `inner` where there is one.
pub(super) fn rename(node: &mut NodeProto, names: &BTreeMap<String, String>, inner: Option<&dyn Fn(&str) -> String>) {
    for body in bodies_mut(node) {
        rename_body(body, names, inner);
    }
}

fn rename_body(body: &mut GraphProto, names: &BTreeMap<String, String>, inner: Option<&dyn Fn(&str) -> String>) {
    let mut names = names.clone();
    for name in defined(body) {
        match inner {
            Some(fresh) if !name.is_empty() => names.insert(name.to_string(), fresh(name)),
            _ => names.remove(name),
        };
    }
    let set = |name: &mut String| {
        if let Some(new) = names.get(name) {
            name.clone_from(new);
        }
    };
    for node in &mut body.node {
        node.input.iter_mut().chain(&mut node.output).for_each(set);
        rename(node, &names, inner);
    }
    let sparse = body.sparse_initializer.iter_mut().filter_map(|s| s.values.as_mut());
    body.initializer.iter_mut().chain(sparse).filter_map(|t| t.name.as_mut()).for_each(set);
    let infos = body.input.iter_mut().chain(&mut body.output).chain(&mut body.value_info);
    infos.filter_map(|v| v.name.as_mut()).for_each(set);
    for annotation in &mut body.quantization_annotation {
        annotation.tensor_name.iter_mut().for_each(set);
        annotation.quant_parameter_tensor_names.iter_mut().filter_map(|e| e.value.as_mut()).for_each(set);
    }
}

/// Calls `f` on every tensor of a body, those of its attributes and of bodies inside included.
pub(super) fn each_tensor(body: &mut GraphProto, f: &mut dyn FnMut(&mut TensorProto) -> Result<(), Cause>) -> Result<(), Cause> {
    body.initializer.iter_mut().try_for_each(&mut *f)?;
    for sparse in &mut body.sparse_initializer {
        sparse.values.iter_mut().chain(&mut sparse.indices).try_for_each(&mut *f)?;
    }
    body.node.iter_mut().try_for_each(|n| each_tensor_of_node(n, f))
}

/// Calls `f` on every tensor in the attributes of a node.
pub(super) fn each_tensor_of_node(
    node: &mut NodeProto,
    f: &mut dyn FnMut(&mut TensorProto) -> Result<(), Cause>,
) -> Result<(), Cause> {
    node.attribute.iter_mut().try_for_each(|a| each_tensor_of_attribute(a, f))
}

/// Calls `f` on every tensor in an attribute.
pub(super) fn each_tensor_of_attribute(
    attribute: &mut AttributeProto,
    f: &mut dyn FnMut(&mut TensorProto) -> Result<(), Cause>,
) -> Result<(), Cause> {
    attribute.t.iter_mut().try_for_each(|t| f(t))?;
    attribute.tensors.iter_mut().try_for_each(&mut *f)?;
    let one = attribute.sparse_tensor.iter_mut().map(|s| &mut **s);
    for sparse in one.chain(&mut attribute.sparse_tensors) {
        sparse.values.iter_mut().chain(&mut sparse.indices).try_for_each(&mut *f)?;
    }
    let one = attribute.g.iter_mut().map(|g| &mut **g);
    one.chain(&mut attribute.graphs).try_for_each(|g| each_tensor(g, f))
}

/// Calls `f` on every node of a body, those of bodies inside included.
pub(super) fn each_node<'a>(body: &'a GraphProto, f: &mut dyn FnMut(&'a NodeProto)) {
    for node in &body.node {
        f(node);
        bodies(node).for_each(|b| each_node(b, f));
    }
}

/// Elements of the constants of a body that count as parameters: floating-point tensors, and integers of 8 and fewer bits in
/// tensors of more than one element.
pub(super) fn param_count(body: &GraphProto) -> u64 {
    let constants = body.node.iter().filter(|n| n.op_type.as_deref() == Some("Constant"));
    let tensors = constants.flat_map(|n| n.attribute.iter().filter_map(|a| a.t.as_deref()));
    let own: u64 = body.initializer.iter().chain(tensors).map(params_of).sum();
    own + body.node.iter().flat_map(bodies).map(param_count).sum::<u64>()
}

fn params_of(tensor: &TensorProto) -> u64 {
    let elements = tensor.dims.iter().try_fold(1u64, |n, d| n.checked_mul(u64::try_from(*d).ok()?)).unwrap_or(0);
    match tensor.data_type.and_then(DType::from_onnx) {
        Some(d) if d.is_float() || d.is_small_int() && elements > 1 => elements,
        _ => 0,
    }
}

/// Replaces references to a function's attributes by what the call gives; one that it does not give is left out.
pub(super) fn resolve_refs(attributes: &[AttributeProto], given: &BTreeMap<&str, &AttributeProto>) -> Vec<AttributeProto> {
    attributes.iter().filter_map(|a| resolve_ref(a, given)).collect()
}

fn resolve_ref(attribute: &AttributeProto, given: &BTreeMap<&str, &AttributeProto>) -> Option<AttributeProto> {
    if let Some(name) = attribute.ref_attr_name.as_deref().filter(|n| !n.is_empty()) {
        let value = (*given.get(name)?).clone();
        return Some(AttributeProto { name: attribute.name.clone(), doc_string: attribute.doc_string.clone(), ..value });
    }
    let mut own = attribute.clone();
    let one = own.g.iter_mut().map(|g| &mut **g);
    for body in one.chain(&mut own.graphs) {
        resolve_refs_in_body(body, given);
    }
    Some(own)
}

fn resolve_refs_in_body(body: &mut GraphProto, given: &BTreeMap<&str, &AttributeProto>) {
    for node in &mut body.node {
        node.attribute = resolve_refs(&node.attribute, given);
    }
}

/// What an attribute holds: each field that is set, with the type that it stands for.
pub(super) fn set_fields(a: &AttributeProto) -> impl Iterator<Item = i32> {
    use attribute_type::*;
    let is_type = |t: &Option<Box<TypeProto>>| t.is_some();
    [
        (a.f.is_some(), FLOAT),
        (a.i.is_some(), INT),
        (a.s.is_some(), STRING),
        (a.t.is_some(), TENSOR),
        (a.g.is_some(), GRAPH),
        (a.sparse_tensor.is_some(), SPARSE_TENSOR),
        (is_type(&a.tp), TYPE_PROTO),
        (!a.floats.is_empty(), FLOATS),
        (!a.ints.is_empty(), INTS),
        (!a.strings.is_empty(), STRINGS),
        (!a.tensors.is_empty(), TENSORS),
        (!a.graphs.is_empty(), GRAPHS),
        (!a.sparse_tensors.is_empty(), SPARSE_TENSORS),
        (!a.type_protos.is_empty(), TYPE_PROTOS),
    ]
    .into_iter()
    .filter_map(|(set, kind)| set.then_some(kind))
}
