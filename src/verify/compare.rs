//! One output of two models: how far apart, how far apart they may be, and whether the same class wins.
//!
//! Example: logits `[3, 10]` with max|b| = 8 may differ by 8e-4 in float32; a row whose winner changes fails where the old winner led
//! by more than that. Invariant: NaN and infinity fail, also where both sides have them at the same place.

use crate::data::array::{Array, ArrayData, ArrayKind};
use crate::eval::argmax;

/// How one output compares with its reference.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    /// max|a - b|; `None` where it is no number (NaN or infinity in either, or other dims).
    pub max_abs: Option<f64>,
    /// What `max_abs` may be: the relative tolerance times max|b|.
    pub tolerance: f64,
    /// Whether the greatest entry of every row is the same, flips within the tolerance aside; `None` where rows are no logits.
    pub argmax_agree: Option<bool>,
    /// Whether all of it holds.
    pub pass: bool,
    /// Why not.
    pub reason: Option<String>,
}

impl Difference {
    /// A comparison that could not be made.
    pub fn impossible(reason: String) -> Self {
        Self { max_abs: None, tolerance: 0.0, argmax_agree: None, pass: false, reason: Some(reason) }
    }
}

/// The elements as f64; exact for all kinds but int64 beyond 2^53.
fn numbers(array: &Array) -> Vec<f64> {
    match &array.data {
        ArrayData::F64(v) => v.clone(),
        ArrayData::I64(v) => v.iter().map(|x| *x as f64).collect(),
        ArrayData::I32(v) => v.iter().map(|x| f64::from(*x)).collect(),
        other => other.to_f32().into_iter().map(f64::from).collect(),
    }
}

/// Whether every element is a number; integers always are.
pub fn is_finite(array: &Array) -> bool {
    !array.data.kind().is_float() || numbers(array).iter().all(|x| x.is_finite())
}

fn described(kind: ArrayKind, dims: &[usize]) -> String {
    format!("{} {dims:?}", kind.name())
}

/// Compares `found` with `reference`. `relative` is the tolerance in units of the reference's largest magnitude.
pub fn difference(found: &Array, reference: &Array, relative: f64) -> Difference {
    let (a_kind, b_kind) = (found.data.kind(), reference.data.kind());
    if found.dims != reference.dims || a_kind != b_kind {
        let (a, b) = (described(a_kind, &found.dims), described(b_kind, &reference.dims));
        return Difference::impossible(format!("expected {b}, found {a}"));
    }
    let (a, b) = (numbers(found), numbers(reference));
    let tolerance = relative * b.iter().filter(|x| x.is_finite()).fold(0.0f64, |m, x| m.max(x.abs()));
    for (side, values) in [("the result", &a), ("the reference", &b)] {
        let bad = values.iter().filter(|x| !x.is_finite()).count();
        if bad > 0 {
            let reason = format!("{bad} of {} elements of {side} are not finite", values.len());
            return Difference { tolerance, ..Difference::impossible(reason) };
        }
    }
    let max_abs = a.iter().zip(&b).fold(0.0f64, |m, (x, y)| m.max((x - y).abs()));
    let argmax_agree = match found.dims.as_slice() {
        [.., classes] if found.dims.len() >= 2 && *classes >= 2 && a_kind.is_float() && !a.is_empty() => {
            Some(a.chunks_exact(*classes).zip(b.chunks_exact(*classes)).all(|(a, b)| !flips(a, b, tolerance)))
        }
        _ => None,
    };
    let near = max_abs <= tolerance;
    let reason = if !near {
        Some(format!("differs by {max_abs:.3e}, allowed {tolerance:.3e}"))
    } else if argmax_agree == Some(false) {
        Some("another class wins by more than the tolerance".to_string())
    } else {
        None
    };
    Difference { max_abs: Some(max_abs), tolerance, argmax_agree, pass: reason.is_none(), reason }
}

/// Whether another entry wins in `a` than in `b`, where `b`'s winner led it by more than `tolerance`.
fn flips(a: &[f64], b: &[f64], tolerance: f64) -> bool {
    let (winner, other) = (argmax(b), argmax(a));
    winner != other && b[winner] - b[other] > tolerance
}

