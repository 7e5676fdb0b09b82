//! Model-local functions, expanded for analysis.
//!
//! Example: the call `blk = local.Block(x, w) -> y` of a function with the body `t = MatMul(x, w); y = Relu(t)` becomes the nodes
//! `blk/MatMul_0` and `blk/Relu_1`; the inner value is called `blk/t`. Calls inside functions are expanded too. Reading and writing
//! both expand: what was read as a call is written as one where the nodes in the graph are still what a fresh expansion gives.
//!
//! Source: ONNX IR specification, Functions.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use onnx_proto::{AttributeProto, FunctionProto, GraphProto, NodeProto, OperatorSetIdProto};
use prost::Message;

use super::body;
use super::error::{Cause, shown};

/// Domain, name, overload.
pub(super) type Key = (String, String, String);

/// A domain as the graph spells it: `ai.onnx` is the default domain.
pub(super) fn domain(spelled: Option<&str>) -> &str {
    match spelled {
        None | Some("ai.onnx") => "",
        Some(other) => other,
    }
}

fn key_of_node(node: &NodeProto) -> Key {
    let text = |t: &Option<String>| t.clone().unwrap_or_default();
    (domain(node.domain.as_deref()).to_string(), text(&node.op_type), text(&node.overload))
}

fn key_of_function(function: &FunctionProto) -> Key {
    let text = |t: &Option<String>| t.clone().unwrap_or_default();
    (domain(function.domain.as_deref()).to_string(), text(&function.name), text(&function.overload))
}

/// A value of an expansion, by its number.
#[derive(Clone, Debug)]
pub(super) enum Slot {
    /// A value around the call, by its name.
    Outer(String),
    /// A value of the body, with the name that it should get.
    Inner(String),
}

/// Names of a function's body, each with its slot; `None` for an input that the call leaves out.
type Scope = BTreeMap<String, Option<usize>>;

/// A node of an expansion.
#[derive(Clone, Debug)]
pub(super) struct Flat {
    /// The node with its attributes resolved and its name made; its inputs and outputs are names of the function.
    pub(super) node: NodeProto,
    /// Its inputs.
    pub(super) inputs: Vec<Option<usize>>,
    /// Its outputs.
    pub(super) outputs: Vec<Option<usize>>,
    /// What the names that its subgraphs capture mean.
    pub(super) scope: Rc<Scope>,
    /// The calls that it came from, `outer/inner`.
    pub(super) prefix: String,
}

/// A call, expanded.
#[derive(Clone, Debug, Default)]
pub(super) struct Expansion {
    /// All values.
    pub(super) slots: Vec<Slot>,
    /// All nodes, in the order of the bodies.
    pub(super) nodes: Vec<Flat>,
    /// Imports of the functions that the model lacks.
    pub(super) imports: BTreeMap<String, i64>,
    text_len: usize,
}

impl Expansion {
    fn slot(&mut self, slot: Slot) -> usize {
        self.slots.push(slot);
        self.slots.len() - 1
    }
}

/// Nodes of all expansions together, and bytes that they copy, at most.
const NODE_LIMIT: usize = 200_000;
const TEXT_LIMIT: usize = 1 << 30;
/// Calls inside calls, at most.
const DEPTH_LIMIT: usize = 32;

/// The functions of a model.
#[derive(Debug)]
pub(super) struct Library<'a> {
    functions: BTreeMap<Key, &'a FunctionProto>,
    opsets: BTreeMap<String, i64>,
}

impl<'a> Library<'a> {
    /// The functions of a model with these opset imports. Errors: two functions of one name.
    pub(super) fn new(functions: &'a [FunctionProto], opsets: &[(String, i64)]) -> Result<Self, Cause> {
        let mut table = BTreeMap::new();
        for function in functions {
            let key = key_of_function(function);
            let name = label(&key);
            if table.insert(key, function).is_some() {
                return Err(Cause::DuplicateFunction { name });
            }
        }
        Ok(Self { functions: table, opsets: opsets.iter().cloned().collect() })
    }

