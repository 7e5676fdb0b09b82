//! What can go wrong with an engine: it is not there, it is not usable, it refuses a model, it fails in a run.

use std::fmt;
use std::path::PathBuf;

use crate::runtime::{LibrarySource, RuntimeName};

/// Errors of the engines. Every message is one line, whatever an engine said.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The engine's cargo feature was off when vitrim was built.
    #[error("this vitrim was built without {runtime} (cargo feature `{}`)", runtime.feature())]
    NotBuilt {
        /// The engine asked for.
        runtime: RuntimeName,
    },
    /// The graph cannot be written as an ONNX model.
    #[error(transparent)]
    Encode(#[from] crate::onnx::Error),
    /// No library in any of the places.
    #[error("ONNX Runtime not found (looked in {}); use --ort-lib or --runtimes tract", Places(looked))]
    LibraryNotFound {
        /// The places, in the order of the search.
        looked: Vec<Looked>,
    },
    /// A library was named, and there is no such file.
    #[error("{}: no ONNX Runtime library there ({origin})", path.display())]
    LibraryMissing {
        /// Who named it.
        origin: LibrarySource,
        /// What was named.
        path: PathBuf,
    },
    /// The file is something else: a text, another library.
    #[error("{} is not ONNX Runtime ({reason})", path.display())]
    NotOnnxRuntime {
        /// The file.
        path: PathBuf,
        /// What it is or lacks.
        reason: String,
    },
    /// The file is for another kind of machine.
    #[error("{} is for {found}, this machine is {expected}", path.display())]
    WrongMachine {
        /// The file.
        path: PathBuf,
        /// This machine.
        expected: &'static str,
        /// What the file is for.
        found: String,
    },
    /// The system's loader refuses it, most often because a library that it needs is missing.
    #[error("{} cannot be loaded: {reason}", path.display())]
    LibraryLoad {
        /// The file.
        path: PathBuf,
        /// What the loader says.
        reason: String,
    },
    /// Too old for the functions that are called.
    #[error("{}: ONNX Runtime {version} is too old, {} or newer is needed", path.display(), crate::runtime::MINIMUM_VERSION)]
    TooOld {
        /// The file.
        path: PathBuf,
        /// The version it says it has.
        version: String,
    },
    /// Loading did not come to an end.
    #[error("{}: loading this library did not end within {seconds} s", path.display())]
    LibraryHangs {
        /// The file.
        path: PathBuf,
        /// The time limit.
        seconds: u64,
    },
    /// Loading it ended the process that tried.
    #[error("{}: loading this library ended the process that tried it ({reason})", path.display())]
    LibraryCrashes {
        /// The file.
        path: PathBuf,
        /// How the process ended.
        reason: String,
    },
    /// One process can hold one ONNX Runtime.
    #[error("ONNX Runtime is already loaded from {}, cannot load {} as well", loaded.display(), asked.display())]
    OtherLibrary {
        /// In use.
        loaded: PathBuf,
        /// Asked for now.
        asked: PathBuf,
    },
    /// ONNX Runtime's global state could not be set up.
    #[error("{}: ONNX Runtime cannot start: {reason}", path.display())]
    Start {
        /// The library.
        path: PathBuf,
        /// Its words.
        reason: String,
    },
    /// CUDA was asked for by name, and the library has no CUDA provider.
    #[error("{} has no CUDA provider; `vitrim runtime install --cuda` brings one that has", path.display())]
    NoCuda {
        /// The library.
        path: PathBuf,
    },
    /// CUDA was asked for by name and cannot be used.
    #[error("CUDA device {device} cannot be used: {reason}")]
    Cuda {
        /// The device's number.
        device: u32,
        /// ONNX Runtime's words.
        reason: String,
    },
    /// An option that this engine does not have.
    #[error("{runtime} cannot do this: {what}")]
    Unsupported {
        /// The engine.
        runtime: RuntimeName,
        /// What was asked.
        what: &'static str,
    },
    /// The engine refuses the model.
    #[error("{runtime} could not load: {reason}")]
    Load {
        /// The engine.
        runtime: RuntimeName,
        /// Its words.
        reason: String,
    },
    /// The run failed.
    #[error("{runtime} could not run: {reason}")]
    Run {
        /// The engine.
        runtime: RuntimeName,
        /// Its words.
        reason: String,
    },
    /// A name that the model does not have, or has twice in the request.
    #[error("\"{name}\": {reason}")]
    Name {
        /// Input or output.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// An array whose sizes and contents disagree, or whose type or shape is not the one expected.
    #[error("\"{name}\": expected {expected}, found {found}")]
    Array {
        /// Input or output.
        name: String,
        /// Type and dims, or a count.
        expected: String,
        /// The same of what came.
        found: String,
    },
    /// The network is needed and forbidden.
    #[error("{package} would have to be downloaded, which --offline or VITRIM_OFFLINE=1 forbids")]
    Offline {
        /// Package and version.
        package: String,
    },
    /// No pinned package for this machine.
    #[error("there is no ONNX Runtime package for {machine} here; use --ort-lib")]
    NoPackage {
        /// Operating system and architecture, and CUDA if asked.
        machine: String,
    },
    /// Neither XDG_CACHE_HOME nor HOME is set.
    #[error("no cache folder: neither XDG_CACHE_HOME nor HOME is set")]
    NoCacheFolder,
    /// No Python that has pip.
    #[error("installing ONNX Runtime needs python3 with pip (tried {tried}); install it, or use --ort-lib")]
    NoPip {
        /// The commands tried.
        tried: String,
    },
    /// pip did not bring the package.
    #[error("pip could not bring {package}: {reason}")]
    Pip {
        /// Package and version.
        package: String,
        /// The last line it wrote.
        reason: String,
    },
    /// The downloaded file is not the pinned one.
    #[error("{package}: sha256 of the downloaded file: expected {expected}, found {found}")]
    Hash {
        /// Package and version.
        package: String,
        /// Pinned.
        expected: &'static str,
        /// Of the file.
        found: String,
    },
    /// The package holds no library, or is no readable archive.
    #[error("{package}: {reason}")]
    Package {
        /// Package and version.
        package: String,
        /// What is wrong.
        reason: String,
    },
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

impl Error {
    /// What the user can do about it, where the message does not say so already.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Error::NotOnnxRuntime { .. } | Error::WrongMachine { .. } | Error::LibraryMissing { .. } => {
                Some("name another file with --ort-lib, or run `vitrim runtime install`")
            }
            Error::TooOld { .. } | Error::LibraryHangs { .. } | Error::LibraryCrashes { .. } => {
                Some("run `vitrim runtime install`, or name another file with --ort-lib")
            }
            Error::Cuda { .. } => Some("the CUDA and cuDNN libraries must be on the loader's path; or use --device cpu"),
            _ => None,
        }
    }
}

