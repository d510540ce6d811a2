"""Which rank a process is: SLURM and MPI variables, host lists, hostfiles, and what a child process must not
inherit.
"""

import pytest

from dcgen_convert.core.errors import InputError
from dcgen_convert.ranks import hosts, join

STEP = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
}


def adopted(**env: str) -> dict[str, str]:
    join.adopt(env)
    return {name: env[name] for name in join.PLACE if name in env}


def test_slurm_step():
    place = adopted(**STEP, SLURM_STEP_NODELIST="gpu[07-08]")
    assert place["RANK"] == "5" and place["WORLD_SIZE"] == "8" and place["LOCAL_RANK"] == "1"
    assert place["MASTER_ADDR"] == "gpu07" and 20_000 <= int(place["MASTER_PORT"]) < 40_000
    assert adopted(**{**STEP, "SLURM_PROCID": "6"})["MASTER_PORT"] == place["MASTER_PORT"]
    assert adopted(**{**STEP, "SLURM_STEP_ID": "1"})["MASTER_PORT"] != place["MASTER_PORT"]


def test_a_batch_script_of_several_tasks_is_one_process():
    assert adopted(SLURM_PROCID="0", SLURM_NTASKS="8", SLURM_JOB_ID="77") == {}


def test_mpi():
    names = {"RANK": "1", "SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}
    place = adopted(**{f"OMPI_COMM_WORLD_{key}": value for key, value in names.items()}, PMIX_NAMESPACE="a")
    assert (place["RANK"], place["WORLD_SIZE"], place["MASTER_ADDR"]) == ("1", "2", "127.0.0.1")
    spread = adopted(PMI_RANK="3", PMI_SIZE="4", MPI_LOCALRANKID="1", MPI_LOCALNRANKS="2")
    assert spread["LOCAL_RANK"] == "1" and "MASTER_ADDR" not in spread  # on two hosts, and nobody says where rank 0 is


def test_what_a_launcher_set_stays():
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    assert adopted(**place, **STEP) == place


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu07", "gpu07"), ("a,b", "a"), ("gpu[07-09,12],x", "gpu07"), ("r[1,3]-ib", "r1-ib"), ("n-[2-3]", "n-2")],
)
def test_first_host(nodes, first):
    assert join.first_host(nodes) == first


def test_children_are_no_ranks(monkeypatch):
    for name in (*join.PLACE, join.LAUNCHED):
        monkeypatch.setenv(name, "1")
    assert not {*join.PLACE, join.LAUNCHED} & join.alone().keys()


def test_hostfile(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# two\nnode1 slots=8\n\nnode2 slots=4  # half\n")
    assert hosts.slots(str(path)) == {"node1": 8, "node2": 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node1", "line 1"),
        ("a slots=1\na slots=2", "line 2"),
        ("a slots=0", "line 1"),
        ("a slots=1025", "line 1"),
        ("a slots=99999999", "line 1"),
        ("-oProxyCommand=touch${IFS}here slots=1", "line 1"),
        ("a\u2028b slots=1", "line 1"),
        ("#", "no host"),
    ],
)
def test_bad_hostfile(tmp_path, text, message):
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        hosts.slots(str(path))
    with pytest.raises(InputError, match="does not exist"):
        hosts.slots(str(tmp_path / "none"))
