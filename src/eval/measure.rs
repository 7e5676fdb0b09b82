//! Numbers of rows of class scores: the greatest, KL divergence, a share with its interval.

/// How many of `n` were right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Accuracy {
    /// Right ones.
    pub correct: u64,
    /// All.
    pub n: u64,
}

/// Of the normal distribution, for 95 % between both.
const Z_95: f64 = 1.959_963_984_540_054;

impl Accuracy {
    /// `correct / n`; 0 where n is 0.
    pub fn share(&self) -> f64 {
        if self.n == 0 { 0.0 } else { self.correct as f64 / self.n as f64 }
    }

    /// Wilson's interval that holds the true share in 95 % of cases.
    pub fn interval(&self) -> (f64, f64) {
        wilson(self.share(), self.n)
    }
}

/// The 95 % interval of a share of `n` samples; 0 to 1 where n is 0. Source: Wilson 1927.
pub fn wilson(share: f64, n: u64) -> (f64, f64) {
    if n == 0 {
        return (0.0, 1.0);
    }
    let (n, zz) = (n as f64, Z_95 * Z_95);
    let centre = share + zz / (2.0 * n);
    let half = Z_95 * (share * (1.0 - share) / n + zz / (4.0 * n * n)).sqrt();
    let scale = 1.0 + zz / n;
    (((centre - half) / scale).max(0.0), ((centre + half) / scale).min(1.0))
}

/// Position of the greatest entry; the first where several are. NaN is never the greatest.
pub fn argmax(row: &[f64]) -> usize {
    row.iter().enumerate().fold((0, f64::NEG_INFINITY), |best, (i, x)| if *x > best.1 { (i, *x) } else { best }).0
}

/// `sum_c p_c (ln p_c - ln q_c)` with p and q the softmax of the rows. NaN where an entry is not finite. Unit: nats.
pub fn kl_divergence(p: &[f64], q: &[f64]) -> f64 {
    let log_sum = |row: &[f64]| {
        let top = row.iter().fold(f64::NEG_INFINITY, |m, x| m.max(*x));
        top + row.iter().map(|x| (x - top).exp()).sum::<f64>().ln()
    };
    let (a, b) = (log_sum(p), log_sum(q));
    p.iter().zip(q).map(|(x, y)| (x - a).exp() * ((x - a) - (y - b))).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wilson_has_its_known_values() {
        let (low, high) = Accuracy { correct: 1965, n: 2000 }.interval();
        assert!((low - 0.975_76).abs() < 1e-5 && (high - 0.987_39).abs() < 1e-5, "{low} {high}");
        // The first example of Newcombe 1998 (score method without continuity correction).
        let (low, high) = Accuracy { correct: 81, n: 263 }.interval();
        assert!((low - 0.2553).abs() < 1e-4 && (high - 0.3662).abs() < 1e-4, "{low} {high}");
        assert_eq!(Accuracy { correct: 0, n: 0 }.interval(), (0.0, 1.0));
        let (low, high) = Accuracy { correct: 10, n: 10 }.interval();
        assert!((low - 0.722_467).abs() < 1e-6 && (high - 1.0).abs() < 1e-12);
    }

    #[test]
    fn divergence_is_zero_for_equals_and_known_for_others() {
        assert!(kl_divergence(&[1.0, 2.0], &[101.0, 102.0]).abs() < 1e-12);
        // p = (1/2, 1/2), q = (1/4, 3/4): ln(2)/2 + ln(2/3)/2.
        let kl = kl_divergence(&[0.0, 0.0], &[0.0, 3f64.ln()]);
        assert!((kl - 0.5 * (4.0f64 / 3.0).ln()).abs() < 1e-12, "{kl}");
        for bad in [f64::NAN, f64::INFINITY] {
            assert!(kl_divergence(&[bad, 0.0], &[0.0, 0.0]).is_nan() && kl_divergence(&[0.0, 0.0], &[bad, 0.0]).is_nan());
        }
    }

    #[test]
    fn the_first_of_equal_scores_counts_and_nan_never_does() {
        assert_eq!(argmax(&[1.0, 3.0, 3.0]), 1);
        assert_eq!(argmax(&[f64::NAN, 0.0]), 1);
    }
}
