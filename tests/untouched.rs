//! Contract C4: a structural diff of a model and of what `slice` made of it shows what `slice --json` tells, and nothing else.
//!
//! The files are compared as they were read: models with functions thus with their bodies written out.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "tests, with functions of their own")]

#[path = "command/mod.rs"]
mod command;

use bytes::Bytes;
use command::{Sandbox, digits, floats, graph, info, mlp, node, opset};
use onnx_proto::{AttributeProto, ModelProto, StringStringEntryProto};
use prost::Message;
use serde_json::Value as Json;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use vitrim::graph::{Graph, NodeId, Tensor, Use, ValueId};
use vitrim::infer::{self, Facts, Known};

/// A file as a message, as a graph, and its shapes.
struct Side {
    message: ModelProto,
    graph: Graph,
    facts: Facts,
}

impl Side {
    fn read(path: &Path) -> Self {
        let message = ModelProto::decode(Bytes::from(std::fs::read(path).unwrap())).unwrap();
        let graph = vitrim::onnx::read(path).unwrap_or_else(|e| panic!("{e}")).graph;
        let facts = infer::facts(&graph).unwrap();
        Self { message, graph, facts }
    }

    fn name(&self, v: Option<ValueId>) -> &str {
        v.map_or("", |v| self.graph.value(v).name())
    }

    /// The name by which a node of both files is known: that of its first output.
    fn key(&self, id: NodeId) -> &str {
        self.graph.node(id).outputs().iter().flatten().next().map_or("", |v| self.graph.value(*v).name())
    }

    fn nodes(&self) -> BTreeMap<&str, NodeId> {
        self.graph.order().iter().map(|id| (self.key(*id), *id)).collect()
    }

    /// What is constant by itself: initializers and outputs of Constant nodes.
    fn constant(&self, name: &str) -> Option<Tensor> {
        self.graph.constant(self.graph.find(name)?)
    }
}

/// An axis, what it loses, and the order of what stays where it is not that of the model.
type Gone = (usize, BTreeSet<usize>, Option<Vec<usize>>);

/// What `slice --json` told, by the name of the constant.
struct Told {
    cuts: BTreeMap<String, Vec<Gone>>,
    /// By the name of the copy: the original, and what it lost.
    cloned: BTreeMap<String, (String, Vec<Gone>)>,
    removed: Vec<String>,
    added: Vec<String>,
}

impl Told {
    fn new(told: &Json) -> Self {
        let text = |v: &Json| v.as_str().unwrap().to_string();
        let list = |v: &Json| v.as_array().map(|l| l.iter().map(|i| i.as_u64().unwrap() as usize).collect::<Vec<_>>());
        let gone = |c: &Json| -> Gone {
            let removed = list(&c["removed"]).unwrap().into_iter().collect();
            (c["axis"].as_u64().unwrap() as usize, removed, list(&c["order"]))
        };
        let mut this = Self { cuts: BTreeMap::new(), cloned: BTreeMap::new(), removed: Vec::new(), added: Vec::new() };
        for c in told["cuts"].as_array().unwrap() {
            this.cuts.entry(text(&c["initializer"])).or_default().push(gone(c));
        }
        for c in told["cloned"].as_array().unwrap() {
            this.cloned.entry(text(&c["user"])).or_insert((text(&c["initializer"]), Vec::new())).1.push(gone(c));
        }
        for (list, key) in [(&mut this.removed, "removed"), (&mut this.added, "added")] {
            *list = told["nodes"][key].as_array().unwrap().iter().map(text).collect();
            list.sort();
        }
        this
    }
}

fn without(tensor: Tensor, gone: &[Gone]) -> Tensor {
    gone.iter().fold(tensor, |t, (axis, removed, order)| {
        let kept: Vec<usize> = (0..t.dims[*axis]).filter(|i| !removed.contains(i)).collect();
        let mut sorted = order.clone().unwrap_or_else(|| kept.clone());
        sorted.sort_unstable();
        assert_eq!(sorted, kept, "the order told is not one of what stays");
        t.take(*axis, order.as_ref().unwrap_or(&kept))
    })
}

/// Everything that differs and was not told.
struct Diff<'a> {
    old: &'a Side,
    new: &'a Side,
    told: Told,
    faults: Vec<String>,
}

