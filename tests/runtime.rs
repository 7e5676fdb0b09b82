//! The engines on tiny models (tests/fixtures/runtime/make.py), and the ways in which a library can be missing or wrong.
//!
//! Tests that need ONNX Runtime find it as the command does; where there is none they say that they skip.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "these are tests")]

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use vitrim::data::array::{Array, ArrayData};
use vitrim::runtime::{Device, Error, InstallOptions, LibrarySource, Optimize, Probe, Progress, RuntimeName, SessionOptions};
use vitrim::runtime::{Surroundings, find, install, open, open_with_initializers, preflight, search};

fn fixture(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/runtime").join(name);
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn f32s(dims: &[usize], data: &[f32]) -> Array {
    Array { dims: dims.to_vec(), data: ArrayData::F32(data.to_vec()) }
}

/// The engines of this build that can be used here.
fn engines() -> Vec<RuntimeName> {
    let mut engines = Vec::new();
    if RuntimeName::Tract.is_built() {
        engines.push(RuntimeName::Tract);
    }
    if has_ort() {
        engines.push(RuntimeName::Ort);
    }
    engines
}

fn has_ort() -> bool {
    if !RuntimeName::Ort.is_built() {
        println!("skipped for ONNX Runtime: built without it");
        return false;
    }
    match find(&SessionOptions::default().library) {
        Ok(_) => true,
        Err(error) => {
            assert!(std::env::var_os("VITRIM_ORT_LIB").is_none(), "VITRIM_ORT_LIB is set, and: {error}");
            println!("skipped for ONNX Runtime: {error}");
            false
        }
    }
}

fn one_thread() -> SessionOptions {
    SessionOptions { threads: 1, ..SessionOptions::default() }
}

/// Every element type, two rows, the extremes included. F16 and BF16: 1.0, -2.0, +infinity, the smallest subnormal.
fn every_type() -> Vec<(&'static str, ArrayData)> {
    vec![
        ("f32", ArrayData::F32(vec![1.5, -0.0, f32::MAX, f32::MIN_POSITIVE])),
        ("f16", ArrayData::F16(vec![0x3c00, 0xc000, 0x7c00, 0x0001])),
        ("bf16", ArrayData::BF16(vec![0x3f80, 0xc000, 0x7f80, 0x0001])),
        ("f64", ArrayData::F64(vec![1.5, -2.5, f64::MAX, 1e-300])),
        ("i64", ArrayData::I64(vec![i64::MIN, -1, 0, i64::MAX])),
        ("i32", ArrayData::I32(vec![i32::MIN, -1, 0, i32::MAX])),
        ("u8", ArrayData::U8(vec![0, 1, 128, 255])),
        ("i8", ArrayData::I8(vec![-128, -1, 0, 127])),
        ("bool", ArrayData::Bool(vec![0, 1, 1, 0])),
    ]
}

#[test]
fn a_model_runs_for_several_batch_sizes() {
    for engine in engines() {
        for optimize in [Optimize::On, Optimize::Off] {
            let mut session = open(engine, &fixture("affine.onnx"), &SessionOptions { optimize, ..one_thread() }).unwrap();
            for (rows, x, y) in [
                (1, vec![1.0, 0.0, -1.0], vec![-3.5, -4.5]),
                (2, vec![1.0, 0.0, 0.0, 0.0, 1.0, 1.0], vec![1.5, 1.5, 8.5, 9.5]),
                (1, vec![0.0, 0.0, 0.0], vec![0.5, -0.5]),
            ] {
                let outputs = session.run(&[("x".to_string(), f32s(&[rows, 3], &x))]).unwrap();
                let size = Array { dims: vec![], data: ArrayData::I64(vec![rows as i64]) };
                let expected = [("y".to_string(), f32s(&[rows, 2], &y)), ("size".to_string(), size)];
                assert_eq!(outputs, expected, "{engine} {optimize:?}");
            }
            assert_eq!(session.device().device, Device::Cpu);
            assert!(session.version().split('.').count() >= 2, "{}", session.version());
        }
    }
}

#[test]
fn every_element_type_goes_in_and_comes_out() {
    for engine in engines() {
        let name = if engine == RuntimeName::Ort { "types.onnx" } else { "types_tract.onnx" };
        let kinds: Vec<_> = every_type().into_iter().filter(|(kind, _)| engine == RuntimeName::Ort || *kind != "bf16").collect();
        let mut session = open(engine, &fixture(name), &one_thread()).unwrap();
        let feeds: Vec<_> =
            kinds.iter().map(|(kind, data)| (format!("x.{kind}"), Array { dims: vec![2, 2], data: data.clone() })).collect();
        let outputs = session.run(&feeds).unwrap();
        assert_eq!(outputs.len(), kinds.len());
        for ((kind, data), (output, array)) in kinds.iter().zip(&outputs) {
            assert_eq!((output, &array.dims, &array.data), (&format!("y.{kind}"), &vec![2, 2], data), "{engine} {kind}");
        }
    }
}

#[test]
fn every_element_type_is_computed() {
    let expected: BTreeMap<&str, ArrayData> = [
        ("f32", ArrayData::F32(vec![0.0, 1.0, 2.0])),
        ("f16", ArrayData::F16(vec![0, 0x3c00, 0x4000])),
        ("bf16", ArrayData::BF16(vec![0, 0x3f80, 0x4000])),
        ("f64", ArrayData::F64(vec![0.0, 1.0, 2.0])),
        ("i64", ArrayData::I64(vec![0, 1, 2])),
        ("i32", ArrayData::I32(vec![0, 1, 2])),
        ("u8", ArrayData::U8(vec![0, 1, 2])),
        ("i8", ArrayData::I8(vec![0, 1, 2])),
        ("bool", ArrayData::Bool(vec![0, 1, 1])),
    ]
    .into();
    for engine in engines() {
        let name = if engine == RuntimeName::Ort { "casts.onnx" } else { "casts_tract.onnx" };
        let mut session = open(engine, &fixture(name), &one_thread()).unwrap();
        let outputs = session.run(&[("x".to_string(), f32s(&[3], &[0.0, 1.0, 2.0]))]).unwrap();
        assert!(outputs.len() >= 8);
        for (output, array) in outputs {
            assert_eq!(array.data, expected[&output["y.".len()..]], "{engine} {output}");
        }
    }
}

#[test]
fn refused_models_and_feeds_are_errors_of_one_line() {
    for engine in engines() {
        let affine = fixture("affine.onnx");
        for bytes in [fixture("unknown.onnx"), affine[..affine.len() / 2].to_vec(), b"no model".to_vec()] {
            let result = open(engine, &bytes, &one_thread()).map(|_| ());
            let text = result.unwrap_err().to_string();
            assert!(text.starts_with(&format!("{engine} could not load: ")) && !text.contains('\n'), "{text}");
        }
        let mut session = open(engine, &affine, &one_thread()).unwrap();
        let good = f32s(&[1, 3], &[0.0; 3]);
        let cases: Vec<(&str, Vec<(String, Array)>)> = vec![
            ("no such input", vec![("z".into(), good.clone())]),
            ("twice", vec![("x".into(), good.clone()), ("x".into(), good.clone())]),
            ("x", vec![]),
            ("3 elements", vec![("x".into(), f32s(&[2, 3], &[0.0; 3]))]),
            ("could not", vec![("x".into(), f32s(&[1, 4], &[0.0; 4]))]),
            ("could not", vec![("x".into(), Array { dims: vec![1, 3], data: ArrayData::I64(vec![0; 3]) })]),
        ];
        for (part, feeds) in cases {
            let text = session.run(&feeds).unwrap_err().to_string();
            assert!(text.contains(part) && !text.contains('\n'), "{engine}: expected \"{part}\", found {text}");
        }
        assert!(session.run(&[("x".to_string(), good)]).is_ok(), "{engine}: usable after errors");
    }
}

#[test]
fn an_initializer_can_be_handed_over_beside_the_model() {
    let w = || vec![("w".to_string(), f32s(&[3, 2], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))];
    for engine in engines() {
        let result = open_with_initializers(engine, &fixture("outside.onnx"), w(), &one_thread());
        if engine == RuntimeName::Tract {
            assert!(matches!(result.map(|_| ()), Err(Error::Unsupported { .. })));
            continue;
        }
        let outputs = result.unwrap().run(&[("x".to_string(), f32s(&[1, 3], &[1.0, 1.0, 1.0]))]).unwrap();
        assert_eq!(outputs, [("y".to_string(), f32s(&[1, 2], &[9.0, 12.0]))]);
    }
}

#[test]
fn an_engine_that_is_not_built_is_named() {
    for engine in [RuntimeName::Ort, RuntimeName::Tract] {
        if !engine.is_built() {
            let text = open(engine, &fixture("affine.onnx"), &one_thread()).map(|_| ()).unwrap_err().to_string();
            assert_eq!(text, format!("this vitrim was built without {engine} (cargo feature `{}`)", engine.feature()));
        }
    }
    assert_eq!(RuntimeName::Ort.is_built(), cfg!(feature = "ort"));
}

#[test]
fn cuda_that_is_not_there_is_an_error_and_auto_says_why() {
    for engine in engines() {
        let affine = fixture("affine.onnx");
        let auto = open(engine, &affine, &SessionOptions { device: Device::Auto, ..one_thread() }).unwrap();
        let cuda = open(engine, &affine, &SessionOptions { device: Device::Cuda(0), ..one_thread() }).map(|_| ());
        match (auto.device().device, cuda) {
            (Device::Cpu, Err(error)) => {
                assert!(auto.device().why_not_cuda.is_some());
                assert!(
                    matches!(error, Error::NoCuda { .. } | Error::Cuda { .. } | Error::Unsupported { .. } | Error::Load { .. }),
                    "{error}"
                );
            }
            (Device::Cuda(0), Ok(())) => assert_eq!(auto.device().why_not_cuda, None),
            (device, cuda) => panic!("auto gives {device}, cuda gives {cuda:?}"),
        }
    }
}

fn surroundings(variables: &[(&str, &Path)]) -> Surroundings {
    let variables = variables.iter().map(|(name, value)| (name.to_string(), OsString::from(value))).collect();
    Surroundings { variables, binary_folder: None }
}

fn touch(path: PathBuf) -> PathBuf {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, b"library").unwrap();
    path
}

