"""Twelve ordinary exports of vision transformers: what vitrim cuts in them, beside onnxsim, the other pruner of ONNX files.

    python peers.py export DIR [--fresh]           writes the twelve models (torch, timm, transformers, torchvision)
    python peers.py table  DIR --vitrim PATH       cuts them and prints the table (needs onnx, onnxruntime, onnxsim)

Development only; versions: peers-requirements.txt. The models have random weights of seed 0 and full size (DeiT-Tiny's: 12 layers, width
192, 3 heads, 224 x 224; Swin-T), so the table shows what is found, cut and still runs, and says nothing about accuracy. With --fresh all
weights are as initialised (but for matrices of zeros), zero biases and unit scales included, which exporters merge into few shared
constants; without it every vector is drawn as well, so that no two are equal.

vitrim cuts each kind by itself (heads to a third, MLP, qk and vo to a half) and all four at once. A cell counts the layers of which a
group was found, then is `yes` where the cut model has fewer weights, loads in ONNX Runtime, and equals the original with what was cut set
to zero (here, in Python) within 1e-4 of the largest output, on one random batch of 1 (and one of 4 where the batch is dynamic). onnxsim is
asked for heads and MLP, by its Python and its C++ functions, of the model as exported and after onnxsim.simplify; `yes` means the same as
above, `no` that nothing became smaller, `broken` that ONNX Runtime rejects the result, `differs` that it is not the zeroed model.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

SIDE = 224
LAYERS = 12
TOLERANCE = 1e-4
KEEP = {"head": 0.34, "mlp": 0.5, "qk": 0.5, "vo": 0.5}

# name, maker, attention implementation, exporter, opset, dynamic batch
EXPORTS = [
    ("timm-ts17", "timm", None, "ts", 17, False),
    ("timm-ts17-dynamic", "timm", None, "ts", 17, True),
    ("timm-dynamo18", "timm", None, "dynamo", 18, False),
    ("timm-dynamo23", "timm", None, "dynamo", 23, False),
    ("hf-eager-ts17", "hf", "eager", "ts", 17, False),
    ("hf-sdpa-ts17", "hf", "sdpa", "ts", 17, False),
    ("hf-eager-dynamo18", "hf", "eager", "dynamo", 18, False),
    ("hf-eager-dynamo23", "hf", "eager", "dynamo", 23, False),
    ("hf-sdpa-dynamo23", "hf", "sdpa", "dynamo", 23, False),
    ("torchvision-ts17", "torchvision", None, "ts", 17, False),
    ("torchvision-dynamo18", "torchvision", None, "dynamo", 18, False),
    ("swin-ts17", "swin", None, "ts", 17, False),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("export")
    make.add_argument("folder", type=Path)
    make.add_argument("--fresh", action="store_true", help="weights as initialised")
    show = commands.add_parser("table")
    for command in (make, show):
        command.add_argument("--only", default="", help="part of a model's name")
    show.add_argument("folder", type=Path)
    show.add_argument("--vitrim", required=True)
    show.add_argument("--without-onnxsim", action="store_true")
    rival = commands.add_parser("onnxsim", help="one model, in a process of its own")
    rival.add_argument("model")
    args = parser.parse_args()
    if args.command == "export":
        args.folder.mkdir(parents=True, exist_ok=True)
        for row in EXPORTS:
            if args.only in row[0]:
                export(args.folder, row, args.fresh)
    elif args.command == "onnxsim":
        print(json.dumps(by_onnxsim(args.model)))
    else:
        table(args)


# ---- the twelve models ---------------------------------------------------------------------------

def build(maker, attention):
    import torch

    torch.manual_seed(0)
    if maker == "timm":
        import timm
        return timm.create_model("deit_tiny_patch16_224", pretrained=False)
    if maker == "swin":
        import timm
        return timm.create_model("swin_tiny_patch4_window7_224", pretrained=False)
    if maker == "torchvision":
        from torchvision.models.vision_transformer import VisionTransformer
        return VisionTransformer(image_size=SIDE, patch_size=16, num_layers=LAYERS, num_heads=3, hidden_dim=192, mlp_dim=768)
    from transformers import ViTConfig, ViTForImageClassification
    config = ViTConfig(hidden_size=192, num_hidden_layers=LAYERS, num_attention_heads=3, intermediate_size=768, num_labels=1000)
    config._attn_implementation = attention
    return HuggingFace(ViTForImageClassification(config))


def HuggingFace(model):
    import torch

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, pixel_values):
            return self.model(pixel_values).logits

    return Logits()


def export(folder, row, fresh):
    import torch

    name, maker, attention, exporter, opset, dynamic = row
    path = folder / f"{name}.onnx"
    model = build(maker, attention).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            empty = parameter.dim() >= 2 and not parameter.any()  # torchvision's classifier: every output would be zero
            if empty or (parameter.dim() < 2 and not fresh):
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    images = torch.zeros(1, 3, SIDE, SIDE)
    names = {"input_names": ["input"], "output_names": ["logits"]}
    with torch.no_grad():
        if exporter == "ts":
            axes = {"input": {0: "batch"}, "logits": {0: "batch"}} if dynamic else None
            torch.onnx.export(model, (images,), str(path), dynamo=False, opset_version=opset, dynamic_axes=axes, **names)
        else:
            torch.onnx.export(model, (images,), dynamo=True, opset_version=opset, verbose=False, **names).save(str(path))
    print(name, path.stat().st_size, "bytes", flush=True)


# ---- running models ------------------------------------------------------------------------------

def outputs(path, batch):
    """What ONNX Runtime makes of one random batch."""
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    images = np.random.default_rng(batch).standard_normal((batch, 3, SIDE, SIDE)).astype(np.float32)
    return session.run(None, {session.get_inputs()[0].name: images})


def weights(path):
    """Elements of all floating-point initializers and Constant nodes."""
    import numpy as np
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    tensors = list(model.graph.initializer)
    tensors += [a.t for n in model.graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"]
    return sum(int(np.prod(t.dims)) for t in tensors if t.data_type in (1, 10, 11, 16))


def close(a, b):
    import numpy as np

    return a.shape == b.shape and np.abs(a - b).max() <= TOLERANCE * np.abs(b).max()


# ---- vitrim --------------------------------------------------------------------------------------

class Failed(Exception):
    pass


def vitrim(binary, *args):
    done = subprocess.run([binary, *map(str, args)], capture_output=True, text=True)
    if done.returncode != 0:
        raise Failed((done.stderr.strip().splitlines() or ["no message"])[-1])
    return done.stdout


def by_vitrim(binary, model, batches, folder):
    """`N/12 yes` of each kind, and of all four at once."""
    groups = json.loads(vitrim(binary, "inspect", model, "--json"))["groups"]
    found = {kind: sum(g["kind"] == kind for g in groups) for kind in KEEP}
    asks = [{kind: share} for kind, share in KEEP.items()] + [{k: v for k, v in KEEP.items() if k != "head"} | {"head": 0.67}]
    cells = {}
    for ask in asks:
        label = next(iter(ask)) if len(ask) == 1 else "all"
        count = f"{found[label]}/{LAYERS} " if label != "all" else ""
        try:
            cells[label] = count + cut(binary, model, ask, batches, folder)
        except Failed as error:
            cells[label] = f"{count}no: {error}"
    return cells


def cut(binary, model, ask, batches, folder):
    import numpy as np

    plan, out, twin = folder / "plan.json", folder / "out.onnx", folder / "twin.onnx"
    keep = ",".join(f"{kind}={share}" for kind, share in ask.items())
    vitrim(binary, "plan", model, "--by", "random", "--keep", keep, "-o", plan, "--force")
    cuts = json.loads(vitrim(binary, "slice", model, "--plan", plan, "--json", "-o", out, "--force"))["cuts"]
    zeroed(model, cuts, twin)
    if not weights(out) < weights(model):
        raise Failed("no fewer weights")
    for batch in batches:
        whole = outputs(model, batch)
        results = list(zip(outputs(out, batch), outputs(twin, batch), whole))
        if not all(close(a, b) for a, b, _ in results):
            raise Failed(f"differs from the zeroed original, batch {batch}")
        if all(np.array_equal(b, original) for _, b, original in results):
            raise Failed("the zeroed original is the original: nothing was asked")
    return "yes"


def zeroed(path, cuts, out):
    """The model with what was cut set to zero: written here, so that it does not rest on `vitrim mask`."""
    import onnx

    model = onnx.load(str(path))
    tensors = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            tensors.update({node.output[0]: a.t for a in node.attribute if a.name == "value"})
    for entry in cuts:
        zero(tensors[entry["initializer"]], entry["axis"], entry["removed"])
    onnx.save(model, str(out))


def zero(tensor, axis, removed):
    import numpy as np
    from onnx import numpy_helper

    array = numpy_helper.to_array(tensor).copy()
    np.moveaxis(array, axis, 0)[list(removed)] = 0
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


# ---- onnxsim -------------------------------------------------------------------------------------

def by_onnxsim(path):
    import onnx
    import onnxsim

    raw = onnx.load(path)
    simple, _ = onnxsim.simplify(onnx.load(path))
    functions = {
        "head py": lambda m: onnxsim.apply_attention_head_pruning(m, sparsity=0.67),
        "head c++": lambda m: onnxsim.apply_attention_head_pruning_cpp(m, 0.67),
        "mlp py": lambda m: onnxsim.apply_structured_pruning(m, sparsity=0.5),
        "mlp c++": lambda m: onnxsim.apply_structured_pruning_cpp(m, 0.5),
    }
    cells = {}
    for label, prune in functions.items():
        for kind, model in (("raw", raw), ("simplified", simple)):
            copy = onnx.ModelProto()
            copy.CopyFrom(model)
            try:
                pruned = prune(copy)
            except Exception as error:  # whatever it raises is its answer
                cells[f"{label} {kind}"] = f"error: {type(error).__name__}"
            else:
                cells[f"{label} {kind}"] = judged(model, pruned)
    return cells


def judged(model, pruned):
    """`no` where nothing became smaller; else whether it runs, and equals the model with the missing positions zeroed."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        before, out, twin = (Path(folder) / name for name in ("before.onnx", "out.onnx", "twin.onnx"))
        onnx.save(model, before)
        onnx.save(pruned, out)
        if weights(out) >= weights(before):
            return "no"
        try:
            results = outputs(out, 1)
        except Exception:  # ONNX Runtime's own exceptions have no common type
            return "broken"
        onnx.save(without_missing(model, pruned), twin)
        return "yes" if all(close(a, b) for a, b in zip(results, outputs(twin, 1))) else "differs"


