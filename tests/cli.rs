//! The command line: help, JSON shapes, exit codes.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "tests, with functions of their own")]

#[path = "command/mod.rs"]
mod command;

use command::*;
use serde_json::Value;

const COMMANDS: [&str; 13] =
    ["slim", "inspect", "augment", "search", "score", "plan", "mask", "slice", "verify", "eval", "finetune", "bench", "runtime"];

/// The keys of an object, in order.
fn keys(value: &Value) -> Vec<&str> {
    let mut keys: Vec<&str> = value.as_object().expect("an object").keys().map(String::as_str).collect();
    keys.sort_unstable();
    keys
}

fn ok(ran: &Ran) -> Value {
    assert_eq!(ran.code, 0, "{ran:?}");
    ran.json()
}

#[test]
fn help_names_every_command_and_every_command_has_help() {
    let sandbox = Sandbox::default();
    let help = sandbox.run(&["--help"]);
    assert_eq!((help.code, help.stderr.as_str()), (0, ""));
    for command in COMMANDS {
        assert!(help.stdout.contains(&format!("  {command} ")), "{command} is missing:\n{}", help.stdout);
        let own = sandbox.run(&[command, "--help"]);
        assert_eq!(own.code, 0, "{own:?}");
        assert!(own.stdout.starts_with(|c: char| c.is_uppercase()) && own.stdout.contains("Usage: vitrim "), "{own:?}");
        assert!(own.stdout.contains("--json") && own.stdout.contains("--quiet"), "{command}: {}", own.stdout);
    }
    let version = sandbox.run(&["--version"]);
    assert_eq!(version.stdout, format!("vitrim {}\n", env!("CARGO_PKG_VERSION")));
    assert_eq!(sandbox.run(&[]).code, 2);
}

#[test]
fn options_are_there_where_they_apply() {
    let sandbox = Sandbox::default();
    let has = |command: &str, flags: &[&str]| {
        let help = sandbox.run(&[command, "--help"]).stdout;
        for flag in flags {
            assert!(help.contains(flag), "{command} has no {flag}");
        }
    };
    let engine = ["--device", "--threads", "--ort-lib", "--offline", "--size"];
    let data = ["--data", "--input", "--output", "--preprocess", "--mean", "--std", "--batch"];
    for command in ["slim", "search", "eval", "finetune", "verify"] {
        has(command, &engine);
        has(command, &data);
    }
    has("bench", &engine);
    for command in ["slim", "augment", "score", "plan", "mask", "slice", "finetune"] {
        has(command, &["--force", "-o "]);
    }
    for command in ["slim", "search", "score", "plan", "verify", "finetune", "bench"] {
        has(command, &["--seed"]);
    }
    has("slim", &["--budget", "--keep", "--recipe", "--run", "--dry-run", "--keep-rejected", "--no-keep-run", "--min-accuracy"]);
    has("search", &["--resume", "--epochs", "--lr", "--l1", "--tie", "--gates"]);
    has("plan", &["--scores", "--by", "--run", "--round", "--min-width", "--protect", "--kinds"]);
    has("slice", &["--plan", "--weights"]);
    has("mask", &["--from"]);
    has("verify", &["--against", "--plan", "--runtimes", "--min-accuracy", "--max-drop"]);
    has("augment", &["--gates", "--tie", "--train", "--loss", "--optimizer", "--per-sample", "--output"]);
}

#[test]
fn inspect_has_the_names_of_the_contract() {
    let told = ok(&Sandbox::default().run(&["inspect", &digits("vit-digits.onnx"), "--json"]));
    assert_eq!(keys(&told), ["groups", "model", "refused", "schema_version"]);
    let model = &told["model"];
    assert_eq!(keys(model), ["bytes", "inputs", "ir_version", "macs", "opsets", "outputs", "params", "path"]);
    assert_eq!((model["bytes"].as_u64(), model["opsets"]["ai.onnx"].as_i64()), (Some(2_781_142), Some(17)));
    let groups = told["groups"].as_array().unwrap();
    let group = |id: &str| groups.iter().find(|g| g["id"] == id).unwrap();
    let names = [
        "basis",
        "basis_reason",
        "cuts",
        "heads",
        "id",
        "kind",
        "layer",
        "macs_per_unit",
        "params_per_unit",
        "sites",
        "units",
        "width",
    ];
    for g in groups {
        assert_eq!(keys(g), names);
    }
    let qk = group("qk.3");
    assert_eq!((qk["units"].as_u64(), qk["heads"].as_u64(), qk["width"].as_u64()), (Some(96), Some(3), Some(32)));
    let mlp = group("mlp.0");
    assert_eq!((mlp["units"].as_u64(), mlp["heads"].as_u64(), mlp["layer"].as_u64()), (Some(384), None, Some(0)));
    // fc1 96 x 384 and its bias, fc2 384 x 96.
    assert_eq!((mlp["params_per_unit"].as_u64(), mlp["cuts"].as_array().map(Vec::len)), (Some(193), Some(3)));
    assert_eq!(keys(&mlp["cuts"][0]), ["axis", "initializer"]);
}

