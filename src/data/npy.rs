//! The `.npy` format: one array, a header that is a Python literal, then the elements.
//!
//! Example: `{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }` followed by 24 bytes gives `[2, 3]` of f32.
//! Nothing is executed: an object array, which would be a pickle, is refused. Big-endian numbers and Fortran order are converted.
//! Invariant: no more is allocated than the header declares, and the header may declare no more than `budget`.
//!
//! Source: numpy's format description, versions 1.0 to 3.0.

use std::io::Read;

use super::array::{Array, ArrayData, element_count};

/// Why an array cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NpyFault {
    /// The magic bytes are missing.
    #[error("is not a .npy array")]
    Magic,
    /// A format version after 3.0.
    #[error("has .npy version {major}.{minor}, at most 3.0 is known")]
    Version {
        /// Before the point.
        major: u8,
        /// After it.
        minor: u8,
    },
    /// The header is no dictionary with descr, fortran_order and shape.
    #[error("has a damaged header: {cause}")]
    Header {
        /// What is wrong with it.
        cause: &'static str,
    },
    /// Elements that are Python objects.
    #[error("holds Python objects (dtype {descr}), which are never unpickled; save it with a numeric dtype")]
    Object {
        /// The dtype.
        descr: String,
    },
    /// A dtype without a counterpart.
    #[error("has dtype {descr}; allowed are bool, int8 to int64, uint8 to uint64, float16, float32, float64")]
    DType {
        /// The dtype.
        descr: String,
    },
    /// The shape multiplies to more than fits.
    #[error("declares shape {shape:?}, {bytes} bytes, but the limit is {limit}")]
    TooLarge {
        /// The declared shape.
        shape: Vec<usize>,
        /// Its bytes, or "too many".
        bytes: String,
        /// The limit. Unit: bytes.
        limit: u64,
    },
    /// The data ends early.
    #[error("ends before its declared {declared} bytes")]
    Short {
        /// Unit: bytes of elements.
        declared: u64,
    },
    /// The data goes on after the last element.
    #[error("inflates past its declared {declared} bytes")]
    Long {
        /// Unit: bytes of elements.
        declared: u64,
    },
    /// The stream itself is damaged.
    #[error("cannot be inflated: {cause}")]
    Stream {
        /// What the reader said.
        cause: String,
    },
    /// A float is not a number.
    #[error("holds NaN at element {index}")]
    NotANumber {
        /// Its place in C order.
        index: usize,
    },
    /// An unsigned number above the range of int64.
    #[error("holds {value}, which int64 cannot hold")]
    Range {
        /// The number.
        value: u64,
    },
}

/// What a header says.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Header {
    dtype: DType,
    big_endian: bool,
    fortran_order: bool,
    shape: Vec<usize>,
}

/// Element types of numpy that are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DType {
    Bool,
    I8,
    U8,
    I16,
    U16,
    I32,
    U32,
    I64,
    U64,
    F16,
    F32,
    F64,
}

impl DType {
    fn parse(descr: &str) -> Option<(DType, bool)> {
        let (big_endian, name) = match descr.as_bytes().first()? {
            b'>' => (true, &descr[1..]),
            b'<' | b'|' | b'=' => (false, &descr[1..]),
            _ => (false, descr),
        };
        let dtype = match name {
            "b1" | "?" => DType::Bool,
            "i1" => DType::I8,
            "u1" => DType::U8,
            "i2" => DType::I16,
            "u2" => DType::U16,
            "i4" => DType::I32,
            "u4" => DType::U32,
            "i8" => DType::I64,
            "u8" => DType::U64,
            "f2" => DType::F16,
            "f4" => DType::F32,
            "f8" => DType::F64,
            _ => return None,
        };
        Some((dtype, big_endian))
    }

    fn bytes(self) -> usize {
        match self {
            DType::Bool | DType::I8 | DType::U8 => 1,
            DType::I16 | DType::U16 | DType::F16 => 2,
            DType::I32 | DType::U32 | DType::F32 => 4,
            DType::I64 | DType::U64 | DType::F64 => 8,
        }
    }

