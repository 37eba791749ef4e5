from __future__ import annotations

import contextlib
import http.server
import json
import os
import shutil
import socket
import threading
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import pytest

from edgeft.errors import SetupError, ToolError
from edgeft.llamacpp import web
from tests.browser import browser
from tests.conftest import CORES, ensure
from tests.test_serve import post, running

BUILT = {"ae78d755197a": "96f20389a411717ab5f8a3bdd934b17a37f4eaa47a6cc7aa0d218a551e752cf0"}
"""What the page was when it was built elsewhere (Node.js 20.20, x86-64), by its pin."""

SYSTEM, QUESTION = "Answer in one sentence.", "What is the capital of France?"

PAGE = """<!doctype html><meta http-equiv="Content-Security-Policy" content="default-src 'self'"><script>1</script>
<link rel="icon" href="data:image/svg+xml,x"><a href="https://example.com">a link to click on</a>
<style>@font-face { src: url("data:font/woff2,x"), url('data:,x'), url(data:,x) } p { fill: url(#part) }</style>"""


@pytest.fixture(scope="module")
def page():
    """The built page, built now on a machine that has npm and no page yet: 2 CPU-minutes."""
    try:
        web.buildable()
    except SetupError as error:
        pytest.skip(f"the web chat cannot be built here: {error}")
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, CORES)
    try:
        return web.ensure_web()
    finally:
        os.sched_setaffinity(0, mine)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def program(folder, name, said):
    (folder / name).write_text(f"#!/bin/sh\necho {said}\n")
    (folder / name).chmod(0o755)


def test_without_npm_the_web_chat_is_refused_with_the_way_out(cache):
    assert web.built_web() is None
    with pytest.raises(SetupError, match="npm is not installed") as caught:
        web.ensure_web()
    assert "without the web page" in caught.value.hint
    assert not (cache / "cache").exists()


def test_an_old_node_is_refused_before_a_thousand_packages_are_fetched(cache):
    program(cache, "npm", "10.0.0")
    for version in ("v18.20.4", "v20.18.3", "v21.7.0", "v22.1.0"):
        program(cache, "node", version)
        with pytest.raises(SetupError, match=f"Node.js is {version}, and the web chat needs v20.19"):
            web.ensure_web()
    for version in ("v20.19.0", "v22.12.0", "v24.0.1"):
        program(cache, "node", version)
        web.buildable()


def test_a_page_that_changed_in_the_cache_is_not_served(cache):
    folder = web.home() / f"web-{web.pin()}"
    folder.mkdir(parents=True)
    (folder / "index.html").write_text("as it was built")
    folder.with_suffix(".sha256").write_text(web.digest(folder))
    assert web.built_web() == folder
    (folder / "index.html").write_text("as somebody left it")
    assert web.built_web() is None


@pytest.mark.parametrize(
    "part",
    [
        '<script src="https://cdn.example.com/x.js"></script>',
        '<script src="/_app/bundle.js"></script>',
        '<link rel="stylesheet" href="https://fonts.example.com/css">',
        '<img srcset="https://example.com/a.png 2x">',
        "<style>body { background: url('https://example.com/a.png') }</style>",
        "<style>body { background: url(//example.com/a.png) }</style>",
        '<style>@import "https://example.com/a.css";</style>',
        '<p style="background: url(//example.com/a.png)">',
        '<form action="https://example.com/">',
    ],
)
def test_what_a_page_loads_beside_itself_is_found(part):
    assert web.outside(PAGE) == []
    assert len(web.outside(PAGE + part)) == 1


def test_a_page_that_is_not_one_file_is_refused(tmp_path):
    made = tmp_path / "made"
    for name in (*web.PAGE, "_app/immutable/assets/style.css", "recommended-mcp/logo.png"):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text("x")
    web._keep(made, tmp_path / "page")
    kept = sorted(p.relative_to(tmp_path / "page").as_posix() for p in (tmp_path / "page").rglob("*.*"))
    assert tuple(kept) == web.PAGE
    (made / "_app" / "immutable" / "bundle.js").write_text("x")
    with pytest.raises(ToolError, match=r"no longer one page: _app/immutable/bundle\.js"):
        web._keep(made, tmp_path / "again")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text + '<img src="https://example.com/a.png">', "loads from elsewhere"),
        (lambda text: text + "<script>'/home/me/cache/ui/src'</script>", "the folder it was built in"),
        (lambda text: "<script>2</script>" + text, "not under its security policy"),
        (lambda text: "<script>2</script>", "not under its security policy"),
    ],
)
def test_a_page_that_could_reach_out_or_names_this_machine_is_refused(tmp_path, change, said):
    index = tmp_path / "index.html"
    index.write_text(PAGE)
    web._check(index, "/home/me/cache")
    index.write_text(change(PAGE))
    with pytest.raises(ToolError, match=said):
        web._check(index, "/home/me/cache")


