//! The bytes of a tensor: as they are, or as a selection of others that is gathered when somebody looks.
//!
//! Example: keeping 3,686 of the rows of a weight `[4096, 1024]` notes the rows. Saving copies them from the mapped file into the new
//! one, so that a cut model is never in memory as a whole; whoever reads elements finds them gathered, once.

use bytes::Bytes;
use std::io::{self, Write};
use std::ops::Deref;
use std::sync::{Arc, OnceLock};

/// Unit: bytes. Selections of fewer are gathered at once: there are many of them, and they are looked at.
const LATE_FROM: usize = 4096;

/// Bytes that are shared by clones; reading them gathers them, [`Elements::len`] and [`Elements::write_to`] do not.
#[derive(Clone)]
pub struct Elements(Held);

#[derive(Clone)]
enum Held {
    Whole(Bytes),
    Selected(Arc<Selection>),
}

/// What stays of a tensor.
struct Selection {
    /// The elements of the whole tensor, row-major.
    source: Bytes,
    /// Unit: bytes of one element.
    width: usize,
    /// Shape of the whole tensor.
    dims: Vec<usize>,
    /// For each axis the positions that stay, in their order; `None`: all.
    kept: Vec<Option<Vec<usize>>>,
    gathered: OnceLock<Bytes>,
}

impl Elements {
    /// Unit: bytes.
    pub fn len(&self) -> usize {
        match &self.0 {
            Held::Whole(bytes) => bytes.len(),
            Held::Selected(selection) => selection.len(),
        }
    }

    /// Whether there are none: of an empty tensor, of strings, or left out (`Graph::hollow`).
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether they would have to be gathered to be read.
    pub fn is_late(&self) -> bool {
        matches!(&self.0, Held::Selected(selection) if selection.gathered.get().is_none())
    }

    /// The bytes themselves, shared.
    pub fn to_bytes(&self) -> Bytes {
        self.gathered().clone()
    }

    /// What is at `indices` along `axis` of a tensor of this shape with elements of `width` bytes; indices must lie inside.
    pub(super) fn take(&self, dims: &[usize], width: usize, axis: usize, indices: &[usize]) -> Self {
        let mut selection = match &self.0 {
            Held::Selected(s) if self.is_late() => Selection {
                source: s.source.clone(),
                width,
                dims: s.dims.clone(),
                kept: s.kept.clone(),
                gathered: OnceLock::new(),
            },
            _ => Selection {
                source: self.to_bytes(),
                width,
                dims: dims.to_vec(),
                kept: vec![None; dims.len()],
                gathered: OnceLock::new(),
            },
        };
        let before = selection.kept[axis].take();
        selection.kept[axis] = Some(match before {
            Some(before) => indices.iter().map(|i| before[*i]).collect(),
            None => indices.to_vec(),
        });
        match selection.len() < LATE_FROM {
            true => selection.gather().into(),
            false => Self(Held::Selected(Arc::new(selection))),
        }
    }

    /// Writes all bytes in order without keeping them.
    pub fn write_to(&self, writer: &mut dyn Write) -> io::Result<()> {
        // A MiB at a time: Linux' ext4 takes ten times as long for one call with hundreds of them.
        let whole = |bytes: &[u8], writer: &mut dyn Write| bytes.chunks(1 << 20).try_for_each(|chunk| writer.write_all(chunk));
        match &self.0 {
            Held::Whole(bytes) => whole(bytes, writer),
            Held::Selected(s) => match s.gathered.get() {
                Some(bytes) => whole(bytes, writer),
                None => s.each(&mut |part| writer.write_all(part)),
            },
        }
    }

    fn gathered(&self) -> &Bytes {
        match &self.0 {
            Held::Whole(bytes) => bytes,
            Held::Selected(s) => s.gathered.get_or_init(|| s.gather().into()),
        }
    }
}

impl Selection {
    /// How many positions of an axis stay.
    fn size(&self, axis: usize) -> usize {
        self.kept[axis].as_ref().map_or(self.dims[axis], Vec::len)
    }

    fn len(&self) -> usize {
        (0..self.dims.len()).map(|axis| self.size(axis)).product::<usize>() * self.width
    }