    /// The same with one function more.
    pub(super) fn with<'b>(&self, function: &'b FunctionProto) -> Result<Library<'b>, Cause>
    where
        'a: 'b,
    {
        let key = key_of_function(function);
        let mut functions: BTreeMap<Key, &'b FunctionProto> = self.functions.iter().map(|(k, f)| (k.clone(), *f)).collect();
        let name = label(&key);
        match functions.insert(key, function) {
            Some(_) => Err(Cause::DuplicateFunction { name }),
            None => Ok(Library { functions, opsets: self.opsets.clone() }),
        }
    }

    /// Whether a node calls a function of the model.
    pub(super) fn is_call(&self, node: &NodeProto) -> bool {
        !self.functions.is_empty() && self.functions.contains_key(&key_of_node(node))
    }

    /// Expands a call; names of inner nodes and values start with `prefix`.
    pub(super) fn expand(&self, call: &NodeProto, prefix: &str) -> Result<Expansion, Cause> {
        let mut out = Expansion::default();
        let mut names: BTreeMap<&str, usize> = BTreeMap::new();
        let mut outer = |name, out: &mut Expansion| match name {
            "" => None,
            name => Some(*names.entry(name).or_insert_with(|| out.slot(Slot::Outer(name.to_string())))),
        };
        let inputs = call.input.iter().map(|n| outer(n, &mut out)).collect();
        let outputs = call.output.iter().map(|n| outer(n, &mut out)).collect();
        self.enter(call, inputs, outputs, prefix, &mut Vec::new(), &mut out)?;
        Ok(out)
    }

    fn enter(
        &self,
        call: &NodeProto,
        inputs: Vec<Option<usize>>,
        outputs: Vec<Option<usize>>,
        prefix: &str,
        above: &mut Vec<Key>,
        out: &mut Expansion,
    ) -> Result<(), Cause> {
        let key = key_of_node(call);
        let Some(function) = self.functions.get(&key).copied() else {
            return Err(Cause::Internal { what: "a call of no function is expanded" });
        };
        if above.contains(&key) || above.len() == DEPTH_LIMIT {
            let through = above.iter().skip_while(|k| **k != key).chain([&key]).map(label);
            return Err(Cause::FunctionRecursion { through: through.take(DEPTH_LIMIT).collect() });
        }
        self.check_opsets(function, &key, out)?;
        check_count(prefix, &key, "inputs", inputs.len(), function.input.len())?;
        check_count(prefix, &key, "outputs", outputs.len(), function.output.len())?;
        above.push(key);
        let (scope, aliases) = scope(function, &inputs, &outputs, prefix, out)?;
        let given = given(call, function);
        for (i, node) in function.node.iter().enumerate() {
            let op = node.op_type.as_deref().unwrap_or_default();
            let name = match node.name.as_deref() {
                None | Some("") => format!("{prefix}/{op}_{i}"),
                Some(name) => format!("{prefix}/{name}"),
            };
            if op.is_empty() {
                return Err(Cause::NoOperator { node: format!("#{i} of {}", shown(prefix)) });
            }
            let find = |value: &String| match value.as_str() {
                "" => Ok(None),
                v => scope.get(v).copied().ok_or_else(|| Cause::Dangling { node: shown(&name), value: shown(v) }),
            };
            let inputs = node.input.iter().map(find).collect::<Result<Vec<_>, _>>()?;
            let outputs = node.output.iter().map(find).collect::<Result<Vec<_>, _>>()?;
            let attribute = body::resolve_refs(&node.attribute, &given);
            let node = NodeProto { attribute, name: Some(name), ..node.clone() };
            if self.is_call(&node) {
                let name = node.name.clone().unwrap_or_default();
                self.enter(&node, inputs, outputs, &name, above, out)?;
            } else {
                push(out, Flat { node, inputs, outputs, scope: Rc::clone(&scope), prefix: prefix.to_string() })?;
            }
        }
        for (from, to) in aliases {
            let name = Some(format!("{prefix}/Identity_{to}"));
            let node = NodeProto { op_type: Some("Identity".into()), name, ..NodeProto::default() };
            let scope = Rc::clone(&scope);
            push(out, Flat { node, inputs: vec![Some(from)], outputs: vec![Some(to)], scope, prefix: prefix.to_string() })?;
        }
        above.pop();
        Ok(())
    }

    /// A body is read by the model's opsets, so where it uses a domain, the versions must agree.
    fn check_opsets(&self, function: &FunctionProto, key: &Key, out: &mut Expansion) -> Result<(), Cause> {
        let imports: BTreeMap<&str, i64> = function.opset_import.iter().map(import).collect();
        let mut used = BTreeSet::new();
        for node in &function.node {
            let mut see = |n: &NodeProto| {
                if !self.is_call(n) {
                    used.insert(domain(n.domain.as_deref()).to_string());
                }
            };
            see(node);
            body::bodies(node).for_each(|b| body::each_node(b, &mut |n| see(n)));
        }
        for d in used {
            match (imports.get(d.as_str()).copied(), self.opsets.get(&d).copied()) {
                (Some(function), Some(model)) if function != model => {
                    return Err(Cause::FunctionOpset { name: label(key), domain: shown(&d), function, model });
                }
                (Some(function), None) => {
                    out.imports.insert(d, function);
                }
                (None, None) => return Err(Cause::DomainNotImported { node: label(key), domain: shown(&d) }),
                (Some(_) | None, Some(_)) => {}
            }
        }
        Ok(())
    }

    /// Functions that the nodes call, directly or through other functions.
    pub(super) fn reachable<'n>(&self, roots: impl Iterator<Item = &'n NodeProto>) -> BTreeSet<Key> {
        let mut found = BTreeSet::new();
        let mut open: Vec<Key> = Vec::new();
        let mut see = |node: &NodeProto, open: &mut Vec<Key>| {
            let mut one = |n: &NodeProto| {
                let key = key_of_node(n);
                if self.functions.contains_key(&key) && found.insert(key.clone()) {
                    open.push(key);
                }
            };
            one(node);
            body::bodies(node).for_each(|b| body::each_node(b, &mut |n| one(n)));
        };
        roots.for_each(|n| see(n, &mut open));
        while let Some(key) = open.pop() {
            if let Some(function) = self.functions.get(&key) {
                function.node.iter().for_each(|n| see(n, &mut open));
            }
        }
        found
    }

    /// Whether `function` is in a set made by [`Library::reachable`].
    pub(super) fn is_in(function: &FunctionProto, set: &BTreeSet<Key>) -> bool {
        set.contains(&key_of_function(function))
    }
}

