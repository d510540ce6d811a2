"""Ranks that nothing watches over: whatever one dies of, the others end within seconds, with one voice."""

import re
import signal
import time

import pytest

from .crew_worker import LONG, finish, start, wait_ready

# the graces are 2 and 5 s, the rest is for a busy machine; what hangs, hangs for ten minutes or sleeps 120 s and ends
# with 0
SECONDS = 100


def test_shared_work_is_counted_and_everyone_leaves_with_zero(tmp_path):
    (code, out, err), *others = finish(start(tmp_path, 3, rank0="count", member="count"), 240)
    assert (code, out) == (0, "done 15\n") and "work: 15 piece" in err
    assert others == [(0, "", "")] * 2


@pytest.mark.parametrize(("rank0", "member"), [("sleep", "sleep"), ("collective", "wait-in-collective"), ("sleep", "")])
def test_a_killed_rank_ends_the_job(tmp_path, rank0, member):
    """In its own work, in a collective, and while rank 0 works alone."""
    ranks = start(tmp_path, 3, rank0=rank0, member=member)
    wait_ready(tmp_path, ranks, range(3 if member else 1))
    ranks[1].kill()
    (code, out, err), killed, other = finish(ranks, SECONDS)
    assert code == 4 and out == "" and killed[0] == -signal.SIGKILL
    assert err.count("error:") == 1
    assert f"rank 1 was lost: it was killed or it crashed; its log is {tmp_path / 'log-rank-1.txt'}" in err
    assert f"dcgen-convert resume {tmp_path}" in err and "Traceback" not in err
    assert other == (4, "", "")


@pytest.mark.parametrize("member", ["sleep", "wait-in-collective"])
def test_a_killed_rank_0_ends_the_others(tmp_path, member):
    ranks = start(tmp_path, 2, rank0="collective" if member != "sleep" else "sleep", member=member)
    wait_ready(tmp_path, ranks, range(2))
    ranks[0].kill()
    _, other = finish(ranks, SECONDS)
    assert other == (4, "", "")
    assert "rank 0 was lost" in (tmp_path / "log-rank-1.txt").read_text()


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_rank_ends_the_job_within_the_timeout(tmp_path, frozen):
    """SIGSTOP closes no connection, and the others wait in a collective."""
    ranks = start(tmp_path, 3, rank0="wait-in-collective", member="wait-in-collective", timeout=4)
    wait_ready(tmp_path, ranks, range(3))
    time.sleep(1)
    ranks[frozen].send_signal(signal.SIGSTOP)
    others = [process for number, process in enumerate(ranks) if number != frozen]
    try:
        ended = finish(others, 4 + SECONDS)
    finally:
        ranks[frozen].kill()
        ranks[frozen].communicate()
    assert [code for code, _, _ in ended] == [4, 4]
    said = ended[0][2] if frozen else (tmp_path / "log-rank-1.txt").read_text()
    assert f"rank {frozen} has been silent for 4 s: it is stopped, or its host hangs" in said
    assert not frozen or f"its log is {tmp_path / 'log-rank-1.txt'}" in said


@pytest.mark.parametrize("guilty", [0, 1])
def test_a_rank_that_lives_but_hangs_ends_the_job(tmp_path, guilty):
    """Its connection is open and its beat goes on; the others wait in a collective. That rank 0 was long at work
    before is no stall.
    """
    part = f"steps-then-{guilty}"
    ranks = start(tmp_path, 3, rank0=part, member=part, timeout=LONG)
    (code, out, err), *others = finish(ranks, 240)
    assert (code, out) == (4, "") and [other[0] for other in others] == [4, 4]
    log = f", its log is {tmp_path / 'log-rank-1.txt'}" if guilty else ""
    found = re.search(r"no rank has made progress for (\d+) s: rank (\d) hangs at crew_worker.py:\d+ \(hang\)(.*)", err)
    assert found and int(found[1]) >= LONG and found[2] == str(guilty) and found[3] == log, err
    assert f"dcgen-convert resume {tmp_path}" in err and err.count("error:") == 1
    logged = (tmp_path / ("log-rank-1.txt" if guilty else "log.txt")).read_text()
    assert "thread MainThread stands at" in logged and ", in hang" in logged


