"""Every command of README and of the pages in docs/ is run, or as far as it gets here, from the text itself.

A command's words stay as they are. What makes it small is appended (`SMALL`), so that all of its own options are read
by its own parser. What is not run says so in `test_a_command`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import socket
import socketserver
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import mkdocs.__main__
import pytest
import tomllib
from packaging.requirements import Requirement
from torch.distributed.run import get_args_parser

from densegrpo_fast.__main__ import COMMANDS
from densegrpo_fast.compat.hosts import HOSTS
from densegrpo_fast.config.cli import options, parse_arguments

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = ("densegrpo", "torchrun", "accelerate", "pytest", "pip", "mkdocs", "bash", "sha256sum")
OF_MODULES = {f"densegrpo_fast.{module.removesuffix('.__main__')}": name for name, (module, _) in COMMANDS.items()}

_FEW = ["--data.num_prompts=1", "--evaluation.num_prompts=1", "--evaluation.samples_per_prompt=1"]
_TWO = ["--sampler.group_size=2", "--sampler.branches=2", "--window.size=1"]
_UNCHECKED = "--run.memory_check=off"
SMALL = {
    # named in a sentence without what they need; or they count large models, as a test of tests/fidelity does
    r"(serve|calibrate|preview|fidelity --cost) $": ["--help"],
    r"fidelity .*--cost|evaluate --reward": [],
    r"train .*--dry-run": [_UNCHECKED],
    # weights that are not here
    r"train .*sd35_medium_pickscore": ["--dry-run", _UNCHECKED],
    # measures for minutes before it trains
    r"train .*plan auto": ["--dry-run", "--sampler.num_steps=3", _UNCHECKED],
    r"train .*run.iterations": [*_FEW, *_TWO, "--lookahead.monitor_every=0", _UNCHECKED],
    r"train": [*_FEW, "--run.iterations=1", "--lookahead.monitor_every=0", _UNCHECKED],
    r"sample": ["--overwrite"],
    r"watch": ["--port=0"],
    r"evaluate": _FEW,
    r"fidelity .*--search": ["--groups=2", "--group-size=2"],
    r"fidelity": ["--groups=1", "--group-size=2"],
    r"calibrate": ["--samples=8", "--rounds=1", "--branches=0"],
    r"preview": [*_FEW, "--pictures=8", "--steps=1", "--batch=2"],
}
"""What is appended to a command, by the first pattern that it begins with.

Of an option of the configuration that the page gives, the page's value is the one.
"""
PLACES = {
    "RUN RUN": "runs/a runs/b",
    "--config ... ": "--config MODEL.yaml ",
    "train ... ": "train ",
    "--max-restarts N ": "--max-restarts 1 -m densegrpo_fast.train ",
    "--host NAME": "--host flow_grpo",
}
"""What a page writes in the place of something of the reader's, and what is there in this test."""
REMOVED = "--cache text "
"""Records of `docs/fidelity.md` that name forms which have been removed since: they are refused, as the page says."""


class Command(NamedTuple):
    """A command on a page."""

    page: str
    text: str


class Parsed(BaseException):
    """A program has read its options."""


def commands_of(page: Path) -> Iterator[Command]:
    """The lines of a page's shell blocks, and its code in sentences that begins with a program and has arguments."""
    text, name = page.read_text(encoding="utf-8"), page.relative_to(ROOT).as_posix()
    block = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
    for language, code in block.findall(text):
        # docs/scaling.md's Slurm script has a test of its own, in tests/training/test_processes.py
        if language in ("", "bash") and not code.startswith("#!"):
            lines = (re.sub(r"\s# .*", "", line) for line in code.replace("\\\n", " ").splitlines())
            yield from (Command(name, part.strip()) for line in lines for part in line.split("&&") if part.strip())
    for code in re.findall(r"`([^`]+)`", block.sub("", text)):
        words = code.split()
        begins = rf"([A-Z]+=\S+ )?(python -m (densegrpo_fast|benches)\b|({'|'.join(PROGRAMS)}) )"
        if re.match(begins, " ".join(words)):
            yield Command(name, " ".join(words))


def filled(command: Command) -> Command:
    """A command with what is the reader's filled in."""
    text = f"{command.text} "
    for place, real in PLACES.items():
        text = text.replace(place, real)
    return Command(command.page, text.strip())


ALL = [filled(command) for page in PAGES for command in commands_of(page)]
ONCE = [one for number, one in enumerate(ALL) if one.text not in {other.text for other in ALL[:number]}]


