//! What a cut costs that is repaired without training, beside cuts without repair, beside selection without rotation, and beside training.
//!
//! `cargo bench --no-default-features --features ort --bench repair [-- --seeds 3 --parts budgets,masks,ablation,again,trained,tuned]`;
//! further `--budgets 0.8,0.5`, `--search-epochs 3 --finetune-epochs 1`, `--images 1024`, `--out DIR`. Every model is made by the
//! command `vitrim`, as a user would, from models/digits, and judged on its 2,000 test digits. A seed draws the unlabelled images that are
//! looked at; one run directory per seed serves all rows.
//!
//! budgets: rows without training over shares of the MACs. masks: what a search alone leaves, cut without repair, and dense control.
//! ablation: uniform widths of one kind. again: how long a second budget takes. trained: `search+finetune`. tuned: one-shot, then as
//! many epochs as `search+finetune` has behind its cut. Every run is kept in DIR/runs.json as soon as it is there, and found again by
//! the next call; DIR/paper.json, where benches/python/paper.py left it, joins the tables.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a benchmark prints, and stops at what is wrong"
)]

mod report;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

const MODEL: &str = "models/digits/vit-digits.onnx";
const TRAIN: &str = "models/digits/train.npz";
const TEST: &str = "models/digits/test.npz";
/// The kinds that all rows cut, so that rows differ in nothing else.
const KINDS: &str = "mlp,qk,vo";
/// Widths of the ablation.
const WIDTHS: [&str; 3] = ["0.75", "0.5", "0.25"];

/// One judged model.
#[derive(Clone, Serialize, Deserialize)]
struct Run {
    part: String,
    /// How it was made.
    row: String,
    /// A share of the MACs, or a kind and its width.
    at: String,
    /// `None` where no seed has a part in it.
    seed: Option<u64>,
    /// Unit: percent.
    top1: f64,
    /// KL divergence from the original. Unit: nats per image.
    kl: f64,
    /// Share of the MACs that is left.
    macs: Option<f64>,
    /// Of all commands that made and judged it.
    seconds: f64,
    /// Of the machine over the last minute, at the end.
    load: f64,
}

/// What a command says of the model that it made.
struct Judged {
    top1: f64,
    kl: f64,
    macs: Option<f64>,
}

struct Bench {
    seeds: u64,
    parts: String,
    budgets: Vec<String>,
    search_epochs: String,
    finetune_epochs: String,
    images: String,
    out: PathBuf,
    runs: Vec<Run>,
    /// Of the commands of the run in work.
    command_seconds: Cell<f64>,
}

fn main() {
    let mut bench = Bench::new();
    std::fs::create_dir_all(&bench.out).unwrap();
    bench.keep("dense", "dense", "1.0", None, |b| b.eval(Path::new(MODEL)));
    for part in bench.parts.clone().split(',') {
        for seed in 0..bench.seeds {
            eprintln!("{part}, seed {seed}");
            match part {
                "budgets" => bench.budgets(seed),
                "masks" => bench.masks(seed),
                "ablation" => bench.ablation(seed),
                "again" => bench.again(seed),
                "trained" => bench.trained(seed),
                "tuned" => bench.tuned(seed),
                "none" => {}
                _ => panic!("there is no part {part}"),
            }
        }
    }
    report::print(&bench);
}

impl Bench {
    fn new() -> Self {
        let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
        let value = |flag: &str, default: &str| {
            args.iter().position(|a| a == flag).and_then(|i| args.get(i + 1)).map_or(default, String::as_str).to_string()
        };
        let out = PathBuf::from(value("--out", "target/repair"));
        let runs = std::fs::read(out.join("runs.json")).map_or(Vec::new(), |b| serde_json::from_slice(&b).unwrap());
        Self {
            seeds: value("--seeds", "3").parse().unwrap(),
            parts: value("--parts", "budgets,masks,ablation,again,trained,tuned"),
            budgets: value("--budgets", "0.8,0.6,0.5,0.4,0.3,0.2,0.15,0.1").split(',').map(str::to_string).collect(),
            search_epochs: value("--search-epochs", "3"),
            finetune_epochs: value("--finetune-epochs", "1"),
            images: value("--images", "1024"),
            out,
            runs,
            command_seconds: Cell::new(0.0),
        }
    }

