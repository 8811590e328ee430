#!/usr/bin/env python3
"""Stands in for a worker process: speaks the protocol, imports nothing heavy, and misbehaves on request.

Tests put this file in the place of ``sys.executable``, so it is started as ``THIS ... SPEC FD``. What it does
is chosen by the operation, or, in a whole run, by the role it was given.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

Message = dict[str, Any]


def judgement(*, ok: bool) -> Message:
    tensor = {"max_error": 0.5, "mean_error": 0.5, "max_budget": 1.0, "mean_budget": 1.0, "ok": ok}
    bad = {} if ok else {"first_bad": [0, 1, 0, 2], "got": 1.5, "want": 1.0}
    return {"tensors": {"out": tensor | bad}, "rows": 8, "rows_total": 8}


WEIGHED = {"peak_mib": 1.0, "driver_mib": None, "minimum_mib": 1.0}


def in_a_run(role: str, operation: str) -> Message:
    """What a well-behaved worker, or a role of a telling name, answers to the operations of a run."""
    if operation == role.partition("_in_")[2]:
        if role.startswith("leaves"):
            os._exit(7)
        if role.startswith("sleeps"):
            time.sleep(3600)
        if role.startswith("raises"):
            return {"ok": False, "status": "ERROR", "reason": "planted", "evidence": "", "fatal": False}
    if role.startswith("no_device") and operation == "hello":
        status = role.removeprefix("no_device_")
        return {"ok": False, "status": status, "reason": "no context", "evidence": "", "fatal": False}
    clocks = dict.fromkeys(("sm_mhz", "power_w", "temperature_c", "throttle"))
    answers: dict[str, Message] = {
        "hello": {
            "version": "1.0",
            "unavailable": "planted" if role == "absent" else "",
            "compile_processes": 2 if "compiles" in role else 1,
        },
        "declare": {"unsupported": {"planted": ["planted"]} if role.startswith("declines") else {}},
        "prepare": {"unsupported": [], "prepare_ms": 1.0, "first_call_ms": 2.0},
        "judge": {"judgement": judgement(ok=role != "wrong"), "memory": WEIGHED},
        "weigh": WEIGHED,
        "place": {},
        "turn": {
            "ms": [1.0, 2.0],
            "host_us": None,
            "held": True,
            "discarded": 0,
            "clocks": clocks,
            "warmup_calls": 1,
            "judgement": judgement(ok=True),
        },
        "oracle": {"judged": "judged.pt", "probes": ["probe.pt"], "ms": 1.0, "mib": 1.0},
        "energy": {"energy": None},
        "ceilings": {"gemm_tflops": [1.0], "copy_gbs": [1.0]},
        "release": {},
    }
    if role == "referee":
        answers["hello"] = {"torch": "0.0", "cuda": None, "id": "cpu", "name": "stand-in"}
    return answers[operation]


def on_request(operation: str, stream: Any, request: Message) -> Message | None:
    """The operations that are tests of the protocol itself; None for one that is not."""
    match operation:
        case "echo":
            return request
        case "sleep":
            time.sleep(3600)
        case "leave":
            os._exit(request["code"])
        case "die":
            os.kill(os.getpid(), getattr(signal, request["by"]))
        case "die_by_number":
            os.kill(os.getpid(), request["number"])
        case "print":
            print(request["text"], flush=True)
            return {}
        case "hang_up":
            stream.close()
            time.sleep(3600)
        case "shout":
            print("x" * 5000 + request["last"], file=sys.stderr, flush=True)
            os._exit(1)
        case "refuse":
            return {"ok": False, "reason": "planted", "evidence": "trace"} | request
        case "variable":
            return {"value": os.environ.get(request["name"])}
        case "spawn":
            return {"child": subprocess.Popen(["sleep", "3600"]).pid}
    return None


def main() -> None:
    role = json.loads(sys.argv[-2])["role"]
    if role == "stillborn":
        sys.exit("cannot start")
    if role == "deaf":
        time.sleep(3600)
    stream = socket.socket(fileno=int(sys.argv[-1])).makefile("rw")
    for line in stream:
        request = json.loads(line)
        operation = request.pop("op")
        if operation == "quit":
            return
        reply = on_request(operation, stream, request)
        if reply is None:
            reply = in_a_run(role, operation)
        stream.write(json.dumps({"ok": True} | reply) + "\n")
        stream.flush()


if __name__ == "__main__":
    main()
