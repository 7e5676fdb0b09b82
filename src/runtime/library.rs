//! Finding the ONNX Runtime library: a search over files only, nothing is loaded or run.
//!
//! Order: --ort-lib, VITRIM_ORT_LIB, ORT_DYLIB_PATH, vitrim's cache, beside the binary, the active Python's onnxruntime
//! package, and last the system's loader. A file that was named (the first three) is taken or refused, never passed over.
//! Example: with VIRTUAL_ENV=/venv the Python step looks at /venv/lib/python3.11/site-packages/onnxruntime/capi and takes
//! libonnxruntime.so.1.24.4 there.
//!
//! Invariant: loading a library is running code, so the current folder, relative paths and the model's folder are
//! never searched, and no Python is started.

use std::collections::BTreeMap;
use std::env;
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use crate::runtime::install;
use crate::runtime::probe::Probe;
use crate::runtime::{Error, Looked};

/// The step of the search.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LibrarySource {
    /// `--ort-lib FILE`
    Flag,
    /// The variable VITRIM_ORT_LIB.
    VitrimVariable,
    /// The variable ORT_DYLIB_PATH.
    OrtVariable,
    /// What `vitrim runtime install` unpacked.
    Cache,
    /// The folder of the running binary.
    BesideBinary,
    /// The onnxruntime package of the active Python.
    Python,
    /// The system's loader, by the library's name.
    System,
}

impl fmt::Display for LibrarySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            LibrarySource::Flag => "--ort-lib",
            LibrarySource::VitrimVariable => "VITRIM_ORT_LIB",
            LibrarySource::OrtVariable => "ORT_DYLIB_PATH",
            LibrarySource::Cache => "vitrim's cache",
            LibrarySource::BesideBinary => "beside the binary",
            LibrarySource::Python => "Python's onnxruntime",
            LibrarySource::System => "the system loader",
        })
    }
}

/// Which library a session takes.
#[derive(Debug, Clone, Default)]
pub struct LibraryChoice {
    /// `--ort-lib`: a file, or a folder that holds one.
    pub file: Option<PathBuf>,
    /// How the file is tried before it is used.
    pub probe: Probe,
}

/// A library that is there. For the system's loader the path is a bare name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The file.
    pub path: PathBuf,
    /// The step that found it.
    pub source: LibrarySource,
}

/// What the search depends on, apart from the files: the variables and the place of the binary.
#[derive(Debug, Clone, Default)]
pub struct Surroundings {
    /// Environment variables. An empty one counts as unset.
    pub variables: BTreeMap<String, OsString>,
    /// Folder of the running binary.
    pub binary_folder: Option<PathBuf>,
}

impl Surroundings {
    /// Those of this process.
    pub fn of_process() -> Self {
        const READ: &[&str] = &[
            "VITRIM_ORT_LIB",
            "ORT_DYLIB_PATH",
            "XDG_CACHE_HOME",
            "HOME",
            "VIRTUAL_ENV",
            "CONDA_PREFIX",
            "PYTHONPATH",
            "PATH",
            "PYENV_ROOT",
            "PYENV_VERSION",
            "VITRIM_OFFLINE",
        ];
        let variables = READ.iter().filter_map(|name| Some((name.to_string(), env::var_os(name)?))).collect();
        let binary_folder = env::current_exe().ok().and_then(|exe| exe.parent().map(Path::to_path_buf));
        Self { variables, binary_folder }
    }

    pub(crate) fn variable(&self, name: &str) -> Option<&OsString> {
        self.variables.get(name).filter(|value| !value.is_empty())
    }

    /// A variable that names a folder; a relative one depends on the current folder and is not used.
    pub(crate) fn folder(&self, name: &str) -> Option<PathBuf> {
        self.variable(name).map(PathBuf::from).filter(|path| path.is_absolute())
    }

    fn folders(&self, name: &str) -> Vec<PathBuf> {
        let list = self.variable(name).map(|value| env::split_paths(value).collect::<Vec<_>>()).unwrap_or_default();
        list.into_iter().filter(|path| path.is_absolute()).collect()
    }
}

