"""How many devices a CPU becomes, and who may say so."""

import os
import subprocess
import sys

import numpy as np
import pytest

from dpp_jax.training import devices

COUNT = """
import jax
from dpp_jax.training import devices
devices.one_per_core()
print(jax.local_device_count(), devices.cores(), jax.config.jax_num_cpu_devices)
"""


def counted(**environment: str) -> list[int]:
    """Devices and cores of a process of its own."""
    inherited = {
        name: value for name, value in os.environ.items() if name not in ('XLA_FLAGS', 'JAX_NUM_CPU_DEVICES')
    }
    done = subprocess.run(
        [sys.executable, '-c', COUNT],
        env={**inherited, 'JAX_PLATFORMS': 'cpu', **environment},
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    return [int(word) for word in done.stdout.split()]


def test_a_device_of_each_core():
    found, cores, _ = counted()
    assert found == min(cores, 16)


@pytest.mark.parametrize(
    'environment',
    [
        {'JAX_NUM_CPU_DEVICES': '3'},
        {'XLA_FLAGS': '--xla_force_host_platform_device_count=3'},
        {'XLA_FLAGS': '--xla_cpu_collective_call_terminate_timeout_seconds=50', 'JAX_NUM_CPU_DEVICES': '3'},
    ],
)
def test_the_user_says_how_many(environment):
    assert counted(**environment)[0] == 3


def test_devices_that_wait_for_each_other_do_not_end_the_process(monkeypatch):
    """XLA would, after 40 seconds: less than one core may be behind in a step of minutes."""
    monkeypatch.setenv(
        'XLA_FLAGS',
        '--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_warn_stuck_timeout_seconds=7',
    )
    devices.one_per_core()  # too late here to change anything but the variable
    flags = dict(flag.split('=') for flag in os.environ['XLA_FLAGS'].split())
    assert flags['--xla_cpu_collective_call_warn_stuck_timeout_seconds'] == '7', "the user's"
    assert int(flags['--xla_cpu_collective_call_terminate_timeout_seconds']) > 24 * 3600


@pytest.mark.parametrize(
    ('quota', 'cores'), [('150000 100000', 1), ('200000 100000', 2), ('5000 100000', 1), ('max 100000', 8)]
)
def test_cores_are_no_more_than_the_quota(quota, cores, monkeypatch, tmp_path):
    (tmp_path / 'cpu.max').write_text(quota + '\n')
    monkeypatch.setattr(devices, '_CPU_QUOTA', tmp_path / 'cpu.max')
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: set(range(8)), raising=False)
    assert devices.cores() == cores


@pytest.mark.parametrize('number, size', [(8, 1), (8, 2), (8, 8), (6, 3), (1, 1)])
def test_rows_are_dealt_to_teams_in_turns_and_all_of_a_team_have_the_same(number, size):
    batch = {'image': np.arange(48).reshape(24, 2), 'mask': np.arange(24) < 19}
    with devices.limited_to(number):
        dealt = devices.deal_own(batch, size)
    teams = number // size
    for device in range(number):
        rows = np.arange(device // size, 24, teams)
        for name, leaf in batch.items():
            np.testing.assert_array_equal(dealt[name][device], leaf[rows])
