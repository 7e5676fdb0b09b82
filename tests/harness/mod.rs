//! What conformance and gradient tests share: an ONNX Runtime session on a graph, arrays, and numbers from a seed.

#![allow(dead_code, reason = "each test binary uses its own part")]

use vitrim::data::array::{Array, ArrayData};
use vitrim::graph::{DType, Graph, Tensor};
use vitrim::runtime::{Error, RuntimeName, Session, SessionOptions, find, open};

/// Whether ONNX Runtime can be used here; says so where not. With VITRIM_ORT_LIB set it must be.
pub(crate) fn has_ort() -> bool {
    if !RuntimeName::Ort.is_built() {
        println!("skipped: built without ONNX Runtime");
        return false;
    }
    match find(&SessionOptions::default().library) {
        Ok(_) => true,
        Err(error) => {
            assert!(std::env::var_os("VITRIM_ORT_LIB").is_none(), "VITRIM_ORT_LIB is set, and: {error}");
            println!("skipped: {error}");
            false
        }
    }
}

/// A session on one thread, so that sums have one order.
pub(crate) fn session(graph: &Graph) -> Result<Box<dyn Session>, String> {
    let bytes = vitrim::onnx::to_bytes(graph).map_err(|e| e.to_string())?;
    let options = SessionOptions { threads: 1, ..SessionOptions::default() };
    open(RuntimeName::Ort, &bytes, &options).map_err(|e: Error| e.to_string())
}

/// The output called `name`.
pub(crate) fn output<'a>(outputs: &'a [(String, Array)], name: &str) -> &'a Array {
    &outputs.iter().find(|(n, _)| n == name).unwrap_or_else(|| panic!("no output '{name}'")).1
}

/// The content of a constant as the engines take it.
pub(crate) fn array_of(tensor: &Tensor) -> Option<Array> {
    let bytes = &tensor.bytes[..];
    let data = match tensor.dtype {
        DType::F32 => ArrayData::F32(tensor.to_f32s()?),
        DType::F64 => ArrayData::F64(bytes.as_chunks::<8>().0.iter().map(|c| f64::from_le_bytes(*c)).collect()),
        DType::F16 => ArrayData::F16(bytes.as_chunks::<2>().0.iter().map(|c| u16::from_le_bytes(*c)).collect()),
        DType::BF16 => ArrayData::BF16(bytes.as_chunks::<2>().0.iter().map(|c| u16::from_le_bytes(*c)).collect()),
        DType::I64 => ArrayData::I64(tensor.to_i64s()?),
        DType::I32 => ArrayData::I32(tensor.to_i64s()?.into_iter().map(|v| v as i32).collect()),
        DType::U8 => ArrayData::U8(bytes.to_vec()),
        DType::I8 => ArrayData::I8(tensor.to_i64s()?.into_iter().map(|v| v as i8).collect()),
        DType::Bool => ArrayData::Bool(bytes.to_vec()),
        _ => return None,
    };
    Array::new(tensor.dims.clone(), data)
}

/// The element type of an array.
pub(crate) fn dtype_of(array: &Array) -> DType {
    match array.data {
        ArrayData::F32(_) => DType::F32,
        ArrayData::F16(_) => DType::F16,
        ArrayData::BF16(_) => DType::BF16,
        ArrayData::F64(_) => DType::F64,
        ArrayData::I64(_) => DType::I64,
        ArrayData::I32(_) => DType::I32,
        ArrayData::U8(_) => DType::U8,
        ArrayData::I8(_) => DType::I8,
        ArrayData::Bool(_) => DType::Bool,
    }
}

/// A float32 array.
pub(crate) fn f32s(dims: &[usize], values: Vec<f32>) -> Array {
    Array::new(dims.to_vec(), ArrayData::F32(values)).expect("as many values as the dims say")
}

/// Numbers from a seed: splitmix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// The next 64 bits.
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// The next number between `low` and `high`.
    pub(crate) fn uniform(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// `count` numbers between `low` and `high`.
    pub(crate) fn f32s(&mut self, count: usize, low: f64, high: f64) -> Vec<f32> {
        (0..count).map(|_| self.uniform(low, high) as f32).collect()
    }
}

/// Largest difference over the largest value of `expected`; infinite where one of them is no number.
pub(crate) fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let scale = expected.iter().fold(0f64, |m, v| m.max(f64::from(v.abs())));
    let worst = found.iter().zip(expected).fold(0f64, |m, (a, b)| {
        let d = (f64::from(*a) - f64::from(*b)).abs();
        if d.is_nan() { f64::INFINITY } else { m.max(d) }
    });
    if worst == 0.0 { 0.0 } else { worst / scale }
}
