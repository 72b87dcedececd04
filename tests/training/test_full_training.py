"""Full fine-tuning: half precision with float32 masters, what a run leaves, and runs that several processes share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from torch.distributed.tensor import DTensor

from densegrpo_fast.common.errors import UsageError
from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.models.flops import count, embedded
from densegrpo_fast.models.whole_network import train_whole
from densegrpo_fast.rewards.base import RewardMixture
from densegrpo_fast.run_files.checkpoint import CheckpointManager, newest_settings
from densegrpo_fast.run_files.model_refs import locate, read_weights, with_adapter
from densegrpo_fast.run_files.shared_tensors import read_shared
from densegrpo_fast.training.distributed import World
from densegrpo_fast.training.models import load_model
from densegrpo_fast.training.sharding import shard
from densegrpo_fast.training.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parent))

from worlds import SETTINGS, brightness, commands, policy, together  # noqa: E402

FULL = {"model.train": "full", "optimizer.lr": 1e-3, "objective.kl_coef": 0.1, "run.checkpoint_every": 1}


def velocity(model: FlowModel, guidance: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, *model.latent_shape, generator=generator)
    conditioning = model.encode(["a red circle", "a blue square"])
    return model.velocity(latents, torch.tensor([0.9, 0.4]), conditioning, guidance).combined()


@pytest.mark.ci
def test_half_precision_computes_as_a_plain_network_and_follows_its_masters() -> None:
    plain, model = policy(train="full", dtype=torch.bfloat16), policy(train="full", dtype=torch.bfloat16)
    torch.nn.Module.to(plain.network, torch.bfloat16)
    config = parse_arguments(["--config=embedded_dense", "model.train=full"])[0]
    assert shard(model, config, World(), "none") == 1 and not model.sharded
    with torch.no_grad():
        first = velocity(model)
        assert torch.equal(first, velocity(plain))
    parameters, others = model.trainable_parameters(), plain.trainable_parameters()
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    velocity(model).square().mean().backward()
    velocity(plain).square().mean().backward()
    for name, parameter in others.items():
        assert (parameter.grad is None) == (parameters[name].grad is None)
        if parameter.grad is not None:
            # gradients of several uses are added up in another order, and those of guidance's halves in float32
            expected = parameter.grad.float()
            assert (parameters[name].grad.to_local() - expected).norm() <= 0.02 * expected.norm(), name
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.mul_(1.01)
            others[name].copy_(parameter.to_local())
        # no weights of before the change are left gathered anywhere
        assert torch.equal(velocity(model), velocity(plain))
        with model.reference():
            assert torch.equal(velocity(model), first)
        assert not torch.equal(velocity(model), first)


def test_a_network_that_keeps_parts_in_float32_is_refused_in_half_precision() -> None:
    model = policy(train="full")
    torch.nn.Module.to(model.network, torch.bfloat16)
    model.network._keep_in_fp32_modules = ["norm"]
    with pytest.raises(ValueError, match="model.dtype: expected float32 with model.train full.*keeps norm in float32"):
        train_whole(model, reference=False)


def test_what_needs_an_adapter_is_refused() -> None:
    for option, message in {
        "lora.start=here": "lora.start: expected null with model.train full",
        "lookahead.copy_dtype=float32": "lookahead.copy_dtype: expected null with model.train full",
        "lookahead.plan=auto": "lookahead.plan: auto measures plans for an adapter",
    }.items():
        with pytest.raises(UsageError, match=message):
            parse_arguments(["--config=embedded_dense", "model.train=full", option])


@pytest.mark.ci
def test_a_backward_to_all_weights_costs_more() -> None:
    full, lora = count(embedded(), lora_rank=0), count(embedded(), lora_rank=16)
    assert full.forward == full.reference_forward == lora.reference_forward < lora.forward
    # of each product another two: to the input, and to the weights
    assert 1.9 < full.backward / full.forward < 2.1 and lora.backward < full.backward


@pytest.mark.ci
def test_a_run_resumes_bit_for_bit_and_leaves_a_network_for_diffusers(train: Any, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = FULL | {"ema.every": 1}
    assert train(whole, **options, **{"run.iterations": 3}) == 0
    assert train(parts, **options, **{"run.iterations": 2}) == 0
    # a run of which no network was exported is known by its checkpoint
    exported = safetensors.torch.load_file(parts / "network" / "diffusion_pytorch_model.safetensors")
    (parts / "network").rename(tmp_path / "network-2")
    weights = read_weights(locate(str(parts)))
    assert weights.whole and weights.origin == "running average at iteration 2"
    for name, tensor in weights.layers.items():
        assert torch.equal(tensor, exported[name])
    assert train(parts, "--resume", **options, **{"run.iterations": 3}) == 0
    files = [run / "network" / "diffusion_pytorch_model.safetensors" for run in (whole, parts)]
    assert files[0].read_bytes() == files[1].read_bytes() != (tmp_path / "network-2" / files[0].name).read_bytes()
    assert "_name_or_path" not in (whole / "network" / "config.json").read_text()
    # and diffusers draws with it what the commands of this package draw
    network = SD3Transformer2DModel.from_pretrained(whole / "network")
    config = parse_arguments(["--config", str(whole / "config.yaml")])[0]
    model = load_model(config.model, torch.device("cpu"))
    before = velocity(model)
    ref = locate(str(whole))
    with with_adapter(model, ref, read_weights(ref)):
        drawn = velocity(model)
    assert torch.equal(velocity(model), before) and not torch.equal(drawn, before)
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        config_path(config), transformer=network, text_encoder_3=None, tokenizer_3=None
    )
    model.network = pipeline.transformer
    assert torch.equal(velocity(model), drawn)
    card = (whole / "network" / "README.md").read_text()
    assert 'transformer=SD3Transformer2DModel.from_pretrained("network")' in card and "lora" not in card.lower()


def config_path(config: Any) -> str:
    from densegrpo_fast.embedded import EMBEDDED

    return str(EMBEDDED.get(config.model.path, config.model.path))


@pytest.mark.ci
def test_a_flipped_bit_of_a_shared_file_is_noticed(train: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(run, **FULL, **{"run.iterations": 2}) == 0
    settings = newest_settings(run / "checkpoints")
    manager = CheckpointManager(run / "checkpoints", 2, settings)
    newest = manager.load_latest()
    (file,) = newest.shared.iterdir()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert manager.load_latest().step == 1
    file.unlink()
    assert manager.load_latest().step == 1


@pytest.mark.parametrize(
    "sizes",
    [pytest.param((2, 1), marks=pytest.mark.ci), pytest.param((4, 1, 2, 3, 4), marks=pytest.mark.slow)],
)
def test_any_number_of_processes_goes_on_with_what_others_have_saved(
    train: Any, tmp_path: Path, sizes: tuple[int, ...]
) -> None:
    options = FULL | {"ema.every": 1, "optimizer.lr": 1e-4, "data.num_prompts": 4}
    run, count = tmp_path / "run", len(sizes)
    for done, size in enumerate(sizes, 1):
        settings = options | {"run.iterations": done, "distributed.shard": "full" if done == 1 else "none"}
        arguments = train.arguments(run, *(["--resume"] if done > 1 else []), **settings)
        ended = commands(tmp_path, [arguments] * size, LOCAL_WORLD_SIZE=str(size))
        assert [code for code, _ in ended] == [0] * size, ended
        shared = run / "checkpoints" / f"step-{done:08d}" / "shared"
        # what is whole in every process one of them writes
        assert done > 1 or len(list(shared.iterdir())) == size
    alone = tmp_path / "alone"
    assert train(alone, **options, **{"run.iterations": count}) == 0
    found = read_shared(shared, "adapter")
    for name, tensor in read_shared(alone / "checkpoints" / shared.parent.name / "shared", "adapter").items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-5)


def sent(world: World, trained: str) -> dict[str, int]:
    """Bytes that this process gives to FSDP2's collectives in an iteration, and what they should be by closed form."""
    given = {"gathered": 0, "reduced": 0, "forwards": 0, "backwards": 0}

    def count(name: str, kind: str, place: int) -> None:
        own = getattr(dist, name, None)

        def counted(*arguments: Any, **options: Any) -> Any:
            tensor = options["input"] if "input" in options else arguments[place]
            given[kind] += tensor.nbytes
            return own(*arguments, **options)

        if own is not None:
            setattr(dist, name, counted)

    for name in ("all_gather_single", "all_gather_into_tensor"):
        count(name, "gathered", 1)
    for name in ("reduce_scatter_single", "reduce_scatter_tensor"):
        count(name, "reduced", 1)
    options = {**SETTINGS, "model.train": trained, "distributed.shard": "full", "objective.kl_coef": 0.0}
    config = parse_arguments(["--config=embedded_dense", *(f"{key}={value}" for key, value in options.items())])[0]
    model = policy(train=trained)
    trainer = Trainer(config, model=model, reward=RewardMixture({"brightness": (brightness, 1.0)}), world=world)

    def forwards(module: Any, arguments: Any, output: Any) -> None:
        given["forwards"] += 1
        given["backwards"] += output[0].requires_grad

    model.network.register_forward_hook(forwards)
    given |= dict.fromkeys(given, 0)
    trainer.step(0)
    # every unit is filled up to parts of equal size
    parts = [p for p in model.network.parameters() if isinstance(p, DTensor)]
    held = sum(-(-p.shape[0] // world.size) * p[0].numel() for p in parts)
    return given | {"held": held}


@pytest.mark.ci
@pytest.mark.parametrize("trained", ["lora", "full"])
def test_what_a_spread_network_sends_is_the_closed_form(trained: str) -> None:
    for found in together(2, sent, trained):
        assert found["forwards"] > found["backwards"] > 0
        assert found["gathered"] == 4 * found["held"] * (found["forwards"] + found["backwards"])
        assert found["reduced"] == (trained == "full") * 2 * 4 * found["held"] * found["backwards"]
