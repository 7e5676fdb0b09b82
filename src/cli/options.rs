//! Options that several commands share, and how their texts are read.

use super::failure::Failure;
use super::talk::Talk;
use crate::anatomy::Kind;
use crate::cost::Sizes;
use crate::onnx::Overwrite;
use crate::pipeline::{self, DataChoice};
use crate::plan::{Fractions, Measure, Targets};
use crate::runtime::{self, Device, InstallOptions, LibraryChoice, Probe, RuntimeName, SessionOptions};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// Sizes of symbols.
#[derive(Debug, clap::Args)]
pub(super) struct SizeArgs {
    /// Size of a symbolic dimension, such as height=224
    #[arg(long = "size", value_name = "NAME=N")]
    sizes: Vec<String>,
}

impl SizeArgs {
    /// The sizes by name.
    pub(super) fn sizes(&self) -> Result<Sizes, Failure> {
        let mut out = Sizes::new();
        for text in &self.sizes {
            let parsed = text.split_once('=').and_then(|(name, n)| n.parse::<i64>().ok().filter(|n| *n > 0).map(|n| (name, n)));
            let (name, n) =
                parsed.ok_or_else(|| Failure::bad("V0001", None, format!("--size: '{text}': expected NAME=N, N at least 1")))?;
            out.insert(name.to_string(), n);
        }
        Ok(out)
    }
}

/// Whether an output may replace a file.
#[derive(Debug, clap::Args)]
pub(super) struct ForceArgs {
    /// Overwrite the output where it exists
    #[arg(long)]
    force: bool,
}

impl ForceArgs {
    /// As the writer wants it.
    pub(super) fn overwrite(&self) -> Overwrite {
        if self.force { Overwrite::Force } else { Overwrite::Refuse }
    }
}

/// Which ONNX Runtime, and where it runs.
#[derive(Debug, clap::Args)]
pub(super) struct EngineArgs {
    /// Where to run: auto, cpu or cuda:N
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// Threads of the engine [default: as many as the process may use]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// The ONNX Runtime library, a file or its folder
    #[arg(long, value_name = "FILE")]
    ort_lib: Option<PathBuf>,
    /// Never fetch anything
    #[arg(long)]
    offline: bool,
}

impl EngineArgs {
    /// Threads, 0 where it is left to the engine.
    pub(super) fn threads(&self) -> usize {
        self.threads.map_or(0, usize::from)
    }

    /// The device, or `default`.
    pub(super) fn device(&self, default: &str) -> Result<Device, Failure> {
        pipeline::device(self.device.as_deref().unwrap_or(default)).map_err(|_| {
            Failure::bad("V0003", None, format!("--device: '{}': expected auto, cpu or cuda:N", self.device_word(default)))
        })
    }

    /// The device as a word.
    pub(super) fn device_word(&self, default: &str) -> String {
        self.device.clone().unwrap_or_else(|| default.to_string())
    }

    /// The library as sessions take it.
    pub(super) fn library(&self) -> LibraryChoice {
        // Where the command cannot start itself a second time, a thread tries the library.
        let probe = std::env::current_exe().map_or(Probe::Thread, Probe::Child);
        LibraryChoice { file: self.ort_lib.clone(), probe }
    }

    /// How sessions are opened.
    pub(super) fn session(&self, default_device: &str) -> Result<SessionOptions, Failure> {
        Ok(SessionOptions {
            threads: self.threads(),
            device: self.device(default_device)?,
            library: self.library(),
            ..SessionOptions::default()
        })
    }

    /// Makes sure that ONNX Runtime is there and works, before any work; fetches it where that is allowed.
    pub(super) fn ready(&self, talk: &Talk) -> Result<(), Failure> {
        if !RuntimeName::Ort.is_built() {
            return Err(runtime::Error::NotBuilt { runtime: RuntimeName::Ort }.into());
        }
        let choice = self.library();
        let options = InstallOptions { cuda: false, offline: self.offline };
        let found = runtime::find_or_install(&choice, &options, &mut |step| talk.install(&step))?;
        runtime::preflight(&found.path, &choice.probe)?;
        Ok(())
    }
}