    /// Makes and judges a model, unless an earlier call did.
    fn keep(&mut self, part: &str, row: &str, at: &str, seed: Option<u64>, make: impl FnOnce(&Self) -> Judged) {
        if self.runs.iter().any(|r| (r.part.as_str(), r.row.as_str(), r.at.as_str(), r.seed) == (part, row, at, seed)) {
            return;
        }
        self.command_seconds.set(0.0);
        let judged = make(self);
        let (seconds, load) = (self.command_seconds.get(), load());
        eprintln!("  {row} at {at}: {:.2} %, KL {:.3e}, {seconds:.1} s", judged.top1, judged.kl);
        let text = |s: &str| s.to_string();
        let (part, row, at) = (text(part), text(row), text(at));
        self.runs.push(Run { part, row, at, seed, top1: judged.top1, kl: judged.kl, macs: judged.macs, seconds, load });
        std::fs::write(self.out.join("runs.json"), serde_json::to_vec_pretty(&self.runs).unwrap()).unwrap();
    }

    /// Rows that neither train nor read a label; those first that say most.
    fn budgets(&mut self, seed: u64) {
        let (budgets, some) = (self.budgets.clone(), Some(seed));
        for at in &budgets {
            let macs = format!("macs={at}");
            self.keep("budgets", report::ONE_SHOT, at, some, |b| b.slim(seed, &["--budget", &macs]));
        }
        for at in &budgets {
            let keep = self.uniform(at);
            self.keep("budgets", report::UNIFORM, at, some, |b| b.slim(seed, &["--keep", &keep]));
            let original = ["--keep", &keep, "--basis", "original"];
            self.keep("budgets", "selection + refit, uniform", at, some, |b| b.slim(seed, &original));
        }
        let scores = self.out.join(format!("fisher-{seed}.safetensors"));
        for at in &budgets {
            let macs = format!("macs={at}");
            let fisher = ["--scores", path(&scores), "--budget", &macs];
            let magnitude = ["--by", "magnitude", "--budget", &macs];
            self.keep("budgets", report::MAGNITUDE, at, None, |b| b.plan_and_slice(&magnitude, &[]));
            self.keep("budgets", "fisher, no repair", at, some, |b| {
                b.score("fisher", seed, &scores);
                b.plan_and_slice(&fisher, &[])
            });
        }
        for at in &budgets {
            let macs = format!("macs={at}");
            let original = ["--budget", &macs, "--basis", "original"];
            self.keep("budgets", "selection + refit, measured", at, some, |b| b.slim(seed, &original));
        }
    }

    /// What the gates of a search say, with the weights that it trained; and the original trained for as long.
    fn masks(&mut self, seed: u64) {
        let run = self.out.join(format!("search-{seed}"));
        for budget in self.budgets.clone() {
            let macs = format!("macs={budget}");
            let from = ["--run", path(&run), "--budget", &macs, "--kinds", KINDS];
            self.keep("masks", "ViT-Slim masks, no repair", &budget, Some(seed), |b| {
                b.search(seed);
                b.plan_and_slice(&from, &["--weights", path(&run)])
            });
        }
        let epochs: u32 = self.search_epochs.parse::<u32>().unwrap() + self.finetune_epochs.parse::<u32>().unwrap();
        self.keep("masks", "dense control", "1.0", Some(seed), |b| {
            b.finetune(Path::new(MODEL), seed, &["--epochs", &epochs.to_string(), "--label-share", "1"])
        });
    }

