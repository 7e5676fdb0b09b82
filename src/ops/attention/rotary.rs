//! RotaryEmbedding (opset 23 and 24): pairs of positions of each head are rotated by an angle that depends on the token.
//!
//! Shape: `x [B, H, N, E]` or `[B, N, H*E]`, cos and sin `[B, N, R/2]`, or `[positions, R/2]` with `position_ids [B, N]`; output as
//! `x`. Of each head the first R positions (all where `rotary_embedding_dim` is 0) are rotated: position i with `i + R/2`, or
//! `2i` with `2i + 1` where interleaved. `real = cos * a - sin * b`, `imag = sin * a + cos * b`.
//! Example: E = 8: the halves `a` and `b` of the width are virtual values of 4 that are cut together, with the last axis of cos
//! and sin.

use super::{relate, remains, token_axis};
use crate::autodiff::GradCx;
use crate::axes::relation::{At, AxesCx, Relations, Slot};
use crate::graph::build::attr;
use crate::graph::{AttrValue, Node, ValueId};
use crate::infer::{Dim, Fact, InferCx, InferError};
use crate::ops::{Axes, Cost, Grad, OpRule, Refit};
use crate::slice::refit::{RefitCx, RefitError};
use bytes::Bytes;

/// The record.
pub(super) const RULE: OpRule = OpRule {
    name: "RotaryEmbedding",
    domain: "",
    opsets: (23, 24),
    infer: rotary_infer,
    axes: Axes::Rule(rotary_axes),
    grad: Grad::Rule(rotary_grad),
    cost: Cost::Free,
    refit: Refit::Rule(rotary_refit),
};

/// Heads, their width, and how much of it is rotated.
pub(crate) struct Layout {
    pub(crate) heads: Dim,
    pub(crate) width: usize,
    pub(crate) rotated: usize,
    pub(crate) interleaved: bool,
}

/// Where the tables are, and the positions at which they are looked up.
#[derive(Clone, Copy)]
pub(crate) struct Tables {
    pub(crate) cos: Slot,
    pub(crate) sin: Slot,
    pub(crate) positions: Slot,
}

fn layout(node: &Node, x: &[Dim]) -> Result<Layout, String> {
    let heads = match x {
        [_, heads, _, _] => heads.clone(),
        [_, _, _] => node.attr_int("num_heads").filter(|n| *n > 0).map(Dim::from).ok_or("num_heads is missing")?,
        _ => return Err(format!("an input of rank {}, expected 3 or 4", x.len())),
    };
    let width = if x.len() == 4 { Some(x[3].clone()) } else { x[2].exact_div(&heads) };
    let width = width.and_then(|w| w.size()).ok_or("the width of a head is not known")?;
    let rotated = match usize::try_from(node.attr_int("rotary_embedding_dim").unwrap_or(0)) {
        Ok(0) => width,
        Ok(r) => r,
        Err(_) => return Err("a negative rotary_embedding_dim".to_string()),
    };
    if rotated % 2 != 0 || rotated > width {
        return Err(format!("{rotated} rotated positions of {width}"));
    }
    Ok(Layout { heads, width, rotated, interleaved: node.attr_int("interleaved").unwrap_or(0) != 0 })
}

pub(crate) fn rotary_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let shape = cx.shape(0).map(<[_]>::to_vec);
    if shape.as_ref().is_some_and(|s| s.len() != 3 && s.len() != 4) {
        return Err(cx.error("an input of another rank than 3 or 4"));
    }
    Ok(vec![Fact::new(cx.dtype(0), shape)])
}

/// `b h n (a|b|rest), b n a, b n a -> b h n (a|b|rest)`, the rotated halves `a` and `b` being cut together.
fn rotary_axes(cx: &AxesCx<'_>) -> Relations {
    let tables = Tables { cos: Slot::In(1), sin: Slot::In(2), positions: Slot::In(3) };
    rotation(cx, layout(cx.node, cx.shape(Slot::In(0))), tables)
}

