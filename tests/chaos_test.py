"""A real process, killed and asked to stop while it works, ends like one that was left alone."""

import importlib.util
import json
from pathlib import Path
import shutil
import signal
import time

import pytest

from dpp_jax import pipeline
from dpp_jax.training import checkpoint

SCRIPT = Path(__file__).resolve().parents[1] / 'scripts' / 'chaos.py'
# Compiles sooner, as in conftest.py; the devices are those of a user.
ENVIRONMENT = {'XLA_FLAGS': '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false'}


@pytest.fixture(scope='module')
def chaos():
    spec = importlib.util.spec_from_file_location('chaos', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def settings(chaos):
    """Little of what is not killed here."""
    return chaos.SETTINGS | {
        'model.attention_resolutions': '()',
        'pretrain.enabled': False,
        'generate.images': 60,
        'evaluate.fid': False,
        'evaluate.classifiers': '("logistic",)',
    }


@pytest.fixture(scope='module')
def left_alone(chaos, settings, tmp_path_factory):
    root = tmp_path_factory.mktemp('left_alone')
    chaos.run_to_the_end(root, settings, ENVIRONMENT)
    return root


def test_sigterm_and_sigkill_in_finetuning_and_generation_change_nothing(
    chaos, settings, left_alone, tmp_path
):
    chaos.give_keys(left_alone, tmp_path)
    process = chaos.Process(tmp_path, settings, ENVIRONMENT)
    resume = tmp_path / 'private' / 'resume' / 'finetune'
    while process.running() and not checkpoint.latest_training(resume):
        time.sleep(0.01)
    asked = time.monotonic()
    assert process.end(signal.SIGTERM) == 0, process.output()
    assert time.monotonic() - asked < 30
    assert 'finetune stopped after step' in process.output()
    stopped_at = checkpoint.latest_training(resume)[0]
    assert 0 < stopped_at < 46  # in the middle

    process = chaos.Process(tmp_path, settings, ENVIRONMENT)
    while process.running() and checkpoint.latest_training(resume)[0] == stopped_at:
        time.sleep(0.01)
    assert process.end(signal.SIGKILL) == -signal.SIGKILL, process.output()
    kills = iter([('generate', 0.2)])
    chaos.survive(tmp_path, lambda: next(kills, None), settings, ENVIRONMENT)
    ends = [chaos.final_state(root) for root in (tmp_path, left_alone)]
    assert chaos.differences(*ends) == []


def test_the_comparison_sees_a_difference(chaos, left_alone):
    """Otherwise the test above could not fail."""
    end = chaos.final_state(left_alone)
    name = next(key for key in end if key.startswith('finetune/ema_params'))
    changed = end | {name: end[name] + 1e-7, 'ledger.jsonl': ''}
    assert chaos.differences(end, changed) == sorted([name, 'ledger.jsonl'])


def test_the_comparison_sees_other_keys(chaos, finished_run, copied_run):
    """Those of the images: with others of a mechanism the program does not go on."""
    config, workdir = copied_run
    keys = json.loads(workdir.keys.read_text())
    workdir.keys.write_text(json.dumps(keys | {'generate/images': keys['pretrain']}))
    (workdir.synthetic / 'images.npz').unlink()
    pipeline.run(config, workdir.root, 'generate')
    found = chaos.differences(chaos.final_state(workdir.root), chaos.final_state(finished_run[1].root))
    assert {'images.npz/images', 'keys.json'} <= set(found)


def test_keys_that_changed_or_were_lost_are_seen(chaos, left_alone, tmp_path):
    """Of a run that drew its own, which no other run can be compared with."""
    keys = chaos.keys_of(left_alone)
    assert set(keys) >= {'dp_sgd', 'generate/images', 'evaluate/logistic'}
    fewer = {'dp_sgd': keys['dp_sgd']}
    assert chaos.wrong_keys(left_alone, [{}, fewer, keys]) == []
    changed = fewer | {'generate/images': keys['dp_sgd'], 'pretrain': keys['dp_sgd']}
    lost = [f'keys of {part} changed or were lost' for part in ('generate/images', 'pretrain')]
    assert chaos.wrong_keys(left_alone, [keys, changed]) == lost

    shutil.copytree(left_alone, tmp_path / 'run')
    ledger = tmp_path / 'run' / 'release' / 'ledger.jsonl'
    name = keys['dp_sgd']['identifier']
    ledger.write_text(ledger.read_text().replace(name, 'another', 1))
    assert chaos.wrong_keys(tmp_path / 'run', [keys]) == [
        f'the ledger names {sorted([name, "another"])} for dp_sgd'
    ]
