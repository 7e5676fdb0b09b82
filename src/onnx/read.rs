//! Reading: a path or bytes to a [`Graph`]. Never panics on any bytes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use onnx_proto::{GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto};
use prost::Message;

use super::error::{Cause, Error, shown, shown_to};
use super::external::DataFiles;
use super::function::{self, Expansion, Library, Slot, domain, import};
use super::source::{Source, diagnose};
use super::tensor::initializer_label;
use super::{attr, body, order, tensor, value_info};
use crate::graph::{Declared, Graph, Id, NewNode, ValueId, check};

/// Default-domain opsets that are accepted.
const OPSETS: std::ops::RangeInclusive<i64> = 11..=26;
/// IR versions that are known, and the last one that is not absurd.
const IR_VERSIONS: std::ops::RangeInclusive<i64> = 3..=13;
const IR_ABSURD: i64 = 24;

/// What a model may hold at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Counts and depths inside the file.
    pub scan: onnx_proto::Limits,
    /// Unit: bytes of all external data together.
    pub external_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { scan: onnx_proto::Limits::default(), external_bytes: 16 << 30 }
    }
}

/// A model that was read.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The graph, in which [`check::check`] finds no violation.
    pub graph: Graph,
    /// What is odd but harmless, each one line.
    pub warnings: Vec<String>,
    /// The model file, as given, and its data files: what an output must not overwrite.
    pub files: Vec<PathBuf>,
}

/// Reads the model at `path` with default limits.
///
/// Errors: everything that is wrong with the file, its data files or the model in it.
pub fn read(path: &Path) -> Result<Loaded, Error> {
    read_with(path, &Limits::default())
}

/// Reads the model at `path`.
///
/// Errors: everything that is wrong with the file, its data files or the model in it.
pub fn read_with(path: &Path, limits: &Limits) -> Result<Loaded, Error> {
    let load = || {
        let source = Source::open(path)?;
        if source.len() == 0 {
            return Err(Cause::Empty);
        }
        if source.len() > 2 << 30 {
            let head = source.head().map_err(|source| Cause::Read { source })?;
            return Err(diagnose(&head).unwrap_or(Cause::TooLarge));
        }
        let bytes = source.bytes()?;
        let mut files = DataFiles::beside(path, limits.external_bytes);
        let (graph, warnings) = graph_of(bytes, limits, &mut files)?;
        files.check_unchanged()?;
        if !source.is_unchanged() {
            return Err(Cause::Changed);
        }
        let files = std::iter::once(path).chain(files.paths()).map(Path::to_path_buf).collect();
        Ok(Loaded { graph, warnings, files })
    };
    load().map_err(|cause| Error::new(path, cause))
}

/// Reads a model that has no path (standard input); `name` stands for it in messages. It cannot have external data.
///
/// Errors: everything that is wrong with the model.
pub fn read_bytes(bytes: Bytes, name: &Path, limits: &Limits) -> Result<Loaded, Error> {
    let (graph, warnings) = graph_of(bytes, limits, &mut DataFiles::none()).map_err(|cause| Error::new(name, cause))?;
    Ok(Loaded { graph, warnings, files: Vec::new() })
}

fn graph_of(bytes: Bytes, limits: &Limits, files: &mut DataFiles) -> Result<(Graph, Vec<String>), Cause> {
    if bytes.is_empty() {
        return Err(Cause::Empty);
    }
    onnx_proto::scan(&bytes, &limits.scan).map_err(|fault| diagnose(&bytes).unwrap_or_else(|| fault.into()))?;
    let model = ModelProto::decode(bytes).map_err(Cause::Decode)?;
    let mut warnings = Vec::new();
    let graph = model_to_graph(model, files, &mut warnings)?;
    warnings.append(&mut files.warnings);
    Ok((graph, warnings))
}

