//! Statistics as a file: safetensors with `fit.mean.<probe>` and `held.mean.<probe>` `[F]`, `fit.cov.<probe>` and `held.cov.<probe>`
//! `[F (F + 1) / 2]` (the upper triangle, row by row), all F64; what they belong to is in the header.

use super::sums::{packed, triangle, unpacked};
use super::{Gathered, Moments, Probe, Stats, StatsError};
use crate::graph::Graph;
use crate::onnx::{self, Overwrite};
use safetensors::tensor::{Dtype, Metadata, SafeTensors, TensorInfo};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};
use std::io::{self, Write};
use std::path::Path;

/// Of the header.
const SCHEMA: u64 = 1;
/// The one key of the header's metadata: with several their order would be left to chance.
const KEY: &str = "vitrim";
/// Elements that are encoded at a time: memory for a whole covariance more is not needed.
const BLOCK: usize = 1 << 16;

/// Rows of a probe.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Rows {
    fit: u64,
    held: u64,
}

/// What the header says.
#[derive(Debug, Serialize, Deserialize)]
struct Meta {
    schema_version: u64,
    vitrim: String,
    kind: String,
    model_sha256: String,
    probes_sha256: String,
    images: u64,
    held_images: u64,
    seed: u64,
    rows: BTreeMap<String, Rows>,
}

/// The `kind` of the header.
const KIND: &str = "stats";

/// A hash of names, values, axes and centres; the order of the probes does not count.
fn fingerprint(graph: &Graph, probes: &[Probe]) -> Result<String, StatsError> {
    let line = |p: &Probe| serde_json::to_string(&(&p.name, graph.value(p.value).name(), &p.axes, p.centre));
    let mut lines = probes.iter().map(line).collect::<Result<Vec<_>, _>>().map_err(internal)?;
    lines.sort();
    Ok(Sha256::digest(lines.join("\n")).iter().map(|b| format!("{b:02x}")).collect())
}

fn internal(error: impl std::fmt::Display) -> StatsError {
    StatsError::Internal { what: error.to_string() }
}

impl Stats {
    /// Writes the file: complete under its name, or not at all; what is there is replaced. `graph` and `probes` are those that the
    /// statistics were gathered with.
    ///
    /// Errors: [`StatsError::File`].
    pub fn write(&self, path: &Path, graph: &Graph, probes: &[Probe]) -> Result<(), StatsError> {
        let rows = |(name, g): (&String, &Gathered)| (name.clone(), Rows { fit: g.fit.rows, held: g.held.rows });
        let meta = Meta {
            schema_version: SCHEMA,
            vitrim: env!("CARGO_PKG_VERSION").to_string(),
            kind: KIND.to_string(),
            model_sha256: self.model_sha256.clone(),
            probes_sha256: fingerprint(graph, probes)?,
            images: self.images,
            held_images: self.held_images,
            seed: self.seed,
            rows: self.probes.iter().map(rows).collect(),
        };
        let header = self.header(&meta)?;
        onnx::write_file_with(path, Overwrite::Force, |out| {
            out.write_all(&header)?;
            for (_, moments) in self.parts() {
                put(out, moments.mean.iter().copied())?;
                put(out, packed(&moments.cov))?;
            }
            Ok(())
        })?;
        Ok(())
    }

