"""The authors' full model, written as plain functions of their state_dict, and random weights for it.

x is [B, L, C] outside the encoders, [B, C, L] inside.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F

SMALL = {"length": 8, "visual": (7, 6, 6, 5), "audio": (4, 3, 3), "kernel": 3, "hidden": 6}
FULL = {"length": 300, "visual": (512, 512, 512, 256, 256), "audio": (128,) * 5, "kernel": 5, "hidden": 256}


def authors_model(w, name, visual, audio, n=None):
    """[B, n]. With ``n``, what W_k[:n, :n] and b_k[:n] give on the first n frames alone: spec, "Lengths"."""
    n = visual.shape[1] if n is None else n
    x = [encoder(w, theirs, x_m[:, :n]) for theirs, x_m in (("video", visual), ("logmel", audio))]
    x = [x_m / x_m.norm(dim=-1, keepdim=True).clamp(min=1e-12) for x_m in x]
    y = torch.cat(fusion(w, name, x, n), dim=-1)
    y = affine(w, "regressor1", y)
    y = F.leaky_relu(norm(w, "bn1", y.mT).mT, 0.01)
    return torch.tanh(affine(w, "regressor2", y))[..., 0]


def encoder(w, theirs, x):
    x, k = x.mT, 0
    while (block := f"temporal.{theirs}.network.{k}.") + "conv1.bias" in w:
        y = x
        for conv in ("conv1", "conv2"):
            g, v, bias = (w[f"{block}{conv}.{part}"] for part in ("weight_g", "weight_v", "bias"))
            weight = g * v / v.flatten(1).norm(dim=1)[:, None, None]
            reach = (weight.shape[2] - 1) * 2**k
            y = F.conv1d(y, weight, bias, padding=reach, dilation=2**k)[..., : -reach or None]
            y = F.leaky_relu(y, 0.01)
        down = block + "downsample."
        residual = F.conv1d(x, w[down + "weight"], w[down + "bias"]) if down + "weight" in w else x
        x, k = F.leaky_relu(y + residual, 0.01), k + 1
    return norm(w, f"bn.{theirs}", x).mT


def norm(w, name, x):
    weight, bias, mean, var = (
        w[f"{name}.{part}"][:, None] for part in ("weight", "bias", "running_mean", "running_var")
    )
    return (x - mean) / torch.sqrt(var + 1e-5) * weight + bias


def affine(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def fusion(w, name, x, n):
    states, t = [x], 0
    while f"{name}.coattn.dcn_layers.{t}.linears.0.0.weight" in w:
        layer = f"{name}.coattn.dcn_layers.{t}."
        joint = affine(w, f"{layer}dense_coattn.query_linear", torch.cat(x, dim=-1))
        new = []
        for m in (1, 2):
            key_weight, key_bias = (w[f"{layer}dense_coattn.key{m}_linear.{kind}"] for kind in ("weight", "bias"))
            key = x[m - 1].mT @ key_weight[:n, :n].T + key_bias[:n]
            value = affine(w, f"{layer}dense_coattn.value{m}_linear", x[m - 1])
            correlation = torch.tanh(key @ joint / math.sqrt(joint.shape[-1]))
            hidden = torch.relu(torch.tanh(value @ correlation))
            new.append(x[m - 1] + torch.relu(affine(w, f"{layer}linears.{m - 1}.0", hidden)))
        x, t = new, t + 1
        states.append(x)
    gate = grjca if name == "GRJCA" else hgrjca
    return [gate(w, f"{name}.{modality}_gating_fc_layer", [s[m] for s in states]) for m, modality in modalities()]


def modalities():
    return enumerate(("video", "audio"))


def mix(w, layer, x, choices):
    ways = torch.softmax(affine(w, layer, x) / 0.1, dim=-1)
    return torch.relu(sum(ways[..., i, None] * choice for i, choice in enumerate(choices)))


def grjca(w, layer, states):
    return mix(w, layer, states[-1], states)


def hgrjca(w, layer, states):
    stages = [mix(w, f"{layer}_stage{t}", states[t], states[: t + 1]) for t in range(1, len(states))]
    return mix(w, f"{layer}_stage", states[-1], stages)


def checkpoint(name, *, length, visual, audio, kernel, hidden, iterations=2, aliases=True, dtype=torch.float64):
    """Random weights under their names; scores and logits spread over the whole of tanh and softmax."""
    generator = torch.Generator().manual_seed(0)
    w = {}

    def random(key, *shape, scale=1.0):
        w[key] = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    def linear(key, inputs, outputs, gain=1.0):
        random(f"{key}.weight", outputs, inputs, scale=gain / math.sqrt(inputs))
        random(f"{key}.bias", outputs, scale=0.1)

    def batch_norm(key, width):
        for part in ("weight", "bias", "running_mean", "running_var"):
            random(f"{key}.{part}", width, scale=0.3)
        w[f"{key}.weight"] += 1
        w[f"{key}.running_var"] = w[f"{key}.running_var"].abs() + 0.5
        w[f"{key}.num_batches_tracked"] = torch.tensor(7)

    for theirs, widths in (("video", visual), ("logmel", audio)):
        for k, (i, o) in enumerate(pairwise(widths)):
            block = f"temporal.{theirs}.network.{k}."
            for conv, alias, inputs in (("conv1", "net.0", i), ("conv2", "net.4", o)):
                random(f"{block}{conv}.bias", o, scale=0.1)
                random(f"{block}{conv}.weight_g", o, 1, 1)
                random(f"{block}{conv}.weight_v", o, inputs, kernel)
                if aliases:
                    w |= {f"{block}{alias}.{p}": w[f"{block}{conv}.{p}"] for p in ("bias", "weight_g", "weight_v")}
            if i != o:
                random(f"{block}downsample.weight", o, i, 1, scale=i**-0.5)
                random(f"{block}downsample.bias", o, scale=0.1)
        batch_norm(f"bn.{theirs}", widths[-1])
    dims = (visual[-1], audio[-1])
    for t in range(iterations):
        layer = f"{name}.coattn.dcn_layers.{t}."
        linear(f"{layer}dense_coattn.query_linear", sum(dims), sum(dims))
        for m, d_m in enumerate(dims):
            # Frames are normalised, so that entries are of size 1 / sqrt(d_m); updates shall be no larger.
            linear(f"{layer}dense_coattn.key{m + 1}_linear", length, length, math.sqrt(d_m * sum(dims)))
            linear(f"{layer}dense_coattn.value{m + 1}_linear", d_m, d_m)
            linear(f"{layer}linears.{m}.0", sum(dims), d_m, d_m**-0.5)
    for (_, modality), d_m in zip(modalities(), dims, strict=True):
        stages = [(f"_stage{t + 1}", t + 2) for t in range(iterations)] + [("_stage", iterations)]
        for suffix, ways in [("", iterations + 1)] if name == "GRJCA" else stages:
            linear(f"{name}.{modality}_gating_fc_layer{suffix}", d_m, ways, 0.1 * math.sqrt(d_m))
    linear("regressor1", sum(dims), hidden)
    batch_norm("bn1", hidden)
    linear("regressor2", hidden, 1)
    return w
