"""Run a command that the kernel kills when the process that started it dies: ``bound_to_parent.py PARENT COMMAND...``.

A trainer that is killed with SIGKILL cannot stop its servers. Executed as a file, by any Python, so that the server's
environment needs nothing of ours.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    parent, *command = sys.argv[1:]
    # Survives the exec. SGLang's own workers ask for the same against their parent, so the whole tree goes.
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it died before the request
        sys.exit(1)
    os.execv(command[0], command)