/// Finds the library for this process.
///
/// Errors: [`Error::LibraryMissing`] where a named file is not there, [`Error::LibraryNotFound`] with all places.
pub fn find(choice: &LibraryChoice) -> Result<Found, Error> {
    let (found, looked) = search(choice.file.as_deref(), &Surroundings::of_process())?;
    if let Some(found) = found {
        return Ok(found);
    }
    // Nothing but the loader itself knows what the loader would find.
    for name in system_names() {
        if crate::runtime::preflight(Path::new(name), &choice.probe).is_ok() {
            return Ok(Found { path: PathBuf::from(name), source: LibrarySource::System });
        }
    }
    Err(Error::LibraryNotFound { looked })
}

/// The search over files: what was found before the system's loader, and all the places looked at.
///
/// Errors: [`Error::LibraryMissing`] where a named file is not there.
pub fn search(file: Option<&Path>, around: &Surroundings) -> Result<(Option<Found>, Vec<Looked>), Error> {
    let mut looked = Vec::new();
    let named = [
        (LibrarySource::Flag, file.map(Path::to_path_buf)),
        (LibrarySource::VitrimVariable, around.variable("VITRIM_ORT_LIB").map(PathBuf::from)),
        (LibrarySource::OrtVariable, around.variable("ORT_DYLIB_PATH").map(PathBuf::from)),
    ];
    for (source, place) in named {
        let Some(path) = place else {
            looked.push(Looked { source, place: None });
            continue;
        };
        let library = if path.is_dir() { library_in(&path) } else { Some(path.clone()).filter(|path| path.exists()) };
        // Absolute, so that the loader reads the file that was named and does not search for one of that name.
        let absolute = library.and_then(|path| std::path::absolute(path).ok());
        return match absolute {
            Some(path) => Ok((Some(Found { path, source }), looked)),
            None => Err(Error::LibraryMissing { origin: source, path }),
        };
    }

    let mut places = Vec::new();
    places.extend(install::cache_folders(around).into_iter().map(|folder| (LibrarySource::Cache, folder)));
    places.extend(around.binary_folder.iter().map(|folder| (LibrarySource::BesideBinary, folder.clone())));
    places.extend(python_folders(around).into_iter().map(|folder| (LibrarySource::Python, folder)));
    for (source, folder) in places {
        let library = library_in(&folder);
        looked.push(Looked { source, place: Some(folder) });
        if let Some(path) = library {
            return Ok((Some(Found { path, source }), looked));
        }
    }
    for source in [LibrarySource::Cache, LibrarySource::BesideBinary, LibrarySource::Python] {
        if !looked.iter().any(|l| l.source == source) {
            looked.push(Looked { source, place: None });
        }
    }
    let name = system_names().first().map(PathBuf::from);
    looked.push(Looked { source: LibrarySource::System, place: name });
    Ok((None, looked))
}

/// The names under which a system package installs the library. `.so.1` is what it calls itself.
fn system_names() -> &'static [&'static str] {
    if cfg!(windows) {
        // Windows brings an old onnxruntime.dll of its own in the system folder; it would be taken and then refused.
        &[]
    } else if cfg!(target_os = "macos") {
        &["libonnxruntime.dylib"]
    } else {
        &["libonnxruntime.so", "libonnxruntime.so.1"]
    }
}

/// Whether a file name is the library itself; providers and static libraries are not.
pub(crate) fn is_library_name(name: &str) -> bool {
    if cfg!(windows) {
        name.eq_ignore_ascii_case("onnxruntime.dll")
    } else if cfg!(target_os = "macos") {
        name.starts_with("libonnxruntime.") && name.ends_with(".dylib")
    } else {
        name == "libonnxruntime.so" || name.starts_with("libonnxruntime.so.")
    }
}

/// The library in a folder, the highest version if there are several.
fn library_in(folder: &Path) -> Option<PathBuf> {
    let mut names: Vec<String> =
        fs::read_dir(folder).ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    names.retain(|name| is_library_name(name) && folder.join(name).is_file());
    names.sort_by_key(|name| (numbers_in(name), name.clone()));
    names.pop().map(|name| folder.join(name))
}

