//! Everything random about data: the order of an epoch and what is done to each sample.
//!
//! Example: the order of epoch 3 under seed 0 is one shuffle of `0..n`, the same on every machine and in every version, because
//! the generator (ChaCha8) and the shuffle (Fisher-Yates with rejection) are both fixed here. What happens to a sample depends on
//! seed, epoch and the sample, not on the batch or thread it falls to.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// What the numbers are for, so that two uses never share them.
#[derive(Clone, Copy)]
enum Purpose {
    Order = 1,
    Augment = 2,
    Draw = 3,
}

/// Light augmentation of training images.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Augment {
    /// Each image is moved by up to this many pixels on either axis; what comes in is zero. Unit: pixels.
    pub shift: usize,
    /// Each image is mirrored left to right with probability one half.
    pub flip: bool,
}

fn generator(seed: u64, epoch: u64, sample: u64, purpose: Purpose) -> ChaCha8Rng {
    let mut key = [0u8; 32];
    for (part, value) in key.as_chunks_mut::<8>().0.iter_mut().zip([seed, epoch, sample, purpose as u64]) {
        *part = value.to_le_bytes();
    }
    ChaCha8Rng::from_seed(key)
}

/// A number below `bound`, each with the same probability. `bound` must be above 0.
fn below(generator: &mut ChaCha8Rng, bound: u64) -> u64 {
    // The last 2^64 mod bound numbers would favour small results.
    let surplus = (u64::MAX % bound + 1) % bound;
    loop {
        let number = generator.next_u64();
        if number <= u64::MAX - surplus {
            return number % bound;
        }
    }
}

/// A shuffle of `0..count`.
pub(crate) fn shuffled(count: usize, seed: u64, epoch: u64) -> Vec<usize> {
    shuffle(count, generator(seed, epoch, 0, Purpose::Order))
}

/// `drawn` of the numbers `0..count`, each as likely as any other, in ascending order.
pub(crate) fn draw(drawn: usize, count: usize, seed: u64) -> Vec<usize> {
    let mut numbers = shuffle(count, generator(seed, 0, 0, Purpose::Draw));
    numbers.truncate(drawn);
    numbers.sort_unstable();
    numbers
}

fn shuffle(count: usize, mut generator: ChaCha8Rng) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    for last in (1..count).rev() {
        let other = below(&mut generator, last as u64 + 1) as usize;
        order.swap(last, other);
    }
    order
}

impl Augment {
    /// Moves and mirrors an image `[channels, height, width]`. Other shapes are left as they are.
    pub(crate) fn apply<T: Copy + Default>(&self, image: &mut [T], dims: &[usize], seed: u64, epoch: u64, sample: usize) {
        let [_, height, width] = *dims else { return };
        let mut generator = generator(seed, epoch, sample as u64, Purpose::Augment);
        let span = self.shift as u64 * 2 + 1;
        let (down, right) = (below(&mut generator, span), below(&mut generator, span));
        let mirror = below(&mut generator, 2) == 1 && self.flip;
        if height * width == 0 {
            return;
        }
        let mut moved = vec![T::default(); height * width];
        for plane in image.chunks_exact_mut(height * width) {
            moved.fill(T::default());
            for (y, row) in moved.chunks_exact_mut(width).enumerate() {
                // Row y shows what stood `down - shift` rows above it.
                let Some(from) = (y + self.shift).checked_sub(down as usize).filter(|f| *f < height) else { continue };
                let source = &plane[from * width..(from + 1) * width];
                for (x, value) in row.iter_mut().enumerate() {
                    let at = (x + self.shift).checked_sub(right as usize).filter(|f| *f < width);
                    if let Some(at) = at {
                        *value = source[if mirror { width - 1 - at } else { at }];
                    }
                }
            }
            plane.copy_from_slice(&moved);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shuffles_are_permutations_that_never_change() {
        let order = shuffled(10, 0, 0);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..10).collect::<Vec<_>>());
        assert_eq!(order, shuffled(10, 0, 0));
        assert_ne!(order, shuffled(10, 0, 1));
        assert_ne!(order, shuffled(10, 1, 0));
        assert_eq!(shuffled(0, 0, 0), Vec::<usize>::new());
    }

    #[test]
    fn augmentation_moves_within_its_bounds() {
        let augment = Augment { shift: 2, flip: true };
        let mut seen = std::collections::BTreeSet::new();
        for sample in 0..500 {
            let mut image = vec![0.0f32; 49];
            image[3 * 7 + 3] = 1.0;
            augment.apply(&mut image, &[1, 7, 7], 5, 0, sample);
            let at = image.iter().position(|x| *x == 1.0).expect("a shift by 2 keeps the centre inside");
            assert_eq!(image.iter().filter(|x| **x != 0.0).count(), 1);
            let (y, x) = (at / 7, at % 7);
            assert!((1..=5).contains(&y) && (1..=5).contains(&x));
            seen.insert((y, x));
        }
        assert_eq!(seen.len(), 25);
    }

    #[test]
    fn without_shift_and_flip_nothing_moves() {
        let image: Vec<u16> = (0..12).collect();
        let mut same = image.clone();
        Augment::default().apply(&mut same, &[1, 3, 4], 1, 2, 3);
        assert_eq!(image, same);
    }
}
