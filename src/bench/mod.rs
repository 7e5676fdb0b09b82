//! Latency of one model, or of two in turn, in ONNX Runtime and tract.
//!
//! Example: A and B on `[1, 3, 224, 224]`, 10 runs to warm up and 100 measured: A B B A A B B A .., so that what the machine does
//! meanwhile falls on both alike. The ratio is that of neighbouring runs, and its spread is that of 90 % of them.
//!
//! Invariant: every number is of runs of this call; how many there were is in the report.

use std::time::{Duration, Instant};

use serde::Serialize;

use crate::data::array::Array;
use crate::graph::Graph;
use crate::runtime::{self, Device, Error, RuntimeName, Session, SessionOptions};

/// The version of the JSON names that this build writes.
pub const SCHEMA_VERSION: u32 = 1;

/// A model to be measured.
#[derive(Clone, Copy)]
pub struct Contender<'a> {
    /// How the report names it, such as its path.
    pub name: &'a str,
    /// The model.
    pub graph: &'a Graph,
    /// Its inputs.
    pub feeds: &'a [(String, Array)],
}

/// How it is measured.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Runtimes.
    pub runtimes: Vec<RuntimeName>,
    /// Numbers of threads for ONNX Runtime, one measurement for each; tract has one.
    pub threads: Vec<usize>,
    /// Runs of each model before it is measured.
    pub warmup: usize,
    /// Measured runs of each model; at least 1.
    pub iterations: usize,
    /// One measurement ends early after this time, but not before [`FEWEST`] runs.
    pub time_limit: Option<Duration>,
    /// Device and library.
    pub session: SessionOptions,
}

/// Runs that a time limit leaves at least.
pub const FEWEST: usize = 5;

impl Default for Settings {
    /// All runtimes of this build, 1 thread and as many as there are, 100 runs after 10.
    fn default() -> Self {
        let all = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            runtimes: [RuntimeName::Ort, RuntimeName::Tract].into_iter().filter(|r| r.is_built()).collect(),
            threads: if all > 1 { vec![1, all] } else { vec![1] },
            warmup: 10,
            iterations: 100,
            time_limit: None,
            session: SessionOptions::default(),
        }
    }
}

/// The whole result.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Version of the JSON names.
    pub schema_version: u32,
    /// Samples of one run: the leading size of the first input.
    pub batch: usize,
    /// Runs of each model before it was measured.
    pub warmup: usize,
    /// One for each runtime and number of threads.
    pub measurements: Vec<Measurement>,
    /// Runtimes that cannot run a model.
    pub skipped: Vec<Skipped>,
}

/// A runtime that cannot run a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Skipped {
    /// `ort`, `tract`.
    pub runtime: &'static str,
    /// Which model and why.
    pub reason: String,
}

/// All models under the same conditions.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Measurement {
    /// `ort`, `tract`.
    pub runtime: &'static str,
    /// Its version.
    pub version: String,
    /// `cpu`, `cuda:0`.
    pub device: String,
    /// Threads of one operator.
    pub threads: usize,
    /// Measured runs of each model.
    pub iterations: usize,
    /// In the order asked for.
    pub models: Vec<Latency>,
    /// The second model's time over the first's, where there are two.
    pub ratio: Option<Ratio>,
}

/// Latency of one run. Unit: milliseconds.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Latency {
    pub model: String,
    pub latency_ms_min: f64,
    pub latency_ms_mean: f64,
    pub latency_ms_p50: f64,
    pub latency_ms_p90: f64,
    pub latency_ms_p95: f64,
    pub latency_ms_p99: f64,
    pub latency_ms_max: f64,
    /// Samples per second at the median.
    pub throughput_samples_per_s: f64,
}

/// Ratios of neighbouring runs, second model over first; below 1 the second is faster.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Ratio {
    pub p50: f64,
    pub p5: f64,
    pub p95: f64,
}

