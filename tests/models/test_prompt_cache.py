"""The prompt cache: what it holds, what damages it, and a model that lets go of its text encoders."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import pytest
import safetensors.torch
import torch

from densegrpo_fast.common.errors import UserError
from densegrpo_fast.common.exit_codes import ExitCode, exit_code_of
from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.config.sections import ModelOptions
from densegrpo_fast.models import loading
from densegrpo_fast.models.diffusers_model import DiffusersModel
from densegrpo_fast.models.prompt_cache import PromptCache, files_fingerprint
from densegrpo_fast.training.models import load_model, prompt_cache

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "two blue squares", "a red circle"]


def encoded(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {"embeds": torch.randn(5, 8).to(dtype), "mask": torch.arange(5), "pooled": torch.randn(3).to(dtype)}


@pytest.fixture
def cache(tmp_path: Path) -> PromptCache:
    return PromptCache(tmp_path / "deep" / "cache", {"encoders": "one", "dtype": "float32"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_is_found_to_the_bit(cache: PromptCache, dtype: torch.dtype) -> None:
    tensors = encoded(dtype)
    assert cache.find("ein Kreis \u2460") is None and not cache.holds("ein Kreis \u2460")
    cache.keep("ein Kreis \u2460", tensors)
    found = cache.find("ein Kreis \u2460")
    assert found is not None and cache.holds("ein Kreis \u2460")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
    assert [path.name[0] for path in cache.directory.rglob("*") if path.is_file()] != ["."]


def test_names_depend_on_everything_that_the_content_does(cache: PromptCache) -> None:
    others = [cache.settings | {"encoders": "two"}, cache.settings | {"dtype": "bfloat16"}]
    paths = [PromptCache(cache.directory, settings).path("a") for settings in (cache.settings, *others)]
    assert len({*paths, cache.path("b"), cache.path("")}) == 5
    assert paths[0] == cache.path("a")


@pytest.mark.parametrize("damage", ["cut", "flipped", "renamed", "empty"])
def test_a_damaged_file_is_not_believed(cache: PromptCache, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    cache.keep("a", encoded())
    path = cache.path("a")
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[-3] ^= 1
    if damage == "renamed":
        data = data.replace(b'"embeds"', b'"embedz"')
    path.write_bytes(data[: {"cut": len(data) - 4, "empty": 0}.get(damage, len(data))])
    with caplog.at_level(logging.WARNING):
        assert cache.find("a") is None
    assert f"{path} is damaged" in caplog.text and "encoded again" in caplog.text
    # without reading all of it, only the length shows
    assert cache.holds("a") == (damage in ("flipped", "renamed"))
    tensors = encoded()
    cache.keep("a", tensors)
    found = cache.find("a")
    assert found is not None and torch.equal(found["embeds"], tensors["embeds"])


def test_files_of_an_earlier_version_are_read(cache: PromptCache) -> None:
    digest, tensors = hashlib.sha256(), encoded()
    for _, tensor in sorted(tensors.items()):
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    cache.path("a").parent.mkdir(parents=True)
    safetensors.torch.save_file(tensors, cache.path("a"), {"sha256": digest.hexdigest()})
    found = cache.find("a")
    assert found is not None and torch.equal(found["embeds"], tensors["embeds"])
    safetensors.torch.save_file(tensors, cache.path("a"), {"sha256": "0"})
    assert cache.find("a") is None


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="model.prompt_cache: cannot use .*file") as caught:
        PromptCache(tmp_path / "file", {})
    assert exit_code_of(caught.value) == ExitCode.OUTPUT


def test_the_encoders_fingerprint_sees_names_sizes_and_contents(tmp_path: Path) -> None:
    small, large = tmp_path / "config.json", tmp_path / "weights"
    small.write_text("{}")
    large.write_bytes(bytes(1_000_000))
    files = [small, large]
    seen = {files_fingerprint(tmp_path, files)}
    small.write_text("[]")
    seen.add(files_fingerprint(tmp_path, files))
    for position in (0, 999_999):
        data = bytearray(large.read_bytes())
        data[position] = 1
        large.write_bytes(data)
        seen.add(files_fingerprint(tmp_path, files))
    seen.add(files_fingerprint(tmp_path, files[:1]))
    assert len(seen) == 5
    assert files_fingerprint(tmp_path, files[:1]) in seen


def options(directory: Path, **changes: object) -> ModelOptions:
    arguments = [f"model.{key}={value}" for key, value in {"path": directory, **changes}.items()]
    return parse_arguments(arguments)[0].model


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each pipeline that is loaded comes with text encoders."""
    found: list[bool] = []
    original = loading._load_pipeline

    def watched(*arguments: object) -> object:
        pipeline = original(*arguments)
        found.append(pipeline.text_encoder is not None)
        return pipeline

    monkeypatch.setattr(loading, "_load_pipeline", watched)
    return found


