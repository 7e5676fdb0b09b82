//! Image files to 8-bit pixels, converted as Pillow's `convert("RGB")` or `convert("L")` does.
//!
//! Example: a palette PNG of 40 x 30 with transparency gives `[30, 40, 3]`, its palette's colours without the alpha. What a file
//! is, its first bytes say, not its name. Nothing is rotated: timm and Hugging Face ignore EXIF orientation too.
//! Invariant: sizes are checked against the limit on the header, before pixels are allocated.

use std::io::Cursor;

use image::codecs::png::PngDecoder;
use image::{DynamicImage, ImageDecoder, ImageFormat, Limits};

use super::jpeg;
use super::resize::Pixels;

/// Why an image file cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ImageFault {
    /// The file has no bytes.
    #[error("file is empty")]
    Empty,
    /// The content is neither JPEG nor PNG.
    #[error("content is neither JPEG nor PNG")]
    Format,
    /// More pixels than allowed.
    #[error("image too large ({width} x {height}, limit {limit_mpx} Mpx)")]
    TooLarge {
        /// Columns by the header.
        width: u64,
        /// Rows by the header.
        height: u64,
        /// Unit: millions of pixels.
        limit_mpx: u64,
    },
    /// The file is larger than any image within the limits needs to be.
    #[error("file too large ({bytes} bytes, limit {limit})")]
    FileTooLarge {
        /// Its size.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// The data ends before the image does.
    #[error("file is truncated")]
    Truncated,
    /// The decoder refused it.
    #[error("cannot be decoded: {cause}")]
    Damaged {
        /// What the decoder said.
        cause: String,
    },
    /// The file could not be read.
    #[error("cannot be read: {cause}")]
    Unreadable {
        /// What the system said.
        cause: String,
    },
}

/// Bytes that a decoder may allocate per pixel of the limit: 16-bit RGBA, and a copy.
const BYTES_PER_PIXEL: u64 = 16;

/// Decodes a JPEG or PNG file to `channels` (1 or 3) interleaved 8-bit channels.
///
/// Errors: [`ImageFault`], never a panic, whatever the bytes are.
pub fn decode(bytes: &[u8], channels: usize, max_pixels: u64) -> Result<Pixels, ImageFault> {
    if bytes.is_empty() {
        return Err(ImageFault::Empty);
    }
    // The decoders are foreign code on untrusted bytes: should one panic, that is one damaged image, not the end of the run.
    std::panic::catch_unwind(|| decode_unguarded(bytes, channels, max_pixels))
        .unwrap_or_else(|_| Err(ImageFault::Damaged { cause: "the decoder gave up".into() }))
}

fn decode_unguarded(bytes: &[u8], channels: usize, max_pixels: u64) -> Result<Pixels, ImageFault> {
    let mut limits = Limits::default();
    limits.max_alloc = Some(max_pixels.saturating_mul(BYTES_PER_PIXEL));
    let image = match image::guess_format(bytes) {
        Ok(ImageFormat::Png) => {
            let decoder = PngDecoder::with_limits(Cursor::new(bytes), limits).map_err(damaged)?;
            check_size(&decoder, max_pixels)?;
            DynamicImage::from_decoder(decoder).map_err(damaged)?
        }
        Ok(ImageFormat::Jpeg) => {
            let pixels = jpeg::decode(bytes, max_pixels)?;
            let broken = || ImageFault::Damaged { cause: "no pixels".into() };
            let (width, height) = (pixels.width as u32, pixels.height as u32);
            match pixels.channels {
                1 => image::GrayImage::from_raw(width, height, pixels.bytes).map(DynamicImage::ImageLuma8),
                _ => image::RgbImage::from_raw(width, height, pixels.bytes).map(DynamicImage::ImageRgb8),
            }
            .ok_or_else(broken)?
        }
        _ => return Err(ImageFault::Format),
    };
    Ok(if channels == 1 { to_grey(&image) } else { to_rgb(&image) })
}

fn damaged(error: image::ImageError) -> ImageFault {
    if matches!(&error, image::ImageError::IoError(e) if e.kind() == std::io::ErrorKind::UnexpectedEof) {
        return ImageFault::Truncated;
    }
    ImageFault::Damaged { cause: error.to_string() }
}

fn check_size(decoder: &impl ImageDecoder, max_pixels: u64) -> Result<(), ImageFault> {
    let (width, height) = decoder.dimensions();
    let (width, height) = (u64::from(width), u64::from(height));
    if width == 0 || height == 0 {
        return Err(ImageFault::Damaged { cause: "no pixels".into() });
    }
    if width * height > max_pixels {
        return Err(ImageFault::TooLarge { width, height, limit_mpx: max_pixels / 1_000_000 });
    }
    Ok(())
}

/// Red, green, blue, alpha dropped. 16-bit colour keeps its high byte, as Pillow reads such files.
fn to_rgb(image: &DynamicImage) -> Pixels {
    let bytes = match image {
        DynamicImage::ImageRgb8(i) => i.as_raw().clone(),
        DynamicImage::ImageRgba8(i) => i.pixels().flat_map(|p| [p.0[0], p.0[1], p.0[2]]).collect(),
        DynamicImage::ImageRgb16(i) => i.as_raw().iter().map(|v| (v >> 8) as u8).collect(),
        DynamicImage::ImageRgba16(i) => i.pixels().flat_map(|p| [p.0[0], p.0[1], p.0[2]].map(|v| (v >> 8) as u8)).collect(),
        grey => grey_bytes(grey).into_iter().flat_map(|v| [v; 3]).collect(),
    };
    Pixels { height: image.height() as usize, width: image.width() as usize, channels: 3, bytes }
}

/// Grey; colours by Pillow's weights for L (ITU-R 601-2 in 16-bit fixed point).
fn to_grey(image: &DynamicImage) -> Pixels {
    let (height, width) = (image.height() as usize, image.width() as usize);
    let bytes = if image.color().has_color() {
        let luma = |p: &[u8]| {
            let sum = u32::from(p[0]) * 19595 + u32::from(p[1]) * 38470 + u32::from(p[2]) * 7471 + 0x8000;
            (sum >> 16) as u8
        };
        to_rgb(image).bytes.chunks_exact(3).map(luma).collect()
    } else {
        grey_bytes(image)
    };
    Pixels { height, width, channels: 1, bytes }
}

/// The grey channel of an image without colour.
fn grey_bytes(image: &DynamicImage) -> Vec<u8> {
    match image {
        DynamicImage::ImageLuma8(i) => i.as_raw().clone(),
        DynamicImage::ImageLumaA8(i) => i.pixels().map(|p| p.0[0]).collect(),
        // Pillow opens these as I;16, whose conversion clips instead of scaling.
        DynamicImage::ImageLuma16(i) => i.as_raw().iter().map(|v| (*v).min(255) as u8).collect(),
        DynamicImage::ImageLumaA16(i) => i.pixels().map(|p| (p.0[0] >> 8) as u8).collect(),
        other => other.to_luma8().into_raw(),
    }
}