    fn gather(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.len());
        let done: Result<(), std::convert::Infallible> = self.each(&mut |part| {
            out.extend_from_slice(part);
            Ok(())
        });
        let Ok(()) = done;
        out
    }

    /// Hands out all bytes in order, part by part.
    fn each<X>(&self, put: &mut impl FnMut(&[u8]) -> Result<(), X>) -> Result<(), X> {
        match self.kept.iter().rposition(Option::is_some) {
            Some(last) => self.walk(0, last, &self.source, &mut Vec::new(), put),
            None => put(&self.source),
        }
    }

    /// The part of [`Selection::each`] below one position of the axes before `axis`, whose bytes are `from`; behind `last` all stays.
    fn walk<X>(
        &self,
        axis: usize,
        last: usize,
        from: &[u8],
        columns: &mut Vec<u8>,
        put: &mut impl FnMut(&[u8]) -> Result<(), X>,
    ) -> Result<(), X> {
        let row = self.dims[axis + 1..].iter().product::<usize>() * self.width;
        let mut each = |row: &[u8], columns: &mut Vec<u8>| match axis == last {
            true => put(row),
            false => self.walk(axis + 1, last, row, columns, put),
        };
        match &self.kept[axis] {
            None => from.chunks_exact(row.max(1)).try_for_each(|part| each(part, columns)),
            Some(kept) if axis == last && [1, 2, 4, 8].contains(&row) => {
                columns.clear();
                match row {
                    1 => select::<1>(from, kept, columns),
                    2 => select::<2>(from, kept, columns),
                    4 => select::<4>(from, kept, columns),
                    _ => select::<8>(from, kept, columns),
                }
                put(columns)
            }
            Some(kept) => kept.iter().try_for_each(|i| each(&from[i * row..(i + 1) * row], columns)),
        }
    }
}

/// Appends single elements: a size that is known here makes them several times as fast as short slices.
fn select<const N: usize>(from: &[u8], kept: &[usize], out: &mut Vec<u8>) {
    let from = from.as_chunks::<N>().0;
    out.resize(kept.len() * N, 0);
    out.as_chunks_mut::<N>().0.iter_mut().zip(kept).for_each(|(to, i)| *to = from[*i]);
}

impl Deref for Elements {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.gathered()
    }
}

impl From<Bytes> for Elements {
    fn from(bytes: Bytes) -> Self {
        Self(Held::Whole(bytes))
    }
}

impl From<Vec<u8>> for Elements {
    fn from(bytes: Vec<u8>) -> Self {
        Bytes::from(bytes).into()
    }
}

impl Default for Elements {
    fn default() -> Self {
        Bytes::new().into()
    }
}

impl PartialEq for Elements {
    fn eq(&self, other: &Self) -> bool {
        self.len() == other.len() && self[..] == other[..]
    }
}

impl std::fmt::Debug for Elements {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: u32) -> Elements {
        (0..count).flat_map(u32::to_le_bytes).collect::<Vec<u8>>().into()
    }

    /// What each combination of positions gives, element by element.
    fn expected(dims: [usize; 3], kept: [&[usize]; 3], width: usize, from: &[u8]) -> Vec<u8> {
        let at = |i: usize, j: usize, k: usize| ((i * dims[1] + j) * dims[2] + k) * width;
        let mut out = Vec::new();
        for i in kept[0] {
            for j in kept[1] {
                kept[2].iter().for_each(|k| out.extend_from_slice(&from[at(*i, *j, *k)..at(*i, *j, *k) + width]));
            }
        }
        out
    }

    #[test]
    fn selections_of_any_axes_are_what_single_elements_give_whether_written_or_read() {
        let dims = [30, 20, 40];
        let all: Vec<Vec<usize>> = dims.iter().map(|d| (0..*d).collect()).collect();
        let some: Vec<Vec<usize>> = dims.iter().map(|d| (0..*d).rev().filter(|i| i % 4 != 1).collect()).collect();
        for width in [1, 2, 4] {
            let whole = numbers(30 * 20 * 10 * width);
            for axes in 1..8_usize {
                let cut: Vec<usize> = (0..3).rev().filter(|axis| axes >> axis & 1 == 1).collect();
                let (mut found, mut shape) = (whole.clone(), dims.to_vec());
                for axis in &cut {
                    found = found.take(&shape, width as usize, *axis, &some[*axis]);
                    shape[*axis] = some[*axis].len();
                }
                let kept = [0, 1, 2].map(|axis| if cut.contains(&axis) { &some[axis][..] } else { &all[axis][..] });
                let expected = expected(dims, kept, width as usize, &whole);
                let mut written = Vec::new();
                found.write_to(&mut written).unwrap();
                assert!(found.is_late() && found.len() == expected.len());
                assert!(written == expected && found[..] == expected[..], "width {width}, axes {cut:?}");
                assert!(!found.is_late() && found == Elements::from(expected));
            }
        }
    }

    #[test]
    fn a_second_selection_counts_in_the_first_one_whether_that_was_read_or_not() {
        let rows = |e: &Elements, of: usize, kept: &[usize]| e.take(&[of, 512], 4, 0, kept);
        let first = rows(&numbers(8 * 512), 8, &[7, 5, 3, 1]);
        let late = rows(&first, 4, &[2, 1, 0]);
        assert!(late.is_late() && !first.is_empty() && first.is_late());
        assert_eq!(first[..4], 3584_u32.to_le_bytes());
        assert_eq!(rows(&first, 4, &[2, 1, 0]), late);
        assert_eq!((late.len(), &late[..4]), (3 * 2048, &1536_u32.to_le_bytes()[..]));
        assert_eq!(rows(&late, 3, &[]), Elements::default());
    }

    #[test]
    fn small_selections_are_gathered_at_once() {
        assert!(!numbers(1000).take(&[10, 100], 4, 1, &[3]).is_late());
    }
}
