//! Settings of a search: what `config.toml` of a run directory holds.
//!
//! Example, as a file: `epochs = 3`, `batch = 64`, `lr = 0.0002`, `gates = ["mlp", "qk", "vo"]`, and a table `[l1]` with
//! `mlp = 1.0`. Keys that are left out have their defaults; unknown keys are refused.
//! The effective settings are those with everything decided that depends on model and data: loss, batch, rate of the gates.

use super::SearchError;
use crate::anatomy::Kind;
use crate::data::Augment;
use crate::runtime::Device;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// How the rate goes over the steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// Half a cosine, from the rate to 0.
    Cosine,
    /// The same rate throughout, as in the paper.
    Constant,
}

/// Which groups share a gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tie {
    /// None.
    None,
    /// `qk` and `vo` of a layer, as in the paper.
    Qkv,
}

/// What trains besides the gates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TrainChoice {
    /// All weights.
    All,
    /// Scale and bias of normalizations.
    Norm,
    /// Nothing.
    Gates,
}

/// What is minimized.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LossChoice {
    /// Cross entropy against labels.
    Ce,
    /// Distillation from the original: KL of its class probabilities.
    Kd,
    /// Squared error against the original's outputs.
    Mse,
    /// Cosine distance from the original's outputs.
    Cosine,
}

/// Settings of a search.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Of this file's format.
    pub schema_version: u32,
    /// Passes over the data.
    pub epochs: u32,
    /// Stops after this many steps; the schedule is that of the shorter run.
    pub max_steps: Option<u64>,
    /// Images of one forward and backward pass.
    pub batch: usize,
    /// Passes whose gradients are averaged into one step.
    pub accumulate: usize,
    /// Rate of the weights.
    pub lr: f64,
    /// Rate of the gates. Left out: 6 over the number of steps, between `lr` and 0.02, so that a gate can go from 1 to 0 also in a
    /// short run.
    pub gate_lr: Option<f64>,
    /// Share of the steps over which the rate rises from 0.
    pub warmup: f64,
    /// How the rate goes then.
    pub schedule: Schedule,
    /// Decoupled weight decay of contracted weights, per unit of rate. Gates have none.
    pub weight_decay: f64,
    /// Largest norm of the gradient; left out: not clipped.
    pub clip: Option<f64>,
    /// Which groups share a gate.
    pub tie: Tie,
    /// What trains besides the gates.
    pub train: TrainChoice,
    /// Left out: `ce` where the data has labels, else `kd`.
    pub loss: Option<LossChoice>,
    /// Kinds that get gates.
    pub gates: Vec<Kind>,
    /// Decay of moving averages of gates and weights, which are then the result; left out: none.
    pub ema: Option<f64>,
    /// Share of the images that do not train: a fine-tuning that follows judges on them (see [`Dataset::hold_out`]), which it could not
    /// do on images that the search has seen.
    ///
    /// [`Dataset::hold_out`]: crate::data::Dataset::hold_out
    pub held_out: f64,
    /// Decides order and augmentation.
    pub seed: u64,
    /// Images are moved by up to this many pixels.
    pub shift: usize,
    /// Images are mirrored with probability one half.
    pub flip: bool,
    /// Steps between two checkpoints.
    pub checkpoint_every: u64,
    /// `cpu`, `cuda:N` or `auto`.
    pub device: String,
    /// Threads of the engine; 0 for as many as the process may use.
    pub threads: usize,
    /// Weight of the l1 penalty by kind: the loss gets `l1 * mean |gate|` over all gates of the kind.
    pub l1: BTreeMap<Kind, f64>,
}

/// Of `config.toml`.
pub const CONFIG_SCHEMA: u32 = 1;
/// Rate of the gates where it is not given: this over the number of steps ..
const GATE_TRAVEL: f64 = 6.0;
/// .. but not above this.
const GATE_LR_MAX: f64 = 0.02;
/// The penalty where a kind has none in the table. The paper's weights per gate, 2e-4 and 5e-5, are 0.92 of the mean on DeiT-S, of
/// which its four processes apply a quarter each.
const DEFAULT_L1: f64 = 0.25;