def test_commands_are_found() -> None:
    """Those of blocks, of chains, and of sentences over two lines."""
    found = {command.text for command in ALL if command.page == "README.md"}
    strip = 'python -m densegrpo_fast.sample "a green cross above a red square" --strip --seeds 4,6 --output strip'
    assert {"python -m densegrpo_fast.train", 'pip install "torch<2.14" -e ".[train]"', strip} <= found
    assert {command.page for command in ALL} > {"README.md", "docs/integrations/flow_grpo.md", "docs/fidelity.md"}


def run(name: str, words: list[str], output: Path | None = None) -> int:
    """Run a command of the package in this process, made small; returns its exit code."""
    line, given = f"{shlex.join([name, *words])} ", {word.removeprefix("--").partition("=")[0] for word in words}
    small = next((added for pattern, added in SMALL.items() if re.match(pattern, line)), [])
    small = [word for word in small if "." not in word or word[2:].partition("=")[0] not in given]
    if name == "train" and output is not None and "run.output_dir" not in given:
        small.append(f"--run.output_dir={output}")
    return exit_code(import_module(f"densegrpo_fast.{COMMANDS[name][0]}").main, [*words, *small])


def exit_code(main: Any, arguments: list[str]) -> int:
    try:
        return int(main(arguments) or 0)
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's directory: README's first command has run in it, and what else the pages speak of is there."""
    directory = tmp_path_factory.mktemp("home")
    for name in ("densegrpo_fast", "tests", ".ci", "benches/variants", "benches/gpu_suite.sh"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).symlink_to(ROOT / name)
    (directory / "benches" / "results").mkdir()
    (directory / "MODEL.yaml").write_text("extends: embedded_dense\n")
    for module in {replaced.module for host in HOSTS.values() for replaced in host.replaced} - {"__main__"}:
        path = (directory / "installed" / module.replace(".", "/")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        assert run("train", []) == 0
        assert run("sample", ["a red circle", "--steps=1", "--output=pictures"]) == 0
        assert run("preview", ["--output=preview"]) == 0
    for name in ("a", "b"):
        shutil.copytree(directory / "runs" / "embedded_branched-0", directory / "runs" / name)
    return directory


@pytest.mark.ci
@pytest.mark.parametrize("command", ONCE, ids=lambda command: f"{command.page}: {command.text}"[:100])
def test_a_command(
    command: Command, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    page = (ROOT / command.page).read_text(encoding="utf-8")
    for code in re.findall(r"^```python\n(# mine\.py\n.*?)^```", page, re.MULTILINE | re.DOTALL):
        (home / "mine.py").write_text(code)
    words = shlex.split(command.text)
    words = [found for word in words for found in (map(str, home.glob(word)) if "*" in word else [word])]
    if re.match(r"[A-Z]+=", words[0]):
        del words[0]
    match words:
        case ["torchrun", "--nproc-per-node", "2", *_]:
            port = f"--master-port={free_port()}"
            line = [sys.executable, "-m", "torch.distributed.run", port, *words[1:], "--dry-run", _UNCHECKED]
            ended = subprocess.run(line, capture_output=True, text=True)
            assert ended.returncode == 0 and "dry run of embedded_branched" in ended.stdout, ended.stderr
        case [_, *_] if "densegrpo_fast.launch" in words:
            # also what each of eight processes would do
            launched(words[words.index("densegrpo_fast.launch") + 1 :], capfd)
        case ["python", "-m", module, *rest] if module in OF_MODULES:
            monkeypatch.setattr(socketserver.BaseServer, "serve_forever", interrupted)
            shutil.rmtree("preview" if module.endswith(".preview") else "absent", ignore_errors=True)
            # a finding of the doctor about this machine is no fault of the command
            expected = (
                (2,) if REMOVED in command.text else (0, 1) if rest == [] and module.endswith(".doctor") else (0,)
            )
            assert run(OF_MODULES[module], rest, tmp_path / "run") in expected
        case ["densegrpo", *rest]:
            assert exit_code(import_module("densegrpo_fast.__main__").main, [*rest, "--help"]) == 0
        case ["sha256sum", *_]:
            subprocess.run(words, cwd="runs/embedded_branched-0/adapter", stdout=subprocess.DEVNULL, check=True)
        case _:
            parse(words, monkeypatch)


def parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not run, and why; its options are read as far as they can be."""
    match words:
        case ["torchrun", *rest]:
            # as many GPUs
            where = words.index("-m")
            if "..." not in rest:
                get_args_parser().parse_args(rest)
            name, own = OF_MODULES[words[where + 1]], words[where + 2 :]
            if name == "train":
                parse_arguments(own)
            else:
                # the doctor refuses to examine processes where there is one
                assert run(name, own) == 2
        case ["python", "-m", "venv", ".venv"] | [".", ".venv/bin/activate"]:
            # the tests run in an environment of their own
            pass
        case ["python", "-m", "benches.pages.write"]:
            # writes into the checkout; tests/benches holds the pages to what it would write
            assert importlib.util.find_spec(words[2])
        case ["python", "-m", module, *rest]:
            # measures for minutes; tests/benches has small runs
            monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stopping(argparse.ArgumentParser.parse_args))
            monkeypatch.setattr(sys, "argv", words[2:])
            with pytest.raises(Parsed):
                import_module(module).main()
        case ["pip", "install", *rest]:
            # needs a network
            check_requirements(rest)
        case ["pytest", *rest]:
            check_tests(rest)
        case ["mkdocs", name, *rest]:
            # builds the site, as .ci/check does, or serves it
            mkdocs.__main__.cli.commands[name].make_context(name, rest)
        case ["bash", script]:
            # runs all tests, or needs a GPU
            subprocess.run(["bash", "-n", script], check=True)
        case _:
            pytest.fail(f"it is not known how to run {words[0]}")


