//! Scores that are measured on images, against what can be computed by hand.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "tests, with functions of their own")]

#[path = "command/mod.rs"]
mod command;

use command::*;
use std::collections::BTreeMap;

/// `[16 hidden][images]` behind Relu, and rows of V, of [`mlp`] with its weights three times as large.
struct Hand {
    inputs: Vec<[f32; 4]>,
    hidden: Vec<Vec<f64>>,
    v: Vec<[f64; 3]>,
}

fn weights(count: usize) -> Vec<f32> {
    some(count).iter().map(|w| 3.0 * w).collect()
}

fn hand() -> Hand {
    let inputs = vec![[1.0, -0.5, 0.25, 2.0], [-1.5, 0.5, 1.0, 0.0], [0.3, 1.2, -0.7, -1.0]];
    let (w, v) = (weights(64), weights(48));
    let unit = |x: &[f32; 4], j: usize| (0..4).map(|i| f64::from(x[i]) * f64::from(w[i * 16 + j])).sum::<f64>().max(0.0);
    let hidden = inputs.iter().map(|x| (0..16).map(|j| unit(x, j)).collect()).collect();
    let v = (0..16).map(|j| [0, 1, 2].map(|c| f64::from(v[j * 3 + c]))).collect();
    Hand { inputs, hidden, v }
}

fn log_softmax(logits: [f64; 3]) -> [f64; 3] {
    let top = logits.iter().fold(f64::NEG_INFINITY, |m, l| m.max(*l));
    let sum = top + logits.iter().map(|l| (l - top).exp()).sum::<f64>().ln();
    logits.map(|l| l - sum)
}

impl Hand {
    /// The log-probabilities of image b where unit j has the gate `gate`.
    fn log_p(&self, b: usize, j: usize, gate: f64) -> [f64; 3] {
        let term = |k: usize, c: usize| self.hidden[b][k] * self.v[k][c] * if k == j { gate } else { 1.0 };
        log_softmax([0, 1, 2].map(|c| (0..16).map(|k| term(k, c)).sum()))
    }

    /// `sum_c p_c (d log p_c / dm_j)^2` of image b, by central differences.
    fn information(&self, b: usize, j: usize) -> f64 {
        const STEP: f64 = 1e-4;
        let (up, down, at) = (self.log_p(b, j, 1.0 + STEP), self.log_p(b, j, 1.0 - STEP), self.log_p(b, j, 1.0));
        (0..3).map(|c| at[c].exp() * ((up[c] - down[c]) / (2.0 * STEP)).powi(2)).sum()
    }

    fn archive(&self, times: usize) -> Vec<u8> {
        let bytes: Vec<u8> = (0..times).flat_map(|_| self.inputs.iter().flatten()).flat_map(|x| x.to_le_bytes()).collect();
        npz(&[("x", npy("<f4", &[3 * times, 4], &bytes))])
    }
}

/// A folder with the model and each of its three inputs `times` times; `None` without ONNX Runtime.
fn sandbox(times: usize) -> Option<(Sandbox, Hand, String)> {
    let Some(library) = ort() else {
        println!("skipped: VITRIM_ORT_LIB names no ONNX Runtime");
        return None;
    };
    let (sandbox, hand) = (Sandbox::default(), hand());
    let mut model = mlp();
    graph(&mut model).initializer = vec![floats("W", &[4, 16], &weights(64)), floats("V", &[16, 3], &weights(48))];
    sandbox.model("m.onnx", &model);
    sandbox.write("d.npz", &hand.archive(times));
    Some((sandbox, hand, library))
}

fn scores(sandbox: &Sandbox, library: &str, args: &[&str]) -> BTreeMap<String, Vec<f32>> {
    let args = [&["score", "m.onnx", "--data", "d.npz", "--images", "100000", "-o", "s", "--force", "-q"], args].concat();
    let ran = sandbox.run_with(&args, &[("VITRIM_ORT_LIB", library)]);
    assert_eq!(ran.code, 0, "{ran:?}");
    vitrim::score::Scores::read(&sandbox.at("s")).unwrap().groups
}

#[test]
fn fisher_and_taylor_are_those_of_the_softmax() {
    const TIMES: usize = 2000;
    let Some((sandbox, hand, library)) = sandbox(TIMES) else { return };
    let fisher = scores(&sandbox, &library, &["--by", "fisher", "--batch", "500"])["mlp.0"].clone();
    let taylor = scores(&sandbox, &library, &["--by", "taylor", "--batch", "500"])["mlp.0"].clone();
    let mut live = 0;
    for j in 0..16 {
        let of_image: Vec<f64> = (0..3).map(|b| hand.information(b, j)).collect();
        let (squares, sizes) = (of_image.iter().sum::<f64>() / 3.0, of_image.iter().map(|f| f.sqrt()).sum::<f64>() / 3.0);
        // A gradient is Gaussian: |g| has the mean sqrt(2 / pi) of its deviation.
        for (found, wanted) in [(fisher[j], squares), (taylor[j], sizes * (2.0 / std::f64::consts::PI).sqrt())] {
            // The mean of 2000 squares of a Gaussian is known to 3.2 %; four times that.
            let error = (f64::from(found) - wanted).abs();
            assert!(error <= 4.0 * (2.0 / TIMES as f64).sqrt() * wanted + 1e-9, "unit {j}: {found} against {wanted}");
        }
        live += usize::from(squares > 1e-4);
    }
    assert!(live > 8, "{live} units do anything");
}

