"""The reference policy: other weights in the policy's own pipeline stages, which score every rollout once.

Its weights are read from a Hugging Face folder into tensors of their own, beside the policy's. To score, the model
exchanges the addresses of its weights for as long as the pass runs. The policy's weights, its gradients and its
optimizer are never written to, so nothing that is saved, exported or sent to servers can hold other weights.

Adapters (LoRA) are switched off meanwhile. The frozen weights next to them are those of ``model.path``, so that this
reference needs no weights of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_rlvr import checksums
from megatron_rlvr.config import Config
from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import device, lora, waiting
from megatron_rlvr.megatron.bridge import PolicyBridge
from megatron_rlvr.megatron.swapped_weights import empty_weights, swapped_weights
from megatron_rlvr.resume import record_changes
from megatron_rlvr.run_inputs import record_reference
from megatron_rlvr.training.policy import Policy
from megatron_rlvr.weights.checkpoint_folder import fingerprint
from megatron_rlvr.weights.export import export_folder
from megatron_rlvr.weights.loading import check_folder, load_folder, read_folder

START_FOLDER = "reference"
"""Folder of the run directory with the weights that the run began with, if they are not those of ``model.path``."""


class Reference:
    """Scores rollouts under the weights of a folder. Collective: every process of the job calls every method together.

    Args:
        bridge: bridge of the folder, in the layout of the policy.
        policy: the policy, whose model computes the scores.
        resident: where the weights are between rollouts: ``device``, ``host`` or ``disk``.

    Raises:
        UserError: if the folder has another architecture than the policy, or weights that cannot be used.
    """

    def __init__(self, bridge: PolicyBridge, policy: Policy, resident: str):
        check_same_architecture(bridge, policy.bridge)
        self._bridge, self._policy = bridge, policy
        self._found = check_folder(bridge)
        self._stamps = self._read_stamps()
        self._is_frozen = policy.bridge.adapters is not None and bridge.path.samefile(policy.bridge.path)
        self._kept: list[Tensor] | None = None
        if self._is_frozen:
            return
        weights = empty_weights(policy.model_chunks)
        with swapped_weights(policy.model_chunks, weights):
            load_folder(bridge, policy.model_chunks, self._found)
        if resident != "disk":
            self._kept = _in_host_memory(weights) if resident == "host" else weights

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of config.json and of every file with weights. The processes of the job divide the files.

        Raises:
            UserError: on every process, if a file cannot be read.
        """
        found: dict[str, str] = {}
        problem = None
        try:
            for name in self._file_names()[dist.get_rank() :: dist.get_world_size()]:
                found[name] = checksums.digest(self._bridge.path / name)
        except OSError as error:
            problem = f"{self._bridge.path} cannot be read: {error.strerror or error}"
        gathered = waiting.all_gather_over_job((found, problem), f"the checksums of {self._bridge.path}")
        for _, failed in gathered:
            if failed:
                raise UserError(failed)
        return dict(sorted(item for part, _ in gathered for item in part.items()))

    def logprob(self, batch: RolloutBatch) -> Tensor:
        """Return the reference's log-probs of this rank's rollouts: float32 [T] on the CPU, in nats.

        They are of the policy's temperature and kept sets, and zeros before the last pipeline stage. In a mixture, the
        reference's own routers choose the experts, also where the policy replays those of the rollout.

        Raises:
            UserError: if the weights are on disk and have changed since the run started.
        """
        chunks = self._policy.model_chunks
        batch = replace(batch, routes=None)
        with lora.without_adapters(chunks):
            if self._is_frozen:
                return self._policy.score(batch).logprob
            weights = empty_weights(chunks) if self._kept is None else _on_device(self._kept)
            with swapped_weights(chunks, weights):
                if self._kept is None:
                    self._read_again()
                return self._policy.score(batch).logprob

    def _read_again(self) -> None:
        if self._read_stamps() != self._stamps:
            raise UserError(
                f"{self._bridge.path} has changed since this run started, which reads the weights of its reference "
                "from there in every step (reference.weights=disk): restore the folder and start again; "
                "reference.weights=host reads it once"
            )
        read_folder(self._bridge, self._policy.model_chunks, self._found)

    def _file_names(self) -> list[str]:
        return sorted({"config.json", *(file.name for file in self._found.files.values())})

    def _read_stamps(self) -> list[tuple[int, int] | None]:
        """Return size and time of change of every file, or None for one that is missing."""
        stamps: list[tuple[int, int] | None] = []
        for name in self._file_names():
            try:
                status = (self._bridge.path / name).stat()
                stamps.append((status.st_size, status.st_mtime_ns))
            except OSError:
                stamps.append(None)
        return stamps


