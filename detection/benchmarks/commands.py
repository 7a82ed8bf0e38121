"""The commands of `detection benchmark`; each imports what it measures only when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from detection.benchmarks.table import report

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def train(network: Literal["resnet50", "efficientnet_lite0"] = "resnet50", size: int = 320, batch_size: int = 2,
          bf16: bool = False, rounds: int = 7, device: str = "cpu", json: Path | None = None) -> None:  # fmt: skip
    """Time a whole training step against torchvision's; see `detection.benchmarks.speed`."""
    from detection.benchmarks.speed import measure_speed

    report([measure_speed("train", network, size, batch_size, bf16, rounds, device)], json)


def infer(network: Literal["resnet50", "efficientnet_lite0"] = "resnet50", size: int = 320, batch_size: int = 1,
          bf16: bool = False, rounds: int = 7, device: str = "cpu", json: Path | None = None) -> None:  # fmt: skip
    """Time inference against torchvision's; see `detection.benchmarks.speed`."""
    from detection.benchmarks.speed import measure_speed

    report([measure_speed("infer", network, size, batch_size, bf16, rounds, device)], json)


def deploy(network: Literal["resnet50", "efficientnet_lite0"] = "resnet50", size: int = 320, rounds: int = 7,
           contenders: list[str] = [], json: Path | None = None) -> None:  # noqa: B006  # fmt: skip
    """Time of a whole call by everything that runs the same detector; see `detection.benchmarks.deploy`."""
    from detection.benchmarks.deploy import measure_deploy

    report(measure_deploy(network, size, rounds, contenders), json)


def profile(mode: Literal["train", "infer"] = "train", network: Literal["resnet50", "efficientnet_lite0"] = "resnet50",
            size: int = 320, batch_size: int = 2, bf16: bool = False, rounds: int = 3, device: str = "cpu",
            json: Path | None = None) -> None:  # fmt: skip
    """Time of each stage of our detector; see `detection.benchmarks.stages`."""
    from detection.benchmarks.stages import measure_stages

    report(measure_stages(mode, network, size, batch_size, bf16, rounds, device), json)


def forms(mode: Literal["train", "infer"] = "train", network: Literal["resnet50", "efficientnet_lite0"] = "resnet50",
          size: int = 320, batch_size: int = 2, bf16: bool = False, rounds: int = 7, device: str = "cpu",
          json: Path | None = None) -> None:  # fmt: skip
    """Time of a training step, or of inference, without each quick form; see `detection.benchmarks.speed`."""
    from detection.benchmarks.speed import measure_forms

    report(measure_forms(mode, network, size, batch_size, bf16, rounds, device), json)


def flat(network: Literal["resnet50", "efficientnet_lite0"] = "efficientnet_lite0", size: int = 320,
         batch_size: int = 2, rounds: int = 3, device: str = "cpu", json: Path | None = None) -> None:  # fmt: skip
    """Time of a training step against the number of boxes and of classes; see `detection.benchmarks.speed`."""
    from detection.benchmarks.speed import measure_flatness

    report(measure_flatness(network, size, batch_size, rounds, device), json)


def data(images: Path | None = None, rounds: int = 5, num_workers: int = 2, json: Path | None = None) -> None:
    """Images a second of the loader against Pillow + torchvision v2; see `detection.benchmarks.data`."""
    from detection.benchmarks.data import loader_throughput

    report([loader_throughput(images, rounds=rounds, num_workers=num_workers)], json)


def evaluation(images: int = 5000, json: Path | None = None) -> None:
    """Time of computing mAP against torchmetrics with pycocotools; see `detection.benchmarks.evaluation`."""
    from detection.benchmarks.evaluation import benchmark_eval

    report(benchmark_eval(images=images), json)