/// The relations of a rotation of input 0 with this layout.
pub(crate) fn rotation(cx: &AxesCx<'_>, found: Result<Layout, String>, tables: Tables) -> Relations {
    let mut relations = Relations::default();
    let (x, y) = (cx.shape(Slot::In(0)), Slot::Out(0));
    let tokens = token_axis(x);
    let r = &mut relations;
    r.same((Slot::In(0), 0), (y, 0));
    r.same((Slot::In(0), tokens), (y, tokens));
    let Ok(l) = found else {
        for axis in (1..x.len()).filter(|a| *a != tokens) {
            r.barrier((Slot::In(0), axis), "a rotation of unknown width");
            r.barrier((y, axis), "a rotation of unknown width");
        }
        return relations;
    };
    let (x_head, x_width) = head_and_width(r, Slot::In(0), x.len(), &l);
    let (y_head, y_width) = head_and_width(r, y, x.len(), &l);
    r.same(x_head, y_head);
    let pair = rotated_axes(r, (x_width, y_width), x_head, &l);
    if l.rotated < l.width {
        let rest = r.virtual_value(vec![l.heads.clone(), Dim::from(l.width - l.rotated)]);
        r.same((rest, 0), x_head);
        r.select(x_width, (rest, 1), (l.rotated..l.width).collect(), 0);
        r.select((rest, 1), y_width, (0..l.width - l.rotated).collect(), l.rotated);
    }
    for slot in [tables.cos, tables.sin] {
        table_axes(cx, r, slot, pair, &l);
    }
    if let [batch, n] = cx.shape(tables.positions) {
        relate(r, ((tables.positions, 0), batch), &[(y, 0)], &x[0]);
        relate(r, ((tables.positions, 1), n), &[(y, tokens)], &x[tokens]);
    }
    relations
}

/// The axes of heads and of a head's width, through a virtual value where they share an axis.
fn head_and_width(relations: &mut Relations, slot: Slot, rank: usize, l: &Layout) -> (At, At) {
    if rank == 4 {
        return ((slot, 1), (slot, 3));
    }
    let v = relations.virtual_value(vec![l.heads.clone(), Dim::from(l.width)]);
    relations.regroup((slot, vec![2]), (v, vec![0, 1]));
    ((v, 0), (v, 1))
}

/// Relates the rotated positions of input and output, and returns the axis of pairs.
fn rotated_axes(relations: &mut Relations, (x, y): (At, At), head: At, l: &Layout) -> At {
    let half = l.rotated / 2;
    let size = |n: usize| vec![l.heads.clone(), Dim::from(n)];
    if l.interleaved {
        // (pairs, 2) of the first R positions, and each of the two by itself.
        let mut pair = None;
        for (axis, reads) in [(x, true), (y, false)] {
            let mut whole = axis;
            if l.rotated < l.width {
                let part = relations.virtual_value(size(l.rotated));
                whole = (part, 1);
                relations.same((part, 0), head);
                let (from, to) = if reads { (axis, whole) } else { (whole, axis) };
                relations.select(from, to, (0..l.rotated).collect(), 0);
            }
            let v = relations.virtual_value(vec![Dim::from(half), Dim::from(2i64)]);
            relations.regroup((whole.0, vec![whole.1]), (v, vec![0, 1]));
            for place in 0..2 {
                let one = relations.virtual_value(vec![Dim::from(half), Dim::from(1i64)]);
                relations.same((v, 0), (one, 0));
                if reads {
                    relations.select((v, 1), (one, 1), vec![place], 0);
                } else {
                    relations.select((one, 1), (v, 1), vec![0], place);
                }
                match pair {
                    Some(first) => relations.same((one, 0), first),
                    None => pair = Some((one, 0)),
                }
            }
        }
        return pair.unwrap_or(x);
    }
    let parts = [0, half].map(|start| {
        let part = relations.virtual_value(size(half));
        relations.same((part, 0), head);
        relations.select(x, (part, 1), (start..start + half).collect(), 0);
        relations.select((part, 1), y, (0..half).collect(), start);
        (part, 1)
    });
    relations.same(parts[0], parts[1]);
    parts[0]
}

/// Tables of cosines or sines: `[B, N, R/2]`, or `[positions, R/2]` with position ids.
fn table_axes(cx: &AxesCx<'_>, relations: &mut Relations, slot: Slot, pair: At, l: &Layout) {
    let (table, x) = (cx.shape(slot), cx.shape(Slot::In(0)));
    let half = Dim::from(l.rotated / 2);
    let Some((last, front)) = table.split_last() else { return };
    relate(relations, ((slot, front.len()), last), &[pair], &half);
    if let [batch, n] = front {
        let tokens = token_axis(x);
        relate(relations, ((slot, 0), batch), &[(Slot::Out(0), 0)], &x[0]);
        relate(relations, ((slot, 1), n), &[(Slot::Out(0), tokens)], &x[tokens]);
    } else {
        (0..front.len()).for_each(|axis| relations.barrier((slot, axis), "positions are looked up in this axis"));
    }
}

