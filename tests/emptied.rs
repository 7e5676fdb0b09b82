//! Plans that keep nothing of a group: the layer becomes its bias, what led there disappears, and the result is the twin.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "tests, with functions of their own")]

#[path = "command/mod.rs"]
mod command;

use bytes::Bytes;
use command::{Ran, Sandbox, digits, floats, graph, info, mlp, node, opset, ort, some};
use onnx_proto::{AttributeProto, GraphProto, ModelProto};
use prost::Message;
use serde_json::{Value as Json, json};

/// Writes a plan that keeps these units of these groups.
fn plan(sandbox: &Sandbox, name: &str, groups: &[(&str, Vec<usize>, usize)]) {
    let groups: serde_json::Map<String, Json> =
        groups.iter().map(|(id, kept, of)| (id.to_string(), json!({ "kept": kept, "of": of }))).collect();
    sandbox.write(name, json!({ "schema_version": 1, "model_sha256": "", "groups": groups }).to_string().as_bytes());
}

fn slice(sandbox: &Sandbox, model: &str) -> Ran {
    sandbox.run(&["slice", model, "--plan", "p.json", "-o", "out.onnx", "--force", "--json"])
}

fn result(sandbox: &Sandbox) -> ModelProto {
    ModelProto::decode(Bytes::from(std::fs::read(sandbox.at("out.onnx")).unwrap())).unwrap()
}

/// Whether ONNX Runtime finds the result equal to the twin; true where there is none.
fn verifies(sandbox: &Sandbox, model: &str) -> bool {
    let Some(library) = ort() else {
        println!("no ONNX Runtime named by VITRIM_TEST_ORT: not verified");
        return true;
    };
    let args = ["verify", "out.onnx", "--against", model, "--runtimes", "ort", "--json"];
    let ran = sandbox.run_with(&args, &[("VITRIM_ORT_LIB", &library)]);
    let checks = ran.json()["checks"].as_array().map_or(0, Vec::len);
    assert!(checks > 0 || ran.code != 0, "{ran:?}");
    ran.code == 0
}

fn names(model: &ModelProto) -> Vec<&str> {
    model.graph.as_ref().unwrap().initializer.iter().filter_map(|t| t.name.as_deref()).collect()
}

#[test]
fn an_mlp_without_units_becomes_its_bias() {
    let (sandbox, model) = (Sandbox::default(), digits("vit-digits.onnx"));
    plan(&sandbox, "p.json", &[("mlp.2", vec![], 384)]);
    let ran = slice(&sandbox, &model);
    assert_eq!(ran.code, 0, "{ran:?}");
    let (out, told) = (result(&sandbox), ran.json());
    assert!(names(&out).contains(&"blocks.2.mlp.fc2.bias"));
    let gone = names(&out).into_iter().filter(|n| n.contains("blocks.2.mlp") || n.contains("blocks.2.norm2")).count();
    assert_eq!(gone, 1, "{:?}", names(&out));
    let nodes = &out.graph.as_ref().unwrap().node;
    let reader = nodes.iter().filter(|n| n.input.iter().any(|i| i == "blocks.2.mlp.fc2.bias"));
    let readers: Vec<_> = reader.map(|n| (n.op_type(), n.input.len())).collect();
    assert_eq!(readers, [("Add", 2)], "the residual takes the bias");
    // Both weights, the bias of the first, the norm before them, and three numbers of the GELU.
    let lost = told["params"]["before"].as_u64().unwrap() - told["params"]["after"].as_u64().unwrap();
    assert_eq!(lost, 2 * 96 * 384 + 384 + 2 * 96 + 3);
    assert!(told["nodes"]["removed"].as_array().unwrap().len() > 5 && told["nodes"]["added"] == json!([]), "{}", told["nodes"]);
    assert!(verifies(&sandbox, &model));
}

#[test]
fn attention_without_values_or_heads_becomes_its_bias() {
    let (sandbox, model) = (Sandbox::default(), digits("vit-digits.onnx"));
    for (id, of) in [("vo.0", 96), ("head.0", 3)] {
        plan(&sandbox, "p.json", &[(id, vec![], of)]);
        let ran = slice(&sandbox, &model);
        assert_eq!(ran.code, 0, "{ran:?}");
        let out = result(&sandbox);
        let left: Vec<_> = names(&out).into_iter().filter(|n| n.contains("blocks.0.attn")).map(str::to_string).collect();
        assert_eq!(left, ["blocks.0.attn.proj.bias"], "{id}");
        let softmaxes = out.graph.as_ref().unwrap().node.iter().filter(|n| n.op_type() == "Softmax").count();
        assert_eq!(softmaxes, 5, "{id}");
        assert!(verifies(&sandbox, &model), "{id}");
    }
}

