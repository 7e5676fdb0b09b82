//! ONNX Runtime: loaded once per process from the library that the search found, then sessions on it.
//!
//! Every session: all graph rewrites or none (the levels between are not the same in all versions), no memory pattern
//! (38 % less memory at the same speed on a training graph), deterministic kernels, threads that do not spin (on a shared
//! machine spinning costs more than it gives).
//! Invariant: one library and one environment per process, kept until its end.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use ::ort::environment::Environment;
use ::ort::ep;
use ::ort::ep::ExecutionProvider;
use ::ort::logging::LogLevel;
use ::ort::session::builder::{GraphOptimizationLevel, SessionBuilder};
use ::ort::session::{Session as Native, SessionInputValue};
use ::ort::value::{DynTensor, DynValue, PrimitiveTensorElementType, Tensor, TensorElementType, TensorRef};
use half::slice::HalfBitsSliceExt;
use half::vec::HalfBitsVecExt;

use crate::data::array::{Array, ArrayData};
use crate::runtime::error::one_line;
use crate::runtime::{Device, DeviceInUse, Error, LibraryChoice, Optimize, RuntimeName, Session, SessionOptions, check_len};
use crate::runtime::{find, preflight};

/// What the process has loaded. The environment lives as long as the process, because a second one cannot be made.
#[derive(Clone)]
pub(crate) struct Loaded {
    path: PathBuf,
    version: String,
    environment: Environment,
}

static LOADED: Mutex<Option<Loaded>> = Mutex::new(None);

/// The environment of the process; the first call loads the library.
pub(crate) fn loaded(choice: &LibraryChoice) -> Result<Loaded, Error> {
    let mut slot = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(loaded) = slot.as_ref() {
        // Only a file that is named now can contradict what is loaded; the search gives the same as before.
        return match &choice.file {
            Some(asked) if !asked.is_dir() && !is_same_file(asked, &loaded.path) => {
                Err(Error::OtherLibrary { loaded: loaded.path.clone(), asked: asked.clone() })
            }
            _ => Ok(loaded.clone()),
        };
    }
    let path = find(choice)?.path;
    let version = preflight(&path, &choice.probe)?;
    let start = |reason: String| Error::Start { path: path.clone(), reason: plain(&reason) };
    let builder = ::ort::init_from(&path).map_err(|error| start(error.to_string()))?;
    let environment = builder.with_name("vitrim").with_telemetry(false).build().map_err(|error| start(error.to_string()))?;
    environment.set_log_level(log_level());
    let loaded = Loaded { path, version, environment };
    *slot = Some(loaded.clone());
    Ok(loaded)
}

