"""Start ``sglang.launch_server`` with a key from the environment: ``python launch_with_key.py ARGUMENT ...``.

SGLang takes a key only from its command line, which all users of a machine can read. This program adds it to the
arguments within its own process, and keeps it out of the log, in which SGLang prints its arguments. It is executed by
path, with the Python of SGLang's environment, in which this package is not installed.
"""

import sys

if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose http.py and others would hide those of Python

    import logging
    import os
    import runpy
    from typing import Any

    key = os.environ.pop("RLVR_SGLANG_KEY", "")
    make_record = logging.getLogRecordFactory()

    def without_key(*arguments: Any, **fields: Any) -> logging.LogRecord:
        record = make_record(*arguments, **fields)
        if key and key in (text := record.getMessage()):
            record.msg, record.args = text.replace(key, "(key)"), None
        return record

    logging.setLogRecordFactory(without_key)
    if key:
        sys.argv += ["--api-key", key]
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
