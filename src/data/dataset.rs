//! A data set: where its samples come from, how many there are, and one sample as arrays.
//!
//! Example: an archive with `x` uint8 `[500, 3, 32, 32]` stays 1.5 MB of bytes in memory; each sample becomes f32 when it is
//! asked for. Invariant: sample i is the same whenever it is asked for.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use sha2::{Digest, Sha256};

use super::array::{Array, ArrayData, ArrayKind};
use super::chance::shuffled;
use super::config::ImageSize;
use super::decode::{ImageFault, decode};
use super::npz::{Npz, missing_key};
use super::preprocess::Preprocess;
use super::{DataError, Skipped, Warning, folder};

/// One input of the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InputSpec {
    /// Its name.
    pub name: String,
    /// Its shape; `None` where a size is open. Axis 0 is the batch.
    pub dims: Vec<Option<usize>>,
    /// What it takes.
    pub kind: ArrayKind,
}

impl InputSpec {
    /// The shape in messages, `?` where open.
    fn shape(&self) -> String {
        self.dims.iter().map(|d| d.map_or("?".to_string(), |n| n.to_string())).collect::<Vec<_>>().join(", ")
    }

    /// Channels, height and width of an image input `[n, 1 or 3, height, width]`; open channels are 3.
    fn image_size(&self) -> Option<ImageSize> {
        let [_, channels, height, width] = *self.dims.as_slice() else { return None };
        let takes_images = self.kind.is_float() || self.kind == ArrayKind::U8;
        let channels = channels.unwrap_or(3);
        (takes_images && (channels == 1 || channels == 3)).then_some(ImageSize { channels, height, width })
    }

    /// Whether a sample of shape `dims` (without the batch axis) fits.
    fn takes(&self, dims: &[usize]) -> bool {
        self.dims.len() == dims.len() + 1 && self.dims.iter().skip(1).zip(dims).all(|(want, d)| want.is_none_or(|w| w == *d))
    }
}

/// Limits on what is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Pixels of one image; 64 million.
    pub image_pixels: u64,
    /// Unit: bytes of one image file; 256 MiB.
    pub image_bytes: u64,
    /// Unit: bytes of all arrays of an archive in memory; 16 GiB.
    pub array_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { image_pixels: 64_000_000, image_bytes: 256 << 20, array_bytes: 16 << 30 }
    }
}

/// How data is read.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The model's inputs.
    pub inputs: Vec<InputSpec>,
    /// Which of them takes the images, where that is not plain (`--input`).
    pub image_input: Option<String>,
    /// A preprocessor_config.json or timm config.json (`--preprocess`).
    pub preprocess: Option<PathBuf>,
    /// Instead of the file's (`--mean`).
    pub mean: Option<Vec<f32>>,
    /// Instead of the file's (`--std`).
    pub std: Option<Vec<f32>>,
    /// The first image that cannot be used is an error (`--strict-data`).
    pub strict: bool,
    /// Limits on what is read.
    pub limits: Limits,
}

/// An array of an archive and what becomes of it.
struct Column {
    name: String,
    array: Array,
    kind: ArrayKind,
    /// What each byte becomes, by channel, where bytes are images for a floating-point input.
    tables: Option<Vec<[f32; 256]>>,
    /// Mean and std by channel, where floats are normalised.
    normalise: Option<Preprocess>,
    is_image: bool,
}

enum Source {
    Folder { files: Vec<PathBuf>, input: InputSpec, channels: usize, recipe: Preprocess },
    Arrays { columns: Vec<Column> },
}

/// What all views of one data set share.
pub(crate) struct Shared {
    pub(crate) path: PathBuf,
    source: Source,
    pub(crate) labels: Option<Vec<i64>>,
    classes: Vec<String>,
    warnings: Vec<Warning>,
    pub(crate) strict: bool,
    limits: Limits,
    /// Images that turned out to be unusable.
    bad: Mutex<BTreeMap<usize, ImageFault>>,
}

/// Samples, in order, with or without labels. Cloning shares everything.
#[derive(Clone)]
pub struct Dataset {
    pub(crate) shared: Arc<Shared>,
    pub(crate) picks: Arc<Vec<usize>>,
}

/// Why a sample is not there.
pub(crate) enum SampleFault {
    /// This image is left out.
    Image(ImageFault),
    /// The data does not fit the model.
    Stop(DataError),
}

