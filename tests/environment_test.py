"""Scripts that install say that they are still at it, and fail where pip fails."""

from pathlib import Path
import subprocess

ROOT = Path(__file__).resolve().parents[1]


def told_while(command):
    """Run a command below `tell_while`, with a line each second."""
    script = f'set -euo pipefail; . scripts/environment.sh; tell_while "installing" {command}; echo after'
    return subprocess.run(
        ['bash', '-c', script],
        env={'PATH': '/usr/bin:/bin', 'DPP_TELL_SECONDS': '1'},
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=30,
    )


def test_a_long_installation_says_so_until_it_ends():
    done = told_while('sleep 2.5')
    assert done.stderr.splitlines()[:2] == ['… installing, 1 s', '… installing, 2 s']
    assert (done.stdout, done.returncode) == ('after\n', 0)


def test_one_that_fails_ends_the_script_with_its_status():
    done = told_while("sh -c 'echo wrong >&2; exit 7'")
    assert (done.stderr, done.stdout, done.returncode) == ('wrong\n', '', 7)
