//! Preprocessing recipes from files: Hugging Face's `preprocessor_config.json` and timm's `config.json`.
//!
//! Example: `{"pretrained_cfg": {"input_size": [3, 224, 224], "crop_pct": 0.9, "interpolation": "bicubic", "mean": [..]}}`.
//! A key that a library fills from the processor's class is filled here from a table of the classes whose steps are the common
//! ones; a class with other steps is refused by name. Every refusal names the file, the key and what is allowed.
//!
//! Source: `timm.data.resolve_data_config` 1.0, `transformers` 5 image processors.

use std::path::Path;

use serde_json::{Map, Value};

use super::DataError;
use super::preprocess::{Crop, CropRounding, Preprocess, Rescale, Resize};
use super::resize::{Filter, Method, Passes};

/// The largest size that a file may ask for.
const LARGEST_SIZE: u64 = 16_384;
/// Configuration files are small; anything longer is another kind of file.
const LARGEST_FILE: u64 = 4 << 20;

const IMAGENET_MEAN: [f32; 3] = [0.485, 0.456, 0.406];
const IMAGENET_STD: [f32; 3] = [0.229, 0.224, 0.225];

/// What the model wants: channels, and the size where its input fixes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageSize {
    /// 1 or 3.
    pub channels: usize,
    /// Rows, where fixed.
    pub height: Option<usize>,
    /// Columns, where fixed.
    pub width: Option<usize>,
}

impl Preprocess {
    /// Reads a recipe; `size` is the model's input, which decides where a timm file names another size.
    ///
    /// Errors: [`DataError::Read`], [`DataError::Config`] with file, key and allowed values.
    pub fn from_file(path: &Path, size: ImageSize) -> Result<Preprocess, DataError> {
        let io = |source| DataError::Read { path: path.to_path_buf(), source };
        let length = std::fs::metadata(path).map_err(io)?.len();
        let file = File { path, prefix: "" };
        if length > LARGEST_FILE {
            return Err(file.refuse("(file)", &format!("{length} bytes"), "a JSON file of a few kilobytes"));
        }
        let text = std::fs::read(path).map_err(io)?;
        let json: Value = serde_json::from_slice(&text)
            .map_err(|e| file.refuse("(file)", &format!("not JSON: {e}"), "preprocessor_config.json or a timm config.json"))?;
        let Value::Object(map) = json else {
            return Err(file.refuse("(file)", "not a JSON object", "preprocessor_config.json or a timm config.json"));
        };
        read_map(path, &map, size)
    }

    /// Takes mean and std from the command line instead of the file.
    ///
    /// Errors: [`DataError::Normalisation`] where a list is neither one number nor one per channel, or std is not above 0.
    pub fn with_mean_std(mut self, mean: Option<&[f32]>, std: Option<&[f32]>, channels: usize) -> Result<Preprocess, DataError> {
        for (flag, list) in [("--mean", mean), ("--std", std)] {
            let Some(list) = list else { continue };
            let fits = list.len() == 1 || list.len() == channels;
            if !fits || list.iter().any(|x| !x.is_finite() || (flag == "--std" && *x <= 0.0)) {
                return Err(DataError::Normalisation { flag, found: list.to_vec(), channels });
            }
            *(if flag == "--mean" { &mut self.mean } else { &mut self.std }) = list.to_vec();
        }
        Ok(self)
    }
}

/// Decides which kind of file it is.
fn read_map(path: &Path, map: &Map<String, Value>, size: ImageSize) -> Result<Preprocess, DataError> {
    if let Some(Value::Object(inner)) = map.get("pretrained_cfg") {
        return timm(&File { path, prefix: "pretrained_cfg." }, inner, size);
    }
    if let Some(Value::Object(inner)) = map.get("image_processor") {
        return hugging_face(&File { path, prefix: "image_processor." }, inner, size);
    }
    let has = |key: &str| map.contains_key(key);
    if has("image_processor_type") || has("feature_extractor_type") || has("do_resize") || has("image_mean") {
        return hugging_face(&File { path, prefix: "" }, map, size);
    }
    if has("input_size") || has("crop_pct") || (has("mean") && has("std")) {
        return timm(&File { path, prefix: "" }, map, size);
    }
    let hint = if has("model_type") { "a model's config.json" } else { "none of the expected keys" };
    let allowed = "image_processor_type or do_resize (preprocessor_config.json), pretrained_cfg or input_size (timm config.json)";
    Err(File { path, prefix: "" }.refuse("(file)", hint, allowed))
}

