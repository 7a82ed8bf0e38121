"""What is to be known of a GPU, the most valuable first: each section gives its rows one by one, see `gpu.py`.

All run on a CPU too, in the sizes of the rehearsal.
"""

from __future__ import annotations

import os
import platform
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import detection
from detection.batch import pad_objects
from detection.benchmarks.gpu import Row, Section, Setting
from detection.benchmarks.gpu_pairs import Pair, Precision, Recorder, compare, draw, halving, in_precision, take_turns
from detection.benchmarks.gpu_runs import fit, loader, out_of_memory, tests
from detection.benchmarks.gpu_sizes import Kind
from detection.benchmarks.speed import Mode, without_each
from detection.benchmarks.stages import time_stages
from detection.errors import RunError
from detection.models.fast import accelerate
from detection.parts import Proposals
from detection.training.compiling import compile_parts

HALF: Precision = "bfloat16"
EVERYTHING = 10**6  # every anchor and every proposal trains, so that chance has no part
COMPARED: dict[str, Any] = {
    "num_classes": 11,
    **{f"rpn_pre_nms_top_n_{mode}": 150 for mode in ("train", "test")},
    **{f"rpn_post_nms_top_n_{mode}": 60 for mode in ("train", "test")},
    "rpn_batch_size_per_image": EVERYTHING,
    "box_batch_size_per_image": EVERYTHING,
}
# The largest differences from torchvision in float32, where both are in float32.
ALLOWED = {"losses": 1e-5, "scores": 1e-5, "boxes": 1e-3, "masks": 1e-4}
# In bf16 each loss may differ from torchvision's in float32 by this, or by so many times what torchvision's own does.
LEAST_IN_HALF, TIMES_IN_HALF = 0.01, 3
WAITS = ("nms_apart", "grouped_nms", "nms_per_class")  # functions in which the host may wait for the device


def machine(setting: Setting) -> Iterator[Row]:
    """The device and the versions."""
    row: Row = {name: version(name) for name in ("detection", "torch", "torchvision", "lightning")}
    row |= {"python": platform.python_version(), "cores": os.cpu_count(), "device": platform.machine()}
    if setting.device.startswith("cuda"):
        found = torch.cuda.get_device_properties(setting.device)
        row |= {"device": found.name, "memory_gb": round(found.total_memory / 2**30, 1)}
        row |= {"capability": f"{found.major}.{found.minor}", "multiprocessors": found.multi_processor_count}
        row |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    yield row


@contextmanager
def without_tf32() -> Iterator[None]:
    """Convolutions and products of matrices in true float32."""
    kept = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = kept


