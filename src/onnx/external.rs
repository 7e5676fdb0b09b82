//! Tensor data in files beside the model: which files may be read, and which part of them.
//!
//! A location is a path relative to the model. Its text is checked first, before anything is asked of the file system; then its
//! canonical path must lie in the canonical directory of the path given, or of the real model file (the cache of a model hub links
//! both the model and its data into one directory). The file is opened once and the open handle is checked, so a link swapped in
//! between gains nothing. Only the parts that tensors name are looked at.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use bytes::Bytes;
use onnx_proto::StringStringEntryProto;

use super::error::{Cause, shown};
use super::source::Source;

/// The data files of one model.
#[derive(Debug)]
pub(super) struct DataFiles {
    /// Directories that locations are looked up in: of the path given, then of the real file. Empty: data files are refused.
    bases: Vec<PathBuf>,
    /// Unit: bytes.
    limit: u64,
    opened: BTreeMap<PathBuf, (Source, Bytes)>,
    /// What is odd but harmless.
    pub(super) warnings: Vec<String>,
}

/// Where a tensor's bytes are.
struct Place {
    location: String,
    offset: u64,
    length: Option<u64>,
}

impl DataFiles {
    /// For a model without a path, which cannot have data files.
    pub(super) fn none() -> Self {
        Self { bases: Vec::new(), limit: 0, opened: BTreeMap::new(), warnings: Vec::new() }
    }

    /// Data files of the model at `path`, of `limit` bytes in all.
    pub(super) fn beside(path: &Path, limit: u64) -> Self {
        let given = match path.parent() {
            Some(p) if p.as_os_str().is_empty() => PathBuf::from("."),
            Some(p) => p.to_path_buf(),
            None => PathBuf::from("."),
        };
        let real = path.canonicalize().ok().and_then(|p| p.parent().map(Path::to_path_buf));
        let mut bases: Vec<PathBuf> = Vec::new();
        for base in [given.canonicalize().ok(), real].into_iter().flatten() {
            if !bases.contains(&base) {
                bases.push(base);
            }
        }
        Self { bases, limit, ..Self::none() }
    }

    /// Canonical paths of the files that were read.
    pub(super) fn paths(&self) -> impl Iterator<Item = &Path> {
        self.opened.keys().map(PathBuf::as_path)
    }

    /// Errors: a file that is not what it was when it was opened.
    pub(super) fn check_unchanged(&self) -> Result<(), Cause> {
        match self.opened.iter().find(|(_, (source, _))| !source.is_unchanged()) {
            Some((path, _)) => Err(Cause::ExternalChanged { location: shown(&path.to_string_lossy()) }),
            None => Ok(()),
        }
    }

    /// The `need` bytes of `tensor`, which `entries` locate.
    pub(super) fn bytes(&mut self, tensor: &str, entries: &[StringStringEntryProto], need: usize) -> Result<Bytes, Cause> {
        let place = self.place(tensor, entries)?;
        if self.bases.is_empty() {
            return Err(Cause::ExternalNeedsPath);
        }
        let location = shown(&place.location);
        let content = self.open(tensor, &place.location)?;
        let end = u64::try_from(content.len()).unwrap_or(u64::MAX);
        let length = place.length.unwrap_or(u64::try_from(need).unwrap_or(u64::MAX));
        let past = || Cause::ExternalPastEnd { tensor: tensor.to_string(), location, offset: place.offset, length, end };
        let stop = place.offset.checked_add(length).filter(|stop| *stop <= end).ok_or_else(past)?;
        let (Ok(start), Ok(stop)) = (usize::try_from(place.offset), usize::try_from(stop)) else {
            return Err(Cause::ShapeOverflow { tensor: tensor.to_string() });
        };
        Ok(content.slice(start..stop))
    }

    fn place(&mut self, tensor: &str, entries: &[StringStringEntryProto]) -> Result<Place, Cause> {
        let (mut location, mut offset, mut length) = (None, None, None);
        for entry in entries {
            let (key, value) = (entry.key.as_deref().unwrap_or_default(), entry.value.as_deref().unwrap_or_default());
            let taken = match key {
                "location" => location.replace(value.to_string()).is_some(),
                "offset" => offset.replace(number(tensor, "offset", value)?).is_some(),
                "length" => length.replace(number(tensor, "length", value)?).is_some(),
                "checksum" => false,
                _ => {
                    self.warnings.push(format!("{tensor}: unknown external data key '{}' is ignored", shown(key)));
                    false
                }
            };
            if taken {
                return Err(Cause::ExternalTwice { tensor: tensor.to_string(), key: key.to_string() });
            }
        }
        let location = location.ok_or_else(|| Cause::ExternalNoLocation { tensor: tensor.to_string() })?;
        if leaves(&location) {
            return Err(Cause::ExternalEscapes { tensor: tensor.to_string(), location: shown(&location) });
        }
        Ok(Place { location, offset: offset.unwrap_or(0), length })
    }