/// Where images come from and how they are read.
#[derive(Debug, clap::Args)]
pub(super) struct ReadArgs {
    /// The input that takes the images
    #[arg(long, value_name = "NAME")]
    input: Option<String>,
    /// The output with class scores
    #[arg(long, value_name = "NAME")]
    pub(super) output: Option<String>,
    /// A preprocessor_config.json or a timm config.json
    #[arg(long, value_name = "FILE")]
    preprocess: Option<PathBuf>,
    /// Mean by channel, subtracted from pixels in 0..1
    #[arg(long, value_name = "M[,M,M]", value_delimiter = ',', allow_negative_numbers = true)]
    mean: Option<Vec<f32>>,
    /// Standard deviation by channel
    #[arg(long, value_name = "S[,S,S]", value_delimiter = ',', allow_negative_numbers = true)]
    std: Option<Vec<f32>>,
    /// Stop at the first image that cannot be used
    #[arg(long)]
    strict_data: bool,
}

impl ReadArgs {
    /// As the pipeline takes it.
    pub(super) fn choice(&self, data: &std::path::Path) -> DataChoice {
        DataChoice {
            path: data.to_path_buf(),
            input: self.input.clone(),
            output: self.output.clone(),
            preprocess: self.preprocess.clone(),
            mean: self.mean.clone(),
            std: self.std.clone(),
            strict: self.strict_data,
        }
    }
}

/// A fraction: `0.5` or `50%`, greater than 0, at most 1.
pub(super) fn fraction(flag: &str, text: &str) -> Result<f64, Failure> {
    let number = match text.strip_suffix('%') {
        Some(percent) => percent.trim().parse::<f64>().map(|p| p / 100.0),
        None => text.trim().parse::<f64>(),
    };
    number
        .ok()
        .filter(|f| *f > 0.0 && *f <= 1.0)
        .ok_or_else(|| Failure::bad("V0002", None, format!("{flag}: '{text}' must be in (0,1], e.g. 0.5 or 50%")))
}

/// `key=value` pairs, separated by commas.
fn pairs<T>(flag: &str, text: &str, read: impl Fn(&str) -> Result<T, Failure>) -> Result<BTreeMap<String, T>, Failure> {
    let mut out = BTreeMap::new();
    for part in text.split(',') {
        let (key, value) = part
            .split_once('=')
            .ok_or_else(|| Failure::bad("V0002", None, format!("{flag}: '{part}': expected NAME=VALUE, e.g. {flag} mlp=0.5")))?;
        if out.insert(key.trim().to_string(), read(value)?).is_some() {
            return Err(Failure::bad("V0002", None, format!("{flag}: '{key}' is given twice")));
        }
    }
    Ok(out)
}

/// `key=fraction` pairs.
pub(super) fn fractions(flag: &str, text: &str) -> Result<BTreeMap<String, f64>, Failure> {
    pairs(flag, text, |value| fraction(flag, value))
}

/// One kind by its word.
pub(super) fn kind(flag: &str, word: &str) -> Result<Kind, Failure> {
    let words: Vec<&str> = Kind::ALL.iter().map(|k| k.as_str()).collect();
    let unknown = || Failure::bad("V0002", None, format!("{flag}: unknown kind '{word}'; kinds are {}", words.join(", ")));
    Kind::from_word(word.trim()).ok_or_else(unknown)
}

/// `mlp,qk,vo`.
pub(super) fn kinds(flag: &str, text: &str) -> Result<BTreeSet<Kind>, Failure> {
    text.split(',').map(|word| kind(flag, word)).collect()
}

/// `kind=fraction` pairs, and `kind.N=fraction` for one group.
pub(super) fn unit_fractions(flag: &str, text: &str) -> Result<Fractions, Failure> {
    let mut out = Fractions::default();
    for (word, f) in fractions(flag, text)? {
        match word.split_once('.') {
            Some((of, number)) if number.bytes().all(|b| b.is_ascii_digit()) && !number.is_empty() => {
                out.groups.insert(format!("{}.{number}", kind(flag, of)?.as_str()), f);
            }
            _ => drop(out.kinds.insert(kind(flag, &word)?, f)),
        }
    }
    Ok(out)
}

