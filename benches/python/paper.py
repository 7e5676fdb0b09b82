"""ViT-Slim's own procedure on the digits model, for the tables of docs/repair.md.

Development only. Packages: models/requirements.txt. The procedure is that of Chavan et al., CVPR 2022 (arXiv 2201.00814), written anew
after the paper and the behaviour of its published code:

search: one mask per attention dim (shared by q, k and v, different per head) and per MLP unit, all starting at 1; weights and masks
train together with AdamW at a constant 5e-4, decay 1e-3 on everything, cross entropy plus w * sum |mask| (attention 2e-4, MLP 5e-5,
times --l1: a schedule this short needs more of it). Tokens are not searched.
thresholds: masks are ranked by value over all layers and heads, attention and MLP apart, the same share of both stays; the share is
the largest that meets the MACs, every dim counted by itself, also where heads end with different numbers of dims.
retraining: masks become 0 or 1, weights go on from the search, labels, AdamW with decay 0.05 and a cosine. Its rate is the best of
--rates on a tenth of the training images, which neither search nor retraining sees: a choice in the procedure's favour.

`python benches/python/paper.py --out target/repair/paper.json [--seeds 3 --search-epochs 3 --retrain-epochs 1]` writes one record per
model, as benches/repair reads them.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper

DIGITS = Path(__file__).parents[2] / "models" / "digits"
D, H, E, L, M, N, PATCH, CLASSES = 96, 3, 32, 6, 384, 50, 4, 10
L1_ATTENTION, L1_MLP = 2e-4, 5e-5


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    train, test = load_data("train"), load_data("test")
    dense = load_weights()
    with torch.no_grad():
        teacher = logits_of(dense, ones(), test[0])
    print(f"dense: {judge(teacher, teacher, test[1])[0]:.2f} % of {len(test[1])}", flush=True)
    records = []
    for seed in range(args.seeds):
        fit, held = split(train, seed)
        start = time.perf_counter()
        weights, masks = search(dense, fit, args, seed)
        searched = time.perf_counter() - start
        for budget in args.budgets:
            binary, share = threshold(masks, budget)
            with torch.no_grad():
                cut = judge(logits_of(weights, binary, test[0]), teacher, test[1])
            records.append(record("paper, masks only", budget, seed, cut, share, searched))
            start, tried = time.perf_counter(), []
            for rate in args.rates:
                tuned = retrain(weights, binary, fit, rate, args, seed)
                with torch.no_grad():
                    loss = F.cross_entropy(logits_of(tuned, binary, held[0]), held[1]).item()
                tried.append((loss, rate, tuned))
            loss, rate, tuned = min(tried, key=lambda t: t[:2])
            with torch.no_grad():
                found = judge(logits_of(tuned, binary, test[0]), teacher, test[1])
            seconds = searched + (time.perf_counter() - start) / len(args.rates)
            records.append(record("paper, masked retraining", budget, seed, found, share, seconds))
            print(f"seed {seed}, {budget}: cut {cut[0]:.2f} % / {cut[1]:.4f}, retrained at {rate} {found[0]:.2f} % / {found[1]:.4f}", flush=True)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(records, indent=1))


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.6, 0.5])
    parser.add_argument("--search-epochs", type=int, default=3)
    parser.add_argument("--retrain-epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--l1", type=float, default=8.0, help="times the paper's weights of the penalty")
    parser.add_argument("--rates", type=float, nargs="+", default=[6.25e-5, 2e-4, 5e-4], help="of retraining; the paper's is 5e-4 * batch / 512")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def record(row, budget, seed, quality, share, seconds):
    load = os.getloadavg()[0]
    at = f"{budget:g}"
    return {"part": "paper", "row": row, "at": at, "seed": seed, "top1": quality[0], "kl": quality[1], "macs": share, "seconds": seconds, "load": load}


# ---- data and network ---------------------------------------------------------------------------


def load_data(name):
    with np.load(DIGITS / f"{name}.npz") as data:
        return torch.from_numpy(data["input"]).float() / 255, torch.from_numpy(data["labels"]).long()


def split(data, seed, share=0.1):
    """(the rest, a tenth), drawn by the seed."""
    order = torch.randperm(len(data[1]), generator=torch.Generator().manual_seed(seed))
    count = round(share * len(order))
    return tuple(x[order[count:]] for x in data), tuple(x[order[:count]] for x in data)


def load_weights():
    """Weights by name. The exporter leaves the matrices of MatMul without names, as [in, out], in the order of the network."""
    named = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in onnx.load(DIGITS / "vit-digits.onnx").graph.initializer}
    matrices = iter([named.pop(name) for name in list(named) if name.startswith("onnx::MatMul")])
    for layer in range(L):
        for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            named[f"blocks.{layer}.{part}.weight"] = next(matrices).T.contiguous()
    return {name: t for name, t in named.items() if t.dtype == torch.float32}


def ones():
    """Masks of the whole network: attention [L, H, E], MLP [L, M]."""
    return {"attention": torch.ones(L, H, E), "mlp": torch.ones(L, M)}


def logits_of(w, masks, images, batch=500):
    return torch.cat([forward(w, masks, part) for part in images.split(batch)])


def forward(w, masks, images):
    x = F.conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], 1) + w["pos_embed"]
    for i in range(L):
        b = {part: (w[f"blocks.{i}.{part}.weight"], w[f"blocks.{i}.{part}.bias"]) for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")}
        qkv = F.linear(norm(x, b["norm1"]), *b["attn.qkv"]).unflatten(-1, (3, H, E)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv * masks["attention"][i, :, None, :]
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + F.linear(attended, *b["attn.proj"])
        x = x + F.linear(F.gelu(F.linear(norm(x, b["norm2"]), *b["mlp.fc1"])) * masks["mlp"][i], *b["mlp.fc2"])
    return F.linear(norm(x[:, 0], (w["norm.weight"], w["norm.bias"])), w["head.weight"], w["head.bias"])


def norm(x, parts):
    return F.layer_norm(x, (D,), *parts, eps=1e-6)


def judge(logits, teacher, labels):
    """(top-1 in percent, KL(teacher || logits) in nats per image)."""
    p, q = F.log_softmax(teacher.double(), 1), F.log_softmax(logits.double(), 1)
    return 100 * (logits.argmax(1) == labels).double().mean().item(), (p.exp() * (p - q)).sum(1).mean().item()


# ---- the procedure ------------------------------------------------------------------------------


def search(dense, data, args, seed):
    weights = {name: t.clone().requires_grad_() for name, t in dense.items()}
    masks = {name: t.requires_grad_() for name, t in ones().items()}
    optimizer = torch.optim.AdamW([*weights.values(), *masks.values()], lr=5e-4, weight_decay=1e-3, eps=1e-8)
    for images, labels in batches(data, args.search_epochs, args.batch, seed):
        penalty = L1_ATTENTION * masks["attention"].abs().sum() + L1_MLP * masks["mlp"].abs().sum()
        loss = F.cross_entropy(forward(weights, masks, images), labels) + args.l1 * penalty
        step(optimizer, loss)
    return {n: t.detach() for n, t in weights.items()}, {n: t.detach() for n, t in masks.items()}


def retrain(start, binary, data, rate, args, seed):
    weights = {name: t.clone().requires_grad_() for name, t in start.items()}
    matrices = [t for t in weights.values() if t.ndim >= 2]
    others = [t for t in weights.values() if t.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}], lr=rate)
    steps = args.retrain_epochs * (len(data[1]) // args.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    for images, labels in batches(data, args.retrain_epochs, args.batch, seed + 1000):
        step(optimizer, F.cross_entropy(forward(weights, binary, images), labels))
        schedule.step()
    return {n: t.detach() for n, t in weights.items()}


def step(optimizer, loss):
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def batches(data, epochs, size, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(data[1]), generator=generator)
        for picked in order[: len(order) // size * size].split(size):
            yield data[0][picked], data[1][picked]


def macs(attention, mlp):
    """Multiplications of an image where `attention` dims (q, k and v together) and `mlp` units stay, over all layers."""
    embed, head = (N - 1) * PATCH * PATCH * D, D * CLASSES
    return embed + head + attention * (4 * N * D + 2 * N * N) + mlp * 2 * N * D


def threshold(masks, budget):
    """0/1 masks that keep the largest equal share of both types within the budget, and the share of the MACs that they have."""
    counts = {name: t.numel() for name, t in masks.items()}
    dense = macs(counts["attention"], counts["mlp"])
    share = lambda keep: macs(*(round(keep * counts[name]) for name in ("attention", "mlp"))) / dense  # noqa: E731
    keep = max(k / 10_000 for k in range(10_001) if share(k / 10_000) <= budget)
    binary = {}
    for name, mask in masks.items():
        order = mask.flatten().argsort(descending=True, stable=True)
        flat = torch.zeros(mask.numel())
        flat[order[: round(keep * mask.numel())]] = 1
        binary[name] = flat.view_as(mask)
    return binary, share(keep)


if __name__ == "__main__":
    main()
