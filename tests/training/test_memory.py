"""Memory: the accounting against tensors that exist, the estimate's arithmetic, and what is said if it is too much."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from densegrpo_fast.common.exit_codes import ExitCode, exit_code_of
from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.models import flops
from densegrpo_fast.models.diffusers_model import DiffusersModel
from densegrpo_fast.models.feature_cache import FeatureCache
from densegrpo_fast.models.flops import embedded
from densegrpo_fast.models.lora import add_lora
from densegrpo_fast.models.memory import ModelMemory, PeakBytes, module_bytes, peak_bytes, tensor_bytes
from densegrpo_fast.models.tiny import tiny_sd3
from densegrpo_fast.rewards.pickscore import PickScore
from densegrpo_fast.run_files.metrics import read_metrics
from densegrpo_fast.sampling.rollout import Rollout
from densegrpo_fast.training import memory as training_memory
from densegrpo_fast.training.memory import (
    GIB,
    MemoryEstimate,
    check,
    estimate,
    estimate_memory,
    free_bytes,
    held_bytes,
    peak_metrics,
    readable,
    refuse,
)
from densegrpo_fast.training.prompts import PromptBatch
from densegrpo_fast.training.trainer import Trainer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TARGETS = flops.ATTENTION_TARGETS
ROWS = 3


@pytest.fixture(scope="module")
def model() -> DiffusersModel:
    made = tiny_sd3()
    add_lora(made.network, rank=4, alpha=4, targets=list(TARGETS), seed=0)
    return made


@pytest.fixture(scope="module")
def memory(model: DiffusersModel) -> ModelMemory:
    return ModelMemory(flops.architecture_of(model), dtype=torch.float32, lora_rank=4)


def allocated(call: Callable[[], object]) -> int:
    """Most bytes that the CPU allocator has handed out at a time during a call, as torch's profiler saw them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = call()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    del kept
    return peak


def test_live_tensors_are_added_up() -> None:
    # 4 kB and 8 kB; the view is nobody's memory, and the first is gone when the last of 2 kB is made
    with PeakBytes() as counted:
        one = torch.empty(1024)
        view = one.view(32, 32)
        two = torch.empty(2048)
        assert counted.live == 12288
        del one, view
        assert counted.live == 8192
        three = torch.empty(512)
    assert (counted.live, counted.peak) == (10240, 12288)
    assert len(two) + len(three) == 2560


def test_tensors_from_before_do_not_count() -> None:
    before = torch.empty(1000)
    assert peak_bytes(lambda: before.view(10, 100).t()) == 0
    assert peak_bytes(lambda: before + 1) == 4000


def test_weights_are_those_of_the_loaded_model(model: DiffusersModel, memory: ModelMemory) -> None:
    trained = tensor_bytes(model.trainable_parameters().values())
    assert memory.trained == trained > 0
    assert memory.transformer == module_bytes(model.network) - trained
    assert memory.full_decoder == module_bytes(model.pipeline.vae)
    assert memory.preview_decoder == module_bytes(model.preview_decoder)
    assert memory.picture == tensor_bytes([model.decode(torch.zeros(1, *model.latent_shape))])


def inputs(model: DiffusersModel, rows: int) -> dict[str, Tensor]:
    conditioning = model.encode(["a photo"] * rows)
    return {
        "hidden_states": torch.randn(rows, *model.latent_shape),
        "encoder_hidden_states": conditioning.prompts["embeds"][conditioning.rows],
        "pooled_projections": conditioning.prompts["pooled"][conditioning.rows],
        "timestep": torch.full((rows,), 500.0),
    }


