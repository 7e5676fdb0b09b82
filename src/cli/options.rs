//! Options that several commands share, and how their texts are read.

use super::failure::Failure;
use crate::anatomy::Kind;
use crate::cost::Sizes;
use crate::onnx::Overwrite;
use std::collections::BTreeMap;

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
                parsed.ok_or_else(|| Failure::bad("V0001", None, format!("--size '{text}': expected NAME=N, N at least 1")))?;
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

/// A fraction: `0.5` or `50%`, greater than 0, at most 1.
pub(super) fn fraction(flag: &str, text: &str) -> Result<f64, Failure> {
    let number = match text.strip_suffix('%') {
        Some(percent) => percent.trim().parse::<f64>().map(|p| p / 100.0),
        None => text.trim().parse::<f64>(),
    };
    number
        .ok()
        .filter(|f| *f > 0.0 && *f <= 1.0)
        .ok_or_else(|| Failure::bad("V0002", None, format!("{flag} '{text}' must be in (0,1], e.g. 0.5 or 50%")))
}

/// `key=fraction` pairs, separated by commas.
pub(super) fn fractions(flag: &str, text: &str) -> Result<BTreeMap<String, f64>, Failure> {
    let mut out = BTreeMap::new();
    for part in text.split(',') {
        let (key, value) = part.split_once('=').ok_or_else(|| {
            Failure::bad("V0002", None, format!("{flag} '{part}': expected NAME=FRACTION, e.g. {flag} mlp=0.5"))
        })?;
        if out.insert(key.trim().to_string(), fraction(flag, value)?).is_some() {
            return Err(Failure::bad("V0002", None, format!("{flag}: '{key}' is given twice")));
        }
    }
    Ok(out)
}

/// `kind=fraction` pairs.
pub(super) fn kind_fractions(flag: &str, text: &str) -> Result<BTreeMap<Kind, f64>, Failure> {
    let kinds: Vec<&str> = Kind::ALL.iter().map(|k| k.as_str()).collect();
    fractions(flag, text)?
        .into_iter()
        .map(|(word, f)| {
            Kind::from_word(&word).map(|k| (k, f)).ok_or_else(|| {
                Failure::bad("V0002", None, format!("{flag}: unknown kind '{word}'; kinds are {}", kinds.join(", ")))
            })
        })
        .collect()
}
