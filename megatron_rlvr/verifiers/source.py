"""How a worker process gets its verifier."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron_rlvr.errors import UserError
from megatron_rlvr.verifiers.build import build_verifier


@dataclass(frozen=True)
class VerifierSource:
    """What a worker needs to build its verifier: a name and options, or a pickled callable.

    Attributes:
        name, options: arguments of `build_verifier`. With a name, a function of the user is imported by the worker
            only, so that nothing it does when it is imported reaches the trainer.
        pickled: the callable, if there is no name.
    """

    name: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    pickled: bytes = b""

    @classmethod
    def of(cls, verifier: Callable[[str, Any], Any]) -> "VerifierSource":
        """Return the source of a callable.

        Raises:
            UserError: if the callable cannot be unpickled in another process.
        """
        function = getattr(verifier, "func", verifier)
        if getattr(function, "__module__", None) == "__main__":
            raise UserError(
                "a verifier defined in the main script cannot be sent to worker processes; move it to a module"
            )
        try:
            return cls(pickled=pickle.dumps(verifier))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise UserError(
                f"the verifier cannot be sent to worker processes ({error}); use a module-level function, or workers=0"
            ) from error

    def load(self) -> Callable[[str, Any], Any]:
        """Build the verifier. Raises what its modules raise."""
        return pickle.loads(self.pickled) if self.name is None else build_verifier(self.name, **self.options)