#[test]
fn strict_is_negative_only_where_something_is_refused() {
    let sandbox = Sandbox::default();
    assert_eq!(sandbox.run(&["inspect", &digits("vit-digits.onnx"), "--strict", "-q"]).code, 0);
    let mut model = mlp();
    graph(&mut model).node.push(node("U", "Quux", &["r"], &["u"]));
    graph(&mut model).output.push(info("u", &[0, 16]));
    sandbox.model("m.onnx", &model);
    assert_eq!(sandbox.run(&["inspect", "m.onnx", "--strict", "--json"]).code, 1);
    assert_eq!(sandbox.run(&["inspect", "m.onnx"]).code, 0);
}

/// `y = softmax(q k^T) v`, where an operator that nobody knows stands between the weights and the product named by `at`.
fn attention_with_an_unknown_operator(at: &str) -> onnx_proto::ModelProto {
    let mut model = mlp();
    let g = graph(&mut model);
    g.node = vec![
        node("Q", "MatMul", &["x", "Wq"], &["q"]),
        node("K", "MatMul", &["x", "Wk"], &["k"]),
        node("V", "MatMul", &["x", "Wv"], &["v"]),
        node("U", "Quux", &[at], &["u"]),
        node("T", "Transpose", &[if at == "k" { "u" } else { "k" }], &["t"]),
        node("L", "MatMul", &[if at == "q" { "u" } else { "q" }, "t"], &["l"]),
        node("P", "Softmax", &["l"], &["p"]),
        node("A", "MatMul", &["p", if at == "v" { "u" } else { "v" }], &["a"]),
        node("O", "MatMul", &["a", "Wo"], &["y"]),
    ];
    g.node[4].attribute = vec![onnx_proto::AttributeProto {
        name: Some("perm".into()),
        ints: vec![0, 2, 1],
        r#type: Some(7),
        ..Default::default()
    }];
    g.initializer = ["Wq", "Wk", "Wv", "Wo"].iter().map(|n| floats(n, &[6, 6], &some(36))).collect();
    g.input = vec![info("x", &[0, 5, 6])];
    g.output = vec![info("y", &[0, 5, 6])];
    model
}

#[test]
fn strict_names_the_layer_that_is_refused() {
    let sandbox = Sandbox::default();
    for (at, kind) in [("q", "qk"), ("v", "vo")] {
        sandbox.model("m.onnx", &attention_with_an_unknown_operator(at));
        let ran = sandbox.run(&["inspect", "m.onnx", "--strict", "--json"]);
        assert_eq!(ran.code, 1, "{ran:?}");
        let refused = ran.json()["refused"].clone();
        let told =
            refused.as_array().unwrap().iter().find(|r| r["kind"] == kind).unwrap_or_else(|| panic!("no {kind}: {refused}"));
        assert_eq!(keys(told), ["axis", "kind", "node", "op", "reason"]);
        assert_eq!((told["node"].as_str(), told["op"].as_str()), (Some("U"), Some("Quux")), "{told}");
        assert!(told["reason"].as_str().unwrap().contains("Quux has no rule"), "{told}");
        // A table says it too, and says how the command ends.
        let table = sandbox.run(&["inspect", "m.onnx", "--strict"]);
        assert!(table.code == 1 && table.stdout.contains(&format!("refused {kind}: ")), "{table:?}");
    }
}

