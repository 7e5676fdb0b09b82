//! Contents of small values under pointwise operators: integers as symbolic dims, floats rounded to their element type.
//!
//! Example: `Mul` of the contents `(batch, 197)` and `(192)` is `(192 * batch, 37824)`. An element that cannot be told for
//! every run makes the whole content unknown. Functions whose last bit engines round differently (Exp, Sin) have none.

use crate::graph::{DType, Node};
use crate::infer::{Dim, Fact, InferCx, KNOWN_MAX, Known};

/// One element of a content.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Scalar {
    /// An integer or a boolean (0 or 1).
    Int(Dim),
    /// A float.
    Float(f64),
}

use Scalar::{Float, Int};

/// The shape to which `a` and `b` are broadcast together; the sizes that do not fit, where they contradict each other.
///
/// Of two sizes that are not known to be equal, the greater holds: either they are equal or one of them is 1.
pub(crate) fn broadcast(a: &[Dim], b: &[Dim]) -> Result<Vec<Dim>, (Dim, Dim)> {
    let (long, short) = if a.len() >= b.len() { (a, b) } else { (b, a) };
    let shift = long.len() - short.len();
    let mut out = long.to_vec();
    for (size, other) in out[shift..].iter_mut().zip(short) {
        let joined = match (size.known(), other.known()) {
            _ if size == other || other.is(1) => continue,
            (Some(1), _) => other.clone(),
            (Some(_), Some(_)) => return Err((size.clone(), other.clone())),
            (Some(_), None) => continue,
            (None, Some(_)) => other.clone(),
            (None, None) => Dim::max(size, other),
        };
        *size = joined;
    }
    Ok(out)
}

/// Where each element of a value of shape `out` comes from in a value of shape `shape` that is broadcast to it; flat, row-major.
pub(crate) fn sources(shape: &[usize], out: &[usize]) -> Option<Vec<usize>> {
    let shift = out.len().checked_sub(shape.len())?;
    let count = out.iter().try_fold(1usize, |n, size| n.checked_mul(*size)).filter(|n| *n <= KNOWN_MAX)?;
    let mut strides = vec![0; out.len()];
    let mut step = 1;
    for (axis, size) in shape.iter().enumerate().rev() {
        if *size != 1 {
            strides[axis + shift] = step;
        }
        step *= size;
    }
    let source = |flat: usize| {
        let mut rest = flat;
        out.iter().zip(&strides).rev().fold(0, |at, (size, stride)| {
            let place = rest % size;
            rest /= size;
            at + place * stride
        })
    };
    Some((0..count).map(source).collect())
}

/// Sizes of a shape in which every size is a number.
pub(crate) fn sizes(shape: &[Dim]) -> Option<Vec<usize>> {
    shape.iter().map(Dim::size).collect()
}

/// Content of the output of a pointwise node of the given shape and element type.
pub(crate) fn pointwise(cx: &InferCx<'_>, shape: Option<&[Dim]>, dtype: Option<DType>) -> Option<Known> {
    let value = rule(cx.node.op())?;
    let out = sizes(shape?)?;
    let there = (0..cx.input_count()).rev().find(|slot| cx.has_input(*slot))? + 1;
    let operands = (0..there).map(|slot| operand(cx.input(slot), &out)).collect::<Option<Vec<_>>>()?;
    let count = operands[0].1.len();
    let mut elements = Vec::with_capacity(count);
    for i in 0..count {
        let args: Vec<Scalar> = operands.iter().map(|(known, at)| element(known, at[i])).collect();
        elements.push(value(cx.node, &args)?);
    }
    collect(elements, dtype?)
}

fn operand<'a>(fact: &'a Fact, out: &[usize]) -> Option<(&'a Known, Vec<usize>)> {
    let known = fact.known.as_ref()?;
    Some((known, sources(&sizes(fact.shape.as_deref()?)?, out)?))
}

fn element(known: &Known, at: usize) -> Scalar {
    match known {
        Known::Ints(v) => Int(v[at].clone()),
        Known::Floats(v) => Float(v[at]),
    }
}

