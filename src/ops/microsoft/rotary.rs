//! RotaryEmbedding of com.microsoft, which that of the default domain was made after.
//!
//! Shape: as there, but the positions come second and tables are always looked up: `x`, `position_ids [B, N]` or `[1]` (the first
//! position), cos and sin `[positions, R/2]`. Without `rotary_embedding_dim` the whole width `E = R` is rotated, and the number of
//! heads follows from it.

use super::fused;
use crate::axes::relation::{AxesCx, Relations, Slot};
use crate::graph::Node;
use crate::infer::{Dim, Fact, InferCx, InferError};
use crate::ops::attention::rotary::{Layout, Tables, rotary_infer, rotary_refit, rotation};
use crate::ops::attention::token_axis;
use crate::ops::{OpRule, Refit};

/// The records of this family.
pub static RULES: &[OpRule] = &[OpRule { refit: Refit::Rule(rotary_refit), ..fused("RotaryEmbedding", infer, axes) }];

const POSITIONS: usize = 1;
const COS: usize = 2;
const SIN: usize = 3;

fn infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    rotary_infer(cx)
}

/// Heads and width as the kernel finds them.
pub(crate) fn layout(node: &Node, x: &[Dim], cos: &[Dim]) -> Result<Layout, String> {
    let rotated = node.attr_int("rotary_embedding_dim").unwrap_or(0);
    let table = cos.last().and_then(Dim::size).ok_or("tables of unknown width")? * 2;
    let heads = node.attr_int("num_heads").unwrap_or(0);
    let width = match (x, rotated > 0) {
        ([_, _, _, width], _) => width.size(),
        ([_, _, all], true) if heads > 0 => all.exact_div(&Dim::from(heads)).and_then(|w| w.size()),
        ([_, _, _], false) => Some(table),
        _ => None,
    };
    let width = width.filter(|w| *w > 0).ok_or("the width of a head is not known")?;
    let heads = match x {
        [_, heads, _, _] => Some(heads.clone()),
        [_, _, all] => all.exact_div(&Dim::from(width)),
        _ => None,
    };
    let heads = heads.ok_or("the number of heads is not known")?;
    let rotated = if rotated > 0 { usize::try_from(rotated).map_err(|e| e.to_string())? } else { width };
    if rotated % 2 != 0 || rotated > width || rotated != table {
        return Err(format!("{rotated} rotated positions of {width}, tables for {table}"));
    }
    Ok(Layout { heads, width, rotated, interleaved: node.attr_int("interleaved").unwrap_or(0) != 0 })
}

fn axes(cx: &AxesCx<'_>) -> Relations {
    let x = cx.shape(Slot::In(0));
    let found = layout(cx.node, x, cx.shape(Slot::In(COS)));
    let mut relations = rotation(cx, found, Tables { cos: Slot::In(COS), sin: Slot::In(SIN), positions: Slot::In(POSITIONS) });
    if cx.shape(Slot::In(POSITIONS)).len() == 1 {
        relations.barrier((Slot::In(0), token_axis(x)), "positions are counted along this axis");
    }
    relations
}

#[cfg(test)]
mod tests {
    use crate::ops::matmul::one_node::{ints, links, microsoft, refit, shapes};

    #[test]
    fn heads_follow_from_the_tables() {
        let g = microsoft("RotaryEmbedding", &["b n 12", "b n", "50 2", "50 2"], vec![], 1);
        assert_eq!(shapes(&g), Ok(vec!["b n 12".to_string()]));
        let links = links(&g);
        for link in ["in0.2~v0.0,v0.1", "v0.1[0..=1]>v2.1@0", "v2.1=v3.1", "in2.1=v2.1", "!in2.0", "in1.1=out0.1"] {
            assert!(links.iter().any(|l| l == link), "{link} in {links:?}");
        }
    }

    #[test]
    fn counted_positions_keep_their_tokens() {
        let g = microsoft("RotaryEmbedding", &["b n 12", "1", "50 2", "50 2"], vec![], 1);
        assert!(links(&g).iter().any(|l| l == "!in0.1"));
        let g = microsoft("RotaryEmbedding", &["b 3 n 4", "1", "50 2", "50 2"], vec![], 1);
        assert!(links(&g).iter().any(|l| l == "!in0.2"));
    }

    #[test]
    fn named_sizes_follow_the_cut() {
        let attrs = ints(&[("num_heads", 2), ("rotary_embedding_dim", 4)]);
        let mut g = microsoft("RotaryEmbedding", &["b n 12", "b n", "50 2", "50 2"], attrs, 1);
        assert_eq!(refit(&mut g, &[(0, 2, vec![1, 3, 4, 7, 9, 10]), (2, 1, vec![1]), (3, 1, vec![1])]), Ok(vec![]));
        assert_eq!(g.node(g.order()[0]).attr_int("rotary_embedding_dim"), Some(2));
    }
}