    fn open(&mut self, tensor: &str, location: &str) -> Result<Bytes, Cause> {
        let named = || (tensor.to_string(), shown(location));
        let missing = || Cause::ExternalMissing { tensor: tensor.to_string(), location: shown(location) };
        let path = self.bases.iter().find_map(|b| b.join(location).canonicalize().ok()).ok_or_else(missing)?;
        if !self.bases.iter().any(|b| path.starts_with(b)) {
            let (tensor, location) = named();
            return Err(Cause::ExternalEscapes { tensor, location });
        }
        if let Some((_, content)) = self.opened.get(&path) {
            return Ok(content.clone());
        }
        let source = Source::open(&path).map_err(|cause| in_data_file(cause, named()))?;
        if !is_at(&source, &path) {
            let (tensor, location) = named();
            return Err(Cause::ExternalEscapes { tensor, location });
        }
        let total: u64 = self.opened.values().map(|(s, _)| s.len()).sum();
        if total.saturating_add(source.len()) > self.limit {
            return Err(Cause::ExternalTooLarge { limit_gib: self.limit >> 30 });
        }
        let content = match source.len() {
            0 => Bytes::new(),
            _ => source.bytes().map_err(|cause| in_data_file(cause, named()))?,
        };
        self.opened.insert(path, (source, content.clone()));
        Ok(content)
    }
}

/// The same error, said of a data file.
fn in_data_file(cause: Cause, (tensor, location): (String, String)) -> Cause {
    match cause {
        Cause::NoSuchFile => Cause::ExternalMissing { tensor, location },
        Cause::IsDirectory { .. } | Cause::NotRegular => Cause::ExternalNotRegular { tensor, location },
        Cause::Changed => Cause::ExternalChanged { location },
        Cause::Read { source } => Cause::ExternalRead { tensor, location, source },
        Cause::PermissionDenied => Cause::ExternalRead { tensor, location, source: std::io::ErrorKind::PermissionDenied.into() },
        other => other,
    }
}

fn number(tensor: &str, key: &'static str, value: &str) -> Result<u64, Cause> {
    let bad = || Cause::ExternalNumber { tensor: tensor.to_string(), key, value: shown(value) };
    value.parse().map_err(|_| bad())
}

/// Whether the text of a location alone says that it is not inside the model's directory, on any system.
fn leaves(location: &str) -> bool {
    let drive = location.as_bytes().get(1) == Some(&b':') && location.as_bytes()[0].is_ascii_alphabetic();
    if drive || location.contains(['\\', '\0']) || location.contains("_ORT_MEM_ADDR_") {
        return true;
    }
    let mut depth = 0i64;
    for part in Path::new(location).components() {
        depth += match part {
            Component::Normal(_) => 1,
            Component::CurDir => 0,
            Component::ParentDir => -1,
            Component::RootDir | Component::Prefix(_) => return true,
        };
        if depth < 0 {
            return true;
        }
    }
    false
}

/// Whether the open file is the one at `path` still, where the system can tell.
fn is_at(source: &Source, path: &Path) -> bool {
    #[cfg(target_os = "linux")]
    {
        use std::os::fd::AsRawFd;
        let link = PathBuf::from(format!("/proc/self/fd/{}", source.file().as_raw_fd()));
        if let Ok(real) = std::fs::read_link(link) {
            return real == path;
        }
    }
    path.canonicalize().is_ok_and(|p| p == path && source.is_unchanged())
}

#[cfg(test)]
mod tests {
    use super::leaves;

    #[test]
    fn locations_that_leave_are_seen_by_their_text() {
        for location in
            ["../x", "a/../../b", "/etc/passwd", "C:x", "c:/x", "\\\\host\\share", "a\\..\\b", "a\0b", "*/_ORT_MEM_ADDR_/*", ".."]
        {
            assert!(leaves(location), "{location}");
        }
        for location in ["x.bin", "a/b.bin", "./x", "a/../b", ".", "", "x..y", "weights:1"] {
            assert!(!leaves(location), "{location}");
        }
    }
}
