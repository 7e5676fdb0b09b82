//! What large models cost: `inspect` and `slice` of a ViT-L/16, and how time grows with depth.
//!
//! `cargo bench --bench scale [-- --rounds 5 --folder DIR --keep 0.9 --parts large,growth]`; `--parts huge` tries a model beyond 2 GB,
//! `--parts small,base` the way without training.
//!
//! The models are made by vit.rs, without Python. Every command is a process of its own, and those
//! of one round take turns, so that what else the machine does falls on all of them. Reported is the median with the range over rounds.
//!
//! large: ViT-L/16, 24 layers, 1.2 GB. `inspect --json`: seconds. `slice --keep mlp,qk,vo`: seconds, and its ratio to `cp` of the model
//! followed by `sync` of the copy, both with the model in the page cache. Anonymous memory: the largest RssAnon in /proc/PID/status,
//! looked at every millisecond; for slice as a ratio to the output's size.
//! growth: 12, 48 and 192 layers of width 64, seconds per node of `inspect`, `plan` and `slice`, as ratios to those of 12 layers in the
//! same round, after the time of the smallest model (start-up) was taken off: 1 is linear growth.
//! small, base: `slim` without training on a ViT-S/16 and a ViT-B/16, see oneshot.rs; they need ONNX Runtime.
//! huge: 44 layers of the large model, 2.2 GB of external data: inspect, plan, slice, and verify where ONNX Runtime is found.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "it is a program")]

mod oneshot;
mod vit;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};
use vit::Shape;
use vitrim::graph::Storage;
use vitrim::onnx;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    match Settings::parse(&args).and_then(|settings| measure(&settings)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("scale: {error}");
            ExitCode::FAILURE
        }
    }
}

struct Settings {
    rounds: usize,
    folder: Option<PathBuf>,
    keep: String,
    parts: String,
}

impl Settings {
    fn parse(args: &[String]) -> Result<Self> {
        let mut settings = Self { rounds: 5, folder: None, keep: "0.9".into(), parts: "large,growth".into() };
        for pair in args.chunks(2) {
            let [name, value] = pair else { return Err(format!("{} needs a value", pair[0]).into()) };
            match name.as_str() {
                "--rounds" => settings.rounds = value.parse::<usize>()?.max(1),
                "--folder" => settings.folder = Some(PathBuf::from(value)),
                "--keep" => settings.keep.clone_from(value),
                "--parts" => settings.parts.clone_from(value),
                _ => return Err(format!("there is no option {name}").into()),
            }
        }
        Ok(settings)
    }

    /// All units of these kinds to the same share.
    fn ask(&self) -> String {
        ["mlp", "qk", "vo"].map(|kind| format!("{kind}={}", self.keep)).join(",")
    }
}

fn measure(settings: &Settings) -> Result<()> {
    let own = tempfile::tempdir()?;
    let folder = settings.folder.clone().unwrap_or_else(|| own.path().to_path_buf());
    for part in settings.parts.split(',') {
        match part {
            "large" => large(settings, &folder)?,
            "growth" => growth(settings, &folder)?,
            "huge" => huge(settings, &folder)?,
            "small" => oneshot::one_shot("ViT-S-16", &oneshot::SMALL, &folder)?,
            "base" => oneshot::one_shot("ViT-B-16", &oneshot::BASE, &folder)?,
            _ => return Err(format!("there is no part {part}").into()),
        }
    }
    Ok(())
}

/// ViT-L/16 at 224.
const LARGE: Shape = Shape { layers: 24, width: 1024, heads: 16, patch: 16 };

