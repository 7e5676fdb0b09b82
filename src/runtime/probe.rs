//! Trying a library before it is used: is it ONNX Runtime, for this machine, new enough, and does loading it end?
//!
//! Two ways. In a child process ([`Probe::Child`]): a library whose loading hangs or crashes takes only the child with
//! it; the command does this, by starting itself with [`PROBE_ARGUMENT`]. In a thread ([`Probe::Thread`]): for programs
//! that use vitrim as a library and cannot start themselves a second time. A hanging library then also gives an error
//! after [`TIME_LIMIT`], but the thread stays in the system's loader, and a normal end of the program may wait for it;
//! a crash is not survived.
//!
//! Invariant: the version is read and compared before any other function of the library is called.

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use crate::runtime::Error;
use crate::runtime::error::one_line;

/// The oldest ONNX Runtime that works. It is also the version of its function table that is used.
pub const MINIMUM_VERSION: &str = "1.20";
#[cfg(feature = "ort")]
const MINIMUM_MINOR: u32 = 20;

/// How long loading a library may take.
pub const TIME_LIMIT: Duration = Duration::from_secs(10);

/// First argument of the child process; see [`answer_probe`].
pub const PROBE_ARGUMENT: &str = "__try-onnxruntime";

/// How a library is tried.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Probe {
    /// In a thread of this process.
    #[default]
    Thread,
    /// By starting this program, whose `main` calls [`answer_probe`] first.
    Child(PathBuf),
}

/// What loading a library showed; the child's answer on its stdout is the same in text.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Answer {
    Version(String),
    TooOld(String),
    NotOnnxRuntime(String),
    CannotLoad(String),
}

/// Tries a library and gives its version, such as "1.24.4".
///
/// Errors: [`Error::NotOnnxRuntime`], [`Error::WrongMachine`], [`Error::LibraryLoad`], [`Error::TooOld`],
/// [`Error::LibraryHangs`], [`Error::LibraryCrashes`]; [`Error::NotBuilt`] without the feature `ort`.
pub fn preflight(path: &Path, probe: &Probe) -> Result<String, Error> {
    if path.is_absolute() {
        check_header(path)?;
    }
    let answer = match probe {
        Probe::Thread => in_thread(path, TIME_LIMIT)?,
        Probe::Child(program) => in_child(path, program, TIME_LIMIT)?,
    };
    let path = path.to_path_buf();
    match answer {
        Answer::Version(version) => Ok(version),
        Answer::TooOld(version) => Err(Error::TooOld { path, version }),
        Answer::NotOnnxRuntime(reason) => Err(Error::NotOnnxRuntime { path, reason }),
        Answer::CannotLoad(reason) => Err(Error::LibraryLoad { path, reason }),
    }
}

/// To be called first in `main` of a program that gives itself as [`Probe::Child`]: if the arguments (after the
/// program's name) are a request to try a library, writes the answer to `out` and gives the exit code.
pub fn answer_probe(arguments: &[OsString], out: &mut dyn Write) -> Option<i32> {
    let [first, path] = arguments else { return None };
    if first.to_str() != Some(PROBE_ARGUMENT) {
        return None;
    }
    let Ok(answer) = load(Path::new(path)) else { return Some(3) };
    let (word, text) = match answer {
        Answer::Version(version) => ("version", version),
        Answer::TooOld(version) => ("old", version),
        Answer::NotOnnxRuntime(reason) => ("other", reason),
        Answer::CannotLoad(reason) => ("unloadable", reason),
    };
    Some(if writeln!(out, "vitrim-probe {word} {text}").is_ok() && out.flush().is_ok() { 0 } else { 3 })
}

fn in_thread(path: &Path, limit: Duration) -> Result<Answer, Error> {
    let (send, receive) = mpsc::channel();
    let file = path.to_path_buf();
    let start = thread::Builder::new().name("vitrim-probe".into()).spawn(move || {
        // The receiver is gone only after the time limit, when nobody waits for the answer any more.
        let _ = send.send(load(&file));
    });
    start.map_err(|source| Error::Io { path: path.to_path_buf(), source })?;
    match receive.recv_timeout(limit) {
        Ok(answer) => answer,
        Err(mpsc::RecvTimeoutError::Timeout) => Err(Error::LibraryHangs { path: path.to_path_buf(), seconds: limit.as_secs() }),
        Err(mpsc::RecvTimeoutError::Disconnected) => {
            Err(Error::LibraryCrashes { path: path.to_path_buf(), reason: "its thread ended".to_string() })
        }
    }
}

