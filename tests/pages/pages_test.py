"""The pages: whole HTML in one file that asks for nothing; the public one knows nothing private."""

from html.parser import HTMLParser
import http.server
import json
import re
import shutil
import subprocess
import threading

import numpy as np
from PIL import Image
import pytest

from dpp_jax import files, pipeline
from dpp_jax.pages import page, private_page
from dpp_jax.run import artefacts
from dpp_jax.run.folder import flatten

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
VOID = {'meta', 'link', 'img', 'br', 'path', 'circle'}


class Checker(HTMLParser):
    """Follows the tags; collects addresses and the text that is seen."""

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.names, self.text = [], [], set(), ''
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.addresses += [value for name, value in attrs if name in ('src', 'href', 'xlink:href', 'action')]
        assert not [name for name, _ in attrs if name.startswith('on')]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in VOID
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if 'style' not in self.open:
            self.text += data


def checked(path):
    """The checker of a page that is as it must be."""
    text = path.read_text(encoding='utf-8')
    found = Checker(text)
    assert not found.names & {'script', 'iframe', 'object', 'embed', 'form'}
    assert all(address.startswith('data:') for address in found.addresses)
    assert all(url.startswith('data:') for url in re.findall(r'url\(([^)]{5})', text))
    assert '://' not in text and '@import' not in text
    return found


def test_the_public_page_shows_statement_images_and_settings(finished_run):
    config, workdir, _ = finished_run
    found = checked(workdir.release_page)
    statement = json.loads(workdir.statement.read_text())
    assert f'ε = {statement["epsilon_rounded_up"]}' in found.text and 'NOT PRIVATE' in found.text
    for text in (*statement['covered'], *statement['assumptions'], 'finetune.batch_size', 'Over fine-tuning'):
        assert text.replace('`', '') in found.text
    assert 'as released' in found.text and 'step 23' in found.text
    for name in ('images.npz', 'ImageFolder', "dpp_jax.load('release')"):
        assert name in found.text
    assert 'builder_from_directory' not in found.text  # it is not there
    assert str(workdir.root) not in found.text
    size = workdir.release_page.stat().st_size
    assert 10_000 < size < 500_000


def test_the_card_has_the_claim_the_classes_and_how_to_load(finished_run):
    config, workdir, _ = finished_run
    text = workdir.card.read_text(encoding='utf-8')
    epsilon = json.loads(workdir.statement.read_text())['epsilon_rounded_up']
    for part in (f'ε = {epsilon}', 'NOT PRIVATE', '| 9 | 9 | 4 |', "np.load('release/synthetic/images.npz')"):
        assert part in text
    assert 'License' in text and str(workdir.root) not in text


def test_the_private_page_shows_what_the_evaluation_found(copied_run):
    config, workdir = copied_run
    evaluation = artefacts.Evaluation(workdir, flatten(config.to_dict()))
    matrix = (np.eye(10, dtype=int) * 30 + 1).tolist()
    evaluation.results.update(
        fid_spread=0.25,
        scores={'kid': {'value': 0.0123, 'spread': 0.001, 'images': 40, 'real': 0.004}},
        fid_of_class={str(label): 10.0 + label for label in range(10)},
        memorization={
            'near_distance': 1.0,
            'share_near': 0.49,
            'share_near_expected': 0.01,
            'median_ratio': 1.02,
            'p_value': 0.3,
            'synthetic_images': 40.0,
        },
        accuracy_spread={'mlp': 0.012},
        accuracy_of_seeds={'mlp': [0.5, 0.6]},
        confusion={'mlp': matrix},
        accuracy_of_class={'mlp': [0.1 * label for label in range(10)]},
        selection='synthetic validation images',
    )
    evaluation.save()
    public = workdir.release_page.read_bytes(), workdir.card.read_bytes()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(workdir.nearest)
    pipeline.run(config, workdir.root, 'report')
    found = checked(workdir.report_page)
    table = workdir.report_text.read_text()
    for text in ('± 0.25', '0.0123 ± 0.001 (40 images; real test images: 0.004)', '± 1.2 over 2 seeds'):
        assert text in found.text and text in table
    for text in ('Confusions', 'share near', 'Real beside synthetic', 'Pre-training', 'Time', '19.0'):
        assert text in found.text
    assert 'svg' in found.names and 'Mean norm of a gradient' in found.text
    # Scores change nothing that may be published.
    assert (workdir.release_page.read_bytes(), workdir.card.read_bytes()) == public


