//! Arrays as they travel between the data, the engines and the trainer: dimensions and elements in C order.
//!
//! Example: four images `[4, 3, 224, 224]` of f32 hold 602,112 elements; [`Array::concat`] of two such gives `[8, 3, 224, 224]`.
//! Half precision is kept as its bits (`u16`), booleans as 0 and 1 (`u8`).

use half::{bf16, f16};

/// The elements of an [`Array`], in C order.
#[derive(Clone, Debug, PartialEq)]
pub enum ArrayData {
    /// 32-bit floats.
    F32(Vec<f32>),
    /// Bits of IEEE half-precision floats.
    F16(Vec<u16>),
    /// Bits of bfloat16 numbers.
    BF16(Vec<u16>),
    /// 64-bit floats.
    F64(Vec<f64>),
    /// 64-bit integers.
    I64(Vec<i64>),
    /// 32-bit integers.
    I32(Vec<i32>),
    /// Bytes.
    U8(Vec<u8>),
    /// Signed bytes.
    I8(Vec<i8>),
    /// Booleans, each 0 or 1.
    Bool(Vec<u8>),
}

/// What the elements of an [`Array`] are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs, reason = "the names are those of ArrayData")]
pub enum ArrayKind {
    F32,
    F16,
    BF16,
    F64,
    I64,
    I32,
    U8,
    I8,
    Bool,
}

impl ArrayKind {
    /// Its name in messages, as ONNX spells types.
    pub fn name(self) -> &'static str {
        match self {
            ArrayKind::F32 => "float32",
            ArrayKind::F16 => "float16",
            ArrayKind::BF16 => "bfloat16",
            ArrayKind::F64 => "float64",
            ArrayKind::I64 => "int64",
            ArrayKind::I32 => "int32",
            ArrayKind::U8 => "uint8",
            ArrayKind::I8 => "int8",
            ArrayKind::Bool => "bool",
        }
    }

    /// Whether the elements are floating-point numbers.
    pub fn is_float(self) -> bool {
        matches!(self, ArrayKind::F32 | ArrayKind::F16 | ArrayKind::BF16 | ArrayKind::F64)
    }
}

/// Does the same to whichever vector the data holds; the result has the same variant.
macro_rules! map_vec {
    ($data:expr, $v:ident => $body:expr) => {
        match $data {
            ArrayData::F32($v) => ArrayData::F32($body),
            ArrayData::F16($v) => ArrayData::F16($body),
            ArrayData::BF16($v) => ArrayData::BF16($body),
            ArrayData::F64($v) => ArrayData::F64($body),
            ArrayData::I64($v) => ArrayData::I64($body),
            ArrayData::I32($v) => ArrayData::I32($body),
            ArrayData::U8($v) => ArrayData::U8($body),
            ArrayData::I8($v) => ArrayData::I8($body),
            ArrayData::Bool($v) => ArrayData::Bool($body),
        }
    };
}