impl Diff<'_> {
    fn expect(&mut self, holds: bool, what: impl FnOnce() -> String) {
        if !holds {
            self.faults.push(what());
        }
    }

    fn run(mut self) -> Vec<String> {
        self.model();
        self.constants();
        self.nodes();
        self.faults
    }

    /// What stands around nodes and constants: versions, texts, inputs and outputs.
    fn model(&mut self) {
        let shell = |side: &Side| {
            let mut m = side.message.clone();
            let mut g = m.graph.take().unwrap();
            let calls = m.functions.len();
            m.functions.clear();
            let outputs = g.output.clone();
            // Initializers that are listed as inputs too follow their tensors.
            let constants: BTreeSet<&str> = g.initializer.iter().filter_map(|t| t.name.as_deref()).collect();
            let inputs: Vec<_> =
                g.input.iter().filter(|i| !i.name.as_deref().is_some_and(|n| constants.contains(n))).cloned().collect();
            (g.node, g.initializer, g.sparse_initializer, g.input, g.output) = Default::default();
            g.value_info.clear();
            (m, g, inputs, outputs, calls)
        };
        let (a, b) = (shell(self.old), shell(self.new));
        self.expect(a.0 == b.0, || format!("the model around the graph: {:?} became {:?}", a.0, b.0));
        self.expect(a.1 == b.1, || format!("texts of the graph: {:?} became {:?}", a.1, b.1));
        self.expect(a.2 == b.2, || format!("inputs: {:?} became {:?}", a.2, b.2));
        self.expect(a.3 == b.3, || format!("outputs: {:?} became {:?}", a.3, b.3));
        self.expect(a.4 >= b.4, || "functions that were not there".into());
        let listed = |side: &Side, v: &[ValueId]| v.iter().map(|v| side.name(Some(*v)).to_string()).collect::<Vec<_>>();
        let order = |side: &Side| (listed(side, side.graph.inputs()), listed(side, side.graph.outputs()));
        self.expect(order(self.old) == order(self.new), || "the order of inputs or outputs".into());
    }

    fn constants(&mut self) {
        let names =
            |side: &Side| -> Vec<String> { side.graph.initializers().iter().map(|v| side.name(Some(*v)).to_string()).collect() };
        let (before, after) = (names(self.old), names(self.new));
        let (old_set, new_set): (BTreeSet<_>, BTreeSet<_>) = (before.iter().collect(), after.iter().collect());
        let both: Vec<_> = before.iter().filter(|n| new_set.contains(n)).collect();
        let kept: Vec<_> = after.iter().filter(|n| old_set.contains(n)).collect();
        self.expect(both == kept, || "the order of initializers".into());
        let is_new_behind = after.iter().skip_while(|n| old_set.contains(n)).all(|n| !old_set.contains(n));
        self.expect(is_new_behind, || "new initializers stand between the old ones".into());
        let all = self.old.graph.values().filter(|(v, _)| self.old.graph.is_constant(*v));
        for name in all.map(|(_, v)| v.name().to_string()).collect::<Vec<_>>() {
            self.constant(&name);
        }
        for name in self.told.cuts.keys().cloned().collect::<Vec<_>>() {
            self.expect(self.old.constant(&name).is_some(), || format!("'{name}' was cut, and is no constant of the model"));
        }
        for (copy, (source, gone)) in self.told.cloned.clone() {
            let expected = self.old.constant(&source).map(|t| without(t, &gone));
            let found = self.new.constant(&copy);
            let same = expected.zip(found).is_some_and(|(a, b)| (a.dims, a.dtype, a.bytes) == (b.dims, b.dtype, b.bytes));
            self.expect(same, || format!("the copy '{copy}' is not '{source}' without what was told"));
        }
    }

    /// A constant of the model: cut as told, or a target of shapes that a cut moved, or as it was.
    fn constant(&mut self, name: &str) {
        let (old, Some(new)) = (self.old.constant(name).unwrap(), self.new.constant(name)) else { return };
        let is_cut = self.told.cuts.contains_key(name);
        let expected = without(old.clone(), self.told.cuts.get(name).map_or(&[], Vec::as_slice));
        let sizes = || !is_cut && old.dtype == new.dtype && old.dims == new.dims && old.to_i64s().is_some_and(|v| v.len() <= 16);
        if expected != new && !(sizes() && self.is_read_where_shapes_moved(name)) {
            self.faults.push(format!("'{name}' {:?} became {:?}; expected {:?}", old.dims, new.dims, expected.dims));
        }
    }

    fn is_read_where_shapes_moved(&self, name: &str) -> bool {
        let Some(v) = self.new.graph.find(name) else { return false };
        let users = self.new.graph.value(v).users().iter();
        users.clone().count() > 0 && users.clone().all(|u| self.leads_to_moved(*u, 8))
    }

    /// Whether what is read here becomes, perhaps through arithmetic of sizes, the target of a node whose value changed its shape.
    fn leads_to_moved(&self, at: Use, depth: usize) -> bool {
        let node = self.new.graph.node(at.node);
        let outputs = || node.outputs().iter().flatten();
        outputs().any(|v| self.moved(self.new.name(Some(*v))))
            || depth > 0 && outputs().any(|v| self.new.graph.value(*v).users().iter().any(|u| self.leads_to_moved(*u, depth - 1)))
    }

    /// Whether a value has another shape than before, or was not there.
    fn moved(&self, name: &str) -> bool {
        let shape = |side: &Side| side.graph.find(name).and_then(|v| side.facts.shape(v).map(<[_]>::to_vec));
        name.is_empty() || shape(self.old) != shape(self.new)
    }

    fn nodes(&mut self) {
        let (old, new) = (self.old.nodes(), self.new.nodes());
        let labels = |side: &Side, ids: Vec<NodeId>| {
            let mut l: Vec<String> = ids.into_iter().map(|id| side.graph.label(id)).collect();
            l.sort();
            l
        };
        let gone = labels(self.old, old.iter().filter(|(k, _)| !new.contains_key(*k)).map(|(_, id)| *id).collect());
        let come: Vec<NodeId> = new.iter().filter(|(k, _)| !old.contains_key(*k)).map(|(_, id)| *id).collect();
        let come = labels(self.new, come);
        let (removed, added) = (self.told.removed.clone(), self.told.added.clone());
        self.expect(gone == removed, || format!("nodes gone {gone:?}, told {removed:?}"));
        self.expect(come == added, || format!("new nodes {come:?}, told {added:?}"));
        let order = |side: &Side, other: &BTreeMap<&str, NodeId>| -> Vec<String> {
            let ids = side.graph.order().iter().map(|id| side.key(*id)).filter(|k| other.contains_key(k));
            ids.map(str::to_string).collect()
        };
        self.expect(order(self.old, &new) == order(self.new, &old), || "the order of nodes".into());
        for (key, id) in &old {
            if let Some(now) = new.get(key) {
                self.node(*id, *now);
            }
        }
    }

    fn node(&mut self, before: NodeId, after: NodeId) {
        let (a, b) = (self.old.graph.node(before), self.new.graph.node(after));
        let label = self.old.graph.label(before);
        let fixed = (a.name(), a.op(), a.domain(), a.extra()) == (b.name(), b.op(), b.domain(), b.extra());
        self.expect(fixed, || format!("{label}: name, operator, text or metadata"));
        let names = |side: &Side, list: &[Option<ValueId>]| list.iter().map(|v| side.name(*v).to_string()).collect::<Vec<_>>();
        let (out_a, out_b) = (names(self.old, a.outputs()), names(self.new, b.outputs()));
        self.expect(out_a == out_b, || format!("{label}: outputs {out_a:?} became {out_b:?}"));
        let (in_a, in_b) = (names(self.old, a.inputs()), names(self.new, b.inputs()));
        let touched = in_a != in_b || in_a.iter().chain(&out_a).filter(|n| !n.is_empty()).any(|n| self.moved(n));
        let same_attrs = a.op() == "Constant" || a.attrs() == b.attrs();
        self.expect(touched || same_attrs, || format!("{label}: attributes, though nothing of it was cut"));
        self.expect(in_a.len() == in_b.len(), || format!("{label}: number of inputs"));
        for (x, y) in in_a.iter().zip(&in_b).filter(|(x, y)| x != y) {
            let fine = self.is_replacement(x, y, Use { node: after, slot: 0 });
            self.expect(fine, || format!("{label}: reads '{y}' in the place of '{x}', and nobody told"));
        }
    }

    /// What may stand in the place of another value: its told copy, what a told node makes, a size that a cut changed, or a number
    /// of the original that a cut must not change.
    fn is_replacement(&self, old: &str, new: &str, at: Use) -> bool {
        if let Some((source, _)) = self.told.cloned.get(new) {
            return source == old;
        }
        let Some(v) = self.new.graph.find(new) else { return false };
        if let Some((producer, _)) = self.new.graph.value(v).producer() {
            let is_old = self.old.graph.find(new).is_some();
            return !is_old && self.told.added.binary_search(&self.new.graph.label(producer)).is_ok();
        }
        let Some(t) = self.new.graph.constant(v) else { return false };
        let known = self.old.graph.find(old).and_then(|v| self.old.facts.get(v).known.clone());
        let frozen = match &known {
            Some(Known::Ints(n)) => n.iter().map(infer::Dim::known).collect::<Option<Vec<_>>>() == t.to_i64s(),
            Some(Known::Floats(n)) => t.to_f32s().is_some_and(|t| t.iter().zip(n).all(|(a, b)| *a == *b as f32)),
            None => false,
        };
        frozen || t.to_i64s().is_some() && self.leads_to_moved(at, 8)
    }
}

