"""Adapters, models, pictures and prompts as people have them, sound and damaged, drawn by a seed.

What is to become of each is "sound" (taken for what it is), "refused", or "either" where no rule could tell.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save, save_file
from torch import Tensor


def changed(data: bytes, draw: random.Random) -> bytes:
    """Data after a few changes of single bytes, cuts and repetitions."""
    found = bytearray(data)
    for _ in range(draw.randint(1, 6)):
        if not found:
            break
        place, kind = draw.randrange(len(found)), draw.randrange(4)
        if kind == 0:
            found[place] = draw.randrange(256)
        elif kind == 1:
            del found[place : place + draw.randint(1, 20)]
        elif kind == 2:
            found[place:place] = found[place : place + draw.randint(1, 20)]
        else:
            del found[place:]
    return bytes(found)


def flipped(data: bytes, draw: random.Random) -> bytes:
    """Data with one bit changed."""
    found = bytearray(data)
    found[draw.randrange(len(found))] ^= 1 << draw.randrange(8)
    return bytes(found)


ODD = [None, True, -1, 0, 10**30, 1e308, math.inf, math.nan, "", "x" * 5000, [], {}, [[]], {"a": {"b": []}}, "\0"]

# adapters, of the tiny model of SD3.5's form

MODULES = {
    "transformer_blocks.0.attn.to_q": ("joint_blocks.0.x_block.attn.qkv", 0),
    "transformer_blocks.0.attn.to_out.0": ("joint_blocks.0.x_block.attn.proj", None),
    "transformer_blocks.1.attn.add_k_proj": ("joint_blocks.1.context_block.attn.qkv", 1),
    "transformer_blocks.0.ff.net.2": ("joint_blocks.0.x_block.mlp.fc2", None),
}
"""Layer by the names of diffusers -> by those of the original code, and its place where that makes three of one."""

ADAPTER_FAULTS: dict[str, Callable[[dict[str, Tensor], dict[str, Any], random.Random], None]] = {
    "nan": lambda tensors, settings, draw: poison(tensors, draw, math.nan),
    "inf": lambda tensors, settings, draw: poison(tensors, draw, math.inf),
    "overflow": lambda tensors, settings, draw: scale(tensors, settings, 3e38),
    "infinite alpha": lambda tensors, settings, draw: scale(tensors, settings, math.inf),
    "alpha that is none": lambda tensors, settings, draw: scale(tensors, settings, math.nan),
    "no rank": lambda tensors, settings, draw: each(tensors, lambda name, t: t[:0] if half(name) == 0 else t[:, :0]),
    "half": lambda tensors, settings, draw: tensors.pop(draw.choice([name for name in tensors if half(name) == 1])),
    "other shape": lambda tensors, settings, draw: each(tensors, lambda name, t: t[:, :-1] if half(name) == 0 else t),
    "turned": lambda tensors, settings, draw: each(tensors, lambda name, t: t.T.contiguous()),
    "whole numbers": lambda tensors, settings, draw: each(tensors, lambda name, t: (9 * t).to(torch.int8)),
    "dora": lambda tensors, settings, draw: tensors.update({f"{layer(tensors)}.dora_scale": torch.ones(4)}),
    "loha": lambda tensors, settings, draw: tensors.update({f"{layer(tensors)}.hada_w1_a": torch.ones(4, 2)}),
    "lokr": lambda tensors, settings, draw: tensors.update({f"{layer(tensors)}.lokr_w1": torch.ones(4, 2)}),
    "text": lambda tensors, settings, draw: tensors.update({"text_encoder.x.lora_A.weight": torch.ones(2, 4)}),
    "convolution": lambda tensors, settings, draw: each(tensors, lambda name, t: t[..., None, None]),
    "stray": lambda tensors, settings, draw: tensors.update({draw.choice(["x", "vae.y.weight"]): torch.ones(2)}),
    "unknown layer": lambda tensors, settings, draw: rename(tensors, "blocks", "blokcs"),
    "nothing": lambda tensors, settings, draw: tensors.clear(),
}


def half(name: str) -> int | None:
    """Whether a tensor is the first or second factor of an update."""
    return next(
        (number for number, parts in enumerate((("_A", "down"), ("_B", "up"))) for p in parts if p in name), None
    )


def layer(tensors: dict[str, Tensor]) -> str:
    return sorted(name for name in tensors if half(name) == 0)[0].rpartition(".lora")[0]


def each(tensors: dict[str, Tensor], change: Callable[[str, Tensor], Tensor]) -> None:
    tensors.update({name: change(name, t).contiguous() for name, t in tensors.items() if half(name) is not None})


def rename(tensors: dict[str, Tensor], old: str, new: str) -> None:
    renamed = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    tensors.clear()
    tensors.update(renamed)


def poison(tensors: dict[str, Tensor], draw: random.Random, value: float) -> None:
    name = draw.choice([name for name in tensors if half(name) is not None])
    tensors[name].view(-1)[draw.randrange(tensors[name].numel())] = value


def scale(tensors: dict[str, Tensor], settings: dict[str, Any], value: float) -> None:
    """An alpha of every layer, where this form of file has it."""
    if settings:
        settings["lora_alpha"] = value * 16 if math.isfinite(value) else value
        settings["alpha_pattern"] = {}
    else:
        for name in {name.rpartition(".lora")[0] for name in tensors if half(name) is not None}:
            tensors[f"{name}.alpha"] = torch.tensor(value)
    each(tensors, lambda name, t: 50 * t if half(name) == 1 else t)


def adapter(draw: random.Random, directory: Path) -> tuple[str, str]:
    """Write an adapter in one of the forms that tools save; returns what a user would name, and what is to come of it.

    Beside a sound one lies NAME.expected, the updates that it stands for.
    """
    form = draw.choice(["diffusers", "metadata", "peft", "comfy", "original", "kohya"])
    rank, generator = draw.randint(1, 4), torch.Generator().manual_seed(draw.getrandbits(31))
    settings: dict[str, Any] = {}
    if form in ("metadata", "peft"):
        settings = {"peft_type": "LORA", "r": rank, "lora_alpha": draw.choice([rank, 1, 2.5, 16])}
        settings |= {"use_rslora": draw.random() < 0.4, "target_modules": ["attn.to_q"], "rank_pattern": {}}
        settings["alpha_pattern"] = draw.choice([{}, {"attn.to_q": 3}, {r"transformer_blocks\.0\..*": 5}])
    tensors: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    names = {"diffusers": ("lora_A", "lora_B"), "metadata": ("lora_A", "lora_B"), "peft": ("lora_A", "lora_B")}
    down, up = names.get(form) or draw.choice([("lora_down", "lora_up"), ("lora.down", "lora.up")])
    prefix = {"peft": "base_model.model.", "comfy": "diffusion_model.", "original": "diffusion_model."}
    prefix |= {"diffusers": draw.choice(["transformer.", "", "model.diffusion_model."]), "metadata": "transformer."}
    dtype = draw.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16])
    for module in draw.sample(list(MODULES), draw.randint(1, len(MODULES))):
        original, place = MODULES[module]
        named, parts = (module, 1) if form in ("diffusers", "metadata", "peft", "comfy") else (original, 3)
        parts = 1 if place is None else parts
        inputs = 128 if module.endswith("ff.net.2") else 32
        a = torch.randn(rank, inputs, generator=generator).to(dtype)
        b = (0.3 * torch.randn(32 * parts, rank, generator=generator)).to(dtype)
        stem = prefix.get(form, "") + named
        if form == "kohya":
            stem, down, up = "lora_unet_" + named.replace(".", "_"), "lora_down", "lora_up"
        tensors |= {f"{stem}.{down}.weight": a, f"{stem}.{up}.weight": b}
        factor = 1.0
        if settings:
            alpha = next((v for key, v in settings["alpha_pattern"].items() if matches(key, module)), None)
            alpha = settings["lora_alpha"] if alpha is None else alpha
            factor = alpha / (math.sqrt(rank) if settings["use_rslora"] else rank)
        elif draw.random() < 0.5:
            alpha = draw.choice([0.5, 1.0, 8.0])
            tensors[f"{stem}.alpha"], factor = torch.tensor(alpha), alpha / rank
        update = factor * b.float() @ a.float()
        for number, part in enumerate(update.chunk(parts)):
            whole = module.rpartition(".")[0]
            fused = [("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")]["add" in module]
            expected[module if parts == 1 else f"{whole}.{fused[number]}"] = part.contiguous()
    fault = draw.choice([None, None, None, "bytes", "settings", "pickle", "name", *ADAPTER_FAULTS])
    outcome = "sound" if fault is None else "either" if fault in ("bytes", "settings") else "refused"
    if fault in ADAPTER_FAULTS:
        ADAPTER_FAULTS[fault](tensors, settings, draw)
    if fault == "settings" and settings:
        settings[draw.choice([*settings, "use_dora", "bias", "modules_to_save"])] = draw.choice(ODD)
    folder = directory / draw.choice(["lora", "my lora", "ŁoRA’s", "v1.0"])
    folder.mkdir()
    save_file(expected, folder.with_suffix(".expected"))
    named = folder
    if form == "peft":
        file = folder / "adapter_model.safetensors"
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        save_file(tensors, file)
    else:
        kept = {f"transformer.{key}": value for key, value in settings.items()}
        header = {"format": "pt"} | ({"lora_adapter_metadata": json.dumps(kept)} if form == "metadata" else {})
        file = folder / "pytorch_lora_weights.safetensors"
        save_file(tensors, file, header)
    if fault == "bytes":
        damaged = draw.choice(sorted(folder.iterdir()))
        damaged.write_bytes(changed(damaged.read_bytes(), draw))
    if fault == "pickle":
        file.rename(file.with_suffix(".bin"))
    if fault == "name":
        named = folder / draw.choice(["absent", "x" * 300, "~nobody-here/x", "\n"])
    return str(named), outcome


def matches(pattern: str, module: str) -> bool:
    import re

    return re.fullmatch(rf"(.*\.)?({pattern})", module) is not None


# models


def settings_of(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def rewrite(path: Path, **settings: Any) -> None:
    path.write_text(json.dumps(settings_of(path) | settings))


def weights_of(model: Path, draw: random.Random) -> Path:
    return draw.choice(sorted(model.glob("[!p]*/*.safetensors")))


def network(model: Path) -> Path:
    return next(model / name for name in ("transformer", "unet") if (model / name).is_dir())


def index_of(model: Path) -> dict[str, Any]:
    return settings_of(model / "model_index.json")


def as_variant(model: Path, draw: random.Random) -> None:
    for file in model.glob("*/*.safetensors"):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))


def as_shards(model: Path, draw: random.Random) -> None:
    file = weights_of(model, draw)
    weights = load_file(file)
    names, index = sorted(weights), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"{file.stem}-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, file.with_name(shard), {"format": "pt"})
        index |= dict.fromkeys(part, shard)
    file.unlink()
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    file.with_name(f"{file.name}.index.json").write_text(text)


def in_half(model: Path, draw: random.Random) -> None:
    file = weights_of(model, draw)
    halves = {name: t.bfloat16() if t.is_floating_point() else t for name, t in load_file(file).items()}
    save_file(halves, file, {"format": "pt"})


def as_snapshot(model: Path, draw: random.Random) -> None:
    """As the hub's cache has it: links to files that are named by their content."""
    blobs = model.parent / f"{model.name}-blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(path for path in model.rglob("*") if path.is_file())):
        shutil.move(file, blobs / str(number))
        file.symlink_to(os.path.relpath(blobs / str(number), file.parent))


