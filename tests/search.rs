//! Searches on the digits network: same seed, same bytes; a run that was stopped or killed ends as one that was not.
//!
//! Tests that need ONNX Runtime find it as the command does; where there is none they say that they skip.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "these are tests")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vitrim::anatomy::{Anatomy, Kind};
use vitrim::data::{Dataset, Options};
use vitrim::eval::{self, EvalOptions, data_inputs};
use vitrim::graph::Graph;
use vitrim::infer::Facts;
use vitrim::runtime::{LibraryChoice, RuntimeName, SessionOptions, find};
use vitrim::search::{
    Config, FinetuneConfig, FinetuneJob, Job, LossChoice, Outcome, Progress, SearchError, Tie, TrainChoice, finetune, gates,
    read, read_gates, read_weights, run,
};
use vitrim::{onnx, pipeline, runtime};

const RUN_DIR: &str = "VITRIM_TEST_RUN_DIR";
const MODEL: &str = "63793635f9ea0387de4f4731ab059f1e59ea057348dc5bd66a8e0c0a3e909230";

fn has_ort() -> bool {
    if !RuntimeName::Ort.is_built() {
        println!("skipped: built without ONNX Runtime");
        return false;
    }
    match find(&LibraryChoice::default()) {
        Ok(_) => true,
        Err(error) => {
            assert!(std::env::var_os("VITRIM_ORT_LIB").is_none(), "VITRIM_ORT_LIB is set, and: {error}");
            println!("skipped: {error}");
            false
        }
    }
}

fn digits(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/digits").join(name)
}

/// The network, its anatomy, and some of its training digits.
struct Digits {
    graph: Graph,
    facts: Facts,
    anatomy: Anatomy,
    data: Dataset,
    library: LibraryChoice,
}

impl Digits {
    fn load(samples: usize) -> Self {
        let graph = onnx::read(&digits("vit-digits.onnx")).unwrap().graph;
        let (facts, anatomy) = pipeline::analyse(&graph).unwrap();
        let options = Options { inputs: data_inputs(&graph), ..Options::default() };
        let data = Dataset::open(&digits("train.npz"), &options).unwrap();
        let data = data.select(&(0..samples).collect::<Vec<_>>());
        Self { graph, facts, anatomy, data, library: LibraryChoice::default() }
    }

    fn run(&self, config: &Config, dir: &Path, resume: bool) -> Result<Outcome, SearchError> {
        self.run_until(config, dir, resume, u64::MAX)
    }

    /// Sets the stop flag after a step.
    fn run_until(&self, config: &Config, dir: &Path, resume: bool, last: u64) -> Result<Outcome, SearchError> {
        let stop = AtomicBool::new(false);
        let mut see = |progress: Progress| {
            if let Progress::Step(step) = progress {
                assert!(step.loss.is_finite() && step.step <= step.of && step.images_per_second > 0.0);
                if step.step >= last {
                    stop.store(true, Ordering::Relaxed);
                }
            }
        };
        let (groups, tokens) = gates(&self.graph, &self.facts, &self.anatomy, &config.gates);
        let job = Job {
            graph: &self.graph,
            facts: &self.facts,
            groups: &groups,
            tokens: &tokens,
            model_sha256: MODEL,
            output: None,
            library: &self.library,
            resume,
        };
        run(&job, &self.data, config, dir, &mut see, &stop)
    }
}

/// Two epochs of six steps; gates move far in few steps.
fn short() -> Config {
    Config {
        epochs: 2,
        batch: 8,
        gate_lr: Some(0.02),
        threads: 1,
        checkpoint_every: 4,
        shift: 1,
        held_out: 0.0,
        ..Config::default()
    }
}

/// What a run left behind, by file.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let names = ["checkpoint.safetensors", "gates/epoch-001.safetensors", "gates/epoch-002.safetensors", "config.toml"];
    names.iter().map(|name| (name.to_string(), std::fs::read(dir.join(name)).unwrap_or_else(|e| panic!("{name}: {e}")))).collect()
}

fn assert_same(a: &Path, b: &Path) {
    let (a, b) = (files(a), files(b));
    for (name, bytes) in &a {
        assert!(*bytes == b[name], "{name} differs");
    }
}