fn in_child(path: &Path, program: &Path, limit: Duration) -> Result<Answer, Error> {
    let io = |source| Error::Io { path: program.to_path_buf(), source };
    let mut child = Command::new(program)
        .arg(PROBE_ARGUMENT)
        .arg(path)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(io)?;
    let start = Instant::now();
    let status = loop {
        match child.try_wait().map_err(io)? {
            Some(status) => break status,
            None if start.elapsed() >= limit => {
                end(&mut child);
                return Err(Error::LibraryHangs { path: path.to_path_buf(), seconds: limit.as_secs() });
            }
            None => thread::sleep(Duration::from_millis(2)),
        }
    };
    // The answer is one line, so it fits into the pipe and the child never waits for us to read it.
    let mut text = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(64 * 1024).read_to_end(&mut text).map_err(io)?;
    }
    let text = String::from_utf8_lossy(&text);
    match text.lines().find_map(parse_answer) {
        // A library may fail in its own clean-up after it has been tried; what it answered still holds.
        Some(answer) => Ok(answer),
        None => Err(Error::LibraryCrashes { path: path.to_path_buf(), reason: status.to_string() }),
    }
}

fn end(child: &mut Child) {
    // Both fail only if the child has ended by itself, which is what is wanted.
    let _ = child.kill();
    let _ = child.wait();
}

fn parse_answer(line: &str) -> Option<Answer> {
    let (word, text) = line.strip_prefix("vitrim-probe ")?.split_once(' ')?;
    let text = one_line(text);
    match word {
        "version" => Some(Answer::Version(text)),
        "old" => Some(Answer::TooOld(text)),
        "other" => Some(Answer::NotOnnxRuntime(text)),
        "unloadable" => Some(Answer::CannotLoad(text)),
        _ => None,
    }
}

/// What the first bytes of a file tell without running anything of it: most wrong files are found out here.
fn check_header(path: &Path) -> Result<(), Error> {
    let io = |source| Error::Io { path: path.to_path_buf(), source };
    let other = |reason: &str| Error::NotOnnxRuntime { path: path.to_path_buf(), reason: reason.to_string() };
    let file = File::open(path).map_err(io)?;
    let metadata = file.metadata().map_err(io)?;
    if metadata.is_dir() {
        return Err(other("a folder"));
    }
    if metadata.len() == 0 {
        return Err(other("an empty file"));
    }
    if !cfg!(target_os = "linux") {
        return Ok(());
    }
    // The table of segments follows the header at once; 64 kB hold a thousand of them.
    let mut head = Vec::new();
    file.take(1 << 16).read_to_end(&mut head).map_err(io)?;
    if !head.starts_with(b"\x7fELF") {
        return Err(other("no shared library"));
    }
    let found = match (head.get(4), head.get(18..20)) {
        (Some(2), Some([62, 0])) => "x86_64",
        (Some(2), Some([183, 0])) => "aarch64",
        (Some(2), Some([243, 0])) => "riscv64",
        (Some(1), Some([3, 0])) => "x86 (32 bit)",
        (Some(1), Some([40, 0])) => "arm (32 bit)",
        _ => "another machine",
    };
    let expected = std::env::consts::ARCH;
    if found != expected {
        return Err(Error::WrongMachine { path: path.to_path_buf(), expected, found: found.to_string() });
    }
    match segments_end(&head) {
        Some(end) if end > metadata.len() => Err(other("the file is cut off")),
        _ => Ok(()),
    }
}

/// Where the last loaded segment ends in the file. Reading memory behind a file's end, as the loader would do for a
/// download that was cut off, ends the process. Source: ELF-64 specification, e_phoff, p_offset and p_filesz.
fn segments_end(head: &[u8]) -> Option<u64> {
    const LOAD: u32 = 1;
    let u16_at = |at: usize| Some(u16::from_le_bytes(head.get(at..at.checked_add(2)?)?.try_into().ok()?));
    let u32_at = |at: usize| Some(u32::from_le_bytes(head.get(at..at.checked_add(4)?)?.try_into().ok()?));
    let u64_at = |at: usize| Some(u64::from_le_bytes(head.get(at..at.checked_add(8)?)?.try_into().ok()?));
    let (table, size, count) = (usize::try_from(u64_at(32)?).ok()?, usize::from(u16_at(54)?), usize::from(u16_at(56)?));
    let mut end = 0;
    for index in 0..count {
        let at = table.checked_add(size.checked_mul(index)?)?;
        if u32_at(at)? == LOAD {
            end = end.max(u64_at(at.checked_add(8)?)?.saturating_add(u64_at(at.checked_add(32)?)?));
        }
    }
    Some(end)
}

#[cfg(not(feature = "ort"))]
fn load(_path: &Path) -> Result<Answer, Error> {
    Err(Error::NotBuilt { runtime: crate::runtime::RuntimeName::Ort })
}

#[cfg(feature = "ort")]
fn load(path: &Path) -> Result<Answer, Error> {
    Ok(native::load(path))
}

/// Loading a library and calling its two entry functions is outside what the language can check.
#[cfg(feature = "ort")]
#[allow(unsafe_code, reason = "a shared library is loaded and its C functions are called")]
mod native {
    use std::ffi::{CStr, c_char, c_void};
    use std::path::Path;