/// Compares all outputs by name. What only one side has is a difference too.
pub fn outputs(found: &[(String, Array)], reference: &[(String, Array)], relative: f64) -> Vec<(String, Difference)> {
    let mut all: Vec<(String, Difference)> = Vec::new();
    for (name, b) in reference {
        let difference = match found.iter().find(|(n, _)| n == name) {
            Some((_, a)) => difference(a, b, relative),
            None => Difference::impossible("the output is missing".to_string()),
        };
        all.push((name.clone(), difference));
    }
    for (name, _) in found.iter().filter(|(name, _)| !reference.iter().any(|(n, _)| n == name)) {
        all.push((name.clone(), Difference::impossible("the reference has no such output".to_string())));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(values: &[f32]) -> Array {
        Array { dims: vec![1, values.len()], data: ArrayData::F32(values.to_vec()) }
    }

    #[test]
    fn the_tolerance_is_relative_to_the_largest_magnitude() {
        let d = difference(&row(&[10.0, -0.0005]), &row(&[10.0, 0.0]), 1e-4);
        assert_eq!((d.pass, d.argmax_agree), (true, Some(true)));
        assert!((d.tolerance - 1e-3).abs() < 1e-12 && (d.max_abs.unwrap() - 5e-4).abs() < 1e-9);
        let d = difference(&row(&[10.0, 0.002]), &row(&[10.0, 0.0]), 1e-4);
        assert!(!d.pass && d.reason.unwrap().starts_with("differs by 2.0"));
    }

    #[test]
    fn equal_infinities_and_nans_fail() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for (a, b) in [(bad, bad), (bad, 1.0), (1.0, bad)] {
                let d = difference(&row(&[a, 2.0]), &row(&[b, 2.0]), 1e-4);
                assert_eq!((d.pass, d.max_abs), (false, None), "{a} {b}");
            }
        }
        assert!(!is_finite(&Array { dims: vec![1], data: ArrayData::F16(vec![0x7c00]) }));
        assert!(is_finite(&Array { dims: vec![1], data: ArrayData::I32(vec![i32::MAX]) }));
    }

    #[test]
    fn a_flip_counts_only_where_the_margin_exceeds_the_tolerance() {
        // max|b| = 100, tolerance 1: a lead of 0.5 may be lost.
        let within = difference(&row(&[99.4, 99.8]), &row(&[100.0, 99.5]), 1e-2);
        assert_eq!((within.pass, within.argmax_agree), (true, Some(true)));
        // A lead of 1.5 may not, although each entry moved by less than the tolerance.
        let beyond = difference(&row(&[99.2, 99.3]), &row(&[100.0, 98.5]), 1e-2);
        assert_eq!((beyond.pass, beyond.argmax_agree), (false, Some(false)));
        assert!(beyond.max_abs.unwrap() <= beyond.tolerance);
    }

    #[test]
    fn other_dims_kinds_and_names_fail() {
        let a = row(&[1.0, 2.0]);
        let flat = Array { dims: vec![2], data: a.data.clone() };
        assert!(!difference(&flat, &a, 1.0).pass);
        let ints = Array { dims: vec![1, 2], data: ArrayData::I64(vec![1, 2]) };
        assert_eq!(difference(&ints, &a, 1.0).reason.unwrap(), "expected float32 [1, 2], found int64 [1, 2]");
        assert!(difference(&ints, &ints, 0.0).pass);
        let all = outputs(&[("y".into(), a.clone())], &[("z".into(), a)], 1.0);
        assert_eq!(all.iter().map(|(n, d)| (n.as_str(), d.pass)).collect::<Vec<_>>(), [("z", false), ("y", false)]);
    }

    #[test]
    fn zeros_must_be_zeros_and_scalars_have_no_winner() {
        assert!(difference(&row(&[0.0, 0.0]), &row(&[0.0, 0.0]), 1e-4).pass);
        assert!(!difference(&row(&[1e-9, 0.0]), &row(&[0.0, 0.0]), 1e-4).pass);
        let scalar = Array { dims: vec![], data: ArrayData::F32(vec![1.0]) };
        assert_eq!(difference(&scalar, &scalar, 1e-4).argmax_agree, None);
    }
}
