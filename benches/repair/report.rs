//! Tables, paired differences, and whether goals are met.

use super::{Bench, Run, WIDTHS};
use std::collections::BTreeMap;

pub(super) const ONE_SHOT: &str = "one-shot: rotation + refit, measured";
pub(super) const TRAINED: &str = "search+finetune";
pub(super) const TUNED: &str = "one-shot, then fine-tuning";
pub(super) const MAGNITUDE: &str = "magnitude, no repair";
pub(super) const ENERGY_REFIT: &str = "activation + refit";
pub(super) const SELECTION: &str = "selection + refit";
pub(super) const ROTATION: &str = "rotation + refit";
pub(super) const UNIFORM: &str = "rotation + refit, uniform";
/// Of the paper's procedure, as paper.py writes them.
const PAPER: &str = "paper, masked retraining";
/// How many points of accuracy one-shot may lose at which share of the MACs.
const LOSSES: [(&str, f64); 4] = [("0.5", 0.2), ("0.3", 0.3), ("0.2", 0.5), ("0.1", 2.0)];
/// KL that float32 does not resolve on 2,000 images.
const NOISE: f64 = 1e-7;

/// Everything that was kept, this call's and earlier ones'.
struct All<'a>(Vec<&'a Run>);

impl All<'_> {
    /// Runs of a row at a place, by seed; those without a seed stand for every seed.
    fn of(&self, part: &str, row: &str, at: &str) -> Vec<&Run> {
        let mut found: Vec<&Run> = self.0.iter().copied().filter(|r| r.part == part && r.row == row && r.at == at).collect();
        found.sort_by_key(|r| r.seed);
        found
    }

    fn mean_kl(&self, part: &str, row: &str, at: &str) -> Option<f64> {
        let found = self.of(part, row, at);
        (!found.is_empty()).then(|| mean_sd(&found.iter().map(|r| r.kl).collect::<Vec<_>>()).0)
    }

    /// Rows of a part, the first seen first.
    fn rows(&self, part: &str) -> Vec<String> {
        let mut rows: Vec<String> = Vec::new();
        for run in self.0.iter().filter(|r| r.part == part) {
            if !rows.contains(&run.row) {
                rows.push(run.row.clone());
            }
        }
        rows
    }

    fn cell(&self, part: &str, row: &str, at: &str) -> String {
        let found = self.of(part, row, at);
        if found.is_empty() {
            return "-".to_string();
        }
        let (top, top_sd) = mean_sd(&found.iter().map(|r| r.top1).collect::<Vec<_>>());
        let (kl, kl_sd) = mean_sd(&found.iter().map(|r| r.kl).collect::<Vec<_>>());
        match found.len() {
            1 => format!("{top:.2} / {}", short(kl)),
            _ => format!("{top:.2} ± {top_sd:.2} / {} ± {}", short(kl), short(kl_sd)),
        }
    }

    /// KL of one row less that of another, seed by seed: mean, standard error, and pairs.
    fn paired(&self, at: &str, other: (&str, &str)) -> Option<(f64, f64, usize)> {
        let (ours, theirs) = (self.of("budgets", ONE_SHOT, at), self.of(other.0, other.1, at));
        let pair = |a: &&Run| theirs.iter().find(|b| b.seed.is_none() || b.seed == a.seed).map(|b| a.kl - b.kl);
        let differences: Vec<f64> = ours.iter().filter_map(pair).collect();
        let (mean, sd) = mean_sd(&differences);
        (!differences.is_empty()).then(|| (mean, sd / (differences.len() as f64).sqrt(), differences.len()))
    }
}

fn mean_sd(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n.max(1.0);
    let variance = values.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / (n - 1.0).max(1.0);
    (mean, variance.sqrt())
}

/// Four decimals, or two digits of what is smaller.
fn short(kl: f64) -> String {
    if kl == 0.0 || kl.abs() >= 1e-3 { format!("{kl:.4}") } else { format!("{kl:.1e}") }
}

pub(super) fn print(bench: &Bench) {
    let paper = std::fs::read(bench.out.join("paper.json"));
    let paper: Vec<Run> = paper.map_or(Vec::new(), |b| serde_json::from_slice(&b).unwrap());
    let all = All(bench.runs.iter().chain(&paper).collect());
    println!(
        "top-1 % / KL to the original in nats, mean ± sd over seeds; n = 2000 test digits; {} images looked at",
        bench.images
    );
    println!("search {} epochs, fine-tuning {} epochs", bench.search_epochs, bench.finetune_epochs);
    let seeds =
        |part: &str| all.0.iter().filter(|r| r.part == part).filter_map(|r| r.seed).collect::<std::collections::BTreeSet<_>>();
    for part in ["budgets", "masks", "trained", "tuned", "ablation", "again"] {
        println!("{part}: seeds {:?}", seeds(part));
    }
    budgets(bench, &all);
    differences(bench, &all);
    ablation(&all);
    paper_table(&all);
    times(&all);
    println!("\n## Goals\n");
    for line in goals(bench, &all) {
        println!("- {line}");
    }
}

