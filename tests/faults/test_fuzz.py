"""Random mistakes in configurations and flags: parsed, or one line and exit code 2, and never a traceback."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from detection.cli.configuration import CONFIGS
from detection.cli.fit import FitCLI, main

Record = Callable[[str, object], None]
JUNK = [
    *(
        None,
        True,
        -1,
        0,
        7,
        1e300,
        float("nan"),
        "",
        " ",
        "x",
        "1e3",
        "no",
        [],
        {},
        [[]],
        [None],
        [1, 2],
        "a: b",
        "@",
        "{",
    ),
    *(
        "detection",
        "detection.nothing",
        "os.system",
        "torch.load",
        "/etc/passwd",
        "..",
        "nul\x00",
        "\u0661",
        "x" * 3000,
    ),
    *({"class_path": "detection.AnchorGenerator"}, {"class_path": 7}, {"init_args": {}}, {"class_path": "os.system"}),
]
EXAMPLES = 60


def places(node: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below a value."""
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    return [(node, key) for key in keys] + [place for key in keys for place in places(node[key])]


def damage(config: Any, rng: random.Random) -> str:
    config = copy.deepcopy(config)
    for _ in range(rng.randint(1, 3)):
        container, key = rng.choice(places(config))
        action = rng.random()
        if action < 0.2:
            del container[key]
        elif action < 0.4 and isinstance(container, dict):
            letters = list(str(key))
            rng.shuffle(letters)
            container["".join(letters)] = container.pop(key)
        else:
            container[key] = copy.deepcopy(rng.choice(JUNK))
    text = yaml.safe_dump(config)
    if rng.random() < 0.3:
        at = rng.randrange(len(text))
        text = (
            text[:at] + rng.choice([":", "\t", "- ", "}", "\n", "&a *a", "!!python/name:os.system", "\x01"]) + text[at:]
        )
    return text


def outcome(args: list[str], capsys: pytest.CaptureFixture[str]) -> int:
    """The exit code of a command line that is only parsed; 0, or 2 with one line."""
    try:
        code = main([*args, "--print_config"])
    except SystemExit as stop:  # the parser's; what is refused before it parses comes back as a code
        code = stop.code
    said = capsys.readouterr()
    assert code in (0, 2), args
    if code:
        errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "Traceback" not in said.err, (args, said.err)
    return int(code)


@pytest.mark.slow
@pytest.mark.fault(
    fault="a configuration is wrong",
    injected=f"{EXAMPLES} random changes of packaged configurations",
    promised="parsed, or one line and exit code 2",
)
def test_configurations(tmp_path: Path, capsys: pytest.CaptureFixture[str], record_property: Record) -> None:
    rng, names, codes = random.Random(0), sorted(CONFIGS.glob("*.yaml")), []
    for number in range(EXAMPLES):
        path = tmp_path / f"{number}.yaml"
        path.write_text(damage(yaml.safe_load(rng.choice(names).read_text()), rng))
        codes.append(outcome(["--config", str(path)], capsys))
    record_property("happened", f"{codes.count(0)} parsed, {codes.count(2)} refused")
    assert codes.count(2) > EXAMPLES // 3


@pytest.mark.slow
@pytest.mark.fault(
    fault="flags are wrong",
    injected=f"{EXAMPLES} command lines of random flags with random values",
    promised="parsed, or one line and exit code 2",
)
def test_flags(capsys: pytest.CaptureFixture[str], record_property: Record) -> None:
    parser = FitCLI(["--trainer.accelerator", "cpu", "--trainer.logger", "false"]).parser
    left_out = ("-h", "--help", "--config", "-c", "--print_config")
    flags = [option for option in parser._option_string_actions if option not in left_out and ".help" not in option]
    rng, codes = random.Random(1), []
    for _ in range(EXAMPLES):
        args = []
        for _ in range(rng.randint(1, 3)):
            flag, value = rng.choice(flags), str(rng.choice(JUNK))
            flag = flag if rng.random() < 0.8 else flag[: rng.randint(1, len(flag))] + rng.choice("xyz._-")
            args += [f"{flag}={value}"] if rng.random() < 0.5 else [flag, value]
        codes.append(outcome(args, capsys))
    record_property("happened", f"{codes.count(0)} parsed, {codes.count(2)} refused")
    assert codes.count(2) > EXAMPLES // 3


WRONG_VALUES = [
    ["--model.detector.num_classes", "-3"],
    ["--model.detector.fpn_channels", "0"],
    ["--data.min_size", "0"],
    ["--data.batch_size", "-1"],
    ["--trainer.precision", "7"],
    ["--trainer.max_epochs", "-5"],
    ["--trainer.accelerator", "abacus"],
    ["--trainer.strategy", "luck"],
    ["--trainer.devices", "-2"],
    ["--trainer.accumulate_grad_batches", "0"],
    ["--trainer.limit_train_batches", "-0.5"],
    ["--trainer.callbacks", "detection.AnchorGenerator"],
    ["--output", "/proc/nowhere"],
]


@pytest.mark.fault(
    fault="a value that parses can't be used: {case}",
    injected="the flag",
    promised="one line and an exit code that is not 0",
)
@pytest.mark.parametrize("case", WRONG_VALUES, ids=" ".join)
def test_values(case: list[str], fit: Any, record_property: Record) -> None:
    run = fit(*case)
    record_property("happened", f"exit {run.code}: {run.error}")
    assert run.code in (1, 2) and run.output.count("error: ") == 1
