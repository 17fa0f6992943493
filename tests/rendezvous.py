"""Several process groups, one after another, in the processes of one torchrun."""

import os

_launched_at = int(os.environ.get("MASTER_PORT", "0"))


def renew(number: int) -> None:
    """Give the process groups of training ``number`` a new store: torchrun's store holds the previous addresses.

    All ranks compute the same port, which lies below the range of ports that systems assign to other programs. A
    process that was started without torchrun needs no port.
    """
    if "RANK" not in os.environ:
        return
    port = 10_000 + (7 * _launched_at + 13 * number) % 20_000
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(port)}