def memory(mode: Literal["train", "masks"] = "train", network: Literal["resnet50", "efficientnet_lite0"] = "resnet50",
           size: int = 800, batch_size: int = 2, bf16: bool = False, images: int = 5000,
           json: Path | None = None) -> None:  # fmt: skip
    """Peak memory of training, or of evaluating masks, against the peers'; see `detection.benchmarks.memory`.

    Args:
        mode: what is measured.
        network, size, batch_size, bf16: of the training.
        images: that are evaluated, with 100 masks each.
        json: file of the rows.
    """
    from detection.benchmarks.memory import measure_masks, measure_training

    report(measure_training(network, size, batch_size, bf16) if mode == "train" else measure_masks(images), json)


def scale(shape: Literal["coco", "objects365"] = "coco", sizes: list[int] = [5_000, 20_000, 60_000],  # noqa: B006
          folder: Path | None = None, json: Path | None = None) -> None:  # fmt: skip
    """Time and memory against the number of images, and at the full size; see `detection.benchmarks.scale`.

    Args:
        shape: the data set whose objects, classes and number of images are drawn.
        sizes: three numbers of images.
        folder: where the pictures are laid, an inode each; default: the system's temporary folder.
        json: file of the rows.
    """
    from detection.benchmarks.scale import measure_scale

    report(measure_scale(shape, sizes, folder), json)


def accuracy(root: Path, config: Path = CONFIGS / "bccd.yaml", seeds: list[int] = [0, 1, 2],  # noqa: B006
             contenders: list[str] = [], output: Path | None = None, data: dict[str, Any] = {},  # noqa: B006
             images: int | None = None, every: int | None = None, json: Path | None = None) -> None:  # fmt: skip
    """AP after the same training as torchvision's detector; see `detection.benchmarks.accuracy`.

    Args:
        root, config, seeds, contenders, output: see `detection.benchmarks.accuracy.measure_accuracy`.
        data: settings of the data that differ from the configuration's.
        images: that each contender sees.
        every: images after which AP is measured on the way, for the time to torchvision's AP.
        json: file of the rows.
    """
    from detection.benchmarks.accuracy import measure_accuracy, summarise, times_to_ap

    rows = measure_accuracy(config, root, seeds, contenders, output, data, images, every)
    report(rows, json)
    report(summarise(rows), None)
    if every and (table := times_to_ap(rows)):
        report(table, None)


def family(ckpts: list[Path], root: Path | None = None, images: int = 10, rounds: int = 3,
           trust: list[str] = [], json: Path | None = None) -> None:  # noqa: B006  # fmt: skip
    """Proposal time, time an image and AP of trained checkpoints; see `detection.benchmarks.family`."""
    from detection.benchmarks.family import measure_family

    report(measure_family(ckpts, root, images, rounds, trust), json)


def soak(steps: int = 2000, num_workers: int = 2, json: Path | None = None) -> None:
    """Whether memory, open files and time a step stay as they are over a long run; see `detection.benchmarks.soak`."""
    from detection.benchmarks.soak import soak

    report(soak(steps, num_workers), json)


def gpu(minutes: float = 8, output: Path = Path("build/gpu"), docs: Path | None = None, rehearse: bool | None = None,
        only: list[str] = [], bccd: Path | None = None) -> None:  # noqa: B006  # fmt: skip
    """All that is to be known of a GPU, in one command that stops by itself; see `detection.benchmarks.gpu`.

    Args:
        minutes: in all.
        output: folder of `gpu.json` and of its page `gpu.md`.
        docs: folder that gets both too, if it was a GPU and no rehearsal.
        rehearse: run on the CPU in tiny sizes; default: where there is no GPU.
        only: these sections alone.
        bccd: folder of the blood cells; default: `shared/data/bccd`, here or one folder up.
    """
    from detection.benchmarks.gpu import run

    run(minutes, output, docs, rehearse, only, bccd)


COMMANDS = {
    "train": train,
    "infer": infer,
    "deploy": deploy,
    "profile": profile,
    "forms": forms,
    "flat": flat,
    "data": data,
    "eval": evaluation,
    "memory": memory,
    "scale": scale,
    "accuracy": accuracy,
    "family": family,
    "soak": soak,
    "gpu": gpu,
}
