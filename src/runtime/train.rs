//! A session whose weights stay where it runs: state in named tensors between steps, only batches and losses cross.
//!
//! Example: a graph with inputs `param.w` \[D\], `lr` \[\] and outputs `next.param.w` \[D\], `loss` \[\] is opened with the
//! state {input: param.w, output: next.param.w}; each [`BoundSession::step`] then reads and overwrites one buffer.
//!
//! Invariant: a state tensor has one buffer for its whole life, bound as the input and as the output. The graph must
//! therefore read a state's old value completely before it writes the new one: a weight's update has to wait for all
//! reads of that weight (elementwise updates at the end of the graph, ordered behind the backward pass).

use crate::data::array::Array;
#[cfg(not(feature = "ort"))]
use crate::runtime::RuntimeName;
use crate::runtime::{DeviceInUse, Error, SessionOptions};

/// A tensor that lives in the session.
#[derive(Debug, Clone)]
pub struct StateSpec {
    /// The input that reads it.
    pub input: String,
    /// The output that overwrites it; None for what is read only.
    pub output: Option<String>,
    /// Its first value, which also fixes type and dims.
    pub initial: Array,
}

/// A training graph in ONNX Runtime with its state.
pub struct BoundSession {
    #[cfg(feature = "ort")]
    bound: native::Bound,
    #[cfg(not(feature = "ort"))]
    never: std::convert::Infallible,
}

#[cfg(feature = "ort")]
impl BoundSession {
    /// Opens the graph, puts the state where it runs, and names the outputs that [`BoundSession::step`] gives back.
    ///
    /// Errors: those of [`open`](crate::runtime::open); [`Error::Name`] for a name that the graph does not have or that
    /// is given twice.
    pub fn new(model_bytes: &[u8], options: &SessionOptions, state: Vec<StateSpec>, fetch: &[String]) -> Result<Self, Error> {
        Ok(Self { bound: native::Bound::new(model_bytes, options, state, fetch)? })
    }

    /// Gives an input that is not state its value for the steps from now on. The dims may differ from step to step.
    ///
    /// Errors: [`Error::Name`], [`Error::Array`].
    pub fn set_feed(&mut self, name: &str, array: &Array) -> Result<(), Error> {
        self.bound.set_feed(name, array)
    }

    /// Runs the graph once: the state is overwritten, the fetched outputs are given in the order they were named in.
    ///
    /// Errors: [`Error::Run`], also where an input has no value yet. After an error the state may be half overwritten.
    pub fn step(&mut self) -> Result<Vec<(String, Array)>, Error> {
        self.bound.step()
    }

    /// A state's current value.
    ///
    /// Errors: [`Error::Name`]; [`Error::Run`] where the copy from the device fails.
    pub fn read_state(&self, input: &str) -> Result<Array, Error> {
        self.bound.read_state(input)
    }

    /// Overwrites a state's value; type and dims must be those of its first value.
    ///
    /// Errors: [`Error::Name`], [`Error::Array`]; [`Error::Run`] where the copy to the device fails.
    pub fn write_state(&mut self, input: &str, array: &Array) -> Result<(), Error> {
        self.bound.write_state(input, array)
    }

    /// Where it runs.
    pub fn device(&self) -> &DeviceInUse {
        self.bound.device()
    }

    /// The engine's version, such as "1.24.4".
    pub fn version(&self) -> String {
        self.bound.version()
    }
}

/// Without ONNX Runtime there can be no such session; the signatures stay, so that callers compile.
#[cfg(not(feature = "ort"))]
#[allow(missing_docs, reason = "documented where the feature is on")]
impl BoundSession {
    pub fn new(_model_bytes: &[u8], _options: &SessionOptions, _state: Vec<StateSpec>, _fetch: &[String]) -> Result<Self, Error> {
        Err(Error::NotBuilt { runtime: RuntimeName::Ort })
    }

    pub fn set_feed(&mut self, _name: &str, _array: &Array) -> Result<(), Error> {
        match self.never {}
    }

    pub fn step(&mut self) -> Result<Vec<(String, Array)>, Error> {
        match self.never {}
    }

    pub fn read_state(&self, _input: &str) -> Result<Array, Error> {
        match self.never {}
    }

    pub fn write_state(&mut self, _input: &str, _array: &Array) -> Result<(), Error> {
        match self.never {}
    }

    pub fn device(&self) -> &DeviceInUse {
        match self.never {}
    }

    pub fn version(&self) -> String {
        match self.never {}
    }
}

#[cfg(feature = "ort")]
mod native {
    use ort::memory::{AllocationDevice, Allocator, AllocatorType, MemoryInfo, MemoryType};
    use ort::session::IoBinding;
    use ort::value::{DynTensor, Outlet};

