"""A configuration from YAML and ``key=value`` overrides, and back into the run directory.

Unknown keys and wrong types are refused with one line that says what to write instead.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException
from yaml import YAMLError

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
    if not OmegaConf.is_dict(tree):
        raise UserError(f"{path} holds a list: write keys and values, such as steps: 100")
    for chosen in ("algorithm.schedule", "algorithm.objective"):
        if any(text.startswith(f"{chosen}.name=") for text in overrides):
            # Another schedule has other parameters: those in the file belong to the one that is replaced.
            OmegaConf.update(tree, chosen, {}, merge=False)
    given = _overrides(overrides)
    try:
        for part in (tree, given):
            _check_shape(OmegaConf.to_container(part), Config)
        merged = OmegaConf.merge(OmegaConf.structured(Config), tree, given)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(_refusal(error, str(path), tree, given)) from None
    assert isinstance(config, Config)
    check(config)
    return config


def _overrides(texts: Sequence[str]) -> Any:
    for text in texts:
        try:
            if text.find("=") < 1:
                raise UserError(f"override {text!r} is not key=value: write for example optimizer.learning_rate=1e-6")
            OmegaConf.from_dotlist([text])
        except (OmegaConfBaseException, YAMLError) as error:
            raise UserError(f"override {text!r}: its value is not valid YAML: {_one_line(error)}") from None
    return OmegaConf.from_dotlist(list(texts))


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


def _type(schema: type, name: str) -> Any:
    """The type of a field, int for ``int | None``."""
    found = get_type_hints(schema)[name]
    return get_args(found)[0] if isinstance(found, types.UnionType) else found


def _kind(wanted: Any, key: str, value: Any) -> str:
    """What a key takes, in words that end "X must be ...", and how it is written."""
    if dataclasses.is_dataclass(wanted):
        return f"a section: write {key}.{dataclasses.fields(wanted)[0].name}=... and the like"
    if get_origin(wanted) is dict:
        return f"a section: write {key}.name={value if isinstance(value, str) else '...'} and the like"
    if get_origin(wanted) is list:
        return f"a list: write {key}=[{value if isinstance(value, str) else '...'}]"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[wanted]


def _check_shape(given: Any, schema: type, prefix: str = "") -> None:
    """Refuse unknown keys, keys without a value, single values where a section belongs, and the other way round.

    Raises:
        UserError: for the first that is wrong.
    """
    for name, value in given.items():
        key = f"{prefix}{name}"
        if name not in (field.name for field in dataclasses.fields(schema)):
            raise UserError(f"unknown configuration key {key}: {_hint(str(name), schema, prefix)}")
        wanted = _type(schema, name)
        section = dataclasses.is_dataclass(wanted) or get_origin(wanted) is dict
        if isinstance(value, str) and "${" in value:
            continue  # OmegaConf's to resolve
        several = get_origin(wanted) is list
        if value is None:
            if isinstance(get_type_hints(schema)[name], types.UnionType):
                continue
            raise UserError(f"{key} has no value: it must be {_kind(wanted, key, value)}")
        if section != isinstance(value, dict) or several != isinstance(value, list):
            raise UserError(f"{key}={value!r}: {key} must be {_kind(wanted, key, value)}")
        if dataclasses.is_dataclass(wanted):
            _check_shape(value, wanted, f"{key}.")  # type: ignore[arg-type]


def _hint(name: str, schema: type, prefix: str) -> str:
    """What an unknown key in a section should have been."""
    known = [field.name for field in dataclasses.fields(schema)]
    if close := difflib.get_close_matches(name, known, n=1):
        return f"did you mean {prefix}{close[0]}?"
    elsewhere = [key for key in _keys(Config) if key.split(".")[-1] == name]
    return f"did you mean {' or '.join(elsewhere)}?" if elsewhere else f"known keys: {', '.join(known)}"


def _keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Every key of a section and of those in it, dotted."""
    for field in dataclasses.fields(schema):
        yield f"{prefix}{field.name}"
        wanted = _type(schema, field.name)
        if dataclasses.is_dataclass(wanted):
            yield from _keys(wanted, f"{prefix}{field.name}.")  # type: ignore[arg-type]


def _refusal(error: OmegaConfBaseException, path: str, *given: Any) -> str:
    """One line on what OmegaConf refused in one of the `given` configurations, the last one first."""
    key = error.full_key or ""
    if key not in _keys(Config) or isinstance(error, InterpolationResolutionError):
        return f"configuration key {key}: {_one_line(error)}" if key else f"{path}: {_one_line(error)}"
    *sections, name = key.split(".")
    schema: Any = Config
    for section in sections:
        schema = _type(schema, section)
    values = [value for part in reversed(given) if (value := OmegaConf.select(part, key)) is not None]
    if not values:
        return f"{key} is not set: write it in the configuration file or give {key}=... on the command line"
    return f"{key}={values[0]!r}: {key} must be {_kind(_type(schema, name), key, values[0])}"
