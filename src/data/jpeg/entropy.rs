//! The entropy-coded part of a JPEG: bits, Huffman codes, and the blocks of a scan.

use super::{Component, Frame, ZIGZAG, damaged, pixels};
use crate::data::decode::ImageFault;

/// Codes up to this length are looked up at once.
const FAST: u32 = 9;

/// A Huffman table.
pub(super) struct Huffman {
    /// By the next [`FAST`] bits: `length << 8 | symbol`, 0 for longer codes.
    fast: Vec<u16>,
    /// By length: the first code that is too large for it, aligned to 16 bits.
    limit: [u32; 17],
    /// By length: what is added to a code to give the place of its symbol.
    offset: [i32; 17],
    symbols: Vec<u8>,
}

impl Huffman {
    /// The table of `counts[i]` codes of length i + 1; `None` where there are more codes than such lengths allow.
    pub(super) fn new(counts: &[u8], symbols: &[u8]) -> Option<Huffman> {
        let mut fast = vec![0u16; 1 << FAST];
        let (mut limit, mut offset) = ([0u32; 17], [0i32; 17]);
        let (mut code, mut place) = (0u32, 0usize);
        for length in 1..=16u32 {
            let count = usize::from(counts[length as usize - 1]);
            offset[length as usize] = place as i32 - code as i32;
            for _ in 0..count {
                if length <= FAST && code < 1 << length {
                    let (start, span) = ((code << (FAST - length)) as usize, 1usize << (FAST - length));
                    fast[start..start + span].fill((length as u16) << 8 | u16::from(symbols[place]));
                }
                code += 1;
                place += 1;
            }
            if code > 1 << length {
                return None;
            }
            limit[length as usize] = code << (16 - length);
            code <<= 1;
        }
        Some(Huffman { fast, limit, offset, symbols: symbols.to_vec() })
    }

    /// The next symbol.
    fn read(&self, bits: &mut Bits<'_>) -> Result<u8, ImageFault> {
        let ahead = bits.peek();
        let entry = self.fast[(ahead >> (16 - FAST)) as usize];
        if entry != 0 {
            bits.skip(u32::from(entry >> 8))?;
            return Ok(entry as u8);
        }
        for length in 1..=16u32 {
            if ahead < self.limit[length as usize] {
                let place = (ahead >> (16 - length)) as i32 + self.offset[length as usize];
                bits.skip(length)?;
                let symbol = usize::try_from(place).ok().and_then(|p| self.symbols.get(p));
                return symbol.copied().ok_or(damaged("a Huffman code is not in its table"));
            }
        }
        // Running out of data reads as ones or zeros, so the cause is decided by what is left.
        bits.skip(16)?;
        Err(damaged("a Huffman code is not in its table"))
    }
}

/// Bits of entropy-coded data, from the most significant on, without the escapes.
pub(super) struct Bits<'a> {
    bytes: &'a [u8],
    at: usize,
    buffer: u64,
    /// Bits in the buffer; the upper ones of them are next.
    count: u32,
    /// Whether a marker or the end of the file stopped the reading.
    stopped: bool,
}

