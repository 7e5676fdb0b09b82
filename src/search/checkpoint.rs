//! Checkpoints: all of a run's state in one safetensors file, and what it belongs to in the file's header.
//!
//! Example header: `{"__metadata__": {"vitrim": "{\"schema_version\":1, \"model_sha256\":.., \"step\":200, ..}"}, "gate.mlp.0": ..}`.
//! Invariants: a complete checkpoint is under its name or none is (temporary file, fsync, rename, fsync of the folder), and the one
//! before it is kept as `checkpoint.old.safetensors`; equal state gives equal bytes.

use super::config::Config;
use super::trainer::State;
use super::{SearchError, rundir};
use crate::graph::Id;
use crate::supernet::{GateInput, Param};
use safetensors::tensor::{Dtype, Metadata, SafeTensors, TensorInfo, TensorView};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

/// Of the header.
pub(super) const SCHEMA: u64 = 1;
/// The newest checkpoint of a run directory.
pub(super) const FILE: &str = "checkpoint.safetensors";
/// The one before it.
pub(super) const OLD: &str = "checkpoint.old.safetensors";
/// The one key of the header's metadata: with several their order would be left to chance.
const KEY: &str = "vitrim";

/// Where a run stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Steps done.
    pub step: u64,
    /// Steps of the whole run.
    pub of: u64,
    /// The epoch under way, counted from 0.
    pub epoch: u64,
    /// Where its next batch starts.
    pub slot: usize,
}

/// A gate input and its groups.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct GateMeta {
    pub(super) input: String,
    pub(super) groups: Vec<String>,
    pub(super) kind: String,
    pub(super) units: usize,
}

/// A trained weight and where the model reads it: (number of the node, slot).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ParamMeta {
    pub(super) input: String,
    pub(super) initializer: String,
    pub(super) uses: Vec<(usize, usize)>,
}

/// What the header says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Meta {
    pub(super) schema_version: u64,
    pub(super) vitrim: String,
    pub(super) model_sha256: String,
    pub(super) data: String,
    pub(super) position: Position,
    pub(super) finished: bool,
    pub(super) config: Config,
    pub(super) gates: Vec<GateMeta>,
    pub(super) params: Vec<ParamMeta>,
}

/// The part of the header that every version can read.
#[derive(Deserialize)]
struct AnyMeta {
    schema_version: u64,
    #[serde(default)]
    vitrim: String,
}

/// A checkpoint in memory.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Checkpoint {
    pub(super) meta: Meta,
    pub(super) state: State,
}

impl From<&GateInput> for GateMeta {
    fn from(g: &GateInput) -> Self {
        Self { input: g.input.clone(), groups: g.groups.clone(), kind: g.kind.clone(), units: g.units }
    }
}

impl From<&Param> for ParamMeta {
    fn from(p: &Param) -> Self {
        let uses = p.uses.iter().map(|u| (u.node.index(), u.slot)).collect();
        Self { input: p.input.clone(), initializer: p.initializer.clone(), uses }
    }
}

/// The bytes of a safetensors file of float32 tensors; `meta` becomes its only metadata.
pub(super) fn encode<'a>(
    tensors: impl Iterator<Item = (&'a str, &'a [usize], &'a [f32])>,
    meta: String,
) -> Result<Vec<u8>, SearchError> {
    let data: Vec<(&str, &[usize], Vec<u8>)> =
        tensors.map(|(name, dims, v)| (name, dims, v.iter().flat_map(|x| x.to_le_bytes()).collect())).collect();
    let views = data.iter().map(|(name, dims, bytes)| TensorView::new(Dtype::F32, dims.to_vec(), bytes).map(|t| (*name, t)));
    let views = views.collect::<Result<Vec<_>, _>>().map_err(|e| SearchError::internal(e.to_string()))?;
    let meta = HashMap::from([(KEY.to_string(), meta)]);
    safetensors::serialize(views, Some(meta)).map_err(|e| SearchError::internal(e.to_string()))
}

