//! Loading and saving: what goes in comes out, and what is bad is refused with the right words.

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
        onnx_proto::scan(&bytes, &onnx_proto::Limits::default()).unwrap_or_else(|f| panic!("{}: {f}", path.display()));
        let first = ModelProto::decode(bytes).unwrap();
        let again = first.encode_to_vec();
        assert_eq!(ModelProto::decode(&again[..]).unwrap().encode_to_vec(), again, "{}", path.display());
        onnx_proto::scan(&again, &onnx_proto::Limits::default()).unwrap();
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
    let graph = from_model(&m).unwrap().graph;
    let ops: Vec<_> = graph.nodes().map(|(_, n)| (n.op(), n.inputs().len(), n.input(1))).collect();
    assert_eq!(ops, [("Clip", 2, None), ("Identity", 1, None)]);
    assert!(to_model(&graph).encode_to_vec() == m.encode_to_vec());
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

// ---- bad models

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

struct Case {
    row: u32,
    says: &'static str,
    code: &'static str,
    make: fn(&mut ModelProto),
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

const CASES: &[Case] = &[
    Case { row: 17, says: "model has no graph", code: "V0120", make: |m| m.graph = None },
    Case { row: 17, says: "model has no nodes", code: "V0121", make: |m| graph(m).node.clear() },
    Case { row: 35, says: "graph has no outputs", code: "V0122", make: |m| graph(m).output.clear() },
    Case { row: 18, says: "no opset for the default domain", code: "V0123", make: |m| m.opset_import.clear() },
    Case { row: 18, says: "no opset for the default domain", code: "V0123", make: |m| m.opset_import = vec![opset("a", 17)] },
    Case { row: 19, says: "opset 999 is not supported (11 to 26)", code: "V0124", make: |m| m.opset_import = vec![opset("", 999)] },
    Case { row: 19, says: "opset 10 is not supported", code: "V0124", make: |m| m.opset_import = vec![opset("ai.onnx", 10)] },
    Case { row: 19, says: "opset 17 and as opset 18", code: "V0125", make: |m| m.opset_import.push(opset("ai.onnx", 18)) },
    Case { row: 20, says: "ir_version is missing", code: "V0126", make: |m| m.ir_version = None },
    Case { row: 20, says: "ir_version 999 is not supported (3 to 13)", code: "V0126", make: |m| m.ir_version = Some(999) },
    Case { row: 20, says: "ir_version 2 is not supported", code: "V0126", make: |m| m.ir_version = Some(2) },
    Case {
        row: 21,
        says: "node B is of domain 'com.acme', which is not imported",
        code: "V0127",
        make: |m| graph(m).node.push(NodeProto { domain: Some("com.acme".into()), ..named("B", node("F", &["y"], &["z"])) }),
    },
    Case {
        row: 31,
        says: "graph has a cycle through node A -> B -> A",
        code: "V0130",
        make: |m| graph(m).node = vec![named("A", node("Add", &["x", "b"], &["y"])), named("B", node("Neg", &["y"], &["b"]))],
    },
    Case {
        row: 31,
        says: "cycle through node #0 (Add) -> #0 (Add)",
        code: "V0130",
        make: |m| graph(m).node = vec![node("Add", &["x", "y"], &["y"])],
    },
    Case {
        row: 33,
        says: "value y is produced by node A and node B",
        code: "V0131",
        make: |m| graph(m).node.push(named("B", node("Neg", &["x"], &["y"]))),
    },
    Case {
        row: 33,
        says: "value W is produced by an initializer and node B",
        code: "V0131",
        make: |m| graph(m).node.push(named("B", node("Neg", &["x"], &["W"]))),
    },
    Case { row: 33, says: "graph input x appears twice", code: "V0133", make: |m| graph(m).input.push(info("x")) },
    Case { row: 34, says: "initializer W appears twice", code: "V0132", make: |m| graph(m).initializer.push(weight()) },
    Case { row: 34, says: "initializer #0 has no name", code: "V0134", make: |m| w(m).name = None },
    Case {
        row: 35,
        says: "node A reads 'missing', which nothing produces",
        code: "V0135",
        make: |m| graph(m).node[0].input[0] = "missing".into(),
    },
    Case {
        row: 35,
        says: "graph output 'z' is produced by nothing",
        code: "V0136",
        make: |m| graph(m).output.push(info("z")),
    },
    Case { row: 38, says: "node #0 has no operator type", code: "V0137", make: |m| graph(m).node[0].op_type = None },
    Case {
        row: 38,
        says: "node A: attribute k must be an int, holds a float",
        code: "V0138",
        make: |m| attribute(m, |a| (a.r#type, a.f) = (Some(attribute_type::INT), Some(1.0))),
    },
    Case {
        row: 38,
        says: "attribute k holds both a float and an int",
        code: "V0138",
        make: |m| attribute(m, |a| (a.i, a.f) = (Some(1), Some(1.0))),
    },
    Case { row: 38, says: "attribute k holds nothing", code: "V0138", make: |m| attribute(m, |_| {}) },
    Case { row: 38, says: "attribute k has type 99", code: "V0138", make: |m| attribute(m, |a| a.r#type = Some(99)) },
    Case {
        row: 38,
        says: "attribute k refers to an attribute of a function",
        code: "V0138",
        make: |m| attribute(m, |a| a.ref_attr_name = Some("r".into())),
    },
    Case {
        row: 42,
        says: "initializer W: 8 bytes, shape [4,4] float32 needs 64",
        code: "V0150",
        make: |m| w(m).raw_data = Some(vec![0; 8].into()),
    },
    Case { row: 43, says: "72 bytes, shape [4,4]", code: "V0150", make: |m| w(m).raw_data = Some(vec![0; 72].into()) },
    Case { row: 42, says: "0 bytes, shape [4,4] float32 needs 64", code: "V0150", make: |m| w(m).raw_data = None },
    Case { row: 44, says: "initializer W: shape overflows", code: "V0151", make: |m| w(m).dims = vec![1 << 40, 1 << 40] },
    Case { row: 44, says: "shape overflows", code: "V0151", make: |m| w(m).dims = vec![1 << 40, 1 << 40, 0] },
    Case { row: 45, says: "64 bytes, shape [1048576,65536]", code: "V0150", make: |m| w(m).dims = vec![1 << 20, 1 << 16] },
    Case { row: 46, says: "initializer W has the negative dimension -4", code: "V0152", make: |m| w(m).dims = vec![-4, 4] },
    Case { row: 47, says: "initializer W has type 77, not supported", code: "V0153", make: |m| w(m).data_type = Some(77) },
    Case { row: 47, says: "initializer W has type 0, not supported", code: "V0153", make: |m| w(m).data_type = None },
    Case {
        row: 48,
        says: "initializer W has two data fields, raw_data and float_data",
        code: "V0154",
        make: |m| w(m).float_data = vec![0.0; 16],
    },
    Case {
        row: 48,
        says: "is of type float16, which float_data cannot hold",
        code: "V0155",
        make: |m| set_data(m, 10, &[2], |t| t.float_data = vec![1.0, 2.0]),
    },
    Case {
        row: 48,
        says: "initializer W: 3 elements in int32_data, shape [2] int8 needs 2",
        code: "V0150",
        make: |m| set_data(m, 3, &[2], |t| t.int32_data = vec![1, 2, 3]),
    },
    Case {
        row: 48,
        says: "initializer W: 300 in int32_data is no int8",
        code: "V0156",
        make: |m| set_data(m, 3, &[1], |t| t.int32_data = vec![300]),
    },
    Case {
        row: 48,
        says: "1 elements in string_data, shape [2] string needs 2",
        code: "V0150",
        make: |m| set_data(m, 8, &[2], |t| t.string_data = vec!["a".into()]),
    },
    Case {
        row: 48,
        says: "is of type string, which raw_data cannot hold",
        code: "V0155",
        make: |m| set_data(m, 8, &[2], |t| t.raw_data = Some("ab".into())),
    },
    Case { row: 48, says: "initializer W is a segment", code: "V0157", make: |m| w(m).segment = Some(Segment::default()) },
    Case {
        row: 62,
        says: "external data needs a file path",
        code: "V0160",
        make: |m| set_data(m, 1, &[1], |t| externalize(t, &[("location", "x.bin")])),
    },
    Case {
        row: 35,
        says: "node A reads 'gone', which nothing produces",
        code: "V0135",
        make: |m| {
            let body = GraphProto { node: vec![node("Relu", &["gone"], &["r"])], output: vec![info("r")], ..Default::default() };
            attribute(m, |a| a.g = Some(Box::new(body)));
        },
    },
    Case {
        row: 23,
        says: "function f.P -> f.P calls itself",
        code: "V0141",
        make: |m| function(m, NodeProto { domain: Some("f".into()), ..node("P", &["a"], &["b"]) }),
    },
    Case {
        row: 23,
        says: "function f.P is written for opset 18 of domain '', the model for 17",
        code: "V0142",
        make: |m| {
            function(m, node("Relu", &["a"], &["b"]));
            m.functions[0].opset_import[0].version = Some(18);
        },
    },
    Case {
        row: 23,
        says: "node call has 2 inputs, function f.P takes 1",
        code: "V0143",
        make: |m| {
            function(m, node("Relu", &["a"], &["b"]));
            graph(m).node[0].input.push("W".into());
        },
    },
    Case {
        row: 23,
        says: "function f.P is defined twice",
        code: "V0140",
        make: |m| {
            function(m, node("Relu", &["a"], &["b"]));
            m.functions.push(m.functions[0].clone());
        },
    },
    Case {
        row: 23,
        says: "node call/Relu_0 reads 'q', which nothing produces",
        code: "V0135",
        make: |m| function(m, node("Relu", &["q"], &["b"])),
    },
];

fn attribute(m: &mut ModelProto, set: impl FnOnce(&mut AttributeProto)) {
    let mut a = AttributeProto { name: Some("k".into()), ..Default::default() };
    set(&mut a);
    graph(m).node[0].attribute.push(a);
}

/// Makes the model a call of f.P(a) -> b with this body.
fn function(m: &mut ModelProto, body: NodeProto) {
    m.opset_import.push(opset("f", 1));
    m.functions.push(FunctionProto {
        name: Some("P".into()),
        domain: Some("f".into()),
        input: vec!["a".into()],
        output: vec!["b".into()],
        node: vec![body],
        opset_import: vec![opset("", 17), opset("f", 1)],
        ..Default::default()
    });
    graph(m).node = vec![named("call", NodeProto { domain: Some("f".into()), ..node("P", &["x"], &["y"]) })];
}

fn externalize(t: &mut TensorProto, entries: &[(&str, &str)]) {
    t.raw_data = None;
    t.data_location = Some(data_location::EXTERNAL);
    let entry = |(k, v): &(&str, &str)| StringStringEntryProto { key: Some(k.to_string()), value: Some(v.to_string()) };
    t.external_data = entries.iter().map(entry).collect();
}

#[test]
fn bad_models_are_refused_with_the_reason() {
    assert!(from_model(&tiny()).is_ok());
    let mut failed = Vec::new();
    for (i, case) in CASES.iter().enumerate() {
        let mut model = tiny();
        (case.make)(&mut model);
        match from_model(&model) {
            Err(e) if e.to_string().contains(case.says) && e.code() == case.code && e.to_string().len() < 300 => {}
            Err(e) => failed.push(format!("case {i}, row {}: {} {e}", case.row, e.code())),
            Ok(_) => failed.push(format!("case {i}, row {}: accepted", case.row)),
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

#[test]
fn functions_that_explode_are_refused() {
    // Twenty levels that double: a million nodes from forty.
    let mut m = tiny();
    m.opset_import.push(opset("f", 1));
    let at = |level: usize| if level == 0 { "Relu".to_string() } else { format!("F{level}") };
    for level in 1..=20 {
        let domain = (level > 1).then(|| "f".to_string());
        let call = |i: &str, o: &str| NodeProto { domain: domain.clone(), ..node(&at(level - 1), &[i], &[o]) };
        m.functions.push(FunctionProto {
            name: Some(at(level)),
            domain: Some("f".into()),
            input: vec!["a".into()],
            output: vec!["c".into()],
            node: vec![call("a", "b"), call("b", "c")],
            opset_import: vec![opset("", 17), opset("f", 1)],
            ..Default::default()
        });
    }
    graph(&mut m).node = vec![NodeProto { domain: Some("f".into()), ..node("F20", &["x"], &["y"]) }];
    assert_eq!(from_model(&m).unwrap_err().to_string(), "m.onnx: functions expand to more than 200000 nodes");
}

#[test]
fn odd_but_harmless_models_are_read_with_a_warning() {
    let warnings = |change: &dyn Fn(&mut ModelProto)| {
        let mut m = tiny();
        change(&mut m);
        from_model(&m).unwrap_or_else(|e| panic!("{e}")).warnings
    };
    let none: [&str; 0] = [];
    assert_eq!(warnings(&|_| {}), none);
    assert_eq!(warnings(&|m| m.opset_import[0].domain = Some("ai.onnx".into())), none);
    assert_eq!(warnings(&|m| m.ir_version = Some(14)), ["ir_version 14 is newer than the newest known, 13"]);
    assert_eq!(
        warnings(&|m| graph(m).node.insert(0, node("Neg", &["y"], &["z"]))),
        ["nodes are not in topological order: sorted"]
    );
    assert_eq!(
        warnings(&|m| graph(m).input.push(info("W"))),
        ["1 initializers are also listed as graph inputs: treated as constants"]
    );
    // Names may be empty, equal, or look like paths.
    assert_eq!(warnings(&|m| graph(m).node.push(named("../../x", node("Neg", &["y"], &["z"])))), none);
    assert_eq!(warnings(&|m| graph(m).node.push(named("A", node("Neg", &["y"], &["z"])))), none);
}

#[test]
fn names_are_made_harmless_in_messages() {
    let mut m = tiny();
    graph(&mut m).node[0].name = Some("a\u{1b}[31m\n\u{202e}<b>".into());
    graph(&mut m).node[0].input[0] = "q".repeat(3000);
    let message = from_model(&m).unwrap_err().to_string();
    assert!(!message.contains(|c: char| c.is_control() || c == '\u{202e}') && message.len() < 300, "{message}");
}

// ---- bad files

fn read_file(content: &[u8]) -> onnx::Error {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.onnx");
    std::fs::write(&path, content).unwrap();
    onnx::read(&path).expect_err("bad content")
}

#[test]
fn files_that_are_no_models_are_named() {
    let safetensors = [&[2u8, 0, 0, 0, 0, 0, 0, 0][..], b"{}"].concat();
    let cases: &[(u32, &[u8], &str)] = &[
        (4, b"", "file is empty"),
        (5, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer"),
        (6, b"<!DOCTYPE html><html>", "starts like HTML, not ONNX: was the download an error page?"),
        (6, b"\n  {\"error\": \"not found\"}", "starts like JSON, not ONNX"),
        (7, b"PK\x03\x04........archive/data.pkl", "this is a PyTorch .pt file (zip archive), not ONNX"),
        (7, b"PK\x03\x04................", "this is a zip archive"),
        (7, &safetensors, "this is a safetensors file"),
        (7, b"\x1c\0\0\0TFL3\0\0", "this is a TFLite model"),
        (7, b"\x1c\0\0\0ORTM\0\0", "this is an ONNX Runtime .ort flatbuffer"),
        (7, b"\x1f\x8b\x08\0", "this is a gzip file"),
        (8, b"\xff\xfe\xfd\xfc", "not a valid ONNX protobuf: "),
    ];
    for (row, content, says) in cases {
        let message = read_file(content).to_string();
        assert!(message.contains(says), "row {row}: {message}");
        assert!(message.contains("m.onnx: "), "row {row}: {message}");
    }
    let mut bytes = tiny().encode_to_vec();
    let end = bytes.len();
    bytes.extend([0xca, 0x03, 1, 65]);
    let says = format!("not a valid ONNX protobuf: unexpected field or wire type at byte {end}: ModelProto field 57 is unknown");
    assert!(read_file(&bytes).to_string().ends_with(&says));
    let nodes = GraphProto { node: vec![NodeProto::default(); 200_001], ..Default::default() };
    let many = ModelProto { graph: Some(nodes), ..Default::default() };
    assert!(read_file(&many.encode_to_vec()).to_string().ends_with(": more than 200000 nodes"));
}

#[test]
fn places_that_are_no_files_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let says = |path: &Path| onnx::read(path).unwrap_err().cause().to_string();
    assert_eq!(says(&at("none.onnx")), "no such file");
    assert_eq!(says(folder.path()), "is a directory, expected an .onnx file");
    std::fs::write(at("one.onnx"), tiny().encode_to_vec()).unwrap();
    assert!(says(folder.path()).ends_with("/one.onnx?"), "{}", says(folder.path()));
    assert_eq!(says(&at("one.onnx/inside")), "no such file");
    let big = std::fs::File::create(at("big.onnx")).unwrap();
    big.set_len((2 << 30) + 1).unwrap();
    assert_eq!(says(&at("big.onnx")), "larger than 2 GiB: store weights as external data");
}

#[cfg(unix)]
#[test]
fn special_files_are_refused_without_blocking() {
    let folder = tempfile::tempdir().unwrap();
    let fifo = folder.path().join("fifo.onnx");
    make_fifo(&fifo);
    assert_eq!(onnx::read(&fifo).unwrap_err().cause().to_string(), "not a regular file");
    assert_eq!(onnx::read(Path::new("/dev/zero")).unwrap_err().cause().to_string(), "not a regular file");
    let socket = folder.path().join("socket.onnx");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    assert_eq!(onnx::read(&socket).unwrap_err().cause().to_string(), "not a regular file");
    let secret = folder.path().join("secret.onnx");
    std::fs::write(&secret, "x").unwrap();
    std::fs::set_permissions(&secret, std::os::unix::fs::PermissionsExt::from_mode(0)).unwrap();
    if std::fs::read(&secret).is_err() {
        assert_eq!(onnx::read(&secret).unwrap_err().cause().to_string(), "permission denied");
    } else {
        println!("this user may read everything: permissions are not tested");
    }
}

#[cfg(unix)]
fn make_fifo(path: &Path) {
    let status = std::process::Command::new("mkfifo").arg(path).status().expect("mkfifo is there");
    assert!(status.success());
}

#[test]
fn a_large_sparse_weight_is_mapped_not_copied() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.onnx");
    let data = std::fs::File::create(folder.path().join("w.bin")).unwrap();
    data.set_len(8 << 30).unwrap();
    let mut m = tiny();
    set_data(&mut m, 1, &[4, 4], |t| externalize(t, &[("location", "w.bin"), ("offset", "8589934528"), ("length", "64")]));
    std::fs::write(&path, m.encode_to_vec()).unwrap();
    let graph = read(&path).graph;
    let w = graph.value(graph.find("W").unwrap()).initializer().unwrap();
    assert_eq!((w.bytes.len(), w.storage), (64, Storage::External));
}

// ---- external data

/// Reads the tiny model with W located by `entries`, in a folder that holds `w.bin` of 64 bytes.
fn read_external(entries: &[(&str, &str)], prepare: impl FnOnce(&Path)) -> Result<Loaded, onnx::Error> {
    let outer = tempfile::tempdir().unwrap();
    let folder = outer.path().join("model");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(outer.path().join("outside.bin"), [0; 64]).unwrap();
    std::fs::write(folder.join("w.bin"), [0; 64]).unwrap();
    prepare(&folder);
    let mut m = tiny();
    externalize(w(&mut m), entries);
    let path = folder.join("m.onnx");
    std::fs::write(&path, m.encode_to_vec()).unwrap();
    onnx::read(&path)
}

#[test]
fn bad_external_data_is_refused() {
    let cases: &[(u32, &[(&str, &str)], &str)] = &[
        (52, &[("location", "nope.bin")], "external data nope.bin of initializer W not found beside the model"),
        (53, &[("location", "../outside.bin")], "external data location '../outside.bin' leaves the model's directory"),
        (53, &[("location", "../no/such/file")], "leaves the model's directory"),
        (53, &[("location", "a/../../outside.bin")], "leaves the model's directory"),
        (53, &[("location", "/etc/passwd")], "leaves the model's directory"),
        (53, &[("location", "C:\\w.bin")], "leaves the model's directory"),
        (53, &[("location", "\\\\host\\share\\w.bin")], "leaves the model's directory"),
        (53, &[("location", "w.bin\0")], "leaves the model's directory"),
        (57, &[("location", "w.bin"), ("offset", "60")], "offset 60 + 64 bytes is past the end (64)"),
        (57, &[("location", "w.bin"), ("offset", "-1")], "external data offset '-1' is not a number"),
        (57, &[("location", "w.bin"), ("length", "x")], "external data length 'x' is not a number"),
        (57, &[("location", "w.bin"), ("offset", "18446744073709551615")], "is past the end (64)"),
        (57, &[("location", "w.bin"), ("length", "32")], "initializer W: 32 bytes, shape [4,4] float32 needs 64"),
        (58, &[("location", ".")], "is not a regular file"),
        (58, &[("location", "")], "is not a regular file"),
        (59, &[("location", "*/_ORT_MEM_ADDR_/*")], "leaves the model's directory"),
        (60, &[("location", "w.bin"), ("location", "w.bin")], "external data has two entries 'location'"),
        (60, &[("offset", "0")], "initializer W: external data has no location"),
    ];
    for (row, entries, says) in cases {
        let message = read_external(entries, |_| {}).expect_err(says).to_string();
        assert!(message.contains(says), "row {row}: {message}");
    }
}

#[test]
fn good_external_data_is_read() {
    let odd = read_external(&[("location", "./w.bin"), ("length", "64"), ("prefetch", "1"), ("checksum", "ab")], |_| {}).unwrap();
    assert_eq!(odd.warnings, ["initializer W: unknown external data key 'prefetch' is ignored"]);
    assert_eq!(odd.files.len(), 2);
    let inside = |folder: &Path| {
        std::fs::create_dir(folder.join("sub")).unwrap();
        std::fs::copy(folder.join("w.bin"), folder.join("sub/v.bin")).unwrap();
    };
    assert!(read_external(&[("location", "sub/v.bin")], inside).is_ok());
    assert!(read_external(&[("location", "sub/../w.bin")], inside).is_ok());
    assert!(read_external(&[("location", "h.bin")], |f| std::fs::hard_link(f.join("w.bin"), f.join("h.bin")).unwrap()).is_ok());
}

#[cfg(unix)]
#[test]
fn links_are_followed_inside_only() {
    use std::os::unix::fs::symlink;
    let refused = |name: &str, prepare: &dyn Fn(&Path)| {
        read_external(&[("location", name)], prepare).expect_err("leaves").cause().to_string()
    };
    let leaves = "leaves the model's directory";
    assert!(refused("l.bin", &|f| symlink("../outside.bin", f.join("l.bin")).unwrap()).contains(leaves));
    assert!(refused("up/outside.bin", &|f| symlink("..", f.join("up")).unwrap()).contains(leaves));
    assert!(refused("fifo", &|f| make_fifo(&f.join("fifo"))).contains("is not a regular file"));
    assert!(refused("dev", &|f| symlink("/dev/zero", f.join("dev")).unwrap()).contains(leaves));
    assert!(read_external(&[("location", "l.bin")], |f| symlink("w.bin", f.join("l.bin")).unwrap()).is_ok());

    // The cache of a model hub: model and data are links into one folder.
    let cache = tempfile::tempdir().unwrap();
    let (blobs, snapshot) = (cache.path().join("blobs"), cache.path().join("snapshots/1"));
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::create_dir_all(&snapshot).unwrap();
    let mut m = tiny();
    externalize(w(&mut m), &[("location", "m.onnx_data")]);
    std::fs::write(blobs.join("aa"), m.encode_to_vec()).unwrap();
    std::fs::write(blobs.join("bb"), [0; 64]).unwrap();
    symlink("../../blobs/aa", snapshot.join("m.onnx")).unwrap();
    symlink("../../blobs/bb", snapshot.join("m.onnx_data")).unwrap();
    assert!(onnx::read(&snapshot.join("m.onnx")).is_ok());
}

#[test]
fn tensors_of_bodies_are_taken_into_the_model() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("w.bin"), [7; 64]).unwrap();
    let mut m = tiny();
    let mut inner = weight();
    externalize(&mut inner, &[("location", "w.bin")]);
    let body = GraphProto { initializer: vec![inner], output: vec![info("W")], ..Default::default() };
    attribute(&mut m, |a| a.g = Some(Box::new(body)));
    let path = folder.path().join("m.onnx");
    std::fs::write(&path, m.encode_to_vec()).unwrap();
    let graph = read(&path).graph;
    let out = to_model(&graph).graph.unwrap();
    let inner = &out.node[0].attribute[0].g.as_ref().unwrap().initializer[0];
    assert_eq!((inner.raw_data.as_deref(), inner.data_location), (Some(&[7u8; 64][..]), None));
    let vitrim::graph::AttrValue::Graph(sub) = graph.nodes().next().unwrap().1.attr("k").unwrap().clone() else { panic!() };
    assert_eq!(sub.param_count, 16);
}

// ---- outputs

fn cause(result: Result<(), onnx::Error>) -> String {
    result.expect_err("refused").cause().to_string()
}

#[test]
fn outputs_are_checked_before_any_work() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let input = at("in.onnx");
    std::fs::write(&input, "old").unwrap();
    std::fs::hard_link(&input, at("hard.onnx")).unwrap();
    std::fs::create_dir(at("dir")).unwrap();
    let check = |out: PathBuf, overwrite| onnx::check_output(&out, std::slice::from_ref(&input), overwrite);
    for same in [input.clone(), at("./in.onnx"), at("dir/../in.onnx"), at("hard.onnx")] {
        assert_eq!(cause(check(same, Overwrite::Force)), "output would overwrite the input");
    }
    let data = onnx::check_output(&at("new.onnx"), &[input.clone(), at("new.onnx.data")], Overwrite::Force);
    assert_eq!(cause(data), "output would overwrite the input");
    std::fs::write(at("old.onnx"), "old").unwrap();
    assert_eq!(cause(check(at("old.onnx"), Overwrite::Refuse)), "exists: use --force");
    assert!(check(at("old.onnx"), Overwrite::Force).is_ok());
    assert!(check(at("new.onnx"), Overwrite::Refuse).is_ok());
    assert!(!at("new.onnx").exists() && std::fs::read(at("old.onnx")).unwrap() == b"old", "checking touches nothing");
    assert!(cause(check(at("none/x.onnx"), Overwrite::Refuse)).contains("none does not exist"));
    assert!(cause(check(at("in.onnx/x.onnx"), Overwrite::Refuse)).contains("is not a directory"));
    assert!(cause(check(at("dir"), Overwrite::Force)).starts_with("is a directory"));
}

#[cfg(unix)]
#[test]
fn links_as_outputs_are_replaced_not_written_through() {
    use std::os::unix::fs::{MetadataExt, symlink};
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("target"), "old").unwrap();
    symlink("target", at("link.onnx")).unwrap();
    symlink("gone", at("dangling.onnx")).unwrap();
    let g = from_model(&tiny()).unwrap().graph;
    let input = [at("target")];
    assert_eq!(cause(onnx::check_output(&at("link.onnx"), &input, Overwrite::Force)), "output would overwrite the input");
    assert_eq!(cause(onnx::save(&g, &at("link.onnx"), Overwrite::Refuse)), "exists: use --force");
    assert_eq!(cause(onnx::save(&g, &at("dangling.onnx"), Overwrite::Refuse)), "exists: use --force");
    onnx::save(&g, &at("link.onnx"), Overwrite::Force).unwrap();
    assert!(std::fs::symlink_metadata(at("link.onnx")).unwrap().is_file());
    assert_eq!(std::fs::read(at("target")).unwrap(), b"old");
    assert_eq!(std::fs::metadata(at("link.onnx")).unwrap().mode() & 0o600, 0o600);
    make_fifo(&at("fifo.onnx"));
    assert_eq!(cause(onnx::save(&g, &at("fifo.onnx"), Overwrite::Force)), "output is not a regular file");
    assert_eq!(cause(onnx::save(&g, Path::new("/dev/null"), Overwrite::Force)), "output is not a regular file");
}

#[test]
fn saving_replaces_old_files_whole() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("m.onnx");
    let loaded = read(&fixture("external.onnx"));
    onnx::save(&loaded.graph, &out, Overwrite::Refuse).unwrap();
    let refused = onnx::save(&loaded.graph, &out, Overwrite::Refuse).unwrap_err();
    assert_eq!(refused.code(), "V0170");
    onnx::save(&loaded.graph, &out, Overwrite::Force).unwrap();
    assert_eq!(onnx::to_bytes(&read(&out).graph).unwrap(), onnx::to_bytes(&loaded.graph).unwrap());
    std::fs::remove_file(&out).unwrap();
    let data = onnx::save(&loaded.graph, &out, Overwrite::Refuse).unwrap_err();
    assert!(data.file().unwrap().ends_with("m.onnx.data") && data.code() == "V0170", "{data}");
    assert!(!out.exists());
}

#[test]
fn hashes_are_sha256() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("abc");
    std::fs::write(&path, "abc").unwrap();
    let hash = onnx::sha256_of_file(&path).unwrap();
    assert_eq!(hash, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    assert_eq!(onnx::sha256_of_file(folder.path()).unwrap_err().code(), "V0102");
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
