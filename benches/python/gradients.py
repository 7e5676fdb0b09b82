"""Makes `tests/fixtures/gradients/`: tiny Vision Transformers, as real exporters write them, with PyTorch's gradients beside them.

Development only. Packages: models/requirements.txt.   python benches/python/gradients.py

Two networks (`plain`, and `layerscale` with LayerScale from 0.5), two exporters (`ts17`: TorchScript, opset 17; `dynamo18`:
torch.export, opset 18), batch axis dynamic. For every NAME.onnx there is a NAME.safetensors with:

    input    float32 [4, 3, 16, 16]    the batch
    labels   int64 [4]
    logits   float32 [4, 5]
    loss     float32 []                mean cross entropy of the batch
    grad.X   float32, shape of X       d loss / d X for every initializer X of NAME.onnx that is a parameter of the network

Gradients are recorded in the orientation of the ONNX file. PyTorch keeps the weight of a linear layer as [out, in]; where an exporter
stores it transposed for MatMul, [in, out], the gradient is transposed too. Which parameter and which form belong to X is found by
comparing values, never names (every weight is random, so no two are equal), and is written in the metadata under the key X, as
`blocks.0.attn.qkv.weight` or `blocks.0.attn.qkv.weight transposed`. A parameter with no initializer, or with two, stops the script.

PyTorch computes logits, loss and gradients in float64, and they are rounded once: a difference to them is the reader's own rounding.
The script then checks each pair of files in ONNX Runtime: logits, loss, and for every initializer the loss's slope along the recorded
gradient, by central differences, which a wrong orientation would fail.
"""

import argparse
import copy
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file
from timm.models.vision_transformer import VisionTransformer

SEED = 11
SIDE = 16
CLASSES = 5
BATCH = 4
FOLDER_BYTES_MAX = 400_000
NETWORKS = {"plain": {}, "layerscale": {"init_values": 0.5}}


def main():
    default = Path(__file__).resolve().parents[2] / "tests/fixtures/gradients"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=default, help="folder to write")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for network, options in NETWORKS.items():
        model = build_model(options)
        recorded, gradients = reference(model)
        for exporter, export in [("ts17", export_torchscript), ("dynamo18", export_dynamo)]:
            path = out / f"{network}-{exporter}.onnx"
            export(model, path)
            record(path, model, recorded, gradients)
            check(path)
    total = sum(path.stat().st_size for path in out.iterdir())
    print(f"together {total} bytes")
    if total >= FOLDER_BYTES_MAX:
        raise SystemExit(f"{out} is larger than {FOLDER_BYTES_MAX} bytes")


def build_model(options):
    """A network in which no parameter is zero, one, or equal to another: biases, norms and LayerScale are random as well."""
    torch.manual_seed(SEED)
    model = VisionTransformer(
        img_size=SIDE, patch_size=4, in_chans=3, embed_dim=12, depth=2, num_heads=3, mlp_ratio=2, num_classes=CLASSES, **options
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn_like(p)
            if "norm" in name and name.endswith("weight"):
                p.copy_(1 + 0.2 * noise)
            elif name.endswith("gamma"):
                p.copy_(options["init_values"] * (1 + 0.2 * noise))
            elif name.endswith("weight"):
                p.copy_(noise * (1.5 / p[0].numel()) ** 0.5)
            else:
                p.copy_(0.2 * noise)
    return model.eval()


def reference(model):
    """Returns the recorded batch with its results, and the gradient of each parameter by its PyTorch name."""
    generator = torch.Generator().manual_seed(SEED)
    inputs = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator)
    labels = torch.tensor([3, 0, 4, 1])
    exact = copy.deepcopy(model).double()
    logits = exact(inputs.double())
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    gradients = {name: p.grad.float().numpy() for name, p in exact.named_parameters()}
    recorded = {"input": inputs, "labels": labels, "logits": logits.detach().float(), "loss": loss.detach().float()}
    return {name: tensor.numpy() for name, tensor in recorded.items()}, gradients


def export_torchscript(model, path):
    axes = {"input": {0: "batch"}, "logits": {0: "batch"}}
    names = {"input_names": ["input"], "output_names": ["logits"]}
    torch.onnx.export(model, (torch.zeros(1, 3, SIDE, SIDE),), str(path), dynamo=False, opset_version=17, dynamic_axes=axes, **names)


