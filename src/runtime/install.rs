//! Bringing ONNX Runtime into vitrim's cache: pip downloads a pinned package, its hash is checked, its library unpacked.
//!
//! Example: on x86_64 Linux onnxruntime 1.24.4 becomes `~/.cache/vitrim/onnxruntime-1.24.4/libonnxruntime.so.1.24.4`.
//! The same file is fetched whatever Python is there, since the tags of the package are given to pip; which index pip
//! asks is pip's own configuration.
//!
//! Invariant: a folder of the cache is complete or not there (it is filled under another name and then renamed), and
//! nothing of a file is used before its hash is the pinned one.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use sha2::{Digest, Sha256};

use crate::runtime::error::one_line;
use crate::runtime::library::is_library_name;
use crate::runtime::{Error, Found, LibraryChoice, Surroundings, find};

/// A package as it is on the Python package index: where it fits, and what its one file must be.
struct Package {
    name: &'static str,
    version: &'static str,
    architecture: &'static str,
    cuda: bool,
    /// Platform tags that pip accepts for it.
    platforms: &'static [&'static str],
    /// Of the wheel for CPython 3.11.
    sha256: &'static str,
}

const PACKAGES: &[Package] = &[
    Package {
        name: "onnxruntime",
        version: "1.24.4",
        architecture: "x86_64",
        cuda: false,
        platforms: &["manylinux_2_28_x86_64", "manylinux_2_27_x86_64"],
        sha256: "e54ad52e61d2d4618dcff8fa1480ac66b24ee2eab73331322db1049f11ccf330",
    },
    Package {
        name: "onnxruntime",
        version: "1.24.4",
        architecture: "aarch64",
        cuda: false,
        platforms: &["manylinux_2_28_aarch64", "manylinux_2_27_aarch64"],
        sha256: "046ff290045a387676941a02a8ae5c3ebec6b4f551ae228711968c4a69d8f6b7",
    },
    Package {
        name: "onnxruntime-gpu",
        version: "1.31.1",
        architecture: "x86_64",
        cuda: true,
        platforms: &["manylinux_2_28_x86_64", "manylinux_2_27_x86_64"],
        sha256: "e26c475fe361b2015f45b4b824bd13f0bb20204e59b62814e6f0acd5f3d491a6",
    },
];

/// The CUDA library of version 1.31.1 has 284 MB; a file of more than this is no library of these packages.
const LARGEST_LIBRARY_BYTES: u64 = 2 << 30;

impl Package {
    fn folder(&self) -> String {
        format!("{}-{}", self.name, self.version)
    }
}

impl fmt::Display for Package {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.name, self.version)
    }
}

/// What to install.
#[derive(Debug, Clone, Default)]
pub struct InstallOptions {
    /// The build with the CUDA provider. CUDA 13 and cuDNN 9 themselves are not in it.
    pub cuda: bool,
    /// `--offline`; the variable VITRIM_OFFLINE has the same effect.
    pub offline: bool,
}

/// The steps of an installation, told before each begins.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Progress {
    /// It is there already; nothing else follows.
    Present {
        /// The folder.
        folder: PathBuf,
    },
    /// pip fetches the package.
    Downloading {
        /// Name and version.
        package: String,
    },
    /// The hash is computed.
    Checking {
        /// The downloaded file's size.
        bytes: u64,
    },
    /// A library file is written.
    Unpacking {
        /// Its name.
        file: String,
    },
    /// All is in place.
    Done {
        /// The folder.
        folder: PathBuf,
    },
}