impl<'a> Bits<'a> {
    pub(super) fn new(bytes: &'a [u8], at: usize) -> Bits<'a> {
        Bits { bytes, at, buffer: 0, count: 0, stopped: false }
    }

    /// Where the next byte would be read; at a marker after the last bits of a scan.
    pub(super) fn position(&self) -> usize {
        self.at
    }

    fn fill(&mut self) {
        while self.count <= 48 && !self.stopped {
            match self.bytes.get(self.at) {
                None => self.stopped = true,
                Some(0xff) => match self.bytes.get(self.at + 1) {
                    Some(0) => self.push(0xff, 2),
                    Some(0xff) => self.at += 1,
                    _ => self.stopped = true,
                },
                Some(byte) => self.push(*byte, 1),
            }
        }
    }

    fn push(&mut self, byte: u8, step: usize) {
        self.buffer = self.buffer << 8 | u64::from(byte);
        self.count += 8;
        self.at += step;
    }

    /// The next 16 bits; zeros behind the end.
    fn peek(&mut self) -> u32 {
        if self.count < 16 {
            self.fill();
        }
        let bits = if self.count >= 16 { self.buffer >> (self.count - 16) } else { self.buffer << (16 - self.count) };
        (bits & 0xffff) as u32
    }

    fn skip(&mut self, count: u32) -> Result<(), ImageFault> {
        if count > self.count {
            return Err(if self.at >= self.bytes.len().saturating_sub(1) {
                ImageFault::Truncated
            } else {
                damaged("a marker stands inside a block")
            });
        }
        self.count -= count;
        Ok(())
    }

    /// The next `count` (at most 16) bits as a number.
    fn take(&mut self, count: u32) -> Result<u32, ImageFault> {
        if count == 0 {
            return Ok(0);
        }
        let bits = self.peek() >> (16 - count);
        self.skip(count)?;
        Ok(bits)
    }

    /// A number of `size` bits in JPEG's signed form: a leading 0 means negative.
    fn signed(&mut self, size: u32) -> Result<i32, ImageFault> {
        let bits = self.take(size)? as i32;
        Ok(if size > 0 && bits < 1 << (size - 1) { bits - (1 << size) + 1 } else { bits })
    }

    /// Drops the rest of the byte and passes the restart marker.
    fn restart(&mut self) -> Result<(), ImageFault> {
        self.count = 0;
        self.buffer = 0;
        while self.bytes.get(self.at) == Some(&0xff) && self.bytes.get(self.at + 1) == Some(&0xff) {
            self.at += 1;
        }
        match self.bytes.get(self.at..self.at + 2) {
            Some([0xff, 0xd0..=0xd7]) => {
                self.at += 2;
                self.stopped = false;
                Ok(())
            }
            Some(_) => Err(damaged("a restart marker is missing")),
            None => Err(ImageFault::Truncated),
        }
    }
}

/// A component's part in a scan.
pub(super) struct ScanPart<'a> {
    pub(super) component: usize,
    pub(super) dc: Option<&'a Huffman>,
    pub(super) ac: Option<&'a Huffman>,
    /// The DC value that the next one is added to.
    pub(super) prediction: i32,
}

/// Which coefficients, and which of their bits, a scan holds.
pub(super) struct Range {
    pub(super) from: u8,
    pub(super) to: u8,
    /// 0 on the first pass, else the bit position of the pass before.
    pub(super) high: u8,
    pub(super) low: u8,
}