    /// No elements of the kind that this type becomes, with room for `count`.
    fn reserve(self, count: usize) -> Option<ArrayData> {
        fn room<T>(count: usize) -> Option<Vec<T>> {
            let mut v = Vec::new();
            v.try_reserve_exact(count).ok()?;
            Some(v)
        }
        Some(match self {
            DType::Bool => ArrayData::Bool(room(count)?),
            DType::I8 => ArrayData::I8(room(count)?),
            DType::U8 => ArrayData::U8(room(count)?),
            DType::I16 | DType::U16 | DType::I32 => ArrayData::I32(room(count)?),
            DType::U32 | DType::I64 | DType::U64 => ArrayData::I64(room(count)?),
            DType::F16 => ArrayData::F16(room(count)?),
            DType::F32 => ArrayData::F32(room(count)?),
            DType::F64 => ArrayData::F64(room(count)?),
        })
    }
}

/// A whole array from a stream that must end with it.
///
/// `budget`: bytes of elements that may be allocated. Errors: [`NpyFault`].
pub(crate) fn read(stream: &mut impl Read, budget: u64) -> Result<Array, NpyFault> {
    let header = read_header(stream)?;
    let too_large = |bytes: String| NpyFault::TooLarge { shape: header.shape.clone(), bytes, limit: budget };
    let count = element_count(&header.shape).ok_or_else(|| too_large("too many".into()))?;
    let declared = count.checked_mul(header.dtype.bytes()).ok_or_else(|| too_large("too many".into()))? as u64;
    if declared > budget {
        return Err(too_large(declared.to_string()));
    }
    let mut data = header.dtype.reserve(count).ok_or_else(|| too_large(declared.to_string()))?;
    let mut chunk = vec![0u8; 1 << 16];
    let mut left = declared;
    while left > 0 {
        let part = &mut chunk[..left.min(1 << 16) as usize];
        stream.read_exact(part).map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => NpyFault::Short { declared },
            _ => NpyFault::Stream { cause: e.to_string() },
        })?;
        if header.big_endian {
            part.chunks_exact_mut(header.dtype.bytes()).for_each(<[u8]>::reverse);
        }
        push(header.dtype, part, &mut data)?;
        left -= part.len() as u64;
    }
    // Reading on also lets the archive compare its checksum.
    match stream.read(&mut chunk[..1]) {
        Ok(0) => {}
        Ok(_) => return Err(NpyFault::Long { declared }),
        Err(e) => return Err(NpyFault::Stream { cause: e.to_string() }),
    }
    let data = if header.fortran_order { to_c_order(&data, &header.shape) } else { data };
    match first_nan(&data) {
        Some(index) => Err(NpyFault::NotANumber { index }),
        None => Ok(Array { dims: header.shape, data }),
    }
}

/// Appends little-endian elements.
fn push(dtype: DType, bytes: &[u8], data: &mut ArrayData) -> Result<(), NpyFault> {
    fn words<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; N]> + '_ {
        bytes.as_chunks::<N>().0.iter().copied()
    }
    match (data, dtype) {
        (ArrayData::U8(v), _) => v.extend_from_slice(bytes),
        (ArrayData::Bool(v), _) => v.extend(bytes.iter().map(|b| u8::from(*b != 0))),
        (ArrayData::I8(v), _) => v.extend(bytes.iter().map(|b| b.cast_signed())),
        (ArrayData::I32(v), DType::I16) => v.extend(words(bytes).map(|b| i32::from(i16::from_le_bytes(b)))),
        (ArrayData::I32(v), DType::U16) => v.extend(words(bytes).map(|b| i32::from(u16::from_le_bytes(b)))),
        (ArrayData::I32(v), _) => v.extend(words(bytes).map(i32::from_le_bytes)),
        (ArrayData::I64(v), DType::U32) => v.extend(words(bytes).map(|b| i64::from(u32::from_le_bytes(b)))),
        (ArrayData::I64(v), DType::U64) => {
            for value in words(bytes).map(u64::from_le_bytes) {
                v.push(i64::try_from(value).map_err(|_| NpyFault::Range { value })?);
            }
        }
        (ArrayData::I64(v), _) => v.extend(words(bytes).map(i64::from_le_bytes)),
        (ArrayData::F16(v) | ArrayData::BF16(v), _) => v.extend(words(bytes).map(u16::from_le_bytes)),
        (ArrayData::F32(v), _) => v.extend(words(bytes).map(f32::from_le_bytes)),
        (ArrayData::F64(v), _) => v.extend(words(bytes).map(f64::from_le_bytes)),
    }
    Ok(())
}