#[test]
fn where_nothing_can_be_cut_plan_says_so_in_one_line() {
    let sandbox = Sandbox::default();
    let mut model = mlp();
    graph(&mut model).node[1].op_type = Some("Quux".into());
    sandbox.model("refused.onnx", &model);
    let mut model = mlp();
    graph(&mut model).node = vec![node("A", "Relu", &["x"], &["y"])];
    graph(&mut model).initializer.clear();
    graph(&mut model).output = vec![info("y", &[0, 4])];
    sandbox.model("plain.onnx", &model);
    for (file, strict, reason) in [("refused.onnx", 1, "operator Quux has no rule"), ("plain.onnx", 0, "no attention and no MLP")]
    {
        assert_eq!(sandbox.run(&["inspect", file, "--strict", "-q"]).code, strict, "{file}");
        for ask in [["--keep", "mlp=0.5"], ["--budget", "params=0.5"]] {
            let args = [&["plan", file, "--by", "random", "-o", "p.json"][..], &ask].concat();
            let ran = sandbox.run(&args);
            assert_eq!((ran.code, ran.stdout.as_str(), ran.stderr.lines().count()), (2, "", 1), "{ran:?}");
            let line = format!("error: {file}: no prunable group found: {reason}; see vitrim inspect\n");
            assert_eq!(ran.stderr, line);
            let told = sandbox.run(&[&args[..], &["--json"]].concat());
            assert_eq!((told.code, told.json()["ok"].as_bool()), (2, Some(false)), "{told:?}");
        }
        assert!(!sandbox.at("p.json").exists());
    }
}

#[test]
fn plan_and_slice_have_the_names_of_the_contract_and_promises_are_kept() {
    let sandbox = Sandbox::default();
    let model = digits("vit-digits.onnx");
    let keep = "mlp=0.5,qk=0.5,vo=0.75";
    let told = ok(&sandbox.run(&["plan", &model, "--by", "random", "--seed", "7", "--keep", keep, "-o", "p.json", "--json"]));
    let plan: Value = serde_json::from_slice(&std::fs::read(sandbox.at("p.json")).unwrap()).unwrap();
    assert_eq!(plan, told);
    let names = ["basis", "budget", "edited", "groups", "layout", "model_sha256", "schema_version", "seed", "weights"];
    assert_eq!(keys(&plan), names);
    assert_eq!(keys(&plan["budget"]), ["asked", "promised"]);
    assert_eq!(keys(&plan["budget"]["promised"]), ["bytes", "macs", "params"]);
    assert_eq!((plan["seed"].as_u64(), plan["budget"]["asked"].as_str()), (Some(7), Some(keep)));
    let mlp = &plan["groups"]["mlp.0"];
    assert_eq!((mlp["of"].as_u64(), mlp["kept"].as_array().map(Vec::len)), (Some(384), Some(192)));
    let cut = ok(&sandbox.run(&["slice", &model, "--plan", "p.json", "-o", "out.onnx", "--json"]));
    let names = [
        "basis",
        "budget",
        "bytes",
        "cloned",
        "cuts",
        "exact",
        "images",
        "macs",
        "nodes",
        "not_repaired",
        "not_rotated",
        "params",
    ];
    assert_eq!(keys(&cut), [&names[..], &["repairs", "rotated", "schema_version"]].concat());
    assert_eq!(keys(&cut["budget"]), ["asked", "got", "promised"]);
    assert_eq!((cut["budget"]["asked"].as_str(), &cut["budget"]["got"]), (Some(keep), &plan["budget"]["promised"]));
    assert_eq!(&cut["budget"]["promised"], &plan["budget"]["promised"]);
    assert_eq!(
        (keys(&cut["cuts"][0]), keys(&cut["nodes"])),
        (vec!["axis", "initializer", "of", "removed"], vec!["added", "removed"])
    );
    assert_eq!((&cut["params"], &cut["macs"]), (&plan["budget"]["promised"]["params"], &plan["budget"]["promised"]["macs"]));
    assert_eq!(cut["bytes"]["after"].as_u64(), Some(std::fs::metadata(sandbox.at("out.onnx")).unwrap().len()));
    // C3: counted afresh on the file that was written.
    let again = ok(&sandbox.run(&["inspect", "out.onnx", "--json"]));
    assert_eq!((&again["model"]["params"], &again["model"]["macs"]), (&cut["params"]["after"], &cut["macs"]["after"]));
    assert_eq!(sandbox.files(), ["out.onnx", "out.plan.json", "p.json"]);
    // Same inputs, same bytes.
    assert_eq!(sandbox.run(&["slice", &model, "--plan", "out.plan.json", "-o", "again.onnx"]).code, 0);
    assert_eq!(std::fs::read(sandbox.at("out.onnx")).unwrap(), std::fs::read(sandbox.at("again.onnx")).unwrap());
}

#[test]
fn a_budget_is_met_closely_also_with_tokens() {
    let (sandbox, model) = (Sandbox::default(), digits("vit-digits.onnx"));
    for kinds in ["mlp,qk,vo", "token", "mlp,qk,vo,token"] {
        let args =
            ["plan", &model, "--by", "random", "--kinds", kinds, "--budget", "macs=0.5", "-o", "p.json", "--force", "--json"];
        let macs = ok(&sandbox.run(&args))["budget"]["promised"]["macs"].clone();
        let share = macs["after"].as_f64().unwrap() / macs["before"].as_f64().unwrap();
        assert!((0.49..=0.5).contains(&share), "{kinds}: {share}");
    }
}

