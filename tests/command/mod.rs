//! Running the real command in a folder of its own, and small models, images and archives for it.

#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test binary uses a part of it")]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use onnx_proto::*;
use prost::Message;
use tempfile::TempDir;

/// A folder in which commands run; no ONNX Runtime is found there unless a test names one.
pub struct Sandbox {
    pub dir: TempDir,
}

/// What a command did.
#[derive(Debug)]
pub struct Ran {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("stdout is no object: {e}\n{self:?}"))
    }
}

impl Default for Sandbox {
    fn default() -> Self {
        Self { dir: tempfile::tempdir().expect("a folder") }
    }
}

impl Sandbox {
    pub fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write(&self, name: &str, bytes: &[u8]) {
        let path = self.at(name);
        std::fs::create_dir_all(path.parent().expect("it lies in the folder")).expect("folders can be made");
        std::fs::write(path, bytes).expect("files can be written");
    }

    pub fn model(&self, name: &str, model: &ModelProto) {
        self.write(name, &model.encode_to_vec());
    }

    /// All files, with their bytes.
    pub fn files(&self) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(self.dir.path())
            .expect("the folder is there")
            .map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    pub fn run(&self, args: &[&str]) -> Ran {
        self.run_with(args, &[])
    }

    /// Runs the command; `vars` on top of an environment in which nothing is found.
    pub fn run_with(&self, args: &[&str], vars: &[(&str, &str)]) -> Ran {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vitrim"));
        command.args(args).current_dir(self.dir.path()).stdin(Stdio::null());
        for gone in
            ["VITRIM_ORT_LIB", "ORT_DYLIB_PATH", "VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH", "XDG_CACHE_HOME", "LD_LIBRARY_PATH"]
        {
            command.env_remove(gone);
        }
        command.env("HOME", self.dir.path().join("home")).env("PATH", "/nowhere").env("VITRIM_OFFLINE", "1");
        command.envs(vars.iter().copied());
        let out = command.output().expect("the command starts");
        Ran {
            code: out.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&out.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&out.stderr).into_owned(),
        }
    }
}

/// The ONNX Runtime that VITRIM_TEST_ORT or VITRIM_ORT_LIB names; tests that need one say so and end without it.
pub fn ort() -> Option<String> {
    if !cfg!(feature = "ort") {
        return None;
    }
    ["VITRIM_TEST_ORT", "VITRIM_ORT_LIB"].iter().find_map(|v| std::env::var(v).ok()).filter(|v| !v.is_empty())
}

/// The network that comes with the source.
pub fn digits(file: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/digits").join(file).display().to_string()
}

pub fn opset(domain: &str, version: i64) -> OperatorSetIdProto {
    OperatorSetIdProto { domain: Some(domain.into()), version: Some(version) }
}

pub fn node(name: &str, op: &str, inputs: &[&str], outputs: &[&str]) -> NodeProto {
    NodeProto {
        name: Some(name.into()),
        op_type: Some(op.into()),
        input: inputs.iter().map(|s| s.to_string()).collect(),
        output: outputs.iter().map(|s| s.to_string()).collect(),
        ..Default::default()
    }
}

/// A value with a shape; `0` stands for the symbol `batch`, negative numbers for symbols of their own.
pub fn info(name: &str, dims: &[i64]) -> ValueInfoProto {
    let dim = |d: &i64| {
        let value = match d {
            0 => Dim::DimParam("batch".into()),
            n if *n < 0 => Dim::DimParam(format!("s{}", -n)),
            n => Dim::DimValue(*n),
        };
        Dimension { value: Some(value), ..Default::default() }
    };
    let shape = TensorShapeProto { dim: dims.iter().map(dim).collect() };
    let tensor = TensorType { elem_type: Some(1), shape: Some(shape) };
    let value = Some(TypeValue::TensorType(tensor));
    ValueInfoProto { name: Some(name.into()), r#type: Some(TypeProto { value, ..Default::default() }), ..Default::default() }
}

pub fn floats(name: &str, dims: &[i64], values: &[f32]) -> TensorProto {
    let raw: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    TensorProto {
        name: Some(name.into()),
        data_type: Some(1),
        dims: dims.to_vec(),
        raw_data: Some(raw.into()),
        ..Default::default()
    }
}

/// Numbers that differ and are small.
pub fn some(count: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 37 % 101) as f32 - 50.0) / 100.0).collect()
}

