"""Files and settings that people really have: each is read for what it means, or refused in one clear line."""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import unicodedata
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from densegrpo_fast.common.errors import OutputError, SetupError, UsageError, UserError
from densegrpo_fast.common.files import replace_text
from densegrpo_fast.config.cli import load_config, parse_arguments
from densegrpo_fast.config.yaml_files import parse_yaml
from densegrpo_fast.models.loading import load_pipeline
from densegrpo_fast.models.tiny import tiny_model
from densegrpo_fast.rewards.ocr import similarity
from densegrpo_fast.run_files.images import read_picture, save_picture
from densegrpo_fast.run_files.model_refs import locate
from densegrpo_fast.run_files.run_directory import open_run_directory
from densegrpo_fast.sample import main as sample
from densegrpo_fast.sampling.oom_backoff import OomBackoff
from densegrpo_fast.training.prompts import PromptSampler, TrainingPrompts, load_prompts

# pictures


def test_16_bit_grey_is_scaled(tmp_path: Path) -> None:
    levels = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    Image.fromarray(levels).save(tmp_path / "grey.png")
    expected = torch.tensor([0, 1 / 255, 128 / 255, 1]).expand(3, 1, 4)
    torch.testing.assert_close(read_picture(tmp_path / "grey.png")[0], expected)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_numbers_without_a_white_are_refused(mode: str, tmp_path: Path) -> None:
    Image.new(mode, (4, 4), 1).save(tmp_path / "picture.tiff")
    with pytest.raises(OSError, match=f"mode {mode} does not say which number is white"):
        read_picture(tmp_path / "picture.tiff")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_pictures_of_every_mode(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("picture.tiff" if mode in ("CMYK", "YCbCr") else "picture.png")
    Image.new("RGB", (6, 4), (255, 255, 255)).convert(mode).save(path)
    picture, _ = read_picture(path)
    torch.testing.assert_close(picture, torch.ones(3, 4, 6), rtol=0, atol=0.01)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(orientation: int, tmp_path: Path) -> None:
    upright = Image.new("RGB", (3, 2))
    upright.putpixel((0, 0), (255, 0, 0))
    turned = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    (upright if turned is None else upright.transpose(turned)).save(tmp_path / "photo.png", exif=exif)
    picture, _ = read_picture(tmp_path / "photo.png")
    assert picture.shape == (3, 2, 3) and picture[0, 0, 0] == 1 and picture.sum() == 1


def test_only_prompts_of_our_own_are_trusted(tmp_path: Path) -> None:
    graph = PngInfo()
    graph.add_text("prompt", json.dumps({"3": {"class_type": "KSampler"}}))
    graph.add_text("workflow", "{}")
    Image.new("RGB", (4, 4)).save(tmp_path / "comfy.png", pnginfo=graph)
    assert read_picture(tmp_path / "comfy.png")[1] == {}
    save_picture(torch.zeros(3, 4, 4), tmp_path / "own.png", {"prompt": "a cat", "seed": "3"})
    assert read_picture(tmp_path / "own.png")[1] == {"prompt": "a cat", "seed": "3"}
    earlier = PngInfo()
    earlier.add_itxt("prompt", "a dog")
    earlier.add_itxt("seed", "4")
    Image.new("RGB", (4, 4)).save(tmp_path / "earlier.png", pnginfo=earlier)
    assert read_picture(tmp_path / "earlier.png")[1] == {"prompt": "a dog", "seed": "4"}


@pytest.mark.parametrize("size", [(60_000, 60_000), (20_000, 10_000), (9_000, 9_000)])
def test_enormous_pictures_are_refused_before_they_are_read(size: tuple[int, int], tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"\0" * 9))
    (tmp_path / "large.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head)
    with pytest.raises(OSError, match="pixels|DecompressionBombError"):
        read_picture(tmp_path / "large.png")


# texts


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (unicodedata.normalize("NFD", "café"), "café"),
        ("ｃａｆｅ　１２", "cafe 12"),
        ("don’t “stop”", 'don\'t "stop"'),
        ("ﬁne", "fine"),
        ("ÀÉ", "àé"),
    ],
)
def test_equal_texts_are_equal_in_any_coding(found: str, wanted: str) -> None:
    assert similarity(found, wanted) == similarity(wanted, found) == 1
    assert similarity("cafe", "café") == 0.75


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_prompts_with_any_end_of_line(ending: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(ending.join(["a cat", "a dog", ""]).encode())
    assert load_prompts(path).prompts == ("a cat", "a dog")


def test_tables_of_prompts(tmp_path: Path) -> None:
    (tmp_path / "parti.tsv").write_text("Prompt\tCategory\tChallenge\tNote\na cat\tAnimals\tBasic\t\na, b\tArts\t\tx\n")
    found = load_prompts(tmp_path / "parti.tsv")
    assert found.prompts == ("a cat", "a, b")
    assert found.metadata[0] == {
        "Prompt": "a cat",
        "Category": "Animals",
        "Challenge": "Basic",
        "Note": "",
        "prompt": "a cat",
    }
    (tmp_path / "draw.csv").write_text('prompt,kind\r\n"a, b",x\r\n', newline="")
    assert load_prompts(tmp_path / "draw.csv").prompts == ("a, b",)
    for text, words in (
        ("text,kind\na,b\n", "a column prompt"),
        ("prompt,k\n", "one row"),
        ("prompt,k\n,b\n", "row 1: empty"),
    ):
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(UsageError, match=words):
            load_prompts(tmp_path / "bad.csv")


def test_a_prompt_that_is_no_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        sample(["a \udcff", "--output", str(tmp_path / "out")])
    assert stop.value.code == 2 and "expected prompts in UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["!!timestamp x", "!!bool x", "!!int x", "!!float [1]", "!!binary x", "!!set x", "!!omap x"]
)
def test_yaml_with_tags_of_its_own_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="^mine"):
        parse_yaml(text, "mine")


