//! Image folders: which files there are, in which order, and with which labels.
//!
//! Example: `cats/a.jpg`, `dogs/b.png` gives two samples with labels 0 and 1; a folder of images without subfolders gives
//! samples without labels. Everything is sorted by name, byte by byte, so the order depends on the names alone. Hidden files are
//! skipped; a symbolic link that leads back to a folder it lies in is not followed.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use super::{DataError, Warning};

/// What a folder holds.
pub(crate) struct Listing {
    /// The image files, in order.
    pub(crate) files: Vec<PathBuf>,
    /// One label per file, where there are class folders.
    pub(crate) labels: Option<Vec<i64>>,
    /// The names of the class folders; empty without labels.
    pub(crate) classes: Vec<String>,
    pub(crate) warnings: Vec<Warning>,
}

/// Deeper nesting than this is no data set.
const DEEPEST: usize = 32;

/// Lists the images under `root`. Errors: [`DataError::Read`], [`DataError::NoImages`].
pub(crate) fn list(root: &Path) -> Result<Listing, DataError> {
    let mut warnings = Vec::new();
    let mut above = vec![canonical(root)?];
    let entries = entries(root).map_err(|source| DataError::Read { path: root.to_path_buf(), source })?;
    let loose: Vec<PathBuf> =
        entries.iter().filter(|(path, is_dir)| !is_dir && is_image_name(path)).map(|e| e.0.clone()).collect();
    let folders: Vec<&PathBuf> = entries.iter().filter(|(_, is_dir)| *is_dir).map(|e| &e.0).collect();
    let mut classes = BTreeMap::new();
    for folder in &folders {
        let mut files = Vec::new();
        walk(folder, &mut above, &mut files, &mut warnings);
        classes.insert(folder.file_name().unwrap_or(OsStr::new("")).to_os_string(), files);
    }
    if classes.values().all(Vec::is_empty) {
        if loose.is_empty() {
            return Err(DataError::NoImages { path: root.to_path_buf() });
        }
        return Ok(Listing { files: loose, labels: None, classes: Vec::new(), warnings });
    }
    if !loose.is_empty() {
        warnings.push(Warning::LooseImages { path: root.to_path_buf(), count: loose.len() });
    }
    let (mut files, mut labels, mut names) = (Vec::new(), Vec::new(), Vec::new());
    for (label, (name, members)) in classes.into_iter().enumerate() {
        if members.is_empty() {
            warnings.push(Warning::EmptyClass { path: root.join(&name) });
        }
        labels.extend(std::iter::repeat_n(label as i64, members.len()));
        files.extend(members);
        names.push(name.to_string_lossy().into_owned());
    }
    Ok(Listing { files, labels: Some(labels), classes: names, warnings })
}

fn canonical(path: &Path) -> Result<PathBuf, DataError> {
    fs::canonicalize(path).map_err(|source| DataError::Read { path: path.to_path_buf(), source })
}

/// The visible entries of a folder by name, each with whether it is a folder (links followed).
fn entries(folder: &Path) -> std::io::Result<Vec<(PathBuf, bool)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        let path = entry.path();
        // A dangling link is neither; it is left out by its kind, not reported as a damaged image.
        let Ok(kind) = fs::metadata(&path) else { continue };
        if kind.is_dir() || kind.is_file() {
            found.push((path, kind.is_dir()));
        }
    }
    found.sort_by(|a, b| a.0.file_name().cmp(&b.0.file_name()));
    Ok(found)
}

/// Whether a file calls itself a JPEG or PNG.
fn is_image_name(path: &Path) -> bool {
    let extension = path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase());
    matches!(extension.as_deref(), Some("jpg" | "jpeg" | "png"))
}

/// Adds the images in `folder` and below; `above` holds the real paths of the folders on the way.
fn walk(folder: &Path, above: &mut Vec<PathBuf>, files: &mut Vec<PathBuf>, warnings: &mut Vec<Warning>) {
    let unreadable = |source: std::io::Error| Warning::Unreadable { path: folder.to_path_buf(), cause: source.to_string() };
    let real = match fs::canonicalize(folder) {
        Ok(real) => real,
        Err(e) => return warnings.push(unreadable(e)),
    };
    if above.contains(&real) || above.len() > DEEPEST {
        return warnings.push(Warning::Loop { path: folder.to_path_buf() });
    }
    let entries = match entries(folder) {
        Ok(entries) => entries,
        Err(e) => return warnings.push(unreadable(e)),
    };
    above.push(real);
    for (path, is_dir) in entries {
        if is_dir {
            walk(&path, above, files, warnings);
        } else if is_image_name(&path) {
            files.push(path);
        }
    }
    above.pop();
}
