//! Weights in blocks of few bits, of com.microsoft: MatMulNBits and GatherBlockQuantized.
//!
//! MatMulNBits: `a [.., K]` times `B^T + bias`, where B `[N, K]` is stored as `[N, blocks, bytes]` with `block_size` columns to a block,
//! one scale and one zero point for each block of a row: scales `[N, blocks]` or flat, zero points packed like B, each row padded to
//! whole bytes. Columns N of the product go one by one. Rows K go as blocks: whole blocks drop out of all three constants. Where
//! dims of a head do not fill blocks, B stays as it is and the activation is put back among zeros before the product, which is the
//! same number: the weight of a removed row meets a zero. For that the unit must be zero there in the twin as well.
//! Example: K = 96 in blocks of 32 loses runs of 16 units: half blocks become blocks of 16 with the scale of the whole.

use super::linear::{BLOCK_MIN, largest_blocks};
use super::{MICROSOFT, NO_GRAD};
use crate::axes::relation::{AxesCx, Relations, Slot};
use crate::graph::build::Builder;
use crate::graph::{AttrValue, DType, Node, Tensor, Use};
use crate::infer::{Dim, Fact, InferCx, InferError, normalize_axis};
use crate::ops::matmul::{contradict, matmul_cost};
use crate::ops::{Axes, Cost, OpRule, Refit};
use crate::slice::refit::{Edit, RefitCx, RefitError};

/// The records of this family.
pub static RULES: &[OpRule] = &[
    OpRule {
        name: "MatMulNBits",
        domain: MICROSOFT,
        opsets: (1, 1),
        infer: matmul_infer,
        axes: Axes::Rule(matmul_axes),
        grad: NO_GRAD,
        cost: Cost::Rule(matmul_cost),
        refit: Refit::Rule(matmul_refit),
    },
    OpRule {
        name: "GatherBlockQuantized",
        domain: MICROSOFT,
        opsets: (1, 1),
        infer: gather_infer,
        axes: Axes::Rule(gather_axes),
        grad: NO_GRAD,
        cost: Cost::Free,
        refit: Refit::Nothing,
    },
];

/// Input slots.
const WEIGHT: usize = 1;
const SCALES: usize = 2;
const ZERO_POINTS: usize = 3;
const GROUPS: usize = 4;
const BIAS: usize = 5;

/// Level at which activations are quantized too, block by block.
const INTEGER_LEVEL: i64 = 4;

/// Sizes of a node, from its attributes.
struct Sizes {
    k: usize,
    n: usize,
    block: usize,
    bits: usize,
}

impl Sizes {
    fn of(node: &Node) -> Option<Self> {
        let number = |name: &str| node.attr_int(name).and_then(|n| usize::try_from(n).ok()).filter(|n| *n > 0);
        let bits = if node.attr("bits").is_some() { number("bits")? } else { 4 };
        let sizes = Self { k: number("K")?, n: number("N")?, block: number("block_size")?, bits };
        (sizes.block.is_power_of_two() && sizes.block >= BLOCK_MIN && matches!(bits, 2 | 4 | 8)).then_some(sizes)
    }

    fn blocks(&self) -> usize {
        self.k.div_ceil(self.block)
    }

    /// Zero points to a byte.
    fn per_byte(&self) -> usize {
        8 / self.bits
    }
}

fn matmul_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let (Some(a), Some(sizes)) = (cx.shape(0), Sizes::of(cx.node)) else { return Ok(vec![Fact::new(cx.dtype(0), None)]) };
    let Some((k, rest)) = a.split_last() else { return Err(cx.error("a scalar operand")) };
    if contradict(k, &Dim::from(sizes.k)) {
        return Err(cx.error(format!("inner sizes differ: {k} of the operand, K = {}", sizes.k)));
    }
    let shape = rest.iter().cloned().chain([Dim::from(sizes.n)]).collect();
    Ok(vec![Fact::new(cx.dtype(0), Some(shape))])
}

/// Positions of K that are better cut together: blocks can be halved down to 16, unless activations are quantized along them.
fn run_of_rows(node: &Node, sizes: &Sizes) -> usize {
    if node.attr_int("accuracy_level") == Some(INTEGER_LEVEL) { sizes.block } else { BLOCK_MIN }
}