def without_missing(model, pruned):
    """The model in which all that a node's weights lack in the pruned one is zero; each reader of a shared weight has its own."""
    import numpy as np
    import onnx
    from onnx import numpy_helper

    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    before = {t.name: t for t in model.graph.initializer}
    after = {t.name: t for t in pruned.graph.initializer}
    theirs = {node.output[0]: node for node in pruned.graph.node}
    for node in twin.graph.node:
        same = theirs.get(node.output[0])
        for i, name in enumerate(node.input if same else []):
            if name not in before or same.input[i] not in after or before[name].dims == after[same.input[i]].dims:
                continue
            whole, rest = (numpy_helper.to_array(t) for t in (before[name], after[same.input[i]]))
            own = onnx.TensorProto()
            own.CopyFrom(before[name])
            own.name = f"{name}.of.{node.output[0]}"
            for axis in np.flatnonzero(np.array(whole.shape) != np.array(rest.shape)):
                zero(own, int(axis), missing(np.moveaxis(whole, axis, 0), np.moveaxis(rest, axis, 0)))
            twin.graph.initializer.append(own)
            node.input[i] = own.name
    return twin


def missing(whole, rest):
    """Positions of the first axis that are not in `rest`, which has the others in order; weights of one axis only."""
    positions = iter(range(len(whole)))
    kept = {next((i for i in positions if (whole[i] == row).all()), None) for row in rest}
    return [i for i in range(len(whole)) if i not in kept]