fn table(head: &[String], rows: &[Vec<String>]) {
    println!("| {} |", head.join(" | "));
    println!("|{}", "---|".repeat(head.len()));
    rows.iter().for_each(|row| println!("| {} |", row.join(" | ")));
}

/// Budgets go down the table, rows across it in two tables: without training, and with.
fn budgets(bench: &Bench, all: &All<'_>) {
    println!("\n## Shares of the MACs\n\ndense: {}\n", all.cell("dense", "dense", "1.0"));
    for (title, parts) in [("no training", &["budgets", "masks"][..]), ("with training", &["masks", "trained", "tuned"][..])] {
        let is_shown = |part: &str, row: &str| {
            (part == "masks") == (row.starts_with("ViT-Slim") && title == "no training") || part != "masks"
        };
        let rows: Vec<(&str, String)> =
            parts.iter().flat_map(|p| all.rows(p).into_iter().filter(|r| is_shown(p, r)).map(|r| (*p, r))).collect();
        let head: Vec<String> = [title.to_string()].into_iter().chain(bench.budgets.iter().cloned()).collect();
        let cells = |(part, row): &(&str, String)| {
            let places = bench.budgets.iter().map(|at| if row == "dense control" { "1.0" } else { at.as_str() });
            std::iter::once(row.clone()).chain(places.map(|at| all.cell(part, row, at))).collect::<Vec<_>>()
        };
        if !rows.is_empty() {
            table(&head, &rows.iter().map(cells).collect::<Vec<_>>());
            println!();
        }
    }
}

/// Rows that neither train nor read labels; those of a search stand beside them for comparison.
fn untrained(all: &All<'_>) -> Vec<(&'static str, String)> {
    let mut rows: Vec<(&'static str, String)> = all.rows("budgets").into_iter().map(|r| ("budgets", r)).collect();
    rows.extend(all.rows("masks").into_iter().filter(|r| r != "dense control").map(|r| ("masks", r)));
    rows.retain(|(_, r)| r != ONE_SHOT);
    rows
}

fn differences(bench: &Bench, all: &All<'_>) {
    println!("KL of one-shot less KL of the row, paired by seed, mean ± standard error\n");
    let head: Vec<String> = ["row".to_string()].into_iter().chain(bench.budgets.iter().cloned()).collect();
    let cell = |at: &String, row: &(&str, String)| {
        all.paired(at, (row.0, &row.1)).map_or("-".to_string(), |(mean, error, _)| format!("{} ± {}", short(mean), short(error)))
    };
    let line =
        |row: &(&str, String)| std::iter::once(row.1.clone()).chain(bench.budgets.iter().map(|at| cell(at, row))).collect();
    table(&head, &untrained(all).iter().map(line).collect::<Vec<_>>());
}

fn ablation(all: &All<'_>) {
    println!("\n## One kind at a uniform width\n");
    let places: Vec<String> = ["qk", "vo", "mlp"].iter().flat_map(|k| WIDTHS.map(|w| format!("{k} {w}"))).collect();
    let head: Vec<String> = ["row".to_string()].into_iter().chain(places.iter().cloned()).collect();
    let line = |row: &String| std::iter::once(row.clone()).chain(places.iter().map(|at| all.cell("ablation", row, at))).collect();
    table(&head, &all.rows("ablation").iter().map(line).collect::<Vec<_>>());
}

fn paper_table(all: &All<'_>) {
    println!("\n## Beside the paper's procedure\n");
    let head = ["row", "0.6", "0.5"].map(str::to_string);
    let rows: Vec<(&str, String)> = all.rows("paper").into_iter().map(|r| ("paper", r)).collect();
    let ours = [("trained", TRAINED.to_string()), ("tuned", TUNED.to_string()), ("budgets", ONE_SHOT.to_string())];
    let line = |(part, row): &(&str, String)| vec![row.clone(), all.cell(part, row, "0.6"), all.cell(part, row, "0.5")];
    table(&head, &rows.iter().chain(&ours).map(line).collect::<Vec<_>>());
}

/// What each row took, with the load: the machine may have been busy.
fn times(all: &All<'_>) {
    println!("\n## Seconds per model, all its commands together\n");
    let mut by: BTreeMap<(&str, &str), Vec<(f64, f64)>> = BTreeMap::new();
    for run in &all.0 {
        by.entry((&run.part, &run.row)).or_default().push((run.seconds, run.load));
    }
    let line = |((part, row), runs): (&(&str, &str), &Vec<(f64, f64)>)| {
        let mut seconds: Vec<f64> = runs.iter().map(|r| r.0).collect();
        seconds.sort_by(f64::total_cmp);
        let load = runs.iter().map(|r| r.1).sum::<f64>() / runs.len() as f64;
        let (least, most) = (seconds[0], seconds[seconds.len() - 1]);
        let cells =
            [part.to_string(), row.to_string(), format!("{:.1}", seconds[seconds.len() / 2]), format!("{least:.1} to {most:.1}")];
        cells.into_iter().chain([runs.len().to_string(), format!("{load:.1}")]).collect::<Vec<_>>()
    };
    let head = ["part", "row", "median", "range", "n", "mean load"].map(str::to_string);
    table(&head, &by.iter().map(line).collect::<Vec<_>>());
}

// ---- goals --------------------------------------------------------------------------------------

fn verdict(is_met: bool) -> &'static str {
    if is_met { "met" } else { "MISSED" }
}

