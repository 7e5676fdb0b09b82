//! Content of values whose elements only change places: which element of the input each element of the output is.
//!
//! Example: a `[2, 3]` value has the strides 3 and 1; its transpose is the grid of the offsets `[0, 1, 2]` and `[0, 3]`, that is
//! elements 0, 3, 1, 4, 2, 5.

use super::{Dim, Fact, KNOWN_MAX, Known};

impl Known {
    /// The elements at `positions`, in that order; `None` where one lies outside.
    pub fn pick(&self, positions: &[usize]) -> Option<Self> {
        Some(match self {
            Known::Ints(v) => Known::Ints(positions.iter().map(|p| v.get(*p).cloned()).collect::<Option<_>>()?),
            Known::Floats(v) => Known::Floats(positions.iter().map(|p| v.get(*p).copied()).collect::<Option<_>>()?),
        })
    }

    /// All elements of `parts`, one after the other; `None` where integers meet floats or there is nothing.
    pub fn joined(parts: &[&Known]) -> Option<Self> {
        let mut parts = parts.iter();
        let mut all = (*parts.next()?).clone();
        for part in parts {
            match (&mut all, part) {
                (Known::Ints(a), Known::Ints(b)) => a.extend(b.iter().cloned()),
                (Known::Floats(a), Known::Floats(b)) => a.extend(b),
                _ => return None,
            }
        }
        Some(all)
    }
}

impl Fact {
    /// The shape, where all sizes are numbers.
    pub fn sizes(&self) -> Option<Vec<usize>> {
        self.shape.as_ref()?.iter().map(Dim::size).collect()
    }

    /// The content of a value of the given shape whose elements are those of this one at the [`grid`] of offsets that `offsets`
    /// makes from this value's sizes and strides, one list per axis of `shape`. `None` where something is not known, or the
    /// result is larger than [`KNOWN_MAX`].
    pub fn moved(&self, shape: &[Dim], offsets: impl FnOnce(&[usize], &[usize]) -> Vec<Vec<usize>>) -> Option<Known> {
        let known = self.known.as_ref()?;
        let sizes = self.sizes()?;
        // Counted before any list is made: a model may say any size.
        match element_count(shape)? {
            0 => known.pick(&[]),
            _ => known.pick(&grid(&offsets(&sizes, &strides(&sizes)))),
        }
    }
}

/// Number of elements of a shape, where it is a number of at most [`KNOWN_MAX`].
pub fn element_count(shape: &[Dim]) -> Option<usize> {
    let sizes: Vec<usize> = shape.iter().map(Dim::size).collect::<Option<_>>()?;
    if sizes.contains(&0) {
        return Some(0);
    }
    sizes.iter().try_fold(1usize, |n, s| n.checked_mul(*s)).filter(|n| *n <= KNOWN_MAX)
}

/// Distance, in elements, of neighbours along each axis of a row-major value.
pub fn strides(sizes: &[usize]) -> Vec<usize> {
    let mut out = vec![1; sizes.len()];
    for axis in (1..sizes.len()).rev() {
        out[axis - 1] = out[axis] * sizes[axis];
    }
    out
}

/// Sums of one offset per axis, row-major over the axes.
pub fn grid(offsets: &[Vec<usize>]) -> Vec<usize> {
    offsets.iter().fold(vec![0], |bases, axis| bases.iter().flat_map(|base| axis.iter().map(move |o| base + o)).collect())
}

/// Offsets of the positions `index` along an axis with this stride.
pub fn along(index: impl IntoIterator<Item = usize>, stride: usize) -> Vec<usize> {
    index.into_iter().map(|i| i * stride).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(sizes: &[usize]) -> Vec<Dim> {
        sizes.iter().map(|s| Dim::from(*s)).collect()
    }

    #[test]
    fn a_grid_with_swapped_strides_is_a_transpose() {
        let fact = Fact::new(None, Some(sizes(&[2, 3]))).with_known(Some(Known::Floats(vec![0., 1., 2., 3., 4., 5.])));
        let swap = |sizes: &[usize], strides: &[usize]| vec![along(0..sizes[1], strides[1]), along(0..sizes[0], strides[0])];
        assert_eq!(fact.moved(&sizes(&[3, 2]), swap), Some(Known::Floats(vec![0., 3., 1., 4., 2., 5.])));
    }

    #[test]
    fn large_results_are_not_made() {
        let fact = Fact::new(None, Some(Vec::new())).with_known(Some(Known::Floats(vec![7.0])));
        let never = |_: &[usize], _: &[usize]| unreachable!("counted first");
        assert_eq!(fact.moved(&sizes(&[65, 65]), never), None);
        assert_eq!(fact.moved(&sizes(&[usize::MAX, 0]), never), Some(Known::Floats(vec![])));
        assert_eq!(grid(&[]), vec![0]);
    }

    #[test]
    fn integers_and_floats_do_not_join() {
        let (a, b) = (Known::Ints(vec![Dim::from(1i64)]), Known::Floats(vec![1.0]));
        assert_eq!(Known::joined(&[&a, &a]).map(|k| k.len()), Some(2));
        assert_eq!(Known::joined(&[&a, &b]), None);
        assert_eq!(Known::joined(&[]), None);
    }
}