/// Cuts a random plan and compares; what was cut, or `None` where nothing can be.
fn faults_of(model: &Path, keep: &str, seed: &str, layout: &str) -> Option<Vec<String>> {
    let sandbox = Sandbox::default();
    let file = model.display().to_string();
    let how = ["--by", "random", "--seed", seed, "--layout", layout, "--round", "2"];
    let plan = sandbox.run(&[&["plan", &file, "--keep", keep, "-o", "p.json", "-q"][..], &how].concat());
    let is_refused = plan.stderr.contains("cannot keep different numbers of dims") && layout == "grouped";
    if plan.code == 2 && (is_refused || plan.stderr.contains("no prunable group")) {
        return None;
    }
    if plan.code != 0 {
        return Some(vec![plan.stderr]);
    }
    let sliced = sandbox.run(&["slice", &file, "--plan", "p.json", "-o", "out.onnx", "--json"]);
    if sliced.code != 0 {
        return Some(vec![sliced.stderr]);
    }
    let (old, new) = (Side::read(model), Side::read(&sandbox.at("out.onnx")));
    let told = Told::new(&sliced.json());
    let changed = !told.cuts.is_empty() || !told.cloned.is_empty() || !told.added.is_empty();
    let mut faults = Diff { old: &old, new: &new, told, faults: Vec::new() }.run();
    if !changed {
        faults.push("nothing was cut".into());
    }
    Some(faults)
}

