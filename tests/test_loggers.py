"""metrics.csv goes on where it ended; W&B never waits for a key."""

from __future__ import annotations

import csv
import resource
from pathlib import Path

import pytest

from detection.training.loggers import MetricsFile, Tracker, logged_in


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_resumed_run_appends_with_new_and_old_columns(tmp_path: Path) -> None:
    for step, metrics in enumerate([{"loss": 1.0}, {"loss": 0.5, "map": 0.1}, {"lr": 0.2}]):
        logger = MetricsFile(tmp_path)  # a new process each time
        logger.log_metrics(metrics, step)
        logger.save()
    found = rows(tmp_path)
    assert [row["loss"] for row in found] == ["1.0", "0.5", ""]
    assert [row["step"] for row in found] == ["0", "1", "2"]
    assert (found[1]["map"], found[2]["lr"]) == ("0.1", "0.2")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_rows_after_the_checkpoint_are_cut(tmp_path: Path) -> None:
    for step in range(4):
        MetricsFile(tmp_path).log_metrics({"loss": 1.0 / (step + 1)}, step)
    logger = MetricsFile(tmp_path)
    assert logger.rows == 4
    logger.cut(2)
    logger.log_metrics({"loss": 9.0}, 2)
    assert logger.rows == 3
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [("0", "1.0"), ("1", "0.5"), ("2", "9.0")]


def test_rows_wait_for_room_on_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Fault: no room for metrics.csv | injected: a limit of the system on the size of files |
    promise: training goes on, one line says so, and no row is lost or torn once there is room."""
    logger = MetricsFile(tmp_path)
    logger.log_metrics({"loss": 1.0}, 0)
    size = (tmp_path / "metrics.csv").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 4, before[1]))
    logger.log_metrics({"loss": 0.5}, 1)
    logger.log_metrics({"loss": 0.25, "map": 0.1}, 2)
    assert (tmp_path / "metrics.csv").stat().st_size == size
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    logger.log_metrics({"loss": 0.125}, 3)
    assert [row["loss"] for row in rows(tmp_path)] == ["1.0", "0.5", "0.25", "0.125"]
    records = {id(record): record for record in caplog.records}  # once each, however many loggers hand them on
    assert [record.levelname for record in records.values()] == ["ERROR"]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_key_is_found_where_wandb_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not logged_in()
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine api.wandb.ai\n  login user\n  password 0123456789\n")
    netrc.chmod(0o600)
    assert logged_in()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")  # a server of one's own has its own key
    assert not logged_in()
    monkeypatch.setenv("WANDB_API_KEY", "0123456789")
    assert logged_in()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert not logged_in()


def test_run_keeps_its_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "voc" / "2026-01-02_03-04-05"
    first, other = Tracker("auto", folder), Tracker("auto", folder)  # on two machines, in the same second
    assert first.version != other.version
    assert str(first.version).startswith("voc-2026-01-02_03-04-05-")
    (folder / "wandb" / f"offline-run-20260102_030406-{first.version}").mkdir(parents=True)
    (folder / "wandb" / "latest-run").symlink_to(f"offline-run-20260102_030406-{first.version}")
    assert Tracker("auto", folder).version == first.version
    assert first._offline


def test_online_without_a_key_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match="wandb login"):
        Tracker("online", tmp_path / "a")


def test_name_and_id_that_the_environment_sets_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "quickstart" / "2026-01-02_03-04-05"
    own = Tracker("offline", folder)._wandb_init
    assert own["name"] == "quickstart/2026-01-02_03-04-05" and str(own["id"]).startswith("quickstart-2026")
    monkeypatch.setenv("WANDB_NAME", "mine")
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    given = Tracker("offline", folder)._wandb_init
    assert (given["name"], given["id"]) == ("mine", "abc123")