    fn ablation(&mut self, seed: u64) {
        let scores = self.out.join(format!("activation-{seed}.safetensors"));
        for kind in ["qk", "vo", "mlp"] {
            for width in WIDTHS {
                let keep = format!("{kind}={width}");
                let (at, some) = (format!("{kind} {width}"), Some(seed));
                self.keep("ablation", report::ROTATION, &at, some, |b| b.slim(seed, &["--keep", &keep]));
                let original = ["--keep", &keep, "--basis", "original"];
                self.keep("ablation", report::SELECTION, &at, some, |b| b.slim(seed, &original));
                let energy = ["--scores", path(&scores), "--keep", &keep];
                self.keep("ablation", "activation, no repair", &at, some, |b| {
                    b.score("activation", seed, &scores);
                    b.plan_and_slice(&energy, &[])
                });
                if self.can_repair_slices() && kind != "qk" {
                    self.keep("ablation", report::ENERGY_REFIT, &at, some, |b| {
                        b.score("activation", seed, &scores);
                        let seed = seed.to_string();
                        let repair =
                            ["--compensate", "--basis", "original", "--data", TRAIN, "--images", &b.images, "--seed", &seed];
                        b.plan_and_slice(&energy, &repair)
                    });
                }
                let magnitude = ["--by", "magnitude", "--keep", &keep];
                self.keep("ablation", report::MAGNITUDE, &at, None, |b| b.plan_and_slice(&magnitude, &[]));
            }
        }
    }

    /// A budget that no other part asks for, on what was measured already: its time counts.
    fn again(&mut self, seed: u64) {
        self.keep("again", report::ONE_SHOT, "0.35", Some(seed), |b| {
            b.slim(seed, &["--budget", "macs=0.3"]);
            b.command_seconds.set(0.0);
            b.slim(seed, &["--budget", "macs=0.35"])
        });
    }

    fn trained(&mut self, seed: u64) {
        let run = self.out.join(format!("search-{seed}"));
        for budget in self.budgets.clone() {
            let macs = format!("macs={budget}");
            self.keep("trained", report::TRAINED, &budget, Some(seed), |b| {
                b.search(seed);
                b.slim_with(seed, &run, &[&["--budget", &macs][..], &b.recipe()[..], &["--resume"]].concat())
            });
        }
    }

    fn tuned(&mut self, seed: u64) {
        for budget in ["0.6", "0.5"] {
            let macs = format!("macs={budget}");
            self.keep("tuned", report::TUNED, budget, Some(seed), |b| {
                b.slim(seed, &["--budget", &macs]);
                let epochs = b.finetune_epochs.clone();
                b.finetune(&b.out.join("slim.onnx"), seed, &["--epochs", &epochs])
            });
        }
    }

    // ---- commands -------------------------------------------------------------------------------

    fn recipe(&self) -> [&str; 8] {
        let (search, tuning) = (self.search_epochs.as_str(), self.finetune_epochs.as_str());
        ["--recipe", "search+finetune", "--kinds", KINDS, "--epochs", search, "--finetune-epochs", tuning]
    }

    /// The one search of a seed: that of a `search+finetune`, which keeps images back on which the fine-tuning judges.
    fn search(&self, seed: u64) {
        let run = self.out.join(format!("search-{seed}"));
        if !run.join("config.toml").exists() {
            self.slim_with(seed, &run, &[&["--budget", "macs=0.8"][..], &self.recipe()[..]].concat());
        }
    }

    /// `vitrim slim` with what the seed's run directory holds.
    fn slim(&self, seed: u64, flags: &[&str]) -> Judged {
        self.slim_with(seed, &self.out.join(format!("run-{seed}")), flags)
    }

    fn slim_with(&self, seed: u64, run: &Path, flags: &[&str]) -> Judged {
        let (seed, out) = (seed.to_string(), self.out.join("slim.onnx"));
        let words =
            ["slim", MODEL, "--data", TRAIN, "--eval-data", TEST, "--seed", &seed, "--images", &self.images, "--json", "-q"];
        let ends = ["--run", path(run), "--force", "-o", path(&out)];
        let said = self.json(&[&words[..], &ends[..], flags].concat());
        let after = &said["accuracy"];
        let macs = said["macs"]["after"].as_f64().unwrap() / said["macs"]["before"].as_f64().unwrap();
        Judged { top1: 100.0 * after["after"]["top1"].as_f64().unwrap(), kl: after["kl"].as_f64().unwrap(), macs: Some(macs) }
    }

