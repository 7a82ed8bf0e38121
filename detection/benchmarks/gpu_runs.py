"""Whole runs on a GPU: the tests that need one, a training to its AP, the loader beside the steps, and no memory."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from detection.batch import Batch
from detection.benchmarks.data import draw_images, index_images
from detection.benchmarks.gpu import Precision, Row, Setting
from detection.benchmarks.gpu_pairs import Pair, in_precision
from detection.benchmarks.speed import wait
from detection.data import scenes
from detection.data.augment import train_transform
from detection.data.dataset import DetectionDataset, collate
from detection.data.samplers import TrainBatchSampler
from detection.data.train_loader import TrainLoader
from detection.data.workers import init_worker
from detection.errors import RunError, explain

FIT = "import sys; from detection.cli.fit import main; sys.exit(main(sys.argv[1:]))"
ON_CPU = "GPU_TESTS_ON_CPU"  # set in the rehearsal, in which the tests run on the CPU


def out_of_memory(setting: Setting) -> Iterator[Row]:
    """What a step says that does not fit into memory, and whether one that fits goes on after it.

    Raises:
        RunError: it says nothing that helps, or nothing fails.
    """
    pair = Pair("r50", setting.sizes, setting.device)
    sentence = None
    try:
        _exceed_memory(pair, setting)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        sentence = explain(error)
    pair.steps("train", setting.half, 1)["ours"]()
    yield {"sentence": sentence or "", "goes_on": True}
    if sentence is None or not sentence.startswith("out of memory"):
        raise RunError(f"a step that does not fit into memory says: {sentence}")


def _exceed_memory(pair: Pair, setting: Setting) -> None:
    if not setting.device.startswith("cuda"):
        torch.empty(2**55, dtype=torch.uint8)
        return
    step = pair.steps("train", setting.half, setting.sizes.batch)["ours"]
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(setting.device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + 2**28) / whole))
    try:
        step()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def tests(setting: Setting) -> Iterator[Row]:
    """The tests marked `gpu`, one row each as they end; in the rehearsal without the long ones.

    Raises:
        RunError: one failed, or not one passed.
    """
    if setting.tests is None:
        yield {"test": "all", "outcome": "not run: the folder tests/gpu is not at hand, so run it from a checkout"}
        return
    root = setting.tests.parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), *filter(None, sys.path)])}
    if setting.sizes.rehearsal:
        environment[ON_CPU] = "1"
    marks = "gpu and not rehearsal" if setting.sizes.rehearsal else "gpu"
    command = [sys.executable, "-m", "pytest", "-v", "-m", marks, "-p", "no:cacheprovider", "-p", "no:xdist"]
    run = subprocess.Popen([*command, str(setting.tests)], cwd=root, env=environment, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    passed, failed, began, last = 0, 0, time.monotonic(), ""
    for line in run.stdout or ():
        last = line.strip() or last
        if found := re.match(r"\S*?(\w+\.py::\S+) (PASSED|FAILED|ERROR|SKIPPED)", line):
            passed += found[2] == "PASSED"
            failed += found[2] in ("FAILED", "ERROR")
            yield {"test": found[1], "outcome": found[2].lower(), "seconds": time.monotonic() - began}
            began = time.monotonic()
        elif found := re.match(r"E  +(\S.*)", line):
            yield {"test": "", "outcome": found[1][:300], "seconds": 0.0}
    run.wait()
    if failed or not passed:
        raise RunError(f"{failed} tests failed, {passed} passed; the last line was: {last}")


def fit(setting: Setting) -> Iterator[Row]:
    """A real training through the command line: blood cells where they are at hand, else the quickstart's scenes.

    Raises:
        RunError: it ended with an error, or is not done in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        name, flags = ("bccd", ["--data.root", str(setting.bccd)]) if setting.bccd else ("quickstart", [])
        if setting.sizes.rehearsal:
            name, flags = "quickstart", _few_scenes(Path(folder) / "scenes")
        accelerator = "gpu" if setting.device.startswith("cuda") else "cpu"
        fixed = ["--trainer.accelerator", accelerator, "--trainer.devices", "1", "--wandb", "off"]
        command = [sys.executable, "-c", FIT, "--config", name, *fixed, *flags, *setting.sizes.fit]
        began = time.monotonic()
        try:
            ended = subprocess.run(
                [*command, "--output", f"{folder}/runs"], timeout=setting.left, capture_output=True, text=True
            )
            problem = "" if ended.returncode == 0 else f"it ended with code {ended.returncode}: {ended.stderr[-1000:]}"
        except subprocess.TimeoutExpired:
            problem = f"it was not done after {time.monotonic() - began:.0f} s"
        minutes = (time.monotonic() - began) / 60
        for path in Path(folder).glob("runs/*/*/metrics.csv"):
            with path.open(newline="") as file:
                scores = [row for row in csv.DictReader(file) if row.get("val/map")]
            for row in scores[-1:]:
                yield {"configuration": name, "minutes": minutes, "step": int(row["step"]),
                       "AP": float(row["val/map"]), "AP50": float(row["val/map_50"])}  # fmt: skip
        if problem:
            raise RunError(f"{name}: {problem}")


