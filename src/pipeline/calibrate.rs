//! What unlabelled images say of a model: second moments -> bases, the order in which units go, repaired weights.
//!
//! Everything is an edit of constants of the model at full width ([`Calibration::repair`]); cutting stays pure removal.

use super::edit::{Analysed, analysed};
use super::{Error, Model, bench_feeds};
use crate::anatomy::{Anatomy, Group, Kind, Site};
use crate::basis::{self, Basis, Pair, Refused, Rotatable};
use crate::compensate::{self, Consumer, Layer, Repair};
use crate::data::{BatchOrder, Dataset};
use crate::eval;
use crate::graph::{Declared, Graph, Use, ValueId};
use crate::infer::Facts;
use crate::plan::Kept;
use crate::runtime::{self, RuntimeName, SessionOptions};
use crate::score::{self, Scores};
use crate::stats::{self, Probe, Stats, StatsError};
use faer::Mat;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// In which basis dims of heads are cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BasisChoice {
    /// That of the data where it is proven to leave the function as it is, else that of the model.
    #[default]
    Auto,
    /// That of the data; a group for which that cannot be is an error.
    Rotated,
    /// That of the model.
    Original,
}

/// How what stays makes up for what goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compensation {
    /// Not at all.
    Off,
    /// Every layer by what the model as it was says of it.
    AtOnce,
    /// Layer by layer over the depth, by what each gets from the layers before it once they were cut and repaired.
    #[default]
    InOrder,
}

/// What is asked of a calibration.
#[derive(Clone, Copy)]
pub struct CalibrateAsk<'a> {
    /// Images; labels are not looked at. `None`: what the folder holds must do.
    pub data: Option<&'a Dataset>,
    /// At most this many of them.
    pub images: usize,
    /// The basis.
    pub basis: BasisChoice,
    /// Images of one run.
    pub batch: usize,
    /// Draws the images.
    pub seed: u64,
    /// The output with class scores.
    pub output: Option<&'a str>,
    /// How sessions are opened.
    pub session: &'a SessionOptions,
    /// Where statistics and curves are kept for a later plan.
    pub dir: Option<&'a Path>,
}

/// What happens meanwhile.
#[derive(Clone, Debug, PartialEq)]
pub enum Calibrating {
    /// Images of the pass over the data, and of how many.
    Statistics(u64, u64),
    /// Trials measured, and of how many.
    Curves(usize, usize),
    /// Images that gradients were taken of, and of how many.
    Gradients(usize, usize),
    /// Layers repaired in order, and of how many.
    Layers(usize, usize),
}

/// A model that images were shown to.
pub struct Calibration {
    /// The model, its rotated groups in the basis of the data.
    pub(super) base: Analysed,
    pub(super) layers: Vec<Layer>,
    /// How much each unit is worth; within a group, units are best kept in this order.
    pub scores: Scores,
    /// Groups in the basis of the data.
    pub rotated: BTreeSet<String>,
    /// For each head of a `qk` group whose queries and keys can be seen: what pairs of its dims add to the mean square of a logit.
    pub(super) logits: BTreeMap<String, Vec<Mat<f64>>>,
    /// Groups that stay in the basis of the model, and why.
    pub refused: Vec<Refused>,
    /// Groups whose layers cannot be repaired, and why.
    pub unrepaired: Vec<Refused>,
    /// Images seen.
    pub images: u64,
}

/// Shows images to a model.
pub fn calibrate(
    model: &Model,
    ask: &CalibrateAsk<'_>,
    tell: &mut dyn FnMut(Calibrating),
    stop: &AtomicBool,
) -> Result<Calibration, Error> {
    calibrate_from(model, (model.graph(), &model.facts, &model.anatomy), ask, tell, stop)
}