    fn score(&self, by: &str, seed: u64, out: &Path) {
        if !out.exists() {
            let seed = seed.to_string();
            let words =
                ["score", MODEL, "--by", by, "--data", TRAIN, "--images", &self.images, "--seed", &seed, "-q", "-o", path(out)];
            self.vitrim(&words);
        }
    }

    fn plan_and_slice(&self, plan: &[&str], slice: &[&str]) -> Judged {
        let (file, out) = (self.out.join("cut.json"), self.out.join("cut.onnx"));
        self.vitrim(&[&["plan", MODEL, "--force", "-q", "-o", path(&file)][..], plan].concat());
        let words = ["slice", MODEL, "--plan", path(&file), "--force", "--json", "-q", "-o", path(&out)];
        let said = self.json(&[&words[..], slice].concat());
        let macs = said["macs"]["after"].as_f64().unwrap() / said["macs"]["before"].as_f64().unwrap();
        Judged { macs: Some(macs), ..self.eval(&out) }
    }

    fn finetune(&self, model: &Path, seed: u64, flags: &[&str]) -> Judged {
        let (seed, out) = (seed.to_string(), self.out.join("tuned.onnx"));
        let words =
            ["finetune", path(model), "--teacher", MODEL, "--data", TRAIN, "--seed", &seed, "-q", "--force", "-o", path(&out)];
        self.vitrim(&[&words[..], flags].concat());
        self.eval(&out)
    }

    fn eval(&self, model: &Path) -> Judged {
        let said = self.json(&["eval", path(model), "--data", TEST, "--against", MODEL, "--json", "-q"]);
        Judged { top1: 100.0 * said["top1"]["share"].as_f64().unwrap(), kl: said["kl"].as_f64().unwrap(), macs: None }
    }

    /// The same share of the units of every kind, as large as the share of the MACs allows.
    fn uniform(&self, budget: &str) -> String {
        let (most, file) = (budget.parse::<f64>().unwrap(), self.out.join("uniform.json"));
        let keep = |f: f64| KINDS.split(',').map(|kind| format!("{kind}={f:.5}")).collect::<Vec<_>>().join(",");
        let (mut low, mut high) = (0.01, 1.0);
        for _ in 0..12 {
            let middle = (low + high) / 2.0;
            let words =
                ["plan", MODEL, "--by", "magnitude", "--keep", &keep(middle), "--force", "--json", "-q", "-o", path(&file)];
            let macs = &self.json(&words)["budget"]["promised"]["macs"];
            let is_within = macs["after"].as_f64().unwrap() <= most * macs["before"].as_f64().unwrap();
            *(if is_within { &mut low } else { &mut high }) = middle;
        }
        keep(low)
    }

    /// Whether `slice` repairs a plan that scores made.
    fn can_repair_slices(&self) -> bool {
        self.vitrim(&["slice", "--help"]).contains("--compensate")
    }

    fn json(&self, words: &[&str]) -> Value {
        serde_json::from_str(&self.vitrim(words)).unwrap()
    }

    /// Runs the command; its stdout.
    fn vitrim(&self, words: &[&str]) -> String {
        let start = Instant::now();
        let out = Command::new(env!("CARGO_BIN_EXE_vitrim")).args(words).output().unwrap();
        self.command_seconds.set(self.command_seconds.get() + start.elapsed().as_secs_f64());
        assert!(out.status.success(), "vitrim {}: {}", words.join(" "), String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    }
}

fn path(p: &Path) -> &str {
    p.to_str().unwrap()
}

/// The machine's load over the last minute; 0 where the system does not tell.
fn load() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or(0.0)
}
