//! Symbolic dimensions: polynomials with integer coefficients over named sizes and functions of them.
//!
//! Example: `batch * 197 * 192` divided by `192` is `197 * batch`; `height / 16` that need not be exact is the symbol
//! `floor(height/16)`. Equal polynomials compare equal, so two shapes that were computed differently still match.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

/// An indivisible symbol of a polynomial.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Sym {
    /// A size that the file names, such as `batch`, or one that depends on data and got a name of its own.
    Named(Arc<str>),
    /// A function of other dimensions.
    Call(Function, Arc<Vec<Dim>>),
}

/// Functions that a polynomial cannot express.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Function {
    FloorDiv,
    Mod,
    Max,
    Min,
}

impl Sym {
    fn at_least(&self) -> Option<i64> {
        let Sym::Call(function, args) = self else { return Some(1) };
        let (a, b) = (args[0].at_least(), args[1].at_least());
        match function {
            Function::FloorDiv => match (a.filter(|a| *a >= 0)?, args[1].known()) {
                (a, Some(divisor)) if divisor > 0 => Some(a / divisor),
                _ => b.filter(|b| *b >= 1).map(|_| 0),
            },
            Function::Mod => b.filter(|b| *b >= 1).map(|_| 0),
            Function::Max => a.max(b),
            Function::Min => Some(a?.min(b?)),
        }
    }
}

type Monomial = Vec<(Sym, u32)>;

/// A symbolic integer.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Dim(Repr);

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Repr {
    Size(i64),
    /// Never a constant; coefficients are not zero; the empty monomial is the constant term.
    Poly(Arc<BTreeMap<Monomial, i64>>),
}

impl From<i64> for Dim {
    fn from(size: i64) -> Self {
        Self(Repr::Size(size))
    }
}

impl From<usize> for Dim {
    fn from(size: usize) -> Self {
        Self(Repr::Size(i64::try_from(size).unwrap_or(i64::MAX)))
    }
}

impl Dim {
    /// The size called `name`.
    pub fn named(name: &str) -> Self {
        Self::symbol(Sym::Named(name.into()))
    }

    fn symbol(sym: Sym) -> Self {
        Self(Repr::Poly(Arc::new(BTreeMap::from([(vec![(sym, 1)], 1)]))))
    }

    /// The number, where it is one.
    pub fn known(&self) -> Option<i64> {
        match self.0 {
            Repr::Size(v) => Some(v),
            Repr::Poly(_) => None,
        }
    }

    /// The number as a size in memory, where it is one and not negative.
    pub fn size(&self) -> Option<usize> {
        self.known().and_then(|v| usize::try_from(v).ok())
    }

    /// Whether it is the number `n`.
    pub fn is(&self, n: i64) -> bool {
        self.known() == Some(n)
    }

    fn terms(&self) -> BTreeMap<Monomial, i64> {
        match &self.0 {
            Repr::Size(0) => BTreeMap::new(),
            Repr::Size(v) => BTreeMap::from([(Vec::new(), *v)]),
            Repr::Poly(terms) => (**terms).clone(),
        }
    }

    fn from_terms(mut terms: BTreeMap<Monomial, i64>) -> Self {
        terms.retain(|_, c| *c != 0);
        match terms.len() {
            0 => Self::from(0i64),
            1 if terms.contains_key(&Vec::new()) => Self::from(terms[&Vec::new()]),
            _ => Self(Repr::Poly(Arc::new(terms))),
        }
    }

    /// `self / other`, where the division leaves nothing.
    pub fn exact_div(&self, other: &Self) -> Option<Self> {
        if let (Some(a), Some(b)) = (self.known(), other.known()) {
            return (b != 0 && a % b == 0).then(|| Self::from(a / b));
        }
        if self == other {
            return Some(Self::from(1i64));
        }
        // Long division by the greatest monomial; it ends because each step removes the greatest term of the rest.
        let divisor = other.terms();
        let (lead, lead_coefficient) = divisor.last_key_value()?;
        let (mut rest, mut quotient) = (self.clone(), Self::from(0i64));
        for _ in 0..64 {
            let terms = rest.terms();
            let Some((m, c)) = terms.last_key_value() else { return Some(quotient) };
            let step = monomial_div(m, lead).filter(|_| c % lead_coefficient == 0)?;
            let step = Self::from_terms(BTreeMap::from([(step, c / lead_coefficient)]));
            quotient = &quotient + &step;
            rest = &rest - &(&step * other);
        }
        None
    }

    /// `floor(self / other)`.
    pub fn floor_div(&self, other: &Self) -> Self {
        match (self.known(), other.known()) {
            (Some(a), Some(b)) if b != 0 => Self::from(a.div_euclid(b)),
            _ => self.exact_div(other).unwrap_or_else(|| Self::call(Function::FloorDiv, &[self, other])),
        }
    }

