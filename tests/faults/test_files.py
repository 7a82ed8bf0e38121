"""Files that are damaged, foreign or hostile: nothing of them runs, and the user reads one sentence."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from detection.data import download
from detection.data.coco import read_coco
from detection.data.datamodule import DetectionDataModule
from detection.data.records import DataError
from detection.data.voc import read_voc
from detection.data.yolo import read_yolo
from detection.errors import complaint
from detection.training.module import DetectionModule

Record = Callable[[str, object], None]


def complaint_of(command: Callable[[], object]) -> str:
    said = complaint(command)
    assert said is not None and said.startswith("error: ") and "\n" not in said and len(said) < 1500
    return said


def images_of(data: list[str], tmp_path: Path, **options: Any) -> DetectionDataModule:
    """A copy of the drawn scenes, read and ready."""
    source = Path(data[data.index("--data.root") + 1])
    root = tmp_path / "copy"
    os.system(f"cp -r {source} {root}")
    pairs = zip(data[::2], data[1::2], strict=True)
    flags = {flag.removeprefix("--data."): value for flag, value in pairs if flag.startswith("--data.")}
    module = DetectionDataModule(**flags | {"root": str(root), "batch_size": 2, "num_workers": 0} | options)
    module.setup("fit")
    return module


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def fill_with_zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE = [truncate, fill_with_zeros, Path.unlink, replace_by_folder]


@pytest.mark.fault(
    fault="an image is damaged in the middle of a run: {case}",
    injected="the file itself, after the data was read",
    promised="another takes its place; it is named once and counted",
)
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damaged_image(
    damage: Callable[[Path], None], data: list[str], tmp_path: Path, record_property: Record, caplog: Any
) -> None:
    module = images_of(data, tmp_path)
    loader = module.train_dataloader()
    victim = sorted((tmp_path / "copy" / "train").iterdir())[0]
    damage(victim)
    with caplog.at_level("WARNING", logger="detection"):
        batches = [*loader, *loader]
    said = [record.getMessage() for record in caplog.records if victim.name in record.getMessage()]
    record_property("happened", f"{len(batches)} batches; {said}")
    assert sum(len(batch) for batch in batches) == 16 and len(said) == 1
    assert "Another image is trained on in its place" in said[0]
    assert sum(len(batch.unreadable) for batch in batches) >= 2  # in each epoch, and when it is drawn for itself


@pytest.mark.fault(
    fault="more images are damaged than max_unreadable",
    injected="half of the files truncated, max_unreadable 2",
    promised="the run ends with one sentence that names an image and what to do",
)
def test_too_many_damaged(data: list[str], tmp_path: Path, record_property: Record) -> None:
    loader = images_of(data, tmp_path, max_unreadable=2).train_dataloader()
    victims = sorted((tmp_path / "copy" / "train").iterdir())[:4]
    for victim in victims:
        truncate(victim)
    said = complaint_of(lambda: [*loader, *loader, *loader])
    record_property("happened", said)
    assert "restore them" in said or "replace the file" in said
    assert sum(victim.name in said for victim in victims) >= 1


@pytest.mark.fault(
    fault="a validation image is damaged",
    injected="a file truncated, read by a worker",
    promised="the run ends with its name, as figures would silently change; no traceback of the worker",
)
def test_damaged_validation_image(data: list[str], tmp_path: Path, record_property: Record) -> None:
    loader = images_of(data, tmp_path, num_workers=1).val_dataloader()
    victim = sorted((tmp_path / "copy" / "val").iterdir())[1]
    truncate(victim)
    said = complaint_of(lambda: list(loader))
    record_property("happened", said)
    assert said.startswith(f"error: {victim}: ") and "truncated or damaged; replace the file" in said


class Evil:
    """Pickled, it is a program that makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


def state_of(path: Path) -> dict[str, Any]:
    return dict(DetectionModule.load_from_checkpoint(path).state_dict())