#[test]
fn attention_without_queries_is_uniform() {
    let (sandbox, model) = (Sandbox::default(), digits("vit-digits.onnx"));
    plan(&sandbox, "p.json", &[("qk.3", vec![], 96), ("vo.3", (0..96).filter(|u| u % 4 != 0).collect(), 96)]);
    let ran = slice(&sandbox, &model);
    assert_eq!(ran.code, 0, "{ran:?}");
    let out = result(&sandbox);
    let qkv = out.graph.as_ref().unwrap().initializer.iter().find(|t| t.name().contains("blocks.3.attn.qkv.bias")).unwrap();
    assert_eq!(qkv.dims, [72], "v alone is left of q, k and v");
    assert!(verifies(&sandbox, &model));
}

#[test]
fn all_layers_beside_tokens_and_partial_cuts() {
    let (sandbox, model) = (Sandbox::default(), digits("vit-digits.onnx"));
    let inspected = sandbox.run(&["inspect", &model, "--json"]).json();
    let mut groups = Vec::new();
    for g in inspected["groups"].as_array().unwrap() {
        let (id, of) = (g["id"].as_str().unwrap(), g["units"].as_u64().unwrap() as usize);
        let kept = match id {
            "mlp.0" | "mlp.4" | "vo.1" | "head.5" => vec![],
            // The sequence is shortened before a layer that has no attention any more: the next one takes it over.
            "token.1" => (0..of).filter(|t| t % 2 == 0).collect(),
            "token.2" => (0..of).filter(|t| t % 4 == 0).collect(),
            "qk.0" | "mlp.1" => (0..of).filter(|u| u % 4 != 0).collect(),
            _ => continue,
        };
        groups.push((id, kept, of));
    }
    assert_eq!(groups.len(), 8, "{groups:?}");
    plan(&sandbox, "p.json", &groups);
    let ran = slice(&sandbox, &model);
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(verifies(&sandbox, &model));
}

#[test]
fn tokens_need_an_attention_to_go_at() {
    let (sandbox, model) = (Sandbox::default(), digits("vit-digits.onnx"));
    let told = sandbox.run(&["inspect", &model, "--json"]).json();
    let of = told["groups"].as_array().unwrap().iter().find(|g| g["id"] == "token.5").unwrap()["units"].as_u64().unwrap();
    plan(&sandbox, "p.json", &[("vo.5", vec![], 96), ("token.5", (0..8).collect(), of as usize)]);
    let ran = slice(&sandbox, &model);
    assert!(ran.code == 2 && ran.stderr.contains("the tokens of group 'token.5' cannot go"), "{ran:?}");
}

#[test]
fn an_output_is_written_out_in_full() {
    let sandbox = Sandbox::default();
    sandbox.model("m.onnx", &mlp());
    plan(&sandbox, "p.json", &[("mlp.0", vec![], 16)]);
    let ran = slice(&sandbox, "m.onnx");
    assert_eq!(ran.code, 0, "{ran:?}");
    let out = result(&sandbox);
    let g = out.graph.as_ref().unwrap();
    assert_eq!((g.output.len(), g.output[0].name()), (1, "y"));
    assert!(g.node.iter().any(|n| n.op_type() == "Expand") && !g.node.iter().any(|n| n.op_type() == "MatMul"), "{:?}", g.node);
    assert!(names(&out).iter().all(|n| !["W", "V"].contains(n)), "{:?}", names(&out));
    assert!(verifies(&sandbox, "m.onnx"));
}

