"""Records what Pillow, timm and transformers make of images, for tests/data.rs to compare with.

Development only; nothing of vitrim needs Python. Pinned: Pillow 13.0.0, timm 1.0.31, transformers 5.24.0, torchvision 0.25.0,
and scikit-learn 1.9.1 for its two photographs (china.jpg, flower.jpg; CC BY 2.0, see tests/fixtures/data/README.md).

    python benches/python/preprocess_reference.py FOLDER_WITH_THE_TWO_PHOTOS

writes tests/fixtures/data: images/ (inputs), expected/ (uint8 results as PNG), cases.json (what was done, and hashes).
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import PIL
import timm
import torch
import transformers
from PIL import Image
from timm.data import create_transform, resolve_data_config

PINNED = {"Pillow": (PIL.__version__, "13.0.0"), "timm": (timm.__version__, "1.0.31"),
          "transformers": (transformers.__version__, "5.24.0")}
OUT = Path(__file__).resolve().parents[2] / "tests" / "fixtures" / "data"
FILTERS = ["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]


def sha(array):
    """The first half of a hash; these guard against change, not against forgery."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:32]


def make_images(photos):
    """Small photographs in the encodings that data sets have, and one small image per unusual PNG mode."""
    folder = OUT / "images"
    folder.mkdir(parents=True, exist_ok=True)
    china = Image.open(photos / "china.jpg").convert("RGB").resize((150, 100), Image.Resampling.LANCZOS)
    flower = Image.open(photos / "flower.jpg").convert("RGB").resize((142, 213), Image.Resampling.LANCZOS, box=(160, 0, 445, 427))
    china.save(folder / "china.png", optimize=True)
    flower.info.clear()
    flower.save(folder / "flower_420.jpg", quality=90, subsampling=2)
    china.info.clear()
    china.save(folder / "china_444.jpg", quality=95, subsampling=0)
    china.resize((75, 51)).save(folder / "china_422_progressive.jpg", quality=85, subsampling=1, progressive=True)
    small = china.crop((40, 20, 64, 38))
    # Only china.png keeps its colour profile, which decoders must ignore.
    small.info.clear()
    small.convert("L").save(folder / "grey.jpg", quality=90)
    small.convert("CMYK").save(folder / "cmyk.jpg", quality=90)
    odd = flower.crop((20, 60, 57, 99))
    for name, options in {"odd_420": {"subsampling": 2}, "odd_422": {"subsampling": 1}, "odd_rgb": {"keep_rgb": True},
                          "odd_420_progressive": {"subsampling": 2, "progressive": True},
                          "odd_restarts": {"subsampling": 2, "restart_marker_blocks": 2},
                          "odd_coarse": {"subsampling": 2, "quality": 5}}.items():
        odd.save(folder / f"{name}.jpg", **{"quality": 92, **options})
    # Pillow writes no other sampling. The same number of units under another header is another picture, but a valid one.
    reframe(folder / "odd_422.jpg", folder / "odd_440.jpg", 0x12, odd.height, odd.width)
    reframe(folder / "odd_420.jpg", folder / "odd_411.jpg", 0x41, 90, 23)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    small.save(folder / "exif_rotated.jpg", quality=90, subsampling=0, exif=rotated)
    small.convert("L").save(folder / "grey.png")
    small.convert("1").save(folder / "bilevel.png")
    small.quantize(13).save(folder / "palette.png")
    small.quantize(13).save(folder / "palette_transparent.png", transparency=bytes(range(0, 130, 10)))
    alpha = Image.fromarray(np.arange(24 * 18, dtype=np.uint16).reshape(18, 24).astype(np.uint8))
    with_alpha = small.copy()
    with_alpha.putalpha(alpha)
    with_alpha.save(folder / "rgba.png")
    with_alpha.convert("LA").save(folder / "grey_alpha.png")
    Image.fromarray((np.arange(24 * 18, dtype=np.uint16) * 3).reshape(18, 24)).save(folder / "grey16.png")
    save_rgb16(folder / "rgb16.png", np.asarray(small).astype(np.uint16) * 257 + 100)


