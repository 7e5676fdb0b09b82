//! The twin: the model with the plan's removed units zeroed and nothing cut.
//!
//! Units are zeroed in the constants that the slice cuts. Tokens get -1e4 on their key logits, and means over tokens count only those
//! that stay. What the plan edited takes the values of the sliced model, padded with zeros.

use super::tokens::{kept_tokens, sites_of};
use super::{Sliced, TensorCut};
use crate::anatomy::{Anatomy, FIXED, FusedKeys};
use crate::graph::build::Builder;
use crate::graph::{DType, Graph, Tensor, Use, ValueId};
use crate::infer::Facts;
use crate::ops::quantize::values;
use crate::plan::Kept;
use std::collections::{BTreeMap, BTreeSet};

/// What a key logit of a removed token gets: far below every real logit, and finite in float16.
pub const MASKED: f32 = -1e4;

/// Builds the twin of `sliced`, which was made from `graph` by keeping `kept`. `edited` names tensors that take their values
/// from `sliced`.
pub fn build(graph: &Graph, facts: &Facts, anatomy: &Anatomy, kept: &Kept, sliced: &Sliced, edited: &BTreeSet<String>) -> Graph {
    let mut out = graph.clone();
    let mut by_name: BTreeMap<&str, Vec<&TensorCut>> = BTreeMap::new();
    for cut in &sliced.cuts {
        by_name.entry(&cut.initializer).or_default().push(cut);
    }
    // Constants that tokens alone cut keep their values: the masks speak for them.
    let token_constants: BTreeSet<_> = token_constants(graph, anatomy, kept);
    for (name, cuts) in by_name {
        let Some(v) = graph.find(name) else { continue };
        let Some(tensor) = graph.constant(v) else { continue };
        let of_units: Vec<&TensorCut> =
            cuts.into_iter().filter(|c| !token_constants.contains(&(name.to_string(), c.axis))).collect();
        let from = edited.contains(name).then(|| sliced.graph.find(name).and_then(|v| sliced.graph.constant(v))).flatten();
        let zeroed = match from {
            Some(small) => spread(&tensor, &small, &of_units),
            None => without(graph, v, tensor, &of_units),
        };
        out.set_constant(v, zeroed);
    }
    for name in edited {
        let uncut = !sliced.cuts.iter().any(|c| c.initializer == *name);
        if let (true, Some(v), Some(t)) =
            (uncut, graph.find(name), sliced.graph.find(name).and_then(|v| sliced.graph.constant(v)))
        {
            out.set_constant(v, t);
        }
    }
    mask_tokens(&mut out, facts, anatomy, kept);
    out.sort();
    out
}

/// The tensor with the positions `removed` of `axis` zeroed.
fn zero(tensor: &Tensor, axis: usize, removed: &[usize]) -> Tensor {
    let zeros = Tensor { bytes: vec![0; tensor.dtype.bits().div_ceil(8)].into(), ..tensor.clone() };
    fill(tensor, axis, removed, &zeros, &|_| 0)
}

/// What the twin makes of a constant: quantized numbers get their zero point, scales and zero points stay as they are.
fn without(graph: &Graph, v: ValueId, tensor: Tensor, cuts: &[&TensorCut]) -> Tensor {
    if values::is_parameter(graph, v) {
        return tensor;
    }
    let zero_point = values::zero_point(graph, v).filter(|z| z.values.dtype == tensor.dtype && !z.values.bytes.is_empty());
    cuts.iter().fold(tensor, |t, c| match &zero_point {
        Some(z) => fill(&t, c.axis, &c.removed, &z.values, &|element| z.index(element)),
        None => zero(&t, c.axis, &c.removed),
    })
}

/// The tensor with other elements at the positions `removed` of `axis`: of `values`, which has its type, those that `index` numbers.
fn fill(tensor: &Tensor, axis: usize, removed: &[usize], values: &Tensor, index: &dyn Fn(usize) -> usize) -> Tensor {
    let bits = tensor.dtype.bits();
    let inner = tensor.dims[axis + 1..].iter().product::<usize>();
    let outer: usize = tensor.dims[..axis].iter().product();
    let mut bytes = tensor.bytes.to_vec();
    let starts = (0..outer).flat_map(|o| removed.iter().map(move |r| (o * tensor.dims[axis] + r) * inner));
    for element in starts.flat_map(|start| start..start + inner) {
        let from = index(element);
        if let Some(width) = (bits >= 8).then_some(bits / 8) {
            bytes[element * width..(element + 1) * width].copy_from_slice(&values.bytes[from * width..(from + 1) * width]);
            continue;
        }
        let per_byte = 8 / bits.max(1);
        let mask = (1u8 << bits) - 1;
        let value = (values.bytes[from / per_byte] >> (bits * (from % per_byte))) & mask;
        let shift = bits * (element % per_byte);
        let byte = &mut bytes[element / per_byte];
        *byte = (*byte & !(mask << shift)) | (value << shift);
    }
    Tensor { bytes: bytes.into(), ..tensor.clone() }
}

