"""Detectors on the Hugging Face Hub: a `.safetensors` file and a model card that is made from the run's report.

The network is used when one of these functions is called, and at no other time. Only `.safetensors` is sent or taken,
so nothing that could run is in what comes back. Tokens are `huggingface_hub`'s own business (`HF_TOKEN`, or
`hf auth login`): none passes through here.
"""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from detection.interop.files import load_detector, save_detector
from detection.models.two_stage import FasterRCNN
from detection.weights import CheckpointError, read_saved, read_torch

DETECTOR, CARD = "detector.safetensors", "README.md"
LIBRARY = "detection"
LIMITS = (
    "It knows the classes above and gives one of them to whatever it finds. The figures hold for images like those "
    "they were measured on; on others, measure before use (`detection evaluate`). Chance moves figures of small sets."
)
NO_LICENSE = " No licence was named for the weights: ask their owner before you use them."


def push(ckpt: Path, repo: str, private: bool = True, trust: Iterable[str] = (), license: str | None = None) -> str:
    """Upload a detector with its card, as one commit, into a repository that is made if it is not there.

    Args:
        ckpt: `.ckpt` of a run, or `.safetensors`.
        repo: `owner/name`.
        private: whether a repository that is made shows itself to nobody else.
        trust: packages whose parts the checkpoint may use.
        license: of the weights, as the Hub spells it (`apache-2.0`); without, the card says that none was named.

    Returns:
        the address of the commit.

    Raises:
        CheckpointError: the Hub can't be reached, or refuses; the message says what to do.
        ImportError: huggingface_hub is not installed.
    """
    hub = _hub()
    _check(repo)
    model, saved = load_detector(ckpt, trust), read_saved(ckpt)
    with tempfile.TemporaryDirectory() as folder:
        save_detector(Path(folder) / DETECTOR, model, saved.class_names, saved.category_ids, tiles=saved.tiles)
        (Path(folder) / CARD).write_text(card(ckpt, model, saved.class_names, repo, license), encoding="utf-8")
        try:
            api = hub.HfApi()
            api.create_repo(repo, private=private, exist_ok=True)
            return str(
                api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Add {DETECTOR} and its card")
            )
        except Exception as error:
            raise CheckpointError(_reason(repo, error)) from error


def pull(repo: str, output: Path, revision: str | None = None, trust: Iterable[str] = ()) -> FasterRCNN:
    """Download a detector that `push` has uploaded, and try it: parts of packages that are not trusted are an error.

    Args:
        repo: `owner/name`.
        output: `.safetensors` file to write; nothing is left of what does not load.
        revision: branch, tag or commit; the newest by default. A commit's hash is the same file for ever.
        trust: packages whose parts it may use.

    Raises:
        CheckpointError: the Hub can't be reached or has no such file, or that is not a detector of ours.
        ImportError: huggingface_hub is not installed.
    """
    hub = _hub()
    _check(repo)
    if output.suffix != ".safetensors":
        raise CheckpointError(f"{output}: a detector of the Hub is written as .safetensors")
    with tempfile.TemporaryDirectory() as folder:
        try:
            # Into a folder of its own: what lies in the cache already would otherwise answer without the Hub.
            found = Path(hub.hf_hub_download(repo, DETECTOR, revision=revision, local_dir=folder))
        except Exception as error:
            raise CheckpointError(_reason(repo, error)) from error
        model = load_detector(found, trust)
        output.parent.mkdir(parents=True, exist_ok=True)
        part = output.with_name(output.name + ".part")
        part.write_bytes(found.read_bytes())
        part.replace(output)
    return model