def with_company(model: Path, draw: random.Random) -> None:
    (model / ".git").mkdir()
    (model / ".git" / "config").write_text("x")
    (model / "README.md").write_text("---\nlicense: mit\n---\n")
    (network(model) / ".DS_Store").write_bytes(b"\0\1")
    (model / "pickscore.bin").write_bytes(b"\x80\4")
    rewrite(model / "model_index.json", _name_or_path="C:\\models\\sd", _diffusers_version="9.9", unheard_of=[1])


def with_marks(model: Path, draw: random.Random) -> None:
    """Configurations with Windows' line ends and indentation."""
    for file in model.glob("*/*config.json"):
        file.write_bytes(json.dumps(settings_of(file), indent=4).replace("\n", "\r\n").encode())


def one_tensor(change: Callable[[Tensor], Tensor | None]) -> Callable[[Path, random.Random], None]:
    def apply(model: Path, draw: random.Random) -> None:
        file = weights_of(model, draw)
        weights = load_file(file)
        # what is tied or a buffer may be absent
        name = draw.choice([n for n, t in sorted(weights.items()) if t.is_floating_point() and "pos_embed" not in n])
        if (tensor := change(weights.pop(name))) is not None:
            weights[name] = tensor.contiguous()
        save_file(weights, file, {"format": "pt"})

    return apply


