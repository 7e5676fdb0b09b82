//! Files: what is no model, external data, outputs.

use crate::*;

// ---- bad files

fn read_file(content: &[u8]) -> onnx::Error {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.onnx");
    std::fs::write(&path, content).unwrap();
    onnx::read(&path).expect_err("bad content")
}

#[test]
fn files_that_are_no_models_are_named() {
    let safetensors = [&[2u8, 0, 0, 0, 0, 0, 0, 0][..], b"{}"].concat();
    let cases: &[(u32, &[u8], &str)] = &[
        (4, b"", "file is empty"),
        (5, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer"),
        (6, b"<!DOCTYPE html><html>", "starts like HTML, not ONNX: was the download an error page?"),
        (6, b"\n  {\"error\": \"not found\"}", "starts like JSON, not ONNX"),
        (7, b"PK\x03\x04........archive/data.pkl", "this is a PyTorch .pt file (zip archive), not ONNX"),
        (7, b"PK\x03\x04................", "this is a zip archive"),
        (7, &safetensors, "this is a safetensors file"),
        (7, b"\x1c\0\0\0TFL3\0\0", "this is a TFLite model"),
        (7, b"\x1c\0\0\0ORTM\0\0", "this is an ONNX Runtime .ort flatbuffer"),
        (7, b"\x1f\x8b\x08\0", "this is a gzip file"),
        (8, b"\xff\xfe\xfd\xfc", "not a valid ONNX protobuf: "),
    ];
    for (row, content, says) in cases {
        let message = read_file(content).to_string();
        assert!(message.contains(says), "row {row}: {message}");
        assert!(message.contains("m.onnx: "), "row {row}: {message}");
    }
    let mut bytes = tiny().encode_to_vec();
    let end = bytes.len();
    bytes.extend([0xca, 0x03, 1, 65]);
    let says = format!("not a valid ONNX protobuf: unexpected field or wire type at byte {end}: ModelProto field 57 is unknown");
    assert!(read_file(&bytes).to_string().ends_with(&says));
    let nodes = GraphProto { node: vec![NodeProto::default(); 200_001], ..Default::default() };
    let many = ModelProto { graph: Some(nodes), ..Default::default() };
    assert!(read_file(&many.encode_to_vec()).to_string().ends_with(": more than 200000 nodes"));
}

#[test]
fn places_that_are_no_files_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let says = |path: &Path| onnx::read(path).unwrap_err().cause().to_string();
    assert_eq!(says(&at("none.onnx")), "no such file");
    assert_eq!(says(folder.path()), "is a directory, expected an .onnx file");
    std::fs::write(at("one.onnx"), tiny().encode_to_vec()).unwrap();
    assert!(says(folder.path()).ends_with("/one.onnx?"), "{}", says(folder.path()));
    assert_eq!(says(&at("one.onnx/inside")), "no such file");
    let big = std::fs::File::create(at("big.onnx")).unwrap();
    big.set_len((2 << 30) + 1).unwrap();
    assert_eq!(says(&at("big.onnx")), "larger than 2 GiB: store weights as external data");
}

#[cfg(unix)]
#[test]
fn special_files_are_refused_without_blocking() {
    let folder = tempfile::tempdir().unwrap();
    let fifo = folder.path().join("fifo.onnx");
    make_fifo(&fifo);
    assert_eq!(onnx::read(&fifo).unwrap_err().cause().to_string(), "not a regular file");
    assert_eq!(onnx::read(Path::new("/dev/zero")).unwrap_err().cause().to_string(), "not a regular file");
    let socket = folder.path().join("socket.onnx");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    assert_eq!(onnx::read(&socket).unwrap_err().cause().to_string(), "not a regular file");
    let secret = folder.path().join("secret.onnx");
    std::fs::write(&secret, "x").unwrap();
    std::fs::set_permissions(&secret, std::os::unix::fs::PermissionsExt::from_mode(0o0)).unwrap();
    if std::fs::read(&secret).is_err() {
        assert_eq!(onnx::read(&secret).unwrap_err().cause().to_string(), "permission denied");
    } else {
        println!("this user may read everything: permissions are not tested");
    }
}

