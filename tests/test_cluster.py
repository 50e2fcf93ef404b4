"""Processes that meet, compare what they have, and tell each other of mistakes."""

import contextlib
import socket
import time
from typing import Any

import processes
import pytest

from lm import cluster
from lm.errors import UserError

TOGETHER = """
cluster.join(settings)
assert jax.process_count() == 2 and len(jax.devices()) == 4
print(cluster.gathered({"process": process, "text": "é" * 500 * process})[1]["text"].count("é"), cluster.leads())

def attempt(what):
    try:
        what()
        print("fine")
    except cluster.UserError as error:
        print(error)

def one_fails():
    with cluster.agreeing():
        cluster.check(process == 0, "the disk is full; make room")

attempt(lambda: cluster.check_agreed({"jax": "1", "config": "same"}))
attempt(lambda: cluster.check_agreed({"jax": "1", "config": f"hash {process}"}))
attempt(one_fails)
attempt(lambda: cluster.check_shared_out("row", [process, process + 2], 4))
attempt(lambda: cluster.check_shared_out("row", [0, 1][: process + 1], 2))
attempt(lambda: cluster.check_shared_out("row", [process], 3))
cluster.wait_for_all("the end")
"""


def test_processes_compare_what_they_have() -> None:
    for process, (status, out, errors) in enumerate(processes.finish(processes.start(TOGETHER, 2))):
        assert status == 0, errors
        assert [line for line in out.splitlines() if "Gloo" not in line] == [
            f"500 {process == 0}",
            "fine",
            "process 1 has config hash 1, and process 0 hash 0; start all processes with the same code, versions and"
            " settings",
            "process 1: the disk is full; make room" if process == 0 else "the disk is full; make room",
            "fine",
            "row [0] belong to process 0 and to process 1, which share no others; check cluster.process of each",
            "row [2] of 3 belong to no process; check cluster.process of each",
        ]


HURRIED = """
import dataclasses
try:
    cluster.join(dataclasses.replace(settings, wait=3))
except cluster.UserError as error:
    print(error)
"""


def test_who_does_not_come_is_told_of() -> None:
    """By the first process to all that came, how many that are and who is missing; without it, that it is missing."""
    missing = "2 of 4 processes arrived within cluster.wait = 3 seconds; missing are 1, 3\n"
    for arrive, wanted in (([0, 2], missing), ([1], "process 1 of 2 did not find process 0 at cluster.coordinator")):
        for status, out, errors in processes.finish(processes.start(HURRIED, 2 * len(arrive), arrive=arrive)):
            assert status == 0, errors
            assert out.startswith(wanted)


def test_a_stranger_at_the_door_keeps_nobody_out() -> None:
    """What connects and says nothing, or nonsense, as a health check does, costs a moment and no more."""
    port = processes.free_port()
    first = processes.start(HURRIED.replace("wait=3", "wait=30") + "else:\n    print('met')", 2, [0], port=port)
    strangers = []
    while len(strangers) < 2:
        with contextlib.suppress(OSError):
            strangers.append(socket.create_connection(("127.0.0.1", port), timeout=1))
            strangers[-1].sendall(b"GET / HTTP/1.0\n\n" if len(strangers) == 2 else b"")
        time.sleep(0.05)
    second = processes.start(HURRIED.replace("wait=3", "wait=30") + "else:\n    print('met')", 2, [1], port=port)
    for status, out, errors in processes.finish([*first, *second]):
        assert status == 0, errors
        assert "met" in out
    for stranger in strangers:
        stranger.close()


def test_two_with_one_number() -> None:
    """One of them may learn of it before the other has come, and that one finds nobody."""
    told = [out for _, out, _ in processes.finish(processes.start(HURRIED, 3, arrive=[0, 1, 1]))]
    assert told[0] == "two processes were started with cluster.process 1; give each its own\n"


def test_a_process_alone_agrees_with_itself() -> None:
    cluster.join(cluster.ClusterConfig())
    assert cluster.gathered([1]) == [[1]]
    cluster.check_agreed({"a": 1})
    cluster.check_shared_out("row", [0, 1], 2)
    cluster.wait_for_all("here")
    with pytest.raises(UserError, match="own"), cluster.agreeing():
        raise UserError("own")


HERE = {"coordinator": "localhost:1", "processes": 2, "process": 0}
MISTAKES = {
    "one of three": ({"processes": 2}, "cluster.processes given; processes find each other by .* all three"),
    "explicit": ({"launcher": "explicit"}, "give cluster.coordinator, cluster.processes and cluster.process"),
    "none": (HERE | {"launcher": "none"}, "cluster.launcher is none, and cluster.coordinator, cluster.processes"),
    "no port": (HERE | {"coordinator": "localhost"}, "cluster.coordinator is 'localhost'; write HOST:PORT"),
    "port 0": (HERE | {"coordinator": "localhost:0"}, "the port from 1 to 65535"),
    "a port too high": (HERE | {"coordinator": "localhost:65536"}, "the port from 1 to 65535"),
    "too high": (HERE | {"process": 2}, "cluster.process is 2; with cluster.processes 2 it is from 0 to 1"),
    "no time": ({"wait": 0}, "cluster.wait is 0; it must be at least 1"),
}


@pytest.mark.parametrize(("settings", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cluster.ClusterConfig(**settings)