#[test]
fn bytes_are_a_budget_and_what_is_promised_is_got() {
    let (sandbox, model) = (Sandbox::default(), digits("vit-digits.onnx"));
    let plan = ["plan", &model, "--by", "random", "-o", "p.json", "--force", "--json"];
    for (budget, round) in [("bytes=0.6", "1"), ("bytes=0.7,macs=0.5", "8")] {
        let told = ok(&sandbox.run(&[&plan[..], &["--budget", budget, "--round", round, "--min-width", "mlp=16"]].concat()));
        let promised = &told["budget"]["promised"];
        let share = |m: &str| promised[m]["after"].as_f64().unwrap() / promised[m]["before"].as_f64().unwrap();
        let fullest =
            if budget.contains("macs") { (share("bytes") / 0.7).max(share("macs") / 0.5) } else { share("bytes") / 0.6 };
        assert!((0.99..=1.0).contains(&fullest), "{budget}: {promised}");
        let cut = ok(&sandbox.run(&["slice", &model, "--plan", "p.json", "-o", "b.onnx", "--force", "--json"]));
        assert_eq!((&cut["budget"]["got"], cut["budget"]["asked"].as_str()), (promised, Some(budget)));
    }
    // Widths in large steps, and the plan says what that means.
    let coarse = ["--budget", "macs=0.97", "--kinds", "mlp", "--round", "192"];
    let others = ["mlp.1", "mlp.2", "mlp.3", "mlp.4", "mlp.5"].map(|id| ["--protect", id]).concat();
    let ran = sandbox.run(&[&plan[..7], &coarse, &others].concat());
    let told: Value = serde_json::from_slice(&std::fs::read(sandbox.at("p.json")).unwrap()).unwrap();
    let note = "MACs are 94.90 % of the original: widths allow nothing closer to 97.00 %";
    assert!(told["budget"]["note"] == note && ran.stderr.contains(note), "{ran:?} {told}");
    let one = ok(&sandbox.run(&[&plan[..], &["--keep", "mlp=0.5,mlp.2=0.25"]].concat()));
    let kept = |id: &str| one["groups"][id]["kept"].as_array().map(Vec::len);
    assert_eq!((kept("mlp.1"), kept("mlp.2")), (Some(192), Some(96)));
    let ran = sandbox.run(&[&plan[..], &["--keep", "mlp.77=0.5"]].concat());
    assert!(ran.code == 2 && ran.stderr.contains("the model has no group 'mlp.77'"), "{ran:?}");
}

#[test]
fn scores_from_a_file_give_the_plan_that_they_were_made_for() {
    let sandbox = Sandbox::default();
    let model = digits("vit-digits.onnx");
    let told = ok(&sandbox.run(&["score", &model, "--by", "random", "--seed", "3", "-o", "s.safetensors", "--json"]));
    assert_eq!((told["by"].as_str(), told["groups"]["mlp.5"].as_u64()), (Some("random"), Some(384)));
    let plan = |source: &[&str], out: &str| {
        let args = [&["plan", &model, "--budget", "macs=60%", "--seed", "3", "-o", out], source].concat();
        assert_eq!(sandbox.run(&args).code, 0);
        std::fs::read(sandbox.at(out)).unwrap()
    };
    assert_eq!(plan(&["--scores", "s.safetensors"], "a.json"), plan(&["--by", "random"], "b.json"));
    sandbox.model("other.onnx", &mlp());
    let ran = sandbox.run(&["plan", "other.onnx", "--scores", "s.safetensors", "--keep", "mlp=0.5", "-o", "c.json"]);
    assert!(ran.code == 2 && ran.stderr.contains("belongs to model sha256 63793635.., not "), "{ran:?}");
}

