//! From coefficients to pixels: inverse DCT, enlargement of chroma, colours.

use super::{Component, Frame};
use crate::data::resize::Pixels;

/// What the components of a file mean.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Colours {
    Grey,
    Rgb,
    YCbCr,
    Cmyk,
    Ycck,
}

/// Fraction bits of the transform's constants, and those kept between its two passes.
const FRACTION: u32 = 13;
const BETWEEN: u32 = 2;

/// Eight outputs of the one-dimensional transform, scaled by 2^13 (and by the square root of 8).
///
/// The constants are c_k = sqrt(2) cos(k pi / 16) and their sums, times 2^13, rounded. All sums are exact, so only these constants
/// and the two roundings in [`transform`] decide the result.
fn transform_line(x: [i32; 8]) -> [i64; 8] {
    let x = x.map(i64::from);
    // Even inputs: a rotation of 2 and 6, a butterfly of 0 and 4.
    let turn = (x[2] + x[6]) * 4433;
    let (low, high) = (turn - x[6] * 15137, turn + x[2] * 6270);
    let (sum, gap) = ((x[0] + x[4]) << FRACTION, (x[0] - x[4]) << FRACTION);
    let even = [sum + high, gap + low, gap - low, sum - high];
    // Odd inputs: three rotations that share their products.
    let all = (x[1] + x[3] + x[5] + x[7]) * 9633;
    let (p73, p51) = (all - (x[7] + x[3]) * 16069, all - (x[5] + x[1]) * 3196);
    let (p71, p53) = ((x[7] + x[1]) * -7373, (x[5] + x[3]) * -20995);
    let odd = [x[1] * 12299 + p71 + p51, x[3] * 25172 + p53 + p73, x[5] * 16819 + p53 + p51, x[7] * 2446 + p71 + p73];
    std::array::from_fn(|i| if i < 4 { even[i] + odd[i] } else { even[7 - i] - odd[7 - i] })
}

/// Dequantizes and transforms block `index` into the component's samples.
pub(super) fn transform(component: &mut Component, index: usize, block: &[i16]) {
    let Some(quant) = &component.quant else { return };
    let mut work = [0i32; 64];
    for (value, (c, q)) in work.iter_mut().zip(block.iter().zip(quant)) {
        // Coefficients are 16 bits wide; a damaged file may exceed what its table allows.
        *value = (i32::from(*c) * i32::from(*q)).clamp(-(1 << 16), 1 << 16);
    }
    let round = |v: i64, bits: u32| ((v + (1 << (bits - 1))) >> bits) as i32;
    for column in 0..8 {
        // Most columns hold no more than their mean, which the transform only scales.
        if (1..8).all(|row| work[row * 8 + column] == 0) {
            let mean = work[column] << BETWEEN;
            (0..8).for_each(|row| work[row * 8 + column] = mean);
            continue;
        }
        let line = transform_line(std::array::from_fn(|row| work[row * 8 + column]));
        for (row, v) in line.into_iter().enumerate() {
            work[row * 8 + column] = round(v, FRACTION - BETWEEN);
        }
    }
    let stride = component.blocks_wide * 8;
    let start = index / component.blocks_wide * 8 * stride + index % component.blocks_wide * 8;
    for (row, values) in work.chunks_exact(8).enumerate() {
        let line = transform_line(std::array::from_fn(|i| values[i]));
        let out = &mut component.samples[start + row * stride..start + row * stride + 8];
        for (sample, v) in out.iter_mut().zip(line) {
            *sample = (round(v, FRACTION + BETWEEN + 3) + 128).clamp(0, 255) as u8;
        }
    }
}

/// All blocks of a progressive file.
pub(super) fn transform_all(component: &mut Component) {
    let coefficients = std::mem::take(&mut component.coefficients);
    for index in 0..component.blocks_wide * component.blocks_high {
        transform(component, index, &coefficients[index * 64..index * 64 + 64]);
    }
}

