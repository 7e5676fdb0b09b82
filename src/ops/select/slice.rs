//! Slice (opset 10 to 24) and Pad (opset 11 to 24): a run of positions of each axis, and its opposite.
//!
//! Slice: `starts`, `ends`, `axes`, `steps` are inputs; negative bounds count from the end, bounds outside are clamped. Where
//! the axis has no fixed size, the positions that the bounds name are taken to exist: `x[:, 1:]` of size n has n - 1.
//! Pad: `pads` (first all begins, then all ends) and, from opset 18, `axes` are inputs.

use super::{Sized, listed, moved_to, padded, scatter_along, sizes_with};
use crate::autodiff::GradCx;
use crate::axes::relation::{AxesCx, Relations, Slot};
use crate::graph::Node;
use crate::infer::content::along;
use crate::infer::{Dim, Fact, Facts, InferCx, InferError, normalize_axis};
use crate::ops::shape::zeros;
use crate::ops::{Axes, Cost, Grad, OpRule, Refit};
use crate::slice::refit::{RefitCx, RefitError};

/// The records of this family.
pub static RULES: &[OpRule] = &[
    OpRule {
        name: "Slice",
        domain: "",
        opsets: (10, 24),
        infer: slice_infer,
        axes: Axes::Rule(slice_axes),
        grad: Grad::Rule(slice_grad),
        cost: Cost::Free,
        refit: Refit::Rule(slice_refit),
    },
    OpRule {
        name: "Pad",
        domain: "",
        opsets: (11, 24),
        infer: pad_infer,
        axes: Axes::Rule(pad_axes),
        grad: Grad::Rule(pad_grad),
        cost: Cost::Free,
        refit: Refit::Nothing,
    },
];

const START: usize = 1;
const END: usize = 2;
const STEP: usize = 4;

/// Bounds at or beyond this mean "to the end" (exporters write the largest int32 or int64).
const FAR: i64 = i32::MAX as i64;

/// What a Slice does to one axis.
#[derive(Clone, Debug, PartialEq)]
enum Cut {
    /// Takes these positions, in this order.
    List(Vec<usize>),
    /// Takes all of an axis of unknown size.
    Whole,
    /// Takes `size` positions of an axis of unknown size: those from `first` on, where the step is 1.
    Run { first: Option<Dim>, size: Dim },
    /// Takes an unknown number of positions.
    Unknown,
}

/// The entries of a Slice: for each, the axis and the known bounds.
struct Entry {
    axis: usize,
    start: Option<Dim>,
    end: Option<Dim>,
    step: Option<i64>,
}

/// Entries of a Slice on an input of rank `rank`, in the order of its inputs. `None` where the axes are not known.
fn entries(node: &Node, rank: usize, known: &dyn Fn(usize) -> Option<Vec<Dim>>, len: Option<usize>) -> Option<Vec<Entry>> {
    let (starts, ends) = (known(1), known(2));
    let axes = match node.input(3) {
        Some(_) => known(3)?.iter().map(|a| normalize_axis(a.known()?, rank)).collect::<Option<Vec<_>>>()?,
        None => {
            let count = starts.as_ref().or(ends.as_ref()).map(Vec::len).or(len)?;
            (0..count).map(|a| (a < rank).then_some(a)).collect::<Option<_>>()?
        }
    };
    let steps = if node.input(4).is_some() { known(4) } else { Some(vec![Dim::from(1i64); axes.len()]) };
    let at = |list: &Option<Vec<Dim>>, i: usize| list.as_ref().and_then(|l| l.get(i).cloned());
    let entry = |(i, axis): (usize, &usize)| Entry {
        axis: *axis,
        start: at(&starts, i),
        end: at(&ends, i),
        step: at(&steps, i).and_then(|s| s.known()),
    };
    Some(axes.iter().enumerate().map(entry).collect())
}

fn entries_in(facts: &Facts, node: &Node, rank: usize) -> Option<Vec<Entry>> {
    let known = |slot: usize| Some(facts.get(node.input(slot)?).known.as_ref()?.ints()?.to_vec());
    let len = node.input(1).and_then(|v| facts.shape(v)?.first()?.size());
    entries(node, rank, &known, len)
}

