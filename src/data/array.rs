//! A dense array of one element type, row-major.

/// A dense array: what goes into a model and what comes out of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Array {
    /// Sizes, outermost first; empty for a scalar.
    pub dims: Vec<usize>,
    /// The elements, row-major.
    pub data: ArrayData,
}

/// The elements of an [`Array`].
#[derive(Debug, Clone, PartialEq)]
pub enum ArrayData {
    /// float32
    F32(Vec<f32>),
    /// float16, as raw bits
    F16(Vec<u16>),
    /// bfloat16, as raw bits
    BF16(Vec<u16>),
    /// float64
    F64(Vec<f64>),
    /// int64
    I64(Vec<i64>),
    /// int32
    I32(Vec<i32>),
    /// uint8
    U8(Vec<u8>),
    /// int8
    I8(Vec<i8>),
    /// bool, one byte each, 0 or 1
    Bool(Vec<u8>),
}