#[cfg(target_os = "linux")]
#[test]
fn the_library_is_searched_in_order() {
    let root = tempfile::tempdir().unwrap();
    let at = |path: &str| root.path().join(path);
    let named = touch(at("named/any.so"));
    let other = touch(at("other/libonnxruntime.so.1.23.2"));
    touch(at("other/libonnxruntime.so.1.9.0"));
    touch(at("other/libonnxruntime_providers_shared.so"));
    let python = touch(at("venv/lib/python3.11/site-packages/onnxruntime/capi/libonnxruntime.so.1.24.4"));
    touch(at("venv/lib/python3.9/site-packages/onnxruntime/capi/libonnxruntime.so.1.17.0"));
    let path = touch(at("path/libonnxruntime.so"));
    let beside = touch(at("bin/libonnxruntime.so"));

    let mut around = surroundings(&[("VIRTUAL_ENV", &at("venv")), ("PYTHONPATH", &at("nothing")), ("PATH", &at("path"))]);
    let found = |file: Option<&Path>, around: &Surroundings| {
        let found = search(file, around).unwrap().0.unwrap();
        (found.source, found.path)
    };
    assert_eq!(found(None, &around), (LibrarySource::Python, python));
    around.binary_folder = Some(at("bin"));
    assert_eq!(found(None, &around), (LibrarySource::BesideBinary, beside));
    around.variables.insert("XDG_CACHE_HOME".into(), at("cache").into());
    let cached = touch(at("cache/vitrim/onnxruntime-1.24.4/libonnxruntime.so.1.24.4"));
    assert_eq!(found(None, &around), (LibrarySource::Cache, cached));
    around.variables.insert("ORT_DYLIB_PATH".into(), path.clone().into());
    assert_eq!(found(None, &around), (LibrarySource::OrtVariable, path));
    around.variables.insert("VITRIM_ORT_LIB".into(), at("other").into());
    assert_eq!(found(None, &around), (LibrarySource::VitrimVariable, other));
    assert_eq!(found(Some(&named), &around), (LibrarySource::Flag, named));
    // Named and not there: an error, and nothing else is taken instead.
    let error = search(Some(&at("gone.so")), &around).unwrap_err();
    assert!(error.to_string().ends_with("gone.so: no ONNX Runtime library there (--ort-lib)"), "{error}");
}