/// `.. |k|, |k| n -> .. n`, scales, zero points and bias with the columns.
fn matmul_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    let (a, out) = (cx.shape(Slot::In(0)), cx.shape(Slot::Out(0)));
    let (Some(sizes), false) = (Sizes::of(cx.node), a.is_empty()) else { return relations };
    let last = a.len() - 1;
    (0..last).for_each(|axis| relations.same((Slot::In(0), axis), (Slot::Out(0), axis)));
    for slot in [WEIGHT, SCALES, ZERO_POINTS, BIAS].map(Slot::In).into_iter().filter(|s| cx.has(*s)) {
        let shape = cx.shape(slot);
        let Some(first) = shape.first() else { continue };
        if *first == out[last] {
            relations.same((slot, 0), (Slot::Out(0), last));
            (1..shape.len()).for_each(|axis| relations.unread((slot, axis)));
        } else if let Some(entries) = first.exact_div(&out[last]).filter(|_| shape.len() == 1) {
            let rows = relations.virtual_value(vec![out[last].clone(), entries]);
            relations.regroup((slot, vec![0]), (rows, vec![0, 1]));
            relations.same((rows, 0), (Slot::Out(0), last));
        }
    }
    let weight = relations.constant_virtual(vec![a[last].clone(), out[last].clone()]);
    relations.contract((Slot::In(0), last), (weight, 0));
    relations.same((weight, 1), (Slot::Out(0), last));
    relations.blocks((weight, 0), run_of_rows(cx.node, &sizes), None);
    let reason = format!("K is quantized in blocks of {}, and a removed unit is not zero there", sizes.block);
    relations.vanish((Slot::In(0), last), &reason);
    if cx.has(Slot::In(GROUPS)) {
        (0..cx.shape(Slot::In(GROUPS)).len()).for_each(|axis| relations.unread((Slot::In(GROUPS), axis)));
    }
    relations
}

/// N and K follow; K in whole blocks, or in halves of blocks down to 16, or with zeros put back into the activation.
fn matmul_refit(cx: &mut RefitCx<'_>) -> Result<(), RefitError> {
    let sizes = Sizes::of(cx.node()).ok_or_else(|| cx.error("its blocks are not understood"))?;
    let last = cx.old_input(0).len() - 1;
    if let Some(columns) = cx.kept_output(0, last) {
        cx.set_attr("N", AttrValue::Int(columns.len() as i64));
    }
    let Some(kept) = cx.kept_input(0, last) else { return Ok(()) };
    let found = largest_blocks(kept, (sizes.block, run_of_rows(cx.node(), &sizes)), sizes.k);
    match found.filter(|_| can_repack(cx)) {
        Some((size, blocks)) => {
            keep_blocks(cx, &sizes, size, blocks);
            cx.set_attr("K", AttrValue::Int(kept.len() as i64));
        }
        None => put_zeros_back(cx, kept, sizes.k),
    }
    Ok(())
}

/// Whether what belongs to blocks are constants, and rows are not grouped in an order of their own.
fn can_repack(cx: &RefitCx<'_>) -> bool {
    let stored = [WEIGHT, SCALES, ZERO_POINTS].iter().filter_map(|slot| cx.node().input(*slot));
    let mut stored = stored.map(|v| cx.original.is_constant(v));
    cx.node().input(GROUPS).is_none() && stored.all(|constant| constant)
}

/// Keeps these blocks of `size` columns; where that is less than before, each part of a block has its scale and zero point.
fn keep_blocks(cx: &mut RefitCx<'_>, sizes: &Sizes, size: usize, blocks: Vec<usize>) {
    let parts = sizes.block / size;
    let (old, per_byte) = (sizes.blocks(), sizes.per_byte());
    let owners: Vec<usize> = blocks.iter().map(|b| b / parts).collect();
    let bytes = size * sizes.bits / 8;
    let take = |axis| Edit::Take { axis, kept: blocks.clone() };
    if parts > 1 {
        cx.set_attr("block_size", AttrValue::Int(size as i64));
        let blocks = blocks.clone();
        cx.edit_constant(
            WEIGHT,
            repack(move |t| {
                // A row of blocks is a row of halves of blocks.
                let row: usize = t.dims[1..].iter().product();
                let split = Tensor { dims: vec![t.dims[0], row / bytes, bytes], ..t.clone() };
                split.take(1, &blocks)
            }),
        );
    } else {
        cx.edit_constant(WEIGHT, take(1));
    }
    if parts == 1 && cx.old_input(SCALES).len() == 2 {
        cx.edit_constant(SCALES, take(1));
    } else {
        let owners = owners.clone();
        cx.edit_constant(SCALES, repack(move |t| in_rows(t, old, |rows| rows.take(1, &owners))));
    }
    if cx.node().input(ZERO_POINTS).is_some() {
        let unpacked = cx.input_dtype(ZERO_POINTS) != Some(DType::U8);
        cx.edit_constant(
            ZERO_POINTS,
            repack(move |t| {
                if unpacked {
                    return in_rows(t, old, |rows| rows.take(1, &owners));
                }
                in_rows(t, old.div_ceil(per_byte), |rows| take_packed(rows, per_byte, &owners))
            }),
        );
    }
}