@pytest.mark.slow
def test_the_page_is_what_was_built_elsewhere(page):
    assert web.pin() in BUILT, f"build the page twice and write down {web.digest(page)}"
    assert web.digest(page) == BUILT[web.pin()]


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("EDGEFT_BUILD_WEB"), reason="2 CPU-minutes; EDGEFT_BUILD_WEB=1 runs it"
)
def test_another_folder_gives_the_same_page(page, tmp_path, monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    again = web.build(web.llama_cpp_tree() / "tools" / "ui", tmp_path / "a longer name")
    assert web.digest(again) == web.digest(page)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def served(page, smollm2, tmp_path_factory):
    """The address of a server that demands the key `geheim`, and with it is told how to answer."""
    port = free_port()
    argv = [
        ensure("server") / "llama-server", "--model", smollm2, "--ctx-size", "512", "--threads", "1", "--path", page,
        "--temp", "0", "--n-predict", "16", "--ui-config", json.dumps({"systemMessage": SYSTEM}),
        "--api-key", "geheim", "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    with running([os.fspath(a) for a in argv], tmp_path_factory.mktemp("served") / "log") as url:
        yield url


def get(url, key=""):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(url, headers=headers)
    with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()
    return None


@pytest.mark.slow
def test_the_page_comes_without_the_key_and_nothing_else_does(served, page):
    assert get(f"{served}/") == (page / "index.html").read_bytes()
    for name in ("build.json", "props", "v1/models", "slots"):
        assert get(f"{served}/{name}") is None
        assert get(f"{served}/{name}", "falsch") is None
        assert get(f"{served}/{name}", "geheim")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_a_question_asked_through_the_page_gets_the_models_own_answer(served, tmp_path):
    """The key is asked for; the prompt is the recipe's system prompt and the question, with no tools; one host is asked."""
    asked = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
    answer = post(f"{served}/v1/chat/completions", {"messages": asked}, "geheim")
    with browser("chromium", tmp_path) as tab:
        tab.open(served)
        tab.click("Enter API Key")
        tab.type("input", "falsch")
        tab.click("Save & Retry")
        tab.wait("document.body.innerText.includes('Invalid API key')")
        tab.run("document.querySelector('input').select()")
        tab.type("input", "geheim")
        tab.click("Save & Retry")
        tab.type("[contenteditable=true], textarea", QUESTION)
        tab.click("Send")
        said = answer["choices"][0]["message"]["content"]
        tab.wait(f"document.body.innerText.includes({json.dumps(said)})")
        (body,) = (json.loads(body) for url, body in tab.requested if url.endswith("/chat/completions"))
        assert body["messages"] == asked and "tools" not in body
        hosts = {urlsplit(url).netloc for url, _ in tab.requested if not url.startswith("data:")}
        assert hosts == {urlsplit(served).netloc}


REACH_OUT = """
const put = (tag, set) => document.body.append(Object.assign(document.createElement(tag), set));
const picture = `<img src="${there}/inside">`;
const inside = URL.createObjectURL(new Blob([picture], { type: 'text/html' }));
const worker = new Blob([`fetch('${there}/worker', { mode: 'no-cors' })`], { type: 'text/javascript' });
fetch(`${there}/fetch`, { mode: 'no-cors' }).catch(() => 0);
import(`${there}/import`).catch(() => 0);
navigator.sendBeacon(`${there}/beacon`);
for (const make of [() => new EventSource(`${there}/events`), () => new WebSocket(there.replace('http', 'ws'))])
    try { make(); } catch {}
new Worker(URL.createObjectURL(worker));
put('img', { src: `${there}/image` });
put('script', { src: `${there}/script` });
put('video', { src: `${there}/video` });
put('object', { data: `${there}/object` });
put('iframe', { src: `${there}/frame` });
put('iframe', { srcdoc: picture });
put('iframe', { src: `data:text/html,${encodeURIComponent(picture)}` });
put('iframe', { src: inside });
for (const rel of ['stylesheet', 'prefetch', 'preload', 'icon', 'manifest'])
    put('link', { rel, href: `${there}/${rel}`, as: 'image' });
put('style', { textContent: `@import "${there}/sheet"; body { background: url(${there}/background) }` });
new Promise((done) => setTimeout(done, 2000));
"""
"""Ways to ask another host for something, without anybody's click."""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_the_page_cannot_reach_another_host(served, page, tmp_path):
    heard = []

    class Listener(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            heard.append(self.path)
            self.send_error(404)

        do_POST = do_GET

        def log_message(self, *args):
            pass

    other = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    script = f"{{const there = 'http://127.0.0.1:{other.server_port}';{REACH_OUT}}}"
    (tmp_path / "bare.html").write_text("<!doctype html><body></body>")
    with other, browser("chromium", tmp_path / "profile") as tab:
        tab.open(served)
        tab.wait("document.body.innerText.includes('Enter API Key')")
        tab.run(script)
        assert heard == []
        tab.open((tmp_path / "bare.html").as_uri())  # without the policy each of them is heard
        tab.wait("document.readyState == 'complete' && location.protocol == 'file:'")
        tab.run(script)
        other.shutdown()
    assert {
        "/fetch",
        "/import",
        "/image",
        "/worker",
        "/frame",
        "/inside",
        "/stylesheet",
        "/background",
    } <= set(heard)