const KEEPS: [(&str, &str, &str); 4] = [
    ("mlp=0.5,qk=0.5,vo=0.75,channel=0.5", "7", "equal"),
    ("head=0.67,token=0.7", "3", "equal"),
    ("vo=0.5,token=0.6,mlp=0.3", "11", "equal"),
    ("qk=0.6,vo=0.6,token=0.8", "5", "grouped"),
];

#[test]
fn only_what_was_told_differs() {
    for (keep, seed, layout) in KEEPS {
        let faults = faults_of(Path::new(&digits("vit-digits.onnx")), keep, seed, layout).expect("something can be cut");
        assert!(faults.is_empty(), "{keep}:\n{}", faults.join("\n"));
    }
}

/// An MLP with everything that a cut must leave alone: texts, metadata, an operator of a foreign domain, dynamic axes, unused
/// values, a shared shape constant, and old-style inputs for initializers.
fn decorated() -> ModelProto {
    let mut model = mlp();
    let note = |key: &str| StringStringEntryProto { key: Some(key.into()), value: Some(format!("value of {key}")) };
    model.opset_import.push(opset("my.domain", 3));
    model.doc_string = Some("a model".into());
    model.producer_name = Some("somebody".into());
    model.metadata_props = vec![note("a"), note("b")];
    let g = graph(&mut model);
    g.doc_string = Some("a graph".into());
    g.metadata_props = vec![note("graph")];
    for n in &mut g.node {
        n.doc_string = Some(format!("about {}", n.name()));
        n.metadata_props = vec![note("node")];
    }
    for t in &mut g.initializer {
        t.doc_string = Some(format!("about {}", t.name()));
    }
    let mut foreign = node("Q", "Quux", &["y"], &["q"]);
    foreign.domain = Some("my.domain".into());
    foreign.attribute = vec![AttributeProto { name: Some("k".into()), i: Some(4), r#type: Some(2), ..Default::default() }];
    g.node.push(foreign);
    g.node.push(node("Unread", "Neg", &["x"], &["unread"]));
    g.output.push(info("q", &[-1, 3]));
    g.initializer.push(floats("spare", &[2], &[1.0, 2.0]));
    g.input.push(info("W", &[4, 16]));
    model
}

#[test]
fn texts_foreign_nodes_and_unused_values_stay() {
    let sandbox = Sandbox::default();
    sandbox.model("m.onnx", &decorated());
    let faults = faults_of(&sandbox.at("m.onnx"), "mlp=0.5", "0", "equal").expect("something can be cut");
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn a_change_that_nobody_told_is_seen() {
    let sandbox = Sandbox::default();
    sandbox.model("m.onnx", &decorated());
    let run = |args: &[&str]| {
        let ran = sandbox.run(args);
        assert_eq!(ran.code, 0, "{ran:?}");
        ran
    };
    run(&["plan", "m.onnx", "--by", "random", "--keep", "mlp=0.5", "-o", "p.json"]);
    let told = run(&["slice", "m.onnx", "--plan", "p.json", "-o", "out.onnx", "--json"]).json();
    let bytes = std::fs::read(sandbox.at("out.onnx")).unwrap();
    let sound = ModelProto::decode(Bytes::from(bytes)).unwrap();
    type Change = fn(&mut ModelProto);
    let changes: [(&str, Change); 8] = [
        ("doc string", |m| graph(m).node[0].doc_string = None),
        ("metadata", |m| m.metadata_props.truncate(1)),
        ("opset", |m| m.opset_import[1].version = Some(4)),
        ("attribute", |m| graph(m).node[3].attribute[0].i = Some(5)),
        ("order", |m| graph(m).initializer.swap(0, 1)),
        ("element", |m| graph(m).initializer[2].raw_data = Some(vec![0; 8].into())),
        ("dynamic axis", |m| graph(m).input[0] = info("x", &[2, 4])),
        ("node", |m| graph(m).node.push(node("New", "Neg", &["x"], &["new"]))),
    ];
    let old = Side::read(&sandbox.at("m.onnx"));
    for (what, change) in changes {
        let mut model = sound.clone();
        change(&mut model);
        sandbox.model("changed.onnx", &model);
        let new = Side::read(&sandbox.at("changed.onnx"));
        let faults = Diff { old: &old, new: &new, told: Told::new(&told), faults: Vec::new() }.run();
        assert!(!faults.is_empty(), "a changed {what} is not seen");
    }
}

#[test]
fn only_what_was_told_differs_in_the_corpus() {
    let Some(folder) = std::env::var_os("VITRIM_CORPUS").map(PathBuf::from) else {
        println!("skipped: VITRIM_CORPUS is not set");
        return;
    };
    let mut models: Vec<PathBuf> = std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().path()).collect();
    models.retain(|p| p.extension().is_some_and(|x| x == "onnx"));
    models.sort();
    assert!(!models.is_empty(), "no models in {}", folder.display());
    let (mut compared, mut faults) = (0, Vec::new());
    for path in &models {
        for (keep, seed, layout) in KEEPS {
            let Some(found) = faults_of(path, keep, seed, layout) else { continue };
            compared += 1;
            let name = path.file_stem().unwrap().to_string_lossy();
            faults
                .extend(found.into_iter().take(3).map(|f| format!("{name} {keep}: {}", f.chars().take(400).collect::<String>())));
        }
    }
    println!("{} models, {compared} pairs of files compared", models.len());
    assert!(faults.is_empty(), "{} differences:\n{}", faults.len(), faults.join("\n"));
}