#[test]
fn augment_has_the_names_of_the_contract() {
    let sandbox = Sandbox::default();
    let model = digits("vit-digits.onnx");
    let told = ok(&sandbox.run(&["augment", &model, "-o", "t.onnx", "--loss", "mse", "--json"]));
    assert_eq!(keys(&told), ["gates", "inputs", "outputs", "schema_version"]);
    let inputs = told["inputs"].as_array().unwrap();
    let input = |name: &str| inputs.iter().find(|i| i["name"] == name).unwrap_or_else(|| panic!("no {name}"));
    assert!(inputs.iter().all(|i| keys(i) == ["dtype", "name", "role", "shape"]));
    let image = input("input");
    assert_eq!((image["role"].as_str(), image["shape"].clone()), (Some("input"), serde_json::json!(["batch", 1, 28, 28])));
    let gate = input("gate.mlp.0");
    let expected = (Some("gate"), Some("float32"), serde_json::json!([384]));
    assert_eq!((gate["role"].as_str(), gate["dtype"].as_str(), gate["shape"].clone()), expected);
    assert_eq!(input("target.logits")["role"], "target");
    assert_eq!(input("l1.mlp")["role"], "scalar");
    let outputs: Vec<&str> = told["outputs"].as_array().unwrap().iter().filter_map(|o| o["name"].as_str()).collect();
    for name in ["logits", "loss", "loss.task", "loss.l1", "grad.gate.mlp.0", "grad.gate.qk.5"] {
        assert!(outputs.contains(&name), "{name} is missing in {outputs:?}");
    }
    let gates = told["gates"].as_array().unwrap();
    assert_eq!(gates.len(), 18);
    assert!(gates.iter().any(|g| g["group"] == "vo.2" && g["units"] == 96));
    // With labels, tied gates and an optimizer.
    let args = ["augment", &model, "-o", "u.onnx", "--tie", "qkv", "--train", "all", "--optimizer", "adamw", "--json"];
    let told = ok(&sandbox.run(&args));
    let roles: std::collections::BTreeSet<&str> =
        told["inputs"].as_array().unwrap().iter().filter_map(|i| i["role"].as_str()).collect();
    assert_eq!(roles.into_iter().collect::<Vec<_>>(), ["gate", "input", "labels", "moment", "param", "scalar"]);
    let inputs = told["inputs"].as_array().unwrap().iter().filter(|i| i["role"] == "gate").count();
    assert_eq!((inputs, told["gates"].as_array().map(Vec::len)), (12, Some(18)));
}

#[test]
fn quiet_is_quiet() {
    let sandbox = Sandbox::default();
    let ran = sandbox.run(&["plan", &digits("vit-digits.onnx"), "--by", "magnitude", "--keep", "mlp=0.5", "-o", "p.json", "-q"]);
    assert_eq!((ran.code, ran.stdout.as_str(), ran.stderr.as_str()), (0, "", ""));
    let ran = sandbox.run(&["inspect", "none.onnx", "-q"]);
    assert_eq!((ran.code, ran.stderr.lines().count()), (2, 1));
}

// ---- with ONNX Runtime

