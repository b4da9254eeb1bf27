"""The benchmark runs from end to end and every figure in its file is one."""

import json
import math
from pathlib import Path
import subprocess
import sys

from scripts.benchmark import scaling

ROOT = Path(__file__).resolve().parents[1]
# As little to compile as there can be: what the figures are is of no interest here.
SETTINGS = {
    'model.width': 8,
    'model.multipliers': '(1,)',
    'model.attention_resolutions': '()',
    'pretrain.augmentation': 'none',
    'finetune.draws': 2,
    'finetune.batch_size': 8,
    'loop.images_at_once': 4,
}

HIDDEN = "the loop's work hidden, of its time", 'the same, with checkpoints'


def test_every_figure_is_positive_and_finite(tmp_path):
    command = [sys.executable, '-m', 'scripts.benchmark']
    command += ['--config=configs/digits_8.py:10', '--examples=2', '--repeats=1']
    command += ['--skip=naive,optax,jax_privacy', '--parts', '--turn_seconds=0', '--starts=0']
    command += [f'--config.{name}={value}' for name, value in SETTINGS.items()]
    command += [f'--json={tmp_path / "figures.json"}']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / 'figures.json').read_text())

    rates = {row['name']: row['noised_images_per_second'] for row in found['contenders']}
    assert list(rates) == ['plain gradient', 'DP step', 'PyTorch plain gradient', 'PyTorch + Opacus']
    rates |= {row['name']: row['rate'] for row in found['parts']['rates']}
    assert len(rates) == 10
    shares = {row['name']: row['share'] for row in found['parts']['shares']}
    assert len(found['ratios']) == 3 and len(shares) == 4
    for name, value in (rates | shares | found['ratios']).items():
        # Steps as short as these hide nothing of the loop's work, at worst.
        assert 0 <= value < math.inf and (value > 0 or name in HIDDEN), name
        assert name in done.stdout


def test_step_time_is_measured_on_any_number_of_devices_and_the_model_is_fitted(tiny_config):
    config = tiny_config(model__blocks=1, model__attention_resolutions=())
    report = scaling.measure(config, [2], images=4, draws=2, repeats=1, turn_seconds=0)
    layouts = [(step['devices'], step['devices_per_image']) for step in report['steps']]
    assert layouts == [(2, 1), (2, 2)]
    for step in report['steps']:
        for name in ('empty', 'full'):
            assert step[name] > 0 and 0 <= step[f'{name}_predicted'] < math.inf
    assert len(report['fitted']) == 4 and min(report['fitted'].values()) >= 0
    lines = scaling.measured_text(report).splitlines()
    assert len(lines) == 4 + len(layouts) and all(len(line.split()) == 6 for line in lines[4:])