fn large(settings: &Settings, folder: &Path) -> Result<()> {
    let (model, plan) = (folder.join("vit_large.onnx"), folder.join("plan.json"));
    let (copy, out) = (folder.join("copy.onnx"), folder.join("out.onnx"));
    let nodes = make(&LARGE, Storage::Raw, &model)?;
    let size = std::fs::metadata(&model)?.len();
    println!("ViT-L/16: {nodes} nodes, {size} bytes; {} rounds, keep {}", settings.rounds, settings.ask());
    vitrim(&["plan".as_ref(), model.as_ref(), "--by".as_ref(), "random".as_ref()], &settings.ask(), &plan)?;
    let (mut inspects, mut copies, mut slices) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..settings.rounds {
        inspects.push(run(command(["inspect", "--json"]).arg(&model))?);
        let mut cp = run(Command::new("cp").arg(&model).arg(&copy))?;
        let sync = run(Command::new("sync").arg(&copy))?;
        (cp.seconds, cp.busy) = (cp.seconds + sync.seconds, cp.busy + sync.busy);
        std::fs::remove_file(&copy)?;
        copies.push(cp);
        let _ = std::fs::remove_file(&out); // freeing it is no part of writing the next
        slices.push(run(command(["slice", "--force", "--json"]).arg(&model).arg("--plan").arg(&plan).arg("-o").arg(&out))?);
    }
    let written = std::fs::metadata(&out)?.len() as f64;
    let seconds = |all: &[Usage]| all.iter().map(|u| u.seconds).collect::<Vec<_>>();
    let busy = |all: &[Usage]| all.iter().map(|u| u.busy).collect::<Vec<_>>();
    let anonymous = |all: &[Usage], unit: f64| all.iter().map(|u| u.anonymous as f64 / unit).collect::<Vec<_>>();
    let ratios = slices.iter().zip(&copies).map(|(s, c)| s.seconds / c.seconds).collect();
    report("inspect, seconds", seconds(&inspects));
    report("inspect, processor seconds", busy(&inspects));
    report("inspect, anonymous MB", anonymous(&inspects, 1e6));
    report("cp and sync, seconds", seconds(&copies));
    report("cp and sync, processor seconds", busy(&copies));
    report("slice, seconds", seconds(&slices));
    report("slice, processor seconds", busy(&slices));
    report("slice / (cp and sync)", ratios);
    report("slice, anonymous / output", anonymous(&slices, written));
    for file in [model, plan, out] {
        std::fs::remove_file(file)?;
    }
    Ok(())
}

fn growth(settings: &Settings, folder: &Path) -> Result<()> {
    let depths = [1, 12, 48, 192];
    let models = depths.map(|layers| folder.join(format!("depth{layers}.onnx")));
    let mut nodes = Vec::new();
    for (layers, model) in depths.iter().zip(&models) {
        nodes.push(make(&Shape { layers: *layers, width: 64, heads: 4, patch: 16 }, Storage::Raw, model)? as f64);
    }
    println!("growth: layers {depths:?}, nodes {nodes:?}; {} rounds", settings.rounds);
    let mut all: Vec<[[f64; 3]; 4]> = Vec::new();
    for _ in 0..settings.rounds {
        let mut round = [[0.0; 3]; 4];
        for (model, times) in models.iter().zip(&mut round) {
            let (plan, out) = (model.with_extension("plan.json"), model.with_extension("out.onnx"));
            times[0] = run(command(["inspect", "--json"]).arg(model))?.seconds;
            times[1] = vitrim(&["plan".as_ref(), model.as_ref(), "--by".as_ref(), "random".as_ref()], &settings.ask(), &plan)?;
            let mut slice = command(["slice", "--force", "--json"]);
            times[2] = run(slice.arg(model).arg("--plan").arg(plan).arg("-o").arg(out))?.seconds;
        }
        all.push(round);
    }
    for (number, name) in ["inspect", "plan", "slice"].into_iter().enumerate() {
        for (i, layers) in depths.iter().enumerate() {
            report(&format!("{name}, {layers} layers, seconds"), all.iter().map(|r| r[i][number]).collect());
        }
        for (i, layers) in depths.iter().enumerate().skip(2) {
            let per_node = |r: &[[f64; 3]; 4], i: usize| (r[i][number] - r[0][number]) / (nodes[i] - nodes[0]);
            report(
                &format!("{name}, per node, {layers} / 12 layers"),
                all.iter().map(|r| per_node(r, i) / per_node(r, 1)).collect(),
            );
        }
    }
    Ok(())
}