def broken(tensor: Tensor) -> Tensor:
    tensor.view(-1)[-1] = math.nan
    return tensor


def file_instead(content: bytes) -> Callable[[Path, random.Random], None]:
    return lambda model, draw: None if weights_of(model, draw).write_bytes(content) else None


def odd_setting(model: Path, draw: random.Random) -> None:
    file = draw.choice([*sorted(model.glob("*/*config.json")), model / "model_index.json"])
    settings = settings_of(file)
    key = draw.choice(sorted(settings))
    rewrite(file, **{key: draw.choice(ODD)})


def odd_bytes(model: Path, draw: random.Random) -> None:
    file = draw.choice(sorted(path for path in model.rglob("*") if path.is_file() and path.stat().st_size))
    file.write_bytes(changed(file.read_bytes(), draw))


def pickles(model: Path, draw: random.Random) -> None:
    file = weights_of(model, draw)
    file.rename(file.with_suffix(".bin"))


def absent(model: Path, draw: random.Random) -> None:
    place = draw.choice([network(model).name, "vae", "tokenizer", "text_encoder", "scheduler", "model_index.json"])
    shutil.rmtree(model / place) if (model / place).is_dir() else (model / place).unlink()


def lost_t5(model: Path, draw: random.Random) -> None:
    """The index lists an encoder or a tokenizer that is not there."""
    part = draw.choice(["text_encoder_3", "tokenizer_3"] if "3P" in str(index_of(model)) else ["text_encoder"])
    shutil.rmtree(model / part, ignore_errors=True)
    rewrite(model / "model_index.json", **{part: ["transformers", "T5EncoderModel"]})


