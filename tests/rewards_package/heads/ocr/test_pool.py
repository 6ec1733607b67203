"""Worker processes: order, crashes, deadlines, signals, and that none is left behind."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from rewards import RewardBatch, RewardError, create
from rewards.heads.ocr.engines import ENGINES
from rewards.heads.ocr.pool import PoolError, WorkerPool
from waiting import DEADLINES, HANG, running, wait_until

ROOT = Path(__file__).parents[4]
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

# What an engine does is told by the first pixel of an image.
ENGINE = """
    import glob, os, time

    class Scripted:
        packages = ("json",)

        def __init__(self, *, detect=True, detection_side=320):
            if detection_side == 666:
                raise RuntimeError("no models")
            print("libraries may print")

        def read(self, image):
            what, value, _ = image[0, 0].tolist()
            if what == 1:
                os._exit(7)
            if what == 2:
                open(__file__ + ".hangs", "w").close()
                time.sleep(1e6)
            if what == 3:
                raise ValueError(f"cannot read {value}")
            if what == 4:
                open(f"{__file__}.{os.getpid()}", "w").close()
                while len(glob.glob(f"{__file__}.*")) < 2:  # until both workers have an image
                    time.sleep(0.01)
                time.sleep(0.02 * (value % 3))
            if what == 5:
                os.kill(os.getpid(), 9)
            return [f"{value}", f"{os.getpid()}"]
"""
READ, EXIT, STUCK, RAISE, UNEVEN, KILLED = 0, 1, 2, 3, 4, 5


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "scripted_engine.py"
    path.write_text(textwrap.dedent(ENGINE))
    return path


@pytest.fixture
def pool(file):
    pool = WorkerPool(file, "Scripted", {}, 2)
    yield pool
    pool.close()


def scripted_images(*what: int, side: int = 4) -> list[np.ndarray]:
    images = [np.zeros((side, side + 1, 3), np.uint8) for _ in what]
    for i, image in enumerate(images):
        image[0, 0] = (what[i], i, 0)
    return images


def pids(pool: WorkerPool) -> list[int]:
    return [worker.pid for worker in pool._workers]


def gone(pids: Iterable[int]) -> bool:
    for pid in pids:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                return False
        except (FileNotFoundError, ProcessLookupError):
            pass
    return True


def test_answers_come_in_order_and_from_all_workers(pool):
    answers = pool.read(scripted_images(*[UNEVEN] * 30), HANG)
    assert [answer[0] for answer in answers] == [str(i) for i in range(30)]
    assert len({answer[1] for answer in answers}) == 2


def test_processes_start_with_the_first_batch_and_stay(pool):
    assert pids(pool) == []
    pool.read(scripted_images(READ), HANG)
    (first,) = pids(pool)  # one image needs one worker
    pool.read(scripted_images(*[READ] * 4), HANG)
    assert pids(pool)[0] == first
    assert len(pids(pool)) == 2


def test_large_images_pass_the_pipe(pool):
    assert len(pool.read(scripted_images(*[READ] * 3, side=1024), HANG)) == 3


def test_an_empty_batch(pool):
    assert pool.read([], 1) == []


@pytest.mark.parametrize(
    ("what", "cause"), [(EXIT, "ended with exit status 7"), (KILLED, "killed by signal 9")]
)
def test_a_crash_names_the_image_and_the_next_batch_works(pool, what, cause):
    with pytest.raises(PoolError, match=cause) as caught:
        pool.read(scripted_images(READ, READ, what, READ), HANG)
    assert caught.value.indices == (2,)
    assert [answer[0] for answer in pool.read(scripted_images(READ, READ), HANG)] == ["0", "1"]


def test_a_failure_of_the_engine_names_the_images_and_spares_the_workers(pool):
    pool.read(scripted_images(READ, READ), HANG)
    before = pids(pool)
    with pytest.raises(
        PoolError, match=r"ValueError: cannot read 1.*ValueError: cannot read 3"
    ) as e:
        pool.read(scripted_images(READ, RAISE, READ, RAISE), HANG)
    assert e.value.indices == (1, 3)
    assert pids(pool) == before


def test_a_deadline_names_what_was_not_read_and_the_next_batch_works(pool):
    for seconds in DEADLINES:
        pool.read(scripted_images(READ, READ), HANG)
        with pytest.raises(PoolError, match=rf"4 images were not read within {seconds:g} s") as e:
            pool.read(scripted_images(READ, STUCK, READ, READ), seconds)
        assert 1 in e.value.indices
        if e.value.indices == (1,):
            break
    assert e.value.cause.startswith("1 of 4 images were not read")
    assert len(pool.read(scripted_images(READ, READ), HANG)) == 2


def test_an_engine_that_does_not_start_says_why(file):
    pool = WorkerPool(file, "Scripted", {"detection_side": 666}, 1)
    with pytest.raises(PoolError, match="did not start: RuntimeError: no models"):
        pool.read(scripted_images(READ), HANG)
    assert pids(pool) == []


@linux
def test_close_ends_the_processes_and_may_be_repeated(pool):
    pool.read(scripted_images(READ, READ), HANG)
    before = pids(pool)
    pool.close()
    pool.close()
    assert gone(before)  # it has waited for them
    assert len(pool.read(scripted_images(READ), HANG)) == 1


@linux
def test_a_dropped_pool_ends_its_processes(file):
    pool = WorkerPool(file, "Scripted", {}, 1)
    pool.read(scripted_images(READ), HANG)
    (pid,) = pids(pool)
    del pool
    wait_until(lambda: gone([pid]), "the worker did not end")


@linux
def test_workers_leave_signals_to_the_parent(pool):
    pool.read(scripted_images(READ, READ), HANG)
    before = pids(pool)
    for pid in before:
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    assert len(pool.read(scripted_images(READ, READ), HANG)) == 2
    assert pids(pool) == before


# Loads the file alone: the package would bring torch, two seconds for every process started here.
LOAD = """
    import importlib.util, os, signal, sys
    import numpy as np
    from pathlib import Path

    spec = importlib.util.spec_from_file_location("pool", {pool!r})
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    WorkerPool = module.WorkerPool
"""

# A parent without a main guard and with a SIGTERM handler, as a trainer has one.
PARENT = """
    signal.signal(signal.SIGTERM, lambda *_: print("parent handles SIGTERM", flush=True))
    pool = WorkerPool(Path({file!r}), "Scripted", {{}}, 2)
    images = [np.zeros((4, 4, 3), np.uint8) for _ in range(4)]
    pool.read(images, {seconds})
    print("pids", *[worker.pid for worker in pool._workers], flush=True)
    images[1][0, 0] = {what}
    if {what}:
        pool.read(images, 1e6)
    print("done", flush=True)