/// The index of the first element that is not a number.
fn first_nan(data: &ArrayData) -> Option<usize> {
    match data {
        ArrayData::F32(v) => v.iter().position(|x| x.is_nan()),
        ArrayData::F64(v) => v.iter().position(|x| x.is_nan()),
        ArrayData::F16(v) => v.iter().position(|x| half::f16::from_bits(*x).is_nan()),
        _ => None,
    }
}

/// Elements stored with the first axis fastest, in C order.
fn to_c_order(data: &ArrayData, shape: &[usize]) -> ArrayData {
    fn order<T: Copy>(v: &[T], shape: &[usize]) -> Vec<T> {
        let mut index = vec![0usize; shape.len()];
        let strides: Vec<usize> = shape
            .iter()
            .scan(1, |step, d| {
                let here = *step;
                *step *= d;
                Some(here)
            })
            .collect();
        let mut at = 0;
        let mut out = Vec::with_capacity(v.len());
        while out.len() < v.len() {
            out.push(v[at]);
            for axis in (0..shape.len()).rev() {
                index[axis] += 1;
                at += strides[axis];
                if index[axis] < shape[axis] {
                    break;
                }
                at -= strides[axis] * shape[axis];
                index[axis] = 0;
            }
        }
        out
    }
    match data {
        ArrayData::F32(v) => ArrayData::F32(order(v, shape)),
        ArrayData::F16(v) => ArrayData::F16(order(v, shape)),
        ArrayData::BF16(v) => ArrayData::BF16(order(v, shape)),
        ArrayData::F64(v) => ArrayData::F64(order(v, shape)),
        ArrayData::I64(v) => ArrayData::I64(order(v, shape)),
        ArrayData::I32(v) => ArrayData::I32(order(v, shape)),
        ArrayData::U8(v) => ArrayData::U8(order(v, shape)),
        ArrayData::I8(v) => ArrayData::I8(order(v, shape)),
        ArrayData::Bool(v) => ArrayData::Bool(order(v, shape)),
    }
}

/// Headers are a line; numpy itself refuses to read more than 10,000 characters.
const LONGEST_HEADER: usize = 10_000;
/// numpy knows at most this many axes.
const MOST_AXES: usize = 64;

fn read_header(stream: &mut impl Read) -> Result<Header, NpyFault> {
    let mut exact = |n: usize| {
        let mut bytes = vec![0u8; n];
        stream.read_exact(&mut bytes).map(|()| bytes).map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => NpyFault::Header { cause: "it is cut off" },
            _ => NpyFault::Stream { cause: e.to_string() },
        })
    };
    let start = exact(8).map_err(|e| if matches!(e, NpyFault::Header { .. }) { NpyFault::Magic } else { e })?;
    if start[..6] != *b"\x93NUMPY" {
        return Err(NpyFault::Magic);
    }
    let length = match start[6] {
        1 => exact(2)?.iter().rev().fold(0usize, |n, b| n << 8 | usize::from(*b)),
        2 | 3 => exact(4)?.iter().rev().fold(0usize, |n, b| n << 8 | usize::from(*b)),
        major => return Err(NpyFault::Version { major, minor: start[7] }),
    };
    if length > LONGEST_HEADER {
        return Err(NpyFault::Header { cause: "it is longer than 10,000 characters" });
    }
    let text = String::from_utf8(exact(length)?).map_err(|_| NpyFault::Header { cause: "it is not text" })?;
    parse_header(&text)
}