def build_reference(config: Config, policy: Policy, resumes: bool) -> Reference | None:
    """Build the reference of a run, or return None if the run needs none. Collective over the job.

    A new run records the checksums of the reference's files in its directory. A resumed one compares them.

    Args:
        config: the configuration.
        policy: the policy; in a new run, with the weights that the run begins with.
        resumes: whether the run continues from a checkpoint of its own.

    Raises:
        UserError: if the reference cannot be used, or is not the one that the run began with.
    """
    if not config.algorithm.kl_coefficient:
        return None
    folder = _folder(config, policy, resumes)
    bridge = PolicyBridge(replace(config.model, path=str(folder)), config.parallel)
    reference = Reference(bridge, policy, config.reference.weights)
    digests = reference.digests()
    problem = None
    if policy.layout.is_main:
        try:
            changes = record_reference(config, digests, resumes)
            record_changes(Path(config.run_directory), changes)
        except UserError as error:
            problem = str(error)
    if problem := waiting.broadcast_from_main(problem, "rank 0 to compare the reference with that of the run"):
        raise UserError(problem)
    return reference


def _folder(config: Config, policy: Policy, resumes: bool) -> Path:
    """Return the folder of the reference; the run keeps a copy of weights that come from another run."""
    path = config.reference.path
    if path is not None:
        if not Path(path).is_dir():
            raise UserError(
                f"reference.path={path} is not a folder: give a Hugging Face folder, for example one that "
                "tools/convert_checkpoint.py to-huggingface wrote"
            )
        return Path(path)
    # On a resume, only rank 0 has read from the run's config.yaml where the run started.
    start = waiting.broadcast_from_main(config.checkpoint.start_from, "rank 0 to read the run directory")
    if start is None:
        return Path(config.model.path)
    kept = Path(config.run_directory) / START_FOLDER
    if not resumes:
        export_folder(policy.bridge, policy.model_chunks, kept, write=policy.layout.is_main)
    elif not kept.is_dir():
        raise UserError(
            f"{kept}, in which a run that started from {start} keeps its reference, is missing: restore it, or set "
            "reference.path to a Hugging Face folder of the weights that the run began with"
        )
    return kept


def check_same_architecture(bridge: PolicyBridge, policy: PolicyBridge) -> None:
    """Refuse a reference whose weights the policy's stages would not compute as its own config.json describes.

    Raises:
        UserError: names every difference.
    """
    found, expected = (_description(one) for one in (bridge, policy))
    keys = [key for key in expected | found if found.get(key) != expected.get(key)]
    if different := [f"{key}={found.get(key)} instead of {expected.get(key)}" for key in keys]:
        raise UserError(
            f"{bridge.path} cannot be the reference of {policy.path}, whose stages score both "
            f"({', '.join(different)}): set reference.path to a model of the same architecture, or to null"
        )


def _description(bridge: PolicyBridge) -> dict[str, Any]:
    """Return everything that the computation of a model depends on beside its weights."""
    settings = {
        name: getattr(value, "__name__", repr(value)) if callable(value) else value
        for name, value in bridge.settings.items()
    }
    return fingerprint(bridge.hf_config, bridge.dtype) | settings


def _in_host_memory(weights: list[Tensor]) -> list[Tensor]:
    """Move weights to page-locked host memory, from where copies reach the full rate; their list is emptied."""
    if not device.on_gpu():
        return weights
    kept = []
    while weights:  # each leaves the GPU before the next one
        kept.append(weights.pop(0).to("cpu").pin_memory())
    device.return_cached_memory()
    return kept


def _on_device(weights: Sequence[Tensor]) -> list[Tensor]:
    return [device.to_device(weight, device.device()) for weight in weights]