impl Dataset {
    /// Opens an image folder or an `.npz` archive.
    ///
    /// Errors: [`DataError`]; images are not decoded here.
    pub fn open(path: &Path, options: &Options) -> Result<Dataset, DataError> {
        let meta = std::fs::metadata(path).map_err(|source| DataError::Read { path: path.to_path_buf(), source })?;
        let shared = if meta.is_dir() { open_folder(path, options)? } else { open_archive(path, options)? };
        let count = match &shared.source {
            Source::Folder { files, .. } => files.len(),
            Source::Arrays { columns } => columns.first().and_then(|c| c.array.dims.first()).copied().unwrap_or(0),
        };
        Ok(Dataset { shared: Arc::new(shared), picks: Arc::new((0..count).collect()) })
    }

    /// How many samples there are, unusable images included.
    pub fn len(&self) -> usize {
        self.picks.len()
    }

    /// Whether there is no sample.
    pub fn is_empty(&self) -> bool {
        self.picks.is_empty()
    }

    /// The same data, only the samples at these positions, in this order. Positions that do not exist are left out.
    pub fn select(&self, positions: &[usize]) -> Dataset {
        let picks = positions.iter().filter_map(|p| self.picks.get(*p)).copied().collect();
        Dataset { shared: Arc::clone(&self.shared), picks: Arc::new(picks) }
    }

    /// `count` samples that a seed picks, in the order of the data; all where there are not more.
    pub fn sample(&self, count: usize, seed: u64) -> Dataset {
        let mut picks = shuffled(self.len(), seed, 0);
        picks.truncate(count);
        picks.sort_unstable();
        self.select(&picks)
    }

    /// Two parts, of which the second has `share` of the samples, at least one and at most 2,000: every n-th, which in folders sorted
    /// by class takes from each class. Equal data and shares give equal parts; nothing is held out where `share` is 0.
    ///
    /// More than 2,000 judging samples cost time and change little: the interval of an accuracy of 80 % is then 1.8 points either way.
    pub fn hold_out(&self, share: f64) -> (Dataset, Dataset) {
        const MOST: usize = 2000;
        let n = self.len();
        let wanted = ((n as f64 * share).round() as usize).clamp(usize::from(share > 0.0), MOST);
        let every = n.checked_div(wanted).map_or(usize::MAX, |every| every.max(2));
        let (held, rest): (Vec<usize>, Vec<usize>) = (0..n).partition(|i| i % every == every - 1);
        (self.select(&rest), self.select(&held))
    }

    /// One label per sample, where there are labels.
    pub fn labels(&self) -> Option<Vec<i64>> {
        let labels = self.shared.labels.as_ref()?;
        Some(self.picks.iter().map(|p| labels[*p]).collect())
    }

    /// The names of the class folders, by label; empty for flat folders and archives.
    pub fn class_names(&self) -> &[String] {
        &self.shared.classes
    }

    /// What a user should know about the data.
    pub fn warnings(&self) -> &[Warning] {
        &self.shared.warnings
    }

    /// The images that turned out to be unusable so far, in the order of the files.
    pub fn skipped(&self) -> Vec<Skipped> {
        let bad = self.shared.bad.lock().unwrap_or_else(PoisonError::into_inner);
        bad.iter().filter_map(|(sample, fault)| self.shared.skipped(*sample, fault.clone())).collect()
    }

    /// Checks that every label has an output.
    ///
    /// Errors: [`DataError::NoLabels`], [`DataError::Classes`], [`DataError::Label`].
    pub fn check_labels(&self, classes: usize) -> Result<(), DataError> {
        let path = || self.shared.path.clone();
        let labels = self.labels().ok_or_else(|| DataError::NoLabels { path: path() })?;
        let folders = self.shared.classes.len();
        if folders > 0 && folders != classes {
            return Err(DataError::Classes { path: path(), folders, classes });
        }
        let (Some(&least), Some(&most)) = (labels.iter().min(), labels.iter().max()) else { return Ok(()) };
        let outside = |label: i64| label < 0 || u64::try_from(label).is_ok_and(|l| l >= classes as u64);
        for label in [most, least] {
            if outside(label) {
                let shifted = least == 1 && most == classes as i64;
                let hint = if shifted { "; the labels seem to start at 1: subtract 1" } else { "" };
                return Err(DataError::Label { path: path(), label, classes, hint });
            }
        }
        Ok(())
    }