/// Measures one model, or several in turn.
///
/// Errors: a runtime that is missing or broken, feeds that do not fit. A model that a runtime refuses skips the runtime.
pub fn measure(contenders: &[Contender<'_>], settings: &Settings) -> Result<Report, Error> {
    let batch = contenders.first().and_then(|c| c.feeds.first()?.1.dims.first().copied()).unwrap_or(1);
    let mut report =
        Report { schema_version: SCHEMA_VERSION, batch, warmup: settings.warmup, measurements: Vec::new(), skipped: Vec::new() };
    for runtime in &settings.runtimes {
        let threads = if *runtime == RuntimeName::Tract { &[1][..] } else { &settings.threads };
        for threads in threads {
            match in_runtime(*runtime, *threads, contenders, settings, batch)? {
                Ok(measurement) => report.measurements.push(measurement),
                Err(reason) => {
                    report.skipped.push(Skipped { runtime: runtime.feature(), reason });
                    break;
                }
            }
        }
    }
    Ok(report)
}

fn in_runtime(
    runtime: RuntimeName,
    threads: usize,
    contenders: &[Contender<'_>],
    settings: &Settings,
    batch: usize,
) -> Result<Result<Measurement, String>, Error> {
    let mut options = SessionOptions { threads, ..settings.session.clone() };
    if runtime == RuntimeName::Tract {
        options.device = Device::Cpu;
    }
    let mut sessions: Vec<Box<dyn Session>> = Vec::new();
    for contender in contenders {
        let opened = runtime::open_graph(runtime, contender.graph, &options).and_then(|mut session| {
            for _ in 0..settings.warmup.max(1) {
                session.run(contender.feeds)?;
            }
            Ok(session)
        });
        match opened {
            Ok(session) => sessions.push(session),
            Err(error @ (Error::Load { .. } | Error::Run { .. } | Error::Unsupported { .. })) => {
                return Ok(Err(format!("{}: {error}", contender.name)));
            }
            Err(error) => return Err(error),
        }
    }
    let Some(first) = sessions.first() else { return Ok(Err("there is no model".to_string())) };
    let (version, device) = (first.version(), first.device().device.to_string());
    let times = interleaved(&mut sessions, contenders, settings)?;
    let iterations = times.first().map_or(0, Vec::len);
    let models = contenders.iter().zip(&times).map(|(c, t)| latency(c.name, t, batch)).collect();
    let ratio = match times.as_slice() {
        [a, b] => Some(ratio(a, b)),
        _ => None,
    };
    let measurement = Measurement { runtime: runtime.feature(), version, device, threads, iterations, models, ratio };
    Ok(Ok(measurement))
}

/// Unit: milliseconds, by model and run.
fn interleaved(
    sessions: &mut [Box<dyn Session>],
    contenders: &[Contender<'_>],
    settings: &Settings,
) -> Result<Vec<Vec<f64>>, Error> {
    let start = Instant::now();
    let mut times = vec![Vec::new(); sessions.len()];
    for iteration in 0..settings.iterations.max(1) {
        if iteration >= FEWEST && settings.time_limit.is_some_and(|limit| start.elapsed() > limit) {
            break;
        }
        let forwards = 0..sessions.len();
        let order: Vec<usize> = if iteration % 2 == 0 { forwards.collect() } else { forwards.rev().collect() };
        for i in order {
            let before = Instant::now();
            sessions[i].run(contenders[i].feeds)?;
            times[i].push(before.elapsed().as_secs_f64() * 1e3);
        }
    }
    Ok(times)
}

/// The value below which `share` of the sorted values lie, linear between neighbours.
fn percentile(sorted: &[f64], share: f64) -> f64 {
    let place = share * (sorted.len().saturating_sub(1)) as f64;
    let (low, high) = (place.floor() as usize, place.ceil() as usize);
    match (sorted.get(low), sorted.get(high)) {
        (Some(a), Some(b)) => a + (b - a) * (place - low as f64),
        _ => f64::NAN,
    }
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

fn latency(model: &str, times: &[f64], batch: usize) -> Latency {
    let sorted = sorted(times);
    let at = |share| percentile(&sorted, share);
    Latency {
        model: model.to_string(),
        latency_ms_min: at(0.0),
        latency_ms_mean: times.iter().sum::<f64>() / times.len() as f64,
        latency_ms_p50: at(0.5),
        latency_ms_p90: at(0.9),
        latency_ms_p95: at(0.95),
        latency_ms_p99: at(0.99),
        latency_ms_max: at(1.0),
        throughput_samples_per_s: batch as f64 * 1e3 / at(0.5),
    }
}

fn ratio(first: &[f64], second: &[f64]) -> Ratio {
    let ratios: Vec<f64> = first.iter().zip(second).map(|(a, b)| b / a).collect();
    let sorted = sorted(&ratios);
    Ratio { p50: percentile(&sorted, 0.5), p5: percentile(&sorted, 0.05), p95: percentile(&sorted, 0.95) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_lie_between_neighbours() {
        let times: Vec<f64> = (0..=100).rev().map(f64::from).collect();
        let l = latency("a", &times, 4);
        assert_eq!((l.latency_ms_min, l.latency_ms_mean, l.latency_ms_max), (0.0, 50.0, 100.0));
        assert_eq!((l.latency_ms_p50, l.latency_ms_p90, l.latency_ms_p99), (50.0, 90.0, 99.0));
        assert_eq!(l.throughput_samples_per_s, 80.0);
        assert_eq!(percentile(&[1.0, 2.0], 0.5), 1.5);
        assert_eq!(percentile(&[3.0], 0.99), 3.0);
    }

    #[test]
    fn the_ratio_is_of_neighbouring_runs() {
        // The machine slows down tenfold half-way; the ratio does not notice.
        let (a, b) = ([2.0, 2.0, 20.0, 20.0], [1.0, 1.0, 10.0, 10.0]);
        assert_eq!(ratio(&a, &b), Ratio { p50: 0.5, p5: 0.5, p95: 0.5 });
    }
}