@pytest.mark.fault(
    fault="a checkpoint is cut off",
    injected="the file truncated at 12 random bytes",
    promised="one sentence that names it",
)
def test_truncated_checkpoint(checkpoint: Path, tmp_path: Path, record_property: Record) -> None:
    whole, path = checkpoint.read_bytes(), tmp_path / "cut.ckpt"
    for at in (0, 1, 100, *random.Random(0).sample(range(len(whole)), 12)):
        path.write_bytes(whole[:at])
        said = complaint_of(lambda: state_of(path))
        assert str(path) in said
    record_property("happened", said)


@pytest.mark.fault(
    fault="the checkpoint to go on from is cut off",
    injected="half of the file, for --resume FILE",
    promised="exit 2 with one line before anything is trained",
)
def test_truncated_resume(fit: Any, checkpoint: Path, tmp_path: Path, record_property: Record) -> None:
    whole, path = checkpoint.read_bytes(), tmp_path / "cut.ckpt"
    path.write_bytes(whole[: len(whole) // 2])
    run = fit("--resume", str(path))
    record_property("happened", f"exit {run.code}: {run.error}")
    assert run.code == 2 and run.error == f"error: {path} is cut off or damaged"


@pytest.mark.slow
@pytest.mark.fault(
    fault="bytes of a checkpoint are wrong",
    injected="40 files with a random byte flipped, half of them among the headers",
    promised="one sentence that names it, or the same weights as before",
)
def test_flipped_checkpoint(checkpoint: Path, tmp_path: Path, record_property: Record) -> None:
    whole, path, rng, refused = bytearray(checkpoint.read_bytes()), tmp_path / "flipped.ckpt", random.Random(0), 0
    right = state_of(checkpoint)
    for number in range(40):
        at = rng.randrange(len(whole)) if number % 2 else len(whole) - rng.randrange(1, 20_000)
        damaged = whole.copy()
        damaged[at] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        read: dict[str, Any] = {}
        said = complaint(lambda read=read: read.update(state_of(path)))  # type: ignore[misc]
        if said is not None:
            assert str(path) in said and "\n" not in said
            refused += 1
        else:
            assert read.keys() == right.keys()
            assert all(torch.equal(read[name], value) for name, value in right.items()), at
    record_property("happened", f"{refused} refused, {40 - refused} read without a difference")


def without(content: dict[str, Any], *keys: str) -> dict[str, Any]:
    part: Any = content
    for key in keys[:-1]:
        part = part[key]
    del part[keys[-1]]
    return content


@pytest.mark.fault(
    fault="a checkpoint lacks, or has, what it should not: {case}",
    injected="a key deleted or replaced, and the file saved again",
    promised="one sentence that names it",
)
@pytest.mark.parametrize(
    "change",
    [
        lambda c: without(c, "state_dict"),
        lambda c: without(c, "hyper_parameters"),
        lambda c: without(c, "hyper_parameters", "class_names"),
        lambda c: without(c, "hyper_parameters", "detector"),
        lambda c: without(c, "state_dict", next(iter(c["state_dict"]))),
        lambda c: c | {"state_dict": {"weight": torch.zeros(3)}},
        lambda c: c | {"hyper_parameters": 7},
        lambda c: c["state_dict"],
        lambda c: [1, 2, 3],
        lambda c: torch.zeros(3),
    ],
    ids=[
        *("no state_dict", "no settings", "no classes", "no recipe", "a tensor less", "other tensors"),
        *("settings are a number", "only a state_dict", "a list", "a tensor"),
    ],
)
def test_foreign_checkpoint(change: Any, checkpoint: Path, tmp_path: Path, record_property: Record) -> None:
    torch.save(change(torch.load(checkpoint, weights_only=True)), tmp_path / "a.ckpt")
    said = complaint_of(lambda: state_of(tmp_path / "a.ckpt"))
    record_property("happened", said)
    assert str(tmp_path / "a.ckpt") in said


@pytest.mark.fault(
    fault="a checkpoint is a program",
    injected="{case} whose loading runs a command",
    promised="refused with one sentence, nothing of it runs",
)
@pytest.mark.parametrize("kind", ["pickle", "torch file", "old torch file", "instantiator", "recipe"])
def test_evil_checkpoint(kind: str, checkpoint: Path, tmp_path: Path, record_property: Record) -> None:
    path, canary = tmp_path / "evil.ckpt", tmp_path / "canary"
    content = torch.load(checkpoint, weights_only=True)
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Evil(canary)))
    elif kind in ("torch file", "old torch file"):
        torch.save(content | {"extra": Evil(canary)}, path, _use_new_zipfile_serialization=kind == "torch file")
    elif kind == "instantiator":
        content["hyper_parameters"]["_instantiator"] = "os.system"
        torch.save(content, path)
    else:
        recipe = {"class_path": "os.system", "init_args": {"command": f"touch {canary}"}}
        content["hyper_parameters"]["detector"] = recipe
        torch.save(content, path)
    said = complaint_of(lambda: state_of(path))
    record_property("happened", said)
    assert str(path) in said and not canary.exists()


