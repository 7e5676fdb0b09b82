//! `.npz` archives: types, orders, and bad input.

use std::io::Write;
use std::path::{Path, PathBuf};

use vitrim::data::{Array, ArrayData, ArrayKind, Augment, BatchOrder, DataError, Dataset, Options, Start, Warning};
use zip::write::SimpleFileOptions;

use crate::{all, input};

/// A .npy file.
fn npy(descr: &str, shape: &str, data: &[u8]) -> Vec<u8> {
    let header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n");
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}

fn write_npz(path: &Path, entries: &[(&str, Vec<u8>)]) {
    let mut zip = zip::ZipWriter::new(std::fs::File::create(path).unwrap());
    for (i, (name, bytes)) in entries.iter().enumerate() {
        // Stored and deflated in turn, as np.savez and np.savez_compressed write.
        let method = if i % 2 == 0 { zip::CompressionMethod::Deflated } else { zip::CompressionMethod::Stored };
        zip.start_file(*name, SimpleFileOptions::default().compression_method(method)).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap();
}

/// A data set made of entries, for a model with input x [n, 3, 2, 2].
fn open(entries: &[(&str, Vec<u8>)], options: &Options) -> Result<Dataset, DataError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("d.npz");
    write_npz(&path, entries);
    Dataset::open(&path, options)
}

fn images() -> Options {
    Options { inputs: vec![input("x", &[None, Some(3), Some(2), Some(2)], ArrayKind::F32)], ..Options::default() }
}

fn le<T: Copy, const N: usize>(values: &[T], bytes: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    values.iter().flat_map(|v| bytes(*v)).collect()
}

fn only(data: &Dataset) -> Array {
    let batches = all(data, BatchOrder::default(), 100, 2);
    assert_eq!(batches.len(), 1);
    batches[0].inputs[0].1.clone()
}

#[test]
fn bytes_are_scaled_then_normalised() {
    let bytes: Vec<u8> = (0..24).map(|i| i * 10).collect();
    let data = open(
        &[("x.npy", npy("|u1", "(2, 3, 2, 2)", &bytes)), ("labels.npy", npy("<i4", "(2,)", &[4, 0, 0, 0, 1, 0, 0, 0]))],
        &images(),
    );
    let data = data.unwrap();
    assert_eq!(data.labels(), Some(vec![4, 1]));
    let scaled: Vec<f32> = bytes.iter().map(|b| f32::from(*b) / 255.0).collect();
    assert_eq!(only(&data), Array::new(vec![2, 3, 2, 2], ArrayData::F32(scaled.clone())).unwrap());
    let options = Options { mean: Some(vec![0.1, 0.2, 0.3]), std: Some(vec![0.5]), ..images() };
    let data = open(&[("x.npy", npy("|u1", "(2, 3, 2, 2)", &bytes))], &options).unwrap();
    let mean = [0.1f32, 0.2, 0.3];
    let expected: Vec<f32> = scaled.iter().enumerate().map(|(i, v)| (v - mean[i / 4 % 3]) / 0.5).collect();
    assert_eq!(only(&data).data, ArrayData::F32(expected));
}

#[test]
fn floats_are_taken_as_they_are_unless_mean_is_given() {
    let values: Vec<f64> = (0..12).map(f64::from).collect();
    let entry = || [("x.npy", npy(">f8", "(1, 3, 2, 2)", &le(&values, f64::to_be_bytes)))];
    let plain = open(&entry(), &images()).unwrap();
    assert_eq!(only(&plain).as_f32(), values.iter().map(|v| *v as f32).collect::<Vec<_>>());
    let options = Options { mean: Some(vec![1.0, 2.0, 3.0]), std: Some(vec![2.0]), ..images() };
    let normalised = only(&open(&entry(), &options).unwrap()).as_f32();
    assert_eq!(normalised[..5], [-0.5, 0.0, 0.5, 1.0, 1.0]);
}