def reframe(source, target, sampling, width, height):
    """Changes size and luma sampling in the frame header."""
    data = bytearray(source.read_bytes())
    frame = data.index(b"\xff\xc0")
    data[frame + 5:frame + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    data[frame + 11] = sampling
    target.write_bytes(data)


def save_rgb16(path, array):
    """Pillow cannot write 16-bit colour, so the chunks are written out."""
    import struct
    import zlib

    height, width, _ = array.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b""))


def load(name):
    """As timm's and Hugging Face's loaders do: no EXIF rotation."""
    return Image.open(OUT / "images" / name).convert("RGB")


def decode_cases():
    for path in sorted((OUT / "images").iterdir()):
        image = load(path.name)
        case = {"image": path.name, "height": image.height, "width": image.width, "sha256": sha(image)}
        case["sha256_grey"] = sha(Image.open(path).convert("L"))
        if path.suffix == ".jpg" and image.width < 30:
            case["expected"] = save_expected(f"decode_{path.stem}", np.asarray(image))
        yield case


def resize_cases():
    """Every filter, up and down, one axis only, extreme factors, and both sides of where Pillow changes the order of its passes."""
    landscape = [(48, 72), (224, 336), (99, 150), (100, 149), (100, 31), (7, 150), (1, 1), (3, 500), (133, 97), (51, 80),
                 (50, 125), (50, 126), (98, 149), (101, 500)]
    portrait = [(224, 224), (100, 120), (106, 71), (64, 64), (113, 92), (113, 93)]
    for name in FILTERS:
        for source, sizes in (("china.png", landscape), ("flower_420.jpg", portrait)):
            for mode in ("RGB", "L"):
                image = Image.open(OUT / "images" / source).convert(mode)
                for height, width in sizes:
                    resized = image.resize((width, height), getattr(Image.Resampling, name.upper()))
                    yield {"image": source, "filter": name, "height": height, "width": width, "channels": len(mode),
                           "sha256": sha(resized)}


def save_expected(name, array):
    (OUT / "expected").mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(OUT / "expected" / f"{name}.png", optimize=True)
    return f"{name}.png"


TIMM = {
    "center_bicubic": {"input_size": [3, 48, 48], "crop_pct": 0.9, "interpolation": "bicubic", "crop_mode": "center",
                       "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
    "defaults": {"input_size": [3, 45, 45]},
    "not_square": {"input_size": [3, 40, 56], "crop_pct": 0.95, "interpolation": "bilinear"},
    "squash": {"input_size": [3, 48, 48], "crop_pct": 1.0, "interpolation": "bicubic", "crop_mode": "squash"},
    "border": {"input_size": [3, 48, 45], "crop_pct": 0.95, "interpolation": "lanczos", "crop_mode": "border",
               "mean": [0.5, 0.25, 0.7], "std": [0.5, 0.5, 0.5]},
    "larger_than_image": {"input_size": [3, 64, 64], "crop_pct": 1.3, "interpolation": "nearest"},
}

NORMAL = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3]}
HUGGING_FACE = {
    "vit": {"image_processor_type": "ViTImageProcessor", "size": {"height": 48, "width": 48}, "resample": 2, **NORMAL},
    "vit_old": {"feature_extractor_type": "ViTFeatureExtractor", "size": 44, "do_resize": True, "do_normalize": True, **NORMAL},
    "deit": {"image_processor_type": "DeiTImageProcessor", "size": {"height": 55, "width": 55},
             "crop_size": {"height": 48, "width": 48}, "do_center_crop": True, "resample": 3, **NORMAL},
    "clip": {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 48},
             "crop_size": {"height": 48, "width": 48}, "resample": 3, **NORMAL},
    "clip_padded": {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 35},
                    "crop_size": {"height": 48, "width": 48}, "resample": 3, **NORMAL},
    "bit": {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 51},
            "crop_size": {"height": 44, "width": 44}, "resample": 3, **NORMAL},
    "convnext": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 48}, "crop_pct": 0.875,
                 "resample": 3, **NORMAL},
    "levit": {"image_processor_type": "LevitImageProcessor", "size": {"shortest_edge": 42},
              "crop_size": {"height": 42, "width": 42}, "resample": 3, **NORMAL},
    "tall": {"image_processor_type": "ViTImageProcessor", "size": {"height": 52, "width": 140}, "resample": 3, **NORMAL},
    "siglip": {"image_processor_type": "SiglipImageProcessor", "size": {"height": 40, "width": 52}, "resample": 3, **NORMAL},
    "rescaled": {"image_processor_type": "ViTImageProcessor", "size": {"height": 40, "width": 40}, "resample": 3,
                 "rescale_factor": 0.00784313725490196, "image_mean": [1.0, 1.0, 1.0], "image_std": [1.0, 1.0, 1.0]},
}