/// `small` in the shape of `whole`: zeros where positions were removed.
fn spread(whole: &Tensor, small: &Tensor, cuts: &[&TensorCut]) -> Tensor {
    let width = whole.dtype.bits() / 8;
    let kept: Vec<Vec<usize>> = (0..whole.dims.len())
        .map(|axis| {
            let cut = cuts.iter().find(|c| c.axis == axis);
            cut.map_or_else(|| (0..whole.dims[axis]).collect(), |c| c.kept.clone())
        })
        .collect();
    let mut bytes = vec![0u8; whole.element_count() * width];
    for (n, chunk) in small.bytes.chunks_exact(width).enumerate() {
        let mut rest = n;
        let (mut at, mut stride) = (0, 1);
        for axis in (0..whole.dims.len()).rev() {
            let size = kept[axis].len();
            at += kept[axis][rest % size] * stride;
            rest /= size;
            stride *= whole.dims[axis];
        }
        bytes[at * width..(at + 1) * width].copy_from_slice(chunk);
    }
    Tensor { bytes: bytes.into(), ..whole.clone() }
}

fn token_constants(graph: &Graph, anatomy: &Anatomy, kept: &Kept) -> BTreeSet<(String, usize)> {
    let sites = kept_tokens(anatomy, kept);
    let behind = anatomy.tokens.last_before(&sites_of(&sites));
    let constants = behind.iter().flat_map(|(_, stretch)| &stretch.constants);
    constants
        .filter_map(|(at, axis, _)| graph.node(at.node).input(at.slot).map(|v| (graph.value(v).name().to_string(), *axis)))
        .collect()
}

/// Masks the keys of removed tokens, and lets means count only what stays.
fn mask_tokens(out: &mut Graph, facts: &Facts, anatomy: &Anatomy, kept: &Kept) {
    let mut done = BTreeSet::new();
    // The last site before a softmax says what stays there.
    let sites = kept_tokens(anatomy, kept);
    for (number, stretch) in anatomy.tokens.last_before(&sites_of(&sites)) {
        let stays = &sites[number].1;
        let gone_at = |list: &[usize]| -> Vec<bool> { list.iter().map(|t| *t != FIXED && !stays.contains(t)).collect() };
        for fused in &stretch.fused {
            if let Some(list) = stretch.reach.get(&fused.keys)
                && done.insert(fused.node)
            {
                mask_fused(out, facts, fused, &gone_at(list));
            }
        }
        for (id, axis) in stretch.softmaxes.iter().chain(&stretch.means) {
            let Some(input) = out.node(*id).input(0) else { continue };
            let original = input;
            let Some(list) = stretch.reach.get(&(original, *axis)) else { continue };
            if !done.insert(*id) {
                continue;
            }
            let gone = gone_at(list);
            let rank = facts.shape(original).map_or(0, <[_]>::len);
            let dtype = facts.get(original).dtype.unwrap_or(DType::F32);
            let mut dims = vec![1; rank];
            dims[*axis] = list.len();
            let like = Tensor { dims, ..Tensor::new(dtype, vec![], bytes::Bytes::new()) };
            let is_mean = stretch.means.contains(&(*id, *axis));
            let left = gone.iter().filter(|g| !**g).count();
            let scale = list.len() as f32 / left.max(1) as f32;
            let values: Vec<f32> = gone
                .iter()
                .map(|g| match (is_mean, g) {
                    (true, true) => 0.0,
                    (true, false) => scale,
                    (false, true) => MASKED,
                    (false, false) => 0.0,
                })
                .collect();
            let mut b = Builder::new(out, "token_mask.");
            let mask = b.constant(like.with_f32s(&values));
            let masked = if is_mean { b.mul(original, mask) } else { b.add(original, mask) };
            out.set_input(Use { node: *id, slot: 0 }, Some(masked));
        }
    }
}

/// Adds what hides `gone` to the logits of a fused attention.
fn mask_fused(out: &mut Graph, facts: &Facts, fused: &FusedKeys, gone: &[bool]) {
    let queries = facts.shape(fused.queries.0).and_then(|s| s[fused.queries.1].size()).unwrap_or(1);
    let dtype = facts.get(fused.queries.0).dtype.unwrap_or(DType::F32);
    let given = out.node(fused.node).input(fused.bias);
    let mut b = Builder::new(out, "token_mask.");
    let masked = match given.map(|v| (v, facts.get(v).dtype)) {
        Some((bias, Some(DType::Bool))) => {
            let seen: Vec<bool> = gone.iter().map(|g| !g).collect();
            let seen = b.constant(Tensor { dims: vec![1, seen.len()], ..Tensor::bools(&seen) });
            b.and(bias, seen)
        }
        given => {
            let row = gone.iter().map(|g| if *g { MASKED } else { 0.0 });
            let values: Vec<f32> = (0..queries).flat_map(|_| row.clone()).collect();
            let like = Tensor::new(dtype, vec![1, 1, queries, gone.len()], bytes::Bytes::new());
            let mask = b.constant(like.with_f32s(&values));
            given.map_or(mask, |(bias, _)| b.add(bias, mask))
        }
    };
    out.set_input(Use { node: fused.node, slot: fused.bias }, Some(masked));
}