fn push(out: &mut Expansion, flat: Flat) -> Result<(), Cause> {
    // Raw bytes are shared by all expansions, so they cost nothing.
    let tensors = flat.node.attribute.iter().filter_map(|a| a.t.as_ref());
    let shared: usize = tensors.filter_map(|t| t.raw_data.as_ref()).map(|r| r.len()).sum();
    out.text_len += flat.node.encoded_len().saturating_sub(shared) + flat.prefix.len();
    out.nodes.push(flat);
    if out.nodes.len() > NODE_LIMIT {
        return Err(Cause::FunctionSize { what: "nodes", limit: NODE_LIMIT });
    }
    if out.text_len > TEXT_LIMIT {
        return Err(Cause::FunctionSize { what: "bytes", limit: TEXT_LIMIT });
    }
    Ok(())
}

/// Normalized domain and version of an import.
pub(super) fn import(opset: &OperatorSetIdProto) -> (&str, i64) {
    (domain(opset.domain.as_deref()), opset.version.unwrap_or(0))
}

fn label(key: &Key) -> String {
    let name = if key.0.is_empty() { key.1.clone() } else { format!("{}.{}", key.0, key.1) };
    shown(&name)
}

fn check_count(node: &str, key: &Key, what: &'static str, given: usize, taken: usize) -> Result<(), Cause> {
    if given <= taken {
        return Ok(());
    }
    Err(Cause::FunctionArity { node: shown(node), name: label(key), what, given, taken })
}

