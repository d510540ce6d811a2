"""When a job counts as stalled, and whose fault it is, by hand-made looks at its ranks. Real processes: test_crew."""

import importlib
import subprocess
import sys
import threading
import time

import psutil
import pytest

from dcgen_convert.core import pulse
from dcgen_convert.core.pulse import SLACK, Activity, Progress, Sign

STALL = 10.0


def looks(progress: Progress, now: float, **counts: int | Sign) -> None:
    """``r0=3``: rank 0 has done three pieces and is at work; a Sign: that."""
    for rank, found in counts.items():
        progress.note(int(rank[1:]), found if isinstance(found, Sign) else Sign(found, "here", False), now)


@pytest.fixture
def running() -> Progress:
    """Two ranks that have done three pieces each, two seconds a piece; the last at 6 s."""
    progress = Progress(STALL)
    progress.begin(0.0)
    for piece in range(4):
        looks(progress, 2.0 * piece, r0=piece, r1=piece)
    return progress


def test_standing_still_is_a_stall_of_whoever_has_done_least_and_waits_for_none(running):
    looks(running, 7.0, r0=4)
    assert running.stalled({0, 1}, 7.0 + STALL) == {}
    assert running.stalled({0, 1}, 7.1 + STALL).keys() == {1}
    looks(running, 8.0 + STALL, r0=Sign(4, "here", False), r1=Sign(3, "all_reduce", True))
    assert running.stalled({0, 1}, 8.0 + STALL).keys() == {0}
    assert running.stalled(set(), 1e9) == {}  # nobody has anything to do


def test_waiting_for_a_rank_that_gets_on_is_no_stall(running):
    for second in range(7, 7 + int(3 * STALL)):
        looks(running, second, r0=second, r1=3)
        assert running.stalled({0, 1}, second) == {}


def test_what_was_slow_before_may_be_slow_again(running):
    looks(running, 6.0 + 45.0, r0=4, r1=4)
    assert running.stalled({0, 1}, 51.0 + SLACK * 45.0 - 1) == {}
    assert running.stalled({0, 1}, 51.0 + SLACK * 45.0 + 1).keys() == {0, 1}
    running.begin(1000.0)
    looks(running, 1000.0, r0=4, r1=4)
    looks(running, 1001.0, r0=5, r1=5)
    assert running.stalled({0, 1}, 1002.0 + STALL).keys() == {0, 1}  # of another task


def test_loading_and_compiling_come_first(running):
    running.begin(100.0)
    looks(running, 100.0, r0=4, r1=4)
    looks(running, 101.0, r0=5, r1=4)
    assert running.stalled({0, 1}, 101.0 + STALL - 1) == {}
    assert running.stalled({0, 1}, 101.0 + STALL + 1).keys() == {1}
    for second in range(102, 200):
        looks(running, second, r0=5, r1=Sign(4, "here", False, busy=True))
    assert running.stalled({0, 1}, 199.0 + STALL) == {}
    looks(running, 200.0, r1=5)
    assert running.stalled({0, 1}, 201.0 + STALL).keys() == {0, 1}  # a long time before the first piece is no measure


def test_ranks_that_work_apart_are_judged_apart(running):
    running.begin(100.0, together=False)
    for second in range(100, 100 + 3 * int(STALL)):
        looks(running, second, r0=second, r1=3)
    assert running.stalled({0, 1}, 100.0 + STALL) == {}
    assert running.stalled({0, 1}, 101.0 + STALL).keys() == {1}
    assert running.still(1, 101.0 + STALL) == 1 + STALL
    assert running.stalled({0}, 101.0 + STALL) == {}


def test_the_time_of_a_suspended_job_is_forgiven(running):
    running.forgive(500.0)
    assert running.stalled({0, 1}, 501.0) == {}
    looks(running, 501.0, r0=4, r1=4)
    assert running.stalled({0, 1}, 502.0 + STALL)  # and is no pause of the job's own


def test_files_modules_and_child_processes_are_work_and_sleep_is_not(tmp_path):
    seen, now = Activity(), 1000.0
    seen.seen(now)
    assert not seen.seen(now + 1)
    (tmp_path / "weights").write_bytes(bytes(4 << 20))
    assert seen.seen(now + 2) and not seen.seen(now + 3)
    (tmp_path / "a_module_of_this_test.py").touch()
    sys.path.insert(0, str(tmp_path))
    importlib.import_module("a_module_of_this_test")
    sys.path.remove(str(tmp_path))
    assert seen.seen(now + 4) and not seen.seen(now + 5)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child:
        deadline = time.monotonic() + 60
        while psutil.Process(child.pid).cpu_times().user < 0.5 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert seen.seen(now + 6)
        child.kill()


def test_a_look_names_the_innermost_line_of_this_package_and_counts():
    before, found = pulse.count, []

    def look() -> None:
        found.append(pulse.sign())

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()  # the main thread stands here, inside the standard library
    pulse.bump("module", ("arguments",), None)
    assert found[0].count == before and pulse.count == before + 1
    assert found[0].place.startswith("test_pulse.py:") and "(test_a_look" in found[0].place
    assert not found[0].waits