fn model_to_graph(mut model: ModelProto, files: &mut DataFiles, warnings: &mut Vec<String>) -> Result<Graph, Cause> {
    let ir_version = check_ir_version(&model, warnings)?;
    let opsets = check_opsets(&model)?;
    let mut proto = model.graph.take().ok_or(Cause::NoGraph)?;
    if proto.node.is_empty() {
        return Err(Cause::NoNodes);
    }
    if proto.output.is_empty() {
        return Err(Cause::NoOutputs);
    }
    take_in(&mut model, &mut proto, files)?;
    let parts = Parts {
        nodes: std::mem::take(&mut proto.node),
        initializers: std::mem::take(&mut proto.initializer),
        inputs: std::mem::take(&mut proto.input),
        outputs: std::mem::take(&mut proto.output),
    };
    proto.value_info.clear();
    let sparse = std::mem::take(&mut proto.sparse_initializer);
    let library = Library::new(&model.functions, &opsets)?;
    let mut reader = Reader::new(Graph::new(ir_version, opsets, Bytes::new()), &library, files, warnings);
    reader.initializers(parts.initializers)?;
    proto.input = reader.inputs(parts.inputs)?;
    reader.sparse_names(&sparse)?;
    reader.nodes(parts.nodes)?;
    reader.sparse_initializers(&sparse)?;
    proto.output = reader.outputs(parts.outputs)?;
    let mut graph = reader.finish()?;
    proto.sparse_initializer = sparse;
    model.graph = Some(proto);
    graph.set_shell(model.encode_to_vec().into());
    match check::check(&graph).is_empty() {
        true => Ok(graph),
        false => Err(Cause::Internal { what: "the graph that was read breaks an invariant" }),
    }
}

struct Parts {
    nodes: Vec<NodeProto>,
    initializers: Vec<TensorProto>,
    inputs: Vec<ValueInfoProto>,
    outputs: Vec<ValueInfoProto>,
}

fn check_ir_version(model: &ModelProto, warnings: &mut Vec<String>) -> Result<i64, Cause> {
    let version = model.ir_version.ok_or(Cause::NoIrVersion)?;
    let (oldest, newest) = (*IR_VERSIONS.start(), *IR_VERSIONS.end());
    if version < oldest || version > IR_ABSURD {
        return Err(Cause::IrVersion { version, oldest, newest });
    }
    if version > newest {
        warnings.push(format!("ir_version {version} is newer than the newest known, {newest}"));
    }
    Ok(version)
}

fn check_opsets(model: &ModelProto) -> Result<Vec<(String, i64)>, Cause> {
    let mut opsets: Vec<(String, i64)> = Vec::new();
    for (domain, version) in model.opset_import.iter().map(import) {
        match opsets.iter().find(|(d, _)| d == domain) {
            Some((_, first)) if *first == version => {}
            Some((_, first)) => {
                return Err(Cause::OpsetTwice { domain: shown(domain), first: *first, second: version });
            }
            None => opsets.push((domain.to_string(), version)),
        }
    }
    let version = opsets.iter().find(|(d, _)| d.is_empty()).ok_or(Cause::NoDefaultOpset)?.1;
    if !OPSETS.contains(&version) {
        return Err(Cause::Opset { version, oldest: *OPSETS.start(), newest: *OPSETS.end() });
    }
    Ok(opsets)
}

/// Checks the tensors that no [`Graph`] table holds (in bodies, functions, training graphs, sparse initializers), and moves those
/// that stand in data files into the model: what stays encoded must stand alone.
fn take_in(model: &mut ModelProto, graph: &mut GraphProto, files: &mut DataFiles) -> Result<(), Cause> {
    let mut take = |t: &mut TensorProto| {
        let what = format!("tensor {}", shown(t.name.as_deref().unwrap_or_default()));
        let read = tensor::read(t.clone(), &what, true, files)?;
        if read.storage == crate::graph::Storage::External {
            *t = tensor::write(&read, None, None)?;
        }
        Ok(())
    };
    for node in &mut graph.node {
        for attribute in &mut node.attribute {
            let holds_one = attribute.t.take();
            body::each_tensor_of_attribute(attribute, &mut take)?;
            attribute.t = holds_one;
        }
    }
    for sparse in &mut graph.sparse_initializer {
        sparse.values.iter_mut().chain(&mut sparse.indices).try_for_each(&mut take)?;
    }
    for function in &mut model.functions {
        function.node.iter_mut().try_for_each(|n| body::each_tensor_of_node(n, &mut take))?;
        function.attribute_proto.iter_mut().try_for_each(|a| body::each_tensor_of_attribute(a, &mut take))?;
    }
    for training in &mut model.training_info {
        let graphs = training.initialization.iter_mut().chain(&mut training.algorithm);
        graphs.into_iter().try_for_each(|g| body::each_tensor(g, &mut take))?;
    }
    Ok(())
}

/// A node on its way into the graph.
struct Pending {
    new: NewNode,
    /// How messages name it.
    label: String,
}

