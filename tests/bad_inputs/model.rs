//! Cases of the model file: container, model, graph, tensors.

use crate::command::*;
use crate::make::*;
use onnx_proto::*;
use prost::Message;

pub const CASES: &[Case] = &[
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
];