/// Brings ONNX Runtime into the cache and gives the folder that holds it.
///
/// Errors: [`Error::NoPackage`], [`Error::NoCacheFolder`], [`Error::Offline`], [`Error::NoPip`], [`Error::Pip`],
/// [`Error::Hash`], [`Error::Package`], [`Error::Io`].
pub fn install(options: &InstallOptions, around: &Surroundings, progress: &mut dyn FnMut(Progress)) -> Result<PathBuf, Error> {
    let package = package_here(options.cuda)?;
    let cache = cache_root(around).ok_or(Error::NoCacheFolder)?;
    let folder = cache.join(package.folder());
    if folder.is_dir() {
        progress(Progress::Present { folder: folder.clone() });
        return Ok(folder);
    }
    if options.offline || is_offline(around) {
        return Err(Error::Offline { package: package.to_string() });
    }
    fs::create_dir_all(&cache).map_err(|source| Error::Io { path: cache.clone(), source })?;
    // In the cache itself, because the rename at the end must not cross file systems.
    let work = tempfile::Builder::new().prefix(".install-").tempdir_in(&cache);
    let work = work.map_err(|source| Error::Io { path: cache.clone(), source })?;

    progress(Progress::Downloading { package: package.to_string() });
    let wheel = download(package, work.path())?;
    let bytes = fs::metadata(&wheel).map_err(|source| Error::Io { path: wheel.clone(), source })?.len();
    progress(Progress::Checking { bytes });
    check_hash(package, &wheel)?;
    let filled = work.path().join("filled");
    unpack(package, &wheel, &filled, progress)?;
    put_in_place(&filled, &folder)?;
    progress(Progress::Done { folder: folder.clone() });
    Ok(folder)
}

/// The library for this process; if there is none anywhere, installs it first.
///
/// Errors: those of [`find`] and [`install`].
pub fn find_or_install(
    choice: &LibraryChoice,
    options: &InstallOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<Found, Error> {
    match find(choice) {
        Err(missing @ Error::LibraryNotFound { .. }) => {
            let around = Surroundings::of_process();
            match install(options, &around, progress) {
                Ok(_) => find(choice),
                // What the user has to know then is that the library is missing, and where it was looked for.
                Err(Error::Offline { .. } | Error::NoPackage { .. } | Error::NoCacheFolder) => Err(missing),
                Err(error) => Err(error),
            }
        }
        found => found,
    }
}

/// The folders of the cache that may hold a library, best first. They need not exist. The build with CUDA comes first:
/// it was installed on purpose and runs on the processor as well.
pub(crate) fn cache_folders(around: &Surroundings) -> Vec<PathBuf> {
    let Some(root) = cache_root(around) else { return Vec::new() };
    let mut here: Vec<&Package> = PACKAGES.iter().filter(|package| fits_here(package)).collect();
    here.sort_by_key(|package| !package.cuda);
    here.into_iter().map(|package| root.join(package.folder())).collect()
}

/// XDG_CACHE_HOME/vitrim or HOME/.cache/vitrim.
fn cache_root(around: &Surroundings) -> Option<PathBuf> {
    let base = around.folder("XDG_CACHE_HOME").or_else(|| Some(around.folder("HOME")?.join(".cache")))?;
    Some(base.join("vitrim"))
}

fn is_offline(around: &Surroundings) -> bool {
    around.variable("VITRIM_OFFLINE").is_some_and(|value| value != "0")
}

fn fits_here(package: &Package) -> bool {
    cfg!(all(target_os = "linux", target_env = "gnu")) && package.architecture == std::env::consts::ARCH
}

fn package_here(cuda: bool) -> Result<&'static Package, Error> {
    PACKAGES.iter().find(|package| fits_here(package) && package.cuda == cuda).ok_or_else(|| {
        let extra = if cuda { " with CUDA" } else { "" };
        Error::NoPackage { machine: format!("{} {}{extra}", std::env::consts::OS, std::env::consts::ARCH) }
    })
}