/// The content that holds `elements` as type `dtype`; none where one does not fit or the type wraps around.
pub(crate) fn collect(elements: Vec<Scalar>, dtype: DType) -> Option<Known> {
    if dtype.is_float() {
        let floats = elements.into_iter().map(|e| match e {
            Float(v) => Some(round_to(v, dtype)).filter(|v| v.is_finite()),
            Int(_) => None,
        });
        return floats.collect::<Option<_>>().map(Known::Floats);
    }
    let ints = elements.into_iter().map(|e| match e {
        Int(v) => fits(&v, dtype).then_some(v),
        Float(_) => None,
    });
    ints.collect::<Option<_>>().map(Known::Ints)
}

fn round_to(v: f64, dtype: DType) -> f64 {
    match dtype {
        DType::F32 => f64::from(v as f32),
        DType::F16 => half::f16::from_f64(v).to_f64(),
        DType::BF16 => half::bf16::from_f64(v).to_f64(),
        _ => v,
    }
}

fn fits(v: &Dim, dtype: DType) -> bool {
    let range = match dtype {
        DType::I64 => return true,
        DType::I32 if v.known().is_none() => return true,
        DType::I32 => i64::from(i32::MIN)..=i64::from(i32::MAX),
        DType::I16 => i64::from(i16::MIN)..=i64::from(i16::MAX),
        DType::I8 => i64::from(i8::MIN)..=i64::from(i8::MAX),
        DType::U32 => 0..=i64::from(u32::MAX),
        DType::U16 => 0..=i64::from(u16::MAX),
        DType::U8 => 0..=i64::from(u8::MAX),
        DType::Bool => 0..=1,
        _ => return false,
    };
    v.known().is_some_and(|n| range.contains(&n))
}

type Rule = fn(&Node, &[Scalar]) -> Option<Scalar>;

/// How an operator computes one element; none for operators whose contents are not followed.
fn rule(op: &str) -> Option<Rule> {
    Some(match op {
        "Add" | "Sum" => |_, v| fold(v, add, |a, b| a + b),
        "Sub" => |_, v| fold(v, sub, |a, b| a - b),
        "Mul" => |_, v| fold(v, mul, |a, b| a * b),
        "Div" => |_, v| fold(v, div, |a, b| a / b),
        "Mod" => modulo,
        "Pow" => pow,
        "Max" => |_, v| fold(v, greater_of, f64::max),
        "Min" => |_, v| fold(v, smaller_of, f64::min),
        "Clip" => clip,
        "Neg" => |_, v| unary(v, |a| sub(&Dim::from(0i64), a), |a| -a),
        "Abs" => |_, v| unary(v, |a| greater_of(a, &sub(&Dim::from(0i64), a)?), f64::abs),
        "Sign" => |_, v| unary(v, sign, |a| if a == 0.0 { 0.0 } else { a.signum() }),
        "Relu" => |_, v| unary(v, |a| greater_of(a, &Dim::from(0i64)), |a| a.max(0.0)),
        "Sqrt" => |_, v| unary(v, |_| None, f64::sqrt),
        "Reciprocal" => |_, v| unary(v, |_| None, f64::recip),
        "Floor" => |_, v| unary(v, |_| None, f64::floor),
        "Ceil" => |_, v| unary(v, |_| None, f64::ceil),
        "Round" => |_, v| unary(v, |_| None, f64::round_ties_even),
        "Equal" => |_, v| compare(v, equal),
        "Less" => |_, v| compare(v, less),
        "Greater" => |_, v| compare(v, |a, b| less(b, a)),
        "LessOrEqual" => |_, v| compare(v, at_most),
        "GreaterOrEqual" => |_, v| compare(v, |a, b| at_most(b, a)),
        "Not" => |_, v| Some(flag(!truth(v.first()?)?)),
        "And" => |_, v| Some(flag(truth(v.first()?)? && truth(v.get(1)?)?)),
        "Or" => |_, v| Some(flag(truth(v.first()?)? || truth(v.get(1)?)?)),
        "Xor" => |_, v| Some(flag(truth(v.first()?)? != truth(v.get(1)?)?)),
        "Where" => choose,
        "Cast" => |node, v| cast(v.first()?, cast_target(node)?),
        _ => return None,
    })
}

