//! Resizing of 8-bit images, bit for bit as Pillow does it.
//!
//! Example: 640 x 427 to 336 x 224 with [`Filter::Bicubic`]: every output column is a weighted sum over about 8 input columns,
//! rounded to 8 bits, then every output row a weighted sum over about 8 of those rows (or the other way round: [`Passes`]). Where an image shrinks, the filter
//! widens with the scale (antialias). Weights are 22-bit fixed-point numbers and sums are exact integers, so the result does not
//! depend on the machine. Only the asked window of the resized image is computed.
//!
//! Source: the behaviour of Pillow's `Image.resize`, which the tests compare bit for bit.

use std::f64::consts::PI;
use std::ops::Range;

/// Fraction bits of a weight: 8 bits of the pixel, 2 bits for sign and overshoot and these fill 32.
const WEIGHT_BITS: u32 = 22;

/// An 8-bit image in rows of interleaved channels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pixels {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// 1 (grey) or 3 (red, green, blue).
    pub channels: usize,
    /// `height * width * channels` bytes.
    pub bytes: Vec<u8>,
}

/// How pixels are interpolated; the numbers in the comments are Pillow's and Hugging Face's `resample`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// 0: the pixel under the centre.
    Nearest,
    /// 1: windowed sinc over 6 pixels.
    Lanczos,
    /// 2: triangle over 2 pixels.
    Bilinear,
    /// 3: cubic with a = -0.5 over 4 pixels.
    Bicubic,
    /// 4: equal weights over 1 pixel.
    Box,
    /// 5: Hamming-windowed sinc over 2 pixels.
    Hamming,
}

/// Which axis is filtered first. Each pass rounds to 8 bits, so the order shows, in one or two levels where it matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passes {
    /// As Pillow 13.0.0 was observed to choose: vertical first where the height shrinks by more than twice what the width does.
    Pillow,
    /// Always horizontal first: torchvision on tensors, and earlier versions of Pillow.
    HorizontalFirst,
}

/// How an image is resized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Method {
    /// How pixels are interpolated.
    pub filter: Filter,
    /// Which axis comes first.
    pub passes: Passes,
}

impl Filter {
    /// The filters by their number in `resample`.
    const ALL: [Filter; 6] = [Filter::Nearest, Filter::Lanczos, Filter::Bilinear, Filter::Bicubic, Filter::Box, Filter::Hamming];

    /// The filter with this `resample` number.
    pub fn from_number(number: u64) -> Option<Filter> {
        usize::try_from(number).ok().and_then(|i| Filter::ALL.get(i)).copied()
    }

    /// The filter with this name, as timm spells it.
    pub fn from_name(name: &str) -> Option<Filter> {
        Filter::ALL.into_iter().find(|f| f.name() == name)
    }

    /// Its name, as timm spells it.
    pub fn name(self) -> &'static str {
        match self {
            Filter::Nearest => "nearest",
            Filter::Lanczos => "lanczos",
            Filter::Bilinear => "bilinear",
            Filter::Bicubic => "bicubic",
            Filter::Box => "box",
            Filter::Hamming => "hamming",
        }
    }

    /// Half the width of the filter, in pixels of the smaller grid.
    fn support(self) -> f64 {
        match self {
            Filter::Nearest | Filter::Box => 0.5,
            Filter::Bilinear | Filter::Hamming => 1.0,
            Filter::Bicubic => 2.0,
            Filter::Lanczos => 3.0,
        }
    }

    /// Its value at distance `x` from the centre.
    fn weight(self, x: f64) -> f64 {
        let r = x.abs();
        match self {
            // The left edge belongs to the neighbour, so that a pixel between two cells counts once.
            Filter::Nearest | Filter::Box => f64::from(u8::from(x > -0.5 && x <= 0.5)),
            Filter::Bilinear => (1.0 - r).max(0.0),
            Filter::Hamming if r < 1.0 => sinc(r) * (0.54 + 0.46 * (r * PI).cos()),
            Filter::Bicubic if r < 1.0 => (1.5 * r - 2.5) * r * r + 1.0,
            Filter::Bicubic if r < 2.0 => (((r - 5.0) * r + 8.0) * r - 4.0) * -0.5,
            Filter::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            Filter::Hamming | Filter::Bicubic | Filter::Lanczos => 0.0,
        }
    }
}

/// sin(pi x) / (pi x).
fn sinc(x: f64) -> f64 {
    if x == 0.0 { 1.0 } else { (x * PI).sin() / (x * PI) }
}

/// The weights of one output position: input positions from `first`, one fixed-point weight each.
struct Taps {
    first: usize,
    weights: Vec<i32>,
}

