//! Saving: a complete file appears under its name, or nothing does.
//!
//! Everything is written to temporary files in the directory of the output, flushed to the disk, and renamed. Where tensors stand
//! in a data file (as the input had them, or because the model is larger than protobuf allows), it is called `<stem>.onnx.data`
//! and takes its name before the model does; a model of that name that is to be replaced is removed before its data is, so that no
//! model is ever seen beside the data of another.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tempfile::NamedTempFile;

use super::error::{Cause, Error, shown};
use super::source::Source;
use super::stream::{self, Pieces};
use super::tensor::{Aside, DataFile};
use super::write::{PROTO_LIMIT, to_model};
use crate::graph::Graph;

/// What happens where the output exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overwrite {
    /// It is an error.
    Refuse,
    /// It is replaced at the end.
    Force,
}

/// The data file of a model at `path`: `<stem>.onnx.data` beside it.
pub fn data_path(path: &Path) -> PathBuf {
    let mut name = path.file_stem().unwrap_or_default().to_os_string();
    name.push(".onnx.data");
    path.with_file_name(name)
}

/// Checks before any work that `path` can be written: its directory is there and takes files; neither it nor its data file is one
/// of `inputs` under any name or link; and nothing stands there, or `overwrite` allows it to be replaced. Touches nothing.
///
/// Errors: which of these does not hold.
pub fn check_output(path: &Path, inputs: &[PathBuf], overwrite: Overwrite) -> Result<(), Error> {
    let fail = |cause| Err(Error::new(path, cause));
    if path == Path::new("-") {
        return fail(Cause::StandardStream);
    }
    for output in [path.to_path_buf(), data_path(path)] {
        if inputs.iter().any(|input| is_same_file(&output, input)) {
            return fail(Cause::OverwritesInput);
        }
    }
    check_place(path, overwrite).or_else(fail)?;
    match NamedTempFile::new_in(directory_of(path)) {
        Ok(_) => Ok(()),
        Err(source) => fail(Cause::DirectoryNotWritable { directory: shown(&directory_of(path).to_string_lossy()), source }),
    }
}

fn check_place(path: &Path, overwrite: Overwrite) -> Result<(), Cause> {
    let directory = directory_of(path);
    let name = || shown(&directory.to_string_lossy());
    match fs::metadata(&directory) {
        Ok(meta) if !meta.is_dir() => return Err(Cause::NotADirectory { directory: name() }),
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(Cause::NoDirectory { directory: name() }),
        Err(e) if e.kind() == io::ErrorKind::NotADirectory => return Err(Cause::NotADirectory { directory: name() }),
        Err(source) => return Err(Cause::DirectoryNotWritable { directory: name(), source }),
    }
    if path.file_name().is_none() {
        return Err(Cause::IsDirectory { only: None });
    }
    let Ok(meta) = fs::symlink_metadata(path) else { return Ok(()) };
    if meta.is_dir() {
        return Err(Cause::IsDirectory { only: None });
    }
    // A link is replaced itself, whatever it leads to; a device or a FIFO is not ours to replace.
    if !meta.is_file() && !meta.is_symlink() {
        return Err(Cause::OutputNotRegular);
    }
    if overwrite == Overwrite::Refuse { Err(Cause::Exists) } else { Ok(()) }
}

fn directory_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p.to_path_buf(),
        _ => PathBuf::from("."),
    }
}

/// Whether two paths lead to one file: by any spelling, symbolic link or hard link.
fn is_same_file(a: &Path, b: &Path) -> bool {
    let absolute = |p: &Path| Some(directory_of(p).canonicalize().ok()?.join(p.file_name()?));
    if absolute(a).is_some_and(|x| absolute(b) == Some(x)) {
        return true;
    }
    let (Ok(x), Ok(y)) = (fs::metadata(a), fs::metadata(b)) else { return false };
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        (x.dev(), x.ino()) == (y.dev(), y.ino())
    }
    #[cfg(not(unix))]
    {
        x.len() == y.len() && a.canonicalize().ok() == b.canonicalize().ok()
    }
}

/// Writes the model to `path`, and its data file beside it where it has one.
///
/// Errors: as [`check_output`] without inputs; the disk; a graph that cannot be encoded.
pub fn save(graph: &Graph, path: &Path, overwrite: Overwrite) -> Result<(), Error> {
    save_if(graph, path, overwrite, || Ok(()))
}

