"""The command line: configs are found by name or path, and every mistake is told in one line that helps."""

from absl import flags
from ml_collections import config_flags
import pytest

from dpp_jax import command_line


@pytest.fixture
def parse(monkeypatch):
    """A function from arguments to the config; its flags are those of the program, and only of this test."""
    values = flags.FlagValues()
    monkeypatch.setattr(flags, 'FLAGS', values)
    config = config_flags.DEFINE_config_file('config', None, 'Settings.', flag_values=values)
    flags.DEFINE_string('workdir', None, 'Folder.', flag_values=values)
    flags.DEFINE_string('private', None, 'Folder.', flag_values=values)
    flags.DEFINE_enum('stage', 'all', ['plan', 'all', 'status'], 'Stage.', flag_values=values)
    flags.DEFINE_boolean('json', False, 'JSON.', flag_values=values)

    def parse(*arguments):
        argv = ['dpp-jax', *arguments]
        monkeypatch.setattr('sys.argv', argv)
        monkeypatch.setattr('sys.path', list(command_line.sys.path))
        command_line.parse(argv)
        return config.value

    return parse


def line(parse, *arguments):
    """What the program tells of a mistake."""
    with pytest.raises(SystemExit) as end:
        parse(*arguments)
    (line,) = end.value.code.splitlines()
    assert line.startswith('dpp-jax: ')
    return line


