//! Opening files: only regular ones, never blocking, and noticing when they change underfoot.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::path::Path;
use std::time::SystemTime;

use bytes::Bytes;

use super::error::Cause;
use super::map::map;

/// Unit: bytes. Below it a file is read into memory, which needs no `unsafe` and cannot fail later.
const MAP_FROM: u64 = 64 << 20;

/// An open regular file with what was known of it when it was opened.
#[derive(Debug)]
pub(super) struct Source {
    file: File,
    len: u64,
    modified: Option<SystemTime>,
}

impl Source {
    /// Opens `path` for reading. Errors: [`Cause`]s of the container, `NotRegular` among them, without ever blocking on a FIFO.
    pub(super) fn open(path: &Path) -> Result<Self, Cause> {
        // Devices must not even be opened (that can have effects), so look first; look again at the open handle, because the
        // path may have come to name something else in between.
        let before = std::fs::metadata(path).map_err(reading)?;
        if before.is_dir() {
            return Err(Cause::IsDirectory { only: only_model_in(path) });
        }
        if !before.is_file() {
            return Err(Cause::NotRegular);
        }
        let mut options = OpenOptions::new();
        options.read(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NONBLOCK);
        let file = options.open(path).map_err(reading)?;
        let meta = file.metadata().map_err(reading)?;
        if !meta.is_file() {
            return Err(Cause::NotRegular);
        }
        Ok(Self { file, len: meta.len(), modified: modified(&meta) })
    }

    /// Unit: bytes.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// The open file.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// The first bytes, for guessing what a file is that is too large to be looked at.
    pub(super) fn head(&self) -> io::Result<Vec<u8>> {
        let mut head = Vec::new();
        (&self.file).take(4096).read_to_end(&mut head)?;
        Ok(head)
    }

    /// The whole content: read where it is small, mapped where it is not.
    pub(super) fn bytes(&self) -> Result<Bytes, Cause> {
        let read = |source| Cause::Read { source };
        if self.len >= MAP_FROM {
            return map(&self.file).map_err(read);
        }
        let mut content = Vec::new();
        let len = usize::try_from(self.len).map_err(|_| Cause::TooLarge)?;
        content.try_reserve_exact(len).map_err(|_| read(io::ErrorKind::OutOfMemory.into()))?;
        (&self.file).take(self.len + 1).read_to_end(&mut content).map_err(read)?;
        if content.len() != len { Err(Cause::Changed) } else { Ok(content.into()) }
    }

    /// Whether the file is still as long and as old as it was when it was opened.
    pub(super) fn is_unchanged(&self) -> bool {
        self.file.metadata().is_ok_and(|m| m.len() == self.len && modified(&m) == self.modified)
    }
}

fn modified(meta: &Metadata) -> Option<SystemTime> {
    meta.modified().ok()
}

fn reading(source: io::Error) -> Cause {
    match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Cause::NoSuchFile,
        io::ErrorKind::PermissionDenied => Cause::PermissionDenied,
        _ => Cause::Read { source },
    }
}

/// The one .onnx file in a directory, to name in a hint.
fn only_model_in(directory: &Path) -> Option<String> {
    let mut models = std::fs::read_dir(directory).ok()?.take(10_000).filter_map(|entry| {
        let path = entry.ok()?.path();
        path.extension().is_some_and(|e| e == "onnx").then(|| path.to_string_lossy().into_owned())
    });
    let first = models.next()?;
    models.next().is_none().then(|| super::error::shown(&first))
}

/// What a file that is no model looks like, if it is something known.
pub(super) fn diagnose(bytes: &[u8]) -> Option<Cause> {
    let other = |looks_like| Some(Cause::OtherFormat { looks_like });
    if bytes.is_empty() {
        return Some(Cause::Empty);
    }
    if bytes.starts_with(b"version https://git-lfs") {
        return Some(Cause::LfsPointer);
    }
    let text = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes).trim_ascii_start();
    match text.first() {
        Some(b'<') => return Some(Cause::Page { looks_like: "HTML" }),
        Some(b'{' | b'[') => return Some(Cause::Page { looks_like: "JSON" }),
        _ => {}
    }
    if let Some(header) = bytes.first_chunk::<8>()
        && u64::from_le_bytes(*header) < 100 << 20
        && bytes.get(8) == Some(&b'{')
    {
        return other("a safetensors file");
    }
    match bytes.get(4..8) {
        Some(b"TFL3") => return other("a TFLite model"),
        Some(b"ORTM") => return other("an ONNX Runtime .ort flatbuffer"),
        _ => {}
    }
    let head = &bytes[..bytes.len().min(4096)];
    let has = |needle: &[u8]| head.windows(needle.len()).any(|w| w == needle);
    match bytes {
        [b'P', b'K', 3, 4, ..] if has(b"data.pkl") || has(b"/version") => other("a PyTorch .pt file (zip archive)"),
        [b'P', b'K', 3 | 5, 4 | 6, ..] => other("a zip archive (.pt, .npz, .zip?)"),
        [0x1f, 0x8b, ..] => other("a gzip file: unpack it first"),
        [0x80, 2..=5, ..] => other("a Python pickle (an old .pt file?)"),
        [0x89, b'H', b'D', b'F', ..] => other("an HDF5 file (Keras?)"),
        [0x93, b'N', b'U', b'M', b'P', b'Y', ..] => other("a NumPy array"),
        [b'G', b'G', b'U', b'F', ..] => other("a GGUF file"),
        [0xfd, b'7', b'z', b'X', b'Z', ..] => other("an xz file: unpack it first"),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => other("a zstd file: unpack it first"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_file_that_grows_or_shrinks_is_noticed() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"12345678").unwrap();
        let source = Source::open(file.path()).unwrap();
        assert!(source.is_unchanged());
        file.write_all(b"9").unwrap();
        assert!(!source.is_unchanged());
        assert!(matches!(source.bytes(), Err(Cause::Changed)));
        let source = Source::open(file.path()).unwrap();
        file.as_file().set_len(3).unwrap();
        assert!(matches!(source.bytes(), Err(Cause::Changed)));
    }

    #[test]
    fn large_files_are_mapped_and_read_the_same() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(MAP_FROM).unwrap();
        file.write_all(b"start").unwrap();
        let bytes = Source::open(file.path()).unwrap().bytes().unwrap();
        assert_eq!((bytes.len(), &bytes[..6]), (64 << 20, &b"start\0"[..]));
    }
}
