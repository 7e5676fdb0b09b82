//! Data: image folders and `.npz` archives as batches of arrays, the same bytes for the same seed.
//!
//! Example: a folder of 1,000 class folders with 50,000 images, `--preprocess config.json` of timm and a model with input
//! `x [B, 3, 224, 224]` give batches `{x: [64, 3, 224, 224] f32}` with 64 labels each. Files are read and decoded by threads
//! that run ahead of the device; the order of batches does not depend on how many there are.
//!
//! ```no_run
//! use vitrim::data::{ArrayKind, BatchOrder, Dataset, InputSpec, Options};
//! let input = InputSpec { name: "x".into(), dims: vec![None, Some(3), Some(224), Some(224)], kind: ArrayKind::F32 };
//! let options = Options { inputs: vec![input], preprocess: Some("config.json".into()), ..Options::default() };
//! let data = Dataset::open("images".as_ref(), &options)?;
//! data.check_labels(1000)?;
//! for batch in data.batches(BatchOrder::default(), 64, 4, None) {
//!     let batch = batch?;
//!     assert_eq!(batch.count, batch.inputs[0].1.dims[0]);
//! }
//! # Ok::<(), vitrim::data::DataError>(())
//! ```
//!
//! Invariants: no path is built from what a file says; memory is bounded by limits, by the data itself, and by the batches
//! that are under way; preprocessing is never guessed for image folders.

use std::path::PathBuf;

pub mod array;
mod batches;
mod chance;
mod config;
mod dataset;
pub mod decode;
mod folder;
mod jpeg;
mod npy;
mod npz;
pub mod preprocess;
pub mod resize;

pub use array::{Array, ArrayData, ArrayKind};
pub use batches::{Batch, BatchOrder, Batches, Start, Tail};
pub use chance::Augment;
pub use config::ImageSize;
pub use dataset::{Dataset, InputSpec, Limits, Options};
pub use decode::{ImageFault, decode};
pub use npy::NpyFault;
pub use preprocess::Preprocess;
pub use resize::{Filter, Method, Passes, Pixels};

/// Something about the data that a user should know, though it can be used.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Warning {
    /// Images beside class folders belong to no class.
    LooseImages {
        /// The folder.
        path: PathBuf,
        /// How many.
        count: usize,
    },
    /// A class folder holds no images; its label stays taken.
    EmptyClass {
        /// The folder.
        path: PathBuf,
    },
    /// A link leads back to a folder above it.
    Loop {
        /// The link.
        path: PathBuf,
    },
    /// A folder cannot be listed.
    Unreadable {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        cause: String,
    },
    /// Keys of an archive that the model has no input for.
    UnusedKeys {
        /// The keys.
        keys: Vec<String>,
    },
}

impl std::fmt::Display for Warning {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Warning::LooseImages { path, count } => {
                write!(f, "{}: {count} images beside the class folders are not used", path.display())
            }
            Warning::EmptyClass { path } => write!(f, "{}: class folder without images", path.display()),
            Warning::Loop { path } => write!(f, "{}: link leads back to a folder above it, not followed", path.display()),
            Warning::Unreadable { path, cause } => write!(f, "{}: folder cannot be read: {cause}", path.display()),
            Warning::UnusedKeys { keys } => write!(f, "keys that are no input of the model are not used: {}", keys.join(", ")),
        }
    }
}

/// An image that was left out, and why. Displayed as `FILE: reason`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skipped {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub fault: ImageFault,
}

impl std::fmt::Display for Skipped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.path.display(), self.fault)
    }
}