EVIL_CONFIGS = {
    "a function": {"class_path": "lightning.pytorch.callbacks.LambdaCallback", "init_args": {"setup": "os.system"}},
    "a loader of code": {
        "class_path": "lightning.pytorch.callbacks.LambdaCallback",
        "init_args": {"setup": "torch.hub.load"},
    },
    "a class of a package that is not known": {"class_path": "rich.progress.Progress"},
    "a module beside it": "evil.Callback",
    "another file": "other.yaml",
}


@pytest.mark.fault(
    fault="the configuration in a run's folder names {case}",
    injected="config.yaml of the folder that --resume is given",
    promised="refused with one line, nothing is imported or run",
)
@pytest.mark.parametrize("case", EVIL_CONFIGS)
def test_evil_run_folder(case: str, fit: Any, checkpoint: Path, tmp_path: Path, record_property: Record) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    (folder / "last.ckpt").write_bytes(checkpoint.read_bytes())
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    (folder / "other.yaml").write_text("- class_path: evil.Callback\n")
    (folder / "config.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [EVIL_CONFIGS[case]]}}))

    def before() -> None:
        os.chdir(folder)
        sys.path.insert(0, str(folder))

    run = fit("--resume", str(folder), before=before)
    record_property("happened", f"exit {run.code}: ...{run.error[-250:]}")
    told = ("which is no part of a run" in run.error) or ("if you trust the code of" in run.error)
    assert run.code == 2 and (told or case == "another file")
    assert not (tmp_path / "canary").exists()


@pytest.mark.fault(
    fault="a YAML file is a program",
    injected="!!python/object/apply in {case}",
    promised="refused with one line, nothing of it runs",
)
@pytest.mark.parametrize("case", ["a configuration", "data.yaml"])
def test_evil_yaml(case: str, fit: Any, tmp_path: Path, record_property: Record) -> None:
    text = f"names: !!python/object/apply:os.system ['touch {tmp_path / 'canary'}']\n"
    (tmp_path / "data.yaml").write_text(text)
    if case == "data.yaml":
        said = complaint_of(lambda: read_yolo(tmp_path, "train"))
    else:
        run = fit("--config", str(tmp_path / "data.yaml"), bare=True)
        said = run.error
        assert run.code == 2
    record_property("happened", said)
    assert ("object/apply" in said or "ConstructorError" in said) and not (tmp_path / "canary").exists()


def entity_bomb() -> str:
    lines = [f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 10)]
    return f'<!DOCTYPE x [<!ENTITY a0 "ha">{"".join(lines)}]><annotation><filename>&a9;</filename></annotation>'


XML = {
    "a billion laughs": entity_bomb(),
    "a file of the system": '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><annotation>&a;</annotation>',
}


