//! Scores that need no data: the size of a unit's weights, and chance.

use super::Scores;
use crate::anatomy::{Anatomy, Group, Kind};
use crate::axes::relation::Slot;
use crate::graph::{Graph, Id};
use crate::ops::quantize;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use std::collections::BTreeMap;

/// L2 norm of all weights that go with a unit, quantized ones as the floats that they stand for; units that go together share theirs.
/// Tokens, which have none, get equal scores.
pub fn magnitude(graph: &Graph, anatomy: &Anatomy) -> Scores {
    let groups = anatomy.groups.iter().map(|g| (g.id.clone(), group_magnitude(graph, anatomy, g))).collect();
    Scores { groups, by: "magnitude".into(), model_sha256: String::new() }
}

fn group_magnitude(graph: &Graph, anatomy: &Anatomy, group: &Group) -> Vec<f32> {
    if group.kind == Kind::Token {
        return vec![1.0; group.units()];
    }
    let width = group.stored.len();
    let size = group.stored.iter().max().map_or(0, |m| m + 1);
    let mut sums = vec![0f64; group.nest_count() * size];
    for cut in &group.cuts {
        let Some(values) = quantize::values::floats(graph, cut.value) else { continue };
        let Some(tensor) = graph.constant(cut.value) else { continue };
        let carrier = match cut.reader {
            Some(at) => anatomy.axes.carrier_at(graph, at.node, Slot::In(at.slot)),
            None => Some(cut.value.index()),
        };
        let Some(carrier) = carrier else { continue };
        let tags = group.tags(&anatomy.axes, (carrier, cut.axis), tensor.dims[cut.axis]);
        let inner: usize = tensor.dims[cut.axis + 1..].iter().product();
        for (flat, value) in values.iter().enumerate() {
            if let Some((row, leaf)) = tags[flat / inner % tensor.dims[cut.axis]] {
                sums[row * size + leaf] += f64::from(*value) * f64::from(*value);
            }
        }
    }
    let together: Vec<f64> = (0..width).map(|u| group.bundle(u).len() as f64).collect();
    let norm = |u: usize| sums[u / width * size + group.stored[u % width]].sqrt() / together[u % width];
    (0..group.units()).map(|u| norm(u) as f32).collect()
}

/// Uniform in [0, 1), from a stream of its own for each group: the same seed gives the same scores, whatever other groups exist.
pub fn random(anatomy: &Anatomy, seed: u64) -> Scores {
    let mut groups = BTreeMap::new();
    for (n, g) in anatomy.groups.iter().enumerate() {
        let mut generator = ChaCha8Rng::seed_from_u64(seed);
        generator.set_stream(n as u64);
        groups.insert(g.id.clone(), (0..g.units()).map(|_| (generator.next_u32() >> 8) as f32 / (1u32 << 24) as f32).collect());
    }
    Scores { groups, by: "random".into(), model_sha256: String::new() }
}