impl Default for Config {
    fn default() -> Self {
        Self {
            schema_version: CONFIG_SCHEMA,
            epochs: 3,
            max_steps: None,
            batch: 64,
            accumulate: 1,
            lr: 2e-4,
            gate_lr: None,
            warmup: 0.05,
            schedule: Schedule::Cosine,
            weight_decay: 1e-3,
            clip: Some(1.0),
            tie: Tie::None,
            train: TrainChoice::All,
            loss: None,
            gates: vec![Kind::Mlp, Kind::Qk, Kind::Vo],
            ema: None,
            held_out: 0.1,
            seed: 0,
            shift: 0,
            flip: false,
            checkpoint_every: 200,
            device: "cpu".to_string(),
            threads: 0,
            l1: BTreeMap::new(),
        }
    }
}

impl Config {
    /// Reads `config.toml` of a run directory: the effective settings of that run.
    ///
    /// Errors: [`SearchError::Io`], [`SearchError::Config`].
    pub fn read(run_dir: &Path) -> Result<Self, SearchError> {
        let file = run_dir.join(super::rundir::CONFIG);
        let text = std::fs::read_to_string(&file).map_err(|source| SearchError::Io { file: file.clone(), source })?;
        Self::from_toml(&text).map_err(|reason| SearchError::Config { key: file.display().to_string(), reason })
    }

    /// Reads the text of a `config.toml`. Errors: the parser's words, in one line.
    pub fn from_toml(text: &str) -> Result<Self, String> {
        toml::from_str(text).map_err(|e: toml::de::Error| e.message().split_whitespace().collect::<Vec<_>>().join(" "))
    }

    /// The text of its `config.toml`.
    pub fn to_toml(&self) -> Result<String, SearchError> {
        toml::to_string(self).map_err(|e| SearchError::Config { key: "config.toml".to_string(), reason: e.to_string() })
    }

    /// Where to run.
    ///
    /// Errors: [`SearchError::Config`] for another word.
    pub fn device(&self) -> Result<Device, SearchError> {
        parse_device(&self.device)
    }

    /// Checks what does not depend on model and data.
    ///
    /// Errors: [`SearchError::Config`] with the first key that is wrong.
    pub fn check(&self) -> Result<(), SearchError> {
        let bad = |key: &str, reason: String| Err(SearchError::Config { key: key.to_string(), reason });
        if self.schema_version > CONFIG_SCHEMA {
            return bad("schema_version", format!("is {}, this vitrim knows {CONFIG_SCHEMA}", self.schema_version));
        }
        for (key, value) in
            [("epochs", u64::from(self.epochs)), ("batch", self.batch as u64), ("accumulate", self.accumulate as u64)]
        {
            if value == 0 {
                return bad(key, "is 0, expected 1 or more".into());
            }
        }
        if self.checkpoint_every == 0 || self.max_steps == Some(0) {
            let key = if self.checkpoint_every == 0 { "checkpoint_every" } else { "max_steps" };
            return bad(key, "is 0, expected 1 or more".into());
        }
        let rates = [("lr", Some(self.lr)), ("gate_lr", self.gate_lr), ("clip", self.clip)];
        for (key, value) in rates.into_iter().filter_map(|(key, v)| v.map(|v| (key, v))) {
            if !(value.is_finite() && value > 0.0) {
                return bad(key, format!("is {value}, expected a number above 0"));
            }
        }
        let shares = [("warmup", Some(self.warmup)), ("ema", self.ema), ("held_out", Some(self.held_out))];
        for (key, value) in shares.into_iter().filter_map(|(key, v)| v.map(|v| (key, v))) {
            if !(0.0..1.0).contains(&value) {
                return bad(key, format!("is {value}, expected at least 0 and below 1"));
            }
        }
        let amounts = self.l1.iter().map(|(kind, l1)| (format!("l1.{}", kind.as_str()), *l1));
        for (key, value) in amounts.chain([("weight_decay".to_string(), self.weight_decay)]) {
            if !(value.is_finite() && value >= 0.0) {
                return bad(&key, format!("is {value}, expected 0 or more"));
            }
        }
        if self.gates.is_empty() {
            return bad("gates", "is empty, expected at least one kind".into());
        }
        self.device().map(drop)
    }