/// Writes the newest checkpoint of a run directory: of each of `tensors`, shapes by name, what `read` gives. One tensor at a time
/// is in memory, since the state as a whole is three times the weights.
pub(super) fn write(
    run_dir: &Path,
    meta: &Meta,
    tensors: &BTreeMap<String, Vec<usize>>,
    read: &dyn Fn(&str) -> Result<Vec<f32>, SearchError>,
) -> Result<(), SearchError> {
    let header = header(meta, tensors)?;
    let temporary = rundir::temporary(run_dir, |out| {
        out.write_all(&header)?;
        for (name, dims) in tensors {
            let values = read(name)?;
            if values.len() != dims.iter().product::<usize>() {
                return Err(SearchError::internal(format!("'{name}' has {} elements, expected {dims:?}", values.len())).into());
            }
            out.write_all(&values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())?;
        }
        Ok(())
    })?;
    let (new, old) = (run_dir.join(FILE), run_dir.join(OLD));
    if new.exists() {
        std::fs::rename(&new, &old).map_err(|source| SearchError::Io { file: old, source })?;
    }
    rundir::put(temporary, &new)
}

/// What stands before the data: its length as 8 bytes, then JSON, filled with blanks so that the data is aligned.
fn header(meta: &Meta, tensors: &BTreeMap<String, Vec<usize>>) -> Result<Vec<u8>, SearchError> {
    let meta = serde_json::to_string(meta).map_err(|e| SearchError::internal(e.to_string()))?;
    let mut at = 0;
    let info = |(name, dims): (&String, &Vec<usize>)| {
        let end = at + 4 * dims.iter().product::<usize>();
        let data_offsets = (std::mem::replace(&mut at, end), end);
        (name.clone(), TensorInfo { dtype: Dtype::F32, shape: dims.clone(), data_offsets })
    };
    let infos = tensors.iter().map(info).collect();
    let metadata = Metadata::new(Some(HashMap::from([(KEY.to_string(), meta)])), infos);
    let metadata = metadata.map_err(|e| SearchError::internal(e.to_string()))?;
    let mut json = serde_json::to_vec(&metadata).map_err(|e| SearchError::internal(e.to_string()))?;
    json.resize(json.len().next_multiple_of(8), b' ');
    Ok([&(json.len() as u64).to_le_bytes()[..], &json].concat())
}

impl Checkpoint {
    /// Reads the newest of a run directory; `None` where there is none.
    ///
    /// Errors: [`SearchError::Damaged`], [`SearchError::Newer`], [`SearchError::InvalidGates`].
    pub(super) fn newest(run_dir: &Path) -> Result<Option<Self>, SearchError> {
        let (new, old) = (run_dir.join(FILE), run_dir.join(OLD));
        // A run that ended between the two renames has left only the older one.
        let file = if new.exists() { &new } else { &old };
        if !file.exists() {
            return Ok(None);
        }
        match Self::read(file) {
            Err(SearchError::Damaged { file, cause, .. }) => {
                let has_older = file == new && Self::read(&old).is_ok();
                Err(SearchError::Damaged { file, cause, has_older })
            }
            other => other.map(Some),
        }
    }

    /// Reads one file.
    pub(super) fn read(file: &Path) -> Result<Self, SearchError> {
        let bytes = std::fs::read(file).map_err(|source| SearchError::Io { file: file.to_path_buf(), source })?;
        Self::from_bytes(&bytes, file)
    }