    /// A hash of each sample's input as stored (file bytes, or elements), to find samples that two sets share.
    ///
    /// Errors: [`DataError::Read`].
    pub fn hashes(&self) -> Result<Vec<[u8; 32]>, DataError> {
        self.picks.iter().map(|p| self.shared.hash(*p)).collect()
    }

    /// How many of this set's samples are in `other` too, by hash.
    ///
    /// Errors: [`DataError::Read`].
    pub fn count_shared(&self, other: &Dataset) -> Result<usize, DataError> {
        let theirs: std::collections::BTreeSet<[u8; 32]> = other.hashes()?.into_iter().collect();
        Ok(self.hashes()?.iter().filter(|h| theirs.contains(*h)).count())
    }

    /// Whether samples are arrays in memory, none of which can be unusable.
    pub(crate) fn is_arrays(&self) -> bool {
        matches!(self.shared.source, Source::Arrays { .. })
    }
}

impl Shared {
    /// The names of the inputs, in the order of a sample's arrays.
    pub(crate) fn input_names(&self) -> Vec<String> {
        match &self.source {
            Source::Folder { input, .. } => vec![input.name.clone()],
            Source::Arrays { columns } => columns.iter().map(|c| c.name.clone()).collect(),
        }
    }

    /// Which arrays of a sample are images.
    pub(crate) fn image_inputs(&self) -> Vec<bool> {
        match &self.source {
            Source::Folder { .. } => vec![true],
            Source::Arrays { columns } => columns.iter().map(|c| c.is_image).collect(),
        }
    }

    /// Names an unusable image.
    pub(crate) fn skipped(&self, sample: usize, fault: ImageFault) -> Option<Skipped> {
        match &self.source {
            Source::Folder { files, .. } => files.get(sample).map(|path| Skipped { path: path.clone(), fault }),
            Source::Arrays { .. } => None,
        }
    }

    /// Notes an unusable image; `true` the first time.
    pub(crate) fn note_bad(&self, sample: usize, fault: &ImageFault) -> bool {
        let mut bad = self.bad.lock().unwrap_or_else(PoisonError::into_inner);
        bad.insert(sample, fault.clone()).is_none()
    }

    /// The arrays of a sample, one per input, without the batch axis.
    pub(crate) fn sample(&self, sample: usize) -> Result<Vec<Array>, SampleFault> {
        match &self.source {
            Source::Folder { files, input, channels, recipe } => {
                let known = self.bad.lock().unwrap_or_else(PoisonError::into_inner).get(&sample).cloned();
                if let Some(fault) = known {
                    return Err(SampleFault::Image(fault));
                }
                let bytes = self.file_bytes(&files[sample]).map_err(SampleFault::Image)?;
                let pixels = decode(&bytes, *channels, self.limits.image_pixels).map_err(SampleFault::Image)?;
                let sized = recipe.apply(&pixels);
                let dims = vec![sized.channels, sized.height, sized.width];
                if !input.takes(&dims) {
                    let (path, expected) = (files[sample].clone(), input.shape());
                    return Err(SampleFault::Stop(DataError::Shape { path, key: "the image".into(), found: dims, expected }));
                }
                let data = if input.kind == ArrayKind::U8 {
                    let planes = (0..sized.channels).flat_map(|c| sized.bytes.iter().skip(c).step_by(sized.channels));
                    ArrayData::U8(planes.copied().collect())
                } else {
                    into_kind(ArrayData::F32(recipe.normalise(&sized)), input.kind)
                };
                Ok(vec![Array { dims, data }])
            }
            Source::Arrays { columns } => Ok(columns.iter().map(|c| c.sample(sample)).collect()),
        }
    }

    /// The bytes of an image file, no more than the limit.
    fn file_bytes(&self, path: &Path) -> Result<Vec<u8>, ImageFault> {
        let unreadable = |e: std::io::Error| ImageFault::Unreadable { cause: e.to_string() };
        let bytes = std::fs::metadata(path).map_err(unreadable)?.len();
        let limit = self.limits.image_bytes;
        if bytes > limit {
            return Err(ImageFault::FileTooLarge { bytes, limit });
        }
        std::fs::read(path).map_err(unreadable)
    }