/// `y = relu(x W) V` with 16 hidden units: one group `mlp.0`.
pub fn mlp() -> ModelProto {
    let graph = GraphProto {
        name: Some("g".into()),
        node: vec![
            node("A", "MatMul", &["x", "W"], &["h"]),
            node("R", "Relu", &["h"], &["r"]),
            node("B", "MatMul", &["r", "V"], &["y"]),
        ],
        initializer: vec![floats("W", &[4, 16], &some(64)), floats("V", &[16, 3], &some(48))],
        input: vec![info("x", &[0, 4])],
        output: vec![info("y", &[0, 3])],
        ..Default::default()
    };
    ModelProto { ir_version: Some(8), opset_import: vec![opset("", 17)], graph: Some(graph), ..Default::default() }
}

/// An image classifier: mean over pixels, then [`mlp`] on the three channels.
pub fn classifier(height: i64, width: i64) -> ModelProto {
    let mut model = mlp();
    let graph = model.graph.as_mut().expect("it has one");
    graph.input = vec![info("x", &[0, 3, height, width])];
    graph.initializer[0] = floats("W", &[3, 16], &some(48));
    let mut mean = node("M", "GlobalAveragePool", &["x"], &["p"]);
    mean.doc_string = None;
    let flat = node("F", "Flatten", &["p"], &["f"]);
    graph.node[0].input[0] = "f".into();
    graph.node.splice(0..0, [mean, flat]);
    model
}

pub fn graph(model: &mut ModelProto) -> &mut GraphProto {
    model.graph.as_mut().expect("it has one")
}

pub fn externalize(tensor: &mut TensorProto, entries: &[(&str, &str)]) {
    tensor.raw_data = None;
    tensor.data_location = Some(data_location::EXTERNAL);
    tensor.external_data =
        entries.iter().map(|(k, v)| StringStringEntryProto { key: Some((*k).into()), value: Some((*v).into()) }).collect();
}

/// A NumPy array file.
pub fn npy(descr: &str, dims: &[usize], bytes: &[u8]) -> Vec<u8> {
    let shape: String = dims.iter().map(|d| format!("{d}, ")).collect();
    let mut header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({shape}), }}");
    while (header.len() + 11) % 64 != 0 {
        header.push(' ');
    }
    header.push('\n');
    let mut out = b"\x93NUMPY\x01\x00".to_vec();
    out.extend(u16::try_from(header.len()).expect("it is short").to_le_bytes());
    out.extend(header.as_bytes());
    out.extend(bytes);
    out
}

/// An archive of arrays.
pub fn npz(entries: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut archive = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let options = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for (name, bytes) in entries {
        archive.start_file(format!("{name}.npy"), options).expect("an entry");
        archive.write_all(bytes).expect("its bytes");
    }
    archive.finish().expect("an archive").into_inner()
}

/// A grey PNG image.
pub fn png(side: u32) -> Vec<u8> {
    let mut out = std::io::Cursor::new(Vec::new());
    image::GrayImage::from_pixel(side, side, image::Luma([128])).write_to(&mut out, image::ImageFormat::Png).expect("a PNG");
    out.into_inner()
}

/// The variables under which ONNX Runtime is found; `None` where a test has to be left out.
pub fn engine() -> Option<[(&'static str, String); 1]> {
    let found = ort().map(|path| [("VITRIM_ORT_LIB", path)]);
    if found.is_none() {
        println!("no ONNX Runtime named by VITRIM_TEST_ORT: not tested");
    }
    found
}

/// Archives with the first `n` digits: quick to train on.
pub fn few(sandbox: &Sandbox, name: &str, n: usize) {
    let file = std::fs::File::open(digits("train.npz")).unwrap();
    let mut archive = zip::ZipArchive::new(file).unwrap();
    let mut cut = |key: &str, item: usize, dims: &[usize]| {
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut archive.by_name(&format!("{key}.npy")).unwrap(), &mut bytes).unwrap();
        let header = 10 + usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
        npy("|u1", dims, &bytes[header..header + n * item])
    };
    let entries = [("input", cut("input", 784, &[n, 1, 28, 28])), ("labels", cut("labels", 1, &[n]))];
    sandbox.write(name, &npz(&entries));
}
