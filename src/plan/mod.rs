//! Scores + budget -> Plan.
//!
//! In: the anatomy, scores by unit, either fractions of the units or a budget, and where they are known the losses of widths. Out:
//! [`Plan`], the units that stay. A step removes one dim in every head of a layer (the weakest of each), or one hidden unit. Without
//! losses all steps of all layers and kinds form one ranking by score per cost, which is cut off where the budget is met; with them
//! the scores only say what goes first in a group, and how much goes is what loses least. Example: `macs=0.5` on a ViT removes
//! hidden units of late layers first where their scores are low, and takes dims of q and k where they are cheap to lose.
//! Invariant: every head of a layer keeps equally many dims, dims that go together stay together, at least one of each stays.

mod allocate;
mod budget;
mod choose;
mod curve;
mod file;
mod ladder;

pub use choose::{Ask, ChooseError, Chosen, Fractions, Limits, Measure, Targets, choose};
pub use curve::Losses;
pub use file::{
    Allocation, BeforeAfter, Budget, Edited, Kept, KeptUnits, Layout, Plan, PlanFileError, Promised, SCHEMA_VERSION, Split,
    SplitUse, Way, Weights,
};
