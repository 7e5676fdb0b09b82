//! `TensorProto` to [`Tensor`] and back.
//!
//! Example: `dims [2]`, `data_type FLOAT16`, `int32_data [15360, 16384]` becomes two little-endian halves, 4 bytes, and goes back
//! into `int32_data` because [`Storage::Typed`] says so. Sizes are compared with checked arithmetic before anything is allocated.
//!
//! Source: `onnx.proto`, message `TensorProto`.

use bytes::Bytes;
use onnx_proto::{StringStringEntryProto, TensorProto, data_location};
use prost::Message;

use super::error::{Cause, shown};
use super::external::DataFiles;
use crate::graph::{DType, Elements, Storage, Tensor};
use std::collections::BTreeMap;

/// The typed field that holds elements of a type.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Field {
    Float,
    Int32,
    String,
    Int64,
    Double,
    Uint64,
}

impl Field {
    fn of(dtype: DType) -> Self {
        use DType::*;
        match dtype {
            F32 | C64 => Field::Float,
            F64 | C128 => Field::Double,
            I64 => Field::Int64,
            U32 | U64 => Field::Uint64,
            String => Field::String,
            U8 | I8 | U16 | I16 | I32 | Bool | F16 | BF16 | F8E4M3FN | F8E4M3FNUZ | F8E5M2 | F8E5M2FNUZ | U4 | I4 | F4E2M1
            | F8E8M0 | U2 | I2 => Field::Int32,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Field::Float => "float_data",
            Field::Int32 => "int32_data",
            Field::String => "string_data",
            Field::Int64 => "int64_data",
            Field::Double => "double_data",
            Field::Uint64 => "uint64_data",
        }
    }

    fn len(self, proto: &TensorProto) -> usize {
        match self {
            Field::Float => proto.float_data.len(),
            Field::Int32 => proto.int32_data.len(),
            Field::String => proto.string_data.len(),
            Field::Int64 => proto.int64_data.len(),
            Field::Double => proto.double_data.len(),
            Field::Uint64 => proto.uint64_data.len(),
        }
    }
}

const FIELDS: [Field; 6] = [Field::Float, Field::Int32, Field::String, Field::Int64, Field::Double, Field::Uint64];

/// Shape, type and size of a tensor, checked.
struct Size {
    dtype: DType,
    dims: Vec<usize>,
    elements: usize,
    bytes: usize,
}

/// Decodes a tensor; `what` names it in messages. Its name stays in `extra` where `keep_name` says so (attributes).
pub(super) fn read(mut proto: TensorProto, what: &str, keep_name: bool, files: &mut DataFiles) -> Result<Tensor, Cause> {
    let tensor = || what.to_string();
    if proto.segment.is_some() {
        return Err(Cause::Segment { tensor: tensor() });
    }
    let size = size(&proto, what)?;
    let external = proto.data_location == Some(data_location::EXTERNAL);
    let mut present = Vec::new();
    if external {
        present.push("external_data");
    }
    if proto.raw_data.is_some() {
        present.push("raw_data");
    }
    let typed = FIELDS.into_iter().filter(|f| f.len(&proto) > 0);
    present.extend(typed.clone().map(Field::name));
    if let [first, second, ..] = present[..] {
        return Err(Cause::TwoDataFields { tensor: tensor(), first, second });
    }
    let no_bytes = |held: usize| too_few(what, &size, held);
    let mut out = Tensor::new(size.dtype, size.dims.clone(), Bytes::new());
    if let Some(field) = typed.clone().next() {
        if field != Field::of(size.dtype) {
            return Err(Cause::WrongDataField { tensor: tensor(), dtype: size.dtype.name(), field: field.name() });
        }
        out.storage = Storage::Typed;
        if field == Field::String {
            out.strings = std::mem::take(&mut proto.string_data);
            check_elements(what, &size, field, out.strings.len(), size.elements)?;
        } else {
            out.bytes = typed_bytes(&mut proto, what, &size, field)?.into();
        }
    } else if size.dtype == DType::String {
        if !present.is_empty() && present != ["raw_data"] || proto.raw_data.as_ref().is_some_and(|r| !r.is_empty()) {
            return Err(Cause::WrongDataField { tensor: tensor(), dtype: "string", field: present[0] });
        }
        check_elements(what, &size, Field::String, 0, size.elements)?;
    } else if external {
        out.storage = Storage::External;
        out.bytes = files.bytes(what, &proto.external_data, size.bytes)?.into();
        proto.external_data.clear();
        proto.data_location = None;
    } else if let Some(raw) = &mut proto.raw_data {
        // An empty field stays in `extra`, so that it is written again.
        out.bytes = std::mem::take(raw).into();
        if !out.bytes.is_empty() {
            proto.raw_data = None;
        }
    }
    if size.dtype != DType::String && out.bytes.len() != size.bytes {
        return Err(no_bytes(out.bytes.len()));
    }
    proto.dims.clear();
    proto.data_type = None;
    if !keep_name {
        proto.name = None;
    }
    out.extra = proto.encode_to_vec().into();
    Ok(out)
}

