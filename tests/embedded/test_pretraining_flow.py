"""The flow stage of pretraining: its data, its attention, and that a killed run continues bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from densegrpo_fast.embedded import architecture, dataset, flow, scenes, words, worlds
from densegrpo_fast.embedded.dataset import Dataset
from densegrpo_fast.embedded.flow import FlowRecipe, PlainAttention

RECIPE = FlowRecipe(steps=6, decay_steps=2, batch=4, pad_share=0.5, bfloat16=False)


@pytest.fixture(scope="module")
def pipeline(pipeline_directory: Path) -> StableDiffusion3Pipeline:
    loaded = StableDiffusion3Pipeline.from_pretrained(pipeline_directory, text_encoder_3=None, tokenizer_3=None)
    return loaded.to(torch.float32)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "CHUNK", 6)


def make(seed: int) -> SD3Transformer2DModel:
    torch.manual_seed(seed)
    return architecture.build_transformer()


@pytest.mark.ci
@pytest.mark.usefixtures("few")
def test_more_scenes_leave_the_first_ones_as_they_are(pipeline: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    one = dataset.prepare(pipeline, "scenes", tmp_path / "stages", 1, seed=0)
    two = dataset.prepare(pipeline, "scenes", tmp_path / "stages", 2, seed=0)
    again = dataset.prepare(pipeline, "scenes", tmp_path / "again", 2, seed=0)
    assert len(one) == 6 and len(two) == 12
    assert torch.equal(two.latents[:6], one.latents) and torch.equal(two.latents, again.latents)
    assert not torch.equal(two.latents[6:], one.latents)
    assert one.latents.float().mean().abs() < 0.01 and abs(one.latents.float().std() - 1) < 0.01
    assert two.sentence.max() < len(two.embeds) - 1 == sum(map(len, scenes.split(held_out=False).values()))


def test_prompts_are_encoded_as_the_pipeline_does(pipeline: StableDiffusion3Pipeline) -> None:
    prompts = ["a red circle", ""]
    embeds, pooled = dataset.encode_prompts(pipeline, prompts)
    theirs, _, theirs_pooled, _ = pipeline.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
    assert torch.allclose(embeds, theirs[:, : embeds.shape[1]], atol=1e-6)
    assert torch.allclose(pooled, theirs_pooled, atol=1e-6)


def test_plain_attention_is_the_models_own() -> None:
    model, generator = make(0), torch.Generator().manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(2, 4, 16, 16, generator=generator),
        "encoder_hidden_states": torch.randn(2, 7, 128, generator=generator),
        "pooled_projections": torch.randn(2, 128, generator=generator),
        "timestep": torch.tensor([10.0, 900.0]),
    }
    with torch.no_grad():
        own = model(**inputs).sample
        model.set_attn_processor(PlainAttention())
        assert torch.allclose(model(**inputs).sample, own, atol=1e-5)


def random_data() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    return Dataset(
        torch.randn(8, 4, 16, 16, generator=generator).half(),
        torch.arange(8) % 3,
        torch.randint(0, 25, (8, 64), generator=generator, dtype=torch.uint8),
        torch.randn(8, 64, 3, generator=generator).half(),
        torch.randn(4, 16, 128, generator=generator),
        torch.randn(4, 128, generator=generator),
        shift=0.0,
        spread=1.0,
        num_kinds=25,
    )


@pytest.mark.ci
def test_a_killed_flow_continues_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "CHECKPOINT_SECONDS", 0.0)
    data, (whole, broken, resumed) = random_data(), (make(0), make(0), make(1))
    flow.train_flow(whole, data, RECIPE, _new(tmp_path / "whole"))
    draws = flow.draw

    def killed(data: Dataset, recipe: FlowRecipe, step: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        if step == 3:
            raise KeyboardInterrupt
        return draws(data, recipe, step)

    monkeypatch.setattr(flow, "draw", killed)
    with pytest.raises(KeyboardInterrupt):
        flow.train_flow(broken, data, RECIPE, _new(tmp_path / "broken"))
    monkeypatch.setattr(flow, "draw", draws)
    flow.train_flow(resumed, data, RECIPE, tmp_path / "broken")
    for (name, ours), theirs in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert (tmp_path / "broken" / "flow.stable.safetensors").exists()


def test_dropped_prompts_are_the_empty_one_and_targets_fit() -> None:
    data = random_data()
    recipe = FlowRecipe(batch=400, drop_prompt=0.25, pad_share=0.0)
    index, noisy, target, conditions = flow.draw(data, recipe, step=0)
    empty = (conditions["pooled_projections"] == data.pooled[-1]).all(1)
    assert 0.15 < empty.float().mean() < 0.35
    sigma = (conditions["timestep"] / 1000).view(-1, 1, 1, 1)
    clean = noisy - sigma * target
    assert torch.allclose(clean, data.latents[index].float(), atol=1e-2)


def _new(directory: Path) -> Path:
    directory.mkdir()
    return directory


def test_a_token_knows_what_covers_it() -> None:
    square = scenes.Figure("square", "blue", x=20.0, y=44.0, radius=10.0)
    kinds, places = worlds.covering((square,))
    blue_square = 1 + 1 * 6 + 2
    assert set(kinds.tolist()) == {0, blue_square}
    grid, where = kinds.reshape(8, 8), places.reshape(8, 8, 3)
    assert grid[5, 2] == blue_square and grid[0, 0] == 0 and not where[0, 0].any()
    # the token in row 5 and column 2 has its centre at x = 20, y = 44
    assert where[5, 2].tolist() == [0.0, 0.0, 10 / 16] and where[4, 1].tolist() == [0.5, 0.5, 10 / 16]


def test_a_token_knows_its_letter() -> None:
    # cells of 12 x 20 pixels from x = 10 and y = 16 on
    kinds, places = worlds.spelling("AB", left=10, top=16)
    grid, where = kinds.reshape(8, 8), places.reshape(8, 8, 3)
    # the token of columns 16 to 23 has 6 columns of A, the next one 8 of B, and the one before 6 of A
    assert grid[2].tolist() == [0, 1, 1, 2, 2, 0, 0, 0] and grid[3].tolist() == grid[2].tolist()
    # the row of tokens from y = 32 on has 4 rows of 8; the one above the letters none
    assert grid[4].tolist() == [0, 1, 1, 2, 0, 0, 0, 0] and not grid[1].any()
    assert where[2, 2].tolist() == [(16 - 20) / 16, (26 - 20) / 16, 0.0] and where[2, 3, 2] == 0.25


def test_signs_show_no_held_out_word_and_letters_in_any_order() -> None:
    every = words.training_words()
    assert len(every) == len(set(every)) and not set(every) & set(words.split(held_out=True))
    examples = list(worlds.WORLDS["words"].examples(40, np.random.default_rng(0)))
    known = {words.prompt(word) for word in words.split(held_out=False)}
    real = [example.sentence in known for example in examples]
    assert {example.sentence for example in examples} <= {words.prompt(word) for word in every} and 3 <= sum(real) <= 20
    tokenizer = architecture.build_tokenizer(worlds.WORLDS["words"].vocabulary())
    pieces = tokenizer.tokenize(words.prompt("RIVER"))
    assert [piece.removesuffix("</w>") for piece in pieces] == ["a", "sign", "that", "says", '"', *"river", '"']


def test_a_reader_learns_from_the_hidden_tokens() -> None:
    torch.manual_seed(0)
    reader, data = flow.Reader(16, 25), random_data()
    hidden = torch.randn(8, 64, 16, requires_grad=True)
    loss = reader.loss(hidden, data.kinds, data.places)
    loss.backward()
    assert loss > 0 and hidden.grad is not None and hidden.grad.abs().sum() > 0
    nothing = reader.loss(hidden, torch.zeros(8, 64, dtype=torch.uint8), torch.zeros(8, 64, 3))
    assert torch.isfinite(nothing)