/// As [`save`], but asks `allowed` when all is written and before it takes its name.
///
/// Errors: as [`save`]; what `allowed` says, and then nothing appears.
pub fn save_if<E: From<Error>>(
    graph: &Graph,
    path: &Path,
    overwrite: Overwrite,
    allowed: impl FnOnce() -> Result<(), E>,
) -> Result<(), E> {
    let fail = |cause| Error::new(path, cause);
    check_place(path, overwrite).map_err(fail)?;
    let (model, data) = encode(graph, path, PROTO_LIMIT).map_err(fail)?;
    if data.is_some() {
        let data_path = data_path(path);
        check_place(&data_path, overwrite).map_err(|cause| Error::new(&data_path, cause))?;
    }
    let needs_bytes = u64::try_from(model.len()).unwrap_or(u64::MAX) + data.as_ref().map_or(0, |d| d.len);
    let failed = |source| fail(not_written(source, needs_bytes));
    let files = Files::write(model, data.as_ref(), path).map_err(failed)?;
    allowed()?;
    Ok(files.place(path, overwrite).map_err(failed)?)
}

/// Writes any output file the way models are written: complete under its name, or not at all.
///
/// Errors: as [`check_output`] without inputs; the disk.
pub fn write_file(path: &Path, bytes: &[u8], overwrite: Overwrite) -> Result<(), Error> {
    write_file_with(path, overwrite, |w| w.write_all(bytes))
}

/// As [`write_file`], for what need not be in memory as a whole: `write` puts it out piece by piece.
///
/// Errors: as [`write_file`].
pub fn write_file_with(
    path: &Path,
    overwrite: Overwrite,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<(), Error> {
    let fail = |cause| Error::new(path, cause);
    check_place(path, overwrite).map_err(fail)?;
    let put = || -> io::Result<()> {
        let directory = directory_of(path);
        let file = temporary(&directory, write)?;
        place(file, path, overwrite)?;
        sync_directory(&directory)
    };
    put().map_err(|source| fail(Cause::Write { source }))
}

/// The model, and its data file where it has one or would be larger than `limit` bytes without.
fn encode(graph: &Graph, path: &Path, limit: usize) -> Result<(Pieces, Option<DataFile>), Cause> {
    let location = data_path(path).file_name().unwrap_or_default().to_string_lossy().into_owned();
    let encoded = |takes_raw| -> Result<_, Cause> {
        let mut aside = Aside::new(location.clone(), takes_raw);
        let message = to_model(graph, Some(&mut aside))?;
        Ok((stream::model(message, &aside.late), aside.file))
    };
    let (mut model, mut data) = encoded(false)?;
    if model.len() > limit {
        (model, data) = encoded(true)?;
    }
    if model.len() > limit {
        return Err(Cause::OutputTooLarge);
    }
    Ok((model, Some(data).filter(|d| !d.parts.is_empty())))
}

fn not_written(source: io::Error, needs_bytes: u64) -> Cause {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Cause::NoSpace { needs_bytes },
        io::ErrorKind::AlreadyExists => Cause::Exists,
        _ => Cause::Write { source },
    }
}

/// A model and its data, written and flushed, that have no names yet.
struct Files {
    model: NamedTempFile,
    data: Option<NamedTempFile>,
}

impl Files {
    fn write(model: Pieces, data: Option<&DataFile>, path: &Path) -> io::Result<Self> {
        let directory = directory_of(path);
        let data = data.map(|d| temporary(&directory, |w| write_data(d, w))).transpose()?;
        let pieces = model.into_list();
        let model = temporary(&directory, |w| pieces.iter().try_for_each(|piece| piece.write_to(w)))?;
        Ok(Self { model, data })
    }

    fn place(self, path: &Path, overwrite: Overwrite) -> io::Result<()> {
        if let Some(file) = self.data {
            if overwrite == Overwrite::Force && fs::symlink_metadata(path).is_ok() {
                fs::remove_file(path)?;
            }
            place(file, &data_path(path), overwrite)?;
        }
        place(self.model, path, overwrite)?;
        sync_directory(&directory_of(path))
    }
}

