//! The engines that run a model: ONNX Runtime (loaded at run time) and tract (linked in). No other module touches an engine.
//!
//! A model is always given as the bytes of an ONNX file that vitrim wrote itself, without value_info and without data files; what is
//! too large for that is handed over beside the bytes.
//! Example: `open(RuntimeName::Ort, &bytes, &SessionOptions::default())?.run(&[("x".into(), x)])?` gives the outputs
//! in the model's order, for x of \[B, 3, 224, 224\] logits of \[B, classes\].
//!
//! Invariant: same bytes, same feeds, same options, same library: same bytes of output on the CPU.
//! Which engines are linked is decided by the cargo features `ort` and `tract`; without them everything here still
//! compiles, and asking for an engine is [`Error::NotBuilt`].

mod error;
mod install;
mod library;
#[cfg(feature = "ort")]
mod ort;
mod probe;
#[cfg(feature = "tract")]
mod tract;
mod train;

use std::fmt;

use crate::data::array::{Array, ArrayData, ArrayKind};
use crate::graph::{DType, Graph, Tensor, ValueId};
use crate::onnx;
pub use error::{Error, Looked};
pub use install::{InstallOptions, Progress, find_or_install, install, library_sha256};
pub use library::{Found, LibraryChoice, LibrarySource, Surroundings, find, search};
pub use probe::{MINIMUM_VERSION, PROBE_ARGUMENT, Probe, TIME_LIMIT, answer_probe, preflight};
pub use train::{BoundSession, StateSpec};

/// The engines by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum RuntimeName {
    /// ONNX Runtime, the reference.
    Ort,
    /// tract, written independently of it.
    Tract,
}

impl RuntimeName {
    /// The word used on the command line and in JSON, which is also the cargo feature.
    pub fn feature(self) -> &'static str {
        match self {
            RuntimeName::Ort => "ort",
            RuntimeName::Tract => "tract",
        }
    }

    /// Whether this build has it.
    pub fn is_built(self) -> bool {
        match self {
            RuntimeName::Ort => cfg!(feature = "ort"),
            RuntimeName::Tract => cfg!(feature = "tract"),
        }
    }
}

impl fmt::Display for RuntimeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            RuntimeName::Ort => "ONNX Runtime",
            RuntimeName::Tract => "tract",
        })
    }
}

/// Where a model is to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Device {
    /// The processor.
    #[default]
    Cpu,
    /// A CUDA device by number; an error where it cannot be used, never silently the processor.
    Cuda(u32),
    /// CUDA device 0 where the library has CUDA and the device works, else the processor;
    /// [`Session::device`] says which and why.
    Auto,
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(number) => write!(f, "cuda:{number}"),
            Device::Auto => f.write_str("auto"),
        }
    }
}

/// The device that a session runs on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInUse {
    /// `Cpu` or `Cuda`, never `Auto`.
    pub device: Device,
    /// Under `Auto`: why it is not CUDA. One line.
    pub why_not_cuda: Option<String>,
}

/// Whether an engine may rewrite the graph before it runs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Optimize {
    /// All of its rewrites.
    #[default]
    On,
    /// None: the graph as written, which gives the engine's own noise when compared with `On`.
    Off,
}

/// How a session is opened.
#[derive(Debug, Clone, Default)]
pub struct SessionOptions {
    /// Threads of one operator; 0 means as many as the process may use. tract runs on one thread, whatever this says.
    pub threads: usize,
    /// Graph rewrites on or off.
    pub optimize: Optimize,
    /// Where to run. tract runs on the processor: `Auto` is that, `Cuda` is an error.
    pub device: Device,
    /// Which ONNX Runtime. The first session of a process decides for all.
    pub library: LibraryChoice,
}

/// The kind of array that a type is fed as.
pub fn kind_of(dtype: DType) -> Option<ArrayKind> {
    Some(match dtype {
        DType::F32 => ArrayKind::F32,
        DType::F16 => ArrayKind::F16,
        DType::BF16 => ArrayKind::BF16,
        DType::F64 => ArrayKind::F64,
        DType::I64 => ArrayKind::I64,
        DType::I32 => ArrayKind::I32,
        DType::U8 => ArrayKind::U8,
        DType::I8 => ArrayKind::I8,
        DType::Bool => ArrayKind::Bool,
        _ => return None,
    })
}

/// A model ready to run.
pub trait Session: Send {
    /// Runs the model once on named inputs and gives all outputs in the model's order.
    ///
    /// Errors: [`Error::Name`] or [`Error::Array`] where the feeds do not fit, [`Error::Run`] with the engine's words.
    fn run(&mut self, feeds: &[(String, Array)]) -> Result<Vec<(String, Array)>, Error>;