def parity(setting: Setting, kinds: tuple[Kind, ...] = ()) -> Iterator[Row]:
    """Losses and detections of ours, quick forms, against torchvision's with the same weights on the same images.

    Each row has the largest `difference`, what is `allowed`, and whether it `holds`. In bf16 there is one of each loss,
    on the same anchors and the same proposals.

    Args:
        setting: of the measurement.
        kinds: of detectors, in the place of those of its sizes.

    Raises:
        RunError: one does not hold.
    """
    wrong = compared = 0
    for kind in kinds or setting.sizes.compared:
        side = setting.sizes.side
        options = COMPARED | {"min_size": side * 3 // 4, "max_size": side}
        pair = Pair(kind, setting.sizes, setting.device, **options)
        sides = [(side * 3 // 4, side), (side, side * 3 // 4)]
        _, images, targets = draw(sides, 11, setting.device, kind == "mask")
        with without_tf32():
            differences = _differences(pair, images, targets)
        for (precision, what), (difference, allowed) in differences.items():
            holds = difference <= allowed
            wrong, compared = wrong + (not holds), compared + 1
            yield {"detector": kind, "precision": precision, "what": what, "difference": difference,
                   "allowed": allowed, "holds": holds}  # fmt: skip
    if wrong:
        raise RunError(f"{wrong} of {compared} figures differ from torchvision's by more than is allowed")


def _differences(
    pair: Pair, images: list[Tensor], targets: list[dict[str, Tensor]]
) -> dict[tuple[str, str], tuple[float, float]]:
    """What differs by how much, and how much is allowed, by precision and name.

    In bf16, whose numbers have 8 bits, an RPN proposes other boxes than in float32, and with few foreground proposals a
    loss hangs on each. So there all RoI heads get the proposals that torchvision makes in float32.
    """
    ours, theirs = pair.quick("train").train(), pair.theirs
    if theirs is None:
        return {}
    for model in (ours, theirs.train()):  # statistics stay those that both have, whatever the order of the calls
        for norm in [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]:
            norm.eval()
    proposed: list[list[Tensor]] = []
    with torch.no_grad():
        with hooked(theirs.rpn, lambda output: proposed.append(output[0])):
            expected = theirs(images, targets)
        exact = _relative(ours(images, targets), expected)
        (given,) = proposed
        boxes, _, valid = pad_objects(given, [box.new_zeros(len(box)) for box in given])
        same = Proposals(boxes, valid.float(), valid)
        with hooked(ours.rpn, lambda output: (same, output[1])), hooked(theirs.rpn, lambda output: (given, output[1])):
            half, own = (
                _relative(in_precision(partial(m, images, targets), HALF, pair.device)(), expected)
                for m in (ours, theirs)
            )
        found, wanted = pair.quick("infer").predict(images), theirs.eval()(images)
    single = {"losses": max(exact.values()), **_of_detections(found, wanted)}
    return {("float32", name): (value, ALLOWED[name]) for name, value in single.items()} | {
        (HALF, name): (value, max(LEAST_IN_HALF, TIMES_IN_HALF * own[name])) for name, value in half.items()
    }


@contextmanager
def hooked(part: Any, follow: Callable[[Any], Any]) -> Iterator[None]:
    """What `follow` makes of the part's output in the place of it, in the block; None leaves it as it is."""
    handle = part.register_forward_hook(lambda module, given, output: follow(output))
    try:
        yield
    finally:
        handle.remove()


def _relative(ours: Any, theirs: dict[str, Tensor]) -> dict[str, float]:
    return {name: float((ours[name].float() / value.float() - 1).abs()) for name, value in theirs.items()}


def _of_detections(ours: Any, theirs: list[dict[str, Tensor]]) -> dict[str, float]:
    """Largest differences of scores, by rank, and of boxes in pixels; each of theirs has the nearest of its label."""
    found = dict.fromkeys(("scores", "boxes", "masks") if "masks" in theirs[0] else ("scores", "boxes"), 0.0)
    for a, b in zip(ours, theirs, strict=True):
        if len(a["scores"]) != len(b["scores"]) or not len(b["scores"]):
            return dict.fromkeys(found, float(EVERYTHING))  # another number of detections, or nothing to compare
        far = (a["boxes"][:, None] - b["boxes"]).abs().amax(dim=-1)
        far = torch.where(a["labels"][:, None] == b["labels"], far, EVERYTHING)
        distance, nearest = far.min(dim=0)
        found["scores"] = max(found["scores"], float((a["scores"] - b["scores"]).abs().max()))
        found["boxes"] = max(found["boxes"], float(distance.max()))
        if "masks" in found:
            found["masks"] = max(found["masks"], float((a["masks"][nearest] - b["masks"]).abs().max()))
    return found


def waits(setting: Setting) -> Iterator[Row]:
    """Where the host waits for the device in a training step and in inference, after the first at this size.

    Raises:
        RunError: outside of NMS.
    """
    pair, elsewhere = Pair("r50", setting.sizes, setting.device), set()
    modes: tuple[Mode, ...] = ("train", "infer")
    for mode in modes:
        step = pair.steps(mode, setting.half, 2)["ours"]
        step()
        for place, count in places_of_waiting(step, setting.device).items():
            yield {"mode": mode, "place": place, "count": count}
            elsewhere |= {place} if not place.endswith(WAITS) else set()
        yield {"mode": mode, "place": "all others", "count": 0}
    if elsewhere:
        raise RunError(f"the host waits for the device outside of NMS: {', '.join(sorted(elsewhere))}")


def places_of_waiting(step: Callable[[], Any], device: str) -> Counter[str]:
    """File and function of each operation of a step that made the host wait, as PyTorch's sync debug mode tells."""
    places: Counter[str] = Counter()
    package = str(Path(detection.__file__).parent)

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "called a synchronizing" not in str(message):
            return
        frames = [f for f in traceback.extract_stack() if f.filename.startswith(package) and f.name != "note"]
        places[f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "elsewhere"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        with sync_debug("warn", device):
            step()
    return places


@contextmanager
def sync_debug(mode: str, device: str) -> Iterator[None]:
    """What PyTorch does in the block where the host waits for the device: `warn` or `error`; nothing on a CPU."""
    if not device.startswith("cuda"):
        yield
        return
    kept = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(kept)


def training(setting: Setting) -> Iterator[Row]:
    """A training step of R50-FPN in bf16."""
    pair = Pair("r50", setting.sizes, setting.device)
    yield compare(pair, "train", setting.half, setting.sizes.batch, setting.until)


def inference(setting: Setting) -> Iterator[Row]:
    """Inference of R50-FPN in bf16."""
    pair = Pair("r50", setting.sizes, setting.device)
    for count in setting.sizes.inference:
        yield compare(pair, "infer", setting.half, count, setting.until)


def memory(setting: Setting) -> Iterator[Row]:
    """Most memory of a training step of R50-FPN beside the weights, with gradients and momentum, by batch."""
    pair = Pair("r50", setting.sizes, setting.device)
    for precision in dict.fromkeys((setting.half, "float32")):
        for count in sorted({1, 4, setting.sizes.batch} - ({4} if setting.sizes.batch < 4 else set())):

            def measure(images: int, precision: Any = precision) -> Row:
                _, peaks = take_turns(pair.steps("train", precision, images), 1, setting.device, setting.until)
                return {f"{name}_peak_mb": peak for name, peak in peaks.items()}

            yield {"precision": precision} | halving(count, measure)


def family(setting: Setting) -> Iterator[Row]:
    """Training steps and inference of all detectors in both precisions, but for what other sections have."""
    kinds: tuple[Kind, ...] = ("mask", "v2", "cascade", "r50")
    cases: list[tuple[Mode, int]] = [("train", setting.sizes.batch), *(("infer", n) for n in setting.sizes.inference)]
    for number, kind in enumerate(kinds):
        pair = Pair(kind, setting.sizes, setting.device)
        precisions = dict.fromkeys((setting.half, "float32") if kind != "r50" else ("float32",))
        plan = [(precision, *case) for precision in precisions for case in cases]
        for i, (precision, mode, count) in enumerate(plan):
            rest = (len(kinds) - number) * len(plan) - i
            yield compare(pair, mode, precision, count, time.monotonic() + setting.left / rest)


def limit(setting: Setting) -> Iterator[Row]:
    """Our training step in bf16, and its convolutions and linear layers alone: what no other code could save."""
    pair = Pair("r50", setting.sizes, setting.device)

    def measure(count: int) -> Row:
        step, recorder = pair.steps("train", setting.half, count)["ours"], Recorder()
        step()
        with recorder:
            step()
        steps = {"ours": step, "limit": torch.no_grad()(recorder.replay())}
        times, _ = take_turns(steps, setting.sizes.rounds, setting.device, setting.until)
        ours, least = (1000 * sorted(times[name])[len(times[name]) // 2] for name in steps)
        return {"calls": len(recorder.calls), "ours_ms": ours, "limit_ms": least, "times": ours / least}

    yield {"detector": "r50", "precision": setting.half} | halving(setting.sizes.batch, measure)


def stages(setting: Setting) -> Iterator[Row]:
    """Where the time of our training step, and of inference, in bf16 goes."""
    pair = Pair("r50", setting.sizes, setting.device)
    plan: list[tuple[Mode, int]] = [("train", max(1, setting.sizes.batch // 2)), ("infer", 1)]
    for mode, count in plan:
        step = pair.steps(mode, setting.half, count)["ours"]
        for row in time_stages(step, max(1, setting.sizes.rounds // 2), setting.device):
            yield {"mode": mode, "batch": count} | row


def forms(setting: Setting) -> Iterator[Row]:
    """A training step in bf16 without each quick form, over that with all; then deltas of one class, and of all."""
    pair = Pair("r50", setting.sizes, setting.device)
    for name, others in without_each(pair.ours, setting.device):
        without = accelerate(deepcopy(pair.ours), setting.device, others)
        both = {"ours": pair.quick("train"), "without": without}
        theirs, pair.theirs = pair.theirs, None
        row = compare(pair, "train", setting.half, max(1, setting.sizes.batch // 2), setting.until, both)
        pair.theirs = theirs
        yield {"form": name, "ratio": row["without_ms"] / row["ours_ms"], **row}
    yield {"form": "deltas of the own class alone", **_deltas(setting)}


def _deltas(setting: Setting) -> Row:
    """The layer of box deltas, forward and backward: of all classes and then the own, and of the own class alone."""
    regions, classes, width = 512 * setting.sizes.batch, 91, 1024
    if setting.sizes.rehearsal:
        regions, width = 32, 16
    layer = nn.Linear(width, classes * 4).to(setting.device)
    features = torch.randn(regions, width, device=setting.device, requires_grad=True)
    labels = torch.randint(0, classes, (regions,), device=setting.device)

    def of_all() -> Tensor:
        own = labels[:, None, None].expand(-1, 1, 4)
        return layer(features).unflatten(1, (classes, 4)).gather(1, own)[:, 0]

    def of_own() -> Tensor:
        weight, bias = layer.weight.view(classes, 4, width)[labels], layer.bias.view(classes, 4)[labels]
        return torch.einsum("rf,rdf->rd", features, weight) + bias

    cast = {n: in_precision(call, setting.half, setting.device) for n, call in (("all", of_all), ("own", of_own))}
    steps = {name: (lambda call=call: call().float().sum().backward()) for name, call in cast.items()}
    times, _ = take_turns(steps, setting.sizes.rounds, setting.device, setting.until)
    every, own = (1000 * sorted(times[name])[len(times[name]) // 2] for name in ("all", "own"))
    return {"ratio": every / own, "ours_ms": own, "without_ms": every, "batch": setting.sizes.batch}


def compiled(setting: Setting) -> Iterator[Row]:
    """A training step of R50-FPN in bf16 with `torch.compile`: our dense parts, and torchvision's backbone and head."""
    pair = Pair("r50", setting.sizes, setting.device)
    ours, theirs = pair.quick("train"), pair.theirs
    compile_parts(ours, setting.sizes.backend)
    if theirs is not None:
        for name in ("backbone", "rpn.head", "roi_heads.box_head"):
            theirs.get_submodule(name).compile(backend=setting.sizes.backend)
    began = time.monotonic()
    row = compare(pair, "train", setting.half, setting.sizes.batch, setting.until, {"ours": ours})
    yield row | {"with_compiling_s": time.monotonic() - began}


SECTIONS = {
    "machine": Section(machine, 5),
    "parity": Section(parity, 35),
    "waits": Section(waits, 20),
    "training": Section(training, 35),
    "inference": Section(inference, 25),
    "memory": Section(memory, 25),
    "limit": Section(limit, 20),
    "stages": Section(stages, 20),
    "forms": Section(forms, 40),
    "out_of_memory": Section(out_of_memory, 10),
    "tests": Section(tests, 75),
    "fit": Section(fit, 80),
    "family": Section(family, 90),
    "loader": Section(loader, 30),
    "compiled": Section(compiled, 70),
}