def card(
    ckpt: Path, model: FasterRCNN, class_names: Sequence[str] | None, repo: str, license: str | None = None
) -> str:
    """The model card, Markdown with the Hub's header: figures, classes, settings, data and limits, as the run has them.

    What the checkpoint and its folder don't say, the card says to be unknown. No path of this machine is in it.

    Args:
        ckpt: whose folder has the run's evaluation (`detection evaluate`) and `metrics.csv`.
        model: of the checkpoint.
        class_names: of the foreground, label 1 first.
        repo: `owner/name`, for the lines that fetch it.
        license: see `push`.
    """
    kept: Mapping[str, Any] = read_torch(ckpt) if ckpt.suffix == ".ckpt" else {}
    data, run = kept.get("datamodule_hyper_parameters") or {}, kept.get("hyper_parameters") or {}
    where, figures = _figures(ckpt)
    transform, name = model.transform, str((model.recipe or {}).get("class_path", "")).rpartition(".")[2]
    header = {"library_name": LIBRARY, "pipeline_tag": "object-detection", "tags": ["object-detection", name]}
    header |= {} if license is None else {"license": license}
    rows = [f"| {key} | {value:.4f} |" for key, value in figures.items()]
    table = ["| figure | |", "|---|---|", *rows] if rows else ["The run has no figures: nothing was evaluated."]
    classes = ", ".join(class_names) if class_names else f"{model.num_classes - 1}, without names"
    settings = {
        "images": f"{transform.channels} channels, {transform.image_depth} bits",
        "short side, long side at most": f"{transform.min_size[-1]}, {transform.max_size}",
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "steps": kept.get("global_step", "unknown"),
        "images a step": data.get("batch_size", "unknown"),
        "learning rate": run.get("lr", "unknown"),
        "code": kept.get("code", "unknown"),
    }
    also = (", masks" if model.has_masks else "") + (
        f", {model.num_keypoints} key points" if model.has_keypoints else ""
    )
    trained = f"{Path(str(data['root'])).name}, {data.get('format') or 'format as found'}" if data.get("root") else None
    return (
        "\n".join(
            [
                "---",
                *(f"{key}: {json.dumps(value)}" for key, value in header.items()),
                "---",
                f"# {repo.rpartition('/')[2]}",
                f"{name}, an object detector of the package `detection`: boxes{also}, classes and scores.",
                "## Figures",
                *([f"COCO's, {where}.", ""] if rows else []),
                *table,
                "## Classes",
                classes,
                "## Data",
                trained or "The checkpoint does not say what it was trained on.",
                "## Settings",
                "| setting | |",
                "|---|---|",
                *(f"| {key} | {value} |" for key, value in settings.items()),
                "## Limits",
                LIMITS + ("" if license else NO_LICENSE),
                "## Use",
                "```bash",
                f"detection convert pull --repo {repo} --output detector.safetensors",
                "detection predict --ckpt detector.safetensors --source IMAGES",
                "```",
                "",
            ]
        )
        .replace("\n## ", "\n\n## ")
        .replace("of [detection]", "of the package `detection`")
    )


def _figures(ckpt: Path) -> tuple[str, dict[str, float]]:
    """Where figures come from, and these: the last evaluation beside the checkpoint, else its last validation."""
    reports = sorted(ckpt.parent.glob("evaluation_*/figures.json"), key=lambda path: path.stat().st_mtime)
    if reports:
        found = json.loads(reports[-1].read_text())["figures"]
        name = reports[-1].parent.name.removeprefix("evaluation_")
        return f"on the split `{name}`", {key: value for key, value in found.items() if value >= 0}
    curves = ckpt.parent / "metrics.csv"
    if ckpt.suffix == ".ckpt" and curves.is_file():
        with curves.open(newline="") as file:
            rows = [
                {k: float(v) for k, v in row.items() if k.startswith("val/m") and v} for row in csv.DictReader(file)
            ]
        if rows := [row for row in rows if row]:
            last = {key.removeprefix("val/"): value for key, value in rows[-1].items() if value >= 0}
            return "on the validation images during training, at the last validation", last
    return "", {}


def _check(repo: str) -> None:
    owner, slash, name = repo.partition("/")
    if not (owner and slash and name) or "/" in name:
        raise CheckpointError(f"--repo {repo}: name a repository of the Hub as owner/name")


def _reason(repo: str, error: Exception) -> str:
    """What to do, without what the Hub's error may quote of the request."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"{repo}: the Hub refuses ({status}): log in with `hf auth login`, or set HF_TOKEN"
    if status == 404:
        return f"{repo}: the Hub has no such repository, revision or {DETECTOR}"
    if type(error).__name__ in ("OfflineModeIsEnabled", "LocalEntryNotFoundError") or status is None:
        return (
            f"{repo}: the Hub can't be reached ({type(error).__name__}): HF_HUB_OFFLINE must not be set, HF_ENDPOINT "
            f"must be right; or carry {DETECTOR} here by hand, which `detection convert import` writes"
        )
    return f"{repo}: the Hub answers {status}: try again later"


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError('the Hub needs huggingface_hub: pip install "detection[hub]"') from error
    return huggingface_hub
