//! `vitrim augment`: a training graph that any ONNX Runtime runs.

use super::failure::Failure;
use super::options::{ForceArgs, SizeArgs, kinds};
use super::talk::Talk;
use super::{Verdict, interrupt, print_json};
use crate::autodiff::loss::Loss;
use crate::autodiff::update::AdamW;
use crate::graph::{DType, DeclaredDim};
use crate::onnx;
use crate::pipeline::{self, AugmentAsk};
use crate::supernet::{Options, Supernet, Train};
use serde_json::{Value, json};
use std::path::PathBuf;

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum TrainArg {
    /// Gates only
    Gates,
    /// Gates, and scale and bias of normalizations
    Norm,
    /// Gates and all weights
    All,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(super) enum LossArg {
    /// Cross entropy against labels
    Ce,
    /// KL divergence from the original's class scores
    Kd,
    /// Squared error against target outputs
    Mse,
    /// Cosine distance from target outputs
    Cosine,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum OptimizerArg {
    /// Gradients are outputs
    None,
    /// AdamW in the graph
    Adamw,
}

#[derive(Clone, Copy, Debug, PartialEq, clap::ValueEnum)]
pub(super) enum TieArg {
    /// Every group has a gate of its own
    None,
    /// qk and vo of a layer share one
    Qkv,
}

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The model
    model: PathBuf,
    /// The training graph
    #[arg(short, value_name = "FILE")]
    out: PathBuf,
    /// Kinds that get gates
    #[arg(long, value_name = "KIND,..", default_value = "mlp,qk,vo")]
    gates: String,
    /// Which groups share a gate
    #[arg(long, default_value = "none")]
    tie: TieArg,
    /// What trains
    #[arg(long, default_value = "gates")]
    train: TrainArg,
    /// What is minimized
    #[arg(long, default_value = "ce")]
    loss: LossArg,
    /// The optimizer in the graph
    #[arg(long, default_value = "none")]
    optimizer: OptimizerArg,
    /// Gates have a batch axis, so that one run has the gradients of each sample
    #[arg(long)]
    per_sample: bool,
    /// The output that the loss compares
    #[arg(long, value_name = "NAME")]
    output: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    sizes: SizeArgs,
    #[command(flatten)]
    force: ForceArgs,
}

pub(super) fn run(args: &Args, talk: &Talk) -> Result<Verdict, Failure> {
    let ask = ask(args)?;
    onnx::check_output(&args.out, std::slice::from_ref(&args.model), args.force.overwrite())?;
    let model = pipeline::load(&args.model, &args.sizes.sizes()?)?;
    model.loaded.warnings.iter().for_each(|w| talk.warn(w));
    onnx::check_output(&args.out, &model.loaded.files, args.force.overwrite())?;
    let net = pipeline::augment(&model, &ask)?;
    {
        let _guard = interrupt::writing();
        onnx::save(&net.graph, &args.out, args.force.overwrite())?;
    }
    for frozen in &net.frozen {
        talk.detail(format!("{} does not train: {}", frozen.initializer, frozen.reason));
    }
    if args.json {
        print_json(&report(&net))?;
    } else {
        let units: usize = net.gates.iter().map(|g| g.units).sum();
        talk.say(format!(
            "{}: {} gates of {units} units, {} weights train",
            args.out.display(),
            net.gates.len(),
            net.params.len()
        ));
    }
    Ok(Verdict::Done)
}

fn ask(args: &Args) -> Result<AugmentAsk, Failure> {
    let train = match args.train {
        TrainArg::Gates => Train::Gates,
        TrainArg::Norm => Train::Norm,
        TrainArg::All => Train::All,
    };
    let loss = match args.loss {
        LossArg::Ce => Loss::Ce,
        LossArg::Kd => Loss::Kd,
        LossArg::Mse => Loss::Mse,
        LossArg::Cosine => Loss::Cosine,
    };
    let optimizer = match args.optimizer {
        OptimizerArg::None => None,
        OptimizerArg::Adamw => Some(AdamW::default()),
    };
    Ok(AugmentAsk {
        kinds: kinds("--gates", &args.gates)?,
        tie_qkv: args.tie == TieArg::Qkv,
        options: Options { per_sample: args.per_sample, train, loss, optimizer, ..Options::default() },
        output: args.output.clone(),
    })
}

fn report(net: &Supernet) -> Value {
    let shape = |dims: &[DeclaredDim]| -> Vec<Value> {
        let one = |d: &DeclaredDim| match d {
            DeclaredDim::Size(n) => json!(n),
            DeclaredDim::Symbol(name) => json!(name),
        };
        dims.iter().map(one).collect()
    };
    let inputs: Vec<Value> = net
        .inputs
        .iter()
        .map(|i| json!({ "name": i.name, "shape": shape(&i.shape), "dtype": i.dtype.name(), "role": i.role }))
        .collect();
    let outputs: Vec<Value> = net
        .graph
        .outputs()
        .iter()
        .map(|v| {
            let value = net.graph.value(*v);
            let declared = value.declared();
            let dims = declared.and_then(|d| d.dims.as_deref()).unwrap_or_default();
            json!({ "name": value.name(), "shape": shape(dims), "dtype": declared.and_then(|d| d.dtype).map(DType::name) })
        })
        .collect();
    let gates: Vec<Value> = net
        .gates
        .iter()
        .flat_map(|g| g.groups.iter().map(|id| json!({ "group": id, "units": g.units, "input": g.input })))
        .collect();
    json!({ "schema_version": crate::plan::SCHEMA_VERSION, "inputs": inputs, "outputs": outputs, "gates": gates })
}