fn unary(v: &[Scalar], ints: fn(&Dim) -> Option<Dim>, floats: fn(f64) -> f64) -> Option<Scalar> {
    Some(match v.first()? {
        Int(a) => Int(ints(a)?),
        Float(a) => Float(floats(*a)),
    })
}

/// Floats of more than two operands are left out: their sum depends on where an engine rounds.
fn fold(v: &[Scalar], ints: fn(&Dim, &Dim) -> Option<Dim>, floats: fn(f64, f64) -> f64) -> Option<Scalar> {
    let (first, rest) = v.split_first()?;
    rest.iter().try_fold(first.clone(), |so_far, next| match (so_far, next) {
        (Int(a), Int(b)) => ints(&a, b).map(Int),
        (Float(a), Float(b)) if rest.len() == 1 => Some(Float(floats(a, *b))),
        _ => None,
    })
}

/// Numbers by `numbers`, which says when they overflow; anything else by `symbols`.
fn ints(a: &Dim, b: &Dim, numbers: fn(i64, i64) -> Option<i64>, symbols: fn(&Dim, &Dim) -> Option<Dim>) -> Option<Dim> {
    match (a.known(), b.known()) {
        (Some(a), Some(b)) => numbers(a, b).map(Dim::from),
        _ => symbols(a, b),
    }
}

/// `a + b`, where it does not overflow.
pub(crate) fn add(a: &Dim, b: &Dim) -> Option<Dim> {
    ints(a, b, i64::checked_add, |a, b| Some(a + b))
}

/// `a - b`, where it does not overflow.
pub(crate) fn sub(a: &Dim, b: &Dim) -> Option<Dim> {
    ints(a, b, i64::checked_sub, |a, b| Some(a - b))
}

/// `a * b`, where it does not overflow.
pub(crate) fn mul(a: &Dim, b: &Dim) -> Option<Dim> {
    ints(a, b, i64::checked_mul, |a, b| Some(a * b))
}

/// `a / b` rounded towards zero.
fn div(a: &Dim, b: &Dim) -> Option<Dim> {
    ints(a, b, i64::checked_div, |a, b| {
        let positive = a.at_least().is_some_and(|v| v >= 0) && b.at_least().is_some_and(|v| v >= 1);
        a.exact_div(b).or_else(|| positive.then(|| a.floor_div(b)))
    })
}

/// The greater of both, where it can be told.
pub(crate) fn greater_of(a: &Dim, b: &Dim) -> Option<Dim> {
    match less(&Int(a.clone()), &Int(b.clone())) {
        Some(true) => Some(b.clone()),
        Some(false) => Some(a.clone()),
        None => Some(a.max(b)),
    }
}

/// The smaller of both, where it can be told.
pub(crate) fn smaller_of(a: &Dim, b: &Dim) -> Option<Dim> {
    match less(&Int(a.clone()), &Int(b.clone())) {
        Some(true) => Some(a.clone()),
        Some(false) => Some(b.clone()),
        None => Some(a.min(b)),
    }
}

fn sign(a: &Dim) -> Option<Dim> {
    match a.known() {
        Some(v) => Some(Dim::from(v.signum())),
        None => a.at_least().filter(|v| *v >= 1).map(|_| Dim::from(1i64)),
    }
}

/// With `fmod` the sign follows the dividend, without it the divisor (integers only).
fn modulo(node: &Node, v: &[Scalar]) -> Option<Scalar> {
    let fmod = node.attr_int("fmod").unwrap_or(0) != 0;
    match (v.first()?, v.get(1)?) {
        (Int(a), Int(b)) => match (a.known(), b.known()) {
            (Some(a), Some(b)) => {
                let rest = a.checked_rem(b)?;
                let turn = !fmod && rest != 0 && (rest < 0) != (b < 0);
                Some(Int(Dim::from(if turn { rest + b } else { rest })))
            }
            _ => {
                let plain = b.at_least()? >= 1 && (!fmod || a.at_least()? >= 0);
                plain.then(|| Int(a.modulo(b)))
            }
        },
        (Float(a), Float(b)) if fmod => Some(Float(a % b)),
        _ => None,
    }
}

