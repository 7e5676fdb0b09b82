//! Loading and saving: what goes in comes out, and what is bad is refused with the right words.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "tests, with functions of their own")]

#[path = "onnx/bad_models.rs"]
mod bad_models;
#[path = "onnx/branches.rs"]
mod branches;
#[path = "onnx/files.rs"]
mod files;

use std::path::{Path, PathBuf};

use bytes::Bytes;
use onnx_proto::*;
use prost::Message;
use vitrim::graph::{Graph, Storage, Tensor, check};
use vitrim::onnx::{self, Limits, Loaded, Overwrite};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/onnx")
}

fn fixture(name: &str) -> PathBuf {
    fixtures().join(name)
}

/// Models in a folder, in order.
fn models_in(folder: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(folder)
        .expect("the folder is there")
        .filter_map(|e| Some(e.ok()?.path()).filter(|p| p.extension().is_some_and(|x| x == "onnx")))
        .collect();
    found.sort();
    assert!(!found.is_empty(), "no models in {}", folder.display());
    found
}

/// The fixtures, and the models of the folder that VITRIM_CORPUS names.
fn all_models() -> Vec<PathBuf> {
    let mut models = models_in(&fixtures());
    match std::env::var_os("VITRIM_CORPUS") {
        Some(folder) => models.extend(models_in(Path::new(&folder))),
        None => println!("VITRIM_CORPUS is not set: only the fixtures are read"),
    }
    models
}

fn read(path: &Path) -> Loaded {
    onnx::read(path).unwrap_or_else(|e| panic!("{e}"))
}

fn from_model(model: &ModelProto) -> Result<Loaded, onnx::Error> {
    onnx::read_bytes(model.encode_to_vec().into(), Path::new("m.onnx"), &Limits::default())
}

fn to_model(graph: &Graph) -> ModelProto {
    ModelProto::decode(onnx::to_bytes(graph).unwrap()).unwrap()
}

fn has_external(model: &ModelProto) -> bool {
    let graph = model.graph.as_ref().unwrap();
    let attrs = graph.node.iter().flat_map(|n| &n.attribute).filter_map(|a| a.t.as_deref());
    graph.initializer.iter().chain(attrs).any(|t| t.data_location == Some(data_location::EXTERNAL))
}

#[test]
fn decode_encode_decode_is_the_identity() {
    for path in all_models() {
        let bytes = Bytes::from(std::fs::read(&path).unwrap());
        scan(&bytes, &onnx_proto::Limits::default()).unwrap_or_else(|f| panic!("{}: {f}", path.display()));
        let first = ModelProto::decode(bytes).unwrap();
        let again = first.encode_to_vec();
        assert_eq!(ModelProto::decode(&again[..]).unwrap().encode_to_vec(), again, "{}", path.display());
        scan(&again, &onnx_proto::Limits::default()).unwrap();
    }
}

#[test]
fn an_untouched_graph_is_written_as_it_was() {
    for path in all_models() {
        let loaded = read(&path);
        assert_eq!(check::check(&loaded.graph), [], "{}", path.display());
        let mut before = ModelProto::decode(&std::fs::read(&path).unwrap()[..]).unwrap();
        before.graph.as_mut().unwrap().value_info.clear();
        let bytes = onnx::to_bytes(&loaded.graph).unwrap();
        if !has_external(&before) {
            // By bytes, as NaNs are not equal to themselves.
            assert!(before.encode_to_vec() == bytes, "{} is written differently", path.display());
        }
        let again = onnx::read_bytes(bytes.clone(), &path, &Limits::default()).unwrap();
        assert!(onnx::to_bytes(&again.graph).unwrap() == bytes, "{}: equal graphs give equal bytes", path.display());
        assert_eq!(again.graph.order().len(), loaded.graph.order().len());
    }
}

#[test]
fn saved_models_read_as_the_same_graph() {
    let folder = tempfile::tempdir().unwrap();
    for path in all_models() {
        let loaded = read(&path);
        let out = folder.path().join(path.file_name().unwrap());
        onnx::save(&loaded.graph, &out, Overwrite::Refuse).unwrap();
        let again = read(&out);
        assert!(onnx::to_bytes(&again.graph).unwrap() == onnx::to_bytes(&loaded.graph).unwrap(), "{}", path.display());
        let external = loaded.files.len() > 1;
        assert_eq!(again.files.len(), if external { 2 } else { 1 }, "{}: one data file or none", path.display());
        assert_eq!(onnx::data_path(&out).exists(), external);
        for (a, b) in loaded.graph.initializers().iter().zip(again.graph.initializers()) {
            let (a, b) = (loaded.graph.value(*a).initializer().unwrap(), again.graph.value(*b).initializer().unwrap());
            assert_eq!((a.storage, &a.bytes), (b.storage, &b.bytes));
        }
    }
    let left: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.iter().all(|n| !n.to_string_lossy().ends_with(".tmp")), "no temporary file is left");
}