#[test]
fn activation_is_the_size_of_a_unit_times_the_norm_of_its_row() {
    let Some((sandbox, hand, library)) = sandbox(1) else { return };
    for batch in ["1", "2", "16"] {
        let found = scores(&sandbox, &library, &["--by", "activation", "--batch", batch])["mlp.0"].clone();
        for (j, found) in found.iter().enumerate() {
            let size = (hand.hidden.iter().map(|h| h[j] * h[j]).sum::<f64>() / 3.0).sqrt();
            let wanted = size * hand.v[j].iter().map(|v| v * v).sum::<f64>().sqrt();
            assert!((f64::from(*found) - wanted).abs() < 1e-5 * wanted.max(1.0), "unit {j}: {found} against {wanted}");
        }
    }
}

/// The squared error's Hessian, where no output holds class scores.
#[test]
fn without_class_scores_fisher_is_that_of_the_squared_error() {
    const TIMES: usize = 2000;
    let Some((sandbox, hand, library)) = sandbox(1) else { return };
    let mut model = mlp();
    let g = graph(&mut model);
    g.initializer = vec![floats("W", &[4, 16], &weights(64)), floats("V", &[16, 3], &weights(48))];
    (g.input, g.output) = (vec![info("x", &[0, 3, 4])], vec![info("y", &[0, 3, 3])]);
    sandbox.model("m.onnx", &model);
    let bytes: Vec<u8> = (0..TIMES).flat_map(|_| hand.inputs.iter().flatten()).flat_map(|x| x.to_le_bytes()).collect();
    sandbox.write("d.npz", &npz(&[("x", npy("<f4", &[TIMES, 3, 4], &bytes))]));
    let found = scores(&sandbox, &library, &["--by", "fisher", "--batch", "500"])["mlp.0"].clone();
    for (j, found) in found.iter().enumerate() {
        let row: f64 = hand.v[j].iter().map(|v| v * v).sum();
        let wanted = 2.0 / 9.0 * hand.hidden.iter().map(|h| h[j] * h[j] * row).sum::<f64>();
        let error = (f64::from(*found) - wanted).abs();
        assert!(error <= 4.0 * (2.0 / TIMES as f64).sqrt() * wanted + 1e-9, "unit {j}: {found} against {wanted}");
    }
}

#[test]
fn the_same_seed_gives_the_same_bytes_whatever_the_order_of_units() {
    let Some((sandbox, _, library)) = sandbox(20) else { return };
    for args in [&["--by", "fisher"][..], &["--by", "fisher", "--block"], &["--by", "taylor"], &["--by", "activation"]] {
        let file = |seed: &str| {
            scores(&sandbox, &library, &[args, &["--seed", seed]].concat());
            std::fs::read(sandbox.at("s")).unwrap()
        };
        assert_eq!(file("1"), file("1"), "{args:?}");
        assert!(args.contains(&"activation") || file("1") != file("2"), "{args:?}");
    }
    // What is drawn belongs to the image, not to its batch.
    let (one, many) = (["--by", "fisher", "--batch", "1"], ["--by", "fisher", "--batch", "32"]);
    for (a, b) in scores(&sandbox, &library, &one)["mlp.0"].iter().zip(&scores(&sandbox, &library, &many)["mlp.0"]) {
        assert!((a - b).abs() <= 1e-4 * a.abs().max(1e-3), "{a} {b}");
    }
}

#[test]
fn what_is_missing_is_said_in_one_line() {
    let sandbox = Sandbox::default();
    sandbox.model("m.onnx", &mlp());
    for (args, words) in [
        (&["--by", "fisher"][..], "--by fisher: needs images: --data"),
        (&["--by", "taylor"], "--by taylor: needs images: --data"),
        (&["--by", "activation"], "--by activation: needs images: --data"),
        (&["--by", "taylor", "--block"], "--block: goes with --by fisher only"),
        (&["--by", "fisher", "--data", "nowhere"], "nowhere"),
        (&["--by", "fisher", "--data", "m.onnx", "--kinds", "qk"], "no group of the kinds asked for"),
    ] {
        let ran = sandbox.run(&[&["score", "m.onnx", "-o", "s"], args].concat());
        assert!(ran.code == 2 && ran.stderr.contains(words) && ran.stderr.lines().count() == 1, "{args:?}: {ran:?}");
    }
    assert_eq!(sandbox.files(), ["m.onnx"]);
}