/// The file a message speaks of, and where in it the keys are.
struct File<'a> {
    path: &'a Path,
    prefix: &'static str,
}

impl File<'_> {
    fn refuse(&self, key: &str, found: &str, allowed: &str) -> DataError {
        let key = format!("{}{key}", self.prefix);
        let found = found.chars().take(80).collect();
        DataError::Config { path: self.path.to_path_buf(), key, found, allowed: allowed.to_string() }
    }

    fn refuse_value(&self, key: &str, found: Option<&Value>, allowed: &str) -> DataError {
        self.refuse(key, &found.map_or("nothing".to_string(), Value::to_string), allowed)
    }

    /// A size in pixels.
    fn pixels(&self, key: &str, value: Option<&Value>) -> Result<usize, DataError> {
        let number = value.and_then(whole);
        match number.filter(|n| (1..=LARGEST_SIZE).contains(n)) {
            Some(n) => Ok(n as usize),
            None => Err(self.refuse_value(key, value, "a whole number from 1 to 16384")),
        }
    }

    /// `true` or `false`; null and absent give `default`.
    fn flag(&self, map: &Map<String, Value>, key: &str, default: bool) -> Result<bool, DataError> {
        match present(map, key) {
            None => Ok(default),
            Some(Value::Bool(b)) => Ok(*b),
            other => Err(self.refuse_value(key, other, "true or false")),
        }
    }

    /// A positive number; null and absent give `default`.
    fn positive(&self, map: &Map<String, Value>, key: &str, default: f64) -> Result<f64, DataError> {
        match present(map, key) {
            None => Ok(default),
            Some(v) => v
                .as_f64()
                .filter(|x| x.is_finite() && *x > 0.0)
                .ok_or_else(|| self.refuse_value(key, Some(v), "a number above 0")),
        }
    }

    /// One number per channel or one for all; `above_zero` for a std.
    fn per_channel(&self, key: &str, value: &Value, channels: usize, above_zero: bool) -> Result<Vec<f32>, DataError> {
        let list = match value {
            Value::Array(list) => list.iter().map(Value::as_f64).collect::<Option<Vec<f64>>>(),
            Value::Number(n) => n.as_f64().map(|x| vec![x]),
            _ => None,
        };
        let sound = |x: &f64| (*x as f32).is_finite() && (!above_zero || (*x as f32) > 0.0);
        match list.filter(|l| (l.len() == channels || l.len() == 1) && l.iter().all(sound)) {
            Some(list) => Ok(list.iter().map(|x| *x as f32).collect()),
            None => {
                let numbers = if above_zero { "numbers above 0" } else { "numbers" };
                Err(self.refuse_value(key, Some(value), &format!("{channels} {numbers}, or one for all channels")))
            }
        }
    }
}

/// The value of a key that is there and not null.
fn present<'a>(map: &'a Map<String, Value>, key: &str) -> Option<&'a Value> {
    map.get(key).filter(|v| !v.is_null())
}

/// A whole number, written as one or as a float such as 224.0.
fn whole(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| value.as_f64().filter(|x| x.fract() == 0.0 && (0.0..1e15).contains(x)).map(|x| x as u64))
}