/// The taps of the output positions in `window`, where `from` positions become `to`.
///
/// w_i = f((i + 1/2 - c) / s) / sum_j f((j + 1/2 - c) / s), c = (o + 1/2) * from / to, s = max(1, from / to)
fn taps(from: usize, to: usize, window: &Range<usize>, filter: Filter) -> Vec<Taps> {
    let scale = from as f64 / to as f64;
    let stretch = scale.max(1.0);
    let support = filter.support() * stretch;
    let inverse = 1.0 / stretch;
    window
        .clone()
        .map(|o| {
            let centre = (o as f64 + 0.5) * scale;
            let first = (centre - support + 0.5).max(0.0) as usize;
            let end = ((centre + support + 0.5).max(0.0) as usize).min(from);
            let raw: Vec<f64> = (first..end).map(|i| filter.weight((i as f64 - centre + 0.5) * inverse)).collect();
            let total: f64 = raw.iter().sum();
            let weights = raw.iter().map(|w| fixed_point(if total == 0.0 { *w } else { w / total })).collect();
            Taps { first, weights }
        })
        .collect()
}

/// Rounds half away from zero, as C does when 0.5 is added before a cast.
fn fixed_point(weight: f64) -> i32 {
    let scaled = weight * f64::from(1u32 << WEIGHT_BITS);
    (if scaled < 0.0 { scaled - 0.5 } else { scaled + 0.5 }) as i32
}

/// A sum of pixel times weight, started at one half, back to 8 bits.
fn to_byte(sum: i32) -> u8 {
    (sum >> WEIGHT_BITS).clamp(0, 255) as u8
}

/// The window `rows` x `columns` of `image` resized to `height` x `width`.
///
/// Shape: `[rows.len(), columns.len(), channels]`. The ranges must lie inside `0..height` and `0..width`; they are clipped.
pub fn resize(image: &Pixels, height: usize, width: usize, rows: Range<usize>, columns: Range<usize>, how: Method) -> Pixels {
    let filter = how.filter;
    let rows = rows.start.min(height)..rows.end.min(height);
    let columns = columns.start.min(width)..columns.end.min(width);
    if filter == Filter::Nearest {
        return nearest(image, height, width, &rows, &columns);
    }
    // An axis that keeps its size is not filtered at all; the other one still is.
    let vertical = (height != image.height).then(|| taps(image.height, height, &rows, filter));
    let horizontal = (width != image.width).then(|| taps(image.width, width, &columns, filter));
    let (rows, columns) = (span(vertical.as_deref(), &rows), span(horizontal.as_deref(), &columns));
    match (vertical, horizontal) {
        (None, None) => crop(image, &rows, &columns),
        (None, Some(taps)) => filter_rows(image, &rows, 0, &taps),
        (Some(taps), None) => filter_columns(&crop(image, &rows, &columns), rows.start, &taps),
        (Some(vertical), Some(horizontal)) if how.passes.vertical_first(image, height, width) => {
            let short = filter_columns(&crop(image, &rows, &columns), rows.start, &vertical);
            filter_rows(&short, &(0..short.height), columns.start, &horizontal)
        }
        (Some(vertical), Some(horizontal)) => filter_columns(&filter_rows(image, &rows, 0, &horizontal), rows.start, &vertical),
    }
}

impl Passes {
    /// Whether the vertical pass comes first.
    fn vertical_first(self, image: &Pixels, height: usize, width: usize) -> bool {
        let fewer = |from: usize, to: usize| from as i64 - to as i64;
        let rows = fewer(image.height, height);
        self == Passes::Pillow && rows > 0 && 2 * fewer(image.width, width) < rows
    }
}

/// The input positions that the taps read, or the window itself where there are none.
fn span(taps: Option<&[Taps]>, window: &Range<usize>) -> Range<usize> {
    let Some(taps) = taps else { return window.clone() };
    let first = taps.iter().map(|t| t.first).min().unwrap_or(0);
    first..taps.iter().map(|t| t.first + t.weights.len()).max().unwrap_or(first)
}

/// A copy of a window; `rows` and `columns` must lie inside the image.
fn crop(image: &Pixels, rows: &Range<usize>, columns: &Range<usize>) -> Pixels {
    let c = image.channels;
    let mut bytes = Vec::with_capacity(rows.len() * columns.len() * c);
    for y in rows.clone() {
        let start = y * image.width * c;
        bytes.extend_from_slice(&image.bytes[start + columns.start * c..start + columns.end * c]);
    }
    Pixels { height: rows.len(), width: columns.len(), channels: c, bytes }
}

/// The horizontal pass over the rows `rows`; column 0 of `image` is column `offset` of the image that the taps speak of.
fn filter_rows(image: &Pixels, rows: &Range<usize>, offset: usize, taps: &[Taps]) -> Pixels {
    match image.channels {
        3 => filter_rows_of::<3>(image, rows, offset, taps),
        _ => filter_rows_of::<1>(image, rows, offset, taps),
    }
}

