from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from densegrpo_fast.common.errors import UserError
from densegrpo_fast.common.exit_codes import ExitCode, exit_code_of
from densegrpo_fast.training.prompts import BUILT_IN, PromptSampler, PromptSet, built_in_prompts, load_prompts


def refused(path: Path, **options: int) -> str:
    with pytest.raises(UserError) as caught:
        load_prompts(path, **options)
    assert exit_code_of(caught.value) == ExitCode.USAGE
    assert str(path) in str(caught.value)
    return str(caught.value)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_text_file_keeps_order_and_duplicates(tmp_path: Path) -> None:
    content = "\ufeffa red circle\r\n  ein Würfel \na red circle".encode()
    prompts = load_prompts(write(tmp_path / "p.txt", content))
    assert prompts.prompts == ("a red circle", "ein Würfel", "a red circle")
    assert prompts.metadata == ({}, {}, {})
    assert len(prompts) == 3


def test_a_line_is_only_split_at_line_feeds(tmp_path: Path) -> None:
    content = "a\u2028b\x0bc\nd\n".encode()
    assert load_prompts(write(tmp_path / "p.txt", content)).prompts == ("a\u2028b\x0bc", "d")


def test_jsonl_keeps_the_whole_record(tmp_path: Path) -> None:
    records = [
        {"prompt": "two cats", "tag": "counting", "include": [{"class": "cat", "count": 2}]},
        {"prompt": "x"},
    ]
    content = "\n".join(map(json.dumps, records)).encode()
    prompts = load_prompts(write(tmp_path / "p.jsonl", content))
    assert prompts.prompts == ("two cats", "x")
    assert list(prompts.metadata) == records


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"\n", "is empty"),
        (b"a\n\nb\n", "line 2: empty"),
        (b"a\n \t\n", "line 2: empty"),
        (b"a\ncaf\xe9\n", "line 2: not UTF-8 (byte 4 of the line)"),
        ("a\n".encode("utf-16"), "line 1: not UTF-8"),
        (b"a\nb\0c\n", "line 2: holds a NUL"),
        (b"abcd\nabcdef\n", "line 2: 6 characters, longer than 5"),
    ],
)
def test_bad_text_lines_are_reported_by_number(content: bytes, expected: str, tmp_path: Path) -> None:
    assert expected in refused(write(tmp_path / "p.txt", content), max_chars=5)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"", "empty"),
        (b"{prompt", "not JSON"),
        (b'["a"]', 'expected an object with the text "prompt"'),
        (b'{"text": "a"}', 'expected an object with the text "prompt"'),
        (b'{"prompt": 3}', 'expected an object with the text "prompt"'),
        (b'{"prompt": " "}', "empty"),
        (b'{"prompt": "a\\u0000"}', "holds a NUL"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"prompt": "a", "n": NaN}', "not JSON: NaN is no number"),
        (b'\xef\xbb\xbf{"prompt": "a"}', "not JSON"),
    ],
)
def test_bad_jsonl_lines_are_reported_by_number(line: bytes, expected: str, tmp_path: Path) -> None:
    message = refused(write(tmp_path / "p.jsonl", b'{"prompt": "ok"}\n' + line + b'\n{"prompt": "ok"}\n'))
    assert "line 2: " in message
    assert expected in message


def test_many_bad_lines_are_summarised(tmp_path: Path) -> None:
    message = refused(write(tmp_path / "p.txt", b"\n" * 8))
    assert "line 1: empty; " in message
    assert "line 5: empty; and 3 more lines" in message


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "absent.txt")
    (tmp_path / "folder.txt").mkdir()
    assert "cannot read" in refused(tmp_path / "folder.txt")
    assert ".txt, .jsonl, .tsv or .csv" in refused(write(tmp_path / "p.md", b"a"))


SIZES = {"general": (48, 16), "geneval": (48, 16), "ocr": (48, 16), "scenes": (600, 600), "words": (88, 26)}
"""Training and held-out prompts of the package's sets."""


def test_a_misspelt_built_in_set_is_suggested() -> None:
    assert 'or one of general, geneval, ocr, scenes, words; did you mean "general"?' in refused(Path("generl"))


@pytest.mark.parametrize(("name", "sizes"), [*SIZES.items()])
def test_built_in_sets_hold_distinct_prompts_and_keep_some_out(name: str, sizes: tuple[int, int]) -> None:
    training, held_out = (built_in_prompts(name, held_out=flag) for flag in (False, True))
    assert (len(training), len(held_out)) == sizes
    assert len({*training.prompts, *held_out.prompts}) == sum(sizes)


def test_every_built_in_set_is_counted() -> None:
    assert set(SIZES) == set(BUILT_IN)


def test_built_in_ocr_prompts_quote_one_text_each() -> None:
    for flag in (False, True):
        for prompt in built_in_prompts("ocr", held_out=flag).prompts:
            before, text, after = prompt.split('"')
            assert text.strip() == text != "" and before


def test_built_in_geneval_prompts_say_what_to_look_for() -> None:
    numbers = {1: "", 2: "two ", 3: "three ", 4: "four "}
    tags: Counter[str] = Counter()
    for flag in (False, True):
        prompts = built_in_prompts("geneval", held_out=flag)
        for prompt, record in zip(prompts.prompts, prompts.metadata, strict=True):
            tags[record["tag"]] += 1
            for item in record["include"]:
                stem = item["class"].removesuffix("h")
                assert item["class"] in prompt or (item["count"] > 1 and stem in prompt)
                assert numbers[item["count"]] in prompt and item.get("color", "") in prompt
                if "position" in item:
                    assert f"{item['class']} {item['position'][0]} a" in prompt
    assert set(tags) == {"single_object", "two_object", "counting", "colors", "position", "color_attr"}


def test_a_prompt_set_must_be_consistent() -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        PromptSet((), ())
    with pytest.raises(ValueError, match="got 0 for 1"):
        PromptSet(("a",), ())


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 2**63 - 1), st.integers(1, 20))
def test_all_prompts_are_used_equally_often(num_items: int, num_prompts: int, seed: int, iterations: int) -> None:
    sampler = PromptSampler(num_items, num_prompts, seed)
    batches = [sampler.batch(iteration) for iteration in range(iterations)]
    assert all(len(batch) == num_prompts for batch in batches)
    drawn = Counter(index for batch in batches for index in batch)
    assert set(drawn) <= set(range(num_items))
    counts = [drawn[index] for index in range(num_items)]
    assert max(counts) - min(counts) <= 1


def test_a_batch_depends_on_the_iteration_alone() -> None:
    forwards = [PromptSampler(10, 4, 3).batch(iteration) for iteration in range(20)]
    backwards = [PromptSampler(10, 4, 3).batch(iteration) for iteration in reversed(range(20))]
    assert forwards == backwards[::-1]


def test_epochs_and_seeds_have_their_own_order() -> None:
    epochs = [tuple(PromptSampler(50, 50, seed).batch(epoch)) for seed in range(3) for epoch in range(3)]
    assert len(set(epochs)) == 9


def test_the_order_is_the_same_everywhere() -> None:
    # Written down once: a change of the order would silently change what a resumed run trains on.
    assert PromptSampler(6, 6, 0).batch(0) == [0, 1, 5, 3, 4, 2]


@pytest.mark.parametrize("arguments", [(0, 1, 0), (1, 0, 0)])
def test_impossible_sizes_are_refused(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        PromptSampler(*arguments)
    with pytest.raises(ValueError, match="iteration must be at least 0"):
        PromptSampler(1, 1, 0).batch(-1)