fn repack(edit: impl Fn(&Tensor) -> Tensor + 'static) -> Edit {
    Edit::Repack(Box::new(edit))
}

/// `edit` of a `[rows, width]` tensor, which may be stored flat.
fn in_rows(t: &Tensor, width: usize, edit: impl Fn(&Tensor) -> Tensor) -> Tensor {
    let flat = t.dims.len() == 1;
    let rows = Tensor { dims: vec![t.element_count() / width.max(1), width], ..t.clone() };
    let edited = edit(&rows);
    if flat { Tensor { dims: vec![edited.element_count()], ..edited } } else { edited }
}

/// The entries `kept` of each row of bytes, several to a byte, low bits first.
fn take_packed(rows: &Tensor, per_byte: usize, kept: &[usize]) -> Tensor {
    if per_byte == 1 {
        return rows.take(1, kept);
    }
    let packed = if per_byte == 2 { DType::U4 } else { DType::U2 };
    let entries = Tensor { dtype: packed, dims: vec![rows.dims[0], rows.dims[1] * per_byte], ..rows.clone() };
    let bytes = kept.len().div_ceil(per_byte);
    // Rows end in whole bytes: the last entry fills the rest.
    let last = kept.last().copied().unwrap_or(0);
    let padded: Vec<usize> = kept.iter().copied().chain(std::iter::repeat(last)).take(bytes * per_byte).collect();
    let taken = entries.take(1, &padded);
    Tensor { dtype: rows.dtype, dims: vec![rows.dims[0], bytes], ..taken }
}

/// Puts the kept positions of the activation back to their places among `k`, zeros at the others.
fn put_zeros_back(cx: &mut RefitCx<'_>, kept: &[usize], k: usize) {
    let Some(a) = cx.graph.node(cx.id).input(0) else { return };
    let axis = cx.old_input(0).len() - 1;
    let places: Vec<i64> = (0..k).map(|p| kept.binary_search(&p).unwrap_or(kept.len()) as i64).collect();
    let name = cx.graph.value(a).name().to_string();
    let mut b = Builder::new(cx.graph, &format!("{name}_among_zeros."));
    let padded = b.pad_end(a, axis + 1, axis);
    let places = b.ints(&places);
    let spread = b.gather(padded, places, axis as i64);
    cx.graph.set_input(Use { node: cx.id, slot: 0 }, Some(spread));
}

/// Rows of a table in blocks. Inputs: data, indices, scales, zero points. Bytes hold several entries where `bits` says so.
fn gather_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let dtype = cx.dtype(2);
    let (Some(data), Some(indices)) = (cx.shape(0), cx.shape(1)) else { return Ok(vec![Fact::new(dtype, None)]) };
    let axis = |name: &str, default: i64| normalize_axis(cx.node.attr_int(name).unwrap_or(default), data.len());
    let (Some(gathered), Some(quantized)) = (axis("gather_axis", 0), axis("quantize_axis", 1)) else {
        return Err(cx.error(format!("no such axis in rank {}", data.len())));
    };
    let mut shape = data.to_vec();
    if cx.dtype(0) == Some(DType::U8) {
        let bits = cx.node.attr_int("bits").unwrap_or(4).max(1);
        shape[quantized] = &shape[quantized] * &Dim::from(8 / bits);
    }
    shape.splice(gathered..=gathered, indices.iter().cloned());
    Ok(vec![Fact::new(dtype, Some(shape))])
}

/// Indices are parallel; the table's columns are quantized in blocks, its rows are looked up.
fn gather_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    let data = cx.shape(Slot::In(0));
    let Some(gathered) = normalize_axis(cx.node.attr_int("gather_axis").unwrap_or(0), data.len()) else { return relations };
    for axis in 0..cx.shape(Slot::In(1)).len() {
        relations.same((Slot::In(1), axis), (Slot::Out(0), gathered + axis));
    }
    let reason = format!("is quantized in blocks of {}", cx.node.attr_int("block_size").unwrap_or(128));
    for (slot, rank) in [(Slot::In(0), data.len()), (Slot::In(2), data.len()), (Slot::In(3), data.len())] {
        (0..rank.min(cx.shape(slot).len())).for_each(|axis| relations.barrier((slot, axis), &reason));
    }
    let indices = cx.shape(Slot::In(1)).len();
    for axis in (0..cx.shape(Slot::Out(0)).len()).filter(|a| !(gathered..gathered + indices).contains(a)) {
        relations.barrier((Slot::Out(0), axis), &reason);
    }
    relations
}