/// The positions of a Slice with numbers for bounds.
fn positions(size: usize, start: i64, end: i64, step: i64) -> Vec<usize> {
    let n = i64::try_from(size).unwrap_or(i64::MAX);
    let from_end = |v: i64| if v < 0 { v.saturating_add(n) } else { v };
    let mut out = Vec::new();
    if step > 0 {
        let (start, end) = (from_end(start).clamp(0, n), from_end(end).clamp(0, n));
        let mut p = start;
        while p < end {
            out.push(p as usize);
            p = p.saturating_add(step);
        }
    } else if step < 0 && n > 0 {
        let (start, end) = (from_end(start).clamp(0, n - 1), from_end(end).clamp(-1, n - 1));
        let mut p = start;
        while p > end {
            out.push(p as usize);
            p = p.saturating_add(step);
        }
    }
    out
}

impl Entry {
    /// What it takes of an axis of size `size`.
    fn cut(&self, size: &Dim) -> Cut {
        let (Some(start), Some(end), Some(step)) = (&self.start, &self.end, self.step) else { return Cut::Unknown };
        match (listed(size), start.known(), end.known()) {
            (Some(n), Some(start), Some(end)) => Cut::List(positions(n, start, end, step)),
            _ if step > 0 => symbolic_run(size, start, end, step),
            _ => Cut::Unknown,
        }
    }
}

fn symbolic_run(size: &Dim, start: &Dim, end: &Dim, step: i64) -> Cut {
    let (first, last) = (bound(start, size), bound(end, size));
    let beyond = (&last - size).known().is_some_and(|n| n > 0);
    let last = if beyond { size.clone() } else { last };
    if first.is(0) && last == *size && step == 1 {
        return Cut::Whole;
    }
    let span = &last - &first;
    let count = span.ceil_div(&Dim::from(step));
    let count = if count.known().is_some_and(|n| n < 0) { Dim::from(0i64) } else { count };
    Cut::Run { first: (step == 1).then_some(first), size: count }
}

/// The position that a bound names on an axis of unknown size; it is taken to lie inside, see the head of the file.
fn bound(v: &Dim, size: &Dim) -> Dim {
    match v.known() {
        Some(n) if n >= FAR => size.clone(),
        Some(n) if n <= -FAR => Dim::from(0i64),
        Some(n) if n < 0 => size + v,
        _ => v.clone(),
    }
}

impl Cut {
    fn size(&self, whole: &Dim) -> Option<Dim> {
        match self {
            Cut::List(list) => Some(Dim::from(list.len())),
            Cut::Whole => Some(whole.clone()),
            Cut::Run { size, .. } => Some(size.clone()),
            Cut::Unknown => None,
        }
    }
}

fn slice_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let Some(input) = cx.shape(0) else { return Ok(vec![Fact::new(cx.dtype(0), None)]) };
    let known = |slot: usize| cx.ints(slot).map(<[_]>::to_vec);
    let len = cx.shape(1).and_then(|s| s.first()?.size());
    let Some(entries) = entries(cx.node, input.len(), &known, len) else {
        if known(3).is_some_and(|axes| axes.iter().all(|a| a.known().is_some())) {
            return Err(cx.error(format!("axes outside rank {}", input.len())));
        }
        let shape = (0..input.len()).map(|a| cx.fresh(&format!("slice{a}"))).collect();
        return Ok(vec![Fact::new(cx.dtype(0), Some(shape))]);
    };
    let mut shape = input.to_vec();
    let mut lists: Vec<Option<Vec<usize>>> = input.iter().map(|d| listed(d).map(|n| (0..n).collect())).collect();
    for entry in &entries {
        if entry.step == Some(0) {
            return Err(cx.error("a step of 0"));
        }
        let cut = entry.cut(&shape[entry.axis]);
        shape[entry.axis] = cut.size(&input[entry.axis]).unwrap_or_else(|| cx.fresh(&format!("slice{}", entry.axis)));
        lists[entry.axis] = if let Cut::List(list) = cut { Some(list) } else { None };
    }
    let lists: Option<Vec<Vec<usize>>> = lists.into_iter().collect();
    let content = lists.and_then(|lists| {
        cx.input(0).moved(&shape, |_, strides| lists.into_iter().zip(strides).map(|(l, s)| along(l, *s)).collect())
    });
    Ok(vec![Fact::new(cx.dtype(0), Some(shape)).with_known(content)])
}

