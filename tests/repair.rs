//! Repair without training, from the command line: what stays makes up for what goes, and everything is proven and told.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "tests, with functions of their own")]

#[path = "command/mod.rs"]
mod command;

use command::*;
use serde_json::Value;

fn ok(ran: &Ran) -> Value {
    assert_eq!(ran.code, 0, "{ran:?}");
    ran.json()
}

struct Digits {
    sandbox: Sandbox,
    model: String,
    vars: [(&'static str, String); 1],
}

impl Digits {
    /// `None` where there is no ONNX Runtime.
    fn new(images: usize) -> Option<Self> {
        let [(name, path)] = engine()?;
        let sandbox = Sandbox::default();
        few(&sandbox, "d.npz", images);
        Some(Self { sandbox, model: digits("vit-digits.onnx"), vars: [(name, path)] })
    }

    fn run(&self, args: &[&str]) -> Ran {
        let vars = [(self.vars[0].0, self.vars[0].1.as_str())];
        self.sandbox.run_with(args, &vars)
    }

    fn slim(&self, out: &str, more: &[&str]) -> Value {
        let test = digits("test.npz");
        let args =
            ["slim", &self.model, "--data", "d.npz", "--eval-data", &test, "-o", out, "--images", "96", "--runtimes", "ort"];
        ok(&self.run(&[&args[..], &["--threads", "1", "--batch", "32", "--json"], more].concat()))
    }
}

#[test]
fn one_shot_keeps_what_the_model_says_and_another_budget_reads_what_was_measured() {
    let Some(d) = Digits::new(200) else { return };
    let told = d.slim("a.onnx", &["--budget", "macs=0.3", "--run", "r"]);
    let accuracy = &told["accuracy"];
    let top1 = |when: &str| accuracy[when]["top1"].as_f64().unwrap();
    assert!(told["pass"] == true && top1("after") > top1("before") - 0.01, "{accuracy}");
    assert!(accuracy["kl"].as_f64().unwrap() < 0.02, "{accuracy}");
    assert_eq!(told["basis"], "rotated");
    let repairs = told["repairs"].as_array().unwrap();
    assert_eq!(repairs.len(), 12, "one MLP and one projection of each layer");
    for r in repairs {
        let error = |name: &str| r[name].as_f64().unwrap();
        assert!(error("error") <= error("error_plain"), "{r}");
    }
    // The same job again: nothing is measured anew, and the bytes are the same.
    let stamp = |file: &str| std::fs::metadata(d.sandbox.at("r").join(file)).unwrap().modified().unwrap();
    let before = [stamp("stats.safetensors"), stamp("curves-rotated.json")];
    d.slim("b.onnx", &["--budget", "macs=0.3", "--run", "r"]);
    assert_eq!([stamp("stats.safetensors"), stamp("curves-rotated.json")], before);
    let bytes = |name: &str| std::fs::read(d.sandbox.at(name)).unwrap();
    assert_eq!(bytes("a.onnx"), bytes("b.onnx"));
    // Without repair much more is lost.
    let plain = d.slim("c.onnx", &["--budget", "macs=0.3", "--run", "r", "--compensate", "off"]);
    let kl = |v: &Value| v["accuracy"]["kl"].as_f64().unwrap();
    assert!(kl(&plain) > 5.0 * kl(&told), "{} against {}", kl(&plain), kl(&told));
    // A plan made by what the folder holds, applied and proven step by step.
    ok(&d.run(&["plan", &d.model, "--run", "r", "--budget", "macs=0.5", "-o", "p.json", "--json"]));
    let sliced = ["slice", &d.model, "--plan", "p.json", "--run", "r", "--compensate", "-o", "s.onnx", "--json"];
    let sliced = ok(&d.run(&sliced));
    assert!(sliced["basis"] == "rotated" && sliced["rotated"].as_array().is_some_and(|r| r.len() == 12), "{sliced}");
    let verdict = ok(&d.run(&["verify", "s.onnx", "--against", &d.model, "--runtimes", "ort", "--json"]));
    assert!(verdict["pass"] == true && verdict["edits"] == "unproven", "{verdict}");
    assert_eq!(d.run(&["mask", &d.model, "--plan", "s.plan.json", "--from", "s.onnx", "-o", "twin.onnx"]).code, 0);
}

#[test]
fn in_the_basis_of_the_data_all_dims_say_what_the_model_says() {
    let Some(d) = Digits::new(64) else { return };
    ok(&d.run(&["plan", &d.model, "--by", "magnitude", "--keep", "qk=1,vo=1,mlp=0.99", "-o", "p.json", "--json"]));
    let mut plan: Value = serde_json::from_slice(&std::fs::read(d.sandbox.at("p.json")).unwrap()).unwrap();
    plan["groups"] = Value::Object(Default::default());
    std::fs::write(d.sandbox.at("whole.json"), plan.to_string()).unwrap();
    let args = ["slice", &d.model, "--plan", "whole.json", "--basis", "rotated", "--data", "d.npz", "-o", "w.onnx", "--json"];
    let sliced = ok(&d.run(&args));
    assert_eq!(sliced["rotated"].as_array().map(Vec::len), Some(12), "{sliced}");
    let verify = ["verify", "w.onnx", "--against", &d.model, "--data", "d.npz", "--runtimes", "ort", "--json"];
    let verdict = ok(&d.run(&verify));
    assert!(verdict["accuracy"]["kl"].as_f64().unwrap() < 1e-9 && verdict["accuracy"]["top1_agreement"] == 1.0, "{verdict}");
}

#[test]
fn what_cannot_be_repaired_is_one_line() {
    let Some(d) = Digits::new(64) else { return };
    ok(&d.run(&["plan", &d.model, "--by", "magnitude", "--keep", "mlp=0.5", "-o", "p.json", "--json"]));
    let slice = ["slice", &d.model, "--plan", "p.json", "-o", "o.onnx"];
    let cases: [(&[&str], &str); 4] = [
        (&["--compensate"], "--compensate: needs images"),
        (&["--basis", "rotated"], "the rotated basis: needs images"),
        (&["--data", "d.npz"], "say what for"),
        (&["--compensate", "--run", "nothing"], "nothing"),
    ];
    for (more, expected) in cases {
        let ran = d.run(&[&slice[..], more].concat());
        assert!(ran.code == 2 && ran.stderr.contains(expected) && ran.stderr.lines().count() == 1, "{more:?}: {ran:?}");
        assert!(!d.sandbox.at("o.onnx").exists(), "{more:?}");
    }
}
