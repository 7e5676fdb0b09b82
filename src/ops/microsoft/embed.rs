//! EmbedLayerNormalization: rows of three tables added and normalized.
//!
//! Shape: `ids [B, N]`, `segments [B, N]`, tables `[words, D]`, `[places, D]`, `[kinds, D]`, scale and bias `[D]`, `mask [B, N]`,
//! `places [B or 1, N]` -> normalized `[B, N, D]`, `[B]` (number of ones in each row of the mask), and the sum `[B, N, D]`.
//! D is normalized over, and rows are looked up: both are barriers.

use super::fused;
use crate::axes::relation::{AxesCx, Relations, Slot};
use crate::infer::{Fact, InferCx, InferError};
use crate::ops::OpRule;
use crate::ops::norm::NORMALIZED;

/// The records of this family.
pub static RULES: &[OpRule] = &[fused("EmbedLayerNormalization", embed_infer, embed_axes)];

const IDS: usize = 0;
const SEGMENTS: usize = 1;
const TABLES: [usize; 3] = [2, 3, 4];
const VECTORS: [usize; 2] = [5, 6];
const MASK: usize = 7;
const PLACES: usize = 8;
/// Outputs: normalized, number of ones in the mask, sum.
const COUNT: usize = 1;
const SUM: usize = 2;

fn embed_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let shape = cx.shape(IDS).zip(cx.shape(TABLES[0]).and_then(<[_]>::last)).map(|(ids, width)| {
        let mut shape = ids.to_vec();
        shape.push(width.clone());
        shape
    });
    let count = cx.shape(IDS).and_then(<[_]>::first).map(|batch| vec![batch.clone()]);
    let sum = Fact::new(cx.dtype(TABLES[0]), shape);
    Ok(vec![sum.clone(), Fact::new(cx.dtype(IDS), count), sum])
}

/// `b n -> b n d` with tables `w d`
fn embed_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    let r = &mut relations;
    let y = Slot::Out(0);
    let ids = cx.shape(Slot::In(IDS));
    for slot in [IDS, SEGMENTS, PLACES].into_iter().filter(|s| cx.has(Slot::In(*s))) {
        for (axis, size) in cx.shape(Slot::In(slot)).iter().enumerate() {
            if ids.get(axis) == Some(size) {
                r.same((Slot::In(slot), axis), (y, axis));
            }
        }
    }
    for table in TABLES.into_iter().map(Slot::In).filter(|s| cx.has(*s)) {
        r.barrier((table, 0), "positions are looked up in this axis");
        r.same((table, 1), (y, 2));
    }
    VECTORS.into_iter().for_each(|slot| r.same((Slot::In(slot), 0), (y, 2)));
    r.barrier((y, 2), NORMALIZED);
    if cx.has(Slot::In(MASK)) {
        r.same((Slot::In(MASK), 0), (y, 0));
        r.barrier((Slot::In(MASK), 1), "positions are counted along this axis");
    }
    if cx.has(Slot::Out(COUNT)) {
        r.same((Slot::Out(COUNT), 0), (y, 0));
    }
    if cx.has(Slot::Out(SUM)) {
        (0..3).for_each(|axis| r.same((Slot::Out(SUM), axis), (y, axis)));
    }
    relations
}