fn huge(settings: &Settings, folder: &Path) -> Result<()> {
    let (model, plan, out) = (folder.join("huge.onnx"), folder.join("plan.json"), folder.join("out.onnx"));
    let nodes = make(&Shape { layers: 44, ..LARGE }, Storage::External, &model)?;
    let data = std::fs::metadata(onnx::data_path(&model))?.len();
    println!("44 layers: {nodes} nodes, {data} bytes of external data");
    let inspect = run(command(["inspect", "--json"]).arg(&model))?;
    let planned = vitrim(&["plan".as_ref(), model.as_ref(), "--by".as_ref(), "random".as_ref()], &settings.ask(), &plan)?;
    let slice = run(command(["slice", "--force", "--json"]).arg(&model).arg("--plan").arg(&plan).arg("-o").arg(&out))?;
    let verify =
        run(command(["verify", "--json"]).arg(&out).arg("--against").arg(&model).args(["--runtimes", "ort", "--threads", "1"]))?;
    let written = std::fs::metadata(&out)?.len() + std::fs::metadata(onnx::data_path(&out)).map_or(0, |m| m.len());
    println!("  inspect {:.2} s, {} MB anonymous; plan {planned:.2} s", inspect.seconds, inspect.anonymous / 1_000_000);
    println!(
        "  slice {:.2} s, {:.2} of the output ({written} bytes) anonymous",
        slice.seconds,
        slice.anonymous as f64 / written as f64
    );
    println!("  verify passes: {:.1} s, {} MB anonymous", verify.seconds, verify.anonymous / 1_000_000);
    for file in [onnx::data_path(&model), model, plan, onnx::data_path(&out), out.with_extension("plan.json"), out] {
        let _ = std::fs::remove_file(file); // an output below 2 GB may have no data file
    }
    Ok(())
}

// ---- processes ----------------------------------------------------------------------------------

struct Usage {
    seconds: f64,
    /// Processor time, in steps of 10 ms.
    busy: f64,
    /// Unit: bytes.
    anonymous: u64,
}

fn command<const N: usize>(words: [&str; N]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vitrim"));
    command.args(words);
    command
}

fn vitrim(words: &[&std::ffi::OsStr], keep: &str, out: &Path) -> Result<f64> {
    let mut command = command([]);
    command.args(words).arg("--keep").arg(keep).arg("-o").arg(out).arg("--force");
    Ok(run(&mut command)?.seconds)
}

/// Runs a command to its end, looking at its memory every millisecond.
fn run(command: &mut Command) -> Result<Usage> {
    let (start, busy) = (Instant::now(), busy_of_children());
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let status = format!("/proc/{}/status", child.id());
    let mut anonymous = 0;
    let ended = loop {
        if let Some(ended) = child.try_wait()? {
            break ended;
        }
        anonymous = anonymous.max(anonymous_bytes(&status));
        std::thread::sleep(Duration::from_millis(1));
    };
    let seconds = start.elapsed().as_secs_f64();
    if ended.success() {
        return Ok(Usage { seconds, busy: busy_of_children() - busy, anonymous });
    }
    let mut message = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        std::io::Read::read_to_string(&mut stderr, &mut message)?;
    }
    Err(format!("{command:?}: {ended}: {message}").into())
}

/// The machine's load over the last minute; 0 where the system does not tell.
fn load() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or(0.0)
}

/// Processor time of all processes that this one has waited for: fields 16 and 17 of /proc/self/stat, in hundredths of a second.
fn busy_of_children() -> f64 {
    let text = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = text.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    fields.iter().skip(13).take(2).filter_map(|f| f.parse::<f64>().ok()).sum::<f64>() / 100.0
}

fn anonymous_bytes(status: &str) -> u64 {
    let text = std::fs::read_to_string(status).unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("RssAnon:"));
    line.and_then(|l| l.split_whitespace().next()).and_then(|n| n.parse::<u64>().ok()).map_or(0, |kib| kib * 1024)
}

fn report(name: &str, mut values: Vec<f64>) {
    values.sort_by(f64::total_cmp);
    let (low, high) = (values[0], values[values.len() - 1]);
    println!("  {name:<34} {:>8.3}  ({low:.3} to {high:.3}), n = {}", values[values.len() / 2], values.len());
}

/// Writes a model; returns the number of its nodes.
fn make(shape: &Shape, storage: Storage, path: &Path) -> Result<usize> {
    let graph = vit::graph(shape, storage);
    onnx::save(&graph, path, onnx::Overwrite::Force)?;
    Ok(graph.order().len())
}
