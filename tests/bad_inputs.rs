//! The table of bad inputs, on the real command: exit code, one line on stderr, nothing left behind.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "tests, with functions of their own")]

#[path = "command/mod.rs"]
mod command;

use command::*;
use onnx_proto::*;
use prost::Message;

/// A failing command. Where `args` write `out.onnx` or `out.json`, it must be absent or untouched afterwards.
struct Case {
    row: u32,
    says: &'static str,
    args: &'static [&'static str],
    make: fn(&Sandbox),
}

const INSPECT: &[&str] = &["inspect", "m.onnx"];
const PLAN: &[&str] = &["plan", "m.onnx", "--by", "magnitude", "--keep", "mlp=0.5", "-o", "out.json"];
const EVAL: &[&str] = &["eval", "m.onnx", "--data", "data"];
const EVAL_NPZ: &[&str] = &["eval", "m.onnx", "--data", "d.npz"];
const SCALED: &[&str] = &["eval", "m.onnx", "--data", "data", "--mean", "0.5", "--std", "0.5"];

fn good(s: &Sandbox) {
    s.model("m.onnx", &mlp());
}

/// The tiny model with one change.
fn changed(s: &Sandbox, change: impl Fn(&mut ModelProto)) {
    let mut model = mlp();
    change(&mut model);
    s.model("m.onnx", &model);
}

fn weight(model: &mut ModelProto) -> &mut TensorProto {
    &mut graph(model).initializer[0]
}

fn weight_changed(s: &Sandbox, change: impl Fn(&mut TensorProto)) {
    changed(s, |m| change(weight(m)));
}

fn external(s: &Sandbox, entries: &[(&str, &str)]) {
    s.write("w.bin", &[0; 64]);
    weight_changed(s, |t| externalize(t, entries));
}