/// Why data cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// A file or folder cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// It.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A folder without images.
    #[error("no .jpg/.jpeg/.png found under {}", path.display())]
    NoImages {
        /// The folder.
        path: PathBuf,
    },
    /// The file is no archive of arrays.
    #[error("{}: expected an image folder or an .npz archive: {cause}", path.display())]
    NotNpz {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        cause: String,
    },
    /// An entry of the archive cannot be opened.
    #[error("{}: entry {} cannot be read: {cause}", path.display(), key.escape_debug())]
    ZipEntry {
        /// The file.
        path: PathBuf,
        /// The entry.
        key: String,
        /// What the archive reader said.
        cause: String,
    },
    /// An entry is no array that can be read.
    #[error("{}: entry {} {fault}", path.display(), key.escape_debug())]
    Npy {
        /// The file.
        path: PathBuf,
        /// The entry.
        key: String,
        /// What is wrong with it.
        fault: NpyFault,
    },
    /// The archive has no array for an input.
    #[error("{}: keys are {}; the model's input is {input}", path.display(), keys.escape_debug())]
    MissingKey {
        /// The file.
        path: PathBuf,
        /// The keys that it has.
        keys: String,
        /// The input without one.
        input: String,
    },
    /// An array has another shape than the model's input.
    #[error("{}: {key} is {found:?}, the model's input is [{expected}]", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// The entry, or the image.
        key: String,
        /// Its shape.
        found: Vec<usize>,
        /// The model's shape, `?` where open.
        expected: String,
    },
    /// An array has a type that the model's input does not take.
    #[error("{}: {key} is {found}, the model's input is {expected}{hint}", path.display())]
    Kind {
        /// The file.
        path: PathBuf,
        /// The entry.
        key: String,
        /// Its type.
        found: &'static str,
        /// The model's.
        expected: &'static str,
        /// What to do, or nothing.
        hint: &'static str,
    },
    /// Arrays with different numbers of samples.
    #[error("{}: {key} has {found} samples, {other} has {expected}", path.display())]
    Count {
        /// The file.
        path: PathBuf,
        /// An entry.
        key: String,
        /// Its samples.
        found: usize,
        /// The entry that it is compared with.
        other: String,
        /// That one's samples.
        expected: usize,
    },
    /// An archive with zero samples.
    #[error("{}: {key} has no samples", path.display())]
    NoSamples {
        /// The file.
        path: PathBuf,
        /// The entry.
        key: String,
    },
    /// The model's inputs do not suit an image folder.
    #[error("{}: an image folder needs a model with one image input [n, 1 or 3, height, width]; its inputs are {inputs}{hint}", path.display())]
    ImageInput {
        /// The folder.
        path: PathBuf,
        /// The model's inputs.
        inputs: String,
        /// What to do, or nothing.
        hint: &'static str,
    },
    /// Nothing says how images are preprocessed.
    #[error("{}: an image folder needs --preprocess FILE (preprocessor_config.json or a timm config.json), or --mean and --std", path.display())]
    NoPreprocess {
        /// The folder.
        path: PathBuf,
    },
    /// A key of a preprocessing file.
    #[error("{}: {key} is {found}, allowed: {allowed}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// Its value.
        found: String,
        /// What it may be.
        allowed: String,
    },
    /// `--mean` or `--std` does not fit.
    #[error("{flag} is {found:?}, expected one number or {channels}, finite{}", if *flag == "--std" { " and above 0" } else { "" })]
    Normalisation {
        /// Which.
        flag: &'static str,
        /// What was given.
        found: Vec<f32>,
        /// The model's channels.
        channels: usize,
    },
    /// A label that the model has no output for.
    #[error("{}: label {label} but the model has {classes} outputs (0..{}){hint}", path.display(), classes.saturating_sub(1))]
    Label {
        /// The data.
        path: PathBuf,
        /// The label.
        label: i64,
        /// The model's outputs.
        classes: usize,
        /// What to do, or nothing.
        hint: &'static str,
    },
    /// Another number of class folders than outputs.
    #[error("{}: {folders} class folders but the model has {classes} outputs", path.display())]
    Classes {
        /// The folder.
        path: PathBuf,
        /// Its class folders.
        folders: usize,
        /// The model's outputs.
        classes: usize,
    },
    /// Labels are asked for and there are none.
    #[error("{}: has no labels (an image folder needs class subfolders, an .npz the key labels)", path.display())]
    NoLabels {
        /// The data.
        path: PathBuf,
    },
    /// Too many images cannot be used.
    #[error("{}: {bad} of {total} images cannot be used{}; the last is {last}", path.display(), if *strict { "" } else { ", more than 1 %" })]
    TooManyBad {
        /// The folder.
        path: PathBuf,
        /// How many cannot.
        bad: usize,
        /// How many there are.
        total: usize,
        /// Whether none is allowed.
        strict: bool,
        /// The last one.
        last: Skipped,
    },
    /// Images of one batch have different sizes.
    #[error("{}: images for {input} have different sizes, {first:?} and {other:?}; use a preprocessing that resizes, or --batch 1", path.display())]
    Uneven {
        /// The folder.
        path: PathBuf,
        /// The model's input.
        input: String,
        /// The size of the first image.
        first: Vec<usize>,
        /// The size that differs.
        other: Vec<usize>,
    },
    /// A loading thread ended before its work did.
    #[error("internal: a loading thread ended early")]
    ThreadLost,
}