# ---- the table -----------------------------------------------------------------------------------

OURS = [*KEEP, "all"]
THEIRS = [f"{kind} {how} {model}" for kind in ("head", "mlp") for how in ("py", "c++") for model in ("raw", "simplified")]


def table(args):
    rival = not args.without_onnxsim
    heading = ["export", *(f"vitrim {k}" for k in OURS), *(f"onnxsim {k}" for k in THEIRS if rival)]
    print("| " + " | ".join(heading) + " |")
    print("|" + "---|" * len(heading), flush=True)
    rows = []
    for name, *_, dynamic in EXPORTS:
        if args.only not in name:
            continue
        model = args.folder / f"{name}.onnx"
        with tempfile.TemporaryDirectory() as folder:
            try:
                cells = by_vitrim(args.vitrim, model, (1, 4) if dynamic else (1,), Path(folder))
            except Failed as error:
                cells = {kind: f"no: {error}" for kind in OURS}
        row = [cells[k] for k in OURS]
        if rival:
            done = subprocess.run([sys.executable, __file__, "onnxsim", model], capture_output=True, text=True)
            theirs = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
            row += [theirs.get(k, "crash") for k in THEIRS]
        rows.append(row)
        print("| " + " | ".join([name, *row]) + " |", flush=True)
    total = [sum(r[i] in ("yes", f"{LAYERS}/{LAYERS} yes") for r in rows) for i in range(len(heading) - 1)]
    print("| " + " | ".join(["cut, runs, equal", *(f"{n}/{len(rows)}" for n in total)]) + " |")
    print("\n" + ", ".join([vitrim(args.vitrim, "--version").strip(), *versions(rival)]))


def versions(rival):
    from importlib.metadata import version

    return [f"{name} {version(name)}" for name in ("onnx", "onnxruntime", *(["onnxsim"] if rival else []))]


if __name__ == "__main__":
    main()
