"""The command `convert`: checkpoints of other libraries and of the Hub come here, or ours go there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detection.certificates.certificate import relative
from detection.certificates.making import Job
from detection.cli.certifying import certify
from detection.cli.flags import chosen, run_command
from detection.interop import export_detector, fetch_weights, hub, import_detector, save_detector
from detection.interop.files import Library, StyleName
from detection.interop.semantics import Library as Rules
from detection.interop.told import report


def bring(
    source: Path,
    output: Path,
    style: StyleName | None = None,
    contiguous: bool = False,
    without_epsilon: bool | None = None,
    trust: list[str] = [],  # noqa: B006
    bgr: bool | None = None,
    stride_in_1x1: bool | None = None,
    config: Path | None = None,
    semantics: Rules | None = None,
    class_names: list[str] | None = None,
    certificate: bool = True,
    images: str | None = None,
    data: Path | None = None,
) -> None:
    """Write a checkpoint as .safetensors that says how to build its detector: no settings are needed later.

    A certificate is written beside it and into it: how far it is from what its library computes, stage by stage.

    Args:
        source: .pth, .pkl (read without running anything in it), .safetensors, or the .ckpt of a run or its folder.
        output: .safetensors file to write.
        style: of a ResNet: caffe (stride in the 1x1 convolution, BGR from 0 to 255) or pytorch. By default what the
            file says, else that of such models in Detectron2's zoo, and pytorch for MMDetection.
        contiguous: give the 91 classes of torchvision's COCO detectors the labels 1 to 80.
        without_epsilon: frozen normalisation was trained with epsilon 0; by default for torchvision's own such files.
        trust: packages whose parts the checkpoint may use besides this one's, e.g. my_parts: their code runs.
        bgr: the network sees blue, green, red, whatever the style says.
        stride_in_1x1: its blocks have their stride in the 1x1 convolution, whatever the style says.
        config: for what tensors can't show (anchors, RoI Align, thresholds, ...): the .yaml of Detectron2 with its
            bases beside it, or the .py of MMDetection. Nothing in it is run. By default what MMDetection has put into
            the checkpoint, else the library's defaults.
        semantics: train on by the rules of torchvision, detectron2 or mmdetection. By default those of the library that
            wrote the checkpoint.
        class_names: of a checkpoint that does not name them, without the background, label 1 first: '[car, tractor]'.
        certificate: false writes none, which saves the time of running both detectors.
        images: image, folder or pattern to compare on; drawn scenes by default.
        data: folder of labelled images, to state the AP that is lost.
    """
    source = chosen(source)
    model, saved = import_detector(
        source, style, contiguous, without_epsilon, trust, bgr, stride_in_1x1, config, semantics, class_names
    )
    save_detector(output, model, saved.class_names, saved.category_ids, saved.origins, saved.tiles)
    print(f"{output}: {model.num_classes - 1} classes, {sum(p.numel() for p in model.parameters()):,} parameters")
    if saved.origins:
        print(report(saved.origins))
    if saved.class_names is None:
        print(
            f"note: {source.name} does not name its {model.num_classes - 1} classes, without which the file is neither "
            "predicted with nor trained on: add --class_names '[car, tractor, ...]', label 1 first"
        )
    if certificate:
        named: dict[str, Any] = {
            "style": style,
            "contiguous": contiguous,
            "without_epsilon": without_epsilon,
            "bgr": bgr,
        }
        named |= {"stride_in_1x1": stride_in_1x1, "semantics": semantics}
        settings = {name: value for name, value in named.items() if value is not None}
        settings |= {"config": relative(config, output.parent)} if config else {}
        certify(Job("import", output, source, settings, trust), images, data)


def take(
    source: Path,
    output: Path,
    to: Library,
    category_ids: bool = False,
    without_epsilon: bool = False,
    trust: list[str] = [],  # noqa: B006
    certificate: bool = True,
    images: str | None = None,
    data: Path | None = None,
) -> None:
    """Write one of our detectors for another library, and its certificate, see `import`.

    Args:
        source: .safetensors from `bring`, or the .ckpt of a run or its folder.
        output: .pth or .safetensors; .pkl too for Detectron2.
        to: torchvision or detectron2.
        category_ids: give COCO's 80 classes the 91 labels that torchvision has for them.
        without_epsilon: for torchvision's frozen normalisation with epsilon 0.
        trust: packages whose parts the checkpoint may use besides this one's, e.g. my_parts: their code runs.
        certificate: false writes none, which saves the time of running both detectors.
        images: image, folder or pattern to compare on; drawn scenes by default.
        data: folder of labelled images, to state the AP that is lost.
    """
    source = chosen(source)
    print(f"{output} is written. {export_detector(source, output, to, category_ids, without_epsilon, trust)}")
    if certificate:
        settings = {"to": to, "category_ids": category_ids, "without_epsilon": without_epsilon}
        certify(Job("take", output, source, settings, trust), images, data)


def download(weights: str) -> None:
    """Fetch weights of torchvision into its cache.

    Args:
        weights: their name, e.g. FasterRCNN_ResNet50_FPN_Weights.COCO_V1.
    """
    print(fetch_weights(weights))


def push(
    ckpt: Path,
    repo: str,
    private: bool = True,
    license: str | None = None,
    trust: list[str] = [],  # noqa: B006
) -> None:
    """Upload a detector to the Hugging Face Hub, with a model card made of the run's report.

    Args:
        ckpt: run's folder, its checkpoint, or .safetensors of `detection convert`.
        repo: owner/name; it is made if it is not there.
        private: false lets everybody see a repository that is made.
        license: of the weights, as the Hub spells it, e.g. apache-2.0.
        trust: packages whose parts the checkpoint may use besides this one's, e.g. my_parts: their code runs.
    """
    print(f"{repo}: {hub.push(chosen(ckpt), repo, private, trust, license)}")


def pull(
    repo: str,
    output: Path,
    revision: str | None = None,
    trust: list[str] = [],  # noqa: B006
) -> None:
    """Download a detector that `push` has uploaded.

    Args:
        repo: owner/name.
        output: .safetensors file to write.
        revision: branch, tag or commit; the newest by default.
        trust: packages whose parts the checkpoint may use besides this one's, e.g. my_parts: their code runs.
    """
    model = hub.pull(repo, output, revision, trust)
    print(f"{output}: {model.num_classes - 1} classes, {sum(p.numel() for p in model.parameters()):,} parameters")


def main(args: Sequence[str]) -> str | None:
    """Run the command with its flags; returns the sentence on what went wrong, if anything did."""
    commands = {"import": bring, "export": take, "download": download, "push": push, "pull": pull}
    return run_command("convert", commands, args, ImportError)
