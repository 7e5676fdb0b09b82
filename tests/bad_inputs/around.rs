//! Cases of what is around the model file: external data, images and arrays, flags, outputs.

use crate::command::*;
use crate::make::*;

pub const CASES: &[Case] = &[
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