fn is_same_file(a: &Path, b: &Path) -> bool {
    a == b || matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

/// ONNX Runtime writes to stderr by itself what it then also returns as an error; ORT_LOG turns that on again.
fn log_level() -> LogLevel {
    match std::env::var("ORT_LOG").as_deref() {
        Ok("verbose") => LogLevel::Verbose,
        Ok("info") => LogLevel::Info,
        Ok("warning") => LogLevel::Warning,
        Ok("error") => LogLevel::Error,
        _ => LogLevel::Fatal,
    }
}

/// A session of the library, and where it ended up.
pub(crate) struct Opened {
    pub(crate) native: Native,
    pub(crate) device: DeviceInUse,
    pub(crate) version: String,
}

/// Opens a model on the device asked for.
pub(crate) fn open_native(bytes: &[u8], initializers: Vec<(String, Array)>, options: &SessionOptions) -> Result<Opened, Error> {
    let loaded = loaded(&options.library)?;
    let mut outside = Vec::new();
    for (name, array) in initializers {
        outside.push((name.clone(), std::sync::Arc::new(owned(&name, array)?.into_dyn())));
    }
    let open = |cuda| commit(&loaded, bytes, &outside, options, cuda);
    let (native, device, why_not_cuda) = match options.device {
        Device::Cpu => (open(None)?, Device::Cpu, None),
        Device::Cuda(number) => {
            if !has_cuda() {
                return Err(Error::NoCuda { path: loaded.path });
            }
            (open(Some(number))?, Device::Cuda(number), None)
        }
        Device::Auto if !has_cuda() => {
            (open(None)?, Device::Cpu, Some(format!("{} has no CUDA provider", loaded.path.display())))
        }
        Device::Auto => match open(Some(0)) {
            Ok(native) => (native, Device::Cuda(0), None),
            Err(error) => (open(None)?, Device::Cpu, Some(error.to_string())),
        },
    };
    let device = DeviceInUse { device, why_not_cuda };
    Ok(Opened { native, device, version: loaded.version })
}

/// An error in one line, without the place in ONNX Runtime's source and the number of the error that it may begin with.
fn plain(text: &str) -> String {
    const MARK: &str = "[ONNXRuntimeError] : ";
    let words = text.rsplit_once(MARK).and_then(|(_, rest)| rest.splitn(3, " : ").nth(2)).unwrap_or(text);
    one_line(words)
}

fn has_cuda() -> bool {
    ep::CUDA::is_available().unwrap_or(false)
}

fn commit(
    loaded: &Loaded,
    bytes: &[u8],
    outside: &[(String, std::sync::Arc<DynValue>)],
    options: &SessionOptions,
    cuda: Option<u32>,
) -> Result<Native, Error> {
    let load = |error: ::ort::Error| Error::Load { runtime: RuntimeName::Ort, reason: plain(&error.to_string()) };
    let mut builder = configured(loaded, options).map_err(load)?;
    for (name, value) in outside {
        builder = builder.with_external_initializer(name, std::sync::Arc::clone(value)).map_err(|error| load(error.into()))?;
    }
    if let Some(device) = cuda {
        let refused = |reason: String| Error::Cuda { device, reason: plain(&reason) };
        let number = i32::try_from(device).map_err(|_| refused("there is no such device".to_string()))?;
        let provider = ep::CUDA::default()
            .with_device_id(number)
            // A search over algorithms by time would take another one from run to run.
            .with_conv_algorithm_search(ep::cuda::ConvAlgorithmSearch::Heuristic)
            // TF32 has 10 bits of mantissa, which is below the tolerance of a comparison in float32.
            .with_tf32(false)
            .build()
            .error_on_failure();
        builder = builder.with_execution_providers([provider]).map_err(|error| refused(error.to_string()))?;
    }
    builder.commit_from_memory(bytes).map_err(load)
}

fn configured(loaded: &Loaded, options: &SessionOptions) -> ::ort::Result<SessionBuilder> {
    // `Level3` is not valid before 1.23; `All` and `Disable` are valid everywhere.
    let level = match options.optimize {
        Optimize::On => GraphOptimizationLevel::All,
        Optimize::Off => GraphOptimizationLevel::Disable,
    };
    let threads = match options.threads {
        // Left to itself ONNX Runtime binds a thread to each core of the machine, which a container does not allow.
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    };
    Ok(Native::builder(&loaded.environment)?
        .with_optimization_level(level)?
        .with_memory_pattern(false)?
        .with_deterministic_compute(true)?
        .with_intra_threads(threads)?
        .with_inter_threads(1)?
        .with_intra_op_spinning(false)?
        .with_inter_op_spinning(false)?
        .with_log_level(log_level())?)
}

/// A model in ONNX Runtime.
pub(crate) struct OrtSession {
    opened: Opened,
}

impl OrtSession {
    pub(crate) fn open(bytes: &[u8], initializers: Vec<(String, Array)>, options: &SessionOptions) -> Result<Self, Error> {
        Ok(Self { opened: open_native(bytes, initializers, options)? })
    }
}

impl Session for OrtSession {
    fn run(&mut self, feeds: &[(String, Array)]) -> Result<Vec<(String, Array)>, Error> {
        let mut outputs = Vec::new();
        self.run_each(feeds, &mut |name, array| outputs.push((name.to_string(), array)))?;
        Ok(outputs)
    }

    fn run_each(&mut self, feeds: &[(String, Array)], take: &mut dyn FnMut(&str, Array)) -> Result<(), Error> {
        let mut inputs: Vec<(&str, SessionInputValue<'_>)> = Vec::with_capacity(feeds.len());
        for (name, array) in feeds {
            if !self.opened.native.inputs().iter().any(|input| input.name() == name) {
                return Err(Error::Name { name: name.clone(), reason: "the model has no such input" });
            }
            if inputs.iter().any(|(given, _)| given == name) {
                return Err(Error::Name { name: name.clone(), reason: "given twice" });
            }
            inputs.push((name, borrowed(name, array)?));
        }
        let outputs = self.opened.native.run(inputs).map_err(|error| run_error(&error))?;
        outputs.iter().try_for_each(|(name, value)| {
            take(name, to_array(name, &value)?);
            Ok(())
        })
    }

    fn version(&self) -> String {
        self.opened.version.clone()
    }

    fn device(&self) -> &DeviceInUse {
        &self.opened.device
    }
}

pub(crate) fn run_error(error: &::ort::Error) -> Error {
    Error::Run { runtime: RuntimeName::Ort, reason: plain(&error.to_string()) }
}

/// The element type of an array in ONNX Runtime's words.
pub(crate) fn element_type(data: &ArrayData) -> TensorElementType {
    match data {
        ArrayData::F32(_) => TensorElementType::Float32,
        ArrayData::F16(_) => TensorElementType::Float16,
        ArrayData::BF16(_) => TensorElementType::Bfloat16,
        ArrayData::F64(_) => TensorElementType::Float64,
        ArrayData::I64(_) => TensorElementType::Int64,
        ArrayData::I32(_) => TensorElementType::Int32,
        ArrayData::U8(_) => TensorElementType::Uint8,
        ArrayData::I8(_) => TensorElementType::Int8,
        ArrayData::Bool(_) => TensorElementType::Bool,
    }
}

fn bools(bytes: &[u8]) -> Vec<bool> {
    bytes.iter().map(|byte| *byte != 0).collect()
}

/// A tensor over an array's own memory (for bool: over a copy).
fn borrowed<'a>(name: &str, array: &'a Array) -> Result<SessionInputValue<'a>, Error> {
    fn view<'a, T>(name: &str, dims: &[usize], data: &'a [T]) -> Result<SessionInputValue<'a>, Error>
    where
        T: PrimitiveTensorElementType + std::fmt::Debug + Clone + 'static,
    {
        check_len(name, dims, data.len())?;
        Ok(TensorRef::from_array_view((dims.to_vec(), data)).map_err(|error| run_error(&error))?.into())
    }
    let dims = &array.dims;
    match &array.data {
        ArrayData::F32(data) => view(name, dims, data),
        ArrayData::F16(data) => view::<half::f16>(name, dims, data.reinterpret_cast()),
        ArrayData::BF16(data) => view::<half::bf16>(name, dims, data.reinterpret_cast()),
        ArrayData::F64(data) => view(name, dims, data),
        ArrayData::I64(data) => view(name, dims, data),
        ArrayData::I32(data) => view(name, dims, data),
        ArrayData::U8(data) => view(name, dims, data),
        ArrayData::I8(data) => view(name, dims, data),
        ArrayData::Bool(data) => {
            let array = Array { dims: dims.clone(), data: ArrayData::Bool(data.clone()) };
            Ok(owned(name, array)?.into())
        }
    }
}

