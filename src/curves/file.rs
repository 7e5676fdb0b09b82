//! Curves: loss against width for each group, and their file.

use crate::onnx::{self, Overwrite};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// The version of the JSON names that this build writes and reads.
pub const SCHEMA_VERSION: u32 = 1;

/// Where losses come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum How {
    /// The model ran with the group cut.
    Measured,
    /// Layer errors times the weight that the output gives to them.
    Predicted,
}

/// One point of a curve.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Point {
    /// Units of the group that stay, over all heads; the group's number of units has loss 0.
    pub width: usize,
    /// Mean over images of KL to the model as it is. Unit: nats.
    pub loss: f64,
}

/// Loss against width for each group.
///
/// Invariant of what [`Curves::insert`] makes and [`Curves::read`] accepts: widths of a group ascend, losses are finite and not
/// negative, and the last point, the whole group, has loss 0.
#[derive(Clone, Debug, PartialEq)]
pub struct Curves {
    /// Measured or predicted.
    pub how: How,
    /// Images that losses are means of.
    pub images: u64,
    /// Points by group id.
    pub groups: BTreeMap<String, Vec<Point>>,
    /// The model that they were made for.
    pub model_sha256: String,
}

/// What the file holds.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    schema_version: u32,
    model_sha256: String,
    how: How,
    images: u64,
    groups: BTreeMap<String, Vec<Point>>,
}

/// Why curves cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CurvesFileError {
    /// Not readable.
    #[error("{file}: {cause}")]
    Io {
        /// The file.
        file: String,
        /// The cause.
        cause: std::io::Error,
    },
    /// Not written.
    #[error(transparent)]
    Write(#[from] onnx::Error),
    /// Not a file of curves.
    #[error("{file}: not a file of curves: {cause}")]
    Malformed {
        /// The file.
        file: String,
        /// The cause.
        cause: String,
    },
    /// Made for another model.
    #[error("{file}: belongs to model sha256 {asked}.., not {found}..")]
    OtherModel {
        /// The file.
        file: String,
        /// First digits of the hash in the file.
        asked: String,
        /// First digits of the hash of the model.
        found: String,
    },
    /// A curve that is none.
    #[error(transparent)]
    Curve(#[from] CurveFault),
}

/// What is wrong with a curve.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("curve of group '{group}': {what}")]
pub struct CurveFault {
    /// The group.
    pub group: String,
    /// What is wrong.
    pub what: String,
}

impl Curves {
    /// Without groups.
    pub fn empty(how: How, images: u64, model_sha256: &str) -> Self {
        Self { how, images, groups: BTreeMap::new(), model_sha256: model_sha256.to_string() }
    }

    /// Sets the curve of a group of `units` units from points in any order; the whole group with loss 0 is added.
    ///
    /// Errors: a loss that is negative or no number, a width twice or above `units`, the whole group with another loss than 0.
    pub fn insert(&mut self, group: &str, units: usize, mut points: Vec<Point>) -> Result<(), CurveFault> {
        if !points.iter().any(|p| p.width == units) {
            points.push(Point { width: units, loss: 0.0 });
        }
        points.sort_by_key(|p| p.width);
        if let Some(p) = points.last().filter(|p| p.width > units) {
            return Err(CurveFault { group: group.to_string(), what: format!("width {} of {units} units", p.width) });
        }
        check_curve(group, &points)?;
        self.groups.insert(group.to_string(), points);
        Ok(())
    }

    /// Checks what [`Curves`] promises of every group.
    pub fn check(&self) -> Result<(), CurveFault> {
        self.groups.iter().try_for_each(|(group, points)| check_curve(group, points))
    }

    /// Writes the file: complete under its name, or not at all. One that is there is replaced.
    ///
    /// Errors: [`Curves::check`]; the disk.
    pub fn write(&self, path: &Path) -> Result<(), CurvesFileError> {
        self.check()?;
        let stored = Stored {
            schema_version: SCHEMA_VERSION,
            model_sha256: self.model_sha256.clone(),
            how: self.how,
            images: self.images,
            groups: self.groups.clone(),
        };
        let malformed =
            |e: serde_json::Error| CurvesFileError::Malformed { file: path.display().to_string(), cause: e.to_string() };
        let mut text = serde_json::to_string_pretty(&stored).map_err(malformed)?;
        text.push('\n');
        Ok(onnx::write_file(path, text.as_bytes(), Overwrite::Force)?)
    }

    /// Reads the file that was made for the model with this hash.
    ///
    /// Errors: not readable, not a file of curves, written with a later schema, made for another model, or not what [`Curves`]
    /// promises.
    pub fn read(path: &Path, model_sha256: &str) -> Result<Self, CurvesFileError> {
        let file = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|cause| CurvesFileError::Io { file: file.clone(), cause })?;
        let malformed = |cause: String| CurvesFileError::Malformed { file: file.clone(), cause };
        // First, because a later schema may have names that this one does not know.
        let any: serde_json::Value = serde_json::from_str(&text).map_err(|e| malformed(e.to_string()))?;
        if let Some(version) = any["schema_version"].as_u64().filter(|v| *v > SCHEMA_VERSION.into()) {
            return Err(malformed(format!("written with schema {version}, this build reads {SCHEMA_VERSION}")));
        }
        let stored: Stored = serde_json::from_value(any).map_err(|e| malformed(e.to_string()))?;
        if stored.model_sha256 != model_sha256 {
            let start = |s: &str| s.chars().take(8).collect::<String>();
            return Err(CurvesFileError::OtherModel { file, asked: start(&stored.model_sha256), found: start(model_sha256) });
        }
        let Stored { model_sha256, how, images, groups, .. } = stored;
        let curves = Self { how, images, groups, model_sha256 };
        curves.check().map_err(|fault| malformed(fault.to_string()))?;
        Ok(curves)
    }
}

