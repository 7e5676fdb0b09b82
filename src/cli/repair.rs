//! Flags of commands that look at images without training.

use crate::curves::How;
use crate::pipeline::{BasisChoice, Compensation};
use clap::builder::TypedValueParser;

/// In which basis dims of heads are cut.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(super) enum BasisArg {
    /// That of the data where it is proven to leave the function as it is
    Auto,
    /// That of the data; an error where that cannot be
    Rotated,
    /// That of the model
    Original,
}

impl From<BasisArg> for BasisChoice {
    fn from(word: BasisArg) -> Self {
        match word {
            BasisArg::Auto => BasisChoice::Auto,
            BasisArg::Rotated => BasisChoice::Rotated,
            BasisArg::Original => BasisChoice::Original,
        }
    }
}

/// Where losses of cuts come from.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(super) enum CurvesArg {
    /// The model runs with each group cut and repaired
    Measured,
    /// Errors of layers times how much the output feels of them; measured where the model has no such gradient
    Predicted,
}

impl From<CurvesArg> for How {
    fn from(word: CurvesArg) -> Self {
        match word {
            CurvesArg::Measured => How::Measured,
            CurvesArg::Predicted => How::Predicted,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Switch {
    /// Yes
    On,
    /// No
    Off,
}

/// How a cut is repaired.
#[derive(Debug, clap::Args)]
pub(super) struct RepairArgs {
    /// Images to look at, drawn by the seed; labels are not read
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(2..=1_000_000).map(|n| n as usize))]
    pub(super) images: usize,
    /// In which basis dims of heads are cut
    #[arg(long, value_enum, default_value_t = BasisArg::Auto)]
    pub(super) basis: BasisArg,
    /// Whether the weights behind a cut make up for it
    #[arg(long, value_enum, default_value_t = Switch::On)]
    compensate: Switch,
    /// Whether layers are repaired one after the other, each behind what was already cut; off is faster
    #[arg(long, value_enum, default_value_t = Switch::On)]
    sequential: Switch,
}

impl RepairArgs {
    /// How layers are repaired.
    pub(super) fn how(&self) -> Compensation {
        match (self.compensate, self.sequential) {
            (Switch::Off, _) => Compensation::Off,
            (Switch::On, Switch::Off) => Compensation::AtOnce,
            (Switch::On, Switch::On) => Compensation::InOrder,
        }
    }
}
