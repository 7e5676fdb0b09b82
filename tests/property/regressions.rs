//! Graphs on which vitrim was wrong once: the seed, what the graph is made of, and what the fault was.
//!
//! The blocks are written out, so that a new kind of block changes nothing here. A change inside of a block or a step makes other
//! graphs of these seeds; that is why tests/found.rs has a small graph for each of the faults, too.

use super::blocks::Block::{self, Attention, Branch, Conv, Free, Gated, Mlp, Shared, Wide};
use super::case::Case;
use super::harness::has_ort;
use super::oracle::check_caught;
use super::told;

/// Seed and blocks of a graph.
type Graphs = &'static [(u64, &'static [Block])];

/// What was wrong, and on which graphs.
const ONCE_WRONG: &[(&str, Graphs)] = &[
    (
        "heads that lie inside of a width (`E x H`) kept dims of their own, and what stayed was no block",
        &[(507, &[Attention]), (742, &[Attention, Free]), (933, &[Attention, Shared]), (1276, &[Attention, Conv])],
    ),
    (
        "a value that entered a Concat twice was not related to its result",
        &[
            (8, &[Attention, Branch]),
            (139, &[Attention, Wide]),
            (222, &[Attention]),
            (273, &[Attention]),
            (1072, &[Attention]),
            (1424, &[Attention]),
            (1495, &[Attention, Branch]),
            (1820, &[Attention]),
            (2234, &[Attention]),
        ],
    ),
    (
        "parts of unlike width of a value that is used as a whole",
        &[
            (98, &[Attention, Attention]),
            (307, &[Attention, Attention]),
            (845, &[Attention, Free]),
            (1685, &[Attention, Attention]),
            (3355, &[Attention, Attention]),
        ],
    ),
    ("a Slice could not take positions that are no run of equal steps", &[(429, &[Wide]), (631, &[Free, Gated])]),
    ("a sum without partner of what a function does not leave zero", &[(1362, &[Free]), (2249, &[Free, Shared])]),
    ("division by a constant that the twin zeroes", &[(40, &[Wide]), (58, &[Wide])]),
    ("a class that stands twice on one axis", &[(186, &[Free, Gated]), (1427, &[Mlp, Attention]), (2510, &[Conv, Attention])]),
    (
        "a weight that one reader contracts and another passes on was cut for each",
        &[(283, &[Mlp, Wide]), (769, &[Mlp, Mlp]), (977, &[Free, Free])],
    ),
];

#[test]
fn what_was_wrong_once_is_right() {
    if !has_ort() {
        return;
    }
    let mut wrong = Vec::new();
    for (what, cases) in ONCE_WRONG {
        for (seed, blocks) in *cases {
            let case = Case::of(*seed, blocks);
            if let Err(error) = check_caught(&case) {
                wrong.push(format!("{what}: {}", told(&case, &error)));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