/// The variables under which ONNX Runtime is found; `None` where a test has to be left out.
fn engine() -> Option<[(&'static str, String); 1]> {
    let found = ort().map(|path| [("VITRIM_ORT_LIB", path)]);
    if found.is_none() {
        println!("no ONNX Runtime named by VITRIM_TEST_ORT: not tested");
    }
    found
}

#[test]
fn a_right_result_verifies_and_a_disturbed_one_does_not() {
    let Some([(name, path)]) = engine() else { return };
    let (sandbox, model, vars) = (Sandbox::default(), digits("vit-digits.onnx"), [(name, path.as_str())]);
    let keep = ["--by", "random", "--keep", "mlp=0.5,qk=0.5,vo=0.75,token=0.7"];
    assert_eq!(sandbox.run(&[&["plan", &model, "-o", "p.json"][..], &keep].concat()).code, 0);
    assert_eq!(sandbox.run(&["slice", &model, "--plan", "p.json", "-o", "out.onnx"]).code, 0);
    let told = ok(&sandbox.run_with(&["verify", "out.onnx", "--against", &model, "--json"], &vars));
    assert_eq!(keys(&told), ["checks", "edits", "pass", "schema_version", "skipped"]);
    assert_eq!((told["pass"].as_bool(), told["edits"].is_null()), (Some(true), true));
    let names = ["argmax_agree", "batch", "input", "max_abs", "noise", "output", "pass", "runtime", "tolerance", "version"];
    assert_eq!(keys(&told["checks"][0]), names);
    let data = digits("test.npz");
    let args = ["verify", "out.onnx", "--against", &model, "--data", &data, "--max-drop", "0.1", "--batch", "500", "--json"];
    let ran = sandbox.run_with(&args, &vars);
    assert_eq!((ran.code, ran.json()["accuracy"]["n"].as_u64()), (1, Some(2000)), "{}", ran.stderr);
    // A byte of a weight changes.
    let mut bytes = std::fs::read(sandbox.at("out.onnx")).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x40;
    sandbox.write("wrong.onnx", &bytes);
    let ran = sandbox.run_with(&["verify", "wrong.onnx", "--against", &model, "--plan", "p.json", "--json"], &vars);
    assert_eq!((ran.code, ran.json()["pass"].as_bool()), (1, Some(false)));
}

#[test]
fn eval_counts_the_digits_that_its_readme_names() {
    let Some([(name, path)]) = engine() else { return };
    let args = ["eval", &digits("vit-digits.onnx"), "--data", &digits("test.npz"), "--batch", "200", "--json"];
    let told = ok(&Sandbox::default().run_with(&args, &[(name, path.as_str())]));
    assert_eq!((told["n"].as_u64(), told["top1"]["correct"].as_u64()), (Some(2000), Some(1965)));
}

#[test]
fn bench_measures_two_models_in_turn() {
    let Some([(name, path)]) = engine() else { return };
    let model = digits("vit-digits.onnx");
    let args = ["bench", &model, &model, "--runtimes", "ort", "--iterations", "6", "--warmup", "1", "--threads", "1", "--json"];
    let told = ok(&Sandbox::default().run_with(&args, &[(name, path.as_str())]));
    let m = &told["measurements"][0];
    assert_eq!(
        (m["runtime"].as_str(), m["iterations"].as_u64(), m["models"].as_array().map(Vec::len)),
        (Some("ort"), Some(6), Some(2))
    );
    assert!(m["ratio"]["p50"].as_f64().is_some_and(|r| r > 0.0), "{m}");
}

/// Archives with the first `n` digits: quick to train on.
fn few(sandbox: &Sandbox, name: &str, n: usize) {
    let file = std::fs::File::open(digits("train.npz")).unwrap();
    let mut archive = zip::ZipArchive::new(file).unwrap();
    let mut cut = |key: &str, item: usize, dims: &[usize]| {
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut archive.by_name(&format!("{key}.npy")).unwrap(), &mut bytes).unwrap();
        let header = 10 + usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
        npy("|u1", dims, &bytes[header..header + n * item])
    };
    let entries = [("input", cut("input", 784, &[n, 1, 28, 28])), ("labels", cut("labels", 1, &[n]))];
    sandbox.write(name, &npz(&entries));
}

#[test]
fn a_search_leads_to_a_proven_model_step_by_step() {
    let Some([(name, path)]) = engine() else { return };
    let (sandbox, model, vars) = (Sandbox::default(), digits("vit-digits.onnx"), [(name, path.as_str())]);
    few(&sandbox, "d.npz", 256);
    let run = |args: &[&str]| {
        let ran = sandbox.run_with(args, &vars);
        assert_eq!(ran.code, 0, "{args:?}: {ran:?}");
        ran
    };
    let search = [
        "search",
        &model,
        "--data",
        "d.npz",
        "--run",
        "r",
        "--epochs",
        "2",
        "--batch",
        "32",
        "--threads",
        "1",
        "--device",
        "cpu",
    ];
    let told = run(&[&search[..], &["--json"]].concat()).json();
    assert_eq!(told["steps"], 14); // A tenth of the 256 images does not train.
    let ran = sandbox.run_with(&search, &vars);
    assert!(ran.code == 2 && ran.stderr.contains("already holds a run"), "{ran:?}");
    run(&["plan", &model, "--run", "r", "--budget", "macs=0.5", "-o", "p.json"]);
    run(&["slice", &model, "--plan", "p.json", "--weights", "r", "-o", "cut.onnx"]);
    let plan: Value = serde_json::from_slice(&std::fs::read(sandbox.at("cut.plan.json")).unwrap()).unwrap();
    assert_eq!(plan["weights"]["path"], "r");
    let why = |initializer: &str| {
        let edited = plan["edited"].as_array().unwrap();
        edited.iter().find(|e| e["initializer"] == initializer).map(|e| e["why"].as_str().unwrap().to_string())
    };
    // The bias of q, k and v has the gates of qk in its part of q.
    assert_eq!(why("blocks.2.attn.qkv.bias").as_deref(), Some("folded, trained"));
    assert_eq!(why("blocks.2.mlp.fc1.bias").as_deref(), Some("trained"));
    let told = run(&["verify", "cut.onnx", "--against", &model, "--json"]).json();
    assert_eq!((told["pass"].as_bool(), told["edits"].as_str()), (Some(true), Some("unproven")));
    let told = run(&["verify", "cut.onnx", "--against", &model, "--data", "d.npz", "--json"]).json();
    assert_eq!(told["edits"]["n"], 256);
    run(&["mask", &model, "--plan", "cut.plan.json", "--from", "cut.onnx", "-o", "twin.onnx"]);
    let told = run(&["eval", "cut.onnx", "--data", "d.npz", "--against", "twin.onnx", "--json"]).json();
    assert_eq!(told["top1_agreement"]["correct"], 256);
    let tune = [
        "finetune",
        "cut.onnx",
        "--teacher",
        &model,
        "--data",
        "d.npz",
        "-o",
        "tuned.onnx",
        "--batch",
        "32",
        "--epochs",
        "1",
        "--json",
    ];
    let told = run(&tune).json();
    assert!(told["after"]["kl"].as_f64() <= told["before"]["kl"].as_f64(), "{told}");
    run(&["verify", "tuned.onnx", "--against", &model, "--json"]);
}