struct Reader<'a> {
    graph: Graph,
    library: &'a Library<'a>,
    files: &'a mut DataFiles,
    warnings: &'a mut Vec<String>,
    /// Values by the names of the file; those of expanded functions are not among them.
    names: BTreeMap<String, ValueId>,
    /// What makes each value, for messages; nothing for one that is only read so far.
    makers: BTreeMap<ValueId, String>,
    pending: Vec<Pending>,
    /// How many of them, at the end, stand for sparse initializers.
    stand_ins: usize,
}

impl<'a> Reader<'a> {
    fn new(graph: Graph, library: &'a Library<'a>, files: &'a mut DataFiles, warnings: &'a mut Vec<String>) -> Self {
        let (names, makers, pending) = (BTreeMap::new(), BTreeMap::new(), Vec::new());
        Self { graph, library, files, warnings, names, makers, pending, stand_ins: 0 }
    }

    /// A new value of the file. Errors: it is made already.
    fn define(&mut self, name: &str, maker: String) -> Result<ValueId, Cause> {
        if let Some(id) = self.names.get(name) {
            let first = self.makers.get(id).cloned().unwrap_or_default();
            return Err(Cause::TwoProducers { value: shown(name), first, second: maker });
        }
        let id = self.graph.add_value(name);
        self.names.insert(name.to_string(), id);
        self.makers.insert(id, maker);
        Ok(id)
    }

    fn initializers(&mut self, tensors: Vec<TensorProto>) -> Result<(), Cause> {
        for (index, proto) in tensors.into_iter().enumerate() {
            let name = proto.name.clone().unwrap_or_default();
            if name.is_empty() {
                return Err(Cause::NoName { what: "initializer", index });
            }
            if self.names.contains_key(&name) {
                return Err(Cause::DuplicateInitializer { name: shown(&name) });
            }
            let label = initializer_label(&name);
            let tensor = tensor::read(proto, &label, false, self.files)?;
            let id = self.define(&name, "an initializer".to_string())?;
            self.graph.make_initializer(id, tensor);
        }
        Ok(())
    }

    /// Adds the inputs, and returns what the shell keeps: initializers that are listed as inputs too, each at its place among the
    /// names of the inputs. Without any there is nothing to keep.
    fn inputs(&mut self, infos: Vec<ValueInfoProto>) -> Result<Vec<ValueInfoProto>, Cause> {
        let mut kept = Vec::new();
        let mut constants = 0;
        let mut seen = std::collections::BTreeSet::new();
        for (index, info) in infos.into_iter().enumerate() {
            let name = info.name.clone().unwrap_or_default();
            if name.is_empty() {
                return Err(Cause::NoName { what: "graph input", index });
            }
            if !seen.insert(name.clone()) {
                return Err(Cause::DuplicateInput { name: shown(&name) });
            }
            if self.names.contains_key(&name) {
                constants += 1;
                kept.push(info);
                continue;
            }
            let id = self.define(&name, "a graph input".to_string())?;
            self.graph.add_input(id, value_info::read(&info));
            kept.push(ValueInfoProto { name: info.name, ..Default::default() });
        }
        if constants == 0 {
            return Ok(Vec::new());
        }
        self.warnings.push(format!("{constants} initializers are also listed as graph inputs: treated as constants"));
        Ok(kept)
    }

    fn sparse_names(&mut self, sparse: &[onnx_proto::SparseTensorProto]) -> Result<(), Cause> {
        for (index, tensor) in sparse.iter().enumerate() {
            let name = tensor.values.as_ref().and_then(|v| v.name.as_deref()).unwrap_or_default();
            if name.is_empty() {
                return Err(Cause::NoName { what: "sparse initializer", index });
            }
            self.define(name, "a sparse initializer".to_string())?;
        }
        Ok(())
    }

    /// Sparse initializers stand in the graph as Constant nodes; [`super::write`] knows them by the name of their value.
    fn sparse_initializers(&mut self, sparse: &[onnx_proto::SparseTensorProto]) -> Result<(), Cause> {
        for tensor in sparse {
            let name = tensor.values.as_ref().and_then(|v| v.name.clone()).unwrap_or_default();
            let attribute = onnx_proto::AttributeProto {
                name: Some("sparse_value".into()),
                r#type: Some(onnx_proto::attribute_type::SPARSE_TENSOR),
                sparse_tensor: Some(Box::new(tensor.clone())),
                ..Default::default()
            };
            let new = NewNode {
                op: "Constant".into(),
                outputs: vec![self.names.get(&name).copied()],
                attrs: vec![attr::read(attribute, &name, self.files)?],
                ..NewNode::default()
            };
            self.pending.push(Pending { new, label: shown(&name) });
            self.stand_ins += 1;
        }
        Ok(())
    }

