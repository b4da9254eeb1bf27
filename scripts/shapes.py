"""Run the same run in several shapes, processes × devices, and compare what comes out.

    python scripts/shapes.py --shapes=1x1,1x8,2x4,4x2 --workdir=runs/shapes

Every process works on the digits with a small network; all runs have the keys of the first. Central images,
ledger, labels and budget must be the same bits, and weights the same up to rounding: 1e-5.
"""

import argparse
import json
from pathlib import Path
import sys
import time

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent))
import chaos  # noqa: E402
import launch_local  # noqa: E402

EXACT = ('central_images.npz/', 'ledger.jsonl', 'plan.json')
LIMIT = 1e-5  # of a weight's difference
# Few steps: each multiplies the rounding of those before it. After 120 and 46 steps it is 1.7e-4.
SETTINGS = chaos.SETTINGS | {'pretrain.epochs': 4, 'finetune.epochs': 1.0}


def give_keys(source: Path, workdir: Path) -> None:
    """Begin a run with the keys of another one, without what was noted of its releases.

    The program refuses another rounding under the same noise, as it must of a run that is no test.
    """
    chaos.give_keys(source, workdir)
    path = workdir / 'private' / 'keys.json'
    keys = json.loads(path.read_text(encoding='utf-8'))
    for part in keys.values():
        if isinstance(part, dict):
            part.pop('released', None)
    path.write_text(json.dumps(keys), encoding='utf-8')


def run(workdir: Path, processes: int, devices: int) -> float:
    """Run all stages; returns how many seconds they took."""
    arguments = ['--config=configs/digits_8.py:10', f'--workdir={workdir}', f'--hosts={processes}']
    arguments += [f'--config.{name}={value}' for name, value in SETTINGS.items()]
    start = time.monotonic()
    together = launch_local.start(arguments, processes, devices, cwd=chaos.ROOT)
    said = [process.communicate()[0].decode(errors='replace') for process in together]
    if any(process.returncode for process in together):
        raise RuntimeError('\n'.join(said))
    return time.monotonic() - start


def compare(found: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> dict[str, object]:
    """Compare two final states, see `chaos.final_state`."""
    different = chaos.differences(found, reference)
    weights = [name for name in found if name.startswith(('pretrain', 'finetune'))]
    pixels = np.abs(found['images.npz/images'].astype(int) - reference['images.npz/images'])
    return {
        'not the same bits': [name for name in different if name.startswith(EXACT)],
        'weights, largest difference': max(float(np.abs(found[n] - reference[n]).max()) for n in weights),
        'weights, largest': max(float(np.abs(reference[name]).max()) for name in weights),
        'synthetic pixels that differ': float((pixels > 0).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--shapes', default='1x1,1x8,2x4,4x2', help='processes x devices of each')
    parser.add_argument('--workdir', type=Path, default=Path('runs/shapes'), help='must be empty')
    parser.add_argument('--json', type=Path, help='write the result to this file')
    arguments = parser.parse_args()
    root = arguments.workdir.absolute()
    if root.exists() and any(root.iterdir()):
        sys.exit(f'--workdir is {arguments.workdir}; it must be empty or not exist')
    result, reference = {}, None
    for shape in arguments.shapes.split(','):
        workdir = root / shape
        if reference:
            give_keys(reference, workdir)
        seconds = run(workdir, *map(int, shape.split('x')))
        reference = reference or workdir
        result[shape] = compare(chaos.final_state(workdir), chaos.final_state(reference))
        print(f'{shape}: {seconds:.0f} s, {json.dumps(result[shape])}', flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + '\n', encoding='utf-8')
    sys.exit(
        any(
            each['not the same bits'] or each['weights, largest difference'] > LIMIT
            for each in result.values()
        )
    )


if __name__ == '__main__':
    main()
