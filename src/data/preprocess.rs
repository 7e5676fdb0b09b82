//! From a decoded image to the numbers a network was trained on: resize, centre crop, rescale, normalise.
//!
//! Example: timm's evaluation transform for 224 x 224 at crop_pct 0.9 takes an image of 640 x 427 to 373 x 248 (shortest edge
//! to floor(224 / 0.9), bicubic), cuts the middle 224 x 224, and gives x / 255, minus mean, over std, as `[3, 224, 224]`.
//! All of resize and crop is done on 8-bit integers, so the result is the same on every machine.
//!
//! Source: `create_transform` of timm 1.0 and the image processors of transformers 5, compared in `tests/data.rs`.

use super::resize::{Filter, Method, Passes, Pixels, resize};

/// How an image is brought to size.
#[derive(Clone, Debug, PartialEq)]
pub enum Resize {
    /// Not at all.
    Keep,
    /// To exactly this size; proportions may change.
    Exact {
        /// Rows.
        height: usize,
        /// Columns.
        width: usize,
    },
    /// The shorter edge becomes `edge`; the longer one keeps the proportion, rounded down (torchvision).
    ShortestEdge {
        /// Pixels.
        edge: usize,
    },
    /// The smallest image of the same proportion that covers height x width, rounded to nearest (timm, targets not square).
    Cover {
        /// Rows.
        height: usize,
        /// Columns.
        width: usize,
    },
    /// The largest image of the same proportion inside height x width, rounded to nearest (timm, crop_mode border).
    Fit {
        /// Rows.
        height: usize,
        /// Columns.
        width: usize,
    },
}

/// How half a pixel is rounded when the middle is cut out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CropRounding {
    /// To the even neighbour (torchvision, so timm).
    HalfEven,
    /// Down (Hugging Face).
    Down,
}

/// The middle `height` x `width` of an image; what lies outside the image is filled.
#[derive(Clone, Debug, PartialEq)]
pub struct Crop {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// Where a margin is odd.
    pub rounding: CropRounding,
    /// The colour outside the image, per channel.
    pub fill: [u8; 3],
}

/// One preprocessing recipe.
#[derive(Clone, Debug, PartialEq)]
pub struct Preprocess {
    /// How the image is brought to size.
    pub resize: Resize,
    /// How pixels are interpolated while resizing.
    pub method: Method,
    /// What is cut out of the resized image.
    pub crop: Option<Crop>,
    /// What a byte is multiplied by.
    pub rescale: Rescale,
    /// Subtracted from each channel after rescaling; one per channel, or one for all.
    pub mean: Vec<f32>,
    /// Each channel is divided by this afterwards; as many as `mean`, none zero.
    pub std: Vec<f32>,
}

/// What a byte is multiplied by before normalisation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rescale {
    /// Divided by 255.
    By255,
    /// Multiplied by this number.
    Factor(f64),
}

impl Rescale {
    /// The number that a byte becomes.
    fn apply(self, byte: u8) -> f32 {
        match self {
            Rescale::By255 => f32::from(byte) / 255.0,
            Rescale::Factor(factor) => (f64::from(byte) * factor) as f32,
        }
    }
}

/// A resized image may have at most this many rows or columns.
const LARGEST_EDGE: f64 = 1e9;

impl Preprocess {
    /// The recipe of explicit `--mean` and `--std`: shortest edge to the input's size (to cover it, where it is not square),
    /// bicubic, the middle cut out.
    pub fn plain(height: usize, width: usize, mean: Vec<f32>, std: Vec<f32>) -> Preprocess {
        let resize = if height == width { Resize::ShortestEdge { edge: height } } else { Resize::Cover { height, width } };
        let crop = Some(Crop { height, width, rounding: CropRounding::HalfEven, fill: [0; 3] });
        Preprocess {
            resize,
            method: Method { filter: Filter::Bicubic, passes: Passes::Pillow },
            crop,
            rescale: Rescale::By255,
            mean,
            std,
        }
    }

    /// The size of what comes out, `(height, width)`; `None` where it depends on the image.
    pub fn output_size(&self) -> Option<(usize, usize)> {
        match (&self.crop, &self.resize) {
            (Some(crop), _) => Some((crop.height, crop.width)),
            (None, Resize::Exact { height, width }) => Some((*height, *width)),
            (None, _) => None,
        }
    }

    /// Resizes and crops; still 8-bit, the interleaved channels of `image`.
    pub fn apply(&self, image: &Pixels) -> Pixels {
        let (height, width) = self.resized(image.height, image.width);
        let Some(crop) = &self.crop else {
            return resize(image, height, width, 0..height, 0..width, self.method);
        };
        let (top, left) = (offset(height, crop.height, crop.rounding), offset(width, crop.width, crop.rounding));
        let rows = top.inside..(top.inside + crop.height).min(height);
        let columns = left.inside..(left.inside + crop.width).min(width);
        let part = resize(image, height, width, rows, columns, self.method);
        if (part.height, part.width) == (crop.height, crop.width) {
            return part;
        }
        pad(&part, crop, top.before, left.before)
    }