/// Shows images to a model with other weights.
pub(super) fn calibrate_from(
    model: &Model,
    start: (&Graph, &Facts, &Anatomy),
    ask: &CalibrateAsk<'_>,
    tell: &mut dyn FnMut(Calibrating),
    stop: &AtomicBool,
) -> Result<Calibration, Error> {
    let mut base = analysed(model, own_biases(start))?;
    let (consumers, without) = compensate::consumers(&base.graph, &base.facts, &base.anatomy);
    let mut unrepaired: Vec<Refused> = without.into_iter().map(|e| Refused { group: e.group, reason: e.reason }).collect();
    let (rotatable, mut refused) = match ask.basis {
        BasisChoice::Original => (Vec::new(), Vec::new()),
        BasisChoice::Auto | BasisChoice::Rotated => basis::rotatable(&base.graph, &base.facts, &base.anatomy, &consumers),
    };
    let (probes, impossible) = probes(&base, &consumers);
    let mut found = statistics(model, &base, &probes, ask, tell, stop)?;
    let mut layers: Vec<Layer> = Vec::new();
    for (n, consumer) in consumers.into_iter().enumerate() {
        let ids: Vec<String> = consumer.groups.iter().map(|(id, _)| id.clone()).collect();
        let name = probe_of_consumer(n);
        // Moved, not copied: they are most of what is held in memory.
        let moments = found.probes.remove(&name);
        match moments.and_then(|m| Layer::new(&base.graph, consumer, m)) {
            Some(layer) => layers.push(layer),
            None => {
                let reason = impossible.get(&name).map_or("its statistics do not fit its weight", String::as_str);
                unrepaired.extend(ids.into_iter().map(|group| Refused { group, reason: reason.to_string() }));
            }
        }
    }
    let mut bases: Vec<(Rotatable, Basis)> = Vec::new();
    for r in rotatable {
        match basis_of(&base.graph, &r, &found, &layers) {
            Some(b) => bases.push((r, b)),
            None => {
                let told = ["q", "k"].iter().find_map(|side| impossible.get(&format!("{side}.{}", r.group)));
                let told = told.or_else(|| Some(&unrepaired.iter().find(|u| u.group == r.group)?.reason));
                let reason = told.map_or("its statistics have no basis".to_string(), Clone::clone);
                refused.push(Refused { group: r.group, reason });
            }
        }
    }
    base.graph = turn(model, &base, &mut bases, &mut refused, &layers, ask)?;
    if let (BasisChoice::Rotated, Some(r)) = (ask.basis, refused.first()) {
        let reason = format!("--basis rotated: {} keeps the basis of the model: {}", r.group, r.reason);
        return Err(Error::unsuitable(&model.path, reason));
    }
    for layer in &mut layers {
        if let Some(turn) = turn_of(layer, &bases) {
            let turned = layer.turned(&base.graph, &turn);
            *layer = turned.ok_or_else(|| Error::unsuitable(&model.path, "a rotated weight cannot be read"))?;
        }
    }
    let mut scores = score::magnitude(&base.graph, &base.anatomy);
    scores.by = "obs".to_string();
    scores.model_sha256 = model.sha256()?;
    for (r, b) in &bases {
        scores.groups.insert(r.group.clone(), b.carried.iter().map(|c| *c as f32).collect());
    }
    let logits = base.anatomy.groups.iter().filter(|g| g.kind == Kind::Qk);
    let logits = logits.filter_map(|g| Some((g.id.clone(), shares_of_logits(&base, g, &found, &bases)?))).collect();
    let rotated: BTreeSet<String> = bases.into_iter().map(|(r, _)| r.group).collect();
    let others: Vec<&Group> = base.anatomy.groups.iter().filter(|g| !rotated.contains(&g.id)).collect();
    let orders = on_all_cores(&others, |group| match group.kind {
        Kind::Qk => energies(group, &found),
        _ => order(group, &layers),
    });
    for (group, order) in others.iter().zip(orders) {
        scores.groups.extend(order.map(|s| (group.id.clone(), s)));
    }
    Ok(Calibration { base, layers, scores, rotated, logits, refused, unrepaired, images: found.images })
}

/// What `f` gives for each item, in their order, on as many threads as the process may use.
pub(super) fn on_all_cores<T: Sync, R: Send>(items: &[T], f: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(items.len().max(1));
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        while let Some((n, item)) = Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|n| Some((n, items.get(n)?))) {
            done.push((n, f(item)));
        }
        done
    };
    let mut all: Vec<(usize, R)> = std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let mut all = work();
        all.extend(others.into_iter().flat_map(|t| t.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))));
        all
    });
    all.sort_by_key(|(n, _)| *n);
    all.into_iter().map(|(_, r)| r).collect()
}

