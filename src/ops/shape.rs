//! Constant, ConstantOfShape, Shape (`start` and `end` from opset 15), Size, Range, EyeLike: values made from sizes or nothing.
//!
//! Also here: what gradients of moved elements need, the shape of a forward value as a target, and zeros.

use super::{Axes, Cost, Grad, OpRule, Refit};
use crate::autodiff::GradCx;
use crate::graph::{AttrValue, DType, Tensor, ValueId};
use crate::infer::content::element_count;
use crate::infer::{Dim, Fact, InferCx, InferError, KNOWN_MAX, Known};

/// The records of this family.
pub static RULES: &[OpRule] = &[
    record("Constant", (1, 24), constant_infer, Axes::ShapeOnly),
    record("ConstantOfShape", (9, 24), fill_infer, Axes::Barrier("filled at run time")),
    record("Shape", (1, 24), shape_infer, Axes::ShapeOnly),
    record("Size", (1, 24), size_infer, Axes::ShapeOnly),
    record("Range", (11, 24), range_infer, Axes::Barrier("positions are counted at run time")),
    record("EyeLike", (9, 24), eye_infer, Axes::Barrier("a unit matrix made at run time")),
];

type Infer = fn(&InferCx<'_>) -> Result<Vec<Fact>, InferError>;

const fn record(name: &'static str, opsets: (i64, i64), infer: Infer, axes: Axes) -> OpRule {
    OpRule { name, domain: "", opsets, infer, axes, grad: Grad::Zero, cost: Cost::Free, refit: Refit::Nothing }
}

fn constant_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    if let Some(t) = cx.node.output(0).and_then(|v| cx.graph.constant(v)) {
        return Ok(vec![Fact::of_tensor(&t)]);
    }
    // Strings have a type and a shape; sparse tensors stay unknown.
    Ok(vec![match cx.node.attrs().first().map(|a| &a.value) {
        Some(AttrValue::Str(_)) => Fact::new(Some(DType::String), Some(Vec::new())),
        Some(AttrValue::Strs(v)) => Fact::new(Some(DType::String), Some(vec![Dim::from(v.len())])),
        _ => Fact::default(),
    }])
}

/// A shape given by the content of an input: the content, or new sizes where only its length is known.
fn shape_in(cx: &InferCx<'_>, slot: usize, what: &str) -> Option<Vec<Dim>> {
    if let Some(dims) = cx.ints(slot) {
        return Some(dims.to_vec());
    }
    let rank = cx.shape(slot)?.first()?.size().filter(|r| *r <= 64)?;
    Some((0..rank).map(|i| cx.fresh(&format!("{what}{i}"))).collect())
}

fn fill_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let zero = Tensor::f32(&[1], &[0.0]);
    let value = match cx.node.attr("value") {
        Some(AttrValue::Tensor(t)) => t,
        _ => &zero,
    };
    let shape = shape_in(cx, 0, "fill");
    let count = shape.as_deref().and_then(element_count);
    let known = count.and_then(|n| Fact::of_tensor(value).known?.pick(&vec![0; n]));
    Ok(vec![Fact::new(Some(value.dtype), shape).with_known(known)])
}

fn shape_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let Some(input) = cx.shape(0) else { return Ok(vec![Fact::new(Some(DType::I64), Some(vec![cx.fresh("rank")]))]) };
    let rank = input.len() as i64;
    let at = |name: &str, default: i64| {
        let v = cx.node.attr_int(name).unwrap_or(default);
        (if v < 0 { v.saturating_add(rank) } else { v }).clamp(0, rank) as usize
    };
    let (start, end) = (at("start", 0), at("end", rank));
    let dims = input[start..end.max(start)].to_vec();
    Ok(vec![Fact::new(Some(DType::I64), Some(vec![Dim::from(dims.len())])).with_known(Some(Known::Ints(dims)))])
}

fn size_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let count = cx.shape(0).map(|s| Known::Ints(vec![s.iter().product()]));
    Ok(vec![Fact::new(Some(DType::I64), Some(Vec::new())).with_known(count)])
}

