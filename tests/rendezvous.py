"""Several process groups, one after another, in the same processes: of torchrun, or of `tests.forked`."""

import datetime
import gc
import os
from collections.abc import Sequence

import torch.distributed as dist

_agent = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", "0"))
_rank, _ranks = os.environ.get("RANK"), int(os.environ.get("WORLD_SIZE", "1"))
_OTHER_TRAININGS = datetime.timedelta(minutes=35)
"""How long a process may wait for those that train with it next, but run other trainings before."""
_served: list[dist.TCPStore] = []  # by the first rank of a process group, as long as the processes run


def renew(number: int, ranks: Sequence[int] | None = None) -> bool:
    """Give the process groups of training ``number`` a new store: the job's store holds the previous addresses.

    The first rank serves the store at a port that the system chooses, and announces the port in the job's store. A
    single process needs no port.

    Args:
        number: a number that no other training has.
        ranks: the ranks of the job that train; None for all.

    Returns:
        whether this process is one of `ranks`; it then has the variables of a job of these processes.
    """
    gc.collect()  # process groups of earlier trainings, whose threads wake 100 times a second
    if _rank is None:
        return True
    members = range(_ranks) if ranks is None else ranks
    if int(_rank) not in members:
        return False
    agent, key = dist.TCPStore(*_agent, timeout=_OTHER_TRAININGS), f"port of store {number}"
    if int(_rank) == members[0]:
        _served.append(dist.TCPStore(_agent[0], 0, is_master=True, wait_for_workers=False))
        agent.set(key, str(_served[-1].port))
    own, size = str(list(members).index(int(_rank))), str(len(members))
    os.environ |= {"RANK": own, "LOCAL_RANK": own, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    # With the agent's store, no rank starts another one at this port.
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": agent.get(key).decode()}
    return True
