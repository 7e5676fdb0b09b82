//! OUT against its twin and against MODEL.

use super::{Base, Error, Model, exact};
use crate::data::{BatchOrder, Dataset};
use crate::graph::Graph;
use crate::plan::Plan;
use crate::slice::{self, Sliced};
use crate::verify::{self, Settings, Subject, Verdict, weights};
use std::path::Path;

/// Data of a verification.
#[derive(Clone, Copy)]
pub struct ProofData<'a> {
    /// The samples.
    pub data: &'a Dataset,
    /// Samples of one run.
    pub batch: usize,
    /// Threads that load.
    pub loaders: usize,
}

/// Rebuilds the twin from model and plan, and compares `out` with it.
pub fn prove(
    model: &Model,
    out: &Graph,
    plan_path: &Path,
    plan: &Plan,
    data: Option<ProofData<'_>>,
    settings: &Settings,
) -> Result<Verdict, Error> {
    plan.check(plan_path, &model.sha256()?, &model.anatomy)?;
    let base = Base::of_plan(model, plan_path, plan)?;
    let (graph, facts, anatomy) = base.parts();
    let kept = plan.kept();
    let made = exact::slice(model, base.parts(), &kept, !plan.exact.is_empty())?;
    let names = made.with_parts(plan.edited.iter().map(|e| e.initializer.clone()).collect());
    let edited = made.with_parts(weights::edited_names(names.iter().map(String::as_str), &made.sliced));
    let difference = weights::first_difference(&made.sliced.graph, out, &edited);
    let sliced = Sliced { graph: made.put_back(out), ..made.sliced };
    let twin = slice::twin::build(graph, facts, anatomy, &kept, &sliced, &names);
    let subject = Subject {
        graph: model.graph(),
        facts: &model.facts,
        twin: &twin,
        out,
        is_edited: !plan.edited.is_empty(),
        weights: difference.as_ref(),
    };
    let mut batches = data.map(|d| d.data.batches(BatchOrder::default(), d.batch, d.loaders, None));
    let batches = batches.as_mut().map(|b| b as verify::DataBatches<'_>);
    verify::compare(&subject, batches, settings).map_err(|cause| match cause {
        verify::Error::Runtime(e) => Error::Runtime(e),
        cause => Error::Verify { file: model.path.clone(), cause: Box::new(cause) },
    })
}
