//! The run directory: who works in it, its settings, its log, and files that appear complete or not at all.
//!
//! Content: `config.toml`, `log.jsonl`, `checkpoint.safetensors` (and the one before it), `gates/epoch-NNN.safetensors`, `run.lock`.
//! The lock is the kernel's and goes with the process, whatever ends it; the file holds the pid for those who meet it.
//! Invariant: a folder that is not empty and has no `config.toml` of ours is never touched.

use super::SearchError;
use super::config::Config;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};
use tempfile::NamedTempFile;

pub(super) const CONFIG: &str = "config.toml";
const LOG: &str = "log.jsonl";
const LOCK: &str = "run.lock";
pub(super) const GATES: &str = "gates";
/// Temporary files begin with this, so that what a killed run left can be told.
const TEMPORARY: &str = ".vitrim-tmp-";

/// A run directory that this process works in.
pub(super) struct RunDir {
    pub(super) path: PathBuf,
    log: Option<File>,
    /// Where the file system has no locks: what to tell the user.
    pub(super) warning: Option<String>,
    lock: File,
}

fn io(file: &Path) -> impl Fn(std::io::Error) -> SearchError + '_ {
    move |source| SearchError::Io { file: file.to_path_buf(), source }
}

/// Whether a run directory holds a run.
pub(super) fn holds_run(dir: &Path) -> bool {
    dir.join(CONFIG).is_file()
}

impl RunDir {
    /// Takes a folder: makes it where there is none, refuses what is not ours, locks it, and removes what a killed run left.
    ///
    /// Errors: [`SearchError::NotOurs`], [`SearchError::Exists`], [`SearchError::NothingToResume`], [`SearchError::InUse`].
    pub(super) fn open(dir: &Path, resume: bool) -> Result<Self, SearchError> {
        fs::create_dir_all(dir).map_err(io(dir))?;
        let ours = holds_run(dir);
        if !ours {
            for entry in fs::read_dir(dir).map_err(io(dir))? {
                let name = entry.map_err(io(dir))?.file_name();
                let name = name.to_string_lossy();
                if name != LOCK && !name.starts_with(TEMPORARY) {
                    return Err(SearchError::NotOurs { dir: dir.to_path_buf() });
                }
            }
            if resume {
                return Err(SearchError::NothingToResume { dir: dir.to_path_buf() });
            }
        }
        let (lock, warning) = take_lock(dir)?;
        if ours && !resume {
            return Err(SearchError::Exists { dir: dir.to_path_buf() });
        }
        for folder in [dir.to_path_buf(), dir.join(GATES)] {
            remove_temporaries(&folder)?;
        }
        Ok(Self { path: dir.to_path_buf(), log: None, warning, lock })
    }

    /// Writes the effective settings.
    pub(super) fn write_config(&self, config: &Config) -> Result<(), SearchError> {
        let text = config.to_toml()?;
        put(temporary(&self.path, |out| Ok(out.write_all(text.as_bytes())?))?, &self.path.join(CONFIG))
    }

    /// Opens the log behind the lines of the first `steps` steps; what a killed run wrote after its checkpoint goes.
    pub(super) fn open_log(&mut self, steps: u64) -> Result<(), SearchError> {
        let file = self.path.join(LOG);
        let old = match fs::read(&file) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(io(&file)(e)),
        };
        let is_kept = |line: &[u8]| {
            let value: Option<serde_json::Value> = line.strip_suffix(b"\n").and_then(|l| serde_json::from_slice(l).ok());
            value.and_then(|v| v.get("step")?.as_u64()).is_some_and(|step| step <= steps)
        };
        let kept: usize = old.split_inclusive(|b| *b == b'\n').take_while(|l| is_kept(l)).map(<[u8]>::len).sum();
        let mut log = OpenOptions::new().create(true).truncate(false).write(true).open(&file).map_err(io(&file))?;
        log.set_len(kept as u64).and_then(|()| log.seek(std::io::SeekFrom::End(0)).map(drop)).map_err(io(&file))?;
        self.log = Some(log);
        Ok(())
    }

    /// Appends one object to the log.
    pub(super) fn log(&mut self, line: &serde_json::Value) -> Result<(), SearchError> {
        let Some(log) = &mut self.log else { return Err(SearchError::internal("the log is not open")) };
        log.write_all(format!("{line}\n").as_bytes()).map_err(io(&self.path.join(LOG)))
    }

    /// Writes the gates of an epoch, counted from 1.
    pub(super) fn write_gates(&self, epoch: u64, bytes: &[u8]) -> Result<(), SearchError> {
        let folder = self.path.join(GATES);
        fs::create_dir_all(&folder).map_err(io(&folder))?;
        put(temporary(&folder, |out| Ok(out.write_all(bytes)?))?, &folder.join(format!("epoch-{epoch:03}.safetensors")))
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        // The file stays: removing it could take away the lock of a process that has opened it meanwhile.
        let _ = self.lock.set_len(0);
    }
}

/// Locks the folder. Where the file system has no locks, the pid in the file says whether it is in use.
fn take_lock(dir: &Path) -> Result<(File, Option<String>), SearchError> {
    let file = dir.join(LOCK);
    let mut lock = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&file).map_err(io(&file))?;
    let mut owner = String::new();
    let mut warning = None;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            lock.read_to_string(&mut owner).map_err(io(&file))?;
            let by = if owner.is_empty() { "another process".to_string() } else { owner.trim().to_string() };
            return Err(SearchError::InUse { dir: dir.to_path_buf(), by });
        }
        Err(TryLockError::Error(error)) => {
            lock.read_to_string(&mut owner).map_err(io(&file))?;
            if is_alive(&owner) {
                return Err(SearchError::InUse { dir: dir.to_path_buf(), by: owner.trim().to_string() });
            }
            warning = Some(format!("{}: the file system has no locks ({error}); do not start a second run here", dir.display()));
        }
    }
    let text = format!("pid {} since {}\n", std::process::id(), now());
    lock.set_len(0).and_then(|()| lock.rewind()).and_then(|()| lock.write_all(text.as_bytes())).map_err(io(&file))?;
    Ok((lock, warning))
}

