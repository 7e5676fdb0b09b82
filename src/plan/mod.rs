//! Scores + budget -> Plan.
//!
//! In: the anatomy, scores by unit, and either a fraction per kind or a budget. Out: [`Plan`], the units that stay.
//! A step removes one dim in every head of a layer (the weakest of each), or one hidden unit; all steps of all layers and kinds form
//! one ranking by score per cost, which is cut off where the budget is met. Example: `macs=0.5` on a ViT removes hidden units of late
//! layers first where their scores are low, and takes dims of q and k where they are cheap to lose.
//! Invariant: every head of a layer keeps equally many dims, dims that go together stay together, at least one of each stays.

mod choose;
mod file;

pub use choose::{Ask, ChooseError, Limits, choose};
pub use file::{
    BeforeAfter, Budget, Edited, KeptUnits, Layout, Plan, PlanFileError, Promised, SCHEMA_VERSION, Split, SplitUse, Weights,
};
