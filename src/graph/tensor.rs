//! Constant tensors: an element type, dimensions, and shared little-endian bytes.
//!
//! Example: a weight `[48, 144]` of f32 holds 27,648 bytes; [`Tensor::take`] on axis 1 with 96 indices gives `[48, 96]`.
//! Cloning a tensor shares its bytes; bytes of a mapped file stay mapped, and what is cut of them is gathered when it is looked at.

use super::elements::Elements;
use bytes::Bytes;

/// Element types of ONNX, `TensorProto.DataType`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs, reason = "the names say it")]
pub enum DType {
    F32,
    U8,
    I8,
    U16,
    I16,
    I32,
    I64,
    String,
    Bool,
    F16,
    F64,
    U32,
    U64,
    C64,
    C128,
    BF16,
    F8E4M3FN,
    F8E4M3FNUZ,
    F8E5M2,
    F8E5M2FNUZ,
    U4,
    I4,
    F4E2M1,
    F8E8M0,
    U2,
    I2,
}

/// All element types in the order of their ONNX numbers, which start at 1.
const ALL: [DType; 26] = {
    use DType::*;
    [
        F32, U8, I8, U16, I16, I32, I64, String, Bool, F16, F64, U32, U64, C64, C128, BF16, F8E4M3FN, F8E4M3FNUZ, F8E5M2,
        F8E5M2FNUZ, U4, I4, F4E2M1, F8E8M0, U2, I2,
    ]
};

impl DType {
    /// The type with this number in `TensorProto.DataType`, if there is one.
    pub fn from_onnx(number: i32) -> Option<Self> {
        usize::try_from(number).ok()?.checked_sub(1).and_then(|i| ALL.get(i)).copied()
    }

    /// Its number in `TensorProto.DataType`.
    pub fn to_onnx(self) -> i32 {
        ALL.iter().position(|d| *d == self).expect("ALL lists every type") as i32 + 1
    }

    /// Unit: bits of one element; 0 for strings.
    pub fn bits(self) -> usize {
        use DType::*;
        match self {
            String => 0,
            U2 | I2 => 2,
            U4 | I4 | F4E2M1 => 4,
            U8 | I8 | Bool | F8E4M3FN | F8E4M3FNUZ | F8E5M2 | F8E5M2FNUZ | F8E8M0 => 8,
            U16 | I16 | F16 | BF16 => 16,
            F32 | I32 | U32 => 32,
            F64 | I64 | U64 | C64 => 64,
            C128 => 128,
        }
    }

    /// Floating point of 16, 32 or 64 bits: what a network computes in.
    pub fn is_float(self) -> bool {
        matches!(self, DType::F32 | DType::F64 | DType::F16 | DType::BF16)
    }

    /// Integers of 8 or fewer bits, in which quantized weights are stored.
    pub fn is_small_int(self) -> bool {
        matches!(self, DType::I8 | DType::U8 | DType::I4 | DType::U4 | DType::I2 | DType::U2)
    }

    /// The name as users know it: `float32`, `int64`.
    pub fn name(self) -> &'static str {
        use DType::*;
        match self {
            F32 => "float32",
            U8 => "uint8",
            I8 => "int8",
            U16 => "uint16",
            I16 => "int16",
            I32 => "int32",
            I64 => "int64",
            String => "string",
            Bool => "bool",
            F16 => "float16",
            F64 => "float64",
            U32 => "uint32",
            U64 => "uint64",
            C64 => "complex64",
            C128 => "complex128",
            BF16 => "bfloat16",
            F8E4M3FN => "float8e4m3fn",
            F8E4M3FNUZ => "float8e4m3fnuz",
            F8E5M2 => "float8e5m2",
            F8E5M2FNUZ => "float8e5m2fnuz",
            U4 => "uint4",
            I4 => "int4",
            F4E2M1 => "float4e2m1",
            F8E8M0 => "float8e8m0",
            U2 => "uint2",
            I2 => "int2",
        }
    }
}

/// How a tensor was stored in its file, so that an untouched one is written back the same way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Storage {
    /// `raw_data`.
    #[default]
    Raw,
    /// The typed repeated field of its element type.
    Typed,
    /// A file beside the model.
    External,
}

/// A constant tensor. Elements are little-endian, row-major; 4- and 2-bit elements are packed, low bits first.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Element type.
    pub dtype: DType,
    /// Shape; a scalar has none.
    pub dims: Vec<usize>,
    /// The elements.
    pub bytes: Elements,
    /// The elements of a string tensor, whose `bytes` are empty.
    pub strings: Vec<Bytes>,
    /// How it was stored.
    pub storage: Storage,
    /// What else the file says of it (name in an attribute, doc string, metadata), encoded; only `onnx/` reads it.
    pub extra: Bytes,
}

