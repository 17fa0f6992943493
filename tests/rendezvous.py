"""Several process groups one after the other in the processes of one torchrun."""

import os

_launched_at = int(os.environ.get("MASTER_PORT", "29500"))


def renew(number: int) -> None:
    """Give training `number` of these processes a store of its own: the launcher's holds the last one's addresses.

    Every rank comes to the same port, below the range that systems hand out to others.
    """
    port = 10_000 + (7 * _launched_at + 13 * number) % 20_000
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(port)}
