"""Corrections by the names that the field has given them: ``icepop``, ``mis(cap=5)``, ``geometric + tis(cap=3)``."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

from megatron_rlvr.control.by_name import check_name, check_parameters
from megatron_rlvr.objectives.importance import Correction, ImportanceWeights, SecondMoment

# name -> (class, values that the name stands for; any of them may be changed in parentheses)
PRESETS: dict[str, tuple[type[Correction | SecondMoment], dict[str, Any]]] = {
    "tis": (Correction, {"level": "token", "action": "truncate", "cap": 2.0}),
    "sequence-tis": (Correction, {"level": "sequence", "action": "truncate", "cap": 2.0}),
    "icepop": (Correction, {"level": "token", "action": "mask", "floor": 0.5, "cap": 5.0}),
    "decoupled": (Correction, {"level": "token", "action": "mask", "cap": 5.0}),
    "mis": (Correction, {"level": "sequence", "action": "mask", "cap": 3.0}),
    "geometric": (Correction, {"level": "geometric", "action": "reject", "floor": 0.999, "cap": 1.001}),
    "k3": (Correction, {"level": "geometric", "action": "reject", "measure": "k3", "cap": 0.01}),
    "opsm": (
        Correction,
        {
            **{"level": "geometric", "action": "reject", "measure": "k1", "cap": 0.5},
            **{"policy": "current", "advantages": "negative"},
        },
    ),
    "m2po": (SecondMoment, {}),
}
"""Their sources are in docs/mismatch.md."""

_TERM = re.compile(r"\s*([\w-]+)\s*(?:\(([^()]*)\))?\s*")


def parse_importance(text: str) -> ImportanceWeights:
    """Build the corrections of ``NAME``, ``NAME(KEY=VALUE, ...)`` or several of them joined by ``+``.

    Raises ValueError, in one line that names the valid choices, for anything else.
    """
    return ImportanceWeights(tuple(_correction(term) for term in text.split("+")))


def _correction(term: str) -> Correction | SecondMoment:
    match = _TERM.fullmatch(term)
    if match is None:
        raise ValueError(
            f"importance: {term.strip()!r} is not a correction; write for example mis, or icepop(floor=0.4)"
        )
    name, arguments = match[1], match[2] or ""
    check_name("importance", name, PRESETS)
    correction, values = PRESETS[name]
    pairs = [_argument(name, text) for text in arguments.split(",") if text.strip()]
    changes = dict(pairs)
    if len(changes) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"importance {name}: {twice} is given twice; keep one of the two")
    check_parameters(f"importance {name}", changes, [field.name for field in fields(correction)])
    return correction(**{**values, **changes})


def _argument(name: str, text: str) -> tuple[str, Any]:
    """``key=value`` as a pair; ``null`` is None, and a value that is no number stays text."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not value:
        raise ValueError(f"importance {name}: {text.strip()!r} is not KEY=VALUE; write for example {name}(cap=2)")
    if value in ("null", "None"):
        return key, None
    try:
        return key, float(value)
    except ValueError:
        return key, value