#[test]
fn other_inputs_pass_through_in_the_models_type() {
    let options = Options {
        inputs: vec![
            input("ids", &[None, Some(2)], ArrayKind::I64),
            input("mask", &[None, Some(2)], ArrayKind::Bool),
            input("bias", &[None], ArrayKind::F16),
        ],
        ..Options::default()
    };
    let entries = [
        ("bias.npy", npy("<f4", "(2,)", &le(&[1.5f32, -2.0], f32::to_le_bytes))),
        ("ids.npy", npy("<i4", "(2, 2)", &le(&[1i32, -1, 3, 4], i32::to_le_bytes))),
        ("mask.npy", npy("|b1", "(2, 2)", &[1, 0, 0, 1])),
        ("../../escape.npy", npy("|u1", "(1,)", &[0])),
    ];
    let data = open(&entries, &options).unwrap();
    assert_eq!(data.warnings(), [Warning::UnusedKeys { keys: vec!["../../escape".into()] }]);
    let batch = all(&data, BatchOrder::default(), 2, 1).remove(0);
    let found: Vec<(&str, ArrayData)> = batch.inputs.iter().map(|(n, a)| (n.as_str(), a.data.clone())).collect();
    assert_eq!(found[0], ("ids", ArrayData::I64(vec![1, -1, 3, 4])));
    assert_eq!(found[1], ("mask", ArrayData::Bool(vec![1, 0, 0, 1])));
    assert_eq!(found[2], ("bias", ArrayData::F16(vec![0x3e00, 0xc000])));
}

#[test]
fn misfits_are_refused_with_both_sides() {
    let refuse = |entries: &[(&str, Vec<u8>)]| {
        let error = open(entries, &images()).err().unwrap().to_string();
        error.split_once("d.npz: ").map_or(error.clone(), |e| e.1.to_string())
    };
    let good = || npy("|u1", "(1, 3, 2, 2)", &[0; 12]);
    let cases = [
        (vec![("a.npy", good()), ("b.npy", good())], "keys are a,b; the model's input is x"),
        (vec![("x.npy", npy("|u1", "(1, 1, 2, 2)", &[0; 4]))], "x is [1, 1, 2, 2], the model's input is [?, 3, 2, 2]"),
        (vec![("x.npy", npy("<i8", "(1, 3, 2, 2)", &[0; 96]))], "x is int64, the model's input is float32; convert it"),
        (vec![("x.npy", npy("|u1", "(0, 3, 2, 2)", &[]))], "x has no samples"),
        (vec![("x.npy", good()), ("labels.npy", npy("|u1", "(2,)", &[0, 1]))], "labels has 2 samples, x has 1"),
        (vec![("x.npy", good()), ("labels.npy", npy("<f4", "(1,)", &[0; 4]))], "labels is float32, the model's input is int64"),
        (vec![("x.npy", npy("|O", "(1,)", b"\x80\x04."))], "entry x holds Python objects (dtype |O), which are never unpickled"),
        (vec![("x.npy", npy("<U4", "(1,)", &[0; 16]))], "entry x has dtype <U4; allowed are"),
        (vec![("x.npy", npy("|u1", "(1, 3, 2, 2)", &[0; 13]))], "entry x inflates past its declared 12 bytes"),
        (vec![("x.npy", npy("|u1", "(1, 3, 2, 2)", &[0; 11]))], "entry x ends before its declared 12 bytes"),
        (
            vec![("x.npy", npy("|u1", "(99999, 3, 999, 999)", &[0; 11]))],
            "entry x declares shape [99999, 3, 999, 999], 299397305997 bytes",
        ),
        (vec![("x.npy", npy("<f4", "(1, 3, 2, 2)", &le(&[f32::NAN; 12], f32::to_le_bytes)))], "entry x holds NaN at element 0"),
        (vec![("x.npy", b"hello, this is text".to_vec())], "entry x is not a .npy array"),
    ];
    for (entries, start) in cases {
        let found = refuse(&entries);
        assert!(found.starts_with(start), "{found}\nexpected: {start}");
    }
}

#[test]
fn files_that_are_no_archives_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let cases: [(&[u8], &str); 5] = [
        (b"", "file is empty"),
        (b"\x93NUMPY\x01\x00v\x00", "this is a single .npy array"),
        (b"version https://git-lfs.github.com/spec/v1\n", "this is a Git LFS pointer"),
        (b"\x89PNG\r\n\x1a\n", "this is one image"),
        (b"PK\x03\x04 and then nothing", ""),
    ];
    for (i, (bytes, cause)) in cases.iter().enumerate() {
        let path = folder.path().join(format!("{i}.npz"));
        std::fs::write(&path, bytes).unwrap();
        let error = Dataset::open(&path, &images()).err().unwrap();
        assert!(matches!(error, DataError::NotNpz { .. }), "{error}");
        assert!(error.to_string().contains(cause), "{error}");
    }
    let missing = Dataset::open(&folder.path().join("none.npz"), &images()).err().unwrap();
    assert!(matches!(missing, DataError::Read { .. }));
}