#[test]
fn data_file_parts_are_aligned_and_apart() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("deep.name.onnx");
    onnx::save(&read(&fixture("external.onnx")).graph, &out, Overwrite::Refuse).unwrap();
    let model = ModelProto::decode(&std::fs::read(&out).unwrap()[..]).unwrap();
    let graph = model.graph.unwrap();
    let attrs = graph.node.iter().flat_map(|n| &n.attribute).filter_map(|a| a.t.as_deref());
    let mut spans: Vec<(usize, usize)> = Vec::new();
    for t in graph.initializer.iter().chain(attrs) {
        let get = |key: &str| t.external_data.iter().find(|e| e.key() == key).unwrap().value().to_string();
        assert_eq!(get("location"), "deep.name.onnx.data");
        spans.push((get("offset").parse().unwrap(), get("length").parse().unwrap()));
    }
    spans.sort_unstable();
    assert_eq!(spans.len(), 3);
    assert!(spans.iter().all(|(at, _)| at % 64 == 0));
    assert!(spans.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0), "{spans:?}");
    assert_eq!(std::fs::metadata(onnx::data_path(&out)).unwrap().len(), (spans[2].0 + spans[2].1) as u64);
}

#[test]
fn every_kind_of_tensor_is_decoded() {
    let graph = read(&fixture("kinds.onnx")).graph;
    let get = |name: &str| graph.value(graph.find(name).unwrap()).initializer().unwrap().clone();
    let cases: [(&str, &[u8]); 8] = [
        ("i8", &[0x80, 0, 0x7f]),
        ("i16", &[0xfb, 0xff, 5, 0]),
        ("u32", &[0, 0, 0, 0, 255, 255, 255, 255]),
        ("bool", &[1, 0, 1]),
        ("i4", &[0x78, 0x01]),
        ("u4", &[0xf0]),
        ("f16", &[0, 0x3c, 0, 0x40, 0, 0xc2]),
        ("empty_typed", &[]),
    ];
    for (name, bytes) in cases {
        let t = get(name);
        assert_eq!(&t.bytes[..], bytes, "{name}");
        assert_eq!(t.storage, if name == "empty_typed" { Storage::Raw } else { Storage::Typed }, "{name}");
    }
    assert_eq!(get("text").strings[1], &b"\xff\xfe"[..]);
    assert_eq!(get("i64").to_i64s(), Some(vec![i64::MIN, i64::MAX]));
    assert_eq!(get("raw").storage, Storage::Raw);
    let warnings = read(&fixture("kinds.onnx")).warnings;
    assert_eq!(warnings, ["1 initializers are also listed as graph inputs: treated as constants"]);
}

// ---- functions

#[test]
fn functions_are_inlined_with_their_attributes_and_names() {
    let graph = read(&fixture("functions.onnx")).graph;
    let names: Vec<&str> = graph.nodes().map(|(_, n)| n.name()).collect();
    assert_eq!(names.len(), 2 * 7 + 1);
    assert!(names[..7].iter().all(|n| n.starts_with("first/")) && names[7..14].iter().all(|n| n.starts_with("Block_1/")));
    assert!(names.contains(&"first/scaled/mul"), "{names:?}");
    let factors: Vec<f32> = graph.nodes().filter_map(|(_, n)| n.attr_float("value_float")).collect();
    assert_eq!(factors, [2.0, 0.5], "one given, one by default");
    let choose = graph.nodes().find(|(_, n)| n.op() == "If").unwrap().1;
    let captured: Vec<&str> = choose.captures().iter().map(|v| graph.value(*v).name()).collect();
    assert_eq!(captured, ["first/t", "bias"]);
    assert_eq!(graph.calls().len(), 2);
}