#[cfg(unix)]
fn make_fifo(path: &Path) {
    let status = std::process::Command::new("mkfifo").arg(path).status().expect("mkfifo is there");
    assert!(status.success());
}

#[test]
fn a_large_sparse_weight_is_mapped_not_copied() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.onnx");
    let data = std::fs::File::create(folder.path().join("w.bin")).unwrap();
    data.set_len(8 << 30).unwrap();
    let mut m = tiny();
    set_data(&mut m, 1, &[4, 4], |t| externalize(t, &[("location", "w.bin"), ("offset", "8589934528"), ("length", "64")]));
    std::fs::write(&path, m.encode_to_vec()).unwrap();
    let graph = read(&path).graph;
    let w = graph.value(graph.find("W").unwrap()).initializer().unwrap();
    assert_eq!((w.bytes.len(), w.storage), (64, Storage::External));
}

// ---- external data

/// Reads the tiny model with W located by `entries`, in a folder that holds `w.bin` of 64 bytes.
fn read_external(entries: &[(&str, &str)], prepare: impl FnOnce(&Path)) -> Result<Loaded, onnx::Error> {
    let outer = tempfile::tempdir().unwrap();
    let folder = outer.path().join("model");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(outer.path().join("outside.bin"), [0; 64]).unwrap();
    std::fs::write(folder.join("w.bin"), [0; 64]).unwrap();
    prepare(&folder);
    let mut m = tiny();
    externalize(w(&mut m), entries);
    let path = folder.join("m.onnx");
    std::fs::write(&path, m.encode_to_vec()).unwrap();
    onnx::read(&path)
}

#[test]
fn bad_external_data_is_refused() {
    type Entries = &'static [(&'static str, &'static str)];
    let cases: &[(u32, Entries, &str)] = &[
        (52, &[("location", "nope.bin")], "external data nope.bin of initializer W not found beside the model"),
        (53, &[("location", "../outside.bin")], "external data location '../outside.bin' leaves the model's directory"),
        (53, &[("location", "../no/such/file")], "leaves the model's directory"),
        (53, &[("location", "a/../../outside.bin")], "leaves the model's directory"),
        (53, &[("location", "/etc/passwd")], "leaves the model's directory"),
        (53, &[("location", "C:\\w.bin")], "leaves the model's directory"),
        (53, &[("location", "\\\\host\\share\\w.bin")], "leaves the model's directory"),
        (53, &[("location", "w.bin\0")], "leaves the model's directory"),
        (57, &[("location", "w.bin"), ("offset", "60")], "offset 60 + 64 bytes is past the end (64)"),
        (57, &[("location", "w.bin"), ("offset", "-1")], "external data offset '-1' is not a number"),
        (57, &[("location", "w.bin"), ("length", "x")], "external data length 'x' is not a number"),
        (57, &[("location", "w.bin"), ("offset", "18446744073709551615")], "is past the end (64)"),
        (57, &[("location", "w.bin"), ("length", "32")], "initializer W: 32 bytes, shape [4,4] float32 needs 64"),
        (58, &[("location", ".")], "is not a regular file"),
        (58, &[("location", "")], "is not a regular file"),
        (59, &[("location", "*/_ORT_MEM_ADDR_/*")], "leaves the model's directory"),
        (60, &[("location", "w.bin"), ("location", "w.bin")], "external data has two entries 'location'"),
        (60, &[("offset", "0")], "initializer W: external data has no location"),
    ];
    for (row, entries, says) in cases {
        let message = read_external(entries, |_| {}).expect_err(says).to_string();
        assert!(message.contains(says), "row {row}: {message}");
    }
}