fn pow(_: &Node, v: &[Scalar]) -> Option<Scalar> {
    match (v.first()?, v.get(1)?) {
        (Float(a), Float(b)) => Some(Float(a.powf(*b))),
        (Float(a), Int(b)) => Some(Float(a.powf(b.known()? as f64))),
        (Int(a), Int(b)) => {
            let times = b.known().filter(|n| (0..=62).contains(n))?;
            (0..times).try_fold(Dim::from(1i64), |product, _| mul(&product, a)).map(Int)
        }
        _ => None,
    }
}

/// `Clip` with its bounds as inputs, the lower one present.
fn clip(_: &Node, v: &[Scalar]) -> Option<Scalar> {
    let raised = fold(v.get(..2).unwrap_or(v), greater_of, f64::max)?;
    match v.get(2) {
        Some(high) => fold(&[raised, high.clone()], smaller_of, f64::min),
        None => Some(raised),
    }
}

fn flag(v: bool) -> Scalar {
    Int(Dim::from(i64::from(v)))
}

/// Whether an element counts as true.
fn truth(v: &Scalar) -> Option<bool> {
    match v {
        Int(v) => match v.known() {
            Some(n) => Some(n != 0),
            None => v.at_least().filter(|n| *n >= 1).map(|_| true),
        },
        Float(v) => Some(*v != 0.0),
    }
}

fn compare(v: &[Scalar], holds: fn(&Scalar, &Scalar) -> Option<bool>) -> Option<Scalar> {
    holds(v.first()?, v.get(1)?).map(flag)
}

/// Whether `a < b` in every run, or in none.
fn less(a: &Scalar, b: &Scalar) -> Option<bool> {
    match (a, b) {
        (Int(a), Int(b)) => {
            if let (Some(a), Some(b)) = (a.known(), b.known()) {
                return Some(a < b);
            }
            let (rise, fall) = ((b - a).at_least(), (a - b).at_least());
            if rise.is_some_and(|v| v >= 1) { Some(true) } else { fall.filter(|v| *v >= 0).map(|_| false) }
        }
        (Float(a), Float(b)) => Some(a < b),
        _ => None,
    }
}

/// Whether `a <= b` in every run, or in none.
fn at_most(a: &Scalar, b: &Scalar) -> Option<bool> {
    match (a, b) {
        (Float(a), Float(b)) => Some(a <= b),
        _ => less(b, a).map(|v| !v),
    }
}

/// Whether `a` equals `b` in every run, or in none.
fn equal(a: &Scalar, b: &Scalar) -> Option<bool> {
    match (a, b) {
        (Float(a), Float(b)) => Some(a == b),
        _ if a == b => Some(true),
        _ => (less(a, b)? || less(b, a)?).then_some(false),
    }
}

fn choose(_: &Node, v: &[Scalar]) -> Option<Scalar> {
    let (then, otherwise) = (v.get(1)?, v.get(2)?);
    match truth(v.first()?) {
        Some(true) => Some(then.clone()),
        Some(false) => Some(otherwise.clone()),
        None => (then == otherwise).then(|| then.clone()),
    }
}

/// An element in another type; floats lose their fraction towards zero where they become integers.
pub(crate) fn cast(v: &Scalar, to: DType) -> Option<Scalar> {
    if to == DType::Bool {
        return truth(v).map(flag);
    }
    match v {
        Int(a) if to.is_float() => a.known().map(|n| Float(n as f64)),
        Float(a) if !to.is_float() => (a.abs() < 9.2e18).then(|| Int(Dim::from(a.trunc() as i64))),
        Int(_) | Float(_) => Some(v.clone()),
    }
}

/// The element type that a `Cast` node names.
pub(crate) fn cast_target(node: &Node) -> Option<DType> {
    DType::from_onnx(i32::try_from(node.attr_int("to")?).ok()?)
}

