//! Is the property test worth something? Each deliberate fault in an axis rule or a refit must be caught by it.
//!
//! A fault is put into the record of one operator (`src/ops/faults.rs` says how); then the seeds of the property test run until one
//! of them fails that passes without the fault. A fault that makes the engine refuse what it should offer counts as well: blocks say
//! what must be offered.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "these are tests")]
#![allow(dead_code, reason = "the property test itself uses the rest")]

mod blocks;
mod case;
#[path = "../harness/mod.rs"]
mod harness;
mod net;
mod oracle;
mod steps;

use crate::axes::relation::{At, AxesCx, Link, Relations, Slot};
use crate::ops::faults::{Fault, with};
use case::Case;
use harness::has_ort;
use oracle::check_caught;

/// So many seeds are tried.
const SEEDS: u64 = 1500;

/// A fault in what an `axes` rule says.
const fn axes(what: &'static str, op: &'static str, spoil: fn(&AxesCx<'_>, &mut Relations)) -> Fault {
    Fault { what, op, axes: Some(spoil), refit: None }
}

/// A refit that is left out.
const fn no_refit(what: &'static str, op: &'static str) -> Fault {
    Fault { what, op, axes: None, refit: Some(|_| Ok(())) }
}

const FAULTS: &[Fault] = &[
    axes("MatMul: the contracted axes may lose positions unseen", "MatMul", |_, r| unread_contract(r)),
    axes("MatMul: the contraction is left out", "MatMul", |_, r| r.links.retain(|l| !matches!(l, Link::Contract(..)))),
    axes("MatMul: the columns of the second operand may lose positions unseen", "MatMul", |_, r| forget(r, Slot::In(1))),
    axes("Gemm: the bias is forgotten", "Gemm", |_, r| forget(r, Slot::In(2))),
    axes("Gemm: transB is ignored", "Gemm", |_, r| {
        spoil_axes(r, |(slot, axis)| (slot, if slot == Slot::In(1) { 1 - axis } else { axis }))
    }),
    axes("Einsum: contracted letters may lose positions unseen", "Einsum", |_, r| unread_contract(r)),
    axes("Add: the second operand is forgotten", "Add", |_, r| forget(r, Slot::In(1))),
    axes("Mul: the second operand is forgotten", "Mul", |_, r| forget(r, Slot::In(1))),
    axes("Where: the last operand is forgotten", "Where", |_, r| forget(r, Slot::In(2))),
    axes("Softmax: the normalized axis is parallel", "Softmax", |_, r| spoil_links(r, unbar)),
    axes("LayerNormalization: nothing is normalized", "LayerNormalization", |_, r| {
        r.links.retain(|l| !matches!(l, Link::Barrier(..)))
    }),
    axes("BatchNormalization: the variance is forgotten", "BatchNormalization", |_, r| forget(r, Slot::In(4))),
    axes("ReduceMean: a mean is a sum", "ReduceMean", |_, r| {
        spoil_links(r, |l| match l {
            Link::Barrier(a, _) if matches!(a.0, Slot::In(_)) => Link::Sum(a),
            other => other,
        })
    }),
    axes("ReduceSum: the summed axis may lose positions unseen", "ReduceSum", |_, r| {
        spoil_links(r, |l| if let Link::Sum(a) = l { Link::Unread(a) } else { l })
    }),
    axes("Reshape: the outer factor is taken for the inner one", "Reshape", |_, r| {
        spoil_links(r, |l| match l {
            Link::Regroup(from, mut to) => {
                to.1.reverse();
                Link::Regroup(from, to)
            }
            other => other,
        })
    }),
    axes("Transpose: the permutation is read backwards", "Transpose", |cx, r| {
        let perm = cx.node.attr_ints("perm").unwrap_or(&[]).to_vec();
        r.links = perm.iter().enumerate().map(|(a, p)| Link::Same((Slot::In(0), a), (Slot::Out(0), *p as usize))).collect();
    }),
    axes("Unsqueeze: axes behind the new one stay where they were", "Unsqueeze", |cx, r| {
        let rank = cx.shape(Slot::In(0)).len();
        r.links = (0..rank).map(|a| Link::Same((Slot::In(0), a), (Slot::Out(0), a))).collect();
        r.unread((Slot::Out(0), rank));
    }),
    axes("Split: every part starts at the first position", "Split", |_, r| {
        spoil_select(r, |_, index, at| (index.iter().map(|i| i - index[0]).collect(), at))
    }),
    axes("Concat: every part is the first one", "Concat", |_, r| spoil_select(r, |_, index, _| (index, 0))),
    axes("Slice: the step is ignored", "Slice", |_, r| {
        spoil_select(r, |_, index, at| {
            let first = index.iter().min().copied().unwrap_or(0);
            ((first..first + index.len()).collect(), at)
        })
    }),
    axes("Gather: the next position is taken", "Gather", |cx, r| {
        let sizes: Vec<usize> = cx.shape(Slot::In(0)).iter().map(|d| d.size().unwrap_or(1)).collect();
        spoil_select(r, |from, index, at| (index.iter().map(|i| (i + 1) % sizes[from.1]).collect(), at));
    }),
    axes("Conv: the bias is forgotten", "Conv", |_, r| forget(r, Slot::In(2))),
    axes("Conv: the weight of a group is forgotten", "Conv", |cx, r| {
        if cx.node.attr_int("group").unwrap_or(1) > 1 {
            forget(r, Slot::In(1));
        }
    }),
    axes("Attention: queries and keys have dims of their own", "Attention", |_, r| unread_contract(r)),
    axes("Shape: sizes are not frozen", "Shape", |cx, r| {
        (0..cx.shape(Slot::In(0)).len()).for_each(|a| r.unread((Slot::In(0), a)))
    }),
    no_refit("Reshape: the target stays", "Reshape"),
    no_refit("Split: the sizes stay", "Split"),
    no_refit("Slice: the bounds stay", "Slice"),
    no_refit("Gather: the index stays", "Gather"),
    no_refit("Expand: the target stays", "Expand"),
    no_refit("Conv: the number of groups stays", "Conv"),
    no_refit("Attention: num_heads stays, and the scale is not written out", "Attention"),
];

fn spoil_links(r: &mut Relations, spoil: fn(Link) -> Link) {
    r.links = std::mem::take(&mut r.links).into_iter().map(spoil).collect();
}

/// Every axis of a slot may lose positions unseen.
fn forget(r: &mut Relations, slot: Slot) {
    let links = std::mem::take(&mut r.links).into_iter();
    r.links = links
        .flat_map(|l| match l {
            Link::Same(a, b) | Link::Contract(a, b) if a.0 == slot || b.0 == slot => vec![Link::Unread(a), Link::Unread(b)],
            Link::Regroup(a, b) if a.0 == slot || b.0 == slot => {
                [a, b].into_iter().flat_map(|(s, axes)| axes.into_iter().map(move |x| Link::Unread((s, x)))).collect()
            }
            other => vec![other],
        })
        .collect();
}

/// Contracted axes may lose positions unseen, each for itself.
fn unread_contract(r: &mut Relations) {
    let links = std::mem::take(&mut r.links).into_iter();
    r.links = links
        .flat_map(|l| match l {
            Link::Contract(a, b) => vec![Link::Unread(a), Link::Unread(b)],
            other => vec![other],
        })
        .collect();
}

fn unbar(l: Link) -> Link {
    match l {
        Link::Barrier((Slot::In(slot), axis), _) => Link::Same((Slot::In(slot), axis), (Slot::Out(0), axis)),
        Link::Barrier((Slot::Out(out), axis), _) => Link::Same((Slot::In(0), axis), (Slot::Out(out), axis)),
        other => other,
    }
}

fn spoil_axes(r: &mut Relations, spoil: fn(At) -> At) {
    let links = std::mem::take(&mut r.links).into_iter();
    r.links = links
        .map(|l| match l {
            Link::Same(a, b) => Link::Same(spoil(a), spoil(b)),
            Link::Contract(a, b) => Link::Contract(spoil(a), spoil(b)),
            other => other,
        })
        .collect();
}

fn spoil_select(r: &mut Relations, spoil: impl Fn(At, Vec<usize>, usize) -> (Vec<usize>, usize)) {
    for link in &mut r.links {
        if let Link::Select { from, index, at, .. } = link {
            (*index, *at) = spoil(*from, std::mem::take(index), *at);
        }
    }
}

/// The first case that the fault makes fail, and what is said then.
fn caught(fault: Fault, cases: &[Case]) -> Option<(u64, String)> {
    let has = |case: &&Case| case.graph.nodes().any(|(_, n)| n.op() == fault.op);
    cases.iter().filter(has).find_map(|case| {
        let error = with(fault, || check_caught(case)).err()?;
        check_caught(case).is_ok().then_some((case.seed, error))
    })
}

#[test]
fn every_deliberate_fault_is_caught() {
    if !has_ort() {
        return;
    }
    // Panics inside are caught and told; their usual report would only be noise.
    let quiet = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let cases: Vec<Case> = (0..SEEDS).map(Case::new).collect();
    let found: Vec<_> = FAULTS.iter().map(|f| (f, caught(*f, &cases))).collect();
    std::panic::set_hook(quiet);
    for (fault, seed) in &found {
        let text = seed.as_ref().map_or("NOT CAUGHT".into(), |(s, e)| format!("seed {s}: {}", e.lines().next().unwrap_or("")));
        println!("{}\n    {}", fault.what, text.chars().take(160).collect::<String>());
    }
    let missed: Vec<_> = found.iter().filter(|(_, seed)| seed.is_none()).map(|(f, _)| f.what).collect();
    assert!(missed.is_empty(), "not caught: {missed:#?}");
    assert!(FAULTS.len() >= 20);
}