    fn from_bytes(bytes: &[u8], file: &Path) -> Result<Self, SearchError> {
        let file = || file.to_path_buf();
        let damaged = |cause: String| SearchError::Damaged { file: file(), cause, has_older: false };
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(|e| damaged(e.to_string()))?;
        let tensors = SafeTensors::deserialize(bytes).map_err(|e| damaged(e.to_string()))?;
        let text =
            header.metadata().as_ref().and_then(|m| m.get(KEY)).ok_or_else(|| damaged("it is no checkpoint of vitrim".into()))?;
        let any: AnyMeta = serde_json::from_str(text).map_err(|e| damaged(format!("header: {e}")))?;
        if any.schema_version > SCHEMA {
            return Err(SearchError::Newer { file: file(), version: any.vitrim, schema: any.schema_version });
        }
        let meta: Meta = serde_json::from_str(text).map_err(|e| damaged(format!("header: {e}")))?;
        let mut state = State::new();
        for (name, t) in tensors.tensors() {
            if t.dtype() != Dtype::F32 {
                return Err(damaged(format!("'{}' is not float32", name.escape_debug())));
            }
            let values = t.data().as_chunks::<4>().0.iter().map(|c| f32::from_le_bytes(*c)).collect();
            state.insert(name, (t.shape().to_vec(), values));
        }
        for gate in &meta.gates {
            let (dims, values) =
                state.get(&gate.input).ok_or_else(|| damaged(format!("it has no '{}'", gate.input.escape_debug())))?;
            if *dims != [gate.units] {
                return Err(damaged(format!("'{}' is {dims:?}, expected [{}]", gate.input.escape_debug(), gate.units)));
            }
            if values.iter().any(|v| !v.is_finite() || *v < 0.0) {
                return Err(SearchError::InvalidGates { file: file(), gate: gate.input.clone() });
            }
        }
        Ok(Self { meta, state })
    }
}

impl Meta {
    /// Checks that a run with these inputs and settings may go on from here.
    ///
    /// Errors: [`SearchError::OtherModel`], [`SearchError::OtherData`], [`SearchError::OtherConfig`].
    pub(super) fn check(&self, run_dir: &Path, model: &str, data: &str, config: &Config) -> Result<(), SearchError> {
        let file = || -> PathBuf { run_dir.join(FILE) };
        if self.model_sha256 != model {
            let (found, expected) = (self.model_sha256.clone(), model.to_string());
            return Err(SearchError::OtherModel { file: file(), found, expected });
        }
        if self.data != data {
            return Err(SearchError::OtherData { file: file(), found: self.data.clone(), expected: data.to_string() });
        }
        let (then, now) = (settings(&self.config)?, settings(config)?);
        let keys: std::collections::BTreeSet<&String> = then.keys().chain(now.keys()).collect();
        for key in keys {
            let (found, expected) = (then.get(key), now.get(key));
            if found != expected {
                let text = |v: Option<&serde_json::Value>| v.map_or("nothing".to_string(), ToString::to_string);
                let (found, expected) = (text(found), text(expected));
                return Err(SearchError::OtherConfig { file: file(), key: key.clone(), found, expected });
            }
        }
        Ok(())
    }
}

