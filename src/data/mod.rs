
                write!(f, "{}: {count} images beside the class folders are not used", path.display())
            Warning::EmptyClass { path } => write!(f, "{}: class folder without images", path.display()),
            Warning::Loop { path } => write!(f, "{}: link leads back to a folder above it, not followed", path.display()),
            Warning::LooseImages { path, count } => {
            Warning::Unreadable { path, cause } => write!(f, "{}: folder cannot be read: {cause}", path.display()),
            Warning::UnusedKeys { keys } => write!(f, "keys that are no input of the model are not used: {}", keys.join(", ")),
            }
        /// An entry.
        /// How many cannot.
        /// How many there are.
        /// How many.
        /// It.
        /// Its class folders.
        /// Its samples.
        /// Its shape.
        /// Its type.
        /// Its value.
        /// That one's samples.
        /// The data.
        /// The entry that it is compared with.
        /// The entry, or the image.
        /// The entry.
        /// The file.
        /// The folder.
        /// The input without one.
        /// The key.
        /// The keys that it has.
        /// The keys.
        /// The label.
        /// The last one.
        /// The link.
        /// The model's channels.
        /// The model's input.
        /// The model's inputs.
        /// The model's outputs.
        /// The model's shape, `?` where open.
        /// The model's.
        /// The size of the first image.
        /// The size that differs.
        /// What is wrong with it.
        /// What it is instead.
        /// What it may be.
        /// What the archive reader said.
        /// What the system said.
        /// What to do, or nothing.
        /// What was given.
        /// Whether none is allowed.
        /// Which.
        allowed: String,
        bad: usize,
        cause: String,
        channels: usize,
        classes: usize,
        count: usize,
        expected: &'static str,
        expected: String,
        expected: usize,
        fault: NpyFault,
        first: Vec<usize>,
        flag: &'static str,
        folders: usize,
        found: &'static str,
        found: String,
        found: Vec<f32>,
        found: Vec<usize>,
        found: usize,
        hint: &'static str,
        input: String,
        inputs: String,
        key: String,
        keys: String,
        keys: Vec<String>,
        label: i64,
        last: Skipped,
        match self {
        other: String,
        other: Vec<usize>,
        path: PathBuf,
        source: std::io::Error,
        strict: bool,
        total: usize,
        write!(f, "{}: {}", self.path.display(), self.fault)
        }
    #[error("internal: a loading thread ended early")]
    #[error("no .jpg/.jpeg/.png found under {}", path.display())]
    #[error("{flag} is {found:?}, expected one number or {channels}, finite{}", if *flag == "--std" { " and above 0" } else { "" })]
    #[error("{}: an image folder needs --preprocess FILE (preprocessor_config.json or a timm config.json), or --mean and --std", path.display())]
    #[error("{}: an image folder needs a model with one image input [n, 1 or 3, height, width]; its inputs are {inputs}{hint}", path.display())]
    #[error("{}: entry {} cannot be read: {cause}", path.display(), key.escape_debug())]
    #[error("{}: entry {} {fault}", path.display(), key.escape_debug())]
    #[error("{}: expected an image folder or an .npz archive: {cause}", path.display())]
    #[error("{}: has no labels (an image folder needs class subfolders, an .npz the key labels)", path.display())]
    #[error("{}: images for {input} have different sizes, {first:?} and {other:?}; use a preprocessing that resizes, or --batch 1", path.display())]
    #[error("{}: keys are {}; the model's input is {input}", path.display(), keys.escape_debug())]
    #[error("{}: label {label} but the model has {classes} outputs (0..{}){hint}", path.display(), classes.saturating_sub(1))]
    #[error("{}: {bad} of {total} images cannot be used{}; the last is {last}", path.display(), if *strict { "" } else { ", more than 1 %" })]
    #[error("{}: {folders} class folders but the model has {classes} outputs", path.display())]
    #[error("{}: {key} has no samples", path.display())]
    #[error("{}: {key} has {found} samples, {other} has {expected}", path.display())]
    #[error("{}: {key} is {found:?}, the model's input is [{expected}]", path.display())]
    #[error("{}: {key} is {found}, allowed: {allowed}", path.display())]
    #[error("{}: {key} is {found}, the model's input is {expected}{hint}", path.display())]
    #[error("{}: {source}", path.display())]
    /// A class folder holds no images; its label stays taken.
    /// A file or folder cannot be read.
    /// A folder cannot be listed.
    /// A folder without images.
    /// A key of a preprocessing file.
    /// A label that the model has no output for.
    /// A link leads back to a folder above it.
    /// A loading thread ended before its work did.
    /// An archive with zero samples.
    /// An array has a type that the model's input does not take.
    /// An array has another shape than the model's input.
    /// An entry is no array that can be read.
    /// An entry of the archive cannot be opened.
    /// Another number of class folders than outputs.
    /// Arrays with different numbers of samples.
    /// Images beside class folders belong to no class.
    /// Images of one batch have different sizes.
    /// Keys of an archive that the model has no input for.
    /// Labels are asked for and there are none.
    /// Nothing says how images are preprocessed.
    /// The archive has no array for an input.
    /// The file is no archive of arrays.
    /// The file.
    /// The model's inputs do not suit an image folder.
    /// Too many images cannot be used.
    /// What is wrong with it.
    /// `--mean` or `--std` does not fit.
    Classes {
    Config {
    Count {
    EmptyClass {
    ImageInput {
    Kind {
    Label {
    Loop {
    LooseImages {
    MissingKey {
    NoImages {
    NoLabels {
    NoPreprocess {
    NoSamples {
    Normalisation {
    NotNpz {
    Npy {
    Read {
    Shape {
    ThreadLost,
    TooManyBad {
    Uneven {
    Unreadable {
    UnusedKeys {
    ZipEntry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
    pub fault: ImageFault,
    pub path: PathBuf,
    }
    },
#[derive(Debug, Clone, PartialEq, Eq)]
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
//!
//!     assert_eq!(batch.count, batch.inputs[0].1.dims[0]);
//!     let batch = batch?;
//! # Ok::<(), vitrim::data::DataError>(())
//! Data: image folders and `.npz` archives as batches of arrays, the same bytes for the same seed.
//! Example: a folder of 1,000 class folders with 50,000 images, `--preprocess config.json` of timm and a model with input
//! Inputs of a model as plain arrays.
//! Invariants: no path is built from what a file says; memory is bounded by limits, by the data itself, and by the batches
//! ```
//! ```no_run
//! `x [B, 3, 224, 224]` give batches `{x: [64, 3, 224, 224] f32}` with 64 labels each. Files are read and decoded by threads
//! data.check_labels(1000)?;
//! for batch in data.batches(BatchOrder::default(), 64, 4, None) {
//! let data = Dataset::open("images".as_ref(), &options)?;
//! let input = InputSpec { name: "x".into(), dims: vec![None, Some(3), Some(224), Some(224)], kind: ArrayKind::F32 };
//! let options = Options { inputs: vec![input], preprocess: Some("config.json".into()), ..Options::default() };
//! that are under way; preprocessing is never guessed for image folders.
//! that run ahead of the device; the order of batches does not depend on how many there are.
//! use vitrim::data::{ArrayKind, BatchOrder, Dataset, InputSpec, Options};
//! }
/// An image that was left out, and why. Displayed as `FILE: reason`.
/// Something about the data that a user should know, though it can be used.
/// Why data cannot be used.
impl std::fmt::Display for Skipped {
impl std::fmt::Display for Warning {
mod batches;
mod chance;
mod config;
mod dataset;
mod folder;
mod npy;
mod npz;
pub enum DataError {
pub enum Warning {
pub mod array;
pub mod decode;
pub mod preprocess;
pub mod resize;
pub struct Skipped {
pub use array::{Array, ArrayData, ArrayKind};
pub use batches::{Batch, BatchOrder, Batches, Start, Tail};
pub use chance::Augment;
pub use config::ImageSize;
pub use dataset::{Dataset, InputSpec, Limits, Options};
pub use decode::{ImageFault, decode};
pub use npy::NpyFault;
pub use preprocess::Preprocess;
pub use resize::{Filter, Pixels};
use std::path::PathBuf;
}