    /// The size after resizing an image of `height` x `width`.
    fn resized(&self, height: usize, width: usize) -> (usize, usize) {
        let (h, w) = (height as f64, width as f64);
        let (rows, columns) = match self.resize {
            Resize::Keep => (h, w),
            Resize::Exact { height, width } => (height as f64, width as f64),
            Resize::ShortestEdge { edge } => {
                let edge = edge as f64;
                let long = (edge * h.max(w) / h.min(w)).floor();
                if w <= h { (long, edge) } else { (edge, long) }
            }
            Resize::Cover { height, width } => {
                let ratio = (h / height as f64).min(w / width as f64);
                ((h / ratio).round_ties_even(), (w / ratio).round_ties_even())
            }
            Resize::Fit { height, width } => {
                let ratio = (h / height as f64).max(w / width as f64);
                ((h / ratio).round_ties_even(), (w / ratio).round_ties_even())
            }
        };
        let whole = |x: f64| x.clamp(1.0, LARGEST_EDGE) as usize;
        (whole(rows), whole(columns))
    }

    /// The numbers of an image, channel by channel: `[channels, height, width]` in C order.
    pub fn normalise(&self, image: &Pixels) -> Vec<f32> {
        let tables: Vec<[f32; 256]> = (0..image.channels).map(|c| self.table(c)).collect();
        let area = image.height * image.width;
        let mut out = Vec::with_capacity(area * image.channels);
        for (c, table) in tables.iter().enumerate() {
            out.extend(image.bytes.iter().skip(c).step_by(image.channels).map(|b| table[usize::from(*b)]));
        }
        out
    }

    /// What each byte becomes in channel `channel`: (byte * rescale - mean) / std.
    pub(crate) fn table(&self, channel: usize) -> [f32; 256] {
        let (mean, std) = self.mean_std(channel);
        std::array::from_fn(|byte| (self.rescale.apply(byte as u8) - mean) / std)
    }

    /// Mean and std of a channel.
    pub(crate) fn mean_std(&self, channel: usize) -> (f32, f32) {
        let of = |list: &[f32], none: f32| list.get(channel).or(list.first()).copied().unwrap_or(none);
        (of(&self.mean, 0.0), of(&self.std, 1.0))
    }
}

/// Where a crop starts on one axis.
struct Offset {
    /// The first position inside the image.
    inside: usize,
    /// Positions filled before the image.
    before: usize,
}

/// Centres `wanted` on `size` positions. Where the image is smaller, the odd filled position stands behind it.
fn offset(size: usize, wanted: usize, rounding: CropRounding) -> Offset {
    if size < wanted {
        return Offset { inside: 0, before: (wanted - size) / 2 };
    }
    let margin = size - wanted;
    let half = margin / 2;
    let up = rounding == CropRounding::HalfEven && margin % 2 == 1 && half % 2 == 1;
    Offset { inside: half + usize::from(up), before: 0 }
}

/// Sets `part` into a filled image of the crop's size, `top` rows down and `left` columns in.
fn pad(part: &Pixels, crop: &Crop, top: usize, left: usize) -> Pixels {
    let c = part.channels;
    let mut bytes: Vec<u8> = crop.fill[..c.min(3)].iter().copied().cycle().take(crop.height * crop.width * c).collect();
    for (y, row) in part.bytes.chunks_exact((part.width * c).max(1)).enumerate() {
        let start = ((top + y) * crop.width + left) * c;
        bytes[start..start + row.len()].copy_from_slice(row);
    }
    Pixels { height: crop.height, width: crop.width, channels: c, bytes }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crop_offsets_round_as_their_sources_do() {
        let at = |size, rounding| offset(size, 4, rounding).inside;
        assert_eq!([5, 6, 7, 8, 9].map(|s| at(s, CropRounding::HalfEven)), [0, 1, 2, 2, 2]);
        assert_eq!([5, 6, 7, 8, 9].map(|s| at(s, CropRounding::Down)), [0, 1, 1, 2, 2]);
    }

    #[test]
    fn small_images_are_padded_behind_first() {
        let one = Pixels { height: 1, width: 1, channels: 1, bytes: vec![9] };
        let crop = Crop { height: 2, width: 4, rounding: CropRounding::Down, fill: [7, 0, 0] };
        let p = Preprocess { resize: Resize::Keep, crop: Some(crop), ..Preprocess::plain(1, 1, vec![0.0], vec![1.0]) };
        assert_eq!(p.apply(&one).bytes, vec![7, 9, 7, 7, 7, 7, 7, 7]);
    }

    #[test]
    fn normalising_separates_channels() {
        let p = Preprocess::plain(1, 2, vec![0.0, 0.5, 1.0], vec![1.0, 0.5, 2.0]);
        let image = Pixels { height: 1, width: 2, channels: 3, bytes: vec![0, 0, 0, 255, 255, 255] };
        assert_eq!(p.normalise(&image), vec![0.0, 1.0, -1.0, 1.0, -0.5, 0.0]);
    }

    #[test]
    fn extreme_proportions_do_not_allocate_the_whole_image() {
        let line = Pixels { height: 1, width: 60_000, channels: 3, bytes: vec![100; 180_000] };
        let p = Preprocess::plain(224, 224, vec![0.0], vec![1.0]);
        assert_eq!(p.apply(&line).bytes.len(), 224 * 224 * 3);
    }
}