MODEL_CHANGES: dict[str, list[Callable[[Path, random.Random], Any]]] = {
    "sound": [as_variant, as_shards, in_half, as_snapshot, with_company, with_marks],
    "refused": [
        one_tensor(broken),
        one_tensor(lambda tensor: None),
        one_tensor(lambda tensor: torch.cat([tensor, tensor])),
        file_instead(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        file_instead(b"\0"),
        pickles,
        absent,
        lambda model, draw: (network(model) / "config.json").write_text("[" * 10**5),
        lambda model, draw: rewrite(network(model) / "config.json", quantization_config={"quant_method": "gguf"}),
        lambda model, draw: rewrite(network(model) / "config.json", _class_name="UVit2DModel"),
        lambda model, draw: rewrite(model / "text_encoder" / "config.json", num_hidden_layers=10**9),
        lambda model, draw: rewrite(model / "model_index.json", _class_name="CogVideoXPipeline"),
        lambda model, draw: rewrite(model / "scheduler" / "scheduler_config.json", _class_name="CMScheduler"),
        lost_t5,
    ],
    "either": [odd_setting, odd_setting, odd_setting, odd_bytes, odd_bytes],
}


def model(draw: random.Random, original: Path, directory: Path) -> tuple[str, str]:
    """Copy a pipeline and change it; returns its name and what is to come of it."""
    found = directory / draw.choice(["model", "my model", "Ünïcode’s"])
    shutil.copytree(original, found)
    outcome = draw.choice(["sound", "refused", "either", "either"])
    draw.choice(MODEL_CHANGES[outcome])(found, draw)
    return str(found), outcome


# files


def picture(draw: random.Random, path: Path) -> tuple[str, bytes]:
    """The end of a name and the content of a picture of any mode, format and orientation."""
    suffix = draw.choice([".png", ".png", ".jpg", ".webp", ".tiff", ".bmp", ".gif"])
    modes = ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"] if suffix == ".png" else ["L", "RGB"]
    modes += ["CMYK", "F", "I", "I;16"] if suffix == ".tiff" else []
    mode = draw.choice(modes)
    size = draw.choice([(1, 1), (9, 8), (64, 3)])
    noise = np.random.default_rng(draw.getrandbits(31)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    if mode == "I;16":
        image = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    elif mode != "RGB":
        image = image.convert("RGB").convert(mode)
    exif, texts = Image.Exif(), PngInfo()
    exif[0x0112] = draw.choice([1, 3, 6, 8, 0, 99])
    texts.add_text("prompt", json.dumps({"3": {"class_type": "KSampler"}}))
    options: dict[str, Any] = {"exif": exif} if suffix in (".png", ".jpg", ".webp", ".tiff") else {}
    file = path / f"picture{suffix}"
    image.save(file, **options, **({"pnginfo": texts} if suffix == ".png" else {}))
    return suffix, file.read_bytes()


def prompts(draw: random.Random) -> tuple[str, bytes]:
    """The end of a name and the content of a prompt file in one of the published formats."""
    line = draw.choice(["a cat", "an “é” dog", "x" * 1990, '"STOP" on a sign', "猫", "a, b; c"])
    end = draw.choice(["\n", "\r\n", "\r"])
    kind = draw.choice([".txt", ".jsonl", ".tsv", ".csv"])
    records = {
        ".txt": [line, "b"],
        ".jsonl": [json.dumps({"prompt": line, "include": [{"class": "cat", "count": 1}]}), '{"prompt": "b"}'],
        ".tsv": ["Prompt\tCategory", f"{line}\tx".replace('"', ""), "b\ty"],
        ".csv": ["prompt,x", '"a, ""cat""",y', "b,"],
    }[kind]
    mark = draw.choice([b"", b"", b"\xef\xbb\xbf", b"\xff\xfe"])
    return kind, mark + (end.join(records) + draw.choice(["", end])).encode(draw.choice(["utf-8"] * 4 + ["utf-16"]))


def lora_file(draw: random.Random) -> bytes:
    """An adapter's file of a few bytes, to be damaged."""
    own, original = "transformer.transformer_blocks.0.attn.to_q", "diffusion_model.joint_blocks.0.x_block.attn.qkv"
    module = draw.choice([own, original])
    outputs = 6 if "qkv" in module else 2
    layers = {f"{module}.lora_A.weight": torch.randn(2, 4), f"{module}.lora_B.weight": torch.randn(outputs, 2)}
    settings = json.dumps({"transformer.r": 2, "transformer.lora_alpha": 3})
    return save(layers, {"lora_adapter_metadata": settings} if draw.random() < 0.5 else None)