"""


def script(code: str, **values: object) -> str:
    values |= {
        "pool": str(ROOT / "rewards" / "heads" / "ocr" / "pool.py"),
        "root": str(ROOT),
        "seconds": HANG,
    }
    values["file"] = str(values["file"])
    return textwrap.dedent(code).format(**values)


@contextmanager
def parent(file: Path, what: int) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    code = script(LOAD + PARENT, file=file, what=what)
    with running([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield process, [int(word) for word in process.stdout.readline().split()[1:]]


@linux
def test_interpreter_exit_neither_hangs_nor_leaves_workers(file):
    with parent(file, READ) as (process, workers):
        assert process.stdout is not None
        assert process.wait(HANG) == 0
        assert process.stdout.read() == "done\n"
    assert len(workers) == 2
    wait_until(lambda: gone(workers), "the workers did not end")


@linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_worker_outlives_its_parent_even_in_the_middle_of_an_image(file, number):
    with parent(file, STUCK) as (process, workers):
        wait_until(Path(f"{file}.hangs").exists, "no image was begun")
        process.send_signal(number)
        process.communicate(timeout=HANG)
        assert process.returncode != 0
    wait_until(lambda: gone(workers), "the workers did not end")


@linux
def test_workers_do_not_run_the_main_script_of_a_parent_with_torch_threads(file, tmp_path):
    main = """
        import signal, sys, torch
        print("main script runs", flush=True)
        torch.set_num_threads(2)
        torch.rand(600, 600) @ torch.rand(600, 600)
        sys.path.insert(0, {root!r})
        import numpy as np
        from pathlib import Path
        from rewards.heads.ocr.pool import WorkerPool
    """
    path = tmp_path / "unguarded.py"
    path.write_text(script(main, file=file) + script(PARENT, file=file, what=READ))
    out = subprocess.run(
        [sys.executable, str(path)], check=True, capture_output=True, text=True, timeout=HANG
    )
    assert out.stdout.count("main script runs") == 1
    assert out.stdout.endswith("done\n")


@linux
def test_a_forked_child_leaves_the_workers_of_its_parent_alone(file):
    fork = """
    pool = WorkerPool(Path({file!r}), "Scripted", {{}}, 1)
    image = np.zeros((4, 4, 3), np.uint8)

    def pid():
        return pool.read([image], {seconds})[0][1]

    first = pid()
    child = os.fork()
    if child == 0:
        print("child", pid(), flush=True)
        pool.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert pid() == first
    print("parent", first, flush=True)
    """
    code = script(LOAD + fork, file=file)
    out = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=HANG
    )
    names, workers = zip(*(line.split() for line in out.stdout.splitlines()), strict=True)
    assert names == ("child", "parent")
    assert len(set(workers)) == 2
    wait_until(lambda: gone(map(int, workers)), "the workers did not end")


def test_the_head_turns_positions_into_samples(file, monkeypatch):
    spec = importlib.util.spec_from_file_location("scripted_engine", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "scripted_engine", module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(ENGINES, "scripted", module.Scripted)

    prompts = ["no target", 'a "0"', 'a "1"', "none", 'a "2"']
    first_pixels = scripted_images(READ, READ, EXIT, READ, RAISE)
    pixels = torch.from_numpy(np.stack(first_pixels)).permute(0, 3, 1, 2).float() / 255
    batch = RewardBatch(prompts=prompts, images=pixels.contiguous())
    head = create("ocr", engine="scripted", workers=1)
    head.name = "legible"
    with pytest.raises(RewardError, match="exit status 7") as caught:
        head(batch)
    assert (caught.value.head, caught.value.samples) == ("legible", ((2, 'a "1"'),))
    head.close()

    here = create("ocr", engine="scripted", workers=0)
    pixels[2, :, 0, 0] = 0
    batch = RewardBatch(prompts=prompts, images=pixels.contiguous())
    with pytest.raises(RewardError, match="cannot read 4") as caught:
        here(batch)
    assert caught.value.samples == ((4, 'a "2"'),)

    late = create("ocr", engine="scripted", workers=0, timeout=1e-9)
    with pytest.raises(RewardError, match="were not read within 1e-09 s"):
        late(batch)
