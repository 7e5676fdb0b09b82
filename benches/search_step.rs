//! What a search step costs beside a training step of PyTorch: processor time and peak memory.
//!
//! `cargo bench --bench search_step -- --python PYTHON [--steps 9] [--warmup 2] [--batch 8] [--threads 1] [--tolerance 1e-4]`
//!
//! PYTHON (or the variable VITRIM_PYTHON) is a Python with the packages of models/requirements.txt; ONNX Runtime is found as the
//! command finds it, so VITRIM_ORT_LIB names one. The network is DeiT-Tiny at 224 with random weights, float32, exported by
//! torch_step.py, which is also the contender. Both are processes of their own, and take turns step by step.
//!
//! A step of vitrim: forward with gates on every MLP, qk and vo unit, cross entropy and l1, backward, AdamW on all weights and gates.
//! A step of PyTorch: forward with scaled_dot_product_attention, cross entropy, backward, fused AdamW on all weights.
//! Reported: the processor time of each process per step (on Linux: of all its threads), the median of the ratios of neighbouring
//! steps with its range, and the peak resident memory of each process with all that it loaded and did before.
//! With all gates 1 both compute the same loss: where the first losses differ by more than the tolerance, nothing is reported.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "it is a program")]

use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::time::Instant;
use vitrim::autodiff::update::AdamW;
use vitrim::autodiff::{InputSpec as GraphInput, Role};
use vitrim::data::{Array, ArrayData, ArrayKind, BatchOrder, Dataset, InputSpec, Options as DataOptions, Tail};
use vitrim::graph::DeclaredDim;
use vitrim::runtime::{BoundSession, SessionOptions, StateSpec};
use vitrim::supernet::{self, Options, Supernet, Train};
use vitrim::{onnx, pipeline};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// First argument of the process that runs vitrim's steps: model, batch, batch size, threads.
const CONTENDER: &str = "--contender";
/// As torch_step.py has them.
const RATE: f32 = 1e-4;
const WEIGHT_DECAY: f32 = 0.05;
const PENALTY: f32 = 1e-4;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let done = match args.first().map(String::as_str) {
        Some(CONTENDER) => serve(&args[1..]),
        _ => Settings::parse(&args).and_then(|settings| compare(&settings)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("search_step: {error}");
            ExitCode::FAILURE
        }
    }
}

struct Settings {
    python: PathBuf,
    steps: usize,
    warmup: usize,
    batch: usize,
    threads: usize,
    tolerance: f64,
}

impl Settings {
    fn parse(args: &[String]) -> Result<Self> {
        let python = std::env::var_os("VITRIM_PYTHON").map(PathBuf::from).unwrap_or_default();
        let mut settings = Self { python, steps: 9, warmup: 2, batch: 8, threads: 1, tolerance: 1e-4 };
        for pair in args.chunks(2) {
            let [name, value] = pair else { return Err(format!("{} needs a value", pair[0]).into()) };
            match name.as_str() {
                "--python" => settings.python = PathBuf::from(value),
                "--steps" => settings.steps = value.parse()?,
                "--warmup" => settings.warmup = value.parse()?,
                "--batch" => settings.batch = value.parse()?,
                "--threads" => settings.threads = value.parse()?,
                "--tolerance" => settings.tolerance = value.parse()?,
                _ => return Err(format!("there is no option {name}").into()),
            }
        }
        if settings.python.as_os_str().is_empty() {
            return Err(
                "give the Python that has torch and timm (models/requirements.txt): --python PATH or VITRIM_PYTHON".into()
            );
        }
        if settings.steps == 0 || settings.warmup == 0 {
            return Err("--steps and --warmup are at least 1: the first step is checked, not measured".into());
        }
        Ok(settings)
    }
}

/// What one step cost.
#[derive(serde::Serialize, serde::Deserialize)]
struct Step {
    cpu_s: f64,
    wall_s: f64,
    /// Of the process so far.
    peak_rss_kb: f64,
    /// Without the penalty, before the update.
    loss: f64,
}

/// A process that answers `step` with a line of JSON.
struct Contender {
    child: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Contender {
    fn start(command: &mut Command) -> Result<Self> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (Some(requests), Some(answers)) = (child.stdin.take(), child.stdout.take()) else {
            return Err("a contender has no pipes".into());
        };
        Ok(Self { child, requests, answers: BufReader::new(answers) })
    }

    fn step(&mut self) -> Result<Step> {
        let mut answer = String::new();
        writeln!(self.requests, "step")?;
        if self.answers.read_line(&mut answer)? == 0 {
            return Err(format!("a contender ended: {}", self.child.wait()?).into());
        }
        Ok(serde_json::from_str(&answer)?)
    }

    fn end(mut self) -> Result<()> {
        drop(self.requests);
        match self.child.wait()? {
            status if status.success() => Ok(()),
            status => Err(format!("a contender ended: {status}").into()),
        }
    }
}