/// Head count and rotated width follow the cut. Heads keep the same positions, so the first that remains speaks for all.
pub(crate) fn rotary_refit(cx: &mut RefitCx<'_>) -> Result<(), RefitError> {
    let before = cx.node().attr_int("num_heads");
    let rotated = cx.node().attr_int("rotary_embedding_dim").unwrap_or(0);
    let Some(left) = remains(cx, 0, before)? else { return Ok(()) };
    let as_int = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
    if before.is_some_and(|b| b > 0 && b != as_int(left.heads)) {
        cx.set_attr("num_heads", AttrValue::Int(as_int(left.heads)));
    }
    let kept = left.first.iter().filter(|p| as_int(**p) < rotated || rotated == 0).count();
    if kept % 2 != 0 {
        return Err(cx.error("a rotation lost one of its two positions"));
    }
    if rotated > 0 && as_int(kept) != rotated {
        if kept == 0 {
            return Err(cx.error("no rotated position remains"));
        }
        cx.set_attr("rotary_embedding_dim", AttrValue::Int(as_int(kept)));
    }
    Ok(())
}

/// Rotation by the negative angle: `da = cos * dreal + sin * dimag`, `db = cos * dimag - sin * dreal`. The tables get, summed
/// over heads, `dcos = dreal * a + dimag * b` and `dsin = dimag * a - dreal * b`.
fn rotary_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let (dy, x) = (cx.dy()?, cx.input(0));
    let shape = cx.shape(x);
    let l = layout(cx.node(), shape)?;
    let flat = shape.len() == 3;
    let d = split_heads(cx, dy, flat, &l)?;
    let (real, imag) = rotated_parts(cx, d, &l);
    if cx.wants(0) {
        let [cos, sin] = [1, 2].map(|slot| table(cx, slot, if flat { 2 } else { 1 }));
        let (p, q) = (cx.b.mul(real, cos), cx.b.mul(imag, sin));
        let da = cx.b.add(p, q);
        let (p, q) = (cx.b.mul(imag, cos), cx.b.mul(real, sin));
        let db = cx.b.sub(p, q);
        let dx = joined(cx, (da, db), d, &l);
        let dx = if flat { cx.b.reshape(dx, &[0, 0, -1]) } else { dx };
        cx.give(0, dx);
    }
    if cx.wants(1) || cx.wants(2) {
        let x = split_heads(cx, x, flat, &l)?;
        let (a, b) = rotated_parts(cx, x, &l);
        let head_axis = if flat { 2 } else { 1 };
        for (slot, first, second) in [(1, (real, a), (imag, b)), (2, (imag, a), (real, b))] {
            if cx.wants(slot) {
                let (p, q) = (cx.b.mul(first.0, first.1), cx.b.mul(second.0, second.1));
                let sum = if slot == 1 { cx.b.add(p, q) } else { cx.b.sub(p, q) };
                let sum = cx.b.reduce_sum(sum, &[head_axis], false);
                let grad = table_grad(cx, sum, slot);
                cx.give(slot, grad);
            }
        }
    }
    Ok(())
}

/// `[B, N, H*E] -> [B, N, H, E]`; rank 4 stays.
fn split_heads(cx: &mut GradCx<'_>, value: ValueId, flat: bool, l: &Layout) -> Result<ValueId, String> {
    if !flat {
        return Ok(value);
    }
    let heads = l.heads.known().ok_or("the number of heads is not known")?;
    Ok(cx.b.reshape(value, &[0, 0, heads, l.width as i64]))
}

/// The two positions of each pair, `[.., R/2]` each.
fn rotated_parts(cx: &mut GradCx<'_>, value: ValueId, l: &Layout) -> (ValueId, ValueId) {
    let (rotated, half) = (l.rotated as i64, l.rotated as i64 / 2);
    if !l.interleaved {
        return (cx.b.slice(value, &[0], &[half], &[3]), cx.b.slice(value, &[half], &[rotated], &[3]));
    }
    let front = cx.b.slice(value, &[0], &[rotated], &[3]);
    let pairs = cx.b.reshape(front, &[0, 0, 0, half, 2]);
    let [first, second] = [0, 1].map(|i| {
        let part = cx.b.slice(pairs, &[i], &[i + 1], &[4]);
        cx.b.squeeze(part, &[4])
    });
    (first, second)
}

/// The parts put back in their places, with the positions of `whole` that are not rotated behind them.
fn joined(cx: &mut GradCx<'_>, (first, second): (ValueId, ValueId), whole: ValueId, l: &Layout) -> ValueId {
    let (width, rotated) = (l.width as i64, l.rotated as i64);
    let mut pieces = if l.interleaved {
        let (first, second) = (cx.b.unsqueeze(first, &[4]), cx.b.unsqueeze(second, &[4]));
        let pairs = cx.b.concat(&[first, second], 4);
        vec![cx.b.reshape(pairs, &[0, 0, 0, rotated])]
    } else {
        vec![first, second]
    };
    if rotated < width {
        pieces.push(cx.b.slice(whole, &[rotated], &[width], &[3]));
    }
    if pieces.len() == 1 { pieces[0] } else { cx.b.concat(&pieces, 3) }
}