#[test]
fn good_external_data_is_read() {
    let odd = read_external(&[("location", "./w.bin"), ("length", "64"), ("prefetch", "1"), ("checksum", "ab")], |_| {}).unwrap();
    assert_eq!(odd.warnings, ["initializer W: unknown external data key 'prefetch' is ignored"]);
    assert_eq!(odd.files.len(), 2);
    let inside = |folder: &Path| {
        std::fs::create_dir(folder.join("sub")).unwrap();
        std::fs::copy(folder.join("w.bin"), folder.join("sub/v.bin")).unwrap();
    };
    assert!(read_external(&[("location", "sub/v.bin")], inside).is_ok());
    assert!(read_external(&[("location", "sub/../w.bin")], inside).is_ok());
    assert!(read_external(&[("location", "h.bin")], |f| std::fs::hard_link(f.join("w.bin"), f.join("h.bin")).unwrap()).is_ok());
}

#[cfg(unix)]
#[test]
fn links_are_followed_inside_only() {
    use std::os::unix::fs::symlink;
    let refused = |name: &str, prepare: &dyn Fn(&Path)| {
        read_external(&[("location", name)], prepare).expect_err("leaves").cause().to_string()
    };
    let leaves = "leaves the model's directory";
    assert!(refused("l.bin", &|f| symlink("../outside.bin", f.join("l.bin")).unwrap()).contains(leaves));
    assert!(refused("up/outside.bin", &|f| symlink("..", f.join("up")).unwrap()).contains(leaves));
    assert!(refused("fifo", &|f| make_fifo(&f.join("fifo"))).contains("is not a regular file"));
    assert!(refused("dev", &|f| symlink("/dev/zero", f.join("dev")).unwrap()).contains(leaves));
    assert!(read_external(&[("location", "l.bin")], |f| symlink("w.bin", f.join("l.bin")).unwrap()).is_ok());

    // The cache of a model hub: model and data are links into one folder.
    let cache = tempfile::tempdir().unwrap();
    let (blobs, snapshot) = (cache.path().join("blobs"), cache.path().join("snapshots/1"));
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::create_dir_all(&snapshot).unwrap();
    let mut m = tiny();
    externalize(w(&mut m), &[("location", "m.onnx_data")]);
    std::fs::write(blobs.join("aa"), m.encode_to_vec()).unwrap();
    std::fs::write(blobs.join("bb"), [0; 64]).unwrap();
    symlink("../../blobs/aa", snapshot.join("m.onnx")).unwrap();
    symlink("../../blobs/bb", snapshot.join("m.onnx_data")).unwrap();
    assert!(onnx::read(&snapshot.join("m.onnx")).is_ok());
}

#[test]
fn tensors_of_bodies_are_taken_into_the_model() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("w.bin"), [7; 64]).unwrap();
    let mut m = tiny();
    let mut inner = weight();
    externalize(&mut inner, &[("location", "w.bin")]);
    let body = GraphProto { initializer: vec![inner], output: vec![info("W")], ..Default::default() };
    attribute(&mut m, |a| a.g = Some(Box::new(body)));
    let path = folder.path().join("m.onnx");
    std::fs::write(&path, m.encode_to_vec()).unwrap();
    let graph = read(&path).graph;
    let out = to_model(&graph).graph.unwrap();
    let inner = &out.node[0].attribute[0].g.as_ref().unwrap().initializer[0];
    assert_eq!((inner.raw_data.as_deref(), inner.data_location), (Some(&[7u8; 64][..]), None));
    let vitrim::graph::AttrValue::Graph(sub) = graph.nodes().next().unwrap().1.attr("k").unwrap().clone() else { panic!() };
    assert_eq!(sub.param_count, 16);
}

// ---- outputs

fn cause(result: Result<(), onnx::Error>) -> String {
    result.expect_err("refused").cause().to_string()
}