/// Decodes all blocks of a scan.
pub(super) fn decode_scan(
    frame: &mut Frame,
    parts: &mut [ScanPart<'_>],
    range: &Range,
    interval: usize,
    bits: &mut Bits<'_>,
) -> Result<(), ImageFault> {
    // A scan of one component has its blocks in rows; several take turns in units of h x v blocks.
    let (units_wide, units_high) = match &*parts {
        [only] => {
            let c = &frame.components[only.component];
            (c.width.div_ceil(8), c.height.div_ceil(8))
        }
        _ => (frame.width.div_ceil(8 * frame.h_max), frame.height.div_ceil(8 * frame.v_max)),
    };
    let alone = parts.len() == 1;
    let mut run = 0u32;
    for unit in 0..units_wide * units_high {
        if interval > 0 && unit > 0 && unit % interval == 0 {
            bits.restart()?;
            run = 0;
            parts.iter_mut().for_each(|p| p.prediction = 0);
        }
        let (x, y) = (unit % units_wide, unit / units_wide);
        for part in parts.iter_mut() {
            let component = &mut frame.components[part.component];
            let (h, v) = if alone { (1, 1) } else { (component.h, component.v) };
            for block in 0..h * v {
                let (bx, by) = (x * h + block % h, y * v + block / h);
                let index = by * component.blocks_wide + bx;
                if frame.progressive {
                    let start = index * 64;
                    let block: &mut [i16] = &mut component.coefficients[start..start + 64];
                    progressive(block, part, range, &mut run, bits)?;
                } else {
                    sequential(component, index, part, bits)?;
                }
            }
        }
    }
    for part in parts.iter() {
        frame.components[part.component].dc_seen |= range.from == 0;
    }
    Ok(())
}

fn table(table: Option<&Huffman>) -> Result<&Huffman, ImageFault> {
    table.ok_or(damaged("a Huffman table is missing"))
}

/// The next DC value.
fn dc_value(part: &mut ScanPart<'_>, bits: &mut Bits<'_>) -> Result<i32, ImageFault> {
    let size = u32::from(table(part.dc)?.read(bits)?);
    if size > 15 {
        return Err(damaged("a DC difference is too large"));
    }
    part.prediction = part.prediction.wrapping_add(bits.signed(size)?);
    Ok(part.prediction)
}

/// One block of a sequential file, down to its samples.
fn sequential(component: &mut Component, index: usize, part: &mut ScanPart<'_>, bits: &mut Bits<'_>) -> Result<(), ImageFault> {
    let mut block = [0i16; 64];
    block[0] = dc_value(part, bits)? as i16;
    let ac = table(part.ac)?;
    let mut k = 1;
    while k < 64 {
        let symbol = ac.read(bits)?;
        let (zeros, size) = (usize::from(symbol >> 4), u32::from(symbol & 15));
        if size == 0 {
            if zeros < 15 {
                break;
            }
            k += 16;
            continue;
        }
        k += zeros;
        let value = bits.signed(size)?;
        let place = ZIGZAG.get(k).ok_or(damaged("a block has more than 64 coefficients"))?;
        block[usize::from(*place)] = value as i16;
        k += 1;
    }
    pixels::transform(component, index, &block);
    Ok(())
}

/// One block of one pass of a progressive file.
fn progressive(
    block: &mut [i16],
    part: &mut ScanPart<'_>,
    range: &Range,
    run: &mut u32,
    bits: &mut Bits<'_>,
) -> Result<(), ImageFault> {
    match (range.from, range.high) {
        (0, 0) => block[0] = (dc_value(part, bits)? << range.low) as i16,
        (0, _) => block[0] |= (bits.take(1)? << range.low) as i16,
        (_, 0) => ac_first(block, table(part.ac)?, range, run, bits)?,
        _ => ac_refine(block, table(part.ac)?, range, run, bits)?,
    }
    Ok(())
}

/// How many blocks, this one included, have no more coefficients: 2^r and r more bits.
fn end_of_band(r: u8, bits: &mut Bits<'_>) -> Result<u32, ImageFault> {
    Ok((1 << r) + bits.take(u32::from(r))?)
}

/// First pass over AC coefficients.
fn ac_first(block: &mut [i16], ac: &Huffman, range: &Range, run: &mut u32, bits: &mut Bits<'_>) -> Result<(), ImageFault> {
    if *run > 0 {
        *run -= 1;
        return Ok(());
    }
    let mut k = usize::from(range.from);
    while k <= usize::from(range.to) {
        let symbol = ac.read(bits)?;
        let (zeros, size) = (symbol >> 4, u32::from(symbol & 15));
        if size == 0 {
            if zeros < 15 {
                *run = end_of_band(zeros, bits)? - 1;
                return Ok(());
            }
            k += 16;
            continue;
        }
        k += usize::from(zeros);
        let value = bits.signed(size)? << range.low;
        let place = ZIGZAG.get(k).ok_or(damaged("a block has more than 64 coefficients"))?;
        block[usize::from(*place)] = value as i16;
        k += 1;
    }
    Ok(())
}

/// A further bit of AC coefficients: known ones may grow by it, new ones are plus or minus it.
fn ac_refine(block: &mut [i16], ac: &Huffman, range: &Range, run: &mut u32, bits: &mut Bits<'_>) -> Result<(), ImageFault> {
    let (bit, to) = (1i16 << range.low, usize::from(range.to));
    let mut k = usize::from(range.from);
    while *run == 0 && k <= to {
        let symbol = ac.read(bits)?;
        let (zeros, size) = (symbol >> 4, symbol & 15);
        let mut new = 0;
        match size {
            0 if zeros < 15 => {
                *run = end_of_band(zeros, bits)?;
                break;
            }
            0 => {}
            1 => new = if bits.take(1)? == 1 { bit } else { -bit },
            _ => return Err(damaged("a refined coefficient has more than one bit")),
        }
        // Passes `zeros` coefficients that are still zero; every known one on the way takes its bit.
        let mut left = zeros;
        while k <= to {
            let value = &mut block[usize::from(ZIGZAG[k])];
            k += 1;
            if *value != 0 {
                refine(value, bit, bits)?;
            } else if left == 0 {
                *value = new;
                break;
            } else {
                left -= 1;
            }
        }
    }
    if *run > 0 {
        for place in ZIGZAG.iter().take(to + 1).skip(k) {
            let value = &mut block[usize::from(*place)];
            if *value != 0 {
                refine(value, bit, bits)?;
            }
        }
        *run -= 1;
    }
    Ok(())
}

/// Adds the next bit to a known coefficient, away from zero.
fn refine(value: &mut i16, bit: i16, bits: &mut Bits<'_>) -> Result<(), ImageFault> {
    if bits.take(1)? == 1 && *value & bit == 0 {
        *value = value.wrapping_add(if *value > 0 { bit } else { -bit });
    }
    Ok(())
}
