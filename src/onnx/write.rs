//! Writing: a [`Graph`] to a `ModelProto`. Deterministic: equal graphs give equal bytes.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use onnx_proto::{FunctionProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, StringStringEntryProto, ValueInfoProto};
use prost::Message;

use super::error::{Cause, Error};
use super::external::DataFiles;
use super::function::{Key, Library, Slot, domain, domains, import, name_bodies};
use super::read::{call_prefix, node_extra};
use super::tensor::{self, Aside, Late};
use super::{attr, body, branch, order, stream, value_info};
use crate::graph::{DType, Graph, Id, NodeId, ValueId};

/// Unit: bytes; what protobuf allows in one message.
pub(super) const PROTO_LIMIT: usize = 0x7fff_ffff;

/// The model as one self-contained file, for runtimes: data files taken in, no `value_info`.
///
/// Errors: larger than 2 GiB.
pub fn to_bytes(graph: &Graph) -> Result<Bytes, Error> {
    Ok(to_parts(graph, PROTO_LIMIT, &|_| false)?.0)
}

/// As [`to_bytes`] where that makes at most `limit` bytes; where it makes more, large initializers of the types that `leave_out` names
/// are left out. They stand in the model with type and shape and as external data, at a place that is not there; the second result
/// names them.
///
/// Errors: larger than 2 GiB even so.
pub fn to_parts(graph: &Graph, limit: usize, leave_out: &dyn Fn(DType) -> bool) -> Result<(Bytes, Vec<ValueId>), Error> {
    const LARGE: usize = 1024;
    let encode = || {
        let mut model = to_model(graph, None)?;
        let mut outside = Vec::new();
        if model.encoded_len() > limit.min(PROTO_LIMIT) {
            let tensors = model.graph.iter_mut().flat_map(|g| &mut g.initializer);
            for t in tensors.filter(|t| t.raw_data.as_ref().is_some_and(|r| r.len() >= LARGE)) {
                let id = t.name.as_deref().and_then(|n| graph.find(n));
                let held = id.and_then(|v| graph.value(v).initializer()).filter(|held| leave_out(held.dtype));
                if let (Some(v), Some(_)) = (id, held) {
                    t.raw_data = None;
                    t.data_location = Some(onnx_proto::data_location::EXTERNAL);
                    let location = StringStringEntryProto { key: Some("location".into()), value: Some("outside".into()) };
                    t.external_data = vec![location];
                    outside.push(v);
                }
            }
        }
        match model.encoded_len() > PROTO_LIMIT {
            true => Err(Cause::OutputTooLarge),
            false => Ok((stream::model(model, &Late::default()).into_bytes(), outside)),
        }
    };
    encode().map_err(Error::bare)
}

/// The model as a message, without what `aside` takes.
pub(super) fn to_model(graph: &Graph, mut aside: Option<&mut Aside>) -> Result<ModelProto, Cause> {
    let shell = ModelProto::decode(graph.shell().clone());
    let mut model = shell.map_err(|_| Cause::Internal { what: "the shell of a model does not decode" })?;
    let from_file = model.graph.is_some();
    let mut out = model.graph.take().unwrap_or_else(|| GraphProto { name: Some("graph".into()), ..GraphProto::default() });
    model.ir_version = Some(graph.ir_version());

    let made: BTreeSet<&str> = graph.nodes().flat_map(|(_, n)| n.outputs()).flatten().map(|v| graph.value(*v).name()).collect();
    let name_of_sparse = |s: &onnx_proto::SparseTensorProto| s.values.as_ref().and_then(|v| v.name.clone()).unwrap_or_default();
    out.sparse_initializer.retain(|s| made.contains(name_of_sparse(s).as_str()));
    let sparse: BTreeSet<String> = out.sparse_initializer.iter().map(name_of_sparse).collect();

    let functions = std::mem::take(&mut model.functions);
    let library = Library::new(&functions, graph.opsets())?;
    let (items, calls) = items(graph, &library)?;
    for item in items {
        match item {
            Item::Call(c) => out.node.push(calls[c].clone().ok_or(Cause::Internal { what: "a changed call is written" })?),
            Item::Node(id) if is_stand_in(graph, id, &sparse) => {}
            Item::Node(id) => out.node.push(write_node(graph, id, aside.as_deref_mut())?),
        }
    }
    for v in graph.initializers() {
        let value = graph.value(*v);
        if let Some(t) = value.initializer() {
            out.initializer.push(tensor::write(t, Some(value.name()), aside.as_deref_mut())?);
        }
    }
    out.input = inputs(graph, std::mem::take(&mut out.input))?;
    out.output = outputs(graph, std::mem::take(&mut out.output))?;
    opset_imports(graph, &mut model, &out, from_file);
    let (needed, called) = functions_used(graph, &library, &out, &model)?;
    // All but those whose last call was changed; what the file never called stays too.
    let keep = |f: &FunctionProto| Library::is_in(f, &needed) || !Library::is_in(f, &called);
    model.functions = functions.iter().filter(|f| keep(f)).cloned().collect();
    model.graph = Some(out);
    Ok(model)
}