/// timm: defaults are those of `resolve_data_config`; the model's size comes before the file's.
fn timm(file: &File<'_>, map: &Map<String, Value>, size: ImageSize) -> Result<Preprocess, DataError> {
    let channels = size.channels;
    let (height, width) = timm_size(file, map, size)?;
    let crop_pct = file.positive(map, "crop_pct", 0.875)?;
    let filter = match present(map, "interpolation") {
        None => Filter::Bicubic,
        Some(v) => v
            .as_str()
            .and_then(Filter::from_name)
            .ok_or_else(|| file.refuse_value("interpolation", Some(v), "nearest, bilinear, bicubic, lanczos, box or hamming"))?,
    };
    let mean = file.per_channel_or(map, "mean", channels, &IMAGENET_MEAN, false)?;
    let std = file.per_channel_or(map, "std", channels, &IMAGENET_STD, true)?;
    let scaled = |edge: usize| (edge as f64 / crop_pct).floor();
    let (tall, wide) = (scaled(height), scaled(width));
    if tall.max(wide) > LARGEST_SIZE as f64 || tall.min(wide) < 1.0 {
        return Err(file.refuse_value("crop_pct", map.get("crop_pct"), "a fraction such as 0.875 or 1.0"));
    }
    let (tall, wide) = (tall as usize, wide as usize);
    let mut fill = [0; 3];
    let resize = match present(map, "crop_mode").map(|v| (v.as_str().unwrap_or(""), v)) {
        None | Some(("center", _)) if tall == wide => Resize::ShortestEdge { edge: tall },
        None | Some(("center", _)) => Resize::Cover { height: tall, width: wide },
        // torchvision takes a pair of sizes literally.
        Some(("squash", _)) => Resize::Exact { height: tall, width: wide },
        Some(("border", _)) => {
            fill = std::array::from_fn(|c| (mean.get(c).or(mean.first()).map_or(0.0, |m| m * 255.0)).round_ties_even() as u8);
            Resize::Fit { height: tall, width: wide }
        }
        Some((_, v)) => return Err(file.refuse_value("crop_mode", Some(v), "center, squash or border")),
    };
    let crop = Some(Crop { height, width, rounding: CropRounding::HalfEven, fill });
    let method = Method { filter, passes: Passes::Pillow };
    Ok(Preprocess { resize, method, crop, rescale: Rescale::By255, mean, std })
}

impl File<'_> {
    /// [`File::per_channel`], or the default where the key is absent; a grey model then needs its own numbers.
    fn per_channel_or(
        &self,
        map: &Map<String, Value>,
        key: &str,
        channels: usize,
        default: &[f32],
        above_zero: bool,
    ) -> Result<Vec<f32>, DataError> {
        match present(map, key) {
            Some(value) => self.per_channel(key, value, channels, above_zero),
            None if channels == default.len() => Ok(default.to_vec()),
            None => Err(self.refuse(key, "nothing", &format!("{channels} numbers"))),
        }
    }
}

/// The model's size where it is fixed, else `input_size`.
fn timm_size(file: &File<'_>, map: &Map<String, Value>, size: ImageSize) -> Result<(usize, usize), DataError> {
    if let (Some(height), Some(width)) = (size.height, size.width) {
        return Ok((height, width));
    }
    let value = present(map, "input_size");
    let allowed = format!("[{}, height, width]", size.channels);
    let Some(Value::Array(list)) = value else { return Err(file.refuse_value("input_size", value, &allowed)) };
    if list.len() != 3 || whole(&list[0]) != Some(size.channels as u64) {
        return Err(file.refuse_value("input_size", value, &allowed));
    }
    let height = size.height.map_or_else(|| file.pixels("input_size", list.get(1)), Ok)?;
    let width = size.width.map_or_else(|| file.pixels("input_size", list.get(2)), Ok)?;
    Ok((height, width))
}

/// What an image processor's class fills in where its file is silent.
struct Processor {
    /// The class without `ImageProcessor`, `ImageProcessorFast` or `FeatureExtractor`.
    name: &'static str,
    resample: u64,
    /// A plain number as `size` means a square, not the shortest edge.
    square: bool,
    /// `(rows and columns, whether that is the shortest edge)`.
    size: (usize, bool),
    /// The crop where the class cuts the middle out unless told otherwise.
    crop: Option<usize>,
    steps: Steps,
}

/// What differs between classes beyond defaults.
#[derive(Clone, Copy, PartialEq)]
enum Steps {
    Common,
    /// The shortest edge is first enlarged by 256 / 224.
    Levit,
    /// Below 384: shortest edge / crop_pct, then the middle; from 384 on: a plain square.
    ConvNext,
}

const fn processor(name: &'static str, resample: u64, square: bool, size: (usize, bool), crop: Option<usize>) -> Processor {
    Processor { name, resample, square, size, crop, steps: Steps::Common }
}