impl Tensor {
    /// A tensor of plain elements, to be stored raw.
    pub fn new(dtype: DType, dims: Vec<usize>, bytes: Bytes) -> Self {
        Self { dtype, dims, bytes: bytes.into(), strings: Vec::new(), storage: Storage::Raw, extra: Bytes::new() }
    }

    /// A float32 tensor.
    pub fn f32(dims: &[usize], values: &[f32]) -> Self {
        Self::new(DType::F32, dims.to_vec(), values.iter().flat_map(|v| v.to_le_bytes()).collect())
    }

    /// An int64 tensor of rank 1.
    pub fn i64s(values: &[i64]) -> Self {
        Self::new(DType::I64, vec![values.len()], values.iter().flat_map(|v| v.to_le_bytes()).collect())
    }

    /// An int64 scalar.
    pub fn i64_scalar(value: i64) -> Self {
        Self { dims: Vec::new(), ..Self::i64s(&[value]) }
    }

    /// A bool tensor of rank 1.
    pub fn bools(values: &[bool]) -> Self {
        Self::new(DType::Bool, vec![values.len()], values.iter().map(|v| u8::from(*v)).collect())
    }

    /// Number of elements.
    pub fn element_count(&self) -> usize {
        self.dims.iter().product()
    }

    /// Elements as integers, for integer and bool types; `None` for others.
    pub fn to_i64s(&self) -> Option<Vec<i64>> {
        fn all<const N: usize>(bytes: &[u8], f: impl Fn([u8; N]) -> i64) -> Vec<i64> {
            bytes.as_chunks::<N>().0.iter().map(|c| f(*c)).collect()
        }
        let b = &self.bytes[..];
        Some(match self.dtype {
            DType::I64 => all(b, i64::from_le_bytes),
            DType::I32 => all(b, |c| i32::from_le_bytes(c).into()),
            DType::U32 => all(b, |c| u32::from_le_bytes(c).into()),
            DType::I16 => all(b, |c| i16::from_le_bytes(c).into()),
            DType::U16 => all(b, |c| u16::from_le_bytes(c).into()),
            DType::I8 => all(b, |c| i8::from_le_bytes(c).into()),
            DType::U8 | DType::Bool => all(b, |c: [u8; 1]| c[0].into()),
            DType::U4 | DType::I4 | DType::U2 | DType::I2 => self.packed_ints(),
            _ => return None,
        })
    }

    /// Elements of 4 or 2 bits, as many as there are.
    fn packed_ints(&self) -> Vec<i64> {
        let (bits, signed) = (self.dtype.bits(), matches!(self.dtype, DType::I4 | DType::I2));
        let (per_byte, range) = (8 / bits, 1i64 << bits);
        let unsigned =
            self.bytes.iter().flat_map(|byte| (0..per_byte).map(move |n| i64::from(*byte >> (bits * n)) & (range - 1)));
        let ints = unsigned.map(|v| if signed && v >= range / 2 { v - range } else { v });
        ints.take(self.element_count()).collect()
    }

    /// Elements as f32, for floating-point types; `None` for others.
    pub fn to_f32s(&self) -> Option<Vec<f32>> {
        let b = &self.bytes[..];
        Some(match self.dtype {
            DType::F32 => b.as_chunks::<4>().0.iter().map(|c| f32::from_le_bytes(*c)).collect(),
            DType::F64 => b.as_chunks::<8>().0.iter().map(|c| f64::from_le_bytes(*c) as f32).collect(),
            DType::F16 => b.as_chunks::<2>().0.iter().map(|c| half::f16::from_le_bytes(*c).to_f32()).collect(),
            DType::BF16 => b.as_chunks::<2>().0.iter().map(|c| half::bf16::from_le_bytes(*c).to_f32()).collect(),
            _ => return None,
        })
    }

    /// Whether all elements are numbers: neither NaN nor infinite. Types that are not floating-point have no others.
    pub fn is_finite(&self) -> bool {
        // All ones in the exponent. Blocks without a way out inside are compared many elements at a time.
        fn none<const N: usize, T: Copy>(bytes: &[u8], bits: impl Fn([u8; N]) -> T, is_special: impl Fn(T) -> bool) -> bool {
            bytes.as_chunks::<N>().0.chunks(1024).all(|block| !block.iter().fold(false, |any, c| any | is_special(bits(*c))))
        }
        let b = &self.bytes[..];
        match self.dtype {
            DType::F32 => none(b, u32::from_le_bytes, |n| n & 0x7f80_0000 == 0x7f80_0000),
            DType::F64 => none(b, u64::from_le_bytes, |n| n & 0x7ff0_0000_0000_0000 == 0x7ff0_0000_0000_0000),
            DType::F16 => none(b, u16::from_le_bytes, |n| n & 0x7c00 == 0x7c00),
            DType::BF16 => none(b, u16::from_le_bytes, |n| n & 0x7f80 == 0x7f80),
            _ => true,
        }
    }

