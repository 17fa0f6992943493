"""Train once per command-line argument, in this process. An argument is a JSON list of the trainer's arguments.

Each training records in its run directory where its processes waited; see `tests.waiting_probe`.
"""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

from megatron_rlvr.train import main
from tests.rendezvous import renew
from tests.waiting_probe import watch

for number, line in enumerate(sys.argv[1:]):
    renew(number)
    arguments = json.loads(line)
    directory = next((text.partition("=")[2] for text in arguments if text.startswith("run_directory=")), None)
    with watch(Path(directory)) if directory else nullcontext():
        status = main(arguments)
    if status:
        sys.exit(status)