/// A table as `[B, N, R/2]`, with an axis of 1 for the heads at `head_axis`.
fn table(cx: &mut GradCx<'_>, slot: usize, head_axis: i64) -> ValueId {
    let mut value = cx.input(slot);
    if let Some(ids) = cx.node().input(3) {
        value = cx.b.gather(value, ids, 0);
    }
    cx.b.unsqueeze(value, &[head_axis])
}

/// The gradient of a table: that of its rows in use, each added at its position.
fn table_grad(cx: &mut GradCx<'_>, rows: ValueId, slot: usize) -> ValueId {
    let Some(ids) = cx.node().input(3) else { return rows };
    let table = cx.input(slot);
    let zero = cx.scalar(0.0, table);
    let shape = cx.b.shape_of(table);
    let zeros = cx.b.op("Expand", &[zero, shape], vec![]);
    let at = cx.b.unsqueeze(ids, &[2]);
    cx.b.op("ScatterND", &[zeros, at, rows], vec![attr("reduction", AttrValue::Str(Bytes::from_static(b"add")))])
}

#[cfg(test)]
mod tests {
    use crate::ops::matmul::one_node::{graph, ints, links, refit, shapes};

    #[test]
    fn halves_are_cut_together() {
        let g = graph("RotaryEmbedding", 23, &["b 3 n 8", "b n 4", "b n 4"], vec![], 1);
        assert_eq!(shapes(&g), Ok(vec!["b 3 n 8".to_string()]));
        let expected = [
            "in0.0=out0.0",
            "in0.2=out0.2",
            "in0.1=out0.1",
            "v0.0=in0.1",
            "in0.3[0..=3]>v0.1@0",
            "v0.1[0..=3]>out0.3@0",
            "v1.0=in0.1",
            "in0.3[4..=7]>v1.1@0",
            "v1.1[0..=3]>out0.3@4",
            "v0.1=v1.1",
            "in1.2=v0.1",
            "in1.0=out0.0",
            "in1.1=out0.2",
            "in2.2=v0.1",
            "in2.0=out0.0",
            "in2.1=out0.2",
        ];
        assert_eq!(links(&g), expected);
    }

    #[test]
    fn neighbours_are_cut_together() {
        let attrs = ints(&[("interleaved", 1), ("num_heads", 2), ("rotary_embedding_dim", 4)]);
        let g = graph("RotaryEmbedding", 23, &["b n 12", "50 2", "50 2", "b n"], attrs, 1);
        let expected = [
            "in0.0=out0.0",
            "in0.1=out0.1",
            "in0.2~v0.0,v0.1",
            "out0.2~v1.0,v1.1",
            "v0.0=v1.0",
            "v2.0=v0.0",
            "v0.1[0..=3]>v2.1@0",
            "v2.1~v3.0,v3.1",
            "v3.0=v4.0",
            "v3.1[0..=0]>v4.1@0",
            "v3.0=v5.0",
            "v3.1[1..=1]>v5.1@0",
            "v5.0=v4.0",
            "v6.0=v0.0",
            "v6.1[0..=3]>v1.1@0",
            "v6.1~v7.0,v7.1",
            "v7.0=v8.0",
            "v8.1[0..=0]>v7.1@0",
            "v8.0=v4.0",
            "v7.0=v9.0",
            "v9.1[0..=0]>v7.1@1",
            "v9.0=v4.0",
            "v10.0=v0.0",
            "v0.1[4..=5]>v10.1@0",
            "v10.1[0..=1]>v1.1@4",
            "in1.1=v4.0",
            "!in1.0",
            "in2.1=v4.0",
            "!in2.0",
            "in3.0=out0.0",
            "in3.1=out0.1",
        ];
        assert_eq!(links(&g), expected);
    }

    #[test]
    fn rotated_width_follows_the_cut() {
        let attrs = ints(&[("num_heads", 2), ("rotary_embedding_dim", 4)]);
        let mut g = graph("RotaryEmbedding", 23, &["b n 12", "b n 2", "b n 2"], attrs, 1);
        assert_eq!(refit(&mut g, &[(0, 2, vec![1, 3, 4, 7, 9, 10])]), Ok(vec![]));
        assert_eq!(g.node(g.order()[0]).attr_int("rotary_embedding_dim"), Some(2));
        assert_eq!(refit(&mut g, &[(0, 2, vec![0, 1, 2, 3, 4, 5])]), Ok(vec![]));
        assert_eq!(g.node(g.order()[0]).attr_int("num_heads"), Some(1));
    }

    #[test]
    fn an_unknown_width_is_a_barrier() {
        let g = graph("RotaryEmbedding", 23, &["b n 12", "b n 2", "b n 2"], vec![], 1);
        assert_eq!(links(&g), ["in0.0=out0.0", "in0.1=out0.1", "!in0.2", "!out0.2"]);
    }
}