#[test]
fn outputs_are_checked_before_any_work() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let input = at("in.onnx");
    std::fs::write(&input, "old").unwrap();
    std::fs::hard_link(&input, at("hard.onnx")).unwrap();
    std::fs::create_dir(at("dir")).unwrap();
    let check = |out: PathBuf, overwrite| onnx::check_output(&out, std::slice::from_ref(&input), overwrite);
    for same in [input.clone(), at("./in.onnx"), at("dir/../in.onnx"), at("hard.onnx")] {
        assert_eq!(cause(check(same, Overwrite::Force)), "output would overwrite the input");
    }
    let data = onnx::check_output(&at("new.onnx"), &[input.clone(), at("new.onnx.data")], Overwrite::Force);
    assert_eq!(cause(data), "output would overwrite the input");
    std::fs::write(at("old.onnx"), "old").unwrap();
    assert_eq!(cause(check(at("old.onnx"), Overwrite::Refuse)), "exists: use --force");
    assert!(check(at("old.onnx"), Overwrite::Force).is_ok());
    assert!(check(at("new.onnx"), Overwrite::Refuse).is_ok());
    assert!(!at("new.onnx").exists() && std::fs::read(at("old.onnx")).unwrap() == b"old", "checking touches nothing");
    assert!(cause(check(at("none/x.onnx"), Overwrite::Refuse)).contains("none does not exist"));
    assert!(cause(check(at("in.onnx/x.onnx"), Overwrite::Refuse)).contains("is not a directory"));
    assert!(cause(check(at("dir"), Overwrite::Force)).starts_with("is a directory"));
}

#[cfg(unix)]
#[test]
fn links_as_outputs_are_replaced_not_written_through() {
    use std::os::unix::fs::{MetadataExt, symlink};
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("target"), "old").unwrap();
    symlink("target", at("link.onnx")).unwrap();
    symlink("gone", at("dangling.onnx")).unwrap();
    let g = from_model(&tiny()).unwrap().graph;
    let input = [at("target")];
    assert_eq!(cause(onnx::check_output(&at("link.onnx"), &input, Overwrite::Force)), "output would overwrite the input");
    assert_eq!(cause(onnx::save(&g, &at("link.onnx"), Overwrite::Refuse)), "exists: use --force");
    assert_eq!(cause(onnx::save(&g, &at("dangling.onnx"), Overwrite::Refuse)), "exists: use --force");
    onnx::save(&g, &at("link.onnx"), Overwrite::Force).unwrap();
    assert!(std::fs::symlink_metadata(at("link.onnx")).unwrap().is_file());
    assert_eq!(std::fs::read(at("target")).unwrap(), b"old");
    assert_eq!(std::fs::metadata(at("link.onnx")).unwrap().mode() & 0o600, 0o600);
    make_fifo(&at("fifo.onnx"));
    assert_eq!(cause(onnx::save(&g, &at("fifo.onnx"), Overwrite::Force)), "output is not a regular file");
    assert_eq!(cause(onnx::save(&g, Path::new("/dev/null"), Overwrite::Force)), "output is not a regular file");
}

#[test]
fn saving_replaces_old_files_whole() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("m.onnx");
    let loaded = read(&fixture("external.onnx"));
    onnx::save(&loaded.graph, &out, Overwrite::Refuse).unwrap();
    let refused = onnx::save(&loaded.graph, &out, Overwrite::Refuse).unwrap_err();
    assert_eq!(refused.code(), "V0170");
    onnx::save(&loaded.graph, &out, Overwrite::Force).unwrap();
    assert_eq!(onnx::to_bytes(&read(&out).graph).unwrap(), onnx::to_bytes(&loaded.graph).unwrap());
    std::fs::remove_file(&out).unwrap();
    let data = onnx::save(&loaded.graph, &out, Overwrite::Refuse).unwrap_err();
    assert!(data.file().unwrap().ends_with("m.onnx.data") && data.code() == "V0170", "{data}");
    assert!(!out.exists());
}

#[test]
fn hashes_are_sha256() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("abc");
    std::fs::write(&path, "abc").unwrap();
    let hash = onnx::sha256_of_file(&path).unwrap();
    assert_eq!(hash, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    assert_eq!(onnx::sha256_of_file(folder.path()).unwrap_err().code(), "V0102");
}
