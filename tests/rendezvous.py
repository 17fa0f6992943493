"""Several process groups, one after another, in the processes of one torchrun."""

import os

import torch.distributed as dist

_agent = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", "0"))
_served: list[dist.TCPStore] = []  # by rank 0, as long as the processes run


def renew(number: int) -> None:
    """Give the process groups of training ``number`` a new store: torchrun's store holds the previous addresses.

    Rank 0 serves the store at a port that the system chooses, and announces the port in torchrun's store. A process
    that was started without torchrun needs no port.
    """
    if "RANK" not in os.environ:
        return
    agent, key = dist.TCPStore(*_agent), f"port of store {number}"
    if os.environ["RANK"] == "0":
        _served.append(dist.TCPStore(_agent[0], 0, is_master=True, wait_for_workers=False))
        agent.set(key, str(_served[-1].port))
    # With the agent's store, no rank starts another one at this port.
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": agent.get(key).decode()}