# models


@pytest.fixture
def model(pipeline_directory: Path, tmp_path: Path) -> Path:
    """A copy of a pipeline directory, to be changed."""
    return shutil.copytree(pipeline_directory, tmp_path / "model")


def loaded(directory: Path, **options: Any) -> Any:
    return load_pipeline(
        str(directory), device=torch.device("cpu"), dtype=torch.float32, max_sequence_length=0, **options
    )


def changed(path: Path, **settings: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    ("part", "settings", "words"),
    [
        ("transformer", {"quantization_config": {"bnb_4bit_quant_type": "nf4"}}, r"transformer: .*quantised \(nf4\)"),
        (
            "transformer",
            {"num_layers": 1_000_000},
            "transformer: its config.json asks for num_layers 1000000, its weights",
        ),
        ("text_encoder", {"num_hidden_layers": 10**12}, "text_encoder: its config.json asks for num_hidden_layers"),
        ("transformer", {"num_attention_heads": "four"}, "transformer: "),
        ("transformer", {"patch_size": None}, "transformer: "),
        ("transformer", {"attention_head_dim": -1}, "transformer: "),
        ("vae", {"block_out_channels": "wide"}, "vae: "),
        ("text_encoder", {"hidden_size": "x"}, "text_encoder: "),
        ("transformer", {"pos_embed_max_size": [[]]}, "transformer: |its settings do not fit"),
        ("vae", {"scaling_factor": "x"}, "vae: scaling_factor: expected finite numbers, got 'x'"),
        ("vae", {"scaling_factor": math.inf}, "vae: scaling_factor: expected finite numbers"),
        ("vae", {"shift_factor": [math.nan]}, "vae: shift_factor: expected finite numbers"),
        ("vae", {"latents_std": {}}, "vae: latents_std: expected finite numbers"),
    ],
)
def test_configurations_of_networks_that_are_none(model: Path, part: str, settings: dict[str, Any], words: str) -> None:
    changed(model / part / "config.json", **settings)
    with pytest.raises(UserError, match=words):
        loaded(model)


def test_parts_that_do_not_fit_each_other(tmp_path: Path) -> None:
    tiny_model("StableDiffusionXLPipeline").pipeline.save_pretrained(tmp_path)
    changed(tmp_path / "vae" / "config.json", block_out_channels=[32], layers_per_block=1)
    with pytest.raises(SetupError, match="vae: "):
        loaded(tmp_path)
    tiny_model("FluxPipeline").pipeline.save_pretrained(tmp_path / "flux")
    changed(tmp_path / "flux" / "scheduler" / "scheduler_config.json", use_dynamic_shifting=True, base_shift=[1])
    with pytest.raises(SetupError, match="its settings do not fit: TypeError"):
        loaded(tmp_path / "flux", height=64, width=64)


