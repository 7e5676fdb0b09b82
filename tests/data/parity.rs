//! Pixels against Pillow, whole recipes against timm and transformers.

use serde_json::Value;
use sha2::{Digest, Sha256};
use vitrim::data::{ArrayKind, BatchOrder, Dataset, Filter, Method, Options, Passes, Pixels, decode, preprocess, resize};

use crate::{all, fixture, input};

fn cases(kind: &str) -> Vec<Value> {
    let text = std::fs::read(fixture("cases.json")).unwrap();
    let json: Value = serde_json::from_slice(&text).unwrap();
    let list = json[kind].as_array().unwrap().clone();
    assert!(!list.is_empty());
    list
}

fn text(case: &Value, key: &str) -> String {
    case[key].as_str().unwrap().to_string()
}

fn number(case: &Value, key: &str) -> usize {
    case[key].as_u64().unwrap() as usize
}

fn pixels(name: &str, channels: usize) -> Pixels {
    decode(&std::fs::read(fixture("images").join(name)).unwrap(), channels, 1 << 20).unwrap()
}

fn expected(case: &Value) -> Pixels {
    decode(&std::fs::read(fixture("expected").join(text(case, "expected"))).unwrap(), 3, 1 << 20).unwrap()
}

fn sha(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().take(16).map(|b| format!("{b:02x}")).collect()
}

/// The largest difference, and the share of values that differ at all.
fn difference(a: &Pixels, b: &Pixels) -> (u8, f64) {
    assert_eq!((a.height, a.width, a.channels), (b.height, b.width, b.channels));
    let differ = a.bytes.iter().zip(&b.bytes).filter(|(x, y)| x != y).count();
    let most = a.bytes.iter().zip(&b.bytes).map(|(x, y)| x.abs_diff(*y)).max().unwrap();
    (most, differ as f64 / a.bytes.len() as f64)
}

#[test]
fn files_decode_as_pillow_decodes_them() {
    let cases = cases("decode");
    for case in &cases {
        let name = text(case, "image");
        let rgb = pixels(&name, 3);
        assert_eq!((rgb.height, rgb.width), (number(case, "height"), number(case, "width")), "{name}");
        if case.get("expected").is_some() {
            // Says more than a hash where something differs.
            assert_eq!(difference(&rgb, &expected(case)), (0, 0.0), "{name}");
        }
        assert_eq!(sha(&rgb.bytes), text(case, "sha256"), "{name}");
        assert_eq!(sha(&pixels(&name, 1).bytes), text(case, "sha256_grey"), "{name} in grey");
    }
    assert_eq!(cases.len(), 15 + 8);
}

#[test]
fn resize_is_bit_exact() {
    let mut wrong = Vec::new();
    for case in cases("resize") {
        let filter = Filter::from_name(&text(&case, "filter")).unwrap();
        let image = &pixels(&text(&case, "image"), number(&case, "channels"));
        let (height, width) = (number(&case, "height"), number(&case, "width"));
        let resized = resize::resize(image, height, width, 0..height, 0..width, Method { filter, passes: Passes::Pillow });
        if sha(&resized.bytes) != text(&case, "sha256") {
            wrong.push(format!("{} {filter:?} to {height} x {width}, {} channels", text(&case, "image"), image.channels));
        }
    }
    assert_eq!(wrong, Vec::<String>::new());
}

/// Runs one case's recipe from its configuration file.
fn run(case: &Value, image: &str) -> (preprocess::Preprocess, Pixels) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config.json");
    std::fs::write(&file, case["config"].to_string()).unwrap();
    let size = vitrim::data::ImageSize { channels: 3, height: None, width: None };
    let recipe = preprocess::Preprocess::from_file(&file, size).unwrap();
    let done = recipe.apply(&pixels(image, 3));
    (recipe, done)
}

#[test]
fn recipes_stay_within_one_level() {
    for case in cases("pipeline") {
        let (library, name, image) = (text(&case, "library"), text(&case, "name"), text(&case, "image"));
        let (_, done) = run(&case, &image);
        // timm resizes with Pillow, which leaves no room.
        if library == "timm" {
            assert_eq!(sha(&done.bytes), text(&case, "sha256"), "{name} {image}");
            continue;
        }
        // transformers resizes with torchvision, whose fixed-point numbers are shorter.
        let (most, share) = difference(&done, &expected(&case));
        println!("{library} {name} {image}: at most {most} levels, {:.2} % of values differ", share * 100.0);
        assert!(most <= 1, "{library} {name} {image}: {most} levels");
        // Where an image is smaller than the crop, and where Pillow would filter columns first, the two back ends of transformers
        // differ; the default one decides.
        if !matches!(name.as_str(), "clip_padded" | "tall") {
            assert_eq!(sha(&done.bytes), text(&case, "sha256_pillow_backend"), "{name}");
        }
    }
}

#[test]
fn normalised_numbers_agree() {
    for case in cases("pipeline").iter().filter(|c| text(c, "image") == "china.png" && text(c, "library") == "timm") {
        let (recipe, done) = run(case, "china.png");
        let numbers = recipe.normalise(&done);
        let row: Vec<f32> = case["first_row"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect();
        assert_eq!(numbers[..done.width], row, "{}", text(case, "name"));
        let area = done.height * done.width;
        for (plane, sum) in numbers.chunks_exact(area).zip(case["channel_sums"].as_array().unwrap()) {
            let ours: f64 = plane.iter().map(|x| f64::from(*x)).sum();
            assert!((ours - sum.as_f64().unwrap()).abs() < 1e-6 * area as f64, "{}", text(case, "name"));
        }
    }
}

#[test]
fn hugging_face_numbers_agree_where_pixels_do() {
    // One level of 255 is at most 0.02 after division by the smallest std of these cases.
    for case in cases("pipeline").iter().filter(|c| text(c, "image") == "china.png" && text(c, "library") != "timm") {
        let (recipe, done) = run(case, "china.png");
        let numbers = recipe.normalise(&done);
        for (ours, theirs) in numbers.iter().zip(case["first_row"].as_array().unwrap()) {
            let gap = (f64::from(*ours) - theirs.as_f64().unwrap()).abs();
            assert!(gap < 0.0198, "{}: {gap}", text(case, "name"));
        }
    }
}

#[test]
fn a_folder_gives_what_the_recipe_gives() {
    let case = cases("pipeline").into_iter().find(|c| text(c, "name") == "center_bicubic").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let images = folder.path().join("images");
    std::fs::create_dir(&images).unwrap();
    // By content, not by name: the PNG is called a JPEG.
    std::fs::copy(fixture("images/china.png"), images.join("a.JPG")).unwrap();
    let config = folder.path().join("config.json");
    std::fs::write(&config, case["config"].to_string()).unwrap();
    let x = input("x", &[None, Some(3), Some(48), Some(48)], ArrayKind::F32);
    let options = Options { inputs: vec![x], preprocess: Some(config), ..Options::default() };
    let data = Dataset::open(&images, &options).unwrap();
    let batches = all(&data, BatchOrder::default(), 4, 2);
    let (recipe, done) = run(&case, "china.png");
    assert_eq!(batches.len(), 1);
    assert_eq!(batches[0].inputs[0].1.dims, vec![1, 3, 48, 48]);
    assert_eq!(batches[0].inputs[0].1.as_f32(), recipe.normalise(&done));
}