/// A Python that has pip. The one of the active environment comes first, because it is the one that is configured.
fn python_with_pip() -> Result<&'static str, Error> {
    const NAMES: [&str; 2] = ["python3", "python"];
    let has_pip = |name: &&str| {
        let status = Command::new(name)
            .args(["-m", "pip", "--version"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        status.is_ok_and(|status| status.success())
    };
    NAMES.into_iter().find(has_pip).ok_or_else(|| Error::NoPip { tried: NAMES.join(", ") })
}

fn download(package: &Package, work: &Path) -> Result<PathBuf, Error> {
    let python = python_with_pip()?;
    let mut command = Command::new(python);
    command.args(["-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check", "--no-deps"]);
    command.args(["--only-binary=:all:", "--python-version", "3.11", "--implementation", "cp", "--abi", "cp311"]);
    for platform in package.platforms {
        command.args(["--platform", platform]);
    }
    command.arg("--dest").arg(work).arg(format!("{}=={}", package.name, package.version));
    // Away from the current folder: `python -m pip` would import modules that lie there.
    let output = command.current_dir(work).stdin(Stdio::null()).output();
    let output = output.map_err(|source| Error::Io { path: PathBuf::from(python), source })?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        let error = text.lines().rev().find(|line| line.starts_with("ERROR")).or(text.lines().last());
        let reason = one_line(error.unwrap_or("it gave no reason"));
        return Err(Error::Pip { package: package.to_string(), reason });
    }
    let entries = fs::read_dir(work).map_err(|source| Error::Io { path: work.to_path_buf(), source })?;
    let mut paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let wheel = paths.find(|path| path.extension().is_some_and(|extension| extension == "whl"));
    wheel.ok_or_else(|| Error::Pip { package: package.to_string(), reason: "it brought no wheel".to_string() })
}

fn check_hash(package: &Package, file: &Path) -> Result<(), Error> {
    let found = library_sha256(file)?;
    if found == package.sha256 {
        return Ok(());
    }
    Err(Error::Hash { package: package.to_string(), expected: package.sha256, found })
}

/// The sha256 of a library, for reports. 64 hexadecimal digits.
///
/// Errors: [`Error::Io`]; also for a bare name that only the system's loader resolves.
pub fn library_sha256(path: &Path) -> Result<String, Error> {
    sha256_of(path).map_err(|source| Error::Io { path: path.to_path_buf(), source })
}

fn sha256_of(file: &Path) -> io::Result<String> {
    let mut file = File::open(file)?;
    let mut hash = Sha256::new();
    let mut block = vec![0; 1 << 16];
    loop {
        let len = file.read(&mut block)?;
        if len == 0 {
            return Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect());
        }
        hash.update(&block[..len]);
    }
}

/// Writes the library and its providers, which all lie in one folder of the archive, into `folder`.
fn unpack(package: &Package, wheel: &Path, folder: &Path, progress: &mut dyn FnMut(Progress)) -> Result<(), Error> {
    let io = |path: &Path| {
        let path = path.to_path_buf();
        move |source| Error::Io { path, source }
    };
    let broken =
        |error: zip::result::ZipError| Error::Package { package: package.to_string(), reason: one_line(&error.to_string()) };
    let without = |reason: &str| Error::Package { package: package.to_string(), reason: reason.to_string() };
    fs::create_dir(folder).map_err(io(folder))?;
    let mut archive = zip::ZipArchive::new(File::open(wheel).map_err(io(wheel))?).map_err(broken)?;
    let mut has_library = false;
    for index in 0..archive.len() {
        let mut entry = archive.by_index(index).map_err(broken)?;
        let Some(name) = library_file(&entry.name().map_err(broken)?) else { continue };
        if entry.size() > LARGEST_LIBRARY_BYTES {
            return Err(without("a library in it is larger than any of ONNX Runtime"));
        }
        progress(Progress::Unpacking { file: name.clone() });
        has_library |= is_library_name(&name);
        let path = folder.join(name);
        let mut file = File::create_new(&path).map_err(io(&path))?;
        io::copy(&mut (&mut entry).take(LARGEST_LIBRARY_BYTES), &mut file).map_err(io(&path))?;
        file.sync_all().map_err(io(&path))?;
    }
    if has_library { Ok(()) } else { Err(without("there is no ONNX Runtime library in it")) }
}