/// Contract of a search's result: what is cut computes what the supernet computes with its gates, those of removed units 0.
#[test]
fn a_cut_model_is_the_supernet_with_the_gates_of_what_stays() {
    use vitrim::data::{Array, ArrayData};
    use vitrim::runtime::{LibraryChoice, RuntimeName, SessionOptions};
    use vitrim::supernet::{self, Options};
    let Some([(name, path)]) = engine() else { return };
    let (sandbox, model, vars) = (Sandbox::default(), digits("vit-digits.onnx"), [(name, path.as_str())]);
    few(&sandbox, "d.npz", 256);
    let steps = ["--epochs", "1", "--batch", "32", "--gate-lr", "0.05", "--device", "cpu"];
    assert_eq!(sandbox.run_with(&[&["search", &model, "--data", "d.npz", "--run", "r"][..], &steps].concat(), &vars).code, 0);
    assert_eq!(sandbox.run(&["plan", &model, "--run", "r", "--budget", "macs=0.6", "-o", "p.json"]).code, 0);
    assert_eq!(sandbox.run(&["slice", &model, "--plan", "p.json", "--weights", "r", "-o", "cut.onnx"]).code, 0);

    let run = vitrim::search::read(&sandbox.at("r")).unwrap();
    assert!(run.gates.values().flatten().any(|g| (*g - 1.0).abs() > 0.1), "the gates have moved");
    let loaded = vitrim::onnx::read(model.as_ref()).unwrap();
    let graph = run.apply_weights(&loaded.graph).unwrap();
    let (facts, anatomy) = vitrim::pipeline::analyse(&graph).unwrap();
    let (groups, _) = supernet::gates_of(&graph, &facts, &anatomy);
    let net = supernet::build(&graph, &facts, &groups, &[], &Options::default()).unwrap();
    let plan = vitrim::plan::Plan::read(&sandbox.at("p.json")).unwrap();
    let image: Vec<f32> = (0..784).map(|i| (i % 29) as f32 / 29.0).collect();
    let floats = |dims: Vec<usize>, values: Vec<f32>| Array { dims, data: ArrayData::F32(values) };
    let mut feeds = vec![("input".to_string(), floats(vec![1, 1, 28, 28], image))];
    let cut_feeds = feeds.clone();
    for input in &net.inputs {
        let count = |n: &vitrim::graph::DeclaredDim| match n {
            vitrim::graph::DeclaredDim::Size(n) => *n as usize,
            vitrim::graph::DeclaredDim::Symbol(_) => 1,
        };
        let dims: Vec<usize> = input.shape.iter().map(count).collect();
        let mut values = vec![1.0; dims.iter().product()];
        match input.name.strip_prefix("gate.") {
            Some(id) => {
                if let Some(gates) = run.gates.get(id) {
                    values.copy_from_slice(gates);
                }
                if let Some(kept) = plan.groups.get(id) {
                    (0..kept.of).filter(|u| !kept.kept.contains(u)).for_each(|u| values[u] = 0.0);
                }
            }
            None if input.name == "input" => continue,
            None if input.name == "labels" => {
                feeds.push((input.name.clone(), Array { dims, data: ArrayData::I64(vec![0]) }));
                continue;
            }
            None => {}
        }
        feeds.push((input.name.clone(), floats(dims, values)));
    }
    let library = LibraryChoice { file: Some(path.into()), ..LibraryChoice::default() };
    let options = SessionOptions { library, ..SessionOptions::default() };
    let logits = |graph: &vitrim::graph::Graph, feeds: &[(String, Array)]| {
        let bytes = vitrim::onnx::to_bytes(graph).unwrap();
        let outputs = vitrim::runtime::open(RuntimeName::Ort, &bytes, &options).unwrap().run(feeds).unwrap();
        outputs.into_iter().find(|(n, _)| n == "logits").unwrap().1.as_f32()
    };
    let with_gates = logits(&net.graph, &feeds);
    let cut = logits(&vitrim::onnx::read(&sandbox.at("cut.onnx")).unwrap().graph, &cut_feeds);
    let size = cut.iter().fold(0f32, |m, x| m.max(x.abs()));
    let error = cut.iter().zip(&with_gates).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
    assert!(error <= 1e-5 * size.max(1.0), "{error} of {size}");
}