impl ArrayData {
    /// How many elements there are.
    pub fn len(&self) -> usize {
        match self {
            ArrayData::F32(v) => v.len(),
            ArrayData::F16(v) | ArrayData::BF16(v) => v.len(),
            ArrayData::F64(v) => v.len(),
            ArrayData::I64(v) => v.len(),
            ArrayData::I32(v) => v.len(),
            ArrayData::U8(v) | ArrayData::Bool(v) => v.len(),
            ArrayData::I8(v) => v.len(),
        }
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What the elements are.
    pub fn kind(&self) -> ArrayKind {
        match self {
            ArrayData::F32(_) => ArrayKind::F32,
            ArrayData::F16(_) => ArrayKind::F16,
            ArrayData::BF16(_) => ArrayKind::BF16,
            ArrayData::F64(_) => ArrayKind::F64,
            ArrayData::I64(_) => ArrayKind::I64,
            ArrayData::I32(_) => ArrayKind::I32,
            ArrayData::U8(_) => ArrayKind::U8,
            ArrayData::I8(_) => ArrayKind::I8,
            ArrayData::Bool(_) => ArrayKind::Bool,
        }
    }

    /// A copy of the elements `start .. start + count`, or `None` where they do not all exist.
    pub fn window(&self, start: usize, count: usize) -> Option<ArrayData> {
        let end = start.checked_add(count).filter(|end| *end <= self.len())?;
        Some(map_vec!(self, v => v[start..end].to_vec()))
    }

    /// Appends `other`; `false`, and nothing done, where the kinds differ.
    fn append(&mut self, other: &ArrayData) -> bool {
        match (self, other) {
            (ArrayData::F32(a), ArrayData::F32(b)) => a.extend_from_slice(b),
            (ArrayData::F16(a), ArrayData::F16(b)) | (ArrayData::BF16(a), ArrayData::BF16(b)) => a.extend_from_slice(b),
            (ArrayData::F64(a), ArrayData::F64(b)) => a.extend_from_slice(b),
            (ArrayData::I64(a), ArrayData::I64(b)) => a.extend_from_slice(b),
            (ArrayData::I32(a), ArrayData::I32(b)) => a.extend_from_slice(b),
            (ArrayData::U8(a), ArrayData::U8(b)) | (ArrayData::Bool(a), ArrayData::Bool(b)) => a.extend_from_slice(b),
            (ArrayData::I8(a), ArrayData::I8(b)) => a.extend_from_slice(b),
            _ => return false,
        }
        true
    }

    /// The elements as f32, rounded to nearest where f32 has fewer digits.
    pub fn to_f32(&self) -> Vec<f32> {
        match self {
            ArrayData::F32(v) => v.clone(),
            ArrayData::F16(v) => v.iter().map(|b| f16::from_bits(*b).to_f32()).collect(),
            ArrayData::BF16(v) => v.iter().map(|b| bf16::from_bits(*b).to_f32()).collect(),
            ArrayData::F64(v) => v.iter().map(|x| *x as f32).collect(),
            ArrayData::I64(v) => v.iter().map(|x| *x as f32).collect(),
            ArrayData::I32(v) => v.iter().map(|x| *x as f32).collect(),
            ArrayData::U8(v) | ArrayData::Bool(v) => v.iter().map(|x| f32::from(*x)).collect(),
            ArrayData::I8(v) => v.iter().map(|x| f32::from(*x)).collect(),
        }
    }

    /// The elements as i64, or `None` for floating-point elements.
    pub fn to_i64(&self) -> Option<Vec<i64>> {
        match self {
            ArrayData::I64(v) => Some(v.clone()),
            ArrayData::I32(v) => Some(v.iter().map(|x| i64::from(*x)).collect()),
            ArrayData::U8(v) | ArrayData::Bool(v) => Some(v.iter().map(|x| i64::from(*x)).collect()),
            ArrayData::I8(v) => Some(v.iter().map(|x| i64::from(*x)).collect()),
            ArrayData::F32(_) | ArrayData::F16(_) | ArrayData::BF16(_) | ArrayData::F64(_) => None,
        }
    }

    /// The same numbers as another kind: between floating-point kinds (rounded to nearest) and between integer kinds (only
    /// where every number fits). `None` where a float would become an integer or the other way, or a number does not fit.
    pub fn cast(&self, kind: ArrayKind) -> Option<ArrayData> {
        if self.kind() == kind {
            return Some(self.clone());
        }
        if self.kind().is_float() && kind.is_float() {
            return Some(cast_float(self, kind));
        }
        let wide = self.to_i64()?;
        match kind {
            ArrayKind::I64 => Some(ArrayData::I64(wide)),
            ArrayKind::I32 => wide.iter().map(|x| i32::try_from(*x).ok()).collect::<Option<_>>().map(ArrayData::I32),
            ArrayKind::U8 => wide.iter().map(|x| u8::try_from(*x).ok()).collect::<Option<_>>().map(ArrayData::U8),
            ArrayKind::I8 => wide.iter().map(|x| i8::try_from(*x).ok()).collect::<Option<_>>().map(ArrayData::I8),
            ArrayKind::Bool => {
                let bit = |x: &i64| u8::try_from(*x).ok().filter(|b| *b < 2);
                wide.iter().map(bit).collect::<Option<_>>().map(ArrayData::Bool)
            }
            ArrayKind::F32 | ArrayKind::F16 | ArrayKind::BF16 | ArrayKind::F64 => None,
        }
    }
}

/// From one floating-point kind to another; f64 is rounded once, straight to the target.
fn cast_float(data: &ArrayData, kind: ArrayKind) -> ArrayData {
    let wide: Vec<f64> = match data {
        ArrayData::F64(v) => v.clone(),
        other => other.to_f32().into_iter().map(f64::from).collect(),
    };
    match kind {
        ArrayKind::F16 => ArrayData::F16(wide.iter().map(|x| f16::from_f64(*x).to_bits()).collect()),
        ArrayKind::BF16 => ArrayData::BF16(wide.iter().map(|x| bf16::from_f64(*x).to_bits()).collect()),
        ArrayKind::F32 => ArrayData::F32(wide.iter().map(|x| *x as f32).collect()),
        _ => ArrayData::F64(wide),
    }
}

/// Numbers with dimensions, in C order. Invariant: the product of `dims` is the number of elements ([`Array::new`] checks it).
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    /// The extent of every axis; empty for a scalar.
    pub dims: Vec<usize>,
    /// The elements.
    pub data: ArrayData,
}