#[test]
fn a_changed_call_is_written_inlined_and_the_others_as_calls() {
    let before = read(&fixture("functions.onnx")).graph;
    let written = |change: &dyn Fn(&mut Graph)| {
        let mut graph = before.clone();
        change(&mut graph);
        let model = to_model(&graph);
        let again = from_model(&model).unwrap_or_else(|e| panic!("{e}")).graph;
        assert_eq!(check::check(&again), []);
        let ops = model.graph.as_ref().unwrap().node.iter().map(|n| n.op_type().to_string()).collect::<Vec<_>>();
        (ops, model.functions.iter().map(|f| f.name().to_string()).collect::<Vec<_>>())
    };
    let inlined = ["MatMul", "Clip", "Constant", "Mul", "Identity", "Constant", "If"];
    let (ops, functions) = written(&|_| {});
    assert_eq!((ops, functions), (vec!["Block".to_string(), "Block".into(), "Add".into()], before_functions()));
    // A weight is cut: the calls stay, as functions take any shape.
    let (ops, _) = written(&|g| {
        let w = g.find("w0").unwrap();
        g.set_constant(w, Tensor::f32(&[4, 4], &[0.5; 16]));
    });
    assert_eq!(ops, ["Block", "Block", "Add"]);
    // A constant inside the first call changes.
    let (ops, functions) = written(&|g| {
        let (id, _) = g.nodes().find(|(_, n)| n.attr_float("value_float") == Some(2.0)).unwrap();
        g.set_attr(id, "value_float", vitrim::graph::AttrValue::Float(3.0));
    });
    assert_eq!(ops[..7], inlined);
    assert_eq!(ops[7..], ["Block", "Add"]);
    assert_eq!(functions, before_functions());
    // An inner value is read from outside.
    let (ops, _) = written(&|g| {
        let (inner, last) = (g.find("first/t").unwrap(), g.nodes().find(|(_, n)| n.name() == "last").unwrap().0);
        g.set_input(vitrim::graph::Use { node: last, slot: 1 }, Some(inner));
    });
    assert_eq!(ops[7..], ["Block", "Add"]);
    // Both calls change: their functions go, the one that was never called stays.
    let (ops, functions) = written(&|g| {
        let all: Vec<_> = g.nodes().filter(|(_, n)| n.op() == "MatMul").map(|(id, _)| id).collect();
        all.into_iter().for_each(|id| g.set_attr(id, "changed", vitrim::graph::AttrValue::Int(1)));
    });
    assert_eq!(ops.len(), 15);
    assert_eq!(functions, ["Never"]);
}

fn before_functions() -> Vec<String> {
    ["Scale", "Block", "Never"].map(String::from).to_vec()
}

#[test]
fn captured_values_that_were_renamed_are_renamed_in_bodies() {
    let body = GraphProto { node: vec![node("Relu", &["t"], &["r"])], output: vec![info("r")], ..Default::default() };
    let mut choose = node("If", &["c"], &["y"]);
    for name in ["then_branch", "else_branch"] {
        choose.attribute.push(AttributeProto {
            name: Some(name.into()),
            r#type: Some(attribute_type::GRAPH),
            g: Some(Box::new(body.clone())),
            ..Default::default()
        });
    }
    let mut m = tiny();
    let g = m.graph.as_mut().unwrap();
    g.input.push(info("c"));
    g.node = vec![node("Neg", &["x"], &["t"]), choose];
    let mut graph = from_model(&m).unwrap().graph;
    let t = graph.find("t").unwrap();
    assert_eq!(graph.value(t).users().len(), 1, "captured once by the node");
    graph.rename(t, "renamed");
    let out = to_model(&graph).graph.unwrap();
    assert_eq!(out.node[0].output, ["renamed"]);
    for attribute in &out.node[1].attribute {
        assert_eq!(attribute.g.as_ref().unwrap().node[0].input, ["renamed"]);
    }
}

#[test]
fn functions_may_pass_values_through_and_leave_inputs_out() {
    let mut m = tiny();
    m.opset_import.push(opset("f", 1));
    m.functions = vec![FunctionProto {
        name: Some("Pass".into()),
        domain: Some("f".into()),
        input: vec!["a".into(), "low".into()],
        output: vec!["b".into(), "a".into()],
        node: vec![node("Clip", &["a", "low"], &["b"])],
        opset_import: vec![opset("", 17)],
        ..Default::default()
    }];
    let g = m.graph.as_mut().unwrap();
    g.node = vec![NodeProto { domain: Some("f".into()), ..node("Pass", &["x"], &["y", "z"]) }];
    g.output.push(info("z"));
    let read_ops = |m: &ModelProto| {
        let graph = from_model(m).unwrap().graph;
        assert!(to_model(&graph).encode_to_vec() == m.encode_to_vec());
        graph.nodes().map(|(_, n)| (n.op().to_string(), n.inputs().len(), n.input(1))).collect::<Vec<_>>()
    };
    assert_eq!(read_ops(&m), [("Clip".to_string(), 2, None), ("Identity".to_string(), 1, None)]);
    let g = m.graph.as_mut().unwrap();
    g.output.pop();
    g.node[0].output.pop();
    assert_eq!(read_ops(&m), [("Clip".to_string(), 2, None)], "an output that the call leaves out");
}

// ---- robustness