def export_dynamo(model, path):
    shapes = {"x": {0: torch.export.Dim("batch")}}
    names = {"input_names": ["input"], "output_names": ["logits"]}
    example = (torch.zeros(2, 3, SIDE, SIDE),)
    torch.onnx.export(
        model, example, str(path), dynamo=True, opset_version=18, dynamic_shapes=shapes, external_data=False, verbose=False, **names
    )
    strip_metadata(path)


def strip_metadata(path):
    """Removes the notes that torch.export leaves: for every node the Python stack of this machine, two thirds of the file."""
    exported = onnx.load(path)
    for owner in [exported, exported.graph, *exported.graph.node, *exported.graph.value_info, *exported.graph.initializer]:
        del owner.metadata_props[:]
    for value in [*exported.graph.input, *exported.graph.output]:
        del value.metadata_props[:]
    onnx.save(exported, path)


def record(path, model, recorded, gradients):
    """Writes the .safetensors of one ONNX file, gradients keyed by the initializer that holds the parameter's values."""
    stored = {i.name: numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer}
    tensors, metadata = dict(recorded), {}
    for name, parameter in model.named_parameters():
        initializer, transposed = find(parameter.detach().numpy(), stored, f"{path.name}: {name}")
        gradient = gradients[name].T if transposed else gradients[name]
        tensors[f"grad.{initializer}"] = np.ascontiguousarray(gradient.reshape(stored[initializer].shape))
        metadata[initializer] = name + (" transposed" if transposed else "")
    recorded_file = path.with_suffix(".safetensors")
    save_file(tensors, recorded_file, metadata)
    recorded_file.chmod(0o644)  # the writer leaves it readable for the owner only
    sort_header(recorded_file)


def sort_header(path):
    """Rewrites the JSON header with sorted keys: the safetensors writer gives the metadata in another order at every run."""
    content = path.read_bytes()
    data_start = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:data_start]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[data_start:])


def find(values, stored, what):
    """Returns (initializer, transposed): the one initializer that holds `values`, as they are, reshaped, or transposed."""
    found = []
    for name, array in stored.items():
        if array.dtype != values.dtype or array.size != values.size:
            continue
        if np.array_equal(array.ravel(), values.ravel()):
            found.append((name, False))
        elif values.ndim == 2 and np.array_equal(array, values.T):
            found.append((name, True))
    if len(found) != 1:
        raise SystemExit(f"{what}: held by {len(found)} initializers {found}, expected one")
    return found[0]


def check(path):
    """Holds the recorded numbers against ONNX Runtime, with every initializer turned into an input that can be changed."""
    tensors = load_file(path.with_suffix(".safetensors"))
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    declared = {i.name for i in model.graph.input}
    for i in model.graph.initializer:
        if i.name not in declared:
            model.graph.input.append(onnx.helper.make_tensor_value_info(i.name, i.data_type, list(i.dims)))
    weights = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of every initializer that is an input
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def loss_with(changed):
        logits = session.run(["logits"], {"input": tensors["input"], **changed})[0]
        return logits, F.cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(tensors["labels"])).item()

    logits, loss = loss_with({})
    worst_logit = np.abs(logits - tensors["logits"]).max() / np.abs(tensors["logits"]).max()
    worst_slope, count = 0.0, 0
    for key, gradient in tensors.items():
        if not key.startswith("grad."):
            continue
        name, norm = key[5:], np.linalg.norm(gradient)
        step = (0.01 / norm * gradient / norm).astype(np.float32)  # moves the loss by about 0.01
        up, down = loss_with({name: weights[name] + step})[1], loss_with({name: weights[name] - step})[1]
        worst_slope = max(worst_slope, abs((up - down) / 0.02 - 1))
        count += 1
    size = path.stat().st_size + path.with_suffix(".safetensors").stat().st_size
    against = f"ONNX Runtime's logits differ by {worst_logit:.1e}, slopes by {worst_slope:.1e}"
    print(f"{path.stem}: {size} bytes, {count} gradients, loss {loss:.6f}; {against}")
    if worst_logit > 1e-5 or abs(loss - tensors["loss"]) > 1e-5 or worst_slope > 0.02:
        raise SystemExit(f"{path.name}: the recorded numbers are not those of the file")


if __name__ == "__main__":
    main()
