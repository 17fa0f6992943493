"""Train once for each argument (a JSON list of the trainer's own arguments), in this process."""

import json
import sys

from megatron_rlvr.train import main
from tests.rendezvous import renew

for number, line in enumerate(sys.argv[1:]):
    renew(number)
    if status := main(json.loads(line)):
        sys.exit(status)
