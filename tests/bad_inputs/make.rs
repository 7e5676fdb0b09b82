//! What a case is, and files for cases.

use crate::command::*;
use onnx_proto::*;

/// A failing command. Where `args` write `out.onnx` or `out.json`, it must be absent or untouched afterwards.
pub struct Case {
    pub row: u32,
    pub says: &'static str,
    pub args: &'static [&'static str],
    pub make: fn(&Sandbox),
}

pub const INSPECT: &[&str] = &["inspect", "m.onnx"];
pub const PLAN: &[&str] = &["plan", "m.onnx", "--by", "magnitude", "--keep", "mlp=0.5", "-o", "out.json"];
pub const EVAL: &[&str] = &["eval", "m.onnx", "--data", "data"];
pub const EVAL_NPZ: &[&str] = &["eval", "m.onnx", "--data", "d.npz"];
pub const SCALED: &[&str] = &["eval", "m.onnx", "--data", "data", "--mean", "0.5", "--std", "0.5"];

pub fn good(s: &Sandbox) {
    s.model("m.onnx", &mlp());
}

/// The tiny model with one change.
pub fn changed(s: &Sandbox, change: impl Fn(&mut ModelProto)) {
    let mut model = mlp();
    change(&mut model);
    s.model("m.onnx", &model);
}

pub fn weight(model: &mut ModelProto) -> &mut TensorProto {
    &mut graph(model).initializer[0]
}

pub fn weight_changed(s: &Sandbox, change: impl Fn(&mut TensorProto)) {
    changed(s, |m| change(weight(m)));
}

pub fn external(s: &Sandbox, entries: &[(&str, &str)]) {
    s.write("w.bin", &[0; 64]);
    weight_changed(s, |t| externalize(t, entries));
}

/// A model whose subgraphs are nested this deep, as bytes: the encoder itself could not make it.
pub fn nested(depth: usize) -> Vec<u8> {
    fn field(number: u8, content: &[u8]) -> Vec<u8> {
        let mut out = vec![number << 3 | 2];
        let mut n = content.len();
        while n >= 128 {
            out.push((n & 127) as u8 | 128);
            n >>= 7;
        }
        out.push(n as u8);
        out.extend(content);
        out
    }
    let mut graph = Vec::new();
    for _ in 0..depth {
        // GraphProto.node (1) = NodeProto with attribute (5) = AttributeProto with g (6).
        graph = field(1, &field(5, &field(6, &graph)));
    }
    let mut model = vec![0x08, 8];
    model.extend(field(7, &graph));
    model
}

pub fn labelled(s: &Sandbox, labels: &[u8]) {
    s.model("m.onnx", &mlp());
    let x: Vec<u8> = some(4 * labels.len()).iter().flat_map(|v| v.to_le_bytes()).collect();
    let entries = [("x", npy("<f4", &[labels.len(), 4], &x)), ("labels", npy("|u1", &[labels.len()], labels))];
    s.write("d.npz", &npz(&entries));
}

pub fn two_inputs(s: &Sandbox) {
    let mut model = classifier(4, 4);
    graph(&mut model).input.push(info("x2", &[0, 3]));
    graph(&mut model).node.push(node("N", "Neg", &["x2"], &["z"]));
    s.model("m.onnx", &model);
    s.write("data/a/1.png", &png(4));
}

#[cfg(unix)]
pub fn link(s: &Sandbox, from: &str, to: &str) {
    std::os::unix::fs::symlink(to, s.at(from)).unwrap();
}

pub fn nothing_to_cut(m: &mut ModelProto) {
    let g = graph(m);
    g.node = vec![node("A", "MatMul", &["x", "W"], &["y"])];
    g.initializer = vec![floats("W", &[4, 3], &some(12))];
}

pub fn two_outputs(s: &Sandbox) {
    labelled(s, &[0, 1]);
    changed(s, |m| {
        graph(m).node.push(node("N", "Neg", &["y"], &["z"]));
        graph(m).output.push(info("z", &[0, 3]));
    });
}

/// A model with 16 bad numbers in `W`, and a plan for it.
pub fn sick(s: &Sandbox, bad: f32) {
    let mut values = some(64);
    values[..16].fill(bad);
    changed(s, |m| *weight(m) = floats("W", &[4, 16], &values));
    let plan = r#"{"schema_version":1,"model_sha256":"","groups":{"mlp.0":{"kept":[0,1,2,3],"of":16}}}"#;
    s.write("p.json", plan.as_bytes());
}
