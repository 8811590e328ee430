"""The answer is the oracle's, within the error budget, in memory that held NaN, and its inputs are as they were."""

from __future__ import annotations

from attnbench.harness.conform.posed import Declined, Posed, Tensors, Wrong, is_clear, said_by
from attnbench.harness.oracle.inputs import Inputs
from attnbench.harness.run.memory_state import checksums


def check(posed: Posed) -> None:
    inputs = posed.inputs()
    before = checksums(inputs)
    posed.hold(_answer(posed, inputs))
    if posed.problem.direction == "fwd" and (got := posed.forward_with_lse(inputs)):
        posed.hold(got, "of the call with lse, ")
    posed.synchronize()
    if changed := [name for name, bits in checksums(inputs).items() if bits != before[name]]:
        posed.fail(f"writes into its inputs ({', '.join(changed)})", changed=changed)


def _answer(posed: Posed, inputs: Inputs) -> Tensors:
    """Where a tensor starts is no part of a problem, so nothing declares it: a clear error about it is a refusal."""
    try:
        return posed.answer(inputs)
    except Wrong:
        raise
    except Exception as error:
        if not posed.option("offset") or not is_clear(error):
            raise
        posed.synchronize()  # a lost device is no refusal, and shows here
        raise Declined(
            f"refuses tensors that start {posed.option('offset')} elements in: {said_by(error)}"
        ) from error