#[test]
fn slim_does_it_all_and_a_dry_run_does_nothing() {
    let Some([(name, path)]) = engine() else { return };
    let (sandbox, model, vars) = (Sandbox::default(), digits("vit-digits.onnx"), [(name, path.as_str())]);
    few(&sandbox, "d.npz", 400);
    let args = [
        "slim",
        &model,
        "--data",
        "d.npz",
        "-o",
        "out.onnx",
        "--budget",
        "macs=0.6",
        "--epochs",
        "1",
        "--finetune-epochs",
        "1",
        "--batch",
        "32",
        "--threads",
        "1",
        "--device",
        "cpu",
        "--runtimes",
        "ort",
        "--json",
    ];
    let ran = sandbox.run_with(&[&args[..], &["--dry-run"]].concat(), &vars);
    let told = ok(&ran);
    assert!(told["step_ms"].as_f64().is_some_and(|ms| ms > 0.0) && told["steps"] == 20, "{told}");
    assert_eq!(sandbox.files(), ["d.npz"]);
    let told = ok(&sandbox.run_with(&args, &vars));
    assert_eq!(told["pass"], true);
    let macs = |when: &str| told["macs"][when].as_f64().unwrap();
    assert!(macs("after") <= 0.6 * macs("before"), "{told}");
    assert_eq!(told["accuracy"]["n"], 40);
    assert_eq!(told["latency"]["measurements"][0]["models"].as_array().map(Vec::len), Some(2));
    assert_eq!(sandbox.files(), ["d.npz", "out.onnx", "out.plan.json", "out.run"]);
    let again = ok(&sandbox.run(&["inspect", "out.onnx", "--json"]));
    assert_eq!(again["model"]["macs"], told["macs"]["after"]);
    assert_eq!(sandbox.run_with(&["verify", "out.onnx", "--against", &model, "--runtimes", "ort"], &vars).code, 0);
    // A floor that cannot hold: nothing appears.
    let floor = [
        "slim",
        &model,
        "--eval-data",
        "d.npz",
        "-o",
        "no.onnx",
        "--keep",
        "mlp=0.01",
        "--min-accuracy",
        "99%",
        "--runtimes",
        "ort",
    ];
    let ran = sandbox.run_with(&floor, &vars);
    assert!(ran.code == 1 && ran.stderr.contains("error: no.onnx: not written"), "{ran:?}");
    assert!(!sandbox.at("no.onnx").exists());
    let ran = sandbox.run_with(&[&floor[..], &["--keep-rejected"]].concat(), &vars);
    assert!(ran.code == 1 && sandbox.at("no.rejected.onnx").exists() && !sandbox.at("no.onnx").exists(), "{ran:?}");
}

#[cfg(unix)]
#[test]
fn a_signal_ends_a_search_with_its_state_saved_and_it_goes_on() {
    let Some([(name, path)]) = engine() else { return };
    let (sandbox, model) = (Sandbox::default(), digits("vit-digits.onnx"));
    few(&sandbox, "d.npz", 512);
    let args = [
        "search",
        &model,
        "--data",
        "d.npz",
        "--run",
        "r",
        "--epochs",
        "1",
        "--batch",
        "32",
        "--threads",
        "1",
        "--device",
        "cpu",
    ];
    for (signal, code) in [("-INT", 130), ("-TERM", 143)] {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_vitrim"));
        let resume = (signal == "-TERM").then_some("--resume");
        let mut child = command
            .args(args)
            .args(resume)
            .current_dir(sandbox.dir.path())
            .env(name, &path)
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // The first line of progress comes with the first step.
        let mut stderr = std::io::BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        std::io::BufRead::read_line(&mut stderr, &mut line).unwrap();
        assert!(line.starts_with("search step "), "{line}");
        assert!(std::process::Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
        let mut rest = String::new();
        std::io::Read::read_to_string(&mut stderr, &mut rest).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(code), "{rest}");
        assert!(rest.contains("resume with --resume --run r"), "{rest}");
    }
    let told = ok(&sandbox.run_with(&[&args[..], &["--resume", "--json"]].concat(), &[(name, path.as_str())]));
    assert_eq!(told["steps"], 14);
}
