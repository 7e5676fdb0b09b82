//! Flags of commands that look at images without training.

use super::failure::Failure;
use super::interrupt;
use super::options::{EngineArgs, ReadArgs};
use super::talk::Talk;
use crate::compensate::Repair;
use crate::curves::How;
use crate::data::Dataset;
use crate::pipeline::{self, BasisChoice, CalibrateAsk, Calibrating, Compensation, Model};
use crate::runtime::SessionOptions;
use clap::builder::TypedValueParser;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

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

/// Yes or no.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Switch {
    /// Yes
    On,
    /// No
    Off,
}

impl From<Switch> for Compensation {
    /// Layers in order, or all at once.
    fn from(word: Switch) -> Self {
        match word {
            Switch::On => Compensation::InOrder,
            Switch::Off => Compensation::AtOnce,
        }
    }
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
            (Switch::On, order) => order.into(),
        }
    }
}

/// The images that a command looks at, or what an earlier one left of them.
#[derive(Debug, clap::Args)]
pub(super) struct ImageArgs {
    /// An image folder or an .npz archive; labels are not read
    #[arg(long)]
    pub(super) data: Option<PathBuf>,
    /// Images to look at, drawn by the seed
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(2..=1_000_000).map(|n| n as usize))]
    images: usize,
    /// Holds the statistics of images: read where they are there, else left there
    #[arg(long, value_name = "DIR")]
    pub(super) run: Option<PathBuf>,
    /// Images of one run
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=65536).map(|n| n as usize))]
    batch: usize,
    /// Draws the images
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    read: ReadArgs,
    #[command(flatten)]
    engine: EngineArgs,
}

/// What [`ImageArgs`] name, opened.
pub(super) struct Opened {
    data: Option<Dataset>,
    session: SessionOptions,
}

impl ImageArgs {
    /// Whether there is anything to look at.
    pub(super) fn is_given(&self) -> bool {
        self.data.is_some() || self.run.is_some()
    }

    /// Opens the data and makes sure that there is an engine.
    pub(super) fn open(&self, model: &Model, talk: &Talk) -> Result<Opened, Failure> {
        let session = self.engine.session("cpu")?;
        let data = self.data.as_ref().map(|path| pipeline::open_data(model, &self.read.choice(path))).transpose()?;
        data.iter().flat_map(Dataset::warnings).for_each(|w| talk.warn(w));
        if let (Some(dir), Some(_)) = (&self.run, &data) {
            std::fs::create_dir_all(dir).map_err(|e| Failure::of_file("V0802", dir, e))?;
        }
        self.engine.ready(talk)?;
        talk.flush();
        Ok(Opened { data, session })
    }

    /// As a calibration takes them.
    pub(super) fn ask<'a>(&'a self, opened: &'a Opened, basis: BasisChoice) -> CalibrateAsk<'a> {
        CalibrateAsk {
            data: opened.data.as_ref(),
            images: self.images,
            basis,
            batch: self.batch,
            seed: self.seed,
            output: self.read.output.as_deref(),
            session: &opened.session,
            dir: self.run.as_deref(),
        }
    }
}

/// Work that shows how many images were looked at; a signal ends it with nothing written.
pub(super) fn looked_at<T>(
    talk: &Talk,
    work: impl FnOnce(&mut dyn FnMut(Calibrating), &AtomicBool) -> Result<T, pipeline::Error>,
) -> Result<T, Failure> {
    let mut shown = talk.counts("image");
    let count = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
    let mut tell = |c: Calibrating| match c {
        Calibrating::Statistics(done, of) => shown.show(count(done), count(of)),
        Calibrating::Curves(..) | Calibrating::Gradients(..) | Calibrating::Layers(..) => {}
    };
    let found = interrupt::stoppable(|stop| work(&mut tell, stop));
    shown.done();
    match found {
        Err(_) if interrupt::STOP.load(Ordering::Relaxed) => Err(Failure::interrupted("interrupted; nothing was written")),
        found => Ok(found?),
    }
}

/// What was repaired, one layer a line. Errors are shares of the variance of a layer's output, on images kept out of the fit.
pub(super) fn repairs_text(repairs: &[Repair]) -> String {
    if repairs.is_empty() {
        return String::new();
    }
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(vec!["repaired", "features", "error, plain cut", "refitted", ""]);
    for r in repairs {
        let taken = if r.is_refitted { "" } else { "not taken" };
        let share = |x: f64| format!("{x:.5}");
        table.add_row(vec![
            r.groups.join(" + "),
            format!("{} of {}", r.kept, r.of),
            share(r.error_plain),
            share(r.error),
            taken.to_string(),
        ]);
    }
    format!("{table}\n")
}
