"""Several processes for a test: one function runs in each, joined by gloo, and returns what the test compares."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.models.loading import resolve_dtype
from densegrpo_fast.rewards.base import RewardMixture
from densegrpo_fast.training.distributed import World
from densegrpo_fast.training.strategies import Experience, UpdateStrategy, strategy_of
from densegrpo_fast.training.trainer import Trainer

SETTINGS: dict[str, object] = {
    "data.num_prompts": 2,
    "sampler.group_size": 4,
    "sampler.num_steps": 3,
    "sampler.dynamics": "flow_sde",
    "sampler.noise_level": 0.7,
    "sampler.micro_batch": 2,
    "window.schedule": "none",
    "window.size": "null",
    "objective.trained_steps": "all_but_last",
    "objective.step_weight": "none",
    "lookahead.plan": "exact",
    "lookahead.decoder": "full",
    "lookahead.monitor_every": 0,
    # batches of one shape, however the rows are shared out
    "lookahead.chunk": 2,
    "optimizer.max_grad_norm": 1e9,
    "optimizer.updates_per_iteration": 1,
    "ema.every": 0,
}


def brightness(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """Mean of each picture, weighted by where; each by itself, as a batch of other shape may round otherwise."""
    return torch.stack([(image * torch.linspace(-1, 1, image.shape[-1])).mean() for image in images])


class _Kept:
    """A strategy that keeps what an iteration has sampled."""

    experience: Experience

    def __init__(self, strategy: UpdateStrategy):
        self.strategy = strategy

    def run(self, *arguments: Any) -> Experience:
        self.experience = self.strategy.run(*arguments)
        return self.experience


def policy(double: bool = False, train: str = "lora", dtype: torch.dtype = torch.float32) -> FlowModel:
    """A tiny SD3 model with a random adapter, which changes what it says, or one that is trained as a whole."""
    from densegrpo_fast.models.lora import add_lora
    from densegrpo_fast.models.tiny import tiny_sd3
    from densegrpo_fast.models.whole_network import train_whole

    model = tiny_sd3()
    if train == "full":
        torch.nn.Module.to(model.network, torch.float64 if double else dtype)
        train_whole(model, reference=True)
        return model
    add_lora(model.network, rank=2, alpha=4, targets=["attn.to_q", "attn.to_v", "attn.to_out.0"], seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.trainable_parameters().items():
        if ".lora_B." in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    if double:
        torch.nn.Module.double(model.network)
    return model


def train(world: World, options: Mapping[str, object], iterations: int = 1, double: bool = False) -> dict[str, Any]:
    """What some iterations have sampled, thought and learned, of all rows in every process."""
    given = [f"{key}={value}" for key, value in {**SETTINGS, **options}.items()]
    config, _ = parse_arguments(["--config=embedded_dense", *given])
    kept = _Kept(strategy_of(config))
    reward = RewardMixture({"brightness": (brightness, 1.0)})
    dtype = resolve_dtype(config.model.dtype, torch.device("cpu"))
    model = policy(double, config.model.train, dtype)
    trainer = Trainer(config, model=model, reward=reward, strategy=kept, world=world)
    records = [trainer.step(iteration) for iteration in range(iterations)]
    rollout, rewards, advantages, _ = kept.experience
    gather, branches = trainer.share.gather, rollout.branches
    return {
        "latents": gather(rollout.latents, dim=1),
        "velocities": gather(rollout.velocities, dim=1),
        "log_probs": gather(rollout.log_probs, dim=1, branches=branches),
        "rewards": rewards.rewards,
        "completed": rewards.lookahead_rewards if rewards.branch_rewards is None else rewards.branch_rewards,
        "scores": rewards.scores.values,
        "advantages": advantages.values,
        "gradients": {
            name: whole(p.grad) for name, p in trainer.model.trainable_parameters().items() if p.grad is not None
        },
        "weights": {name: whole(p.detach()) for name, p in trainer.model.trainable_parameters().items()},
        "average": [whole(tensor) for tensor in trainer.learner.tensors().get("ema", {}).values()],
        "records": records,
        "traffic": (world.traffic.gathered, world.traffic.reduced),
        # of the base, how many values this process holds
        "held": sum(getattr(p, "_local_tensor", p).numel() for p in trainer.model.network.parameters()),
    }


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process may have a part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns in a world of one process, here, by one thread as in the others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return function(World(), *arguments)
    finally:
        torch.set_num_threads(threads)


def together(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What the function, called with a world of `size` processes and the arguments, returns in each of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["densegrpo_fast.training.trainer", "densegrpo_fast.models.tiny", "peft"])
    with tempfile.TemporaryDirectory() as directory:
        processes = [
            context.Process(target=_work, args=(Path(directory), rank, size, function, arguments), daemon=True)
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(240)
        assert [process.exitcode for process in processes] == [0] * size
        return [torch.load(Path(directory) / f"result-{rank}", weights_only=False) for rank in range(size)]


def _work(directory: Path, rank: int, size: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=size)
    torch.save(function(World(rank, size), *arguments), directory / f"result-{rank}")
    dist.destroy_process_group()


def commands(directory: Path, arguments: list[list[str]], **environment: str | None) -> list[tuple[int, str]]:
    """Run the training command once for each list of arguments, as torchrun starts processes.

    Args:
        directory: for what they print.
        environment: variables, or None for one that is to be missing; {rank} stands for the process's number.

    Returns:
        Exit code and everything printed of each.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["densegrpo_fast.training.trainer", "densegrpo_fast.models.tiny", "peft"])
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common: dict[str, str | None] = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "{rank}"}
    common |= {"LOCAL_RANK": "{rank}", "WORLD_SIZE": str(len(arguments)), **environment}
    started = []
    for rank, own in enumerate(arguments):
        variables = {name: value and value.format(rank=rank) for name, value in common.items()}
        started.append(context.Process(target=_command, args=(directory / f"printed-{rank}", own, variables)))
    for process in started:
        process.start()
    for process in started:
        process.join(300)
        if process.exitcode is None:
            process.kill()
    codes = [-1 if process.exitcode is None else process.exitcode for process in started]
    return [(code, (directory / f"printed-{rank}").read_text()) for rank, code in enumerate(codes)]


def _command(printed: Path, arguments: list[str], environment: dict[str, str | None]) -> None:
    with open(printed, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for name, value in environment.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    torch.set_num_threads(1)
    from densegrpo_fast.train import main

    sys.exit(main(arguments))
