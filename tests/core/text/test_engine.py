"""The child process: same answers as in-process, quick to fail, restarted, gone with its parent."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from text_folders import byte_fallback_folder, byte_level_folder

from lmx.core.errors import InputError, NotFoundError
from lmx.core.text.engine import TextEngine
from lmx.core.text.tokenizer import Tokenizer
from lmx.core.text.types import Message, TemplateError, TextCodec

Load = Callable[[str], Tokenizer]
MESSAGES = [
    Message(role="user", content="Hello </s> 🦙"),
    Message(role="assistant", content="fine"),
    Message(role="user", content="\x00 bye"),
]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("name", ["byte-level", "metaspace", "prepend", "checkpoint:mixtral"])
def test_answers_as_the_tokenizer_in_this_process(
    name: str, chat: bool, tokenizer_of: Load, folder_of: Callable[[str], Path]
) -> None:
    inside = tokenizer_of(name)
    with TextEngine.open(folder_of(name), chat=chat) as engine:
        codec: TextCodec = engine
        assert codec.info == inside.info
        for text in ("", "Hello fox", "  🦙\n\x00", "<s></s>"):
            ids = inside.encode(text)
            assert codec.encode(text) == ids
            assert codec.encode(text, add_special_tokens=False) == inside.encode(text, add_special_tokens=False)
            assert codec.decode(ids) == inside.decode(ids)
            assert codec.decode(ids, skip_special_tokens=False) == inside.decode(ids, skip_special_tokens=False)
        for prompt in (True, False):
            assert codec.encode_chat(MESSAGES, prompt) == inside.encode_chat(MESSAGES, prompt)
        assert codec.token_to_id("</s>") == inside.token_to_id("</s>")
        assert codec.token_to_id("nowhere") is None
        ids = inside.encode("Hello 🦙 fox")
        stream = codec.stream(ids[:2])
        assert (
            "".join([*map(stream.push, ids[2:]), stream.flush()]) == inside.decode(ids)[len(inside.decode(ids[:2])) :]
        )


def test_errors_come_through_with_their_kind(tmp_path: Path) -> None:
    with TextEngine.open(byte_level_folder(tmp_path / "a", "{{ raise_exception('Only cats') }}")) as engine:
        with pytest.raises(TemplateError) as refused:
            engine.encode_chat(MESSAGES)
        assert refused.value.refusal == "Only cats"
        with pytest.raises(InputError, match="unknown role"):
            engine.encode_chat([Message(role="wizard", content="x")])
        with pytest.raises(InputError):
            engine.encode("\ud800")
        with pytest.raises(InputError):
            engine.decode([-1])
        assert engine.decode(engine.encode("Hello")) == "Hello"


def test_no_template_is_an_error_only_when_asked_for(tmp_path: Path) -> None:
    with TextEngine.open(byte_fallback_folder(tmp_path / "a", template=None), chat=True) as engine:
        assert not engine.info.has_chat_template
        assert engine.info.end_of_turn_ids == (2,)
        with pytest.raises(InputError) as error:
            engine.encode_chat(MESSAGES)
        assert "lmx generate" in error.value.hint


def test_missing_files_are_found_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        TextEngine.open(tmp_path)
    with pytest.raises(NotFoundError):
        TextEngine.open(tmp_path / "nowhere")


def test_a_killed_child_is_replaced(tmp_path: Path) -> None:
    with TextEngine.open(byte_level_folder(tmp_path / "a")) as engine:
        ids = engine.encode("Hello")
        os.kill(engine._child._process.pid, signal.SIGKILL)
        with pytest.raises(InputError, match="SIGKILL"):
            engine.decode(ids)
        assert engine.decode(ids) == "Hello"


def test_close_ends_the_child(tmp_path: Path) -> None:
    engine = TextEngine.open(byte_level_folder(tmp_path / "a"))
    process = engine._child._process
    engine.close()
    engine.close()
    assert process.returncode is not None
    with pytest.raises(RuntimeError, match="closed"):
        engine.encode("x")


def test_works_from_many_threads(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with TextEngine.open(byte_level_folder(tmp_path / "a")) as engine, ThreadPoolExecutor(8) as pool:
        texts = [f"Hello {i}" for i in range(200)]
        assert list(pool.map(lambda text: engine.decode(engine.encode(text)), texts)) == texts


def test_the_child_is_isolated_and_neither_side_loads_torch(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path / "a")
    (tmp_path / "tokenizers.py").write_text("raise SystemExit('imported from the current folder')")
    script = f"""
import sys
from pathlib import Path
from lmx.core.text.engine import TextEngine
with TextEngine.open(Path({str(folder)!r})) as engine:
    assert engine.decode(engine.encode("Hello")) == "Hello"
    pid = engine._child._process.pid
    maps = Path(f"/proc/{{pid}}/maps")
    assert not maps.exists() or "torch" not in maps.read_text()
    environ = Path(f"/proc/{{pid}}/environ")
    assert not environ.exists() or b"HF_TOKEN" not in environ.read_bytes()
assert "torch" not in sys.modules and "jinja2" not in sys.modules
"""
    env = {**os.environ, "HF_TOKEN": "secret"}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path.parent, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_worker_imports_no_torch() -> None:
    script = "import sys; import lmx.core.text.worker; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize("how", ["os._exit(0)", "os.kill(os.getpid(), 9)"])
def test_the_child_dies_with_its_parent(how: str, tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path / "a")
    script = f"""
import os
from pathlib import Path
from lmx.core.text.engine import TextEngine
engine = TextEngine.open(Path({str(folder)!r}))
engine.encode("x")
print(engine._child._process.pid, flush=True)
{how}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    _await_end(int(done.stdout))


def test_a_hung_child_dies_without_its_parent(tmp_path: Path) -> None:
    folder = byte_level_folder(
        tmp_path / "a", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    )
    script = f"""
import os, threading
from pathlib import Path
from lmx.core.text.engine import TextEngine
engine = TextEngine.open(Path({str(folder)!r}))
engine.encode("x")
print(engine._child._process.pid, flush=True)
threading.Timer(0.3, os._exit, [0]).start()
engine.encode_chat([{{"role": "user", "content": "x"}}])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    _await_end(int(done.stdout), seconds=5)


def _await_end(pid: int, seconds: float = 2) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
        if not state.stdout.strip() or state.stdout.startswith("Z"):  # dead, if not yet collected by its new parent
            return
        time.sleep(0.05)
    pytest.fail(f"the child still runs after {seconds} s")


def test_ctrl_c_of_the_terminal_does_not_reach_the_child(tmp_path: Path) -> None:
    with TextEngine.open(byte_level_folder(tmp_path / "a")) as engine:
        ids = engine.encode("Hello")
        child = engine._child._process.pid
        assert os.getpgid(child) != os.getpgid(0)
        os.kill(child, signal.SIGINT)
        assert engine.decode(ids) == "Hello"
        assert engine._child._process.pid == child


def test_an_interrupted_call_leaves_no_stale_answer(tmp_path: Path) -> None:
    with TextEngine.open(byte_level_folder(tmp_path / "a")) as engine:
        engine.encode("x")
        before = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        try:
            os.kill(engine._child._process.pid, signal.SIGSTOP)
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(KeyboardInterrupt):
                engine.encode("first")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert engine.decode(engine.encode("second")) == "second"