    /// `ceil(self / other)`.
    pub fn ceil_div(&self, other: &Self) -> Self {
        Self::from(0i64).minus(&Self::from(0i64).minus(self).floor_div(other))
    }

    /// `self mod other`.
    pub fn modulo(&self, other: &Self) -> Self {
        match (self.known(), other.known()) {
            (Some(a), Some(b)) if b != 0 => Self::from(a.rem_euclid(b)),
            _ if self.exact_div(other).is_some() => Self::from(0i64),
            _ => Self::call(Function::Mod, &[self, other]),
        }
    }

    /// The greater of both.
    pub fn max(&self, other: &Self) -> Self {
        match (self.known(), other.known()) {
            (Some(a), Some(b)) => Self::from(a.max(b)),
            _ if self == other => self.clone(),
            _ => Self::call(Function::Max, &[self, other]),
        }
    }

    /// The smaller of both.
    pub fn min(&self, other: &Self) -> Self {
        match (self.known(), other.known()) {
            (Some(a), Some(b)) => Self::from(a.min(b)),
            _ if self == other => self.clone(),
            _ => Self::call(Function::Min, &[self, other]),
        }
    }

    /// A bound that no run goes below, given that named sizes are at least 1; `None` where there is none.
    ///
    /// Example: 3 for `2*n+1`, none for `n-m`.
    pub fn at_least(&self) -> Option<i64> {
        let terms = match &self.0 {
            Repr::Size(v) => return Some(*v),
            Repr::Poly(terms) => terms,
        };
        let mut total = 0i64;
        for (monomial, coefficient) in terms.iter() {
            let mut bound = 1i64;
            for (sym, power) in monomial {
                bound = bound.checked_mul(sym.at_least().filter(|b| *b >= 0)?.checked_pow(*power)?)?;
            }
            if *coefficient < 0 && !monomial.is_empty() {
                return None;
            }
            total = total.checked_add(bound.checked_mul(*coefficient)?)?;
        }
        Some(total)
    }

    fn call(function: Function, args: &[&Self]) -> Self {
        Self::symbol(Sym::Call(function, Arc::new(args.iter().map(|d| (*d).clone()).collect())))
    }

    fn minus(&self, other: &Self) -> Self {
        self - other
    }

    /// The value under the sizes that `sizes` gives to names; `None` where one is missing or the result overflows.
    pub fn eval(&self, sizes: &dyn Fn(&str) -> Option<i64>) -> Option<i64> {
        let terms = match &self.0 {
            Repr::Size(v) => return Some(*v),
            Repr::Poly(terms) => terms,
        };
        let mut total = 0i64;
        for (monomial, coefficient) in terms.iter() {
            let mut product = *coefficient;
            for (sym, power) in monomial {
                let v = match sym {
                    Sym::Named(name) => sizes(name)?,
                    Sym::Call(function, args) => {
                        let (a, b) = (args[0].eval(sizes)?, args[1].eval(sizes)?);
                        match function {
                            Function::FloorDiv => a.checked_div_euclid(b)?,
                            Function::Mod => a.checked_rem_euclid(b)?,
                            Function::Max => a.max(b),
                            Function::Min => a.min(b),
                        }
                    }
                };
                product = product.checked_mul(v.checked_pow(*power)?)?;
            }
            total = total.checked_add(product)?;
        }
        Some(total)
    }

    /// Names that it depends on, each once, in order.
    pub fn names(&self) -> Vec<Arc<str>> {
        let mut found = std::collections::BTreeSet::new();
        self.collect_names(&mut found);
        found.into_iter().collect()
    }

    fn collect_names(&self, found: &mut std::collections::BTreeSet<Arc<str>>) {
        if let Repr::Poly(terms) = &self.0 {
            for (sym, _) in terms.keys().flatten() {
                match sym {
                    Sym::Named(name) => {
                        found.insert(name.clone());
                    }
                    Sym::Call(_, args) => args.iter().for_each(|a| a.collect_names(found)),
                }
            }
        }
    }
}

fn monomial_div(a: &Monomial, b: &Monomial) -> Option<Monomial> {
    let mut out = a.clone();
    for (sym, power) in b {
        let at = out.iter().position(|(s, _)| s == sym)?;
        out[at].1 = out[at].1.checked_sub(*power)?;
    }
    out.retain(|(_, p)| *p > 0);
    Some(out)
}

