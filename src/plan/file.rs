//! plan.json: which units stay, and why. It can be written by hand, diffed, and applied again.

use super::choose::Measure;
use crate::anatomy::{Anatomy, Group, Kind};
use crate::exact::Saving;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// The version of the JSON names that this build writes and reads.
pub const SCHEMA_VERSION: u32 = 1;

/// Units kept of each group that loses some.
pub type Kept = BTreeMap<String, Vec<usize>>;

/// Which units of which groups stay.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Version of the JSON names.
    pub schema_version: u32,
    /// The model that it was made for.
    pub model_sha256: String,
    /// What was asked for and what it will cost.
    #[serde(default)]
    pub budget: Budget,
    /// Kept units by group id; groups that are not named are kept whole.
    pub groups: BTreeMap<String, KeptUnits>,
    /// How heads may differ.
    #[serde(default)]
    pub layout: Layout,
    /// Basis of q, k, v: `original`.
    #[serde(default = "original")]
    pub basis: String,
    /// Seed of the scores, where they are random.
    #[serde(default)]
    pub seed: u64,
    /// Where trained or folded weights come from.
    #[serde(default)]
    pub weights: Option<Weights>,
    /// Tensors whose kept values differ from the model's.
    #[serde(default)]
    pub edited: Vec<Edited>,
    /// Constants that several nodes read in the model and that became one each, before anything was cut.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub split: Vec<Split>,
    /// Savings that change no output, made after the cut.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exact: Vec<Saving>,
}

/// How the heads of an attention layer may differ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// Every head of a layer keeps the same number of dims.
    #[default]
    Equal,
    /// Whole heads may go; those that stay keep the same number of dims.
    Drop,
    /// Heads keep dims of their own; those of one width are computed together, in products of their own.
    Grouped,
}

fn original() -> String {
    "original".into()
}

/// What was asked for and what it will cost.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Budget {
    /// As asked: `macs=0.5`, `mlp=0.5,qk=0.5`.
    pub asked: String,
    /// Parameters, MACs and bytes, before and after.
    pub promised: Promised,
    /// How curves of losses decided, where they did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocation: Option<Allocation>,
    /// What the widths did not allow.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// How curves of losses decided.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Allocation {
    /// Where the curves come from: `measured`, `predicted`.
    pub curves: String,
    /// The way that was taken.
    pub way: Way,
    /// Loss that the curves predict of the greedy way.
    pub greedy_loss: f64,
    /// Loss that the curves predict of the dynamic program; absent where it found nothing.
    pub dynamic_loss: Option<f64>,
}

/// A way to meet a budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Way {
    /// Along the convex hulls of loss against cost.
    Greedy,
    /// Dynamic programming over what is saved.
    Dynamic,
}

impl Way {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Way::Greedy => "greedy",
            Way::Dynamic => "dynamic",
        }
    }
}

/// Cost before and after.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Promised {
    /// Parameters.
    pub params: BeforeAfter,
    /// MACs per sample; absent where a size is not known.
    pub macs: Option<BeforeAfter>,
    /// Bytes of constants as they are stored; absent in plans that did not count them.
    #[serde(default)]
    pub bytes: Option<BeforeAfter>,
}

impl Promised {
    /// What is left of a measure, as a fraction; `None` where it is not known.
    pub fn share(&self, measure: Measure) -> Option<f64> {
        let count = match measure {
            Measure::Macs => self.macs,
            Measure::Params => Some(self.params),
            Measure::Bytes => self.bytes,
        };
        count.map(|c| c.after as f64 / c.before.max(1) as f64)
    }
}

/// A number before and after a cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BeforeAfter {
    /// Before.
    pub before: u64,
    /// After.
    pub after: u64,
}

/// Kept units of a group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptUnits {
    /// Indices, ascending.
    pub kept: Vec<usize>,
    /// How many units there are.
    pub of: usize,
}

/// A file of weights.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Weights {
    /// Its path.
    pub path: String,
    /// Its hash.
    pub sha256: String,
}

/// A tensor whose kept values differ from the model's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Edited {
    /// Its name in the model.
    pub initializer: String,
    /// `folded`, `trained`, `finetuned`, or several of them.
    pub why: String,
}

/// A copy of a constant for some of its readers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Split {
    /// The constant's name in the model.
    pub initializer: String,
    /// Name of the copy.
    pub copy: String,
    /// Who reads the copy.
    pub uses: Vec<SplitUse>,
}

/// An input of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SplitUse {
    /// Name of the node's first output.
    pub output: String,
    /// Which of its inputs.
    pub slot: usize,
}