    /// All moments with what their tensors' names end in, in the order of the file.
    fn parts(&self) -> impl Iterator<Item = ((&'static str, &str), &Moments)> {
        self.probes.iter().flat_map(|(name, g)| [(("fit", name.as_str()), &g.fit), (("held", name.as_str()), &g.held)])
    }

    /// What stands before the data: its length as 8 bytes, then JSON, filled with blanks so that the data is aligned.
    fn header(&self, meta: &Meta) -> Result<Vec<u8>, StatsError> {
        let mut infos = Vec::with_capacity(4 * self.probes.len());
        let mut at = 0;
        for ((part, name), moments) in self.parts() {
            let features = moments.mean.len();
            let entries = triangle(features).ok_or_else(|| internal("a covariance is too large"))?;
            for (what, count) in [("mean", features), ("cov", entries)] {
                let end = at + 8 * count;
                let info = TensorInfo { dtype: Dtype::F64, shape: vec![count], data_offsets: (at, end) };
                infos.push((format!("{part}.{what}.{name}"), info));
                at = end;
            }
        }
        let text = serde_json::to_string(meta).map_err(internal)?;
        let metadata = Metadata::new(Some(HashMap::from([(KEY.to_string(), text)])), infos).map_err(internal)?;
        let mut json = serde_json::to_vec(&metadata).map_err(internal)?;
        json.resize(json.len().next_multiple_of(8), b' ');
        Ok([&(json.len() as u64).to_le_bytes()[..], &json].concat())
    }

    /// Reads a file of statistics of this model at these probes.
    ///
    /// Errors: [`StatsError::File`], [`StatsError::Damaged`]; [`StatsError::Stale`] where it is of another model or of other probes.
    pub fn read(path: &Path, model_sha256: &str, graph: &Graph, probes: &[Probe]) -> Result<Self, StatsError> {
        let bytes = onnx::bytes_of_file(path)?;
        let file = path.display().to_string();
        let damaged = |cause: String| StatsError::Damaged { file: file.clone(), cause };
        let stale = |reason: String| Err(StatsError::Stale { file: file.clone(), reason });
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| damaged(e.to_string()))?;
        let tensors = SafeTensors::deserialize(&bytes).map_err(|e| damaged(e.to_string()))?;
        let text = header.metadata().as_ref().and_then(|m| m.get(KEY));
        let text = text.ok_or_else(|| damaged("it has no header of vitrim".to_string()))?;
        let meta: Meta = serde_json::from_str(text).map_err(|e| damaged(format!("header: {e}")))?;
        if meta.kind != KIND {
            return Err(damaged(format!("it holds '{}'", meta.kind.escape_debug())));
        }
        if meta.schema_version > SCHEMA {
            return stale(format!("written by a newer version ({})", meta.vitrim.escape_debug()));
        }
        if meta.model_sha256 != model_sha256 {
            let start = |s: &str| s.chars().take(8).collect::<String>().escape_debug().to_string();
            return stale(format!("they belong to model sha256 {}.., not {}..", start(&meta.model_sha256), start(model_sha256)));
        }
        if meta.probes_sha256 != fingerprint(graph, probes)? {
            let missing = probes.iter().find(|p| !meta.rows.contains_key(&p.name));
            return stale(match missing {
                Some(probe) => format!("there is no probe '{}'", probe.name),
                None => "they were taken at other probes".to_string(),
            });
        }
        let moments = |part: &str, name: &str, rows: u64| -> Result<Moments, StatsError> {
            let mean = numbers(&tensors, &format!("{part}.mean.{name}")).map_err(damaged)?;
            let cov = numbers(&tensors, &format!("{part}.cov.{name}")).map_err(damaged)?;
            if triangle(mean.len()) != Some(cov.len()) || mean.is_empty() || rows == 0 {
                let (name, features) = (name.escape_debug(), mean.len());
                return Err(damaged(format!("'{name}': {} covariances of {features} features over {rows} rows", cov.len())));
            }
            Ok(Moments { rows, cov: unpacked(mean.len(), &cov), mean })
        };
        let mut all = BTreeMap::new();
        for (name, rows) in &meta.rows {
            let gathered = Gathered { fit: moments("fit", name, rows.fit)?, held: moments("held", name, rows.held)? };
            all.insert(name.clone(), gathered);
        }
        let Meta { images, held_images, seed, model_sha256, .. } = meta;
        Ok(Self { probes: all, images, held_images, seed, model_sha256 })
    }
}

fn put(out: &mut dyn Write, values: impl Iterator<Item = f64>) -> io::Result<()> {
    let mut block = Vec::with_capacity(8 * BLOCK);
    for value in values {
        block.extend_from_slice(&value.to_le_bytes());
        if block.len() == 8 * BLOCK {
            out.write_all(&block)?;
            block.clear();
        }
    }
    out.write_all(&block)
}

/// A vector of the file.
fn numbers(tensors: &SafeTensors<'_>, name: &str) -> Result<Vec<f64>, String> {
    let shown = name.escape_debug();
    let tensor = tensors.tensor(name).map_err(|_| format!("there is no '{shown}'"))?;
    if tensor.dtype() != Dtype::F64 || tensor.shape().len() != 1 {
        return Err(format!("'{shown}' is not a vector of float64"));
    }
    let values: Vec<f64> = tensor.data().as_chunks::<8>().0.iter().map(|c| f64::from_le_bytes(*c)).collect();
    if values.iter().any(|v| !v.is_finite()) {
        return Err(format!("'{shown}' holds invalid values"));
    }
    Ok(values)
}