@pytest.mark.parametrize("graphs", [1, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_update_takes_what_was_counted(
    model: DiffusersModel, memory: ModelMemory, checkpointing: bool, graphs: int
) -> None:
    network, given = model.network, inputs(model, ROWS)
    parameters = list(model.trainable_parameters().values())
    (network.enable_gradient_checkpointing if checkpointing else network.disable_gradient_checkpointing)()

    def step() -> object:
        halves = [network(**given, return_dict=False)[0].float() for _ in range(graphs)]
        return torch.autograd.grad(sum(halves).square().mean(), parameters)

    step()
    taken, tracked = allocated(step), peak_bytes(step)
    network.disable_gradient_checkpointing()
    counted = memory.update(ROWS, forwards=0, checkpointing=checkpointing, graphs=graphs)
    assert counted == tracked
    # the allocator also holds scalars, and what checkpointing remembers of the random generators
    assert counted == pytest.approx(taken, rel=0.05)


def test_checkpointing_saves_memory_and_further_rows_cost_it(memory: ModelMemory) -> None:
    kept = [memory.update(rows, forwards=0, checkpointing=False) for rows in (2, 4)]
    dropped = memory.update(4, forwards=0, checkpointing=True)
    # of two blocks one is there at a time
    assert dropped < 0.85 * kept[1]
    activations = [size - memory.trained for size in kept]
    assert activations[1] == pytest.approx(2 * activations[0], rel=0.15)
    # a forward without gradient adds what it needs on top of what the backward waits for
    assert memory.update(4, forwards=1, checkpointing=True) >= dropped


def test_a_forward_and_a_decode_take_what_was_counted(model: DiffusersModel, memory: ModelMemory) -> None:
    given, latents = inputs(model, ROWS), torch.randn(ROWS, *model.latent_shape)
    with torch.no_grad():
        assert memory.forward(ROWS) == pytest.approx(allocated(lambda: model.network(**given)), rel=0.15)
        decoded = allocated(lambda: model.pipeline.vae.decode(latents).sample)
        assert memory.decode(ROWS, "full") == pytest.approx(decoded, rel=0.35)
    assert memory.decode(ROWS, "full", "sliced") < memory.decode(ROWS, "full")
    assert memory.decode(ROWS, "preview") < memory.decode(ROWS, "full")
    single = memory.decode(1, "full")
    assert memory.decode(ROWS, "full", "sliced") == single + (ROWS - 1) * memory.picture


def config(*overrides: str) -> Config:
    return parse_arguments(["--config", "embedded_paper", *overrides])[0]


def test_a_graph_is_what_a_forward_keeps_for_its_backward(memory: ModelMemory, model: DiffusersModel) -> None:
    """Against the tensors that autograd really saves, weights not counted, and less with checkpointing."""
    network, inputs = model.network, {name: torch.randn(tensor.shape) for name, tensor in memory._inputs(ROWS).items()}
    saved: dict[int, int] = {}
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    weights |= {tensor.untyped_storage().data_ptr() for tensor in inputs.values()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = network(**inputs, return_dict=False)[0]
    found = memory.graph(ROWS, checkpointing=False)
    assert found == pytest.approx(sum(saved.values()) + tensor_bytes([output]), rel=0.1)
    assert memory.graph(ROWS, checkpointing=True) < found / 2


@pytest.mark.ci
def test_graphs_that_do_not_fit_are_replayed(train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"optimizer.update": "streamed", "run.iterations": 1, "evaluation.every": 0}
    settings |= {
        "objective.trained_steps": "all_but_last",
        "optimizer.updates_per_iteration": 1,
        "run.memory_check": "refuse",
    }
    assert train(tmp_path / "plain", **settings) == 0
    needed: list[MemoryEstimate] = []

    def free(device: torch.device) -> int:
        del device
        graphs = needed[-1].state["graphs"]
        return needed[0].to_come - needed[0].state["graphs"] if graphs or len(needed) > 1 else 0

    def estimated(*arguments: Any, **options: Any) -> MemoryEstimate:
        needed.append(own(*arguments, **options))
        return needed[-1]

    own = training_memory.estimate_memory
    monkeypatch.setattr(training_memory, "estimate_memory", estimated)
    monkeypatch.setattr(training_memory, "free_bytes", free)
    monkeypatch.setattr(training_memory, "_CLEARLY", 1.0)
    assert train(tmp_path / "small", **settings) == 0
    assert needed[0].state["graphs"] > 0 == needed[1].state["graphs"]
    (plain,), (small,) = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("plain", "small"))
    # the same update, with its trained steps' forwards repeated
    assert small["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5)
    assert small["nfe/update"] > plain["nfe/update"]


@pytest.mark.ci
def test_the_arithmetic_of_an_estimate(memory: ModelMemory) -> None:
    # 2 prompts x 4 samples, 5 steps of which the first 4 are noisy (cps may switch the last one off by a level of 0)
    chosen = config(
        "data.num_prompts=2",
        "sampler.group_size=4",
        "sampler.num_steps=5",
        "sampler.noise_level=[0.7, 0.7, 0.7, 0.7, 0.0]",
        "sampler.micro_batch=2",
        "lookahead.chunk=4",
        "lookahead.decoder=preview",
        "reward.overlap=false",
        "ema.every=1",
        "evaluation.num_prompts=3",
        "evaluation.samples_per_prompt=2",
    )
    found = estimate(chosen, memory, encoders=7, rewards=11, copy=13, features=19)
    latents, picture = 4 * 16 * 8 * 8, 4 * 3 * 64 * 64
    assert found.weights == {
        "transformer": memory.transformer,
        "adapter": memory.trained,
        "reference": 0,
        "text encoders": 7,
        "decoders": memory.full_decoder + memory.preview_decoder,
        "lookahead copy": 13,
        "rewards": 11,
    }
    # gradients, two moments, the average, and the adapter while the average is in its place; 6 states and 5 velocities
    assert found.state == {
        "training": 5 * memory.trained,
        "trajectories": 8 * latents * 11,
        "lookahead features": 19,
        "graphs": 0,
        "captured graphs": 0,
    }
    assert found.phases == {
        "rollout": memory.forward(2),
        "lookahead": 4 * 4 * 8 * latents + memory.forward(4),
        # the ends are decoded in full besides, which takes more
        "pictures": 2 * 5 * 8 * picture + memory.decode(4, "full"),
        # both halves of guidance, and the reference's
        "update": memory.update(2, forwards=2, checkpointing=False, graphs=2),
        "evaluation": 6 * (latents + 2 * picture) + memory.decode(2, "full"),
    }
    assert found.to_come == sum(found.state.values()) + max(found.phases.values())
    assert found.total == sum(found.weights.values()) + found.to_come
    assert f"the phase that needs most is {found.largest}" in str(found)
    # as many of the ends at a time as a budget allows, here of fewer bytes than the previews take together
    tight = chosen.model_copy(update={"lookahead": chosen.lookahead.model_copy(update={"memory_gb": 1e-6})})
    assert estimate(tight, memory).phases["pictures"] == 2 * 5 * 8 * picture + memory.decode(4, "preview")

    # captured, its forward's memory stays where no other phase can use it
    graphed = chosen.model_copy(update={"lookahead": chosen.lookahead.model_copy(update={"graphs": True})})
    assert estimate(graphed, memory).state["captured graphs"] == memory.forward(4)
    assert estimate(graphed, memory).phases["lookahead"] == 4 * 4 * 8 * latents

    half = chosen.model_copy(
        update={"objective": chosen.objective.model_copy(update={"guidance_gradient": "conditional"})}
    )
    assert estimate(half, memory).phases["update"] == memory.update(2, forwards=3, checkpointing=False)

    sparse = config("credit.method=sparse", "objective.kl_coef=0", "sampler.guidance_scale=1", "ema.every=0")
    alone = estimate(sparse, memory)
    samples = sparse.data.num_prompts * sparse.sampler.group_size
    assert alone.phases["lookahead"] == 0
    assert alone.phases["update"] == memory.update(sparse.sampler.micro_batch, forwards=0, checkpointing=False)
    assert alone.state == {
        "training": 3 * memory.trained,
        "trajectories": samples * latents * 21,
        "lookahead features": 0,
        "graphs": 0,
        "captured graphs": 0,
    }


@pytest.mark.ci
def test_all_weights_take_masters_moments_and_a_reference_in_parts() -> None:
    whole = ModelMemory(embedded(), dtype=torch.bfloat16, lora_rank=0)
    chosen = config("model.train=full", "ema.every=1", "objective.kl_coef=0.1")
    count = sum(parameter.numel() for parameter in whole.network.parameters())
    assert whole.trained == 4 * count and whole.transformer - 2 * count < 0.01 * whole.transformer
    for shards in (1, 4):
        found = estimate(chosen, whole, shards=shards)
        assert (found.weights["transformer"], found.weights["adapter"]) == (4 * count // shards, 0)
        assert found.weights["reference"] == whole.transformer // shards
        assert found.state["training"] == 5 * 4 * count // shards


def of_the_rollout(*overrides: str) -> Config:
    """2 prompts of 4 samples, 5 steps."""
    common = ("data.num_prompts=2", "sampler.group_size=4", "sampler.num_steps=5", "sampler.micro_batch=2")
    return config(*common, "lora.rank=4", "sampler.noise_level=0.7", "lookahead.decoder=full", *overrides)


def sampled(trainer: Trainer) -> Rollout:
    """8 samples of 2 prompts."""
    return trainer.sample(PromptBatch(["a"] * 4 + ["b"] * 4, [{}] * 8, 4), trainer.schedule.at(0), 0)


@pytest.mark.ci
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("guidance", "halves"), [("cond_only", 1), ("full", 2)])
def test_features_take_what_was_counted(
    tiny_policy: Callable[..., DiffusersModel], guidance: str, halves: int, dtype: str
) -> None:
    model = tiny_policy()
    chosen = of_the_rollout(
        "lookahead.cache=text:own",
        f"lookahead.guidance={guidance}",
        f"lookahead.copy_dtype={dtype}",
        "lookahead.plan=nodes",
        "lookahead.nodes=[2, 4]",
    )
    trainer = Trainer(chosen, model=model)
    lookahead = trainer.lookahead
    assert lookahead is not None and isinstance(lookahead.cache, FeatureCache)
    counted = estimate_memory(chosen, model, lookahead)
    assert counted.weights["lookahead copy"] == counted.weights["transformer"] * DTYPES[dtype].itemsize // 4
    lookahead.model.refresh()
    trajectory = sampled(trainer)
    # of two nodes and 8 samples keys and values of 24 text tokens of width 32 in 2 blocks
    size = 2 * halves * 8 * 2 * 2 * 24 * 32 * DTYPES[dtype].itemsize
    assert counted.state["lookahead features"] == lookahead.cache.bytes() == size
    assert "lookahead features" in str(counted).split("kept: ")[1].split("\n")[0]
    assert lookahead.complete(trajectory).isfinite().all()
    assert lookahead.cache.bytes() == size


def test_text_of_every_sample_would_not_fit() -> None:
    """SD3.5-Medium at 512 px, 1152 samples in groups of 24: 205 text tokens of width 1536 in 24 blocks, bfloat16."""
    with torch.device("meta"):
        network = torch.nn.Module.to(flops.sd35_medium().network(), torch.bfloat16)
    own = FeatureCache(network, nodes=(1,), rows=1152).capacity(205)
    assert own == 1152 * 24 * 2 * 205 * 1536 * 2
    large = MemoryEstimate({}, {"training": GIB, "lookahead features": 2 * own}, {"update": 9 * GIB})
    problem = check(large, 48 * GIB, "cuda:0")
    assert (
        problem is not None and "most goes to lookahead features (64.9 GiB), less with fewer lookahead.nodes" in problem
    )
    assert check(replace(large, state={"lookahead features": own // 12}), 48 * GIB, "cuda:0") is None


def test_half_precision_halves_the_preview_decoder() -> None:
    whole, half = (ModelMemory(flops.embedded(), dtype=torch.float32, preview_dtype=d) for d in DTYPES.values())
    assert half.preview_decoder == whole.preview_decoder / 2 > 0
    assert half.full_decoder == whole.full_decoder
    # what is decoded is float32 in either case
    assert half.decode(4, "full") == whole.decode(4, "full")
    assert 0.4 < half.decode(4, "preview") / whole.decode(4, "preview") < 0.9


@pytest.mark.ci
def test_the_24_gb_preset_fits_24_gb() -> None:
    from transformers import CLIPConfig, CLIPModel

    chosen = parse_arguments(["--config", "sd35_medium_pickscore_24gb"])[0]
    memory = ModelMemory(flops.sd35_medium(), dtype=torch.bfloat16, vae_dtype=torch.bfloat16)
    # PickScore's towers: ViT-H/14 and a text tower of 24 layers and width 1024, half precision
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    with torch.device("meta"):
        towers = CLIPModel(CLIPConfig(text_config=text, vision_config=flops.CLIP_H, projection_dim=1024))
    found = estimate(chosen, memory, rewards=module_bytes(towers) // 2)
    # 2.47 billion weights in bfloat16, and what T5 would have taken is not there
    assert found.weights["transformer"] == pytest.approx(4.94e9, rel=0.01)
    assert found.weights["text encoders"] == 0 and chosen.model.prompt_cache
    assert 8e9 < found.total < 0.8 * 24e9
    assert check(found, 24 * 10**9 - sum(found.weights.values()), "cuda:0") is None
    # without checkpointing the update of one half alone would hardly fit
    assert memory.update(8, forwards=0, checkpointing=False) == pytest.approx(16.4e9, rel=0.01)
    assert chosen.sampler.micro_batch == 8 and found.phases["update"] == pytest.approx(2.20e9, rel=0.01)


SMALL = MemoryEstimate({"transformer": 3 * GIB}, {"training": GIB}, {"rollout": GIB, "update": 9 * GIB})


def test_only_what_is_clearly_too_much_is_a_problem() -> None:
    assert (SMALL.largest, SMALL.to_come, SMALL.total) == ("update", 10 * GIB, 13 * GIB)
    assert check(SMALL, None, "cuda:0") is None
    assert check(SMALL, int(9.2 * GIB), "cuda:0") is None
    problem = check(SMALL, 9 * GIB, "cuda:0")
    assert problem is not None
    for words in ("needs about 10.0 GiB", "cuda:0 has 9.0 GiB free", "the phase update (9.0 GiB)"):
        assert words in problem
    assert "model.gradient_checkpointing true" in problem and "sampler.micro_batch" in problem
    assert exit_code_of(refuse(problem)) == ExitCode.ENVIRONMENT


def test_sizes_are_readable() -> None:
    assert [readable(size) for size in (0, 3 * 2**20, GIB, int(14.12 * GIB))] == [
        "0 MiB",
        "3 MiB",
        "1.0 GiB",
        "14.1 GiB",
    ]


def test_free_memory_is_the_container_s(tmp_path: Path) -> None:
    here = free_bytes(torch.device("cpu"), tmp_path)
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    assert free_bytes(torch.device("cpu"), tmp_path) == 3000
    (tmp_path / "memory.max").write_text("max\n")
    unlimited = free_bytes(torch.device("cpu"), tmp_path)
    assert here is None or unlimited == pytest.approx(here, rel=0.5)


def test_the_networks_of_rewards_are_counted_where_they_are(clip_directory: Path) -> None:
    class Own:
        def __init__(self) -> None:
            self.head = torch.nn.Linear(3, 2)  # 8 numbers
            self.same, self.elsewhere = self.head, torch.nn.Linear(3, 2, device="meta")

    clip = PickScore(str(clip_directory), str(clip_directory), device="cpu")
    weights = load_file(clip_directory / "model.safetensors").values()
    # the positions of both towers are not saved: 77 tokens or fewer, and patches, in whole numbers
    positions = sum(
        module.position_ids.nbytes for module in clip.clip._model.modules() if hasattr(module, "position_ids")
    )
    expected = 8 * 4 + sum(tensor.nbytes for tensor in weights) + positions
    assert held_bytes([Own(), clip, len], torch.device("cpu")) == expected
    assert held_bytes([Own()], torch.device("meta")) == 8 * 4


def test_the_peak_of_a_process_holds_what_it_touched() -> None:
    touched = torch.ones(32 * 2**20 // 4)
    # 32 MiB of floats, and an interpreter with torch
    assert peak_metrics(torch.device("cpu"))["memory/peak_gib"] > touched.nbytes / GIB


@pytest.mark.ci
def test_a_run_says_what_it_needs_and_took(
    train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from densegrpo_fast.run_files.metrics import read_metrics
    from densegrpo_fast.training import memory

    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    assert train(tmp_path / "refused", **{"run.memory_check": "refuse"}) == 3
    error = capsys.readouterr().err
    assert "run.memory_check: this run needs about" in error and "python -m densegrpo_fast.train" in error
    assert train(tmp_path / "run", **{"run.memory_check": "warn", "run.iterations": 1}) == 0
    said = capsys.readouterr().out
    assert "memory: about" in said and "GiB in an iteration" in said
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[0]["memory/peak_gib"] > 0