@pytest.mark.fault(
    fault="an XML annotation asks for {case}",
    injected="entities in a VOC file",
    promised="the file is left out and named, nothing is expanded or read",
)
@pytest.mark.parametrize("case", XML)
def test_evil_xml(case: str, tmp_path: Path, record_property: Record) -> None:
    for folder in ("Annotations", "JPEGImages"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "JPEGImages" / "a.jpg")
    (tmp_path / "Annotations" / "a.xml").write_text(XML[case])
    with pytest.raises(DataError) as error:
        read_voc(tmp_path)
    record_property("happened", [str(defect) for defect in error.value.defects])
    assert any("EntitiesForbidden" in str(defect) for defect in error.value.defects)
    assert "root:" not in str(error.value.defects)


ESCAPING = ["/etc/hostname", "../outside.png", "a/../../outside.png", "..\\outside.png", "C:\\x.png"]
ESCAPING += ["link.png", "folder/outside.png"]


@pytest.mark.fault(
    fault="an annotation's file name leaves the data root: {case}",
    injected="file_name in a COCO file, or a real symbolic link",
    promised="refused, named",
)
@pytest.mark.parametrize("case", ESCAPING)
def test_escaping_name(case: str, tmp_path: Path, record_property: Record) -> None:
    root = tmp_path / "root"
    root.mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "outside.png")
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    (root / "folder").symlink_to(tmp_path)
    image = {"id": 1, "file_name": case, "width": 20, "height": 20}
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5]}
    content = {"images": [image], "annotations": [box], "categories": [{"id": 1, "name": "a"}]}
    (root / "gt.json").write_text(json.dumps(content))
    said = complaint_of(lambda: read_coco(root, "gt.json"))
    record_property("happened", said)
    assert "is not inside" in said or "no image" in said


def tar_with(info: tarfile.TarInfo, data: bytes = b"x") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        good = tarfile.TarInfo("in/a")
        good.size = 1
        archive.addfile(good, io.BytesIO(b"a"))
        info.size = len(data) if info.isfile() else 0
        archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def tar_entry(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def zip_bomb() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(4):
            archive.writestr(f"in/{number}", bytes(8 << 20))
    return out.getvalue()


ARCHIVES: dict[str, Callable[[], bytes]] = {
    "a path that climbs out": lambda: tar_with(tar_entry("in/../../evil")),
    "an absolute path": lambda: tar_with(tar_entry("/evil")),
    "a symbolic link": lambda: tar_with(tar_entry("in/l", tarfile.SYMTYPE, "/etc")),
    "a hard link": lambda: tar_with(tar_entry("in/l", tarfile.LNKTYPE, "../../etc/passwd")),
    "a device": lambda: tar_with(tar_entry("in/d", tarfile.CHRTYPE)),
    "a pipe": lambda: tar_with(tar_entry("in/p", tarfile.FIFOTYPE)),
    "a bomb, 32 MiB from 32 KiB": zip_bomb,
    "a bomb in a tar.gz": lambda: tar_with(tar_entry("in/b"), bytes(32 << 20)),
}


@pytest.mark.fault(
    fault="an archive has {case}",
    injected="a real archive; the cap is lowered to 16 MiB for the bombs",
    promised="refused with one sentence, nothing is left behind",
)
@pytest.mark.parametrize("case", ARCHIVES)
def test_evil_archive(case: str, tmp_path: Path, record_property: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "LARGEST", 16 << 20)
    (tmp_path / "target").mkdir()
    (tmp_path / "archive").write_bytes(ARCHIVES[case]())
    said = complaint_of(lambda: download.unpack(tmp_path / "archive", tmp_path / "target" / "set", "in"))
    record_property("happened", said)
    assert "don't use this archive" in said or "unpacks to more than" in said
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["archive", "target"]


@pytest.mark.fault(
    fault="the disk is full while an archive is unpacked",
    injected="a tmpfs of 1 MiB",
    promised="one sentence, nothing is left behind",
)
def test_full_disk_in_unpacking(tmpfs: Any, tmp_path: Path, record_property: Record) -> None:
    folder = tmpfs("size=1m")
    (tmp_path / "archive").write_bytes(zip_bomb())
    said = complaint_of(lambda: download.unpack(tmp_path / "archive", folder / "set", "in"))
    record_property("happened", said)
    assert "No space left on device" in said and not list(folder.iterdir())