/// A place of the search for the library, and what was there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Looked {
    /// Which step of the search.
    pub source: LibrarySource,
    /// The folder or file looked at; None where the step had nothing to look at.
    pub place: Option<PathBuf>,
}

struct Places<'a>(&'a [Looked]);

impl fmt::Display for Places<'_> {
    /// At most one place per step, since a line of text must stay readable.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut last = None;
        for looked in self.0 {
            if last == Some(looked.source) {
                continue;
            }
            if last.is_some() {
                f.write_str(", ")?;
            }
            match &looked.place {
                Some(place) => write!(f, "{}: {}", looked.source, place.display())?,
                None => write!(f, "{}: none", looked.source)?,
            }
            last = Some(looked.source);
        }
        Ok(())
    }
}

/// The engines' messages can be many lines long; errors are one.
pub(crate) fn one_line(text: &str) -> String {
    const LONGEST: usize = 600;
    let mut line = String::new();
    for word in text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|w| !w.is_empty()) {
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
        if line.len() > LONGEST {
            let cut = line.floor_char_boundary(LONGEST);
            line.truncate(cut);
            line.push_str(" ..");
            break;
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_of_many_lines_becomes_one_short_line() {
        assert_eq!(one_line("a\n  b\t\x1b[1mc\r\n"), "a b [1mc");
        let long = one_line(&"é ".repeat(1000));
        assert!(long.len() < 620 && long.ends_with(" .."));
    }

    #[test]
    fn not_found_names_each_step_once() {
        let at = |source, place: &str| Looked { source, place: Some(PathBuf::from(place)) };
        let looked = vec![
            Looked { source: LibrarySource::Flag, place: None },
            at(LibrarySource::Python, "/a"),
            at(LibrarySource::Python, "/b"),
            at(LibrarySource::System, "libonnxruntime.so"),
        ];
        let text = Error::LibraryNotFound { looked }.to_string();
        assert_eq!(
            text,
            "ONNX Runtime not found (looked in --ort-lib: none, Python's onnxruntime: /a, the system loader: libonnxruntime.so); use \
             --ort-lib or --runtimes tract"
        );
    }
}
