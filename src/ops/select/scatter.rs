//! ScatterElements, ScatterND, Trilu, OneHot, NonZero, Compress (opset 9 to 24): positions that are written, or found.

use crate::autodiff::GradCx;
use crate::axes::relation::{AxesCx, Relations, Slot};
use crate::graph::{DType, ValueId};
use crate::infer::content::element_count;
use crate::infer::{Dim, Fact, InferCx, InferError, Known, normalize_axis};
use crate::ops::{Axes, Cost, Grad, OpRule, Refit};

type Infer = fn(&InferCx<'_>) -> Result<Vec<Fact>, InferError>;

const WRITTEN: &str = "written at positions that are only known at run time";

/// The records of this family.
pub static RULES: &[OpRule] = &[
    record("ScatterElements", (11, 24), like_input, Axes::Barrier(WRITTEN), Grad::No("no gradient rule for ScatterElements")),
    record("ScatterND", (11, 24), like_input, Axes::Barrier(WRITTEN), Grad::No("no gradient rule for ScatterND")),
    record("Trilu", (14, 24), like_input, Axes::Rule(trilu_axes), Grad::Rule(trilu_grad)),
    record("OneHot", (9, 24), one_hot_infer, Axes::Rule(one_hot_axes), Grad::Zero),
    record("NonZero", (9, 24), non_zero_infer, Axes::Barrier("positions of what is not zero"), Grad::Zero),
    record("Compress", (9, 24), compress_infer, Axes::Rule(compress_axes), Grad::No("no gradient rule for Compress")),
];

const fn record(name: &'static str, opsets: (i64, i64), infer: Infer, axes: Axes, grad: Grad) -> OpRule {
    OpRule { name, domain: "", opsets, infer, axes, grad, cost: Cost::Free, refit: Refit::Nothing }
}

fn like_input(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    Ok(vec![Fact::new(cx.dtype(0), cx.shape(0).map(<[_]>::to_vec))])
}

/// `.. n m -> .. n m`, both axes of the triangle being barriers.
fn trilu_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    cx.parallel(&mut relations, 0, 0, &[]);
    let rank = cx.shape(Slot::In(0)).len();
    for axis in rank.saturating_sub(2)..rank {
        relations.barrier((Slot::In(0), axis), "Trilu keeps a triangle of this axis");
    }
    relations
}

/// `dx` is the same triangle of `dy`.
fn trilu_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let dy = cx.dy()?;
    let attrs = cx.node().attrs().to_vec();
    let inputs: Vec<ValueId> = [Some(dy), cx.node().input(1)].into_iter().flatten().collect();
    let dx = cx.b.op("Trilu", &inputs, attrs);
    cx.give(0, dx);
    Ok(())
}

/// Where OneHot puts the new axis.
fn one_hot_axis(axis: Option<i64>, rank: usize) -> Option<usize> {
    normalize_axis(axis.unwrap_or(-1), rank + 1)
}

fn one_hot_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let Some(index) = cx.shape(0) else { return Ok(vec![Fact::new(cx.dtype(2), None)]) };
    let axis = one_hot_axis(cx.node.attr_int("axis"), index.len()).ok_or_else(|| cx.error("the axis lies outside"))?;
    let depth = match &cx.input(1).known {
        Some(Known::Ints(d)) => d.first().cloned(),
        Some(Known::Floats(d)) => d.first().map(|d| Dim::from(*d as i64)),
        None => None,
    };
    let mut shape = index.to_vec();
    shape.insert(axis, depth.unwrap_or_else(|| cx.fresh("depth")));
    let known = one_hot_content(cx, axis, &shape);
    Ok(vec![Fact::new(cx.dtype(2), Some(shape)).with_known(known)])
}

/// Repeats of a Tile may be spelled this way: `[1, r, 1, 1]` is a one-hot of position 1 whose values are 1 and `r`.
fn one_hot_content(cx: &InferCx<'_>, axis: usize, shape: &[Dim]) -> Option<Known> {
    let (index, values) = (cx.numbers(0)?, cx.input(2).known.as_ref()?);
    let (total, depth) = (element_count(shape)?, shape[axis].size()?);
    let inner: usize = shape[axis + 1..].iter().map(Dim::size).product::<Option<usize>>()?;
    // Off and on are elements 0 and 1 of the values; an index from the end is allowed.
    let on = |n: usize| {
        let (outer, at) = (n / (inner * depth), n / inner % depth);
        let wanted = index.get(outer * inner + n % inner).copied().unwrap_or(-1);
        usize::from(wanted == at as i64 || wanted + depth as i64 == at as i64)
    };
    values.pick(&(0..total).map(on).collect::<Vec<_>>())
}

fn one_hot_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    let rank = cx.shape(Slot::In(0)).len();
    let new = one_hot_axis(cx.node.attr_int("axis"), rank);
    for (axis, out) in (0..=rank).filter(|a| Some(*a) != new).enumerate() {
        relations.same((Slot::In(0), axis), (Slot::Out(0), out));
    }
    if let Some(new) = new {
        relations.barrier((Slot::Out(0), new), "one position for each class");
    }
    relations
}

