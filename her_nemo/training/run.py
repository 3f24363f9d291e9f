"""One run of a training stage: its directory, its process group, its checkpoints, its last words."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import yaml

from her_nemo.config import lora as adapter_config
from her_nemo.config.errors import UserError
from her_nemo.config.lora import Lora
from her_nemo.megatron import parallel, platform
from her_nemo.training import checkpoint
from her_nemo.training import source as sources
from her_nemo.training.learner import Learner
from her_nemo.training.logging import MetricLogger, Timers, progress
from her_nemo.training.signals import GracefulStop

SUMMARY_FILE = "summary.json"


class Resumable(Protocol):
    """What besides the learners a run goes on from: the data order, and numbers a stage carries along."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Run:
    """What a stage's loop needs around it. Made by `open_run`."""

    def __init__(self, cfg: Any, source: sources.ModelSource) -> None:
        self.cfg = cfg
        self.source = source
        self.directory = Path(cfg.exp_manager.explicit_log_dir)
        self.main = parallel.is_main()
        self.tokenizer = _tokenizer(cfg, source)
        self.stop = GracefulStop(cfg.exp_manager.max_seconds)
        self.summary: dict[str, Any] = {}
        self.timers = Timers()
        self.tokens = 0  # processed in this step, over all ranks; a stage adds to it
        self._learners: Sequence[Learner] = ()
        self._order: Resumable | None = None
        self._carried: Resumable | None = None
        self._manifest = self._find()
        resumed = self._manifest.step if self._manifest else 0
        self.metrics = MetricLogger(self.directory, enabled=self.main, resumed_step=resumed)
        self._saved_step = resumed
        keeping = cfg.exp_manager.checkpoint_callback_params
        self._monitor = checkpoint.Monitor(keeping.monitor, keeping.mode == "max") if keeping.monitor else None
        if self.main:
            (self.directory / "config.yaml").write_text(yaml.safe_dump(cfg.model_dump(), sort_keys=False))

    def _find(self) -> checkpoint.Manifest | None:
        manager = self.cfg.exp_manager
        newest = checkpoint.newest(self.directory)
        if newest is None:
            if manager.resume_if_exists and not manager.resume_ignore_no_checkpoint:
                raise UserError(
                    f"{self.directory}: no checkpoint to resume. Set exp_manager.resume_ignore_no_checkpoint=true "
                    "to start afresh."
                )
            return None
        if not manager.resume_if_exists:
            raise UserError(
                f"{self.directory}: holds checkpoints of an earlier run. Set exp_manager.resume_if_exists=true to go "
                "on from them, or name another exp_manager.explicit_log_dir."
            )
        return checkpoint.read(newest)

    def resume(self, learners: Sequence[Learner], order: Resumable, carried: Resumable | None = None) -> int:
        """Name what a checkpoint of this run holds; load the newest one if there is one.

        `carried`: JSON-sized state beside learners and order, the same on every rank. Returns the number of steps
        already done.
        """
        self._learners, self._order, self._carried = learners, order, carried
        if self._manifest is None:
            return 0
        for learner in learners:
            entry = self._manifest.models.get(learner.name, {})
            held = entry.get("fingerprint")
            if held != learner.model.fingerprint():
                raise UserError(
                    f"{self._manifest.directory}: its {learner.name!r} is another model than the one configured "
                    f"(fingerprint {held}, wanted {learner.model.fingerprint()}). Name another "
                    "exp_manager.explicit_log_dir, or the checkpoint's own architecture."
                )
            differing = self._other_adapters(entry, learner)
            if differing:
                raise UserError(f"{self._manifest.directory}: {differing}. Name another exp_manager.explicit_log_dir.")
            learner.load(self._manifest.directory)
        order.load_state_dict(self._manifest.counters["order"])
        if carried is not None:
            carried.load_state_dict(self._manifest.counters.get("carried", {}))
        self.summary |= self._manifest.counters["summary"]
        return self._manifest.step

    @staticmethod
    def _other_adapters(entry: dict[str, Any], learner: Learner) -> str:
        """How a checkpoint's adapters and base differ from the learner's; "" if they do not."""
        model = learner.model
        differing = adapter_config.problem_of(Lora.from_json(entry.get("lora")), model.lora)
        if not differing and model.base is not None and entry["base"]["digest"] != model.base["digest"]:
            differing = f"its adapters belong to {entry['base']['path']}, not to {model.base['path']}"
        return differing

    def steps(self, first: int, last: int, title: str) -> Iterator[int]:
        """Step numbers first..last under a progress bar; ends early, on all ranks together, when told to stop."""
        for step in progress(
            range(first, last + 1), total=last, done=first - 1, title=title, enabled=self.main
        ):
            self.tokens = 0
            with self.timers("step"):
                yield step
            speed = self.tokens / self.timers.seconds("step")
            self.metrics.log(step, self.timers.tags() | {"performance/tokens_per_second": speed})
            if step < last and self.stop.requested():
                self.save(step)
                break

    def save(self, step: int) -> None:
        """Write the checkpoint of `step` (collective), unless it is there already."""
        keep = self.cfg.exp_manager.checkpoint_callback_params.save_top_k
        if step == self._saved_step or keep == 0 or self._order is None:
            return
        directory = checkpoint.step_directory(self.directory, step)

        def save_tensors(where: Path) -> None:
            for learner in self._learners:
                learner.save(where)

        carried = {} if self._carried is None else {"carried": self._carried.state_dict()}
        checkpoint.write(
            directory,
            step,
            save_tensors,
            models={learner.name: sources.describe(learner.model) for learner in self._learners},
            counters={"order": self._order.state_dict(), "summary": self.summary, **carried, **self._monitored(step)},
            config=self.cfg.model_dump(),
            tokenizer=self.tokenizer,
        )
        checkpoint.publish(self.directory, step, keep, self._monitor)
        self._saved_step = step

    def _monitored(self, step: int) -> dict[str, Any]:
        """For the manifest: the monitored metric, if it was measured at this step."""
        if self._monitor is None or self.metrics.measured.get(self._monitor.name, (0, 0.0))[0] != step:
            return {}
        return {checkpoint.MONITORED: {self._monitor.name: self.metrics.measured[self._monitor.name][1]}}

    def finish(self, seconds: float) -> None:
        """Write `summary.json` and say where everything lies."""
        if not self.main:
            return
        body = {**self.summary, "seconds": round(seconds, 1)}
        (self.directory / SUMMARY_FILE).write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")
        print(
            f"{self.cfg.name}: {seconds:.0f} s; checkpoints, metrics and {SUMMARY_FILE} are in {self.directory}"
        )
        print(f"  tensorboard --logdir {self.directory / 'tensorboard'}")


