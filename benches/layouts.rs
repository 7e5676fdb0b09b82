//! What the head layouts cost in ONNX Runtime: heads that keep equally many dims, whole heads dropped, heads of unlike width.
//!
//! `cargo bench --bench layouts [-- --rounds 60 --threads 1,2 --model small]` prints the table of docs/layouts.md.
//!
//! The model is a ViT-S/16 (or `--model base`) as PyTorch's TorchScript exporter writes timm's, made by scale/vit.rs with random weights:
//! how long a product takes does not depend on the numbers in it. Every layout keeps half of qk and half of vo in each layer, so all have
//! the same parameters and MACs; which units stay is written down here and not scored. Each cut model is compared with its twin first.
//! All models run one image in turn, forwards and backwards, so that what else the machine does falls on all of them; a ratio is that of
//! one round's time to the uncut model's in the same round. Reported: medians, and the range in which 90 % of the rounds lie.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "it is a program")]

#[path = "scale/vit.rs"]
mod vit;

use std::collections::BTreeSet;
use std::error::Error;
use std::process::ExitCode;
use std::time::Instant;
use vit::Shape;
use vitrim::anatomy::{Anatomy, Kind};
use vitrim::cost::{self, Cost, Sizes};
use vitrim::data::array::{Array, ArrayData};
use vitrim::graph::{Graph, Storage};
use vitrim::infer::Facts;
use vitrim::plan::Kept;
use vitrim::runtime::{RuntimeName, Session, SessionOptions, open_graph};
use vitrim::{pipeline, slice};

type Result<T> = std::result::Result<T, Box<dyn Error>>;
type Feed = Vec<(String, Array)>;

/// Dims that each head of a layer keeps, of 64; all have the same mean.
const LAYOUTS: [(&str, &[usize]); 5] = [
    ("equal: 32 dims each", &[32]),
    ("drop: every second head, 64 dims", &[64, 0]),
    ("grouped, 2 widths: 16, 48", &[16, 48]),
    ("grouped, 3 widths: 16, 32, 48", &[16, 32, 48]),
    ("grouped, 6 widths: 8, 16, 24, 40, 48, 56", &[8, 16, 24, 40, 48, 56]),
];

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    match Settings::parse(&args).and_then(|settings| measure(&settings)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("layouts: {error}");
            ExitCode::FAILURE
        }
    }
}

struct Settings {
    rounds: usize,
    threads: Vec<usize>,
    shape: Shape,
}

impl Settings {
    fn parse(args: &[String]) -> Result<Self> {
        let small = Shape { layers: 12, width: 384, heads: 6, patch: 16 };
        let mut settings = Self { rounds: 60, threads: vec![1, 2], shape: small };
        for pair in args.chunks(2) {
            let [name, value] = pair else { return Err(format!("{} needs a value", pair[0]).into()) };
            match (name.as_str(), value.as_str()) {
                ("--rounds", n) => settings.rounds = n.parse::<usize>()?.max(1),
                ("--threads", list) => {
                    settings.threads = list.split(',').map(str::parse).collect::<std::result::Result<_, _>>()?
                }
                ("--model", "small") => settings.shape = small,
                ("--model", "base") => settings.shape = Shape { width: 768, heads: 12, ..small },
                _ => return Err(format!("there is no option {name} {value}").into()),
            }
        }
        Ok(settings)
    }
}

/// A model, how it is called, and what it costs.
struct Contender {
    name: &'static str,
    graph: Graph,
    cost: Cost,
    nodes: usize,
}

fn measure(settings: &Settings) -> Result<()> {
    let graph = vit::graph(&settings.shape, Storage::Raw);
    let (facts, anatomy) = pipeline::analyse(&graph)?;
    let pixels = (0..3 * 224 * 224).map(|i| ((i * 37 % 255) as f32 / 127.0) - 1.0).collect();
    let image = Array::new(vec![1, 3, 224, 224], ArrayData::F32(pixels)).ok_or("an image of another size")?;
    let feed: Feed = vec![("input".into(), image)];
    let mut contenders = vec![contender("original", graph.clone(), &facts)];
    for (name, widths) in LAYOUTS {
        contenders.push(cut(name, &graph, (&facts, &anatomy), widths, &feed)?);
    }
    println!(
        "ViT, {} layers of {} heads x 64; {} rounds of one image each",
        settings.shape.layers, settings.shape.heads, settings.rounds
    );
    for threads in &settings.threads {
        let times = in_turn(&contenders, *threads, settings.rounds, &feed)?;
        table(&contenders, *threads, &times);
    }
    Ok(())
}