fn slice_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    let input = cx.shape(Slot::In(0));
    let (from, to) = (|a: usize| (Slot::In(0), a), |a: usize| (Slot::Out(0), a));
    let bar = |relations: &mut Relations, a: usize, reason: &str| {
        relations.barrier(from(a), reason);
        relations.barrier(to(a), reason);
    };
    let Some(entries) = entries_in(cx.facts, cx.node, input.len()) else {
        (0..input.len()).for_each(|a| bar(&mut relations, a, "sliced along axes that are only known at run time"));
        return relations;
    };
    for (axis, size) in input.iter().enumerate() {
        match entries.iter().find(|e| e.axis == axis).map(|e| e.cut(size)) {
            None | Some(Cut::Whole) => relations.same(from(axis), to(axis)),
            Some(Cut::List(list)) if list.iter().copied().eq(0..size.size().unwrap_or(0)) => relations.same(from(axis), to(axis)),
            Some(Cut::List(list)) => relations.select(from(axis), to(axis), list, 0),
            Some(Cut::Run { .. }) => bar(&mut relations, axis, "sliced where the size is only known at run time"),
            Some(Cut::Unknown) => bar(&mut relations, axis, "sliced at positions that are only known at run time"),
        }
    }
    relations
}

/// `dx` is `dy` among zeros.
fn slice_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let (dy, x) = (cx.dy()?, cx.input(0));
    let (input, output) = (cx.shape(x).to_vec(), cx.shape(cx.output(0)).to_vec());
    let node = cx.node().clone();
    let known = |slot: usize| Some(cx.numbers(node.input(slot)?)?.into_iter().map(Dim::from).collect());
    let entries = entries(&node, input.len(), &known, None).ok_or("Slice along axes that are only known at run time")?;
    let mut grad = Sized { value: dy, shape: output.clone() };
    for entry in &entries {
        let (axis, size) = (entry.axis, &input[entry.axis]);
        let unknown = || format!("what Slice takes of axis {axis} is only known at run time");
        let first = match (entry.cut(size), &entry.start) {
            (Cut::Whole, _) => continue,
            (Cut::List(list), _) => {
                grad = scatter_along(cx, grad, axis, &list, size.size().unwrap_or(0))?;
                continue;
            }
            (Cut::Run { first: Some(first), .. }, _) => first,
            // The end does not matter: the output's size says it.
            (Cut::Unknown, Some(start)) if entry.step == Some(1) => bound(start, size),
            _ => return Err(unknown()),
        };
        let behind = &(size - &first) - &output[axis];
        if size == &output[axis] {
            continue;
        }
        grad = pad_at_run_time(cx, grad, axis, (first.size(), behind.size()), size).ok_or_else(unknown)?;
    }
    cx.give(0, grad.value);
    Ok(())
}

/// `v` between numbers of zeros, of which one may be known at run time only; `None` where both are.
fn pad_at_run_time(
    cx: &mut GradCx<'_>,
    v: Sized,
    axis: usize,
    (before, behind): (Option<usize>, Option<usize>),
    size: &Dim,
) -> Option<Sized> {
    let mut shape = v.shape.clone();
    shape[axis] = size.clone();
    if let (Some(before), Some(behind)) = (before, behind) {
        return Some(Sized { value: padded(cx, &v, axis, before, behind), shape });
    }
    if before.is_none() && behind.is_none() {
        return None;
    }
    let half = padded(cx, &v, axis, before.unwrap_or(0), behind.unwrap_or(0));
    let (x, at) = (cx.input(0), cx.b.ints(&[axis as i64]));
    let [whole, part] = [x, half].map(|v| {
        let sizes = cx.b.shape_of(v);
        cx.b.gather(sizes, at, 0)
    });
    let missing = cx.b.sub(whole, part);
    let sizes = sizes_with(cx, &v, axis, missing);
    let block = zeros(cx, x, sizes);
    let parts = if before.is_some() { [half, block] } else { [block, half] };
    Some(Sized { value: cx.b.concat(&parts, axis as i64), shape })
}

