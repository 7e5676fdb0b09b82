//! What a verification found, as it is written with `--json`.

use serde::{Serialize, Serializer};

use crate::verify::accuracy::Accuracy;
use crate::verify::feeds::InputSource;

/// The version of the JSON names that this build writes.
pub const SCHEMA_VERSION: u32 = 1;

/// The whole result.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Verdict {
    /// Version of the JSON names.
    pub schema_version: u32,
    /// At least one runtime could check, every check passed, and the floors hold.
    pub pass: bool,
    /// All comparisons.
    pub checks: Vec<Check>,
    /// Runtimes that could not check, or not everything.
    pub skipped: Vec<Skipped>,
    /// What is known of tensors that were changed on purpose.
    pub edits: Edits,
    /// OUT against MODEL on data.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<Accuracy>,
}

/// One output of OUT against that of the twin.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Check {
    /// `ort`, `tract`, or `weights` for the comparison of weights themselves.
    pub runtime: &'static str,
    /// The runtime's version.
    pub version: String,
    /// Where the inputs come from; absent for weights.
    pub input: Option<InputSource>,
    /// Samples.
    pub batch: usize,
    /// The output's name, or that of the weight.
    pub output: String,
    /// max|a - b|; `None` where an output is not finite or is missing.
    pub max_abs: Option<f64>,
    /// What `max_abs` may be: the relative tolerance times max|b|.
    pub tolerance: f64,
    /// Whether the same class wins in every row; `None` where the output has no rows of floats.
    pub argmax_agree: Option<bool>,
    /// Whether it holds.
    pub pass: bool,
    /// The original's own max|a - b| with the runtime's rewrites off and on, where that was measured.
    pub noise: Option<f64>,
    /// Why it does not hold.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// A runtime that could not check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Skipped {
    /// `ort`, `tract`.
    pub runtime: &'static str,
    /// Why.
    pub reason: String,
}

/// What is known of tensors that were changed on purpose.
#[derive(Clone, Debug, PartialEq)]
pub enum Edits {
    /// There are none.
    None,
    /// There are some, and no data to show what they do.
    Unproven,
    /// OUT with them against MODEL, on data.
    Measured {
        /// Samples.
        n: usize,
        /// Mean KL divergence. Unit: nats.
        kl: Option<f64>,
        /// Share of samples with the same winner.
        top1_agreement: f64,
    },
}

impl Serialize for Edits {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Measured {
            n: usize,
            kl: Option<f64>,
            top1_agreement: f64,
        }
        match *self {
            Edits::None => serializer.serialize_none(),
            Edits::Unproven => serializer.serialize_str("unproven"),
            Edits::Measured { n, kl, top1_agreement } => Measured { n, kl, top1_agreement }.serialize(serializer),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_json_has_the_names_of_the_contract() {
        let check = Check {
            runtime: "ort",
            version: "1.24.4".into(),
            input: Some(InputSource::Random),
            batch: 3,
            output: "logits".into(),
            max_abs: Some(0.5),
            tolerance: 1.0,
            argmax_agree: Some(true),
            pass: true,
            noise: None,
            reason: None,
        };
        let skipped = vec![Skipped { runtime: "tract", reason: "why".into() }];
        let verdict = |edits| Verdict {
            schema_version: SCHEMA_VERSION,
            pass: true,
            checks: vec![check.clone()],
            skipped: skipped.clone(),
            edits,
            accuracy: None,
        };
        let text = serde_json::to_string(&verdict(Edits::None)).unwrap();
        let expected = concat!(
            r#"{"schema_version":1,"pass":true,"checks":[{"runtime":"ort","version":"1.24.4","input":"random","batch":3,"#,
            r#""output":"logits","max_abs":0.5,"tolerance":1.0,"argmax_agree":true,"pass":true,"noise":null}],"#,
            r#""skipped":[{"runtime":"tract","reason":"why"}],"edits":null}"#
        );
        assert_eq!(text, expected);
        let edits = |edits| serde_json::to_value(verdict(edits)).unwrap()["edits"].clone();
        assert_eq!(edits(Edits::Unproven), "unproven");
        let measured = edits(Edits::Measured { n: 7, kl: Some(0.25), top1_agreement: 1.0 });
        assert_eq!(measured, serde_json::json!({"n": 7, "kl": 0.25, "top1_agreement": 1.0}));
    }
}