/// [`filter_rows`] with the channel count known, so that the sums stay in registers.
fn filter_rows_of<const C: usize>(image: &Pixels, rows: &Range<usize>, offset: usize, taps: &[Taps]) -> Pixels {
    let mut bytes = Vec::with_capacity(rows.len() * taps.len() * C);
    for row in image.bytes.chunks_exact(image.width * C).skip(rows.start).take(rows.len()) {
        for tap in taps {
            let mut sums = [1i32 << (WEIGHT_BITS - 1); C];
            let first = (tap.first - offset) * C;
            let pixels = row[first..first + tap.weights.len() * C].chunks_exact(C);
            for (pixel, weight) in pixels.zip(&tap.weights) {
                for (sum, value) in sums.iter_mut().zip(pixel) {
                    *sum = sum.wrapping_add(i32::from(*value).wrapping_mul(*weight));
                }
            }
            bytes.extend(sums.map(to_byte));
        }
    }
    Pixels { height: rows.len(), width: taps.len(), channels: C, bytes }
}

/// The vertical pass; row 0 of `image` is row `offset` of the image that the taps speak of.
fn filter_columns(image: &Pixels, offset: usize, taps: &[Taps]) -> Pixels {
    let stride = image.width * image.channels;
    let mut bytes = Vec::with_capacity(taps.len() * stride);
    let mut sums = vec![0i32; stride];
    for tap in taps {
        sums.fill(1 << (WEIGHT_BITS - 1));
        let first = (tap.first - offset) * stride;
        let rows = image.bytes[first..first + tap.weights.len() * stride].chunks_exact(stride.max(1));
        for (row, weight) in rows.zip(&tap.weights) {
            for (sum, value) in sums.iter_mut().zip(row) {
                *sum = sum.wrapping_add(i32::from(*value).wrapping_mul(*weight));
            }
        }
        bytes.extend(sums.iter().map(|s| to_byte(*s)));
    }
    Pixels { height: taps.len(), width: image.width, channels: image.channels, bytes }
}

/// Nearest neighbour: the input pixel that holds the output pixel's centre.
fn nearest(image: &Pixels, height: usize, width: usize, rows: &Range<usize>, columns: &Range<usize>) -> Pixels {
    let (ys, xs) = (nearest_positions(image.height, height), nearest_positions(image.width, width));
    let c = image.channels;
    let mut bytes = Vec::with_capacity(rows.len() * columns.len() * c);
    for y in &ys[rows.clone()] {
        for x in &xs[columns.clone()] {
            let start = (y * image.width + x) * c;
            bytes.extend_from_slice(&image.bytes[start..start + c]);
        }
    }
    Pixels { height: rows.len(), width: columns.len(), channels: c, bytes }
}

/// The input position of every output position. Pillow adds up the step instead of multiplying, so its roundings are repeated.
fn nearest_positions(from: usize, to: usize) -> Vec<usize> {
    let step = from as f64 / to as f64;
    let mut at = step * 0.5;
    (0..to)
        .map(|_| {
            let position = (at as usize).min(from.saturating_sub(1));
            at += step;
            position
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ramp(height: usize, width: usize, channels: usize) -> Pixels {
        let bytes = (0..height * width * channels).map(|i| (i * 37 % 251) as u8).collect();
        Pixels { height, width, channels, bytes }
    }

    #[test]
    fn a_window_is_the_same_part_of_the_whole() {
        let image = ramp(31, 45, 3);
        for filter in Filter::ALL {
            for (h, w) in [(17, 19), (60, 20), (31, 20), (17, 45), (31, 45), (17, 40)] {
                let how = Method { filter, passes: Passes::Pillow };
                let whole = resize(&image, h, w, 0..h, 0..w, how);
                let part = resize(&image, h, w, 3..11, 2..15, how);
                assert_eq!(crop(&whole, &(3..11), &(2..15)), part, "{filter:?} {h} {w}");
            }
        }
    }

    #[test]
    fn constant_images_stay_constant() {
        let image = Pixels { height: 9, width: 13, channels: 1, bytes: vec![200; 117] };
        for filter in Filter::ALL {
            let how = Method { filter, passes: Passes::HorizontalFirst };
            assert!(resize(&image, 5, 29, 0..5, 0..29, how).bytes.iter().all(|b| *b == 200), "{filter:?}");
        }
    }

    #[test]
    fn names_and_numbers_agree_with_pillow() {
        assert_eq!(Filter::from_number(3), Some(Filter::Bicubic));
        assert_eq!(Filter::from_number(6), None);
        assert_eq!(Filter::from_name("lanczos"), Some(Filter::Lanczos));
        assert_eq!(Filter::from_name("random"), None);
    }
}