    use super::{Answer, MINIMUM_MINOR};
    use crate::runtime::error::one_line;

    /// The first two fields of OrtApiBase. Source: onnxruntime_c_api.h; unchanged since the first release.
    #[repr(C)]
    struct ApiBase {
        get_api: Option<unsafe extern "system" fn(u32) -> *const c_void>,
        get_version_string: Option<unsafe extern "system" fn() -> *const c_char>,
    }

    pub(super) fn load(path: &Path) -> Answer {
        // SAFETY: the file is what the user or the search named as ONNX Runtime; its initializers run here, which is what
        // loading it later would do as well.
        let library = match unsafe { libloading::Library::new(path) } {
            Ok(library) => library,
            Err(error) => return Answer::CannotLoad(loader_words(&error)),
        };
        let answer = ask(&library);
        // Never closed: threads that it may have started would run on in unmapped code, and it is about to be used.
        std::mem::forget(library);
        answer
    }

    /// The loader's own words are the innermost cause.
    fn loader_words(error: &libloading::Error) -> String {
        let mut innermost: &dyn std::error::Error = error;
        while let Some(cause) = innermost.source() {
            innermost = cause;
        }
        one_line(&innermost.to_string())
    }

    fn ask(library: &libloading::Library) -> Answer {
        let other = |reason: &str| Answer::NotOnnxRuntime(reason.to_string());
        // SAFETY: a symbol of this name has this type in every ONNX Runtime; no other library is known to have it.
        let base = match unsafe { library.get::<unsafe extern "system" fn() -> *const ApiBase>(b"OrtGetApiBase\0") } {
            // SAFETY: it takes nothing and gives a pointer to a static table.
            Ok(get_base) => unsafe { get_base().as_ref() },
            Err(_) => return other("it has no OrtGetApiBase"),
        };
        let Some(base) = base else { return other("OrtGetApiBase gives nothing") };
        let (Some(get_api), Some(get_version)) = (base.get_api, base.get_version_string) else {
            return other("OrtGetApiBase gives an empty table");
        };
        // SAFETY: takes nothing, gives a static C string or null.
        let version = unsafe { get_version() };
        if version.is_null() {
            return other("it has no version");
        }
        // SAFETY: not null, and a static C string.
        let version = one_line(&unsafe { CStr::from_ptr(version) }.to_string_lossy());
        let Some((major, minor)) = major_minor(&version) else { return other("its version cannot be read") };
        if (major, minor) < (1, MINIMUM_MINOR) {
            return Answer::TooOld(version);
        }
        // SAFETY: takes a number, gives a static table or null.
        if unsafe { get_api(MINIMUM_MINOR) }.is_null() {
            return other("it does not have the functions of its version");
        }
        Answer::Version(version)
    }

    fn major_minor(version: &str) -> Option<(u32, u32)> {
        let mut parts = version.split('.');
        Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_survive_the_way_through_the_child() {
        assert_eq!(parse_answer("vitrim-probe version 1.24.4"), Some(Answer::Version("1.24.4".into())));
        assert_eq!(parse_answer("vitrim-probe old 1.16.3"), Some(Answer::TooOld("1.16.3".into())));
        assert_eq!(parse_answer("loading.."), None);
        assert_eq!(parse_answer("vitrim-probe what 1"), None);
    }

    /// A stand-in for the command: a script that is started as the child would be.
    #[cfg(unix)]
    fn child(script: &str) -> Result<Answer, Error> {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("program");
        std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        loop {
            match in_child(Path::new("/lib.so"), &program, Duration::from_millis(500)) {
                // Another test's child, started at this moment, may still hold the file open for writing.
                Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::ExecutableFileBusy => {}
                result => return result,
            }
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_child_that_hangs_or_crashes_is_an_error() {
        assert_eq!(child("echo vitrim-probe version \"$1$2\"").unwrap(), Answer::Version(format!("{PROBE_ARGUMENT}/lib.so")));
        let start = Instant::now();
        let text = child("exec sleep 60").unwrap_err().to_string();
        assert!(text.starts_with("/lib.so: loading this library did not end within "), "{text}");
        assert!(start.elapsed() < Duration::from_secs(20));
        let text = child("kill -SEGV $$").unwrap_err().to_string();
        assert!(text.starts_with("/lib.so: loading this library ended the process that tried it (signal: 11"), "{text}");
        // What it answered before counts.
        assert_eq!(child("echo vitrim-probe old 1.16.3; kill -SEGV $$").unwrap(), Answer::TooOld("1.16.3".into()));
    }

    #[test]
    fn other_arguments_are_not_a_probe() {
        let mut out = Vec::new();
        assert_eq!(answer_probe(&["inspect".into(), "model.onnx".into()], &mut out), None);
        assert_eq!(answer_probe(&[PROBE_ARGUMENT.into()], &mut out), None);
        assert!(out.is_empty());
    }
}