fn range_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let one = |slot: usize| cx.input(slot).known.as_ref().filter(|k| k.len() == 1);
    let fact = |count: Dim| Fact::new(cx.dtype(0), Some(vec![count]));
    let counted = match (one(0), one(1), one(2)) {
        (Some(Known::Ints(start)), Some(Known::Ints(limit)), Some(Known::Ints(delta))) => {
            int_range(cx, &start[0], &limit[0], &delta[0])?
        }
        (Some(Known::Floats(start)), Some(Known::Floats(limit)), Some(Known::Floats(delta))) => {
            float_range(cx, start[0], limit[0], delta[0])?
        }
        _ => None,
    };
    Ok(vec![match counted {
        Some((count, known)) => fact(count).with_known(known),
        None => fact(cx.fresh("range")),
    }])
}

type Counted = Option<(Dim, Option<Known>)>;

fn int_range(cx: &InferCx<'_>, start: &Dim, limit: &Dim, delta: &Dim) -> Result<Counted, InferError> {
    let Some(step) = delta.known() else { return Ok(None) };
    if step == 0 {
        return Err(cx.error("a range with a step of 0"));
    }
    let span = if step > 0 { limit - start } else { start - limit };
    let count = span.ceil_div(&Dim::from(step.saturating_abs()));
    let Some(n) = count.known() else { return Ok(Some((count, None))) };
    let n = n.max(0);
    let known =
        (n <= KNOWN_MAX as i64).then(|| Known::Ints((0..n).map(|i| start + &Dim::from(i.saturating_mul(step))).collect()));
    Ok(Some((Dim::from(n), known)))
}

fn float_range(cx: &InferCx<'_>, start: f64, limit: f64, delta: f64) -> Result<Counted, InferError> {
    if delta == 0.0 {
        return Err(cx.error("a range with a step of 0"));
    }
    let count = ((limit - start) / delta).ceil().max(0.0);
    if !count.is_finite() || count > 1e15 {
        return Ok(None);
    }
    let n = count as usize;
    let known = (n <= KNOWN_MAX).then(|| Known::Floats((0..n).map(|i| start + i as f64 * delta).collect()));
    Ok(Some((Dim::from(n), known)))
}

fn eye_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let dtype = match cx.node.attr_int("dtype") {
        Some(n) => i32::try_from(n).ok().and_then(DType::from_onnx),
        None => cx.dtype(0),
    };
    Ok(vec![Fact::new(dtype, cx.shape(0).map(<[_]>::to_vec))])
}

/// The shape of a forward value as the target of a Reshape: constant with at most one -1, else taken at run time.
pub(super) fn target_of(cx: &mut GradCx<'_>, forward: ValueId) -> ValueId {
    let shape = cx.shape(forward);
    let symbols = shape.iter().filter(|d| d.known().is_none()).count();
    if symbols > 1 || shape.iter().any(|d| d.is(0)) || shape.is_empty() {
        return sizes_of(cx, forward);
    }
    let target: Vec<i64> = shape.iter().map(|d| d.known().unwrap_or(-1)).collect();
    cx.b.ints(&target)
}

/// The sizes of a forward value: constant where all are numbers, else taken at run time.
pub(super) fn sizes_of(cx: &mut GradCx<'_>, forward: ValueId) -> ValueId {
    let sizes: Option<Vec<i64>> = cx.shape(forward).iter().map(Dim::known).collect();
    match sizes {
        Some(sizes) if !sizes.is_empty() => cx.b.ints(&sizes),
        // A shape without sizes is a scalar or unknown: the run knows which.
        _ => cx.b.shape_of(forward),
    }
}

/// Zeros of the shape and type of a forward value.
pub(super) fn zeros_like(cx: &mut GradCx<'_>, forward: ValueId) -> ValueId {
    let sizes = sizes_of(cx, forward);
    zeros(cx, forward, sizes)
}