def test_both_pages_go_without_what_is_not_there(copied_run):
    """As in a folder of an earlier version, whose report is written again."""
    config, workdir = copied_run
    for path in (workdir.over_finetuning, workdir.real_images, workdir.seconds, workdir.evaluation):
        path.unlink()
    shutil.rmtree(workdir.private / 'metrics')
    central = artefacts.central_images(workdir)
    files.write_npz(workdir.central_images, images=central['images'], labels=central['labels'])
    noted = json.loads(workdir.digests.read_text())
    noted['central_images.npz'] = files.digest([central['images'], central['labels']])
    workdir.digests.write_text(json.dumps(noted))
    keys = json.loads(workdir.keys.read_text())
    keys['central_query']['released'] = noted['central_images.npz']
    workdir.keys.write_text(json.dumps(keys))
    for path in (workdir.release_page, workdir.report_page):
        path.unlink()
    before = workdir.released_ledger.read_bytes(), workdir.own_ledger.read_bytes()
    pipeline.run(config, workdir.root, 'generate')
    pipeline.run(config, workdir.root, 'report')
    assert (workdir.released_ledger.read_bytes(), workdir.own_ledger.read_bytes()) == before
    text = checked(workdir.release_page).text
    assert 'after post-processing' in text and 'as released' not in text and 'Over fine-tuning' not in text
    private = checked(workdir.report_page).text
    assert 'Real beside' not in private and 'Mean norm' not in private and 'Confusions' not in private
    # Made again from its keys, it is what the earlier version released, and no more.
    workdir.central_images.unlink()
    pipeline.run(config, workdir.root, 'central')
    assert set(artefacts.central_images(workdir)) == {'images', 'labels'}


def test_every_text_is_escaped():
    evil = '<b onclick="x">&\'"</b>'
    made = page.Page(evil, evil)
    tiles = made.sheet(np.zeros((3, 4, 5, 3), np.uint8))
    made.add(
        evil,
        page.paragraph(evil, 'note'),
        page.bullets([evil]),
        page.code(evil),
        page.folded(evil, page.table([evil], [[evil]])),
        page.heat_table([evil, evil], [evil], np.array([[np.nan]]), [[evil]]),
        page.rows_of_images([(evil, tiles)]),
        page.table_of_images([evil, evil], [(evil, [tiles])]),
        page.picture(b'', evil),
    )
    found = Checker(made.html())
    assert 'b' not in found.names and found.text.count(evil) >= 10
    assert page.inline('`a` **b** <c>') == '<code>a</code> <strong>b</strong> &lt;c&gt;'


def test_images_are_magnified_by_whole_numbers():
    """Otherwise their pixels would not be squares of one size."""
    assert [page.zoom_of(height) for height in (8, 14, 28, 32, 64, 256)] == [6, 3, 2, 2, 1, 1]
    made = page.Page('x', '')
    tiles = made.sheet(np.zeros((70, 8, 8, 1), np.uint8))
    assert len(tiles) == 70 and 'background-position:-240px -48px' in tiles[69]
    assert 'width:48px;height:48px;background-size:3072px 96px' in made.html()


def test_of_many_classes_the_most_frequent_confusions_are_listed():
    matrix = np.eye(40, dtype=int) * 10
    matrix[3, 4], matrix[7, 1] = 9, 5
    names = [f'class {label}' for label in range(40)]
    found = Checker('<html>' + private_page._confusion(matrix, names) + '</html>').text
    assert found.index('class 3') < found.index('class 7') and 'class 39' not in found and '47.4 %' in found


@pytest.fixture
def served():
    """A function from a page to its address here, and the list of all that is asked for."""
    asked, pages = [], {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header('Content-Type', 'text/html; charset=utf-8')
            self.end_headers()
            self.wfile.write(pages.get(self.path, b''))

        def log_message(self, *_):
            pass

    def serve(path):
        name = f'/{path.parent.name}'
        pages[name] = path.read_bytes()
        return f'http://127.0.0.1:{server.server_port}{name}'

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield serve, asked
        server.shutdown()


def screenshot(address, picture, width, scheme):
    """Let a browser that reaches nothing but this machine show a page; what it says."""
    options = (
        '--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking '
        f'--disable-component-update --disable-sync --hide-scrollbars --window-size={width},1200 '
        f'--blink-settings=preferredColorScheme={scheme} --enable-logging=stderr --v=0'
    )
    command = [CHROMIUM, *options.split(), '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1']
    command += [f'--user-data-dir={picture}.profile', f'--screenshot={picture}', address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert picture.exists(), done.stderr[-2000:]
    return done.stderr


@pytest.mark.skipif(CHROMIUM is None, reason='no chromium here to render the pages')
@pytest.mark.parametrize('scheme', [0, 1], ids=['dark', 'light'])
@pytest.mark.parametrize('width', [420, 1280])
def test_a_browser_shows_the_pages_without_an_error_or_a_request(
    finished_run, served, tmp_path, width, scheme
):
    _, workdir, _ = finished_run
    serve, asked = served
    for path in (workdir.release_page, workdir.report_page):
        picture = tmp_path / f'{path.parent.name}.png'
        assert 'CONSOLE' not in screenshot(serve(path), picture, width, scheme)
        with Image.open(picture) as found:
            pixels = np.asarray(found.convert('L'), float)
        assert pixels.shape == (1200, width)
        assert pixels.std() > 15  # something is there
        assert (np.median(pixels) > 200) == (scheme == 1)  # light or dark
    assert asked == ['/release', '/private']  # the pages, and nothing that they name