fn contender(name: &'static str, graph: Graph, facts: &Facts) -> Contender {
    let (cost, nodes) = (cost::count(&graph, facts, &Sizes::new()), graph.nodes().count());
    Contender { name, graph, cost, nodes }
}

/// The model with the heads of every layer cut to `widths` in turn; 0 drops a head.
fn cut(
    name: &'static str,
    graph: &Graph,
    (facts, anatomy): (&Facts, &Anatomy),
    widths: &[usize],
    feed: &Feed,
) -> Result<Contender> {
    let mut kept = Kept::new();
    for group in &anatomy.groups {
        let width = group.stored.len();
        let of_head = |head: usize| widths[head % widths.len()];
        let units: Vec<usize> = match group.kind {
            Kind::Qk | Kind::Vo => {
                (0..group.units()).filter(|u| of_head(u / width) == 0 || u % width < of_head(u / width)).collect()
            }
            Kind::Head => (0..group.units()).filter(|head| of_head(*head) > 0).collect(),
            _ => continue,
        };
        if units.len() < group.units() {
            kept.insert(group.id.clone(), units);
        }
    }
    let sliced = slice::apply(graph, facts, anatomy, &kept, &pipeline::analyse)?;
    let twin = slice::twin::build(graph, facts, anatomy, &kept, &sliced, &BTreeSet::new());
    let options = SessionOptions { threads: 1, ..SessionOptions::default() };
    let run = |graph: &Graph| -> Result<Vec<f32>> {
        let outputs = open_graph(RuntimeName::Ort, graph, &options)?.run(feed)?;
        Ok(outputs.first().ok_or("no output")?.1.as_f32())
    };
    let (out, expected) = (run(&sliced.graph)?, run(&twin)?);
    let largest = expected.iter().fold(0f32, |m, v| m.max(v.abs()));
    let error = out.iter().zip(&expected).fold(0f32, |m, (a, b)| m.max((a - b).abs())) / largest;
    if error.is_nan() || error > 1e-4 {
        return Err(format!("{name}: differs from its twin by {error:.1e}").into());
    }
    let (facts, _) = pipeline::analyse(&sliced.graph)?;
    Ok(contender(name, sliced.graph, &facts))
}

/// Times of every model. Unit: milliseconds, by model and round.
fn in_turn(contenders: &[Contender], threads: usize, rounds: usize, feed: &Feed) -> Result<Vec<Vec<f64>>> {
    let options = SessionOptions { threads, ..SessionOptions::default() };
    let opened = contenders.iter().map(|c| open_graph(RuntimeName::Ort, &c.graph, &options));
    let mut sessions: Vec<Box<dyn Session>> = opened.collect::<std::result::Result<_, _>>()?;
    let mut times = vec![Vec::new(); sessions.len()];
    for round in 0..rounds + 3 {
        let forwards = 0..sessions.len();
        let order: Vec<usize> = if round % 2 == 0 { forwards.collect() } else { forwards.rev().collect() };
        for i in order {
            let before = Instant::now();
            sessions[i].run(feed)?;
            // The first rounds warm up.
            if round >= 3 {
                times[i].push(before.elapsed().as_secs_f64() * 1e3);
            }
        }
    }
    Ok(times)
}

/// The values below which these shares lie: 5 %, a half, 95 %.
fn spread(values: impl Iterator<Item = f64>) -> [f64; 3] {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    [0.05, 0.5, 0.95].map(|share| sorted[(share * (sorted.len() - 1) as f64).round() as usize])
}

fn table(contenders: &[Contender], threads: usize, times: &[Vec<f64>]) {
    println!("\n{threads} thread{}\n", if threads == 1 { "" } else { "s" });
    println!("| model | params | MACs | nodes | ms, median | of the original's time, median (5 % to 95 %) | n |");
    println!("|---|---|---|---|---|---|---|");
    for (c, of_model) in contenders.iter().zip(times) {
        let [_, ms, _] = spread(of_model.iter().copied());
        let [low, ratio, high] = spread(of_model.iter().zip(&times[0]).map(|(a, b)| a / b));
        let macs = c.cost.macs.map_or("?".into(), |m| format!("{:.2} G", m as f64 / 1e9));
        let params = c.cost.params as f64 / 1e6;
        println!(
            "| {} | {params:.2} M | {macs} | {} | {ms:.1} | {ratio:.2} ({low:.2} to {high:.2}) | {} |",
            c.name,
            c.nodes,
            of_model.len()
        );
    }
}