/// The model in which every consumer has a bias of its own: merged ones are taken apart, so that one can be refitted alone.
fn own_biases((graph, facts, anatomy): (&Graph, &Facts, &Anatomy)) -> Graph {
    let mut graph = graph.clone();
    let (consumers, _) = compensate::consumers(&graph, facts, anatomy);
    for bias in consumers.iter().filter_map(|c| c.bias) {
        let value = graph.value(bias.constant);
        if value.users().len() > 1
            && let Some(tensor) = graph.constant(bias.constant)
        {
            let name = value.name().to_string();
            let own = graph.add_initializer(&name, tensor);
            graph.set_input(bias.at, Some(own));
        }
    }
    graph
}

fn probe_of_consumer(n: usize) -> String {
    format!("x.{n}")
}

/// Probes of every consumer's operand, and of queries and keys of every `qk` group whose product has both as operands; and those that
/// cannot be, by name, with the reason.
fn probes(base: &Analysed, consumers: &[Consumer]) -> (Vec<Probe>, BTreeMap<String, String>) {
    let value = |at: Use| base.graph.node(at.node).input(at.slot);
    let mut probes = Vec::new();
    let mut impossible = BTreeMap::new();
    let mut add = |name: String, site: &Site, centre: Option<usize>| {
        let Some(value) = value(site.at) else { return };
        let shape = base.facts.shape(value).unwrap_or_default();
        let sizes: Option<usize> = site.axes.iter().map(|a| shape.get(*a)?.size()).product();
        let probe = Probe { name, value, axes: site.axes.clone(), centre };
        let found = match sizes == Some(site.index.len()) {
            true => stats::can_be_probed(&base.graph, &base.facts, &probe),
            false => Err(format!("axes {:?} of {shape:?} hold more than its {} units", site.axes, site.index.len())),
        };
        match found {
            Ok(()) => probes.push(probe),
            Err(reason) => {
                let shown = format!("no statistics at '{}': {reason}", base.graph.value(value).name());
                impossible.insert(probe.name, shown);
            }
        }
    };
    for (n, consumer) in consumers.iter().enumerate() {
        add(probe_of_consumer(n), &consumer.site, None);
    }
    for group in base.anatomy.groups.iter().filter(|g| g.kind == Kind::Qk) {
        if let Some((q, k)) = queries_and_keys(base, group) {
            // Of keys the last axis that is neither dims nor heads holds the tokens; a softmax ignores what all of them share.
            let rank = value(k.at).and_then(|v| base.facts.shape(v)).map_or(0, <[_]>::len);
            let tokens = (1..rank).rev().find(|a| !k.axes.contains(a));
            add(format!("q.{}", group.id), &q, None);
            add(format!("k.{}", group.id), &k, tokens);
        }
    }
    (probes, impossible)
}

/// The operands of the product in which a `qk` group is contracted, where both can be seen.
pub(super) fn queries_and_keys(base: &Analysed, group: &Group) -> Option<(Site, Site)> {
    let [site] = &group.sites[..] else { return None };
    let node = base.graph.node(site.at.node);
    if node.domain() == "com.microsoft" && node.op() != "FusedMatMul" {
        return None;
    }
    let at = |slot: usize| {
        let at = Use { node: site.at.node, slot };
        group.operand(&base.graph, &base.facts, &base.anatomy.axes, at)
    };
    Some((at(0)?, at(1)?))
}

/// The file of statistics in a run directory.
pub(super) const STATS_FILE: &str = "stats.safetensors";