@pytest.mark.parametrize("name", ["x" * 300, "~nobody-here/x", "x/" * 3000])
def test_names_that_are_no_adapters(name: str) -> None:
    with pytest.raises(SetupError, match="there is no such file or directory"):
        locate(name)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_karras_sigmas": True, "use_beta_sigmas": True},
        {"use_karras_sigmas": "yes"},
        {"num_train_timesteps": "many"},
        {"num_train_timesteps": 10**15},
        {"shift": None},
        {"shift": float("nan")},
    ],
)
def test_settings_of_schedulers_that_are_none(model: Path, settings: dict[str, Any]) -> None:
    changed(model / "scheduler" / "scheduler_config.json", **settings)
    with pytest.raises(UserError, match="scheduler"):
        loaded(model)


def test_a_deeply_nested_configuration_is_refused(model: Path) -> None:
    (model / "transformer" / "config.json").write_text("[" * 100_000)
    with pytest.raises(SetupError, match="its config.json is not a JSON object"):
        loaded(model)


def test_a_variant_alone_is_loaded(model: Path) -> None:
    expected = loaded(model).network.state_dict()
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        (file,) = (model / part).glob("*.safetensors")
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    found = loaded(model).network.state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_a_tokenizer_without_a_limit_takes_the_encoder_s(model: Path) -> None:
    settings = json.loads((model / "tokenizer" / "tokenizer_config.json").read_text())
    del settings["model_max_length"]
    (model / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    # another says more than the encoder can read
    changed(model / "tokenizer_2" / "tokenizer_config.json", model_max_length=100_000)
    found = loaded(model)
    assert found.pipeline.tokenizer_2.model_max_length == found.pipeline.tokenizer.model_max_length
    assert found.pipeline.tokenizer.model_max_length == found.pipeline.text_encoder.config.max_position_embeddings
    assert found.encode(["a red circle " * 50]).prompts["embeds"].isfinite().all()


@pytest.mark.parametrize("limit", ["77", 0, -1, True, [], math.nan])
def test_a_limit_of_a_tokenizer_that_is_none(model: Path, limit: object) -> None:
    changed(model / "tokenizer" / "tokenizer_config.json", model_max_length=limit)
    with pytest.raises(SetupError, match="tokenizer: "):
        loaded(model)


def test_a_folder_of_the_hub_s_cache_leads_to_its_snapshot(model: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--x--y" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    model.rename(snapshot)
    with pytest.raises(SetupError, match=f"a folder of the hub's cache, give {snapshot}"):
        loaded(tmp_path / "models--x--y")


@pytest.mark.parametrize(("size", "words"), [(24, "expected a multiple of"), (4096, "expected at most")])
def test_sizes_that_the_model_does_not_know(model: Path, size: int, words: str) -> None:
    with pytest.raises(UsageError, match=f"model.height: {words}"):
        loaded(model, height=size - size % 8 + (4 if size == 24 else 0), width=size)


def test_shards_of_which_one_is_damaged(model: Path) -> None:
    (file,) = (model / "transformer").glob("*.safetensors")
    weights = load_file(file)
    names = sorted(weights)
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    index: dict[str, str] = {}
    for number, part in enumerate(halves, start=1):
        shard = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, file.with_name(shard), {"format": "pt"})
        index |= dict.fromkeys(part, shard)
    file.unlink()
    path = file.with_name("diffusion_pytorch_model.safetensors.index.json")
    path.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert loaded(model)
    file.with_name("diffusion_pytorch_model-00002-of-00002.safetensors").write_bytes(b"cut off")
    with pytest.raises(
        SetupError, match="transformer: diffusion_pytorch_model-00002-of-00002.safetensors cannot be read"
    ):
        loaded(model)


# settings


@pytest.mark.parametrize(
    "settings",
    [
        {"data.num_prompts": 65536, "sampler.group_size": 4096},
        {"evaluation.samples_per_prompt": 10**9},
        {"sampler.micro_batch": 2**40},
        {"lookahead.chunk": 10**30},
        {"sampler.num_steps": 10**6},
        {"run.iterations": 2**40},
    ],
)
def test_sizes_have_limits(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        load_config("embedded_dense", settings)
    assert list(settings)[0] in str(caught.value)


def test_a_long_run_starts_as_fast_as_a_short_one() -> None:
    sampler = PromptSampler(7, 3, 0)
    prompts = TrainingPrompts(load_config_prompts(7), sampler, 2)
    assert prompts.used(2**31 - 1) == prompts.used(3) and len(prompts.used(2)) == 6


def load_config_prompts(count: int) -> Any:
    from densegrpo_fast.training.prompts import PromptSet

    return PromptSet(tuple(map(str, range(count))), ({},) * count)


def test_names_that_no_file_system_has(train: Callable[..., int], tmp_path: Path) -> None:
    long = tmp_path / ("x" * 300)
    assert train(long) == 7
    assert train(tmp_path / "run", **{"model.path": long}) == 7
    for arguments in ([f"--resume={long}"], ["--config", f"{long}.yaml"]):
        with pytest.raises((UserError, OSError)):
            parse_arguments(arguments)


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("sample", ["a cat", "--output"]),
        ("evaluate", ["base", "--json"]),
        ("preview", ["--output"]),
        ("calibrate", ["--output"]),
        ("fidelity.__main__", ["--json"]),
    ],
)
def test_outputs_that_no_file_system_has(
    command: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found before anything is loaded, and named by the option."""
    for name in ("x" * 300, "x" * 300 + "/a.json"):
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(f"densegrpo_fast.{command}").main([*arguments, str(tmp_path / name)])
        assert stop.value.code == 7
        told = capsys.readouterr().err
        assert told.startswith(f"error: {arguments[-1]}: ") and "traceback" not in told and told.count("\n") == 1


def interrupted(number: signal.Signals, tmp_path: Path) -> tuple[int, str]:
    """Status and stderr of training that is sent a signal while it imports torch."""
    stub = tmp_path / "torch"
    stub.mkdir(exist_ok=True)
    (stub / "__init__.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).resolve().parents[2])])
    command = [sys.executable, "-m", "densegrpo_fast.train", f"--run.output_dir={tmp_path / 'run'}"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "importing\n"
        process.send_signal(number)
        _, told = process.communicate(timeout=60)
    return process.returncode, told


def test_a_signal_while_a_command_starts_is_no_traceback(tmp_path: Path) -> None:
    for number, statuses in ((signal.SIGINT, (130, -signal.SIGINT)), (signal.SIGTERM, (-signal.SIGTERM,))):
        status, told = interrupted(number, tmp_path)
        assert status in statuses and "Traceback" not in told
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_reward_file_that_is_not_there_is_said_before_torch_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from densegrpo_fast import train\n"
        "try:\n"
        "    train.main(['--reward.terms={nowhere.py:score: 1.0}', '--reward.observed=[]'])\n"
        "except SystemExit as stop:\n"
        "    assert stop.code == 2\n"
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0 and "reward.terms: nowhere.py:score: there is no file" in result.stderr
    assert not list(tmp_path.iterdir())


def test_the_cpu_s_memory_running_out_lowers_the_rows() -> None:
    rows, seen = OomBackoff(8, "sampler.micro_batch"), []

    def work(count: int) -> int:
        seen.append(count)
        if count > 2:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: not enough memory: you tried")
        return count

    assert rows.fitting(work) == 2 and seen == [8, 4, 2]
    with pytest.raises(RuntimeError, match="another"):
        rows.fitting(lambda count: (_ for _ in ()).throw(RuntimeError("another")))


# what may not be written or read


def started(path: Path) -> None:
    with open_run_directory(path, resume=False, overwrite=False):
        pass


def test_a_place_without_permission_is_named(tmp_path: Path) -> None:
    """As somebody else where the tests run as root, to whom everything is permitted."""
    place = Path(tempfile.mkdtemp())
    (place / "secret").mkdir()
    cases: list[tuple[Callable[[Path], object], Path, type[UserError]]] = [
        (started, place / "run", OutputError),
        (lambda path: replace_text(path, "text"), place / "file", OutputError),
        (lambda path: locate(str(path)), place / "secret" / "adapter", SetupError),
        (load_prompts, place / "secret" / "prompts.txt", UsageError),
    ]
    for call, path, _ in cases:
        # nothing is to be imported by the other user, who may not read the modules either
        with suppress(UserError):
            call(tmp_path / path.name)
    (place / "secret").chmod(0)
    place.chmod(0o555)
    try:
        for call, path, kind in cases:
            reader, writer = os.pipe()
            if (child := os.fork()) == 0:
                try:
                    if os.geteuid() == 0:
                        os.setuid(65534)
                    call(path)
                except BaseException as error:
                    os.write(writer, f"{type(error).__name__}: {error}".encode())
                finally:
                    os._exit(0)
            os.close(writer)
            os.waitpid(child, 0)
            with os.fdopen(reader) as told:
                found = told.read()
            assert found.startswith(f"{kind.__name__}: ") and str(path) in found, found
    finally:
        for path in (place, place / "secret"):
            path.chmod(0o755)
        shutil.rmtree(place)