/// Why a plan cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlanFileError {
    /// Not readable.
    #[error("{file}: {cause}")]
    Io {
        /// The file.
        file: String,
        /// The cause.
        cause: std::io::Error,
    },
    /// Not a plan.
    #[error("{file}: not a plan: {cause}")]
    Malformed {
        /// The file.
        file: String,
        /// The cause.
        cause: String,
    },
    /// Made for another model.
    #[error("{file}: belongs to model sha256 {asked}.., not {found}..")]
    OtherModel {
        /// The file.
        file: String,
        /// First digits of the hash in the plan.
        asked: String,
        /// First digits of the hash of the model.
        found: String,
    },
    /// The group has another number of units.
    #[error("{file}: group '{group}' has {found} units, the plan says {asked}")]
    OtherSize {
        /// The file.
        file: String,
        /// The group.
        group: String,
        /// Units in the plan.
        asked: usize,
        /// Units in the model.
        found: usize,
    },
    /// Heads of a layer keep different numbers of dims.
    #[error(
        "{file}: plan keeps {one} dims in one head of group '{group}' and {other} in another: layout 'equal' needs the same number"
    )]
    Unequal {
        /// The file.
        file: String,
        /// The group.
        group: String,
        /// Number in one head.
        one: usize,
        /// Number in another.
        other: usize,
    },
}

impl Plan {
    /// A plan without groups.
    pub fn empty(model_sha256: &str) -> Self {
        Self {
            schema_version: SCHEMA_VERSION,
            model_sha256: model_sha256.to_string(),
            budget: Budget::default(),
            groups: BTreeMap::new(),
            layout: Layout::default(),
            basis: original(),
            seed: 0,
            weights: None,
            edited: Vec::new(),
            split: Vec::new(),
            exact: Vec::new(),
        }
    }

    /// Reads a plan.
    pub fn read(path: &Path) -> Result<Self, PlanFileError> {
        let file = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|cause| PlanFileError::Io { file: file.clone(), cause })?;
        let plan: Self =
            serde_json::from_str(&text).map_err(|e| PlanFileError::Malformed { file: file.clone(), cause: e.to_string() })?;
        if plan.schema_version > SCHEMA_VERSION {
            let cause = format!("written with schema {}, this build reads {SCHEMA_VERSION}", plan.schema_version);
            return Err(PlanFileError::Malformed { file, cause });
        }
        Ok(plan)
    }

    /// Checks that the plan was made for this model.
    pub fn check(&self, path: &Path, sha256: &str, anatomy: &Anatomy) -> Result<(), PlanFileError> {
        self.check_model(path, sha256)?;
        self.check_groups(path, anatomy)
    }

    /// Checks that the plan was made for the model file with this hash.
    pub fn check_model(&self, path: &Path, sha256: &str) -> Result<(), PlanFileError> {
        if self.model_sha256.is_empty() || self.model_sha256 == sha256 {
            return Ok(());
        }
        let start = |s: &str| s.chars().take(8).collect::<String>();
        let file = path.display().to_string();
        Err(PlanFileError::OtherModel { file, asked: start(&self.model_sha256), found: start(sha256) })
    }

    /// Checks that the model's groups have as many units as the plan says.
    pub fn check_groups(&self, path: &Path, anatomy: &Anatomy) -> Result<(), PlanFileError> {
        for g in &anatomy.groups {
            if let Some(kept) = self.groups.get(&g.id).filter(|kept| g.units() != kept.of) {
                let file = path.display().to_string();
                return Err(PlanFileError::OtherSize { file, group: g.id.clone(), asked: kept.of, found: g.units() });
            }
        }
        match self.layout {
            Layout::Equal | Layout::Drop => self.check_equal(path.display().to_string(), anatomy),
            Layout::Grouped => Ok(()),
        }
    }

    /// Every head that stays keeps the same number of dims.
    fn check_equal(&self, file: String, anatomy: &Anatomy) -> Result<(), PlanFileError> {
        let group_of = |id: &str| anatomy.groups.iter().find(|g| g.id == id);
        for (id, kept) in &self.groups {
            let Some(group) = group_of(id).filter(|g| g.nest_count() > 1) else { continue };
            let width = group.stored.len();
            let mut counts = vec![0usize; group.nest_count()];
            kept.kept.iter().filter_map(|u| u.checked_div(width)).for_each(|head| {
                if let Some(n) = counts.get_mut(head) {
                    *n += 1;
                }
            });
            // Heads that go as a whole keep what they like.
            let mut left = counts.into_iter().enumerate().filter(|(row, _)| !self.is_row_gone(anatomy, group, *row));
            let Some((_, one)) = left.next() else { continue };
            if let Some((_, other)) = left.find(|(_, n)| *n != one) {
                return Err(PlanFileError::Unequal { file, group: id.clone(), one, other });
            }
        }
        Ok(())
    }

    /// Whether a head that the units of `group` are numbered by goes as a whole.
    fn is_row_gone(&self, anatomy: &Anatomy, group: &Group, row: usize) -> bool {
        let mut rest = row;
        group.nest.iter().rev().any(|(class, size)| {
            let at = rest % size;
            rest /= size;
            let of_class = anatomy.groups.iter().filter(|g| g.leaf == *class && g.kind != Kind::Token);
            of_class.filter_map(|g| self.groups.get(&g.id)).any(|k| !k.kept.contains(&at))
        })
    }

    /// Kept units of the groups that lose some.
    pub fn kept(&self) -> Kept {
        self.groups.iter().filter(|(_, k)| k.kept.len() < k.of).map(|(id, k)| (id.clone(), k.kept.clone())).collect()
    }
}