#[cfg(target_os = "linux")]
#[test]
fn python_is_found_behind_links_and_pyenv_shims_without_running_it() {
    let root = tempfile::tempdir().unwrap();
    let base = fs::canonicalize(root.path()).unwrap();
    let at = |path: &str| base.join(path);
    let library = touch(at("usr/lib/python3.11/site-packages/onnxruntime/capi/libonnxruntime.so.1.24.4"));
    touch(at("usr/bin/python3.11"));
    fs::create_dir_all(at("links")).unwrap();
    std::os::unix::fs::symlink(at("usr/bin/python3.11"), at("links/python3")).unwrap();
    let found = search(None, &surroundings(&[("PATH", &at("links"))])).unwrap().0.unwrap();
    assert_eq!(found.path, library);

    // Were the shim run, it would leave a file.
    let shim = touch(at("pyenv/shims/python3"));
    fs::write(&shim, format!("#!/bin/sh\ntouch {}\n", at("ran").display())).unwrap();
    fs::write(at("pyenv/version"), "3.12.1\n").unwrap();
    let library = touch(at("pyenv/versions/3.12.1/lib/python3.12/site-packages/onnxruntime/capi/libonnxruntime.so.1.24.4"));
    let found = search(None, &surroundings(&[("PATH", &at("pyenv/shims"))])).unwrap().0.unwrap();
    assert_eq!(found.path, library);
    assert!(!at("ran").exists());
}

