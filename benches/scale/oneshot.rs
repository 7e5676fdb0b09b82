//! `slim` without training on a network of real size: what it takes, where the time goes, and what a second budget takes.
//!
//! The images are noise: what is learnt of them says nothing, but costs the same.

use super::{Result, Shape, command, load, make};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};
use vitrim::graph::Storage;

/// ViT-S/16 and ViT-B/16 at 224.
pub(super) const SMALL: Shape = Shape { layers: 12, width: 384, heads: 6, patch: 16 };
pub(super) const BASE: Shape = Shape { layers: 12, width: 768, heads: 12, patch: 16 };
const IMAGES: usize = 256;
const JUDGED: usize = 32;

/// A run of the command.
struct Took {
    seconds: f64,
    /// Stages in their order, with their seconds.
    stages: Vec<(String, f64)>,
    /// Resident memory at its highest. Unit: bytes.
    peak: u64,
}

pub(super) fn one_shot(name: &str, shape: &Shape, folder: &Path) -> Result<()> {
    let model = folder.join(format!("{name}.onnx"));
    make(shape, Storage::Raw, &model)?;
    for (file, count) in [("look.npz", IMAGES), ("judge.npz", JUDGED)] {
        noise(&folder.join(file), count)?;
    }
    println!("{name}: {} bytes, one-shot with {IMAGES} images; load {:.1} before", std::fs::metadata(&model)?.len(), load());
    let run = folder.join(format!("{name}.run"));
    let _ = std::fs::remove_dir_all(&run);
    for (what, budget) in [("first budget", "macs=0.5"), ("second budget", "macs=0.4")] {
        let took = slim(&model, &run, budget, folder)?;
        println!("  {what}: {:.1} s, {:.2} GB at its highest; load {:.1} after", took.seconds, took.peak as f64 / 1e9, load());
        took.stages.iter().for_each(|(stage, seconds)| println!("    {stage:<32} {seconds:>8.1} s"));
    }
    Ok(())
}

/// Random images `[count, 3, 224, 224]`, float32, as a .npz archive.
fn noise(path: &Path, count: usize) -> Result<()> {
    let mut archive = zip::ZipWriter::new(std::fs::File::create(path)?);
    let stored = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    archive.start_file("input.npy", stored)?;
    let mut header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({count}, 3, 224, 224), }}");
    header += &" ".repeat(63 - (10 + header.len()) % 64);
    header.push('\n');
    archive.write_all(b"\x93NUMPY\x01\x00")?;
    archive.write_all(&u16::try_from(header.len())?.to_le_bytes())?;
    archive.write_all(header.as_bytes())?;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64 ^ count as u64;
    for _ in 0..count {
        let mut number = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            ((state >> 40) as f32 / (1 << 24) as f32 - 0.5) * 4.0
        };
        let image: Vec<u8> = (0..3 * 224 * 224).flat_map(|_| number().to_le_bytes()).collect();
        archive.write_all(&image)?;
    }
    archive.finish()?;
    Ok(())
}

fn slim(model: &Path, run: &Path, budget: &str, folder: &Path) -> Result<Took> {
    let mut command = command(["slim", "--budget", budget, "--recipe", "one-shot", "--force"]);
    command.arg(model).arg("--run").arg(run).arg("-o").arg(folder.join("slim.onnx"));
    command.arg("--data").arg(folder.join("look.npz")).arg("--eval-data").arg(folder.join("judge.npz"));
    command.args(["--images", &IMAGES.to_string()]);
    let start = Instant::now();
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let stderr = child.stderr.take().ok_or("no stderr")?;
    let lines = std::thread::spawn(move || {
        let lines = BufReader::new(stderr).lines().map_while(std::io::Result::ok);
        lines.map(|line| (start.elapsed().as_secs_f64(), line)).collect::<Vec<_>>()
    });
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    let ended = loop {
        if let Some(ended) = child.try_wait()? {
            break ended;
        }
        peak = peak.max(peak_bytes(&status));
        std::thread::sleep(Duration::from_millis(20));
    };
    let seconds = start.elapsed().as_secs_f64();
    let lines = lines.join().map_err(|_| "the reader of stderr failed")?;
    if !ended.success() {
        let text: Vec<&str> = lines.iter().map(|(_, l)| l.as_str()).collect();
        return Err(format!("{command:?}: {ended}: {}", text.join("\n")).into());
    }
    Ok(Took { seconds, stages: stages(&lines, seconds), peak })
}

/// Stages are said as they begin, in words without a number or a colon; all else is progress.
fn stages(lines: &[(f64, String)], end: f64) -> Vec<(String, f64)> {
    let is_stage =
        |l: &str| l.starts_with(|c: char| c.is_lowercase()) && !l.contains(|c: char| c.is_ascii_digit() || "/:(".contains(c));
    let begun: Vec<&(f64, String)> = lines.iter().filter(|(_, l)| is_stage(l)).collect();
    let ends = begun.iter().skip(1).map(|(at, _)| *at).chain([end]);
    let start = begun.first().map_or(end, |(at, _)| *at);
    let before = std::iter::once(("before".to_string(), start));
    before.chain(begun.iter().zip(ends).map(|((at, stage), end)| (stage.clone(), end - at))).collect()
}

fn peak_bytes(status: &str) -> u64 {
    let mut text = String::new();
    let read = std::fs::File::open(status).and_then(|mut f| f.read_to_string(&mut text));
    let line = read.ok().and_then(|_| text.lines().find_map(|l| l.strip_prefix("VmHWM:")));
    line.and_then(|l| l.split_whitespace().next()).and_then(|n| n.parse::<u64>().ok()).map_or(0, |kib| kib * 1024)
}