/// What may stand behind a key.
enum Literal {
    Text(String),
    Bool(bool),
    Tuple(Vec<usize>),
    /// A list: the description of a structured dtype.
    List,
}

fn parse_header(text: &str) -> Result<Header, NpyFault> {
    let broken = |cause| NpyFault::Header { cause };
    let (mut dtype, mut fortran_order, mut shape) = (None, None, None);
    let mut rest = text.trim().strip_prefix('{').ok_or(broken("it is no dictionary"))?.trim_start();
    while !rest.starts_with('}') {
        let (key, after) = quoted(rest).ok_or(broken("a key is no string"))?;
        let after = after.trim_start().strip_prefix(':').ok_or(broken("a key has no value"))?;
        let (value, after) = literal(after.trim_start()).ok_or(broken("a value is no literal"))?;
        match (key, value) {
            ("descr", Literal::Text(descr)) => dtype = Some(known_dtype(&descr)?),
            ("descr", Literal::List) => return Err(NpyFault::DType { descr: "structured".into() }),
            ("fortran_order", Literal::Bool(b)) => fortran_order = Some(b),
            ("shape", Literal::Tuple(dims)) if dims.len() <= MOST_AXES => shape = Some(dims),
            _ => return Err(broken("it has an unexpected key or value")),
        }
        let after = after.trim_start();
        rest = match after.strip_prefix(',') {
            Some(more) => more.trim_start(),
            None if after.starts_with('}') => after,
            None => return Err(broken("a comma is missing")),
        };
    }
    let ((dtype, big_endian), fortran_order, shape) = (
        dtype.ok_or(broken("descr is missing"))?,
        fortran_order.ok_or(broken("fortran_order is missing"))?,
        shape.ok_or(broken("shape is missing"))?,
    );
    Ok(Header { dtype, big_endian, fortran_order, shape })
}

fn known_dtype(descr: &str) -> Result<(DType, bool), NpyFault> {
    let shown: String = descr.chars().take(40).collect();
    if descr.trim_start_matches(['<', '>', '|', '=']).starts_with('O') {
        return Err(NpyFault::Object { descr: shown });
    }
    DType::parse(descr).ok_or(NpyFault::DType { descr: shown })
}

/// A string in either quote, without escapes, and what follows it.
fn quoted(text: &str) -> Option<(&str, &str)> {
    let quote = text.chars().next().filter(|c| matches!(c, '\'' | '"'))?;
    let (inside, rest) = text[1..].split_once(quote)?;
    (!inside.contains('\\')).then_some((inside, rest))
}