#[test]
fn labels_must_have_outputs() {
    let labelled = |labels: &[u8]| {
        let n = labels.len();
        let entries = [
            ("x.npy", npy("|u1", &format!("({n}, 3, 2, 2)"), &vec![0; n * 12])),
            ("labels.npy", npy("|u1", &format!("({n},)"), labels)),
        ];
        open(&entries, &images()).unwrap()
    };
    assert!(labelled(&[0, 9]).check_labels(10).is_ok());
    let error = labelled(&[1, 10]).check_labels(10).unwrap_err().to_string();
    assert!(
        error.ends_with("label 10 but the model has 10 outputs (0..9); the labels seem to start at 1: subtract 1"),
        "{error}"
    );
    let error = labelled(&[0, 10]).check_labels(10).unwrap_err().to_string();
    assert!(error.ends_with("label 10 but the model has 10 outputs (0..9)"), "{error}");
}

/// The path of a valid archive with two images.
fn valid(folder: &Path) -> PathBuf {
    let path = folder.join("d.npz");
    write_npz(&path, &[("x.npy", npy("|u1", "(2, 3, 2, 2)", &[7; 24])), ("labels.npy", npy("|u1", "(2,)", &[0, 1]))]);
    path
}

#[test]
fn cut_and_changed_archives_never_panic() {
    let folder = tempfile::tempdir().unwrap();
    let path = valid(folder.path());
    let whole = std::fs::read(&path).unwrap();
    let bad = folder.path().join("bad.npz");
    for end in 0..whole.len() {
        std::fs::write(&bad, &whole[..end]).unwrap();
        assert!(Dataset::open(&bad, &images()).is_err(), "cut at {end}");
    }
    for at in 0..whole.len() {
        let mut changed = whole.clone();
        changed[at] ^= 0x11;
        std::fs::write(&bad, &changed).unwrap();
        if let Ok(data) = Dataset::open(&bad, &images()) {
            assert!(data.len() <= 2, "changed at {at}");
        }
    }
}

#[test]
fn encrypted_entries_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = valid(folder.path());
    let mut bytes = std::fs::read(&path).unwrap();
    // Bit 0 of the flags, in every local and central header.
    for at in 0..bytes.len() - 10 {
        match &bytes[at..at + 4] {
            b"PK\x03\x04" => bytes[at + 6] |= 1,
            b"PK\x01\x02" => bytes[at + 8] |= 1,
            _ => {}
        }
    }
    std::fs::write(&path, bytes).unwrap();
    let error = Dataset::open(&path, &images()).err().unwrap().to_string();
    assert!(error.ends_with("entry x cannot be read: it is encrypted"), "{error}");
}

#[test]
fn archives_resume_shuffle_and_augment_alike() {
    let n = 50;
    let bytes: Vec<u8> = (0..n * 12).map(|i| (i % 251) as u8).collect();
    let data = open(&[("x.npy", npy("|u1", "(50, 3, 2, 2)", &bytes))], &images()).unwrap();
    let order = BatchOrder { seed: 3, shuffle: true, ..BatchOrder::default() };
    let augment = Some(Augment { shift: 1, flip: true });
    let stream = |start, threads| -> Vec<_> {
        data.batches(BatchOrder { start, ..order }, 7, threads, augment).map(|b| b.unwrap()).collect()
    };
    let whole = stream(Start::Batch(0), 1);
    assert_eq!(whole.len(), 8);
    assert_eq!(whole[7].count, 1);
    let mut seen: Vec<usize> = whole.iter().flat_map(|b| b.samples.clone()).collect();
    seen.sort_unstable();
    assert_eq!(seen, (0..n).collect::<Vec<_>>());
    assert!(whole[3..] == stream(Start::Batch(3), 4));
    let part = data.select(&[49, 0]);
    assert_eq!(all(&part, BatchOrder::default(), 2, 1)[0].samples, vec![49, 0]);
}

#[test]
fn a_stream_that_is_dropped_ends_its_threads() {
    let data = open(&[("x.npy", npy("|u1", "(50, 3, 2, 2)", &[1; 600]))], &images()).unwrap();
    let mut batches = data.batches(BatchOrder::default(), 2, 3, None);
    assert_eq!(batches.next().unwrap().unwrap().count, 2);
    // Would hang here if the threads waited for room in their queues for ever.
    drop(batches);
    assert_eq!(data.len(), 50);
}