fn check_curve(group: &str, points: &[Point]) -> Result<(), CurveFault> {
    let fault = |what: String| Err(CurveFault { group: group.to_string(), what });
    if let Some(p) = points.iter().find(|p| !p.loss.is_finite() || p.loss < 0.0) {
        return fault(format!("the loss at width {} is {}", p.width, p.loss));
    }
    if let Some(pair) = points.windows(2).find(|pair| pair[0].width >= pair[1].width) {
        return fault(format!("widths do not ascend: {} before {}", pair[0].width, pair[1].width));
    }
    match points.last() {
        None => fault("has no points".into()),
        Some(p) if p.loss != 0.0 => fault(format!("the whole group, {} units, has loss {} instead of 0", p.width, p.loss)),
        Some(_) => Ok(()),
    }
}

/// A curve without runs of the model: errors of the layer's output by width, times the weight of such an error for the loss.
///
/// To second order, an error d of a layer's output costs KL `1/2 E[(g . d)^2]`, with g the gradient of log-probabilities of labels
/// drawn from the model itself (the Fisher form). Where d has mean 0, is independent of g and equal in all directions, that is
/// `error x weight`: `error` the mean of d^2 over rows and features, `weight` half the mean over images of the sum of g^2 over the
/// rows and features of an image. The product is as good as that independence, so such curves say [`How::Predicted`].
/// `errors`: width and error; the result is for [`Curves::insert`].
pub fn predicted(errors: &[(usize, f64)], weight: f64) -> Vec<Point> {
    errors.iter().map(|(width, error)| Point { width: *width, loss: error * weight }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curves(points: &[(usize, f64)], units: usize) -> Result<Curves, CurveFault> {
        let mut curves = Curves::empty(How::Measured, 8, "ab12");
        curves.insert("a", units, points.iter().map(|(width, loss)| Point { width: *width, loss: *loss }).collect())?;
        Ok(curves)
    }

    #[test]
    fn what_is_no_curve_is_refused() {
        for bad in [&[(1, f64::NAN)][..], &[(1, f64::INFINITY)], &[(1, -1.0)], &[(1, 0.5), (1, 0.5)], &[(4, 0.5)], &[(5, 0.0)]] {
            assert!(curves(bad, 4).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn predictions_are_products() {
        assert_eq!(predicted(&[(2, 0.5)], 4.0), [Point { width: 2, loss: 2.0 }]);
    }
}
