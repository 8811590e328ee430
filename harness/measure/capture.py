"""A call recorded into a CUDA graph."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from attnbench.harness.measure.timing import Call

WARM_UPS = 3
"""As many as torch's make_graphed_callables makes: what is compiled, loaded or planned late is there by then."""


class CaptureFailed(Exception):
    """A capture that raised, for the reason that is its cause. The process is of no further use: torch leaves its
    current stream, its generators and its allocator in a capture that never ends (pytorch#171263).
    """

    fatal = True


def record(make: Callable[[], Call]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of the call that ``make`` makes, and the results that its replays write.

    Made, warmed up and recorded on one stream that is not the default one. Autograd runs a backward on the stream of
    its forward: a ``make`` that ran the forward on the default stream would have the capture wait for that, which CUDA
    forbids (pytorch#164302). Raises CaptureFailed.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call = make()
        for _ in range(WARM_UPS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    gc.collect()  # what dies in a cycle is given back before the capture, not in it
    graph = torch.cuda.CUDAGraph()
    first: Exception | None = None  # the end of a capture that failed raises as well, and says less
    try:
        with torch.cuda.graph(graph, stream=stream):
            try:
                results = call()
            except Exception as error:
                first = error
                raise
    except Exception as error:  # noqa: BLE001 - an implementation may raise anything in a capture
        cause = first or error
        said = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise CaptureFailed(f"cannot be captured in a CUDA graph: {said}") from cause
    return graph, results


def replaying(make: Callable[[], Call]) -> Call:
    """A call that replays a graph of the one that ``make`` makes, and returns the recorded results."""
    graph, results = record(make)

    def replay() -> Any:
        graph.replay()
        return results

    return replay