def stopping(read: Callable[..., Any]) -> Callable[..., NoReturn]:
    """`ArgumentParser.parse_args` that ends the program when its options are read."""

    def stop(*given: Any, **named: Any) -> NoReturn:
        read(*given, **named)
        raise Parsed

    return stop


def interrupted(self: socketserver.BaseServer) -> NoReturn:
    """Ctrl-C, as soon as a server waits for requests."""
    raise KeyboardInterrupt


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def launched(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """Launch a script or module of the page's name, in an empty package as its host; in a child, as `__main__`."""
    if "-m" in words:
        where = words.index("-m") + 1
        script = Path("installed", words[where].replace(".", "/")).with_suffix(".py")
    else:
        where = next(number for number, word in enumerate(words) if word.endswith(".py"))
        script = Path(words[where])
    script.parent.mkdir(exist_ok=True)
    script.write_text("import sys\nprint('started with', sys.argv[1:])\n")
    child = os.fork()
    if child == 0:
        sys.path.append("installed")
        status = 1
        try:
            status = exit_code(import_module("densegrpo_fast.launch").main, words)
            sys.stdout.flush()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert capfd.readouterr().out == f"started with {words[where + 1 :]}\n"


def check_requirements(words: list[str]) -> None:
    """Extras are there, and an upper bound on torch is the package's own."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for word in words:
        name, _, extra = word.removesuffix("]").partition("[")
        if name in (".", "densegrpo-fast"):
            assert extra in project["optional-dependencies"]
        elif name.startswith("torch"):
            assert set(Requirement(word).specifier) <= set(Requirement(project["dependencies"][0]).specifier)
        else:
            assert word in ("-e", "--no-deps", "--target") or Requirement(word).name


def check_tests(words: list[str]) -> None:
    """Folders, files and markers are there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    markers = {line.partition("(")[0].partition(":")[0] for line in project["markers"]}
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("-n", type=int)
    parser.add_argument("-m", default="")
    parser.add_argument("files", nargs="*")
    options = parser.parse_args(words)
    assert set(re.findall(r"\w+", options.m)) <= {*markers, "not", "and", "or"}
    for word in options.files:
        before, brace, names = word.removesuffix("}").partition("{")
        for name in names.split(",") if brace else [""]:
            assert (ROOT / f"{before}{name}").exists(), word


@pytest.mark.ci
def test_what_diffusers_is_told_to_load(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/commands.md: the adapter of a run, in a pipeline of diffusers."""
    monkeypatch.chdir(home)
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/commands.md").read_text("utf-8"), re.M | re.S)
    exec(code, {})
    assert (home / "scene.png").is_file()


def test_options_in_sentences_are_there() -> None:
    """`--section.key` anywhere on a page is an option of the configuration."""
    for page in PAGES:
        named = set(re.findall(r"--([a-z_]+\.[a-z_]+)", page.read_text(encoding="utf-8")))
        assert named <= set(options()), page.name