@contextmanager
def open_run(cfg: Any) -> Iterator[Run]:
    """Join the process group, look the pretrained checkpoint over, open the run directory."""
    started = time.monotonic()
    source = sources.locate(cfg.pretrained_checkpoint.restore_from_path)
    with distributed(cfg):
        run = Run(cfg, source)
        try:
            yield run
            run.finish(time.monotonic() - started)
        finally:
            run.metrics.close()


@contextmanager
def distributed(cfg: Any, *, split: bool = True) -> Iterator[None]:
    """Megatron made fit for this machine and its parallel groups, for as long as the block lasts.

    Without `split`, no model is cut up: the processes only share out work.
    """
    if cfg.trainer.accelerator == "gpu" and platform.backend() != "nccl":
        raise UserError(
            "trainer.accelerator is gpu, but torch sees no CUDA here. Install a CUDA build of torch, run where the "
            "GPUs are, or set trainer.accelerator=cpu."
        )
    platform.apply()
    parallel.initialize(
        tensor=cfg.model.tensor_model_parallel_size if split else 1,
        pipeline=cfg.model.pipeline_model_parallel_size if split else 1,
        seed=cfg.model.seed,
    )
    try:
        yield
    finally:
        parallel.destroy()


def _tokenizer(cfg: Any, source: sources.ModelSource) -> Path:
    if cfg.model.tokenizer.path is not None:
        return Path(cfg.model.tokenizer.path)
    if source.tokenizer is None:
        raise UserError(f"{source.path}: no tokenizer beside the weights. Set model.tokenizer.path.")
    return source.tokenizer