#[test]
fn nothing_relative_is_searched_and_the_message_names_the_places() {
    let relative = surroundings(&[
        ("VIRTUAL_ENV", Path::new("venv")),
        ("PYTHONPATH", Path::new(".")),
        ("PATH", Path::new(".")),
        ("XDG_CACHE_HOME", Path::new("cache")),
    ]);
    let (found, looked) = search(None, &relative).unwrap();
    assert_eq!(found, None);
    let text = Error::LibraryNotFound { looked }.to_string();
    assert!(text.starts_with("ONNX Runtime not found (looked in --ort-lib: none, VITRIM_ORT_LIB: none, "), "{text}");
    assert!(
        text.contains("vitrim's cache: none, beside the binary: none, Python's onnxruntime: none, the system loader"),
        "{text}"
    );
    assert!(text.ends_with("); use --ort-lib or --runtimes tract"), "{text}");
}

#[cfg(feature = "ort")]
mod with_ort {
    use std::time::{Duration, Instant};

    use vitrim::runtime::{BoundSession, StateSpec};

    use super::*;

    fn refusal(path: &Path) -> String {
        let text = preflight(path, &Probe::Thread).unwrap_err().to_string();
        assert!(!text.contains('\n'), "{text}");
        text
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn wrong_files_are_named_as_what_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| {
            let path = folder.path().join(name);
            fs::write(&path, bytes).unwrap();
            path
        };
        let is_not = |path: &Path, why: &str| format!("{} is not ONNX Runtime ({why})", path.display());
        let text = write("libonnxruntime.so.1", b"just some text, longer than a header\n");
        assert_eq!(refusal(&text), is_not(&text, "no shared library"));
        let empty = write("libonnxruntime.so.2", b"");
        assert_eq!(refusal(&empty), is_not(&empty, "an empty file"));
        assert_eq!(refusal(folder.path()), is_not(folder.path(), "a folder"));
        // The header of a shared library of a SPARC machine.
        let mut header = b"\x7fELF\x02\x02\x01".to_vec();
        header.resize(64, 0);
        header[19] = 43;
        let foreign = write("libonnxruntime.so.3", &header);
        let expected = format!("{} is for another machine, this machine is {}", foreign.display(), std::env::consts::ARCH);
        assert_eq!(refusal(&foreign), expected);
        let gone = folder.path().join("gone.so");
        assert!(refusal(&gone).starts_with(&format!("{}: ", gone.display())));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn another_library_is_not_onnx_runtime() {
        // Of the C library, which every Linux program here has loaded already.
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let libc = maps.lines().filter_map(|line| line.split_whitespace().last()).find(|path| path.contains("/libc.so"));
        let libc = PathBuf::from(libc.unwrap());
        assert_eq!(refusal(&libc), format!("{} is not ONNX Runtime (it has no OrtGetApiBase)", libc.display()));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_library_that_is_cut_off_is_refused_before_it_is_loaded() {
        if !has_ort() {
            return;
        }
        let library = fs::read(find(&SessionOptions::default().library).unwrap().path).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("libonnxruntime.so.1");
        for len in [4096, library.len() / 2] {
            fs::write(&path, &library[..len]).unwrap();
            assert_eq!(refusal(&path), format!("{} is not ONNX Runtime (the file is cut off)", path.display()));
        }
    }

    /// Compiles a C file to a shared library; None where there is no compiler.
    #[cfg(target_os = "linux")]
    fn compiled(folder: &Path, name: &str, source: &str) -> Option<PathBuf> {
        let (c, so) = (folder.join(format!("{name}.c")), folder.join(format!("{name}.so")));
        fs::write(&c, source).unwrap();
        let done = std::process::Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&so).arg(&c).status();
        if done.is_ok_and(|status| status.success()) { Some(so) } else { None }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn an_old_library_gives_its_version_and_is_not_used() {
        let folder = tempfile::tempdir().unwrap();
        let source = |version: &str| {
            format!(
                "#include <stdlib.h>\nstatic const void *api(unsigned v) {{ abort(); }}\n\
                 static const char *version(void) {{ return \"{version}\"; }}\n\
                 static const void *base[] = {{ (void *)api, (void *)version }};\n\
                 const void *OrtGetApiBase(void) {{ return base; }}\n"
            )
        };
        let Some(old) = compiled(folder.path(), "old", &source("1.16.3")) else {
            println!("skipped: no C compiler");
            return;
        };
        let expected = format!("{}: ONNX Runtime 1.16.3 is too old, 1.20 or newer is needed", old.display());
        assert_eq!(refusal(&old), expected);
        let odd = compiled(folder.path(), "odd", &source("nightly")).unwrap();
        assert_eq!(refusal(&odd), format!("{} is not ONNX Runtime (its version cannot be read)", odd.display()));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_library_that_needs_another_says_which() {
        let folder = tempfile::tempdir().unwrap();
        let Some(needed) = compiled(folder.path(), "libneeded", "int needed(void) { return 1; }\n") else {
            println!("skipped: no C compiler");
            return;
        };
        let so = folder.path().join("needy.so");
        let c = folder.path().join("needy.c");
        fs::write(&c, "int needed(void);\nint f(void) { return needed(); }\n").unwrap();
        let mut cc = std::process::Command::new("cc");
        cc.args(["-shared", "-fPIC", "-o"]).arg(&so).arg(&c).arg("-L").arg(folder.path()).arg("-lneeded");
        assert!(cc.status().unwrap().success());
        fs::remove_file(needed).unwrap();
        let text = refusal(&so);
        assert!(text.contains("cannot be loaded") && text.contains("libneeded.so"), "{text}");
    }

    #[test]
    fn the_found_library_is_accepted_quickly() {
        if !has_ort() {
            return;
        }
        let path = find(&SessionOptions::default().library).unwrap().path;
        let start = Instant::now();
        let version = preflight(&path, &Probe::Thread).unwrap();
        assert!(version.starts_with("1."), "{version}");
        assert!(start.elapsed() < Duration::from_secs(10));
    }

    fn descent(w: &[f32]) -> Vec<StateSpec> {
        let count = Array { dims: vec![], data: ArrayData::I64(vec![0]) };
        vec![
            StateSpec { input: "param.w".into(), output: Some("next.param.w".into()), initial: f32s(&[4], w) },
            StateSpec { input: "count".into(), output: Some("next.count".into()), initial: count },
        ]
    }

    /// With mean m of the batch: w(k) = m + (1 - lr)^k (w(0) - m).
    #[test]
    fn descent_in_place_follows_the_closed_form() {
        if !has_ort() {
            return;
        }
        let (start, lr, mean) = ([1.0f32, -2.0, 3.0, 0.5], 0.05f32, [0.5f32, 0.5, -1.0, 2.0]);
        let fetch = ["loss".to_string(), "loss.sample".to_string()];
        let mut session = BoundSession::new(&fixture("descent.onnx"), &one_thread(), descent(&start), &fetch).unwrap();
        session.set_feed("lr", &f32s(&[], &[lr])).unwrap();
        for step in 0..100usize {
            // The last batch of an epoch is smaller; its mean is the same.
            let rows = if step % 10 == 9 { 1 } else { 3 };
            let batch: Vec<f32> =
                (0..rows).flat_map(|row| mean.map(|m| m + if rows == 3 { row as f32 - 1.0 } else { 0.0 })).collect();
            session.set_feed("batch", &f32s(&[rows, 4], &batch)).unwrap();
            let fetched = session.step().unwrap();
            assert_eq!(fetched.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>(), fetch);
            assert_eq!(fetched[1].1.dims, [rows]);
            let ArrayData::F32(w) = session.read_state("param.w").unwrap().data else { panic!("type") };
            for index in 0..4 {
                let expected = mean[index] + (1.0 - lr).powi(step as i32 + 1) * (start[index] - mean[index]);
                assert!((w[index] - expected).abs() < 1e-5, "step {step}: expected {expected}, found {}", w[index]);
            }
        }
        assert_eq!(session.read_state("count").unwrap().data, ArrayData::I64(vec![100]));
    }

    #[test]
    fn same_start_same_bytes_and_state_can_be_written() {
        if !has_ort() {
            return;
        }
        let start = [0.3f32, -0.7, 11.0, 1e-3];
        let fetch = ["loss".to_string()];
        let open = || BoundSession::new(&fixture("descent.onnx"), &one_thread(), descent(&start), &fetch).unwrap();
        let run = |session: &mut BoundSession| {
            session.set_feed("lr", &f32s(&[], &[0.1])).unwrap();
            session.set_feed("batch", &f32s(&[2, 4], &[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])).unwrap();
            let losses: Vec<_> = (0..20).map(|_| session.step().unwrap()).collect();
            (losses, session.read_state("param.w").unwrap())
        };
        let (mut first, mut second) = (open(), open());
        let result = run(&mut first);
        assert_eq!(result, run(&mut second));
        first.write_state("param.w", &f32s(&[4], &start)).unwrap();
        assert_eq!(first.read_state("param.w").unwrap(), f32s(&[4], &start));
        assert_eq!(result, run(&mut first));
    }

    #[test]
    fn wrong_names_and_forms_of_state_are_errors() {
        if !has_ort() {
            return;
        }
        let open = |state: Vec<StateSpec>, fetch: &[&str]| {
            let fetch: Vec<String> = fetch.iter().map(|name| name.to_string()).collect();
            BoundSession::new(&fixture("descent.onnx"), &one_thread(), state, &fetch)
        };
        let message = |result: Result<BoundSession, Error>| result.map(|_| ()).unwrap_err().to_string();
        let good = || descent(&[0.0; 4]);
        let mut unknown = good();
        unknown[0].input = "param.v".into();
        assert_eq!(message(open(unknown, &[])), "\"param.v\": the graph has no such input");
        assert_eq!(message(open(good(), &["lost"])), "\"lost\": the graph has no such output");
        assert_eq!(message(open(good(), &["next.count"])), "\"next.count\": given twice");
        let mut session = open(good(), &["loss"]).unwrap();
        let text = session.set_feed("param.w", &f32s(&[4], &[0.0; 4])).unwrap_err().to_string();
        assert_eq!(text, "\"param.w\": is state, not a feed");
        let text = session.write_state("param.w", &f32s(&[5], &[0.0; 5])).unwrap_err().to_string();
        assert!(text.starts_with("\"param.w\": expected ") && text.ends_with("[5]"), "{text}");
        assert_eq!(session.read_state("lr").unwrap_err().to_string(), "\"lr\": is not state");
        assert!(matches!(session.step(), Err(Error::Run { .. })), "no batch yet");
    }
}

#[test]
#[ignore = "downloads 17 MB, and 256 MB with VITRIM_TEST_CUDA=1"]
fn the_pinned_package_is_installed_and_found() {
    let cache = tempfile::tempdir().unwrap();
    let mut around = Surroundings::of_process();
    around.variables.remove("VITRIM_ORT_LIB");
    around.variables.remove("ORT_DYLIB_PATH");
    around.variables.insert("XDG_CACHE_HOME".into(), cache.path().into());
    let options = InstallOptions { cuda: std::env::var_os("VITRIM_TEST_CUDA").is_some(), offline: false };
    let mut steps = Vec::new();
    let folder = install(&options, &around, &mut |step| steps.push(step)).unwrap();
    assert!(steps.len() > 3 && steps.last() == Some(&Progress::Done { folder: folder.clone() }), "{steps:?}");
    assert_eq!(fs::read_dir(cache.path().join("vitrim")).unwrap().count(), 1, "nothing else is left");
    let found = search(None, &around).unwrap().0.unwrap();
    assert_eq!((found.source, found.path.parent()), (LibrarySource::Cache, Some(folder.as_path())));
    if RuntimeName::Ort.is_built() {
        let version = preflight(&found.path, &Probe::Thread).unwrap();
        assert!(folder.ends_with(format!("onnxruntime-{version}")) || folder.ends_with(format!("onnxruntime-gpu-{version}")));
    }
    let mut again = Vec::new();
    install(&InstallOptions { offline: true, ..options }, &around, &mut |step| again.push(step)).unwrap();
    assert_eq!(again, [Progress::Present { folder }]);
}
