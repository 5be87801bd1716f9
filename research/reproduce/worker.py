"""One run in a process of its own: ``fit`` as on the command line, then the measurements for its line of results.

The curves come from the TensorBoard log of the run. An interrupted run continues its log, so the log holds all of it.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbn_lightning.core.errors import DataError, SBNError
from sbn_lightning.core.files import write_text

if TYPE_CHECKING:
    from sbn_lightning.cli.training import SBNCLI

Curve = list[list[float]]
CURVE_POINTS = 100
SPARSITY = ("zeros", "zeros_natural", "zeros_enforced", "mask_density", "flip_rate_mask", "flip_rate_code")
PACKAGES = ("torch", "lightning", "triton", "litdata", "sbn-lightning")


def main() -> None:
    """Do the run whose folder is the only argument of this process."""
    folder = Path(sys.argv[1])
    threading.Thread(target=_stop_with_the_parent, daemon=True).start()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from filelock import FileLock

    # A worker of the same run that outlived its killed parent may still be saving.
    with FileLock(str(folder / ".lock")):
        try:
            result = run(folder)
        except SBNError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(1) from error
        write_text(folder / "result.json", json.dumps(result, allow_nan=False))


def _stop_with_the_parent() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def run(folder: Path) -> dict[str, Any]:
    """Train, or continue to train, and measure.

    Returns:
        The run's line of results.

    Raises:
        SBNError: If the recipe or the data cannot be trained on.
    """
    from sbn_lightning.cli import training as training_cli

    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    since = time.perf_counter()
    words = ["fit", "--config", str(folder / "recipe.yaml"), "--ckpt_path", "last"]
    sys.argv = ["sbn", *words]
    cli = training_cli.run(words)
    seconds = time.perf_counter() - since
    checkpoint = _last_checkpoint(cli)
    curves = read_curves(Path(cli.trainer.logger.log_dir))  # type: ignore[union-attr,arg-type]
    steps = cli.trainer.max_steps
    validation = curves.get("val/perplexity", [])
    # If there is no validation at the last step, the process was killed between the step and the validation.
    if not validation or validation[-1][0] < steps - 1:
        cli.trainer.validate(cli.model, cli.datamodule, ckpt_path=str(checkpoint), verbose=False)
        validation = [*validation, [steps, float(cli.trainer.callback_metrics["val/perplexity"])]]
    return _result(job, cli, curves, validation, seconds) | {"probe": _probe(job["probe"], checkpoint)}


def _last_checkpoint(cli: SBNCLI) -> Path:
    import torch

    path = Path(cli.trainer.checkpoint_callback.last_model_path)  # type: ignore[union-attr]
    step = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    if step != cli.trainer.max_steps:
        raise DataError(f"{path} is of step {step}, the run ends at {cli.trainer.max_steps}")
    return path


def _result(job: dict[str, Any], cli: SBNCLI, curves: dict[str, Curve], val: Curve, seconds: float) -> dict[str, Any]:
    from math import log

    data = cli.datamodule.meta
    perplexity = val[-1][1]
    rate = [value for _, value in curves.get("tokens_per_second", [])]
    return {key: job[key] for key in ("id", "name", "factors", "varied", "tokens")} | {
        "steps": cli.trainer.global_step,
        "parameters": sum(parameter.numel() for parameter in cli.model.parameters()),
        "validation": {"loss": log(perplexity), "perplexity": perplexity},
        "validation_curve": [[step, log(value)] for step, value in val],
        "training_curve": thin(curves.get("train/loss", [])),
        "sparsity": {name: thin(curves[f"sparsity/{name}"]) for name in SPARSITY if f"sparsity/{name}" in curves},
        "seconds": seconds,  # A run that was continued counts from there.
        "continued": cli.config["fit"]["ckpt_path"] is not None,
        "tokens_per_second": sorted(rate)[len(rate) // 2] if rate else None,
        "data": {
            "fingerprint": data["fingerprint"],
            "vocab_size": data["vocab_size"],
            "tokens": {name: split["tokens"] for name, split in data["splits"].items()},
        },
        "hardware": hardware(),
        "versions": versions(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _probe(settings: dict[str, Any] | None, checkpoint: Path) -> dict[str, Any] | None:
    if settings is None:
        return None
    import torch

    from research.reproduce.probe import Brackets, bracket_probe
    from sbn_lightning.evaluation.texts import text_of_folder
    from sbn_lightning.formats.load import load_model

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model(checkpoint, device=device, tokenizer=settings["data"])
    text = text_of_folder(settings["data"], "train", settings["tokens"])
    brackets = Brackets.of(loaded.need_tokenizer())
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        return bracket_probe(loaded.model, torch.from_numpy(text.tokens.astype("int64")), brackets, settings["window"])


def read_curves(folder: Path) -> dict[str, Curve]:
    """Read the scalars of a TensorBoard log.

    A run that was continued can have done some steps twice. The newer values count.

    Args:
        folder: The folder of the log.

    Returns:
        The curves by tag, each a list of ``[step, value]`` in order.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    log.Reload()
    curves: dict[str, Curve] = {}
    for tag in log.Tags()["scalars"]:
        newest = {event.step: event.value for event in sorted(log.Scalars(tag), key=lambda event: event.wall_time)}
        curves[tag] = [[step, newest[step]] for step in sorted(newest)]
    return curves


def thin(curve: Curve, points: int = CURVE_POINTS) -> Curve:
    """Return about ``points`` points of a curve, evenly spread, the last one among them."""
    every = max(1, -(-len(curve) // points))
    return curve[(len(curve) - 1) % every :: every] if curve else []


def hardware() -> str:
    """Return the name of the GPU, or of the processor with its number of cores."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that compute."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