/// A sparse initializer stands in the graph as a Constant node, which is not written.
fn is_stand_in(graph: &Graph, id: NodeId, sparse: &BTreeSet<String>) -> bool {
    let node = graph.node(id);
    !sparse.is_empty() && node.op() == "Constant" && node.output(0).is_some_and(|v| sparse.contains(graph.value(v).name()))
}

/// The functions of the model.
pub(super) fn function_list(graph: &Graph) -> Result<Vec<FunctionProto>, Cause> {
    let shell = ModelProto::decode(graph.shell().clone());
    shell.map(|m| m.functions).map_err(|_| Cause::Internal { what: "the shell of a model does not decode" })
}

#[derive(Clone, Copy)]
enum Item {
    Node(NodeId),
    Call(usize),
}

/// What to write, in order; and for each call its node, where nothing of it changed.
fn items(graph: &Graph, library: &Library<'_>) -> Result<(Vec<Item>, Vec<Option<NodeProto>>), Cause> {
    let mut calls = Vec::with_capacity(graph.calls().len());
    for number in 0..graph.calls().len() {
        calls.push(intact(graph, library, number)?);
    }
    let plain = || graph.order().iter().map(|id| Item::Node(*id)).collect();
    if calls.iter().all(Option::is_none) {
        return Ok((plain(), calls));
    }
    let mut items = Vec::new();
    let mut item_of_call = vec![None; calls.len()];
    let mut item_of_node = vec![0; graph.node_capacity()];
    for (id, node) in graph.nodes() {
        let call = node.call().filter(|c| calls[*c].is_some());
        item_of_node[id.index()] = match call {
            Some(c) => *item_of_call[c].get_or_insert_with(|| {
                items.push(Item::Call(c));
                items.len() - 1
            }),
            None => {
                items.push(Item::Node(id));
                items.len() - 1
            }
        };
    }
    let mut reads = vec![Vec::new(); items.len()];
    for (id, node) in graph.nodes() {
        let own = item_of_node[id.index()];
        for v in node.inputs().iter().flatten().chain(node.captures()) {
            if let Some((p, _)) = graph.value(*v).producer()
                && item_of_node[p.index()] != own
            {
                reads[own].push(item_of_node[p.index()]);
            }
        }
    }
    // An If also reads its condition, and what its other branch captures.
    for (number, (call, node)) in graph.calls().iter().zip(&calls).enumerate() {
        let (Some(own), Some(_), Some(node)) = (item_of_call[number], call.condition, node) else { continue };
        let captured = body::captures(node);
        let producers = node.input.iter().chain(&captured).filter_map(|n| graph.value(graph.find(n)?).producer());
        reads[own].extend(producers.map(|(p, _)| item_of_node[p.index()]).filter(|item| *item != own));
    }
    match order::sorted(&reads) {
        Some(order) => Ok((order.into_iter().map(|i| items[i]).collect(), calls)),
        // Nodes were put between those of a call, so that it can no longer stand in one place.
        None => Ok((plain(), vec![None; calls.len()])),
    }
}