#[test]
fn truncations_never_panic_and_always_fail() {
    let bytes = std::fs::read(fixture("exported.onnx")).unwrap();
    for i in 0..200 {
        let cut = bytes.len() * i / 200;
        let err = onnx::read_bytes(Bytes::copy_from_slice(&bytes[..cut]), Path::new("m"), &Limits::default()).unwrap_err();
        assert!(!err.to_string().contains('\n'), "{err}");
    }
}

#[test]
fn flipped_bytes_never_panic() {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    for name in ["exported.onnx", "kinds.onnx", "functions.onnx"] {
        let bytes = std::fs::read(fixture(name)).unwrap();
        let mut read = 0;
        for _ in 0..2000 {
            let mut bad = bytes.clone();
            for _ in 0..1 + random(4) {
                let at = random(bad.len());
                bad[at] = random(256) as u8;
            }
            if let Ok(loaded) = onnx::read_bytes(bad.into(), Path::new("m"), &Limits::default()) {
                read += 1;
                assert!(onnx::to_bytes(&loaded.graph).is_ok());
            }
        }
        assert!(read > 0 && read < 2000, "{name}: {read} of 2000 read");
    }
}

// ---- models made here

fn node(op: &str, inputs: &[&str], outputs: &[&str]) -> NodeProto {
    let list = |names: &[&str]| names.iter().map(|n| n.to_string()).collect();
    NodeProto { op_type: Some(op.into()), input: list(inputs), output: list(outputs), ..Default::default() }
}

fn named(name: &str, node: NodeProto) -> NodeProto {
    NodeProto { name: Some(name.into()), ..node }
}

fn info(name: &str) -> ValueInfoProto {
    ValueInfoProto { name: Some(name.into()), ..Default::default() }
}

fn opset(domain: &str, version: i64) -> OperatorSetIdProto {
    OperatorSetIdProto { domain: Some(domain.into()), version: Some(version) }
}

fn weight() -> TensorProto {
    TensorProto {
        name: Some("W".into()),
        data_type: Some(1),
        dims: vec![4, 4],
        raw_data: Some(vec![0; 64].into()),
        ..Default::default()
    }
}

/// x -> MatMul(W) -> y.
fn tiny() -> ModelProto {
    ModelProto {
        ir_version: Some(8),
        opset_import: vec![opset("", 17)],
        graph: Some(GraphProto {
            name: Some("g".into()),
            node: vec![named("A", node("MatMul", &["x", "W"], &["y"]))],
            initializer: vec![weight()],
            input: vec![info("x")],
            output: vec![info("y")],
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn graph(m: &mut ModelProto) -> &mut GraphProto {
    m.graph.as_mut().unwrap()
}

fn w(m: &mut ModelProto) -> &mut TensorProto {
    &mut graph(m).initializer[0]
}

fn set_data(m: &mut ModelProto, data_type: i32, dims: &[i64], set: impl FnOnce(&mut TensorProto)) {
    *w(m) = TensorProto { name: Some("W".into()), data_type: Some(data_type), dims: dims.to_vec(), ..Default::default() };
    set(w(m));
}

fn attribute(m: &mut ModelProto, set: impl FnOnce(&mut AttributeProto)) {
    let mut a = AttributeProto { name: Some("k".into()), ..Default::default() };
    set(&mut a);
    graph(m).node[0].attribute.push(a);
}

fn externalize(t: &mut TensorProto, entries: &[(&str, &str)]) {
    t.raw_data = None;
    t.data_location = Some(data_location::EXTERNAL);
    let entry = |(k, v): &(&str, &str)| StringStringEntryProto { key: Some(k.to_string()), value: Some(v.to_string()) };
    t.external_data = entries.iter().map(entry).collect();
}

#[test]
fn a_graph_made_from_nothing_is_written() {
    let mut g = Graph::new(9, vec![(String::new(), 18)], Bytes::new());
    let x = g.add_value("x");
    let dims = Some(vec![vitrim::graph::DeclaredDim::Symbol("n".into()), vitrim::graph::DeclaredDim::Size(2)]);
    let declared = vitrim::graph::Declared { dtype: vitrim::graph::DType::from_onnx(1), dims, extra: Bytes::new() };
    g.add_input(x, declared.clone());
    let w = g.add_initializer("w", Tensor::f32(&[2], &[1.0, 2.0]));
    let y = g.add_op("Add", &[x, w], Vec::new(), "y");
    g.add_output(y, declared.clone());
    let again = onnx::read_bytes(onnx::to_bytes(&g).unwrap(), Path::new("m"), &Limits::default()).unwrap().graph;
    assert_eq!(again.opsets(), g.opsets());
    let read = again.value(again.inputs()[0]).declared().unwrap();
    assert_eq!((read.dtype, &read.dims), (declared.dtype, &declared.dims));
    assert_eq!(to_model(&again).graph.unwrap().name.as_deref(), Some("graph"));
}
