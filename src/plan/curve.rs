//! Loss against width, between the widths at which it is known.
//!
//! What a cut loses grows with the square of the error that it makes, so the root of the loss is drawn as straight lines between the
//! known points: monotone, 0 at full width, and convex wherever the roots are. Example: 0.04 at half of 64 units gives a root of 0.2
//! there, 0.1 at 48 units, so a loss of 0.01.
//! Invariant: a greater width never loses more; measured points that say so by their noise are raised to the next greater width's.

use std::collections::BTreeMap;

/// What each group loses at some widths.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Losses {
    /// Where they come from: `measured`, `predicted`.
    pub how: String,
    /// By group id: units that stay, over all heads, and the loss then; in any order.
    pub groups: BTreeMap<String, Vec<(usize, f64)>>,
}

/// One group's loss at any width.
pub(super) struct Curve {
    /// Width and root of the loss, the widest first.
    points: Vec<(f64, f64)>,
}

impl Curve {
    /// From known points, of a group of so many units. None below full width: no curve.
    pub(super) fn new(points: &[(usize, f64)], units: usize) -> Option<Self> {
        let below: BTreeMap<usize, f64> = points.iter().copied().filter(|(w, loss)| *w < units && loss.is_finite()).collect();
        let mut out = vec![(units as f64, 0.0)];
        let mut least = 0f64;
        for (width, loss) in below.iter().rev() {
            least = least.max(*loss);
            out.push((*width as f64, least.sqrt()));
        }
        (out.len() > 1).then_some(Self { points: out })
    }

    /// The loss where so many units stay. Below the least known width the last line goes on.
    pub(super) fn at(&self, width: usize) -> f64 {
        let (width, last) = (width as f64, self.points.len() - 1);
        let below = (1..last).find(|i| self.points[*i].0 <= width).unwrap_or(last);
        let ((w1, r1), (w0, r0)) = (self.points[below - 1], self.points[below]);
        let root = r1 + (w1 - width) * (r0 - r1) / (w1 - w0);
        (root * root).max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_of_the_loss_is_straight_between_points_and_goes_on() {
        let curve = Curve::new(&[(32, 0.04), (64, 0.0)], 64).unwrap();
        for (width, loss) in [(64, 0.0), (48, 0.01), (32, 0.04), (16, 0.09), (0, 0.16)] {
            assert!((curve.at(width) - loss).abs() < 1e-12, "{width}: {}", curve.at(width));
        }
        assert!(Curve::new(&[(64, 0.0)], 64).is_none());
    }

    #[test]
    fn noise_does_not_make_a_narrower_group_better() {
        let curve = Curve::new(&[(8, 0.5), (16, 0.2), (24, 0.3), (28, -0.001)], 32).unwrap();
        let losses: Vec<f64> = (0..=32).map(|w| curve.at(w)).collect();
        assert!(losses.windows(2).all(|w| w[0] >= w[1]), "{losses:?}");
        assert!((curve.at(16) - 0.3).abs() < 1e-12 && curve.at(28) <= 0.0 && curve.at(32) <= 0.0);
    }
}
