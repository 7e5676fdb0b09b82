//! Data for a model: opened for its inputs, checked against its outputs.

use super::{Error, Model};
use crate::data::{self, DataError, Dataset};
use crate::eval;
use crate::graph::{DeclaredDim, ValueId};
use crate::infer::Dim;
use crate::verify::nature;
use std::path::{Path, PathBuf};

/// Which data, and how it is read.
#[derive(Clone, Debug, Default)]
pub struct DataChoice {
    /// An image folder or an archive.
    pub path: PathBuf,
    /// The input that takes the images.
    pub input: Option<String>,
    /// The output with class scores.
    pub output: Option<String>,
    /// A recipe of preprocessing.
    pub preprocess: Option<PathBuf>,
    /// Mean by channel.
    pub mean: Option<Vec<f32>>,
    /// Standard deviation by channel.
    pub std: Option<Vec<f32>>,
    /// The first image that cannot be used is an error.
    pub strict: bool,
}

/// Opens data for a model's inputs.
pub fn open_data(model: &Model, choice: &DataChoice) -> Result<Dataset, Error> {
    let graph = model.graph();
    let fail = |cause: DataError| Error::Data { file: choice.path.clone(), cause: Box::new(cause) };
    let mut inputs = eval::data_inputs(graph);
    for input in &mut inputs {
        let declared = graph.find(&input.name).and_then(|v| graph.value(v).declared()).and_then(|d| d.dims.clone());
        for (size, dim) in input.dims.iter_mut().zip(declared.unwrap_or_default()).skip(1) {
            if let (None, DeclaredDim::Symbol(name)) = (&size, dim) {
                *size = model.sizes.get(&name).and_then(|n| usize::try_from(*n).ok());
            }
        }
    }
    let names: Vec<&str> = graph.inputs().iter().map(|v| graph.value(*v).name()).collect();
    if let Some(name) = choice.input.as_deref().filter(|name| !names.contains(name)) {
        return Err(Error::unsuitable(&model.path, format!("--input {name}: the model's inputs are {}", names.join(", "))));
    }
    if choice.path.is_dir() && names.len() > 1 && choice.input.is_none() {
        let reason = format!(
            "has several inputs ({}): name the image input with --input, or give an .npz with an array for each",
            names.join(", ")
        );
        return Err(Error::unsuitable(&model.path, reason));
    }
    let options = data::Options {
        inputs,
        image_input: choice.input.clone(),
        preprocess: choice.preprocess.clone(),
        mean: choice.mean.clone(),
        std: choice.std.clone(),
        strict: choice.strict,
        ..data::Options::default()
    };
    let data = Dataset::open(&choice.path, &options).map_err(fail)?;
    if data.is_empty() {
        return Err(fail(DataError::NoImages { path: choice.path.clone() }));
    }
    if let (Some(classes), true) = (class_count(model, choice.output.as_deref()), data.labels().is_some()) {
        data.check_labels(classes).map_err(fail)?;
    }
    Ok(data)
}

/// Float outputs `[batch, classes]`.
fn class_outputs(model: &Model) -> Vec<ValueId> {
    let fits = |v: &ValueId| {
        let fact = model.facts.get(*v);
        let shape = fact.shape.as_deref().unwrap_or_default();
        fact.dtype.is_none_or(crate::graph::DType::is_float) && shape.len() == 2 && !shape[1].is(1)
    };
    model.graph().outputs().iter().copied().filter(fits).collect()
}

/// The output with class scores: the one named, or the only one that could be; `None` where none is sure to be.
pub fn class_output(model: &Model, named: Option<&str>) -> Result<Option<String>, Error> {
    let graph = model.graph();
    let name = |v: &ValueId| graph.value(*v).name().to_string();
    if let Some(named) = named {
        let all: Vec<String> = graph.outputs().iter().map(name).collect();
        if !all.iter().any(|n| n == named) {
            return Err(Error::unsuitable(&model.path, format!("--output {named}: the model's outputs are {}", all.join(", "))));
        }
        return Ok(Some(named.to_string()));
    }
    match class_outputs(model).as_slice() {
        [] => Ok(None),
        [one] => Ok(Some(name(one))),
        several => {
            let names: Vec<String> = several.iter().map(name).collect();
            Err(Error::unsuitable(
                &model.path,
                format!("has several outputs ({}): name the output with --output", names.join(", ")),
            ))
        }
    }
}

/// Number of classes, where it is known.
fn class_count(model: &Model, output: Option<&str>) -> Option<usize> {
    let outputs = class_outputs(model);
    let found = match output {
        Some(name) => model.graph().find(name).filter(|v| outputs.contains(v)),
        None => outputs.first().copied(),
    };
    model.facts.shape(found?)?.get(1).and_then(Dim::size)
}

/// Whether weights can train: refuses models with quantized weights.
pub fn check_trains(model: &Model) -> Result<(), Error> {
    if nature::tolerance(model.graph()).number_format == "quantized weights" {
        let reason = "weights are quantised: search on the float export, or plan by scores";
        return Err(Error::unsuitable(&model.path, reason));
    }
    Ok(())
}

/// Refuses a model that is not told from chance on labelled data: then preprocessing or labels are wrong.
pub fn check_not_chance(model: &Model, data: &Path, output: Option<&str>, found: &eval::Evaluation) -> Result<(), Error> {
    const FEWEST: u64 = 50;
    let (Some(right), Some(classes)) = (found.accuracy, class_count(model, output)) else { return Ok(()) };
    if right.n >= FEWEST && classes > 1 && right.interval().0 <= 1.0 / classes as f64 {
        let share = right.share() * 100.0;
        let reason = format!("the original model scores {share:.1} % on {} images: preprocessing or labels look wrong", right.n);
        return Err(Error::unsuitable(data, reason));
    }
    Ok(())
}