fn compare(settings: &Settings) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (model, batch) = (folder.path().join("deit_tiny.onnx"), folder.path().join("batch.npz"));
    let (count, threads) = (settings.batch.to_string(), settings.threads.to_string());
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/python/torch_step.py");
    let mut torch = Command::new(&settings.python);
    torch.arg(script).arg("--export").arg(&model).arg("--save-batch").arg(&batch);
    let mut torch = Contender::start(torch.args(["--batch", &count, "--threads", &threads]))
        .map_err(|e| format!("{}: {e}", settings.python.display()))?;
    // The first step also says that model and batch are written.
    let mut torch_steps = vec![torch.step()?];
    let mut own = Command::new(std::env::current_exe()?);
    let mut own = Contender::start(own.arg(CONTENDER).arg(&model).arg(&batch).args([&count, &threads]))?;
    let mut own_steps = vec![own.step()?];
    let (first, expected) = (own_steps[0].loss, torch_steps[0].loss);
    let agree = (first - expected).abs() <= settings.tolerance * expected.abs();
    println!("first loss: vitrim {first:.7}, PyTorch {expected:.7}");
    if !agree {
        return Err(format!("the first losses differ by more than {} of PyTorch's", settings.tolerance).into());
    }
    for _ in 1..settings.warmup + settings.steps {
        torch_steps.push(torch.step()?);
        own_steps.push(own.step()?);
    }
    torch.end()?;
    own.end()?;
    report(settings, &own_steps, &torch_steps);
    Ok(())
}

fn report(settings: &Settings, own: &[Step], torch: &[Step]) {
    let (own_peak, torch_peak) = (peak(own), peak(torch));
    let (own, torch) = (&own[settings.warmup..], &torch[settings.warmup..]);
    let of = |steps: &[Step], what: fn(&Step) -> f64| steps.iter().map(what).collect::<Vec<f64>>();
    let ratios = |what: fn(&Step) -> f64| own.iter().zip(torch).map(|(a, b)| what(a) / what(b)).collect::<Vec<f64>>();
    let (n, warmup, threads) = (settings.steps, settings.warmup, settings.threads);
    println!("processor: {}, {threads} thread(s) each", processor());
    println!("batch {}, {n} steps after {warmup}: median (least to most)", settings.batch);
    println!("  processor time, ms   vitrim {}   PyTorch {}", ms(of(own, |s| s.cpu_s)), ms(of(torch, |s| s.cpu_s)));
    println!("  elapsed time, ms     vitrim {}   PyTorch {}", ms(of(own, |s| s.wall_s)), ms(of(torch, |s| s.wall_s)));
    println!("  ratio of processor time  {}", spread(ratios(|s| s.cpu_s), 3));
    println!("  ratio of elapsed time    {}", spread(ratios(|s| s.wall_s), 3));
    println!("  peak memory, MB      vitrim {:.1}   PyTorch {:.1}   ratio {:.3}", own_peak, torch_peak, own_peak / torch_peak);
}

/// Unit: 10^6 bytes.
fn peak(steps: &[Step]) -> f64 {
    steps.iter().map(|s| s.peak_rss_kb).fold(0.0, f64::max) * 1024.0 / 1e6
}

fn ms(seconds: Vec<f64>) -> String {
    spread(seconds.into_iter().map(|s| s * 1e3).collect(), 1)
}

fn spread(mut values: Vec<f64>, digits: usize) -> String {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    let median = (values[(n - 1) / 2] + values[n / 2]) / 2.0;
    format!("{median:.digits$} ({:.digits$} to {:.digits$})", values[0], values[n - 1])
}

/// The name that the system gives it; hypervisors shorten it, so family and model stand behind.
fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = text.lines().find(|l| l.split(':').next().is_some_and(|key| key.trim() == name));
        line.and_then(|l| l.split_once(':')).map_or("unknown", |(_, value)| value.trim())
    };
    let wide = if field("flags").split(' ').any(|f| f == "avx512f") { "with AVX-512" } else { "without AVX-512" };
    format!("{} (family {}, model {}), {wide}", field("model name"), field("cpu family"), field("model"))
}

/// vitrim's side: builds the training graph, then answers requests.
fn serve(args: &[String]) -> Result<()> {
    let [model, batch, count, threads] = args else { return Err("four arguments expected".into()) };
    let (count, threads) = (count.parse()?, threads.parse()?);
    let mut session = open(Path::new(model), threads)?;
    for (name, array) in read_batch(Path::new(batch), count)? {
        session.set_feed(&name, &array)?;
    }
    eprintln!(
        "vitrim {}, ONNX Runtime {}, {threads} thread(s), {} kB before the first step",
        env!("CARGO_PKG_VERSION"),
        session.version(),
        peak_rss_kb()?
    );
    let mut out = std::io::stdout().lock();
    for (line, number) in std::io::stdin().lines().zip(1u16..) {
        if line?.trim() != "step" {
            return Err("the only request is `step`".into());
        }
        let (cpu, wall) = (cpu_seconds()?, Instant::now());
        session.set_feed("lr", &scalar(RATE))?;
        session.set_feed("step", &scalar(f32::from(number)))?;
        let fetched = session.step()?;
        let (cpu_s, wall_s) = (cpu_seconds()? - cpu, wall.elapsed().as_secs_f64());
        let loss = fetched.first().and_then(|(_, loss)| loss.as_f32().first().copied()).ok_or("no loss")?;
        let step = Step { cpu_s, wall_s, peak_rss_kb: peak_rss_kb()?, loss: f64::from(loss) };
        writeln!(out, "{}", serde_json::to_string(&step)?)?;
        out.flush()?;
    }
    Ok(())
}