fn logged_steps(dir: &Path) -> Vec<u64> {
    let text = std::fs::read_to_string(dir.join("log.jsonl")).unwrap();
    let lines = text.lines().map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap());
    lines.map(|v| v["step"].as_u64().unwrap()).collect()
}

#[test]
fn equal_seeds_give_equal_bytes_and_stopped_runs_go_on() {
    if !has_ort() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let digits = Digits::load(50);
    let whole = digits.run(&short(), &at("a"), false).unwrap();
    assert_eq!((whole.position.step, whole.position.of, whole.is_interrupted), (12, 12, false));
    digits.run(&short(), &at("b"), false).unwrap();
    assert_same(&at("a"), &at("b"));
    let other = Config { seed: 1, ..short() };
    digits.run(&other, &at("other"), false).unwrap();
    assert_ne!(read_gates(&at("a")).unwrap().groups, read_gates(&at("other")).unwrap().groups);

    // Between checkpoints, at the end of an epoch, and in the second.
    for last in [3, 6, 9] {
        let dir = at(&format!("stopped{last}"));
        let outcome = digits.run_until(&short(), &dir, false, last).unwrap();
        assert_eq!((outcome.position.step, outcome.is_interrupted), (last, true));
        assert!(!read(&dir).unwrap().finished);
        assert!(matches!(digits.run(&short(), &dir, false), Err(SearchError::Exists { .. })));
        let outcome = digits.run(&Config::read(&dir).unwrap(), &dir, true).unwrap();
        assert_eq!((outcome.position.step, outcome.is_interrupted), (12, false));
        assert_same(&at("a"), &dir);
        assert_eq!(logged_steps(&dir), (1..=12).collect::<Vec<_>>());
    }

    let changed = Config { lr: 1e-3, ..short() };
    let error = digits.run(&changed, &at("a"), true).unwrap_err().to_string();
    assert!(error.contains("lr = 0.0002, not 0.001"), "{error}");
    let done = digits.run(&short(), &at("a"), true).unwrap();
    assert_eq!((done.position.step, done.task), (12, None));
    let mut fewer = digits;
    fewer.data = fewer.data.select(&(0..40).collect::<Vec<_>>());
    assert!(matches!(fewer.run(&short(), &at("b"), true), Err(SearchError::OtherData { .. })));
}

/// Not a test of its own: the process that the next one kills.
#[test]
#[ignore = "started by a_killed_run_ends_as_one_that_was_not"]
fn child_that_searches() {
    let dir = std::env::var_os(RUN_DIR).expect("only the test that kills it starts this");
    let outcome = Digits::load(50).run(&short(), Path::new(&dir), false).unwrap();
    assert!(!outcome.is_interrupted);
}

#[test]
fn a_killed_run_ends_as_one_that_was_not() {
    if !has_ort() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (whole, killed) = (folder.path().join("whole"), folder.path().join("killed"));
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_that_searches", "--ignored"])
        .env(RUN_DIR, &killed)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    // Some steps behind the first checkpoint, which stands at step 4.
    let is_there = || std::fs::read_to_string(killed.join("log.jsonl")).is_ok_and(|log| log.lines().count() >= 6);
    while !is_there() {
        assert!(child.try_wait().unwrap().is_none(), "the child ended before it could be killed");
        std::thread::sleep(Duration::from_millis(2));
    }
    let digits = Digits::load(50);
    let in_use = digits.run(&short(), &killed, true);
    if let Err(SearchError::InUse { by, .. }) = &in_use {
        assert!(by.starts_with(&format!("pid {} since ", child.id())), "{by}");
    }
    child.kill().unwrap();
    child.wait().unwrap();
    std::fs::write(killed.join(".vitrim-tmp-left"), "half a checkpoint").unwrap();
    assert!(read(&killed).unwrap().position.step >= 4);
    digits.run(&short(), &killed, true).unwrap();
    digits.run(&short(), &whole, false).unwrap();
    assert_same(&whole, &killed);
    assert_eq!(logged_steps(&killed), (1..=12).collect::<Vec<_>>());
    assert!(!killed.join(".vitrim-tmp-left").exists());
}