/// The classes with the common steps, from transformers 5.24.
const PROCESSORS: [Processor; 13] = [
    processor("ViT", 2, true, (224, false), None),
    processor("DeiT", 3, true, (256, false), Some(224)),
    processor("Beit", 3, true, (224, false), None),
    processor("CLIP", 3, false, (224, true), Some(224)),
    processor("ChineseCLIP", 3, false, (224, true), Some(224)),
    processor("Bit", 3, false, (224, true), Some(224)),
    processor("Siglip", 3, false, (224, false), None),
    processor("Pvt", 3, true, (224, false), None),
    processor("Blip", 3, true, (384, false), None),
    processor("DINOv3ViT", 2, true, (224, false), None),
    processor("MobileNetV1", 2, false, (256, true), Some(224)),
    Processor { steps: Steps::Levit, ..processor("Levit", 3, false, (224, true), Some(224)) },
    Processor { steps: Steps::ConvNext, ..processor("ConvNext", 3, false, (384, true), None) },
];

/// Steps that other processors have and this recipe has not.
const UNSUPPORTED_FLAGS: [&str; 8] = [
    "do_pad",
    "do_flip_channel_order",
    "do_thumbnail",
    "do_align_long_axis",
    "do_image_splitting",
    "do_grayscale",
    "rescale_offset",
    "do_color_quantize",
];