/// Reads what a folder holds, or gathers it and leaves it there.
fn statistics(
    model: &Model,
    base: &Analysed,
    probes: &[Probe],
    ask: &CalibrateAsk<'_>,
    tell: &mut dyn FnMut(Calibrating),
    stop: &AtomicBool,
) -> Result<Stats, Error> {
    let sha256 = model.sha256()?;
    let file = ask.dir.map(|d| d.join(STATS_FILE));
    let failed = |cause: StatsError| stats_error(model, cause);
    if let Some(file) = file.as_deref().filter(|f| f.exists()) {
        let is_asked =
            |found: &Stats| ask.data.is_none_or(|d| found.images == ask.images.min(d.len()) as u64 && found.seed == ask.seed);
        match Stats::read(file, &sha256, &base.graph, probes) {
            Ok(found) if is_asked(&found) => return Ok(found),
            Ok(_) => {}
            Err(StatsError::Stale { .. }) if ask.data.is_some() => {}
            Err(cause) => return Err(failed(cause)),
        }
    }
    let Some(data) = ask.data else {
        let at = ask.dir.unwrap_or(&model.path);
        return Err(Error::unsuitable(at, format!("holds no statistics of images ({STATS_FILE}): give images with --data")));
    };
    let images = ask.images.min(data.len());
    let loaders = std::thread::available_parallelism().map_or(1, usize::from);
    let job = stats::Job {
        graph: &base.graph,
        facts: &base.facts,
        model_sha256: &sha256,
        probes,
        data,
        images: Some(images),
        seed: ask.seed,
        batch: ask.batch,
        loaders,
        session: ask.session,
    };
    let found = stats::collect(&job, &mut |p| tell(Calibrating::Statistics(p.images, p.of)), stop).map_err(failed)?;
    if let Some(file) = &file {
        found.write(file, &base.graph, probes).map_err(failed)?;
        // Curves of other statistics are of other bases and repairs.
        let others = file.parent().and_then(|dir| std::fs::read_dir(dir).ok()).into_iter().flatten().flatten();
        let is_curves = |name: &str| name.starts_with("curves-") && name.ends_with(".json");
        for other in others.filter(|f| f.file_name().to_str().is_some_and(is_curves)) {
            std::fs::remove_file(other.path()).map_err(|e| Error::unsuitable(&other.path(), e.to_string()))?;
        }
    }
    Ok(found)
}

pub(super) fn stats_error(model: &Model, cause: StatsError) -> Error {
    Error::Stats { file: model.path.clone(), cause: Box::new(cause) }
}

/// Positions of a head in a site: one list per head of the group and per query head that shares its keys.
pub(super) fn heads_of(index: &[Option<usize>], heads: usize, width: usize) -> Vec<Vec<Vec<usize>>> {
    let mut at: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for (position, unit) in index.iter().enumerate() {
        if let Some(unit) = unit {
            at.entry(*unit).or_default().push(position);
        }
    }
    let of_head = |head: usize| {
        let count = at.get(&(head * width)).map_or(0, Vec::len);
        let one = |n: usize| (0..width).filter_map(|e| at.get(&(head * width + e))?.get(n).copied()).collect::<Vec<_>>();
        (0..count).map(one).filter(|list| list.len() == width).collect()
    };
    (0..heads).map(of_head).collect()
}

/// Sums of the blocks of a matrix at lists of positions.
fn block_sums(matrix: &Mat<f64>, heads: &[Vec<Vec<usize>>], width: usize) -> Vec<Mat<f64>> {
    let sum = |lists: &Vec<Vec<usize>>| {
        Mat::from_fn(width, width, |i, j| lists.iter().map(|list| matrix[(list[i], list[j])]).sum::<f64>())
    };
    heads.iter().map(sum).collect()
}

fn basis_of(graph: &Graph, r: &Rotatable, found: &Stats, layers: &[Layer]) -> Option<Basis> {
    match &r.pair {
        Pair::Logits { q, k, .. } => {
            let moment = |name: &str, site: &Site| {
                let second = found.probes.get(&format!("{name}.{}", r.group))?.fit.second();
                Some(block_sums(&second, &heads_of(&site.index, r.heads, r.width), r.width))
            };
            basis::of_logits(&moment("q", q)?, &moment("k", k)?)
        }
        Pair::Values { x, .. } => {
            let layer = layers.iter().find(|l| l.consumer.site.at == x.at)?;
            let fit = &layer.moments().fit;
            let heads = heads_of(&x.index, r.heads, r.width);
            let moment = if layer.consumer.bias.is_some() { fit.cov.clone() } else { fit.second() };
            let w = layer.consumer.matrix(graph)?;
            // Query heads that share values are weighed together: their rows of the projection stand beside each other.
            let rows = |lists: &Vec<Vec<usize>>| {
                Mat::from_fn(r.width, lists.len() * w.ncols(), |e, o| w[(lists[o / w.ncols()][e], o % w.ncols())])
            };
            basis::of_values(&block_sums(&moment, &heads, r.width), &heads.iter().map(rows).collect::<Vec<_>>())
        }
    }
}