/// Attributes that a call gives, and defaults for those that it does not.
fn given<'n>(call: &'n NodeProto, function: &'n FunctionProto) -> BTreeMap<&'n str, &'n AttributeProto> {
    let defaults = function.attribute_proto.iter().chain(&call.attribute);
    defaults.map(|a| (a.name.as_deref().unwrap_or_default(), a)).collect()
}

/// Pairs of slots that an Identity joins, from and to.
type Aliases = Vec<(usize, usize)>;

/// Slots for the names of a body, and pairs of slots that an Identity must join: an output that is an input, or one listed twice.
fn scope(
    function: &FunctionProto,
    inputs: &[Option<usize>],
    outputs: &[Option<usize>],
    prefix: &str,
    out: &mut Expansion,
) -> Result<(Rc<Scope>, Aliases), Cause> {
    let mut scope = Scope::new();
    for (i, name) in function.input.iter().enumerate() {
        scope.insert(name.clone(), inputs.get(i).copied().flatten());
    }
    let mut results: BTreeMap<&str, usize> = BTreeMap::new();
    let mut joined = Vec::new();
    for (name, to) in function.output.iter().zip(outputs).filter_map(|(n, to)| Some((n, (*to)?))) {
        if scope.contains_key(name) || results.contains_key(name.as_str()) {
            joined.push((name, to));
        } else {
            results.insert(name, to);
        }
    }
    let mut makers: BTreeMap<&str, String> = BTreeMap::new();
    for (i, node) in function.node.iter().enumerate() {
        let maker = format!("node {}/#{i} ({})", shown(prefix), shown(node.op_type.as_deref().unwrap_or_default()));
        for name in node.output.iter().filter(|n| !n.is_empty()) {
            if let Some(first) = makers.insert(name, maker.clone()) {
                return Err(Cause::TwoProducers { value: shown(name), first, second: maker });
            }
            if scope.contains_key(name) {
                let first = format!("an input of function {}", shown(function.name.as_deref().unwrap_or_default()));
                return Err(Cause::TwoProducers { value: shown(name), first, second: maker });
            }
        }
    }
    for name in makers.keys() {
        let slot = results.get(name).copied();
        let slot = slot.unwrap_or_else(|| out.slot(Slot::Inner(format!("{prefix}/{name}"))));
        scope.insert((*name).to_string(), Some(slot));
    }
    let missing = |name: &str| Cause::Dangling { node: shown(prefix), value: shown(name) };
    if let Some(name) = results.keys().find(|n| !scope.contains_key(**n)) {
        return Err(missing(name));
    }
    let mut aliases = Vec::new();
    for (name, to) in joined {
        aliases.push((scope.get(name).copied().flatten().ok_or_else(|| missing(name))?, to));
    }
    Ok((Rc::new(scope), aliases))
}

/// Gives the subgraphs of an expanded node the names of the graph: what they capture by `name_of`, what they make under the prefix.
pub(super) fn name_bodies(flat: &mut Flat, name_of: &dyn Fn(usize) -> Option<String>) -> Result<(), Cause> {
    let mut names = BTreeMap::new();
    for free in body::captures(&flat.node) {
        let slot = flat.scope.get(&free).copied().flatten();
        let name = slot
            .and_then(name_of)
            .ok_or_else(|| Cause::Dangling { node: shown(flat.node.name.as_deref().unwrap_or_default()), value: shown(&free) })?;
        names.insert(free, name);
    }
    if flat.node.attribute.iter().any(|a| a.g.is_some() || !a.graphs.is_empty()) {
        let prefix = flat.prefix.clone();
        body::rename(&mut flat.node, &names, Some(&|inner: &str| format!("{prefix}/{inner}")));
    }
    Ok(())
}

/// Domains of the nodes of a body.
pub(super) fn domains(graph: &GraphProto, seen: &mut BTreeSet<String>) {
    body::each_node(graph, &mut |n| {
        seen.insert(domain(n.domain.as_deref()).to_string());
    });
}