def test_a_rank_that_hangs_from_the_first_moment_ends_the_job(tmp_path):
    """It has not done a single piece; nothing but the tasks' own time limit can notice it."""
    ranks = start(tmp_path, 2, rank0="nap", member="sleep", timeout=LONG)
    wait_ready(tmp_path, ranks, range(2))
    begun = time.monotonic()
    (code, out, err), other = finish(ranks, SECONDS)
    assert (code, out) == (4, "") and other == (4, "", "") and time.monotonic() - begun > LONG
    assert re.search(r"rank 1 hangs at crew_worker.py:\d+ \(part\), its log is .*log-rank-1.txt", err), err
    assert "thread MainThread stands at" in (tmp_path / "log-rank-1.txt").read_text()


def test_a_rank_that_loads_files_or_waits_for_a_compiler_gets_on(tmp_path):
    """Much longer than the timeout, and not a single piece is counted."""
    (code, out, err), other = finish(start(tmp_path, 2, rank0="load", member="compile", timeout=LONG), 240)
    assert (code, out) == (0, "done 0\n") and other == (0, "", ""), err


def test_a_rank_that_never_comes_ends_the_job(tmp_path):
    ranks = start(tmp_path, 2, rank0="count", timeout=2, coming=5)
    ranks[1].send_signal(signal.SIGSTOP)
    try:
        ((code, out, err),) = finish(ranks[:1], 5 + SECONDS)
    finally:
        ranks[1].kill()
        ranks[1].communicate()
    assert (code, out) == (4, "") and "rank 1 of 2 did not come" in err


def test_a_job_that_was_stopped_whole_goes_on(tmp_path):
    """Suspended and continued, as by a scheduler: nobody blames the others for the pause."""
    ranks = start(tmp_path, 2, rank0="nap", member="nap", timeout=2)
    wait_ready(tmp_path, ranks, range(2))
    for process in ranks:
        process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    for process in ranks:
        process.send_signal(signal.SIGCONT)
    assert [code for code, _, _ in finish(ranks, 60)] == [0, 0]


def test_idle_ranks_end_with_the_code_of_rank_0(tmp_path):
    (code, _, err), *others = finish(start(tmp_path, 3, rank0="fail"), 240)
    assert code == 2 and "the picture cannot be read" in err
    assert [other[0] for other in others] == [2, 2]


def test_the_failure_of_another_rank_is_told_by_rank_0(tmp_path):
    (code, _, err), other = finish(start(tmp_path, 2, rank0="sleep", member="fail"), 240)
    assert code == 2 and other == (2, "", "")
    assert "rank 1: the picture cannot be read" in err and "hint: replace it" in err


def test_an_internal_error_of_another_rank_names_its_log(tmp_path):
    (code, _, err), other = finish(start(tmp_path, 2, rank0="sleep", member="crash"), 240)
    assert code == other[0] == 70
    assert "rank 1: internal error: ZeroDivisionError" in err and str(tmp_path / "log-rank-1.txt") in err
    assert "Traceback" not in err and "ZeroDivisionError" in (tmp_path / "log-rank-1.txt").read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_all_ranks_is_one_resumable_end(tmp_path, number, code):
    ranks = start(tmp_path, 2, rank0="sleep", member="sleep")
    wait_ready(tmp_path, ranks, range(2))
    for process in ranks:
        process.send_signal(number)
    (first, _, err), other = finish(ranks, SECONDS)
    assert first == other[0] == code
    assert err.count("error:") == 1 and err.splitlines()[-1] == f"dcgen-convert resume {tmp_path}"