/// Finds the class; `None` where the file names none.
fn processor_of(file: &File<'_>, map: &Map<String, Value>) -> Result<Option<&'static Processor>, DataError> {
    let key = if present(map, "image_processor_type").is_some() { "image_processor_type" } else { "feature_extractor_type" };
    let Some(value) = present(map, key) else { return Ok(None) };
    let full = value.as_str().unwrap_or("");
    let name = ["ImageProcessorFast", "ImageProcessorPil", "ImageProcessor", "FeatureExtractor"]
        .iter()
        .find_map(|suffix| full.strip_suffix(suffix))
        .unwrap_or(full);
    match PROCESSORS.iter().find(|p| p.name == name) {
        Some(found) => Ok(Some(found)),
        None => {
            let names: Vec<&str> = PROCESSORS.iter().map(|p| p.name).collect();
            Err(file.refuse_value(key, Some(value), &format!("{} (+ ImageProcessor)", names.join(", "))))
        }
    }
}

/// Hugging Face: the steps of the torchvision back end, which is the default one.
fn hugging_face(file: &File<'_>, map: &Map<String, Value>, size: ImageSize) -> Result<Preprocess, DataError> {
    let class = processor_of(file, map)?;
    for key in UNSUPPORTED_FLAGS {
        if file.flag(map, key, false)? {
            return Err(file.refuse_value(key, map.get(key), "false (this step is not supported)"));
        }
    }
    let filter = match (present(map, "resample"), class) {
        (None, Some(class)) => Filter::from_number(class.resample),
        (value, _) => value.and_then(whole).and_then(Filter::from_number),
    };
    let allowed = "0 (nearest), 1 (lanczos), 2 (bilinear), 3 (bicubic), 4 (box) or 5 (hamming)";
    let filter = filter.ok_or_else(|| file.refuse_value("resample", map.get("resample"), allowed))?;
    let (mut resize, inner_crop) = hf_resize(file, map, class)?;
    if !file.flag(map, "do_resize", true)? {
        resize = Resize::Keep;
    }
    let crop = hf_crop(file, map, class)?.or(inner_crop.filter(|_| resize != Resize::Keep));
    let rescale = match file.flag(map, "do_rescale", true)? {
        true => Rescale::Factor(file.positive(map, "rescale_factor", 1.0 / 255.0)?),
        false => Rescale::Factor(1.0),
    };
    let (mut mean, mut std) = (vec![0.0], vec![1.0]);
    if file.flag(map, "do_normalize", true)? {
        for (key, list) in [("image_mean", &mut mean), ("image_std", &mut std)] {
            let Some(value) = present(map, key) else {
                return Err(file.refuse(key, "nothing", &format!("{} numbers", size.channels)));
            };
            *list = file.per_channel(key, value, size.channels, key == "image_std")?;
        }
    }
    let method = Method { filter, passes: Passes::HorizontalFirst };
    let recipe = Preprocess { resize, method, crop, rescale, mean, std };
    check_output(file, &recipe, size)?;
    Ok(recipe)
}

/// The resize step, and the crop that belongs to it in ConvNext's.
fn hf_resize(file: &File<'_>, map: &Map<String, Value>, class: Option<&Processor>) -> Result<(Resize, Option<Crop>), DataError> {
    let steps = class.map_or(Steps::Common, |c| c.steps);
    let (height, width, shortest) = match (present(map, "size"), class) {
        (None, Some(class)) => (class.size.0, class.size.0, class.size.1),
        (Some(Value::Object(size)), _) => hf_size(file, "size", size)?,
        (Some(value @ Value::Number(_)), class) => {
            let edge = file.pixels("size", Some(value))?;
            (edge, edge, !class.is_none_or(|c| c.square))
        }
        (value, _) if file.flag(map, "do_resize", true)? => {
            return Err(file.refuse_value("size", value, "{\"height\", \"width\"}, {\"shortest_edge\"} or a number"));
        }
        _ => return Ok((Resize::Keep, None)),
    };
    match (steps, shortest) {
        (Steps::ConvNext, _) if height < 384 => {
            let crop_pct = file.positive(map, "crop_pct", 224.0 / 256.0)?;
            let edge = ((height as f64 / crop_pct) as usize).clamp(1, LARGEST_SIZE as usize);
            Ok((Resize::ShortestEdge { edge }, Some(hf_crop_of(height, width))))
        }
        (Steps::ConvNext, _) => Ok((Resize::Exact { height, width }, None)),
        (Steps::Levit, true) => Ok((Resize::ShortestEdge { edge: ((256.0 / 224.0) * height as f64) as usize }, None)),
        (_, true) => Ok((Resize::ShortestEdge { edge: height }, None)),
        (_, false) => Ok((Resize::Exact { height, width }, None)),
    }
}

/// `(height, width, whether it is the shortest edge)` of a size object.
fn hf_size(file: &File<'_>, key: &str, size: &Map<String, Value>) -> Result<(usize, usize, bool), DataError> {
    let has = |k: &str| present(size, k).is_some();
    if has("shortest_edge") && !has("longest_edge") {
        let edge = file.pixels(&format!("{key}.shortest_edge"), size.get("shortest_edge"))?;
        return Ok((edge, edge, true));
    }
    if has("height") && has("width") {
        let height = file.pixels(&format!("{key}.height"), size.get("height"))?;
        return Ok((height, file.pixels(&format!("{key}.width"), size.get("width"))?, false));
    }
    let found = Value::Object(size.clone());
    Err(file.refuse_value(key, Some(&found), "{\"height\", \"width\"} or {\"shortest_edge\"}"))
}

/// The centre crop, where there is one.
fn hf_crop(file: &File<'_>, map: &Map<String, Value>, class: Option<&Processor>) -> Result<Option<Crop>, DataError> {
    let default = class.and_then(|c| c.crop);
    if !file.flag(map, "do_center_crop", default.is_some())? {
        return Ok(None);
    }
    match (present(map, "crop_size"), default) {
        (None, Some(edge)) => Ok(Some(hf_crop_of(edge, edge))),
        (Some(Value::Object(size)), _) => {
            let (height, width, _) = hf_size(file, "crop_size", size)?;
            Ok(Some(hf_crop_of(height, width)))
        }
        (value, _) => file.pixels("crop_size", value).map(|edge| Some(hf_crop_of(edge, edge))),
    }
}

fn hf_crop_of(height: usize, width: usize) -> Crop {
    Crop { height, width, rounding: CropRounding::Down, fill: [0; 3] }
}

/// The file's size must be the model's.
fn check_output(file: &File<'_>, recipe: &Preprocess, size: ImageSize) -> Result<(), DataError> {
    let Some((height, width)) = recipe.output_size() else {
        if recipe.resize == Resize::Keep {
            return Ok(());
        }
        let allowed = "true with crop_size, or a size with height and width: else every image has its own size";
        return Err(file.refuse("do_center_crop", "false", allowed));
    };
    if size.height.is_some_and(|h| h != height) || size.width.is_some_and(|w| w != width) {
        let side = |s: Option<usize>| s.map_or("any".to_string(), |n| n.to_string());
        let key = if recipe.crop.is_some() { "crop_size" } else { "size" };
        let allowed = format!("the model's input, {} x {}", side(size.height), side(size.width));
        return Err(file.refuse(key, &format!("{height} x {width}"), &allowed));
    }
    Ok(())
}