/// Unit: bytes that are gathered before they are written.
const WRITE_BYTES: usize = 256 << 10;

/// A temporary file in `directory`, written and flushed; it vanishes unless it is placed.
fn temporary(directory: &Path, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".vitrim-").suffix(".tmp");
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666)); // less the umask, as for any new file
    let file = builder.tempfile_in(directory)?;
    let mut writer = BufWriter::with_capacity(WRITE_BYTES, file.as_file());
    write(&mut writer)?;
    writer.flush()?;
    drop(writer);
    file.as_file().sync_all()?;
    Ok(file)
}

fn write_data(data: &DataFile, writer: &mut dyn Write) -> io::Result<()> {
    const ZEROS: [u8; 4096] = [0; 4096];
    let mut at = 0;
    for (offset, bytes) in &data.parts {
        let gap = usize::try_from(offset - at).map_err(io::Error::other)?;
        writer.write_all(&ZEROS[..gap])?; // less than one page, by the alignment
        bytes.write_to(writer)?;
        at = offset + u64::try_from(bytes.len()).map_err(io::Error::other)?;
    }
    Ok(())
}

fn place(file: NamedTempFile, path: &Path, overwrite: Overwrite) -> io::Result<()> {
    match overwrite {
        Overwrite::Force => file.persist(path).map(drop).map_err(|e| e.error),
        Overwrite::Refuse => file.persist_noclobber(path).map(drop).map_err(|e| e.error),
    }
}

fn sync_directory(directory: &Path) -> io::Result<()> {
    match File::open(directory).and_then(|d| d.sync_all()) {
        // Some file systems cannot flush directories; the file itself is safe.
        Err(e) if matches!(e.kind(), io::ErrorKind::Unsupported | io::ErrorKind::InvalidInput) => Ok(()),
        other => other,
    }
}

/// The content of a file; where it is large, its pages are read when they are first looked at.
///
/// Errors: the file cannot be read, or is not a regular one.
pub fn bytes_of_file(path: &Path) -> Result<bytes::Bytes, Error> {
    let content = || {
        let source = Source::open(path)?;
        match source.len() {
            0 => Ok(bytes::Bytes::new()),
            _ => source.bytes(),
        }
    };
    content().map_err(|cause| Error::new(path, cause))
}

/// The sha256 of a file's content, in hexadecimal: what plans and checkpoints say they belong to.
///
/// Errors: as [`bytes_of_file`].
pub fn sha256_of_file(path: &Path) -> Result<String, Error> {
    Ok(Sha256::digest(&bytes_of_file(path)?).iter().map(|b| format!("{b:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::Tensor;
    use bytes::Bytes;
    use onnx_proto::ModelProto;
    use prost::Message;

    #[test]
    fn a_model_that_is_too_large_for_one_file_gets_a_data_file() {
        let mut graph = Graph::new(9, vec![(String::new(), 18)], Bytes::new());
        for i in 0..4 {
            graph.add_initializer("w", Tensor::f32(&[1000], &[1.0; 1000]));
            graph.add_initializer("b", Tensor::f32(&[i], &vec![1.0; i]));
        }
        let path = Path::new("m.onnx");
        let (inline, none) = encode(&graph, path, 20_000).unwrap();
        assert!(none.is_none());
        let (model, data) = encode(&graph, path, 10_000).unwrap();
        let data = data.unwrap();
        assert_eq!(
            data.parts.iter().map(|(at, b)| (*at, b.len())).collect::<Vec<_>>(),
            [(0, 4000), (4032, 4000), (8064, 4000), (12096, 4000)]
        );
        let mut written = Vec::new();
        write_data(&data, &mut written).unwrap();
        assert_eq!(written.len(), usize::try_from(data.len).unwrap());
        let initializers = |m: Pieces| ModelProto::decode(m.into_bytes()).unwrap().graph.unwrap().initializer;
        for (a, b) in initializers(inline).iter().zip(&initializers(model)) {
            let outside = a.raw_data.as_ref().is_some_and(|r| r.len() >= 1024);
            assert_eq!((b.raw_data.is_none() && !b.external_data.is_empty(), &a.dims), (outside, &b.dims));
        }
        assert!(matches!(encode(&graph, path, 100), Err(Cause::OutputTooLarge)));
    }
}