/// The calling node, where the nodes of the call are still what a fresh expansion gives and nothing else reads inside.
fn intact(graph: &Graph, library: &Library<'_>, number: usize) -> Result<Option<NodeProto>, Cause> {
    let broken = |_| Cause::Internal { what: "a call does not decode" };
    let call = &graph.calls()[number];
    let node = NodeProto::decode(call.encoded.clone()).map_err(broken)?;
    let reads_again = |name: &String| graph.find(name).is_some_and(|v| stands(graph, v));
    let fresh = match call.condition {
        _ if call.is_inlined => None,
        Some(condition) if node.input.iter().chain(&body::captures(&node)).all(reads_again) => {
            branch::expand(&node, condition, library, graph.opsets(), &call_prefix(&node, number))?
        }
        None if library.is_call(&node) => Some(library.expand(&node, &call_prefix(&node, number))?),
        _ => None,
    };
    let Some(mut fresh) = fresh else { return Ok(None) };
    let alive: BTreeSet<NodeId> = graph.order().iter().copied().filter(|id| graph.node(*id).call() == Some(number)).collect();
    if alive.len() != call.nodes.len() || fresh.nodes.len() != alive.len() {
        return Ok(None);
    }
    let mut bound: Vec<Option<ValueId>> = fresh
        .slots
        .iter()
        .map(|s| match s {
            Slot::Outer(name) => graph.find(name),
            Slot::Inner(_) => None,
        })
        .collect();
    let is_outer: Vec<bool> = fresh.slots.iter().map(|s| matches!(s, Slot::Outer(_))).collect();
    for (flat, id) in fresh.nodes.iter().zip(&call.nodes) {
        let outputs = graph.node(*id).outputs();
        if outputs.len() != flat.outputs.len() {
            return Ok(None);
        }
        for (slot, value) in flat.outputs.iter().zip(outputs) {
            match (slot, value) {
                (None, None) => {}
                (Some(s), Some(v)) if !is_outer[*s] && bound[*s].is_none() => bound[*s] = Some(*v),
                (Some(s), Some(v)) if bound[*s] == Some(*v) => {}
                _ => return Ok(None),
            }
        }
    }
    for (flat, id) in fresh.nodes.iter_mut().zip(&call.nodes) {
        let name_of = |slot: usize| bound[slot].map(|v| graph.value(v).name().to_string());
        if name_bodies(flat, &name_of).is_err() {
            return Ok(None);
        }
        let inputs: Vec<Option<ValueId>> = flat.inputs.iter().map(|s| s.and_then(|s| bound[s])).collect();
        if inputs != graph.node(*id).inputs() || !same_node(graph, *id, &flat.node)? {
            return Ok(None);
        }
    }
    let inner = bound.iter().zip(&is_outer).filter_map(|(v, outer)| v.filter(|_| !outer));
    let private = |v: ValueId| graph.value(v).users().iter().all(|u| alive.contains(&u.node)) && !graph.outputs().contains(&v);
    Ok(inner.into_iter().all(private).then_some(node))
}

/// Whether there is something that makes the value.
fn stands(graph: &Graph, v: ValueId) -> bool {
    graph.value(v).producer().is_some() || graph.value(v).initializer().is_some() || graph.inputs().contains(&v)
}

/// Whether a node is the given one, apart from names.
fn same_node(graph: &Graph, id: NodeId, proto: &NodeProto) -> Result<bool, Cause> {
    let node = graph.node(id);
    if proto.op_type.as_deref() != Some(node.op())
        || domain(proto.domain.as_deref()) != node.domain()
        || node.attrs().len() != proto.attribute.len()
        || *node.extra() != node_extra(proto)
    {
        return Ok(false);
    }
    let mut files = DataFiles::none();
    for (now, fresh) in node.attrs().iter().zip(&proto.attribute) {
        if !attr::same(now, &attr::read(fresh.clone(), "", &mut files)?) {
            return Ok(false);
        }
    }
    Ok(true)
}