    /// As [`Session::run`], but gives one output after the other: only one of them is in memory twice.
    ///
    /// Errors: as [`Session::run`].
    fn run_each(&mut self, feeds: &[(String, Array)], take: &mut dyn FnMut(&str, Array)) -> Result<(), Error> {
        self.run(feeds)?.into_iter().for_each(|(name, array)| take(&name, array));
        Ok(())
    }

    /// The engine's version, such as "1.24.4".
    fn version(&self) -> String;

    /// Where it runs.
    fn device(&self) -> &DeviceInUse;
}

/// Opens a model in an engine.
///
/// Errors: [`Error::NotBuilt`]; for ONNX Runtime the errors of [`find`] and [`preflight`]; [`Error::Load`] with the
/// engine's words where it refuses the model.
pub fn open(name: RuntimeName, model_bytes: &[u8], options: &SessionOptions) -> Result<Box<dyn Session>, Error> {
    open_with_initializers(name, model_bytes, Vec::new(), options)
}

/// Unit: bytes. A larger model goes to ONNX Runtime with its large initializers beside it: read from one message they would be copied
/// several times.
const ONE_MESSAGE: usize = 64 << 20;

/// Opens a graph in an engine, whatever its size.
///
/// Errors: as [`open_with_initializers`]; [`Error::Encode`] for a graph that cannot be encoded.
pub fn open_graph(name: RuntimeName, graph: &Graph, options: &SessionOptions) -> Result<Box<dyn Session>, Error> {
    let limit = if name == RuntimeName::Ort { ONE_MESSAGE } else { usize::MAX };
    let (bytes, outside) = onnx::to_parts(graph, limit, &|dtype| kind_of(dtype).is_some())?;
    let content = |v: &ValueId| {
        let value = graph.value(*v);
        Some((value.name().to_string(), array_of(value.initializer()?)?))
    };
    open_with_initializers(name, &bytes, outside.iter().filter_map(content).collect(), options)
}

/// The elements of a tensor, where its type is one that is fed.
pub fn array_of(tensor: &Tensor) -> Option<Array> {
    fn all<const N: usize, T>(bytes: &[u8], f: impl Fn([u8; N]) -> T) -> Vec<T> {
        bytes.as_chunks::<N>().0.iter().map(|c| f(*c)).collect()
    }
    let b = &tensor.bytes[..];
    let data = match kind_of(tensor.dtype)? {
        ArrayKind::F32 => ArrayData::F32(all(b, f32::from_le_bytes)),
        ArrayKind::F16 => ArrayData::F16(all(b, u16::from_le_bytes)),
        ArrayKind::BF16 => ArrayData::BF16(all(b, u16::from_le_bytes)),
        ArrayKind::F64 => ArrayData::F64(all(b, f64::from_le_bytes)),
        ArrayKind::I64 => ArrayData::I64(all(b, i64::from_le_bytes)),
        ArrayKind::I32 => ArrayData::I32(all(b, i32::from_le_bytes)),
        ArrayKind::U8 => ArrayData::U8(b.to_vec()),
        ArrayKind::I8 => ArrayData::I8(all(b, i8::from_le_bytes)),
        ArrayKind::Bool => ArrayData::Bool(b.to_vec()),
    };
    Some(Array { dims: tensor.dims.clone(), data })
}

/// As [`open`], with initializers handed over beside the bytes, so that a model may be larger than the 2 GB that
/// protobuf can hold. Each such initializer is in the model with its type and dims and `data_location` EXTERNAL;
/// the location that it names is not read. The arrays are used in place, not copied.
///
/// Errors: as [`open`]; [`Error::Unsupported`] for tract if there are any.
pub fn open_with_initializers(
    name: RuntimeName,
    model_bytes: &[u8],
    initializers: Vec<(String, Array)>,
    options: &SessionOptions,
) -> Result<Box<dyn Session>, Error> {
    match name {
        #[cfg(feature = "ort")]
        RuntimeName::Ort => Ok(Box::new(ort::OrtSession::open(model_bytes, initializers, options)?)),
        #[cfg(feature = "tract")]
        RuntimeName::Tract => {
            if !initializers.is_empty() {
                return Err(Error::Unsupported { runtime: name, what: "initializers outside the model's bytes" });
            }
            Ok(Box::new(tract::TractSession::open(model_bytes, options)?))
        }
        #[cfg(not(all(feature = "ort", feature = "tract")))]
        missing => {
            let _ = (model_bytes, initializers, options);
            Err(Error::NotBuilt { runtime: missing })
        }
    }
}

/// An array whose dims do not multiply to its length would be read out of bounds by an engine.
#[cfg(any(feature = "ort", feature = "tract"))]
fn check_len(name: &str, dims: &[usize], len: usize) -> Result<(), Error> {
    let product = dims.iter().try_fold(1usize, |product, dim| product.checked_mul(*dim));
    if product == Some(len) {
        return Ok(());
    }
    let expected = format!("dims {dims:?}");
    Err(Error::Array { name: name.to_string(), expected, found: format!("{len} elements") })
}
