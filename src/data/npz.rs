//! `.npz` archives: a zip of `.npy` arrays, read into memory; entry names are keys and never become paths.
//!
//! Example: `np.savez("d.npz", pixel_values=x, labels=y)` gives the keys `pixel_values` and `labels`. Only the keys asked for are
//! inflated. Invariant: what an entry inflates to is bounded by its own header, by what its compressed bytes can hold, and by the
//! limit on the whole.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use zip::ZipArchive;

use super::DataError;
use super::array::{Array, ArrayData};
use super::npy;

/// An archive of arrays holds a handful of entries.
const MOST_ENTRIES: usize = 4096;
/// Deflate cannot expand a byte to more than this many.
const LARGEST_EXPANSION: u64 = 1032;

/// An open archive.
pub(crate) struct Npz<'a> {
    path: &'a Path,
    archive: ZipArchive<BufReader<File>>,
    /// Bytes of elements that may still be allocated.
    budget: u64,
    /// Unit: bytes of the archive, which no entry can exceed while compressed.
    length: u64,
    /// The keys, in the order of the file.
    pub(crate) keys: Vec<String>,
}

impl<'a> Npz<'a> {
    /// Opens an archive and lists its keys. Errors: [`DataError::Read`], [`DataError::NotNpz`].
    pub(crate) fn open(path: &'a Path, budget: u64) -> Result<Npz<'a>, DataError> {
        let read = |source| DataError::Read { path: path.to_path_buf(), source };
        let not_npz = |cause: String| DataError::NotNpz { path: path.to_path_buf(), cause };
        let file = File::open(path).map_err(read)?;
        let length = file.metadata().map_err(read)?.len();
        let mut file = BufReader::new(file);
        let mut start = Vec::new();
        file.by_ref().take(16).read_to_end(&mut start).map_err(read)?;
        if let Some(cause) = foreign_format(&start) {
            return Err(not_npz(cause.to_string()));
        }
        let archive = ZipArchive::new(file).map_err(|e| not_npz(e.to_string()))?;
        if archive.has_duplicate_names() {
            return Err(not_npz("two entries have the same name".into()));
        }
        if archive.len() > MOST_ENTRIES {
            return Err(not_npz(format!("{} entries, the limit is {MOST_ENTRIES}", archive.len())));
        }
        let mut keys = Vec::with_capacity(archive.len());
        for raw in archive.file_names_raw() {
            let name = String::from_utf8_lossy(raw);
            let key = name.strip_suffix(".npy").unwrap_or(&name).to_string();
            if keys.contains(&key) {
                return Err(not_npz(format!("key \"{}\" stands twice", key.escape_debug())));
            }
            keys.push(key);
        }
        Ok(Npz { path, archive, budget, length, keys })
    }

    /// Reads the array of a key; `None` where there is no such key.
    pub(crate) fn array(&mut self, key: &str) -> Result<Option<Array>, DataError> {
        let Some(index) = self.keys.iter().position(|k| k == key) else { return Ok(None) };
        let path = self.path;
        let refuse = |fault| DataError::Npy { path: path.to_path_buf(), key: key.to_string(), fault };
        let zip =
            |e: zip::result::ZipError| DataError::ZipEntry { path: path.to_path_buf(), key: key.into(), cause: e.to_string() };
        let raw = self.archive.by_index_raw(index).map_err(zip)?;
        let encrypted = raw.encrypted();
        let capacity = raw.compressed_size().min(self.length).saturating_mul(LARGEST_EXPANSION);
        drop(raw);
        if encrypted {
            return Err(DataError::ZipEntry { path: path.into(), key: key.into(), cause: "it is encrypted".into() });
        }
        let mut entry = self.archive.by_index(index).map_err(zip)?;
        // A stored size that is too small would make the reader stop early; too large is caught at the end of the data.
        let array = npy::read(&mut entry, self.budget.min(capacity)).map_err(refuse)?;
        self.budget = self.budget.saturating_sub(bytes_of(&array.data));
        Ok(Some(array))
    }
}

/// Memory that the elements take.
fn bytes_of(data: &ArrayData) -> u64 {
    let width = match data {
        ArrayData::F64(_) | ArrayData::I64(_) => 8,
        ArrayData::F32(_) | ArrayData::I32(_) => 4,
        ArrayData::F16(_) | ArrayData::BF16(_) => 2,
        ArrayData::U8(_) | ArrayData::I8(_) | ArrayData::Bool(_) => 1,
    };
    data.len() as u64 * width
}

/// What a file that is no zip seems to be.
fn foreign_format(start: &[u8]) -> Option<&'static str> {
    match start {
        [] => Some("file is empty"),
        [b'P', b'K', 3, 4, ..] | [b'P', b'K', 5, 6, ..] => None,
        [0x93, b'N', b'U', b'M', b'P', b'Y', ..] => {
            Some("this is a single .npy array; save it with np.savez under the input's name")
        }
        s if s.starts_with(b"version https://") => Some("this is a Git LFS pointer, not the data; run git lfs pull"),
        [0xff, 0xd8, ..] | [0x89, b'P', b'N', b'G', ..] => Some("this is one image; give the folder that holds it"),
        _ => Some("not a zip archive"),
    }
}

/// Names the fault that a missing key is.
pub(crate) fn missing_key(path: &Path, keys: &[String], input: &str) -> DataError {
    DataError::MissingKey { path: path.to_path_buf(), keys: keys.join(","), input: input.to_string() }
}