    fn hash(&self, sample: usize) -> Result<[u8; 32], DataError> {
        let mut hash = Sha256::new();
        match &self.source {
            Source::Folder { files, .. } => {
                let path = &files[sample];
                let read = |source| DataError::Read { path: path.clone(), source };
                let mut file = std::fs::File::open(path).map_err(read)?;
                let mut chunk = vec![0u8; 1 << 16];
                loop {
                    match std::io::Read::read(&mut file, &mut chunk).map_err(read)? {
                        0 => break,
                        n => hash.update(&chunk[..n]),
                    }
                }
            }
            Source::Arrays { columns } => {
                for row in columns.iter().filter_map(|c| c.array.row(sample)) {
                    match row.data.to_i64() {
                        Some(whole) => whole.iter().for_each(|x| hash.update(x.to_le_bytes())),
                        None => row.as_f32().iter().for_each(|x| hash.update(x.to_le_bytes())),
                    }
                }
            }
        }
        Ok(hash.finalize().into())
    }
}

impl Column {
    /// One row as the model takes it.
    fn sample(&self, index: usize) -> Array {
        let row = self.array.row(index).expect("samples are counted on axis 0 of every column");
        let area = row.dims.iter().skip(1).product::<usize>().max(1);
        let data = match (&row.data, &self.tables, &self.normalise) {
            (ArrayData::U8(bytes), Some(tables), _) => {
                let planes = bytes.chunks_exact(area).zip(tables);
                ArrayData::F32(planes.flat_map(|(plane, t)| plane.iter().map(|b| t[usize::from(*b)])).collect())
            }
            (floats, _, Some(recipe)) => {
                let mut values = floats.to_f32();
                for (channel, plane) in values.chunks_exact_mut(area).enumerate() {
                    let (mean, std) = recipe.mean_std(channel);
                    plane.iter_mut().for_each(|x| *x = (*x - mean) / std);
                }
                ArrayData::F32(values)
            }
            _ => row.data,
        };
        Array { dims: row.dims, data: into_kind(data, self.kind) }
    }
}

/// As the model's kind; only kinds that [`ArrayData::cast`] can change reach this.
fn into_kind(data: ArrayData, kind: ArrayKind) -> ArrayData {
    if data.kind() == kind { data } else { data.cast(kind).unwrap_or(data) }
}

/// The input that takes images: the named one, or the only one that could.
fn image_input(options: &Options) -> Option<(&InputSpec, ImageSize)> {
    let mut able = options.inputs.iter().filter(|i| options.image_input.as_ref().is_none_or(|name| *name == i.name));
    let mut able = std::iter::from_fn(|| able.find_map(|i| i.image_size().map(|size| (i, size))));
    match (able.next(), able.next()) {
        (Some(only), None) => Some(only),
        _ => None,
    }
}

fn open_folder(path: &Path, options: &Options) -> Result<Shared, DataError> {
    let listing = folder::list(path)?;
    let refuse = |hint| {
        let names: Vec<String> = options.inputs.iter().map(|i| format!("{} [{}] {}", i.name, i.shape(), i.kind.name())).collect();
        DataError::ImageInput { path: path.to_path_buf(), inputs: names.join(", "), hint }
    };
    let (input, size) = image_input(options).ok_or_else(|| refuse(""))?;
    if options.inputs.len() > 1 {
        return Err(refuse("; give an .npz with an array for each"));
    }
    let recipe = match (&options.preprocess, &options.mean, &options.std) {
        (Some(file), _, _) => Preprocess::from_file(file, size)?,
        (None, Some(mean), Some(std)) => {
            let (Some(height), Some(width)) = (size.height, size.width) else {
                return Err(refuse("; height and width are open: give --preprocess, or fix them with --size"));
            };
            Preprocess::plain(height, width, mean.clone(), std.clone())
        }
        _ => return Err(DataError::NoPreprocess { path: path.to_path_buf() }),
    };
    let recipe = recipe.with_mean_std(options.mean.as_deref(), options.std.as_deref(), size.channels)?;
    let source = Source::Folder { files: listing.files, input: input.clone(), channels: size.channels, recipe };
    Ok(Shared {
        path: path.to_path_buf(),
        source,
        labels: listing.labels,
        classes: listing.classes,
        warnings: listing.warnings,
        strict: options.strict,
        limits: options.limits,
        bad: Mutex::default(),
    })
}