fn literal(text: &str) -> Option<(Literal, &str)> {
    if let Some(rest) = text.strip_prefix("True") {
        return Some((Literal::Bool(true), rest));
    }
    if let Some(rest) = text.strip_prefix("False") {
        return Some((Literal::Bool(false), rest));
    }
    if let Some(rest) = text.strip_prefix('[') {
        return Some((Literal::List, rest));
    }
    if let Some(rest) = text.strip_prefix('(') {
        let (inside, rest) = rest.split_once(')')?;
        // Python 2 wrote long integers with an L.
        let numbers = inside.split(',').map(|n| n.trim().trim_end_matches('L')).filter(|n| !n.is_empty());
        let digits = |n: &str| n.bytes().all(|b| b.is_ascii_digit()).then(|| n.parse().ok()).flatten();
        return Some((Literal::Tuple(numbers.map(digits).collect::<Option<_>>()?), rest));
    }
    let (inside, rest) = quoted(text)?;
    Some((Literal::Text(inside.to_string()), rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
        bytes.extend((header.len() as u16).to_le_bytes());
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        bytes
    }

    fn parse(header: &str, data: &[u8]) -> Result<Array, NpyFault> {
        read(&mut file(header, data).as_slice(), 1 << 20)
    }

    #[test]
    fn orders_and_endianness_are_converted() {
        let c = parse("{'descr': '|u1', 'fortran_order': False, 'shape': (2, 3), }\n", &[1, 2, 3, 4, 5, 6]).unwrap();
        let f = parse("{'descr': '|u1', 'fortran_order': True, 'shape': (2, 3), }\n", &[1, 4, 2, 5, 3, 6]).unwrap();
        assert_eq!(c, f);
        let big = parse("{\"shape\": (2L,), \"descr\": \">i4\", \"fortran_order\": False}", &[0, 0, 0, 7, 255, 255, 255, 255]);
        assert_eq!(big.unwrap().data, ArrayData::I32(vec![7, -1]));
        let deep = parse("{'descr': '|u1', 'fortran_order': True, 'shape': (2, 2, 2)}", &[0, 4, 2, 6, 1, 5, 3, 7]).unwrap();
        assert_eq!(deep.data, ArrayData::U8(vec![0, 1, 2, 3, 4, 5, 6, 7]));
        let half = parse("{'descr': '<f2', 'fortran_order': False, 'shape': (1,)}", &[0, 0x3e]).unwrap();
        assert_eq!(half.data, ArrayData::F16(vec![0x3e00]));
    }

    #[test]
    fn bad_headers_and_sizes_are_refused() {
        let head = |descr: &str, shape: &str| format!("{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}");
        let fault = |header: &str, data: &[u8]| parse(header, data).unwrap_err();
        assert!(matches!(fault(&head("'|O'", "(1,)"), &[0; 8]), NpyFault::Object { .. }));
        assert!(matches!(fault(&head("'<c8'", "(1,)"), &[0; 8]), NpyFault::DType { .. }));
        assert!(matches!(fault(&head("[('a', '<f4')]", "(1,)"), &[0; 8]), NpyFault::DType { .. }));
        assert!(matches!(fault(&head("'<f4'", "(1, -1)"), &[0; 8]), NpyFault::Header { .. }));
        assert!(matches!(fault(&head("'<f4'", "(4294967296, 4294967296)"), &[]), NpyFault::TooLarge { .. }));
        assert!(matches!(fault(&head("'<f4'", "(1000000,)"), &[]), NpyFault::TooLarge { .. }));
        assert_eq!(fault(&head("'<f4'", "(2,)"), &[0; 7]), NpyFault::Short { declared: 8 });
        assert_eq!(fault(&head("'<f4'", "(2,)"), &[0; 9]), NpyFault::Long { declared: 8 });
        assert_eq!(fault(&head("'<f4'", "(2,)"), &[0, 0, 0, 0, 0, 0, 192, 127]), NpyFault::NotANumber { index: 1 });
        assert_eq!(fault(&head("'<u8'", "(1,)"), &[255; 8]), NpyFault::Range { value: u64::MAX });
        assert_eq!(read(&mut [0u8; 3].as_slice(), 8).unwrap_err(), NpyFault::Magic);
        assert!(matches!(fault("{'shape': (1,)}", &[]), NpyFault::Header { .. }));
    }

    #[test]
    fn truncated_and_changed_headers_never_panic() {
        let good = file("{'descr': '<f4', 'fortran_order': True, 'shape': (2, 3), }\n", &[0; 24]);
        for end in 0..good.len() {
            assert!(read(&mut &good[..end], 1 << 20).is_err(), "{end}");
        }
        for at in 0..good.len() {
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                if let Ok(array) = read(&mut bad.as_slice(), 1 << 20) {
                    assert_eq!(element_count(&array.dims), Some(array.len()));
                }
            }
        }
    }
}