/// Bounds that take the kept positions from what is left of each cut axis.
fn slice_refit(cx: &mut RefitCx<'_>) -> Result<(), RefitError> {
    let input = cx.old_input(0);
    let Some(entries) = entries_in(cx.facts, cx.node(), input.len()) else { return untouched(cx, 0..input.len()) };
    let mut patches = [(START, Vec::new()), (END, Vec::new()), (STEP, Vec::new())];
    for (i, entry) in entries.iter().enumerate() {
        let axis = entry.axis;
        let (kept_in, kept_out) = (cx.kept_input(0, axis), cx.kept_output(0, axis));
        if kept_in.is_none() && kept_out.is_none() {
            continue;
        }
        let (Cut::List(old), Some(start), Some(end), Some(step)) = (
            entry.cut(&input[axis]),
            entry.start.as_ref().and_then(Dim::known),
            entry.end.as_ref().and_then(Dim::known),
            entry.step,
        ) else {
            return untouched(cx, axis..axis + 1);
        };
        let size = kept_in.map_or(input[axis].size().unwrap_or(0), <[_]>::len);
        // What took nothing of the whole axis takes nothing of less of it: the rest of a head that is rotated as a whole.
        if old.is_empty() && positions(size, start, end, step).is_empty() {
            continue;
        }
        let wanted = kept_positions(cx, &old, kept_in, kept_out)?;
        let has_step = cx.node().input(STEP).is_some();
        let new = bounds(&wanted, size, (start, end, step)).filter(|new| new.2 == step || has_step).unwrap_or_else(|| {
            // No run of equal steps: a Gather takes them, and the Slice all of that.
            cx.take_input(0, axis, &wanted);
            (0, i64::MAX, 1)
        });
        for ((_, list), (old, new)) in patches.iter_mut().zip([(start, new.0), (end, new.1), (step, new.2)]) {
            if old != new {
                list.push((i, new));
            }
        }
    }
    for (slot, list) in patches {
        cx.patch_ints(slot, list);
    }
    Ok(())
}

/// Axes whose slice is not known must be whole.
fn untouched(cx: &RefitCx<'_>, mut axes: std::ops::Range<usize>) -> Result<(), RefitError> {
    match axes.find(|a| cx.kept_input(0, *a).is_some() || cx.kept_output(0, *a).is_some()) {
        Some(axis) => Err(cx.error(format!("what it takes of axis {axis} is only known at run time"))),
        None => Ok(()),
    }
}

/// New positions of what stays of the output, of the old positions `old`.
fn kept_positions(
    cx: &RefitCx<'_>,
    old: &[usize],
    kept_in: Option<&[usize]>,
    kept_out: Option<&[usize]>,
) -> Result<Vec<usize>, RefitError> {
    let all: Vec<usize> = (0..old.len()).collect();
    let new = |j: &usize| moved_to(*old.get(*j)?, kept_in);
    let wanted: Option<Vec<usize>> = kept_out.unwrap_or(&all).iter().map(new).collect();
    wanted.filter(|w| !w.is_empty()).ok_or_else(|| cx.error("it takes positions that were removed, or none are left"))
}

/// Start, end and step that take `wanted` of an axis of size `size`; those of `old` that still do so stay.
fn bounds(wanted: &[usize], size: usize, old: (i64, i64, i64)) -> Option<(i64, i64, i64)> {
    if positions(size, old.0, old.1, old.2) == wanted {
        return Some(old);
    }
    let (first, last) = (*wanted.first()? as i64, *wanted.last()? as i64);
    let step = match wanted {
        [a, b, ..] => *b as i64 - *a as i64,
        _ => old.2,
    };
    // In front of the first position there is no other way to stop than a bound far below.
    let end = if step < 0 && last == 0 { -FAR } else { last + step.signum() };
    let candidates = [(old.0, end), (first, old.1), (first, end)];
    candidates.into_iter().map(|(s, e)| (s, e, step)).find(|(s, e, step)| positions(size, *s, *e, *step) == wanted)
}