def test_a_model_with_a_cache_encodes_as_one_without(
    pipeline_directory: Path, tmp_path: Path, loads: list[bool]
) -> None:
    plain = load_model(options(pipeline_directory), CPU)
    expected = plain.encode(PROMPTS)
    cached = load_model(options(pipeline_directory, prompt_cache=tmp_path), CPU)
    assert loads == [True, False]
    assert cached.prepare(PROMPTS) == 3  # two prompts and the empty one, in one load
    assert loads == [True, False, True]
    found = cached.encode(PROMPTS)
    assert cached.pipeline.text_encoder is None
    assert len(loads) == 3
    for half in ("prompts", "negative"):
        torch.testing.assert_close(getattr(found, half), getattr(expected, half), rtol=1e-5, atol=1e-5)
    assert found.rows.tolist() == expected.rows.tolist() == [0, 1, 0]
    latents, sigma = torch.randn(3, *plain.latent_shape), torch.full((3,), 0.6)
    torch.testing.assert_close(
        cached.velocity(latents, sigma, found, 3.0).combined(),
        plain.velocity(latents, sigma, expected, 3.0).combined(),
        rtol=1e-4,
        atol=1e-4,
    )


def test_a_second_start_loads_no_encoders(pipeline_directory: Path, tmp_path: Path, loads: list[bool]) -> None:
    first = load_model(options(pipeline_directory, prompt_cache=tmp_path), CPU)
    first.prepare(PROMPTS)
    loads.clear()
    second = load_model(options(pipeline_directory, prompt_cache=tmp_path), CPU)
    assert second.prepare(PROMPTS) == 0
    assert torch.equal(second.encode(PROMPTS).prompts["embeds"], first.encode(PROMPTS).prompts["embeds"])
    assert loads == [False]
    # a prompt that nobody prepared is encoded all the same
    assert second.encode(["a green cross"]).prompts["embeds"].shape[0] == 1
    assert loads == [False, True]


def test_a_damaged_entry_is_encoded_again(
    pipeline_directory: Path, tmp_path: Path, loads: list[bool], caplog: pytest.LogCaptureFixture
) -> None:
    chosen = options(pipeline_directory, prompt_cache=tmp_path)
    model = load_model(chosen, CPU)
    model.prepare(PROMPTS)
    before = model.encode(PROMPTS)
    store = prompt_cache(chosen, torch.float32)
    assert store is not None
    path = store.path(PROMPTS[0])
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    loads.clear()
    torch.testing.assert_close(model.encode(PROMPTS).prompts["embeds"], before.prompts["embeds"], rtol=1e-6, atol=1e-6)
    assert loads == [True] and "is damaged" in caplog.text
    assert model.encode(PROMPTS).rows.tolist() == [0, 1, 0] and loads == [True]


@pytest.mark.ci
def test_a_run_trains_on_cached_prompts_to_the_same_numbers(
    train: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from densegrpo_fast.run_files.metrics import read_metrics

    assert callable(train)
    settings = {"run.iterations": 1, "sampler.guidance_scale": 2.0}
    assert train(tmp_path / "plain", **settings) == 0
    cached = settings | {"model.prompt_cache": tmp_path / "cache"}
    assert train(tmp_path / "cached", **cached) == 0
    rewards = [read_metrics(tmp_path / name / "metrics.jsonl")[0]["reward"] for name in ("plain", "cached")]
    assert rewards[1] == pytest.approx(rewards[0], rel=1e-3)

    # everything of the second run, held-out prompts and all, comes from the disk
    def never(*_: object) -> None:
        raise AssertionError("the text encoders were loaded")

    monkeypatch.setattr(DiffusersModel, "_encode_by", never)
    assert train(tmp_path / "again", **cached) == 0