/// A tensor that takes over an array's memory.
pub(crate) fn owned(name: &str, array: Array) -> Result<DynTensor, Error> {
    fn take<T>(name: &str, dims: Vec<usize>, data: Vec<T>) -> Result<DynTensor, Error>
    where
        T: PrimitiveTensorElementType + std::fmt::Debug + Clone + 'static,
    {
        check_len(name, &dims, data.len())?;
        Ok(Tensor::from_array((dims, data)).map_err(|error| run_error(&error))?.upcast())
    }
    let dims = array.dims;
    match array.data {
        ArrayData::F32(data) => take(name, dims, data),
        ArrayData::F16(data) => take::<half::f16>(name, dims, data.reinterpret_into()),
        ArrayData::BF16(data) => take::<half::bf16>(name, dims, data.reinterpret_into()),
        ArrayData::F64(data) => take(name, dims, data),
        ArrayData::I64(data) => take(name, dims, data),
        ArrayData::I32(data) => take(name, dims, data),
        ArrayData::U8(data) => take(name, dims, data),
        ArrayData::I8(data) => take(name, dims, data),
        ArrayData::Bool(data) => take(name, dims, bools(&data)),
    }
}

/// Copies an array into a tensor in the processor's memory that has its type and dims.
pub(crate) fn write_into(tensor: &mut DynTensor, data: &ArrayData) -> Result<(), Error> {
    fn copy<T: PrimitiveTensorElementType + Copy>(tensor: &mut DynTensor, data: &[T]) -> Result<(), Error> {
        let (_, target) = tensor.try_extract_tensor_mut::<T>().map_err(|error| run_error(&error))?;
        target.copy_from_slice(data);
        Ok(())
    }
    match data {
        ArrayData::F32(data) => copy(tensor, data),
        ArrayData::F16(data) => copy::<half::f16>(tensor, data.reinterpret_cast()),
        ArrayData::BF16(data) => copy::<half::bf16>(tensor, data.reinterpret_cast()),
        ArrayData::F64(data) => copy(tensor, data),
        ArrayData::I64(data) => copy(tensor, data),
        ArrayData::I32(data) => copy(tensor, data),
        ArrayData::U8(data) => copy(tensor, data),
        ArrayData::I8(data) => copy(tensor, data),
        ArrayData::Bool(data) => copy(tensor, &bools(data)),
    }
}

