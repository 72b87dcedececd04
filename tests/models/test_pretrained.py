"""Pretrained networks: loaded whole or refused, and what a failed download says."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

from densegrpo_fast.common.pretrained import fetch, load_network


def refusal(kind: type[errors.HfHubHTTPError]) -> errors.HfHubHTTPError:
    """An error of the hub's client, made without a server."""
    error = kind.__new__(kind)
    Exception.__init__(error, "client error for url")
    return error


class ConnectTimeout(Exception):
    """As the HTTP library's, no ConnectionError."""


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        (refusal(errors.GatedRepoError), r"accept the terms at https://huggingface.co/owner/name, then log in"),
        (refusal(errors.RepositoryNotFoundError), r"there is no https://huggingface.co/owner/name, or it is private"),
        (refusal(errors.RevisionNotFoundError), r"no such revision of https://huggingface.co/owner/name"),
        (errors.OfflineModeIsEnabled("offline"), r"HF_HUB_OFFLINE forbids"),
        (ConnectTimeout(), r"the hub cannot be reached"),
        (errors.HFValidationError("Repo id must use alphanumeric chars"), r"Repo id must use alphanumeric chars"),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_failed_download_says_why(
    monkeypatch: pytest.MonkeyPatch, cause: Exception, expected: str, wrapped: bool
) -> None:
    def download(*_: object, **__: object) -> str:
        if not wrapped or isinstance(cause, ValueError):
            raise cause
        # as the client does when it looks into the cache after a failure
        raise OSError("not cached") from cause

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(OSError, match=expected):
        fetch("owner/name", ["config.json"])


@pytest.fixture
def t5(tmp_path: Path) -> Path:
    """A tiny T5 encoder as transformers saves it, its tied embedding once."""
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    T5EncoderModel(T5Config(vocab_size=12, **sizes)).save_pretrained(tmp_path)
    return tmp_path


def test_a_tied_tensor_is_not_missing(t5: Path) -> None:
    from transformers import T5EncoderModel

    assert len(load_file(t5 / "model.safetensors")) < len(T5EncoderModel.from_pretrained(t5).state_dict())
    network = load_network(T5EncoderModel, t5, torch.bfloat16)
    assert network.encoder.embed_tokens.weight is network.shared.weight
    assert network.shared.weight.dtype == torch.bfloat16
    assert not network.training


def test_a_missing_tensor_is_never_made_up(t5: Path) -> None:
    from transformers import T5EncoderModel

    tensors = load_file(t5 / "model.safetensors")
    del tensors["shared.weight"]
    save_file(tensors, t5 / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OSError, match=r"lack \d of the network's tensors"):
        load_network(T5EncoderModel, t5, torch.float32)