@pytest.mark.parametrize('name', ['digits_8', 'digits_8.py', 'configs/digits_8.py'])
def test_a_shipped_config_is_found_from_any_folder(parse, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse(f'--config={name}:3', '--workdir=run')
    assert config.name == 'digits_8' and config.dp.epsilon == 3


def test_a_file_goes_before_a_shipped_config_of_its_name(parse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = """
from dpp_jax.configs import default

def get_config(epsilon):
    config = default.get_config(epsilon)
    config.name = 'mine'
    return config
"""
    (tmp_path / 'digits_8.py').write_text(text)
    assert parse('--config=digits_8.py:1', '--workdir=run').name == 'mine'
    assert parse('--config=digits_8:1', '--workdir=run').name == 'digits_8'


def test_a_config_imports_default_as_in_a_checkout(parse, tmp_path):
    (tmp_path / 'mine.py').write_text('from configs.digits_8 import get_config\n')
    assert parse(f'--config={tmp_path}/mine.py:1', '--workdir=run').name == 'digits_8'


def test_settings_may_stand_before_the_config(parse):
    config = parse('--config.finetune.epochs', '3', '--workdir=run', '--config', 'digits_8:10')
    assert config.finetune.epochs == 3


def test_the_last_of_several_values_stays(parse):
    config = parse(
        '--config=digits_8:10',
        '--workdir=run',
        '--config.model.multipliers=(1,)',
        '--config.query.post_process=true',
        '--config.model.multipliers=(1, 2)',
        '--noconfig.query.post_process',
    )
    assert config.model.multipliers == (1, 2) and not config.query.post_process


GOOD = ('--config=digits_8:10', '--workdir=run')


@pytest.mark.parametrize(
    'arguments, told',
    [
        ((), '--config is missing; it must name a config, as in --config=digits_8:10'),
        (('--config.finetune.epochs=3', '--workdir=run'), '--config is missing'),
        (('--config=digits_8:10',), '--workdir is missing; it must name the folder'),
        (('--config=digits_8:10', '--workdir='), '--workdir is empty'),
        (('--config=digits_8:10', '--workdir', '--stage=plan'), '--workdir is --stage=plan'),
        (('--config=configs/digit_8.py:1', '--workdir=run'), "is 'configs/digit_8.py'; it must be a file or"),
        (('--config=digit_8:1', '--workdir=run'), 'did you mean digits_8?'),
        (('--config=digits_8:zero', '--workdir=run'), "ε after the colon of --config is 'zero'"),
        ((*GOOD, '--config.finetune.epochz=3'), 'there is no setting config.finetune.epochz'),
        ((*GOOD, '--config.fintune.epochs', '3'), 'did you mean config.finetune.epochs?'),
        ((*GOOD, '--config.draws=3'), 'did you mean config.finetune.draws or config.pretrain.draws?'),
        ((*GOOD, '--config.finetune.draws=many'), "--config.finetune.draws=many: invalid literal for int"),
        ((*GOOD, '--config.import.paht=a.pth'), 'did you mean config.imported.path'),
        ((*GOOD, '--config.finetune=3'), 'config.finetune is a group; change a setting of it'),
        ((*GOOD, '--noconfig.query.post_process=1'), 'does not take an argument'),
        ((*GOOD, '--config.finetune.epochs'), 'config.finetune.epochs has no value; write --config.fine'),
        (('--config.finetune.epochs', *GOOD), 'config.finetune.epochs has no value; write --config.fine'),
        ((*GOOD, '--stage=training'), '<plan|all|status>'),
        ((*GOOD, '--stages=plan'), "Unknown command line flag 'stages'. Did you mean: stage ?"),
        ((*GOOD, 'plan'), 'plan is not a flag'),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_what_is_allowed(parse, arguments, told):
    assert told in line(parse, *arguments)


@pytest.mark.parametrize(
    'text, told',
    [
        ('def get_config(epsilon:\n', 'line 1: '),
        ('import no_such_module\n', "No module named 'no_such_module' ({path}, line 1)"),
        ('\ndef get_config(epsilon):\n    return 1 / 0\n', 'division by zero ({path}, line 3)'),
        ('x = 3\n', 'must define get_config(epsilon)'),
    ],
)  # fmt: skip
def test_an_error_of_a_config_is_told_with_file_and_line(parse, tmp_path, text, told):
    path = tmp_path / 'mine.py'
    path.write_text(text)
    found = line(parse, f'--config={path}:1', '--workdir=run')
    assert told.format(path=path) in found and str(path) in found


@pytest.mark.parametrize('text', ['digits_8', 'digits_8:', 'configs/digits_8.py'])
def test_a_config_without_epsilon_is_refused_with_how_to_say_it(parse, text):
    found = line(parse, f'--config={text}', '--workdir=run')
    assert f'--config is {text}; ε must stand after a colon, as in --config={text.rstrip(":")}:10' in found


def test_the_last_of_several_values_stays_however_it_is_written(parse):
    config = parse(
        '--config=digits_8:10', '--config.model.multipliers', '(1,)', '--config.finetune.epochs=4',
        '--config.model.multipliers', '(1,2)', '-config.finetune.epochs', '5', '--workdir=run',
        '--config.query.post_process', '--noconfig.pretrain.enabled', '--config.pretrain.enabled=true',
    )  # fmt: skip
    assert config.model.multipliers == (1, 2) and config.finetune.epochs == 5
    assert config.query.post_process and config.pretrain.enabled


@pytest.mark.parametrize('section', ['import', 'imported'])
def test_import_is_a_word_of_python_and_a_section_on_the_command_line(parse, section):
    flags_of_it = (f'--config.{section}.path', 'theirs.pth', f'--config.{section}.trust')
    config = parse(*GOOD, *flags_of_it, '--config.export.path=ours.pth')
    assert config.imported.path == 'theirs.pth' and config.imported.trust
    assert config.export.path == 'ours.pth'


@pytest.mark.parametrize('value', ['', ' ', '-x', '~no_such_user/run'])
def test_a_folder_that_nobody_meant_is_refused(parse, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert '--workdir is ' in line(parse, '--config=digits_8:10', f'--workdir={value}')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('place', ['--workdir=run_{}', '--config.name={}', '--config={}:10'])
def test_bytes_that_are_no_text_are_refused(parse, place):
    """Python shows them as lone surrogates, which no file in UTF-8 can hold."""
    found = line(parse, *GOOD, place.format('\udcc3'))
    assert 'which this locale asks for; set PYTHONUTF8=1' in found
    found.encode()


@pytest.mark.parametrize(
    ('argument', 'text'),
    [
        ('--workdir=ftp://a/b', '--workdir is ftp://a/b; it must be a folder of this machine, or begin with'),
        ('--private=', '--private is empty; it must name a folder'),
        ('--private=http://a', '--private is http://a; it must be a folder of this machine, or begin with'),
    ],
)
def test_a_place_that_cannot_be_used_is_told_with_what_is_allowed(parse, argument, text):
    assert text in line(parse, '--config=digits_8:3', '--workdir=run', argument)
    parse('--config=digits_8:3', '--workdir=gs://bucket/run', '--private=~/private')


def test_status_needs_no_config(parse):
    assert parse('--workdir=run', '--stage=status', '--json') is None


def test_json_is_for_status(parse):
    told = line(parse, '--config=digits_8:3', '--workdir=run', '--json')
    assert '--json is for --stage=status; --stage is all' in told
