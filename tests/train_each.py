"""Train once for each argument (a JSON list of the trainer's own arguments), in this process."""

import json
import os
import sys

from megatron_rlvr.train import main

first_port = int(os.environ.get("MASTER_PORT", "29500"))
for number, line in enumerate(sys.argv[1:], start=1):
    # A rendezvous of its own: the launcher's store still holds the addresses of the training before.
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(first_port + number)}
    if status := main(json.loads(line)):
        sys.exit(status)