fn size(proto: &TensorProto, what: &str) -> Result<Size, Cause> {
    let number = proto.data_type.unwrap_or(0);
    let dtype = DType::from_onnx(number).ok_or_else(|| Cause::TensorType { tensor: what.to_string(), number })?;
    let overflow = || Cause::ShapeOverflow { tensor: what.to_string() };
    let mut dims = Vec::with_capacity(proto.dims.len());
    for dim in &proto.dims {
        if *dim < 0 {
            return Err(Cause::NegativeDim { tensor: what.to_string(), dim: *dim });
        }
        dims.push(usize::try_from(*dim).map_err(|_| overflow())?);
    }
    // Zeros count as ones here, so that no partial product that others may form can overflow either.
    let bits = dims.iter().try_fold(dtype.bits().max(8), |n, d| n.checked_mul((*d).max(1))).ok_or_else(overflow)?;
    if isize::try_from(bits).is_err() {
        return Err(overflow());
    }
    let elements: usize = dims.iter().product();
    Ok(Size { dtype, dims, elements, bytes: (elements * dtype.bits()).div_ceil(8) })
}

fn too_few(what: &str, size: &Size, held: usize) -> Cause {
    Cause::TensorSize {
        tensor: what.to_string(),
        held: u64::try_from(held).unwrap_or(u64::MAX),
        dims: shown_dims(&size.dims),
        dtype: size.dtype.name(),
        need: size.bytes,
    }
}

fn shown_dims(dims: &[usize]) -> String {
    let list: Vec<String> = dims.iter().take(8).map(ToString::to_string).collect();
    format!("[{}{}]", list.join(","), if dims.len() > 8 { ",.." } else { "" })
}

fn check_elements(what: &str, size: &Size, field: Field, held: usize, need: usize) -> Result<(), Cause> {
    if held == need {
        return Ok(());
    }
    let (tensor, dims) = (what.to_string(), shown_dims(&size.dims));
    Err(Cause::TensorElements { tensor, field: field.name(), held, dims, dtype: size.dtype.name(), need })
}

