//! Options of training, shared by `search`, `finetune` and `slim`.

use super::augment::TieArg;
use super::failure::Failure;
use super::options::{EngineArgs, kind_amounts, kinds};
use crate::anatomy::Kind;
use crate::search::{Config, FinetuneConfig, LossChoice, Schedule, Tie, TrainChoice};

/// How images are disturbed, and chance.
#[derive(Debug, clap::Args)]
pub(super) struct StepArgs {
    /// Images of a step
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=65536))]
    batch: Option<u32>,
    /// Rate of the weights
    #[arg(long, value_name = "X")]
    lr: Option<f64>,
    /// Stop after this many steps
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    max_steps: Option<u64>,
    /// Seed of order and augmentation
    #[arg(long)]
    seed: Option<u64>,
    /// Move images by up to this many pixels
    #[arg(long, value_name = "PIXELS")]
    shift: Option<usize>,
    /// Mirror images with probability one half
    #[arg(long)]
    flip: bool,
    /// Decay of moving averages of the weights, which are then the result
    #[arg(long, value_name = "X")]
    ema: Option<f64>,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum TrainArg {
    /// All weights
    All,
    /// Scale and bias of normalizations
    Norm,
    /// Nothing but gates
    Gates,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum LossArg {
    /// Cross entropy against labels
    Ce,
    /// KL divergence from the original
    Kd,
    /// Squared error from the original's outputs
    Mse,
    /// Cosine distance from the original's outputs
    Cosine,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum ScheduleArg {
    /// Half a cosine down to 0
    Cosine,
    /// The same rate throughout
    Constant,
}

/// What only a search has.
#[derive(Debug, clap::Args)]
pub(super) struct GateArgs {
    /// Passes over the data [default: 3]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    epochs: Option<u32>,
    /// Rate of the gates [default: so that a gate can go from 1 to 0 within the run]
    #[arg(long, value_name = "X")]
    gate_lr: Option<f64>,
    /// Weight of the penalty by kind
    #[arg(long, value_name = "mlp=X,..")]
    l1: Option<String>,
    /// Which groups share a gate
    #[arg(long)]
    tie: Option<TieArg>,
    /// What trains besides gates
    #[arg(long)]
    train: Option<TrainArg>,
    /// What is minimized [default: ce where there are labels, else kd]
    #[arg(long)]
    loss: Option<LossArg>,
    /// How the rate goes over the steps
    #[arg(long)]
    schedule: Option<ScheduleArg>,
    /// Passes whose gradients make one step
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    accumulate: Option<u32>,
    /// Steps between two checkpoints
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    checkpoint_every: Option<u64>,
}

/// Kinds that get gates, as a word list.
pub(super) fn gate_kinds(words: &str) -> Result<Vec<Kind>, Failure> {
    Ok(kinds("--gates", words)?.into_iter().collect())
}

/// The settings that flags change, over `base`.
pub(super) fn search_config(base: Config, gates: &GateArgs, steps: &StepArgs, engine: &EngineArgs) -> Result<Config, Failure> {
    let mut c = base;
    c.epochs = gates.epochs.unwrap_or(c.epochs);
    c.batch = steps.batch.map_or(c.batch, |b| b as usize);
    c.lr = steps.lr.unwrap_or(c.lr);
    c.gate_lr = gates.gate_lr.or(c.gate_lr);
    c.max_steps = steps.max_steps.or(c.max_steps);
    c.accumulate = gates.accumulate.map_or(c.accumulate, |n| n as usize);
    c.checkpoint_every = gates.checkpoint_every.unwrap_or(c.checkpoint_every);
    c.seed = steps.seed.unwrap_or(c.seed);
    c.shift = steps.shift.unwrap_or(c.shift);
    c.flip |= steps.flip;
    c.ema = steps.ema.or(c.ema);
    if let Some(l1) = &gates.l1 {
        c.l1 = kind_amounts("--l1", l1)?;
    }
    if let Some(tie) = gates.tie {
        c.tie = if tie == TieArg::Qkv { Tie::Qkv } else { Tie::None };
    }
    if let Some(train) = gates.train {
        c.train = match train {
            TrainArg::All => TrainChoice::All,
            TrainArg::Norm => TrainChoice::Norm,
            TrainArg::Gates => TrainChoice::Gates,
        };
    }
    if let Some(loss) = gates.loss {
        c.loss = Some(match loss {
            LossArg::Ce => LossChoice::Ce,
            LossArg::Kd => LossChoice::Kd,
            LossArg::Mse => LossChoice::Mse,
            LossArg::Cosine => LossChoice::Cosine,
        });
    }
    if let Some(schedule) = gates.schedule {
        c.schedule = match schedule {
            ScheduleArg::Cosine => Schedule::Cosine,
            ScheduleArg::Constant => Schedule::Constant,
        };
    }
    c.device = engine.device_word("auto");
    engine.device("auto")?;
    c.threads = engine.threads();
    c.check().map_err(|e| Failure::bad("V0003", None, flag_of(&e.to_string())))?;
    Ok(c)
}

/// Settings of a fine-tuning.
pub(super) fn finetune_config(steps: &StepArgs, engine: &EngineArgs) -> Result<FinetuneConfig, Failure> {
    let mut c = FinetuneConfig::default();
    c.batch = steps.batch.map_or(c.batch, |b| b as usize);
    c.lr = steps.lr.unwrap_or(c.lr);
    c.max_steps = steps.max_steps;
    c.seed = steps.seed.unwrap_or(0);
    c.shift = steps.shift.unwrap_or(0);
    c.flip = steps.flip;
    c.ema = steps.ema;
    c.device = engine.device_word("auto");
    engine.device("auto")?;
    c.threads = engine.threads();
    if !(c.lr.is_finite() && c.lr > 0.0) {
        return Err(Failure::bad("V0003", None, format!("--lr: is {}, expected a number above 0", c.lr)));
    }
    Ok(c)
}

/// A key of the settings as the flag that sets it: `gate_lr: is 0` becomes `--gate-lr: is 0`.
fn flag_of(message: &str) -> String {
    match message.split_once(": ") {
        Some((key, reason)) if !key.contains('/') => format!("--{}: {reason}", key.replace('_', "-")),
        _ => message.to_string(),
    }
}