impl std::ops::Add for &Dim {
    type Output = Dim;
    fn add(self, other: &Dim) -> Dim {
        if let (Some(a), Some(b)) = (self.known(), other.known()) {
            return Dim::from(a.saturating_add(b));
        }
        let mut terms = self.terms();
        for (m, c) in other.terms() {
            let entry = terms.entry(m).or_insert(0);
            *entry = entry.saturating_add(c);
        }
        Dim::from_terms(terms)
    }
}

impl std::ops::Sub for &Dim {
    type Output = Dim;
    fn sub(self, other: &Dim) -> Dim {
        self + &(other * &Dim::from(-1i64))
    }
}

impl std::ops::Mul for &Dim {
    type Output = Dim;
    fn mul(self, other: &Dim) -> Dim {
        if let (Some(a), Some(b)) = (self.known(), other.known()) {
            return Dim::from(a.saturating_mul(b));
        }
        let mut terms: BTreeMap<Monomial, i64> = BTreeMap::new();
        for (m, c) in self.terms() {
            for (n, d) in other.terms() {
                let mut powers: BTreeMap<Sym, u32> = m.iter().cloned().collect();
                for (sym, p) in n {
                    let power = powers.entry(sym).or_insert(0);
                    *power = power.saturating_add(p);
                }
                let entry = terms.entry(powers.into_iter().collect()).or_insert(0);
                *entry = entry.saturating_add(c.saturating_mul(d));
            }
        }
        Dim::from_terms(terms)
    }
}

impl<'a> std::iter::Product<&'a Dim> for Dim {
    fn product<I: Iterator<Item = &'a Dim>>(iter: I) -> Dim {
        iter.fold(Dim::from(1i64), |a, b| &a * b)
    }
}

impl std::iter::Sum for Dim {
    fn sum<I: Iterator<Item = Dim>>(iter: I) -> Dim {
        iter.fold(Dim::from(0i64), |a, b| &a + &b)
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let terms = match &self.0 {
            Repr::Size(v) => return write!(f, "{v}"),
            Repr::Poly(terms) => terms,
        };
        for (i, (monomial, coefficient)) in terms.iter().rev().enumerate() {
            if i > 0 {
                f.write_str("+")?;
            }
            let mut parts = Vec::new();
            if *coefficient != 1 || monomial.is_empty() {
                parts.push(coefficient.to_string());
            }
            for (sym, power) in monomial {
                let text = match sym {
                    Sym::Named(name) => name.to_string(),
                    Sym::Call(Function::FloorDiv, a) => format!("floor(({})/({}))", a[0], a[1]),
                    Sym::Call(function, a) => format!("{}({},{})", format!("{function:?}").to_lowercase(), a[0], a[1]),
                };
                parts.push(if *power == 1 { text } else { format!("{text}^{power}") });
            }
            f.write_str(&parts.join("*"))?;
        }
        Ok(())
    }
}

impl fmt::Debug for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_divide_exactly() {
        let (b, n) = (Dim::named("b"), &Dim::named("n") + &Dim::from(1i64));
        let total = &(&b * &n) * &Dim::from(192i64);
        assert_eq!(total.exact_div(&Dim::from(64i64)), Some(&(&b * &n) * &Dim::from(3i64)));
        assert_eq!(total.exact_div(&n), Some(&b * &Dim::from(192i64)));
        assert_eq!(total.exact_div(&Dim::from(7i64)), None);
        assert_eq!((&b * &n).exact_div(&(&b * &n)), Some(Dim::from(1i64)));
    }

    #[test]
    fn bounds_hold_for_sizes_of_at_least_one() {
        let (n, m) = (Dim::named("n"), Dim::named("m"));
        let (one, two) = (Dim::from(1i64), Dim::from(2i64));
        assert_eq!((&(&n * &two) + &one).at_least(), Some(3));
        assert_eq!((&(&n * &m) - &two).at_least(), Some(-1));
        assert_eq!((&n - &m).at_least(), None);
        assert_eq!(n.floor_div(&two).at_least(), Some(0));
        assert_eq!(Dim::max(&n, &Dim::from(7i64)).at_least(), Some(7));
        assert_eq!(Dim::max(&(&n - &m), &two).at_least(), Some(2));
        assert_eq!(Dim::min(&(&n - &m), &two).at_least(), None);
    }

    #[test]
    fn inexact_division_is_a_symbol_that_evaluates() {
        let h = Dim::named("h").floor_div(&Dim::from(16i64));
        assert_eq!(h.known(), None);
        assert_eq!(h.eval(&|name| (name == "h").then_some(100)), Some(6));
        assert_eq!(&h - &h, Dim::from(0i64));
        assert_eq!(Dim::from(7i64).ceil_div(&Dim::from(2i64)), Dim::from(4i64));
    }
}