    use crate::data::array::{Array, ArrayData};
    use crate::runtime::ort::{Opened, element_type, open_native, owned, run_error, to_array, write_into};
    use crate::runtime::{Device, DeviceInUse, Error, RuntimeName, SessionOptions, StateSpec, check_len};

    struct Held {
        input: String,
        tensor: DynTensor,
    }

    pub(super) struct Bound {
        // Dropped before the session, in this order.
        binding: IoBinding,
        states: Vec<Held>,
        feeds: Vec<Held>,
        fetch: Vec<String>,
        host: MemoryInfo<'static>,
        opened: Opened,
    }

    impl Bound {
        pub(super) fn new(
            bytes: &[u8],
            options: &SessionOptions,
            state: Vec<StateSpec>,
            fetch: &[String],
        ) -> Result<Self, Error> {
            let opened = open_native(bytes, Vec::new(), options)?;
            check_names(&opened, &state, fetch)?;
            if opened.device.device != Device::Cpu && !copies_to_devices(&opened.version) {
                return Err(Error::Unsupported { runtime: RuntimeName::Ort, what: "training on CUDA before version 1.23" });
            }
            let host = memory(Device::Cpu)?;
            let binding = opened.native.create_binding().map_err(|error| run_error(&error))?;
            let mut bound = Self { binding, states: Vec::new(), feeds: Vec::new(), fetch: fetch.to_vec(), host, opened };
            for spec in state {
                bound.add_state(spec)?;
            }
            Ok(bound)
        }

        fn add_state(&mut self, spec: StateSpec) -> Result<(), Error> {
            let StateSpec { input, output, initial } = spec;
            check_len(&input, &initial.dims, array_len(&initial.data))?;
            // Only a tensor that ONNX Runtime allocated may be bound as an output.
            let tensor = match self.opened.device.device {
                Device::Cuda(_) => {
                    let info = memory(self.opened.device.device)?;
                    let allocator = Allocator::new(&self.opened.native, info).map_err(|error| run_error(&error))?;
                    DynTensor::new(&allocator, element_type(&initial.data), initial.dims.clone())
                }
                Device::Cpu | Device::Auto => {
                    DynTensor::new(&Allocator::default(), element_type(&initial.data), initial.dims.clone())
                }
            };
            let mut tensor = tensor.map_err(|error| run_error(&error))?;
            put(&input, &mut tensor, &initial)?;
            self.binding.bind_input(input.as_str(), &tensor).map_err(|error| run_error(&error))?;
            if let Some(output) = output {
                self.binding.bind_output(output, &mut tensor).map_err(|error| run_error(&error))?;
            }
            self.states.push(Held { input, tensor });
            Ok(())
        }

        pub(super) fn set_feed(&mut self, name: &str, array: &Array) -> Result<(), Error> {
            check_len(name, &array.dims, array_len(&array.data))?;
            let held = self.feeds.iter().position(|feed| feed.input == name);
            if let Some(feed) = held.and_then(|index| self.feeds.get_mut(index)) {
                // On the processor the bound tensor is read in place. To a device it was copied when it was bound.
                if self.opened.device.device == Device::Cpu && has_form(&feed.tensor, array) {
                    return write_into(&mut feed.tensor, &array.data);
                }
            } else {
                find_outlet(self.opened.native.inputs(), name, "the graph has no such input")?;
                if self.states.iter().any(|state| state.input == name) {
                    return Err(Error::Name { name: name.to_string(), reason: "is state, not a feed" });
                }
            }
            let tensor = owned(name, array.clone())?;
            self.binding.bind_input(name, &tensor).map_err(|error| run_error(&error))?;
            let new = Held { input: name.to_string(), tensor };
            match held.and_then(|index| self.feeds.get_mut(index)) {
                Some(feed) => *feed = new,
                None => self.feeds.push(new),
            }
            Ok(())
        }

        pub(super) fn step(&mut self) -> Result<Vec<(String, Array)>, Error> {
            // A bound output keeps the buffer of the step before, whose dims need not be those of this one.
            for name in &self.fetch {
                self.binding.bind_output_to_device(name.as_str(), &self.host).map_err(|error| run_error(&error))?;
            }
            let outputs = self.opened.native.run_binding(&self.binding).map_err(|error| run_error(&error))?;
            let mut fetched = Vec::with_capacity(self.fetch.len());
            for name in &self.fetch {
                let missing = || Error::Name { name: name.clone(), reason: "the run did not give this output" };
                fetched.push((name.clone(), to_array(name, outputs.get(name).ok_or_else(missing)?)?));
            }
            Ok(fetched)
        }