/// All elements of a content in another type.
pub(crate) fn cast_known(known: &Known, to: DType) -> Option<Known> {
    let elements = (0..known.len()).map(|i| cast(&element(known, i), to)).collect::<Option<Vec<_>>>()?;
    collect(elements, to)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::{Graph, NewNode};

    fn value(op: &str, args: &[Scalar]) -> Option<Scalar> {
        let mut graph = Graph::default();
        let id = graph.add_node(NewNode { op: op.to_string(), ..NewNode::default() });
        rule(op).expect("contents are followed")(graph.node(id), args)
    }

    fn int(v: i64) -> Scalar {
        Int(Dim::from(v))
    }

    fn n() -> Dim {
        Dim::named("n")
    }

    #[test]
    fn symbols_are_calculated_with() {
        let twice = Int(&n() * &Dim::from(2i64));
        assert_eq!(value("Add", &[Int(n()), Int(n())]), Some(twice.clone()));
        assert_eq!(value("Div", &[twice.clone(), int(2)]), Some(Int(n())));
        assert_eq!(value("Div", &[Int(n()), int(16)]), Some(Int(n().floor_div(&Dim::from(16i64)))));
        assert_eq!(value("Mod", &[twice, int(2)]), Some(int(0)));
        assert_eq!(value("Max", &[Int(n()), int(1)]), Some(Int(n())));
        assert_eq!(value("Min", &[Int(n()), int(0)]), Some(int(0)));
        assert_eq!(value("Clip", &[Int(n()), int(-5), int(0)]), Some(int(0)));
        assert_eq!(value("Abs", &[Int(n())]), Some(Int(n())));
        assert_eq!(value("Pow", &[Int(n()), int(2)]), Some(Int(&n() * &n())));
    }

    #[test]
    fn division_and_remainder_round_like_the_standard_says() {
        for (op, a, b, expected) in
            [("Div", -7, 2, -3), ("Div", 7, 2, 3), ("Mod", -7, 3, 2), ("Mod", 7, -3, -2), ("Mod", 6, 3, 0)]
        {
            assert_eq!(value(op, &[int(a), int(b)]), Some(int(expected)), "{op} {a} {b}");
        }
        assert_eq!(value("Mod", &[int(1), int(0)]), None);
        assert_eq!(value("Div", &[Int(&Dim::from(1i64) - &n()), int(2)]), None, "the sign is not known");
        assert_eq!(value("Round", &[Float(2.5)]), Some(Float(2.0)));
    }

    #[test]
    fn comparisons_hold_in_every_run_or_are_unknown() {
        for (op, other, expected) in [
            ("Equal", -1, Some(0)),
            ("Equal", 0, Some(0)),
            ("Equal", 1, None),
            ("Greater", 0, Some(1)),
            ("Less", 1, Some(0)),
            ("Less", 2, None),
            ("GreaterOrEqual", 1, Some(1)),
            ("LessOrEqual", 0, Some(0)),
        ] {
            assert_eq!(value(op, &[Int(n()), int(other)]), expected.map(int), "{op} n {other}");
        }
        assert_eq!(value("Equal", &[Int(n()), Int(n())]), Some(int(1)));
        assert_eq!(value("Equal", &[Int(n()), Int(Dim::named("m"))]), None);
    }

    #[test]
    fn where_picks_by_element() {
        assert_eq!(value("Where", &[int(1), Int(n()), int(5)]), Some(Int(n())));
        assert_eq!(value("Where", &[int(0), Int(n()), int(5)]), Some(int(5)));
        let unknown = Int(&n() - &Dim::from(1i64));
        assert_eq!(value("Where", &[unknown.clone(), Int(n()), int(5)]), None);
        assert_eq!(value("Where", &[unknown, int(5), int(5)]), Some(int(5)));
    }

    #[test]
    fn casts_follow_the_target() {
        assert_eq!(cast(&Float(-2.7), DType::I64), Some(int(-2)));
        assert_eq!(cast(&Float(f64::NAN), DType::I64), None);
        assert_eq!(cast(&Int(n()), DType::F32), None);
        assert_eq!(cast(&Int(n()), DType::Bool), Some(int(1)));
        assert_eq!(collect(vec![int(300)], DType::U8), None);
        assert_eq!(collect(vec![Float(0.1)], DType::F16), Some(Known::Floats(vec![half::f16::from_f32(0.1).to_f64()])));
    }
}