/// The elements of a typed field as little-endian bytes.
fn typed_bytes(proto: &mut TensorProto, what: &str, size: &Size, field: Field) -> Result<Bytes, Cause> {
    let need = match size.dtype {
        DType::C64 | DType::C128 => size.elements.saturating_mul(2),
        d if d.bits() < 8 => size.bytes,
        _ => size.elements,
    };
    check_elements(what, size, field, field.len(proto), need)?;
    let out_of_range =
        |value: String| Cause::OutOfRange { tensor: what.to_string(), value, field: field.name(), dtype: size.dtype.name() };
    Ok(match field {
        Field::Float => std::mem::take(&mut proto.float_data).iter().flat_map(|v| v.to_le_bytes()).collect(),
        Field::Double => std::mem::take(&mut proto.double_data).iter().flat_map(|v| v.to_le_bytes()).collect(),
        Field::Int64 => std::mem::take(&mut proto.int64_data).iter().flat_map(|v| v.to_le_bytes()).collect(),
        Field::Uint64 if size.dtype == DType::U64 => {
            std::mem::take(&mut proto.uint64_data).iter().flat_map(|v| v.to_le_bytes()).collect()
        }
        Field::Uint64 => {
            let mut out = Vec::with_capacity(size.bytes);
            for v in std::mem::take(&mut proto.uint64_data) {
                out.extend(u32::try_from(v).map_err(|_| out_of_range(v.to_string()))?.to_le_bytes());
            }
            out.into()
        }
        Field::Int32 => {
            let mut out = Vec::with_capacity(size.bytes);
            for v in std::mem::take(&mut proto.int32_data) {
                push_int(&mut out, v, size.dtype).ok_or_else(|| out_of_range(v.to_string()))?;
            }
            out.into()
        }
        Field::String => Bytes::new(),
    })
}

/// Appends one entry of `int32_data`; `None` where the type has no such value. Types under 8 bits stand packed in bytes.
fn push_int(out: &mut Vec<u8>, value: i32, dtype: DType) -> Option<()> {
    match (dtype, dtype.bits()) {
        (DType::I32, _) => out.extend(value.to_le_bytes()),
        (DType::I16, _) => out.extend(i16::try_from(value).ok()?.to_le_bytes()),
        (DType::I8, _) => out.extend(i8::try_from(value).ok()?.to_le_bytes()),
        (DType::Bool, _) => out.push(u8::try_from(value).ok().filter(|v| *v < 2)?),
        (_, 16) => out.extend(u16::try_from(value).ok()?.to_le_bytes()),
        _ => out.push(u8::try_from(value).ok()?),
    }
    Some(())
}

/// What is written with a model and does not stand in its message.
#[derive(Debug)]
pub(super) struct Aside {
    /// The data file.
    pub(super) file: DataFile,
    /// Elements that the file of the model holds in the end.
    pub(super) late: Late,
}

impl Aside {
    /// Nothing yet. `location` is the name of the data file beside the model; raw tensors go there too where `takes_raw` says so, not only
    /// those that came from a data file.
    pub(super) fn new(location: String, takes_raw: bool) -> Self {
        Self { file: DataFile { location, takes_raw, parts: Vec::new(), len: 0 }, late: Late::default() }
    }
}

/// Elements that are gathered when they are written, each with a byte that stands for it in the message.
#[derive(Debug, Default)]
pub(super) struct Late(BTreeMap<usize, (Bytes, Elements)>);

impl Late {
    /// Bytes to put into the message. They are held here, so that no others have their address.
    fn stand_in(&mut self, elements: &Elements) -> Bytes {
        let own = Bytes::from(vec![0]);
        self.0.insert(own.as_ptr().addr(), (own.clone(), elements.clone()));
        own
    }

    /// What bytes in a message stand for: often themselves.
    pub(super) fn elements(&self, raw: Bytes) -> Elements {
        self.0.get(&raw.as_ptr().addr()).map_or_else(|| raw.into(), |(_, elements)| elements.clone())
    }
}

/// The file beside the model that holds bytes of tensors.
#[derive(Debug)]
pub(super) struct DataFile {
    /// Its name beside the model.
    location: String,
    takes_raw: bool,
    /// What it holds, by ascending offset.
    pub(super) parts: Vec<(u64, Elements)>,
    /// Unit: bytes.
    pub(super) len: u64,
}

