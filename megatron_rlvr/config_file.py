"""A configuration from YAML and ``key=value`` overrides, and back into the run directory.

Unknown keys and wrong types are refused with one line that says what to write instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from megatron_rlvr.config import Config
from megatron_rlvr.config_checks import check
from megatron_rlvr.errors import UserError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``key=value`` overrides, check every value.

    Raises:
        UserError: one line that names the file or override, what was found, and what to write instead.
    """
    try:
        tree = OmegaConf.load(Path(path))
    except FileNotFoundError:
        raise UserError(f"no configuration file {path}: give the path of a YAML file as the first argument") from None
    except Exception as error:
        raise UserError(f"{path} is not valid YAML: {_one_line(error)}") from None
    for text in overrides:
        if "=" not in text:
            raise UserError(f"override {text!r} is not key=value: write for example optimizer.learning_rate=1e-6")
    for chosen in ("algorithm.schedule", "algorithm.objective"):
        if any(text.startswith(f"{chosen}.name=") for text in overrides):
            # Another schedule has other parameters: those in the file belong to the one that is replaced.
            OmegaConf.update(tree, chosen, {}, merge=False)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), tree, OmegaConf.from_dotlist(list(overrides)))
        config = OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        raise UserError(_unknown_key(error)) from None
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        raise UserError(
            f"configuration key {key}: {_one_line(error)}" if key else f"{path}: {_one_line(error)}"
        ) from None
    assert isinstance(config, Config)
    check(config)
    return config


def save_config(config: Config, path: Path, begun: bool = False) -> None:
    """Write the resolved configuration as YAML that `load_config` reads back; over that of a run which has `begun`
    only if `check_same_run` lets it."""
    if begun and path.is_file():
        check_same_run(config, path)
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


# What makes a run the run it is. The rest (more steps, another layout, other telemetry) may change on the way.
_IDENTITY = ("seed", "data", "verifier", "rollout", "algorithm", "optimizer")
_MAY_CHANGE = ("rollout.record", "rollout.recording", "rollout.engine", "rollout.local_batch", "rollout.sglang")


def check_same_run(config: Config, path: Path) -> None:
    """Refuse to resume a run under settings that would make it another one.

    Args:
        config: of now.
        path: the resolved configuration that the run began with.

    Raises:
        UserError: naming the first setting that differs.
    """
    then = OmegaConf.to_container(OmegaConf.load(path))
    now = OmegaConf.to_container(OmegaConf.structured(config))
    for key, old, new in _differences(then, now):
        if key.split(".")[0] in _IDENTITY and not key.startswith(_MAY_CHANGE):
            raise UserError(
                f"{path.parent} holds a run with {key}={old}, this one has {new}: "
                "choose another run_directory, or set it back"
            )


def _differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in {**old, **new}:
            yield from _differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif old != new:
        yield key, old, new


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split("\n    full_key")[0].split())


def _unknown_key(error: ConfigKeyError) -> str:
    import dataclasses
    import difflib

    full = str(error.full_key or error.key)
    *path, last = full.split(".")
    node: Any = Config()
    for part in path:
        node = getattr(node, part)
    known = [f.name for f in dataclasses.fields(node)]
    close = difflib.get_close_matches(last, known, n=1)
    hint = f"did you mean {'.'.join([*path, close[0]])}?" if close else f"known keys: {', '.join(known)}"
    return f"unknown configuration key {full}: {hint}"