/// The file name of an archive's entry that is to be unpacked. TensorRT's provider is left out: vitrim does not use it.
fn library_file(entry: &str) -> Option<String> {
    let name = entry.strip_prefix("onnxruntime/capi/")?;
    let wanted = is_library_name(name) || (name.starts_with("libonnxruntime_providers_") && !name.contains("tensorrt"));
    (wanted && !name.contains(['/', '\\'])).then(|| name.to_string())
}

/// Gives the filled folder its name. Another process may have been faster, which is as good.
fn put_in_place(filled: &Path, folder: &Path) -> Result<(), Error> {
    match fs::rename(filled, folder) {
        Err(_) if folder.is_dir() => Ok(()),
        result => result.map_err(|source| Error::Io { path: folder.to_path_buf(), source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_library_and_its_providers_are_unpacked() {
        let is = |name: &str| library_file(name).is_some();
        assert!(is("onnxruntime/capi/libonnxruntime.so.1.24.4"));
        assert!(is("onnxruntime/capi/libonnxruntime_providers_shared.so"));
        assert!(is("onnxruntime/capi/libonnxruntime_providers_cuda.so"));
        assert!(!is("onnxruntime/capi/libonnxruntime_providers_tensorrt.so"));
        assert!(!is("onnxruntime/capi/onnxruntime_pybind11_state.so"));
        assert!(!is("onnxruntime/capi/libonnxruntime.so.1/../../evil"));
        assert!(!is("/etc/libonnxruntime.so.1"));
    }

    #[test]
    fn a_file_with_another_hash_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("x.whl");
        fs::write(&file, b"abc").unwrap();
        let text = check_hash(&PACKAGES[0], &file).unwrap_err().to_string();
        // Source: FIPS 180-2, appendix B.1
        assert!(text.ends_with("found ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"), "{text}");
    }

    #[test]
    fn an_archive_without_a_library_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let wheel = folder.path().join("x.whl");
        let mut writer = zip::ZipWriter::new(File::create(&wheel).unwrap());
        writer.start_file("onnxruntime/__init__.py", zip::write::SimpleFileOptions::default()).unwrap();
        writer.finish().unwrap();
        let error = unpack(&PACKAGES[0], &wheel, &folder.path().join("out"), &mut |_| {}).unwrap_err();
        assert!(error.to_string().contains("no ONNX Runtime library"), "{error}");
    }

    #[test]
    fn a_library_in_an_archive_lands_in_the_folder() {
        let folder = tempfile::tempdir().unwrap();
        let wheel = folder.path().join("x.whl");
        let mut writer = zip::ZipWriter::new(File::create(&wheel).unwrap());
        writer.start_file("onnxruntime/capi/libonnxruntime.so.1.24.4", zip::write::SimpleFileOptions::default()).unwrap();
        io::Write::write_all(&mut writer, b"library").unwrap();
        writer.finish().unwrap();
        let out = folder.path().join("out");
        let mut steps = Vec::new();
        unpack(&PACKAGES[0], &wheel, &out, &mut |step| steps.push(step)).unwrap();
        assert_eq!(fs::read(out.join("libonnxruntime.so.1.24.4")).unwrap(), b"library");
        assert_eq!(steps, [Progress::Unpacking { file: "libonnxruntime.so.1.24.4".to_string() }]);
        put_in_place(&out, &folder.path().join("onnxruntime-1.24.4")).unwrap();
        assert!(folder.path().join("onnxruntime-1.24.4/libonnxruntime.so.1.24.4").is_file());
    }

    #[test]
    fn offline_forbids_before_anything_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let mut around = Surroundings::default();
        around.variables.insert("XDG_CACHE_HOME".into(), folder.path().as_os_str().to_owned());
        around.variables.insert("VITRIM_OFFLINE".into(), "1".into());
        let result = install(&InstallOptions::default(), &around, &mut |_| {});
        if package_here(false).is_ok() {
            let text = result.unwrap_err().to_string();
            assert_eq!(text, "onnxruntime 1.24.4 would have to be downloaded, which --offline or VITRIM_OFFLINE=1 forbids");
        } else {
            assert!(matches!(result, Err(Error::NoPackage { .. })));
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