impl DataFile {
    /// Appends `bytes` and returns their offset. Large ones start on a page, as readers that map files like it.
    fn push(&mut self, bytes: &Elements) -> u64 {
        let align = if bytes.len() < 4096 { 64 } else { 4096 };
        let offset = self.len.next_multiple_of(align);
        self.len = offset + u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        self.parts.push((offset, bytes.clone()));
        offset
    }
}

/// Encodes a tensor; under `name`, or under the one that its `extra` keeps.
pub(super) fn write(tensor: &Tensor, name: Option<&str>, aside: Option<&mut Aside>) -> Result<TensorProto, Cause> {
    let mut proto = TensorProto::decode(tensor.extra.clone())
        .map_err(|_| Cause::Internal { what: "the rest of a tensor does not decode" })?;
    if let Some(name) = name {
        proto.name = Some(name.to_string());
    }
    proto.data_type = Some(tensor.dtype.to_onnx());
    proto.dims = tensor.dims.iter().map(|d| i64::try_from(*d).unwrap_or(i64::MAX)).collect();
    let kept_empty_raw = proto.raw_data.take().is_some();
    if tensor.dtype == DType::String {
        proto.string_data = tensor.strings.clone();
        if kept_empty_raw && tensor.strings.is_empty() {
            proto.raw_data = Some(Bytes::new());
        }
        return Ok(proto);
    }
    let goes_out = |f: &DataFile| tensor.storage == Storage::External || f.takes_raw && tensor.bytes.len() >= 1024;
    match aside {
        Some(aside) if goes_out(&aside.file) => write_external(tensor, &mut proto, &mut aside.file),
        _ if tensor.storage == Storage::Typed => write_typed(tensor, &mut proto),
        Some(aside) if tensor.bytes.is_late() => proto.raw_data = Some(aside.late.stand_in(&tensor.bytes)),
        _ if !tensor.bytes.is_empty() || kept_empty_raw => proto.raw_data = Some(tensor.bytes.to_bytes()),
        _ => {}
    }
    Ok(proto)
}

fn write_external(tensor: &Tensor, proto: &mut TensorProto, file: &mut DataFile) {
    let entry = |key: &str, value: String| StringStringEntryProto { key: Some(key.to_string()), value: Some(value) };
    let offset = file.push(&tensor.bytes);
    proto.external_data = vec![
        entry("location", file.location.clone()),
        entry("offset", offset.to_string()),
        entry("length", tensor.bytes.len().to_string()),
    ];
    proto.data_location = Some(data_location::EXTERNAL);
}

fn write_typed(tensor: &Tensor, proto: &mut TensorProto) {
    fn all<const N: usize, T>(bytes: &[u8], f: impl Fn([u8; N]) -> T) -> Vec<T> {
        bytes.as_chunks::<N>().0.iter().map(|c| f(*c)).collect()
    }
    let b = &tensor.bytes[..];
    match Field::of(tensor.dtype) {
        Field::Float => proto.float_data = all(b, f32::from_le_bytes),
        Field::Double => proto.double_data = all(b, f64::from_le_bytes),
        Field::Int64 => proto.int64_data = all(b, i64::from_le_bytes),
        Field::Uint64 if tensor.dtype == DType::U64 => proto.uint64_data = all(b, u64::from_le_bytes),
        Field::Uint64 => proto.uint64_data = all(b, |c| u32::from_le_bytes(c).into()),
        Field::Int32 => {
            proto.int32_data = match (tensor.dtype, tensor.dtype.bits()) {
                (DType::I32, _) => all(b, i32::from_le_bytes),
                (DType::I16, _) => all(b, |c| i16::from_le_bytes(c).into()),
                (DType::I8, _) => all(b, |c| i8::from_le_bytes(c).into()),
                (_, 16) => all(b, |c| u16::from_le_bytes(c).into()),
                _ => all(b, |[c]| c.into()),
            }
        }
        Field::String => {}
    }
}

/// How messages name an initializer.
pub(super) fn initializer_label(name: &str) -> String {
    format!("initializer {}", shown(name))
}