/// `kind=N` pairs, N a whole number.
pub(super) fn kind_widths(flag: &str, text: &str) -> Result<BTreeMap<Kind, usize>, Failure> {
    let number = |value: &str| {
        let parsed = value.trim().parse::<usize>().ok().filter(|n| *n > 0);
        parsed.ok_or_else(|| Failure::bad("V0002", None, format!("{flag}: '{value}' must be a whole number, 1 or more")))
    };
    pairs(flag, text, number)?.into_iter().map(|(word, n)| Ok((kind(flag, &word)?, n))).collect()
}

/// `kind=number` pairs, each 0 or more.
pub(super) fn kind_amounts(flag: &str, text: &str) -> Result<BTreeMap<Kind, f64>, Failure> {
    let number = |value: &str| {
        let parsed = value.trim().parse::<f64>().ok().filter(|x| x.is_finite() && *x >= 0.0);
        parsed.ok_or_else(|| Failure::bad("V0002", None, format!("{flag}: '{value}' must be a number, 0 or more")))
    };
    pairs(flag, text, number)?.into_iter().map(|(word, x)| Ok((kind(flag, &word)?, x))).collect()
}

/// `macs=0.5,params=0.5,bytes=0.5`, each where it is given.
pub(super) fn budget(text: &str) -> Result<Targets, Failure> {
    let measure = |word: &str| {
        let unknown = || Failure::bad("V0002", None, format!("--budget: unknown '{word}'; budgets are macs, params, bytes"));
        Measure::ALL.into_iter().find(|m| m.as_str() == word).ok_or_else(unknown)
    };
    fractions("--budget", text)?.into_iter().map(|(word, f)| Ok((measure(&word)?, f))).collect()
}

/// `ort,tract`; all runtimes of this build where it is not given.
pub(super) fn runtimes(text: Option<&str>) -> Result<Vec<RuntimeName>, Failure> {
    let all = [RuntimeName::Ort, RuntimeName::Tract];
    let Some(text) = text else { return Ok(all.into_iter().filter(|r| r.is_built()).collect()) };
    let one = |word: &str| {
        let unknown = || Failure::bad("V0002", None, format!("--runtimes: unknown runtime '{word}'; runtimes are ort, tract"));
        let runtime = all.into_iter().find(|r| r.feature() == word.trim()).ok_or_else(unknown)?;
        if runtime.is_built() { Ok(runtime) } else { Err(runtime::Error::NotBuilt { runtime }.into()) }
    };
    text.split(',').map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fractions_are_read_both_ways_and_bounded() {
        assert_eq!(fraction("--keep", "50%").ok(), Some(0.5));
        assert_eq!(fraction("--keep", "1").ok(), Some(1.0));
        for bad in ["0", "-0.5", "1.5", "NaN", "half", "150%"] {
            assert!(fraction("--keep", bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn kinds_and_amounts_have_names() {
        assert_eq!(kinds("--gates", "mlp, qk").map(|k| k.len()).ok(), Some(2));
        assert!(kinds("--gates", "mpl").is_err());
        assert_eq!(kind_amounts("--l1", "mlp=2").ok(), Some(BTreeMap::from([(Kind::Mlp, 2.0)])));
        assert!(kind_amounts("--l1", "mlp=-1").is_err());
        assert!(budget("macs=0.5,latency=1").is_err());
        assert_eq!(budget("macs=0.5,bytes=60%").ok(), Some(Targets::from([(Measure::Macs, 0.5), (Measure::Bytes, 0.6)])));
        let kept = unit_fractions("--keep", "mlp=0.5,qk.3=0.25").ok();
        let groups = BTreeMap::from([("qk.3".to_string(), 0.25)]);
        assert_eq!(kept, Some(Fractions { groups, ..Fractions::from([(Kind::Mlp, 0.5)]) }));
        assert!(unit_fractions("--keep", "qq.3=0.5").is_err() && unit_fractions("--keep", "qk.x=0.5").is_err());
        assert_eq!(kind_widths("--min-width", "mlp=64").ok(), Some(BTreeMap::from([(Kind::Mlp, 64)])));
        assert!(kind_widths("--min-width", "mlp=0.5").is_err());
    }
}