    /// The same shape with other float values, stored in this tensor's floating-point type.
    pub fn with_f32s(&self, values: &[f32]) -> Self {
        let bytes: Bytes = match self.dtype {
            DType::F64 => values.iter().flat_map(|v| f64::from(*v).to_le_bytes()).collect(),
            DType::F16 => values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect(),
            DType::BF16 => values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect(),
            _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        };
        Self { bytes: bytes.into(), ..self.clone() }
    }

    /// The elements at `indices` along `axis`, in that order.
    ///
    /// Shape: `dims` with `dims[axis]` replaced by `indices.len()`. Works on every element type; indices must lie inside.
    pub fn take(&self, axis: usize, indices: &[usize]) -> Self {
        let mut dims = self.dims.clone();
        let old = dims[axis];
        dims[axis] = indices.len();
        let inner: usize = dims[axis + 1..].iter().product();
        let outer: usize = dims[..axis].iter().product();
        let mut out = self.clone();
        out.dims = dims;
        if self.dtype == DType::String {
            out.strings = positions(outer, old, inner, indices).map(|i| self.strings[i].clone()).collect();
        } else if self.bytes.is_empty() {
            // A tensor whose elements were left out (`Graph::hollow`): only its shape counts.
        } else if self.dtype.bits().is_multiple_of(8) {
            out.bytes = self.bytes.take(&self.dims, self.dtype.bits() / 8, axis, indices);
        } else {
            out.bytes = take_packed(&self.bytes, self.dtype.bits(), positions(outer, old, inner, indices)).into();
        }
        out
    }
}

/// Flat positions of the elements that `take` keeps.
fn positions(outer: usize, old: usize, inner: usize, indices: &[usize]) -> impl Iterator<Item = usize> {
    (0..outer).flat_map(move |o| indices.iter().flat_map(move |i| (0..inner).map(move |k| (o * old + i) * inner + k)))
}

fn take_packed(bytes: &[u8], bits: usize, positions: impl Iterator<Item = usize>) -> Vec<u8> {
    let per_byte = 8 / bits;
    let mask = (1u8 << bits) - 1;
    let mut out = Vec::new();
    for (n, p) in positions.enumerate() {
        let element = (bytes[p / per_byte] >> (bits * (p % per_byte))) & mask;
        if n.is_multiple_of(per_byte) {
            out.push(0);
        }
        *out.last_mut().expect("pushed above") |= element << (bits * (n % per_byte));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn take_keeps_rows_and_columns() {
        let t = Tensor::f32(&[2, 3], &[0., 1., 2., 3., 4., 5.]);
        assert_eq!(t.take(1, &[2, 0]).to_f32s(), Some(vec![2., 0., 5., 3.]));
        assert_eq!(t.take(0, &[1]).to_f32s(), Some(vec![3., 4., 5.]));
    }

    #[test]
    fn take_unpacks_four_bit_elements() {
        // Elements 1, 2, 3 | 4, 5, 6, two to a byte.
        let t = Tensor::new(DType::U4, vec![2, 3], Bytes::from_static(&[0x21, 0x43, 0x65]));
        let cut = t.take(1, &[0, 2]);
        assert_eq!((cut.dims, &cut.bytes[..]), (vec![2, 2], &[0x31, 0x64][..]));
    }

    #[test]
    fn packed_elements_are_integers() {
        let of = |dtype| Tensor::new(dtype, vec![3], Bytes::from_static(&[0x81, 0x0f])).to_i64s();
        assert_eq!((of(DType::U4), of(DType::I4)), (Some(vec![1, 8, 15]), Some(vec![1, -8, -1])));
        let quarter = Tensor::new(DType::I2, vec![4], Bytes::from_static(&[0b11_10_01_00]));
        assert_eq!(quarter.to_i64s(), Some(vec![0, 1, -2, -1]));
    }

    #[test]
    fn nan_and_infinity_are_seen_in_every_type() {
        for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
            let like = Tensor::new(dtype, vec![3], Bytes::new());
            assert!(like.with_f32s(&[0.0, -3e4, 1e-7]).is_finite());
            for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                assert!(!like.with_f32s(&[1.0, 2.0, odd]).is_finite(), "{} {odd}", dtype.name());
            }
        }
        assert!(Tensor::i64s(&[-1]).is_finite());
    }

    #[test]
    fn numbers_of_types_are_those_of_onnx() {
        for (d, n) in
            [(DType::F32, 1), (DType::I64, 7), (DType::Bool, 9), (DType::BF16, 16), (DType::I4, 22), (DType::F4E2M1, 23)]
        {
            assert_eq!((d.to_onnx(), DType::from_onnx(n)), (n, Some(d)));
        }
        assert_eq!((DType::from_onnx(0), DType::from_onnx(77)), (None, None));
    }
}