fn goals(bench: &Bench, all: &All<'_>) -> Vec<String> {
    let mut lines = Vec::new();
    let dense = all.of("dense", "dense", "1.0").first().map_or(f64::NAN, |r| r.top1);
    for (at, most) in LOSSES {
        let found: Vec<f64> = all.of("budgets", ONE_SHOT, at).iter().map(|r| dense - r.top1).collect();
        lines.push(match found.is_empty() {
            true => format!("not measured: loss at {at}"),
            false => {
                let (mean, sd) = mean_sd(&found);
                let met = verdict(mean <= most);
                format!("{met}: one-shot at {at} loses {mean:.2} ± {sd:.2} points (n = {}), goal at most {most}", found.len())
            }
        });
    }
    lines.push(nowhere_worse(bench, all));
    let ablated = |worse: &str, better: &str, at: &str| ratio(all, ("ablation", worse, at), ("ablation", better, at));
    let mut want = |what: &str, ratio: Option<f64>, least: f64| {
        lines.push(match ratio {
            None => format!("not measured: {what}"),
            Some(r) => format!("{}: {what}: {r:.1} times, goal {least}", verdict(r >= least)),
        });
    };
    for at in ["qk 0.25", "vo 0.25"] {
        want(&format!("{ROTATION} beats {SELECTION} on {at}"), ablated(SELECTION, ROTATION, at), 10.0);
    }
    want("OBS + ridge beats magnitude on mlp 0.5", ablated(MAGNITUDE, ROTATION, "mlp 0.5"), 20.0);
    want("OBS + ridge beats ridge on an activation order on mlp 0.25", ablated(ENERGY_REFIT, ROTATION, "mlp 0.25"), 1.0);
    let measured = ratio(all, ("budgets", UNIFORM, "0.3"), ("budgets", ONE_SHOT, "0.3"));
    want("measured widths beat uniform ones at 0.3", measured, 2.0);
    for at in ["0.6", "0.5"] {
        for (part, row) in [("trained", TRAINED), ("tuned", TUNED)] {
            lines.push(beats_paper(all, part, row, at));
        }
    }
    let again: Vec<f64> = all.of("again", ONE_SHOT, "0.35").iter().map(|r| r.seconds).collect();
    lines.extend(again.iter().map(|s| format!("{}: a second budget took {s:.1} s, goal under 10", verdict(*s < 10.0))));
    lines
}

/// KL of one row over that of another.
fn ratio(all: &All<'_>, worse: (&str, &str, &str), better: (&str, &str, &str)) -> Option<f64> {
    Some(all.mean_kl(worse.0, worse.1, worse.2)? / all.mean_kl(better.0, better.1, better.2)?.max(NOISE))
}

fn nowhere_worse(bench: &Bench, all: &All<'_>) -> String {
    let (mut worse, mut pairs) = (Vec::new(), 0);
    for at in &bench.budgets {
        for (part, row) in untrained(all) {
            // One pair has no error to compare with.
            let Some((mean, error, n)) = all.paired(at, (part, &row)).filter(|(_, _, n)| *n > 1) else { continue };
            pairs += 1;
            if mean > 2.0 * error {
                worse.push(format!("{row} at {at} (by {} ± {}, n = {n})", short(mean), short(error)));
            }
        }
    }
    let text = "one-shot is nowhere worse in KL, by more than two standard errors, than a row without training";
    match (pairs, worse.is_empty()) {
        (0, _) => format!("not measured: {text}"),
        (_, true) => format!("met: {text} ({pairs} places)"),
        (_, false) => format!("MISSED: {text}; it is than {}", worse.join("; ")),
    }
}

fn beats_paper(all: &All<'_>, part: &str, row: &str, at: &str) -> String {
    let (ours, theirs) = (all.of(part, row, at), all.of("paper", PAPER, at));
    if ours.is_empty() || theirs.is_empty() {
        return format!("not measured: {row} against the paper's procedure at {at}");
    }
    let of = |runs: &[&Run], value: fn(&Run) -> f64| mean_sd(&runs.iter().map(|r| value(r)).collect::<Vec<_>>()).0;
    let (top, kl) = (of(&ours, |r| r.top1) - of(&theirs, |r| r.top1), (of(&ours, |r| r.kl), of(&theirs, |r| r.kl)));
    let met = verdict(top > 0.0 || kl.0 < kl.1);
    format!(
        "{met}: {row} against the paper's procedure at {at}: top-1 {top:+.2} points, KL {} beside {}",
        short(kl.0),
        short(kl.1)
    )
}
