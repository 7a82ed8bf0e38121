"""What keeps a run from being lost, or lost without a word: checks at its start, and a guard over its losses.

`check_start` refuses what would fail hours later; `Guard` stops all ranks at a loss that is not finite, before it
reaches the weights; the rest sees to it that no process waits for one that has ended.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from detection.batch import Batch
from detection.data.headers import EXTENSIONS
from detection.errors import RunError, blame_disk

# Files that a process keeps open: 60 or so for itself, and for each worker its pipes and shared batches.
FILES, FILES_PER_WORKER = 128, 32


def check_start(folder: Path, model: nn.Module, slots: int, workers: int) -> None:
    """Make the run's folder and refuse what would end the run later.

    Args:
        folder: of the run; checkpoints go there.
        model: whose checkpoints they are.
        slots: tensors that the optimiser keeps for each parameter: 1 for SGD with momentum, 2 for Adam.
        workers: processes that load data.

    Raises:
        RunError: the folder can't be written, has no room for two checkpoints, or too few files may be open.
    """
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0" * 4096)
        probe.unlink()
    except OSError as error:
        raise RunError(f"{blame_disk(folder, error)}: name another with --output") from error
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    held = [value for value in model.state_dict().values() if isinstance(value, Tensor)]  # it may hold other state, too
    size = sum(tensor.numel() * tensor.element_size() for tensor in held) + slots * trained
    free = shutil.disk_usage(folder).free
    if free < 2 * size:
        raise RunError(
            f"{folder} has {free >> 20} MiB free, but two checkpoints take {2 * size >> 20}: make room, or name "
            "another folder with --output"
        )
    _allow_open_files(FILES + FILES_PER_WORKER * workers)


def _allow_open_files(needed: int) -> None:
    """Raise the limit of open files as far as is needed and allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise RunError(
            f"this process may open {hard} files, but its loaders need about {needed}: raise the limit "
            f"(ulimit -n {max(4096, needed)}), or lower data.num_workers"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def end_with_parent(parent: int) -> None:
    """End this process when the one that started it has ended, as a rank without the first would wait for ever."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        sys.stderr.write("error: the first process of this run has ended, so this one ends too\n")
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()


def end_other_ranks(trainer: L.Trainer, error: BaseException, patience: float = 3.0) -> None:
    """End the run's other processes on this machine after a failure of this one: in a collective they would hang.

    Args:
        trainer: of the run.
        error: what ended this process; ranks that fail together leave the message, and the end, to the first.
        patience: seconds to end, and to say why, by themselves.
    """
    if getattr(error, "on_all_ranks", False) and trainer.local_rank:
        time.sleep(5)  # Lightning kills the first rank, message or not, when it sees that another has ended
    for rank, process in enumerate(getattr(trainer.strategy.launcher, "procs", ()), 1):
        try:
            code = process.wait(patience)
            sys.stderr.write(
                f"rank {rank} has ended " + (f"by signal {-code}\n" if code < 0 else f"with code {code}\n")
            )
        except subprocess.TimeoutExpired:
            process.kill()


@dataclass(slots=True)
class _Step:
    """What one optimiser step was made of: a batch and its losses for each accumulated part."""

    number: int
    epoch: int
    parts: list[tuple[Batch, Tensor, dict[str, Tensor]]] = field(default_factory=list)
    norm: Tensor | None = None
    bad: Tensor | None = None
    event: torch.cuda.Event | None = None


class Guard(L.Callback):
    """Stops every rank at a loss or gradient that is not finite, and says what was in work when a run fails.

    Before each optimiser step the ranks agree, by one reduction of one number, whether losses and gradient are finite.
    On the CPU the answer is there at once, and the step is not taken. On an accelerator to wait for it would leave the
    device idle: the number goes to the fused optimiser, whose kernel leaves the weights alone where it is 1 (as for
    `GradScaler`), and the host looks at it a step later, at the latest before validation and before saving. With an
    optimiser that can't do that it is waited for. With float16 gradients that overflow are usual, and the scaler skips
    them; there the losses alone count.

    Args:
        folder: of the run; `nonfinite.json` and `nonfinite-rank*.safetensors` are written there.
        patience: seconds after which a loader's process that is stopped is killed; 0 for never.
    """

    def __init__(self, folder: Path, patience: float = 50.0) -> None:
        self.folder, self.patience = folder, patience
        self.begun = False  # whether a batch has been trained on
        self._done, self._killed = threading.Event(), list[str]()
        self._batch: Batch | None = None
        self._step: _Step | None = None
        self._unread: _Step | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.patience:
            self._done.clear()
            threading.Thread(target=_end_stopped, args=(self.patience, self._done, self._killed), daemon=True).start()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._done.set()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        self._batch = batch

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        self._batch = batch

    def on_train_batch_end(self, *_: Any) -> None:
        self.begun = True
        self._batch = None  # or its memory could not be used for the next

    def on_validation_batch_end(self, *_: Any) -> None:
        self._batch = None

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        if self._step is None:
            self._step = _Step(trainer.global_step, trainer.current_epoch)
        if isinstance(self._batch, Batch):
            self._step.parts.append((self._batch, loss.detach(), dict(getattr(pl_module, "step_losses", {}))))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        step, self._step = self._step, None
        if step is None or not step.parts:
            return
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        step.norm = torch.nn.utils.get_total_norm(gradients)
        finite = torch.stack([loss for _, loss, _ in step.parts]).isfinite().all()
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if not scaled:
            finite = finite & step.norm.isfinite()
            pl_module.log("train/grad_norm", step.norm, batch_size=1)  # before it is clipped
        step.bad = (~finite).float()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(step.bad, dist.ReduceOp.MAX)
        harmless = scaled or getattr(optimizer, "_step_supports_amp_scaling", False)
        if step.bad.device.type != "cuda" or not harmless:
            self._read(step, trainer, pl_module, now=True)
            return
        if not scaled:
            optimizer.found_inf = step.bad  # type: ignore[attr-defined]
        step.bad = step.bad.to("cpu", non_blocking=True)
        step.event = torch.cuda.Event()
        step.event.record()
        before, self._unread = self._unread, step
        self._read(before, trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._read_all(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._read_all(trainer, pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Nothing is saved after a step that was not finite, nor any weights that are not."""
        self._read_all(trainer, pl_module)
        damaged = [name for name, p in pl_module.named_parameters() if not _largest(p).isfinite()]
        damaged += [name for name, b in pl_module.named_buffers() if b.is_floating_point() and _largest(b).isnan()]
        if damaged:
            raise RunError(
                f"step {trainer.global_step}: {damaged[0]} is not finite any more, so nothing was saved; go on from "
                "the checkpoint before with a lower model.lr",
                on_all_ranks=True,
            )

    def _read_all(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step, self._unread = self._unread, None
        self._read(step, trainer, pl_module)

    def _read(self, step: _Step | None, trainer: L.Trainer, pl_module: L.LightningModule, now: bool = False) -> None:
        """Look at a step's answer; all ranks do it at the same step, as they must to stop together."""
        if step is None or step.bad is None or step.norm is None:
            return
        if step.event is not None:
            step.event.synchronize()
        if not step.bad:
            return
        gradients = bad_gradients(pl_module) if now else []
        parts = [_describe_part(batch, loss, losses) for batch, loss, losses in step.parts]
        own = {"rank": trainer.global_rank, "gradient_norm": plain_number(step.norm), "parts": parts}
        reports: list[Any] = [own | {"gradients": gradients}]
        if dist.is_available() and dist.is_initialized():
            reports = [None] * dist.get_world_size()
            dist.all_gather_object(reports, own | {"gradients": gradients})
        rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
        facts = {"step": step.number, "epoch": step.epoch, "learning_rates": rates, "ranks": reports}
        folder = Path(trainer.strategy.broadcast(str(self.folder)))
        folder.mkdir(parents=True, exist_ok=True)
        if trainer.is_global_zero:
            (folder / "nonfinite.json").write_text(json.dumps(facts, indent=2))
        tensors = {f"{i}.{name}": value for i, part in enumerate(step.parts) for name, value in _tensors(part[0])}
        save_file(tensors, folder / f"nonfinite-rank{trainer.global_rank}.safetensors")
        again = f"detection replay {folder} --step {step.number}"
        sentence = f"{_sentence(facts)}; see {folder / 'nonfinite.json'}, and all of the step with {again}"
        raise RunError(sentence, on_all_ranks=True)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Note down what can't be known later: the batch in work, and what the loaders' processes were doing."""
        if isinstance(self._batch, Batch):
            batch, self._batch = self._batch, None
            shape = "x".join(map(str, batch.images.shape))
            exception.add_note(f"the batch was {shape} with up to {batch.gt_boxes.shape[1]} objects an image")
        if "DataLoader" in str(exception):
            doing = [_doing(worker.pid or 0) for worker in multiprocessing.active_children()]
            for note in filter(None, [*self._killed, *doing]):
                exception.add_note(note)
            _end_workers()


def _largest(value: Tensor) -> Tensor:
    return torch.nn.utils.get_total_norm([value.detach()], math.inf)  # NaN where there is one


def _describe_part(batch: Batch, loss: Tensor, losses: dict[str, Tensor]) -> dict[str, Any]:
    terms = {name: plain_number(value) for name, value in [*losses.items(), ("loss", loss)]}
    images = [{"file": t.file_name, "image_id": t.image_id, "boxes": t.boxes.tolist()} for t in batch.targets]
    return {"losses": terms, "images": images}


def plain_number(value: Tensor | float) -> float | str:
    """A figure as JSON has it, which knows no NaN: text in its place."""
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _tensors(batch: Batch) -> list[tuple[str, Tensor]]:
    names = ("images", "image_sizes", "gt_boxes", "gt_labels", "gt_valid")
    return [(name, getattr(batch, name).detach().cpu().contiguous()) for name in names]


def bad_gradients(module: nn.Module) -> list[str]:
    """Names of the parameters whose gradient is not finite."""
    return [name for name, p in module.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]


def _sentence(facts: dict[str, Any]) -> str:
    """What was not finite, where and when."""
    found = []
    for rank in facts["ranks"]:
        where = f" (rank {rank['rank']})" if len(facts["ranks"]) > 1 else ""
        for part in rank["parts"]:
            terms = {n: v for n, v in part["losses"].items() if isinstance(v, str)}
            named = ", ".join(f"{n} is {v}" for n, v in terms.items() if n != "loss" or len(terms) == 1)
            if named:
                found.append(f"{named} on {', '.join(image['file'] for image in part['images'])}{where}")
    if not found:
        files = [image["file"] for rank in facts["ranks"] for part in rank["parts"] for image in part["images"]]
        bad = next((rank["gradients"][0] for rank in facts["ranks"] if rank["gradients"]), "the weights")
        found = [f"the losses are finite but the gradient of {bad} is not, on {', '.join(files)}"]
    rate = max(facts["learning_rates"], default=0.0)
    return (
        f"step {facts['step']} of epoch {facts['epoch']}, at learning rate {rate:.3g}: {'; '.join(found)}. The step "
        "was not taken and no checkpoint has it: look at these images, or lower model.lr and go on from the last one"
    )


def _doing(pid: int) -> str:
    """What a loader's process waits for, as far as the system tells; empty for nothing in particular."""
    try:
        links = [os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")]
    except OSError:
        links = []
    files = [link for link in links if link.startswith("/") and Path(link).suffix.lower() in EXTENSIONS]
    state = {"T": "is stopped", "D": "waits for a disk"}.get(_state(pid), "")
    doing = " and ".join(filter(None, (state, f"reads {files[-1]}" if files else "")))
    return f"worker {pid} {doing}" if doing else ""


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _end_stopped(patience: float, done: threading.Event, killed: list[str]) -> None:
    """Kill loaders' processes that stay stopped: to receive a batch from one can block for ever, whatever the timeout.

    Seconds are counted here, so that those in which the whole run was stopped do not count.
    """
    stopped: dict[int, int] = {}
    while not done.wait(1):
        for worker in multiprocessing.active_children():
            pid = worker.pid or 0
            stopped[pid] = stopped.get(pid, 0) + 1 if _state(pid) == "T" else 0
            if stopped[pid] == int(patience) + 1:
                killed.append(f"worker {pid} was stopped for {patience:g} seconds, and so it was killed")
                worker.kill()


def _end_workers() -> None:
    """Kill the loaders' processes: a stopped one hears nothing else, and Python would wait for it at its end."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's raises the error that is being handled
    for worker in multiprocessing.active_children():
        worker.kill()
        worker.join(5)
    signal.signal(signal.SIGCHLD, before)