def timm_cases():
    for name, config in TIMM.items():
        data = resolve_data_config({}, pretrained_cfg=config)
        bytes_of, numbers_of = create_transform(**data, normalize=False), create_transform(**data)
        for image in ("china.png", "flower_420.jpg"):
            pixels = bytes_of(load(image)).numpy().transpose(1, 2, 0)
            record = case("timm", name, {"architecture": "x", "pretrained_cfg": config}, image, numbers_of(load(image)))
            yield {**record, "sha256": sha(pixels)}


def hugging_face_cases():
    for name, config in HUGGING_FACE.items():
        kind = config.get("image_processor_type", "ViTImageProcessor")
        options = {k: v for k, v in config.items() if not k.endswith("_type")}
        torchvision = getattr(transformers, kind)(**options)
        pillow = getattr(transformers, kind + "Pil")(**options)
        for image in ("china.png", "flower_420.jpg"):
            raw = dict(do_rescale=False, do_normalize=False, return_tensors="np")
            pixels = np.asarray(torchvision(load(image), **raw)["pixel_values"][0]).transpose(1, 2, 0)
            numbers = torch.tensor(np.asarray(torchvision(load(image), return_tensors="np")["pixel_values"][0]))
            record = case("transformers", name, config, image, numbers)
            record["expected"] = save_expected(f"transformers_{name}_{Path(image).stem}", pixels.astype(np.uint8))
            other = np.asarray(pillow(load(image), **raw)["pixel_values"][0]).transpose(1, 2, 0).astype(np.uint8)
            record["sha256_pillow_backend"] = sha(other)
            yield record


def case(library, name, config, image, numbers):
    """Normalised numbers are kept as the sum over each channel, and as the first row of the first channel."""
    return {"library": library, "name": name, "config": config, "image": image,
            "channel_sums": [float(x) for x in numbers.double().sum(dim=(1, 2))],
            "first_row": [round(float(x), 9) for x in numbers[0, 0]]}


def main():
    for name, (found, wanted) in PINNED.items():
        if found != wanted:
            sys.exit(f"{name} {found}, but the references are pinned to {wanted}")
    make_images(Path(sys.argv[1]))
    cases = {"versions": {k: v[1] for k, v in PINNED.items()}, "decode": list(decode_cases()), "resize": list(resize_cases()),
             "pipeline": list(timm_cases()) + list(hugging_face_cases())}
    lines = {k: "[\n" + ",\n".join(json.dumps(c) for c in v) + "\n]" for k, v in cases.items() if isinstance(v, list)}
    text = ",\n".join([f'"versions": {json.dumps(cases["versions"])}'] + [f'"{k}": {v}' for k, v in lines.items()])
    (OUT / "cases.json").write_text("{\n" + text + "\n}\n")


if __name__ == "__main__":
    main()
