"""JSON of another form than a run wrote it: one line with the file and the field, or no difference."""

import json

from dpp_jax import build
from dpp_jax.privacy.ledger import Ledger
from dpp_jax.run import already_spent, artefacts, composition, folder, plan, sizes, statement
from dpp_jax.run.keys import Keys
from dpp_jax.stages import report
from dpp_jax.stages.evaluate import utility

OTHERS = [None, True, 'abc', -1, 1.5, float('nan'), [], [1], {}, {'a': 1}]


def readers(config, workdir):
    """File → what reads it."""
    settings = folder.flatten(config.to_dict())
    private = build.images(config, 'train')
    images, ledger = artefacts.SyntheticImages(workdir, settings), Ledger(workdir.ledger, read_only=True)

    def keys():
        found = Keys(workdir.keys, config.seed)
        found.check_planned(['central_query', 'dp_sgd'])
        found.of_mechanism('dp_sgd', ledger)
        found.of_part('pretrain')
        found.may_repeat('dp_sgd')

    def scores():
        evaluation = artefacts.Evaluation(workdir, settings)
        report.is_done(workdir, images, evaluation)
        report._score_rows(evaluation.results, tuple('0123456789'))
        assert isinstance(evaluation.scored, list)

    return {
        workdir.config: lambda: workdir.check(settings),
        workdir.own_config: lambda: workdir.check(settings),
        workdir.plan: lambda: (composition._plan(workdir), plan._read(workdir.plan)),
        workdir.statement: lambda: (
            statement.stated(workdir, 'dp_sgd'),
            already_spent.releases(str(workdir.statement), is_private=False),
        ),
        workdir.code: lambda: statement.codes(workdir),
        workdir.keys: keys,
        workdir.digests: lambda: artefacts.central_images(workdir),
        workdir.fingerprints: lambda: workdir.check_fingerprint('train', private),
        workdir.sizes: lambda: sizes._read(workdir.sizes),
        workdir.evaluation: scores,
        workdir.ceiling: lambda: utility._known_ceiling(workdir),
        workdir.report: scores,
        workdir.scored: scores,
        workdir.seconds: lambda: artefacts.seconds_of_stages(workdir),
        workdir.synthetic / 'settings.json': images.check,
    }


def test_every_json_file_of_a_run_has_a_reader_here(finished_run):
    config, workdir, _ = finished_run
    found = {path for part in (workdir.release, workdir.private) for path in part.glob('*.json')}
    assert found <= set(readers(config, workdir))


def places(value, path=()):
    """Where a value of JSON has parts: of a list the first alone."""
    for name, inner in value.items() if isinstance(value, dict) else list(enumerate(value))[:1]:
        yield (*path, name)
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, name))


def changed(content, place, other):
    """A copy of `content` with another value at `place`; without it, if that is Ellipsis."""
    copy = json.loads(content)
    part = copy
    for name in place[:-1]:
        part = part[name]
    if other is ...:
        del part[place[-1]]
    else:
        part[place[-1]] = other
    return json.dumps(copy)


def test_a_field_of_another_kind_is_told_in_a_line_with_the_file(copied_run):
    config, workdir = copied_run
    told = 0
    for path, read in readers(config, workdir).items():
        content = path.read_text()
        if path == workdir.report:  # the statement in it is only compared
            content = json.dumps(json.loads(content) | {'privacy': {}})
        for place in places(json.loads(content)):
            for other in [..., *OTHERS]:
                path.write_text(changed(content, place, other))
                try:
                    read()
                except ValueError as error:
                    text = str(error)
                    told += 1
                    assert path.name in text or 'belongs to' in text, (path, place, other, text)
                    assert '\n' not in text or 'belongs to' in text, (path, place, other, text)
        path.write_text(content)
        read()
    assert told > 300
