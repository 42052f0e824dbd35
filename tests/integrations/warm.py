"""Runs programs on several members as torchrun does, forked off a process that has imported the frameworks already.

The frameworks take many seconds to import, their runs here one or two. A line of JSON on stdin is a job; a line on
stdout says the members' exit codes. What they printed is in FOLDER/member-RANK.log.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

_LIMIT_S = 200


def main() -> None:
    for name in ("torch", "thinwire", "accelerate", "lightning.fabric", "lightning.pytorch"):
        importlib.import_module(name)
    for name in ("GPT2LMHeadModel", "Trainer", "TrainingArguments"):
        getattr(importlib.import_module("transformers"), name)
    for line in sys.stdin:
        job = json.loads(line)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        members = [_fork(job, rank, port) for rank in range(job["members"])]
        codes = [os.waitstatus_to_exitcode(os.waitpid(member, 0)[1]) for member in members]
        print(json.dumps(codes), flush=True)


def _fork(job: dict[str, Any], rank: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        signal.alarm(_LIMIT_S)
        _become_member(job, rank, port)
        program = Path(job["program"])
        sys.path.insert(0, str(program.parent))
        sys.argv = [str(program), *job["arguments"]]
        runpy.run_path(str(program), run_name="__main__")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _become_member(job: dict[str, Any], rank: int, port: int) -> None:
    log = os.open(f"{job['folder']}/member-{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(job["folder"])
    members = str(job["members"])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": members, "LOCAL_WORLD_SIZE": members}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


if __name__ == "__main__":
    main()
