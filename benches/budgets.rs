//! One search, many budgets: accuracy and KL to the original, after the search alone and after equal fine-tuning, beside the same
//! budgets from magnitude and random scores, and a dense control with the same training.
//!
//! `cargo bench --bench budgets [-- --seeds 3 --epochs 3 --finetune-epochs 1 --out DIR]` prints the table of the README: mean and
//! standard deviation over seeds, on the held-out test digits. Every model is made by the command `vitrim`, as a user would.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a benchmark prints, and stops at what is wrong"
)]

use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

const MODEL: &str = "models/digits/vit-digits.onnx";
const TRAIN: &str = "models/digits/train.npz";
const TEST: &str = "models/digits/test.npz";
const BUDGETS: [f64; 5] = [0.8, 0.7, 0.6, 0.5, 0.4];
const SOURCES: [&str; 3] = ["search", "magnitude", "random"];

/// Top-1 in percent and KL(original || model) on the test digits.
type Quality = (f64, f64);
/// (source, budget, stage) -> one value per seed.
type Table = BTreeMap<(String, String, &'static str), Vec<Quality>>;

struct Settings {
    seeds: u64,
    epochs: String,
    finetune_epochs: String,
    out: PathBuf,
}

fn main() {
    let settings = settings();
    std::fs::create_dir_all(&settings.out).unwrap();
    let mut table = Table::new();
    for seed in 0..settings.seeds {
        one_seed(&settings, seed, &mut table);
    }
    print_table(&settings, &table);
}

fn settings() -> Settings {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let value = |flag: &str, default: &str| {
        args.iter().position(|a| a == flag).and_then(|i| args.get(i + 1)).map_or(default, String::as_str).to_string()
    };
    Settings {
        seeds: value("--seeds", "3").parse().unwrap(),
        epochs: value("--epochs", "3"),
        finetune_epochs: value("--finetune-epochs", "1"),
        out: PathBuf::from(value("--out", "target/budgets")),
    }
}

fn one_seed(s: &Settings, seed: u64, table: &mut Table) {
    let run = s.out.join(format!("run-{seed}"));
    let text = seed.to_string();
    eprintln!("seed {seed}: search");
    vitrim(
        &[
            &[
                "search",
                MODEL,
                "--data",
                TRAIN,
                "--gates",
                "mlp,qk,vo,token",
                "--epochs",
                &s.epochs,
                "--seed",
                &text,
                "-q",
                "--run",
            ],
            &[path(&run)][..],
        ]
        .concat(),
    );
    let mut keep = |source: &str, budget: &str, stage, quality| {
        table.entry((source.to_string(), budget.to_string(), stage)).or_default().push(quality);
    };
    keep("dense", "1.0", "cut", eval(Path::new(MODEL)));
    let dense = s.out.join(format!("dense-{seed}.onnx"));
    keep("dense", "1.0", "tuned", finetune(s, Path::new(MODEL), &dense, &text));
    for source in SOURCES {
        for budget in BUDGETS {
            let name = format!("{source}-{budget}-{seed}");
            eprintln!("seed {seed}: {source} at {budget}");
            let (plan, cut) = (s.out.join(format!("{name}.plan.json")), s.out.join(format!("{name}.onnx")));
            let macs = format!("macs={budget}");
            let from: Vec<&str> = if source == "search" {
                vec!["--run", path(&run), "--kinds", "mlp,qk,vo,token"]
            } else {
                vec!["--by", source, "--seed", &text]
            };
            vitrim(&[&["plan", MODEL, "--budget", &macs, "--force", "-o", path(&plan)], &from[..]].concat());
            let weights: Vec<&str> = if source == "search" { vec!["--weights", path(&run)] } else { vec![] };
            vitrim(&[&["slice", MODEL, "--plan", path(&plan), "--force", "-o", path(&cut)], &weights[..]].concat());
            keep(source, &budget.to_string(), "cut", eval(&cut));
            let tuned = s.out.join(format!("{name}.tuned.onnx"));
            keep(source, &budget.to_string(), "tuned", finetune(s, &cut, &tuned, &text));
        }
    }
}

fn finetune(s: &Settings, model: &Path, out: &Path, seed: &str) -> Quality {
    vitrim(&[
        "finetune",
        path(model),
        "--teacher",
        MODEL,
        "--data",
        TRAIN,
        "--epochs",
        &s.finetune_epochs,
        "--seed",
        seed,
        "-q",
        "--force",
        "-o",
        path(out),
    ]);
    eval(out)
}

fn eval(model: &Path) -> Quality {
    let text = vitrim(&["eval", path(model), "--data", TEST, "--against", MODEL, "--json", "-q"]);
    let v: Value = serde_json::from_str(&text).unwrap();
    (100.0 * v["top1"]["share"].as_f64().unwrap(), v["kl"].as_f64().unwrap())
}

fn path(p: &Path) -> &str {
    p.to_str().unwrap()
}

/// Runs the command; its stdout.
fn vitrim(args: &[&str]) -> String {
    let out = Command::new(env!("CARGO_BIN_EXE_vitrim")).args(args).output().unwrap();
    assert!(out.status.success(), "vitrim {}: {}", args.join(" "), String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

fn mean_sd(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let n = values.clone().count() as f64;
    let mean = values.clone().sum::<f64>() / n;
    let variance = values.map(|v| (v - mean) * (v - mean)).sum::<f64>() / (n - 1.0).max(1.0);
    (mean, variance.sqrt())
}

fn print_table(s: &Settings, table: &Table) {
    println!("top-1 % / KL to the original, mean ± sd over {} seeds, n = 2000 test digits", s.seeds);
    println!("search {} epochs, fine-tuning {} epochs\n", s.epochs, s.finetune_epochs);
    println!("| scores | MACs | after the cut | after fine-tuning |");
    println!("|---|---|---|---|");
    let mut keys: Vec<(String, String)> = table.keys().map(|(a, b, _)| (a.clone(), b.clone())).collect();
    keys.dedup();
    keys.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(&b.0)));
    for (source, budget) in keys {
        let cell = |stage: &'static str| {
            table.get(&(source.clone(), budget.clone(), stage)).map_or(String::new(), |v| {
                let ((top, top_sd), (kl, kl_sd)) = (mean_sd(v.iter().map(|q| q.0)), mean_sd(v.iter().map(|q| q.1)));
                format!("{top:.2} ± {top_sd:.2} / {kl:.4} ± {kl_sd:.4}")
            })
        };
        println!("| {source} | {budget} | {} | {} |", cell("cut"), cell("tuned"));
    }
}