impl Array {
    /// An array, or `None` where the number of elements is not the product of `dims`.
    pub fn new(dims: Vec<usize>, data: ArrayData) -> Option<Array> {
        (element_count(&dims)? == data.len()).then_some(Array { dims, data })
    }

    /// How many elements there are.
    pub fn len(&self) -> usize {
        self.data.len()
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.data.is_empty()
    }

    /// The elements as f32 (see [`ArrayData::to_f32`]).
    pub fn as_f32(&self) -> Vec<f32> {
        self.data.to_f32()
    }

    /// Entry `index` of axis 0, without that axis: `[n, ..]` gives `[..]`.
    pub fn row(&self, index: usize) -> Option<Array> {
        let (rows, rest) = self.dims.split_first()?;
        let size = element_count(rest)?;
        (index < *rows).then_some(())?;
        Some(Array { dims: rest.to_vec(), data: self.data.window(index.checked_mul(size)?, size)? })
    }

    /// The arrays one after the other along axis 0; `None` where there is none, or where kinds or other axes differ.
    pub fn concat(parts: &[Array]) -> Option<Array> {
        let (first, rest) = parts.split_first()?;
        let mut all = first.clone();
        let (rows, axes) = all.dims.split_first_mut()?;
        for part in rest {
            let (more, others) = part.dims.split_first()?;
            if others != &*axes || !all.data.append(&part.data) {
                return None;
            }
            *rows = rows.checked_add(*more)?;
        }
        Some(all)
    }

    /// The arrays as entries of a new axis 0: k arrays of `[..]` give `[k, ..]`. `None` as for [`Array::concat`].
    pub fn stack(parts: Vec<Array>) -> Option<Array> {
        let count = parts.len();
        let mut parts = parts.into_iter();
        let mut all = parts.next()?;
        for part in parts {
            if part.dims != all.dims || !all.data.append(&part.data) {
                return None;
            }
        }
        all.dims.insert(0, count);
        Some(all)
    }
}

/// The product of `dims`, or `None` where it does not fit.
pub(crate) fn element_count(dims: &[usize]) -> Option<usize> {
    dims.iter().try_fold(1usize, |n, d| n.checked_mul(*d))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn concat_adds_rows_and_refuses_other_shapes() {
        let a = Array::new(vec![1, 2], ArrayData::I32(vec![1, 2])).unwrap();
        let b = Array::new(vec![2, 2], ArrayData::I32(vec![3, 4, 5, 6])).unwrap();
        let c = Array::concat(&[a.clone(), b]).unwrap();
        assert_eq!((c.dims, c.data), (vec![3, 2], ArrayData::I32(vec![1, 2, 3, 4, 5, 6])));
        let narrow = Array::new(vec![1, 1], ArrayData::I32(vec![9])).unwrap();
        let float = Array::new(vec![1, 2], ArrayData::F32(vec![1.0, 2.0])).unwrap();
        assert_eq!(Array::concat(&[a.clone(), narrow]), None);
        assert_eq!(Array::concat(&[a, float]), None);
        assert_eq!(Array::concat(&[]), None);
    }

    #[test]
    fn casts_keep_numbers_or_refuse() {
        assert_eq!(ArrayData::I64(vec![1, -3]).cast(ArrayKind::I32), Some(ArrayData::I32(vec![1, -3])));
        assert_eq!(ArrayData::I64(vec![1 << 40]).cast(ArrayKind::I32), None);
        assert_eq!(ArrayData::I64(vec![2]).cast(ArrayKind::Bool), None);
        assert_eq!(ArrayData::F32(vec![1.0]).cast(ArrayKind::I32), None);
        assert_eq!(ArrayData::F32(vec![1.5]).cast(ArrayKind::F16), Some(ArrayData::F16(vec![0x3e00])));
        assert_eq!(ArrayData::F16(vec![0x3e00]).to_f32(), vec![1.5]);
    }

    #[test]
    fn rows_are_windows_of_axis_zero() {
        let a = Array::new(vec![2, 3], ArrayData::U8(vec![1, 2, 3, 4, 5, 6])).unwrap();
        assert_eq!(a.row(1).unwrap().data, ArrayData::U8(vec![4, 5, 6]));
        assert_eq!(a.row(2), None);
        assert_eq!(Array::stack(vec![a.row(0).unwrap(), a.row(1).unwrap()]), Some(a));
        assert_eq!(Array::new(vec![usize::MAX, 2], ArrayData::U8(vec![])), None);
    }
}