    /// The penalty of a kind.
    pub fn l1_of(&self, kind: &str) -> f64 {
        let own = Kind::from_word(kind).and_then(|k| self.l1.get(&k));
        own.copied().unwrap_or(DEFAULT_L1)
    }

    /// The settings with all that the number of steps decides.
    pub(crate) fn decided(mut self, steps: u64, loss: LossChoice) -> Self {
        let scaled = (GATE_TRAVEL / steps.max(1) as f64).clamp(self.lr.min(GATE_LR_MAX), GATE_LR_MAX);
        self.gate_lr.get_or_insert(scaled);
        self.loss.get_or_insert(loss);
        for kind in self.gates.clone() {
            self.l1.entry(kind).or_insert(DEFAULT_L1);
        }
        self
    }

    /// The augmentation, if there is any.
    pub(crate) fn augment(&self) -> Option<Augment> {
        (self.shift > 0 || self.flip).then_some(Augment { shift: self.shift, flip: self.flip })
    }
}

/// `cpu`, `auto`, `cuda` or `cuda:N` as a device.
///
/// Errors: [`SearchError::Config`] for another word.
pub fn parse_device(word: &str) -> Result<Device, SearchError> {
    let number = |n: &str| n.parse::<u32>().ok();
    let device = match word {
        "cpu" => Some(Device::Cpu),
        "auto" => Some(Device::Auto),
        "cuda" => Some(Device::Cuda(0)),
        other => other.strip_prefix("cuda:").and_then(number).map(Device::Cuda),
    };
    device.ok_or_else(|| SearchError::Config {
        key: "device".to_string(),
        reason: format!("is '{}', expected cpu, cuda:N or auto", word.escape_debug()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_survive_their_file() {
        let given = Config { l1: BTreeMap::from([(Kind::Mlp, 2.0)]), ..Config::default() }.decided(375, LossChoice::Kd);
        let text = given.to_toml().expect("it can be written");
        assert_eq!(Config::from_toml(&text), Ok(given.clone()));
        assert_eq!((given.gate_lr, given.loss), (Some(0.016), Some(LossChoice::Kd)));
        assert_eq!((given.l1_of("mlp"), given.l1_of("qk")), (2.0, 0.25));
    }

    #[test]
    fn long_runs_take_the_papers_single_rate() {
        let config = Config { lr: 5e-4, ..Config::default() }.decided(62_500, LossChoice::Ce);
        assert_eq!(config.gate_lr, Some(5e-4));
    }

    #[test]
    fn wrong_settings_are_named() {
        let key = |config: Config| match config.check() {
            Err(SearchError::Config { key, .. }) => key,
            other => format!("{other:?}"),
        };
        assert_eq!(key(Config { epochs: 0, ..Config::default() }), "epochs");
        assert_eq!(key(Config { lr: f64::NAN, ..Config::default() }), "lr");
        assert_eq!(key(Config { warmup: 1.0, ..Config::default() }), "warmup");
        assert_eq!(key(Config { gates: vec![], ..Config::default() }), "gates");
        assert_eq!(key(Config { device: "gpu".into(), ..Config::default() }), "device");
        assert_eq!(key(Config { l1: BTreeMap::from([(Kind::Qk, -1.0)]), ..Config::default() }), "l1.qk");
        assert!(Config::from_toml("epoch = 3").is_err_and(|e| e.contains("epoch")));
        assert!(Config::default().check().is_ok());
    }
}
