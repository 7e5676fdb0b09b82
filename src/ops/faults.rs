//! Test support: a record with a fault in it, in the place of the right one.
//!
//! The property test over random graphs is only worth something if it notices when a rule is wrong. Records are statics and every
//! stage asks [`super::lookup`] for them (collecting relations, walking tokens, freezing shapes, refitting nodes and their copies),
//! so one line there is enough to put a fault into all of it, and no stage needs to know. It is compiled for unit tests only: what
//! is built, shipped, or tested from outside has no such line. The list of faults and the check are in tests/property/mutation.rs.

use super::{Axes, OpRule, Refit, all};
use crate::axes::relation::{AxesCx, Relations};
use crate::slice::refit::{RefitCx, RefitError};
use std::cell::Cell;

/// Spoils what an `axes` rule says.
pub(crate) type Spoil = fn(&AxesCx<'_>, &mut Relations);
/// A `refit` rule.
pub(crate) type RefitRule = fn(&mut RefitCx<'_>) -> Result<(), RefitError>;

/// One deliberate fault in the record of one operator.
#[derive(Clone, Copy)]
pub(crate) struct Fault {
    /// What is wrong, in words.
    pub(crate) what: &'static str,
    /// The operator, of the default domain.
    pub(crate) op: &'static str,
    /// Spoils what its `axes` rule says; of an operator that depends on shapes alone, what it ought not to say.
    pub(crate) axes: Option<Spoil>,
    /// Stands in the place of its `refit` rule.
    pub(crate) refit: Option<RefitRule>,
}

thread_local! {
    static FAULT: Cell<Option<(Fault, &'static OpRule)>> = const { Cell::new(None) };
}

/// Runs `run` with the fault in place, on this thread.
pub(crate) fn with<T>(fault: Fault, run: impl FnOnce() -> T) -> T {
    let right = right_rule(fault.op);
    let axes = if fault.axes.is_some() { Axes::Rule(spoilt_axes) } else { copy_axes(&right.axes) };
    let refit = match (fault.refit, &right.refit) {
        (Some(wrong), _) => Refit::Rule(wrong),
        (None, Refit::Rule(refit)) => Refit::Rule(*refit),
        (None, Refit::Nothing) => Refit::Nothing,
    };
    let OpRule { name, domain, opsets, infer, axes: _, grad: _, cost: _, refit: _ } = *right;
    let grad = super::Grad::No("not asked for");
    let wrong = OpRule { name, domain, opsets, infer, axes, grad, cost: super::Cost::Free, refit };
    FAULT.set(Some((fault, Box::leak(Box::new(wrong)))));
    let result = run();
    FAULT.set(None);
    result
}

/// The record that stands in the place of an operator's.
pub(super) fn replaced(domain: &str, op: &str) -> Option<&'static OpRule> {
    FAULT.get().map(|(_, rule)| rule).filter(|rule| rule.domain == domain && rule.name == op)
}

fn right_rule(op: &str) -> &'static OpRule {
    all().find(|r| r.name == op && r.domain.is_empty()).expect("faults are of operators that have a record")
}

fn copy_axes(axes: &Axes) -> Axes {
    match axes {
        Axes::Rule(rule) => Axes::Rule(*rule),
        Axes::Barrier(reason) => Axes::Barrier(reason),
        Axes::ShapeOnly => Axes::ShapeOnly,
    }
}

fn spoilt_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = match right_rule(cx.node.op()).axes {
        Axes::Rule(rule) => rule(cx),
        Axes::Barrier(_) | Axes::ShapeOnly => Relations::default(),
    };
    if let Some(spoil) = FAULT.get().and_then(|(fault, _)| fault.axes) {
        spoil(cx, &mut relations);
    }
    relations
}