def _few_scenes(folder: Path) -> list[str]:
    flags = ["--data.format", "coco", "--data.root", str(scenes.draw(folder, train=8, val=4))]
    for split, (file, images) in scenes.SPLITS.items():
        flags += [f"--data.{split}_split", file, f"--data.{split}_images", images]
    return flags


def loader(setting: Setting) -> Iterator[Row]:
    """Images a second: of the loader alone, with and without pinned memory, of training steps alone, and of both.

    `waits` is the share of the time that the steps lose to the loader.
    """
    sizes, on_gpu = setting.sizes, setting.device.startswith("cuda")
    batch_size, workers = max(1, sizes.batch // 2), min(sizes.workers, os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        index = index_images(draw_images(Path(folder)), sizes.images)
        dataset = DetectionDataset(index, train_transform(sizes.height, sizes.width))
        speeds: dict[str, float] = {}
        step = _step_of(Pair("r50", sizes, setting.device, num_classes=4), setting.half)
        for name, pinned, run in (
            ("loader", False, lambda batch: None),
            ("loader_pinned", on_gpu, lambda batch: batch.to(setting.device)),
            ("both", on_gpu, lambda batch: step(batch.to(setting.device))),
        ):
            options: dict[str, Any] = {"num_workers": workers, "pin_memory": pinned, "worker_init_fn": init_worker}
            batches = TrainBatchSampler(dataset.store, batch_size)
            speeds[name] = _images_a_second(
                TrainLoader(dataset, batches, collate_fn=collate, **options), run, setting.device
            )
        one = next(iter(TrainLoader(dataset, TrainBatchSampler(dataset.store, batch_size), collate_fn=collate)))
        again = [one.to(setting.device)] * max(2, sizes.images // batch_size // 2)
        speeds["steps"] = _images_a_second(again, step, setting.device)
    row: Row = {"batch": batch_size, "workers": workers, "pinned": on_gpu}
    row |= {f"{name}_images_s": speed for name, speed in speeds.items()}
    yield row | {"waits": max(0.0, 1 - speeds["both"] / speeds["steps"])}


def _step_of(pair: Pair, precision: Precision) -> Callable[[Batch], None]:
    model = pair.quick("train").train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def step(batch: Batch) -> None:
        run = in_precision(lambda: model.run(batch, True, False)[0], precision, pair.device)
        optimizer.zero_grad()
        torch.stack(list(run().values())).sum().backward()
        optimizer.step()

    return step


def _images_a_second(batches: Any, run: Callable[[Batch], Any], device: str, warm_up: int = 2) -> float:
    """Of all batches after the first ones, in which workers start and kernels are chosen."""
    began, seen = time.perf_counter(), 0
    for i, batch in enumerate(batches):
        run(batch)
        seen += len(batch)
        if i < warm_up:
            wait(device)
            began, seen = time.perf_counter(), 0
    wait(device)
    return seen / (time.perf_counter() - began)