/// Zeros of the type of a forward value, of the sizes that `sizes` holds at run time.
pub(super) fn zeros(cx: &mut GradCx<'_>, like: ValueId, sizes: ValueId) -> ValueId {
    let zero = cx.scalar(0.0, like);
    cx.b.op("Expand", &[zero, sizes], vec![])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::build::attr;
    use crate::ops::probe::{Probe, int_attr};

    #[test]
    fn constants_of_every_form_are_known() {
        let mut p = Probe::new(17);
        for (name, value, shape, content) in [
            ("value", AttrValue::Tensor(Tensor { dims: vec![1, 2], ..Tensor::i64s(&[4, 5]) }), "1 2", "4 5"),
            ("value_int", AttrValue::Int(7), "", "7"),
            ("value_ints", AttrValue::Ints(vec![1, 2]), "2", "1 2"),
            ("value_float", AttrValue::Float(0.5), "", "0.5"),
            ("value_floats", AttrValue::Floats(vec![0.5, 2.0]), "2", "0.5 2"),
            ("value_strings", AttrValue::Strs(vec!["a".into(), "b".into()]), "2", "?"),
        ] {
            let y = p.op("Constant", &[], vec![attr(name, value)]);
            assert_eq!((p.shape(y).as_str(), p.content(y).as_str()), (shape, content), "{name}");
        }
    }

    #[test]
    fn shapes_are_contents() {
        let mut p = Probe::new(17);
        let x = p.input("x", "b 197 192");
        let all = p.op("Shape", &[x], vec![]);
        let tail = p.op("Shape", &[x], vec![int_attr("start", -2)]);
        let head = p.op("Shape", &[x], vec![int_attr("start", 0), int_attr("end", -1)]);
        let none = p.op("Shape", &[x], vec![int_attr("start", 2), int_attr("end", 1)]);
        let size = p.op("Size", &[x], vec![]);
        assert_eq!([all, tail, head, none, size].map(|v| p.content(v)), ["b 197 192", "197 192", "b 197", "", "37824*b"]);
        assert_eq!((p.shape(tail), p.shape(size)), ("2".to_string(), String::new()));
        assert_eq!(p.axes(all), ["shape only"]);
    }

    #[test]
    fn fills_are_known_where_small() {
        let mut p = Probe::new(17);
        let sizes = p.ints(&[2, 2]);
        let floats = p.op("ConstantOfShape", &[sizes], vec![]);
        let ones = p.op("ConstantOfShape", &[sizes], vec![attr("value", AttrValue::Tensor(Tensor::i64s(&[1])))]);
        assert_eq!((p.content(floats).as_str(), p.content(ones).as_str()), ("0 0 0 0", "1 1 1 1"));
        let run_time = p.typed_input("t", "2", DType::I64);
        let filled = p.op("ConstantOfShape", &[run_time], vec![]);
        assert_eq!((p.shape(filled).as_str(), p.content(filled).as_str()), ("fill0.n2 fill1.n2", "?"));
        let huge = p.ints(&[1 << 40, 1 << 40]);
        let filled = p.op("ConstantOfShape", &[huge], vec![]);
        assert_eq!(p.content(filled), "?");
    }

    #[test]
    fn ranges_count() {
        let mut p = Probe::new(17);
        let (zero, five, two, minus) = (p.int(0), p.int(5), p.int(2), p.int(-2));
        let up = p.op("Range", &[zero, five, two], vec![]);
        let down = p.op("Range", &[five, zero, minus], vec![]);
        let empty = p.op("Range", &[five, zero, two], vec![]);
        assert_eq!([up, down, empty].map(|v| p.content(v)), ["0 2 4", "5 3 1", ""]);
        let x = p.input("x", "n");
        let size = p.op("Size", &[x], vec![]);
        let one = p.int(1);
        let positions = p.op("Range", &[zero, size, one], vec![]);
        assert_eq!((p.shape(positions).as_str(), p.content(positions).as_str()), ("n", "?"));
        p.op("Range", &[zero, five, zero], vec![]);
        assert_eq!(p.error().what, "a range with a step of 0");
    }

    #[test]
    fn unit_matrices_have_the_shape_of_the_input() {
        let mut p = Probe::new(17);
        let x = p.input("x", "3 n");
        let y = p.op("EyeLike", &[x], vec![int_attr("dtype", 7)]);
        assert_eq!((p.shape(y).as_str(), p.facts().get(y).dtype), ("3 n", Some(DType::I64)));
    }
}