/// The settings that decide a run's result, by key.
fn settings(config: &Config) -> Result<BTreeMap<String, serde_json::Value>, SearchError> {
    let value = serde_json::to_value(config).map_err(|e| SearchError::internal(e.to_string()))?;
    let serde_json::Value::Object(map) = value else { return Err(SearchError::internal("settings are no table")) };
    let deciding = |key: &str| !matches!(key, "checkpoint_every" | "device" | "threads" | "schema_version");
    Ok(map.into_iter().filter(|(key, value)| deciding(key) && !value.is_null()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Checkpoint {
        let gates = vec![GateMeta { input: "gate.mlp.0".into(), groups: vec!["mlp.0".into()], kind: "mlp".into(), units: 2 }];
        let meta = Meta {
            schema_version: SCHEMA,
            vitrim: "0.1.0".into(),
            model_sha256: "ab12".into(),
            data: "d".into(),
            position: Position { step: 7, of: 10, epoch: 1, slot: 64 },
            finished: false,
            config: Config::default(),
            gates,
            params: Vec::new(),
        };
        Checkpoint { meta, state: State::from([("gate.mlp.0".to_string(), (vec![2], vec![0.5, 0.0]))]) }
    }

    fn written(checkpoint: &Checkpoint) -> Vec<u8> {
        let dir = tempfile::tempdir().expect("a folder");
        let tensors = checkpoint.state.iter().map(|(name, (dims, _))| (name.clone(), dims.clone())).collect();
        write(dir.path(), &checkpoint.meta, &tensors, &|name| Ok(checkpoint.state[name].1.clone())).expect("it can be written");
        std::fs::read(dir.path().join(FILE)).expect("it is there")
    }

    fn read(bytes: &[u8]) -> Result<Checkpoint, SearchError> {
        Checkpoint::from_bytes(bytes, Path::new("c"))
    }

    #[test]
    fn a_checkpoint_survives_its_file_and_gives_equal_bytes() {
        let bytes = written(&sample());
        assert_eq!(read(&bytes).expect("it can be read"), sample());
        assert_eq!(bytes, written(&sample()));
    }

    #[test]
    fn a_checkpoint_is_as_safetensors_writes_it() {
        let mut checkpoint = sample();
        checkpoint.state.insert("param.w".into(), (vec![2, 1], vec![1.5, -2.0]));
        let tensors = checkpoint.state.iter().map(|(name, (dims, values))| (name.as_str(), &dims[..], &values[..]));
        let meta = serde_json::to_string(&checkpoint.meta).expect("it is plain data");
        assert_eq!(written(&checkpoint), encode(tensors, meta).expect("it can be written"));
    }

    #[test]
    fn what_cannot_be_read_leaves_no_checkpoint() {
        let (dir, sample) = (tempfile::tempdir().expect("a folder"), sample());
        let tensors = BTreeMap::from([("gate.mlp.0".to_string(), vec![2])]);
        assert!(write(dir.path(), &sample.meta, &tensors, &|_| Err(SearchError::internal("lost"))).is_err());
        assert!(write(dir.path(), &sample.meta, &tensors, &|_| Ok(vec![1.0])).is_err_and(|e| e.to_string().contains("[2]")));
        assert_eq!(std::fs::read_dir(dir.path()).expect("it is there").count(), 0);
    }

    #[test]
    fn damage_of_every_kind_is_reported() {
        let bytes = written(&sample());
        for cut in [0, 4, 8, 100, bytes.len() - 1] {
            assert!(matches!(read(&bytes[..cut]), Err(SearchError::Damaged { .. })), "cut at {cut}");
        }
        let mut huge = bytes.clone();
        huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(matches!(read(&huge), Err(SearchError::Damaged { .. })));
        let other = safetensors::serialize(Vec::<(&str, TensorView<'_>)>::new(), None).expect("an empty file");
        assert!(matches!(read(&other), Err(SearchError::Damaged { .. })));
    }

    #[test]
    fn later_versions_and_invalid_gates_are_refused() {
        let mut later = sample();
        later.meta.schema_version = SCHEMA + 1;
        later.meta.vitrim = "9.0".into();
        let error = read(&written(&later)).expect_err("it is newer");
        assert!(error.to_string().contains("written by vitrim 9.0 (schema 2), this is"), "{error}");
        for bad in [f32::NAN, -0.5, f32::INFINITY] {
            let mut wrong = sample();
            wrong.state.insert("gate.mlp.0".into(), (vec![2], vec![1.0, bad]));
            let error = read(&written(&wrong)).expect_err("gates are not that");
            assert!(error.to_string().contains("holds invalid mask values"), "{error}");
        }
    }

    #[test]
    fn another_model_data_or_setting_is_refused() {
        let meta = sample().meta;
        let check =
            |model: &str, data: &str, config: &Config| meta.check(Path::new("r"), model, data, config).map_err(|e| e.to_string());
        assert_eq!(check("ab12", "d", &Config { threads: 7, checkpoint_every: 3, ..Config::default() }), Ok(()));
        assert!(check("cd34", "d", &Config::default()).is_err_and(|e| e.contains("belongs to model sha256 ab12, not cd34")));
        assert!(check("ab12", "e", &Config::default()).is_err_and(|e| e.contains("belongs to data d, not e")));
        let other = Config { lr: 0.5, ..Config::default() };
        assert!(check("ab12", "d", &other).is_err_and(|e| e.contains("lr = 0.0002, not 0.5")));
    }
}