/// `[rank, count]`: one row of positions for each axis.
fn non_zero_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let Some(input) = cx.shape(0) else { return Ok(vec![Fact::new(Some(DType::I64), None)]) };
    let found = set(cx.input(0)).zip(cx.input(0).sizes());
    let rank = Dim::from(input.len().max(1));
    let Some((found, sizes)) = found else {
        return Ok(vec![Fact::new(Some(DType::I64), Some(vec![rank, cx.fresh("nonzero")]))]);
    };
    let strides = crate::infer::content::strides(&sizes);
    let position = |axis: usize, flat: usize| (flat / strides[axis]) % sizes[axis];
    let rows = (0..sizes.len()).flat_map(|axis| found.iter().map(move |flat| (axis, *flat)));
    let known = (!sizes.is_empty()).then(|| Known::Ints(rows.map(|(axis, flat)| Dim::from(position(axis, flat))).collect()));
    let known = known.filter(|k| k.len() <= crate::infer::KNOWN_MAX);
    Ok(vec![Fact::new(Some(DType::I64), Some(vec![rank, Dim::from(found.len())])).with_known(known)])
}

/// Flat positions of what is not zero, of a value whose elements are all numbers.
fn set(fact: &Fact) -> Option<Vec<usize>> {
    let set: Vec<bool> = match fact.known.as_ref()? {
        Known::Ints(v) => v.iter().map(|d| d.known().map(|n| n != 0)).collect::<Option<_>>()?,
        Known::Floats(v) => v.iter().map(|x| *x != 0.0).collect(),
    };
    Some((0..set.len()).filter(|i| set[*i]).collect())
}

fn compress_axis(axis: Option<i64>, rank: usize) -> Option<usize> {
    normalize_axis(axis?, rank)
}

fn compress_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let count = set(cx.input(1)).map_or_else(|| cx.fresh("compress"), |s| Dim::from(s.len()));
    let shape = match (cx.shape(0), cx.node.attr_int("axis")) {
        (_, None) => Some(vec![count]),
        (Some(input), axis) => {
            let axis = compress_axis(axis, input.len()).ok_or_else(|| cx.error("the axis lies outside"))?;
            let mut shape = input.to_vec();
            shape[axis] = count;
            Some(shape)
        }
        (None, _) => None,
    };
    Ok(vec![Fact::new(cx.dtype(0), shape)])
}

fn compress_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    let (input, output) = (cx.shape(Slot::In(0)), cx.shape(Slot::Out(0)));
    let axis = compress_axis(cx.node.attr_int("axis"), input.len());
    for a in 0..input.len() {
        if axis.is_some_and(|axis| axis != a) {
            relations.same((Slot::In(0), a), (Slot::Out(0), a));
        } else {
            relations.barrier((Slot::In(0), a), WRITTEN);
        }
    }
    let barred = (0..output.len()).filter(|a| axis.is_none_or(|axis| axis == *a));
    barred.for_each(|a| relations.barrier((Slot::Out(0), a), WRITTEN));
    relations
}

#[cfg(test)]
mod tests {
    use crate::graph::DType;
    use crate::ops::probe::{Probe, int_attr};

    #[test]
    fn scatters_have_the_shape_of_what_they_write_on() {
        let mut p = Probe::new(17);
        let x = p.input("x", "b 6 8");
        let index = p.typed_input("index", "b 2 8", DType::I64);
        let updates = p.input("u", "b 2 8");
        let y = p.op("ScatterElements", &[x, index, updates], vec![]);
        assert_eq!((p.shape(y).as_str(), p.axes(y).len()), ("b 6 8", 1));
        let z = p.op("Trilu", &[x], vec![int_attr("upper", 0)]);
        assert_eq!((p.shape(z).as_str(), p.axes(z).len()), ("b 6 8", 5));
        assert_eq!(p.grad(z), Ok(vec!["Trilu".into()]));
    }

    #[test]
    fn classes_are_a_new_axis() {
        let mut p = Probe::new(17);
        let index = p.typed_input("index", "b n", DType::I64);
        let (depth, values) = (p.int(10), p.input("values", "2"));
        let y = p.op("OneHot", &[index, depth, values], vec![]);
        assert_eq!((p.shape(y).as_str(), p.facts().get(y).dtype), ("b n 10", Some(DType::F32)));
        assert_eq!(p.axes(y), ["in0.0 = out0.0", "in0.1 = out0.1", "out0.2 | one position for each class"]);
        let z = p.op("OneHot", &[index, depth, values], vec![int_attr("axis", 0)]);
        assert_eq!(p.shape(z), "10 b n");
    }

    #[test]
    fn a_one_hot_of_numbers_is_known() {
        let mut p = Probe::new(17);
        let (index, depth, values) = (p.ints(&[1, -1]), p.int(3), p.ints(&[1, 7]));
        let y = p.op("OneHot", &[index, depth, values], vec![]);
        assert_eq!((p.shape(y).as_str(), p.content(y).as_str()), ("2 3", "1 7 1 1 1 7"));
        let z = p.op("OneHot", &[index, depth, values], vec![int_attr("axis", 0)]);
        assert_eq!((p.shape(z).as_str(), p.content(z).as_str()), ("3 2", "1 1 7 1 1 7"));
    }

    #[test]
    fn what_is_found_is_known_of_constants() {
        let mut p = Probe::new(17);
        let c = p.ints_of(&[2, 2], &[0, 1, 1, 0]);
        let y = p.op("NonZero", &[c], vec![]);
        assert_eq!((p.shape(y).as_str(), p.content(y).as_str()), ("2 2", "0 1 1 0"));
        let x = p.input("x", "b 4");
        let z = p.op("NonZero", &[x], vec![]);
        assert_eq!(p.shape(z), "2 nonzero.n1");
        let w = p.op("Compress", &[x, c], vec![int_attr("axis", 1)]);
        assert_eq!(p.shape(w), "b 2");
        assert_eq!(p.axes(w)[0], "in0.0 = out0.0");
    }
}
