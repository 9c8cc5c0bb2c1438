"""Facts against the contract (DESIGN section 5): pure functions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .cases import Case

DEATH_S = 1.0  # until every survivor knows, on one host
SILENCE_S = 1.0  # beyond the timeout
AT_ONCE_S = 0.5  # the second call: far below any deadline
END_S = 2.0  # of an interpreter whose main thread has raised
TEARDOWN_S = 1.0  # PyTorch's part of it: half a second of CPU, and the ranks of a case end together
CLOSE_S = 1.0
SCHEDULING_S = 0.5  # ranks outnumber the cores, workers more so

Facts = dict[str, Any]


def expected_error(case: Case) -> str:
    """Its name, on a survivor."""
    if case.fault == "stop":
        return "TimeoutError"
    if case.fault == "allocation":
        return "Error"  # nobody died; the victim says what it could not get
    return "PeerError"  # also where the victim's call is interrupted, which it says before it ends


def expected_exit(case: Case) -> int:
    """Of the victim."""
    if case.fault in ("kill", "out_of_memory"):
        return -9
    return 1 if case.fault == "exception" else 0


def detection_s(case: Case, facts: Facts) -> float | None:
    """From the fault until the last survivor has raised. None if one did not."""
    records = [record for rank, record in enumerate(facts["records"]) if rank != case.victim]
    if not facts["is_reached"] or not all(record and record["error"] for record in records):
        return None
    known_s = max(record["error"]["ended_s"] for record in records)
    return max(0.0, known_s - _since_s(case, facts))


def _since_s(case: Case, facts: Facts) -> float:
    """When the fault became one of the others: a rank that init() has failed may live on, and only its end tells."""
    if case.fault == "allocation" and case.moment == "before_first":
        return facts["ended_s"][case.victim]
    return facts["struck_s"]


def complaints(case: Case, facts: Facts) -> list[str]:
    """What was not as promised; empty if all was."""
    if not facts["is_reached"]:
        return ["the ranks did not reach the moment of the case"]
    found = [f"rank {rank} did not end" for rank in facts["late"]]
    found += [f"left behind: {what}" for what in facts["left"]]
    for rank, record in enumerate(facts["records"]):
        judge = _of_victim if rank == case.victim else _of_survivor
        found += [f"rank {rank}: {text}" for text in judge(case, facts, record)]
        text = facts["stderr"][rank]
        if "terminate called" in text or "Fatal Python error" in text:
            found.append(f"rank {rank} crashed")
        if "Traceback" in text and not (rank == case.victim and case.fault == "exception"):
            found.append(f"rank {rank} left a traceback")
    return found


def _of_survivor(case: Case, facts: Facts, record: Any) -> Iterator[str]:
    rank = facts["records"].index(record)
    if record is None:
        yield f"no record, exit code {facts['exit_codes'][rank]}"
        return
    if facts["exit_codes"][rank] != 0:
        yield f"exit code {facts['exit_codes'][rank]}"
    error = record["error"]
    if error is None:
        yield "no error"
        return
    yield from _of_error(case, error)
    since_s = _since_s(case, facts)
    limit_s = DEATH_S + SCHEDULING_S
    if case.fault == "stop":
        limit_s = case.timeout_s + SILENCE_S
    if error["ended_s"] - since_s > limit_s:
        yield f"raised {error['ended_s'] - since_s:.2f} s after the fault, not within {limit_s}"
    yield from _of_aftermath(record)


def _of_error(case: Case, error: Any) -> Iterator[str]:
    if error["type"] != expected_error(case):
        yield f"{error['type']} instead of {expected_error(case)}: {error['message']}"
    if error["peers"] != [case.victim]:
        yield f"names {error['peers']} instead of {[case.victim]}: {error['message']}"


def _of_aftermath(record: Any, is_continued: bool = False) -> Iterator[str]:
    """The second call, weights, and what the process still holds."""
    error, again = record["error"], record.get("again")
    if "again" in record:
        if again is None:
            yield "the second call succeeded"
        else:
            if (again["type"], again["message"]) != (error["type"], error["message"]):
                yield (
                    f"the second call raised {again['type']}: {again['message']}, "
                    f"not the first cause, {error['type']}: {error['message']}"
                )
            if again["ended_s"] - again["called_s"] > AT_ONCE_S:
                yield f"the second call took {again['ended_s'] - again['called_s']:.2f} s"
    # A rank that was stopped in an update goes on with gradients that the others, who have given up, write meanwhile.
    if record.get("strange") and not (is_continued and record["torn"]):
        yield "weights are neither those of before nor of after the step"
    if record.get("weights") == "mixed" and not record.get("torn"):
        yield "weights of before and after the step are mixed, and nobody says so"
    if record["close_s"] > CLOSE_S + SCHEDULING_S:
        yield f"close() took {record['close_s']:.2f} s"
    before, after = record["holdings_before"], record["holdings_after"]
    yield from (
        f"{after[name]} {name}, {before[name]} before"
        for name in after
        if after[name] > before[name]
    )


def _of_victim(case: Case, facts: Facts, record: Any) -> Iterator[str]:
    code = facts["exit_codes"][case.victim]
    if code != expected_exit(case):
        yield f"exit code {code} instead of {expected_exit(case)}"
    if case.fault == "allocation":
        if record is None or record["error"] is None:
            yield "its allocation did not fail"
            return
        if record["error"]["type"] != "Error":
            yield f"{record['error']['type']} instead of Error: {record['error']['message']}"
        yield from _of_aftermath(record)
    elif case.fault == "stop":
        if record is None:
            yield "no record after it was continued"
        elif not record["closed"]:
            if record["error"] is None:
                yield "no error after it was continued"
                return
            yield from _of_error(case, record["error"])
            yield from _of_aftermath(record, is_continued=True)
    else:
        took_s = facts["ended_s"][case.victim] - facts["struck_s"]
        if took_s > END_S + case.size * TEARDOWN_S + SCHEDULING_S:
            yield f"ended {took_s:.2f} s after the fault"