#[test]
fn damaged_and_foreign_checkpoints_are_named() {
    if !has_ort() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("run");
    let digits = Digits::load(50);
    digits.run_until(&short(), &dir, false, 9).unwrap();
    let file = dir.join("checkpoint.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
    let error = digits.run(&short(), &dir, true).unwrap_err().to_string();
    assert!(error.contains("is damaged") && error.contains("checkpoint.old.safetensors, is complete"), "{error}");
    // What a kill between two renames leaves: only the older one, from which the run goes on.
    std::fs::remove_file(&file).unwrap();
    assert_eq!(digits.run(&short(), &dir, true).unwrap().position.step, 12);
    digits.run(&short(), &folder.path().join("whole"), false).unwrap();
    assert_same(&folder.path().join("whole"), &dir);
}

#[test]
fn losses_and_choices_of_what_trains() {
    if !has_ort() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let digits = Digits::load(64);
    let moved = |dir: &Path| {
        let trained = read_weights(dir).unwrap();
        trained
            .iter()
            .filter(|(name, w)| digits.graph.find(name).and_then(|v| digits.graph.constant(v)).is_none_or(|o| o != **w))
            .count()
    };
    let few = Config { max_steps: Some(4), ..short() };
    let cases = [
        ("all-ce", Config { loss: Some(LossChoice::Ce), ..few.clone() }),
        ("all-kd", Config { loss: Some(LossChoice::Kd), ema: Some(0.9), ..few.clone() }),
        ("norm-mse", Config { loss: Some(LossChoice::Mse), train: TrainChoice::Norm, ..few.clone() }),
        ("gates-cosine", Config { loss: Some(LossChoice::Cosine), train: TrainChoice::Gates, ..few.clone() }),
        ("tied", Config { tie: Tie::Qkv, gates: vec![Kind::Qk, Kind::Vo, Kind::Token], ..few.clone() }),
    ];
    for (name, config) in cases {
        let dir = folder.path().join(name);
        let outcome = digits.run(&config, &dir, false).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(outcome.position.step, 4, "{name}");
        let scores = read_gates(&dir).unwrap();
        assert!(scores.groups.values().flatten().all(|g| g.is_finite() && *g >= 0.0), "{name}");
        assert!(scores.groups.values().flatten().any(|g| *g < 0.99), "{name}: no gate moved");
        let weights = moved(&dir);
        match config.train {
            TrainChoice::Gates => assert_eq!(weights, 0),
            TrainChoice::Norm => assert_eq!(weights, 26, "13 normalizations have a scale and a bias each"),
            TrainChoice::All => assert!(weights > 50, "{name}: {weights}"),
        }
        let graph = read(&dir).unwrap().apply_weights(&digits.graph).unwrap();
        assert!(vitrim::graph::check::check(&graph).is_empty(), "{name}");
        if name == "tied" {
            assert_eq!(scores.groups["qk.2"], scores.groups["vo.2"]);
            assert!(scores.groups.keys().any(|k| k.starts_with("token.")), "{:?}", scores.groups.keys());
        }
    }
}

#[test]
fn accumulated_batches_are_one_large_batch() {
    if !has_ort() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let digits = Digits::load(64);
    let (large, parts) = (folder.path().join("large"), folder.path().join("parts"));
    let config = Config { max_steps: Some(3), ..short() };
    digits.run(&Config { batch: 16, ..config.clone() }, &large, false).unwrap();
    digits.run(&Config { batch: 4, accumulate: 4, ..config }, &parts, false).unwrap();
    let (large, parts) = (read(&large).unwrap(), read(&parts).unwrap());
    assert_eq!((large.position.step, parts.position.step), (3, 3));
    let mut furthest = 0f32;
    for (id, gates) in &large.gates {
        for (a, b) in gates.iter().zip(&parts.gates[id]) {
            furthest = furthest.max((a - b).abs());
        }
    }
    // Adam's first steps divide a gradient by its own size, so rounding in a gradient near zero can turn its sign; and gates move
    // by up to 0.02 a step.
    assert!(furthest < 0.02, "{furthest}");
    let mean = |run: &vitrim::search::Run| {
        let all: Vec<f64> = run.gates.values().flatten().map(|g| f64::from(*g)).collect();
        all.iter().sum::<f64>() / all.len() as f64
    };
    assert!((mean(&large) - mean(&parts)).abs() < 1e-4, "{} {}", mean(&large), mean(&parts));
}

#[test]
fn losses_that_are_not_finite_stop_and_keep_the_last_state() {
    if !has_ort() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("run");
    let digits = Digits::load(64);
    let wild = Config { lr: 1e18, gate_lr: Some(1e18), warmup: 0.0, clip: None, checkpoint_every: 1, ..short() };
    let error = digits.run(&wild, &dir, false).unwrap_err();
    assert!(matches!(error, SearchError::NotFinite { .. }), "{error}");
    assert!(error.to_string().contains("Use a lower lr (it is 1000000000000000000)"), "{error}");
    if let Ok(run) = read(&dir) {
        assert!(run.weights.values().all(|w| w.to_f32s().unwrap().iter().all(|x| x.is_finite())));
    }
}

#[test]
fn a_damaged_model_is_brought_back_and_a_good_one_is_kept() {
    if !has_ort() {
        return;
    }
    let digits = Digits::load(512);
    let mut damaged = digits.graph.clone();
    // A bias that favours half of the classes, which a few steps can undo.
    let weight = damaged.find("head.bias").expect("the classifier has a bias");
    let bias = damaged.constant(weight).unwrap();
    let shifted: Vec<f32> =
        bias.to_f32s().unwrap().iter().enumerate().map(|(i, x)| x + if i % 2 == 0 { 4.0 } else { -4.0 }).collect();
    damaged.set_constant(weight, bias.with_f32s(&shifted));
    let facts = vitrim::infer::facts(&damaged).unwrap();
    let config = FinetuneConfig { epochs: 1, max_steps: Some(12), batch: 16, lr: 2e-3, threads: 1, ..FinetuneConfig::default() };
    let stop = AtomicBool::new(false);
    let job = FinetuneJob { student: &damaged, facts: &facts, teacher: &digits.graph, output: None, library: &digits.library };
    let result = finetune(&job, &digits.data, &config, &mut |_| {}, &stop).unwrap();
    assert_eq!((result.best_epoch, result.steps), (Some(1), 12));
    assert!(result.after.kl < result.before.kl, "{:?} {:?}", result.before, result.after);
    assert!(!result.weights.is_empty() && vitrim::graph::check::check(&result.graph).is_empty());

    // The teacher itself cannot become more like itself.
    let job = FinetuneJob { student: &digits.graph, facts: &digits.facts, ..job };
    let config = FinetuneConfig { label_share: 0.5, max_steps: Some(3), ..config };
    let result = finetune(&job, &digits.data, &config, &mut |_| {}, &stop).unwrap();
    assert_eq!((result.best_epoch, result.weights.len()), (None, 0));
    assert_eq!(result.after, result.before);
    assert!(onnx::to_bytes(&result.graph).unwrap() == onnx::to_bytes(&digits.graph).unwrap());
}

#[test]
fn the_digits_network_has_its_accuracy() {
    if !has_ort() {
        return;
    }
    let graph = onnx::read(&digits("vit-digits.onnx")).unwrap().graph;
    let data = Dataset::open(&digits("test.npz"), &Options { inputs: data_inputs(&graph), ..Options::default() }).unwrap();
    let bytes = onnx::to_bytes(&graph).unwrap();
    let options = SessionOptions { threads: 1, ..SessionOptions::default() };
    let mut session = runtime::open(RuntimeName::Ort, &bytes, &options).unwrap();
    let mut other = runtime::open(RuntimeName::Ort, &bytes, &options).unwrap();
    let eval_options = EvalOptions { batch: 96, ..EvalOptions::default() };
    let stop = AtomicBool::new(false);
    let found = eval::evaluate(session.as_mut(), Some(other.as_mut()), &data, &eval_options, &stop).unwrap();
    let accuracy = found.accuracy.unwrap();
    assert_eq!((accuracy.correct, accuracy.n, found.n), (1965, 2000, 2000));
    assert_eq!((found.kl, found.agreement.map(|a| a.correct)), (Some(0.0), Some(2000)));
    stop.store(true, Ordering::Relaxed);
    let stopped = eval::evaluate(session.as_mut(), None, &data, &eval_options, &stop);
    assert!(matches!(stopped, Err(eval::EvalError::Interrupted)));
}