/// For each head, `[E, E]`: of queries and keys that are independent of each other, the mean square of what the dims J add to a logit is
/// the sum of the elements `J x J`, in sum over the heads of queries that share the keys. Without a rotation that is the product, element by
/// element, of both second moments; in the rotated basis both are the same diagonal, so it is that of the squared singular values.
fn shares_of_logits(base: &Analysed, group: &Group, found: &Stats, bases: &[(Rotatable, Basis)]) -> Option<Vec<Mat<f64>>> {
    let (q, k) = queries_and_keys(base, group)?;
    let (heads, width) = (group.nest_count(), group.stored.len());
    let lists = |site: &Site| heads_of(&site.index, heads, width);
    let second = |name: &str| Some(found.probes.get(&format!("{name}.{}", group.id))?.fit.second());
    let (second_q, second_k) = (second("q")?, second("k")?);
    let (of_q, of_k) = (block_sums(&second_q, &lists(&q), width), block_sums(&second_k, &lists(&k), width));
    let rotated = bases.iter().find(|(r, _)| r.group == group.id).map(|(_, b)| b);
    // Keys that are repeated, one copy for each head of queries, would count once for each pair of copies.
    let copies: Vec<f64> = lists(&k).iter().map(|l| l.len() as f64).collect();
    let share = |head: usize, i: usize, j: usize| match rotated {
        Some(basis) if i == j => basis.carried[head * width + i],
        Some(_) => 0.0,
        None => of_q[head][(i, j)] * of_k[head][(i, j)],
    };
    let is_whole = copies.iter().all(|c| *c > 0.0) && lists(&q).iter().all(|l| !l.is_empty());
    is_whole.then(|| (0..heads).map(|h| Mat::from_fn(width, width, |i, j| share(h, i, j) / copies[h])).collect())
}

/// The greatest difference that a change of basis may make. Unit: share of the largest element of a value.
const SAME: f64 = 1e-5;

/// Rotates, runs both graphs on images, and gives up the groups of the first layer whose output differs, until none does.
fn turn(
    model: &Model,
    base: &Analysed,
    bases: &mut Vec<(Rotatable, Basis)>,
    refused: &mut Vec<Refused>,
    layers: &[Layer],
    ask: &CalibrateAsk<'_>,
) -> Result<Graph, Error> {
    loop {
        let mut graph = base.graph.clone();
        let pairs: Vec<(&Rotatable, &Basis)> = bases.iter().map(|(r, b)| (r, b)).collect();
        let left_out = basis::rotate(&mut graph, &pairs);
        bases.retain(|(r, _)| !left_out.iter().any(|l| l.group == r.group));
        refused.extend(left_out);
        if bases.is_empty() {
            return Ok(base.graph.clone());
        }
        let seen = |l: &Layer| base.graph.node(l.consumer.site.at.node).output(0);
        let values: Vec<ValueId> = layers.iter().filter_map(seen).chain(base.graph.outputs().iter().copied()).collect();
        let Some((at, difference)) = first_difference(model, base, &graph, &values, ask)? else { return Ok(graph) };
        let place = |v: ValueId| {
            let producer = base.graph.value(v).producer();
            producer.and_then(|(id, _)| base.graph.order().iter().position(|n| *n == id)).unwrap_or(usize::MAX)
        };
        // The groups whose sinks come last before the value, together with those of their layer.
        let before = |r: &Rotatable| {
            let node = match &r.pair {
                Pair::Logits { q, .. } => q.at.node,
                Pair::Values { x, .. } => x.at.node,
            };
            base.graph.order().iter().position(|n| *n == node).unwrap_or(0)
        };
        let limit = place(values[at]);
        let layer_of = |r: &Rotatable| base.anatomy.groups.iter().find(|g| g.id == r.group).map(|g| g.layer);
        let nearest = bases.iter().map(|(r, _)| r).filter(|r| before(r) <= limit).max_by_key(|r| before(r));
        let layer = nearest.or(bases.first().map(|(r, _)| r)).and_then(layer_of);
        let (out, stay): (Vec<_>, Vec<_>) = std::mem::take(bases).into_iter().partition(|(r, _)| layer_of(r) == layer);
        let reason = format!("rotated at full rank it differs by {difference:.1e} of the range");
        refused.extend(out.into_iter().map(|(r, _)| Refused { group: r.group, reason: reason.clone() }));
        *bases = stay;
    }
}