    fn nodes(&mut self, nodes: Vec<NodeProto>) -> Result<(), Cause> {
        let labels: Vec<String> = nodes.iter().enumerate().map(|(i, n)| node_label(i, n)).collect();
        for ((index, node), label) in nodes.iter().enumerate().zip(&labels) {
            if node.op_type.as_deref().unwrap_or_default().is_empty() {
                return Err(Cause::NoOperator { node: format!("#{index}") });
            }
            for name in node.output.iter().filter(|n| !n.is_empty()) {
                self.define(name, format!("node {label}"))?;
            }
        }
        for (node, label) in nodes.into_iter().zip(labels) {
            if self.library.is_call(&node) {
                self.call(node, &label)?;
            } else {
                let find = |name: &str| self.names.get(name).copied();
                let (inputs, captures) = resolve(&node, &label, &find)?;
                let outputs = node.output.iter().map(|n| find(n)).collect();
                let new = NewNode { inputs, captures, outputs, ..new_node(&self.graph, self.files, node, &label)? };
                self.pending.push(Pending { new, label });
            }
        }
        Ok(())
    }

    fn call(&mut self, node: NodeProto, label: &str) -> Result<(), Cause> {
        for name in node.input.iter().filter(|n| !n.is_empty()) {
            if !self.names.contains_key(name) {
                return Err(Cause::Dangling { node: label.to_string(), value: shown(name) });
            }
        }
        let expansion = self.library.expand(&node, &call_prefix(&node, self.graph.calls().len()))?;
        if self.pending.len() + expansion.nodes.len() > 200_000 {
            return Err(Cause::FunctionSize { what: "nodes", limit: 200_000 });
        }
        let call = self.graph.add_call(node.encode_to_vec().into(), None);
        for new in inlined(&mut self.graph, self.files, expansion, call, &|name| self.names.get(name).copied())? {
            let label = shown(&new.name);
            for v in new.outputs.iter().flatten() {
                self.makers.entry(*v).or_insert_with(|| format!("node {label}"));
            }
            self.pending.push(Pending { new, label });
        }
        Ok(())
    }

    /// Marks the outputs, and returns what the shell keeps: records of outputs that are inputs too.
    fn outputs(&mut self, infos: Vec<ValueInfoProto>) -> Result<Vec<ValueInfoProto>, Cause> {
        let mut kept = Vec::new();
        for (index, info) in infos.into_iter().enumerate() {
            let name = info.name.clone().unwrap_or_default();
            if name.is_empty() {
                return Err(Cause::NoName { what: "graph output", index });
            }
            let id = *self.names.get(&name).ok_or_else(|| Cause::MissingOutput { value: shown(&name) })?;
            let declared: Declared = value_info::read(&info);
            if self.graph.inputs().contains(&id) {
                kept.push(info);
            }
            self.graph.add_output(id, declared);
        }
        Ok(kept)
    }

    /// Adds the nodes, which may stand in any order but not in a circle.
    fn finish(mut self) -> Result<Graph, Cause> {
        let mut maker = vec![None; self.graph.value_count()];
        for (i, p) in self.pending.iter().enumerate() {
            p.new.outputs.iter().flatten().for_each(|v| maker[v.index()] = Some(i));
        }
        let from = |p: &Pending| p.new.inputs.iter().flatten().chain(&p.new.captures).filter_map(|v| maker[v.index()]).collect();
        let reads: Vec<Vec<usize>> = self.pending.iter().map(from).collect();
        let in_order = order::is_topological(&reads).map_err(|cycle| {
            let mut through: Vec<String> = cycle.iter().take(6).map(|i| shown_to(&self.pending[*i].label, 28)).collect();
            if cycle.len() > 6 {
                through.push("..".into());
            }
            Cause::Cycle { through }
        })?;
        // What stands for sparse initializers is at the end for now, and in no order of the file.
        let in_file = reads.len() - self.stand_ins;
        let mut file_order = reads[..in_file].iter().enumerate().map(|(i, from)| from.iter().all(|f| *f < i || *f >= in_file));
        if !file_order.all(|ok| ok) {
            self.warnings.push("nodes are not in topological order: sorted".to_string());
        }
        for p in self.pending {
            self.graph.add_node(p.new);
        }
        if !in_order {
            self.graph.sort();
        }
        Ok(self.graph)
    }
}