/// Whether the process that a lock file names runs on this machine.
fn is_alive(owner: &str) -> bool {
    let pid = owner.strip_prefix("pid ").and_then(|rest| rest.split_whitespace().next());
    pid.is_some_and(|pid| pid != std::process::id().to_string() && Path::new("/proc").join(pid).exists())
}

/// The time in UTC, as `2026-03-01T12:00:00Z`.
fn now() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    date(seconds)
}

fn date(seconds: u64) -> String {
    let is_leap = |y: u64| y.is_multiple_of(4) && (!y.is_multiple_of(100) || y.is_multiple_of(400));
    let (mut days, rest) = (seconds / 86_400, seconds % 86_400);
    let mut year = 1970;
    loop {
        let length = if is_leap(year) { 366 } else { 365 };
        if days < length {
            break;
        }
        days -= length;
        year += 1;
    }
    let february = if is_leap(year) { 29 } else { 28 };
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    format!("{year:04}-{month:02}-{:02}T{:02}:{:02}:{:02}Z", days + 1, rest / 3600, rest / 60 % 60, rest % 60)
}

/// What can go wrong while the content of a file is made: the file, or the content.
pub(super) enum WriteFault {
    File(std::io::Error),
    Content(SearchError),
}

impl From<std::io::Error> for WriteFault {
    fn from(error: std::io::Error) -> Self {
        Self::File(error)
    }
}

impl From<SearchError> for WriteFault {
    fn from(error: SearchError) -> Self {
        Self::Content(error)
    }
}

/// A complete temporary file in a folder, on the disk.
pub(super) fn temporary(
    folder: &Path,
    write: impl FnOnce(&mut dyn Write) -> Result<(), WriteFault>,
) -> Result<NamedTempFile, SearchError> {
    let mut file = tempfile::Builder::new().prefix(TEMPORARY).tempfile_in(folder).map_err(io(folder))?;
    let written = write(&mut file).and_then(|()| Ok(file.as_file().sync_all()?));
    match written {
        Ok(()) => Ok(file),
        Err(WriteFault::File(error)) => Err(io(file.path())(error)),
        Err(WriteFault::Content(error)) => Err(error),
    }
}

/// Gives a temporary file its name, for good.
pub(super) fn put(temporary: NamedTempFile, file: &Path) -> Result<(), SearchError> {
    temporary.persist(file).map_err(|e| SearchError::Io { file: file.to_path_buf(), source: e.error })?;
    let folder = file.parent().unwrap_or(Path::new("."));
    // Only the folder on the disk makes the new name last; not every system can open a folder.
    match File::open(folder) {
        Ok(folder) => folder.sync_all().map_err(io(file)),
        Err(_) => Ok(()),
    }
}

fn remove_temporaries(folder: &Path) -> Result<(), SearchError> {
    let Ok(entries) = fs::read_dir(folder) else { return Ok(()) };
    for entry in entries.filter_map(Result::ok) {
        if entry.file_name().to_string_lossy().starts_with(TEMPORARY) {
            fs::remove_file(entry.path()).map_err(io(&entry.path()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(date(0), "1970-01-01T00:00:00Z");
        assert_eq!(date(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(date(1_767_225_599), "2025-12-31T23:59:59Z");
    }

    #[test]
    fn a_folder_is_taken_once_and_only_if_it_is_ours() {
        let folder = tempfile::tempdir().expect("a folder");
        let dir = folder.path().join("run");
        let first = RunDir::open(&dir, false).expect("a new folder");
        let error = RunDir::open(&dir, false).err().expect("it is in use").to_string();
        assert!(error.contains(&format!("is in use by pid {} since 20", std::process::id())), "{error}");
        first.write_config(&Config::default()).expect("written");
        drop(first);
        assert!(matches!(RunDir::open(&dir, false), Err(SearchError::Exists { .. })));
        fs::write(dir.join(".vitrim-tmp-abc"), "half").expect("written");
        drop(RunDir::open(&dir, true).expect("it is a run"));
        assert!(!dir.join(".vitrim-tmp-abc").exists());
        let other = folder.path().join("other");
        fs::create_dir(&other).and_then(|()| fs::write(other.join("mine"), "x")).expect("written");
        assert!(matches!(RunDir::open(&other, false), Err(SearchError::NotOurs { .. })));
        assert_eq!(fs::read(other.join("mine")).expect("it is still there"), b"x");
        assert!(matches!(RunDir::open(&folder.path().join("none"), true), Err(SearchError::NothingToResume { .. })));
    }

    #[test]
    fn the_log_is_cut_behind_the_checkpoint() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join(LOG);
        fs::write(&file, "{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n{\"st").expect("written");
        let mut dir =
            RunDir { path: folder.path().into(), log: None, warning: None, lock: tempfile::tempfile().expect("a file") };
        dir.open_log(2).expect("it opens");
        dir.log(&serde_json::json!({"step": 3, "again": true})).expect("it is written");
        assert_eq!(fs::read_to_string(&file).expect("it is there"), "{\"step\":1}\n{\"step\":2}\n{\"again\":true,\"step\":3}\n");
    }
}