/// A tensor's contents, copied.
///
/// Errors: [`Error::Array`] for what is no tensor, or has an element type that vitrim does not read.
pub(crate) fn to_array(name: &str, value: &DynValue) -> Result<Array, Error> {
    fn copy<T: PrimitiveTensorElementType + Clone>(value: &DynValue) -> Result<Vec<T>, Error> {
        Ok(value.try_extract_tensor::<T>().map_err(|error| run_error(&error))?.1.to_vec())
    }
    let other = |found: String| Error::Array { name: name.to_string(), expected: "a tensor of numbers".to_string(), found };
    let dtype = value.dtype();
    let (Some(shape), Some(element)) = (dtype.tensor_shape(), dtype.tensor_type()) else {
        return Err(other(dtype.to_string()));
    };
    let dims = shape.iter().map(|dim| usize::try_from(*dim).map_err(|_| other(dtype.to_string()))).collect::<Result<_, _>>()?;
    let data = match element {
        TensorElementType::Float32 => ArrayData::F32(copy(value)?),
        TensorElementType::Float16 => ArrayData::F16(half::vec::HalfFloatVecExt::reinterpret_into(copy::<half::f16>(value)?)),
        TensorElementType::Bfloat16 => ArrayData::BF16(half::vec::HalfFloatVecExt::reinterpret_into(copy::<half::bf16>(value)?)),
        TensorElementType::Float64 => ArrayData::F64(copy(value)?),
        TensorElementType::Int64 => ArrayData::I64(copy(value)?),
        TensorElementType::Int32 => ArrayData::I32(copy(value)?),
        TensorElementType::Uint8 => ArrayData::U8(copy(value)?),
        TensorElementType::Int8 => ArrayData::I8(copy(value)?),
        TensorElementType::Bool => ArrayData::Bool(copy::<bool>(value)?.into_iter().map(u8::from).collect()),
        _ => return Err(other(dtype.to_string())),
    };
    Ok(Array { dims, data })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_loses_its_place_in_the_source() {
        let text = "/src/bridge.cc:2043 Provider& Get() [ONNXRuntimeError] : 1 : FAIL : Failed to load : x.so";
        assert_eq!(plain(text), "Failed to load : x.so");
        assert_eq!(plain("Invalid input\nname"), "Invalid input name");
    }
}
