//! Malformed preprocessing files: the message names file, key and what is allowed.

use vitrim::data::{ImageSize, Preprocess};

const SIZE: ImageSize = ImageSize { channels: 3, height: Some(224), width: Some(224) };

fn message(text: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("preprocessor_config.json");
    std::fs::write(&file, text).unwrap();
    let error = Preprocess::from_file(&file, SIZE).unwrap_err().to_string();
    assert!(error.starts_with(&file.display().to_string()), "{error}");
    error.split_once(": ").unwrap().1.to_string()
}

#[test]
fn malformed_files_name_key_and_allowed_values() {
    let vit = |rest: &str| format!(r#"{{"image_processor_type": "ViTImageProcessor", "image_mean": [0.5, 0.5, 0.5] {rest}}}"#);
    let std = r#", "image_std": [0.5, 0.5, 0.5]"#;
    let cases = [
        (vit(&format!("{std}, \"resample\": 9")), "resample is 9, allowed: 0 (nearest)"),
        (vit(r#", "image_std": [0.5, 0, 0.5]"#), "image_std is [0.5,0,0.5], allowed: 3 numbers above 0"),
        (vit(""), "image_std is nothing, allowed: 3 numbers"),
        (vit(&format!("{std}, \"size\": 0")), "size is 0, allowed: a whole number from 1 to 16384"),
        (vit(&format!("{std}, \"size\": {{\"height\": 1e99, \"width\": 1}}")), "size.height is 1e+99, allowed"),
        (vit(&format!("{std}, \"size\": 384")), "size is 384 x 384, allowed: the model's input, 224 x 224"),
        (vit(&format!("{std}, \"size\": {{\"shortest_edge\": 224}}")), "do_center_crop is false, allowed: true with crop_size"),
        (vit(&format!("{std}, \"do_resize\": 1")), "do_resize is 1, allowed: true or false"),
        (vit(&format!("{std}, \"do_pad\": true")), "do_pad is true, allowed: false"),
        (vit(&format!("{std}, \"rescale_factor\": -1")), "rescale_factor is -1, allowed: a number above 0"),
        (
            r#"{"image_processor_type": "MobileViTImageProcessor"}"#.into(),
            "image_processor_type is \"MobileViTImageProcessor\", allowed: ViT, DeiT",
        ),
        (r#"{"do_resize": true, "size": 224, "image_mean": 0.5, "image_std": 0.5}"#.into(), "resample is nothing, allowed"),
        (
            r#"{"pretrained_cfg": {"interpolation": "random"}}"#.into(),
            "pretrained_cfg.interpolation is \"random\", allowed: nearest",
        ),
        (r#"{"pretrained_cfg": {"crop_pct": 0}}"#.into(), "pretrained_cfg.crop_pct is 0, allowed: a number above 0"),
        (r#"{"pretrained_cfg": {"crop_pct": 1e9}}"#.into(), "pretrained_cfg.crop_pct is 1000000000.0, allowed"),
        (
            r#"{"pretrained_cfg": {"crop_mode": "top"}}"#.into(),
            "pretrained_cfg.crop_mode is \"top\", allowed: center, squash or border",
        ),
        (r#"{"pretrained_cfg": {"std": [1, 1]}}"#.into(), "pretrained_cfg.std is [1,1], allowed: 3 numbers above 0"),
        (r#"{"model_type": "vit"}"#.into(), "(file) is a model's config.json, allowed: image_processor_type"),
        ("{".into(), "(file) is not JSON: EOF"),
        ("[]".into(), "(file) is not a JSON object, allowed"),
        (format!("{}1", "[".repeat(100_000)), "(file) is not JSON: recursion limit"),
    ];
    for (text, start) in cases {
        let found = message(&text);
        assert!(found.starts_with(start), "{found}\nexpected: {start}");
        assert!(found.len() < 300, "{found}");
    }
}

#[test]
fn missing_files_are_named() {
    let error = Preprocess::from_file("nowhere/config.json".as_ref(), SIZE).unwrap_err().to_string();
    assert!(error.starts_with("nowhere/config.json: "), "{error}");
}

#[test]
fn the_models_size_comes_before_the_size_in_a_timm_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config.json");
    std::fs::write(&file, r#"{"pretrained_cfg": {"input_size": [3, 384, 384], "crop_pct": 1.0}}"#).unwrap();
    assert_eq!(Preprocess::from_file(&file, SIZE).unwrap().output_size(), Some((224, 224)));
    let open = ImageSize { height: None, width: None, ..SIZE };
    assert_eq!(Preprocess::from_file(&file, open).unwrap().output_size(), Some((384, 384)));
}
