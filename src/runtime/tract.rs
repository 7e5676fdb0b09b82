//! tract: an engine written independently of ONNX Runtime and linked in, so that a result can be proven without the latter.
//!
//! A plan is made for the dims of the feeds and kept for the next run with the same dims. Example: a model with input
//! \[batch, 3, 224, 224\] run with \[3, 3, 224, 224\] is planned for batch 3. Where tract fails in planning, a plan is made
//! without its rewrites, or with the symbol, which is slower; either makes it run some exports that it otherwise refuses.
//!
//! Invariant: tract's errors and panics both end as [`Error::Load`] or [`Error::Run`], in one line.

use std::any::Any;
use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, Once};

use half::slice::HalfBitsSliceExt;
use tract_onnx::prelude::{
    Datum, DatumType, Framework, InferenceFact, InferenceModel, InferenceModelExt, IntoRunnable, TValue, TVec, Tensor,
    TractResult, TypedRunnableModel,
};

use crate::data::array::{Array, ArrayData};
use crate::runtime::error::one_line;
use crate::runtime::{Device, DeviceInUse, Error, Optimize, RuntimeName, Session, SessionOptions, check_len};

/// As in Cargo.toml; tract does not say it at run time. A test compares it with Cargo.lock.
const VERSION: &str = "0.23.9";

/// Plans kept at a time. Verification needs two (batch 1 and 3), and each holds repacked copies of the weights.
const PLAN_COUNT: usize = 4;

struct Plan {
    /// Of the inputs in the model's order.
    dims: Vec<Vec<usize>>,
    runnable: Arc<TypedRunnableModel>,
}

/// A model in tract.
pub(crate) struct TractSession {
    model: InferenceModel,
    inputs: Vec<String>,
    outputs: Vec<String>,
    optimize: Optimize,
    plans: Vec<Plan>,
    device: DeviceInUse,
}

impl TractSession {
    pub(crate) fn open(bytes: &[u8], options: &SessionOptions) -> Result<Self, Error> {
        if matches!(options.device, Device::Cuda(_)) {
            return Err(Error::Unsupported { runtime: RuntimeName::Tract, what: "run on CUDA" });
        }
        let (model, inputs, outputs) = guarded(load_error, || parse(bytes))?;
        let why_not_cuda = (options.device == Device::Auto).then(|| "tract runs on the processor".to_string());
        let device = DeviceInUse { device: Device::Cpu, why_not_cuda };
        let mut session = Self { model, inputs, outputs, optimize: options.optimize, plans: Vec::new(), device };
        // A model that tract cannot plan at all should be refused here and not in the first run. Whether a model with
        // symbolic dims can be planned shows only with the dims of the feeds.
        if let Some(dims) = session.fixed_dims() {
            session.plan(&dims)?;
        }
        Ok(session)
    }

    /// The dims of all inputs, if none is symbolic.
    fn fixed_dims(&self) -> Option<Vec<Vec<usize>>> {
        let outlets = self.model.input_outlets().ok()?;
        outlets
            .iter()
            .map(|outlet| Some(self.model.outlet_fact(*outlet).ok()?.shape.as_concrete_finite().ok()??.to_vec()))
            .collect()
    }

    /// The plan for these dims, made if there is none.
    fn plan(&mut self, dims: &[Vec<usize>]) -> Result<Arc<TypedRunnableModel>, Error> {
        if let Some(plan) = self.plans.iter().find(|plan| plan.dims == dims) {
            return Ok(Arc::clone(&plan.runnable));
        }
        let runnable = self.make(dims)?;
        if self.plans.len() >= PLAN_COUNT {
            self.plans.remove(0);
        }
        self.plans.push(Plan { dims: dims.to_vec(), runnable: Arc::clone(&runnable) });
        Ok(runnable)
    }

