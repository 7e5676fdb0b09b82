"""PyTorch's training step of DeiT-Tiny, one step per request, for a benchmark that interleaves contenders.

Development only. Packages: models/requirements.txt. The process builds the model, then answers every line `step` on standard input
with one line of JSON on standard output, and ends at end of input:

    {"cpu_s": 1.31, "wall_s": 1.32, "peak_rss_kb": 812345, "loss": 7.02}

A step is forward, mean cross entropy, backward and fused AdamW on all 5.7 million weights, in float32, eager, on one thread (see
`--threads`), with scaled_dot_product_attention and without gradient clipping. The batch is random, drawn once, and not timed. cpu_s is
the processor time of the whole process, wall_s the elapsed time of the step; peak_rss_kb is the peak of the process so far, imports
included. The caller asks for a few steps that it throws away: the first is slower (AdamW makes its moments there).

`--export FILE` first writes the very same network (same seed, same weights) to ONNX: TorchScript exporter, opset 17, batch axis dynamic.
`--save-batch FILE` writes input and labels as .npz, so that another contender can be seen to compute the same first loss. Both run in
a child process: exporting needs more memory than training, and would else be counted in peak_rss_kb.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F

SEED = 7
SIDE = 224
CLASSES = 1000


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.set_num_interop_threads(1)
    if args.export_only:
        export(args.export)
        return
    if args.export:
        subprocess.run([sys.executable, __file__, "--export", args.export, "--export-only"], check=True, stdout=sys.stderr)
    inputs, labels = random_batch(args.batch)
    if args.save_batch:
        np.savez(args.save_batch, input=inputs.numpy(), labels=labels.numpy())
    serve(inputs, labels, args)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--export", type=Path, help="first write the network to this ONNX file")
    parser.add_argument("--export-only", action="store_true", help="write it and end")
    parser.add_argument("--save-batch", type=Path, help="first write the batch to this .npz file")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    args = parser.parse_args()
    if args.export_only and not args.export:
        parser.error("--export-only needs --export FILE")
    return args


def build_model():
    timm.layers.set_fused_attn(True)
    torch.manual_seed(SEED)
    model = timm.create_model("deit_tiny_patch16_224", pretrained=False, num_classes=CLASSES)
    # Untrained biases and scales are all equal, and exporters merge equal tensors. In a trained network no two are.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.02 * torch.randn(parameter.shape))
    return model


def random_batch(batch):
    generator = torch.Generator().manual_seed(SEED)
    inputs = torch.randn(batch, 3, SIDE, SIDE, generator=generator)
    return inputs, torch.randint(0, CLASSES, (batch,), generator=generator)


def serve(inputs, labels, args):
    model = build_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    weights = sum(p.numel() for p in model.parameters())
    versions = f"torch {torch.__version__}, timm {timm.__version__}"
    print(f"{versions}, {weights} weights, {args.threads} thread(s), {peak_rss_kb()} kB before the first step", file=sys.stderr)
    for line in sys.stdin:
        request = line.strip()
        if request != "step":
            raise SystemExit(f"unknown request {request!r}: the only one is `step`")
        cpu, wall = time.process_time(), time.perf_counter()
        loss = train_step(model, optimizer, inputs, labels)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        answer = {"cpu_s": round(cpu, 6), "wall_s": round(wall, 6), "peak_rss_kb": peak_rss_kb(), "loss": loss}
        print(json.dumps(answer), flush=True)


def train_step(model, optimizer, inputs, labels):
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(inputs), labels)
    loss.backward()
    optimizer.step()
    return loss.item()


def peak_rss_kb():
    """Peak resident memory of this program. VmHWM where there is one: ru_maxrss keeps the peak of the program that started us."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 1024 if sys.platform == "darwin" else peak


def export(path):
    torch.onnx.export(
        build_model().eval(),
        (torch.zeros(1, 3, SIDE, SIDE),),
        str(path),
        dynamo=False,
        opset_version=17,
        input_names=["input"],
        output_names=["logits"],
        dynamic_axes={"input": {0: "batch"}, "logits": {0: "batch"}},
    )


if __name__ == "__main__":
    main()