pub(super) fn write_node(graph: &Graph, id: NodeId, mut aside: Option<&mut Aside>) -> Result<NodeProto, Cause> {
    let node = graph.node(id);
    let mut proto =
        NodeProto::decode(node.extra().clone()).map_err(|_| Cause::Internal { what: "the rest of a node does not decode" })?;
    let name = |v: &Option<ValueId>| v.map(|v| graph.value(v).name().to_string()).unwrap_or_default();
    proto.input = node.inputs().iter().map(name).collect();
    proto.output = node.outputs().iter().map(name).collect();
    proto.op_type = Some(node.op().to_string());
    if !node.name().is_empty() {
        proto.name = Some(node.name().to_string());
    }
    if !node.domain().is_empty() {
        proto.domain = Some(node.domain().to_string());
    }
    for attr in node.attrs() {
        proto.attribute.push(attr::write(attr, aside.as_deref_mut())?);
    }
    if !node.captures().is_empty() {
        // Bodies go by name, and values may have been renamed since.
        let now = node.captures().iter().map(|v| graph.value(*v).name().to_string());
        let renamed: BTreeMap<String, String> = body::captures(&proto).into_iter().zip(now).filter(|(a, b)| a != b).collect();
        if !renamed.is_empty() {
            body::rename(&mut proto, &renamed, None);
        }
    }
    Ok(proto)
}

/// The inputs in the graph's order; initializers that the file also lists as inputs stay behind the input that they stood behind.
fn inputs(graph: &Graph, listed: Vec<ValueInfoProto>) -> Result<Vec<ValueInfoProto>, Cause> {
    let mut out = Vec::new();
    let mut rest = graph.inputs().iter().copied();
    let declare = |v: ValueId| match graph.value(v).declared() {
        Some(d) => value_info::write(d, graph.value(v).name()),
        None => Err(Cause::Internal { what: "a graph input is not declared" }),
    };
    for mut info in listed {
        let Some(v) = info.name.as_deref().and_then(|n| graph.find(n)) else { continue };
        if let Some(t) = graph.value(v).initializer() {
            if info.r#type.is_some() {
                value_info::follow(&mut info, t);
                out.push(info);
            }
        } else if rest.clone().any(|r| r == v) {
            for next in rest.by_ref() {
                out.push(declare(next)?);
                if next == v {
                    break;
                }
            }
        }
    }
    for v in rest {
        out.push(declare(v)?);
    }
    Ok(out)
}

fn outputs(graph: &Graph, listed: Vec<ValueInfoProto>) -> Result<Vec<ValueInfoProto>, Cause> {
    let write = |v: &ValueId| {
        let value = graph.value(*v);
        let own = listed.iter().find(|i| i.name.as_deref() == Some(value.name())).filter(|_| graph.inputs().contains(v));
        match (own, value.declared()) {
            (Some(info), _) => Ok(info.clone()),
            (None, Some(d)) => value_info::write(d, value.name()),
            (None, None) => Err(Cause::Internal { what: "a graph output is not declared" }),
        }
    };
    graph.outputs().iter().map(write).collect()
}

/// The file's imports with the graph's versions; then those that the graph has beside them, as far as they are used.
fn opset_imports(graph: &Graph, model: &mut ModelProto, out: &GraphProto, from_file: bool) {
    let mut used = BTreeSet::new();
    domains(out, &mut used);
    for entry in &mut model.opset_import {
        if let Some(version) = graph.opset(import(entry).0) {
            entry.version = Some(version);
        }
    }
    for (d, version) in graph.opsets() {
        let listed = model.opset_import.iter().any(|e| import(e).0 == d);
        if !listed && (!from_file || used.contains(d)) {
            model.opset_import.push(OperatorSetIdProto { domain: Some(d.clone()), version: Some(*version) });
        }
    }
}

/// Functions that the written model needs, and those that the calls in the file needed.
fn functions_used(
    graph: &Graph,
    library: &Library<'_>,
    out: &GraphProto,
    model: &ModelProto,
) -> Result<(BTreeSet<Key>, BTreeSet<Key>), Cause> {
    let calls = graph.calls().iter().map(|c| NodeProto::decode(c.encoded.clone()));
    let calls = calls.collect::<Result<Vec<_>, _>>().map_err(|_| Cause::Internal { what: "a call does not decode" })?;
    let training = model.training_info.iter().flat_map(|t| t.initialization.iter().chain(&t.algorithm)).flat_map(|g| &g.node);
    Ok((library.reachable(out.node.iter().chain(training)), library.reachable(calls.iter())))
}