    /// A plan with fixed dims and tract's rewrites; where tract fails in that, less of both. The numbers are the same, only
    /// slower. The error is that of the first try.
    fn make(&self, dims: &[Vec<usize>]) -> Result<Arc<TypedRunnableModel>, Error> {
        let is_symbolic = self.fixed_dims().is_none();
        let mut first_error = None;
        for (dims, optimize) in
            [(Some(dims), Optimize::On), (Some(dims), Optimize::Off), (None, Optimize::On), (None, Optimize::Off)]
        {
            let is_wanted = optimize == Optimize::Off || self.optimize == Optimize::On;
            if is_wanted && (dims.is_some() || is_symbolic) {
                match guarded(load_error, || make_plan(&self.model, dims, optimize)) {
                    Ok(runnable) => return Ok(runnable),
                    Err(error) => first_error = first_error.or(Some(error)),
                }
            }
        }
        Err(first_error.unwrap_or_else(|| load_error("there is no way to plan it".to_string())))
    }

    /// The feeds in the model's order, each once.
    fn ordered<'a>(&self, feeds: &'a [(String, Array)]) -> Result<Vec<(&'a str, &'a Array)>, Error> {
        for (index, (name, _)) in feeds.iter().enumerate() {
            let reason = if !self.inputs.contains(name) {
                "the model has no such input"
            } else if feeds.iter().take(index).any(|(other, _)| other == name) {
                "given twice"
            } else {
                continue;
            };
            return Err(Error::Name { name: name.clone(), reason });
        }
        let feed = |input: &String| {
            let found = feeds.iter().find(|(name, _)| name == input).map(|(name, array)| (name.as_str(), array));
            found.ok_or_else(|| Error::Name { name: input.clone(), reason: "no value given for this input" })
        };
        self.inputs.iter().map(feed).collect()
    }
}

impl Session for TractSession {
    fn run(&mut self, feeds: &[(String, Array)]) -> Result<Vec<(String, Array)>, Error> {
        let ordered = self.ordered(feeds)?;
        let mut tensors: TVec<TValue> = TVec::new();
        for (name, array) in &ordered {
            tensors.push(to_tensor(name, array)?.into());
        }
        let dims: Vec<Vec<usize>> = ordered.iter().map(|(_, array)| array.dims.clone()).collect();
        let runnable = self.plan(&dims)?;
        let results = guarded(run_error, || runnable.run(tensors))?;
        self.outputs.iter().zip(results).map(|(name, value)| Ok((name.clone(), to_array(name, &value)?))).collect()
    }

    fn version(&self) -> String {
        VERSION.to_string()
    }

    fn device(&self) -> &DeviceInUse {
        &self.device
    }
}

fn load_error(reason: String) -> Error {
    Error::Load { runtime: RuntimeName::Tract, reason }
}

fn run_error(reason: String) -> Error {
    Error::Run { runtime: RuntimeName::Tract, reason }
}

/// The model, and the names of its inputs and outputs in its order.
fn parse(mut bytes: &[u8]) -> TractResult<(InferenceModel, Vec<String>, Vec<String>)> {
    let onnx = tract_onnx::onnx().with_ignore_output_shapes(true).with_ignore_value_info(true);
    let model = onnx.model_for_read(&mut bytes)?;
    let inputs = model.input_outlets()?.iter().map(|outlet| model.node(outlet.node).name.clone()).collect();
    let name = |outlet: &tract_onnx::prelude::OutletId| match model.outlet_label(*outlet) {
        Some(label) => label.to_string(),
        None => model.node(outlet.node).name.clone(),
    };
    let outputs = model.output_outlets()?.iter().map(name).collect();
    Ok((model, inputs, outputs))
}

/// With dims, those of the inputs are fixed; without, the symbols stay.
fn make_plan(model: &InferenceModel, dims: Option<&[Vec<usize>]>, optimize: Optimize) -> TractResult<Arc<TypedRunnableModel>> {
    let mut model = model.clone();
    for (index, dims) in dims.unwrap_or_default().iter().enumerate() {
        let mut fact = InferenceFact::shape(dims.as_slice());
        fact.datum_type = model.input_fact(index)?.datum_type;
        model.set_input_fact(index, fact)?;
    }
    let typed = model.into_typed()?;
    match optimize {
        Optimize::On => typed.into_optimized()?.into_runnable(),
        Optimize::Off => typed.into_runnable(),
    }
}