        pub(super) fn read_state(&self, input: &str) -> Result<Array, Error> {
            let state = self.states.iter().find(|state| state.input == input).ok_or_else(|| no_state(input))?;
            if state.tensor.memory_info().is_cpu_accessible() {
                return to_array(input, &state.tensor.view().into_dyn());
            }
            let copy = state.tensor.to(AllocationDevice::CPU, 0).map_err(|error| run_error(&error))?;
            to_array(input, &copy.into_dyn())
        }

        pub(super) fn write_state(&mut self, input: &str, array: &Array) -> Result<(), Error> {
            check_len(input, &array.dims, array_len(&array.data))?;
            let state = self.states.iter_mut().find(|state| state.input == input).ok_or_else(|| no_state(input))?;
            put(input, &mut state.tensor, array)
        }

        pub(super) fn device(&self) -> &DeviceInUse {
            &self.opened.device
        }

        pub(super) fn version(&self) -> String {
            self.opened.version.clone()
        }
    }

    /// The `ort` crate copies between devices with a session whose optimization level exists from 1.23 on.
    fn copies_to_devices(version: &str) -> bool {
        let minor = version.split('.').nth(1).and_then(|minor| minor.parse::<u32>().ok());
        minor.is_some_and(|minor| minor >= 23)
    }

    fn no_state(name: &str) -> Error {
        Error::Name { name: name.to_string(), reason: "is not state" }
    }

    /// Every name once, and every name in the graph.
    fn check_names(opened: &Opened, state: &[StateSpec], fetch: &[String]) -> Result<(), Error> {
        let mut outputs: Vec<&str> = fetch.iter().map(String::as_str).collect();
        let mut inputs = Vec::new();
        for spec in state {
            inputs.push(spec.input.as_str());
            outputs.extend(spec.output.as_deref());
        }
        for (names, outlets, missing) in [
            (&inputs, opened.native.inputs(), "the graph has no such input"),
            (&outputs, opened.native.outputs(), "the graph has no such output"),
        ] {
            for name in names.iter() {
                find_outlet(outlets, name, missing)?;
            }
            let twice = names.iter().enumerate().find(|(index, name)| names.iter().take(*index).any(|other| other == *name));
            if let Some((_, name)) = twice {
                return Err(Error::Name { name: name.to_string(), reason: "given twice" });
            }
        }
        Ok(())
    }

    fn find_outlet(outlets: &[Outlet], name: &str, missing: &'static str) -> Result<(), Error> {
        match outlets.iter().any(|outlet| outlet.name() == name) {
            true => Ok(()),
            false => Err(Error::Name { name: name.to_string(), reason: missing }),
        }
    }

    fn memory(device: Device) -> Result<MemoryInfo<'static>, Error> {
        let (kind, number) = match device {
            Device::Cuda(number) => (AllocationDevice::CUDA, i32::try_from(number).unwrap_or(i32::MAX)),
            Device::Cpu | Device::Auto => (AllocationDevice::CPU, 0),
        };
        MemoryInfo::new(kind, number, AllocatorType::Device, MemoryType::Default).map_err(|error| run_error(&error))
    }

    /// Copies an array into a state's own buffer, on the device if it is there.
    fn put(name: &str, tensor: &mut DynTensor, array: &Array) -> Result<(), Error> {
        if !has_form(tensor, array) {
            let expected = format!("{} {:?}", tensor.data_type(), tensor.shape());
            let found = format!("{} {:?}", element_type(&array.data), array.dims);
            return Err(Error::Array { name: name.to_string(), expected, found });
        }
        if tensor.memory_info().is_cpu_accessible() {
            return write_into(tensor, &array.data);
        }
        owned(name, array.clone())?.copy_into(tensor).map_err(|error| run_error(&error))
    }

    fn has_form(tensor: &DynTensor, array: &Array) -> bool {
        let dims = tensor.shape().iter().map(|dim| usize::try_from(*dim).ok());
        *tensor.data_type() == element_type(&array.data) && dims.eq(array.dims.iter().map(|dim| Some(*dim)))
    }

    fn array_len(data: &ArrayData) -> usize {
        match data {
            ArrayData::F32(data) => data.len(),
            ArrayData::F16(data) | ArrayData::BF16(data) => data.len(),
            ArrayData::F64(data) => data.len(),
            ArrayData::I64(data) => data.len(),
            ArrayData::I32(data) => data.len(),
            ArrayData::U8(data) | ArrayData::Bool(data) => data.len(),
            ArrayData::I8(data) => data.len(),
        }
    }
}