/// The first of `values` in which two graphs with the same values differ on some images, and by how much.
fn first_difference(
    model: &Model,
    base: &Analysed,
    other: &Graph,
    values: &[ValueId],
    ask: &CalibrateAsk<'_>,
) -> Result<Option<(usize, f64)>, Error> {
    const IMAGES: usize = 8;
    let data_error = |cause| Error::Data { file: model.path.clone(), cause: Box::new(cause) };
    let fixed = eval::fixed_batch(&base.graph, &base.facts);
    let size = fixed.unwrap_or(ask.batch.min(IMAGES));
    let feeds = match ask.data.map(|d| d.batches(BatchOrder::default(), size, 1, None).next()) {
        Some(None) => return Ok(None),
        Some(Some(batch)) => {
            let batch = batch.map_err(data_error)?;
            eval::filled(&batch, fixed.unwrap_or(batch.count))
        }
        None => bench_feeds(model, size, ask.seed, RuntimeName::Ort, ask.session)?,
    };
    let inputs: Vec<(ValueId, Declared)> =
        base.graph.inputs().iter().filter_map(|v| Some((*v, base.graph.value(*v).declared()?.clone()))).collect();
    let outputs: Vec<(ValueId, Declared)> = values
        .iter()
        .map(|v| (*v, Declared { dtype: base.facts.get(*v).dtype, dims: None, extra: bytes::Bytes::new() }))
        .collect();
    let run = |graph: &Graph| -> Result<_, Error> {
        let part = graph.extract(&inputs, &outputs);
        let names: BTreeSet<&str> = part.inputs().iter().map(|v| part.value(*v).name()).collect();
        let fed: Vec<_> = feeds.iter().filter(|(n, _)| names.contains(n.as_str())).cloned().collect();
        Ok(runtime::open_graph(RuntimeName::Ort, &part, ask.session)?.run(&fed)?)
    };
    let (a, b) = (run(&base.graph)?, run(other)?);
    for (v, ((_, a), (_, b))) in a.iter().zip(&b).enumerate() {
        if !a.data.kind().is_float() {
            continue;
        }
        let (a, b) = (a.as_f32(), b.as_f32());
        let range = a.iter().fold(f64::MIN_POSITIVE, |m, x| m.max(f64::from(x.abs())));
        let largest = a.iter().zip(b).map(|(x, y)| f64::from((x - y).abs()));
        let difference = largest.fold(0.0, |m: f64, x| if x.is_nan() { f64::INFINITY } else { m.max(x) }) / range;
        if difference > SAME {
            return Ok(Some((v, difference)));
        }
    }
    Ok(None)
}

/// The matrix `T` with which rotated values change the features of a layer: `x' = x T`.
fn turn_of(layer: &Layer, bases: &[(Rotatable, Basis)]) -> Option<Mat<f64>> {
    let n = layer.consumer.features();
    let mut turn = Mat::<f64>::identity(n, n);
    let mut is_turned = false;
    for (r, b) in bases {
        let Pair::Values { x, .. } = &r.pair else { continue };
        if x.at != layer.consumer.site.at {
            continue;
        }
        is_turned = true;
        for (head, lists) in heads_of(&x.index, r.heads, r.width).iter().enumerate() {
            for list in lists {
                for (i, from) in list.iter().enumerate() {
                    for (j, to) in list.iter().enumerate() {
                        turn[(*from, *to)] = b.first[head][(i, j)];
                    }
                }
            }
        }
    }
    is_turned.then_some(turn)
}