/// A model whose subgraphs are nested this deep, as bytes: the encoder itself could not make it.
fn nested(depth: usize) -> Vec<u8> {
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

fn labelled(s: &Sandbox, labels: &[u8]) {
    s.model("m.onnx", &mlp());
    let x: Vec<u8> = some(4 * labels.len()).iter().flat_map(|v| v.to_le_bytes()).collect();
    let entries = [("x", npy("<f4", &[labels.len(), 4], &x)), ("labels", npy("|u1", &[labels.len()], labels))];
    s.write("d.npz", &npz(&entries));
}

fn two_inputs(s: &Sandbox) {
    let mut model = classifier(4, 4);
    graph(&mut model).input.push(info("x2", &[0, 3]));
    graph(&mut model).node.push(node("N", "Neg", &["x2"], &["z"]));
    s.model("m.onnx", &model);
    s.write("data/a/1.png", &png(4));
}

#[cfg(unix)]
fn link(s: &Sandbox, from: &str, to: &str) {
    std::os::unix::fs::symlink(to, s.at(from)).unwrap();
}

const CASES: &[Case] = &[
    // ---- the file
    Case { row: 1, says: "m.onnx: no such file", args: INSPECT, make: |_| {} },
    Case { row: 1, says: "p.json: ", args: &["slice", "m.onnx", "--plan", "p.json", "-o", "out.onnx"], make: good },
    Case {
        row: 2,
        says: "is a directory, expected an .onnx file",
        args: INSPECT,
        make: |s| std::fs::create_dir(s.at("m.onnx")).unwrap(),
    },
    Case {
        row: 2,
        says: "did you mean m.onnx/only.onnx",
        args: INSPECT,
        make: |s| s.write("m.onnx/only.onnx", &mlp().encode_to_vec()),
    },
    Case { row: 4, says: "file is empty", args: PLAN, make: |s| s.write("m.onnx", b"") },
    Case {
        row: 5,
        says: "Git LFS pointer, not the model: run git lfs pull",
        args: INSPECT,
        make: |s| s.write("m.onnx", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
    },
    Case { row: 6, says: "starts like HTML, not ONNX", args: PLAN, make: |s| s.write("m.onnx", b"<!DOCTYPE html><html>") },
    Case { row: 7, says: "zip archive", args: INSPECT, make: |s| s.write("m.onnx", b"PK\x03\x04................") },
    Case { row: 7, says: "gzip", args: INSPECT, make: |s| s.write("m.onnx", b"\x1f\x8b\x08\0") },
    Case { row: 7, says: "TFLite", args: INSPECT, make: |s| s.write("m.onnx", b"\x1c\0\0\0TFL3\0\0") },
    Case { row: 8, says: "not a valid ONNX protobuf", args: INSPECT, make: |s| s.write("m.onnx", b"\xff\xfe\xfd\xfc") },
    Case {
        row: 9,
        says: "unexpected field or wire type at byte",
        args: PLAN,
        make: |s| s.write("m.onnx", &[&mlp().encode_to_vec()[..], &[0xca, 0x03, 1, 65]].concat()),
    },
    Case {
        row: 10,
        says: "larger than 2 GiB: store weights as external data",
        args: INSPECT,
        make: |s| std::fs::File::create(s.at("m.onnx")).unwrap().set_len((2 << 30) + 1).unwrap(),
    },
    #[cfg(unix)]
    Case { row: 11, says: "not a regular file", args: INSPECT, make: |s| link(s, "m.onnx", "/dev/null") },
    Case {
        row: 13,
        says: "more than 200000 nodes",
        args: INSPECT,
        make: |s| changed(s, |m| graph(m).node = vec![NodeProto::default(); 200_001]),
    },
    Case { row: 14, says: "nested deeper than 8", args: INSPECT, make: |s| s.write("m.onnx", &nested(5000)) },
    Case { row: 15, says: "nested deeper than 8", args: INSPECT, make: |s| s.write("m.onnx", &nested(30)) },
    Case {
        row: 16,
        says: "not valid UTF-8",
        args: INSPECT,
        make: |s| {
            let mut model = mlp();
            graph(&mut model).node[0].name = Some("QQQQ".into());
            let mut bytes = model.encode_to_vec();
            let at = bytes.windows(4).position(|w| w == b"QQQQ").unwrap();
            bytes[at] = 0xff;
            s.write("m.onnx", &bytes);
        },
    },
    // ---- the model
    Case { row: 17, says: "model has no graph", args: INSPECT, make: |s| changed(s, |m| m.graph = None) },
    Case { row: 17, says: "model has no nodes", args: INSPECT, make: |s| changed(s, |m| graph(m).node.clear()) },
    Case { row: 18, says: "no opset for the default domain", args: PLAN, make: |s| changed(s, |m| m.opset_import.clear()) },
    Case {
        row: 19,
        says: "opset 999 is not supported",
        args: INSPECT,
        make: |s| changed(s, |m| m.opset_import = vec![opset("", 999)]),
    },
    Case {
        row: 19,
        says: "opset 9 is not supported",
        args: INSPECT,
        make: |s| changed(s, |m| m.opset_import = vec![opset("", 9)]),
    },
    Case { row: 20, says: "ir_version is missing", args: INSPECT, make: |s| changed(s, |m| m.ir_version = None) },
    Case { row: 20, says: "ir_version 999", args: INSPECT, make: |s| changed(s, |m| m.ir_version = Some(999)) },
    Case { row: 25, says: "no prunable group found", args: PLAN, make: |s| changed(s, nothing_to_cut) },
    Case {
        row: 25,
        says: "see vitrim inspect",
        args: &["search", "m.onnx", "--data", "d.npz", "--run", "r"],
        make: |s| {
            labelled(s, &[0, 1]);
            changed(s, nothing_to_cut);
        },
    },
    Case { row: 28, says: "name the image input with --input", args: SCALED, make: two_inputs },
    Case { row: 28, says: "name the output with --output", args: EVAL_NPZ, make: two_outputs },
    Case {
        row: 28,
        says: "--output z: the model's outputs are y",
        args: &["eval", "m.onnx", "--data", "d.npz", "--output", "z"],
        make: |s| labelled(s, &[0, 1]),
    },
    Case {
        row: 29,
        says: "height and width are open: give --preprocess, or fix them with --size",
        args: SCALED,
        make: |s| {
            s.model("m.onnx", &classifier(-1, -2));
            s.write("data/a/1.png", &png(4));
        },
    },
    // ---- the graph
    Case {
        row: 31,
        says: "graph has a cycle through node A -> ",
        args: PLAN,
        make: |s| changed(s, |m| graph(m).node[0].input[0] = "y".into()),
    },
    Case {
        row: 33,
        says: "value y is produced by node B and node C",
        args: INSPECT,
        make: |s| changed(s, |m| graph(m).node.push(node("C", "Neg", &["x"], &["y"]))),
    },
    Case {
        row: 34,
        says: "initializer W appears twice",
        args: INSPECT,
        make: |s| changed(s, |m| graph(m).initializer.push(floats("W", &[4, 16], &some(64)))),
    },
    Case {
        row: 35,
        says: "node A reads 'missing', which nothing produces",
        args: INSPECT,
        make: |s| changed(s, |m| graph(m).node[0].input[0] = "missing".into()),
    },
    Case {
        row: 35,
        says: "graph output 'z' is produced by nothing",
        args: INSPECT,
        make: |s| changed(s, |m| graph(m).output.push(info("z", &[0]))),
    },
    // ---- tensors
    Case {
        row: 42,
        says: "initializer W: 8 bytes, shape [4,16] float32 needs 256",
        args: PLAN,
        make: |s| weight_changed(s, |t| t.raw_data = Some(vec![0; 8].into())),
    },
    Case {
        row: 43,
        says: "264 bytes, shape [4,16]",
        args: INSPECT,
        make: |s| weight_changed(s, |t| t.raw_data = Some(vec![0; 264].into())),
    },
    Case { row: 44, says: "shape overflows", args: INSPECT, make: |s| weight_changed(s, |t| t.dims = vec![1 << 40, 1 << 40]) },
    Case {
        row: 45,
        says: "256 bytes, shape [1048576,65536]",
        args: PLAN,
        make: |s| weight_changed(s, |t| t.dims = vec![1 << 20, 1 << 16]),
    },
    Case { row: 46, says: "negative dimension -4", args: INSPECT, make: |s| weight_changed(s, |t| t.dims = vec![-4, 16]) },
    Case {
        row: 47,
        says: "initializer W has type 77, not supported",
        args: INSPECT,
        make: |s| weight_changed(s, |t| t.data_type = Some(77)),
    },
    Case { row: 48, says: "two data fields", args: INSPECT, make: |s| weight_changed(s, |t| t.float_data = vec![0.0; 64]) },
    Case {
        row: 49,
        says: "initializer W holds 16 NaN values (first at 0,0)",
        args: &["slice", "m.onnx", "--plan", "p.json", "-o", "out.onnx"],
        make: |s| sick(s, f32::NAN),
    },
    Case {
        row: 49,
        says: "initializer W holds 16 infinite values",
        args: &["slice", "m.onnx", "--plan", "p.json", "-o", "out.onnx"],
        make: |s| sick(s, f32::INFINITY),
    },
    Case {
        row: 49,
        says: "initializer W holds 16 NaN values",
        args: &["search", "m.onnx", "--data", "d.npz", "--run", "r"],
        make: |s| {
            labelled(s, &[0, 1]);
            sick(s, f32::NAN);
        },
    },
    // ---- external data
    Case {
        row: 52,
        says: "external data nope.bin of initializer W not found beside the model",
        args: PLAN,
        make: |s| external(s, &[("location", "nope.bin")]),
    },
    Case { row: 53, says: "leaves the model's directory", args: INSPECT, make: |s| external(s, &[("location", "../w.bin")]) },
    Case {
        row: 53,
        says: "leaves the model's directory",
        args: INSPECT,
        make: |s| external(s, &[("location", "a/../../w.bin")]),
    },
    Case { row: 53, says: "leaves the model's directory", args: INSPECT, make: |s| external(s, &[("location", "/etc/passwd")]) },
    Case { row: 53, says: "leaves the model's directory", args: INSPECT, make: |s| external(s, &[("location", "C:\\w.bin")]) },
    #[cfg(unix)]
    Case {
        row: 54,
        says: "leaves the model's directory",
        args: INSPECT,
        make: |s| {
            link(s, "l.bin", "/etc/passwd");
            external(s, &[("location", "l.bin")]);
        },
    },
    Case {
        row: 57,
        says: "offset 60 + 256 bytes is past the end (64)",
        args: INSPECT,
        make: |s| external(s, &[("location", "w.bin"), ("offset", "60"), ("length", "256")]),
    },
    Case {
        row: 57,
        says: "offset 'x' is not a number",
        args: INSPECT,
        make: |s| external(s, &[("location", "w.bin"), ("offset", "x")]),
    },
    Case { row: 58, says: "not a regular file", args: INSPECT, make: |s| external(s, &[("location", ".")]) },
    // ---- data
    Case { row: 63, says: "data: No such file", args: EVAL, make: good },
    Case {
        row: 63,
        says: "no .jpg/.jpeg/.png found under data",
        args: SCALED,
        make: |s| {
            s.model("m.onnx", &classifier(4, 4));
            s.write("data/readme.txt", b"nothing");
        },
    },
    Case { row: 65, says: "label 3 but the model has 3 outputs (0..2)", args: EVAL_NPZ, make: |s| labelled(s, &[0, 3]) },
    Case { row: 65, says: "the labels seem to start at 1: subtract 1", args: EVAL_NPZ, make: |s| labelled(s, &[1, 2, 3]) },
    Case {
        row: 65,
        says: "1 class folders but the model has 3 outputs",
        args: SCALED,
        make: |s| {
            s.model("m.onnx", &classifier(4, 4));
            s.write("data/a/1.png", &png(4));
        },
    },
    // ---- flags
    Case {
        row: 86,
        says: "must be in (0,1], e.g. 0.5 or 50%",
        args: &["plan", "m.onnx", "--by", "random", "--budget", "macs=0", "-o", "out.json"],
        make: good,
    },
    Case {
        row: 86,
        says: "must be in (0,1], e.g. 0.5 or 50%",
        args: &["plan", "m.onnx", "--by", "random", "--budget", "macs=-1", "-o", "out.json"],
        make: good,
    },
    Case {
        row: 86,
        says: "must be in (0,1], e.g. 0.5 or 50%",
        args: &["slim", "m.onnx", "--budget", "macs=NaN", "-o", "out.onnx"],
        make: good,
    },
    Case {
        row: 86,
        says: "must be in (0,1], e.g. 0.5 or 50%",
        args: &["plan", "m.onnx", "--by", "random", "--keep", "mlp=1.5", "-o", "out.json"],
        make: good,
    },
    Case {
        row: 86,
        says: "unknown kind 'mpl'",
        args: &["plan", "m.onnx", "--by", "random", "--keep", "mpl=0.5", "-o", "out.json"],
        make: good,
    },
    Case {
        row: 87,
        says: "smallest possible is ",
        args: &["plan", "m.onnx", "--by", "random", "--budget", "macs=0.01", "-o", "out.json"],
        make: good,
    },
    Case {
        row: 87,
        says: "smallest possible is ",
        args: &["slim", "m.onnx", "--budget", "params=0.01", "-o", "out.onnx"],
        make: good,
    },
    Case { row: 88, says: "similar", args: &["plan", "m.onnx", "--kep", "mlp=0.5"], make: good },
    Case { row: 88, says: "plan", args: &["plna"], make: good },
    Case {
        row: 88,
        says: "cannot be used with",
        args: &["slim", "m.onnx", "--keep", "mlp=0.5", "--budget", "macs=0.5", "-o", "out.onnx"],
        make: good,
    },
    Case { row: 88, says: "required", args: &["inspect"], make: good },
    Case {
        row: 89,
        says: "output would overwrite the input",
        args: &["augment", "m.onnx", "-o", "m.onnx", "--force"],
        make: good,
    },
    Case {
        row: 89,
        says: "output would overwrite the input",
        args: &["augment", "m.onnx", "-o", "./a/../m.onnx", "--force"],
        make: |s| {
            good(s);
            s.write("a/b", b"")
        },
    },
    #[cfg(unix)]
    Case {
        row: 89,
        says: "output would overwrite the input",
        args: &["augment", "m.onnx", "-o", "l.onnx", "--force"],
        make: |s| {
            good(s);
            link(s, "l.onnx", "m.onnx")
        },
    },
    Case {
        row: 89,
        says: "output would overwrite the input",
        args: &["augment", "m.onnx", "-o", "h.onnx", "--force"],
        make: |s| {
            good(s);
            std::fs::hard_link(s.at("m.onnx"), s.at("h.onnx")).unwrap();
        },
    },
    Case {
        row: 90,
        says: "there.onnx: exists: use --force",
        args: &["augment", "m.onnx", "-o", "there.onnx"],
        make: |s| {
            good(s);
            s.write("there.onnx", b"old")
        },
    },
    Case { row: 91, says: "directory none does not exist", args: &["slim", "m.onnx", "-o", "none/out.onnx"], make: good },
    Case {
        row: 91,
        says: "is not a directory",
        args: &["augment", "m.onnx", "-o", "file/out.onnx"],
        make: |s| {
            good(s);
            s.write("file", b"")
        },
    },
    #[cfg(unix)]
    Case {
        row: 92,
        says: "l.onnx: exists: use --force",
        args: &["augment", "m.onnx", "-o", "l.onnx"],
        make: |s| {
            good(s);
            link(s, "l.onnx", "elsewhere")
        },
    },
    Case { row: 93, says: "-: standard output is not supported", args: &["augment", "m.onnx", "-o", "-"], make: good },
    Case { row: 94, says: "0 is not in 1..", args: &["eval", "m.onnx", "--data", "d.npz", "--threads", "0"], make: good },
    Case {
        row: 94,
        says: "--device: 'gpu'",
        args: &["eval", "m.onnx", "--data", "d.npz", "--device", "gpu"],
        make: |s| labelled(s, &[0, 1]),
    },
];

fn nothing_to_cut(m: &mut ModelProto) {
    let g = graph(m);
    g.node = vec![node("A", "MatMul", &["x", "W"], &["y"])];
    g.initializer = vec![floats("W", &[4, 3], &some(12))];
}

fn two_outputs(s: &Sandbox) {
    labelled(s, &[0, 1]);
    changed(s, |m| {
        graph(m).node.push(node("N", "Neg", &["y"], &["z"]));
        graph(m).output.push(info("z", &[0, 3]));
    });
}

/// A model with 16 bad numbers in `W`, and a plan for it.
fn sick(s: &Sandbox, bad: f32) {
    let mut values = some(64);
    values[..16].fill(bad);
    changed(s, |m| *weight(m) = floats("W", &[4, 16], &values));
    let plan = r#"{"schema_version":1,"model_sha256":"","groups":{"mlp.0":{"kept":[0,1,2,3],"of":16}}}"#;
    s.write("p.json", plan.as_bytes());
}

/// What is wrong with how a command failed; empty where all is right.
fn complaint(ran: &Ran, says: &str, json: bool) -> Option<String> {
    let lines: Vec<&str> = ran.stderr.lines().collect();
    let right = ran.code == 2
        && lines.len() == 1
        && lines[0].starts_with("error: ")
        && lines[0].contains(says)
        && lines[0].chars().count() <= 310
        && !lines[0].contains(|c: char| c.is_control());
    if !right {
        return Some(format!("{ran:?}"));
    }
    if !json {
        return (!ran.stdout.is_empty()).then(|| format!("stdout is not empty: {}", ran.stdout));
    }
    let object: serde_json::Value = match serde_json::from_str(&ran.stdout) {
        Ok(object) => object,
        Err(e) => return Some(format!("stdout is no object ({e}): {}", ran.stdout)),
    };
    let message = object["error"]["message"].as_str().unwrap_or_default();
    let code = object["error"]["code"].as_str().unwrap_or_default();
    let whole = object["schema_version"] == 1 && object["ok"] == false && message.contains(says) && code.starts_with('V');
    (!whole).then(|| format!("object: {object}"))
}

#[test]
fn bad_inputs_end_with_2_and_one_line_and_leave_nothing() {
    let mut failed = Vec::new();
    for (i, case) in CASES.iter().enumerate() {
        let mut note = |what: &str, text: String| failed.push(format!("case {i}, row {}, {what}: {text}", case.row));
        let sandbox = Sandbox::default();
        (case.make)(&sandbox);
        let before = sandbox.files();
        if let Some(text) = complaint(&sandbox.run(case.args), case.says, false) {
            note("plain", text);
        }
        let with_json: Vec<&str> = case.args.iter().copied().chain(["--json"]).collect();
        if let Some(text) = complaint(&sandbox.run(&with_json), case.says, true) {
            note("--json", text);
        }
        if sandbox.files() != before {
            note("files", format!("{:?} became {:?}", before, sandbox.files()));
        }
        let Some(out) = case.args.iter().find(|a| ["out.onnx", "out.json"].contains(a)) else { continue };
        sandbox.write(out, b"old content");
        let forced: Vec<&str> = case.args.iter().copied().chain(["--force"]).collect();
        if let Some(text) = complaint(&sandbox.run(&forced), case.says, false) {
            note("--force", text);
        }
        if std::fs::read(sandbox.at(out)).ok().as_deref() != Some(b"old content") {
            note("--force", "the old output was touched".to_string());
        }
    }
    assert!(failed.is_empty(), "{} of {} cases:\n{}", failed.len(), CASES.len(), failed.join("\n"));
}

#[cfg(unix)]
#[test]
fn a_fifo_does_not_block_and_no_permission_is_named() {
    use std::os::unix::fs::PermissionsExt;
    let sandbox = Sandbox::default();
    let made = std::process::Command::new("mkfifo").arg(sandbox.at("m.onnx")).status();
    if made.is_ok_and(|s| s.success()) {
        assert_eq!(complaint(&sandbox.run(INSPECT), "not a regular file", false), None);
    } else {
        println!("no mkfifo here: row 11 not tested with a FIFO");
    }
    sandbox.model("secret.onnx", &mlp());
    std::fs::set_permissions(sandbox.at("secret.onnx"), std::fs::Permissions::from_mode(0o000)).unwrap();
    if std::fs::File::open(sandbox.at("secret.onnx")).is_ok() {
        println!("this user reads everything: row 3 not tested");
    } else {
        assert_eq!(complaint(&sandbox.run(&["inspect", "secret.onnx"]), "permission denied", false), None);
    }
}

/// Every command that reads a model.
const READERS: &[&[&str]] = &[
    &["inspect", "m.onnx"],
    &["augment", "m.onnx", "-o", "out.onnx"],
    &["plan", "m.onnx", "--by", "random", "--keep", "mlp=0.5", "-o", "out.onnx"],
    &["score", "m.onnx", "--by", "random", "-o", "out.onnx"],
    &["mask", "m.onnx", "--plan", "p.json", "-o", "out.onnx"],
    &["slice", "m.onnx", "--plan", "p.json", "-o", "out.onnx"],
    &["search", "m.onnx", "--data", "d.npz", "--run", "out.onnx"],
    &["slim", "m.onnx", "-o", "out.onnx"],
    &["eval", "m.onnx", "--data", "d.npz"],
    &["finetune", "m.onnx", "--teacher", "m.onnx", "--data", "d.npz", "-o", "out.onnx"],
    &["verify", "good.onnx", "--against", "m.onnx"],
    &["verify", "m.onnx", "--against", "good.onnx"],
    &["bench", "m.onnx"],
];

#[test]
fn every_reader_says_the_same_of_a_truncated_file() {
    let sandbox = Sandbox::default();
    let bytes = mlp().encode_to_vec();
    sandbox.write("good.onnx", &bytes);
    sandbox.write("p.json", br#"{"schema_version":1,"model_sha256":"","groups":{}}"#);
    let mut failed = Vec::new();
    for cut in [bytes.len() / 3, bytes.len() - 1] {
        sandbox.write("m.onnx", &bytes[..cut]);
        for args in READERS {
            for json in [false, true] {
                let args: Vec<&str> = args.iter().copied().chain(json.then_some("--json")).collect();
                let complaint = complaint(&sandbox.run(&args), "m.onnx: not a valid ONNX protobuf", json);
                failed.extend(complaint.map(|c| format!("{args:?}, cut at {cut}: {c}")));
            }
            assert!(!sandbox.at("out.onnx").exists(), "{args:?}");
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

#[test]
fn a_model_cut_anywhere_never_panics() {
    let sandbox = Sandbox::default();
    let bytes = mlp().encode_to_vec();
    for n in 0..40 {
        sandbox.write("m.onnx", &bytes[..bytes.len() * n / 40]);
        let ran = sandbox.run(INSPECT);
        assert!(ran.code == 2 && ran.stderr.lines().count() == 1, "cut at {n}/40: {ran:?}");
    }
}

/// The command as a user for whom permissions hold: root reads and writes everything, so root lends its right to `nobody`.
#[cfg(unix)]
fn as_nobody(sandbox: &Sandbox, args: &[&str]) -> Ran {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
    use std::os::unix::process::CommandExt;
    const NOBODY: u32 = 65534;
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_vitrim"));
    if std::fs::metadata(sandbox.dir.path()).unwrap().uid() == 0 {
        // The build folder may lie where nobody can reach it.
        let binary = sandbox.at("vitrim");
        if !binary.exists() {
            std::fs::copy(env!("CARGO_BIN_EXE_vitrim"), &binary).unwrap();
        }
        std::fs::set_permissions(sandbox.dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        for file in sandbox.files() {
            chown(sandbox.at(&file), Some(NOBODY), None).unwrap();
        }
        command = std::process::Command::new(binary);
        command.uid(NOBODY);
    }
    let out = command.args(args).current_dir(sandbox.dir.path()).stdin(std::process::Stdio::null()).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ran { code: out.status.code().unwrap_or(-1), stdout: text(&out.stdout), stderr: text(&out.stderr) }
}

#[cfg(unix)]
#[test]
fn permissions_that_are_missing_are_named() {
    use std::os::unix::fs::PermissionsExt;
    let mode = |path: &std::path::Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    let sandbox = Sandbox::default();
    good(&sandbox);
    std::fs::create_dir(sandbox.at("sealed")).unwrap();
    mode(&sandbox.at("sealed"), 0o555);
    // Row 91.
    let args = ["augment", "m.onnx", "-o", "sealed/out.onnx"];
    assert_eq!(complaint(&as_nobody(&sandbox, &args), "cannot be written to", false), None);
    // Row 3.
    mode(&sandbox.at("m.onnx"), 0o000);
    assert_eq!(complaint(&as_nobody(&sandbox, INSPECT), "m.onnx: permission denied", false), None);
}

// ---- what is odd, but no error

#[test]
fn odd_models_work_and_say_what_is_odd() {
    struct Odd {
        row: u32,
        says: &'static str,
        make: fn(&mut ModelProto),
    }
    let odd: &[Odd] = &[
        Odd { row: 20, says: "warning: ir_version 14 is newer", make: |m| m.ir_version = Some(14) },
        Odd { row: 22, says: "", make: |m| graph(m).node.push(node("U", "Quux", &["x"], &["u"])) },
        Odd { row: 30, says: "", make: |m| graph(m).input[0] = info("x", &[1, 4]) },
        Odd { row: 32, says: "warning: nodes are not in topological order: sorted", make: |m| graph(m).node.reverse() },
    ];
    for case in odd {
        let sandbox = Sandbox::default();
        changed(&sandbox, case.make);
        for args in [INSPECT, PLAN, &["slice", "m.onnx", "--plan", "out.json", "-o", "out.onnx"]] {
            let ran = sandbox.run(args);
            assert_eq!(ran.code, 0, "row {}: {args:?} {ran:?}", case.row);
            assert!(ran.stderr.contains(case.says), "row {}: {ran:?}", case.row);
        }
    }
}

#[test]
fn an_unknown_operator_is_a_barrier_that_inspect_names() {
    // Row 22: Quux reads the hidden units, so they cannot go; row 26: --strict makes that a negative result.
    let sandbox = Sandbox::default();
    changed(&sandbox, |m| {
        graph(m).node.push(node("U", "Quux", &["r"], &["u"]));
        graph(m).output.push(info("u", &[0, 16]));
    });
    let ran = sandbox.run(INSPECT);
    assert!(ran.code == 0 && ran.stdout.contains("Quux"), "{ran:?}");
    assert_eq!(sandbox.run(&["inspect", "m.onnx", "--strict"]).code, 1);
    let refused = sandbox.run(&["inspect", "m.onnx", "--json"]).json()["refused"].clone();
    assert_eq!((refused[0]["node"].as_str(), refused[0]["op"].as_str()), (Some("U"), Some("Quux")), "{refused}");
}

#[test]
fn a_model_that_was_cut_can_be_cut_again() {
    // Row 27.
    let sandbox = Sandbox::default();
    good(&sandbox);
    for (from, to, of) in [("m", "once", 16), ("once", "twice", 8)] {
        let (model, plan, out) = (format!("{from}.onnx"), format!("{from}.json"), format!("{to}.onnx"));
        let told = sandbox.run(&["inspect", &model, "--json"]).json();
        assert_eq!(told["groups"][0]["units"], of);
        assert_eq!(sandbox.run(&["plan", &model, "--by", "magnitude", "--keep", "mlp=0.5", "-o", &plan]).code, 0);
        assert_eq!(sandbox.run(&["slice", &model, "--plan", &plan, "-o", &out]).code, 0);
    }
    assert_eq!(sandbox.run(&["inspect", "twice.onnx", "--json"]).json()["groups"][0]["units"], 4);
}

#[cfg(unix)]
#[test]
fn external_data_in_the_models_own_folder_is_read_through_links() {
    // Rows 55 and 56: model and data as links into a folder of blobs; a hard link.
    let sandbox = Sandbox::default();
    let mut model = mlp();
    let raw = weight(&mut model).raw_data.clone().unwrap();
    externalize(weight(&mut model), &[("location", "w.bin")]);
    sandbox.model("blobs/1", &model);
    sandbox.write("blobs/2", &raw);
    std::fs::create_dir(sandbox.at("snapshot")).unwrap();
    link(&sandbox, "snapshot/m.onnx", "../blobs/1");
    link(&sandbox, "snapshot/w.bin", "../blobs/2");
    let ran = sandbox.run(&["inspect", "snapshot/m.onnx", "--json"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    assert_eq!(ran.json()["groups"][0]["units"], 16);
    sandbox.model("hard/m.onnx", &model);
    std::fs::hard_link(sandbox.at("blobs/2"), sandbox.at("hard/w.bin")).unwrap();
    assert_eq!(sandbox.run(&["inspect", "hard/m.onnx"]).code, 0);
}

#[test]
fn sick_weights_are_no_concern_of_inspect() {
    // Row 49.
    let sandbox = Sandbox::default();
    sick(&sandbox, f32::NAN);
    assert_eq!(sandbox.run(INSPECT).code, 0);
}

#[cfg(unix)]
#[test]
fn with_force_a_link_is_replaced_and_its_target_is_not() {
    // Rows 90 and 92.
    let sandbox = Sandbox::default();
    good(&sandbox);
    sandbox.write("target", b"precious");
    link(&sandbox, "l.json", "target");
    let args = ["plan", "m.onnx", "--by", "magnitude", "--keep", "mlp=0.5", "-o", "l.json"];
    assert_eq!(sandbox.run(&args).code, 2);
    let forced: Vec<&str> = args.iter().copied().chain(["--force"]).collect();
    assert_eq!(sandbox.run(&forced).code, 0);
    assert_eq!(std::fs::read(sandbox.at("target")).unwrap(), b"precious");
    assert!(!std::fs::symlink_metadata(sandbox.at("l.json")).unwrap().is_symlink());
}

// ---- ONNX Runtime

/// Commands that need it, with models and data that are right.
const NEEDS_ORT: &[&[&str]] = &[
    &["eval", "m.onnx", "--data", "d.npz"],
    &["search", "m.onnx", "--data", "d.npz", "--run", "run"],
    &["slim", "m.onnx", "-o", "out.onnx"],
    &["finetune", "m.onnx", "--teacher", "m.onnx", "--data", "d.npz", "-o", "out.onnx"],
    &["verify", "cut.onnx", "--against", "m.onnx", "--runtimes", "ort"],
    &["bench", "m.onnx", "--runtimes", "ort"],
    &["runtime"],
];

fn with_cut(s: &Sandbox) {
    labelled(s, &[0, 1, 2, 0]);
    assert_eq!(s.run(&["plan", "m.onnx", "--by", "magnitude", "--keep", "mlp=0.5", "-o", "p.json"]).code, 0);
    assert_eq!(s.run(&["slice", "m.onnx", "--plan", "p.json", "-o", "cut.onnx"]).code, 0);
}

#[test]
fn without_onnx_runtime_the_places_are_named_before_any_work() {
    // Row 95.
    let sandbox = Sandbox::default();
    with_cut(&sandbox);
    let says = if cfg!(feature = "ort") { "ONNX Runtime not found (looked in " } else { "was built without ONNX Runtime" };
    for args in NEEDS_ORT {
        for json in [false, true] {
            let args: Vec<&str> = args.iter().copied().chain(json.then_some("--json")).collect();
            let ran = sandbox.run(&args);
            assert_eq!(complaint(&ran, says, json), None, "{args:?}");
        }
        assert!(!sandbox.at("out.onnx").exists() && !sandbox.at("run").exists(), "{args:?}");
    }
    // These never need it.
    for args in [&["inspect", "m.onnx"][..], &["mask", "m.onnx", "--plan", "p.json", "-o", "twin.onnx"]] {
        assert_eq!(sandbox.run(args).code, 0, "{args:?}");
    }
}

#[test]
fn a_library_that_is_none_is_refused_in_time() {
    // Row 96.
    if !cfg!(feature = "ort") {
        return;
    }
    let sandbox = Sandbox::default();
    with_cut(&sandbox);
    sandbox.write("text.so", b"hello");
    let mut elf = vec![0u8; 64];
    elf[..5].copy_from_slice(b"\x7fELF\x02");
    elf[18] = 8; // MIPS
    sandbox.write("mips.so", &elf);
    for (library, says) in [
        ("text.so", "is not ONNX Runtime (no shared library)"),
        ("mips.so", "is for another machine"),
        ("none.so", "no ONNX Runtime library there"),
    ] {
        for args in NEEDS_ORT {
            let args: Vec<&str> = args.iter().copied().chain(["--ort-lib", library]).collect();
            let start = std::time::Instant::now();
            let ran = sandbox.run(&args);
            assert_eq!(complaint(&ran, says, false), None, "{args:?}");
            assert!(start.elapsed().as_secs() < 15);
        }
    }
}

#[test]
fn images_that_cannot_be_used_are_left_out_up_to_one_in_a_hundred() {
    // Row 66.
    let Some(ort) = ort() else {
        println!("no ONNX Runtime named: row 66 not tested");
        return;
    };
    let sandbox = Sandbox::default();
    sandbox.model("m.onnx", &classifier(4, 4));
    for class in ["a", "b", "c"] {
        for n in 0..70 {
            sandbox.write(&format!("data/{class}/{n}.png"), &png(4));
        }
    }
    sandbox.write("data/a/0.png", b"");
    let vars = [("VITRIM_ORT_LIB", ort.as_str())];
    let ran = sandbox.run_with(&[SCALED, &["--json"]].concat(), &vars);
    assert_eq!((ran.code, ran.json()["n"].as_u64()), (0, Some(209)), "{ran:?}");
    assert!(ran.stderr.contains("left out: data/a/0.png"), "{ran:?}");
    for strict in [true, false] {
        let args: Vec<&str> = SCALED.iter().copied().chain(strict.then_some("--strict-data")).collect();
        let says = if strict { "1 of 210 images cannot be used" } else { "images cannot be used, more than 1 %" };
        assert_eq!(complaint(&sandbox.run_with(&args, &vars), says, false), None);
        for n in 1..10 {
            sandbox.write(&format!("data/b/{n}.png"), &png(4)[..20]);
        }
    }
}