/// "libonnxruntime.so.1.24.4" to 1, 24, 4: names sort by version and not by letters.
fn numbers_in(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).collect()
}

/// The `onnxruntime/capi` folders that the active Python would import from, best first. They need not exist.
fn python_folders(around: &Surroundings) -> Vec<PathBuf> {
    let mut sites = around.folders("PYTHONPATH");
    for variable in ["VIRTUAL_ENV", "CONDA_PREFIX"] {
        if let Some(prefix) = around.folder(variable) {
            sites.extend(site_packages(&prefix));
        }
    }
    for prefix in python_prefixes(around) {
        sites.extend(site_packages(&prefix));
    }
    // Where pip puts a package that is installed for the user.
    if let Some(home) = around.folder("HOME") {
        sites.extend(site_packages(&home.join(".local")));
    }
    let mut folders = Vec::new();
    for site in sites {
        let folder = site.join("onnxruntime").join("capi");
        if !folders.contains(&folder) {
            folders.push(folder);
        }
    }
    folders
}

/// The installation prefixes of the first `python3` (or `python`) in PATH, without running it.
fn python_prefixes(around: &Surroundings) -> Vec<PathBuf> {
    let mut prefixes = Vec::new();
    let folders = around.folders("PATH");
    let first = ["python3", "python", "python.exe"]
        .iter()
        .find_map(|name| folders.iter().map(|folder| folder.join(name)).find(|path| path.is_file()));
    let Some(python) = first else { return prefixes };
    if let Some(root) = pyenv_root(around, &python) {
        prefixes.extend(pyenv_prefix(around, &root));
        return prefixes;
    }
    // The link's own folder first: in a virtual environment python3 is a link to the base installation.
    let real = fs::canonicalize(&python).ok();
    for path in [Some(python), real].into_iter().flatten() {
        if let Some(prefix) = path.parent().and_then(|bin| if cfg!(windows) { Some(bin) } else { bin.parent() }) {
            prefixes.push(prefix.to_path_buf());
        }
    }
    prefixes
}

/// A pyenv "shim" is a script in ROOT/shims that starts the Python of a chosen version.
fn pyenv_root(around: &Surroundings, python: &Path) -> Option<PathBuf> {
    let folder = python.parent()?;
    if folder.file_name()? != "shims" {
        return None;
    }
    around.folder("PYENV_ROOT").or_else(|| folder.parent().map(Path::to_path_buf))
}

/// The version that pyenv would start: PYENV_VERSION, else the global choice. A `.python-version` file in the current
/// folder is not read, since that folder must not decide which code is loaded.
fn pyenv_prefix(around: &Surroundings, root: &Path) -> Option<PathBuf> {
    let chosen = match around.variable("PYENV_VERSION") {
        Some(version) => version.to_str()?.to_string(),
        None => fs::read_to_string(root.join("version")).ok()?,
    };
    let version = chosen.split(|c: char| c.is_whitespace() || c == ':').find(|word| !word.is_empty())?;
    if version == "system" || version.contains(['/', '\\']) || version.contains("..") {
        return None;
    }
    Some(root.join("versions").join(version))
}

/// The folders below a prefix in which packages are installed; the newest Python first where there are several.
fn site_packages(prefix: &Path) -> Vec<PathBuf> {
    if cfg!(windows) {
        return vec![prefix.join("Lib").join("site-packages")];
    }
    let mut sites = Vec::new();
    for lib in ["lib", "lib64", "local/lib"] {
        let lib = prefix.join(lib);
        let Ok(entries) = fs::read_dir(&lib) else { continue };
        let mut versions: Vec<String> =
            entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).filter(|n| n.starts_with("python3")).collect();
        versions.sort_by_key(|name| numbers_in(name));
        for version in versions.iter().rev() {
            sites.push(lib.join(version).join("site-packages"));
            sites.push(lib.join(version).join("dist-packages"));
        }
    }
    sites.retain(|site| site.is_dir());
    sites
}