/// One row of a component at the width of the image, rounded up to the sampling factor.
fn widened_row(c: &Component, frame: &Frame, y: usize, out: &mut Vec<u8>) {
    let stride = c.blocks_wide * 8;
    let row = |y: usize| &c.samples[y * stride..y * stride + c.width];
    let (h, v) = (frame.h_max / c.h, frame.v_max / c.v);
    let near = y / v;
    // The neighbour beyond the first or last real row is that row itself.
    let far = if y.is_multiple_of(v) { near.saturating_sub(1) } else { (near + 1).min(c.height - 1) };
    out.clear();
    match (h, v) {
        (1, 1) => out.extend_from_slice(row(near)),
        (2, 1) if c.width > 2 => widen(row(near).iter().map(|s| u32::from(*s)), out, [1, 2], 2),
        (2, 2) if c.width > 2 => {
            let sums = row(near).iter().zip(row(far)).map(|(n, f)| u32::from(*n) * 3 + u32::from(*f));
            widen(sums, out, [8, 7], 4);
        }
        (1, 2) => {
            let bias = if y.is_multiple_of(2) { 1 } else { 2 };
            let pairs = row(near).iter().zip(row(far));
            out.extend(pairs.map(|(n, f)| ((u32::from(*n) * 3 + u32::from(*f) + bias) >> 2) as u8));
        }
        _ => out.extend(row(near).iter().flat_map(|s| std::iter::repeat_n(*s, h))),
    }
}

/// Doubles a row: each output is 3/4 of its input and 1/4 of the nearer neighbour, the ends stay. `shift` takes back all scaling;
/// `bias` alternates, so that halves are rounded up and down in turn.
fn widen(row: impl ExactSizeIterator<Item = u32>, out: &mut Vec<u8>, bias: [u32; 2], shift: u32) {
    let row: Vec<u32> = row.collect();
    for (i, here) in row.iter().enumerate() {
        let left = if i == 0 { *here } else { row[i - 1] };
        let right = row.get(i + 1).copied().unwrap_or(*here);
        out.push(((here * 3 + left + bias[0]) >> shift) as u8);
        out.push(((here * 3 + right + bias[1]) >> shift) as u8);
    }
}

/// Enlarges, converts and cuts to the image's size.
pub(super) fn assemble(frame: &Frame, colours: Colours) -> Pixels {
    let channels = if colours == Colours::Grey { 1 } else { 3 };
    let mut bytes = Vec::with_capacity(frame.width * frame.height * channels);
    let mut rows: Vec<Vec<u8>> = frame.components.iter().map(|_| Vec::new()).collect();
    for y in 0..frame.height {
        for (c, row) in frame.components.iter().zip(&mut rows) {
            widened_row(c, frame, y, row);
        }
        match (colours, rows.as_slice()) {
            (Colours::Grey, [grey]) => bytes.extend_from_slice(&grey[..frame.width]),
            (_, [a, b, c]) => {
                for x in 0..frame.width {
                    let pixel = [a[x], b[x], c[x]];
                    bytes.extend(if colours == Colours::YCbCr { to_rgb(pixel) } else { pixel });
                }
            }
            (_, [a, b, c, k]) => {
                for x in 0..frame.width {
                    let pixel = [a[x], b[x], c[x]];
                    // Y, Cb and Cr give the complement of cyan, magenta and yellow.
                    let cmy = if colours == Colours::Ycck { to_rgb(pixel).map(|v| 255 - v) } else { pixel };
                    bytes.extend(cmy.map(|c| without_black(255 - c, k[x])));
                }
            }
            _ => {}
        }
    }
    Pixels { height: frame.height, width: frame.width, channels, bytes }
}

/// R = Y + 1.402 Cr, G = Y - 0.34414 Cb - 0.71414 Cr, B = Y + 1.772 Cb, in 16-bit fixed point.
fn to_rgb([y, cb, cr]: [u8; 3]) -> [u8; 3] {
    let (y, cb, cr) = (i32::from(y), i32::from(cb) - 128, i32::from(cr) - 128);
    let half = 1 << 15;
    let red = y + ((91881 * cr + half) >> 16);
    let green = y + ((-22554 * cb - 46802 * cr + half) >> 16);
    let blue = y + ((116_130 * cb + half) >> 16);
    [red, green, blue].map(|v| v.clamp(0, 255) as u8)
}

/// Pillow's red, green or blue of an ink and (inverted, as such files store it) black: light * (255 - ink) / 255.
fn without_black(ink: u8, light: u8) -> u8 {
    let product = u32::from(ink) * u32::from(light) + 128;
    let share = ((product >> 8) + product) >> 8;
    (u32::from(light).saturating_sub(share)) as u8
}
