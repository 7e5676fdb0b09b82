//! `ValueInfoProto` to [`Declared`] and back.

use onnx_proto::{Dim, Dimension, TensorShapeProto, TensorType, TypeProto, TypeValue, ValueInfoProto};
use prost::Message;

use super::error::Cause;
use crate::graph::{DType, Declared, DeclaredDim, Tensor};

/// What a file declares of an input or output; the whole record stays in `extra`.
pub(super) fn read(info: &ValueInfoProto) -> Declared {
    let tensor = tensor_type(info);
    let dims = tensor.and_then(|t| t.shape.as_ref()).map(|s| s.dim.iter().map(read_dim).collect());
    let dtype = tensor.and_then(|t| t.elem_type).and_then(DType::from_onnx);
    Declared { dtype, dims, extra: info.encode_to_vec().into() }
}

fn tensor_type(info: &ValueInfoProto) -> Option<&TensorType> {
    match info.r#type.as_ref()?.value.as_ref()? {
        TypeValue::TensorType(t) => Some(t),
        TypeValue::SequenceType(_)
        | TypeValue::MapType(_)
        | TypeValue::OptionalType(_)
        | TypeValue::SparseTensorType(_)
        | TypeValue::OpaqueType(_) => None,
    }
}

fn read_dim(dim: &Dimension) -> DeclaredDim {
    match &dim.value {
        Some(Dim::DimValue(v)) => DeclaredDim::Size(*v),
        Some(Dim::DimParam(s)) => DeclaredDim::Symbol(s.clone()),
        None => DeclaredDim::Symbol(String::new()),
    }
}

/// Encodes what is declared of the value `name`: the file's own record where nothing changed.
pub(super) fn write(declared: &Declared, name: &str) -> Result<ValueInfoProto, Cause> {
    let broken = |_| Cause::Internal { what: "a declared input or output does not decode" };
    let mut info = ValueInfoProto::decode(declared.extra.clone()).map_err(broken)?;
    info.name = Some(name.to_string());
    let before = read(&info);
    if (before.dtype, &before.dims) != (declared.dtype, &declared.dims) {
        set(&mut info, declared.dtype, declared.dims.as_deref());
    }
    Ok(info)
}

/// Makes the record of an initializer that is also listed as an input agree with what it holds now.
pub(super) fn follow(info: &mut ValueInfoProto, tensor: &Tensor) {
    let dims: Vec<_> = tensor.dims.iter().map(|d| DeclaredDim::Size(i64::try_from(*d).unwrap_or(i64::MAX))).collect();
    let before = read(info);
    if before.dims.as_ref().is_some_and(|b| *b != dims) || before.dtype != Some(tensor.dtype) {
        set(info, Some(tensor.dtype), Some(&dims));
    }
}

fn set(info: &mut ValueInfoProto, dtype: Option<DType>, dims: Option<&[DeclaredDim]>) {
    let old = tensor_type(info).and_then(|t| t.shape.as_ref()).map(|s| s.dim.clone()).unwrap_or_default();
    let shape = dims.map(|dims| TensorShapeProto {
        dim: dims
            .iter()
            .enumerate()
            .map(|(i, d)| Dimension {
                value: match d {
                    DeclaredDim::Size(v) => Some(Dim::DimValue(*v)),
                    DeclaredDim::Symbol(s) if s.is_empty() => None,
                    DeclaredDim::Symbol(s) => Some(Dim::DimParam(s.clone())),
                },
                // Denotations speak of axes, so they stay as long as there are as many.
                denotation: old.get(i).filter(|_| old.len() == dims.len()).and_then(|o| o.denotation.clone()),
            })
            .collect(),
    });
    let tensor = TensorType { elem_type: dtype.map(DType::to_onnx), shape };
    info.r#type.get_or_insert_with(TypeProto::default).value = Some(TypeValue::TensorType(tensor));
}