/// `Gemm`, `Conv` and `Transpose` around a residual: the bias goes another way each time.
fn convolutional() -> ModelProto {
    let ints = |name: &str, v: &[i64]| AttributeProto {
        name: Some(name.into()),
        ints: v.to_vec(),
        r#type: Some(7),
        ..Default::default()
    };
    let mut back = node("Back", "Transpose", &["c2"], &["t2"]);
    back.attribute = vec![ints("perm", &[0, 2, 3, 1])];
    let mut there = node("There", "Transpose", &["x"], &["t"]);
    there.attribute = vec![ints("perm", &[0, 3, 1, 2])];
    let graph = GraphProto {
        name: Some("g".into()),
        node: vec![
            there,
            node("C1", "Conv", &["t", "W1", "b1"], &["c1"]),
            node("R", "Relu", &["c1"], &["r"]),
            node("C2", "Conv", &["r", "W2", "b2"], &["c2"]),
            back,
            node("Gamma", "Mul", &["t2", "gamma"], &["g"]),
            node("Sum", "Add", &["x", "g"], &["s"]),
            node("N", "Neg", &["s"], &["y"]),
        ],
        initializer: vec![
            floats("W1", &[8, 4, 1, 1], &some(32)),
            floats("b1", &[8], &some(8)),
            floats("W2", &[4, 8, 1, 1], &some(32)),
            floats("b2", &[4], &some(4)),
            floats("gamma", &[4], &some(4)),
        ],
        input: vec![info("x", &[0, -1, 5, 4])],
        output: vec![info("y", &[0, -1, 5, 4])],
        ..Default::default()
    };
    ModelProto { ir_version: Some(8), opset_import: vec![opset("", 17)], graph: Some(graph), ..Default::default() }
}

#[test]
fn a_bias_of_channels_finds_its_axis() {
    let sandbox = Sandbox::default();
    sandbox.model("m.onnx", &convolutional());
    let told = sandbox.run(&["inspect", "m.onnx", "--json"]).json();
    let id = told["groups"][0]["id"].as_str().unwrap().to_string();
    plan(&sandbox, "p.json", &[(&id, vec![], 8)]);
    let ran = slice(&sandbox, "m.onnx");
    assert_eq!(ran.code, 0, "{ran:?}");
    let out = result(&sandbox);
    let ops: Vec<&str> = out.graph.as_ref().unwrap().node.iter().map(|n| n.op_type()).collect();
    assert!(!ops.contains(&"Conv") && !ops.contains(&"Expand"), "{ops:?}");
    assert!(verifies(&sandbox, "m.onnx"));
}

/// A fused attention has no spelling for queries without dims.
fn fused() -> ModelProto {
    let int = |name: &str, v: i64| AttributeProto { name: Some(name.into()), i: Some(v), r#type: Some(2), ..Default::default() };
    let mut attention = node("A", "Attention", &["q", "k", "v"], &["a"]);
    attention.attribute = vec![int("q_num_heads", 2), int("kv_num_heads", 2)];
    let weight = |name: &str| floats(name, &[8, 8], &some(64));
    let graph = GraphProto {
        name: Some("g".into()),
        node: vec![
            node("Q", "MatMul", &["x", "Wq"], &["q"]),
            node("K", "MatMul", &["x", "Wk"], &["k"]),
            node("V", "MatMul", &["x", "Wv"], &["v"]),
            attention,
            node("O", "MatMul", &["a", "Wo"], &["o"]),
            node("Sum", "Add", &["x", "o"], &["y"]),
        ],
        initializer: ["Wq", "Wk", "Wv", "Wo"].into_iter().map(weight).collect(),
        input: vec![info("x", &[0, 5, 8])],
        output: vec![info("y", &[0, 5, 8])],
        ..Default::default()
    };
    ModelProto { ir_version: Some(10), opset_import: vec![opset("", 23)], graph: Some(graph), ..Default::default() }
}

#[test]
fn what_cannot_be_spelled_is_refused_by_name() {
    let sandbox = Sandbox::default();
    sandbox.model("m.onnx", &fused());
    plan(&sandbox, "p.json", &[("qk.0", vec![], 8)]);
    let ran = slice(&sandbox, "m.onnx");
    assert!(ran.code == 2 && ran.stderr.contains("group 'qk.0', and node A (Attention) cannot do without it"), "{ran:?}");
    assert!(!sandbox.at("out.onnx").exists());
    plan(&sandbox, "p.json", &[("vo.0", vec![], 8)]);
    assert_eq!(slice(&sandbox, "m.onnx").code, 0);
    assert_eq!(result(&sandbox).graph.as_ref().unwrap().node.len(), 1, "an Identity, or nothing but the residual");
    let mut opened = fused();
    graph(&mut opened).node.truncate(4);
    graph(&mut opened).output = vec![info("a", &[0, 5, 8])];
    sandbox.model("open.onnx", &opened);
    assert_eq!(slice(&sandbox, "open.onnx").code, 2, "no such group there");
}