/// Scores of dims in which queries meet keys: the product of their energies, of all dims that go together.
fn energies(group: &Group, found: &Stats) -> Option<Vec<f32>> {
    let of = |name: &str| found.probes.get(&format!("{name}.{}", group.id)).map(|g| g.fit.second());
    let (q, k) = (of("q")?, of("k")?);
    if q.nrows() != group.units() || k.nrows() != group.units() {
        return None;
    }
    let width = group.stored.len();
    let bundles = group.bundles();
    let score = |unit: usize| {
        let together = bundles[unit % width].iter().map(|u| unit / width * width + u);
        let both = together.fold((0.0, 0.0), |(a, b), u| (a + q[(u, u)], b + k[(u, u)]));
        (both.0 * both.1 / bundles[unit % width].len() as f64) as f32
    };
    Some((0..group.units()).map(score).collect())
}

/// Scores by what each removal adds to the error of the layer behind, in the order in which units are best removed; several layers
/// add up.
fn order(group: &Group, layers: &[Layer]) -> Option<Vec<f32>> {
    let width = group.stored.len();
    let bundles = group.bundles();
    let mut scores = vec![0.0; group.units()];
    let mut is_found = false;
    for layer in layers {
        let Some((_, index)) = layer.consumer.groups.iter().find(|(id, _)| *id == group.id) else { continue };
        let firsts: Vec<usize> = (0..group.units()).filter(|u| bundles[u % width].first() == Some(&(u % width))).collect();
        let bundle = |unit: usize| bundles[unit % width].iter().map(move |u| unit / width * width + u);
        let mut at: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (position, unit) in index.iter().enumerate() {
            at.entry(unit.unwrap_or(usize::MAX)).or_default().push(position);
        }
        let features = |unit: &usize| bundle(*unit).flat_map(|u| at.get(&u).cloned().unwrap_or_default()).collect();
        let order = layer.order(&firsts.iter().map(features).collect::<Vec<_>>())?;
        let (mut before, mut least) = (0.0, 0.0f64);
        for (part, error) in order.parts.iter().zip(&order.errors) {
            // What goes later is worth no less.
            least = least.max(error - before);
            before = *error;
            let together = bundles[firsts[*part] % width].len() as f64;
            bundle(firsts[*part]).for_each(|u| scores[u] += least / together);
        }
        is_found = true;
    }
    is_found.then(|| scores.into_iter().map(|s| s as f32).collect())
}

impl Calibration {
    /// The model at full width with the weights to be cut.
    pub(super) fn weights(
        &self,
        model: &Model,
        kept: &Kept,
        how: Compensation,
        ask: &CalibrateAsk<'_>,
        tell: &mut dyn FnMut(Calibrating),
        stop: &AtomicBool,
    ) -> Result<(Graph, Vec<Repair>), Error> {
        match (how, ask.data) {
            (Compensation::Off, _) => Ok((self.base.graph.clone(), Vec::new())),
            (Compensation::InOrder, Some(data)) => self.repair_in_order(model, kept, (ask, data), tell, stop),
            // Statistics of a run directory alone say nothing of what lies behind a cut.
            (Compensation::AtOnce | Compensation::InOrder, _) => Ok(self.repair(kept)),
        }
    }

    /// The model at full width with the weights that make up for the units that go, and what that did layer by layer.
    pub fn repair(&self, kept: &Kept) -> (Graph, Vec<Repair>) {
        let mut graph = self.base.graph.clone();
        let mut told = Vec::new();
        for layer in &self.layers {
            if let Some((refit, repair)) = layer.repair(kept) {
                layer.edits(&self.base.graph, &refit).into_iter().for_each(|(v, tensor)| graph.set_constant(v, tensor));
                told.push(repair);
            }
        }
        (graph, told)
    }
}