fn open_archive(path: &Path, options: &Options) -> Result<Shared, DataError> {
    let mut npz = Npz::open(path, options.limits.array_bytes)?;
    let image = image_input(options).map(|(input, size)| (input.name.as_str(), size));
    let mut columns: Vec<Column> = Vec::with_capacity(options.inputs.len());
    for input in &options.inputs {
        let array = npz.array(&input.name)?.ok_or_else(|| missing_key(path, &npz.keys, &input.name))?;
        let column = column(path, input, array, options, image)?;
        if let Some(first) = columns.first() {
            same_count(path, &input.name, column.array.dims[0], &first.name, first.array.dims[0])?;
        }
        columns.push(column);
    }
    let labels = match npz.array("labels")? {
        None => None,
        Some(array) => {
            let found = array.data.kind().name();
            let kind = || DataError::Kind {
                path: path.into(),
                key: "labels".into(),
                found,
                expected: "int64",
                hint: "; labels are class numbers",
            };
            let labels = array.data.to_i64().ok_or_else(kind)?;
            if let Some(first) = columns.first() {
                same_count(path, "labels", labels.len(), &first.name, first.array.dims[0])?;
            }
            Some(labels)
        }
    };
    let used = |key: &String| key == "labels" || options.inputs.iter().any(|i| i.name == *key);
    let unused: Vec<String> = npz.keys.iter().filter(|k| !used(k)).cloned().collect();
    let warnings = if unused.is_empty() { Vec::new() } else { vec![Warning::UnusedKeys { keys: unused }] };
    Ok(Shared {
        path: path.to_path_buf(),
        source: Source::Arrays { columns },
        labels,
        classes: Vec::new(),
        warnings,
        strict: options.strict,
        limits: options.limits,
        bad: Mutex::default(),
    })
}

fn same_count(path: &Path, key: &str, found: usize, other: &str, expected: usize) -> Result<(), DataError> {
    if found == expected {
        return Ok(());
    }
    Err(DataError::Count { path: path.to_path_buf(), key: key.into(), found, other: other.into(), expected })
}

/// Checks an array against the model's input and decides what becomes of it.
fn column(
    path: &Path,
    input: &InputSpec,
    array: Array,
    options: &Options,
    image: Option<(&str, ImageSize)>,
) -> Result<Column, DataError> {
    let name = input.name.clone();
    if array.dims.is_empty() || !input.takes(&array.dims[1..]) {
        return Err(DataError::Shape { path: path.into(), key: name, found: array.dims, expected: input.shape() });
    }
    if array.is_empty() {
        return Err(DataError::NoSamples { path: path.into(), key: name });
    }
    let found = array.data.kind();
    let is_image = image.is_some_and(|(n, _)| n == name);
    let channels = array.dims.get(1).copied().unwrap_or(1);
    let (mean, std) = (options.mean.as_deref(), options.std.as_deref());
    let mut column = Column { name, array, kind: input.kind, tables: None, normalise: None, is_image };
    if found == ArrayKind::U8 && input.kind.is_float() && column.array.dims.len() == 4 {
        let base = match (is_image, &options.preprocess, image) {
            // An archive holds images of the right size, so only mean and std of the file matter.
            (true, Some(file), Some((_, size))) => Preprocess::from_file(file, size)?,
            _ => Preprocess::plain(1, 1, vec![0.0], vec![1.0]),
        };
        let recipe = base.with_mean_std(mean, std, channels)?;
        column.tables = Some((0..channels).map(|c| recipe.table(c)).collect());
        return Ok(column);
    }
    if found.is_float() && input.kind.is_float() {
        if is_image && (mean.is_some() || std.is_some()) {
            column.normalise = Some(Preprocess::plain(1, 1, vec![0.0], vec![1.0]).with_mean_std(mean, std, channels)?);
        }
        return Ok(column);
    }
    match column.array.data.cast(input.kind) {
        Some(data) => column.array.data = data,
        None => {
            let hint = match (found, input.kind.is_float()) {
                (ArrayKind::U8, true) => "; uint8 is scaled only as images [n, C, H, W]",
                (_, true) => "; convert it, e.g. x.astype(\"float32\")",
                (_, false) if found.is_float() => "; convert it, e.g. x.astype(\"int64\")",
                (_, false) => "; a number does not fit",
            };
            let (path, key) = (path.to_path_buf(), column.name);
            return Err(DataError::Kind { path, key, found: found.name(), expected: input.kind.name(), hint });
        }
    }
    Ok(column)
}
