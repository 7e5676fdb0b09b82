//! The table of bad inputs, on the real command: exit code, one line on stderr, nothing left behind.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    unreachable_pub,
    reason = "tests, with functions of their own"
)]

#[path = "bad_inputs/around.rs"]
mod around;
#[path = "command/mod.rs"]
mod command;
#[path = "bad_inputs/make.rs"]
mod make;
#[path = "bad_inputs/model.rs"]
mod model;

use command::*;
use make::*;
use onnx_proto::*;
use prost::Message;

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
    for (i, case) in model::CASES.iter().chain(around::CASES).enumerate() {
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
    assert!(failed.is_empty(), "{} of {} cases:\n{}", failed.len(), model::CASES.len() + around::CASES.len(), failed.join("\n"));
}

#[cfg(unix)]
#[test]
fn a_fifo_does_not_block() {
    // Row 11.
    let sandbox = Sandbox::default();
    let made = std::process::Command::new("mkfifo").arg(sandbox.at("m.onnx")).status();
    if made.is_ok_and(|s| s.success()) {
        assert_eq!(complaint(&sandbox.run(INSPECT), "not a regular file", false), None);
    } else {
        println!("no mkfifo here: row 11 not tested with a FIFO");
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
        // The build folder may lie where nobody can reach it. Copied by a process of its own: a file that this one has open for
        // writing cannot be started while another test's child still holds it.
        let binary = sandbox.at("vitrim");
        let copied = std::process::Command::new("cp").arg(env!("CARGO_BIN_EXE_vitrim")).arg(&binary).status();
        assert!(binary.exists() && copied.is_ok_and(|s| s.success()));
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