fn to_tensor(name: &str, array: &Array) -> Result<Tensor, Error> {
    fn of<T: Datum + Copy>(name: &str, dims: &[usize], data: &[T]) -> Result<Tensor, Error> {
        check_len(name, dims, data.len())?;
        guarded(run_error, || Tensor::from_shape(dims, data))
    }
    let dims = &array.dims;
    match &array.data {
        ArrayData::F32(data) => of(name, dims, data),
        ArrayData::F16(data) => of::<half::f16>(name, dims, data.reinterpret_cast()),
        ArrayData::BF16(_) => Err(Error::Unsupported { runtime: RuntimeName::Tract, what: "bfloat16" }),
        ArrayData::F64(data) => of(name, dims, data),
        ArrayData::I64(data) => of(name, dims, data),
        ArrayData::I32(data) => of(name, dims, data),
        ArrayData::U8(data) => of(name, dims, data),
        ArrayData::I8(data) => of(name, dims, data),
        ArrayData::Bool(data) => of(name, dims, &data.iter().map(|byte| *byte != 0).collect::<Vec<bool>>()),
    }
}

fn to_array(name: &str, value: &Tensor) -> Result<Array, Error> {
    fn copy<T: Datum + Clone>(value: &Tensor) -> Result<Vec<T>, Error> {
        guarded(run_error, || Ok(value.to_plain_array_view::<T>()?.iter().cloned().collect()))
    }
    let data = match value.datum_type().unquantized() {
        DatumType::F32 => ArrayData::F32(copy(value)?),
        DatumType::F16 => ArrayData::F16(copy::<half::f16>(value)?.into_iter().map(half::f16::to_bits).collect()),
        DatumType::F64 => ArrayData::F64(copy(value)?),
        DatumType::I64 => ArrayData::I64(copy(value)?),
        DatumType::I32 => ArrayData::I32(copy(value)?),
        DatumType::U8 => ArrayData::U8(copy(value)?),
        DatumType::I8 => ArrayData::I8(copy(value)?),
        DatumType::Bool => ArrayData::Bool(copy::<bool>(value)?.into_iter().map(u8::from).collect()),
        // What ONNX calls int64 is a symbolic size inside tract where it was computed from shapes.
        DatumType::TDim => {
            ArrayData::I64(guarded(run_error, || Ok(value.cast_to::<i64>()?.into_owned())).and_then(|v| copy(&v))?)
        }
        other => {
            let expected = "a tensor of numbers".to_string();
            return Err(Error::Array { name: name.to_string(), expected, found: format!("{other:?}") });
        }
    };
    Ok(Array { dims: value.shape().to_vec(), data })
}

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Runs a piece of tract: errors and panics become the error that `make` gives, in one line.
fn guarded<T>(make: fn(String) -> Error, work: impl FnOnce() -> TractResult<T>) -> Result<T, Error> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        // A panic that is caught below is a refusal, not a crash, so its report is not printed. Others are, as before.
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !QUIET.get() {
                before(info);
            }
        }));
    });
    let was_quiet = QUIET.replace(true);
    let result = panic::catch_unwind(AssertUnwindSafe(work));
    QUIET.set(was_quiet);
    match result {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(make(one_line(&format!("{error:#}")))),
        Err(payload) => Err(make(one_line(&format!("it panicked: {}", panic_text(payload.as_ref()))))),
    }
}

fn panic_text(payload: &dyn Any) -> &str {
    match (payload.downcast_ref::<String>(), payload.downcast_ref::<&str>()) {
        (Some(text), _) => text,
        (None, Some(text)) => text,
        (None, None) => "without a message",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_the_one_in_the_lock_file() {
        let lock = include_str!("../../Cargo.lock");
        assert!(lock.replace('\r', "").contains(&format!("name = \"tract-onnx\"\nversion = \"{VERSION}\"\n")));
    }

    #[test]
    fn a_panic_inside_becomes_an_error() {
        let result: Result<(), Error> = guarded(load_error, || panic!("index out of bounds:\n the len is 1"));
        assert_eq!(result.unwrap_err().to_string(), "tract could not load: it panicked: index out of bounds: the len is 1");
    }
}