/// Elements added before and behind each axis; `None` where not known.
fn pads(node: &Node, opset: i64, rank: usize, known: &dyn Fn(usize) -> Option<Vec<Dim>>) -> Option<Vec<(Dim, Dim)>> {
    let amounts = known(1)?;
    let axes: Vec<usize> = match node.input(3).filter(|_| opset >= 18) {
        Some(_) => known(3)?.iter().map(|a| normalize_axis(a.known()?, rank)).collect::<Option<_>>()?,
        None => (0..rank).collect(),
    };
    if amounts.len() != 2 * axes.len() {
        return None;
    }
    let mut out = vec![(Dim::from(0i64), Dim::from(0i64)); rank];
    for (i, axis) in axes.iter().enumerate() {
        out[*axis] = (amounts[i].clone(), amounts[i + axes.len()].clone());
    }
    Some(out)
}

fn pad_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let Some(input) = cx.shape(0) else { return Ok(vec![Fact::new(cx.dtype(0), None)]) };
    let known = |slot: usize| cx.ints(slot).map(<[_]>::to_vec);
    let shape = match pads(cx.node, cx.opset, input.len(), &known) {
        Some(pads) => input.iter().zip(&pads).map(|(size, (before, behind))| &(size + before) + behind).collect(),
        None => (0..input.len()).map(|a| cx.fresh(&format!("pad{a}"))).collect(),
    };
    Ok(vec![Fact::new(cx.dtype(0), Some(shape))])
}

fn pad_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    let rank = cx.shape(Slot::In(0)).len();
    let known = |slot: usize| Some(cx.fact(Slot::In(slot)).known.as_ref()?.ints()?.to_vec());
    let pads = pads(cx.node, cx.opset, rank, &known);
    for axis in 0..rank {
        let (from, to) = ((Slot::In(0), axis), (Slot::Out(0), axis));
        if pads.as_ref().is_some_and(|p| p[axis].0.is(0) && p[axis].1.is(0)) {
            relations.same(from, to);
        } else {
            relations.barrier(from, "padded");
            relations.barrier(to, "padded");
        }
    }
    relations
}