/// Everything of a node but what it reads and makes.
fn new_node(graph: &Graph, files: &mut DataFiles, mut node: NodeProto, label: &str) -> Result<NewNode, Cause> {
    let domain = domain(node.domain.as_deref()).to_string();
    if graph.opset(&domain).is_none() {
        return Err(Cause::DomainNotImported { node: label.to_string(), domain: shown(&domain) });
    }
    let mut attrs: Vec<crate::graph::Attr> = Vec::with_capacity(node.attribute.len());
    for attribute in std::mem::take(&mut node.attribute) {
        let attr = attr::read(attribute, label, files)?;
        if attrs.iter().any(|a| a.name == attr.name) {
            let reason = "appears twice".to_string();
            return Err(Cause::BadAttribute { node: label.to_string(), attribute: shown(&attr.name), reason });
        }
        attrs.push(attr);
    }
    let extra = node_extra(&node);
    let (name, op) = (node.name.unwrap_or_default(), node.op_type.unwrap_or_default());
    Ok(NewNode { name, op, domain, attrs, extra, ..NewNode::default() })
}

/// The nodes of an expansion; values inside it are new ones of the graph, those around it are found by their names.
pub(super) fn inlined(
    graph: &mut Graph,
    files: &mut DataFiles,
    expansion: Expansion,
    call: usize,
    outer: &dyn Fn(&str) -> Option<ValueId>,
) -> Result<Vec<NewNode>, Cause> {
    let Expansion { slots, nodes, imports, .. } = expansion;
    for (domain, version) in imports {
        graph.set_opset(&domain, version);
    }
    let mut ids = Vec::with_capacity(slots.len());
    for slot in &slots {
        ids.push(match slot {
            Slot::Outer(name) => outer(name),
            Slot::Inner(name) => Some(graph.add_value(name)),
        });
    }
    let mut out = Vec::with_capacity(nodes.len());
    for mut flat in nodes {
        let id = |slot: &Option<usize>| slot.and_then(|s| ids[s]);
        function::name_bodies(&mut flat, &|slot| ids[slot].map(|v| graph.value(v).name().to_string()))?;
        let label = shown(flat.node.name.as_deref().unwrap_or_default());
        let captures = body::captures(&flat.node).iter().filter_map(|n| graph.find(n)).collect();
        let (inputs, outputs) = (flat.inputs.iter().map(id).collect(), flat.outputs.iter().map(id).collect());
        out.push(NewNode { inputs, captures, outputs, call: Some(call), ..new_node(graph, files, flat.node, &label)? });
    }
    Ok(out)
}

fn node_label(index: usize, node: &NodeProto) -> String {
    match node.name.as_deref() {
        None | Some("") => format!("#{index} ({})", shown(node.op_type.as_deref().unwrap_or_default())),
        Some(name) => shown(name),
    }
}

/// What names of an expanded call start with; `number` counts calls, so unnamed ones get names of their own.
pub(super) fn call_prefix(call: &NodeProto, number: usize) -> String {
    match call.name.as_deref() {
        None | Some("") => format!("{}_{number}", call.op_type.as_deref().unwrap_or_default()),
        Some(name) => name.to_string(),
    }
}

/// The rest of a node's record: empty or unusual spellings of name and domain, overload, documentation, metadata.
pub(super) fn node_extra(node: &NodeProto) -> Bytes {
    let rest = NodeProto {
        name: node.name.clone().filter(String::is_empty),
        domain: node.domain.clone().filter(|d| domain(Some(d)).is_empty()),
        overload: node.overload.clone(),
        doc_string: node.doc_string.clone(),
        metadata_props: node.metadata_props.clone(),
        device_configurations: node.device_configurations.clone(),
        ..NodeProto::default()
    };
    rest.encode_to_vec().into()
}

type Ids = (Vec<Option<ValueId>>, Vec<ValueId>);

/// Inputs and captures of a node.
fn resolve(node: &NodeProto, label: &str, find: &dyn Fn(&str) -> Option<ValueId>) -> Result<Ids, Cause> {
    let known = |name: &str| find(name).ok_or_else(|| Cause::Dangling { node: label.to_string(), value: shown(name) });
    let input = |name: &String| if name.is_empty() { Ok(None) } else { known(name).map(Some) };
    let inputs = node.input.iter().map(input).collect::<Result<_, _>>()?;
    let captures = body::captures(node).iter().map(|n| known(n)).collect::<Result<_, _>>()?;
    Ok((inputs, captures))
}