fn scalar(value: f32) -> Array {
    Array { dims: Vec::new(), data: ArrayData::F32(vec![value]) }
}

/// The training graph with its weights, moments and gates in a session.
fn open(model: &Path, threads: usize) -> Result<BoundSession> {
    let net = build(model)?;
    let bytes = onnx::to_bytes(&net.graph)?;
    let state = net.inputs.iter().filter_map(|input| state(&net, input).transpose()).collect::<Result<Vec<_>>>()?;
    let penalties: Vec<String> = net.inputs.iter().map(|i| &i.name).filter(|n| n.starts_with("l1.")).cloned().collect();
    // What only the building needed is given back before the first step, as a search does.
    drop(net);
    let options = SessionOptions { threads, ..SessionOptions::default() };
    let mut session = BoundSession::new(&bytes, &options, state, &["loss.task".to_string()])?;
    for name in &penalties {
        session.set_feed(name, &scalar(PENALTY))?;
    }
    Ok(session)
}

fn build(path: &Path) -> Result<Supernet> {
    let graph = onnx::read(path)?.graph;
    let (facts, anatomy) = pipeline::analyse(&graph)?;
    let (groups, _) = supernet::gates_of(&graph, &facts, &anatomy);
    let groups: Vec<_> = groups.into_iter().filter(|g| ["mlp", "qk", "vo"].contains(&g.kind.as_str())).collect();
    let optimizer = Some(AdamW { weight_decay: WEIGHT_DECAY, ..AdamW::default() });
    let options = Options { train: Train::All, optimizer, gates_at_least_zero: true, ..Options::default() };
    let net = supernet::build(&graph, &facts, &groups, &[], &options)?;
    let units: usize = net.gates.iter().map(|g| g.units).sum();
    let weights: usize = net.params.iter().map(|p| p.initial.element_count()).sum();
    eprintln!("{weights} weights, {units} gated units in {} gates, {} nodes", net.gates.len(), net.graph.order().len());
    Ok(net)
}

/// The first value of what lives in the session: gates 1, moments 0, weights as in the model.
fn state(net: &Supernet, input: &GraphInput) -> Result<Option<StateSpec>> {
    let dims = input.shape.iter().map(|d| if let DeclaredDim::Size(n) = d { usize::try_from(*n).unwrap_or(0) } else { 0 });
    let dims: Vec<usize> = dims.collect();
    let count = dims.iter().product();
    let values = match input.role {
        Role::Gate => vec![1.0; count],
        Role::Moment => vec![0.0; count],
        Role::Param => {
            let param = net.params.iter().find(|p| p.input == input.name).ok_or("a weight without a value")?;
            param.initial.to_f32s().ok_or("a weight that is not float32")?
        }
        Role::Input | Role::Target | Role::Labels | Role::Scalar => return Ok(None),
    };
    let output = Some(format!("next.{}", input.name));
    Ok(Some(StateSpec { input: input.name.clone(), output, initial: Array { dims, data: ArrayData::F32(values) } }))
}

fn read_batch(path: &Path, count: usize) -> Result<Vec<(String, Array)>> {
    let dims = vec![None, Some(3), Some(224), Some(224)];
    let input = InputSpec { name: "input".into(), dims, kind: ArrayKind::F32 };
    let data = Dataset::open(path, &DataOptions { inputs: vec![input], ..DataOptions::default() })?;
    let order = BatchOrder { shuffle: false, tail: Tail::Keep, ..BatchOrder::default() };
    let batch = data.batches(order, count, 1, None).next().ok_or("an empty batch")??;
    let labels = batch.labels.ok_or("a batch without labels")?;
    let mut feeds = batch.inputs;
    feeds.push(("labels".into(), Array { dims: vec![labels.len()], data: ArrayData::I64(labels) }));
    Ok(feeds)
}

/// Processor time of all threads of this process, user and system. Of a thread that ended it is lost: none ends in a step.
fn cpu_seconds() -> Result<f64> {
    let mut nanoseconds = 0f64;
    for task in std::fs::read_dir("/proc/self/task").map_err(|e| format!("processor time is read from Linux's /proc: {e}"))? {
        let text = std::fs::read_to_string(task?.path().join("schedstat"))?;
        nanoseconds += text.split_whitespace().next().ok_or("an empty schedstat")?.parse::<f64>()?;
    }
    Ok(nanoseconds / 1e9)
}

/// VmHWM: the peak resident memory of this process so far.
fn peak_rss_kb() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/self/status")?;
    let line = text.lines().find_map(|l| l.strip_prefix("VmHWM:")).ok_or("no VmHWM")?;
    Ok(line.split_whitespace().next().ok_or("no VmHWM")?.parse()?)
}