/// `dx` is `dy` without what was added.
fn pad_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let dy = cx.dy()?;
    if let Some(mode) = cx.node().attr_str("mode").filter(|m| *m != "constant") {
        return Err(format!("Pad of mode {mode} has no gradient rule"));
    }
    let rank = cx.shape(cx.input(0)).len();
    let pads = {
        let node = cx.node().clone();
        let known = |slot: usize| Some(cx.numbers(node.input(slot)?)?.into_iter().map(Dim::from).collect());
        pads(&node, cx.opset(), rank, &known).ok_or("Pad by amounts that are only known at run time")?
    };
    let (mut starts, mut ends, mut axes) = (Vec::new(), Vec::new(), Vec::new());
    for (axis, (before, behind)) in pads.iter().enumerate() {
        let (Some(before), Some(behind)) = (before.known(), behind.known()) else {
            return Err("Pad by amounts that are only known at run time".into());
        };
        if before < 0 || behind < 0 {
            return Err("Pad by negative amounts has no gradient rule".into());
        }
        if before > 0 || behind > 0 {
            starts.push(before);
            ends.push(if behind == 0 { i64::MAX } else { -behind });
            axes.push(axis as i64);
        }
    }
    let dx = if axes.is_empty() { dy } else { cx.b.slice(dy, &starts, &ends, &axes) };
    cx.give(0, dx);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::positions;
    use crate::graph::ValueId;
    use crate::ops::probe::{Probe, int_attr};

    fn slice(p: &mut Probe, x: ValueId, starts: &[i64], ends: &[i64], axes: &[i64], steps: &[i64]) -> ValueId {
        let (starts, ends, axes, steps) = (p.ints(starts), p.ints(ends), p.ints(axes), p.ints(steps));
        p.op("Slice", &[x, starts, ends, axes, steps], vec![])
    }

    #[test]
    fn bounds_are_those_of_numpy() {
        for (size, bounds, list) in [
            (5, (1, 3, 1), &[1usize, 2][..]),
            (5, (-2, i64::MAX, 1), &[3, 4]),
            (5, (0, -1, 2), &[0, 2]),
            (5, (9, 12, 1), &[]),
            (5, (-1, i64::MIN, -2), &[4, 2, 0]),
            (5, (4, 0, -1), &[4, 3, 2, 1]),
            (5, (3, 1, 1), &[]),
            (0, (0, 5, 1), &[]),
            (0, (0, -5, -1), &[]),
        ] {
            assert_eq!(positions(size, bounds.0, bounds.1, bounds.2), list, "{size} {bounds:?}");
        }
    }

    #[test]
    fn slices_of_sizes_and_contents() {
        let mut p = Probe::new(17);
        let c = p.ints_of(&[2, 4], &[0, 1, 2, 3, 4, 5, 6, 7]);
        let y = slice(&mut p, c, &[3], &[-9], &[-1], &[-2]);
        assert_eq!((p.shape(y).as_str(), p.content(y).as_str()), ("2 2", "3 1 7 5"));
        let x = p.input("x", "b n 8");
        for (start, end, shape) in
            [(1, i64::MAX, "b n-1 8"), (0, 1, "b 1 8"), (0, i64::MAX, "b n 8"), (-1, i64::MAX, "b 1 8"), (2, -1, "b n-3 8")]
        {
            let y = slice(&mut p, x, &[start], &[end], &[1], &[1]);
            assert_eq!(p.shape(y).replace("+-", "-"), shape, "{start} {end}");
        }
        slice(&mut p, x, &[0], &[1], &[3], &[1]);
        assert_eq!(p.error().what, "axes outside rank 3");
    }

    #[test]
    fn symbolic_ends_are_sizes() {
        let mut p = Probe::new(17);
        let (table, like) = (p.input("table", "1 512 8"), p.input("x", "b n"));
        let shape = p.op("Shape", &[like], vec![]);
        let one = p.ints(&[1]);
        let end = p.op("Gather", &[shape, one], vec![int_attr("axis", 0)]);
        let zero = p.ints(&[0]);
        let y = p.op("Slice", &[table, zero, end, one, one], vec![]);
        assert_eq!(p.shape(y), "1 n 8");
        assert_eq!(p.axes(y)[1], "in0.1 | sliced where the size is only known at run time");
        let x = p.input("y", "b n 8");
        let whole = p.op("Slice", &[x, zero, end, one, one], vec![]);
        assert_eq!((p.shape(whole).as_str(), p.axes(whole)[1].as_str()), ("b n 8", "in0.1 = out0.1"));
        let ops = p.grad(y).expect("the start is a number");
        assert_eq!(ops.last().map(String::as_str), Some("Concat"));
    }

    #[test]
    fn axes_are_positions() {
        let mut p = Probe::new(17);
        let x = p.input("x", "b n 4");
        let y = slice(&mut p, x, &[3, 1], &[i64::MIN, i64::MAX], &[2, 1], &[-2, 1]);
        let links = [
            "in0.0 = out0.0",
            "in0.1 | sliced where the size is only known at run time",
            "out0.1 | sliced where the size is only known at run time",
            "in0.2[3, 1] -> out0.2@0",
        ];
        assert_eq!(p.axes(y), links);
        let whole = slice(&mut p, x, &[0], &[100], &[2], &[1]);
        assert_eq!(p.axes(whole)[2], "in0.2 = out0.2");
        let axes = p.typed_input("axes", "1", crate::graph::DType::I64);
        let one = p.ints(&[1]);
        let unknown = p.op("Slice", &[x, one, one, axes], vec![]);
        assert_eq!(p.shape(unknown), "slice0.n2 slice1.n2 slice2.n2");
        assert_eq!(p.axes(unknown).len(), 6);
    }

    #[test]
    fn bounds_follow_cuts() {
        let mut p = Probe::new(17);
        let x = p.input("x", "b 8");
        let half = slice(&mut p, x, &[4], &[i64::MAX], &[1], &[1]);
        // Of 0..8 stay 0, 2, 4, 6, 7: the second half are the last three.
        let kept: &[usize] = &[0, 2, 4, 6, 7];
        assert_eq!(p.refit(half, &[(x, 1, kept), (half, 1, &[0, 2, 3])]), Ok(vec![(1, vec![(0, 2)])]));
        let first = slice(&mut p, x, &[0], &[4], &[1], &[1]);
        assert_eq!(p.refit(first, &[(x, 1, kept), (first, 1, &[0, 2])]), Ok(vec![(2, vec![(0, 2)])]));
        let even = slice(&mut p, x, &[0], &[i64::MAX], &[1], &[2]);
        assert_eq!(p.refit(even, &[(x, 1, &[0, 1, 4, 5]), (even, 1, &[0, 2])]), Ok(vec![]));
        assert_eq!(p.refit(even, &[(x, 1, &[0, 2, 5]), (even, 1, &[0, 1])]), Ok(vec![(2, vec![(0, 2)]), (4, vec![(0, 1)])]));
        assert!(p.refit(even, &[(x, 1, &[1, 3])]).is_err(), "reads what was removed");
        let reverse = slice(&mut p, x, &[-1], &[i64::MIN], &[1], &[-1]);
        assert_eq!(p.refit(reverse, &[(x, 1, &[0, 2]), (reverse, 1, &[5, 7])]), Ok(vec![]));
        assert_eq!(p.refit(reverse, &[(x, 0, &[0])]), Ok(vec![]));
        // 0, 2, 3 is no run: a Gather takes them, and the Slice all of that.
        assert_eq!(p.refit(even, &[(x, 1, &[0, 1, 2, 4]), (even, 1, &[0, 1, 2])]), Ok(vec![(4, vec![(0, 1)])]));
        let taken = p.graph.node(p.producer(even)).input(0).expect("it reads something");
        assert_eq!(p.graph.node(p.producer(taken)).op(), "Gather");
    }

    #[test]
    fn gradients_put_zeros_around() {
        let mut p = Probe::new(17);
        let x = p.input("x", "b 8");
        let middle = slice(&mut p, x, &[2], &[6], &[1], &[1]);
        assert_eq!(p.grad(middle).map(|ops| ops.last().cloned()), Ok(Some("Concat".into())));
        let steps = slice(&mut p, x, &[1], &[i64::MAX], &[1], &[2]);
        assert_eq!(p.grad(steps).map(|ops| ops.last().cloned()), Ok(Some("Gather".into())));
        let reverse = slice(&mut p, x, &[-1], &[i64::MIN], &[1], &[-1]);
        assert_eq!(p.grad(reverse), Ok(vec!["Gather".into()]));
        let last = p.input("y", "b n 8");
        let y = slice(&mut p, last, &[-1], &[i64::MAX], &[1], &[1]);
        assert_eq!(p.grad(y).map(|ops| ops.last().cloned()), Ok(Some("Concat".into())));
    }

    #[test]
    fn pads_add() {
        let mut p = Probe::new(17);
        let x = p.input("x", "b n 8");
        let pads = p.ints(&[0, 1, 0, 0, 2, 0]);
        let y = p.op("Pad", &[x, pads], vec![]);
        assert_eq!(p.shape(y), "b n+3 8");
        assert_eq!(p.axes(y), ["in0.0 = out0.0", "in0.1 | padded", "out0.1 | padded", "in0.2 = out0.2"]);
        assert_eq!(p.grad(y), Ok(vec!["Slice".into()]));
        let mut p = Probe::new(18);
        let x = p.input("x", "b n 8");
        let (pads, axes) = (p.ints(&[1, 1]), p.ints(&[-1]));
        let y = p.node("Pad", &[Some(x), Some(pads), None, Some(axes)], vec![], 1);
        assert_eq!(p.shape(p.out(y, 0)), "b n 10");
    }
}
